"""Theory of the rivals: golden values, independent computations, direct simulations, properties, and wrong formulas."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.optimize import minimize_scalar

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import deepsets, rivals
from hyperdp_lib.theory.setting import LinearSetting, gdp_mu

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DELTA = 1e-5

WORLDS = st.builds(
    lambda d, k, noise_std, energy, eta: LinearSetting(
        d=d, k=min(k, d), noise_std=noise_std, off_subspace_energy=energy if k < d else 0.0, subspace_error=eta
    ),
    st.sampled_from([2, 3, 20, 200, 1000]),
    st.sampled_from([1, 2, 5]),
    st.floats(0.05, 3.0),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([0.0, 0.02, 0.4, 1.0]),
)
SIZES = st.floats(np.log(2), np.log(1e6)).map(lambda value: round(math.exp(value)))
MUS = st.one_of(st.sampled_from([0.0, 1e-9, math.inf]), st.floats(-3, 1).map(lambda power: 10**power))


# ---- golden values (d=200, k=5, T=2000, m=50, s=0.5, tau=1) -------------------------------------------------

# n, epsilon: tuned DP-GD, one step, noisy statistics, projected DP-GD, Bayes ridge
TABLE = """
  300 0.5   .978  .978 1.00  .0359 .250
  300 1     .929  .931  .992 .0250 .250
  300 8     .455  .575  .905 .0189 .250
 1000 0.25  .934  .935  .993 .0211 .058
 1000 1     .525  .595  .956 .0161 .058
 1000 8     .0881 .246  .687 .0153 .058
 3000 1     .0881 .193  .833 .0144 .0175
10000 0.25  .0734 .150  .842 .0141 .0051
10000 1     .0132 .042  .507 .0140 .0051
10000 8     .0056 .026  .060 .0140 .0051
"""


def test_the_table_of_the_default_world():
    n, epsilon, *columns = np.array([line.split() for line in TABLE.strip().splitlines()], float).T
    world, mu = LinearSetting(), gdp_mu(epsilon, DELTA)
    ours = [
        rivals.dp_gd(world, n, mu).risk,
        rivals.one_step(world, n, mu),
        rivals.noisy_statistics(world, n, mu),
        rivals.projected_dp_gd(world, n, mu).risk,
        rivals.bayes_ridge(world, n),
    ]
    for risk, golden in zip(ours, columns, strict=True):
        ratio = risk / golden
        assert (ratio < 1.015).all()  # 1 % and rounding: ours are tuned more finely, so only lower
        assert (ratio > 0.95).all()


def test_an_untuned_learner_can_be_far_worse_than_nothing():
    risk = rivals.dp_gd_risk(LinearSetting(), 1000, gdp_mu(1.0, DELTA), steps=50, step_size=0.3, clip=math.sqrt(1.25))
    assert risk == pytest.approx(41.7, rel=0.01)


CROSSOVERS = {
    (0.5, 0.0): [24892, 14699, 9291, 6285, 4708, 4041],
    (0.5, 0.1): [8110, 4474, 2597, 1587, 1073, 790],
    (1.0, 0.02): [24892, 14951, 9612, 6960, 5580, 4955],
}


@pytest.mark.parametrize(("noise_std", "energy"), CROSSOVERS)
def test_dp_gd_meets_deepsets_at_the_crossover(noise_std, energy):
    world = LinearSetting(noise_std=noise_std, off_subspace_energy=energy)
    n, mu = CROSSOVERS[noise_std, energy], gdp_mu([0.25, 0.5, 1, 2, 4, 8], DELTA)
    ratio = rivals.dp_gd(world, n, mu).risk / deepsets.risk(world, n, mu)
    assert (ratio < 1.02).all() and (ratio > 0.94).all()


def test_the_hybrid_against_recorded_simulations():
    world = LinearSetting(off_subspace_energy=0.1)
    n, epsilon = np.array([500, 1000, 2500, 8000, 30000, 500, 1000, 2500, 8000]), np.array([1.0] * 5 + [4.0] * 4)
    simulated = np.array([0.137, 0.100, 0.049, 0.0107, 0.0024, 0.097, 0.061, 0.023, 0.0062])
    ratio = rivals.hybrid(world, n, gdp_mu(epsilon, DELTA)).risk / simulated
    assert (ratio > 0.9).all() and (ratio < 1.2).all()


# ---- state evolution: independent computations --------------------------------------------------------------


def marchenko_pastur(function, kappa, power=0):
    """Average of ``function(l) l^power``; the mass at 0 is the caller's. Adaptive quadrature of the density."""
    low, high = (1 - kappa**0.5) ** 2, (1 + kappa**0.5) ** 2

    def integrand(angle):
        value = (low + high) / 2 - (high - low) / 2 * math.cos(angle)
        slope = (high - low) / 2 * math.sin(angle)
        density = (high - low) / 2 * math.sin(angle) / (2 * math.pi * kappa * value)
        return function(value) * value**power * density * slope

    return quad(integrand, 0, math.pi, limit=400)[0]


