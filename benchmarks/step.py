"""Images per second of a training step: MAE against HPM with each view of the loss predictor.

    python benchmarks/step.py --models vit_small_patch16_224 vit_base_patch16_224 --image-size 224 \
        --batch-size 256 --seconds 10 --out step.json

The step is the one of ``hpm pretrain`` without its data: normalise, teacher, mask, student, backward, clip, AdamW, EMA.
MAE has no teacher and pays for none. Images are random bytes that lie on the device.

The variants take turns: in every round each runs the same number of steps, so that a machine that gets slower or busier
does so for all of them, and the ratio to MAE is taken within a round. The order rotates from round to round.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import Attention
from torch.utils.flop_counter import FlopCounterMode

from hpm.build import build_method, build_normalise, build_optimizer, build_student, choose_attention
from hpm.config import Config, with_fields
from hpm.distributed import choose_device, has_bf16
from hpm.method import Teacher
from hpm.run_folder import versions
from hpm.seeding import mask_noise

VARIANTS: dict[str, dict[str, str]] = {
    "mae": {"mask": "random", "predicted_loss": "none"},
    "hpm": {"predictor_view": "masked"},
    "hpm_full": {"predictor_view": "full"},
    "hpm_both": {"predictor_view": "both"},
}
"""Fields of the config by which the variants differ."""

EMA_DECAY = 0.999
HARD_SHARE = 0.25
"""The mean of a run from 0 to 0.5; the time of a step does not depend on it."""
NUM_FLOP_IMAGES = 2
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    fields: dict[str, Any]
    batch_size: int
    device: torch.device
    bf16: bool
    compile: bool

    def synchronise(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


class Variant:
    """The objects of one run and its training step."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        config = with_fields(Config(), {**setting.fields, **VARIANTS[name]})
        student = build_student(config)
        self.method = build_method(config, student)
        self.student = student.to(setting.device)
        choose_attention(self.student, setting.device)
        self.teacher = None if student.predictor is None else Teacher(student)
        self.optimizer = build_optimizer(config.optimisation, student)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.normalise = build_normalise(config).to(setting.device)
        self.num_hard = int(self.method.num_hidden * HARD_SHARE) if self.teacher else 0
        self.model: Callable[..., Any] = student
        self.steps_done = 0

    def compile(self) -> None:
        """Compile what runs on the device: the student, and the teacher's two calls."""
        self.model = torch.compile(self.student)
        if self.teacher is not None:
            self.teacher.encode = torch.compile(self.teacher.encode)  # type: ignore[method-assign]
            self.teacher.score = torch.compile(self.teacher.score)  # type: ignore[method-assign]

    def step(self, images: torch.Tensor) -> None:
        """One training step on raw images, without a wait for the device."""
        setting, count = self.setting, len(images)
        num_patches = self.student.positions.shape[1]
        noise = mask_noise(0, self.steps_done, batch_size=count, num_patches=num_patches, device=setting.device)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.bf16):
            losses = self.method.step(self.model, self.teacher, self.normalise(images), noise, num_hard=self.num_hard)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.teacher is not None:
            self.teacher.update(self.student, EMA_DECAY)
        self.steps_done += 1

    def turn(self, images: torch.Tensor, num_steps: int) -> float:
        """Seconds of ``num_steps`` steps, after one that is not counted."""
        self.step(images)
        self.setting.synchronise()
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step(images)
        self.setting.synchronise()
        return time.perf_counter() - start

    def flops_per_image(self, images: torch.Tensor) -> float:
        """Floating-point operations of one step, forward and backward, per image (a multiply-add counts as two)."""
        attentions = [
            module
            for model in (self.student, self.teacher)
            if model is not None
            for module in model.modules()
            if isinstance(module, Attention)
        ]
        before = [module.fused_attn for module in attentions]
        for module in attentions:
            module.fused_attn = False  # written out, so that every device counts the same
        with FlopCounterMode(display=False) as counter:
            self.step(images[:NUM_FLOP_IMAGES])
        for module, fused in zip(attentions, before):
            module.fused_attn = fused
        return float(counter.get_total_flops() / len(images[:NUM_FLOP_IMAGES]))


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation, range and all values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "rounds": values,
    }


def matmul_peak(setting: Setting) -> dict[str, Any]:
    """Floating-point operations per second of large square matrix products in bf16, the best of ten."""
    size = 8192 if setting.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        setting.synchronise()
        start = time.perf_counter()
        a @ b
        setting.synchronise()
        times.append(time.perf_counter() - start)
    return {"flops_per_second": 2 * size**3 / min(times[3:]), "size": size, "dtype": "bfloat16"}


