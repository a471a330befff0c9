"""Which layers of a pretrained classifier should DP-SGD tune? Accuracy by subset of layers and by epsilon.

Cattan, Choquette-Choo, Papernot & Thakurta (2022, arXiv 2210.02156): under differential privacy, the layers that are
tuned are one more hyper-parameter. DP-SGD adds noise to every coordinate that it trains, so at a small epsilon few
parameters may do better than many, whatever they can express. Their layers and architecture are not available to us;
this module tests the *claim* on a small scale. The network is the library's feature network, pretrained on public
characters: four convolutions with GroupNorm and a linear layer. A new head, zero at first, classifies the private
images; it is trained in every subset of `SUBSETS`, together with the layers that the subset names.

Layers below the first trained one are frozen and see one image at a time, so the images are passed through them once,
and DP-SGD starts from there.

``python -m hyperdp_lib.baselines.layer_grid --out book/results/layers`` tunes all subsets on public stand-ins
and runs the grid of subsets, epsilons and seeds (`layer_grid`).
"""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib.baselines import dp_training
from hyperdp_lib.baselines.dp_sgd import PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import FeatureNetwork

# Layers of `Classifier`: convolutions 0, 3, 6, 9 and their norms 1, 4, 7, 10; linear 13; standardisation 14; head 15.
HEAD = r"15\..*"
SUBSETS: Mapping[str, str] = {
    "head": HEAD,
    "norms": rf"(1|4|7|10)\..*|{HEAD}",
    "biases": rf".*\.bias|{HEAD}",
    "first_block": rf"(0|1)\..*|{HEAD}",
    "last_block": rf"(9|10)\..*|{HEAD}",
    "linear": rf"13\..*|{HEAD}",
    "convolutions": rf"(0|3|6|9)\..*|{HEAD}",
    "all": r".*",
}
"""Name of a subset to a pattern of the parameters it trains; the head is always among them."""


@dataclass(frozen=True)
class LayerClassificationConfig(TrainConfig):
    """Public choices of one run.

    Parameters
    ----------
    subset : str
        Which layers are trained: a name in `SUBSETS`.
    """

    subset: str = "head"
    learning_rate: float = 1e-2
    clip_norm: float = 1.0
    num_steps: int = 30
    physical_batch_size: int = 64  # gradients of more examples leave the processor's cache

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset not in SUBSETS:
            raise InputError(f"subset must be one of {', '.join(SUBSETS)}, got {self.subset!r}.")
        if self.noise_draws != 1:
            raise InputError("noise_draws must be 1: a classifier's loss draws no noise of its own.")


class Standardise(nn.Module):
    """Features less their public mean, over their public standard deviation; both ``(64,)``."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def build_classifier(network: FeatureNetwork, public_images: Tensor, num_classes: int) -> nn.Sequential:
    """The pretrained layers, standardised by ``public_images`` ``(N, C, H, W)``, and a head that is zero.

    Returns
    -------
    torch.nn.Sequential
        Images ``(N, C, H, W)`` in [-1, 1] to logits ``(N, num_classes)``; see `SUBSETS` for its layers.
    """
    layers = copy.deepcopy(network.layers).eval().requires_grad_(False)
    with torch.no_grad():
        found = torch.cat([layers(part) for part in public_images.split(500)])
    head = nn.Linear(network.dimension, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    standardise = Standardise(found.mean(0), found.std(0).clamp(min=1e-3))
    return nn.Sequential(*layers, standardise, head).eval().requires_grad_(False)


def num_classes(classifier: nn.Sequential) -> int:
    """Classes that the head tells apart."""
    head: Any = classifier[-1]
    return head.out_features


def split_at_first_trained(classifier: nn.Sequential, subset: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Frozen layers below the subset, and a trainable copy of the rest."""
    chosen = [name for name, _ in classifier.named_parameters() if re.fullmatch(SUBSETS[subset], name)]
    first = min(int(name.split(".")[0]) for name in chosen)
    layers = [*classifier.named_children()]
    frozen, rest = (nn.Sequential(OrderedDict(part)) for part in (layers[:first], layers[first:]))
    rest = copy.deepcopy(rest)
    for name, parameter in rest.named_parameters():  # the layers keep their names
        parameter.requires_grad_(name in chosen)
    return frozen, rest