@pytest.mark.parametrize(("d", "n"), [(40, 1000), (200, 300), (100, 101), (300, 100)])
@pytest.mark.parametrize(("steps", "size"), [(1, 0.4), (7, 0.3), (200, 0.1)])
def test_without_clip_and_noise_gradient_descent_filters_the_spectrum(d, n, steps, size):
    world, kappa, q, s2 = LinearSetting(d=d, off_subspace_energy=0.3), d / n, 1.3, 0.25

    def kept(value):
        return (1 - size * value) ** steps

    size = size / (1 + kappa)
    exact = q * marchenko_pastur(lambda v: kept(v) ** 2, kappa) + q * max(0, 1 - 1 / kappa)
    exact += kappa * s2 * marchenko_pastur(lambda v: (1 - kept(v)) ** 2, kappa, power=-1)
    ours = rivals.dp_gd_risk(world, n, math.inf, steps=steps, step_size=size, clip=math.inf)
    assert ours == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("n", [80, 150, 700])
def test_without_clip_and_noise_gradient_descent_ends_at_least_squares(n):
    world = LinearSetting(d=200)
    end = rivals.dp_gd_risk(world, n, math.inf, steps=2000, step_size=0.3, clip=math.inf)
    assert end == pytest.approx(float(rivals.ols(world, n)), rel=0.03)  # which is exact at finite d


def literal_state_evolution(world, n, mu, steps, alpha, clip, nodes=200):
    """The recursion as it is usually written, in loops and with its fourth state, one node at a time."""
    d, q, s2, kappa = world.d, world.trivial_risk, world.noise_std**2, world.d / n
    angles = [(j + 0.5) * math.pi / nodes for j in range(nodes)]
    spectrum = [1 + kappa + 2 * kappa**0.5 * math.cos(angle) for angle in angles]
    weights = [2 * math.sin(angle) ** 2 / nodes / value for angle, value in zip(angles, spectrum, strict=True)]
    spectrum, weights = [*spectrum, 0.0], [*weights, max(0.0, 1 - 1 / kappa)]
    noise = (clip * math.sqrt(d * steps) / (n * mu)) ** 2
    states = [(1.0, 0.0, 0.0, 0.0)] * len(spectrum)

    def error(state, value):
        b, s, c, v = state
        return b**2 * q + d * (s**2 * s2 + c**2) * value / n + d * v

    for _ in range(steps):
        v = s2
        for state, value, weight in zip(states, spectrum, weights, strict=True):
            v += weight * value * (error(state, value) - 2 * d * state[1] * s2 / n)
        r = clip / math.sqrt(v)
        h = math.erf(r / math.sqrt(2))
        second = v * (h - 2 * r * math.exp(-(r**2) / 2) / math.sqrt(2 * math.pi)) + clip**2 * (1 - h)
        distortion = math.sqrt(second - h**2 * v)
        for j, (b, s, c, w) in enumerate(states):
            f = 1 - alpha * h * spectrum[j]
            states[j] = (f * b, f * s + alpha * h, f * c + alpha * distortion, f**2 * w + alpha**2 * noise)
    return sum(w * error(state, value) for state, value, w in zip(states, spectrum, weights, strict=True))


