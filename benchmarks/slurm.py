"""A chain of SLURM jobs that finishes by itself: two node daemons on this machine, and the batch script of the docs.

    python benchmarks/slurm.py --out benchmarks/results/slurm.json        as root, with slurm-wlm and munge installed

The script of docs/scaling.md is taken from the page, with a command small enough for this machine. SLURM stops each job
before it is done; the run has to save, leave with exit code 3 and be queued again, until the last job ends it. The
weights have to be those of a job that nobody stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from two_machines import TINY, largest_difference

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
CONFIG = """
ClusterName=hardpatch
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={port}
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
NodeName=node[1-2] NodeHostname={host} Port=[{first}-{second}] CPUs=2
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE
"""


def why_not() -> str:
    """Why there can be no cluster here; empty: there can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if sys.platform != "linux" or os.geteuid() != 0 or missing:
        return f"needs Linux, root, slurm-wlm and munge; missing: {', '.join(missing) or 'root'}"
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two nodes, as daemons on this machine; the environment in which SLURM's commands find them."""
    port = 20000 + os.getpid() % 20000
    values = {"folder": folder, "host": socket.gethostname(), "port": port, "first": port + 1, "second": port + 2}
    (folder / "slurm.conf").write_text(CONFIG.format(**values))
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    daemons = [["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge], ["slurmctld", "-D"],
               ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]]  # fmt: skip
    started = []
    try:
        for words in daemons:
            started.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.DEVNULL))  # fmt: skip
            time.sleep(1)
        until(lambda: "idle" in ask(environment, "sinfo", "-h", "-o", "%t"), 60, "nodes that are idle")
        yield environment
    finally:
        ask(environment, "scancel", "--user=root")
        with suppress(SystemExit):
            until(lambda: not ask(environment, "squeue", "-h"), 60, "end of the jobs")
        for process in reversed(started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def ask(environment: dict[str, str], *words: str) -> str:
    """What a command of SLURM's answers."""
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout


def until(holds: Any, seconds: float, what: str) -> None:
    """Wait.

    Raises:
        SystemExit: It takes too long.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"no {what} within {seconds:.0f} s")
        time.sleep(0.5)


def batch_script(words: list[str]) -> str:
    """The batch script of the docs, for two nodes, with another command."""
    script = next(block for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if "#SBATCH" in block)
    script = re.sub(r"#SBATCH .*", "#SBATCH --nodes=2 --ntasks-per-node=1 --signal=TERM@300 --requeue", script)
    # The nodes' names are no machines here, and their ports are all of one machine.
    place = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={40000 + os.getpid() % 20000}"
    script = re.sub(r"MASTER_ADDR=\$\(.*", place, script)
    command = shlex.join([sys.executable, "-m", "hardpatch", *words])
    assert "'" not in command, "it stands between quotes"
    return re.sub(r"exec python -m hardpatch [^\n]*'", f"exec {command}'", script)


def chain(environment: dict[str, str], base: Path) -> dict[str, Any]:
    """Submit the script once, stop its jobs twice as SLURM does before a limit, and see what the chain comes to."""
    words = ["pretrain", *TINY, "--epochs", "120", "--checkpoint-minutes", "10", "--log-steps", "1", "--out"]
    said, job = base / "chain.txt", submit(environment, base, "chain", [*words, str(base / "chain")])
    metrics = base / "chain" / "metrics.jsonl"
    stopped_at: list[int] = []
    for _ in range(2):
        before = steps(metrics)
        until(lambda before=before: steps(metrics) > before + 20, 240, "steps")
        ask(environment, "scancel", "--signal=TERM", job)  # to the job's processes, not to the script: as --signal does
        seen = len(stopped_at)
        until(lambda seen=seen: said.read_text().count("and saved at step") > seen, 120, "saved run")
        stopped_at.append(steps(metrics))
        until(lambda: state(environment, job) == "PENDING", 60, "job that waits again")
        ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")  # it would wait for two minutes
    until(lambda: (base / "chain" / "result.json").is_file(), 600, "result")
    until(lambda: "COMPLETED" in state(environment, job), 60, "job that is done")
    restarts = re.search(r"Restarts=(\d+)", ask(environment, "scontrol", "show", "job", job))
    submit(environment, base, "whole", [*words, str(base / "whole")])
    until(lambda: (base / "whole" / "result.json").is_file(), 600, "result of a job that nobody stops")
    weights = "checkpoints/weights.safetensors"
    return {
        "stopped at steps": stopped_at,
        "restarts": int(restarts[1]) if restarts else None,
        "end": state(environment, job),
        "largest difference to a job that nobody stopped":
            largest_difference(base / "chain" / weights, base / "whole" / weights),
    }  # fmt: skip


def submit(environment: dict[str, str], base: Path, name: str, words: list[str]) -> str:
    """Submit the script with a command; the number of the job."""
    script = base / f"{name}.sh"
    script.write_text(batch_script(words))
    output = f"--output={base / name}.txt"
    return ask(environment, "sbatch", "--parsable", "--open-mode=append", output, str(script)).strip()


def state(environment: dict[str, str], job: str) -> str:
    """Of a job: PENDING, RUNNING, COMPLETED, ..."""
    found = re.search(r"JobState=(\w+)", ask(environment, "scontrol", "show", "job", job))
    return found[1] if found else ""


def steps(metrics: Path) -> int:
    """Steps that a run has recorded."""
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def main() -> None:
    """The chain, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"skipped: {reason}")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        base.chmod(0o755)
        with cluster(base) as environment:
            found = chain(environment, base)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
