"""Hard Patches Mining for masked image modelling: a ViT that learns by setting its own exercises.

import hardpatch
hardpatch.pretrain("photos/", "runs/photos", encoder="vit_small_patch16_224", epochs=200)
backbone = hardpatch.load_encoder("runs/photos")                        # a plain timm model
scores = hardpatch.hardness("runs/photos", images)                     # (B, rows, columns): what is hard
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardpatch.embed.difficulty import hardness
    from hardpatch.evaluate.classify.classifier import load_classifier
    from hardpatch.method.hpm import HPM
    from hardpatch.runs.load import load_encoder, load_teacher
    from hardpatch.runtime.errors import InputError, Interrupted
    from hardpatch.tools.first_run import pretrain
    from hardpatch.tools.functions import (
        embed_images,
        evaluate_detect,
        evaluate_finetune,
        evaluate_foreground,
        evaluate_knn,
        evaluate_linear,
        evaluate_segment,
        export_weights,
        visualize,
    )

__version__: str
__all__ = [
    "HPM",
    "InputError",
    "Interrupted",
    "__version__",
    "embed_images",
    "evaluate_detect",
    "evaluate_finetune",
    "evaluate_foreground",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_segment",
    "export_weights",
    "hardness",
    "load_classifier",
    "load_encoder",
    "load_teacher",
    "pretrain",
    "visualize",
]

_MODULES = {
    "HPM": "hardpatch.method.hpm",
    "InputError": "hardpatch.runtime.errors",
    "Interrupted": "hardpatch.runtime.errors",
    "embed_images": "hardpatch.tools.functions",
    "evaluate_detect": "hardpatch.tools.functions",
    "evaluate_finetune": "hardpatch.tools.functions",
    "evaluate_foreground": "hardpatch.tools.functions",
    "evaluate_knn": "hardpatch.tools.functions",
    "evaluate_linear": "hardpatch.tools.functions",
    "evaluate_segment": "hardpatch.tools.functions",
    "export_weights": "hardpatch.tools.functions",
    "hardness": "hardpatch.embed.difficulty",
    "load_classifier": "hardpatch.evaluate.classify.classifier",
    "load_encoder": "hardpatch.runs.load",
    "load_teacher": "hardpatch.runs.load",
    "pretrain": "hardpatch.tools.first_run",
    "visualize": "hardpatch.tools.functions",
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
