"""``hardpatch data pack``: any source as tar shards of images that are small enough to be read quickly.

::

    OUT/images-000000.tar     00000000.jpg, 00000000.cls, ...: keys count the images of the source
    OUT/index.json            {"shards": [{"name", "samples", "bytes", "sha256"}], "images", "damaged", ...}
    OUT/.progress.json        while it is not finished: the shards that are, and where to go on

A shard appears when it is whole: written beside, read back, compared, renamed. What a shard holds depends on the
source and the settings alone, so a run that was killed ends with the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from hardpatch.config.commands import PackConfig
from hardpatch.data.images.decode import DecodeError, Decoder
from hardpatch.data.loader.loading import Damage
from hardpatch.data.sources import ShardSource, Source, fingerprint, open_source
from hardpatch.data.sources.shards import LocalShard
from hardpatch.data.sources.tiles import TiledSource
from hardpatch.data.tools.describe import find_channels, say_what_is_left
from hardpatch.data.tools.repack import Packed, repack
from hardpatch.runtime.claim import CLAIM, Claim
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import read_object, say, tracked, warn
from hardpatch.runtime.machine import usable_cores
from hardpatch.runtime.outputs import MARK
from hardpatch.runtime.signals import ignore_in_worker, signals_held
from hardpatch.runtime.text import as_bytes

_BATCH = 8
_BLOCK = 512
_DECIDING = ("size", "quality", "shard_bytes", "channels", "no_data")
_ALSO_DECIDING = ("tile", "overlap")
"""Where they are given: folders of versions before know nothing of them."""

PROGRESS = ".progress.json"
"""What an unfinished packing has done so far."""


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


class _Packing(Dataset[tuple[int, Packed | Damage]]):
    """Every image from ``first`` on with its number, packed."""

    def __init__(self, source: Source, config: PackConfig, decoder: Decoder, first: int) -> None:
        self.source, self.config, self.decoder, self.first = source, config, decoder, first

    def __len__(self) -> int:
        return len(self.source) - self.first

    def __getitem__(self, place: int) -> tuple[int, Packed | Damage]:
        index, config = self.first + place, self.config
        try:
            return index, repack(self.source, index, size=config.size, quality=config.quality, decoder=self.decoder)
        except (DecodeError, OSError) as error:
            return index, Damage(self.source.name(index), str(error))


def run(config: PackConfig) -> PackResult:
    """Write the shards, or go on where a run before was stopped.

    Raises:
        InputError: The source cannot be opened, the folder is in use for something else, or a shard does not read back.
    """
    source = open_source(config.data, decoder=Decoder(3, no_data=config.no_data))
    say_what_is_left(source)
    channels = config.channels or find_channels(source)
    decoder = Decoder(channels, no_data=config.no_data)
    source = open_source(config.data, decoder=decoder)
    if config.tile is not None:
        if config.overlap >= config.tile:
            raise InputError(f"overlap: must be smaller than the tile of {config.tile}, got {config.overlap}")
        source = TiledSource(source, tile=config.tile, overlap=config.overlap, decoder=decoder)
        config = replace(config, size=config.tile)
    out = Path(config.out).expanduser()
    deciding = _DECIDING if config.tile is None else (*_DECIDING, *_ALSO_DECIDING)
    settings = {name: value for name, value in asdict(config).items() if name in deciding}
    about = {"source": fingerprint(source), "settings": settings}
    if (out / "index.json").is_file():
        index = _saved(out / "index.json", about)
        if index is None:
            raise InputError(f"out: {str(out / 'index.json')!r} is damaged; remove the folder and start over")
        _check_shards(out, index)
        say(f"{out} is packed already")
        return _result(out, index)
    try:
        _check_place(out)
        claim = Claim(out)
        try:
            progress = _begun(out, about)
            _write_all(source, config, decoder, out, progress)
        finally:
            claim.release()
    except OSError as error:  # those of the source are damaged images
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"out: cannot write in {str(out)!r}: {error.strerror or error}") from error
    if not progress["shards"]:
        raise InputError(f"data: of {len(source)} images none could be packed")
    images = sum(shard["samples"] for shard in progress["shards"])
    shards = [LocalShard(out / shard["name"], field="out") for shard in progress["shards"]]
    if (found := len(ShardSource(shards, decoder=decoder))) != images:
        raise InputError(f"out: the shards hold {found} images and {images} were written")
    del progress["next_image"]
    index = {**progress, "images": images, "labelled": source.labels is not None, "channels": channels}
    _save(out / "index.json", index)
    (out / PROGRESS).unlink(missing_ok=True)
    return _result(out, index)


def _check_place(out: Path) -> None:
    """Is the folder empty, or did we begin to pack there?

    Raises:
        InputError: Neither.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"out: must be a folder, got the file {str(out)!r}")
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if PROGRESS not in names and (others := [name for name in names if name not in (MARK, CLAIM)]):
        raise InputError(
            f"out: must be an empty folder or one that hardpatch data pack began, {out} holds {others[0]!r}"
        )


