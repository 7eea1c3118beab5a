"""Instances in COCO's format: read and checked, or made from masks by connected components.

A COCO file is one JSON object with ``images`` (id, file_name, height, width), ``annotations`` (id, image_id,
category_id, bbox as left, top, width, height in pixels, optionally segmentation, area, iscrowd) and ``categories``
(id, name).
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from scipy import ndimage
from torch import Tensor

from hardpatch.data.images.decode import DecodeError, Decoder
from hardpatch.data.loader.loading import Damage
from hardpatch.data.sources import ShapesSource, open_source
from hardpatch.data.sources.drawn_shapes import CLASSES
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.evaluate.dense.class_masks import MaskRules, match_by_stem, read_class_mask
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked

FROM_MASKS = "from-masks:"
"""What an annotations argument begins with that names a folder of masks instead of a file."""


class Instances(NamedTuple):
    """An image and what is in it."""

    image: Shaped[Tensor, "c h w"]
    boxes: Float32[Tensor, "n 4"]
    """Left, top, right, bottom in pixels."""
    labels: Int64[Tensor, " n"]
    """From 1 on, in the order of the categories; 0 is the background."""
    masks: Bool[Tensor, "n h w"] | None


class CocoImages:
    """Images of a folder with the annotations of one COCO file.

    Crowds (``iscrowd``) are no instances to learn from; they stay in :attr:`content`, where COCO's AP knows them.

    Args:
        content: A COCO object that :func:`check_content` has passed.
        shapes: The embedded set that the images are of, instead of a folder; an image's id is its number there, from 1.
    """

    def __init__(
        self, content: dict[str, Any], folder: Path, *, decoder: Decoder, shapes: ShapesSource | None = None
    ) -> None:
        self.content = content
        self.folder = folder
        self.decoder = decoder
        self.shapes = shapes
        self.images: list[dict[str, Any]] = content["images"]
        self.categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        self._label = {category["id"]: number for number, category in enumerate(self.categories, 1)}
        self._by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                self._by_image[annotation["image_id"]].append(annotation)
        own = [item for items in self._by_image.values() for item in items]
        self.has_masks = bool(own) and all(item.get("segmentation") for item in own)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The path, or what the embedded set calls the image."""
        if self.shapes is not None:
            return self.shapes.name(self.images[index]["id"] - 1)
        return str(self.folder / self.images[index]["file_name"])

    def _image(self, index: int) -> Shaped[Tensor, "c h w"]:
        if self.shapes is not None:
            return self.shapes.read(self.images[index]["id"] - 1).image
        return self.decoder(Path(self.name(index)).read_bytes()).image

    def read(self, index: int) -> Instances:
        """Image, boxes, labels and masks.

        Raises:
            DecodeError: The image is damaged.
            OSError: It cannot be read at all.
            InputError: It is of another size than the annotations say.
        """
        about = self.images[index]
        image = self._image(index)
        size = (int(about["height"]), int(about["width"]))
        if tuple(image.shape[1:]) != size:
            raise InputError(f"annotations: {self.name(index)} is {image.shape[1]}x{image.shape[2]} pixels (height x "
                             f"width), its annotations say {size[0]}x{size[1]}")  # fmt: skip
        found = self._by_image[about["id"]]
        boxes = torch.tensor([_corners(item["bbox"], size) for item in found], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([self._label[item["category_id"]] for item in found], dtype=torch.int64)
        masks = None
        if self.has_masks:
            drawn = [torch.from_numpy(draw_mask(item["segmentation"], size)) for item in found]
            masks = torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.bool)
        return Instances(image, boxes, labels, masks)

    def only(self, indices: Sequence[int]) -> CocoImages:
        """Some of the images with their annotations."""
        images = [self.images[index] for index in indices]
        ids = {image["id"] for image in images}
        annotations = [item for item in self.content["annotations"] if item["image_id"] in ids]
        content = {**self.content, "images": images, "annotations": annotations}
        return CocoImages(content, self.folder, decoder=self.decoder, shapes=self.shapes)


