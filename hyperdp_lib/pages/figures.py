"""The house figure style, and every figure that more than one page shows.

Functions take plain arrays, tensors in the library's range or the table of `records.load_records`, and return
a matplotlib figure. They draw no random numbers and read no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike
from torch import Tensor

from hyperdp_lib import records
from hyperdp_lib.data import to_uint8
from hyperdp_lib.pages import report, winners

_PALETTE = sns.color_palette("colorblind")
METHOD_COLOURS = {
    "hyperdp": (0.00, 0.20, 0.40),
    "dp_deepsets": _PALETTE[0],
    "dp_deepsets_refined": (0.10, 0.25, 0.55),
    "dp_deepsets_nested": (0.00, 0.55, 0.60),
    "dp_deepsets_nested_refined": (0.00, 0.33, 0.33),
    "dp_deepsets_looks": (0.10, 0.65, 0.85),
    "dp_deepsets_looks_refined": (0.05, 0.40, 0.60),
    "dp_deepsets_cells": (0.45, 0.70, 0.25),
    "dp_deepsets_cells_refined": (0.20, 0.40, 0.05),
    "dp_hybrid": _PALETTE[9],
    "dp_lora": _PALETTE[3],
    "dp_ldm": _PALETTE[1],
    "dp_mepf": _PALETTE[4],
    "dp_layer_search": _PALETTE[5],
    "dp_embedding_sgd": _PALETTE[6],
    "direct_conditioning": _PALETTE[8],
    "nearest_public": _PALETTE[2],
    "noisy_class_means": (0.42, 0.42, 0.10),
    "public_only": _PALETTE[7],
    "lora_non_private": (0.15, 0.15, 0.15),
    "real": (0.55, 0.55, 0.55),
}
_MARKERS = "osD^vPX*<>hdpH8"


def house_style() -> None:
    """Set seaborn's and matplotlib's defaults for all figures of the book. Call once per notebook."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind")
    mpl.rcParams.update(
        {
            "figure.figsize": (8.0, 3.6),
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "0.92",
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": "small",
            "xtick.labelsize": "small",
            "ytick.labelsize": "small",
            "legend.fontsize": "small",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "svg.hashsalt": "hyperdp",  # the same figure is the same file
        }
    )


