"""Certificates: strict JSON, honest sentences, the ledger, and a verification that finds every tampering."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hyperdp_lib import accounting, artefacts, dp_sgd_accounting, risk, verification
from hyperdp_lib import certificate as certificates
from hyperdp_lib.certificate import STAMP, Certificate, gaussian_certificate
from hyperdp_lib.ledger import (
    CLASS_NAMES,
    CLASS_SIZES,
    NUMBER_OF_IMAGES,
    LedgerEntry,
    conversion,
    declaration,
    gaussian_charge,
    ledger_epsilon,
)
from hyperdp_lib.mechanism import GaussianSum, noisy_sum
from hyperdp_lib.releasing import declared
from hyperdp_lib.verification import verify

MULTIPLIER = accounting.noise_multiplier(1.0, 1e-5)
CONFIG = GaussianSum(dimension=8, noise_multiplier=MULTIPLIER, num_rows=2)


BASE = {"weight": np.arange(3, dtype=np.float16)}
BASE_SHA256 = artefacts.tensors_sha256({"weight": np.arange(3, dtype=np.float32)})


def make_certificate(**changes):
    known = {"epsilon": 1.0, "seeded": False, "class_names": ("0", "1"), "base_model_sha256": BASE_SHA256}
    return gaussian_certificate(CONFIG, 1e-5, **(known | changes))


def write_release(folder, certificate, config=CONFIG):
    """A small but complete release: two class adapters, the base model, the embedding, the card, the certificate."""
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    save_file(BASE, folder / "base" / "diffusion_pytorch_model.safetensors")
    for name in certificate.class_names:
        adapter = folder / "classes" / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        save_file({"lora_A": np.ones((2, 3), np.float32)}, adapter / "adapter_model.safetensors")
    released = noisy_sum([], config, seed=None if certificate.private else 0)
    save_file({"noisy_sum": released}, folder / "embedding.safetensors")
    said = f"{certificate.sentence}\n\n{certificate.risk_sentence}\n"
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\n---\n{said}")
    certificates.write_certificate(certificate, folder)
    return folder


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("release"), make_certificate())


@pytest.fixture
def release(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "copy")


def read(folder):
    return Certificate.from_json((folder / "certificate.json").read_text())


def rewrite(folder, **changes):
    """Write a changed certificate with a valid checksum and card: only the numbers can give it away."""
    changed = dataclasses.replace(read(folder), **changes)
    (folder / "README.md").write_text(changed.sentence + "\n")
    certificates.write_certificate(changed, folder)


# ---- sentences ------------------------------------------------------------


def test_sentence_of_a_private_release():
    assert make_certificate().sentence == (
        "This adapter is (epsilon = 1, delta = 1e-05)-differentially private "
        "with respect to adding or removing one image."
    )


def test_sentence_of_a_demonstration_is_stamped():
    certificate = make_certificate(seeded=True)
    assert certificate.sentence.startswith(STAMP) and not certificate.private


def test_sentence_without_noise_is_stamped():
    config = GaussianSum(8, 0.0, num_rows=2)
    certificate = gaussian_certificate(config, 1e-5, seeded=True)
    assert "NOT PRIVATE" in certificate.sentence and certificate.epsilon == math.inf
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_no_epsilon_without_a_charge():
    certificate = dataclasses.replace(make_certificate(), ledger=())
    assert certificate.sentence.startswith("No epsilon can be stated")
    other = (gaussian_charge("something else", 50.0, 1e-5),)
    assert "epsilon =" not in dataclasses.replace(certificate, ledger=other).sentence


def test_sentence_of_the_public_control():
    certificate = certificates.ledger_certificate(
        (),
        0.0,
        method="public_only",
        mechanism=certificates.NO_PRIVATE_DATA,
        neighboring_relation="add_or_remove_one",
        rng=certificates.NO_NOISE,
    )
    assert certificate.epsilon == 0 and "no private image was read" in certificate.sentence


@given(st.floats(1e-6, 1e6))
def test_printed_numbers_are_never_below_the_true_ones(value):
    assert value <= float(risk.rounded_up(value)) <= value * (1 + 1.1e-5)


# ---- fields and ledger ------------------------------------------------------------


def test_derived_fields():
    certificate = make_certificate(num_private=1437)
    assert certificate.epsilon == 1.0 and certificate.num_private is None  # n is secret under this relation
    assert certificate.mu == pytest.approx(1 / MULTIPLIER) and certificate.rho == pytest.approx(
        0.03592, abs=1e-4
    )
    assert (
        certificate.rng == "operating system (OpenDP)" and "noisy count" in certificate.num_private_treatment
    )
    config = dataclasses.replace(CONFIG, neighboring_relation="replace_one")
    public = gaussian_certificate(config, 1e-5, seeded=False, num_private=1437)
    assert (public.num_private, public.num_private_treatment, public.sensitivity) == (1437, "public", 2.0)
    with pytest.raises(ValueError, match="secret"):
        dataclasses.replace(make_certificate(), num_private=1437)


def test_a_budget_that_is_not_the_cost_is_not_stated():
    assert make_certificate(epsilon=0.5).epsilon == pytest.approx(1.0)
    assert make_certificate(epsilon=7.0).epsilon == pytest.approx(1.0)


def test_earlier_charges_count():
    entry = gaussian_charge("a noisy score", MULTIPLIER, 1e-5)
    certificate = make_certificate(ledger=(entry,))
    assert certificate.epsilon == pytest.approx(accounting.epsilon([MULTIPLIER] * 2, 1e-5))
    assert certificate.mu == pytest.approx(math.sqrt(2) / MULTIPLIER)


def test_a_release_is_charged_by_an_entry_of_its_own_kind():
    """The same noise on something else is not the release's charge."""
    made = make_certificate()
    classes, own = made.ledger
    assert classes == declaration(CLASS_NAMES, "class names: 0, 1")
    assert made.charged and "differentially private" in made.sentence
    for kind in ("dp_sgd", "other"):
        elsewhere = dataclasses.replace(made, ledger=(dataclasses.replace(own, kind=kind, mu=None),))
        assert not elsewhere.charged and "No epsilon can be stated" in elsewhere.sentence
    trained = dataclasses.replace(made, mechanism=certificates.DP_SGD)
    assert not trained.charged
    declared = LedgerEntry("declared_public", "n", 0.0, 0.0)
    assert not dataclasses.replace(made, ledger=(declared,)).charged
    assert not dataclasses.replace(made, ledger=(declared,)).private and made.private
    # no noise stated is no noise found: an entry that states none, either, does not vouch for a finite epsilon
    black_box = LedgerEntry("other", "a black box", 0.1, 1e-6)
    for mechanism in (certificates.DP_SGD, certificates.NO_PRIVACY):
        unstated = dataclasses.replace(made, mechanism=mechanism, noise_multiplier=None, ledger=(black_box,))
        assert not unstated.charged
        assert dataclasses.replace(unstated, epsilon=math.inf).sentence.startswith("NOT PRIVATE")


