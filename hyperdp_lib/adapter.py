"""LoRA adapters: their geometry read from PEFT, many of them applied in one batch, PEFT folders in and out.

A LoRA adapter (Hu et al., 2022) adds ``scaling * B (A x)`` to the output ``W x + b`` of chosen layers. Here an
:class:`Adapter` holds T of them side by side, stacked along the first axis of every factor, because a
hypernetwork makes one adapter per public task or per private class and trains on many tasks at once.

Which layers are adapted is never decided here: :func:`lora_geometry` lets PEFT inject the `LoraConfig` into a
weightless copy of the model and reads the result.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib.data import InputError

if TYPE_CHECKING:  # importing peft takes seconds, so it is imported where it is used
    from peft import LoraConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

# Every other LoraConfig field must keep its default: it would change what the adapter computes in ways that a
# plain pair (A, B) per layer cannot express.
_SUPPORTED_OPTIONS = frozenset(
    "r lora_alpha target_modules exclude_modules use_rslora rank_pattern alpha_pattern layers_to_transform "
    "layers_pattern init_lora_weights inference_mode peft_type peft_version auto_mapping "
    "base_model_name_or_path revision runtime_config".split()
)
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, LoftQ, ...) rewrite them on loading.
_SUPPORTED_INITIALISATIONS = (True, False, "gaussian")

_layers_in_use: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class LoraModule:
    """One adapted layer.

    Attributes
    ----------
    name : str
        Dotted name of the layer in the base model, e.g. ``transformer_blocks.0.attn1.to_q``.
    kind : {"linear", "conv2d"}
    a_shape : tuple of int
        ``(r, in_features)`` or ``(r, in_channels, kernel_height, kernel_width)``.
    b_shape : tuple of int
        ``(out_features, r)`` or ``(out_channels, r / groups, 1, 1)``.
    scaling : float
        What multiplies ``B A x`` in this layer.
    stride, padding, groups
        Of a convolution, as PEFT sets them: A has the base layer's stride and padding and always one group, B the
        base layer's groups.
    """

    name: str
    kind: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scaling: float
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    groups: int = 1

    @property
    def num_parameters(self) -> int:
        """Entries of A and B together."""
        return math.prod(self.a_shape) + math.prod(self.b_shape)


@dataclass(frozen=True)
class LoraGeometry:
    """The layers a `LoraConfig` adapts in one base model, in the model's own order.

    Attributes
    ----------
    modules : tuple of LoraModule
    r : int
        Rank; a layer named in ``rank_pattern`` may have another one, see its ``a_shape[0]``.
    lora_alpha : float
    scaling : float
        ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; each layer's own is in ``modules``.
    """

    modules: tuple[LoraModule, ...]
    r: int
    lora_alpha: float
    scaling: float

    @property
    def num_parameters(self) -> int:
        """Parameters of ONE adapter."""
        return sum(module.num_parameters for module in self.modules)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(module.name for module in self.modules)


def lora_geometry(model: nn.Module, lora_config: LoraConfig) -> LoraGeometry:
    """Read from PEFT which layers of `model` a `LoraConfig` adapts, and with which shapes.

    Parameters
    ----------
    model : torch.nn.Module
        The base model; it is neither changed nor copied (only its structure is).
    lora_config : peft.LoraConfig

    Raises
    ------
    InputError
        If an option has no plain-LoRA meaning (``use_dora``, ``bias != "none"``, dropout, ...), if no layer
        matches, or if a matched layer is neither ``Linear`` nor ``Conv2d``.

    Examples
    --------
    >>> from peft import LoraConfig
    >>> geometry = lora_geometry(torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    >>> geometry.names, geometry.modules[0].a_shape, geometry.modules[0].b_shape, geometry.num_parameters
    (('0',), (2, 6), (5, 2), 22)
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer

    _check_options(lora_config)
    # PEFT rewrites model and config in place, so it gets copies; the copy of the model shares no weights.
    tensors = [*model.parameters(), *model.buffers()]
    weightless: dict[int, Any] = {id(tensor): _weightless(tensor) for tensor in tensors}
    skeleton = copy.deepcopy(model, weightless)
    try:
        with warnings.catch_warnings():
            # PEFT says that grouped convolutions cannot be merged; here nothing is.
            warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
            inject_adapter_in_model(copy.deepcopy(lora_config), skeleton, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(f"PEFT cannot put this LoraConfig on a {type(model).__name__}: {error}") from error

    modules = []
    for name, layer in skeleton.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) not in (Linear, Conv2d):
            kind = type(layer.get_base_layer()).__name__
            raise InputError(f"LoRA target {name!r} is a {kind}; only Linear and Conv2d layers can be adapted.")
        lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
        shapes = dict(
            a_shape=tuple(lora_a.weight.shape),
            b_shape=tuple(lora_b.weight.shape),
            scaling=float(layer.scaling["default"]),
        )
        if isinstance(layer, Linear):
            modules.append(LoraModule(name, "linear", **shapes))  # type: ignore[arg-type]
            continue
        base_layer = layer.get_base_layer()
        if base_layer.dilation != lora_a.dilation or base_layer.padding_mode != "zeros":
            raise InputError(
                f"LoRA target {name!r} has dilation or padding_mode that PEFT does not carry over; do not target it."
            )
        modules.append(
            LoraModule(
                name,
                "conv2d",
                **shapes,  # type: ignore[arg-type]
                stride=lora_a.stride,
                padding=lora_a.padding,
                groups=lora_b.groups,
            )
        )
    root = lora_config.r**0.5 if lora_config.use_rslora else lora_config.r
    return LoraGeometry(tuple(modules), lora_config.r, lora_config.lora_alpha, lora_config.lora_alpha / root)


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _check_options(lora_config: LoraConfig) -> None:
    from peft import LoraConfig

    default = LoraConfig()
    for field in dataclasses.fields(default):
        value = getattr(lora_config, field.name)
        if field.name not in _SUPPORTED_OPTIONS and value != getattr(default, field.name):
            raise InputError(
                f"LoraConfig option {field.name}={value!r} is not supported for generated adapters; leave it at "
                f"{getattr(default, field.name)!r}."
            )
    if lora_config.init_lora_weights not in _SUPPORTED_INITIALISATIONS:
        raise InputError(
            f"LoraConfig option init_lora_weights={lora_config.init_lora_weights!r} is not supported for generated "
            "adapters (it may rewrite the base weights on loading); use True."
        )


@dataclass(frozen=True, eq=False)
class Adapter:
    """T LoRA adapters of one geometry, stacked.

    Attributes
    ----------
    lora_config : peft.LoraConfig
    geometry : LoraGeometry
    factors : mapping of str to (Tensor, Tensor)
        Layer name to A of shape ``(T, *a_shape)`` and B of shape ``(T, *b_shape)``, float32. They may carry
        gradients: :func:`apply_adapters` differentiates through them.
    names : tuple of str
        One per adapter, e.g. class names.

    Raises
    ------
    InputError
        If layers, shapes, T or names do not agree.
    """

    lora_config: LoraConfig
    geometry: LoraGeometry
    factors: Mapping[str, tuple[Tensor, Tensor]]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError(f"Adapter names must be one or more different strings, got {self.names!r}.")
        if set(self.factors) != set(self.geometry.names):
            odd = sorted(set(self.factors) ^ set(self.geometry.names))
            raise InputError(f"Adapter layers differ from the geometry's, first at {odd[0]!r}.")
        for module in self.geometry.modules:
            for letter, factor, shape in zip(
                "AB", self.factors[module.name], (module.a_shape, module.b_shape), strict=True
            ):
                expected = (len(self.names), *shape)
                if tuple(factor.shape) != expected:
                    raise InputError(
                        f"LoRA {letter} of {module.name!r} has shape {tuple(factor.shape)}, expected {expected}."
                    )

    @classmethod
    def no_change(
        cls,
        lora_config: LoraConfig,
        geometry: LoraGeometry,
        *,
        num_adapters: int = 1,
        names: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """Adapters that change nothing yet: B = 0 and A as PEFT draws it (``kaiming_uniform_(a=sqrt(5))``).

        The factors are leaf tensors without ``requires_grad``, on the generator's device.
        """
        names = tuple(names) if names is not None else _default_names(num_adapters)
        device = generator.device if generator is not None else None
        factors = {}
        for module in geometry.modules:
            bound = math.prod(module.a_shape[1:]) ** -0.5  # kaiming_uniform_ with a = sqrt(5): 1 / sqrt(fan_in)
            a = torch.rand(len(names), *module.a_shape, generator=generator, device=device).mul_(2).sub_(1).mul_(bound)
            factors[module.name] = (a, torch.zeros(len(names), *module.b_shape, device=device))
        return cls(lora_config, geometry, factors, names)

    @property
    def num_adapters(self) -> int:
        """T."""
        return len(self.names)

    @property
    def num_parameters(self) -> int:
        """Parameters of all T adapters together."""
        return self.num_adapters * self.geometry.num_parameters

    def __len__(self) -> int:
        return self.num_adapters

    def __getitem__(self, key: int | str) -> Adapter:
        """One of the adapters (T = 1), by position or by name; gradients still flow to the stack."""
        if isinstance(key, str):
            if key not in self.names:
                raise InputError(f"No adapter is named {key!r}; there are {', '.join(self.names)}.")
            key = self.names.index(key)
        if not -len(self) <= key < len(self):
            raise IndexError(f"adapter {key} of {len(self)}")
        key %= len(self)
        factors = {name: (a[key : key + 1], b[key : key + 1]) for name, (a, b) in self.factors.items()}
        return dataclasses.replace(self, factors=factors, names=(self.names[key],))

    def __iter__(self) -> Iterator[Adapter]:
        return (self[index] for index in range(len(self)))

    def parameters(self) -> Iterator[Tensor]:
        """All factors: A then B of every layer, in the geometry's order."""
        for module in self.geometry.modules:
            yield from self.factors[module.name]

    def detach(self) -> Adapter:
        """The same values without gradients."""
        return self._map(lambda factor: factor.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """The same adapters on another device or in another floating-point type."""
        return self._map(lambda factor: factor.to(device=device, dtype=dtype))

    def requires_grad_(self, requires_grad: bool = True) -> Adapter:
        """Switch gradients of leaf factors on or off, in place."""
        for factor in self.parameters():
            factor.requires_grad_(requires_grad)
        return self

    def _map(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        factors = {name: (function(a), function(b)) for name, (a, b) in self.factors.items()}
        return dataclasses.replace(self, factors=factors)


def _default_names(num_adapters: int) -> tuple[str, ...]:
    return ("adapter",) if num_adapters == 1 else tuple(f"adapter_{index}" for index in range(num_adapters))


def concatenate(adapters: Sequence[Adapter], names: Sequence[str] | None = None) -> Adapter:
    """Stack the adapters of several stacks of one geometry, in order.

    Parameters
    ----------
    adapters : sequence of Adapter
    names : sequence of str, optional
        New names, one per resulting adapter; by default the old ones, which must then differ.
    """
    if not adapters:
        raise InputError("There is no adapter to concatenate.")
    first = adapters[0]
    if any(adapter.geometry != first.geometry for adapter in adapters):
        raise InputError("Only adapters of one geometry (same base model and LoraConfig) can be concatenated.")
    factors = {
        name: (
            torch.cat([adapter.factors[name][0] for adapter in adapters]),
            torch.cat([adapter.factors[name][1] for adapter in adapters]),
        )
        for name in first.factors
    }
    joined = tuple(names) if names is not None else tuple(name for adapter in adapters for name in adapter.names)
    return dataclasses.replace(first, factors=factors, names=joined)


@contextmanager
def apply_adapters(base_model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """While inside, every forward of `base_model` uses the T adapters, each on its share of the batch.

    A batch of N = T * M examples must be sorted by adapter: example i uses adapter ``i // M``. Gradients flow to
    the factors, to the input and, where they require it, to the base weights. LoRA products are computed in
    float32 also under autocast. With gradient checkpointing, keep the backward pass inside the ``with`` as well.

    Parameters
    ----------
    base_model : torch.nn.Module
        The model the geometry was read from (or one just like it). It is unchanged afterwards, also after errors.
    adapter : Adapter
        On the model's device.

    Raises
    ------
    InputError
        If the adapter does not fit the model, if adapters are applied to it already, or (in the forward) if
        the batch does not divide into T equal shares.

    Examples
    --------
    >>> from peft import LoraConfig
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> config = LoraConfig(r=2, target_modules=["0"])
    >>> three = Adapter.no_change(config, lora_geometry(model, config), num_adapters=3)
    >>> x = torch.randn(12, 6)                # examples 0-3 use adapter 0, 4-7 adapter 1, 8-11 adapter 2
    >>> with apply_adapters(model, three):
    ...     adapted = model(x)
    >>> torch.equal(adapted, model(x))        # B = 0: no change yet
    True
    """
    layers = dict(base_model.named_modules())
    targets = []
    for module in adapter.geometry.modules:
        layer = layers.get(module.name)
        _check_layer(module, layer, base_model)
        targets.append((layer, module))
    if any(layer in _layers_in_use for layer, _ in targets):
        raise InputError("Adapters are already applied to this model; leave that `with` first (or concatenate them).")
    handles = []
    try:
        for layer, module in targets:
            hook = (_linear_hook if module.kind == "linear" else _conv2d_hook)(module, *adapter.factors[module.name])
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
            _layers_in_use.add(layer)
        yield base_model
    finally:
        for handle in handles:
            handle.remove()
        for layer, _ in targets[: len(handles)]:
            _layers_in_use.discard(layer)


def _check_layer(module: LoraModule, layer: nn.Module | None, base_model: nn.Module) -> None:
    expected = nn.Linear if module.kind == "linear" else nn.Conv2d
    fits = isinstance(layer, expected)
    if fits and module.kind == "linear":
        fits = (layer.out_features, layer.in_features) == (module.b_shape[0], module.a_shape[1])
    elif fits:
        fits = (layer.out_channels, layer.in_channels, layer.kernel_size, layer.stride, layer.groups) == (
            module.b_shape[0],
            module.a_shape[1],
            module.a_shape[2:],
            module.stride,
            module.groups,
        )
    if not fits:
        raise InputError(
            f"The adapter is for another base model: layer {module.name!r} is missing or different in this "
            f"{type(base_model).__name__}."
        )


def _share(num_examples: int, num_adapters: int, name: str) -> int:
    if num_examples % num_adapters:
        raise InputError(
            f"A batch of {num_examples} (at layer {name!r}) does not divide into {num_adapters} equal shares; "
            "give every adapter the same number of examples, sorted by adapter."
        )
    return num_examples // num_adapters


def _float32(x: Tensor):  # type: ignore[no-untyped-def]
    """Autocast switched off, at no cost where it is off already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _linear_hook(module: LoraModule, a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    num_adapters, scaling, name = a.shape[0], module.scaling, module.name
    a_t, b_t = a.transpose(1, 2), b.transpose(1, 2)  # (T, in, r), (T, r, out)

    def add_low_rank(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        _share(x.shape[0], num_adapters, name)
        with _float32(x):
            x = x.reshape(num_adapters, -1, x.shape[-1]).to(a.dtype)
            flat = output.reshape(num_adapters, -1, output.shape[-1]).to(a.dtype)
            if num_adapters == 1:
                result = torch.addmm(flat[0], x[0] @ a_t[0], b_t[0], alpha=scaling)
            else:
                result = torch.baddbmm(flat, torch.bmm(x, a_t), b_t, alpha=scaling)
            return result.view(output.shape).to(output.dtype)

    return add_low_rank


def _conv2d_hook(module: LoraModule, a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    num_adapters, scaling, name = a.shape[0], module.scaling, module.name
    stride, padding, groups = module.stride, module.padding, module.groups
    # The T convolutions are one grouped convolution, with the adapters side by side in the channels.
    weight_a, weight_b = a.flatten(0, 1), b.flatten(0, 1)

    def add_low_rank(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        share = _share(x.shape[0], num_adapters, name)
        with _float32(x):
            x = x.to(a.dtype)
            if num_adapters > 1:
                x = x.unflatten(0, (num_adapters, share)).transpose(0, 1).flatten(1, 2)  # (M, T * in, H, W)
            low_rank = F.conv2d(x, weight_a, None, stride, padding, 1, num_adapters)
            change = F.conv2d(low_rank, weight_b, groups=num_adapters * groups)
            if num_adapters > 1:
                change = change.unflatten(1, (num_adapters, -1)).transpose(0, 1).flatten(0, 1)
            return output.to(a.dtype).add(change, alpha=scaling).to(output.dtype)

    return add_low_rank


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base_model_name_or_path: str, model_card: str
) -> None:
    """Write ONE adapter as a standard PEFT folder, which ``peft.PeftModel.from_pretrained(base, folder)`` loads.

    The folder gets ``adapter_config.json``, ``adapter_model.safetensors`` and ``README.md``; it is made if
    missing, and the same adapter always gives the same bytes.

    Parameters
    ----------
    adapter : Adapter
        With T = 1; index a stack first: ``adapter["3"]``.
    folder : path
    base_model_name_or_path : str
        Recorded in the configuration, for whoever loads the adapter.
    model_card : str
        Text of ``README.md``.
    """
    if adapter.num_adapters != 1:
        raise InputError(f"A PEFT folder holds one adapter, this is a stack of {adapter.num_adapters}: save each one.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module in adapter.geometry.modules:
        for letter, factor in zip("AB", adapter.factors[module.name], strict=True):
            # The exact key of PEFT's own state dict, without the adapter's name.
            key = f"base_model.model.{module.name}.lora_{letter}.weight"
            tensors[key] = factor.detach()[0].cpu().contiguous()
    config = adapter.lora_config.to_dict()
    config["base_model_name_or_path"] = base_model_name_or_path
    config["inference_mode"] = True
    # PEFT writes sets in hash order, which changes from one process to the next.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", "adapter_name": adapter.names[0]}
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors, metadata))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card, encoding="utf-8")


def load_adapter(folder: str | Path, base_model: nn.Module) -> Adapter:
    """Read a PEFT folder written by :func:`save_adapter` or by PEFT itself, as an `Adapter` with T = 1.

    Raises
    ------
    InputError
        If a file is missing or damaged, or if the adapter is for another base model.
    """
    from peft import LoraConfig

    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise InputError(f"No {file} in {folder}: this is not a PEFT adapter folder (safetensors).")
    try:
        lora_config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is damaged or not a PEFT configuration: {error}") from error
    if not isinstance(lora_config, LoraConfig):
        raise InputError(f"{folder} holds a {lora_config.peft_type} adapter, only LORA can be loaded.")
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            name = (file.metadata() or {}).get("adapter_name", folder.name)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS_FILE} is truncated or damaged: {error}") from error

    geometry = lora_geometry(base_model, lora_config)
    wrong_base = f"The adapter in {folder} is for another base model than this {type(base_model).__name__}"
    factors = {}
    for module in geometry.modules:
        pair = []
        for letter, shape in zip("AB", (module.a_shape, module.b_shape), strict=True):
            tensor = tensors.pop(f"base_model.model.{module.name}.lora_{letter}.weight", None)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"{tuple(tensor.shape)}"
                raise InputError(f"{wrong_base}: LoRA {letter} of {module.name!r} is {found}, expected {shape}.")
            pair.append(tensor.to(torch.float32)[None])
        factors[module.name] = (pair[0], pair[1])
    if tensors:
        raise InputError(f"{wrong_base}: it has no layer for {min(tensors)!r}.")
    return Adapter(lora_config, geometry, factors, (name,))
