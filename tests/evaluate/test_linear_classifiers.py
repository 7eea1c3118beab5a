"""The linear probe against torch's own optimizer and scikit-learn; what is held out, and what decides."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from hardpatch.evaluate.classify import linear_classifiers as module
from hardpatch.evaluate.classify.accuracy import top_k_accuracy
from hardpatch.evaluate.classify.linear_classifiers import held_out, logistic, probe, train_probes
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)
NUM_CLASSES = 5


def clusters(num, seed, spread=1.5, dim=12):
    """Features of very different scales and offsets, as a transformer's are."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % NUM_CLASSES
    centres = np.random.default_rng(9).normal(size=(NUM_CLASSES, dim))
    points = centres[labels] + spread * generator.normal(size=(num, dim))
    scale = np.random.default_rng(8).uniform(0.01, 10, dim)
    return torch.from_numpy(points * scale + 3).float(), torch.from_numpy(labels)


def twin(features, labels, rate, *, epochs, batch_size, start, orders):
    """The published probe as one would write it: modules, autograd, torch.optim.SGD, torch's cosine."""
    model = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6), nn.Linear(*start.T.shape))
    with torch.no_grad():
        model[1].weight.copy_(start)
        model[1].bias.zero_()
    steps = len(features) // batch_size
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        for chosen in orders[epoch][: steps * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(features[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def test_probes_side_by_side_equal_torch_one_by_one(monkeypatch):
    (features, labels), (queries, _) = clusters(110, 0), clusters(40, 1)
    orders, starts = [], []
    real_order, real_start = torch.randperm, torch.randn

    def order(*given, **rest):
        orders.append(real_order(*given, **rest))
        return orders[-1]

    def start(*given, **rest):
        starts.append(real_start(*given, **rest))
        return starts[-1]

    monkeypatch.setattr(module.torch, "randperm", order)
    monkeypatch.setattr(module.torch, "randn", start)
    rates = (0.1, 3.0, 20.0)
    found = train_probes(features, labels, num_classes=NUM_CLASSES, rates=rates, epochs=4, batch_size=32, seed=3)
    monkeypatch.undo()
    assert len(orders) == 4
    logits = found.logits(queries)
    for number, rate in enumerate(rates):
        model = twin(features, labels, rate, epochs=4, batch_size=32, start=starts[0] * 0.01, orders=orders)
        torch.testing.assert_close(logits[number], model(queries).detach(), rtol=1e-3, atol=1e-4)


def test_a_probe_trained_to_the_end_is_an_unpenalised_logistic_regression():
    (features, labels), (queries, _) = clusters(400, 0), clusters(200, 1)
    found = train_probes(features, labels, num_classes=NUM_CLASSES, rates=(1.0,), epochs=1500, batch_size=400)
    scaler = StandardScaler().fit(features.numpy())
    oracle = LogisticRegression(C=1e6, tol=1e-8, max_iter=5000).fit(scaler.transform(features.numpy()), labels.numpy())
    expected = oracle.predict_proba(scaler.transform(queries.numpy()))
    np.testing.assert_allclose(found.logits(queries)[0].softmax(dim=1).numpy(), expected, atol=0.01)


@pytest.mark.parametrize("batch_size", [32, 1024])
def test_accuracy_of_the_published_probe_is_near_scikit_learns(batch_size):
    (train, labels), (val, truth) = clusters(1000, 0), clusters(1000, 1)
    scaler = StandardScaler().fit(train.numpy())
    oracle = LogisticRegression(max_iter=1000).fit(scaler.transform(train.numpy()), labels.numpy())
    expected = 100 * oracle.score(scaler.transform(val.numpy()), truth.numpy())
    found = probe(train, labels, val, num_classes=NUM_CLASSES, rates=(0.3,), batch_size=batch_size)
    assert 50 < expected < 95  # neither hopeless nor trivial
    assert top_k_accuracy(found.logits, truth, 1) == pytest.approx(expected, abs=2.5)
    assert top_k_accuracy(found.logits, truth, 5) == 100


def test_logistic_mode_is_scikit_learns():
    (train, labels), (val, _) = clusters(300, 0), clusters(50, 1)
    found = logistic(train, labels, val, num_classes=NUM_CLASSES, inverse_penalties=(0.1,))
    scaler = StandardScaler().fit(train.numpy())
    oracle = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(train.numpy()), labels.numpy())
    expected = oracle.predict_proba(scaler.transform(val.numpy()))
    np.testing.assert_allclose(found.logits.softmax(dim=1).numpy(), expected, atol=1e-4)
    assert (found.chosen, found.held_out_top1) == (0.1, None)


@pytest.mark.parametrize("classes", [(1, 3), (0, 2, 4)])
@pytest.mark.parametrize("mode", ["sgd", "logistic"])
def test_classes_that_were_not_learnt_are_never_the_answer(mode, classes):
    """scikit-learn knows only the classes it saw, and gives one column for two of them: the places must be right."""
    train, labels = clusters(300, 0, spread=0.3)
    val, truth = clusters(100, 1, spread=0.3)
    kept, asked = (torch.isin(side, torch.tensor(classes)) for side in (labels, truth))
    settings = {"rates": (0.3,)} if mode == "sgd" else {"inverse_penalties": (1.0,)}
    classify = probe if mode == "sgd" else logistic
    found = classify(train[kept], labels[kept], val, num_classes=NUM_CLASSES, **settings)
    assert set(found.logits.argmax(dim=1).tolist()) <= set(classes)
    assert top_k_accuracy(found.logits[asked], truth[asked], 1) == 100
    assert torch.isinf(found.logits).sum() == len(val) * (NUM_CLASSES - len(classes))


@pytest.mark.parametrize("mode", ["sgd", "logistic"])
def test_held_out_training_images_choose_and_val_does_not(mode):
    train, labels = clusters(200, 0, spread=2.5)
    settings = {"rates": (1e-4, 0.3, 3.0)} if mode == "sgd" else {"inverse_penalties": (1e-6, 0.1, 1e6)}
    classify = probe if mode == "sgd" else logistic
    values = next(iter(settings.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classify(train, labels, train[:7], num_classes=NUM_CLASSES, **settings)
        other = classify(train, labels, -train, num_classes=NUM_CLASSES, **settings)
    assert found.held_out_top1 == other.held_out_top1
    assert found.chosen == other.chosen
    assert found.held_out_top1[found.chosen] == max(found.held_out_top1.values())
    # Each accuracy is what a classifier at that setting, fitted without the held-out tenth, reaches there.
    held = held_out(labels, seed=0)
    for value in values:
        alone = classify(
            train[~held], labels[~held], train[held], num_classes=NUM_CLASSES, **{next(iter(settings)): (value,)}
        )
        assert top_k_accuracy(alone.logits, labels[held], 1) == pytest.approx(found.held_out_top1[value])
    # What was chosen is fitted again on all.
    whole = classify(train, labels, train[:7], num_classes=NUM_CLASSES, **{next(iter(settings)): (found.chosen,)})
    torch.testing.assert_close(found.logits, whole.logits)


def test_among_equally_right_settings_the_surer_one_is_chosen():
    labels = torch.tensor([0, 1])
    logits = {rate: torch.tensor([[sure, 0.0], [0.0, sure]]) for rate, sure in ((0.1, 1.0), (1.0, 3.0), (10.0, 2.0))}
    assert module._choose(logits, labels) == (1.0, dict.fromkeys((0.1, 1.0, 10.0), 100.0))


@pytest.mark.parametrize("sizes", [(50, 50, 50), (2, 2, 2), (1, 1, 5), (1000, 3, 1)])
def test_a_tenth_is_held_out_and_every_class_keeps_an_image(sizes):
    labels = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    held = held_out(labels, seed=0)
    assert int(held.sum()) == max(1, round(len(labels) / 10))
    assert set(labels[~held].tolist()) == set(labels.tolist())
    assert torch.equal(held, held_out(labels, seed=0))
    if len(labels) > 100:
        assert not torch.equal(held, held_out(labels, seed=1))
    if sizes == (50, 50, 50):
        assert torch.bincount(labels[held]).tolist() == [5, 5, 5]


def test_same_seed_same_probe_and_another_seed_another():
    (train, labels), (val, _) = clusters(100, 0), clusters(20, 1)
    logits = [
        probe(train, labels, val, num_classes=NUM_CLASSES, rates=(0.3,), epochs=3, batch_size=16, seed=seed).logits
        for seed in (0, 0, 1)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_constant_features_are_harmless():
    train, labels = clusters(100, 0, spread=0.3)
    train[:, 3] = 7.0
    found = probe(train, labels, train, num_classes=NUM_CLASSES, rates=(0.3,))
    assert top_k_accuracy(found.logits, labels, 1) == 100


def test_too_few_images_are_refused():
    train, labels = clusters(5, 0)
    with pytest.raises(InputError, match="at least 2 readable images"):
        probe(train[:1], labels[:1], train, num_classes=NUM_CLASSES, rates=(0.3,))
    with pytest.raises(InputError, match="no class has two"):
        probe(train, labels, train, num_classes=NUM_CLASSES, rates=(0.1, 1.0))
    with pytest.raises(InputError, match="at least 2 classes"):
        logistic(train[:1], labels[:1], train, num_classes=NUM_CLASSES, inverse_penalties=(1.0,))
