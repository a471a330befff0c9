"""Risk over n with a slider for epsilon, as one piece of HTML: no network, no kernel, no library.

Everything is computed beforehand. The page holds the drawing at one epsilon, so that it says something without
JavaScript, the lines at the others as data, a few lines of script that swap them, and a table of all of it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
from IPython.display import HTML
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike

from hyperdp_lib.data import InputError
from hyperdp_lib.pages import theory_verdicts as verdicts
from hyperdp_lib.pages.theory_figures import COLOURS
from hyperdp_lib.theory.setting import Array

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 380, 64, 14, 14, 48

_STYLE = """
.epsilon-slider { max-width: 46rem; }
.epsilon-slider svg { width: 100%; height: auto; display: block; font-size: 13px; }
.epsilon-slider .control { display: flex; gap: 0.8rem; align-items: center; margin: 0.2rem 0 0.4rem; }
.epsilon-slider .control[hidden] { display: none; }
.epsilon-slider label { display: flex; gap: 0.8rem; align-items: center; flex: 1; }
.epsilon-slider input { flex: 1; }
.epsilon-slider output { min-width: 5rem; font-weight: bold; }
.epsilon-slider ul.risks { display: flex; flex-wrap: wrap; gap: 0.1rem 1.3rem; list-style: none; }
.epsilon-slider ul.risks { margin: 0.2rem 0; padding: 0; }
.epsilon-slider .swatch { display: inline-block; width: 1.5rem; height: 0.25rem; }
.epsilon-slider .swatch { margin-right: 0.4rem; vertical-align: middle; }
.epsilon-slider p { margin: 0.3rem 0; min-height: 3.2em; }
.epsilon-slider table { border-collapse: collapse; }
.epsilon-slider td, .epsilon-slider th { padding: 0.1rem 0.6rem; text-align: right; }
"""

# Every slider of the page is set up once, whichever of their scripts runs first: no ids, so none can clash.
_SCRIPT = """
for (const root of document.querySelectorAll(".epsilon-slider:not([data-ready])")) {
  root.dataset.ready = "yes";
  const frames = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const input = root.querySelector("input");
  const show = () => {
    const frame = frames[input.value];
    root.querySelector("output").textContent = "\\u03b5 = " + frame.epsilon;
    input.setAttribute("aria-valuetext", "epsilon " + frame.epsilon);
    for (const [name, points] of Object.entries(frame.lines)) {
      root.querySelector("[data-line='" + name + "']").setAttribute("points", points);
    }
    for (const [name, risk] of Object.entries(frame.risks)) {
      root.querySelector("[data-risk='" + name + "']").textContent = risk;
    }
    const crossing = root.querySelector("[data-crossing]");
    crossing.setAttribute("visibility", frame.crossing === null ? "hidden" : "visible");
    if (frame.crossing !== null) { crossing.setAttribute("transform", "translate(" + frame.crossing + ",0)"); }
    root.querySelector("[data-words]").textContent = frame.words;
  };
  input.addEventListener("input", show);
  root.querySelector(".control").hidden = false;
  show();
}
"""


def slider(
    epsilons: Sequence[float],
    sizes: ArrayLike,
    risks: Mapping[str, ArrayLike],
    *,
    lower_bound: ArrayLike,
    trivial: float,
    epsilon: float,
    num_private: int,
    caption: str = "",
) -> HTML:
    """Risk over n for every method; epsilon moves by a slider, which starts at the chapter's.

    Parameters
    ----------
    epsilons : ascending; contains ``epsilon``.
    sizes : (S,) numbers of private examples, ascending; contains ``num_private``.
    risks : method (of ``COLOURS`` and ``verdicts.LABELS``) to (E, S) risks; has dp_deepsets and dp_gd.
    lower_bound : (E, S), of Theorem 2; shaded.
    trivial : risk with public data only, drawn as a line.
    caption : parameters, in words, under the drawing.

    Raises
    ------
    InputError
        If the chapter's epsilon or n is not among the values.
    """
    x = np.asarray(sizes, float)
    if epsilon not in epsilons or num_private not in x:
        raise InputError("the slider's values must contain the chapter's epsilon and n")
    curves = {method: np.asarray(values, float) for method, values in risks.items()}
    bound = np.asarray(lower_bound, float)
    every = np.concatenate([values.ravel() for values in curves.values()])
    axes = _Axes(x[0], x[-1], float(every.min()) / 1.4, 1.6 * float(max(every.max(), trivial)))
    here = int(np.flatnonzero(x == num_private)[0])
    frames = [_frame(axes, budget, x, {m: v[i] for m, v in curves.items()}, bound[i], trivial, here)
              for i, budget in enumerate(epsilons)]  # fmt: skip
    start = list(epsilons).index(epsilon)
    parts = [
        f'<div class="epsilon-slider"><style>{_STYLE}</style>',
        '<div class="control" hidden><label>privacy budget ε '
        f'<input type="range" min="0" max="{len(frames) - 1}" step="1" value="{start}" autocomplete="off" '
        f'aria-label="privacy budget epsilon" aria-valuetext="epsilon {epsilon:g}"></label>'
        f"<output>ε = {epsilon:g}</output></div>",
        f"<noscript>Shown is ε = {epsilon:g}; the slider needs JavaScript. The table has the other values.</noscript>",
        _drawing(axes, frames[start], list(curves), trivial, num_private),
        '<ul class="risks">' + "".join(_legend(m, frames[start]) for m in curves) + "</ul>",
        f'<p data-words aria-live="polite">{html.escape(frames[start]["words"])}</p>',
        f"<div><small>{html.escape(caption)}</small></div>" if caption else "",
        _table(frames, list(curves), num_private),
        '<script type="application/json">'
        + json.dumps(frames, ensure_ascii=False).replace("<", "\\u003c")
        + "</script>",
        f"<script>{_SCRIPT}</script></div>",
    ]
    return HTML("\n".join(parts))


class _Axes:
    """Logarithmic axes of the drawing: data to pixels, clipped to the frame."""

    def __init__(self, low_x: float, high_x: float, low_y: float, high_y: float) -> None:
        self.x, self.y = (math.log(low_x), math.log(high_x)), (math.log(low_y), math.log(high_y))

    def points(self, x: Array, y: Array) -> str:
        """Of a polyline: ``"x,y x,y"``."""
        return " ".join(f"{self.across(a):.1f},{self.down(b):.1f}" for a, b in zip(x, y, strict=True))

    def across(self, value: float) -> float:
        share = (math.log(value) - self.x[0]) / (self.x[1] - self.x[0])
        return _LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        share = (math.log(max(value, 1e-300)) - self.y[0]) / (self.y[1] - self.y[0])
        return _HEIGHT - _BOTTOM - min(max(share, 0.0), 1.0) * (_HEIGHT - _BOTTOM - _TOP)


def _frame(
    axes: _Axes, epsilon: float, x: Array, risks: Mapping[str, Array], bound: Array, trivial: float, here: int
) -> dict:
    """Everything that changes with epsilon."""
    at_n = {method: float(values[here]) for method, values in risks.items()}
    crossing = verdicts.crossing(x, risks["dp_deepsets"], risks["dp_gd"])
    inside = x[0] < crossing < x[-1]
    if inside:
        until = f"Tuned DP-GD is ahead for good from about n* = {float(f'{crossing:.2g}'):,.0f} on."
    elif crossing:
        until = f"Tuned DP-GD does not catch up before n = {x[-1]:,.0f}, the end of the figure."
    else:
        until = "Tuned DP-GD is at least as good everywhere in the figure."
    words = (
        f"ε = {epsilon:g}, n = {x[here]:,.0f}: {verdicts.winner(at_n, trivial)} DP-DeepSets "
        f"{verdicts.against(at_n['dp_deepsets'], at_n['dp_gd'], 'tuned DP-GD')}. {until}"
    )
    lines = {method: axes.points(x, values) for method, values in risks.items()}
    base = _HEIGHT - _BOTTOM
    lines["zone"] = f"{_LEFT},{base} {axes.points(x, bound)} {_WIDTH - _RIGHT},{base}"
    return {
        "epsilon": f"{epsilon:g}",
        "lines": lines,
        "risks": {method: verdicts.number(value) for method, value in at_n.items()},
        "crossing": round(axes.across(crossing), 1) if inside else None,
        "n*": f"{float(f'{crossing:.2g}'):,.0f}" if inside else "–",
        "words": words,
    }


def _drawing(axes: _Axes, frame: dict, methods: Sequence[str], trivial: float, num_private: int) -> str:
    base, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    svg = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" fill="currentColor" '
        f'aria-label="Risk over the number of private examples, on logarithmic axes, one line for each method">'
    ]
    for power in range(math.ceil(axes.x[0] / math.log(10)), math.floor(axes.x[1] / math.log(10)) + 1):
        at = axes.across(10.0**power)
        anchor = "end" if at > right - 20 else "middle"  # the last number stays inside the drawing
        svg += [f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{base}" stroke="currentColor" opacity="0.12"/>',
                f'<text x="{at:.1f}" y="{base + 18}" text-anchor="{anchor}">{10**power:,}</text>']  # fmt: skip
    for power in range(math.ceil(axes.y[0] / math.log(10)), math.floor(axes.y[1] / math.log(10)) + 1):
        at = axes.down(10.0**power)
        svg += [f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="currentColor" opacity="0.12"/>',
                f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>']  # fmt: skip
    level, at_n = axes.down(trivial), axes.across(num_private)
    svg += [
        f'<polygon data-line="zone" points="{frame["lines"]["zone"]}" opacity="0.13"/>',
        f'<text x="{_LEFT + 8}" y="{base - 8}" opacity="0.7">impossible without public data</text>',
        f'<path d="M{_LEFT} {level:.1f}H{right}" stroke="currentColor" stroke-dasharray="2 3"/>',
        f'<text x="{right - 4}" y="{level - 5:.1f}" text-anchor="end" opacity="0.8">public data only</text>',
        f'<path d="M{at_n:.1f} {_TOP}V{base}" stroke="currentColor" stroke-dasharray="2 3"/>',
        f'<text x="{at_n + 4:.1f}" y="{_TOP + 11}">n = {num_private:,}</text>',
    ]
    shift = frame["crossing"]
    state = "hidden" if shift is None else "visible"
    svg.append(
        f'<g data-crossing visibility="{state}" transform="translate({shift or 0},0)">'
        f'<line x1="0" y1="{_TOP}" x2="0" y2="{base}" stroke="currentColor" stroke-dasharray="7 4"/>'
        f'<text x="5" y="{base - 8}">n*</text></g>'
    )
    for method in reversed(methods):  # the first one on top
        width = 3.2 if method == "dp_deepsets" else 2
        svg.append(
            f'<polyline data-line="{method}" points="{frame["lines"][method]}" fill="none" '
            f'stroke="{to_hex(COLOURS[method])}" stroke-width="{width}" stroke-linejoin="round"/>'
        )
    svg += [
        f'<path d="M{_LEFT} {_TOP}V{base}H{right}" fill="none" stroke="currentColor"/>',
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">private examples n</text>',
        f'<text transform="translate(14,{(_TOP + base) / 2:.0f}) rotate(-90)" text-anchor="middle">risk</text></svg>',
    ]
    return "".join(svg)


def _legend(method: str, frame: dict) -> str:
    swatch = f'<span class="swatch" style="background:{to_hex(COLOURS[method])}"></span>'
    return f'<li>{swatch}{verdicts.LABELS[method]} <span data-risk="{method}">{frame["risks"][method]}</span></li>'


def _table(frames: Sequence[dict], methods: Sequence[str], num_private: int) -> str:
    """All frames as text: for those who cannot see or move the drawing."""
    head = "".join(f"<th>{verdicts.LABELS[method]}</th>" for method in methods)
    rows = [
        f"<tr><td>{frame['epsilon']}</td>"
        + "".join(f"<td>{frame['risks'][method]}</td>" for method in methods)
        + f"<td>{frame['n*']}</td></tr>"
        for frame in frames
    ]
    return (
        f"<details><summary>Risks at n = {num_private:,} and n* for every ε of the slider</summary>"
        f"<table><thead><tr><th>ε</th>{head}<th>n*</th></tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )
