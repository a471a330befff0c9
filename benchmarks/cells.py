"""How many cells should a release have, and which are worth decoding? Measured on public drawings by people.

Drawings play the private part: labelled classes, and mixed sets of all ten classes without labels. This writes the
Fréchet distance, and for labelled sets the downstream accuracy, by number of cells, and which number
`hyperdp_lib.cells.cells_for` takes; for mixed sets in 16 cells also what a stricter threshold for leaving cells out
would give. The constants of `hyperdp_lib.cells` were settled by such tables. Needs ``HYPERDP_DATA``; the better part
of an hour on one core.

    HYPERDP_DATA=data python benchmarks/cells.py
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperdp_lib import cells, data, diffusion, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.data import ImageSet
from hyperdp_lib.pretrained import features_file, load_pretrained
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.scores import evaluation

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "cells.json"
LABELLED = (("quickdraw", 150), ("kkanji", 150), ("quickdraw", 1000))  # images of a class
MIXED = (("quickdraw", 128), ("quickdraw", 512), ("kkanji", 512), ("quickdraw", 2048))  # images in all
EPSILONS = (1.0, 4.0, math.inf)
STRICT = 5.0  # another value for `cells.COUNTED`, to compare
CLASSES, IMAGES = 10, 600


def draw(name: str, split: str, seed: int) -> ImageSet:
    """All images of ten random classes in random order; the same classes for both splits."""
    source = data.load_named_or_path(f"{name}{split}", 16, 1)
    g = torch.Generator().manual_seed(seed)
    assert source.labels is not None and source.class_names is not None
    chosen = torch.randperm(len(source.class_names), generator=g)[:CLASSES]
    rows = [torch.nonzero(source.labels == label)[:, 0] for label in chosen]
    labels = torch.cat([torch.full((len(mine),), i) for i, mine in enumerate(rows)])
    order = torch.randperm(len(labels), generator=g)
    names = tuple(source.class_names[int(label)] for label in chosen)
    return ImageSet(source.images[torch.cat(rows)[order]], labels[order], names)


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Rows of the first ``count`` images of each class, or of all that there are; class by class."""
    return torch.cat([torch.nonzero(labels == label)[:count, 0] for label in labels.unique()])


@functools.cache
def prepared(name: str, seed: int) -> tuple[ImageSet, ImageSet, np.ndarray]:
    """All images of the classes, test images of them, and features of the former."""
    everything, tests = (draw(name, split, seed) for split in ("", "-test"))
    return everything, tests, evaluation.features(scoring_network(), everything.images)


@functools.cache
def scoring_network() -> embedding.FeatureNetwork:
    return embedding.FeatureNetwork.from_pretrained(features_file())


def measure(
    models: Any, name: str, size: int, labelled: bool, epsilon: float, count: int, counted: float, seed: int
) -> tuple[dict[str, float], int]:
    """Scores of one draw of classes, noise and samples, and the coordinates of a cell."""
    base_model, network = models
    everything, tests, theirs = prepared(name, seed)
    assert everything.labels is not None
    rows = first_of_each(everything.labels, size) if labelled else torch.arange(size)
    images, labels = everything.images[rows], everything.labels[rows] if labelled else None
    classes = CLASSES if labelled else 1
    noise_std = controls.noise_std(epsilon)
    made = cells.CellHyperNetwork.with_cells(count, network, noise_std, size, counted)
    sums, _ = controls.noisy_class_sums(images, labels, made.encoder, epsilon=epsilon, num_classes=classes, seed=seed)
    with torch.no_grad():
        adapter = made(torch.from_numpy(sums).float(), noise_std)
    g = torch.Generator().manual_seed(seed)
    samples = diffusion.sample_classes(base_model, adapter, classes, IMAGES // classes, generator=g)
    ours = evaluation.features(scoring_network(), samples)
    scores = {"frechet_distance": evaluation.frechet_distance(ours, theirs)}
    if labelled:
        drawn_for = torch.arange(CLASSES).repeat_interleave(IMAGES // CLASSES)
        scores["accuracy"] = evaluation.downstream_accuracy(samples, drawn_for, tests.images, tests.labels)
    return scores, made.hypernetwork.encoder.coordinates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    require_commit(options.out)
    started = datetime.now(UTC)
    models = load_pretrained("glyphs-nested")
    sets = [(*one, True) for one in LABELLED] + [(*one, False) for one in MIXED]
    cases = [(*one, epsilon, count, cells.COUNTED) for one in sets for epsilon in EPSILONS for count in cells.NUMBERS]
    cases += [(*one, False, epsilon, 16, STRICT) for one in MIXED for epsilon in EPSILONS]
    rows = []
    for name, size, labelled, epsilon, count, counted in progress_bar(cases, desc="cells"):
        found = [measure(models, name, size, labelled, epsilon, count, counted, seed) for seed in range(options.seeds)]
        means = {score: round(statistics.fmean(scores[score] for scores, _ in found), 3) for score in found[0][0]}
        taken = counted == cells.COUNTED and count == cells.cells_for(
            controls.noise_std(epsilon), size, labelled=labelled
        )
        rows.append({
            "set": name, "images": size, "labelled": labelled, "epsilon": None if math.isinf(epsilon) else epsilon,
            "cells": count, "counted": counted, "coordinates": found[0][1], **means, "taken": taken,
        })  # fmt: skip
    content = {
        "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "classes": CLASSES, "samples": IMAGES,
        "seeds": options.seeds, "features": scoring_network().name, "label": evaluation.NOT_DP, "rows": rows,
        "provenance": provenance("python benchmarks/cells.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
