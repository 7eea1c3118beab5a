"""``hardpatch embed``: a table of features, and of difficulty where asked for, with a row per image of a source.

Images come in the source's order, whole and unaugmented; a damaged one is named and has no row. The work is cut into
parts (:mod:`hardpatch.embed.chunks`), shared by the processes of ``torchrun``, and joined by the main one at the end.

Columns, a row per readable image; N patches, D width::

    position                number in the source, from 0; path and label beside it
    class_token (D)         of the last layer, normalised as the encoder does
    patch_mean (D)          mean of the patch tokens
    patch_tokens (N, D)     all of them, in image order
    difficulty              mean of reconstruction_error: comparable between images
    contrast                standard deviation of the pixels within a patch, root mean square over patches, in 0..1
    reconstruction_error    (rows, columns): the student's loss on each patch, averaged over masks
    predicted_loss          (rows, columns): the teacher's scores, comparable within an image only
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from hardpatch.config.commands import EmbedConfig
from hardpatch.data.loader.loading import Cover, Damage, OrderedBatch, ordered_batches
from hardpatch.data.sources import Source, fingerprint, open_source
from hardpatch.data.tools.describe import say_what_is_left
from hardpatch.embed.chunks import Part, Parts
from hardpatch.embed.difficulty import mask_order, measure_difficulty, rank_agreement
from hardpatch.embed.sheet import Ranked, draw_sheet, ends
from hardpatch.embed.tables import Table, write_npz, write_parquet
from hardpatch.evaluate.features import none_readable, report_damage
from hardpatch.figures.display import build_display
from hardpatch.method.vit import encode, grid_size
from hardpatch.runs.build import build_decoder, build_downloads, choose_attention
from hardpatch.runs.load import LoadedRun
from hardpatch.runtime.distributed import (
    barrier,
    choose_device,
    from_main,
    has_bf16,
    process_group,
    rank,
    require_same,
    world_size,
)
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_atomically
from hardpatch.runtime.log import say, tracked, warn
from hardpatch.runtime.outputs import note_output
from hardpatch.runtime.pictures import try_picture

PART_BYTES = 64 * 2**20
"""A part of the work holds about so much, and at most so many images:"""
PART_IMAGES = 4096


class Embedded(NamedTuple):
    """What was written."""

    out: str
    images: int
    """Rows."""
    damaged: int
    """Images left out."""
    columns: dict[str, tuple[int, ...]]
    """Shape of one image's entry, by column."""
    bytes: int
    seconds: float
    """Seconds of this call; a call that went on with another's parts took so much longer."""
    images_per_second: float
    """Rate over the images of this call."""
    contact_sheet: str | None
    easiest: list[Ranked]
    """Ends of the ranking; empty without difficulty."""
    hardest: list[Ranked]
    difficulty_contrast_correlation: float | None
    """Spearman, over images: near 1 or -1, difficulty says no more than contrast."""


@dataclass(frozen=True)
class Job:
    """What is computed of each image, and in which parts."""

    run: LoadedRun
    source: Source
    config: EmbedConfig
    parts: list[range]
    """Positions in the source, by part; all but the last are whole batches."""
    settings: dict[str, Any]
    """Everything that decides the table."""


def run(config: EmbedConfig) -> Embedded:
    """Embed a source; under ``torchrun`` every process takes a share, and all return the same.

    Raises:
        InputError: A setting or a source that is wrong, another job in the same place, or too many damaged images.
    """
    device = choose_device(config.device)
    with process_group(device):
        return _run(config, device)


