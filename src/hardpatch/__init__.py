"""Hard Patches Mining for masked image modelling: a ViT that learns by setting its own exercises.

import hpm
hpm.pretrain("photos/", "runs/photos", encoder="vit_small_patch16_224", epochs=200)
backbone = hpm.load_encoder("runs/photos")                        # a plain timm model
scores = hpm.load_teacher("runs/photos").predict_loss(images)     # (B, N), what is hard
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpm.errors import InputError, Interrupted
    from hpm.evaluate.classifier import load_classifier
    from hpm.pretrain import pretrain
    from hpm.run_folder import load_encoder, load_teacher

__version__: str
__all__ = [
    "InputError",
    "Interrupted",
    "__version__",
    "load_classifier",
    "load_encoder",
    "load_teacher",
    "pretrain",
]

_HOMES = {
    "InputError": "hpm.errors",
    "Interrupted": "hpm.errors",
    "load_classifier": "hpm.evaluate.classifier",
    "load_encoder": "hpm.run_folder",
    "load_teacher": "hpm.run_folder",
    "pretrain": "hpm.pretrain",
}


if not TYPE_CHECKING:  # or a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Import what is asked for when it is asked for: torch takes seconds, and ``hpm --help`` needs none of it."""
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("hpm")
        elif name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``hpm.pretrain`` is the function: Python would bind the module of that name here whenever it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "pretrain" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
