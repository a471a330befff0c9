"""The auditor: right on mechanisms of known privacy, silent on ours, and loud on every broken one."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from hyperdp_lib import accounting, auditing, cli
from hyperdp_lib.auditing import attacks, bounds, canaries, checks, inversion, mutants
from hyperdp_lib.auditing.bounds import Counts
from hyperdp_lib.auditing.pipeline import INTACT
from hyperdp_lib.baselines import dp_sgd
from hyperdp_lib.mechanism import GaussianSum

# ---- bounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hits, trials", [(0, 50), (50, 50), (7, 50), (1, 10_000), (4321, 10_000)])
def test_clopper_pearson_is_scipys(hits, trials):
    low, high = bounds.clopper_pearson(hits, trials, 0.005)
    known = stats.binomtest(hits, trials).proportion_ci(0.99, method="exact")
    assert low == pytest.approx(known.low, abs=1e-12) and high == pytest.approx(known.high, abs=1e-12)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_mu_is_bounded_from_below_as_often_as_promised_and_tightly(mu):
    """Gaussian shifts of known mu, 2,000 audits: at most 1 % exceed mu (six standard errors allowed: 2.4 %)."""
    rng = np.random.default_rng(int(10 * mu))
    trials = 20_000
    false_rate, true_rate = stats.norm.sf(0.5), stats.norm.sf(0.5 - mu)
    found = np.array(
        [
            bounds.mu_lower_bound(Counts(a, trials, b, trials))
            for a, b in zip(rng.binomial(trials, false_rate, 2000), rng.binomial(trials, true_rate, 2000), strict=True)
        ]
    )
    assert (found > mu).mean() <= 0.01 + 6 * 0.0023
    error = sum(  # of each normal score, by the delta method
        math.sqrt(rate * (1 - rate) / trials) / stats.norm.pdf(stats.norm.ppf(rate)) for rate in (false_rate, true_rate)
    )
    assert np.median(found) >= mu - 1.2 * stats.norm.isf(0.005) * error


def test_epsilon_of_randomised_response_is_found():
    """In with probability e/(1+e) or 1/(1+e): exactly 1-DP, and the attack is its output."""
    rng = np.random.default_rng(0)
    high, trials = math.e / (1 + math.e), 100_000
    found = [
        bounds.epsilon_lower_bound(
            Counts(rng.binomial(trials, 1 - high), trials, rng.binomial(trials, high), trials), delta=0.0
        )
        for _ in range(1000)
    ]
    assert np.mean(np.array(found) > 1.0) <= 0.01 + 6 * 0.0031 and np.median(found) > 0.95


def test_the_bound_of_epsilon_cannot_be_tight_for_a_gaussian_and_says_less_than_mu():
    mu = 1 / accounting.noise_multiplier(1.0, 1e-5)
    runs = 200_000  # with counts exactly as expected
    counts = [
        Counts(round(runs * stats.norm.sf(t)), runs, round(runs * stats.norm.sf(t - mu)), runs)
        for t in np.linspace(0, 4, 161)
    ]
    assert max(bounds.epsilon_lower_bound(one, 1e-5) for one in counts) < 0.7
    assert max(map(bounds.mu_lower_bound, counts)) > 0.9 * mu


@pytest.mark.parametrize("mu", [0.14, 0.27, 0.92])
def test_the_threshold_is_chosen_where_runs_count_and_not_by_luck(mu):
    """Of 20 audits, thresholds from 20,000 Gaussian scores: with 200,000 counted as expected, mu is found to 80 %."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        threshold = bounds.best_threshold(rng.normal(size=20_000), mu + rng.normal(size=20_000))
        false, true = stats.norm.sf(threshold), stats.norm.sf(threshold - mu)
        counts = Counts(round(200_000 * false), 200_000, round(200_000 * true), 200_000)
        assert bounds.mu_lower_bound(counts) > 0.8 * mu


