"""DP-SGD on the hypernetwork's input: right gradients, bounded steps, the noise it certifies, and it learns."""

import dataclasses
import functools
import math

import pytest
import torch
from scipy import stats

from hyperdp_lib import diffusion
from hyperdp_lib.baselines import dp_embedding_sgd as module
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.baselines.dp_embedding_sgd import EmbeddingSGDConfig, EmbeddingVector, VectorGradients
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model
from hyperdp_lib.embedding import Encoder, EncoderConfig
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig

K = 12
CONFIG = EmbeddingSGDConfig(num_steps=3, noise_draws=1, told_count=20.0)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@functools.cache
def models():
    """A tiny base model and a hypernetwork whose adapters depend on its input; nobody may change them."""
    torch.manual_seed(0)
    base = build_base_model(BaseModelConfig(width=32, num_layers=1, num_heads=2))
    with torch.no_grad():  # zero-initialised output layers would make every gradient zero
        for p in base.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network = HyperNetwork(
        Encoder(EncoderConfig(dimension=K, width=8)), base, HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)
    )
    torch.nn.init.normal_(network.head_b.weight, std=0.1)
    return base, network


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def fixed_loss(model, pictures, *, generator=None, labels=None):
    """Its noise is a function of the image: the same alone and in a batch."""
    noise = pictures.roll(5, -1) + 0.3 * pictures.flip(-2)
    noisy = 0.6 * pictures + 0.4 * noise
    velocity = diffusion.predict(model, noisy, torch.full((len(pictures),), 0.4))
    return (velocity - (noise - pictures)).square().flatten(1).mean(1)


def draw_loss(model, pictures, *, generator=None, labels=None):
    """The same with another draw in every row of the batch."""
    rows = torch.arange(len(pictures)).view(-1, 1, 1, 1)
    return fixed_loss(model, pictures + 0.1 * torch.sin(7.0 * rows + pictures))


def trainee(start=None):
    generator = torch.Generator().manual_seed(1)
    return EmbeddingVector(0.2 * torch.randn(K - 1, generator=generator) if start is None else start, 1.0)


def decoder(config=CONFIG, loss=fixed_loss):
    return module.Decoder(*models(), config, loss)


def test_per_example_gradients_are_those_of_one_example_at_a_time():
    vector, frozen = trainee(), decoder()
    VectorGradients(vector, frozen).backward(images(), None, torch.Generator())
    for index, found in enumerate(vector.vector.grad_sample):
        loss = frozen.losses(vector, images()[index : index + 1], generator=torch.Generator(), labels=None)
        (expected,) = torch.autograd.grad(loss.sum(), vector.vector)
        assert expected.norm() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradient_points_where_a_finite_difference_does():
    """An oracle without autograd, in double precision."""
    frozen = decoder()
    frozen.base_model.double(), frozen.hypernetwork.double()
    vector = trainee().double()
    pictures = images(1).double()
    VectorGradients(vector, frozen).backward(pictures, None, torch.Generator())
    direction = torch.randn(K - 1, generator=torch.Generator().manual_seed(3)).double()
    ends = [vector.vector.detach() + sign * 1e-5 * direction for sign in (1, -1)]
    up, down = (frozen.under(end[None], pictures, torch.Generator()).item() for end in ends)
    assert (up - down) / 2e-5 == pytest.approx(float(vector.vector.grad_sample[0] @ direction), rel=1e-5)


def test_noise_draws_are_averaged_before_clipping():
    vector, frozen = trainee(), decoder(dataclasses.replace(CONFIG, noise_draws=3), draw_loss)
    losses = frozen.losses(vector, images(4).repeat_interleave(3, 0), generator=None, labels=None)
    draw_losses = losses.view(4, 3).mean(1)
    expected = [torch.autograd.grad(loss, vector.vector, retain_graph=True)[0] for loss in draw_losses]
    VectorGradients(vector, frozen).backward(images(4), None, torch.Generator())
    torch.testing.assert_close(vector.vector.grad_sample, torch.stack(expected), rtol=1e-4, atol=1e-6)


def plan(**changes):
    fields = dict(noise_std=0.0, sample_rate=1.0, num_steps=1, declared_size=1.0, sensitivity=1.0, accountant="test")
    return dp_sgd.PrivacyPlan(**{**fields, **changes})


