"""``hpm plan``: images, a machine and a time budget -> model, sizes, batch, length of the run.

images.py     what the images are, and how fast they load
sizes.py      the rules: which image size, patch, encoders, batch; pure functions
plan.py       measures a step of each encoder here, and chooses
"""
