"""Accounting: golden values, independent accountants, round trips, and the discretisation theorem."""

import math

import dp_accounting
import mpmath
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from hyperdp_lib import accounting, dp_sgd_accounting, mechanism

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EPSILONS = st.floats(-3, 4).map(lambda power: 10**power)
DELTAS = st.floats(-12, -1).map(lambda power: 10**power)


# ---- golden values ------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "sigma"), [(0.5, 7.03), (1, 3.73), (2, 1.99), (4, 1.08), (10, 0.50), (16, 0.34)]
)
def test_noise_multipliers_of_the_analytic_gaussian_mechanism(epsilon, sigma):
    assert round(accounting.noise_multiplier(epsilon, 1e-5), 2) == sigma


@pytest.mark.parametrize(
    ("epsilon", "mu"), [(0.25, 0.0753), (0.5, 0.1422), (1, 0.2681), (2, 0.5016), (4, 0.9249), (8, 1.6660)]
)
def test_gaussian_dp_parameters(epsilon, mu):
    # four digits as printed in the theory chapter, whose last one may be cut or rounded
    assert accounting.mu(accounting.noise_multiplier(epsilon, 1e-5)) == pytest.approx(mu, abs=1e-4)


@pytest.mark.parametrize("epsilon", [0.25, 1.0, 4.0, 16.0])
def test_never_the_classical_gaussian(epsilon):
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
    assert accounting.noise_multiplier(epsilon, 1e-5) != pytest.approx(classical, rel=0.02)
    if epsilon > 10:  # there the classical formula gives too little noise, and we can tell
        assert accounting.epsilon(classical, 1e-5) > epsilon


def test_zcdp_is_exact_and_looser():
    assert accounting.rho(2.0) == 0.125
    rho, delta = accounting.rho(3.73), 1e-5
    assert accounting.epsilon(3.73, delta) < rho + 2 * math.sqrt(rho * math.log(1 / delta))


# ---- independent accountants ------------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-10, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("epsilon", [0.01, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 50.0])
def test_agrees_with_the_analytic_formula_of_dp_accounting(epsilon, delta):
    ours = accounting.noise_multiplier(epsilon, delta)
    theirs = dp_accounting.get_sigma_gaussian(epsilon, delta)
    assert theirs <= ours <= theirs * (1 + 1e-6)
    their_epsilon = dp_accounting.get_epsilon_gaussian(ours, delta)
    assert accounting.epsilon(ours, delta) == pytest.approx(their_epsilon, rel=1e-6)


@pytest.mark.parametrize("epsilon", [0.25, 0.5, 1.0, 4.0, 16.0])
def test_agrees_with_privacy_loss_distributions(epsilon):
    pld = dp_accounting.pld.PLDAccountant()
    pld.compose(dp_accounting.GaussianDpEvent(accounting.noise_multiplier(epsilon, 1e-5)))
    assert pld.get_epsilon(1e-5) == pytest.approx(epsilon, rel=1e-4)


def test_replace_one_is_add_or_remove_at_twice_the_sensitivity():
    multiplier = accounting.noise_multiplier(2.0, 1e-5)
    config = mechanism.GaussianSum(4, multiplier, neighboring_relation="replace_one")
    pld = dp_accounting.pld.PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    pld.compose(dp_accounting.GaussianDpEvent(config.noise_std / config.clip_norm))
    assert pld.get_epsilon(1e-5) == pytest.approx(2.0, rel=1e-4)


@QUICK
@given(EPSILONS, DELTAS)
def test_never_below_the_exact_value(epsilon, delta):
    """Equation (1) in 60 digits: our floating-point bound is above it, and not by much."""
    multiplier = accounting.noise_multiplier(epsilon, delta)
    with mpmath.workdps(60):
        mu, e = 1 / mpmath.mpf(multiplier), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(mu / 2 - e / mu) - mpmath.exp(e) * mpmath.ncdf(-mu / 2 - e / mu)
        assert exact <= delta
        assert exact >= delta * (1 - mpmath.mpf("1e-3"))


# ---- round trips and monotonicity ------------------------------------------------------------


@QUICK
@given(EPSILONS, DELTAS)
def test_calibration_never_spends_more_than_asked(epsilon, delta):
    multiplier = accounting.noise_multiplier(epsilon, delta)
    assert epsilon * (1 - 1e-4) <= accounting.epsilon(multiplier, delta) <= epsilon
    assert accounting.delta(multiplier, epsilon) <= delta