def step_of(parts, clip_norm, chosen=None, gradients=VectorGradients):
    """Minus the change in one step of gradient descent with learning rate 1: the noisy sum of clipped gradients."""
    vector = trainee(torch.zeros(K - 1))  # so that the change is not rounded away beside the vector
    sgd = torch.optim.SGD(vector.parameters(), lr=1.0)
    noise = torch.Generator().manual_seed(0)
    step = dp_sgd.noisy_step(
        gradients(vector, decoder()), sgd, chosen or plan(), clip_norm, noise=noise, draws=torch.Generator()
    )
    step([(part, None) for part in parts])
    return -vector.vector.detach()


class SharedVector(VectorGradients):
    """A mutant: one copy for the whole batch, so that every 'example' gets the gradient of all."""

    def backward(self, private_images, private_labels, generator):
        loss = self.decoder.losses(self.trainee, private_images, generator=generator, labels=None).sum()
        (gradient,) = torch.autograd.grad(loss, self.trainee.vector)
        self.trainee.vector.grad_sample = gradient.expand(len(private_images), -1).clone()


def largest_move(gradients):
    """How far adding one example moves the sum, over the clip norm; the other way round it is the same distance.

    The clip norm is of the size of the gradients, so that not all of them are clipped.
    """
    clip_norm = float(gradient_norms().median())
    everybody = step_of([images()], clip_norm, gradients=gradients)
    without = [
        step_of([torch.cat([images()[:i], images()[i + 1 :]])], clip_norm, gradients=gradients) for i in range(6)
    ]
    return max(float((everybody - one).norm()) for one in without) / clip_norm


def gradient_norms():
    vector = trainee(torch.zeros(K - 1))
    VectorGradients(vector, decoder()).backward(images(), None, torch.Generator())
    return vector.vector.grad_sample.norm(dim=1)


def test_one_example_moves_the_sum_by_at_most_the_clip_norm():
    assert 0.99 < largest_move(VectorGradients) <= 1 + 1e-4
    assert largest_move(SharedVector) > 1.02  # the test sees a broken one


def test_physical_batches_change_nothing_and_an_empty_one_is_noise():
    chosen = plan(noise_std=2.0)
    whole, parts = step_of([images()], 0.1, chosen), step_of(images().split(4), 0.1, chosen)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    nobody = step_of([images(0)], 0.1, chosen)
    assert nobody.shape == (K - 1,) and 0.05 < nobody.std() < 0.6


def train(pictures, labels, config=CONFIG, **changes):
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=("a", "b", "c"), loss_function=fixed_loss)
    return module.train_dp_embedding_sgd(pictures, labels, *models(), config, **{**arguments, **changes})


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_noise_is_what_the_certificate_says(relation, monkeypatch):
    """Chi-square on the noisy gradients of many steps and of nobody's images; false alarm 1e-6."""
    released = []
    descend = torch.optim.AdamW.step

    def watched(self, *arguments, **named):
        released.append(self.param_groups[0]["params"][0].grad.clone())
        return descend(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = dataclasses.replace(CONFIG, num_steps=100, clip_norm=0.5)
    nobody = torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long)
    trained, certificate = train(*nobody, config, neighboring_relation=relation, seed=0)
    residual = torch.cat(released).double() * trained.plan.denominator / certificate.noise_std
    assert len(residual) == 3 * 100 * (K - 1)
    low, high = stats.chi2(len(residual)).ppf([5e-7, 1 - 5e-7])
    assert low < float(residual.square().sum()) < high
    # one class alone spends the budget: 100 full-batch steps are one Gaussian mechanism
    mu = math.sqrt(100) * certificate.sensitivity / certificate.noise_std
    spent = stats.norm.cdf(mu / 2 - 1 / mu) - math.e * stats.norm.cdf(-mu / 2 - 1 / mu)
    assert 0.97e-5 < spent <= 1e-5 * (1 + 1e-9)
    assert certificate.sensitivity == config.clip_norm * (2 if relation == "replace_one" else 1)


def test_a_class_sees_its_own_images_only():
    changed = images()
    changed[LABELS == 2] = images(2, seed=9)
    config = dataclasses.replace(CONFIG, noise_draws=2)
    first, second = (train(pictures, LABELS, config, seed=3)[0].vectors for pictures in (images(), changed))
    assert torch.equal(first[:2], second[:2]) and not torch.equal(first[2], second[2])


