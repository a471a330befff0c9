"""A release that fits the data: nested coordinates, as many as a declared size and noise support.

One sum of k numbers is too much for twelve images at epsilon = 1, where the noise on each coordinate of the mean is
0.3, and too little for ten thousand, where it is 0.0004. Here the coordinates are ordered, so that the first few say
the most: the leading directions in which public data sets differ from one another. A release takes the first k of
them, scales every image's vector back to the same length, and sums; nothing else about the mechanism changes. k is
public: it follows from the *declared* size, the noise and a table made on held-out public tasks.

What the coordinates are of: the features of a network that tells public characters apart and redraws them, beside the
encoder of `hyperdp_lib.training`. That encoder was trained to survive noise on tasks like the public ones, and tells
those apart better than a plain classifier's features do; on drawings unlike them it is the other way round, by far.
The shares of the two were chosen on public drawings by people (Kuzushiji-Kanji, Omniglot, Quick, Draw!), where
``benchmarks/transfer.py`` measures them.

The base model is the one of the weights it builds on, untouched: adapters of both can be compared, and so can rivals.

`hyperdp train --preset glyphs-nested` trains it: the features, the directions, the hypernetwork; public data only.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from hyperdp_lib import embedding
from hyperdp_lib.artefacts import library_versions, tensors_sha256
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.embedding import Encoder, EncoderConfig
from hyperdp_lib.evaluation import FeatureNetwork
from hyperdp_lib.hypernetwork import (
    HyperNetwork,
    HyperNetworkConfig,
    load_pretrained,
    read_half,
    simulate_sums,
    summary,
    write_half,
)
from hyperdp_lib.training import (
    PRESETS,
    Loop,
    Preset,
    StageConfig,
    TaskPool,
    adapted_loss,
    add_public_tables,
    train_features,
)

COORDINATES = (8, 16, 32, 64)  # sizes a release may have, besides the count
COUNT_COORDINATE = 0.25  # less than the plain encoder's: it takes less of the norm from what there is to say
SHARES = (1.0, 0.5)  # standard deviation, over public tasks, of the new features and of the plain encoder's
HYPERNETWORK_STAGE = StageConfig(2000, 64, 8, 8e-4, 0.999)
CELLS_FILE = "cells.safetensors"  # centroids, see hyperdp_lib.cells
LEADING = 16  # coordinates whose products are second moments: 136
PROTOTYPES = 64  # of votes
SHARPNESS = 8.0  # of votes: an image near a prototype gives it about half of its vote
REDRAW = 0.5  # weight of redrawing the image, beside telling characters apart
POOL_TASKS = 1536
TURN = 10_000  # what another seed of the training moves its streams by: apart from those of every other stage
NOISE_LEVELS = (0.5, 0.3, 0.15, 0.08, 0.04, 0.02, 0.01, 0.003)  # on the mean; where the table has rows


class NestedEncoder(nn.Module):
    """Image -> the first of the nested coordinates; called and used like `embedding.Encoder`.

    Parameters
    ----------
    encoder : Encoder
    features : FeatureNetwork
        Public, frozen, one image at a time.
    centre : (D,), projection : (D, 64)
        Public: mean and leading directions of the features of both, with their shares; see `directions`.
    coordinates : int
        How many are used, one of ``COORDINATES``. Output: (N, 1 + coordinates), of norm one.
    """

    centre: Tensor
    projection: Tensor

    def __init__(
        self, encoder: Encoder, features: FeatureNetwork, centre: Tensor, projection: Tensor, coordinates: int = 64
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.features = features.requires_grad_(False).eval()
        self.register_buffer("centre", centre)
        self.register_buffer("projection", projection)
        self.use(coordinates)

    def use(self, coordinates: int) -> None:
        """Give so many coordinates from now on."""
        if coordinates not in COORDINATES:
            raise InputError(f"coordinates must be one of {COORDINATES}, got {coordinates}.")
        self.coordinates = coordinates
        self.config = dataclasses.replace(
            self.encoder.config, dimension=1 + coordinates, count_coordinate=COUNT_COORDINATE
        )

    def train(self, mode: bool = True) -> NestedEncoder:
        """Frozen: always in evaluation mode."""
        return super().train(False)

    def everything(self, images: Tensor) -> Tensor:
        """All 64 coordinates (N, 1 + 64), not yet of norm one: what `first` cuts."""
        raw = _both(self.encoder, self.features, images)
        nested = (raw - self.centre) @ self.projection
        return torch.cat([torch.full_like(nested[:, :1], COUNT_COORDINATE), nested], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> (N, 1 + coordinates), of norm one."""
        nested = self.everything(images)
        sizes = torch.full((len(nested),), self.coordinates, device=nested.device)
        return first(nested, sizes)[:, : 1 + self.coordinates]


