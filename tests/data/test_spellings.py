"""One set of images, however it is spelt: relative, absolute, by links, braces, stars or as a folder of parts."""

import os
import subprocess
import sys
from pathlib import PurePosixPath

import pyarrow
import pyarrow.parquet
import pytest
from test_sources import png, refusal, values, write, write_tar

from hardpatch.data.sources import Downloads, fingerprint, open_source
from hardpatch.data.sources.opening import as_spec
from hardpatch.runtime.errors import InputError
from web_server import serving


def write_images(path, numbers=range(3), *, labels=None):
    """A parquet file with images inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]}
    columns |= {} if labels is None else {"label": labels}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_paths(path, names, **columns):
    """A parquet file as ``datasets`` writes images that it has not read: only their paths."""
    cells = pyarrow.array(
        [{"bytes": None, "path": str(name)} for name in names],
        pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, **columns}), path)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a source from within a folder, with downloads of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    return lambda spec: open_source(spec, downloads=Downloads(tmp_path / "cache"))


# One identity


@pytest.mark.parametrize(
    "spelling",
    [
        "{name}",
        "./{name}",
        "../data/{name}",
        "../link/{name}",
        "{absolute}/{name}",
        "~/data/{name}",
        "./..//data/{name}",
    ],
)
@pytest.mark.parametrize(
    "name",
    ["part-*.parquet", "part-{{0..1}}.parquet", "part-0.parquet", "s-*.tar", "s-{{0..1}}.tar", "table.csv", "all"],
)
def test_a_spelling_changes_neither_images_nor_fingerprint(tmp_path, opened, spelling, name):
    data = tmp_path / "data"
    write_images(data / "part-0.parquet", [0, 1])
    write_images(data / "part-1.parquet", [2])
    write_tar(data / "s-0.tar", [("0.png", png(0)), ("1.png", png(1))])
    write_tar(data / "s-1.tar", [("2.png", png(2))])
    write(data / "all", "a/0.png", "a/1.png", "b/2.png")
    rows = ["path,label", "all/a/0.png,a", f"{data}/all/a/1.png,a", "all/b/2.png,b"]  # relative and absolute ones
    (data / "table.csv").write_text("\n".join(rows))
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "data").symlink_to(data)
    name = name.format()
    as_is, spelt = opened(f"{data}/{name}"), opened(spelling.format(name=name, absolute=data))
    assert values(spelt) == values(as_is) == ([0, 1] if name == "part-0.parquet" else [0, 1, 2])
    if not (name == "table.csv" and ("link" in spelling or "~" in spelling)):  # its absolute path goes another way
        assert fingerprint(spelt) == fingerprint(as_is)


def test_a_table_of_relative_and_absolute_paths_is_the_same_from_within_its_folder(tmp_path, opened):
    data = tmp_path / "data"
    write(data, "a/0.png", "a/1.png")
    (data / "list.txt").write_text(f"a/0.png\n{data}/a/1.png\n")
    assert fingerprint(opened("list.txt")) == fingerprint(opened(f"{data}/list.txt"))


def test_names_of_a_table_on_a_web_server_may_hold_what_means_something_in_a_url(tmp_path):
    names = ["a#1.png", "b?2.png", "100%.png", "c%20d.png", "e f.png", "\u00e9.png"]
    write(tmp_path / "site", *names)
    (tmp_path / "site" / "list.txt").write_text("\n".join(names))
    with serving(tmp_path / "site") as server:
        source = open_source(f"{server.url}/list.txt")
        assert values(source) == list(range(6))


# What exists is taken as it is written


@pytest.mark.parametrize("folder", ["[1] {a,b} (copy)", r"$\frac{a}{b}$", "{", "x*y", "a{1..3}"])
@pytest.mark.parametrize("pattern", ["part-0.parquet", "part-*.parquet", "part-{0..1}.parquet"])
def test_folders_with_braces_and_stars_in_their_names(tmp_path, opened, folder, pattern):
    for number in range(2):
        write_images(tmp_path / "data" / folder / f"part-{number}.parquet", [number])
        write_tar(tmp_path / "data" / folder / f"part-{number}.tar", [("a.png", png(number))])
    expected = [0] if "0.p" in pattern else [0, 1]
    for spelling in (f"{folder}/{pattern}", f"{tmp_path}/data/{folder}/{pattern}"):
        assert values(opened(spelling)) == expected
        assert values(opened(spelling.replace(".parquet", ".tar"))) == expected


@pytest.mark.parametrize(
    "name", ["{a,b}.tar", "[1].tar", "a*.tar", r"a\b.tar", "{.tar", "a{1..2}.parquet", "[x].parquet"]
)
def test_files_with_braces_and_stars_in_their_names(tmp_path, opened, name):
    data = tmp_path / "data"
    write_images(data / name, [5]) if name.endswith(".parquet") else write_tar(data / name, [("a.png", png(5))])
    write_tar(data / "b.tar", [("b.png", png(6))])
    assert values(opened(name)) == [5]
    assert values(opened("[b].tar")) == [6]


def test_stars_in_folders(tmp_path, opened):
    for number in range(4):
        folder = tmp_path / "data" / f"camera {number}" / "day"
        folder.mkdir(parents=True)
        write_tar(folder / "s.tar", [("a.png", png(number))])
    assert values(opened("camera */day/s.tar")) == values(opened("*/*/*.tar")) == [0, 1, 2, 3]
    assert values(opened("camera {1..2}/*/s.tar")) == [1, 2]
    assert values(opened(f"{tmp_path}/data/**/s.tar")) == [0, 1, 2, 3]
    assert "no shard" in refusal("cam*/night/s.tar")
    assert "does not exist" in refusal("*/nothing.parquet")


def test_a_list_in_braces_may_be_longer_than_a_name(tmp_path, opened):
    names = [f"{'x' * 40}{number}" for number in range(12)]
    for number, name in enumerate(names):
        write_tar(tmp_path / "data" / f"{name}.tar", [("a.png", png(number))])
    assert values(opened(f"{{{','.join(names)}}}.tar")) == list(range(12))


# A folder of parts


def test_a_table_that_is_a_folder_of_parts(tmp_path, opened):
    folder = tmp_path / "data" / "train.parquet"
    write_images(folder / "part-00001.snappy.parquet", [1, 2], labels=["b", "b"])
    write_images(folder / "part-00000.snappy.parquet", [0], labels=["a"])
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000.snappy.parquet.crc").write_bytes(b"crc")
    (folder / "_metadata.parquet").write_bytes(b"no table")
    for spelling in ("train.parquet", "train.parquet/", "./train.parquet", str(folder), "tr*.parquet"):
        source = opened(spelling)
        assert (values(source), list(source.labels)) == ([0, 1, 2], ["a", "b", "b"])


def test_parts_that_name_files_are_one_table_beside_its_folder(tmp_path, opened):
    data = tmp_path / "data"
    write(data, "0.png", "1.png", "2.png")
    (data / "t.parquet").mkdir()
    for number, names in enumerate((["0.png"], ["1.png", "2.png"])):
        pyarrow.parquet.write_table(pyarrow.table({"path": names}), data / "t.parquet" / f"p-{number}.parquet")
    assert values(opened("t.parquet")) == values(opened(f"{data}/t.parquet/")) == [0, 1, 2]


def test_folders_that_look_like_a_table_and_are_none(tmp_path, opened):
    data = tmp_path / "data"
    write(data / "cats.parquet", "0.png")
    assert values(opened("cats.parquet")) == [0]
    write_images(data / "split.parquet" / "label=cat" / "part-0.parquet", [0])
    assert "'label'" in refusal("split.parquet")
    write(data / "dogs.tar", "0.png")
    assert values(opened("dogs.tar")) == [0]
    write_images(data / "hub" / "train-0.parquet", [3])
    assert "hub/*.parquet" in refusal("hub")


# Images that a table only names


def test_images_that_a_parquet_file_only_names(tmp_path, opened):
    data = tmp_path / "data"
    write(data, "x/0.png", "x/1.png", "x/2.png")
    write_paths(data / "relative.parquet", ["x/0.png", "x/1.png", "x/2.png"], label=["a", "b", "a"])
    write_paths(data / "absolute.parquet", [data / f"x/{number}.png" for number in range(3)])
    assert values(opened("relative.parquet")) == values(opened(f"{data}/absolute.parquet")) == [0, 1, 2]
    assert opened("relative.parquet").labels == ["a", "b", "a"]
    write_paths(data / "missing.parquet", ["x/0.png", "x/9.png"])
    assert "x/9.png" in refusal("missing.parquet")


def test_some_images_inside_and_some_named(tmp_path, opened):
    data = tmp_path / "data"
    write(data, "x/0.png")
    cells = [{"bytes": None, "path": "x/0.png"}, {"bytes": png(7), "path": "7.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells}), data / "some.parquet")
    assert values(opened("some.parquet")) == [0, 7]
    (data / "x/0.png").rename(data / "x/1.png")
    os.utime(data / "some.parquet", (1, 1))
    with pytest.raises(Exception, match=r"some\.parquet.*x/0\.png"):
        opened("some.parquet")


# What is no path


class Picture:
    """An object of the user's own."""


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([1, 2], "list; a list must hold arrays"),
        (({},), "tuple; a pair must be of images and their labels"),
        (pyarrow.table({"path": ["a.png"]}), r"pyarrow.lib.Table of shape \(1, 1\); write it"),
        (Picture(), "Picture; save its images as files"),
        (None, "NoneType"),
        (5, "int"),
    ],
)
def test_what_is_no_path_is_called_by_its_type(data, named):
    with pytest.raises(InputError, match=rf"^data: must name a folder, .*got a .*{named}"):
        as_spec(data)


def test_what_is_no_images_ends_a_run_before_it_begins(tmp_path):
    program = (  # in a process of its own: here the tests check all types
        "import hardpatch, numpy\n"
        "for data in (numpy.zeros((8, 8, 3)), [1], {}):\n"
        "    try:\n"
        "        hardpatch.pretrain(data, 'run')\n"
        "    except hardpatch.InputError as error:\n"
        "        print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
    )
    told = done.stdout.splitlines()
    assert len(told) == 3, done.stderr
    assert ["of a single image make a list" in told[0], "a list" in told[1], "a dict" in told[2]] == [True] * 3
    assert not list(tmp_path.iterdir())


def test_paths_of_all_kinds_are_paths(tmp_path):
    write(tmp_path, "0.png")
    assert as_spec(tmp_path) == as_spec(str(tmp_path)) == as_spec(PurePosixPath(tmp_path)) == str(tmp_path)
    assert len(open_source(tmp_path)) == 1
