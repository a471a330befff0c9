r"""The mechanism: clip, sum exactly, add Gaussian noise once.

This is the only place where private data becomes public, so it is short, imports nothing of ours and is
meant to be read from top to bottom by an auditor. Everything computed from its result is post-processing.

Proof sketch
------------
Write ``G = 2**grid_bits`` (the integer that stands for ``clip_norm``).

*Precondition.* Each example brings one embedding and one row index, computed from that example alone (no
batch statistics) by a public function. The configuration and the set of rows are public.

*Step 1, one example.* :func:`_to_grid` maps an embedding to an integer vector ``g`` with ``sum(g*g) <=
G*G``. This is established by comparing the integers themselves, so no property of floating-point arithmetic
is needed for it. A non-finite embedding maps to ``0``.

*Step 2, the sum.* :func:`_exact_sum` adds these vectors into ``S``, shape (num_rows, dimension), in
``int64``. No partial sum exceeds ``n * G < 2**62`` in magnitude, so nothing overflows and ``S`` is the
exact sum: order, batching and the other examples do not matter.

*Step 3, sensitivity.* Neighbouring data sets give sums that differ by a ``v`` with integer L2 norm at most
``D``:

* ``add_or_remove_one``: one row of ``S`` changes by one ``g``: ``|v| <= G = D``;
* ``zero_out`` (an example is replaced by one that contributes nothing): the same, ``|v| <= G = D``;
* ``replace_one``: ``g`` leaves row ``i`` and ``h`` enters row ``j``. If ``i = j``, ``|v| = |g - h| <= 2
  G``; if not, ``|v|**2 = |g|**2 + |h|**2 <= 2 G**2``. So ``|v| <= 2 G = D``.

*Step 4, noise.* OpenDP's exact sampler (Canonne, Kamath & Steinke 2020) adds to every integer of ``S`` an
independent discrete Gaussian with parameter ``s = noise_multiplier * D``, drawn from the operating system's
entropy. ``D`` is a power of two, so ``s`` carries no rounding error. A result beyond the ``int64`` range
saturates, which is post-processing.

*Postcondition.* The result is ``1 / (2 noise_multiplier**2)``-zCDP exactly, and (epsilon, delta)-DP as
:mod:`hyperdp_lib.accounting` states (its bound covers every configuration accepted here). The floats returned
are integers times ``clip_norm / G``: a rescaling after the fact. Nothing else derived from private data
leaves: no count, no norm, no clip rate, no log line. Errors are structural, come before any noise, and
quote no private value.

*Not covered.* Timing (the time grows with the number of examples, and by one pass over a batch in which a last
digit slipped), and the one bit "the call failed": whoever calls with malformed rows learns that they were
malformed, so check labels against the public label set first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Sensitivity in units of clip_norm (step 3). Powers of two, which step 4 uses.
SENSITIVITY_FACTOR = {"add_or_remove_one": 1, "replace_one": 2, "zero_out": 1}
# The (epsilon, delta) theorem in `accounting` is proven up to this many numbers, and from this grid on.
MAX_COORDINATES = 2**20
MIN_GRID_BITS = 20


@dataclass(frozen=True)
class GaussianSum:
    """Public configuration of one noisy sum.

    Parameters
    ----------
    dimension : int
        Length k of one embedding.
    noise_multiplier : float
        Standard deviation of the noise divided by the sensitivity. 0 means no noise, hence no privacy.
    num_rows : int
        Rows of the released array (classes); one example touches one row. At most 2**20 numbers in all.
    clip_norm : float
        Largest L2 norm of one contribution, in the embedding's own units.
    neighboring_relation : {"add_or_remove_one", "replace_one", "zero_out"}
        What "differing in one example" means. The number of examples is secret only under the first.
    grid_bits : int
        The grid has ``2**grid_bits`` steps per ``clip_norm``.

    Raises
    ------
    ValueError
        For a value outside the ranges above.

    Examples
    --------
    >>> config = GaussianSum(64, noise_multiplier=3.5, clip_norm=2.0, neighboring_relation="replace_one")
    >>> config.sensitivity, config.noise_std
    (4.0, 14.0)
    """

    dimension: int
    noise_multiplier: float
    num_rows: int = 1
    clip_norm: float = 1.0
    neighboring_relation: str = "add_or_remove_one"
    grid_bits: int = 20

    def __post_init__(self) -> None:
        if self.neighboring_relation not in SENSITIVITY_FACTOR:
            raise ValueError(f"neighboring_relation must be one of {', '.join(SENSITIVITY_FACTOR)}")
        if not all(isinstance(size, int) for size in (self.dimension, self.num_rows, self.grid_bits)):
            raise ValueError("dimension, num_rows and grid_bits must be whole numbers")
        if self.dimension < 1 or self.num_rows < 1 or self.dimension * self.num_rows > MAX_COORDINATES:
            raise ValueError(f"dimension and num_rows must be positive, product at most {MAX_COORDINATES}")
        # The second condition keeps the squared norms of step 1 inside int64.
        if self.grid_bits < MIN_GRID_BITS or self.dimension * 4**self.grid_bits >= 2**62:
            raise ValueError(f"grid_bits must be >= {MIN_GRID_BITS}, dimension * 4**grid_bits < 2**62")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError("clip_norm must be positive and finite")
        # The upper end keeps the noise itself far inside int64.
        if not 0 <= self.noise_multiplier * self.grid_sensitivity < 2**55:
            raise ValueError("noise_multiplier must be at least 0 and small enough for 64-bit integers")

    @property
    def grid_units(self) -> int:
        """The integer that stands for ``clip_norm``."""
        return 2**self.grid_bits

    @property
    def grid_sensitivity(self) -> int:
        """Sensitivity of the integer sum, ``D`` in the proof."""
        return SENSITIVITY_FACTOR[self.neighboring_relation] * self.grid_units

    @property
    def sensitivity(self) -> float:
        """Sensitivity in the embedding's units."""
        return SENSITIVITY_FACTOR[self.neighboring_relation] * self.clip_norm

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each released number, in the embedding's units."""
        return self.noise_multiplier * self.sensitivity