def _corners(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, inside the image."""
    left, top, width, height = box
    return max(left, 0.0), max(top, 0.0), min(left + width, size[1]), min(top + height, size[0])


def draw_mask(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Pixels of a polygon, of several, or of a run-length code."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    with warnings.catch_warnings():
        # pycocotools is older than numpy 2 in how it hands its arrays over.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        decoded = coco_mask.decode(code)
    return np.asarray(decoded, dtype=bool)


def open_instances(
    annotations: str,
    images: str,
    *,
    decoder: Decoder,
    field: str,
    image_size: tuple[int, int] = (224, 224),
    min_pixels: int = 4,
    drop_empty_boxes: bool = False,
) -> CocoImages:
    """Images with their instances.

    Args:
        annotations: A COCO file, or ``from-masks:DIR``; nothing for shapes, which know theirs.
        field: What to call the arguments in a message: train or val.

    Raises:
        InputError: Nothing there, or contents that do not fit together.
    """
    if images.startswith("shapes:"):
        return _of_shapes(annotations, images, decoder, field, image_size)
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise InputError(f"{field}_images: must be a folder or shapes:N, got {images!r}")
    if not annotations:
        raise InputError(f"{field}_annotations: name COCO's JSON or from-masks:DIR for {images!r}")
    if annotations.startswith(FROM_MASKS):
        masks = Path(annotations.removeprefix(FROM_MASKS)).expanduser()
        content = instances_from_masks(
            folder, masks, decoder=decoder, min_pixels=min_pixels, field=f"{field}_annotations"
        )
    else:
        content = _read_json(Path(annotations).expanduser(), f"{field}_annotations")
    if drop_empty_boxes and isinstance(content.get("annotations"), list):
        kept = [item for item in content["annotations"] if not _is_empty(item)]
        content = {**content, "annotations": kept}
    check_content(content, folder, field=f"{field}_annotations")
    return CocoImages(content, folder, decoder=decoder)


def _of_shapes(annotations: str, images: str, decoder: Decoder, field: str, image_size: tuple[int, int]) -> CocoImages:
    """The embedded set; every image has one instance, of its silhouette's category."""
    if annotations:
        raise InputError(f"{field}_annotations: shapes know their own, leave it out; got {annotations!r}")
    source = open_source(images, decoder=decoder, image_size=image_size, field=f"{field}_images")
    assert isinstance(source, ShapesSource)
    if source.label != "silhouette":
        raise InputError(
            f"{field}_images: the objects of shapes are silhouettes; leave :background out, got {images!r}"
        )
    numbers = {name: number for number, name in enumerate(CLASSES, 1)}
    content: dict[str, Any] = {
        "images": [], "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }  # fmt: skip
    for index, label in enumerate(source.labels):
        mask = source.read(index).mask
        assert mask is not None
        height, width = mask.shape
        content["images"].append({"id": index + 1, "height": height, "width": width})
        content["annotations"].append(_instance(mask.numpy(), index + 1, index + 1, numbers[label]))
    return CocoImages(content, Path(), decoder=decoder, shapes=source)


def _instance(part: Bool[np.ndarray, "h w"], number: int, image: int, category: int) -> dict[str, Any]:
    """An annotation of some pixels, at least one."""
    from pycocotools import mask as coco_mask

    rows, columns = (np.flatnonzero(part.any(axis=axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    code = coco_mask.encode(np.asfortranarray(part.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(part.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(part.shape), "counts": code["counts"].decode()},
    }


def _read_json(path: Path, field: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{field}: cannot read {str(path)!r}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{field}: {str(path)!r} is no COCO file: it holds no object")
    return content


def _is_empty(annotation: Any) -> bool:
    box = annotation.get("bbox") if isinstance(annotation, dict) else None
    return isinstance(box, list) and len(box) == 4 and not (box[2] > 0 and box[3] > 0)


def check_content(content: dict[str, Any], folder: Path, *, field: str) -> None:
    """Refuse annotations that do not fit together or with the images' folder.

    Raises:
        InputError: A list or a field is missing, an id is there twice or unknown, an image file is missing, or a box
            is empty or outside of its image.
    """
    wanted = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in wanted.items():
        if not isinstance(content.get(part), list):
            raise InputError(f"{field}: is no COCO file: it has no list {part!r}")
        for item in content[part]:
            if missing := [key for key in keys if not isinstance(item, dict) or key not in item]:
                raise InputError(f"{field}: {part}: an entry has no {missing[0]!r}: {str(item)[:120]}")
        twice = [number for number, count in Counter(item["id"] for item in content[part]).items() if count > 1]
        if twice:
            raise InputError(f"{field}: {part}: the id {twice[0]} is there more than once")
    if not content["images"]:
        raise InputError(f"{field}: lists no images")
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for name in names.values():
        if not (folder / name).is_file():
            raise InputError(f"{field}: {str(folder)!r} has no image {name!r}")
    for item in content["annotations"]:
        where = f"annotation {item['id']}"
        if item["image_id"] not in sizes:
            raise InputError(f"{field}: {where} belongs to the image {item['image_id']}, which is not listed")
        if item["category_id"] not in categories:
            raise InputError(
                f"{field}: {where} is of category {item['category_id']}; there are {sorted(categories)[:20]}"
            )
        _check_box(item, sizes[item["image_id"]], f"{field}: {where} in {names[item['image_id']]!r}")
    own = [item for item in content["annotations"] if not item.get("iscrowd")]
    if not own:
        raise InputError(f"{field}: has no instance (annotations that are no crowds)")
    without = [item["id"] for item in own if not item.get("segmentation")]
    if 0 < len(without) < len(own):
        raise InputError(f"{field}: {len(without)} of {len(own)} annotations have no segmentation, the first is "
                         f"{without[0]}; all or none must have one")  # fmt: skip


def _check_box(item: dict[str, Any], size: tuple[int, int], where: str) -> None:
    box = item["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise InputError(f"{where}: bbox must be [left, top, width, height], got {box}")
    if _is_empty(item):
        raise InputError(f"{where}: its box is empty: {box} (left, top, width, height); mend it or give "
                         "--drop-empty-boxes")  # fmt: skip
    left, top, right, bottom = _corners(box, size)
    if right <= left or bottom <= top:
        raise InputError(f"{where}: its box {box} lies outside of the {size[0]}x{size[1]} image")


def instances_from_masks(
    images: Path, masks: Path, *, decoder: Decoder, min_pixels: int = 4, field: str = "masks"
) -> dict[str, Any]:
    """A COCO object whose instances are the connected parts of bright pixels in black and white masks.

    Pixels that touch only at a corner are not connected. Instances that touch come out as one.

    Args:
        masks: Folder of masks, one per image with the same name up to the ending; above 127 is foreground.
        min_pixels: Smaller parts are left out.

    Raises:
        InputError: A mask is missing, damaged, or of another size than its image.
    """
    source = open_source(str(images), decoder=decoder, field="images")
    say_what_is_left(source, field="images")
    files = match_by_stem(source, masks, field=field)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, file in tracked(enumerate(files), "instances from masks", total=len(files)):
        try:
            mask = read_class_mask(file.read_bytes(), MaskRules(binary=True)).numpy() > 0
        except (DecodeError, OSError) as error:
            raise InputError(f"{field}: cannot read {file}: {error}") from error
        size = _image_size(Path(source.name(index)), decoder) or mask.shape
        if mask.shape != size:
            raise InputError(f"{field}: {file} is {mask.shape[0]}x{mask.shape[1]} pixels and its image "
                             f"{size[0]}x{size[1]}; they must be of the same size")  # fmt: skip
        name = str(Path(source.name(index)).relative_to(images))
        listed.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        parts, _ = ndimage.label(mask)
        for number, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
            part = parts == number
            if part[rows, columns].sum() >= min_pixels:
                annotations.append(_instance(part, len(annotations) + 1, index + 1, 1))
    return {"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def _image_size(path: Path, decoder: Decoder) -> tuple[int, int] | None:
    """Height and width; None where it cannot be decoded, which is reported where all images are looked at."""
    try:
        height, width = decoder(path.read_bytes()).image.shape[1:]
    except (DecodeError, OSError):
        return None
    return int(height), int(width)


def find_damage(images: CocoImages, *, description: str) -> list[Damage | None]:
    """Read every image once, so that what is wrong comes out before any training; None where all is well.

    Raises:
        InputError: An image is of another size than its annotations say.
    """
    found: list[Damage | None] = []
    for index in tracked(range(len(images)), description):
        try:
            images.read(index)
            found.append(None)
        except (DecodeError, OSError) as error:
            found.append(Damage(images.name(index), str(error)))
    return found
