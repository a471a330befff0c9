"""What rivals share that read the method's own noisy sum and differ in the decoder only.

The private side is the method's, to the letter: the same encoder, the same mechanism, one release, one charge
(`release_noisy_sum`). The public side is training a decoder of simulated noisy sums as `training.train_joint` trains
the hypernetwork: the same tasks in play, set sizes and noise levels, and the same held-out check (`HeldOut`), so that
losses can be compared (`train_decoder`). What a decoder makes of the sum costs no privacy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyperdp_lib import certificate
from hyperdp_lib.artefacts import folder_sha256, library_versions, tensors_sha256
from hyperdp_lib.baselines import controls, dp_training
from hyperdp_lib.certificate import Certificate
from hyperdp_lib.data import InputError, from_levels
from hyperdp_lib.diffusion import denoising_loss
from hyperdp_lib.embedding import Encoder, embed
from hyperdp_lib.hypernetwork import HyperNetwork, simulate_sums
from hyperdp_lib.ledger import LedgerEntry
from hyperdp_lib.public.stages import PRESETS, Loop, Preset, StageConfig, TaskPool, adapted_loss

TaskLoss = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Query images (T, Q, C, H, W) in [-1, 1], noisy sums (T, k), their noise levels (T,), a generator -> loss."""


def check_encoder(hypernetwork: HyperNetwork, numbers: int, sha256: str | None) -> None:
    """Refuse an encoder other than the one a decoder was trained for; ``sha256`` None: only its k ``numbers`` count."""
    encoder = hypernetwork.encoder
    if encoder.config.dimension != numbers:
        raise InputError(f"this decoder reads {numbers} numbers, and the encoder gives {encoder.config.dimension}.")
    if sha256 not in (None, tensors_sha256(encoder.state_dict())):
        raise InputError("this decoder was trained for the sums of another encoder: load the two that belong together.")


def release_noisy_sum(
    private_images: Tensor,
    private_labels: Tensor | None,
    hypernetwork: HyperNetwork,
    *,
    method: str,
    epsilon: float,
    num_private_declared: int,
    delta: float,
    neighboring_relation: str,
    class_names: Sequence[str],
    seed: int | None,
    **hashes: str | None,
) -> tuple[np.ndarray, float, Certificate]:
    """One noisy sum of embeddings (T, k), the standard deviation of its noise, and the certificate that charges it.

    Parameters
    ----------
    private_images : Tensor
        ``(N, C, H, W)`` in [-1, 1], of the encoder's size.
    private_labels : Tensor or None
        ``(N,)`` with values in ``0 .. T - 1``, or ``None`` for one unlabelled class.
    hypernetwork : HyperNetwork
        Its encoder is used; its decoder is not.
    method : str
        Name in the certificate.
    epsilon, delta, neighboring_relation
        The budget; ``epsilon = inf`` adds no noise and is certified as NOT PRIVATE.
    num_private_declared : int
        Public; stated in the certificate where the relation makes it public, used for nothing else.
    class_names : sequence of str
        The public label set, of length T.
    seed : int, optional
        Makes the noise reproducible, and the result a demonstration that is NOT PRIVATE. ``None`` draws it from the
        operating system.
    hashes
        Of the public models, for the certificate.

    Raises
    ------
    InputError
        before anything is drawn, for a budget out of range or images and labels that do not fit.
    """
    config = hypernetwork.encoder.config
    expected = (config.channels, config.image_size, config.image_size)
    if tuple(private_images.shape[1:]) != expected:
        raise InputError(
            f"private_images must have shape (N, {', '.join(map(str, expected))}), as the encoder reads them, "
            f"got {tuple(private_images.shape)}: use data.load_images to make them so."
        )
    names = tuple(class_names)
    if len(set(names)) != len(names):
        raise InputError("class_names must all be different.")
    if num_private_declared < 1:
        raise InputError(f"num_private_declared must be at least 1, got {num_private_declared}.")
    private_rows = dp_training.check_private(private_images, private_labels, names)
    try:
        noiseless = math.isinf(epsilon) and epsilon > 0
        sums = controls.gaussian_sum(epsilon, config.dimension, len(names), delta, neighboring_relation)
        stated: dict[str, Any] = dict(
            method=method,
            epsilon=epsilon,
            num_private=num_private_declared,
            class_names=names if len(names) > 1 else (),
            encoder_sha256=tensors_sha256(hypernetwork.encoder.state_dict()),
            **hashes,
        )
        if noiseless:
            statement = certificate.ledger_certificate(
                (LedgerEntry("other", "one sum of embeddings, without noise", math.inf, 0.0),),
                delta,
                mechanism=certificate.NO_PRIVACY,
                neighboring_relation=neighboring_relation,
                rng=certificate.NO_NOISE,
                **stated,
            )
        else:
            statement = certificate.gaussian_certificate(sums, delta, seeded=seed is not None, **stated)
        noisy_sum, noise_std = controls.noisy_class_sums(
            private_images,
            private_rows,
            hypernetwork.encoder,
            epsilon=epsilon,
            num_classes=len(names),
            delta=delta,
            neighboring_relation=neighboring_relation,
            seed=0 if noiseless and seed is None else seed,  # there is no noise for it to make predictable
        )
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from error
    return noisy_sum, noise_std, statement


