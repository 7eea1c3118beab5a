"""People's files (``benchmarks/people_files.py``): a slice of the machine, and that it finds what it is for."""

import json
import os
import subprocess
import sys

import pytest

from places import ROOT

SEED = 7
PLANTED = """
import sys, time
sys.path.insert(0, {folder!r})
import people_files
from people_cases import Case
from hardpatch.data.images import decode
from hardpatch.data.tools import pack, stats
from hardpatch.data.tools.check import check

def fault(*_, **__):
    return {{}}["fault"]

stats.measure = fault                                   # a traceback
pack.run = lambda config: time.sleep(99)                # a hang
check.as_json = lambda result, old=check.as_json: old(result) | {{"damaged": [{{"path": "a", "reason": "b"}}]}}

def flipped(self, content, old=decode.Decoder.__call__):
    return old(self, content)._replace(image=old(self, content).image.flip(-1))

decode.Decoder.__call__ = flipped                       # other pixels
kinds = dict(sources=["folder"], formats=["png"], names=["spaces"], places=["absolute"])
cases = [Case.of({seed}, n, kinds | dict(commands=[name])) for n, name in enumerate(["stats", "pack", "check", "read"])]
for outcome in people_files.run_all(cases, jobs=2, limit=8, say=lambda *_, **__: None):
    print(outcome.case.command, outcome.kind)
"""


def run(*words, program=ROOT / "benchmarks" / "people_files.py"):
    return subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, timeout=540, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip


SOURCES = ("folder", "flat folder", "list", "csv", "tar", "tar.gz", "parquet", "parquet images", "saved")
"""Those that need no server."""
NAMES = ("plain", "spaces", "unicode", "decomposed", "latin-1", "shift-jis", "dollars", "math", "brackets", "stars",
         "long", "case twins", "dash", "control", "quotes", "backslash", "percent", "hash", "markup", "colon", "tilde",
         "equals")  # fmt: skip
PLACES = ("absolute", "relative", "inside", "dotdot", "link", "slash", "read-only", "nested")
REFUSED = ("has no labels", "Missing value for argument")
"""Why a case may be refused: nearest neighbours without labels; a source whose name begins like a flag."""


@pytest.mark.slow
def test_a_slice_of_peoples_files(tmp_path):
    """No traceback, no hang, no innocent blamed, read as put in; a case that fails is run again by ``--case``."""
    kinds = ["--sources", *SOURCES, "--names", *NAMES, "--places", *PLACES]
    done = run("--seed", str(SEED), "--cases", "30", "--out", str(tmp_path), *kinds)
    assert done.returncode == 0, done.stderr
    found = [
        row
        for row in json.loads((tmp_path / "found.json").read_text())
        if row["kind"] != "refused" or not any(words in row["told"] for words in REFUSED)
    ]
    assert not found, f"seed {SEED}\n{done.stdout}"


@pytest.mark.slow
def test_the_machine_finds_what_it_is_for(tmp_path):
    program = tmp_path / "planted.py"
    program.write_text(PLANTED.format(folder=str(ROOT / "benchmarks"), seed=SEED))
    done = run(program=program)
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found == {"stats": "traceback", "pack": "hang", "check": "blame", "read": "wrong"}
