"""Named data sets that are not part of the library: what they are, and how their ``.npz`` files are read.

The files lie in the folder named by the environment variable ``HYPERDP_DATA``. ``data_scripts/download.py`` fetches
the originals and ``data_scripts/prepare.py`` makes the files from them; nothing is downloaded or unpickled here.
Pixels stay on the 8-bit grid, grey sets are white on black; :mod:`hyperdp_lib.data` resizes and converts.

Every set has a training and a test split, fixed and public. Where the source has none, every fifth image of a class, in
the order of the file, is test.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hyperdp_lib.image_files import InputError, read_arrays, shown

TEST_EVERY = 5  # of a class, where the source has no split
JPEG_SIDE = 32  # pixels
_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class NamedImages:
    """One split as it is in the file.

    Attributes
    ----------
    images
        ``(N, H, W, C)`` uint8, C = 1 or 3.
    labels
        ``(N,)`` int64 in ``0 .. K-1``.
    class_names
        K distinct names fit for folder names.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is read.

    Attributes
    ----------
    file
        Name of the ``.npz`` in the folder.
    layout
        Reads one split, ``"train"`` or ``"test"``, of that file.
    counts
        Images for training and for test, when complete.
    side, channels
        Pixels of a side in the file; 1 grey, 3 colour.
    title, homepage, licence
        For the data cards.
    class_names
        Where the file does not hold them.
    caveat
        What to say whenever the set is used; empty for none.
    """

    file: str
    layout: Callable[[Path, str, DataSet], NamedImages]
    counts: tuple[int, int]
    side: int
    channels: int
    title: str
    homepage: str
    licence: str
    class_names: tuple[str, ...] = ()
    caveat: str = ""


def read(name: str, split: str, folder: str | os.PathLike[str] | None = None) -> NamedImages:
    """One split of a data set of the table `DATA_SETS`.

    Parameters
    ----------
    name
        A key of `DATA_SETS`.
    split
        ``"train"`` or ``"test"``.
    folder
        Where the ``.npz`` lies; default: the environment variable ``HYPERDP_DATA``.

    Raises
    ------
    InputError
        When the file is missing, damaged, or not laid out as described in `DATA_SETS`.

    Examples
    --------
    >>> images = np.zeros((1, 28, 28), np.uint8)
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/mnist.npz", train_x=images, train_y=[3], test_x=images, test_y=[4])
    ...     read("mnist", "train", folder).images.shape
    (1, 28, 28, 1)
    """
    return DATA_SETS[name].layout(require(name, folder), split, DATA_SETS[name])


def require(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where the file of a data set is; an InputError says what to do if it is not there. Arguments as for `read`."""
    data_set = DATA_SETS[name]
    folder = os.environ.get("HYPERDP_DATA", "") if folder is None else os.fspath(folder)
    path = Path(folder) / data_set.file
    if not folder or not path.is_file():
        twin = next((f" or use {other!r}" for other in (f"{name}-jpeg",) if folder and _present(folder, other)), "")
        raise InputError(
            f"{name!r} is not part of the library: set HYPERDP_DATA to a folder with {data_set.file} "
            f"(data_scripts/download.py and prepare.py make it){twin}"
        )
    return path


def _present(folder: str, name: str) -> bool:
    return name in DATA_SETS and (Path(folder) / DATA_SETS[name].file).is_file()


# ---- layouts -----------------------------------------------------------------------------------------------


def _split_arrays(path: Path, split: str, data_set: DataSet) -> NamedImages:
    """``train_x``, ``train_y``, ``test_x``, ``test_y``, and ``class_names`` where the table has none."""
    arrays = _arrays(path, [f"{split}_x", f"{split}_y", *_names_in_file(data_set)])
    return _checked(path, split, arrays[f"{split}_x"], arrays[f"{split}_y"], _class_names(arrays, data_set))


