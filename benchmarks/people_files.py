"""People's files, made up: sources, formats, names and places crossed with commands, on tiny images.

    python benchmarks/people_files.py --cases 2000 --seed 0 --jobs 2 --out found/
    python benchmarks/people_files.py --case 0-1234                  # one case again, with all that it said
    python benchmarks/people_files.py --cases 500 --sources tar csv  # some kinds alone

A case is a number: with the seed it decides everything (``people_images.py`` makes the images). Each runs in a process
of its own, forked from one that has imported everything, under a time limit, and is held to four things:

- no traceback: the exit code is 0, or 2 with a message that says what is wrong with what was given;
- no hang: it ends within its limit;
- no innocent blamed: what is called damaged, skipped or missing is what was damaged;
- what was read is what was put in: every image with its pixels and its label, in tables and shards, too.

A case that is refused (exit code 2) is listed with its message, as only a person can say whether that is right; where
the case says what must be refused (``Case.refusal``), anything else is a finding. Findings of the same words are one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from people_images import FORMATS, Picture, make_picture
from people_sources import SOURCES, Made, Servers, make_source

NAMES: dict[str, bytes] = {
    "plain": b"photo", "spaces": b"my  summer photo", "unicode": "größe 日本語 😀".encode(),
    "decomposed": "Cafe\u0301 Zu\u0308rich".encode(), "latin-1": b"caf\xe9 d'\xe9t\xe9", "shift-jis": "写真".encode("shift-jis"),
    "dollars": b"price_$5_to_$10", "math": rb"$\frac{a}{b}$ ^_x", "brackets": b"[1] {a,b} (copy)", "stars": b"st*r?",
    "newline": b"two\nlines", "carriage": b"return\rhere", "long": b"x" * 240, "case twins": b"Photo",
    "dash": b"-rf --help", "control": b"\x1b[31mred\x07\x08", "quotes": b"it's \"quoted\" `here`", "backslash": rb"a\b\n",
    "percent": b"100%20 %s", "hash": b"#1?a=b&c", "comma": b"a,b;c\td", "markup": b"[bold]x[/bold] <b>&amp;</b> {{y}}",
    "colon": b"shapes:3", "tilde": b"~nobody", "equals": b"--out=x", "braces": b"{000..003}", "bidi": "a\u202egpj.exe".encode(),
}  # fmt: skip
"""Words for file, class and source."""
PLACES = ("absolute", "relative", "inside", "dotdot", "link", "slash", "read-only", "nested", "bare")
"""Where the command stands to the data: ``inside`` in its folder, ``nested`` with the output below it; ``bare`` without
HOME, TERM, a writable TMPDIR and a name for the user id."""
COMMANDS = ("read", "check", "stats", "pack", "pretrain", "knn", "embed", "visualize")
TINY = ["--image-size", "16", "--crop-scale", "0.5", "1", "--encoder", "vit_tiny_patch16_224", "--patch-size", "4", "--encoder-width", "32", "--encoder-depth", "1", "--encoder-heads", "2", "--decoder-width", "32", "--decoder-depth", "1", "--decoder-heads", "2", "--predictor-depth", "1", "--batch-size", "4", "--epochs", "1", "--precision", "float32", "--device", "cpu", "--workers", "0", "--num-figure-images", "2"]  # fmt: skip
PRELOADED = (
    "aiohttp", "boto3", "datasets", "encodings.idna", "encodings.utf_8_sig", "encodings.unicode_escape", "fsspec.implementations.http",
    "importlib.readers", "importlib.resources.readers", "jinja2.ext", "matplotlib.backends.backend_agg", "numpy.random", "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin", "pyarrow.dataset",
    "pyarrow.parquet", "rich.progress", "s3fs", "simplejpeg", "tensorboard", "tifffile", "torch.utils.tensorboard", "tyro", "zoneinfo",
)  # fmt: skip
NUM_IMAGES = 8
NOBODY = 54321
"""A user id that has no name."""
LIMIT = 60.0
"""Seconds that a case may take on a quiet machine."""
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
            return draw.choice(sorted(only.get(kind) or values))

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
        out = os.path.join(os.fsdecode(made.folder), "runs", "a")
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
            words = ["pretrain", "--data", spec, "--out", out, *TINY, *reading, *deep, "--max-damaged", "0.5", "--json"]
        case "knn":
            words = ["evaluate", "knn", "--checkpoint", str(checkpoint), "--train", spec, "--val", spec, "--k", "1",
                     "--device", "cpu", "--max-damaged", "0.5", "--json"]  # fmt: skip
        case "embed":
            words = ["embed", "--checkpoint", str(checkpoint), "--data", spec, "--out", out + ".parquet",
                     "--device", "cpu", "--max-damaged", "0.5", "--hardness", "--contact-sheet", out + ".png",
                     "--json"]  # fmt: skip
        case _:
            words = ["visualize", "--checkpoint", str(checkpoint), "--images", spec, "--out", out + ".png", "--json"]
    return [word if not word.startswith("-") or (word.startswith("--") and word != spec) else word for word in words]


def do_case(case: Case, servers: Servers, checkpoints: dict[int, Path], work: Path) -> Outcome:
    """Make the files, give the command, hold what it did to the four things; in a process of its own."""
    name = NAMES[case.name]
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
    code = give(case, made, checkpoints[pictures[0].channels], work)
    for number, old in zip((1, 2), before):
        os.dup2(old, number)
    try:
        kind = hold(case, made, work, code)
    except WrongError as wrong:
        return Outcome(case, wrong.kind, str(wrong))
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


def start_child(run: Any, work: Path) -> int:
    """A process that writes what ``run`` gives to ``outcome.json``; its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), "utf-8", write_through=True)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), "utf-8", "backslashreplace", write_through=True)  # noqa: SIM115
        found = run()
        (work / "outcome.json").write_text(json.dumps({"kind": found.kind, "told": found.told}, default=repr))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
            need(label == picture.label, f"label {label!r} instead of {picture.label!r}")
    need(not left, f"{len(left)} images were not read")


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
    num_cut = len(made.pictures) - len(good)
    if case.command == "read":
        return "well"
    found = json.loads(stdout.splitlines()[-1])
    match case.command:
        case "check":
            need(len(found["damaged"]) == num_cut, f"damaged: {found['damaged']}", "blame")
            need(found["loaded"] == len(good), f"loaded {found['loaded']} of {len(good)}")
            need(not found["skipped"], f"skipped: {found['skipped']}", "blame")
        case "stats":
            need(found["images"] == len(good), f"{found['images']} of {len(good)} images")
            need(len(found["damaged"]) == num_cut, f"damaged: {found['damaged']}", "blame")
            hold_statistics(found, good)
        case "pack":
            need(found["images"] == len(good), f"{found['images']} of {len(good)} images")
            whole = dataclasses.replace(made, pictures=good)
            read_back(whole, case, os.path.join(found["out"], "*.tar"))
        case "pretrain":
            need(found["steps"] == NUM_IMAGES // 4, f"{found['steps']} steps")
        case "knn":
            need(found["num_train"] == len(good), f"{found['num_train']} of {len(good)} images")
            need(found["top1"] == 100, f"nearest neighbours of the same images: {found['top1']} %")
        case "embed":
            hold_table(Path(found["out"]), made, case, good)
    blamed = [line for line in stderr.splitlines() if BLAMES.search(line) and "pixels" not in line]
    need(bool(num_cut) or not blamed, f"blames somebody: {blamed[:1]}", "blame")
    return "well"


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

    table = pyarrow.parquet.read_table(file)
    need(table.num_rows == len(good), f"{table.num_rows} rows of {len(good)} images")
    if case.labelled and made.labelled:
        labels, wanted = Counter(table["label"].to_pylist()), Counter(picture.label for picture in good)
        need(labels == wanted, f"labels {labels} instead of {wanted}")
    need(len(set(table["path"].to_pylist())) == len(good), "two images of one path")


def last_error(stderr: str) -> str:
    """The last line of the last traceback, with the place where it was raised."""
    told = stderr[stderr.rfind("Traceback (most recent call last)") :].strip().splitlines() or [""]
    places = [line.strip() for line in told if re.match(r'\s+File ".*hardpatch/', line)]
    words = next((line for line in told[1:] if line and not line.startswith(" ")), told[-1])
    place = re.sub(r'File ".*hardpatch/|", line \d+', "", places[-1]) if places else ""
    return f"{words[:250]} ({place})"


def outcome_of(case: Case, work: Path, *, hung: bool) -> Outcome:
    """What a child left."""
    log = (work / "log").read_text(errors="backslashreplace") if (work / "log").is_file() else ""
    if hung:
        said = (work / "stderr").read_text(errors="backslashreplace") if (work / "stderr").is_file() else log
        return Outcome(case, "hang", said[-300:])
    if not (work / "outcome.json").is_file():
        return Outcome(case, "machine", log[-600:])
    return Outcome(case, **json.loads((work / "outcome.json").read_text()))


def make_checkpoints(root: Path) -> dict[int, Path]:
    """A run of each number of channels, for the commands that need one."""
    from people_images import CHANNELS

    found = {}
    for channels in CHANNELS:
        folder = root / f"photos-{channels}"
        folder.mkdir(parents=True)
        import numpy as np

        for n in range(NUM_IMAGES):
            np.save(folder / f"{n}.npy", np.random.default_rng(n).integers(0, 256, (16, 16, channels), dtype=np.uint8))
        run = root / f"run-{channels}"
        words = [
            "pretrain",
            "--data",
            str(folder),
            "--out",
            str(run),
            *TINY,
            "--channels",
            str(channels),
            "--no-figures",
        ]

        work = root / f"made-{channels}"
        work.mkdir()

        def train(words: list[str] = words) -> None:
            from hardpatch.cli import main

            main(words)

        os.waitpid(start_child(train, work), 0)
        assert (run / "result.json").is_file(), (work / "log").read_text()
        found[channels] = run
    return found


def shape_of(told: str) -> str:
    """Words without what differs from case to case."""
    told = re.sub(r"/\S*people-\S*|'[^']*'|\"[^\"]*\"", "…", told)
    return re.sub(r"\d[\d.,]*", "N", told)[:160]


def table(outcomes: list[Outcome]) -> str:
    """Markdown: how many of each outcome, then every kind of finding with its count and the first cases."""
    counts = Counter(outcome.kind for outcome in outcomes)
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.most_common()), ""]
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind not in ("well", "impossible"):
            groups[
                outcome.kind, outcome.case.command if outcome.kind != "refused" else "", shape_of(outcome.told)
            ].append(outcome)
    lines += ["| kind | command | cases | first | said |", "|---|---|---:|---|---|"]
    for (kind, command, _), members in sorted(
        groups.items(), key=lambda item: (item[0][0] == "refused", -len(item[1]))
    ):
        first = members[0]
        told = first.told.replace("|", "\\|").replace("\n", " ")[:240]
        lines.append(f"| {kind} | {command} | {len(members)} | {first.case} | {told} |")
    return "\n".join(lines) + "\n"