def test_what_read_no_private_data_has_no_private_charge():
    arguments = dict(method="public_only", neighboring_relation="add_or_remove_one", rng=certificates.NO_NOISE)
    declared = LedgerEntry("declared_public", "n = 128", 0.0, 0.0)
    charge = gaussian_charge("selection score", 1.0, 1e-5)
    for ledger, charged in (((), True), ((declared,), True), ((declared, charge), False)):
        made = certificates.ledger_certificate(ledger, 1e-5, mechanism=certificates.NO_PRIVATE_DATA, **arguments)
        assert made.charged == charged and ("public data alone" in made.sentence) == charged


def test_costs_under_different_relations_do_not_add_up():
    """Noise that is enough against a removal is half of what a replacement takes."""
    removal, replacement = (gaussian_charge("a sum", MULTIPLIER, 1e-5, r) for r in ("add_or_remove_one", "replace_one"))
    assert ledger_epsilon([replacement] * 2, 1e-5, "replace_one") > 1.0
    for ledger, relation in (([removal, replacement], "replace_one"), ([replacement], "zero_out")):
        with pytest.raises(ValueError, match="charge both for the same relation"):
            ledger_epsilon(ledger, 1e-5, relation)
    for relation in certificates.RELATIONS:
        config = dataclasses.replace(CONFIG, neighboring_relation=relation)
        assert gaussian_certificate(config, 1e-5, seeded=False).ledger[0].neighboring_relation == relation