Batch = tuple[NDArray[np.floating], NDArray[np.integer] | None]


def noisy_sum(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """Release the sum of clipped embeddings with Gaussian noise: the one private step of the library.

    Parameters
    ----------
    private_batches : iterable of (embeddings, rows)
        Float array (B, dimension) and integer array (B,) with values in [0, num_rows), or None for rows when
        ``num_rows == 1``. Read once, batch by batch: memory does not grow with the number of examples. No
        examples at all is a valid data set (the neighbour of every single example).
    config : GaussianSum
        Public configuration.
    seed : int or None
        None draws from the operating system's entropy: the only private mode. An integer gives a reproducible
        **demonstration that is not private**: whoever knows or guesses the seed can subtract the noise. It is
        numpy's floating-point normal rounded to the grid: in law close to, but not proven to be, the discrete
        Gaussian.

    Returns
    -------
    ndarray of float64, (num_rows, dimension)
        Multiples of ``clip_norm / 2**grid_bits``, in the embedding's units.

    Raises
    ------
    ValueError
        For a wrong shape, type or row, before any noise is drawn; or for zero noise without a seed.

    Examples
    --------
    >>> batch = np.full((100, 2), 0.5), None
    >>> noisy_sum([batch], GaussianSum(dimension=2, noise_multiplier=0.0), seed=0)
    array([[50., 50.]])
    """
    if config.noise_multiplier == 0 and seed is None:
        raise ValueError("noise_multiplier 0 is not private: only a demonstration (with a seed) may use it")
    exact = _exact_sum(private_batches, config)
    scale = config.noise_multiplier * config.grid_sensitivity
    if seed is None:
        noisy = _add_discrete_gaussian(exact, scale)
    else:
        noise = np.random.default_rng(seed).normal(0.0, scale, size=exact.shape)
        noisy = exact + np.rint(noise).astype(np.int64)
    return noisy.astype(np.float64) * (config.clip_norm / config.grid_units)


def _exact_sum(private_batches: Iterable[Batch], config: GaussianSum) -> NDArray[np.int64]:
    """Step 2: the exact integer sum (num_rows, dimension). Private: only tests look at it."""
    total = np.zeros((config.num_rows, config.dimension), dtype=np.int64)
    num_examples = 0
    for embeddings, rows in private_batches:
        grid = _to_grid(embeddings, config)
        num_examples += len(grid)
        if num_examples * config.grid_units >= 2**62:
            raise ValueError("too many examples for exact 64-bit sums")
        if rows is None and config.num_rows == 1:
            rows = np.zeros(len(grid), dtype=np.int64)
        rows = np.asarray(rows)
        if rows.dtype.kind not in "iu" or rows.shape != (len(grid),):
            raise ValueError("rows must be an integer array with one entry per embedding")
        if np.any(rows < 0) or np.any(rows >= config.num_rows):
            raise ValueError(f"every row must lie in 0 ... {config.num_rows - 1}")
        np.add.at(total, rows, grid)
    return total


def _to_grid(private_embeddings: NDArray[np.floating], config: GaussianSum) -> NDArray[np.int64]:
    """Step 1: clip each embedding and round it toward zero onto the grid: (B, dimension), int64.

    Each row depends on its own example only. Postcondition, in integers: ``(g * g).sum(1) <= grid_units**2``.
    """
    values = np.asarray(private_embeddings)
    if values.dtype.kind != "f" or values.dtype.itemsize > 8:
        raise ValueError("embeddings must be a float16, float32 or float64 array")
    if values.ndim != 2 or values.shape[1] != config.dimension:
        raise ValueError(f"embeddings must have shape (B, {config.dimension})")
    values = values.astype(np.float64)
    values[~np.isfinite(values).all(axis=1)] = 0.0  # one bad example contributes nothing, and poisons nothing

    # Floating point may do what it likes here: it decides accuracy, never the bound. Dividing by the largest
    # entry first keeps the norm of 1e308s and of subnormals meaningful; a norm that overflows is clipped.
    largest = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    unscaled = values / np.where(largest > 0, largest, 1.0)
    length = np.sqrt(np.square(unscaled).sum(axis=1, keepdims=True))
    with np.errstate(over="ignore", invalid="ignore"):
        too_long = largest * length > config.clip_norm
        clipped = np.where(too_long, unscaled / np.where(too_long, length, 1.0), values / config.clip_norm)
        grid = np.trunc(clipped * config.grid_units).astype(np.int64)

    # From here on integers only. The clamp makes the squares safe (dimension * units**2 < 2**62) whatever
    # came in; the loop repairs last-digit slips of the division and ends, since each turn moves entries
    # toward zero.
    grid = np.clip(grid, -config.grid_units, config.grid_units)
    while (slipped := (grid * grid).sum(axis=1) > config.grid_units**2).any():
        grid[slipped] -= np.sign(grid[slipped])
    return grid


def _add_discrete_gaussian(exact: NDArray[np.int64], scale: float) -> NDArray[np.int64]:
    """Step 4: independent discrete Gaussian noise of parameter ``scale`` on every integer."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T="i64"), size=exact.size)
    measurement = dp.m.make_gaussian(domain, dp.l2_distance(T="f64"), scale=scale)
    return np.array(measurement(exact.ravel().tolist()), dtype=np.int64).reshape(exact.shape)
