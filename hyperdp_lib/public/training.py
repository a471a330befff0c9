"""The trained weights of a preset, from nothing to the folder that ships; resumes where it stopped.

The four stages are in `hyperdp_lib.public.stages`. No private data is read here.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn

from hyperdp_lib import data_sets
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import COUNT_COORDINATE, FeatureNetwork
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.nested import NestedHyperNetwork
from hyperdp_lib.pretrained import foundation, resolve, save_pretrained
from hyperdp_lib.public import nested
from hyperdp_lib.public.drawings import DrawingConfig
from hyperdp_lib.public.glyphs import GlyphConfig
from hyperdp_lib.public.images import ImageConfig, save_hashes
from hyperdp_lib.public.photographs import PhotographConfig
from hyperdp_lib.public.stages import (
    PRESETS,
    STAGES,
    Preset,
    StageConfig,
    TaskSource,
    add_public_tables,
    rank,
    train_base,
    train_encoder,
    train_features,
    train_joint,
    wait_for_all,
)


def train(
    preset: str | Preset = "glyphs",
    *,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = True,
    stages: tuple[str, ...] = STAGES,
    seed: int | None = None,
    command: str | None = None,
) -> Path:
    """Train everything of a preset; returns the folder of weights, loadable by ``load_pretrained``.

    Stopped, it continues from its checkpoints when run again. ``stages`` runs some stages only (``base`` and
    ``encoder`` do not need each other and may run side by side); the weights are written after ``joint``.
    ``seed``, of all the training, replaces the preset's; public characters are held out by the data's own.
    ``command`` is what made a preset that has no name, for the model card.
    """
    name = preset if isinstance(preset, str) else "custom"
    if name == "glyphs-nested":
        if device != "cpu" or stages != STAGES:
            raise InputError("glyphs-nested is trained on the CPU, in all its stages: leave --device and stages out.")
        return nested.train_on_glyphs(Path("runs") / name if out is None else Path(out), resume=resume, seed=seed or 0)
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise InputError(f"no preset {preset!r}: choose one of {', '.join([*PRESETS, 'glyphs-nested'])}")
        preset = PRESETS[preset]
    if seed is not None:
        preset = dataclasses.replace(preset, seed=seed)
    device = _join(device)
    out = Path("runs") / name if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for stage in stages:
            (out / f"{stage}.pt").unlink(missing_ok=True)
        wait_for_all()
    settings = json.dumps(asdict(preset), indent=2, default=_plain)
    if (out / "preset.json").exists() and (out / "preset.json").read_text() != settings:
        raise InputError(f"{out} holds the training of another preset or seed: choose another folder with --out")
    (out / "preset.json").write_text(settings)

    source = preset.public_data.tasks()
    if "joint" not in stages:
        alone: dict[str, Callable] = {"features": train_features, "encoder": train_encoder, "base": train_base}
        for stage in stages:
            alone[stage](preset, source, out, device)
        return out / "weights"
    features = train_features(preset, source, out, device)
    encoder = train_encoder(preset, source, out, device)
    base = train_base(preset, source, out, device)
    held_out = preset.public_data.tasks("held_out")
    if preset.nested:
        hypernetwork: HyperNetwork = nested.build(preset, source, encoder, base, out, device)
    else:
        torch.manual_seed(preset.seed + 3)
        hypernetwork = HyperNetwork(encoder, base, preset.hypernetwork).to(device)
    base, hypernetwork = train_joint(preset, source, held_out, base, hypernetwork, out, device)
    if preset.nested:
        assert isinstance(hypernetwork, NestedHyperNetwork)
        nested.tabulate(hypernetwork, base, preset, held_out)
    if rank()[0] == 0:
        features.name += f"-{tensors_sha256(features.state_dict())[:8]}"  # other features than those that ship
        write_weights(name, preset, source, out, base, hypernetwork, features, device, command)
    return out / "weights"


def _join(device: str) -> str:
    """The device of this process; meets the others first, if ``accelerate launch`` or ``torchrun`` started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"))
    return str(state.device)


_SOURCES = {
    "glyphs": GlyphConfig, "drawings": DrawingConfig, "photographs": PhotographConfig, "images": ImageConfig,
}  # fmt: skip


def _plain(value: Any) -> str:
    """What JSON holds of a value that it has no form for: a path, or the type of an object of one's own."""
    return value.as_posix() if isinstance(value, PurePath) else f"{type(value).__module__}.{type(value).__qualname__}"


def source_manifest(public_data: Any) -> dict[str, Any]:
    """What a manifest says of a public source, for `public_source` to make it again; of one's own only its name."""
    kind = next((kind for kind, config in _SOURCES.items() if type(public_data) is config), None)
    if kind is None:
        return {"kind": _plain(public_data)}
    return {"kind": kind, **json.loads(json.dumps(asdict(public_data), default=_plain))}


