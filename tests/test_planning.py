"""Plans: made without an image, refused before anything is spent, and followed to the letter by a release."""

import dataclasses
import inspect
import math

import dp_accounting
import numpy as np
import pytest
import torch

import hyperdp_lib as hyperdp
from hyperdp_lib import accounting, planning, releasing
from hyperdp_lib.auditing import checks
from hyperdp_lib.auditing.pipeline import miniature
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.hypernetwork import HyperNetwork
from hyperdp_lib.measure import measure
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR
from hyperdp_lib.planning import COUNT, COUNT_SHARE, METHODS, plan
from hyperdp_lib.pretrained import Weights
from hyperdp_lib.two_steps import FIRST, SECOND

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def weights():
    return Weights(miniature()["base"], miniature()["nested"])


@pytest.fixture(scope="module")
def private():
    images = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return {False: ImageSet(images), True: ImageSet(images, torch.arange(60) % 3, CLASSES)}


def quick(weights, **asked):
    return plan(weights, **{"epsilon": 1.0, "refined": False, **asked})


# ---- what is spent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 30, 2000])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
@pytest.mark.parametrize("method", METHODS)
def test_every_sum_is_charged_and_all_together_cost_what_was_planned(
    weights, private, method, relation, labelled, size
):
    """Ledger and calls of the mechanism one to one; their composition by an independent accountant."""
    names = CLASSES if labelled else ()
    made = quick(weights, method=method, neighboring_relation=relation, class_names=names, public_size=size)
    with checks.spied() as calls:
        one = releasing.release(private[labelled], made)
    entries = [entry for entry in one.certificate.ledger if entry.private]
    multipliers = [config.noise_multiplier for config, _, _ in calls]
    assert [entry.noise_multiplier for entry in entries] == multipliers
    assert {config.neighboring_relation for config, _, _ in calls} == {relation}
    whole = math.hypot(*(1 / value for value in multipliers))
    assert dp_accounting.get_epsilon_gaussian(1 / whole, 1e-5) == pytest.approx(1.0, rel=1e-4)
    assert one.certificate.epsilon == 1.0
    bought = [entry.description == COUNT for entry in entries]
    assert bought == [made.buys_count, *[False] * (len(entries) - 1)]
    assert made.buys_count == (method != "one_sum" and size is None and relation == "add_or_remove_one")
    if made.buys_count:
        assert multipliers[0] == pytest.approx(made.noise_multiplier / math.sqrt(COUNT_SHARE))
    if method == "one_sum":
        assert len(calls) == 1
    if method == "two_steps":
        assert [entry.description for entry in entries][-2:] == [FIRST, SECOND]


def test_the_number_of_images_counts_only_where_the_relation_makes_it_public(weights, private, monkeypatch):
    told, intact = [], planning.Plan.course
    monkeypatch.setattr(planning.Plan, "course", lambda self, known=None: told.append(known) or intact(self, known))
    for relation in SENSITIVITY_FACTOR:
        releasing.release(private[False], quick(weights, neighboring_relation=relation))
    assert told == [None, 60, 60]
    with pytest.raises(ValueError, match="give num_private"):
        next(quick(weights, neighboring_relation="replace_one").course())


# ---- what is chosen ----------------------------------------------------------------------------------------


def test_few_images_take_two_steps_and_many_of_several_kinds_take_cells(weights):
    made = quick(weights)
    chosen = [made.choose(size, made.noise_multiplier).method for size in (20, 128, 512, 10_000)]
    assert chosen == ["two_steps", "two_steps", "cells", "cells"]
    assert {made.using(method).choose(10_000, 3.7).method for method in ("two_steps", "one_sum")} == {
        "two_steps", "one_sum",
    }  # fmt: skip


def test_a_large_set_of_one_kind_takes_two_steps_and_a_mixture_cells():
    """Shipped weights, held-out public shapes, noise from seeds: the first step tells most of them apart."""
    from hyperdp_lib.public.glyphs import GlyphTasks

    generator = torch.Generator().manual_seed(0)
    tasks = GlyphTasks(split="held_out", progress=False).sample_tasks(16, 1000, generator)
    made = plan(hyperdp.load_weights("glyphs"), epsilon=1.0, public_size=1000)

    def last(images, seed):
        return measure(images, None, made.course(), seed=seed)[0][-1].description

    mixtures = [tasks[torch.randperm(16, generator=generator)[:10], :100].flatten(0, 1) for _ in range(4)]
    assert {last(images, seed) for seed, images in enumerate(mixtures)} == {planning.CELLS}
    assert sum(last(images, seed) == SECOND for seed, images in enumerate(tasks[:8])) >= 5


def test_weights_without_tables_take_what_they_can(private):
    """Plain weights with a prior take two steps, without one the paper's sum."""
    base, networks = miniature()["base"], miniature()
    one = releasing.release(private[False], quick(Weights(base, networks["plain"]), public_size=60))
    assert [entry.description for entry in one.certificate.ledger if entry.private] == [FIRST, SECOND]
    bare = HyperNetwork(networks["plain"].encoder, base, networks["plain"].config).eval()
    made = quick(Weights(base, bare), public_size=60)
    assert made.choose(60, 3.7).method == "one_sum"
    with pytest.raises(InputError, match="two steps need weights with a prior"):
        made.using("two_steps")


