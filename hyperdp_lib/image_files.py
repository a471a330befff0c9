"""Reading and writing image files: the 8-bit side of the range contract of :mod:`hyperdp_lib.data`.

Nothing here knows about models: files become uint8 ``(N, H, W, C)`` arrays through a ``fit`` function that
brings each image (or batch of equal ones) to the size wanted, so that large photographs are never held
together. Whatever is missing, damaged or ambiguous raises :class:`InputError` and names the file.

How an image is read depends on its file's format, never on its pixels, on other images or on labels. Classes are
declared, or the sub-folders; no label adds one. A class without an image and a set without images are read like
any other. What one private image or label can still cause goes to the operator's screen, and nowhere else:

* *Refused, one file*: damaged, a link, more than one page, too many pixels, levels without a known white (32-bit,
  floating-point, NaN), a layout that would lose bits; or of all: loose images beside sub-folders. Skipping such a file
  would change the set behind the operator's back.
* *Refused, one label*: none of the declared classes. Dropping or clamping it would mislabel an image.
* *Warned of* (``ImageFiles.warnings``): everything (nearly) one value, a narrow range, transparent images that vanish,
  copies, and a folder in which nothing was an image. *Noted*: how many files were read in which way.
"""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
# No other reader of Pillow's is tried, whatever a file is called: that for PostScript starts a program.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
Fit = Callable[[np.ndarray], np.ndarray]
Window = tuple[float, float]
# An array of an archive that is larger than this and packed more tightly than that is a decompression bomb.
LARGEST_DENSE, DENSEST = 2**30, 100  # bytes; bytes out of one byte
# Where an archive may have its images and labels; of several parts the one for training is read.
LAYOUTS = (("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train"), ("train_x", "train_y"))
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation"}
# Spans of 8-bit levels: a hundredth of the range is one value, 14 bits in 16 are a quarter of it.
ONE_VALUE, NARROW = 255 // 100, 64
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
        uint8 ``(N, H, W, C)``, already fitted; N may be 0.
    labels
        int64 ``(N,)`` in ``0 .. K-1``, or None.
    class_names
        K distinct names fit for folder names, or None.
    sizes
        The (height, width) pairs met.
    kinds
        The numbers of channels met: 1 grey, 3 RGB, 4 RGB + alpha.
    notes
        How the files were read, one decision a line.
    warnings
        What looks wrong, and what to do; see :func:`hyperdp_lib.data.load_images`.
    """

    images: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    sizes: frozenset[tuple[int, int]]
    kinds: frozenset[int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Picture(NamedTuple):
    """One decoded file: uint8 ``(H, W, C)``, whether it had more than 8 bits, and how it was read."""

    pixels: np.ndarray
    deep: bool
    decisions: tuple[str, ...]


# ---- classes -----------------------------------------------------------------------------------------------


def check_class_names(names: Sequence[str], source: str = "class_names") -> tuple[str, ...]:
    """The names in Unicode's composed form (NFC), if they are distinct and fit for folders of a release.

    Examples
    --------
    >>> check_class_names(["cat", "dog"])
    ('cat', 'dog')
    >>> check_class_names(["cafe\\u0301", "caf\\u00e9"])
    Traceback (most recent call last):
    ...
    hyperdp_lib.data.InputError: class_names: two names are the same text, 'café', in two Unicode forms; rename one
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{source} is not a list of strings; give one name for each class")
    composed = tuple(unicodedata.normalize("NFC", name) for name in names)
    for name in composed:
        if not name.isprintable() or name[:1] in ("", ".") or {*name} & {*"/\\:"}:
            raise InputError(f"{source} holds {name!r}, which cannot be a folder name; rename the class")
    (name, times), *_ = Counter(composed).most_common(1)
    if times > 1 and name in names and Counter(names)[name] > 1:
        raise InputError(f"{source} repeats {name!r}; give distinct names")
    if times > 1:
        raise InputError(f"{source}: two names are the same text, {name!r}, in two Unicode forms; rename one")
    return composed