@dataclass(frozen=True)
class Blocks:
    """What a sum may hold beside the nested coordinates themselves (public).

    Attributes
    ----------
    moments : float
        Share of second moments: products of the leading coordinates. Beside the mean they say how a data set varies.
    votes : float
        Share of soft votes for public prototypes: beside the mean they say how many images look like which.

    A share is the standard deviation over public tasks, the coordinates' own being 1; 0 leaves a block out.
    """

    moments: float = 0.0
    votes: float = 0.0

    def __post_init__(self) -> None:
        if self.moments < 0 or self.votes < 0:
            raise InputError(f"shares must be at least 0, got moments {self.moments:g}, votes {self.votes:g}.")


class RicherEncoder(NestedEncoder):
    """Nested coordinates of more than the mean: of products and votes too, cut to a number and a norm as ever.

    All blocks stand in one vector of norm one, so one clip bounds them together and one draw of noise covers them. The
    leading directions decide which of them a short release holds.

    Parameters
    ----------
    nested : NestedEncoder
    prototypes : (V, 64)
        Public: what is voted for, in nested coordinates of norm one.
    middle : (64 + P + V,), mixing : (64 + P + V, 64)
        Public: mean and leading directions of all blocks with their shares; see `richer`.
    """

    prototypes: Tensor
    middle: Tensor
    mixing: Tensor

    def __init__(self, nested: NestedEncoder, prototypes: Tensor, middle: Tensor, mixing: Tensor) -> None:
        super().__init__(nested.encoder, nested.features, nested.centre, nested.projection, nested.coordinates)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("middle", middle)
        self.register_buffer("mixing", mixing)

    def everything(self, images: Tensor) -> Tensor:
        """All 64 coordinates (N, 1 + 64), not yet of norm one."""
        count, blocks = super().everything(images).split([1, COORDINATES[-1]], 1)
        return torch.cat([count, (further(blocks, self.prototypes) - self.middle) @ self.mixing], 1)


class NestedHyperNetwork(HyperNetwork):
    """The hypernetwork for sums of nested coordinates: it reads as many as there are, and is told how many.

    Attributes
    ----------
    table : mapping
        Noise on the mean -> number of coordinates -> denoising loss on held-out public tasks.
    centroids : mapping
        Of `hyperdp_lib.cells`; empty if the weights have none.
    """

    def __init__(self, encoder: NestedEncoder, base_model: nn.Module, config: HyperNetworkConfig | None = None) -> None:
        super().__init__(encoder, base_model, config)
        self.trunk_in = nn.Linear(COORDINATES[-1] + 2 + len(COORDINATES), self.config.hidden)
        self.table: Mapping[float, Mapping[int, float]] = {}
        self.centroids: Mapping[str, Tensor] = {}

    def features(self, noisy_sum: Tensor, noise_std: Tensor) -> Tensor:
        """What the trunk reads: the noisy mean with zeros where there is no coordinate, and which sizes there are."""
        mean, *rest = summary(noisy_sum, noise_std, COUNT_COORDINATE)
        sizes = torch.tensor(COORDINATES, device=mean.device) == mean.shape[1]
        told = sizes.to(mean.dtype).expand(len(mean), -1)
        return torch.cat([F.pad(mean, (0, COORDINATES[-1] - mean.shape[1])), *rest, told], 1)

    def codes(self, images: Tensor) -> Tensor:
        """All coordinates of images (N, C, H, W): `first` cuts them at every step anew."""
        return self.encoder.everything(images)

    def simulate(self, codes: Tensor, sizes: Tensor, noise_std: Tensor, generator: torch.Generator) -> Tensor:
        """What the trunk reads of simulated noisy sums, each task's with a random number of coordinates."""
        counts = torch.tensor(COORDINATES)[torch.randint(len(COORDINATES), (len(codes),), generator=generator)]
        return self.features_of(*simulate_sums(first(codes, counts), sizes, noise_std, generator), counts)

    def features_of(self, sums: Tensor, noise_std: Tensor, counts: Tensor) -> Tensor:
        """What the trunk reads of sums (T, 1 + 64) of which the first ``counts`` (T,) coordinates were released."""
        read = [self.features(sums[counts == k][:, : 1 + k], noise_std[counts == k]) for k in COORDINATES]
        order = torch.cat([torch.nonzero(counts == k)[:, 0] for k in COORDINATES]).argsort()
        return torch.cat(read)[order]

    def using(self, coordinates: int) -> NestedHyperNetwork:
        """A copy for releases of so many coordinates."""
        other = copy.deepcopy(self)
        other.encoder.use(coordinates)
        return other

    def fitting(self, noise_std: float, declared_per_class: float) -> NestedHyperNetwork:
        """A copy with as many coordinates as a declared size of a class and the noise on a sum support; both public."""
        return self.using(self.coordinates_for(noise_std, declared_per_class))

    def coordinates_for(self, noise_std: float, declared_per_class: float) -> int:
        """How many coordinates do best on held-out public tasks under the noise of a declared, public size."""
        if not self.table:
            raise InputError("these weights have no table of losses: they were not made by hyperdp_lib.nested.")
        noise = max(noise_std / max(declared_per_class, 1.0), 1e-6)
        losses = self.table[min(self.table, key=lambda level: abs(math.log(level / noise)))]
        return min(losses, key=lambda size: losses[size])


