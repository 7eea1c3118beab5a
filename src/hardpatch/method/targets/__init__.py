"""What the student reconstructs: one file for each kind of target."""
