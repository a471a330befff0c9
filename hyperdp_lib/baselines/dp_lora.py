"""The rival: LoRA adapters trained on the private images by DP-SGD.

DP-LoRA (Tsai et al. 2024, arXiv 2406.01355): adapters of a public diffusion model, trained by DP-SGD, each
image's gradient averaged over several noise draws before it is clipped.  Written from the paper.

Two ways to use labels, the better of which is the rival:

* ``shared``: one adapter, and label embeddings of the base model resized to the classes and trained too;
* ``per_class``: one adapter for each class, trained on that class alone.  The classes are disjoint, so
  adding, removing or zeroing one example touches one training only, and all of them cost what one costs
  (parallel composition, McSherry 2009).  Replacing an example by one of *another* class touches two.  With
  full batches the joint sum of a step then moves by ``sqrt(2) C``, less than the ``2 C`` of a replacement
  within a class; with Poisson batches the replacement is a removal and an addition.  `dp_sgd.privacy_plan`
  covers both.

Public are the label set, the configuration and the declared number of images.  Losses and clip rates are
functions of the private images, so none is returned or logged.
"""

from __future__ import annotations

import copy
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hyperdp_lib import artefacts, certificate, diffusion
from hyperdp_lib.adapter import Adapter, LoraGeometry, concatenate, lora_geometry
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.baselines.dp_sgd import LossFunction, PrivacyPlan
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.ledger import LedgerEntry

ATTENTION = r".*attn1\.(to_q|to_k|to_v|to_out\.0)"
"""LoRA targets of DP-LoRA: the attention projections."""
ALL_BLOCK_LAYERS = r".*\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)"
"""All linear layers of the transformer blocks, the modulation of the norms included."""


