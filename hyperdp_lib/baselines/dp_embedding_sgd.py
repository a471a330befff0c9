"""The rival between DP-SGD and one noisy sum: DP-SGD on the few numbers that the hypernetwork reads.

`release` sums embeddings once and decodes the noisy mean to an adapter. Here the same frozen hypernetwork is kept, but
its input, one vector for each class in place of the mean embedding, is *optimised*: DP-SGD on the denoising loss of the
private images under the generated adapter. The noise of a step has k - 1 coordinates instead of the adapter's tens of
thousands, at the price of many steps. In the linear setting of `hyperdp_lib.theory` this is projected DP-SGD.

The count coordinate of the sum is not trained: how many images the hypernetwork is told to have seen, and through how
much noise, are public settings. The vector is kept in a ball of public radius, like every mean of embeddings; like
whatever else happens to a noisy gradient, that is post-processing.

Per-example gradients are exact and cheap: every example gets a copy of the vector of its own, hence an adapter of its
own, and the gradient with respect to the copies is the stack of per-example gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion
from hyperdp_lib.adapter import Adapter, apply_adapters
from hyperdp_lib.baselines import dp_lora, dp_training
from hyperdp_lib.baselines.dp_sgd import LossFunction, PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError


@dataclass(frozen=True)
class EmbeddingSGDConfig(TrainConfig):
    """Public choices of one run; `TrainConfig` has those of DP-SGD.

    Many steps pay: on public stand-ins at epsilon = 10, 100 steps of a quarter of a class beat 30 full batches, and 10
    are too few at any budget.

    Parameters
    ----------
    told_count : float
        Number of images the hypernetwork is told a class has.
    told_noise : float
        Standard deviation of the noise it is told to expect on each coordinate of the mean.
    radius : float
        Largest L2 norm of the vector. Means of embeddings have at most ``sqrt(1 - count_coordinate**2)``.
    """

    learning_rate: float = 0.05
    clip_norm: float = 1.0
    num_steps: int = 100
    expected_batch_size: float = 36.0
    noise_draws: int = 1
    ema_decay: float = 0.95
    told_count: float = 150.0
    told_noise: float = 0.02
    radius: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("told_count", "told_noise", "radius"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class EmbeddingSGD:
    """Trained vectors, the adapters made of them, and all that is needed to sample.

    Attributes
    ----------
    vectors : Tensor
        ``(T, k - 1)``, one for each class: as public as the adapters, another hypernetwork may decode them again.
    adapter : Adapter
        T = number of classes.
    model : torch.nn.Module
        The base model.
    class_names : tuple of str
    config : EmbeddingSGDConfig
    plan : PrivacyPlan
    trained_parameters : int
        ``T (k - 1)``.
    noise_dimension : int
        Coordinates noised at a time, ``k - 1``.
    seconds : float
        Wall-clock training time.
    """

    vectors: Tensor
    adapter: Adapter
    model: nn.Module
    class_names: tuple[str, ...]
    config: EmbeddingSGDConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float

    @property
    def num_releases(self) -> int:
        """Noisy gradients that were released (of each class); 0 without privacy."""
        return self.plan.num_steps if self.plan.noise_std > 0 else 0

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        return sample_classes(self.model, self.adapter, num_images, generator, num_steps, batch_size)


def sample_classes(
    base_model: nn.Module,
    adapter: Adapter,
    num_images: int,
    generator: torch.Generator,
    num_steps: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Images and sorted labels, as many from each of the adapters."""
    classes = adapter.num_adapters
    if num_images % classes:
        raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
    images = diffusion.sample(
        base_model, adapter, num_images, generator=generator, num_steps=num_steps, batch_size=batch_size
    )
    return images, torch.arange(classes).repeat_interleave(num_images // classes)


def train_dp_embedding_sgd(
    private_images: Tensor,
    private_labels: Tensor | None,
    base_model: nn.Module,
    hypernetwork: Any,
    config: EmbeddingSGDConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    public_start: Tensor | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[EmbeddingSGD, Certificate]:
    """Optimise the hypernetwork's input by DP-SGD; with ``epsilon = inf`` by the same loop, not private.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1], of the base model's size.
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    base_model, hypernetwork
        Public, and left as they are; see ``load_pretrained``.
    epsilon, delta, neighboring_relation, num_private_declared, class_names, seed, progress
        As in `dp_lora.train_dp_lora`.
    public_start : Tensor, optional
        ``(k,)`` mean embedding of public images, count coordinate first, at which every class starts; by default the
        rest of the coordinates start at zero.
    loss_function : callable, optional
        Of the base model, see `dp_sgd.LossFunction`; by default `hyperdp_lib.diffusion.denoising_loss`.

    Returns
    -------
    trained : EmbeddingSGD
    certificate : Certificate
        For ``epsilon = inf`` it says NOT PRIVATE.
    """
    names = tuple(class_names)
    dp_lora.check_request(private_images, base_model, names)
    dp_training.check_private(private_images, private_labels, names)
    dimension = hypernetwork.encoder.config.dimension
    start = torch.zeros(dimension) if public_start is None else public_start.detach().cpu().float()
    if start.shape != (dimension,) or not torch.isfinite(start).all():
        raise InputError(f"public_start must be a finite mean embedding ({dimension},), got {tuple(start.shape)}.")
    decoder = Decoder(base_model, hypernetwork, config, loss_function or diffusion.denoising_loss)
    budget: dict[str, Any] = dict(epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation)
    run = dp_training.train(
        lambda label: EmbeddingVector(start[1:], config.radius).to(decoder.device),
        private_images,
        private_labels,
        config,
        num_private_declared=num_private_declared,
        per_class=True,
        class_names=names,
        seed=seed,
        loss_function=decoder.losses,
        make_gradients=lambda trainee: VectorGradients(trainee, decoder),
        progress=progress,
        **budget,
    )
    with torch.no_grad():
        vectors = torch.stack([trainee() for trainee in run.trainees])
        adapter = decoder.adapters(vectors, names)
    trained = EmbeddingSGD(
        vectors.cpu(),
        adapter.detach(),
        base_model,
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
        base_model,
        num_private_declared,
        method="dp_embedding_sgd",
        description="DP-SGD on the hypernetwork's input",
        class_names=names,
        seeded=seed is not None,
        **budget,
    )
    return trained, certificate


class EmbeddingVector(nn.Module):
    """The trainee: a vector ``(k - 1,)`` in a ball."""

    def __init__(self, start: Tensor, radius: float) -> None:
        super().__init__()
        self.radius = radius
        self.vector = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        """The vector, put back into the ball if an optimiser step left it."""
        with torch.no_grad():
            self.vector.mul_((self.radius / self.vector.norm().clamp_min(1e-12)).clamp_max(1.0))
        return self.vector


class Decoder:
    """Frozen copies of base model and hypernetwork, and the loss of images under the adapters of given vectors."""

    def __init__(
        self, base_model: nn.Module, hypernetwork: Any, config: EmbeddingSGDConfig, loss_function: LossFunction
    ) -> None:
        # copies, so that the caller's models keep their mode and their requires_grad
        self.base_model = copy.deepcopy(base_model).eval().requires_grad_(False)
        self.hypernetwork = copy.deepcopy(hypernetwork).eval().requires_grad_(False)
        self.config, self.loss_function = config, loss_function

    @property
    def device(self) -> torch.device:
        """Of the models."""
        return next(self.base_model.parameters()).device

    def adapters(self, vectors: Tensor, names: tuple[str, ...] | None = None) -> Adapter:
        """An adapter for each vector ``(T, k - 1)``, as if it were the mean of a noisy sum."""
        count, noise = self.config.told_count, self.config.told_noise
        constant = self.hypernetwork.encoder.config.count_coordinate
        means = torch.cat([vectors.new_full((len(vectors), 1), constant), vectors], 1)
        return self.hypernetwork(count * means, count * noise, names)

    def losses(
        self, model: nn.Module, private_images: Tensor, *, generator: torch.Generator, **no_labels: None
    ) -> Tensor:
        """Loss ``(N,)`` of each image under the one adapter of the trainee `model`: a `LossFunction`."""
        return self.under(model()[None], private_images, generator)

    def under(self, vectors: Tensor, private_images: Tensor, generator: torch.Generator) -> Tensor:
        """Loss ``(N,)`` of images sorted by vector, ``N / len(vectors)`` of each."""
        with apply_adapters(self.base_model, self.adapters(vectors)):
            return self.loss_function(self.base_model, private_images, generator=generator, labels=None)


class VectorGradients:
    """Exact per-example gradients of the vector, each the mean over its example's noise draws: a `Gradients`."""

    def __init__(self, trainee: nn.Module, decoder: Decoder) -> None:
        self.trainee, self.decoder = trainee, decoder

    def backward(self, private_images: Tensor, private_labels: Tensor | None, generator: torch.Generator) -> None:
        """Fill ``grad_sample``, ``(len(private_images), k - 1)``."""
        vector: Any = self.trainee()
        if len(private_images) == 0:  # Poisson sampling may pick nobody
            vector.grad_sample = vector.new_zeros((0, *vector.shape))
            return
        draws = self.decoder.config.noise_draws
        copies = vector.detach().expand(len(private_images), -1).clone().requires_grad_()
        losses = self.decoder.under(copies, private_images.repeat_interleave(draws, 0), generator)
        # an image reaches the sum through its own copy only, so the gradient of the sum is the stack
        (vector.grad_sample,) = torch.autograd.grad(losses.sum() / draws, copies)

    def remove(self) -> None:
        """Nothing was attached."""
