"""Figures show what the run does: its own masks, guided as it guides them."""

from dataclasses import replace

import pytest
import torch

from hpm.build import build_method, build_student
from hpm.config import Config, with_fields
from hpm.masking import MASKS
from hpm.method import Teacher
from hpm.visualize import measure_hardness
from hpm.vit import class_attention
from tiny import TINY


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("predicted_loss", ["relative", "none"])
def test_the_figure_shows_a_mask_of_the_runs_own_kind(mask, predicted_loss):
    if MASKS[mask].guide == "predicted_loss" and predicted_loss == "none":
        pytest.skip("no such run")
    config = with_fields(Config(), TINY | {"mask": mask, "predicted_loss": predicted_loss})
    student = build_student(config)
    teacher, method, seen = Teacher(student), build_method(config, student), []
    images = torch.randn(2, 3, 32, 32)

    def remember(scores, noise, **numbers):
        seen.append((scores, noise))
        return method.mask_policy(scores, noise, **numbers)

    hardness = measure_hardness(
        student, teacher, replace(method, mask_policy=remember), images, share=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ((guide, noise),) = seen
    expected = {"predicted_loss": teacher.predict_loss, "attention": lambda i: class_attention(student.encoder, i)}
    if method.guide is not None:
        assert torch.equal(guide, expected[method.guide](images))
    hidden = MASKS[mask].policy((4, 4))(guide, noise, num_hidden=12, num_hard=6)
    assert torch.equal(hardness.hidden, hidden)
    assert (hardness.predicted_loss is None) == (predicted_loss == "none")
