"""The mechanism: bounds in integers, exact sums, the law of the noise, and broken copies that must be caught.

Statistical tests state their false-alarm probability; together they raise fewer than one in a million.
"""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from hyperdp_lib import mechanism
from hyperdp_lib.mechanism import GaussianSum, noisy_sum

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANY_FLOATS = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True, width=64)
CLIP_NORMS = st.sampled_from([1.0, 0.1, 1 / 3, 2.0, 1e-300, 5e-324, 1e300])


def batch(values, rows=None):
    return np.asarray(values, dtype=np.float64), None if rows is None else np.asarray(rows)


# ---- step 1: the integer norm ------------------------------------------------------------


def check_norms(to_grid, values, config):
    grid = to_grid(values, config)
    assert grid.dtype == np.int64 and grid.shape == values.shape
    for row in grid.tolist():  # Python integers: the check itself cannot overflow
        assert sum(entry * entry for entry in row) <= config.grid_units**2


@QUICK
@given(arrays(np.float64, (3, 5), elements=ANY_FLOATS), CLIP_NORMS, st.sampled_from([20, 24, 29]))
@example(np.full((3, 5), 1.7e308), 1.0, 20)
@example(np.full((3, 5), 5e-324), 5e-324, 20)
@example(np.full((3, 5), math.sqrt(0.2)), 1.0, 20)
@example(np.array([1, 3, -1, -3, 5] * 3).reshape(3, 5) * 2.0**-21, 1.0, 20)  # ties: halfway between steps of the grid
@example(np.full((3, 5), math.sqrt(0.2) * (1 + 2e-16)), 1.0, 29)
@example(np.array([[0.6, 0.8, 5e-324, -5e-324, 0.0]] * 3), 1.0, 29)
@example(np.array([[1.0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0], [-1.0, -0.0, 0, 0, 0]]), 1.0, 20)
def test_integer_norm_never_exceeds_the_clip_norm(values, clip_norm, grid_bits):
    config = GaussianSum(5, 1.0, clip_norm=clip_norm, grid_bits=grid_bits)
    check_norms(mechanism._to_grid, values, config)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_unit_vectors_stay_within_the_clip_norm(dtype):
    values = np.random.default_rng(0).normal(size=(2000, 64))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(dtype)
    check_norms(mechanism._to_grid, values, GaussianSum(64, 1.0))


def test_a_last_digit_slip_is_repaired(monkeypatch):
    # Too small a square root would let the clipped vector stick out: the integers are checked all the same.
    monkeypatch.setattr(mechanism.np, "sqrt", lambda x: np.float64(0.999999) * x**0.5)
    check_norms(mechanism._to_grid, np.full((2, 4), 10.0), GaussianSum(4, 1.0))


def test_what_is_inside_the_ball_is_rounded_toward_zero_and_no_more():
    values = np.random.default_rng(1).uniform(-0.1, 0.1, size=(100, 8))
    grid = mechanism._to_grid(values, GaussianSum(8, 1.0)) / 2**20
    assert np.all(np.abs(grid) <= np.abs(values))
    assert np.all(np.abs(values - grid) < 2**-20)


def test_clipping_keeps_the_direction():
    grid = mechanism._to_grid(np.array([[3e200, 4e200]]), GaussianSum(2, 1.0))
    np.testing.assert_allclose(grid[0] / 2**20, [0.6, 0.8], atol=2**-19)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_embedding_contributes_nothing_and_poisons_nothing(bad):
    good = np.array([[0.25, 0.5], [0.25, 0.5]])
    config = GaussianSum(2, 0.0)
    poisoned = np.vstack([good, [[bad, 1.0]]])
    np.testing.assert_array_equal(noisy_sum([batch(poisoned)], config, seed=0), [[0.5, 1.0]])


def test_the_input_is_left_alone():
    values = np.array([[np.nan, 1.0], [5.0, 5.0]])
    before = values.copy()
    mechanism._to_grid(values, GaussianSum(2, 1.0))
    np.testing.assert_array_equal(values, before)


