"""Latent diffusion on public data: a KL autoencoder, a denoiser of its latents, and their training.

Rombach et al. 2022 (arXiv 2112.10752) at the size of a character. The autoencoder makes 4 x 4 latents of 8 channels
of 16 x 16 images, half as many numbers. The denoiser is of the kind and size of the library's base model
(`hyperdp_lib.diffusion`) and has its loss, flow matching, so that what is compared is where one tunes.

The denoiser is conditioned on *pseudo-labels* while it is trained on public tasks: which of ``pseudo_labels`` clusters
the task's mean latent belongs to or, for a fifth of the tasks, none. So there is a conditioner that steers what is
drawn, as in DP-LDM, whose public data are labelled; and the row of "none", an unconditional model, is where
the row of each private class can start.

No private data is read in training. `encode` is also applied to private images, by `hyperdp_lib.baselines.dp_ldm`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdp_lib import artefacts, diffusion, pretrained
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.embedding import CHUNK, fair_size, in_batches
from hyperdp_lib.public.stages import PRESETS as TRAINING_PRESETS
from hyperdp_lib.public.stages import Loop, StageConfig, stream


@dataclass(frozen=True)
class LatentPreset:
    """Everything that decides the public latent models (public).

    Parameters
    ----------
    channels : tuple of int
        Widths of the autoencoder's levels; each but the first halves the image.
    latent_channels : int
    kl_weight : float
        Of the Kullback-Leibler term, per latent coordinate, against the squared error per pixel.
    width, num_layers, num_heads : int
        Of the denoiser, a transformer whose tokens are the latent's pixels.
    pseudo_labels : int
        Clusters of public tasks the denoiser is conditioned on.
    unlabelled : float
        Share of public tasks shown without their pseudo-label.
    """

    image_size: int = 16
    image_channels: int = 1
    channels: tuple[int, ...] = (24, 32, 48)
    latent_channels: int = 8
    kl_weight: float = 1e-3
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    pseudo_labels: int = 256
    unlabelled: float = 0.2
    cluster_tasks: int = 4000
    autoencoder_stage: StageConfig = StageConfig(2000, 32, 2, 2e-3)
    denoiser_stage: StageConfig = StageConfig(2000, 32, 8, 1.5e-3)
    seed: int = 0


SMOKE = LatentPreset(
    channels=(8, 8, 8),
    latent_channels=4,
    width=32,
    num_layers=1,
    num_heads=2,
    pseudo_labels=4,
    cluster_tasks=16,
    autoencoder_stage=StageConfig(6, 8, 2, 1e-3, 0.9),
    denoiser_stage=StageConfig(6, 8, 4, 1e-3, 0.9),
)


PRESETS = {
    "glyphs": LatentPreset(),
    "drawings": LatentPreset(),
    "photographs": LatentPreset(image_channels=3),
}
"""By the name of the weights beside which they stand, and whose public data they are trained on."""


def build_autoencoder(preset: LatentPreset) -> nn.Module:
    """A fresh diffusers ``AutoencoderKL``; GroupNorm only, so no image influences the latent of another."""
    from diffusers import AutoencoderKL

    levels = len(preset.channels)
    return AutoencoderKL(
        in_channels=preset.image_channels,
        out_channels=preset.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=preset.channels,
        layers_per_block=1,
        latent_channels=preset.latent_channels,
        norm_num_groups=8,
        sample_size=preset.image_size,
        mid_block_add_attention=False,
    ).eval()


def build_denoiser(preset: LatentPreset) -> nn.Module:
    """A fresh diffusers ``DiTTransformer2DModel`` on latents; label ``pseudo_labels`` means none."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=preset.num_heads,
        attention_head_dim=preset.width // preset.num_heads,
        in_channels=preset.latent_channels,
        out_channels=preset.latent_channels,
        num_layers=preset.num_layers,
        sample_size=preset.image_size // 2 ** (len(preset.channels) - 1),
        patch_size=1,
        num_embeds_ada_norm=preset.pseudo_labels,
        norm_num_groups=1,
    )
    # evaluation mode also in training: every block of diffusers' DiT would drop labels at random by itself
    return diffusion.use_plain_attention(model).eval()


