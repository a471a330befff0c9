"""Private images -> noisy sums: the one composition, and the only loop over private data.

One sum, cells, two steps, a noisy count: each is a sequence of noisy sums, every one chosen by the results before it.
Such a sequence is a *course*: a generator that yields a `Query` and is sent back the `NoisySum` it asked for. A course
never holds an image, an embedding or an exact sum, so whatever it chooses or returns is post-processing:

>>> import torch
>>> def count():
...     config = GaussianSum(dimension=1, noise_multiplier=0.0)
...     answer = yield Query("a count", config)
...     return float(answer.values[0, 0])
>>> released, counted = measure(torch.zeros(7, 1, 16, 16), None, count(), seed=0)
>>> counted, len(released)
(7.0, 1)

Privacy. Each sum is 1 / noise_multiplier Gaussian-DP whatever was released before it, so the course is mu-Gaussian-DP
with ``mu**2 = sum(1 / noise_multiplier**2)`` (adaptive composition; Dong, Roth & Su 2022, corollary 2). A course that
fixes what a first sum costs, and then splits the rest as that sum suggests, is the composition of the first sum with a
whole that costs the rest for *every* result of the first: the theorem, applied twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from hyperdp_lib import mechanism
from hyperdp_lib.embedding import embed_rows
from hyperdp_lib.mechanism import Batch, GaussianSum

T = TypeVar("T")
# embeddings (B, k) and rows (B,) or None -> vectors (B, dimension), each from its own embedding and row alone, with no
# matrix product (whose last digits may depend on the other rows)
Contribution = Callable[[np.ndarray, np.ndarray | None], np.ndarray]


class Query(NamedTuple):
    """One noisy sum to take; everything in it is public.

    Attributes
    ----------
    description : str
        What it is, for the ledger.
    config : GaussianSum
        Rows (with labels: the classes), dimension, clip norm and noise.
    encoder : module or None
        Image -> embedding. None: nothing of an image but that it is there, the vector (1.0,).
    contribution : callable or None
        What is summed of an embedding; None: the embedding itself.
    """

    description: str
    config: GaussianSum
    encoder: Any = None
    contribution: Contribution | None = None


class NoisySum(NamedTuple):
    """A released sum: public."""

    values: np.ndarray  # (num_rows, dimension) float64
    config: GaussianSum
    description: str


Course = Generator[Query, NoisySum, T]


def measure(
    private_images: Tensor,
    private_rows: np.ndarray | None,
    course: Course[T],
    *,
    seed: int | None = None,
    batch_size: int = 1024,
) -> tuple[list[NoisySum], T]:
    """Noisy sums of private images, in the order in which a course asks for them, and what the course returns.

    Parameters
    ----------
    private_images : (N, C, H, W) float in [-1, 1].
    private_rows : (N,) int, the class of each, read by queries of more than one row; None without labels.
    course : generator of `Query`, sent a `NoisySum` for each.
    seed : None for secret noise from the operating system. With a number, query i takes ``seed + i * 2**32``: a
        demonstration, not private.
    batch_size : images in memory as embeddings at a time; memory does not grow with N.
    """
    released: list[NoisySum] = []
    answer: Any = None
    while True:
        try:
            query = course.send(answer)
        except StopIteration as done:
            return released, done.value
        own_seed = None if seed is None else seed + len(released) * 2**32
        batches = _contributions(private_images, private_rows, query, batch_size)
        values = mechanism.noisy_sum(batches, query.config, seed=own_seed)
        answer = NoisySum(values, query.config, query.description)
        released.append(answer)


def _contributions(
    private_images: Tensor, private_rows: np.ndarray | None, query: Query, batch_size: int
) -> Iterator[Batch]:
    private_rows = private_rows if query.config.num_rows > 1 else None
    if query.encoder is None:
        yield np.ones((len(private_images), 1)), private_rows
        return
    for codes, rows in embed_rows(query.encoder, private_images, private_rows, batch_size=batch_size):
        yield codes if query.contribution is None else query.contribution(codes, rows), rows
