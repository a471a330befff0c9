"""The hybrid: starts at the decoded adapter, spends the budget once in two parts, and each part's noise is its own."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from hyperdp_lib import accounting, diffusion, embedding, ledger, mechanism, planning
from hyperdp_lib.adapter import apply_adapters
from hyperdp_lib.baselines import controls, dp_hybrid, dp_lora, dp_sgd
from hyperdp_lib.baselines.dp_hybrid import DPHybridConfig, split_budget
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model
from hyperdp_lib.embedding import Encoder, EncoderConfig
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig

K = 12
CONFIG = DPHybridConfig(num_steps=2, noise_draws=1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


@functools.cache
def models():
    """A tiny base model and a hypernetwork whose adapters depend on its input; nobody may change them."""
    torch.manual_seed(0)
    base = build_base_model(BaseModelConfig(width=32, num_layers=1, num_heads=2))
    with torch.no_grad():  # zero-initialised output layers would make every gradient zero
        for p in base.parameters():
            p.add_(0.05 * torch.randn_like(p))
    network = HyperNetwork(
        Encoder(EncoderConfig(dimension=K, width=8)),
        base,
        HyperNetworkConfig(r=2, lora_alpha=3, hidden=16, head_width=16, num_blocks=1),
    )
    torch.nn.init.normal_(network.head_b.weight, std=0.1)
    return base, network


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def fixed_loss(model, pictures, *, generator=None, labels=None):
    noise = pictures.roll(5, -1) + 0.3 * pictures.flip(-2)
    velocity = diffusion.predict(model, 0.6 * pictures + 0.4 * noise, torch.full((len(pictures),), 0.4))
    return (velocity - (noise - pictures)).square().flatten(1).mean(1)


def train(pictures, labels, config=CONFIG, **changes):
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=("a", "b", "c"), loss_function=fixed_loss)
    return dp_hybrid.train_dp_hybrid(pictures, labels, *models(), config, **{**arguments, **changes})


def flat(adapter):
    return torch.cat([factor.flatten() for factor in adapter.parameters()])


def sizes(batch=math.inf, steps=20):
    return dict(expected_batch_size=batch, declared_size=100.0, num_steps=steps)


@pytest.mark.parametrize(("epsilon", "share"), [(1.0, 0.1), (4.0, 0.5), (1.0, 0.9)])
def test_full_batches_share_the_squared_parameter(epsilon, share):
    """One Gaussian sum and T Gaussian steps are one Gaussian mechanism: computed here without any accountant."""
    split = split_budget(epsilon, 1e-5, "add_or_remove_one", share, **sizes())
    chosen = dp_sgd.privacy_plan(split.sgd_epsilon, split.sgd_delta, "add_or_remove_one", **sizes())
    of_sum, of_sgd = 1 / split.sum_multiplier, math.sqrt(20) / chosen.noise_multiplier
    assert of_sum**2 / (of_sum**2 + of_sgd**2) == pytest.approx(share, rel=0.01)
    mu = math.hypot(of_sum, of_sgd)
    cdf = stats.norm.cdf
    spent = cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * cdf(-mu / 2 - epsilon / mu)
    assert 0.97e-5 < spent <= 1e-5
    charges = split.charges(chosen, "add_or_remove_one")
    assert 0.995 * epsilon < ledger.ledger_epsilon(charges, 1e-5, "add_or_remove_one") <= epsilon


def test_poisson_batches_fill_the_budget_and_gain_by_sampling():
    few = sizes(batch=30, steps=4)
    split = split_budget(1.0, 1e-5, "zero_out", 0.5, **few)
    chosen = dp_sgd.privacy_plan(split.sgd_epsilon, split.sgd_delta, "zero_out", **few)
    assert 0.98 < ledger.ledger_epsilon(split.charges(chosen, "zero_out"), 1e-5, "zero_out") <= 1.0
    unsampled = math.sqrt(2 * 4) * accounting.noise_multiplier(1.0, 1e-5)
    assert chosen.noise_std < 0.5 * unsampled
    # a hundredth of delta is kept for the end of the noise of DP-SGD
    assert split.sum_multiplier == pytest.approx(math.sqrt(2) * accounting.noise_multiplier(1.0, 0.99e-5))


def test_sampled_replacement_adds_epsilon_and_delta():
    split = split_budget(2.0, 1e-5, "replace_one", 0.25, **sizes(batch=10))
    assert (split.sum_epsilon, split.sum_delta) == (0.5, 2.5e-6)
    assert 1.49 < split.sgd_epsilon <= 1.5 and split.sgd_delta == pytest.approx(7.5e-6)


def spent_by(split, steps=20):
    chosen = dp_sgd.privacy_plan(split.sgd_epsilon, split.sgd_delta, "add_or_remove_one", **sizes(steps=steps))
    return ledger.ledger_epsilon(split.charges(chosen, "add_or_remove_one"), 1e-5, "add_or_remove_one")


def test_a_mutant_that_spends_the_budget_twice_is_seen_by_the_ledger():
    twice = dp_hybrid.BudgetSplit(1.0, 1e-5, 1.0, 1e-5)
    assert spent_by(twice) > 1.4
    half_epsilon_each = dp_hybrid.BudgetSplit(0.5, 5e-6, 0.5, 5e-6)  # valid, but wasteful
    assert spent_by(half_epsilon_each) < 0.8


def test_training_starts_at_the_decoded_adapter():
    """A learning rate of next to nothing leaves what `release` makes of the same noisy sum."""
    config = dataclasses.replace(CONFIG, learning_rate=1e-12, ema_decay=0.0)
    trained, _ = train(images(), LABELS, config, seed=5)
    base, network = models()
    sums, std = controls.noisy_class_sums(
        images(), LABELS, network.encoder, epsilon=trained.split.sum_epsilon, num_classes=3, seed=5
    )
    decoded = planning.decode(sums, std, network, ("a", "b", "c"))
    assert torch.equal(flat(trained.start), flat(decoded))
    torch.testing.assert_close(flat(trained.adapter), flat(decoded), rtol=1e-4, atol=1e-6)
    assert trained.adapter.geometry == network.geometry and trained.adapter.lora_config.lora_alpha == 3
    assert std == pytest.approx(accounting.noise_multiplier(1.0, 0.99e-5) / math.sqrt(config.share))


def test_the_decoded_adapter_acts_in_the_trained_model():
    """`start_at` sets the weights PEFT uses: the trainee computes what `apply_adapters` does."""
    base, network = models()
    with torch.no_grad():
        adapter = network(torch.randn(1, K, generator=torch.Generator().manual_seed(0)), 0.1, ("one",))
    config = dp_lora.DPLoraConfig(r=2, lora_alpha=3, target_modules=network.config.target_modules)
    made = dp_lora.lora_model(base, config)
    made.start_at(adapter)
    with torch.no_grad(), apply_adapters(base, adapter):
        expected = fixed_loss(base, images())
    with torch.no_grad():
        torch.testing.assert_close(fixed_loss(made.model, images()), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="one adapter"):
        made.start_at(train(images(), LABELS, epsilon=math.inf)[0].adapter)


@pytest.mark.parametrize("relation", RELATIONS)
def test_both_noises_are_what_the_certificate_says(relation, monkeypatch):
    """Chi-square on nobody's noisy sums and noisy gradients; false alarm 1e-6 each."""
    gradients, sums = [], []
    descend, noisy_sum = torch.optim.AdamW.step, mechanism.noisy_sum

    def watched(self, *arguments, **named):
        gradients.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
        return descend(self, *arguments, **named)

    def kept(batches, config, *, seed=None):
        sums.append(noisy_sum(batches, config, seed=seed))
        return sums[-1]

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(mechanism, "noisy_sum", kept)
    nobody = torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long)
    for seed in range(4):
        trained, certificate = train(*nobody, neighboring_relation=relation, seed=seed)
    classes, declared, of_sum, of_sgd = certificate.ledger
    assert classes.quantity == "class names" and declared.kind == "declared_public"
    assert (of_sum.kind, of_sgd.kind, of_sgd.steps) == ("gaussian", "dp_sgd", CONFIG.num_steps)
    sensitivity = 2.0 if relation == "replace_one" else 1.0
    residual = np.concatenate([s.ravel() for s in sums]) / (of_sum.noise_multiplier * sensitivity)
    assert residual.size == 4 * 3 * K and chi_square_fits(residual)
    assert certificate.sensitivity == sensitivity * CONFIG.clip_norm
    noise = torch.cat(gradients).double().numpy() * trained.plan.denominator
    assert chi_square_fits(noise / (of_sgd.noise_multiplier * certificate.sensitivity))
    assert not chi_square_fits(noise / (0.98 * of_sgd.noise_multiplier * certificate.sensitivity))


