"""What does a release say about labels, and how much of that do the samples keep?

    HYPERDP_DATA=data python benchmarks/released_labels.py    # writes book/results/benchmarks/released_labels.json

A release with labels (nested coordinates, and cells where the declared size supports them) is a classifier by itself:
an image goes to the class that has the nearest released mean. All of this is post-processing of one noisy sum:

* ``class means``: the nearest mean of a class, its cells added up;
* ``cell means``: the nearest mean of a cell of a class, of those that the decoder uses;
* ``samples``: a support vector machine on 2,000 samples of the adapters, as everywhere in the book;
* ``samples that agree``: the same, on 2,000 of three times as many, those that ``cell means`` give to the class they
  were drawn for (``hyperdp sample --labels agreeing``);
* ``samples relabelled``: on the first 2,000, each with the class that ``cell means`` give it (``--labels released``);
* ``many samples``, ``many relabelled``: the same as the first and the last, on 20,000.

The better part of an hour of a core, most of it for the samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hyperdp_lib import comparison, evaluation, refinement
from hyperdp_lib.baselines import controls
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.data import ImageSet
from hyperdp_lib.hypernetwork import features_file, load_pretrained
from hyperdp_lib.records import provenance, write_atomically

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "released_labels.json"
SETS = (("digits", None), ("digits", 128), ("mnist", None))  # private set, and how many of its images
EPSILON, IMAGES, MANY = 1.0, 2000, 20_000
MEANS = CLASS_MEANS, CELL_MEANS = "class means", "cell means"
SAMPLES, AGREEING, RELABELLED = "samples", "samples that agree", "samples relabelled"
MANY_SAMPLES, MANY_RELABELLED = "many samples", "many relabelled"
WAYS = (*MEANS, SAMPLES, AGREEING, RELABELLED, MANY_SAMPLES, MANY_RELABELLED)


def class_means(network: CellHyperNetwork, noisy_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Means (K, k) of the classes of noisy sums (K, M (1 + k)), cells added up, and the classes (K,)."""
    totals = noisy_sum.view(len(noisy_sum), len(network.encoder.centroids), -1).sum(1)
    return refinement.released_means(totals, 0.0, network.hypernetwork)


def measure(
    train: ImageSet, reference: ImageSet, test: ImageSet, base_model: Any, network: Any, scoring: Any, seed: int
) -> dict[str, Any]:
    """Accuracy on the test images, and distances of both sets of samples from all private training images."""
    assert train.labels is not None and test.labels is not None
    per_class = len(train) / len(train.class_names)
    fitted = CellHyperNetwork.fitting(network, controls.noise_std(EPSILON), per_class, labelled=True)
    released, noise_std = controls.noisy_class_sums(
        train.images, train.labels, fitted.encoder, epsilon=EPSILON, num_classes=len(train.class_names), seed=seed
    )
    noisy_sum = torch.as_tensor(released, dtype=torch.float32)
    pooled, celled = class_means(fitted, noisy_sum), refinement.released_means(noisy_sum, noise_std, fitted)
    found: dict[str, Any] = {}
    for name, means in ((CLASS_MEANS, pooled), (CELL_MEANS, celled)):
        told = refinement.classify(test.images, *means, fitted)
        found[name] = {"accuracy": float((told == test.labels).double().mean())}
    with torch.no_grad():
        adapter = fitted(noisy_sum, noise_std)
    classes, each = len(train.class_names), IMAGES // len(train.class_names)
    g = torch.Generator().manual_seed(seed)
    drawn, labels = refinement.draw_mixed(base_model, adapter, classes, MANY // classes, generator=g)
    said = refinement.classify(drawn, *celled, fitted)
    ours, theirs = (evaluation.features(scoring, images) for images in (drawn, reference.images))
    first, more, many = (refinement.agreeing(labels, labels, n) for n in (each, refinement.SURPLUS * each, MANY))
    agree = more[refinement.agreeing(labels[more], said[more], each)]
    chosen = {
        SAMPLES: (first, labels), AGREEING: (agree, labels), RELABELLED: (first, said),
        MANY_SAMPLES: (many, labels), MANY_RELABELLED: (many, said),
    }  # fmt: skip
    for name, (rows, told) in chosen.items():
        found[name] = {
            "accuracy": evaluation.downstream_accuracy(drawn[rows], told[rows], test.images, test.labels),
            "frechet_distance": evaluation.frechet_distance(ours[rows], theirs),
        }
    found[AGREEING]["kept"] = float((said == labels).double().mean())
    return {**found, "cells": len(fitted.encoder.centroids)}


def summary(found: Iterable[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean and standard deviation over the seeds of every number about one of the ways."""
    each = [one[name] for one in found]
    told = {}
    for score in each[0]:
        values = [float(one[score]) for one in each]
        told[score], told[f"{score}_sd"] = round(statistics.fmean(values), 4), round(statistics.stdev(values), 4)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for there is no spread of one")
    started = datetime.now(UTC)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = evaluation.FeatureNetwork.from_pretrained(features_file())
    rows = []
    for name, size in tqdm(SETS, desc="released labels", disable=None):
        train, test, _ = comparison.private_sets(name)
        size = size or len(train)
        found = [
            measure(comparison.subset(train, size, seed), train, test, base_model, network, scoring, seed)
            for seed in range(options.seeds)
        ]
        for way in WAYS:
            about = {"set": name, "num_private": size, "cells": found[0]["cells"], "way": way}
            rows.append({**about, **summary(found, way)})
    content = {
        "epsilon": EPSILON, "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "seeds": options.seeds,
        "samples": IMAGES, "many": MANY, "features": scoring.name, "label": evaluation.NOT_DP, "rows": rows,
        "provenance": provenance("python benchmarks/released_labels.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