@pytest.mark.parametrize("d", [50, 200, 500])  # kappa from 0.125 to 1.25
@pytest.mark.parametrize(("steps", "alpha", "clip"), [(1, 0.5, 0.3), (9, 0.1, 0.1), (30, 0.05, 1.5)])
def test_the_recursion_is_the_literal_one(d, steps, alpha, clip):
    world = LinearSetting(d=d, noise_std=0.7, off_subspace_energy=0.2)
    ours = rivals.dp_gd_risk(world, 400, 0.8, steps=steps, step_size=alpha, clip=clip)
    assert ours == pytest.approx(literal_state_evolution(world, 400, 0.8, steps, alpha, clip), rel=1e-8)


@pytest.mark.parametrize("kappa", [1e-6, 0.1, 0.97, 1.0, 1.03, 20.0, 1e6])
def test_the_spectrum_has_mass_and_moments_of_marchenko_and_pastur(kappa):
    nodes, weights = rivals._spectrum(np.array([kappa]))
    assert (nodes >= 0).all() and (weights >= 0).all()
    moments = [(weights * nodes**power).sum() for power in range(4)]
    assert moments == pytest.approx([1, 1, 1 + kappa, 1 + 3 * kappa + kappa**2], rel=1e-9)
    # near kappa = 1 the last node also stands for the dense spectrum beside it
    assert weights[0, -1] == pytest.approx(max(0, 1 - 1 / kappa), abs=0.015 if abs(kappa - 1) < 0.1 else 1e-9)


def test_the_best_single_step_is_the_best_of_a_grid():
    world, n, mu = LinearSetting(d=50), 300, 0.4
    sizes, clips = np.linspace(0.005, 2, 400)[:, None], np.geomspace(0.02, 6, 60)
    grid = rivals.dp_gd_risk(world, n, mu, steps=1, step_size=sizes, clip=clips).min()
    assert rivals.one_step(world, n, mu) == pytest.approx(grid, rel=1e-3)
    # and it is DP-DeepSets of dimension d, but for 1/d in the norm of x
    twin = LinearSetting(d=50, k=50, subspace_error=0.0)
    assert rivals.one_step(world, n, mu) == pytest.approx(float(deepsets.risk(twin, n, mu)), rel=0.02)


@pytest.mark.parametrize(("noise_std", "tau", "a"), [(0.5, 1.0, 0.1), (1.0, 1.0, 0.02), (0.25, 2.0, 0.3), (2.0, 1, 3)])
def test_the_small_step_constant_against_an_ode_solver(noise_std, tau, a):
    def end(log_beta):
        beta = math.exp(log_beta)

        def slope(_, e):
            return beta * (beta * a**2 - 2 * math.sqrt(2 / math.pi) * e / np.sqrt(noise_std**2 + e))

        return solve_ivp(slope, (0, 1), [tau**2], method="LSODA", rtol=1e-9, atol=1e-12).y[0, -1]

    least = minimize_scalar(end, bounds=(math.log(0.01), math.log(40)), method="bounded").fun
    assert rivals.small_step_constant(noise_std, tau, a) * a**2 == pytest.approx(min(least, tau**2), rel=1e-3)


def test_the_working_rule_is_within_a_third_where_it_applies():
    world = LinearSetting(subspace_error=0.0)
    n, mu = np.array([3000, 10000, 30000]), gdp_mu([[1.0], [2.0], [4.0]], DELTA)
    keep = world.d / (n * mu) < 0.3
    ratio = rivals.working_rule(world, n, mu) / rivals.dp_gd(world, n, mu).risk
    assert (ratio[keep] > 0.78).all() and (ratio[keep] < 1.35).all()


# ---- non-private learners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.02, 0.5, 0.999, 1.0, 1.5, 30.0])
@pytest.mark.parametrize("noise_std", [0.05, 0.5, 3.0])
def test_bayes_ridge_is_the_best_ridge_on_the_spectrum(kappa, noise_std):
    n = 1000
    world = LinearSetting(d=round(kappa * n), k=2, noise_std=noise_std, off_subspace_energy=0.4, subspace_error=0.0)
    kappa, q, s2 = world.d / n, 1.4, noise_std**2

    def ridge(penalty):  # bias and variance of ridge regression, by quadrature: no Stieltjes transform
        bias = marchenko_pastur(lambda v: (penalty / (v + penalty)) ** 2, kappa) + max(0, 1 - 1 / kappa)
        return q * bias + kappa * s2 * marchenko_pastur(lambda v: 1 / (v + penalty) ** 2, kappa, power=1)

    best = kappa * s2 / q
    ours = rivals.bayes_ridge(world, n)
    assert ours == pytest.approx(ridge(best), rel=1e-5)
    assert ours <= min(ridge(best / 1.5), ridge(best * 1.5))