def test_refinement_is_left_out_where_noise_would_make_it_worse(weights):
    made = dataclasses.replace(quick(weights, method="two_steps"), refined=True)
    few, many = (made._told(size, made.noise_multiplier) for size in (10, 2000))
    assert "decoded once" in few and "refined" in many
    assert not quick(weights)._worth_refining("cells", 0.0)


# ---- what is told ------------------------------------------------------------------------------------------


def test_the_text_says_what_is_spent_on_what(weights):
    text = str(quick(weights, class_names=CLASSES))
    assert "5% of mu squared buys a noisy count" in text and "classes, public: 3 (a, b, c)" in text
    assert text.startswith("budget: epsilon 1 at delta 1e-05 (mu 0.268), add_or_remove_one")
    assert "count" not in "\n".join(quick(weights, public_size=300).facts()[:2])
    assert quick(weights, epsilon=None, noise_multiplier=3.0).facts()[0].startswith("budget: epsilon 1.2")
    assert "the paper's method" in str(quick(weights, method="one_sum"))


@pytest.mark.parametrize("size", [50, 128, 2000])
@pytest.mark.parametrize("labelled", [False, True])
def test_what_is_foretold_for_a_size_is_what_is_done(weights, private, labelled, size):
    made = quick(weights, public_size=size, class_names=CLASSES if labelled else ())
    with checks.spied() as calls:
        releasing.release(private[labelled], made, seed=0)
    choice = made.choose(size, made.noise_multiplier)
    text = made.facts()[-1]
    assert f"a count and {choice.coordinates} coordinates" in text
    assert ("for each class" in text) == labelled
    assert (len(calls) == 2) == ("two sums" in text)
    if choice.method == "cells":
        assert f"{len(choice.hypernetwork.encoder.centroids)} cells" in text


# ---- what is refused ---------------------------------------------------------------------------------------

BAD = {
    "no budget": ({"epsilon": None}, "exactly one"),
    "two budgets": ({"noise_multiplier": 1.0}, "exactly one"),
    "negative": ({"epsilon": -1.0}, "epsilon"),
    "not a number": ({"epsilon": math.nan}, "epsilon"),
    "delta": ({"delta": 1.0}, "delta"),
    "little noise": ({"epsilon": None, "noise_multiplier": -1.0}, "noise"),
    "relation": ({"neighboring_relation": "swap"}, "neighboring_relation must be one of"),
    "method": ({"method": "looks"}, "method must be one of auto"),
    "no images": ({"public_size": 0}, "public_size must be at least 1"),
    "endless images": ({"public_size": math.inf}, "public_size"),
    "twice": ({"class_names": ("a", "a")}, "different"),
    "twice, composed otherwise": ({"class_names": ("\u00e9", "e\u0301")}, "different"),
    "a path": ({"class_names": ("../a",)}, "a"),
    "too many": ({"class_names": [str(i) for i in range(200_000)]}, "at most"),
}


@pytest.mark.parametrize(("asked", "told"), BAD.values(), ids=BAD)
def test_a_plan_that_cannot_be_is_refused_in_one_line(weights, asked, told):
    with pytest.raises(InputError, match=told) as error:
        quick(weights, **asked)
    assert "\n" not in str(error.value)


UNFIT = {
    "no labels": lambda one: ImageSet(one.images),
    "other classes": lambda one: ImageSet(one.images, one.labels, ("a", "b", "d")),
    "a label too high": lambda one: ImageSet(one.images, one.labels + 1, CLASSES),
    "a negative label": lambda one: ImageSet(one.images, one.labels - 1, CLASSES),
    "broken labels": lambda one: ImageSet(one.images, one.labels.float(), CLASSES),
    "too large": lambda one: ImageSet(one.images.repeat(1, 1, 2, 2), one.labels, CLASSES),
    "out of range": lambda one: ImageSet(one.images * 3, one.labels, CLASSES),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spoil", UNFIT.values(), ids=UNFIT)
def test_images_that_the_plan_is_not_for_are_refused_before_any_noise(weights, private, spoil, method):
    made = quick(weights, class_names=CLASSES, method=method)
    with checks.held_fixed() as calls, pytest.raises(InputError):
        releasing.release(spoil(private[True]), made)
    assert calls == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_set_without_images_is_released_like_any_other(weights, method, labelled):
    names = CLASSES if labelled else None
    empty = ImageSet(torch.zeros(0, 1, 16, 16), torch.zeros(0, dtype=torch.long) if labelled else None, names)
    one = releasing.release(empty, quick(weights, method=method, class_names=names))
    assert one.certificate.private and one.sample(3, seed=0, num_steps=1).images.isfinite().all()


# ---- the front door ----------------------------------------------------------------------------------------


def test_the_front_door_has_few_arguments():
    for name in ("load_images", "load_weights", "plan", "release", "load_release", "verify"):
        function = getattr(hyperdp, name)
        assert len(inspect.signature(function).parameters) <= 9 and function.__doc__.strip(), name


def test_a_plan_is_a_value(weights):
    made = quick(weights)
    assert made.using("one_sum") is not made and made.using("auto").method == made.method
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.epsilon = 2.0
    assert made.noise_multiplier == pytest.approx(accounting.noise_multiplier(1.0, 1e-5))
    assert np.isfinite(made.whole.noise_std)
