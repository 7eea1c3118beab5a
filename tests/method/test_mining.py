"""The gate that keeps masks random until the predictor is right."""

import json

import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.runtime.errors import InputError
from hardpatch.training.gate import DEFAULT_THRESHOLD, MEMORY, MiningGate, mining_threshold
from tiny import TINY, assert_same_state, final_state, pretrain

torch.set_num_threads(1)
CPU = torch.device("cpu")


def fed(gate, values):
    for value in values:
        gate.update(torch.tensor(value))
    return gate


def test_without_threshold_mining_begins_at_once():
    gate = MiningGate(0, CPU)
    assert gate.admit(7) == 7
    assert gate.is_open()


def test_gate_opens_when_the_running_correlation_reaches_the_threshold():
    gate = MiningGate(0.5, CPU)
    steps, running = 0, 0.0
    while running < 0.5:
        assert gate.admit(7).item() == 0
        assert not gate.is_open()
        fed(gate, [0.8])
        running += (0.8 - running) / MEMORY
        steps += 1
    assert MEMORY / 2 < steps < 2 * MEMORY
    assert gate.admit(7).item() == 7
    assert gate.is_open()


def test_gate_closes_when_the_predictor_is_lost_again():
    gate = fed(MiningGate(0.5, CPU), [0.8] * 200)
    assert gate.is_open()
    assert not fed(gate, [0.0] * 100).is_open()


def test_correlation_that_is_not_finite_keeps_the_gate_closed():
    gate = fed(MiningGate(0.1, CPU), [float("nan"), float("inf")] * 100)
    assert gate.correlation.item() == 0
    assert not gate.is_open()


def run(out, **changes):
    return pretrain(out=out, **{**TINY, **changes})


def shares(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["hard_share"] for record in records if "hard_share" in record]


def test_gate_that_never_opens_leaves_masks_random(tmp_path):
    """The same weights as a run whose hard share is zero."""
    run(tmp_path / "gated", mining_threshold=0.99, hard_share_start=0.5)
    run(tmp_path / "random", hard_share_start=0.0, hard_share_end=0.0)
    run(tmp_path / "mined", hard_share_start=0.5)
    gated, random, mined = (final_state(tmp_path / name) for name in ("gated", "random", "mined"))
    assert_same_state(gated, random)
    with pytest.raises(AssertionError):
        assert_same_state(gated, mined)
    assert set(shares(tmp_path / "gated")) == {0.0}
    assert min(shares(tmp_path / "mined")) == 0.5
    assert gated["gate"].item() != 0


def test_gate_is_part_of_a_resumed_run(tmp_path, monkeypatch):
    """Stopped half-way and gone on: the same running correlation, so the same masks."""
    monkeypatch.setattr("hardpatch.training.gate.MEMORY", 3)
    values = {"mining_threshold": 0.05, "hard_share_start": 0.5, "checkpoint_steps": 6, "keep_last": 10}
    run(tmp_path / "whole", **values)
    run(tmp_path / "cut", **values)
    for file in (tmp_path / "cut/checkpoints").glob("step_00000012*"):
        file.unlink()
    (tmp_path / "cut/result.json").unlink()
    run(tmp_path / "cut", **values)
    whole, cut = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    assert_same_state(whole, cut)
    assert torch.equal(whole["gate"], cut["gate"])
    assert len({share for share in shares(tmp_path / "whole") if share}) > 0, "the gate never opened: no test"


def test_a_run_from_weights_waits_unless_told_not_to():
    def threshold(**fields):
        return mining_threshold(with_fields(Config(), fields))

    assert threshold() == 0
    assert threshold(init_from="runs/old") == DEFAULT_THRESHOLD
    assert threshold(init_from="runs/old", mining_threshold=0) == 0
    assert threshold(init_from="runs/old", mask="random") == 0
    assert threshold(mining_threshold=0.7) == 0.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": "random"}, "never guided"),
        ({"predicted_loss": "none", "mask": "random"}, "watches the predicted loss"),
    ],
)
def test_threshold_without_guided_masks_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", mining_threshold=0.3, **fields)
