"""Subsets of a classifier: exactly those layers are trained, with right gradients and noise; the grid resumes."""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from hyperdp_lib.baselines import dp_sgd, dp_training, layer_classification, layer_grid
from hyperdp_lib.baselines.layer_classification import SUBSETS, LayerClassificationConfig
from hyperdp_lib.baselines.layer_grid import Grid, Results
from hyperdp_lib.data import ImageSet, InputError
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.public.glyphs import GlyphTasks
from hyperdp_lib.scores import evaluation

NAMES = ("a", "b", "c")
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
TRAINED = {"head": 195, "norms": 771, "biases": 835, "first_block": 579, "last_block": 74307, "linear": 131331}


def images(count=6, seed=0):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@functools.cache
def classifier():
    """Random layers; nobody may change it."""
    torch.manual_seed(0)
    made = layer_classification.build_classifier(FeatureNetwork(), images(50, 7), 3)
    assert not made(images()).any()  # a zero head knows nothing
    with torch.no_grad():  # and sends no gradient down
        made[-1].weight.copy_(0.1 * torch.randn(3, 64))
    return made


def train(batch=None, labels=LABELS, subset="head", config=None, **changes):
    batch = images() if batch is None else batch
    config = config or LayerClassificationConfig(subset=subset, num_steps=2)
    arguments = dict(epsilon=1.0, num_private_declared=6, class_names=NAMES, seed=0)
    return layer_classification.train_layer_classification(
        batch, labels, classifier(), config, **{**arguments, **changes}
    )


@pytest.mark.parametrize("subset", SUBSETS)
def test_exactly_the_subset_is_trained(subset):
    before = {name: p.clone() for name, p in classifier().named_parameters()}
    trained, certificate = train(subset=subset)
    for (name, old), (_, new) in zip(before.items(), trained.model.named_parameters(), strict=True):
        assert torch.equal(old, new) != bool(re.fullmatch(SUBSETS[subset], name)), name
    assert all(torch.equal(p, before[name]) for name, p in classifier().named_parameters())
    expected = TRAINED.get(subset) or sum(
        old.numel() for name, old in before.items() if re.fullmatch(SUBSETS[subset], name)
    )
    assert trained.trained_parameters == trained.noise_dimension == certificate.dimension == expected
    assert trained.num_releases == 2


