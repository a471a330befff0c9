"""Every method of a comparison behind one call: ``run(bench, epsilon, seed) -> Outcome``.

A `Bench` holds what the methods share.  All methods that read a noisy sum of embeddings read one and the same, so that
they differ in what they do with it and not in their luck.  A rival is a module that trains or releases (called like
`hyperdp_lib.releasing.release`) and a configuration; `rival` makes a method of the two.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion, embedding, planning, strict_json
from hyperdp_lib.baselines import (
    controls,
    direct_conditioning,
    dp_embedding_sgd,
    dp_hybrid,
    dp_ldm,
    dp_lora,
    dp_mepf,
    latent_diffusion,
    layer_choice,
)
from hyperdp_lib.baselines.direct_conditioning import DirectConditioningConfig
from hyperdp_lib.baselines.dp_embedding_sgd import EmbeddingSGDConfig
from hyperdp_lib.baselines.dp_hybrid import DPHybridConfig
from hyperdp_lib.baselines.dp_ldm import DPLdmConfig
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.baselines.dp_mepf import DPMepfConfig
from hyperdp_lib.baselines.layer_choice import LayerSearchConfig
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.pretrained import CELLS_FILE, WEIGHTS, Weights, load_pretrained
from hyperdp_lib.releasing import release
from hyperdp_lib.scores import evaluation


@dataclass(frozen=True)
class Settings:
    """Public choices of a comparison; found by `hyperdp_lib.experiments.tuning`, read from JSON.

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
    configs : mapping
        Method to epsilon to configuration; see `config`.
    """

    num_images: int = 2000
    sampling_steps: int = 20
    num_nearest: int = 20
    bank_tasks: int = 6000
    bank_images: int = 40
    configs: Mapping[str, Mapping[float, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_images", "sampling_steps", "num_nearest", "bank_tasks", "bank_images"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {count!r}.")

    def config(self, method: str, epsilon: float) -> Any:
        """The method's configuration tuned nearest to a budget, on a logarithmic scale; untuned, its default.

        Without privacy (``epsilon = inf``) it is the one for infinity, or else the one for the largest budget.
        """
        tuned = self.configs.get(method, {})
        if not tuned:
            return METHODS[method].default
        if math.isinf(epsilon):
            return tuned[max(tuned)]
        finite = [budget for budget in tuned if math.isfinite(budget)] or list(tuned)
        return tuned[min(finite, key=lambda budget: abs(math.log(budget / epsilon)))]

    def with_config(self, method: str, epsilon: float, config: Any) -> Settings:
        """The same settings with one configuration set."""
        return dataclasses.replace(
            self, configs={**self.configs, method: {**self.configs.get(method, {}), epsilon: config}}
        )

    def to_json(self) -> str:
        """JSON text; an infinite batch size (full batches) is written as ``null``."""
        values = {name: getattr(self, name) for name in vars(self)}
        values["configs"] = {
            method: {f"{epsilon:g}": plain_config(config) for epsilon, config in tuned.items()}
            for method, tuned in self.configs.items()
        }
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of `to_json`."""
        try:
            values = strict_json.loads(text)
            values["configs"] = {
                method: {float(epsilon): config_from_plain(method, plain) for epsilon, plain in tuned.items()}
                for method, tuned in values["configs"].items()
            }
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
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
        From an encoder to the public data sets for retrieval; made when first asked for, then the same.
    public_models : callable
        From a rival's name to the public models it takes after the private images, loaded when first asked for.
    """

    base_model: nn.Module
    hypernetwork: Any
    feature_network: embedding.FeatureNetwork
    bank: Callable[[Any], controls.PublicBank]
    public_models: Callable[[str], tuple[Any, ...]]
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

    def fitted(self, epsilon: float) -> Bench:
        """The bench with as many coordinates as the number of images and the noise support, if there is a choice."""
        noise_std = controls.noise_std(epsilon, self.delta, self.neighboring_relation)
        each = len(self.private_train) / len(self.class_names)
        return dataclasses.replace(self, hypernetwork=self.hypernetwork.fitting(noise_std, each))

    def noisy_sum(self, epsilon: float, seed: int, encoder: Any = None) -> tuple[np.ndarray, float]:
        """The noisy sum of this budget and seed; asked again, the same. Default: of the hypernetwork's encoder."""
        return controls.noisy_class_sums(
            self.private_train.images,
            self.private_train.labels,
            self.hypernetwork.encoder if encoder is None else encoder,
            epsilon=epsilon,
            num_classes=len(self.class_names),
            delta=self.delta,
            neighboring_relation=self.neighboring_relation,
            seed=seed,
        )

    def sample(self, adapter: Any, seed: int) -> tuple[Tensor, Tensor]:
        """Images and labels from the adapters of all classes."""
        classes = len(self.class_names)
        images = diffusion.sample_classes(
            self.base_model,
            adapter,
            classes,
            self.num_images // classes,
            generator=generator_for(seed),
            num_steps=self.settings.sampling_steps,
        )
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
    """The paper's method: one noisy sum, decoded once."""
    started = time.perf_counter()
    noisy_sum, noise_std = bench.noisy_sum(epsilon, seed)
    adapter = planning.decode(noisy_sum, noise_std, bench.hypernetwork, bench.class_names)
    released = time.perf_counter()
    images, labels = bench.sample(adapter, seed)
    seconds = {"release": released - started, "sample": time.perf_counter() - released}
    return Outcome(images, labels, seconds, 0, noisy_sum.size, 1)


