"""The rival: LoRA adapters trained on the private images by DP-SGD.

DP-LoRA (Tsai et al. 2024, arXiv 2406.01355): adapters of a public diffusion model, trained by DP-SGD, each
image's gradient averaged over several noise draws before it is clipped.  Written from the paper;
`DPLoraConfig.as_published` has its choices: attention projections, ``lora_alpha = r``, the biases of adapted
layers and the class embeddings trained too.

Two ways to use labels, the better of which is the rival:

* ``shared``: one adapter, and label embeddings of the base model resized to the classes and trained too;
* ``per_class``: one adapter for each class, trained on that class alone, at the cost of one
  (`hyperdp_lib.baselines.dp_training`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion
from hyperdp_lib.adapter import Adapter, LoraGeometry, concatenate, lora_geometry
from hyperdp_lib.baselines import dp_training
from hyperdp_lib.baselines.dp_sgd import LossFunction, PrivacyPlan
from hyperdp_lib.baselines.dp_training import TrainConfig
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError

ATTENTION = r".*attn1\.(to_q|to_k|to_v|to_out\.0)"
"""LoRA targets of DP-LoRA: the attention projections."""
ALL_BLOCK_LAYERS = r".*\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm1\.linear)"
"""All linear layers of the transformer blocks, the modulation of the norms included."""


@dataclass(frozen=True)
class DPLoraConfig(TrainConfig):
    """Public choices of one training run; tuned on public data by `hyperdp_lib.experiments.tuning`.

    Parameters
    ----------
    mode : {"per_class", "shared"}
    r, lora_alpha, target_modules
        As in PEFT's ``LoraConfig``.
    train_bias : bool
        Train the biases of the adapted layers too (``bias="lora_only"`` in PEFT).
    """

    mode: str = "per_class"
    r: int = 4
    lora_alpha: int = 4
    target_modules: str = ALL_BLOCK_LAYERS
    train_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("per_class", "shared"):
            raise InputError(f"mode must be 'per_class' or 'shared', got {self.mode!r}.")
        if self.r < 1 or not self.lora_alpha > 0:
            raise InputError(f"r must be at least 1 and lora_alpha positive, got {self.r} and {self.lora_alpha}.")

    @classmethod
    def as_published(cls, *, r: int = 8, **changes: Any) -> DPLoraConfig:
        """What Tsai et al. train, and the middle of their ranges; steps, batch and learning rate are one's own.

        >>> config = DPLoraConfig.as_published(r=16, num_steps=100)
        >>> config.mode, config.lora_alpha, config.train_bias
        ('shared', 16, True)
        """
        published: dict[str, Any] = dict(
            mode="shared", lora_alpha=r, target_modules=ATTENTION, train_bias=True, clip_norm=1e-3, noise_draws=4
        )
        return cls(r=r, **(published | changes))


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
    bias_changes : mapping of str to Tensor
        ``per_class`` with ``train_bias``: layer name to ``(T, out)``, what to add to the layer's bias in each
        class.  Empty otherwise: in ``shared`` mode the biases are those of ``model``.
    """

    adapter: Adapter | None
    model: nn.Module
    class_names: tuple[str, ...]
    config: DPLoraConfig
    plan: PrivacyPlan
    trained_parameters: int
    noise_dimension: int
    seconds: float
    bias_changes: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_releases(self) -> int:
        """Noisy gradients that were released (of each class); 0 without privacy."""
        return self.plan.num_steps if self.plan.noise_std > 0 else 0

    def merged(self, index: int = 0) -> nn.Module:
        """A plain diffusers model of one class, all that was trained merged in: ``save_pretrained`` keeps it.

        In ``shared`` mode one model serves all classes, and ``index`` is not used.
        """
        if self.adapter is None:
            return self.model
        made = lora_model(self.model, self.config)
        made.start_at(self.adapter[index])
        model = made.merged()
        layers = dict(model.named_modules())
        with torch.no_grad():
            for name, changes in self.bias_changes.items():
                layers[name].bias.add_(changes[index])
        return model

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        classes = len(self.class_names)
        if num_images % classes:
            raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
        labels = torch.arange(classes).repeat_interleave(num_images // classes)
        with biases_changed(self.model, self.bias_changes) if self.bias_changes else nullcontext():
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


@contextmanager
def biases_changed(base_model: nn.Module, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """While inside, layers add another change ``(T, out)`` of bias for each of T equal shares of the batch.

    The batch is sorted by class, as `hyperdp_lib.adapter.apply_adapters` has it; the two go together.
    """
    layers = dict(base_model.named_modules())

    def adding(change: Tensor, trailing: int) -> Any:
        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            shares = output.unflatten(0, (len(change), -1))
            between = shares.ndim - 2 - trailing  # the share's images, and tokens where there are some
            shaped = change.view(len(change), *[1] * between, -1, *[1] * trailing)
            return (shares + shaped.to(output)).flatten(0, 1)

        return add

    handles = []
    try:
        for name, change in changes.items():
            trailing = 2 if isinstance(layers[name], nn.Conv2d) else 0  # height and width follow the channels
            handles.append(layers[name].register_forward_hook(adding(change, trailing)))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    check_request(private_images, base_model, names)
    dp_training.check_private(private_images, private_labels, names)
    per_class = config.mode == "per_class" or len(names) == 1
    lora_models: list[LoraModel] = []

    def make_trainee(label: int) -> nn.Module:
        lora_models.append(lora_model(base_model, config, num_classes=0 if per_class else len(names)))
        return lora_models[-1].model

    budget: dict[str, Any] = dict(epsilon=epsilon, delta=delta, neighboring_relation=neighboring_relation)
    run = dp_training.train(
        make_trainee,
        private_images,
        private_labels,
        config,
        num_private_declared=num_private_declared,
        per_class=per_class,
        class_names=names,
        seed=seed,
        loss_function=loss_function,
        progress=progress,
        **budget,
    )
    trained = DPLora(
        adapter=concatenate([made.adapter() for made in lora_models], names) if per_class else None,
        model=base_model if per_class else lora_models[0].merged(),
        class_names=names,
        config=config,
        plan=run.plan,
        trained_parameters=run.trained_parameters,
        noise_dimension=run.noise_dimension,
        seconds=run.seconds,
        bias_changes=bias_changes(base_model, lora_models) if per_class and config.train_bias else {},
    )
    certificate = dp_training.certify(
        run,
        config,
        base_model,
        num_private_declared,
        method="dp_lora" if run.plan.noise_std > 0 else "lora_non_private",
        description=f"DP-SGD LoRA, {config.mode}" if run.plan.noise_std > 0 else "LoRA training",
        class_names=names,
        seeded=seed is not None,
        **budget,
    )
    return trained, certificate


def check_request(private_images: Tensor, base_model: Any, class_names: Sequence[str]) -> None:
    """An `InputError` for what the base model cannot serve; of the images only the shape is looked at."""
    if len(set(class_names)) != len(class_names):
        raise InputError("class_names must all be different.")
    shape = tuple(private_images.shape)
    channels, size = base_model.config.in_channels, base_model.config.sample_size
    if shape[1:] != (channels, size, size):
        raise InputError(
            f"private_images must have shape (N, {channels}, {size}, {size}) for this base model, got {shape}: "
            "let data.load_images resize them."
        )


def bias_changes(base_model: nn.Module, lora_models: Sequence[LoraModel]) -> dict[str, Tensor]:
    """What training did to the biases of adapted layers: layer name to ``(T, out)``."""
    old = dict(base_model.named_modules())
    changes = {}
    for name in lora_models[0].geometry.names:
        trained = [made.base_layer(name).bias for made in lora_models]
        if trained[0] is not None:
            changes[name] = torch.stack([bias.detach() for bias in trained]) - old[name].bias.detach()
    return changes


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
        """Trainable parameters, label embeddings and biases included."""
        return sum(p.numel() for p in self.parameters)

    def adapter(self) -> Adapter:
        """The trained adapter as one of ours (T = 1)."""
        layers = dict(self.model.named_modules())

        def factor(name: str, letter: str) -> Tensor:
            return getattr(layers[name], f"lora_{letter}")["default"].weight.detach()[None].clone()

        factors = {name: (factor(name, "A"), factor(name, "B")) for name in self.geometry.names}
        return Adapter(self.lora_config, self.geometry, factors, ("adapter",))

    def base_layer(self, name: str) -> Any:
        """The layer of the copied base model that PEFT wrapped."""
        return self.model.get_submodule(name).get_base_layer()  # type: ignore[operator]

    def start_at(self, adapter: Adapter) -> None:
        """Set the factors to those of one adapter (T = 1) of the same geometry."""
        if adapter.num_adapters != 1 or adapter.geometry != self.geometry:
            raise InputError("need one adapter for the layers and the rank of this configuration.")
        for name, (a, b) in adapter.factors.items():
            layer: Any = self.model.get_submodule(name)
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a[0])
                layer.lora_B["default"].weight.copy_(b[0])

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
    if config.train_bias:
        _train_biases(model, geometry)
    dp_training.trainable(model)
    parameters = tuple(p for p in model.parameters() if p.requires_grad)
    return LoraModel(peft_model, model, lora_config, geometry, parameters)


def _train_biases(model: nn.Module, geometry: LoraGeometry) -> None:
    wrapped: list[Any] = [model.get_submodule(name) for name in geometry.names]
    biases = [layer.get_base_layer().bias for layer in wrapped]
    if all(bias is None for bias in biases):
        raise InputError("train_bias needs adapted layers with biases: this model's have none.")
    for bias in biases:
        if bias is not None:
            bias.requires_grad_(True)


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
