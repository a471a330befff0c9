"""The simulators against facts that need no formula of the theory.

False alarms. Comparisons of means are at ``|z| < 5`` (`near`, `same`), about 60 of them: by Bonferroni and the normal
approximation a set of fresh seeds fails with probability below 4e-5. The seeds are fixed, so a failure is a change.
"""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hyperdp_lib.data import InputError
from hyperdp_lib.theory import simulation
from hyperdp_lib.theory.setting import LinearSetting
from hyperdp_lib.theory.simulation import Simulated, streams

INF = math.inf


def rng(seed=0):
    return streams(20_240, seed + 1)[seed]


def near(simulated, value, z=5):
    return abs(simulated.mean - value) < z * simulated.standard_error


def same(one, other, z=5):
    return abs(one.mean - other.mean) < z * math.hypot(one.standard_error, other.standard_error)


# ---- independence ------------------------------------------------------------


def test_no_formula_is_used():
    tree = ast.parse(Path(simulation.__file__).read_text(encoding="utf-8"))
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {alias.name for alias in node.names if alias.name.startswith("hyperdp_lib")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports would escape this test"
            if (node.module or "").startswith("hyperdp_lib"):
                ours |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert ours == {"hyperdp_lib.data.InputError"} | {
        f"hyperdp_lib.theory.setting.{name}" for name in ("Array", "LinearSetting", "check_sizes")
    }
    # a setting also has properties that call the formulas, or are some
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "setting"
    }
    fields = set(LinearSetting.__dataclass_fields__)
    assert read <= fields and "subspace_error" not in read


# ---- data and random numbers ------------------------------------------------------------


def test_streams_are_reproducible_and_independent():
    root = np.random.SeedSequence(3)
    first = [generator.random() for generator in streams(root, 4)]
    assert first == [generator.random() for generator in streams(root, 4)], "using a seed must not change it"
    assert len(set(first)) == 4
    assert first[:2] == [generator.random() for generator in streams(3, 2)]
    setting = LinearSetting(k=3)
    runs = [simulation.dp_deepsets(rng(7), setting, 200, 1.0, clip=1.0, scale=1.0) for _ in range(2)]
    assert runs[0] == runs[1]


def test_tasks_and_labels_follow_the_model():
    setting = LinearSetting(d=30, k=4, tau=1.5, noise_std=0.7, off_subspace_energy=0.3)
    generator = rng()
    basis = simulation.random_basis(generator, 30, 4)
    theta = simulation.draw_tasks(generator, setting, basis, 50)
    inside = theta @ basis
    assert np.allclose((inside**2).sum(1), 1.5**2) and np.allclose((theta**2).sum(1), 1.5**2 + 0.3)
    x, y = simulation.draw_examples(generator, setting, theta, 2000)
    residuals = y - np.einsum("tnd,td->tn", x, theta)
    assert stats.kstest(residuals.ravel() / 0.7, "norm").pvalue > 1e-6
    assert stats.kstest(x[0].ravel(), "norm").pvalue > 1e-6
    gaussian = simulation.draw_coordinates(generator, setting, 20_000, "gaussian")
    assert near(Simulated.of((gaussian**2).sum(1)), 1.5**2)
    assert simulation.public_only(generator, setting, repetitions=5).mean == pytest.approx(1.5**2 + 0.3)


def test_what_remains_of_a_task_in_a_subspace():
    setting = LinearSetting(d=30, k=3, off_subspace_energy=0.2)
    learned = simulation.public_subspace(rng(1), setting)
    for subspace in (learned, 0.3, np.array([0.0, 0.1, 0.5]), None):
        seen, missed = simulation.seen_tasks(rng(2), setting, 20, subspace)
        assert np.allclose((seen**2).sum(1) + missed, 1.2), "energy is seen or missed"
    assert np.allclose(missed, 0.2)


# ---- privacy ------------------------------------------------------------


def test_one_record_moves_a_clipped_sum_by_at_most_the_sensitivity():
    generator = rng()
    v, y = generator.standard_normal((1, 400, 5)), 10 * generator.standard_normal((1, 400))
    for clip in (0.0, 0.5, 3.0):
        full = simulation._sum_of_embeddings(v, y, clip)
        moved = []
        for record in range(400):
            keep = np.arange(400) != record
            without = simulation._sum_of_embeddings(v[:, keep], y[:, keep], clip)
            moved.append(np.linalg.norm(full - without))
        bound = float(simulation.sensitivity(clip))
        assert max(moved) <= bound * (1 + 1e-12)
        assert max(moved) > 0.999 * bound, "the bound is attained, so the noise is not too large either"


