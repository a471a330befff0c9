"""Training of nested coordinates and their hypernetwork, on public data only: what `hyperdp_lib.nested` describes.

The features, their leading directions, the hypernetwork, the table by which a release chooses its number of
coordinates, and the tables of cells and priors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperdp_lib import embedding
from hyperdp_lib.artefacts import library_versions, tensors_sha256
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.embedding import Encoder, FeatureNetwork
from hyperdp_lib.hypernetwork import HyperNetwork, simulate_sums
from hyperdp_lib.nested import (
    COORDINATES,
    COUNT_COORDINATE,
    SHARES,
    NestedEncoder,
    NestedHyperNetwork,
    _both,
    first,
)
from hyperdp_lib.pretrained import load_pretrained, write_half
from hyperdp_lib.public.stages import (
    PRESETS,
    Loop,
    Preset,
    StageConfig,
    TaskPool,
    adapted_loss,
    add_public_tables,
    smoke_preset,
    train_features,
)

HYPERNETWORK_STAGE = StageConfig(2000, 64, 8, 8e-4, 0.999)
REDRAW = 0.5  # weight of redrawing the image, beside telling characters apart
POOL_TASKS = 1536
TURN = 10_000  # what another seed of the training moves its streams by: apart from those of every other stage
NOISE_LEVELS = (0.5, 0.3, 0.15, 0.08, 0.04, 0.02, 0.01, 0.003)  # on the mean; where the table has rows

@torch.no_grad()
def directions(encoder: Encoder, features: FeatureNetwork, tasks: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (D,) and leading 64 directions (D, 64) in which the means of public tasks (T, M, C, H, W) differ."""
    raw = torch.cat([_both(encoder, features, part) for part in tasks.flatten(0, 1).split(embedding.CHUNK)])
    means = raw.view(*tasks.shape[:2], -1).mean(1)
    return _leading(means, [features.dimension, raw.shape[1] - features.dimension], SHARES)


