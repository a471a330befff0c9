"""Risk in plain words: never below what the best attack does, by other formulas; the published schema."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from scipy.stats import norm

import hyperdp_lib
from hyperdp_lib import accounting, certificate, risk
from hyperdp_lib.certificate import Certificate, gaussian_certificate, ledger_certificate
from hyperdp_lib.ledger import CLASS_NAMES, LedgerEntry, declaration, gaussian_charge
from hyperdp_lib.mechanism import GaussianSum
from hyperdp_lib.risk import Risk
from hyperdp_lib.verification import verify

SCHEMA = json.loads((Path(hyperdp_lib.__file__).parent / "certificate.schema.json").read_text(encoding="utf-8"))
MULTIPLIER = accounting.noise_multiplier(1.0, 1e-5)
NAMES = [item.name for item in dataclasses.fields(Risk)]
multipliers = st.floats(0.05, 1e4)


def neyman_pearson(p, q):
    """Risk of telling the distribution p from q on a finite set: alarms in the order of the likelihood ratio."""
    order = np.argsort(-(np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), kind="stable")
    true, false = (np.concatenate([[0.0], np.cumsum(one[order])]) for one in (p, q))

    def at(rate):  # between two alarms a coin decides
        return np.interp(rate, false, true)

    return float(np.max(true - false)), at(0.01), at(0.001), at(0.01) / (at(0.01) + 0.01)


@pytest.mark.parametrize("mu", [0.05, 0.268, 1.0, 3.0])
def test_bounds_are_attained_by_the_best_test_of_a_gaussian_shift(mu):
    edges = np.linspace(-12, 12 + mu, 400_001)
    p, q = (np.diff(norm.cdf(edges, loc=shift)) for shift in (mu, 0.0))
    for stated, found in zip(dataclasses.astuple(risk.gaussian(1 / mu)), neyman_pearson(p, q), strict=True):
        assert found * (1 - 1e-6) <= stated <= found * (1 + 3e-5)


@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_bounds_hold_for_the_discrete_gaussian_on_a_coarse_grid(multiplier, monkeypatch):
    """The slack is for the grid: with 8 steps in place of 2**20, and one coordinate, it is seen and is enough."""
    steps = 8
    monkeypatch.setattr(accounting, "MIN_GRID_SENSITIVITY", steps)
    monkeypatch.setattr(accounting, "MAX_COORDINATES", 1)
    at = np.arange(-1500, 1500)
    p, q = (np.exp(-((at - shift) ** 2) / (2 * (multiplier * steps) ** 2)) for shift in (steps, 0))
    found = neyman_pearson(p / p.sum(), q / q.sum())
    assert all(x <= y for x, y in zip(found, dataclasses.astuple(risk.gaussian(multiplier)), strict=True))
    assert accounting.discretisation_slack(multiplier)[0] > 1e-4


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.1, 1e-5), (1.0, 1e-5), (1.0, 0.1), (8.0, 1e-3)])
def test_bounds_from_epsilon_and_delta_are_attained_and_are_those_of_the_region(epsilon, delta):
    """Kairouz et al.: the mechanism of four answers dominates all; and a linear program over its region."""
    limit = math.exp(epsilon)
    p = np.array([delta, (1 - delta) * limit / (1 + limit), (1 - delta) / (1 + limit), 0.0])
    stated = dataclasses.astuple(risk.approximate(epsilon, delta))
    for value, found in zip(stated, neyman_pearson(p, p[::-1]), strict=True):
        assert found * (1 - 1e-12) <= value <= found * (1 + 2e-5) + 1e-12
    # (TPR, FPR) with TPR <= e^eps FPR + delta, 1 - FPR <= e^eps (1 - TPR) + delta
    sides, most = [[1, -limit], [limit, -1]], [delta, limit + delta - 1]
    gained = optimize.linprog([-1, 1], sides, most, bounds=(0, 1))
    assert -gained.fun * (1 - 1e-9) <= stated[0]
    for value, rate in zip(stated[1:3], (0.01, 0.001), strict=True):
        found = optimize.linprog([-1, 0], sides, most, bounds=[(0, 1), (rate, rate)])
        assert -found.fun * (1 - 1e-9) <= value <= -found.fun * (1 + 2e-5) + 1e-9


def test_the_figures_at_epsilon_one():
    made = gaussian_certificate(GaussianSum(8, MULTIPLIER), 1e-5, epsilon=1.0, seeded=False)
    assert made.mu == pytest.approx(0.268, abs=5e-4)
    assert made.risk_sentence == (
        "Risk: mu = 0.2681. Whoever tries to tell whether one image was there gains at most 10.7 % (true minus false "
        "alarms). At 1 % false alarms, at most 1.98 % of the true ones are found; at 0.1 %, at most 0.239 %. An alarm "
        "at 1 % turns even chances into a belief of at most 66.5 %."
    )


def test_the_table_of_the_book_says_so():
    page = (Path(hyperdp_lib.__file__).parent.parent / "book" / "privacy_statement.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ε = (\S+) \| (.*) \|$", page, flags=re.M)
    assert len(rows) == 4
    for epsilon, told in rows:
        multiplier = accounting.noise_multiplier(float(epsilon), 1e-5)
        bound = risk.gaussian(multiplier)
        shares = bound.advantage, bound.true_positives_at_1_percent, bound.belief
        assert told.split(" | ") == [risk.rounded_up(1 / multiplier, 4), *map(risk.percent, shares)]


@given(multipliers)
def test_numbers_are_rounded_up_and_by_little(multiplier):
    mu, bound = 1 / multiplier, risk.gaussian(multiplier)
    rates = norm.cdf(norm.ppf([0.01, 0.001]) + mu)
    true = 2 * norm.cdf(mu / 2) - 1, *rates, rates[0] / (rates[0] + 0.01)
    for stated, value in zip(dataclasses.astuple(bound), true, strict=True):
        assert value - 1e-15 <= stated <= min(1, value * (1 + 3e-5) + 1e-8)


@given(st.lists(multipliers, min_size=2, max_size=4), st.floats(1.0, 3.0))
def test_more_noise_is_less_risk_and_more_releases_are_more(several, factor):
    def all_at_most(one, other):
        return all(x <= y for x, y in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True))

    assert all_at_most(risk.gaussian([factor * m for m in several]), risk.gaussian(several))
    assert all_at_most(risk.gaussian(several[:-1]), risk.gaussian(several))
    assert all_at_most(risk.approximate(several[0], 1e-5), risk.approximate(several[0] * factor, 1e-4))


@given(st.floats(0.01, 12), st.floats(1e-12, 1e-2))
def test_mu_says_at_least_as_much_as_epsilon_and_delta(epsilon, delta):
    exact, coarse = risk.gaussian(accounting.noise_multiplier(epsilon, delta)), risk.approximate(epsilon, delta)
    for one, other in zip(dataclasses.astuple(exact), dataclasses.astuple(coarse), strict=True):
        assert one <= other * (1 + 1e-5)


@given(st.floats(1e-9, 1), st.integers(1, 6))
def test_printed_numbers_are_never_below(value, digits):
    assert value <= float(risk.rounded_up(value, digits)) <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-12)
    assert 100 * value * (1 - 1e-15) <= float(risk.percent(value).removesuffix(" %")) <= 100 * value * 1.0101


def test_refused():
    for values in ((-1.0, 0.5, 0.5, 0.5), (1.1, 0.5, 0.5, 0.5), (math.nan, 0.5, 0.5, 0.5)):
        with pytest.raises(ValueError):
            Risk(*values)
    for epsilon, delta in ((-1.0, 0.1), (math.nan, 0.1), (1.0, 1.5)):
        with pytest.raises(ValueError):
            risk.approximate(epsilon, delta)
    for nothing in (risk.gaussian(0.0), risk.approximate(1e6, 0.0)):
        assert min(dataclasses.astuple(nothing)) > 0.99


# ---- certificates of every kind ---------------------------------------------------------------------------


def one_sum(**changes):
    known = {"epsilon": 1.0, "seeded": False} | changes
    relation = known.pop("neighboring_relation", "add_or_remove_one")
    config = GaussianSum(8, MULTIPLIER, 2, neighboring_relation=relation)
    return gaussian_certificate(config, 1e-5, class_names=("0", "1"), **known)


def other(mechanism, *charges, **fields):
    known = {"neighboring_relation": "add_or_remove_one", "rng": certificate.NO_NOISE} | fields
    return ledger_certificate(charges, 1e-5, method="x", mechanism=mechanism, **known)


SGD = LedgerEntry("dp_sgd", "a run", 2.0, 1e-5, None, 2.0, 0.1, 50)
KINDS = {
    "one sum": one_sum(),
    "replace one": one_sum(neighboring_relation="replace_one", num_private=40),
    "zero out": one_sum(neighboring_relation="zero_out", num_private=40),
    "two steps": one_sum(ledger=(gaussian_charge("a first step", 5.0, 1e-5),)),
    "public size": one_sum(ledger=(declaration("number of images", "about 40"),)),
    "demonstration": one_sum(seeded=True),
    "refined": dataclasses.replace(one_sum(), post_processing=("refined",)),
    "written": dataclasses.replace(one_sum(), artefact_sha256={"README.md": "0" * 64}, base_model_sha256="1" * 64),
    "DP-SGD": other(certificate.DP_SGD, SGD, rng=certificate.FLOAT_NOISE, noise_multiplier=2.0),
    "DP-SGD and a sum": other(
        certificate.DP_SGD, SGD, gaussian_charge("a sum", 5.0, 1e-5), rng=certificate.FLOAT_NOISE, noise_multiplier=2.0
    ),
    "no noise": gaussian_certificate(GaussianSum(8, 0.0, 2), 1e-5, seeded=True),
    "no privacy": other(certificate.NO_PRIVACY, LedgerEntry("other", "training", math.inf, 0.0)),
    "no private data": other(certificate.NO_PRIVATE_DATA),
    "no private data, class names": other(certificate.NO_PRIVATE_DATA, declaration(CLASS_NAMES, "class names: a")),
    "not charged": dataclasses.replace(one_sum(), ledger=(), risk=risk.NO_BOUND),
}
BEGINNINGS = {
    "demonstration": "Risk: NOT PRIVATE. Whoever knows the seed may be certain. With secret noise it would be: mu",
    "no noise": "Risk: no bound.",
    "no privacy": "Risk: no bound.",
    "no private data": "Risk: none. No private image was read",
    "no private data, class names": "Risk: none. No private image was read",
    "not charged": "Risk: no bound can be stated",
    "DP-SGD": "Risk: From epsilon and delta alone.",
    "DP-SGD and a sum": "Risk: From epsilon and delta alone.",
    "replace one": "Risk: mu = 0.2681. Whoever tries to tell which of two images was there",
    "zero out": "Risk: mu = 0.2681. Whoever tries to tell whether one image was voided",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_states_its_risk_and_validates(kind, tmp_path):
    made = KINDS[kind]
    assert made.risk_sentence.startswith(BEGINNINGS.get(kind, "Risk: mu = "))
    expected = risk.NO_RISK if "no private data" in kind else risk.of_ledger(made.ledger, made.epsilon, made.delta)
    assert made.risk == (expected if made.private else risk.NO_BOUND)
    jsonschema.validate(json.loads(made.to_json()), SCHEMA)
    assert Certificate.from_json(made.to_json()) == made
    certificate.write_certificate(made, tmp_path)
    assert [problem for problem in verify(tmp_path) if "risk" in problem] == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["one sum", "DP-SGD", "demonstration", "no private data"])
def test_a_false_risk_is_found(kind, name, tmp_path):
    made = KINDS[kind]
    true = getattr(made.risk, name)
    for false in {0.999 * true, min(1.0, 1.001 * true + 1e-6)} - {true}:
        lie = dataclasses.replace(made, risk=dataclasses.replace(made.risk, **{name: false}))
        certificate.write_certificate(lie, tmp_path)
        assert any(problem.startswith(f"risk: {name} is stated as") for problem in verify(tmp_path))


def test_certificates_from_before_the_risk_still_read_and_validate(tmp_path):
    old = dataclasses.replace(one_sum(), schema=None, risk=None)
    assert '"risk"' not in old.to_json() and Certificate.from_json(old.to_json()) == old
    jsonschema.validate(json.loads(old.to_json()), SCHEMA)
    certificate.write_certificate(old, tmp_path)
    assert [problem for problem in verify(tmp_path) if "risk" in problem] == []
    assert old.risk_sentence == one_sum().risk_sentence


def test_the_schema_says_what_the_reader_takes():
    """The same fields, required alike; what the one refuses, the other does."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == certificate.SCHEMA
    parts = ((Certificate, SCHEMA), (LedgerEntry, SCHEMA["$defs"]["entry"]), (Risk, SCHEMA["$defs"]["risk"]))
    for record, described in parts:
        later = {item.name for item in dataclasses.fields(record) if item.metadata.get("later")}
        names = {item.name for item in dataclasses.fields(record)}
        names |= {"checksum"} if record is Certificate else set()
        assert set(described["properties"]) == names and set(described["required"]) == names - later
    values = json.loads(one_sum().to_json())
    wrong = {
        "epsilon": "1", "delta": 1.0, "mechanism": "hope", "demonstration": 0, "schema": "urn:hyperdp:certificate:2",
        "risk": {"advantage": 0.1}, "ledger": [{}], "class_names": "01", "surplus": 1,
    }  # fmt: skip
    for key, value in wrong.items():
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | {key: value}, SCHEMA)
        with pytest.raises(ValueError):
            Certificate.from_json(json.dumps(values | {key: value}))


