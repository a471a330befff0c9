"""Two steps: what each may move, what both cost, what their noise is, and that they measure the same mean."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import dp_accounting
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hyperdp_lib import accounting, mechanism
from hyperdp_lib.auditing import bounds, checks
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.baselines import controls
from hyperdp_lib.cells import CellHyperNetwork
from hyperdp_lib.certificate import write_certificate
from hyperdp_lib.cli import main
from hyperdp_lib.data import ImageSet, InputError, save_npz
from hyperdp_lib.embedding import embed
from hyperdp_lib.measure import measure
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR, GaussianSum
from hyperdp_lib.planning import COUNT as COUNTED
from hyperdp_lib.planning import COUNT_SHARE
from hyperdp_lib.pretrained import load_pretrained
from hyperdp_lib.prior import Prior
from hyperdp_lib.refinement import RefinementConfig
from hyperdp_lib.release_folder import load_release, save_release
from hyperdp_lib.releasing import refine_release
from hyperdp_lib.two_steps import FIRST, SECOND, Centring, Size, TwoStepsConfig, pooled_count, two_steps
from hyperdp_lib.verification import verify

K = 15  # coordinates of the tiny encoder, without the count
COUNT = 0.5


@pytest.fixture(scope="module")
def images():
    return torch.rand(300, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture(scope="module")
def network(plain, images):
    """The tiny network with a prior of its own."""
    tasks = torch.rand(60, 4, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prior = Prior.fit(plain.encoder, tasks)
    plain.priors = {f"{K}.{part}": value.float() for part, value in vars(prior).items()}
    yield plain
    plain.priors = {}


def centring(radius=0.5, rows=2, seed=0):
    centres = np.random.default_rng(seed).normal(size=(rows, K))
    return Centring(0.6 * centres / np.linalg.norm(centres, axis=1, keepdims=True), radius, COUNT)


def codes(count, seed=0):
    """Vectors like the encoder's: the count coordinate, and a direction."""
    directions = np.random.default_rng(seed).normal(size=(count, K))
    directions *= math.sqrt(1 - COUNT**2) / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.column_stack([np.full(count, COUNT), directions]).astype(np.float32)


def exact(centre, batches, relation="add_or_remove_one"):
    config = GaussianSum(1 + K, 1.0, len(centre.centres), centre.clip_norm, relation)
    return mechanism._exact_sum([(centre.offsets(*batch), batch[1]) for batch in batches], config), config


def stepped(images, rows, network, *, size, seed=None, **asked):
    """Both steps: what they stand for, and the configuration of each."""
    released, (noisy_sum, noise_std) = measure(
        images, rows, two_steps(network, size=Size.about(size), **asked), seed=seed
    )
    first, second = (one.config for one in released)
    assert [one.description for one in released] == [FIRST, SECOND] and noise_std == second.noise_std
    return SimpleNamespace(noisy_sum=noisy_sum, first=first, second=second)


# ---- what one image may move -------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.05, 2.0))
def test_an_offset_is_never_longer_than_the_clip_norm_and_its_count_is_a_constant(seed, radius):
    centre = centring(radius, seed=seed)
    rows = np.random.default_rng(seed).integers(0, 2, 40)
    offsets = centre.offsets(codes(40, seed), rows)
    assert offsets.shape == (40, 1 + K)
    assert np.linalg.norm(offsets, axis=1).max() <= centre.clip_norm * (1 + 1e-12)
    assert np.ptp(offsets[:, 0]) == 0 and offsets[0, 0] == COUNT * centre.clip_norm
    assert centre.clip_norm == pytest.approx(math.hypot(radius, COUNT * centre.clip_norm))


@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
def test_neighbours_move_the_second_sum_by_no_more_than_its_sensitivity(relation):
    """The centre is as it was released: it does not move with the data."""
    centre, most = centring(0.3), 0
    others, rows = codes(30), np.arange(30) % 2
    whole, config = exact(centre, [(others, rows)], relation)
    for seed in range(40):
        mine = codes(1, seed + 100) * (10.0 ** (seed % 3))  # far outside the unit ball, too
        for row in (0, 1):
            kept = (others[:-1], rows[:-1]) if relation == "replace_one" else (others, rows)
            changed = np.concatenate([kept[0], mine]), np.append(kept[1], row)
            moved = exact(centre, [changed], relation)[0] - whole
            most = max(most, math.isqrt(int((moved**2).sum())))
    assert 0.6 * config.grid_units < most <= config.grid_sensitivity


