"""The commands as functions: each takes the fields of its command's config, and images wherever a source is asked for.

A field means what its flag means and has its default: both are the dataclass's in :mod:`hardpatch.config`, and are
written nowhere else. Paths may be ``Path``; a source may also be images in memory
(:mod:`hardpatch.data.sources.in_memory`).
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, ParamSpec

from hardpatch.config.commands import EmbedConfig, ExportConfig, VisualizeCommand
from hardpatch.config.dense_evaluations import DetectConfig, SegmentConfig
from hardpatch.config.evaluations import EVALUATIONS, FinetuneConfig, ForegroundConfig, KnnConfig, LinearConfig
from hardpatch.data.sources.opening import as_spec
from hardpatch.evaluate.result import keep

Fields = ParamSpec("Fields")

SOURCES = ("data", "train", "val", "images", "val_images", "train_images")
"""Fields that name images."""


_RETURNS = """

Returns:
    The figures, as in the command's JSON.

Raises:
    InputError: A field, the run or the images break a rule.
"""


def _function(
    config: Callable[Fields, Any], run: Callable[[Any], dict[str, Any]], name: str, about: str
) -> Callable[Fields, dict[str, Any]]:
    """A function with the parameters of a config, so that editors complete them."""
    signature = inspect.signature(config)

    @functools.wraps(run)
    def call(*values: Fields.args, **fields: Fields.kwargs) -> dict[str, Any]:
        try:
            given = signature.bind_partial(*values, **fields).arguments
        except TypeError as error:
            raise TypeError(f"{name}: {error}") from None
        return run(config(**{field: _plain(field, value) for field, value in given.items()}))  # type: ignore[call-arg]

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"{about}\n\nFields are those of :class:`{getattr(config, '__qualname__', name)}`.{_RETURNS}"
    call.__signature__ = signature.replace(return_annotation="dict[str, Any]")  # type: ignore[attr-defined]
    return call


def _plain(field: str, value: Any) -> Any:
    """A value as the command line would have it."""
    if field in SOURCES and not (isinstance(value, str) and value == ""):
        return as_spec(value, field=field)
    if isinstance(value, list):
        return tuple(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _evaluation(name: str, config: Any) -> dict[str, Any]:
    result = import_module(EVALUATIONS[name].module).run(config)
    keep(result, config)
    figures: dict[str, Any] = json.loads(json.dumps(result.figures()))
    return figures


def _embed(config: EmbedConfig) -> dict[str, Any]:
    from hardpatch.embed import embed

    return embed.as_json(embed.run(config))


def _export(config: ExportConfig) -> dict[str, Any]:
    from hardpatch.export import export

    return export.run(config)._asdict()


def _visualize(config: VisualizeCommand) -> dict[str, Any]:
    from pathlib import Path

    from hardpatch.figures.hardness import visualize as draw

    correlation = draw(config.checkpoint, config.images, Path(config.out), count=config.count)
    return {"figure": config.out, "rank_correlation": correlation}


evaluate_knn = _function(KnnConfig, functools.partial(_evaluation, "knn"), "evaluate_knn", EVALUATIONS["knn"].about)
evaluate_linear = _function(
    LinearConfig, functools.partial(_evaluation, "linear"), "evaluate_linear", EVALUATIONS["linear"].about
)
evaluate_finetune = _function(
    FinetuneConfig, functools.partial(_evaluation, "finetune"), "evaluate_finetune", EVALUATIONS["finetune"].about
)
evaluate_foreground = _function(
    ForegroundConfig, functools.partial(_evaluation, "foreground"), "evaluate_foreground",
    EVALUATIONS["foreground"].about,
)  # fmt: skip
evaluate_segment = _function(
    SegmentConfig, functools.partial(_evaluation, "segment"), "evaluate_segment", EVALUATIONS["segment"].about
)
evaluate_detect = _function(
    DetectConfig, functools.partial(_evaluation, "detect"), "evaluate_detect", EVALUATIONS["detect"].about
)
embed_images = _function(EmbedConfig, _embed, "embed_images", "Features of every image as a table.")
export_weights = _function(ExportConfig, _export, "export_weights", "The backbone in the form of another library.")
visualize = _function(VisualizeCommand, _visualize, "visualize", "What is hard in images, as a figure.")
