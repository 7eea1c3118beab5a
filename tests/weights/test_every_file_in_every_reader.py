"""Every file of weights that a command writes, given to every command that reads weights: it works, or says what it is.

Whole files of the wrong kind are never called damaged, and nobody is told to start over because of one.
"""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import hardpatch
from hardpatch.cli import main
from hardpatch.config.commands import ConvertConfig, ExportConfig
from hardpatch.config.dense_evaluations import SegmentConfig
from hardpatch.config.evaluations import FinetuneConfig
from hardpatch.evaluate.classify import finetune
from hardpatch.evaluate.dense import segment
from hardpatch.export import export
from hardpatch.runtime.errors import InputError
from hardpatch.training.pretrain import train
from hardpatch.weights import convert
from tiny import TINY, tiny_config

torch.set_num_threads(1)
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")

FINETUNE = FinetuneConfig(
    "", "shapes:16", "shapes:8@1", epochs=1, batch_size=8, workers=0, device="cpu", precision="float32"
)
IS_RUN = {"run", "checkpoints", "checkpoint", "converted.pt"}
ENCODERS = {"weights", "exported.safetensors", "converted.safetensors"}
OF_HUBS = {"exported timm", "exported timm/model", "exported hf", "exported hf/model"}
WHAT = {
    "weights": "an encoder alone", "exported.safetensors": "an encoder alone",
    "converted.safetensors": "an encoder alone", "converted.pth": "hardpatch convert",
    "finetune": "the folder of a fine-tuning", "classifier": "fine-tuned classifier|as a fine-tuned classifier",
    "finetune/checkpoint": "a training of an evaluation|as a fine-tuned classifier",
    "segment": "a training of an evaluation", "segment/checkpoint": "a training of an evaluation",
    "exported timm": "a folder of timm|timm:local-dir", "exported timm/model": "a folder of timm",
    "exported hf": "a folder of Hugging Face", "exported hf/model": "a folder of Hugging Face",
    "exported.pt2": "torch.export", "runs": "a folder of 1 run",
    "picture": "neither|no file of torch.save|no encoder|no checkpoint",
    "figures": "neither|no file of torch.save|no encoder|no checkpoint",
}  # fmt: skip
"""What is said of a file where it does not fit (one of them); of runs where only a classifier is asked for, too."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By name: everything that commands write, of one run."""
    base = tmp_path_factory.mktemp("files")
    run = base / "runs/run"
    train(tiny_config(epochs=1, num_figure_images=2), run)
    finetune.run(replace(FINETUNE, checkpoint=str(run)))
    segment.run(SegmentConfig(
        checkpoint=str(run), images="shapes:8", val_images="shapes:4@1", epochs=1, batch_size=4, untrained=False,
        num_pictures=0, device="cpu",
    ))  # fmt: skip
    for form, name in (("timm", "timm"), ("hf", "hf"), ("safetensors", "x.safetensors"), ("torch", "y.pt2")):
        export.run(ExportConfig(str(run), form, str(base / name)))
    convert.run(ConvertConfig(str(run), str(base / "ours.pth")))
    convert.run(
        ConvertConfig(
            str(base / "ours.pth"), str(base / "back.pt"), target="norm_pix", encoder_heads=2, decoder_heads=2
        )
    )
    convert.run(ConvertConfig(str(run), str(base / "back.safetensors")))
    Image.new("RGB", (8, 8)).save(base / "picture.png")
    return {
        "run": run, "checkpoints": run / "checkpoints", "checkpoint": run / "checkpoints/last",
        "weights": run / "checkpoints/weights.safetensors", "finetune": run / "finetune",
        "finetune/checkpoint": run / "finetune/checkpoints/last", "classifier": run / "finetune/classifier.safetensors",
        "segment": run / "evaluate/segment-linear/this-run",
        "segment/checkpoint": run / "evaluate/segment-linear/this-run/last",
        "exported timm": base / "timm", "exported timm/model": base / "timm/model.safetensors",
        "exported hf": base / "hf", "exported hf/model": base / "hf/model.safetensors",
        "exported.safetensors": base / "x.safetensors", "exported.pt2": base / "y.pt2",
        "converted.pth": base / "ours.pth", "converted.pt": base / "back.pt",
        "converted.safetensors": base / "back.safetensors", "runs": base / "runs",
        "picture": base / "picture.png", "figures": run / "finetune/result.json",
    }  # fmt: skip