@pytest.mark.parametrize("n", [4, 7, 15, 40])
def test_least_squares_by_simulation(n):
    world, generator = LinearSetting(d=10, k=2), np.random.default_rng(n)
    x = generator.standard_normal((10_000, n, 10))
    theta = np.eye(10)[0]
    y = x @ theta + 0.5 * generator.standard_normal((10_000, n))
    errors = ((np.linalg.pinv(x) @ y[..., None])[..., 0] - theta) ** 2
    # heavy tails near n = d: 4 standard errors, at least 3 %. False alarm below 1e-3
    tolerance = max(4 * errors.sum(-1).std() / 100, 0.03 * errors.sum(-1).mean())
    assert errors.sum(-1).mean() == pytest.approx(float(rivals.ols(world, n)), abs=tolerance)


def test_least_squares_says_infinity_only_where_it_is():
    risk = rivals.ols(LinearSetting(d=20), np.arange(2, 60))
    assert not np.isnan(risk).any()
    assert (np.isinf(risk) == np.isin(np.arange(2, 60), [19, 20, 21])).all()


# ---- simulation, and wrong formulas it must catch ---------------------------------------------------------


def simulated_dp_gd(world, n, mu, tuned, reps, seed):
    """Mean squared error of DP-GD run on ``reps`` data sets of its own, and its standard error."""
    d, steps, alpha, clip = world.d, int(tuned.steps), float(tuned.step_size), float(tuned.clip) * math.sqrt(world.d)
    errors = []
    for generator in np.random.default_rng(seed).spawn(reps):
        theta = generator.standard_normal(d)
        theta *= math.sqrt(world.trivial_risk) / np.linalg.norm(theta)
        x = generator.standard_normal((n, d))
        y = x @ theta + world.noise_std * generator.standard_normal(n)
        lengths, estimate = np.linalg.norm(x, axis=1), np.zeros(d)
        for _ in range(steps):
            residual = x @ estimate - y
            residual *= np.minimum(1, clip / (lengths * np.abs(residual)))
            noise = generator.standard_normal(d) * clip * math.sqrt(steps) / (n * mu)
            estimate -= alpha * (residual @ x / n + noise)
        errors.append(((estimate - theta) ** 2).sum())
    return np.mean(errors), np.std(errors) / math.sqrt(reps)


SIMULATED = {  # world, n, mu: privacy counts most; d > n; strong clipping of much signal
    "privacy": (LinearSetting(d=50, subspace_error=0.0), 500, 0.5),
    "more dimensions than examples": (LinearSetting(d=90, subspace_error=0.0), 30, 30.0),
    "misspecified": (LinearSetting(d=60, off_subspace_energy=0.5, subspace_error=0.0), 600, 1.5),
}


@pytest.fixture(scope="module")
def simulations():
    result = {}
    for index, (name, (world, n, mu)) in enumerate(SIMULATED.items()):
        tuned = rivals.dp_gd(world, n, mu)
        result[name] = tuned, *simulated_dp_gd(world, n, mu, tuned, reps=60, seed=index)
    return result


def agrees(predicted, mean, error):
    """Within 10 % (state evolution is an approximation) plus 4 standard errors (false alarm 6e-5 each)."""
    return abs(predicted - mean) < 0.1 * mean + 4 * error


@pytest.mark.parametrize("name", SIMULATED)
def test_dp_gd_by_simulation(simulations, name):
    tuned, mean, error = simulations[name]
    assert error < 0.1 * mean
    assert agrees(tuned.risk, mean, error)


