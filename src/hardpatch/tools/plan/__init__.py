"""``hardpatch plan``: images, a machine and a time budget -> model, sizes, batch, length of the run."""
