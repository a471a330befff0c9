"""The figures of the chapter on theory: lines are formulas, dots are simulations with their standard errors.

Functions take plain arrays and return a matplotlib figure. They draw no random numbers and compute no risk. The slider
of the chapter is in `slider`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import ArrayLike

from hyperdp_lib.pages.figures import METHOD_COLOURS
from hyperdp_lib.theory.setting import Array

# The four method names that also occur elsewhere in the book keep their colours.
COLOURS = {
    "dp_deepsets": METHOD_COLOURS["dp_deepsets"],
    "dp_gd": METHOD_COLOURS["dp_lora"],
    "projected_dp_gd": METHOD_COLOURS["nearest_public"],
    "noisy_statistics": METHOD_COLOURS["noisy_class_means"],
    "hybrid": METHOD_COLOURS["dp_mepf"],
    "second_moments": METHOD_COLOURS["dp_layer_search"],
    "bayes_ridge": METHOD_COLOURS["lora_non_private"],
}
LEGEND = {
    "dp_deepsets": "DP-DeepSets",
    "dp_gd": "DP-GD in $\\mathbb{R}^d$",
    "projected_dp_gd": "DP-GD in the public subspace",
    "noisy_statistics": "noisy statistics",
    "hybrid": "hybrid",
    "second_moments": "second moments (leading terms)",
    "bayes_ridge": "not private, no public data (Bayes ridge)",
}
_MARKERS = {"dp_deepsets": "o", "dp_gd": "s", "projected_dp_gd": "D", "hybrid": "^", "noisy_statistics": "v",
            "second_moments": "P"}  # fmt: skip


@dataclass(frozen=True)
class Dots:
    """Simulated risks: where on the x axis, their means and the means' standard errors, arrays of one length."""

    x: ArrayLike
    mean: ArrayLike
    standard_error: ArrayLike


@dataclass(frozen=True)
class Panel:
    """Risks over the number of private examples, for one panel of a figure.

    ``risks`` and ``dots`` are by method name; ``floor`` and ``crossover`` are drawn where given and finite.
    """

    title: str
    sizes: ArrayLike
    risks: Mapping[str, ArrayLike]
    dots: Mapping[str, Dots] = field(default_factory=dict)
    floor: float | None = None
    crossover: float | None = None
    lower_bound: ArrayLike | None = None
    ceiling: float | None = None


def risk_against_epsilon(
    epsilons: ArrayLike,
    risks: Mapping[str, ArrayLike],
    *,
    lower_bound: ArrayLike,
    bayes_ridge: float,
    trivial: float,
    here: float,
    dots: Mapping[str, Dots] | None = None,
) -> Figure:
    """Risk over epsilon; the zone that Theorem 2 forbids without public data is shaded.

    Parameters
    ----------
    epsilons
        Ascending, positive.
    risks
        Method name (of ``COLOURS``) to risks, one per epsilon.
    lower_bound
        Of Theorem 2, one per epsilon.
    bayes_ridge, trivial
        Risk without privacy and public data, and with public data only.
    here
        The chapter's epsilon, marked.
    """
    figure, axes = plt.subplots(figsize=(8.6, 4.9))
    x, bound = np.asarray(epsilons, float), np.asarray(lower_bound, float)
    bottom = 0.55 * min(float(np.min(values)) for values in [*risks.values(), bound, [bayes_ridge]])
    axes.fill_between(x, bottom, bound, color="0.5", alpha=0.16, lw=0)
    zone = Patch(color="0.5", alpha=0.16, label="impossible without public data (Theorem 2)")
    strict = np.maximum(bound, bayes_ridge)
    axes.plot(x, strict, color="0.35", linewidth=1.3, linestyle="--")
    dashed = Line2D(
        [], [], color="0.35", linewidth=1.3, linestyle="--", label="same, or Bayes ridge if larger (approximate)"
    )
    axes.axhline(trivial, color="0.35", linewidth=1.2, linestyle=":")
    axes.text(x[-1], trivial * 1.07, "public data only", ha="right", fontsize="small", color="0.3")
    _mark(axes, here, f"ε = {here:g}")
    lines = _curves(axes, x, risks, dots or {})
    axes.set(xscale="log", yscale="log", xlim=(x[0] / 1.06, x[-1] * 1.06), ylim=(bottom, 1.9 * trivial))
    axes.set(xlabel="privacy budget ε", ylabel="risk $E\\,|\\hat\\theta - \\theta|^2$")
    _plain_ticks(axes.xaxis, [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32], x[0], x[-1])
    figure.legend(handles=[*lines, zone, dashed], loc="outside lower center", ncols=3)
    return figure


