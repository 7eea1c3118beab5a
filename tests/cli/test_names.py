"""Names that are not UTF-8, that hold formulas, control characters, line breaks: through every command, as they are."""

import csv
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from hardpatch.cli import main
from hardpatch.data.sources import open_source
from hardpatch.runtime.text import as_bytes, as_text, printable, quoted
from random_run import random_run
from tiny import TINY

torch.set_num_threads(1)

CLASSES = (b"price_$5_to_$10", b"caf\xe9 $", "日本_{a}^2".encode(), b"<b>[red]x")
"""Folders as people, old archives and other disks name them."""
FILES = (b"DSC_\x8a\x5c.png", b"a $b$ c.png", b"\x1b[2J\x1b[31mred.png", b"two\nlines.png", "‮gnp.png".encode())
"""The last one turns what follows around."""


@pytest.fixture
def folder(tmp_path):
    """Four classes of ten images; the last class's first one is damaged."""
    root, draw = tmp_path / "photos", np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        place = root / as_text(name)
        place.mkdir(parents=True)
        for which in range(10):
            image = Image.fromarray(draw.integers(60 * number, 60 * number + 40, (32, 32, 3), np.uint8))
            image.save(place / (as_text(FILES[which]) if which < len(FILES) else f"{which}.png"))
    (place / as_text(b"damaged \xff.png")).write_bytes(b"nothing")
    return root


@pytest.fixture
def trained(tmp_path):
    return random_run(tmp_path / "run", channels=3)


def call(capsys, *words, code=0):
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert left.value.code == code, printed.err
    for text in (printed.out, printed.err):
        assert not set(text) & {"\x1b", "\u202e"}
        text.encode()
    return printed


def figures(printed):
    return json.loads(printed.out.splitlines()[-1])


def test_printable_moves_no_cursor_and_bytes_come_back():
    for name in (*CLASSES, *FILES, bytes(range(1, 256)), "\u2028\ufeff\u200f\x85".encode()):
        text = as_text(name)
        assert as_bytes(text) == name
        shown = printable(text)
        assert shown.isprintable()
        shown.encode()
    assert printable(as_text(b"caf\xe9\x1b[2J\n")) == r"caf\xe9\x1b[2J\n"
    assert printable("one\n\ttwo\r", lines=True) == "one\n\ttwo\\r"
    assert printable("C:\\photos\\ü 日本 ±") == "C:\\photos\\ü 日本 ±"


@pytest.mark.parametrize("name", [*FILES, b"plain", b"it's $HOME", b"\xe9'\\n\\"])
def test_quoted_words_run_as_printed(name):
    line = f"printf %s {quoted(as_text(name))}"
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"}, check=True)
    assert done.stdout == name


def test_check_names_them_and_its_list_can_be_learnt_from(folder, tmp_path, capsys):
    found = figures(call(capsys, "data", "check", folder, "--out", tmp_path / "out", "--workers", "0", "--json"))
    assert (found["loaded"], len(found["damaged"])) == (40, 1)
    assert os.fsencode(found["damaged"][0]["path"]).endswith(b"damaged \xff.png")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."} == {
        "check.json", "images.csv", "good.csv", "contact_sheet.png"
    }  # fmt: skip
    good, whole = open_source(str(tmp_path / "out" / "good.csv")), open_source(str(folder))
    assert {good.name(i) for i in range(len(good))} == set(whole.names()) - {found["damaged"][0]["path"]}
    with (tmp_path / "out" / "images.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {row["path"] for row in csv.DictReader(file)} == set(whole.names())


def test_stats_and_pack(folder, tmp_path, capsys):
    assert figures(call(capsys, "data", "stats", folder, "--workers", "0", "--json"))["images"] == 40
    call(capsys, "data", "pack", folder, "--out", tmp_path / "packed", "--workers", "0", "--size", "16")
    packed = open_source(str(tmp_path / "packed" / "*.tar"))
    assert {as_bytes(label) for label in packed.labels} == set(CLASSES)
    call(capsys, "data", "pack", folder, "--out", tmp_path / "packed", "--workers", "0", "--size", "16")


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_embed_with_its_sheet(folder, trained, tmp_path, capsys, suffix):
    out, sheet = tmp_path / f"table.{suffix}", tmp_path / "sheet.png"
    words = ["embed", "--checkpoint", trained, "--data", folder, "--out", out, "--hardness", "--contact-sheet", sheet]
    call(capsys, *words, "--device", "cpu", "--max-damaged", "0.1", "--json")
    assert sheet.is_file()
    if suffix == "npz":
        with np.load(out) as table:
            assert {as_bytes(label) for label in table["label"].tolist()} == set(CLASSES)
    else:
        labels = set(parquet.read_table(out)["label"].to_pylist())
        assert labels == {printable(as_text(name)) for name in CLASSES}


def test_evaluations_draw_and_report_them(folder, trained, tmp_path, capsys):
    data = ["--checkpoint", trained, "--train", folder, "--val", folder, "--max-damaged", "0.1"]
    call(capsys, "evaluate", "knn", *data, "--k", "3", "--json")
    printed = call(capsys, "evaluate", "linear", *data, "--epochs", "2", "--json")
    assert (trained / "evaluate" / "linear_confusion.png").is_file()
    assert "could not be made" not in printed.err
    page = (trained / "report.html").read_bytes().decode()
    assert r"caf\xe9" in page
    assert "<b>[red]" not in page


def test_fine_tuning_ends_with_its_result_and_its_picture(folder, trained, tmp_path, capsys):
    out = tmp_path / "tuned"
    data = ["--checkpoint", trained, "--train", folder, "--val", folder, "--max-damaged", "0.1", "--out", out]
    words = ["evaluate", "finetune", *data, "--epochs", "1", "--batch-size", "8", "--workers", "0", "--json"]
    call(capsys, *words, "--no-untrained", "--precision", "float32")
    assert (out / "result.json").is_file()
    assert (out / "confusion.png").is_file()
    with (out / "per_class.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {as_bytes(row["name"]) for row in csv.DictReader(file)} == set(CLASSES)


def test_pretrain_leaves_a_damaged_one_out_at_every_resume(folder, tmp_path, capsys):
    run = tmp_path / "run $1"
    options = TINY | {"data": folder, "out": run, "max_damaged": 0.1, "epochs": 1, "figures": True}
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    printed = call(capsys, "pretrain", "--recipe", "hpm", *words)
    assert r"damaged \xff.png" in printed.err
    assert b"damaged \xff.png" in (run / "damaged.csv").read_bytes()
    assert "holds a finished run" in call(capsys, "pretrain", "--recipe", "hpm", *words).err
    assert (run / "report.html").read_bytes().decode()
    words[words.index(str(run))] = str(tmp_path / as_text(b"run \xe9"))
    assert "out: " in call(capsys, "pretrain", "--recipe", "hpm", *words, code=2).err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding(folder, encoding):
    """In a process of its own: what is written goes through the real streams."""
    command = [sys.executable, "-m", "hardpatch", "data", "check", str(folder), "--workers", "0"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"damaged \xff.png" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    next_line = next(line for line in done.stdout.decode(encoding).splitlines() if line.startswith("next:"))
    assert str(folder) in shlex.split(next_line)
