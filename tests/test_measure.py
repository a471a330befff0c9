"""The one loop over private data: a course sees noisy sums alone, and every sum it asks for is taken as asked."""

import numpy as np
import pytest
import torch

from hyperdp_lib import mechanism
from hyperdp_lib.embedding import embed
from hyperdp_lib.measure import NoisySum, Query, measure
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR, GaussianSum


@pytest.fixture(scope="module")
def images():
    return torch.rand(70, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def course(*queries, seen=None):
    """Asks for each, and returns the values."""
    seen = [] if seen is None else seen
    for query in queries:
        seen.append((yield query))
    return [one.values for one in seen]


def test_a_course_is_sent_what_was_released_and_nothing_else(plain, images):
    queries = [
        Query("count", GaussianSum(1, 2.0)),
        Query("sum", GaussianSum(16, 1.0, num_rows=3), plain.encoder),
        Query("halves", GaussianSum(16, 1.5, clip_norm=0.5), plain.encoder, lambda codes, rows: codes / 2),
    ]
    rows, seen = np.arange(70) % 3, []
    released, returned = measure(images, rows, course(*queries, seen=seen), seed=0)
    assert len(released) == len(seen) == 3 and all(a is b for a, b in zip(released, seen, strict=True))
    for query, one, values in zip(queries, released, returned, strict=True):
        assert type(one) is NoisySum and (one.description, one.config) == (query.description, query.config)
        assert one.values is values and values.shape == (query.config.num_rows, query.config.dimension)
        units = values * query.config.grid_units / query.config.clip_norm
        assert np.array_equal(units, np.rint(units))  # what the mechanism gives, whole numbers of its grid


def test_without_noise_each_query_is_the_sum_of_what_it_asks_for(plain, images):
    codes, rows = embed(plain.encoder, images).double().numpy(), np.arange(70) % 3
    whole = GaussianSum(16, 0.0)
    queries = [
        Query("count", GaussianSum(1, 0.0)),
        Query("all", whole, plain.encoder),
        Query("by class", GaussianSum(16, 0.0, num_rows=3), plain.encoder),
        Query("squares", whole, plain.encoder, lambda codes, rows: codes**2),
        Query("class number", whole, plain.encoder, lambda codes, rows: codes * (rows is not None)),
    ]  # fmt: skip
    _, (count, all_, each, squares, unlabelled) = measure(images, rows, course(*queries), seed=0)
    assert count == 70
    assert np.allclose(all_, codes.sum(0), atol=1e-4) and np.allclose(squares, (codes**2).sum(0), atol=1e-4)
    assert np.allclose(each, [codes[rows == label].sum(0) for label in range(3)], atol=1e-4)
    assert not unlabelled.any()  # a query of one row is not told the classes


def test_the_size_of_batches_changes_no_bit_and_no_images_are_as_good_as_many(plain, images):
    query = Query("sum", GaussianSum(16, 1.0), plain.encoder)
    found = [measure(images, None, course(query), seed=5, batch_size=size)[1][0] for size in (1, 64, 1024)]
    assert all(np.array_equal(one, found[0]) for one in found)
    assert measure(images[:0], None, course(query), seed=5)[1][0].shape == (1, 16)


@pytest.mark.parametrize("seed", [None, 0, 9])
def test_each_sum_has_noise_of_its_own_which_a_seed_repeats(images, seed, monkeypatch):
    seeds, intact = [], mechanism.noisy_sum
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *a, seed: seeds.append(seed) or intact(*a, seed=seed))
    measure(images, None, course(*[Query("count", GaussianSum(1, 1.0))] * 3), seed=seed)
    assert seeds == ([None] * 3 if seed is None else [seed, seed + 2**32, seed + 2**33])


@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
def test_a_count_is_unbiased_of_the_stated_error_and_one_image_moves_it_by_one(images, relation):
    """1,000 counts with secret noise. False alarm: one in a million for each of mean and variance."""
    from scipy import stats

    config = GaussianSum(1, 3.0, neighboring_relation=relation)
    _, found = measure(images, None, course(*[Query("count", config)] * 1000))
    errors = (np.array(found).ravel() - 70) / config.noise_std
    assert abs(errors.mean()) < 4.9 / np.sqrt(1000)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], 1000)
    assert low < np.square(errors).sum() < high
    assert config.noise_std == 3.0 * SENSITIVITY_FACTOR[relation]
    a, b = (measure(images[:n], None, course(Query("count", config)), seed=1)[1][0] for n in (70, 69))
    assert a - b == 1.0


def test_a_course_that_asks_for_nothing_releases_nothing(images):
    assert measure(images, None, course()) == ([], [])


def test_what_goes_wrong_between_two_sums_is_raised_and_nothing_is_taken_after_it(images, monkeypatch):
    calls, intact = [], mechanism.noisy_sum
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *a, seed: calls.append(1) or intact(*a, seed=seed))

    def failing():
        yield Query("count", GaussianSum(1, 1.0))
        raise ValueError("no way on")

    with pytest.raises(ValueError, match="no way on"):
        measure(images, None, failing())
    assert calls == [1]
