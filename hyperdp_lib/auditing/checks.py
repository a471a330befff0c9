"""Checks that a broken pipeline cannot pass, and an intact one passes but for one run in a million.

Each looks at one thing the privacy proof needs and returns a `Finding`. Exact properties (sensitivity, additivity,
order) are compared in whole numbers of the release's grid, or with the smallest tolerance that floats of the caller
need; statistical ones state their p-value and raise an alarm below `FALSE_ALARM`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from hyperdp_lib import mechanism
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.auditing import bounds
from hyperdp_lib.auditing.bounds import Counts
from hyperdp_lib.auditing.pipeline import DIMENSION, Pipeline, miniature
from hyperdp_lib.baselines.dp_sgd import PrivacyPlan, secret_generator
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR, Batch, GaussianSum
from hyperdp_lib.release_folder import Release

FALSE_ALARM = 1e-6
RUNS_PER_CALL = 2048  # each a row of one release


@dataclass(frozen=True)
class Finding:
    """Outcome of one check: whether the pipeline is broken, and what shows it."""

    broken: bool
    evidence: str


Check = Callable[[Pipeline], Finding]


def sensitivity(pipeline: Pipeline) -> Finding:
    """Neighbouring data sets give exact sums no further apart than the sensitivity, under every relation."""
    worst, where = 0.0, "nothing"
    for relation, factor in SENSITIVITY_FACTOR.items():
        config = GaussianSum(DIMENSION, 1.0, num_rows=2, neighboring_relation=relation)
        rows = np.array([0, 1, 1, 0, 1])
        others = _examples(5, seed=1)
        for name, example in _adversarial():
            replaced = -example[None] if relation == "replace_one" else np.zeros((1, DIMENSION))
            for row in (0, 1):
                with_it = np.concatenate([others, example[None]]), np.append(rows, row)
                changed = np.concatenate([others, replaced]), np.append(rows, row)
                if relation == "add_or_remove_one":
                    changed = others, rows
                with np.errstate(all="ignore"):  # a broken one may overflow
                    moved = pipeline.exact_sum([with_it], config) - pipeline.exact_sum([changed], config)
                    distance = float(np.linalg.norm(moved)) / factor
                if not distance <= worst:  # NaN counts
                    worst, where = distance, f"{name}, {relation}"
    broken = not worst <= 1.0 + 1e-12
    return Finding(broken, f"largest move {worst:.6g} of the sensitivity ({where})")


def additivity(pipeline: Pipeline) -> Finding:
    """What one example adds does not depend on the other examples: bit for bit the same beside any of them."""
    config = GaussianSum(DIMENSION, 1.0)
    (example,) = _examples(1, seed=2)
    moves = []
    for seed, count in ((3, 0), (4, 1), (5, 50)):
        others = _examples(count, seed=seed)
        with_it = np.concatenate([others, example[None]])
        moves.append(pipeline.exact_sum([(with_it, None)], config) - pipeline.exact_sum([(others, None)], config))
    gap = max(float(np.abs(move - moves[0]).max()) for move in moves)
    return Finding(not gap == 0.0, f"contribution of one example differs by {gap:.3g} beside other examples")


def order(pipeline: Pipeline) -> Finding:
    """Order and batching of the examples do not change one bit of the sum."""
    config = GaussianSum(DIMENSION, 1.0)
    examples = np.abs(_examples(3000, seed=6))  # all one way, so that the sum grows past what a float32 holds
    whole = pipeline.exact_sum([(examples, None)], config)
    shuffled = examples[np.random.default_rng(0).permutation(3000)]
    parts = pipeline.exact_sum([(shuffled[i : i + 70], None) for i in range(0, 3000, 70)], config)
    gap = float(np.abs(whole - parts).max())
    return Finding(not gap == 0.0, f"sums of the same examples differ by {gap:.3g}")


def poisoning(pipeline: Pipeline) -> Finding:
    """One image of NaN or infinity changes nothing, or no more than any image may."""
    config = GaussianSum(DIMENSION, 1.0)
    examples = _examples(6, seed=7)
    clean = pipeline.exact_sum([(examples, None)], config)
    worst = 0.0
    for value in (np.nan, np.inf, -np.inf):
        bad = np.concatenate([examples, np.full((1, DIMENSION), value)])
        with np.errstate(all="ignore"):
            moved = float(np.linalg.norm(pipeline.exact_sum([(bad, None)], config) - clean))
        worst = moved if not moved <= worst else worst
    return Finding(not worst <= 1.0 + 1e-12, f"a non-finite example moves the sum by {worst:.3g}")


def one_image_at_a_time(pipeline: Pipeline) -> Finding:
    """The embedding of an image is the same, bit for bit, whatever other images are embedded with it."""
    images = torch.rand(9, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gap = 0.0
    for embed in (pipeline.embed, pipeline.embed_nested):
        alone = np.concatenate([embed(image[None]) for image in images])
        gap = max(gap, float(np.abs(embed(images) - alone).max()))
    return Finding(not gap == 0.0, f"an embedding moves by {gap:.3g} with the images beside it")


def noise_law(pipeline: Pipeline) -> Finding:
    """The noise is Gaussian, as large as the relation asks for, in every coordinate of every row."""
    worst, what = 1.0, "all as stated"
    for relation, factor in SENSITIVITY_FACTOR.items():
        config = GaussianSum(DIMENSION, 3.0, num_rows=250, neighboring_relation=relation)
        noise = _released(pipeline, config, runs=4) / (3.0 * factor)
        variances = np.concatenate([noise.reshape(-1, DIMENSION).var(0), noise.reshape(4, 250, -1).var((0, 2))])
        for name, p in (
            ("its size", _two_sided_chi2(float(np.square(noise).sum()), noise.size)),
            ("its mean", 2 * float(stats.norm.sf(abs(noise.mean()) * math.sqrt(noise.size)))),
            ("its shape", float(stats.kstest(noise.ravel(), "norm").pvalue)),
            ("a coordinate or row without noise", 1.0 if variances.min() > 0.05 else 0.0),
        ):
            if not p >= worst:
                worst, what = p, f"{name}, {relation}"
    return Finding(not worst * 12 > FALSE_ALARM, f"smallest p-value {worst:.2g} ({what})")


def noise_independence(pipeline: Pipeline) -> Finding:
    """Noise of different coordinates, rows and releases has no part in common."""
    config = GaussianSum(DIMENSION, 3.0, num_rows=60)
    noise = _released(pipeline, config, runs=20) / 3.0  # (20, 60, k)
    worst, what = 1.0, "none in common"
    for name, samples in (
        ("rows", noise.transpose(0, 2, 1).reshape(-1, 60)),
        ("coordinates", noise.reshape(-1, DIMENSION)),
        ("releases", noise.reshape(20, -1).T),
    ):
        correlation = np.atleast_2d(np.corrcoef(samples.T))
        pairs = np.abs(correlation[np.triu_indices(len(correlation), 1)])
        # Fisher's z is nearly normal; the largest of all pairs is judged (Bonferroni)
        largest = np.arctanh(min(float(np.nan_to_num(pairs, nan=1.0).max()), 1 - 1e-12))
        p = 2 * float(stats.norm.sf(largest * math.sqrt(len(samples) - 3))) * len(pairs)
        if p < worst:
            worst, what = p, f"two {name} correlate by {pairs.max():.2f}"
    return Finding(not worst * 3 > FALSE_ALARM, f"smallest p-value {worst:.2g} ({what})")


def drawn_by_opendp(pipeline: Pipeline) -> Finding:
    """Without a seed the noise is what OpenDP's discrete Gaussian of the right scale gives, and nothing else."""
    config = GaussianSum(DIMENSION, 3.0, num_rows=2, neighboring_relation="replace_one")
    examples, rows = _examples(6, seed=8), np.arange(6) % 2
    exact = pipeline.exact_sum([(examples, rows)], config)
    scales: list[float] = []

    def make_gaussian(domain: Any, metric: Any, scale: float, **more: Any) -> Callable[[list[int]], list[int]]:
        scales.append(scale)
        return lambda numbers: [number + 1000 * place for place, number in enumerate(numbers)]

    with mock.patch("opendp.measurements.make_gaussian", make_gaussian):
        noisy = pipeline.noisy_sum([(examples, rows)], config)
    known = 1000.0 * np.arange(exact.size).reshape(exact.shape) / config.grid_units
    gap = float(np.abs(noisy - exact - known).max())
    right = scales == [config.noise_multiplier * config.grid_sensitivity]
    return Finding(not (right and gap == 0.0), f"{len(scales)} draws of OpenDP's, and {gap:.3g} of other noise")


