"""Runs of version 0.1, when the package was called hpm, are read, go on and are measured."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hardpatch
from hardpatch.cli import main
from hardpatch.config.values import RETIRED, load_config, validated
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import read_metrics
from tiny import TINY, flags, pretrain

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
FIELDS = TINY | {
    "data": "shapes:16", "image_size": 16, "patch_size": 4, "encoder_width": 8, "decoder_width": 8, "epochs": 3,
    "checkpoint_steps": 100, "keep_last": 1, "log_steps": 1,
}  # fmt: skip
"""Of the run."""


@pytest.fixture
def old(tmp_path):
    """The folder with the run and what version 0.1 made of it."""
    with tarfile.open(Path(__file__).parent / "written_by_0.1" / "run.tar.xz") as archive:
        archive.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def command(*words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code in (0, None)


def test_its_models_say_what_they_said(old):
    expected = load_file(old / "expected.safetensors")
    run = LoadedRun(old / "run")
    assert run.step == 4
    with torch.no_grad():
        found = {
            "features": hardpatch.load_encoder(old / "run").forward_features(IMAGES),
            "student_features": run.student.encoder.forward_features(IMAGES),
            "predicted_loss": hardpatch.load_teacher(old / "run").predict_loss(IMAGES),
        }
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_goes_on_to_the_end_that_it_had(old):
    """Within what rounding on another processor makes of two steps: key biases have gradients of exactly zero."""
    command("pretrain", "--recipe", "hpm", "--out", old / "run", *flags(FIELDS))
    expected = [json.loads(line) for line in (old / "finished_metrics.jsonl").read_text().splitlines()]
    found = read_metrics(old / "run")
    assert [record["step"] for record in found] == [record["step"] for record in expected] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("reconstruction_loss", "prediction_loss", "gradient_norm", "lr", "ema_decay", "hard_share"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    weights = load_file(old / "run" / "checkpoints" / "weights.safetensors")
    expected = load_file(old / "finished_weights.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_a_new_run_begins_from_it(old):
    result = pretrain(**FIELDS | {"out": old / "new", "init_from": str(old / "run"), "epochs": 1})
    assert result["steps"] == 2


@pytest.mark.parametrize("part", ["run", "run/checkpoints/weights.safetensors", "run/checkpoints/last"])
def test_it_is_measured_exported_and_converted(old, part, capsys):
    checkpoint = old / part
    if part != "run/checkpoints/weights.safetensors":
        command("evaluate", "knn", "--checkpoint", checkpoint, "--train", "shapes:16", "--val", "shapes:8", "--k", 5,
                "--json")  # fmt: skip
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_train"] == 16
        command("convert", "--from", checkpoint, "--to", old / "published.pth")
        assert "decoder_pred_losspred.weight" in torch.load(old / "published.pth", weights_only=True)["model"]
    command("export", "--checkpoint", checkpoint, "--format", "safetensors", "--out", old / "encoder.safetensors")
    torch.testing.assert_close(
        load_file(old / "encoder.safetensors"), load_file(old / "run/checkpoints/weights.safetensors"), rtol=0, atol=0
    )


@pytest.mark.parametrize("section", ["method", "run"])
def test_fields_that_are_no_more_are_read_where_they_did_nothing(old, section):
    path = old / "run" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    retired = RETIRED.keys() & content[section].keys()
    assert retired
    for name in retired:
        assert content[section][name] == RETIRED[name]
    load_config(path)
    for name in retired:
        wrong = content | {section: content[section] | {name: 0.5}}
        path.write_text(yaml.safe_dump(wrong))
        message = f"{name}: was removed after version 0.1, .* where it is {RETIRED[name]!r}; got 0.5"
        with pytest.raises(InputError, match=message):
            load_config(path)
        with pytest.raises(InputError, match=message):
            validated({name: value for name, value in wrong.items() if name != "about"})
