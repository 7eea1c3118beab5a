"""No-data pixels, micro-batches and processes: what is learnt depends on the images of a step, not on their split."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_parallel import run_by_two

from hardpatch.data.loader.loading import Batch
from hardpatch.method.choices import TARGETS, TargetKind
from hardpatch.method.losses import num_pairs, num_patches
from hardpatch.runs.build import build_normalise
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.log import read_metrics
from hardpatch.training.loop import masked_batches
from hardpatch.training.preparation import prepare
from tiny import TINY, final_state, pretrain, tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of four kinds: no data but for one patch of high contrast; half no data; all data; transparent."""
    folder, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        flat = chance.integers(100, 110, (32, 32, 3), dtype=np.uint8)
        if number % 4 == 0:
            patch = chance.integers(1, 256, (8, 8, 3), dtype=np.uint8)
            flat[:] = 0
            row, column = 8 * chance.integers(4, size=2)
            flat[row : row + 8, column : column + 8] = patch
        elif number % 4 == 1:
            flat[:, 16:] = 0
        if number % 4 == 3 and number > 12:
            Image.fromarray(np.dstack([flat, np.zeros((32, 32), np.uint8)])).save(folder / f"{number:02}.png")
        else:
            np.save(folder / f"{number:02}.npy", flat)
    return folder


def fields(images, predicted_loss):
    mask = "random" if predicted_loss == "none" else "hard"
    return {
        "data": str(images), "no_data": 0.0, "crop_scale": (1.0, 1.0), "flip": False, "mask": mask,
        "predicted_loss": predicted_loss, "epochs": 2, "log_steps": 1, "hard_share_start": 0.5, "checkpoint_steps": 6,
    }  # fmt: skip


def records(out):
    return [record for record in read_metrics(out) if "reconstruction_loss" in record]


def assert_same_run(one, other, predicted_loss):
    """The same losses, gradients and weights, up to rounding.

    AdamW divides a gradient by its size, so it moves what has no gradient by rounding alone, whatever is right: the
    key part of qkv biases (softmax ignores it), and what shifts all scores alike under the relative loss.
    """
    expected, found = records(one), records(other)
    assert len(expected) == len(found) == 6
    for a, b in zip(expected, found, strict=True):
        for name in ("loss", "reconstruction_loss", "prediction_loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4), a["step"]
    ends = [final_state(out) for out in (one, other)]
    for part in ("student", "teacher") if "teacher" in ends[0] else ("student",):
        for name, weight in ends[0][part].items():
            difference = (ends[1][part][name] - weight).abs()
            if name.endswith("attn.qkv.bias"):
                query, _, value = difference.chunk(3)
                difference = torch.cat([query, value])
            elif name in ("predictor.norm.bias", "predictor.head.bias") and predicted_loss == "relative":
                continue
            assert difference.max() <= 1e-5, (part, name)


@pytest.mark.parametrize("predicted_loss", ["relative", "absolute", "none"])
def test_the_split_of_a_batch_changes_nothing(tmp_path, images, predicted_loss):
    values = TINY | fields(images, predicted_loss)
    data = values.pop("data")
    for parts in (1, 2, 4):
        pretrain(data, tmp_path / f"{parts}", **values | {"micro_batch_size": 8 // parts})
    for parts in (2, 4):
        assert_same_run(tmp_path / "1", tmp_path / f"{parts}", predicted_loss)
    run_by_two(tmp_path / "processes", **fields(images, predicted_loss))  # in two micro-batches each
    assert_same_run(tmp_path / "1", tmp_path / "processes", predicted_loss)


class LevelTarget:
    """The mean of each patch, which is its own loss whatever was predicted."""

    dim = 1
    needs_teacher = False

    def __call__(self, images, features=None):
        return torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(2).transpose(1, 2)

    def patch_loss(self, prediction, target):
        return target.squeeze(-1) + 0 * prediction.squeeze(-1)


PIXELS = torch.tensor([9, 1], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
"""Two images, of losses 9 and 1."""
NOISE = torch.arange(16.0).expand(2, -1) / 16
"""Hides all patches but the first four."""


def valid_pixels(*patches):
    """The pixels of the given patches of each image."""
    valid = torch.zeros(len(patches), 16, dtype=torch.bool)
    for row, indices in zip(valid, patches, strict=True):
        row[list(indices)] = True
    return valid.unflatten(1, (4, 4)).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)


@pytest.fixture
def leveled(tmp_path, monkeypatch):
    """A run on levels, of which nothing is normalised."""
    monkeypatch.setitem(TARGETS, "level", TargetKind(build=lambda context: LevelTarget(), about="for this test"))
    config = tiny_config(
        target="level", mask="random", predicted_loss="none", mean=(0.0,) * 3, std=(1 / 255,) * 3, batch_size=2
    )
    folder = RunFolder(tmp_path / "run")
    yield prepare(config, folder, device=torch.device("cpu"), resume="auto")
    folder.release()


def learnt(run, valid, slices):
    """The losses of micro-batches, each weighted."""
    fetched = [Batch(PIXELS[part], [], valid[part]) for part in slices]
    micro_batches = masked_batches(run, build_normalise(run.config), fetched, NOISE, slices)
    return [run.method.learn(run.state.model.student, batch, weights) for batch, weights in micro_batches]


@pytest.mark.parametrize("slices", [[slice(0, 2)], [slice(0, 1), slice(1, 2)]], ids=["whole", "parts"])
def test_one_patch_of_loss_9_and_three_of_loss_1_are_3(leveled, slices):
    losses = learnt(leveled, valid_pixels([0, 4], [0, 1, 4, 5, 15]), slices)
    assert float(sum(loss.reconstruction for loss in losses).detach()) == pytest.approx(3.0)
    assert float(sum(loss.total for loss in losses).detach()) == pytest.approx(3.0)


def test_the_only_patch_of_two_processes_counts_fully(leveled, monkeypatch):
    """The other process has nothing; DDP will take the mean of its gradient, 0, and of this one."""
    monkeypatch.setattr("hardpatch.runtime.distributed.world_size", lambda: 2)
    monkeypatch.setattr("hardpatch.runtime.distributed.any_process", lambda flag: flag)
    monkeypatch.setattr("hardpatch.runtime.distributed.mean_of_tensor", lambda value: value / 2)
    losses = learnt(leveled, valid_pixels([4], []), [slice(0, 1), slice(1, 2)])
    assert sum(float(loss.reconstruction.detach()) for loss in losses) / 2 == pytest.approx(9.0)


def test_pairs_are_counted_within_images():
    counted = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    assert (num_patches(counted).item(), num_pairs(counted).item()) == (4, 3)
