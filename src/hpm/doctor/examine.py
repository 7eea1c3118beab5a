"""Everything that ``hpm doctor`` looks at, in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from hpm.doctor import surroundings
from hpm.doctor.config import DoctorConfig
from hpm.doctor.findings import Finding
from hpm.doctor.software import look_at_software


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Look at one thing after the other; each finding comes as soon as it is there.

    What needs torch is left out where torch cannot be imported.
    """
    findings = []
    for finding in _examine_alone(config):
        findings.append(finding)
        yield finding
    if os.environ.get("WORLD_SIZE", "1") != "1" and not any(finding.state == "problem" for finding in findings):
        from hpm.doctor.processes import look_at_processes

        yield from look_at_processes(config.device, findings)


def _examine_alone(config: DoctorConfig) -> Iterator[Finding]:
    yield from look_at_software()
    yield surroundings.look_at_processors(os.environ)
    yield surroundings.look_at_shared_memory()
    yield surroundings.look_at_open_files()
    yield from surroundings.look_at_settings(os.environ)
    yield surroundings.look_at_folder(config.out)
    on_device = try_apart("device", config.device, seconds=config.seconds)
    yield from on_device
    if any(finding.state == "problem" for finding in on_device):
        return

    from hpm.data.cache import free_memory

    yield surroundings.look_at_memory(free_memory())
    if config.compile == "on" or (config.compile == "auto" and _is_cuda(config)):
        yield from try_apart("compilation", config.device, seconds=config.seconds)
    yield from try_apart("data processes", seconds=config.seconds)
    if config.data:
        yield from try_apart("images", config.data, seconds=config.seconds)


def try_apart(trial: str, *arguments: str, seconds: float) -> list[Finding]:
    """The findings of one of :data:`hpm.doctor.trials.TRIALS`, or how it ended without any.

    Args:
        trial: Its name.
        arguments: What it is given.
        seconds: It is ended after so long.
    """
    command = [sys.executable, "-m", "hpm.doctor.trials", trial, *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        advice = "it hangs, or is very slow: try again with --seconds 600"
        return [Finding(trial, "problem", f"not done after {seconds:g} s", advice)]
    lines = ended.stdout.splitlines()
    try:
        return [Finding(*found) for found in json.loads(lines[-1])]
    except (IndexError, ValueError, TypeError):
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        how = f"ended by {signal.Signals(-ended.returncode).name}" if ended.returncode < 0 else "failed"
        return [
            Finding(trial, "problem", f"{how}: {said[-1].strip() if said else 'without a word'}", _what_to_do(ended))
        ]


def _what_to_do(ended: subprocess.CompletedProcess[str]) -> str:
    """About a trial that ended without findings."""
    if ended.returncode == -signal.SIGBUS:
        return "shared memory is full: start the container with --shm-size 8g, or give --workers 0"
    if ended.returncode == -signal.SIGKILL:
        return "the system ended it, most likely for memory"
    if "torchvision::" in ended.stderr or "undefined symbol" in ended.stderr:
        return "torch and torchvision do not match: install both anew, by the constraints file"
    if "InputError" in ended.stderr:
        return ""
    return "python -m hpm.doctor.trials shows all of it; packages above that do not match are the likely cause"


def _is_cuda(config: DoctorConfig) -> bool:
    from hpm import distributed

    return distributed.choose_device(config.device).type == "cuda"


def summary(findings: list[Finding]) -> dict[str, Any]:
    """As in the ``--json`` line."""
    count = {state: sum(finding.state == state for finding in findings) for state in ("problem", "warning", "note")}
    return {
        "checks": [finding._asdict() for finding in findings],
        "problems": count["problem"],
        "warnings": count["warning"],
        "notes": count["note"],
    }
