"""The verdict on a run: each rule, and that a run brings it to its files and pages."""

import json

import numpy as np
import pytest

from hardpatch.evaluate.reconstruction import Reconstruction
from hardpatch.training.verdict import Measured, judge
from tiny import TINY, pretrain

GOOD = Measured(
    steps=2000, images=5000, losses=(1.0, 0.5), right=None, reconstruction=None, rank_correlation=0.6,
    random_start=0.01, mining_opened=True,
)  # fmt: skip
FEW_RIGHT, MORE_RIGHT = [True] * 100 + [False] * 300, [True] * 160 + [False] * 240


def losses(student, flat=1.0, interpolated=0.8, spread=0.1, images=64):
    noise = np.random.default_rng(0).normal(size=(3, images)) * spread
    return Reconstruction(*(noise + np.array([[student], [flat], [interpolated]])))


@pytest.mark.parametrize(("changes", "outcome", "said"), [
    ({"reconstruction": losses(0.6)}, "better", "reconstructed better than without learning (loss 0.6"),
    ({"reconstruction": losses(0.9)}, "no_better", "no learning"),
    ({"reconstruction": losses(0.6, flat=0.6)}, "unproven", "not told apart from what needs no learning"),
    ({"reconstruction": losses(0.6, images=1)}, "unproven", "not told apart from what needs no learning"),
    ({"reconstruction": losses(0.8, spread=0.0)}, "no_better", "no learning"),
    ({"reconstruction": losses(0.6), "steps": 12}, "unproven", "12 steps are no run"),
    ({"right": (FEW_RIGHT, MORE_RIGHT), "from_weights": True}, "better", "better than the weights it started from"),
    ({}, "unproven", "only labelled images can say"),
    ({"losses": (1.0, 0.95)}, "no_better", "hardly learnt to reconstruct (reconstruction loss 1.000 to 0.950)"),
    ({"losses": None}, "unproven", "nothing was recorded"),
    ({"steps": 12, "right": (FEW_RIGHT, MORE_RIGHT)}, "unproven", "12 steps are no run"),
    ({"right": (FEW_RIGHT, MORE_RIGHT)}, "better", "20-NN accuracy 40.0 %, before 25.0 %; +15.0 points"),
    ({"right": (MORE_RIGHT, FEW_RIGHT)}, "no_better", "no better than the untrained encoder"),
    ({"right": (FEW_RIGHT, [*FEW_RIGHT[:-1], True])}, "no_better", "no better than the untrained encoder"),
    ({"right": ([True, False] * 10, [False, True] * 10)}, "unproven", "not told apart"),
])  # fmt: skip
def test_outcomes(changes, outcome, said):
    found = judge(GOOD._replace(**changes))
    assert found.outcome == outcome
    assert said in found.sentence


@pytest.mark.parametrize(("changes", "said"), [
    ({"images": 24}, "24 images are few"),
    ({"mining_opened": False}, "masks stayed random"),
    ({"rank_correlation": 0.02}, "hardly knows what is hard"),
    ({"random_start": 0.5}, "still 50% its random start"),
    ({"right": (MORE_RIGHT, FEW_RIGHT)}, "train longer"),
    ({"steps": 12}, "more --epochs"),
])  # fmt: skip
def test_each_fault_has_its_advice(changes, said):
    assert not judge(GOOD._replace(right=(FEW_RIGHT, MORE_RIGHT))).advice
    assert any(said in line for line in judge(GOOD._replace(**changes)).advice)


def test_a_difference_is_judged_on_pairs():
    """An encoder that is right wherever the other is, and once more in forty, is better; the intervals overlap."""
    before = [True] * 200 + [False] * 200
    after = [True] * 210 + [False] * 190
    assert judge(GOOD._replace(right=(before, after))).outcome == "better"


def test_a_run_says_what_it_came_to(tmp_path):
    fields = TINY | {"knn": True, "figures": True, "num_figure_images": 1}
    result = pretrain(fields.pop("data"), tmp_path / "run", **fields)
    assert result["verdict"] == "unproven"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["verdict_sentence"] == result["verdict_sentence"]
    assert "12 steps are no run" in (tmp_path / "run" / "report.html").read_text()
    kept = json.loads((tmp_path / "run" / "knn_right.json").read_text())
    assert kept.keys() == {"0", "12"}
    assert 100 * sum(kept["12"]) / len(kept["12"]) == pytest.approx(result["knn_top1"])
