r"""Every procedure of the theory, run on random data. No formula of the theory is used, only the model of the data.

A function takes a ``numpy.random.Generator``, the setting, the size of the private set, ``mu`` and **all** tuning,
which is public: nothing is chosen here. It returns the mean squared error ``|estimate - theta|^2`` over independent
worlds as a `Simulated`. From `LinearSetting` only the parameters are read, never ``eta`` or what follows from it, which
are formulas.

Privacy is by noise of standard deviation ``sensitivity / mu`` on a sum, with the sensitivity of zero-out adjacency: the
largest norm of one record's contribution.

What is exact. ``x ~ N(0, I_d)`` is isotropic. So a learner that sees ``x`` through an orthonormal basis ``B`` only
sees ``v = B'x ~ N(0, I_k)`` and ``y = <v, a> + s' xi`` with ``a = B' theta`` and ``s'^2 = s^2 + |theta|^2 - |a|^2``:
this is what `dp_deepsets`, `second_moments` and `projected_dp_gd` draw. The long ways, with x in R^d, are
`dp_deepsets_ambient` and ``public_subspace(..., materialise=True)``; tests compare the two.

Random numbers: `streams` gives each grid point its own generator; a result depends on it and on the arguments only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh

from hyperdp_lib.data import InputError
from hyperdp_lib.theory.setting import Array, LinearSetting, check_sizes

Tasks = Literal["sphere", "gaussian"]
Moments = Literal["self-normalised", "plain"]

_BLOCK = 2**20  # numbers drawn at a time where blocks are free to choose: they stay in the cache
_LARGEST = 2**27  # numbers in one data matrix; in single precision that is half a gigabyte


@dataclass(frozen=True)
class Simulated:
    """Squared errors of independent repetitions; arrays if several tunings ran on the same data, floats otherwise.

    Attributes
    ----------
    mean, standard_error, standard_deviation : float or array
        Of the squared error; the standard error is that of the mean.
    repetitions : int
        At least 2.

    Examples
    --------
    >>> Simulated.of(np.array([1.0, 3.0]))
    Simulated(mean=2.0, standard_error=1.0, standard_deviation=1.4142135623730951, repetitions=2)
    """

    mean: float | Array
    standard_error: float | Array
    standard_deviation: float | Array
    repetitions: int

    @classmethod
    def of(cls, samples: ArrayLike) -> Simulated:
        """From squared errors of shape (repetitions, ...)."""
        values = np.asarray(samples, float)
        if len(values) < 2:
            raise InputError(f"a simulation needs at least 2 repetitions, got {len(values)}")
        if not np.isfinite(values).all():
            raise InputError("the simulated procedure diverges: take smaller steps or a larger ridge")
        mean, spread = values.mean(0), values.std(0, ddof=1)
        error = spread / math.sqrt(len(values))
        if values.ndim == 1:
            return cls(float(mean), float(error), float(spread), len(values))
        return cls(mean, error, spread, len(values))

    def at(self, *index: int) -> Simulated:
        """One of several tunings.

        >>> Simulated.of([[1.0, 2.0], [3.0, 2.0]]).at(1).mean
        2.0
        """
        mean, error, spread = (
            float(np.asarray(value)[index]) for value in (self.mean, self.standard_error, self.standard_deviation)
        )
        return Simulated(mean, error, spread, self.repetitions)


@dataclass(frozen=True, eq=False)
class LearnedSubspace:
    """Two orthonormal bases, each (d, k): the one all tasks share, and the one that public data gave."""

    true: Array
    learned: Array

    @property
    def squared_sines(self) -> Array:
        """Squared sines of the k principal angles, ascending."""
        cosines = np.linalg.svd(self.true.T @ self.learned, compute_uv=False)
        return np.clip(1 - cosines**2, 0, 1)

    @property
    def error(self) -> float:
        """eta: their mean."""
        return float(self.squared_sines.mean())


Subspace = LearnedSubspace | float | Array | None


def streams(seed: int | np.random.SeedSequence, count: int) -> list[np.random.Generator]:
    """``count`` independent generators, one for each point of a grid.

    >>> first, second = streams(7, 2)
    >>> bool(first.random() == streams(7, 2)[0].random()), bool(first.random() == second.random())
    (True, False)
    """
    root = seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
    # The children are named by their position, so the same root gives the same streams however often it was used.
    keys = [(*root.spawn_key, i) for i in range(count)]
    return [np.random.default_rng(np.random.SeedSequence(root.entropy, spawn_key=key)) for key in keys]


def deepsets_repetitions(num_private: float, k: int) -> int:
    """Repetitions for a procedure that works in R^k: 60 to 1500, about three million numbers drawn.

    >>> deepsets_repetitions(1000, 5), deepsets_repetitions(100, 3), deepsets_repetitions(10**6, 10)
    (600, 1500, 60)
    """
    return int(np.clip(3e6 / (num_private * k), 60, 1500))


def descent_repetitions(num_private: float, d: int, steps: int = 1) -> int:
    """Repetitions for gradient descent in R^d: 2 to 40, so that a point takes about a second.

    >>> descent_repetitions(1000, 200, 64), descent_repetitions(300, 50, 16), descent_repetitions(20_000, 1000, 128)
    (11, 40, 2)
    """
    return int(np.clip(1.5e8 / (num_private * d * max(steps, 2)), 2, 40))


# ---- the model of the data ------------------------------------------------------------


def random_basis(rng: np.random.Generator, d: int, k: int) -> Array:
    """Orthonormal basis (d, k) of a uniformly random subspace."""
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


def draw_coordinates(rng: np.random.Generator, setting: LinearSetting, count: int, tasks: Tasks = "sphere") -> Array:
    """Coordinates w of ``count`` tasks, (count, k): uniform on the sphere of radius tau, or N(0, tau^2/k I)."""
    normal = rng.standard_normal((count, setting.k))
    if tasks == "gaussian":
        return normal * (setting.tau / math.sqrt(setting.k))
    if tasks == "sphere":
        return setting.tau * _directions(normal)
    raise InputError(f'tasks are "sphere" or "gaussian", got {tasks!r}')


def draw_tasks(
    rng: np.random.Generator, setting: LinearSetting, basis: Array, count: int, tasks: Tasks = "sphere"
) -> Array:
    """``count`` task vectors theta = U w + nu, (count, d)."""
    theta = draw_coordinates(rng, setting, count, tasks) @ basis.T
    if setting.off_subspace_energy:
        outside = rng.standard_normal(theta.shape)
        outside -= outside @ basis @ basis.T
        theta += math.sqrt(setting.off_subspace_energy) * _directions(outside)
    return theta


def draw_examples(
    rng: np.random.Generator, setting: LinearSetting, theta: Array, num_examples: int, dtype: type = np.float32
) -> tuple[NDArray, NDArray]:
    """Inputs (tasks, n, d) and labels (tasks, n) of tasks theta (tasks, d), in single precision unless told."""
    if theta.size * num_examples > _LARGEST:
        raise InputError(f"{num_examples} examples of dimension {theta.shape[1]} do not fit in memory here")
    x = rng.standard_normal((len(theta), num_examples, theta.shape[1]), dtype=dtype)
    noise = rng.standard_normal(x.shape[:2], dtype=dtype)
    y = (x @ theta.astype(dtype)[..., None])[..., 0] + dtype(setting.noise_std) * noise
    return x, y


def seen_tasks(
    rng: np.random.Generator, setting: LinearSetting, count: int, subspace: Subspace = None, tasks: Tasks = "sphere"
) -> tuple[Array, Array]:
    """Tasks through a k-dimensional subspace: projections a (count, k), and the energy that is missed (count,).

    ``subspace`` is a `LearnedSubspace`; or the squared sines of its k angles with U (one number: all equal), then the
    part of theta outside U is taken to be outside the learned subspace too; or None: U is known.
    """
    if isinstance(subspace, LearnedSubspace):
        theta = draw_tasks(rng, setting, subspace.true, count, tasks)
        seen = theta @ subspace.learned
        return seen, np.maximum((theta**2).sum(1) - (seen**2).sum(1), 0)
    sines = np.broadcast_to(np.asarray(0.0 if subspace is None else subspace, float), (setting.k,))
    if not ((sines >= 0) & (sines <= 1)).all():
        raise InputError("squared sines are between 0 and 1")
    w = draw_coordinates(rng, setting, count, tasks)
    return np.sqrt(1 - sines) * w, (sines * w**2).sum(1) + setting.off_subspace_energy


def _seen_examples(
    rng: np.random.Generator, setting: LinearSetting, seen: Array, missed: Array, num_examples: int,
    dtype: type = np.float64,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """What remains of n examples of each task in R^k: v (tasks, n, k) and y (tasks, n). Exact, see the module."""
    v = rng.standard_normal((len(seen), num_examples, seen.shape[1]), dtype=dtype)
    spread: NDArray = np.sqrt(setting.noise_std**2 + missed).astype(dtype)
    y = (v @ seen.astype(dtype)[..., None])[..., 0] + spread[:, None] * rng.standard_normal(v.shape[:2], dtype=dtype)
    return v, y


def _directions(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---- privacy: one place for the clip, one for the noise ------------------------------------------------------------


def clip_factor(norms: NDArray, clip: ArrayLike) -> NDArray:
    """min(1, clip / norm). A clip of 0 stands for the normalised embedding, 1 / norm; infinity for no clipping.

    >>> norms = np.array([0.5, 2.0])
    >>> clip_factor(norms, 1.0), clip_factor(norms, 0.0), clip_factor(norms, np.inf)
    (array([1. , 0.5]), array([2. , 0.5]), array([1., 1.]))
    """
    limit = np.asarray(clip, norms.dtype)
    safe = np.maximum(norms, np.finfo(norms.dtype).tiny)
    with np.errstate(over="ignore"):  # clip / tiny may be infinite; the minimum with 1 is not
        return np.where(limit == 0, 1 / safe, np.minimum(1, limit / safe)).astype(norms.dtype)


def sensitivity(clip: ArrayLike) -> Array:
    """Largest norm of one record's clipped contribution: the clip, and 1 if normalised (clip 0)."""
    limit = np.asarray(clip, float)
    if not (limit >= 0).all():
        raise InputError("a clip norm is at least 0 (0: normalise; infinity: do not clip)")
    return np.where(limit == 0, 1.0, limit)


