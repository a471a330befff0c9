"""The results that a reader sees first: one table and one picture in the README, all tables on a page of the book.

``python -m hyperdp_lib.pages.front_page`` writes them from the records. All scores are research metrics, computed
on private data and not differentially private.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from hyperdp_lib import records
from hyperdp_lib.artefacts import write_atomic
from hyperdp_lib.data import InputError
from hyperdp_lib.pages import marks, report, winners

OURS = ("hyperdp", "dp_deepsets_looks_refined")  # the first of them that is on record stands for our method
PLAIN = "dp_deepsets"  # the paper's one noisy sum: what the page of all results compares with
LABELS = {"hyperdp": "HyperDP", "dp_deepsets_looks_refined": "HyperDP (two steps, refined)"}
ROWS = {
    "the paper's one sum": (PLAIN, 1.0),
    "DP-SGD LoRA": ("dp_lora", 1.0),
    "DP-LDM": ("dp_ldm", 1.0),
    "DP-MEPF": ("dp_mepf", 1.0),
    "nearest public data": ("nearest_public", 1.0),
    "LoRA, *not private*": ("lora_non_private", math.inf),
}
RIVALS = ("dp_lora", "dp_ldm", "dp_mepf")
_DISTANCE, _ACCURACY = "frechet_distance", "accuracy"
_LABELLED = 1437
# heading, pair, number of private images, score
COLUMNS = (
    *((f"{report.FEW} unlabelled: {name}", pair, report.FEW, _DISTANCE) for pair, name in report.GLYPH_SETS.items()),
    (f"{_LABELLED:,} labelled digits", report.MAIN_PAIR, _LABELLED, _DISTANCE),
    ("their accuracy", report.MAIN_PAIR, _LABELLED, _ACCURACY),
    (f"{report.FEW} labelled digits", report.MAIN_PAIR, report.FEW, _DISTANCE),
    ("their accuracy", report.MAIN_PAIR, report.FEW, _ACCURACY),
)
PICTURE, PAGE = "book/_static/samples.png", "book/all_results.md"
_START, _END = "<!-- results:start -->", "<!-- results:end -->"
_TILE, _LINE = 64, 4  # pixels of an image on a sheet, and of the line between two
_INTRODUCTION = """\
# All results

Every table of the comparison, written by `make results-table` from the records in `book/results/`. Each record holds
its command.

