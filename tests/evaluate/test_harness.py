"""The training loop that fine-tuning, segmentation and detection share: kills, other trainings, bad losses."""

import os
import signal

import pytest
import torch
from torch import nn

from hardpatch.evaluate.dense.comparison import DenseTraining, Lesson
from hardpatch.evaluate.harness import Examples, Plan
from hardpatch.runtime.errors import InputError, Interrupted

torch.set_num_threads(1)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, key):
        generator = torch.Generator().manual_seed(100 * key[0] + key[1])
        return torch.randn(4, generator=generator), torch.randn(1, generator=generator)


def stack(items):
    return tuple(torch.stack(part) for part in zip(*items))


def training(folder, model, loss, *, identity="same", epochs=3, peak=0.01, minutes=5.0, micro_batches=1):
    lesson = Lesson(model, model, [{"params": list(model.parameters())}], Examples(Numbers(), 16, stack), loss)
    plan = Plan(4, 4 * epochs, 4, seed=0, checkpoint_minutes=minutes, workers=0, num_micro_batches=micro_batches)
    made = DenseTraining(lesson, plan, peak, name="test", folder=folder, device=torch.device("cpu"), identity=identity)
    made.resume()
    return made


def trained(folder, *, stop_at=None, **changes):
    """The weights after the last step, and how many micro-batches this process took."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    taken = iter(range(1000))

    def loss(module, batch):
        if next(taken) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (module(batch[0]) - batch[1]).square().mean()

    training(folder, model, loss, **changes).run()
    assert not model.training
    return model.state_dict(), next(taken)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("minutes", [0.0, 5.0])
def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path, micro_batches, minutes):
    """Dropout draws from the seed of the step, the first step of a process included."""
    how = {"micro_batches": micro_batches, "minutes": minutes}
    whole, taken = trained(tmp_path / "whole", **how)
    assert taken == 12 * micro_batches
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM and saved at step 6 of 12"):
        trained(tmp_path / "stopped", stop_at=6 * micro_batches - 1, **how)
    assert signal.getsignal(signal.SIGTERM) == before
    state, taken = trained(tmp_path / "stopped", **how)
    assert taken == 6 * micro_batches
    assert same(state, whole)
    again, taken = trained(tmp_path / "stopped", **how)  # finished: nothing is done again
    assert taken == 0
    assert same(again, whole)


def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path):
    def learnt(name, micro_batches):
        torch.manual_seed(7)
        model = nn.Linear(4, 1)
        training(
            tmp_path / name, model, lambda module, batch: (module(batch[0]) - batch[1]).square().mean(),
            micro_batches=micro_batches,
        ).run()  # fmt: skip
        return model.weight

    torch.testing.assert_close(learnt("one", 1), learnt("four", 4))


def test_another_training_in_the_same_folder_starts_over(tmp_path, capsys):
    trained(tmp_path)
    assert trained(tmp_path, identity="another")[1] == 12
    assert "starts over" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_told_and_not_saved(tmp_path):
    bad = training(tmp_path, nn.Linear(4, 1), lambda module, batch: module(batch[0]).sum() * float("nan"), peak=0.5)
    with pytest.raises(InputError, match=r"learning_rate: the loss is nan at step 12; choose a lower one than 0.5"):
        bad.run()
    assert not list(tmp_path.glob("*.pt"))
