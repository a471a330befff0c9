"""The chapter's tables that are read from files: formulas against simulation, and trained hypernetworks.

The files are made by one command each, which a table that finds none of them names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperdp_lib.data import InputError
from hyperdp_lib.pages.theory_verdicts import number
from hyperdp_lib.theory.agreement import table as tabulate


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A Markdown table; columns after the first ``left`` are aligned right.

    >>> print(markdown(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|---:|
    | x | 1 |
    """
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in escaped]
    return "\n".join([lines[0], f"|{'|'.join(marks)}|", *lines[1:]])


def learned_networks(folder: str | Path, *, elsewhere: bool = False) -> str:
    """Markdown table of ``learned.json``: what training reached, beside the closed form.

    Only where each network was trained; ``elsewhere``: only at other budgets and sizes, or within a range.
    """
    path = Path(folder) / "learned.json"
    if not path.is_file():
        return missing(path, "python -m hyperdp_lib.theory.learned --out book/results/theory/learned.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        _learned_row(row, line)
        for row in document["rows"].values()
        for line in row["summary"]
        if elsewhere != (_trained_for(row) == (line["epsilon"], line["num_private"]))
    ]
    header = ["encoder", "public tasks", "d, k", "k'", "trained for", "ε", "n", "learned risk", "Theorem 1, known U",
              "Theorem 1, learned V", "ratio"]  # fmt: skip
    return markdown(header, rows, left=2)


def missing(path: Path, command: str) -> str:
    """What to say instead of a table."""
    return f"*Nothing on record in {path.name}. Make it with* `{command}`"


def _learned_row(row: dict[str, Any], line: dict[str, Any]) -> list[str]:
    settings = row["settings"]
    config, world = settings["config"], settings["setting"]
    tasks, deviation = config["num_public_tasks"], line["deviation_over_seeds"]
    spread = f" ± {deviation:.4f}" if deviation is not None else ""
    eigenvectors = line.get("closed_form_eigenvectors")
    return [
        config["encoder"],
        "fresh" if tasks is None else f"{tasks:,}",
        f"{world['d']}, {world['k']}",
        str(config["dimension"] or world["k"]),
        f"ε {_span(settings['epsilon'])}, n {_span(settings['num_private'])}",
        "∞" if line["epsilon"] is None else f"{line['epsilon']:g}",
        f"{line['num_private']:,}",
        f"{line['risk']:.4f}{spread}",
        number(line["closed_form"]),
        "–" if eigenvectors is None else number(eigenvectors),
        f"{line['ratio']:.2f}",
    ]


def _trained_for(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["settings"]["epsilon"], row["settings"]["num_private"]


def _span(value: float | list[float]) -> str:
    return f"{value[0]:g} to {value[1]:g}" if isinstance(value, list) else f"{value:g}"


def agreement(folder: str | Path) -> str:
    """Markdown table of the comparisons made by `theory.agreement`: ratios formula / simulation over whole grids."""
    try:
        comparisons = tabulate(folder)
    except InputError:
        return missing(Path(folder), "python -m hyperdp_lib.theory.agreement")
    rows = [
        [
            row["title"], row["tolerance"], f"{row['points']}", f"{row['median_ratio']:.3f}",
            f"{row['min_ratio']:.2f} to {row['max_ratio']:.2f}", f"{row['max_abs_z']:.1f}", f"{row['outside']}",
        ]
        for row in comparisons.to_dict("records")
    ]  # fmt: skip
    header = ["formula", "accepted ratio", "points", "median", "all", "largest |z|", "outside"]
    return markdown(header, rows, left=2)
