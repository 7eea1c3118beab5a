"""What makes a step slow without changing a number: compilations during a run, and the host waiting for the device."""

import time
import traceback
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from hardpatch.runs.build import compile_blocks
from hardpatch.runtime.log import read_metrics
from hardpatch.training.meter import Meter
from tiny import TINY, assert_same_state, final_state, pretrain, tiny_student

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by dynamo itself
torch.set_num_threads(1)
FIELDS = {name: value for name, value in TINY.items() if name != "data"}


@pytest.fixture
def graphs(monkeypatch):
    """Compiled graphs after every step; compiled for no backend, which takes no compiler and changes no number."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr("hardpatch.training.preparation.compile_blocks", partial(compile_blocks, backend="eager"))
    seen = []
    end_step = Meter.end_step

    def counted(self, *arguments):
        seen.append(counters["stats"]["unique_graphs"])
        end_step(self, *arguments)

    monkeypatch.setattr(Meter, "end_step", counted)
    yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("changes", [
    {},
    {"hard_share_start": 0.5, "hard_share_end": 0.0, "mask": "proportional", "predictor_view": "both"},
    {"mining_threshold": 0.01},  # the gate opens and closes
    {"masks_per_image": 2, "decoded_share": 0.5, "predictor_view": "both"},
    {"micro_batch_size": 4, "figures": True},  # looks at other batch sizes in between
], ids=["exact", "falling share", "gate", "fast", "looking"])  # fmt: skip
def test_nothing_is_compiled_again_while_the_hard_share_changes(tmp_path, graphs, changes):
    pretrain("shapes:48", tmp_path / "run", compile="on", **FIELDS | {"checkpoint_steps": 4} | changes)
    assert len(graphs) == 12
    assert graphs[0] > 0, "nothing was compiled"
    assert len(set(graphs)) == 1, f"compiled graphs after each step: {graphs}"


def test_more_shapes_than_dynamo_allows_by_itself_are_compiled():
    """timm lifts the limit when its optimizers are imported, in some versions: not to be relied on."""
    torch._dynamo.reset()
    counters.clear()
    student = tiny_student()
    block = student.encoder.blocks[0]
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(student, backend="eager")
        for tokens in range(2, 14):
            block(torch.zeros(1, tokens, student.encoder.embed_dim))
    assert counters["stats"]["unique_graphs"] == 12
    torch._dynamo.reset()


def test_compiled_blocks_give_the_same_run(tmp_path, graphs):
    pretrain("shapes:48", tmp_path / "eager", **FIELDS)
    assert not graphs[-1]
    pretrain("shapes:48", tmp_path / "compiled", compile="on", **FIELDS)
    assert graphs[-1]
    assert_same_state(final_state(tmp_path / "eager"), final_state(tmp_path / "compiled"))


@pytest.mark.parametrize("compile", ["on", "off"])
def test_the_step_that_compiles_is_no_training_time(tmp_path, monkeypatch, graphs, capsys, compile):
    compiling = 3.0
    end_step = Meter.end_step

    def slow_at_first(self, step, *arguments):
        time.sleep(compiling if step == 0 else 0)
        end_step(self, step, *arguments)

    monkeypatch.setattr(Meter, "end_step", slow_at_first)
    result = pretrain("shapes:48", tmp_path / "run", compile=compile, **FIELDS | {"knn": False, "figures": False})
    first = next(record for record in read_metrics(tmp_path / "run") if "images_per_second" in record)
    in_the_first_record = first["step"] * FIELDS["batch_size"] / first["images_per_second"]
    assert (result["train_seconds"] > compiling) == (in_the_first_record > compiling) == (compile == "off")
    assert ("the first step, which compiles, took" in capsys.readouterr().err) == (compile == "on")


WAITS = {
    "aten::_local_scalar_dense",  # .item(), float(tensor), if tensor
    "aten::nonzero",  # boolean indexing
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
}
"""What makes the host wait until a GPU has a value."""


class Waits(TorchDispatchMode):
    """Notes where the host would have to wait."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in WAITS:
            self.places.append([frame.name for frame in traceback.extract_stack()])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [
    {},
    {"mask": "random", "predicted_loss": "none"},
    {"mask": "proportional", "mining_threshold": 0.01, "predicted_loss": "absolute", "target": "hog"},
    {"mask": "green_noise", "predictor_view": "full"},
    {"mask": "attention", "predictor_view": "both", "target": "ema_features"},
    {"masks_per_image": 2, "decoded_share": 0.5, "decoder": "cross", "teacher_reduction": 2, "predictor_view": "both"},
    {"micro_batch_size": 4},
], ids=["exact", "mae", "gate", "noise", "attention", "fast", "micro-batches"])  # fmt: skip
def test_the_host_never_waits_between_two_records(tmp_path, changes):
    """One data process: what it does is not the step's, and is not counted."""
    with Waits() as waits:
        pretrain("shapes:48", tmp_path / "run", **FIELDS | {"workers": 1, "log_steps": 100} | changes)
    in_steps = [place for place in waits.places if "train_steps" in place]
    between = {"reporting", "after_step", "start", "before_stop"}
    assert [place for place in in_steps if between & set(place)], "the mode sees nothing"
    beside = between | {"fetch", "batches_of"}  # the loader counts in tensors of its own, on the CPU
    stray = [place[-6:] for place in in_steps if not beside & set(place)]
    assert not stray, stray