def _run(config: EmbedConfig, device: torch.device) -> Embedded:
    started = time.monotonic()
    out, sheet = _check(config)
    loaded = LoadedRun(config.checkpoint, device=device)
    data = loaded.config.data
    if config.features in ("class", "both") and not loaded.student.encoder.has_class_token:
        raise InputError(f"features: {config.features!r} needs a class token, and this encoder has none; use mean")
    if config.precision == "bf16" and not has_bf16(device):
        raise InputError(f"precision: this device ({device.type}) has no bf16; use float32")
    source = open_source(
        config.data, decoder=build_decoder(data), image_size=data.size, downloads=build_downloads(loaded.config)
    )
    say_what_is_left(source)
    for model in (loaded.student, loaded.teacher):
        choose_attention(model, device, bf16=config.precision == "bf16")
    bytes_per_image = _bytes_per_image(loaded, config)
    part_images = max(1, min(PART_IMAGES, PART_BYTES // bytes_per_image) // config.batch_size) * config.batch_size
    cuts = [range(first, min(len(source), first + part_images)) for first in range(0, len(source), part_images)]
    job = Job(loaded, source, config, cuts, _settings(loaded, source, config, part_images))
    require_same(job.settings)
    parts = Parts(out.with_name(out.name + ".parts"))

    def begin() -> list[int]:
        parts.begin(job.settings)
        _check(config)  # another process may have ended just now
        for leftover in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed while it joined
            leftover.unlink(missing_ok=True)
        done = [number for number in range(len(cuts)) if parts.is_done(number)]
        _check_space(out, bytes_per_image * (2 * len(source) - len(done) * part_images))
        return done

    if config.hardness and not loaded.student.predicts_hardness:
        warn("this run has no loss predictor: no column predicted_loss")
    try:
        done = from_main(begin)
        if done:
            say(f"going on: {len(done)} of {len(cuts)} parts are there")
        todo = [number for number in range(len(cuts)) if number not in set(done)]
        _work(job, parts, todo[rank() :: world_size()])
        barrier()
        new_images = sum(len(cuts[number]) for number in todo)
        return from_main(lambda: _join(job, parts, out=out, sheet=sheet, started=started, new_images=new_images))
    finally:
        parts.release()


def _check(config: EmbedConfig) -> tuple[Path, Path | None]:
    """Paths of the table and the sheet, after everything that can be wrong before a checkpoint is read.

    Raises:
        InputError: A setting is out of range, or something is in the way.
    """
    out = Path(config.out).expanduser()
    if out.suffix not in (".parquet", ".npz"):
        raise InputError(f"out: must end in .parquet or .npz, got {str(out)!r}")
    sheet = Path(config.contact_sheet).expanduser() if config.contact_sheet else None
    if sheet is not None and not config.hardness:
        raise InputError("contact_sheet: shows images by difficulty; add --hardness")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise InputError(f"contact_sheet: must end in .png, got {config.contact_sheet!r}")
    for name, path in (("out", out), ("contact_sheet", sheet)):
        if path is not None and (path.exists() or path.is_symlink()):
            raise InputError(f"{name}: {str(path)!r} exists; name another one, or remove it")
    return out, sheet


def _bytes_per_image(run: LoadedRun, config: EmbedConfig) -> int:
    """Bytes of an image's row in the table, names apart."""
    rows, columns = grid_size(run.student.encoder)
    vectors = {"class": 1, "mean": 1, "both": 2, "tokens": rows * columns}[config.features]
    difficulty = 4 * (2 + 2 * rows * columns) if config.hardness else 0
    width = int(run.student.encoder.embed_dim)
    return 8 + vectors * width * np.dtype(config.dtype).itemsize + difficulty


def _check_space(out: Path, needed: int) -> None:
    """Refuse what cannot fit: parts and the joined table are there side by side for a while.

    Raises:
        InputError: The disk is too small.
    """
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(
            f"out: needs {needed / 1e9:.1f} GB in {str(out.parent)!r} (the parts, then the table), and "
            f"{free / 1e9:.1f} GB are free; store less (features, dtype) or choose another place"
        )


def _settings(run: LoadedRun, source: Source, config: EmbedConfig, part_images: int) -> dict[str, Any]:
    """Everything that decides the table: a job with another value here is another job."""
    models = [run.student, run.teacher] if config.hardness else [run.student.encoder]
    return {
        "weights": _digest(models),
        "step": run.step,
        "images": fingerprint(source),
        "image_size": list(run.config.data.size),
        "features": config.features,
        "dtype": config.dtype,
        "precision": config.precision,
        "hardness": config.hardness,
        "seed": config.seed if config.hardness else None,
        "batch_size": config.batch_size,
        "part_images": part_images,
    }


def _digest(models: Sequence[nn.Module]) -> str:
    """A checksum of weights."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _work(job: Job, parts: Parts, todo: Sequence[int]) -> None:
    """Compute parts, one after the other, and keep each as soon as it is finished.

    Raises:
        InputError: Too many images are damaged already.
    """
    config = job.config
    describe = _describer(job)
    indices = [index for number in todo for index in job.parts[number]]
    batches = ordered_batches(
        job.source, size=job.run.config.data.size, indices=indices, batch_size=config.batch_size, workers=config.workers
    )
    # One pass over all parts, so that data workers live through it; a part ends where its last batch does, for all but
    # the source's last are whole numbers of batches.
    total = -(-len(indices) // config.batch_size)
    bar = tracked(batches, "embed", total=total, images_per_item=config.batch_size * world_size())
    all_damaged: list[Damage] = []
    for number in todo:
        rows: list[dict[str, np.ndarray]] = []
        damaged: list[Damage] = []
        for _ in range(-(-len(job.parts[number]) // config.batch_size)):
            batch = next(bar)
            damaged += batch.damaged
            if batch.indices:
                rows.append(describe(batch))
        columns = {name: np.concatenate([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        parts.write(number, Part(columns or {"position": np.empty(0, np.int64)}, damaged))
        all_damaged += damaged
        if len(all_damaged) > config.max_damaged * len(job.source):  # no need to read the rest
            report_damage({"data": (all_damaged, len(job.source))}, max_damaged=config.max_damaged)
    for _ in bar:  # let the bar end
        pass


def _describer(job: Job) -> Callable[[OrderedBatch], dict[str, np.ndarray]]:
    """What turns a batch of images into columns, a row per image."""
    run, config = job.run, job.config
    vit, grid, bf16 = run.student.encoder, grid_size(run.student.encoder), config.precision == "bf16"
    order = mask_order(config.seed, grid[0] * grid[1])

    def stored(values: Tensor) -> np.ndarray:
        with np.errstate(over="ignore"):
            array: np.ndarray = values.float().cpu().numpy().astype(config.dtype)
        if not np.isfinite(array).all():
            raise InputError(f"dtype: a feature does not fit into {config.dtype}, or is not finite at all")
        return array

    def per_patch(values: Tensor) -> np.ndarray:
        return np.asarray(values.float().unflatten(1, grid).cpu().numpy())

    @torch.no_grad()
    def describe(batch: OrderedBatch) -> dict[str, np.ndarray]:
        images = batch.images.to(run.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            tokens = encode(vit, run.normalise(images)).float()
        patches = tokens[:, vit.num_prefix_tokens :]
        columns = {"position": np.array(batch.indices, dtype=np.int64)}
        if config.features in ("class", "both"):
            columns["class_token"] = stored(tokens[:, 0])
        if config.features in ("mean", "both"):
            columns["patch_mean"] = stored(patches.mean(dim=1))
        if config.features == "tokens":
            columns["patch_tokens"] = stored(patches)
        if config.hardness:
            found = measure_difficulty(run, images, order, bf16=bf16, valid=batch.valid)
            columns["difficulty"] = found.difficulty.float().cpu().numpy()
            columns["contrast"] = found.contrast.float().cpu().numpy()
            columns["reconstruction_error"] = per_patch(found.reconstruction_error)
            if found.predicted_loss is not None:
                columns["predicted_loss"] = per_patch(found.predicted_loss)
        return columns

    return describe


def _join(job: Job, parts: Parts, *, out: Path, sheet: Path | None, started: float, new_images: int) -> Embedded:
    """All parts to one file, the sheet, and the parts' end.

    Raises:
        InputError: Too many damaged images, or something cannot be written.
    """
    source, config = job.source, job.config
    contents = [parts.column(number, "damaged") for number in range(len(job.parts))]
    damaged = [Damage(*item) for content in contents for item in json.loads(str(content))]
    if len(damaged) == len(source):
        raise none_readable(damaged)
    num_damaged = report_damage({"data": (damaged, len(source))}, max_damaged=config.max_damaged)

    names = [source.name(index) for index in range(len(source))]
    about = {"checkpoint": config.checkpoint, "data": config.data, **job.settings}
    filled = [number for number in range(len(job.parts)) if len(parts.column(number, "position"))]
    table = Table(parts, filled, names, source.labels, about)
    write = write_parquet if out.suffix == ".parquet" else write_npz
    write_atomically(out, lambda temporary: write(table, temporary))
    note_output(out, source=config.data)
    agreement = None
    easiest: list[Ranked] = []
    hardest: list[Ranked] = []
    if config.hardness:
        difficulty = table.column("difficulty")
        easiest, hardest = ends(difficulty, table.column("position").tolist(), names, config.sheet_images)
        agreement = rank_agreement(difficulty, table.column("contrast"))
        if sheet is not None and not try_picture(
            lambda: _draw_sheet(job, easiest, hardest, difficulty), sheet, source=config.data
        ):
            sheet = None
    shapes = {name: column.shape[1:] for name, column in parts.read(filled[0]).columns.items() if name != "position"}
    shutil.rmtree(parts.path, ignore_errors=True)
    seconds = time.monotonic() - started
    return Embedded(
        out=config.out,
        images=len(source) - len(damaged),
        damaged=num_damaged,
        columns=shapes,
        bytes=out.stat().st_size,
        seconds=seconds,
        images_per_second=new_images / seconds,
        contact_sheet=None if sheet is None else str(sheet),
        easiest=easiest,
        hardest=hardest,
        difficulty_contrast_correlation=agreement,
    )


def _draw_sheet(
    job: Job, easiest: Sequence[Ranked], hardest: Sequence[Ranked], difficulty: Float[np.ndarray, " n"]
) -> Figure:
    """Both ends of the ranking as a picture."""
    config = job.run.config
    name = Path(job.config.checkpoint).name
    title = f"{len(difficulty):,} images by difficulty; {name}, target {config.method.target}"
    cover = Cover(config.data.size)
    some = [cover(job.source.read(item.position).image) for end in (easiest, hardest) for item in end[:8]]
    display = build_display(config, some)
    return draw_sheet(job.source, easiest, hardest, difficulty, display=display, size=config.data.size, title=title)


def as_json(result: Embedded) -> dict[str, Any]:
    """The result as plain values."""
    ends = {name: [item._asdict() for item in getattr(result, name)] for name in ("easiest", "hardest")}
    return result._asdict() | ends
