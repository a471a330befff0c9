r"""What public tasks teach about the shared subspace, and how many are too few.

Take the self-normalised moment of each public task, ``g_t = X_t^T y_t / (sqrt(m) |y_t|)``, and the top k eigenvectors
of ``mean g_t g_t^T``. Without misspecification the part of ``g_t`` outside the subspace is exactly ``N(0, I/m)`` and
independent of the part inside, whose second moment is ``(1 + lambda) I / m`` with ``lambda = (m - 1) tau^2 / (k
sigma_y^2)``. That is the spiked covariance model with aspect ratio ``c = (d - k) / T``, whose eigenvectors are known
in the limit (Paul 2007; Benaych-Georges & Nadakuditi 2011): nothing is learned below ``lambda = sqrt(c)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperdp_lib.theory.setting import LinearSetting


def signal_to_noise(setting: LinearSetting) -> float:
    """lambda: how far the moments' variance inside the subspace exceeds that outside, relative to the latter."""
    m, variance = setting.examples_per_task, setting.label_variance
    outside = setting.off_subspace_energy / (setting.d - setting.k) if setting.off_subspace_energy else 0.0
    inside = setting.tau**2 / setting.k
    return (m - 1) * (inside - outside) / variance / (1 + (m - 1) * outside / variance)


def subspace_error(setting: LinearSetting) -> float:
    """eta in [0, 1], mean squared sine of the principal angles, of the learned subspace (limit of large dimensions).

    >>> from hyperdp_lib.theory.setting import LinearSetting
    >>> round(subspace_error(LinearSetting(d=200, k=5, num_public_tasks=2000, examples_per_task=50)), 4)
    0.0139
    >>> subspace_error(LinearSetting(num_public_tasks=20, examples_per_task=10))  # too few: nothing is learned
    1.0
    """
    c = (setting.d - setting.k) / setting.num_public_tasks
    strength = signal_to_noise(setting)
    if c == 0:
        return 0.0  # k = d: there is nothing to learn
    if strength <= math.sqrt(c):
        return 1.0
    return c * (1 + strength) / (strength * (strength + c))


def threshold_tasks(setting: LinearSetting) -> float:
    """The number of public tasks T below which they teach nothing: ``(d - k) / lambda^2``; may be infinite.

    >>> from hyperdp_lib.theory.setting import LinearSetting
    >>> round(threshold_tasks(LinearSetting(examples_per_task=10)))
    94
    """
    strength = signal_to_noise(setting)
    return (setting.d - setting.k) / strength**2 if strength > 0 else math.inf


def plain_subspace_error(setting: LinearSetting) -> float:
    """eta, to first order, for the plain moments ``X^T y / m`` of well-specified tasks; worse for m above about 15.

    The norm |y|, random and tied to the signal, is then part of the noise.
    """
    d, k, m, t = setting.d, setting.k, setting.examples_per_task, setting.num_public_tasks
    ratio = k * setting.label_variance / setting.tau**2
    first = (d - k) * ratio / (t * m)
    return min(1.0, first * (1 + 2 / m) * (1 + 3 / m + ratio / m) / (1 + 1 / m) ** 2)
