"""What ``--data`` may name, and what is said when it names nothing good."""

import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from hardpatch.data.images.decode import Decoder
from hardpatch.data.sources import class_indices, fingerprint, open_source
from hardpatch.data.sources.drawn_shapes import BACKGROUNDS, CLASSES
from hardpatch.runtime.errors import InputError


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, *names):
    """One image per name; its grey value is its position among the names."""
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def values(source):
    """Grey value of every image."""
    return [int(source.read(i).image[0, 0, 0]) for i in range(len(source))]


def refusal(spec, **arguments):
    with pytest.raises(InputError) as caught:
        open_source(str(spec), **arguments)
    return str(caught.value)


# Folders


def test_folder_holds_every_image_below_it_and_the_first_level_is_the_label(tmp_path):
    write(tmp_path, "cat/1.png", "cat/old/deep/2.PNG", "dog/3.JpG")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path))
    assert values(source) == [0, 1, 2]
    assert source.labels == ["cat", "cat", "dog"]
    assert [source.name(i) for i in range(3)] == [
        str(tmp_path / name) for name in ("cat/1.png", "cat/old/deep/2.PNG", "dog/3.JpG")
    ]


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("a/1.png", "b/2.png", "3.png"), ("only/1.png", "only/2.png")])
def test_no_labels_where_images_lie_on_top_or_in_one_folder(tmp_path, names):
    write(tmp_path, *names)
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert len(source) == len(names)


def test_hidden_files_and_folders_are_skipped(tmp_path):
    write(tmp_path, "seen.png", ".hidden.png", "._seen.png", ".cache/thumbnail.png")
    assert values(open_source(str(tmp_path))) == [0]


def test_order_does_not_depend_on_the_order_of_the_file_system(tmp_path):
    names = [f"{i:02d}.png" for i in np.random.default_rng(0).permutation(20)]
    write(tmp_path, *names)
    assert [os.path.basename(open_source(str(tmp_path)).name(i)) for i in range(20)] == sorted(names)  # noqa: PTH119


# Lists and tables


def test_list_table_and_parquet_give_the_same_images(tmp_path):
    write(tmp_path, "in/a.png", "b c.png")
    (tmp_path / "list.txt").write_text(f"in/a.png\n\n{tmp_path / 'b c.png'}\n")
    (tmp_path / "table.csv").write_text("label,path\ncat,in/a.png\ndog,b c.png\n")
    rows = {"path": ["in/a.png", "b c.png"], "label": ["cat", "dog"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "table.parquet")
    sources = [open_source(str(tmp_path / name)) for name in ("list.txt", "table.csv", "table.parquet")]
    assert [values(source) for source in sources] == [[0, 1]] * 3
    assert [source.labels for source in sources] == [None, ["cat", "dog"], ["cat", "dog"]]


def test_table_without_label_column_has_no_labels(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "table.csv").write_text("path,size\na.png,3\n")
    assert open_source(str(tmp_path / "table.csv")).labels is None


def test_table_saved_by_a_spreadsheet_with_a_byte_order_mark_is_read(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "table.csv").write_text("\ufeffpath,label\na.png,cat\n")
    assert open_source(str(tmp_path / "table.csv")).labels == ["cat"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "file,label\na.png,cat\n", "needs a column 'path', got ['file', 'label']"),
        ("t.csv", "path\na.png\nmissing.png\n", "missing.png"),
        ("t.txt", "a.png\nmissing.png\n", "lists a file that does not exist"),
        ("t.csv", "path,label\n", "no images"),
        ("t.txt", "\n\n", "no images"),
        ("t.csv", "label,path\ncat,a.png\ndog\n", "row 2"),
        ("t.parquet", "this is no parquet", "cannot read"),
        ("t.json", "{}", "must be a folder, .txt, .csv, .parquet or .tar"),
    ],
)
def test_wrong_table_is_refused_with_its_name(tmp_path, name, content, said):
    write(tmp_path, "a.png")
    (tmp_path / name).write_text(content)
    message = refusal(tmp_path / name, field="train")
    assert message.startswith("train: ")
    assert said in message
    assert name in message


def test_list_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot read" in refusal(tmp_path / "list.txt")


@pytest.mark.parametrize("name", ["list.txt", "table.csv"])
def test_names_in_a_table_are_the_bytes_of_the_disk(name, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(png())
    (tmp_path / name).write_bytes(b"path\n" * name.endswith("csv") + b"caf\xe9.png\n")
    source = open_source(str(tmp_path / name))
    assert source.name(0) == str(path)
    source.read(0)


# Shards

MEMBERS = [
    ("a/1.png", png(0)),
    ("a/1.cls", b"3\n"),
    ("b/1.cls", b"5"),
    ("readme.md", b"no image"),
    ("b/1.png", png(1)),
    ("2.PNG", png(2)),
    ("2.cls", b"7"),
]


def test_tar_and_tar_gz_give_the_same_samples(tmp_path):
    plain = open_source(write_tar(tmp_path / "a.tar", MEMBERS))
    packed = open_source(write_tar(tmp_path / "a.tar.gz", MEMBERS, "w:gz"))
    assert values(plain) == values(packed) == [0, 1, 2]
    assert plain.labels == packed.labels == ["3", "5", "7"]
    assert plain.name(1) == f"{tmp_path / 'a.tar'}:b/1"


def test_label_belongs_to_its_key_in_whatever_order_the_members_come(tmp_path):
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(MEMBERS))
        source = open_source(write_tar(tmp_path / "a.tar", [MEMBERS[i] for i in order]))
        assert dict(zip(values(source), source.labels)) == {0: "3", 1: "5", 2: "7"}


