"""Cells: the same norm and noise as one sum, every image in one block by itself, and as many as public numbers say."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperdp_lib import embedding, mechanism
from hyperdp_lib.adapter import apply_adapters
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.baselines import controls
from hyperdp_lib.cells import (
    NUMBERS,
    SLOTS,
    CellEncoder,
    CellHyperNetwork,
    apportion,
    cells_for,
    find_centroids,
    released_proportions,
)
from hyperdp_lib.data import InputError, digits
from hyperdp_lib.embedding import CHUNK, COUNT_COORDINATE, embed
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.refinement import RefinementConfig, refine


@pytest.fixture(scope="module")
def images():
    return torch.rand(300, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture(scope="module")
def network(plain, images):
    return CellHyperNetwork(plain, find_centroids(plain.encoder, images, 4))


def test_a_vector_is_the_plain_one_in_the_block_of_its_nearest_centroid(network, plain, images):
    codes, vectors = embed(plain.encoder, images), embed(network.encoder, images).view(300, 4, 16)
    cell = (codes[:, 1:] @ network.encoder.centroids.T).argmax(1)
    assert len(torch.unique(cell)) == 4  # the test says something
    assert torch.equal(vectors[torch.arange(300), cell], codes)
    vectors[torch.arange(300), cell] = 0
    assert not vectors.any()


def test_the_norm_is_at_most_one_whatever_the_image(network):
    wild = torch.cat([torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), 1e4), torch.randn(20, 1, 16, 16) * 50])
    assert embed(network.encoder, wild).norm(dim=1).max() <= 1 + 1e-5


def test_an_image_gets_the_same_vector_in_any_company(network, images):
    alone = torch.cat([embed(network.encoder, one[None]) for one in images[:5]])
    assert torch.equal(alone, embed(network.encoder, torch.cat([images[:5], images[5 : CHUNK + 9]]))[:5])


@pytest.mark.parametrize("count", [4, 16])
def test_a_tie_between_cells_is_decided_by_the_image_alone(count):
    """Of images on the border of two cells, to the last bit, none goes elsewhere for its place in a batch."""
    encoder = CellHyperNetwork.with_cells(count, load_pretrained("glyphs-nested")[1], 0.0, 5000).encoder
    images = digits("train").images[:100]
    cells = embed(encoder, images).view(len(images), count, -1)[..., 0].argmax(1)
    one, other = images[0], images[(cells != cells[0]).nonzero()[0, 0]]

    def between(shares):
        return one + torch.tensor(shares, dtype=torch.float32).view(-1, 1, 1, 1) * (other - one)

    def cell(batch):
        return embed(encoder, batch).view(len(batch), count, -1)[..., 0].argmax(1)

    low, high = 0.0, 1.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if cell(between([middle])) == cells[0] else (low, middle)
    border = between(np.linspace(low - 3e-6, high + 3e-6, 64).tolist())
    assert len(cell(border).unique()) > 1
    for image in border[16:48]:
        assert len(cell(image.repeat(CHUNK, 1, 1, 1)).unique()) == 1


def test_rounding_of_a_cells_score_is_seen_where_no_image_ties(network, images, monkeypatch):
    """Scores that depend on the place, by less than any image shows, make every image a batch of its own."""
    sizes = []
    counted = embedding.in_batches
    monkeypatch.setattr(embedding, "in_batches", lambda *a, size: sizes.append(size) or counted(*a, size=size))
    weighed = CellEncoder.weighed

    def by_place(self, batch):
        found = weighed(self, batch)
        found[1:, -1] = found[1:, -1].nextafter(torch.tensor(9e9))
        return found

    monkeypatch.setattr(embedding, "_fair_sizes", {})
    expected = embed(network.encoder, images[:5])
    monkeypatch.setattr(CellEncoder, "weighed", by_place)
    monkeypatch.setattr(embedding, "_fair_sizes", {})
    assert torch.allclose(embed(network.encoder, images[:5]), expected, atol=1e-6) and sizes == [CHUNK, 1]


def test_sums_of_cells_add_up_to_the_plain_sum_and_one_image_moves_one_block(network, plain, images):
    def exact(encoder, chosen):
        codes = embed(encoder, chosen).numpy()
        return mechanism._exact_sum([(codes, None)], mechanism.GaussianSum(codes.shape[1], noise_multiplier=1.0))

    with_all, without = exact(network.encoder, images), exact(network.encoder, images[1:])
    moved = (with_all - without).reshape(4, 16)
    assert np.count_nonzero(np.abs(moved).sum(1)) == 1
    assert (moved**2).sum() <= 2**40  # the clip norm, in grid units
    assert np.array_equal(with_all.reshape(4, 16).sum(0), exact(plain.encoder, images)[0])


def test_one_cell_is_the_plain_release(plain, images):
    one = CellHyperNetwork(plain, torch.zeros(1, 15))
    sums, std = controls.noisy_class_sums(images, None, one.encoder, epsilon=1.0, seed=3)
    plain_sums, _ = controls.noisy_class_sums(images, None, plain.encoder, epsilon=1.0, seed=3)
    assert np.array_equal(sums, plain_sums)
    mixed, single = one(torch.tensor(sums).float(), std), plain(torch.tensor(sums).float(), std)
    assert mixed.num_adapters == SLOTS
    for layer, (a, b) in mixed.factors.items():
        assert torch.allclose(a, single.factors[layer][0].expand_as(a))
        assert torch.allclose(b, single.factors[layer][1].expand_as(b))


def test_a_release_goes_through_the_one_mechanism(network, images):
    labels = torch.arange(300) % 2
    made = release(images, network, epsilon=2.0, private_labels=labels, class_names=("a", "b"), seed=1)
    assert made.noisy_sum.shape == (2, 4 * 16) and made.certificate.num_rows == 2
    assert made.certificate.dimension == 64 and math.isclose(made.certificate.epsilon, 2.0, rel_tol=1e-5)
    assert made.certificate.clip_norm == made.certificate.sensitivity == 1.0  # as without cells
    assert made.adapter.names == tuple(f"{name}/{number}" for name in "ab" for number in range(1, SLOTS + 1))
    other = CellHyperNetwork(network.hypernetwork, network.encoder.centroids.flip(0))
    again = release(images, other, epsilon=2.0, private_labels=labels, class_names=("a", "b"), seed=1)
    assert again.certificate.encoder_sha256 != made.certificate.encoder_sha256  # the cells are certified, too


def test_cells_with_too_little_are_left_out_and_the_largest_never(network):
    sums = torch.zeros(2, 4, 16)
    sums[0, :, 0] = torch.tensor([100.0, 0.5, 50.0, -3.0])  # counts times the count coordinate
    sums[1, :, 0] = torch.tensor([1.0, 2.0, -1.0, 0.0])
    (first, slots), (second, alone) = network.parts(sums.flatten(1), 3.7)
    assert first[:, 0].tolist() == [100.0, 50.0] and slots.tolist() == [13, 7]
    assert second[:, 0].tolist() == [2.0] and alone.tolist() == [SLOTS]


def test_members_follow_the_order_of_the_classes(network, base_model):
    sums = torch.zeros(2, 4, 16)
    sums[:, :, 0] = torch.tensor([[300.0, 0.0, 100.0, 0.0], [0.0, 200.0, 0.0, 0.0]])
    sums[:, :, 1:] = torch.randn(2, 4, 15, generator=torch.Generator().manual_seed(0)) * 40
    mixed = network(sums.flatten(1), 1.0, ("a", "b"))
    kept = [(sums[0, 0], 15), (sums[0, 2], 5), (sums[1, 1], SLOTS)]
    expected = network.hypernetwork(torch.stack([row for row, n in kept for _ in range(n)]), 1.0)
    x, t = torch.randn(len(mixed), 1, 16, 16), torch.full((len(mixed),), 500)
    outputs = []
    for adapter in (mixed, expected):
        with torch.no_grad(), apply_adapters(base_model, adapter):
            outputs.append(base_model(x, timestep=t, class_labels=torch.zeros(len(x), dtype=torch.long)).sample)
    assert torch.allclose(*outputs, atol=1e-6)


def test_refining_keeps_the_mixture(network, base_model):
    sums = torch.zeros(1, 4, 16)
    sums[:, :, 0] = torch.tensor([300.0, 0.0, 100.0, 0.0])
    config = RefinementConfig(num_rounds=2, images_per_class=20, sampling_steps=2)
    refined = refine(sums.flatten(1), 1.0, network, base_model, config, generator=torch.Generator().manual_seed(0))
    members = [a for a, _ in (refined.factors[layer] for layer in refined.factors)][0]
    assert refined.num_adapters == SLOTS and len(torch.unique(members.flatten(1), dim=0)) == 2


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_slots_add_up_and_follow_the_weights(weights):
    given_weights = torch.tensor(weights, dtype=torch.float64)
    slots = apportion(given_weights)
    assert int(slots.sum()) == SLOTS and (slots >= 0).all()
    exact = given_weights / given_weights.sum() * SLOTS
    assert ((slots - exact).abs() < 1 + 1e-6).all()


@given(st.floats(0, 100), st.floats(1, 1e6), st.floats(1, 4), st.booleans())
def test_more_images_or_less_noise_never_mean_fewer_cells(noise_std, size, factor, labelled):
    def number(noise, images):
        return cells_for(noise, images, labelled=labelled)

    assert number(noise_std, size) in NUMBERS
    assert number(noise_std, size * factor) >= number(noise_std, size) >= number(noise_std * factor, size)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_dozen_images_get_one_cell_even_without_noise(labelled):
    assert cells_for(0.0, 12, labelled=labelled) == 1


def test_where_a_mixed_set_first_gets_cells_the_decoder_uses_what_most_images_lie_in():
    noise_std, size = 3.73, 420
    assert [cells_for(noise_std, n, labelled=False) for n in (size - 4, size)] == [1, 16]  # the border of the rule
    fitted = CellHyperNetwork.fitting(load_pretrained("glyphs-nested")[1], noise_std, size, labelled=False)
    mixed = digits("train").images[:size]
    cell = embed(fitted.encoder, mixed).view(size, 16, -1)[:, :, 0].argmax(1)
    used = []
    for seed in range(20):
        sums, std = controls.noisy_class_sums(mixed, None, fitted.encoder, epsilon=1.0, seed=seed)
        noisy_sum = torch.as_tensor(sums, dtype=torch.float32)
        rows, _ = fitted.parts(noisy_sum, std)[0]
        kept = torch.isin(noisy_sum.view(16, -1)[:, 0], rows[:, 0]).nonzero()[:, 0]
        used.append(float(torch.isin(cell, kept).float().mean()))
    assert std == pytest.approx(noise_std, rel=1e-2)
    assert sum(used) / len(used) > 0.7


@pytest.mark.parametrize(("noise_std", "size", "count", "coordinates"), [(3.73, 12.8, 1, 16), (3.73, 6000, 64, 64)])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_shipped_weights_have_centroids_for_every_size(noise_std, size, count, coordinates, labelled):
    fitted = CellHyperNetwork.fitting(load_pretrained("glyphs-nested")[1], noise_std, size, labelled=labelled)
    assert fitted.encoder.centroids.shape == (count, coordinates)
    lengths = fitted.encoder.centroids.norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, float(count > 1)), atol=2e-3)


def test_centroids_of_another_encoder_are_refused(plain):
    with pytest.raises(InputError, match=r"\(M, 15\)"):
        CellEncoder(plain.encoder, torch.zeros(4, 8))


def test_weights_without_cells_say_what_to_do(plain):
    bare = load_pretrained("glyphs-nested")[1]
    bare.centroids = {}
    with pytest.raises(InputError, match=r"add_public_tables makes it"):
        CellHyperNetwork.fitting(bare, 0.1, 6000, labelled=True)


def test_released_proportions_add_up_the_cells_of_a_class():
    """Two classes of four cells with eight coordinates each, counts 30 - 6 + 12 + 0 and 4 + 0 + 0 + 8."""
    sums = torch.zeros(2, 4, 9, dtype=torch.float64)
    sums[:, :, 0] = COUNT_COORDINATE * torch.tensor([[30.0, -6, 12, 0], [4, 0, 0, 8]])
    sums[:, :, 1:] = 100.0  # says nothing about counts
    assert released_proportions(sums.flatten(1).numpy()).tolist() == [0.75, 0.25]


def test_released_proportions_are_those_of_the_private_classes():
    """Real digits, very unequal classes, through sums with and without cells: within the noise on the counts."""
    train, network = digits("train"), load_pretrained("glyphs-nested")[1]
    kept = (train.labels == 0) | (train.labels == 1) & (torch.arange(len(train)) % 5 == 0)
    private, labels = train.images[kept], train.labels[kept]
    truth = labels.bincount().double() / len(labels)
    for fitted in (network.using(16), CellHyperNetwork(network.using(16), network.centroids["16x4"])):
        sums, _ = controls.noisy_class_sums(private, labels, fitted.encoder, epsilon=50.0, num_classes=2, seed=0)
        assert released_proportions(sums) == pytest.approx(truth, abs=0.03)
