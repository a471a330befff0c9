r"""Risk of the rivals of DP-DeepSets at the same privacy budget, each at its best tuning.

==================  ============================================================================  ================
function            the learner                                                                   knows the subspace
==================  ============================================================================  ================
`dp_gd`             full-batch DP gradient descent in R^d, the stand-in for DP-SGD                no
`one_step`          the same with a single step: one noisy clipped mean in R^d                    no
`noisy_statistics`  noisy X^T X and X^T y, ridge chosen by an oracle                              no
`projected_dp_gd`   DP gradient descent inside the learned subspace                               yes
`hybrid`            DP-DeepSets, then DP gradient descent in R^d from its answer                  partly
`public_only`       answers 0: the best guess without private data                                -
`ols`               least squares, no privacy                                                     no
`bayes_ridge`       the best linear learner without privacy                                       no
==================  ============================================================================  ================

Tuning uses public quantities only (tau, s, k, n, mu), as it does for DP-DeepSets, so it costs no privacy. Energy
gamma^2 outside the subspace is signal to a learner in R^d, whose task has squared norm ``q = tau^2 + gamma^2``; to one
inside the subspace it is label noise and a floor.

State evolution
---------------
DP gradient descent with T steps of size alpha starts at 0 and moves by ``-alpha (mean of clipped gradients + N(0,
sigma^2 I_d))``, ``sigma = C sqrt(T) / (n mu)``. As ``|x|`` is close to ``sqrt d``, clipping a gradient ``x r`` at C is
clipping its residual r at ``c = C / sqrt d``. A clipped Gaussian residual of variance v is ``h r`` plus a part
uncorrelated with it, of variance ``D(v)^2`` (Bussgang):

    h = erf(c / sqrt(2 v)),    D^2 = E clip_c(r)^2 - h^2 v.                                                  (1)

Gradient descent then acts separately on each eigenvalue ``l`` of ``X^T X / n``, whose distribution is Marchenko and
Pastur's, with a mass at 0 if d > n. With ``f = 1 - alpha h l`` and from (B, D, V) = (1, 0, 0), a step takes

    B <- f B,    D <- f D + alpha D(v),    V <- f^2 V + alpha^2 sigma^2.                                     (2)

B is what is left of the signal; the label noise fitted so far is a multiple ``(1 - B) / l`` of it; D holds clipping
errors, added up coherently; V the privacy noise. With kappa = d / n, averages over l give the residual variance *on the
training set*, where fitted noise counts as progress, and the risk:

    v = s^2 (1 - kappa) + < B^2 (q l + kappa s^2) + kappa l^2 D^2 + d l V >,                                 (3)
    R = < B^2 q + kappa s^2 (1 - B)^2 / l + kappa l D^2 + d V >.                                             (4)

Without clipping this is exact as n and d grow in proportion; with it, an approximation that simulations confirm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from scipy.special import erf, erfc
from scipy.stats import chi2

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import deepsets
from hyperdp_lib.theory.setting import Array, LinearSetting, check_sizes

STEPS = (4, 16, 64, 128)  # numbers of steps searched; one step has its own formula, refinement tries twice the best
CLIPS = np.array([0.1, 0.25, 0.5, 0.9, 1.5])  # residual clips, in units of sigma_y
STEP_SIZES = np.geomspace(0.1, 4.0, 11)  # in units of the best single step, over steps**0.7
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # of mu^2, spent on DP-DeepSets by the hybrid (besides none and all)

_ONE_STEP_CLIPS = np.geomspace(0.01, 8.0, 40)
_FINER_CLIPS = np.array([0.5, 0.72, 1.0, 1.4, 1.9])
_ROUNDS, _MOST_STEPS = 4, 2 * STEPS[-1]  # of refinement
_FINER_STEP_SIZES = 1.446 ** np.array([-1.2, -0.67, -0.33, 0.0, 0.33, 0.67])
_NODES = 80  # of the Marchenko-Pastur law
_CHUNK = 400_000  # elements of one state array: stays in cache, and memory stays far below 100 MB
_HUGE = 1e12  # a residual variance that grew by this factor will not come back: the learner stops there
_MOST = 1e200  # noise variances above are as good as this one, and do not overflow

_PROJECTED_STEPS = (2, 3, 4, 8, 16, 32, 64, 128)
_PROJECTED_CLIPS = np.geomspace(0.02, 5.0, 18)  # in units of sqrt(k) sigma_y
_PROJECTED_STEP_SIZES = np.geomspace(0.15, 6.0, 13)  # in units of the best single step, over steps**0.7
_RETREAT = 1.4  # a projected learner whose error passes this multiple of the initial one is given up


@dataclass(frozen=True)
class Tuned:
    """A learner at its best tuning; arrays of one shape.

    ``steps`` (0: stay at the start), ``step_size`` (alpha), ``clip``: of a residual for learners in R^d (a gradient is
    clipped at ``sqrt(d) clip``), of a gradient in the subspace for `projected_dp_gd` (0: normalised gradients).
    """

    risk: Array
    steps: NDArray[np.int64]
    step_size: Array
    clip: Array


@dataclass(frozen=True)
class TunedHybrid(Tuned):
    """Also the ``share`` of mu^2 spent on DP-DeepSets: 0 is DP gradient descent alone, 1 is DP-DeepSets alone."""

    share: Array


# ---- learners without public data ------------------------------------------------------------


def dp_gd_risk(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike,
    *, steps: ArrayLike, step_size: ArrayLike, clip: ArrayLike,
) -> Array:  # fmt: skip
    """Risk of DP gradient descent in R^d at a given tuning, by state evolution (2)-(4); may exceed the trivial risk.

    Parameters
    ----------
    num_private, mu : broadcast with the tuning. mu = 0 takes no step: the trivial risk.
    steps : whole numbers, at least 0.
    step_size : alpha, at least 0 and finite.
    clip : c > 0, of the residual; infinity (no clipping) needs mu = infinity.

    Raises
    ------
    InputError
        A tuning outside these ranges.

    Examples
    --------
    >>> risk = dp_gd_risk(LinearSetting(), 1000, 0.2681, steps=50, step_size=[0.01, 0.3], clip=1.118)
    >>> risk.round(2)
    array([ 0.63, 41.65])
    """
    n, m = check_sizes(num_private, mu)
    n, m, t, alpha, c = _checked_tuning(n, m, steps, step_size, clip)
    if not (c > 0).all():
        raise InputError("clip must be above 0")
    flat = [value.ravel() for value in (n, m, t, alpha, c)]
    signal = setting.trivial_risk
    risk = np.full(flat[0].shape, signal)
    for count in np.unique(flat[2]):
        group = np.flatnonzero((flat[2] == count) & (flat[1] > 0))
        for part in _chunks(group, _NODES):
            n_, m_, _, alpha_, c_ = (value[part] for value in flat)
            start = np.full(len(part), signal)
            risk[part] = _evolve(setting, start, n_, m_, int(count), alpha_[:, None], c_[:, None])[:, 0]
    return risk.reshape(n.shape)


def dp_gd(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Tuned:
    """DP gradient descent in R^d at the tuning of the smallest predicted risk; never worse than the trivial risk.

    A grid over steps, step size and clip, then a finer one around its best, which also tries twice the steps; more of
    them while the best clip moves to the edge. Within 3 % of far longer searches (5 % if s < tau / 10).
    About 10 ms a point.

    >>> tuned = dp_gd(LinearSetting(), 1000, [0.2681, 1.666])
    >>> tuned.risk.round(3)
    array([0.524, 0.087])
    """
    n, m = check_sizes(num_private, mu)
    return _tune(setting, np.full(n.shape, setting.trivial_risk), n, m)


def one_step(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """Risk of DP gradient descent in R^d with a single step, at its best size and clip.

    ``q P / (q + P)`` with ``P = (kappa E clip_c(y)^2 + d sigma^2) / h^2``: DP-DeepSets of dimension d.

    >>> one_step(LinearSetting(), 1000, [0.2681, 1.666]).round(3)
    array([0.594, 0.238])
    """
    n, m = check_sizes(num_private, mu)
    flat = _single_step(setting, np.full(n.size, setting.trivial_risk), n.ravel(), m.ravel())
    return flat.risk.reshape(n.shape)


def small_step_constant(noise_std: ArrayLike, tau: ArrayLike, a: ArrayLike) -> Array:
    r"""G: many small strongly clipped steps reach the error ``G a^2``, ``a = d / (n mu)``, if n is far above d.

    The number of steps drops out. With total step ``beta``, the error E obeys

        dE/du = -2 sqrt(2/pi) E / sqrt(s^2 + E) + beta a^2,    0 <= u <= beta,    E(0) = tau^2,

    and ``G a^2`` is its least end value over beta. In ``z = sqrt(s^2 + E)`` the equation is ``du = dz * rational(z)``,
    integrated in closed form below; so no solver and no step error. ``a`` > 0 (G grows like log(1/a) as a falls to 0);
    ``noise_std``, ``tau`` > 0 and ``a`` are broadcast. G a^2 never exceeds tau^2.

    >>> small_step_constant([0.5, 1.0], 1.0, 0.1).round(2)
    array([0.96, 2.81])
    """
    s, t, a = np.broadcast_arrays(*(np.asarray(value, float) for value in (noise_std, tau, a)))
    if not ((s > 0) & (t > 0) & (a > 0)).all():
        raise InputError("need noise_std, tau and a above 0")
    shape = s.shape
    # in units of tau; an a above 100 cannot help, one below 1e-8 is as good as that
    unit, s, scaled = t.ravel(), (s / t).ravel()[:, None], np.clip(a.ravel()[:, None], 1e-8, 1e2)
    rate = 2 * (2 / np.pi) ** 0.5
    start = np.sqrt(s**2 + 1)

    def end_error(log_force: Array) -> Array:
        """E(beta) for ``force = beta a^2`` on the last axis."""
        force = np.exp(log_force)
        root = np.hypot(force, 2 * rate * s)
        fixed, other = (force + root) / (2 * rate), -2 * rate * s**2 / (force + root)  # where dE/du = 0, in z
        beta = force / scaled**2
        gap = start - fixed
        low, high = np.zeros_like(force), np.full_like(force, 1e5)
        for _ in range(70):  # bisection for w = log((start - fixed) / (z - fixed)): the elapsed u increases with w
            w = (low + high) / 2
            z = fixed + gap * np.exp(-np.minimum(w, 700))
            elapsed = 2 / rate * (
                start - z + (fixed**2 * w - other**2 * np.log((start - other) / (z - other))) / (fixed - other)
            )  # fmt: skip
            low, high = np.where(elapsed < beta, w, low), np.where(elapsed < beta, high, w)
        z = fixed + gap * np.exp(-np.minimum(low, 700))
        return np.where(gap > 0, np.maximum((z - s) * (z + s), 0), 1.0)

    best = np.log(np.geomspace(1e-18, 3, 300)) + np.zeros_like(s)
    for width in (0.15, 0.01):
        value = end_error(best)
        index = value.argmin(-1)[:, None]
        best = np.take_along_axis(best, index, -1) + width * np.linspace(-1, 1, 21)
    least = np.minimum(end_error(best).min(-1), 1.0)
    return (least * (unit / a.ravel()) ** 2).reshape(shape)


def working_rule(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """Risk of tuned DP gradient descent by hand: ``G d^2 / (n mu)^2 + 1.3 d s^2 / n``, at most the trivial risk.

    Meant for ``d / (n mu)`` below 0.3, where it stays within a third of `dp_gd`.

    >>> float(working_rule(LinearSetting(), 10000, 0.2681).round(4))
    0.0121
    """
    n, m = check_sizes(num_private, mu)
    with np.errstate(divide="ignore", over="ignore"):
        a = setting.d / n / m
        inside = np.clip(a, 1e-8, 1e2)
        private = small_step_constant(setting.noise_std, setting.trivial_risk**0.5, inside) * a**2
    return np.minimum(private + 1.3 * setting.d * setting.noise_std**2 / n, setting.trivial_risk)


def noisy_statistics(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    r"""Risk of ridge regression on noisy ``X^T X`` and ``X^T y``; ridge and split of the budget chosen by an oracle.

    ``|x|`` is clipped at L, the 99 % point of chi_d, and ``|y|`` at 2.5 sigma_y. A share omega of mu^2 goes to the
    matrix. With ``g = sqrt(d) L^2 / (n mu sqrt omega)``, a semicircle variable t on [-2, 2] and ridge ``n l``,

        R = E [(g t + l)^2 q + d B^2 L^2 / (n^2 mu^2 (1 - omega)) + kappa s^2] / (1 + g t + l)^2,

    least over omega and l with ``1 - 2 g - 2 sqrt(kappa) + l >= 0.1`` (the noisy matrix stays positive). It is an
    approximation, a little optimistic at low noise, and never let below `bayes_ridge`, which sees the same statistics
    without noise. In practice the ridge has to be paid for as well (AdaSSP: Wang 2018).

    >>> noisy_statistics(LinearSetting(), 10000, [0.2681, 1.666]).round(3)
    array([0.504, 0.058])
    """
    n, m = check_sizes(num_private, mu)
    q, d = setting.trivial_risk, setting.d
    angle = np.arange(1, 65) * np.pi / 65
    t, weight = 2 * np.cos(angle), 2 / 65 * np.sin(angle) ** 2  # Gauss quadrature of the semicircle law
    bound = chi2.ppf(0.99, d) ** 0.5
    label_bound = 2.5 * setting.label_variance**0.5
    risk = np.full(n.size, q)
    for part in _chunks(np.flatnonzero(m.ravel() > 0), 21 * 33 * 64):
        n_, m_ = n.ravel()[part][:, None, None], m.ravel()[part][:, None, None]
        logit, level = np.linspace(-4, 6, 21)[None, :, None], np.linspace(-12, 12, 33)[None, None, :]
        for spacing in (np.array([0.4, 0.6]), None):  # a grid, then a finer one around its best
            share = 1 / (1 + np.exp(-logit))
            with np.errstate(over="ignore"):
                g = np.minimum(d**0.5 * bound**2 / (n_ * m_ * np.sqrt(share)), 1e60)
                rest = np.minimum(d * (bound * label_bound / (n_ * m_)) ** 2 / (1 - share), _MOST)
            ridge = np.maximum(0.1 - 1 + 2 * g + 2 * np.sqrt(d / n_), 0) + np.exp(level) * (1 + g)
            shifted = g[..., None] * t + ridge[..., None]
            other = (rest + d / n_ * setting.noise_std**2)[..., None]
            value = ((shifted**2 * q + other) / (1 + shifted) ** 2) @ weight
            flat = value.reshape(len(part), -1)
            index = flat.argmin(-1)
            risk[part] = np.fmin(risk[part], np.take_along_axis(flat, index[:, None], -1)[:, 0])
            if spacing is not None:
                i, j = np.unravel_index(index, value.shape[1:])
                logit = logit[0, i, 0][:, None, None] + spacing[0] * np.linspace(-1, 1, 7)[None, :, None]
                level = level[0, 0, j][:, None, None] + spacing[1] * np.linspace(-1, 1, 7)[None, None, :]
    return np.maximum(risk.reshape(n.shape), bayes_ridge(setting, n))


def public_only(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """``tau^2 + gamma^2``, whatever n and mu: without private data nothing beats the answer 0."""
    n, _ = check_sizes(num_private, mu)
    return np.full(n.shape, setting.trivial_risk)


def ols(setting: LinearSetting, num_private: ArrayLike) -> Array:
    """Risk of least squares in R^d without privacy; below d examples, of its solution of smallest norm. Exact.

    ``d s^2 / (n - d - 1)`` if n > d + 1 and ``q (1 - n/d) + n s^2 / (d - n - 1)`` if n < d - 1. **Infinity** in
    between, where X^T X is so often nearly singular that the expected error is. It may exceed the trivial risk.

    >>> ols(LinearSetting(), [100, 200, 1000])
    array([0.75252525,        inf, 0.06257822])
    """
    n, _ = check_sizes(num_private, np.inf)
    d, s2 = setting.d, setting.noise_std**2
    above, below = np.maximum(n - d - 1, 0), np.maximum(d - n - 1, 0)
    with np.errstate(divide="ignore"):
        few = setting.trivial_risk * np.maximum(1 - n / d, 0) + n * s2 / below
        return np.where(n > d, d * s2 / above, few)


def bayes_ridge(setting: LinearSetting, num_private: ArrayLike) -> Array:
    r"""Risk of ridge regression in R^d without privacy, at the best penalty: the least of all linear learners.

    ``kappa s^2 m(-l)`` at ``l = kappa s^2 / q``, with m the Stieltjes transform of the Marchenko-Pastur law: the
    positive root of ``kappa l m^2 + (1 - kappa + l) m = 1`` (Dobriban & Wager 2018). Exact as n and d grow in
    proportion.

    >>> bayes_ridge(LinearSetting(), [300, 1000, 3000]).round(4)
    array([0.25  , 0.058 , 0.0175])
    """
    n, _ = check_sizes(num_private, np.inf)
    kappa, s2 = setting.d / n, setting.noise_std**2
    penalty = kappa * s2 / setting.trivial_risk
    half = 1 - kappa + penalty
    root = np.hypot(half, 2 * np.sqrt(kappa * penalty))
    # the form of the root without cancellation, on either side; the other may overflow
    with np.errstate(over="ignore", divide="ignore"):
        transform = np.where(half > 0, 2 / (np.abs(half) + root), (np.abs(half) + root) / (2 * kappa * penalty))
    return np.minimum(kappa * s2 * transform, setting.trivial_risk)


# ---- learners with the public subspace ------------------------------------------------------------


def projected_dp_gd_risk(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike,
    *, steps: ArrayLike, step_size: ArrayLike, clip: ArrayLike,
) -> Array:  # fmt: skip
    """Risk of DP gradient descent inside the learned subspace at a given tuning; may exceed the trivial risk.

    In few dimensions gradients do not have nearly equal norms, so state evolution uses the exact moments ``rho(e)``,
    ``E_2(e)`` of clipped gradients at error e: with ``e^2 = A B^2 + S^2 + k V`` and ``f = 1 - alpha rho``,

        B <- f B,    S <- f S + alpha sqrt((E_2 - rho^2 e^2) / n),    V <- f^2 V + alpha^2 C^2 steps / (n mu)^2.   (5)

    With one step and ``step_size`` m this is DP-DeepSets exactly. ``clip`` is C, of the gradient; 0 means gradients
    normalised to length 1. All arrays are broadcast; ranges and errors are those of `dp_gd_risk`.

    >>> float(projected_dp_gd_risk(LinearSetting(), 1000, 0.2681, steps=16, step_size=0.5, clip=1.0).round(4))
    0.0161
    """
    n, m = check_sizes(num_private, mu)
    n, m, t, alpha, c = _checked_tuning(n, m, steps, step_size, clip)
    if not (c >= 0).all():
        raise InputError("clip must be at least 0")
    k, energy = setting.k, setting.captured_energy
    noise = np.minimum(t * _noise_variance(np.where(c == 0, 1.0, c), n, m), _MOST)
    b, s, v = np.ones(n.shape), np.zeros(n.shape), np.zeros(n.shape)
    limit = _HUGE * (energy + setting.residual_std**2)
    for step in range(int(t.max(initial=0))):
        e2 = energy * b**2 + s**2 + k * v
        # a learner that has taken its steps, or has diverged, stays where it is
        moving = np.where((step < t) & (m > 0) & (e2 < limit), np.minimum(alpha, 1e30), 0.0)
        rho, second = deepsets.clipped_moments(k, np.sqrt(np.minimum(e2, limit)), setting.residual_std, c)
        f = 1 - moving * rho
        b, s, v = f * b, f * s + moving * _deviation(rho, second, e2, n), f**2 * v + moving**2 * noise
    return setting.floor + energy * b**2 + s**2 + k * v


def projected_dp_gd(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Tuned:
    """DP gradient descent inside the learned subspace at its best tuning; DP-DeepSets is its one-step case.

    So it is never worse. The search keeps ``alpha rho(0) <= 1``: past that, recursion (5) overshoots near the solution
    in a way that single moments cannot describe, and predicts risks that nobody reaches. ``clip`` = 0 means normalised
    gradients.

    >>> projected_dp_gd(LinearSetting(), 1000, [0.0753, 0.2681]).risk.round(4)
    array([0.0211, 0.0161])
    """
    n, m = check_sizes(num_private, mu)
    clip = deepsets.optimal_clip(setting, n, m)
    flat = Tuned(
        deepsets.risk(setting, n, m, clip).ravel(),
        np.ones(n.size, np.int64),
        deepsets.decoder_scale(setting, n, m, clip).ravel(),
        clip.ravel().astype(float),
    )
    able = np.flatnonzero((m.ravel() > 0) & (setting.captured_energy > 1e-60 * setting.label_variance))
    count = len(_PROJECTED_CLIPS) * len(_PROJECTED_STEP_SIZES)
    for part in _chunks(able, count):
        _search_projected(setting, n.ravel()[part], m.ravel()[part], flat, part)
    flat.steps[flat.step_size == 0] = 0
    return _reshaped(flat, n.shape)


def hybrid(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> TunedHybrid:
    """DP-DeepSets with a share of the budget, then DP gradient descent in R^d from its answer with the rest.

    The second part is `dp_gd` with the error of the first, floor included, as its signal: the floor is gone, and so is
    most of the signal. Shares of mu^2 (squares of mu add up): `SHARES`, none and all. About 60 ms a point.

    >>> setting = LinearSetting(off_subspace_energy=0.1)
    >>> hybrid(setting, [1000, 2500], 0.2681).risk.round(3), dp_gd(setting, [1000, 2500], 0.2681).risk.round(3)
    (array([0.101, 0.05 ]), array([0.567, 0.126]))
    """
    n, m = check_sizes(num_private, mu)
    alone = dp_gd(setting, n, m)
    fields = {name: getattr(alone, name).copy() for name in ("risk", "steps", "step_size", "clip")}
    fields["share"] = np.zeros(n.shape)
    for share in (*SHARES, 1.0):
        start = deepsets.risk(setting, n, m * share**0.5)
        if share < 1:
            tuned = _tune(setting, start, n, m * (1 - share) ** 0.5)
        else:
            zero = np.zeros(n.shape)
            tuned = Tuned(start, zero.astype(np.int64), zero, (setting.noise_std**2 + start) ** 0.5)
        better = tuned.risk < fields["risk"]
        for name in ("risk", "steps", "step_size", "clip"):
            fields[name] = np.where(better, getattr(tuned, name), fields[name])
        fields["share"] = np.where(better, share, fields["share"])
    return TunedHybrid(**fields)


# ---- state evolution in R^d ------------------------------------------------------------


def _checked_tuning(n: Array, mu: Array, steps: ArrayLike, step_size: ArrayLike, clip: ArrayLike) -> list[Array]:
    """All five, broadcast; or a clear error."""
    t, alpha, c = (np.asarray(value, float) for value in (steps, step_size, clip))
    if not (np.isfinite(t) & (t >= 0) & (t == np.floor(t))).all():
        raise InputError("steps must be whole numbers, at least 0")
    if not (np.isfinite(alpha) & (alpha >= 0)).all():
        raise InputError("step_size must be finite and at least 0")
    n, mu, t, alpha, c = np.broadcast_arrays(n, mu, t, alpha, c)
    if not (np.isfinite(c) | np.isinf(mu)).all():
        raise InputError("clip must be finite unless mu is infinite: without a clip there is no privacy")
    return [n, mu, t, alpha, c]


def _spectrum(kappa: Array, count: int = _NODES) -> tuple[Array, Array]:
    """Nodes and weights (P, count + 1), of sum 1, of the Marchenko-Pastur law at ``kappa = d / n`` (P,).

    Chebyshev's angles in ``l = 1 + kappa + 2 sqrt(kappa) cos(angle)`` integrate polynomials times the density exactly
    but for its factor 1/l, whose error is that of the total mass. So the last node, 0, takes the mass that the others
    lack: all polynomials up to degree 2 count are then exact, and the node has the true mass ``1 - n / d`` if d > n, of
    directions that no example shows. Without it DP gradient descent would look far too good there.
    """
    k = kappa[:, None]
    angle = np.arange(1, count + 1) * np.pi / (count + 1)
    nodes = 1 + k + 2 * np.sqrt(k) * np.cos(angle)
    weights = 2 / (count + 1) * np.sin(angle) ** 2 / nodes
    missing = np.maximum(1 - weights.sum(1, keepdims=True), 0)
    return np.concatenate([nodes, np.zeros_like(k)], 1), np.concatenate([weights, missing], 1)


def _clipped_residual(clip: Array, variance: Array) -> tuple[Array, Array, Array]:
    """Gain h, ``E clip_c(r)^2`` and the standard deviation D of the part of it uncorrelated with r; see (1)."""
    ratio = np.minimum(clip / np.sqrt(variance), 40.0)  # beyond 40 standard deviations nothing is clipped
    gain = erf(ratio / 2**0.5)
    density = np.exp(-(ratio**2) / 2) / (2 * np.pi) ** 0.5
    second = variance * (gain - 2 * ratio * density + ratio**2 * erfc(ratio / 2**0.5))
    return gain, second, np.sqrt(np.maximum(second - gain**2 * variance, 0))


def _noise_variance(sensitivity: Array, n: Array, mu: Array) -> Array:
    """Variance ``(sensitivity / (n mu))^2`` of one coordinate of a noisy mean, at mu > 0; 0 at mu = infinity."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.where(np.isinf(mu), 0.0, np.minimum((sensitivity / (n * mu)) ** 2, _MOST))


