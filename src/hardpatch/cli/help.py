"""Help in two tiers: ``--help`` shows the flags that most people need, ``--help-all`` every one.

What a flag means stands in the docstring of its field, and nowhere else.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple


class Short(NamedTuple):
    """What ``--help`` of a command shows."""

    flags: tuple[str, ...]
    examples: tuple[str, ...]


SHORT = {
    "pretrain": Short(
        ("data", "out", "val", "budget", "recipe", "image_size", "channels", "encoder", "epochs", "batch_size",
         "init_from", "seed", "workers", "resume"),
        (
            "hardpatch pretrain --data photos/ --out runs/photos",
            "hardpatch pretrain --data photos/train --val photos/val --out runs/photos --budget 2h",
            "hardpatch pretrain --data 'scenes/*.tar' --channels 13 --out runs/scenes --budget 8h",
            "hardpatch pretrain --data photos/ --out runs/mae --recipe mae-norm-pix --epochs 200",
        ),
    ),
    "plan": Short(
        ("data", "budget", "method", "out", "processes", "memory_gigabytes", "image_size", "channels", "encoder",
         "epochs", "batch_size"),
        (
            "hardpatch plan --data photos/ --budget 8h",
            "hardpatch plan --data photos/ --budget 2d --processes 8 --out plan.yaml",
        ),
    ),
    "ablate": Short(
        ("suite", "data", "val", "out", "scale", "seeds", "rows", "equal_compute", "equal_time", "epochs",
         "batch_size", "image_size"),
        (
            "hardpatch ablate --suite main --data photos/train --val photos/val --scale mini --out ablations/photos",
            "hardpatch ablate --suite main --rows mae-norm-pix hpm --seeds 0 1 --data photos/ --scale mini --out two",
        ),
    ),
    "evaluate linear": Short(
        ("checkpoint", "train", "val", "mode", "labels_per_class", "epochs", "pooling", "against", "seed", "device"),
        (
            "hardpatch evaluate linear --checkpoint runs/photos --train photos/train --val photos/val",
            "hardpatch evaluate linear --checkpoint runs/photos --train photos/ --mode logistic --against runs/mae",
        ),
    ),
    "evaluate finetune": Short(
        ("checkpoint", "train", "val", "out", "labels_per_class", "epochs", "batch_size", "base_learning_rate",
         "untrained", "against", "seed", "device"),
        (
            "hardpatch evaluate finetune --checkpoint runs/photos --train photos/train --val photos/val",
            "hardpatch evaluate finetune --checkpoint runs/photos --train photos/ --labels-per-class 50 --untrained",
        ),
    ),
    "evaluate segment": Short(
        ("checkpoint", "images", "masks", "val_images", "val_masks", "out", "head", "finetune", "epochs",
         "class_names", "binary", "against", "device"),
        ("hardpatch evaluate segment --checkpoint runs/cells --images cells/images --masks cells/masks",),
    ),
    "evaluate detect": Short(
        ("checkpoint", "train_images", "train_annotations", "val_images", "val_annotations", "out", "freeze", "size",
         "epochs", "untrained", "against", "device"),
        (
            "hardpatch evaluate detect --checkpoint runs/photos --train-images photos/ --train-annotations boxes.json",
        ),
    ),
}  # fmt: skip
"""By command; the others show all they have."""

PLANNED = ("image_size", "channels", "patch_size", "encoder", "epochs", "batch_size")
"""What a run without a recipe chooses by itself."""

_VALUES = {
    "SRC": "data val train images val_images train_images", "FOLDER": "masks val_masks", "PATH": "out",
    "RUN": "checkpoint", "RUN ...": "against", "NAME": "recipe encoder method suite scale", "NAME ...": "rows",
    "N ...": "seeds", "TIME": "budget", "PIXELS": "image_size", "WEIGHTS": "init_from",
    "FILE": "train_annotations val_annotations class_names",
}  # fmt: skip


def short_help(prog: str, kind: type, settings: Any, *, planned: bool) -> str:
    """What ``--help`` prints of a command with many flags.

    Args:
        prog: The command.
        kind: Its dataclass.
        settings: The config whose fields it takes as well, with the values that hold where none is given; None: none.
        planned: Are sizes and length chosen from the images?
    """
    about: dict[str, tuple[str, str, Any]] = {}
    for part in [*([getattr(settings, item.name) for item in fields(settings)] if settings else []), kind]:
        documented = _documented(part if isinstance(part, type) else type(part))
        for item in fields(part):
            default = item.default if isinstance(part, type) else getattr(part, item.name)
            about[item.name] = (*documented.get(item.name, ("str", "")), default)
    short = SHORT[prog]
    lines = [f"usage: hardpatch {prog} [FLAGS]", "", *_paragraphs(inspect.getdoc(kind) or ""), ""]
    for name in short.flags:
        annotation, text, default = about[name]
        value = _value(name, annotation, default)
        if planned and name in PLANNED:
            told = "chosen from the images and the machine"
        else:
            told = "" if default is MISSING else _shown(default)
        if name == "data":
            default = MISSING
        flag = f"  --{name.replace('_', '-')}{value and ' ' + value}"
        text = " ".join(text.split()) + (f" [{told}]" if told else " (required)" if default is MISSING else "")
        first, *rest = textwrap.wrap(text, 88)
        lines.append(f"{flag:<30}{first}" if len(flag) < 29 else f"{flag}\n{'':30}{first}")
        lines += [f"{'':30}{line}" for line in rest]
    lines.append(f"{'  --json':<30}Print the figures as one JSON object in the last line.")
    lines += ["", "examples:", *(f"  {line}" for line in short.examples), ""]
    lines.append(f"hardpatch {prog} --help-all shows all {len(about) + 1} flags, by section.")
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    """Text as paragraphs of lines."""
    wrapped = ["\n".join(textwrap.wrap(" ".join(part.split()), 110)) for part in text.split("\n\n")]
    return "\n\n".join(wrapped).splitlines()


def _documented(kind: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of every field, as they stand in the source; those of bases, too."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        if not (body := _body(base)):
            continue
        for line, following in zip(body, [*body[1:], None]):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = ""
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    text = str(following.value.value)
                found[line.target.id] = (ast.unparse(line.annotation), text)
    return found


def _body(kind: type) -> Sequence[ast.stmt]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    return tree.body if isinstance(tree, ast.ClassDef) else ()


def _value(name: str, annotation: str, default: Any) -> str:
    """What to write after a flag."""
    if "Literal[" in annotation:
        inner = annotation.partition("Literal[")[2].rpartition("]")[0]
        return "{" + inner.replace("'", "").replace(", ", ",").partition("]")[0] + "}"
    if annotation.startswith("bool"):
        return ""
    if found := next((value for value, names in _VALUES.items() if name in names.split()), None):
        return found
    return "N" if any(word in annotation for word in ("Positive", "NotNegative", "int", "Seed", "Float")) else "VALUE"


def _shown(default: Any) -> str:
    """A default as one would write it; nothing where there is none."""
    if default is None or default == "" or default == () or default is False:
        return ""
    if isinstance(default, tuple):
        return " ".join(str(item) for item in default)
    return "on" if default is True else str(default)
