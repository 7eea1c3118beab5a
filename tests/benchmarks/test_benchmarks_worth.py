"""The script behind the tables of docs/evaluate.md: its commands exist, and its figures are among what they return."""

import dataclasses
import importlib
import importlib.util
import json

import pytest

from hardpatch.cli.flags import parse
from hardpatch.config.evaluations import FinetuneConfig, ForegroundConfig, KnnConfig, LinearConfig
from hardpatch.evaluate.classify import finetune, knn, linear
from places import ROOT

SCRIPT = ROOT / "benchmarks/worth.py"
CONFIGS = {"knn": KnnConfig, "linear": LinearConfig, "finetune": FinetuneConfig, "foreground": ForegroundConfig}
RESULTS = {"knn": knn.KnnResult, "linear": linear.LinearResult, "finetune": finetune.FinetuneResult}
"""Of the JSON line; that of foreground has a key per measure."""


@pytest.fixture(scope="module", params=["shapes", "photographs"])
def images(request, script):
    return script.IMAGES[request.param]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("worth", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds():
    """Configs and results by command; those of segmentation and detection need their extra."""
    pytest.importorskip("pycocotools", reason="segmentation and detection need hardpatch[dense]")
    pytest.importorskip("torchmetrics", reason="segmentation and detection need hardpatch[dense]")
    from hardpatch.config.dense_evaluations import DetectConfig, SegmentConfig
    from hardpatch.evaluate.dense import detect, segment

    configs = CONFIGS | {"segment": SegmentConfig, "detect": DetectConfig}
    return configs, RESULTS | {"segment": segment.SegmentResult, "detect": detect.DetectResult}


def test_every_command_of_the_script_is_one_of_hpm(images):
    configs, _ = kinds()
    for words in images.evaluations.values():
        command, *flags = words.replace("SEED", "3").split()
        config, _ = parse(configs[command], f"evaluate {command}", [*flags, "--checkpoint", "run"])
        if command == "finetune" and "shapes" in words:
            assert config.rand_augment == ""
        if hasattr(config, "seed"):
            assert config.seed == 3  # or all seeds of the table would share a head, an order, a draw of labels


def test_its_pre_training_is_one_of_hpm(images, monkeypatch):
    seen = []
    monkeypatch.setattr(
        importlib.import_module("hardpatch.training.pretrain"),
        "train",
        lambda config, out, **_: seen.append(config) or {},
    )
    pretraining = importlib.import_module("hardpatch.cli.pretrain")  # the package has a function of that name
    monkeypatch.setattr(pretraining, "report_run", lambda *_, **__: None)
    pretraining.pretrain([*images.pretrain.split(), "--no-figures", "--seed", "3", "--out", "run"])
    assert seen[0].optimisation.seed == 3
    assert seen[0].method.predictor_view == "both"


def test_every_figure_of_the_script_is_in_the_result_of_its_evaluation(images):
    _, results = kinds()
    from hardpatch.evaluate.dense.segment import ClassFigures

    for name, *paths in images.figures.values():
        command = images.evaluations[name].split()[0]
        if command == "foreground":
            assert paths == ["predicted_loss.auroc", "others.untrained.predicted_loss.auroc"]
            continue
        known = {field.name for field in dataclasses.fields(results[command])}
        for path in paths:
            first, *rest = path.split(".")
            if first == "few":
                assert rest[0] in images.evaluations[name].partition("--labels-per-class")[2].split()
                assert rest[1] in ("run", "untrained")
            else:
                assert first in known
                assert not rest or (first == "per_class" and rest[1] in ClassFigures._fields)


def test_the_table_pairs_run_and_untrained_by_seed(script, tmp_path, monkeypatch):
    figures = {"accuracy": ("knn", "top1", "few.5.untrained"), "of one seed alone": ("linear", "top1", "top5")}
    monkeypatch.setattr(script, "IMAGES", {"shapes": script.Images("", {}, figures)})

    def done(mine, theirs):
        few = [
            {"labels_per_class": 5, "kind": "run", "top1": 99.0},
            {"labels_per_class": 5, "kind": "untrained", "top1": theirs},
        ]
        return {"knn": {"seconds": 60.0, "result": {"top1": mine, "few_labels": few}}}

    (tmp_path / "seed0/run").mkdir(parents=True)
    (tmp_path / "seed0/run/config.yaml").write_text(f"about: {{command: hardpatch --out {tmp_path}/seed0}}")
    script.write({0: done(20.0, 10.0) | {"linear": {}}, 1: done(30.0, 18.0)}, "shapes", tmp_path)
    assert "| accuracy | 25.0 ± 7.1 | 14.0 ± 5.7 | +11.0 ± 1.4 |" in (tmp_path / "shapes.md").read_text()
    kept = json.loads((tmp_path / "shapes.json").read_text())
    assert kept["figures"]["accuracy"] == {"run": [20.0, 30.0], "untrained": [10.0, 18.0]}
    assert kept["minutes"] == {"knn": 1.0}
    assert kept["made_by"] == {"command": "hardpatch --out OUT/seed0"}  # no folder of this machine
    assert kept["figures"].keys() == {"accuracy"}


def test_figures_of_another_command_are_not_taken(script, tmp_path):
    file = tmp_path / "knn.json"
    file.write_text(json.dumps({"command": ["evaluate", "knn"], "seconds": 1.0, "result": {}}))
    assert script.run_json(["evaluate", "knn"], file)["seconds"] == 1.0
    with pytest.raises(SystemExit, match="is of another command: hardpatch evaluate knn"):
        script.run_json(["evaluate", "knn", "--k", "5"], file)