def risk_against_n(panels: Sequence[Sequence[Panel]]) -> Figure:
    """A grid of panels, risks over n on logarithmic axes, with the floor and the crossover of each."""
    shape = len(panels), len(panels[0])
    size = (4.4 * shape[1], 3.1 * shape[0] + 0.7)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Line2D] = {}
    for axes, panel in zip(grid.flat, [panel for row in panels for panel in row], strict=True):
        x = np.asarray(panel.sizes, float)
        for line in _curves(axes, x, panel.risks, panel.dots):
            handles[str(line.get_label())] = line
        axes.set(xscale="log", yscale="log", title=panel.title)
        if panel.floor:
            axes.axhline(panel.floor, color=COLOURS["dp_deepsets"], linewidth=1.0, linestyle=":")
            text = {"ha": "left", "va": "top", "fontsize": "x-small", "color": COLOURS["dp_deepsets"]}
            axes.text(x[0], panel.floor * 0.92, "floor γ² + ητ²", **text)
        if panel.crossover and x[0] < panel.crossover < x[-1]:
            axes.axvline(panel.crossover, color="0.3", linewidth=1.0, linestyle="--")
            axes.text(panel.crossover * 1.08, 0.9, "n*", transform=axes.get_xaxis_transform(), fontsize="small")
    for axes in grid[-1]:
        axes.set_xlabel("private examples n")
    for axes in grid[:, 0]:
        axes.set_ylabel("risk")
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=len(handles))
    return figure