def non_interference(pipeline: Pipeline) -> Finding:
    """Where the mechanism's results are held fixed, whatever is released is the same to the last byte for all data."""
    for mode, network, asked in modes():
        found = {}
        for name, images, labels in data_sets():
            classes = {"private_labels": labels} if "class_names" in asked else {}
            with held_fixed() as configs:
                made = pipeline.release(images, network, epsilon=1.0, **asked, **classes)
            found[name] = released_bytes(made), tuple(configs)
        (first, told), *others = found.items()
        for name, one in others:
            if one != told:
                return Finding(True, f"{mode}: the release of {name} differs from that of {first}")
    return Finding(False, "one release for all data sets in every mode")


def fresh_noise(pipeline: Pipeline) -> Finding:
    """Each sum of a release draws noise of its own, of the size that its configuration says, also in the next release.

    The count is one number, so the sums of embeddings after it are looked at.
    """
    _, images, _ = next(data_sets())
    noise = []
    for _ in range(40):
        with spied() as calls:
            pipeline.release(images, miniature()["plain"], epsilon=1.0, method="two_steps")
        noise.append([((noisy - exact) / config.noise_std)[0] for config, exact, noisy in calls])
    counts = np.array([one[0][0] for one in noise])
    sums = np.array([one[1:] for one in noise])  # (releases, steps, k)
    first, second = sums[:, 0], sums[:, 1]
    worst, what = 1.0, "none in common"
    for name, a, b in (
        ("the two steps", first, second),
        ("first steps of successive releases", first[1:], first[:-1]),
        ("second steps of successive releases", second[1:], second[:-1]),
        ("the count and the first step", counts, first[:, 0]),
    ):
        p = _correlation_p(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]), a.size)
        if not p >= worst:
            worst, what = p, f"{name} share noise"
    for name, step in (("count", counts), ("first step", first), ("second step", second)):
        p = _two_sided_chi2(float(np.square(step).sum()), step.size)
        if not p >= worst:
            worst, what = p, f"size of the noise of the {name}"
    return Finding(not worst * 7 > FALSE_ALARM, f"smallest p-value {worst:.2g} ({what})")


