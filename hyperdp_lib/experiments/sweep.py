"""The sweep: every method, budget, size and seed, for every pair of public and private data; one cell, one command.

`workflow/Snakefile` asks this module for the cells of its configuration; Snakemake lives in an environment of its own
and runs each cell as a command of this one. A record is written at once and last, so a cell whose record is there is
done, and whatever stops a sweep costs no more than the cells it was running.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hyperdp_lib import records
from hyperdp_lib.data import InputError
from hyperdp_lib.experiments import comparison


@dataclass(frozen=True)
class Cell:
    """One cell: the name of its record, and what follows ``hyperdp compare`` on the command line, but for ``--out``."""

    record: str
    method: str
    arguments: tuple[str, ...]


def cells(config: Mapping[str, Any]) -> list[Cell]:
    """All cells of a sweep.

    Parameters
    ----------
    config : mapping
        ``pairs``, each with ``name``, ``private`` and ``weights``; and the axes ``methods``, ``epsilons``,
        ``sizes`` and ``seeds``, which a pair may have for itself. A size is a number of private training images or
        ``"all"``; those larger than the data set are left out. Optional: ``options``, a list of further ones of
        ``hyperdp compare``.

    Examples
    --------
    >>> pair = {"name": "glyphs-digits", "private": "digits", "weights": "glyphs"}
    >>> axes = {"methods": ["dp_deepsets", "real"], "epsilons": [1, "inf"], "sizes": [32, 8192, "all"], "seeds": [2]}
    >>> [cell.record for cell in cells({"pairs": [pair], **axes})][:2]
    ['glyphs-digits_dp_deepsets_eps1_n32_seed2.json', 'glyphs-digits_dp_deepsets_epsinf_n32_seed2.json']
    """
    made = [cell for pair in _required(config, "pairs") for cell in _cells_of_pair({**config, **pair})]
    repeated = len(made) - len({cell.record for cell in made})
    if repeated:
        raise InputError(f"{repeated} cells of this sweep have the name of another: give every pair a name of its own.")
    return made


def summary(asked: Iterable[Cell], out: str | Path) -> str:
    """How many cells have their record in a folder: a line for each method, and one in all.

    >>> print(summary([Cell("glyphs-digits_real_epsinf_n32_seed2.json", "real", ())], "/nonexistent"))
    real: 0 of 1
    done: 0 of 1 cells
    """
    done: dict[str, list[bool]] = {}
    for cell in asked:
        done.setdefault(cell.method, []).append((Path(out) / cell.record).is_file())
    lines = [f"{method}: {sum(there)} of {len(there)}" for method, there in done.items()]
    total = [there for of_method in done.values() for there in of_method]
    return "\n".join([*lines, f"done: {sum(total)} of {len(total)} cells"])


def _cells_of_pair(config: Mapping[str, Any]) -> list[Cell]:
    name, private, weights = (str(_required(config, key)) for key in ("name", "private", "weights"))
    epsilons = _axis(config, "epsilons", float)
    train, _, _ = comparison.private_sets(private)
    grid = comparison.grid(
        _axis(config, "methods", str),
        [*epsilons, 0.0],  # the budget of the control that reads no private image: it belongs to every sweep
        exact=True,
        labelled=train.labels is not None,
        weights=comparison.weights_name(weights),
    )
    sizes = {len(train) if size == "all" else size for size in _axis(config, "sizes", _size)}
    shared = ("--private", private, "--weights", weights, "--pair", name, "--exact")
    options = _axis({"options": (), **config}, "options", str)
    made = []
    for seed in _axis(config, "seeds", int):
        for size in sorted(size for size in sizes if size <= len(train)):
            for method, epsilon in grid:
                own = f"--methods {method} --epsilon {epsilon:.12g} --num-private {size} --seed {seed}".split()
                record = f"{records.cell_name(name, method, epsilon, size, seed)}.json"
                made.append(Cell(record, method, (*shared, *own, *options)))
    return made


def _required(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise InputError(f"the configuration of the sweep lacks {key!r}; workflow/config.yaml has an example.")
    return config[key]


def _axis(config: Mapping[str, Any], key: str, kind: Callable[[Any], Any]) -> list[Any]:
    """Values of a list, or of one value that stands for itself."""
    given = _required(config, key)
    try:
        return [kind(value) for value in (given if isinstance(given, (list, tuple)) else [given])]
    except (TypeError, ValueError) as error:
        raise InputError(f"{key!r} of the sweep cannot be read ({error}).") from error


def _size(value: Any) -> int | str:
    if value == "all":
        return "all"
    size = int(value)
    if size < 1:
        raise InputError(f"a size must be at least 1, or all, got {size}.")
    return size


def main(arguments: list[str] | None = None) -> int:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.experiments.sweep", description=about)
    parser.add_argument("config", help="configuration as JSON text; the cells are printed as JSON")
    parser.add_argument("--done-in", metavar="DIR", help="print instead how many cells have their record in DIR")
    chosen = parser.parse_args(arguments)
    try:
        asked = cells(json.loads(chosen.config))
    except InputError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    print(json.dumps([asdict(cell) for cell in asked]) if chosen.done_in is None else summary(asked, chosen.done_in))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
