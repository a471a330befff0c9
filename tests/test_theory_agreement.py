"""Formulas against simulations: a few places of every grid in the default run, all of them with ``-m slow``.

False alarms, with fresh seeds (they are fixed, so a failure is a change):

* Exact statements, ``|z| < 4``: 27 points in the default run, 278 in the whole grid. Bonferroni and the normal
  approximation give 0.2 % and 1.8 %; errors are skewed like a chi-square of 3 to 10 degrees of freedom, and averaged
  over at least 200 repetitions (20 for `ols`), which at most doubles that.
* Approximations, 5 to 20 %: a point fails if its ratio is outside by more than 3 standard errors. Were a formula off by
  exactly its tolerance, a point would fail with probability 0.1 %; those of the chapter are off by much less.
* The bounds have a margin of many standard errors nearly everywhere, and fail at 4: below 0.003 % a point.
"""

import json
import math

import numpy as np
import pytest

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import agreement, deepsets, simulation
from hyperdp_lib.theory.agreement import COMPARISONS, Comparison, Point, Tolerance, comparison
from hyperdp_lib.theory.setting import LinearSetting

# the comparisons of which a quick run takes more than a few seconds: one or two places each, below
COSTLY = {"dp_gd", "hybrid", "noisy_statistics", "lower_bound", "crossover"}
FAST = [one for one in COMPARISONS if one.quick and one.name not in COSTLY]


def report(one, points):
    bad = [point for point in points if not one.tolerance.accepts(point)]
    return "\n".join(
        f"{dict(p.place)}: formula {p.formula:.5g}, simulated {p.simulated:.5g} +- {p.standard_error:.2g}" for p in bad
    )


@pytest.mark.parametrize("one", FAST, ids=lambda one: one.name)
def test_some_places_of_the_grid(one):
    points = one.run(quick=True)
    assert points and not report(one, points)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("dp_gd", {"d": 50, "n": 2000, "epsilon": 2}),
        ("dp_gd", {"d": 200, "n": 2000, "epsilon": 0.5}),
        ("noisy_statistics", {"d": 50, "n": 5000, "epsilon": 8}),
        ("hybrid", {"off_subspace_energy": 0.1, "epsilon": 4, "n": 1000}),
        ("lower_bound", {"learner": "DP-GD", "d": 200, "n": 300, "epsilon": 8}),
        ("lower_bound", {"learner": "noisy statistics", "d": 50, "n": 1000, "epsilon": 8}),
    ],
)
def test_one_place_of_the_costly_grids(name, place):
    one = comparison(name)
    assert place in one.grid
    assert not report(one, [one.point(np.random.default_rng(11), place)])


@pytest.mark.slow
@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: one.name)
def test_whole_grid(one):
    points = one.run()
    assert len(points) == len(one.grid) and not report(one, points)


# ---- the default instance, as printed in the chapter ------------------------------------------------------------


def test_the_default_instance_end_to_end():
    """d = 200, k = 5, n = 1000, epsilon = 1: near 0.021 with PCA of real public tasks; |z| < 5."""
    setting = LinearSetting()
    mu = float(agreement.gdp_mu(1.0, 1e-5))
    clip = float(deepsets.optimal_clip(setting, 1000, mu))
    scale = float(deepsets.decoder_scale(setting, 1000, mu, clip))
    rng = np.random.default_rng(5)
    learned = simulation.public_subspace(rng, setting)
    result = simulation.dp_deepsets(rng, setting, 1000, mu, clip=clip, scale=scale, subspace=learned, repetitions=800)
    assert result.mean == pytest.approx(0.021, rel=0.1) and result.standard_error < 0.0006


# ---- testers are tested: broken simulators do not agree ------------------------------------------------------------


@pytest.mark.parametrize("broken", ["half the noise", "noise of replace-one", "no clip"])
@pytest.mark.parametrize("name", ["deepsets_known_subspace", "dp_gd", "projected_dp_gd"])
def test_a_broken_mechanism_does_not_agree(name, broken, monkeypatch):
    place = {
        "deepsets_known_subspace": {"k": 3, "n": 100, "epsilon": 0.5, "clip": "best"},
        "dp_gd": {"d": 50, "n": 300, "epsilon": 2},
        "projected_dp_gd": {"k": 10, "n": 300, "epsilon": 0.5},
    }[name]
    one = comparison(name)
    assert place in one.grid
    assert one.tolerance.accepts(one.point(np.random.default_rng(1), place))
    noise = simulation.privacy_noise
    factor = {"half the noise": 0.5, "noise of replace-one": 2.0, "no clip": 1.0}[broken]
    monkeypatch.setattr(simulation, "privacy_noise", lambda r, bound, mu, shape: factor * noise(r, bound, mu, shape))
    if broken == "no clip":
        monkeypatch.setattr(simulation, "clip_factor", lambda norms, clip: np.ones_like(norms))
    assert not one.tolerance.accepts(one.point(np.random.default_rng(1), place))


@pytest.mark.parametrize(
    ("attribute", "mutant"),
    [
        ("risk", lambda original: lambda setting, n, mu, clip=None: original(setting, n, 2 * mu, clip)),
        ("risk", lambda original: lambda setting, n, mu, clip=None: original(setting, n, mu / 2, clip)),
        ("decoder_scale", lambda original: lambda setting, n, mu, clip: original(setting, n, math.inf, clip)),
    ],
    ids=["half the noise", "noise of replace-one", "no shrinkage"],
)
def test_a_broken_formula_does_not_agree(attribute, mutant, monkeypatch):
    one = comparison("deepsets_known_subspace")
    place = {"k": 10, "n": 100, "epsilon": 0.25, "clip": "normalised"}
    assert one.tolerance.accepts(one.point(np.random.default_rng(1), place))
    monkeypatch.setattr(deepsets, attribute, mutant(getattr(deepsets, attribute)))
    assert not one.tolerance.accepts(one.point(np.random.default_rng(1), place))


