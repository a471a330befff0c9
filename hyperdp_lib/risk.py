r"""Risk in plain words: what the best possible attack on one image achieves, whoever makes it.

An attack is a test: from the release, does it say "alarm" (the image was there) or not? `FPR` is its rate of false
alarms, `TPR` of true ones. A guarantee bounds `TPR` by `FPR`, whatever else the attacker knows (Wasserman & Zhou 2010):

* mu-GDP (Dong, Roth & Su 2022): `TPR <= Phi(Phi^-1(FPR) + mu)`, so `TPR - FPR <= 2 Phi(mu / 2) - 1`. The optimal test
  of one Gaussian against its shift by mu standard deviations attains both. Adaptive sequences add up to one mu.
* (epsilon, delta) (Kairouz, Oh & Viswanath 2015): `TPR <= e^epsilon FPR + delta` and
  `TPR <= 1 - e^-epsilon (1 - delta - FPR)`, so `TPR - FPR <= 1 - 2 (1 - delta) / (1 + e^epsilon)`. Some mechanism
  attains all three.

*The discrete Gaussian.* With the notation of :mod:`hyperdp_lib.accounting`, steps 1 to 3, for every alarm `E`:
`p(E) <= c (exp(-t) + q(E - B))` and `q_v(E - B) <= e^xi p_v(E)`. As `q` and `q_v` are mu-GDP,

    TPR <= c (exp(-t) + Phi(Phi^-1(e^xi FPR) + mu)).

*Belief.* Who thought the chances even and hears an alarm believes `TPR / (TPR + FPR)` (Bayes). It is stated for an
alarm at 1 % false alarms; rarer alarms, at fewer of them, can say more.

All numbers are rounded up, to six digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from scipy.special import ndtr, ndtri

from hyperdp_lib import accounting
from hyperdp_lib import ledger as ledgers
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.strict_json import check_types

_TAIL = math.exp(-200.0)  # exp(-t) of one release
_ROUNDING = 1e-9  # far above what floats lose on the way
_QUESTION = {
    "add_or_remove_one": "whether one image was there",
    "replace_one": "which of two images was there",
    "zero_out": "whether one image was voided",
}


@dataclass(frozen=True)
class Risk:
    """Upper bounds for every attack on one image, as shares from 0 to 1.

    Attributes
    ----------
    advantage
        True minus false alarms, at the rate of false alarms where most is gained.
    true_positives_at_1_percent, true_positives_at_0_1_percent
        Share of true alarms, at that rate of false alarms.
    belief
        After an alarm at 1 % false alarms, of an attacker to whom the chances were even.
    """

    advantage: float
    true_positives_at_1_percent: float
    true_positives_at_0_1_percent: float
    belief: float

    def __post_init__(self) -> None:
        check_types(self)
        if max(astuple(self)) > 1:
            raise ValueError("a risk is a share, at most 1")


NO_RISK, NO_BOUND = Risk(0.0, 0.01, 0.001, 0.5), Risk(1.0, 1.0, 1.0, 1.0)


def gaussian(noise_multiplier: accounting.Releases) -> Risk:
    """Risk of one Gaussian release, or of an adaptive sequence; proven for the discrete mechanism.

    Parameters
    ----------
    noise_multiplier : float or sequence of float
        Standard deviation of the noise over the sensitivity, at least 0; 0 gives no bound.

    Examples
    --------
    >>> bound = gaussian(accounting.noise_multiplier(1.0, 1e-5))
    >>> bound.advantage, bound.true_positives_at_1_percent, bound.belief
    (0.106618, 0.0197809, 0.664214)
    """
    mu = accounting.mu(noise_multiplier)
    multipliers = [noise_multiplier] if isinstance(noise_multiplier, (int, float)) else noise_multiplier
    slacks = [accounting.discretisation_slack(m) for m in multipliers]
    xi, log_c = (math.fsum(part) for part in zip(*slacks, strict=True))
    if math.isinf(mu) or log_c > 1:  # c above e: nothing is left of the bound
        return _risk(1.0, 1.0, 1.0)
    c, tail = math.exp(log_c), len(slacks) * _TAIL

    def true_positives(false_positives: float) -> float:
        return c * (tail + float(ndtr(ndtri(min(1.0, math.exp(min(xi, 700.0)) * false_positives)) + mu)))

    # from TPR <= c (exp(-t) + G(e^xi FPR)) and max G(b) - b = erf(mu / sqrt 8)
    advantage = math.erf(mu / math.sqrt(8)) + math.expm1(log_c) + xi + c * tail
    return _risk(advantage, true_positives(0.01), true_positives(0.001))


def approximate(epsilon: float, delta: float) -> Risk:
    """Risk that follows from epsilon and delta alone, whatever the mechanism.

    >>> approximate(1.0, 1e-5).true_positives_at_1_percent
    0.0271929
    """
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError("need epsilon of at least 0 and delta from 0 to 1")
    if epsilon > 700:  # where floats end
        return _risk(1.0, 1.0, 1.0)

    def true_positives(false_positives: float) -> float:
        up = math.exp(epsilon) * false_positives + delta
        return min(up, 1 - math.exp(-epsilon) * (1 - delta - false_positives))

    advantage = math.tanh(epsilon / 2) + 2 * delta / (1 + math.exp(epsilon))
    return _risk(advantage, true_positives(0.01), true_positives(0.001))


def of_ledger(ledger: Sequence[LedgerEntry], epsilon: float, delta: float) -> Risk:
    """Risk of a whole ledger: by its noise if all in it is Gaussian, else by the (epsilon, delta) that it comes to.

    >>> of_ledger((), 0.0, 1e-5) == NO_RISK  # nothing private was read
    True
    """
    if not any(entry.private for entry in ledger):
        return NO_RISK
    multipliers = ledgers.gaussian_multipliers(ledger)
    return approximate(epsilon, delta) if multipliers is None else gaussian(multipliers)


def of(certificate: Any) -> Risk:
    """Risk of a :class:`~hyperdp_lib.certificate.Certificate`; no bound where its guarantee does not hold."""
    if not certificate.private:  # not charged, no noise, or noise from a seed that somebody knows
        return NO_BOUND
    return of_ledger(certificate.ledger, certificate.epsilon, certificate.delta)


def in_words(certificate: Any) -> str:
    """The risk line of a :class:`~hyperdp_lib.certificate.Certificate`, which starts with ``Risk:``; rounded up."""
    if not certificate.charged:
        return "Risk: no bound can be stated; the release was not charged to its privacy ledger."
    if not any(entry.private for entry in certificate.ledger):
        return "Risk: none. No private image was read, so no attack does better than a guess."
    question = _QUESTION[certificate.neighboring_relation]
    if math.isinf(certificate.epsilon):
        return f"Risk: no bound. An attack may tell with certainty {question}."
    bound = of_ledger(certificate.ledger, certificate.epsilon, certificate.delta)
    basis = "From epsilon and delta alone" if certificate.mu is None else f"mu = {rounded_up(certificate.mu, 4)}"
    first, second = (percent(rate) for rate in (bound.true_positives_at_1_percent, bound.true_positives_at_0_1_percent))
    told = (
        f"{basis}. Whoever tries to tell {question} gains at most {percent(bound.advantage)} "
        f"(true minus false alarms). At 1 % false alarms, at most {first} of the true ones are found; at 0.1 %, "
        f"at most {second}. "
        f"An alarm at 1 % turns even chances into a belief of at most {percent(bound.belief)}."
    )
    if certificate.demonstration:
        return f"Risk: NOT PRIVATE. Whoever knows the seed may be certain. With secret noise it would be: {told}"
    return f"Risk: {told}"


def rounded_up(value: float, digits: int = 6) -> str:
    """At most so many significant digits, never below `value`.

    >>> rounded_up(1.0), rounded_up(0.99999999), rounded_up(2.0000001), rounded_up(1e-5)
    ('1', '1', '2.00001', '1e-05')
    """
    return f"{float(_ceiling(Decimal(repr(value)), digits)):.{digits}g}"


def percent(share: float) -> str:
    """A share in per cent, three significant digits, never below it.

    >>> percent(0.106623), percent(0.107), percent(1.0)
    ('10.7 %', '10.7 %', '100 %')
    """
    return f"{float(_ceiling(100 * Decimal(repr(share)), 3)):g} %"


def _ceiling(value: Decimal, digits: int) -> Decimal:
    return Context(prec=digits, rounding=ROUND_CEILING).create_decimal(value)


def _risk(advantage: float, first: float, second: float) -> Risk:
    belief = min(1.0, first) / (min(1.0, first) + 0.01)
    return Risk(*(min(1.0, float(rounded_up(x * (1 + _ROUNDING)))) for x in (advantage, first, second, belief)))
