r"""The price of choosing the best of several private trainings by their scores on the private data.

Papernot & Steinke (2022, arXiv 2110.03620): make a random number K of independent trials, each of which trains with its
own noise and gets a score with its own noise, and release only the best. K comes from a public distribution, Poisson or
truncated negative binomial (Liu & Talwar 2019 have the geometric one), and stays secret, as do all other scores.

*Theorem.* Let one trial be ``(a, eps_a)``-RDP for every order ``a``: training and score, composed. Truncated negative
binomial K with parameters ``shape`` and ``gamma`` (shape 1: geometric, 0: logarithmic) makes the search ``(a,
eps')``-RDP with

    eps' = eps_a + (1 + shape) [(1 - 1/b) eps_b + log(1/gamma) / b] + log(E K) / (a - 1)      for every order b,

and Poisson K (``shape = inf``), if one trial is ``(e, d)``-DP with ``exp(e) <= 1 + 1/(a - 1)``, with

    eps' = eps_a + E[K] d + log(E K) / (a - 1)

(their Theorems 2 and 6). dp-accounting evaluates both, and the conversion to (epsilon, delta); the tests compute them
again, and compare with a search whose delta can be integrated.

*Ties.* The theorem wants a total order of results. Equal scores happen by rounding only; among them the first wins,
which is a fair coin because trials are independent and alike.

*The end of the noise.* Under the condition that its noise stays within reach of both neighbours, a trial is as private
as with Gaussian noise, up to less than any rounding here. A trial breaks it with probability `dp_sgd.end_leak` at most,
some trial with ``E[K]`` times that. The search so differs from one that keeps the condition by no more, which costs
``1 + exp(epsilon)`` times it in delta. `search_plan` sees to it that this fits into the 1 % of delta kept for it.

*Not covered.* Timing, and floating-point error in the draw of K, as in the noise of DP-SGD.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from hyperdp_lib import accounting, dp_sgd_accounting
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.baselines.dp_sgd import PrivacyPlan
from hyperdp_lib.data import InputError

# Any orders give a valid bound; these have the optimum of budgets from 0.1 to 20 among them, and lower ones are slow.
ORDERS = tuple(
    float(order)
    for part in (np.arange(1.5, 11, 0.25), np.arange(11, 128), np.arange(128, 512, 8), 2.0 ** np.arange(9, 13))
    for order in part
)


@dataclass(frozen=True)
class SearchPlan:
    """How much noise every trial gets, so that the whole search keeps the budget.

    Attributes
    ----------
    sgd : PrivacyPlan
        Of a trial's DP-SGD.
    score_multiplier : float
        Noise over sensitivity of a trial's score.
    trial_epsilon, trial_delta : float
        With them `dp_sgd.privacy_plan` gives ``sgd``.
    relation : str
        What the noise is calibrated for: ``replace_one`` with Poisson batches counts as a removal and an addition.
    epsilon, delta : float
        Of the whole search under ``relation``.
    """

    sgd: PrivacyPlan
    score_multiplier: float
    trial_epsilon: float
    trial_delta: float
    relation: str
    epsilon: float
    delta: float


def search_epsilon(
    plan: PrivacyPlan | None, score_multiplier: float, delta: float, *, mean_trials: float, shape: float
) -> float:
    """Epsilon of the whole search, from the noise of one trial; without a ``plan``, of a search among scores alone.

    The score's discrete noise is exactly ``1 / (2 m**2)``-zCDP.

    Examples
    --------
    >>> one = accounting.epsilon(10.0, 1e-5)
    >>> searched = search_epsilon(None, 10.0, 1e-5, mean_trials=5.0, shape=math.inf)
    >>> round(one, 2), round(searched, 2)
    (0.34, 0.65)
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent, ZCDpEvent

    parts: list[Any] = [ZCDpEvent(1 / (2 * score_multiplier**2))]
    if plan is not None:
        gaussian = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
        step = gaussian if plan.sample_rate == 1 else dp_accounting.PoissonSampledDpEvent(plan.sample_rate, gaussian)
        parts.append(dp_accounting.SelfComposedDpEvent(step, plan.num_steps))
    accountant = dp_accounting.rdp.RdpAccountant(ORDERS)
    log = logging.getLogger("absl")  # says which orders it leaves out, where their series converge slowly: less is safe
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        accountant.compose(RepeatAndSelectDpEvent(dp_accounting.ComposedDpEvent(parts), mean_trials, shape))
    finally:
        log.setLevel(level)
    return float(accountant.get_epsilon(delta))


