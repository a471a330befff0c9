r"""Two steps instead of one sum: the first says where the images lie, the second how they differ from there.

A mean of vectors of norm one pays for vectors anywhere in the unit ball. Images of one kind lie close together, and the
distance to their mean is half of that; so once it is known roughly where they are, the rest can be measured in a
smaller ball, with less noise for the same budget. That is the idea of CoinPress (Biswas, Dong, Kamath & Ullman 2020),
in two steps:

1. A share of the budget buys one noisy sum. Its posterior mean under the prior of public data sets
   (`hyperdp_lib.prior`) is the *centre* o. Since every vector has the same norm, it also says how far the images
   are from there, by Pythagoras: E |phi - o|^2 = 1 - c^2 - |o|^2, with c the count coordinate. No budget buys that.
2. The rest buys the sum of the offsets phi - o, cut to the length R that follows. The noise on it is that of the ball
   of this radius.

Sum and centre together are a noisy sum like any other, with less noise on the mean, and every decoder reads it. The
second query is chosen by the result of the first (`hyperdp_lib.measure`). Both are in the ledger.

Classes with labels have a centre each where they are large enough, else one together.

How the budget is shared and how long offsets may be was chosen on public drawings by people, with
``benchmarks/two_steps.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from hyperdp_lib.data import InputError
from hyperdp_lib.measure import Course, Query
from hyperdp_lib.mechanism import GaussianSum
from hyperdp_lib.prior import Prior, posterior

CLOSEST = 0.2  # least root mean square of offsets that is believed
ABOUT, EQUAL = 0.1, 0.5  # relative error of a size that is public, "about"; of that size shared equally by classes
TYPICAL = 0.6  # of the noise of one sum: about what is left on the mean, by which coordinates are chosen
FIRST = "first step: a noisy sum of embeddings, which says where the second is centred"
SECOND = "second step: a noisy sum of the embeddings' offsets from there"


class Size(NamedTuple):
    """A number of images, public, and the standard error with which it is known."""

    value: float
    error: float

    @classmethod
    def about(cls, value: float) -> Size:
        """One that is public, to a tenth."""
        return cls(value, ABOUT * value)

    def of_one(self, num_rows: int) -> Size:
        """Of one of so many classes, which need not be of one size."""
        if num_rows == 1:
            return self
        each = self.value / num_rows
        return Size(each, max(EQUAL * each, self.error / num_rows))


@dataclass(frozen=True)
class TwoStepsConfig:
    """Public choices of two steps.

    Parameters
    ----------
    share, share_together : float
        Of mu squared, for the first step: where each row has a centre of its own, and where labelled classes have one
        together, which needs less; in (0, 1).
    reach : float
        Greatest length of an offset, over the root mean square. What is cut off at 0.8 is less than the noise it saves.
    own_centre : float
        Images of a labelled class, over the noise on one sum, from which on it has a centre of its own.
    """

    share: float = 0.2
    share_together: float = 0.1
    reach: float = 0.8
    own_centre: float = 12.0

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and 0 < self.share_together < 1 and self.reach > 0 and self.own_centre >= 0):
            raise InputError("two steps need shares in (0, 1), a positive reach, and an own_centre of at least 0.")


DEFAULT = TwoStepsConfig()


@dataclass(frozen=True, eq=False)
class Centring:
    """Where the second step measures from; public, as the first sum is.

    Attributes
    ----------
    centres : ndarray
        ``(K, k)`` without the count coordinate.
    radius : float
        Greatest length of an offset.
    count_coordinate : float
        The encoder's.
    spread : float
        Root mean square of offsets, about: below 0.7 for images of one kind, above for mixtures of several.
    """

    centres: np.ndarray
    radius: float
    count_coordinate: float
    spread: float = math.nan

    @classmethod
    def of(
        cls,
        first_sum: np.ndarray,
        noise_std: float,
        prior: Prior,
        count_coordinate: float,
        *,
        num_rows: int,
        size: Size,
        reach: float = DEFAULT.reach,
    ) -> Centring:
        """Of a first sum (1, 1 + k) or (num_rows, 1 + k) with this noise on each number."""
        sums = torch.as_tensor(first_sum).double().clone()
        known = size.of_one(len(sums))
        for row in sums:
            noisy = Size(float(row[0]) / count_coordinate, noise_std / count_coordinate)
            row[0] = count_coordinate * pooled_count(known, noisy)
        centres, _ = posterior(sums, noise_std, prior, count_coordinate)
        square = 1 - count_coordinate**2 - centres.square().sum(1)
        spread = math.sqrt(float(square.clamp_min(CLOSEST**2).mean()))
        return cls(centres.expand(num_rows, -1).numpy(), reach * spread, count_coordinate, spread)

    @property
    def clip_norm(self) -> float:
        """Norm of a longest offset with the count coordinate, which is scaled as the offsets' ball is."""
        return self.radius / math.sqrt(1 - self.count_coordinate**2)

    def offsets(self, private_codes: np.ndarray, private_rows: np.ndarray | None) -> np.ndarray:
        """Embeddings (B, 1 + k) and their rows -> offsets with a count coordinate (B, 1 + k), of norm `clip_norm`."""
        which = np.zeros(len(private_codes), dtype=np.int64) if private_rows is None else private_rows
        # example by example, with no matrix product: no image moves another's last digits
        offsets = private_codes[:, 1:].astype(np.float64) - self.centres[which]
        length = np.sqrt(np.square(offsets).sum(axis=1, keepdims=True))
        offsets *= self.radius / np.maximum(length, self.radius)
        count = np.full((len(private_codes), 1), self.count_coordinate * self.clip_norm)
        return np.concatenate([count, offsets], axis=1)

    def combine(self, second_sum: np.ndarray, second: GaussianSum, size: Size) -> np.ndarray:
        """The noisy sum (K, 1 + k) that the second sum (K, 1 + k) and the centres stand for, on the second's grid."""
        unit = self.count_coordinate * self.clip_norm
        known = size.of_one(len(second_sum))
        counts = np.array([pooled_count(known, Size(row[0] / unit, second.noise_std / unit)) for row in second_sum])
        sums = np.column_stack([self.count_coordinate * counts, counts[:, None] * self.centres + second_sum[:, 1:]])
        grid = second.clip_norm / second.grid_units
        return np.rint(sums / grid) * grid


