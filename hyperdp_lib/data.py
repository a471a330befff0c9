"""Images and named data sets.

The ONE range contract
----------------------
Inside the library an image batch is a ``float32`` tensor ``(N, C, H, W)`` with values in ``[-1, 1]``:
``-1`` is black, ``+1`` is white. At the file boundary, and only there, it is ``uint8`` ``(N, H, W)`` for one
channel or ``(N, H, W, C)`` for several, ``0`` black and ``255`` white. :func:`to_model_range` and
:func:`to_uint8` are the only two conversions between them, and ``to_uint8(to_model_range(u)) == u`` exactly.

Everything read from files is brought to the model's size and channels while still on the 8-bit grid and becomes
float once, at the end; so a set written by :func:`save_npz` (or as 8-bit PNGs) reads back identical.

Bad input raises :class:`InputError`, whose message is one line saying what is wrong and what to do.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
NAMED_DATA_SETS = ("digits", "digits-test")
# ITU-R BT.601 luma, what Pillow's mode "L" uses.
_LUMA = (0.299, 0.587, 0.114)
# Images resized at once: bounds the float working memory without slowing small images down.
_PIXELS_AT_ONCE = 2**24


class InputError(ValueError):
    """The user's input cannot be used; the message is one line: what is wrong and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class ImageSet:
    """Images, with or without labels.

    Attributes
    ----------
    images
        ``(N, C, H, W)`` float32 in ``[-1, 1]``.
    labels
        ``(N,)`` int64 in ``0 .. len(class_names) - 1``, or None for an unlabelled set.
    class_names
        One name per class, in label order (the label set is public, the labels are not), or None.
    notes
        What was done to the files to make them fit (resized, converted to grey, ignored); for the operator.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise ValueError(f"images must be N x C x H x W, got shape {tuple(self.images.shape)}")
        if (self.labels is None) != (self.class_names is None):
            raise ValueError("labels and class_names come together: give both or neither")
        if self.labels is not None and len(self.labels) != len(self.images):
            raise ValueError(f"{len(self.labels)} labels for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    def unlabelled(self) -> ImageSet:
        """The same images without their labels."""
        return ImageSet(self.images, notes=self.notes)


# ---------------------------------------------------------------------------------------------------------------
# The range contract


def to_model_range(images: np.ndarray | Tensor) -> Tensor:
    """8-bit images to the library's float range.

    Parameters
    ----------
    images
        ``(N, H, W)`` or ``(N, H, W, C)`` uint8.

    Returns
    -------
    Tensor
        ``(N, C, H, W)`` float32, ``u / 127.5 - 1``.

    Raises
    ------
    InputError
        When the dtype is not uint8 or the shape is neither of the two.

    Examples
    --------
    >>> to_model_range(np.array([[[0, 255]]], dtype=np.uint8))
    tensor([[[[-1.,  1.]]]])
    """
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8:
        raise InputError(f"images must be uint8 (0 to 255), got {tensor.dtype}: convert them before loading")
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(-1)
    if tensor.ndim != 4:
        raise InputError(f"images must be N x H x W or N x H x W x C, got shape {tuple(tensor.shape)}")
    return tensor.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0).contiguous()


def to_uint8(images: Tensor) -> np.ndarray:
    """The library's float images to 8-bit ones, clamped and rounded to the nearest level.

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float in ``[-1, 1]`` (values outside are clamped).

    Returns
    -------
    numpy.ndarray
        uint8, ``(N, H, W)`` for one channel, else ``(N, H, W, C)``.

    Raises
    ------
    ValueError
        When the shape is not four-dimensional or a value is NaN or infinite.

    Examples
    --------
    >>> to_uint8(torch.tensor([[[[-1.0, 0.0, 1.0]]]])).tolist()
    [[[0, 128, 255]]]
    """
    if images.ndim != 4:
        raise ValueError(f"images must be N x C x H x W, got shape {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values")
    levels = images.detach().to("cpu", torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    array = levels.permute(0, 2, 3, 1).contiguous().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


def resize(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic resize to ``size x size``, clamped to ``[-1, 1]`` (bicubic overshoots at edges).

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float in ``[-1, 1]``. An image that is not square is stretched, not cropped.
    size
        Side of the result in pixels.

    Returns
    -------
    Tensor
        ``(N, C, size, size)`` float; the input itself when it has that size already.

    Examples
    --------
    >>> resize(torch.ones(2, 1, 8, 8), 16).shape
    torch.Size([2, 1, 16, 16])
    """
    if images.shape[-2:] == (size, size):
        return images
    resized = functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1.0, 1.0)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Convert between grey, colour and transparent images.

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float in ``[-1, 1]`` with C = 1 grey, 2 grey + alpha, 3 RGB or 4 RGB + alpha. Transparency
        is laid over white, as a page shows it.
    channels
        1 (ITU-R BT.601 luma) or 3.

    Returns
    -------
    Tensor
        ``(N, channels, H, W)`` float in ``[-1, 1]``.

    Examples
    --------
    >>> round(to_channels(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1), 1).item(), 3)   # pure red
    -0.402
    """
    if images.shape[1] in (2, 4):
        colour, alpha = images[:, :-1], (images[:, -1:] + 1.0) / 2.0
        images = colour * alpha + (1.0 - alpha)
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 3 and channels == 1:
        return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if images.shape[1] == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    raise InputError(f"cannot turn images of {images.shape[1]} channels into {channels}: use grey or RGB images")


# ---------------------------------------------------------------------------------------------------------------
# Files


def load_images(path: str | os.PathLike[str], image_size: int = 16, channels: int = 1) -> ImageSet:
    """Read a folder of images, a folder of class sub-folders, or an ``.npz``.

    Files are read in name order; hidden files are ignored; symbolic links are refused (they could lead out of the
    folder or count an image twice). Classes are in name order, or in numeric order when all names are numbers.

    Parameters
    ----------
    path
        A folder, or an ``.npz`` with ``images`` (uint8, ``N x H x W`` or ``N x H x W x C``), optional ``labels``
        (N integers 0 .. K-1) and optional ``class_names`` (K strings).
    image_size
        Side in pixels to which every image is resized, antialiased.
    channels
        1 or 3.

    Returns
    -------
    ImageSet

    Raises
    ------
    InputError
        For anything that is missing, damaged or ambiguous, naming the file.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such file or folder: {_shown(path)}; give a folder of images or an .npz")
    if path.is_dir():
        return _load_folder(path, image_size, channels)
    if path.suffix.lower() == ".npz":
        return _load_npz(path, image_size, channels)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{_shown(path)} is a single image; give the folder that holds the images")
    raise InputError(f"{_shown(path)} is neither a folder nor an .npz; give a folder of images or an .npz")