@pytest.mark.parametrize("subset", SUBSETS)
def test_per_example_gradients_are_those_of_one_example_at_a_time(subset):
    """Through the frozen layers first, then Opacus; against the whole classifier, one image at a time."""
    frozen, rest = layer_classification.split_at_first_trained(classifier(), subset)
    torch.testing.assert_close(torch.nn.Sequential(*frozen, *rest)(images()), classifier()(images()))
    inputs = frozen(images())
    parameters = [p for p in rest.parameters() if p.requires_grad]
    oracle = []
    for i in range(6):
        loss = layer_classification.cross_entropy(rest, inputs[i : i + 1], generator=None, labels=LABELS[i : i + 1])
        oracle.append(torch.autograd.grad(loss.sum(), parameters))
    gradients = dp_sgd.ExampleGradients(dp_training.trainable(rest), layer_classification.cross_entropy)
    gradients.backward(inputs, LABELS, torch.Generator())
    for index, p in enumerate(parameters):
        expected = torch.stack([one[index] for one in oracle])
        torch.testing.assert_close(p.grad_sample, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    gradients.remove()


def one_step(subset, noise_std, rows, clip_norm=0.01, declared=6.0):
    """Minus the change of the trained parameters in one step of plain gradient descent with learning rate 1."""
    frozen, rest = layer_classification.split_at_first_trained(classifier(), subset)
    parameters = [p for p in dp_training.trainable(rest).parameters() if p.requires_grad]
    before = torch.cat([p.detach().clone().flatten() for p in parameters])
    plan = dp_sgd.PrivacyPlan(noise_std, 1.0, 1, declared, 1.0, "test")
    gradients = dp_sgd.ExampleGradients(rest, layer_classification.cross_entropy)
    noise = torch.Generator().manual_seed(0)
    step = dp_sgd.noisy_step(
        gradients, torch.optim.SGD(parameters, lr=1.0), plan, clip_norm, noise=noise, draws=torch.Generator()
    )
    step([(frozen(images()[rows]), LABELS[rows])])
    gradients.remove()
    return before - torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("subset", ["head", "norms", "last_block", "all"])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(subset):
    everyone = one_step(subset, 0.0, torch.arange(6), declared=1.0)
    for gone in (0, 4):
        rows = torch.tensor([i for i in range(6) if i != gone])
        moved = (everyone - one_step(subset, 0.0, rows, declared=1.0)).norm()
        assert 0.9 * 0.01 < moved <= 0.01 * (1 + 1e-3)  # reached, since the raw norm is far larger
    # two examples less move it by more: this would catch a clip of the batch instead of the examples
    assert (everyone - one_step(subset, 0.0, torch.arange(2, 6), declared=1.0)).norm() > 0.0101


@pytest.mark.parametrize("subset", ["head", "last_block"])
def test_noise_of_the_released_gradient_is_as_promised(subset):
    """Two-sided chi-square test over all coordinates of a step; false alarm 1e-6."""
    everyone = torch.arange(6)
    residual = one_step(subset, 40.0, everyone) - one_step(subset, 0.0, everyone)
    residual = residual.double() * 6.0 / (40.0 * 0.01)
    low, high = stats.chi2(len(residual)).ppf([5e-7, 1 - 5e-7])
    assert low < float(residual.square().sum()) < high
    assert stats.kstest(residual.numpy(), "norm").pvalue > 1e-6


def test_labels_are_read_and_training_without_noise_learns():
    config = LayerClassificationConfig(subset="all", num_steps=15, learning_rate=3e-3)
    right, certificate = train(config=config, epsilon=math.inf)
    assert right.accuracy(images(), LABELS) == 1.0
    assert not certificate.private and certificate.sentence.startswith("NOT PRIVATE") and right.num_releases == 0
    turned, _ = train(config=config, labels=(LABELS + 1) % 3, epsilon=math.inf)
    assert turned.accuracy(images(), LABELS) == 0.0


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "zero_out"])
def test_the_certificate_states_the_budget_and_the_noise(relation):
    for seed, stamp in ((None, False), (0, True)):
        trained, certificate = train(epsilon=2.0, neighboring_relation=relation, seed=seed)
        assert (certificate.epsilon, certificate.delta, certificate.mechanism) == (2.0, 1e-5, "DP-SGD")
        assert certificate.demonstration is stamp and certificate.private is not stamp and certificate.charged
        assert certificate.sensitivity == (2.0 if relation == "replace_one" else 1.0)
        assert certificate.noise_std == pytest.approx(trained.plan.noise_std)
        classes, declared, entry = certificate.ledger
        assert classes.quantity == "class names" and declared.kind == "declared_public"
        assert (entry.kind, entry.steps, entry.sample_rate) == ("dp_sgd", 2, 1.0) and "head" in entry.description


def test_seeds_repeat_and_the_operating_system_does_not():
    def head(seed):
        return train(seed=seed)[0].model[-1].weight.detach()

    assert torch.equal(head(1), head(1)) and not torch.equal(head(None), head(None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "needs private_labels"),
        ({"class_names": ("a", "b")}, "3 classes, class_names 2"),
        ({"batch": torch.zeros(6, 3, 16, 16)}, r"shape \(N, 1, H, W\)"),
        ({"batch": torch.zeros(6, 1, 28, 28)}, "resize"),
        ({"batch": torch.full((6, 1, 16, 16), math.nan)}, "finite floats"),
        ({"labels": LABELS + 1}, "must lie in 0 .. 2"),
        ({"epsilon": 0.0}, "epsilon > 0"),
        ({"num_private_declared": 0}, "num_private_declared"),
    ],
)
def test_bad_requests_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        train(**changes)


def test_bad_settings():
    with pytest.raises(InputError, match="subset must be one of"):
        LayerClassificationConfig(subset="everything")
    with pytest.raises(InputError, match="noise_draws"):
        LayerClassificationConfig(noise_draws=2)


# The grid


def tiny_tasks(count=12):
    fields = np.random.default_rng(0).integers(-127, 127, (count, 2, 40, 40)).astype(np.int8)
    return GlyphTasks.from_fields(fields, [f"shape {i}" for i in range(count)])


GRID = Grid(subsets=("head", "norms"), epsilons=(4.0, math.inf), seeds=(0, 1), tuned_at=(4.0,),
            learning_rates=(1e-2, 1e-3, 1e-1), batch=math.inf, num_steps=1)  # fmt: skip


def private_sets():
    return ImageSet(images(12), LABELS.repeat(2), NAMES), ImageSet(images(6, 3), LABELS, NAMES)


