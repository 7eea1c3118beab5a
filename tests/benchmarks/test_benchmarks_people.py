"""People's files (``benchmarks/people_files.py``): a slice of the machine, and that it finds what it is for."""

import json
import os
import subprocess
import sys

import pytest

from places import ROOT

SEED = 7
PLANTED = """
import sys
sys.path.insert(0, {folder!r})
import people_files
from people_cases import Case
{fault}
cases = [Case.of({seed}, n, dict(sources=["folder"], formats=["png"], names=["spaces"], places=["absolute"],
                                 commands=[{command!r}])) for n in range(3)]
for outcome in people_files.run_all(cases, jobs=2, limit={limit}, say=lambda *_, **__: None):
    print(outcome.kind, outcome.told)
"""


def run(*words, program=ROOT / "benchmarks" / "people_files.py"):
    return subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, timeout=540, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip


def test_a_slice_of_peoples_files(tmp_path):
    """Every source that lies on the disk; a case that fails is run again by ``--case``."""
    words = ["--seed", str(SEED), "--cases", "40", "--out", str(tmp_path), "--sources", "folder", "flat folder", "list"]
    done = run(*words, "csv", "tar", "tar.gz", "parquet", "saved")
    assert done.returncode == 0, done.stderr
    found = [row for row in json.loads((tmp_path / "found.json").read_text()) if row["kind"] != "refused"]
    assert not found, f"seed {SEED}\n{done.stdout}"


@pytest.mark.parametrize(
    ("fault", "command", "kind", "limit"),
    [
        ("import hardpatch.data.tools.stats as m; m.measure = lambda *a, **b: {}['x']", "stats", "traceback", 60),
        (
            "import hardpatch.data.tools.stats as m, time\nm.measure = lambda *a, **b: time.sleep(99)",
            "stats", "hang", 8,
        ),
        (
            "from hardpatch.data.images import decode as m; old = m.Decoder.__call__\n"
            "flipped = lambda sample: sample._replace(image=sample.image.flip(-1))\n"
            "m.Decoder.__call__ = lambda self, content: flipped(old(self, content))",
            "read", "wrong", 60,
        ),
        (
            "import hardpatch.data.tools.check.check as m; old = m.as_json\n"
            "m.as_json = lambda result: old(result) | {'damaged': [{'path': 'a', 'reason': 'b'}]}",
            "check", "blame", 60,
        ),
    ],
)  # fmt: skip
def test_the_machine_finds_what_it_is_for(tmp_path, fault, command, kind, limit):
    program = tmp_path / "planted.py"
    folder = str(ROOT / "benchmarks")
    program.write_text(PLANTED.format(folder=folder, fault=fault, command=command, seed=SEED, limit=limit))
    done = run(program=program)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {kind}, done.stdout