def test_a_public_size_is_said_to_be_public():
    declared = LedgerEntry("declared_public", "number of images, about 20", 0.0, 0.0)
    told = make_certificate(ledger=(declared,)).num_private_treatment
    assert told == "declared public: number of images, about 20; noisy count released in the same sum"
    assert make_certificate().num_private_treatment.startswith("not public; noisy count")


def test_what_is_declared_of_one_kind_hides_no_other():
    """Class names and class sizes in the ledger do not stand for the number of images."""
    names, sizes = declaration(CLASS_NAMES, "class names: cat, dog"), declaration(CLASS_SIZES, "10 of each class")
    size = declaration(NUMBER_OF_IMAGES, "number of images, about 20")
    assert declared((names, sizes), 20) == (names, sizes, size) and declared((size, names), 30) == (size, names)
    assert make_certificate(ledger=(names,)).num_private_treatment.startswith("not public; noisy count")
    assert make_certificate(ledger=(names, size)).num_private_treatment.startswith("declared public: number of images")


def test_certificates_from_before_quantities_were_typed_still_read():
    """A ledger without the field is read, written and hashed as it was; the field stands where it says something."""
    old = make_certificate(class_names=(), ledger=(LedgerEntry("declared_public", "number of images", 0.0, 0.0),))
    assert "quantity" not in old.to_json() and Certificate.from_json(old.to_json()) == old
    new = make_certificate(ledger=(declaration(CLASS_NAMES, "class names: cat, dog"),))
    assert '"quantity": "class names"' in new.to_json() and Certificate.from_json(new.to_json()) == new
    for kind, quantity in (("declared_public", "weather"), ("other", CLASS_NAMES)):
        with pytest.raises(ValueError, match="declared public must be one of"):
            LedgerEntry(kind, "x", 0.0, 0.0, quantity=quantity)


def test_the_route_to_epsilon_does_not_depend_on_what_was_declared():
    sgd = LedgerEntry("dp_sgd", "a run", 1.0, 1e-5, None, 2.0, 0.1, 50)
    public = LedgerEntry("declared_public", "n = 1437", 0.0, 0.0)
    assert conversion([public, sgd]) == conversion([sgd]) != conversion([sgd, sgd])


def test_ledger_composition_of_every_kind():
    gaussian = gaussian_charge("sum", 4.0, 1e-5)
    sgd = LedgerEntry("dp_sgd", "a run", 1.0, 1e-5, None, 2.0, 0.1, 50)
    other = LedgerEntry("other", "a black box", 0.5, 2e-6)
    public = LedgerEntry("declared_public", "n = 1437", 0.0, 0.0)
    relation = "add_or_remove_one"

    def total(*entries, relation=relation):
        return ledger_epsilon(entries, 1e-5, relation)

    assert total() == total(public) == 0.0
    assert total(gaussian, public) == total(gaussian)
    assert total(gaussian, other) == pytest.approx(0.5 + accounting.epsilon(4.0, 8e-6))
    assert total(other, other, other, other, other, other) == math.inf  # delta is used up
    assert max(total(sgd), total(gaussian)) < total(sgd, gaussian) < total(sgd) + total(gaussian) + 1.0
    assert total(sgd, sgd) > total(sgd)
    replacing = [dataclasses.replace(one, neighboring_relation="replace_one") for one in (sgd, gaussian)]
    cheap = dataclasses.replace(replacing[0], delta=1e-6)
    assert total(cheap, replacing[1], relation="replace_one") == pytest.approx(
        1.0 + accounting.epsilon(4.0, 9e-6)
    )
    assert "basic composition" in conversion([cheap])  # no accountant follows it
    assert total(gaussian_charge("none", 0.0, 1e-5)) == math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "laplace"},
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"delta": 1.0},
        {"noise_multiplier": None},
        {"steps": 0},
        {"sample_rate": 0.5},
        {"description": 3},
        {"neighboring_relation": "replace_two"},
        {"kind": "declared_public"},
    ],
)
def test_ledger_entries_are_checked(change):
    with pytest.raises(ValueError):
        dataclasses.replace(gaussian_charge("sum", 4.0, 1e-5), **change)