def error_budget(epsilons: ArrayLike, parts: Mapping[str, ArrayLike], *, trivial: float) -> Figure:
    """Stacked bars: what the risk of DP-DeepSets consists of at each epsilon.

    ``parts`` maps a name to its share of the risk, one per epsilon, in the order of stacking.
    """
    labels = {
        "misspecification": "outside the subspace, γ²",
        "subspace": "error of the public subspace, ητ²",
        "sampling": "sampling",
        "privacy": "privacy noise",
        "shrinkage": "shrinkage (bias)",
    }
    colours = {"misspecification": "0.55", "subspace": "0.78", "sampling": COLOURS["dp_deepsets"],
               "privacy": COLOURS["dp_gd"], "shrinkage": COLOURS["noisy_statistics"]}  # fmt: skip
    budgets = np.atleast_1d(np.asarray(epsilons, float))
    figure, axes = plt.subplots(figsize=(8.0, 4.0))
    bottom, places = np.zeros(len(budgets)), np.arange(len(budgets))
    for name in labels:
        height = np.broadcast_to(np.asarray(parts[name], float), bottom.shape)
        if (height > 0).any():
            axes.bar(places, height, 0.66, bottom=bottom, color=colours[name], label=labels[name], linewidth=0)
        bottom = bottom + height
    for place, total in zip(places, bottom, strict=True):
        axes.text(
            float(place), float(total), f"{total:.3g}", ha="center", va="bottom", fontsize="x-small", color="0.25"
        )
    axes.set_xticks(places, [f"{budget:g}" for budget in budgets])
    axes.set(xlabel="privacy budget ε", ylabel="risk", ylim=(0, min(1.12 * bottom.max(), 1.15 * trivial)))
    axes.grid(visible=False, axis="x")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def phase_map(
    epsilons: ArrayLike,
    sizes: ArrayLike,
    log_ratio: ArrayLike,
    *,
    certified: ArrayLike,
    crossover: ArrayLike,
    closed_form: ArrayLike,
    here: tuple[float, float],
) -> Figure:
    """Who wins where: log10 of risk of DP-DeepSets over that of tuned DP-GD, blue where DP-DeepSets is better.

    Parameters
    ----------
    epsilons, sizes
        (E,) and (S,), ascending: the axes.
    log_ratio, certified
        (S, E): the colour, and where Theorem 3 proves the win (hatched).
    crossover, closed_form
        (E,): n* by the formulas and in closed form; infinite and zero values are left out.
    here
        The chapter's epsilon and n.
    """
    x, y, ratio = (np.asarray(values, float) for values in (epsilons, sizes, log_ratio))
    figure, axes = plt.subplots(figsize=(8.4, 4.8))
    limit = max(1.0, float(np.abs(ratio).max()))
    levels = np.linspace(-limit, limit, 25)
    filled = axes.contourf(x, y, ratio, levels=levels, cmap="RdBu_r")
    proven = np.asarray(certified, float)
    if proven.any():
        if proven.all():  # a contour needs both sides
            axes.fill_between(x, y[0], y[-1], facecolor="none", edgecolor="0.25", hatch="///", linewidth=0)
        else:
            axes.contourf(x, y, proven, levels=[0.5, 1.5], colors="none", hatches=["///"])
    drawn: list[Artist] = [Patch(facecolor="none", edgecolor="0.25", hatch="///", label="Theorem 3 proves the win")]
    for values, style, label in ((crossover, "-", "n*, formulas"), (closed_form, "--", "n*, closed form")):
        line = np.array(values, float)
        line[~np.isfinite(line) | (line < y[0]) | (line > y[-1])] = np.nan
        (handle,) = axes.plot(x, line, color="black", linestyle=style, linewidth=1.6, label=label)
        drawn.append(handle)
    point = _here(axes, here)
    axes.set(xscale="log", yscale="log", xlabel="privacy budget ε", ylabel="private examples n")
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    _plain_ticks(axes.xaxis, [0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32], x[0], x[-1])
    bar = figure.colorbar(filled, ax=axes, label="log₁₀ risk of DP-DeepSets / risk of DP-GD")
    ticks = [tick for tick in np.arange(-4, 4.5, 0.5) if abs(tick) <= limit]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    figure.legend(handles=[*drawn, point], loc="outside lower center", ncols=4)
    return figure


def clip_curves(
    clips: ArrayLike,
    risks: Mapping[str, ArrayLike],
    *,
    normalised: Mapping[str, float],
    dots: Mapping[str, Dots] | None = None,
    rule: float = 0.5,
) -> Figure:
    """Risk over the clip norm, one curve per budget, with the optimum of each.

    Parameters
    ----------
    clips
        C in units of sqrt(k) sigma_y, ascending and positive.
    risks, normalised, dots
        By label: one risk per clip, the risk of the normalised embedding (the limit of small C), simulations.
    rule
        The rule of thumb, marked.
    """
    figure, axes = plt.subplots(figsize=(8.0, 4.2))
    x = np.asarray(clips, float)
    colours = plt.get_cmap("viridis")(np.linspace(0.08, 0.8, len(risks)))
    for (label, values), colour in zip(risks.items(), colours, strict=True):
        y = np.asarray(values, float)
        axes.plot(x, y, color=colour, label=label)
        axes.plot([x[0] / 1.5, x[0]], [normalised[label], y[0]], color=colour, linestyle=":", linewidth=1.5)
        axes.plot(x[0] / 1.5, normalised[label], marker="<", color=colour, markersize=6)
        best = int(y.argmin())
        at = (x[0] / 1.5, normalised[label]) if normalised[label] <= y[best] else (x[best], y[best])
        axes.plot(*at, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.6)
        _errorbars(axes, (dots or {}).get(label), colour, "o")
    axes.axvline(rule, color="0.4", linewidth=1.0, linestyle="--")
    top = axes.get_xaxis_transform()
    axes.text(rule * 1.05, 0.97, "rule of thumb", transform=top, va="top", fontsize="small", color="0.3")
    axes.set(xscale="log", yscale="log", xlabel="clip norm $C / (\\sqrt{k}\\,\\sigma_y)$   (◁: normalised embedding)")
    axes.set(ylabel="risk")
    low, high = axes.get_ylim()
    _plain_ticks(axes.yaxis, [m * 10.0**p for p in range(-6, 3) for m in (1, 2, 5)], low, high)
    _plain_ticks(axes.xaxis, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20], x[0], x[-1])
    axes.legend(loc="best")
    return figure