def test_an_image_adds_the_same_bits_in_any_place_and_company():
    centre = centring()
    mine, others, rows = codes(1, 7), codes(200, 8), np.arange(201) % 2
    for place in (0, 1, 63, 64, 200):
        for size in (1, 17, 201):
            batch = np.insert(others, place, mine[0], axis=0)
            with_it = exact(centre, [(batch[i : i + size], rows[i : i + size] * 0) for i in range(0, 201, size)])[0]
            alone = exact(centre, [(mine, np.zeros(1, np.int64))])[0]
            without = exact(centre, [(others, rows[:200] * 0)])[0]
            assert np.array_equal(with_it - without, alone)


def test_a_broken_embedding_adds_nothing():
    centre = centring()
    bad = codes(3)
    bad[1, 4], bad[2, 0] = np.nan, np.inf
    found, _ = exact(centre, [(bad[1:2], np.zeros(1, np.int64))])
    assert not found.any()


# ---- what both cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
@pytest.mark.parametrize("rows", [None, np.arange(300) % 30])
def test_both_steps_cost_what_one_would_by_an_independent_accountant(network, images, epsilon, delta, rows):
    whole = accounting.noise_multiplier(epsilon, delta)
    classes = 1 if rows is None else 30
    seen = stepped(images, rows, network, noise_multiplier=whole, num_rows=classes, size=300, seed=0)
    first, second = seen.first.noise_multiplier, seen.second.noise_multiplier
    assert epsilon * (1 - 1e-6) < accounting.epsilon((first, second), delta) <= epsilon
    theirs = dp_accounting.get_epsilon_gaussian((first**-2 + second**-2) ** -0.5, delta)
    assert theirs == pytest.approx(epsilon, rel=1e-4) and theirs <= epsilon * (1 + 1e-9)
    accountant = dp_accounting.pld.PLDAccountant()
    for multiplier in (first, second):
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier))
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=2e-3)
    own = seen.first.num_rows == classes
    assert (first / second) ** 2 == pytest.approx(4.0 if own else 9.0)  # a fifth, or a tenth, of mu squared


@pytest.mark.parametrize("public_size", [300, None])
@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_release_is_certified_for_every_step_and_verifies(
    network, base_model, images, tmp_path, relation, labelled, public_size
):
    classes = {"private_labels": torch.arange(300) % 2, "class_names": ("a", "b")} if labelled else {}
    asked = {"method": "two_steps", "public_size": public_size, "neighboring_relation": relation}
    made = release(images, network, epsilon=2.0, **asked, **classes)
    counted = [COUNTED] if public_size is None and relation == "add_or_remove_one" else []
    entries = [entry for entry in made.certificate.ledger if entry.private]
    assert [entry.description for entry in entries] == [*counted, FIRST, SECOND]
    assert made.certificate.epsilon == 2.0 and made.certificate.private
    assert made.certificate.mu == pytest.approx(math.hypot(*(entry.mu for entry in entries)))
    assert made.certificate.noise_multiplier == entries[-1].noise_multiplier
    assert made.certificate.noise_std == pytest.approx(
        entries[-1].noise_multiplier * SENSITIVITY_FACTOR[relation] * made.certificate.clip_norm
    )
    assert ("300" in made.certificate.num_private_treatment) == (public_size is not None)
    if counted:  # what is secret is not told in any field
        assert made.certificate.num_private is None and "300" not in made.certificate.num_private_treatment
    folder = save_release(tmp_path / "out", made, base_model, num_samples=0)
    assert verify(folder) == []
    assert np.array_equal(load_release(folder, base_model).noisy_sum, made.noisy_sum)
    # whoever drops a step from the ledger is found out
    for dropped in (*counted, FIRST, SECOND):
        kept = tuple(entry for entry in made.certificate.ledger if entry.description != dropped)
        write_certificate(dataclasses.replace(made.certificate, ledger=kept), folder)  # its checksum is right
        assert verify(folder)


def test_what_was_spent_before_is_added_and_a_wrong_ledger_is_refused_first(network, images, monkeypatch):
    from hyperdp_lib.ledger import gaussian_charge

    before = gaussian_charge("earlier", 5.0, 1e-5)
    asked = {"method": "two_steps", "public_size": 300, "ledger": [before]}
    made = release(images, network, noise_multiplier=4.0, **asked)
    assert made.certificate.mu == pytest.approx(math.hypot(1 / 5, 1 / 4))
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *a, **k: pytest.fail("something was released"))
    with pytest.raises(InputError, match="same relation"):
        release(images, network, epsilon=1.0, neighboring_relation="replace_one", **asked)


# ---- the noise ---------------------------------------------------------------------------------------------


