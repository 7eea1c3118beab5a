"""Hard Patches Mining for masked image modelling: a ViT that learns by setting its own exercises.

import hardpatch
hardpatch.pretrain("photos/", "runs/photos", encoder="vit_small_patch16_224", epochs=200)
backbone = hardpatch.load_encoder("runs/photos")                        # a plain timm model
scores = hardpatch.load_teacher("runs/photos").predict_loss(images)     # (B, N), what is hard
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardpatch.evaluate.classify.classifier import load_classifier
    from hardpatch.method.hpm import HPM
    from hardpatch.runs.load import load_encoder, load_teacher
    from hardpatch.runtime.errors import InputError, Interrupted
    from hardpatch.tools.first_run import pretrain

__version__: str
__all__ = [
    "HPM",
    "InputError",
    "Interrupted",
    "__version__",
    "load_classifier",
    "load_encoder",
    "load_teacher",
    "pretrain",
]

_MODULES = {
    "HPM": "hardpatch.method.hpm",
    "InputError": "hardpatch.runtime.errors",
    "Interrupted": "hardpatch.runtime.errors",
    "load_classifier": "hardpatch.evaluate.classify.classifier",
    "load_encoder": "hardpatch.runs.load",
    "load_teacher": "hardpatch.runs.load",
    "pretrain": "hardpatch.tools.first_run",
}


if not TYPE_CHECKING:  # or a type checker would take every name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: torch takes seconds, and help needs none of it."""
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("hardpatch")
        elif name in _MODULES:
            value = getattr(import_module(_MODULES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
