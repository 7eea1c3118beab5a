"""The cases of ``people_files.py``: what a number stands for, the command it gives, what that is held against."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import traceback
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from people_images import FORMATS, Picture, make_picture
from people_sources import SOURCES, Made, Servers, make_source

NAMES: dict[str, bytes] = {
    "plain": b"photo", "spaces": b"my  summer photo", "unicode": "größe 日本語 😀".encode(),
    "decomposed": "Cafe\u0301 Zu\u0308rich".encode(), "latin-1": b"caf\xe9 d'\xe9t\xe9",
    "shift-jis": "写真".encode("shift-jis"), "dollars": b"price_$5_to_$10", "math": rb"$\frac{a}{b}$ ^_x",
    "brackets": b"[1] {a,b} (copy)", "stars": b"st*r?", "newline": b"two\nlines", "carriage": b"return\rhere",
    "long": b"x" * 240, "case twins": b"Photo", "dash": b"-rf --help", "control": b"\x1b[31mred\x07\x08",
    "quotes": b"it's \"quoted\" `here`", "backslash": rb"a\b\n", "percent": b"100%20 %s", "hash": b"#1?a=b&c",
    "comma": b"a,b;c\td", "markup": b"[bold]x[/bold] <b>&amp;<b> {{y}}", "colon": b"shapes:3", "tilde": b"~nobody",
    "equals": b"--out=x", "braces": b"{000..003}", "bidi": "a\u202egpj.exe".encode(),
}  # fmt: skip
"""Words for file, class and source."""
PLACES = ("absolute", "relative", "inside", "dotdot", "link", "slash", "read-only", "nested", "bare")
"""Where the command stands to the data: ``inside`` in its folder, ``nested`` with the output below it; ``bare`` without
HOME, TERM, a writable TMPDIR and a name for the user id."""
COMMANDS = ("read", "check", "stats", "pack", "pretrain", "knn", "embed", "visualize")
TINY = [
    "--image-size", "16", "--crop-scale", "0.5", "1", "--encoder", "vit_tiny_patch16_224", "--patch-size", "4",
    "--encoder-width", "32", "--encoder-depth", "1", "--encoder-heads", "2", "--decoder-width", "32",
    "--decoder-depth", "1", "--decoder-heads", "2", "--predictor-depth", "1", "--batch-size", "4", "--epochs", "1",
    "--precision", "float32", "--device", "cpu", "--workers", "0", "--num-figure-images", "2",
]  # fmt: skip
"""A run of two steps."""
NUM_IMAGES = 8
NOBODY = 54321
"""A user id that has no name."""
BLAMES = re.compile(r"damaged|cannot be read|missing|does not exist|skipped", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is tried, by its number."""

    seed: int
    number: int
    source: str
    format: str
    name: str
    where: str
    """What is called so: the files, a class, or the source itself."""
    place: str
    command: str
    damaged: bool
    """Is one of the images cut off?"""
    labelled: bool

    @classmethod
    def of(cls, seed: int, number: int, only: dict[str, list[str]] | None = None) -> Case:
        """The case of a number; ``only`` says which kinds are drawn from."""
        draw, only = random.Random(f"people {seed} {number}"), only or {}

        def one(kind: str, values: Any) -> str:
            return str(draw.choice(sorted(only.get(kind) or values)))

        return cls(
            seed, number, one("sources", SOURCES), one("formats", FORMATS), one("names", NAMES),
            draw.choice(("file", "class", "source")), one("places", PLACES), one("commands", COMMANDS),
            draw.random() < 0.25, draw.random() < 0.8,
        )  # fmt: skip

    @property
    def impossible(self) -> bool:
        """Can nobody have this: a name that the form of the source cannot hold?"""
        name = NAMES[self.name]
        in_text = self.where in ("file", "class")
        lines = b"\n" in name or b"\r" in name
        try:
            name.decode()
            text = True
        except UnicodeDecodeError:
            text = False
        if self.source == "list" and in_text and lines:
            return True
        if self.source in ("parquet", "parquet images", "saved", "s3 tar", "s3 csv") and not text:
            return True
        return self.source.startswith("s3") and self.where == "source" and lines

    def __str__(self) -> str:
        damaged = ", one cut off" if self.damaged else ""
        return (f"case {self.seed}-{self.number}: {self.command} of {self.source} of {self.format}, {self.where} named "
                f"{self.name}, {self.place}{'' if self.labelled else ', no labels'}{damaged}")  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """What a case came to."""

    case: Case
    kind: str
    """``well``, ``refused``, ``impossible`` or what it broke: ``traceback``, ``hang``, ``blame``, ``wrong``."""
    told: str = ""


