"""What lies where in a shard: found once, and kept in the folder of downloads where the shard came from far away."""

from __future__ import annotations

import gzip
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hardpatch.data.images.decode import EXTENSIONS
from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.runtime.text import as_bytes, as_text

COMPRESSED = (".tar.gz", ".tgz")
ARCHIVES = (".tar", *COMPRESSED)

_BEST_FIRST = (".jpg", ".jpeg", ".webp", ".png", ".tif", ".tiff")
"""Which member is the image where a key has several: photographs before what is laid beside them, such as masks."""


_LONGEST_CHAIN = 40
"""Links from one to the next that are followed, as many as Linux does."""


class DamagedShardError(Exception):
    """A shard that cannot be read to its end; the message is the reason."""


class ShardIndex(NamedTuple):
    """The images of one shard."""

    offsets: np.ndarray
    """Where each begins, bytes."""
    sizes: np.ndarray
    """Bytes of each."""
    keys: Strings
    labels: Labels
    """Negative codes where an image has none."""
    left_out: Sequence[str] = ()
    """Names of members that are called images or labels and are links to what is not there."""

    def save(self, file: Path) -> None:
        """Write it as an ``.npz``."""
        content, ends = self.keys.arrays()
        left_out, left_out_ends = Strings(self.left_out).arrays()
        np.savez(
            file, offsets=self.offsets, sizes=self.sizes, keys=content, ends=ends,
            codes=self.labels.codes, classes=np.frombuffer(as_bytes("\0".join(self.labels.classes)), np.uint8),
            num_classes=len(self.labels.classes), left_out=left_out, left_out_ends=left_out_ends,
        )  # fmt: skip

    @classmethod
    def load(cls, file: Path) -> ShardIndex:
        """What :meth:`save` wrote."""
        with np.load(file, allow_pickle=False) as saved:
            names = as_text(saved["classes"].tobytes()).split("\0") if saved["num_classes"] else []
            keys = Strings.from_arrays(saved["keys"], saved["ends"])
            left_out = Strings.from_arrays(saved["left_out"], saved["left_out_ends"])
            return cls(saved["offsets"], saved["sizes"], keys, Labels(saved["codes"], names), left_out)


class _Found(NamedTuple):
    """A member that is called an image."""

    key: str
    rank: int
    name: str
    offset: int
    size: int


def index_tar(file: BufferedIOBase) -> ShardIndex:
    """List the images of a plain tar file: one per key, as WebDataset names its samples.

    A key is a member's path up to the first dot of its file name, the rest is its kind. Where a key has several
    images, the one of the best kind counts (``x.jpg`` before ``x.png`` before ``x.mask.png``); where it has only
    compound kinds (``photo.1.png``, ``photo.2.png``) each is an image, called so (``photo.1``). A label belongs to the
    image that is called like it up to the last dot (``photo.1.cls``), or else to all of its key. A link is what it
    leads to.

    Raises:
        DamagedShardError: Cut off or damaged, or with an image or a label that is stored in pieces.
    """
    try:
        found, classes, left_out = _listed(file)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DamagedShardError(str(error)) from error
    best: dict[str, int] = {}
    for image in found:
        best[image.key] = min(image.rank, best.get(image.key, image.rank))
    images = [image for image in found if image.rank == best[image.key]]
    alone = Counter(image.key for image in images)
    return ShardIndex(
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
        Strings(image.key.removeprefix("/") if alone[image.key] == 1 else _stem(image.name) for image in images),
        Labels.of(classes.get(_stem(image.name), classes.get(image.key.removeprefix("/"))) for image in images),
        Strings(left_out),
    )


def _listed(file: BufferedIOBase) -> tuple[list[_Found], dict[str, str], list[str]]:
    """Everything that is called an image, the labels by the names up to their endings, and links that lead nowhere."""
    found: list[_Found] = []
    classes: dict[str, str] = {}
    links: dict[str, str] = {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _members(archive):
            is_label = member.name.lower().endswith(".cls")
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            is_image = not base.startswith("._") and f".{kind.lower().rpartition('.')[2]}" in EXTENSIONS
            if not (is_label or is_image):
                continue
            if member.issparse():
                raise tarfile.ReadError(
                    f"{member.name} is stored without its zeros; write the archive without --sparse"
                )
            if not member.isfile():
                links[member.name] = _target(member)
            if is_image:
                found.append(_Found(f"{folder}/{stem}", _rank(kind), member.name, member.offset_data, member.size))
            elif member.isfile():
                classes[_stem(member.name)] = _text(file, member.name, member.offset_data, member.size)
        if any(_rest(archive)):
            raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
    if not links:
        return found, classes, []
    places = _followed(file, links)
    for name in links:
        if name in places and name.lower().endswith(".cls"):
            classes[_stem(name)] = _text(file, name, *places[name])
    found = [image._replace(offset=places[image.name][0], size=places[image.name][1]) if image.name in places else image
             for image in found if image.name in places or image.name not in links]  # fmt: skip
    return found, classes, [name for name in links if name not in places]


def _followed(file: BufferedIOBase, links: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Offset and size of what each link leads to, by way of other links too; nothing for one that leads nowhere."""
    leading = {posixpath.normpath(name): target for name, target in links.items()}
    wanted, there = {*leading.values()}, {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in _members(archive):
            name = posixpath.normpath(member.name)
            if member.isfile() and not member.issparse() and name in wanted:
                there[name] = (member.offset_data, member.size)
            elif not member.isfile() and name in wanted and name not in leading:  # called otherwise than an image
                leading[name] = _target(member)
                wanted.add(leading[name])
    places = {}
    for name, target in links.items():
        for _ in range(_LONGEST_CHAIN):
            if target in there or target not in leading:
                break
            target = leading[target]
        if target in there:
            places[name] = there[target]
    return places


def _target(link: tarfile.TarInfo) -> str:
    """What a link leads to: a hard one by its name in the archive, a symbolic one as seen from its folder."""
    start = "" if link.islnk() else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(start, link.linkname))


def _stem(name: str) -> str:
    """A member's path up to the last dot."""
    return name.rpartition(".")[0]


def _text(file: BufferedIOBase, name: str, offset: int, size: int) -> str:
    """The label that a member holds."""
    file.seek(offset)
    text = as_text(file.read(size)).strip()
    if "\0" in text:
        raise tarfile.ReadError(f"the label {name} is no text")
    return text


def _rank(kind: str) -> int:
    """Smaller: rather the image of its key."""
    plain = f".{kind.lower()}"
    if plain in EXTENSIONS:
        return _BEST_FIRST.index(plain) if plain in _BEST_FIRST else len(_BEST_FIRST)
    return len(_BEST_FIRST) + 1


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files and links of an archive, without keeping what was seen."""
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # or a million members take a gigabyte
        if member.isfile() or member.islnk() or member.issym():
            yield member


def _rest(archive: tarfile.TarFile) -> bytes:
    """The next block after the last member, zeros in a whole archive."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    return archive.fileobj.read(tarfile.BLOCKSIZE)


def unpack(shard: Path, file: BufferedIOBase) -> None:
    """Write the plain tar of a compressed one; its checksum is checked.

    Raises:
        DamagedShardError: Cut off or damaged.
    """
    try:
        with gzip.open(shard) as packed:
            while block := packed.read(1 << 20):
                file.write(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedShardError(str(error)) from error
