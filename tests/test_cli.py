"""The command line: what it refuses, and one release from private images to scores."""

import contextlib
import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bad_images import BAD_INPUT, write_png
from PIL import Image
from scipy.optimize import brentq
from scipy.stats import norm

import hyperdp_lib
from hyperdp_lib import cli, data, embedding

RELEASE = ["--epsilon", "1"]
DIGIT_CLASSES = ["--classes", *map(str, range(10))]


@pytest.fixture
def stub_model(monkeypatch):
    """In place of the shipped model: tells its geometry, and must never be asked for a release."""

    def never(*args, **kwargs):
        raise AssertionError("bad input reached the release")

    base_model = SimpleNamespace(config=SimpleNamespace(sample_size=16, in_channels=1))
    hypernetwork = SimpleNamespace(
        load_weights=lambda name, device: base_model, geometry=lambda name: (16, 1), stretches=lambda name: False
    )
    monkeypatch.setitem(vars(hyperdp_lib), "pretrained", hypernetwork)
    for module in ("releasing", "release_folder"):
        functions = SimpleNamespace(release=never, save_release=never, load_release=never)
        monkeypatch.setitem(vars(hyperdp_lib), module, functions)


@pytest.fixture
def images(tmp_path):
    """A folder of two good images."""
    for name in ("1.png", "2.png"):
        write_png(tmp_path / "images" / name)
    return str(tmp_path / "images")


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must end with code 2 and one line on stderr, with nothing written anywhere."""

    def run(*arguments, expect):
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert cli.main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("hyperdp: ") and printed.err.endswith("\n")
        assert printed.err.count("\n") == 1, printed.err
        assert expect in printed.err
        assert before == {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

    return run


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_INPUT)
def test_release_refuses_bad_images(name, stub_model, refused, tmp_path):
    make, expected = BAD_INPUT[name]
    (tmp_path / "in").mkdir()
    refused("release", make(tmp_path / "in"), *RELEASE, "--out", tmp_path / "out", expect=expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "no privacy budget"),
        (["--epsilon", "1", "--public-size", "0"], "--public-size must be at least 1"),
        (["--epsilon", "1", "--method", "best"], "invalid choice"),
        (["--epsilon", "0"], "--epsilon must be a positive number"),
        (["--epsilon", "-1"], "--epsilon must be a positive number"),
        (["--epsilon", "nan"], "--epsilon must be a positive number"),
        (["--epsilon", "inf"], "--epsilon must be a positive number"),
        (["--epsilon", "one"], "invalid float value"),
        (["--epsilon", "1", "--delta", "0"], "strictly between 0"),
        (["--epsilon", "1", "--delta", "1"], "strictly between 0"),
        (["--epsilon", "1", "--delta", "nan"], "strictly between 0"),
        (["--epsilon", "1", "--neighboring-relation", "swap"], "invalid choice"),
        (["--epsilon", "1", "--device", "abacus"], "device 'abacus' is not available"),
        (["--epsilon", "1", "--seed", "x"], "--seed: must be a whole number"),
        (["--epsilon", "1", "--seed", "-1"], "--seed: must be a whole number"),
        (["--epsilon", "1", "--seed", str(2**63)], "--seed: must be a whole number"),
        (["--epsilon", "1e308"], "--epsilon must be a positive number up to a million"),
        (["--epsilon", "1", "--delta", "1e-70"], "strictly between 0 (1e-60) and 1"),
        (["--epsilon", "1e-300", "--delta", "1e-59"], "budget is too small"),
        (["--epsilon", "1e-10", "--delta", "1e-20"], "noise_multiplier"),
        (["--epsilon", "1", "--device", "meta"], "device 'meta' is not available"),
        (["--epsilon", "1", "--unknown"], "unrecognized arguments"),
    ],
)
def test_release_refuses_bad_options(options, expected, stub_model, refused, images, tmp_path):
    refused("release", images, *options, "--out", tmp_path / "out", expect=expected)


def test_release_refuses_an_output_that_exists(stub_model, refused, images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused("release", images, *RELEASE, "--out", out, expect="add --overwrite")
    write_png(out / "precious.png")
    refused("release", images, *RELEASE, "--out", out, "--overwrite", expect="not an earlier release")
    refused("release", images, *RELEASE, "--out", images, "--overwrite", expect="not an earlier release")
    file = tmp_path / "file"
    file.write_text("precious")
    refused("release", images, *RELEASE, "--out", file, "--overwrite", expect="not an earlier release")
    refused("release", images, *RELEASE, "--out", tmp_path / "no" / "out", expect="cannot write to folder")


def test_missing_or_unknown_commands(refused):
    refused(expect="required: COMMAND")
    refused("releese", expect="invalid choice")


def test_sample_refuses_bad_output(stub_model, refused, images, tmp_path):
    existing = tmp_path / "there.npz"
    existing.write_text("precious")
    refused("sample", images, "--out", existing, expect="add --overwrite")
    refused("sample", images, "--out", tmp_path / "x.npy", expect="must end in .npz")
    refused("sample", images, "--out", tmp_path / "x.npz", "--grid", tmp_path / "g.jpg", expect="end in .png")
    refused("sample", images, "--out", tmp_path / "x.npz", "--num-images", "0", expect="at least 1")
    refused("sample", images, "--out", tmp_path / "x.npz", "--num-steps", "0", expect="at least 1")
    refused("sample", tmp_path / "absent", "--out", tmp_path / "x.npz", expect="no such")


def test_compare_and_verify_refuse_bad_options(refused, tmp_path):
    out = ["--out", tmp_path / "out"]
    refused("compare", "--private", "digits", "--epsilon", "1", "nan", *out, expect="--epsilon")
    refused("compare", "--private", "digits", "--epsilon", "0", *out, expect="--epsilon")
    refused("compare", "--private", "digits", "--epsilon", "-1", "--exact", *out, expect="--epsilon")
    refused("compare", "--private", "digits", "--pair", "a/b", *out, expect="--pair")
    refused("compare", "--private", "digits", "--seed", "-1", *out, expect="--seed")
    refused("compare", "--private", "digits", "--delta", "2", *out, expect="--delta")
    refused("compare", "--private", "digits", "--seeds", "0", *out, expect="--seeds")
    refused("compare", "--private", "digits", "--num-private", "0", *out, expect="--num-private")
    refused("compare", "--private", tmp_path / "absent", *out, expect="no such file")
    (tmp_path / "settings.json").write_text('{"num_images": 2000}')
    settings = ["--settings", tmp_path / "settings.json"]
    refused("compare", "--private", "digits", *settings, *out, expect="make them with tune")
    (tmp_path / "file").write_text("precious")
    refused("compare", "--private", "digits", "--out", tmp_path / "file", expect="is not a folder")
    refused("verify", tmp_path / "absent", expect="no such release")


# ---- one release, from images to scores ------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny hypernetwork with random heads, so that its adapters do change the base model; and features."""
    from hyperdp_lib.diffusion import BaseModelConfig, build_base_model
    from hyperdp_lib.embedding import Encoder, EncoderConfig
    from hyperdp_lib.hypernetwork import HyperNetwork, HyperNetworkConfig
    from hyperdp_lib.pretrained import save_pretrained
    from hyperdp_lib.prior import save_priors

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    base_model = build_base_model(BaseModelConfig(width=32, num_layers=1))
    encoder = Encoder(EncoderConfig(dimension=16, width=8))
    shape = HyperNetworkConfig(hidden=16, head_width=16, num_blocks=1)
    hypernetwork = HyperNetwork(encoder, base_model, shape)
    hypernetwork.head_b.weight.data.normal_(std=0.1)
    save_pretrained(folder, base_model, hypernetwork, {"name": "tiny"})
    save_priors(folder, hypernetwork, torch.rand(40, 2, 1, 16, 16))
    embedding.FeatureNetwork(name="untrained").save(folder / "features.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def digit_folder(tmp_path_factory):
    """8-bit PNGs of real digits in class folders, at their own size."""
    folder = tmp_path_factory.mktemp("digits")
    train = data.digits("train", image_size=8)
    for index, pixels in enumerate(data.to_uint8(train.images)[:60]):
        path = folder / str(int(train.labels[index])) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return str(folder)


@pytest.fixture(scope="module")
def released(weights, digit_folder, tmp_path_factory):
    """A release made by the command, with what it printed."""
    out = tmp_path_factory.mktemp("released") / "release"
    command = ["release", digit_folder, *RELEASE, *DIGIT_CLASSES, "--weights", weights, "--no-refine"]
    printed, notes = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(notes):
        assert cli.main([*command, "--out", str(out)]) == 0
    return SimpleNamespace(folder=out, out=printed.getvalue(), err=notes.getvalue())


def test_release_prints_the_sentence_of_the_certificate(released):
    from hyperdp_lib.certificate import Certificate

    certificate = Certificate.from_json((released.folder / "certificate.json").read_text())
    assert certificate.private and 0.999 < certificate.epsilon <= 1
    assert released.out.splitlines()[1:] == [certificate.sentence, certificate.risk_sentence]
    assert certificate.risk_sentence.startswith("Risk: mu = 0.2681.") and certificate.risk.advantage == 0.106618
    assert (released.folder / "README.md").read_text().splitlines()[:3:2] == released.out.splitlines()[1:]
    assert certificate.num_private is None  # secret under add_or_remove_one
    assert "resized (antialiased) from 8 x 8 to 16 x 16 pixels" in released.err
    assert "warning" not in released.err
    assert (released.folder / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_releases_share_a_budget(weights, digit_folder, tmp_path, capsys):
    command = ["release", digit_folder, "--yes", "--weights", weights, "--no-refine"]
    command += ["--budget", str(tmp_path / "budget")]
    assert cli.main([*command, *RELEASE, "--cap-epsilon", "1.2", "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*command, "--epsilon", "0.5", "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    assert cli.main([*command, *RELEASE, "--out", str(tmp_path / "three")]) == 2
    assert "would exceed; left is epsilon 0." in capsys.readouterr().err and not (tmp_path / "three").exists()
    assert cli.main(["budget", str(tmp_path / "budget"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    spent = [json.loads((tmp_path / name / "certificate.json").read_text())["mu"] for name in ("one", "two")]
    assert [one["mu"] for one in told["releases"]] == pytest.approx(spent)
    assert told["spent"]["mu"] == pytest.approx(math.hypot(*spent)) and 1 < told["spent"]["epsilon"] < 1.2


def test_verify_accepts_it_and_rejects_a_tampered_copy(released, tmp_path, capsys):
    assert cli.main(["verify", str(released.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == released.out.splitlines()[2:]
    copy = tmp_path / "copy"
    shutil.copytree(released.folder, copy)
    (copy / "classes" / "3" / "README.md").write_text("epsilon is 0.01, really")
    capsys.readouterr()
    assert cli.main(["verify", str(copy)]) == 1
    assert "README.md" in capsys.readouterr().out


def test_a_release_is_refined_by_itself_and_costs_the_same(weights, digit_folder, tmp_path):
    from hyperdp_lib.certificate import Certificate

    command = ["release", digit_folder, "--epsilon", "100", *DIGIT_CLASSES, "--weights", weights]
    out = {"once": tmp_path / "once", "refined": tmp_path / "refined"}
    assert cli.main([*command, "--no-refine", "--out", str(out["once"])]) == 0
    assert cli.main([*command, "--out", str(out["refined"])]) == 0
    once, refined = (Certificate.from_json((out[name] / "certificate.json").read_text()) for name in out)
    assert refined.sentence == once.sentence and refined.mu == once.mu and once.post_processing == ()
    (note,) = refined.post_processing
    assert "no further privacy cost" in note and note in (out["refined"] / "classes" / "3" / "README.md").read_text()
    assert cli.main(["verify", str(out["refined"])]) == 0


def test_a_plan_is_printed_without_an_image(unspent, refused, capsys):
    assert cli.main(["plan", "--epsilon", "1", "--classes", "10"]) == 0
    told = capsys.readouterr().out
    assert "epsilon 1 at delta 1e-05 (mu 0.268)" in told and "classes, public: 10 (0, 1," in told
    assert "5% of mu squared buys a noisy count" in told and "for about 10,000 images" in told
    assert cli.main(["plan", "--epsilon", "1", "--public-size", "128", "--json"]) == 0
    budget, size, then = json.loads(capsys.readouterr().out)["plan"]
    assert "about 128" in size and "two sums" in then and "buys" not in budget + size + then
    assert cli.main(["plan", "--epsilon", "1", "--method", "one-sum"]) == 0
    assert "one noisy sum of 64 numbers, decoded once: the paper's method" in capsys.readouterr().out
    refused("plan", expect="no privacy budget; give --epsilon")
    refused("plan", "--epsilon", "1", "--classes", "0", expect="--classes must be names, or a number")
    refused("plan", "--epsilon", "1", "--classes", "a", "a", expect="must all be different")


def test_released_adapters_are_sampled_and_scored(released, weights, tmp_path, capsys):
    out = tmp_path / "samples.npz"
    command = ["sample", str(released.folder), "--weights", weights, "--num-steps", "2"]
    assert cli.main([*command, "--num-images", "135", "--out", str(out)]) == 0
    samples = data.load_images(out)
    assert len(samples) == 135 and samples.class_names == tuple("0123456789")
    assert "in the released (noisy) proportions" in capsys.readouterr().out
    alone = ["sample", str(released.folder), "--num-steps", "2", "--num-images", "135"]  # its base is there
    assert cli.main([*alone, "--out", str(tmp_path / "alone.npz")]) == 0
    assert torch.equal(data.load_images(tmp_path / "alone.npz").images, samples.images)
    capsys.readouterr()
    relabelled = [*command, "--labels", "released", "--num-images", "25", "--json"]
    assert cli.main([*relabelled, "--out", str(tmp_path / "told.npz")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == len(data.load_images(tmp_path / "told.npz")) == 25 and 0 <= told["agreed"] <= 1
    features = f"{weights}/features.safetensors"
    command = ["evaluate", str(out), "--reference", "digits-test", "--features", features, "--weights", weights]
    assert cli.main([*command, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["frechet_distance"] > 0 and 0 <= scores["accuracy"] <= 1


def released_counts(folder, total):
    """Images of each class in the proportions of a plain release's noisy counts, by largest remainders."""
    from safetensors.torch import load_file

    from hyperdp_lib.artefacts import EMBEDDING_TENSOR

    quota = load_file(folder / "embedding.safetensors")[EMBEDDING_TENSOR][:, 0].double().clamp_min(0)
    quota *= total / quota.sum()
    counts = quota.floor().long()
    counts[(quota - counts).argsort(descending=True)[: total - int(counts.sum())]] += 1
    return counts


def test_samples_can_get_their_labels_from_the_release(tmp_path, capsys, refused, monkeypatch):
    out = tmp_path / "release"
    command = ["release", "digits", "--epsilon", "4", "--seed", "0", "--no-refine", "--method", "two-steps"]
    command += ["--out", str(out)]
    assert cli.main(command) == 0
    command = ["sample", str(out), "--num-steps", "4", "--labels", "released", "--out", str(tmp_path / "told.npz")]
    capsys.readouterr()
    assert cli.main([*command, "--num-images", "200"]) == 0
    assert "relabelled; the release agrees with" in capsys.readouterr().out
    samples = data.load_images(tmp_path / "told.npz")
    counts = released_counts(out, 200)
    drawn_for = torch.arange(10).repeat_interleave(counts)
    assert len(samples) == 200 and 0.5 < float((samples.labels == drawn_for).double().mean()) < 1
    alike = torch.zeros(10, 1, 16, 16), torch.zeros(10, dtype=torch.long), 0.1
    monkeypatch.setattr(hyperdp_lib.classifier, "sample_relabelled", lambda *models, **drawing: alike)
    assert cli.main([*command, "--num-images", "10", "--overwrite"]) == 0
    assert "none of '1', '2'," in capsys.readouterr().out


def test_release_options_reach_the_certificate(weights, digit_folder, tmp_path, capsys):
    def run(*options):
        command = ["release", digit_folder, "--yes", "--weights", weights, "--no-refine", "--json"]
        assert cli.main([*command, "--out", str(tmp_path / "out"), *options]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["certificate"], printed.err

    relation = ["--neighboring-relation", "replace_one"]
    certificate, notes = run("--epsilon", "3", "--delta", "0.5", "--method", "one-sum", *relation)
    assert certificate["epsilon"] == 3 and certificate["delta"] == 0.5 and "above 1/n" in notes
    assert certificate["neighboring_relation"] == "replace_one" and not certificate["demonstration"]
    assert len([entry for entry in certificate["ledger"] if entry["kind"] == "gaussian"]) == 1
    certificate, notes = run("--epsilon", "2", "--seed", "0", "--unlabelled", "--overwrite")
    assert certificate["demonstration"] and "NOT PRIVATE" in notes and certificate["class_names"] == []
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "NOT PRIVATE" in readme and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "classes").exists()  # nothing of the earlier release is left
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    _, notes = run("--epsilon", "2", "--invert", "--overwrite")
    assert "better without --invert" in notes  # digits are white on black already


SHIPPED = Path(hyperdp_lib.__file__).parent / "weights" / "glyphs" / "manifest.json"


@pytest.mark.skipif(not SHIPPED.is_file(), reason="this copy of the library has no weights")
def test_with_the_shipped_weights_from_png_files_to_scores(weights, refused, tmp_path, capsys):
    train = data.digits("train", image_size=28)
    for index, pixels in enumerate(data.to_uint8(train.images)):
        path = tmp_path / "images" / str(int(train.labels[index])) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    out, samples = tmp_path / "release", tmp_path / "samples.npz"
    assert cli.main(["release", str(tmp_path / "images"), "--yes", "--epsilon", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-2].startswith("This adapter is (epsilon = 8, delta = 1e-05)-differentially")
    assert "from 28 x 28 to 16 x 16" in printed.err and "warning" not in printed.err
    assert cli.main(["verify", str(out)]) == 0
    assert cli.main(["sample", str(out), "--num-images", "300", "--out", str(samples)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(samples), "--reference", "digits-test", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["features"] == "glyphnet" and scores["label"] == "research metric, not DP"
    assert scores["real"]["frechet_distance"] < scores["frechet_distance"] < scores["public"]["frechet_distance"]
    assert scores["public"]["num_images"] == 300 and scores["real"]["num_images"] == 180
    assert scores["real"]["accuracy"] > scores["accuracy"] and scores["public"]["accuracy"] is None
    assert scores["accuracy"] > 0.4 and scores["recall"] > 0  # chance is 0.1; the benchmark asks for more
    other = ["--labels", "released", "--weights", weights, "--out", tmp_path / "x.npz"]
    refused("sample", out, *other, expect="was not made with this hypernetwork's encoder")
    factors = next((out / "classes" / "3").rglob("adapter_model.safetensors"))
    content = bytearray(factors.read_bytes())
    content[-1] ^= 1  # one bit
    factors.write_bytes(content)
    assert cli.main(["verify", str(out)]) == 1
    assert f"{factors.relative_to(out)} is not the file" in capsys.readouterr().out


def test_an_interrupted_release_leaves_nothing(weights, digit_folder, tmp_path, monkeypatch, capsys):
    from hyperdp_lib import certificate

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for module in (certificate, hyperdp_lib.release_folder):  # wherever the last file's writer is looked up
        monkeypatch.setattr(module, "write_certificate", interrupted, raising=False)
    command = ["release", digit_folder, "--yes", "--epsilon", "1", "--weights", weights, "--no-refine"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.endswith("hyperdp: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_release_refuses_unknown_hypernetworks(refused, images, tmp_path):
    out = ["--out", tmp_path / "out"]
    refused("release", images, *RELEASE, *out, "--weights", "nonesuch", expect="no hypernetwork")


# ---- before anything is spent ----------------------------------------------------------------------------


@pytest.fixture
def unspent(monkeypatch):
    """The mechanism must not be called."""
    from hyperdp_lib import mechanism

    def never(*args, **kwargs):
        raise AssertionError("the budget was spent")

    monkeypatch.setattr(mechanism, "noisy_sum", never)


def answer(monkeypatch, text):
    """A terminal at which somebody types this; what was asked is on stderr."""
    typed = io.StringIO(text)
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_a_dry_run_tells_and_spends_nothing(unspent, digit_folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    command = ["release", digit_folder, "--epsilon", "1", "--dry-run"]
    assert cli.main([*command, "--sheet", str(sheet)]) == 0
    told = capsys.readouterr().out
    facts = "images: 60, grey", "classes, which become public: 10 (0, 1,", "epsilon 1 at delta 1e-05", "from 8 x 8 to"
    for expected in (*facts, "noise over signal: about ", "weights: glyphs look nearest"):
        assert expected in told
    (recommended,) = [line for line in told.splitlines() if line.startswith("recommended: ")]
    options = cli._parser().parse_args(shlex.split(recommended.removeprefix("recommended: hyperdp ")))
    assert (options.images, options.epsilon, options.weights) == (digit_folder, 1.0, "glyphs")
    assert (options.public_size, options.method) == (None, "auto")
    with Image.open(sheet) as opened:
        assert opened.size[0] > 600
    assert list(tmp_path.iterdir()) == [sheet]
    assert cli.main([*command, "--json", "--invert", "--unlabelled"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert "--invert --unlabelled" in plain["facts"][-1] and "classes: none, one adapter" in plain["facts"]


def test_what_a_careful_operator_would_change_comes_first(unspent, weights, tmp_path, capsys):
    """Inverted images, three images, a large epsilon and delta: each is said while nothing is spent."""
    data.save_npz(tmp_path / "white.npz", data.ImageSet(-data.digits("train").images[:3]))
    command = ["release", str(tmp_path / "white.npz"), "--weights", weights, "--dry-run", "--json"]
    assert cli.main([*command, "--epsilon", "50", "--delta", "0.4"]) == 0
    advice = " ".join(json.loads(capsys.readouterr().out)["advice"])
    assert "better with --invert" in advice and "epsilon 50 promises little" in advice and "above 1/n" in advice
    assert cli.main([*command, "--epsilon", "1", "--invert"]) == 0
    advice = " ".join(json.loads(capsys.readouterr().out)["advice"])
    assert "the noise prevails" in advice and "--invert" not in advice


def test_an_earlier_release_of_the_folder_adds_up(unspent, released, weights, digit_folder, capsys):
    command = ["release", digit_folder, *RELEASE, *DIGIT_CLASSES, "--weights", weights, "--dry-run"]
    assert cli.main([*command, "--out", str(released.folder)]) == 0

    def delta(epsilon, mu):  # of the Gaussian mechanism (Balle & Wang 2018)
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)

    mu = brentq(lambda mu: delta(1.0, mu) - 1e-5, 0.1, 1)
    together = brentq(lambda epsilon: delta(epsilon, math.sqrt(2) * mu) - 1e-5, 0.5, 5)
    assert f"both cost epsilon {together:.4g} together" in capsys.readouterr().out


def test_the_names_of_class_folders_are_declared_or_asked_for(unspent, weights, digit_folder, refused, tmp_path):
    command = ["release", digit_folder, *RELEASE, "--weights", weights, "--out", tmp_path / "out"]
    refused(*command, expect="would become public: add --classes 0 1 2 3 4 5 6 7 8 9, or --yes, or --unlabelled")
    refused(*command[:-2], expect="give --out, or --dry-run")
    refused(*command, "--sheet", tmp_path / "sheet.png", expect="it goes with --dry-run")


@pytest.mark.parametrize("typed", ["n\n", "", "yess\n"])
def test_a_terminal_is_asked_and_no_is_no(typed, unspent, weights, digit_folder, tmp_path, monkeypatch, capsys):
    answer(monkeypatch, typed)
    command = ["release", digit_folder, *RELEASE, "--weights", weights, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert capsys.readouterr().err.endswith("[y/N] hyperdp: not released; nothing was spent\n")
    assert not (tmp_path / "out").exists()


def test_a_terminal_is_asked_and_yes_is_yes(weights, digit_folder, tmp_path, monkeypatch, capsys):
    answer(monkeypatch, "y\n")
    command = ["release", digit_folder, *RELEASE, "--weights", weights, "--no-refine"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "[y/N]" in capsys.readouterr().err and (tmp_path / "out" / "certificate.json").is_file()


def test_input_that_looks_wrong_waits_for_somebody_to_say_that_it_is_right(weights, refused, tmp_path, capsys):
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 8, np.uint8)).save(tmp_path / "b.png")
    command = ["release", tmp_path, *RELEASE, "--weights", weights, "--no-refine"]
    refused(*command, "--out", tmp_path.parent / "waits", expect="or add --yes if it is meant so")
    assert cli.main([*map(str, command), "--yes", "--out", str(tmp_path.parent / "waits")]) == 0


@pytest.mark.parametrize("labels", [[0, 1, 1, 1, 2], [0, 1, 1, 1, 1], [1, 1, 1, 1, 2]])
def test_whether_a_class_is_empty_does_not_show(labels, weights, tmp_path, capsys):
    """Taking the only image of a class away changes neither folders nor anything but noise."""
    images = torch.rand(5, 1, 16, 16) * 2 - 1
    labels = torch.tensor(labels)
    arrays = {"images": data.to_uint8(images), "labels": labels.numpy()}
    np.savez(tmp_path / "private.npz", **arrays)
    command = ["release", str(tmp_path / "private.npz"), "--epsilon", "1", "--weights", weights]
    command += ["--no-refine", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2 and "--classes" in capsys.readouterr().err  # never read off the labels
    assert cli.main([*command, "--classes", "a", "b", "c"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "classes").iterdir()) == ["a", "b", "c"]
    stated = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert "class names: a, b, c" in [entry["description"] for entry in stated["ledger"]]
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def test_an_empty_folder_is_released_as_noise(weights, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    command = ["release", str(tmp_path / "in"), *RELEASE, "--weights", weights, "--no-refine"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "images: 0" in capsys.readouterr().err and cli.main(["verify", str(tmp_path / "out")]) == 0


# ---- sample ----------------------------------------------------------------------------------------------


def tiny_base(seed):
    """A denoiser of the shipped one's kind, untrained."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 1}
    return DiTTransformer2DModel(
        in_channels=1, sample_size=16, patch_size=4, num_embeds_ada_norm=1, **shape
    ).eval()


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """Releases with and without classes, for a tiny base model; a sampler whose images tell their adapter."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    from hyperdp_lib.adapter import Adapter, lora_geometry, save_adapter
    from hyperdp_lib.artefacts import EMBEDDING_TENSOR, tensors_sha256
    from hyperdp_lib.certificate import gaussian_certificate, write_certificate
    from hyperdp_lib.mechanism import GaussianSum

    base_models = {"glyphs": tiny_base(0), "other": tiny_base(1)}
    lora_config = LoraConfig(r=2, lora_alpha=2, target_modules=r".*attn1\.to_q")
    base_model = base_models["glyphs"]
    classes = ("zero", "one", "two")
    adapter = Adapter.no_change(lora_config, lora_geometry(base_model, lora_config), names=classes)
    for folder, names in (("labelled", classes), ("unlabelled", ())):
        card = {"base_model_name_or_path": "base", "model_card": "-"}
        (tmp_path / folder).mkdir()
        for name in names:
            save_adapter(adapter[name], tmp_path / folder / "classes" / name, **card)
        if not names:
            save_adapter(adapter["one"], tmp_path / folder, **card)
        certificate = gaussian_certificate(
            GaussianSum(dimension=4, noise_multiplier=4.0, num_rows=max(1, len(names))),
            1e-5,
            seeded=True,
            base_model_sha256=tensors_sha256(base_model.state_dict()),
            class_names=names,
        )
        write_certificate(certificate, tmp_path / folder)
    # noisy counts of 30, less than none, and 10
    noisy_sum = torch.tensor([[15.0, 9, 9, 9], [-1.0, 9, 9, 9], [5.0, 9, 9, 9]], dtype=torch.float64)
    for folder, rows in (("labelled", noisy_sum), ("unlabelled", noisy_sum[:1].clone())):
        save_file({EMBEDDING_TENSOR: rows}, tmp_path / folder / "embedding.safetensors")

    def sample_classes(base_model, adapter, num_classes, per_class, *, generator, num_steps, progress):
        assert num_classes == len(adapter)
        owner = torch.arange(num_classes).repeat_interleave(torch.tensor(per_class))
        levels = (owner + 0.2 + 0.6 * torch.rand(len(owner), generator=generator)) / 10
        return levels.view(-1, 1, 1, 1).expand(-1, 1, 16, 16)

    monkeypatch.setattr(hyperdp_lib.diffusion, "sample_classes", sample_classes)
    load = SimpleNamespace(load_pretrained=lambda name: (base_models[name], None))
    monkeypatch.setitem(vars(hyperdp_lib), "pretrained", load)
    return tmp_path


def test_sample_shares_images_equally_on_request(releases, capsys):
    out, grid = releases / "x.npz", releases / "x.png"
    command = ["sample", str(releases / "labelled"), "--out", str(out), "--grid", str(grid)]
    command += ["--balanced", "--num-images"]
    assert cli.main([*command, "8"]) == 0
    assert capsys.readouterr().out == f"wrote 8 images to {out} and {grid}, as many of each class\n"
    samples = data.load_images(out)
    assert samples.class_names == ("zero", "one", "two")
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    # the sampler's level says which adapter made an image
    assert (samples.images.mean((1, 2, 3)) * 10).floor().tolist() == samples.labels.tolist()
    assert grid.read_bytes()[:4] == b"\x89PNG"
    first = out.read_bytes()
    assert cli.main([*command, "8"]) == 2  # both files are there
    capsys.readouterr()
    assert cli.main([*command, "8", "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_images"] == 8 and told["proportions"] == "balanced"
    assert told["images_per_class"] == {"zero": 3, "one": 3, "two": 2}
    assert out.read_bytes() == first  # same seed, same bytes
    assert cli.main([*command, "8", "--overwrite", "--seed", "1"]) == 0
    assert out.read_bytes() != first


def test_sample_draws_classes_in_the_released_proportions(releases, capsys):
    """Counts of 30, less than none, and 10: the shares 3/4, 0, 1/4 of nine images, by largest remainders."""
    out = releases / "x.npz"
    command = ["sample", str(releases / "labelled"), "--out", str(out), "--num-images", "9"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert printed == f"wrote 9 images to {out}, classes in the released (noisy) proportions, none of 'one'\n"
    with np.load(out) as samples:
        assert samples["class_names"].tolist() == ["zero", "one", "two"]
        assert samples["labels"].tolist() == [0] * 7 + [2] * 2
        levels = data.from_levels(torch.from_numpy(samples["images"])).flatten(1).mean(1)
    assert (levels * 10).floor().tolist() == [0] * 7 + [2] * 2
    assert cli.main([*command, "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["proportions"] == "released" and told["images_per_class"] == {"zero": 7, "one": 0, "two": 2}


def test_sample_without_classes_has_no_labels(releases):
    out = releases / "x.npz"
    assert cli.main(["sample", str(releases / "unlabelled"), "--out", str(out), "--num-images", "5"]) == 0
    samples = data.load_images(out)
    assert len(samples) == 5 and samples.labels is None


def test_sample_refuses_another_base_model_and_tampering(releases, refused):
    out = ["--out", releases / "x.npz"]
    for name in ("labelled", "unlabelled"):
        refused("sample", releases / name, *out, "--weights", "other", expect="for another base model")
    refused("sample", releases, *out, expect="no release in")
    certificate = releases / "labelled" / "certificate.json"
    certificate.write_text(certificate.read_text().replace("zero", "ZERO"))
    refused("sample", releases / "labelled", *out, expect="see hyperdp verify")
    certificate.write_text("{")
    refused("sample", releases / "labelled", *out, expect="see hyperdp verify")


# ---- evaluate --------------------------------------------------------------------------------------------


@pytest.fixture
def feature_file(tmp_path):
    """Features that were never trained: enough to see the scores come out."""
    torch.manual_seed(0)
    embedding.FeatureNetwork(name="untrained").save(tmp_path / "features.safetensors")
    return str(tmp_path / "features.safetensors")


@pytest.fixture
def research(feature_file, weights, capsys):
    """Runs evaluate against a reference with quick models; what it prints, as JSON or as text."""

    def run(samples, *options, reference="digits-test", features=feature_file):
        command = ["evaluate", str(samples), "--reference", str(reference), "--features", features]
        assert cli.main([*command, "--weights", weights, *options]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in options else printed

    return run


def test_evaluate_prints_each_score_between_its_ends(research):
    scores = research("digits", "--json")
    assert scores["label"] == "research metric, not DP" and scores["features"] == "untrained"
    assert scores["accuracy"] > 0.97  # trained on the real ones, all there is to know
    assert 0 < scores["frechet_distance"] < 1 and scores["precision"] > 0.8 and scores["recall"] > 0.8
    assert (scores["num_images"], scores["num_reference"]) == (1437, 360) and scores["reasons"] == {}
    real, public = scores["real"], scores["public"]
    assert (real["num_images"], real["num_reference"]) == (180, 180) and real["accuracy"] > 0.9
    assert (public["num_images"], public["num_reference"]) == (500, 360)
    assert real["frechet_distance"] < public["frechet_distance"] and public["precision"] < 0.2 < real["precision"]
    assert public["accuracy"] is None and "public model have none" in public["reasons"]["accuracy"]
    lines = research("digits").splitlines()
    rows = {line[:18].strip(): line[18:].split() for line in lines}
    assert rows[""] == ["real", "samples", "public", "alone"] and rows["images"] == ["180", "1437", "500"]
    told = [real["frechet_distance"], scores["frechet_distance"], public["frechet_distance"]]
    assert rows["Fréchet distance"] == [f"{value:.1f}" for value in told]
    assert rows["accuracy"] == [f"{real['accuracy']:.2f}", f"{scores['accuracy']:.2f}", "-"]


def test_evaluate_with_few_images_says_which_side_is_short_and_scores_the_rest(research, tmp_path):
    train, test, few = data.digits("train"), data.digits("test"), tmp_path / "few.npz"
    data.save_npz(few, data.ImageSet(test.images[:100], test.labels[:100], test.class_names))
    scores = research("digits", "--json", reference=few)
    assert scores["frechet_distance"] is None and scores["accuracy"] > 0.9 and scores["precision"] > 0.8
    assert scores["reasons"] == {
        "frechet_distance": "a Fréchet distance in 64 features needs at least 128 images on each side; "
        "of the reference images there are 100."
    }
    assert scores["real"]["precision"] > 0
    assert "one half of the reference" in scores["real"]["reasons"]["frechet_distance"]
    assert "of the reference images there are 100" in research("digits", reference=few)
    few.unlink()
    data.save_npz(few, data.ImageSet(train.images[:100], train.labels[:100], train.class_names))
    scores = research(few, "--json")
    assert scores["accuracy"] > 0.8 and "of the samples there are 100" in scores["reasons"]["frechet_distance"]


def test_evaluate_says_why_the_public_end_is_missing(research):
    scores = research("digits", "--json", "--weights", "photographs")
    assert scores["frechet_distance"] > 0 and scores["public"]["frechet_distance"] is None
    assert "name other weights with --weights" in scores["public"]["reasons"]["frechet_distance"]


def test_evaluate_leaves_accuracy_out_when_it_cannot_know(research, tmp_path):
    train = data.digits("train")
    samples = tmp_path / "samples.npz"
    data.save_npz(samples, data.ImageSet(train.images))
    scores = research(samples, "--json")
    assert scores["accuracy"] is None and "the samples have none" in scores["reasons"]["accuracy"]
    samples.unlink()
    data.save_npz(samples, data.ImageSet(train.images, train.labels, tuple("abcdefghij")))
    scores = research(samples, "--json")
    assert scores["accuracy"] is None and "name their classes differently" in scores["reasons"]["accuracy"]


@pytest.mark.parametrize("score", ["clipped-frechet-distance", "accuracy"])
def test_evaluate_against_private_images_is_noisy_and_charged(score, feature_file, weights, tmp_path, capsys):
    samples, train = tmp_path / "samples.npz", data.digits("train")
    # six classes under wrong names: an accuracy near 0.4, for one near 1 is cut off there, noise and all
    wrong = torch.where(train.labels < 6, train.labels ^ 1, train.labels)
    data.save_npz(samples, data.ImageSet(train.images, wrong, train.class_names))
    asked = ["evaluate", str(samples), "--private", "digits-test", "--score", score, "--features", feature_file]
    asked += ["--weights", weights]
    found, name = [], score.replace("-", "_")
    for _ in range(2):
        assert cli.main([*asked, "--epsilon", "0.5", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    first, second = found
    assert first["label"] == "differentially private" and first[name] != second[name]
    assert first["charge"]["epsilon"] == pytest.approx(0.5, rel=1e-5) and first["charge"]["kind"] == "gaussian"
    ends = {"noise_floor", "public"} if name != "accuracy" else {"chance", "precision", "recall"}
    shared = {"label", "score", name, "standard_error", "reasons", "neighboring_relation", "charge"}
    assert set(first) == shared | ends and "frechet_distance" not in first
    if name == "accuracy":
        assert first["chance"] == 0.1 and first["precision"] is None and "no noisy ones" in str(first["reasons"])
    else:
        assert first["public"] == second["public"] > 0  # public images against public samples: no noise, no charge
    assert cli.main([*asked, "--epsilon", "0.5", "--seed", "0"]) == 0
    printed = capsys.readouterr().out
    assert "NOT PRIVATE" in printed
    assert ("chance: 0.1" if name == "accuracy" else "a perfect match, under this noise: ") in printed


def test_evaluate_refuses_scores_without_a_price_and_prices_without_a_score(feature_file, refused, images):
    refused("evaluate", "digits", expect="give either --reference")
    refused("evaluate", "digits", "--private", "digits", "--reference", "digits", expect="give either --reference")
    refused("evaluate", "digits", "--private", "digits", expect="no privacy budget")
    refused("evaluate", "digits", "--private", "digits", "--epsilon", "0", expect="positive number")
    refused("evaluate", "digits", "--private", "digits", "--epsilon", "1", "--delta", "2", expect="--delta")
    refused("evaluate", "digits", "--reference", "digits", "--epsilon", "1", expect="are for --private")
    asked = ["--private", images, "--epsilon", "1", "--score", "accuracy", "--features", feature_file]
    refused("evaluate", "digits", *asked, expect="classes of the same names")


def test_evaluate_refuses_what_has_no_score_and_unknown_features(feature_file, refused, images, tmp_path):
    known = ["--reference", "digits-test", "--features", feature_file]
    refused("evaluate", tmp_path / "absent.npz", *known, expect="no such file")
    refused("evaluate", "digits", "--reference", tmp_path / "absent.npz", expect="no such file")
    refused("evaluate", "digits", "--reference", "digits", "--features", "absent", expect="no feature")
    refused("evaluate", images, *known, expect="of the samples there are 2")


# ---- compare and train -----------------------------------------------------------------------------------


def test_compare_passes_its_options_on(monkeypatch, capsys, tmp_path):
    def compare(private, **options):
        asked.update(options, private=private)
        return [tmp_path / "a.json", tmp_path / "b.json"]

    asked = {}
    monkeypatch.setitem(vars(hyperdp_lib.experiments), "comparison", SimpleNamespace(compare=compare))
    command = "compare --private digits --methods all --epsilon 1 4 --num-private 128 --seeds 3 --out".split()
    assert cli.main([*command, str(tmp_path)]) == 0
    assert asked["private"] == "digits" and asked["methods"] == ["all"] and asked["epsilons"] == [1.0, 4.0]
    assert asked["num_private"] == 128 and list(asked["seeds"]) == [0, 1, 2] and asked["out"] == tmp_path
    assert asked["pair"] is None and asked["exact"] is False
    assert capsys.readouterr().out.startswith("2 records in ")
    one_cell = "compare --private digits --pair mine --epsilon inf 0 --exact --seed 2 --out".split()
    assert cli.main([*one_cell, str(tmp_path)]) == 0
    assert asked["epsilons"] == [math.inf, 0.0] and list(asked["seeds"]) == [2]
    assert asked["pair"] == "mine" and asked["exact"] is True
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["records"]) == 2


def test_train_resumes_unless_told_otherwise(monkeypatch, tmp_path):
    asked = []

    def train(preset, **options):
        asked.append((preset, options))
        return tmp_path / "weights"

    training = SimpleNamespace(train=train)
    monkeypatch.setitem(vars(hyperdp_lib.public), "training", training)
    assert cli.main(["train", "--preset", "glyphs"]) == 0
    assert cli.main(["train", "--preset", "glyphs", "--restart", "--out", str(tmp_path)]) == 0
    assert [preset for preset, _ in asked] == ["glyphs", "glyphs"]
    assert [options["resume"] for _, options in asked] == [True, False] and asked[1][1]["out"] == tmp_path
    assert cli.main(["train", "--preset", "glyphs", "--seed", "3"]) == 0
    assert [options["seed"] for _, options in asked] == [None, None, 3]


# ---- manners ---------------------------------------------------------------------------------------------


def test_help_needs_no_torch():
    check = "import sys, hyperdp_lib.cli; hyperdp_lib.cli._parser(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("command", "plan release budget sample evaluate compare forecast train audit verify".split())
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and command in capsys.readouterr().out


def test_interruption_is_quiet(monkeypatch, capsys, tmp_path):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(hyperdp_lib.verification, "verify", interrupted)
    assert cli.main(["verify", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "hyperdp: interrupted\n"


def test_other_errors_are_not_swallowed(monkeypatch, tmp_path):
    def broken(folder):
        raise ValueError("a bug, not bad input")

    monkeypatch.setattr(hyperdp_lib.verification, "verify", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["verify", str(tmp_path)])


def test_verify_reports_problems(monkeypatch, capsys, tmp_path):
    problems = ["epsilon does not recompute"]
    monkeypatch.setattr(hyperdp_lib.verification, "verify", lambda folder: problems)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "epsilon does not recompute\n"
    assert cli.main(["verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"ok": False, "problems": problems, "notes": [], "risk": None}
    problems.clear()
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("ok: ")


def test_a_public_size_decides_the_coordinates_and_stands_in_the_ledger(digit_folder, tmp_path, capsys):
    """With the shipped weights: few images and much noise make a shorter sum than many."""
    command = ["release", str(digit_folder), "--unlabelled", "--epsilon", "1", "--no-refine", "--seed", "0"]
    dimensions = {}
    for size in (12, 100_000):
        out = tmp_path / str(size)
        assert cli.main([*command, "--public-size", str(size), "--out", str(out)]) == 0
        stated = json.loads((out / "certificate.json").read_text())
        dimensions[size] = stated["dimension"]
        (declared,) = [entry for entry in stated["ledger"] if entry["kind"] == "declared_public"]
        assert f"about {size}" in declared["description"] and declared["epsilon"] == 0
        assert f"about {size}" in capsys.readouterr().err
        assert cli.main(["verify", str(out)]) == 0
    assert dimensions[12] < dimensions[100_000] == 64 * 65  # cells of a count and 64 coordinates


def test_a_release_of_cells_is_verified_and_sampled(digit_folder, tmp_path, capsys):
    """Enough images for several cells: a class is a mixture of PEFT adapters, drawn in their proportions."""
    from hyperdp_lib import verification

    out, drawn = tmp_path / "out", tmp_path / "drawn.npz"
    command = ["release", str(digit_folder), "--yes", "--epsilon", "1000", "--seed", "0", "--no-refine"]
    assert cli.main([*command, "--public-size", "2000", "--out", str(out)]) == 0
    shares = json.loads((out / "parts.json").read_text())
    classes = json.loads((out / "certificate.json").read_text())["class_names"]
    assert len(shares) > len(classes) and sum(shares.values()) == 20 * len(classes)
    assert all((out / where / "adapter_config.json").is_file() for where in shares)
    assert (out / "samples.png").is_file() and cli.main(["verify", str(out)]) == 0
    assert verification.shipped_for(out) == "glyphs-nested" and verification.unknown_models(out) == []
    command = ["sample", str(out), "--num-images", "25", "--num-steps", "2", "--balanced"]
    assert cli.main([*command, "--out", str(drawn), "--overwrite"]) == 0
    samples = data.load_images(drawn)
    assert samples.class_names == tuple(classes)
    assert samples.labels.bincount().tolist() == [3, 3, 3, 3, 3, 2, 2, 2, 2, 2]
    capsys.readouterr()
