"""What one release costs, next to DP-SGD LoRA on the same images, in one process and one run.

    python benchmarks/release_speed.py                        # all steps of DP-SGD: some minutes to an hour
    python benchmarks/release_speed.py --steps-fraction 0.1   # a tenth of them, scaled up

``release`` is the library call on all 1,437 training digits by the paper's method: embedding, one exact noisy sum,
adapters. Its three parts are timed too. ``dp_lora`` is `train_dp_lora` with the settings that the comparison uses at
this epsilon. ``command`` is ``hyperdp release digits --method one-sum`` as a user meets it: a new process, imports,
sample sheet and files included. Wall-clock seconds, so run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hyperdp_lib import accounting, data, embedding, mechanism
from hyperdp_lib.baselines.dp_lora import train_dp_lora
from hyperdp_lib.data import ImageSet
from hyperdp_lib.experiments import comparison
from hyperdp_lib.experiments.methods import plain_config
from hyperdp_lib.planning import decode, plan
from hyperdp_lib.pretrained import Weights
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.releasing import release

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "release_speed.json"
DELTA = 1e-5
COMMAND_TARGET = 20.0  # seconds of the whole command on two cores


def median_seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Median wall-clock seconds of `run`, after one call to warm up."""
    seconds = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def time_release(
    private: ImageSet, base_model: Any, hypernetwork: Any, epsilon: float, repetitions: int
) -> dict[str, float]:
    """The library call, and its three parts on their own."""
    assert private.labels is not None and private.class_names is not None
    rows = private.labels.numpy()
    config = mechanism.GaussianSum(
        dimension=hypernetwork.encoder.config.dimension,
        noise_multiplier=accounting.noise_multiplier(epsilon, DELTA),
        num_rows=len(private.class_names),
    )
    codes = embedding.embed(hypernetwork.encoder, private.images).numpy()
    noisy_sum = mechanism.noisy_sum([(codes, rows)], config)
    chosen = plan(
        Weights(base_model, hypernetwork),
        epsilon=epsilon,
        delta=DELTA,
        class_names=private.class_names,
        method="one_sum",
    )
    parts: dict[str, Callable[[], Any]] = {
        "release": lambda: release(private, chosen),
        "embedding": lambda: embedding.embed(hypernetwork.encoder, private.images),
        "noisy_sum": lambda: mechanism.noisy_sum([(codes, rows)], config),
        "decoding": lambda: decode(noisy_sum, config.noise_std, hypernetwork, private.class_names or ()),
    }
    return {name: median_seconds(run, repetitions) for name, run in parts.items()}


def time_dp_lora(
    private: ImageSet, base_model: Any, settings: Any, epsilon: float, fraction: float
) -> dict[str, Any]:
    """Training seconds of DP-SGD LoRA; with a fraction below 1 from that part of the steps, scaled up linearly."""
    config = settings.config("dp_lora", epsilon)
    timed_steps = max(1, round(fraction * config.num_steps))
    trained, _ = train_dp_lora(
        private.images,
        private.labels,
        base_model,
        dataclasses.replace(config, num_steps=timed_steps),
        epsilon=epsilon,
        delta=DELTA,
        num_private_declared=len(private),
        class_names=private.class_names or (),
        seed=0,
        progress=True,
    )
    return {
        "seconds": trained.seconds * config.num_steps / timed_steps,
        "steps": config.num_steps,
        "steps_timed": timed_steps,
        "extrapolated": timed_steps < config.num_steps,
        "configuration": plain_config(config),
    }


def time_command(epsilon: float) -> float:
    """Seconds of the command in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "hyperdp_lib", "release", "digits", "--epsilon", str(epsilon), "--method", "one-sum"]
        words += ["--out", f"{folder}/release"]
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--weights", default="glyphs")
    parser.add_argument("--repetitions", type=int, default=5, help="of the release and its parts")
    parser.add_argument("--steps-fraction", type=float, default=1.0, help="of DP-SGD's steps to time, in (0, 1]")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    arguments = parser.parse_args()
    require_commit(arguments.out)
    if not 0 < arguments.steps_fraction <= 1:
        parser.error("--steps-fraction must lie in (0, 1]")
    started = datetime.now(UTC)
    command = time_command(arguments.epsilon)  # first: nothing of this process's work runs beside it
    base_model, hypernetwork, _, settings = comparison.load_models(arguments.weights, None, "cpu")
    private = data.digits("train", hypernetwork.encoder.config.image_size)
    seconds = time_release(private, base_model, hypernetwork, arguments.epsilon, arguments.repetitions)
    rival = time_dp_lora(private, base_model, settings, arguments.epsilon, arguments.steps_fraction)
    record = {
        "epsilon": arguments.epsilon,
        "delta": DELTA,
        "num_private": len(private),
        "clock": "wall-clock seconds; release and its parts: median of the repetitions after one to warm up",
        "threads": torch.get_num_threads(),
        "repetitions": arguments.repetitions,
        "release_seconds": seconds,
        "command_seconds": command,
        "command_target_seconds": COMMAND_TARGET,
        "command_target_met": command <= COMMAND_TARGET,
        "dp_lora": rival,
        "dp_lora_over_release": rival["seconds"] / seconds["release"],
        "dp_lora_over_command": rival["seconds"] / command,
        "provenance": provenance(started=started),
    }
    write_atomically(arguments.out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    parts = ", ".join(f"{name} {seconds[name]:.2f}" for name in ("embedding", "noisy_sum", "decoding"))
    scaled = f" (scaled up from {rival['steps_timed']} of {rival['steps']} steps)" if rival["extrapolated"] else ""
    print(f"release {seconds['release']:.2f} s: {parts}")
    print(f"DP-SGD LoRA {rival['seconds']:.0f} s{scaled}: {record['dp_lora_over_release']:.0f} times the release")
    print(f"hyperdp release digits --method one-sum, a new process: {command:.1f} s (target <= {COMMAND_TARGET:g} s)")
    print(f"wrote {arguments.out.name}")


if __name__ == "__main__":
    main()
