"""A chain of SLURM jobs (``benchmarks/slurm.py``), where SLURM is installed."""

import json
import subprocess
import sys

import pytest

from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from slurm import why_not


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_chain_of_jobs_finishes_by_itself(tmp_path):
    out = tmp_path / "slurm.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "slurm.py", "--out", out], check=True, timeout=280)
    found = json.loads(out.read_text())
    assert found["restarts"] == 2
    assert found["end"] == "COMPLETED"
    assert found["largest difference to a job that nobody stopped"] == 0