def test_one_record_moves_a_clipped_gradient_by_at_most_the_clip():
    generator = rng()
    x, y = generator.standard_normal((1, 50, 8)), 10 * generator.standard_normal((1, 50))
    tuning = simulation._Tuning.of(1, 1.0, 2.0)

    def step(factor):  # one step from 0 without noise is minus the mean gradient
        return 50 * simulation.descend(generator, x * factor[None, :, None], y * factor, np.zeros((1, 8)), tuning, INF)

    full = step(np.ones(50))
    for record in range(50):
        null = np.ones(50)
        null[record] = 0
        assert 0 < np.linalg.norm(full - step(null)) <= 2.0 * (1 + 1e-12)


@pytest.mark.parametrize(("bound", "mu"), [(1.0, 0.5), (3.0, 2.0)])
def test_noise_is_exactly_sensitivity_over_mu(bound, mu):
    noise = simulation.privacy_noise(rng(), bound, mu, (20_000,))
    assert near(Simulated.of(noise**2), (bound / mu) ** 2)
    assert stats.kstest(noise * mu / bound, "norm").pvalue > 1e-6
    assert not simulation.privacy_noise(rng(), bound, INF, (5,)).any()


def test_noise_of_every_procedure_when_there_is_nothing_else():
    """A tiny budget leaves only noise, whose size each algorithm's description gives."""
    setting, n, mu = LinearSetting(d=12, k=3), 50, 1e-3
    deepsets = simulation.dp_deepsets(rng(), setting, n, mu, clip=2.0, scale=1.0)
    assert near(deepsets, 3 * (2 / (n * mu)) ** 2)
    descent = {"steps": 4, "step_size": 0.1, "gradient_clip": 1e-6}  # the clip stops the contraction
    std = 0.1 * 1e-6 * math.sqrt(4) / (n * mu)  # of one step; four add up
    for result, dimension in (
        (simulation.dp_gd(rng(1), setting, n, mu, repetitions=400, **descent), 12),
        (simulation.projected_dp_gd(rng(2), setting, n, mu, repetitions=400, **descent), 3),
    ):
        assert abs(result.mean - 1) < 1e-3 and dimension * 4 * std**2 < 1e-3
    loud = {"steps": 1, "step_size": 1.0, "gradient_clip": 5.0}
    assert near(simulation.dp_gd(rng(3), setting, n, mu, repetitions=2000, **loud), 12 * (5 / (n * mu)) ** 2)
    four = {"steps": 4, "step_size": 1e-9, "gradient_clip": 5e9}  # steps so small that nothing contracts
    noisy = simulation.projected_dp_gd(rng(4), setting, n, mu, repetitions=2000, **four)
    assert near(noisy, 3 * 4 * (5 * 2 / (n * mu)) ** 2, z=5)


def test_no_release_without_budget_or_without_a_bound():
    setting = LinearSetting(k=3)
    with pytest.raises(InputError, match="mu = 0"):
        simulation.dp_deepsets(rng(), setting, 100, 0.0, clip=1.0, scale=1.0)
    with pytest.raises(InputError, match="finite clip norm"):
        simulation.dp_deepsets(rng(), setting, 100, 1.0, clip=INF, scale=1.0)
    with pytest.raises(InputError, match="at least 0"):
        simulation.dp_deepsets(rng(), setting, 100, 1.0, clip=-1.0, scale=1.0)
    with pytest.raises(InputError, match="whole num_private"):
        simulation.dp_deepsets(rng(), setting, 100.5, 1.0, clip=1.0, scale=1.0)
    with pytest.raises(InputError, match="share"):
        simulation.noisy_statistics(rng(), setting, 100, 1.0, share=1.0, ridge=1.0, clip_x=9.0, clip_y=2.0)
    with pytest.raises(InputError, match="d \\+ 1"):
        simulation.ols(rng(), setting, 201, repetitions=2)
    with pytest.raises(InputError, match="diverges"):
        simulation.dp_gd(rng(), setting, 100, INF, steps=2000, step_size=9.0, gradient_clip=INF, repetitions=2)
    with pytest.raises(InputError, match="2 repetitions"):
        simulation.dp_deepsets(rng(), setting, 100, 1.0, clip=1.0, scale=1.0, repetitions=1)
    with pytest.raises(InputError, match="moments"):
        simulation.public_subspace(rng(), setting, moments="other")
    with pytest.raises(InputError, match="tasks"):
        simulation.draw_coordinates(rng(), setting, 2, "cube")


