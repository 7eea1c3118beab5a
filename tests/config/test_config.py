"""Configs: every wrong value is named, YAML comes back equal, schedules are resolved as documented."""

import dataclasses
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import yaml

from hardpatch.config.config import Config, OptimisationConfig
from hardpatch.config.recipes import METHODS, SCALES, TARGETS, recipe
from hardpatch.config.values import decisions, differences, load_config, section_of, to_yaml, validated, with_fields
from hardpatch.runs.schedule import resolve_schedule
from hardpatch.runtime.errors import InputError

IMAGENET = 1_281_167
"""Training images of ImageNet-1K."""


def refusal(**fields):
    with pytest.raises(InputError) as caught:
        with_fields(Config(), fields)
    return str(caught.value)


def read(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path)


# Fields


def test_field_names_are_unique_across_sections():
    names = [
        item.name for section in dataclasses.fields(Config) for item in dataclasses.fields(section.default_factory)
    ]
    assert len(names) == len(set(names)) == len(section_of())
    assert set(section_of().values()) == {section.name for section in dataclasses.fields(Config)}


def test_fields_are_set_by_name_whatever_their_section():
    config = with_fields(
        Config(), {"epochs": 3, "data": Path("photos"), "mask_ratio": 0.5, "workers": 0, "image_size": 96}
    )
    assert config.optimisation.epochs == 3
    assert config.data.data == "photos"
    assert config.method.mask_ratio == 0.5
    assert config.run.workers == 0
    assert config.data.image_size == (96, 96)
    assert config.model == Config().model


def test_unknown_field_is_refused_with_a_suggestion():
    assert refusal(epoch=3) == "epoch: no such field; did you mean epochs?"
    assert refusal(mask_ration=0.5).endswith("did you mean mask_ratio?")
    assert refusal(zzzzzz=1) == "zzzzzz: no such field"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("mask_ratio", value) for value in (0, 1, 2, -0.1, "many", None)],
        *[("epochs", value) for value in (0, -1, 1.5, "ten", None)],
        *[("batch_size", value) for value in (0, -256)],
        *[("image_size", value) for value in (0, -8, (), (64, 64, 64), (64, -1), "large")],
        *[("crop_scale", value) for value in ((0, 1), (0.5, 2), (-1, 1), (0.5,))],
        *[("base_learning_rate", value) for value in (0, -1e-4, float("nan"), float("inf"))],
        *[("weight_decay", value) for value in (-0.1, float("nan"))],
        *[("hard_share_start", value) for value in (-0.1, 1.1)],
        *[("hard_share_end", value) for value in (-0.1, 1.1)],
        *[("betas", value) for value in ((0.9,), (0, 0.9), (0.9, 1))],
        *[("ema_start", value) for value in (-0.1, 1.1)],
        *[("max_damaged", value) for value in (-0.1, 1.1)],
        ("mean", ("a", 0, 0)),
        ("std", (1, 1, 0)),
        ("target", "pixel"),
        ("mask", "hardest"),
        ("predicted_loss", "bce"),
        ("hard_share_unit", "day"),
        ("device", "tpu"),
        ("precision", "fp16"),
        ("prediction_weight", -1),
        ("warmup_epochs", -1),
        ("gradient_clip", 0),
        ("seed", -1),
        ("channels", 0),
        ("patch_size", 0),
        ("decoder_depth", 0),
        ("workers", -1),
        ("keep_last", 0),
        ("log_steps", 0),
        ("checkpoint_minutes", 0),
        ("flip", "perhaps"),
    ],
)
def test_value_out_of_range_is_refused_with_field_and_value(name, value):
    message = refusal(**{name: value})
    assert re.match(rf"(\w+\.)?{name}(\.\d+)?: ", message)
    assert "got " in message
    assert not re.search(r"pydantic|https?://", message)


def test_every_wrong_field_is_named_at_once():
    message = refusal(epochs=0, mask_ratio=2)
    assert "epochs" in message
    assert "mask_ratio" in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mask": "hard", "predicted_loss": "none"}, ("mask", "predicted_loss")),
        ({"crop_scale": (0.9, 0.2)}, ("crop_scale", "0.9")),
        ({"mean": (0.5,), "std": (0.5,)}, ("mean", "(3)", "got 1")),
        ({"mean": (0.5, 0.5, 0.5)}, ("mean", "std")),
        ({"std": (0.5, 0.5, 0.5)}, ("mean", "std")),
        ({"channels": 13, "mean": (0.5,) * 3, "std": (0.5,) * 3}, ("mean", "(13)", "got 3")),
        ({"decoder_width": 96, "decoder_heads": 5}, ("decoder_heads", "96", "got 5")),
        ({"decoder_width": 6, "decoder_heads": 3}, ("decoder_width", "got 6")),
    ],
)
def test_rules_between_fields(fields, named):
    message = refusal(**fields)
    assert all(part in message for part in named)


def test_values_at_the_edge_of_a_rule_are_taken():
    edge = {
        "hard_share_start": 0,
        "hard_share_end": 1,
        "crop_scale": (1, 1),
        "warmup_epochs": 0,
        "seed": 0,
        "workers": 0,
    }
    assert with_fields(Config(), edge).method.hard_share_end == 1


# YAML


@pytest.mark.parametrize("name", ["hpm-both-norm-pix", "attmask", "shapes-demo", "mae-large-imagenet-800"])
def test_yaml_comes_back_equal(tmp_path, name):
    config = recipe(name)
    assert read(tmp_path, to_yaml(config, {"git": "abc", "command": "hardpatch pretrain"})) == config


