r"""Two looks instead of one: the first says where the images lie, the second how they differ from there.

A mean of vectors of norm one pays for vectors anywhere in the unit ball. Images of one kind lie close together, and the
distance to their mean is half of that; so once it is known roughly where they are, the rest can be measured in a
smaller ball, with less noise for the same budget. That is the idea of CoinPress (Biswas, Dong, Kamath & Ullman 2020),
in two steps:

1. A share of the budget buys one noisy sum, as ever. Its posterior mean under the prior of public data sets
   (`hyperdp_lib.prior`) is the *centre* o. Since every vector has the same norm, it also says how far the images
   are from there, by Pythagoras: E |phi - o|^2 = 1 - c^2 - |o|^2, with c the count coordinate. No budget buys that.
2. The rest buys the sum of the offsets phi - o, cut to the length R that follows. The noise on it is that of the ball
   of this radius.

Sum and centre together are a noisy sum like any other, with less noise on the mean, and every decoder reads it. Both
looks are calls of `hyperdp_lib.mechanism`; the second is chosen by the result of the first, and adaptive sequences of
Gaussian releases compose exactly, mu^2 = mu_1^2 + mu_2^2 (Dong, Roth & Su 2022). Both are in the ledger.

Classes with labels have a centre each where they are large enough, else one together.

How the budget is shared and how long offsets may be was chosen on public drawings by people, with
``benchmarks/looks.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hyperdp_lib import mechanism
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import embed_rows
from hyperdp_lib.ledger import NUMBER_OF_IMAGES, LedgerEntry, declaration, gaussian_charge
from hyperdp_lib.mechanism import Batch, GaussianSum
from hyperdp_lib.prior import Prior, posterior

CLOSEST = 0.2  # least root mean square of offsets that is believed
TRUST = {True: 0.5, False: 0.1}  # relative error of a declared size: shared equally by labelled classes, or of one set
TYPICAL = 0.6  # of the noise of one look: about what is left on the mean, by which coordinates are chosen
FIRST = "a first look: one noisy sum of embeddings, which says where the second is centred"
SECOND = "a second look: one noisy sum of the embeddings' offsets from there"


@dataclass(frozen=True)
class LooksConfig:
    """Public choices of two looks.

    Parameters
    ----------
    share, share_together : float
        Of mu squared, for the first look: where each row has a centre of its own, and where labelled classes have one
        together, which needs less; in (0, 1).
    reach : float
        Greatest length of an offset, over the root mean square. What is cut off at 0.8 is less than the noise it saves.
    own_centre : float
        Images of a labelled class, over the noise on a sum of one look, from which on it has a centre of its own.
    """

    share: float = 0.2
    share_together: float = 0.1
    reach: float = 0.8
    own_centre: float = 12.0

    def __post_init__(self) -> None:
        if not (0 < self.share < 1 and 0 < self.share_together < 1 and self.reach > 0 and self.own_centre >= 0):
            raise InputError("two looks need shares in (0, 1), a positive reach, and an own_centre of at least 0.")


DEFAULT = LooksConfig()


class Looks(NamedTuple):
    """What two looks give: the sum (K, k) to decode, and the public configurations of both."""

    noisy_sum: np.ndarray
    first: GaussianSum
    second: GaussianSum


@dataclass(frozen=True, eq=False)
class Centring:
    """Where the second look measures from; public, as the first look is.

    Attributes
    ----------
    centres : ndarray
        ``(K, k)`` without the count coordinate.
    radius : float
        Greatest length of an offset.
    count_coordinate : float
        The encoder's.
    """

    centres: np.ndarray
    radius: float
    count_coordinate: float

    @classmethod
    def of(
        cls,
        first_look: np.ndarray,
        noise_std: float,
        prior: Prior,
        count_coordinate: float,
        *,
        num_rows: int,
        declared_per_row: float,
        labelled: bool,
        reach: float = DEFAULT.reach,
    ) -> Centring:
        """Of a first look (1, 1 + k) or (num_rows, 1 + k) with this noise on each number."""
        sums = torch.as_tensor(first_look).double().clone()
        known = declared_per_row * num_rows / len(sums)
        trust = TRUST[labelled and len(sums) > 1]
        for row in sums:
            noisy = float(row[0]) / count_coordinate, noise_std / count_coordinate
            row[0] = count_coordinate * pooled_count(known, trust, noisy)
        centres, _ = posterior(sums, noise_std, prior, count_coordinate)
        square = 1 - count_coordinate**2 - centres.square().sum(1)
        spread = math.sqrt(float(square.clamp_min(CLOSEST**2).mean()))
        return cls(centres.expand(num_rows, -1).numpy(), reach * spread, count_coordinate)

    @property
    def clip_norm(self) -> float:
        """Norm of a longest offset with the count coordinate, which is scaled as the offsets' ball is."""
        return self.radius / math.sqrt(1 - self.count_coordinate**2)

    def offsets(self, private_batches: Iterable[Batch]) -> Iterator[Batch]:
        """Embeddings (B, 1 + k) and their rows -> offsets with a count coordinate (B, 1 + k), of norm `clip_norm`."""
        for codes, rows in private_batches:
            which = np.zeros(len(codes), dtype=np.int64) if rows is None else rows
            # example by example, with no matrix product: no image moves another's last digits
            offsets = codes[:, 1:].astype(np.float64) - self.centres[which]
            length = np.sqrt(np.square(offsets).sum(axis=1, keepdims=True))
            offsets *= self.radius / np.maximum(length, self.radius)
            count = np.full((len(codes), 1), self.count_coordinate * self.clip_norm)
            yield np.concatenate([count, offsets], axis=1), rows

    def combine(
        self, second_look: np.ndarray, second: GaussianSum, *, declared_per_row: float, labelled: bool
    ) -> np.ndarray:
        """The noisy sum (K, 1 + k) that the second look (K, 1 + k) and the centres stand for, on the second's grid."""
        unit = self.count_coordinate * self.clip_norm
        counts = np.array([
            pooled_count(declared_per_row, TRUST[labelled], (row[0] / unit, second.noise_std / unit))
            for row in second_look
        ])  # fmt: skip
        sums = np.column_stack([self.count_coordinate * counts, counts[:, None] * self.centres + second_look[:, 1:]])
        grid = second.clip_norm / second.grid_units
        return np.rint(sums / grid) * grid