# ---- what is known without the theory ------------------------------------------------------------


@pytest.mark.parametrize(("k", "n", "gamma2"), [(1, 30, 0.0), (3, 100, 0.0), (10, 50, 0.4)])
def test_unclipped_mean_without_privacy(k, n, gamma2):
    # Cov(v y) = sigma_y^2 I + a a', so the mean of n has the risk (k sigma_y^2 + |a|^2) / n
    setting = LinearSetting(d=40, k=k, off_subspace_energy=gamma2)
    result = simulation.dp_deepsets(rng(k), setting, n, INF, clip=INF, scale=1.0, repetitions=4000)
    assert near(result, (k * (1.25 + gamma2) + 1) / n + gamma2)


def test_moments_of_one_unclipped_and_one_normalised_embedding():
    along, squared = simulation.embedding_moments(rng(), 4, 1.2, 0.5, INF, 200_000)
    assert near(along, 1) and near(squared, 4 * (1.44 + 0.25) + 2 * 1.44)
    along, squared = simulation.embedding_moments(rng(1), 1, 1.0, 0.5, 0.0, 200_000)
    # k = 1: phi = sign(v y), whose mean is 2 arctan(a / s) / pi
    assert near(along, 2 * math.atan(2) / math.pi) and squared.mean == pytest.approx(1)


def test_one_gradient_step_is_one_noisy_sum():
    """DP-DeepSets with known U is projected DP-GD with a single step of the decoder's scale."""
    setting = LinearSetting(k=4)
    release = simulation.dp_deepsets(rng(), setting, 200, 0.5, clip=1.5, scale=0.7, repetitions=3000)
    step = simulation.projected_dp_gd(
        rng(1), setting, 200, 0.5, steps=1, step_size=0.7, gradient_clip=1.5, repetitions=3000
    )
    assert same(release, step)
    whole = LinearSetting(d=4, k=4)  # and in R^d when k = d
    assert same(
        release,
        simulation.dp_gd(rng(2), whole, 200, 0.5, steps=1, step_size=0.7, gradient_clip=1.5, repetitions=3000),
    )


def test_unclipped_descent_reaches_least_squares():
    setting = LinearSetting(d=10, k=2)
    result = simulation.dp_gd(rng(), setting, 80, INF, steps=400, step_size=0.4, gradient_clip=INF, repetitions=600)
    assert near(result, 10 * 0.25 / (80 - 11))


@pytest.mark.parametrize(("d", "n"), [(10, 60), (50, 300)])
def test_least_squares(d, n):
    result = simulation.ols(rng(d), LinearSetting(d=d, k=2), n, repetitions=300)
    assert near(result, d * 0.25 / (n - d - 1))


def test_ridge_of_several_penalties_on_the_same_data():
    setting = LinearSetting(d=20, k=2)
    result = simulation.ridge(rng(), setting, 60, penalty=np.array([0.0, 5.0, 1e12]), repetitions=200)
    assert result.mean.shape == (3,) and result.mean[1] < result.mean[0] < 1
    assert result.mean[2] == pytest.approx(1, abs=1e-6)


def test_noisy_statistics_without_privacy_is_ridge_regression():
    setting = LinearSetting(d=20, k=2)
    known = {"share": 0.5, "clip_x": 1e6, "clip_y": 1e6, "repetitions": 200}
    noisy = simulation.noisy_statistics(rng(), setting, 100, INF, ridge=0.0, **known)
    assert near(noisy, 20 * 0.25 / (100 - 21))
    lost = simulation.noisy_statistics(rng(), setting, 100, 0.5, ridge=1e9, share=0.5, clip_x=6.0, clip_y=3.0)
    assert lost.mean == pytest.approx(1, abs=1e-3)


def test_noise_on_the_second_moment_is_symmetric_with_unit_entries(monkeypatch):
    """Of X'X + noise, only the noise: its entries on and above the diagonal have deviation L^2 / (mu sqrt(share))."""
    setting, seen = LinearSetting(d=30, k=2), []
    monkeypatch.setattr(
        simulation, "_ridge_errors", lambda matrix, vector, ridges, theta: seen.append(matrix) or np.zeros(())
    )
    simulation.noisy_statistics(rng(), setting, 2, 1e-6, share=0.25, ridge=1.0, clip_x=2.0, clip_y=1.0, repetitions=20)
    matrices = np.array(seen) * 1e-6 * 0.5 / 4
    assert np.array_equal(matrices, matrices.swapaxes(1, 2))
    diagonal = np.diagonal(matrices, axis1=1, axis2=2)
    upper = matrices[:, *np.triu_indices(30, 1)]
    assert near(Simulated.of(diagonal.ravel() ** 2), 1) and near(Simulated.of(upper.ravel() ** 2), 1)


