r"""Formulas against simulations over whole grids: ``python -m hyperdp_lib.theory.agreement``.

Each `Comparison` of `COMPARISONS` has a grid of places, a function that gives one `Point` (formula, simulated mean and
its standard error) at a place, and a `Tolerance`. A point is outside if no value within ``z`` standard errors of the
simulated mean has a ratio formula / simulated in ``[low, high]``:

* exact statements have ``low = high = 1``, so ``z`` is the usual bound on ``|formula - simulated| / standard error``;
* approximations have a band around 1, widened by 3 standard errors, so that noise alone does not fail them;
* lower bounds have ``[0, 1]``, upper bounds ``[1, infinity]``.

All tunings come from the formulas (they are public); data, noise and algorithms come from `simulation`. Every place has
its own stream of random numbers, named by the comparison and the position of the place in the whole grid, so that a
quick run gives exactly the points it shares with a full one.

Results are one JSON file per comparison; a run skips the files that are there already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperdp_lib.data import InputError
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.theory import bounds, deepsets, rivals, simulation, subspace
from hyperdp_lib.theory.setting import LinearSetting, gdp_mu
from hyperdp_lib.theory.simulation import Simulated

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "book/results/theory"
DELTA = 1e-5
SEED = 20_260

Place = Mapping[str, Any]


@dataclass(frozen=True)
class Tolerance:
    """Ratios formula / simulated that are accepted, and how many standard errors of doubt a simulation gets."""

    low: float
    high: float
    z: float

    def accepts(self, point: Point) -> bool:
        """Whether some value within z standard errors of the simulated mean has an accepted ratio.

        >>> Tolerance(0.8, 1.2, z=3).accepts(Point({}, formula=1.4, simulated=1.0, standard_error=0.1, repetitions=9))
        True
        >>> Tolerance(1, 1, z=3).accepts(Point({}, formula=1.4, simulated=1.0, standard_error=0.1, repetitions=9))
        False
        """
        doubt = self.z * point.standard_error + 1e-9 * point.simulated  # 1e-9: procedures without any randomness
        lowest = self.low * max(0.0, point.simulated - doubt)
        return lowest <= point.formula and (
            math.isinf(self.high) or point.formula <= self.high * (point.simulated + doubt)
        )


@dataclass(frozen=True)
class Point:
    """Formula and simulation at one place of a grid."""

    place: Place
    formula: float
    simulated: float
    standard_error: float
    repetitions: int

    @property
    def ratio(self) -> float:
        """formula / simulated."""
        return self.formula / self.simulated

    @property
    def z(self) -> float:
        """(formula - simulated) / standard error; 0 if they are equal to rounding."""
        gap = self.formula - self.simulated
        return 0.0 if abs(gap) <= 1e-9 * self.simulated else gap / max(self.standard_error, 1e-300)


@dataclass(frozen=True)
class Comparison:
    """A formula, where it is compared, and how well it has to agree.

    ``quick``: how many places, evenly spread over the grid, a quick run takes.
    """

    name: str
    title: str
    tolerance: Tolerance
    grid: tuple[Place, ...]
    point: Callable[[np.random.Generator, Place], Point]
    quick: int = 4

    def places(self, quick: bool) -> list[int]:
        """Positions in the grid of the places to run."""
        if not quick or self.quick >= len(self.grid):
            return list(range(len(self.grid)))
        return sorted({round(x) for x in np.linspace(0, len(self.grid) - 1, self.quick)})

    def run(self, quick: bool = False, seed: int = SEED, step: Callable[[], object] | None = None) -> list[Point]:
        """The points, in the order of the grid; ``step`` is called after each."""
        streams = simulation.streams(np.random.SeedSequence([seed, zlib.crc32(self.name.encode())]), len(self.grid))
        points = []
        for position in self.places(quick):
            points.append(self.point(streams[position], self.grid[position]))
            if step is not None:
                step()
        return points


def summary(points: Sequence[Point], tolerance: Tolerance) -> dict[str, float]:
    """Of one comparison: points, ratio (median, least, largest), the largest |z|, the points and share outside, and the
    median standard error relative to the mean."""
    ratios = np.array([point.ratio for point in points])
    outside = sum(not tolerance.accepts(point) for point in points)
    return {
        "points": len(points),
        "median_ratio": float(np.median(ratios)),
        "min_ratio": float(ratios.min()),
        "max_ratio": float(ratios.max()),
        "max_abs_z": float(max(abs(point.z) for point in points)),
        "outside": outside,
        "share_outside": outside / len(points),
        "relative_error": float(np.median([point.standard_error / point.simulated for point in points])),
    }


# ---- the points ------------------------------------------------------------


def _setting(place: Place, **more: Any) -> LinearSetting:
    """The setting of a place: its entries that are fields of `LinearSetting`, and ``more``."""
    known = {name: value for name, value in place.items() if name in LinearSetting.__dataclass_fields__}
    return LinearSetting(**{**known, **more})


def _mu(place: Place) -> float:
    epsilon = place["epsilon"]
    return math.inf if epsilon is None else float(gdp_mu(epsilon, DELTA))


def _point(place: Place, formula: Any, result: Simulated) -> Point:
    one = result.at()
    return Point(place, float(formula), float(one.mean), float(one.standard_error), one.repetitions)


def _average(results: Sequence[Simulated]) -> Simulated:
    """Over independent public draws: the standard error is that of the draws' means, spread of eta included."""
    pooled = Simulated.of([float(result.mean) for result in results])
    return replace(pooled, repetitions=sum(result.repetitions for result in results))


