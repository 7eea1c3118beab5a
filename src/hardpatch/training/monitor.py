"""What is looked at with every checkpoint: hardness figures of fixed images, kNN accuracy, foreground AUROC."""

from __future__ import annotations

import torch

from hardpatch.config.config import Config
from hardpatch.data.loader.loading import default_workers
from hardpatch.data.sources import Source, class_indices, open_source
from hardpatch.evaluate.classify.knn import knn_right
from hardpatch.evaluate.classify.labelled_images import LabelledImages, Subset, without_labels
from hardpatch.evaluate.features import split_features
from hardpatch.evaluate.foreground import predicted_loss_auroc
from hardpatch.figures.display import build_display
from hardpatch.figures.hardness import draw_hardness, measure_hardness, spread_images, told_correlation
from hardpatch.method.student import Student, Teacher
from hardpatch.method.vit import grid_size
from hardpatch.runs.build import build_decoder, build_downloads, build_normalise
from hardpatch.runtime import distributed
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import warn
from hardpatch.runtime.pictures import try_picture
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.training.state import Run

NEIGHBOURS = 20
"""k of the kNN accuracy during training."""


def labelled_validation(config: Config) -> Source | None:
    """The labelled validation images, if the config names some."""
    if not config.run.val:
        return None
    source = open_source(
        config.run.val, decoder=build_decoder(config.data), image_size=config.data.size, field="val",
        downloads=build_downloads(config),
    )  # fmt: skip
    if source.labels is None:
        raise InputError(without_labels(source, config.run.val, "val"))
    return source


class Watcher:
    """Looks at the model from outside, without touching its randomness.

    Args:
        run: The run.
        val: Labelled validation images, if there are any.
    """

    def __init__(self, run: Run, val: Source | None) -> None:
        self.run = run
        self.val = val
        self.normalise = build_normalise(run.config).to(run.device)
        self.split = self._labelled_split() if run.config.run.knn else None
        if val is not None and run.config.run.knn and self.split is None:
            warn(
                "no kNN accuracy during training: it needs labels on the training images too, and more than 20 of them"
            )
        shown = val or run.source
        self.images = spread_images(shown, run.config.run.num_figure_images, run.config.data.size)

    def _labelled_split(self) -> LabelledImages | None:
        """Neighbours from the training images; queries from the validation images, or from held-back labels."""
        source, limit = self.run.source, self.run.config.run.knn_images
        if source.labels is None or len(set(source.labels)) < 2:
            return None
        generator = torch.Generator().manual_seed(derive_seed(0, Stream.FIGURES))
        order = torch.randperm(len(source), generator=generator)[: limit + limit // 2].tolist()
        if self.val is not None:
            classes = sorted(set(source.labels))
            class_indices(self.val.labels or [], classes)
            queries = torch.randperm(len(self.val), generator=generator)[: limit // 2].tolist()
            neighbours = order[:limit]
            val = self.val
        else:
            # Without validation images a third of the sample is classified by the rest. The model has seen these
            # images, never their labels.
            third = len(order) // 3
            queries, neighbours, val = order[:third], order[third:], source
        if len(neighbours) < NEIGHBOURS or not queries:
            return None
        return LabelledImages(
            Subset(source, sorted(neighbours)), Subset(val, sorted(queries)), sorted(set(source.labels))
        )

    def watch(self, step: int) -> dict[str, float]:
        """Draw the figures of this step and return what was measured."""
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes: not worth a compilation
            return self._watch(step)

    def _watch(self, step: int) -> dict[str, float]:
        run = self.run
        metrics: dict[str, float] = {}
        if self.split is None and not run.config.run.figures:
            return metrics
        model = run.state.whole(run.config)
        student, teacher = model.student, model.teacher
        if self.split is not None:
            features = split_features(
                student.encoder, self.split, self.normalise, size=run.config.data.size, pooling="mean",
                device=run.device, bf16=run.bf16,
                workers=default_workers() if run.config.run.workers is None else run.config.run.workers,
            )  # fmt: skip
            right = knn_right(features, self.split, k=NEIGHBOURS)
            metrics["knn_top1"] = 100 * float(right.double().mean())
            if distributed.is_main() and step in (0, run.schedule.total_steps):
                run.folder.save_right(step, right.tolist())
        if run.config.run.figures and distributed.is_main():
            metrics |= self._figures(step, student, teacher)
        distributed.barrier()
        return metrics

    def _figures(self, step: int, student: Student, teacher: Teacher | None) -> dict[str, float]:
        run = self.run
        images, valid = self.normalise(self.images.pixels.to(run.device)), self.images.valid
        share = 0.0 if run.method.guide is None else run.config.method.largest_hard_share
        hardness = measure_hardness(
            student, teacher, run.method, images, share=share, bf16=run.bf16,
            generator=torch.Generator().manual_seed(derive_seed(run.config.optimisation.seed, Stream.FIGURES)),
            valid=valid,
        )  # fmt: skip
        try_picture(
            lambda: draw_hardness(
                images, hardness, build_display(run.config, self.images.pixels), grid_size(student.encoder),
                f"step {step}" + told_correlation(hardness), valid,
            ), run.folder.hardness_figure(step),
        )  # fmt: skip
        if self.val is None or self.val.groups() is None or not student.predicts_hardness:
            return {}
        auroc = predicted_loss_auroc(
            teacher or student,
            self.normalise,
            self.val,
            size=run.config.data.size,
            device=run.device,
            bf16=run.bf16,
        )
        return {"foreground_auroc": auroc}
