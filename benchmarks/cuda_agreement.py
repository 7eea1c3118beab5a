"""Do CPU and GPU train the same model? Five steps of a tiny HPM from the same weights, images and mask noise.

The reference is float32 on the CPU with attention written out. It is compared with

* float32 on the other device (CUDA without TF32, fused attention): losses, gradient norms, final weights, masks;
* bf16 autocast on the other device: losses; on CUDA also with compiled blocks, as runs train there: losses and gradient
  norms beside those without compilation, and output and every gradient of one decoder block of a ViT-B at the size of
  real steps, for which the compiler chooses other kernels than for a tiny model.

What was compared is written before the next comparison begins. Without CUDA the other device is the CPU again, with
fused attention: that tries the script, not a GPU.

    python benchmarks/cuda_agreement.py --out agreement.json

Exits with 1 if a deviation is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hardpatch.config.config import Config
from hardpatch.config.values import with_fields
from hardpatch.method.method import Losses
from hardpatch.method.student import Teacher
from hardpatch.runs.build import build_method, build_optimizer, build_student, compile_blocks
from hardpatch.runs.folder import versions

STEPS = 5
BATCH_SIZE = 8
LEARNING_RATE = 1e-3
EMA_DECAY = 0.9
HARD_SHARE = 0.5

TOLERANCES = {
    "loss": 2e-5,
    "gradient_norm": 1e-4,
    "weights": 5e-3,
    "teacher_weights": 5e-3,
    "masks": 0.002,
    "bf16_loss": 0.03,
    "compiled_loss": 0.01,
    "compiled_gradient_norm": 0.05,
    "compiled_block": 0.03,
}
"""Largest relative deviation that passes.

Weights are compared by the norm of their difference, relative to the norm of what the five steps changed. AdamW
divides a gradient by its own size, so weights whose gradient is zero but for rounding move by it: this tolerance
cannot be as tight as the others, and the biases of keys, which have no other gradient, are left out. ``masks`` is the
share of patches that the other device would have hidden or shown otherwise: two scores that are equal but for
rounding may change places, and no more than that. All runs then train on the reference's masks, so that one such flip
does not drown the comparison.
"""


@dataclass
class Trace:
    """What five steps leave behind."""

    reconstruction: list[float] = field(default_factory=list)
    prediction: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    closest_scores: float = float("inf")
    """The smallest gap between the last patch hidden as hard and the first that was not: near 0, a mask may flip."""
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    teacher_weights: Tensor = field(default_factory=lambda: torch.empty(0))


def tiny_config() -> Config:
    """A 3-block ViT 64 wide on 32 px images, with the published choices of the method."""
    return with_fields(
        Config(),
        {
            "image_size": (32, 32),
            "encoder": "vit_tiny_patch16_224",
            "patch_size": 4,
            "encoder_width": 64,
            "encoder_depth": 3,
            "encoder_heads": 4,
            "decoder_width": 64,
            "decoder_depth": 2,
            "decoder_heads": 4,
            "predictor_depth": 2,
            "target": "norm_pix",
            "predictor_view": "both",
            "base_learning_rate": LEARNING_RATE,
        },
    )


def flat(module: torch.nn.Module) -> Tensor:
    """All parameters but the biases of keys, as one float64 vector on the CPU."""
    parts = []
    for name, parameter in module.named_parameters():
        part = parameter.detach().cpu().double().flatten()
        if name.endswith("qkv.bias"):
            query, _, value = part.chunk(3)
            part = torch.cat([query, value])
        parts.append(part)
    return torch.cat(parts)


def train(
    device: torch.device,
    *,
    fused_attention: bool,
    bf16: bool,
    compiled: bool = False,
    masks: list[Tensor] | None = None,
) -> Trace:
    """Five steps. All randomness is drawn on the CPU and moved, so that every device sees the same.

    Args:
        device: Where to train.
        fused_attention: PyTorch's fused attention, or written out.
        bf16: Autocast to bf16.
        compiled: Compile the blocks.
        masks: Train on these masks, one per step; by default on the own ones.
    """
    config = tiny_config()
    student = build_student(config)
    method = build_method(config, student)
    student.to(device)
    for module in student.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused_attention
    teacher, optimizer = Teacher(student), build_optimizer(config.optimisation, student)
    if compiled:
        compile_blocks(student, teacher)
    generator = torch.Generator().manual_seed(0)
    num_hard = int(method.num_hidden * HARD_SHARE)
    trace = Trace()
    for step in range(STEPS):
        # Smooth colours with noise on the left half: patches differ in how hard they are.
        images = torch.randn(BATCH_SIZE, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
        images[..., :16] += torch.randn(BATCH_SIZE, 3, 32, 16, generator=generator)
        images = images.to(device)
        noise = torch.rand(BATCH_SIZE, student.positions.shape[1], generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batch = method.mask(student, teacher, images, noise, num_hard=num_hard)
            hidden = batch.hidden
            if masks is not None:
                given = masks[step].to(device)
                batch = batch._replace(hidden=given, decoded=method.choose_decoded(given, noise))
            losses: Losses = method.learn(student, batch)
        assert batch.full.scores is not None
        ordered = batch.full.scores.float().sort(dim=1, descending=True).values
        gap = float((ordered[:, num_hard - 1] - ordered[:, num_hard]).min())
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        teacher.update(student, EMA_DECAY)
        trace.reconstruction.append(losses.reconstruction.item())
        trace.prediction.append(losses.prediction.item())
        trace.gradient_norm.append(norm.item())
        trace.masks.append(hidden.cpu())
        trace.closest_scores = min(trace.closest_scores, gap)
    trace.weights, trace.teacher_weights = flat(student), flat(teacher.model)
    return trace


def worst(mine: list[float], theirs: list[float]) -> float:
    """Largest relative deviation of two series; infinite where one is not finite."""
    deviations = [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
    return max(value if value == value else float("inf") for value in deviations)


def moved(mine: Tensor, theirs: Tensor, start: Tensor) -> float:
    """Norm of the difference of two ends, relative to the way from the start."""
    return float((mine - theirs).norm() / (theirs - start).norm())


def compare(reference: Trace, other: Trace, low_precision: Trace) -> dict[str, float]:
    """The deviations, by the names of :data:`TOLERANCES`."""
    start = flat(build_student(tiny_config()))
    return {
        "loss": max(
            worst(other.reconstruction, reference.reconstruction),
            worst(other.prediction, reference.prediction),
        ),
        "gradient_norm": worst(other.gradient_norm, reference.gradient_norm),
        "weights": moved(other.weights, reference.weights, start),
        "teacher_weights": moved(other.teacher_weights, reference.teacher_weights, start),
        "masks": float((torch.stack(other.masks) != torch.stack(reference.masks)).float().mean()),
        "bf16_loss": max(
            worst(low_precision.reconstruction, reference.reconstruction),
            worst(low_precision.prediction, reference.prediction),
        ),
    }


def relative_distance(mine: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm; infinite where a value is not finite."""
    distance = float((mine.double() - theirs.double()).norm() / theirs.double().norm())
    return distance if math.isfinite(distance) else math.inf