def _every_fifth(path: Path, split: str, data_set: DataSet) -> NamedImages:
    """``x``, ``y`` and the names of the classes, in one part: every fifth image of a class is test."""
    names_key = "codepoints" if "kkanji" in data_set.file else "class_names"
    arrays = _arrays(path, ["x", "y", names_key])
    whole = _checked(path, "", arrays["x"], arrays["y"], tuple(str(name) for name in arrays[names_key]))
    chosen = is_test(whole.labels) == (split == "test")
    return NamedImages(whole.images[chosen], whole.labels[chosen], whole.class_names)


def is_test(labels: np.ndarray) -> np.ndarray:
    """Which images the rule "every fifth of a class" takes for test, ``(N,)`` bool.

    >>> is_test(np.array([0, 0, 0, 0, 1, 0, 0])).astype(int)
    array([0, 0, 0, 0, 0, 1, 0])
    """
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))
    return rank % TEST_EVERY == TEST_EVERY - 1


def is_split_by_rule(name: str) -> bool:
    """Whether a data set has no split of its own.

    >>> is_split_by_rule("kkanji"), is_split_by_rule("mnist")
    (True, False)
    """
    return DATA_SETS[name].layout is _every_fifth


def _omniglot(path: Path, split: str, data_set: DataSet) -> NamedImages:
    """The source's own split: whole alphabets. Classes are characters, ``Greek-03``, numbered within the split."""
    arrays = _arrays(path, ["x", "char_id", "alphabet_id", "is_evaluation", "alphabet_names"])
    chosen = arrays["is_evaluation"] == (split == "test")
    characters, first, labels = np.unique(arrays["char_id"][chosen], return_index=True, return_inverse=True)
    alphabets = arrays["alphabet_id"][chosen][first]
    # a character's number within its alphabet, from 1: characters of an alphabet have consecutive numbers
    within = [int(np.sum(alphabets[:i] == alphabet)) + 1 for i, alphabet in enumerate(alphabets)]
    names = tuple(f"{arrays['alphabet_names'][a]}-{n:02}" for a, n in zip(alphabets, within, strict=True))
    return _checked(path, "", arrays["x"][chosen], labels, names)


def _jpegs(path: Path, split: str, data_set: DataSet) -> NamedImages:
    """JPEG files without their common header, end to end; the test split may be called ``val``."""
    part = "val" if split == "test" and "tiny" in data_set.file else split
    keys = [f"{part}_{key}" for key in ("bytes", "off", "y")]
    arrays = _arrays(path, ["header", *keys, *_names_in_file(data_set)])
    content, offsets, labels = (arrays[key] for key in keys)
    images = decode_jpegs(path, arrays["header"].tobytes(), content.tobytes(), offsets)
    return _checked(path, part, images, labels, _class_names(arrays, data_set))


def decode_jpegs(path: Path, header: bytes, content: bytes, offsets: np.ndarray) -> np.ndarray:
    """``(N, 32, 32, 3)`` uint8 from N JPEG files that share a header; ``offsets`` ``(N + 1,)`` are into ``content``."""
    from PIL import Image

    from hyperdp_lib.progress import progress_bar

    images = np.empty((max(0, len(offsets) - 1), JPEG_SIDE, JPEG_SIDE, 3), dtype=np.uint8)
    for i in progress_bar(range(len(images)), desc=f"decoding {path.name}"):
        try:
            with Image.open(io.BytesIO(header + content[offsets[i] : offsets[i + 1]]), formats=("JPEG",)) as image:
                if image.size != (JPEG_SIDE, JPEG_SIDE):  # a smaller one would be broadcast, a larger one is a bomb
                    raise ValueError(f"{image.size} pixels")
                images[i] = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises many kinds for a damaged file, all meaning the same
            raise InputError(
                f"image {i} of {shown(path)} is damaged ({type(error).__name__}); make the file again"
            ) from error
    return images


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_arrays(path, names)
    if missing := [name for name in names if name not in arrays]:
        _not_as_expected(path, f"it has no array {missing[0]!r}")
    return arrays


