"""Discrete tokens as the target (BEiT): a tokenizer names each patch by an integer, the student guesses the name.

Any ``images -> (B, N) integers`` serves as tokenizer. The embedded one needs no download: it is a codebook of k-means
centroids over the patches of the user's own images, fitted before training and saved with the run.

Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, section 2.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hardpatch.method.targets.pixels import PixelTarget
from hardpatch.method.targets.target import SizedCrops, TargetContext
from hardpatch.runtime.errors import InputError
from hardpatch.runtime.log import say
from hardpatch.runtime.seeding import Stream, derive_seed

MAX_PATCHES = 50_000
"""Patches that the codebook is fitted to, at most."""


@runtime_checkable
class Tokenizer(Protocol):
    """Names every patch by an integer."""

    vocabulary: int
    """Integers are 0 .. ``vocabulary`` - 1."""

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """The token of every patch, in image order.

        Args:
            images: Normalised as in the run.
        """
        ...


class TokenTarget(nn.Module):
    """A discrete token for each patch, with cross-entropy.

    Args:
        tokenizer: Names the patches.
    """

    needs_teacher = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.dim = tokenizer.vocabulary

    @torch.no_grad()
    def forward(
        self, images: Float[Tensor, "b c h w"], features: Float[Tensor, "b t d"] | None = None
    ) -> Int[Tensor, "b n 1"]:
        """The token of every patch; ``features`` are not used."""
        return self.tokenizer(images).long().unsqueeze(-1)

    def patch_loss(self, prediction: Float[Tensor, "b m p"], target: Int[Tensor, "b m 1"]) -> Float[Tensor, "b m"]:
        """Cross-entropy of the predicted distribution over the vocabulary."""
        logits = prediction.float().transpose(1, 2)
        return F.cross_entropy(logits, target.squeeze(-1), reduction="none")


class KMeansTokenizer(nn.Module):
    """The nearest of the centroids of a codebook, over patches without their mean and contrast.

    Why ``norm_pix``: of raw pixels, k-means spends its centroids on brightness, the direction of largest variance. Such
    a token hardly differs between neighbours, and guessing it asks for no more than the mean of what is visible.
    Without mean and contrast the centroids are edges, textures and differences of colour.

    Args:
        vocabulary: Centroids.
        patch_size: Height and width of a patch in pixels.
        channels: Channels of the images.
    """

    def __init__(self, vocabulary: int, *, patch_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.pixels = PixelTarget(patch_size, channels=channels, normalise=True)
        self.codebook = nn.Buffer(torch.full((vocabulary, self.pixels.dim), torch.nan))
        self._is_fitted = False

    def adopt(self, codebook: Float[Tensor, "k p"]) -> None:
        """Take over a codebook that is fitted."""
        self.codebook.copy_(codebook)
        self._is_fitted = True

    def forward(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """The nearest centroid of every patch."""
        assert self._is_fitted, "a codebook must be fitted or loaded before it is used"
        # Tensors without content, on which FLOPs are counted, know no autocast.
        with nullcontext() if images.is_meta else torch.autocast(images.device.type, enabled=False):
            return nearest(self.pixels(images), self.codebook)


class CodebookTarget(TokenTarget):
    """Tokens of a k-means codebook, which is fitted to the images before the first step and saved with the run.

    Args:
        tokenizer: The codebook, still empty.
    """

    num_crops = 2000
    tokenizer: KMeansTokenizer

    def __init__(self, tokenizer: KMeansTokenizer) -> None:
        super().__init__(tokenizer)

    def fit(self, crops: SizedCrops, *, seed: int) -> dict[str, Tensor]:
        """The codebook that fits these crops.

        Raises:
            InputError: The images have fewer different patches than the codebook has entries.
        """
        patches = sample_patches(crops, self.tokenizer.pixels, seed=seed)
        return {"codebook": fit_codebook(patches, vocabulary=self.tokenizer.vocabulary, seed=seed)}

    def fitted_state(self) -> dict[str, Tensor]:
        """The codebook."""
        return {"codebook": self.tokenizer.codebook}

    def adopt(self, state: dict[str, Tensor]) -> None:
        """Take over a codebook that was fitted before."""
        self.tokenizer.adopt(**state)


def build(context: TargetContext) -> TokenTarget:
    """The target ``tokens``, with the user's tokenizer or the codebook.

    Raises:
        InputError: The tokenizer cannot be loaded, or does not say what it should.
    """
    geometry = context.geometry
    if not context.tokenizer:
        codebook = KMeansTokenizer(context.num_tokens, patch_size=geometry.patch, channels=geometry.channels)
        return CodebookTarget(codebook)
    return TokenTarget(
        load_tokenizer(
            context.tokenizer, num_patches=geometry.num_patches, image_size=geometry.image_size,
            channels=geometry.channels, seed=context.seed,
        )
    )  # fmt: skip


def nearest(patches: Float[Tensor, "*n p"], codebook: Float[Tensor, "k p"]) -> Int[Tensor, "*n"]:
    """Index of the nearest centroid: |x - c|^2 is smallest where x c - |c|^2 / 2 is largest."""
    return (patches @ codebook.T - codebook.square().sum(dim=1) / 2).argmax(dim=-1)


def sample_patches(crops: SizedCrops, pixels: PixelTarget, *, seed: int) -> Float[Tensor, "n p"]:
    """At most :data:`MAX_PATCHES` patches, as many of each crop, drawn by the seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, Stream.TOKENS))
    sampled = []
    for crop in crops:
        patches = pixels(crop)[0]
        chosen = torch.randperm(len(patches), generator=generator)[: MAX_PATCHES // len(crops)]
        sampled.append(patches[chosen])
    return torch.cat(sampled)


def fit_codebook(patches: Float[Tensor, "n p"], *, vocabulary: int, seed: int) -> Float[Tensor, "k p"]:
    """Centroids of k-means over patches; a function of the seed.

    Args:
        patches: Normalised as the tokenizer does.
        vocabulary: Centroids.
        seed: The run's seed.

    Raises:
        InputError: There are fewer different patches than ``vocabulary``.
    """
    from sklearn.cluster import MiniBatchKMeans

    different = len(patches.unique(dim=0))
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
    counts = torch.from_numpy(kmeans.labels_).bincount(minlength=vocabulary)
    say(
        f"codebook: {int(counts.count_nonzero()):,} tokens are in use, the commonest names "
        f"{int(counts.max()) / len(patches):.1%} of the patches"
    )
    return codebook


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
    problem = f"cannot import {module_name!r} (installed, or on PYTHONPATH?)"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.TOKENS))
        try:
            module = importlib.import_module(module_name)
            problem = f"{name!r} failed"
            function = getattr(module, function_name, None)
            tokenizer = function() if callable(function) else None
        except Exception as error:  # whatever a module of the user's may raise
            raise InputError(f"tokenizer: {problem}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise InputError(f"tokenizer: {module_name!r} has no function {function_name!r}")
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
