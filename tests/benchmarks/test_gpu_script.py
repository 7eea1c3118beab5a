"""The script for a GPU machine keeps to its time and brings home what it has; what it runs is tested elsewhere."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from places import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def agreement():
    found = importlib.util.spec_from_file_location("cuda_agreement", SCRIPT.parent / "cuda_agreement.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["cuda_agreement"] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


@torch._dynamo.register_backend
def wrong_by_a_tenth(graph, _):
    return lambda *tensors: [1.1 * out for out in graph(*tensors)]


@pytest.mark.parametrize(("backend", "wrong"), [("eager", False), ("wrong_by_a_tenth", True)])
def test_a_compiler_that_is_wrong_is_found(backend, wrong):
    script = agreement()
    deviations = script.compiled_block(torch.device("cpu"), batch=2, tokens=9, width=32, heads=2, backend=backend)
    assert {"output", "tokens", "norm1.bias", "mlp.fc2.weight"} < deviations.keys()
    assert (max(deviations.values()) > script.TOLERANCES["compiled_block"]) == wrong
    assert not (wrong and min(deviations.values()) == 0), "every gradient is compared"


def call(out, **settings):
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "DEVICE_SMALL": "1", **settings}
    return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=240)


def summary(out):
    return json.loads((out / "summary.json").read_text())


def names_in(archive):
    with tarfile.open(archive) as found:
        return {Path(name).name for name in found.getnames()}


@pytest.mark.slow
def test_a_stage_brings_home_its_figures(tmp_path):
    done = call(tmp_path, STAGES="agreement", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (stage,) = summary(tmp_path)["stages"]
    assert (stage["stage"], stage["exit_code"]) == ("agreement", 0)
    assert "agreement.json" in names_in(tmp_path / "results.tar.gz")
    assert len(list(tmp_path.iterdir())) == 2, "more files than the two that are promised"


@pytest.mark.slow
def test_a_stage_without_time_is_left_out_and_told(tmp_path):
    done = call(tmp_path, STAGES="agreement large", TOTAL_SECONDS="40")
    assert done.returncode == 1
    assert [(stage["stage"], stage["exit_code"]) for stage in summary(tmp_path)["stages"]] == [
        ("agreement", None), ("large", None),
    ]  # fmt: skip
    assert "agreement LEFT OUT" in done.stderr


@pytest.mark.slow
def test_a_stage_that_fails_does_not_stop_the_next(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *cuda_agreement*) exit 7;; esac\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    out = tmp_path / "out"
    done = call(out, STAGES="agreement pretrain", PYTHON=str(broken), RUN=str(tmp_path / "run"), OMP_NUM_THREADS="1")
    assert done.returncode == 1
    assert [(stage["stage"], stage["exit_code"]) for stage in summary(out)["stages"]] == [
        ("agreement", 7), ("pretrain", 0),
    ]  # fmt: skip
    assert {"pretrain.json", "pretrain_metrics.jsonl"} <= names_in(out / "results.tar.gz")
