"""Training any part of a public model on private images by DP-SGD: the loop and the certificate of every such rival.

A rival says which model to train (`TrainConfig` and a function that makes a trainee) and this module does the rest, so
that all of them get the same sampling, clipping, noise, averaging, accounting and ledger. What a trainee is: a module
in evaluation mode whose parameters with ``requires_grad`` are trained; the modules that own them are in training mode,
for Opacus' hooks (`trainable`).

Two ways to use labels. *Jointly*: one trainee reads them. *Per class*: one trainee for each class, trained on that
class alone. The classes are disjoint, so adding, removing or zeroing one example touches one training only, and all
of them cost what one costs (parallel composition, McSherry 2009). Replacing an example by one of *another* class
touches two. With full batches the joint sum of a step then moves by ``sqrt(2) C``, less than the ``2 C`` of a
replacement within a class; with Poisson batches the replacement is a removal and an addition. `dp_sgd.privacy_plan`
covers both.

Public are the label set, the configuration and the declared number of images. Losses and clip rates are functions of
the private images, so none is returned or logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import artefacts, certificate, diffusion
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.baselines.dp_sgd import Gradients, LossFunction, PrivacyPlan
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError, check_model_range
from hyperdp_lib.ledger import NUMBER_OF_IMAGES, LedgerEntry, declaration
from hyperdp_lib.progress import progress_bar


@dataclass(frozen=True)
class TrainConfig:
    """Public choices of one DP-SGD run.

    Parameters
    ----------
    learning_rate : float
        Of AdamW, without weight decay; it falls linearly to a tenth over the run.
    clip_norm : float
        Largest L2 norm of one example's gradient.
    num_steps : int
        Gradient steps, of each trainee.
    expected_batch_size : float
        Examples a step on average, of each trainee; from the declared size on, every step uses all images.
    noise_draws : int
        Draws K of noise and time step over which an example's gradient is averaged before it is clipped.
    ema_decay : float
        Of the average over the iterates that is returned (post-processing); 0 returns the last iterate.
    physical_batch_size : int
        Most rows (images times draws) in one forward pass: memory only, no influence on privacy.
    """

    learning_rate: float = 3e-3
    clip_norm: float = 0.1
    num_steps: int = 40
    expected_batch_size: float = math.inf
    noise_draws: int = 1
    ema_decay: float = 0.9
    physical_batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("num_steps", "noise_draws", "physical_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm", "expected_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")

    def check_budget(self, epsilon: float, delta: float, neighboring_relation: str, declared_size: float) -> None:
        """Raise `InputError` for a budget out of range; ``declared_size`` is of one trainee. Quick, reads nothing."""
        rate = dp_sgd.sample_rate(self.expected_batch_size, declared_size)
        dp_sgd.check_budget(epsilon, delta, neighboring_relation, rate)


@dataclass(frozen=True, eq=False)
class Run:
    """What a DP-SGD run made.

    Attributes
    ----------
    trainees : tuple of torch.nn.Module
        One, or one for each class; each holds the average of its iterates.
    plan : PrivacyPlan
    trained_parameters : int
        Over all trainees.
    noise_dimension : int
        Coordinates noised at a time.
    seconds : float
        Wall-clock training time.
    """

    trainees: tuple[nn.Module, ...]
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float


def train(
    make_trainee: Callable[[int], nn.Module],
    private_images: Tensor,
    private_labels: Tensor | None,
    config: TrainConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    per_class: bool,
    class_names: Sequence[str] = ("adapter",),
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    seed: int | None = None,
    loss_function: LossFunction | None = None,
    make_gradients: Callable[[nn.Module], Gradients] | None = None,
    progress: bool = False,
) -> Run:
    """Train by DP-SGD; with ``epsilon = inf`` by the same loop without clipping and noise, not private.

    Parameters
    ----------
    make_trainee : callable
        From the number of a class (0 when not ``per_class``) to a fresh trainee, from public data alone.
    private_images : Tensor
        ``(N, C, H, W)``, what the trainee reads. Callers check that pixels lie in [-1, 1] (`check_private`).
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    epsilon, delta, neighboring_relation
        The budget of the whole training, all classes and all steps.
    num_private_declared : int
        Public: the number of images to plan for. Pass ``len(private_images)`` only if that is public.
    per_class : bool
        One trainee for each class; otherwise one in all, whose loss is given the labels if there are several classes.
    seed : int, optional
        Makes noise and batches reproducible, and the result a demonstration that is NOT PRIVATE. ``None`` keys them
        from the operating system, `dp_sgd.secret_generator`.
    loss_function : callable, optional
        See `dp_sgd.LossFunction`; by default `hyperdp_lib.diffusion.denoising_loss`.
    make_gradients : callable, optional
        From a trainee to its per-example gradients; by default Opacus' hooks, `dp_sgd.ExampleGradients`. Without
        privacy the loss is used directly.
    progress : bool
        Show a bar of steps (their number is public).
    """
    names = tuple(class_names)
    if not names:
        raise InputError("class_names is empty: name the public label set.")
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    plan = dp_sgd.privacy_plan(
        epsilon,
        delta,
        neighboring_relation,
        expected_batch_size=config.expected_batch_size,
        declared_size=num_private_declared / (len(names) if per_class else 1),
        num_steps=config.num_steps,
    )
    labels = check_private(private_images, private_labels, names, pixels=False)  # latents or features, too
    seeds = None if seed is None else torch.Generator().manual_seed(seed)
    loss_function = loss_function or diffusion.denoising_loss
    started = time.perf_counter()
    bar = progress_bar(
        total=(len(names) if per_class else 1) * plan.num_steps,
        show=progress,
        desc="DP-SGD",
        unit="step",
    )
    trainees = []
    for label in range(len(names) if per_class else 1):
        trainees.append(make_trainee(label))
        if plan.noise_std > 0 and (len(names) if per_class else 1) * _size(trainees[-1]) > dp_sgd.MAX_NOISED:
            raise InputError(f"DP-SGD noises at most {dp_sgd.MAX_NOISED} parameters here: train fewer of them.")
        images, own = (private_images[labels == label], None) if per_class else (private_images, labels)
        gradients = make_gradients(trainees[-1]) if make_gradients and plan.noise_std > 0 else None
        _descend(trainees[-1], images, own, config, plan, seeds, loss_function, gradients, bar.update)
    bar.close()
    dimension = _size(trainees[0])
    return Run(
        tuple(trainees), plan, dimension * len(trainees), dimension, time.perf_counter() - started
    )


def certify(
    run: Run,
    config: TrainConfig,
    base_model: nn.Module,
    num_private_declared: int,
    *,
    method: str,
    description: str,
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    class_names: Sequence[str],
    seeded: bool,
) -> Certificate:
    """One charge for the whole run: under parallel composition all classes together cost what one does.

    ``description`` says in the ledger what was trained. Without noise the certificate says NOT PRIVATE.
    """
    plan = run.plan
    fields: dict[str, Any] = {}
    declared: tuple[LedgerEntry, ...] = ()
    if plan.noise_std == 0:
        mechanism, rng = certificate.NO_PRIVACY, certificate.NO_NOISE
        charge = LedgerEntry("other", f"{description}, without noise", math.inf, 0.0)
    else:
        mechanism = certificate.DP_SGD
        rng = certificate.SEEDED_NOISE if seeded else certificate.FLOAT_NOISE
        charge = dp_sgd_charge(plan, description, epsilon, delta, neighboring_relation)
        declared = (declared_size(num_private_declared),)
        fields = dict(
            noise_multiplier=plan.noise_multiplier,
            noise_std=plan.noise_multiplier * (plan.sensitivity * config.clip_norm),
            clip_norm=config.clip_norm,
            sensitivity=plan.sensitivity * config.clip_norm,
            dimension=run.noise_dimension,
        )
    return certificate.ledger_certificate(
        (*declared, charge),
        delta,
        method=method,
        mechanism=mechanism,
        neighboring_relation=neighboring_relation,
        rng=rng,
        epsilon=epsilon,
        num_private=num_private_declared,
        class_names=tuple(class_names) if len(class_names) > 1 else (),
        base_model_sha256=artefacts.tensors_sha256(base_model.state_dict()),
        **fields,
    )


def dp_sgd_charge(
    plan: PrivacyPlan, description: str, epsilon: float, delta: float, neighboring_relation: str
) -> LedgerEntry:
    """The ledger's entry for a run of this plan."""
    return LedgerEntry(
        "dp_sgd",
        f"{description}: {plan.accountant}",
        epsilon,
        delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=plan.num_steps,
        neighboring_relation=neighboring_relation,
    )


