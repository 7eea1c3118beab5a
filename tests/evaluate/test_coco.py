"""COCO files read and refused, and instances from connected components."""

import copy
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from dense_run import save
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.data.sources.drawn_shapes import CLASSES
from hardpatch.evaluate.dense.coco import CocoImages, draw_mask, find_damage, instances_from_masks, open_instances
from hardpatch.runtime.errors import InputError

CONTENT = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 20, "width": 30},
        {"id": 9, "file_name": "deeper/b.png", "height": 10, "width": 12},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 30, "bbox": [2, 3, 10, 5],
         "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [20, 10, 30, 5], "segmentation": [[20, 10, 30, 10, 30, 15]]},
        {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 30, 20], "iscrowd": 1,
         "segmentation": {"size": [20, 30], "counts": [0, 600]}},
    ],
    "categories": [{"id": 30, "name": "cat"}, {"id": 5, "name": "dog"}],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "images" / "a.png", np.zeros((20, 30, 3), dtype=np.uint8))
    save(tmp_path / "images" / "deeper" / "b.png", np.zeros((10, 12, 3), dtype=np.uint8))
    return tmp_path


def opened(folder, content, **options):
    (folder / "file.json").write_text(json.dumps(content))
    return open_instances(
        str(folder / "file.json"), str(folder / "images"), decoder=Decoder(), field="train", **options
    )


def test_boxes_labels_and_masks(folder):
    images = opened(folder, CONTENT)
    assert [category["name"] for category in images.categories] == ["dog", "cat"]
    found = images.read(0)
    assert found.image.shape == (3, 20, 30)
    assert found.boxes.tolist() == [[2, 3, 12, 8], [20, 10, 30, 15]]  # cut at the edge; a crowd is no instance
    assert found.labels.tolist() == [2, 1]
    square = torch.zeros(20, 30, dtype=torch.bool)
    square[3:8, 2:12] = True
    assert torch.equal(found.masks[0], square)
    empty = images.read(1)
    assert empty.boxes.shape == (0, 4)
    assert empty.masks.shape == (0, 10, 12)
    assert find_damage(images, description="") == [None, None]


def test_only_some_images_keep_their_annotations(folder):
    part = opened(folder, CONTENT).only([1, 0])
    assert part.name(0).endswith("deeper/b.png")
    assert len(part.read(1).boxes) == 2
    assert len(opened(folder, CONTENT).only([1]).content["annotations"]) == 0


def test_every_form_of_a_segmentation():
    mask = np.zeros((6, 5), dtype=np.uint8)
    mask[1:4, 2:5] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    plain = {"size": [6, 5], "counts": [13, 3, 3, 3, 3, 3, 2]}
    assert np.array_equal(draw_mask({"size": [6, 5], "counts": compressed["counts"].decode()}, (6, 5)), mask)
    assert np.array_equal(draw_mask(plain, (6, 5)), mask)
    assert np.array_equal(draw_mask([[2, 1, 5, 1, 5, 4, 2, 4]], (6, 5)), mask)


def test_without_segmentations_there_are_no_masks(folder):
    content = copy.deepcopy(CONTENT)
    for item in content["annotations"]:
        del item["segmentation"]
    images = opened(folder, content)
    assert not images.has_masks
    assert images.read(0).masks is None


