"""``hardpatch export``: the backbone in the form of another library.

    --format timm         PATH/           config.json, model.safetensors, README.md
    --format hf           PATH/           config.json, model.safetensors, preprocessor_config.json, README.md
    --format safetensors  PATH.safetensors, PATH.md
    --format onnx         PATH.onnx, PATH.md
    --format torch        PATH.pt2, PATH.md

Every export is loaded back by the library it is for, and its features are held against the encoder's on a seeded
batch, before it appears under its name: what is there computes the same.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from hardpatch.config.commands import ExportConfig, ExportFormat
from hardpatch.export import graphs, huggingface, timm_format
from hardpatch.export.backbone import Backbone, Computed, Computes, Pooled, random_images, read_backbone
from hardpatch.export.card import model_card
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.extras import install


class Format(NamedTuple):
    """How one form is written and read back."""

    suffix: str
    """Ending of the file; empty: a folder."""
    write: Callable[[Backbone, Path], None] | Callable[[Backbone, Path, Computes], None]
    """Takes the output too where the form has a choice of it."""
    read: Callable[[Path, Backbone], Computed]
    """Reads the export as a user of the other library would."""
    tolerance: float
    """Largest difference of a feature, for features of magnitude up to 1; proportional beyond."""
    library: str
    """Name of the library on the hub."""
    has_outputs: bool = False
    """Is there a choice of what it puts out?"""
    needs: tuple[str, ...] = ()
    """Packages that hardpatch does not bring by itself."""
    extra: str = ""
    """The extra of hardpatch that brings them."""
    check: Callable[[Backbone], None] | None = None
    """Refuses encoders that this form cannot express."""


FORMATS: dict[ExportFormat, Format] = {
    "timm": Format("", timm_format.write_folder, timm_format.read_folder, 1e-5, "timm"),
    "hf": Format(
        "", huggingface.write_folder, huggingface.read_folder, 1e-5, "transformers",
        needs=("transformers",), extra="hf", check=huggingface.check,
    ),
    "safetensors": Format(".safetensors", timm_format.write_file, timm_format.read_file, 1e-5, "timm"),
    "onnx": Format(
        ".onnx", graphs.write_onnx, graphs.read_onnx, 1e-4, "onnx",
        has_outputs=True, needs=("onnx", "onnxscript", "onnxruntime"), extra="onnx",
    ),
    "torch": Format(".pt2", graphs.write_program, graphs.read_program, 1e-5, "pytorch", has_outputs=True),
}  # fmt: skip


class Exported(NamedTuple):
    """What was written."""

    out: str
    format: ExportFormat
    output: Computes
    """What it puts out."""
    parameters: int
    bytes: int
    """Size of all files together."""
    max_difference: float
    """Largest difference of its features from the encoder's."""
    tolerance: float
    """The largest that would have been let through."""
    card: str
    """Path of the model card."""
    usage: list[str]
    """The three lines of Python that load it."""


def run(config: ExportConfig) -> Exported:
    """Write, load back, compare, and only then let it appear.

    Raises:
        InputError: Something is in the way, a package is missing, or this encoder has no such form.
        AssertionError: The export does not compute the same: a fault of hardpatch's, and nothing is left of it.
    """
    form = _checked_form(config)
    out = Path(config.out).expanduser()
    backbone = read_backbone(config.checkpoint)
    output: Computes = "scores" if backbone.vit.num_classes else config.pooling or "tokens"
    if output == "scores" and config.pooling:
        raise InputError(f"pooling: {config.checkpoint!r} is a fine-tuned classifier, which gives scores; leave it out")
    if output == "class" and not backbone.vit.has_class_token:
        raise InputError("pooling: 'class' needs a class token, and this encoder has none; use mean or tokens")
    if form.check is not None:
        form.check(backbone)
    work = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"out: cannot write in {str(out.parent)!r}: {error.strerror}") from error
    try:
        written = work / out.name
        form.write(backbone, written, *([output] if form.has_outputs else []))
        difference, tolerance = compare(form, written, backbone, output)
        card = _card_of(written)
        checked = f"loaded back and compared on a random batch: largest difference {difference:.1e}"
        card.write_text(
            model_card(
                backbone, library=form.library, usage=usage(config.format, out.name, backbone, output), checked=checked
            )
        )
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        # What the user asked for comes last: where it is, all of it is.
        for file in sorted(work.iterdir(), key=lambda file: file == written):
            file.rename(out.with_name(file.name))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported(
        out=config.out,
        format=config.format,
        output=output,
        parameters=sum(parameter.numel() for parameter in backbone.vit.parameters()),
        bytes=size,
        max_difference=difference,
        tolerance=tolerance,
        card=str(_card_of(out)),
        usage=usage(config.format, config.out, backbone, output),
    )


