"""One command at a time works in a folder."""

import json
import shutil
import subprocess
import sys

import pytest

from hardpatch.data.tools.pack import PackConfig
from hardpatch.data.tools.pack import run as pack
from hardpatch.embed.chunks import Parts
from hardpatch.runtime.claim import CLAIM, Claim
from hardpatch.runtime.errors import InputError

HOLDER = """
import sys
from pathlib import Path
from hardpatch.runtime.claim import Claim
claim = Claim(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def taken(tmp_path):
    """A folder that another process has."""
    folder = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "taken\n"
        yield folder
        holder.stdin.close()


def test_what_another_process_has_is_refused(taken):
    with pytest.raises(InputError, match="another process works in"):
        Claim(taken)


def test_parts_that_another_process_makes_are_refused(taken):
    with pytest.raises(InputError, match="another process works in"):
        Parts(taken).begin({"seed": 1})
    assert sorted(path.name for path in taken.iterdir()) == [CLAIM, ".hardpatch"]


def test_packing_where_another_process_packs_is_refused(taken, tmp_path):
    with pytest.raises(InputError, match="another process works in"):
        pack(PackConfig("shapes:8", out=str(taken)))


def test_a_folder_removed_by_whoever_had_it_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    real = sys.modules["fcntl"].lockf
    monkeypatch.setattr("fcntl.lockf", lambda *given: (shutil.rmtree(folder), real(*given)))
    with pytest.raises(InputError, match="another process works in"):
        Claim(folder)


def test_what_is_released_can_be_taken_again(tmp_path):
    parts = Parts(tmp_path / "parts")
    parts.begin({"seed": 1})
    parts.release()
    again = Parts(tmp_path / "parts")
    again.begin({"seed": 1})
    again.release()
    assert json.loads((tmp_path / "parts/settings.json").read_text()) == {"seed": 1}
