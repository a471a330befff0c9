"""What does a release say about labels, and how much of that do the samples keep?

    HYPERDP_DATA=data python benchmarks/released_labels.py    # writes book/results/benchmarks/released_labels.json

A release with labels (nested coordinates, and cells where there are images enough for them) is a classifier by itself.
All of this is post-processing of one release, and the accuracy is that on the private test images:

* ``nearest``: of the nearest released mean of a class, with cells of a cell of a class that the decoder uses;
* ``classifier``: of `hyperdp_lib.classifier`, which knows how uncertain a mean is and how images spread about it;
* ``samples``: a support vector machine on 2,000 samples of the adapters, as everywhere in the book;
* ``samples relabelled``: the same, each with the class that ``classifier`` gives it (``hyperdp sample --labels
  released``);
* ``many samples``, ``many relabelled``: the same two, on 20,000.

All of it once for one sum and, where there are no cells, once for two steps (`hyperdp_lib.two_steps`); ``--steps 2``
measures these alone and keeps the rest of the file, with the record of where that came from. The number of images is
known to a tenth, as if it were public.

First, on public drawings that play the private part: by how much should the classifier draw the spread of public images
towards one number for all directions? `classifier.RIDGE` was chosen by this table.

An hour and a half of a core, most of it for the samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cells import draw, first_of_each
from torch import Tensor

from hyperdp_lib import accounting, classifier, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.classifier import Classifier
from hyperdp_lib.data import ImageSet
from hyperdp_lib.experiments import comparison
from hyperdp_lib.hypernetwork import noisy_count
from hyperdp_lib.measure import measure as noisy_sums
from hyperdp_lib.pretrained import features_file, load_pretrained
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.scores import evaluation
from hyperdp_lib.two_steps import TYPICAL, Size, two_steps

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "released_labels.json"
# private set, how many of its images, and how many steps
SETS = (("digits", None, 1), ("digits", 128, 1), ("mnist", None, 1), ("digits", None, 2), ("digits", 128, 2))
PUBLIC = (("quickdraw", 12), ("kkanji", 12), ("quickdraw", 150), ("kkanji", 150), ("quickdraw", 1000))  # of a class
RIDGES = (0.0, 0.1, 0.3, 0.6, 1.0)
EPSILON, IMAGES, MANY = 1.0, 2000, 20_000
NEAREST, CLASSIFIER = "nearest", "classifier"
SAMPLES, RELABELLED = "samples", "samples relabelled"
MANY_SAMPLES, MANY_RELABELLED = "many samples", "many relabelled"
WAYS = (NEAREST, CLASSIFIER, SAMPLES, RELABELLED, MANY_SAMPLES, MANY_RELABELLED)


def nearest(images: Tensor, noisy_sum: Tensor, noise_std: float, network: CellHyperNetwork) -> Tensor:
    """The class of the nearest released mean of a cell."""
    encoder = network.encoder.encoder
    parts = [part for part, _ in network.parts(noisy_sum, noise_std)]
    sums, constant = torch.cat(parts), encoder.config.count_coordinate
    means = sums[:, 1:] / noisy_count(sums, noise_std, constant)[:, None]
    classes = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return classes[torch.cdist(embedding.embed(encoder, images, batch_size=1000)[:, 1:], means).argmin(1)]


def release(
    train: ImageSet, network: Any, epsilon: float, seed: int, num_steps: int = 1
) -> tuple[Tensor, float, CellHyperNetwork]:
    """A noisy sum, the noise on it, and the network that fits the size of a class."""
    classes = len(train.class_names)
    per_class = len(train) / classes
    if num_steps == 2:
        assert train.labels is not None
        plain = network.fitting(TYPICAL * controls.noise_std(epsilon), per_class)
        course = two_steps(
            plain,
            noise_multiplier=accounting.noise_multiplier(epsilon, 1e-5),
            num_rows=classes,
            size=Size.about(len(train)),
        )
        _, (noisy_sum, noise_std) = noisy_sums(train.images, train.labels.numpy(), course, seed=seed)
        fitted = CellHyperNetwork(plain, torch.zeros(1, plain.encoder.coordinates))  # one cell: as it is
        return torch.as_tensor(noisy_sum, dtype=torch.float32), noise_std, fitted
    fitted = CellHyperNetwork.fitting(network, controls.noise_std(epsilon), per_class, labelled=True)
    released, noise_std = controls.noisy_class_sums(
        train.images, train.labels, fitted.encoder, epsilon=epsilon, num_classes=len(train.class_names), seed=seed
    )
    return torch.as_tensor(released, dtype=torch.float32), noise_std, fitted


def read(train: ImageSet, test: ImageSet, network: Any, seed: int) -> dict[float | str, float]:
    """Accuracy on the test images of the nearest released mean, and of the classifier by ridge."""
    noisy_sum, noise_std, fitted = release(train, network, EPSILON, seed)
    said: dict[float | str, Tensor] = {NEAREST: nearest(test.images, noisy_sum, noise_std, fitted)}
    for ridge in RIDGES:
        said[ridge] = Classifier.of(noisy_sum, noise_std, fitted, ridge=ridge)(test.images)
    return {which: float((labels == test.labels).double().mean()) for which, labels in said.items()}


def measure(
    train: ImageSet, reference: ImageSet, test: ImageSet, base_model: Any, network: Any, scoring: Any, seed: int,
    num_steps: int = 1,
) -> dict[str, Any]:
    """Accuracy on the test images, and distances of all sets of samples from all private training images."""
    assert test.labels is not None
    noisy_sum, noise_std, fitted = release(train, network, EPSILON, seed, num_steps)
    classify = Classifier.of(noisy_sum, noise_std, fitted)
    read_off = {NEAREST: nearest(test.images, noisy_sum, noise_std, fitted), CLASSIFIER: classify(test.images)}
    found: dict[str, Any] = {
        name: {"accuracy": float((labels == test.labels).double().mean())} for name, labels in read_off.items()
    }
    with torch.no_grad():
        adapter = fitted(noisy_sum, noise_std)
    theirs = evaluation.features(scoring, reference.images)
    classes, each = len(train.class_names), IMAGES // len(train.class_names)
    g = torch.Generator().manual_seed(seed)
    drawn, labels = classifier.draw_mixed(base_model, adapter, classes, MANY // classes, generator=g)
    said, ours = classify(drawn), evaluation.features(scoring, drawn)
    first, many = (first_of_each(labels, count) for count in (each, MANY))
    chosen = {
        SAMPLES: (first, labels), RELABELLED: (first, said), MANY_SAMPLES: (many, labels), MANY_RELABELLED: (many, said)
    }  # fmt: skip
    for name, (rows, taught) in chosen.items():
        found[name] = {
            "accuracy": evaluation.downstream_accuracy(drawn[rows], taught[rows], test.images, test.labels),
            "frechet_distance": evaluation.frechet_distance(ours[rows], theirs),
        }
    found[RELABELLED]["agreed"] = float((said == labels).double().mean())  # with the class drawn for, of all
    return {**found, "cells": len(fitted.encoder.centroids)}


def summary(found: Iterable[dict[str, Any]], name: str) -> dict[str, float]:
    """Mean and standard deviation over the seeds of every number about one of the ways."""
    each = [one[name] for one in found]
    summed = {}
    for score in each[0]:
        values = [float(one[score]) for one in each]
        summed[score], summed[f"{score}_sd"] = round(statistics.fmean(values), 4), round(statistics.stdev(values), 4)
    return summed


def drawings(network: Any, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table by which the ridge was chosen."""
    rows = []
    for name, size in progress_bar(PUBLIC, desc="public drawings"):
        found = []
        for seed in range(repetitions):
            everything, test = (draw(name, split, seed) for split in ("", "-test"))
            assert everything.labels is not None
            few = first_of_each(everything.labels, size)
            train = ImageSet(everything.images[few], everything.labels[few], everything.class_names)
            found.append(read(train, test, network, seed))
        for which in found[0]:
            values = [one[which] for one in found]
            rows.append({
                "set": name, "images_per_class": size, "ridge": None if which == NEAREST else which,
                "accuracy": round(statistics.fmean(values), 4),
                "standard_error": round(statistics.stdev(values) / math.sqrt(len(values)), 4),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=12, help="of public drawings; default: 12")
    parser.add_argument("--steps", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="default: one, and two")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.steps == [2] else None
    if min(options.seeds, options.repetitions) < 2:
        parser.error("--seeds and --repetitions must be at least 2, for there is no spread of one")
    started = datetime.now(UTC)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    public = kept["public"] if kept else drawings(network, options.repetitions)
    rows = [row for row in kept["rows"] if row["steps"] == 1] if kept else []
    sets = [one for one in SETS if one[-1] in options.steps]
    for name, size, num_steps in progress_bar(sets, desc="released labels"):
        train, test, _ = comparison.private_sets(name)
        size = size or len(train)
        found = [
            measure(comparison.subset(train, size, seed), train, test, base_model, network, scoring, seed, num_steps)
            for seed in range(options.seeds)
        ]
        for way in WAYS:
            about = {"set": name, "num_private": size, "cells": found[0]["cells"], "steps": num_steps, "way": way}
            rows.append({**about, **summary(found, way)})
    content = {
        "epsilon": EPSILON, "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "seeds": options.seeds,
        "samples": IMAGES, "many": MANY, "features": scoring.name, "label": evaluation.NOT_DP, "rows": rows,
        "ridge": classifier.RIDGE, "repetitions": options.repetitions, "public": public,
        "provenance": provenance("python benchmarks/released_labels.py", "cpu", started),
        **({"one_sum": kept.get("one_sum", kept["provenance"])} if kept else {}),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
