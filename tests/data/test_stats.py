"""``hardpatch data stats``: numpy's figures over all pixels, whatever the number of processes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import Kinds

from hardpatch.cli import main
from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.statistics import Moments, measure, moments

torch.set_num_threads(1)


def pixels_of(source):
    """All valid pixels of the undamaged images, (C, n)."""
    parts = []
    for index, sample in enumerate(source.samples):
        if index not in source.damaged:
            flat = sample.image.double().flatten(1)
            parts.append(flat if sample.valid is None else flat[:, sample.valid.flatten()])
    return torch.cat(parts, 1).numpy() / 255


@pytest.mark.parametrize("workers", [0, 2])
def test_figures_are_numpys(workers):
    found, pixels = measure(Kinds(), workers=workers), pixels_of(Kinds())
    assert found.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert found.std == pytest.approx(pixels.std(1).tolist(), rel=1e-12)
    assert found.images == 15
    assert found.damaged == [("image 5", "broken")]


def test_sums_of_bytes_are_exact():
    """A variance of 1e-4 levels under a mean of 254 would drown in float32, and in the difference of squares."""
    image = torch.full((1, 100, 100), 254, dtype=torch.uint8)
    image[0, 0, 0] = 255
    found = moments(Sample(image))
    assert found.mean[0] == 254 + 1e-4
    assert found.squares[0] == pytest.approx(1 - 1e-4, rel=1e-12)


def test_merging_is_the_same_in_any_order():
    rng = np.random.default_rng(0)
    values = [torch.from_numpy(rng.normal(1000, 1e-3, (2, 5 + n, 7)).astype(np.float32)) for n in range(6)]
    parts = [moments(Sample(value)) for value in values]
    everything = torch.cat([value.flatten(1) for value in values], 1).double().numpy()
    for some in (parts, parts[::-1], [parts[0].and_of(parts[1]), *parts[2:]]):
        whole = some[0]
        for part in some[1:]:
            whole = whole.and_of(part)
        assert whole.pixels == everything.shape[1]
        assert np.allclose(whole.mean, everything.mean(1), rtol=1e-14)
        assert np.allclose(whole.squares / whole.pixels, everything.var(1), rtol=1e-9)
    empty = Moments(0, np.zeros(2), np.zeros(2))
    assert parts[0].and_of(empty) == parts[0]
    assert empty.and_of(parts[0]).mean == pytest.approx(parts[0].mean)


def test_command_prints_the_flags_to_use(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 4096, (5, 4, 20, 30)).astype(np.uint16)
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(SystemExit) as left:
        main(["data", "stats", str(tmp_path), "--workers", "0", "--json"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    found = json.loads(printed.splitlines()[-1])
    low, high = float(arrays.min()), float(arrays.max())
    scaled = (arrays.transpose(1, 0, 2, 3).reshape(4, -1) - low) / (high - low)
    assert (found["channels"], found["images"], found["value_range"]) == (4, 5, [low, high])
    assert found["mean"] == pytest.approx(scaled.mean(1).tolist(), rel=1e-6)
    assert found["std"] == pytest.approx(scaled.std(1).tolist(), rel=1e-6)
    assert found["damaged"][0]["path"].endswith("broken.npy")
    assert f"--channels 4 --value-range {low:g} {high:g} --mean {found['mean'][0]:.6f}" in printed


def test_colour_among_grey_is_three_channels(tmp_path, capsys):
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "b.png")
    Image.new("RGB", (8, 8), (200, 100, 0)).save(tmp_path / "c.png")
    with pytest.raises(SystemExit):
        main(["data", "stats", str(tmp_path), "--workers", "0", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["mean"] == pytest.approx([400 / 765, 300 / 765, 200 / 765])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' does not exist"),
        (["shapes:4", "--value-range", "3"], "value_range: needs the lowest and the highest"),
    ],
)
def test_wrong_input_is_one_clear_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["data", "stats", *arguments])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_readable_is_refused(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as left:
        main(["data", "stats", str(tmp_path), "--workers", "0"])
    assert left.value.code == 2
    assert "no image of 1 can be read" in capsys.readouterr().err
    with pytest.raises(DecodeError):
        Kinds().read(5)