def gradient_of(tensor: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def compiled_block(
    device: torch.device, *, batch: int, tokens: int, width: int, heads: int, backend: str = "inductor"
) -> dict[str, float]:
    """How far a compiled block is from the same block uncompiled, both in bf16: norm of the difference, relative.

    Args:
        device: Where.
        batch: Images.
        tokens: Of each.
        width: Of a token.
        heads: Of its attention.
        backend: Of ``torch.compile``.

    Returns:
        Of the output, of the gradient by the tokens, and of that by each parameter.
    """
    torch.manual_seed(0)
    plain = nn.Sequential(Block(width, heads, qkv_bias=True)).to(device)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend=backend)
    start = torch.randn(batch, tokens, width, device=device)
    direction = torch.randn_like(start)
    found: list[dict[str, Tensor]] = []
    for model in (plain, compiled):
        given = start.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            out = model(given)
        (out.float() * direction).sum().backward()
        gradients = {name: gradient_of(parameter) for name, parameter in model.named_parameters()}
        query, _, value = gradients["0.attn.qkv.bias"].chunk(3)  # a key's bias has no gradient but rounding
        values = torch.cat([query, value])
        found.append(gradients | {"0.attn.qkv.bias": values, "output": out.detach(), "tokens": gradient_of(given)})
    mine, theirs = found
    return {name.removeprefix("0."): relative_distance(theirs[name], value) for name, value in mine.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    out: Path | None = parser.parse_args().out
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    cpu = torch.device("cpu")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else cpu
    if device == cpu:
        print(
            "no CUDA here: comparing the CPU with itself (written-out against fused attention)",
            file=sys.stderr,
        )
    reference = train(cpu, fused_attention=False, bf16=False)
    other = train(device, fused_attention=True, bf16=False, masks=reference.masks)
    low_precision = train(device, fused_attention=True, bf16=True, masks=reference.masks)
    deviations = compare(reference, other, low_precision)
    traces = {"cpu_float32": reference, "float32": other, "bf16": low_precision}
    about: dict[str, Any] = {
        **versions(device),
        "largest_weight_difference": float((other.weights - reference.weights).abs().max()),
        "smallest_score_gap": reference.closest_scores,
    }
    beyond = report(deviations, traces, about, out)
    if device.type == "cuda":
        try:
            traces["bf16_compiled"] = compiled = train(
                device, fused_attention=True, bf16=True, compiled=True, masks=reference.masks
            )
            deviations["compiled_loss"] = worst(compiled.reconstruction, low_precision.reconstruction)
            deviations["compiled_gradient_norm"] = worst(compiled.gradient_norm, low_precision.gradient_norm)
            beyond = report(deviations, traces, about, out)
            about["compiled_block"] = compiled_block(device, batch=256, tokens=197, width=512, heads=16)
            deviations["compiled_block"] = max(about["compiled_block"].values())
            beyond = report(deviations, traces, about, out)
        except Exception as error:  # a compiler that fails: what was compared before still counts
            traceback.print_exc()
            about["compilation_failed"] = f"{type(error).__name__}: {error}"[:2000]
            beyond = [*report(deviations, traces, about, out), "compilation"]
    for name, value in deviations.items():
        verdict = "BEYOND" if name in beyond else "within"
        print(f"{name:22s} {value:10.3g}  {verdict} {TOLERANCES[name]:g}")
    if "masks" in beyond:
        print(f"masks differ; smallest gap of two scores at the border: {reference.closest_scores:.2g}")
    return 1 if beyond else 0


def report(
    deviations: dict[str, float], traces: dict[str, Trace], about: dict[str, Any], out: Path | None
) -> list[str]:
    """Write what is known so far; return what is beyond its tolerance."""
    beyond = [name for name, value in deviations.items() if not value <= TOLERANCES[name]]
    result = {
        **about,
        "agrees": not beyond and "compilation_failed" not in about,
        "beyond_tolerance": beyond,
        "deviations": deviations,
        "tolerances": TOLERANCES,
        "steps": STEPS,
        "traces": {
            name: {key: value for key, value in asdict(trace).items() if isinstance(value, list) and key != "masks"}
            for name, trace in traces.items()
        },
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return beyond


if __name__ == "__main__":
    sys.exit(main())