def first(nested: Tensor, sizes: Tensor) -> Tensor:
    """Each row's first coordinates, zeros after them, scaled so that with the count the norm is one.

    ``nested`` is (T, ..., 1 + 64), ``sizes`` (T,).
    """
    order = torch.arange(nested.shape[-1] - 1, device=nested.device)
    kept = (order < sizes[:, None]).view(len(sizes), *(1,) * (nested.ndim - 2), -1)
    direction = F.normalize(nested[..., 1:] * kept, dim=-1, eps=1e-6)
    return torch.cat([nested[..., :1], direction * math.sqrt(1 - COUNT_COORDINATE**2)], -1)


def _both(encoder: nn.Module, features: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([features(images), encoder(images)[:, 1:]], 1)


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


def further(nested: Tensor, prototypes: Tensor) -> Tensor:
    """Coordinates (N, 64), their products and their votes: (N, 64 + P + V).

    Products are of the `LEADING` first, at norm one, each pair once; votes are the softmax of cosines.
    """
    leading = F.normalize(nested[:, :LEADING], dim=1, eps=1e-6)
    rows, columns = torch.triu_indices(LEADING, LEADING, device=nested.device)
    votes = (F.normalize(nested, dim=1, eps=1e-6) @ prototypes.T * SHARPNESS).softmax(1)
    return torch.cat([nested, leading[:, rows] * leading[:, columns], votes], 1)


@torch.no_grad()
def richer(nested: NestedEncoder, tasks: Tensor, blocks: Blocks, *, seed: int = 0) -> RicherEncoder:
    """Further blocks, their prototypes and directions found on public tasks (T, M, C, H, W)."""
    images = tasks.flatten(0, 1).split(embedding.CHUNK)
    codes = torch.cat([NestedEncoder.everything(nested, part)[:, 1:] for part in images])
    unit = F.normalize(codes, dim=1, eps=1e-6)
    centroids, _ = kmeans2(unit.double().numpy(), PROTOTYPES, minit="++", rng=np.random.default_rng(seed))
    prototypes = F.normalize(torch.from_numpy(centroids).float(), dim=1)
    raw = further(codes, prototypes)
    means = raw.view(*tasks.shape[:2], -1).mean(1)
    pairs = LEADING * (LEADING + 1) // 2
    sizes, shares = (COORDINATES[-1], pairs, PROTOTYPES), (1.0, blocks.moments, blocks.votes)
    return RicherEncoder(nested, prototypes, *_leading(means, sizes, shares))


def load_nested(folder: Path, base_model: nn.Module, manifest: Mapping[str, Any]) -> NestedHyperNetwork:
    """What `hypernetwork.load_pretrained` calls for weights of this kind; float32."""
    state = read_half(folder / "encoder.safetensors")
    encoder = Encoder(EncoderConfig(**manifest["encoder"]))
    features = FeatureNetwork(encoder.config.channels, encoder.config.image_size, name="codes")
    nested = NestedEncoder(encoder, features, state["centre"], state["projection"])
    nested.load_state_dict(state)
    network = NestedHyperNetwork(nested, base_model, HyperNetworkConfig(**manifest["hypernetwork"]))
    decoder = read_half(folder / "hypernetwork.safetensors")
    network.load_state_dict(decoder | {f"encoder.{k}": v for k, v in nested.state_dict().items()})
    network.table = {float(level): {int(k): v for k, v in row.items()} for level, row in manifest["table"].items()}
    if (folder / CELLS_FILE).is_file():
        network.centroids = read_half(folder / CELLS_FILE)
    return network


# ---- public training ---------------------------------------------------------------------------------------


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
    from hyperdp_lib.baselines.decoders import smoke_preset

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
- **Use.** `hyperdp release IMAGES --hypernetwork glyphs-nested --declared-size N ...`. Half precision.

Denoising loss on held-out public tasks, by noise on the mean and number of coordinates; the smallest of a row decides:

| noise | {" | ".join(map(str, COORDINATES))} |
|---|{"---|" * len(COORDINATES)}
{rows}
""")
