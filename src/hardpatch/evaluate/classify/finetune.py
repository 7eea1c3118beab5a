"""Fine-tuning: the whole encoder learns to classify, by the published recipe, beside the untrained encoder if asked.

    OUT/config.yaml               the recipe with nothing left open, fingerprints of images and encoder, versions
    OUT/metrics.jsonl             one object per epoch: train_loss, learning_rate, gradient_norm, val_top1, val_top5
    OUT/checkpoints/              everything for exact resume
    OUT/classifier.safetensors    the classifier, timm's names and arguments; hardpatch.load_classifier reads it
    OUT/per_class.csv, OUT/confusion.png, OUT/result.json
    OUT/untrained/                the same from the untrained encoder

As in pre-training nothing random is saved: order and augmentation are functions of the seed, the epoch and the image,
mixing and stochastic depth of the seed and the step, so a run that was killed ends bit-identical (on a CPU).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

from hardpatch.config.config import Config
from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.data.sources import class_indices
from hardpatch.evaluate.classify.accuracy import (
    ClassAccuracy,
    Interval,
    classes_table,
    count_confusions,
    draw_confusions,
    per_class_accuracy,
    wilson_interval,
)
from hardpatch.evaluate.classify.classifier import save_classifier
from hardpatch.evaluate.classify.finetune_settings import FinetuneSettings, differences, resolve_settings
from hardpatch.evaluate.classify.finetune_training import Classified, Finetuning
from hardpatch.evaluate.classify.labelled_images import (
    LabelledImages,
    Subset,
    choose_per_class,
    labelled_fingerprint,
    open_labelled,
)
from hardpatch.evaluate.contenders import (
    Contender,
    Standing,
    folder_name,
    open_contenders,
    open_run,
    standings,
    standings_table,
)
from hardpatch.evaluate.result import Result, command_of, output_folder
from hardpatch.figures.sections import Picture, Section, Tile
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runs.folder import RunFolder, about_this_run
from hardpatch.runs.kinds import CLASSIFIER_FILE
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.files import write_text_atomically
from hardpatch.runtime.log import warn
from hardpatch.runtime.pictures import try_picture
from hardpatch.runtime.signals import stopped_by_signals


class Outcome(NamedTuple):
    """What one fine-tuning came to, after its last epoch: its ``result.json``."""

    top1: float
    top1_interval: Interval
    top5: float
    num_val: int
    per_class: list[ClassAccuracy]
    train_loss: float
    """Mean of the last epoch; with mixing and smoothing it does not go to 0."""
    seconds: float
    """Training time without validation, over interruptions."""
    damaged: int


@dataclass(frozen=True)
class FinetuneResult(Result):
    """Accuracies in percent, after the last epoch."""

    kind = "finetune"
    top1: float
    top1_interval: Interval
    """95 %, Wilson: what another draw of validation images could give; another seed is not in it."""
    top5: float
    untrained_top1: float | None
    """By the same protocol from the untrained encoder; None where it was not asked for."""
    num_train: int
    num_val: int
    num_classes: int
    labels_per_class: int | None
    epochs: int
    steps: int
    batch_size: int
    seconds: float
    train_loss: float
    per_class: list[ClassAccuracy]
    damaged: int
    """Images left out, of both sources."""
    standings: list[Standing]
    """This run first, then those it was held against, each fine-tuned by the same recipe."""
    folder: str
    classifier: str
    """File for :func:`hardpatch.load_classifier`."""

    def kept_in(self, config: FinetuneConfig) -> str:
        """In the run's folder, wherever the classifier lies: its own folder has a ``result.json``."""
        return ""

    def what_next(self, config: FinetuneConfig) -> list[str]:
        """The control, and how to use the classifier."""
        control = [
            "what pre-training gave; costs the same again:",
            f"next:  {command_of('finetune', config, untrained=True)}",
        ]
        return [
            f"look:  {self.folder}/per_class.csv",
            *(control if len(self.standings) == 1 else []),
            "use, in Python:",
            "  import hardpatch, timm",
            f"  model = hardpatch.load_classifier({self.folder!r})    # a plain timm model",
            "  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            '  names = model.pretrained_cfg["label_names"]; names[model(transform(image)[None]).argmax()]',
        ]


