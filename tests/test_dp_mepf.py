"""DP-MEPF: one example moves one row by at most the clip norm, noise as certified, a fit that sees only the release."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats

from hyperdp_lib import mechanism
from hyperdp_lib.baselines import dp_mepf
from hyperdp_lib.baselines.dp_mepf import DPMepfConfig, Moments, PerceptualFeatures
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import CHUNK, Encoder, EncoderConfig, FeatureNetwork

RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
SHAPE = (1, 16, 16)
SHORT = DPMepfConfig(num_steps=1, images_per_class=1, width=8, latent=4)  # tests of the release need no fit


def extractor(width=8, depths=(2, 4), **choices):
    torch.manual_seed(0)
    return PerceptualFeatures(Encoder(EncoderConfig(width=width)), depths, **choices)


def images(count=6, seed=0):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def train(batch=None, labels=LABELS, config=SHORT, network=None, **changes):
    batch = images() if batch is None else batch
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=("a", "b", "c"), seed=0)
    network = extractor() if network is None else network
    return dp_mepf.train_dp_mepf(batch, labels, network, config, **{**arguments, **changes})


def exact_sum(moments, batch, labels):
    release = mechanism.GaussianSum(moments.dimension, 0.0, num_rows=3)
    return mechanism._exact_sum(moments.of_private(batch, labels), release)


def worst_move(moments, count=CHUNK + 3):
    """How far, at most, one of a few examples moves the exact sum, in clip norms; rows it may not touch."""
    batch, labels = images(count), torch.arange(count) % 3
    whole = exact_sum(moments, batch, labels)
    moves, strangers = [], 0
    for removed in (0, 1, CHUNK - 1, CHUNK, count - 1):
        kept = torch.arange(count) != removed
        change = (whole - exact_sum(moments, batch[kept], labels[kept])).astype(object)  # integers without end
        moves.append(math.sqrt(sum(int(v) ** 2 for v in change.ravel())) / 2**20)
        strangers += np.count_nonzero(np.delete(change, int(labels[removed]), axis=0))
    return max(moves), strangers


@pytest.mark.parametrize(("width", "beta", "side"), [(8, 0.0, 4), (8, 1.0, None), (32, 0.5, 4)])
def test_one_example_moves_its_own_row_by_at_most_the_clip_norm(width, beta, side):
    """In integers, so that not even a last digit of another example may change (removing; adding is its reverse)."""
    config = dataclasses.replace(SHORT, beta=beta)
    network = extractor(width, (1, 2, 3, 4), side=side, public_images=images(50, seed=5))
    move, strangers = worst_move(Moments(network, config, SHAPE))
    assert 0.99 < move <= 1.0 and strangers == 0


def test_the_sensitivity_test_catches_an_extractor_that_looks_across_the_batch():
    features = extractor()
    leaky = Moments(lambda inputs: features(inputs - inputs.mean(0)), SHORT, SHAPE)
    move, strangers = worst_move(leaky)
    assert move > 1.0 or strangers > 0


def test_replacing_an_example_by_one_of_another_class_stays_within_two_clip_norms():
    moments = Moments(extractor(), SHORT, SHAPE)
    moved_labels = LABELS.clone()
    moved_labels[0] = 2
    change = exact_sum(moments, images(), LABELS) - exact_sum(moments, images(), moved_labels)
    assert np.linalg.norm(change / 2**20) == pytest.approx(math.sqrt(2), rel=1e-3)  # of at most 2
    assert np.count_nonzero(change[1]) == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_vector_holds_count_and_both_moments_at_norm_one(beta):
    network = extractor()
    config = DPMepfConfig(beta=beta, count_coordinate=0.3)
    rows = Moments(network, config, SHAPE)(images())
    features = network(images())
    size = features.shape[1]
    assert rows.shape == (6, 1 + size * (2 if beta else 1))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(rows[:, 0], torch.full((6,), 0.3))
    first, second = rows[:, 1 : 1 + size], rows[:, 1 + size :]
    torch.testing.assert_close(first / first.norm(dim=1, keepdim=True), features / features.norm(dim=1, keepdim=True))
    if beta:
        torch.testing.assert_close(second.norm(dim=1) / first.norm(dim=1), torch.full((6,), beta))
        squares = features.square()
        torch.testing.assert_close(
            second / second.norm(dim=1, keepdim=True), squares / squares.norm(dim=1, keepdim=True)
        )


@pytest.mark.parametrize("network", [Encoder(EncoderConfig(width=8)), FeatureNetwork()])
def test_features_are_the_activations_of_the_network(network):
    """Read here by hooks on the network itself, which is left as it was."""
    seen = []
    activations = [m for m in network.modules() if isinstance(m, (torch.nn.GELU, torch.nn.SiLU))]
    hooks = [m.register_forward_hook(lambda _, __, output: seen.append(output)) for m in activations]
    with torch.no_grad():
        network(images())
    for hook in hooks:
        hook.remove()
    found = PerceptualFeatures(network, (1, 3, 4), side=None)(images())
    assert torch.equal(found, torch.cat([seen[i].flatten(1) for i in (0, 2, 3)], 1))
    pooled = seen[0].unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean((3, 5))
    torch.testing.assert_close(PerceptualFeatures(network, (1,), side=4)(images()), pooled.flatten(1))
    public = PerceptualFeatures(network, (3, 4), public_images=images())(images())
    torch.testing.assert_close(public.mean(0), torch.zeros(public.shape[1]), atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("seed", [0, None])
def test_noise_of_the_release_is_what_the_certificate_says(relation, seed):
    """Two-sided chi-square and Kolmogorov-Smirnov tests, false alarm 1e-6 each."""
    clean, _ = train(epsilon=math.inf)
    noisy, certificate = train(neighboring_relation=relation, seed=seed)
    assert certificate.noise_std == pytest.approx(3.7304 * (2 if relation == "replace_one" else 1), rel=1e-4)
    residual = (noisy.noisy_sum - clean.noisy_sum).ravel() / certificate.noise_std
    low, high = stats.chi2(residual.size).ppf([5e-7, 1 - 5e-7])
    assert low < np.square(residual).sum() < high
    assert stats.kstest(residual, "norm").pvalue > 1e-6
    assert noisy.noise_dimension == residual.size == 3 * certificate.dimension and noisy.num_releases == 1


def test_half_the_noise_would_be_caught(monkeypatch):
    """The test above can fail: a mechanism that draws half the noise fails it."""
    halved = lambda batches, config, *, seed: mechanism.noisy_sum(  # noqa: E731
        batches, dataclasses.replace(config, noise_multiplier=config.noise_multiplier / 2), seed=seed
    )
    fake = type("Mechanism", (), {"noisy_sum": staticmethod(halved), "GaussianSum": mechanism.GaussianSum})
    monkeypatch.setattr(dp_mepf, "mechanism", fake)
    with pytest.raises(AssertionError):
        test_noise_of_the_release_is_what_the_certificate_says("add_or_remove_one", 0)


def test_a_class_is_read_from_its_own_images_only():
    changed = images()
    changed[LABELS == 2] = images(2, seed=9)
    first, second = (train(batch, epsilon=math.inf)[0].noisy_sum for batch in (images(), changed))
    assert np.array_equal(first[:2], second[:2]) and not np.array_equal(first[2], second[2])


def test_seeded_runs_repeat_and_unseeded_ones_do_not():
    def run(seed):
        trained, _ = train(seed=seed)
        return trained.noisy_sum, trained.sample(6, generator=torch.Generator().manual_seed(0))[0]

    (sum_a, images_a), (sum_b, images_b) = run(1), run(1)
    assert np.array_equal(sum_a, sum_b) and torch.equal(images_a, images_b)
    assert not np.array_equal(run(None)[0], run(None)[0])


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("public_counts", [False, True])
def test_the_certificate_states_the_budget_and_what_is_declared(relation, public_counts):
    config = dataclasses.replace(SHORT, public_class_counts=public_counts)
    for seed in (None, 0):
        _, certificate = train(config=config, epsilon=2.0, neighboring_relation=relation, seed=seed)
        assert certificate.epsilon == 2.0 and certificate.delta == 1e-5
        assert certificate.private is (seed is None) and certificate.demonstration is (seed == 0)
        assert certificate.mechanism == "discrete Gaussian sum" and certificate.num_rows == 3
        assert [entry.kind for entry in certificate.ledger] == ["declared_public"] * (1 + public_counts) + ["gaussian"]
        assert ("declared public" in certificate.num_private_treatment) is public_counts
        assert certificate.num_private == (None if relation == "add_or_remove_one" else 6)
        assert certificate.encoder_sha256 is not None
        assert type(certificate).from_json(certificate.to_json()) == certificate


def test_without_noise_it_is_certified_as_not_private():
    trained, certificate = train(epsilon=math.inf, seed=None)
    assert certificate.epsilon == math.inf and not certificate.private and trained.num_releases == 0
    assert certificate.sentence.startswith("NOT PRIVATE")


def striped(per_class=200):
    """Three classes, each a bright stripe in its own place with a little noise."""
    labels = torch.arange(3).repeat_interleave(per_class)
    batch = torch.full((3 * per_class, *SHAPE), -0.8) + 0.1 * images(3 * per_class)
    for label in range(3):
        batch[labels == label, :, :, 2 + 5 * label : 5 + 5 * label] += 1.2
    return batch.clamp(-1, 1), labels


def error(trained, batch, labels):
    """Mean squared distance of generated to real class means."""
    made, made_labels = trained.sample(60, generator=torch.Generator().manual_seed(0))
    distances = [
        (made[made_labels == k].mean(0) - batch[labels == k].mean(0)).square().mean() for k in range(3)
    ]
    return float(torch.stack(distances).mean())


def test_it_beats_noise_alone_and_approaches_its_non_private_version():
    batch, labels = striped()
    config = DPMepfConfig(num_steps=60, images_per_class=4, width=8, latent=8, learning_rate=1e-2)
    budget = dict(network=extractor(8, (2,)), config=config, num_private_declared=len(batch))
    errors = {e: error(train(batch, labels, epsilon=e, **budget)[0], batch, labels) for e in (1, 100, math.inf)}
    nobody = batch[:0], labels[:0]
    errors[0] = error(train(*nobody, epsilon=1.0, **budget)[0], batch, labels)
    assert errors[1] < 0.3 * errors[0]
    assert abs(errors[100] - errors[math.inf]) < 0.05 * errors[0]
    assert errors[math.inf] < 0.2 * errors[0]


def test_the_fit_reads_the_release_and_nothing_else(monkeypatch):
    """Repeated from its own arguments after the private images are gone, it makes the same generator."""
    calls, fit = [], dp_mepf.fit_generator

    def spy(*args, **keys):
        calls.append((args, keys))
        return fit(*args, **keys)

    monkeypatch.setattr(dp_mepf, "fit_generator", spy)
    batch = images()
    trained, _ = train(batch)
    batch.fill_(math.nan)
    ((args, keys),) = calls
    assert args[0] is trained.noisy_sum and not any(isinstance(a, torch.Tensor) for a in (*args, *keys.values()))
    for one, two in zip(trained.generator.parameters(), fit(*args, **keys).parameters(), strict=True):
        assert torch.equal(one, two)


def test_noisy_counts_stand_in_for_the_numbers_of_images(monkeypatch):
    """Noiseless they are exact; declared public they are the true ones; noise alone never divides by nothing."""
    found = []

    def spy(noisy_sum, counts, *args, **keys):
        found.append(counts)
        return torch.nn.Flatten()

    monkeypatch.setattr(dp_mepf, "fit_generator", spy)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    train(labels=labels, epsilon=math.inf)
    train(labels=labels, config=dataclasses.replace(SHORT, public_class_counts=True))
    train(images()[:0], labels[:0])
    assert found[0] == pytest.approx([3, 2, 1], abs=1e-4)
    assert found[1].tolist() == [3, 2, 1]
    assert (found[2] >= 1).all()


def test_samples_are_sorted_in_range_and_independent_of_the_batch_size():
    trained, _ = train()
    made, labels = trained.sample(9, generator=torch.Generator().manual_seed(3), num_steps=2)
    assert made.shape == (9, *SHAPE) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert made.abs().max() <= 1
    again, _ = trained.sample(9, generator=torch.Generator().manual_seed(3), batch_size=2)
    torch.testing.assert_close(made, again)
    assert trained.trained_parameters == sum(p.numel() for p in trained.generator.parameters())
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        trained.sample(7, generator=torch.Generator())


def test_unlabelled_images_colour_other_sizes_and_nobody_at_all():
    trained, certificate = train(labels=None, class_names=("adapter",))
    assert trained.noisy_sum.shape[0] == 1 and certificate.class_names == ()
    torch.manual_seed(0)
    colour = PerceptualFeatures(Encoder(EncoderConfig(width=8, channels=3, image_size=28)), (3,))
    batch = torch.rand(6, 3, 28, 28) * 2 - 1
    trained, _ = train(batch, network=colour)
    assert trained.sample(3, generator=torch.Generator())[0].shape == (3, 3, 28, 28)
    trained, _ = train(images()[:0], LABELS[:0])
    assert torch.isfinite(trained.sample(3, generator=torch.Generator())[0]).all()


UNREADABLE = torch.empty(6, *SHAPE, device="meta")  # any look at a value is an error


@pytest.mark.parametrize(
    ("batch", "changes", "message"),
    [
        (UNREADABLE, {"epsilon": 0.0}, "epsilon must be above 0"),
        (UNREADABLE, {"epsilon": math.nan}, "epsilon"),
        (UNREADABLE, {"delta": 1.0}, "delta"),
        (UNREADABLE, {"neighboring_relation": "swap"}, "zero_out"),
        (UNREADABLE, {"num_private_declared": 0}, "num_private_declared"),
        (UNREADABLE, {"class_names": tuple(map(str, range(2**20)))}, "at most 1048576"),
        (UNREADABLE, {"class_names": ()}, "class_names is empty"),
        (UNREADABLE, {"labels": None}, "no private_labels"),
        (torch.empty(6, 1, 18, 18, device="meta"), {}, "multiple of 4"),
        (torch.empty(6, 1, 16, 20, device="meta"), {}, "square"),
        (torch.empty(6, 3, 16, 16, device="meta"), {}, "cannot read images of shape"),
        (UNREADABLE, {"network": lambda inputs: inputs.mean()}, "must return"),
        (images() * math.nan, {}, "finite floats"),
        (images(5), {}, "differ in length"),
        (images(), {"class_names": ("a", "b")}, "must lie in 0 .. 1"),
    ],
)
def test_bad_requests_are_refused_before_any_private_image_is_read(batch, changes, message):
    with pytest.raises(InputError, match=message):
        train(batch, **changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": -1.0}, {"beta": math.inf}, {"count_coordinate": 0.0}, {"count_coordinate": 1.0}, {"num_steps": 0},
        {"width": 12}, {"learning_rate": 0.0}, {"moment_decay": 1.0}, {"ema_decay": 1.0}, {"latent": 0},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(wrong):
    with pytest.raises(InputError):
        DPMepfConfig(**wrong)


def test_bad_networks_and_depths_are_refused():
    with pytest.raises(InputError, match="depths must lie in 1 .. 6"):
        extractor(depths=(7,))
    with pytest.raises(InputError, match="depths"):
        extractor(depths=())
    with pytest.raises(InputError, match="side must be"):
        extractor(side=0)
    with pytest.raises(InputError, match="across the batch"):
        PerceptualFeatures(torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.ReLU()), (1,))
