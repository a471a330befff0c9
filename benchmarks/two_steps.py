"""One sum or two steps: how near do they come to the mean, how good are the samples, and what is known of labels?

    HYPERDP_DATA=data python benchmarks/two_steps.py    # writes book/results/benchmarks/two_steps.json

Public drawings by people, and held-out glyphs, play the private part; the choices of `hyperdp_lib.two_steps` were made
by these tables. No private image is read. The number of images is known to a tenth, as if it were public.

* ``means``: root mean square error of the mean embedding of 128 images, by share of the first step and reach of the
  second, beside one sum and its posterior mean; one class, or a mixture of all classes of a set;
* ``sampled``: Fréchet distance of samples from all images of the class or set, of which 128 were released: one sum,
  two steps, and without noise;
* ``labels``: accuracy of the release read as a classifier (`hyperdp_lib.classifier`) of ten classes, by images of each:
  one sum; two steps with one centre for all classes, by share of the first; two steps with a centre for each.

Half an hour of a core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transfer import CLASSES, draw

from hyperdp_lib import accounting, data, diffusion, embedding
from hyperdp_lib.baselines import controls
from hyperdp_lib.classifier import Classifier
from hyperdp_lib.measure import measure
from hyperdp_lib.pretrained import features_file, load_pretrained
from hyperdp_lib.prior import Prior, posterior
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.glyphs import GlyphTasks
from hyperdp_lib.records import provenance, require_commit, write_atomically
from hyperdp_lib.scores import evaluation
from hyperdp_lib.two_steps import DEFAULT, TYPICAL, Size, TwoStepsConfig, two_steps

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "two_steps.json"
DELTA, IMAGES, SAMPLES = 1e-5, 128, 500
SHARES, REACHES, EPSILONS = (0.05, 0.1, 0.2, 0.35), (0.5, 0.8, 1.0, 1.3), (0.5, 1.0, 4.0)
SIZES = (12, 48, 144)
ONE, POSTERIOR, TWO, CLEAN = "one sum", "its posterior mean", "two steps", "no noise"
OWN = "own centres"


def sets(count: int) -> Iterator[tuple[str, str, Tensor]]:
    """Kind ("one class" or "mixture"), name and up to 1,000 images of ``count`` classes and mixtures of each source."""
    held_out = GlyphTasks(split="held_out", progress=False)
    for number, task in enumerate(held_out.sample_tasks(count, 1000, torch.Generator().manual_seed(0))):
        yield "one class", f"glyphs {number}", task
    for name in ("quickdraw", "kkanji"):
        source = data.load_named_or_path(name, 16, 1)
        assert source.labels is not None
        g = torch.Generator().manual_seed(7)
        for label in torch.randperm(len(source.class_names or ()), generator=g)[:count].tolist():
            yield "one class", f"{name} {label}", source.images[source.labels == label][:1000]
        for number in range(max(1, count // 3)):
            chosen = torch.randperm(len(source.images), generator=g)[:1000]
            yield "mixture", f"{name} mixture {number}", source.images[chosen]


def one_sum(images: Tensor, network: Any, epsilon: float, seed: int) -> tuple[Tensor, float]:
    """The noisy sum (1, 1 + k) and its noise; ``epsilon`` infinite: none."""
    sums, noise_std = controls.noisy_class_sums(images, None, network.encoder, epsilon=epsilon, seed=seed)
    return torch.as_tensor(sums), noise_std


def both_steps(
    images: Tensor,
    labels: Tensor | None,
    network: Any,
    epsilon: float,
    seed: int,
    config: TwoStepsConfig = DEFAULT,
) -> tuple[Tensor, float]:
    """The same from two steps, a row for each of ten classes if there are labels."""
    course = two_steps(
        network,
        noise_multiplier=accounting.noise_multiplier(epsilon, DELTA),
        num_rows=1 if labels is None else CLASSES,
        size=Size.about(len(images)),
        config=config,
    )
    _, (noisy_sum, noise_std) = measure(images, None if labels is None else labels.numpy(), course, seed=seed)
    return torch.as_tensor(noisy_sum), noise_std


def mean_errors(network: Any, count: int) -> list[dict[str, Any]]:
    """Rows of the table of means."""
    network = network.using(64)
    constant, prior = network.encoder.config.count_coordinate, Prior.shipped(network)
    squares: dict[tuple, list[float]] = {}
    for kind, _, images in progress_bar(list(sets(count)), desc="means"):
        for seed, epsilon in enumerate(EPSILONS):
            mine = images[:IMAGES]
            clean = embedding.embed(network.encoder, mine)[:, 1:].double().mean(0)
            sums, noise_std = one_sum(mine, network, epsilon, seed)
            found = {
                (ONE, None, None): sums[0, 1:] / sums[0, 0] * constant,
                (POSTERIOR, None, None): posterior(sums, noise_std, prior, constant)[0][0],
            }
            for share in SHARES:
                for reach in REACHES:
                    config = TwoStepsConfig(share=share, reach=reach)
                    sums, _ = both_steps(mine, None, network, epsilon, seed, config)
                    found[TWO, share, reach] = sums[0, 1:] / sums[0, 0] * constant
            for which, mean in found.items():
                squares.setdefault((kind, epsilon, *which), []).append(float((mean - clean).square().sum()))
    return [
        {"kind": kind, "epsilon": epsilon, "way": way, "share": share, "reach": reach, "sets": len(values),
         "error": round(math.sqrt(statistics.fmean(values)), 4)}
        for (kind, epsilon, way, share, reach), values in squares.items()
    ]  # fmt: skip


def sample_distances(base_model: Any, network: Any, scoring: Any, count: int, seeds: int) -> list[dict[str, Any]]:
    """Rows of the table of samples."""
    noise_std = controls.noise_std(1.0)
    once, twice = (network.fitting(noise, IMAGES) for noise in (noise_std, TYPICAL * noise_std))
    most = network.using(64)
    rows = []
    for kind, name, images in progress_bar(list(sets(count)), desc="samples"):
        theirs = evaluation.features(scoring, images)
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            g = torch.Generator().manual_seed(seed)
            mine = images[torch.randperm(len(images), generator=g)[:IMAGES]]
            released = {
                ONE: (once, *one_sum(mine, once, 1.0, seed)),
                TWO: (twice, *both_steps(mine, None, twice, 1.0, seed)),
                CLEAN: (most, *one_sum(mine, most, math.inf, seed)),
            }
            for way, (reader, sums, noise) in released.items():
                with torch.no_grad():
                    adapter = reader(sums.float(), noise)
                drawn = diffusion.sample(base_model, adapter, num_images=SAMPLES, generator=g)
                distance = evaluation.frechet_distance(evaluation.features(scoring, drawn), theirs)
                found.setdefault(way, []).append(distance)
        for way, values in found.items():
            rows.append({"kind": kind, "set": name, "way": way, "distance": round(statistics.fmean(values), 2),
                         "standard_deviation": round(statistics.stdev(values), 2)})  # fmt: skip
    return rows


def label_accuracies(network: Any, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table of labels."""
    sources: dict[str, Any] = {"glyphs": GlyphTasks(split="held_out", progress=False)}
    sources |= {name: data.load_named_or_path(name, 16, 1) for name in ("kkanji", "quickdraw", "omniglot")}
    noise_std = controls.noise_std(1.0)
    configs = {f"one centre, share {s:g}": TwoStepsConfig(share_together=s, own_centre=math.inf) for s in SHARES}
    configs[OWN] = TwoStepsConfig(own_centre=0.0)
    cases = [(name, size) for name in sources for size in SIZES if name != "omniglot" or size < 20]  # it has 20 of each
    rows = []
    for name, size in progress_bar(cases, desc="labels"):
        once, twice = (network.fitting(noise, size) for noise in (noise_std, TYPICAL * noise_std))
        found: dict[str, list[float]] = {}
        for seed in range(repetitions):
            images, labels, tests, truth = draw(sources[name], size, seed)
            sums, noise = controls.noisy_class_sums(
                images, labels, once.encoder, epsilon=1.0, num_classes=CLASSES, seed=seed
            )
            read = {ONE: Classifier.of(sums, noise, once)}
            for way, config in configs.items():
                sums, noise = both_steps(images, labels, twice, 1.0, seed, config)
                read[way] = Classifier.of(sums, noise, twice)
            for way, classify in read.items():
                found.setdefault(way, []).append(float((classify(tests) == truth).double().mean()))
        for way, values in found.items():
            error = statistics.stdev(values) / math.sqrt(len(values))
            rows.append({"set": name, "images": size, "way": way, "accuracy": round(statistics.fmean(values), 4),
                         "standard_error": round(error, 4)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=3, help="classes of each source; default: 3")
    parser.add_argument("--seeds", type=int, default=3, help="of samples; default: 3")
    parser.add_argument("--repetitions", type=int, default=10, help="of labels; default: 10")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    if min(options.seeds, options.repetitions) < 2:
        parser.error("--seeds and --repetitions must be at least 2, for there is no spread of one")
    started = datetime.now(UTC)
    base_model, network = load_pretrained("glyphs-nested")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file())
    content = {
        "epsilon": 1.0, "delta": DELTA, "neighboring_relation": "add_or_remove_one", "images": IMAGES,
        "samples": SAMPLES, "seeds": options.seeds, "repetitions": options.repetitions, "classes": CLASSES,
        "features": scoring.name, "label": evaluation.NOT_DP,
        "chosen": dataclasses.asdict(DEFAULT),
        "means": mean_errors(network, 3 * options.sets),
        "labels": label_accuracies(network, options.repetitions),
        "sampled": sample_distances(base_model, network, scoring, options.sets, options.seeds),
        "provenance": provenance("python benchmarks/two_steps.py", "cpu", started),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
