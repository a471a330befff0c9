"""Release: one sum, one certificate, one folder; whole or not at all; loadable without this library."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hyperdp_lib import data
from hyperdp_lib.artefacts import tensors_sha256
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.certificate import STAMP, write_certificate
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model, sample
from hyperdp_lib.embedding import COUNT_COORDINATE, Encoder, EncoderConfig, embed
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
from hyperdp_lib.ledger import CLASS_NAMES, LedgerEntry, declaration, gaussian_charge
from hyperdp_lib.planning import decode
from hyperdp_lib.pretrained import load_pretrained, save_pretrained
from hyperdp_lib.release_folder import Release, load_adapters, load_base, load_release, save_release
from hyperdp_lib.verification import verify


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    base = build_base_model(BaseModelConfig(width=32, num_layers=1))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    encoder = Encoder(EncoderConfig(dimension=16, width=8))
    hypernetwork = HyperNetwork(encoder, base, HyperNetworkConfig(hidden=16, head_width=8, num_blocks=1))
    torch.nn.init.normal_(hypernetwork.head_b.weight, std=0.1)
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_pretrained(folder, base, hypernetwork, {"name": "tiny"})
    return folder


@pytest.fixture(scope="module")
def models(weights):
    return load_pretrained(weights)


@pytest.fixture(scope="module")
def digits():
    return data.digits("train")


def labelled(models, digits, **keywords) -> Release:
    defaults = {"epsilon": 1.0, "private_labels": digits.labels, "class_names": digits.class_names}
    return release(digits.images, models[1], **(defaults | keywords))


@pytest.mark.parametrize("names", [("a", "b"), ()])
def test_a_class_may_be_a_mixture_of_adapters(models, digits, tmp_path, names):
    """Members that are the same are written once; loaded, they are as many as before, in the same order."""
    base, hypernetwork = models
    labels = digits.labels % 2 if names else None
    single = release(digits.images, hypernetwork, epsilon=8.0, private_labels=labels, class_names=names or None, seed=0)
    sums = torch.tensor(single.noisy_sum).float()
    rows = torch.cat([row * factor for row in sums for factor in (1.0, 1.0, 0.5, 0.25)]).view(-1, sums.shape[1])
    rows[:, 0] = rows[:, 0].clamp_min(40.0)
    mixed = hypernetwork(rows, 1.0, tuple(f"{name}/{i}" for name in names or ("",) for i in range(1, 5)))
    folder = save_release(tmp_path / "out", dataclasses.replace(single, adapter=mixed), base, num_samples=6)
    shares = json.loads((folder / "parts.json").read_text())
    assert list(shares.values()) == [2, 1, 1] * max(1, len(names)) and verify(folder) == []
    again = load_release(folder, base)
    assert again.adapter.names == mixed.names
    for layer, factors in mixed.factors.items():
        for ours, theirs in zip(factors, again.adapter.factors[layer], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "damage",
    ["[]", "{", '{"classes/a": "1"}', '{"classes/a": 1}', '{"classes/a/../../x": 1}', '{"classes/c": 1}', '{"": 1}',
     '{"classes/a": 0, "classes/b": 0}', '{"classes/a": 1000000, "classes/b": 1000000}',
     '{"classes/a/part_01": 2, "classes/b": 1}'],
)  # fmt: skip
def test_a_damaged_list_of_parts_is_an_error_in_words(models, digits, tmp_path, damage):
    made = release(
        digits.images, models[1], epsilon=8.0, private_labels=digits.labels % 2, class_names=("a", "b"), seed=0
    )
    folder = save_release(tmp_path / "out", made, models[0], num_samples=0)
    (folder / "parts.json").write_text(damage)
    write_certificate(made.certificate, folder)  # which lists it
    assert any("parts" in problem for problem in verify(folder))
    with pytest.raises(InputError, match=r"parts\.json"):
        load_release(folder, models[0])


def test_without_noise_the_sum_is_the_sum_of_embeddings(models, digits):
    released = labelled(models, digits, epsilon=math.inf, seed=0)
    codes = embed(models[1].encoder, digits.images).double().numpy()
    exact = np.stack([codes[digits.labels == c].sum(0) for c in range(10)])
    # rounding toward zero on a grid of 2**-20 moves each of ~144 embeddings by less than one step
    assert np.abs(released.noisy_sum - exact).max() < 150 * 2**-20
    assert "NOT PRIVATE" in released.certificate.sentence
    counts = released.noisy_sum[:, 0] / COUNT_COORDINATE
    assert np.allclose(counts, np.bincount(digits.labels), atol=0.01)


def test_noise_is_fresh_and_as_large_as_the_certificate_says(models, digits):
    a, b = labelled(models, digits), labelled(models, digits)
    difference = (a.noisy_sum - b.noisy_sum).ravel()
    std = math.sqrt(2) * a.certificate.noise_std
    # 160 numbers: their root mean square has relative std 0.056; six of them: false alarm below 1e-8
    assert abs(np.sqrt(np.mean(difference**2)) / std - 1) < 6 * 0.056
    assert a.certificate.private and a.certificate.noise_multiplier == pytest.approx(3.73, abs=0.01)


@pytest.mark.parametrize("relation, factor", [("add_or_remove_one", 1), ("zero_out", 1), ("replace_one", 2)])
def test_the_relation_decides_the_noise_and_whether_n_is_stated(models, digits, relation, factor):
    statement = labelled(models, digits, neighboring_relation=relation).certificate
    assert statement.noise_std == pytest.approx(factor * statement.noise_multiplier)
    assert statement.num_private == (None if relation == "add_or_remove_one" else 1437)
    assert ("1437" in statement.to_json()) == (relation != "add_or_remove_one")


def test_a_seed_reproduces_and_voids_the_certificate(models, digits):
    a, b = labelled(models, digits, seed=3), labelled(models, digits, seed=3)
    assert np.array_equal(a.noisy_sum, b.noisy_sum)
    assert a.certificate.demonstration and a.certificate.sentence.startswith(STAMP)


def test_one_image_more_moves_the_sum_by_at_most_the_sensitivity(models, digits):
    all_but_one = dataclasses.replace(digits, images=digits.images[1:], labels=digits.labels[1:])
    a, b = (labelled(models, d, epsilon=math.inf, seed=0).noisy_sum for d in (digits, all_but_one))
    assert 0.9 < np.linalg.norm(a - b) <= 1.0
    assert (np.abs(a - b).sum(1) > 0).sum() == 1  # one class only: not a bit of the other embeddings changed


def test_batches_do_not_change_the_release(models, digits):
    a, b = (labelled(models, digits, seed=1, batch_size=size).noisy_sum for size in (64, 2048))
    assert np.array_equal(a, b)


def test_decoding_again_gives_the_same_adapter(models, digits):
    released = labelled(models, digits)
    again = decode(released.noisy_sum, released.certificate.noise_std, models[1], digits.class_names)
    for name, factors in released.adapter.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(factors, again.factors[name], strict=True))


BAD = {
    "both": {"noise_multiplier": 1.0},
    "neither": {"epsilon": None},
    "epsilon 0": {"epsilon": 0.0},
    "epsilon nan": {"epsilon": math.nan},
    "delta 0": {"delta": 0.0},
    "delta 1": {"delta": 1.0},
    "relation": {"neighboring_relation": "swap"},
    "no names": {"class_names": None},
    "no labels": {"private_labels": None},
    "few labels": {"private_labels": torch.zeros(3, dtype=torch.long)},
    "label out of range": {"class_names": ("a", "b")},
    "path as name": {"class_names": ("../x", *map(str, range(1, 10)))},
    "same name twice": {"class_names": ("1", *map(str, range(1, 10)))},
    "no noise, no seed": {"epsilon": math.inf},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_one_line(models, digits, bad):
    with pytest.raises(data.InputError) as error:
        labelled(models, digits, **bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x[:, :, :8],
        lambda x: (x * 127).to(torch.int16),
        lambda x: x * 100,
        lambda x: x.index_fill(0, torch.tensor([5]), math.nan),
        lambda x: x.index_fill(0, torch.tensor([5]), math.inf),
    ],
    ids=["shape", "type", "range", "nan", "inf"],
)
def test_bad_images_never_reach_the_sum(models, digits, spoil, monkeypatch):
    monkeypatch.setattr("hyperdp_lib.mechanism.noisy_sum", lambda *a, **k: pytest.fail("noise was drawn"))
    with pytest.raises(data.InputError):
        release(spoil(digits.images), models[1], epsilon=1.0)


def test_folder_verifies_and_tampering_shows(models, digits, tmp_path):
    folder = save_release(tmp_path / "out", labelled(models, digits), models[0], num_samples=20)
    assert verify(folder) == []
    assert (folder / "samples.png").is_file() and len(list((folder / "classes").iterdir())) == 10
    first = (folder / "README.md").read_text().splitlines()[0]
    assert first.startswith("This adapter is (epsilon = 1, delta = 1e-05)-differentially private")
    path = folder / "classes" / "3" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert any("classes/3/adapter_model.safetensors" in problem for problem in verify(folder))


def test_unlabelled_release_is_one_peft_folder(models, digits, tmp_path):
    folder = save_release(tmp_path / "out", release(digits.images, models[1], epsilon=2.0), models[0], num_samples=9)
    assert verify(folder) == []
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "classes").exists()


def test_an_interrupted_write_leaves_nothing(models, digits, tmp_path, monkeypatch):
    released = labelled(models, digits)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hyperdp_lib.certificate.write_certificate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_release(tmp_path / "out", released, models[0], num_samples=0)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_needs_to_be_asked_for(models, digits, tmp_path):
    released = labelled(models, digits)
    save_release(tmp_path / "out", released, models[0], num_samples=0)
    with pytest.raises(data.InputError, match="exists"):
        save_release(tmp_path / "out", released, models[0])
    save_release(tmp_path / "out", released, models[0], num_samples=0, overwrite=True)
    assert verify(tmp_path / "out") == [] and [p.name for p in tmp_path.iterdir()] == ["out"]


# a folder of the oldest PEFT promised and the libraries of its time, as the workflow `ci` installs them
OTHER_PEFT = os.environ.get("HYPERDP_OTHER_PEFT")


def cards_images(folder, card, empty, packages=()):
    """What the code in a model card gives, run in a copy of the release, with diffusers and PEFT only."""
    copy = shutil.copytree(folder, empty / "copy", dirs_exist_ok=True)
    code = card.split("```python\n")[1].split("```")[0]
    assert "x = torch.randn(16, 1, 16, 16)\n" in code
    script = (
        "import sys; sys.modules['hyperdp_lib'] = None\nimport torch\n"
        + code.replace("x = torch.randn(16, 1, 16, 16)", "torch.manual_seed(0); x = torch.randn(1, 16, 1, 16, 16)[0]")
        + "import numpy, peft; numpy.save('images.npy', images.numpy()); print(peft.__version__)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(empty)}
    environment["PYTHONPATH"] = os.pathsep.join(packages)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, check=True, env=environment, timeout=300, stdout=subprocess.PIPE
    )
    return torch.from_numpy(np.load(copy / "images.npy")), done.stdout.decode().strip()


def mixture(models, digits):
    made = release(
        digits.images, models[1], epsilon=8.0, private_labels=digits.labels % 2, class_names=("a", "b"), seed=0
    )
    shares = torch.tensor([1.0, 1.0, 0.5, 0.25] * 2)[:, None]
    rows = torch.tensor(made.noisy_sum).float().repeat_interleave(4, 0) * shares
    mixed = models[1](rows, 1.0, tuple(f"{name}/{i}" for name in "ab" for i in range(1, 5)))
    return dataclasses.replace(made, adapter=mixed)


@pytest.mark.parametrize(
    "made, where, member",
    [("labelled", "classes/3", 3), ("unlabelled", "", 0), ("mixture", "classes/b/part_02", 6)],
)
def test_the_model_card_runs_without_this_library(models, digits, tmp_path, made, where, member):
    """The card's code, run in the release where hyperdp_lib cannot be imported, gives what our own sampler gives."""
    released = {
        "labelled": lambda: labelled(models, digits),
        "unlabelled": lambda: release(digits.images, models[1], epsilon=2.0),
        "mixture": lambda: mixture(models, digits),
    }[made]()
    folder = save_release(tmp_path / "out", released, models[0], num_samples=0)
    theirs, _ = cards_images(folder, (folder / where / "README.md").read_text(), tmp_path)
    ours = sample(models[0], released.adapter[member], 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(theirs, ours, atol=1e-4)
    config = json.loads((folder / where / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "base")
    assert verify(folder) == []


def test_a_release_decoded_as_no_command_does_now_is_still_verified_read_and_sampled(models, digits, tmp_path):
    """One adapter for each of three draws, and a note that says so: what `hyperdp refine` once could write."""
    note = "decoded from 3 draws of the clean mean, mixed: post-processing with public models and public data"
    made = release(digits.images, models[1], epsilon=2.0)
    rows = torch.tensor(made.noisy_sum).float() * torch.tensor([1.0, 0.5, 0.25])[:, None]
    mixed = models[1](rows, 1.0, ("adapter/0", "adapter/1", "adapter/2"))
    noted = dataclasses.replace(made.certificate, post_processing=(note,))
    folder = save_release(tmp_path / "out", Release(mixed, noted, made.noisy_sum), models[0], num_samples=0)
    assert json.loads((folder / "parts.json").read_text()) == {f"part_0{i}": 1 for i in (1, 2, 3)}
    assert verify(folder) == [] and note in (folder / "part_03" / "README.md").read_text()
    read = load_release(folder, models[0])
    assert read.certificate.post_processing == (note,) and len(read.adapter) == 3
    drawn = [sample(models[0], one, 3, generator=torch.Generator().manual_seed(0)) for one in (mixed, read.adapter)]
    assert torch.allclose(*drawn, atol=1e-4)


@pytest.mark.skipif(OTHER_PEFT is None, reason="HYPERDP_OTHER_PEFT names no folder with another PEFT")
def test_the_model_card_runs_with_the_oldest_peft_promised(models, digits, tmp_path):
    released = labelled(models, digits)
    folder = save_release(tmp_path / "out", released, models[0], num_samples=0)
    card = (folder / "classes" / "0" / "README.md").read_text()
    theirs, version = cards_images(folder, card, tmp_path, [OTHER_PEFT])
    ours = sample(models[0], released.adapter["0"], 16, generator=torch.Generator().manual_seed(0))
    assert version == "0.12.0" and torch.allclose(theirs, ours, atol=1e-4)


def test_a_release_holds_its_base_model_and_names_no_place_outside(models, weights, digits, tmp_path):
    """In half precision where that loses nothing, in full otherwise; loaded, it is the same to the last bit."""
    released = labelled(models, digits)
    folder = save_release(tmp_path / "out", released, models[0], num_samples=0)
    for path in folder.rglob("*"):
        assert path.is_dir() or str(weights).encode() not in path.read_bytes()
    assert (folder / "base/diffusion_pytorch_model.safetensors").read_bytes() == (
        weights / "base/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    again = load_release(folder)
    pairs = zip(again.adapter.parameters(), released.adapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert tensors_sha256(load_base(folder).state_dict()) == released.certificate.base_model_sha256
    fine = copy.deepcopy(models[0])
    with torch.no_grad():
        next(fine.parameters()).add_(1e-6)
    digest = tensors_sha256(fine.state_dict())
    with pytest.raises(InputError, match="base model is not the one"):
        save_release(tmp_path / "fine", released, fine)
    statement = dataclasses.replace(released.certificate, base_model_sha256=digest, hypernetwork_sha256=None)
    folder = save_release(tmp_path / "fine", dataclasses.replace(released, certificate=statement), fine, num_samples=0)
    assert verify(folder) == [] and tensors_sha256(load_base(folder).state_dict()) == digest
    shutil.rmtree(folder / "base")
    with pytest.raises(InputError, match="missing or damaged"):
        load_release(folder)


def test_every_card_says_what_was_measured(models, digits, tmp_path):
    """Two steps are not told as one sum; what was declared public is told as that."""
    first = gaussian_charge("a first step", 9.0, 1e-5)
    named = declaration(CLASS_NAMES, "class names: 0 to 9")
    folder = save_release(tmp_path / "out", labelled(models, digits, ledger=(named, first)), models[0], num_samples=0)
    for card in ("README.md", "classes/7/README.md"):
        text = (folder / card).read_text()
        assert "- measured: a first step\n- measured: one noisy sum of embeddings\n" in text
        assert "- declared public: class names: 0 to 9\n" in text and "10 x 16 numbers" in text


def test_an_unlisted_list_of_parts_is_not_obeyed(models, digits, tmp_path):
    """It would make twenty adapters of one."""
    folder = save_release(tmp_path / "out", release(digits.images, models[1], epsilon=2.0), models[0], num_samples=0)
    (folder / "parts.json").write_text('{"": 20}')
    assert verify(folder) == ["parts.json is not listed in the certificate"]
    for load in (load_release, lambda folder: load_adapters(folder, models[0])):
        with pytest.raises(InputError, match=r"no certificate lists the parts\.json"):
            load(folder)


def test_what_was_spent_or_declared_before_is_in_the_ledger_and_adds_up(models, digits):
    def certificate(ledger=()):
        asked = {"noise_multiplier": 4.0, "ledger": ledger, "seed": 0}
        return release(digits.images[:20], models[1], **asked).certificate

    first = certificate()
    declared = LedgerEntry("declared_public", "number of images, about 20", 0.0, 0.0)
    told = certificate((declared,))
    assert told.epsilon == first.epsilon and told.ledger == (declared, *first.ledger)
    both = certificate((gaussian_charge("an earlier release", 4.0, 1e-5),))
    assert both.mu == pytest.approx(first.mu * 2**0.5) and both.epsilon > first.epsilon
