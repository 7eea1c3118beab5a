"""Only the state itself may stop a run that goes on: whatever else lies in its folder may be damaged in any way."""

import json
import shutil

import pytest

from hardpatch.config.values import load_config
from hardpatch.runs.folder import RunFolder
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from tiny import TINY, assert_same_state, final_state, pretrain, stop_after

FIELDS = {name: value for name, value in TINY.items() if name != "data"} | {
    "figures": True, "num_figure_images": 1, "max_damaged": 0.5
}  # fmt: skip
BESIDE_THE_STATE = (
    "metrics.jsonl", "result.json", "report.html", "damaged.csv", "trackers.json", "config.yaml",
    "evaluate/knn.json", "checkpoints/weights.safetensors", "figures/hardness_00000000.png",
)  # fmt: skip


def flip(content: bytes) -> bytes:
    """One bit in the middle, which makes what stands there no UTF-8 any more."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 128]) + content[middle + 1 :]


DAMAGES = {
    "a flipped bit": flip,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(256)) * 4,
    "zeros": lambda content: bytes(len(content)),
    "other values": lambda content: b'["something", {"else": 1}]\n5\n{"step": "x"}\n{"step": 2, "loss": 1.0}\n',
    "deleted": None,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped half-way, and one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain("shapes:48", folder / "whole", **FIELDS)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Interrupted):
            pretrain("shapes:48", folder / "stopped", **FIELDS)
    run = RunFolder(folder / "stopped")
    run.save_evaluation("knn", {"top1": 50.0})
    run.save_damaged({"a.png": "cut"})
    (run.path / "trackers.json").write_text('{"wandb": "r1"}')
    (run.path / "report.html").write_text("<p>a report</p>")
    (run.path / "result.json").write_text('{"steps": 6}')
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_whatever_else_is_damaged(stopped, tmp_path, damage):
    shutil.copytree(stopped / "stopped", tmp_path / "run", symlinks=True)
    run = RunFolder(tmp_path / "run")
    files = [run.path / name for name in BESIDE_THE_STATE] + list((run.path / "events").iterdir())
    for file in files:
        if DAMAGES[damage] is None:
            file.unlink()
        else:
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
    result = pretrain("shapes:48", run.path, **FIELDS)
    assert_same_state(final_state(stopped / "whole"), final_state(run.path))
    assert result["steps"] == 12
    assert json.loads(run.result_file.read_text())["reconstruction_loss"] == result["reconstruction_loss"]
    assert run.report_file.read_text().startswith("<!")
    assert load_config(run.config_file).optimisation.batch_size == 8
    assert [record["step"] for record in read_metrics(run.path)][-1] == 12


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_run_says_so_or_writes_its_result_again(stopped, tmp_path, damage):
    shutil.copytree(stopped / "whole", tmp_path / "run", symlinks=True)
    run = RunFolder(tmp_path / "run")
    for file in (run.result_file, run.path / "metrics.jsonl"):
        file.unlink() if DAMAGES[damage] is None else file.write_bytes(DAMAGES[damage](file.read_bytes()))
    pretrain("shapes:48", run.path, **FIELDS)
    assert json.loads(run.result_file.read_text())["steps"] == 12
    assert_same_state(final_state(stopped / "whole"), final_state(run.path))


def test_another_config_is_refused_also_where_the_file_says_what_is_wanted(stopped, tmp_path):
    shutil.copytree(stopped / "stopped", tmp_path / "run", symlinks=True)
    run = RunFolder(tmp_path / "run")
    run.config_file.write_text(run.config_file.read_text().replace("mask_ratio: 0.75", "mask_ratio: 0.5"))
    with pytest.raises(InputError, match="another config"):
        pretrain("shapes:48", run.path, **FIELDS, mask_ratio=0.25)
    pretrain("shapes:48", run.path, **FIELDS)
    assert load_config(run.config_file).method.mask_ratio == 0.75
