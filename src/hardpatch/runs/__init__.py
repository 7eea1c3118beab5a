"""What a run is made of and leaves behind: models, checkpoints, the folder, weights read back."""
