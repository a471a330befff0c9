"""Nested coordinates: norm one whatever their number, each a prefix of the next, and as many as public numbers say."""

import json

import numpy as np
import pytest
import torch

from hyperdp_lib import pretrained
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import CHUNK, Encoder, EncoderConfig, FeatureNetwork, embed
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.nested import (
    COORDINATES,
    COUNT_COORDINATE,
    NestedEncoder,
    NestedHyperNetwork,
)
from hyperdp_lib.public import nested as training


@pytest.fixture(scope="module")
def tasks():
    g = torch.Generator().manual_seed(2)
    shapes = torch.randn(150, 1, 1, 16, 16, generator=g)
    return (shapes + 0.3 * torch.randn(150, 12, 1, 16, 16, generator=g)).clamp(-1, 1)


@pytest.fixture(scope="module")
def network(plain, base_model, tasks):
    torch.manual_seed(3)
    features = FeatureNetwork(name="codes").eval()
    encoder = NestedEncoder(plain.encoder, features, *training.directions(plain.encoder, features, tasks))
    made = NestedHyperNetwork(encoder, base_model, plain.config).eval()
    training.warm_start(made, plain, tasks)
    made.table = {0.3: {8: 0.1, 16: 0.2, 32: 0.3, 64: 0.4}, 0.003: {8: 0.4, 16: 0.3, 32: 0.2, 64: 0.1}}
    return made


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_norm_one_and_a_count(network, coordinates):
    codes = embed(network.using(coordinates).encoder, torch.rand(50, 1, 16, 16) * 2 - 1)
    assert codes.shape == (50, 1 + coordinates)
    assert torch.all(codes[:, 0] == COUNT_COORDINATE)
    assert torch.allclose(codes.norm(dim=1), torch.ones(50), atol=1e-5)


def test_fewer_coordinates_are_the_first_ones(network):
    images = torch.rand(20, 1, 16, 16) * 2 - 1
    whole = embed(network.using(64).encoder, images)[:, 1:]
    for coordinates in COORDINATES:
        part = embed(network.using(coordinates).encoder, images)[:, 1:]
        cosine = torch.nn.functional.cosine_similarity(part, whole[:, :coordinates])
        assert torch.allclose(cosine, torch.ones(20), atol=1e-5)


def test_the_first_coordinates_tell_public_tasks_apart_best(network, tasks):
    """Directions are sorted by the variance of task means: that of the first eight is most of all 64."""
    means = network.encoder.everything(tasks.flatten(0, 1))[:, 1:].view(150, 12, -1).mean(1)
    variance = means.var(0)
    assert torch.all(variance[:-1] >= variance[1:] - 1e-5)
    assert torch.allclose(means.mean(0), torch.zeros(64), atol=1e-4)


@pytest.mark.parametrize("coordinates", [8, 64])
def test_removing_an_example_changes_no_bit_of_the_others(network, coordinates):
    encoder = network.using(coordinates).encoder
    images = torch.rand(CHUNK + 3, 1, 16, 16) * 2 - 1
    codes = embed(encoder, images)
    for removed in (0, CHUNK, len(images) - 1):
        kept = torch.arange(len(images)) != removed
        assert torch.equal(embed(encoder, images[kept]), codes[kept])


def test_it_never_trains(network):
    encoder = network.using(8).encoder
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_using_fewer_leaves_the_original_alone(network):
    network.using(8)
    assert network.encoder.config.dimension == 65
    with pytest.raises(InputError, match="one of"):
        network.using(9)


def test_as_many_coordinates_as_noise_and_number_support(network):
    assert network.coordinates_for(noise_std=3.73, declared_per_class=12) == 8
    assert network.coordinates_for(noise_std=3.73, declared_per_class=6000) == 64
    assert network.coordinates_for(noise_std=0.0, declared_per_class=12) == 64
    assert network.fitting(3.73, 12).encoder.config.dimension == 9


