"""Simulated points for the figures: each procedure at the tuning that the formulas recommend, run on random data.

This is the one place where a formula's tuning meets a simulator; the risks that come back are the simulator's alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.stats import chi2

from hyperdp_lib.pages.theory_figures import Dots
from hyperdp_lib.theory import deepsets, rivals, simulation
from hyperdp_lib.theory.setting import LinearSetting
from hyperdp_lib.theory.simulation import LearnedSubspace, Simulated

MOST_WORK = 6e8  # multiplications of one repetition; a dot that takes more is left out
_DESCENT_REPETITIONS = (8, 40)  # at least, at most


def simulate(
    method: str, rng: np.random.Generator, setting: LinearSetting, num_private: float, mu: float
) -> Simulated | None:
    """A method's simulated risk at its best tuning by the formulas; ``None`` if that takes too long.

    Unless ``setting.subspace_error`` is given, methods that use the public subspace get it from one simulated draw of
    all public tasks.

    Parameters
    ----------
    method : a key of `verdicts.LABELS`, or "second_moments".
    num_private : rounded to a whole number.

    Examples
    --------
    >>> dot = simulate("dp_deepsets", np.random.default_rng(0), LinearSetting(d=20, k=2), 200, 1.0)
    >>> bool(abs(dot.mean - deepsets.risk(LinearSetting(d=20, k=2), 200, 1.0)) < 0.02)
    True
    """
    n = round(num_private)
    if n * max(setting.d, 60 * setting.k) > 0.1 * MOST_WORK:
        return None
    return _RUNS[method](rng, setting, n, mu)


def dots(
    points: Mapping[str, Iterable[tuple[float, float, float]]],
    setting: LinearSetting,
    seed: int | np.random.SeedSequence,
) -> dict[str, Dots]:
    """Simulated points for a figure; every point has random numbers of its own.

    Parameters
    ----------
    points : by method, triples of the place on the x axis, n and mu.

    >>> drawn = dots({"dp_deepsets": [(1.0, 100, 0.5), (2.0, 100, 1.0)]}, LinearSetting(d=10, k=2), seed=0)
    >>> drawn["dp_deepsets"].x
    [1.0, 2.0]
    """
    tasks = [(method, *point) for method, places in points.items() for point in places]
    streams = simulation.streams(seed, len(tasks))
    found: dict[str, list[tuple[float, Simulated]]] = {method: [] for method in points}
    for (method, x, n, mu), rng in zip(tasks, streams, strict=True):
        result = simulate(method, rng, setting, n, mu)
        if result is not None:
            found[method].append((x, result))
    return {method: _as_dots(pairs) for method, pairs in found.items() if pairs}


def _as_dots(pairs: Sequence[tuple[float, Simulated]]) -> Dots:
    return Dots(
        [x for x, _ in pairs],
        [float(result.mean) for _, result in pairs],
        [float(result.standard_error) for _, result in pairs],
    )


def clip_dots(
    setting: LinearSetting, num_private: int, mu: float, ratios: Sequence[float], seed: int | np.random.SeedSequence
) -> Dots:
    """Simulated risks of DP-DeepSets at given clip norms, in units of sqrt(k) sigma_y."""
    pairs = []
    for ratio, rng in zip(ratios, simulation.streams(seed, len(ratios)), strict=True):
        clip = ratio * math.sqrt(setting.k * setting.label_variance)
        pairs.append((ratio, _dp_deepsets(rng, setting, num_private, mu, clip)))
    return _as_dots(pairs)


def subspace_dots(
    setting: LinearSetting, tasks: Sequence[float], seed: int | np.random.SeedSequence, *, repetitions: int = 6
) -> Dots:
    """Simulated errors of the learned subspace for several numbers of public tasks.

    >>> subspace_dots(LinearSetting(d=20, k=2), [500], seed=0).mean[0] < 0.02
    True
    """
    pairs = []
    for count, rng in zip(tasks, simulation.streams(seed, len(tasks)), strict=True):
        world = dataclasses.replace(setting, num_public_tasks=round(count))
        drawn = [simulation.public_subspace(rng, world).error for _ in range(repetitions)]
        pairs.append((float(round(count)), Simulated.of(drawn)))
    return _as_dots(pairs)


def repetitions_used(num_private: float, setting: LinearSetting) -> str:
    """For a caption: repetitions of a dot of one noisy sum, and of gradient descent."""
    ours = simulation.deepsets_repetitions(num_private, setting.k)
    return f"{ours} repetitions for one noisy sum, {_DESCENT_REPETITIONS[0]} to {_DESCENT_REPETITIONS[1]} for descent"


def public_subspace(rng: np.random.Generator, setting: LinearSetting) -> LearnedSubspace | float:
    """What a learner knows: from simulated public tasks, or angles as the setting says."""
    return simulation.public_subspace(rng, setting) if setting.subspace_error is None else setting.subspace_error


def _dp_deepsets(
    rng: np.random.Generator, setting: LinearSetting, n: int, mu: float, clip: float | None = None
) -> Simulated:
    if clip is None:
        clip = float(deepsets.optimal_clip(setting, n, mu))
    scale = float(deepsets.decoder_scale(setting, n, mu, clip))
    return simulation.dp_deepsets(rng, setting, n, mu, clip=clip, scale=scale, subspace=public_subspace(rng, setting))


def _projected_dp_gd(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated:
    tuned = rivals.projected_dp_gd(setting, n, mu)
    if int(tuned.steps) <= 1:  # one noisy sum, perhaps normalised
        return _dp_deepsets(rng, setting, n, mu)
    repetitions = simulation.deepsets_repetitions(n * int(tuned.steps) / 4, setting.k)
    return simulation.projected_dp_gd(
        rng, setting, n, mu, steps=tuned.steps, step_size=tuned.step_size, gradient_clip=tuned.clip,
        repetitions=min(repetitions, 200), subspace=public_subspace(rng, setting),
    )  # fmt: skip


def _dp_gd(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated | None:
    tuned = rivals.dp_gd(setting, n, mu)
    repetitions = _descent_repetitions(n, setting.d, int(tuned.steps))
    if repetitions is None:
        return None
    clip = tuned.clip * math.sqrt(setting.d)  # of a gradient, from that of a residual
    return simulation.dp_gd(rng, setting, n, mu, steps=tuned.steps, step_size=tuned.step_size, gradient_clip=clip,
                            repetitions=repetitions)  # fmt: skip


def _hybrid(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated | None:
    tuned = rivals.hybrid(setting, n, mu)
    share = float(tuned.share)
    if share == 1 or int(tuned.steps) == 0:
        return _dp_deepsets(rng, setting, n, mu)
    if share == 0:
        return _dp_gd(rng, setting, n, mu)
    repetitions = _descent_repetitions(n, setting.d, int(tuned.steps))
    known = public_subspace(rng, setting)
    if repetitions is None or isinstance(known, float) and known > 0:
        return None  # angles alone do not say where the rest of the task lies
    if not isinstance(known, LearnedSubspace):
        basis = simulation.random_basis(rng, setting.d, setting.k)
        known = LearnedSubspace(basis, basis)
    clip = float(deepsets.optimal_clip(setting, n, mu * share**0.5))
    return simulation.hybrid(
        rng, setting, n, mu, share=share, clip=clip,
        scale=float(deepsets.decoder_scale(setting, n, mu * share**0.5, clip)),
        steps=int(tuned.steps), step_size=float(tuned.step_size),
        gradient_clip=float(tuned.clip) * math.sqrt(setting.d), subspace=known, repetitions=repetitions,
    )  # fmt: skip


def _noisy_statistics(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated:
    """The oracle: the best of a grid of shares and ridges, by the simulated risk itself."""
    clips = {"clip_x": float(chi2.ppf(0.99, setting.d)) ** 0.5, "clip_y": 2.5 * setting.label_variance**0.5}
    ridges = n * np.geomspace(0.03, 3e4, 40)
    runs = [
        simulation.noisy_statistics(rng, setting, n, mu, share=share, ridge=ridges, repetitions=6, **clips)
        for share in (0.3, 0.6, 0.9)
    ]
    return min((_best(run) for run in runs), key=lambda run: float(run.mean))


def _second_moments(rng: np.random.Generator, setting: LinearSetting, n: int, mu: float) -> Simulated:
    """The best of a grid of joint clips and ridges."""
    k, variance = setting.k, setting.label_variance
    weight = ((k + 1) * setting.tau**2 * variance / (2 * k**2)) ** 0.25
    norm = math.sqrt(weight**2 * k * (k + 1) + k * variance)  # of a typical embedding
    run = simulation.second_moments(
        rng, setting, n, mu, weight=weight, clip=norm * np.array([0.5, 0.8, 1.2, 1.8, 3.0]),
        ridge=np.array([0.0, 0.02, 0.1, 0.3, 1.0, 3.0, 10.0]),
        repetitions=min(simulation.deepsets_repetitions(n, k), 300), subspace=public_subspace(rng, setting),
    )  # fmt: skip
    return _best(run)


def _best(run: Simulated) -> Simulated:
    """The tuning of the smallest mean."""
    mean, error, spread = (np.asarray(v) for v in (run.mean, run.standard_error, run.standard_deviation))
    at = np.unravel_index(mean.argmin(), mean.shape)
    return Simulated(float(mean[at]), float(error[at]), float(spread[at]), run.repetitions)


def _descent_repetitions(n: int, d: int, steps: int) -> int | None:
    if n * d * max(steps, 2) > MOST_WORK:
        return None
    low, high = _DESCENT_REPETITIONS
    return min(max(simulation.descent_repetitions(n, d, steps), low), high)


_RUNS = {
    "dp_deepsets": _dp_deepsets,
    "projected_dp_gd": _projected_dp_gd,
    "dp_gd": _dp_gd,
    "hybrid": _hybrid,
    "noisy_statistics": _noisy_statistics,
    "second_moments": _second_moments,
}
