"""Theory chapter: figures draw what they are given, the slider has every frame, sentences hold in every regime."""

import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hyperdp_lib.data import InputError
from hyperdp_lib.pages import theory_dots as dots
from hyperdp_lib.pages import theory_figures as figures
from hyperdp_lib.pages import theory_tables as tables
from hyperdp_lib.pages import theory_verdicts as verdicts
from hyperdp_lib.pages.figures import house_style
from hyperdp_lib.pages.theory_slider import slider
from hyperdp_lib.theory import bounds, deepsets
from hyperdp_lib.theory.setting import LinearSetting, gdp_mu

MU = 0.2681  # epsilon 1 at delta 1e-5
EPSILONS = [0.5, 1.0, 2.0]
SIZES = np.array([100.0, 1000.0, 10000.0])


@pytest.fixture(autouse=True)
def closed_figures():
    house_style()
    yield
    plt.close("all")


def drawn(figure) -> None:
    """The figure draws, its panels have labelled axes, and no line holds a NaN where its data had none."""
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title(loc="left")
    assert figure.axes[0].get_ylabel() and any(axes.get_xlabel() for axes in figure.axes)
    for axes in figure.axes:
        for line in axes.get_lines():
            assert (
                line.get_label() in ("n*, formulas", "n*, closed form")
                or np.isfinite(np.asarray(line.get_ydata(), float)).all()
            )


# ---- figures ------------------------------------------------------------


