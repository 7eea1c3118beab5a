"""The codebook of target ``tokens``: fitted to the images of a run, or loaded from elsewhere."""

from __future__ import annotations

from hardpatch.method.targets.tokens import Tokenizer
import importlib
from contextlib import nullcontext
from typing import Protocol, runtime_checkable
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from hardpatch.data.loader.loading import Normalise, TrainingImages
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say, tracked
from hardpatch.runtime.seeding import Stream, derive_seed
from hardpatch.method.targets.pixels import PixelTarget


MAX_CROPS = 2000
"""Crops whose patches the codebook is fitted on, at most."""
MAX_PATCHES = 50_000
"""Patches that the codebook is fitted on, at most."""


def fit_codebook(
    images: TrainingImages, normalise: Normalise, pixels: PixelTarget, *, vocabulary: int, seed: int
) -> Float[Tensor, "k p"]:
    """Fit a codebook to patches of the training images, as training crops them; a function of the seed.

    Args:
        images: The training images.
        normalise: The run's normalisation.
        pixels: Cuts (and normalises) the patches.
        vocabulary: Centroids.
        seed: The run's seed.

    Raises:
        InputError: The images have fewer different patches than ``vocabulary``.
    """
    patches = sample_patches(images, normalise, pixels, seed=seed)
    different = len(np.unique(patches.numpy(), axis=0))
    if different < vocabulary:
        raise InputError(
            f"num_tokens: must be at most the number of different patches in the data, and {different:,} of the "
            f"{len(patches):,} looked at are different; got {vocabulary:,}"
        )
    say(f"fitting a codebook of {vocabulary:,} tokens to {len(patches):,} patches")
    kmeans = MiniBatchKMeans(
        vocabulary, random_state=derive_seed(seed, Stream.TOKENS) % 2**32, batch_size=4096, max_iter=20, n_init=1,
        init_size=3 * vocabulary,
    )  # fmt: skip
    codebook = torch.from_numpy(kmeans.fit(patches.numpy()).cluster_centers_).float()
    counts = np.bincount(kmeans.labels_, minlength=vocabulary)
    say(
        f"codebook: {np.count_nonzero(counts):,} tokens are in use, the commonest names "
        f"{counts.max() / len(patches):.1%} of the patches"
    )
    return codebook


def sample_patches(
    images: TrainingImages, normalise: Normalise, pixels: PixelTarget, *, seed: int
) -> Float[Tensor, "n p"]:
    """At most :data:`MAX_PATCHES` patches of at most :data:`MAX_CROPS` crops spread over the images.

    Of few images, several crops each: those that the first epochs will show.
    """
    total = len(images.source)
    indices = torch.linspace(0, total - 1, min(total, MAX_CROPS)).long().tolist()
    crops = [(epoch, index) for epoch in range(MAX_CROPS // len(indices)) for index in indices]
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.TOKENS))
    sampled = []
    for crop in tracked(crops, "codebook", total=len(crops)):
        image = images[crop].image
        patches = pixels(normalise(image.unsqueeze(0)))[0]
        chosen = torch.randperm(len(patches), generator=generator)[: MAX_PATCHES // len(crops)]
        sampled.append(patches[chosen])
    return torch.cat(sampled)


def load_tokenizer(name: str, *, num_patches: int, image_size: tuple[int, int], channels: int, seed: int) -> Tokenizer:
    """Call the user's ``module:function`` and try what it returns on one image of noise.

    Args:
        name: ``module:function``; the function is called without arguments.
        num_patches: N, the integers that an image must get.
        image_size: Height and width of the run's images.
        channels: Channels of the run's images.
        seed: Of whatever the function draws, so that a resumed run gets the same tokenizer.

    Raises:
        InputError: It cannot be imported or called, has no ``vocabulary``, or returns something else than asked.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise InputError(f"tokenizer: must be module:function, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.TOKENS))
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever a module of the user's may raise
            raise InputError(
                f"tokenizer: cannot import {module_name!r} (installed, or on PYTHONPATH?): "
                f"{type(error).__name__}: {error}"
            ) from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"tokenizer: {module_name!r} has no function {function_name!r}")
        try:
            tokenizer = function()
        except Exception as error:
            raise InputError(f"tokenizer: {name!r} failed: {type(error).__name__}: {error}") from error
    vocabulary = getattr(tokenizer, "vocabulary", None)
    if not callable(tokenizer) or not isinstance(vocabulary, int) or vocabulary < 2:
        raise InputError(
            f"tokenizer: {name!r} must return a torch module or a callable with an attribute vocabulary, an integer "
            f"of at least 2; got {type(tokenizer).__name__} with vocabulary {vocabulary!r}"
        )
    if isinstance(tokenizer, nn.Module):
        tokenizer.eval().requires_grad_(False)
    _try_out(tokenizer, name, num_patches=num_patches, shape=(2, channels, *image_size))
    checked: Tokenizer = tokenizer
    return checked


def _try_out(tokenizer: Tokenizer, name: str, *, num_patches: int, shape: tuple[int, ...]) -> None:
    """Is what the tokenizer says of noise (B, N) integers in its vocabulary?"""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = f"tokenizer: {name!r} must turn images {shape} into integers {(shape[0], num_patches)}"
    try:
        with torch.no_grad():
            tokens = tokenizer(noise)
    except Exception as error:
        raise InputError(f"{wanted}; it failed: {type(error).__name__}: {error}") from error
    if not isinstance(tokens, Tensor):
        raise InputError(f"{wanted}, got a {type(tokens).__name__}")
    if tuple(tokens.shape) != (shape[0], num_patches):
        raise InputError(f"{wanted} (the patch grid of the encoder), got {tuple(tokens.shape)}")
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise InputError(f"{wanted}, got {tokens.dtype}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= tokenizer.vocabulary:
        raise InputError(f"{wanted} from 0 to {tokenizer.vocabulary - 1} (vocabulary - 1), got {low} to {high}")
