"""``hardpatch doctor``: will hardpatch run well here, before a day of training is lost on finding out?

What may break Python (a broken torch, a driver that hangs, a missing compiler) is tried in a process of its own.
"""
