"""What T different adapters in one batch cost, against the plain forward and backward of the same batch.

    python benchmarks/adapter_speed.py    # writes book/results/benchmarks/adapter_speed.json

``plain`` trains the base weights, without adapters; ``adapters`` differentiates through the T adapters with
the base frozen; ``joint`` does both; ``loop`` is the oracle, one adapter after the other. The variants take
turns within every repetition and are timed in process CPU seconds on one thread, so that neither a drifting
clock rate nor other programs favour one of them; medians are compared. Targets: ``adapters / plain`` at most
1.25 for a denoiser with Linear targets only, 1.7 for a U-Net with convolutions.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import Tensor, nn

from hyperdp_lib.adapter import Adapter, apply_adapters, lora_geometry
from hyperdp_lib.records import provenance, require_commit, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "adapter_speed.json"
TARGETS = {"dit": 1.25, "unet": 1.7}
DIT_LORA = (
    r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear)"
)
UNET_LORA = r".*\.(to_q|to_k|to_v|to_out\.0|conv1|conv2|conv_shortcut|conv)"


def dit(lora_rank: int) -> tuple[nn.Module, LoraConfig, tuple[int, ...]]:
    """The all-Linear denoiser of the embedded default: 16x16x1 in 4x4 patches, d = 128, 4 layers."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=1000,
    )
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # the default attention's backward is slow on a CPU
    return model, LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=DIT_LORA), (1, 16, 16)


def unet(lora_rank: int) -> tuple[nn.Module, LoraConfig, tuple[int, ...]]:
    """A U-Net with attention, 16x16x1, (32, 64) channels; adapts attention and all inner convolutions."""
    model = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=UNET_LORA), (1, 16, 16)


MODELS = {"dit": dit, "unet": unet}


def steps(
    name: str, lora_rank: int, num_adapters: int, share: int
) -> tuple[dict[str, Callable[[], None]], dict]:
    """The variants to time, each a forward and backward of the same batch, and what they run on."""
    torch.manual_seed(0)
    model, lora_config, shape = MODELS[name](lora_rank)
    model.train()
    geometry = lora_geometry(model, lora_config)
    adapter = Adapter.no_change(lora_config, geometry, num_adapters=num_adapters)
    for _, b in adapter.factors.values():
        b.normal_(std=0.1)
    adapter.requires_grad_()
    images = torch.randn(num_adapters * share, *shape)
    timesteps = torch.rand(len(images)) * 1000

    def forward(rows: slice) -> Tensor:
        if name == "dit":
            labels = torch.zeros(len(timesteps[rows]), dtype=torch.long)
            return model(images[rows], timestep=timesteps[rows], class_labels=labels).sample
        return model(images[rows], timesteps[rows]).sample

    def step(base: bool, adapted: bool, loop: bool = False) -> None:
        model.requires_grad_(base)
        shares = [slice(t * share, (t + 1) * share) for t in range(num_adapters)] if loop else [slice(None)]
        for t, rows in enumerate(shares):
            with apply_adapters(model, adapter[t] if loop else adapter) if adapted else nullcontext():
                forward(rows).square().mean().backward()
        for tensor in (*model.parameters(), *adapter.parameters()):
            tensor.grad = None

    variants = {
        "plain": lambda: step(base=True, adapted=False),
        "adapters": lambda: step(base=False, adapted=True),
        "joint": lambda: step(base=True, adapted=True),
        "loop": lambda: step(base=False, adapted=True, loop=True),
    }
    about = {
        "base_parameters": sum(p.numel() for p in model.parameters()),
        "adapter_parameters": geometry.num_parameters,
        "adapted_layers": len(geometry.modules),
    }
    return variants, about


def measure(name: str, lora_rank: int, num_adapters: int, share: int, repetitions: int) -> dict:
    """Median CPU seconds of each variant, and the median over repetitions of its ratio to ``plain``."""
    variants, record = steps(name, lora_rank, num_adapters, share)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant in variants:
        variants[variant]()  # warm up: allocator, kernel selection
    gc.disable()
    for _ in range(repetitions):
        for variant, run in variants.items():
            if variant == "loop" and len(seconds["loop"]) >= 5:
                continue  # slow, and only for context
            start = time.process_time()
            run()
            seconds[variant].append(time.process_time() - start)
        gc.collect()
    gc.enable()
    plain = seconds["plain"]
    for variant, values in seconds.items():
        record[f"{variant}_cpu_seconds"] = statistics.median(values)
        record[f"{variant}_ratio"] = statistics.median(v / p for v, p in zip(values, plain, strict=False))
    quartiles = statistics.quantiles([v / p for v, p in zip(seconds["adapters"], plain, strict=True)], n=4)
    record["adapters_ratio_quartiles"] = [quartiles[0], quartiles[2]]
    record["target_ratio"] = TARGETS[name]
    record["target_met"] = record["adapters_ratio"] <= TARGETS[name]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-adapters", type=int, default=8, help="T")
    parser.add_argument("--share", type=int, default=4, help="M, examples per adapter")
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    arguments = parser.parse_args()
    require_commit(arguments.out)
    torch.set_num_threads(1)
    record: dict = {
        "num_adapters": arguments.num_adapters,
        "share": arguments.share,
        "lora_rank": arguments.lora_rank,
        "repetitions": arguments.repetitions,
        "clock": "process CPU seconds, one thread",
        "provenance": provenance(),
    }
    for name in arguments.models:
        result = measure(
            name, arguments.lora_rank, arguments.num_adapters, arguments.share, arguments.repetitions
        )
        record[name] = result
        low, high = result["adapters_ratio_quartiles"]
        print(
            f"{name:5} T x M = {arguments.num_adapters} x {arguments.share}: adapters / plain "
            f"{result['adapters_ratio']:.2f} (quartiles {low:.2f}-{high:.2f}, target <= {TARGETS[name]}), "
            f"joint {result['joint_ratio']:.2f}, loop {result['loop_ratio']:.2f}; "
            f"plain {1000 * result['plain_cpu_seconds']:.1f} CPU ms"
        )
    write_atomically(arguments.out, json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.out.name}")


if __name__ == "__main__":
    main()
