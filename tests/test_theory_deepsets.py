"""Promises of the linear theory: exact moments, the risk of DP-DeepSets, the subspace error, and their edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import deepsets, subspace
from hyperdp_lib.theory.setting import LinearSetting, check_sizes, gdp_mu

DELTA = 1e-5
KNOWN = LinearSetting(subspace_error=0.0)

a_setting = st.builds(
    LinearSetting,
    d=st.integers(40, 300),
    k=st.integers(1, 30),
    tau=st.floats(0.1, 5),
    noise_std=st.floats(0.05, 5),
    off_subspace_energy=st.floats(0, 3),
    subspace_error=st.none() | st.floats(0, 1),
)
sizes, mus = st.integers(2, 10**6), st.floats(1e-3, 30)


# ------------------------------------------------------------------ mu and the checks


@pytest.mark.parametrize(
    ("epsilon", "mu"), [(0.25, 0.0753), (0.5, 0.1422), (1, 0.2681), (2, 0.5016), (4, 0.9249), (8, 1.6660)]
)
def test_mu_is_that_of_the_analytic_gaussian_mechanism(epsilon, mu):
    assert gdp_mu(epsilon, DELTA) == pytest.approx(mu, abs=6e-5)
    # Balle & Wang's formula, computed here from scipy's distribution functions
    mu = gdp_mu(epsilon, DELTA)
    delta = stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(DELTA, rel=1e-4)


def test_mu_at_the_ends_and_in_arrays():
    assert gdp_mu([0.0, np.inf], DELTA).tolist() == [0.0, np.inf]
    assert gdp_mu(np.ones((2, 3)), DELTA).shape == (2, 3)
    assert 0 < gdp_mu(1e-9, DELTA) < 1e-4  # delta alone allows that little


@pytest.mark.parametrize(
    "fault",
    [
        {"k": 201}, {"k": 0}, {"d": 1, "k": 1}, {"d": 2.5}, {"noise_std": 0.0}, {"tau": -1.0}, {"tau": float("nan")},
        {"off_subspace_energy": -0.1}, {"off_subspace_energy": float("nan")}, {"num_public_tasks": 0},
        {"examples_per_task": 1}, {"subspace_error": 1.5}, {"d": 5, "k": 5, "off_subspace_energy": 0.1},
    ],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused(fault):
    with pytest.raises(InputError):
        LinearSetting(**fault)


@pytest.mark.parametrize(
    ("n", "mu", "delta"),
    [(1, 1.0, None), (np.nan, 1.0, None), (100, -1.0, None), (100, np.nan, None), (100, 1.0, 0.01), (100, 1.0, 0.0)],
)
def test_sizes_that_make_no_sense_are_refused(n, mu, delta):
    with pytest.raises(InputError):
        check_sizes(n, mu, delta)


# ------------------------------------------------------------------ clipped moments (Prop. 2)


def moments_by_quadrature(k, alpha, s, clip):
    """The definition in Cartesian coordinates (x_1, q = rest of |v|^2, y), by adaptive integration."""

    def phi(y, r):
        return np.sign(y) if clip == 0 else np.clip(r * y, -clip, clip)

    def given_v(x, q):
        r = np.hypot(x, np.sqrt(q))
        y = x * alpha + s * Y
        value = phi(y, r)
        return (x / r * value * WY).sum(), (value**2 * WY).sum()

    grid = np.linspace(-9, 9, 1201)  # trapezoid rule for y: spectral but for the kink, hence so many
    Y, WY = grid, stats.norm.pdf(grid) * (grid[1] - grid[0])
    x, wx = np.polynomial.legendre.leggauss(80)
    x, wx = 4.5 * (x + 1), 4.5 * wx * 2 * stats.norm.pdf(4.5 * (x + 1))  # even in x
    quantiles = (np.arange(200) + 0.5) / 200
    total = np.zeros(2)
    for q in stats.chi2.ppf(quantiles, k - 1) if k > 1 else [0.0]:
        total += sum(w * np.array(given_v(xi, q)) for xi, w in zip(x, wx, strict=True))
    total /= len(quantiles) if k > 1 else 1
    return total[0] / alpha, total[1]


@pytest.mark.parametrize(
    ("k", "alpha", "s", "clip"), [(1, 1, 0.5, 0.7), (2, 0.6, 1.2, 1.5), (5, 1, 0.5, 0), (5, 1, 0.5, 2), (10, 2, 1, 9)]
)
def test_moments_agree_with_a_direct_integral(k, alpha, s, clip):
    rho, second = deepsets.clipped_moments(k, alpha, s, clip)
    expected = moments_by_quadrature(k, alpha, s, clip)
    assert (rho, second) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(
    ("k", "alpha", "s", "clip"), [(1, 1, 0.5, 0), (3, 0.8, 1.2, 2), (5, 1, 0.5, 1), (10, 1, 0.5, 3), (40, 1, 0.5, 5)]
)
def test_moments_agree_with_monte_carlo(k, alpha, s, clip):
    """|z| < 5 for ten numbers: false alarm below 1e-5 over all possible seeds."""
    rng = np.random.default_rng([k, 7])
    v = rng.standard_normal((200_000, k))
    u = v * (alpha * v[:, 0] + s * rng.standard_normal(len(v)))[:, None]
    length = np.linalg.norm(u, axis=1)
    scale = 1 / length if clip == 0 else np.minimum(1, clip / length)
    rho, second = deepsets.clipped_moments(k, alpha, s, clip)
    for sample, value in ((u[:, 0] * scale / alpha, rho), ((length * scale) ** 2, second)):
        assert abs(sample.mean() - value) <= 5 * sample.std() / len(v) ** 0.5 + 1e-12


@given(st.integers(1, 400), st.floats(0, 10), st.floats(0.02, 10), st.just(0.0) | st.floats(1e-2, 1e4))
@settings(max_examples=80, deadline=None)
def test_moments_are_those_of_some_distribution(k, alpha, s, clip):
    rho, second = deepsets.clipped_moments(k, alpha, s, clip)
    bound = 1.0 if clip == 0 else min(clip**2, k * (alpha**2 + s**2) + 2 * alpha**2)
    assert 0 < rho and 0 < second <= bound * (1 + 1e-4)
    assert (rho * alpha) ** 2 <= second * (1 + 1e-4)  # Jensen, up to quadrature where k = 1 and nearly all is clipped


def test_a_loose_clip_is_no_clip_and_alpha_zero_is_a_limit():
    loose, none = (np.array(deepsets.clipped_moments(4, 1.0, 0.5, clip)) for clip in (500.0, np.inf))
    assert loose == pytest.approx(none)
    at_zero, near = (np.array(deepsets.clipped_moments(4, alpha, 0.5, 1.0)) for alpha in (0.0, 1e-3))
    assert at_zero == pytest.approx(near, rel=1e-4)
    # alpha -> 0: rho = E[x_1^2; r |y| < C], a chi-square probability of the product, by adaptive integration
    value, _ = integrate.quad(
        lambda r: stats.chi.pdf(r, 4) * r**2 / 4 * (2 * stats.norm.cdf(1 / r / 0.5) - 1), 0, 12
    )
    assert at_zero[0] == pytest.approx(value, rel=1e-6)


# ------------------------------------------------------------------ risk (Theorems 1 and 1')

GOLDEN = [  # n, epsilon, risk, bound: the default instance
    (300, 0.5, 0.0626, 0.0909), (300, 1, 0.0438, 0.0672), (300, 8, 0.0348, 0.0579), (1000, 0.25, 0.0296, 0.0391),
    (1000, 1, 0.0211, 0.0283), (1000, 8, 0.0202, 0.0274), (3000, 1, 0.0161, 0.0185), (10000, 0.25, 0.0146, 0.0153),
]  # fmt: skip


@pytest.mark.parametrize(("n", "epsilon", "risk", "bound"), GOLDEN)
def test_golden_risks(n, epsilon, risk, bound):
    mu = gdp_mu(epsilon, DELTA)
    assert deepsets.risk(LinearSetting(), n, mu) == pytest.approx(risk, abs=1e-4)
    assert deepsets.risk_bound(LinearSetting(), n, mu) == pytest.approx(bound, abs=1e-4)


def test_unclipped_and_non_private_is_elementary():
    """N = (k sigma_y^2 + A) / n (Prop. 1)."""
    noise = (5 * 1.25 + 1) / 700
    assert deepsets.risk(KNOWN, 700, np.inf, np.inf) == pytest.approx(noise / (1 + noise), rel=1e-12)


@given(a_setting, sizes, mus)
@settings(max_examples=60, deadline=None)
def test_risk_lies_between_floor_and_trivial_and_below_its_bound(setting, n, mu):
    risk = float(deepsets.risk(setting, n, mu))
    assert setting.floor - 1e-12 <= risk <= setting.trivial_risk + 1e-12
    assert risk <= deepsets.risk_bound(setting, n, mu) + 1e-9
    assert risk <= deepsets.risk(setting, n, mu, deepsets.rule_of_thumb_clip(setting)) * 1.001
    assert float(sum(deepsets.error_budget(setting, n, mu).values())) == pytest.approx(risk, rel=1e-9)
    assert all(part >= 0 for part in deepsets.error_budget(setting, n, mu).values())
    assert float(deepsets.risk(setting, 2 * n, mu)) <= risk + 1e-12
    assert float(deepsets.risk(setting, n, 2 * mu)) <= risk + 1e-12


@given(a_setting, sizes)
@settings(max_examples=20, deadline=None)
def test_without_budget_the_risk_is_trivial_never_nan(setting, n):
    for function in (deepsets.risk, deepsets.risk_bound, deepsets.second_moment_risk):
        assert function(setting, n, 0.0) == pytest.approx(setting.trivial_risk, rel=1e-12)
        assert setting.floor - 1e-12 <= function(setting, n, np.inf) <= setting.trivial_risk + 1e-12
    assert np.isfinite(list(deepsets.error_budget(setting, n, 0.0).values())).all()


@given(st.floats(0.1, 10), sizes, mus)
@settings(max_examples=20, deadline=None)
def test_units_do_not_matter(scale, n, mu):
    """Measuring y in other units scales the risk by the square, and chooses the same clip."""
    other = LinearSetting(tau=scale, noise_std=0.5 * scale, subspace_error=0.02)
    setting = LinearSetting(subspace_error=0.02)
    assert deepsets.risk(other, n, mu) == pytest.approx(scale**2 * deepsets.risk(setting, n, mu), rel=1e-9)
    assert deepsets.optimal_clip(other, n, mu) == pytest.approx(scale * deepsets.optimal_clip(setting, n, mu))


def test_a_vanishing_clip_is_the_normalised_embedding():
    risks = deepsets.risk(KNOWN, 500, 0.3, [0.0, 1e-250, 1e-6])
    assert risks == pytest.approx(risks[0], rel=1e-5)


def test_points_are_broadcast():
    n, mu = np.array([[100], [1000], [5000]]), np.array([0.1, 1.0])
    risks = deepsets.risk(LinearSetting(), n, mu)
    assert risks.shape == (3, 2)
    assert risks[2, 0] == deepsets.risk(LinearSetting(), 5000, 0.1)


def test_the_clip_falls_with_epsilon_to_the_normalised_embedding():
    clips = deepsets.optimal_clip(KNOWN, 300, gdp_mu([0.05, 1.0, 8.0], DELTA))
    assert clips[0] == 0 and (np.diff(clips) > 0).all()
    assert clips[-1] == pytest.approx(1.1 * (5 * 1.25) ** 0.5, rel=0.15)  # sampling dominates: finite all the same


def test_the_decoder_scale_is_the_best():
    n, mu, clip = 400, 0.2, 1.0
    scale = float(deepsets.decoder_scale(KNOWN, n, mu, clip))
    rho, second = deepsets.clipped_moments(5, 1.0, 0.5, clip)
    power = rho**2 + (second - rho**2) / n + 5 * (clip / (n * mu)) ** 2  # E|z|^2

    def risk(m):
        return 1 - 2 * m * rho + m**2 * power

    assert risk(scale) == pytest.approx(float(deepsets.risk(KNOWN, n, mu, clip)), rel=1e-9)
    assert risk(scale) < min(risk(0.99 * scale), risk(1.01 * scale))


def test_gaussian_tasks_make_a_hard_clip_expensive():
    setting = LinearSetting(k=3, subspace_error=0.0)
    hard, soft = (
        deepsets.gaussian_task_risk(setting, 2000, gdp_mu(4, DELTA), c * (3 * 1.25) ** 0.5) for c in (0.8, 7.0)
    )
    assert soft == pytest.approx(0.0025, abs=2e-4) and hard > 10 * soft


# ------------------------------------------------------------------ subspace (Prop. 4)


@pytest.mark.parametrize(
    ("noise_std", "gamma2", "eta"),
    [(0.5, 0, 0.0139), (0.5, 0.02, 0.0142), (0.5, 0.1, 0.0154), (0.5, 0.3, 0.0187), (1, 0, 0.0235), (1, 0.02, 0.0238)],
)
def test_golden_subspace_errors(noise_std, gamma2, eta):
    assert LinearSetting(noise_std=noise_std, off_subspace_energy=gamma2).eta == pytest.approx(eta, abs=6e-5)


@given(a_setting)
@settings(max_examples=60, deadline=None)
def test_subspace_error_is_a_share_and_falls_with_public_data(setting):
    fields = {"d": setting.d, "k": setting.k, "tau": setting.tau, "noise_std": setting.noise_std}
    errors = [
        subspace.subspace_error(LinearSetting(**fields, num_public_tasks=tasks, examples_per_task=20))
        for tasks in (1, 10, 100, 10_000, 10**8)
    ]
    assert all(0 <= error <= 1 for error in errors)
    assert errors == sorted(errors, reverse=True)


def test_nothing_is_learned_below_the_threshold_and_something_above():
    limit = subspace.threshold_tasks(LinearSetting(examples_per_task=10))
    assert limit == pytest.approx(195 * 25 * 1.25**2 / 81)
    below, above = (LinearSetting(examples_per_task=10, num_public_tasks=int(limit * f)) for f in (0.9, 1.5))
    assert below.eta == 1.0 and above.eta < 0.9
    assert subspace.threshold_tasks(LinearSetting(off_subspace_energy=50.0)) == np.inf
    assert LinearSetting(d=5, k=5).eta == 0.0


def test_plain_moments_are_worse_for_many_examples_a_task_and_better_for_few():
    """Both to first order in 1/T."""
    for d, m, plain_is_better in ((1000, 20, False), (200, 5, True)):
        setting = LinearSetting(d=d, num_public_tasks=10**6, examples_per_task=m)
        assert (subspace.plain_subspace_error(setting) < subspace.subspace_error(setting)) == plain_is_better
