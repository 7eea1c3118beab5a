"""Segmentation and detection under torchrun: two processes share a batch, and give the figures of all images once."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("pycocotools", reason="segmentation and detection need hardpatch[dense]")
pytest.importorskip("segmentation_models_pytorch", reason="segmentation and detection need hardpatch[dense]")

from dense_run import write_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("processes") / "run")


def together(*words, processes=2):
    """The JSON line of ``hardpatch evaluate`` under torchrun, and what stood before it."""
    done = subprocess.run(
        [
            sys.executable,
            *f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m hardpatch".split(),
            "evaluate", *words, "--json",
        ],
        capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next:") == 1  # the second process is silent
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("head", "steps"),
    [
        (("--head", "linear", "--cache"), 12),  # 12 images and their mirror images in batches of 4 over both, twice
        (("--head", "upernet", "--finetune", "--width", "16"), 6),
    ],
)
@pytest.mark.slow
def test_two_processes_segment(checkpoint, tmp_path, head, steps):
    figures = together(
        "segment", "--checkpoint", str(checkpoint), "--images", "shapes:12", "--val-images", "shapes:7@1", *head,
        "--epochs", "2", "--batch-size", "4", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert figures["num_val"] == 7
    assert figures["steps"] == steps
    assert sum(item["pixels"] for item in figures["per_class"]) == 7 * 32 * 32  # every pixel once
    assert 0 <= figures["miou"] <= 100
    assert figures["untrained_miou"] is not None


@pytest.mark.slow
def test_two_processes_detect(checkpoint, tmp_path):
    figures = together(
        "detect", "--checkpoint", str(checkpoint), "--train-images", "shapes:8", "--val-images", "shapes:5@1",
        "--epochs", "1", "--batch-size", "4", "--width", "16", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert figures["num_val"] == 5
    assert figures["steps"] == 2
    assert -1 <= figures["ap"] <= 100