class Start(NamedTuple):
    """What the first step found, and what is left for the second: public."""

    centring: Centring
    noise_multiplier: float  # of a second sum that costs all that is left


def two_steps(
    hypernetwork: Any,
    *,
    noise_multiplier: float,
    num_rows: int,
    size: Size,
    neighboring_relation: str = "add_or_remove_one",
    config: TwoStepsConfig = DEFAULT,
) -> Course[tuple[np.ndarray, float]]:
    """The course of both steps; it returns the sum (K, 1 + k) that they stand for, on the second's grid, and its noise.

    Parameters
    ----------
    hypernetwork : public, with a prior; its encoder is used.
    noise_multiplier : of one sum that costs as much as both steps; each has a share of its mu squared.
    num_rows : K classes, 1 without labels.
    size : number of images in all, as far as it is known; public.
    config : how the budget is shared, how long offsets may be, and which classes have a centre of their own.

    Raises
    ------
    InputError
        if the hypernetwork has no prior, or reads sums with cells.
    """
    asked: dict[str, Any] = dict(num_rows=num_rows, size=size, neighboring_relation=neighboring_relation)
    start = yield from first_step(hypernetwork, noise_multiplier=noise_multiplier, config=config, **asked)
    return (yield from second_step(hypernetwork, start, **asked))


def first_step(
    hypernetwork: Any,
    *,
    noise_multiplier: float,
    num_rows: int,
    size: Size,
    neighboring_relation: str = "add_or_remove_one",
    config: TwoStepsConfig = DEFAULT,
) -> Course[Start]:
    """The course of the first step alone: where the images lie, and how far from there."""
    encoder = hypernetwork.encoder
    if not hasattr(hypernetwork, "priors"):
        raise InputError("a sum with cells is measured from their centres already: take one step")
    prior, constant = Prior.shipped(hypernetwork), encoder.config.count_coordinate
    whole = GaussianSum(encoder.config.dimension, noise_multiplier, neighboring_relation=neighboring_relation)
    own = num_rows == 1 or size.of_one(num_rows).value >= config.own_centre * whole.noise_std
    share = config.share if own else config.share_together
    first = dataclasses.replace(
        whole, noise_multiplier=noise_multiplier / math.sqrt(share), num_rows=num_rows if own else 1
    )
    answer = yield Query(FIRST, first, encoder)
    centring = Centring.of(
        answer.values, first.noise_std, prior, constant, num_rows=num_rows, size=size, reach=config.reach
    )
    return Start(centring, noise_multiplier / math.sqrt(1 - share))


def second_step(
    hypernetwork: Any, start: Start, *, num_rows: int, size: Size, neighboring_relation: str = "add_or_remove_one"
) -> Course[tuple[np.ndarray, float]]:
    """The course of the second step: what `two_steps` returns."""
    centring, encoder = start.centring, hypernetwork.encoder
    second = GaussianSum(
        encoder.config.dimension, start.noise_multiplier, num_rows, centring.clip_norm, neighboring_relation
    )
    # embedded again, not kept: memory does not grow with the number of images
    answer = yield Query(SECOND, second, encoder, centring.offsets)
    return centring.combine(answer.values, second, size), second.noise_std


def pooled_count(known: Size, noisy: Size) -> float:
    """A count from two that are known with an error each, weighted by inverse variances; at least 1.

    >>> round(pooled_count(Size(100.0, 10.0), Size(130.0, 10.0)), 6)
    115.0
    >>> round(pooled_count(Size(100.0, 10.0), Size(500.0, 0.0)), 6)
    500.0
    """
    total = known.error**2 + noisy.error**2
    share = known.error**2 / total if total else 0.0
    return max(1.0, known.value + share * (noisy.value - known.value))