def test_no_labels_where_one_image_has_none(tmp_path):
    members = [member for member in MEMBERS if member[0] != "b/1.cls"]
    assert open_source(write_tar(tmp_path / "a.tar", members)).labels is None


@pytest.mark.parametrize("spec", ["s-{00..02}.tar", "s-{00,01,02}.tar", "s-*.tar", "s-0[0-2].tar"])
def test_braces_and_stars_name_shards_in_sorted_order(tmp_path, spec):
    for number in (2, 0, 1):
        write_tar(tmp_path / f"s-{number:02d}.tar", [("x.png", png(10 * number)), ("y.png", png(10 * number + 1))])
    assert values(open_source(str(tmp_path / spec))) == [0, 1, 10, 11, 20, 21]


def test_missing_shard_and_unbalanced_braces_are_refused(tmp_path):
    write_tar(tmp_path / "s-0.tar", MEMBERS)
    assert "no shard" in refusal(tmp_path / "s-{0..1}.tar")
    assert "s-1.tar" in refusal(tmp_path / "s-{0..1}.tar")
    assert "no shard" in refusal(tmp_path / "t-*.tar")
    assert "unbalanced braces" in refusal(tmp_path / "s-{0..1.tar")


def test_damaged_tar_is_refused_with_its_name(tmp_path):
    noise = [(f"{i}.png", os.urandom(3000)) for i in range(5)]
    plain, packed = tmp_path / "a.tar", tmp_path / "a.tar.gz"
    write_tar(plain, noise)
    write_tar(packed, noise, "w:gz")
    for path in (plain, packed):
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"junk" * 500):
            path.write_bytes(content)
            assert f"cannot read the shard {path}" in refusal(path)


def test_flipped_byte_in_a_tar_gz_is_found(tmp_path):
    path = tmp_path / "a.tar.gz"
    write_tar(path, [(f"{i}.png", os.urandom(3000)) for i in range(5)], "w:gz")
    whole = path.read_bytes()
    for offset in np.random.default_rng(0).integers(100, len(whole) - 100, 20):
        content = bytearray(whole)
        content[offset] ^= 0x55
        path.write_bytes(content)
        assert "cannot read the shard" in refusal(path)


def test_damaged_header_in_the_middle_of_a_tar_is_no_silent_end(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i}.png", png(i)) for i in range(5)])
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 0xFF
    path.write_bytes(content)
    assert "cannot read the shard" in refusal(path)


def test_label_that_is_no_text_is_refused(tmp_path):
    assert "cannot read the shard" in refusal(write_tar(tmp_path / "a.tar", [("1.cls", b"\xff\0"), ("1.png", png())]))


# Shapes


def test_shapes_have_size_labels_masks_and_levels():
    source = open_source("shapes:50", image_size=(32, 64))
    sample = source.read(7)
    assert len(source) == len(source.labels) == len(source.groups()) == 50
    assert sample.image.shape == (3, 32, 64)
    assert sample.mask.shape == (32, 64)
    assert source.labels[7] in source.name(7)


def test_shapes_with_another_seed_are_another_set():
    one, same, other = (open_source(spec, image_size=(32, 32)) for spec in ("shapes:9", "shapes:9@0", "shapes:9@1"))
    assert torch.equal(one.read(3).image, same.read(3).image)
    assert not torch.equal(one.read(3).image, other.read(3).image)


def test_backgrounds_of_shapes_may_be_the_classes_of_the_same_images():
    backgrounds = open_source("shapes:96@1:background", image_size=(32, 32))
    silhouettes = open_source("shapes:96@1", image_size=(32, 32))
    assert set(backgrounds.labels) == set(BACKGROUNDS)
    assert set(silhouettes.labels) == set(CLASSES)
    assert torch.equal(backgrounds.read(5).image, silhouettes.read(5).image)
    for name, level in zip(backgrounds.labels, backgrounds.groups()):
        assert (name == "gradient") == (level == "plain")
        assert (name == "irregular") == (level == "camouflage")
    assert open_source("shapes:96:background", image_size=(8, 8)).labels != backgrounds.labels
    assert "with :background at its end" in refusal("shapes:8:colour")


# Refusals


@pytest.mark.parametrize(
    "spec", ["shapes:x", "https://x.org/photos", "https://x.org/photo.jpg", "hf:", "hf:a/b@", "hf:a/b/c/d"]
)
def test_sources_that_are_not_read_say_so(spec):
    message = refusal(spec, field="val")
    assert message.startswith("val: ")
    assert spec.removeprefix("hf:") in message
    assert "must" in message or "neither" in message