def test_stand_ins_have_as_many_styles_as_images():
    train_set, test_set = layer_grid.public_stand_in(tiny_tasks(), num_classes=3, per_class=5, per_class_test=2, seed=0)
    assert train_set.images.shape == (15, 1, 16, 16) and len(test_set) == 6
    assert train_set.labels.tolist() == sorted(train_set.labels.tolist())
    assert len({one.sum().item() for one in train_set.images}) == 15


def test_the_grid_gives_every_subset_the_same_trials_and_resumes(tmp_path, monkeypatch):
    path = tmp_path / "layers" / "digits.json"
    results = Results(path, GRID)
    layer_grid.tune(results, classifier(), tiny_tasks(), 12)
    per_subset = {
        subset: sorted(len(trial["accuracy"]) for name, trial in results.content["trials"].items() if subset in name)
        for subset in GRID.subsets
    }
    assert per_subset == {"head": [1, 2, 2], "norms": [1, 2, 2]}
    layer_grid.run(results, classifier(), *private_sets())
    found = json.loads(path.read_text())
    assert len(found["cells"]) == 8 and {row["epsilon"] for row in found["summary"]} == {4.0, None}
    cell = found["cells"]["norms_eps4_seed1"]
    assert cell["label"] == evaluation.NOT_DP and cell["num_releases"] == 1 and 0 <= cell["accuracy"] <= 1
    assert "demonstration - NOT PRIVATE" in cell["certificate"]
    assert "commit" in found["provenance"]
    # again: nothing is trained; without one cell: that one
    trained = []
    once = layer_classification.train_layer_classification
    monkeypatch.setattr(
        layer_classification, "train_layer_classification", lambda *a, **k: trained.append(k) or once(*a, **k)
    )
    again = Results(path, GRID)
    layer_grid.tune(again, classifier(), tiny_tasks(), 12)
    layer_grid.run(again, classifier(), *private_sets())
    assert trained == []
    del again.content["cells"]["head_epsinf_seed0"]
    layer_grid.run(again, classifier(), *private_sets())
    assert len(trained) == 1 and json.loads(path.read_text())["cells"] == found["cells"] | again.content["cells"]
    with pytest.raises(InputError, match="other settings"):
        Results(path, dataclasses.replace(GRID, num_steps=3))


def test_the_best_rate_of_the_nearest_budget_is_used(tmp_path):
    grid = dataclasses.replace(GRID, tuned_at=(0.5, 4.0, math.inf))
    results = Results(tmp_path / "x.json", grid)
    for budget, rates in {"eps0.5": (0.9, 0.1, 0.2), "eps4": (0.1, 0.9, 0.2), "epsinf": (0.1, 0.2, 0.9)}.items():
        for rate, accuracy in zip(grid.learning_rates, rates, strict=True):
            # a rate that met one stand-in only is out, however well it did there
            met = [accuracy] if accuracy == 0.2 and budget != "epsinf" else [accuracy, accuracy]
            results.content["trials"][f"head_{budget}_lr{rate:g}"] = {"accuracy": met}
    chosen = [layer_grid.learning_rate_for(results, "head", e) for e in (0.25, 1.0, 2.0, 8.0, math.inf)]
    assert chosen == [1e-2, 1e-2, 1e-3, 1e-3, 1e-1]


def test_the_summary_says_which_subsets_cannot_be_told_apart():
    scores = {"head": (0.80, 0.82), "norms": (0.83, 0.79), "all": (0.60, 0.62)}
    cells = {
        f"{subset}{seed}": {"subset": subset, "epsilon": 4.0, "accuracy": accuracy}
        for subset, both in scores.items()
        for seed, accuracy in enumerate(both)
    }
    (row,) = layer_grid.summarise(cells, GRID)
    assert row["best"] in ("head", "norms") and row["not_worse"] == [{"head": "norms", "norms": "head"}[row["best"]]]
    assert row["mean"]["all"] == 0.61 and row["std"]["all"] == pytest.approx(0.0141, abs=1e-4)
    table = layer_grid.show([row])
    assert "81.0" in table and "*" in table.splitlines()[1] and len(table.splitlines()) == 3


def test_the_command_line_refuses_what_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HYPERDP_DATA", raising=False)
    with pytest.raises(SystemExit) as stopped:
        layer_grid.main(["--out", str(tmp_path), "--private", "mnist"])
    assert stopped.value.code == 2 and "HYPERDP_DATA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_larger_sets_are_cut_down_always_alike():
    many = ImageSet(images(50), torch.arange(50) % 3, NAMES)
    cut = layer_grid.subsample(many, 20)
    assert len(cut) == 20 and torch.equal(cut.images, layer_grid.subsample(many, 20).images)
    assert layer_grid.subsample(many, 50) is many