@dataclass(frozen=True)
class DPLoraConfig:
    """Public choices of one training run; tuned on public data by `hyperdp_lib.comparison.tune`.

    Parameters
    ----------
    mode : {"per_class", "shared"}
    r, lora_alpha, target_modules
        As in PEFT's ``LoraConfig``.
    learning_rate : float
        Of AdamW, without weight decay; it falls linearly to a tenth over the run.
    clip_norm : float
        Largest L2 norm of one example's gradient (of the mean squared error over pixels).
    num_steps : int
        Gradient steps, for each adapter.
    expected_batch_size : float
        Examples a step on average, for each adapter; from the declared size on, every step uses all images.
    noise_draws : int
        Draws K of noise and time step over which an example's gradient is averaged before it is clipped.
    ema_decay : float
        Of the average over the iterates that is returned (post-processing); 0 returns the last iterate.
    physical_batch_size : int
        Most rows (images times draws) in one forward pass: memory only, no influence on privacy.
    """

    mode: str = "per_class"
    r: int = 4
    lora_alpha: int = 4
    target_modules: str = ALL_BLOCK_LAYERS
    learning_rate: float = 3e-3
    clip_norm: float = 0.1
    num_steps: int = 40
    expected_batch_size: float = math.inf
    noise_draws: int = 1
    ema_decay: float = 0.9
    physical_batch_size: int = 256

    def __post_init__(self) -> None:
        if self.mode not in ("per_class", "shared"):
            raise InputError(f"mode must be 'per_class' or 'shared', got {self.mode!r}.")
        for name in ("r", "num_steps", "noise_draws", "physical_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("lora_alpha", "learning_rate", "clip_norm", "expected_batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")


@dataclass(frozen=True, eq=False)
class DPLora:
    """Trained adapters, and all that is needed to sample from them.

    Attributes
    ----------
    adapter : Adapter or None
        ``per_class``: T = number of classes.  ``shared``: None, see ``model``.
    model : torch.nn.Module
        ``per_class``: the base model.  ``shared``: base model with the adapter merged and the trained label
        embeddings, a plain diffusers model.
    class_names : tuple of str
    config : DPLoraConfig
    plan : PrivacyPlan
    trained_parameters : int
        Over all adapters.
    noise_dimension : int
        Coordinates noised at a time.
    seconds : float
        Wall-clock training time.
    """

    adapter: Adapter | None
    model: nn.Module
    class_names: tuple[str, ...]
    config: DPLoraConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        classes = len(self.class_names)
        if num_images % classes:
            raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
        labels = torch.arange(classes).repeat_interleave(num_images // classes)
        images = diffusion.sample(
            self.model,
            self.adapter,
            num_images,
            generator=generator,
            num_steps=num_steps,
            batch_size=batch_size,
            class_labels=None if self.adapter is not None else labels.to(_device(self.model)),
        )
        return images, labels


def train_dp_lora(
    private_images: Tensor,
    private_labels: Tensor | None,
    base_model: nn.Module,
    config: DPLoraConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    loss_function: LossFunction | None = None,
    progress: bool = False,
) -> tuple[DPLora, Certificate]:
    """Train LoRA on private images by DP-SGD; with ``epsilon = inf`` by the same loop, not private.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1].
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. len(class_names) - 1``, or ``None`` for one unlabelled class.
    base_model : torch.nn.Module
        Left as it is.
    epsilon, delta, neighboring_relation
        The budget of the whole training, all classes and all steps.
    num_private_declared : int
        Public: the number of images to plan for.  Pass ``len(private_images)`` only if that is public.
    class_names : sequence of str
        The public label set.
    seed : int, optional
        Makes noise and batches reproducible, and the result a demonstration that is NOT PRIVATE.
        ``None`` seeds them from the operating system.
    loss_function : callable, optional
        See `dp_sgd.LossFunction`; by default `hyperdp_lib.diffusion.denoising_loss`.
    progress : bool
        Show a bar of steps (their number is public).

    Returns
    -------
    trained : DPLora
    certificate : Certificate
        For ``epsilon = inf`` it says NOT PRIVATE.
    """
    names = tuple(class_names)
    labels = _check(private_images, private_labels, names)
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    per_class = config.mode == "per_class" or len(names) == 1
    plan = dp_sgd.privacy_plan(
        epsilon,
        delta,
        neighboring_relation,
        expected_batch_size=config.expected_batch_size,
        declared_size=num_private_declared / (len(names) if per_class else 1),
        num_steps=config.num_steps,
    )
    secret = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
    loss_function = loss_function or diffusion.denoising_loss
    started = time.perf_counter()
    if per_class:
        bar = _bar(len(names) * plan.num_steps, progress)
        trainees = []
        for label in range(len(names)):
            trainees.append(lora_model(base_model, config))
            mine = private_images[labels == label]
            _train(trainees[-1], mine, None, config, plan, secret, loss_function, bar.update)
        adapter, model = concatenate([trainee.adapter() for trainee in trainees], names), base_model
    else:
        bar = _bar(plan.num_steps, progress)
        trainees = [lora_model(base_model, config, num_classes=len(names))]
        _train(trainees[0], private_images, labels, config, plan, secret, loss_function, bar.update)
        adapter, model = None, trainees[0].merged()
    bar.close()
    dimension = trainees[0].num_parameters
    trained = DPLora(
        adapter=adapter,
        model=model,
        class_names=names,
        config=config,
        plan=plan,
        trained_parameters=dimension * len(trainees),
        noise_dimension=dimension,
        seconds=time.perf_counter() - started,
    )
    budget: dict[str, Any] = dict(epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation)
    return trained, _certify(trained, base_model, num_private_declared, seeded=seed is not None, **budget)


def _certify(
    trained: DPLora,
    base_model: nn.Module,
    num_private_declared: int,
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: str,
    seeded: bool,
) -> Certificate:
    """One charge for the whole run: under parallel composition all classes together cost what one does."""
    plan = trained.plan
    fields: dict[str, Any] = {}
    if plan.noise_std == 0:
        mechanism, rng = certificate.NO_PRIVACY, certificate.NO_NOISE
        charge = LedgerEntry("other", "LoRA training without noise", math.inf, 0.0)
    else:
        mechanism = certificate.DP_SGD
        rng = certificate.SEEDED_NOISE if seeded else certificate.FLOAT_NOISE
        charge = LedgerEntry(
            "dp_sgd",
            f"DP-SGD LoRA, {trained.config.mode}: {plan.accountant}",
            epsilon,
            delta,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            steps=plan.num_steps,
        )
        clip_norm = trained.config.clip_norm
        fields = dict(
            noise_multiplier=plan.noise_multiplier,
            noise_std=plan.noise_multiplier * (plan.sensitivity * clip_norm),
            clip_norm=clip_norm,
            sensitivity=plan.sensitivity * clip_norm,
            dimension=trained.noise_dimension,
        )
    return certificate.ledger_certificate(
        (charge,),
        delta,
        method="dp_lora" if plan.noise_std > 0 else "lora_non_private",
        mechanism=mechanism,
        neighboring_relation=neighboring_relation,
        rng=rng,
        epsilon=epsilon,
        num_private=num_private_declared,
        class_names=trained.class_names if len(trained.class_names) > 1 else (),
        base_model_sha256=artefacts.tensors_sha256(base_model.state_dict()),
        **fields,
    )


@dataclass(frozen=True, eq=False)
class LoraModel:
    """A copy of the base model with trainable LoRA layers; its base weights are frozen."""

    peft_model: Any
    model: nn.Module
    lora_config: Any
    geometry: LoraGeometry
    parameters: tuple[nn.Parameter, ...]

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, label embeddings included."""
        return sum(p.numel() for p in self.parameters)

    def adapter(self) -> Adapter:
        """The trained adapter as one of ours (T = 1)."""
        layers = dict(self.model.named_modules())

        def factor(name: str, letter: str) -> Tensor:
            return getattr(layers[name], f"lora_{letter}")["default"].weight.detach()[None].clone()

        factors = {name: (factor(name, "A"), factor(name, "B")) for name in self.geometry.names}
        return Adapter(self.lora_config, self.geometry, factors, ("adapter",))

    def merged(self) -> nn.Module:
        """The base model with the adapter merged into its weights."""
        return self.peft_model.merge_and_unload().eval().requires_grad_(False)


def lora_model(base_model: nn.Module, config: DPLoraConfig, *, num_classes: int = 0) -> LoraModel:
    """Copy `base_model`, freeze it and add LoRA layers, ready for per-example gradients.

    With ``num_classes``, label embeddings are resized to that many classes, each starting from the row of
    label 0 (the one the base was trained with), and trained too.

    The copy is in evaluation mode, so that a diffusers DiT drops no labels at random; only the modules that
    own trainable parameters are in training mode, for Opacus' hooks.
    """
    from peft import LoraConfig, get_peft_model

    lora_config = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    geometry = lora_geometry(base_model, lora_config)
    model = copy.deepcopy(base_model).requires_grad_(False)
    if num_classes:
        _resize_label_embeddings(model, num_classes)
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator: public randomness
        torch.manual_seed(0)
        peft_model = get_peft_model(model, copy.deepcopy(lora_config))
    model = peft_model.get_base_model()
    if num_classes:
        for embedding in _label_embeddings(model):
            embedding.embedding_table.requires_grad_(True)
    model.eval()
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
    parameters = tuple(p for p in model.parameters() if p.requires_grad)
    return LoraModel(peft_model, model, lora_config, geometry, parameters)


def _train(
    trainee: LoraModel,
    private_images: Tensor,
    private_labels: Tensor | None,
    config: DPLoraConfig,
    plan: PrivacyPlan,
    secret: torch.Generator,
    loss_function: LossFunction,
    tick: Callable[[], Any],
) -> None:
    """Train in place; afterwards the trainable parameters hold the average of the iterates."""
    device = trainee.parameters[0].device
    adamw = torch.optim.AdamW(
        trainee.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    noise = torch.Generator(device).manual_seed(_draw_seed(secret))
    draws = torch.Generator().manual_seed(_draw_seed(secret))  # `diffusion` draws on the CPU
    if plan.noise_std > 0:
        gradients = dp_sgd.ExampleGradients(trainee.model, loss_function, config.noise_draws)
        step = dp_sgd.noisy_step(gradients, adamw, plan, config.clip_norm, noise=noise, draws=draws)
    else:
        gradients = None
        step = dp_sgd.plain_step(trainee.model, adamw, plan, loss_function, config.noise_draws, draws=draws)
    average = [p.detach().clone() for p in trainee.parameters]
    size = max(1, config.physical_batch_size // config.noise_draws)
    for done, chosen in enumerate(dp_sgd.poisson_batches(len(private_images), plan, secret)):
        for group in adamw.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.9 * done / plan.num_steps)
        parts = chosen.split(size) if len(chosen) else (chosen,)
        step([_batch(private_images, private_labels, part, device) for part in parts])
        decay = min(config.ema_decay, done / (done + 10))  # the starting point counts for nothing
        for mean, p in zip(average, trainee.parameters, strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        tick()
    if gradients is not None:
        gradients.remove()
    with torch.no_grad():
        for p, mean in zip(trainee.parameters, average, strict=True):
            p.copy_(mean)


def _batch(
    private_images: Tensor, private_labels: Tensor | None, part: Tensor, device: torch.device
) -> dp_sgd.Batch:
    labels = None if private_labels is None else private_labels[part].to(device)
    return private_images[part].to(device), labels


def _check(private_images: Tensor, private_labels: Tensor | None, class_names: tuple[str, ...]) -> Tensor:
    if private_images.ndim != 4 or not private_images.is_floating_point():
        shape = tuple(private_images.shape)
        raise InputError(f"private_images must be float (N, C, H, W), got {private_images.dtype} {shape}.")
    if not torch.isfinite(private_images).all():
        raise InputError("private_images contain NaN or infinity: remove those images.")
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


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, disable=None if progress else True, desc="DP-SGD", unit="step")


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _label_embeddings(model: nn.Module) -> list[Any]:
    from diffusers.models.embeddings import LabelEmbedding

    return [module for module in model.modules() if isinstance(module, LabelEmbedding)]


def _resize_label_embeddings(model: Any, num_classes: int) -> None:
    embeddings = _label_embeddings(model)
    if not embeddings:
        raise InputError("mode='shared' needs a base model with label embeddings: use mode='per_class'.")
    for embedding in embeddings:
        old = embedding.embedding_table.weight.detach()
        # diffusers keeps one more row, for dropped labels, where it drops any: keep its layout
        rows = torch.cat([old[:1].repeat(num_classes, 1), old[embedding.num_classes :]])
        embedding.embedding_table = nn.Embedding.from_pretrained(rows)
        embedding.num_classes = num_classes
    model.register_to_config(num_embeds_ada_norm=num_classes)
