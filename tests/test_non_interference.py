"""Nothing but the mechanism's result leaves: with it held fixed, no byte, line or error depends on private data.

`hyperdp_lib.auditing.checks.non_interference` asks the same of the object that `release` returns; here it is asked of
the folder, the screen, the errors, and of what else calls the mechanism.
"""

import pytest
import torch

from hyperdp_lib.auditing import checks
from hyperdp_lib.auditing.pipeline import miniature, release
from hyperdp_lib.baselines import controls, dp_mepf
from hyperdp_lib.cli import main
from hyperdp_lib.data import ImageSet, InputError, save_npz
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.mechanism import SENSITIVITY_FACTOR
from hyperdp_lib.refinement import RefinementConfig
from hyperdp_lib.release_folder import save_release
from hyperdp_lib.releasing import refine_release
from hyperdp_lib.scores import private_scores

MODES = {name: (network, asked) for name, network, asked in checks.modes()}
SHORT = RefinementConfig(num_rounds=1, images_per_class=4, sampling_steps=1)


def contents(folder):
    """Every path in a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def comparable(relation):
    """Data sets that must look the same: of one size, where the relation makes the number of images public."""
    found = list(checks.data_sets())
    return found if relation == "add_or_remove_one" else [one for one in found if len(one[1]) == len(found[0][1])]


@pytest.mark.parametrize("relation", SENSITIVITY_FACTOR)
@pytest.mark.parametrize("mode", MODES)
def test_a_release_folder_is_the_same_for_all_data(mode, relation, tmp_path, capfd):
    network, asked = MODES[mode]
    base, folders, seen = miniature()["base"], [], []
    for number, (_, images, labels) in enumerate(comparable(relation)):
        classes = {"private_labels": labels} if "class_names" in asked else {}
        with checks.held_fixed() as configs:
            made = release(images, network, epsilon=1.0, neighboring_relation=relation, **asked, **classes)
        folder = save_release(tmp_path / str(number) / "out", made, base, num_samples=3)
        folders.append(contents(folder))
        seen.append((configs, capfd.readouterr()))
    assert len(folders) > 1 and len(folders[0]) > 5
    assert all(one == folders[0] for one in folders)
    assert all(one == seen[0] for one in seen) and seen[0][1] == ("", "")


@pytest.mark.parametrize("refined", [False, True])
def test_what_is_decoded_does_depend_on_the_mechanisms_result(refined):
    """The comparison can fail, and refinement reads the released sum alone."""
    network = miniature()["nested"]
    _, images, _ = next(checks.data_sets())

    def made(keep):
        with checks.held_fixed():
            for _ in range(keep):  # the fixed results differ from call to call
                checks.mechanism.noisy_sum([], checks.GaussianSum(1, 1.0))
            found = release(images, network, epsilon=1.0)
        if refined:
            found = refine_release(found, network, SHORT, generator=torch.Generator().manual_seed(0))
        return checks.released_bytes(found)

    assert made(0) == made(0) != made(1)


BAD_REQUESTS = {
    "epsilon": {"epsilon": 0.0},
    "relation": {"neighboring_relation": "swap"},
    "public size": {"public_size": 0},
    "folder name": {"class_names": ("a", "b", "../c")},
}


@pytest.mark.parametrize("fault", BAD_REQUESTS)
def test_an_error_says_the_same_of_all_data(fault):
    """What is wrong with a request is told alike, and before the mechanism is called."""
    told = set()
    for _, images, labels in checks.data_sets():
        asked = {"epsilon": 1.0, "private_labels": labels, "class_names": ("a", "b", "c"), **BAD_REQUESTS[fault]}
        with checks.held_fixed() as configs, pytest.raises(InputError) as caught:
            release(images, miniature()["plain"], **asked)
        told.add(str(caught.value))
        assert configs == []
    assert len(told) == 1


@pytest.mark.parametrize("spoilt", ["pixels", "not a number", "labels"])
def test_an_error_about_private_data_quotes_none_of_it(spoilt):
    """Images and labels that cannot be are refused in words that tell neither value, place nor number."""
    told = set()
    for factor, (_, images, labels) in zip((1, 2, 3), checks.data_sets(), strict=False):
        images, labels = images.clone(), labels.clone()
        if spoilt == "pixels":
            images[-1] += 5.0 * factor
        elif spoilt == "not a number":
            images[factor] = (float("nan"), float("inf"), -float("inf"))[factor - 1]
        else:
            labels[factor] = 2 + factor
        with pytest.raises(InputError) as caught:
            release(images, miniature()["plain"], epsilon=1.0, private_labels=labels, class_names=("a", "b", "c"))
        told.add(str(caught.value))
    assert len(told) == 1


@pytest.mark.parametrize("method", ["--method one-sum", "--public-size 12", "--method two-steps", "--method auto"])
def test_the_command_writes_the_same_for_all_data(method, tmp_path, capsys):
    """Shipped weights, labelled images in a file; what it tells the operator on the screen is not compared."""
    folders = []
    for number, (_, images, labels) in enumerate(list(checks.data_sets())[:4]):
        source = tmp_path / f"{number}.npz"
        save_npz(source, ImageSet(images, labels, ("a", "b", "c")))
        out = tmp_path / str(number)
        command = ["release", str(source), "--epsilon", "1", "--no-refine"]
        command.append("--yes")  # one set is all black, at which the command would stop
        with checks.held_fixed() as configs:
            assert main([*command, *method.split(), "--out", str(out)]) == 0
        assert len(configs) == {"--method one-sum": 1, "--public-size 12": 2}.get(method, 3)
        folders.append(contents(out))
        capsys.readouterr()
    assert all(one == folders[0] for one in folders)


# ---- what else calls the mechanism -------------------------------------------------------------------------


def scores(images, labels):
    """Noisy accuracy and noisy distance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureNetwork(dimension=8).eval()
        samples = torch.rand(40, 1, 16, 16) * 2 - 1
    yield private_scores.private_accuracy(samples, torch.arange(40) % 3, images, labels, epsilon=1.0)
    yield private_scores.private_frechet_distance(samples, images, network, epsilon=1.0, dimensions=3)


def moments(images, labels):
    """DP-MEPF: its sum, its generator and its certificate."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        extractor = dp_mepf.PerceptualFeatures(miniature()["plain"].encoder, (2, 4))
    made, statement = dp_mepf.train_dp_mepf(
        images, labels, extractor, dp_mepf.DPMepfConfig(num_steps=2, images_per_class=2, width=8, latent=4),
        epsilon=1.0, num_private_declared=12, class_names=("a", "b", "c"),
    )  # fmt: skip
    yield made.noisy_sum.tobytes(), statement
    yield {name: value.numpy().tobytes() for name, value in made.generator.state_dict().items()}


def shared_sum(images, labels):
    """The sum that the rivals and controls share."""
    sums, std = controls.noisy_class_sums(images, labels, miniature()["nested"].encoder, epsilon=1.0, num_classes=3)
    yield sums.tobytes(), std


@pytest.mark.parametrize("measure", [scores, moments, shared_sum], ids=lambda function: function.__name__)
def test_other_measurements_are_the_same_for_all_data(measure, capfd):
    found = []
    for _, images, labels in checks.data_sets():
        if len(images):
            with checks.held_fixed():
                found.append((list(measure(images, labels)), capfd.readouterr()))
    assert all(one == found[0] for one in found)