def relabel(labels: np.ndarray, names: Sequence[str], declared: Sequence[str] | None, source: str) -> np.ndarray:
    """Labels that number ``names`` as labels that number ``declared``, which must hold every name."""
    if declared is None or tuple(names) == tuple(declared):
        return labels
    if unknown := [name for name in names if name not in declared]:
        raise InputError(
            f"{source} has classes that are not declared: {_listed(unknown)}; declared are {_listed(declared)}"
        )
    return np.array([declared.index(name) for name in names], dtype=np.int64)[labels]


# ---- folders -----------------------------------------------------------------------------------------------


def read_folder(
    folder: Path,
    fit: Fit,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    window: Window | None = None,
) -> ImageFiles:
    """A folder of images, or a folder with one sub-folder per class (ImageFolder layout).

    Files come in name order; classes as declared, else in name order, or numeric order when all names are numbers.
    Hidden files are ignored. Symbolic links are refused: they could lead out of the folder, or count one image
    twice, which would double its weight in a release.
    """
    loose, class_folders, ignored = _entries(folder)
    if loose and class_folders:
        raise InputError(
            f"{shown(folder)} holds both loose images ({loose[0].name!r}) and sub-folders "
            f"({class_folders[0].name!r}); keep either images only, or one sub-folder per class"
        )
    if loose and class_names:
        raise InputError(
            f"{shown(folder)} has no sub-folders, so its images have no class; make one for each class, or declare none"
        )
    splits = [entry.name for entry in class_folders if entry.name.casefold() in SPLIT_NAMES]
    if class_names is None and splits and (len(splits) > 1 or len(splits) == len(class_folders)):
        raise InputError(
            f"{shown(folder)} is split into {_listed(splits)}, which are no classes; give one of them, "
            f"for example {shown(folder / splits[0])}"
        )
    if all(entry.name.isdecimal() for entry in class_folders):
        class_folders.sort(key=lambda entry: (int(entry.name), entry.name))
    found: tuple[str, ...] = ()
    if labelled and class_folders:
        found = check_class_names([entry.name for entry in class_folders], f"the folder {shown(folder)}")
    names = class_names or found
    numbers = relabel(np.arange(len(found)), found, names, shown(folder))
    files, labels = list(loose), []
    for position, class_folder in enumerate(class_folders):
        members, deeper, others = _entries(class_folder)
        if deeper:
            raise InputError(f"{shown(deeper[0])} is a folder inside a class folder; move its images up")
        files += members
        ignored += others
        labels += [int(numbers[position])] * len(members) if found else []
    order = sorted(range(len(files)), key=labels.__getitem__) if found else range(len(files))
    notes = []
    if ignored:
        notes.append(f"ignored files that are not images: {len(ignored)} (first: {ignored[0].name!r})")
    if class_names and (absent := [name for name in class_names if name not in found]):
        notes.append(f"declared classes without a folder, read as empty: {_listed(absent)}")
    read = _read_all([files[i] for i in order], fit, window, notes, ignored)
    return ImageFiles(
        images=read.images,
        labels=np.array([labels[i] for i in order], dtype=np.int64) if names else None,
        class_names=tuple(names) if names else None,
        sizes=read.sizes,
        kinds=read.kinds,
        notes=read.notes,
        warnings=read.warnings,
    )


