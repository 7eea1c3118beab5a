"""Data sets of Hugging Face: saved folders, parquet folders, and the hub by its boundary."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from test_sources import png, refusal, values
from torch.utils.data import Dataset

from hardpatch.data.loader.loading import Position, TrainingOrder, batches_in_order
from hardpatch.data.sources import Downloads, fingerprint, hugging_face, open_source
from hardpatch.data.sources.hugging_face import HubName
from hardpatch.runtime.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def made(first=0, count=4, **columns):
    """Images with a grey value of their own and classes cat and dog in turns."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {
        "image": [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_saved_folder_is_recognised(tmp_path):
    made().save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    assert values(source) == [0, 1, 2, 3]
    assert source.labels == ["cat", "dog", "cat", "dog"]
    assert source.name(2) == f"{tmp_path}/saved/2"
    copy = pickle.loads(pickle.dumps(source))
    assert values(copy) == values(source)
    before = fingerprint(source)
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert fingerprint(open_source(str(tmp_path / "moved"))) == before
    made(first=1).save_to_disk(tmp_path / "other")
    assert fingerprint(open_source(str(tmp_path / "other"))) != before


def test_splits_of_a_saved_folder(tmp_path):
    both = datasets.DatasetDict({"train": made(), "test": made(10, 2)})
    both.save_to_disk(tmp_path / "both")
    assert values(open_source(str(tmp_path / "both"))) == [0, 1, 2, 3]
    assert values(open_source(f"hf:{tmp_path}/both@test")) == [10, 11]
    assert values(open_source(f"{tmp_path}/both/test")) == [10, 11]
    assert "has the splits ['train', 'test']" in refusal(f"hf:{tmp_path}/both@val")
    datasets.DatasetDict({"a": made(), "b": made()}).save_to_disk(tmp_path / "neither")
    assert "none is named" in refusal(tmp_path / "neither")


def test_selected_rows_paths_other_names_and_missing_labels(tmp_path):
    made(count=6).select([5, 1]).save_to_disk(tmp_path / "some")
    some = open_source(str(tmp_path / "some"))
    assert values(some) == [5, 1]
    assert some.labels == ["dog", "dog"]

    (tmp_path / "a.png").write_bytes(png(7))
    paths = datasets.Dataset.from_dict({"picture": [str(tmp_path / "a.png")]})
    paths.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "paths")
    assert values(open_source(str(tmp_path / "paths"))) == [7]
    assert open_source(str(tmp_path / "paths")).labels is None

    words = {"image": [png(1), png(2)], "class": ["x", "y"]}
    datasets.Dataset.from_dict(words).save_to_disk(tmp_path / "words")
    assert values(open_source(str(tmp_path / "words"))) == [1, 2]
    assert open_source(str(tmp_path / "words")).labels == ["x", "y"]

    unlabelled = made().to_dict() | {"label": [-1] * 4}
    datasets.Dataset.from_dict(unlabelled, features=made().features).save_to_disk(tmp_path / "unlabelled")
    assert open_source(str(tmp_path / "unlabelled")).labels is None


def test_sixteen_bit_images_reach_our_decoder_undecoded(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(buffer, "PNG")
    made_of = {"image": [{"bytes": buffer.getvalue(), "path": None}]}
    deep = datasets.Dataset.from_dict(made_of, features=datasets.Features({"image": datasets.Image()}))
    deep.save_to_disk(tmp_path / "deep")
    assert open_source(str(tmp_path / "deep")).content(0) == buffer.getvalue()


def test_sets_without_images_and_damaged_folders_are_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "texts")
    assert "has no column of images, got" in refusal(tmp_path / "texts")
    made().save_to_disk(tmp_path / "torn")
    next((tmp_path / "torn").glob("*.arrow")).unlink()
    assert "cannot read" in refusal(tmp_path / "torn", field="val")


def test_data_workers_read_it(tmp_path):
    made(count=16).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    order = TrainingOrder(16, batch_size=4, first_step=0, total_steps=4, seed=0, position=Position())

    class Values(Dataset):
        def __getitem__(self, key):
            return int(source.read(key[1]).image[0, 0, 0])

    batches = list(batches_in_order(Values(), order, collate=list, workers=1, pin_memory=False))
    assert sorted(value for batch in batches for value in batch) == list(range(16))


@pytest.fixture
def repository(tmp_path):
    """A folder as a data set lies on the hub: parquet files, three of training and one of test images."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        made(10 * number).to_parquet(folder / "data" / f"train-0000{number}-of-00003.parquet")
    made(90, 2).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    return folder


def test_a_folder_of_parquet_files_is_read_as_from_the_hub(repository):
    train, test = open_source(f"hf:{repository}"), open_source(f"hf:{repository}@test")
    assert values(train) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert values(test) == [90, 91]
    assert train.labels == ["cat", "dog"] * 6
    assert values(open_source(f"hf:{repository}@train[2:5]")) == [2, 3, 10]


def test_streaming_takes_its_files_for_shards(repository, tmp_path):
    downloads = Downloads(tmp_path / "cache")
    source = open_source(f"hf-stream:{repository}", downloads=downloads)
    assert values(source) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert source.labels == ["cat", "dog"] * 6
    size = max(file.stat().st_size for file in repository.rglob("train*.parquet"))
    little = Downloads(tmp_path / "little", gigabytes=2.1 * size / 1e9)
    far = open_source(f"hf-stream:{repository}", downloads=little)
    assert far.blocks() == ((4, 4, 4), 1)
    assert values(far) == values(source)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        (tmp_path / "set" / "train" / name / "1.png").write_bytes(png())
    assert values(open_source(f"hf:{tmp_path}/set")) == [0, 0]
    assert "cannot be streamed; use hf:" in refusal(f"hf-stream:{tmp_path}/set")


# The hub


def test_names_on_the_hub():
    assert HubName.parse("cifar10", field="data") == ("cifar10", None, None)
    assert HubName.parse("a/b@test", field="data") == ("a/b", None, "test")
    assert HubName.parse("a/b/c@train[:10%]", field="data") == ("a/b", "c", "train[:10%]")


def test_the_hub_is_asked_for_the_name_the_config_and_the_split(monkeypatch):
    asked = []

    def load(path, config, *, split):
        asked.append((path, config, split))
        return made()

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda path, config: ["test", "train"])
    assert values(open_source("hf:owner/name")) == [0, 1, 2, 3]
    assert open_source("hf:owner/name/small@test").name(3) == "owner/name/small@test/3"
    assert asked == [("owner/name", None, "train"), ("owner/name", "small", "test")]


def test_files_on_the_hub_are_streamed_by_their_urls(monkeypatch):
    class Builder:
        class config:  # noqa: N801
            data_files = {"train": ["hf://datasets/o/n@1a2b/t-0.parquet", "hf://datasets/o/n@1a2b/t-1.parquet"]}  # noqa: RUF012

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, config: Builder)
    assert hugging_face.shard_urls("o/n", field="data") == Builder.config.data_files["train"]


def test_what_the_hub_says_is_one_line(monkeypatch):
    def refused(path, config):
        raise ConnectionError("Couldn't reach the hub\nmany\nmore\nlines")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refused)
    monkeypatch.setattr(datasets, "load_dataset_builder", refused)
    for spec in ("hf:owner/name", "hf-stream:owner/name"):
        message = refusal(spec, field="train")
        assert message.startswith("train: cannot ")
        assert message.endswith("Hugging Face: ConnectionError: Couldn't reach the hub")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"need pip install 'datasets>="):
        open_source("hf:owner/name")
