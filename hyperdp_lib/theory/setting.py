r"""The linear setting: public and private regression tasks that share a subspace.

A task is a vector ``theta = U w + nu`` of dimension ``d``. ``U`` is orthonormal, d x k, the same for all tasks; ``w``
is uniform on the sphere of radius ``tau`` in k dimensions; ``nu`` is orthogonal to ``U``, of squared norm
``off_subspace_energy`` and uniform direction. An example is ``x ~ N(0, I_d)`` with label ``y = <x, theta> + s xi``,
``xi ~ N(0, 1)``. The risk of an estimate is ``E |estimate - theta|^2``, which is its excess prediction error.

Public: ``num_public_tasks`` tasks of ``examples_per_task`` examples each. Private: one task of ``num_private``
examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hyperdp_lib import accounting
from hyperdp_lib.data import InputError
from hyperdp_lib.theory import subspace

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearSetting:
    """Everything about the synthetic world but the size of the private set and its privacy budget. All of it is public.

    Parameters
    ----------
    d : dimension of the task vector, at least 2.
    k : dimension of the shared subspace, 1 <= k <= d.
    tau : norm of the part of a task in the subspace, above 0.
    noise_std : standard deviation s of the label noise, above 0.
    off_subspace_energy : gamma^2, squared norm of the part outside the subspace; must be 0 if k = d.
    num_public_tasks, examples_per_task : T >= 1 and m >= 2. What they teach about ``U`` is ``subspace_error``.
    subspace_error : eta in [0, 1], the mean squared sine of the angles between the learned and the true subspace.
        ``None`` means the formula of `theory.subspace` for T and m; 0 means that ``U`` is known.

    Examples
    --------
    >>> setting = LinearSetting(d=200, k=5)
    >>> round(setting.eta, 4), setting.label_variance, setting.trivial_risk
    (0.0139, 1.25, 1.0)
    >>> LinearSetting(d=5, k=9)
    Traceback (most recent call last):
    ...
    hyperdp_lib.data.InputError: k is the dimension of a subspace of R^d: need 1 <= k <= d, got k = 9, d = 5
    """

    d: int = 200
    k: int = 5
    tau: float = 1.0
    noise_std: float = 0.5
    off_subspace_energy: float = 0.0
    num_public_tasks: int = 2000
    examples_per_task: int = 50
    subspace_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("d", "k", "num_public_tasks", "examples_per_task"):
            if not isinstance(getattr(self, name), (int, np.integer)) or isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if self.d < 2:
            raise InputError(f"d must be at least 2, got {self.d}")
        if not 1 <= self.k <= self.d:
            raise InputError(
                f"k is the dimension of a subspace of R^d: need 1 <= k <= d, got k = {self.k}, d = {self.d}"
            )
        for name in ("tau", "noise_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.off_subspace_energy < math.inf:
            raise InputError(f"off_subspace_energy is a squared norm: at least 0, got {self.off_subspace_energy}")
        if self.off_subspace_energy and self.k == self.d:
            raise InputError("there is nothing outside the subspace when k = d: off_subspace_energy must be 0")
        if self.num_public_tasks < 1 or self.examples_per_task < 2:
            raise InputError("need num_public_tasks >= 1 and examples_per_task >= 2 (or give subspace_error)")
        if self.subspace_error is not None and not 0 <= self.subspace_error <= 1:
            raise InputError(f"subspace_error is between 0 and 1 or None, got {self.subspace_error}")

    @property
    def eta(self) -> float:
        """Mean squared sine between the learned and the true subspace."""
        if self.subspace_error is not None:
            return float(self.subspace_error)
        return float(subspace.subspace_error(self))

    @property
    def label_variance(self) -> float:
        """sigma_y^2 = tau^2 + gamma^2 + s^2."""
        return self.tau**2 + self.off_subspace_energy + self.noise_std**2

    @property
    def captured_energy(self) -> float:
        """A = (1 - eta) tau^2: squared norm of the task's projection on the learned subspace."""
        return (1 - self.eta) * self.tau**2

    @property
    def residual_std(self) -> float:
        """s': standard deviation of a label given the projection of its x on the learned subspace."""
        return math.sqrt(self.label_variance - self.captured_energy)

    @property
    def floor(self) -> float:
        """b = gamma^2 + eta tau^2: error of everything that stays inside the learned subspace, however large n."""
        return self.off_subspace_energy + self.eta * self.tau**2

    @property
    def trivial_risk(self) -> float:
        """tau^2 + gamma^2: risk of answering 0, the best guess of one who has public data only."""
        return self.tau**2 + self.off_subspace_energy


def gdp_mu(epsilon: ArrayLike, delta: float) -> Array:
    """mu of the mu-GDP guarantee that is exactly (epsilon, delta)-DP; the same shape as ``epsilon``.

    Infinity (no privacy) gives infinity, 0 (no private data seen) gives 0.

    >>> gdp_mu([0.5, 1.0, 8.0], delta=1e-5).round(4)
    array([0.1422, 0.2681, 1.666 ])
    """

    def one(value: float) -> float:
        if value == 0:
            return 0.0
        noise = accounting.noise_multiplier(value, delta)
        return 1 / noise if noise else math.inf

    values = np.asarray(epsilon, float)
    return np.array([one(float(value)) for value in values.ravel()]).reshape(values.shape)


def check_sizes(num_private: ArrayLike, mu: ArrayLike, delta: float | None = None) -> tuple[Array, Array]:
    """``num_private`` and ``mu`` as broadcast float arrays.

    Raises
    ------
    InputError
        Fewer than 2 private examples; a mu that is negative or not a number; ``delta`` (if given) outside (0, 1/n),
        where (epsilon, delta)-DP would allow to publish a record at random.
    """
    n, m = np.broadcast_arrays(np.asarray(num_private, float), np.asarray(mu, float))
    if not (np.isfinite(n) & (n >= 2)).all():
        raise InputError("num_private must be at least 2")
    if not (m >= 0).all():
        raise InputError("mu must be at least 0 (infinity means no privacy)")
    if delta is not None and not (0 < delta and (n * delta < 1).all()):
        raise InputError(
            f"delta must be above 0 and below 1/n = {1 / n.max():.2g}, got {delta}: "
            "a larger one would allow to publish one of n records"
        )
    return n, m