def run_all(
    cases: list[Case], *, jobs: int, limit: float = LIMIT, keep: bool = False, say: Any = print
) -> list[Outcome]:
    """Every case, several at once."""
    for module in PRELOADED:  # a user id that has no name may not be allowed to read them
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    import torch

    import hardpatch.cli
    import hardpatch.data.tools.check.check
    import hardpatch.data.tools.pack
    import hardpatch.embed.embed
    import hardpatch.evaluate.classify.knn
    import hardpatch.figures.hardness
    import hardpatch.training.pretrain  # noqa: F401

    torch.set_num_threads(1)
    os.umask(0)
    root = Path(tempfile.mkdtemp(prefix="people-"))
    os.chmod(root, 0o777)
    outcomes: list[Outcome] = []
    running: dict[int, tuple[Case, Path, float]] = {}
    waiting = [case for case in cases if not case.impossible]
    outcomes += [Outcome(case, "impossible") for case in cases if case.impossible]
    try:
        with Servers(root) as servers:
            sources = {case.source.split()[0] for case in waiting}
            servers.start(web="http" in sources, store="s3" in sources)
            checkpoints = make_checkpoints(root)
            while waiting or running:
                while waiting and len(running) < jobs:
                    case = waiting.pop(0)
                    work = root / f"{case.seed}-{case.number}"
                    work.mkdir()
                    child = start_child(lambda: do_case(case, servers, checkpoints, work), work)  # noqa: B023
                    running[child] = case, work, time.monotonic()
                for child, (case, work, start) in list(running.items()):
                    done, _ = os.waitpid(child, os.WNOHANG)
                    hung = not done and time.monotonic() - start > limit * jobs
                    if hung:
                        os.killpg(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                    if done or hung:
                        outcomes.append(outcome_of(case, work, hung=hung))
                        del running[child]
                        if not keep:
                            shutil.rmtree(work, ignore_errors=True)
                        if len(outcomes) % 100 == 0:
                            say(
                                f"{len(outcomes)} of {len(cases)}: {Counter(found.kind for found in outcomes)}",
                                flush=True,
                            )
                time.sleep(0.005)
        return outcomes
    finally:
        if keep:
            say(f"files: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--case", help="SEED-NUMBER: one case again")
    parser.add_argument("--out", type=Path)
    for kind in ("sources", "formats", "names", "places", "commands"):
        parser.add_argument(f"--{kind}", nargs="+", default=[])
    asked = parser.parse_args()
    only = {kind: getattr(asked, kind) for kind in ("sources", "formats", "names", "places", "commands")}
    if asked.case:
        seed, _, number = asked.case.partition("-")
        cases = [Case.of(int(seed), int(number), only)]
    else:
        cases = [Case.of(asked.seed, asked.first + n, only) for n in range(asked.cases)]
    print(f"seed {asked.seed}, cases {cases[0].number} to {cases[-1].number}", flush=True)
    start = time.monotonic()
    outcomes = run_all(cases, jobs=asked.jobs, keep=bool(asked.case))
    told = f"{len(cases)} cases of seed {asked.seed} in {time.monotonic() - start:.0f} s: {table(outcomes)}"
    print(told)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "table.md").write_text(told)
        rows = [dataclasses.asdict(outcome) for outcome in outcomes if outcome.kind not in ("well", "impossible")]
        (asked.out / "found.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
