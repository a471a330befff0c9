"""A release that fits the data: nested coordinates, as many as a declared size and noise support.

One sum of k numbers is too much for twelve images at epsilon = 1, where the noise on each coordinate of the mean is
0.3, and too little for ten thousand, where it is 0.0004. Here the coordinates are ordered, so that the first few say
the most: the leading directions in which public data sets differ from one another. A release takes the first k of
them, scales every image's vector back to the same length, and sums; nothing else about the mechanism changes. k is
public: it follows from the *declared* size, the noise and a table made on held-out public tasks.

What the coordinates are of: the features of a network that tells public characters apart and redraws them, beside the
encoder of `public.stages`. That encoder was trained to survive noise on tasks like the public ones, and tells
those apart better than a plain classifier's features do; on drawings unlike them it is the other way round, by far.
The shares of the two were chosen on public drawings by people (Kuzushiji-Kanji, Omniglot, Quick, Draw!), where
``benchmarks/transfer.py`` measures them.

The base model is the one of the weights it builds on, untouched: adapters of both can be compared, and so can rivals.

`hyperdp train --preset glyphs-nested` trains it: the features, the directions, the hypernetwork; public data only.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import Encoder, FeatureNetwork
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig, simulate_sums, summary

COORDINATES = (8, 16, 32, 64)  # sizes a release may have, besides the count
COUNT_COORDINATE = 0.25  # less than the plain encoder's: it takes less of the norm from what there is to say
SHARES = (1.0, 0.5)  # standard deviation, over public tasks, of the new features and of the plain encoder's


class NestedEncoder(nn.Module):
    """Image -> the first of the nested coordinates; called and used like `embedding.Encoder`.

    Parameters
    ----------
    encoder : Encoder
    features : FeatureNetwork
        Public, frozen, one image at a time.
    centre : (D,), projection : (D, 64)
        Public: mean and leading directions of the features of both, with their shares; see `directions`.
    coordinates : int
        How many are used, one of ``COORDINATES``. Output: (N, 1 + coordinates), of norm one.
    """

    centre: Tensor
    projection: Tensor

    def __init__(
        self, encoder: Encoder, features: FeatureNetwork, centre: Tensor, projection: Tensor, coordinates: int = 64
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.features = features.requires_grad_(False).eval()
        self.register_buffer("centre", centre)
        self.register_buffer("projection", projection)
        self.use(coordinates)

    def use(self, coordinates: int) -> None:
        """Give so many coordinates from now on."""
        if coordinates not in COORDINATES:
            raise InputError(f"coordinates must be one of {COORDINATES}, got {coordinates}.")
        self.coordinates = coordinates
        self.config = dataclasses.replace(
            self.encoder.config, dimension=1 + coordinates, count_coordinate=COUNT_COORDINATE
        )

    def train(self, mode: bool = True) -> NestedEncoder:
        """Frozen: always in evaluation mode."""
        return super().train(False)

    def everything(self, images: Tensor) -> Tensor:
        """All 64 coordinates (N, 1 + 64), not yet of norm one: what `first` cuts."""
        raw = _both(self.encoder, self.features, images)
        nested = (raw - self.centre) @ self.projection
        return torch.cat([torch.full_like(nested[:, :1], COUNT_COORDINATE), nested], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> (N, 1 + coordinates), of norm one."""
        nested = self.everything(images)
        sizes = torch.full((len(nested),), self.coordinates, device=nested.device)
        return first(nested, sizes)[:, : 1 + self.coordinates]


class NestedHyperNetwork(HyperNetwork):
    """The hypernetwork for sums of nested coordinates: it reads as many as there are, and is told how many.

    Attributes
    ----------
    table : mapping
        Noise on the mean -> number of coordinates -> denoising loss on held-out public tasks.
    centroids : mapping
        Of `hyperdp_lib.cells`; empty if the weights have none.
    """

    def __init__(self, encoder: NestedEncoder, base_model: nn.Module, config: HyperNetworkConfig | None = None) -> None:
        super().__init__(encoder, base_model, config)
        self.trunk_in = nn.Linear(COORDINATES[-1] + 2 + len(COORDINATES), self.config.hidden)
        self.table: Mapping[float, Mapping[int, float]] = {}
        self.centroids: Mapping[str, Tensor] = {}

    def features(self, noisy_sum: Tensor, noise_std: Tensor) -> Tensor:
        """What the trunk reads: the noisy mean with zeros where there is no coordinate, and which sizes there are."""
        mean, *rest = summary(noisy_sum, noise_std, COUNT_COORDINATE)
        sizes = torch.tensor(COORDINATES, device=mean.device) == mean.shape[1]
        told = sizes.to(mean.dtype).expand(len(mean), -1)
        return torch.cat([F.pad(mean, (0, COORDINATES[-1] - mean.shape[1])), *rest, told], 1)

    def codes(self, images: Tensor) -> Tensor:
        """All coordinates of images (N, C, H, W): `first` cuts them at every step anew."""
        return self.encoder.everything(images)

    def simulate(self, codes: Tensor, sizes: Tensor, noise_std: Tensor, generator: torch.Generator) -> Tensor:
        """What the trunk reads of simulated noisy sums, each task's with a random number of coordinates."""
        counts = torch.tensor(COORDINATES)[torch.randint(len(COORDINATES), (len(codes),), generator=generator)]
        return self.features_of(*simulate_sums(first(codes, counts), sizes, noise_std, generator), counts)

    def features_of(self, sums: Tensor, noise_std: Tensor, counts: Tensor) -> Tensor:
        """What the trunk reads of sums (T, 1 + 64) of which the first ``counts`` (T,) coordinates were released."""
        read = [self.features(sums[counts == k][:, : 1 + k], noise_std[counts == k]) for k in COORDINATES]
        order = torch.cat([torch.nonzero(counts == k)[:, 0] for k in COORDINATES]).argsort()
        return torch.cat(read)[order]

    def using(self, coordinates: int) -> NestedHyperNetwork:
        """A copy for releases of so many coordinates."""
        other = copy.deepcopy(self)
        other.encoder.use(coordinates)
        return other

    def fitting(self, noise_std: float, declared_per_class: float) -> NestedHyperNetwork:
        """A copy with as many coordinates as a declared size of a class and the noise on a sum support; both public."""
        return self.using(self.coordinates_for(noise_std, declared_per_class))

    def coordinates_for(self, noise_std: float, declared_per_class: float) -> int:
        """How many coordinates do best on held-out public tasks under the noise of a declared, public size."""
        if not self.table:
            raise InputError("these weights have no table of losses: they were not made by hyperdp_lib.nested.")
        noise = max(noise_std / max(declared_per_class, 1.0), 1e-6)
        losses = self.table[min(self.table, key=lambda level: abs(math.log(level / noise)))]
        return min(losses, key=lambda size: losses[size])


def first(nested: Tensor, sizes: Tensor) -> Tensor:
    """Each row's first coordinates, zeros after them, scaled so that with the count the norm is one.

    ``nested`` is (T, ..., 1 + 64), ``sizes`` (T,).
    """
    order = torch.arange(nested.shape[-1] - 1, device=nested.device)
    kept = (order < sizes[:, None]).view(len(sizes), *(1,) * (nested.ndim - 2), -1)
    direction = F.normalize(nested[..., 1:] * kept, dim=-1, eps=1e-6)
    return torch.cat([nested[..., :1], direction * math.sqrt(1 - COUNT_COORDINATE**2)], -1)


def _both(encoder: nn.Module, features: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([features(images), encoder(images)[:, 1:]], 1)
