"""Forecasts: intervals cover what they promise, from public data alone."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdp_lib import cli
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.experiments import forecast, methods, tuning
from hyperdp_lib.experiments.forecast import num_rehearsals, prediction_interval
from hyperdp_lib.experiments.methods import Bench, Outcome, Settings


class Tasks:
    def sample_tasks(self, num_tasks, images_per_task, generator):
        patterns = torch.randn(num_tasks, 1, 1, 16, 16, generator=generator)
        return (patterns + 0.3 * torch.randn(num_tasks, images_per_task, 1, 16, 16, generator=generator)).clamp(-1, 1)


@pytest.fixture
def bench():
    """Models that are never asked: the method is replaced in these tests."""
    nothing = ImageSet(torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long), ("none",))
    features = FeatureNetwork(dimension=8).eval()
    network = SimpleNamespace(fitting=lambda noise_std, declared_per_class: network)
    return Bench(None, network, features, None, None, nothing, nothing, nothing, Settings(num_images=20))


@pytest.fixture
def lottery(monkeypatch):
    """A method whose score is drawn from a skewed law, decided by the stand-in's seed; keeps what it was given."""
    seen = []

    def run(own, epsilon, seed):
        seen.append((own, epsilon, seed))
        score = float(np.random.default_rng(seed).lognormal())
        return Outcome(None, None, {}, scores={"frechet_distance": score, "accuracy": 0.5})

    for name in ("hyperdp", "dp_deepsets"):
        monkeypatch.setitem(methods.METHODS, name, methods.Method(run))
    return seen


@pytest.mark.parametrize("coverage, count", [(0.8, 9), (0.8, 30), (0.5, 3), (0.9, 19)])
def test_intervals_cover_as_often_as_they_say(coverage, count):
    """One more value of the same law, 20,000 times: standard error 0.3 %, six of them allowed."""
    rng = np.random.default_rng(0)
    hits = 0
    for values in rng.lognormal(size=(20_000, count + 1)):
        low, high = prediction_interval(list(values[1:]), coverage)
        hits += low <= values[0] <= high
    rank = math.floor((count + 1) * (1 - coverage) / 2 + 1e-9)
    exact = 1 - 2 * rank / (count + 1)
    assert exact >= coverage - 1e-9 and abs(hits / 20_000 - exact) < 6 * 0.003


def test_the_forecast_of_one_method_covers_its_next_stand_in(bench, lottery):
    """The whole path, 400 forecasts of nine rehearsals and a tenth each: 80 % +- 5."""
    hits = 0
    for turn in range(400):
        made = forecast.forecast(40, 1.0, num_classes=2, num_images=20, bench=bench, tasks=Tasks(), seed=20 * turn)
        low, high = made.interval("frechet_distance")
        hits += low <= float(np.random.default_rng(20 * turn + 15).lognormal()) <= high
    assert 0.75 <= hits / 400 <= 0.85  # standard error 0.02: a false alarm in eighty, were the seeds not fixed


@given(st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=60), st.floats(0.05, 0.8))
def test_intervals_are_ordered_values_of_the_rehearsals_and_shrink_with_coverage(values, coverage):
    low, high = prediction_interval(values, coverage)
    wide_low, wide_high = prediction_interval(values, 0.8)
    assert low in values and high in values and wide_low <= low <= high <= wide_high


@given(st.floats(0.01, 0.99))
def test_the_fewest_rehearsals_are_enough_and_one_fewer_is_not(coverage):
    count = num_rehearsals(coverage)
    prediction_interval([float(i) for i in range(count)], coverage)
    assert (count - 1) / (count + 1) >= coverage - 1e-6
    if count > 1:
        assert (count - 2) / count < coverage


def test_it_rehearses_what_was_asked_on_fresh_public_data(bench, lottery):
    budget = {"neighboring_relation": "replace_one", "delta": 1e-6}
    made = forecast.forecast(40, 2.0, num_classes=4, num_images=20, bench=bench, tasks=Tasks(), **budget)
    assert len(lottery) == len(made.rehearsals) == 9
    for own, epsilon, _ in lottery:
        assert epsilon == 2.0 and own.delta == 1e-6 and own.neighboring_relation == "replace_one"
        assert torch.bincount(own.private_train.labels).tolist() == [10] * 4 and own.settings.num_images == 20
    assert len({own.private_train.images.sum().item() for own, _, _ in lottery}) == 9
    told = made.summary()
    low, high = told["frechet_distance"]["interval"]
    assert low <= told["frechet_distance"]["expected"] <= high and told["precision"] is None