def declared_size(num_private_declared: int) -> LedgerEntry:
    """The ledger's entry for the declared number of images: sampling rate and denominator follow from it."""
    return declaration(NUMBER_OF_IMAGES, f"number of images to plan for, {num_private_declared}")


def trainable(model: nn.Module) -> nn.Module:
    """Evaluation mode, so that nothing is dropped at random, but training mode for owners of trained parameters."""
    model.eval()
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
    return model


def check_private(
    private_images: Tensor, private_labels: Tensor | None, class_names: Sequence[str], *, pixels: bool = True
) -> Tensor:
    """Labels ``(N,)``, zeros for one unlabelled class; an `InputError` for anything that cannot be trained on.

    ``pixels``: values must lie in [-1, 1].
    """
    if private_images.ndim != 4 or not private_images.is_floating_point():
        shape = tuple(private_images.shape)
        raise InputError(f"private_images must be float (N, C, H, W), got {private_images.dtype} {shape}.")
    if pixels:
        check_model_range(private_images, "private_images")
    elif not torch.isfinite(private_images).all():
        raise InputError("what the trainee reads of private images holds NaN or infinity.")
    if not class_names:
        raise InputError("class_names is empty: name the public label set.")
    if private_labels is None:
        if len(class_names) > 1:
            raise InputError("several class_names but no private_labels: give one label for each image.")
        return torch.zeros(len(private_images), dtype=torch.long)
    if private_labels.shape != private_images.shape[:1]:
        raise InputError("private_labels and private_images differ in length: give one label for each image.")
    known = (private_labels >= 0) & (private_labels < len(class_names))
    if not known.all():
        raise InputError(f"private_labels must lie in 0 .. {len(class_names) - 1}, one for each class name.")
    return private_labels