@functools.cache  # seconds for Poisson batches, and the same for every seed
def search_plan(
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    *,
    mean_trials: float,
    shape: float,
    score_share: float,
    expected_batch_size: float,
    declared_size: float,
    num_steps: int,
) -> SearchPlan:
    """Noise of each trial with which the search is (epsilon, delta)-DP, at most 0.5 % more than that needs.

    The score's noise is that of ``score_share`` of the squared parameter that a Gaussian trial may have; DP-SGD gets
    the least noise with which the search then keeps its budget.
    """
    sizes: dict[str, Any] = dict(
        expected_batch_size=expected_batch_size, declared_size=declared_size, num_steps=num_steps
    )
    plain = dp_sgd.privacy_plan(math.inf, delta, neighboring_relation, **sizes)  # says what is wrong with the sizes
    rate = plain.sample_rate
    dp_sgd.check_budget(epsilon, delta, neighboring_relation, rate)
    if math.isinf(epsilon):
        return SearchPlan(plain, 0.0, epsilon, delta, neighboring_relation, epsilon, delta)
    sampled = rate < 1
    relation = neighboring_relation
    if sampled and relation == "replace_one":  # group privacy for two, as in `dp_sgd.privacy_plan`
        relation, (epsilon, delta) = "add_or_remove_one", dp_sgd.one_of_two(epsilon, delta)
    distribution = dict(mean_trials=mean_trials, shape=shape)
    kept = dp_sgd_accounting.kept(delta)  # the rest is for the end of DP-SGD's noise
    whole = _gaussian_trial(epsilon, kept, **distribution)
    score_multiplier = whole / math.sqrt(score_share)
    step_multiplier = whole * math.sqrt(num_steps / (1 - score_share))

    def plan_of(multiplier: float) -> PrivacyPlan:
        return PrivacyPlan(multiplier, rate, num_steps, declared_size, 1.0, "")

    def fits(plan: PrivacyPlan) -> bool:
        return search_epsilon(plan, score_multiplier, kept, **distribution) <= epsilon

    if sampled:
        step_multiplier = _least(lambda m: fits(plan_of(m)), high=step_multiplier)
        trial_epsilon = dp_sgd_accounting.pld_epsilon([(step_multiplier, rate, num_steps)], kept)
    else:
        trial_epsilon = accounting.epsilon(step_multiplier / math.sqrt(num_steps), kept)
    while True:  # one round as a rule: the training's own calibration may differ from ours in the last digits
        sgd = dp_sgd.privacy_plan(trial_epsilon, delta, relation, **sizes)
        if fits(sgd):
            leak = mean_trials * dp_sgd.end_leak(sgd.noise_multiplier, num_steps)
            if leak * (1 + math.exp(min(epsilon, 700))) > 0.99 * dp_sgd_accounting.DP_SGD_RESERVE * delta:
                raise InputError(
                    f"epsilon {epsilon:g} leaves a search so little noise that the end of floating-point noise would "
                    "show: take more steps, or a smaller epsilon."
                )
            return SearchPlan(sgd, score_multiplier, trial_epsilon, delta, relation, epsilon, delta)
        trial_epsilon *= 0.999


@functools.cache
def _gaussian_trial(epsilon: float, delta: float, *, mean_trials: float, shape: float) -> float:
    """The noise multiplier of a trial that is one Gaussian mechanism."""
    how = dict(mean_trials=mean_trials, shape=shape)
    return _least(lambda m: search_epsilon(None, m, delta, **how) <= epsilon)


def _least(good: Callable[[float], bool], high: float = 1.0) -> float:
    """The least good noise multiplier, from above, up to 0.1 %; more noise is always good."""
    while not good(high):
        if (high := 2 * high) > 1e9:
            raise InputError("the privacy budget is too small for a search: more epsilon, or fewer trials.")
    while high > 0.02 and good(high / 2):
        high /= 2
    low = high / 2
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def halting_probability(mean_trials: float, shape: float) -> float:
    """The gamma of a truncated negative binomial distribution with this mean; 1 if there is always one trial.

    >>> halting_probability(4.0, 1.0)
    0.25
    """

    def mean(gamma: float) -> float:
        if shape == 0:
            return (1 / gamma - 1) / math.log(1 / gamma)
        return shape * (1 - gamma) / gamma / -math.expm1(shape * math.log(gamma))

    if shape == 1:
        return 1 / mean_trials
    nearly_one = 1 - 1e-6
    if mean_trials <= mean(nearly_one):
        return 1.0
    return float(brentq(lambda gamma: mean(gamma) - mean_trials, 1e-300, nearly_one, xtol=1e-15, rtol=1e-12))


def number_of_trials(mean_trials: float, shape: float, generator: np.random.Generator) -> int:
    """A draw of K; see `LayerSearchConfig`."""
    if math.isinf(shape):
        return int(generator.poisson(mean_trials))
    gamma = halting_probability(mean_trials, shape)
    if gamma == 1:
        return 1
    if shape == 0:
        return int(generator.logseries(1 - gamma))
    while (drawn := int(generator.negative_binomial(shape, gamma))) == 0:
        pass
    return drawn
