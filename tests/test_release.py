"""Release: one sum, one certificate, one folder; whole or not at all; loadable without this library."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from hyperdp_lib import data
from hyperdp_lib.certificate import STAMP, verify
from hyperdp_lib.data import InputError
from hyperdp_lib.diffusion import BaseModelConfig, build_base_model, sample
from hyperdp_lib.embedding import COUNT_COORDINATE, Encoder, EncoderConfig, embed
from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig, load_pretrained, save_pretrained
from hyperdp_lib.release import Release, class_names_of, decode, load_release, release, save_release


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
    folder = save_release(tmp_path / "out", single._replace(adapter=mixed), base, num_samples=6)
    shares = json.loads((folder / "parts.json").read_text())
    assert list(shares.values()) == [2, 1, 1] * max(1, len(names)) and verify(folder) == []
    again = load_release(folder, base)
    assert again.adapter.names == mixed.names and class_names_of(again.adapter) == (names or ("",))
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


def test_the_model_card_runs_without_this_library(models, weights, digits, tmp_path):
    """The code in README.md, run where hyperdp_lib cannot be imported, gives what our own sampler gives."""
    released = labelled(models, digits)
    folder = save_release(
        tmp_path / "out", released, models[0], base_model_name=str(weights / "base"), num_samples=0
    )
    code = (folder / "classes" / "0" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = (
        "import sys; sys.modules['hyperdp_lib'] = None\nimport torch\n"
        + code.replace("x = torch.randn(16, 1, 16, 16)", "torch.manual_seed(0); x = torch.randn(1, 16, 1, 16, 16)[0]")
        + "import numpy; numpy.save('images.npy', images.numpy())\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, env=environment, timeout=300)
    theirs = torch.from_numpy(np.load(folder / "images.npy"))
    ours = sample(models[0], released.adapter["0"], 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert json.loads((folder / "classes" / "0" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_what_was_spent_or_declared_before_is_in_the_ledger_and_adds_up(models, digits):
    from hyperdp_lib.ledger import LedgerEntry, gaussian_charge

    def certificate(ledger=()):
        asked = {"noise_multiplier": 4.0, "ledger": ledger, "seed": 0}
        return release(digits.images[:20], models[1], **asked).certificate

    first = certificate()
    declared = LedgerEntry("declared_public", "number of images, about 20", 0.0, 0.0)
    told = certificate((declared,))
    assert told.epsilon == first.epsilon and told.ledger == (declared, *first.ledger)
    both = certificate((gaussian_charge("an earlier release", 4.0, 1e-5),))
    assert both.mu == pytest.approx(first.mu * 2**0.5) and both.epsilon > first.epsilon
