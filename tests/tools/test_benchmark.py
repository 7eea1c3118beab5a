"""The plain reference step is our exact step, and the benchmark command measures and reports."""

import importlib.util
import json
import signal
from unittest import mock

import numpy as np
import pytest
import torch

from hardpatch.cli import main
from hardpatch.config.benchmark import BenchmarkConfig, StepConfig
from hardpatch.method.losses import relative_loss
from hardpatch.method.student import Teacher
from hardpatch.runs.build import build_method, build_optimizer, build_student
from hardpatch.runtime.errors import InputError
from hardpatch.tools.benchmark import step, timing
from hardpatch.tools.benchmark.plain import PlainStep, loop_masks, two_log_loss
from hiding import hide
from places import ROOT
from tiny import tiny_config, tiny_student

NAMES = ("reference", "mae", "exact", "mae-third", "fast", "shared")
SMALL = {"encoder": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "decoder_width": 32, "decoder_depth": 1}


@pytest.mark.parametrize("target", ["norm_pix", "pixels"])
def test_exact_and_plain_step_agree_over_20_steps(target):
    config = tiny_config(target=target, base_learning_rate=1e-3, batch_size=8)
    ours, theirs = tiny_student(), tiny_student()
    method = build_method(config, ours)
    teacher, optimizer = Teacher(ours), build_optimizer(config.optimisation, ours)
    plain = PlainStep(theirs, method.target, num_hidden=method.num_hidden, optimisation=config.optimisation)
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        noise = torch.rand(8, 16, generator=generator)
        losses = method.step(ours, teacher, images, noise, num_hard=number // 3)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in ours.parameters() if p.requires_grad], 5.0)
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(ours, 0.9)
        value = plain.step(images, noise, num_hard=number // 3, ema_decay=0.9)
        assert value == pytest.approx(losses.total.item(), abs=2e-5), f"step {number}"
    undetermined = ("attn.qkv.bias", "predictor.norm.bias")  # gradients of exactly zero, see tests/test_fidelity.py
    for mine, other in ((ours, plain.student), (teacher.model, plain.teacher)):
        for name, tensor in mine.state_dict().items():
            if not name.endswith(undetermined):
                torch.testing.assert_close(tensor, other.state_dict()[name], atol=2e-4, rtol=1e-3, msg=name)


def test_masks_of_the_loop_are_ours():
    generator = torch.Generator().manual_seed(0)
    scores, noise = torch.randn(6, 20, generator=generator), torch.rand(6, 20, generator=generator)
    for num_hard in (0, 1, 7, 15):
        ours = hide("hard", scores, noise, num_hidden=15, num_hard=num_hard)
        assert torch.equal(ours, loop_masks(scores, noise, num_hidden=15, num_hard=num_hard))


def test_two_logs_are_one():
    generator = torch.Generator().manual_seed(0)
    scores, loss = torch.randn(3, 9, generator=generator), torch.rand(3, 9, generator=generator)
    loss[:, 4] = loss[:, 2]  # a tie counts in neither
    torch.testing.assert_close(two_log_loss(scores, loss), relative_loss(scores, loss), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_step_command_measures_every_variant(tmp_path, capsys):
    out = tmp_path / "step.json"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    flags += ["--variants", *NAMES]
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "step", "--batch-size=8", "--seconds=0.01", "--rounds=2", "--device=cpu", f"--out={out}",
              "--json", *flags])  # fmt: skip
    assert left.value.code == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = json.loads(out.read_text())
    assert saved == printed
    for key in ("images_per_second", "ratio_to_reference", "peak_memory_bytes", "gflops_per_image"):
        assert saved[key].keys() == set(NAMES), key
    assert saved["ratio_to_reference"]["reference"] == 1.0
    assert saved["ratio_to_reference_std"]["reference"] == 0.0
    for name, rounds in saved["images_per_second_rounds"].items():
        assert len(rounds) == 2
        assert saved["images_per_second"][name] == pytest.approx(np.mean(rounds))
        expected = np.mean(np.array(rounds) / saved["images_per_second_rounds"]["mae"])
        assert saved["ratio_to_mae"][name] == pytest.approx(expected)
    assert saved["gflops_per_image"]["exact"] < saved["gflops_per_image"]["reference"]  # no teacher's reconstructor
    assert out.with_suffix(".png").stat().st_size > 5000


def test_turn_times_exactly_the_steps_asked_for():
    calls = []

    class Counting:
        images_per_step = 2

        def step(self, fetch):
            calls.append(len(fetch()))

        def flops_per_view(self, images):
            return 1.0

    turn = timing.Turn(Counting(), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.device("cpu"))
    turn.seconds(5)
    assert calls == [2] * 6  # one more, which is not timed


class Sleeping:
    """A stepper that does nothing but call back."""

    images_per_step = 2

    def __init__(self, after_step=lambda: None):
        self.after_step = after_step

    def step(self, fetch):
        fetch()
        self.after_step()

    def flops_per_view(self, images):
        return 1.0


def interrupt():
    signal.raise_signal(signal.SIGTERM)


CONDITIONS = StepConfig(image_size=8, seconds=1e-9, rounds=4)


def measured(builders):
    with mock.patch.object(timing, "matmul_peak", return_value=1e12):  # which takes seconds to find
        return timing.measure(builders, CONDITIONS, timing.Conditions(torch.device("cpu"), 2, False, False))


@pytest.mark.parametrize(("in_round", "whole"), [(1, 1), (2, 2), (3, 2)])  # turns go a b, b a, a b
def test_a_signal_ends_the_rounds_and_keeps_those_that_are_whole(in_round, whole):
    steps = []

    def after_step():
        steps.append(1)
        if len(steps) == timing.WARMUP_STEPS + 2 + 2 * in_round:  # two to see how long one takes, two in each round
            interrupt()

    found = measured({"a": lambda: Sleeping(after_step), "b": Sleeping})
    assert {len(values) for values in found["images_per_second_rounds"].values()} == {whole}
    assert found["stopped_by"] == "SIGTERM"


def test_a_signal_while_preparing_leaves_the_rest_out():
    found = measured({"a": lambda: Sleeping(interrupt), "b": Sleeping})
    assert found["left_out"] == {"b": "SIGTERM came first"}
    assert len(found["images_per_second_rounds"]["a"]) == 1


def test_what_does_not_fit_into_memory_is_left_out(capsys):
    def too_large():
        raise torch.OutOfMemoryError

    found = measured({"a": Sleeping, "b": too_large, "c": Sleeping})
    assert found["images_per_second"].keys() == {"a", "c"}
    assert found["left_out"].keys() == {"b"}
    assert found["stopped_by"] is None
    assert "b is left out: it does not fit into memory" in capsys.readouterr().err
    with pytest.raises(InputError, match="batch_size: must fit into the device's memory, got 2"):
        measured({"b": too_large})


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_what_no_longer_fits_beside_the_others_is_left_out(error):
    steps = []

    def full():
        steps.append(1)
        if len(steps) > timing.WARMUP_STEPS:
            raise error

    found = measured({"a": lambda: Sleeping(full), "b": Sleeping})
    assert found["images_per_second"].keys() == {"b"}
    assert "does not fit into memory beside the others" in found["left_out"]["a"]


def test_other_errors_are_not_taken_for_want_of_memory():
    def broken():
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        measured({"a": broken})


@pytest.mark.parametrize("when", ["built", "prepared", "timed"])
def test_what_fails_beside_others_costs_only_itself(when, capsys):
    """A compiler that stumbles over one of them, or its step, at whatever time."""
    steps = []

    def failing():
        steps.append(1)
        if len(steps) > (0 if when == "prepared" else timing.WARMUP_STEPS):
            raise ValueError("no such kernel\nand much more")

    def build():
        if when == "built":
            failing()
        return Sleeping(failing)

    if when == "built":
        steps.extend([1] * timing.WARMUP_STEPS)
    found = measured({"a": Sleeping, "b": build, "c": Sleeping})
    assert found["images_per_second"].keys() == {"a", "c"}
    assert found["left_out"] == {"b": "it failed: ValueError: no such kernel"}
    assert found["failed"] == ["b"]
    assert "in failing" in capsys.readouterr().err, "where it failed"


def test_a_command_that_measured_less_than_was_asked_for_fails(monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(step, "OurStep", broken)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    out = tmp_path / "step.json"
    with pytest.raises(SystemExit, match="exact failed, see above"):
        main(["benchmark", "step", *sizes, "--variants", "reference", "exact", "--batch-size", "2", "--seconds", "0.1",
              "--rounds", "1", "--out", str(out)])  # fmt: skip
    assert "reference " in capsys.readouterr().out
    assert json.loads(out.read_text())["failed"] == ["exact"]


def test_a_signal_between_two_steps_of_preparing_leaves_that_one_out():
    found = measured({"a": Sleeping, "b": lambda: Sleeping(interrupt), "c": Sleeping})
    assert found["left_out"] == {"b": "SIGTERM came first", "c": "SIGTERM came first"}
    assert found["images_per_second"].keys() == {"a"}


def test_the_command_shows_what_was_measured_before_a_signal(tmp_path, capsys, monkeypatch):
    step_once = step.OurStep.step

    def interrupted(self, fetch):
        step_once(self, fetch)
        interrupt()

    monkeypatch.setattr(step.OurStep, "step", interrupted)
    out = tmp_path / "step.json"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "step", "--batch-size=8", "--seconds=0.01", "--rounds=3", "--device=cpu", f"--out={out}",
              *flags, "--variants", "mae", "exact"])  # fmt: skip
    assert left.value.code == 3
    assert "stopped by SIGTERM: the figures are of 1 of 3 rounds, without exact" in capsys.readouterr().err
    assert json.loads(out.read_text())["images_per_second"].keys() == {"mae"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--image-size", "30", "--patch-size", "8"], "image_size: must be divisible by the patch size"),
        (["step", "--variants", "mae", "mae"], "variants: must be different"),
        (["stepp"], "did you mean step"),
        ([], "benchmark: needs a name: step, data"),
    ],
)
def test_wrong_input_is_one_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["benchmark", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def peers():
    """The script that measures other libraries."""
    pytest.importorskip("transformers", reason="the peer is not installed")
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_peers_are_the_same_model(peers):
    config = step.variant_config("mae", BenchmarkConfig(**SMALL), 8)
    ours = sum(p.numel() for p in build_student(config).parameters())
    theirs = sum(p.numel() for p in peers.PEERS["transformers"](config).parameters())
    assert theirs - ours == 17 * 32  # the decoder's fixed position table is a parameter there and a buffer here


@pytest.mark.slow
def test_peers_are_measured_beside_our_step(peers):
    result = peers.run(BenchmarkConfig(**SMALL, batch_size=8, seconds=0.01, rounds=2, device="cpu"))
    assert {"mae", "transformers"} <= result["images_per_second"].keys()
    assert result["gflops_per_image"]["transformers"] == pytest.approx(result["gflops_per_image"]["mae"], rel=0.1)