@pytest.mark.parametrize("cost", [{"epsilon": 1.0}, {"delta": 1e-9}, {"noise_multiplier": 2.0}, {"sample_rate": 0.5}])
def test_what_is_declared_public_hides_no_cost(cost):
    with pytest.raises(ValueError, match="no cost or noise"):
        LedgerEntry(**({"kind": "declared_public", "description": "n", "epsilon": 0.0, "delta": 0.0} | cost))


# ---- JSON ------------------------------------------------------------


def test_json_round_trip():
    certificate = make_certificate(warnings=("β",), ledger=(gaussian_charge("a look", 9.0, 1e-5),))
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_every_changed_digit_is_noticed():
    text = make_certificate().to_json()
    for position, character in enumerate(text):
        if character.isdigit():
            edited = text[:position] + str((int(character) + 1) % 10) + text[position + 1 :]
            with pytest.raises(ValueError):
                Certificate.from_json(edited)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "lacks"),
        ("[" * 100_000, "nested"),
        ('{"epsilon": 1, "epsilon": 2}', "repeated key"),
        ('{"epsilon": NaN}', "NaN"),
        ('{"epsilon": 1e999}', "too large"),
    ],
)
def test_malformed_json(text, message):
    with pytest.raises(ValueError, match=message):
        Certificate.from_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", "1"),
        ("epsilon", True),
        ("epsilon", -1.0),
        ("demonstration", 0),
        ("grid_bits", 20.5),
        ("class_names", "01"),
        ("class_names", [1]),
        ("ledger", [{}]),
        ("ledger", {}),
        ("artefact_sha256", {"a": 1}),
        ("neighboring_relation", "nobody"),
        ("rng", "dice"),
        ("mechanism", "hope"),
        ("surplus", 1),
    ],
)
def test_wrong_fields(key, value):
    values = json.loads(make_certificate().to_json())
    with pytest.raises(ValueError):
        Certificate.from_json(json.dumps(values | {key: value}))


# ---- verification ------------------------------------------------------------


def test_an_intact_release_has_no_problems(intact):
    assert verify(intact) == []
    assert verify(intact, base_model_sha256=BASE_SHA256) == []


@pytest.mark.parametrize("epsilon", [0.25, 8.0])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "zero_out"])
def test_intact_releases_of_every_relation(tmp_path, epsilon, relation):
    multiplier = accounting.noise_multiplier(epsilon, 1e-5)
    config = GaussianSum(8, multiplier, 2, clip_norm=1 / 3, neighboring_relation=relation)
    entry = gaussian_charge("a noisy score", 30.0, 1e-5, relation)
    fields = {"class_names": ("0", "1"), "num_private": 100, "ledger": (entry,)}
    certificate = gaussian_certificate(config, 1e-5, seeded=epsilon > 1, **fields)
    assert verify(write_release(tmp_path, certificate, config)) == []


def test_the_cost_of_sampled_dp_sgd_under_replacement_is_recomputed(tmp_path):
    epsilon, delta, rate, steps = 2.0, 1e-5, 0.1, 50
    halved = epsilon / 2, delta / (1 + math.exp(epsilon / 2))
    multiplier = dp_sgd_accounting.dp_sgd_noise_multiplier(*halved, rate, steps)
    numbers = dict(noise_multiplier=multiplier, noise_std=multiplier * 0.5, clip_norm=0.5, sensitivity=0.5)
    for stated, honest in ((epsilon, True), (1.5, False), (0.001, False)):
        charge = LedgerEntry("dp_sgd", "a run", stated, delta, None, multiplier, rate, steps, "replace_one")
        made = certificates.ledger_certificate(
            [charge], delta, method="dp_lora", mechanism=certificates.DP_SGD, neighboring_relation="replace_one",
            rng=certificates.FLOAT_NOISE, num_private=50, **numbers,
        )  # fmt: skip
        folder = tmp_path / f"{stated}"
        folder.mkdir()
        (folder / "README.md").write_text(made.sentence)
        certificates.write_certificate(made, folder)
        assert any("less than its noise costs" in problem for problem in verify(folder)) != honest


def test_a_finite_epsilon_needs_noise(release):
    rewrite(release, rng=certificates.NO_NOISE, mechanism=certificates.NO_PRIVACY, epsilon=0.0)
    problems = verify(release)
    assert any("without noise" in problem for problem in problems) and any("not charged" in one for one in problems)


