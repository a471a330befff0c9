"""Is what `hyperdp_lib.planning` decides by itself ever worse than the paper's one sum? Measured on public data.

    HYPERDP_DATA=data python benchmarks/plan.py    # writes book/results/benchmarks/plan.json; resumes

Held-out shapes and public drawings by people (Kuzushiji-Kanji, Quick, Draw!) play the private part: one class, a
mixture of ten classes, and ten labelled classes, few images and many. For each: the distance of 500 samples from
all images of the classes (not FID) by the paper's one sum, by the plan decoded once, by the plan as it is, and by the
public model alone. No private image is read. An hour of a core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hyperdp_lib import data, diffusion, embedding
from hyperdp_lib.data import ImageSet
from hyperdp_lib.planning import Plan, plan
from hyperdp_lib.pretrained import Weights, features_file, load_weights
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.glyphs import GlyphTasks
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.releasing import release
from hyperdp_lib.scores import evaluation

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "plan.json"
SOURCES = ("glyphs", "kkanji", "quickdraw")
CASES = {"one class": (32, 128, 512), "mixture": (128, 512, 2048), "ten labelled classes": (128, 1000)}
EPSILONS = (0.25, 1.0, 4.0, 10.0)
DELTA, SAMPLES, CLASSES, MOST = 1e-5, 500, 10, 400
ONE_SUM, ONCE, PLANNED = "one sum", "plan, decoded once", "plan"


class Case(NamedTuple):
    """A public set that plays the private part."""

    source: str
    kind: str
    num_images: int
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.source}, {self.kind}, n = {self.num_images}, epsilon = {self.epsilon:g}, seed {self.seed}"


def classes(source: str, seed: int, count: int) -> list[Tensor]:
    """Up to 400 images (M, 1, 16, 16) of each of ``count`` classes."""
    g = torch.Generator().manual_seed(seed)
    if source == "glyphs":
        return list(GlyphTasks(split="held_out", progress=False).sample_tasks(count, MOST, g))
    found = data.load_named_or_path(source, 16, 1)
    assert found.labels is not None
    rows = [torch.nonzero(found.labels == label)[:, 0] for label in range(len(found.class_names or ()))]
    large = [mine for mine in rows if len(mine) >= MOST // 4]
    chosen = [large[i] for i in torch.randperm(len(large), generator=g)[:count].tolist()]
    return [found.images[mine[torch.randperm(len(mine), generator=g)[:MOST]]] for mine in chosen]


def drawn(case: Case) -> tuple[ImageSet, Tensor]:
    """The set to release, and all images that its samples should be like."""
    count = 1 if case.kind == "one class" else CLASSES
    parts = classes(case.source, case.seed, count)
    g = torch.Generator().manual_seed(case.seed + 100)
    images, labels = torch.cat(parts), torch.arange(count).repeat_interleave(torch.tensor([len(p) for p in parts]))
    order = torch.randperm(len(images), generator=g)[: case.num_images]
    if len(order) < case.num_images:  # of one class, or of all there are: with repetition
        order = torch.cat([order, torch.randint(len(images), (case.num_images - len(order),), generator=g)])
    if case.kind != "ten labelled classes":
        return ImageSet(images[order]), images
    return ImageSet(images[order], labels[order], tuple(map(str, range(count)))), images


def measured(case: Case, weights: Weights, scoring: Any) -> dict[str, Any]:
    """Distances of one case, and what the plan was."""
    private, everything = drawn(case)
    theirs = evaluation.features(scoring, everything)

    def distance(images: Tensor) -> float:
        return round(evaluation.frechet_distance(evaluation.features(scoring, images), theirs), 2)

    made: Plan = plan(weights, epsilon=case.epsilon, delta=DELTA, class_names=private.class_names)
    ways = {ONE_SUM: made.using("one_sum"), ONCE: dataclasses.replace(made, refined=False), PLANNED: made}
    found: dict[str, Any] = {"distances": {}}
    for way, chosen in ways.items():
        one = release(private, chosen, seed=case.seed)
        if way == PLANNED:
            found["sums"] = [entry.description for entry in one.certificate.ledger if entry.private]
            found["numbers"] = int(one.noisy_sum.shape[1])
            found["refined"] = bool(one.certificate.post_processing)
        found["distances"][way] = distance(one.sample(SAMPLES, seed=case.seed, num_steps=10).images)
    g = torch.Generator().manual_seed(case.seed)
    alone = diffusion.sample(weights.base_model, None, SAMPLES, generator=g, num_steps=10)
    found["distances"]["public model alone"] = distance(alone)
    return found


def cases(seeds: int) -> Iterator[Case]:
    """All of them, seed by seed."""
    for seed in range(seeds):
        for epsilon in EPSILONS:
            for kind, sizes in CASES.items():
                for size in sizes:
                    for source in SOURCES:
                        yield Case(source, kind, size, epsilon, seed)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By kind, size and epsilon over sources and seeds: geometric means, as ratios to the paper's one sum."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["num_images"], row["epsilon"]), []).append(row)
    found = []
    for (kind, size, epsilon), mine in groups.items():
        entry: dict[str, Any] = {"kind": kind, "num_images": size, "epsilon": epsilon, "sets": len(mine)}
        for way in (ONCE, PLANNED):
            ratios = [row["distances"][way] / row["distances"][ONE_SUM] for row in mine]
            entry[way] = round(statistics.geometric_mean(ratios), 3)
            entry[f"{way}, worst"] = round(max(ratios), 3)
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="sets of each kind; default: 2")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/plan.jsonl"), help="cases done so far")
    options = parser.parse_args()
    require_commit(options.out)
    started = datetime.now(UTC)
    weights = load_weights("glyphs")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lines = options.checkpoint.read_text(encoding="utf-8").splitlines() if options.checkpoint.is_file() else []
    done = {row["name"]: row for row in map(json.loads, lines)}
    for case in progress_bar(list(cases(options.seeds)), desc="cases"):
        if case.name not in done:
            done[case.name] = {"name": case.name, **case._asdict(), **measured(case, weights, scoring)}
            with options.checkpoint.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[case.name]) + "\n")
    rows = [done[case.name] for case in cases(options.seeds)]
    content = {
        "delta": DELTA, "neighboring_relation": "add_or_remove_one", "samples": SAMPLES, "features": scoring.name,
        "label": evaluation.NOT_DP, "summary": summary(rows), "cases": rows,
        "provenance": provenance("python benchmarks/plan.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
