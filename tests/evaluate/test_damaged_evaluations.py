"""Whatever else than the state lies damaged in a folder: evaluations, their resume, reports and exports go on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import hardpatch
from hardpatch.config.commands import ExportConfig
from hardpatch.config.evaluations import FinetuneConfig, KnnConfig
from hardpatch.evaluate import result
from hardpatch.evaluate.classify import finetune, finetune_training, knn
from hardpatch.export import export
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.training.pretrain import train
from tiny import stop_at, tiny_config

torch.set_num_threads(1)


def flip(content: bytes) -> bytes:
    """One bit in the middle, which makes what stands there no UTF-8 any more."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 128]) + content[middle + 1 :]


DAMAGES = {
    "a flipped bit": flip,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(256)) * 4,
    "other values": lambda content: b'{"about": 3, "finetune": {"epochs": 7}}\n',
    "deleted": None,
}
FINETUNE = FinetuneConfig(
    "", "shapes:16", "shapes:8@1", epochs=2, batch_size=8, workers=0, device="cpu", precision="float32",
    base_learning_rate=3e-2, mixed_share=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with every kind of figures, and a fine-tuning of it that was stopped half-way and one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "run"
    train(tiny_config(epochs=1), run)
    config = replace(FINETUNE, checkpoint=str(run))
    whole = finetune.run(replace(config, out=str(folder / "whole")))
    learn = finetune_training.Finetuning._learn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_training.Finetuning, "_learn", stop_at(3, learn))
        with pytest.raises(Interrupted):
            finetune.run(replace(config, out=str(folder / "stopped")))
    for name in ("result.json", "per_class.csv", "confusion.png"):
        shutil.copy(folder / "whole" / name, folder / "stopped" / name)
    return folder, whole


def damage(path, how):
    if DAMAGES[how] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_fine_tuning_goes_on_whatever_else_is_damaged(stopped, tmp_path, how, capsys):
    folder, whole = stopped
    out = tmp_path / "out"
    shutil.copytree(folder / "stopped", out, symlinks=True)
    for name in ("config.yaml", "metrics.jsonl", "result.json", "per_class.csv", "confusion.png"):
        damage(out / name, how)
    again = finetune.run(replace(FINETUNE, checkpoint=str(folder / "run"), out=str(out)))
    assert (again.top1, again.train_loss) == (whole.top1, whole.train_loss)
    assert json.loads((out / "result.json").read_text())["top1"] == whole.top1
    ends = [torch.load(place / "checkpoints/last", weights_only=True)["model"] for place in (folder / "whole", out)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    assert "config.yaml does not say what its checkpoints say" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"other settings.*\n  epochs: 2 -> 3"):
        finetune.run(replace(FINETUNE, checkpoint=str(folder / "run"), out=str(out), epochs=3))


@pytest.mark.parametrize("how", DAMAGES)
def test_evaluations_and_exports_of_a_run_need_nothing_but_its_checkpoint(stopped, tmp_path, how):
    folder, _ = stopped
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run, symlinks=True)
    config = KnnConfig(str(run), "shapes:16", "shapes:8@1", k=(1,), device="cpu", against=(str(run),))
    expected = knn.run(config)
    result.keep(expected, config)
    kept = run / "evaluate/knn.json"
    for path in (kept, run / "config.yaml", run / "metrics.jsonl", run / "result.json", run / "report.html",
                 run / "checkpoints/weights.safetensors"):  # fmt: skip
        damage(path, how)
    again = knn.run(config)
    assert [row.top1 for row in again.standings] == [row.top1 for row in expected.standings]
    if how != "deleted":  # without its config.yaml a folder is no run folder that could hold figures
        result.keep(again, config)
        assert json.loads(kept.read_text())["top1"] == again.top1
    export.run(ExportConfig(str(run), "timm", str(tmp_path / "exported")))
    assert hardpatch.load_encoder(run).num_classes == 0


def test_another_folder_is_never_taken_for_a_damaged_fine_tuning(stopped):
    folder, _ = stopped
    for resume in ("auto", "restart"):
        with pytest.raises(InputError, match="holds no fine-tuning but something else"):
            finetune.run(replace(FINETUNE, checkpoint=str(folder / "run"), out=str(folder / "run"), resume=resume))
    assert list((folder / "run/checkpoints").glob("step_*.pt"))