def load_named_or_path(name_or_path: str | os.PathLike[str], image_size: int = 16, channels: int = 1) -> ImageSet:
    """A named data set (``digits``, ``digits-test``) or whatever :func:`load_images` reads.

    A name wins over a folder of the same name; write ``./digits`` for the folder.

    Examples
    --------
    >>> len(load_named_or_path("digits-test"))
    360
    """
    if str(name_or_path) in NAMED_DATA_SETS:
        named = digits("test" if str(name_or_path) == "digits-test" else "train", image_size)
        return named if channels == 1 else ImageSet(
            to_channels(named.images, channels), named.labels, named.class_names, named.notes
        )
    if not Path(name_or_path).exists() and Path(name_or_path).name == str(name_or_path):
        names = ", ".join(NAMED_DATA_SETS)
        raise InputError(
            f"no such file or folder: {_shown(Path(name_or_path))}; give a folder of images, an .npz or one of: {names}"
        )
    return load_images(name_or_path, image_size, channels)


def digits(split: str = "train", image_size: int = 16) -> ImageSet:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998, UCI), white on black, ten classes.

    The split is public and fixed: ``sklearn.model_selection.train_test_split(stratify=labels, test_size=360,
    random_state=0)`` on the 1,797 images, each part then in the original order.

    Parameters
    ----------
    split
        ``"train"`` (1,437 images) or ``"test"`` (360).
    image_size
        The 8 x 8 originals (levels 0 .. 16, spread over 0 .. 255) are resized to this side.

    Examples
    --------
    >>> train = digits("train")
    >>> tuple(train.images.shape), train.class_names[:3]
    ((1437, 1, 16, 16), ('0', '1', '2'))
    """
    if split not in ("train", "test"):
        raise InputError(f"split must be 'train' or 'test', got {split!r}")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    parts = train_test_split(np.arange(len(source.target)), test_size=360, random_state=0, stratify=source.target)
    index = np.sort(parts[0 if split == "train" else 1])
    levels = np.rint(source.images[index] * (255.0 / 16.0)).astype(np.uint8)
    return ImageSet(
        images=to_model_range(_fit(levels[..., None], image_size, channels=1)),
        labels=torch.as_tensor(source.target[index], dtype=torch.int64),
        class_names=tuple(str(digit) for digit in range(10)),
        notes=(f"resized from 8 x 8 to {image_size} x {image_size} pixels",) if image_size != 8 else (),
    )


def save_npz(path: str | os.PathLike[str], image_set: ImageSet) -> None:
    """Write ``images`` (uint8) and, when labelled, ``labels`` and ``class_names``; :func:`load_images` reads it.

    The file appears whole or not at all: it is written beside its final place and then renamed.
    """
    arrays: dict[str, np.ndarray] = {"images": to_uint8(image_set.images)}
    if image_set.labels is not None and image_set.class_names is not None:
        arrays["labels"] = image_set.labels.cpu().numpy().astype(np.int64)
        arrays["class_names"] = np.array(image_set.class_names, dtype=np.str_)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------
# Reading folders


def _load_folder(folder: Path, image_size: int, channels: int) -> ImageSet:
    loose, class_folders, ignored = _entries(folder)
    if loose and class_folders:
        raise InputError(
            f"{_shown(folder)} holds both loose images ({loose[0].name!r}) and sub-folders "
            f"({class_folders[0].name!r}); keep either images only, or one sub-folder per class"
        )
    if not loose and not class_folders:
        raise InputError(f"{_shown(folder)} holds no image; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    files, labels = list(loose), []
    if class_folders and all(entry.name.isdecimal() for entry in class_folders):
        class_folders = sorted(class_folders, key=lambda entry: (int(entry.name), entry.name))
    for label, class_folder in enumerate(class_folders):
        members, deeper, others = _entries(class_folder)
        if deeper:
            raise InputError(f"{_shown(deeper[0])} is a folder inside a class folder; put its images one level up")
        if not members:
            raise InputError(
                f"class {class_folder.name!r} has no image: {_shown(class_folder)} is empty; add images or remove it"
            )
        files += members
        ignored += others
        labels += [label] * len(members)

    fitted = np.empty((len(files), image_size, image_size, channels), dtype=np.uint8)
    sizes: set[tuple[int, int]] = set()
    kinds: set[int] = set()
    for position, file in enumerate(tqdm(files, desc="reading images", delay=2, disable=None, leave=False)):
        pixels = _decode(file)
        sizes.add(pixels.shape[:2])
        kinds.add(pixels.shape[2])
        fitted[position] = _fit(pixels[None], image_size, channels)[0]
    notes = _fit_notes(sizes, kinds, image_size, channels)
    if ignored:
        count = f"{len(ignored)} file" + ("s that are not images" if len(ignored) > 1 else " that is not an image")
        notes += (f"ignored {count} (first: {ignored[0].name!r})",)
    return ImageSet(
        images=to_model_range(fitted),
        labels=torch.tensor(labels, dtype=torch.int64) if class_folders else None,
        class_names=tuple(entry.name for entry in class_folders) if class_folders else None,
        notes=notes,
    )


def _entries(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Images, sub-folders and other files of a folder, each in name order, hidden ones left out."""
    images, folders, others = [], [], []
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read folder {_shown(folder)}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_symlink():
            raise InputError(
                f"{_shown(entry)} is a symbolic link; links are not followed (they can lead out of the folder or "
                "count an image twice): put the file itself there"
            )
        if entry.is_dir():
            folders.append(entry)
        elif entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
            images.append(entry)
        else:
            others.append(entry)
    return images, folders, others