# ---- steps 2 and 3: exact sums and sensitivity ------------------------------------------------------------


def check_sensitivity(exact_sum, values, rows, other, other_row, relation):
    """Removing, blanking or replacing the last example moves the integer sum by at most the sensitivity."""
    config = GaussianSum(4, 1.0, num_rows=3, neighboring_relation=relation)
    whole = exact_sum([(values, rows)], config)
    rest = [(values[:-1], rows[:-1])]
    if relation == "replace_one":
        rest.append((other[None], np.array([other_row])))
    difference = (whole - exact_sum(rest, config)).ravel().tolist()
    assert sum(entry * entry for entry in difference) <= config.grid_sensitivity**2


@QUICK
@given(
    arrays(np.float64, (6, 4), elements=ANY_FLOATS),
    arrays(np.int64, 6, elements=st.integers(0, 2)),
    arrays(np.float64, 4, elements=ANY_FLOATS),
    st.integers(0, 2),
    st.sampled_from(sorted(mechanism.SENSITIVITY_FACTOR)),
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(values, rows, other, other_row, relation):
    check_sensitivity(mechanism._exact_sum, values, rows, other, other_row, relation)


def test_replacing_an_example_by_its_opposite_reaches_the_sensitivity():
    config = GaussianSum(2, 1.0, neighboring_relation="replace_one")
    plus = mechanism._exact_sum([batch([[1.0, 0.0]])], config)
    minus = mechanism._exact_sum([batch([[-1.0, 0.0]])], config)
    assert np.abs(plus - minus).max() == config.grid_sensitivity


def test_order_and_batching_do_not_matter_at_all():
    generator = np.random.default_rng(2)
    values = generator.normal(size=(500, 16)) * 10.0 ** generator.uniform(-6, 6, size=(500, 1))
    rows = generator.integers(0, 4, size=500)
    config = GaussianSum(16, 1.0, num_rows=4)
    whole = mechanism._exact_sum([(values, rows)], config)
    order = generator.permutation(500)
    np.testing.assert_array_equal(mechanism._exact_sum([(values[order], rows[order])], config), whole)
    pieces = ((values[i : i + 7], rows[i : i + 7]) for i in range(0, 500, 7))
    np.testing.assert_array_equal(mechanism._exact_sum(pieces, config), whole)


def test_batches_are_read_once_and_one_at_a_time():
    alive = 0

    def stream():
        nonlocal alive
        for _ in range(50):
            alive += 1
            yield batch(np.full((10, 2), 0.25))

    assert noisy_sum(stream(), GaussianSum(2, 0.0), seed=0).tolist() == [[125.0, 125.0]]
    assert alive == 50


def test_no_example_is_a_data_set_too():
    assert np.all(np.isfinite(noisy_sum([], GaussianSum(3, 1.0))))
    assert noisy_sum([batch(np.zeros((0, 3)))], GaussianSum(3, 0.0), seed=0).tolist() == [[0.0, 0.0, 0.0]]


def test_too_many_examples_for_exact_sums_are_refused(monkeypatch):
    class Huge:
        shape = (2**42, 1)

        def __len__(self):
            return 2**42

    monkeypatch.setattr(mechanism, "_to_grid", lambda values, config: Huge())
    with pytest.raises(ValueError, match="too many examples"):
        mechanism._exact_sum([(None, None)], GaussianSum(1, 1.0))


# ---- errors come before the noise, and say nothing private -------------------------

MALFORMED = {
    "wrong dimension": (np.zeros((7, 5)), None),
    "one vector": (np.zeros(4), None),
    "integers": (np.zeros((7, 4), dtype=np.int64), None),
    "complex": (np.zeros((7, 4), dtype=np.complex128), None),
    "objects": (np.full((7, 4), None), None),
    "row too large": (np.zeros((7, 4)), np.full(7, 3)),
    "row negative": (np.zeros((7, 4)), np.full(7, -1)),
    "rows of floats": (np.zeros((7, 4)), np.zeros(7)),
    "too few rows": (np.zeros((7, 4)), np.zeros(6, dtype=np.int64)),
    "no rows": (np.zeros((7, 4)), None),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_refused_before_any_noise_is_drawn(name, monkeypatch):
    monkeypatch.setattr(mechanism, "_add_discrete_gaussian", lambda *_: pytest.fail("noise was drawn"))
    fine = (np.full((7, 4), 0.123456), np.zeros(7, dtype=np.int64))
    with pytest.raises(ValueError) as caught:
        noisy_sum([fine, MALFORMED[name]], GaussianSum(4, 1.0, num_rows=3))
    assert not any(character in str(caught.value) for character in ("7", "0.12"))  # neither n nor a value


@pytest.mark.parametrize(
    "change",
    [
        {"neighboring_relation": "add_one"},
        {"dimension": 0},
        {"dimension": 2.0},
        {"num_rows": 2**20},
        {"grid_bits": 19},
        {"grid_bits": 31},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"clip_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 2.0**36},
    ],
)
def test_configurations_outside_the_proof_are_refused(change):
    with pytest.raises(ValueError):
        GaussianSum(**({"dimension": 4, "noise_multiplier": 1.0} | change))


def test_no_noise_is_allowed_only_in_a_demonstration():
    with pytest.raises(ValueError, match="not private"):
        noisy_sum([], GaussianSum(2, 0.0))


def test_nothing_is_printed_or_logged(capfd, caplog):
    with caplog.at_level(0):
        noisy_sum([batch(np.full((3, 2), np.nan)), batch([[3.0, 4.0]])], GaussianSum(2, 1.0))
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_sensitivity_and_noise_of_each_relation():
    stds = {name: GaussianSum(2, 3.0, 1, 0.5, name).noise_std for name in mechanism.SENSITIVITY_FACTOR}
    assert stds == {"add_or_remove_one": 1.5, "replace_one": 3.0, "zero_out": 1.5}


# ---- step 4: the law of the noise ------------------------------------------------------------

FALSE_ALARM = 2e-8  # of each assertion in check_noise; fewer than 50 are evaluated on intact noise


def check_noise(noise, std):
    """Raise unless `noise` (releases, rows, dimension) looks like independent N(0, std^2)."""
    releases, num_rows, dimension = noise.shape
    scaled = noise / std
    count = scaled.size
    squares = float((scaled**2).sum())
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], count)
    assert low < squares < high, "wrong amount of noise"
    assert stats.kstest(scaled.ravel(), "norm").pvalue > FALSE_ALARM, "not normal"
    assert abs(scaled.sum()) / math.sqrt(count) < stats.norm.isf(FALSE_ALARM / 2), "biased"
    # A sum of m products of neighbours is x'Ax with trace 0, |A|_F^2 = m/2 and operator norm at most 1, so it
    # exceeds sqrt(2 m t) + 2 t on either side with probability at most exp(-t) (Laurent & Massart 2000).
    t = math.log(2 / FALSE_ALARM)
    pairs = {
        "reused across rows": scaled[:, :-1] * scaled[:, 1:],
        "correlated coordinates": scaled[:, :, :-1] * scaled[:, :, 1:],
        "reused across releases": scaled[:-1] * scaled[1:],
    }
    for fault, products in pairs.items():
        assert abs(products.sum()) < math.sqrt(2 * products.size * t) + 2 * t, fault
    total = scaled.sum(axis=2).ravel() / math.sqrt(dimension)  # a component common to all coordinates
    assert (total**2).sum() < stats.chi2.isf(FALSE_ALARM, total.size), "common component"


