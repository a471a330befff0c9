"""(epsilon, delta) <-> noise multiplier of DP-SGD with Poisson batches, by two independent numerical accountants.

Equation (1) and the slack of the integer noise are those of `hyperdp_lib.accounting`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from hyperdp_lib import accounting

MIN_DP_SGD_DELTA = 1e-12
"""Least delta of DP-SGD: below about 1e-13 one accountant here states too little, the other fails."""
DP_SGD_RESERVE = 0.01
"""Share of delta that DP-SGD keeps for the end of its floating-point noise; see `baselines.dp_sgd`."""


def dp_sgd_epsilon(
    noise_multiplier: float, delta: float, sample_rate: float, steps: int,
    neighboring_relation: str = "add_or_remove_one", eps_error: float = 0.01,
) -> float:  # fmt: skip
    """Epsilon of DP-SGD with Poisson sampling: the larger of two independent numerical upper bounds.

    Opacus' PRV accountant (Gopi, Lee & Wutschitz 2021; its error bound ``eps_error`` is included) follows the
    removal of an example, dp-accounting's PLD accountant (Doroshenko et al. 2022) removal and addition. At
    ``sample_rate`` 1 nothing is sampled and (1) with ``mu = sqrt(steps) / noise_multiplier`` is used.

    With sampling, ``delta`` is 1e-12 or more (`kept` of it will do): below, the accountants fail.

    *What is rigorous.* The ideal mechanism: DP-SGD's noise is floating point. ``add_or_remove_one`` and
    ``zero_out`` share the dominating pair ``N(0)``, ``(1 - q) N(0) + q N(C)``, hence epsilon. ``replace_one``
    is refused: no dominating pair is proven for it here.
    """
    accounting.check_delta(delta)
    if neighboring_relation not in ("add_or_remove_one", "zero_out"):
        raise ValueError("DP-SGD has a proven epsilon for add_or_remove_one and zero_out only")
    if not 0 < sample_rate <= 1 or steps < 1 or not 0 <= noise_multiplier < math.inf:
        raise ValueError("need 0 < sample_rate <= 1, steps >= 1 and a finite noise_multiplier >= 0")
    if sample_rate < 1:
        _check_dp_sgd_delta(delta)
    if noise_multiplier < 0.02:  # nothing worth stating, and too wide for the accountants
        return math.inf
    if sample_rate == 1:
        mu = steps**0.5 / noise_multiplier
        return accounting.smallest(lambda value: accounting.gaussian_delta(mu, value) <= delta)
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the width of the accountant's domain: too wide is safe
        prv_epsilon = float(prv.get_epsilon(delta, eps_error=eps_error))
    return max(prv_epsilon, pld_epsilon([(noise_multiplier, sample_rate, steps)], delta))


def dp_sgd_noise_multiplier(
    epsilon: float, delta: float, sample_rate: float, steps: int,
    neighboring_relation: str = "add_or_remove_one",
) -> float:  # fmt: skip
    """The multiplier that makes DP-SGD (epsilon, delta)-DP by :func:`dp_sgd_epsilon`, rounded up by 0.2 %.

    What the run costs by the PLD accountant lies at most 1.5 % below epsilon, for epsilon from 0.01 and delta from
    1e-12 on, so that no rival is handicapped. (PRV's error bound, below 1 % and below 0.01, and the rounding.)
    """
    accounting.check_budget(epsilon, delta)
    if sample_rate < 1:
        _check_dp_sgd_delta(delta)
    if math.isinf(epsilon):
        return 0.0
    known = (delta, sample_rate, steps, neighboring_relation, min(0.01, 0.01 * epsilon))
    result = accounting.smallest(lambda m: pld_epsilon([(m, sample_rate, steps)], delta) <= epsilon, tolerance=1e-4)
    while dp_sgd_epsilon(result, *known) > epsilon:
        result *= 1.002
    return result


def pld_epsilon(parts: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of several ``(noise_multiplier, sample_rate, steps)`` by dp-accounting; slack included.

    ``delta`` is 1e-12 or more (`kept` of it will do): below about 1e-13 dp-accounting states too little.
    """
    import dp_accounting

    _check_dp_sgd_delta(delta)
    if min(m for m, _, _ in parts) < 0.02:
        return math.inf
    accountant = dp_accounting.pld.PLDAccountant()
    xi = log_c = 0.0
    for m, rate, steps in parts:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(m)), steps)
        slack = accounting.discretisation_slack(m) if rate == 1 else (0.0, 0.0)
        xi, log_c = xi + steps * slack[0], log_c + steps * slack[1]
    return xi + float(accountant.get_epsilon(delta * math.exp(-log_c) * (1 - 1e-9)))  # 1e-9 covers the tails


def kept(delta: float) -> float:
    """What DP-SGD is calibrated for, and charged at, of a ``delta``: all but `DP_SGD_RESERVE` of it.

    >>> kept(1e-5)
    9.9e-06
    """
    return (1 - DP_SGD_RESERVE) * delta


def _check_dp_sgd_delta(delta: float) -> None:
    if not 0.98 * MIN_DP_SGD_DELTA <= delta < 1:
        raise ValueError(f"DP-SGD is accounted for from delta {MIN_DP_SGD_DELTA:g} on, got {delta:g}")