def _moments(rng: np.random.Generator, place: Place) -> Point:
    rho, second = deepsets.clipped_moments(place["k"], place["alpha"], place["residual_std"], place["clip"])
    along, squared = simulation.embedding_moments(
        rng, place["k"], place["alpha"], place["residual_std"], place["clip"], 1_000_000
    )
    return _point(place, *((rho, along) if place["moment"] == "first" else (second, squared)))


def _clip(setting: LinearSetting, place: Place, mu: float) -> float:
    unit = math.sqrt(setting.k * setting.label_variance)
    rules = {
        "best": lambda: float(deepsets.optimal_clip(setting, place["n"], mu)),
        "normalised": lambda: 0.0,
        "rule of thumb": lambda: deepsets.rule_of_thumb_clip(setting),
        "mild": lambda: 1.5 * unit,
        "none": lambda: math.inf,
    }
    return rules[place["clip"]]()


def _deepsets(rng: np.random.Generator, place: Place) -> Point:
    """Known subspace: exact. At least 200 repetitions, as the errors are skewed and |z| is compared with a quantile."""
    setting, n, mu = _setting(place, subspace_error=0.0), place["n"], _mu(place)
    clip = _clip(setting, place, mu)
    scale = float(deepsets.decoder_scale(setting, n, mu, clip))
    count = max(200, simulation.deepsets_repetitions(n, setting.k))
    result = simulation.dp_deepsets(rng, setting, n, mu, clip=clip, scale=scale, repetitions=count)
    return _point(place, deepsets.risk(setting, n, mu, clip), result)


def _deepsets_tilted(rng: np.random.Generator, place: Place) -> Point:
    """Known, unequal angles, where the formula uses their mean only."""
    sines = np.array(place["squared_sines"])
    setting, n, mu = _setting(place, k=len(sines), subspace_error=float(sines.mean())), place["n"], _mu(place)
    clip = float(deepsets.optimal_clip(setting, n, mu))
    scale = float(deepsets.decoder_scale(setting, n, mu, clip))
    result = simulation.dp_deepsets(rng, setting, n, mu, clip=clip, scale=scale, subspace=sines, repetitions=2000)
    return _point(place, deepsets.risk(setting, n, mu), result)


def _deepsets_bound(rng: np.random.Generator, place: Place) -> Point:
    """The normalised embedding against the bound that has nothing to tune; the scale is the best one."""
    setting, n, mu = _setting(place, subspace_error=0.0), place["n"], _mu(place)
    scale = float(deepsets.decoder_scale(setting, n, mu, 0.0))
    result = simulation.dp_deepsets(rng, setting, n, mu, clip=0.0, scale=scale)
    return _point(place, deepsets.risk_bound(setting, n, mu), result)


