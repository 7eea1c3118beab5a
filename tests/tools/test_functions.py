"""The commands as functions: the figures of the command, and images in memory as the same images in files."""

import inspect
import json
import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import hardpatch
from hardpatch.cli import main
from hardpatch.config.evaluations import KnnConfig
from hardpatch.config.values import load_config
from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import open_source
from hardpatch.data.sources.opening import as_spec
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.errors import InputError
from tiny import TINY, pretrain

NAMES = ("cat", "dog")
FIELDS = {name: value for name, value in TINY.items() if name != "data"}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (48, 40, 36, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def labels():
    return [NAMES[number % 2] for number in range(48)]


@pytest.fixture(scope="module")
def folder(pixels, labels, tmp_path_factory):
    place = tmp_path_factory.mktemp("photos")
    lines = ["path,label"]
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(image).save(place / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{label}")
    (place / "table.csv").write_text("\n".join(lines))
    return place


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrain(folder / "table.csv", out, **FIELDS)
    return out


class Pairs(torch.utils.data.Dataset):
    """As many write them."""

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return Image.fromarray(self.pixels[index]), NAMES.index(self.labels[index])


class Torchvision(Pairs):
    """As torchvision's."""

    classes = NAMES

    @property
    def targets(self):
        return [NAMES.index(label) for label in self.labels]

    def __getitem__(self, index):
        return torch.from_numpy(self.pixels[index]).permute(2, 0, 1), 0


def forms(pixels, labels):
    """The same images in all ways of handing them over, with what their labels are."""
    hugging_face = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels], "label": [NAMES.index(label) for label in labels]},
        datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES))),
    )
    numbers = [str(NAMES.index(label)) for label in labels]
    return {
        "array": (pixels, None),
        "tensor": (torch.from_numpy(pixels).permute(0, 3, 1, 2), None),
        "arrays": (list(pixels), None),
        "PIL": ([Image.fromarray(image) for image in pixels], None),
        "array and labels": ((pixels, labels), labels),
        "numbers as labels": ((pixels, np.array([NAMES.index(label) for label in labels])), numbers),
        "data set": (Pairs(pixels, labels), numbers),
        "torchvision": (Torchvision(pixels, labels), labels),
        "Hugging Face": (hugging_face, labels),
    }


@pytest.mark.parametrize("form", forms(np.zeros((2, 4, 4, 3), np.uint8), ["cat", "dog"]))
def test_every_form_reads_as_the_same_images_in_files(pixels, labels, form):
    images, known = forms(pixels, labels)[form]
    source = open_source(as_spec(images), decoder=Decoder(3))
    assert len(source) == 48
    assert (source.labels and list(source.labels)) == known
    for index in (0, 7, 47):
        assert torch.equal(source.read(index).image, torch.from_numpy(pixels[index]).permute(2, 0, 1))


def test_lists_of_files_and_other_kinds_of_numbers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    source = open_source(as_spec((["00.png", folder / "01.png"], ["a", "b"])))
    assert [len(source), list(source.labels)] == [2, ["a", "b"]]
    deep = np.random.default_rng(0).integers(0, 4096, (5, 16, 16), dtype=np.uint16)
    found = open_source(as_spec(deep), decoder=Decoder(1, value_range=(0, 4095))).read(3).image
    np.testing.assert_allclose(found[0], deep[3] * (255 / 4095), rtol=1e-5)
    grey = open_source(as_spec([Image.fromarray(deep[0].astype(np.uint8)).convert("L")]), decoder=Decoder(1))
    assert grey.read(0).image.shape == (1, 16, 16)


@pytest.mark.parametrize(("images", "said"), [
    (np.zeros((8, 8, 3), np.uint8), r"of a single image make a list"),
    (np.zeros((8, 8), np.uint8), r"of a single image make a list"),
    ((np.zeros((3, 8, 8, 3), np.uint8), ["a"]), "a label for each image, got 3 and 1"),
    ([], "must name a folder|needs at least one image"),
    ([np.zeros((8, 8)), "a.png"], "a list must hold"),
    (torch.utils.data.TensorDataset(torch.zeros(2)), "the first item of the TensorDataset is no image"),
    (datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]})), r"splits \['train'\]"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(images, said):
    with pytest.raises(InputError, match=said):
        as_spec(images)