def without_the_mass_at_zero(monkeypatch):
    original = rivals._spectrum

    def wrong(kappa, count=80):
        nodes, weights = original(kappa, count)
        weights = np.concatenate([weights[:, :-1], np.zeros_like(weights[:, :1])], 1)
        return nodes, weights / weights.sum(1, keepdims=True)

    monkeypatch.setattr(rivals, "_spectrum", wrong)


def with_noise(factor):
    def mutate(monkeypatch):
        original = rivals._noise_variance
        monkeypatch.setattr(rivals, "_noise_variance", lambda *arguments: factor * original(*arguments))

    return mutate


def as_if_unclipped(monkeypatch):
    original = rivals._clipped_residual

    def wrong(clip, variance):
        gain, second, deviation = original(clip, variance)
        return np.ones_like(gain), second, 0 * deviation

    monkeypatch.setattr(rivals, "_clipped_residual", wrong)


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (without_the_mass_at_zero, "more dimensions than examples"),
        (with_noise(0.5), "privacy"),  # sensitivity off by sqrt(2) or one of the roots missing, either way
        (with_noise(2.0), "privacy"),
        (as_if_unclipped, "privacy"),
    ],
)
def test_the_simulation_catches_a_wrong_formula(simulations, monkeypatch, mutate, name):
    tuned, mean, error = simulations[name]
    world, n, mu = SIMULATED[name]
    tuning = {"steps": tuned.steps, "step_size": tuned.step_size, "clip": tuned.clip}
    assert agrees(rivals.dp_gd_risk(world, n, mu, **tuning), mean, error)
    mutate(monkeypatch)
    assert not agrees(rivals.dp_gd_risk(world, n, mu, **tuning), mean, error)


@pytest.mark.parametrize(("k", "n", "mu"), [(3, 1000, 3.0), (10, 300, 0.5), (1, 100, 0.5)])
def test_projected_dp_gd_by_simulation(k, n, mu):
    world = LinearSetting(d=50, k=k, subspace_error=0.0)
    tuned = rivals.projected_dp_gd(world, n, mu)
    reps, generator = 400, np.random.default_rng(k)
    theta = generator.standard_normal((reps, k, 1))
    theta /= np.linalg.norm(theta, axis=1, keepdims=True)
    x = generator.standard_normal((reps, n, k))
    y = x @ theta + world.noise_std * generator.standard_normal((reps, n, 1))
    lengths, estimate = np.linalg.norm(x, axis=2, keepdims=True), np.zeros_like(theta)
    for _ in range(int(tuned.steps)):
        residual = x @ estimate - y
        residual *= np.minimum(1, tuned.clip / (lengths * np.abs(residual)))
        noise = generator.standard_normal(theta.shape) * tuned.clip * math.sqrt(tuned.steps) / (n * mu)
        estimate -= tuned.step_size * (x.transpose(0, 2, 1) @ residual / n + noise)
    errors = ((estimate - theta) ** 2).sum((1, 2))
    assert agrees(tuned.risk, errors.mean(), errors.std() / math.sqrt(reps))


# ---- projected DP-GD and the hybrid ------------------------------------------------------------


def test_deepsets_is_one_projected_step():
    world, n, mu = LinearSetting(off_subspace_energy=0.1, subspace_error=0.1), np.array([100, 3000]), 0.4
    for clip in (0.0, 0.7, 3.0):
        scale = deepsets.decoder_scale(world, n, mu, clip)
        one = rivals.projected_dp_gd_risk(world, n, mu, steps=1, step_size=scale, clip=clip)
        assert one == pytest.approx(deepsets.risk(world, n, mu, clip), rel=1e-9)


@pytest.mark.parametrize("world", [LinearSetting(), LinearSetting(d=12, k=12), LinearSetting(noise_std=0.1, k=1)])
def test_tuned_risks_are_those_of_their_tuning(world):
    n, mu = np.array([[50], [1000], [20000]]), np.array([0.1, 1.0, np.inf])
    gd, projected = rivals.dp_gd(world, n, mu), rivals.projected_dp_gd(world, n, mu)
    for tuned, risk in ((gd, rivals.dp_gd_risk), (projected, rivals.projected_dp_gd_risk)):
        again = risk(world, n, mu, steps=tuned.steps, step_size=tuned.step_size, clip=tuned.clip)
        assert again == pytest.approx(tuned.risk, rel=1e-4)  # the projected search interpolates its moments