def run(config: FinetuneConfig) -> FinetuneResult:
    """``hardpatch evaluate finetune``: accuracy of a classifier that starts from a run's encoder.

    Under ``torchrun`` every process takes a part of each batch and of the validation images, and all return the same.

    Raises:
        InputError: A field, the images, the labels, the checkpoint or the folder breaks a rule.
        Interrupted: A signal stopped it after it was saved; the same call goes on.
    """
    with (
        stopped_by_signals(),
        open_run(config.checkpoint, device=config.device) as loaded,
    ):
        out = output_folder(config, "finetune")
        contenders = open_contenders(loaded, config.against, untrained=config.untrained)
        prepared = [prepare_images(config, loaded.config, contender) for contender in contenders]
        ended = {}
        for contender, (images, settings) in zip(contenders, prepared, strict=True):
            place = out if contender.kind == "run" else out / folder_name(contender.name)
            ended[contender.name] = fine_tune(config, settings, contender, images, place, loaded.device)
    (outcome, _), (images, settings) = ended["this run"], prepared[0]
    control, _ = ended.get("untrained", (None, None))
    return FinetuneResult(
        top1=outcome.top1,
        top1_interval=outcome.top1_interval,
        top5=outcome.top5,
        untrained_top1=control.top1 if control else None,
        num_train=len(images.train),
        num_val=outcome.num_val,
        num_classes=len(images.classes),
        labels_per_class=settings.labels_per_class,
        epochs=settings.epochs,
        steps=settings.total_steps,
        batch_size=settings.batch_size,
        seconds=outcome.seconds,
        train_loss=outcome.train_loss,
        per_class=outcome.per_class,
        damaged=outcome.damaged,
        standings=_standings(contenders, [classified for _, classified in ended.values()], images),
        folder=str(out),
        classifier=str(out / CLASSIFIER_FILE),
    )


def describe(figures: dict[str, Any]) -> Section:
    """Every encoder beside this run, and this run class by class."""
    few = f", {figures['labels_per_class']} of every class" if figures["labels_per_class"] else ""
    against = figures["untrained_top1"]
    return Section(
        "Fine-tuned",
        [
            standings_table(figures["standings"], what="fine-tuned from"),
            classes_table(figures["per_class"]),
            f"{figures['num_train']:,} images of {figures['num_classes']} classes{few}, {figures['epochs']} epochs in "
            f"{figures['seconds'] / 60:.1f} minutes; {figures['num_val']:,} images classified, after the last epoch. "
            "The interval is what another draw of validation images could give; another seed is not in it.",
            Picture(f"{figures['folder']}/confusion.png", "confusion: what is taken for what"),
        ],
        Tile(
            f"{figures['top1']:.1f} %",
            "fine-tuned top-1",
            f"{figures['num_val']:,} images" if against is None else f"untrained {against:.1f} %",
        ),
    )


def _standings(
    contenders: Sequence[Contender], classified: Sequence[Classified], images: LabelledImages
) -> list[Standing]:
    """The table of all, from the ranks of each on the images that all could read."""
    labels = class_indices([(images.val.labels or ())[i] for i in classified[0].indices], images.classes)
    scores = []
    for found in classified:
        places = torch.arange(found.ranked.shape[1], 0, -1, dtype=torch.float32).expand(len(found.ranked), -1)
        scores.append(torch.zeros(len(labels), len(images.classes)).scatter(1, found.ranked, places))
    return standings(contenders, scores, torch.from_numpy(labels))


def prepare_images(
    config: FinetuneConfig, run_config: Config, contender: Contender
) -> tuple[LabelledImages, FinetuneSettings]:
    """Open and check the images, and fill in the settings for them and for an encoder.

    Raises:
        InputError: Names the field, the rule and the value.
    """
    data = run_config.data
    images = open_labelled(config.train, config.val, run_config, size=contender.size)
    if config.labels_per_class is not None:
        chosen = choose_per_class(images.train.labels or (), config.labels_per_class, seed=config.seed)
        images = images._replace(train=Subset(images.train, chosen))
    return images, resolve_settings(
        config, num_images=len(images.train), size=contender.size, channels=data.channels, deep=bool(data.value_range),
        width=contender.encoder.embed_dim, flip=data.flip, num_processes=distributed.world_size(),
    )  # fmt: skip