def _begun(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What a run before has done.

    Raises:
        InputError: The folder holds shards of other images or settings.
    """
    file = out / PROGRESS
    progress = _saved(file, about)
    if progress is None:  # none, or a damaged one: what is packed again comes out the same
        progress = {"shards": [], "next_image": 0, "as_they_were": 0, "damaged": [], **about}
        _save(file, progress)
        return progress
    for stale in out.glob("*.part"):
        stale.unlink()
    _check_shards(out, progress)
    say(f"going on with {out} at image {progress['next_image']:,}")
    return progress


def _check_shards(out: Path, progress: dict[str, Any]) -> None:
    """Are all shards there, byte for byte as they were written? A fraction of what packing them took.

    Raises:
        InputError: One is not.
    """
    for shard in tracked(progress["shards"], "verifying shards"):
        path = out / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"] or _digest(path) != shard["sha256"]:
            raise InputError(f"out: {path} is not what was written; remove the folder and start over")


def _save(file: Path, content: dict[str, Any]) -> None:
    """Write what is packed, with a checksum of it."""
    write_text_atomically(file, json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n")


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _saved(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """What a file of a run before says; None where there is none, or it is damaged.

    Raises:
        InputError: It packed other images, or with other settings.
    """
    saved = read_object(file)
    if saved is None:
        return None
    checksum = saved.pop("checksum", None)  # version 0.1 wrote none
    if checksum is not None and checksum != _checksum(saved):
        warn(f"{file} is damaged and not used: its checksum is another")
        return None
    for key, what in (("source", "images"), ("settings", "settings")):
        if saved[key] != about[key]:
            differ = f"{saved[key]}; now {about[key]}"
            raise InputError(f"out: {file.parent} was packed from other {what} ({differ}); choose another folder")
    return saved


def _result(out: Path, index: dict[str, Any]) -> PackResult:
    shards = [Shard(**shard) for shard in index["shards"]]
    return PackResult(
        str(out), shards, index["images"], index["as_they_were"], [Damage(**damage) for damage in index["damaged"]],
        sum(shard.bytes for shard in shards), index["labelled"], index["channels"],
    )  # fmt: skip


def _write_all(source: Source, config: PackConfig, decoder: Decoder, out: Path, progress: dict[str, Any]) -> None:
    """All shards from where progress stands; it is saved after each."""
    cores = usable_cores()
    loader = DataLoader(
        _Packing(source, config, decoder, progress["next_image"]), batch_size=_BATCH, collate_fn=list,
        num_workers=(cores if cores > 1 else 0) if config.workers is None else config.workers,
        worker_init_fn=ignore_in_worker,
    )  # fmt: skip
    with signals_held():
        read = iter(loader)
    shard, damaged = _OpenShard(out, len(progress["shards"])), []
    for some in tracked(read, "packing", total=len(loader), images_per_item=_BATCH):
        for number, packed in some:
            if isinstance(packed, Damage):
                damaged.append(packed._asdict())
                continue
            members = [(f"{number:08d}.{packed.ending}", packed.content)]
            if source.labels is not None:
                members.append((f"{number:08d}.cls", as_bytes(source.labels[number])))
            if shard.samples and shard.bytes + _size(members) + 2 * _BLOCK > config.shard_bytes:
                _close(shard, progress, number, damaged)
                shard, damaged = _OpenShard(out, len(progress["shards"])), []
            shard.add(members, packed.as_it_was)
    _close(shard, progress, len(source), damaged)


def _size(members: list[tuple[str, bytes]]) -> int:
    """Bytes that they take in a shard."""
    return sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for _, content in members)


class _OpenShard:
    """A shard that is being written.

    Args:
        out: Folder of the shards.
        number: Which it is, from 0.
    """

    def __init__(self, out: Path, number: int) -> None:
        self.final = out / f"images-{number:06d}.tar"
        self.part = self.final.with_name(self.final.name + ".part")
        self.samples, self.bytes, self.as_they_were = 0, 0, 0
        self._file, self._written = self.part.open("wb"), hashlib.sha256()
        self._tar = tarfile.open(fileobj=self, mode="w|", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115

    def write(self, content: bytes) -> int:
        """What the tar file is written by."""
        self._written.update(content)
        return self._file.write(content)

    def add(self, members: list[tuple[str, bytes]], as_it_was: bool) -> None:
        """Write an image and what belongs to it, by their names."""
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            self._tar.addfile(entry, io.BytesIO(content))
        self.samples += 1
        self.bytes += _size(members)
        self.as_they_were += as_it_was

    def finish(self) -> Shard:
        """Close it, read it back, compare, and give it its name.

        Raises:
            InputError: What is on the disk is not what was written.
        """
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if _digest(self.part) != self._written.hexdigest():
            raise InputError(f"out: {self.part} does not read back as it was written: the disk is faulty or full")
        self.part.replace(self.final)
        return Shard(self.final.name, self.samples, self.final.stat().st_size, self._written.hexdigest())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _close(shard: _OpenShard, progress: dict[str, Any], next_image: int, damaged: list[dict[str, str]]) -> None:
    """Add a shard that is full to the progress; one without images leaves nothing behind but what was damaged."""
    finished = shard.finish()
    if shard.samples:
        progress["shards"].append(finished._asdict())
    else:
        shard.final.unlink()
    progress["next_image"] = next_image
    progress["as_they_were"] += shard.as_they_were
    progress["damaged"] += damaged
    _save(shard.final.parent / PROGRESS, progress)


def as_json(result: PackResult) -> dict[str, Any]:
    """For the command's last line."""
    return {
        **result._asdict(),
        "shards": [shard._asdict() for shard in result.shards],
        "damaged": [damage._asdict() for damage in result.damaged],
    }