def _names_in_file(data_set: DataSet) -> list[str]:
    return [] if data_set.class_names else ["class_names"]


def _class_names(arrays: dict[str, np.ndarray], data_set: DataSet) -> tuple[str, ...]:
    return data_set.class_names or tuple(str(name) for name in arrays["class_names"])


def _checked(
    path: Path, part: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
) -> NamedImages:
    """Shapes and label range; adds the channel of grey images."""
    prefix = f"{part}_" if part else ""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        _not_as_expected(path, f"{prefix}x must be (N, H, W) or (N, H, W, 3) uint8 and {prefix}y (N,)")
    if len(images) == 0 or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(class_names):
        _not_as_expected(path, f"{prefix}y must be whole numbers below {len(class_names)}, at least one")
    grey = images.ndim == 3
    return NamedImages(images[..., None] if grey else images, labels.astype(np.int64), class_names)


def _not_as_expected(path: Path, trouble: str) -> None:
    raise InputError(
        f"{path.name} in HYPERDP_DATA is not as expected: {trouble}; make it again with data_scripts/prepare.py"
    )


# ---- the table ---------------------------------------------------------------------------------------------

_JPEG = "JPEG quality 75 (lossy): comparable between methods run on it, not with published numbers"
_CIFAR = ("https://www.cs.toronto.edu/~kriz/cifar.html", "no formal licence; research use with citation")
_IMAGENET = ("http://cs231n.stanford.edu/", "ImageNet terms: non-commercial research and education; do not republish")
_TINY = "do not republish these images or sheets of them"

DATA_SETS = {
    "mnist": DataSet(
        "mnist.npz", _split_arrays, (60_000, 10_000), 28, 1, "MNIST",
        "http://yann.lecun.com/exdb/mnist/", "CC BY-SA 3.0", _DIGIT_NAMES,
    ),
    "fashion-mnist": DataSet(
        "fashion_mnist.npz", _split_arrays, (60_000, 10_000), 28, 1, "Fashion-MNIST",
        "https://github.com/zalandoresearch/fashion-mnist", "MIT", _GARMENTS,
    ),
    "kkanji": DataSet(
        "kkanji28.npz", _every_fifth, (32_666, 8_140), 28, 1, "Kuzushiji-Kanji",
        "https://github.com/rois-codh/kmnist", "CC BY-SA 4.0",
    ),
    "omniglot": DataSet(
        "omniglot28.npz", _omniglot, (19_280, 13_180), 28, 1, "Omniglot",
        "https://github.com/brendenlake/omniglot", "MIT",
    ),
    "quickdraw": DataSet(
        "quickdraw10.npz", _every_fifth, (27_200, 6_800), 28, 1, "Quick, Draw!",
        "https://github.com/googlecreativelab/quickdraw-dataset", "CC BY 4.0",
    ),
    "cifar10": DataSet("cifar10.npz", _split_arrays, (50_000, 10_000), 32, 3, "CIFAR-10", *_CIFAR),
    "cifar10-jpeg": DataSet(
        "cifar10_jpeg.npz", _jpegs, (50_000, 10_000), 32, 3, "CIFAR-10, JPEG copy", *_CIFAR, caveat=_JPEG
    ),
    "cifar100": DataSet("cifar100.npz", _split_arrays, (50_000, 10_000), 32, 3, "CIFAR-100", *_CIFAR),
    "tiny-imagenet-32": DataSet(
        "tiny_imagenet32.npz", _split_arrays, (100_000, 10_000), 32, 3, "Tiny-ImageNet, 32 x 32", *_IMAGENET,
        caveat=_TINY,
    ),
    "tiny-imagenet-32-jpeg": DataSet(
        "tiny_imagenet32_jpeg.npz", _jpegs, (100_000, 10_000), 32, 3, "Tiny-ImageNet, 32 x 32, JPEG copy", *_IMAGENET,
        caveat=f"{_JPEG}; {_TINY}",
    ),
}  # fmt: skip