def test_searched_steps_in_the_subspace_never_overshoot():
    world = LinearSetting(k=3, noise_std=0.1, subspace_error=0.0)
    n, mu = np.array([[50], [500], [5000]]), np.array([0.2, 1.0, 5.0])
    tuned = rivals.projected_dp_gd(world, n, mu)
    rho, _ = deepsets.clipped_moments(world.k, 0.0, world.residual_std, tuned.clip)
    assert (tuned.step_size * rho <= 1 + 1e-6)[tuned.steps > 1].all()


def test_the_hybrid_removes_the_floor_and_beats_both_near_the_crossover():
    world, mu = LinearSetting(off_subspace_energy=0.1), gdp_mu(1.0, DELTA)
    n = np.array([100, 2597, 300_000])
    both = rivals.hybrid(world, n, mu)
    alone, one_shot = rivals.dp_gd(world, n, mu).risk, deepsets.risk(world, n, mu)
    assert (both.risk <= np.minimum(alone, one_shot)).all()
    assert both.risk[1] < 0.6 * min(alone[1], one_shot[1])
    assert both.risk[2] < 0.01 * world.floor
    assert both.share[0] == 1 and both.steps[0] == 0 and 0 < both.share[1] < 1


# ---- properties ------------------------------------------------------------


def all_risks(world, n, mu):
    gd, projected, both = (f(world, n, mu) for f in (rivals.dp_gd, rivals.projected_dp_gd, rivals.hybrid))
    for tuned in (gd, projected, both):
        for field in dataclasses.fields(tuned):
            value = getattr(tuned, field.name)
            assert np.isfinite(value).all() and (value >= 0).all()
    return {
        "dp_gd": gd.risk,
        "projected_dp_gd": projected.risk,
        "hybrid": both.risk,
        "one_step": rivals.one_step(world, n, mu),
        "noisy_statistics": rivals.noisy_statistics(world, n, mu),
        "working_rule": rivals.working_rule(world, n, mu),
        "bayes_ridge": rivals.bayes_ridge(world, n),
        "public_only": rivals.public_only(world, n, mu),
    }


@QUICK
@given(WORLDS, SIZES, MUS)
def test_every_risk_is_between_0_and_the_trivial_one(world, n, mu):
    risks = all_risks(world, n, mu)
    for name, risk in risks.items():
        assert 0 < risk <= world.trivial_risk * (1 + 1e-9), name
    one_shot = deepsets.risk(world, n, mu)
    assert risks["dp_gd"] <= risks["one_step"]
    assert risks["projected_dp_gd"] <= one_shot * (1 + 1e-9)
    assert risks["hybrid"] <= min(risks["dp_gd"], one_shot) * (1 + 1e-9)
    # privacy does not help, and what is outside the subspace stays unknown inside it
    assert risks["bayes_ridge"] <= min(risks["dp_gd"], risks["noisy_statistics"]) * (1 + 1e-6)
    assert risks["projected_dp_gd"] >= world.floor


@QUICK
@given(WORLDS, SIZES, MUS)
def test_more_budget_and_more_examples_do_not_hurt(world, n, mu):
    for name in ("dp_gd", "projected_dp_gd", "one_step", "noisy_statistics", "working_rule"):
        values = getattr(rivals, name)(world, [n, n, 2 * n], [mu, 2 * mu, mu])
        risk = getattr(values, "risk", values)
        assert risk[1] <= risk[0] * 1.01 and risk[2] <= risk[0] * 1.01, name  # what the grids leave on the table


