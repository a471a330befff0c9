"""Files from anywhere: whatever is in them, a command answers in words, executes nothing and writes nothing elsewhere.

A few hundred cases by default; ten thousand of each kind with ``pytest -m slow tests/test_fuzzing.py``.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from hyperdp_lib import cli, data, image_files, pretrained, release_folder, releasing, verification
from hyperdp_lib.auditing.pipeline import release
from hyperdp_lib.baselines.dp_lora import DPLoraConfig
from hyperdp_lib.data import InputError
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.experiments.methods import Settings
from hyperdp_lib.release_folder import save_release

# ---- what must not happen ------------------------------------------------------------------------------------

_watched: list[str] | None = None  # what happened while somebody watched; the hook itself cannot be taken back
_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.spawn", "socket.connect")
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.")


def _hook(event, arguments):
    if _watched is None:
        return
    if event.startswith(_FORBIDDEN) or event.startswith(_CHANGES):
        _watched.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _watched.append(f"open for writing {arguments[0]}")


sys.addaudithook(_hook)


@contextmanager
def harmless():
    """Nothing inside executes foreign code, starts a program, or changes a file."""
    global _watched
    _watched = []
    try:
        yield
    finally:
        seen, _watched = _watched, None
    assert seen == []


def test_the_watch_sees_harm(tmp_path):
    with pytest.raises(AssertionError, match="open for writing"), harmless():
        (tmp_path / "x").write_text("x")
    with pytest.raises(AssertionError, match="os.system"), harmless():
        os.system("true")
    with pytest.raises(AssertionError, match="pickle.find_class"), harmless():
        np.load(io.BytesIO(_pickled()), allow_pickle=True)


# ---- files ---------------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self):
        return os.getpid, ()


def _pickled():
    file = io.BytesIO()
    np.save(file, np.array([_Bomb()], dtype=object), allow_pickle=True)
    return file.getvalue()


def _npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def _image(kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


IMAGES = {suffix: _image(kind) for suffix, kind in
          dict(png="PNG", jpg="JPEG", bmp="BMP", gif="GIF", webp="WEBP", tif="TIFF", ppm="PPM").items()}  # fmt: skip
GOOD_NPZ = _npz(images=np.arange(4 * 25, dtype=np.uint8).reshape(4, 5, 5), labels=np.arange(4) % 2)


@st.composite
def damaged(draw, original):
    """Bytes with a few changed, cut out, repeated or put in, maybe cut short."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        what = draw(st.sampled_from(["change", "cut", "repeat", "insert", "truncate"]))
        length = draw(st.integers(1, 12))
        if what == "change":
            content[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif what == "cut":
            del content[at : at + length]
        elif what == "repeat":
            content[at:at] = content[at : at + 20 * length]
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=length))
        else:
            del content[at:]
    return bytes(content)


ANY_ARRAY = st.one_of(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.int64, np.uint64, np.float32, np.float64, np.bool_, np.complex64]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    hnp.arrays(hnp.unicode_string_dtypes(max_len=5), hnp.array_shapes(max_dims=2, max_side=4)),
    hnp.arrays(hnp.datetime64_dtypes() | hnp.byte_string_dtypes(max_len=3), hnp.array_shapes(max_dims=2, max_side=4)),
)


@st.composite
def any_npz(draw):
    names = draw(st.sets(st.sampled_from(["images", "labels", "class_names", "other"]), max_size=4))
    arrays = {name: draw(ANY_ARRAY) for name in sorted(names)}
    if draw(st.booleans()):
        arrays["images"] = np.zeros((draw(st.integers(1, 5)), 4, 4), np.uint8)
    content = _npz(**arrays)
    if draw(st.integers(0, 3)):
        return content
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):  # a name twice
        archive.writestr(draw(st.sampled_from(["images.npy", "../out.npy", "labels.npy"])), _pickled())
    return file.getvalue()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated_json(draw, original):
    """A JSON text with one value replaced, anywhere, or some bytes damaged; or any JSON; or nested far too deep."""
    kind = draw(st.sampled_from(["value", "value", "bytes", "any", "deep"]))
    if kind == "any":
        return json.dumps(draw(JSON)).encode()
    if kind == "deep":
        return b"[" * draw(st.sampled_from([100, 5000]))
    if kind == "bytes":
        return draw(damaged(original))
    values = at = json.loads(original)
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            break
        at = at[key]
    at[key] = draw(JSON)
    return json.dumps(values).encode()


# ---- what is done with them ------------------------------------------------------------------------------------

