"""What the program writes is never read as images, wherever it stands: commands that write below their own source."""

import numpy as np
import pytest
import torch
from PIL import Image

from hardpatch.cli import main
from hardpatch.config.commands import EmbedConfig
from hardpatch.data.sources import fingerprint, open_source
from hardpatch.embed import embed
from hardpatch.embed.chunks import Parts
from hardpatch.runtime.errors import Interrupted
from hardpatch.runtime.outputs import make_output_folder
from random_run import random_run
from tiny import TINY, pretrain, stop_after

torch.set_num_threads(1)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of images; the working folder is theirs."""
    draw = np.random.default_rng(0)
    for number in range(16):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path / "photos")
    return tmp_path / "photos"


def call(*words):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    return left.value.code


def seen():
    source = open_source(".")
    return sorted(source.names()), sorted(set(source.labels)), fingerprint(source)


@pytest.mark.slow
def test_a_run_below_its_images_goes_on_and_is_no_class(photos, monkeypatch):
    before = seen()
    fields = TINY | {"data": ".", "out": "runs/a", "figures": True, "checkpoint_steps": 1}
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted):
            pretrain(**fields)
    assert list(photos.glob("runs/a/figures/*.png"))
    assert seen() == before
    pretrain(**fields)  # goes on: the images are the same
    pretrain(**fields | {"out": "runs/b"})
    assert seen() == before


COMMANDS = {
    "visualize": "visualize --checkpoint RUN --images . --out hard.png --count 2",
    "visualize in a class": "visualize --checkpoint RUN --images . --out a/hard.png --count 2",
    "check": "data check . --out checked --workers 0",
    "check into the images": "data check . --out . --workers 0",
    "pack": "data pack . --out packed --workers 0 --size 16",
    "embed": "embed --checkpoint RUN --data . --out features.npz --device cpu",
    "sheet": "embed --checkpoint RUN --data . --out f.parquet --hardness --contact-sheet b/s.png --device cpu",
    "linear": "evaluate linear --checkpoint RUN --train . --val . --epochs 1 --out measured",
    "knn": "evaluate knn --checkpoint RUN --train . --val . --k 2",
    "finetune": "evaluate finetune --checkpoint RUN --train . --val . --epochs 1 --batch-size 8 --out tuned "
    "--workers 0 --no-untrained --precision float32",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_write_below_their_own_source(name, photos, tmp_path):
    before = seen()
    run = random_run(photos / "runs" / "here")
    assert seen() == before
    assert call(*(str(run) if word == "RUN" else word for word in COMMANDS[name].split())) == 0
    assert seen() == before


def test_an_embedding_that_was_stopped_goes_on_below_its_images(photos, tmp_path, monkeypatch):
    run, before, write = random_run(tmp_path / "run"), seen(), Parts.write
    config = EmbedConfig(str(run), ".", "features.npz", batch_size=4, device="cpu")
    monkeypatch.setattr(embed, "PART_IMAGES", 4)

    def stop(parts, number, part):
        write(parts, number, part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            embed.run(config)
    assert list(photos.glob("features.npz.parts/*.npz"))
    assert seen() == before
    embed.run(config)
    assert seen() == before


def test_a_run_of_a_version_without_marks_is_left_out_too(photos):
    before = seen()
    run = random_run(photos / "runs" / "old")
    (run / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "figures" / "hardness_00000001.png")
    (run / ".hardpatch").unlink()
    assert seen() == before


def test_a_folder_of_images_is_never_marked_and_one_that_is_named_is_read(photos):
    before = seen()
    make_output_folder(photos / "a")
    assert seen() == before
    make_output_folder(photos / "figures")
    Image.new("RGB", (8, 8)).save(photos / "figures" / "x.png")
    assert seen() == before
    assert len(open_source("figures")) == 1
