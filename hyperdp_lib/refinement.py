"""Better decoding after the release, from the noisy sum and public models alone: no privacy cost.

The hypernetwork is asked once what adapter belongs to a noisy mean, and its answer is never checked. Here it is: sample
from the adapter, embed the samples with the same public encoder, and see by how much their mean misses the released
one. The miss is added to the hypernetwork's input, and so on: with ``e(x)`` the mean embedding of images drawn from the
adapter that input ``x`` gives, and ``m`` the noisy mean,

    x[t + 1] = m + (1 - step_size / gain) (x[t] - m) + step_size (m - e(x[t])),    x[0] = m,

a stochastic approximation (Robbins & Monro 1951) of the root of ``x - m = gain (m - e(x))``: the input moves from what
was released by ``gain`` times what is still missed. The average of the last half of the iterates is decoded (Polyak &
Juditsky 1992). It uses what the release has said already, so the certificate is unchanged but for a note.

Why not until nothing is missed (``gain = inf``)? The noisy mean is not the mean, and some means no adapter of this
hypernetwork has: private images may look like nothing in the public data. The input would then wander off without
end, and samples get worse and not better. The default is safe there: on public drawings unlike those of the training
(Quick, Draw! and Kuzushiji-Kanji) it does no harm on average. Where private data may be expected to look like the
public tasks, a larger gain buys more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion, embedding
from hyperdp_lib.adapter import Adapter
from hyperdp_lib.cells import CellHyperNetwork, mix
from hyperdp_lib.data import InputError
from hyperdp_lib.hypernetwork import noisy_count
from hyperdp_lib.progress import progress_bar


@dataclass(frozen=True)
class RefinementConfig:
    """Public choices of the refinement.

    Parameters
    ----------
    num_rounds : int
        Times that samples are compared with the release.
    step_size : float
        Share of the miss that is added to the input, in (0, 1], at most ``gain``.
    gain : float
        How far the input may move, over what is still missed, in (0, inf].
    images_per_class : int
        Samples of each class in a round. Their mean has an error of its own, which the average over rounds evens out.
    sampling_steps : int
        Denoising steps of these samples.
    """

    num_rounds: int = 12
    step_size: float = 0.4
    gain: float = 1.0
    images_per_class: int = 60
    sampling_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("num_rounds", "images_per_class", "sampling_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.step_size <= 1:
            raise InputError(f"step_size must lie in (0, 1], got {self.step_size}.")
        if not self.gain >= self.step_size:
            raise InputError(f"gain must be at least the step size, {self.step_size}, got {self.gain}.")

    @property
    def note(self) -> str:
        """What the certificate says."""
        return (
            f"refined in {self.num_rounds} rounds by comparing samples with the released sum: "
            "post-processing with public models, no further privacy cost"
        )


@torch.no_grad()
def refine(
    noisy_sum: np.ndarray | Tensor,
    noise_std: float,
    hypernetwork: Any,
    base_model: nn.Module,
    config: RefinementConfig | None = None,
    *,
    class_names: Sequence[str] = (),
    generator: torch.Generator,
    progress: bool = False,
) -> Adapter:
    """The adapters of a released sum, decoded again until their samples have its means.

    Parameters
    ----------
    noisy_sum : (K, k)
        As released; a row for each class.
    noise_std : float
        Standard deviation of its noise (public).
    hypernetwork, base_model
        Public; left as they are.
    class_names : sequence of str
        Names of the adapters; one without names is called ``adapter``.
    generator : torch.Generator
        Of the samples, on the CPU: public randomness.

    Examples
    --------
    >>> better = refine(released.noisy_sum, released.certificate.noise_std, hypernetwork, base_model,
    ...                 generator=torch.Generator().manual_seed(0))  # doctest: +SKIP
    """
    config = config or RefinementConfig()
    device = next(hypernetwork.parameters()).device
    released = torch.as_tensor(noisy_sum).to(device, torch.float32)
    names = tuple(class_names) or ("adapter",)
    if released.ndim != 2 or len(released) != len(names):
        raise InputError(f"noisy_sum must have a row for each of the {len(names)} classes.")
    if isinstance(hypernetwork, CellHyperNetwork):  # every cell for itself, with as many samples in all
        parts = hypernetwork.parts(released, noise_std)
        sums = torch.cat([found for found, _ in parts])
        each = max(10, config.images_per_class * len(names) // len(sums))
        decoded = refine(
            sums,
            noise_std,
            hypernetwork.hypernetwork,
            base_model,
            dataclasses.replace(config, images_per_class=each),
            class_names=tuple(map(str, range(len(sums)))),
            generator=generator,
            progress=progress,
        )
        return mix(decoded, [slots for _, slots in parts], names)
    count = noisy_count(released, noise_std, hypernetwork.encoder.config.count_coordinate)[:, None]
    inputs, average = released.clone(), torch.zeros_like(released)
    kept = 1 - config.step_size / config.gain
    counted = range(config.num_rounds // 2, config.num_rounds)
    for number in progress_bar(range(config.num_rounds), desc="refine", show=progress):
        images = diffusion.sample(
            base_model,
            hypernetwork(inputs, noise_std, names),
            config.images_per_class * len(names),
            generator=generator,
            num_steps=config.sampling_steps,
        )
        codes = embedding.embed(hypernetwork.encoder, images).view(len(names), config.images_per_class, -1)
        miss = released[:, 1:] / count - codes.mean(1)[:, 1:].to(device)
        inputs[:, 1:] = torch.lerp(released[:, 1:], inputs[:, 1:], kept) + config.step_size * count * miss
        if number in counted:
            average += inputs / len(counted)
    return hypernetwork(average, noise_std, names).detach()
