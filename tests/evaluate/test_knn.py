"""kNN against scikit-learn, and features that belong to the images they are said to belong to."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from hardpatch.data.images.decode import DecodeError, Sample
from hardpatch.data.loader.loading import Normalise
from hardpatch.data.sources import Source
from hardpatch.evaluate.classify.accuracy import top_k_accuracy
from hardpatch.evaluate.classify.knn import knn_top1, knn_votes
from hardpatch.evaluate.classify.labelled_images import LabelledImages, Subset
from hardpatch.evaluate.features import extract_features, pool, split_features
from hardpatch.method.vit import create_encoder, encode
from hardpatch.runtime.errors import InputError

torch.set_num_threads(1)
CPU, SIZE, NUM_CLASSES = torch.device("cpu"), (8, 8), 7
NORMALISE = Normalise((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Images(Source):
    """Random images in memory, some of them damaged; dark for class a, bright for class b."""

    def __init__(self, num_images, damaged=()):
        self.damaged = set(damaged)
        generator = torch.Generator().manual_seed(0)
        dark = torch.randint(0, 100, (num_images, 3, *SIZE), generator=generator)
        self.images = (dark + 150 * (torch.arange(num_images) % 2).view(-1, 1, 1, 1)).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def read(self, index):
        if index in self.damaged:
            raise DecodeError("scratched")
        return Sample(self.images[index])

    def name(self, index):
        return f"image {index}"

    def content(self, index):
        return self.images[index].numpy().tobytes()

    @property
    def labels(self):
        return ["ab"[i % 2] for i in range(len(self))]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", image_size=SIZE, patch_size=4, width=16, depth=1, heads=2)


def features(vit, source, pooling="mean"):
    return extract_features(vit, source, NORMALISE, size=SIZE, pooling=pooling, device=CPU)


def clusters(num, seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % NUM_CLASSES
    centres = np.random.default_rng(9).normal(size=(NUM_CLASSES, 12))
    points = centres[labels] + 1.5 * generator.normal(size=(num, 12))
    scale = generator.uniform(0.1, 10, size=(num, 1))  # cosine similarity ignores lengths
    return (points * scale).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20, 140])
def test_votes_equal_scikit_learn(k, temperature):
    (bank, labels), (queries, _) = clusters(140, 0), clusters(60, 1)
    oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    oracle.fit(bank, labels)
    votes = knn_votes(
        torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries),
        k=k, temperature=temperature, num_classes=NUM_CLASSES, chunk=17,
    )  # fmt: skip
    shares = votes / votes.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(shares.numpy(), oracle.predict_proba(queries), atol=1e-4)
    assert votes.argmax(dim=1).tolist() == oracle.predict(queries).tolist()


def test_votes_do_not_overflow_at_a_low_temperature():
    bank, labels = map(torch.from_numpy, clusters(20, 0))
    votes = knn_votes(bank, labels, bank, k=20, temperature=1e-3, num_classes=NUM_CLASSES)
    assert torch.isfinite(votes).all()
    assert torch.equal(votes.argmax(dim=1), labels)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_equals_scikit_learn(k):
    generator = torch.Generator().manual_seed(0)
    votes, labels = torch.rand(50, NUM_CLASSES, generator=generator), torch.arange(50) % NUM_CLASSES
    expected = 100 * top_k_accuracy_score(labels.numpy(), votes.numpy(), k=k)
    assert top_k_accuracy(votes, labels, k) == pytest.approx(expected)
    assert top_k_accuracy(votes, labels, NUM_CLASSES + 1) == 100


def test_pooling_by_hand(vit):
    tokens = torch.randn(2, 5, 16)
    first, mean = tokens[:, 0], sum(tokens[:, i] for i in range(1, 5)) / 4
    torch.testing.assert_close(pool(tokens, vit, "mean"), mean)
    torch.testing.assert_close(pool(tokens, vit, "class"), first)
    unit = [part / part.square().sum(dim=1, keepdim=True).sqrt() for part in (first, mean)]
    torch.testing.assert_close(pool(tokens, vit, "both"), torch.cat(unit, dim=1))


def test_registers_are_no_patches():
    vit = create_encoder("vit_wee_patch16_reg1_gap_256", image_size=(32, 32), width=16, depth=1, heads=2)
    tokens = torch.randn(2, 5, 16)
    torch.testing.assert_close(pool(tokens, vit, "mean"), tokens[:, 1:].mean(dim=1))
    with pytest.raises(ValueError, match="class token"):
        pool(tokens, vit, "class")


@pytest.mark.parametrize("num_images", [1, 128, 130])
def test_every_image_keeps_its_feature(vit, num_images):
    """130 images are one full batch and a rest."""
    source = Images(num_images)
    found = features(vit, source)
    assert found.indices == list(range(num_images))
    assert found.damaged == []
    for index in {0, num_images // 2, num_images - 1}:
        alone = pool(encode(vit, NORMALISE(source.images[index : index + 1])), vit, "mean")
        torch.testing.assert_close(found.values[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_damaged_images_are_left_out_and_nothing_shifts(vit):
    whole = features(vit, Images(270))
    gone = [0, 7, *range(128, 256), 269]  # the second batch is damaged altogether
    found = features(vit, Images(270, damaged=gone))
    assert found.indices == [i for i in range(270) if i not in gone]
    torch.testing.assert_close(found.values, whole.values[found.indices], rtol=1e-4, atol=1e-5)
    assert [item.name for item in found.damaged] == [f"image {i}" for i in gone]
    assert {item.reason for item in found.damaged} == {"scratched"}


def test_a_part_of_a_source_keeps_its_images_and_labels(vit):
    whole = features(vit, Images(20))
    part = Subset(Images(20, damaged=[7]), [3, 7, 8, 15])
    found = features(vit, part)
    assert found.indices == [0, 2, 3]
    torch.testing.assert_close(found.values, whole.values[[3, 8, 15]], rtol=1e-4, atol=1e-5)
    assert [part.labels[i] for i in found.indices] == ["b", "a", "b"]


@pytest.mark.parametrize("training", [True, False])
def test_extraction_leaves_the_encoder_as_it_was(vit, training):
    vit.train(training)
    found = features(vit, Images(3))
    assert vit.training == training
    assert found.values.dtype == torch.float32
    assert not found.values.requires_grad


def test_a_source_without_a_readable_image_is_refused(vit):
    with pytest.raises(InputError, match="image"):
        features(vit, Images(3, damaged=range(3)))


def test_accuracy_survives_damaged_images_on_both_sides(vit):
    """Labels follow their images: brightness tells the two classes apart, whatever is missing."""
    train, val = Images(41, damaged=[0, 5, 6]), Images(20, damaged=[3])
    split = LabelledImages(train, val, ["a", "b"])
    found = split_features(vit, split, NORMALISE, size=SIZE, pooling="mean", device=CPU, bf16=False)
    assert [knn_top1(found, split, k=k) for k in (5, 1)] == [100.0, 100.0]
    with pytest.raises(InputError, match=r"k: .*\(38\), got 39"):
        knn_top1(found, split, k=39)


def test_cosine_is_what_the_bank_is_compared_by():
    bank, labels = torch.tensor([[100.0, 100.0], [0.1, 0.0]]), torch.tensor([0, 1])
    votes = knn_votes(bank, labels, torch.tensor([[5.0, 1.0]]), k=1, temperature=0.07, num_classes=2)
    assert votes.argmax().item() == F.cosine_similarity(bank, torch.tensor([[5.0, 1.0]])).argmax().item() == 1
