"""Little shared memory, as containers have it: seen before it is full, named with what helps, nobody waits for ever."""

import os
import subprocess
import sys

import pytest
import torch
from test_sources import png

from hardpatch.data.images.decode import RGB
from hardpatch.data.loader import processes
from hardpatch.data.loader.last_read import LastRead
from hardpatch.data.loader.loading import (
    Position,
    TrainingImages,
    TrainingOrder,
    last_read,
    ordered_batches,
    training_batches,
)
from hardpatch.data.loader.statistics import measure
from hardpatch.data.sources import FileSource, open_source
from hardpatch.runtime.errors import InputError

SIZE = (32, 32)
BATCH_BYTES = 4 * 3 * 32 * 32


def batches(*, workers=2):
    images = TrainingImages(
        open_source("shapes:32", image_size=SIZE), size=SIZE, crop_scale=(0.5, 1), flip=True, seed=0
    )
    order = TrainingOrder(32, batch_size=4, first_step=0, total_steps=8, seed=0, position=Position())
    return training_batches(images, order, workers=workers, pin_memory=False)


def lines(capfd):
    return " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (100, None),
        (9, "2 data processes with 3 batches ahead each instead of 2 with 4"),
        (4, "2 data processes with 1 batches ahead each"),
        (3.5, "1 data processes with 1 batches ahead each"),
        (2, "no data processes instead of 2 with 4"),
        (0, "no data processes"),
    ],
)
def test_fewer_batches_are_made_ahead_where_it_is_small(monkeypatch, capfd, room, said):
    expected = [batch.images for batch in batches(workers=0)]
    capfd.readouterr()
    monkeypatch.setattr(processes, "free_shared_memory", lambda: int(room * BATCH_BYTES / 0.9) + 1)
    made = [batch.images for batch in batches()]
    assert all(map(torch.equal, made, expected))
    told = lines(capfd)
    assert (said in told and "--shm-size" in told) if said else "workers:" not in told


def test_batches_in_order_and_statistics_look_at_it_too(monkeypatch, capfd):
    source = open_source("shapes:32", image_size=SIZE)
    expected = [batch.images for batch in ordered_batches(source, size=SIZE, batch_size=4)]
    monkeypatch.setattr(processes, "free_shared_memory", lambda: 1000)
    made = [batch.images for batch in ordered_batches(source, size=SIZE, batch_size=4, workers=2)]
    assert all(map(torch.equal, made, expected))
    assert "no data processes instead of 2" in lines(capfd)
    assert measure(source, workers=2).images == 32


class Full(torch.utils.data.Dataset):
    """Images of which one finds shared memory full."""

    def __getitem__(self, key):
        return torch.zeros(3)


def _full(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)")


@pytest.mark.parametrize("read", ["training", "in order", "any"])
def test_full_in_the_middle_is_an_error_with_what_helps(monkeypatch, read):
    monkeypatch.setattr(
        torch.Tensor, "share_memory_", lambda tensor: tensor if tensor.dtype == torch.int64 else _full(tensor)
    )
    source = open_source("shapes:32", image_size=SIZE)
    made = {
        "training": batches,
        "in order": lambda: ordered_batches(source, size=SIZE, batch_size=4, workers=2),
        "any": lambda: processes.batches_of(Full(), [[0, 1], [2]], collate=torch.stack, workers=1),
    }[read]()
    with pytest.raises(InputError, match=r"^workers: the shared memory .* is full; .*--shm-size 8g.*--workers 0"):
        list(made)


def test_full_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "share_memory_", _full)
    with pytest.raises(InputError, match="--shm-size"):
        last_read(Full(), 2)


def test_a_bus_error_blames_no_image(tmp_path):
    (tmp_path / "innocent.png").write_bytes(png())
    noted = LastRead(Full(), 1)
    noted.images.source = FileSource([str(tmp_path / "innocent.png")], decoder=RGB)
    noted._notes[0] = torch.tensor((77, 0))
    died = "DataLoader worker (pid 77) is killed by signal: {}. "
    assert "innocent.png" in str(noted.explained(RuntimeError(died.format("Killed"))))
    told = str(noted.explained(RuntimeError(died.format("Bus error"))))
    assert "--shm-size" in told
    assert "innocent" not in told


def test_an_error_of_a_data_process_has_no_traceback_in_front(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    source = FileSource([str(tmp_path / "a.png")], decoder=RGB)
    images = TrainingImages(source, size=SIZE, crop_scale=(1, 1), flip=False, seed=0)
    with pytest.raises(InputError, match=r"^data: 1 images in a row cannot be read"):
        list(processes.batches_of(images, [[(0, 0)]], collate=lambda made: made[0], workers=1))


PROGRAM = """
import sys
from hardpatch.data.loader import processes
if sys.argv[1] == "unseen":
    processes.free_shared_memory = lambda: None
from hardpatch.data.loader.loading import ordered_batches
from hardpatch.data.sources import open_source
source = open_source("shapes:512", image_size=(224, 224))
count = 0
for batch in ordered_batches(source, size=(224, 224), batch_size=64, workers=3):
    count += len(batch.images)
print(count)
"""


@pytest.mark.parametrize("how", ["seen", "unseen"])
def test_a_container_with_little_of_it(tmp_path, how):
    """8 MB of /dev/shm and batches of 10 MB, for real."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    if subprocess.run(["unshare", "--mount", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no namespace of its own for mounts")
    command = f'{mount} && exec "$@"'
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, "sh", sys.executable, "-c", PROGRAM, how],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    told = " ".join(done.stderr.split())
    if how == "seen":
        assert done.stdout.strip() == "512", told
        assert "no data processes instead of 3" in told
    else:
        assert "InputError: workers: the shared memory" in told
        assert "8 MB" in told
