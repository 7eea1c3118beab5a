"""Several processes: shards give the numbers of copies, and stop and go on anywhere."""

import os
import socket
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import hardpatch
from hardpatch.runs.checkpoint import CheckpointFolder
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.training.reporting import Reporter
from tiny import TINY, assert_same_state, final_state, flags, in_child, pretrain

SHORT = TINY | {"epochs": 1, "micro_batch_size": 2, "checkpoint_steps": 6}
"""6 steps of 8 images in at least two micro-batches."""


def run(out, **changes):
    values = SHORT | changes
    return pretrain(values.pop("data"), out, **values)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def train_as(rank, port, out, values, stop_after=None):
    """Be one of two processes; count the gradient exchanges of the steps."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    exchanges = count_exchanges()
    if stop_after is not None:
        Reporter.after_step = stopping(stop_after)
    from hardpatch.cli import main

    try:
        main(["pretrain", "--recipe", "hpm", "--out", str(out), *flags(values)])
    finally:
        (out.parent / f"{out.name}.{rank}.exchanges").write_text(str(len(exchanges)))


def count_exchanges():
    """A list that grows by one with every gradient exchange of DDP or of a shard's group."""
    loop = import_module("hardpatch.training.loop")
    exchanges, wrap = [], loop.parallel
    name = next(name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name))  # torch's
    scatter = getattr(dist, name)

    def counted(state, bucket):
        exchanges.append("bucket")
        return allreduce_hook(state, bucket)

    def wrapped(student, device):
        model = wrap(student, device)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, counted)
        return model

    def scattered(*arguments, **options):
        exchanges.append("group")
        return scatter(*arguments, **options)

    loop.parallel = wrapped
    setattr(dist, name, scattered)
    return exchanges


def stopping(step, after_step=Reporter.after_step):
    """In place of ``Reporter.after_step``: save and leave after a step."""

    def stopped(self, meter):
        after_step(self, meter)
        if self.run.state.step == step:
            self.run.save()
            raise Interrupted("test")

    return stopped


def run_by_two(out, *, stop_after=None, **changes):
    port = free_port()
    processes = [in_child(train_as, rank, port, out, SHORT | changes, stop_after) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0 if stop_after is None else 3] * 2
    return [int((out.parent / f"{out.name}.{rank}.exchanges").read_text()) for rank in range(2)]


def test_shards_give_the_numbers_of_copies_and_gradients_are_exchanged_once_per_step(tmp_path):
    changes = {"precision": "bf16", "knn": True, "figures": True, "num_figure_images": 2}
    copies = run_by_two(tmp_path / "copies", **changes)
    shards = run_by_two(tmp_path / "shards", sharding="full", **changes)
    # Two addends have one sum, whoever adds them: bit for bit.
    assert_same_state(final_state(tmp_path / "copies"), final_state(tmp_path / "shards"))
    assert copies == [6, 6], "one bucket, six steps of two micro-batches"
    assert shards == [6 * 4, 6 * 4], "three blocks and the root"
    saved = "checkpoints/weights.safetensors"
    assert (tmp_path / "copies" / saved).read_bytes() == (tmp_path / "shards" / saved).read_bytes()
    for expected, found in zip(read_metrics(tmp_path / "copies"), read_metrics(tmp_path / "shards"), strict=True):
        for name in ("loss", "predictor_rank_correlation", "knn_top1"):
            assert found.get(name) == expected.get(name), "also of the gathered model that is looked at"
        if "gradient_norm" in expected:
            assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    figures = {file.name for file in (tmp_path / "shards/figures").iterdir()}
    assert figures == {"hardness_00000000.png", "hardness_00000006.png"}


def test_a_sharded_run_goes_on_whole_and_a_whole_one_sharded(tmp_path, monkeypatch):
    changes = {"mask": "attention", "decoder": "cross", "predictor_view": "both", "activation_checkpointing": True}
    run(tmp_path / "whole", **changes)
    run_by_two(tmp_path / "sharded first", sharding="full", stop_after=3, checkpoint_minutes=1e-9, **changes)
    assert CheckpointFolder(tmp_path / "sharded first/checkpoints").steps() == [1, 2, 3], "by time, all together"
    run(tmp_path / "sharded first", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "after_step", stopping(3))
        with pytest.raises(Interrupted):
            run(tmp_path / "whole first", **changes)
    run_by_two(tmp_path / "whole first", sharding="full", **changes)
    whole = final_state(tmp_path / "whole")
    for name in ("sharded first", "whole first"):
        state = final_state(tmp_path / name)
        for part in ("student", "teacher"):
            assert list(state[part]) == list(whole[part])
            for key, expected in whole[part].items():
                torch.testing.assert_close(
                    state[part][key], expected, rtol=1e-3, atol=1e-4, msg=lambda t, k=key: f"{k}: {t}"
                )
        assert state["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
        assert hardpatch.load_teacher(tmp_path / name).predict_loss(torch.zeros(1, 3, 32, 32)).shape == (1, 16)


def test_one_process_cannot_share_a_model(tmp_path):
    with pytest.raises(InputError, match=r"sharding: 'full' .* at least 2 .* got 1"):
        run(tmp_path / "run", sharding="full")
    assert not (tmp_path / "run").exists()


def test_a_scout_is_the_same_in_copies_shards_and_one_process(tmp_path):
    changes = {"guide": "scout", "predicted_loss": "none", "hard_share_start": 0.5, "mining_threshold": 0.0}
    run(tmp_path / "one", **changes)
    run_by_two(tmp_path / "copies", **changes)
    run_by_two(tmp_path / "shards", sharding="full", **changes)
    one, copies = final_state(tmp_path / "one"), final_state(tmp_path / "copies")
    assert_same_state(copies, final_state(tmp_path / "shards"))
    for name, expected in one["student"].items():
        torch.testing.assert_close(copies["student"][name], expected, rtol=1e-3, atol=1e-4, msg=name)