No private image was trained on, and every search for settings saw public data only
([where private results had a say all the same](#where-private-results-had-a-say)).
Letters that look like a digit, by a fixed list, are left out of the public glyphs. δ = 1e-5, add-or-remove-one, mean ±
standard deviation over seeds; a cell without ± has one seed.

The Fréchet distance is in the features of a small network trained on the same public data. It is not FID, and not
comparable between tables of different public data. It compares 2,000 samples with the private training images.
Downstream accuracy is that of an SVM trained on samples only, tested on real held-out digits. Both are research
metrics: computed on private images and not differentially private.

The [notation](notation.md) says what the methods are, chapters [5](../notebooks/05_private_lora_diffusion.ipynb) and
[6](../notebooks/06_rivals.ipynb) what to doubt.
"""


def table(scores: pd.DataFrame) -> str:
    """The README's table as Markdown: `COLUMNS` by our method and `ROWS`, marked against ours, and what the marks mean.

    Parameters
    ----------
    scores
        From `records.load_records`.
    """
    places = [report.select(scores, pair, num_private=size) for _, pair, size, _ in COLUMNS]
    kinds = [score for *_, score in COLUMNS]
    used = [_first_on_record(place, score) for place, score in zip(places, kinds, strict=True)]
    cells = {"": [report.select(place, pair, method=method, epsilon=1.0)
                  for place, method, (_, pair, *_) in zip(places, used, COLUMNS, strict=True)]}  # fmt: skip
    for name, (method, epsilon) in ROWS.items():
        cells[name] = [place[(place["method"] == method) & (place["epsilon"] == epsilon)] for place in places]
    columns = [
        {name: report.on_record(rows[index], score) for name, rows in cells.items()}
        for index, score in enumerate(kinds)
    ]
    label, *others = sorted(set(used), key=OURS.index)
    after = [{"": "\\*" if method in others else "", **marked}
             for method, marked in zip(used, marks.marks(columns, "", kinds), strict=True)]  # fmt: skip
    lines = [f"| ε = 1 | {' | '.join(heading for heading, *_ in COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, rows in cells.items():
        shown = (report.value(one, score) + more.get(name, "")
                 for one, score, more in zip(rows, kinds, after, strict=True))  # fmt: skip
        lines.append(f"| {' | '.join([name or f'**{LABELS[label]}**', *shown])} |")
    foot = "".join(f" \\* {LABELS[method]}." for method in others)
    return "\n".join([f"{marks.note(LABELS[label])}{foot}", "", *lines])


def headline(scores: pd.DataFrame) -> str:
    """One sentence: our distance on a small unlabelled set at ε = 1, the best rival's, and that without privacy.

    ``scores`` are from `records.load_records`; the set is the first of `report.GLYPH_SETS`.
    """
    pair, name = next(iter(report.GLYPH_SETS.items()))
    place = report.select(scores, pair, num_private=report.FEW)
    ours, free = _first_on_record(place, _DISTANCE), "LoRA, *not private*"

    def told(label: str, method: str, epsilon: float) -> str:
        return f"{label} {report.value(report.select(place, pair, method=method, epsilon=epsilon), _DISTANCE)}"

    rivals = {label: one for label, one in ROWS.items() if one[0] in RIVALS}
    at_one = place[place["epsilon"] == 1.0].groupby("method")["scores.frechet_distance"].mean()
    best = min(rivals, key=lambda label: at_one.get(rivals[label][0], math.inf))
    return (
        f"**{told(LABELS[ours], ours, 1.0)}; the best rival, {told(best, *rivals[best])}; {told(free, *ROWS[free])}.** "
        f"Fréchet distance (lower is better; not FID) on {report.FEW} unlabelled images of {name}, ε = 1, δ = 1e-5, "
        "add-or-remove-one, mean ± standard deviation over seeds."
    )


def _first_on_record(place: pd.DataFrame, score: str) -> str:
    """The first of `OURS` with the score at ε = 1; the last if there is none."""
    at_one = place[place["epsilon"] == 1.0]
    found = (method for method in OURS if len(report.on_record(at_one[at_one["method"] == method], score)))
    return next(found, OURS[-1])


def rivals_sentence(scores: pd.DataFrame) -> str:
    """One sentence: where on record a rival has the best mean distance, ahead of every variant of our method."""
    one_bank = scores[scores["pair"] != report.LOOKALIKE_PAIR]
    found = [one for one in winners.contests(one_bank, _DISTANCE) if one.contested]
    lost = [one for one in found if not winners.is_ours(one.winner)]
    if not lost:
        return f"No rival has the lowest mean distance at any of the {len(found)} places on record."
    places = "; ".join(
        f"{winners.pair_name(one.pair)}, n = {one.num_private:,}, ε = {report.budget(one.epsilon)} "
        f"({report.METHOD_LABELS.get(one.winner, one.winner)})"
        for one in lost
    )
    return (
        f"A rival has the lowest mean distance, below every variant of ours, at {len(lost)} of the {len(found)} places "
        f"on record (private set, number n of images, ε): {places}."
    )


def all_results(scores: pd.DataFrame, pair: str = report.MAIN_PAIR, ours: str = PLAIN) -> str:
    """The page of all results as Markdown: the paper's regime, one small unlabelled set; then two tables of the largest
    number of labelled private images, and one for each smaller number. Others are marked against ``ours``."""
    everything = report.select(scores, pair)
    if everything.empty:
        return f"{_INTRODUCTION}\n*No records of {pair} yet: `hyperdp compare` makes them.*\n"
    *fewer, most = sorted(set(everything["num_private"]))
    chosen = report.select(everything, pair, num_private=most)
    groups: tuple[tuple[str, Mapping[str, str], str], ...] = (
        ("fonts and pen strokes (`glyphs`)", report.GLYPH_SETS, ""),
        ("drawings by people (`drawings`)", report.DRAWING_SETS, f" {report.NUMERALS_NOTE}"),
        ("photographs (`photographs`)", report.PHOTOGRAPH_SETS, ""),
    )
    strict = scores[scores["epsilon"] == 1.0]
    blocks = [
        _INTRODUCTION,
        marks.note(report.METHOD_LABELS[ours]),
        rivals_sentence(scores),
        f"## One unlabelled set of {report.FEW} images, ε = 1",
        *(
            f"Public data: {name}; {report.seeds_range(strict, pairs)[1]} seeds.{note}\n\n"
            f"{report.sets_table(scores, pairs, (1.0,), against=ours)}"
            for name, pairs, note in groups
        ),
        f"## {most:,} labelled digits",
        *(report.score_table(chosen, pair, score, against=ours) for score in (_DISTANCE, _ACCURACY)),
        f"Seeds: {chosen['seed'].nunique()}.",
        *(_few(report.select(everything, pair, num_private=size), size) for size in reversed(fewer)),
    ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _few(scores: pd.DataFrame, size: int) -> str:
    """One table for a small number of private images: a row for each method and budget."""
    lines = [
        f"## {size:,} labelled digits",
        "",
        f"In all, the classes together. Seeds: {scores['seed'].nunique()}.",
        "",
        "| method | ε | downstream accuracy | Fréchet distance |",
        "|---|---:|---:|---:|",
    ]
    for method in report.order(set(scores["method"])):
        for epsilon, cell in scores[scores["method"] == method].groupby("epsilon"):
            lines.append(
                f"| {report.METHOD_LABELS.get(method, method)} | {report.budget(epsilon)} "
                f"| {report.value(cell, _ACCURACY)} | {report.value(cell, _DISTANCE)} |"
            )
    return "\n".join(lines)


def samples(results: str | Path, *, each: int = 2, classes: int = 10) -> NDArray[np.uint8]:
    """The README's picture, `(H, W)`: real digits, then samples of ours and of DP-SGD LoRA at ε = 1, a row for each.

    Read from published sheets (`records.SHEETS`), whose rows are classes. The private set is scikit-learn's digits,
    which are public.

    Parameters
    ----------
    results
        Folder of published records.
    each
        The first so many images of each class are shown.
    """
    rows = []
    for methods, epsilon in ((("real",), None), (OURS, 1.0), (("dp_lora",), 1.0)):
        names = [records.cell_name(report.MAIN_PAIR, method, epsilon, _LABELLED, 0) for method in methods]
        found = [path for name in names if (path := Path(results) / f"{name}.png").is_file()]
        if not found:
            raise InputError(f"no sheet {names[-1]}.png in {results}: publish the records of its method first.")
        with Image.open(found[0]) as sheet:
            pixels = np.asarray(sheet.convert("L"))
        step = _TILE + _LINE
        starts = [(label * step, index * step) for label in range(classes) for index in range(each)]
        tiles = [pixels[top : top + _TILE, left : left + _TILE] for top, left in starts]
        row = np.full((_TILE, len(tiles) * step - _LINE), 128, np.uint8)
        for index, tile in enumerate(tiles):
            row[:, index * step : index * step + _TILE] = tile
        rows += [row, np.full((3 * _LINE, row.shape[1]), 255, np.uint8)]
    return np.concatenate(rows[:-1])


def write(root: str | Path = ".") -> None:
    """Write the README's results between its two markers, the page of all results and the picture.

    Raises
    ------
    InputError
        If the README lacks the markers, or the records lack a sheet of the picture; nothing is written then.
    """
    root = Path(root)
    results = root / "book" / "results"
    readme = (root / "README.md").read_text(encoding="utf-8")
    if _START not in readme or _END not in readme:
        raise InputError(f"README.md has no {_START} ... {_END}: put the two markers where the table belongs.")
    scores = records.load_records(results)
    picture = io.BytesIO()
    Image.fromarray(samples(results)).save(picture, "PNG", optimize=True)
    before, after = readme.split(_START, 1)[0], readme.split(_END, 1)[1]
    (root / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(root / PICTURE, picture.getvalue())
    write_atomic(root / PAGE, all_results(scores).encode())
    write_atomic(root / "README.md", f"{before}{_START}\n{block(scores)}\n{_END}{after}".encode())


def block(scores: pd.DataFrame) -> str:
    """What stands between the README's markers: the table, and where rivals win."""
    return f"{table(scores)}\n\n{rivals_sentence(scores)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results of the README and of the page with all of them."""
    parser = argparse.ArgumentParser(prog="python -m hyperdp_lib.pages.front_page", description=main.__doc__)
    parser.add_argument("--root", default=".", help="folder with README.md and book/results; default: here")
    try:
        write(parser.parse_args(arguments).root)
    except InputError as error:
        print(f"front_page: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