def _leading(means: Tensor, sizes: Sequence[int], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Centre (D,) of means (T, D) and their leading 64 directions (D, 64), each block scaled to its share first."""
    weights = torch.cat([
        torch.full((part.shape[1],), share) / part.var(0).sum().sqrt()
        for part, share in zip(means.split(list(sizes), 1), shares, strict=True)
    ])  # fmt: skip
    centre = means.mean(0)
    _, _, rows = torch.linalg.svd((means - centre) * weights, full_matrices=False)
    return centre, weights[:, None] * rows[: COORDINATES[-1]].T


def build(
    preset: Preset, source: Any, encoder: Encoder, base_model: nn.Module, out: Path, device: str = "cpu"
) -> NestedHyperNetwork:
    """An untrained hypernetwork, on coordinates found from the source's tasks; trains the features if they are not."""
    nested, _ = _train_encoder(preset, source, encoder, out, device, turn=TURN * preset.seed)
    torch.manual_seed(preset.seed + 3)
    return NestedHyperNetwork(nested, base_model, preset.hypernetwork).to(device)


def _train_encoder(
    preset: Preset, source: Any, encoder: Encoder, out: Path, device: str = "cpu", turn: int = 0
) -> tuple[NestedEncoder, Tensor]:
    """Nested coordinates, on features trained here if they are not, and the tasks in which they were found."""
    features = train_features(preset, source, out, device, redraw=REDRAW, name="codes", turn=turn).cpu()
    count = min(2000, max(100, 2 * preset.pool_tasks))
    typical = source.sample_tasks(count, 12, torch.Generator().manual_seed(11 + turn))
    return NestedEncoder(encoder.cpu(), features, *directions(encoder, features, typical)), typical


def warm_start(network: NestedHyperNetwork, plain: HyperNetwork, tasks: Tensor) -> None:
    """Start as another hypernetwork, its input predicted from the new one by least squares over public tasks."""

    def means(encoder: Any) -> Tensor:
        return embedding.embed(encoder, tasks.flatten(0, 1))[:, 1:].view(*tasks.shape[:2], -1).mean(1)

    with torch.no_grad():
        new, old = means(network.encoder), means(plain.encoder)
        predict = torch.linalg.lstsq(torch.cat([new, torch.ones(len(new), 1)], 1), old).solution
        k, width = old.shape[1], new.shape[1]
        reads = plain.trunk_in.weight
        start = {key: value for key, value in plain.decoder_state().items() if not key.startswith("trunk_in.")}
        network.load_state_dict(start, strict=False)
        network.trunk_in.weight.zero_()
        network.trunk_in.weight[:, :width] = reads[:, :k] @ predict[:width].T
        network.trunk_in.weight[:, width : width + reads.shape[1] - k] = reads[:, k:]  # noise, count, and what else
        network.trunk_in.bias.copy_(plain.trunk_in.bias + 8.0 * reads[:, :k] @ predict[width])


class HeldOut:
    """256 held-out tasks: what the table of losses is made of."""

    def __init__(self, encoder: NestedEncoder, preset: Preset, tasks: Any, images: int) -> None:
        drawn = tasks.sample_tasks(256, images + 40, torch.Generator().manual_seed(preset.seed + 4900))
        self.queries = drawn[:, :images]
        with torch.no_grad():
            device = encoder.centre.device
            parts = [encoder.everything(part.to(device)).cpu() for part in drawn[:, images:].flatten(0, 1).split(500)]
        self.nested = torch.cat(parts).unflatten(0, (len(drawn), 40))

    @torch.no_grad()
    def loss(self, network: NestedHyperNetwork, base_model: nn.Module, noise: float, coordinates: int) -> float:
        """Mean denoising loss under adapters of sums of 1000 embeddings with this noise on their mean."""
        tasks, g = len(self.queries), torch.Generator().manual_seed(5)
        sizes = torch.full((tasks,), 1000.0)
        codes = first(self.nested, torch.full((tasks,), coordinates))[..., : 1 + coordinates]
        sums, std = simulate_sums(codes, sizes, noise * sizes, g)
        device = next(network.parameters()).device
        adapter = network(sums.to(device), std.to(device))
        return float(adapted_loss(base_model, adapter, self.queries.to(device), torch.Generator().manual_seed(1)))


def fit(
    network: NestedHyperNetwork, base_model: nn.Module, preset: Preset, source: Any, held_out_tasks: Any,
    checkpoints: Path, *, turn: int = 0,
) -> Loop:
    """Train the hypernetwork alone, for the preset's joint stage; resumes. The loop has its history.

    The network is left at the average of the weights it went through.
    """
    stage = preset.joint_stage
    held_out = HeldOut(network.encoder, preset, held_out_tasks, stage.images)
    learned = nn.ModuleList([network.trunk_in, network.blocks, network.trunk_out, network.head_a, network.head_b])
    loop = Loop("hypernetwork", [(learned, 1.0)], stage, checkpoints)
    if not loop.done:
        pool = TaskPool(preset, network.codes, source, 8000 + turn + loop.step, "cpu")
        g = torch.Generator().manual_seed(8500 + turn + loop.step)

        def loss(step: int) -> tuple[Tensor, dict]:
            pool.refresh()
            images, codes, sizes, noise_std = pool.draw_codes(preset, stage.tasks, stage.images, g)
            adapter = network.generate(network.simulate(codes, sizes, noise_std, g))
            value = adapted_loss(base_model, adapter, from_levels(images), g)
            return value, {"loss": value.detach()}

        def check() -> dict:
            asked = ((0.3, 8), (0.3, 16), (0.03, 32), (0.03, 64), (0.001, 64))
            return {f"noise {noise} k {k}": held_out.loss(network, base_model, noise, k) for noise, k in asked}

        loop.run(loss, every=min(100, stage.steps), check=check)
    loop.modules.load_state_dict(loop.average)
    network.eval().requires_grad_(False)
    return loop


def train_on_glyphs(out: Path, *, smoke: bool = False, resume: bool = True, seed: int = 0) -> Path:
    """The weights `glyphs-nested`, cells and priors included, from the shipped ``glyphs``: the folder ``out/weights``.

    What `training.train` does for this name. Resumes from ``out/checkpoints``, if the seed is the same.

    ``smoke``: a few tiny steps, to see that everything runs. ``seed``: of all the training; the shipped weights' is 0.
    """
    preset = smoke_preset() if smoke else PRESETS["glyphs"]
    stage = preset.joint_stage if smoke else HYPERNETWORK_STAGE
    turn = TURN * seed
    preset = dataclasses.replace(preset, pool_tasks=min(POOL_TASKS, preset.pool_tasks), joint_stage=stage)
    checkpoints, weights = out / "checkpoints", out / "weights"
    for folder in (checkpoints, weights):
        folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        for file in checkpoints.iterdir():
            file.unlink()
    settings, told = checkpoints / "preset.json", json.dumps(asdict(preset) | {"seed": seed}, indent=2)
    if settings.exists() and settings.read_text() != told:
        raise InputError(f"{out} holds the training of another preset or seed: choose another folder with --out")
    settings.write_text(told)
    base_model, plain = load_pretrained("glyphs")
    source, held_out_tasks = preset.public_data.tasks(), preset.public_data.tasks("held_out")
    encoder, typical = _train_encoder(preset, source, plain.encoder, checkpoints, turn=turn)
    network = NestedHyperNetwork(encoder, base_model, plain.config)
    warm_start(network, plain, typical)
    loop = fit(network, base_model, preset, source, held_out_tasks, checkpoints, turn=turn)
    tabulate(network, base_model, preset, held_out_tasks, NOISE_LEVELS[:1] if smoke else NOISE_LEVELS)
    _write(weights, network, loop, source, seed)
    add_public_tables(weights, source, num_tasks=100 if smoke else 2000)
    return weights


def tabulate(
    network: NestedHyperNetwork, base_model: nn.Module, preset: Preset, held_out_tasks: Any,
    noise_levels: Sequence[float] = NOISE_LEVELS,
) -> None:
    """Fill the network's table: by it, the coordinates of a release are chosen."""
    held_out = HeldOut(network.encoder, preset, held_out_tasks, preset.joint_stage.images)
    network.table = {
        noise: {k: round(held_out.loss(network, base_model, noise, k), 5) for k in COORDINATES}
        for noise in noise_levels
    }


def manifest(network: NestedHyperNetwork) -> dict[str, Any]:
    """What `load_nested` reads, besides the weights."""
    return {
        "kind": "nested",
        "encoder": asdict(network.encoder.encoder.config),
        "hypernetwork": asdict(network.config),
        "coordinates": COORDINATES,
        "count_coordinate": COUNT_COORDINATE,
        "shares": SHARES,
        "table": network.table,
        "encoder_sha256": tensors_sha256(network.encoder.state_dict()),
    }


def _write(out: Path, network: NestedHyperNetwork, loop: Loop, source: Any, seed: int) -> None:
    for name, state in (("encoder", network.encoder.state_dict()), ("hypernetwork", network.decoder_state())):
        write_half(out / f"{name}.safetensors", state)
    told = {
        "name": "glyphs-nested",
        "builds_on": "glyphs",
        "command": "hyperdp train --preset glyphs-nested" + (f" --seed {seed}" if seed else ""),
        "public_data": source.describe(),
        "stages": {"features": asdict(PRESETS["glyphs"].codes_stage), "hypernetwork": asdict(loop.config)},
        "steps": loop.step,
        "history": loop.history,
        **manifest(network),
        "versions": library_versions(),
    }
    (out / "manifest.json").write_text(json.dumps(told, indent=2) + "\n")
    rows = "\n".join(
        f"| {noise:g} | {' | '.join(f'{row[k]:.4f}' for k in COORDINATES)} |" for noise, row in network.table.items()
    )
    (out / "README.md").write_text(f"""# Weights `glyphs-nested`

Encoder of nested coordinates and the hypernetwork that reads the first 8, 16, 32 or 64 of them. Public data only.

- **Data.** As for the weights `glyphs`, whose base model it adapts and whose encoder is part of it.
- **Licence.** {told["public_data"]["licence"]}.
- **Command.** `{told["command"]}`: {loop.step} steps, {loop.seconds / 60:.0f} minutes of one
  shared core for the hypernetwork.
- **Use.** `hyperdp release IMAGES --weights glyphs ...`. Half precision.

Denoising loss on held-out public tasks, by noise on the mean and number of coordinates; the smallest of a row decides:

| noise | {" | ".join(map(str, COORDINATES))} |
|---|{"---|" * len(COORDINATES)}
{rows}
""")