# What is done


def command_line(case: Case, made: Made, checkpoint: Path, work: Path) -> list[str]:
    """The words after ``hardpatch``."""
    picture, out = made.pictures[0], str(work / "out")
    if case.place == "nested" and made.folder is not None:
        out = str(made.folder / "runs" / "a")
    reading = ["--channels", str(picture.channels)]
    deep = ["--value-range", *map(repr, picture.value_range)] if picture.value_range else []
    spec = made.spec
    match case.command:
        case "check":
            words = ["data", "check", spec, "--out", out, *reading, "--workers", "0", "--json"]
        case "stats":
            words = ["data", "stats", spec, *reading, *deep, "--workers", "0", "--json"]
        case "pack":
            words = ["data", "pack", spec, "--out", out, *reading, "--workers", "0", "--json"]
        case "pretrain":
            words = [
                "pretrain",
                "--recipe",
                "hpm",
                "--data",
                spec,
                "--out",
                out,
                *TINY,
                *reading,
                *deep,
                "--max-damaged",
                "0.5",
                "--json",
            ]
            words += [] if case.number % 3 == 0 else ["--no-figures"]  # which take most of the time
        case "knn":
            words = ["evaluate", "knn", "--checkpoint", str(checkpoint), "--train", spec, "--val", spec, "--k", "1",
                     "--device", "cpu", "--max-damaged", "0.5", "--json"]  # fmt: skip
        case "embed":
            words = ["embed", "--checkpoint", str(checkpoint), "--data", spec, "--out", out + ".parquet",
                     "--device", "cpu", "--max-damaged", "0.5", "--hardness", "--contact-sheet", out + ".png",
                     "--json"]  # fmt: skip
        case _:
            words = ["visualize", "--checkpoint", str(checkpoint), "--images", spec, "--out", out + ".png", "--json"]
    return words