def draw(mechanism_under_test=noisy_sum, seed=None, relation="add_or_remove_one", num_rows=4):
    config = GaussianSum(32, 2.5, num_rows=num_rows, clip_norm=0.5, neighboring_relation=relation)
    return np.stack([mechanism_under_test([], config, seed=seed) for _ in range(60)]), config.noise_std


@pytest.mark.parametrize("relation", sorted(mechanism.SENSITIVITY_FACTOR))
def test_the_noise_is_independent_normal_of_the_stated_size(relation):
    check_noise(*draw(relation=relation))


def test_demonstration_noise_has_the_same_law_and_is_reproducible():
    config = GaussianSum(32, 2.5, num_rows=4, clip_norm=0.5)
    noise = np.stack([noisy_sum([], config, seed=seed) for seed in range(60)])
    check_noise(noise, config.noise_std)
    np.testing.assert_array_equal(noisy_sum([], config, seed=7), noise[7])


def test_private_noise_is_fresh_every_time():
    config = GaussianSum(8, 1.0)
    assert not np.array_equal(noisy_sum([], config), noisy_sum([], config))


@pytest.mark.parametrize("relation", sorted(mechanism.SENSITIVITY_FACTOR))
def test_secret_noise_comes_from_opendp_and_from_no_other_generator(relation, monkeypatch):
    """One measurement of the scale in the proof, invoked once on the exact sum; what it returns is what leaves."""
    import random

    import opendp.prelude as dp
    import torch

    config = GaussianSum(3, 2.5, num_rows=2, clip_norm=0.5, neighboring_relation=relation)
    data = [batch([[0.25, 0.0, -0.25], [0.1, 0.2, 0.3]], [0, 1])]
    intact, invoked = dp.m.make_gaussian, []

    def make_gaussian(*args, **kwargs):
        measurement = intact(*args, **kwargs)

        def invoke(numbers):
            invoked.append((kwargs, numbers, measurement(numbers)))
            return invoked[-1][2]

        return invoke

    monkeypatch.setattr(dp.m, "make_gaussian", make_gaussian)
    for name in ("default_rng", "normal", "standard_normal", "randn"):
        monkeypatch.setattr(np.random, name, lambda *args, **kwargs: pytest.fail("numpy was asked for noise"))
    for name in ("randn", "normal", "rand"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("torch was asked for noise"))
    before = repr(np.random.get_state()), torch.get_rng_state(), random.getstate()
    released = noisy_sum(data, config)
    ((asked, exact, noisy),) = invoked
    assert asked == {"scale": 2.5 * mechanism.SENSITIVITY_FACTOR[relation] * 2**20}
    assert exact == mechanism._exact_sum(data, config).ravel().tolist()
    assert np.array_equal(released * 2**21, np.reshape(noisy, (2, 3)))
    after = repr(np.random.get_state()), torch.get_rng_state(), random.getstate()
    assert before[0] == after[0] and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_opendp_itself_certifies_the_measurement():
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    for relation in mechanism.SENSITIVITY_FACTOR:
        config = GaussianSum(64, 3.73, neighboring_relation=relation)
        domain = dp.vector_domain(dp.atom_domain(T="i64"), size=64)
        scale = config.noise_multiplier * config.grid_sensitivity
        measurement = dp.m.make_gaussian(domain, dp.l2_distance(T="f64"), scale=scale)
        assert measurement.map(config.grid_sensitivity) == pytest.approx(1 / (2 * 3.73**2), rel=1e-12)