def chi_square_fits(residual):
    low, high = stats.chi2(residual.size).ppf([5e-7, 1 - 5e-7])
    return low < float(np.square(residual).sum()) < high


def test_the_certificate_states_the_budget_and_two_charges():
    trained, certificate = train(images(), LABELS)
    assert certificate.private and certificate.epsilon == 1.0 and certificate.charged
    assert ledger.ledger_epsilon(certificate.ledger, 1e-5, "add_or_remove_one") <= 1.0
    assert certificate.method == "dp_hybrid" and certificate.num_private is None
    assert type(certificate).from_json(certificate.to_json()) == certificate
    assert trained.num_releases == 1 + CONFIG.num_steps
    assert trained.noise_dimension * 3 == trained.trained_parameters == trained.adapter.num_parameters


def test_one_example_moves_each_part_by_at_most_its_clip_norm():
    """The mechanism's sum and one gradient step at the decoded adapter, with and without an example."""
    base, network = models()
    codes = [embedding.embed_batches(network.encoder, [images()[:n]]) for n in (5, 6)]
    exact = [mechanism.noisy_sum([(next(c), None)], mechanism.GaussianSum(K, 0.0), seed=0) for c in codes]
    assert 0.99 < np.linalg.norm(exact[1] - exact[0]) <= 1.0
    start = planning.decode(exact[1], 1.0, network, ("a",))
    config = dp_lora.DPLoraConfig(r=2, lora_alpha=3, target_modules=network.config.target_modules)
    moved = []
    for count in (5, 6):
        made = dp_lora.lora_model(base, config)
        made.start_at(start)
        sgd = torch.optim.SGD(made.parameters, lr=1.0)
        plan = dp_sgd.PrivacyPlan(0.0, 1.0, 1, 1.0, 1.0, "test")
        before = torch.cat([p.detach().clone().flatten() for p in made.parameters])
        step = dp_sgd.noisy_step(
            dp_sgd.ExampleGradients(made.model, fixed_loss), sgd, plan, 1e-2,
            noise=torch.Generator(), draws=torch.Generator(),
        )  # fmt: skip
        step([(images()[:count], None)])
        moved.append(before - torch.cat([p.detach().flatten() for p in made.parameters]))
    assert 0.9e-2 < (moved[1] - moved[0]).norm() <= 1e-2 * (1 + 1e-3)


