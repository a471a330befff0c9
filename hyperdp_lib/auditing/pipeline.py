"""What is audited: everything between private images and the released sum, in three replaceable parts.

`INTACT` is the library's own. `hyperdp_lib.auditing.mutants` breaks one part at a time, and the checks of
`hyperdp_lib.auditing.checks` must see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperdp_lib import accounting, embedding, mechanism
from hyperdp_lib.mechanism import Batch, GaussianSum

DIMENSION = 8


@dataclass(frozen=True)
class Pipeline:
    """Three functions; see `INTACT` for what each must do.

    Attributes
    ----------
    noise_multiplier : callable
        ``(epsilon, delta) -> noise over sensitivity``.
    embed : callable
        Images ``(N, 1, 16, 16)`` to embeddings ``(N, k)``, each from its own image alone.
    noisy_sum : callable
        Like `mechanism.noisy_sum`.
    """

    noise_multiplier: Callable[[float, float], float]
    embed: Callable[[Tensor], NDArray[np.floating]]
    noisy_sum: Callable[..., NDArray[np.float64]]

    def config(
        self, epsilon: float, *, delta: float = 1e-5, dimension: int = DIMENSION, num_rows: int = 1,
        neighboring_relation: str = "add_or_remove_one",
    ) -> GaussianSum:  # fmt: skip
        """Configuration with this pipeline's own noise for a budget."""
        return GaussianSum(
            dimension, self.noise_multiplier(epsilon, delta), num_rows, neighboring_relation=neighboring_relation
        )

    def exact_sum(self, private_batches: Iterable[Batch], config: GaussianSum) -> NDArray[np.float64]:
        """The sum without its noise: what an auditor may ask of a mechanism, and nobody else."""
        silent = GaussianSum(
            config.dimension, 0.0, config.num_rows, config.clip_norm, config.neighboring_relation, config.grid_bits
        )
        return self.noisy_sum(private_batches, silent, seed=0)


def _embed(private_images: Tensor) -> NDArray[np.floating]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = embedding.Encoder(embedding.EncoderConfig(dimension=DIMENSION, width=8))
    return embedding.embed(encoder, private_images).numpy()


INTACT = Pipeline(accounting.noise_multiplier, _embed, mechanism.noisy_sum)
