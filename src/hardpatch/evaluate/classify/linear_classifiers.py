"""A linear classifier on frozen features, by the published probe and by logistic regression.

Everything here takes features, not images: what costs is the encoder, and it has run once before. All learning rates of
a sweep are trained side by side, as one wide linear layer on the same batches.

The published probe is a BatchNorm without affine parameters under a linear layer, SGD with momentum 0.9, half a cosine,
90 epochs. Source: MAE, appendix A.1 (BatchNorm, start of the weights); MoCo v3, section 5 (SGD in the place of LARS).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from hardpatch.method.schedules import learning_rate
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import tracked, warn
from hardpatch.runtime.seeding import Stream, derive_seed

REFERENCE_BATCH = 256
"""Learning rates are quoted for batches of this size and grow with the batch, as published."""
MOMENTUM = 0.9
NORM_EPS = 1e-6
START_DEVIATION = 0.01


class Probes(NamedTuple):
    """One trained linear classifier per learning rate, on features normalised alike."""

    norm: nn.BatchNorm1d
    """In evaluation mode: running statistics of the training features."""
    layers: Float[Tensor, "r c e"]
    """Weights, with the bias as last column: e = d + 1."""

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "r n c"]:
        """Scores of every class, by learning rate."""
        inputs = F.pad(self.norm(features), (0, 1), value=1.0)
        return torch.einsum("ne,rce->rnc", inputs, self.layers)


@torch.no_grad()
def train_probes(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    rates: Sequence[float],
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
    bar: bool = True,
) -> Probes:
    """Train one probe per learning rate; all see the same batches and start from the same weights.

    The gradient of the mean cross-entropy is written out: (softmax - one-hot) x input. A last partial batch of an
    epoch is left out, as published.

    Args:
        features: Of the training images, on the device that is to work.
        labels: Their classes, 0 to C - 1, on the same device.
        rates: Peak learning rates for batches of 256; multiplied by the batch over 256.
        batch_size: Features per step; all of them where there are fewer.

    Raises:
        InputError: Fewer than two features: a BatchNorm has nothing to normalise by.
    """
    count, dim = features.shape
    if count < 2:
        raise InputError(f"train: a linear probe needs at least 2 readable images to learn from, got {count}")
    device, batch = features.device, min(batch_size, count)
    norm = nn.BatchNorm1d(dim, eps=NORM_EPS, affine=False).to(device)
    start = torch.randn(
        num_classes, dim, generator=torch.Generator().manual_seed(derive_seed(seed, Stream.INITIALISATION))
    )
    layer = F.pad(start * START_DEVIATION, (0, 1)).repeat(len(rates), 1).to(device)
    momentum, gradient = torch.zeros_like(layer), torch.empty_like(layer)
    peaks = torch.tensor(rates).repeat_interleave(num_classes).unsqueeze(1).to(device) * batch / REFERENCE_BATCH
    one_hot = F.one_hot(labels, num_classes).float()
    steps_per_epoch = count // batch
    total_steps = epochs * steps_per_epoch
    for step in tracked(range(total_steps), "probe") if bar else range(total_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, Stream.ORDER, epoch))
            order = torch.randperm(count, generator=generator).to(device)
        chosen = order[place * batch : (place + 1) * batch]
        inputs = F.pad(norm(features[chosen]), (0, 1), value=1.0)
        error = F.linear(inputs, layer).unflatten(1, (len(rates), num_classes)).softmax(dim=-1)
        error -= one_hot[chosen].unsqueeze(1)
        torch.mm(error.flatten(1).T, inputs, out=gradient)
        momentum.mul_(MOMENTUM).add_(gradient, alpha=1 / batch)
        layer -= peaks * learning_rate(step, peak=1.0, warmup_steps=0, total_steps=total_steps) * momentum
    return Probes(norm.eval(), layer.unflatten(0, (len(rates), num_classes)))


class Probed(NamedTuple):
    """What a classifier says about the validation images, and how it was chosen."""

    logits: Float[Tensor, "q c"]
    """Scores of every class, on the CPU; minus infinity for a class that was not among the training features."""
    chosen: float
    """Learning rate of a probe, C of a logistic regression."""
    held_out_top1: dict[float, float] | None
    """Accuracy on the held-out training images, in percent, by learning rate or C; None where there was no choice."""


def probe(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    *,
    num_classes: int,
    rates: Sequence[float],
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
    bar: bool = True,
) -> Probed:
    """The published probe; among several learning rates a held-out tenth of the training features chooses.

    Then it is trained again on all of them. The validation features decide nothing.

    Args:
        train: Training features, on the device that is to work, as all the others.
        labels: Their classes.
        val: Features to classify.
        rates: Learning rates for batches of 256.
        seed: Decides what is held out, the start and the order.

    Raises:
        InputError: Too few features.
    """
    learn = partial(train_probes, num_classes=num_classes, epochs=epochs, batch_size=batch_size, seed=seed, bar=bar)
    chosen, found = rates[0], None
    if len(rates) > 1:
        held = held_out(labels, seed=seed)
        probes = learn(train[~held], labels[~held], rates=rates)
        chosen, found = _choose(dict(zip(rates, probes.logits(train[held]))), labels[held])
    logits = learn(train, labels, rates=(chosen,)).logits(val)[0].cpu()
    learnt = torch.zeros(num_classes, dtype=torch.bool)
    learnt[labels.cpu()] = True
    return Probed(logits.masked_fill(~learnt, -torch.inf), chosen, found)


def logistic(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    *,
    num_classes: int,
    inverse_penalties: Sequence[float],
    seed: int = 0,
    bar: bool = True,
) -> Probed:
    """scikit-learn's logistic regression on standardised features; C is chosen as the rate in :func:`probe`.

    Arguments are those of :func:`probe`, with ``inverse_penalties`` (scikit-learn's C) in the place of the rates.

    Raises:
        InputError: Too few features, or of one class only.
    """
    train, val, labels = train.cpu(), val.cpu(), labels.cpu()
    if len(labels.unique()) < 2:
        raise InputError("train: logistic regression needs readable images of at least 2 classes")
    chosen, found = inverse_penalties[0], None
    if len(inverse_penalties) > 1:
        held = held_out(labels, seed=seed)
        logits = {
            penalty: _fit_logistic(train[~held], labels[~held], train[held], penalty, num_classes)
            for penalty in (tracked(inverse_penalties, "logistic regression") if bar else inverse_penalties)
        }
        chosen, found = _choose(logits, labels[held])
    return Probed(_fit_logistic(train, labels, val, chosen, num_classes), chosen, found)


def _fit_logistic(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    val: Float[Tensor, "q d"],
    inverse_penalty: float,
    num_classes: int,
) -> Float[Tensor, "q {num_classes}"]:
    """Fit on the first, and score the second."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.numpy(), labels.numpy())
    if any(issubclass(item.category, ConvergenceWarning) for item in caught):
        warn(f"logistic regression with C = {inverse_penalty:g} stopped after 1000 iterations, before it had converged")
    found = torch.from_numpy(model.decision_function(val.numpy())).float()
    known = torch.from_numpy(model.classes_)
    if len(known) == 2:  # scikit-learn gives one column: the score of the second class
        found = torch.stack([torch.zeros_like(found), found], dim=1)
    logits = torch.full((len(val), num_classes), -torch.inf)
    logits[:, known] = found
    return logits


def held_out(labels: Int[Tensor, " n"], *, seed: int) -> Tensor:
    """Mark about a tenth of the training images, spread evenly over the classes; one of every class always stays.

    Returns:
        Bool (n,), True = held out, on the labels' device.

    Raises:
        InputError: No class has two images.
    """
    classes = labels.cpu().numpy()
    noise = np.random.default_rng(derive_seed(seed, Stream.EVALUATION)).random(len(classes))
    order = np.lexsort((noise, classes))
    first = np.r_[True, classes[order][1:] != classes[order][:-1]]
    candidates = order[~first]
    if not len(candidates):
        raise InputError(
            "train: a learning rate or C is chosen on held-out training images, and no class has two; give one only"
        )
    number = min(len(candidates), max(1, round(len(classes) / 10)))
    held = np.zeros(len(classes), dtype=bool)
    held[candidates[np.linspace(0, len(candidates) - 1, number).round().astype(int)]] = True
    return torch.from_numpy(held).to(labels.device)


def _choose(logits: dict[float, Tensor], labels: Int[Tensor, " n"]) -> tuple[float, dict[float, float]]:
    """The setting of the best held-out accuracy, among equals that of the lower loss; and all accuracies."""
    accuracies = {key: float((value.argmax(dim=1) == labels).double().mean() * 100) for key, value in logits.items()}
    losses = {key: float(F.cross_entropy(value, labels)) for key, value in logits.items()}
    return max(logits, key=lambda key: (accuracies[key], -losses[key])), accuracies
