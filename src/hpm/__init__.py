"""Hard Patches Mining for masked image modelling."""
