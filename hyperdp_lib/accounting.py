r"""Accounting: (epsilon, delta) <-> noise multiplier <-> mu-GDP <-> rho-zCDP. Pure functions of floats.

``noise_multiplier`` is the standard deviation of the noise divided by the **sensitivity** of the noisy sum
(for DP-SGD: divided by the **clip norm** of a gradient, Opacus' convention).

The analytic Gaussian mechanism
-------------------------------
Gaussian noise of multiplier ``m`` is mu-GDP with ``mu = 1/m`` (Dong, Roth & Su 2022) and, exactly (Balle &
Wang 2018, Theorem 8, with Phi the normal distribution function),

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu).        (1)

Releases of multipliers ``m_1, m_2, ...`` compose to ``mu = sqrt(sum 1/m_i**2)``, also if each is chosen after
seeing the ones before. The classical formula (valid below epsilon = 1 only, and loose there) is used nowhere.

Theorem: the discrete Gaussian of :mod:`hyperdp_lib.mechanism` is covered
------------------------------------------------------------------------
Let ``p`` be the discrete Gaussian of parameter ``s = m D >= 1`` on ``Z**d``, ``D`` the integer sensitivity,
and ``q`` the continuous ``N(0, s**2 I)`` rounded to nearest integers. Adding ``q`` to an integer vector is
post-processing (rounding) of the continuous mechanism, so (1) bounds ``q`` against its shift by any integer
``v`` with ``|v| <= D``, that is against ``q_v(x) = q(x - v)``. It remains to compare ``p`` with ``q``. In one
dimension, with the bounds on ``Z`` by Poisson summation,

    q(j) = exp(-j**2 / 2s**2) A(j) / (s sqrt(2 pi)),   p(j) = exp(-j**2 / 2s**2) / Z,
    A(j) = integral over |u| <= 1/2 of cosh(j u / s**2) exp(-u**2 / 2s**2),
    s sqrt(2 pi) <= Z <= s sqrt(2 pi) (1 + 3 exp(-2 pi**2 s**2)).

1. ``cosh >= 1`` and Jensen: ``A(j) >= exp(-1 / 24s**2)``. So ``p <= c q`` with ``log c = d / 24s**2``.
2. ``A(j) <= sinh(a)/a <= exp(a**2 / 6)``, ``a = j / 2s**2``. So ``p(x) >= q(x) exp(-|x|**2 / 24s**4) / c'``
   with ``log c' = 3 d exp(-2 pi**2 s**2)``.
3. Let ``B = {x: |x - v| > R}``, ``R = D + sqrt(d)/2 + s (sqrt(d) + sqrt(2t))``. What is rounded into ``B``
   lay farther than ``s (sqrt(d) + sqrt(2t))`` from the origin, so by step 1 and Laurent & Massart (2000,
   Lemma 1) ``p(B) <= c exp(-t)``.
4. So for every event ``E``, with ``xi = R**2 / 24s**4 + log c + log c'``,

       p(E) - e**epsilon p_v(E) <= c exp(-t) + c [q(E - B) - e**(epsilon - xi) q_v(E - B)]
                                <= c (delta(epsilon - xi) + exp(-t)).                       (2)

5. An adaptive sequence multiplies the densities of steps 1 and 2 and adds the tails of step 3: add up the
   ``log c``, the ``xi`` and the tails, and use the composed ``mu`` in (1).

At fixed ``m``, (2) decreases in ``D`` and increases in ``d``. It is evaluated at ``t = 200``, the largest
``d`` and the smallest ``D`` that the mechanism accepts, so it covers every release of the library, at a
cost below one part in a million of epsilon for ``m >= 0.3``. Floating-point errors are bounded and charged
too (``gaussian_delta``).

``rho = 1 / 2m**2`` (zCDP) needs none of this: it is exact for the discrete Gaussian (Canonne, Kamath &
Steinke 2020, Theorem 4) and composes by addition, but gives a larger epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from scipy.special import log_ndtr

# The corner of the mechanism's range at which the theorem is evaluated; a test compares with `mechanism`.
MAX_COORDINATES = 2**20
MIN_GRID_SENSITIVITY = 2**20
_TAIL = 200.0  # t in step 3: a probability of 1e-87

Releases = float | Sequence[float]


def mu(noise_multiplier: Releases) -> float:
    """Gaussian-DP parameter of one release, or of an adaptive sequence, of the continuous mechanism.

    >>> mu(2.0), mu([2.0, 2.0, 2.0, 2.0])
    (0.5, 1.0)
    """
    multipliers = _multipliers(noise_multiplier)
    return math.inf if 0 in multipliers else math.hypot(*(1 / m for m in multipliers))


def rho(noise_multiplier: Releases) -> float:
    """zCDP parameter, exact for the discrete mechanism."""
    return mu(noise_multiplier) ** 2 / 2


def discretisation_slack(noise_multiplier: float) -> tuple[float, float]:
    """``(xi, log c)`` of the theorem for one release: what the integer grid can cost, at worst."""
    s = noise_multiplier * MIN_GRID_SENSITIVITY
    if s < 1:
        return math.inf, math.inf
    root = math.sqrt(MAX_COORDINATES)
    radius = MIN_GRID_SENSITIVITY / s + root / (2 * s) + root + math.sqrt(2 * _TAIL)  # R / s
    log_c = MAX_COORDINATES / (24 * s**2)
    log_c_prime = 3 * MAX_COORDINATES * math.exp(-2 * math.pi**2 * s**2)
    return radius**2 / (24 * s**2) + log_c + log_c_prime, log_c


def delta(noise_multiplier: Releases, epsilon: float) -> float:
    """The delta of (epsilon, delta)-DP at ``epsilon >= 0``: (2), proven for the discrete mechanism.

    >>> f"{delta(3.7304, epsilon=1.0):.2e}"
    '1.00e-05'
    """
    if not epsilon >= 0:
        raise ValueError("epsilon must be at least 0")
    return _discrete_delta(_multipliers(noise_multiplier), epsilon)


def epsilon(noise_multiplier: Releases, delta: float) -> float:
    """The epsilon of one release (or an adaptive sequence) at ``delta``, rounded up; infinity without noise.

    >>> round(epsilon(3.7304, 1e-5), 3), round(epsilon([5.2756, 5.2756], 1e-5), 3)
    (1.0, 1.0)
    """
    check_delta(delta)
    multipliers = _multipliers(noise_multiplier)
    if _discrete_delta(multipliers, math.inf) > delta:
        return math.inf
    return smallest(lambda value: _discrete_delta(multipliers, value) <= delta)


def noise_multiplier(epsilon: float, delta: float) -> float:
    """The smallest noise multiplier that makes one release (epsilon, delta)-DP, rounded up by about 1e-9.

    ``epsilon`` is above 0 (at 0 nothing may be released: ValueError); infinity means no noise, 0.0. ``delta``
    is between 1e-60 and 1; choose it far below one over the number of examples. The result ``m`` always has
    ``accounting.epsilon(m, delta) <= epsilon``.

    >>> [round(noise_multiplier(epsilon, 1e-5), 2) for epsilon in (0.5, 1, 2, 4, 10, 16)]
    [7.03, 3.73, 1.99, 1.08, 0.5, 0.34]
    """
    check_budget(epsilon, delta)
    if math.isinf(epsilon):
        return 0.0
    return smallest(lambda value: _discrete_delta([value], epsilon) <= delta) * (1 + 1e-9)


def _discrete_delta(multipliers: Sequence[float], epsilon: float) -> float:
    """Equation (2) for an adaptive sequence of releases."""
    slacks = [discretisation_slack(m) for m in multipliers]
    xi, log_c = (math.fsum(part) for part in zip(*slacks, strict=True))
    if math.isinf(xi):
        return 1.0
    tails = len(slacks) * math.exp(-_TAIL)
    return min(1.0, math.exp(log_c) * (gaussian_delta(mu(multipliers), epsilon - xi) + tails))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Equation (1), never below its true value: bounds on the rounding errors of its terms are added."""
    if math.isinf(epsilon):
        return 0.0
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    tail = float(log_ndtr(-mu / 2 - epsilon / mu))
    rounding = 1e-14 * (1 + abs(epsilon) + abs(first) + abs(tail) + mu**2 + (epsilon / mu) ** 2)
    return math.exp(first + rounding) * -math.expm1(min(0.0, epsilon + tail - first - rounding))


def smallest(good: Callable[[float], bool], tolerance: float = 1e-13) -> float:
    """The smallest good number above 1e-12, from above: the result itself is good (``good`` is monotone)."""
    high = 1.0
    while not good(high):
        if (high := 2 * high) > 1e18:
            raise ValueError("the privacy budget is too small to be reached with 64-bit floats")
    while high > 1e-12 and good(high / 2):
        high /= 2
    low = high / 2
    while high > low * (1 + tolerance):
        middle = (low + high) / 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _multipliers(noise_multiplier: Releases) -> list[float]:
    multipliers = [noise_multiplier] if isinstance(noise_multiplier, (int, float)) else list(noise_multiplier)
    if not multipliers or not all(0 <= m < 1e18 for m in multipliers):
        raise ValueError("a noise multiplier must be finite and at least 0")
    return multipliers


def check_delta(delta: float) -> None:
    if not 1e-60 < delta < 1:
        raise ValueError("delta must be between 1e-60 and 1, both excluded; 1e-5 is usual")


def check_budget(epsilon: float, delta: float) -> None:
    check_delta(delta)
    if not epsilon > 0:
        raise ValueError("epsilon must be above 0 (0 releases nothing: use the public-only control)")
