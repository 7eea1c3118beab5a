"""A slice of ``benchmarks/chaos.py``: killed, damaged, and two at once."""

import importlib.util
import time

import numpy as np
import pytest
from PIL import Image

from places import ROOT


@pytest.fixture(scope="module")
def chaos():
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks/chaos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["kill", "damage", "twice"])
@pytest.mark.slow
def test_packing_that_is_disturbed_comes_to_the_same(tmp_path, chaos, kind):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(24):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photographs / f"{number}.png")
    job = chaos.jobs(tmp_path, photographs)["pack"]
    since = time.monotonic()
    assert chaos.run(job.words(tmp_path / "undisturbed"))[0] == 0
    usual = time.monotonic() - since
    expected = job.result(tmp_path / "undisturbed")
    for seed in (3, 4):
        row = chaos.case(kind, "pack", job, expected, usual, tmp_path, seed)
        print(row)
        assert row["verdict"] in ("same", "refused"), row