def test_second_moments_without_clip_or_privacy_is_least_squares():
    setting = LinearSetting(k=3)
    tuning = {"weight": 0.7, "clip": INF, "ridge": [0.0, 1e9]}
    result = simulation.second_moments(rng(), setting, 60, INF, repetitions=2000, **tuning)
    assert result.mean.shape == (1, 2)
    assert abs(result.mean[0, 0] - 3 * 0.25 / (60 - 4)) < 5 * result.standard_error[0, 0]
    assert result.mean[0, 1] == pytest.approx(1)


def test_second_moments_noise_is_that_of_the_joint_vector(monkeypatch):
    """The norm of the stacked embedding is what is clipped: recomputed here with explicit svec."""
    generator, weight, clip = rng(), 0.8, 2.5
    v, y = generator.standard_normal((1, 60, 3)), generator.standard_normal((1, 60))
    rows, columns = np.triu_indices(3)
    outer = v[0][:, rows] * v[0][:, columns] - (rows == columns)
    stacked = np.hstack([weight * outer * np.where(rows == columns, 1, math.sqrt(2)), v[0] * y[0][:, None]])
    stacked *= np.minimum(1, clip / np.linalg.norm(stacked, axis=1))[:, None]
    expected = stacked[:, 6:].sum(0), stacked[:, :6].sum(0) / weight / np.where(rows == columns, 1, math.sqrt(2))
    seen = []
    monkeypatch.setattr(simulation, "_seen_examples", lambda *arguments: (v, y))
    monkeypatch.setattr(
        simulation, "privacy_noise", lambda _, bound, mu, shape: seen.append((float(bound), shape)) or np.zeros(shape)
    )
    eigh, matrices = np.linalg.eigh, []
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: matrices.append(matrix) or eigh(matrix))
    with pytest.raises(InputError, match="2 repetitions"):  # only one world: its data are the ones above
        simulation.second_moments(
            generator, LinearSetting(k=3), 60, 1.0, weight=weight, clip=clip, ridge=0.0, repetitions=1
        )
    assert np.allclose((matrices[0][0] - np.eye(3))[rows, columns] * 60, expected[1])
    assert seen == [(clip, (1, 3, 3)), (clip, (1, 3))]


def test_hybrid_is_its_two_halves():
    setting = LinearSetting(d=30, k=3, num_public_tasks=400)
    learned = simulation.public_subspace(rng(1), setting)
    first = {"share": 0.3, "clip": 1.0, "scale": 0.8, "subspace": learned, "repetitions": 400}
    stays = simulation.hybrid(rng(2), setting, 300, 1.0, steps=0, step_size=0.1, gradient_clip=1.0, **first)
    alone = simulation.dp_deepsets(
        rng(3), setting, 300, math.sqrt(0.3), clip=1.0, scale=0.8, subspace=learned, repetitions=2000
    )
    assert same(stays, alone)
    nothing = {**first, "scale": 0.0}
    descent = {"steps": 8, "step_size": 0.3, "gradient_clip": 3.0}
    second = simulation.hybrid(rng(4), setting, 300, 1.0, **descent, **nothing)
    plain = simulation.dp_gd(rng(5), setting, 300, math.sqrt(0.7), **descent, repetitions=400)
    assert same(second, plain)


def test_several_tunings_at_once_are_what_each_is_alone():
    setting = LinearSetting(d=20, k=2)
    steps, sizes = np.array([1, 8, 30]), np.array([0.5, 0.3, 0.1])
    together = simulation.dp_gd(
        rng(), setting, 300, 0.5, steps=steps, step_size=sizes, gradient_clip=3.0, repetitions=400
    )
    for i in range(3):
        alone = simulation.dp_gd(
            rng(i + 1), setting, 300, 0.5, steps=steps[i], step_size=sizes[i], gradient_clip=3.0, repetitions=400
        )
        gap = abs(together.mean[i] - alone.mean)
        assert gap < 5 * math.hypot(together.standard_error[i], alone.standard_error)


# ---- public data; short routes and long ones ------------------------------------------------------------


