"""Masks: every kind of file that holds classes, and every kind of mistake."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dense_run import save
from hardpatch.data.images.decode import DecodeError
from hardpatch.data.sources import open_source
from hardpatch.evaluate.dense.class_masks import (
    IGNORED,
    MaskedImages,
    MaskRules,
    match_by_stem,
    read_class_mask,
    survey,
)
from hardpatch.runtime.errors import InputError

CLASSES = np.array([[0, 1, 2], [3, 254, 255]], dtype=np.uint8)


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def palette(array):
    indexed = Image.frombytes("P", array.shape[::-1], array.tobytes())
    indexed.putpalette([(7 * i) % 256 for i in range(768)])
    return indexed


def rgb(array):
    return Image.fromarray(np.repeat(array[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "content",
    [
        png(Image.fromarray(CLASSES)),
        png(palette(CLASSES)),
        png(rgb(CLASSES)),
        png(Image.fromarray(CLASSES.astype(np.uint16))),
        npy(CLASSES.astype(np.int64)),
    ],
    ids=["grey", "palette", "rgb of equal channels", "16 bit", "npy"],
)
def test_values_are_classes_and_255_does_not_count(content):
    found = read_class_mask(content, MaskRules())
    assert found.tolist() == [[0, 1, 2], [3, 254, IGNORED]]
    assert found.dtype == torch.int16


def test_rules():
    content = png(Image.fromarray(CLASSES))
    assert read_class_mask(content, MaskRules(ignore_index=-1)).tolist() == CLASSES.tolist()
    assert read_class_mask(content, MaskRules(ignore_index=3)).tolist() == [[0, 1, 2], [IGNORED, 254, 255]]
    reduced = read_class_mask(content, MaskRules(reduce_zero_label=True))
    assert reduced.tolist() == [[IGNORED, 0, 1], [2, 253, IGNORED]]
    binary = read_class_mask(png(Image.fromarray(np.uint8([[0, 127, 128, 255]]))), MaskRules(binary=True))
    assert binary.tolist() == [[0, 0, 1, 1]]
    one_bit = png(Image.fromarray(np.array([[True, False]])))
    assert read_class_mask(one_bit, MaskRules(binary=True)).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(Image.fromarray(np.random.default_rng(0).integers(0, 9, (2, 2, 3)).astype(np.uint8))), "colour picture"),
        (npy(np.zeros((2, 2))), "float64"),
        (npy(np.zeros((2, 2, 3), dtype=np.uint8)), "shape"),
        (npy(np.full((2, 2), 70000)), "70000"),
        (b"no picture", "UnidentifiedImageError"),
        (png(Image.fromarray(CLASSES))[:40], "Error"),
    ],
    ids=["colours", "floats", "channels", "too large", "garbage", "cut off"],
)
def test_what_holds_no_classes_is_refused(content, reason):
    with pytest.raises(DecodeError, match=reason):
        read_class_mask(content, MaskRules())


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.jpg", np.zeros((6, 8, 3), dtype=np.uint8))
        save(tmp_path / "masks" / f"{name}.png", np.full((6, 8), ord(name) - ord("a"), dtype=np.uint8))
    return tmp_path


def masked(folders):
    source = open_source(str(folders / "images"))
    return MaskedImages(source, match_by_stem(source, folders / "masks", field="masks"), MaskRules())


def test_masks_are_matched_by_name_and_counted(folders):
    images = masked(folders)
    assert [images.read(i).mask.unique().tolist() for i in range(3)] == [[0], [1], [2]]
    found = survey(images, description="")
    assert found.readable == [0, 1, 2]
    assert found.pixels == {0: 48, 1: 48, 2: 48}
    assert found.example[2].endswith("c.jpg")
    assert images.only([2, 0]).only([0]).read(0).mask.unique().tolist() == [2]


def test_a_mask_for_every_image_and_of_its_size(folders):
    save(folders / "masks" / "b.png", np.zeros((8, 6), dtype=np.uint8))
    with pytest.raises(InputError, match=r"the mask of .*b.jpg is 8x6 pixels and the image 6x8"):
        survey(masked(folders), description="")
    (folders / "masks" / "b.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"cannot read .*b.png"):
        survey(masked(folders), description="")
    (folders / "masks" / "b.png").unlink()
    with pytest.raises(InputError, match=r"no mask for the image .*b.jpg"):
        masked(folders)


def test_the_first_image_without_a_mask_is_named_too(folders):
    (folders / "masks" / "a.png").unlink()
    with pytest.raises(InputError, match=r"no mask for the image .*a.jpg"):
        masked(folders)


def test_names_must_be_unique(folders):
    save(folders / "masks" / "deeper" / "a.png", np.zeros((6, 8), dtype=np.uint8))
    with pytest.raises(InputError, match="two masks are named 'a'"):
        masked(folders)
    (folders / "masks" / "deeper" / "a.png").unlink()
    save(folders / "images" / "deeper" / "a.jpg", np.zeros((6, 8, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="several images are named 'a'"):
        masked(folders)


def test_damaged_images_are_told_apart_from_bad_masks(folders):
    (folders / "images" / "b.jpg").write_bytes(b"scratched")
    found = survey(masked(folders), description="")
    assert found.readable == [0, 2]
    assert [item.name.endswith("b.jpg") for item in found.damaged] == [True]
    assert set(found.pixels) == {0, 2}