def ledger(pipeline: Pipeline) -> Finding:
    """Every call of the mechanism stands in the ledger with its own noise, and together they cost what is certified."""
    _, images, labels = next(data_sets())
    for mode, network, asked in modes():
        for relation in SENSITIVITY_FACTOR:
            classes = {"private_labels": labels} if "class_names" in asked else {}
            with spied() as calls:
                made = pipeline.release(
                    images, network, epsilon=1.0, neighboring_relation=relation, **asked, **classes
                )
            statement, configs = made.certificate, [config for config, _, _ in calls]
            charged = [entry.noise_multiplier for entry in statement.ledger if entry.private]
            if charged != [config.noise_multiplier for config in configs]:
                return Finding(True, f"{mode}: {len(charged)} charges for {len(configs)} calls, or of other noise")
            mu = math.hypot(*(1 / config.noise_multiplier for config in configs))
            delta = gaussian_delta(mu, statement.epsilon)
            if not (statement.epsilon <= 1.0 and delta <= 1.001 * statement.delta):
                return Finding(True, f"{mode}: true delta is {delta / statement.delta:.4g} times the stated one")
            stated = {config.neighboring_relation for config in configs}
            if stated != {relation} or statement.noise_std != configs[-1].noise_std:
                return Finding(True, f"{mode}: the noise is not of the stated size, or for another relation")
    return Finding(False, "every call is charged, and the charges compose to the certified budget")


