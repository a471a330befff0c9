"""The rival: the attention modules of a public latent diffusion model, tuned on the private images by DP-SGD.

DP-LDM (Liu, Lyu, Vinaroz & Park 2024, arXiv 2305.15759). A KL autoencoder and a denoiser of its latents are trained
on public data (`hyperdp_lib.baselines.latent_diffusion`). Private images are encoded by the frozen autoencoder, and of
the denoiser only the attention modules, and with labels the class conditioner, are tuned by DP-SGD
(`hyperdp_lib.baselines.dp_training`). Written from the paper.

Two ways to use labels, the better of which is the rival:

* ``shared``: one denoiser whose conditioner has a row for each class, as in the paper;
* ``per_class``: one denoiser for each class, tuned on that class alone, at the cost of one.

``python -m hyperdp_lib.baselines.dp_ldm --public glyphs --out FOLDER`` trains the public models on the public data of
these weights and writes ``FOLDER/weights``; stopped, it continues when run again.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib.baselines import dp_sgd, dp_training
from hyperdp_lib.baselines.dp_sgd import LossFunction, PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.baselines.latent_diffusion import decode, encode, load_latent_models, main, sample_latents
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError

__all__ = ["DPLdm", "DPLdmConfig", "load_latent_models", "train_dp_ldm", "tunable_denoiser"]


@dataclass(frozen=True)
class DPLdmConfig(TrainConfig):
    """Public choices of one training run; defaults chosen on held-out public tasks at epsilon = 10.

    Parameters
    ----------
    mode : {"shared", "per_class"}
    num_frozen_blocks : int
        The first so many attention modules stay as they are.
    feed_forward : bool
        Count the feed-forward layers of a transformer block as part of its attention module, like the "spatial
        transformers" of the original's U-Net, which are tuned as a whole.
    conditioner_gain : float
        Unit in which the conditioner's rows are tuned. Rows of different labels are about 1 apart in each coordinate,
        where weights of attention differ by a hundredth: with 1, clipping and one learning rate for all would leave
        the rows where they start.
    """

    learning_rate: float = 1e-2
    clip_norm: float = 0.05
    num_steps: int = 20
    ema_decay: float = 0.5
    mode: str = "shared"
    num_frozen_blocks: int = 0
    feed_forward: bool = False
    conditioner_gain: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("per_class", "shared"):
            raise InputError(f"mode must be 'per_class' or 'shared', got {self.mode!r}.")
        if self.num_frozen_blocks < 0:
            raise InputError(f"num_frozen_blocks must be at least 0, got {self.num_frozen_blocks}.")
        if not 0 < self.conditioner_gain < math.inf:
            raise InputError(f"conditioner_gain must be positive, got {self.conditioner_gain}.")


@dataclass(frozen=True, eq=False)
class DPLdm:
    """Tuned denoisers, and all that is needed to sample from them.

    Attributes
    ----------
    denoisers : tuple of torch.nn.Module
        Plain diffusers models: one that reads the class as its label, or one for each class that reads label 0.
    autoencoder : torch.nn.Module
    scale : float
        Of the latents, public.
    class_names : tuple of str
    config : DPLdmConfig
    plan : PrivacyPlan
    trained_parameters : int
        Over all denoisers.
    noise_dimension : int
        Coordinates noised at a time.
    num_releases : int
        Noisy gradient sums; 0 without noise.
    seconds : float
        Wall-clock time of encoding and training.
    """

    denoisers: tuple[nn.Module, ...]
    autoencoder: nn.Module
    scale: float
    class_names: tuple[str, ...]
    config: DPLdmConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    num_releases: int
    seconds: float

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        classes = len(self.class_names)
        if num_images < 1 or num_images % classes:
            raise InputError(f"num_images must be a positive multiple of the {classes} classes, got {num_images}.")
        labels = torch.arange(classes).repeat_interleave(num_images // classes)
        if len(self.denoisers) == 1:
            shares = [labels]
        else:
            shares = [torch.zeros(num_images // classes, dtype=torch.long)] * classes
        latents = [
            sample_latents(denoiser, share, generator=generator, num_steps=num_steps, batch_size=batch_size)
            for denoiser, share in zip(self.denoisers, shares, strict=True)
        ]
        return decode(self.autoencoder, torch.cat(latents), self.scale), labels


def train_dp_ldm(
    private_images: Tensor,
    private_labels: Tensor | None,
    autoencoder: nn.Module,
    denoiser: nn.Module,
    scale: float,
    config: DPLdmConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[DPLdm, Certificate]:
    """Tune attention modules, and with labels the conditioner, on private images by DP-SGD.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1], of the size the autoencoder reads.
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    autoencoder, denoiser, scale
        Public, from `load_latent_models`; left as they are.
    epsilon, delta, neighboring_relation
        The budget of the whole training, all classes and all steps. With ``epsilon = inf`` the same loop runs without
        clipping and noise, not private.
    num_private_declared : int
        Public: the number of images to plan for. Pass ``len(private_images)`` only if that is public.
    class_names : sequence of str
        The public label set.
    seed : int, optional
        Makes noise and batches reproducible, and the result a demonstration that is NOT PRIVATE.
        ``None`` seeds them from the operating system.
    loss_function : callable, optional
        Of latents, see `dp_sgd.LossFunction`; by default `hyperdp_lib.diffusion.denoising_loss`.
    progress : bool
        Show a bar of steps (their number is public).

    Returns
    -------
    trained : DPLdm
    certificate : Certificate
        For ``epsilon = inf`` it says NOT PRIVATE.
    """
    names = tuple(class_names)
    per_class = config.mode == "per_class" or len(names) == 1
    budget: dict[str, Any] = dict(epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation)
    # everything public first: nothing private is read for a request that cannot be served
    _check_request(private_images.shape, autoencoder, denoiser, scale, config, num_private_declared, names, per_class)
    declared = num_private_declared / (len(names) if per_class else 1)
    dp_sgd.privacy_plan(
        **budget,
        expected_batch_size=config.expected_batch_size,
        declared_size=declared,
        num_steps=config.num_steps,
    )
    labels = dp_training.check_private(private_images, private_labels, names)
    started = time.perf_counter()
    run = dp_training.train(
        lambda _: tunable_denoiser(denoiser, config, 1 if per_class else len(names), conditioner=len(names) > 1),
        encode(autoencoder, private_images, scale),
        labels if len(names) > 1 else None,
        config,
        num_private_declared=num_private_declared,
        per_class=per_class,
        class_names=names,
        seed=seed,
        loss_function=loss_function,
        progress=progress,
        **budget,
    )
    private = run.plan.noise_std > 0
    trained = DPLdm(
        denoisers=tuple(_plain(trainee) for trainee in run.trainees),
        autoencoder=autoencoder,
        scale=scale,
        class_names=names,
        config=config,
        plan=run.plan,
        trained_parameters=run.trained_parameters,
        noise_dimension=run.noise_dimension,
        num_releases=run.plan.num_steps if private else 0,
        seconds=time.perf_counter() - started,
    )
    certificate = dp_training.certify(
        run,
        config,
        nn.ModuleDict({"autoencoder": autoencoder, "denoiser": denoiser}),
        num_private_declared,
        method="dp_ldm",
        description=f"DP-LDM, {config.mode}, attention" + (" and conditioner" if len(names) > 1 else ""),
        class_names=names,
        seeded=seed is not None,
        **budget,
    )
    return trained, certificate


def _check_request(
    shape: torch.Size,
    autoencoder: Any,
    denoiser: Any,
    scale: float,
    config: DPLdmConfig,
    declared_size: int,
    class_names: tuple[str, ...],
    per_class: bool,
) -> None:
    side, channels = int(autoencoder.config.sample_size), int(autoencoder.config.in_channels)
    if len(shape) != 4 or tuple(shape[1:]) != (channels, side, side):
        raise InputError(f"private_images must have shape (N, {channels}, {side}, {side}), got {tuple(shape)}: resize.")
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"scale must be positive, got {scale}.")
    blocks = len(getattr(denoiser, "transformer_blocks", ()))
    if not blocks or not _label_embeddings(denoiser):
        raise InputError("the denoiser must be a diffusers DiTTransformer2DModel, with attention and label embeddings.")
    if config.num_frozen_blocks >= blocks:
        raise InputError(f"num_frozen_blocks must be below the {blocks} attention modules: nothing is left to tune.")
    if not class_names:
        raise InputError("class_names is empty: name the public label set.")
    if declared_size < 1:
        raise InputError(f"num_private_declared must be at least 1, got {declared_size}.")
    declared = declared_size / (len(class_names) if per_class else 1)
    if declared < config.expected_batch_size < math.inf:
        raise InputError(
            f"expected_batch_size {config.expected_batch_size:g} exceeds the {declared:g} images declared"
            f"{' for each class' if per_class else ''}: make it smaller, or inf for full batches."
        )


class ConditionerRows(nn.Module):
    """Rows of private classes: the public row of "no label" plus ``gain`` times what is tuned."""

    def __init__(self, public_row: Tensor, num_classes: int, gain: float, *, tuned: bool) -> None:
        super().__init__()
        self.register_buffer("public_row", public_row)
        self.gain = gain
        self.shift = nn.Embedding.from_pretrained(public_row.new_zeros(num_classes, len(public_row)), freeze=not tuned)

    def forward(self, classes: Tensor) -> Tensor:
        """Rows (N, D) of labels (N,)."""
        return self.public_row + self.gain * self.shift(classes)


def tunable_denoiser(denoiser: nn.Module, config: DPLdmConfig, num_classes: int, *, conditioner: bool) -> nn.Module:
    """A copy ready for per-example gradients: attention modules, perhaps the conditioner, and nothing else trained.

    The conditioner has a row for each class, which starts from the public row of "no label".
    """
    model: Any = copy.deepcopy(denoiser).requires_grad_(False)
    for block in model.transformer_blocks[config.num_frozen_blocks :]:
        block.attn1.requires_grad_(True)
        block.ff.requires_grad_(config.feed_forward)
    for embedding in _label_embeddings(model):
        public_row = embedding.embedding_table.weight.detach()[-1].clone()
        embedding.embedding_table = ConditionerRows(public_row, num_classes, config.conditioner_gain, tuned=conditioner)
        embedding.num_classes = num_classes
    return dp_training.trainable(model)


def _plain(trainee: Any) -> nn.Module:
    """The trainee as a diffusers model that can be saved and read: an ordinary table, its last row "no label" again."""
    for embedding in _label_embeddings(trainee):
        table = embedding.embedding_table
        with torch.no_grad():
            rows = table(torch.arange(embedding.num_classes, device=table.public_row.device))
        embedding.embedding_table = nn.Embedding.from_pretrained(torch.cat([rows, table.public_row[None]]))
        trainee.register_to_config(num_embeds_ada_norm=embedding.num_classes)
    return trainee.eval().requires_grad_(False)


def _label_embeddings(model: nn.Module) -> list[Any]:
    from diffusers.models.embeddings import LabelEmbedding

    return [module for module in model.modules() if isinstance(module, LabelEmbedding)]


if __name__ == "__main__":
    raise SystemExit(main())
