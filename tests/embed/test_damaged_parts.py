"""A part of an embedding that was damaged on the disk is made again, never read and never a traceback."""

import numpy as np
import pytest

from hardpatch.embed.chunks import Part, Parts
from hardpatch.runtime.errors import InputError

DAMAGES = {
    "a flipped bit": lambda content: content[:200] + bytes([content[200] ^ 8]) + content[201:],
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(256)) * 8,
}


@pytest.fixture
def parts(tmp_path):
    begun = Parts(tmp_path / "out.parts")
    begun.begin({"seed": 1})
    yield begun
    begun.release()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_not_done(parts, damage, capsys):
    for number in range(2):
        parts.write(number, Part({"features": np.arange(64.0).reshape(8, 8)}, []))
    assert parts.is_done(0)
    file = parts.file(0)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert not parts.is_done(0)
    assert not file.exists()
    assert parts.is_done(1)
    assert "is damaged, and made again" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"seed": '])
def test_damaged_settings_are_refused_with_their_folder(parts, tmp_path, content):
    parts.release()
    (tmp_path / "out.parts/settings.json").write_bytes(content)
    with pytest.raises(InputError, match=r"out: cannot use .*out\.parts"):
        parts.begin({"seed": 1})
