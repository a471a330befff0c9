"""Checks that a broken pipeline cannot pass, and an intact one passes but for one run in a million.

Each looks at one thing the privacy proof needs and returns a `Finding`. Exact properties (sensitivity, additivity,
order) are compared in whole numbers of the release's grid, or with the smallest tolerance that floats of the caller
need; statistical ones state their p-value and raise an alarm below `FALSE_ALARM`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from hyperdp_lib.auditing import bounds
from hyperdp_lib.auditing.bounds import Counts
from hyperdp_lib.auditing.pipeline import DIMENSION, Pipeline
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR, GaussianSum

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
    together = pipeline.embed(images)
    alone = np.concatenate([pipeline.embed(image[None]) for image in images])
    gap = float(np.abs(together - alone).max())
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
    "calibration": calibration,
    "distinguishing": distinguishing,
}


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