def _decode(file: Path) -> np.ndarray:
    """One image file as uint8 ``(H, W, C)`` with C in 1, 3, 4 (RGB + alpha)."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its pixel limit; a private folder is no place to guess.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode == "F":
                    raise InputError(f"{_shown(file)} holds floating-point pixels; save it as 8-bit")
                if image.mode.startswith("I"):
                    deep = np.asarray(image).astype(np.int64)
                    if deep.min() < 0 or deep.max() > 65535:
                        raise InputError(f"{_shown(file)} holds pixels outside 0 .. 65535; save it as 8-bit")
                    return np.rint(deep / 257.0).astype(np.uint8)[..., None]
                transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
                mode = "RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB"
                pixels = np.array(image.convert(mode), dtype=np.uint8)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{_shown(file)} has more than {Image.MAX_IMAGE_PIXELS} pixels (a decompression bomb?); "
            "shrink or remove it"
        ) from error
    except Exception as error:  # Pillow's plugins raise many kinds for a damaged file; all mean the same here
        raise InputError(
            f"{_shown(file)} cannot be read as an image ({type(error).__name__}); repair or remove it"
        ) from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


# ---------------------------------------------------------------------------------------------------------------
# Reading .npz


def _load_npz(path: Path, image_size: int, channels: int) -> ImageSet:
    arrays = _read_arrays(path, ("images", "labels", "class_names"))
    if "images" not in arrays:
        raise InputError(f"{_shown(path)} has no array 'images'; save it with numpy.savez(path, images=…)")
    images = arrays["images"]
    if images.dtype != np.uint8:
        trouble = f"is {images.dtype}"
        if np.issubdtype(images.dtype, np.inexact) and not np.isfinite(images).all():
            trouble += " and holds NaN or infinite values"
        raise InputError(f"'images' in {_shown(path)} {trouble}; it must be uint8, 0 (black) to 255 (white)")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"'images' in {_shown(path)} has shape {arrays['images'].shape}; it must be N x H x W, or N x H x W x C "
            "with C = 1, 3 or 4 last"
        )
    if 0 in images.shape:
        raise InputError(f"{_shown(path)} holds no image: 'images' has shape {arrays['images'].shape}")
    labels, class_names = None, None
    if "labels" in arrays:
        labels, class_names = _check_labels(path, arrays["labels"], len(images), arrays.get("class_names"))
    return ImageSet(
        images=to_model_range(_fit(images, image_size, channels)),
        labels=labels,
        class_names=class_names,
        notes=_fit_notes({images.shape[1:3]}, {images.shape[3]}, image_size, channels),
    )


def _read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an ``.npz`` that are there; pickled objects are refused, never executed."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{_shown(path)} is not an .npz archive; save it with numpy.savez(path, images=…)")
            return {name: archive[name] for name in names if name in archive.files}
    except InputError:
        raise
    except Exception as error:  # a damaged archive surfaces as one of a dozen kinds from zipfile, zlib and numpy
        if "allow_pickle" in str(error) and zipfile.is_zipfile(path):
            raise InputError(
                f"{_shown(path)} holds pickled objects, which are never loaded; save plain numeric arrays "
                "(all images of one size, uint8)"
            ) from error
        raise InputError(
            f"{_shown(path)} cannot be read as an .npz ({type(error).__name__}); save it with numpy.savez"
        ) from error


def _check_labels(
    path: Path, labels: np.ndarray, num_images: int, class_names: np.ndarray | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Validated labels and class names of an ``.npz``."""
    if labels.shape != (num_images,):
        raise InputError(
            f"'labels' in {_shown(path)} has shape {labels.shape} for {num_images} images; give one integer an image"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"'labels' in {_shown(path)} is {labels.dtype}; it must be integers 0, 1, 2, …")
    if labels.min() < 0:
        raise InputError(f"'labels' in {_shown(path)} holds {labels.min()}; labels count from 0")
    present = np.unique(labels)
    if class_names is None:
        names = None
        num_classes = int(present[-1]) + 1
    else:
        if class_names.ndim != 1 or class_names.dtype.kind != "U":
            raise InputError(f"'class_names' in {_shown(path)} must be a list of strings, one a class")
        names = tuple(str(name) for name in class_names)
        num_classes = len(names)
        if int(present[-1]) >= num_classes:
            raise InputError(f"'labels' in {_shown(path)} goes up to {present[-1]} with {num_classes} class_names")
        # Class names become folder names of the release, so none may lead elsewhere.
        unfit = [name for name in names if not name or name.startswith(".") or set(name) & set("/\\\0\n\r")]
        if unfit or len(set(names)) < len(names):
            raise InputError(
                f"'class_names' in {_shown(path)} must be distinct names usable as folder names"
                + (f", not {unfit[0]!r}" if unfit else "")
            )
    if len(present) < num_classes:
        missing = int(np.flatnonzero(np.append(present, num_classes) != np.arange(len(present) + 1))[0])
        raise InputError(
            f"class {missing if names is None else names[missing]!r} in {_shown(path)} has no image; labels must be "
            f"0 .. K-1 with every class present: renumber them or add images"
        )
    return torch.as_tensor(labels.astype(np.int64)), names or tuple(str(k) for k in range(num_classes))


