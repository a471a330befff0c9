"""Weights from public images of one's own, sized to the time there is: what ``hyperdp train --public`` does.

Every stage of `public.stages` is tried for a few steps first. So the time that all of them will take is known
before they begin, and a number of minutes can be shared by them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hyperdp_lib.artefacts import write_atomic
from hyperdp_lib.data import InputError, from_levels, to_levels
from hyperdp_lib.diffusion import build_base_model, denoising_loss
from hyperdp_lib.embedding import Encoder, FeatureNetwork
from hyperdp_lib.nested import COORDINATES, NestedEncoder, NestedHyperNetwork
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public import nested, stages, training
from hyperdp_lib.public.images import ImageConfig, settled
from hyperdp_lib.public.stages import Loop, Preset, StageConfig, TaskPool

# Of the time for stages. Decoding is the limit, by a prototype on X-rays: so most goes to base and hypernetwork.
SHARES = {"features": 0.05, "codes": 0.05, "encoder": 0.12, "base": 0.30, "joint": 0.48}
FILLING = 0.05  # of all the time, at most, to fill the pool of tasks
LEAST_STEPS = 20  # of a stage: fewer make nothing
MEASURED = (1, 4)  # steps of the two short runs by whose difference a stage is timed
# Without --minutes: hours of two cores at 28 x 28. Small batches, which learn more from so little time.
PRESET = Preset(
    nested=True,
    feature_network="ownnet",  # a digest of its weights is added
    features_stage=StageConfig(1500, 128, 3, 1e-3),
    encoder_stage=StageConfig(3000, 32, 12, 1e-3),
    base_stage=StageConfig(10_000, 32, 8, 2e-3, 0.999),
    joint_stage=StageConfig(16_000, 32, 8, 1.5e-3, 0.999),
    codes_stage=StageConfig(1500, 128, 3, 1e-3),
    pool_tasks=1536,
    fresh_tasks=4,
)
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Steps of each stage, tasks in the pool, and how long everything will take.

    Attributes
    ----------
    steps : mapping
        Of the stages in `SHARES`.
    seconds : mapping
        Expected, of each stage, of filling the pool (``pool``) and of what is computed at the end (``tables``).
    pool_tasks : int
    minutes : float, optional
        What was asked for.
    """

    steps: Mapping[str, int]
    seconds: Mapping[str, float]
    pool_tasks: int
    minutes: float | None = None

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {duration(value)}" for name, value in self.seconds.items())
        return f"about {duration(sum(self.seconds.values()))} in all: {parts}"


@dataclass(frozen=True)
class Rates:
    """Seconds, as measured: of a step of each stage in `SHARES`; of a task in the pool; of the tables, by pool size."""

    step: Mapping[str, float]
    task: float
    image: float  # drawn and embedded
    forward: float  # of the base model, one image with its adapter

    def tables(self, pool_tasks: int) -> float:
        """Directions, table of losses, priors and cells of `training.add_public_tables`."""
        tasks = min(2000, max(100, 2 * pool_tasks))
        sizes = len(COORDINATES)
        images = tasks * (12 + sizes * 12 + 3 * sizes * 4) + 2 * 256 * 40
        losses = len(nested.NOISE_LEVELS) * sizes * 256 * 8
        clustering = 3 * sizes * tasks * 4 * 5e-4  # k-means of the cells
        return images * self.image + losses * self.forward + clustering


