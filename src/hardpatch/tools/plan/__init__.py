"""``hardpatch plan``: images, a machine and a time budget -> model, sizes, batch, length of the run.

sizes.py        the rules: which image size, patch, encoders, batch; pure functions
images.py       what the images are, and how fast they load
candidates.py   a run with each encoder, cut so that it fits into memory
timing.py       how long its step takes here
plan.py         chooses, and says what to do
"""
