"""Boxes: read from both forms, found in maps of scores; torchvision and plain loops are the oracles."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torchvision.ops import box_iou

from hardpatch.config.evaluations import ForegroundConfig
from hardpatch.data.sources import open_source
from hardpatch.evaluate import foreground
from hardpatch.evaluate.boxes import QUANTILES, box_overlaps, extents, largest_parts, overlap, read_boxes
from hardpatch.evaluate.foreground import mean_finding
from hardpatch.runtime.errors import InputError
from hardpatch.training.pretrain import train
from places import SHARED
from tiny import tiny_config

torch.set_num_threads(1)
NATURE = SHARED / "data/nature"
HEADER = "path,xmin,ymin,xmax,ymax\n"


def largest_part_by_search(mask):
    """Flood fill from every patch in reading order; the first part that is larger than all before."""
    best, seen = set(), set()
    for start in map(tuple, np.argwhere(mask)):
        part, waiting = set(), [start]
        while waiting:
            y, x = waiting.pop()
            if (y, x) in seen or not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]) or not mask[y, x]:
                continue
            seen.add((y, x))
            part.add((y, x))
            waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        if len(part) > len(best):
            best = part
    found = np.zeros_like(mask)
    for place in best:
        found[place] = True
    return found


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 1.0])
def test_largest_parts_equal_a_flood_fill(share):
    maps = np.random.default_rng(0).random((60, 7, 5)) < share
    expected = np.stack([largest_part_by_search(mask) for mask in maps])
    np.testing.assert_array_equal(largest_parts(maps), expected)


def test_extents_equal_scipy():
    maps = np.random.default_rng(1).random((40, 6, 9)) < 0.15
    maps[:, 2, 3] = True
    for mask, box in zip(maps, extents(maps)):
        rows, columns = ndimage.find_objects(mask.astype(int))[0]
        assert box.tolist() == [columns.start, rows.start, columns.stop, rows.stop]


def test_overlap_equals_torchvision():
    corners = np.random.default_rng(2).integers(0, 20, (2, 30, 2))
    sizes = np.random.default_rng(3).integers(1, 12, (2, 30, 2))
    a, b = np.concatenate([corners, corners + sizes], axis=2)
    np.testing.assert_allclose(overlap(a, b[:7]), box_iou(torch.from_numpy(a), torch.from_numpy(b[:7])), rtol=1e-6)


def test_overlaps_equal_a_loop():
    generator = np.random.default_rng(4)
    scores, grid, patch = generator.integers(0, 30, (12, 20)).astype(float), (4, 5), (6, 8)
    boxes = [np.array([[3, 2, 3 + w, 2 + h] for w, h in generator.integers(4, 20, (1 + i % 3, 2))]) for i in range(12)]
    found = box_overlaps(scores, boxes, grid=grid, patch=patch)
    for row in range(12):
        for column, quantile in enumerate(QUANTILES):
            mask = (scores[row] >= np.quantile(scores[row], quantile)).reshape(grid)
            rows, columns = ndimage.find_objects(largest_part_by_search(mask).astype(int))[0]
            box = [columns.start * 8, rows.start * 6, columns.stop * 8, rows.stop * 6]
            expected = box_iou(torch.tensor([box]), torch.from_numpy(boxes[row])).max().item()
            assert found[row, column] == pytest.approx(expected)


def test_scores_that_know_the_object_find_its_box():
    truth = np.zeros((1, 6, 6), dtype=bool)
    truth[0, 1:4, 2:6] = True
    scores = truth.reshape(1, -1) + 0.0
    assert box_overlaps(scores, [extents(truth)[0][None] * 8], grid=(6, 6), patch=(8, 8)).max() == 1
    distracted = scores.copy()
    distracted[0, 30] = 2  # one higher patch elsewhere: the box of the largest part does not mind
    assert box_overlaps(distracted, [extents(truth)[0][None] * 8], grid=(6, 6), patch=(8, 8)).max() == 1


def test_one_threshold_for_all_is_never_better_than_one_for_each():
    figures, overlaps = np.ones((3, 3)), np.array([[0.2, 0.6], [0.9, 0.1], [0.5, 0.5]])
    figures[2] = np.nan  # an image without contrast
    found = mean_finding(figures, overlaps)
    assert found.best_box_iou == pytest.approx((0.6 + 0.9) / 2)
    assert found.box_iou == pytest.approx((0.2 + 0.9) / 2)


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


def corners(masks):
    return extents(masks.numpy()).tolist()


def test_a_table_of_boxes(pictures, capsys):
    found = read(
        pictures,
        "a/1.png,10,0,12,4\n./a/1.png,12,5,29,19\nb/1,0,0,3,3\n2.png,1,2,1,2\nb/3.png,0,0,3,3\nx.png,0,0,1,1\n",
    )
    assert set(found) == {0, 2}  # of b/1 the box lies left of the part in the middle that is seen; b/3 is damaged
    assert corners(found[0]) == [[0, 0, 3, 5], [2, 5, 20, 20]]
    assert corners(found[2]) == [[1, 2, 2, 3]]
    assert "1 of 6 lines name no image of these, the first 'x.png'" in capsys.readouterr().err


def test_an_array_of_boxes(pictures):
    found = read(pictures, np.array([[10, 0, 12, 4], [0, 0, 0, 0], [1, 2, 1, 3], [0, 0, 9, 9]], dtype=np.uint8))
    assert {index: corners(masks) for index, masks in found.items()} == {0: [[0, 0, 3, 5]], 2: [[1, 2, 2, 4]]}


def test_an_image_of_another_size_brings_its_box_along(pictures):
    found = read(pictures, "2.png,5,10,14,19\n", size=(40, 40))
    assert corners(found[2]) == [[10, 20, 30, 40]]


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
    assert result.measures["patch_variance"] == (1, 1, 1, 1, 1)
    assert result.whole_image_iou == pytest.approx(16 * 16 / 32**2)
    assert "5.png" in capsys.readouterr().err
    with pytest.raises(InputError, match="boxes: give masks or boxes"):
        foreground.run(ForegroundConfig(config.checkpoint, config.images, masks="m", boxes="b", device="cpu"))


def test_masks_and_the_boxes_around_them_name_the_same_objects(tmp_path):
    source = open_source("shapes:24", image_size=(32, 32))
    masks = np.stack([source.read(index).mask.numpy() for index in range(24)])
    expected = extents(largest_parts(masks))
    np.save(tmp_path / "boxes.npy", expected - [0, 0, 1, 1])
    boxes = read_boxes(tmp_path / "boxes.npy", source, (32, 32))
    for known in (None, boxes):
        found = foreground._measure_images(
            lambda images: {"patch_variance": np.zeros((len(images), 16)), "attention": None},
            source, size=(32, 32), patch=(8, 8), device=torch.device("cpu"), masks=None, boxes=known,
        )  # fmt: skip
        assert found.indices == list(range(24))
        assert found.scores.keys() == {"patch_variance"}
        np.testing.assert_array_equal(np.concatenate(found.objects), expected)


@pytest.mark.skipif(not NATURE.is_dir(), reason="needs ../shared/data/nature")
def test_boxes_of_nature_fit_its_shards():
    source = open_source(str(NATURE / "val-*.tar.gz"))
    boxes = np.load(NATURE / "boxes_val.npy")
    found = read_boxes(NATURE / "boxes_val.npy", source, (64, 64))
    assert len(found) == len(source) == 2300
    assert corners(found[7]) == [(boxes[7] + [0, 0, 1, 1]).tolist()]