def _deepsets_end_to_end(rng: np.random.Generator, place: Place) -> Point:
    """Public tasks, their principal subspace, then the release; tuned by the formula's eta. Six public draws."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    clip = float(deepsets.optimal_clip(setting, n, mu))
    scale = float(deepsets.decoder_scale(setting, n, mu, clip))
    count = max(20, simulation.deepsets_repetitions(n, setting.k) // 6)
    results = []
    for _ in range(6):
        learned = simulation.public_subspace(rng, setting)
        results.append(
            simulation.dp_deepsets(rng, setting, n, mu, clip=clip, scale=scale, subspace=learned, repetitions=count)
        )
    return _point(place, deepsets.risk(setting, n, mu), _average(results))


def _deepsets_gaussian(rng: np.random.Generator, place: Place) -> Point:
    """Gaussian coefficients. The best scale is found on a separate sample: the error is a parabola in the scale."""
    setting, n, mu = _setting(place, subspace_error=0.0), place["n"], _mu(place)
    clip = place["clip_factor"] * math.sqrt(setting.k * setting.label_variance)
    count = int(np.clip(1e7 / (n * setting.k), 500, 4000))
    arguments: dict[str, Any] = {"clip": clip, "tasks": "gaussian", "repetitions": count}
    pilot = simulation.dp_deepsets(rng, setting, n, mu, scale=[0.0, 1.0, 2.0], **arguments)
    at_0, at_1, at_2 = np.asarray(pilot.mean)
    curvature = (at_0 - 2 * at_1 + at_2) / 2
    best = (at_0 - at_1 + curvature) / (2 * curvature)
    result = simulation.dp_deepsets(rng, setting, n, mu, scale=best, **arguments)
    return _point(place, deepsets.gaussian_task_risk(setting, n, mu, clip), result)


def _second_moments(rng: np.random.Generator, place: Place) -> Point:
    """Clip and ridge at the best of a pilot on other data."""
    setting, n, mu = _setting(place, subspace_error=0.0), place["n"], _mu(place)
    k, variance = setting.k, setting.label_variance
    weight = ((k + 1) * setting.tau**2 * variance / (2 * k**2)) ** 0.25
    size = math.sqrt(weight**2 * k * (k + 1) + k * variance + 2 * setting.tau**2)  # root mean square of the embedding
    clips, ridges = size * np.array([0.4, 0.7, 1.0, 1.5, 2.5]), np.array([0, 0.03, 0.1, 0.3, 1, 3, 10, 30])
    count = min(300, simulation.deepsets_repetitions(n, k))
    pilot = simulation.second_moments(rng, setting, n, mu, weight=weight, clip=clips, ridge=ridges, repetitions=count)
    row, column = np.unravel_index(np.argmin(pilot.mean), (len(clips), len(ridges)))
    result = simulation.second_moments(
        rng, setting, n, mu, weight=weight, clip=clips[row], ridge=ridges[column], repetitions=count
    )
    return _point(place, deepsets.second_moment_risk(setting, n, mu), result.at(0, 0))


def _subspace(moments: simulation.Moments, formula: Callable[[LinearSetting], float]) -> Callable[..., Point]:
    def point(rng: np.random.Generator, place: Place) -> Point:
        setting = _setting(place)
        draws = [simulation.public_subspace(rng, setting, moments=moments).error for _ in range(place["draws"])]
        return _point(place, formula(setting), Simulated.of(draws))

    return point


def _dp_gd(rng: np.random.Generator, place: Place) -> Point:
    setting, n, mu = _setting(place), place["n"], _mu(place)
    tuned = rivals.dp_gd(setting, n, mu)
    return _point(place, tuned.risk, _descent(rng, setting, n, mu, tuned))


def _descent(
    rng: np.random.Generator, setting: LinearSetting, n: int, mu: float, tuned: rivals.Tuned, work: float = 3e9
) -> Simulated:
    """DP-GD in R^d at a tuning of the formula, whose clip is that of a residual.

    ``work``: numbers of x to be read in all. At least 8 repetitions: the standard error of fewer says little.
    """
    steps = int(tuned.steps)
    return simulation.dp_gd(
        rng, setting, n, mu, steps=steps, step_size=float(tuned.step_size),
        gradient_clip=float(tuned.clip) * math.sqrt(setting.d),
        repetitions=int(np.clip(work / (n * setting.d * max(steps, 2)), 8, 40)),
    )  # fmt: skip


def _random_tunings(
    rng: np.random.Generator, tuned: rivals.Tuned, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps (1/8 to 2 times), step sizes and residual clips (1/2.8 to 2.8 times) around a tuning."""
    steps = np.clip(np.rint(float(tuned.steps) * 2 ** rng.uniform(-3, 1, count)), 1, 256)
    clips = float(tuned.clip) * 2 ** rng.uniform(-1.5, 1.5, count)
    # with steps * step size * clip, about how far the iterate gets, within a factor 2
    reach = float(tuned.steps * tuned.step_size * tuned.clip) * 2 ** rng.uniform(-1, 1, count)
    return steps, reach / steps / clips, clips