def hyperdp(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """Ours as a user gets it: `plan` decides by itself, the number of images is bought, decoding is refined."""
    (network,) = bench.public_models("hyperdp")
    budget: dict[str, Any] = {"epsilon": epsilon} if epsilon < math.inf else {"noise_multiplier": 0.0}
    chosen = planning.plan(
        Weights(bench.base_model, network),
        delta=bench.delta,
        neighboring_relation=bench.neighboring_relation,
        class_names=bench.private_train.class_names,
        **budget,
    )
    started = time.perf_counter()
    released = release(bench.private_train, chosen, seed=seed, progress=bench.progress)
    done = time.perf_counter()
    images, labels = bench.sample(released.adapter, seed)
    ledger = [entry.description for entry in released.certificate.ledger if entry.private]
    return Outcome(
        images,
        labels,
        {"release": done - started, "sample": time.perf_counter() - done},
        0,
        released.noisy_sum.size,
        len(ledger),
        {"ledger": ledger, "post_processing": list(released.certificate.post_processing)},
    )


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
    encoder = bench.hypernetwork.encoder
    nearest, bank = bench.settings.num_nearest, bench.bank(encoder)  # public work, not timed
    images, labels = controls.nearest_public(
        noisy_sum,
        bank,
        num_nearest=nearest,
        num_images=bench.num_images,
        generator=generator_for(seed),
        count_coordinate=encoder.config.count_coordinate,
    )
    chosen = {"num_nearest": nearest, "bank_tasks": len(bank)}
    return Outcome(images, labels, seconds, 0, noisy_sum.size, 1, chosen)


def noisy_class_means(bench: Bench, epsilon: float, seed: int) -> Outcome:
    """Classification by the nearest noisy mean: accuracy only."""
    started = time.perf_counter()
    noisy_sum, _ = bench.noisy_sum(epsilon, seed)
    seconds = {"release": time.perf_counter() - started}
    assert bench.private_test.labels is not None  # `Method.needs_labels`
    accuracy = controls.nearest_mean_accuracy(
        noisy_sum, bench.hypernetwork.encoder, bench.private_test.images, bench.private_test.labels
    )
    return Outcome(None, None, seconds, 0, noisy_sum.size, 1, scores={"accuracy": accuracy})


def rival(method: str, train: Callable[..., tuple[Any, Any]]) -> Callable[[Bench, float, int], Outcome]:
    """The method that trains (or releases), then samples; ``train`` is called like `dp_lora.train_dp_lora`."""

    def run(bench: Bench, epsilon: float, seed: int) -> Outcome:
        config = bench.settings.config(method, epsilon)
        models = bench.public_models(method)  # public work, not timed
        # the hypernetwork among them, if any, with as many coordinates as ours has
        models = tuple(bench.hypernetwork if isinstance(model, HyperNetwork) else model for model in models)
        started = time.perf_counter()
        trained, certificate = train(
            bench.private_train.images,
            bench.private_train.labels,
            *models,
            config,
            epsilon=epsilon,
            delta=bench.delta,
            neighboring_relation=bench.neighboring_relation,
            num_private_declared=len(bench.private_train),
            class_names=bench.class_names,
            seed=seed,
            progress=bench.progress,
        )
        done = time.perf_counter()
        images, labels = trained.sample(
            bench.num_images, generator=generator_for(seed), num_steps=bench.settings.sampling_steps
        )
        chosen = {
            **plain_config(config),
            "certificate": certificate.sentence,
            "accountant": certificate.conversion,
            "ledger": [entry.description for entry in certificate.ledger],
        }
        return Outcome(
            images.cpu(),
            labels,
            {"train": done - started, "sample": time.perf_counter() - done},
            trained.trained_parameters,
            trained.noise_dimension,
            trained.num_releases,
            chosen,
        )

    return run


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
    """A method; ``also`` are budgets it runs at besides (if not ``private``: instead of) those asked for.

    ``default`` is its configuration before any tuning, None if it has none. ``weights`` is what stands behind the
    hypernetwork's name in that of the folder of public models that it needs besides: ``nested`` for ``glyphs-nested``,
    unless the hypernetwork itself is of that kind.  ``needs_labels``: it cannot do without.  ``needs_public``: nor
    without the public data that trained the weights.
    """

    run: Callable[[Bench, float, int], Outcome]
    private: bool = True
    also: tuple[float, ...] = ()
    default: Any = None
    weights: str | None = None
    needs_labels: bool = False
    needs_public: bool = False

    def available(self, hypernetwork: str = "glyphs") -> bool:
        """Whether its public models are there, and it is something of its own for these weights.

        Models are made by ``python -m hyperdp_lib.baselines.<module>``.
        """
        if self.weights == "nested" and (WEIGHTS / hypernetwork / CELLS_FILE).is_file():
            return True
        return self.weights is None or (WEIGHTS / f"{hypernetwork}-{self.weights}" / "manifest.json").is_file()


_LORA_NON_PRIVATE = DPLoraConfig(
    r=8, lora_alpha=8, num_steps=150, learning_rate=5e-3, expected_batch_size=64, ema_decay=0.95
)
METHODS: Mapping[str, Method] = {
    "hyperdp": Method(hyperdp, also=(math.inf,), weights="nested"),
    "dp_deepsets": Method(dp_deepsets, also=(math.inf,)),
    "dp_lora": Method(rival("dp_lora", dp_lora.train_dp_lora), default=DPLoraConfig()),
    "dp_ldm": Method(
        rival("dp_ldm", dp_ldm.train_dp_ldm), also=(math.inf,), default=DPLdmConfig(), weights="latent"
    ),
    "dp_mepf": Method(
        rival("dp_mepf", dp_mepf.train_dp_mepf), also=(math.inf,), default=DPMepfConfig(), needs_public=True
    ),
    "dp_layer_search": Method(
        rival("dp_layer_search", layer_choice.train_dp_layer_search), default=LayerSearchConfig()
    ),
    "dp_embedding_sgd": Method(
        rival("dp_embedding_sgd", dp_embedding_sgd.train_dp_embedding_sgd),
        also=(math.inf,),
        default=EmbeddingSGDConfig(),
    ),
    "dp_hybrid": Method(rival("dp_hybrid", dp_hybrid.train_dp_hybrid), also=(math.inf,), default=DPHybridConfig()),
    "direct_conditioning": Method(
        rival("direct_conditioning", direct_conditioning.release_direct_conditioning),
        also=(math.inf,),
        default=DirectConditioningConfig(),
        weights="conditioned",
    ),
    "nearest_public": Method(nearest_public, also=(math.inf,), needs_public=True),
    "noisy_class_means": Method(noisy_class_means, also=(math.inf,), needs_labels=True),
    "public_only": Method(public_only, private=False, also=(0.0,)),
    "lora_non_private": Method(
        rival("lora_non_private", dp_lora.train_dp_lora), private=False, also=(math.inf,), default=_LORA_NON_PRIVATE
    ),
    "real": Method(real, private=False, also=(math.inf,)),
}


def public_models_source(
    base_model: nn.Module,
    hypernetwork: Any,
    public_images: Callable[[], Tensor],
    device: str = "cpu",
    name: str = "glyphs",
) -> Callable[[str], tuple[Any, ...]]:
    """The public models of every rival, each loaded once: those that ship, on the given base and hypernetwork.

    ``name`` is that hypernetwork's; the folders of the others begin with it.
    """

    @functools.cache
    def models(method: str) -> tuple[Any, ...]:
        if method in ("dp_lora", "lora_non_private", "dp_layer_search"):
            return (base_model,)
        if method in ("dp_embedding_sgd", "dp_hybrid"):
            return base_model, hypernetwork
        if method == "dp_ldm":
            return latent_diffusion.load_latent_models(f"{name}-latent", device=device)
        if method == "dp_mepf":
            # a nested encoder holds a plain one: perceptual features are activations of convolutions
            extractor = getattr(hypernetwork.encoder, "encoder", hypernetwork.encoder)
            return (dp_mepf.PerceptualFeatures(extractor, public_images=public_images()).to(device),)
        if method == "direct_conditioning":
            return hypernetwork, direct_conditioning.load_direct_conditioning(f"{name}-conditioned", device)
        if method == "hyperdp":
            nested = isinstance(hypernetwork, NestedHyperNetwork)
            return (hypernetwork if nested else load_pretrained(f"{name}-nested", device)[1],)
        raise InputError(f"{method!r} has no public models.")

    return models


def generator_for(seed: int) -> torch.Generator:
    """The cell's public randomness; on the CPU, so that a GPU gives the same samples."""
    return torch.Generator().manual_seed(seed)


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it: JSON has no infinity, so it is ``null`` there (full batches, for one)."""
    return {
        name: None if value == math.inf else value for name, value in dataclasses.asdict(config).items()
    }


def config_from_plain(method: str, values: Mapping[str, Any]) -> Any:
    """Inverse of `plain_config`."""
    kind = type(METHODS[method].default)
    return kind(**{name: _from_plain(value) for name, value in values.items()})


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return math.inf if value is None else value
