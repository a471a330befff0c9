"""Every method of a comparison behind one call: ``run(bench, epsilon, seed) -> Outcome``.

A `Bench` holds what the methods share.  All methods but DP-SGD read one and the same noisy sum, so that they
differ in what they do with it and not in their luck.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion, evaluation
from hyperdp_lib.baselines import controls, dp_lora
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.data import ImageSet, InputError


@dataclass(frozen=True)
class Settings:
    """Public choices of a comparison; found by `tune`, read from JSON.

    Parameters
    ----------
    num_images : int
        Samples to score, cut down to a multiple of the number of classes.
    sampling_steps : int
        Denoising steps of every method that denoises.
    num_nearest : int
        Public data sets that `controls.nearest_public` retrieves for each class.
    bank_tasks, bank_images : int
        Public data sets in the bank, and images in each.
    dp_lora : mapping
        Epsilon to `DPLoraConfig`; a budget uses the entry nearest to it on a logarithmic scale.
    lora_non_private : DPLoraConfig
    """

    num_images: int = 2000
    sampling_steps: int = 20
    num_nearest: int = 20
    bank_tasks: int = 6000
    bank_images: int = 40
    dp_lora: Mapping[float, DPLoraConfig] = field(default_factory=lambda: {1.0: DPLoraConfig()})
    lora_non_private: DPLoraConfig = DPLoraConfig(
        r=8, lora_alpha=8, num_steps=150, learning_rate=5e-3, expected_batch_size=64, ema_decay=0.95
    )

    def dp_lora_for(self, epsilon: float) -> DPLoraConfig:
        """The configuration tuned nearest to a budget."""
        return self.dp_lora[min(self.dp_lora, key=lambda tuned: abs(math.log(tuned / epsilon)))]

    def to_json(self) -> str:
        """JSON text; an infinite batch size (full batches) is written as ``null``."""
        values = dataclasses.asdict(self)
        values["dp_lora"] = {f"{eps:g}": plain_config(config) for eps, config in self.dp_lora.items()}
        values["lora_non_private"] = plain_config(self.lora_non_private)
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of `to_json`."""
        try:
            values = json.loads(text)
            values["dp_lora"] = {float(eps): config_from_plain(c) for eps, c in values["dp_lora"].items()}
            values["lora_non_private"] = config_from_plain(values["lora_non_private"])
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"these are not comparison settings ({error}): make them with tune.") from error


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one method made in one cell, before it is scored."""

    images: Tensor | None
    labels: Tensor | None
    seconds: Mapping[str, float]
    trained_parameters: int = 0
    noise_dimension: int = 0
    num_releases: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """Models, private images and settings that the cells of one seed share.

    Attributes
    ----------
    private_train, private_test : ImageSet
        What the methods may read, and what tests the classifiers.
    private_reference : ImageSet
        The set whose distribution the samples should have: all of which ``private_train`` is a part.
    bank : callable
        Makes the public data sets for retrieval when they are first asked for, then returns the same.
    """

    base_model: nn.Module
    hypernetwork: Any
    feature_network: evaluation.FeatureNetwork
    bank: Callable[[], controls.PublicBank]
    private_train: ImageSet
    private_test: ImageSet
    private_reference: ImageSet
    settings: Settings
    delta: float = 1e-5
    neighboring_relation: str = "add_or_remove_one"
    device: str = "cpu"
    progress: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The public label set; one nameless class without labels."""
        return self.private_train.class_names or ("adapter",)

    @property
    def num_images(self) -> int:
        """Images to sample: the same number for each class."""
        return self.settings.num_images - self.settings.num_images % len(self.class_names)

    def noisy_sum(self, epsilon: float, seed: int) -> tuple[np.ndarray, float]:
        """The noisy sum of this budget and seed; asked again, the same."""
        return controls.noisy_class_sums(
            self.private_train.images,
            self.private_train.labels,
            self.hypernetwork.encoder,
            epsilon=epsilon,
            num_classes=len(self.class_names),
            delta=self.delta,
            neighboring_relation=self.neighboring_relation,
            seed=seed,
        )

    def sample(self, adapter: Any, seed: int) -> tuple[Tensor, Tensor]:
        """Images and labels from one adapter for each class."""
        images = diffusion.sample(
            self.base_model,
            adapter,
            self.num_images,
            generator=generator_for(seed),
            num_steps=self.settings.sampling_steps,
        )
        classes = len(self.class_names)
        return images.cpu(), torch.arange(classes).repeat_interleave(self.num_images // classes)

    def score(self, outcome: Outcome) -> dict[str, Any]:
        """Scores of an outcome; an accuracy-only control has no image scores."""
        if outcome.images is None:
            return {**_NO_SCORES, **(outcome.scores or {}), "label": evaluation.NOT_DP}
        labelled = self.private_train.labels is not None
        scores = evaluation.evaluate(
            outcome.images,
            outcome.labels if labelled else None,
            self.private_train.images,
            self.private_train.labels,
            self.private_test.images,
            self.private_test.labels,
            self.feature_network,
            private_reference_images=self.private_reference.images,
            private_reference_labels=self.private_reference.labels,
        )
        return {**scores, **(outcome.scores or {})}


_NO_SCORES = {"frechet_distance": None, "features": None, "precision": None, "recall": None,
              "accuracy": None, "num_images": 0}  # fmt: skip


def dp_deepsets(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """Ours: noisy sum, hypernetwork, adapters, samples."""
    started = time.perf_counter()
    noisy_sum, noise_std = bench.noisy_sum(epsilon, seed)
    with torch.no_grad():
        adapter = bench.hypernetwork(
            torch.as_tensor(noisy_sum, dtype=torch.float32, device=bench.device), noise_std
        )
    released = time.perf_counter()
    images, labels = bench.sample(adapter, seed)
    seconds = {"release": released - started, "sample": time.perf_counter() - released}
    return Outcome(images, labels, seconds, 0, noisy_sum.size, 1)


def public_only(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """Epsilon = 0: noise of the level of epsilon = 1 and no private image; the declared size is public."""
    classes = len(bench.class_names)
    noisy_sum, noise_std = bench.noisy_sum(1.0, seed)  # for its shape and noise level only
    adapter = controls.public_only(
        bench.hypernetwork,
        noise_std,
        dimension=noisy_sum.shape[1],
        num_classes=classes,
        declared_per_class=len(bench.private_train) / classes,
        generator=generator_for(seed),
        device=bench.device,
    )
    started = time.perf_counter()
    images, labels = bench.sample(adapter, seed)
    return Outcome(images, labels, {"sample": time.perf_counter() - started})


def nearest_public(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """The public data sets nearest to the noisy sum, shown as they are."""
    started = time.perf_counter()
    noisy_sum, _ = bench.noisy_sum(epsilon, seed)
    seconds = {"release": time.perf_counter() - started}
    nearest, bank = bench.settings.num_nearest, bench.bank()  # public work, not timed
    images, labels = controls.nearest_public(
        noisy_sum, bank, num_nearest=nearest, num_images=bench.num_images, generator=generator_for(seed)
    )
    chosen = {"num_nearest": nearest, "bank_tasks": len(bank)}
    return Outcome(images, labels, seconds, 0, noisy_sum.size, 1, chosen)


def noisy_class_means(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """Classification by the nearest noisy mean: accuracy only."""
    started = time.perf_counter()
    noisy_sum, _ = bench.noisy_sum(epsilon, seed)
    seconds = {"release": time.perf_counter() - started}
    if bench.private_test.labels is None:
        raise InputError("noisy_class_means classifies, but these images have no labels: leave it out.")
    accuracy = controls.nearest_mean_accuracy(
        noisy_sum, bench.hypernetwork.encoder, bench.private_test.images, bench.private_test.labels
    )
    return Outcome(None, None, seconds, 0, noisy_sum.size, 1, scores={"accuracy": accuracy})


def lora(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """DP-SGD LoRA, or with ``epsilon = inf`` LoRA without privacy, both as tuned."""
    settings = bench.settings
    config = settings.lora_non_private if math.isinf(epsilon) else settings.dp_lora_for(epsilon)
    trained, certificate = dp_lora.train_dp_lora(
        bench.private_train.images,
        bench.private_train.labels,
        bench.base_model,
        config,
        epsilon=epsilon,
        delta=bench.delta,
        neighboring_relation=bench.neighboring_relation,
        num_private_declared=len(bench.private_train),
        class_names=bench.class_names,
        seed=seed,
        progress=bench.progress,
    )
    started = time.perf_counter()
    images, labels = trained.sample(
        bench.num_images, generator=generator_for(seed), num_steps=settings.sampling_steps
    )
    seconds = {"train": trained.seconds, "sample": time.perf_counter() - started}
    plan = trained.plan
    chosen = {**plain_config(config), "noise_std": plan.noise_std, "certificate": certificate.sentence}
    releases = 0 if math.isinf(epsilon) else config.num_steps
    return Outcome(
        images.cpu(), labels, seconds, trained.trained_parameters, trained.noise_dimension, releases, chosen
    )


def real(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """What real images score: held-out ones as samples, and a classifier trained on the training images."""
    test, train = bench.private_test, bench.private_train
    scores: dict[str, Any] = {"memorisation": None}  # of the held-out images by themselves: says nothing
    if train.labels is not None and test.labels is not None:
        scores["accuracy"] = evaluation.downstream_accuracy(
            train.images, train.labels, test.images, test.labels
        )
    if len(test) < 2 * bench.feature_network.dimension:  # a small private set of one's own: accuracy only
        return Outcome(None, None, {}, scores=scores)
    return Outcome(test.images, test.labels, {}, scores=scores)


@dataclass(frozen=True)
class Method:
    """A method; ``also`` are budgets it runs at besides (if not ``private``: instead of) those asked for."""

    run: Callable[[Bench, float, int], Outcome]
    private: bool = True
    also: tuple[float, ...] = ()


METHODS: Mapping[str, Method] = {
    "dp_deepsets": Method(dp_deepsets, also=(math.inf,)),
    "dp_lora": Method(lora),
    "nearest_public": Method(nearest_public, also=(math.inf,)),
    "noisy_class_means": Method(noisy_class_means, also=(math.inf,)),
    "public_only": Method(public_only, private=False, also=(0.0,)),
    "lora_non_private": Method(lora, private=False, also=(math.inf,)),
    "real": Method(real, private=False, also=(math.inf,)),
}


def generator_for(seed: int) -> torch.Generator:
    """The cell's public randomness; on the CPU, so that a GPU gives the same samples."""
    return torch.Generator().manual_seed(seed)


def plain_config(config: DPLoraConfig) -> dict[str, Any]:
    """A configuration as JSON holds it: JSON has no infinity, so full batches are ``null``."""
    values = dataclasses.asdict(config)
    if math.isinf(config.expected_batch_size):
        values["expected_batch_size"] = None
    return values


def config_from_plain(values: Mapping[str, Any]) -> DPLoraConfig:
    """Inverse of `plain_config`."""
    batch = values.get("expected_batch_size")
    return DPLoraConfig(**{**values, "expected_batch_size": math.inf if batch is None else batch})
