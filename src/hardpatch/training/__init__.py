"""Pre-training: the loop, its state, its batches, what it reports."""
