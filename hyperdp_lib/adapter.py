"""T LoRA adapters side by side: applied to one batch, written to PEFT folders and read from them.

A LoRA adapter (Hu et al., 2022) adds ``scaling * B (A x)`` to the output ``W x + b`` of chosen layers.
Here an :class:`Adapter` holds T of them, stacked along the first axis of every factor, because a hypernetwork
makes one adapter per public task or per private class, and trains on many tasks at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hyperdp_lib.data import InputError
from hyperdp_lib.lora_geometry import LoraGeometry, LoraModule, lora_geometry
from hyperdp_lib.lora_products import attach

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "Adapter",
    "LoraGeometry",
    "LoraModule",
    "apply_adapters",
    "concatenate",
    "load_adapter",
    "lora_geometry",
    "save_adapter",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
_ALWAYS_WRITTEN = ("peft_type", "task_type", "r", "lora_alpha", "target_modules")

_layers_in_use: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
            a, b = self.factors[module.name]
            for letter, factor, shape in (("A", a, module.a_shape), ("B", b, module.b_shape)):
                expected, found = (len(self.names), *shape), tuple(factor.shape)
                if found != expected:
                    raise InputError(
                        f"LoRA {letter} of {module.name!r} has shape {found}, expected {expected}."
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
            bound = math.prod(module.a_shape[1:]) ** -0.5  # kaiming_uniform_, a = sqrt(5): 1 / sqrt(fan_in)
            a = torch.empty(len(names), *module.a_shape, device=device)
            a.uniform_(-bound, bound, generator=generator)
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
        raise InputError("Only adapters of one geometry (base model and LoraConfig) can be concatenated.")
    factors = {
        name: (
            torch.cat([adapter.factors[name][0] for adapter in adapters]),
            torch.cat([adapter.factors[name][1] for adapter in adapters]),
        )
        for name in first.factors
    }
    if names is None:
        names = [name for adapter in adapters for name in adapter.names]
    return dataclasses.replace(first, factors=factors, names=tuple(names))


@contextmanager
def apply_adapters(base_model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """While inside, every forward of `base_model` uses the T adapters, each on its share of the batch.

    A batch of N = T * M examples must be sorted by adapter: example i uses adapter ``i // M``. Gradients flow
    to the factors, to the input and, where they require it, to the base weights. LoRA products are computed
    in float32 also under autocast. With gradient checkpointing, keep the backward pass inside the ``with``.

    Parameters
    ----------
    base_model : torch.nn.Module
        The model the geometry was read from, or one just like it. It is unchanged afterwards, also after
        errors.
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
        if layer is None or not _fits(module, layer):
            raise InputError(
                f"The adapter is for another base model: layer {module.name!r} is missing or different in "
                f"this {type(base_model).__name__}."
            )
        targets.append((layer, module))
    if any(layer in _layers_in_use for layer, _ in targets):
        raise InputError(
            "Adapters are already applied to this model: leave that `with` first, or concatenate."
        )
    detach = []
    try:
        for layer, module in targets:
            detach.append(attach(layer, module, *adapter.factors[module.name]))
            _layers_in_use.add(layer)
        yield base_model
    finally:
        for layer, _ in targets[: len(detach)]:
            _layers_in_use.discard(layer)
        for undo in detach:
            undo()


def _fits(module: LoraModule, layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return module.kind == "linear" and layer.weight.shape == (module.b_shape[0], module.a_shape[1])
    if isinstance(layer, nn.Conv2d):
        shapes = layer.out_channels, layer.in_channels, *layer.kernel_size
        moves = layer.stride, layer.padding, layer.groups
        return (
            module.kind == "conv2d"
            and shapes == (module.b_shape[0], *module.a_shape[1:])
            and moves == (module.stride, module.padding, module.groups)
        )
    return False


def save_adapter(
    adapter: Adapter, folder: str | Path, *, base_model_name_or_path: str, model_card: str
) -> None:
    """Write ONE adapter as a standard PEFT folder: ``peft.PeftModel.from_pretrained(base, folder)`` loads it.

    PEFT from 0.12.0 on, unless the configuration uses what only a later version knows.

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
        raise InputError(
            f"A PEFT folder holds one adapter, not {adapter.num_adapters}: save each one by itself."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module in adapter.geometry.modules:
        for letter, factor in zip("AB", adapter.factors[module.name], strict=True):
            # The exact key of PEFT's own state dict, without the adapter's name.
            key = f"base_model.model.{module.name}.lora_{letter}.weight"
            tensors[key] = factor.detach()[0].cpu().contiguous()
    # A key that is unknown to it is an error for an older PEFT, so what is as by default is not written.
    config, usual = adapter.lora_config.to_dict(), type(adapter.lora_config)().to_dict()
    config = {key: value for key, value in config.items() if key in _ALWAYS_WRITTEN or value != usual.get(key)}
    config["base_model_name_or_path"] = base_model_name_or_path
    config["inference_mode"] = True
    # PEFT writes sets in hash order, which changes from one process to the next.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt"}  # one entry only: safetensors writes several in random order
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors, metadata))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card, encoding="utf-8")


def load_adapter(folder: str | Path, base_model: nn.Module) -> Adapter:
    """Read a PEFT folder written by :func:`save_adapter` or by PEFT itself, as an `Adapter` with T = 1.

    The adapter is named after the folder.

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
        peft_type = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
        if peft_type != "LORA":
            raise InputError(f"{folder} holds a {peft_type!r} adapter; only LORA can be loaded.")
        lora_config = LoraConfig.from_pretrained(str(folder))
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is damaged or not a PEFT configuration: {error}") from error
    try:
        with safetensors.safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS_FILE} is truncated or damaged: {error}") from error

    try:
        geometry = lora_geometry(base_model, lora_config)
    except InputError:
        raise
    except Exception as error:  # PEFT checks few of its fields, and trips over the others in many ways
        raise InputError(f"{folder / CONFIG_FILE} does not fit this base model ({type(error).__name__})") from error
    wrong_base = f"The adapter in {folder} is for another base model than this {type(base_model).__name__}"
    factors = {}
    for module in geometry.modules:
        pair = []
        for letter, shape in zip("AB", (module.a_shape, module.b_shape), strict=True):
            tensor = tensors.pop(f"base_model.model.{module.name}.lora_{letter}.weight", None)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"{tuple(tensor.shape)} instead of {shape}"
                raise InputError(f"{wrong_base}: LoRA {letter} of {module.name!r} is {found}.")
            pair.append(tensor.to(torch.float32)[None])
        factors[module.name] = (pair[0], pair[1])
    if tensors:
        raise InputError(f"{wrong_base}: it has no layer for {min(tensors)!r}.")
    return Adapter(lora_config, geometry, factors, (folder.resolve().name,))
