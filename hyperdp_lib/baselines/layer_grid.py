"""The grid of subsets of layers, budgets and seeds of `layer_classification`: its trials, its cells and its file.

Everything is tuned on public stand-ins, with the same number of trials for each subset. One file for each private set;
what is in it is not run again. Accuracies are of private test images: research metrics, not differentially private.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hyperdp_lib import artefacts, data, records
from hyperdp_lib.baselines import layer_classification
from hyperdp_lib.baselines.layer_classification import (
    SUBSETS,
    LayerClassificationConfig,
    build_classifier,
    num_classes,
)
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.scores import evaluation

LEARNING_RATES = (3e-3, 1e-3, 1e-2, 3e-4, 3e-2)
EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
TUNED_AT = (0.5, 4.0, math.inf)


def public_stand_in(
    tasks: Any, *, num_classes: int, per_class: int, per_class_test: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Characters to tell apart, each drawn in as many styles as it has images: training and test images.

    ``tasks`` is a `hyperdp_lib.public.glyphs.GlyphTasks`.  One task in seven mixes in other characters, as when the
    feature network was trained: no classifier gets all of these right.
    """
    generator = torch.Generator().manual_seed(seed)
    characters = torch.randperm(tasks.num_classes, generator=generator)[:num_classes]
    count = per_class + per_class_test
    drawn = [tasks.sample_tasks(count, 1, generator, classes=character.repeat(count))[:, 0] for character in characters]
    names = tuple(f"character_{index}" for index in range(num_classes))

    def part(first: int, last: int) -> ImageSet:
        labels = torch.arange(num_classes).repeat_interleave(last - first)
        return ImageSet(torch.cat([one[first:last] for one in drawn]), labels, names)

    return part(0, per_class), part(per_class, count)


@dataclass(frozen=True)
class Grid:
    """What one file of results holds; found again in the file, or the file is refused.

    Parameters
    ----------
    private : str
        A named data set with a test set of its own: ``"digits"`` or ``"mnist"``.
    max_private, max_test : int
        Of larger sets so many images are used, chosen once by a public seed.
    subsets, epsilons, seeds
        The cells.
    tuned_at : tuple of float
        Budgets at which learning rates are compared; others use the nearest one on a logarithmic scale.
    learning_rates : tuple of float
        Trials for each subset and budget: all on one public stand-in, the better two on another.
    batch : float
        Expected batch size.
    num_steps : int
    delta, neighboring_relation
        Of every cell.
    """

    private: str = "digits"
    max_private: int = 5000
    max_test: int = 5000
    subsets: tuple[str, ...] = tuple(SUBSETS)
    epsilons: tuple[float, ...] = EPSILONS
    seeds: tuple[int, ...] = (0, 1, 2)
    tuned_at: tuple[float, ...] = TUNED_AT
    learning_rates: tuple[float, ...] = LEARNING_RATES
    batch: float = 144.0
    num_steps: int = 30
    delta: float = 1e-5
    neighboring_relation: str = "add_or_remove_one"

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: no noise, and full batches, are ``null``."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in ("epsilons", "tuned_at"):
            values[name] = [_finite(epsilon) for epsilon in values[name]]
        return values | {"batch": _finite(self.batch)}

    def config(self, subset: str, learning_rate: float) -> LayerClassificationConfig:
        """Of one run."""
        return LayerClassificationConfig(
            subset=subset,
            learning_rate=learning_rate,
            num_steps=self.num_steps,
            expected_batch_size=self.batch,
        )