def test_yaml_holds_about_and_plain_values():
    content = yaml.safe_load(to_yaml(Config(), {"git": "abc"}))
    assert content["about"] == {"git": "abc"}
    assert content["data"]["image_size"] == [224, 224]


def test_yaml_fields_may_stand_without_sections(tmp_path):
    config = read(tmp_path, "data: photos\nepochs: 5\nmethod:\n  mask: random\nbase_learning_rate: 2e-3\n")
    assert config == with_fields(
        Config(), {"data": "photos", "epochs": 5, "mask": "random", "base_learning_rate": 2e-3}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 5", "did you mean epochs?"),
        ("optimisation:\n  epoch: 5", "did you mean epochs?"),
        ("optimization:\n  epochs: 5", "did you mean optimisation?"),
        ("1: 2", "1: no such field"),
        ("off: 2", "no such field"),
        ("epochs: many", "epochs"),
        ("- epochs", "must hold a mapping of fields, got list"),
        ("", "must hold a mapping"),
        ("a: [1", "no valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "no valid YAML"),
        ("\x00", "no valid YAML"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


def test_missing_or_binary_config_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="no valid YAML"):
        load_config(tmp_path / "photo.yaml")


# Recipes


@pytest.mark.parametrize("name", [*METHODS, *(f"hpm-{part}" for part in (*TARGETS, *SCALES)), "shapes-demo"])
def test_every_recipe_is_valid(name):
    config = recipe(name)
    assert validated(asdict(config)) == config


def test_a_recipe_is_method_target_and_scale():
    config = recipe("colormae-hog-64px")
    assert (config.method.mask, config.method.target, config.data.size) == ("green_noise", "hog", (64, 64))
    assert recipe("colormae").method.target == "norm_pix"
    assert recipe("mae").method.target == "pixels"
    assert recipe("mae").data.size == (224, 224)


def test_parts_of_recipes_are_documented_and_all_different():
    for table in (METHODS, TARGETS, SCALES):
        assert all(part.about for part in table.values())
        fields = [part.fields for part in table.values()]
        assert all(a != b for number, a in enumerate(fields) for b in fields[:number])


def test_a_recipe_name_means_one_thing():
    names = ["-".join(filter(None, p)) for p in product(METHODS, ("", *TARGETS), ("", *SCALES))]
    assert len(set(names)) == len(names)


def test_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="hpm-norm-pix"):
        recipe("hpm-norm-pixels")


def test_published_recipe_is_the_published_run():
    """METHOD.md 1.2, 1.3, 1.7, 1.8; batch 4,096 from the recipe's own docstring."""
    config = recipe("hpm-imagenet-200")
    schedule = resolve_schedule(config.optimisation, IMAGENET)
    assert schedule.steps_per_epoch == 625
    assert schedule.total_steps == 200 * 625
    assert schedule.warmup_steps == 40 * 625
    assert schedule.peak_learning_rate == pytest.approx(1.5e-4 * 2048 / 256)
    assert schedule.ema == (0.999, 0.9999, 100 * 625)
    optimisation, method, model = config.optimisation, config.method, config.model
    assert optimisation.betas == (0.9, 0.95)
    assert optimisation.weight_decay == 0.05
    assert optimisation.gradient_clip == 5
    assert (method.mask_ratio, method.hard_share_start, method.hard_share_end) == (0.75, 0, 0.5)
    assert (method.hard_share_unit, method.predicted_loss, method.predictor_view) == (
        "epoch",
        "relative",
        "masked",
    )
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads, model.predictor_depth) == (
        512,
        8,
        16,
        8,
    )
    assert (config.data.crop_scale, config.data.flip) == ((0.2, 1), True)


# Schedules


def test_batch_larger_than_the_data_is_refused():
    assert resolve_schedule(OptimisationConfig(batch_size=100), 100).steps_per_epoch == 1
    with pytest.raises(InputError, match=r"batch_size.*\(99\).*got 100"):
        resolve_schedule(OptimisationConfig(batch_size=100), 99)


def test_constants_adapt_to_a_short_run_and_given_ones_stay():
    schedule = resolve_schedule(OptimisationConfig(epochs=10, batch_size=10), 105)
    assert (schedule.steps_per_epoch, schedule.total_steps, schedule.warmup_steps) == (10, 100, 10)
    assert schedule.ema.start < 0.999
    assert schedule.ema.ramp_steps == 50
    fixed = OptimisationConfig(epochs=10, batch_size=10, ema_start=0.8, ema_ramp_epochs=2.5, warmup_epochs=0.0)
    given = resolve_schedule(fixed, 105)
    assert (given.ema.start, given.ema.end, given.ema.ramp_steps) == (0.8, schedule.ema.end, 25)
    assert given.warmup_steps == 0
    with pytest.raises(InputError, match="ema_start: must be at most ema_end"):
        resolve_schedule(OptimisationConfig(epochs=10, batch_size=10, ema_start=0.99), 105)


def test_differences_are_the_fields_that_decide_the_result():
    changed = with_fields(Config(), {"epochs": 3, "mask_ratio": 0.5, "workers": 3, "keep_last": 9})
    assert differences(Config(), Config()) == []
    assert differences(Config(), changed) == ["mask_ratio: 0.75 -> 0.5", "epochs: 200 -> 3"]


def test_a_run_is_known_by_what_differs_from_the_defaults():
    config = with_fields(Config(), {"data": "x", "mask": "easy", "seed": 3, "log_steps": 7, "image_size": 64})
    assert decisions(config) == {
        "data.data": "x", "data.image_size": (64, 64), "method.mask": "easy", "optimisation.seed": 3,
    }  # fmt: skip
    assert decisions(Config()) == {}
