"""Two rates: training with the hypernetwork next to the denoiser alone, and embedding next to the bare encoder.

    python benchmarks/throughput.py                     # five minutes on one core
    python benchmarks/throughput.py --device cuda

*Training*: steps of the stages ``base`` and ``joint`` with the same batch of 64 tasks x 8 images, in alternating
blocks. Both get their images from where the training does, a background process; the joint step's also embeds the
pool's fresh tasks there (with ``--device cuda``: on the GPU, in the step), and the step draws from the pool, simulates
sums, makes an adapter for every task and applies it. Background processes take a second core, if there is one.

*Embedding*: a million generated images through `embedding.embed_batches` and `mechanism.noisy_sum`, as in a release,
next to the encoder alone on the same batches before and after. The peak of the memory is told after a tenth and at the
end: it must not grow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hyperdp_lib import embedding, mechanism
from hyperdp_lib.data import from_levels
from hyperdp_lib.diffusion import build_base_model, denoising_loss
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.public.stages import PRESETS, TaskPool, adapted_loss, stream
from hyperdp_lib.records import provenance, require_commit, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "throughput.json"


def clock(device: str) -> float:
    """Seconds, when all work on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def training_rates(device: str, blocks: int, steps: int) -> dict[str, float]:
    """Images per second of both stages, medians over alternating blocks of steps, and their ratio."""
    preset = dataclasses.replace(PRESETS["glyphs"], pool_tasks=256)  # quickly filled; the work of a step is the same
    tasks, queries = preset.joint_stage.tasks, preset.joint_stage.images
    base = build_base_model(preset.base).to(device)
    network = HyperNetwork(load_pretrained("glyphs", device)[1].encoder, base, preset.hypernetwork).to(device)
    g = torch.Generator().manual_seed(0)
    source = preset.public_data.tasks()
    batches = stream(source, tasks, queries, 1)
    pool = TaskPool(preset, network.codes, source, 2, device)

    def alone() -> torch.Tensor:
        return denoising_loss(base, from_levels(next(batches).to(device)).flatten(0, 1), g).mean()

    def together() -> torch.Tensor:
        pool.refresh()
        images, codes, sizes, noise_std = pool.draw_codes(preset, tasks, queries, g)
        adapter = network.generate(network.simulate(codes, sizes, noise_std, g).to(device))
        return adapted_loss(base, adapter, from_levels(images.to(device)), g)

    def block(loss: Callable[[], torch.Tensor], modules: list[torch.nn.Module]) -> float:
        learned = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, 1e-5, fused=True)
        started = clock(device)
        for _ in range(steps):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
        return steps * tasks * queries / (clock(device) - started)

    base.requires_grad_(True)
    stages: dict[str, tuple[Any, list[torch.nn.Module]]] = {
        "base": (alone, [base]),
        "joint": (together, [base, network]),
    }
    rates: dict[str, list[float]] = {stage: [] for stage in stages}
    for number in range(blocks + 1):
        for stage, (loss, modules) in stages.items():
            rate = block(loss, modules)
            if number:  # the first warms up
                rates[stage].append(rate)
    ratios = [joint / base for joint, base in zip(rates["joint"], rates["base"], strict=True)]
    told = {f"{stage}_images_per_second": round(statistics.median(values), 1) for stage, values in rates.items()}
    return {**told, "joint_over_base": round(statistics.median(ratios), 3)}


def embedding_rates(device: str, count: int) -> dict[str, float]:
    """Images per second, streamed into a noisy sum and through the bare encoder; peak memory on the way."""
    encoder = load_pretrained("glyphs", device)[1].encoder
    g = torch.Generator().manual_seed(1)
    batches = [torch.rand(1024, 1, 16, 16, generator=g) * 2 - 1 for _ in range(8)]
    peaks: list[int] = []

    def bare(number: int) -> float:
        started = clock(device)
        with torch.no_grad():
            for i in range(number // embedding.CHUNK):
                start = i * embedding.CHUNK % 1024
                encoder(batches[i // 8 % 8][start : start + embedding.CHUNK].to(device))
        return number / (clock(device) - started)

    def streamed() -> Iterator[tuple[np.ndarray, None]]:
        done = 0
        for codes in embedding.embed_batches(encoder, (batches[i % 8] for i in range(count // 1024))):
            done += len(codes)
            if done - len(codes) < count // 10 <= done:
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            yield codes, None

    bare(20_480)
    before = bare(count // 10)
    config = mechanism.GaussianSum(encoder.config.dimension, noise_multiplier=4.0)
    started = clock(device)
    mechanism.noisy_sum(streamed(), config, seed=0)
    rate = count // 1024 * 1024 / (clock(device) - started)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    alone = statistics.mean((before, bare(count // 10)))
    return {
        "images": count // 1024 * 1024,
        "streamed_images_per_second": round(rate), "bare_images_per_second": round(alone),
        "streamed_over_bare": round(rate / alone, 3), "peak_mib_after_a_tenth": round(peaks[0] / 1024, 1),
        "peak_mib_at_the_end": round(peaks[1] / 1024, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    torch.set_num_threads(1)
    started = datetime.now(UTC)
    content = {
        "device": options.device, "threads": 1,
        "training": training_rates(options.device, options.blocks, options.steps),
        "embedding": embedding_rates(options.device, options.images),
        "provenance": provenance("python benchmarks/throughput.py", options.device, started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")
    print(json.dumps({key: content[key] for key in ("training", "embedding")}, indent=1))


if __name__ == "__main__":
    main()
