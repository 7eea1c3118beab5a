"""The training step in the plain way of research code, to measure against: the same method, none of the means.

What the published code does, written anew: the teacher is a whole model whose reconstructor runs for nothing; masks
come from a loop over images on the host; every decoder writes out every token in image order; attention is written
out; the ranking loss takes two logarithms of every ordered pair; optimizer and moving average go parameter by
parameter; the host waits for the loss at every step. float32 on a CPU, fp16 autocast with loss scaling on CUDA.

It computes what :meth:`hardpatch.method.method.Method.step` computes, to rounding (``tests/tools/test_benchmark.py``).
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from jaxtyping import Bool, Float
from timm.layers import Attention
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from hardpatch.config.config import OptimisationConfig
from hardpatch.method.student import Student
from hardpatch.method.targets.target import Target


class PlainStep:
    """A student, its teacher and its optimizer, and the plain step.

    Args:
        student: Trained in place; decoders of self-attention, a loss predictor of the published view.
        target: What is reconstructed.
        num_hidden: M.
        optimisation: Of the run.
    """

    def __init__(self, student: Student, target: Target, *, num_hidden: int, optimisation: OptimisationConfig) -> None:
        self.student = student
        self.target = target
        self.num_hidden = num_hidden
        for module in student.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.device = student.mask_token.device
        groups = param_groups_weight_decay(student, optimisation.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimisation.base_learning_rate, betas=optimisation.betas, foreach=False, fused=False
        )
        self.clip = optimisation.gradient_clip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")

    def step(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"], *, num_hard: int, ema_decay: float
    ) -> float:
        """One step; returns the total loss."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                _, scores = run_whole(self.teacher, images, torch.zeros_like(noise, dtype=torch.bool))
            hidden = loop_masks(scores, noise, num_hidden=self.num_hidden, num_hard=num_hard)
            prediction, predicted_loss = run_whole(self.student, images, hidden)
            patch_loss = self.target.patch_loss(prediction, self.target(images))
            reconstruction = (patch_loss * hidden).sum() / hidden.sum()
            b = len(images)
            ranking = two_log_loss(predicted_loss[hidden].reshape(b, -1), patch_loss[hidden].reshape(b, -1))
            loss = reconstruction + ranking
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.clip, foreach=False)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        theirs = self.student.state_dict()
        for name, mine in self.teacher.state_dict().items():
            mine.copy_(mine * ema_decay + theirs[name] * (1 - ema_decay))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return value


def run_whole(
    model: Student, images: Float[Tensor, "b c h w"], hidden: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, "b n p"], Float[Tensor, "b n"]]:
    """Encoder on what is visible, both decoders on every token in image order, both heads on every patch.

    Returns:
        Reconstruction and predicted loss of every patch, in image order.
    """
    encoder, count = model.encoder, model.encoder.num_prefix_tokens
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    prefix, patches = tokens[:, :count], tokens[:, count:]
    b, n, d = patches.shape
    visible = patches[~hidden].reshape(b, -1, d)
    encoded = encoder.norm(encoder.blocks(encoder.norm_pre(torch.cat([prefix, visible], dim=1))))
    embedded = model.decoder_embed(encoded)
    shown = torch.stack([(~hidden[i]).nonzero()[:, 0] for i in range(b)])
    unseen = torch.stack([hidden[i].nonzero()[:, 0] for i in range(b)])
    shuffled = torch.cat([shown, unseen], dim=1)
    mask_tokens = model.mask_token.expand(b, n - visible.shape[1], -1).to(embedded.dtype)
    body = torch.cat([embedded[:, count:], mask_tokens], dim=1)
    body = body.gather(1, shuffled.argsort(1).unsqueeze(-1).expand(-1, -1, body.shape[-1]))
    sequence = torch.cat([embedded[:, :count], body + model.positions], dim=1)
    assert model.predictor is not None, "the published loss predictor"
    assert not model.reconstructor.cross, "the published decoders"
    predicted, scores = (
        decoder.head(decoder.norm(decoder.blocks(sequence)))[:, count:]
        for decoder in (model.reconstructor, model.predictor)
    )
    return predicted, scores.float().mean(dim=-1)


def loop_masks(
    scores: Float[Tensor, "b n"], noise: Float[Tensor, "b n"], *, num_hidden: int, num_hard: int
) -> Bool[Tensor, "b n"]:
    """The hardest ``num_hard`` patches of each image, the rest of M by the noise, image by image on the host."""
    hidden = np.zeros(tuple(scores.shape), dtype=bool)
    for i in range(len(scores)):
        hardest = np.argsort(-scores[i].float().cpu().numpy(), kind="stable")[:num_hard]
        draw = noise[i].cpu().numpy().copy()
        draw[hardest] = -1
        rest = np.argsort(-draw, kind="stable")[: num_hidden - num_hard]
        hidden[i, hardest] = True
        hidden[i, rest] = True
    return torch.from_numpy(hidden).to(scores.device)


def two_log_loss(scores: Float[Tensor, "b m"], patch_loss: Float[Tensor, "b m"]) -> Float[Tensor, ""]:
    """The relative loss over all ordered pairs, both terms of the binary cross-entropy of each."""
    patch_loss = patch_loss.detach()
    harder = (patch_loss.unsqueeze(2) > patch_loss.unsqueeze(1)).float()
    easier = (patch_loss.unsqueeze(2) < patch_loss.unsqueeze(1)).float()
    probability = torch.sigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))
    entropy = -harder * torch.log(probability + 1e-6) - easier * torch.log(1 - probability + 1e-6)
    return entropy.sum() / (harder + easier).sum()