def public_data(
    tasks: ArrayLike,
    errors: Mapping[str, ArrayLike],
    *,
    thresholds: Mapping[str, float],
    here: tuple[float, float],
    dots: Mapping[str, Dots] | None = None,
) -> Figure:
    """Subspace error over the number of public tasks, one curve per task size, with the threshold of each.

    ``errors``, ``thresholds`` and ``dots`` are by label; ``here`` is the chapter's number of tasks and its error.
    """
    figure, axes = plt.subplots(figsize=(8.0, 4.2))
    x = np.asarray(tasks, float)
    colours = plt.get_cmap("viridis")(np.linspace(0.8, 0.08, len(errors)))
    for (label, values), colour in zip(errors.items(), colours, strict=True):
        axes.plot(x, values, color=colour, label=label)
        if x[0] < thresholds[label] < x[-1]:
            axes.axvline(thresholds[label], color=colour, linewidth=1.0, linestyle=":")
        _errorbars(axes, (dots or {}).get(label), colour, "o")
    _here(axes, here)
    axes.set(xscale="log", yscale="log", xlabel="public tasks T", ylabel="subspace error η", ylim=(None, 1.6))
    axes.legend(loc="best")
    return figure


def price_of_one_shot(panels: Sequence[Panel]) -> Figure:
    """Risks over n with the subspace known to all: what is left of the advantage when a rival has it too."""
    return risk_against_n([panels])


def _curves(axes: Axes, x: Array, risks: Mapping[str, ArrayLike], dots: Mapping[str, Dots]) -> list[Line2D]:
    """Lines and dots of every method; handles for a legend."""
    handles = []
    for method, values in risks.items():
        ours = method == "dp_deepsets"
        style = {"color": COLOURS[method], "linewidth": 2.6 if ours else 1.7, "zorder": 3 if ours else 2}
        style["linestyle"] = ":" if method == "second_moments" else "-"
        (line,) = axes.plot(x, np.asarray(values, float), label=LEGEND[method], **style)
        _errorbars(axes, dots.get(method), COLOURS[method], _MARKERS.get(method, "o"))
        handles.append(line)
    return handles


def _errorbars(axes: Axes, dots: Dots | None, colour: object, marker: str) -> None:
    if dots is None:
        return
    mean, error = np.asarray(dots.mean, float), np.asarray(dots.standard_error, float)
    lower = np.minimum(error, 0.9 * mean)  # the axis is logarithmic
    axes.errorbar(dots.x, mean, yerr=[lower, error], color=colour, marker=marker, markersize=6, capsize=3,
                  linestyle="none", linewidth=1.1, markeredgecolor="white", markeredgewidth=0.6, zorder=5)  # fmt: skip


def _here(axes: Axes, at: tuple[float, float]) -> Line2D:
    star = {"marker": "*", "markersize": 13, "color": "gold", "markeredgecolor": "black", "linestyle": "none"}
    return axes.plot(*at, label="this chapter", zorder=6, **star)[0]  # type: ignore[arg-type]


def _mark(axes: Axes, x: float, text: str) -> None:
    axes.axvline(x, color="0.3", linewidth=1.0, linestyle=":")
    axes.text(x * 1.03, 0.02, text, transform=axes.get_xaxis_transform(), fontsize="small", color="0.3")


def _plain_ticks(axis: object, wanted: Sequence[float], low: float, high: float) -> None:
    """Ticks at round numbers, written without powers of ten."""
    inside = [tick for tick in wanted if low / 1.001 <= tick <= high * 1.001]
    axis.set_ticks(inside, [f"{tick:g}" for tick in inside])  # type: ignore[attr-defined]
    axis.set_minor_locator(LogLocator(subs=()))  # type: ignore[attr-defined]
    axis.set_minor_formatter(NullFormatter())  # type: ignore[attr-defined]
