r"""What a noisy sum leaves open: draws of the clean mean behind it. No privacy cost.

One adapter is one guess. Under much noise many data sets could have given the same sum, and a reader should see how far
apart they are. Take the means of data sets as Gaussian, with the mean ``a`` and the covariance ``B`` that public tasks
have, and the images of one data set as spread by ``W`` about its mean. Of n images the noisy mean is then

    m = theta + error,   theta ~ N(a, B),   error ~ N(0, W / n + tau^2 I),   tau = noise_std / n,

and what is known of theta after seeing m is again Gaussian (e.g. Bishop 2006, section 2.3.3):

    N( a + G (m - a),  B - G B ),   G = B (B + W / n + tau^2 I)^-1.

n is the noisy count. Each draw is decoded as if it were a clean mean. Draws that look alike say that the noise did not
matter; draws of different characters say that the release does not know which it was.

Instead of one adapter a class may then be (`decode`) the mixture of its draws' adapters, one adapter with the average
of their weight updates, or that of the posterior mean, the hypernetwork being told how uncertain it still is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hyperdp_lib import embedding
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.hypernetwork import PRIORS_FILE, noisy_count

CLEAN = 0.01  # noise on the mean that the hypernetwork is told for a draw: little, as on a large data set's


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

    @classmethod
    def of_bank(cls, encoder: Any, bank: Any) -> Prior:
        """From data sets of a `baselines.controls.PublicBank`: 1,000 of them, 12 images of each."""
        return cls.fit(encoder, from_levels(bank.pixels[:1000, :12]))


@dataclass(frozen=True)
class DrawsConfig:
    """Public choices of how what is left open is decoded.

    Parameters
    ----------
    num_draws : int
        Draws D of each class, at most 99. 0: the posterior mean itself, with its remaining uncertainty told as noise.
    average : bool
        One adapter a class, see `average`; by default a class is the mixture of D adapters.
    """

    num_draws: int = 8
    average: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.num_draws <= 99:
            raise InputError(f"num_draws must lie in 0 .. 99, got {self.num_draws}.")
        if self.num_draws == 0:  # there is nothing to average: one and the same configuration
            object.__setattr__(self, "average", False)

    @property
    def note(self) -> str:
        """What the certificate says."""
        many = f"{self.num_draws} draws of the clean mean, {'averaged' if self.average else 'mixed'}"
        what = many if self.num_draws else "the posterior mean, with its uncertainty"
        return f"decoded from {what}: post-processing with public models and public data, no further privacy cost"


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


def draw(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    prior: Prior,
    num_draws: int,
    *,
    count_coordinate: float,
    generator: torch.Generator,
) -> Tensor:
    """Clean means ``(num_draws, K, k - 1)`` that could have given the noisy sum ``(K, k)``, as likely as they are.

    ``generator``: public randomness, on the CPU.
    """
    if num_draws < 1:
        raise InputError(f"num_draws must be at least 1, got {num_draws}.")
    means, covariances = posterior(noisy_sum, noise_std, prior, count_coordinate)
    values, vectors = torch.linalg.eigh(covariances)
    root = vectors * values.clamp_min(0).sqrt()[:, None]
    normal = torch.randn(num_draws, *means.shape, generator=generator, dtype=torch.float64)
    return means + torch.einsum("kij,dkj->dki", root, normal)


@torch.no_grad()
def decode_draws(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    hypernetwork: Any,
    prior: Prior,
    num_draws: int,
    *,
    class_names: Sequence[str] = (),
    generator: torch.Generator,
) -> Adapter:
    """Adapters of the draws of each class, K times ``num_draws``: those of a class stand together.

    Examples
    --------
    >>> adapter, certificate, noisy_sum = release(...)  # doctest: +SKIP
    >>> prior = Prior.fit(hypernetwork.encoder, tasks.sample_tasks(2000, 12, generator))  # doctest: +SKIP
    >>> maybes = decode_draws(noisy_sum, certificate.noise_std, hypernetwork, prior, 8,
    ...                       generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
    """
    names = tuple(class_names) or ("adapter",)
    constant = hypernetwork.encoder.config.count_coordinate
    clean = draw(noisy_sum, noise_std, prior, num_draws, count_coordinate=constant, generator=generator)
    sums = torch.as_tensor(noisy_sum).double()
    count = noisy_count(sums, noise_std, constant)
    counts = count.repeat_interleave(num_draws)[:, None]
    means = clean.transpose(0, 1).flatten(0, 1)
    inputs = torch.cat([constant * counts, counts * means], 1)
    device = next(hypernetwork.parameters()).device
    drawn_names = tuple(f"{name}/{number}" for name in names for number in range(num_draws))
    return hypernetwork(inputs.float().to(device), (CLEAN * counts[:, 0]).float().to(device), drawn_names).detach()


@torch.no_grad()
def decode_mean(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    hypernetwork: Any,
    prior: Prior,
    *,
    class_names: Sequence[str] = (),
) -> Adapter:
    """Adapters of the posterior means; as noise is told the root mean variance of a coordinate that is left."""
    constant = hypernetwork.encoder.config.count_coordinate
    means, covariances = posterior(noisy_sum, noise_std, prior, constant)
    count = noisy_count(torch.as_tensor(noisy_sum).double(), noise_std, constant)
    left = covariances.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0).sqrt()
    inputs = torch.cat([constant * count[:, None], count[:, None] * means], 1)
    device = next(hypernetwork.parameters()).device
    names = tuple(class_names) or ("adapter",)
    return hypernetwork(inputs.float().to(device), (left * count).float().to(device), names).detach()


@torch.no_grad()
def average(decoded: Adapter, class_names: Sequence[str]) -> Adapter:
    """One adapter a class with the mean weight update of its members, which stand together.

    The mean of D updates of rank r has rank up to D r. It is cut down to the best approximation of rank r, by singular
    value decomposition (Eckart & Young 1936), so that the adapter is like any other. Layers are linear or convolutions
    without groups.
    """
    classes, factors = len(class_names), {}
    for layer, (a, b) in decoded.factors.items():
        rows = a.flatten(2).unflatten(0, (classes, -1)).flatten(1, 2)  # (K, D r, in)
        columns = b.flatten(2).unflatten(0, (classes, -1)).transpose(1, 2).flatten(2)  # (K, out, D r)
        left, inner_left = torch.linalg.qr(columns * (classes / len(decoded)))
        right, inner_right = torch.linalg.qr(rows.mT)
        u, s, v = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
        r = a.shape[1]
        root = s[:, :r].sqrt()
        low_b, low_a = (left @ u[..., :r]) * root[:, None], root[:, :, None] * (v[:, :r] @ right.mT)
        factors[layer] = (low_a.reshape(classes, *a.shape[1:]), low_b.reshape(classes, *b.shape[1:]))
    return dataclasses.replace(decoded, factors=factors, names=tuple(class_names))


def decode(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    hypernetwork: Any,
    prior: Prior,
    config: DrawsConfig | None = None,
    *,
    class_names: Sequence[str] = (),
    generator: torch.Generator,
) -> Adapter:
    """Adapters of a released sum (K, k) from what it leaves open: one a class, or the D of a mixture for each."""
    config = config or DrawsConfig()
    names = tuple(class_names) or ("adapter",)
    if config.num_draws == 0:
        return decode_mean(noisy_sum, noise_std, hypernetwork, prior, class_names=names)
    drawn = decode_draws(
        noisy_sum, noise_std, hypernetwork, prior, config.num_draws, class_names=names, generator=generator
    )
    return average(drawn, names) if config.average else drawn


def save_priors(folder: Path, network: Any, tasks: Tensor) -> None:
    """Write the priors of weights, one for each number of coordinates, from public tasks (T, M, C, H, W)."""
    from hyperdp_lib.nested import COORDINATES, NestedHyperNetwork

    nested = isinstance(network, NestedHyperNetwork)
    sizes = COORDINATES if nested else (network.encoder.config.dimension - 1,)
    fitted = {k: Prior.fit(network.using(k).encoder, tasks) for k in sizes}
    tensors = {f"{k}.{part}": value.float().contiguous() for k in sizes for part, value in vars(fitted[k]).items()}
    (folder / PRIORS_FILE).write_bytes(to_safetensors(tensors))
