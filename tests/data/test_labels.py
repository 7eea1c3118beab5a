"""Labels as people write them: one rule for tables, parquet files, saved data sets and shards."""

import io
import os
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_sources import png, refusal, values, write, write_tar

from hardpatch import pretrain
from hardpatch.config.config import Config
from hardpatch.data.sources import Downloads, ShardSource, open_source
from hardpatch.data.sources.compact import Labels, clean_label
from hardpatch.evaluate.classify.labelled_images import open_labelled
from hardpatch.runtime.errors import InputError
from tiny import TINY as TINY_SHAPES
from web_server import serving

TINY = {name: value for name, value in TINY_SHAPES.items() if name != "data"}
KINDS = ["csv", "paths.parquet", "images.parquet", "saved", "tar"]


@pytest.fixture
def labelled(tmp_path):
    """Opens images with these labels, written in one of the kinds of source."""

    def opened(kind, labels):
        names = [f"{number}.png" for number in range(len(labels))]
        write(tmp_path, *names)
        path = tmp_path / f"set.{kind}"
        if kind == "csv":
            rows = [f'{name},"{"" if label is None else label}"' for name, label in zip(names, labels)]
            path.write_text("\n".join(["path, label", *rows]), encoding="utf-8")
        elif kind == "paths.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"path": names, "label": labels}), path)
        elif kind == "images.parquet":
            cells = [{"bytes": png(number), "path": name} for number, name in enumerate(names)]
            pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), path)
        elif kind == "saved":
            datasets = pytest.importorskip("datasets")
            cells = [{"bytes": png(number), "path": None} for number in range(len(names))]
            features = datasets.Features(
                {
                    "image": datasets.Image(),
                    "label": datasets.Value("string" if isinstance(labels[0], str) else "float"),
                }
            )
            datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).save_to_disk(path)
        else:
            members = [(name, png(number)) for number, name in enumerate(names)]
            members += [
                (f"{number}.cls", str(label).encode()) for number, label in enumerate(labels) if label is not None
            ]
            write_tar(path, sorted(members))
        return open_source(str(path), downloads=Downloads(tmp_path / "cache"))

    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_and_two_ways_to_write_an_accent_make_no_classes(labelled, kind):
    written = ["cat", "cat ", "\tdog", "dog\n", "caf\u00e9", "cafe\u0301"]
    assert labelled(kind, written).labels == ["cat", "cat", "dog", "dog", "caf\u00e9", "caf\u00e9"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("none", [None, "", "  ", "nan", "NaN"])
def test_some_images_without_a_label_are_said_and_still_learnt_from(labelled, capfd, kind, none):
    source = labelled(kind, ["cat", "dog", none, "cat", none])
    assert values(source) == [0, 1, 2, 3, 4]
    assert source.labels is None
    assert list(source.unlabelled) == [2, 4]
    assert "2 of 5 images have none" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("kind", ["paths.parquet", "images.parquet", "saved"])
def test_not_a_number_is_no_class(labelled, kind):
    assert labelled(kind, [1.0, 0.0]).labels == ["1.0", "0.0"]
    source = labelled(kind, [1.0, float("nan"), 0.0])
    assert (source.labels, list(source.unlabelled)) == (None, [1])


def test_labels_of_one_image_that_are_several_are_no_class(labelled):
    assert labelled("paths.parquet", [["cat"], ["cat", "dog"]]).labels is None


def test_classes_that_differ_in_case_are_named(labelled, capfd):
    assert labelled("csv", ["Cat", "cat", "dog"]).labels == ["Cat", "cat", "dog"]
    assert "['Cat', 'cat'] are different classes" in " ".join(capfd.readouterr().err.split())


def test_folders_of_classes_follow_the_same_rule_about_spaces(tmp_path):
    write(tmp_path, "cat/0.png", "cat /1.png", "nan/2.png")
    assert set(open_source(str(tmp_path)).labels) == {"cat", "nan"}


def test_what_a_label_stands_for():
    assert [clean_label(value) for value in (3, "3 ", b"3", True, 2.5)] == ["3", "3", "3", "True", "2.5"]
    assert [clean_label(value) for value in (None, float("nan"), np.float32("nan"), " ", [1], {})] == [None] * 6
    assert Labels.of(["a ", None, "a", "b"]).codes.tolist() == [0, -1, 0, 1]


def test_numbers_that_stand_for_no_class_are_refused():
    assert Labels.numbered(np.array([0, -1, 2]), ["a", "b", " a"]).codes.tolist() == [0, -1, 0]
    for codes in ([-2], [3]):
        with pytest.raises(ValueError, match="3 names"):
            Labels.numbered(np.array(codes), ["a", "b", "c"])


def test_a_table_with_some_labels_is_learnt_from_and_not_evaluated_with(tmp_path):
    write(tmp_path, *(f"{number}.png" for number in range(12)))
    rows = [f"{number}.png,{'' if number == 1 else 'ab'[number % 2]}" for number in range(12)]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *rows]))
    result = pretrain(tmp_path / "table.csv", tmp_path / "run", **TINY | {"batch_size": 4, "epochs": 1})
    assert result["steps"] == 3
    with pytest.raises(InputError, match=r"has no labels.*1 of 12 images have none, .*1\.png first"):
        open_labelled(str(tmp_path / "table.csv"), str(tmp_path / "table.csv"), Config())