def test_risk_against_epsilon_shades_the_bound_and_draws_dots() -> None:
    risks = {"dp_deepsets": [0.03, 0.02, 0.02], "dp_gd": [0.9, 0.5, 0.1]}
    simulated = {"dp_gd": figures.Dots([1.0], [0.52], [0.03])}
    figure = figures.risk_against_epsilon(
        EPSILONS, risks, lower_bound=[0.1, 0.05, 0.05], bayes_ridge=0.06, trivial=1.0, here=1.0, dots=simulated
    )
    drawn(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "DP-DeepSets"
    assert any("Theorem 2" in text.get_text() for text in figure.legends[0].get_texts())
    assert len(figure.axes[0].containers) == 1


def test_risk_against_n_has_a_panel_each_with_floor_and_crossover() -> None:
    risks = {"dp_deepsets": [0.1, 0.02, 0.014], "dp_gd": [1.0, 0.5, 0.012], "hybrid": [0.1, 0.02, 0.006]}
    panel = figures.Panel("ε = 1", SIZES, risks, floor=0.0139, crossover=9000.0)
    figure = figures.risk_against_n([[panel, panel], [panel, panel]])
    drawn(figure)
    assert len(figure.axes) == 4
    assert "n*" in [text.get_text() for text in figure.axes[0].texts]
    assert len(figure.legends[0].get_texts()) == 3
    nowhere = figures.Panel("ε = 1", SIZES, risks, floor=0.0, crossover=np.inf)
    assert not figures.price_of_one_shot([nowhere]).axes[0].texts


def test_error_budget_stacks_to_the_risk() -> None:
    setting = LinearSetting(off_subspace_energy=0.1)
    mus = gdp_mu(EPSILONS, 1e-5)
    figure = figures.error_budget(EPSILONS, deepsets.error_budget(setting, 300, mus), trivial=setting.trivial_risk)
    drawn(figure)
    tops = [max(bar.get_y() + bar.get_height() for container in figure.axes[0].containers for bar in [container[i]])
            for i in range(3)]  # fmt: skip
    assert tops == pytest.approx(deepsets.risk(setting, 300, mus))


@pytest.mark.parametrize("certified", [np.zeros((3, 3)), np.ones((3, 3)), np.tril(np.ones((3, 3)))])
def test_phase_map_leaves_out_what_is_nowhere(certified) -> None:
    ratio = np.array([[-1.0, -0.5, 0.1], [-0.5, 0.2, 0.4], [0.1, 0.5, 1.0]])
    figure = figures.phase_map(
        EPSILONS, SIZES, ratio, certified=certified, crossover=[5000, 500, 0.0], closed_form=[np.inf, 400, 200],
        here=(1.0, 1000),
    )  # fmt: skip
    drawn(figure)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert np.isnan(lines["n*, formulas"].get_ydata()).tolist() == [False, False, True]
    assert np.isnan(lines["n*, closed form"].get_ydata()).tolist() == [True, False, False]


def test_clip_curves_and_public_data() -> None:
    ratios = [0.1, 0.5, 2.0]
    simulated = {"ε = 1": figures.Dots(ratios, [0.03, 0.02, 0.05], [0.001] * 3)}
    curves = {"ε = 1": [0.03, 0.02, 0.05], "ε = 8": [0.02, 0.015, 0.016]}
    drawn(figures.clip_curves(ratios, curves, normalised={"ε = 1": 0.031, "ε = 8": 0.014}, dots=simulated))
    figure = figures.public_data(
        [20, 200, 2000], {"m = 10": [1.0, 0.5, 0.1], "m = 50": [0.5, 0.1, 0.01]},
        thresholds={"m = 10": 94.0, "m = 50": 3.0}, here=(2000, 0.01), dots={"m = 10": simulated["ε = 1"]},
    )  # fmt: skip
    drawn(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["m = 10", "m = 50", "this chapter"]


# ---- dots ------------------------------------------------------------


def test_every_method_can_be_simulated_near_its_formula() -> None:
    """Rough on purpose (30 %): the tolerances proper are those of `theory.agreement`."""
    setting = LinearSetting(d=40, k=3, num_public_tasks=1000, off_subspace_energy=0.05)
    for method in verdicts.LABELS:
        result = dots.simulate(method, np.random.default_rng(5), setting, 400, 1.0)
        predicted = float(verdicts.predicted_risks(setting, 400, 1.0, [method])[method])
        assert result is not None and abs(result.mean - predicted) < 0.3 * predicted + 4 * result.standard_error
    assert dots.simulate("second_moments", np.random.default_rng(5), setting, 400, 1.0).mean < 0.3


def test_dots_do_not_share_random_numbers_and_repeat() -> None:
    setting = LinearSetting(d=10, k=2)
    places = {"dp_deepsets": [(1.0, 50, 0.5), (2.0, 50, 0.5)]}
    first, again = (dots.dots(places, setting, 3)["dp_deepsets"] for _ in range(2))
    assert first.mean == again.mean and first.mean[0] != first.mean[1]


def test_dots_that_take_too_long_are_left_out() -> None:
    setting = LinearSetting()
    assert dots.simulate("dp_deepsets", np.random.default_rng(0), setting, 10**7, MU) is None
    assert dots.dots({"dp_gd": [(1.0, 10**7, MU)]}, setting, 0) == {}


# ---- slider ------------------------------------------------------------


class Page(HTMLParser):
    """Tags must nest; collects ids, polylines and the text of scripts."""

    void = {"input", "line", "path", "polyline", "polygon", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.data: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data.append(data)


def small_slider(**changes) -> str:
    shape = (len(EPSILONS), len(SIZES))
    ours = np.broadcast_to([0.1, 0.02, 0.014], shape)
    theirs = np.array([[1.0, 0.9, 0.02], [1.0, 0.5, 0.01], [1e-9, 1e-9, 1e-9]])
    arguments = {
        "lower_bound": np.full(shape, 1e-3), "trivial": 1.0, "epsilon": 1.0, "num_private": 1000, "caption": "d < 3",
    } | changes  # fmt: skip
    return slider(EPSILONS, SIZES, {"dp_deepsets": ours, "dp_gd": theirs}, **arguments).data


def test_slider_is_well_formed_and_complete() -> None:
    text = small_slider()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    frames = json.loads(page.data[0])
    assert [frame["epsilon"] for frame in frames] == ["0.5", "1", "2"]
    assert all(set(frame["lines"]) == {"dp_deepsets", "dp_gd", "zone"} for frame in frames)
    assert [frame["crossing"] is None for frame in frames] == [True, False, True]
    assert "does not catch up" in frames[0]["words"] and "wins against tuned DP-GD" in frames[0]["words"]
    assert "at least as good everywhere" in frames[2]["words"] and "loses to" in frames[2]["words"]
    (control,) = [attributes for tag, attributes in page.tags if tag == "input"]
    assert (control["type"], control["min"], control["max"], control["value"]) == ("range", "0", "2", "1")
    assert control["aria-label"] and control["aria-valuetext"] == "epsilon 1"
    assert "nan" not in text.lower().replace("finance", "")
    # what stands in the page without JavaScript is the frame at the chapter's epsilon
    drawn_lines = {a["data-line"]: a["points"] for tag, a in page.tags if "data-line" in a}
    assert drawn_lines == frames[1]["lines"]
    assert "<noscript>" in text and text.count("<tr>") == 4
    assert "d &lt; 3" in text
    assert not re.search(r"https?://|src=|@import|fetch\(", text)


def test_slider_of_the_chapter_is_small_and_two_do_not_clash() -> None:
    epsilons, sizes = list(np.geomspace(0.25, 8, 14)), np.unique([*np.geomspace(30, 3e4, 14).round(), 1000])
    risks = {method: np.full((14, len(sizes)), 0.123456) for method in verdicts.LABELS}
    bound = np.full((14, len(sizes)), 0.01)
    text = slider(epsilons, sizes, risks, lower_bound=bound, trivial=1.0, epsilon=epsilons[3], num_private=1000).data
    assert len(text) < 200_000
    page = Page()
    page.feed(text + text)
    assert len(page.ids) == len(set(page.ids)) == 0
    assert "document.getElementById" not in text


def test_slider_needs_the_chapters_values() -> None:
    for wrong in ({"epsilon": 3.0}, {"num_private": 5}):
        with pytest.raises(InputError, match="chapter's epsilon and n"):
            small_slider(**wrong)


# ---- sentences ------------------------------------------------------------


def test_against_and_winner() -> None:
    assert verdicts.against(1.0, 3.0, "X") == "wins against X (3.00) by a factor of 3.0"
    assert verdicts.against(3.0, 1.0, "X") == "loses to X (1.00) by a factor of 3.0"
    assert verdicts.against(1.0, 1.05, "X") == "is about equal to X (1.05)"
    close = {"dp_deepsets": 0.105, "hybrid": 0.1, "dp_gd": 0.5}
    assert (
        verdicts.winner(close, 1.0) == "The smallest risk, 0.100, is that of the hybrid; DP-DeepSets within 10 % of it."
    )
    assert verdicts.winner({"dp_deepsets": 0.95, "dp_gd": 1.0}, 1.0).startswith("Nobody learns much")


def test_crossing() -> None:
    assert verdicts.crossing(SIZES, [0.1, 0.1, 0.1], [1.0, 1.0, 1.0]) == np.inf
    assert verdicts.crossing(SIZES, [1.0, 1.0, 1.0], [1.0, 0.5, 0.1]) == 0.0
    # ahead, behind, ahead, behind: the last change counts
    four = [10.0, 100.0, 1000.0, 10000.0]
    assert verdicts.crossing(four, [1.0] * 4, [2.0, 0.5, 2.0, 0.5]) == pytest.approx(10**3.5)


@pytest.mark.parametrize(
    ("changes", "n", "epsilon"),
    [
        ({}, 1000, 1.0),
        ({"off_subspace_energy": 0.1}, 10000, 1.0),
        ({"d": 50, "k": 10, "subspace_error": 0.0}, 1000, 8.0),
        ({"subspace_error": 0.0}, 100, 1.0),
        ({"num_public_tasks": 20, "examples_per_task": 10}, 1000, 1.0),
        ({"d": 10, "k": 10}, 500, 2.0),
        ({"off_subspace_energy": 5.0}, 1000, 1.0),
        ({}, 2, 0.01),
    ],
)
def test_sentences_are_true_in_every_regime(changes, n, epsilon) -> None:
    setting, mu = LinearSetting(**changes), float(gdp_mu(epsilon, 1e-5))
    risks = {method: float(risk) for method, risk in verdicts.predicted_risks(setting, n, mu).items()}
    crossover, closed = float(bounds.crossover(setting, mu)), float(bounds.crossover_closed_form(setting, mu))

    certificate = verdicts.certificate_sentence(setting, n, mu)
    assert certificate.startswith("The certificate holds") == bool(bounds.certified(setting, n, mu))
    assert ("this is so for every n" in certificate) == bool(bounds.corollary_holds(setting, mu))
    if "it needs μ" in certificate:
        assert mu > 0.5

    sentence = verdicts.crossover_sentence(crossover, closed, n, setting.floor, 1e-5)
    if 0 < crossover < np.inf:
        assert ("is below that" in sentence) == (n < crossover)
        assert ("no floor" in sentence) == (setting.floor > 0)
    else:
        assert "n*" not in sentence

    learns = setting.eta < 1
    assert ("teach nothing" in verdicts.public_data_sentence(setting)) == (not learns)
    halving = verdicts.half_risk_sentence(setting, mu)
    assert ("cannot halve" in halving) == (setting.floor >= setting.trivial_risk / 2)
    one_shot = verdicts.one_shot_sentence(risks, setting.floor)
    assert ("above the floor" in one_shot) == (setting.floor > 0)
    best = min(risks, key=risks.get)
    told = verdicts.advice(setting, risks)
    if told.startswith("Take one noisy sum"):
        assert risks["dp_deepsets"] <= verdicts.TIE * risks[best]
    elif told.startswith(("One noisy sum is better", "There are so many")):
        assert f"({verdicts.LABELS[best]})" in told
        assert told.startswith("One") == (risks["dp_gd"] > verdicts.TIE * risks["dp_deepsets"])
    else:
        assert not learns or risks[best] > setting.trivial_risk / verdicts.TIE
    everything = [certificate, sentence, halving, one_shot, told, verdicts.hybrid_sentence(risks)]
    everything += [verdicts.floor_sentence(setting, risks["dp_deepsets"]), verdicts.winner(risks, setting.trivial_risk)]
    for words in everything:
        assert words.endswith(".") and "nan" not in words.split() and "inf" not in words.split()


def test_known_regimes() -> None:
    """Who wins in the cases the chapter names."""
    mu = float(gdp_mu(1.0, 1e-5))
    default = LinearSetting()
    assert "wins" in verdicts.against(*_pair(default, 1000, mu), "tuned DP-GD")
    assert "33 times as many (d/k = 40)" in verdicts.half_risk_sentence(default, mu)
    shifted = LinearSetting(off_subspace_energy=0.1)
    assert "loses" in verdicts.against(*_pair(shifted, 10000, mu), "tuned DP-GD")
    wide = LinearSetting(d=50, k=10)
    assert "The corollary fails even for an exactly known subspace: it needs d ≥ 190 and d = 50." in (
        verdicts.certificate_sentence(wide, 1000, mu)
    )


def _pair(setting: LinearSetting, n: int, mu: float) -> tuple[float, float]:
    risks = verdicts.predicted_risks(setting, n, mu, ["dp_deepsets", "dp_gd"])
    return float(risks["dp_deepsets"]), float(risks["dp_gd"])


@pytest.mark.parametrize(
    ("epsilon", "delta", "n", "message"),
    [
        (0.0, 1e-5, 100, "epsilon must be above 0 and finite"),
        (np.inf, 1e-5, 100, "epsilon must be above 0 and finite"),
        (1.0, 0.01, 100, "below 1/n = 0.01"),
        (1.0, 0.0, 100, "above 0"),
        (1.0, 1e-5, 1, "at least 2"),
    ],
)
def test_bad_parameters(epsilon, delta, n, message) -> None:
    with pytest.raises(InputError, match=message):
        verdicts.check_parameters(epsilon, delta, n)


# ---- tables ------------------------------------------------------------


def test_tables_say_what_makes_them_when_nothing_is_there(tmp_path) -> None:
    assert "python -m hyperdp_lib.theory.agreement" in tables.agreement(tmp_path)
    assert "python -m hyperdp_lib.theory.learned --out" in tables.learned_networks(tmp_path)


def test_table_of_learned_networks(tmp_path) -> None:
    row = {
        "settings": {
            "setting": {"d": 50, "k": 3}, "num_private": [50, 1000], "epsilon": 1.0,
            "config": {"encoder": "bilinear", "dimension": None, "num_public_tasks": 1000},
        },
        "summary": [
            {"epsilon": None, "num_private": 200, "risk": 0.0185, "deviation_over_seeds": 0.0003, "closed_form": 0.0175,
             "closed_form_eigenvectors": 0.018, "ratio": 1.057},
        ],
    }  # fmt: skip
    (tmp_path / "learned.json").write_text(json.dumps({"rows": {"a": row}}))
    assert len(tables.learned_networks(tmp_path).splitlines()) == 2  # it was trained for another point
    last = tables.learned_networks(tmp_path, elsewhere=True).splitlines()[-1]
    assert (
        last
        == "| bilinear | 1,000 | 50, 3 | 3 | ε 1, n 50 to 1000 | ∞ | 200 | 0.0185 ± 0.0003 | 0.0175 | 0.0180 | 1.06 |"
    )
