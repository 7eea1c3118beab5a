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
import encodings
import importlib
import io
import json
import os
import pkgutil
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

from people_cases import NUM_IMAGES, TINY, Case, Outcome, do_case
from people_images import make_picture
from people_sources import Servers

LIMIT = 60.0
"""Seconds that a case may take on a quiet machine."""
PRELOADED = (
    "aiohttp", "boto3", "datasets", "fsspec.implementations.http", "importlib.readers", "importlib.resources.readers",
    "jinja2.ext", "matplotlib.backends.backend_agg", "numpy.random", "PIL.BmpImagePlugin", "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin", "pyarrow.dataset",
    "pyarrow.parquet", "rich.progress", "s3fs", "simplejpeg", "tensorboard", "tifffile", "torch.utils.tensorboard",
    "tyro", "zoneinfo",
)  # fmt: skip
"""What commands import late; another user may not be allowed to read where it is installed."""


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


def outcome_of(case: Case, work: Path, *, hung: bool) -> Outcome:
    """What a child left."""
    log = (work / "log").read_text(errors="backslashreplace") if (work / "log").is_file() else ""
    if hung:
        said = (work / "stderr").read_text(errors="backslashreplace") if (work / "stderr").is_file() else log
        return Outcome(case, "hang", said[-300:])
    if not (work / "outcome.json").is_file():
        return Outcome(case, "machine", log[-600:])
    return Outcome(case, **json.loads((work / "outcome.json").read_text()))


def make_checkpoints(root: Path, cases: list[Case]) -> dict[int, Path]:
    """A run of each number of channels that a case needs."""
    needed = {case.format for case in cases if case.command in ("knn", "embed", "visualize")}
    found = {}
    for channels in sorted({make_picture(kind, 0).channels for kind in needed}):
        folder = root / f"photos-{channels}"
        folder.mkdir(parents=True)
        import numpy as np

        for n in range(NUM_IMAGES):
            np.save(folder / f"{n}.npy", np.random.default_rng(n).integers(0, 256, (16, 16, channels), dtype=np.uint8))
        run = root / f"run-{channels}"
        words = [
            "pretrain",
            "--recipe",
            "hpm",
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
    cases: list[Case],
    *,
    jobs: int,
    limit: float = LIMIT,
    keep: bool = False,
    outcomes: list[Outcome] | None = None,
    say: Any = print,
) -> list[Outcome]:
    """Every case, several at once."""
    for module in PRELOADED:  # a user id that has no name may not be allowed to read them
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for codec in pkgutil.iter_modules(encodings.__path__, "encodings."):
        with contextlib.suppress(ImportError):
            importlib.import_module(codec.name)
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
    root.chmod(0o777)
    (root / "home").mkdir()
    os.environ["HOME"] = str(root / "home")  # downloads go with the rest, and another user may write there, too
    outcomes = [] if outcomes is None else outcomes
    running: dict[int, tuple[Case, Path, float]] = {}
    waiting = [case for case in cases if not case.impossible]
    outcomes += [Outcome(case, "impossible") for case in cases if case.impossible]
    try:
        with Servers(root) as servers:
            sources = {case.source.split()[0] for case in waiting}
            servers.start(web="http" in sources, store="s3" in sources)
            checkpoints = make_checkpoints(root, waiting)
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
                        if len(outcomes) % 50 == 0:
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
    outcomes: list[Outcome] = []
    try:
        run_all(cases, jobs=asked.jobs, keep=bool(asked.case), outcomes=outcomes)
    finally:  # also what was found until Ctrl-C
        told = f"{len(outcomes)} cases of seed {asked.seed} in {time.monotonic() - start:.0f} s: {table(outcomes)}"
        print(told)
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / "table.md").write_text(told)
            rows = [dataclasses.asdict(outcome) for outcome in outcomes if outcome.kind not in ("well", "impossible")]
            (asked.out / "found.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