def _dp_gd_untuned(rng: np.random.Generator, place: Place) -> Point:
    """A random tuning of predicted risk at most 1.5 times the best."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    tuned = rivals.dp_gd(setting, n, mu)
    steps, sizes, clips = _random_tunings(rng, tuned, 200)
    risks = rivals.dp_gd_risk(setting, n, mu, steps=steps, step_size=sizes, clip=clips)
    first = int(np.argmax(risks <= 1.5 * tuned.risk))
    drawn = rivals.Tuned(risks[first], steps[first], sizes[first], clips[first])
    return _point(place, risks[first], _descent(rng, setting, n, mu, drawn, work=1.5e9))


def _dp_gd_search(rng: np.random.Generator, place: Place) -> Point:
    """Simulated at the chosen tuning ("formula") against the best of 25 others, found on a pilot, run on other data."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    tuned = rivals.dp_gd(setting, n, mu)
    steps, sizes, clips = _random_tunings(rng, tuned, 25)
    bounds_ = clips * math.sqrt(setting.d)
    arguments = {"steps": steps, "step_size": sizes, "gradient_clip": bounds_}
    pilot = simulation.dp_gd(rng, setting, n, mu, repetitions=12, **arguments)
    best = int(np.argmin(pilot.mean))
    # on the same data: the chosen tuning and the best other one, each with its own noise
    pair = simulation.dp_gd(
        rng, setting, n, mu, steps=[float(tuned.steps), steps[best]], step_size=[float(tuned.step_size), sizes[best]],
        gradient_clip=[float(tuned.clip) * math.sqrt(setting.d), bounds_[best]], repetitions=30,
    )  # fmt: skip
    chosen, other = pair.at(0), pair.at(1)
    error = math.hypot(chosen.standard_error, other.standard_error)  # of the difference, as if the data were not shared
    return Point(place, float(chosen.mean), float(other.mean), error, pair.repetitions)


