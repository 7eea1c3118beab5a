"""The document that explains the method runs, and computes what the package computes."""

import re

import pytest
import torch

from hardpatch.method.losses import rank_correlation, relative_loss
from hardpatch.method.vit import patchify
from hiding import hide
from places import ROOT

DOCUMENT = ROOT / "docs" / "minimal.md"
STEPS = 40


def source():
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "\n\n".join(blocks)


@pytest.fixture(scope="module")
def program():
    """The names that the document's program leaves behind after a few steps."""
    short, count = re.subn(r"^steps = \d+$", f"steps = {STEPS}", source(), flags=re.MULTILINE)
    assert count == 1
    names = {}
    # A dictionary of its own, and a name, so that tracebacks point into the document's program.
    with torch.random.fork_rng(devices=[]):
        exec(compile(short, "docs/minimal.md", "exec"), names)
    return names


def test_short_enough_to_read():
    assert len([line for line in source().splitlines() if line.strip()]) <= 130


def test_needs_no_more_than_torch_and_timm():
    imported = set(re.findall(r"^(?:import|from) (\w+)", source(), re.MULTILINE))
    assert imported <= {"copy", "math", "torch", "timm"}


def test_learns(program):
    history = torch.tensor(program["history"])
    assert history.shape == (STEPS, 3)
    first, last = history[:5].mean(dim=0), history[-5:].mean(dim=0)
    assert last[0] < 0.9 * first[0]  # L_rec
    assert last[1] < first[1]  # L_pred


def test_teacher_is_not_trained(program):
    assert not any(p.requires_grad for p in program["teacher"].parameters())


def test_teacher_follows(program):
    teacher, student = torch.nn.Linear(3, 2).requires_grad_(False), torch.nn.Linear(3, 2)
    expected = 0.9 * teacher.weight + 0.1 * student.weight.detach()
    program["update"](teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, expected)
    # And it did so in the program: it left its start, and is not the student.
    pairs = list(zip(program["teacher"].parameters(), program["student"].parameters()))
    assert all(not torch.equal(mine, theirs) for mine, theirs in pairs if theirs.requires_grad)


def test_same_relative_loss(program):
    generator = torch.Generator().manual_seed(1)
    for spread in (0.1, 1.0, 30.0):
        scores = spread * torch.randn(4, 27, generator=generator)
        patch_loss = torch.rand(4, 27, generator=generator)
        patch_loss[:, :5] = 0.5  # pairs without an answer
        torch.testing.assert_close(program["relative_loss"](scores, patch_loss), relative_loss(scores, patch_loss))


def test_same_gradient_of_the_relative_loss(program):
    scores, patch_loss = torch.randn(2, 9), torch.rand(2, 9)
    gradients = []
    for loss in (program["relative_loss"], relative_loss):
        leaf = scores.clone().requires_grad_()
        loss(leaf, patch_loss).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_hard", [0, 1, 13, 27])
def test_same_mask(program, num_hard):
    generator = torch.Generator().manual_seed(2)
    scores, noise = torch.randn(8, 36, generator=generator), torch.rand(8, 36, generator=generator)
    mine = program["hide_hard"](scores, noise, 27, num_hard)
    assert torch.equal(mine, hide("hard", scores, noise, num_hidden=27, num_hard=num_hard))
    assert (mine.sum(dim=1) == 27).all()


def test_same_patches_and_correlation(program):
    images = torch.randn(2, 3, program["image_size"], program["image_size"])
    size = program["patch_size"]
    assert torch.equal(program["patchify"](images), patchify(images, (size, size)))
    a, b = torch.randn(2, 4, 27)
    torch.testing.assert_close(program["rank_correlation"](a, b), rank_correlation(a, b).mean())