@dataclass(frozen=True, eq=False)
class HeldOut:
    """256 held-out tasks, seen through sums of 128 embeddings with noise of std 3.73 (epsilon = 1).

    Drawn as `training.train_joint` draws its own check, so that ``held_out`` means the same here and there.

    Attributes
    ----------
    queries : Tensor
        ``(T, Q, C, H, W)`` in [-1, 1], on which the loss is measured.
    noisy_sums, noise_std : Tensor
        ``(T, k)`` and ``(T,)``.
    """

    queries: Tensor
    noisy_sums: Tensor
    noise_std: Tensor

    @classmethod
    def draw(cls, preset: Preset, encoder: Encoder, tasks: Any) -> HeldOut:
        """Always the same tasks and the same noise for a preset."""
        stage, fixed = preset.joint_stage, torch.Generator().manual_seed(preset.seed + 4900)
        unseen = tasks.sample_tasks(4 * stage.tasks, stage.images + 40, fixed)
        codes = embed(encoder, unseen[:, stage.images :].flatten(0, 1)).unflatten(0, (len(unseen), 40))
        sizes, std = torch.full((len(unseen),), 128.0), torch.full((len(unseen),), 3.73)
        return cls(unseen[:, : stage.images], *simulate_sums(codes, sizes, std, fixed))

    @torch.no_grad()
    def loss(self, task_loss: TaskLoss) -> float:
        """Mean denoising loss; every decoder meets the same noise draws and time steps."""
        again = torch.Generator().manual_seed(1)
        return float(task_loss(self.queries, self.noisy_sums, self.noise_std, again))

    def references(self, base_model: nn.Module, hypernetwork: HyperNetwork) -> dict[str, float]:
        """The same loss of the method itself and of its base model with no adapter."""

        def adapted(queries: Tensor, sums: Tensor, std: Tensor, g: torch.Generator) -> Tensor:
            return adapted_loss(base_model, hypernetwork(sums, std), queries, g)

        def alone(queries: Tensor, sums: Tensor, std: Tensor, g: torch.Generator) -> Tensor:
            return denoising_loss(base_model, queries.flatten(0, 1), g).mean()

        return {"dp_deepsets": round(self.loss(adapted), 5), "base_alone": round(self.loss(alone), 5)}


