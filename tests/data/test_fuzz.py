"""Thousands of damaged files of every format, decoded in a process of bounded memory and time.

The default is a part of it; all of it: ``HPM_FUZZ_CASES=10000 pytest tests/test_fuzz.py``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFile

import fuzzing
from hardpatch.data.images.decode import Decoder

CASES = int(os.environ.get("HPM_FUZZ_CASES", "1500"))


@pytest.mark.timeout(60 + CASES // 20)
def test_damaged_files_end_in_a_picture_or_a_reason():
    """No crash, no hang, no silent wrong picture: see :func:`fuzzing.fault`."""
    words = [sys.executable, str(Path(fuzzing.__file__)), str(CASES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 + CASES // 20)
    assert done.returncode == 0, f"died in case {done.stderr[-500:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["outcomes"].values()) == CASES
    assert not found["faults"], "\n".join(found["faults"])
    assert found["slowest"][0] < 5, found["slowest"]
    assert found["megabytes"] < 500, found["megabytes"]


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff", "tiff_lzw", "dicom", "npy", "npz"])
def test_a_file_cut_off_anywhere_is_refused_or_whole(name):
    content = fuzzing.seeds()[name]
    whole = Decoder()(content)
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        assert fuzzing.fault(name, "cut", content[:length], whole) is None, length


def test_what_counts_as_a_fault(monkeypatch):
    """The judge finds what it is for: Pillow told to fill up truncated files with grey."""
    content = fuzzing.seeds()["jpeg"]
    whole = Decoder()(content)
    assert fuzzing.fault("jpeg", "cut", content[:700], whole) is None
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert fuzzing.fault("jpeg", "cut", content[:700], whole) == "another picture"