def _descend(
    model: nn.Module,
    private_images: Tensor,
    private_labels: Tensor | None,
    config: TrainConfig,
    plan: PrivacyPlan,
    seeds: torch.Generator | None,
    loss_function: LossFunction,
    gradients: Gradients | None,
    tick: Callable[[], Any],
) -> None:
    """Train in place; afterwards the trained parameters hold the average of the iterates.

    ``seeds`` is advanced from one trainee to the next; ``None`` means secret batches and noise.
    """
    parameters = _trained(model)
    device = parameters[0].device
    adamw = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    if seeds is None:
        noise, draws, batches = (dp_sgd.secret_generator() for _ in range(3))
    else:
        noise = torch.Generator().manual_seed(_draw_seed(seeds))
        draws = torch.Generator().manual_seed(_draw_seed(seeds))  # `diffusion` draws on the CPU
        batches = seeds
    if plan.noise_std > 0:
        if gradients is None:
            gradients = dp_sgd.ExampleGradients(model, loss_function, config.noise_draws)
        step = dp_sgd.noisy_step(gradients, adamw, plan, config.clip_norm, noise=noise, draws=draws)
    else:
        step = dp_sgd.plain_step(model, adamw, plan, loss_function, config.noise_draws, draws=draws)
    average = [p.detach().clone() for p in parameters]
    size = max(1, config.physical_batch_size // config.noise_draws)
    for done, chosen in enumerate(dp_sgd.poisson_batches(len(private_images), plan, batches)):
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.9 * done / plan.num_steps)
        parts = chosen.split(size) if len(chosen) else (chosen,)
        step([_batch(private_images, private_labels, part, device) for part in parts])
        decay = min(config.ema_decay, done / (done + 10))  # the starting point counts for nothing
        for mean, p in zip(average, parameters, strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        tick()
    if gradients is not None:
        gradients.remove()
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("nothing to train: no parameter of the model has requires_grad.")
    return parameters


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in _trained(model))


def _batch(
    private_images: Tensor, private_labels: Tensor | None, part: Tensor, device: torch.device
) -> dp_sgd.Batch:
    labels = None if private_labels is None else private_labels[part].to(device)
    return private_images[part].to(device), labels


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))