@torch.no_grad()
def encode(autoencoder: Any, private_images: Tensor, scale: float) -> Tensor:
    """Latents (N, C', H', W') of images (N, C, H, W) in [-1, 1]: posterior means times a public scale; on the CPU.

    An image's latent depends on that image alone, to the last bit: `hyperdp_lib.embedding` sees to the batches.
    """
    device = next(autoencoder.parameters()).device

    def means(private_chunk: Tensor) -> Tensor:
        return autoencoder.encode(private_chunk.to(device)).latent_dist.mean.cpu() * scale

    return in_batches(means, private_images, size=fair_size(means, private_images.shape[1:]))


@torch.no_grad()
def decode(autoencoder: Any, latents: Tensor, scale: float) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], on the CPU, of latents as `encode` makes them."""
    device = next(autoencoder.parameters()).device
    parts = [autoencoder.decode(part.to(device) / scale).sample.cpu() for part in latents.split(CHUNK)]
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def sample_latents(
    denoiser: Any, classes: Tensor, *, generator: torch.Generator, num_steps: int = 20, batch_size: int = 500
) -> Tensor:
    """Latents (N, C', H', W'), one for each label in ``classes`` (N,), by diffusers' flow-matching Euler steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config, device = denoiser.config, next(denoiser.parameters()).device
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(len(classes), *shape, generator=generator)
    parts = []
    for x, y in zip(noise.split(batch_size), classes.split(batch_size), strict=True):
        x, y = x.to(device), y.to(device)
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(num_steps, device=device)
        for t in scheduler.timesteps:
            velocity = diffusion.predict(denoiser, x, (t / 1000).expand(len(x)), y)
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        parts.append(x.cpu())
    return torch.cat(parts)


def load_latent_models(
    name_or_path: str | Path = "glyphs-latent", device: str = "cpu"
) -> tuple[nn.Module, nn.Module, float]:
    """Autoencoder, denoiser and scale of the latents; frozen, float32, in evaluation mode.

    >>> autoencoder, denoiser, scale = load_latent_models("glyphs-latent")  # doctest: +SKIP
    """
    from diffusers import AutoencoderKL

    for folder in (pretrained.WEIGHTS / str(name_or_path), Path(name_or_path)):
        if (folder / "autoencoder").is_dir() and (folder / "denoiser").is_dir():
            autoencoder: Any = AutoencoderKL.from_pretrained(folder / "autoencoder", local_files_only=True).float()
            denoiser = diffusion.load_base_model(folder / "denoiser")
            autoencoder.eval().requires_grad_(False)
            return autoencoder.to(device), denoiser.to(device), float(autoencoder.config.scaling_factor)
    raise InputError(
        f"no latent models {str(name_or_path)!r}: give the name of shipped ones, or a folder made by "
        "python -m hyperdp_lib.baselines.dp_ldm"
    )


def train_autoencoder(preset: LatentPreset, tasks: Any, held_out: Any, out: Path, device: str) -> tuple[Any, float]:
    """Stage 1: the autoencoder, and the scale that gives public latents unit variance."""
    torch.manual_seed(preset.seed)
    autoencoder: Any = build_autoencoder(preset).to(device)
    config = preset.autoencoder_stage
    loop = Loop("autoencoder", [(autoencoder, 1.0)], config, out)
    public = held_out.sample_tasks(64, 8, torch.Generator().manual_seed(preset.seed + 1)).flatten(0, 1)
    if not loop.done:
        batches = stream(tasks, config.tasks, config.images, preset.seed + 1000 + loop.step)
        g = torch.Generator(device).manual_seed(preset.seed + 1500 + loop.step)

        def loss(step: int) -> tuple[Tensor, dict]:
            pixels = from_levels(next(batches).to(device)).flatten(0, 1)
            posterior = autoencoder.encode(pixels).latent_dist
            redrawn = autoencoder.decode(posterior.sample(g)).sample
            error = F.mse_loss(redrawn, pixels)
            divergence = posterior.kl().mean() / posterior.mean[0].numel()
            return error + preset.kl_weight * divergence, {"error": error.detach(), "kl": divergence.detach()}

        def check() -> dict:
            redrawn = decode(autoencoder, encode(autoencoder, public, 1.0), 1.0)
            return {"held_out_error": F.mse_loss(redrawn, public)}

        loop.run(loss, check=check)
    loop.modules.load_state_dict(loop.average)
    autoencoder.eval().requires_grad_(False)
    public = tasks.sample_tasks(256, 8, torch.Generator().manual_seed(preset.seed + 2)).flatten(0, 1)
    scale = 1 / float(encode(autoencoder, public, 1.0).std())
    autoencoder.register_to_config(scaling_factor=scale)
    return autoencoder, scale


def task_clusters(preset: LatentPreset, tasks: Any, autoencoder: Any, scale: float) -> Tensor:
    """Centres (pseudo_labels, D) of Lloyd's k-means on the mean latents of public tasks."""
    g = torch.Generator().manual_seed(preset.seed + 3)
    size = preset.denoiser_stage.images
    drawn = [tasks.sample_tasks(50, size, g) for _ in range(math.ceil(preset.cluster_tasks / 50))]
    means = torch.cat([encode(autoencoder, d.flatten(0, 1), scale).view(len(d), size, -1).mean(1) for d in drawn])
    centres = means[torch.randperm(len(means), generator=g)[: preset.pseudo_labels]]
    for _ in range(20):
        nearest = torch.cdist(means, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, means)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres


def train_denoiser(
    preset: LatentPreset, tasks: Any, held_out: Any, autoencoder: Any, scale: float, out: Path, device: str
) -> nn.Module:
    """Stage 2: the denoiser of public latents, conditioned on pseudo-labels."""
    torch.manual_seed(preset.seed + 4)
    denoiser = build_denoiser(preset).to(device)
    config = preset.denoiser_stage
    loop = Loop("denoiser", [(denoiser, 1.0)], config, out)
    if not loop.done:
        centres = task_clusters(preset, tasks, autoencoder, scale)
        batches = stream(tasks, config.tasks, config.images, preset.seed + 2000 + loop.step)
        g = torch.Generator().manual_seed(preset.seed + 2500 + loop.step)
        public = held_out.sample_tasks(64, config.images, torch.Generator().manual_seed(preset.seed + 5))

        def latents_and_labels(pixels: Tensor) -> tuple[Tensor, Tensor]:
            latents = encode(autoencoder, pixels.flatten(0, 1), scale)
            nearest = torch.cdist(latents.view(len(pixels), config.images, -1).mean(1), centres).argmin(1)
            return latents.to(device), nearest

        def loss(step: int) -> tuple[Tensor, dict]:
            latents, labels = latents_and_labels(from_levels(next(batches)))
            labels[torch.rand(len(labels), generator=g) < preset.unlabelled] = preset.pseudo_labels
            labels = labels.repeat_interleave(config.images).to(device)
            value = diffusion.denoising_loss(denoiser, latents, g, labels=labels).mean()
            return value, {"loss": value.detach()}

        def check() -> dict:
            latents, labels = latents_and_labels(public)
            rows = {"held_out": labels, "held_out_unlabelled": torch.full_like(labels, preset.pseudo_labels)}
            losses = {}
            for name, y in rows.items():
                fixed = torch.Generator().manual_seed(preset.seed + 6)
                y = y.repeat_interleave(config.images).to(device)
                losses[name] = diffusion.denoising_loss(denoiser, latents, fixed, labels=y).mean()
            return losses

        loop.run(loss, check=check)
    loop.modules.load_state_dict(loop.average)
    return denoiser.eval().requires_grad_(False)


def train_latent_models(
    preset: LatentPreset, out: str | Path, *, name: str = "glyphs", device: str = "cpu", tasks: Any = None
) -> Path:
    """Both stages, each resumed where it stopped, then the folder of weights, which is returned.

    ``tasks``: training and held-out public tasks; by default those of the weights ``name``.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(dataclasses.asdict(preset), indent=2)
    if (out / "preset.json").exists() and (out / "preset.json").read_text() != settings:
        raise InputError(f"{out} holds another preset's training: choose another folder with --out")
    (out / "preset.json").write_text(settings)
    public_data = TRAINING_PRESETS[name].public_data
    training, held_out = tasks or (public_data.tasks(), public_data.tasks("held_out"))
    autoencoder, scale = train_autoencoder(preset, training, held_out, out, device)
    denoiser: Any = train_denoiser(preset, training, held_out, autoencoder, scale, out, device)
    folder = out / "weights"
    for part, model in (("autoencoder", autoencoder), ("denoiser", denoiser)):
        copy.deepcopy(model).cpu().half().save_pretrained(folder / part)
        for path in (folder / part).iterdir():
            path.chmod(0o644)  # safetensors writes files that only their owner may read
    stages = {}
    for part in ("autoencoder", "denoiser"):
        state = torch.load(out / f"{part}.pt", weights_only=True)
        last = json.loads(state["history"])[-1]
        stages[part] = {"steps": state["step"], "seconds": round(state["seconds"]), "last": last}
    smoke = "" if preset in PRESETS.values() else " --smoke"
    manifest = {
        "name": f"{name}-latent",
        "command": f"python -m hyperdp_lib.baselines.dp_ldm --public {name}{smoke}",
        "public_data": training.describe(),
        "preset": json.loads(settings),
        "scale": scale,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({platform.machine()})",
        "stages": stages,
        "versions": artefacts.library_versions(),
        "sha256": {k: v for k, v in artefacts.folder_sha256(folder).items() if "/" in k},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(manifest))
    return folder


def model_card(manifest: dict) -> str:
    """What the weights are, made of what, by which command."""
    data, preset = manifest["public_data"], manifest["preset"]
    stages = "\n".join(
        f"| {name} | {log['steps']} | {log['seconds'] / 60:.0f} min | {log['last']} |"
        for name, log in manifest["stages"].items()
    )
    sums = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sorted(manifest["sha256"].items()))
    return f"""# Weights `{manifest["name"]}`

KL autoencoder (diffusers `AutoencoderKL`) and denoiser of its latents (diffusers `DiTTransformer2DModel`), for the
rival DP-LDM. Public data only.

- **Data.** {data["text"]}
- **Licence.** {data["licence"]}.
- **Command.** `{manifest["command"]} --out FOLDER` (seed {preset["seed"]}, {manifest["device"]}).
- **Use.** Posterior mean times {manifest["scale"]:.4f} is what the denoiser denoises, by flow matching; labels
  0 .. {preset["pseudo_labels"] - 1} are clusters of public tasks, {preset["pseudo_labels"]} is no label.
- **Limits.** {data.get("limits", "Made for single drawn characters and simple drawings")}. Half precision.

| stage | steps | wall time (shared machine, pauses included) | last log line |
|---|---|---|---|
{stages}

| file | sha256 |
|---|---|
{sums}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Public training from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyperdp_lib.baselines.dp_ldm", description="Train the latent models."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and weights")
    parser.add_argument("--public", choices=PRESETS, default="glyphs", help="weights whose public data to use")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps: does it run?")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    preset = PRESETS[options.public]
    if options.smoke:
        preset = dataclasses.replace(SMOKE, image_channels=preset.image_channels)
    folder = train_latent_models(preset, options.out, name=options.public, device=options.device)
    print(folder)
    return 0
