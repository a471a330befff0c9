"""Ways to break the pipeline, most of which have broken real ones; the checks must catch each."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hyperdp_lib import embedding, mechanism, planning, releasing, two_steps
from hyperdp_lib.auditing.pipeline import INTACT, Pipeline, miniature
from hyperdp_lib.baselines.dp_sgd import PrivacyPlan
from hyperdp_lib.mechanism import Batch, GaussianSum
from hyperdp_lib.release_folder import Release


def _gathered(private_batches: Iterable[Batch]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All examples and rows at once."""
    parts = [(np.asarray(e, np.float64), r) for e, r in private_batches]
    examples = np.concatenate([e for e, _ in parts])
    rows = np.concatenate([np.zeros(len(e), np.int64) if r is None else r for e, r in parts])
    return examples, rows


def _plain_sum(
    examples: NDArray[np.float64], rows: NDArray[np.int64], config: GaussianSum, clip: bool = True
) -> NDArray[np.float64]:
    """Clip and sum in floating point, in the order of arrival."""
    if clip:
        clean = np.where(np.isfinite(examples).all(1, keepdims=True), examples, 0.0)
        largest = np.maximum(np.abs(clean).max(1, keepdims=True, initial=0.0), 1e-300)
        with np.errstate(over="ignore"):
            length = np.linalg.norm(clean / largest, axis=1, keepdims=True) * largest
        examples = clean * np.minimum(1.0, config.clip_norm / np.maximum(length, 1e-300))
    total = np.zeros((config.num_rows, config.dimension))
    np.add.at(total, rows, examples)
    return total


def _noise(config: GaussianSum, seed: int | None, scale: float = 1.0) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.normal(0.0, scale * config.noise_std, size=(config.num_rows, config.dimension))


def no_clip(private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None) -> NDArray[np.float64]:
    """Long embeddings are summed as they are."""
    examples, rows = _gathered(private_batches)
    with np.errstate(over="ignore", invalid="ignore"):
        return _plain_sum(np.nan_to_num(examples), rows, config, clip=False) + _noise(config, seed)


