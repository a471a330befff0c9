r"""What public data sets say about a noisy sum: the Gaussian prior of clean means, and the posterior. No privacy cost.

Take the means of data sets as Gaussian, with the mean ``a`` and the covariance ``B`` that public tasks have, and the
images of one data set as spread by ``W`` about its mean. Of n images the noisy mean is then

    m = theta + error,   theta ~ N(a, B),   error ~ N(0, W / n + tau^2 I),   tau = noise_std / n,

and what is known of theta after seeing m is again Gaussian (e.g. Bishop 2006, section 2.3.3):

    N( a + G (m - a),  B - G B ),   G = B (B + W / n + tau^2 I)^-1.

n is the noisy count. Two looks take the posterior mean as their centre (`hyperdp_lib.looks`); a release is read as a
classifier by both moments (`hyperdp_lib.classifier`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hyperdp_lib import embedding
from hyperdp_lib.data import InputError
from hyperdp_lib.hypernetwork import noisy_count
from hyperdp_lib.nested import COORDINATES, NestedHyperNetwork
from hyperdp_lib.pretrained import PRIORS_FILE


@dataclass(frozen=True, eq=False)
class Prior:
    """Means of public data sets, in the coordinates of an encoder besides the count.

    Attributes
    ----------
    mean : Tensor
        ``(k - 1,)``.
    between, within : Tensor
        ``(k - 1, k - 1)``: covariance of data sets' means, and of images about the mean of theirs.
    """

    mean: Tensor
    between: Tensor
    within: Tensor

    @classmethod
    def fit(cls, encoder: Any, tasks: Tensor) -> Prior:
        """From public tasks ``(T, M, C, H, W)``, T well above k and M at least 2."""
        codes = embedding.embed(encoder, tasks.flatten(0, 1))[:, 1:].double().view(*tasks.shape[:2], -1)
        size = codes.shape[1]
        if size < 2 or len(codes) <= codes.shape[2]:
            raise InputError(f"a prior over {codes.shape[2]} coordinates needs more tasks than that, of two images.")
        means = codes.mean(1)
        within = torch.cov((codes - means[:, None]).flatten(0, 1).T) * size / (size - 1)
        between = torch.cov(means.T) - within / size
        # an estimate: what sampling error made negative is no variance
        values, vectors = torch.linalg.eigh(between)
        return cls(means.mean(0), (vectors * values.clamp_min(0)) @ vectors.T, within)

    @classmethod
    def shipped(cls, hypernetwork: Any) -> Prior:
        """The one that belongs to the weights, over as many coordinates as the hypernetwork's encoder gives now.

        Raises InputError if the weights have none.
        """
        k = hypernetwork.encoder.config.dimension - 1
        found = [hypernetwork.priors.get(f"{k}.{part.name}") for part in dataclasses.fields(cls)]
        if any(part is None for part in found):
            raise InputError(f"these weights have no {PRIORS_FILE}: training.add_public_tables makes it.")
        return cls(*(part.double() for part in found))


def posterior(
    noisy_sum: np.ndarray | Tensor, noise_std: float, prior: Prior, count_coordinate: float
) -> tuple[Tensor, Tensor]:
    """Means ``(K, k - 1)`` and covariances ``(K, k - 1, k - 1)`` of the clean means behind a noisy sum ``(K, k)``."""
    seen, error = observed(noisy_sum, noise_std, prior.within, count_coordinate)
    gain = torch.linalg.solve(prior.between + error, prior.between.expand_as(error)).mT  # B (B + error)^-1
    means = prior.mean + torch.einsum("kij,kj->ki", gain, seen - prior.mean)
    covariances = prior.between - gain @ prior.between
    return means, (covariances + covariances.mT) / 2


def observed(
    noisy_sum: np.ndarray | Tensor, noise_std: float, within: Tensor, count_coordinate: float
) -> tuple[Tensor, Tensor]:
    """Noisy means ``(K, k - 1)`` of a noisy sum ``(K, k)``, and covariances ``(K, k - 1, k - 1)`` of their errors."""
    sums = torch.as_tensor(noisy_sum).double()
    if sums.shape[1] - 1 != len(within):
        raise InputError(f"the prior is over {len(within)} coordinates, the sum has {sums.shape[1] - 1}.")
    count = noisy_count(sums, noise_std, count_coordinate)
    noise = (noise_std / count).square()
    identity = torch.eye(len(within), dtype=torch.float64)
    return sums[:, 1:] / count[:, None], within / count[:, None, None] + noise[:, None, None] * identity


def save_priors(folder: Path, network: Any, tasks: Tensor) -> None:
    """Write the priors of weights, one for each number of coordinates, from public tasks (T, M, C, H, W)."""
    nested = isinstance(network, NestedHyperNetwork)
    sizes = COORDINATES if nested else (network.encoder.config.dimension - 1,)
    fitted = {k: Prior.fit(network.using(k).encoder, tasks) for k in sizes}
    tensors = {f"{k}.{part}": value.float().contiguous() for k in sizes for part, value in vars(fitted[k]).items()}
    (folder / PRIORS_FILE).write_bytes(to_safetensors(tensors))