def test_one_class_has_no_accuracy(bench, lottery):
    made = forecast.forecast(40, 1.0, num_images=20, bench=bench, tasks=Tasks())
    assert made.expected("accuracy") is None and made.summary()["accuracy"] is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"coverage": 1.0}, "coverage must lie"),
        ({"rehearsals": 8}, "80% needs 9 rehearsals, not 8"),
        ({"num_classes": 41}, "num_classes must lie in 1 .. 40"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"method": "magic"}, "unknown method"),
        ({"num_images": 15}, "need 16 samples"),
        ({"num_images": 17, "num_classes": 10}, "must be 20 or more"),
    ],
)
def test_bad_requests_are_refused_before_any_rehearsal(bench, lottery, changes, message):
    asked = {"num_private": 40, "epsilon": 1.0, "num_images": 20, "bench": bench, "tasks": Tasks()}
    with pytest.raises(InputError, match=message):
        forecast.forecast(**{**asked, **changes})
    assert not lottery


def test_the_command_prints_the_table(bench, lottery, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "public_bench", lambda *args, **kwargs: dataclasses.replace(bench))
    monkeypatch.setattr(tuning, "held_out_tasks", lambda *args: Tasks())
    command = ["forecast", "--num-private", "40", "--epsilon", "1", "--classes", "2", "--num-images", "20"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[0]
    assert "fonts and pen strokes held out from training" in first
    assert "private images unlike these will do worse" in first
    assert cli.main([*command, "--json"]) == 0 and "held out" in json.loads(capsys.readouterr().out)["about"]
    assert "9 rehearsals on public data" in out and "probability 80%" in out and "frechet distance" in out
    assert cli.main([*command, "--rehearsals", "5"]) == 2
    assert "needs 9 rehearsals" in capsys.readouterr().err


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("forecast_coverage")


@pytest.mark.parametrize("count, coverage, exact", [(9, 0.8, 0.8), (19, 0.8, 0.8), (19, 0.9, 0.9), (9, 0.6, 0.6)])
def test_over_all_splits_distinct_scores_are_covered_exactly_as_promised(benchmark, count, coverage, exact):
    values = list(np.random.default_rng(0).lognormal(size=60))
    assert benchmark.all_splits(values, count, coverage) == pytest.approx(exact, abs=1e-6)


def test_all_splits_counts_what_a_loop_counts_with_ties(benchmark):
    rng = np.random.default_rng(1)
    values = list(rng.integers(0, 4, 30).astype(float))
    hits = []
    for _ in range(20_000):
        *nine, last = rng.permutation(values)[:10]
        low, high = prediction_interval(nine, 0.8)
        hits.append(low <= last <= high)
    assert np.mean(hits) > 0.9
    assert benchmark.all_splits(values, 9, 0.8) == pytest.approx(np.mean(hits), abs=0.01)


def test_the_measurement_sees_an_interval_that_is_too_narrow_and_scores_that_drift(benchmark, monkeypatch):
    rng = np.random.default_rng(2)
    values = list(rng.normal(size=1800))
    honest = benchmark.measured(values, 9, 0.8)
    assert honest["groups"] == 180 and honest["forecasts"] == 100 and honest["tied"] == 0
    for name in ("covered_interval", "share_interval"):
        assert honest[name][0] <= 0.8 <= honest[name][1]
    drifting = benchmark.measured([value + 0.3 * i for i, value in enumerate(values)], 9, 0.8)
    assert drifting["covered_interval"][1] < 0.8 and drifting["share_interval"][1] < 0.8
    monkeypatch.setattr(forecast, "prediction_interval", lambda some, _: (sorted(some)[1], sorted(some)[-2]))
    narrow = benchmark.measured(values, 9, 0.8)
    assert narrow["all_splits"] == 0.6
    assert narrow["covered_interval"][1] < 0.8 and narrow["share_interval"][1] < 0.75


def test_groups_share_no_rehearsal_and_few_values_give_no_row(benchmark):
    assert benchmark.one_more([0.0, 1.0, 2.0, 0.5] * 3, 3, 0.5) == (3, 3)
    assert benchmark.many_more([0.0, 2.0, 1.0, 1.0, 1.5, 9.0] * 2, 3, 0.5) == [2 / 3, 2 / 3]
    assert benchmark.measured([1.0] * 35, 9, 0.8) is None
    assert benchmark.measured([float(i) for i in range(36)], 9, 0.8)["forecasts"] == 2


def test_the_benchmark_writes_a_record(benchmark, bench, lottery, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "public_bench", lambda *args: bench)
    monkeypatch.setattr(tuning, "held_out_tasks", lambda *args: Tasks())
    out = tmp_path / "coverage.json"
    small = ["--share", "0.05", "--num-images", "20", "--forecast-images", "20", "--settings", "1", "--forecasts", "1"]
    monkeypatch.setattr(sys, "argv", ["forecast_coverage", *small, "--out", str(out)])
    monkeypatch.setattr(forecast, "SCORES", ("frechet_distance",))
    benchmark.main()
    record = json.loads(out.read_text())
    assert [row["weights"] for row in record["rows"]] == ["glyphs"]
    assert len(record["values"][0]["scores"]["frechet_distance"]) == 36 == len(lottery) - 9
    assert record["rows"][0]["groups"] == 3 and record["forecasts"][0]["num_rehearsals"] == 9
    assert record["provenance"]["command"] == "python benchmarks/forecast_coverage.py"