BASE, _NETWORK = pretrained.load_pretrained()
GOOD_SETTINGS = Settings().with_config("dp_lora", 1.0, DPLoraConfig()).to_json().encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release of two classes, a feature network, and an empty folder for images; see `READ`."""
    folder = tmp_path_factory.mktemp("fuzz")
    images, labels = torch.zeros(4, 1, 16, 16), torch.arange(4) % 2
    made = release(images, _NETWORK, epsilon=1.0, private_labels=labels, class_names=("a", "b"), seed=0)
    save_release(folder / "release", made, BASE, num_samples=0)
    shutil.copy(folder / "release" / "certificate.json", folder)
    FeatureNetwork(dimension=4).save(folder / "features.safetensors")
    (folder / "images").mkdir()
    return folder


def read_images(folder):
    read = data.load_images(folder / "images")
    assert read.images.shape == (1, 1, 16, 16) and read.images.abs().max() <= 1


def read_npz(folder):
    """By the library, and by a whole command as far as the release itself."""
    asked = ["release", str(folder / "x.npz"), "--epsilon", "1", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setattr(pretrained, "load_weights", lambda name, device: pretrained.Weights(BASE, _NETWORK))
        patch.setattr(releasing, "release", lambda *args, **kwargs: cli._refuse("good images"))
        assert cli.main(asked) == 2
    assert all(line.startswith("hyperdp: ") for line in printed.getvalue().splitlines())
    read = data.load_images(folder / "x.npz")
    assert read.images.shape[1:] == (1, 16, 16)


def read_release(folder):
    problems = verification.verify(folder / "release")
    assert all(isinstance(one, str) for one in problems)
    again = release_folder.load_release(folder / "release", BASE)  # no InputError from here on
    unchanged = again.certificate.to_json() == (folder / "certificate.json").read_text()
    assert problems or unchanged  # as after a change of spaces in the certificate


def read_settings(folder):
    assert isinstance(Settings.from_json(cli._text(folder / "settings.json")), Settings)


def read_features(folder):
    FeatureNetwork.from_pretrained(folder / "features.safetensors")


READ = {  # what is damaged, how, and who reads it
    "images/x.png": (st.sampled_from([*IMAGES.values()]).flatmap(damaged), read_images),
    "x.npz": (any_npz() | damaged(GOOD_NPZ), read_npz),
    "settings.json": (mutated_json(GOOD_SETTINGS), read_settings),
    "release/certificate.json": (None, read_release),
    "release/classes/a/adapter_config.json": (None, read_release),
    "release/classes/a/adapter_model.safetensors": (None, read_release),
    "release/embedding.safetensors": (None, read_release),
    "features.safetensors": (None, read_features),
}


def fuzz(folder, name, cases):
    strategy, read = READ[name]
    path = folder / name
    original = path.read_bytes() if path.exists() else b""
    if strategy is None:
        strategy = mutated_json(original) if path.suffix == ".json" else damaged(original)

    @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def check(content):
        if content == original:
            return
        path.write_bytes(content)
        before = {place: place.stat().st_size for place in folder.rglob("*")}
        try:
            with harmless(), warnings.catch_warnings(action="ignore"):  # PEFT warns of keys that it does not know
                read(folder)
        except InputError as error:
            assert "\n" not in str(error)
        assert before == {place: place.stat().st_size for place in folder.rglob("*")}

    try:
        check()
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", READ)
def test_damaged_files_are_input_errors(folder, name):
    fuzz(folder, name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_ten_thousand_damaged_files_are_input_errors(folder, name):
    fuzz(folder, name, 10_000 if name in ("images/x.png", "x.npz", "release/certificate.json") else 1_000)


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "LARGEST_DENSE", 10**6)
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((2000, 32, 32), np.uint8))
    with pytest.raises(InputError, match="decompression bomb"):
        data.load_images(tmp_path / "bomb.npz")
    np.savez(tmp_path / "large.npz", images=np.zeros((2000, 32, 32), np.uint8))
    assert len(data.load_images(tmp_path / "large.npz").images) == 2000


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "..", "a/b", ""])
def test_class_names_of_a_certificate_cannot_lead_out_of_the_folder(folder, name, tmp_path):
    made = release_folder.load_release(folder / "release", BASE)
    hostile = dataclasses.replace(made.certificate, class_names=(name, "b"))
    with pytest.raises(InputError, match="cannot be a folder name"), harmless():
        save_release(tmp_path / "out" / "deep", dataclasses.replace(made, certificate=hostile), BASE, num_samples=0)
    shutil.copytree(folder / "release", tmp_path / "copy")
    (tmp_path / "copy" / "certificate.json").write_text(hostile.to_json())
    with pytest.raises(InputError, match="cannot be a folder name"):
        release_folder.load_release(tmp_path / "copy", BASE)


MODEL_FILES = ["manifest.json", "encoder.safetensors", "hypernetwork.safetensors", "base/config.json"]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_damaged_public_models_are_input_errors(tmp_path, name):
    shutil.copytree(pretrained.WEIGHTS / "glyphs", tmp_path / "models")
    original = (tmp_path / "models" / name).read_bytes()
    for content in (b"", b"{}", b"[" * 10**5, original[:100], original[:-100], original.replace(b"32", b"33")):
        (tmp_path / "models" / name).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            pretrained.load_pretrained(tmp_path / "models")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10**5, b"[]", b'{"num_images": "many", "configs": {}}'])
def test_settings_that_are_none(content, tmp_path, capsys):
    (tmp_path / "s.json").write_bytes(content)
    asked = ["compare", "--private", "digits", "--settings", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]
    assert cli.main(asked) == 2 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
