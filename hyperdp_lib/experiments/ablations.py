"""What does each choice of the public training buy, and what does it cost?

Every variant is the training of the weights ``glyphs`` with one choice changed and all else equal, only shorter: the
schedule of `REFERENCE`. The weights that result are scored as all others are, on the digits without look-alikes; no
choice was made by these scores. Stages that a variant shares with the reference are not trained again, but counted.

    python -m hyperdp_lib.experiments.ablations --out runs/ablations

trains what is missing, a quarter of an hour of one core a variant, resumes where it was stopped, and writes a file for
each variant to ``book/results/ablations``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from hyperdp_lib import embedding, records
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig
from hyperdp_lib.experiments import comparison
from hyperdp_lib.pretrained import features_file
from hyperdp_lib.public.glyphs import GlyphConfig
from hyperdp_lib.public.stages import PRESETS, STAGES, Preset, StageConfig
from hyperdp_lib.public.training import train
from hyperdp_lib.scores import evaluation

RESULTS = Path(__file__).resolve().parents[2] / "book" / "results" / "ablations"
REFERENCE = dataclasses.replace(
    PRESETS["glyphs"],
    encoder_stage=StageConfig(600, 64, 20, 1e-3),
    base_stage=StageConfig(600, 64, 8, 2e-3),
    joint_stage=StageConfig(800, 64, 8, 1.5e-3, 0.995),
)
NO_NOISE = (1e-6, 1e-6)
ATTENTION = r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)"
MODULATION = r"transformer_blocks\.\d+\.norm1\.linear"


@dataclass(frozen=True)
class Variant:
    """One choice changed.

    Attributes
    ----------
    group, text : str
        What is varied, and to what; for the reader.
    changes : mapping
        Fields of `Preset`, whole.
    """

    group: str
    text: str
    changes: Mapping[str, Any]

    def preset(self, reference: Preset = REFERENCE) -> Preset:
        """The reference with the choice changed."""
        return dataclasses.replace(reference, **self.changes)


def _hypernetwork(**changes: Any) -> dict[str, Any]:
    return {"hypernetwork": dataclasses.replace(REFERENCE.hypernetwork, **changes)}


def _joint(**changes: Any) -> dict[str, Any]:
    return {"joint_stage": dataclasses.replace(REFERENCE.joint_stage, **changes)}


VARIANTS: Mapping[str, Variant] = {
    "reference": Variant("reference", "k = 64, r = 4, all layers, fresh tasks, noise simulated", {}),
    "another-seed": Variant("reference", "the same, another training seed", {"seed": 1}),
    "k16": Variant("coordinates", "k = 16", {"encoder": dataclasses.replace(REFERENCE.encoder, dimension=16)}),
    "r1": Variant("rank", "r = 1", _hypernetwork(r=1, lora_alpha=1)),
    "r16": Variant("rank", "r = 16", _hypernetwork(r=16, lora_alpha=16)),
    "attention": Variant("layers", "attention only", _hypernetwork(target_modules=ATTENTION)),
    "modulation": Variant("layers", "adaLN modulation only", _hypernetwork(target_modules=MODULATION)),
    "base-shallow": Variant("base model", "two layers, not four", {"base": BaseModelConfig(num_layers=2)}),
    "hypernetwork-small": Variant("capacity", "a quarter as wide", _hypernetwork(hidden=64, head_width=24)),
    "hypernetwork-large": Variant("capacity", "twice as wide", _hypernetwork(hidden=512, head_width=192)),
    "bank300": Variant("public tasks", "a fixed bank of 300", {"pool_tasks": 300, "fresh_tasks": 0}),
    "bank2048": Variant("public tasks", "a fixed bank of 2,048", {"fresh_tasks": 0}),
    "encoder-noiseless": Variant("noise", "encoder trained without noise", {"encoder_noise": NO_NOISE}),
    "encoder-noiseless-again": Variant(
        "noise", "encoder trained without noise, another training seed", {"encoder_noise": NO_NOISE, "seed": 1}
    ),
    "hypernetwork-noiseless": Variant("noise", "hypernetwork trained without noise", {"mean_noise": NO_NOISE}),
    "joint400": Variant("schedule", "half the joint steps", _joint(steps=400)),
    "joint1600": Variant("schedule", "twice the joint steps", _joint(steps=1600)),
    "no-warm-up": Variant("schedule", "no warm-up of the joint stage", _joint(warm_up=0.0)),
    "single-shapes": Variant("public tasks", "one shape each, none mixed", {"public_data": GlyphConfig(mixed=0.0)}),
}


def run(
    name: str, out: Path, results: Path = RESULTS, *, reference: Preset = REFERENCE, seeds: int = 3, **options: Any
) -> Path:
    """Train one variant, or go on; score it; write its file. ``options`` are `comparison.compare`'s.

    Raises
    ------
    InputError
        if there is no variant of this name.
    """
    if name not in VARIANTS:
        raise InputError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}.")
    path = results / f"{name}.json"
    if path.is_file():
        return path
    records.require_commit(path)
    started = datetime.now(UTC)
    variant = VARIANTS[name]
    preset = variant.preset(reference)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    _share_stages(preset, reference, out, folder)
    weights = train(preset, out=folder)
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    asked: dict[str, Any] = {"private": "digits", "feature_network": scoring, **options}
    made = comparison.compare(
        asked.pop("private"), methods=["dp_deepsets"], epsilons=[1.0], seeds=range(seeds), out=folder / "records",
        hypernetwork=weights, pair=name, command=_command(name), **asked,
    )  # fmt: skip
    cells = [records.Record.from_json(record.read_text(encoding="utf-8")) for record in made]
    manifest = json.loads((weights / "manifest.json").read_text(encoding="utf-8"))
    content = {
        "variant": name, "group": variant.group, "text": variant.text,
        "seconds": {stage: manifest["stages"][stage]["seconds"] for stage in STAGES},
        "held_out_loss": manifest["stages"]["joint"]["last"]["held_out"],
        "seeds": seeds, "num_private": cells[0].num_private, "delta": cells[0].delta,
        "neighboring_relation": cells[0].neighboring_relation, "features": scoring.name,
        "scores": [_scores(cells, epsilon) for epsilon in (1.0, None)], "label": evaluation.NOT_DP,
        "provenance": records.provenance(_command(name), "cpu", started),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    records.write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def _command(name: str) -> str:
    return f"python -m hyperdp_lib.experiments.ablations --out runs/ablations --variants {name}"


def _share_stages(preset: Preset, reference: Preset, out: Path, folder: Path) -> None:
    """Take over the checkpoints of stages that are the same in another variant, if that has them."""

    def decided_by(one: Preset) -> dict[str, tuple]:
        return {
            "features": (one.seed, one.public_data),
            "encoder": (one.seed, one.public_data, one.encoder, one.encoder_noise),
            "base": (one.seed, one.public_data, one.base),
        }

    mine = decided_by(preset)
    for name, variant in VARIANTS.items():
        for stage, settings in decided_by(variant.preset(reference)).items():
            there, here = out / name / f"{stage}.pt", folder / f"{stage}.pt"
            if settings == mine[stage] and there.is_file() and not here.exists():
                shutil.copy2(there, here)


def _scores(cells: Sequence[records.Record], epsilon: float | None) -> dict[str, Any]:
    """Mean and standard deviation over the seeds at one budget; None: no noise."""
    told: dict[str, Any] = {"epsilon": epsilon}
    for score in ("frechet_distance", "accuracy"):
        values = [float(cell.scores[score]) for cell in cells if cell.epsilon == epsilon]
        spread = statistics.stdev(values) if len(values) > 1 else None
        told[score] = {"mean": round(statistics.fmean(values), 4), "sd": None if spread is None else round(spread, 4)}
    return told


def found(results: Path = RESULTS) -> list[dict[str, Any]]:
    """What is on file, in the order of `VARIANTS`."""
    paths = (results / f"{name}.json" for name in VARIANTS)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def table(results: Path = RESULTS) -> str:
    """All variants on file as a Markdown table: what it costs, and what it gives at epsilon = 1 and without noise."""
    lines = [
        "| varied | to | minutes | held-out loss | Fréchet distance, ε = 1 | ∞ | accuracy, ε = 1 | ∞ |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for variant in found(results):
        minutes = sum(variant["seconds"].values()) / 60
        numbers = [
            _told(scores[score], digits)
            for score, digits in (("frechet_distance", 1), ("accuracy", 2))
            for scores in variant["scores"]
        ]
        start = (variant["group"], variant["text"], f"{minutes:.0f}", f"{variant['held_out_loss']:.4f}")
        lines.append(f"| {' | '.join((*start, *numbers))} |")
    if len(lines) == 2:
        return "*No records yet: `python -m hyperdp_lib.experiments.ablations --out runs/ablations`.*"
    return "\n".join(lines)


def _told(value: Mapping[str, float | None], digits: int) -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score what is missing."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.experiments.ablations", description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and weights")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the steps are too small for more
    for name in options.variants:
        print(run(name, options.out, options.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