def test_the_release_lies_on_the_grid():
    released = noisy_sum([batch([[0.3, 0.4]])], GaussianSum(2, 1.5))
    steps = released * 2**20
    np.testing.assert_array_equal(steps, np.rint(steps))


# ---- broken copies ------------------------------------------------------------


def no_clip(values, config):
    return np.trunc(np.nan_to_num(values, posinf=0, neginf=0) * config.grid_units).astype(np.int64)


def round_to_nearest(values, config):
    length = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), config.clip_norm)
    return np.rint(values / length * config.grid_units).astype(np.int64)


def round_up(values, config):
    length = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), config.clip_norm)
    grid = values / length * config.grid_units
    return (np.sign(grid) * np.ceil(np.abs(grid))).astype(np.int64)


def nan_passes(values, config):
    clipped = np.where(np.linalg.norm(values, axis=1, keepdims=True) > 1, 0.0, values)
    with np.errstate(invalid="ignore"):
        return np.trunc(clipped * config.grid_units).astype(np.int64)


@pytest.mark.parametrize("broken", [no_clip, round_to_nearest, round_up, nan_passes])
def test_broken_clipping_is_caught(broken):
    values = np.random.default_rng(3).normal(size=(200, 16))
    values[0, 0] = np.nan
    values[0, 1:] = 0.1
    if broken in (round_to_nearest, round_up):
        values = values[1:]
    with pytest.raises(AssertionError):
        check_norms(broken, values, GaussianSum(16, 1.0))