@QUICK
@given(
    WORLDS, SIZES, MUS.filter(lambda mu: mu > 0), st.sampled_from([1, 3, 10, 40, 150]),
    st.floats(-3, 1), st.floats(-1.5, 1),
)  # fmt: skip
def test_no_other_tuning_is_better(world, n, mu, steps, size, clip):
    clip, size = 10**clip, 10**size / steps**0.7
    risk = rivals.dp_gd_risk(world, n, mu, steps=steps, step_size=size, clip=clip * math.sqrt(world.label_variance))
    assert np.isfinite(risk)
    assert rivals.dp_gd(world, n, mu).risk <= risk * 1.02
    gradient_clip = clip * math.sqrt(world.k * world.label_variance)
    rho, _ = deepsets.clipped_moments(world.k, 0.0, world.residual_std, gradient_clip)
    if size * rho <= 1:
        risk = rivals.projected_dp_gd_risk(world, n, mu, steps=steps, step_size=size, clip=gradient_clip)
        assert np.isfinite(risk)
        assert rivals.projected_dp_gd(world, n, mu).risk <= risk * 1.02


@QUICK
@given(WORLDS.filter(lambda world: world.d >= 20), SIZES, MUS.filter(lambda mu: 0 < mu < 100))
def test_no_rival_without_public_data_beats_the_lower_bound(world, n, mu):
    """The bound is proven; so this tests the approximations. The 5 % are for the finite d, as both ends are tight."""
    with np.errstate(over="ignore"):
        noise = max((world.d - 1) / n, ((world.d - 1) / n) ** 2 / np.expm1(4 * mu**2)) * world.noise_std**2
    bound = world.trivial_risk * noise / (world.trivial_risk + noise)
    for risk in (rivals.dp_gd(world, n, mu).risk, rivals.one_step(world, n, mu), rivals.noisy_statistics(world, n, mu)):
        assert risk >= 0.95 * bound


# ---- interface ------------------------------------------------------------


def test_points_broadcast_and_do_not_influence_each_other():
    world, n, mu = LinearSetting(d=30), np.array([[50], [700]]), np.array([0.0, 0.3, np.inf])
    for function in (rivals.dp_gd, rivals.projected_dp_gd, rivals.hybrid):
        together = function(world, n, mu)
        for field in dataclasses.fields(together):
            assert getattr(together, field.name).shape == (2, 3)
        for i, j in np.ndindex(2, 3):
            alone = function(world, n[i, 0], mu[j])
            assert alone.risk.shape == () and alone.risk == pytest.approx(together.risk[i, j], rel=1e-12)
        assert together.steps.dtype == np.int64
        assert together.risk[:, 0] == pytest.approx(world.trivial_risk) and (together.steps[:, 0] == 0).all()
    assert rivals.dp_gd(world, np.empty(0), np.empty(0)).risk.shape == (0,)


def test_divergence_is_a_large_number_not_an_overflow():
    world = LinearSetting(d=1000)
    for size in (1.0, 1e6, 1e300):
        for steps, clip, mu in ((128, 1.0, 1e-100), (1000, math.inf, math.inf), (300, 1e-9, 3.0)):
            assert np.isfinite(rivals.dp_gd_risk(world, 5, mu, steps=steps, step_size=size, clip=clip))
            assert np.isfinite(rivals.projected_dp_gd_risk(world, 5, mu, steps=9, step_size=size, clip=clip))


@pytest.mark.parametrize("function", [rivals.dp_gd_risk, rivals.projected_dp_gd_risk])
@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1.5}, {"steps": -1}, {"steps": math.nan}, {"step_size": -0.1}, {"step_size": math.inf},
        {"clip": -1.0}, {"clip": math.nan}, {"clip": math.inf}, {"num_private": 1}, {"mu": -1.0}, {"mu": math.nan},
    ],
)  # fmt: skip
def test_bad_input_is_a_clear_error(function, wrong):
    good = {"num_private": 100, "mu": 1.0, "steps": 3, "step_size": 0.1, "clip": 1.0}
    function(LinearSetting(), **good)
    with pytest.raises(InputError):
        function(LinearSetting(), **{**good, **wrong})


def test_bad_constants_are_clear_errors():
    for arguments in ((0.0, 1.0, 0.1), (1.0, 0.0, 0.1), (1.0, 1.0, 0.0), (1.0, 1.0, math.nan)):
        with pytest.raises(InputError):
            rivals.small_step_constant(*arguments)
    with pytest.raises(InputError):
        rivals.dp_gd_risk(LinearSetting(), 100, 1.0, steps=1, step_size=0.1, clip=0.0)
