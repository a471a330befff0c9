"""The learned DeepSets: bounded embeddings, an exact release, and training that reaches the closed form."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdp_lib.data import InputError
from hyperdp_lib.mechanism import GaussianSum, _exact_sum
from hyperdp_lib.theory import deepsets, learned
from hyperdp_lib.theory.learned import (
    DELTA,
    LARGE,
    PRESETS,
    SMALL,
    ExampleEncoder,
    LearnedConfig,
    Row,
    draw_tasks,
    fill_examples,
    subspace_angle,
    subspace_basis,
    train,
)
from hyperdp_lib.theory.setting import LinearSetting, gdp_mu

WORLD = LinearSetting(d=20, k=2, subspace_error=0.0)
SHORT = LearnedConfig(steps=500, tasks=8, learning_rate=0.02)
SIZE, MU = 100, 0.5


@pytest.fixture(scope="module")
def network():
    return train(WORLD, SIZE, MU, SHORT)


@pytest.fixture(scope="module")
def one_for_all():
    config = LearnedConfig(steps=800, tasks=8, learning_rate=0.02, noise_aware=True)
    return train(WORLD, (40, 400), (0.1, 2.0), config)


def examples(network, count, seed=0):
    """One task's examples (count, d + 1) and the task (d,)."""
    g = torch.Generator().manual_seed(seed)
    theta = draw_tasks(network.setting, network.basis, 1, g)
    rows = fill_examples(torch.empty(1, count, network.setting.d + 1), theta, network.setting.noise_std, g)
    return rows[0].numpy(), theta[0].double().numpy()


# -- one example, one bounded vector ---------------------------------------------------------------------------------


def hostile(width):
    """Rows of any float32 numbers: infinities, NaN, subnormals, and the largest there are."""
    numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)
    return st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", learned.ENCODERS)
def test_no_example_has_a_longer_embedding_than_one(kind):
    encoder = ExampleEncoder(4, 3, LearnedConfig(encoder=kind, hidden=8))

    @settings(max_examples=150, deadline=None)
    @given(hostile(5), st.sampled_from([1e-30, 1.0, 1e30]))
    def check(rows, scale):
        with torch.no_grad():
            embeddings = encoder(torch.tensor(rows) * scale).double()
        assert torch.isfinite(embeddings).all()
        assert (embeddings.square().sum(1) <= 1).all()

    check()


def test_ordinary_examples_are_clipped_and_not_merely_bounded(network):
    rows, _ = examples(network, 500)
    lengths = np.linalg.norm(network.embed(rows), axis=1)
    assert lengths.max() == pytest.approx(1, abs=1e-4) and lengths.min() < 0.5
    direct = network.encoder.unclipped(torch.from_numpy(rows))
    share = (torch.linalg.vector_norm(direct, dim=1) > 1).double().mean().item()
    assert share == pytest.approx((lengths > 0.9999).mean(), abs=0.01)
    assert share == pytest.approx(network.diagnostics()["clipped_share"], abs=0.1)


@pytest.mark.parametrize("kind", learned.ENCODERS)
def test_an_embedding_depends_on_its_own_example_to_the_last_bit(kind):
    anything = train(WORLD, 10, 1.0, LearnedConfig(encoder=kind, steps=2, tasks=2, queries=5, hidden=8))
    rows, _ = examples(anything, 300)
    embeddings = anything.embed(rows)
    order = np.random.default_rng(0).permutation(300)
    assert np.array_equal(anything.embed(rows[order]), embeddings[order])
    assert np.array_equal(anything.embed(np.delete(rows, 7, 0)), np.delete(embeddings, 7, 0))
    assert np.array_equal(anything.embed(rows[:1]), embeddings[:1])


def test_one_record_moves_the_sum_by_at_most_one(network):
    rows, _ = examples(network, 60)
    rows[3] *= 1e4  # an outlier
    config = GaussianSum(network.dimension, noise_multiplier=1.0, neighboring_relation="zero_out")
    whole = _exact_sum([(network.embed(rows), None)], config)
    for left_out in (0, 3, 59):
        moved = whole - _exact_sum([(network.embed(np.delete(rows, left_out, 0)), None)], config)
        assert 0 < (moved * moved).sum() <= config.grid_units**2


# -- the release -----------------------------------------------------------------------------------------------------


def test_without_noise_the_release_is_the_float_mean_up_to_the_grid(network):
    rows, _ = examples(network, 150)
    mean = network.embed(rows).astype(float).mean(0, keepdims=True)
    exact = network.release(rows, math.inf, seed=0)
    assert exact == pytest.approx(network.decode(mean, 150, math.inf)[0], abs=1e-4)
    with pytest.raises(ValueError, match="not private"):
        network.release(rows, math.inf)


