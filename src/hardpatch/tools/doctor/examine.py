"""Everything that ``hardpatch doctor`` looks at, in order."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hardpatch.config.commands import DoctorConfig
from hardpatch.runtime.machine import free_memory
from hardpatch.tools.doctor import Finding, surroundings


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Look at one thing after the other; each finding comes as soon as it is there.

    Under torchrun every process looks at its device, one of every machine at the machine, and the main one also gives
    what the others found that is not well. What needs torch is left out where torch does not work.
    """
    findings = []
    for finding in _examine_alone(config):
        findings.append(finding)
        yield finding
    if "RANK" in os.environ and torch_works(findings):
        from hardpatch.tools.doctor.processes import look_at_processes

        yield from look_at_processes(config, findings)


def torch_works(findings: list[Finding]) -> bool:
    """Did a training step succeed?"""
    return any(finding.about.startswith("training step") and finding.state == "ok" for finding in findings)


def _examine_alone(config: DoctorConfig) -> Iterator[Finding]:
    leads = os.environ.get("LOCAL_RANK", "0") == "0"
    yield from surroundings.look_at_software()
    if leads:
        yield surroundings.look_at_processors(os.environ)
        yield surroundings.look_at_memory(free_memory())
        yield surroundings.look_at_shared_memory()
        yield from surroundings.look_at_launch(os.environ)
        yield from try_apart("disk", config.out, seconds=config.seconds)
    yield from surroundings.look_at_settings(os.environ)
    on_device = try_apart("device", config.device, seconds=config.seconds)
    yield from on_device
    if not torch_works(on_device):
        return
    from hardpatch.runtime import distributed

    if distributed.is_compiled(config.compile, distributed.choose_device(config.device)):
        yield from try_apart("compilation", config.device, seconds=config.seconds)
    if leads:
        yield from try_apart("data processes", seconds=config.seconds)
        if config.data:
            yield from try_apart("images", config.data, seconds=config.seconds)


def try_apart(trial: str, *arguments: str, seconds: float) -> list[Finding]:
    """The findings of one of :data:`hardpatch.tools.doctor.trials.TRIALS`, or how it ended without any.

    Args:
        trial: Its name.
        arguments: What it is given.
        seconds: It is ended after so long.
    """
    # -P: as for the command hardpatch, modules of the current folder are not taken for installed ones.
    command = [sys.executable, "-P", "-m", "hardpatch.tools.doctor.trials", trial, *arguments]
    again = f"to see all of it: {shlex.join(command)}"
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, said = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if trial == "images":  # sets far away take their time
            return [Finding(trial, "warning", f"not done after {seconds:g} s", "try again with --seconds 600")]
        return [Finding(trial, "problem", f"not done after {seconds:g} s", f"it hangs, or is very slow; {again}")]
    finally:
        _end(child)
    try:
        return [Finding(*found) for found in json.loads(printed.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        lines = [line for line in said.splitlines() if line.strip()]
        how = f"ended by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "failed"
        told = f"{how}: {lines[-1].strip() if lines else 'without a word'}"
        killed = child.returncode == -signal.SIGKILL
        return [Finding(trial, "problem", told, "most likely for want of memory" if killed else again)]


def _end(child: subprocess.Popen[str]) -> None:
    """End a process with all that it has started; one that the system cannot end is left alone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(5)
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def summary(findings: list[Finding]) -> dict[str, Any]:
    """As in the ``--json`` line."""
    checks = [finding._asdict() for finding in findings]
    return {
        "checks": checks,
        **{f"{state}s": sum(c["state"] == state for c in checks) for state in ("problem", "warning", "note")},
    }
