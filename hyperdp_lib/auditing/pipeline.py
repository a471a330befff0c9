"""What is audited: everything between private images and what is released, in replaceable parts.

`INTACT` is the library's own. `hyperdp_lib.auditing.mutants` breaks one part at a time, and the checks of
`hyperdp_lib.auditing.checks` must see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperdp_lib import accounting, cells, diffusion, embedding, mechanism, releasing
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.data import ImageSet
from hyperdp_lib.embedding import Encoder, EncoderConfig, FeatureNetwork
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.mechanism import Batch, GaussianSum
from hyperdp_lib.nested import NestedEncoder, NestedHyperNetwork
from hyperdp_lib.planning import plan
from hyperdp_lib.pretrained import Weights
from hyperdp_lib.prior import Prior
from hyperdp_lib.public.nested import directions

DIMENSION = 8


@dataclass(frozen=True)
class Pipeline:
    """Replaceable functions; see `INTACT` for what each must do.

    Attributes
    ----------
    noise_multiplier : callable
        ``(epsilon, delta) -> noise over sensitivity``.
    embed : callable
        Images ``(N, 1, 16, 16)`` to embeddings ``(N, k)``, each from its own image alone.
    embed_nested : callable
        The same in nested coordinates, in the block of the cell that an image lies in.
    noisy_sum : callable
        Like `mechanism.noisy_sum`.
    release : callable
        Like `release`: plan and `releasing.release` in one call.
    poisson_batches : callable
        Like `baselines.dp_sgd.poisson_batches`.
    """

    noise_multiplier: Callable[[float, float], float]
    embed: Callable[[Tensor], NDArray[np.floating]]
    embed_nested: Callable[[Tensor], NDArray[np.floating]]
    noisy_sum: Callable[..., NDArray[np.float64]]
    release: Callable[..., releasing.Release]
    poisson_batches: Callable[..., Iterator[Tensor]]

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


@functools.cache
def miniature() -> Mapping[str, Any]:
    """Public networks for images (N, 1, 16, 16), tiny and untrained: plain, with nested coordinates, and with cells.

    The first two have priors, which two steps need, and the second cells; the adapters of all depend on what they read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base_model = diffusion.build_base_model(diffusion.BaseModelConfig(width=32, num_layers=1))
        config = HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)
        plain = HyperNetwork(Encoder(EncoderConfig(dimension=DIMENSION, width=8)), base_model, config)
        # each task is a blurred shape of its own, seen twice
        tasks = (torch.randn(80, 1, 1, 16, 16) + 0.3 * torch.randn(80, 2, 1, 16, 16)).clamp(-1, 1)
        features = FeatureNetwork()
        axes = directions(plain.encoder.eval(), features, tasks)
        many = NestedHyperNetwork(NestedEncoder(plain.encoder, features, *axes), base_model, config).using(8)
        many.table = {0.3: {8: 0.1, 64: 0.2}, 0.003: {8: 0.2, 64: 0.1}}
        centroids = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
        many.centroids = {
            f"{k}x{count}": torch.nn.functional.normalize(torch.randn(count, k), dim=1)
            for k in many.table[0.3] for count in cells.NUMBERS[1:]
        }  # fmt: skip
        for network, sizes in ((plain, (DIMENSION - 1,)), (many, many.table[0.3])):
            torch.nn.init.normal_(network.head_b.weight, std=0.1)
            priors = {k: Prior.fit(network.using(k).encoder, tasks) for k in sizes}
            network.priors = {f"{k}.{part}": v.float() for k in sizes for part, v in vars(priors[k]).items()}
            network.requires_grad_(False).eval()
    return {"plain": plain, "nested": many, "cells": CellHyperNetwork(many, centroids).eval(), "base": base_model}


def _embed(private_images: Tensor) -> NDArray[np.floating]:
    return embedding.embed(miniature()["plain"].encoder, private_images).numpy()


def _embed_nested(private_images: Tensor) -> NDArray[np.floating]:
    return embedding.embed(miniature()["cells"].encoder, private_images).numpy()


def release(
    private_images: Tensor,
    hypernetwork: Any,
    *,
    private_labels: Tensor | None = None,
    class_names: tuple[str, ...] | None = None,
    method: str = "one_sum",
    ledger: Sequence[LedgerEntry] = (),
    seed: int | None = None,
    batch_size: int = 1024,
    **budget: Any,
) -> releasing.Release:
    """The release of images by one hypernetwork, decoded once; ``budget`` as in `planning.plan`."""
    chosen = plan(Weights(miniature()["base"], hypernetwork), class_names=class_names, method=method,
                  refined=False, **budget)  # fmt: skip
    private = ImageSet(private_images, private_labels, class_names)
    return releasing.release(private, chosen, ledger=ledger, seed=seed, batch_size=batch_size)


INTACT = Pipeline(
    accounting.noise_multiplier, _embed, _embed_nested, mechanism.noisy_sum, release, dp_sgd.poisson_batches
)
