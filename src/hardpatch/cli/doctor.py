"""``hardpatch doctor``."""

from __future__ import annotations

import os
import signal
import sys
import textwrap

from hardpatch.cli.flags import parse
from hardpatch.cli.output import complain, print_json, show
from hardpatch.runtime.text import quoted
from hardpatch.tools.doctor import Finding

WIDTH = 110
MARKS = {"ok": "ok", "note": "--", "warning": "!", "problem": "!!"}


def doctor(arguments: list[str]) -> None:
    """``hardpatch doctor``."""
    from hardpatch.tools.doctor.surroundings import look_at_software

    try:
        from hardpatch.config.commands import DoctorConfig
        from hardpatch.tools.doctor.examine import examine, summary

        config, as_json = parse(DoctorConfig, "doctor", arguments)
    except ImportError:  # what reads the flags is missing, and so may be other things
        for finding in look_at_software():
            _show(finding)
        raise SystemExit(2) from None

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is being tried is ended, too
    is_main = os.environ.get("RANK", "0") == "0"
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if is_main:
            _show(finding)
        elif finding.state == "problem" and ", process " not in finding.about:
            complain(f"{finding.about}: {finding.found}")  # the main process may never hear of it
    result = summary(findings)
    if is_main:
        show(f"\n{_count(result['problems'], 'problem')}, {_count(result['warnings'], 'warning')}")
        if result["problems"]:
            show("next:  mend what is marked !! and run hardpatch doctor again")
        else:
            images = quoted(config.data) if config.data else "shapes:2000"
            show(f"next:  hardpatch plan --data {images} --budget 8h    # what is possible here")
        if as_json:
            print_json(result)
    if result["problems"]:
        sys.stdout.flush()
        raise SystemExit(2)


def _show(finding: Finding) -> None:
    lines = textwrap.wrap(f"{finding.about}: {finding.found}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    if finding.advice:
        lines += textwrap.wrap(
            f"-> {finding.advice}", WIDTH, initial_indent="  ", subsequent_indent="     ", break_on_hyphens=False
        )
    for number, line in enumerate(lines):
        show(f"{MARKS[finding.state] if number == 0 else '':<3} {line}", flush=True)


def _count(number: int, name: str) -> str:
    return f"{number or 'no'} {name}{'' if number == 1 else 's'}"
