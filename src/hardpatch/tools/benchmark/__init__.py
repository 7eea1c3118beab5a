"""How fast a training step is, beside the published one and beside peers, measured in turns."""
