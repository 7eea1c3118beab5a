"""Every command's config is held against the rules of its fields, for flags and for Python callers alike."""

import re
import types
from dataclasses import MISSING, dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from hardpatch.cli import COMMANDS, main
from hardpatch.config.benchmark import LoadingConfig, StepConfig
from hardpatch.config.commands import (
    CheckConfig,
    ConvertConfig,
    DemoCommand,
    DoctorConfig,
    EmbedConfig,
    ExportConfig,
    PackConfig,
    PretrainCommand,
    StatsConfig,
    VisualizeCommand,
)
from hardpatch.config.config import Config
from hardpatch.config.dense_evaluations import DetectConfig, SegmentConfig
from hardpatch.config.evaluations import FinetuneConfig, ForegroundConfig, KnnConfig, LinearConfig
from hardpatch.config.fields import Positive, Settings
from hardpatch.config.plan import PlanConfig
from hardpatch.runtime.errors import InputError
from hardpatch.tools.ablate.suites import AblateConfig

CONFIGS = {
    "demo": DemoCommand, "doctor": DoctorConfig, "plan": PlanConfig, "pretrain": PretrainCommand,
    "evaluate knn": KnnConfig, "evaluate linear": LinearConfig, "evaluate finetune": FinetuneConfig,
    "evaluate foreground": ForegroundConfig, "evaluate segment": SegmentConfig, "evaluate detect": DetectConfig,
    "ablate": AblateConfig, "data check": CheckConfig, "data stats": StatsConfig, "data pack": PackConfig,
    "benchmark step": StepConfig, "benchmark data": LoadingConfig,
    "visualize": VisualizeCommand, "embed": EmbedConfig, "export": ExportConfig, "convert": ConvertConfig,
}  # fmt: skip
ANY_NUMBER = {"no_data", "value_range", "mean"}
"""Fields for which every number is right."""
REQUIRED = {"format": "timm"}
"""Values of required fields that may not be any text."""


def plain(hint):
    """A field's type without None and annotations, as (type, number of values to give it)."""
    if hasattr(hint, "__metadata__"):
        return plain(hint.__origin__)
    options = [option for option in get_args(hint) if option is not types.NoneType]
    if get_origin(hint) is tuple:
        return plain(options[0])[0], len(options) - (Ellipsis in options)
    if (options and get_origin(hint) is types.UnionType) or str(get_origin(hint)) == "typing.Union":
        return plain(options[0])
    return hint, 1


def numbers(kind):
    """Fields of numbers, each with how many it takes."""
    found = {name: plain(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {name: count for name, (what, count) in found.items() if what in (int, float) and name not in ANY_NUMBER}


CASES = [(command, name, count) for command, kind in CONFIGS.items() for name, count in numbers(kind).items()]


def required(kind):
    return {item.name: REQUIRED.get(item.name, "x") for item in fields(kind) if item.default is MISSING}


def test_every_command_is_looked_at():
    assert CONFIGS.keys() == COMMANDS.keys() - {"recipes"}
    assert len(CASES) > 90


@pytest.mark.parametrize(("command", "name", "count"), CASES)
def test_a_wrong_number_is_refused_by_its_field(command, name, count, capsys):
    kind = CONFIGS[command]
    with pytest.raises(InputError, match=rf"(?m)^{name}(\.0)?: .*, got -2"):
        kind(**required(kind) | {name: (-2,) * count if "tuple" in str(get_type_hints(kind)[name]) else -2})

    data = required(kind).pop("data", None) if command.startswith("data ") else None
    words = [word for key, value in required(kind).items() if not (key == "data" and data)
             for word in (f"--{'from' if key == 'source' else key.replace('_', '-')}", value)]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main([*command.split(), *([data] if data else []), *words, f"--{name.replace('_', '-')}", *["-2"] * count])
    assert left.value.code == 2
    assert re.search(rf"(?m)^hardpatch: {name}(\.0)?: input should be .*, got -2", capsys.readouterr().err)


@pytest.mark.parametrize(("flag", "message"), [
    (["--size", "0"], "size: input should be greater than or equal to 1, got 0"),
    (["--quality", "-5"], "quality: input should be greater than or equal to 1, got -5"),
    (["--quality", "101"], "quality: input should be less than or equal to 100, got 101"),
])  # fmt: skip
def test_data_pack(flag, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["data", "pack", "shapes:2", "--out", str(tmp_path / "out"), *flag])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "values", "message"), [
    (CheckConfig, {"near_bits": 17}, "near_bits"), (KnnConfig, {"k": ()}, "k: .* at least 1 item"),
    (KnnConfig, {"max_damaged": 2.0}, "max_damaged"), (LinearConfig, {"batch_size": 1}, "batch_size"),
    (SegmentConfig, {"window_overlap": 1.0}, "window_overlap"), (SegmentConfig, {"num_classes": 1}, "num_classes"),
    (SegmentConfig, {"val_share": 1.0}, "val_share"), (DetectConfig, {"anchor_scale": 0.0}, "anchor_scale"),
    (AblateConfig, {"seeds": ()}, "seeds: .* at least 1 item"), (DoctorConfig, {"seconds": float("inf")}, "seconds"),
    (PackConfig, {"size": 0, "quality": 0}, "(?s)size: .*quality: "),
])  # fmt: skip
def test_ends_of_ranges_and_other_rules(kind, values, message):
    with pytest.raises(InputError, match=message):
        kind(**required(kind) | values)


@dataclass(frozen=True)
class Toy(Settings):
    """Not checked by the types of the test suite, so that wrong types reach the check."""

    sides: tuple[Positive, ...]
    kind: Literal["long", "short"] = "long"


def test_types_are_checked_and_a_list_becomes_the_tuple_of_its_field():
    assert Toy([5, 10]).sides == (5, 10)
    with pytest.raises(InputError, match=r"(?s)sides\.1: .*, got 1\.5\nkind: .*'long' or 'short', got 'wide'"):
        Toy((1, 1.5), kind="wide")


def test_every_number_of_a_run_has_a_rule():
    sections = {item.name: item.default_factory for item in fields(Config)}
    free = [name for section in sections.values() for name in numbers(section)
            if not has_rule(get_type_hints(section, include_extras=True)[name])]  # fmt: skip
    assert free == []


def has_rule(hint):
    """Is there an annotation somewhere in a type?"""
    return hasattr(hint, "__metadata__") or any(map(has_rule, get_args(hint)))
