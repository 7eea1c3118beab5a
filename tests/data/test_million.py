"""Large sets: names and labels stored small, tables read without looking at every file, memory shared with workers."""

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_sources import write

from hardpatch.data.sources import FileSource, class_indices, fingerprint, open_source
from hardpatch.data.sources.compact import Labels, Strings
from hardpatch.data.sources.shard_index import ShardIndex
from hardpatch.runtime.errors import InputError

COUNT = 12_000


def test_strings_are_the_list_they_were_made_from():
    words = ["", "a/b.png", "ä/ö.png", os.fsdecode(b"\xff\xfe.png"), "x" * 1000] * 14_000
    strings = Strings(words)
    assert len(strings) == len(words) == 70_000  # more than one chunk
    assert strings == words
    assert list(strings) == words
    assert [strings[i] for i in (0, 3, 69_999, -1, -70_000)] == [words[i] for i in (0, 3, 69_999, -1, -70_000)]
    assert strings[np.int64(3)] == words[3]
    assert strings[2:5] == words[2:5]
    assert pickle.loads(pickle.dumps(strings)) == words
    assert strings != words[:-1]
    assert Strings() == []
    with pytest.raises(IndexError):
        strings[70_000]


def test_labels_are_the_list_they_were_made_from_and_join():
    words = ["b", "a", "b", "c"] * 20_000
    labels = Labels.of(words)
    assert labels == words
    assert labels[-1] == "c"
    assert labels[2:5] == words[2:5]
    assert pickle.loads(pickle.dumps(labels)) == words
    assert labels.complete
    assert Labels.of([None, "a"]) == ["", "a"]
    assert class_indices(labels, ["c", "b", "a"]).tolist() == [1, 2, 1, 0] * 20_000
    with pytest.raises(InputError, match="'c'"):
        class_indices(labels, ["a", "b"])
    other = Labels(np.array([0, -1]), ["c", "d"])
    assert not other.complete
    assert Labels.join([labels, other]) == [*words, "c", ""]
    assert class_indices(Labels(np.array([0, 0]), ["a", "never"]), ["a"]).tolist() == [0, 0]


def test_an_index_comes_back_from_its_file(tmp_path):
    for classes, codes in ((["cat", "dög"], [1, -1, 0]), ([], [-1, -1, -1])):
        index = ShardIndex(np.arange(3), np.arange(3) + 5, Strings("abc"), Labels(np.array(codes), classes))
        index.save(tmp_path / "i.npz")
        again = ShardIndex.load(tmp_path / "i.npz")
        assert again.offsets.tolist() == [0, 1, 2]
        assert again.sizes.tolist() == [5, 6, 7]
        assert (again.keys, again.labels) == (list("abc"), list(index.labels))
        assert again.labels.codes.tolist() == codes
    ShardIndex(np.arange(0), np.arange(0), Strings(), Labels.of(())).save(tmp_path / "empty.npz")
    assert ShardIndex.load(tmp_path / "empty.npz").keys == []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A table of 12,000 rows in each form; only one of its files is there."""
    folder = tmp_path_factory.mktemp("many")
    paths = [f"class_{i // 100:04d}/image_{i:08d}.png" for i in range(COUNT)]
    labels = [f"class_{i // 100:04d}" for i in range(COUNT)]
    (folder / "t.txt").write_text("".join(f"{path}\n" for path in paths))
    (folder / "t.csv").write_text("path,label\n" + "".join(f"{p},{q}\n" for p, q in zip(paths, labels)))
    pyarrow.parquet.write_table(pyarrow.table({"path": paths, "label": labels}), folder / "t.parquet")
    return folder


@pytest.mark.parametrize("name", ["t.txt", "t.csv", "t.parquet"])
def test_a_long_table_is_looked_at_here_and_there_and_takes_little_memory(many, monkeypatch, name):
    looked = []
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or True)
    source = open_source(str(many / name))
    assert len(source) == COUNT
    assert 1000 <= len(set(looked)) <= 1200
    assert len(pickle.dumps(source)) < 60 * COUNT  # a list of paths takes 300 and more in memory
    assert source.name(11_999) == str(many / "class_0119/image_00011999.png")
    assert source.labels is None or source.labels[11_999] == "class_0119"


def test_a_missing_file_of_a_long_table_is_found_where_it_is_looked_for(many):
    with pytest.raises(InputError, match=r"lists a file that does not exist: .*image_00000000\.png"):
        open_source(str(many / "t.csv"))


def slow_walk(folder):
    """Slow twin: with the standard library's walk."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root).stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if name[0] != "." and name.endswith(".png"))


def test_the_walk_is_that_of_the_standard_library(tmp_path):
    names = ["b.png", "a/z.png", "a/b/y.png", "a.png", "a-b/x.png", "ab/w.png", "B/v.png", "a/.h/u.png", "a/n.txt"]
    write(tmp_path, *names)
    (tmp_path / "dead.png").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    (tmp_path / "Before").symlink_to(tmp_path / "ab")
    source = open_source(str(tmp_path))
    names = [source.name(i) for i in range(len(source))]
    assert names == list(source.names()) == list(map(str, slow_walk(tmp_path)))
    assert str(tmp_path / "Before/w.png") in names
    assert str(tmp_path / "ab/w.png") not in names


def test_the_fingerprint_is_that_of_the_names_one_by_one(tmp_path):
    """Runs that were begun before names were stored like this go on."""
    write(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png")
    source = open_source(str(tmp_path / "set"))
    assert fingerprint(source) == "3 images, d718dca1013d"  # computed when names were a list
    other = FileSource(Strings([source.name(i) for i in range(3)]), decoder=source.decoder)
    assert fingerprint(other) == fingerprint(source)