@QUICK
@given(EPSILONS, DELTAS, st.floats(1.001, 100.0))
def test_less_budget_needs_more_noise(epsilon, delta, ratio):
    multiplier = accounting.noise_multiplier(epsilon, delta)
    assert multiplier > accounting.noise_multiplier(epsilon * ratio, delta)
    assert multiplier > accounting.noise_multiplier(epsilon, delta ** (1 / ratio))
    assert accounting.delta(multiplier, epsilon) >= accounting.delta(multiplier * ratio, epsilon)
    assert accounting.delta(multiplier, epsilon) >= accounting.delta(multiplier, epsilon * ratio)


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan])
def test_no_noise_multiplier_for_no_budget(bad):
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        accounting.noise_multiplier(bad, 1e-5)
    with pytest.raises(ValueError, match="epsilon must be above 0"):
        dp_sgd_accounting.dp_sgd_noise_multiplier(bad, 1e-5, 0.1, 10)


@pytest.mark.parametrize("bad", [0.0, 1.0, -1e-5, 2.0, math.nan])
def test_delta_must_be_a_small_probability(bad):
    with pytest.raises(ValueError, match="delta must be between"):
        accounting.noise_multiplier(1.0, bad)
    with pytest.raises(ValueError, match="delta must be between"):
        accounting.epsilon(1.0, bad)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, []])
def test_noise_multipliers_are_checked(bad):
    with pytest.raises(ValueError, match="noise multiplier"):
        accounting.epsilon(bad, 1e-5)


def test_a_budget_beyond_floats_is_refused():
    with pytest.raises(ValueError, match="too small"):
        accounting.noise_multiplier(1e-300, 1e-59)


def test_infinite_epsilon_is_no_noise_and_back():
    assert accounting.noise_multiplier(math.inf, 1e-5) == 0.0
    assert accounting.epsilon(0.0, 1e-5) == math.inf
    assert accounting.epsilon([3.0, 0.0], 1e-5) == math.inf
    assert accounting.mu(0.0) == accounting.rho(0.0) == math.inf


# ---- composition ------------------------------------------------------------


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_gaussian_releases_compose_exactly(multipliers):
    together = accounting.epsilon(multipliers, 1e-5)
    single = 1 / math.sqrt(sum(m**-2 for m in multipliers))
    assert together == pytest.approx(accounting.epsilon(single, 1e-5), rel=1e-5)
    pld = dp_accounting.pld.PLDAccountant()
    for multiplier in multipliers:
        pld.compose(dp_accounting.GaussianDpEvent(multiplier))
    assert together == pytest.approx(pld.get_epsilon(1e-5), rel=1e-3, abs=1e-3)


# ---- the discretisation theorem ------------------------------------------------------------


def exact_discrete_delta(scale, shift, epsilon):
    """Hockey-stick divergence of the one-dimensional discrete Gaussian from its shift, by summation."""
    points = np.arange(-int(40 * scale) - shift, int(40 * scale) + 2 * shift + 1, dtype=np.float64)
    p = np.exp(-(points**2) / (2 * scale**2))
    shifted = np.exp(-((points - shift) ** 2) / (2 * scale**2))
    return float(np.maximum(p - math.exp(epsilon) * shifted, 0).sum() / p.sum())


@pytest.mark.parametrize("sensitivity", [1, 4, 32])
@pytest.mark.parametrize("multiplier", [0.5, 1.08, 3.73])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 4.0])
def test_the_theorem_holds_on_coarse_grids(sensitivity, multiplier, epsilon, monkeypatch):
    """At scales near 1 the discrete delta differs visibly; the proven bound must stay above it."""
    monkeypatch.setattr(accounting, "MIN_GRID_SENSITIVITY", sensitivity)
    monkeypatch.setattr(accounting, "MAX_COORDINATES", 1)
    scale = multiplier * sensitivity
    if scale < 1:
        assert accounting.delta(multiplier, epsilon) == 1.0
        return
    exact = exact_discrete_delta(scale, sensitivity, epsilon)
    assert exact <= accounting.delta(multiplier, epsilon) + 1e-15


def test_each_inequality_of_the_proof():
    """Steps 1 and 2, and the bounds on Z, point by point in 50 digits."""
    with mpmath.workdps(50):
        for scale in (mpmath.mpf(1), mpmath.mpf("1.5"), mpmath.mpf(8)):
            normaliser = mpmath.fsum(
                mpmath.exp(-(mpmath.mpf(j) ** 2) / (2 * scale**2)) for j in range(-200, 201)
            )
            gaussian = scale * mpmath.sqrt(2 * mpmath.pi)
            excess = 3 * mpmath.exp(-2 * mpmath.pi**2 * scale**2)
            assert gaussian <= normaliser <= gaussian * (1 + excess)
            for j in range(0, 60):
                p = mpmath.exp(-(mpmath.mpf(j) ** 2) / (2 * scale**2)) / normaliser
                near, far = ((j + side / mpmath.mpf(2)) / scale / mpmath.sqrt(2) for side in (-1, 1))
                q = (mpmath.erfc(near) - mpmath.erfc(far)) / 2
                assert p <= mpmath.exp(1 / (24 * scale**2)) * q
                assert p >= q * mpmath.exp(-(mpmath.mpf(j) ** 2) / (24 * scale**4)) / (1 + excess)


