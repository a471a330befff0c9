"""The stages of the public training, each of which resumes where it stopped.

1. ``features``: the network that scores images, a classifier of public characters.
2. ``encoder``: noise-aware prototypical training (Snell et al. 2017, with the release's noise on every prototype), plus
   a decoder that must redraw a task's mean and standard-deviation image from its noisy mean. Then frozen: trained
   through the denoising loss instead, the encoder loses class information.
3. ``base``: the denoiser alone, on all public tasks.
4. ``joint``: base and hypernetwork together; heads warmed up first; tasks drawn afresh throughout.

No private data is read here. The noise that the release will add is simulated, over all noise levels and set sizes
that a release may meet.

Several processes, started by ``accelerate launch`` or ``torchrun``, train together: each draws its own tasks, gradients
are averaged at every step, and the first one writes. So N processes see N times the tasks in a step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hyperdp_lib import cells, prior
from hyperdp_lib.adapter import Adapter, apply_adapters
from hyperdp_lib.data import InputError, from_levels, to_levels
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model, denoising_loss
from hyperdp_lib.embedding import Encoder, EncoderConfig, FeatureNetwork
from hyperdp_lib.hypernetwork import LARGEST_SET, LEAST_NOISE, HyperNetwork, HyperNetworkConfig, simulate_sums
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.pretrained import CELLS_FILE, load_pretrained, write_half
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.drawings import DrawingConfig
from hyperdp_lib.public.glyphs import GlyphConfig
from hyperdp_lib.public.images import ImageConfig
from hyperdp_lib.public.photographs import PhotographConfig

STAGES = ("features", "encoder", "base", "joint")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TaskSource(Protocol):
    """Where public tasks come from: `glyphs`, `drawings`, `photographs`, `images`, or a source of one's own."""

    @property
    def num_classes(self) -> int:
        """Classes that ``classes`` of `sample_tasks` may name."""

    def sample_tasks(
        self,
        num_tasks: int,
        images_per_task: int,
        generator: torch.Generator,
        *,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Draw tasks (T, M, C, H, W) float32 in [-1, 1]; ``classes`` (T,) fixes the class of each."""

    def describe(self) -> dict:
        """``text`` for the model card, and counts; ``limits`` if they are not those of drawings."""


@dataclass(frozen=True)
class StageConfig:
    """One stage: how many steps of how many tasks x images, and how fast."""

    steps: int
    tasks: int
    images: int
    learning_rate: float
    ema: float = 0.998
    warm_up: float = 0.05  # share of the steps, at most 300 of them, until the full learning rate

    def rate(self, steps: int, seconds: float) -> float:
        """Images per second of all processes together."""
        return steps * self.tasks * self.images * rank()[1] / max(seconds, 1e-9)


@dataclass(frozen=True)
class Preset:
    """Everything that decides the trained weights (public)."""

    public_data: GlyphConfig | DrawingConfig | PhotographConfig | ImageConfig = field(default_factory=GlyphConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    base: BaseModelConfig = field(default_factory=BaseModelConfig)
    hypernetwork: HyperNetworkConfig = field(default_factory=HyperNetworkConfig)
    features_stage: StageConfig = StageConfig(800, 128, 3, 1e-3)
    encoder_stage: StageConfig = StageConfig(1200, 64, 20, 1e-3)
    base_stage: StageConfig = StageConfig(1200, 64, 8, 2e-3)
    joint_stage: StageConfig = StageConfig(4000, 64, 8, 1.5e-3, 0.999)
    codes_stage: StageConfig = StageConfig(1000, 128, 3, 1e-3)  # for nested coordinates only
    nested: bool = False  # coordinates by size and noise, see hyperdp_lib.nested
    feature_network: str = "glyphnet"  # name of the features that scores are computed in
    feature_classes: int = 2048
    pool_tasks: int = 2048  # tasks in play at a time during `joint`
    pool_images: int = 80  # images of each; also the largest support set
    fresh_tasks: int = 12  # of which so many are replaced by new ones at every step; 0: a fixed bank
    encoder_noise: tuple[float, float] = (1e-3, 0.35)  # std on the encoder's prototypes, log-uniform
    set_size: tuple[int, int] = (8, LARGEST_SET)  # the set sizes the hypernetwork is trained for, log-uniform
    mean_noise: tuple[float, float] = (LEAST_NOISE, 0.5)  # and the noise std on the mean, log-uniform
    precision: str = "float32"  # or "bfloat16": of the matrix products in training, weights and sums stay float32
    adapter_off: float = 0.1  # share of tasks with no adapter, so that the base stays a model of its own
    seed: int = 0


_MINIATURE = Preset(
    public_data=GlyphConfig(num_strokes=200),
    encoder=EncoderConfig(dimension=16, width=8),
    base=BaseModelConfig(width=32, num_layers=1),
    hypernetwork=HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1),
    features_stage=StageConfig(8, 8, 4, 1e-3),
    encoder_stage=StageConfig(12, 8, 8, 1e-3, 0.9),
    base_stage=StageConfig(12, 8, 4, 1e-3, 0.9),
    joint_stage=StageConfig(12, 8, 4, 1e-3, 0.9),
    codes_stage=StageConfig(8, 8, 4, 1e-3),
    feature_classes=32,
    pool_tasks=16,
    pool_images=12,
    fresh_tasks=4,
)
_DRAWINGS = Preset(public_data=DrawingConfig(), nested=True, feature_network="drawnet", pool_tasks=1536)
_PHOTOGRAPHS = Preset(
    public_data=PhotographConfig(),
    encoder=EncoderConfig(channels=3),
    base=BaseModelConfig(channels=3),
    nested=True,
    feature_network="photonet",
    # three quarters of an hour of a shared core: smaller batches than elsewhere, which learn more from so little
    features_stage=StageConfig(500, 128, 3, 1e-3),
    encoder_stage=StageConfig(700, 48, 16, 1e-3),
    base_stage=StageConfig(800, 32, 8, 2e-3),
    joint_stage=StageConfig(800, 32, 8, 1.5e-3),
    codes_stage=StageConfig(300, 128, 3, 1e-3),
    pool_tasks=1024,
    fresh_tasks=6,
)


def _on_gpu(preset: Preset, public_data: DrawingConfig | PhotographConfig) -> Preset:
    """At 32 x 32 pixels for one GPU, and never trained where there is none: 64 tokens, eight times the parameters."""
    channels = preset.encoder.channels
    return dataclasses.replace(
        preset,
        public_data=public_data,
        encoder=EncoderConfig(channels=channels, image_size=32, width=48),
        base=BaseModelConfig(channels=channels, image_size=32, width=256, num_layers=8, num_heads=8),
        hypernetwork=HyperNetworkConfig(hidden=512, head_width=64),
        features_stage=StageConfig(4000, 256, 3, 1e-3),
        encoder_stage=StageConfig(6000, 128, 20, 1e-3),
        base_stage=StageConfig(20_000, 128, 8, 1e-3, 0.9995),
        joint_stage=StageConfig(40_000, 128, 8, 1e-3, 0.9995),
        codes_stage=StageConfig(4000, 256, 3, 1e-3),
        pool_tasks=2048,
        fresh_tasks=12,
        precision="bfloat16",
    )


PRESETS = {
    "glyphs": Preset(),
    "glyphs-lookalikes": Preset(public_data=GlyphConfig(lookalikes=True)),
    "drawings": _DRAWINGS,
    "drawings-32": _on_gpu(_DRAWINGS, DrawingConfig(image_size=32)),
    "miniature": _MINIATURE,
    "drawings-miniature": dataclasses.replace(
        _MINIATURE, public_data=DrawingConfig(), nested=True, feature_network="drawnet"
    ),
    "photographs": _PHOTOGRAPHS,
    "photographs-overlap": dataclasses.replace(_PHOTOGRAPHS, public_data=PhotographConfig(overlap=True)),
    "photographs-32": _on_gpu(_PHOTOGRAPHS, PhotographConfig(image_size=32)),
    "photographs-miniature": dataclasses.replace(
        _MINIATURE,
        public_data=PhotographConfig(),
        encoder=dataclasses.replace(_MINIATURE.encoder, channels=3),
        base=dataclasses.replace(_MINIATURE.base, channels=3),
        nested=True,
        feature_network="photonet",
    ),
}


def smoke_preset() -> Preset:
    """Few, small pools: trains in seconds, learns nothing; to see that everything runs."""
    joint = StageConfig(4, 4, 4, 1e-3, 0.9)
    return dataclasses.replace(
        PRESETS["glyphs"], public_data=GlyphConfig(num_strokes=200), joint_stage=joint, pool_tasks=16, pool_images=12,
        fresh_tasks=4, codes_stage=StageConfig(2, 8, 3, 1e-3),
    )  # fmt: skip


class TaskStream(IterableDataset):
    """Batches of fresh tasks (T, M, C, H, W) as uint8; with the classes' numbers if ``num_classes`` is given, and with
    their embeddings (T, M, k) if ``embed`` is."""

    def __init__(
        self,
        source: TaskSource,
        tasks: int,
        images: int,
        seed: int,
        num_classes: int | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source, self.tasks, self.images, self.seed = source, tasks, images, seed
        self.num_classes, self.embed = num_classes, embed

    def __iter__(self) -> Iterator:
        g = torch.Generator().manual_seed(self.seed)
        while True:
            classes = None
            if self.num_classes is not None:
                classes = torch.randperm(self.num_classes, generator=g)[: self.tasks]
            images = to_levels(self.source.sample_tasks(self.tasks, self.images, g, classes=classes))
            batch = [images]
            if classes is not None:
                batch.append(classes)
            if self.embed is not None:
                batch.append(embedded(self.embed, images))
            yield batch[0] if len(batch) == 1 else tuple(batch)


def embedded(embed: Callable[[Tensor], Tensor], images: Tensor, device: str = "cpu") -> Tensor:
    """Tasks (T, M, C, H, W) as uint8 -> (T, M, k): what a release sums, so never in half precision."""
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        return embed(from_levels(images.to(device)).flatten(0, 1)).cpu().unflatten(0, images.shape[:2])


def stream(*args, **keywords) -> Iterator:
    """Draw tasks in one background process, ahead of the training that uses them."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    return iter(DataLoader(TaskStream(*args, **keywords), batch_size=None, num_workers=1, prefetch_factor=4))


def log_uniform(low: float, high: float, count: int, g: torch.Generator) -> Tensor:
    """(count,) numbers whose logarithm is uniform."""
    return torch.exp(math.log(low) + (math.log(high) - math.log(low)) * torch.rand(count, generator=g))


def rank() -> tuple[int, int]:
    """Number of this process, and how many train together."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own_seed(seed: int) -> int:
    """Seed of what each process draws for itself, in one process the seed as given."""
    return seed + 1_000_003 * rank()[0]


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if rank()[1] > 1:
        torch.distributed.barrier()


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes."""
    if rank()[1] == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(together)
    together /= rank()[1]
    for gradient, part in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Loop:
    """The one training loop: AdamW, warm-up and cosine decay, gradient clipping, EMA, checkpoints, progress.

    ``loss(step)`` returns the loss and numbers to log. A run that was stopped continues from its last checkpoint; its
    random streams start anew from the step it continues at. ``precision`` is that of the loss's matrix products.
    """

    def __init__(
        self,
        name: str,
        groups: list[tuple[nn.Module, float]],
        config: StageConfig,
        out: Path,
        precision: str = "float32",
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
        self.precision = PRECISIONS[precision]
        self.name, self.config, self.path = name, config, out / f"{name}.pt"
        self.modules = nn.ModuleList([module for module, _ in groups])
        self.rates = [rate * config.learning_rate for _, rate in groups]
        parameters = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
            for (module, _), rate in zip(groups, self.rates, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.history: list[dict] = []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            self.history = json.loads(state["history"])

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self.config.steps

    def learning_rate(self, step: int) -> float:
        """Share of the full rate: linear warm-up (at most 300 steps), then a half cosine to 0."""
        warm_up = min(300, max(1, round(self.config.warm_up * self.config.steps)))
        progress = (step - warm_up) / max(1, self.config.steps - warm_up)
        return (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * progress))

    def save(self) -> None:
        """Checkpoint, atomically, by the first process."""
        if rank()[0]:
            return
        state = {
            "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
            "step": self.step, "seconds": self.seconds, "history": json.dumps(self.history),
        }  # fmt: skip
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def run(
        self,
        loss: Callable[[int], tuple[Tensor, dict]],
        *,
        every: int | None = None,
        check: Callable[[], dict] | None = None,
    ):
        """Train to the end; the averaged weights are then in ``average``.

        Logged, checked and saved ``every`` so many steps: 200, or a quarter of a short stage.
        """
        every = every or max(1, min(200, self.config.steps // 4))
        started, saved = time.perf_counter(), self.seconds
        sums: dict[str, float] = {}
        with progress_bar(total=self.config.steps, initial=self.step, desc=self.name, show=rank()[0] == 0) as bar:
            while not self.done:
                rate = self.learning_rate(self.step)
                for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
                    group["lr"] = full * rate
                where = self.parameters[0].device.type
                with torch.autocast(where, self.precision, enabled=self.precision is not torch.float32):
                    value, numbers = loss(self.step)
                self.optimizer.zero_grad()
                value.backward()
                average_gradients(self.parameters)
                # only what is optimised: a frozen part may still hold gradients of the stage that trained it
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.step += 1
                decay = min(self.config.ema, self.step / (self.step + 10))
                with torch.no_grad():
                    for key, current in self.modules.state_dict().items():
                        self.average[key].lerp_(current, 1 - decay)
                for key, number in numbers.items():
                    sums[key] = sums.get(key, 0.0) + float(number)
                bar.update()
                if self.step % every == 0 or self.done:
                    self.seconds = saved + time.perf_counter() - started
                    taken = (self.step - 1) % every + 1
                    row: dict[str, float] = {"step": self.step, "seconds": round(self.seconds)}
                    row |= {k: round(v / taken, 5) for k, v in sums.items()}
                    if check is not None:
                        row |= self._with_average(check)
                    sums = {}
                    self.history.append(row)
                    self.save()
                    if rank()[0] == 0:
                        bar.write(f"{self.name}: {row}, {self.config.rate(self.step, self.seconds):.0f} images/s")
        wait_for_all()  # nobody reads the checkpoint before it is written

    def _with_average(self, check: Callable[[], dict]) -> dict:
        current = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        with torch.no_grad():
            result = {k: round(float(v), 5) for k, v in check().items()}
        self.modules.load_state_dict(current)
        return result


def train_features(
    preset: Preset,
    source: TaskSource,
    out: Path,
    device: str,
    *,
    redraw: float = 0.0,
    name: str = "features",
    turn: int = 0,
) -> FeatureNetwork:
    """Stage 1: a classifier of public characters in random styles; its 64 features are what scores are computed in.

    With ``redraw``, features from which each image can be drawn again, too: the ``codes`` of `hyperdp_lib.nested`.
    ``turn`` moves the seeds.
    """
    codes = name == "codes"
    torch.manual_seed(turn + (77 if codes else preset.seed))
    config = preset.codes_stage if codes else preset.features_stage
    shape = (preset.encoder.channels, preset.encoder.image_size)
    network = FeatureNetwork(*shape, name="codes" if codes else preset.feature_network).to(device)
    classes = min(preset.feature_classes, source.num_classes)
    head = nn.Sequential(nn.GELU(), nn.Linear(network.dimension, classes)).to(device)
    parts: list[tuple[nn.Module, float]] = [(network, 1.0), (head, 1.0)]
    if redraw:
        pixels = shape[0] * shape[1] ** 2
        picture = nn.Sequential(nn.Linear(network.dimension, 512), nn.GELU(), nn.Linear(512, pixels)).to(device)
        parts.append((picture, 1.0))
    loop = Loop(name, parts, config, out, preset.precision)
    if not loop.done:
        seed = own_seed(turn + (7700 if codes else preset.seed + 1000) + loop.step)
        batches = stream(source, config.tasks, config.images, seed, classes)

        def loss(step: int) -> tuple[Tensor, dict]:
            levels, labels = next(batches)
            images = from_levels(levels.to(device)).flatten(0, 1)
            labels = labels.to(device).repeat_interleave(config.images)
            found = network(images)
            logits = head(found)
            value = F.cross_entropy(logits, labels)
            numbers = {"loss": value.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}
            if redraw:
                error = F.mse_loss(picture(found), images.flatten(1))
                value, numbers = value + redraw * error, {**numbers, "redraw": error.detach()}
            return value, numbers

        loop.run(loss)
    loop.modules.load_state_dict(loop.average)
    return network.eval().requires_grad_(False)


def train_encoder(preset: Preset, source: TaskSource, out: Path, device: str) -> Encoder:
    """Stage 2: prototypes that can still be told apart, and redrawn, under the noise of a release."""
    torch.manual_seed(preset.seed + 1)
    encoder = Encoder(preset.encoder).to(device).train()
    k = preset.encoder.dimension - 1
    pixels = preset.encoder.channels * preset.encoder.image_size**2
    redraw = nn.Sequential(
        nn.Linear(k + 1, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 2 * pixels)
    )
    scale = nn.ParameterDict(
        {"log_scale": nn.Parameter(torch.tensor(2.0)), "log_spread": nn.Parameter(torch.tensor(-4.0))}
    )
    redraw, scale = redraw.to(device), scale.to(device)
    config = preset.encoder_stage
    loop = Loop("encoder", [(encoder, 1.0), (redraw, 1.0), (scale, 10.0)], config, out, preset.precision)
    if not loop.done:
        batches = stream(source, config.tasks, config.images, own_seed(preset.seed + 2000 + loop.step))
        g = torch.Generator().manual_seed(own_seed(preset.seed + 2500 + loop.step))
        queries = max(1, config.images // 5)

        def loss(step: int) -> tuple[Tensor, dict]:
            images = from_levels(next(batches).to(device))
            codes = encoder(images.flatten(0, 1))[:, 1:].unflatten(0, images.shape[:2])
            noise = log_uniform(*preset.encoder_noise, len(images), g).to(device)[:, None]
            mean = codes[:, queries:].mean(1)
            mean = mean + noise * torch.randn(mean.shape, generator=g).to(device)
            shrink = 1 / (1 + noise.square() * torch.exp(-scale["log_spread"]))
            query = codes[:, :queries].flatten(0, 1)
            distance = torch.cdist(query, mean * shrink).square()
            labels = torch.arange(len(images), device=device).repeat_interleave(queries)
            logits = -torch.exp(scale["log_scale"]) * distance * shrink.T
            classify = F.cross_entropy(logits, labels)
            # What the mean says of the set beyond its identity: its mean image and how much it varies, pixel by pixel.
            drawn = redraw(torch.cat([8 * mean * shrink, noise.log()], 1))
            flat = images.flatten(2)
            picture = F.mse_loss(drawn, torch.cat([flat.mean(1), flat.std(1)], 1))
            accuracy = (logits.argmax(1) == labels).float().mean()
            return classify + 3 * picture, {
                "classify": classify.detach(),
                "redraw": picture.detach(),
                "accuracy": accuracy,
            }

        loop.run(loss)
    loop.modules.load_state_dict(loop.average)
    return encoder.eval().requires_grad_(False)


def train_base(preset: Preset, source: TaskSource, out: Path, device: str) -> nn.Module:
    """Stage 3: the denoiser alone."""
    torch.manual_seed(preset.seed + 2)
    base = build_base_model(preset.base).to(device)
    config = preset.base_stage
    loop = Loop("base", [(base, 1.0)], config, out, preset.precision)
    if not loop.done:
        batches = stream(source, config.tasks, config.images, own_seed(preset.seed + 3000 + loop.step))
        g = torch.Generator().manual_seed(own_seed(preset.seed + 3500 + loop.step))

        def loss(step: int) -> tuple[Tensor, dict]:
            value = denoising_loss(base, from_levels(next(batches).to(device)).flatten(0, 1), g).mean()
            return value, {"loss": value.detach()}

        loop.run(loss)
    loop.modules.load_state_dict(loop.average)
    return base


class TaskPool:
    """The tasks in play: images as uint8, embeddings, and a few replaced by fresh ones at every step.

    ``embed``: images (N, C, H, W) -> (N, k); an encoder, for example.
    """

    def __init__(
        self, preset: Preset, embed: Callable[[Tensor], Tensor], source: TaskSource, seed: int, device: str
    ) -> None:
        at_once = preset.fresh_tasks or 12
        self.fresh = preset.fresh_tasks > 0
        self.batches: Iterator[tuple[Tensor, Tensor]]
        if device == "cpu":  # in the background too, on a second core, if there is one
            self.batches = stream(source, at_once, preset.pool_images, seed, embed=embed)
        else:  # a GPU is faster than that
            drawn = stream(source, at_once, preset.pool_images, seed)
            self.batches = ((images, embedded(embed, images, device)) for images in drawn)
        channels, size = preset.encoder.channels, preset.encoder.image_size
        shape = (preset.pool_tasks, preset.pool_images)
        self.images = torch.empty(*shape, channels, size, size, dtype=torch.uint8)
        with torch.no_grad():
            k = embed(torch.zeros(1, channels, size, size, device=device)).shape[1]
        self.codes = torch.empty(*shape, k)
        self.next = 0
        for _ in progress_bar(range(-(-preset.pool_tasks // at_once)), desc="filling the pool"):
            self._replace()

    def refresh(self) -> None:
        """Replace the oldest tasks, if the bank is not a fixed one."""
        if self.fresh:
            self._replace()

    def _replace(self) -> None:
        images, codes = next(self.batches)
        rows = (self.next + torch.arange(len(images))) % len(self.images)
        self.next = int(rows[-1]) + 1
        self.images[rows] = images
        self.codes[rows] = codes

    def draw_codes(
        self, preset: Preset, tasks: int, queries: int, g: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query images (T, Q, ...), embeddings of others (T, S, k), set sizes (T,), noise std of their sums (T,)."""
        rows = torch.randperm(len(self.images), generator=g)[:tasks]
        order = torch.rand(tasks, self.images.shape[1], generator=g).argsort(1)
        images = self.images[rows[:, None], order[:, :queries]]
        sizes = log_uniform(*preset.set_size, tasks, g).round()
        codes = self.codes[rows[:, None], order[:, queries:]]
        return images, codes, sizes, log_uniform(*preset.mean_noise, tasks, g) * sizes

    def draw(
        self, preset: Preset, tasks: int, queries: int, g: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query images (T, Q, ...), simulated noisy sums (T, k) and their noise levels (T,)."""
        images, codes, sizes, noise_std = self.draw_codes(preset, tasks, queries, g)
        return images, *simulate_sums(codes, sizes, noise_std, g)


def adapted_loss(base: nn.Module, adapter: Adapter, images: Tensor, g: torch.Generator) -> Tensor:
    """Mean denoising loss of query images (T, Q, ...) under their tasks' adapters."""
    with apply_adapters(base, adapter):
        return denoising_loss(base, images.flatten(0, 1), g).mean()


def joint_loss(
    preset: Preset, base: nn.Module, hypernetwork: HyperNetwork, pool: TaskPool, g: torch.Generator, device: str
) -> tuple[Tensor, dict]:
    """One step of stage 4: the loss under the adapters of simulated sums, some of them switched off."""
    pool.refresh()
    config = preset.joint_stage
    images, codes, sizes, noise_std = pool.draw_codes(preset, config.tasks, config.images, g)
    adapter = hypernetwork.generate(hypernetwork.simulate(codes, sizes, noise_std, g).to(device))
    off = torch.rand(config.tasks, generator=g).to(device) < preset.adapter_off
    factors = {name: (a, b * ~off[:, None, None]) for name, (a, b) in adapter.factors.items()}
    adapter = Adapter(adapter.lora_config, adapter.geometry, factors, adapter.names)
    value = adapted_loss(base, adapter, from_levels(images.to(device)), g)
    return value, {"loss": value.detach()}


def train_joint(
    preset: Preset,
    source: TaskSource,
    held_out: TaskSource,
    base: nn.Module,
    hypernetwork: HyperNetwork,
    out: Path,
    device: str,
) -> tuple[nn.Module, HyperNetwork]:
    """Stage 4: base and hypernetwork together, warmed up, the base at half the rate; tasks fresh throughout."""
    base = base.requires_grad_(True)
    config = preset.joint_stage
    loop = Loop("joint", [(base, 0.5), (hypernetwork, 1.0)], config, out, preset.precision)
    if not loop.done:
        pool = TaskPool(preset, hypernetwork.codes, source, own_seed(preset.seed + 4000 + loop.step), device)
        g = torch.Generator().manual_seed(own_seed(preset.seed + 4500 + loop.step))
        fixed = torch.Generator().manual_seed(preset.seed + 4900)
        unseen = held_out.sample_tasks(4 * config.tasks, config.images + 40, fixed)
        with torch.no_grad():
            parts = unseen[:, config.images :].flatten(0, 1).to(device).split(500)
            codes = torch.cat([hypernetwork.codes(part).cpu() for part in parts]).unflatten(0, (len(unseen), 40))
        sizes = torch.full((len(unseen),), 128.0)
        seen = hypernetwork.simulate(codes, sizes, torch.full((len(unseen),), 3.73), fixed)

        def loss(step: int) -> tuple[Tensor, dict]:
            return joint_loss(preset, base, hypernetwork, pool, g, device)

        def check() -> dict:
            again = torch.Generator().manual_seed(1)
            queries = unseen[:, : config.images].to(device)
            alone = denoising_loss(base, queries.flatten(0, 1), again).mean()
            adapter = hypernetwork.generate(seen.to(device))
            return {
                "held_out": adapted_loss(base, adapter, queries, again.manual_seed(1)),
                "held_out_no_adapter": alone,
            }

        loop.run(loss, check=check)
    loop.modules.load_state_dict(loop.average)
    return base.eval().requires_grad_(False), hypernetwork.eval().requires_grad_(False)


def add_public_tables(folder: Path, source: TaskSource, *, num_tasks: int = 2000) -> None:
    """Write what weights hold besides the trained networks, from public tasks: priors, and cells if they are nested."""
    network = load_pretrained(folder)[1]
    prior.save_priors(folder, network, source.sample_tasks(num_tasks, 12, torch.Generator().manual_seed(4)))
    if isinstance(network, NestedHyperNetwork):
        public_images = source.sample_tasks(num_tasks, 4, torch.Generator().manual_seed(3)).flatten(0, 1)
        write_half(folder / CELLS_FILE, cells.tabulate(network, public_images))
