"""Controls: what could be had without the method, from the very same noisy sum.

* `public_only`: the hypernetwork is fed noise and nothing else (epsilon = 0);
* `noisy_class_sums` with ``epsilon = inf``: no noise, what privacy costs;
* `nearest_public`: the noisy embedding retrieves its nearest public data sets, which are shown as they are;
* `nearest_mean_accuracy`: a classifier by the nearest noisy class mean, with no images at all.

All of them post-process one noisy sum ``(T, k)``, a row for each class, whose coordinate 0 carries the noisy
count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hyperdp_lib import accounting, embedding, mechanism
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.data import InputError, from_levels, to_levels
from hyperdp_lib.progress import progress_bar


class PublicTasks(Protocol):
    """A source of small public data sets, such as `hyperdp_lib.public.glyphs.GlyphTasks`."""

    def sample_tasks(self, num_tasks: int, images_per_task: int, generator: torch.Generator) -> Tensor:
        """Images ``(num_tasks, images_per_task, C, H, W)`` in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class PublicBank:
    """Many small public data sets, with the mean embedding of each: what retrieval retrieves from.

    Attributes
    ----------
    embeddings : Tensor
        ``(num_tasks, k)`` mean embeddings, float32.
    pixels : Tensor
        ``(num_tasks, images_per_task, C, H, W)`` uint8.
    """

    embeddings: Tensor
    pixels: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or self.pixels.ndim != 5 or len(self.embeddings) != len(self.pixels):
            raise InputError(
                "a public bank needs embeddings (T, k) and pixels (T, M, C, H, W) of the same T."
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, task_index: int, count: int, generator: torch.Generator) -> Tensor:
        """``count`` images of one task in [-1, 1]; none is repeated before all were shown."""
        size = self.pixels.shape[1]
        rounds = [torch.randperm(size, generator=generator) for _ in range(math.ceil(count / size))]
        return from_levels(self.pixels[task_index, torch.cat(rounds)[:count]])

    @classmethod
    def build(
        cls,
        tasks: PublicTasks,
        encoder: Any,
        *,
        num_tasks: int = 6000,
        images_per_task: int = 40,
        seed: int = 0,
        progress: bool = False,
    ) -> PublicBank:
        """Draw tasks and embed them; the same seed gives the same bank."""
        generator = torch.Generator().manual_seed(seed)
        means, pixels, chunk = [], [], 50
        for start in progress_bar(range(0, num_tasks, chunk), show=progress, desc="public bank"):
            drawn = tasks.sample_tasks(min(chunk, num_tasks - start), images_per_task, generator=generator)
            # through bytes first, so that the embedding belongs to the images that will be shown
            kept = to_levels(drawn).cpu()
            flat = embedding.embed(encoder, from_levels(kept.flatten(0, 1)), batch_size=1000)
            means.append(flat.cpu().view(*kept.shape[:2], -1).mean(1))
            pixels.append(kept)
        return cls(torch.cat(means).detach(), torch.cat(pixels))


def noisy_class_sums(
    private_images: Tensor,
    private_labels: Tensor | None,
    encoder: Any,
    *,
    epsilon: float,
    num_classes: int = 1,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
) -> tuple[np.ndarray, float]:
    """The one noisy sum that all methods but DP-SGD share.

    Returns
    -------
    noisy_sum : ndarray
        ``(num_classes, k)`` float64.
    noise_std : float
        Standard deviation of its noise.  ``epsilon = inf`` adds none and, not being private, needs a
        ``seed``.
    """
    config = gaussian_sum(epsilon, encoder.config.dimension, num_classes, delta, neighboring_relation)
    rows = None if private_labels is None else private_labels.cpu().numpy().astype(np.int64)
    batches = embedding.embed_rows(encoder, private_images, rows)
    return mechanism.noisy_sum(batches, config, seed=seed), config.noise_std


def noise_std(epsilon: float, delta: float = 1e-5, neighboring_relation: str = "add_or_remove_one") -> float:
    """Standard deviation of the noise on a sum of vectors of norm one: public, before anything is read."""
    return gaussian_sum(epsilon, 1, 1, delta, neighboring_relation).noise_std