def fine_tune(
    config: FinetuneConfig,
    settings: FinetuneSettings,
    contender: Contender,
    images: LabelledImages,
    out: Path,
    device: torch.device,
) -> tuple[Outcome, Classified]:
    """Fine-tune one encoder in a folder of its own: start or go on, train, measure, save.

    Raises:
        InputError: The folder holds something else, the loss is not finite, or too many images are damaged.
        Interrupted: A signal arrived; the run is saved.
    """
    folder = RunFolder(out)
    decisive = {
        **json.loads(json.dumps(asdict(settings))),  # as YAML will give them back: lists for tuples
        "train": labelled_fingerprint(images.train),
        "val": labelled_fingerprint(images.val),
        "encoder": _weights_digest(contender.encoder),
    }
    distributed.require_same(decisive)
    is_written = check_folder(folder, decisive, restart=config.resume == "restart")
    distributed.barrier()  # before any process makes anything there
    try:
        if distributed.is_main():
            folder.claim()
            if config.resume == "restart":
                clear(folder)
            if not (is_written and folder.config_file.is_file()):
                about = {**about_this_run(device), "checkpoint": config.checkpoint}
                text = yaml.safe_dump({"finetune": decisive, "about": about}, sort_keys=False, default_flow_style=None)
                write_text_atomically(folder.config_file, text)
        distributed.barrier()
        distributed.warn_of_emulated_bf16(config.precision, device)
        training = Finetuning(settings, config, contender, images, folder, device, decisive)
        training.resume()
        try:
            training.run()
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"micro_batch_size: the device's memory is too small for {settings.micro_batch_size} images at once; "
                f"give a smaller one ({str(error).splitlines()[0]})"
            ) from None
        classified = training.classified or training.classify()
        return conclude(training, classified, folder), classified
    finally:
        folder.release()


def conclude(training: Finetuning, classified: Classified, folder: RunFolder) -> Outcome:
    """Figures after the last epoch, and the files that go with them."""
    classes, val = training.images.classes, training.images.val
    labels = class_indices([(val.labels or ())[i] for i in classified.indices], classes)
    confusions = count_confusions(classified.ranked[:, 0].numpy(), labels, len(classes))
    outcome = Outcome(
        top1=classified.top1,
        top1_interval=wilson_interval(int(confusions.trace()), len(labels)),
        top5=classified.top5,
        num_val=len(labels),
        per_class=per_class_accuracy(confusions, classes),
        train_loss=training.last_loss,
        seconds=training.seconds,
        damaged=len(classified.damaged) + len(training.damaged),
    )
    if distributed.is_main():
        save_classifier(folder.path / CLASSIFIER_FILE, training.model, training.contender.arguments, classes)
        table = io.StringIO()
        csv.writer(table).writerows([ClassAccuracy._fields, *outcome.per_class])
        write_text_atomically(folder.path / "per_class.csv", table.getvalue())
        write_text_atomically(folder.result_file, json.dumps(outcome._asdict(), indent=2) + "\n")
        title = f"{folder.path.name}: top-1 {outcome.top1:.1f} % of {outcome.num_val:,} images"
        picture = folder.path / "confusion.png"
        try_picture(lambda: draw_confusions(confusions, classes, title=title), picture, dpi=130)
    return outcome


def check_folder(folder: RunFolder, settings: dict[str, Any], *, restart: bool) -> bool:
    """Can a fine-tuning with these settings start or go on here?

    Returns:
        Does ``config.yaml`` say so already? Where it is damaged, the checkpoints say what the training is.

    Raises:
        InputError: The folder holds other things, or a fine-tuning with other settings.
    """
    path, checkpoints = folder.path, CheckpointFolder(folder.checkpoints, holds="model")
    if not folder.config_file.is_file() and not checkpoints.steps():
        if path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise InputError(f"out: {str(path)!r} is not empty and holds no fine-tuning; choose a new folder")
        return False
    try:
        before: dict[str, Any] | None = dict(yaml.safe_load(folder.config_file.read_text())["finetune"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        before = None
    if before is not None and (restart or not differences(before, settings)):
        return not restart
    try:
        trained = ((checkpoints.load_latest() if checkpoints.steps() else None) or {}).get("decisive", before)
    except InputError:  # of something else, or damaged
        trained = before
    if trained is None:
        raise InputError(
            f"out: {str(path)!r} holds no fine-tuning but something else, or its {folder.config_file.name} is damaged; "
            "choose a new folder"
        )
    if restart:
        return False
    if changed := differences(trained, settings):
        raise InputError(
            f"out: {str(path)!r} holds a fine-tuning with other settings; choose another folder with --out, or start "
            "over with --resume restart. Changed:\n  " + "\n  ".join(changed)
        )
    warn(f"{folder.config_file} does not say what its checkpoints say: it is damaged, and written anew")
    return False


def clear(folder: RunFolder) -> None:
    """Forget the fine-tuning in this folder, so that another can start."""
    names = ("config.yaml", "metrics.jsonl", "result.json", "per_class.csv", "confusion.png", CLASSIFIER_FILE)
    stale = [folder.path / name for name in names]
    for pattern in ("checkpoints/step_*.pt*", "checkpoints/last", "events/*"):
        stale += folder.path.glob(pattern)
    for file in stale:
        file.unlink(missing_ok=True)


def _weights_digest(encoder: VisionTransformer) -> str:
    """Twelve digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