# ---------------------------------------------------------------------------------------------------------------
# Fitting to the model


def _fit(images: np.ndarray, image_size: int, channels: int) -> np.ndarray:
    """uint8 ``(N, H, W, C)`` of any size to uint8 ``(N, image_size, image_size, channels)``, chunk by chunk."""
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    fitted = np.empty((len(images), image_size, image_size, channels), dtype=np.uint8)
    step = max(1, _PIXELS_AT_ONCE // (images.shape[1] * images.shape[2] * images.shape[3]))
    for start in range(0, len(images), step):
        chunk = resize(to_channels(to_model_range(images[start : start + step]), channels), image_size)
        fitted[start : start + step] = to_uint8(chunk).reshape(-1, image_size, image_size, channels)
    return fitted


def _fit_notes(sizes: set[tuple[int, ...]], kinds: set[int], image_size: int, channels: int) -> tuple[str, ...]:
    """What :func:`_fit` did, in words."""
    notes = []
    if sizes != {(image_size, image_size)}:
        shapes = sorted(sizes)
        source = f"{shapes[0][0]} x {shapes[0][1]}" if len(shapes) == 1 else f"{len(shapes)} different sizes"
        note = f"resized (antialiased) from {source} to {image_size} x {image_size} pixels"
        notes.append(note + (", not keeping proportions" if any(h != w for h, w in shapes) else ""))
    if kinds & {2, 4}:
        notes.append("laid transparent images over white")
    if channels == 1 and kinds & {3, 4}:
        notes.append("converted colour images to grey")
    if channels == 3 and kinds & {1, 2}:
        notes.append("repeated grey images in three channels")
    return tuple(notes)


def _shown(path: Path) -> str:
    """A path for a one-line message: quoted, so that odd characters cannot break the line."""
    return repr(str(path))