def command(*words):
    """A command; ``{}`` stands for the file, OUT for a new path, RUN for the run."""

    def read(file, out, run):
        given = [word.format(file).replace("OUT", str(out)).replace("RUN", str(run)) for word in words]
        with pytest.raises(SystemExit) as ended:
            main(given)
        return ended.value.code

    return read


def in_python(read):
    def call(file, out, run):
        read(file)
        return 0

    return call


SPLIT = ("--train", "shapes:16", "--val", "shapes:8@1", "--k", "1", "--device", "cpu")
TINY_FLAGS = [
    word
    for name, value in TINY.items()
    for word in (
        [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
        if isinstance(value, bool)
        else [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    )
]
READERS = {
    "embed": (command("embed", "--checkpoint", "{}", "--data", "shapes:4", "--out", "OUT.npz"), IS_RUN),
    "visualize": (command("visualize", "--checkpoint", "{}", "--images", "shapes:2", "--out", "OUT.png"), IS_RUN),
    "knn": (command("evaluate", "knn", "--checkpoint", "{}", *SPLIT), IS_RUN),
    "foreground": (
        command("evaluate", "foreground", "--checkpoint", "{}", "--images", "shapes:4", "--no-untrained"), IS_RUN
    ),
    "against": (
        command("evaluate", "knn", "--checkpoint", "RUN", *SPLIT, "--against", "{}"), IS_RUN | ENCODERS | {"classifier"}
    ),
    "load_teacher": (in_python(hardpatch.load_teacher), IS_RUN),
    "load_encoder": (in_python(hardpatch.load_encoder), IS_RUN | ENCODERS),
    "load_classifier": (in_python(hardpatch.load_classifier), {"run", "finetune", "classifier"}),
    "export": (
        command("export", "--checkpoint", "{}", "--format", "safetensors", "--out", "OUT.safetensors"),
        IS_RUN | ENCODERS | {"classifier", "finetune"},
    ),
    "init-from": (
        command(
            "pretrain", "--recipe", "hpm", "--out", "OUT", "--init-from", "{}", *TINY_FLAGS, "--data", "shapes:8",
            "--epochs", "1",
        ),
        IS_RUN | ENCODERS | OF_HUBS | {"converted.pth", "classifier", "finetune/checkpoint"},
    ),
    "convert": (
        command("convert", "--from", "{}", "--to", "OUT.safetensors", "--encoder-heads", "2"),
        IS_RUN | ENCODERS | OF_HUBS | {"converted.pth"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore")
def test_every_file_works_or_says_what_it_is(files, reader, tmp_path, capsys):
    read, works = READERS[reader]
    wrong = []
    for number, (name, file) in enumerate(files.items()):
        try:
            code, error = read(file, tmp_path / str(number), files["run"]), ""
        except InputError as raised:
            code, error = 2, str(raised)
        said = error + capsys.readouterr().err
        words = WHAT.get(name, "a checkpoint of a run|no classifier").split("|")
        if code != (0 if name in works else 2):
            wrong.append(f"{name}: ended with {code}: {said[-400:]}")
        elif code and not (any(word in said for word in words) and str(file) in said):
            wrong.append(f"{name}: does not say what it is: {said[-400:]}")
        if "restart" in said or ("damaged" in said and name not in ("picture", "figures")):
            wrong.append(f"{name}: is whole, and is called damaged: {said[-400:]}")
    assert not wrong, "\n\n".join(wrong)
