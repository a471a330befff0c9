"""What does each lever of decoding and release buy, and how much of that is luck of one training?

    HYPERDP_DATA=data python benchmarks/levers.py    # writes book/results/benchmarks/levers.json

The weights that ship, and a second training of them that differs in the seed alone, get the same private sets, the same
levers, alone and together, and the same seeds of noise and samples. The second training of what the levers need, nested
coordinates, is of the coordinates' features, their directions and the hypernetwork for ``glyphs``, whose base model
stays; for ``drawings``, nested from the start, it is of everything:

    hyperdp train --preset glyphs-nested --seed 1 --out runs/nested-seed1
    HYPERDP_DATA=data hyperdp train --preset drawings --seed 1 --out runs/drawings-seed1

The trainings take three quarters of an hour and two hours of a core, the levers two. Records are kept in ``--runs``,
where a stopped run goes on. ``--levers`` measures only those named and keeps what else is in the file. Settings, and
the features that score, are those of the weights that ship, for both. No lever costs privacy: each is another way to
make, or to read, noisy sums at the same budget.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hyperdp_lib import embedding
from hyperdp_lib.experiments import comparison
from hyperdp_lib.pretrained import features_file, resolve
from hyperdp_lib.records import Record, provenance, require_commit, write_atomically
from hyperdp_lib.scores import evaluation

OUT = Path(__file__).resolve().parents[1] / "book" / "results" / "benchmarks" / "levers.json"
EPSILON = 1.0
ONCE, LOOP, CELLS, CELLS_LOOP, STEPS, STEPS_LOOP = LEVERS = tuple(
    f"dp_deepsets_{lever}"
    for lever in ("nested", "nested_refined", "cells", "cells_refined", "looks", "looks_refined")
)
WEIGHTS = {"glyphs": ("glyphs", "runs/nested-seed1/weights"), "drawings": ("drawings", "runs/drawings-seed1/weights")}
# weights, private set, how many of its images, levers; cells where the rule gives more than one; two steps for letters
# and strokes alone, since they were thought of when a second training of drawings was not at hand
SETS = (
    ("glyphs", "digits", 1437, (ONCE, LOOP, STEPS, STEPS_LOOP)),
    ("glyphs", "digits", 128, (ONCE, LOOP, STEPS, STEPS_LOOP)),
    ("glyphs", "digits/3", 128, (ONCE, LOOP, STEPS, STEPS_LOOP)),
    ("glyphs", "digits/all", 128, (ONCE, LOOP, STEPS, STEPS_LOOP)),
    ("glyphs", "digits/all", 1437, (ONCE, LOOP, CELLS, CELLS_LOOP)),
    ("glyphs", "fashion-mnist/T-shirt", 128, (ONCE, LOOP, STEPS, STEPS_LOOP)),
    ("drawings", "mnist", 2048, (ONCE, LOOP)),
    ("drawings", "mnist/3", 128, (ONCE, LOOP)),
    ("drawings", "mnist/all", 128, (ONCE, LOOP)),
    ("drawings", "mnist/all", 512, (ONCE, LOOP, CELLS, CELLS_LOOP)),
    ("drawings", "fashion-mnist/T-shirt", 128, (ONCE, LOOP)),
)


def measure(
    name: str, training: int, private: str, size: int, levers: Sequence[str], runs: Path, seeds: int
) -> list[dict[str, Any]]:
    """One row for each lever, of the first training of the weights or the second; what is on record is read."""
    settings = (resolve(name) / comparison.SETTINGS_FILE).read_text(encoding="utf-8")
    scoring = embedding.FeatureNetwork.from_pretrained(features_file(name))
    pair = f"{name}-{private.replace('/', '-')}" + ("-no-lookalikes" if name == "glyphs" else "")
    made = comparison.compare(
        private, methods=levers, epsilons=[EPSILON], exact=True, seeds=range(seeds), num_private=size,
        hypernetwork=WEIGHTS[name][training], settings=comparison.Settings.from_json(settings),
        feature_network=scoring, pair=pair, out=runs / f"{name}-training{training}",
        command="python benchmarks/levers.py",
    )  # fmt: skip
    records = [Record.from_json(path.read_text(encoding="utf-8")) for path in made]
    about = {"weights": name, "training": training, "set": private, "num_private": size, "features": scoring.name}
    return [{**about, "lever": lever, **summary(r for r in records if r.method == lever)} for lever in levers]


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """Scores of all seeds, and the time of release and decoding; accuracy only where there are labels."""
    records = list(records)
    told: dict[str, Any] = {}
    for score in ("frechet_distance", "accuracy"):
        values = [record.scores.get(score) for record in records]
        if None not in values:
            told[score] = [round(float(value), 4) for value in values]
    told["seconds"] = round(statistics.median(record.seconds["release"] for record in records), 2)
    told["numbers_released"] = records[0].noise_dimension
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of noise and samples; default: 3")
    parser.add_argument("--runs", type=Path, default=Path("runs/levers"), help="records; those there are kept")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=LEVERS, metavar="LEVER", help="default: all")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    require_commit(options.out)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for there is no spread of one")
    started = datetime.now(UTC)
    partly = set(options.levers) != set(LEVERS)
    kept = json.loads(options.out.read_text(encoding="utf-8")) if partly else {"rows": []}
    rows = []
    for name, private, size, levers in SETS:
        for training in range(len(WEIGHTS[name])):
            place = {"weights": name, "training": training, "set": private, "num_private": size}
            found = {row["lever"]: row for row in kept["rows"] if place.items() <= row.items()}
            if asked := [lever for lever in levers if lever in options.levers]:
                made = measure(name, training, private, size, asked, options.runs, options.seeds)
                found |= {row["lever"]: row for row in made}
            rows += [found[lever] for lever in levers]
    content = {
        "epsilon": EPSILON, "delta": 1e-5, "neighboring_relation": "add_or_remove_one", "seeds": options.seeds,
        "label": evaluation.NOT_DP, "rows": rows,
        "provenance": provenance("python benchmarks/levers.py", "cpu", started),
        **({"kept": kept.get("kept", kept["provenance"])} if partly else {}),
    }  # fmt: skip
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