def test_learners_that_see_public_data_do_fall_below_the_bound():
    """The bound is for those without public data; the test that nobody falls below it must be able to fail."""
    setting, mu = LinearSetting(), float(agreement.gdp_mu(1.0, 1e-5))
    clip = float(deepsets.optimal_clip(setting, 300, mu))
    scale = float(deepsets.decoder_scale(setting, 300, mu, clip))
    result = simulation.dp_deepsets(np.random.default_rng(0), setting, 300, mu, clip=clip, scale=scale, subspace=0.0139)
    bound = float(agreement.bounds.lower_bound(setting, 300, mu))
    point = Point({}, bound, float(result.mean), float(result.standard_error), result.repetitions)
    assert not comparison("lower_bound").tolerance.accepts(point)


# ---- tolerances, grids, files ------------------------------------------------------------


def test_tolerances():
    def point(formula, error=0.01):
        return Point({}, formula, 1.0, error, 10)

    exact, about = Tolerance(1, 1, z=4), Tolerance(0.8, 1.2, z=3)
    lower, upper = Tolerance(0, 1, z=4), Tolerance(1, math.inf, z=4)
    assert exact.accepts(point(1.039)) and not exact.accepts(point(1.041)) and not exact.accepts(point(0.959))
    assert about.accepts(point(1.235)) and not about.accepts(point(1.237)) and not about.accepts(point(0.775))
    assert lower.accepts(point(0.0)) and lower.accepts(point(1.039)) and not lower.accepts(point(1.041))
    assert upper.accepts(point(9.0)) and upper.accepts(point(0.961)) and not upper.accepts(point(0.959))
    assert exact.accepts(point(1 + 1e-12, error=0.0)) and point(1 + 1e-12, error=0.0).z == 0


def test_the_grids_cover_what_the_chapter_claims():
    grids = {one.name: one.grid for one in COMPARISONS}
    assert len(grids["deepsets_known_subspace"]) == 2 * 6 * 6 * 3
    assert len(grids["dp_gd"]) >= 27 and len(grids["deepsets_end_to_end"]) >= 90
    assert len(grids["lower_bound"]) == 3 * 2 * 6 * 6
    for one in COMPARISONS:
        assert len({json.dumps(place) for place in one.grid}) == len(one.grid), "a place twice"
        quick = one.places(quick=True)
        assert len(quick) == min(one.quick, len(one.grid)) and set(quick) <= set(one.places(quick=False))
        for place in one.grid:
            agreement._setting(place)  # raises if it is none
    with pytest.raises(InputError, match="choose from"):
        comparison("other")


def _toy(formula=1.0):
    def point(rng, place):
        return Point(place, formula, 1 + 0.01 * rng.standard_normal(), 0.01, 5)

    grid = tuple({"n": n, "clip": (0.0, 1.0)} for n in range(5))
    return Comparison("toy", "A toy", Tolerance(1, 1, z=6), grid, point, quick=2)


def test_a_quick_run_is_part_of_the_whole_one():
    whole, quick = _toy().run(), _toy().run(quick=True)
    assert quick == [whole[0], whole[4]] and len(whole) == 5
    assert len({point.simulated for point in whole}) == 5, "each place has its own random numbers"
    assert _toy().run(seed=3) != whole


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "COMPARISONS", (_toy(),))
    out = ["--out", str(tmp_path / "theory")]
    assert agreement.main([*out, "--quick"]) == 0
    path = tmp_path / "theory" / "toy.json"
    content = json.loads(path.read_text())
    assert content["summary"]["points"] == 2 and content["provenance"]["command"].endswith("--object toy")
    assert str(tmp_path) not in path.read_text()
    before = path.stat().st_mtime_ns
    assert agreement.main([*out, "--quick"]) == 0 and path.stat().st_mtime_ns == before, "done: not run again"
    assert agreement.main(out) == 0 and json.loads(path.read_text())["summary"]["points"] == 5
    before = path.stat().st_mtime_ns
    assert agreement.main([*out, "--quick"]) == 0 and path.stat().st_mtime_ns == before, "a full run covers it"
    assert agreement.main([*out, "--again"]) == 0 and path.stat().st_mtime_ns > before
    assert "toy" in capsys.readouterr().out
    table = agreement.table(tmp_path / "theory")
    assert list(table.title) == ["A toy"] and table.outside[0] == 0 and table.tolerance[0] == "|z| < 6"
    monkeypatch.setattr(agreement, "COMPARISONS", (_toy(formula=2.0),))
    assert agreement.main([*out, "--again"]) == 1
    assert "outside the tolerance: toy" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        agreement.main(["--object", "nothing"])
    assert stopped.value.code == 2
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        agreement.load(tmp_path / "theory")
    with pytest.raises(InputError, match="no comparisons"):
        agreement.load(tmp_path)


def test_files_are_json_without_nan(tmp_path):
    points = [Point({"n": 5}, 1.0, 1.0, 0.0, 2)]
    bound = Comparison("toy", "A toy", Tolerance(1, math.inf, z=4), ({"n": 5},), lambda rng, place: points[0])
    path = agreement.save(tmp_path, bound, points, False, 0.1, {})
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["tolerance"]["high"] is None
