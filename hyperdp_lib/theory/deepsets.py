r"""Risk of DP-DeepSets in the linear setting, from exact moments of the clipped embedding.

With the learned subspace ``V`` (orthonormal, d x k), an example is embedded as ``phi = clip_C(V^T x y)``; the release
is ``z = mean phi + N(0, (C / n mu)^2 I_k)`` and the estimate ``m V z``. Clip norm 0 stands for the *normalised*
embedding ``phi = u / |u|`` of sensitivity 1, to which clipping tends, rescaled, as C goes to 0.

Moments (exact). Let ``a = V^T theta`` with norm ``alpha``, and ``v = V^T x``. By symmetry about ``a``, ``E phi = rho
a``. In polar coordinates ``v`` has length ``r ~ chi_k`` and, independently, cosine ``t`` with ``a``, of density
proportional to ``(1 - t^2)^((k - 3) / 2)``. Given both, ``y ~ N(M, s'^2)`` with ``M = alpha r t``, and ``phi = (v /
r) clip(r y)``. Mean and second moment of a clipped normal variable are elementary, so two smooth integrals are left:
Gauss-Legendre in ``r``, Gauss-Gegenbauer in ``t``.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh_tridiagonal
from scipy.special import gammaln, ndtr

from hyperdp_lib.data import InputError
from hyperdp_lib.theory.setting import Array, LinearSetting, check_sizes

_RADIAL, _ANGULAR = 96, 64  # quadrature nodes
CLIP_GRID = np.concatenate([[0.0], np.geomspace(0.015, 18.0, 60)])  # in units of sqrt(k) sigma_y


def clipped_moments(
    k: int, alpha: ArrayLike, residual_std: ArrayLike, clip_norm: ArrayLike
) -> tuple[Array, Array]:
    """``(rho, second_moment)`` of the clipped embedding: ``E phi = rho a`` and ``E |phi|^2``.

    Parameters
    ----------
    k : dimension of the embedding, at least 1.
    alpha : |a|, at least 0 (at 0, rho is the limit).
    residual_std : s' > 0, standard deviation of y given v.
    clip_norm : C >= 0; 0 is the normalised embedding, infinity no clipping. The three are broadcast.

    Examples
    --------
    >>> rho, second_moment = clipped_moments(k=5, alpha=1.0, residual_std=0.5, clip_norm=[0.0, 1.0, np.inf])
    >>> rho.round(3), second_moment.round(3)
    (array([0.326, 0.308, 1.   ]), array([1.  , 0.74, 8.25]))
    """
    alpha, s, c = np.broadcast_arrays(*(np.asarray(value, float) for value in (alpha, residual_std, clip_norm)))
    if not ((alpha >= 0) & (s > 0) & (c >= 0)).all():
        raise InputError("need alpha >= 0, residual_std > 0 and clip_norm >= 0")
    alpha, s, c = (value[..., None, None] for value in (np.maximum(alpha, 1e-6 * s), s, c))
    r, t, weight = _polar_nodes(k)
    m = alpha * r * t
    unclipped = np.isinf(c[..., 0, 0])
    finite = np.where(np.isinf(c), 1.0, c)  # where nothing is clipped the integrals are not used
    bound = finite / r  # |y| is clipped here
    low, high = (-bound - m) / s, (bound - m) / s
    p_low, p_high, d_low, d_high = ndtr(low), ndtr(high), _density(low), _density(high)
    inside = p_high - p_low
    first = m * inside + s * (d_low - d_high)  # E[y; |y| < bound]
    second = (m**2 + s**2) * inside + 2 * m * s * (d_low - d_high) + s**2 * (low * d_low - high * d_high)
    clipped_mean = r * (first + bound * (1 - p_high - p_low))
    # the sign of y, for the normalised embedding
    mean = np.where(c == 0, 2 * ndtr(m / s) - 1, clipped_mean)
    rho = (weight * t * mean).sum((-2, -1)) / alpha[..., 0, 0]
    square = (weight * (r**2 * second + finite**2 * (1 - inside))).sum((-2, -1))
    alpha, s, c = (value[..., 0, 0] for value in (alpha, s, c))
    rho = np.where(unclipped, 1.0, rho)
    return rho, np.where(c == 0, 1.0, np.where(unclipped, k * (alpha**2 + s**2) + 2 * alpha**2, square))


def risk(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike, clip_norm: ArrayLike | None = None
) -> Array:
    r"""Risk of DP-DeepSets with the best decoder scale: ``gamma^2 + eta tau^2 + A N / (A + N)``.

    ``N = ((E|phi|^2 - rho^2 A) / n + k C^2 / (n mu)^2) / rho^2`` is the noise relative to the signal. Exact for a known
    subspace, for equal principal angles, and without clipping; otherwise a close approximation, as |a| then varies.

    Parameters
    ----------
    num_private, mu : arrays that are broadcast; mu = 0 gives the trivial risk, mu = infinity no privacy noise.
    clip_norm : C; ``None`` takes the best of `CLIP_GRID`, which depends on public quantities only.

    Examples
    --------
    >>> from hyperdp_lib.theory.setting import gdp_mu
    >>> float(risk(LinearSetting(), 1000, gdp_mu(1.0, delta=1e-5)).round(4))
    0.0211
    """
    n, mu = check_sizes(num_private, mu)
    if clip_norm is None:
        clip_norm = optimal_clip(setting, n, mu)
    a = setting.captured_energy
    return setting.floor + _shrunk(a, _relative_noise(setting, n, mu, clip_norm).sum(0))


def optimal_clip(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """The clip norm of the smallest risk; 0 is the normalised embedding. Public quantities only, so free of charge."""
    n, mu = check_sizes(num_private, mu)
    clips = CLIP_GRID * np.sqrt(setting.k * setting.label_variance)
    noise = _relative_noise(setting, n[..., None], mu[..., None], clips).sum(0)
    return clips[noise.argmin(-1)]


def rule_of_thumb_clip(setting: LinearSetting) -> float:
    """Half of ``sqrt(k) sigma_y``: near the best at every n and mu."""
    return 0.5 * (setting.k * setting.label_variance) ** 0.5


def decoder_scale(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike, clip_norm: ArrayLike
) -> Array:
    """The m of the estimate ``m V z`` with the smallest risk, ``A / (rho (A + N))``; it knows n and mu (Wiener)."""
    n, mu = check_sizes(num_private, mu)
    a = setting.captured_energy
    rho, _ = _moments(setting, clip_norm)
    return a / (rho * (a + _relative_noise(setting, n, mu, clip_norm).sum(0)))


def risk_bound(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """Upper bound, proven and without anything to tune: the normalised embedding (equal principal angles).

    ``N <= (pi / 2) (k + 2) sigma_y^2 (1/n + k / (n mu)^2)``.
    """
    n, mu = check_sizes(num_private, mu)
    noise = np.pi / 2 * (setting.k + 2) * setting.label_variance * (1 / n + setting.k * _inverse_square(n * mu))
    return setting.floor + _shrunk(setting.captured_energy, noise)


def error_budget(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> dict[str, Array]:
    """The risk at the best clip as a sum: sampling, privacy, shrinkage (bias), subspace, misspecification."""
    n, mu = check_sizes(num_private, mu)
    a = setting.captured_energy
    sampling, privacy = _relative_noise(setting, n, mu, optimal_clip(setting, n, mu))
    total = sampling + privacy
    with np.errstate(invalid="ignore"):
        share = np.where(np.isinf(total), 1.0, np.where(np.isinf(privacy), 1.0, privacy / total))
    keep = a / (a + total) if a else np.zeros_like(total)
    variance = _shrunk(a, total) * keep
    return {
        "sampling": variance * (1 - share),
        "privacy": variance * share,
        "shrinkage": _shrunk(a, total) * (1 - keep),
        "subspace": np.full_like(total, setting.eta * setting.tau**2),
        "misspecification": np.full_like(total, setting.off_subspace_energy),
    }


def second_moment_risk(setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike) -> Array:
    """Heuristic leading terms when the release also holds ``v v^T`` and the decoder solves for theta; optimistic.

    Sampling noise falls from ``k sigma_y^2 + tau^2`` to ``k s'^2``, privacy noise rises: a release richer than one mean
    pays when n is large compared with k / mu.
    """
    n, mu = check_sizes(num_private, mu)
    k, sigma = setting.k, setting.label_variance**0.5
    with np.errstate(divide="ignore"):
        sampling = k * setting.residual_std**2 / np.maximum(n - k - 1, 0.0)
    privacy = k**2 * (sigma + setting.tau * ((k + 1) / 2) ** 0.5) ** 2 * _inverse_square(n * mu)
    return setting.floor + _shrunk(setting.captured_energy, sampling + privacy)


def gaussian_task_risk(
    setting: LinearSetting, num_private: ArrayLike, mu: ArrayLike, clip_norm: float
) -> Array:
    """Risk when tasks have Gaussian coefficients, ``w ~ N(0, tau^2 / k)``, instead of a fixed norm; linear decoder.

    A hard clip forgets |w|, which a linear decoder cannot restore: it costs far more here. (Equal principal angles.)
    """
    n, mu = check_sizes(num_private, mu)
    squares, weight = _chi_square_nodes(setting.k)
    squares = squares * setting.tau**2 / setting.k  # |w|^2
    alpha = np.sqrt((1 - setting.eta) * squares)
    residual = np.sqrt(setting.noise_std**2 + setting.off_subspace_energy + setting.eta * squares)
    rho, second = clipped_moments(setting.k, alpha, residual, clip_norm)
    s1 = (weight * rho * alpha**2).sum()
    power, square = (weight * rho**2 * alpha**2).sum(), (weight * second).sum()
    noise = setting.k * (clip_norm or 1.0) ** 2 * _inverse_square(n * mu)
    return setting.trivial_risk - s1**2 / (power * (1 - 1 / n) + square / n + noise)


def _relative_noise(setting: LinearSetting, n: Array, mu: Array, clip_norm: ArrayLike) -> Array:
    """N of Theorem 1 in its two parts, sampling and privacy, stacked in front."""
    c = np.asarray(clip_norm, float)
    c = np.where(c < 1e-9 * setting.label_variance**0.5, 0.0, c)  # the limit, before rho**2 underflows
    rho, second = _moments(setting, c)
    sampling = (second - rho**2 * setting.captured_energy) / n
    with np.errstate(invalid="ignore"):  # no clip and no privacy: infinity times 0
        privacy = setting.k * np.where(c == 0, 1.0, c) ** 2 * _inverse_square(n * mu)
    privacy = np.where(np.isinf(mu), 0.0, privacy)
    return np.stack(np.broadcast_arrays(sampling, privacy)) / rho**2


def _moments(setting: LinearSetting, clip_norm: ArrayLike) -> tuple[Array, Array]:
    """Moments at the clip norms in use; each is computed once, however many points share it."""
    clips, where = np.unique(np.asarray(clip_norm, float), return_inverse=True)
    rho, second = _moments_at(
        setting.k, setting.captured_energy**0.5, setting.residual_std, tuple(clips.tolist())
    )
    where = where.reshape(np.shape(clip_norm))
    return rho[where], second[where]


@lru_cache(maxsize=256)
def _moments_at(k: int, alpha: float, residual_std: float, clips: tuple[float, ...]) -> tuple[Array, Array]:
    return clipped_moments(k, alpha, residual_std, np.array(clips))


def _shrunk(signal: float, noise: Array) -> Array:
    """``A N / (A + N)``, also for N = infinity."""
    return signal / (1 + signal / noise)


def _inverse_square(value: Array) -> Array:
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / np.square(value)


def _density(value: Array) -> Array:
    return np.exp(-np.minimum(np.square(value), 1400.0) / 2) / (2 * np.pi) ** 0.5


@lru_cache(maxsize=32)
def _polar_nodes(k: int) -> tuple[Array, Array, Array]:
    """Length (R, 1), cosine (1, T) in (0, 1] and weights (R, T), of sum 1; the integrands are even in the cosine."""
    centre = k**0.5
    low, high = max(0.0, centre - 9.0), centre + 9.0  # chi_k has standard deviation below 1
    nodes, weights = np.polynomial.legendre.leggauss(_RADIAL)
    r = low + (high - low) * (nodes + 1) / 2
    radial = weights * np.exp((k - 1) * np.log(r) - r**2 / 2 - (k / 2 - 1) * np.log(2) - gammaln(k / 2))
    radial *= (high - low) / 2
    if k == 1:
        return r[:, None], np.ones((1, 1)), (radial / radial.sum())[:, None]
    # Golub-Welsch for the density (1 - t^2)^((k - 3) / 2): off-diagonals of its Jacobi matrix
    j = np.arange(1, _ANGULAR)
    beta = (k - 2) / 2  # Gegenbauer index
    with np.errstate(divide="ignore", invalid="ignore"):
        squares = j * (j + 2 * beta - 1) / (4 * (j + beta) * (j + beta - 1))
    if k == 2:
        squares[0] = 0.5  # the Chebyshev limit of 0 / 0
    t, vectors = eigh_tridiagonal(np.zeros(_ANGULAR), np.sqrt(squares))
    half = t > 0
    angular = 2 * vectors[0, half] ** 2
    return r[:, None], t[half][None], (radial / radial.sum())[:, None] * (angular / angular.sum())[None]


def _chi_square_nodes(k: int, count: int = 48) -> tuple[Array, Array]:
    """Nodes and weights, of sum 1, for a chi-square variable of k degrees of freedom (generalised Gauss-Laguerre)."""
    shape = k / 2 - 1
    j = np.arange(count)
    nodes, vectors = eigh_tridiagonal(2 * j + 1 + shape, np.sqrt(j[1:] * (j[1:] + shape)))
    return 2 * nodes, vectors[0] ** 2