def draw_images(axes: plt.Axes, images: Tensor, *, columns: int, gap: int = 1) -> None:
    """Draw a batch of images as one grid, row by row.

    Parameters
    ----------
    axes
        Drawn into; its frame and ticks are removed.
    images
        `(N, C, H, W)` in [-1, 1], C of 1 or 3.
    columns
        Images in a row; the last row may be short.
    gap
        Pixels between neighbours.
    """
    pixels = to_uint8(images)
    pixels = np.asarray(pixels).reshape(len(pixels), *pixels.shape[1:3], -1)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    axes.imshow(canvas.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_axis_off()


def sample_sheet(
    images: Tensor, labels: Tensor, class_names: Sequence[str], *, per_class: int = 12, title: str = ""
) -> Figure:
    """One row of images per class, the first `per_class` of each.

    Parameters
    ----------
    images, labels
        `(N, C, H, W)` in [-1, 1] and `(N,)`.
    class_names
        One per class, shown to the left of its row.
    """
    figure, rows = plt.subplots(len(class_names), 1, figsize=(0.52 * per_class, 0.53 * len(class_names)), squeeze=False)
    for label, axes in enumerate(rows[:, 0]):
        chosen = images[labels == label][:per_class]
        draw_images(axes, chosen, columns=max(per_class, 1))
        axes.text(-0.02, 0.5, class_names[label], transform=axes.transAxes, ha="right", va="center")
    if title:
        figure.suptitle(title, fontsize="medium", fontweight="bold")
    return figure


def sheets(images_by_title: Mapping[str, Tensor], *, columns: int = 10, width: float = 3.2) -> Figure:
    """Several sample sheets side by side, each under its title."""
    figure, panels = plt.subplots(
        1, len(images_by_title), figsize=(width * len(images_by_title), width * 1.1), squeeze=False
    )
    for axes, (title, images) in zip(panels[0], images_by_title.items(), strict=True):
        draw_images(axes, images, columns=columns)
        axes.set_title(title, fontsize="small")
    return figure


def pictures(pixels_by_title: Mapping[str, np.ndarray], *, columns: int = 2, width: float = 4.6) -> Figure:
    """Finished pictures, such as the sheets saved with records, each under its title; row by row, pixels unchanged.

    Parameters
    ----------
    pixels_by_title
        Title to `(H, W)` or `(H, W, 3)`, as `matplotlib.pyplot.imread` returns it. All of about one shape.
    columns
        Pictures in a row.
    width
        Of each, in inches.
    """
    shape = np.max([pixels.shape[:2] for pixels in pixels_by_title.values()], axis=0)
    columns = min(columns, len(pixels_by_title))
    rows = math.ceil(len(pixels_by_title) / columns)
    height = width * shape[0] / shape[1] + 0.35  # room for the title
    figure, panels = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, (title, pixels) in zip(panels.flat, pixels_by_title.items(), strict=False):
        axes.imshow(pixels, cmap="gray")
        axes.set_title(title, fontsize="small")
    return figure


def scores_against_epsilon(
    scores: pd.DataFrame, pair: str, *, show: Sequence[str] = ("accuracy", "frechet_distance")
) -> Figure:
    """Each score over epsilon, one line per method, bars for one standard deviation over seeds.

    The epsilon axis has one slot per value on record, with the two controls at its ends: 0 (no private data
    seen) and infinity (no noise). Scores missing everywhere are left out.

    Parameters
    ----------
    scores
        From `records.load_records`.
    pair
        E.g. `"glyphs-digits-no-lookalikes"`.
    show
        Score columns, one panel each.
    """
    chosen = report.select(scores, pair)
    slots = sorted(set(chosen["epsilon"]))
    position = {epsilon: index for index, epsilon in enumerate(slots)}
    methods = report.order(set(chosen["method"]))
    figure, panels = plt.subplots(1, len(show), figsize=(4.6 * len(show), 4.4), squeeze=False)
    for axes, score in zip(panels[0], show, strict=True):
        means = records.mean_and_spread(chosen, f"scores.{score}")
        for index, method in enumerate(methods):
            mine = means[means["method"] == method].sort_values("epsilon")
            if mine.empty:
                continue
            shift = 0.04 * (index - (len(methods) - 1) / 2)  # so that error bars do not hide each other
            axes.errorbar(
                [position[epsilon] + shift for epsilon in mine["epsilon"]],
                mine["mean"],
                yerr=mine["std"].fillna(0.0),
                color=METHOD_COLOURS.get(method, "0.5"),
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=6,
                capsize=3,
                linestyle="-" if method == "dp_deepsets" else "--",
                linewidth=2.6 if method == "dp_deepsets" else 1.4,
                zorder=3 if method == "dp_deepsets" else 2,
                label=report.METHOD_LABELS.get(method, method),
            )
        axes.set_xticks(range(len(slots)), [_tick(epsilon) for epsilon in slots])
        axes.set_xlabel("privacy budget ε")
        axes.set_title(report.SCORE_LABELS.get(score, score), fontsize="small")
        if score == "accuracy":
            axes.set_ylim(0.0, 1.0)
    handles: dict[str, Artist] = {}
    for axes in panels[0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = min(4, max(1, len(handles)))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)
    return figure


# from real data down to a private release: method, at the epsilon asked for?, what the step adds
_STEPS = (
    ("real", False, "real held-out images"),
    ("lora_non_private", False, "LoRA trained on the images, not private"),
    ("dp_embedding_sgd", False, "best adapters that the hypernetwork can make, no noise"),
    ("dp_deepsets_cells_refined", False, "cells, decoded in a closed loop, no noise"),
    ("dp_deepsets_cells", False, "cells, decoded once, no noise"),
    ("dp_deepsets_nested_refined", False, "nested coordinates, decoded in a closed loop, no noise"),
    ("dp_deepsets_nested", False, "nested coordinates, decoded once, no noise"),
    ("dp_deepsets_refined", False, "one sum, decoded in a closed loop, no noise"),
    ("dp_deepsets", False, "one sum, decoded once, no noise"),
    ("dp_deepsets_cells_refined", True, "cells, decoded in a closed loop"),
    ("dp_deepsets_cells", True, "cells, decoded once"),
    ("dp_deepsets_looks_refined", True, "nested coordinates in two steps, decoded in a closed loop"),
    ("dp_deepsets_looks", True, "nested coordinates in two steps, decoded once"),
    ("dp_deepsets_nested_refined", True, "nested coordinates, decoded in a closed loop"),
    ("dp_deepsets_nested", True, "nested coordinates, decoded once"),
    ("dp_deepsets_refined", True, "one sum, decoded in a closed loop"),
    ("dp_deepsets", True, "one sum, decoded once"),
)


def waterfall(
    scores: pd.DataFrame, pair: str, epsilon: float, *, show: Sequence[str] = ("frechet_distance", "accuracy")
) -> Figure:
    """Where quality goes between real images and a private release: a bar for each step that is on record.

    Parameters
    ----------
    scores
        From `records.load_records`.
    pair, epsilon
        Which private data, and the budget of the private steps.
    """
    steps = _steps_on_record(report.select(scores, pair), epsilon)
    figure, panels = plt.subplots(1, len(show), figsize=(9.6, 0.9 + 0.34 * len(steps)), sharey=True, squeeze=False)
    for axes, score in zip(panels[0], show, strict=True):
        _draw_steps(axes, steps, score)
        axes.set_title(report.SCORE_LABELS.get(score, score), fontsize="small")
    texts = [f"{text}, ε = {epsilon:g}" if private else text for _, private, text, _ in steps]
    panels[0][0].set_yticks(range(len(steps)), texts, fontsize="x-small")
    panels[0][0].invert_yaxis()
    return figure


def waterfalls(
    scores: pd.DataFrame, epsilon: float, *, score: str = "frechet_distance", columns: int = 2, width: float = 5.6
) -> Figure:
    """`waterfall` for every private data set on record: a panel for each pair and number of private images.

    A panel needs a step above the release (real images, or LoRA without privacy) and a private one. Behind a bar stand
    its mean, the standard deviation over seeds and, in brackets, the number of seeds.

    Parameters
    ----------
    scores
        From `records.load_records`.
    epsilon
        The budget of the private steps.
    score
        One, since a single class has no accuracy.
    columns, width
        Panels in a row, and the width of each in inches.
    """
    falls: dict[tuple[str, int], list[_Step]] = {}
    for place, rows in scores.groupby(["pair", "num_private"]):
        steps = [step for step in _steps_on_record(rows, epsilon) if step[3][f"scores.{score}"].notna().any()]
        if {step[0] for step in steps} & {"real", "lora_non_private"} and any(private for _, private, _, _ in steps):
            falls[place] = steps
    tall = [max(map(len, row)) for row in _in_rows(list(falls.values()), columns)] or [1]
    figure, panels = plt.subplots(
        len(tall), columns, figsize=(width * columns, sum(0.75 + 0.2 * steps for steps in tall)), squeeze=False,
        height_ratios=[0.75 + 0.2 * steps for steps in tall],
    )  # fmt: skip
    for axes in panels.flat[len(falls) :]:
        axes.set_axis_off()
    if not falls:
        panels[0][0].text(0, 0.5, report.no_record(scores, epsilon).strip("*"))
    for number, (axes, ((pair, size), steps)) in enumerate(zip(panels.flat, falls.items(), strict=False)):
        _draw_steps(axes, steps, score, seeds=True)
        features = ", ".join(sorted({str(name) for *_, rows in steps for name in rows["scores.features"].dropna()}))
        axes.set_title(f"{winners.pair_name(pair)}, n = {size:,} [{features}]", fontsize="x-small")
        axes.set_yticks(range(len(steps)), [_short_step(step, epsilon) for step in steps], fontsize="x-small")
        axes.set_ylim(tall[number // columns] - 0.5, -0.5)  # bars of one height in a row of panels
    return figure


_Step = tuple[str, bool, str, pd.DataFrame]  # method, at the budget?, what the step adds, its records


def _steps_on_record(chosen: pd.DataFrame, epsilon: float) -> list[_Step]:
    """Those of `_STEPS` with records among ``chosen``."""
    steps = []
    for method, private, text in _STEPS:
        budget = epsilon if private else math.inf
        rows = chosen[(chosen["method"] == method) & (chosen["epsilon"] == budget)]
        if len(rows):
            steps.append((method, private, text, rows))
    return steps


def _draw_steps(axes: plt.Axes, steps: Sequence[_Step], score: str, *, seeds: bool = False) -> None:
    """A bar for each step; pale without noise."""
    for place, (method, private, _, rows) in enumerate(steps):
        known = rows[f"scores.{score}"].dropna().astype(float)
        if known.empty:
            continue
        mean, spread = known.mean(), known.std() if len(known) > 1 else 0.0
        colour = METHOD_COLOURS.get(method, "0.5")
        axes.barh(place, mean, xerr=spread, color=colour, alpha=1.0 if private else 0.45, height=0.7)
        behind = f" ({len(known)})" if seeds else ""
        axes.text(mean + spread, place, f" {report.value(rows, score)}{behind}", va="center", fontsize="x-small")
    axes.margins(x=0.3)
    axes.grid(axis="y", visible=False)


def _short_step(step: _Step, epsilon: float) -> str:
    """`real held-out images`, `LoRA, not private`, `ours nested, no noise`, `ours, ε = 1`."""
    method, private, _, _ = step
    if winners.is_ours(method):
        return f"{_short(method)}, {f'ε = {epsilon:g}' if private else 'no noise'}"
    return {"real": "real held-out images", "dp_embedding_sgd": "best adapters it can make"}.get(
        method, report.METHOD_LABELS.get(method, method)
    )


def _in_rows(items: Sequence[Any], columns: int) -> list[Sequence[Any]]:
    return [items[start : start + columns] for start in range(0, len(items), columns)]


_PALE = 0.4  # of a colour's strength
# names that fit into a cell of the map
_SHORT = {
    "dp_deepsets": "ours",
    "dp_hybrid": "hybrid",
    "dp_lora": "LoRA",
    "dp_ldm": "LDM",
    "dp_mepf": "MEPF",
    "dp_layer_search": "layers",
    "dp_embedding_sgd": "emb. SGD",
    "direct_conditioning": "direct",
    "nearest_public": "nearest",
}


def winner_map(
    scores: pd.DataFrame,
    predicted: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    simulated: tuple[ArrayLike, ArrayLike] = ((), ()),
    ours: str = "dp_deepsets",
    show: Sequence[str] = ("frechet_distance", "accuracy"),
) -> Figure:
    """Who wins at which budget with how many private images, and beside it the crossover that theory predicts.

    One map per score: a row for each number of private images, in blocks of one private data set, a column for each
    budget on record. A cell names the method with the best mean, out of how many; it is hatched if seeds do not tell
    another one from it, and pale if no rival is on record. The black line is where the best of `winners.DP_SGD`
    overtakes ours; an arrow says that it lies beyond the budgets on record.

    Parameters
    ----------
    scores
        From `records.load_records`.
    predicted
        Label to budgets and numbers of private examples n*, lines of the panel for the linear setting; infinite and
        zero values are left out.
    simulated
        Budgets and n* at which a simulation found the two sides equal.
    ours
        The variant of DP-DeepSets that the line is about.
    show
        Scores, one map each.
    """
    contests = {score: winners.contests(scores, score) for score in show}
    crossed = {score: winners.crossovers(scores, score, ours) for score in show}
    everything = [cell for cells in contests.values() for cell in cells]
    slots = sorted({cell.epsilon for cell in everything})
    heights = {score: _row_heights(contests[score]) for score in show}
    shares = [2.0 + max(heights[score].values(), default=1.0) for score in show]
    tall = max(6.0, 1.4 + 0.36 * sum(shares))
    figure = plt.figure(figsize=(11.6, tall))
    grid = figure.add_gridspec(len(show), 2, width_ratios=[1.75, 1.0], height_ratios=shares)
    for place, score in enumerate(show):
        axes = figure.add_subplot(grid[place, 0])
        _draw_contests(axes, contests[score], heights[score], slots)
        _draw_crossovers(axes, crossed[score], heights[score], slots)
        axes.set_title(f"best {report.SCORE_LABELS.get(score, score)}", fontsize="small")
    _draw_predicted(figure.add_subplot(grid[:, 1] if tall < 9 else grid[0, 1]), predicted, simulated)
    found = report.order({cell.winner for cell in everything})
    handles: list[Artist] = [
        Patch(facecolor=METHOD_COLOURS.get(one, "0.5"), label=f"{_short(one)}: {report.METHOD_LABELS.get(one, one)}")
        for one in found
    ]
    handles.append(Patch(facecolor="0.6", edgecolor="white", hatch="///", label="seeds do not tell another from it"))
    handles.append(Patch(facecolor="0.6", alpha=_PALE, label="pale: no rival on record there"))
    handles.append(Line2D([], [], color="black", linewidth=2.5, label=f"DP-SGD overtakes {_short(ours)}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _row_heights(cells: Sequence[winners.Cell]) -> dict[tuple[str, int], float]:
    """Height of each row: numbers of images upwards, a gap between private data sets for the name of the lower one."""
    heights, height, previous = {}, 0.25, None
    for row in sorted({(cell.pair, cell.num_private) for cell in cells}):
        height += 1.0 if previous in (row[0], None) else 1.75
        heights[row], previous = height, row[0]
    return heights


def _draw_contests(
    axes: plt.Axes, cells: Sequence[winners.Cell], heights: Mapping[tuple[str, int], float], slots: Sequence[float]
) -> None:
    """Cells with their winners; what is not on record is an empty frame."""
    for height in heights.values():
        for column in range(len(slots)):
            frame = (column - 0.48, height - 0.46)
            axes.add_patch(Rectangle(frame, 0.96, 0.92, facecolor="none", edgecolor="0.9", linewidth=0.8))
    for cell in cells:
        x, y = slots.index(cell.epsilon), heights[cell.pair, cell.num_private]
        colour = METHOD_COLOURS.get(cell.winner, (0.5, 0.5, 0.5))
        if not cell.contested:
            colour = tuple(1 - _PALE * (1 - part) for part in colour)
        patch = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="white", linewidth=0)
        patch.set(label=cell.winner, hatch="///" if cell.level else None)
        axes.add_patch(patch)
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.55
        axes.text(
            x, y, f"{_short(cell.winner)}\nof {len(cell.contestants)}", ha="center", va="center", fontsize=6, zorder=7,
            linespacing=0.95, color="black" if light else "white",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    for pair in {pair for pair, _ in heights}:
        top = max(height for (other, _), height in heights.items() if other == pair)
        axes.text(-0.5, top + 0.5, winners.pair_name(pair), va="bottom", fontsize="x-small", fontstyle="italic")
    axes.set_xlim(-0.55, max(len(slots), 1) - 0.45)
    axes.set_ylim(0.4, max(heights.values(), default=1.0) + 1.1)
    axes.set_xticks(range(len(slots)), [f"{epsilon:g}" for epsilon in slots])
    axes.set_yticks(list(heights.values()), [f"{size:,}" for _, size in heights], fontsize="x-small")
    axes.set(xlabel="privacy budget ε", ylabel="private images n")
    axes.grid(visible=False)


def _draw_crossovers(
    axes: plt.Axes,
    crossed: Sequence[winners.Crossover],
    heights: Mapping[tuple[str, int], float],
    slots: Sequence[float],
) -> None:
    """One line through the rows of each private data set."""
    for pair in sorted({one.pair for one in crossed}):
        x: list[float] = []
        y: list[float] = []
        for one in sorted((one for one in crossed if one.pair == pair), key=lambda one: one.num_private):
            height = heights.get((pair, one.num_private))
            if height is None:
                continue
            if math.isinf(one.epsilon) or one.epsilon == 0:
                beyond = math.isinf(one.epsilon)
                at = slots.index(one.budgets[-1]) + 0.5 if beyond else slots.index(one.budgets[0]) - 0.5
                arrow = ">" if beyond else "<"
                axes.plot(at, height, marker=arrow, color="black", markersize=8, clip_on=False, zorder=6)
            else:
                at = float(np.interp(math.log(one.epsilon), np.log(slots), range(len(slots))))
            x += [at, at]
            y += [height - 0.5, height + 0.5]
        for colour, width in (("white", 4.5), ("black", 2.5)):
            axes.plot(x, y, color=colour, linewidth=width, solid_capstyle="butt", clip_on=False, zorder=5)


def _draw_predicted(
    axes: plt.Axes, predicted: Mapping[str, tuple[ArrayLike, ArrayLike]], simulated: tuple[ArrayLike, ArrayLike]
) -> None:
    """Lines of n* over epsilon, with what lies on either side."""
    colours = sns.color_palette("viridis", max(len(predicted), 1))
    for (label, (epsilons, sizes)), colour in zip(predicted.items(), colours, strict=False):
        line = np.array(sizes, float)
        line[~np.isfinite(line) | (line <= 0)] = np.nan
        axes.plot(np.asarray(epsilons, float), line, color=colour, label=label)
    if np.size(simulated[0]):
        axes.plot(*simulated, "o", color="black", markersize=5, label="equal risks in a simulation", zorder=4)
    axes.set(xscale="log", yscale="log", xlabel="privacy budget ε", ylabel="private examples n")
    axes.xaxis.set_major_locator(LogLocator(base=2.0))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_title("theory: n* in the linear setting", fontsize="small")
    sides = "above its line DP gradient\ndescent is ahead,\nbelow it one noisy sum"
    if predicted:
        axes.legend(loc="lower left", fontsize="x-small", title=sides, title_fontsize="x-small")


def _short(method: str) -> str:
    """`ours`, `ours nested`, `LoRA`: a name that fits into a cell."""
    if winners.is_ours(method) and method not in _SHORT:
        return f"ours {method.removeprefix('dp_deepsets_').replace('_refined', '+r')}"
    return _SHORT.get(method, method)


def training_costs(variants: Sequence[Mapping[str, Any]]) -> Figure:
    """Frechet distance at the first budget over the minutes of public training, a labelled point for each variant.

    Labels stand in a column on the right, in the order of the distances and as near to their height as there is room,
    each tied to its point. The distance axis is logarithmic if the largest is four times the smallest.

    Parameters
    ----------
    variants
        As `ablations.found` returns them; the group ``reference`` is drawn black.
    """
    groups = list(dict.fromkeys(["reference", *(variant["group"] for variant in variants)]))
    colours = dict(zip(groups, [(0.0, 0.0, 0.0), *(_PALETTE[i] for i in (0, 1, 2, 4, 3, 9, 7))], strict=False))
    figure, axes = plt.subplots(figsize=(9.4, max(3.6, 1.2 + 0.3 * len(variants))))
    points = []
    for variant in variants:
        minutes = sum(variant["seconds"].values()) / 60
        first = variant["scores"][0]
        points.append((first["frechet_distance"]["mean"], minutes, first["frechet_distance"]["sd"] or 0.0, variant))
    points.sort(key=lambda point: point[:3])
    for distance, minutes, spread, variant in points:
        group = variant["group"]
        axes.errorbar(
            minutes, distance, yerr=spread, color=colours.get(group, (0.5, 0.5, 0.5)),
            marker=_MARKERS[groups.index(group)], markersize=9, markeredgecolor="white", capsize=3, linestyle="none",
            elinewidth=1.4, zorder=3,
        )  # fmt: skip
    if points and points[-1][0] > 4 * points[0][0] > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08, y=0.12)
    axes.autoscale_view()  # now, so that heights can be told
    data_to_axes = axes.transData + axes.transAxes.inverted()
    heights = _spread_out([float(data_to_axes.transform((minutes, distance))[1]) for distance, minutes, *_ in points])
    for height, (distance, minutes, _, variant) in zip(heights, points, strict=True):
        colour = colours.get(variant["group"], (0.5, 0.5, 0.5))
        axes.annotate(
            f"{variant['group']}: {variant['text']}", xy=(minutes, distance), xycoords="data",
            xytext=(1.06, height), textcoords="axes fraction", va="center", fontsize="x-small",
            color=tuple(0.75 * part for part in colour), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5), "shrinkB": 5},
        )  # fmt: skip
    budget = f" at ε = {variants[0]['scores'][0]['epsilon']:g}" if variants else ""
    axes.set(xlabel="minutes of public training", ylabel=f"Fréchet distance{budget} (lower is better)")
    return figure


def _spread_out(heights: Sequence[float]) -> list[float]:
    """Increasing numbers in [0, 1], moved apart as little as a pass up and a pass down need to make room for text."""
    gap = 1 / max(len(heights), 13)
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = top = min(moved[i], top)
        top -= gap
    return moved


def _tick(epsilon: float) -> str:
    if epsilon == 0:
        return "0\nno private\ndata"
    return "∞\nno noise" if math.isinf(epsilon) else f"{epsilon:g}"
