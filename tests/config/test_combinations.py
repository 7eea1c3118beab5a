"""Every target with every way to predict the loss and every mask: it trains, or it is refused with a reason."""

from itertools import product

import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method.choices import MASKS, TARGETS
from hardpatch.method.student import Teacher
from hardpatch.method.targets.target import FittedTarget
from hardpatch.runs.build import build_method, build_optimizer, build_student, build_target
from hardpatch.runtime.errors import InputError
from tiny import TINY

torch.set_num_threads(1)
LOSSES = ("none", "absolute", "relative")
BATCH, NUM_PATCHES = 4, 16


def refusal(mask, predicted_loss):
    """Why a combination makes no sense; None where it does."""
    guided_by_loss = MASKS[mask].guide == "predicted_loss"
    return "chooses by predicted loss" if guided_by_loss and predicted_loss == "none" else None


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """Those of the tiny run; the frozen model is a tiny one with weights in a local folder."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("frozen")
    frozen = timm.create_model("test_vit", pretrained=False, num_classes=0)
    save_for_hf(frozen, folder, safe_serialization=True)
    small = {name: value for name, value in TINY.items() if name != "batch_size"}
    return {**small, "num_tokens": 6, "hard_share_start": 0.5}, f"local-dir:{folder}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_trains_or_is_refused(fields, target):
    values, model = fields
    base = with_fields(
        Config(), {**values, "target": target, "target_model": model if target == "timm_features" else ""}
    )
    reconstructed = build_target(base)
    if isinstance(reconstructed, FittedTarget):
        reconstructed.adopt({name: torch.randn(t.shape) for name, t in reconstructed.fitted_state().items()})
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(BATCH, NUM_PATCHES, generator=torch.Generator().manual_seed(1))
    for mask, predicted_loss in product(MASKS, LOSSES):
        if reason := refusal(mask, predicted_loss):
            with pytest.raises(InputError, match=reason):
                with_fields(base, {"mask": mask, "predicted_loss": predicted_loss})
            continue
        config = with_fields(base, {"mask": mask, "predicted_loss": predicted_loss})
        student = build_student(config, target_dim=reconstructed.dim)
        method = build_method(config, student, reconstructed)
        teacher = Teacher(student) if method.needs_teacher else None
        optimizer = build_optimizer(config.optimisation, student)
        before = {name: parameter.clone() for name, parameter in student.named_parameters()}
        for _ in range(2):
            losses = method.step(student, teacher, images, noise, num_hard=6)
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()
        told = f"{target}, {mask}, {predicted_loss}"
        assert torch.isfinite(torch.stack([losses.reconstruction, losses.prediction, losses.total])).all(), told
        assert (losses.prediction > 0) == (predicted_loss != "none"), told
        still = [n for n, p in student.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
        assert still == [], told
        assert all(torch.isfinite(p).all() for p in student.parameters()), told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": "hard", "predicted_loss": "none"}, "mask: 'hard' chooses by predicted loss"),
        ({"mask": "random", "predicted_loss": "none", "predictor_detached": True}, "no gradient to cut"),
        ({"predictor_view": "full", "predictor_detached": True}, "no gradient to cut"),
        ({"mask": "random", "mining_threshold": 0.5}, "never guided"),
        ({"target": "timm_features"}, "target_model: must be given with target 'timm_features'"),
        ({"target": "hog", "target_model": "resnet18"}, "target_model: goes with target 'timm_features'"),
        ({"target": "hog", "tokenizer": "a:b"}, "tokenizer: goes with target 'tokens'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(values, message):
    with pytest.raises(InputError, match=message):
        with_fields(Config(), values)
