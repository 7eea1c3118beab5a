"""Discrete tokens: the codebook, its life with a run, and tokenizers that users bring."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.data.images.decode import Sample
from hardpatch.data.loader.loading import Normalise, TrainingImages
from hardpatch.data.sources import Source
from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.targets.tokens import (
    CodebookTarget,
    KMeansTokenizer,
    Tokenizer,
    TokenTarget,
    load_tokenizer,
    nearest,
    sample_patches,
)
from hardpatch.runs.build import build_target
from hardpatch.runs.load import LoadedRun, load_encoder, load_teacher
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.runtime.log import read_metrics
from hardpatch.training.fitting import Crops
from hardpatch.training.reporting import Reporter
from tiny import TINY, assert_same_state, final_state, flags, pretrain

torch.set_num_threads(1)
PIXELS = PixelTarget((8, 8), channels=3, normalise=True)
NORMALISE = Normalise((0.5,) * 3, (0.25,) * 3)
TOKENS = TINY | {"target": "tokens", "num_tokens": 16}


class Kinds(Source):
    """Images of 8-pixel patches of a few kinds of stripes, at any brightness and contrast, with a little noise."""

    def __init__(self, num_images=10, *, kinds=6, noise=2.0):
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(kinds, 3, 8, 8, generator=generator)
        patterns = (patterns - patterns.mean((1, 2, 3), keepdim=True)) / patterns.std((1, 2, 3), keepdim=True)
        self.kind = torch.randint(kinds, (num_images, 4, 3), generator=generator)
        brightness = 100 + 60 * torch.rand(num_images, 4, 3, 1, 1, 1, generator=generator)
        contrast = 10 + 10 * torch.rand(num_images, 4, 3, 1, 1, 1, generator=generator)
        patches = brightness + contrast * patterns[self.kind]  # (image, row, column, channel, y, x)
        patches = patches + noise * torch.randn(patches.shape, generator=generator)
        images = patches.permute(0, 3, 1, 4, 2, 5).reshape(num_images, 3, 32, 24)
        self.images = images.clamp(0, 255).to(torch.uint8)

    def __len__(self):
        return len(self.images)

    def read(self, index):
        return Sample(self.images[index], None)

    def name(self, index):
        return str(index)

    def content(self, index):
        return self.images[index].numpy().tobytes()

    @property
    def labels(self):
        return None


def uncropped(source, *, most=CodebookTarget.num_crops):
    """The images as crops to be fitted to."""
    images = TrainingImages(source, size=(32, 24), crop_scale=(1, 1), flip=False, seed=0)
    return Crops(images, NORMALISE, most=most)


def codebook_of(vocabulary):
    return CodebookTarget(KMeansTokenizer(vocabulary, patch_size=(8, 8), channels=3))


def run(out, **changes):
    values = TOKENS | changes
    return pretrain(values.pop("data"), out, **values)


@pytest.fixture
def _few_crops(monkeypatch):
    monkeypatch.setattr("hardpatch.method.targets.tokens.CodebookTarget.num_crops", 96)


def test_nearest_equals_a_loop_over_centroids():
    patches, codebook = torch.randn(2, 5, 7), torch.randn(6, 7) * torch.tensor([[0.1], [1], [3], [1], [1], [1]])
    for image, tokens in zip(patches, nearest(patches, codebook), strict=True):
        for patch, token in zip(image, tokens, strict=True):
            distances = [float((patch - centroid).square().sum()) for centroid in codebook]
            assert int(token) == distances.index(min(distances))


def test_tokens_name_the_structure_whatever_its_brightness_and_contrast():
    source = Kinds()
    target = codebook_of(6)
    target.adopt(target.fit(uncropped(source), seed=0))
    tokens = target(NORMALISE(source.images)).flatten()
    pairs = set(zip(tokens.tolist(), source.kind.flatten().tolist(), strict=True))
    assert len(pairs) == 6, "one token for each kind"


def test_the_codebook_is_a_function_of_the_seed():
    crops = uncropped(Kinds(), most=40)
    books = [codebook_of(20).fit(crops, seed=seed)["codebook"] for seed in (0, 0, 1)]
    torch.rand(1)
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_samples_are_bounded_and_spread(monkeypatch):
    monkeypatch.setattr("hardpatch.method.targets.tokens.MAX_PATCHES", 20)
    source, seen = Kinds(), []
    monkeypatch.setattr(source, "read", lambda index: seen.append(index) or Sample(source.images[index], None))
    assert sample_patches(uncropped(source, most=5), PIXELS, seed=0).shape == (20, 192)
    assert seen == [0, 2, 4, 6, 9]
    monkeypatch.setattr("hardpatch.method.targets.tokens.MAX_PATCHES", 1000)
    assert sample_patches(uncropped(source, most=25), PIXELS, seed=0).shape == (20 * 12, 192), "two crops of each"


def test_too_few_different_patches():
    source = Kinds(num_images=4, noise=0)
    source.images[:] = source.images[:1, :, :8, :8].repeat(1, 1, 4, 3)
    source.images[0, 0, 0, 0] += 50
    with pytest.raises(InputError, match=r"num_tokens: .* 2 of the 24,000 looked at are different; got 3"):
        codebook_of(3).fit(uncropped(source), seed=0)
    assert codebook_of(2).fit(uncropped(source), seed=0)["codebook"].shape == (2, 192)


def test_an_empty_codebook_names_nothing():
    with pytest.raises(AssertionError, match="fitted"):
        KMeansTokenizer(4, patch_size=(8, 8), channels=3)(torch.randn(1, 3, 16, 16))


def test_tokens_do_not_depend_on_autocast():
    tokenizer = KMeansTokenizer(50, patch_size=(8, 8), channels=3)
    tokenizer.adopt(torch.randn(192) + 1e-3 * torch.randn(50, 192))
    images = torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = tokenizer(images)
    assert torch.equal(tokens, tokenizer(images))


def test_cross_entropy_equals_a_loop():
    class First:
        vocabulary = 5

        def __call__(self, images):
            return torch.arange(6).reshape(2, 3).int() % 5

    target = TokenTarget(First())
    assert isinstance(target.tokenizer, Tokenizer)
    tokens = target(torch.randn(2, 3, 8, 24))
    assert tokens.shape == (2, 3, 1)
    assert tokens.dtype == torch.int64
    assert target.dim == 5
    logits = (3 * torch.randn(2, 3, 5)).bfloat16()
    loss = target.patch_loss(logits, tokens)
    assert loss.dtype == torch.float32
    for b in range(2):
        for m in range(3):
            expected = F.cross_entropy(logits[b, m].float(), tokens[b, m, 0])
            assert loss[b, m].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.usefixtures("_few_crops")
def test_a_stopped_run_keeps_its_codebook_and_ends_bit_identical(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    after_step = Reporter.after_step

    def stopping(self, meter):
        after_step(self, meter)
        if self.run.state.step == 5:
            self.run.save()
            raise Interrupted("test")

    monkeypatch.setattr(Reporter, "after_step", stopping)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    monkeypatch.setattr(Reporter, "after_step", after_step)
    monkeypatch.setattr(CodebookTarget, "fit", lambda *_, **__: pytest.fail("fitted again"))
    run(tmp_path / "stopped")
    whole, stopped = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert_same_state(whole, stopped)
    assert whole["target"].keys() == {"codebook"}
    assert torch.equal(whole["target"]["codebook"], stopped["target"]["codebook"])
    loaded = LoadedRun(tmp_path / "stopped")
    assert torch.equal(loaded.method.target.tokenizer.codebook, whole["target"]["codebook"])
    images = torch.randn(2, 3, 32, 32)
    assert loaded.method.target(images).shape == (2, 16, 1)


@pytest.mark.usefixtures("_few_crops")
def test_a_restarted_run_fits_anew(tmp_path):
    run(tmp_path / "run", epochs=1)
    first = final_state(tmp_path / "run")["target"]["codebook"]
    run(tmp_path / "run", epochs=1, seed=1, resume="restart")
    assert not torch.equal(final_state(tmp_path / "run")["target"]["codebook"], first)


@pytest.mark.usefixtures("_few_crops")
def test_a_codebook_that_cannot_be_fitted_leaves_the_folder_as_it_was(tmp_path):
    run(tmp_path / "run", epochs=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="num_tokens"):
        run(tmp_path / "run", epochs=1, num_tokens=5000, resume="restart")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_two_processes_share_one_codebook(tmp_path):
    values = TOKENS | {"epochs": 1, "image_size": 16, "log_steps": 1}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hardpatch",
         "pretrain", "--recipe", "hpm", "--out", str(tmp_path / "two"), *flags(values)],
        check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=240, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "one", epochs=1, image_size=16, log_steps=1)
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert torch.equal(one["target"]["codebook"], two["target"]["codebook"])
    losses = [[r["reconstruction_loss"] for r in read_metrics(tmp_path / name) if "reconstruction_loss" in r]
              for name in ("one", "two")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def adapter(name, *, num_patches=16, seed=0):
    return load_tokenizer(f"own_tokenizers:{name}", num_patches=num_patches, image_size=(32, 32), channels=3, seed=seed)


def test_a_users_tokenizer_is_frozen_and_asked():
    tokenizer = adapter("brightness")
    assert not tokenizer.training
    assert not tokenizer.weight.requires_grad
    target = build_target(with_fields(Config(), TOKENS | {"tokenizer": "own_tokenizers:brightness"}))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(target(images)[..., 0], tokenizer(images).long())
    assert target.dim == 16


def test_what_a_users_tokenizer_draws_is_a_function_of_the_seed():
    state = torch.get_rng_state()
    offsets = [adapter("drawn", seed=seed).offset for seed in (0, 0, 1)]
    assert offsets[0] == offsets[1] != offsets[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_tokenizers", "must be module:function, got 'own_tokenizers'"),
        (":brightness", "must be module:function"),
        ("no_such_module:tokenizer", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("own_tokenizers:nothing", "'own_tokenizers' has no function 'nothing'"),
        ("own_tokenizers:not_a_function", "'own_tokenizers' has no function"),
        ("own_tokenizers:fails", "'own_tokenizers:fails' failed: RuntimeError: no such codebook"),
        ("own_tokenizers:nameless", "attribute vocabulary.*got function with vocabulary None"),
        ("own_tokenizers:no_callable", "got int with vocabulary None"),
        ("own_tokenizers:wrong_vocabulary", "got Fixed with vocabulary 'many'"),
        ("own_tokenizers:wrong_shape", r"integers \(2, 16\) \(the patch grid of the encoder\), got \(2, 3\)"),
        ("own_tokenizers:wrong_dtype", r"got torch.float32"),
        ("own_tokenizers:wrong_range", r"from 0 to 3 \(vocabulary - 1\), got 0 to 15"),
        ("own_tokenizers:negative", r"from 0 to 99 \(vocabulary - 1\), got -15 to 0"),
        ("own_tokenizers:no_tensor", "got a str"),
        ("own_tokenizers:breaks", "it failed: AttributeError"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused_before_training(tmp_path, name, message):
    with pytest.raises(InputError, match=f"tokenizer: .*{message}"):
        run(tmp_path / "run", tokenizer=name)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_few_crops")
def test_weights_load_without_the_target(tmp_path, monkeypatch):
    run(tmp_path / "run", epochs=1)
    for module in ("build", "load"):
        monkeypatch.setattr(f"hardpatch.runs.{module}.build_target", lambda *_: pytest.fail("built a target"))
    images = torch.randn(1, 3, 32, 32)
    assert load_encoder(tmp_path / "run").forward_features(images).shape == (1, 17, 32)
    assert load_encoder(tmp_path / "run/checkpoints/last").forward_features(images).shape == (1, 17, 32)
    assert load_teacher(tmp_path / "run").predict_loss(images).shape == (1, 16)
