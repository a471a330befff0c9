"""Marks have the false-alarm rate that they state, and show a clear difference."""

import numpy as np
import pytest
from scipy import stats

from hyperdp_lib.pages import marks

DISTANCE = "frechet_distance"


def test_statistics_and_p_values_are_those_of_scipy():
    random = np.random.default_rng(0)
    for sizes in ((3, 3, 3, 3, 3, 3), (6, 3, 2, 4)):
        control, *others = (random.normal(size=size) for size in sizes)
        others[0] += 2.0
        expected = stats.dunnett(*others, control=control, rng=0)
        statistics, p_values = marks.dunnett(control, others)
        np.testing.assert_allclose(statistics, expected.statistic, rtol=1e-9)
        np.testing.assert_allclose(p_values, expected.pvalue, atol=2e-3)


def test_one_comparison_is_a_t_test():
    control, other = [1.0, 2.0, 2.5], [4.0, 4.5, 6.0]
    (statistic,), (p_value,) = marks.dunnett(control, [other])
    expected = stats.ttest_ind(other, control)
    assert statistic == pytest.approx(expected.statistic) and p_value == pytest.approx(expected.pvalue, abs=1e-4)


def test_tables_in_which_nothing_differs_have_a_mark_at_the_stated_rate():
    """500 tables of three columns and eight methods with three seeds: three standard errors, 2.9 %, allowed."""
    random, tables = np.random.default_rng(0), 500
    names = ["ours", *map(str, range(7))]
    marked = 0
    for _ in range(tables):
        distances = np.exp(random.normal(4.0, 0.3, (2, 8, 3)))
        accuracies = random.normal(0.8, 0.02, (8, 3))
        columns = [dict(zip(names, column, strict=True)) for column in (*distances, accuracies)]
        found = marks.marks(columns, "ours", [DISTANCE, DISTANCE, "accuracy"])
        marked += any(any(column.values()) for column in found)
    assert 0.021 <= marked / tables <= 0.079


def test_a_clear_difference_is_marked_in_the_right_direction():
    random = np.random.default_rng(0)
    truth = {"ours": 50.0, "alike": 50.0, "twice": 100.0, "half": 25.0}
    distances = {name: mean * np.exp(random.normal(0, 0.05, 3)) for name, mean in truth.items()}
    accuracies = {name: mean / 100 + random.normal(0, 0.01, 3) for name, mean in truth.items()}
    first, second = marks.marks([distances, accuracies], "ours", [DISTANCE, "accuracy"])
    assert first == {"alike": "", "twice": marks.WORSE, "half": marks.BETTER}
    assert second == {"alike": "", "twice": marks.BETTER, "half": marks.WORSE}


def test_what_cannot_be_compared_has_no_mark():
    column = {"ours": [50.0, 51.0], "one seed": [5.0], "none": [], "far": [500.0, 510.0]}
    assert marks.marks([column], "ours", [DISTANCE]) == [{"far": marks.WORSE}]
    assert marks.marks([column, {}], "absent", [DISTANCE, DISTANCE]) == [{}, {}]
    alone = {"ours": [50.0], "far": [500.0, 510.0]}
    assert marks.marks([alone], "ours", [DISTANCE]) == [{}]
    assert marks.marks([], "ours", []) == []
    still = {"ours": [0.1 + 0.2] * 3, "same": [0.3] * 3}  # but for rounding no spread at all
    assert marks.marks([still], "ours", ["accuracy"]) == [{"same": ""}]