def test_a_dp_sgd_release_verifies(tmp_path):
    multiplier = dp_sgd_accounting.dp_sgd_noise_multiplier(2.0, 1e-5, 0.1, 50)
    certificate = certificates.ledger_certificate(
        [LedgerEntry("dp_sgd", "DP-SGD LoRA", 2.0, 1e-5, None, multiplier, 0.1, 50)],
        1e-5,
        method="dp_lora",
        mechanism=certificates.DP_SGD,
        neighboring_relation="add_or_remove_one",
        rng=certificates.FLOAT_NOISE,
        epsilon=2.0,
        noise_multiplier=multiplier,
        noise_std=0.5 * multiplier,
        clip_norm=0.5,
        sensitivity=0.5,
    )
    assert certificate.epsilon == 2.0 and certificate.rho is None
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    save_file({"lora_A": np.ones((2, 3), np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_text(certificate.sentence)
    certificates.write_certificate(certificate, tmp_path)
    assert verify(tmp_path) == []
    rewrite(tmp_path, epsilon=1.5)
    assert any("ledger comes to" in problem for problem in verify(tmp_path))


LIES = {
    "smaller epsilon": ({"epsilon": 0.9}, "ledger comes to"),
    "slightly smaller epsilon": ({"epsilon": 0.9999}, "ledger comes to"),
    "larger epsilon": ({"epsilon": 1.1}, "ledger comes to"),
    "smaller delta": ({"delta": 1e-6}, "ledger comes to"),
    "smaller mu": ({"mu": 0.2}, "mu or rho"),
    "smaller rho": ({"rho": 0.03}, "mu or rho"),
    "smaller noise": ({"noise_std": 1.0}, "noise_std is not"),
    "smaller sensitivity": ({"sensitivity": 0.5}, "sensitivity of add_or_remove_one"),
    "add/remove noise sold as replace-one": (
        {"neighboring_relation": "replace_one"},
        "sensitivity of replace_one",
    ),
    "no charge": ({"ledger": ()}, "not charged"),
    "stamp removed": ({"demonstration": False, "rng": "seeded demonstration"}, "stamp"),
    "stamp forged": ({"demonstration": True}, "stamp"),
    "another grid": ({"grid_bits": 3}, "grid"),
    "another clip norm": ({"clip_norm": 0.7, "sensitivity": 0.7, "noise_std": MULTIPLIER * 0.7}, "grid"),
    "another dimension": ({"dimension": 9}, "shape"),
    "another number of rows": ({"num_rows": 3}, "3 rows were released for 2 classes"),
    "no dimension": ({"dimension": None}, "not stated"),
    "no clip norm": ({"clip_norm": None}, "not stated"),
    "a smaller advantage": ({"risk": risk.gaussian(10 * MULTIPLIER)}, "risk: advantage is stated as"),
    "a larger risk": ({"risk": risk.NO_BOUND}, "risk: belief is stated as 1 but comes to 0.664"),
    "the risk of a demonstration": ({"rng": "seeded demonstration", "demonstration": True}, "but comes to 1"),
    "the risk left out": ({"risk": None}, "only one of risk and schema"),
    "a class too many": ({"class_names": ("0", "1", "2")}, "2 class adapters are listed for 3"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_consistent_looking_lie_is_found(release, lie):
    changes, expected = LIES[lie]
    rewrite(release, **changes)
    problems = verify(release)
    assert any(expected in problem for problem in problems), problems


def swap_adapters(folder):
    weights = folder / "classes" / "0" / "adapter_model.safetensors"
    save_file({"lora_A": np.zeros((2, 3), np.float32)}, weights)


def unlisted_class(folder):
    shutil.copytree(folder / "classes" / "0", folder / "classes" / "2")


def other_base(folder):
    config = folder / "classes" / "1" / "adapter_config.json"
    config.write_text('{"base_model_name_or_path": "another"}')
    rewrite(folder)


def broken_config(folder):
    (folder / "classes" / "1" / "adapter_config.json").write_text("[1]")
    rewrite(folder)


def changed_embedding(folder):
    save_file({"noisy_sum": np.zeros((2, 8))}, folder / "embedding.safetensors")


def float32_embedding(folder):
    save_file({"noisy_sum": np.zeros((2, 8), np.float32)}, folder / "embedding.safetensors")
    rewrite(folder)


def nan_embedding(folder):
    save_file({"noisy_sum": np.full((2, 8), np.nan)}, folder / "embedding.safetensors")
    rewrite(folder)


def truncated_embedding(folder):
    path = folder / "embedding.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    rewrite(folder)


def symlink(folder):
    (folder / "embedding.safetensors").rename(folder.parent / "elsewhere")
    (folder / "embedding.safetensors").symlink_to(folder.parent / "elsewhere")


def outside(folder):
    listed = read(folder).artefact_sha256 | {
        "./README.md": "0" * 64,
        "../../etc/passwd": "0" * 64,
        "/etc/passwd": "0" * 64,
        "a\0b": "0",
    }
    changed = dataclasses.replace(read(folder), artefact_sha256=listed)
    (folder / "certificate.json").write_text(changed.to_json())


def replace_by(path, make):
    path.unlink()
    make(path)


def move_away(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def open_socket(folder):
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(folder):
        one.bind("socket")


def other_weights(folder):
    save_file({"weight": np.zeros(3, np.float16)}, folder / "base" / "diffusion_pytorch_model.safetensors")
    rewrite(folder)


TAMPERINGS = {
    "adapter swapped": (swap_adapters, "is not the file that was released"),
    "class adapter added": (unlisted_class, "classes/2 is not listed"),
    "adapter for another base": (other_base, "classes/1/adapter_config.json is for another base model"),
    "adapter configuration broken": (broken_config, "not the configuration of an adapter"),
    "adapter missing": (lambda f: (f / "classes/0/adapter_model.safetensors").unlink(), "is missing"),
    "embedding changed": (changed_embedding, "is not the file that was released"),
    "embedding in float32": (float32_embedding, "one float64 tensor"),
    "embedding not finite": (nan_embedding, "not finite"),
    "embedding truncated": (truncated_embedding, "not a safetensors file"),
    "embedding a link": (symlink, "embedding.safetensors is a link"),
    "files outside": (outside, "'../../etc/passwd', which is not a file of a release"),
    "pickle added": (lambda f: (f / "weights.pkl").write_bytes(b"x"), "weights.pkl is not listed"),
    "program added": (lambda f: (f / "run.sh").write_text("true"), "run.sh is not listed"),
    "notebook added": (lambda f: (f / "classes/0/demo.ipynb").write_text("{}"), "classes/0/demo.ipynb is not listed"),
    "hidden file added": (lambda f: (f / "base/.profile").write_text(""), "base/.profile is not listed"),
    "unprintable name added": (lambda f: (f / "a\x1b[2J").write_text(""), "'a\\x1b[2J' is not listed"),
    "empty folder added": (lambda f: (f / "classes" / "2").mkdir(), "classes/2 is not listed"),
    "parts added": (
        lambda f: (f / "parts.json").write_text('{"classes/0": 20, "classes/1": 20}'),
        "parts.json is not listed",
    ),
    "parts that do not add up": (
        lambda f: [(f / "parts.json").write_text('{"classes/0": 20, "classes/1": 1}'), rewrite(f)],
        "parts.json is not a list of the adapters",
    ),
    "a listed program": (lambda f: [(f / "run.py").write_text(""), rewrite(f)], "'run.py', which is not a file of a"),
    "pipe added": (lambda f: os.mkfifo(f / "pipe"), "pipe is not listed"),
    "socket added": (open_socket, "socket is not listed"),
    "pipe in place of weights": (
        lambda f: replace_by(f / "classes/0/adapter_model.safetensors", os.mkfifo),
        "adapter_model.safetensors is not a regular file",
    ),
    "pipe in place of the card": (lambda f: replace_by(f / "README.md", os.mkfifo), "README.md is not a regular file"),
    "pipe in place of the certificate": (lambda f: replace_by(f / "certificate.json", os.mkfifo), "cannot be read"),
    "device in place of the card": (
        lambda f: replace_by(f / "README.md", lambda path: path.symlink_to("/dev/zero")),
        "README.md is a link",
    ),
    "certificate a link": (lambda f: move_away(f / "certificate.json"), "cannot be read"),
    "folder a link": (lambda f: move_away(f / "classes" / "0"), "classes/0 is not listed"),
    "endless card": (lambda f: os.truncate(f / "README.md", 2**40), "README.md is larger than"),
    "endless weights": (
        lambda f: os.truncate(f / "classes/0/adapter_model.safetensors", 2**40),
        "adapter_model.safetensors is larger than",
    ),
    "base model swapped": (other_weights, "base is not the base model that the certificate names"),
    "base model missing": (lambda f: [shutil.rmtree(f / "base"), rewrite(f)], "lists no base model"),
    "base model broken": (lambda f: [(f / "base/config.json").write_text("["), rewrite(f)], "is not a base model"),
    "a class's card changed": (
        lambda f: [(f / "classes/0/README.md").write_text("Perfect."), rewrite(f)],
        "the first line of classes/0/README.md",
    ),
    "card changed": (lambda f: (f / "README.md").write_text("Perfectly private."), "README.md"),
    "another risk on a card": (
        lambda f: (f / "README.md").write_text(f"{read(f).sentence}\n\nRisk: none.\n"),
        "the risk in README.md is not that",
    ),
    "card missing": (lambda f: (f / "README.md").unlink(), "README.md is missing"),
    "certificate missing": (lambda f: (f / "certificate.json").unlink(), "cannot be read"),
    "certificate not text": (lambda f: (f / "certificate.json").write_bytes(b"\xff\xfe"), "certificate.json"),
    "certificate a folder": (
        lambda f: [(f / "certificate.json").unlink(), (f / "certificate.json").mkdir()],
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_found(release, name):
    tamper, expected = TAMPERINGS[name]
    tamper(release)
    problems = verify(release)
    assert any(expected in problem for problem in problems), problems


def everything(folder):
    return sorted(path for path in folder.rglob("*") if path.name != "certificate.json")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_file_changed_added_or_taken_away_is_found(intact, tmp_path, data):
    """Whatever else is in the folder than what was written, anywhere and of any kind, is a problem."""
    copy = shutil.copytree(intact, tmp_path / str(len(list(tmp_path.iterdir()))))
    assert verify(copy) == []
    path = data.draw(st.sampled_from(everything(copy)))
    act = data.draw(st.sampled_from(["add", "change", "remove", "link", "pipe", "folder"]))
    if act == "add":
        where = path if path.is_dir() else path.parent
        name = data.draw(st.text("abz.-_é", min_size=1, max_size=8).filter(lambda name: name.strip(".")))
        (where / f"{name}{data.draw(st.sampled_from(['', '.json', '.py', '.safetensors', '.md', '.png']))}").touch()
    elif path.is_dir():
        shutil.rmtree(path)
    elif act == "change":
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    else:
        path.unlink()
        if act == "link":
            path.symlink_to(intact / path.relative_to(copy))
        elif act == "pipe":
            os.mkfifo(path)
        elif act == "folder":
            path.mkdir()
    assert verify(copy) != []


def dp_sgd_folder(folder, charges, **numbers):
    made = certificates.ledger_certificate(
        charges, 1e-5, method="dp_lora", mechanism=certificates.DP_SGD, neighboring_relation="replace_one",
        rng=certificates.FLOAT_NOISE, num_private=50, **numbers,
    )  # fmt: skip
    (folder / "README.md").write_text(made.sentence)
    certificates.write_certificate(made, folder)
    return made


@pytest.mark.parametrize("same_multiplier", [True, False])
@pytest.mark.parametrize("sensitivity, honest", [(1.0, True), (0.5, False)])
def test_a_sampled_run_does_not_excuse_a_full_batch_one(tmp_path, same_multiplier, sensitivity, honest):
    """Under replacement a full batch moves by twice the clip norm, whatever else stands in the ledger."""
    full = LedgerEntry("dp_sgd", "full batches", 2.0, 5e-6, None, 40.0, 1.0, 50, "replace_one")
    sampled = LedgerEntry(
        "dp_sgd", "sampled", 2.0, 5e-6, None, 40.0 if same_multiplier else 41.0, 0.1, 50, "replace_one"
    )
    numbers = dict(noise_multiplier=40.0, noise_std=40.0 * sensitivity, clip_norm=0.5, sensitivity=sensitivity)
    dp_sgd_folder(tmp_path, (full, sampled), **numbers)
    assert any("must be 2 times the clip norm" in problem for problem in verify(tmp_path)) != honest


@pytest.mark.parametrize("kind", ["gaussian", "dp_sgd", "other"])
def test_an_entry_without_a_finite_epsilon_does_not_escape_the_relation(release, kind):
    """Noise for a removal, sold for a replacement, under an entry that states an infinite epsilon."""
    entry = dataclasses.replace(read(release).ledger[-1], kind=kind, epsilon=math.inf)
    assert ledger_epsilon([entry], 1e-5, "replace_one") == math.inf
    rewrite(
        release, ledger=(*read(release).ledger, entry), neighboring_relation="add_or_remove_one",
        mechanism=certificates.GAUSSIAN_SUM,
    )  # fmt: skip
    problems = verify(release)
    assert any("states no finite epsilon, and the certificate does" in problem for problem in problems), problems


def test_entries_for_another_relation_are_named(release):
    entry = gaussian_charge("a noisy score", 30.0, 1e-5, "zero_out")
    rewrite(release, ledger=(*read(release).ledger, entry))
    assert any("'a noisy score' was charged for zero_out" in problem for problem in verify(release))


def test_models_are_compared_with_those_of_this_library(release, tmp_path):
    """Own weights are a note; a hypernetwork of this library with another's encoder or base model is a problem."""
    (glyphs,) = (one for one in verification.shipped_weights() if one.name == "glyphs")
    (nested,) = (one for one in verification.shipped_weights() if one.name == "glyphs-nested")
    assert glyphs.base_model == nested.base_model and not glyphs.encoders & nested.encoders
    assert len(verification.unknown_models(release)) == 1 and verification.shipped_for(release) is None
    rewrite(release, hypernetwork_sha256=glyphs.hypernetwork, encoder_sha256=next(iter(nested.encoders)))
    assert verification.shipped_for(release) == "glyphs"
    problems = verify(release)
    for what in ("encoder", "base model"):
        assert any(f"the {what} is not the one that the hypernetwork of 'glyphs'" in one for one in problems)
    assert verification.unknown_models(tmp_path / "absent") == [] and verification.shipped_for(tmp_path) is None


def test_another_base_model_at_hand(intact):
    assert verify(intact, base_model_sha256="c" * 64) == [
        "the adapters were made for another base model than the one at hand"
    ]


def test_the_checksum_is_not_the_only_guard(release):
    text = (release / "certificate.json").read_text()
    (release / "certificate.json").write_text(
        text.replace('"method": "dp_deepsets"', '"method": "dp_deepset"')
    )
    assert verify(release) == [
        "certificate.json was changed after it was written: its checksum does not match"
    ]


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.data())
def test_fuzzed_certificates_never_raise(intact, release, data):
    """Any field replaced by anything, with a right checksum wherever the result can be read at all."""
    path = release / "certificate.json"
    original = (intact / "certificate.json").read_text()
    values = json.loads(original)
    values[data.draw(st.sampled_from(sorted(values)))] = data.draw(JSON_VALUES)
    values.pop("checksum")
    path.write_text(json.dumps(values | {"checksum": certificates._checksum(values)}))
    assert all(isinstance(problem, str) for problem in verify(release))
    path.write_bytes(original.encode()[: data.draw(st.integers(0, len(original) - 3))])
    assert verify(release) != []


# ---- files ------------------------------------------------------------


def test_atomic_writing_leaves_no_traces(tmp_path):
    artefacts.write_atomic(tmp_path / "a", b"1")
    artefacts.write_atomic(tmp_path / "a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"2"
    with pytest.raises(TypeError):
        artefacts.write_atomic(tmp_path / "b", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_tensor_hashes_see_names_types_shapes_and_values():
    base = {"a": np.zeros((2, 2), np.float32), "b": np.ones(3)}
    variants = [
        base,
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(4), "b": base["b"]},
        {"a": base["a"].astype(np.float64), "b": base["b"]},
        {"a": base["a"] + 1, "b": base["b"]},
    ]
    assert len({artefacts.tensors_sha256(variant) for variant in variants}) == len(variants)
    assert artefacts.tensors_sha256(dict(reversed(base.items()))) == artefacts.tensors_sha256(base)
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in base.items()}
    assert artefacts.tensors_sha256(tensors) == artefacts.tensors_sha256(base)