def test_a_run_on_arrays_is_the_run_on_their_files(pixels, labels, run, tmp_path):
    result = pretrain((pixels, labels), tmp_path / "run", val=(pixels[:10, ::-1].copy(), labels[:10]), **FIELDS)
    files = torch.load(run / "checkpoints/last", weights_only=True)["student"]
    arrays = torch.load(tmp_path / "run/checkpoints/last", weights_only=True)["student"]
    assert all(torch.equal(files[name], arrays[name]) for name in files)
    assert load_config(tmp_path / "run/config.yaml").data.data.startswith("memory:48 images, ")
    again = pretrain((pixels.copy(), labels), tmp_path / "run", val=(pixels[:10, ::-1].copy(), labels[:10]), **FIELDS)
    assert again == result, "it is done"
    with pytest.raises(InputError, match="does not hold the images this run began with"):
        pretrain((pixels[::-1].copy(), labels), tmp_path / "run", **FIELDS)


def test_the_command_line_says_that_they_are_gone(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", "--recipe", "hpm", "--data", "memory:5 images, 0123", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "in the memory of a Python program; hand them over again" in " ".join(capsys.readouterr().err.split())


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    return json.loads(shown.out.splitlines()[-1])


def test_evaluations_are_those_of_the_command(pixels, labels, folder, run, capsys):
    words = ["--checkpoint", run, "--train", folder / "table.csv", "--device", "cpu", "--json"]
    told = command(capsys, "evaluate", "knn", *words, "--k", "3")
    assert hardpatch.evaluate_knn(run, train=folder / "table.csv", k=[3], device="cpu") == told
    assert hardpatch.evaluate_knn(str(run), train=(pixels, labels), k=(3,), device="cpu") == told
    told = command(capsys, "evaluate", "linear", *words, "--mode", "logistic")
    assert hardpatch.evaluate_linear(run, train=(pixels, labels), mode="logistic", device="cpu") == told


def test_tables_exports_and_pictures(pixels, run, tmp_path):
    told = hardpatch.embed_images(run, data=pixels, out=tmp_path / "table.npz", hardness=True, device="cpu")
    assert told["images"] == 48
    table = np.load(tmp_path / "table.npz")
    scores = hardpatch.hardness(run, pixels, device="cpu")
    np.testing.assert_allclose(scores.reshape(48, -1), table["predicted_loss"].reshape(48, -1), rtol=1e-4, atol=1e-5)
    assert scores.shape == (48, 4, 4), "of the run's 32 pixels, though the images have 40 x 36"
    assert hardpatch.export_weights(run, format="safetensors", out=tmp_path / "weights.safetensors")["parameters"] > 0
    assert hardpatch.visualize(run, images=list(pixels[:3]), out=tmp_path / "hard.png")["figure"]
    assert (tmp_path / "hard.png").is_file()


def test_scores_of_a_run_that_predicts_none_are_refused(folder, tmp_path):
    pretrain(folder / "table.csv", tmp_path / "mae", recipe="mae", **FIELDS)
    with pytest.raises(InputError, match="predicts no hardness"):
        hardpatch.hardness(tmp_path / "mae", folder / "table.csv", device="cpu")


def test_editors_see_the_fields():
    for name in ("evaluate_knn", "evaluate_segment", "embed_images", "export_weights", "visualize"):
        function = getattr(hardpatch, name)
        assert function.__name__ == name
        assert "InputError" in function.__doc__
    assert list(inspect.signature(hardpatch.evaluate_knn).parameters) == list(inspect.signature(KnnConfig).parameters)
    with pytest.raises(TypeError, match="evaluate_knn: got an unexpected keyword argument 'kk'"):
        hardpatch.evaluate_knn("run", train="a", kk=3)


def test_in_a_thread(folder, tmp_path):
    """Signals are the main thread's; another one trains without them."""
    found = []
    thread = threading.Thread(target=lambda: found.append(pretrain(folder / "table.csv", tmp_path / "run", **FIELDS)))
    thread.start()
    thread.join()
    assert found[0]["steps"] == 12
    assert RunFolder(tmp_path / "run").result()["steps"] == 12
