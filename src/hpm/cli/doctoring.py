"""``hpm doctor``."""

from __future__ import annotations

import os
import sys
import textwrap

from hpm.cli.flags import parse_with_json
from hpm.cli.output import print_json

WIDTH = 110


def doctor(arguments: list[str]) -> None:
    """``hpm doctor``."""
    from hpm.doctor.config import DoctorConfig

    config, as_json = parse_with_json(DoctorConfig, "doctor", arguments)

    from hpm.doctor.examine import examine, summary

    is_main = os.environ.get("RANK", "0") == "0"
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if is_main:
            _show(finding)
    result = summary(findings)
    if is_main:
        print(f"\n{_count(result['problems'], 'problem')}, {_count(result['warnings'], 'warning')}")
        if result["problems"]:
            print("next:  mend what is marked !! and run hpm doctor again")
        else:
            print(f"next:  hpm plan --data {config.data or 'IMAGES'} --budget 8h    what is possible here")
        if as_json:
            print_json(result)
    if result["problems"]:
        sys.stdout.flush()
        raise SystemExit(2)


MARKS = {"ok": "ok", "note": "--", "warning": "!", "problem": "!!"}


def _show(finding: tuple[str, str, str, str]) -> None:
    about, state, found, advice = finding
    lines = textwrap.wrap(f"{about}: {found}", WIDTH, subsequent_indent="  ")
    if advice:
        lines += textwrap.wrap(f"-> {advice}", WIDTH, initial_indent="  ", subsequent_indent="     ")
    for number, line in enumerate(lines):
        print(f"{MARKS[state] if number == 0 else '':<3} {line}", flush=True)


def _count(number: int, name: str) -> str:
    return f"{number or 'no'} {name}{'' if number == 1 else 's'}"