class Results:
    """One file of results, written after every trial and every cell."""

    def __init__(self, path: Path, grid: Grid) -> None:
        records.require_commit(path)
        self.path, self.grid = path, grid
        self.content: dict[str, Any] = {"settings": grid.plain(), "trials": {}, "cells": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("settings") != self.content["settings"]:
                raise InputError(f"{path.name} was made with other settings: choose another --out, or delete it.")
            self.content = found
        else:
            self.content["provenance"] = records.provenance()

    def keep(self, kind: str, name: str, value: Mapping[str, Any]) -> None:
        """Add a trial or a cell."""
        self.content[kind][name] = dict(value)
        if self.content["cells"]:
            self.content["summary"] = summarise(self.content["cells"], self.grid)
        records.write_atomically(self.path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def budget_name(epsilon: float) -> str:
    """``eps0.5``, ``epsinf``.

    >>> budget_name(0.5), budget_name(math.inf)
    ('eps0.5', 'epsinf')
    """
    return f"eps{epsilon:g}"


def learning_rate_for(results: Results, subset: str, epsilon: float) -> float:
    """The best rate of the trials at the budget nearest to ``epsilon``; no noise is a budget of its own."""
    budgets = [tuned for tuned in results.grid.tuned_at if math.isinf(tuned) == math.isinf(epsilon)]
    budgets = budgets or [max(results.grid.tuned_at)]
    nearest = min(budgets, key=lambda tuned: 0.0 if tuned == epsilon else abs(math.log(tuned) - math.log(epsilon)))
    trials: list[tuple[int, float, float]] = []
    for rate in results.grid.learning_rates:
        found = results.content["trials"].get(f"{subset}_{budget_name(nearest)}_lr{rate:g}")
        if found is not None:
            trials.append((len(found["accuracy"]), float(np.mean(found["accuracy"])), rate))
    return max(trials, key=lambda trial: trial[:2])[2]


def tune(results: Results, classifier: nn.Sequential, tasks: Any, num_private_declared: int) -> None:
    """Learning rates on public stand-ins: every rate on the first, the better two of each subset on the second."""
    grid = results.grid
    classes = num_classes(classifier)
    sets = [
        public_stand_in(
            tasks, num_classes=classes, per_class=num_private_declared // classes, per_class_test=100, seed=s
        )
        for s in (1, 2)
    ]
    rates = len(grid.learning_rates)
    pairs = [(subset, epsilon) for epsilon in grid.tuned_at for subset in grid.subsets]
    with progress_bar(total=len(pairs) * (rates + min(2, rates)), desc="trials on public stand-ins") as bar:
        for subset, epsilon in pairs:
            trials = {rate: f"{subset}_{budget_name(epsilon)}_lr{rate:g}" for rate in grid.learning_rates}

            def accuracies(rate: float, count: int, names=trials, subset=subset, epsilon=epsilon) -> list[float]:
                done = results.content["trials"].get(names[rate], {}).get("accuracy", [])
                while len(done) < count:
                    train, test = sets[len(done)]
                    trained, _ = layer_classification.train_layer_classification(
                        train.images,
                        train.labels,
                        classifier,
                        grid.config(subset, rate),
                        epsilon=epsilon,
                        num_private_declared=num_private_declared,
                        class_names=train.class_names or (),
                        delta=grid.delta,
                        neighboring_relation=grid.neighboring_relation,
                        seed=10_000 + len(done),
                    )
                    assert test.labels is not None
                    done = [*done, round(trained.accuracy(test.images, test.labels), 4)]
                    results.keep("trials", names[rate], {"accuracy": done})
                bar.update()
                return done

            first = {rate: accuracies(rate, 1)[0] for rate in grid.learning_rates}
            for rate in sorted(first, key=lambda rate: -first[rate])[:2]:
                accuracies(rate, 2)


def run(results: Results, classifier: nn.Sequential, private_train: ImageSet, private_test: ImageSet) -> None:
    """The missing cells of the grid, seed by seed, so that an interrupted run has all subsets of a seed."""
    grid = results.grid
    assert private_test.labels is not None
    cells = [(seed, epsilon, subset) for seed in grid.seeds for epsilon in grid.epsilons for subset in grid.subsets]
    for seed, epsilon, subset in progress_bar(cells, desc="cells"):
        name = f"{subset}_{budget_name(epsilon)}_seed{seed}"
        if name in results.content["cells"]:
            continue
        rate = learning_rate_for(results, subset, epsilon)
        started = time.perf_counter()
        trained, certificate = layer_classification.train_layer_classification(
            private_train.images,
            private_train.labels,
            classifier,
            grid.config(subset, rate),
            epsilon=epsilon,
            num_private_declared=len(private_train),
            class_names=private_train.class_names or (),
            delta=grid.delta,
            neighboring_relation=grid.neighboring_relation,
            seed=seed,
        )
        cell = {
            "subset": subset,
            "epsilon": _finite(epsilon),
            "seed": seed,
            "accuracy": round(trained.accuracy(private_test.images, private_test.labels), 4),
            "label": evaluation.NOT_DP,
            "learning_rate": rate,
            "trained_parameters": trained.trained_parameters,
            "noise_dimension": trained.noise_dimension,
            "num_releases": trained.num_releases,
            "noise_std": trained.plan.noise_std,
            "sample_rate": trained.plan.sample_rate,
            "accountant": trained.plan.accountant,
            "certificate": certificate.sentence,
            "seconds": round(time.perf_counter() - started, 2),
        }
        results.keep("cells", name, cell)


def summarise(cells: Mapping[str, Mapping[str, Any]], grid: Grid) -> list[dict[str, Any]]:
    """For each epsilon: the mean and spread of every subset, the best one, and which others may be as good.

    ``not_worse`` lists subsets whose mean is within two standard errors of the best one's: the error of a difference,
    from the standard deviations over seeds of the two.
    """
    rows = []
    for epsilon in grid.epsilons:
        scores: dict[str, list[float]] = {}
        for cell in cells.values():
            if cell["epsilon"] == _finite(epsilon):
                scores.setdefault(cell["subset"], []).append(cell["accuracy"])
        if not scores:
            continue
        mean = {subset: float(np.mean(values)) for subset, values in scores.items()}
        spread = {subset: float(np.std(v, ddof=1)) if len(v) > 1 else None for subset, v in scores.items()}
        best = max(mean, key=lambda subset: mean[subset])
        not_worse = []
        for subset, values in scores.items():
            error = math.hypot(spread[subset] or 0.0, spread[best] or 0.0) / math.sqrt(len(values))
            if subset != best and mean[best] - mean[subset] <= 2 * error:
                not_worse.append(subset)
        rows.append(
            {
                "epsilon": _finite(epsilon),
                "best": best,
                "not_worse": not_worse,
                "mean": {subset: round(value, 4) for subset, value in mean.items()},
                "std": {s: None if value is None else round(value, 4) for s, value in spread.items()},
            }
        )
    return rows


def show(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table: a row for each epsilon, accuracy in percent by subset, the best one marked."""
    subsets = list(summary[0]["mean"]) if summary else []
    lines = ["epsilon  " + "  ".join(f"{subset:>12}" for subset in subsets)]
    for row in summary:
        shown = "inf" if row["epsilon"] is None else f"{row['epsilon']:g}"
        marks = {row["best"]: "*"} | {subset: "=" for subset in row["not_worse"]}
        values = (f"{100 * row['mean'][s]:>11.1f}{marks.get(s, ' ')}" for s in subsets)
        lines.append(f"{shown:>7}  " + "  ".join(values))
    return "\n".join([*lines, "* best   = within two standard errors of it"])


def subsample(private_set: ImageSet, count: int) -> ImageSet:
    """``count`` images chosen by a fixed public seed, or all if there are no more."""
    if len(private_set) <= count or private_set.labels is None:
        return private_set
    rows = torch.randperm(len(private_set), generator=torch.Generator().manual_seed(0))[:count]
    return dataclasses.replace(private_set, images=private_set.images[rows], labels=private_set.labels[rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune on public stand-ins, then run the grid; both continue where they stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperdp_lib.baselines.layer_grid", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the file of results")
    parser.add_argument("--private", choices=("digits", "mnist"), default="digits", help="default: digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--smoke", action="store_true", help="two subsets, two budgets, one seed: is all in order?")
    options = parser.parse_args(arguments)
    from hyperdp_lib import pretrained
    from hyperdp_lib.public.glyphs import GlyphTasks

    torch.set_num_threads(1)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    grid = Grid(private=options.private, seeds=tuple(range(options.seeds)))
    if options.smoke:
        grid = dataclasses.replace(
            grid, max_private=300, max_test=200, subsets=("head", "last_block"), epsilons=(8.0, math.inf), seeds=(0,),
            tuned_at=(8.0,), learning_rates=(3e-3, 1e-2), batch=math.inf, num_steps=2,
        )  # fmt: skip
    name = f"{options.private}-smoke" if options.smoke else options.private
    try:
        private_train = subsample(data.load_named_or_path(options.private), grid.max_private)
        private_test = subsample(data.load_named_or_path(f"{options.private}-test"), grid.max_test)
        results = Results(options.out / f"{name}.json", grid)
    except InputError as error:
        parser.error(str(error))
    network = FeatureNetwork.from_pretrained(pretrained.features_file())
    public = GlyphTasks(progress=True).sample_tasks(100, 10, torch.Generator().manual_seed(0)).flatten(0, 1)
    classifier = build_classifier(network, public, len(private_train.class_names or ()))
    sha256 = artefacts.tensors_sha256(classifier.state_dict())
    if results.content.setdefault("classifier_sha256", sha256) != sha256:
        parser.error(f"{name}.json was made with another pretrained network: choose another --out, or delete it.")
    tune(results, classifier, GlyphTasks(split="held_out"), len(private_train))
    run(results, classifier, private_train, private_test)
    print(show(results.content["summary"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
