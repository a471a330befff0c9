"""Several means instead of one: what a data set looks like, where, as far as its size and the noise support.

The mean of six thousand handwritten sevens is one point, however little noise is on it; that some have a bar and some
have none is lost in it. Here space is divided into M *cells*, by public centroids, and an image's vector goes into the
block of the cell it lies in:

    v(x) = e_c(x) (x) phi(x),   c(x) = the nearest centroid,   |v(x)| = |phi(x)|,

so a sum of such vectors holds the count and the sum of every cell, its sensitivity is that of one plain sum, and so is
the noise on each number. It is the same mechanism, released once, with a longer vector. Every cell that has enough in
it is decoded into an adapter of its own; a class is their mixture, in proportion to the noisy counts.

Which cells there are is public: centroids of the vectors of public tasks. How many is public, too: it follows from the
*declared* size, the noise, and whether there are labels (`cells_for`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib import embedding
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.data import InputError
from hyperdp_lib.mechanism import MAX_COORDINATES
from hyperdp_lib.nested import COORDINATES, NestedHyperNetwork
from hyperdp_lib.pretrained import CELLS_FILE

NUMBERS = (1, 4, 16, 64)  # of cells, that a release may have
# By number of cells: images for each, if all held as many, over the noise on a number; see `cells_for`. A set without
# labels is split by cells alone, so it gains more by them, but not by four: too few to tell its kinds of images apart.
ENOUGH: dict[bool, dict[int, float]] = {
    True: {4: 16.0, 16: 16.0, 64: 16.0},  # a labelled class
    False: {16: 7.0, 64: 16.0},  # one set without labels
}
LEAST = 8  # images for each cell, if there is no noise
COUNTED = 2.0  # times the noise on a count: a cell with less is left out
SLOTS = 20  # members of the mixture that stands for a class: weights are multiples of 1 / SLOTS


def cells_for(noise_std: float, declared_per_class: float, *, labelled: bool, num_classes: int = 1) -> int:
    """How many cells a declared size of a class, or of a set without labels, and the noise on a sum support; public.

    Of many classes, no more than the mechanism can count: `mechanism.MAX_COORDINATES` numbers in all.

    >>> [cells_for(3.73, size, labelled=True) for size in (144, 1000, 6000)], cells_for(0.5, 144, labelled=True)
    ([1, 16, 64], 16)
    >>> [cells_for(3.73, size, labelled=False) for size in (128, 512, 6000)], cells_for(1.0, 128, labelled=False)
    ([1, 16, 64], 16)
    >>> [cells_for(3.73, 6000, labelled=True, num_classes=count) for count in (252, 253, 1008, 1009)]
    [64, 16, 16, 4]
    """
    most = MAX_COORDINATES // (num_classes * (1 + COORDINATES[-1]))
    supported = (
        m
        for m, enough in ENOUGH[labelled].items()
        if declared_per_class / m >= max(enough * noise_std, LEAST) and m <= most
    )
    return max(supported, default=1)


def find_centroids(encoder: Any, public_images: Tensor, count: int, seed: int = 0) -> Tensor:
    """Directions (count, k) of cells: k-means of the directions of public images' vectors, the count left out."""
    from sklearn.cluster import KMeans

    directions = F.normalize(embedding.embed(encoder, public_images)[:, 1:], dim=1)
    found = KMeans(count, n_init=1, random_state=seed).fit(directions.double().numpy())
    return F.normalize(torch.from_numpy(found.cluster_centers_).float(), dim=1)


