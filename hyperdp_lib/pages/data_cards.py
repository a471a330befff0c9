"""Tables of data sets and originals, and records of the duplicate check -> Markdown for the page of data cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyperdp_lib.data_sets import DATA_SETS, TEST_EVERY, is_split_by_rule
from hyperdp_lib.public.originals import ORIGINALS

PAIRS = ("glyphs-digits", "drawings-mnist", "drawings-fashion", "tinyimagenet-cifar10")


def card(name: str) -> str:
    """What the tables say of a data set: counts, format, source, licence, originals and their hashes, commands.

    >>> print(card("mnist").splitlines()[2])
    | images | 60,000 for training, 10,000 for test |
    """
    data_set = DATA_SETS[name]
    train, test = data_set.counts
    colour = "colour" if data_set.channels == 3 else "grey, white on black"
    rule = f" (every {TEST_EVERY}th of a class)" if is_split_by_rule(name) else ""
    rows = {
        "images": f"{train:,} for training, {test:,} for test{rule}",
        "format": f"{data_set.side} x {data_set.side}, {colour}",
        "names": f"`{name}`, `{name}-test`; file `{data_set.file}`",
        "source": f"<{data_set.homepage}>",
        "licence": data_set.licence,
    }
    if data_set.caveat:
        rows["caveat"] = data_set.caveat
    originals = ORIGINALS.get(name, ())
    if originals:
        hashes = [f"`{one.file}` {_hash(one.known_hash)}" for one in originals]
        rows["originals"] = "<br>".join(hashes)
        rows["made by"] = "<br>".join(f"`python data_scripts/{verb}.py {name} --dest data`" for verb in _VERBS)
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


_VERBS = ("download", "prepare")


def _hash(known_hash: str | None) -> str:
    return f"({known_hash})" if known_hash else "(no published hash: trusted on first use, then pinned)"


def duplicate_records(folder: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the records of the duplicate check that are there, in the order of the pairs."""
    for name in PAIRS:
        path = Path(folder) / f"{name}.json"
        if path.is_file():
            yield name, json.loads(path.read_text(encoding="utf-8"))


def duplicates_table(folder: str | Path) -> str:
    """One row for each pair and measure; a research metric, not DP."""
    records = dict(duplicate_records(folder))
    if not records:
        return "*No records yet: `python data_scripts/check_duplicates.py` makes them.*"
    head = ("pair", "by", "threshold", "near a public one", "near another private one", "public one is nearer")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 4]
    for name, record in records.items():
        for one in record["likenesses"]:
            shares = (one[key] for key in ("match_rate", "control_rate", "nearer_to_public"))
            cells = (name, one["measure"], f"{one['threshold']:.2f}", *(f"{share:.1%}" for share in shares))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def duplicates_sentences(folder: str | Path) -> str:
    """For each pair, what was compared and how many private images are suspects."""
    lines = []
    for name, record in duplicate_records(folder):
        suspects, private = len(record["suspects"]), record["num_private"]
        colour = "colour" if record["channels"] == 3 else "grey"
        lines.append(
            f"- **{name}**: {private:,} private against {record['num_public']:,} public images, {colour}, "
            f"{record['image_size']} x {record['image_size']} pixels. {record['matches_in_all']:,} private images "
            f"have a near public one by every measure; **{suspects:,}** ({100 * suspects / private:.2g}%) are "
            "*suspects*."
        )
    return "\n".join(lines)
