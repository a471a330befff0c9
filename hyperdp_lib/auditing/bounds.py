"""From counts of an attack to what privacy the attacked mechanism can at most have had.

An attacker sees one release and says *in* or *out*. Let ``a`` be how often it says *in* on data without the example,
``b`` on data with it. Every mechanism that is mu-GDP keeps ``b <= Phi(Phi^-1(a) + mu)`` (Dong, Roth & Su 2022); every
(epsilon, delta)-DP one keeps ``b <= exp(epsilon) a + delta``. So counts that say ``a`` is small and ``b`` large refute
small mu, and small epsilon. Both rates are replaced by Clopper-Pearson bounds in the direction that favours the
mechanism, so that nothing is assumed about the distribution of anything.

For a Gaussian release the first bound is tight at every threshold, the second at one only, far out in the tail: at
epsilon = 1 and delta = 1e-5 the attacker says *in* wrongly once in 18,000 runs there, so that even 200,000 runs count a
dozen events, and the second bound stays well below the truth. That is a limit of auditing, not a margin of safety.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Counts:
    """How often an attacker said *in*: on ``trials_out`` runs without the example, on ``trials_in`` with it."""

    false_positives: int
    trials_out: int
    true_positives: int
    trials_in: int


def clopper_pearson(hits: int, trials: int, error: float) -> tuple[float, float]:
    """Lower and upper bound of a probability, each wrong with probability at most ``error``.

    >>> low, high = clopper_pearson(0, 100, 0.005)
    >>> low, round(high, 3)
    (0.0, 0.052)
    """
    low = 0.0 if hits == 0 else float(stats.beta.ppf(error, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(stats.beta.ppf(1 - error, hits + 1, trials - hits))
    return low, high


def mu_lower_bound(counts: Counts, confidence: float = 0.99) -> float:
    """The largest mu that the counts refute: with the given confidence the mechanism is not mu'-GDP for mu' below.

    Examples
    --------
    >>> round(mu_lower_bound(Counts(1000, 10_000, 5000, 10_000)), 2)
    1.2
    """
    return max(0.0, _refuted_shift(counts, confidence))


def _refuted_shift(counts: Counts, confidence: float) -> float:
    """`mu_lower_bound`, below zero where the counts refute nothing: then it still tells which come nearer to it."""
    error = (1 - confidence) / 2
    high = clopper_pearson(counts.false_positives, counts.trials_out, error)[1]
    low = clopper_pearson(counts.true_positives, counts.trials_in, error)[0]
    return float(stats.norm.ppf(low) - stats.norm.ppf(high))


def epsilon_lower_bound(counts: Counts, delta: float, confidence: float = 0.99) -> float:
    """The largest epsilon at ``delta`` that the counts refute."""
    error = (1 - confidence) / 2
    high = clopper_pearson(counts.false_positives, counts.trials_out, error)[1]
    low = clopper_pearson(counts.true_positives, counts.trials_in, error)[0]
    return max(0.0, math.log((low - delta) / high)) if low > delta else 0.0


def best_threshold(
    without: NDArray[np.floating], having: NDArray[np.floating], delta: float | None = None
) -> float:
    """Threshold with the largest lower bound on mu (or, given ``delta``, on epsilon), from scores set aside for it.

    Choose it on some runs and count on others: chosen and counted on the same, the bound would be biased.
    """
    candidates = np.quantile(np.concatenate([without, having]), np.linspace(0.002, 0.998, 250))

    def bound(threshold: float) -> float:
        counts = count(without, having, threshold)
        # For mu every threshold may do, and the best of 250 estimates is too often a lucky one of the tail, where few
        # runs count and few will when it matters. Being nearly certain costs the tail more than the middle.
        return _refuted_shift(counts, 1 - 1e-6) if delta is None else epsilon_lower_bound(counts, delta, 0.9)

    return float(max(candidates, key=bound))


def count(without: NDArray[np.floating], having: NDArray[np.floating], threshold: float) -> Counts:
    """Scores above the threshold mean *in*."""
    return Counts(int((without > threshold).sum()), len(without), int((having > threshold).sum()), len(having))


def one_run_epsilon(
    correct: int, guesses: int, num_canaries: int, delta: float, confidence: float = 0.99
) -> float:
    """Lower bound on epsilon from a *single* run (Steinke, Nasr & Jagielski 2023, theorem 5.2).

    Each of ``num_canaries`` examples was put in by a fair coin; the attacker guessed ``guesses`` of the coins, and was
    right ``correct`` times. Under (epsilon, delta)-DP that number is at most binomial with success probability
    ``e**epsilon / (1 + e**epsilon)``, but for a share of delta.

    Examples
    --------
    >>> one_run_epsilon(50, 100, 1000, 1e-5)
    0.0
    >>> round(one_run_epsilon(100, 100, 1000, 1e-5), 1)
    3.0
    """
    if not 0 <= correct <= guesses <= num_canaries or guesses < 1:
        raise ValueError("need 0 <= correct <= guesses <= num_canaries, and one guess or more")
    low, high = 0.0, 30.0
    if _one_run_p_value(correct, guesses, num_canaries, low, delta) > 1 - confidence:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        refuted = _one_run_p_value(correct, guesses, num_canaries, middle, delta) <= 1 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def _one_run_p_value(correct: int, guesses: int, num_canaries: int, epsilon: float, delta: float) -> float:
    success = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, success))
    if correct == 0:
        return 1.0
    # max over i of P[correct - i <= W < correct] / i
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, success))
    share = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * num_canaries * delta * share)
