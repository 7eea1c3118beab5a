"""Boxes: read from both forms, and what they cover of an image."""

import numpy as np
import pytest
import torch
from PIL import Image

from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.data.sources import open_source
from hardpatch.evaluate import foreground
from hardpatch.evaluate.boxes import read_boxes
from hardpatch.runtime.errors import InputError
from hardpatch.training.pretrain import train
from places import SHARED
from tiny import tiny_config

torch.set_num_threads(1)
NATURE = SHARED / "data/nature"
HEADER = "path,xmin,ymin,xmax,ymax\n"


@pytest.fixture
def pictures(tmp_path):
    """Two wide pictures of one name in two folders, a square one, and a damaged one."""
    for name, size in (("a/1.png", (40, 20)), ("b/1.png", (40, 20)), ("b/2.png", (20, 20)), ("b/3.png", (20, 20))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (9, 9, 9)).save(path)
    path.write_bytes(b"scratched")
    return tmp_path


def read(folder, rows, size=(20, 20)):
    """Boxes of a table with these lines, or of an array."""
    if isinstance(rows, str):
        path = folder / "boxes.csv"
        path.write_text(HEADER + rows)
    else:
        path = folder / "boxes.npy"
        np.save(path, rows)
    return read_boxes(path, open_source(str(folder / "images")), size)


def covered(*boxes, size=(20, 20)):
    """A mask of boxes: left, top, right, bottom, the last two just outside."""
    mask = torch.zeros(*size, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def test_a_table_of_boxes(pictures, capsys):
    found = read(
        pictures,
        "a/1.png,10,0,12,4\n./a/1.png,12,5,29,19\nb/1,0,0,3,3\n2.png,1,2,1,2\nb/3.png,0,0,3,3\nx.png,0,0,1,1\n",
    )
    assert set(found) == {0, 2}  # of b/1 the box lies left of the part in the middle that is seen; b/3 is damaged
    assert torch.equal(found[0], covered((0, 0, 3, 5), (2, 5, 20, 20)))
    assert torch.equal(found[2], covered((1, 2, 2, 3)))
    assert "1 of 6 lines name no image of these, the first 'x.png'" in capsys.readouterr().err


def test_an_array_of_boxes(pictures):
    found = read(pictures, np.array([[10, 0, 12, 4], [0, 0, 0, 0], [1, 2, 1, 3], [0, 0, 9, 9]], dtype=np.uint8))
    assert found.keys() == {0, 2}
    assert torch.equal(found[0], covered((0, 0, 3, 5)))
    assert torch.equal(found[2], covered((1, 2, 2, 4)))


def test_an_image_of_another_size_brings_its_box_along(pictures):
    found = read(pictures, "2.png,5,10,14,19\n", size=(40, 40))
    assert torch.equal(found[2], covered((10, 20, 30, 40), size=(40, 40)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a/1.png,,,,\n", "boxes: empty: .* has no box for any of the 4 images"),
        ("", "boxes: empty"),
        ("x.png,0,0,1,1\n", "boxes: empty"),
        (np.zeros((4, 4)), "boxes: empty"),
        (np.full((4, 4), np.nan), "boxes: empty"),
        (np.ones((3, 4)), "has 3 rows, and there are 4 images"),
        (np.ones((4, 5)), r"must be an array of numbers \(n, 4\), got \(4, 5\)"),
        (np.full((4, 4), "x"), "must be an array of numbers"),
        ("1.png,0,0,1,1\n", "line 2: several images end in '1.png'.* give more of the path"),
        ("2.png,0,0,one,1\n", "line 2: must be four numbers, got '0', '0', 'one', '1'"),
        ("2.png,0,,1,1\n", "line 2: must be four numbers"),
        ("2.png,0,0,1,21\n", "must lie within the 20x20 pixels of .*2.png .*got 0, 0, 1, 21"),
        ("2.png,5,0,4,1\n", "from smaller to larger numbers, got 5, 0, 4, 1"),
        ("2.png,-1,0,4,1\n", "must lie within"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(pictures, rows, message):
    with pytest.raises(InputError, match=message):
        read(pictures, rows)


def test_files_that_are_no_boxes_are_refused(pictures):
    source = open_source(str(pictures / "images"))
    (pictures / "columns.csv").write_text("path,xmin,ymin\n2.png,1,2\n")
    (pictures / "text.npy").write_text("no array")
    for name, message in (
        ("columns.csv", "needs the columns path, xmin, ymin, xmax, ymax; missing xmax, ymax"),
        ("text.npy", "boxes: cannot read"),
        ("nothing.csv", "boxes: cannot read"),
        ("boxes.json", "must be a .csv or .npy"),
    ):
        with pytest.raises(InputError, match=message):
            read_boxes(pictures / name, source, (20, 20))


def test_foreground_with_boxes_leaves_out_images_without_one(tmp_path, capsys):
    train(tiny_config(epochs=1), tmp_path / "run")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        picture = np.full((32, 32, 3), 90, np.uint8)
        left = 0 if number in (1, 4) else 16  # elsewhere in those that have no box
        picture[8:24, left : left + 16] = generator.integers(0, 255, (16, 16, 3))  # a noisy object, patches 8 wide
        Image.fromarray(picture).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/5.png").write_bytes(b"scratched")
    (tmp_path / "boxes.csv").write_text(HEADER + "".join(f"{number}.png,16,8,31,23\n" for number in (0, 2, 3, 5)))
    config = ForegroundConfig(
        str(tmp_path / "run"),
        str(tmp_path / "images"),
        boxes=str(tmp_path / "boxes.csv"),
        device="cpu",
        max_damaged=0.2,
    )
    result = foreground.run(config)
    assert (result.num_images, result.damaged) == (3, 1)
    assert result.measures["patch_variance"] == (1, 1, 1)
    assert "5.png" in capsys.readouterr().err
    with pytest.raises(InputError, match="boxes: give masks or boxes"):
        foreground.run(ForegroundConfig(config.checkpoint, config.images, masks="m", boxes="b", device="cpu"))


def test_masks_of_the_source_and_the_same_masks_by_number_give_the_same_foreground():
    source = open_source("shapes:24", image_size=(32, 32))
    masks = torch.stack([source.read(index).mask for index in range(24)])
    expected = foreground.foreground_patches(masks, (8, 8)).numpy()
    for known in (None, dict(enumerate(masks))):
        found = foreground.measure_images(
            lambda images: {"patch_variance": np.zeros((len(images), 16)), "attention": None},
            foreground.Objects(source, (32, 32), known), patch=(8, 8), device=torch.device("cpu"),
        )  # fmt: skip
        assert found.indices == list(range(24))
        assert found.scores.keys() == {"patch_variance"}
        np.testing.assert_array_equal(found.foreground, expected)


@pytest.mark.skipif(not NATURE.is_dir(), reason="needs ../shared/data/nature")
def test_boxes_of_nature_fit_its_shards():
    source = open_source(str(NATURE / "val-*.tar.gz"))
    boxes = np.load(NATURE / "boxes_val.npy")
    found = read_boxes(NATURE / "boxes_val.npy", source, (64, 64))
    assert len(found) == len(source) == 2300
    assert torch.equal(found[7], covered((boxes[7] + [0, 0, 1, 1]).tolist(), size=(64, 64)))