@dataclass(frozen=True, eq=False)
class LayerClassifier:
    """A classifier of which one subset of layers was trained.

    Attributes
    ----------
    model : torch.nn.Module
        Images ``(N, C, H, W)`` to logits.
    class_names : tuple of str
    config : LayerClassificationConfig
    plan : PrivacyPlan
    trained_parameters, noise_dimension : int
        The same number: all that is trained is noised.
    seconds : float
        Wall-clock training time.
    """

    model: nn.Module
    class_names: tuple[str, ...]
    config: LayerClassificationConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float

    @property
    def num_releases(self) -> int:
        """Noisy gradients that were released; 0 without privacy."""
        return self.plan.num_steps if self.plan.noise_std > 0 else 0

    @torch.no_grad()
    def accuracy(self, private_test_images: Tensor, private_test_labels: Tensor) -> float:
        """Share of right answers in [0, 1].  A research metric, not DP."""
        logits = torch.cat([self.model(part) for part in private_test_images.split(500)])
        return float((logits.argmax(1) == private_test_labels).double().mean())


def cross_entropy(model: nn.Module, private_inputs: Tensor, **draws_and_labels: Any) -> Tensor:
    """A `dp_sgd.LossFunction`: the loss of each example ``(N,)``, which reads ``labels`` and draws nothing."""
    return F.cross_entropy(model(private_inputs), draws_and_labels["labels"], reduction="none")


def train_layer_classification(
    private_images: Tensor,
    private_labels: Tensor | None,
    classifier: nn.Sequential,
    config: LayerClassificationConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    class_names: Sequence[str],
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
    progress: bool = False,
) -> tuple[LayerClassifier, Certificate]:
    """Train one subset of the layers by DP-SGD; with ``epsilon = inf`` by the same loop, not private.

    Parameters
    ----------
    private_images, private_labels : Tensor
        ``(N, C, H, W)`` in [-1, 1] and ``(N,)``.
    classifier : torch.nn.Sequential
        From `build_classifier`, for as many classes as ``class_names``; left as it is.
    epsilon, delta, neighboring_relation, num_private_declared, seed, progress
        As in `dp_lora.train_dp_lora`.

    Returns
    -------
    trained : LayerClassifier
    certificate : Certificate
    """
    names = tuple(class_names)
    if private_labels is None:
        raise InputError("classification needs private_labels: give one label for each image.")
    if len(names) < 2 or num_classes(classifier) != len(names):
        raise InputError(f"the classifier has {num_classes(classifier)} classes, class_names {len(names)}.")
    first, linear = (cast(Any, classifier[index]) for index in (0, 13))
    channels = first.in_channels
    if private_images.ndim != 4 or private_images.shape[1] != channels:
        shape = tuple(private_images.shape)
        raise InputError(f"private_images must have shape (N, {channels}, H, W), got {shape}: convert them first.")
    side = private_images.shape[-1]
    if private_images.shape[-2] != side or 128 * math.ceil(side / 4) ** 2 != linear.in_features:
        raise InputError(f"the network does not read {tuple(private_images.shape[-2:])} images: resize them first.")
    dp_training.check_private(private_images, private_labels, names)
    frozen, trainee = split_at_first_trained(classifier, config.subset)
    with torch.no_grad():  # one image at a time (GroupNorm), by public layers: nothing is released here
        private_inputs = torch.cat([frozen(part) for part in private_images.split(500)])
    budget: dict[str, Any] = dict(
        epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation, class_names=names
    )
    run = dp_training.train(
        lambda _: dp_training.trainable(trainee),
        private_inputs.view(*private_inputs.shape, *[1] * (4 - private_inputs.ndim)),
        private_labels,
        config,
        num_private_declared=num_private_declared,
        per_class=False,
        seed=seed,
        loss_function=cross_entropy if private_inputs.ndim == 4 else _flat_cross_entropy,
        progress=progress,
        **budget,
    )
    trained = LayerClassifier(
        nn.Sequential(*frozen, *trainee).eval(),
        names,
        config,
        run.plan,
        run.trained_parameters,
        run.noise_dimension,
        run.seconds,
    )
    certificate = dp_training.certify(
        run,
        config,
        classifier,
        num_private_declared,
        method="dp_layer_classification",
        description=f"DP-SGD of a classifier's layers: {config.subset}",
        seeded=seed is not None,
        **budget,
    )
    return trained, certificate


def _flat_cross_entropy(model: nn.Module, private_inputs: Tensor, **draws_and_labels: Any) -> Tensor:
    """Of features, which the training loop holds as 1 x 1 images."""
    return cross_entropy(model, private_inputs.flatten(1), **draws_and_labels)
