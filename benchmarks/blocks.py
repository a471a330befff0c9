"""What do second moments and votes buy, beside the mean in the same sum?

    HYPERDP_DATA=data python benchmarks/blocks.py --out runs/blocks    # an hour of one core; resumes

The hypernetwork of the weights ``glyphs-nested`` goes on training, for every variant as long, from the same start:
with nothing more in the sum (the control), with second moments, with votes, with both (`hyperdp_lib.nested.Blocks`).
All blocks share one norm and one draw of noise. Reported are the denoising loss on held-out public tasks by the noise
on the mean, at the number of coordinates that is best there, and Fréchet distance and accuracy on ten classes of 140
images: public drawings (Quick, Draw!), and the digits, which play the private part elsewhere and are a research metric.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transfer import CLASSES, draw

from hyperdp_lib import data, diffusion, evaluation, nested
from hyperdp_lib.baselines import controls
from hyperdp_lib.baselines.decoders import smoke_preset
from hyperdp_lib.hypernetwork import features_file, load_pretrained
from hyperdp_lib.nested import Blocks, NestedHyperNetwork
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.training import PRESETS, Preset, StageConfig

RESULT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "blocks.json"
VARIANTS = {
    "mean": Blocks(), "second moments": Blocks(moments=0.7), "votes": Blocks(votes=0.7),
    "both": Blocks(moments=0.5, votes=0.5),
}  # fmt: skip
STAGE = StageConfig(400, 64, 8, 4e-4, 0.995)
SETS, SIZE, IMAGES = ("quickdraw", "digits"), 140, 1000
EPSILONS = (1.0, 10.0, math.inf)


def trained(name: str, preset: Preset, out: Path) -> tuple[nn.Module, NestedHyperNetwork]:
    """Base model, and the hypernetwork of a variant with its table of held-out losses; resumes."""
    base_model, start = load_pretrained("glyphs-nested")
    source, held_out = preset.public_data.tasks(), preset.public_data.tasks("held_out")
    typical = source.sample_tasks(max(100, min(2000, preset.pool_tasks)), 12, torch.Generator().manual_seed(12))
    encoder = nested.richer(start.encoder, typical, VARIANTS[name])
    network = NestedHyperNetwork(encoder, base_model, start.config)
    nested.warm_start(network, start, typical)
    folder = out / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    nested.fit(network, base_model, preset, source, held_out, folder)
    nested.tabulate(network, base_model, preset, held_out)
    return base_model, network


def scores(base_model: nn.Module, network: NestedHyperNetwork, name: str, epsilon: float, seed: int) -> dict[str, Any]:
    """Of samples for ten classes of a set, 140 images of each."""
    images, labels, tests, truth = draw(data.load_named_or_path(name, 16, 1), SIZE, seed)
    noise_std = controls.noise_std(epsilon)
    fitted = network.fitting(noise_std, SIZE)
    sums, _ = controls.noisy_class_sums(
        images, labels, fitted.encoder, epsilon=epsilon, num_classes=CLASSES, seed=seed
    )
    with torch.no_grad():
        adapter = fitted(torch.from_numpy(sums).float(), noise_std)
    g = torch.Generator().manual_seed(seed)
    samples = diffusion.sample_classes(base_model, adapter, CLASSES, IMAGES // CLASSES, generator=g)
    made = torch.arange(CLASSES).repeat_interleave(IMAGES // CLASSES)
    scoring = evaluation.FeatureNetwork.from_pretrained(features_file())
    return evaluation.evaluate(samples, made, images, labels, tests, truth, scoring)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--seeds", type=int, default=3, help="draws of classes, noise and samples; default: 3")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that it runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    require_commit(options.result)
    torch.set_num_threads(1)
    started = datetime.now(UTC)
    preset = dataclasses.replace(PRESETS["glyphs"], pool_tasks=nested.POOL_TASKS, joint_stage=STAGE)
    epsilons, sets = EPSILONS, SETS
    if options.smoke:
        preset, epsilons, sets = smoke_preset(), EPSILONS[:1], SETS[:1]
    rows = []
    for name in VARIANTS:
        base_model, network = trained(name, preset, options.out)
        row: dict[str, Any] = {"variant": name, **dataclasses.asdict(VARIANTS[name])}
        row["held_out_loss"] = {f"{noise:g}": min(losses.values()) for noise, losses in network.table.items()}
        row["scores"] = []
        for source in sets:
            for epsilon in epsilons:
                found = [scores(base_model, network, source, epsilon, seed) for seed in range(options.seeds)]
                told: dict[str, Any] = {"set": source, "epsilon": None if math.isinf(epsilon) else epsilon}
                for score in ("frechet_distance", "accuracy"):
                    values = [float(one[score]) for one in found]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    told[score] = {"mean": round(statistics.fmean(values), 3), "sd": round(spread, 3)}
                row["scores"].append(told)
        rows.append(row)
        print(json.dumps(row), flush=True)
    content = {
        "steps": preset.joint_stage.steps, "delta": 1e-5, "neighboring_relation": "add_or_remove_one",
        "classes": CLASSES, "images": SIZE, "samples": IMAGES, "seeds": options.seeds, "features": "glyphnet",
        "label": evaluation.NOT_DP, "rows": rows,
        "provenance": provenance("python benchmarks/blocks.py --out runs/blocks", "cpu", started),
    }  # fmt: skip
    write_atomically(options.result, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