def train_decoder(
    name: str,
    groups: list[tuple[nn.Module, float]],
    task_loss: TaskLoss,
    encoder: Encoder,
    source: Any,
    out: Path,
    *,
    stage: StageConfig,
    preset: Preset = PRESETS["glyphs"],
    held_out: HeldOut,
    check_loss: TaskLoss | None = None,
) -> Loop:
    """Train on public tasks with simulated noise, to the end or on from the last checkpoint in ``out``.

    Parameters
    ----------
    groups : list of (module, share of the learning rate)
    task_loss : TaskLoss
    source : GlyphTasks
        Public tasks to train on.
    stage : StageConfig
        Steps, tasks a step and queries a task, learning rate, EMA.
    preset : Preset
        Tasks in play, set sizes and noise levels.
    check_loss : TaskLoss, optional
        Without what is for training only, for the check on ``held_out``.

    Returns
    -------
    Loop
        Its modules hold the averaged weights, its history the losses.
    """
    out.mkdir(parents=True, exist_ok=True)
    loop = Loop(name, groups, stage, out)
    if not loop.done:
        pool = TaskPool(preset, encoder, source, preset.seed + 5000 + loop.step, "cpu")
        g = torch.Generator().manual_seed(preset.seed + 5500 + loop.step)

        def loss(step: int) -> tuple[Tensor, dict]:
            pool.refresh()
            queries, noisy_sums, noise_std = pool.draw(preset, stage.tasks, stage.images, g)
            value = task_loss(from_levels(queries), noisy_sums, noise_std, g)
            return value, {"loss": value.detach()}

        def check() -> dict:
            # wall-clock time says little on cores shared with other work; this is of the process since it started
            return {"held_out": held_out.loss(check_loss or task_loss), "cpu_seconds": time.process_time()}

        loop.run(loss, every=min(200, stage.steps), check=check)
    loop.modules.load_state_dict(loop.average)
    loop.modules.eval().requires_grad_(False)
    return loop


def command(module: str, train: Callable[..., Path], arguments: Sequence[str] | None) -> int:
    """The command line of a decoder's public training."""
    parser = argparse.ArgumentParser(prog=f"python -m hyperdp_lib.baselines.{module}")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, and checkpoints/ to resume from")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to see that it runs")
    options = parser.parse_args(arguments)
    print(train(options.out, smoke=options.smoke))
    return 0


def shares(num_images: int, class_names: Sequence[str]) -> Tensor:
    """Labels ``(num_images,)`` of samples: as many of each class, sorted."""
    classes = len(class_names)
    if num_images < 1 or num_images % classes:
        raise InputError(f"num_images must be a multiple of the {classes} classes, got {num_images}.")
    return torch.arange(classes).repeat_interleave(num_images // classes)


def write_manifest(
    folder: Path,
    loop: Loop,
    *,
    name: str,
    module: str,
    title: str,
    idea: str,
    shape: Any,
    public_data: Mapping[str, Any],
    references: Mapping[str, float],
    hashes: Mapping[str, str],
) -> None:
    """``manifest.json`` and ``README.md`` beside the weights that are in the folder already."""
    checksums = {k: v for k, v in folder_sha256(folder).items() if k.endswith((".safetensors", "config.json"))}
    manifest: dict[str, Any] = {
        "name": name,
        "decoder": module,
        "command": f"python -m hyperdp_lib.baselines.{module} --out FOLDER",
        "shape": dataclasses.asdict(shape),
        "public_data": dict(public_data),
        "stage": dataclasses.asdict(loop.config),
        "steps": loop.step,
        "seconds": round(loop.seconds),
        "device": f"CPU ({platform.machine()}), one thread, shared with other work",
        "held_out": {module: loop.history[-1]["held_out"], **references},
        "history": loop.history,
        **hashes,
        "checksums": checksums,
        "versions": library_versions(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    losses = "\n".join(f"| {who} | {value:.4f} |" for who, value in manifest["held_out"].items())
    spent = loop.history[-1].get("cpu_seconds")
    cpu = f" ({spent / 60:.0f} of CPU time)" if spent else ""
    data, digests = manifest["public_data"], "\n".join(f"| `{k}` | `{v}` |" for k, v in sorted(checksums.items()))
    (folder / "README.md").write_text(
        f"""# Weights `{name}`

{title}. {idea}

- **Data.** Public only, as for the weights `glyphs`: {data["shapes"]} shapes of {data["classes"]} classes, no digits.
- **Licence.** {data["licence"]}.
- **Command.** `{manifest["command"]}`: {loop.step} steps of {loop.config.tasks} tasks x {loop.config.images} images,
  {loop.seconds / 60:.0f} minutes of wall-clock time on shared cores, one thread{cpu}; on top of what made `glyphs`,
  whose base model it starts from.
- **Use.** With the encoder of `glyphs`, whose noisy sums it reads. Half precision.

Denoising loss on held-out public tasks (n = 128, epsilon = 1):

| decoder | loss |
|---|---|
{losses}

| file | sha256 |
|---|---|
{digests}
"""
    )