def public_source(name_or_path: str | Path) -> GlyphConfig | DrawingConfig | PhotographConfig | ImageConfig:
    """What weights, shipped or one's own, were trained on, as their manifest says; no file of images is read.

    Raises
    ------
    InputError
        if the manifest names no public source, an unknown one, or one whose files are not there.
    """
    folder = foundation(resolve(name_or_path))
    told = dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("public_source") or {})
    kind = told.pop("kind", None)
    if kind not in _SOURCES:
        what = "name no public data" if kind is None else f"were trained on a source of one's own ({kind})"
        raise InputError(f"the weights {str(name_or_path)!r} {what}: give their public tasks from Python as tasks=.")
    try:
        config: Any = _SOURCES[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in told.items()})
    except TypeError as error:
        raise InputError(f"the public source in {str(folder / 'manifest.json')!r} is not readable: {error}.") from error
    for needed in getattr(config, "data_sets", ()):
        data_sets.require(needed)
    if isinstance(config, ImageConfig):
        config.require()
    return config


def write_weights(
    name: str,
    preset: Preset,
    source: TaskSource,
    out: Path,
    base: nn.Module,
    hypernetwork: HyperNetwork,
    features: FeatureNetwork,
    device: str,
    command: str | None = None,
) -> None:
    """The folder that ships: base, encoder, hypernetwork, feature network, manifest and model card."""
    import platform

    from hyperdp_lib.artefacts import folder_sha256, library_versions

    folder = out / "weights"
    logs = {}
    for stage in (*STAGES, "codes") if preset.nested else STAGES:
        state = torch.load(out / f"{stage}.pt", weights_only=True)
        config: StageConfig = getattr(preset, f"{stage}_stage")
        logs[stage] = {
            "steps": state["step"],
            "seconds": round(state["seconds"]),
            "images_per_second": round(config.rate(state["step"], state["seconds"])),
            "last": json.loads(state["history"])[-1],
        }
    if name in PRESETS:  # else made from Python, by settings that have no name
        command = f"hyperdp train --preset {name}" + (f" --seed {preset.seed}" if preset.seed else "")
    device_name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU ({platform.machine()})"
    manifest = {
        "name": name,
        "command": command,
        "public_data": json.loads(json.dumps(source.describe(), default=_plain)),
        "public_source": source_manifest(preset.public_data),
        "preset": json.loads(json.dumps(asdict(preset), default=_plain)),
        "device": device_name,
        "stages": logs,
        "count_coordinate": COUNT_COORDINATE,
        "versions": library_versions(),
    }
    if preset.nested:
        assert isinstance(hypernetwork, NestedHyperNetwork)
        manifest |= nested.manifest(hypernetwork)
    save_pretrained(folder, base.cpu(), hypernetwork.cpu(), manifest)
    features.cpu().save(folder / "features.safetensors")
    if isinstance(preset.public_data, ImageConfig):
        save_hashes(folder, preset.public_data)
    add_public_tables(folder, source, num_tasks=min(2000, max(100, 2 * preset.pool_tasks)))
    checksums = {k: v for k, v in folder_sha256(folder).items() if k not in ("README.md", "manifest.json")}
    (folder / "README.md").write_text(model_card(manifest, checksums))


def model_card(manifest: dict, checksums: dict[str, str]) -> str:
    """What the weights are, made of what, by which command."""
    side, channels = (manifest["preset"]["encoder"][key] for key in ("image_size", "channels"))
    own = manifest["public_source"]["kind"] == "images"
    grey = "grey images" if own else "grey images, white on black"
    pixels = f"{side} x {side} " + ("colour images" if channels == 3 else grey)
    pixels += ", each image's contrast stretched" * manifest["public_source"].get("stretch", False)
    limits = manifest["public_data"].get("limits", "Made for single drawn characters and simple drawings")
    rows = "\n".join(
        f"| {stage} | {log['steps']} | {log['seconds'] / 60:.0f} min | {log['images_per_second']} | {log['last']} |"
        for stage, log in manifest["stages"].items()
    )
    sums = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in sorted(checksums.items()))
    joint, base = (manifest["stages"][stage]["images_per_second"] for stage in ("joint", "base"))
    share = joint / max(base, 1)
    minutes = sum(log["seconds"] for log in manifest["stages"].values()) / 60
    made = f"`{manifest['command']}`" if manifest["command"] else "From Python, by the preset in `manifest.json`"
    return f"""# Weights `{manifest["name"]}`

Base denoiser (diffusers `DiTTransformer2DModel`), encoder, hypernetwork and feature network. Public data only.

- **Data.** {manifest["public_data"]["text"]}
- **Licence.** {manifest["public_data"].get("licence", "that of your public images; the source states none")}.
- **Made.** {made} (seed {manifest["preset"]["seed"]}, {minutes:.0f} minutes of stages, {manifest["device"]}).
- **Use.** `hyperdp release IMAGES --weights FOLDER ...`, this folder; {pixels}.
- **Limits.** {limits}. Half precision.

| stage | steps | time | images/s | last log line |
|---|---|---|---|---|
{rows}

With the hypernetwork, training runs at {share:.0%} of the rate of the plain denoiser, drawing of tasks included.

| file | sha256 |
|---|---|
{sums}
"""
