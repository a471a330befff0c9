"""Direct conditioning: the denoiser reads the noisy sum itself, instead of being adapted by generated LoRA weights.

The rival that asks whether a hypernetwork is needed at all. A small network turns the noisy mean, its noise level and
the noisy count (`hypernetwork.summary`) into what a conditional diffusion transformer is given (Peebles & Xie 2023): a
vector added to the time embedding of each block, which its adaptive layer norm reads, and, since one vector says
little about *where* there is ink, a vector for each patch, added to the embedded image. Both are zero at the start, so
that training starts from the public base model; then all of it is trained on public tasks with simulated noise.

The release is the method's: one noisy sum. Nothing is trained on private images. Unlike an adapter, the result needs
this module to run: it is no stock diffusers model with a PEFT folder beside it.

``python -m hyperdp_lib.baselines.direct_conditioning --out FOLDER`` trains it.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import diffusion
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.baselines import decoders
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.hypernetwork import HyperNetwork, summary
from hyperdp_lib.pretrained import load_pretrained, read_half, resolve, write_half
from hyperdp_lib.public.stages import PRESETS, StageConfig, smoke_preset

STAGE = StageConfig(steps=2000, tasks=64, images=8, learning_rate=1.5e-3, ema=0.998)
DROPPED = 0.1  # share of tasks trained without conditioning, which guidance needs; as `adapter_off` of the method


@dataclass(frozen=True)
class DirectConditioningConfig:
    """Public choices of a release.

    Parameters
    ----------
    guidance : float
        Classifier-free guidance (Ho & Salimans 2022): the velocity is ``without + guidance * (with - without)``
        conditioning. 1 is plain conditional sampling; anything else takes twice the time.
    """

    guidance: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise InputError(f"guidance must be at least 0 and finite, got {self.guidance}.")


@dataclass(frozen=True)
class ConditionerShape:
    """Size of the network from the summary to the conditioning (public): the hypernetwork's own trunk."""

    hidden: int = 256
    num_blocks: int = 2


class Conditioner(nn.Module):
    """From the summary of a noisy sum to what the transformer is told; it says nothing at the start.

    Parameters
    ----------
    dimension : int
        k, the length of a noisy sum.
    num_blocks, num_patches, width : int
        Of the transformer.
    shape : ConditionerShape
    """

    def __init__(self, dimension: int, num_blocks: int, num_patches: int, width: int, shape: ConditionerShape) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(dimension + 1, shape.hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(shape.hidden), nn.Linear(shape.hidden, shape.hidden), nn.GELU(),
                nn.Linear(shape.hidden, shape.hidden),
            )
            for _ in range(shape.num_blocks)
        )  # fmt: skip
        self.norm = nn.LayerNorm(shape.hidden)
        self.per_block = nn.Linear(shape.hidden, num_blocks * width)
        self.per_patch = nn.Linear(shape.hidden, num_patches * width)
        for head in (self.per_block, self.per_patch):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, noisy_sum: Tensor, noise_std: Tensor | float) -> Conditioning:
        """Conditioning of T data sets from noisy sums (T, k) and their noise levels, a number or (T,)."""
        std = torch.as_tensor(noise_std, dtype=noisy_sum.dtype, device=noisy_sum.device).expand(len(noisy_sum))
        h = self.enter(torch.cat(summary(noisy_sum, std), 1))
        for block in self.blocks:
            h = h + block(h)
        h = self.norm(h)
        return Conditioning(*(head(h).unflatten(1, (-1, self.width)) for head in (self.per_block, self.per_patch)))


