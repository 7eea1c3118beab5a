"""``hardpatch data check``: what is in a source, before anything is learnt from it."""