def test_the_release_does_not_depend_on_the_order(network):
    rows, _ = examples(network, 200)
    assert np.array_equal(network.release(rows, MU, seed=3), network.release(rows[::-1].copy(), MU, seed=3))


def test_the_noise_of_the_release_has_standard_deviation_one_over_mu_on_the_sum(network):
    rows, _ = examples(network, 50)
    quiet = network.release(rows, math.inf, seed=0)
    back = np.linalg.pinv(network.decoder.matrix.double().numpy())
    noise = np.array([50 * back @ (network.release(rows, MU, seed=seed) - quiet) for seed in range(400)])
    # 800 normal numbers: their standard deviation is within 10% of its law's but for 4 in 100 000 runs
    assert noise.std() * MU == pytest.approx(1, abs=0.10)
    assert np.abs(noise.mean(0)).max() < 4 / MU / math.sqrt(400)


def test_a_release_without_a_seed_draws_new_noise_every_time(network):
    rows, theta = examples(network, SIZE)
    first, second = network.release(rows, MU), network.release(rows, MU)
    assert not np.array_equal(first, second)
    assert max(np.sum((first - theta) ** 2), np.sum((second - theta) ** 2)) < 1


def test_mu_zero_reads_nothing(network):
    rows, _ = examples(network, 20)
    assert not network.release(rows, 0.0).any()
    measured = network.risk(SIZE, [0.0, MU], test_tasks=10)
    assert measured.mean[0] == WORLD.trivial_risk and measured.standard_error[0] == 0


def test_examples_of_another_dimension_are_refused(network):
    with pytest.raises(InputError, match="rows .* of 21 numbers"):
        network.release(np.zeros((5, 20)), MU)


@pytest.mark.parametrize("mu", [0.05, MU])  # dominated by the noise, and by the sampling of examples
def test_measured_risk_is_the_risk_of_releases(network, mu):
    errors = []
    for seed in range(150):
        rows, theta = examples(network, SIZE, seed)
        errors.append(np.sum((network.release(rows, mu, seed=seed) - theta) ** 2))
    measured = network.risk(SIZE, mu, test_tasks=2000)
    deviation = math.hypot(np.std(errors) / math.sqrt(150), measured.standard_error)
    assert abs(np.mean(errors) - measured.mean) < 4 * deviation


# -- what is learned -------------------------------------------------------------------------------------------------


def test_a_short_training_reaches_the_closed_form(network):
    measured = network.risk(SIZE, MU, test_tasks=2000)
    best = deepsets.risk(WORLD, SIZE, MU)
    assert measured.mean < 0.1 * WORLD.trivial_risk
    # No clipped correlation with a linear decoder can do better; 25% is what so few steps may cost.
    assert best - 4 * measured.standard_error < measured.mean < 1.25 * best
    found = network.diagnostics()
    assert found["decoder_subspace_error"] < 0.01 and found["encoder_subspace_error"] < 0.1
    assert len(found["singular_values"]) == WORLD.k


def test_a_wide_embedding_is_harmless():
    wide = train(WORLD, SIZE, MU, LearnedConfig(steps=800, tasks=8, learning_rate=0.02, dimension=6))
    assert wide.risk(SIZE, MU, test_tasks=1000).mean < 1.3 * deepsets.risk(WORLD, SIZE, MU)
    strong, spare = np.split(np.array(wide.diagnostics()["singular_values"]), [WORLD.k])
    assert spare.max() < 0.3 * strong.min()


def test_one_noise_aware_network_serves_every_budget_and_size(one_for_all):
    budgets = np.array([0.1, 0.3, 1.0, 2.0, math.inf])
    measured = one_for_all.risk(100, budgets, test_tasks=1500)
    slack = 3 * np.hypot(measured.standard_error[1:], measured.standard_error[:-1])
    assert (np.diff(measured.mean) < slack).all()
    assert measured.mean[0] > 2 * measured.mean[2]
    assert (measured.mean < 1.35 * deepsets.risk(WORLD, 100, budgets)).all()
    sizes = np.array([40, 400])
    at_sizes = one_for_all.risk(sizes, 0.3, test_tasks=1500).mean
    assert (at_sizes < 1.35 * deepsets.risk(WORLD, sizes, 0.3)).all()


def test_beyond_what_it_was_trained_for_a_noise_aware_network_stays_sane(one_for_all):
    measured = one_for_all.risk([2, 4000, 100], [0.1, 1.0, 50.0], test_tasks=50)
    assert np.isfinite(measured.mean).all()
    assert (measured.mean[1:] < 0.1).all()


def test_shrinkage_learned_at_one_budget_is_wrong_at_another(network, one_for_all):
    far = one_for_all.risk(40, 0.1, test_tasks=2000)
    assert far.mean < 1.25 * deepsets.risk(WORLD, 40, 0.1)
    assert network.risk(40, 0.1, test_tasks=2000).mean > 1.25 * far.mean