def _read_all(
    files: Sequence[Path], fit: Fit, window: Window | None, notes: Sequence[str], ignored: Sequence[Path]
) -> ImageFiles:
    """The images of files, without labels."""
    from hyperdp_lib.progress import progress_bar

    empty = fit(np.empty((0, 1, 1, 1), dtype=np.uint8))
    fitted = np.empty((len(files), *empty.shape[1:]), dtype=np.uint8)
    sizes: set[tuple[int, int]] = set()
    channels, deep = np.zeros(len(files), dtype=int), np.zeros(len(files), dtype=bool)
    digests: set[bytes] = set()
    decisions: Counter[str] = Counter()
    for position, file in enumerate(progress_bar(files, desc="reading images")):
        pixels, deep[position], made = picture(file, window)
        sizes.add(pixels.shape[:2])
        channels[position] = pixels.shape[2]
        decisions.update(made)
        digests.add(_digest(pixels))
        fitted[position] = fit(pixels[None])[0]
    notes = [*notes, *(_counted(text, times, len(files)) for text, times in decisions.items())]
    if window is not None and files and not deep.any():
        notes.append("the window was not used: no file holds more than 8 bits")
    suspicious = _suspicious(fitted, deep, channels == 4, len(files) - len(digests))
    if ignored and not files:
        suspicious += (
            f"none of the {len(ignored)} files is an image ({' '.join(IMAGE_SUFFIXES)}): convert them, or give another "
            "folder",
        )
    return ImageFiles(fitted, None, None, frozenset(sizes), frozenset(channels.tolist()), tuple(notes), suspicious)


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


# ---- one file ----------------------------------------------------------------------------------------------


def decode(file: Path, window: Window | None = None) -> np.ndarray:
    """One image file as uint8 ``(H, W, C)``: C = 1 grey, 3 RGB, 4 RGB + alpha; turned as its EXIF tag says.

    Levels of more than 8 bits are rounded to 8: the range of the file's format, or ``window``, which says what is
    black and what is white, beyond which levels are clamped. Files of several pages are refused.
    """
    return picture(file, window).pixels


def picture(file: Path, window: Window | None = None) -> Picture:
    """As :func:`decode`, with how it was read."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Between one and two times its pixel limit Pillow only warns; here that is an error too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _picture(file, window)
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


def _picture(file: Path, window: Window | None) -> Picture:
    from PIL import Image, ImageOps

    decisions: list[str] = []
    with Image.open(file, formats=FORMATS) as opened:
        pages = getattr(opened, "n_frames", 1)
        if opened.format == "MPO":  # a photograph with its preview or depth
            decisions.append("took the main picture of files that hold several (MPO)")
        elif pages > 1:
            raise InputError(f"{shown(file)} holds {pages} pages or frames; save each that counts as a file of its own")
        rawmode, maxval = _raw_mode(opened)
        tags: Any = opened.tag_v2 if opened.format == "TIFF" else {}  # type: ignore[attr-defined]
        if opened.getexif().get(0x0112, 1) in range(2, 9):
            decisions.append("turned images as their EXIF orientation says")
        if white_is_zero := tags.get(262) == 0:
            decisions.append("took level 0 for white where a TIFF says so (WhiteIsZero)")
        if opened.mode[0] in "IF" or max(tags.get(258, (8,))) > 8 or ";16" in rawmode:
            levels, alpha, white = _deep_levels(file, opened, rawmode, maxval, tags)
            colours = _eight_bits(file, levels, white, white_is_zero, window, decisions)
            if alpha is not None:
                whole = np.broadcast_to(colours, (*alpha.shape, 3))
                colours = np.concatenate([whole, np.rint(alpha / 257.0)[..., None].astype(np.uint8)], -1)
            return Picture(colours, True, tuple(decisions))
        image = ImageOps.exif_transpose(opened)
        if rawmode in ("L;2", "L;4") and "transparency" in image.info:  # Pillow scales the levels, but not this one
            image.info["transparency"] *= 85 if rawmode == "L;2" else 17
        if image.mode in ("CMYK", "YCbCr"):
            decisions.append(f"converted {image.mode} to RGB without a colour profile")
        transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        mode = "RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB"
        pixels = np.array(image.convert(mode), dtype=np.uint8)
    return Picture(pixels[..., None] if pixels.ndim == 2 else pixels, False, tuple(decisions))


def _raw_mode(opened: Any) -> tuple[str, int]:
    """How an opened file holds its samples, in Pillow's words, and the white of a PGM."""
    if not opened.tile:  # WebP
        return opened.mode, 65535
    arguments = opened.tile[0].args
    rawmode = str(arguments if isinstance(arguments, str) else arguments[0])
    stated = opened.tile[0].codec_name in ("ppm", "ppm_plain") and arguments is not rawmode
    return rawmode, int(arguments[1]) if stated else 65535