def errors(count, seed, setting, **options):
    return Simulated.of(
        [simulation.public_subspace(generator, setting, **options).error for generator in streams(seed, count)]
    )


@pytest.mark.parametrize("moments", ["self-normalised", "plain"])
@pytest.mark.parametrize("gamma2", [0.0, 0.5])
def test_subspace_short_and_long_route(moments, gamma2):
    setting = LinearSetting(d=40, k=3, off_subspace_energy=gamma2, num_public_tasks=60, examples_per_task=20)
    short = errors(60, 1, setting, moments=moments)
    long = errors(60, 2, setting, moments=moments, materialise=True)
    assert same(short, long)
    assert short.standard_error < 0.03 * short.mean, "else the comparison says little"


def test_subspace_from_few_and_from_many_tasks():
    many = LinearSetting(d=20, k=3, num_public_tasks=40_000, examples_per_task=40)
    assert simulation.public_subspace(rng(), many).error < 5e-4
    few = LinearSetting(d=60, k=3, num_public_tasks=2, examples_per_task=2)  # fewer tasks than k
    assert near(errors(40, 3, few), 1 - 3 / 60, z=8)  # two tasks of two examples know next to nothing
    for setting in (many, few):
        learned = simulation.public_subspace(rng(1), setting)
        for basis in (learned.true, learned.learned):
            assert np.allclose(basis.T @ basis, np.eye(3), atol=1e-10)
        assert learned.error == pytest.approx(1 - np.linalg.norm(learned.true.T @ learned.learned) ** 2 / 3, abs=1e-9)
    whole = LinearSetting(d=4, k=4, num_public_tasks=10)
    assert simulation.public_subspace(rng(), whole).error == pytest.approx(0, abs=1e-12)


def test_self_normalised_moments_of_either_size_agree():
    """T < d takes the eigenvectors of the small matrix; the large one must give the same."""
    base = {"d": 30, "k": 3, "examples_per_task": 50}
    below, above = (errors(80, seed, LinearSetting(num_public_tasks=t, **base)) for seed, t in ((4, 29), (5, 31)))
    assert above.mean < below.mean + 5 * below.standard_error and above.mean > 0.8 * below.mean


@pytest.mark.parametrize("clip", [0.0, 1.5, INF])
def test_deepsets_short_and_long_route(clip):
    setting = LinearSetting(d=30, k=3, off_subspace_energy=0.3, num_public_tasks=200, examples_per_task=20)
    learned = simulation.public_subspace(rng(), setting)
    mu = INF if clip == INF else 0.5
    known = {"clip": clip, "scale": 2.0 if clip == 0 else 0.9, "subspace": learned}
    short = simulation.dp_deepsets(rng(1), setting, 120, mu, repetitions=3000, **known)
    long = simulation.dp_deepsets_ambient(rng(2), setting, 120, mu, repetitions=1500, **known)
    assert same(short, long)


def test_projected_descent_sees_what_the_release_sees():
    setting = LinearSetting(d=30, k=3, off_subspace_energy=0.3, num_public_tasks=100, examples_per_task=10)
    learned = simulation.public_subspace(rng(), setting)
    seen = {"subspace": learned, "repetitions": 2000}
    release = simulation.dp_deepsets(rng(1), setting, 100, 1.0, clip=1.0, scale=0.5, **seen)
    step = simulation.projected_dp_gd(rng(2), setting, 100, 1.0, steps=1, step_size=0.5, gradient_clip=1.0, **seen)
    assert same(release, step)


# ---- testers are tested: broken mechanisms are noticed ------------------------------------------------------------


@pytest.mark.parametrize("broken", ["half the noise", "noise of replace-one", "no clip"])
def test_a_broken_mechanism_is_noticed(broken, monkeypatch):
    setting = LinearSetting(k=3)
    arguments = {"clip": 0.8, "scale": 3.0, "repetitions": 1500}
    right = simulation.dp_deepsets(rng(1), setting, 100, 0.2, **arguments)
    noise = simulation.privacy_noise
    factor = {"half the noise": 0.5, "noise of replace-one": 2.0, "no clip": 1.0}[broken]
    monkeypatch.setattr(simulation, "privacy_noise", lambda r, bound, mu, shape: factor * noise(r, bound, mu, shape))
    if broken == "no clip":
        monkeypatch.setattr(simulation, "clip_factor", lambda norms, clip: np.ones_like(norms))
    assert not same(right, simulation.dp_deepsets(rng(2), setting, 100, 0.2, **arguments))