def test_the_network_encoder_finds_the_product_by_itself():
    config = LearnedConfig(encoder="network", steps=700, tasks=8, hidden=32, learning_rate=0.01)
    measured = train(WORLD, SIZE, MU, config).risk(SIZE, MU, test_tasks=1000)
    assert measured.mean < 1.5 * deepsets.risk(WORLD, SIZE, MU)


def test_too_few_public_tasks_leave_a_floor(network):
    few = LearnedConfig(steps=500, tasks=8, learning_rate=0.02, num_public_tasks=2)
    assert train(WORLD, SIZE, MU, few).diagnostics()["decoder_subspace_error"] > 0.02
    assert network.diagnostics()["decoder_subspace_error"] < 0.01


# -- data and training -----------------------------------------------------------------------------------------------


def test_tasks_and_examples_have_the_law_of_the_setting():
    world = LinearSetting(d=12, k=3, tau=2.0, noise_std=0.5, off_subspace_energy=0.25)
    basis = subspace_basis(world, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
    g = torch.Generator().manual_seed(0)
    theta = draw_tasks(world, basis, 50, g)
    inside = theta @ basis
    assert torch.allclose(inside.norm(dim=1), torch.tensor(2.0), atol=1e-5)
    assert torch.allclose(theta.square().sum(1) - inside.square().sum(1), torch.tensor(0.25), atol=1e-5)
    rows = fill_examples(torch.empty(50, 400, 13), theta, world.noise_std, g)
    residual = rows[:, :, -1] - (rows[:, :, :-1] @ theta[:, :, None])[:, :, 0]
    assert residual.std().item() == pytest.approx(0.5, rel=0.02)
    assert rows[:, :, -1].var().item() == pytest.approx(world.label_variance, rel=0.05)


def test_a_public_task_has_the_same_examples_whenever_it_is_met():
    config = LearnedConfig(tasks=2, queries=4, num_public_tasks=1)
    batches = learned._Batches(WORLD, subspace_basis(WORLD, 0), (10, 10), (1.0, 1.0), config)
    seen, shuffles = set(), set()
    for step in range(3):
        support, queries, _ = batches(step)
        for task in range(2):
            labels = torch.cat([support[task], queries[task]])[:, -1].tolist()
            seen.add(tuple(sorted(labels)))
            shuffles.add(tuple(labels))
    assert len(seen) == 1 and len(shuffles) == 6


def test_training_repeats_under_a_seed_and_leaves_the_global_streams_alone():
    config = LearnedConfig(steps=20, tasks=2, queries=10, encoder="network", hidden=8, noise_aware=True)
    before = torch.random.get_rng_state()
    first, second = (train(WORLD, (20, 30), (0.5, 1.0), config) for _ in range(2))
    other = train(WORLD, (20, 30), (0.5, 1.0), LearnedConfig(**{**vars(config), "seed": 1}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.decoder.matrix, second.decoder.matrix)
    assert not torch.equal(first.decoder.matrix, other.decoder.matrix)
    assert np.array_equal(first.risk(25, 0.7, test_tasks=5).mean, second.risk(25, 0.7, test_tasks=5).mean)
    assert first.risk(25, 0.7, test_tasks=5).mean != first.risk(25, 0.7, test_tasks=5, seed=1).mean


def test_a_stopped_training_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    config = LearnedConfig(steps=40, tasks=2, queries=10)
    whole = train(WORLD, 20, 1.0, config)
    run, draw = learned.Loop.run, learned._Batches.__call__
    monkeypatch.setattr(learned.Loop, "run", lambda loop, loss, every: run(loop, loss, every=20))

    def stopped(batches, step):
        if step == 30:
            raise KeyboardInterrupt
        return draw(batches, step)

    monkeypatch.setattr(learned._Batches, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(WORLD, 20, 1.0, config, out=tmp_path)
    monkeypatch.setattr(learned._Batches, "__call__", draw)
    resumed = train(WORLD, 20, 1.0, config, out=tmp_path)
    assert torch.equal(resumed.decoder.matrix, whole.decoder.matrix)
    assert torch.equal(resumed.encoder.projection, whole.encoder.projection)
    with pytest.raises(InputError, match="another training"):
        train(WORLD, 21, 1.0, config, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "mlp"}, "no encoder 'mlp'"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"tasks": 2.5}, "tasks must be a whole number"),
        ({"dimension": 0}, "dimension must be a whole number of at least 1 or None"),
        ({"num_public_tasks": True}, "num_public_tasks must be"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"encoder_rate": 0.0}, "encoder_rate must be positive"),
        ({"encoder_scale": -1.0}, "encoder_scale must be positive"),
        ({"ema": 1.0}, "ema must be"),
        ({"seed": -1}, "seed must be"),
        ({"examples_per_task": 50}, "bank of tasks"),
    ],
)
def test_a_bad_configuration_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        LearnedConfig(**change)