def _deep_levels(
    file: Path, opened: Any, rawmode: str, maxval: int, tags: Any
) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """Levels ``(H, W, 1 or 3)``, 16-bit alpha ``(H, W)`` or None, and the white that the format states, if it does."""
    from PIL import ImageOps

    key = opened.info.get("transparency")
    if opened.mode[0] in "IF":
        levels = np.asarray(ImageOps.exif_transpose(opened)).astype(np.float64)[..., None]
        if opened.format == "PPM" and opened.mode == "I":
            return np.rint(levels * (maxval / 65535)), None, maxval  # Pillow has spread them
        bits = {12: 4095}.get(max(tags.get(258, (16,))), 65535)
        white = bits if opened.mode.startswith("I;16") else None
    elif rawmode == "LA;16B":  # its bytes, read as four channels
        pairs = _bytes(file, lambda _: "RGBA")
        return pairs[..., :1] * 256.0 + pairs[..., 1:2], pairs[..., 2] * 256.0 + pairs[..., 3], 65535
    elif opened.mode in ("RGB", "RGBA") and ";16" in rawmode and "a" not in rawmode and tags.get(284, 1) == 1:
        # Pillow keeps the upper byte of a level; in the other order of bytes, the lower one.
        lower = _bytes(file, lambda mode: mode[:-1] + ("L" if mode[-1] == "B" else "B"))
        levels, white = np.asarray(ImageOps.exif_transpose(opened)) * 256.0 + lower, 65535
    else:
        raise InputError(f"{shown(file)} has more than 8 bits in a layout that is not read; save it as 8-bit")
    if levels.shape[-1] == 4:
        return levels[..., :3], levels[..., 3], white
    if key is not None:  # one level, or colour, that stands for transparent
        return levels, np.where((levels == np.asarray(key)).all(-1), 0.0, 65535.0), white
    return levels, None, white


def _bytes(file: Path, other: Callable[[str], str]) -> np.ndarray:
    """A file's samples, read as if it held them as ``other`` says; turned as its EXIF tag says."""
    from PIL import Image, ImageOps

    with Image.open(file, formats=FORMATS) as opened:
        for i, tile in enumerate(opened.tile):
            rawmode, *more = (tile.args,) if isinstance(tile.args, str) else tile.args or ("",)
            opened.tile[i] = tile._replace(args=(other(rawmode), *more) if more else other(rawmode))
        return np.asarray(ImageOps.exif_transpose(opened))


def _eight_bits(
    file: Path, levels: np.ndarray, white: int | None, white_is_zero: bool, window: Window | None, decisions: list[str]
) -> np.ndarray:
    """Levels of any range to 8-bit ones: a file's own range, or the declared window."""
    if window is not None:
        decisions.append(f"read level {window[0]:g} as black and {window[1]:g} as white (window)")
        low, high = window
    elif white is not None:
        decisions.append(f"rounded {white.bit_length()}-bit levels to 8 bits")
        low, high = 0.0, float(white)
    else:
        raise InputError(
            f"{shown(file)} holds levels beyond 16-bit whole numbers, which have no agreed white; save it as 8-bit, "
            "or declare black and white with --window LOW HIGH (window=)"
        )
    return through_window(levels, (high, low) if white_is_zero else (low, high), shown(file))


