"""Which layers a PEFT `LoraConfig` adapts, and with which shapes: asked of PEFT itself, never decided here.

PEFT injects the configuration into a weightless copy of the model, and the result is read back, so that an
adapter generated here and the folder PEFT loads later cannot disagree.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hyperdp_lib.data import InputError

if TYPE_CHECKING:  # importing peft takes seconds, so it is imported where it is used
    from peft import LoraConfig

# Every other LoraConfig field must keep its default: it would change what the adapter computes in ways that a
# plain pair (A, B) per layer cannot express.
_SUPPORTED_OPTIONS = frozenset(
    "r lora_alpha target_modules exclude_modules use_rslora rank_pattern alpha_pattern layers_to_transform "
    "layers_pattern init_lora_weights inference_mode peft_type peft_version auto_mapping "
    "base_model_name_or_path revision runtime_config".split()
)
# Initialisations that leave the base weights alone; PiSSA, OLoRA, LoftQ, ... rewrite them on loading.
_SUPPORTED_INITIALISATIONS = (True, False, "gaussian")


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
        Of a convolution, as PEFT sets them: A has the base layer's stride and padding and always one group,
        B has the base layer's groups.
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
        ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``; ``modules`` has each layer's own.
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
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    >>> geometry = lora_geometry(model, LoraConfig(r=2, target_modules=["0"]))
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
    layer: Any
    for name, layer in skeleton.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base_layer: Any = layer.get_base_layer()
        lora_a: Any = layer.lora_A["default"] if "default" in layer.lora_A else None
        lora_b: Any = layer.lora_B["default"] if "default" in layer.lora_B else None
        if type(layer) not in (Linear, Conv2d):
            kind = type(base_layer).__name__
            raise InputError(f"LoRA target {name!r} is a {kind}; only Linear and Conv2d can be adapted.")
        a_shape, b_shape = tuple(lora_a.weight.shape), tuple(lora_b.weight.shape)
        scaling = float(layer.scaling["default"])
        if isinstance(layer, Linear):
            modules.append(LoraModule(name, "linear", a_shape, b_shape, scaling))
            continue
        if base_layer.dilation != lora_a.dilation or base_layer.padding_mode != "zeros":
            raise InputError(
                f"LoRA target {name!r} has a dilation or padding mode that PEFT does not carry over to the "
                "adapter; do not target it."
            )
        modules.append(
            LoraModule(
                name, "conv2d", a_shape, b_shape, scaling, lora_a.stride, lora_a.padding, lora_b.groups
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
                f"LoraConfig option {field.name}={value!r} is not supported for generated adapters; "
                f"leave it at {getattr(default, field.name)!r}."
            )
    if lora_config.init_lora_weights not in _SUPPORTED_INITIALISATIONS:
        raise InputError(
            f"LoraConfig option init_lora_weights={lora_config.init_lora_weights!r} is not supported for "
            "generated adapters (it may rewrite the base weights on loading); use True."
        )