def test_the_slack_is_negligible_on_the_real_grid_and_covers_the_mechanism():
    assert accounting.MAX_COORDINATES >= mechanism.MAX_COORDINATES
    assert accounting.MIN_GRID_SENSITIVITY <= 2**mechanism.MIN_GRID_BITS
    for multiplier in (0.3, 1.0, 3.73, 100.0):
        xi, log_c = accounting.discretisation_slack(multiplier)
        assert 0 < log_c < xi < 1e-6
    assert accounting.discretisation_slack(1e-9) == (math.inf, math.inf)
    assert accounting.delta(1e-9, 1.0) == 1.0


# ---- DP-SGD ------------------------------------------------------------


@pytest.mark.parametrize(("rate", "steps", "multiplier"), [(0.05, 300, 1.0), (0.5, 20, 3.0)])
def test_dp_sgd_lies_between_pld_and_rdp(rate, steps, multiplier):
    ours = dp_sgd_accounting.dp_sgd_epsilon(multiplier, 1e-5, rate, steps)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(multiplier, rate, steps)]
    pld = dp_sgd_accounting.pld_epsilon([(multiplier, rate, steps)], 1e-5)
    assert max(pld, prv.get_epsilon(1e-5)) <= ours * (1 + 1e-12)
    assert ours <= rdp.get_epsilon(1e-5)
    assert ours == pytest.approx(pld, rel=0.02, abs=0.02)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(1.0, 1e-12, 0.01, 200), (0.01, 1e-5, 0.1, 20), (0.01, 1e-12, 0.02, 20), (8.0, 1e-5, 0.25, 20)],
)
def test_the_promised_error_of_dp_sgd_calibration(epsilon, delta, rate, steps):
    multiplier = dp_sgd_accounting.dp_sgd_noise_multiplier(epsilon, delta, rate, steps)
    spent = dp_sgd_accounting.pld_epsilon([(multiplier, rate, steps)], delta)
    assert 0.985 * epsilon <= spent <= epsilon


def test_dp_sgd_is_not_accounted_for_below_its_least_delta():
    least = dp_sgd_accounting.MIN_DP_SGD_DELTA
    lower = dp_sgd_accounting.pld_epsilon([(2.0, 0.1, 20)], least)
    assert dp_sgd_accounting.pld_epsilon([(2.0, 0.1, 20)], 10 * least) < lower < math.inf
    for small in (1e-13, 1e-14, 1e-59):
        with pytest.raises(ValueError, match="from delta 1e-12 on"):
            dp_sgd_accounting.dp_sgd_epsilon(2.0, small, 0.1, 20)
        with pytest.raises(ValueError, match="from delta 1e-12 on"):
            dp_sgd_accounting.pld_epsilon([(2.0, 0.1, 20)], small)
        with pytest.raises(ValueError, match="from delta 1e-12 on"):
            dp_sgd_accounting.dp_sgd_noise_multiplier(1.0, small, 0.1, 20)
        assert dp_sgd_accounting.dp_sgd_epsilon(2.0, small, 1.0, 4) < math.inf  # full batches are one Gaussian


def test_dp_sgd_calibration_is_tight_and_safe():
    multiplier = dp_sgd_accounting.dp_sgd_noise_multiplier(2.0, 1e-5, 0.05, 200)
    assert 2.0 * 0.98 <= dp_sgd_accounting.dp_sgd_epsilon(multiplier, 1e-5, 0.05, 200, eps_error=0.01) <= 2.0


def test_full_batch_dp_sgd_is_one_gaussian():
    composed = dp_sgd_accounting.dp_sgd_epsilon(6.0, 1e-5, 1.0, 9)
    assert composed == pytest.approx(accounting.epsilon(2.0, 1e-5), rel=1e-6)


def test_dp_sgd_relations():
    removed, blanked = (
        dp_sgd_accounting.dp_sgd_epsilon(2.0, 1e-5, 1.0, 4, relation)
        for relation in ("add_or_remove_one", "zero_out")
    )
    assert removed == blanked
    with pytest.raises(ValueError, match="add_or_remove_one and zero_out only"):
        dp_sgd_accounting.dp_sgd_epsilon(2.0, 1e-5, 0.1, 4, "replace_one")


def test_dp_sgd_without_noise_or_with_nonsense():
    assert dp_sgd_accounting.dp_sgd_epsilon(0.0, 1e-5, 0.1, 10) == math.inf
    assert dp_sgd_accounting.dp_sgd_noise_multiplier(math.inf, 1e-5, 0.1, 10) == 0.0
    for rate, steps in ((0.0, 10), (1.5, 10), (0.1, 0)):
        with pytest.raises(ValueError, match="sample_rate"):
            dp_sgd_accounting.dp_sgd_epsilon(1.0, 1e-5, rate, steps)
