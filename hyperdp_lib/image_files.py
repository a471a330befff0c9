"""Reading and writing image files: the 8-bit side of the range contract of :mod:`hyperdp_lib.data`.

Nothing here knows about models: files become uint8 ``(N, H, W, C)`` arrays through a ``fit`` function that
brings each image (or batch of equal ones) to the size wanted, so that large photographs are never held
together. Whatever is missing, damaged or ambiguous raises :class:`InputError` and names the file.
"""

from __future__ import annotations

import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
Fit = Callable[[np.ndarray], np.ndarray]
# An array of an archive that is larger than this and packed more tightly than that is a decompression bomb.
LARGEST_DENSE, DENSEST = 2**30, 100  # bytes; bytes out of one byte
# Pillow logs what it finds wrong and raises too; the error message is enough.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class InputError(ValueError):
    """The user's input cannot be used; the message is one line: what is wrong and what to do."""

    __module__ = "hyperdp_lib.data"  # its public name

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class ImageFiles:
    """What was read.

    Attributes
    ----------
    images
        uint8 ``(N, H, W, C)``, already fitted.
    labels
        int64 ``(N,)`` in ``0 .. K-1``, every class present, or None.
    class_names
        K distinct names fit for folder names, or None.
    sizes
        The (height, width) pairs met.
    kinds
        The numbers of channels met: 1 grey, 3 RGB, 4 RGB + alpha.
    ignored
        Names of files passed over because they are not images.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    sizes: frozenset[tuple[int, int]]
    kinds: frozenset[int]
    ignored: tuple[str, ...] = ()


# ---- folders -----------------------------------------------------------------------------------------------


def read_folder(folder: Path, fit: Fit, labelled: bool = True) -> ImageFiles:
    """A folder of images, or a folder with one sub-folder per class (ImageFolder layout).

    Files come in name order; classes in name order, or numeric order when all names are numbers. Hidden
    files are ignored. Symbolic links are refused: they could lead out of the folder, or count one image
    twice, which would double its weight in a release.
    """
    loose, class_folders, ignored = _entries(folder)
    if loose and class_folders:
        raise InputError(
            f"{shown(folder)} holds both loose images ({loose[0].name!r}) and sub-folders "
            f"({class_folders[0].name!r}); keep either images only, or one sub-folder per class"
        )
    if all(entry.name.isdecimal() for entry in class_folders):
        class_folders.sort(key=lambda entry: (int(entry.name), entry.name))
    files, labels = list(loose), []
    for label, class_folder in enumerate(class_folders):
        members, deeper, others = _entries(class_folder)
        if deeper:
            raise InputError(f"{shown(deeper[0])} is a folder inside a class folder; move its images up")
        if not class_folder.name.isprintable():
            raise InputError(f"{shown(class_folder)} has control characters in its name; rename it")
        if not members and labelled:
            raise InputError(
                f"class {class_folder.name!r} has no image: add images to {shown(class_folder)} or remove it"
            )
        files += members
        ignored += others
        labels += [label] * len(members)
    if not files:
        raise InputError(f"{shown(folder)} holds no image; put files there ({' '.join(IMAGE_SUFFIXES)})")

    from .progress import progress_bar

    fitted: np.ndarray | None = None
    sizes: set[tuple[int, int]] = set()
    kinds: set[int] = set()
    for position, file in enumerate(progress_bar(files, desc="reading images")):
        pixels = decode(file)
        sizes.add(pixels.shape[:2])
        kinds.add(pixels.shape[2])
        image = fit(pixels[None])[0]
        if fitted is None:
            fitted = np.empty((len(files), *image.shape), dtype=np.uint8)
        fitted[position] = image
    assert fitted is not None
    return ImageFiles(
        images=fitted,
        labels=np.array(labels, dtype=np.int64) if class_folders and labelled else None,
        class_names=tuple(entry.name for entry in class_folders) if class_folders and labelled else None,
        sizes=frozenset(sizes),
        kinds=frozenset(kinds),
        ignored=tuple(file.name for file in ignored),
    )


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Images, sub-folders and other files of a folder, each in name order, hidden ones left out."""
    images, folders, others = [], [], []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read {shown(folder)}: {error.strerror}; check its permissions") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_symlink():
            raise InputError(f"{shown(entry)} is a link, and links are not followed; put the file there")
        if entry.is_dir():
            folders.append(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
            images.append(entry)
        else:
            others.append(entry)
    return images, folders, others


def decode(file: Path) -> np.ndarray:
    """One image file as uint8 ``(H, W, C)``: C = 1 grey, 3 RGB, 4 RGB + alpha; turned as its EXIF tag says.

    Sixteen-bit greys are rounded to eight; of an animation the first frame is taken.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # Between one and two times its pixel limit Pillow only warns; here that is an error too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode[0] in "IF":
                    return _eight_bits(file, np.asarray(image))
                transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
                mode = "RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB"
                pixels = np.array(image.convert(mode), dtype=np.uint8)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(
            f"{shown(file)} has more than {limit} pixels (a decompression bomb?); shrink or remove it"
        ) from error
    except Exception as error:  # Pillow's plugins raise many kinds for a damaged file, all meaning the same
        raise InputError(
            f"{shown(file)} cannot be read as an image ({type(error).__name__}); repair or remove it"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _eight_bits(file: Path, levels: np.ndarray) -> np.ndarray:
    """Sixteen-bit levels to 8-bit ones; anything wider has no agreed white and is refused."""
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
        raise InputError(f"{shown(file)} holds levels beyond 16-bit whole numbers; save it as 8-bit")
    return np.rint(levels / 257.0).astype(np.uint8)[..., None]


# ---- .npz --------------------------------------------------------------------------------------------------


def read_npz(path: Path, fit: Fit, labelled: bool = True) -> ImageFiles:
    """An archive of ``images`` and optionally ``labels`` (0 .. K-1) and ``class_names``."""
    arrays = read_arrays(path, ("images", "labels", "class_names") if labelled else ("images",))
    if "images" not in arrays:
        raise InputError(f"{shown(path)} has no array 'images'; save it with numpy.savez(path, images=...)")
    images = arrays["images"]
    if images.dtype != np.uint8:
        trouble = f"is {images.dtype}"
        if images.dtype.kind in "fc" and not np.isfinite(images).all():
            trouble += " and holds NaN or infinite values"
        raise InputError(f"'images' in {shown(path)} {trouble}; it must be uint8, 0 (black) to 255 (white)")
    shape = images.shape
    if 0 in shape:
        raise InputError(f"{shown(path)} holds no image ('images' has shape {shape}); put at least one there")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"'images' in {shown(path)} has shape {shape}; make it N x H x W [x C] with C = 1, 3 or 4"
        )
    labels, class_names = None, None
    if "labels" in arrays:
        labels = _check_labels(path, arrays["labels"], len(images))
        class_names = _check_class_names(path, labels, arrays.get("class_names"))
    return ImageFiles(
        images=fit(images),
        labels=labels,
        class_names=class_names,
        sizes=frozenset({(images.shape[1], images.shape[2])}),
        kinds=frozenset({images.shape[3]}),
    )


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays that an ``.npz`` holds; pickled objects are refused, never executed."""
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{shown(path)} is not an .npz archive; save it with numpy.savez")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            for entry in archive.zip.infolist():
                if entry.file_size > max(LARGEST_DENSE, DENSEST * entry.compress_size):
                    raise InputError(
                        f"{shown(path)} unpacks to {entry.file_size / 2**30:.0f} GiB (a decompression bomb?); "
                        "save it with numpy.savez, which does not compress"
                    )
            return {name: archive[name] for name in names if name in archive.files}
    except InputError:
        raise
    except Exception as error:  # a damaged archive surfaces as one of a dozen kinds of error
        if "allow_pickle" in str(error):
            raise InputError(
                f"{shown(path)} holds pickled objects, which are never loaded; save plain uint8 arrays"
            ) from error
        raise InputError(
            f"{shown(path)} cannot be read as an .npz ({type(error).__name__}); save it with numpy.savez"
        ) from error


def _check_labels(path: Path, labels: np.ndarray, num_images: int) -> np.ndarray:
    if labels.shape != (num_images,):
        raise InputError(
            f"'labels' in {shown(path)} has shape {labels.shape} for {num_images} images; give one for each"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"'labels' in {shown(path)} is {labels.dtype}; make it integers 0, 1, 2, ...")
    if labels.min() < 0:
        raise InputError(f"'labels' in {shown(path)} holds {labels.min()}; number the classes from 0")
    return labels


def _check_class_names(path: Path, labels: np.ndarray, class_names: np.ndarray | None) -> tuple[str, ...]:
    """The names, given or numbered; every one must have an image."""
    present = [int(label) for label in np.unique(labels)]
    if class_names is None:
        num_classes, names = present[-1] + 1, None
    else:
        if class_names.ndim != 1 or class_names.dtype.kind != "U":
            raise InputError(f"'class_names' in {shown(path)} is not a list of strings; give one per class")
        num_classes, names = len(class_names), tuple(str(name) for name in class_names)
        # Class names become folder names of a release, so none may lead elsewhere.
        unfit = [n for n in names if not n.isprintable() or n[:1] in ("", ".") or {*n} & {*"/\\"}]
        if unfit or len(set(names)) < len(names):
            what = f"holds {unfit[0]!r}" if unfit else "repeats a name"
            raise InputError(f"'class_names' in {shown(path)} {what}; give distinct names fit for folders")
        if present[-1] >= num_classes:
            raise InputError(
                f"'labels' in {shown(path)} goes up to {present[-1]} with {num_classes} class_names; add some"
            )
    if len(present) < num_classes:
        missing = next((k for k, label in enumerate(present) if k != label), len(present))
        raise InputError(
            f"class {missing if names is None else names[missing]!r} in {shown(path)} has no image; "
            "add images or renumber the labels 0 .. K-1"
        )
    return names or tuple(str(k) for k in range(num_classes))


# ---- writing -----------------------------------------------------------------------------------------------


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed ``.npz``, whole or not at all."""
    with _whole_or_nothing(path) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def write_png(path: Path, image: np.ndarray) -> None:
    """Write one uint8 image, ``(H, W)`` or ``(H, W, 3)``, whole or not at all."""
    from PIL import Image

    with _whole_or_nothing(path) as file:
        Image.fromarray(image).save(file, format="PNG")


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[BinaryIO]:
    """A file written beside its place under a hidden name, then renamed: never seen half-written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def shown(path: Path) -> str:
    """A path for a one-line message: quoted and escaped, so that odd characters cannot break the line."""
    return repr(str(path))
