"""The low-rank products of T adapters on one batch, attached to the layers they adapt.

A batch of N = T * M examples is sorted by adapter. For a Linear layer two batched matrix products do all T
adapters at once, fused with the layer's own where types allow; a Conv2d gets a forward hook, see
:func:`conv2d_hook`. ``benchmarks/adapter_speed.py`` times them against the plain model, and the loop over
adapters is their oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hyperdp_lib.data import InputError
from hyperdp_lib.lora_geometry import LoraModule

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def _share(num_examples: int, num_adapters: int, name: str) -> int:
    if num_examples % num_adapters:
        raise InputError(
            f"A batch of {num_examples} (at layer {name!r}) does not divide into {num_adapters} equal "
            "shares; give every adapter the same number of examples, sorted by adapter."
        )
    return num_examples // num_adapters


def _float32(x: Tensor) -> AbstractContextManager:
    """Autocast switched off, at no cost where it is off already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _add_product(output: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``output + left @ right`` for matrices or stacks of them, the product in its own (float32) type."""
    if output.dtype != left.dtype:
        return output + (left @ right).to(output.dtype)
    return torch.addmm(output, left, right) if left.dim() == 2 else torch.baddbmm(output, left, right)


def attach(layer: nn.Module, module: LoraModule, a: Tensor, b: Tensor) -> Callable[[], None]:
    """Make every forward of `layer` add the adapters' change; returns what undoes it.

    Parameters
    ----------
    layer : torch.nn.Linear or torch.nn.Conv2d
    module : LoraModule
        Its geometry.
    a, b : Tensor
        Of shapes ``(T, *module.a_shape)`` and ``(T, *module.b_shape)``.
    """
    # A subclass or an instance with a forward of its own computes something else than the fused product.
    if isinstance(layer, nn.Linear) and getattr(layer.forward, "__func__", None) is nn.Linear.forward:
        setattr(layer, "forward", _linear_forward(layer, module, a, b))  # noqa: B010 (mypy forbids the plain form)
        return lambda: delattr(layer, "forward")
    hook = (linear_hook if module.kind == "linear" else conv2d_hook)(module, a, b)
    return layer.register_forward_hook(hook, with_kwargs=True).remove


def _linear_forward(layer: nn.Linear, module: LoraModule, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    num_adapters, name = a.shape[0], module.name
    add_low_rank = linear_hook(module, a, b)

    def forward(input: Tensor) -> Tensor:  # the name of nn.Linear's own argument
        one_type = input.dtype == layer.weight.dtype == a.dtype
        if not one_type or torch.is_autocast_enabled(input.device.type):
            return add_low_rank(layer, (input,), {}, F.linear(input, layer.weight, layer.bias))
        _share(input.shape[0], num_adapters, name)
        factors = a, (b.mT * module.scaling).contiguous()
        if num_adapters == 1:  # plain matrix products are faster than stacks of one
            factors = a[0], factors[1][0]
        return _FusedLinear.apply(input, layer.weight, layer.bias, *factors)

    return forward


class _FusedLinear(torch.autograd.Function):
    """``x W^T + bias + x A^T B``, adding the low-rank products in place, forward and backward.

    With few rows r what costs is memory traffic: a hook makes one more pass over the output and one over the
    gradient of the input. For the same reason every intermediate is kept as (r, rows), long side contiguous,
    which makes the skinny products two to four times faster on a CPU than (rows, r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        # a: (T, r, in) and b: (T, r, out), or both without T
        flat = x.reshape(-1, x.shape[-1])
        output = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        rows = flat.view(*a.shape[:-2], -1, a.shape[-1])
        low_rank = a @ rows.mT
        _add_product_(output.view(*b.shape[:-2], -1, b.shape[-1]), low_rank.mT, b)
        ctx.save_for_backward(rows, weight, a, b, low_rank)
        ctx.input_shape = x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, low_rank = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        stacked = flat.view(*b.shape[:-2], -1, b.shape[-1])
        of_low_rank = b @ stacked.mT
        of_x = None
        if for_x:
            of_x = flat @ weight
            _add_product_(of_x.view(*a.shape[:-2], -1, a.shape[-1]), of_low_rank.mT, a)
            of_x = of_x.view(ctx.input_shape)
        return (
            of_x,
            flat.t() @ rows.reshape(-1, rows.shape[-1]) if for_weight else None,
            flat.sum(0) if for_bias else None,
            of_low_rank @ rows if for_a else None,
            low_rank @ stacked if for_b else None,
        )


def _add_product_(output: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dim() == 2:
        output.addmm_(left, right)
    else:
        output.baddbmm_(left, right)


def linear_hook(module: LoraModule, a: Tensor, b: Tensor) -> Hook:
    num_adapters, name = a.shape[0], module.name
    rows = (-1,) if num_adapters == 1 else (num_adapters, -1)  # plain matrix products have a faster backward

    def add_low_rank(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = args[0] if args else kwargs["input"]
        _share(x.shape[0], num_adapters, name)
        with _float32(x):
            # made anew in each forward, so that each has a graph of its own; (T, in, r) and (T, r, out)
            a_t, b_t = a.transpose(1, 2), b.transpose(1, 2) * module.scaling
            if num_adapters == 1:
                a_t, b_t = a_t[0], b_t[0]
            x = x.reshape(*rows, x.shape[-1]).to(a.dtype)
            return _add_product(output.reshape(*rows, output.shape[-1]), x @ a_t, b_t).view(output.shape)

    return add_low_rank


def conv2d_hook(module: LoraModule, a: Tensor, b: Tensor) -> Hook:
    """A kernel_height x kernel_width convolution to few channels r, one kernel per adapter.

    It is computed the other way round: first every tap's 1x1 product (one batched matrix product to
    r * kernel_height * kernel_width channels), then the shifted sum over the taps (``fold``). As r is small
    this costs a fraction of the grouped convolution with T groups, or of unfolding the input. With a stride
    the outputs in between are computed and dropped, which is still the faster way.
    """
    num_adapters, rank, in_channels, kernel_height, kernel_width = a.shape
    name, groups, (stride_y, stride_x) = module.name, module.groups, module.stride
    taps = kernel_height * kernel_width
    fold_padding, input_padding = _fold_padding(module)

    def add_low_rank(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = args[0] if args else kwargs["input"]
        share = _share(x.shape[0], num_adapters, name)
        with _float32(x):
            # fold adds tap (i, j) at +(i, j), a convolution reads it from there: hence the flip
            taps_of_a = a.flip(3, 4).permute(0, 1, 3, 4, 2).reshape(num_adapters, rank * taps, in_channels)
            groups_of_b = b.reshape(num_adapters, groups, -1, rank // groups) * module.scaling
            x = (F.pad(x, input_padding) if input_padding else x).to(a.dtype)
            if taps == 1:
                x = x[:, :, ::stride_y, ::stride_x]
            num_images, _, height, width = x.shape
            if _is_channels_last(x):  # adapters' pixels are one after the other: no copies
                pixels = x.permute(0, 2, 3, 1).reshape(num_adapters, -1, in_channels)
                low_rank = (pixels @ taps_of_a.transpose(1, 2)).view(num_images, height * width, -1)
                low_rank = low_rank.transpose(1, 2)
            else:
                low_rank = _repeat(taps_of_a, share) @ x.flatten(2)  # (N, r * taps, H * W)
            if taps > 1:
                size = (
                    height + kernel_height - 1 - 2 * fold_padding[0],
                    width + kernel_width - 1 - 2 * fold_padding[1],
                )
                low_rank = F.fold(low_rank, size, (kernel_height, kernel_width), padding=fold_padding)
                low_rank = low_rank[:, :, ::stride_y, ::stride_x]
            if groups == 1 and _is_channels_last(output):
                pixels = (
                    low_rank.reshape(num_images, rank, -1).transpose(1, 2).reshape(num_adapters, -1, rank)
                )
                flat = output.permute(0, 2, 3, 1).reshape(num_adapters, -1, output.shape[1])
                result = _add_product(flat, pixels, groups_of_b[:, 0].transpose(1, 2))
                return result.view(num_images, *output.shape[2:], -1).permute(0, 3, 1, 2)
            low_rank = low_rank.reshape(num_images * groups, rank // groups, -1)
            flat = output.reshape(num_images * groups, output.shape[1] // groups, -1)
            return _add_product(flat, _repeat(groups_of_b, share).flatten(0, 1), low_rank).view(output.shape)

    return add_low_rank


def _repeat(stack: Tensor, share: int) -> Tensor:
    """(T, ...) -> (T * share, ...): each adapter's own for each of its examples; a view if T = 1."""
    return stack.unsqueeze(1).expand(-1, share, *stack.shape[1:]).flatten(0, 1)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _fold_padding(module: LoraModule) -> tuple[tuple[int, int], list[int]]:
    """The ``fold`` padding that stands for a convolution's, and what must be padded onto the input before.

    Folding H positions with padding p gives H + k - 1 - 2 p outputs, a convolution H - k + 1 + 2 padding. So
    p = k - 1 - padding, unless the padding is uneven ("same" with an even kernel) or wider than the kernel.
    """
    kernel = module.a_shape[2:]
    if module.padding == "same":
        before_after = [((k - 1) // 2, k // 2) for k in kernel]
    elif module.padding == "valid":
        before_after = [(0, 0) for _ in kernel]
    else:
        before_after = [(int(p), int(p)) for p in module.padding]
    if all(before == after < k for (before, after), k in zip(before_after, kernel, strict=True)):
        height, width = (k - 1 - before for (before, _), k in zip(before_after, kernel, strict=True))
        return (height, width), []
    return (kernel[0] - 1, kernel[1] - 1), [*before_after[1], *before_after[0]]
