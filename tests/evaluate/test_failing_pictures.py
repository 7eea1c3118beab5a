"""A picture that cannot be drawn costs a warning, never the figures of an evaluation; text in it is shown as it is."""

import json

import pytest
import torch

from hardpatch.config.dense_evaluations import DetectConfig, SegmentConfig
from hardpatch.config.evaluations import FinetuneConfig, LinearConfig
from hardpatch.evaluate import result
from hardpatch.evaluate.classify import finetune, linear
from hardpatch.evaluate.dense import detect, segment
from hardpatch.training.pretrain import train
from tiny import tiny_config

torch.set_num_threads(1)
pytest.importorskip("torchmetrics")
pytest.importorskip("pycocotools")
LABELLED = {"train": "shapes:16", "val": "shapes:8@1"}
EVALUATIONS = {
    "linear": (
        linear, "draw_confusions",
        lambda run: LinearConfig(run, **LABELLED, learning_rates=(0.3,), epochs=2, device="cpu"),
    ),
    "finetune": (
        finetune, "draw_confusions",
        lambda run: FinetuneConfig(run, **LABELLED, epochs=1, batch_size=8, workers=0, device="cpu"),
    ),
    "segment": (
        segment, "draw_segmentations",
        lambda run: SegmentConfig(
            checkpoint=run, images="shapes:8", val_images="shapes:4@1", epochs=1, batch_size=4, untrained=False,
            device="cpu",
        ),
    ),
    "detect": (
        detect, "draw_detections",
        lambda run: DetectConfig(
            checkpoint=run, train_images="shapes:4", val_images="shapes:2@1", epochs=1, batch_size=2, width=16,
            samples_per_image=8, device="cpu",
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config(epochs=1), out)
    return out


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_picture_that_fails_costs_a_warning(name, run, monkeypatch, capsys):
    module, draws, config = EVALUATIONS[name]

    def fail(*_, **__):
        raise ValueError("no such glyph")

    monkeypatch.setattr(module, draws, fail)
    found = module.run(config(str(run)))
    result.keep(found, config(str(run)))
    assert "no such glyph" in capsys.readouterr().err
    figures = json.loads((run / f"evaluate/{name}.json").read_text())
    assert figures == json.loads(json.dumps(found.figures()))
    assert not figures.get("picture", figures.get("figure"))
    assert module.describe(figures).title in (run / "report.html").read_text()


def test_names_of_classes_are_no_formulas_in_a_legend(run, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("price_$5_to_$10\n<b>{a}^2_$\n")
    config = SegmentConfig(
        checkpoint=str(run), images="shapes:8", val_images="shapes:4@1", epochs=1, batch_size=4, untrained=False,
        device="cpu", class_names=str(names), out=str(tmp_path / "price_$5_to_$10"),
    )  # fmt: skip
    found = segment.run(config)
    assert found.figure is not None
    assert [item.name for item in found.per_class] == names.read_text().splitlines()
    assert "could not" not in capsys.readouterr().err