def clip_after_the_sum(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """The mean is clipped in place of the examples: one long example drags the whole mean."""
    examples, rows = _gathered(private_batches)
    examples = np.clip(np.nan_to_num(examples), -1e100, 1e100)
    total = _plain_sum(examples, rows, config, clip=False)
    count = max(1, len(examples))
    length = max(float(np.linalg.norm(total)) / count, 1e-300)
    return total * min(1.0, config.clip_norm / length) + _noise(config, seed)


def half_noise(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """Noise of half the stated size."""
    less = replace(config, noise_multiplier=config.noise_multiplier / 2)
    return mechanism.noisy_sum(private_batches, less, seed=seed)


def noise_reused_across_classes(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """One draw of noise for all rows: their differences are bare."""
    examples, rows = _gathered(private_batches)
    one = replace(config, num_rows=1)
    return mechanism._exact_sum([(examples, rows)], config) * (config.clip_norm / config.grid_units) + _noise(one, seed)


def divided_by_the_true_count(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """A mean in place of a sum: it tells the number of examples, and every example moves all of it."""
    examples, rows = _gathered(private_batches)
    total = mechanism.noisy_sum([(examples, rows)], config, seed=seed)
    return total / max(1, len(examples))


def seed_left_fixed(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """The seed of an example in the manual, in production: whoever knows it subtracts the noise."""
    return mechanism.noisy_sum(private_batches, config, seed=0)


def nan_passes_the_clip(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """``norm > clip`` is false for NaN, so NaN goes through and the sum is NaN."""
    examples, rows = _gathered(private_batches)
    finite = np.isfinite(examples).all(1)
    total = _plain_sum(examples[finite], rows[finite], config)
    if not finite.all():
        np.add.at(total, rows[~finite], np.nan)
    return total + _noise(config, seed)


def float_accumulation(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """Summed in float32: rounding depends on order and on the other examples, and outgrows the sensitivity."""
    examples, rows = _gathered(private_batches)
    total = np.zeros((config.num_rows, config.dimension), np.float32)
    clipped = mechanism._to_grid(examples, config).astype(np.float32) / np.float32(config.grid_units)
    for row, example in zip(rows, clipped, strict=True):
        total[row] += example
    return total.astype(np.float64) * config.clip_norm + _noise(config, seed)


def private_mean_centring(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """The mean of the private examples is subtracted before they are clipped: each one reads all of them."""
    examples, rows = _gathered(private_batches)
    centred = examples - (np.nan_to_num(examples, posinf=0.0, neginf=0.0).mean(0) if len(examples) else 0.0)
    return mechanism.noisy_sum([(centred, rows)], config, seed=seed)


def float_noise(
    private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
) -> NDArray[np.float64]:
    """Numpy's floating-point normal in place of OpenDP's exact sampler: the same law to any eye, and no proof."""
    return mechanism.noisy_sum(private_batches, config, seed=secrets.randbits(64) if seed is None else seed)


def _with_noise_of(relation: str, stated: str):
    def noisy_sum(
        private_batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None
    ) -> NDArray[np.float64]:
        used = relation if config.neighboring_relation == stated else config.neighboring_relation
        return mechanism.noisy_sum(private_batches, replace(config, neighboring_relation=used), seed=seed)

    noisy_sum.__doc__ = f"The noise that {relation} needs, under a certificate that says {stated}."
    return noisy_sum


def _batch_statistics(private_images: Tensor) -> NDArray[np.floating]:
    """Batch normalisation in training mode before the encoder."""
    spread = private_images.std(0, keepdim=True, correction=0) + 1e-3
    return INTACT.embed(((private_images - private_images.mean(0, keepdim=True)) / spread).clamp(-1, 1))


def _batch_mean(private_images: Tensor) -> NDArray[np.floating]:
    """The nested encoder is centred on the batch at hand, where the public centre belongs."""
    encoder = copy.deepcopy(miniature()["cells"].encoder)
    public = encoder.encoder.everything

    def everything(images: Tensor) -> Tensor:
        codes = public(images)
        return torch.cat([codes[:, :1], codes[:, 1:] - codes[:, 1:].mean(0)], 1)

    with mock.patch.object(encoder.encoder, "everything", everything):
        return embedding.embed(encoder, private_images).numpy()


def one_noise_for_all_steps(private_images: Tensor, hypernetwork: Any, **asked: Any) -> Release:
    """All sums of a release draw from one secret seed, so a second's noise is the first's over again."""
    fresh, intact = secrets.randbits(64), mechanism.noisy_sum

    def noisy_sum(batches: Iterable[Batch], config: GaussianSum, *, seed: int | None = None) -> NDArray[np.float64]:
        return intact(batches, config, seed=fresh)

    with mock.patch.object(mechanism, "noisy_sum", noisy_sum):
        return INTACT.release(private_images, hypernetwork, **asked)


def centre_of_the_exact_sum(private_images: Tensor, hypernetwork: Any, **asked: Any) -> Release:
    """The second step is centred on the sum that the first has before its noise."""
    intact, labels = two_steps.Centring.of, asked.get("private_labels")

    def of(first_sum: NDArray[np.float64], *rest: Any, **known: Any) -> two_steps.Centring:
        num_rows, dimension = first_sum.shape
        rows = labels.numpy() if labels is not None and num_rows > 1 else None
        config = GaussianSum(dimension, 1.0, num_rows)
        encoder = hypernetwork.using(dimension - 1).encoder
        exact = mechanism._exact_sum(embedding.embed_rows(encoder, private_images, rows), config)
        return intact(exact / config.grid_units, *rest, **known)

    with mock.patch.object(two_steps.Centring, "of", of):
        return INTACT.release(private_images, hypernetwork, **asked)


def true_count_for_the_public(private_images: Tensor, hypernetwork: Any, **asked: Any) -> Release:
    """A release goes by the true number of images in place of the one that is public."""
    if asked.get("public_size") is not None:
        asked["public_size"] = max(1, len(private_images))
    return INTACT.release(private_images, hypernetwork, **asked)


def true_count_for_the_noisy(private_images: Tensor, hypernetwork: Any, **asked: Any) -> Release:
    """A release goes by the true number of images in place of the noisy count that was paid for."""
    intact = planning.two_steps

    def knowing(*rest: Any, **known: Any) -> Any:
        return intact(*rest, **known | {"size": two_steps.Size(max(1, len(private_images)), 0.0)})

    with mock.patch.object(planning, "two_steps", knowing):
        return INTACT.release(private_images, hypernetwork, **asked)


def only_the_last_sum_charged(private_images: Tensor, hypernetwork: Any, **asked: Any) -> Release:
    """The certificate counts the last sum only, as if those before it were public."""
    intact = releasing._certify

    def certify(plan: Any, released: Any, *rest: Any) -> Any:
        return intact(plan, released[-1:], *rest)

    with mock.patch.object(releasing, "_certify", certify):
        return INTACT.release(private_images, hypernetwork, **asked)


def fixed_batches(private_count: int, plan: PrivacyPlan, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled epochs cut into batches of one size, under an account for Poisson batches."""
    size, order = max(1, round(plan.sample_rate * private_count)), torch.zeros(0, dtype=torch.long)
    for _ in range(plan.num_steps):
        if len(order) < size:
            order = torch.randperm(private_count, generator=generator)
        batch, order = order[:size], order[size:]
        yield batch


def _classical(epsilon: float, delta: float) -> float:
    """The textbook formula, which is proven for epsilon < 1 only."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


MUTANTS: Mapping[str, Pipeline] = {
    "no clip": replace(INTACT, noisy_sum=no_clip),
    "clip after the sum": replace(INTACT, noisy_sum=clip_after_the_sum),
    "half noise": replace(INTACT, noisy_sum=half_noise),
    "noise reused across classes": replace(INTACT, noisy_sum=noise_reused_across_classes),
    "divided by the true count": replace(INTACT, noisy_sum=divided_by_the_true_count),
    "batch statistics in the encoder": replace(INTACT, embed=_batch_statistics),
    "NaN passes the clip": replace(INTACT, noisy_sum=nan_passes_the_clip),
    "add/remove noise sold as replace-one": replace(
        INTACT, noisy_sum=_with_noise_of("add_or_remove_one", stated="replace_one")
    ),
    "replace-one noise sold as add/remove": replace(
        INTACT, noisy_sum=_with_noise_of("replace_one", stated="add_or_remove_one")
    ),
    "classical Gaussian at large epsilon": replace(INTACT, noise_multiplier=_classical),
    "float accumulation": replace(INTACT, noisy_sum=float_accumulation),
    "seed left fixed": replace(INTACT, noisy_sum=seed_left_fixed),
    "private mean-centring": replace(INTACT, noisy_sum=private_mean_centring),
    "float noise": replace(INTACT, noisy_sum=float_noise),
    "batch mean in the nested encoder": replace(INTACT, embed_nested=_batch_mean),
    "one noise for all steps": replace(INTACT, release=one_noise_for_all_steps),
    "centre of the exact sum": replace(INTACT, release=centre_of_the_exact_sum),
    "true count for the public": replace(INTACT, release=true_count_for_the_public),
    "true count for the noisy": replace(INTACT, release=true_count_for_the_noisy),
    "only the last sum charged": replace(INTACT, release=only_the_last_sum_charged),
    "fixed batches sold as Poisson": replace(INTACT, poisson_batches=fixed_batches),
}
"""What is wrong -> a pipeline that does it."""