def train_on_images(
    config: ImageConfig,
    *,
    out: str | Path | None = None,
    minutes: float | None = None,
    device: str = "cpu",
    resume: bool = True,
    seed: int | None = None,
    command: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Path:
    """The folder of weights, loadable by `pretrained.load_pretrained`, trained on public images of one's own.

    Base model, encoder, hypernetwork with nested coordinates, priors, cells, scoring features, hashes of the images,
    manifest and model card. Stopped, it continues from its checkpoints when run again with the same settings.

    Parameters
    ----------
    config : ImageConfig
        Which images, and how they are read.
    out : path, optional
        Folder of checkpoints; the weights are in ``out/weights``. Default: ``runs/images``.
    minutes : float, optional
        Time for everything on this machine, from the first step on. Default: stages of a fixed length, hours.
    resume : bool
        False: begin anew.
    seed : int, optional
        Of all the training; default 0. Which groups are held out is the images' own.
    command : str, optional
        What to write on the model card.
    tell : callable, optional
        Is told the expected time before the first step.

    Raises
    ------
    InputError
        Before anything is trained: see `images.ImageTasks`; and if the minutes do not suffice.
    """
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"--minutes must be a positive number, got {minutes:g}; 45 is enough for a first try")
    config = settled(config)
    preset = preset_for(config, seed or 0)
    out = Path("runs") / "images" if out is None else Path(out)
    file = out / PLAN_FILE
    settings = json.loads(json.dumps(dataclasses.asdict(preset)))
    if resume and file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["settings"] != settings or kept["plan"]["minutes"] != minutes:
            raise InputError(
                f"{str(out)!r} holds the training on other images, or with another size, seed or time: choose another "
                "--out, or begin anew with --restart"
            )
        made = Plan(**kept["plan"])
    else:
        made = plan(preset, measure(preset, device), minutes)
        out.mkdir(parents=True, exist_ok=True)
        told = {"settings": settings, "plan": dataclasses.asdict(made)}
        write_atomic(file, (json.dumps(told, indent=2) + "\n").encode())
        if not resume:
            for checkpoint in (*stages.STAGES, "codes"):
                (out / f"{checkpoint}.pt").unlink(missing_ok=True)
            (out / "preset.json").unlink(missing_ok=True)
    tell(f"training in {str(out)!r}, {made}; stopped, it goes on when run again")
    return training.train(sized(preset, made), device=device, out=out, command=command)


def preset_for(config: ImageConfig, seed: int = 0) -> Preset:
    """The models for images of this size: 16 tokens an image up to 32 pixels, 64 above."""
    assert config.size is not None and config.channels is not None
    shape = dict(image_size=config.size, channels=config.channels)
    patch = config.size // (4 if config.size <= 32 else 8)
    return dataclasses.replace(
        PRESET,
        public_data=config,
        encoder=dataclasses.replace(PRESET.encoder, **shape),
        base=dataclasses.replace(PRESET.base, patch_size=patch, **shape),
        seed=seed,
    )


def sized(preset: Preset, made: Plan) -> Preset:
    """The preset with the plan's steps and pool."""
    lengths: dict[str, Any] = {
        f"{name}_stage": dataclasses.replace(getattr(preset, f"{name}_stage"), steps=steps)
        for name, steps in made.steps.items()
    }
    return dataclasses.replace(preset, pool_tasks=made.pool_tasks, **lengths)


def plan(preset: Preset, rates: Rates, minutes: float | None) -> Plan:
    """Steps of each stage: the preset's, or as many as the minutes allow, by `SHARES`.

    Raises InputError if the minutes do not suffice for `LEAST_STEPS` of each.
    """
    steps, pool = {name: getattr(preset, f"{name}_stage").steps for name in SHARES}, preset.pool_tasks
    if minutes is not None:
        steps, pool = _within(preset, rates, minutes)
        if min(steps.values()) < LEAST_STEPS:
            needed = math.ceil(minutes)
            while min(_within(preset, rates, needed)[0].values()) < LEAST_STEPS:
                needed += 1
            raise InputError(
                f"--minutes {minutes:g} are too few on this machine: {needed} are the least for these images, and "
                "hours make better weights"
            )
    expected = {name: steps[name] * rates.step[name] for name in SHARES}
    expected |= {"pool": pool * rates.task, "tables": rates.tables(pool)}
    return Plan(steps, {name: round(value, 1) for name, value in expected.items()}, pool, minutes)