def look_twice(
    private_images: Tensor,
    private_rows: np.ndarray | None,
    hypernetwork: Any,
    *,
    noise_multiplier: float,
    num_rows: int,
    declared_size: float,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
    batch_size: int = 1024,
    config: LooksConfig = DEFAULT,
) -> Looks:
    """Both looks at private images.

    Parameters
    ----------
    private_images : (N, C, H, W) float in [-1, 1].
    private_rows : (N,) whole numbers below ``num_rows``, or None without labels.
    hypernetwork : public, with a prior; its encoder is used.
    noise_multiplier : of one look that costs as much as both together; each look has a share of its mu squared.
    num_rows : K classes, 1 without labels.
    declared_size : number of images in all, about: public.
    neighboring_relation, seed, batch_size : as in `release.release`.
    config : how the budget is shared, how long offsets may be, and which classes have a centre of their own.

    Raises
    ------
    InputError
        if the hypernetwork has no prior, or reads sums with cells.
    """
    encoder, labelled = hypernetwork.encoder, private_rows is not None
    if not hasattr(hypernetwork, "priors"):
        raise InputError("a sum with cells is measured from their centres already: use one look.")
    if declared_size < 1:
        raise InputError(f"two looks need a declared size of at least 1, got {declared_size:g}.")
    prior, constant = Prior.shipped(hypernetwork), encoder.config.count_coordinate
    each = declared_size / num_rows
    shared: dict[str, Any] = dict(dimension=encoder.config.dimension, neighboring_relation=neighboring_relation)
    whole = GaussianSum(noise_multiplier=noise_multiplier, **shared)
    own = num_rows == 1 or each >= config.own_centre * whole.noise_std
    share = config.share if own else config.share_together
    first = dataclasses.replace(
        whole, noise_multiplier=noise_multiplier / math.sqrt(share), num_rows=num_rows if own else 1
    )
    seeds = _seeds(seed)
    batches = embed_rows(encoder, private_images, private_rows if own else None, batch_size=batch_size)
    first_look = mechanism.noisy_sum(batches, first, seed=seeds[0])
    centring = Centring.of(
        first_look, first.noise_std, prior, constant,
        num_rows=num_rows, declared_per_row=each, labelled=labelled, reach=config.reach,
    )  # fmt: skip
    second = dataclasses.replace(
        whole,
        noise_multiplier=noise_multiplier / math.sqrt(1 - share),
        num_rows=num_rows,
        clip_norm=centring.clip_norm,
    )
    # embedded again, not kept: memory does not grow with the number of images
    batches = centring.offsets(embed_rows(encoder, private_images, private_rows, batch_size=batch_size))
    second_look = mechanism.noisy_sum(batches, second, seed=seeds[1])
    noisy_sum = centring.combine(second_look, second, declared_per_row=each, labelled=labelled)
    return Looks(noisy_sum, first, second)


def _seeds(seed: int | None) -> tuple[int | None, int | None]:
    """Of the two looks: with one seed for both the second's noise would be the first's over again."""
    return seed, None if seed is None else seed + 2**32


def fit(network: Any, noise_std: float, declared_per_class: float) -> tuple[Any, str]:
    """The network for a declared size and the noise of one look, and a description of the sums for the ledger."""
    network = network.fitting(TYPICAL * noise_std, declared_per_class)
    return network, f"each of two sums has a count and {network.encoder.config.dimension - 1} coordinates"


def charge(first: GaussianSum, delta: float) -> LedgerEntry:
    """What the first look costs."""
    return gaussian_charge(FIRST, first.noise_multiplier, delta, first.neighboring_relation)


def declared(ledger: Sequence[LedgerEntry], size: float) -> tuple[LedgerEntry, ...]:
    """The ledger, in which the declared size is: entered here, unless it is there already."""
    if any(entry.quantity == NUMBER_OF_IMAGES for entry in ledger):
        return tuple(ledger)
    return (*ledger, declaration(NUMBER_OF_IMAGES, f"number of images, about {size:g}"))


def pooled_count(declared: float, trust: float, noisy: tuple[float, float]) -> float:
    """A count from a declared one, wrong by the share ``trust`` or so, and a noisy one with its standard deviation.

    Weighted by inverse variances; at least 1.

    >>> round(pooled_count(100.0, 0.1, (130.0, 10.0)), 6), round(pooled_count(100.0, 0.1, (500.0, 0.0)), 6)
    (115.0, 500.0)
    """
    (count, std), wrong = noisy, trust * declared
    share = wrong**2 / (wrong**2 + std**2)
    return max(1.0, declared + share * (count - declared))
