"""``hardpatch data pack``: any source as tar shards of images that are small enough to be read quickly.

::

    OUT/images-000000.tar     00000000.jpg, 00000000.cls, ...: keys count the images of the source
    OUT/index.json            {"shards": [{"name", "samples", "bytes", "sha256"}], "images", "damaged", ...}
    OUT/.progress.json        while it is not finished: the shards that are, and where to go on

A shard appears when it is whole: written beside, read back, compared, renamed. What a shard holds depends on the
source and the settings alone, so a run that was killed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from hardpatch.config.commands import PackConfig
from hardpatch.data.images.decode import DecodeError, Decoder
from hardpatch.data.loader.loading import Damage
from hardpatch.data.sources import ShardSource, Source, fingerprint, open_source
from hardpatch.data.sources.shards import LocalShard
from hardpatch.data.tools.describe import find_channels
from hardpatch.data.tools.repack import Packed, repack
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import say, tracked
from hardpatch.runtime.machine import usable_cores
from hardpatch.runtime.signals import ignore_in_worker, signals_held

_BATCH = 8
_BLOCK = 512
_DECIDING = ("size", "quality", "shard_bytes", "channels", "no_data")


class Shard(NamedTuple):
    """A shard that is whole."""

    name: str
    samples: int
    bytes: int
    sha256: str


class PackResult(NamedTuple):
    """What was written."""

    out: str
    shards: list[Shard]
    images: int
    """In the shards."""
    as_they_were: int
    """Of these, byte for byte as in the source."""
    damaged: list[Damage]
    """Left out."""
    bytes: int
    labelled: bool
    channels: int


class _Image(NamedTuple):
    number: int
    packed: Packed | None
    damage: Damage | None


class _Packing(Dataset[_Image]):
    """Every image from ``first`` on, packed."""

    def __init__(self, source: Source, config: PackConfig, decoder: Decoder, first: int) -> None:
        self.source, self.config, self.decoder, self.first = source, config, decoder, first

    def __len__(self) -> int:
        return len(self.source) - self.first

    def __getitem__(self, place: int) -> _Image:
        index = self.first + place
        try:
            packed = repack(
                self.source, index, size=self.config.size, quality=self.config.quality, decoder=self.decoder
            )
        except (DecodeError, OSError) as error:
            return _Image(index, None, Damage(self.source.name(index), str(error)))
        return _Image(index, packed, None)


class _Progress(NamedTuple):
    """What is done."""

    shards: list[Shard]
    next_image: int
    as_they_were: int
    damaged: list[Damage]


def run(config: PackConfig) -> PackResult:
    """Write the shards, or go on where a run before was stopped.

    Raises:
        InputError: The source cannot be opened, the folder is in use for something else, or a shard does not read back.
    """
    source = open_source(config.data, decoder=Decoder(3, no_data=config.no_data))
    channels = config.channels or find_channels(source)
    decoder = Decoder(channels, no_data=config.no_data)
    source = open_source(config.data, decoder=decoder)
    out = Path(config.out).expanduser()
    settings = {name: value for name, value in asdict(config).items() if name in _DECIDING}
    about = {"source": fingerprint(source), "settings": settings}
    if (out / "index.json").is_file():
        say(f"{out} is packed already")
        return _finished(out, about)
    progress = _begun(out, about)
    progress = _write_all(source, config, decoder, out, about, progress)
    packed = _opened(out, progress.shards, decoder) if progress.shards else None
    images = sum(shard.samples for shard in progress.shards)
    if packed is None or len(packed) != images:
        raise InputError(f"data: of {len(source)} images none could be packed" if packed is None else
                         f"out: the shards hold {len(packed)} images and {images} were written")  # fmt: skip
    index = {
        "shards": [shard._asdict() for shard in progress.shards], "images": images,
        "as_they_were": progress.as_they_were, "damaged": [damage._asdict() for damage in progress.damaged],
        "labelled": source.labels is not None, "channels": channels, **about,
    }  # fmt: skip
    write_text_atomically(out / "index.json", json.dumps(index, indent=2) + "\n")
    (out / ".progress.json").unlink(missing_ok=True)
    return _finished(out, about)


def _opened(out: Path, shards: list[Shard], decoder: Decoder) -> Source:
    return ShardSource([LocalShard(out / shard.name, field="out") for shard in shards], decoder=decoder)


def _begun(out: Path, about: dict[str, Any]) -> _Progress:
    """What a run before has done; the folder is made.

    Raises:
        InputError: The folder holds something else, or shards of other images or settings.
    """
    file = out / ".progress.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"out: must be a folder, got the file {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        if there := [path.name for path in out.iterdir()]:
            raise InputError(
                f"out: must be an empty folder or one that hardpatch data pack began, {out} holds {there[0]!r}"
            )
        begun = _Progress([], 0, 0, [])
        _save(out, begun, about)
        return begun
    saved = json.loads(file.read_text())
    _compare(out, saved, about)
    for stale in out.glob("*.part"):
        stale.unlink()
    shards = [Shard(**shard) for shard in saved["shards"]]
    for shard in shards:
        if not (out / shard.name).is_file() or (out / shard.name).stat().st_size != shard.bytes:
            raise InputError(f"out: {out / shard.name} is not what was written; remove the folder and start over")
    say(f"going on with {out} at image {saved['next_image']:,}")
    return _Progress(
        shards, saved["next_image"], saved["as_they_were"], [Damage(**damage) for damage in saved["damaged"]]
    )


def _compare(out: Path, saved: dict[str, Any], about: dict[str, Any]) -> None:
    for key, what in (("source", "other images"), ("settings", "other settings")):
        if saved[key] != about[key]:
            raise InputError(
                f"out: {out} was packed from {what} ({saved[key]}; now {about[key]}); choose another folder"
            )


def _finished(out: Path, about: dict[str, Any]) -> PackResult:
    saved = json.loads((out / "index.json").read_text())
    _compare(out, saved, about)
    shards = [Shard(**shard) for shard in saved["shards"]]
    return PackResult(
        str(out), shards, saved["images"], saved["as_they_were"], [Damage(**damage) for damage in saved["damaged"]],
        sum(shard.bytes for shard in shards), saved["labelled"], saved["channels"],
    )  # fmt: skip


def _write_all(
    source: Source, config: PackConfig, decoder: Decoder, out: Path, about: dict[str, Any], progress: _Progress
) -> _Progress:
    """All shards from where progress stands; it is saved after each."""
    cores = usable_cores()
    loader = DataLoader(
        _Packing(source, config, decoder, progress.next_image), batch_size=_BATCH, collate_fn=_listed,
        num_workers=(cores if cores > 1 else 0) if config.workers is None else config.workers,
        worker_init_fn=ignore_in_worker,
    )  # fmt: skip
    with signals_held():
        read = iter(loader)
    images = (image for some in tracked(read, "packing", total=len(loader), images_per_item=_BATCH) for image in some)
    shard = _Open(out, len(progress.shards))
    for image in images:
        if image.packed is None:
            assert image.damage is not None
            shard.damaged.append(image.damage)
            continue
        label = None if source.labels is None else source.labels[image.number]
        members = shard.members(image.number, image.packed, label)
        if shard.samples and shard.bytes + _size(members) + 2 * _BLOCK > config.shard_bytes:
            progress = _close(shard, progress, image.number, about)
            shard = _Open(out, len(progress.shards))
        shard.add(members, image.packed)
    return _close(shard, progress, len(source), about)


def _listed(items: list[_Image]) -> list[_Image]:
    return items


def _size(members: list[tuple[str, bytes]]) -> int:
    return sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for _, content in members)


class _Open:
    """A shard that is being written."""

    def __init__(self, out: Path, number: int) -> None:
        self.final = out / f"images-{number:06d}.tar"
        self.part = self.final.with_name(self.final.name + ".part")
        self.samples, self.bytes, self.as_they_were = 0, 0, 0
        self.damaged: list[Damage] = []
        self.digests: list[tuple[str, str]] = []
        self._tar = tarfile.open(self.part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  (closed when full)

    def members(self, index: int, packed: Packed, label: str | None) -> list[tuple[str, bytes]]:
        """Names and contents of what an image becomes."""
        made = [(f"{index:08d}.{packed.ending}", packed.content)]
        return made if label is None else [*made, (f"{index:08d}.cls", label.encode())]

    def add(self, members: list[tuple[str, bytes]], packed: Packed) -> None:
        """Write an image."""
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))
            self.digests.append((name, hashlib.sha256(content).hexdigest()))
        self.samples += 1
        self.bytes += _size(members)
        self.as_they_were += packed.as_it_was

    def finish(self) -> Shard:
        """Close it, read it back, compare, and give it its name.

        Raises:
            InputError: What is on the disk is not what was written.
        """
        self._tar.close()
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        if list(_read_back(self.part)) != self.digests:
            raise InputError(f"out: {self.part} does not read back as it was written: the disk is faulty or full")
        shard = Shard(self.final.name, self.samples, self.part.stat().st_size, _digest(self.part))
        self.part.replace(self.final)
        return shard


def _read_back(path: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            yield member.name, hashlib.sha256(content.read()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _close(shard: _Open, progress: _Progress, next_image: int, about: dict[str, Any]) -> _Progress:
    """Progress with a shard that is full; one without images leaves nothing behind but what was damaged."""
    out = shard.final.parent
    if shard.samples:
        shards = [*progress.shards, shard.finish()]
    else:
        shards = progress.shards
        shard.finish()
        shard.final.unlink()
    progress = _Progress(
        shards, next_image, progress.as_they_were + shard.as_they_were, [*progress.damaged, *shard.damaged]
    )
    _save(out, progress, about)
    return progress


def _save(out: Path, progress: _Progress, about: dict[str, Any]) -> None:
    saved = {
        "shards": [shard._asdict() for shard in progress.shards], "next_image": progress.next_image,
        "as_they_were": progress.as_they_were, "damaged": [damage._asdict() for damage in progress.damaged], **about,
    }  # fmt: skip
    write_text_atomically(out / ".progress.json", json.dumps(saved))


def as_json(result: PackResult) -> dict[str, Any]:
    """For the command's last line."""
    return {
        **result._asdict(),
        "shards": [shard._asdict() for shard in result.shards],
        "damaged": [damage._asdict() for damage in result.damaged],
    }