def test_the_noise_on_the_mean_is_the_second_steps_no_less_and_no_more(network, images):
    """Secret noise, 400 releases: the offsets' noise has the stated size. False alarm: one in a million.

    The centre moves from run to run; with a ball that cuts nothing the mean does not move with it.
    """
    clean = embed(network.encoder, images)[:, 1:].double().mean(0).numpy()
    errors = []
    keywords = dict(noise_multiplier=1.0, num_rows=1, size=300, config=TwoStepsConfig(reach=4.0))
    for _ in range(400):
        seen = stepped(images, None, network, **keywords)
        count = seen.noisy_sum[0, 0] / COUNT
        errors.append((seen.noisy_sum[0, 1:] / count - clean) * count / seen.second.noise_std)
        assert seen.second.noise_std == pytest.approx(math.sqrt(1 / 0.8) * seen.second.clip_norm)
    errors = np.array(errors)
    # what a wrong count leaves, (n / count - 1) (mean - centre), is small beside the noise: a tenth or so
    total = float(np.square(errors).sum())
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], errors.size)
    assert low < total < high * 1.05


@pytest.mark.parametrize("seed", [0, 5, None])
def test_noise_of_the_two_steps_is_not_the_same_with_a_seed_nor_without(network, images, seed, monkeypatch):
    seeds, intact = [], mechanism.noisy_sum
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *a, seed: seeds.append(seed) or intact(*a, seed=seed))
    stepped(images, None, network, noise_multiplier=1.0, num_rows=1, size=300, seed=seed)
    if seed is None:
        assert seeds == [None, None]
    else:
        config = GaussianSum(4000, 1.0)
        a, b = (intact([], config, seed=one)[0] for one in seeds)
        assert seeds[0] == seed and abs(np.corrcoef(a, b)[0, 1]) < 0.09  # 5.7 standard errors


def test_secret_noise_is_fresh(network, images):
    keywords = dict(noise_multiplier=1.0, num_rows=1, size=300)
    assert not np.array_equal(
        stepped(images, None, network, **keywords).noisy_sum, stepped(images, None, network, **keywords).noisy_sum
    )
    same = [stepped(images, None, network, **keywords, seed=3).noisy_sum for _ in range(2)]
    assert np.array_equal(*same)


@pytest.mark.parametrize("public_size", [77, None])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
def test_the_centre_and_its_ball_follow_from_the_first_noisy_sum_and_what_is_public(
    network, images, relation, labelled, public_size, monkeypatch
):
    """All calls of the mechanism seen: the second's ball is computed again from earlier results, with no image."""
    classes = {"private_labels": torch.arange(300) % 2, "class_names": ("a", "b")} if labelled else {}
    centrings, intact = [], Centring.offsets
    monkeypatch.setattr(
        Centring, "offsets", lambda self, codes, rows: centrings.append(self) or intact(self, codes, rows)
    )
    with checks.spied() as calls:
        made = release(
            images, network, epsilon=4.0, method="two_steps", public_size=public_size,
            neighboring_relation=relation, **classes,
        )  # fmt: skip
    *counts, (first, _, seen), (second, _, again) = calls
    if public_size is not None:
        size = Size.about(public_size)
    elif relation == "add_or_remove_one":  # bought
        ((counting, _, count),) = counts
        error = accounting.noise_multiplier(4.0, 1e-5) / math.sqrt(COUNT_SHARE)
        assert counting.noise_std == pytest.approx(error)
        size = Size(max(float(count[0, 0]), counting.noise_std, 1.0), counting.noise_std)
    else:  # public by the relation
        size = Size(300.0, 0.0)
    assert len(counts) == (public_size is None and relation == "add_or_remove_one")
    prior = Prior.shipped(network)
    centre = Centring.of(seen, first.noise_std, prior, COUNT, num_rows=second.num_rows, size=size)
    assert np.array_equal(centrings[0].centres, centre.centres) and second.clip_norm == centre.clip_norm
    assert np.array_equal(made.noisy_sum, centre.combine(again, second, size))
    assert {config.neighboring_relation for config, _, _ in calls} == {relation}


# ---- an attack on both together ----------------------------------------------------------------------------


class Vectors(torch.nn.Module):
    """Images that are vectors already (N, 1, 1, 3): what is attacked is the two steps, not an encoder."""

    config = SimpleNamespace(dimension=3, count_coordinate=0.25)

    def __init__(self):
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images.flatten(1)


