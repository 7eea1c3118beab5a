"""Pictures of images that no screen can show as they are."""

import numpy as np
import pytest
import torch

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.figures.display import build_display


def config(channels, **fields):
    return with_fields(Config(), {"data": "x", "channels": channels, "mean": (0.5,) * channels,
                                  "std": (0.25,) * channels} | fields)  # fmt: skip


def noise(channels, *, side=16, batch=4):
    return torch.randint(
        256, (batch, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bit_grey_and_colour_are_shown_as_they_are(channels):
    images = noise(channels)
    shown = build_display(config(channels), images).pixels(images)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown, images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def test_other_depths_are_stretched_between_their_ends():
    """Values that fill a thousandth of the range are seen all the same; a hundredth at either end is cut."""
    images = 100 + torch.randn(4, 1, 16, 16) * 0.05
    told = config(1, value_range=(0.0, 65535.0), mean=(100 / 255,), std=(0.05 / 255,))
    shown = build_display(told, images).pixels(images)
    low, high = np.quantile(images.numpy(), (0.01, 0.99))
    expected = np.clip((images[:, 0].numpy() - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(shown[..., 0], expected, atol=3)


def test_a_dark_background_stays_dark():
    """Most of a micrograph is background just above the lowest value: it is black, not grey."""
    images = torch.full((1, 1, 32, 32), 20.0) + torch.rand(1, 1, 32, 32)
    images[..., 10:16, 10:16] = 200.0
    told = config(1, value_range=(0.0, 4095.0), mean=(26 / 255,), std=(30 / 255,))
    shown = build_display(told, images).pixels(images)
    assert shown[0, 0, 0, 0] < 10
    assert shown[0, 12, 12, 0] > 245


def test_chosen_channels_are_shown_in_their_order():
    images = noise(13)
    display = build_display(config(13, display_channels=(3, 2, 1)), images)
    expected = images[:, [3, 2, 1]].permute(0, 2, 3, 1).numpy().astype(float)
    ends = np.quantile(expected, (0.01, 0.99), axis=(0, 1, 2))
    stretched = np.clip((expected - ends[0]) / (ends[1] - ends[0]), 0, 1) * 255
    np.testing.assert_allclose(display.pixels(images), stretched, atol=2)
    bright = images.clone()
    bright[:, 3] = 255
    assert (display.pixels(bright)[..., 0] == 255).all()
    np.testing.assert_array_equal(display.pixels(bright)[..., 1:], display.pixels(images)[..., 1:])
    grey = build_display(config(13, display_channels=(5,)), images).pixels(images)
    assert (grey[..., 0] == grey[..., 2]).all()


def test_of_many_channels_theprincipal_components_are_shown():
    """Thirteen channels that are mixtures of three signals: the colours span the signals, uncorrelated."""
    generator = torch.Generator().manual_seed(1)
    signals = torch.randn(4, 3, 16, 16, generator=generator)
    mixed = torch.einsum("kc,bchw->bkhw", torch.randn(13, 3, generator=generator), signals) * 10 + 127
    display = build_display(config(13), mixed)
    colours = torch.einsum("kc,bchw->bkhw", display.projection, display.normalise(mixed))
    flat = colours.permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(torch.corrcoef(flat), torch.eye(3), atol=1e-2, rtol=0)
    known = torch.cat([signals.permute(1, 0, 2, 3).flatten(1), torch.ones(1, flat.shape[1])])
    rebuilt = torch.linalg.lstsq(known.T, flat.T)
    assert (known.T @ rebuilt.solution - flat.T).abs().max() < 1e-2
    assert (display.projection.sum(1) >= 0).all(), "bright stays bright"


def test_two_channels_leave_blue_empty():
    images = noise(2)
    assert (build_display(config(2), images).pixels(images)[..., 2] == 0).all()


def test_a_channel_that_is_not_there_is_refused():
    with pytest.raises(Exception, match=r"display_channels: .* got \(0, 13\)"):
        config(13, display_channels=(0, 13))
    with pytest.raises(Exception, match="display_channels"):
        config(13, display_channels=(0, 1))