@pytest.mark.parametrize("correct, guesses", [(100, 100), (60, 100), (900, 1000)])
def test_one_run_without_delta_is_the_binomial_bound(correct, guesses):
    epsilon = bounds.one_run_epsilon(correct, guesses, 2000, 0.0)
    if epsilon == 0.0:
        assert stats.binom.sf(correct - 1, guesses, 0.5) > 0.01
    else:
        assert stats.binom.sf(correct - 1, guesses, 1 / (1 + math.exp(-epsilon))) == pytest.approx(0.01, rel=1e-2)


def test_one_run_stays_below_the_epsilon_of_randomised_response():
    rng = np.random.default_rng(1)
    right = rng.binomial(1000, math.e / (1 + math.e), size=300)
    found = np.array([bounds.one_run_epsilon(int(v), 1000, 1000, 1e-5) for v in right])
    assert (found > 1.0).mean() <= 0.01 + 6 * 0.0058 and 0.7 < np.median(found) < 1.0
    with_delta = bounds.one_run_epsilon(700, 1000, 1000, 1e-3)
    assert with_delta < bounds.one_run_epsilon(700, 1000, 1000, 1e-9)
    with pytest.raises(ValueError, match="correct <= guesses"):
        bounds.one_run_epsilon(11, 10, 100, 1e-5)


# ---- the intact mechanism ----------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_audit_stays_within_the_claim_and_comes_near_it(relation):
    made = auditing.audit(4.0, trials=20_000, neighboring_relation=relation, confidence=1 - 1e-6)  # its false alarms
    assert made.passed and 0.8 * made.mu < made.mu_lower_bound <= made.mu
    assert 0 < made.epsilon_lower_bound < 4.0


def test_every_check_passes_on_the_intact_pipeline():
    found = auditing.inspect()
    assert [name for name, finding in found.items() if finding.broken] == []
    assert set(found) == set(checks.CHECKS) and all(finding.evidence for finding in found.values())


@pytest.mark.slow
def test_the_intact_pipeline_is_never_flagged_in_a_hundred_repetitions():
    """Each statistical check has a false-alarm rate of one in a million: less than one in a thousand for all."""
    assert [finding for _ in range(100) for finding in auditing.inspect().values() if finding.broken] == []


def test_statistical_checks_are_not_blind_to_small_errors():
    """Noise 10 % too small, or half of its variance shared: both are seen, with the sizes the checks use."""

    def smaller(batches, config, *, seed=None):
        return INTACT.noisy_sum(batches, replace(config, noise_multiplier=0.9 * config.noise_multiplier), seed=seed)

    def shared(batches, config, *, seed=None):
        noisy = INTACT.noisy_sum(batches, config, seed=seed)
        return noisy + config.noise_std * np.random.default_rng(seed).normal(size=config.dimension)

    assert checks.noise_law(replace(INTACT, noisy_sum=smaller)).broken
    assert checks.noise_independence(replace(INTACT, noisy_sum=shared)).broken


def test_the_stated_multiplier_is_the_accountants():
    for epsilon in (0.5, 1.0, 16.0):
        assert checks.stated_multiplier(epsilon) == pytest.approx(accounting.noise_multiplier(epsilon, 1e-5), rel=1e-6)


# ---- mutants -------------------------------------------------------------------------------------------------

CAUGHT_BY = {
    "no clip": {"sensitivity", "distinguishing"},
    "clip after the sum": {"sensitivity"},
    "half noise": {"noise law", "distinguishing"},
    "noise reused across classes": {"noise independence"},
    "divided by the true count": {"additivity"},
    "batch statistics in the encoder": {"one image at a time"},
    "NaN passes the clip": {"poisoning"},
    "add/remove noise sold as replace-one": {"noise law", "distinguishing"},
    "replace-one noise sold as add/remove": {"noise law"},
    "classical Gaussian at large epsilon": {"calibration", "distinguishing"},
    "float accumulation": {"order"},
    "seed left fixed": {"noise independence"},
    "private mean-centring": {"sensitivity", "additivity"},
    "float noise": {"drawn by OpenDP"},
    "batch mean in the nested encoder": {"one image at a time"},
    "one noise for all steps": {"fresh noise"},
    "centre of the exact sum": {"non-interference"},
    "true count for the public": {"non-interference"},
    "true count for the noisy": {"non-interference"},
    "only the last sum charged": {"ledger"},
    "fixed batches sold as Poisson": {"Poisson batches"},
}


