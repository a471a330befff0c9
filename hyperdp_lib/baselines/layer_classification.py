"""Which layers of a pretrained classifier should DP-SGD tune? Accuracy by subset of layers and by epsilon.

Cattan, Choquette-Choo, Papernot & Thakurta (2022, arXiv 2210.02156): under differential privacy, the layers that are
tuned are one more hyper-parameter. DP-SGD adds noise to every coordinate that it trains, so at a small epsilon few
parameters may do better than many, whatever they can express. Their layers and architecture are not available to us;
this module tests the *claim* on a small scale. The network is the library's feature network, pretrained on public
characters: four convolutions with GroupNorm and a linear layer. A new head, zero at first, classifies the private
images; it is trained in every subset of `SUBSETS`, together with the layers that the subset names.

Layers below the first trained one are frozen and see one image at a time, so the images are passed through them once,
and DP-SGD starts from there.

``python -m hyperdp_lib.baselines.layer_classification --out book/results/layers`` finds the learning rate of each
subset on public stand-ins (held-out characters, ten classes, in many hands), with the same number of trials for each,
and then runs the grid of subsets, epsilons and seeds. One file for each private set; what is in it is not run again.
Accuracies are of private test images: research metrics, not differentially private.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from hyperdp_lib import artefacts, data, evaluation, records
from hyperdp_lib.baselines import dp_training
from hyperdp_lib.baselines.dp_sgd import PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.evaluation import FeatureNetwork

# Layers of `Classifier`: convolutions 0, 3, 6, 9 and their norms 1, 4, 7, 10; linear 13; standardisation 14; head 15.
HEAD = r"15\..*"
SUBSETS: Mapping[str, str] = {
    "head": HEAD,
    "norms": rf"(1|4|7|10)\..*|{HEAD}",
    "biases": rf".*\.bias|{HEAD}",
    "first_block": rf"(0|1)\..*|{HEAD}",
    "last_block": rf"(9|10)\..*|{HEAD}",
    "linear": rf"13\..*|{HEAD}",
    "convolutions": rf"(0|3|6|9)\..*|{HEAD}",
    "all": r".*",
}
"""Name of a subset to a pattern of the parameters it trains; the head is always among them."""

LEARNING_RATES = (3e-3, 1e-3, 1e-2, 3e-4, 3e-2)
EPSILONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
TUNED_AT = (0.5, 4.0, math.inf)


@dataclass(frozen=True)
class LayerClassificationConfig(TrainConfig):
    """Public choices of one run.

    Parameters
    ----------
    subset : str
        Which layers are trained: a name in `SUBSETS`.
    """

    subset: str = "head"
    learning_rate: float = 1e-2
    clip_norm: float = 1.0
    num_steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in SUBSETS:
            raise InputError(f"subset must be one of {', '.join(SUBSETS)}, got {self.subset!r}.")
        if self.noise_draws != 1:
            raise InputError("noise_draws must be 1: a classifier's loss draws no noise of its own.")


class Standardise(nn.Module):
    """Features less their public mean, over their public standard deviation; both ``(64,)``."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def build_classifier(network: FeatureNetwork, public_images: Tensor, num_classes: int) -> nn.Sequential:
    """The pretrained layers, standardised by ``public_images`` ``(N, C, H, W)``, and a head that is zero.

    Returns
    -------
    torch.nn.Sequential
        Images ``(N, C, H, W)`` in [-1, 1] to logits ``(N, num_classes)``; see `SUBSETS` for its layers.
    """
    layers = copy.deepcopy(network.layers).eval().requires_grad_(False)
    with torch.no_grad():
        found = torch.cat([layers(part) for part in public_images.split(500)])
    head = nn.Linear(network.dimension, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    standardise = Standardise(found.mean(0), found.std(0).clamp(min=1e-3))
    return nn.Sequential(*layers, standardise, head).eval().requires_grad_(False)


def num_classes(classifier: nn.Sequential) -> int:
    """Classes that the head tells apart."""
    head: Any = classifier[-1]
    return head.out_features


def split_at_first_trained(classifier: nn.Sequential, subset: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Frozen layers below the subset, and a trainable copy of the rest."""
    chosen = [name for name, _ in classifier.named_parameters() if re.fullmatch(SUBSETS[subset], name)]
    first = min(int(name.split(".")[0]) for name in chosen)
    layers = [*classifier.named_children()]
    frozen, rest = (nn.Sequential(OrderedDict(part)) for part in (layers[:first], layers[first:]))
    rest = copy.deepcopy(rest)
    for name, parameter in rest.named_parameters():  # the layers keep their names
        parameter.requires_grad_(name in chosen)
    return frozen, rest


@dataclass(frozen=True, eq=False)
class LayerClassifier:
    """A classifier of which one subset of layers was trained.

    Attributes
    ----------
    model : torch.nn.Module
        Images ``(N, C, H, W)`` to logits.
    class_names : tuple of str
    config : LayerClassificationConfig
    plan : PrivacyPlan
    trained_parameters, noise_dimension : int
        The same number: all that is trained is noised.
    seconds : float
        Wall-clock training time.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    config: LayerClassificationConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float

    @property
    def num_releases(self) -> int:
        """Noisy gradients that were released; 0 without privacy."""
        return self.plan.num_steps if self.plan.noise_std > 0 else 0

    @torch.no_grad()
    def accuracy(self, private_test_images: Tensor, private_test_labels: Tensor) -> float:
        """Share of right answers in [0, 1].  A research metric, not DP."""
        logits = torch.cat([self.model(part) for part in private_test_images.split(500)])
        return float((logits.argmax(1) == private_test_labels).double().mean())


def cross_entropy(model: nn.Module, inputs: Tensor, *, generator: torch.Generator, labels: Tensor) -> Tensor:
    """Loss of each example ``(N,)``; draws nothing, so ``generator`` is not used."""
    return F.cross_entropy(model(inputs), labels, reduction="none")


def train_layer_classification(
    private_images: Tensor,
    private_labels: Tensor | None,
    classifier: nn.Sequential,
    config: LayerClassificationConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    class_names: Sequence[str],
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
    progress: bool = False,
) -> tuple[LayerClassifier, Certificate]:
    """Train one subset of the layers by DP-SGD; with ``epsilon = inf`` by the same loop, not private.

    Parameters
    ----------
    private_images, private_labels : Tensor
        ``(N, C, H, W)`` in [-1, 1] and ``(N,)``.
    classifier : torch.nn.Sequential
        From `build_classifier`, for as many classes as ``class_names``; left as it is.
    epsilon, delta, neighboring_relation, num_private_declared, seed, progress
        As in `dp_lora.train_dp_lora`.

    Returns
    -------
    trained : LayerClassifier
    certificate : Certificate
    """
    names = tuple(class_names)
    if private_labels is None:
        raise InputError("classification needs private_labels: give one label for each image.")
    if len(names) < 2 or num_classes(classifier) != len(names):
        raise InputError(f"the classifier has {num_classes(classifier)} classes, class_names {len(names)}.")
    first, linear = (cast(Any, classifier[index]) for index in (0, 13))
    channels = first.in_channels
    if private_images.ndim != 4 or private_images.shape[1] != channels:
        shape = tuple(private_images.shape)
        raise InputError(f"private_images must have shape (N, {channels}, H, W), got {shape}: convert them first.")
    side = private_images.shape[-1]
    if private_images.shape[-2] != side or 128 * math.ceil(side / 4) ** 2 != linear.in_features:
        raise InputError(f"the network does not read {tuple(private_images.shape[-2:])} images: resize them first.")
    dp_training.check_private(private_images, private_labels, names)
    frozen, trainee = split_at_first_trained(classifier, config.subset)
    with torch.no_grad():  # one image at a time (GroupNorm), by public layers: nothing is released here
        private_inputs = torch.cat([frozen(part) for part in private_images.split(500)])
    budget: dict[str, Any] = dict(
        epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation, class_names=names
    )
    run = dp_training.train(
        lambda _: dp_training.trainable(trainee),
        private_inputs.view(*private_inputs.shape, *[1] * (4 - private_inputs.ndim)),
        private_labels,
        config,
        num_private_declared=num_private_declared,
        per_class=False,
        seed=seed,
        loss_function=cross_entropy if private_inputs.ndim == 4 else _flat_cross_entropy,
        progress=progress,
        **budget,
    )
    trained = LayerClassifier(
        nn.Sequential(*frozen, *trainee).eval(),
        names,
        config,
        run.plan,
        run.trained_parameters,
        run.noise_dimension,
        run.seconds,
    )
    certificate = dp_training.certify(
        run,
        config,
        classifier,
        num_private_declared,
        method="dp_layer_classification",
        description=f"DP-SGD of a classifier's layers: {config.subset}",
        seeded=seed is not None,
        **budget,
    )
    return trained, certificate


def _flat_cross_entropy(model: nn.Module, inputs: Tensor, *, generator: torch.Generator, labels: Tensor) -> Tensor:
    """Of features that the training loop holds as 1 x 1 images."""
    return cross_entropy(model, inputs.flatten(1), generator=generator, labels=labels)


def public_stand_in(
    tasks: Any, *, num_classes: int, per_class: int, per_class_test: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """Characters to tell apart, each drawn in as many styles as it has images: training and test images.

    ``tasks`` is a `hyperdp_lib.glyphs.GlyphTasks`.  One task in seven mixes in other characters, as when the feature
    network was trained: no classifier gets all of these right.
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


def tune(results: Results, classifier: nn.Sequential, tasks: Any, num_private: int) -> None:
    """Learning rates on public stand-ins: every rate on the first, the better two of each subset on the second."""
    grid = results.grid
    classes = num_classes(classifier)
    sets = [
        public_stand_in(tasks, num_classes=classes, per_class=num_private // classes, per_class_test=100, seed=s)
        for s in (1, 2)
    ]
    rates = len(grid.learning_rates)
    pairs = [(subset, epsilon) for epsilon in grid.tuned_at for subset in grid.subsets]
    with tqdm(total=len(pairs) * (rates + min(2, rates)), desc="trials on public stand-ins", disable=None) as bar:
        for subset, epsilon in pairs:
            trials = {rate: f"{subset}_{budget_name(epsilon)}_lr{rate:g}" for rate in grid.learning_rates}

            def accuracies(rate: float, count: int, names=trials, subset=subset, epsilon=epsilon) -> list[float]:
                done = results.content["trials"].get(names[rate], {}).get("accuracy", [])
                while len(done) < count:
                    train, test = sets[len(done)]
                    trained, _ = train_layer_classification(
                        train.images,
                        train.labels,
                        classifier,
                        grid.config(subset, rate),
                        epsilon=epsilon,
                        num_private_declared=num_private,
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
    for seed, epsilon, subset in tqdm(cells, desc="cells", disable=None):
        name = f"{subset}_{budget_name(epsilon)}_seed{seed}"
        if name in results.content["cells"]:
            continue
        rate = learning_rate_for(results, subset, epsilon)
        started = time.perf_counter()
        trained, certificate = train_layer_classification(
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
        prog="python -m hyperdp_lib.baselines.layer_classification", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the file of results")
    parser.add_argument("--private", choices=("digits", "mnist"), default="digits", help="default: digits")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--smoke", action="store_true", help="two subsets, two budgets, one seed: is all in order?")
    options = parser.parse_args(arguments)
    from hyperdp_lib import hypernetwork
    from hyperdp_lib.glyphs import GlyphTasks

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
    network = FeatureNetwork.from_pretrained(hypernetwork.WEIGHTS / "glyphs" / "features.safetensors")
    public = GlyphTasks(progress=True).sample_tasks(100, 10, torch.Generator().manual_seed(0)).flatten(0, 1)
    classifier = build_classifier(network, public, len(private_train.class_names or ()))
    results.content["classifier_sha256"] = artefacts.tensors_sha256(classifier.state_dict())
    tune(results, classifier, GlyphTasks(split="held_out"), len(private_train))
    run(results, classifier, private_train, private_test)
    print(show(results.content["summary"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
