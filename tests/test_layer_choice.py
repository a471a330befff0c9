"""The search over layers: its price by two routes and in a case computed exactly, its noise, and what leaves it."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from hyperdp_lib import accounting, diffusion
from hyperdp_lib.baselines import dp_lora, layer_choice, private_selection
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.baselines.layer_choice import LayerSearchConfig
from hyperdp_lib.baselines.private_selection import search_epsilon, search_plan
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model

CONFIG = LayerSearchConfig(r=1, num_steps=2, mean_trials=2.0, shape=1.0, candidates=("attention", "final"))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
DISTRIBUTIONS = [(5.0, math.inf), (2.0, math.inf), (5.0, 1.0), (8.0, 0.0), (4.0, 0.5), (1.0, 1.0)]


@functools.cache
def base_model(layers=2):
    """Tiny; nobody may change it."""
    torch.manual_seed(0)
    base = build_base_model(BaseModelConfig(width=32, num_layers=layers, num_heads=2))
    with torch.no_grad():  # zero-initialised output layers would make every gradient zero
        for p in base.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return base.requires_grad_(False)


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def search(config=CONFIG, batch=None, labels=LABELS, **changes):
    batch = images() if batch is None else batch
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=("a", "b", "c"), seed=0)
    return layer_choice.train_dp_layer_search(batch, labels, base_model(), config, **{**arguments, **changes})


# The price


def renyi_of_the_search(rho, mean, shape):
    """Theorems 2 and 6 of Papernot & Steinke, written out for a trial that is rho-zCDP: orders and divergences."""
    orders = np.array(private_selection.ORDERS)
    one = rho * orders
    if math.isinf(shape):
        level = np.log1p(1 / (orders - 1))
        # from Renyi to (epsilon, delta): Canonne, Kamath & Steinke 2020, Proposition 12
        exponent = (orders - 1) * (one - level[:, None] + np.log1p(-1 / orders)) - np.log(orders)
        return orders, one + mean * np.exp(exponent.min(1)) + np.log(mean) / (orders - 1)
    gamma = private_selection.halting_probability(mean, shape)
    constant = (1 + shape) * ((1 - 1 / orders) * one - np.log(gamma) / orders).min()
    return orders, one + constant + np.log(mean) / (orders - 1)


def epsilon_of(orders, divergences, delta):
    return (divergences + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)).min()


@pytest.mark.parametrize(("mean", "shape"), DISTRIBUTIONS)
@pytest.mark.parametrize("multiplier", [2.0, 12.0])
def test_the_library_charges_what_the_theorems_say(mean, shape, multiplier):
    ours = epsilon_of(*renyi_of_the_search(1 / (2 * multiplier**2), mean, shape), 1e-5)
    theirs = search_epsilon(None, multiplier, 1e-5, mean_trials=mean, shape=shape)
    assert theirs == pytest.approx(ours, rel=1e-3)


def generating_function(mean, shape, s):
    """E s^K and its derivative."""
    if math.isinf(shape):
        return np.exp(mean * (s - 1)), mean * np.exp(mean * (s - 1))
    gamma = private_selection.halting_probability(mean, shape)
    rest = 1 - (1 - gamma) * s
    if shape == 0:
        return np.log(rest) / math.log(gamma), -(1 - gamma) / rest / math.log(gamma)
    scale = gamma**-shape - 1
    return (rest**-shape - 1) / scale, shape * (1 - gamma) * rest ** (-shape - 1) / scale


def exact_delta(mu, epsilon, mean, shape):
    """Of releasing the largest of K normal scores whose mean an example moves by mu: by integration, both directions.

    With no trial at all the two worlds look alike, which costs nothing.
    """
    y = np.linspace(-12, 14, 50_001)

    def density(shift):
        return generating_function(mean, shape, stats.norm.cdf(y - shift))[1] * stats.norm.pdf(y - shift)

    p, q = density(mu), density(0.0)
    step = y[1] - y[0]
    return max(np.clip(a - math.exp(epsilon) * b, 0, None).sum() * step for a, b in ((p, q), (q, p)))


@pytest.mark.parametrize(("mean", "shape"), DISTRIBUTIONS[:5])
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_a_search_computed_exactly_keeps_the_promise_and_needs_it(mean, shape, mu):
    delta = 1e-5
    promised = search_epsilon(None, 1 / mu, delta, mean_trials=mean, shape=shape)
    assert exact_delta(mu, promised, mean, shape) <= delta
    # the mutant: the search charged like one training
    assert exact_delta(mu, accounting.epsilon(1 / mu, delta), mean, shape) > 1.5 * delta


@pytest.mark.parametrize(("mean", "shape"), DISTRIBUTIONS)
def test_the_number_of_trials_has_its_distribution(mean, shape):
    """Chi-square against the probabilities read from the generating function; false alarm 1e-6."""
    generator = np.random.default_rng(0)
    drawn = np.array([private_selection.number_of_trials(mean, shape, generator) for _ in range(4000)])
    if mean == 1.0:
        assert (drawn == 1).all()
        return
    turns = np.exp(2j * np.pi * np.arange(512) / 512)  # Fourier inversion of E s^K
    probabilities = np.fft.fft(generating_function(mean, shape, turns)[0]).real / 512
    values = np.arange(13)
    observed = np.append([np.sum(drawn == k) for k in values], np.sum(drawn > 12))
    expected = 4000 * np.append(probabilities[:13], 1 - probabilities[:13].sum())
    assert (probabilities[:512] @ np.arange(512)) == pytest.approx(mean, rel=1e-6)
    used = expected > 1
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    assert statistic < stats.chi2(used.sum() - 1).ppf(1 - 1e-6)
    assert (observed[~used] < 20).all() and (math.isinf(shape) or observed[0] == 0)


SIZES = dict(mean_trials=5.0, shape=math.inf, score_share=0.1, declared_size=100.0, num_steps=20)


CASES = [
    (0.5, "add_or_remove_one", math.inf),
    (8.0, "replace_one", math.inf),
    (2.0, "zero_out", math.inf),
    (1.0, "replace_one", 10.0),  # which is two changes under add_or_remove_one, so both are tried
]


@pytest.mark.parametrize(("epsilon", "relation", "batch"), CASES)
def test_the_noise_of_a_trial_spends_the_budget_of_the_search(epsilon, relation, batch, monkeypatch):
    monkeypatch.setattr(private_selection, "ORDERS", tuple(map(float, range(2, 128))))  # whole ones are quick
    plan = search_plan.__wrapped__(epsilon, 1e-5, relation, expected_batch_size=batch, **SIZES)
    if relation == "replace_one" and batch == 10.0:  # a removal and an addition
        assert plan.relation == "add_or_remove_one"
        assert (2 * plan.epsilon, (1 + math.exp(plan.epsilon)) * plan.delta) == pytest.approx((epsilon, 1e-5))
    else:
        assert (plan.relation, plan.epsilon, plan.delta) == (relation, epsilon, 1e-5)
    spent = search_epsilon(plan.sgd, plan.score_multiplier, plan.delta, mean_trials=5.0, shape=math.inf)
    assert 0.985 * plan.epsilon < spent <= plan.epsilon
    assert plan.sgd.sensitivity == (2.0 if relation == "replace_one" and batch > 10 else 1.0)
    # the mutant: every trial trained as if it were the only one
    alone = plan.sgd.noise_multiplier / 1.15
    cheap = dataclasses.replace(plan.sgd, noise_std=alone * plan.sgd.sensitivity)
    assert search_epsilon(cheap, plan.score_multiplier, plan.delta, mean_trials=5.0, shape=math.inf) > plan.epsilon
    if batch > 10:
        assert alone > math.sqrt(20) * accounting.noise_multiplier(epsilon, 1e-5)


# The score


def test_the_loss_of_an_image_depends_on_that_image_alone():
    """To the last bit, wherever it stands: removing one example moves no other example's improvement."""
    batch = images(40)
    losses = layer_choice.denoising_losses(base_model(), batch, 3)
    for kept in (torch.arange(1, 40), torch.arange(39), torch.arange(40).flip(0), torch.tensor([7])):
        np.testing.assert_array_equal(layer_choice.denoising_losses(base_model(), batch[kept], 3), losses[kept.numpy()])
    assert len(layer_choice.denoising_losses(base_model(), batch[:0], 3)) == 0