class ConditionedDenoiser(nn.Module):
    """A diffusion transformer and the network that conditions it on noisy sums.

    Parameters
    ----------
    base_model : torch.nn.Module
        A ``diffusers.DiTTransformer2DModel``; copied.
    dimension : int
        k, the length of a noisy sum.
    shape : ConditionerShape
    """

    def __init__(self, base_model: nn.Module, dimension: int, shape: ConditionerShape | None = None) -> None:
        super().__init__()
        if not all(hasattr(base_model, name) for name in ("pos_embed", "transformer_blocks", "proj_out_1")):
            raise InputError("direct conditioning needs a diffusion transformer (DiTTransformer2DModel) as base model.")
        self.dimension = dimension
        self.shape = shape = ConditionerShape() if shape is None else shape
        self.transformer: Any = copy.deepcopy(base_model).requires_grad_(True)
        config: Any = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        num_patches = (config.sample_size // config.patch_size) ** 2
        self.conditioner = Conditioner(dimension, config.num_layers, num_patches, width, shape)
        self.encoder_sha256: str | None = None  # of the encoder whose sums it was trained on, once it is


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the transformer is told of T data sets: ``per_block`` (T, layers, width), ``per_patch`` (T, patches, width).

    All zeros mean "nothing is known".
    """

    per_block: Tensor
    per_patch: Tensor

    def times(self, share: Tensor) -> Conditioning:
        """Each data set's conditioning times a number (T,); 0 drops it."""
        share = share.to(self.per_block)[:, None, None]
        return Conditioning(self.per_block * share, self.per_patch * share)


class ConditionedModel(nn.Module):
    """The transformer under the conditioning of T data sets, called as the stock model is: class label t is data set t.

    `diffusion.sample` and `diffusion.denoising_loss` therefore work on it as they are.
    """

    def __init__(self, transformer: nn.Module, conditioning: Conditioning, guidance: float = 1.0) -> None:
        super().__init__()
        self.transformer: Any = transformer
        self.conditioning, self.guidance, self.config = conditioning, guidance, self.transformer.config

    def forward(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        """Velocities (N, C, H, W), in ``.sample``, at noisy images (N, C, H, W), times (N,), data sets (N,)."""
        none = torch.zeros_like(class_labels)  # the one label of the unconditional base model
        handles = []
        try:
            told = self.conditioning.per_patch.to(noisy.device)[class_labels]
            handles.append(self.transformer.pos_embed.register_forward_hook(_adds(told)))
            for number, block in enumerate(self.transformer.transformer_blocks):
                told = self.conditioning.per_block[:, number].to(noisy.device)[class_labels]
                # the first block's time embedding also serves the output layer
                handles.append(block.norm1.emb.register_forward_hook(_adds(told)))
            result = self.transformer(noisy, timestep=timestep, class_labels=none)
        finally:
            for handle in handles:
                handle.remove()
        if self.guidance != 1.0:
            without = self.transformer(noisy, timestep=timestep, class_labels=none).sample
            result.sample = without + self.guidance * (result.sample - without)
        return result


def _adds(told: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output + told

    return hook


@dataclass(frozen=True, eq=False)
class DirectlyConditioned:
    """The denoiser under the conditioning of the private classes.

    Attributes
    ----------
    model : ConditionedModel
    noisy_sum : ndarray
        ``(T, k)``, as public as the conditioning made of it.
    class_names : tuple of str
    config : DirectConditioningConfig
    seconds : float
        Wall-clock time of the release.
    trained_parameters, noise_dimension, num_releases : int
        0 (nothing is trained on private images), T k, 1.
    """

    model: ConditionedModel
    noisy_sum: np.ndarray
    class_names: tuple[str, ...]
    config: DirectConditioningConfig
    seconds: float
    trained_parameters: int = 0
    noise_dimension: int = 0
    num_releases: int = 1

    def sample(
        self, num_images: int, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
    ) -> tuple[Tensor, Tensor]:
        """Images ``(num_images, C, H, W)`` in [-1, 1] and their labels, as many of each class, sorted."""
        labels = decoders.shares(num_images, self.class_names)
        drawn = diffusion.sample(
            self.model, None, num_images, generator=generator, num_steps=num_steps, batch_size=batch_size,
            class_labels=labels,
        )  # fmt: skip
        return drawn, labels


@torch.no_grad()
def release_direct_conditioning(
    private_images: Tensor,
    private_labels: Tensor | None,
    hypernetwork: HyperNetwork,
    decoder: ConditionedDenoiser,
    config: DirectConditioningConfig,
    *,
    epsilon: float,
    num_private_declared: int,
    delta: float = 1e-5,
    neighboring_relation: str = "add_or_remove_one",
    class_names: Sequence[str] = ("adapter",),
    seed: int | None = None,
    progress: bool = False,
) -> tuple[DirectlyConditioned, Certificate]:
    """One noisy sum of the private images' embeddings, and the denoiser conditioned on it.

    Arguments and errors are those of `decoders.release_noisy_sum`; ``decoder`` is public, see
    `load_direct_conditioning`; nothing takes long enough for ``progress``.
    """
    decoders.check_encoder(hypernetwork, decoder.dimension, decoder.encoder_sha256)
    started = time.perf_counter()
    noisy_sum, noise_std, statement = decoders.release_noisy_sum(
        private_images,
        private_labels,
        hypernetwork,
        method="direct_conditioning",
        epsilon=epsilon,
        num_private_declared=num_private_declared,
        delta=delta,
        neighboring_relation=neighboring_relation,
        class_names=class_names,
        seed=seed,
        hypernetwork_sha256=tensors_sha256(decoder.conditioner.state_dict()),
        base_model_sha256=tensors_sha256(decoder.transformer.state_dict()),
    )
    device = next(decoder.parameters()).device
    told = decoder.conditioner(torch.from_numpy(noisy_sum).to(device, torch.float32), noise_std)
    model = ConditionedModel(decoder.transformer, told, config.guidance)
    made = DirectlyConditioned(
        model, noisy_sum, tuple(class_names), config, time.perf_counter() - started, noise_dimension=noisy_sum.size
    )
    return made, statement


def load_direct_conditioning(
    name_or_path: str | Path = "glyphs-conditioned", device: str = "cpu"
) -> ConditionedDenoiser:
    """The trained decoder, frozen, float32, in evaluation mode; shipped by name, or from a folder."""
    folder = resolve(name_or_path, "conditioner.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.get("decoder") != "direct_conditioning":
        raise InputError(f"{str(name_or_path)!r} holds no direct conditioning: give a folder this module made.")
    state = read_half(folder / "conditioner.safetensors")
    dimension = state["enter.weight"].shape[1] - 1
    base_model = diffusion.load_base_model(folder / "base")
    decoder = ConditionedDenoiser(base_model, dimension, ConditionerShape(**manifest["shape"]))
    decoder.conditioner.load_state_dict(state)
    decoder.encoder_sha256 = manifest["encoder_sha256"]
    return decoder.to(device).eval().requires_grad_(False)


def task_loss(decoder: ConditionedDenoiser, dropped: float = 0.0) -> decoders.TaskLoss:
    """Denoising loss of query images under their own task's conditioning, which a share of tasks goes without."""

    def loss(queries: Tensor, noisy_sums: Tensor, noise_std: Tensor, g: torch.Generator) -> Tensor:
        told = decoder.conditioner(noisy_sums, noise_std)
        if dropped:
            told = told.times(torch.rand(len(queries), generator=g) >= dropped)
        owner = torch.arange(len(queries)).repeat_interleave(queries.shape[1])
        model = ConditionedModel(decoder.transformer, told)
        return diffusion.denoising_loss(model, queries.flatten(0, 1), g, labels=owner).mean()

    return loss


def train_direct_conditioning(out: Path, *, smoke: bool = False, stage: StageConfig = STAGE) -> Path:
    """Public training from the shipped base model; resumes; writes weights, manifest and card to ``out``."""
    preset = smoke_preset() if smoke else PRESETS["glyphs"]
    stage = preset.joint_stage if smoke else stage
    base_model, hypernetwork = load_pretrained("glyphs")
    torch.manual_seed(preset.seed + 5)
    decoder = ConditionedDenoiser(base_model, hypernetwork.encoder.config.dimension)
    source = preset.public_data.tasks()
    held_out = decoders.HeldOut.draw(preset, hypernetwork.encoder, preset.public_data.tasks("held_out"))
    loop = decoders.train_decoder(
        "direct_conditioning",
        [(decoder.transformer, 0.5), (decoder.conditioner, 1.0)],
        task_loss(decoder, DROPPED),
        hypernetwork.encoder,
        source,
        out / "checkpoints",
        stage=stage,
        preset=preset,
        held_out=held_out,
        check_loss=task_loss(decoder),
    )
    halved: Any = copy.deepcopy(decoder.transformer).half()
    halved.register_to_config(_name_or_path="hyperdp_lib/weights/glyphs/base")  # not where it lay on this machine
    halved.save_pretrained(out / "base")
    write_half(out / "conditioner.safetensors", decoder.conditioner.state_dict())
    decoders.write_manifest(
        out,
        loop,
        name="glyphs-conditioned",
        module="direct_conditioning",
        title="Direct conditioning",
        idea="A diffusion transformer conditioned on the noisy sum of embeddings itself: no LoRA, no hypernetwork",
        shape=decoder.shape,
        public_data=source.describe(),
        references=held_out.references(base_model, hypernetwork),
        hashes={
            "encoder_sha256": tensors_sha256(hypernetwork.encoder.state_dict()),
            "started_from_sha256": tensors_sha256(base_model.state_dict()),
        },
    )
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on training, the decoder."""
    return decoders.command("direct_conditioning", train_direct_conditioning, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
