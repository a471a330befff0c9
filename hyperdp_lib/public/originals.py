"""The original files of the named data sets: where they come from, and the check that they are the right ones.

Where a checksum is published, a file with another one is refused. Kuzushiji-Kanji and Quick, Draw! publish none: such
a file is *trusted on first use*. Its SHA-256 is written to ``registry.txt`` beside it (pooch's format: name, hash) when
it is first downloaded, and every later download into that folder must match. Copy the registry to share that trust, or
fill it in yourself beforehand.

MD5, which most of the sources publish, guards against damage and careless mirrors, not against a determined forger.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from hyperdp_lib.artefacts import file_sha256, write_atomic
from hyperdp_lib.image_files import InputError, shown
from hyperdp_lib.progress import progress_bar

REGISTRY = "registry.txt"


@dataclass(frozen=True)
class Original:
    """One file to fetch.

    Attributes
    ----------
    file
        Name in the folder of originals.
    urls
        Tried in this order: the official place, then mirrors of the same bytes.
    known_hash
        ``"md5:..."``, as published; None when nobody publishes one (trust on first use).
    """

    file: str
    urls: tuple[str, ...]
    known_hash: str | None = None


def _idx(prefix: str, places: Sequence[str], md5s: Sequence[str]) -> tuple[Original, ...]:
    """The four gzipped IDX files that MNIST and Fashion-MNIST consist of."""
    files = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return tuple(
        Original(f"{prefix}-{file}", tuple(f"{place}/{file}" for place in places), f"md5:{md5}")
        for file, md5 in zip(files, md5s, strict=True)
    )


QUICKDRAW_PREFIXES = {
    "apple": 3000, "bicycle": 3000, "bowtie": 5000, "cat": 3000, "diamond": 3000, "eye": 3000, "fish": 3000,
    "lollipop": 5000, "rainbow": 5000, "train": 1000,
}  # fmt: skip
"""Categories of Quick, Draw! that are used, and how many drawings of each: the first ones of the file."""

_GOOGLE = "https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap"
_LAKE = "https://github.com/brendenlake/omniglot/raw/master/python"
_KRIZ = "https://www.cs.toronto.edu/~kriz"

ORIGINALS: dict[str, tuple[Original, ...]] = {
    "mnist": _idx(
        "mnist",
        ("https://ossci-datasets.s3.amazonaws.com/mnist", "http://yann.lecun.com/exdb/mnist"),
        ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432", "9fb629c4189551a2d022fa330f9573f3",
         "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion-mnist": _idx(
        "fashion-mnist",
        ("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
         "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
        ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe", "bef4ecab320f06d8554ea6380940ec79",
         "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "omniglot": (
        Original("omniglot-images_background.zip", (f"{_LAKE}/images_background.zip",),
                 "md5:68d2efa1b9178cc56df9314c21c6e718"),
        Original("omniglot-images_evaluation.zip", (f"{_LAKE}/images_evaluation.zip",),
                 "md5:6b91aef0f799c5bb55b94e3f2daec811"),
    ),
    "kkanji": (Original("kkanji.tar", ("http://codh.rois.ac.jp/kmnist/dataset/kkanji/kkanji.tar",)),),
    "quickdraw": tuple(
        Original(f"quickdraw-{name}.npy", (f"{_GOOGLE}/{quote(name)}.npy",)) for name in QUICKDRAW_PREFIXES
    ),
    # The binary versions: the Python ones are pickles, which can execute code when they are read.
    "cifar10": (
        Original("cifar-10-binary.tar.gz", (f"{_KRIZ}/cifar-10-binary.tar.gz",),
                 "md5:c32a1d4ab5d03f1284b67883e8d87530"),
    ),
    "cifar100": (
        Original("cifar-100-binary.tar.gz", (f"{_KRIZ}/cifar-100-binary.tar.gz",),
                 "md5:03b5dce01913d631647c71ecec9e9cb8"),
    ),
    "tiny-imagenet-32": (
        Original("tiny-imagenet-200.zip", ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
                 "md5:90528d7ca1a48142e341f4ef8d21d0de"),
    ),
}  # fmt: skip


def fetch(original: Original, folder: str | Path) -> tuple[Path, bool]:
    """Download one file unless it is there, and check it either way.

    Parameters
    ----------
    original
        What to fetch.
    folder
        Where to; made if missing. A file without a published hash is pinned in its ``registry.txt``.

    Returns
    -------
    Path
        Of the checked file.
    bool
        Whether it was pinned just now, on trust.

    Raises
    ------
    InputError
        When no place has it, or what they have is something else.
    """
    import pooch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, pinned = folder / original.file, read_registry(folder)
    expected = original.known_hash or pinned.get(original.file)
    there = ""
    if expected is not None and path.is_file():
        algorithm, _, digest = expected.partition(":")
        if pooch.file_hash(str(path), alg=algorithm) != digest:
            there = f"{shown(path)} is not the right file, its {algorithm} should be {digest}; "
    pooch.get_logger().setLevel(logging.WARNING)
    troubles = []
    for url in original.urls:
        try:
            # a bar without a total has no truth value, and pooch asks for it before it sets the total
            with progress_bar(total=1, desc=original.file, unit="B", unit_scale=True) as bar:
                download = pooch.HTTPDownloader(progressbar=bar, timeout=60)
                pooch.retrieve(url, expected, fname=original.file, path=folder, downloader=download)
            break
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; another hash is a ValueError
            troubles.append(f"{url}: {_reason(error)}")
    else:
        raise InputError(
            f"{there}cannot get {original.file} ({'; '.join(troubles)}); try again, or put the right file at "
            f"{shown(path)}"
        )
    if expected is not None:
        return path, False
    pinned[original.file] = f"sha256:{file_sha256(path)}"
    lines = (f"{name} {digest}\n" for name, digest in sorted(pinned.items()))
    write_atomic(folder / REGISTRY, "".join(lines).encode())
    return path, True


def read_registry(folder: Path) -> dict[str, str]:
    """The pinned hashes of a folder of originals, file name to ``sha256:...``; empty when there are none."""
    path = folder / REGISTRY
    if not path.is_file():
        return {}
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(len(line) != 2 for line in lines):
        raise InputError(f"{shown(path)} is not a registry: write one line 'FILE sha256:HASH' for each file")
    return {name: digest for name, digest in lines}


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError) and "hash" in str(error):
        return "its checksum is not the expected one"
    return type(error).__name__