def test_a_class_sees_its_own_images_only():
    changed = images()
    changed[LABELS == 2] = images(2, seed=9)
    first, second = (train(pictures, LABELS, seed=3)[0].adapter for pictures in (images(), changed))
    for name in ("a", "b"):
        assert torch.equal(flat(first[name]), flat(second[name]))
    assert not torch.equal(flat(first["c"]), flat(second["c"]))


def test_it_learns_without_noise_from_the_start_and_samples():
    config = dataclasses.replace(CONFIG, num_steps=30, learning_rate=1e-2)
    base, network = models()
    before = {key: value.clone() for key, value in {**base.state_dict(), **network.state_dict()}.items()}
    trained, certificate = train(images(), LABELS, config, epsilon=math.inf)
    assert all(torch.equal(value, before[k]) for k, value in {**base.state_dict(), **network.state_dict()}.items())
    order = LABELS.argsort(stable=True)
    losses = []
    for adapter in (trained.start, trained.adapter):
        with torch.no_grad(), apply_adapters(base, adapter):
            losses.append(float(fixed_loss(base, images()[order]).mean()))
    assert losses[1] < 0.9 * losses[0]
    assert certificate.sentence.startswith("NOT PRIVATE") and not certificate.private
    assert trained.num_releases == 0 and trained.plan.noise_std == 0
    samples, labels = trained.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)
    assert samples.shape == (6, 1, 16, 16) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="multiple of the 3 classes"):
        trained.sample(7, generator=torch.Generator())


def test_seeds_repeat_and_are_stamped():
    (one, stamped), (two, _) = (train(images(), LABELS, seed=1) for _ in range(2))
    assert torch.equal(flat(one.adapter), flat(two.adapter))
    assert stamped.demonstration and not stamped.private
    assert not torch.equal(flat(train(images(), LABELS)[0].start), flat(train(images(), LABELS)[0].start))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"epsilon": math.nan}, "epsilon > 0"),
        ({"delta": 1.0}, "delta < 1"),
        ({"neighboring_relation": "swap"}, "zero_out"),
        ({"num_private_declared": 0}, "num_private_declared"),
        ({"class_names": ()}, "class_names is empty"),
        ({"class_names": ("a", "b")}, "must lie in 0 .. 1"),
        ({"class_names": ("a", "b", "a")}, "must all be different"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_summed(changes, message, monkeypatch):
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *_, **__: pytest.fail("private data was summed"))
    with pytest.raises(InputError, match=message):
        train(images(), LABELS, **changes)


def test_bad_images_and_settings():
    with pytest.raises(InputError, match=r"shape \(N, 1, 16, 16\)"):
        train(torch.zeros(6, 3, 16, 16), LABELS)
    with pytest.raises(InputError, match="no private_labels"):
        train(images(), None)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="dp_deepsets"):
            dataclasses.replace(CONFIG, share=share)
    one, _ = train(images(), None, class_names=("all",), seed=0)
    assert one.adapter.names == ("all",)