def _evolve(setting: LinearSetting, signal: Array, n: Array, mu: Array, steps: int, alpha: Array, clip: Array) -> Array:
    """Risk (P, C) of C tunings at each of P points; ``signal`` is the squared norm of the error at the start."""
    d, s2 = setting.d, setting.noise_std**2
    kappa = d / n
    # without clipping, R is of degree 2 steps in l: exact with as many nodes as steps. 80 are ample for 256 small steps
    eigen, p = _spectrum(kappa, max(_NODES, min(steps // 3, 1000)))
    column = kappa[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.where(eigen > 0, column * s2 * p / eigen, 0.0)  # at l = 0 no label noise is ever fitted: B stays 1
    start = signal[:, None]
    in_variance = [p * (eigen * start + column * s2), column * p * eigen**2, d * p * eigen]  # of (3)
    in_risk = [p * start, fitted, column * p * eigen, d * p]  # of (4)
    noise = np.minimum(d * steps * _noise_variance(clip, n[:, None], mu[:, None]), _MOST)
    alpha = np.minimum(alpha, 1e30)
    initial = s2 + start
    variance = np.broadcast_to(initial, alpha.shape)
    kept = np.ones((*alpha.shape, eigen.shape[1]))  # B
    distortion, private = np.zeros_like(kept), np.zeros_like(kept)  # D, V
    for step in range(steps):
        if step:
            variance = s2 * (1 - column) + _averages((kept**2, distortion**2, private), in_variance)
            variance = np.maximum(variance, 1e-12 * s2)
        gain, _, deviation = _clipped_residual(clip, variance)
        moving = np.where(variance < _HUGE * initial, alpha, 0.0)  # divergence ends here, before it overflows
        factor = 1 - (moving * gain)[..., None] * eigen[:, None]
        kept *= factor
        distortion *= factor
        distortion += (moving * deviation)[..., None]
        private *= factor
        private *= factor
        private += (moving**2 * noise)[..., None]
    return _averages((kept**2, (1 - kept) ** 2, distortion**2, private), in_risk)


def _averages(states: Iterable[Array], weights: Iterable[Array]) -> Array:
    """Sum over states (P, C, Q) of their averages (P, C) at weights (P, Q)."""
    return np.sum([(state @ weight[..., None])[..., 0] for state, weight in zip(states, weights, strict=True)], axis=0)


def _single_step(setting: LinearSetting, signal: Array, n: Array, mu: Array) -> Tuned:
    """The best single step at each of P points: in closed form but for the clip."""
    clips = _ONE_STEP_CLIPS * np.sqrt(signal + setting.noise_std**2)[:, None]
    step = _best_step(setting, signal, n, mu, clips)
    gain, _, _ = _clipped_residual(clips, (signal + setting.noise_std**2)[:, None])
    risk = signal[:, None] * (1 - step * gain)  # the value of a quadratic at its minimum
    index = risk.argmin(-1)[:, None]
    risk, step, clips = (np.take_along_axis(value, index, -1)[:, 0] for value in (risk, step, clips))
    return Tuned(risk, (step > 0).astype(np.int64), step, clips)


def _best_step(setting: LinearSetting, signal: Array, n: Array, mu: Array, clips: Array) -> Array:
    """Size (P, C) of the best single step, ``q h / (q h^2 + kappa E clip_c(y)^2 + d sigma^2)``; 0 at mu = 0."""
    gain, second, _ = _clipped_residual(clips, (signal + setting.noise_std**2)[:, None])
    noise = setting.d**2 * _noise_variance(clips, n[:, None], mu[:, None])
    power = signal[:, None] * gain**2
    return power / gain / (power + setting.d / n[:, None] * second + noise) * (mu[:, None] > 0)


def _tune(setting: LinearSetting, signal: Array, n: Array, mu: Array) -> Tuned:
    """Best tuning of DP gradient descent from a start of squared error ``signal``; arrays of one shape."""
    shape = n.shape
    signal, n, mu = (np.asarray(value, float).ravel() for value in (signal, n, mu))
    flat = _single_step(setting, signal, n, mu)
    for part in _chunks(np.flatnonzero((mu > 0) & (signal > 0)), len(CLIPS) * len(STEP_SIZES) * _NODES):
        start, n_, mu_ = signal[part], n[part], mu[part]
        sigma = np.sqrt(start + setting.noise_std**2)
        clips = CLIPS * sigma[:, None]
        unit = _best_step(setting, start, n_, mu_, clips)[..., None] * STEP_SIZES
        clips = np.repeat(clips, len(STEP_SIZES), 1)
        found = [np.full(len(part), np.inf), np.zeros(len(part), np.int64), np.zeros(len(part)), sigma]
        for steps in STEPS:
            sizes = unit.reshape(clips.shape) / steps**0.7
            risks = _evolve(setting, start, n_, mu_, steps, sizes, clips)
            _improve(found, np.arange(len(part)), risks, steps, sizes, clips)
        active = np.arange(len(part))
        for _ in range(_ROUNDS):
            best, best_steps, best_size, best_clip = (value.copy() for value in found)
            for steps in np.unique(best_steps[active]):
                group = active[best_steps[active] == steps]
                clips = best_clip[group][:, None] * _FINER_CLIPS
                # the same progress per step at every clip
                same = erf(best_clip / sigma / 2**0.5)[group, None] / erf(clips / sigma[group, None] / 2**0.5)
                unit = (best_size[group][:, None] * same)[..., None] * _FINER_STEP_SIZES
                clips = np.repeat(clips, len(_FINER_STEP_SIZES), 1)
                for more, count in ((1.0, int(steps)), (2**-0.85, 2 * int(steps))):
                    if count <= _MOST_STEPS:
                        sizes = unit.reshape(clips.shape) * more
                        risks = _evolve(setting, start[group], n_[group], mu_[group], count, sizes, clips)
                        _improve(found, group, risks, count, sizes, clips)
            # on where it paid and the best clip is still at the edge: where labels have little noise
            shift = np.abs(np.log(found[3] / best_clip))
            active = np.flatnonzero((found[0] < 0.99 * best) & (shift > 0.99 * np.log(_FINER_CLIPS[-1])))
        _keep_better(flat, part, found)
    flat = Tuned(np.fmin(flat.risk, signal), flat.steps, flat.step_size, flat.clip)
    return _reshaped(flat, shape)


def _improve(found: list[np.ndarray], where: np.ndarray, risks: Array, steps: int, sizes: Array, clips: Array) -> None:
    """Put the best of C tunings (P, C) into ``found`` (risk, steps, step_size, clip) at ``where`` if it is better."""
    risks = np.where(np.isnan(risks), np.inf, risks)
    index = risks.argmin(-1)[:, None]
    risk, size, clip = (np.take_along_axis(value, index, -1)[:, 0] for value in (risks, sizes, clips))
    better = risk < found[0][where]
    for array, value in zip(found, (risk, np.full(len(where), steps), size, clip), strict=True):
        array[where[better]] = value[better]


def _keep_better(flat: Tuned, part: np.ndarray, found: list[np.ndarray]) -> None:
    """Replace in ``flat`` what ``found`` improves."""
    better = found[0] < flat.risk[part]
    for array, value in zip((flat.risk, flat.steps, flat.step_size, flat.clip), found, strict=True):
        array[part[better]] = value[better]


def _reshaped(flat: Tuned, shape: tuple[int, ...]) -> Tuned:
    return Tuned(
        flat.risk.reshape(shape), flat.steps.reshape(shape), flat.step_size.reshape(shape), flat.clip.reshape(shape)
    )


def _chunks(index: np.ndarray, elements: int) -> list[np.ndarray]:
    """``index`` in pieces, such that an array of ``elements`` values for each index has about ``_CHUNK`` values."""
    size = max(1, _CHUNK // elements)
    return [index[i : i + size] for i in range(0, len(index), size)]


# ---- state evolution in the subspace ------------------------------------------------------------


def _search_projected(setting: LinearSetting, n: Array, mu: Array, flat: Tuned, part: np.ndarray) -> None:
    """Several projected steps at P points; improves ``flat`` at ``part``."""
    k, energy = setting.k, setting.captured_energy
    table = _moment_table(k, setting.residual_std, energy**0.5, setting.label_variance**0.5)
    clips = table.clips[:, None]
    rho_0, (rho, second) = table.rho[:, :1], table(energy**0.5 * np.ones_like(clips))
    variance = _noise_variance(clips, n[:, None, None], mu[:, None, None])  # (P, C, 1)
    single = energy * rho / (energy * rho**2 + (second - rho**2 * energy) / n[:, None, None] + k * variance)

    def search(found: list[np.ndarray], steps: int, alpha: Array, rows: np.ndarray) -> None:
        """Run recursion (5) for alpha (P', C, A) at the points ``rows``."""
        alpha = np.minimum(alpha, 1 / rho_0)
        noise = steps * variance[rows]
        b, s, v = np.ones_like(alpha), np.zeros_like(alpha), np.zeros_like(alpha)
        for _ in range(steps):
            e2 = energy * b**2 + s**2 + k * v
            rho, second = table(np.sqrt(e2))
            f = 1 - alpha * rho
            b, s = f * b, f * s + alpha * _deviation(rho, second, e2, n[rows][:, None, None])
            v = f**2 * v + alpha**2 * noise
        risk = setting.floor + np.where(e2 > _RETREAT**2 * energy, np.inf, energy * b**2 + s**2 + k * v)
        shape = (len(rows), -1)
        wide = np.broadcast_to(clips, alpha.shape).reshape(shape)
        _improve(found, rows, risk.reshape(shape), steps, alpha.reshape(shape), wide)

    count = len(n)
    found = [np.full(count, np.inf), np.zeros(count, np.int64), np.zeros(count), np.ones(count)]
    for steps in _PROJECTED_STEPS:
        search(found, steps, single * _PROJECTED_STEP_SIZES / steps**0.7, np.arange(count))
    _, best_steps, best_size, best_clip = (value.copy() for value in found)
    index = np.abs(clips[:, 0] - best_clip[:, None]).argmin(-1)
    ratio = best_size / single[np.arange(count), index, 0]
    for steps in np.unique(best_steps[best_steps > 0]):
        group = np.flatnonzero(best_steps == steps)
        sizes = single[group] * (ratio[group, None, None] * _FINER_STEP_SIZES)
        search(found, int(steps), sizes, group)
        search(found, 2 * int(steps), sizes * 2**-0.85, group)
    _keep_better(flat, part, found)


def _deviation(rho: Array, second: Array, e2: Array, n: Array) -> Array:
    """Sampling error of a mean of n clipped gradients, ``sqrt((E_2 - rho^2 e^2) / n)``."""
    return np.sqrt(np.maximum(second - rho**2 * e2, 0) / n)


class _MomentTable:
    """Moments of clipped gradients in the subspace at all clips of the search, quick to look up at any error.

    Splines in ``asinh(e / s')`` through exact values, sampled so densely that linear interpolation does. Errors beyond
    the largest of the table, which no sensible tuning visits, are taken for it.
    """

    _COLUMNS = 1024

    def __init__(self, k: int, residual_std: float, start: float, sigma: float) -> None:
        self.clips = _PROJECTED_CLIPS * k**0.5 * sigma
        self.residual_std = residual_std
        top = np.arcsinh(_RETREAT * start / residual_std)
        coarse = np.linspace(0, top, 33)
        rho, second = deepsets.clipped_moments(k, residual_std * np.sinh(coarse), residual_std, self.clips[:, None])
        fine = np.linspace(0, top, self._COLUMNS)
        self.scale = (self._COLUMNS - 1) / top
        self.rho, self.second = (CubicSpline(coarse, value, axis=1)(fine) for value in (rho, second))
        self.row = np.arange(len(self.clips))[:, None] * self._COLUMNS

    def __call__(self, error: Array) -> tuple[Array, Array]:
        """``(rho, second_moment)`` at errors (..., clips, any)."""
        place = np.minimum(np.arcsinh(error / self.residual_std) * self.scale, self._COLUMNS - 1.001)
        left = place.astype(np.intp)
        place -= left
        left += self.row
        right = left + 1
        rho = (1 - place) * self.rho.take(left) + place * self.rho.take(right)
        return rho, (1 - place) * self.second.take(left) + place * self.second.take(right)


@lru_cache(maxsize=64)
def _moment_table(k: int, residual_std: float, start: float, sigma: float) -> _MomentTable:
    return _MomentTable(k, residual_std, start, sigma)
