"""Make the records of the chapter on audits: ``python -m hyperdp_lib.auditing --out book/results/audit``.

Audits of the release at several budgets, of DP-SGD in one run each, every check on every mutant, every check on the
intact pipeline a hundred times, and attacks on what is released. A file that is there is not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hyperdp_lib import auditing, records
from hyperdp_lib.auditing import attacks, canaries, inversion
from hyperdp_lib.progress import progress_bar

# Each of (method, epsilon, releases): training is dear, so the rivals have fewer releases, half of them shadows.
MEMBERSHIP = (
    ("dp_deepsets", 1.0, 192),
    ("dp_deepsets", 10.0, 192),
    ("dp_deepsets", math.inf, 192),
    ("dp_lora", 1.0, 80),
    ("dp_lora", 10.0, 80),
    ("lora_non_private", math.inf, 80),
)
# (images in a set, sets, epsilon)
INVERSION = tuple((n, sets, epsilon) for n, sets in ((1, 128), (8, 32)) for epsilon in (1.0, 10.0, math.inf))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every claim stands, every mutant is caught and the intact pipeline never flagged; else 1."""
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.auditing", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("book/results/audit"), help="default: %(default)s")
    parser.add_argument("--trials", type=int, default=200_000, help="of each audit; default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=100, help="of the intact pipeline; default: %(default)s")
    options = parser.parse_args(arguments)
    records.require_commit(options.out)

    def audits() -> list[dict[str, Any]]:
        cells = [(e, r) for e in (0.5, 1.0, 4.0) for r in ("add_or_remove_one", "replace_one")]
        found = []
        for epsilon, relation in progress_bar(cells, desc="audit"):
            started = time.perf_counter()
            made = auditing.audit(epsilon, trials=options.trials, neighboring_relation=relation)
            found.append({**made.to_plain(), "seconds": round(time.perf_counter() - started, 1)})
        return found

    def one_run() -> list[dict[str, Any]]:
        return [
            canaries.audit_dp_sgd(epsilon, expected_batch_size=size).to_plain()
            for epsilon in (1.0, 4.0, 16.0)
            for size in (math.inf, 100.0)
        ]

    def intact() -> dict[str, Any]:
        alarms = [
            [name for name, finding in auditing.inspect().items() if finding.broken]
            for _ in progress_bar(range(options.repetitions), desc="intact")
        ]
        return {"repetitions": options.repetitions, "flagged": sum(map(bool, alarms)), "alarms": sum(alarms, [])}

    parts: dict[str, Callable[[], Any]] = {
        "release": audits,
        "dp_sgd": one_run,
        "mutants": lambda: auditing.inspect_all(progress=True),
        "intact": intact,
        "inversion": lambda: [inversion.invert(e, num_private=n, sets=sets) for n, sets, e in INVERSION],
    }
    for method, epsilon, count in MEMBERSHIP:
        game = attacks.Game(shadows=count // 2, trials=count // 2)
        parts[f"membership_{method}_eps{epsilon:g}"] = functools.partial(attacks.membership, method, epsilon, game=game)
    for name, make in parts.items():
        path = options.out / f"{name}.json"
        if path.exists():
            continue
        started = datetime.now(UTC)
        result = make()
        origin = records.provenance(started=started)
        records.write_atomically(path, json.dumps({"result": result, "provenance": origin}, indent=1) + "\n")
    made = {name: json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))["result"] for name in parts}
    intact_first, *broken = made["mutants"].values()
    games = [made[name] for name in parts if name.startswith("membership")]
    fine = all(one["passed"] for one in (*made["release"], *made["dp_sgd"], *made["inversion"], *games))
    return 0 if fine and not intact_first and all(broken) and made["intact"]["flagged"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