def poisson_batches(pipeline: Pipeline) -> Finding:
    """Every example is in every batch by a coin of its own: sizes, shares and overlaps are binomial, by exact tests."""
    count, rate, steps = 100, 0.2, 2000
    plan = PrivacyPlan(1.0, rate, steps, count, 1.0, "")
    drawn = np.zeros((steps, count), dtype=bool)
    for row, batch in zip(drawn, pipeline.poisson_batches(count, plan, secret_generator()), strict=True):
        row[batch.numpy()] = True
    usual = round(rate * count)
    each = min(_binomial_p(int(hits), steps, rate) for hits in drawn.sum(0)) * count
    tests = {
        "shares of all examples": _binomial_p(int(drawn.sum()), drawn.size, rate),
        "share of one example": min(1.0, each),
        "sizes": _binomial_p(int((drawn.sum(1) == usual).sum()), steps, float(stats.binom.pmf(usual, count, rate))),
        "two examples together": _binomial_p(int((drawn[:, ::2] & drawn[:, 1::2]).sum()), drawn.size // 2, rate**2),
        "one example twice": _binomial_p(int((drawn[::2] & drawn[1::2]).sum()), drawn.size // 2, rate**2),
    }
    what = min(tests, key=lambda name: tests[name])
    return Finding(not tests[what] * len(tests) > FALSE_ALARM, f"smallest p-value {tests[what]:.2g} ({what})")


def calibration(pipeline: Pipeline) -> Finding:
    """The noise for a budget gives that budget: delta of the Gaussian mechanism, by its exact formula."""
    worst, where = 0.0, ""
    for epsilon in (0.1, 0.5, 1.0, 4.0, 10.0, 16.0):
        for delta in (1e-3, 1e-5, 1e-7):
            exact = gaussian_delta(1 / pipeline.noise_multiplier(epsilon, delta), epsilon)
            if exact / delta > worst:
                worst, where = exact / delta, f"epsilon {epsilon:g}, delta {delta:g}"
    return Finding(not worst <= 1.001, f"true delta is at most {worst:.4g} times the stated one ({where})")


def distinguishing(pipeline: Pipeline, trials: int = 10_000) -> Finding:
    """An attack on neighbouring data sets succeeds no more often than the stated privacy allows (`run_attack`).

    The default sees noise an eighth too small at epsilon = 16 but for one run in a million; 4,000 miss one in 40.
    """
    worst, what = -math.inf, ""
    for epsilon in (1.0, 16.0):
        for relation in ("add_or_remove_one", "replace_one"):  # zero_out has the first one's pairs of outputs
            config = pipeline.config(epsilon, neighboring_relation=relation)
            mu = 1 / stated_multiplier(epsilon)
            counts = run_attack(pipeline, config, trials)
            # confident enough for four attacks to raise one false alarm in a million
            refuted = bounds.mu_lower_bound(counts, 1 - FALSE_ALARM / 4)
            if refuted - mu > worst:
                worst, what = refuted - mu, f"mu >= {refuted:.3f} where {mu:.3f} is stated; {relation}"
    return Finding(worst > 0, what)


def stated_multiplier(epsilon: float, delta: float = 1e-5) -> float:
    """Noise multiplier that a certificate of this budget stands for: bisection of `gaussian_delta`."""
    low, high = 1e-3, 1e4
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if gaussian_delta(1 / middle, epsilon) > delta else (low, middle)
    return high


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The exact delta of the Gaussian mechanism at epsilon (Balle & Wang 2018, theorem 8); mu is 1 / multiplier."""
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
    )


CHECKS: Mapping[str, Check] = {
    "sensitivity": sensitivity,
    "additivity": additivity,
    "order": order,
    "poisoning": poisoning,
    "one image at a time": one_image_at_a_time,
    "noise law": noise_law,
    "noise independence": noise_independence,
    "drawn by OpenDP": drawn_by_opendp,
    "non-interference": non_interference,
    "fresh noise": fresh_noise,
    "ledger": ledger,
    "Poisson batches": poisson_batches,
    "calibration": calibration,
    "distinguishing": distinguishing,
}


def modes() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Ways to release: a name, a public network, and what is asked for beside a budget; with class names, labelled."""
    networks, classes = miniature(), {"class_names": ("a", "b", "c")}
    yield "one sum", networks["plain"], {}
    yield "one sum a class", networks["plain"], classes
    yield "nested coordinates for a public size", networks["nested"].fitting(3.73, 20), classes
    yield "cells", networks["cells"], {}
    yield "cells a class", networks["cells"], classes
    two = {"method": "two_steps"}
    yield "two steps", networks["plain"], {"public_size": 100, **two}
    yield "two steps a class, one centre", networks["nested"], {"public_size": 100, **two, **classes}
    yield "two steps a class, a centre each", networks["plain"], {"public_size": 1000, **two, **classes}
    yield "a count and two steps", networks["plain"], two
    yield "a count and two steps a class", networks["nested"], {**two, **classes}
    for size in (None, 1000):  # the second is large enough for cells, unless the first step finds images of one kind
        for told, names in (("", {}), (" a class", classes)):
            how = "a count" if size is None else "a public size"
            yield f"{how}, and what follows{told}", networks["nested"], {"public_size": size, "method": "auto", **names}
    yield "cells for a public size", networks["nested"], {"public_size": 1000, "method": "cells"}


def data_sets() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Private images (N, 1, 16, 16) and labels (N,) of three classes; the first two are of one size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 16, 16, generator=generator) * 2 - 1
    labels = torch.arange(12) % 3
    yield "random images", images, labels
    yield "a single class, all black", torch.full_like(images, -1.0), torch.ones_like(labels)
    yield "many images of extremes", images.sign().repeat(11, 1, 1, 1), labels.repeat(11)
    yield "an image in two copies", images[:1].repeat(2, 1, 1, 1), labels[:2]
    yield "one image fewer", images[1:], labels[1:]
    yield "no image at all", images[:0], labels[:0]


def released_bytes(made: Release) -> str:
    """All that a release holds, in one text: equal for equal releases only."""
    adapter, statement, noisy_sum = made.adapter, made.certificate, made.noisy_sum
    tensors = {f"{layer}.{i}": factor for layer, pair in adapter.factors.items() for i, factor in enumerate(pair)}
    return "\n".join((tensors_sha256(tensors), *adapter.names, statement.to_json(), noisy_sum.tobytes().hex()))


@contextlib.contextmanager
def held_fixed() -> Iterator[list[GaussianSum]]:
    """While it lasts, the mechanism reads its data and gives results that depend on the number of the call alone.

    Yields the list of the configurations that it is called with.
    """
    configs: list[GaussianSum] = []

    def fixed(private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None) -> NDArray[np.float64]:
        for _ in private_batches:
            pass
        configs.append(config)
        drawn = np.random.default_rng(len(configs)).normal(size=(config.num_rows, config.dimension))
        return np.rint(drawn * 20 * config.grid_units) / config.grid_units

    with mock.patch.object(mechanism, "noisy_sum", fixed):
        yield configs


@contextlib.contextmanager
def spied() -> Iterator[list[tuple[GaussianSum, NDArray[np.float64], NDArray[np.float64]]]]:
    """While it lasts, the mechanism keeps a list of its calls: configuration, exact sum and noisy sum of each."""
    calls: list[tuple[GaussianSum, NDArray[np.float64], NDArray[np.float64]]] = []
    intact = mechanism.noisy_sum

    def spy(private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None) -> NDArray[np.float64]:
        batches = list(private_batches)
        exact = intact(batches, replace(config, noise_multiplier=0.0), seed=0)
        noisy = intact(batches, config, seed=seed)
        calls.append((config, exact, noisy))
        return noisy

    with mock.patch.object(mechanism, "noisy_sum", spy):
        yield calls


def run_attack(pipeline: Pipeline, config: GaussianSum, trials: int) -> Counts:
    """Attack ``trials`` times with and as often without the example; a tenth more runs choose the threshold."""
    some = max(100, trials // 10)
    without, having = attack_scores(pipeline, config, trials + some)
    threshold = bounds.best_threshold(without[:some], having[:some])
    return bounds.count(without[some:], having[some:], threshold)


def attack_scores(
    pipeline: Pipeline, config: GaussianSum, runs: int, *, workers: int = 1
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Scores ``(runs,)`` of releases without and with one example: the released sum along that example.

    The neighbours: three examples that point one way, and the same with the example that moves the sum most, of which
    `worst_example` tries several. Every row of one release is a run of its own: rows are noised independently, and each
    holds the neighbours' data. For Gaussian noise no other score tells more.
    """
    example, direction = worst_example(pipeline, config)
    common = np.tile(direction, (3, 1))
    absent = np.concatenate([common, -example[None]]) if config.neighboring_relation == "replace_one" else common

    def scores(data: NDArray[np.float64]) -> NDArray[np.floating]:
        def call(rows: int) -> NDArray[np.floating]:
            examples, owners = np.tile(data, (rows, 1)), np.repeat(np.arange(rows), len(data))
            return pipeline.noisy_sum([(examples, owners)], replace(config, num_rows=rows)) @ direction

        calls = [min(RUNS_PER_CALL, runs - done) for done in range(0, runs, RUNS_PER_CALL)]
        with ThreadPoolExecutor(workers) as pool:  # the sampler works outside Python's lock
            return np.concatenate(list(pool.map(call, calls)))

    return scores(absent), scores(np.concatenate([common, example[None]]))


def worst_example(
    pipeline: Pipeline, config: GaussianSum
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of many candidates the example that moves the exact sum most, and the unit vector along which it does."""
    best, found = 0.0, (np.eye(config.dimension)[0],) * 2
    for _, example in _adversarial(config.dimension):
        if not np.isfinite(example).all():
            continue
        one_row = replace(config, num_rows=1)
        with np.errstate(all="ignore"):
            moved = pipeline.exact_sum([(example[None], None)], one_row)[0]
            length = float(np.linalg.norm(moved))
        if math.isfinite(length) and length > best:
            best, found = length, (example, moved / length)
    return found


def _released(pipeline: Pipeline, config: GaussianSum, runs: int) -> NDArray[np.float64]:
    """Noise of several releases of no data at all: ``(runs, rows, k)``."""
    nothing = np.zeros((0, config.dimension)), np.zeros(0, dtype=np.int64)
    return np.stack([pipeline.noisy_sum([nothing], config) for _ in range(runs)])


def _correlation_p(correlation: float, size: int) -> float:
    """Two-sided p-value of no correlation; Fisher's z is nearly normal."""
    return 2 * float(stats.norm.sf(abs(np.arctanh(np.clip(correlation, -1 + 1e-12, 1 - 1e-12))) * math.sqrt(size - 3)))


def _binomial_p(hits: int, trials: int, rate: float) -> float:
    """Two-sided and exact: twice the smaller tail."""
    return min(1.0, 2 * float(min(stats.binom.cdf(hits, trials, rate), stats.binom.sf(hits - 1, trials, rate))))


def _two_sided_chi2(value: float, freedom: int) -> float:
    return float(2 * min(stats.chi2.cdf(value, freedom), stats.chi2.sf(value, freedom)))


def _examples(count: int, seed: int) -> NDArray[np.float64]:
    drawn = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return drawn / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-12)


def _adversarial(dimension: int = DIMENSION) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Examples that a careless clip lets through."""
    rng = np.random.default_rng(0)
    first = np.eye(dimension)[0]
    yield "a unit vector", first
    yield "norm 1 to the last digit", np.full(dimension, dimension**-0.5)
    yield "a large one", 1e6 * first
    yield "one that overflows when squared", 1e200 * np.ones(dimension)
    yield "the largest float", np.full(dimension, np.finfo(np.float64).max)
    yield "subnormal", 5e-324 * np.ones(dimension)
    yield "NaN", np.full(dimension, np.nan)
    yield "infinity", np.where(np.arange(dimension) == 0, np.inf, 0.0)
    for turn in range(40):
        drawn = rng.normal(size=dimension)
        yield f"random direction {turn}", drawn / np.linalg.norm(drawn) * rng.choice([1.0, 1.0 + 1e-9, 3.0])
