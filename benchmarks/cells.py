"""How many cells should a release have? Measured on public drawings by people, which play the private part.

The rule of `hyperdp_lib.cells.cells_for` has two numbers, how much a cell must hold when the noise is given and when
there is none. This writes the Fréchet distance and the downstream accuracy by number of cells, for data sets of several
sizes and budgets, and which number the rule would take. Needs ``HYPERDP_DATA``; a quarter of an hour on one core.

    HYPERDP_DATA=data python benchmarks/cells.py
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from hyperdp_lib import cells, data, diffusion, evaluation
from hyperdp_lib.baselines import controls
from hyperdp_lib.data import ImageSet
from hyperdp_lib.hypernetwork import features_file, load_pretrained
from hyperdp_lib.records import provenance, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "cells.json"
SETS = {"quickdraw": (150, 1000), "kkanji": (150,)}  # images of a class
EPSILONS = (1.0, 10.0, math.inf)
CLASSES, IMAGES = 10, 1000


def draw(name: str, split: str, size: int, seed: int) -> ImageSet:
    """Up to ``size`` images of each of ten random classes; the same classes for both splits."""
    source = data.load_named_or_path(f"{name}{split}", 16, 1)
    g = torch.Generator().manual_seed(seed)
    assert source.labels is not None and source.class_names is not None
    chosen = torch.randperm(len(source.class_names), generator=g)[:CLASSES]
    rows = [torch.nonzero(source.labels == label)[:, 0] for label in chosen]
    rows = [mine[torch.randperm(len(mine), generator=g)[:size]] for mine in rows]
    labels = torch.cat([torch.full((len(mine),), i) for i, mine in enumerate(rows)])
    return ImageSet(source.images[torch.cat(rows)], labels, tuple(source.class_names[int(label)] for label in chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = datetime.now(UTC)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = evaluation.FeatureNetwork.from_pretrained(features_file())
    rows = []
    sizes = [(name, size) for name in SETS for size in SETS[name]]
    asked = [(*one, epsilon, count) for one in sizes for epsilon in EPSILONS for count in cells.NUMBERS]
    for name, size, epsilon, count in tqdm(asked, desc="cells", disable=None):
        private, tests = (draw(name, split, size, options.seed) for split in ("", "-test"))
        noise_std = controls.noise_std(epsilon)
        fitted = network.fitting(noise_std, size / max(1.0, count / 4))
        k = fitted.encoder.coordinates
        centroids = fitted.centroids[f"{k}x{count}"] if count > 1 else torch.zeros(1, k)
        made = cells.CellHyperNetwork(fitted, centroids)
        sums, _ = controls.noisy_class_sums(
            private.images, private.labels, made.encoder, epsilon=epsilon, num_classes=CLASSES, seed=options.seed
        )
        with torch.no_grad():
            adapter = made(torch.from_numpy(sums).float(), noise_std)
        g = torch.Generator().manual_seed(options.seed)
        images = diffusion.sample_classes(base_model, adapter, CLASSES, IMAGES // CLASSES, generator=g)
        labels = torch.arange(CLASSES).repeat_interleave(IMAGES // CLASSES)
        scores = evaluation.evaluate(
            images, labels, private.images, private.labels, tests.images, tests.labels, scoring
        )
        rows.append({
            "set": name, "images": size, "epsilon": None if math.isinf(epsilon) else epsilon, "cells": count,
            "coordinates": k, "frechet_distance": round(scores["frechet_distance"], 2),
            "accuracy": round(scores["accuracy"], 3), "taken": cells.cells_for(noise_std, size) == count,
        })  # fmt: skip
    content = {
        "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "classes": CLASSES, "samples": IMAGES,
        "features": scoring.name, "label": evaluation.NOT_DP, "rows": rows,
        "provenance": provenance("python benchmarks/cells.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
