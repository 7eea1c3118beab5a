"""Our MAE mode beside the MAE of other libraries: same model, batch, precision and optimizer, timed in turns.

    python benchmarks/peers.py --batch-size 8 --seconds 8 --rounds 3 --out peers.json

The peers are transformers' ViTMAE and lightly's MAE, each where it is installed (``pip install --group bench``). Sizes
and conditions are those of ``hardpatch benchmark step``, and so are table, JSON and picture.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from hardpatch.cli.benchmark import report_steps
from hardpatch.cli.flags import parse
from hardpatch.config.benchmark import BenchmarkConfig
from hardpatch.config.config import Config
from hardpatch.method.vit import create_encoder, patch_size, patchify
from hardpatch.runs.build import build_normalise
from hardpatch.runtime.errors import InputError, Interrupted
from hardpatch.tools.benchmark.step import OurStep, counted_flops, variant_config
from hardpatch.tools.benchmark.timing import Conditions, Stepper, measure


class PeerStep:
    """One training step of somebody else's MAE, with our data type, normalisation, clipping and optimizer.

    Args:
        model: Images to the loss.
        config: Of our run.
        device: Where.
        bf16: Autocast.
    """

    def __init__(self, model: nn.Module, config: Config, *, device: torch.device, bf16: bool) -> None:
        self.model = model.to(device).train()
        self.images_per_step = config.optimisation.batch_size
        self.bf16, self.device = bf16, device
        optimisation = config.optimisation
        groups = param_groups_weight_decay(model, optimisation.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimisation.base_learning_rate, betas=optimisation.betas, fused=True
        )
        self.normalise = build_normalise(config).to(device)

    def step(self, fetch: Callable[[], Tensor]) -> None:
        """One training step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.normalise(fetch()))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops_per_view(self, images: Tensor) -> float:
        """Counted over a whole step of a few images."""
        return counted_flops(self, images)


class TransformersMae(nn.Module):
    """``ViTMAEForPreTraining`` of transformers, in the sizes of a config.

    Args:
        config: Of our run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        encoder = _encoder(config)
        self.model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=encoder.embed_dim,
                num_hidden_layers=len(encoder.blocks),
                num_attention_heads=encoder.blocks[0].attn.num_heads,
                intermediate_size=4 * encoder.embed_dim,
                image_size=config.data.size[0],
                patch_size=patch_size(encoder)[0],
                decoder_hidden_size=config.model.decoder_width,
                decoder_num_hidden_layers=config.model.decoder_depth,
                decoder_num_attention_heads=config.model.decoder_heads,
                decoder_intermediate_size=4 * config.model.decoder_width,
                mask_ratio=config.method.mask_ratio,
                norm_pix_loss=True,
                attn_implementation="sdpa",
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        loss: Tensor = self.model(pixel_values=images).loss
        return loss


class LightlyMae(nn.Module):
    """MAE as lightly's documentation builds it from its modules, in the sizes of a config.

    Args:
        config: Of our run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        encoder = _encoder(config)
        self.utils, self.mask_ratio = utils, config.method.mask_ratio
        self.patch = patch_size(encoder)
        self.num_patches = encoder.patch_embed.num_patches
        self.backbone = MaskedVisionTransformerTIMM(vit=encoder)
        self.decoder = MAEDecoderTIMM(
            num_patches=self.num_patches,
            patch_size=self.patch[0],
            embed_dim=encoder.embed_dim,
            decoder_embed_dim=config.model.decoder_width,
            decoder_depth=config.model.decoder_depth,
            decoder_num_heads=config.model.decoder_heads,
            mlp_ratio=4.0,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        size = (len(images), self.num_patches + 1)
        keep, mask = self.utils.random_token_mask(size=size, mask_ratio=self.mask_ratio, device=images.device)
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = self.utils.repeat_token(self.decoder.mask_token, size).to(encoded.dtype)
        tokens = self.utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = self.decoder.predict(self.utils.get_at_index(self.decoder.decode(tokens), mask))
        patches = patchify(images, self.patch)
        target = self.utils.get_at_index(patches, mask - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        loss: Tensor = (predicted.float() - target).square().mean()
        return loss


PEERS: dict[str, Callable[[Config], nn.Module]] = {"transformers": TransformersMae, "lightly": LightlyMae}
"""By the name of the package they need."""


def _encoder(config: Config) -> Any:
    return create_encoder(config.model.encoder, image_size=config.data.size, patch_size=config.model.patch_size)


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure our MAE mode and every peer that is installed.

    Raises:
        InputError: No peer is installed.
    """
    there = [name for name in PEERS if importlib.util.find_spec(name)]
    missing = [name for name in PEERS if name not in there]
    if not there:
        raise InputError("peers: neither transformers nor lightly is installed; pip install --group bench")
    conditions = Conditions.of(config)
    device, bf16 = conditions.device, conditions.bf16
    chosen = variant_config("mae", config, conditions.batch_size)
    builders: dict[str, Callable[[], Stepper]] = {
        "mae": partial(OurStep, chosen, device=device, bf16=bf16, compiled=conditions.compiled)
    }
    for name in there:
        builders[name] = partial(_build_peer, name, chosen, device, bf16)
    figures = measure(builders, config, conditions)
    figures["versions"] |= {name: importlib.metadata.version(name) for name in there}
    return figures | {"measured": "step alone" + (f"; not installed: {', '.join(missing)}" if missing else "")}


def _build_peer(name: str, config: Config, device: torch.device, bf16: bool) -> PeerStep:
    return PeerStep(PEERS[name](config), config, device=device, bf16=bf16)


def main() -> None:
    config, as_json = parse(BenchmarkConfig, "peers", sys.argv[1:])
    try:
        report_steps(run(config), config.out, "hardpatch benchmark step    what mining costs on top", as_json=as_json)
    except (InputError, Interrupted) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 3) from None


if __name__ == "__main__":
    main()
