"""Promises of the bounds: what nobody without public data can beat, when DP-DeepSets provably wins, where it loses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import bounds, deepsets, rivals
from hyperdp_lib.theory.setting import LinearSetting, gdp_mu

DELTA = 1e-5
MUS = gdp_mu([0.25, 0.5, 1, 2, 4, 8], DELTA)

a_setting = st.builds(
    LinearSetting,
    d=st.integers(11, 300),
    k=st.integers(1, 10),
    tau=st.floats(0.3, 3),
    noise_std=st.floats(0.1, 3),
    off_subspace_energy=st.sampled_from([0.0, 0.1, 0.5]),
    subspace_error=st.sampled_from([None, 0.0, 0.1]),
)
sizes, mus = st.integers(10, 10**5), st.floats(0.02, 3)


# ------------------------------------------------------------------ Theorem 2


@pytest.mark.parametrize(("n", "epsilon", "bound"), [(300, 0.5, 0.566), (1000, 0.25, 0.302)])
def test_golden_lower_bounds(n, epsilon, bound):
    """Points at which the privacy part decides."""
    assert bounds.lower_bound(LinearSetting(), n, gdp_mu(epsilon, DELTA)) == pytest.approx(bound, abs=6e-4)


@pytest.mark.parametrize(
    ("n", "epsilon", "floor"), [(300, 1, 0.250), (1000, 1, 0.058), (3000, 1, 0.0175), (10_000, 8, 0.0051)]
)
def test_golden_floors_with_the_ridge_of_a_gaussian_prior(n, epsilon, floor):
    """Not a bound for tasks of fixed norm, but what the best linear estimator without noise has."""
    bound = float(bounds.lower_bound(LinearSetting(), n, gdp_mu(epsilon, DELTA)))
    assert max(bound, float(rivals.bayes_ridge(LinearSetting(), n))) == pytest.approx(floor, rel=0.015)
    assert bound < floor


def test_the_lower_bound_from_its_definition():
    """Neither part alone, with numbers worked out here."""
    setting = LinearSetting(d=11, k=2, tau=2.0, noise_std=3.0, off_subspace_energy=1.0)
    sampling, private = 10 * 9 / 50, 100 * 9 / (2500 * (np.exp(4 * 0.3**2) - 1))
    expected = [5 * x / (5 + x) for x in (max(sampling, private), sampling)]
    assert bounds.lower_bound(setting, 50, [0.3, 20.0]) == pytest.approx(expected)


@given(a_setting, sizes, mus)
@settings(max_examples=25, deadline=None)
def test_no_rival_without_public_data_is_below_the_lower_bound(setting, n, mu):
    bound = float(bounds.lower_bound(setting, n, mu))
    assert 0 < bound <= setting.trivial_risk
    assert float(rivals.dp_gd(setting, n, mu).risk) >= bound
    assert float(rivals.one_step(setting, n, mu)) >= bound
    assert float(rivals.noisy_statistics(setting, n, mu)) >= bound


@given(a_setting, sizes)
@settings(max_examples=25, deadline=None)
def test_the_lower_bound_at_the_ends(setting, n):
    assert bounds.lower_bound(setting, n, 0.0) == pytest.approx(setting.trivial_risk)
    sampling = (setting.d - 1) * setting.noise_std**2 / n
    expected = setting.trivial_risk * sampling / (setting.trivial_risk + sampling)
    assert bounds.lower_bound(setting, n, np.inf) == pytest.approx(expected)
    assert bounds.lower_bound(setting, n, 1e9) == pytest.approx(expected)


# ------------------------------------------------------------------ Theorem 3 and its corollary

CERTIFIED = [  # d, k, s^2, eta, gamma^2, and for each epsilon the largest certified n up to 10^6 (0: none from 30 on)
    (200, 5, 0.25, 0.0, 0.0, [10**6] * 6),
    (200, 5, 0.25, 0.0139, 0.0, [4870, 2407, 2470, 2470, 2470, 2470]),
    (200, 5, 0.25, 0.0139, 0.1, [1714, 869, 397, 229, 242, 242]),
    (200, 5, 1.0, 0.0235, 0.0, [7790, 7204, 7204, 7204, 7204, 7204]),
    (1000, 10, 1.0, 0.01, 0.1, [18435, 9600, 7590, 7590, 7590, 7590]),
    (50, 10, 0.25, 0.0, 0.0, [0] * 6),
]


@pytest.mark.parametrize(("d", "k", "s2", "eta", "gamma2", "largest"), CERTIFIED)
def test_golden_certified_ranges(d, k, s2, eta, gamma2, largest):
    setting = LinearSetting(d=d, k=k, noise_std=s2**0.5, subspace_error=eta, off_subspace_energy=gamma2)
    n = np.unique(np.geomspace(30, 1e6, 400).astype(int))
    certified = bounds.certified(setting, n[:, None], MUS)
    found = [n[np.r_[True, column].cumprod().sum() - 2] if column[0] else 0 for column in certified.T]
    assert found == pytest.approx(largest, rel=0.03)  # the grid is that fine


@given(st.integers(1, 30), st.floats(0.1, 3), st.floats(0.05, 0.5), st.integers(2, 10**7))
@settings(max_examples=60, deadline=None)
def test_where_the_corollary_holds_every_n_is_certified(k, noise_std, mu, n):
    sigma = (1 + noise_std**2) ** 0.5 / noise_std
    smallest = 1 + max(np.pi * (k + 2) * sigma**2, 4.65 * (k * (k + 2)) ** 0.5 * sigma)
    d = int(np.ceil(smallest))
    setting = LinearSetting(d=d, k=k, noise_std=noise_std, subspace_error=0.0)
    assert bounds.corollary_holds(setting, mu)
    assert bounds.certified(setting, n, mu)
    assert not bounds.corollary_holds(LinearSetting(d=d, k=k, noise_std=noise_std, subspace_error=0.01), mu)
    assert not bounds.corollary_holds(setting, 0.51)


@given(a_setting, sizes, mus)
@settings(max_examples=25, deadline=None)
def test_a_certified_point_is_one_where_the_formulas_agree(setting, n, mu):
    if bounds.certified(setting, n, mu):
        assert float(deepsets.risk(setting, n, mu)) < float(rivals.dp_gd(setting, n, mu).risk)


# ------------------------------------------------------------------ crossover

CROSSOVER = [  # s^2, gamma^2 -> n* for each epsilon by state evolution
    (0.25, 0.0, [24892, 14699, 9291, 6285, 4708, 4041]),
    (0.25, 0.02, [15207, 8534, 5126, 3352, 2427, 1913]),
    (0.25, 0.1, [8110, 4474, 2597, 1587, 1073, 790]),
    (0.25, 0.3, [5126, 2828, 1587, 953, 612, 436]),
    (1.0, 0.0, [36795, 22865, 15207, 11587, 9612, 8980]),
    (1.0, 0.02, [24892, 14951, 9612, 6960, 5580, 4955]),
]


@pytest.mark.parametrize(("s2", "gamma2", "expected"), CROSSOVER)
def test_golden_crossovers(s2, gamma2, expected):
    setting = LinearSetting(noise_std=s2**0.5, off_subspace_energy=gamma2)
    found = bounds.crossover(setting, MUS)
    assert found == pytest.approx(expected, rel=0.05)
    ratio = bounds.crossover_closed_form(setting, MUS) / found
    assert ((ratio > 0.7) & (ratio < 1.25)).all()


def test_each_side_wins_on_its_side_of_the_crossover():
    setting = LinearSetting(off_subspace_energy=0.1)
    mu = gdp_mu(2.0, DELTA)
    n = bounds.crossover(setting, mu) * np.array([0.9, 1.1])
    gap = rivals.dp_gd(setting, n, mu).risk - deepsets.risk(setting, n, mu)
    assert gap[0] > 0 > gap[1]


def test_a_crossover_may_not_exist():
    assert bounds.crossover(LinearSetting(subspace_error=0.0), 0.3) == np.inf
    assert bounds.crossover_closed_form(LinearSetting(subspace_error=0.0), 0.3) == np.inf
    useless = LinearSetting(d=20, k=5, subspace_error=1.0)  # the learned subspace misses everything
    assert bounds.crossover(useless, 5.0) < 20
    with pytest.raises(InputError, match="mu above 0"):
        bounds.crossover(LinearSetting(), 0.0)