# Members of archives


def archive(path, *members, mode="w", **options):
    """A tar of files (bytes), hard links (("hard", target)) and symbolic links (("symbolic", target))."""
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = (
                    {"hard": tarfile.LNKTYPE, "symbolic": tarfile.SYMTYPE}[content[0]],
                    content[1],
                )
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_an_archive_are_what_they_lead_to(tmp_path, mode):
    members = [
        ("a/0.png", png(0)), ("a/0.cls", b"x"), ("a/1.png", ("hard", "a/0.png")), ("a/1.cls", ("hard", "a/0.cls")),
        ("b/2.png", ("symbolic", "../a/3.png")), ("b/2.cls", b"y"), ("a/3.png", png(3)),
        ("a/3.cls", ("symbolic", "0.cls")),
        ("c/4.png", ("symbolic", "../b/2.png")), ("c/4.cls", ("hard", "b/2.cls")), ("blob", png(5)),
        ("5.png", ("symbolic", "./blob")), ("5.cls", b"x"),
    ]  # fmt: skip
    source = open_source(archive(tmp_path / f"s.tar{'.gz' if 'gz' in mode else ''}", *members, mode=mode))
    assert values(source) == [0, 0, 3, 3, 3, 5]
    assert source.labels == ["x", "x", "y", "x", "y", "x"]


def test_links_that_lead_nowhere_are_counted_and_said(tmp_path, capfd):
    members = [
        ("0.png", png(0)), ("1.png", ("symbolic", "/elsewhere/1.png")), ("2.png", ("hard", "9.png")),
        ("3.png", ("symbolic", "4.png")), ("4.png", ("symbolic", "3.png")), ("readme", ("symbolic", "nowhere")),
    ]  # fmt: skip
    assert values(open_source(archive(tmp_path / "s.tar", *members))) == [0]
    assert "4 members are links to what is not in their archive" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_an_image_that_is_stored_without_its_zeros_is_refused_by_name(tmp_path, form):
    with (tmp_path / "0.tif").open("wb") as file:
        file.write(png(0))
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    command = f"tar --sparse --format {form} -cf s.tar 0.tif"
    if os.system(f"cd {tmp_path} && {command}"):
        pytest.skip("no tar that stores files in pieces")
    assert "0.tif is stored without its zeros" in refusal(tmp_path / "s.tar")


@pytest.mark.parametrize("stem", ["{000..003}_0", "v1.5", "a.b.c"])
def test_a_label_beside_a_stem_with_dots(tmp_path, stem):
    members = []
    for number in range(3):
        members += [(f"{stem}.{number}.png", png(number)), (f"{stem}.{number}.cls", b"xyz"[number : number + 1])]
    source = open_source(archive(tmp_path / "s.tar", *members))
    assert values(source) == [0, 1, 2]
    assert source.labels == ["x", "y", "z"]


def test_what_is_known_of_an_archive_is_kept_with_what_was_left_out(tmp_path):
    (tmp_path / "site").mkdir()
    members = [("0.png", png(0)), ("1.png", ("hard", "9.png"))]
    archive(tmp_path / "site" / "s.tar", *members)
    with serving(tmp_path / "site") as server:
        for _ in range(2):
            source = open_source(f"{server.url}/s.tar", downloads=Downloads(tmp_path / "cache"))
            assert isinstance(source, ShardSource)
            assert "1 members" in source.left_out()
