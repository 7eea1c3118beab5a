"""Hard Patches Mining for masked image modelling: a ViT that learns by setting its own exercises.

import hpm
hpm.pretrain("photos/", "runs/photos", encoder="vit_small_patch16_224", epochs=200)
backbone = hpm.load_encoder("runs/photos")                        # a plain timm model
scores = hpm.load_teacher("runs/photos").predict_loss(images)     # (B, N), what is hard
"""

from importlib.metadata import version

from hpm.errors import InputError, Interrupted
from hpm.pretrain import pretrain
from hpm.run_folder import load_encoder, load_teacher

__version__ = version("hpm")
__all__ = ["InputError", "Interrupted", "__version__", "load_encoder", "load_teacher", "pretrain"]
