"""Hyper-parameters found on public tasks dressed as private ones, by the same rules for every method.

A *dressed* set takes as many public tasks as there are private classes, with as many images in each, and is
put through the real method at the real budget: no private image is looked at, so tuning costs no privacy.
Candidates are compared by successive halving (Jamieson & Talwalkar 2016): all on a few dressed sets, the
better part on more. The number of steps, hence the noise, is never cut short in the early rounds; fewer sets
are.

`python -m hyperdp_lib.experiments.tuning --out FOLDER` tunes all methods and writes ``FOLDER/comparison.json``, which
`hyperdp_lib.experiments.comparison.compare` reads when it lies beside the weights; each trial is kept in
``FOLDER/trials``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hyperdp_lib import records
from hyperdp_lib.baselines import controls, dp_lora
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.experiments import comparison
from hyperdp_lib.experiments.methods import METHODS, Bench, Settings, public_models_source
from hyperdp_lib.progress import progress_bar


def dressed_as_private(
    tasks: controls.PublicTasks, *, num_classes: int, per_class: int, per_class_test: int, seed: int
) -> tuple[ImageSet, ImageSet]:
    """A public stand-in for a private data set: one task for each class, in training and test images."""
    generator = torch.Generator().manual_seed(seed)
    drawn = tasks.sample_tasks(num_classes, per_class + per_class_test, generator=generator).cpu().float()
    names = tuple(f"class_{index}" for index in range(num_classes))

    def part(images: torch.Tensor) -> ImageSet:
        labels = torch.arange(num_classes).repeat_interleave(images.shape[1])
        return ImageSet(images.flatten(0, 1).contiguous(), labels, names)

    return part(drawn[:, :per_class]), part(drawn[:, per_class:])


# What the random search draws from, besides the configuration in use. ``batch_share`` is the expected batch size over
# the declared number of images that a trainee sees (1: full batches).
SEARCH: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "dp_lora": {
        "mode": ("per_class", "shared"), "r": (1, 4, 8),
        "target_modules": (dp_lora.ATTENTION, dp_lora.ALL_BLOCK_LAYERS),
        "learning_rate": (1e-2, 3e-2, 6e-2, 1e-1), "clip_norm": (0.01, 0.1), "num_steps": (10, 20, 40),
        "noise_draws": (4, 8), "batch_share": (0.25, 1.0),
    },
    "lora_non_private": {
        "r": (4, 8, 16), "learning_rate": (2e-3, 5e-3, 1e-2), "num_steps": (150, 300),
    },
    "dp_ldm": {
        "mode": ("per_class", "shared"), "num_frozen_blocks": (0, 1), "feed_forward": (False, True),
        "learning_rate": (3e-3, 1e-2, 3e-2), "clip_norm": (0.01, 0.1), "num_steps": (20, 40), "noise_draws": (1, 4),
        "batch_share": (0.25, 1.0),
    },
    "dp_mepf": {
        "beta": (0.0, 0.5), "num_steps": (150, 400, 800), "learning_rate": (1e-3, 3e-3, 1e-2), "width": (16, 32),
    },
    "dp_layer_search": {
        "mean_trials": (2.0, 3.0), "shape": (1.0, math.inf), "score_share": (0.1, 0.3), "learning_rate": (1e-2, 3e-2),
        "clip_norm": (0.01, 0.1), "num_steps": (10, 20, 40), "noise_draws": (1, 4), "batch_share": (0.25, 1.0),
    },
    "dp_embedding_sgd": {
        "learning_rate": (0.03, 0.05, 0.1), "clip_norm": (0.3, 1.0), "num_steps": (30, 100), "noise_draws": (1, 4),
        "told_noise": (0.01, 0.02, 0.05), "batch_share": (0.25, 1.0),
    },
    "dp_hybrid": {
        "share": (0.1, 0.5, 0.9), "learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "clip_norm": (0.01, 0.1),
        "num_steps": (10, 20, 40), "noise_draws": (1, 4), "batch_share": (0.25, 1.0),
    },
    "direct_conditioning": {"guidance": (0.8, 0.9, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)},
}  # fmt: skip


KNOBS = {"dp_deepsets": "sampling_steps", "nearest_public": "num_nearest"}
TUNED = ("dp_deepsets", "nearest_public", *SEARCH)


def candidates_for(method: str, start: Settings, count: int, epsilon: float, batch: float) -> list[Settings]:
    """``count`` settings to try for a method, what is in use first; fewer only if it has no more to choose from.

    ``batch`` is the declared number of images of one class.
    """
    if method == "nearest_public":
        return [
            dataclasses.replace(start, num_nearest=m)
            for m in (20, 5, 60, 1, 10, 40, 3, 100, 2, 7, 30, 80)[:count]
        ]
    if method == "dp_deepsets":
        steps = (20, 10, 40, 15, 30, 60, 5, 80, 25, 50, 8, 100)
        return [dataclasses.replace(start, sampling_steps=n) for n in steps[:count]]
    if method not in SEARCH:
        raise InputError(f"{method!r} has nothing to tune.")
    present = start.config(method, epsilon)
    choices = [dict(zip(SEARCH[method], values, strict=True)) for values in itertools.product(*SEARCH[method].values())]
    found = [present]
    for index in np.random.default_rng(list(method.encode())).permutation(len(choices)):
        if len(found) == count:
            break
        chosen = dict(choices[index])
        share = chosen.pop("batch_share", None)
        if share is not None:
            chosen["expected_batch_size"] = math.inf if share == 1.0 else share * batch
        if "r" in chosen:
            chosen["lora_alpha"] = chosen["r"]
        config = dataclasses.replace(present, **chosen)
        if config not in found:
            found.append(config)
    return [start.with_config(method, epsilon, config) for config in found]


def tune(
    method: str,
    candidates: Sequence[Settings],
    bench: Bench,
    tasks: controls.PublicTasks,
    *,
    epsilon: float,
    num_private: int,
    num_classes: int,
    out: str | Path,
    rounds: Sequence[int] = (1, 2, 4),
    keep: float = 1 / 3,
    score: str = "frechet_distance",
    seed: int = 10_000,
) -> Settings:
    """The candidate with the lowest mean score (for ``accuracy`` the highest) on public stand-ins.

    Parameters
    ----------
    candidates : sequence of Settings
        What to compare.  The first wins ties.
    bench : Bench
        Models and budget; its image sets are replaced by dressed ones.
    tasks : PublicTasks
        Must not be those of the retrieval bank, or retrieval finds the very task: use the held-out split.
    num_private, num_classes
        Of the private data this is a rehearsal for; ``num_private`` is a declared, public number.
    out : path
        Folder of trial records; trials found there are not run again.
    rounds : sequence of int
        Dressed sets that each remaining candidate has met by the end of a round.
    keep : float
        Share of the candidates that goes on to the next round (at least one).
    """
    remaining = list(range(len(candidates)))
    if not remaining:
        raise InputError("there is nothing to compare: give one candidate or more.")
    sign = -1.0 if score in ("accuracy", "precision", "recall") else 1.0
    results: dict[int, list[float]] = {index: [] for index in remaining}
    for number, sets in enumerate(rounds):
        for index in progress_bar(remaining, desc=f"tune {method}, round {number + 1}"):
            for number_of_set in range(len(results[index]), sets):
                path = Path(out) / f"{method}_eps{epsilon:g}_candidate{index}_set{number_of_set}.json"
                trial = _trial(method, candidates[index], bench, tasks, epsilon, num_private, num_classes,
                               seed + number_of_set, path)  # fmt: skip
                results[index].append(sign * trial["scores"][score])
        remaining.sort(key=lambda index: float(np.mean(results[index])))
        if number < len(rounds) - 1:
            remaining = remaining[: max(1, round(keep * len(remaining)))]
    return candidates[remaining[0]]


def _trial(
    method: str,
    settings: Settings,
    bench: Bench,
    tasks: controls.PublicTasks,
    epsilon: float,
    num_private: int,
    num_classes: int,
    seed: int,
    path: Path,
) -> dict[str, Any]:
    """One candidate on one dressed set; read from its record if there is one of the same settings."""
    asked = {
        "method": method,
        "epsilon": None if math.isinf(epsilon) else epsilon,
        "num_private": num_private,
        "num_classes": num_classes,
        "seed": seed,
        "settings": json.loads(settings.to_json()),
    }
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in asked} == asked:
            return found
    started, clock = datetime.now(UTC), time.perf_counter()
    own = dataclasses.replace(bench, settings=settings)
    scores = rehearse(
        method, own, tasks, epsilon=epsilon, num_private=num_private, num_classes=num_classes, seed=seed
    )
    trial = {
        **asked, "scores": scores, "seconds": round(time.perf_counter() - clock, 2),
        "provenance": records.provenance(None, bench.device, started),
    }  # fmt: skip
    records.write_atomically(path, json.dumps(trial, indent=1) + "\n")
    return trial


def rehearse(
    method: str,
    bench: Bench,
    tasks: controls.PublicTasks,
    *,
    epsilon: float,
    num_private: int,
    num_classes: int,
    seed: int,
) -> dict[str, Any]:
    """Scores of one method on one public stand-in; parameters as in `tune`.  ``seed`` decides the stand-in."""
    per_class = max(1, num_private // num_classes)
    # a reference for the Fréchet distance needs two images for each feature, in all
    enough = math.ceil(2 * bench.feature_network.dimension / num_classes)
    train, test = dressed_as_private(
        tasks,
        num_classes=num_classes,
        per_class=per_class,
        per_class_test=max(enough, per_class // 4),
        seed=seed,
    )
    if num_classes == 1:  # one class is none: an unlabelled private set
        train, test = ImageSet(train.images), ImageSet(test.images)
    reference = train if per_class >= enough else test
    own = dataclasses.replace(bench, private_train=train, private_test=test, private_reference=reference)
    return own.score(METHODS[method].run(own.fitted(epsilon), epsilon, seed))


def public_bench(hypernetwork: str | Path = "glyphs", *, device: str = "cpu") -> Bench:
    """Models and settings that ship; its image sets are empty, for `rehearse` to fill with public stand-ins."""
    base_model, network, features, settings = comparison.load_models(hypernetwork, None, device)
    nothing = ImageSet(torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long), ("none",))
    name = comparison.weights_name(hypernetwork)
    bank = comparison.bank_source(None, settings, hypernetwork)

    def examples() -> Tensor:
        return comparison.public_images(bank(network.encoder))

    models = public_models_source(base_model, network, examples, device, name)
    return Bench(base_model, network, features, bank, models, nothing, nothing, nothing, settings, device=device)


def held_out_tasks(hypernetwork: str | Path = "glyphs") -> controls.PublicTasks:
    """Held-out tasks of the public data that these weights were trained on: what stand-ins are drawn from."""
    return comparison.public_data(hypernetwork).tasks("held_out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune every method of the comparison for the embedded default, all by the same number of trials."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.experiments.tuning", description=about)
    parser.add_argument("--out", type=Path, required=True, help="folder for comparison.json and the trials")
    parser.add_argument("--methods", nargs="+", default=list(TUNED), choices=TUNED, help="default: all")
    parser.add_argument("--weights", default="glyphs", help="default: glyphs")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 10.0], help="budgets; default: 1 10")
    parser.add_argument("--num-private", type=int, default=1440, help="declared size; default: 1440")
    parser.add_argument("--num-classes", type=int, default=10, help="default: 10")
    parser.add_argument("--trials", type=int, default=12, help="candidates for each method; default: 12")
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[1, 2, 4], help="sets by the end of each round"
    )
    parser.add_argument("--num-images", type=int, default=1000, help="samples for each trial; default: 1000")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    records.require_commit(options.out)
    tasks = held_out_tasks(options.weights)
    bench = public_bench(options.weights, device=options.device)
    shown = bench.settings.num_images
    start = dataclasses.replace(bench.settings, num_images=options.num_images)
    rehearsal: dict[str, Any] = dict(
        num_private=options.num_private,
        num_classes=options.num_classes,
        rounds=options.rounds,
        out=options.out / "trials",
    )
    batch = options.num_private / options.num_classes
    tuned = start
    for method in options.methods:
        for epsilon in (math.inf,) if method == "lora_non_private" else options.epsilon:
            chosen = candidates_for(method, start, options.trials, epsilon, batch)
            best = tune(method, chosen, bench, tasks, epsilon=epsilon, **rehearsal)
            if method in ("dp_deepsets", "nearest_public"):  # one knob each, the same at every budget
                tuned = dataclasses.replace(tuned, **{KNOBS[method]: getattr(best, KNOBS[method])})
                break
            tuned = tuned.with_config(method, epsilon, best.config(method, epsilon))
            records.write_atomically(
                options.out / comparison.SETTINGS_FILE, dataclasses.replace(tuned, num_images=shown).to_json()
            )
    tuned = dataclasses.replace(tuned, num_images=shown)
    records.write_atomically(options.out / comparison.SETTINGS_FILE, tuned.to_json())
    print(tuned.to_json())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