def test_empty_spec_empty_set_and_wrong_channels_are_refused():
    assert "got nothing" in refusal("", field="train")
    assert "at least one" in refusal("shapes:0")
    assert "channels=1" in refusal("shapes:5", decoder=Decoder(1))


def test_missing_empty_and_unreadable_folders_are_refused(tmp_path, monkeypatch):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "no images in" in refusal(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(png())
    assert "got the file" in refusal(tmp_path / "photo.jpg")

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)  # root may read everything, so chmod would not do
    message = refusal(tmp_path)
    assert "Permission denied" in message
    assert str(tmp_path) in message


def test_unknown_home_folder_is_refused():
    assert "~no-such-user-here" in refusal("~no-such-user-here/photos")


def test_labels_outside_the_classes_are_refused():
    assert class_indices(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="zebra"):
        class_indices(["a", "zebra"], ["a", "b"])


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "shapes"])
def test_source_survives_pickling_for_spawned_workers(tmp_path, kind):
    write(tmp_path / "in", "x/1.png", "y/2.png")
    write_tar(tmp_path / "a.tar", MEMBERS)
    write_tar(tmp_path / "a.tar.gz", MEMBERS, "w:gz")
    spec = {"folder": tmp_path / "in", "shapes": "shapes:4"}.get(kind, tmp_path / f"a.{kind}")
    source = open_source(str(spec))
    copy = pickle.loads(pickle.dumps(source))
    assert values(copy) == values(source)
    assert copy.labels == source.labels


# Fingerprints


def test_the_fingerprint_stays_when_a_set_is_named_otherwise_or_moved(tmp_path, monkeypatch):
    write(tmp_path / "photos", "a/1.png", "a/2.png", "b/1.png")
    (tmp_path / "photos" / "list.txt").write_text("a/1.png\na/2.png\nb/1.png\n")
    monkeypatch.chdir(tmp_path)
    specs = ["photos", "photos/", "./photos", "photos/../photos", str(tmp_path / "photos"), "photos/list.txt"]
    prints = {fingerprint(open_source(spec)) for spec in specs}
    monkeypatch.chdir(tmp_path / "photos")
    prints.add(fingerprint(open_source(".")))
    (tmp_path / "photos").rename(tmp_path / "moved")
    prints.add(fingerprint(open_source(str(tmp_path / "moved"))))
    assert len(prints) == 1


def test_sets_that_differ_in_a_name_an_image_or_the_order_have_other_fingerprints(tmp_path):
    write(tmp_path / "set", "1.png", "2.png", "3.png")
    write(tmp_path / "same_names", "2.png", "3.png", "1.png")
    write(tmp_path / "other_name", "1.png", "2.png", "4.png")
    write(tmp_path / "fewer", "1.png", "2.png")
    for name, rows in (("forth", "123"), ("back", "321")):
        (tmp_path / "set" / f"{name}.txt").write_text("".join(f"{row}.png\n" for row in rows))
    specs = [tmp_path / name for name in ("set", "same_names", "other_name", "fewer", "set/back.txt")]
    specs += ["shapes:3", "shapes:3@1", "shapes:4"]
    assert len({fingerprint(open_source(str(spec))) for spec in specs}) == len(specs)
    assert fingerprint(open_source(str(tmp_path / "set/forth.txt"))) == fingerprint(open_source(str(tmp_path / "set")))


def test_moved_shards_keep_their_fingerprint_and_an_unreadable_image_does_not_stop_it(tmp_path):
    (tmp_path / "old").mkdir()
    for number in range(2):
        write_tar(tmp_path / "old" / f"s-{number}.tar", [(f"{i}.png", png(10 * number + i)) for i in range(3)])
    before = fingerprint(open_source(f"{tmp_path}/old/s-{{0..1}}.tar"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert fingerprint(open_source(f"{tmp_path}/new/*.tar")) == before
    write(tmp_path / "set", "1.png", "2.png")
    source = open_source(str(tmp_path / "set"))
    (tmp_path / "set" / "2.png").unlink()
    assert fingerprint(source).startswith("2 images, ")


# Keys with several members


def test_of_several_images_of_a_key_the_photograph_counts(tmp_path):
    members = [
        ("a/1.mask.png", png(9)), ("a/1.png", png(8)), ("a/1.jpg", png(1)), ("a/1.json", b"{}"), ("a/1.cls", b"x"),
        ("b/1.png", png(2)), ("b/1.seg.png", png(7)), ("b/1.cls", b"y"),
        ("c/photo.1.png", png(3)), ("c/photo.2.png", png(4)), ("c/photo.cls", b"z"),
    ]  # fmt: skip
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert values(source) == [1, 2, 3, 4]
    assert source.labels == ["x", "y", "z", "z"]
    assert [name.rpartition(":")[2] for name in source.names()] == ["a/1", "b/1", "c/photo.1", "c/photo.2"]


def test_a_folder_of_shards_says_how_to_name_them(tmp_path):
    write_tar(tmp_path / "a.tar", MEMBERS)
    with pytest.raises(InputError, match=r"no images in .*; it holds shards: give '.*/\*\.tar'"):
        open_source(str(tmp_path))
