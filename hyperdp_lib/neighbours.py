"""An adapter trained a little further on the public images that lie nearest to what was released: no privacy cost.

A decoder answers from what it learned in public training; retrieval shows public images themselves. Between the two
stands this: the adapter that the hypernetwork gives is the start of a few steps of plain LoRA training on the public
data sets whose means are nearest to the posterior mean of the release (`hyperdp_lib.posterior`). A share of every step
is on samples of the adapter as it was, so that it does not forget what the release said and no public image shows.
Only the noisy sum, public models and public images are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion, embedding, release
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.baselines.controls import PublicBank
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.posterior import Prior, posterior
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.training import adapted_loss


@dataclass(frozen=True)
class NeighboursConfig:
    """Public choices of the training on neighbours.

    Parameters
    ----------
    num_sets : int
        Nearest public data sets of each class.
    share : float
        Of their images, in (0, 1]: the nearest to the same mean are used.
    own_share : float
        Of a step's images that are samples of the adapter at the start, in [0, 1).
    num_steps : int
        Steps of AdamW, all classes side by side.
    learning_rate : float
        At the first step; it falls linearly to a tenth.
    images_per_step : int
        Of each class.
    sampling_steps : int
        Denoising steps of the adapter's own samples.
    """

    num_sets: int = 10
    share: float = 1.0
    own_share: float = 0.5
    num_steps: int = 50
    learning_rate: float = 1e-3
    images_per_step: int = 16
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("num_sets", "num_steps", "images_per_step", "sampling_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.share <= 1:
            raise InputError(f"share must lie in (0, 1], got {self.share}.")
        if not 0 <= self.own_share < 1:
            raise InputError(f"own_share must lie in [0, 1), got {self.own_share}.")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be positive, got {self.learning_rate}.")

    @property
    def note(self) -> str:
        """What the certificate says."""
        return (
            f"trained for {self.num_steps} steps on images of the {self.num_sets} public data sets nearest to the "
            "released sum: post-processing with public models and public data, no further privacy cost"
        )


@torch.no_grad()
def nearest_images(means: Tensor, bank: PublicBank, encoder: Any, config: NeighboursConfig) -> Tensor:
    """Public images (K, N, C, H, W) in [-1, 1] of the data sets nearest to means (K, k - 1), the nearest first."""
    if config.num_sets > len(bank):
        raise InputError(f"num_sets must lie in 1 .. {len(bank)}, the size of the bank, got {config.num_sets}.")
    means = means.float().cpu()
    sets = torch.cdist(means, bank.embeddings[:, 1:]).topk(config.num_sets, largest=False).indices
    images = from_levels(bank.pixels[sets].flatten(1, 2))
    codes = embedding.embed(encoder, images.flatten(0, 1))[:, 1:].cpu().unflatten(0, images.shape[:2])
    order = torch.cdist(codes, means[:, None])[:, :, 0].argsort(1)
    kept = order[:, : max(1, round(config.share * images.shape[1]))]
    return images[torch.arange(len(images))[:, None], kept]


def fine_tune(
    adapter: Adapter,
    public_images: Tensor,
    base_model: nn.Module,
    config: NeighboursConfig,
    *,
    generator: torch.Generator,
    progress: bool = False,
) -> Adapter:
    """K adapters after training each on its public images (K, N, C, H, W); the base model is left as it is."""
    device = next(base_model.parameters()).device
    own = round(config.own_share * config.images_per_step)
    samples = None
    if own:
        drawn = diffusion.sample(
            base_model,
            adapter,
            4 * config.images_per_step * len(adapter),
            generator=generator,
            num_steps=config.sampling_steps,
        )
        samples = drawn.unflatten(0, (len(adapter), -1))
    trained = adapter._map(lambda factor: factor.detach().clone().requires_grad_())
    adamw = torch.optim.AdamW(list(trained.parameters()), config.learning_rate, (0.9, 0.99), weight_decay=0.0)
    for done in progress_bar(range(config.num_steps), desc="neighbours", show=progress):
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.9 * done / config.num_steps)
        batch = [_some(public_images, config.images_per_step - own, generator)]
        if samples is not None:
            batch.append(_some(samples, own, generator))
        loss = adapted_loss(base_model, trained, torch.cat(batch, 1).to(device), generator)
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    return trained.detach()


def _some(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(images.shape[1], (len(images), count), generator=generator)
    return images[torch.arange(len(images))[:, None], chosen]


def decode_near(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    hypernetwork: Any,
    base_model: nn.Module,
    bank: PublicBank,
    config: NeighboursConfig | None = None,
    *,
    class_names: Sequence[str] = (),
    generator: torch.Generator,
    progress: bool = False,
) -> Adapter:
    """Adapters of a released sum (K, k), each trained further on its public neighbours.

    Parameters
    ----------
    bank : PublicBank
        Of the hypernetwork's encoder: where neighbours and the prior are from.
    generator : torch.Generator
        Of samples, batches and diffusion noise, on the CPU: public randomness.
    """
    config = config or NeighboursConfig()
    encoder = hypernetwork.encoder
    adapter = release.decode(np.asarray(noisy_sum), noise_std, hypernetwork, class_names)
    prior = Prior.of_bank(encoder, bank)
    means, _ = posterior(noisy_sum, noise_std, prior, encoder.config.count_coordinate)
    images = nearest_images(means, bank, encoder, config)
    return fine_tune(adapter, images, base_model, config, generator=generator, progress=progress)