def through_window(levels: np.ndarray, window: Window, source: str) -> np.ndarray:
    """uint8 levels: ``window[0]`` and what lies beyond become 0, ``window[1]`` and beyond 255."""
    if not np.isfinite(levels).all():
        raise InputError(f"{source} holds NaN or infinite values; repair or remove them")
    black, white = window
    spread = (levels.astype(np.float64) - black) * (255.0 / (white - black))
    return np.rint(spread.clip(0.0, 255.0)).astype(np.uint8)


# ---- what looks wrong --------------------------------------------------------------------------------------


def _suspicious(fitted: np.ndarray, deep: np.ndarray, with_alpha: np.ndarray, copies: int) -> tuple[str, ...]:
    """What an operator should look at before a release is paid for. Nothing here changes how anything is read."""
    least, most = fitted.min((1, 2, 3), initial=255), fitted.max((1, 2, 3), initial=0)
    found = []
    for chosen, advice in (
        (deep, "if their levels have fewer bits than their files, declare it, as in --window 0 4095 for 12 (window=)"),
        (~deep, "spread their levels over 0 .. 255"),
    ):
        if not chosen.any():
            continue
        span, which = int(most[chosen].max()) - int(least[chosen].min()), _which(int(chosen.sum()), len(fitted))
        if span <= ONE_VALUE:
            found.append(f"{which} are one value all over, or nearly: look at them; {advice}")
        elif span <= NARROW:
            found.append(f"{which} use a quarter of the range from black to white, or less: {advice}")
    if vanished := int((with_alpha & (most - least <= ONE_VALUE)).sum()):
        found.append(
            f"{vanished} transparent images become one value over this background: try the other one "
            "(--background black, background=), or save them without transparency"
        )
    if copies:
        found.append(f"{copies} images are copies of others, pixel for pixel: a copy counts like an image; remove them")
    return tuple(found)


def _which(some: int, whole: int) -> str:
    return "all images" if some == whole else f"{some} of the {whole} images"


def _counted(text: str, some: int, whole: int) -> str:
    return text if some == whole else f"{text} ({some} of {whole} images)"


def _digest(pixels: np.ndarray) -> bytes:
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---- .npz --------------------------------------------------------------------------------------------------


def read_npz(
    path: Path,
    fit: Fit,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    window: Window | None = None,
) -> ImageFiles:
    """An archive of ``images`` and optionally ``labels`` and ``class_names``, or one part of those in `LAYOUTS`."""
    stored = array_names(path)
    images_key, labels_key = next((pair for pair in LAYOUTS if pair[0] in stored), LAYOUTS[0])
    arrays = read_arrays(path, (images_key, labels_key, "class_names") if labelled else (images_key,))
    if images_key not in arrays:
        raise InputError(
            f"{shown(path)} has no array 'images'; it holds {_listed(stored) or 'none'}; save it with "
            "numpy.savez(path, images=..., labels=..., class_names=...)"
        )
    notes = []
    if images_key != "images":
        notes.append(f"read {images_key!r} of an archive of {_listed(stored)}")
    images, deep = _check_images(path, images_key, arrays[images_key], window, notes)
    labels = None
    if labels_key in arrays:
        labels, class_names = _check_labels(
            path, labels_key, arrays[labels_key], len(images), class_names, arrays.get("class_names"), notes
        )
    elif class_names is not None:
        raise InputError(f"{shown(path)} has no array {labels_key!r} for the declared classes; add it, or declare none")
    fitted = fit(images)
    alone = len({_digest(image) for image in images})
    flags = np.full(len(images), deep), np.full(len(images), images.shape[3] == 4)
    return ImageFiles(
        images=fitted,
        labels=labels,
        class_names=None if labels is None or class_names is None else tuple(class_names),
        sizes=frozenset({(images.shape[1], images.shape[2])} if len(images) else ()),
        kinds=frozenset({images.shape[3]} if len(images) else ()),
        notes=tuple(notes),
        warnings=_suspicious(fitted, *flags, len(images) - alone),
    )