@pytest.mark.parametrize("changes", [{}, {"train_bias": True}, {"mode": "shared"}])
def test_improvements_are_those_of_the_trained_model(changes):
    config = DPLoraConfig(r=2, num_steps=3, learning_rate=0.05, **changes)
    budget = dict(epsilon=math.inf, num_private_declared=6, class_names=("a", "b", "c"), seed=0)
    trained, _ = dp_lora.train_dp_lora(images(), LABELS, base_model(), config, **budget)
    base_losses = layer_choice.denoising_losses(base_model(), images(), 4)
    gains = layer_choice.improvements(trained, base_losses, images(), LABELS, 4)
    for i in range(6):
        merged, own = trained.merged(int(LABELS[i])), LABELS[i : i + 1] if trained.adapter is None else None
        alone = layer_choice.denoising_losses(merged, images()[i : i + 1], 4, own)[0]
        assert gains[i] == pytest.approx(base_losses[i] - alone, abs=1e-5)
    assert gains.mean() > 0


def test_the_noise_free_score_moves_by_at_most_the_clip():
    plan = search_plan(math.inf, 1e-5, "add_or_remove_one", expected_batch_size=math.inf, **SIZES)
    config = LayerSearchConfig(score_clip=0.25)
    gains = np.array([0.1, -0.05, 3.0, -9.0, math.nan, math.inf])
    whole = layer_choice.noisy_score(gains, config, plan, seed=None)
    moved = [whole - layer_choice.noisy_score(np.delete(gains, i), config, plan, seed=None) for i in range(6)]
    assert moved == pytest.approx([0.1, -0.05, 0.25, -0.25, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("seeded", [True, False])
def test_the_noise_of_the_score_is_as_planned(relation, seeded):
    """Two-sided chi-square test on 300 scores; false alarm 1e-6."""
    plan = search_plan(2.0, 1e-5, relation, expected_batch_size=math.inf, **SIZES)
    gains = np.full(50, 0.01)
    config = LayerSearchConfig(score_clip=0.1)
    scores = [layer_choice.noisy_score(gains, config, plan, seed=s if seeded else None) for s in range(300)]
    std = plan.score_multiplier * 0.1 * (2.0 if relation == "replace_one" else 1.0)
    low, high = stats.chi2(300).ppf([5e-7, 1 - 5e-7])
    assert low < np.square((np.array(scores) - 0.5) / std).sum() < high
    spent = search_epsilon(None, plan.score_multiplier, 1e-5, mean_trials=5.0, shape=math.inf)
    assert spent < 0.5 * 2.0


# The search


def record_trials(monkeypatch, scores):
    """As many trials as there are scripted scores; returns what they trained."""
    made = []
    train = dp_lora.train_dp_lora

    def recorded(*arguments, **keywords):
        trained, statement = train(*arguments, **keywords)
        made.append((trained, keywords))
        return trained, statement

    monkeypatch.setattr(private_selection, "number_of_trials", lambda *_: len(scores))
    monkeypatch.setattr(layer_choice, "noisy_score", lambda *_, **__: scores[len(made) - 1])
    monkeypatch.setattr(dp_lora, "train_dp_lora", recorded)
    return made


def test_the_best_trial_is_released_and_nothing_of_the_others(monkeypatch, capfd):
    made = record_trials(monkeypatch, [1.0, 3.0, 2.0, 3.0])
    result, statement = search(seed=4)
    assert len(made) == 4 and result.winner is made[1][0] and result.score == 3.0
    expected = layer_choice.target_modules(result.subset, base_model())
    assert result.winner.config.target_modules == expected
    assert result.winner.plan == result.plan.sgd
    assert statement.noise_std == pytest.approx(result.winner.plan.noise_std * CONFIG.clip_norm)
    # neither object nor output tells how many there were
    kept = [value for value in vars(result).values() if isinstance(value, (int, float, list, tuple))]
    assert 4 not in kept and not any(isinstance(value, list) for value in kept)
    assert capfd.readouterr() == ("", "")


def test_trials_are_fresh_and_take_every_candidate(monkeypatch):
    made = record_trials(monkeypatch, [0.0] * 5)
    search(seed=1)
    assert {one.config.target_modules for one, _ in made} == {
        layer_choice.target_modules(name, base_model()) for name in CONFIG.candidates
    }
    assert len({keywords["seed"] for _, keywords in made}) == 5
    weights = [torch.cat([f.flatten() for f in one.adapter.parameters()]).sum().item() for one, _ in made]
    assert len(set(weights)) == 5
    made.clear()
    search(seed=None)
    assert all(keywords["seed"] is None for _, keywords in made)


def test_no_trial_releases_the_base_model(monkeypatch):
    monkeypatch.setattr(private_selection, "number_of_trials", lambda *_: 0)
    result, statement = search(dataclasses.replace(CONFIG, shape=math.inf))
    assert (result.subset, result.score, result.trained_parameters, result.num_releases) == (None, None, 0, 0)
    samples, labels = result.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)
    again = diffusion.sample(base_model(), None, 6, generator=torch.Generator().manual_seed(0), num_steps=2)
    assert torch.equal(samples, again) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert statement.epsilon == 1.0 and statement.charged


def test_seeded_searches_repeat_and_unseeded_do_not():
    def flat(seed):
        result, _ = search(seed=seed)
        return torch.cat([f.flatten() for f in result.winner.adapter.parameters()])

    assert torch.equal(flat(1), flat(1))
    one, two = flat(None), flat(None)
    assert one.shape != two.shape or not torch.equal(one, two)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_certificate_has_one_charge_for_the_whole_search(relation):
    for seed, stamp in ((None, False), (0, True)):
        result, statement = search(seed=seed, neighboring_relation=relation, epsilon=2.0)
        assert (statement.epsilon, statement.delta, statement.method) == (2.0, 1e-5, "dp_layer_search")
        assert statement.demonstration is stamp and statement.private is not stamp and statement.charged
        classes, declared, entry = statement.ledger
        assert classes.quantity == "class names" and declared.kind == "declared_public"
        assert (entry.kind, entry.epsilon, entry.delta) == ("other", 2.0, 1e-5)
        assert "2 subsets" in entry.description and "geometric with mean 2" in entry.description
        assert statement.sensitivity == CONFIG.clip_norm * (2.0 if relation == "replace_one" else 1.0)
        assert statement.num_private == (None if relation == "add_or_remove_one" else 6)
        assert type(statement).from_json(statement.to_json()) == statement
        assert result.num_releases == CONFIG.num_steps + 1
        assert result.trained_parameters == 3 * result.noise_dimension == result.winner.adapter.num_parameters


def test_a_search_without_noise_learns_and_is_not_private():
    config = dataclasses.replace(CONFIG, num_steps=10, r=4, learning_rate=1e-2)
    result, statement = search(config, epsilon=math.inf)
    assert not statement.private and statement.sentence.startswith("NOT PRIVATE")
    assert result.num_releases == 0 and result.score > 0
    gains = layer_choice.denoising_losses(base_model(), images(), 8)
    exact = np.clip(layer_choice.improvements(result.winner, gains, images(), LABELS, 8), -0.1, 0.1).sum()
    assert result.score == pytest.approx(exact, abs=1e-5)
    samples, labels = result.sample(6, generator=torch.Generator().manual_seed(0), num_steps=2)
    assert samples.shape == (6, 1, 16, 16) and torch.isfinite(samples).all() and len(labels) == 6


def test_unlabelled_and_empty_sets_are_served():
    result, _ = search(labels=None, class_names=("all",))
    assert result.winner.adapter.names == ("all",)
    result, _ = search(batch=images()[:0], labels=LABELS[:0])
    assert math.isfinite(result.score)


def test_the_free_choice_improves_on_public_sets():
    public = [ImageSet(images(6, seed), LABELS, ("a", "b", "c")) for seed in (1, 2)]
    config = dataclasses.replace(CONFIG, num_steps=10, r=4, learning_rate=1e-2)
    scores = layer_choice.choose_on_public(public, base_model(), config, epsilon=math.inf, num_private_declared=6)
    assert set(scores) == {"attention", "final"} and all(0 < value <= config.score_clip for value in scores.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"delta": 1.0}, "delta < 1"),
        ({"neighboring_relation": "swap"}, "zero_out"),
        ({"num_private_declared": 0}, "num_private_declared"),
        ({"class_names": ("a", "a", "b")}, "different"),
        ({"class_names": ("a", "b")}, "must lie in 0 .. 1"),
        ({"labels": None}, "no private_labels"),
        ({"batch": torch.zeros(6, 3, 16, 16)}, r"shape \(N, 1, 16, 16\)"),
        ({"batch": torch.full((6, 1, 16, 16), math.nan)}, "finite floats"),
        ({"config": dataclasses.replace(CONFIG, candidates=("attention", r"no_such_layer"))}, "no_such_layer"),
    ],
)
def test_bad_requests_are_refused_before_any_training(changes, message, monkeypatch):
    monkeypatch.setattr(dp_lora, "train_dp_lora", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(InputError, match=message):
        search(**changes)


@pytest.mark.parametrize(
    "wrong",
    [
        {"candidates": ()},
        {"candidates": ("all", "all")},
        {"mean_trials": 0.5},
        {"mean_trials": math.inf},
        {"shape": -0.5},
        {"score_share": 1.0},
        {"score_clip": 0.0},
        {"score_draws": 0},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(InputError):
        dataclasses.replace(CONFIG, **wrong)


def test_halves_need_two_blocks_and_cover_all_layers():
    with pytest.raises(InputError, match="two or more"):
        layer_choice.target_modules("first_half", base_model(1))
    adapted = {
        name: set(dp_lora.lora_model(base_model(), CONFIG.trial(layer_choice.target_modules(name, base_model())))
                  .geometry.names)
        for name in layer_choice.SUBSETS
    }  # fmt: skip
    assert adapted["first_half"] | adapted["second_half"] == adapted["all"]
    assert not adapted["first_half"] & adapted["second_half"]
    assert adapted["attention"] | adapted["feed_forward"] | adapted["modulation"] == adapted["all"]
    assert adapted["final"] == {"proj_out_1", "proj_out_2"}