def attacked(multiplier, first_factor=1.0, second_factor=1.0, runs=24_000):
    """Lower bound on mu from re-running both steps on neighbours, each row of a release a run of its own.

    The attacker knows all but one image, sees the result of both calls of the mechanism, and has the optimal score: the
    likelihood ratio of both steps. The factors make the noise of a step smaller than it is charged for.
    """
    prior = {"mean": torch.zeros(2), "between": torch.eye(2) / 10, "within": torch.eye(2) / 10}
    network = SimpleNamespace(encoder=Vectors(), priors={f"2.{part}": value for part, value in prior.items()})
    constant = Vectors.config.count_coordinate
    direction = math.sqrt(1 - constant**2)
    others = np.array([[constant, direction, 0.0]] * 20)
    mine = np.array([[constant, -0.6 * direction, -0.8 * direction]])  # far away: its offset is cut
    centrings, intact_of = [], Centring.of

    def of(*args, **known):
        centrings.append(intact_of(*args, **known))
        return centrings[-1]

    def scores(data):
        results, intact = [], mechanism.noisy_sum

        def noisy_sum(batches, config, *, seed=None):
            factor = second_factor if results else first_factor
            less = dataclasses.replace(config, noise_multiplier=factor * config.noise_multiplier)
            results.append((intact(batches, less, seed=seed), config.noise_std))
            return results[-1][0]

        images = torch.from_numpy(np.tile(data, (runs, 1))).float().view(-1, 1, 1, 3)
        rows = np.repeat(np.arange(runs), len(data))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mechanism, "noisy_sum", noisy_sum)
            patch.setattr(Centring, "of", of)
            stepped(
                images, rows, network, noise_multiplier=multiplier, num_rows=runs, size=20 * runs,
                config=TwoStepsConfig(own_centre=0.0),
            )  # fmt: skip
        (seen, first_std), (again, second_std) = results
        centre = centrings[-1]
        known, known_rows = np.tile(others, (runs, 1)), np.repeat(np.arange(runs), len(others))
        expected = centre.offsets(known, known_rows).reshape(runs, -1, 3).sum(1)
        moved = centre.offsets(np.tile(mine, (runs, 1)), np.arange(runs))
        ratio = (seen - others.sum(0)) @ mine[0] / first_std**2 - 0.5 / first_std**2
        ratio += ((again - expected) * moved).sum(1) / second_std**2
        return ratio - 0.5 * np.square(moved).sum(1) / second_std**2

    without, having = scores(others), scores(np.concatenate([others, mine]))
    some = runs // 5
    threshold = bounds.best_threshold(without[:some], having[:some])
    return bounds.mu_lower_bound(bounds.count(without[some:], having[some:], threshold), 1 - 1e-6)


def test_re_running_both_steps_does_not_refute_the_certified_mu_and_comes_near_it():
    """Nothing is assumed of the noise. False alarm: one in a million."""
    assert 0.7 / 2.0 < attacked(2.0) <= 1 / 2.0


@pytest.mark.parametrize(("first_factor", "second_factor"), [(0.2**0.5, 0.8**0.5), (1.0, 0.5)])
def test_a_budget_charged_once_for_both_steps_is_refuted_and_so_is_half_of_the_noise(first_factor, second_factor):
    assert attacked(2.0, first_factor, second_factor) > 1 / 2.0


# ---- what is measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_without_noise_and_with_nothing_cut_the_sum_is_the_plain_one(network, images, labelled):
    rows = np.arange(300) % 3 if labelled else None
    classes = 3 if labelled else 1
    keywords = dict(noise_multiplier=0.0, num_rows=classes, size=77, config=TwoStepsConfig(reach=4.0))
    seen = stepped(images, rows, network, **keywords, seed=0)
    labels = None if rows is None else torch.from_numpy(rows)
    plain, _ = controls.noisy_class_sums(images, labels, network.encoder, epsilon=math.inf, num_classes=classes, seed=0)
    assert np.allclose(seen.noisy_sum, plain, atol=2e-3)


def test_small_classes_share_one_centre_and_large_ones_have_their_own(network, images):
    rows = np.arange(300) % 3
    for multiplier, own in ((20.0, False), (1.0, True)):
        seen = stepped(images, rows, network, noise_multiplier=multiplier, num_rows=3, size=300, seed=0)
        assert seen.first.num_rows == (3 if own else 1) and seen.second.num_rows == 3
        assert seen.first.clip_norm == 1.0