def prepare(name: str, setting: Setting, images: torch.Tensor) -> tuple[Variant, dict[str, float | None]]:
    """Build a variant, count its work, warm it up, and read the memory that it alone takes."""
    cuda = setting.device.type == "cuda"
    before = torch.cuda.memory_allocated(setting.device) if cuda else 0
    variant = Variant(name, setting)
    flops = variant.flops_per_image(images)
    if setting.compile:
        variant.compile()
    if cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    for _ in range(WARMUP_STEPS):
        variant.step(images)
    setting.synchronise()
    peak = torch.cuda.max_memory_allocated(setting.device) - before if cuda else None
    return variant, {"flops": flops, "peak": peak}


def measure(model: str, setting: Setting, *, seconds: float, rounds: int, peak_flops: float) -> dict[str, Any]:
    """All variants of one model in turns."""
    config = with_fields(Config(), setting.fields)
    shape = (setting.batch_size, config.data.channels, *config.data.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device)
    variants: dict[str, Variant] = {}
    facts: dict[str, dict[str, float | None]] = {}
    for name in VARIANTS:
        print(f"{model}: preparing {name}", file=sys.stderr)
        variants[name], facts[name] = prepare(name, setting, images)
    num_steps = {
        name: max(1, math.ceil(seconds / rounds / variant.turn(images, 1))) for name, variant in variants.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            elapsed = variants[name].turn(images, num_steps[name])
            rates[name].append(num_steps[name] * setting.batch_size / elapsed)
        print(f"{model}: round {number + 1} of {rounds}", file=sys.stderr)
    flops = {name: facts[name]["flops"] for name in names}
    return {
        "model": model,
        "steps_per_round": num_steps,
        "images_per_second": {name: spread(rates[name]) for name in names},
        "ratio_to_mae": {name: spread([a / b for a, b in zip(rates[name], rates["mae"])]) for name in names},
        "flops_per_image": flops,
        "flops_ratio_to_mae": {name: (flops[name] or 0) / (flops["mae"] or 1) for name in names},
        "share_of_matmul_peak": {
            name: (flops[name] or 0) * statistics.fmean(rates[name]) / peak_flops for name in names
        },
        "peak_memory_bytes": {name: facts[name]["peak"] for name in names},
    }


def table(result: dict[str, Any]) -> str:
    """The figures of one model, to be read."""
    lines = [f"{result['model']:28s} images/s      +-   of MAE     +-  GFLOP/image  of peak  memory GB"]
    for name, rate in result["images_per_second"].items():
        ratio, memory = result["ratio_to_mae"][name], result["peak_memory_bytes"][name]
        lines.append(
            f"  {name:26s} {rate['mean']:8.1f} {rate['std'] or 0:7.1f} {ratio['mean']:8.3f} {ratio['std'] or 0:6.3f} "
            f"{result['flops_per_image'][name] / 1e9:12.2f} {result['share_of_matmul_peak'][name]:8.1%} "
            f"{'-' if memory is None else format(memory / 1e9, '.2f'):>10s}"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"], help="timm ViTs")
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--patch-size", type=int, help="pixels; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=256, help="images a step")
    parser.add_argument("--decoder-width", type=int, default=512)
    parser.add_argument("--decoder-depth", type=int, default=8, help="blocks of the reconstructor")
    parser.add_argument("--predictor-depth", type=int, default=8, help="blocks of the loss predictor")
    parser.add_argument("--seconds", type=float, default=10, help="timed seconds per model and variant")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile student, teacher.encode and teacher.score"
    )
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = choose_device(args.device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
    fields: dict[str, Any] = {
        "image_size": (args.image_size, args.image_size),
        "patch_size": args.patch_size,
        "decoder_width": args.decoder_width,
        "decoder_depth": args.decoder_depth,
        "predictor_depth": args.predictor_depth,
    }
    result: dict[str, Any] = {
        **versions(device),
        "precision": "bf16" if bf16 else "float32",
        "compiled": args.compile,
        "batch_size": args.batch_size,
        "fields": fields,
        "models": [],
    }
    for model in args.models:
        setting = Setting({**fields, "encoder": model}, args.batch_size, device, bf16, args.compile)
        if "matmul_peak" not in result:
            result["matmul_peak"] = matmul_peak(setting)
        peak = result["matmul_peak"]["flops_per_second"]
        figures = measure(model, setting, seconds=args.seconds, rounds=args.rounds, peak_flops=peak)
        result["models"].append(figures)
        print(table(figures), flush=True)
        if args.out is not None:  # after every model, so that a later one that fails costs only itself
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