def _within(preset: Preset, rates: Rates, minutes: float) -> tuple[dict[str, int], int]:
    """Steps of each stage, below 1 if there is no time, and tasks in the pool."""
    seconds, least = 60 * minutes, min(preset.pool_tasks, max(preset.joint_stage.tasks, 64))
    pool = min(preset.pool_tasks, max(least, int(FILLING * seconds / rates.task)))
    left = seconds - pool * rates.task - rates.tables(pool)
    return {name: int(share * left / rates.step[name]) for name, share in SHARES.items()}, pool


def measure(preset: Preset, device: str = "cpu") -> Rates:
    """How long steps take here: each stage is run twice for a few steps, on fresh models that are thrown away."""
    source = preset.public_data.tasks()
    encoder = Encoder(preset.encoder).to(device).eval()
    base = build_base_model(preset.base)
    channels, side = preset.encoder.channels, preset.encoder.image_size
    features = FeatureNetwork(channels, side, name="codes").eval()
    g = torch.Generator().manual_seed(preset.seed)
    with torch.no_grad():
        tasks = source.sample_tasks(100, 2, g)
        network = NestedHyperNetwork(
            NestedEncoder(encoder.cpu(), features, *nested.directions(encoder.cpu(), features, tasks)),
            base, preset.hypernetwork,
        ).to(device)  # fmt: skip
    base.to(device)
    count = preset.fresh_tasks or 12
    small = dataclasses.replace(preset, pool_tasks=max(preset.joint_stage.tasks, count))

    def features_stage(one: Preset, out: Path) -> None:
        stages.train_features(one, source, out, device, redraw=nested.REDRAW)

    def joint_stage(one: Preset, out: Path) -> None:
        loop = Loop("joint", [(base.requires_grad_(True), 0.5), (network, 1.0)], one.joint_stage, out, one.precision)
        loop.run(lambda step: stages.joint_loss(one, base, network, pool, g, device), every=one.joint_stage.steps)

    trials: dict[str, Callable[[Preset, Path], Any]] = {
        "features": features_stage,
        "encoder": lambda one, out: stages.train_encoder(one, source, out, device),
        "base": lambda one, out: stages.train_base(one, source, out, device),
        "joint": joint_stage,
    }
    step: dict[str, float] = {}
    # the loop prints its rows, and these are of no training
    with contextlib.redirect_stdout(io.StringIO()):
        pool = TaskPool(small, network.codes, source, preset.seed, device)
        started = time.perf_counter()
        drawn = to_levels(source.sample_tasks(count, preset.pool_images, g))
        stages.embedded(network.codes, drawn, device)
        task = (time.perf_counter() - started) / count
        for name in progress_bar(trials, desc="timing the stages"):
            step[name] = _seconds_per_step(trials[name], name, small)
    step["codes"] = step["features"] * _images(preset.codes_stage) / _images(preset.features_stage)
    with torch.no_grad():
        images = from_levels(drawn.flatten(0, 1)[: preset.joint_stage.tasks].to(device))
        started = time.perf_counter()
        denoising_loss(base, images, g)
        forward = 1.5 * (time.perf_counter() - started) / len(images)  # with an adapter it takes somewhat longer
    return Rates({name: step[name] for name in SHARES}, task, task / preset.pool_images, forward)


def _images(stage: StageConfig) -> int:
    return stage.tasks * stage.images


def _seconds_per_step(run: Callable[[Preset, Path], Any], name: str, preset: Preset) -> float:
    """By the difference of two runs, which leaves out what each takes to start."""
    taken = []
    for steps in MEASURED:
        stage = dataclasses.replace(getattr(preset, f"{name}_stage"), steps=steps)
        changed: dict[str, Any] = {f"{name}_stage": stage}
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            run(dataclasses.replace(preset, **changed), Path(folder))
            taken.append(time.perf_counter() - started)
    few, more = MEASURED
    return max((taken[1] - taken[0]) / (more - few), taken[1] / (20 * more))


def duration(seconds: float) -> str:
    """A time for a reader.

    >>> duration(42), duration(90), duration(7000)
    ('42 s', '2 min', '1.9 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{math.floor(seconds / 60 + 0.5)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