def test_without_a_table_it_says_so(network):
    bare = network.using(64)
    bare.table = {}
    with pytest.raises(InputError, match="no table"):
        bare.coordinates_for(1.0, 100)


def test_sums_of_different_sizes_in_one_batch_are_read_as_by_themselves(network):
    sizes = torch.tensor([16, 8, 64, 8, 32])
    sums = torch.randn(5, 65, generator=torch.Generator().manual_seed(4))
    sums[:, 0] = 20.0
    noise_std = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.1])
    together = network.generate(network.features_of(sums, noise_std, sizes))
    for row, size in enumerate(sizes.tolist()):
        alone = network(sums[row : row + 1, : 1 + size], noise_std[row : row + 1])
        for name, (a, b) in together.factors.items():
            assert torch.allclose(a[row], alone.factors[name][0][0], atol=1e-5)
            assert torch.allclose(b[row], alone.factors[name][1][0], atol=1e-5)


def test_it_starts_as_the_plain_hypernetwork(network, plain, tasks):
    """From the sums of its own 64 coordinates it makes nearly the adapters that the plain one makes from its sums."""

    def products(net, encoder):
        sums = embed(encoder, tasks.flatten(0, 1)).view(150, 12, -1).sum(1)
        return torch.cat([a.flatten(1) for a, _ in net(sums, 0.001).factors.values()], 1)

    with torch.no_grad():
        wanted, found = products(plain, plain.encoder), products(network, network.encoder)
    missed = (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert missed < 0.2


def test_a_release_carries_as_many_coordinates_as_were_chosen(network):
    images = torch.rand(30, 1, 16, 16) * 2 - 1
    released = release(images, network.using(16), epsilon=1.0, seed=0)
    assert released.noisy_sum.shape == (1, 17)
    assert released.certificate.dimension == 17
    with pytest.raises(InputError, match="reads sums of 15"):
        HyperNetwork.using(network_of(released, network), 16)


def network_of(released, network):
    """A plain hypernetwork of other sums."""
    encoder = Encoder(EncoderConfig(dimension=16, width=8))
    made = HyperNetwork.__new__(HyperNetwork)
    torch.nn.Module.__init__(made)
    made.encoder = encoder
    return made


def test_noise_is_what_the_release_says(network):
    """Sums with and without noise differ by noise of the certified size; false alarm below 1e-6 (chi-square, 17 df)."""
    images = torch.rand(30, 1, 16, 16) * 2 - 1
    few = network.using(16)
    exact = embed(few.encoder, images).double().sum(0).numpy()
    released = release(images, few, epsilon=1.0, seed=0)
    scaled = (released.noisy_sum[0] - exact) / released.certificate.noise_std
    assert 1.2 < np.square(scaled).sum() < 66


def test_training_runs_and_its_weights_load(tmp_path):
    folder = training.train_on_glyphs(tmp_path / "nested", smoke=True)
    shipped = {path.name for path in pretrained.resolve("glyphs-nested").iterdir()}
    assert {path.name for path in folder.iterdir()} == shipped
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["steps"] == 4 and set(manifest["table"]) == {"0.5"}
    base_model, network = pretrained.load_pretrained(folder)
    assert isinstance(network, NestedHyperNetwork)
    assert len(network.centroids) == 12 and len(network.priors) == 12
    again = training.train_on_glyphs(tmp_path / "nested", smoke=True)  # nothing left to do
    with pytest.raises(InputError, match="another preset or seed"):
        training.train_on_glyphs(tmp_path / "nested", smoke=True, seed=1)
    assert json.loads((again / "manifest.json").read_text())["encoder_sha256"] == manifest["encoder_sha256"]
    released = release(torch.rand(20, 1, 16, 16) * 2 - 1, network.fitting(3.73, 20), epsilon=1.0, seed=0)
    assert released.noisy_sum.shape[1] - 1 in COORDINATES