@pytest.mark.parametrize(
    ("size", "mu", "config", "message"),
    [
        (1, 1.0, LearnedConfig(), "at least 2"),
        (20.5, 1.0, LearnedConfig(), "whole number"),
        (20, 0.0, LearnedConfig(), "lowest mu"),
        (20, math.nan, LearnedConfig(), "mu must be"),
        (20, (1.0, 2.0), LearnedConfig(), "noise_aware"),
        ((20, 40), 1.0, LearnedConfig(), "noise_aware"),
        ((40, 20), 1.0, LearnedConfig(noise_aware=True), "lowest n"),
        (20, (1.0, math.inf), LearnedConfig(noise_aware=True), "finite"),
        (20, 1.0, LearnedConfig(num_public_tasks=5, examples_per_task=50), "needs num_private"),
    ],
)
def test_bad_sizes_are_refused(size, mu, config, message):
    with pytest.raises(InputError, match=message):
        train(WORLD, size, mu, config)


def test_bad_questions_are_refused(network):
    for question in (dict(test_tasks=1), dict(seed=-1)):
        with pytest.raises(InputError):
            network.risk(SIZE, MU, **question)
    with pytest.raises(InputError):
        network.risk(1, MU)


def test_subspace_angle_is_between_0_and_1():
    basis = subspace_basis(WORLD, 0)
    rotation = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    assert subspace_angle(3 * basis @ rotation, basis) == pytest.approx(0, abs=1e-6)
    assert subspace_angle(basis[:, :1], basis) == pytest.approx(0.5, abs=1e-6)  # too narrow to hold it


# -- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_made_row_by_row_and_only_once(tmp_path, monkeypatch, capsys):
    config = LearnedConfig(steps=3, tasks=2, queries=5, num_public_tasks=4)
    aware = LearnedConfig(steps=3, tasks=2, queries=5, noise_aware=True)
    rows = {
        "bank": Row(WORLD, 20, 1.0, config, ((1.0, 20),)),
        "aware": Row(WORLD, (10, 20), (0.5, 2.0), aware, ((1.0, 20), (math.inf, 30))),
    }
    monkeypatch.setattr(learned, "table", lambda: rows)
    out = tmp_path / "new" / "learned.json"
    learned.main(["--out", str(out), "--seeds", "2"])
    assert capsys.readouterr().out.count("closed form") == 3
    document = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert document["provenance"]["commit"] and document["delta"] == DELTA
    (line,) = document["rows"]["bank"]["summary"]
    risks = [training["risk"][0] for training in document["rows"]["bank"]["trainings"].values()]
    assert line["risk"] == pytest.approx(np.mean(risks)) and line["deviation_over_seeds"] == pytest.approx(
        np.std(risks, ddof=1)
    )
    assert line["closed_form"] == pytest.approx(float(deepsets.risk(WORLD, 20, gdp_mu(1.0, DELTA))))
    assert line["closed_form_eigenvectors"] > line["closed_form"]
    assert [line["epsilon"] for line in document["rows"]["aware"]["summary"]] == [1.0, None]

    monkeypatch.setattr(learned, "train", lambda *_: pytest.fail("trained again"))
    written = out.read_text()
    learned.main(["--out", str(out), "--seeds", "2"])
    assert out.read_text() == written
    with pytest.raises(SystemExit):
        learned.main(["--out", str(out), "--only", "nothing"])


def test_every_row_of_the_table_can_be_trained():
    rows = learned.table()
    assert len(rows) == 22
    for row in rows.values():
        row.config.__post_init__()
        assert (isinstance(row.num_private, tuple) and isinstance(row.epsilon, tuple)) == row.config.noise_aware


# -- whole trainings -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("preset", ["full", "quick", "network"])
def test_the_whole_instance_lands_within_20_percent_of_the_closed_form(preset, epsilon):
    mu = float(gdp_mu(epsilon, DELTA))
    measured = train(SMALL, 200, mu, PRESETS[preset]).risk(200, mu, test_tasks=2000)
    assert measured.mean == pytest.approx(deepsets.risk(SMALL, 200, mu), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.25, 1.0, 8.0])
def test_quick_is_within_20_percent_on_a_large_instance(epsilon):
    mu = float(gdp_mu(epsilon, DELTA))
    measured = train(LARGE, 1000, mu, PRESETS["quick"]).risk(1000, mu, test_tasks=1000)
    assert measured.mean == pytest.approx(deepsets.risk(LARGE, 1000, mu), rel=0.2)