def gaussian_sum(
    epsilon: float,
    dimension: int,
    num_rows: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
) -> mechanism.GaussianSum:
    """The sum of vectors ``(dimension,)`` in ``num_rows`` classes at a budget; no noise at ``epsilon = inf``."""
    return mechanism.GaussianSum(
        dimension=dimension,
        noise_multiplier=0.0 if epsilon == math.inf else accounting.noise_multiplier(epsilon, delta),
        num_rows=num_rows,
        neighboring_relation=neighboring_relation,
    )


def noisy_means(
    noisy_sum: np.ndarray | Tensor, count_coordinate: float = embedding.COUNT_COORDINATE
) -> Tensor:
    """Noisy mean embedding of each row ``(T, k)``; the count is read from coordinate 0, at least 1."""
    sums = torch.as_tensor(noisy_sum, dtype=torch.float32)
    counts = (sums[:, :1] / count_coordinate).clamp(min=1.0)
    return sums / counts


def public_only(
    hypernetwork: Any,
    noise_std: float,
    *,
    dimension: int,
    num_classes: int = 1,
    declared_per_class: float = 0.0,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> Adapter:
    """The adapters that the hypernetwork makes of noise alone: epsilon = 0.

    The sum is zero but for the count coordinate, which shows ``declared_per_class``, a public number: without
    it the hypernetwork would divide noise by almost nothing, and the control would be a straw man.
    """
    noisy_sum = noise_std * torch.randn(num_classes, dimension, generator=generator)
    noisy_sum[:, 0] += hypernetwork.encoder.config.count_coordinate * declared_per_class
    with torch.no_grad():
        return hypernetwork(noisy_sum.to(device), noise_std)


def nearest_public(
    noisy_sum: np.ndarray | Tensor,
    bank: PublicBank,
    *,
    num_nearest: int,
    num_images: int,
    generator: torch.Generator,
    count_coordinate: float = embedding.COUNT_COORDINATE,
) -> tuple[Tensor, Tensor]:
    """Show the public data sets whose mean embeddings are nearest to each class's noisy mean.

    Parameters
    ----------
    noisy_sum
        ``(T, k)``.
    num_nearest : int
        Public data sets m to retrieve for each class; they share the class's images equally.
    num_images : int
        In all, a multiple of T.
    count_coordinate : float
        The encoder's.

    Returns
    -------
    images, labels : Tensor
        ``(num_images, C, H, W)`` in [-1, 1] and ``(num_images,)``, sorted by class.
    """
    means = noisy_means(noisy_sum, count_coordinate)
    classes = len(means)
    if num_images % classes:
        raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
    if not 1 <= num_nearest <= len(bank):
        raise InputError(f"num_nearest must lie in 1 .. {len(bank)}, got {num_nearest}.")
    # coordinate 0 is a constant and says nothing about content
    distances = torch.cdist(means[:, 1:], bank.embeddings[:, 1:])
    nearest = distances.topk(num_nearest, largest=False).indices
    each = num_images // classes
    shown = []
    for row in nearest.tolist():
        shares = [each // num_nearest + (i < each % num_nearest) for i in range(num_nearest)]
        shown += [bank.images(task, n, generator) for task, n in zip(row, shares, strict=True) if n]
    return torch.cat(shown), torch.arange(classes).repeat_interleave(each)


def nearest_mean_accuracy(
    noisy_sum: np.ndarray | Tensor, encoder: Any, private_test_images: Tensor, private_test_labels: Tensor
) -> float:
    """Accuracy in [0, 1] of classifying by the nearest noisy class mean.  A research metric, not DP."""
    means = noisy_means(noisy_sum, encoder.config.count_coordinate)
    embeddings = embedding.embed(encoder, private_test_images, batch_size=1000).detach().cpu()
    predicted = torch.cdist(embeddings[:, 1:], means[:, 1:]).argmin(1)
    return float((predicted == private_test_labels.cpu()).double().mean())