class CellEncoder(nn.Module):
    """Image -> its vector in the block of its cell, zeros elsewhere: (N, M (1 + k)), of the vector's own norm.

    Parameters
    ----------
    encoder : Encoder
        Public; one image at a time.
    centroids : (M, k)
        Public; see `find_centroids`.
    """

    centroids: Tensor

    def __init__(self, encoder: Any, centroids: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centroids", centroids)
        if centroids.ndim != 2 or centroids.shape[1] != encoder.config.dimension - 1:
            raise InputError(f"centroids must be (M, {encoder.config.dimension - 1}), got {tuple(centroids.shape)}.")
        self.config = dataclasses.replace(encoder.config, dimension=len(centroids) * encoder.config.dimension)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> (N, M (1 + k))."""
        codes, scores = self.weighed(images).tensor_split([self.encoder.config.dimension], 1)
        cell = scores.argmax(1)
        blocks = F.one_hot(cell, len(self.centroids)).to(codes.dtype)[:, :, None] * codes[:, None]
        return blocks.flatten(1)

    def weighed(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> vectors with the scores of all cells (N, 1 + k + M): what `forward` decides by."""
        codes = self.encoder(images)
        # No matrix product: its rounding may depend on the place in a batch, and a tie would then move an image to
        # another cell because some other image is there.
        return torch.cat([codes, (codes[:, None, 1:] * self.centroids).sum(2)], 1)


class CellHyperNetwork(nn.Module):
    """A hypernetwork for sums with cells: decodes each with another hypernetwork, and mixes.

    Its adapter has ``SLOTS`` members for each class, in the order of the classes; a part with a larger share is there
    several times. Sampled like any other, it gives every class in equal number and its parts by their share.

    Parameters
    ----------
    hypernetwork : HyperNetwork
        For sums without cells.
    centroids : (M, k)
        For vectors of its encoder.
    counted : float
        A cell is left out if its count is less than so many times the noise on it; the largest never is.
    """

    def __init__(self, hypernetwork: Any, centroids: Tensor, counted: float = COUNTED) -> None:
        super().__init__()
        self.hypernetwork = hypernetwork
        self.counted = counted
        self.encoder = CellEncoder(hypernetwork.encoder, centroids)
        self.base_model_sha256: str | None = hypernetwork.base_model_sha256

    @classmethod
    def fitting(
        cls,
        hypernetwork: NestedHyperNetwork,
        noise_std: float,
        declared_per_class: float,
        *,
        labelled: bool,
        num_classes: int = 1,
    ) -> CellHyperNetwork:
        """With as many cells, and coordinates in each, as a declared size of a class and the noise support."""
        count = cells_for(noise_std, declared_per_class, labelled=labelled, num_classes=num_classes)
        return cls.with_cells(count, hypernetwork, noise_std, declared_per_class)

    @classmethod
    def with_cells(
        cls,
        count: int,
        hypernetwork: NestedHyperNetwork,
        noise_std: float,
        declared_per_class: float,
        counted: float = COUNTED,
    ) -> CellHyperNetwork:
        """With so many cells, and as many coordinates in each as a declared size of a class and the noise support."""
        # a class fills only some of the cells: about a fourth part
        fitted = hypernetwork.fitting(noise_std, declared_per_class / max(1.0, count / 4))
        k = fitted.encoder.coordinates
        if count > 1 and not fitted.centroids:
            raise InputError(f"these weights have no {CELLS_FILE}: training.add_public_tables makes it.")
        return cls(fitted, fitted.centroids[f"{k}x{count}"] if count > 1 else torch.zeros(1, k), counted)

    def parts(self, noisy_sum: Tensor, noise_std: Tensor | float) -> list[tuple[Tensor, Tensor]]:
        """Of each class: the sums of the cells that have enough in them (m, 1 + k), and their slots (m,) on the CPU."""
        constant = self.encoder.config.count_coordinate
        cells = len(self.encoder.centroids)
        found = []
        for row in noisy_sum.view(len(noisy_sum), cells, -1):
            count = row[:, 0] / constant
            kept = count > self.counted * float(torch.as_tensor(noise_std).max()) / constant
            kept[count.argmax()] = True
            found.append((row[kept], apportion(count[kept].clamp_min(1e-6)).cpu()))
        return found

    def forward(
        self, noisy_sum: Tensor, noise_std: Tensor | float, names: Sequence[str] | None = None
    ) -> Adapter:
        """Adapters of K data sets from noisy sums (K, M (1 + k)): a mixture of ``SLOTS`` members for each."""
        names = tuple(map(str, range(len(noisy_sum)))) if names is None else tuple(names)
        parts = self.parts(noisy_sum, noise_std)
        decoded = self.hypernetwork(torch.cat([sums for sums, _ in parts]), noise_std)
        return mix(decoded, [slots for _, slots in parts], names)

    def decoder_state(self) -> dict[str, Tensor]:
        """Weights without the encoder's."""
        return self.hypernetwork.decoder_state()


def reading(network: NestedHyperNetwork, numbers: int) -> NestedHyperNetwork | CellHyperNetwork:
    """The network for a noisy sum of so many numbers a class: these follow from coordinates and cells, and tell both.

    >>> len({count * (1 + k) for count in NUMBERS for k in COORDINATES}) == len(NUMBERS) * len(COORDINATES)
    True
    """
    count = _cells_of(numbers)
    k = numbers // count - 1
    if count > 1 and f"{k}x{count}" in network.centroids:
        return CellHyperNetwork(network.using(k), network.centroids[f"{k}x{count}"])
    return network.using(numbers - 1)


def _cells_of(numbers: int) -> int:
    """How many cells a sum of so many numbers a class has; 1 if it is a plain one."""
    return next((count for count in NUMBERS[1:] if numbers in {count * (1 + k) for k in COORDINATES}), 1)


def released_proportions(noisy_sum: np.ndarray) -> Tensor:
    """Shares (K,) of the classes in a released noisy sum (K, ...), float64 and adding up to 1: post-processing.

    A class's count is the first coordinate of its sum, with cells added up over these. Noise may make it negative,
    which counts as none. Where no class has any, the shares are equal.

    >>> released_proportions(np.array([[30.0, 1.0], [-2.0, 5.0], [10.0, 0.0]])).tolist()
    [0.75, 0.0, 0.25]
    >>> released_proportions(np.array([[-1.0, 1.0], [0.0, 5.0]])).tolist()
    [0.5, 0.5]
    """
    sums = torch.from_numpy(np.asarray(noisy_sum, dtype=np.float64))
    counts = sums.view(len(sums), _cells_of(sums.shape[1]), -1)[:, :, 0].sum(1).clamp_min(0.0)
    return counts / counts.sum() if counts.sum() > 0 else torch.full_like(counts, 1 / len(counts))


def tabulate(network: NestedHyperNetwork, public_images: Tensor) -> dict[str, Tensor]:
    """Centroids for every number of coordinates k and of cells M, by the name ``{k}x{M}``."""
    return {
        f"{k}x{count}": find_centroids(network.using(k).encoder, public_images, count)
        for k in COORDINATES
        for count in NUMBERS[1:]
    }


def apportion(weights: Tensor, total: int = SLOTS) -> Tensor:
    """``total`` slots by weight, largest remainders first; at most ``total`` weights get any.

    >>> apportion(torch.tensor([2.0, 1.0, 1.0])).tolist(), apportion(torch.ones(3), 8).tolist()
    ([10, 5, 5], [3, 3, 2])
    """
    quota = weights / weights.sum() * total
    slots = quota.floor().long()
    slots[(quota - slots).argsort(descending=True, stable=True)[: total - int(slots.sum())]] += 1
    return slots


def mix(decoded: Adapter, slots: Sequence[Tensor], names: Sequence[str]) -> Adapter:
    """The mixture: members repeated by their slots, class after class, named ``3/1`` to ``3/20``."""
    members = torch.arange(decoded.num_adapters).repeat_interleave(torch.cat(list(slots)))
    factors = {layer: (a[members], b[members]) for layer, (a, b) in decoded.factors.items()}
    told = tuple(f"{name}/{number}" for name in names for number in range(1, SLOTS + 1))
    return dataclasses.replace(decoded, factors=factors, names=told)
