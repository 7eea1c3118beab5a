"""The smallest run that has everything: 32-pixel shapes, 16 patches, one-block transformers."""

import multiprocessing
import signal
from pathlib import Path

import torch

TINY = {
    "data": "shapes:48",
    "image_size": 32,
    "crop_scale": (0.5, 1.0),
    "encoder": "vit_tiny_patch16_224",
    "patch_size": 8,
    "encoder_width": 32,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "predictor_depth": 1,
    "batch_size": 8,
    "epochs": 2,
    "base_learning_rate": 3e-2,
    "precision": "float32",
    "device": "cpu",
    "workers": 0,
    "log_steps": 3,
    "figures": False,
    "knn": False,
}
"""12 steps of 8 images."""


def pretrain(data, out, *, recipe=None, config=None, branch_from=None, **fields) -> dict:
    """:func:`hardpatch.pretrain`; without a start by the recipe ``hpm``, as nothing is to be timed."""
    import hardpatch

    starts = {"recipe": recipe, "config": config, "branch_from": branch_from}
    if not any(value is not None for value in starts.values()):
        starts["recipe"] = "hpm"
    return hardpatch.pretrain(data, out, **starts, **fields)


def final_state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last", weights_only=True)


def assert_same_state(a: dict, b: dict) -> None:
    """Step, student, teacher and optimizer are bit-identical."""
    assert a["step"] == b["step"]
    assert a.keys() == b.keys()
    for part in {"student", "teacher"} & a.keys():
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), f"{part}: {name}"
    for number, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][number][name]), f"optimizer: {number}.{name}"


def stop_after(monkeypatch, step: int) -> None:
    """Interrupt a run after a step, saved."""
    from hardpatch.runtime.errors import Interrupted
    from hardpatch.training.reporting import Reporter

    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == step:
            self.run.save()
            raise Interrupted("test")

    monkeypatch.setattr(Reporter, "after_step", stopping)


def flags(values: dict) -> list[str]:
    """Fields as command-line flags."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(str(v) for v in (value if isinstance(value, tuple) else (value,)))]
    return words


def in_child(target, *arguments) -> multiprocessing.Process:
    """Start ``target`` in a process of its own that has imported hardpatch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hardpatch.cli", "hardpatch.training.pretrain", "tiny"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def pretrain_in_child(out: str, values: dict) -> None:
    """Target for :func:`in_child`: one thread, so that runs are comparable bit for bit."""
    from hardpatch.cli import main

    multiprocessing.set_start_method("fork", force=True)  # data workers as in a run of its own
    torch.set_num_threads(1)
    main(["pretrain", "--recipe", "hpm", "--out", out, *flags(values)])


def tiny_config(**changes):
    """The config of a tiny run."""
    from hardpatch.config.config import Config
    from hardpatch.config.values import with_fields

    return with_fields(Config(), TINY | changes)


def tiny_student(seed: int = 0, **changes):
    """A student of a tiny run with random values everywhere, position tables apart."""
    from hardpatch.runs.build import build_student

    student = build_student(tiny_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name != "encoder.pos_embed":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student.eval()


def stop_at(step: int, learn):
    """In the place of a training's ``_learn``: a signal arrives in this step."""

    def signalled(training, *arguments):
        if training.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return learn(training, *arguments)

    return signalled