def clip_after_the_sum(private_batches, config):
    total = np.zeros((config.num_rows, config.dimension))
    for values, rows in private_batches:
        np.add.at(total, rows, values)
    return mechanism._to_grid(total, config)


def mean_centred(private_batches, config):
    centred = [(values - values.mean(0) + 0.3, rows) for values, rows in private_batches]
    return mechanism._exact_sum(centred, config)


def batch_normalised(private_batches, config):
    scaled = [(values / np.abs(values).max(), rows) for values, rows in private_batches]
    return mechanism._exact_sum(scaled, config)


@pytest.mark.parametrize("broken", [clip_after_the_sum, mean_centred, batch_normalised])
def test_broken_sums_are_caught(broken):
    values = np.array([[0.0, 0.9, 0, 0], [0, 0.9, 0, 0], [0, 0.9, 0, 0], [0, -9.0, 0, 0]])
    rows = np.zeros(4, dtype=np.int64)
    with pytest.raises(AssertionError):
        check_sensitivity(broken, values, rows, values[0], 0, "add_or_remove_one")


def test_float_accumulation_is_caught():
    def float_sum(private_batches, config):
        total = np.zeros((config.num_rows, config.dimension), dtype=np.float32)
        for values, rows in private_batches:
            np.add.at(total, rows, mechanism._to_grid(values, config).astype(np.float32))
        return total.astype(np.int64)

    generator = np.random.default_rng(4)
    values, rows = np.abs(generator.normal(size=(300, 4))), np.zeros(300, dtype=np.int64)
    shuffled = values[generator.permutation(300)]
    config = GaussianSum(4, 1.0)
    same = [
        np.array_equal(sum_of([(values, rows)], config), sum_of([(shuffled, rows)], config))
        for sum_of in (float_sum, mechanism._exact_sum)
    ]
    assert same == [False, True]


def scaled_noise(factor):
    return lambda batches, config, seed=None: factor * noisy_sum(batches, config, seed=seed)


def same_noise_for_all_rows(batches, config, seed=None):
    return np.repeat(noisy_sum(batches, config, seed=seed)[:1], config.num_rows, axis=0)


def same_noise_for_all_coordinates(batches, config, seed=None):
    return np.repeat(noisy_sum(batches, config, seed=seed)[:, :1], config.dimension, axis=1)


def weakly_correlated(batches, config, seed=None):
    noise = noisy_sum(batches, config, seed=seed)
    return math.sqrt(0.8) * noise + math.sqrt(0.2) * np.roll(noise, 1, axis=1)


def fixed_seed(batches, config, seed=None):
    return noisy_sum(batches, config, seed=0)


def uniform_noise(batches, config, seed=None):
    size = (config.num_rows, config.dimension)
    return np.random.default_rng().uniform(-1, 1, size=size) * math.sqrt(3) * config.noise_std


def sold_under_another_relation(batches, config, seed=None):
    weaker = GaussianSum(config.dimension, config.noise_multiplier, config.num_rows, config.clip_norm / 2)
    return noisy_sum(batches, weaker, seed=seed)


@pytest.mark.parametrize(
    "broken",
    [
        scaled_noise(0.5),
        scaled_noise(2.0),
        scaled_noise(0.9),
        same_noise_for_all_rows,
        same_noise_for_all_coordinates,
        weakly_correlated,
        fixed_seed,
        uniform_noise,
        sold_under_another_relation,
    ],
)
def test_broken_noise_is_caught(broken):
    with pytest.raises(AssertionError):
        check_noise(*draw(broken))