def array_names(path: Path) -> list[str]:
    """Names of the arrays that an ``.npz`` holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception:  # what is wrong is said where the arrays are read
        return []


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


def _check_images(
    path: Path, key: str, images: np.ndarray, window: Window | None, notes: list[str]
) -> tuple[np.ndarray, bool]:
    """uint8 ``(N, H, W, C)``, and whether they had more than 8 bits."""
    shape, source = images.shape, f"{key!r} in {shown(path)}"
    if images.ndim > 0 and len(images) == 0:  # an empty list says nothing of type and shape
        return np.empty((0, 1, 1, 1), dtype=np.uint8), False
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise InputError(f"{source} has shape {shape}; make it N x H x W [x C] with C = 1, 3 or 4")
    if deep := images.dtype != np.uint8:
        trouble = f"{source} is {images.dtype}"
        if images.dtype.kind not in "iuf" or window is None:
            if images.dtype.kind in "fc" and not np.isfinite(images).all():
                trouble += " and holds NaN or infinite values"
            raise InputError(
                f"{trouble}; it must be uint8, 0 (black) to 255 (white), or numbers with a declared "
                "--window LOW HIGH (window=)"
            )
        read = np.empty(images.shape, dtype=np.uint8)
        for i, image in enumerate(images):  # not all at once: they become eight bytes a level
            read[i] = through_window(image, window, source)
        images = read
        notes.append(f"read level {window[0]:g} as black and {window[1]:g} as white (window)")
    elif window is not None:
        notes.append("the window was not used: the images are uint8")
    return images, deep


def _check_labels(
    path: Path,
    key: str,
    labels: np.ndarray,
    num_images: int,
    declared: Sequence[str] | None,
    stored_names: np.ndarray | None,
    notes: list[str],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 ``(N,)``, and the classes that they number: as declared, else as stored, never as met."""
    source, own = f"{key!r} in {shown(path)}", None
    if stored_names is not None:
        if stored_names.ndim != 1 or stored_names.dtype.kind != "U":
            raise InputError(f"'class_names' in {shown(path)} is not a list of strings; give one per class")
        own = check_class_names([str(name) for name in stored_names], f"'class_names' in {shown(path)}")
    names = own or (None if declared is None else tuple(declared))
    if names is None:
        raise InputError(
            f"{shown(path)} has labels but no class names, and labels cannot say which classes there are; add "
            "'class_names' to it, or declare them (--classes, class_names=), or leave labels out (--unlabelled, "
            "labelled=False)"
        )
    if num_images == 0 and labels.size == 0:
        labels = np.zeros(0, dtype=np.int64)
    if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST has them
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape == (num_images, len(names)) and labels.dtype.kind in "biu":
        if not ((labels == 0) | (labels == 1)).all() or not (labels.sum(1) == 1).all():
            raise InputError(f"{source} has a row that is not one 1 among zeros; give each image one class")
        notes.append("read labels as one-hot rows")
        labels = labels.argmax(1)
    if labels.shape != (num_images,):
        raise InputError(f"{source} has shape {labels.shape} for {num_images} images; give one for each")
    if labels.dtype.kind == "U":
        number = {name: k for k, name in enumerate(names)}
        numbered = [number.get(unicodedata.normalize("NFC", str(label)), -1) for label in labels]
        labels = np.array(numbered, dtype=np.int64)
        notes.append("read labels as names of classes")
    elif labels.dtype.kind not in "iu":
        raise InputError(f"{source} is {labels.dtype}; make it integers 0, 1, 2, ... or names of classes")
    if (labels < 0).any() or (labels >= len(names)).any():
        raise InputError(
            f"{source} has one that is none of the {len(names)} classes {_listed(names)}; give their names, or "
            f"their numbers 0 .. {len(names) - 1} (subtract 1 from numbers that start at 1)"
        )
    numbers = relabel(labels.astype(np.int64), names, declared, shown(path))
    return numbers, tuple(names if declared is None else declared)


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
