"""The house figure style, and every figure that more than one page shows.

Functions take plain arrays, tensors in the library's range or the table of `records.load_records`, and return
a matplotlib figure. They draw no random numbers and read no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from . import records, report
from .data import to_uint8

_PALETTE = sns.color_palette("colorblind")
METHOD_COLOURS = {
    "dp_deepsets": _PALETTE[0],
    "dp_deepsets_refined": (0.10, 0.25, 0.55),
    "dp_deepsets_nested": (0.00, 0.55, 0.60),
    "dp_deepsets_nested_refined": (0.00, 0.33, 0.33),
    "dp_deepsets_cells": (0.45, 0.70, 0.25),
    "dp_deepsets_cells_refined": (0.20, 0.40, 0.05),
    "dp_hybrid": _PALETTE[9],
    "dp_lora": _PALETTE[3],
    "dp_ldm": _PALETTE[1],
    "dp_mepf": _PALETTE[4],
    "dp_layer_search": _PALETTE[5],
    "dp_embedding_sgd": _PALETTE[6],
    "direct_conditioning": _PALETTE[8],
    "adapter_mixture": (0.36, 0.17, 0.50),
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
    chosen = report.select(scores, pair)
    steps = []
    for method, private, text in _STEPS:
        rows = report.select(chosen, pair, method=method, epsilon=epsilon if private else math.inf)
        if len(rows):
            steps.append((method, private, f"{text}, ε = {epsilon:g}" if private else text, rows))
    figure, panels = plt.subplots(1, len(show), figsize=(9.6, 0.9 + 0.34 * len(steps)), sharey=True, squeeze=False)
    for axes, score in zip(panels[0], show, strict=True):
        for place, (method, private, _, rows) in enumerate(steps):
            known = rows[f"scores.{score}"].dropna().astype(float)
            if known.empty:
                continue
            mean, spread = known.mean(), known.std() if len(known) > 1 else 0.0
            colour = METHOD_COLOURS.get(method, "0.5")
            axes.barh(place, mean, xerr=spread, color=colour, alpha=1.0 if private else 0.45, height=0.7)
            axes.text(mean + spread, place, f" {report.value(rows, score)}", va="center", fontsize="x-small")
        axes.set_title(report.SCORE_LABELS.get(score, score), fontsize="small")
        axes.margins(x=0.3)
        axes.grid(axis="y", visible=False)
    panels[0][0].set_yticks(range(len(steps)), [text for _, _, text, _ in steps], fontsize="x-small")
    panels[0][0].invert_yaxis()
    return figure


def _tick(epsilon: float) -> str:
    if epsilon == 0:
        return "0\nno private\ndata"
    return "∞\nno noise" if math.isinf(epsilon) else f"{epsilon:g}"