def do_case(case: Case, servers: Servers, checkpoints: dict[int, Path], work: Path) -> Outcome:
    """Make the files, give the command, hold what it did to the four things; in a process of its own."""
    name = os.fsdecode(NAMES[case.name])
    pictures = [make_picture(case.format, n, cut=case.damaged and n == 5) for n in range(NUM_IMAGES)]
    try:
        made = make_source(case, name, pictures, work, servers)
    except OSError as error:  # a name that this file system refuses
        return Outcome(case, "impossible", str(error))
    os.chdir(made.standing)
    if case.place == "bare":
        for variable in ("HOME", "TERM", "USER", "LOGNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
            os.environ.pop(variable, None)
        os.environ["TMPDIR"] = "/nowhere"
        tempfile.tempdir = None
    if case.place in ("bare", "read-only") and os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    before = os.dup(1), os.dup(2)
    for stream, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(work / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
    checkpoint = checkpoints.get(pictures[0].channels, work)
    code = give(case, made, checkpoint, work)
    if case.place == "nested" and code == 0:  # what was written below the data is no data
        code = give(dataclasses.replace(case, command="read"), made, checkpoint, work)
    for number, old in zip((1, 2), before):
        os.dup2(old, number)
    try:
        kind = hold(case, made, work, code)
    except WrongError as wrong:
        return Outcome(case, wrong.kind, str(wrong))
    except (ValueError, KeyError) as error:  # what the command wrote cannot be opened, or lacks a column
        return Outcome(case, "wrong", f"{type(error).__name__}: {error}")
    said = (work / "stderr").read_text(errors="backslashreplace")
    told = next((line for line in said.splitlines() if line.startswith("hardpatch:")), said[-300:])
    return Outcome(case, kind, told if kind == "refused" else "")


def give(case: Case, made: Made, checkpoint: Path, work: Path) -> int:
    """Run the command in this process; its exit code."""
    from hardpatch.cli import main

    try:
        if case.command == "read":
            read_back(made, case)
        else:
            main(command_line(case, made, checkpoint, work))
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except WrongError as wrong:
        print(f"{wrong.kind}: {wrong}", file=sys.stderr)
        return {"blame": 101, "wrong": 102}[wrong.kind]
    except ValueError as error:  # as the command line does with an InputError
        if type(error).__name__ != "InputError":
            traceback.print_exc()
            return 1
        print(f"hardpatch: {error}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


# What is held against it


class WrongError(Exception):
    """What was read is not what was put in, or somebody innocent is blamed."""

    def __init__(self, kind: str, told: str) -> None:
        super().__init__(told)
        self.kind = kind


def need(condition: bool, told: str, kind: str = "wrong") -> None:
    """Raise where it is not so."""
    if not condition:
        raise WrongError(kind, told)


def read_back(made: Made, case: Case, spec: str | None = None) -> None:
    """Open the source as every command does, and hold every image against what was put in."""
    import numpy as np

    from hardpatch.data.images.decode import DecodeError, Decoder
    from hardpatch.data.sources import open_source

    first = made.pictures[0]
    source = open_source(spec or made.spec, decoder=Decoder(first.channels, first.value_range))
    need(len(source) == len(made.pictures), f"{len(source)} images instead of {len(made.pictures)}")
    left = dict(enumerate(made.pictures))
    for index in range(len(source)):
        try:
            image = source.read(index).image.double().numpy()
        except (DecodeError, OSError) as error:
            culprit = next((n for n, picture in left.items() if picture.cut), None)
            need(culprit is not None, f"an image that is whole is called damaged: {error}", "blame")
            del left[culprit]  # type: ignore[arg-type]
            continue
        same = [n for n, picture in left.items()
                if not picture.cut and picture.values.shape == image.shape
                and np.abs(picture.values - image).max() <= picture.tolerance]  # fmt: skip
        shape = image.shape, image.min(), image.max()
        need(bool(same), f"image {index} ({shape}) is none of those that were put in")
        picture = left.pop(same[0])
        if case.labelled and made.labelled:
            label = None if source.labels is None else source.labels[index]
            wanted = as_read(picture.label)
            need(label == wanted, f"label {label!r} instead of {wanted!r}")
    need(not left, f"{len(left)} images were not read")


def as_read(label: str) -> str:
    """A class as sources name it: an accent is the same however it is written."""
    return unicodedata.normalize("NFC", label.strip())


def hold(case: Case, made: Made, work: Path, code: int) -> str:
    """Hold what a command left and said against what was put in; gives the kind of outcome."""
    stderr = (work / "stderr").read_text(errors="backslashreplace")
    stdout = (work / "stdout").read_text(errors="surrogateescape")
    if code in (101, 102):
        kind, _, told = stderr.strip().splitlines()[-1].partition(": ")
        raise WrongError(kind, told)
    need("Traceback (most recent call last)" not in stderr, last_error(stderr), "traceback")
    need(code in (0, 2), f"exit code {code}: {stderr[-300:]}", "traceback")
    control = [line for line in (stdout + stderr) if ord(line) < 32 and line not in "\n\t\r"]
    need(not control, f"control characters {set(control)} reach the terminal")
    if code == 2:
        return "refused"
    good = [picture for picture in made.pictures if not picture.cut]
    cut = [picture.name for picture in made.pictures if picture.cut]
    num_cut = len(cut)
    if case.command == "read":
        return "well"
    found = json.loads(stdout.splitlines()[-1])
    match case.command:
        case "check":
            hold_damage(found["damaged"], cut, case)
            need(found["loaded"] == len(good), f"loaded {found['loaded']} of {len(good)}")
            need(not found["skipped"], f"skipped: {found['skipped']}", "blame")
        case "stats":
            need(found["images"] == len(good), f"{found['images']} of {len(good)} images")
            hold_damage(found["damaged"], cut, case)
            hold_statistics(found, good)
        case "pack":
            need(found["images"] == len(good), f"{found['images']} of {len(good)} images")
            whole = dataclasses.replace(made, pictures=good)
            read_back(whole, case, f"{found['out']}/*.tar")
        case "pretrain":
            need(found["steps"] == NUM_IMAGES // 4, f"{found['steps']} steps")
        case "knn":
            need(found["num_train"] == len(good), f"{found['num_train']} of {len(good)} images")
            need(found["top1"] == 100, f"nearest neighbours of the same images: {found['top1']} %")
        case "embed":
            hold_table(Path(found["out"]), made, case, good)
    noise = [line for line in stderr.splitlines() if re.search(r"\w+Warning: ", line)]
    need(not noise, "; ".join(noise)[:300], "noise")
    blamed = [line for line in stderr.splitlines() if BLAMES.search(line) and "pixels" not in line]
    need(bool(num_cut) or not blamed, f"blames somebody: {blamed[:1]}", "blame")
    return "well"


def hold_damage(damaged: list[dict[str, str]], cut: list[str], case: Case) -> None:
    """Only what was cut off is called damaged, by its own name where files have one."""
    need(len(damaged) == len(cut), f"damaged: {damaged}, cut off: {cut}", "blame")
    if case.source in ("folder", "flat folder", "list", "csv", "parquet"):
        wrong = [item["path"] for item, name in zip(damaged, cut) if not item["path"].endswith(name)]
        need(not wrong, f"damaged: {wrong}, cut off: {cut}", "blame")


def hold_statistics(found: dict[str, Any], good: list[Picture]) -> None:
    """Mean and deviation over all pixels, by the definition."""
    import numpy as np

    pixels = np.concatenate([picture.values.reshape(picture.channels, -1) for picture in good], axis=1) / 255
    loose = 2e-2 if any(picture.tolerance > 1 for picture in good) else 2e-3
    for name, wanted in (("mean", pixels.mean(1)), ("std", pixels.std(1))):
        need(bool(np.allclose(found[name], wanted, atol=loose)), f"{name} {found[name]} instead of {wanted.tolist()}")


def hold_table(file: Path, made: Made, case: Case, good: list[Picture]) -> None:
    """Rows, labels and paths of an embedding."""
    import pyarrow.parquet

    with file.open("rb") as content:  # a name that is no UTF-8 it cannot open
        table = pyarrow.parquet.read_table(content)
    need(table.num_rows == len(good), f"{table.num_rows} rows of {len(good)} images")
    if case.labelled and made.labelled:
        labels, wanted = Counter(table["label"].to_pylist()), Counter(as_read(picture.label) for picture in good)
        need(labels == wanted, f"labels {labels} instead of {wanted}")
    need(len(set(table["path"].to_pylist())) == len(good), "two images of one path")


def last_error(stderr: str) -> str:
    """The last line of the last traceback, with the place where it was raised."""
    told = stderr[stderr.rfind("Traceback (most recent call last)") :].strip().splitlines() or [""]
    places = [line.strip() for line in told if re.match(r'\s+File ".*hardpatch/', line)]
    words = next((line for line in told[1:] if line and not line.startswith(" ")), told[-1])
    place = re.sub(r'File ".*hardpatch/|", line \d+', "", places[-1]) if places else ""
    return f"{words[:250]} ({place})"