def _checked_form(config: ExportConfig) -> Format:
    """The form asked for, after everything that can be wrong before a checkpoint is read."""
    form = FORMATS[config.format]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"export runs in one process, got {os.environ['WORLD_SIZE']}; call it without torchrun")
    if missing := [name for name in form.needs if importlib.util.find_spec(name) is None]:
        raise InputError(f"format: {config.format!r} needs {', '.join(missing)}; {install(form.extra)}")
    if config.pooling is not None and not form.has_outputs:
        raise InputError(
            f"pooling: is for onnx and torch; {config.format!r} holds the encoder itself, which gives all tokens"
        )
    out = Path(config.out).expanduser()
    if not out.name:
        raise InputError(f"out: must name a {'file' if form.suffix else 'folder'}, got {config.out!r}")
    if form.suffix and out.suffix != form.suffix:
        raise InputError(f"out: {config.format} writes a file that ends in {form.suffix}, got {config.out!r}")
    beside = [out, _card_of(out), out.with_name(out.name + ".data")] if form.suffix else [out]
    if there := next((path for path in beside if path.exists() or path.is_symlink()), None):
        raise InputError(f"out: {str(there)!r} exists; name another one, or remove it")
    return form


def _card_of(written: Path) -> Path:
    """In a folder, or beside a file and named after the whole of it: backbone.onnx and backbone.pt2 have one each."""
    return written / "README.md" if written.is_dir() else written.with_name(f"{written.name}.md")


def compare(form: Format, written: Path, backbone: Backbone, output: Computes) -> tuple[float, float]:
    """Load an export back and hold its features against the encoder's, on a batch of three and on one of one.

    Returns:
        The largest difference, and the largest that is let through.

    Raises:
        AssertionError: They differ.
    """
    computed, truth = form.read(written, backbone), Pooled(backbone.vit, output).eval()
    differences, tolerance = [], form.tolerance
    for count in (3, 1):
        images = random_images(backbone, count, seed=count)
        with torch.no_grad():
            expected = truth(images)
        found = computed(images)
        if found.shape != expected.shape:
            raise AssertionError(f"the export puts out {tuple(found.shape)}, the encoder {tuple(expected.shape)}")
        differences.append((found - expected).abs().max())
        tolerance = max(tolerance, form.tolerance * float(expected.abs().max()))
    largest = float(torch.stack(differences).max())  # NaN where one is
    if not largest <= tolerance:
        raise AssertionError(
            f"the export does not compute the same: features differ by {largest:.2g} > {tolerance:.1g}"
        )
    return largest, tolerance


def usage(form: ExportFormat, path: str, backbone: Backbone, output: Computes) -> list[str]:
    """The three lines of Python that load an export and give a feature per image, pooled as the evaluations pool."""
    shape = "(B, C), scores of the classes" if output == "scores" else "(B, D)"
    patches = f"[:, {backbone.vit.num_prefix_tokens}:]" if backbone.vit.num_prefix_tokens else ""
    mean = f"{patches}.mean(1)" if output == "tokens" else ""
    call = "backbone(images)" if output == "scores" else f"backbone.forward_features(images){mean}"
    match form:
        case "timm":
            return [
                "import timm",
                f'backbone = timm.create_model("local-dir:{path}", pretrained=True).eval()',
                f"features = {call}    # {shape}",
            ]
        case "hf":
            return [
                "from transformers import AutoImageProcessor, AutoModel",
                f'backbone, processor = (kind.from_pretrained("{path}") for kind in (AutoModel, AutoImageProcessor))',
                f'features = backbone(**processor(pictures, return_tensors="pt")).last_hidden_state{mean}    # {shape}',
            ]
        case "safetensors":
            name, others = backbone.arguments["model_name"], dict(backbone.arguments)
            others.pop("model_name")
            arguments = ", ".join(f"{key}={value!r}" for key, value in others.items())
            return [
                "import timm",
                f'backbone = timm.create_model("{name}", checkpoint_path="{path}", {arguments}).eval()',
                f"features = {call}    # {shape}",
            ]
        case "onnx":
            return [
                "import onnxruntime",
                f'session = onnxruntime.InferenceSession("{path}")',
                f'features = session.run(["{graphs.OUTPUT}"], {{"{graphs.INPUT}": images}})[0]{mean}    # {shape}',
            ]
        case "torch":
            return [
                "import torch",
                f'backbone = torch.export.load("{path}").module()',
                f"features = backbone(images){mean}    # {shape}",
            ]