def changed(change):
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0].update(bbox=[2, 3, 0, 5]),
            r"annotation 1 in 'a.png': its box is empty: \[2, 3, 0",
        ),
        (lambda c: c["annotations"][0].update(bbox=[40, 3, 5, 5]), "outside of the 20x30 image"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox must be"),
        (lambda c: c["annotations"][0].update(category_id=6), r"annotation 1 is of category 6; there are \[5, 30\]"),
        (lambda c: c["annotations"][0].update(image_id=6), "belongs to the image 6, which is not listed"),
        (lambda c: c["annotations"][0].update(id=2), "annotations: the id 2 is there more than once"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotations: an entry has no 'bbox'"),
        (lambda c: c["annotations"][0].pop("segmentation"), "1 of 2 annotations have no segmentation"),
        (lambda c: c["images"][1].update(file_name="c.png"), "has no image 'c.png'"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c["annotations"].clear(), "has no instance"),
        (lambda c: c.pop("categories"), "no list 'categories'"),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, message):
    with pytest.raises(InputError, match=f"train_annotations: .*{message}"):
        opened(folder, changed(change))


def test_empty_boxes_may_be_left_out(folder):
    content = changed(lambda c: c["annotations"][0].update(bbox=[2, 3, 0, 5]))
    assert opened(folder, content, drop_empty_boxes=True).read(0).labels.tolist() == [1]


def test_a_file_that_is_no_json(folder):
    (folder / "file.json").write_text("{")
    with pytest.raises(InputError, match="train_annotations: cannot read"):
        open_instances(str(folder / "file.json"), str(folder / "images"), decoder=Decoder(), field="train")
    with pytest.raises(InputError, match="train_images: must be a folder"):
        open_instances(str(folder / "file.json"), str(folder / "nothing"), decoder=Decoder(), field="train")


def test_an_image_of_another_size_and_one_that_is_damaged(folder):
    (folder / "images" / "deeper" / "b.png").write_bytes(b"scratched")
    images = opened(folder, CONTENT)
    found = find_damage(images, description="")
    assert found[0] is None
    assert found[1].name.endswith("b.png")
    save(folder / "images" / "a.png", np.zeros((30, 20, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"a.png is 30x20 pixels \(height x width\), its annotations say 20x30"):
        find_damage(images, description="")


def test_instances_are_connected_components(tmp_path):
    mask = np.zeros((12, 16), dtype=np.uint8)
    mask[1:4, 1:6] = 255
    mask[4:6, 6:8] = 200  # touches the first one at a corner only
    mask[9:11, 10:16] = 255
    mask[0, 15] = 255  # too small
    mask[11, 0:9] = 100  # dark
    save(tmp_path / "images" / "one.jpg", np.zeros((12, 16, 3), dtype=np.uint8))
    save(tmp_path / "masks" / "one.png", mask)
    content = instances_from_masks(tmp_path / "images", tmp_path / "masks", decoder=Decoder(), min_pixels=4)
    assert content["images"] == [{"id": 1, "file_name": "one.jpg", "height": 12, "width": 16}]
    found = {tuple(item["bbox"]): item for item in content["annotations"]}
    assert set(found) == {(1, 1, 5, 3), (6, 4, 2, 2), (10, 9, 6, 2)}
    assert found[1, 1, 5, 3]["area"] == 15
    json.dumps(content)
    images = CocoImages(content, tmp_path / "images", decoder=Decoder())
    masks = images.read(0).masks
    assert masks.sum(dim=(1, 2)).tolist() == [15, 4, 12]
    together = masks.any(dim=0).numpy()
    mask[0, 15] = 0
    assert np.array_equal(together, mask > 127)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path / "images" / "one.jpg", np.zeros((12, 16, 3), dtype=np.uint8))
    save(tmp_path / "masks" / "one.png", np.zeros((16, 12), dtype=np.uint8))
    spec = f"from-masks:{tmp_path / 'masks'}"
    with pytest.raises(InputError, match=r"val_annotations: .*one.png is 16x12 pixels and its image 12x16"):
        open_instances(spec, str(tmp_path / "images"), decoder=Decoder(), field="val")
    save(tmp_path / "masks" / "one.png", np.zeros((12, 16), dtype=np.uint8))
    with pytest.raises(InputError, match="val_annotations: has no instance"):
        open_instances(spec, str(tmp_path / "images"), decoder=Decoder(), field="val")
    (tmp_path / "masks" / "one.png").unlink()
    with pytest.raises(InputError, match=r"val_annotations: .* has no mask for the image"):
        open_instances(spec, str(tmp_path / "images"), decoder=Decoder(), field="val")


# The embedded set


def test_shapes_bring_their_own_instances():
    images = open_instances("", "shapes:24@3", decoder=Decoder(), field="train", image_size=(32, 48))
    source = open_source("shapes:24@3", image_size=(32, 48))
    assert [category["name"] for category in images.categories] == list(CLASSES)
    for index in (0, 7, 23):
        one, sample = images.read(index), source.read(index)
        assert torch.equal(one.image, sample.image)
        assert torch.equal(one.masks, sample.mask[None])
        rows, columns = sample.mask.nonzero(as_tuple=True)
        assert one.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
        assert images.categories[int(one.labels) - 1]["name"] == source.labels[index]
        assert images.name(index) == source.name(index)
    some = images.only([7, 23])
    assert torch.equal(some.read(1).image, source.read(23).image)
    assert len(some.content["annotations"]) == 2


def test_annotations_of_shapes_are_refused_and_those_of_a_folder_are_needed(tmp_path):
    with pytest.raises(InputError, match=r"train_annotations: shapes know their own, leave it out; got 'a\.json'"):
        open_instances("a.json", "shapes:24", decoder=Decoder(), field="train")
    with pytest.raises(InputError, match=r"val_annotations: name COCO's JSON or from-masks:DIR"):
        open_instances("", str(tmp_path), decoder=Decoder(), field="val")