def privacy_noise(rng: np.random.Generator, sensitivity: ArrayLike, mu: float, shape: tuple[int, ...]) -> Array:
    """Gaussian noise of standard deviation sensitivity / mu; zeros if mu is infinite (no privacy).

    ``sensitivity`` broadcasts against ``shape``. Raises InputError at mu = 0 (nothing may be released) and for an
    infinite sensitivity at a finite mu.
    """
    bound = np.asarray(sensitivity, float)
    if math.isinf(mu):
        return np.zeros(shape)
    if not mu > 0:
        raise InputError("nothing can be released at mu = 0: the risk is that of the best guess from public data")
    if not np.isfinite(bound).all():
        raise InputError("privacy needs a finite clip norm: without one a single record can move the sum without limit")
    return rng.standard_normal(shape) * (bound / mu)


# ---- what public data teach ------------------------------------------------------------


def public_subspace(
    rng: np.random.Generator, setting: LinearSetting, *, moments: Moments = "self-normalised",
    materialise: bool = False, tasks: Tasks = "sphere",
) -> LearnedSubspace:  # fmt: skip
    """The top k eigenvectors of the average of g g' over the public tasks.

    ``g = X'y / (sqrt(m) |y|)`` ("self-normalised") or ``X'y / m`` ("plain"). Given the inputs along U and along nu,
    all else in ``X'y`` is ``|y|`` times standard normal, which is exact and costs T (m k + d) random numbers;
    ``materialise`` draws all T m d inputs instead.

    >>> rng = np.random.default_rng(0)
    >>> round(public_subspace(rng, LinearSetting(d=50, k=3, num_public_tasks=500, examples_per_task=30)).error, 2)
    0.01
    """
    if moments not in ("self-normalised", "plain"):
        raise InputError(f'moments are "self-normalised" or "plain", got {moments!r}')
    d, k, m = setting.d, setting.k, setting.examples_per_task
    true = random_basis(rng, d, k)
    draw = _moments_from_inputs if materialise else _moments_exactly
    block = max(1, _BLOCK // (m * (d if materialise else k) + d))
    few = setting.num_public_tasks < d
    kept: list[Array] = []
    gram = np.zeros((d, d))
    for count in _blocks(setting.num_public_tasks, block):
        sums, norms = draw(rng, setting, true, draw_tasks(rng, setting, true, count, tasks))
        g = sums / (math.sqrt(m) * norms[:, None] if moments == "self-normalised" else m)
        if few:
            kept.append(g)
        else:
            gram += g.T @ g
    if few:  # the eigenvectors of G'G from those of the smaller GG'
        rows = np.concatenate(kept)
        size = len(rows)
        top = eigh(rows @ rows.T, subset_by_index=(max(size - k, 0), size - 1))[1]
        found = rows.T @ top
        # Fewer tasks than k: what is left of the basis can only be guessed. The QR also makes the rest orthonormal.
        guesses = rng.standard_normal((d, k - found.shape[1]))
        return LearnedSubspace(true, np.linalg.qr(np.hstack([found / np.linalg.norm(found, axis=0), guesses]))[0])
    return LearnedSubspace(true, eigh(gram, subset_by_index=(d - k, d - 1))[1])


def _moments_from_inputs(
    rng: np.random.Generator, setting: LinearSetting, true: Array, theta: Array
) -> tuple[Array, Array]:
    """X'y (tasks, d) and |y| (tasks,) from real inputs."""
    x, y = draw_examples(rng, setting, theta, setting.examples_per_task)
    return (y[:, None, :] @ x)[:, 0, :].astype(float), np.linalg.norm(y, axis=1).astype(float)


def _moments_exactly(
    rng: np.random.Generator, setting: LinearSetting, true: Array, theta: Array
) -> tuple[Array, Array]:
    """The same two, without the inputs' other coordinates."""
    w = theta @ true
    v = rng.standard_normal((len(theta), setting.examples_per_task, setting.k))
    y = (v @ w[..., None])[..., 0] + setting.noise_std * rng.standard_normal(v.shape[:2])
    outside = theta - w @ true.T
    gamma = math.sqrt(setting.off_subspace_energy)
    along = rng.standard_normal(v.shape[:2]) if gamma else np.zeros(v.shape[:2])
    y += gamma * along
    norms = np.linalg.norm(y, axis=1)
    rest = rng.standard_normal(theta.shape) * norms[:, None]
    rest -= rest @ true @ true.T
    if gamma:  # along nu the inputs are known too: replace the independent part there
        direction = outside / gamma
        rest += ((along * y).sum(1) - (rest * direction).sum(1))[:, None] * direction
    return (y[:, None, :] @ v)[:, 0, :] @ true.T + rest, norms


# ---- one noisy sum in R^k ------------------------------------------------------------


def dp_deepsets(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, clip: float, scale: ArrayLike,
    repetitions: int | None = None, subspace: Subspace = None, tasks: Tasks = "sphere",
) -> Simulated:  # fmt: skip
    """The noisy mean of clip(v y), times ``scale``.

    Parameters
    ----------
    clip : norm at which an embedding is clipped; 0 normalises, infinity does not clip.
    scale : the decoder's multiplier m; an array is run on the same releases, and the result has its shape.
    subspace : what the learner knows of U, see `seen_tasks`; None: everything.
    repetitions : independent tasks, each with its own data; `deepsets_repetitions` by default.

    Examples
    --------
    >>> known = LinearSetting(k=3)
    >>> result = dp_deepsets(np.random.default_rng(0), known, 500, np.inf, clip=np.inf, scale=1.0)
    >>> abs(result.mean - (3 * 1.25 + 1) / 500) < 4 * result.standard_error
    True
    """
    n = _size(num_private, mu)
    noise_bound, scales = float(sensitivity(clip)), np.asarray(scale, float)
    errors = []
    count = repetitions or deepsets_repetitions(n, setting.k)
    for tasks_now in _blocks(count, max(1, _BLOCK // (n * setting.k))):
        seen, missed = seen_tasks(rng, setting, tasks_now, subspace, tasks)
        total = embedding_sum(rng, setting, seen, missed, n, clip)
        z = (total + privacy_noise(rng, noise_bound, mu, seen.shape)) / n
        errors.append(((scales[..., None, None] * z - seen) ** 2).sum(-1) + missed)
    return Simulated.of(np.moveaxis(np.concatenate(errors, axis=-1), -1, 0))


def embedding_sum(
    rng: np.random.Generator, setting: LinearSetting, seen: Array, missed: Array, num_private: int, clip: float
) -> Array:
    """Sum of n clipped embeddings for each task, (tasks, k), before any noise. Large n in blocks."""
    total = np.zeros_like(seen)
    for rows in _blocks(num_private, max(1, _BLOCK // seen.size)):
        total += _sum_of_embeddings(*_seen_examples(rng, setting, seen, missed, rows), clip)
    return total


def _sum_of_embeddings(v: NDArray, y: NDArray, clip: float) -> Array:
    """Sum over the examples of clip(v y), for v (tasks, n, k)."""
    weights = y * clip_factor(_norms(v) * np.abs(y), clip)
    return (weights[:, None, :] @ v)[:, 0, :].astype(float)


def dp_deepsets_ambient(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, clip: float, scale: float,
    subspace: LearnedSubspace, repetitions: int, tasks: Tasks = "sphere",
) -> Simulated:  # fmt: skip
    """`dp_deepsets` the long way: inputs in R^d, labels from theta, projected on the learned subspace, decoded."""
    n = _size(num_private, mu)
    errors = []
    for theta in draw_tasks(rng, setting, subspace.true, repetitions, tasks):
        total = np.zeros(setting.k)
        for rows in _blocks(n, max(1, _BLOCK // setting.d)):
            x, y = draw_examples(rng, setting, theta[None], rows, np.float64)
            total += _sum_of_embeddings(x @ subspace.learned, y, clip)[0]
        z = (total + privacy_noise(rng, float(sensitivity(clip)), mu, total.shape)) / n
        errors.append(((subspace.learned @ (scale * z) - theta) ** 2).sum())
    return Simulated.of(errors)


def embedding_moments(
    rng: np.random.Generator, k: int, seen_norm: float, residual_std: float, clip: float, samples: int
) -> tuple[Simulated, Simulated]:
    """Of one clipped embedding phi of a task with projection a: <phi, a> / |a|^2, and |phi|^2.

    A "repetition" is one example here. ``seen_norm`` is |a|, above 0.
    """
    along, squared = [], []
    for rows in _blocks(samples, max(1, _BLOCK // k)):
        v = rng.standard_normal((rows, k))
        y = seen_norm * v[:, 0] + residual_std * rng.standard_normal(rows)
        norms = _norms(v) * np.abs(y)
        factor = clip_factor(norms, clip)
        along.append(v[:, 0] * y * factor / seen_norm)
        squared.append((norms * factor) ** 2)
    return Simulated.of(np.concatenate(along)), Simulated.of(np.concatenate(squared))


def second_moments(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, weight: float, clip: ArrayLike,
    ridge: ArrayLike, repetitions: int | None = None, subspace: Subspace = None, tasks: Tasks = "sphere",
) -> Simulated:  # fmt: skip
    """Release (weight svec(v v' - I), v y), clipped jointly; decode (A + ridge I)^-1 b.

    ``svec`` stacks the diagonal and sqrt(2) times the upper triangle, so that norms are Frobenius norms. Negative
    eigenvalues of the noisy A are set to 0, which costs no privacy.

    Parameters
    ----------
    weight : beta, above 0.
    clip, ridge : arrays; every pair is run on the same data. The result has shape (len(clip), len(ridge)).
    """
    n, k = _size(num_private, mu), setting.k
    clips, ridges = np.atleast_1d(np.asarray(clip, float)), np.atleast_1d(np.asarray(ridge, float))
    if not weight > 0 or not (clips > 0).all() or not (ridges >= 0).all():
        raise InputError("need weight > 0, clip > 0 and ridge >= 0")
    bound = sensitivity(clips)
    upper = np.triu(np.ones((k, k)), 1)
    errors = []
    count = repetitions or deepsets_repetitions(n, k)
    for tasks_now in _blocks(count, max(1, _BLOCK // (n * k))):
        seen, missed = seen_tasks(rng, setting, tasks_now, subspace, tasks)
        matrix, vector = np.zeros((len(clips), tasks_now, k, k)), np.zeros((len(clips), tasks_now, k))
        for rows in _blocks(n, max(1, _BLOCK // seen.size)):
            v, y = _seen_examples(rng, setting, seen, missed, rows)
            r2 = _norms(v) ** 2
            norms = np.sqrt(weight**2 * np.maximum(r2**2 - 2 * r2 + k, 0) + r2 * y**2)  # |vv' - I|^2 = r^4 - 2r^2 + k
            for c, limit in enumerate(clips):
                factor = clip_factor(norms, limit)
                matrix[c] += (v * factor[..., None]).swapaxes(1, 2) @ v - factor.sum(1)[:, None, None] * np.eye(k)
                vector[c] += ((factor * y)[:, None, :] @ v)[:, 0, :]
        for c in range(len(clips)):
            noise = privacy_noise(rng, bound[c], mu, (tasks_now, k, k))
            symmetric = noise * np.eye(k) + (noise * upper + (noise * upper).swapaxes(1, 2)) / math.sqrt(2)
            values, vectors = np.linalg.eigh(np.eye(k) + (matrix[c] + symmetric / weight) / n)
            b = (vector[c] + privacy_noise(rng, bound[c], mu, (tasks_now, k))) / n
            rotated = (b[:, None, :] @ vectors)[:, 0, :]
            for ridge_now in ridges:
                decoded = rotated / np.maximum(np.maximum(values, 0) + ridge_now, 1e-12)
                estimate = (vectors @ decoded[..., None])[..., 0]
                errors.append(((estimate - seen) ** 2).sum(1) + missed)
    pairs = len(clips) * len(ridges)
    blocks = [np.stack(errors[i : i + pairs], axis=1) for i in range(0, len(errors), pairs)]
    return Simulated.of(np.concatenate(blocks).reshape(count, len(clips), len(ridges)))


# ---- gradient descent ------------------------------------------------------------


def dp_gd(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, steps: ArrayLike,
    step_size: ArrayLike, gradient_clip: ArrayLike, repetitions: int | None = None,
) -> Simulated:  # fmt: skip
    """Full-batch DP gradient descent in R^d from 0.

    Each example's gradient ``x r`` is multiplied by min(1, gradient_clip / |x r|); each of the ``steps`` mean gradients
    gets noise of standard deviation ``gradient_clip sqrt(steps) / (n mu)``, which is mu-GDP for all steps together.

    Parameters
    ----------
    steps, step_size, gradient_clip : numbers, or arrays that broadcast to one shape. All settings run on the same data
        with independent noise, and the result has their shape. A clip of 0 normalises gradients to length 1.

    Examples
    --------
    >>> result = dp_gd(np.random.default_rng(0), LinearSetting(d=20, k=2), 400, 2.0, steps=10, step_size=0.5,
    ...                gradient_clip=3.0, repetitions=20)
    >>> bool(0.01 < result.mean < 0.1), result.repetitions
    (True, 20)
    """
    n = _size(num_private, mu)
    tuning = _Tuning.of(steps, step_size, gradient_clip)
    count = repetitions or descent_repetitions(n, setting.d, tuning.most_steps)
    basis = random_basis(rng, setting.d, setting.k)
    errors = []
    for tasks_now in _blocks(count, max(1, _BLOCK // (n * setting.d))):
        theta = draw_tasks(rng, setting, basis, tasks_now)
        x, y = draw_examples(rng, setting, theta, n)
        found = descend(rng, x, y, np.zeros_like(theta), tuning, mu)
        errors.append(((found - theta[..., None]) ** 2).sum(1))
    return tuning.result(np.concatenate(errors))


def projected_dp_gd(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, steps: ArrayLike,
    step_size: ArrayLike, gradient_clip: ArrayLike, repetitions: int | None = None, subspace: Subspace = None,
) -> Simulated:  # fmt: skip
    """`dp_gd` on v = B'x in R^k: gradients are clipped and noised in k dimensions."""
    n = _size(num_private, mu)
    tuning = _Tuning.of(steps, step_size, gradient_clip)
    count = repetitions or descent_repetitions(n, setting.k, tuning.most_steps)
    errors = []
    for tasks_now in _blocks(count, max(1, _BLOCK // (n * setting.k))):
        seen, missed = seen_tasks(rng, setting, tasks_now, subspace)
        v, y = _seen_examples(rng, setting, seen, missed, n, np.float32)
        found = descend(rng, v, y, np.zeros_like(seen), tuning, mu)
        errors.append(((found - seen[..., None]) ** 2).sum(1) + missed[:, None])
    return tuning.result(np.concatenate(errors))


def hybrid(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, share: float, clip: float,
    scale: float, steps: int, step_size: float, gradient_clip: float, subspace: LearnedSubspace,
    repetitions: int | None = None,
) -> Simulated:  # fmt: skip
    """DP-DeepSets with mu sqrt(share), then DP-GD in R^d from its answer with mu sqrt(1 - share), on the same examples.

    ``clip`` and ``scale`` are those of the embedding and the decoder; ``steps``, ``step_size`` and ``gradient_clip``
    those of the descent. A share of 0 starts the descent at 0; one of 1 leaves nothing for it, so ``steps`` must be 0.
    """
    n = _size(num_private, mu)
    tuning = _Tuning.of(steps, step_size, gradient_clip)
    if not 0 <= share <= 1 or (share == 1 and tuning.most_steps):
        raise InputError(
            f"the share of the first release is in [0, 1], and no step can follow a share of 1; got {share}"
        )
    count = repetitions or descent_repetitions(n, setting.d, tuning.most_steps)
    errors = []
    for tasks_now in _blocks(count, max(1, _BLOCK // (n * setting.d))):
        theta = draw_tasks(rng, setting, subspace.true, tasks_now)
        x, y = draw_examples(rng, setting, theta, n)
        start = np.zeros_like(theta)
        if share:
            total = _sum_of_embeddings(x @ subspace.learned.astype(x.dtype), y, clip)
            total += privacy_noise(rng, float(sensitivity(clip)), mu * math.sqrt(share), total.shape)
            start += scale * total / n @ subspace.learned.T
        found = descend(rng, x, y, start, tuning, mu * math.sqrt(1 - share))
        errors.append(((found - theta[..., None]) ** 2).sum(1))
    return tuning.result(np.concatenate(errors))


@dataclass(frozen=True, eq=False)
class _Tuning:
    """Tunings of gradient descent, each of shape (settings,), and the shape the caller gave."""

    steps: NDArray
    step_size: Array
    gradient_clip: Array
    shape: tuple[int, ...]

    @classmethod
    def of(cls, steps: ArrayLike, step_size: ArrayLike, gradient_clip: ArrayLike) -> _Tuning:
        arrays = np.broadcast_arrays(*(np.asarray(value, float) for value in (steps, step_size, gradient_clip)))
        taken, size, clip = (array.ravel() for array in arrays)
        if not ((taken >= 0) & (taken == np.round(taken)) & (size >= 0) & (clip >= 0)).all():
            raise InputError("need a whole number of steps >= 0, step_size >= 0 and gradient_clip >= 0")
        return cls(taken.astype(int), size, clip, arrays[0].shape)

    @property
    def most_steps(self) -> int:
        return int(self.steps.max())

    def result(self, errors: Array) -> Simulated:
        """From squared errors (repetitions, settings)."""
        return Simulated.of(errors.reshape(len(errors), *self.shape))


def descend(rng: np.random.Generator, x: NDArray, y: NDArray, start: Array, tuning: _Tuning, mu: float) -> Array:
    """Where DP gradient descent ends: (tasks, p, settings), for x (tasks, n, p), y (tasks, n) and start (tasks, p).

    The iterate is kept in double precision; the products with the data are in the data's precision.
    """
    n = x.shape[1]
    norms = _norms(x)[..., None]
    theta = np.repeat(start[..., None], len(tuning.steps), axis=2)
    for step in range(tuning.most_steps):
        running = np.flatnonzero(step < tuning.steps)
        clip = tuning.gradient_clip[running]
        with np.errstate(over="ignore", invalid="ignore"):  # divergence is reported by Simulated.of
            residuals = x @ theta[..., running].astype(x.dtype) - y[..., None]
            residuals *= clip_factor(norms * np.abs(residuals), clip)
            gradient = (x.swapaxes(1, 2) @ residuals).astype(float)
            gradient += privacy_noise(rng, sensitivity(clip) * np.sqrt(tuning.steps[running]), mu, gradient.shape)
            theta[..., running] -= tuning.step_size[running] * gradient / n
    return theta


# ---- noisy sufficient statistics; no privacy ------------------------------------------------------------


def noisy_statistics(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, mu: float, *, share: float, ridge: ArrayLike,
    clip_x: float, clip_y: float, repetitions: int | None = None,
) -> Simulated:  # fmt: skip
    """Ridge regression on noisy X'X (budget mu sqrt(share)) and X'y (the rest), inputs and labels clipped first.

    The symmetric noise on X'X has independent entries on and above the diagonal. ``ridge`` may be an array: all are run
    on the same statistics, and the result has its shape.
    """
    n, d = _size(num_private, mu), setting.d
    if not 0 < share < 1 or not min(clip_x, clip_y) > 0:
        raise InputError("need 0 < share < 1 and positive clips of x and y")
    ridges = np.asarray(ridge, float)
    basis = random_basis(rng, d, setting.k)
    errors = []
    for theta in draw_tasks(rng, setting, basis, repetitions or descent_repetitions(n, d)):
        x, y = (values[0] for values in draw_examples(rng, setting, theta[None], n))
        x *= clip_factor(_norms(x), clip_x)[:, None]
        y *= clip_factor(np.abs(y), clip_y)
        noise = np.triu(privacy_noise(rng, clip_x**2, mu * math.sqrt(share), (d, d)))
        matrix = (x.T @ x).astype(float) + noise + np.triu(noise, 1).T
        vector = (x.T @ y).astype(float) + privacy_noise(rng, clip_x * clip_y, mu * math.sqrt(1 - share), (d,))
        errors.append(_ridge_errors(matrix, vector, ridges, theta))
    return Simulated.of(np.array(errors))


def ridge(
    rng: np.random.Generator, setting: LinearSetting, num_private: int, *, penalty: ArrayLike, repetitions: int
) -> Simulated:
    """Ridge regression in R^d without privacy: (X'X + penalty I)^-1 X'y. ``penalty`` may be an array; 0 is `ols`."""
    n = _size(num_private, math.inf)
    penalties = np.asarray(penalty, float)
    if not (penalties >= 0).all():
        raise InputError("a ridge penalty is at least 0")
    if (penalties == 0).any() and n <= setting.d + 1:
        raise InputError("least squares has infinite risk for num_private <= d + 1: give a penalty above 0")
    basis = random_basis(rng, setting.d, setting.k)
    errors = []
    for theta in draw_tasks(rng, setting, basis, repetitions):
        x, y = (values[0] for values in draw_examples(rng, setting, theta[None], n, np.float64))
        errors.append(_ridge_errors(x.T @ x, x.T @ y, penalties, theta))
    return Simulated.of(np.array(errors))


def ols(rng: np.random.Generator, setting: LinearSetting, num_private: int, *, repetitions: int) -> Simulated:
    """Least squares in R^d without privacy; needs num_private > d + 1."""
    return ridge(rng, setting, num_private, penalty=0.0, repetitions=repetitions)


def public_only(rng: np.random.Generator, setting: LinearSetting, *, repetitions: int) -> Simulated:
    """Answer 0, the best guess of one who has seen no private example."""
    theta = draw_tasks(rng, setting, random_basis(rng, setting.d, setting.k), repetitions)
    return Simulated.of((theta**2).sum(1))


def _ridge_errors(matrix: Array, vector: Array, ridges: Array, theta: Array) -> Array:
    """Squared errors of (matrix + ridge I)^-1 vector for every ridge, from one eigendecomposition."""
    values, vectors = np.linalg.eigh(matrix)
    shifted = values + ridges[..., None]
    tiny = np.finfo(float).tiny
    decoded = vectors.T @ vector / np.where(np.abs(shifted) < tiny, tiny, shifted)
    return ((decoded - vectors.T @ theta) ** 2).sum(-1)


# ---- small parts ------------------------------------------------------------


def _norms(rows: NDArray) -> NDArray:
    return np.sqrt(np.einsum("...k,...k->...", rows, rows))


def _blocks(total: int, largest: int) -> Iterator[int]:
    """``total`` in pieces of at most ``largest``."""
    for done in range(0, total, largest):
        yield min(largest, total - done)


def _size(num_private: int, mu: float) -> int:
    n, _ = check_sizes(num_private, mu)
    if n.ndim or n != int(n):
        raise InputError("a simulation runs at one whole num_private and one mu")
    return int(n)