def test_there_is_an_expectation_for_each_mutant():
    assert set(CAUGHT_BY) == set(mutants.MUTANTS)


def test_every_check_is_meant_for_some_mutant():
    assert set(checks.CHECKS) == set.union(*CAUGHT_BY.values())


@pytest.mark.parametrize("name", CAUGHT_BY)
def test_every_mutant_is_caught(name):
    for check in CAUGHT_BY[name]:
        assert checks.CHECKS[check](mutants.MUTANTS[name]).broken, f"{check} does not see it"


def test_the_weakest_mutant_is_seen_by_the_attack_with_room_to_spare():
    """Scores of the classical multiplier at epsilon = 16, drawn in place of released: a miss is five sd away."""
    rng, stated, trials = np.random.default_rng(0), 1 / checks.stated_multiplier(16.0), 10_000
    mu = 1 / mutants.MUTANTS["classical Gaussian at large epsilon"].noise_multiplier(16.0, 1e-5)
    assert 1.1 < mu / stated < 1.15
    assert checks.distinguishing.__defaults__ == (trials,)
    margins = []
    for _ in range(200):
        without, having = rng.normal(size=(2, trials + trials // 10)) + np.array([[0.0], [mu]])
        threshold = bounds.best_threshold(without[: trials // 10], having[: trials // 10])
        counts = bounds.count(without[trials // 10 :], having[trials // 10 :], threshold)
        margins.append(bounds.mu_lower_bound(counts, 1 - checks.FALSE_ALARM / 4) - stated)
    assert np.mean(margins) > 4.75 * np.std(margins)  # Phi(-4.75): one in a million


def test_the_audit_refutes_half_the_noise():
    made = auditing.audit(1.0, trials=10_000, pipeline=mutants.MUTANTS["half noise"])
    assert not made.passed and made.mu_lower_bound > 1.5 * made.mu


def test_an_error_counts_as_broken():
    def raises(batches, config, *, seed=None):
        raise ValueError("no")

    found = auditing.inspect(replace(INTACT, noisy_sum=raises))
    assert found["sensitivity"].broken and "ValueError: no" in found["order"].evidence
    assert not found["calibration"].broken


def test_the_attack_searches_for_the_example_that_moves_the_sum_most():
    config = GaussianSum(4, 1.0)
    example, direction = checks.worst_example(INTACT, config)
    assert np.linalg.norm(INTACT.exact_sum([(example[None], None)], config)) > 1 - 1e-5
    assert np.linalg.norm(direction) == pytest.approx(1.0)
    unclipped, _ = checks.worst_example(mutants.MUTANTS["no clip"], config)
    assert np.linalg.norm(unclipped) > 1e5


# ---- DP-SGD, in one run ----------------------------------------------------------------------------------------


def test_one_run_of_dp_sgd_stays_within_its_claim_and_sees_something():
    made = canaries.audit_dp_sgd(16.0, seed=0)
    assert made.passed and made.epsilon_lower_bound > 2 and made.guesses == 200
    strict = canaries.audit_dp_sgd(1.0, seed=0)
    assert strict.passed and strict.epsilon_lower_bound < made.epsilon_lower_bound
    assert canaries.audit_dp_sgd(4.0, num_canaries=200).passed  # coins and noise from the operating system


def test_one_run_refutes_a_tenth_of_the_noise(monkeypatch):
    original = dp_sgd.privacy_plan

    def careless(*args, **kwargs):
        plan = original(*args, **kwargs)
        return replace(plan, noise_std=plan.noise_std / 10)

    monkeypatch.setattr(canaries.dp_training.dp_sgd, "privacy_plan", careless)
    made = canaries.audit_dp_sgd(1.0, seed=0)
    assert not made.passed and made.correct > 180


# ---- attacks on what is released ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_a_thief_of_gaussian_scores_gets_what_theory_allows_and_no_more(mu):
    """Scores of known mu, another mean for each candidate: near the bounds (six standard errors) from either side."""
    rng = np.random.default_rng(0)
    coins = rng.random((4000, 20)) < 0.5
    scores = rng.normal(size=20) * 5 + mu * coins + rng.normal(size=coins.shape)
    told = attacks.judge("scores", scores, coins, 2000, mu)
    error = 6 * 1 / math.sqrt(2000 * 20)
    assert told.advantage_bound == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1)
    assert abs(told.advantage - told.advantage_bound) < error
    assert abs(told.auc - told.auc_bound) < error and abs(told.tpr_at_10 - told.tpr_at_10_bound) < 2 * error
    assert told.advantage_low < told.advantage < told.advantage_high < told.advantage + error
    assert 0.6 * mu - 0.2 < told.mu_lower_bound < mu


def test_the_interval_of_the_advantage_holds_as_often_as_it_says():
    """500 games, all guesses of a release right or wrong together: 1 % miss (six standard errors: 3.7 %)."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(500):
        together = 2.0 * (rng.random(100) < 0.7) - 1  # advantage 0.4
        _, low, high = attacks._mean_and_interval(together)
        missed += not low < 0.4 < high
    assert missed / 500 <= 0.037


def test_scores_of_a_worse_mechanism_are_refuted():
    rng = np.random.default_rng(2)
    coins = rng.random((2000, 8)) < 0.5
    told = attacks.judge("scores", 2.0 * coins + rng.normal(size=coins.shape), coins, 500, mu=1.0)
    assert told.mu_lower_bound > 1.0 and told.advantage_low > told.advantage_bound


SMALL = attacks.Game(num_candidates=12, shadows=12, trials=12, loss_draws=2, num_samples=4, sampling_steps=2)


def test_without_noise_every_member_is_found_and_with_noise_the_bound_holds(monkeypatch):
    """Seeded noise: a game this small would miss its 99 % intervals now and then."""
    original = attacks.mechanism.noisy_sum
    monkeypatch.setattr(
        attacks.mechanism, "noisy_sum", lambda batches, config, seed: original(batches, config, seed=seed or 1)
    )
    bare = attacks.membership("dp_deepsets", math.inf, game=SMALL)
    by_sum = bare["attacks"][0]
    assert by_sum["attack"] == "noisy sum" and by_sum["advantage"] > 0.9 and bare["mu"] is None
    noisy = attacks.membership("dp_deepsets", 0.1, game=SMALL)
    assert [one["attack"] for one in noisy["attacks"]] == ["noisy sum", "adapter", "samples"]
    assert noisy["passed"] and all(one["advantage_low"] <= one["advantage_bound"] for one in noisy["attacks"])
    assert "not DP" in noisy["label"] and len(noisy["closer_to_members"]) == 3
    json.dumps([bare, noisy], allow_nan=False)


@pytest.mark.parametrize("method, epsilon", [("dp_lora", 1.0), ("lora_non_private", math.inf)])
def test_rivals_are_attacked_alike(method, epsilon):
    made = attacks.membership(method, epsilon, game=replace(SMALL, shadows=4, trials=3, num_candidates=6))
    assert [one["attack"] for one in made["attacks"]] == ["adapter", "samples"] and made["passed"]


def test_inversion_finds_a_single_image_without_noise_only():
    """32 sets of one image: without noise each is recognised; at epsilon 0.01 that many would be luck (p < 1e-6)."""
    bare = inversion.invert(math.inf, sets=32, num_steps=100)
    assert bare["hits"] >= 30 and bare["rate_bound"] == 1.0
    noisy = inversion.invert(0.01, sets=32, num_steps=2)
    assert noisy["hits"] < 30 and noisy["passed"] and noisy["rate_bound"] < 0.51
    assert noisy["mismatch"] > 100 > bare["mismatch"]


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_the_documented_keys(capsys):
    assert cli.main(["audit", "--epsilon", "2", "--trials", "2000", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    documented = "epsilon delta mu mu_lower_bound epsilon_lower_bound confidence trials".split()
    assert set(documented) <= set(printed) and printed["trials"] == 2000 and printed["passed"]
    assert cli.main(["audit", "--trials", "2000"]) == 0
    assert "the claim stands" in capsys.readouterr().out
    assert cli.main(["audit", "--trials", "10"]) == 2
    assert cli.main(["audit", "--epsilon", "8", "--dp-sgd"]) == 0
    assert "1,000 canaries, one run" in capsys.readouterr().out


def test_the_command_fails_when_a_claim_is_refuted(monkeypatch, capsys):
    original = auditing.audit
    broken = mutants.MUTANTS["half noise"]
    monkeypatch.setattr(auditing, "audit", lambda epsilon, **asked: original(epsilon, pipeline=broken, **asked))
    assert cli.main(["audit", "--trials", "5000"]) == 1
    assert "THE CLAIM IS FALSE" in capsys.readouterr().out


def test_the_table_of_mutants(monkeypatch, capsys):
    monkeypatch.setattr(checks, "CHECKS", {"order": checks.order})
    half = {"half noise": mutants.MUTANTS["half noise"]}
    monkeypatch.setattr(mutants, "MUTANTS", {"float accumulation": mutants.MUTANTS["float accumulation"]})
    assert cli.main(["audit", "--mutants"]) == 0
    assert "float accumulation" in capsys.readouterr().out
    monkeypatch.setattr(mutants, "MUTANTS", half)
    assert cli.main(["audit", "--mutants", "--json"]) == 1  # the order of the sum is no test of its noise
    assert json.loads(capsys.readouterr().out) == {"intact": [], "half noise": []}


def test_the_command_attacks_what_is_released(monkeypatch, capsys):
    original = attacks.membership
    monkeypatch.setattr(attacks, "membership", lambda *args, **asked: original(*args, game=SMALL, **asked))
    assert cli.main(["audit", "--attacks", "--epsilon", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "from the samples" in printed and "the claim stands" in printed
    assert cli.main(["audit", "--attacks", "--epsilon", "0.1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "dp_deepsets"


def test_the_records_are_made_once(tmp_path, monkeypatch):
    from hyperdp_lib.auditing.__main__ import main

    monkeypatch.setattr(checks, "CHECKS", {"order": checks.order})
    monkeypatch.setattr(mutants, "MUTANTS", {"float accumulation": mutants.MUTANTS["float accumulation"]})
    asked = ["--out", str(tmp_path), "--trials", "1000", "--repetitions", "2"]
    monkeypatch.setattr(canaries, "audit_dp_sgd", lambda *args, **kwargs: one_run)
    monkeypatch.setattr(attacks, "membership", lambda method, epsilon, game: {"passed": game.trials > 0})
    monkeypatch.setattr(inversion, "invert", lambda epsilon, **asked: {"passed": True})
    one_run = canaries.CanaryAudit(1.0, 1e-5, 0.2, 0.99, 1000, 200, 120, "add_or_remove_one", math.inf)
    assert main(asked) == 0
    made = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {"release", "dp_sgd", "mutants", "intact", "inversion", "membership_dp_lora_eps1"} <= set(made)
    assert len(made["release"]["result"]) == 6 and made["intact"]["result"]["flagged"] == 0
    assert all("commit" in one["provenance"] for one in made.values())
    broken = {**made["intact"], "result": {**made["intact"]["result"], "flagged": 1}}
    (tmp_path / "intact.json").write_text(json.dumps(broken))
    assert main(asked) == 1  # read, not made again
