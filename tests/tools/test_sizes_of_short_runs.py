"""A short run takes a smaller batch, so that it has steps enough to learn in."""

import pytest

from hardpatch.tools.plan.sizes import batch_for_a_short_run


@pytest.mark.parametrize(
    ("batch", "views", "unit", "expected"),
    [
        (256, 1_000_000, 1, 256),
        (256, 200_000, 1, 128),
        (256, 46_000, 1, 64),
        (256, 100, 1, 64),  # no smaller, however short
        (16, 100, 1, 16),
        (256, 46_000, 64, 64),
        (192, 46_000, 64, 192),  # 96 is no multiple
        (2048, 1_000_000, 8, 512),
    ],
)
def test_batch(batch, views, unit, expected):
    assert batch_for_a_short_run(batch, views, unit) == expected
