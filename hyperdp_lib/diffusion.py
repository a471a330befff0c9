"""The base denoiser: a stock diffusers transformer, its loss, and sampling.

Flow matching (Lipman et al. 2023; Liu et al. 2023): x_sigma = (1 - sigma) x + sigma noise for sigma in (0, 1); the
network sees x_sigma and the time 1000 sigma and predicts the velocity noise - x. That is exactly what diffusers'
``FlowMatchEulerDiscreteScheduler`` integrates, so a base model and a PEFT adapter written by this library are sampled
by diffusers and PEFT alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib.adapter import Adapter, apply_adapters, concatenate
from hyperdp_lib.progress import progress_bar


@dataclass(frozen=True)
class BaseModelConfig:
    """Shape of the base model, a ``diffusers.DiTTransformer2DModel`` (public)."""

    image_size: int = 16
    channels: int = 1
    patch_size: int = 4
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4


def build_base_model(config: BaseModelConfig) -> nn.Module:
    """A fresh DiT with one class label (0): unconditional.

    >>> model = build_base_model(BaseModelConfig(width=32, num_layers=1))
    >>> predict(model, torch.zeros(2, 1, 16, 16), torch.tensor([0.1, 0.9])).shape
    torch.Size([2, 1, 16, 16])
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        in_channels=config.channels,
        out_channels=config.channels,
        num_layers=config.num_layers,
        sample_size=config.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=1,
        norm_num_groups=1,
    )
    return use_plain_attention(model).eval()


def load_base_model(folder) -> nn.Module:
    """Read a base model saved by ``save_pretrained``; float32, evaluation mode, frozen."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(folder, local_files_only=True).float()
    return use_plain_attention(model).eval().requires_grad_(False)


def use_plain_attention(model: nn.Module) -> nn.Module:
    """Write attention as plain matrix products: on a CPU the fused kernel's backward is several times slower."""
    from diffusers.models.attention_processor import AttnProcessor

    blocks: Any = model.transformer_blocks
    for block in blocks:
        block.attn1.set_processor(AttnProcessor())
    return model


def predict(base_model: nn.Module, noisy: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    """Velocity (N, C, H, W) at noisy images (N, C, H, W) and noise levels sigma (N,); label 0 unless given."""
    if labels is None:
        labels = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
    return base_model(noisy, timestep=sigma * 1000, class_labels=labels).sample


def denoising_loss(
    base_model: nn.Module,
    images: Tensor,
    generator: torch.Generator | None = None,
    noise_draws: int = 1,
    labels: Tensor | None = None,
) -> Tensor:
    """Flow-matching loss of each image, (N,): mean squared error over pixels and over ``noise_draws`` draws.

    sigma is logit-normal(0, 1) (Esser et al. 2024), which spends most of the effort in the middle.
    """
    n = len(images)
    repeated = images.repeat_interleave(noise_draws, 0)
    labels = None if labels is None else labels.repeat_interleave(noise_draws, 0)
    sigma = torch.sigmoid(torch.randn(len(repeated), generator=generator)).to(images.device)
    noise = torch.randn(repeated.shape, generator=generator).to(images.device)
    s = sigma.view(-1, 1, 1, 1)
    velocity = predict(base_model, (1 - s) * repeated + s * noise, sigma, labels)
    return (velocity - (noise - repeated)).square().flatten(1).mean(1).view(n, noise_draws).mean(1)


@torch.no_grad()
def sample(
    base_model: nn.Module,
    adapter: Adapter | None,
    num_images: int,
    *,
    generator: torch.Generator,
    num_steps: int = 20,
    batch_size: int = 500,
    class_labels: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """Sample images (N, C, H, W) in [-1, 1].

    With an adapter of T members (one a class) N must be a multiple of T; the images come sorted by member, N / T each.
    ``class_labels`` (N,) is for base models with class embeddings.

    Raises
    ------
    ValueError
        if N is not a positive multiple of T.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    members = 1 if adapter is None else adapter.num_adapters
    if num_images < 1 or num_images % members:
        raise ValueError(
            f"num_images must be a positive multiple of the {members} adapters, not {num_images}"
        )
    share = num_images // members
    per_batch = max(1, batch_size // members)
    config: Any = base_model.config
    device = next(base_model.parameters()).device
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(members, share, *shape, generator=generator)
    labels = None if class_labels is None else class_labels.view(members, share)
    batches = []
    starts = range(0, share, per_batch)
    base_model.eval()
    with progress_bar(total=len(starts) * num_steps, desc="sampling", show=progress) as bar:
        for start in starts:
            x = noise[:, start : start + per_batch].to(device)
            size = x.shape[1]
            x = x.flatten(0, 1)
            y = None if labels is None else labels[:, start : start + per_batch].flatten().to(device)
            scheduler = FlowMatchEulerDiscreteScheduler()
            scheduler.set_timesteps(num_steps, device=device)
            with nullcontext() if adapter is None else apply_adapters(base_model, adapter.to(device)):
                for t in scheduler.timesteps:
                    velocity = predict(base_model, x, (t / 1000).expand(len(x)), y)
                    x = scheduler.step(velocity, t, x, return_dict=False)[0]
                    bar.update()
            batches.append(x.view(members, size, *shape).cpu())
    return torch.cat(batches, 1).flatten(0, 1).clamp(-1, 1)


def sample_classes(
    base_model: nn.Module,
    adapter: Adapter,
    num_classes: int,
    per_class: int | Sequence[int],
    *,
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """Images of every class in turn, (num_classes * per_class, C, H, W), sorted by class.

    ``per_class`` may be one number for each class, 0 among them. An adapter has one member a class, or the same number
    of members for each, which then share the class's images equally. ``options`` are `sample`'s.
    """
    parts = adapter.num_adapters // num_classes
    if not isinstance(per_class, int):
        if len(set(per_class)) > 1:
            members = [
                concatenate([adapter[i] for i in range(start, start + parts)])
                for start in range(0, adapter.num_adapters, parts)
            ]
            drawn = [
                sample_classes(base_model, member, 1, count, generator=generator, **options)
                for member, count in zip(members, per_class, strict=True)
                if count
            ]
            return torch.cat(drawn)
        per_class = per_class[0]
    each = -(-per_class // parts)
    images = sample(base_model, adapter, adapter.num_adapters * each, generator=generator, **options)
    if per_class % parts == 0:
        return images
    kept = torch.stack([torch.randperm(parts * each, generator=generator)[:per_class] for _ in range(num_classes)])
    return images.unflatten(0, (num_classes, -1))[torch.arange(num_classes)[:, None], kept].flatten(0, 1)
