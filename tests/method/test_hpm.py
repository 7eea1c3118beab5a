"""``HPM.create`` in a loop of one's own."""

import pytest
import torch

from hardpatch.method.hpm import HPM
from hardpatch.method.targets.hog import HogTarget
from hardpatch.method.vit import create_encoder
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)
SMALL = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "predictor_depth": 1}


def encoder(channels=3):
    return create_encoder(
        "vit_tiny_patch16_224", image_size=(32, 32), channels=channels, patch_size=8, width=32, depth=1, heads=2
    )


def trained(model, *, steps=20, channels=3):
    """The losses of a loop on the same few images."""
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    images = torch.randn(8, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear")
    seen = []
    for step in range(steps):
        losses = model.step(images, share=0.5 * step / steps)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(decay=0.9)
        seen.append(losses)
    return seen


def values(teacher):
    return {name: tensor.clone() for name, tensor in teacher.state_dict().items()}


@pytest.mark.parametrize("options", [
    {},
    {"target": "norm_pix", "predictor_view": "both"},
    {"target": "ema_features", "mask": "attention", "predicted_loss": "none"},
    {"target": "hog", "mask": "proportional", "predicted_loss": "absolute", "decoder": "cross", "decoded_share": 0.5,
     "predictor_view": "full", "teacher_reduction": 2},
], ids=["published", "both views", "attention", "cheap"])  # fmt: skip
def test_a_loop_of_ones_own_trains_and_its_teacher_follows(options):
    torch.manual_seed(0)
    model = HPM.create(encoder(), **SMALL, **options)
    before, start = values(model.teacher), values(model.student)
    losses = trained(model)
    assert all(torch.isfinite(torch.stack([loss.total, loss.reconstruction, loss.prediction])).all() for loss in losses)
    if options.get("target") != "ema_features":  # which move
        assert losses[-1].reconstruction < losses[0].reconstruction
    assert model.keeps_teacher
    assert not torch.equal(model.student.mask_token, start["mask_token"])
    moved = [name for name, tensor in values(model.teacher).items() if not torch.equal(before[name], tensor)]
    assert "model.mask_token" in moved
    if options.get("predicted_loss") != "none":
        assert model.predict_loss(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def test_plain_mae_keeps_no_teacher():
    torch.manual_seed(0)
    model = HPM.create(encoder(), mask="random", predicted_loss="none", **SMALL)
    losses = trained(model)
    assert losses[-1].reconstruction < losses[0].reconstruction
    assert all(loss.prediction == 0 and loss.rank_correlation.isnan() for loss in losses)
    assert model.student.predictor is None
    assert model.teacher is None
    assert not model.method.needs_teacher


def test_share_is_of_the_hidden_patches_and_noise_decides_the_rest():
    model = HPM.create(encoder(), mask_ratio=0.5, **SMALL)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(4, 16)
    one, other = model.step(images, noise, share=0.5), model.step(images, noise, num_hard=4)
    assert torch.equal(one.total, other.total)
    assert not torch.equal(one.total, model.step(images, noise, num_hard=8).total)


def test_an_encoder_by_name_other_channels_and_a_target_of_ones_own():
    named = HPM.create("vit_tiny_patch16_224", image_size=(32, 64), channels=1, patch_size=16, **SMALL)
    assert (named.geometry.grid, named.geometry.channels) == ((2, 4), 1)
    assert torch.isfinite(named.step(torch.randn(2, 1, 32, 64)).total)
    own = HogTarget((8, 8), channels=5)
    model = HPM.create(encoder(5), target=own, **SMALL)
    assert model.method.target is own
    assert torch.isfinite(trained(model, steps=1, channels=5)[0].total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "norm_pixels"}, r"target: must be one of 'pixels', .*got 'norm_pixels'.*norm_pix"),
        ({"mask": "hardest"}, r"mask: must be one of 'hard', .*got 'hardest'"),
        ({"mask": "hard", "predicted_loss": "none"}, r"mask: 'hard' chooses by predicted loss"),
        ({"mask_ratio": 1.0}, "mask_ratio: must hide at least one"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        HPM.create(encoder(), **SMALL, **options)