def _one_step(rng: np.random.Generator, place: Place) -> Point:
    """One step in R^d is DP-DeepSets of dimension d, tuned as such."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    return _point(place, rivals.one_step(setting, n, mu), _one_sum_in_ambient_space(rng, setting, n, mu))


def _one_sum_in_ambient_space(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated:
    tau = math.sqrt(setting.trivial_risk)
    whole = LinearSetting(d=setting.d, k=setting.d, tau=tau, noise_std=setting.noise_std, subspace_error=0.0)
    clip = float(deepsets.optimal_clip(whole, n, mu))
    scale = float(deepsets.decoder_scale(whole, n, mu, clip))
    count = max(20, simulation.deepsets_repetitions(n, setting.d) // 6)
    return simulation.dp_deepsets(rng, whole, n, mu, clip=clip, scale=scale, repetitions=count)


def _projected_dp_gd(rng: np.random.Generator, place: Place) -> Point:
    setting, n, mu = _setting(place, subspace_error=0.0), place["n"], _mu(place)
    tuned = rivals.projected_dp_gd(setting, n, mu)
    count = int(np.clip(1e8 / (n * setting.k * max(int(tuned.steps), 2)), 40, 600))
    result = simulation.projected_dp_gd(
        rng, setting, n, mu, steps=int(tuned.steps), step_size=float(tuned.step_size),
        gradient_clip=float(tuned.clip), repetitions=count,
    )  # fmt: skip
    return _point(place, tuned.risk, result)


def _hybrid(rng: np.random.Generator, place: Place) -> Point:
    """Three public draws."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    tuned = rivals.hybrid(setting, n, mu)
    share, steps = float(tuned.share), int(tuned.steps)
    first = mu * math.sqrt(share)
    clip = float(deepsets.optimal_clip(setting, n, first))
    scale = float(deepsets.decoder_scale(setting, n, first, clip)) if share else 0.0
    count = max(4, simulation.descent_repetitions(n, setting.d, steps) // 2)
    results = [
        simulation.hybrid(
            rng, setting, n, mu, share=share, clip=clip, scale=scale, steps=steps, step_size=float(tuned.step_size),
            gradient_clip=float(tuned.clip) * math.sqrt(setting.d),
            subspace=simulation.public_subspace(rng, setting), repetitions=count,
        )
        for _ in range(3)
    ]  # fmt: skip
    return _point(place, tuned.risk, _average(results))


def _noisy_statistics(rng: np.random.Generator, place: Place) -> Point:
    setting, n, mu = _setting(place), place["n"], _mu(place)
    return _point(place, rivals.noisy_statistics(setting, n, mu), _oracle_statistics(rng, setting, n, mu))


def _oracle_statistics(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated:
    """At the best ridge and share, found on a pilot. Clips: the 99 % point of |x|, and 2.5 standard deviations of y."""
    from scipy.stats import chi

    clip_x = float(chi.ppf(0.99, setting.d))
    bounds_ = {"clip_x": clip_x, "clip_y": 2.5 * math.sqrt(setting.label_variance)}
    count = max(6, simulation.descent_repetitions(n, setting.d, 8))
    best, options = math.inf, (0.5, 1.0)
    for share in (0.3, 0.6, 0.85, 0.95, 0.99):
        noise = math.sqrt(setting.d) * clip_x**2 / (mu * math.sqrt(share))  # about half the noise matrix' norm
        ridges = np.concatenate([np.geomspace(0.05, 1e4, 50) * noise, np.geomspace(1e-3, 1, 10) * n])
        pilot = simulation.noisy_statistics(
            rng, setting, n, mu, share=share, ridge=ridges, repetitions=max(4, count // 4), **bounds_
        )
        means = np.asarray(pilot.mean)
        index = int(means.argmin())
        if means[index] < best:
            best, options = float(means[index]), (share, float(ridges[index]))
    return simulation.noisy_statistics(
        rng, setting, n, mu, share=options[0], ridge=options[1], repetitions=count, **bounds_
    )


def _ols(rng: np.random.Generator, place: Place) -> Point:
    setting, n = _setting(place), place["n"]
    return _point(place, rivals.ols(setting, n), simulation.ols(rng, setting, n, repetitions=place["repetitions"]))


def _bayes_ridge(rng: np.random.Generator, place: Place) -> Point:
    setting, n = _setting(place), place["n"]
    penalty = setting.d * setting.noise_std**2 / setting.trivial_risk
    result = simulation.ridge(rng, setting, n, penalty=penalty, repetitions=place["repetitions"])
    return _point(place, rivals.bayes_ridge(setting, n), result)


def _crossover(rng: np.random.Generator, place: Place) -> Point:
    """DP-DeepSets over DP-GD, simulated where the formulas say that they are equal (ratio 1)."""
    setting, mu = _setting(place), _mu(place)
    n = round(float(bounds.crossover(setting, mu)))
    ours = _deepsets_end_to_end(rng, {**place, "n": n})
    theirs = _descent(rng, setting, n, mu, rivals.dp_gd(setting, n, mu))
    other = theirs.at()
    ratio = ours.simulated / other.mean
    error = ratio * math.hypot(ours.standard_error / ours.simulated, other.standard_error / other.mean)
    return Point({**place, "n": n}, 1.0, float(ratio), float(error), other.repetitions)


def _lower_bound(rng: np.random.Generator, place: Place) -> Point:
    """A learner without public data against what none can beat."""
    setting, n, mu = _setting(place), place["n"], _mu(place)
    learners: dict[str, Callable[[], Simulated]] = {
        "DP-GD": lambda: _descent(rng, setting, n, mu, rivals.dp_gd(setting, n, mu), work=3e8),
        "one step": lambda: _one_sum_in_ambient_space(rng, setting, n, mu),
        "noisy statistics": lambda: _oracle_statistics(rng, setting, n, mu),
    }
    return _point(place, bounds.lower_bound(setting, n, mu), learners[place["learner"]]())


# ---- the grids ------------------------------------------------------------


def _grid(**axes: Sequence[Any]) -> tuple[Place, ...]:
    """All combinations, the last axis fastest."""
    return tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _rows(names: str, *rows: tuple[Any, ...]) -> tuple[Place, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


def _crossed(first: tuple[Place, ...], second: tuple[Place, ...]) -> tuple[Place, ...]:
    return tuple({**one, **other} for one in first for other in second)


_EPSILONS = (0.25, 0.5, 1, 2, 4, 8)
_EXACT, _ABOUT = Tolerance(1, 1, z=4), Tolerance(0.8, 1.2, z=3)
_PUBLIC = "d k num_public_tasks examples_per_task"

COMPARISONS = (
    Comparison(
        "clipped_moments", "Moments of one clipped embedding", _EXACT,
        _crossed(
            _rows(
                "k alpha residual_std clip",
                (1, 1.0, 0.5, 0.7), (2, 1.0, 0.5, 1.0), (3, 1.0, 0.5, 0.0), (5, 1.0, 0.5, 1.0),
                (10, 1.0, 0.5, 2.0), (5, 0.8, 0.9, 2.5), (3, 0.3, 1.0, 0.5), (10, 1.0, 1.0, 8.0),
            ),
            _grid(moment=("first", "second")),
        ),
        _moments, quick=4,
    ),
    Comparison(
        "deepsets_known_subspace", "DP-DeepSets, known subspace", _EXACT,
        _grid(k=(3, 10), n=(100, 300, 1000, 3000, 10_000, 20_000), epsilon=_EPSILONS,
              clip=("best", "normalised", "mild")),
        _deepsets, quick=12,
    ),
    Comparison(
        "deepsets_without_privacy", "Non-private hypernetwork, known subspace", _EXACT,
        _grid(k=(1, 3, 10), n=(30, 300, 3000), epsilon=(None,), clip=("best", "none")),
        _deepsets, quick=6,
    ),
    Comparison(
        "deepsets_unequal_angles", "DP-DeepSets, unequal principal angles", Tolerance(0.9, 1.05, z=3),
        _rows(
            "squared_sines off_subspace_energy n epsilon",
            ((0.0, 0.0, 0.3), 0.0, 300, 1), ((0.0, 0.1, 0.5), 0.0, 1000, 2), ((0.9, 0.0, 0.0), 0.2, 1000, 8),
            ((0.1, 0.2, 0.3, 0.4, 0.5), 0.0, 1000, 1), ((0.0, 0.0, 0.05, 0.1, 0.6), 0.5, 3000, 4),
        ),
        _deepsets_tilted, quick=2,
    ),
    Comparison(
        "deepsets_bound", "Bound on untuned DP-DeepSets (upper bound)", Tolerance(1, math.inf, z=4),
        _grid(k=(3, 5, 10), n=(30, 100, 1000, 10_000), epsilon=(0.25, 1, 8)),
        _deepsets_bound, quick=6,
    ),
    Comparison(
        "deepsets_end_to_end", "DP-DeepSets, subspace from public data", _ABOUT,
        _crossed(
            _rows(
                _PUBLIC + " off_subspace_energy",
                (200, 5, 2000, 50, 0.0), (200, 5, 2000, 50, 0.1), (1000, 5, 3000, 20, 0.05), (50, 3, 300, 20, 0.0),
                (1000, 10, 2000, 100, 0.0), (200, 10, 1000, 100, 0.0), (200, 5, 3000, 10, 0.0), (50, 3, 3000, 50, 0.1),
            ),
            _grid(n=(300, 1000, 3000, 10_000), epsilon=(0.5, 2, 8)),
        ),
        _deepsets_end_to_end, quick=4,
    ),
    Comparison(
        "deepsets_gaussian_tasks", "DP-DeepSets, Gaussian tasks", _EXACT,
        _grid(k=(3, 10), n=(300, 2000), epsilon=(1, 4), clip_factor=(0.8, 2.0, 7.0)),
        _deepsets_gaussian, quick=3,
    ),
    Comparison(
        "second_moments", "Second-moment embedding (leading terms only)", Tolerance(0.2, 1.1, z=3),
        _grid(k=(3, 10), n=(300, 1000, 5000, 20_000), epsilon=(0.5, 2, 8)),
        _second_moments, quick=2,
    ),
    Comparison(
        "subspace_error", "Subspace error, self-normalised moments", Tolerance(0.9, 1.1, z=3),
        _crossed(
            _rows(
                _PUBLIC,
                (50, 3, 300, 20), (50, 3, 1000, 10), (50, 3, 3000, 100), (50, 5, 1000, 50), (50, 10, 3000, 20),
                (200, 3, 300, 50), (200, 5, 2000, 50), (200, 5, 2000, 10), (200, 5, 3000, 5), (200, 10, 1000, 100),
                (200, 10, 3000, 20), (200, 5, 300, 100), (1000, 3, 1000, 20), (1000, 5, 3000, 20),
                (1000, 10, 2000, 100), (1000, 5, 300, 20),
            ),
            _grid(draws=(8,)),
        ) + _rows(
            _PUBLIC + " off_subspace_energy draws",
            (200, 5, 2000, 50, 0.1, 8), (200, 5, 2000, 50, 0.5, 8), (50, 3, 1000, 20, 0.3, 16),
        ),
        _subspace("self-normalised", subspace.subspace_error), quick=4,
    ),
    Comparison(
        "subspace_below_threshold", "Subspace error where public data teach nothing", Tolerance(0.9, 1.2, z=3),
        _rows(_PUBLIC + " draws", (200, 5, 50, 10, 20), (200, 5, 300, 2, 20), (1000, 10, 100, 10, 10),
              (1000, 5, 1000, 2, 4)),
        _subspace("self-normalised", subspace.subspace_error), quick=2,
    ),
    Comparison(
        "subspace_error_plain", "Subspace error, plain moments (first order)", _ABOUT,
        _rows(_PUBLIC + " draws", (200, 5, 2000, 50, 8), (1000, 5, 10_000, 50, 3), (200, 5, 3000, 20, 8),
              (200, 10, 3000, 100, 8), (50, 3, 3000, 10, 16), (50, 3, 3000, 50, 16)),
        _subspace("plain", subspace.plain_subspace_error), quick=2,
    ),
    Comparison(
        "dp_gd", "DP-GD in R^d, best tuning", _ABOUT,
        _grid(d=(50, 200, 1000), n=(300, 2000, 20_000), epsilon=(0.5, 2, 8))
        + _grid(d=(200,), noise_std=(1.0,), n=(1000, 5000), epsilon=(0.5, 2))
        + _grid(d=(200,), off_subspace_energy=(0.1,), n=(1000, 8000), epsilon=(1, 4)),
        _dp_gd, quick=5,
    ),
    Comparison(
        "dp_gd_untuned", "DP-GD in R^d, random tunings of risk up to 1.5 times the best", _ABOUT,
        _crossed(
            _rows("d n epsilon", (50, 1000, 1), (200, 1000, 1), (200, 3000, 2), (200, 10_000, 0.5), (200, 10_000, 8)),
            _grid(tuning=tuple(range(12))),
        ),
        _dp_gd_untuned, quick=2,
    ),
    Comparison(
        "dp_gd_search", "DP-GD at its tuning, over the best of 25 random others", Tolerance(0, 1.1, z=3),
        _rows("d n epsilon", (200, 3000, 1), (200, 10_000, 2), (50, 1000, 1), (50, 1000, 8), (200, 1000, 8)),
        _dp_gd_search, quick=0,
    ),
    Comparison(
        "one_step", "One step of DP-GD in R^d", _ABOUT,
        _grid(d=(50, 200), n=(300, 2000, 20_000), epsilon=(0.5, 2, 8)),
        _one_step, quick=2,
    ),
    Comparison(
        "noisy_statistics", "Noisy sufficient statistics, oracle ridge", _ABOUT,
        _grid(d=(50, 200, 1000), n=(1000, 5000, 20_000), epsilon=(1, 8)),
        _noisy_statistics, quick=2,
    ),
    Comparison(
        "projected_dp_gd", "DP-GD inside the subspace, best tuning", _ABOUT,
        _grid(k=(3, 10), n=(300, 1000, 5000, 20_000), epsilon=(0.5, 2, 8)),
        _projected_dp_gd, quick=4,
    ),
    Comparison(
        "hybrid", "Hybrid, misspecified tasks", _ABOUT,
        _grid(off_subspace_energy=(0.1,), epsilon=(1, 4), n=(500, 1000, 2500, 8000, 30_000)),
        _hybrid, quick=2,
    ),
    Comparison(
        "ols", "Least squares", _EXACT,
        _rows("d k n repetitions", (20, 2, 60, 400), (50, 3, 300, 300), (200, 5, 1000, 40), (200, 5, 3000, 20)),
        _ols, quick=2,
    ),
    Comparison(
        "bayes_ridge", "Ridge regression at the best penalty", Tolerance(0.95, 1.05, z=3),
        _rows("d k n repetitions", (50, 3, 100, 300), (50, 3, 300, 300), (200, 5, 300, 100), (1000, 5, 1000, 4),
              (200, 5, 1000, 60), (200, 5, 3000, 20)),
        _bayes_ridge, quick=2,
    ),
    Comparison(
        "crossover", "DP-DeepSets over DP-GD at the predicted crossover", _ABOUT,
        _rows("off_subspace_energy noise_std epsilon", (0.1, 0.5, 1), (0.1, 0.5, 4), (0.02, 0.5, 2), (0.3, 0.5, 1),
              (0.0, 0.5, 2), (0.02, 1.0, 1)),
        _crossover, quick=1,
    ),
    Comparison(
        "lower_bound", "Learners without public data against the lower bound", Tolerance(0, 1, z=4),
        _grid(learner=("DP-GD", "one step", "noisy statistics"), d=(50, 200), n=(100, 300, 1000, 3000, 10_000, 20_000),
              epsilon=_EPSILONS),
        _lower_bound, quick=12,
    ),
)  # fmt: skip


def comparison(name: str) -> Comparison:
    """The comparison of this name; InputError if there is none."""
    for one in COMPARISONS:
        if one.name == name:
            return one
    raise InputError(f"no comparison is called {name!r}: choose from {', '.join(one.name for one in COMPARISONS)}")


# ---- files ------------------------------------------------------------


def save(
    folder: str | Path, one: Comparison, points: Sequence[Point], quick: bool, cpu_seconds: float, origin: dict
) -> Path:
    """Write ``folder/<name>.json``: tolerance, summary, points and provenance. Six digits; infinity is null."""
    content = {
        "comparison": one.name,
        "title": one.title,
        "tolerance": {key: _plain(value) for key, value in vars(one.tolerance).items()},
        "quick": quick,
        "summary": {key: _plain(value) for key, value in summary(points, one.tolerance).items()},
        "points": [
            {
                "place": dict(point.place),
                **{key: _plain(value) for key, value in vars(point).items() if key != "place"},
                "ratio": _plain(point.ratio),
                "z": _plain(point.z),
                "inside": one.tolerance.accepts(point),
            }
            for point in points
        ],
        "cpu_seconds": round(cpu_seconds, 1),
        "provenance": origin,
    }
    path = Path(folder) / f"{one.name}.json"
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def load(folder: str | Path = FOLDER) -> dict[str, dict]:
    """The files of a folder by comparison, in the order of `COMPARISONS`; those not yet run are missing."""
    found = {}
    for one in COMPARISONS:
        path = Path(folder) / f"{one.name}.json"
        if path.exists():
            found[one.name] = _content(path)
    if not found:
        raise InputError(f"no comparisons in {folder}: make them with `python -m hyperdp_lib.theory.agreement`.")
    return found


def table(folder: str | Path = FOLDER) -> pd.DataFrame:
    """One row for each comparison that was run: title, accepted ratios, and its `summary`.

    ``max_abs_z`` is kept for exact statements only: elsewhere it grows with the repetitions and means nothing.
    """
    import pandas as pd

    rows = []
    for content in load(folder).values():
        limits = content["tolerance"]
        row = {"title": content["title"], "tolerance": _words(limits), **content["summary"]}
        if limits["low"] != limits["high"]:
            row["max_abs_z"] = math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def _words(limits: Mapping[str, Any]) -> str:
    """A tolerance as the table prints it.

    >>> _words({"low": 1, "high": 1, "z": 4}), _words({"low": 0, "high": 1, "z": 4})
    ('|z| < 4', 'at most 1')
    >>> _words({"low": 1, "high": None, "z": 4}), _words({"low": 0.8, "high": 1.2, "z": 3})
    ('at least 1', '0.8 to 1.2')
    """
    low, high = limits["low"], limits["high"]
    if low == high:
        return f"|z| < {limits['z']:g}"
    if high is None:
        return f"at least {low:g}"
    return f"at most {high:g}" if low == 0 else f"{low:g} to {high:g}"


def _content(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run its command again.") from error


def _is_done(folder: str | Path, one: Comparison, quick: bool) -> bool:
    """Whether the file is there with this tolerance and all the places now asked for: a full run covers a quick one."""
    path = Path(folder) / f"{one.name}.json"
    if not path.exists():
        return False
    content = _content(path)
    limits = {key: _plain(value) for key, value in vars(one.tolerance).items()}
    there = [point["place"] for point in content["points"]]
    wanted = [json.loads(json.dumps(dict(one.grid[i]))) for i in one.places(quick)]
    return content["tolerance"] == limits and all(
        any(all(known.get(key) == value for key, value in place.items()) for known in there) for place in wanted
    )


def _plain(value: float) -> float | int | None:
    if isinstance(value, (int, np.integer)):
        return int(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _lines(contents: Mapping[str, dict]) -> Iterator[str]:
    yield "comparison                 points ratio: median   least  largest  max |z|  outside"
    for name, content in contents.items():
        s, limits = content["summary"], content["tolerance"]
        z = f"{s['max_abs_z']:.1f}" if limits["low"] == limits["high"] else "-"
        yield (
            f"{name:26} {s['points']:6} {s['median_ratio']:13.4f} {s['min_ratio']:7.3f} {s['max_ratio']:8.3f} "
            f"{z:>8} {s['outside']:8}"
        )


def main(arguments: list[str] | None = None) -> int:
    """0 if all comparisons are within their tolerances, 1 if one is not."""
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.theory.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--object", action="append", metavar="NAME", help="run this comparison only (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="a few places of each grid: about a minute")
    parser.add_argument("--again", action="store_true", help="also run what is there already")
    parser.add_argument("--out", default=FOLDER, help="folder of the JSON files (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    try:
        wanted = [comparison(name) for name in chosen.object] if chosen.object else list(COMPARISONS)
    except InputError as error:
        parser.error(str(error))
    wanted = [one for one in wanted if one.places(chosen.quick)]
    missing = [one for one in wanted if chosen.again or not _is_done(chosen.out, one, chosen.quick)]
    if missing:
        require_commit(chosen.out)
    with progress_bar(total=sum(len(one.places(chosen.quick)) for one in missing), unit="point") as bar:
        for one in missing:
            bar.set_description(one.name)
            started, clock = datetime.now(UTC), time.process_time()
            points = one.run(chosen.quick, step=bar.update)
            origin = provenance(f"python -m hyperdp_lib.theory.agreement --object {one.name}", started=started)
            save(chosen.out, one, points, chosen.quick, time.process_time() - clock, origin)
    contents = {name: content for name, content in load(chosen.out).items() if name in {one.name for one in wanted}}
    print("\n".join(_lines(contents)))
    failed = [name for name, content in contents.items() if content["summary"]["outside"]]
    if failed:
        print(f"outside the tolerance: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
