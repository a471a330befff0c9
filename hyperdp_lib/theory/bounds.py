r"""Where each side must win: what nobody without public data can beat, when DP-DeepSets provably does, where it loses.

All statements are about the zero-out relation and mu-GDP. See the chapter for the proofs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import deepsets, rivals
from hyperdp_lib.theory.setting import Array, LinearSetting, check_sizes

MOST = 1e8  # private examples; a crossover above is reported as infinite


def lower_bound(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    r"""No mu-GDP learner without public data has a smaller risk, however tuned, with however many steps.

    ``q L / (q + L)``, ``q = tau^2 + gamma^2``, ``L = max((d - 1) s^2 / n, ((d - 1) s / n)^2 / (exp(4 mu^2) - 1))``, for
    theta uniform on a sphere of R^d, which is what one who does not know the subspace faces.

    >>> from hyperdp_lib.theory.setting import gdp_mu
    >>> lower_bound(LinearSetting(), 1000, gdp_mu([0.25, 1.0], 1e-5)).round(3)
    array([0.302, 0.047])
    """
    n, mu = check_sizes(num_private, mu)
    score = (setting.d - 1) * setting.noise_std / n
    with np.errstate(over="ignore", divide="ignore"):
        private = score**2 / np.expm1(4 * mu**2)
    noise = np.maximum((setting.d - 1) * setting.noise_std**2 / n, private)
    return setting.trivial_risk / (1 + setting.trivial_risk / noise)


def certified(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """Whether the proven bound on untuned DP-DeepSets lies below what any learner without public data can reach."""
    return deepsets.risk_bound(setting, num_private, mu) < lower_bound(setting, num_private, mu)


def corollary_holds(setting: LinearSetting, mu: ArrayLike) -> np.ndarray:
    """Whether `certified` holds for **every** n: exact subspace, no misspecification, mu <= 1/2, d large enough.

    >>> corollary_holds(LinearSetting(d=200, k=5, subspace_error=0.0), [0.25, 0.6])
    array([ True, False])
    """
    d, k, s, sigma = setting.d, setting.k, setting.noise_std, setting.label_variance**0.5
    enough = d - 1 >= np.pi * (k + 2) * (sigma / s) ** 2 and d - 1 >= 4.65 * (k * (k + 2)) ** 0.5 * sigma / s
    return (np.asarray(mu, float) <= 0.5) & (setting.floor == 0) & enough


def crossover(setting: LinearSetting, mu: ArrayLike, *, tolerance: float = 0.01) -> Array:
    """n*: the number of private examples above which tuned DP gradient descent in R^d has the smaller risk.

    Bisection in log n up to ``MOST`` between the last point of a coarse grid at which DP-DeepSets wins and the next.
    Infinity where it wins up to the end, 0 where it never does. The shape of ``mu``; relative ``tolerance``.
    """
    mu = np.asarray(mu, float)
    if not (mu > 0).all():
        raise InputError("a crossover needs mu above 0: with no privacy budget nobody learns anything")

    def loses(n: Array, mu: Array) -> np.ndarray:
        return rivals.dp_gd(setting, n, mu).risk <= deepsets.risk(setting, n, mu)

    grid = np.geomspace(2, MOST, 12)
    flat = mu.ravel()
    wins = ~loses(grid[None], flat[:, None])
    last = np.where(wins.any(1), len(grid) - 1 - wins[:, ::-1].argmax(1), -1)
    result = np.where(last < 0, 0.0, np.inf)
    open_ = (last >= 0) & (last < len(grid) - 1)
    if open_.any():
        low, high = np.log(grid[last[open_]]), np.log(grid[last[open_] + 1])
        while (high - low).max() > tolerance:
            middle = (low + high) / 2
            lost = loses(np.exp(middle), flat[open_])
            low, high = np.where(lost, low, middle), np.where(lost, middle, high)
        result[open_] = np.exp((low + high) / 2)
    return result.reshape(mu.shape)


def crossover_closed_form(setting: LinearSetting, mu: ArrayLike) -> Array:
    r"""n* from the leading terms of both risks; approximate (see `agreement`).

    The positive root of ``b n^2 - A n - B = 0``, where ``b`` is the floor of DP-DeepSets, ``A`` the difference of the
    sampling terms and ``B`` of the privacy terms. Without a floor it is finite only if DP-GD samples better.
    """
    mu = np.asarray(mu, float)
    d, k, s2, floor = setting.d, setting.k, setting.noise_std**2, setting.floor
    constant = rivals.small_step_constant(setting.noise_std, setting.tau, 0.1)
    a = 1.3 * d * s2 - 0.8 * (k * setting.label_variance + setting.tau**2)
    with np.errstate(divide="ignore"):
        b = (constant * d**2 - np.pi / 2 * k**2 * setting.label_variance) / mu**2
    if floor:
        return np.maximum(0.0, (a + np.sqrt(np.maximum(a**2 + 4 * floor * b, 0.0))) / (2 * floor))
    return np.full_like(mu, np.inf) if a >= 0 else np.maximum(0.0, b) / -a