def test_vectors_stay_in_the_ball_and_dimensions_are_counted():
    wild = dataclasses.replace(CONFIG, learning_rate=10.0, radius=0.5)
    trained, _ = train(images(), LABELS, wild, seed=0)
    assert float(trained.vectors.norm(dim=1).max()) <= 0.5 + 1e-6
    assert (trained.noise_dimension, trained.trained_parameters) == (K - 1, 3 * (K - 1))
    assert trained.num_releases == 3 and trained.adapter.names == ("a", "b", "c")


def test_it_learns_without_noise_and_samples():
    config = dataclasses.replace(CONFIG, num_steps=40, learning_rate=0.1, told_noise=1e-3)
    base, network = models()
    before = {**base.state_dict(), **network.state_dict()}
    before = {key: value.clone() for key, value in before.items()}
    trained, certificate = train(images(), LABELS, config, epsilon=math.inf)
    assert all(torch.equal(value, before[k]) for k, value in {**base.state_dict(), **network.state_dict()}.items())
    order = LABELS.argsort(stable=True)
    old, new = (
        decoder(config).under(vectors, images()[order], torch.Generator()).mean()
        for vectors in (torch.zeros(3, K - 1), trained.vectors)
    )
    assert new < 0.97 * old
    assert certificate.sentence.startswith("NOT PRIVATE") and not certificate.private
    assert trained.plan.noise_std == 0 and trained.num_releases == 0
    samples, labels = trained.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)
    assert samples.shape == (6, 1, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert samples.abs().max() <= 1
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        trained.sample(7, generator=torch.Generator())


def test_large_clip_norm_and_little_noise_is_the_same_training_as_none():
    config = dataclasses.replace(CONFIG, clip_norm=1e3, num_steps=5)
    free = train(images(), LABELS, config, epsilon=math.inf)[0].vectors
    steps = []
    original = dp_sgd.privacy_plan

    def quiet(*arguments, **sizes):
        steps.append(dataclasses.replace(original(*arguments, **sizes), noise_std=1e-12))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_sgd, "privacy_plan", quiet)
        patch.setattr("hyperdp_lib.baselines.dp_training.certify", lambda *_, **__: None)
        private = train(images(), LABELS, config)[0].vectors
    torch.testing.assert_close(private, free, rtol=1e-3, atol=1e-4)


def test_seeds_repeat_and_are_stamped():
    (one, stamped), (two, _) = (train(images(), LABELS, seed=1) for _ in range(2))
    assert torch.equal(one.vectors, two.vectors)
    assert stamped.demonstration and not stamped.private
    (three, secret), (four, _) = (train(images(), LABELS) for _ in range(2))
    assert not torch.equal(three.vectors, four.vectors)
    assert secret.private and secret.epsilon == 1.0 and secret.method == "dp_embedding_sgd"
    classes, declared, entry = secret.ledger
    assert classes.quantity == "class names" and declared.kind == "declared_public"
    assert (entry.kind, entry.steps, entry.sample_rate) == ("dp_sgd", 3, 1.0)
    assert type(secret).from_json(secret.to_json()) == secret


def test_unlabelled_images_and_a_public_start():
    start = torch.full((K,), 0.1)
    config = dataclasses.replace(CONFIG, learning_rate=1e-6)
    trained, _ = train(images(), None, config, class_names=("all",), public_start=start, seed=0)
    torch.testing.assert_close(trained.vectors[0], start[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"neighboring_relation": "swap"}, "zero_out"),
        ({"num_private_declared": 0}, "num_private_declared"),
        ({"class_names": ("a", "b")}, "must lie in 0 .. 1"),
        ({"public_start": torch.zeros(K - 1)}, "public_start"),
        ({"public_start": torch.full((K,), math.nan)}, "public_start"),
    ],
)
def test_bad_requests_are_one_helpful_line(changes, message):
    with pytest.raises(InputError, match=message):
        train(images(), LABELS, **changes)


def test_bad_images_and_settings():
    with pytest.raises(InputError, match=r"shape \(N, 1, 16, 16\)"):
        train(torch.zeros(6, 3, 16, 16), LABELS)
    with pytest.raises(InputError, match=r"shape \(N, 1, 16, 16\)"):
        train(torch.zeros(6, 1, 28, 28), LABELS)
    with pytest.raises(InputError, match="no private_labels"):
        train(images(), None)
    for wrong in ({"told_count": 0.0}, {"told_noise": math.inf}, {"radius": -1.0}, {"num_steps": 0}):
        with pytest.raises(InputError):
            dataclasses.replace(CONFIG, **wrong)
