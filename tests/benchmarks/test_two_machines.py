"""Two machines joined by a cable that is pulled: see ``benchmarks/two_machines.py``."""

import importlib.util

import pytest

from places import ROOT


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_who_waits_behind_a_pulled_cable_says_so_and_the_same_command_goes_on(tmp_path):
    two_machines = script("two_machines")
    if reason := two_machines.why_not():
        pytest.skip(reason)
    with two_machines.Machines() as machines:
        found = two_machines.pull(machines, tmp_path, 0.3)
    assert found["exit codes"] == [3, 3]
    assert found["both said for whom they waited"]
    assert found["checkpoint named"]
    assert found["exit codes of the same command again"] == [0, 0]
    assert found["largest difference to a run that was not cut"] == 0