@given(st.floats(1, 1e5), st.floats(-1e3, 1e5), st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_pooled_count_lies_between_its_sources_and_is_at_least_one(known, noisy, error, std):
    count = pooled_count(Size(known, error), Size(noisy, std))
    assert max(1.0, min(known, noisy)) - 1e-6 <= count <= max(known, noisy, 1.0) + 1e-6


def test_of_two_counts_the_one_with_less_error_counts_for_more():
    assert pooled_count(Size(100.0, 0.0), Size(500.0, 10.0)) == 100.0  # known for certain
    assert pooled_count(Size(100.0, 10.0), Size(130.0, 20.0)) == pytest.approx(100 + 30 / 5)
    assert Size.about(300.0) == Size(300.0, 30.0) == Size(300.0, 30.0).of_one(1)
    # classes may be of any size, even where the number of all images is known for certain
    assert Size(300.0, 0.0).of_one(3) == Size(100.0, 50.0)
    assert Size(300.0, 600.0).of_one(3) == Size(100.0, 200.0)


def test_the_mean_of_one_kind_of_image_is_met_better_than_by_one_sum():
    """On 20 held-out public shapes, with noise from seeds: the root mean square error falls by a quarter at least."""
    from hyperdp_lib.public.glyphs import GlyphTasks

    network = load_pretrained("glyphs-nested")[1].using(64)
    tasks = GlyphTasks(split="held_out", progress=False).sample_tasks(20, 128, torch.Generator().manual_seed(0))
    errors = {"one": 0.0, "two": 0.0}
    constant = network.encoder.config.count_coordinate
    for seed, task in enumerate(tasks):
        clean = embed(network.encoder, task)[:, 1:].double().mean(0).numpy()
        once, _ = controls.noisy_class_sums(task, None, network.encoder, epsilon=1.0, seed=seed)
        twice = stepped(task, None, network, noise_multiplier=3.731, num_rows=1, size=128, seed=seed).noisy_sum
        for name, sums in (("one", once), ("two", twice)):
            errors[name] += float(np.square(sums[0, 1:] / sums[0, 0] * constant - clean).sum())
    assert errors["two"] < (0.75**2) * errors["one"]


# ---- refusals and the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("share", 0.0), ("share", 1.0), ("share_together", 1.0), ("reach", 0.0), ("own_centre", -1.0)]
)
def test_a_configuration_out_of_range_is_refused(name, value):
    with pytest.raises(InputError, match="two steps need"):
        TwoStepsConfig(**{name: value})


def test_what_cannot_be_done_in_two_steps_is_refused_before_anything_is_spent(network, images, monkeypatch):
    monkeypatch.setattr(mechanism, "noisy_sum", lambda *a, **k: pytest.fail("something was released"))
    keywords = dict(noise_multiplier=1.0, num_rows=1)
    with pytest.raises(InputError, match="public_size"):
        release(images, network, epsilon=1.0, method="two_steps", public_size=0)
    in_cells = CellHyperNetwork(network, torch.zeros(1, K))
    with pytest.raises(InputError, match="cells"):
        stepped(images, None, in_cells, size=300, **keywords)
    with pytest.raises(InputError, match="two steps"):
        release(images, in_cells, epsilon=1.0, method="two_steps")
    priors, network.priors = network.priors, {}
    try:
        for public_size in (300, None):
            with pytest.raises(InputError, match="prior"):
                release(images, network, epsilon=1.0, method="two_steps", public_size=public_size)
        with pytest.raises(InputError, match="prior"):
            stepped(images, None, network, size=300, **keywords)
    finally:
        network.priors = priors


@pytest.mark.parametrize("public_size", ["128", None])
def test_the_command_takes_two_steps_with_a_public_size_or_a_noisy_count(tmp_path: Path, capsys, images, public_size):
    source, out = tmp_path / "images.npz", tmp_path / "two"
    save_npz(source, ImageSet(images[:128]))
    command = ["release", str(source), "--epsilon", "1", "--weights", "glyphs", "--method", "two-steps"]
    public = ["--public-size", public_size] if public_size else []
    assert main([*command, *public, "--no-refine", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "epsilon = 1," in told.out and "two sums" in told.err
    ledger = json.loads((out / "certificate.json").read_text())["ledger"]
    steps = [entry["description"] for entry in ledger if entry["kind"] == "gaussian"]
    assert steps == ([FIRST, SECOND] if public_size else [COUNTED, FIRST, SECOND])
    assert (COUNTED in told.err) == (public_size is None)
    assert verify(out) == []
    assert main(["verify", str(out)]) == 0
    made, short = load_release(out), RefinementConfig(num_rounds=1, images_per_class=4, sampling_steps=1)
    network = load_pretrained("glyphs-nested")[1]
    better = refine_release(made, network, short, generator=torch.Generator().manual_seed(0))
    save_release(tmp_path / "better", better, num_samples=0)
    assert verify(tmp_path / "better") == [] and made.certificate.post_processing == ()
