"""Images and named data sets.

The ONE range contract
----------------------
Inside the library an image batch is a ``float32`` tensor ``(N, C, H, W)`` with values in ``[-1, 1]``:
``-1`` is black, ``+1`` is white. At the file boundary, and only there, it is ``uint8``: ``(N, H, W)`` for one
channel or ``(N, H, W, C)`` for several, ``0`` black and ``255`` white. :func:`to_model_range` and
:func:`to_uint8` are the only two conversions between them, and ``to_uint8(to_model_range(u)) == u`` exactly.

Everything read from files is brought to the model's size and channels while still on the 8-bit grid and
becomes float once, at the end; so a set written by :func:`save_npz`, or as 8-bit PNGs, reads back identical.

Bad input raises :class:`InputError`, whose message is one line saying what is wrong and what to do.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hyperdp_lib.data_sets import DATA_SETS, read
from hyperdp_lib.image_files import (
    IMAGE_SUFFIXES,
    ImageFiles,
    InputError,
    check_class_names,
    read_folder,
    read_npz,
    relabel,
    shown,
    write_npz,
    write_png,
)

__all__ = [
    "ImageSet",
    "InputError",
    "NAMED_DATA_SETS",
    "check_model_range",
    "digits",
    "load_images",
    "load_named_or_path",
    "require_source",
    "resize",
    "save_grid",
    "save_npz",
    "stretched",
    "to_channels",
    "to_model_range",
    "to_uint8",
]

_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
NAMED_DATA_SETS = tuple(f"{name}{part}" for name in ("digits", *DATA_SETS) for part in ("", "-test"))
# ITU-R BT.601 luma, what Pillow's mode "L" uses.
_LUMA = (0.299, 0.587, 0.114)
# Shares of an image's levels at which `stretched` puts black and white, and the least distance that is stretched.
_DARKEST, _BRIGHTEST, _LEAST_SPAN = 0.02, 0.98, 8
# Bounds the float working memory of a resize without slowing small images down.
_VALUES_AT_ONCE = 2**24


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
        How the files were read (depth, alpha, orientation, size, what was ignored), one decision a line.
    warnings
        What looks wrong about them, and what to do: a release should wait for an answer. As they depend on private
        images, both are for the operator's screen and belong in no artefact.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise InputError(f"images must be N x C x H x W, got {self.images.ndim} dimensions")
        if (self.labels is None) != (self.class_names is None):
            raise InputError("labels and class_names come together: give both or neither")
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise InputError("labels must hold one label for each image")  # their number may be secret

    def __len__(self) -> int:
        return len(self.images)


def from_levels(levels: Tensor) -> Tensor:
    """8-bit levels of any shape to float32 in ``[-1, 1]``: ``u / 127.5 - 1``, the one place that says so.

    >>> from_levels(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-1.,  1.])
    """
    return levels.to(torch.float32).div(127.5).sub(1.0)


def to_levels(images: Tensor) -> Tensor:
    """Floats of any shape to 8-bit levels, rounded to the nearest and clamped: the inverse of :func:`from_levels`.

    >>> to_levels(torch.tensor([-1.0, 0.0, 1.5])).tolist()
    [0, 128, 255]
    """
    return images.to(torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_model_range(images: np.ndarray | Tensor) -> Tensor:
    """8-bit images to the library's float range, ``u / 127.5 - 1``.

    Parameters
    ----------
    images
        ``(N, H, W)`` or ``(N, H, W, C)`` uint8.

    Returns
    -------
    Tensor
        ``(N, C, H, W)`` float32 in ``[-1, 1]``.

    Raises
    ------
    InputError
        When the dtype is not uint8 or the shape is neither of the two.

    Examples
    --------
    >>> to_model_range(np.array([[[0, 255]]], dtype=np.uint8))
    tensor([[[[-1.,  1.]]]])
    """
    if not isinstance(images, Tensor):
        # torch shares numpy's memory only when it is writable and laid out forwards
        images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    tensor = images
    if tensor.dtype != torch.uint8:
        raise InputError(f"images must be uint8 (0 to 255), got {tensor.dtype}: convert them before loading")
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(-1)
    if tensor.ndim != 4:
        raise InputError(f"images must be N x H x W or N x H x W x C, got {tuple(tensor.shape)}: reshape it")
    return from_levels(tensor.permute(0, 3, 1, 2)).contiguous()


def check_model_range(images: Tensor, name: str) -> None:
    """Return nothing, or raise `InputError`, if images are not finite floats in ``[-1, 1]``, up to 1e-3.

    The message says which images are meant by ``name``, and quotes no value: they may be private.

    >>> check_model_range(torch.tensor([1.0005, -1.0]), "images")
    """
    if images.is_floating_point() and (not images.numel() or bool(images.abs().amax() <= 1.001)):  # false for NaN
        return
    raise InputError(f"{name} must be finite floats in [-1, 1]: use data.to_model_range on 8-bit images.")


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
    levels = to_levels(images.detach().cpu())
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
    resized = functional.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(-1.0, 1.0)


def to_channels(images: Tensor, channels: int, background: str = "white") -> Tensor:
    """Convert between grey and colour.

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float in ``[-1, 1]``, C = 1 grey, 3 RGB, or 4 RGB + alpha.
    channels
        1 (ITU-R BT.601 luma) or 3.
    background
        What shows through: ``"white"``, as on a page, or ``"black"``.

    Returns
    -------
    Tensor
        ``(N, channels, H, W)`` float in ``[-1, 1]``.

    Examples
    --------
    >>> red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    >>> round(to_channels(red, 1).item(), 3)
    -0.402
    """
    if images.shape[1] == 4:
        alpha = (images[:, 3:] + 1.0) / 2.0
        images = images[:, :3] * alpha + (1.0 - alpha) * (-1.0 if background == "black" else 1.0)
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 3 and channels == 1:
        return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    if images.shape[1] == 1 and channels == 3:
        return images.repeat(1, 3, 1, 1)
    raise InputError(f"cannot turn {images.shape[1]} channels into {channels}: give grey or RGB images")


def stretched(images: Tensor) -> Tensor:
    """Images whose contrast is stretched, each by itself: its 2nd percentile becomes black and its 98th white.

    The rule is public and looks at one image at a time, never at others. So it is part of the encoder, in effect: a
    release's sensitivity is what it is without. Weights record whether their public images were stretched; private ones
    are read for them in the same way.

    Parameters
    ----------
    images
        ``(N, C, H, W)`` float in ``[-1, 1]``. The channels of an image share one rule, which keeps its colours.

    Returns
    -------
    Tensor
        ``(N, C, H, W)`` float32 in ``[-1, 1]``, on the 8-bit grid. An image of (nearly) one level stays as it is.

    Examples
    --------
    >>> grey = torch.linspace(-0.5, 0.0, 256).view(1, 1, 16, 16)
    >>> [round(value, 2) for value in (stretched(grey).min().item(), stretched(grey).max().item())]
    [-1.0, 1.0]
    """
    parts = []
    for part in images.split(4096):
        levels = to_levels(part).float()
        ordered = levels.flatten(1).sort(1).values
        last = ordered.shape[1] - 1
        places = math.floor(_DARKEST * last), math.ceil(_BRIGHTEST * last)
        low, high = (ordered[:, place, None, None, None] for place in places)
        span = high - low
        new = ((levels - low) * (255.0 / span.clamp_min(1.0))).round().clamp(0, 255)
        parts.append(from_levels(torch.where(span >= _LEAST_SPAN, new, levels)))
    return torch.cat(parts) if parts else images


def _with_contrast(read: ImageSet, stretch: bool) -> ImageSet:
    """The set itself, or with each image's contrast stretched and a note that says so."""
    if not stretch:
        return read
    note = "stretched each image's contrast, as these weights' public images (2nd to 98th percentile)"
    return dataclasses.replace(read, images=stretched(read.images), notes=(*read.notes, note))


def load_images(
    path: str | os.PathLike[str],
    image_size: int = 16,
    channels: int = 1,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
    background: str = "white",
    stretch: bool = False,
) -> ImageSet:
    """Read a folder of images, a folder of class sub-folders, or an ``.npz``.

    Which classes there are is public and never read off the labels: it is declared, by ``class_names`` here or in the
    archive, or by the sub-folders. A class without an image is as good as any other, and so is a set without images.

    Parameters
    ----------
    path
        A folder (see :func:`hyperdp_lib.image_files.read_folder` for order and links), or an ``.npz`` with ``images``
        (uint8, N x H x W or N x H x W x C), optional ``labels`` (N, or N x 1, numbers 0 .. K-1; or N names; or one-hot,
        N x K) and ``class_names`` (K strings). Of an archive in parts (``train_images``) the part for training is read.
    image_size
        Side in pixels to which every image is resized, antialiased.
    channels
        1 or 3.
    labelled
        False: leave out class folders' names and labels.
    class_names
        The classes, in label order. A sub-folder, or a class of the archive, that is not among them is an error.
    window
        The levels that are black and white in files of more than 8 bits, say ``(0, 4095)`` for 12-bit pictures in
        16-bit files; levels beyond are clamped. None: the range of the files' format.
    background
        What transparent images are laid over: ``"white"`` or ``"black"``.
    stretch
        Whether each image's contrast is stretched, see :func:`stretched`: as the weights say for which they are read.

    Returns
    -------
    ImageSet
        Its ``notes`` say how everything was read, its ``warnings`` what looks wrong.

    Raises
    ------
    InputError
        For anything that is missing, damaged or ambiguous, naming the file; never for what images show or which class
        has one. See :mod:`hyperdp_lib.image_files` for what one private image can cause.
    """
    path = Path(path)
    declared = _check_reading(labelled, class_names, window, background)
    fit = partial(fit_levels, image_size=image_size, channels=channels, background=background)
    if not path.exists():
        raise InputError(f"no such file or folder: {shown(path)}; give a folder of images or an .npz")
    if path.is_dir():
        files = read_folder(path, fit, labelled, declared, window)
    elif path.suffix.lower() == ".npz":
        files = read_npz(path, fit, labelled, declared, window)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise InputError(f"{shown(path)} is a single image; give the folder that holds the images")
    else:
        raise InputError(f"{shown(path)} is neither a folder nor an .npz; give a folder of images or an .npz")
    read = ImageSet(
        images=to_model_range(files.images),
        labels=None if files.labels is None else torch.as_tensor(files.labels.astype(np.int64)),
        class_names=files.class_names,
        notes=_notes(files, image_size, channels, background),
        warnings=files.warnings,
    )
    return _with_contrast(read, stretch)


def _check_reading(
    labelled: bool, class_names: Sequence[str] | None, window: tuple[float, float] | None, background: str
) -> tuple[str, ...] | None:
    """The declared class names; raises when the declarations cannot be meant."""
    if class_names is not None and not labelled:
        raise InputError("classes are declared but labels are to be left out; give --classes or --unlabelled, not both")
    if window is not None and not (all(map(math.isfinite, window)) and window[0] < window[1]):
        raise InputError(f"the window must be two levels, black below white, got {window}; 0 4095 fits 12 bits")
    if background not in ("white", "black"):
        raise InputError(f"the background must be white or black, got {background!r}; choose one")
    return None if class_names is None else check_class_names(class_names, "the declared classes")


def load_named_or_path(
    name_or_path: str | os.PathLike[str],
    image_size: int = 16,
    channels: int = 1,
    *,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
    background: str = "white",
    stretch: bool = False,
) -> ImageSet:
    """A named data set (one of ``NAMED_DATA_SETS``) or whatever :func:`load_images` reads, with the same options.

    All names but ``digits`` are read from the folder named by the environment variable ``HYPERDP_DATA``; see
    :mod:`hyperdp_lib.data_sets`. ``-test`` behind a name means the test split. Their classes are public; declared ones
    must hold all of them.

    A name wins over a folder of the same name; write ``./digits`` for the folder. ``NAME/CLASS`` is one class of a
    named set, and ``NAME/all`` all of them, as one set without labels.

    Examples
    --------
    >>> len(load_named_or_path("digits-test"))
    360
    >>> load_named_or_path("digits/3").labels is None
    True
    """
    name = os.fspath(name_or_path)
    whole, _, wanted = name.partition("/")
    if whole not in NAMED_DATA_SETS or (not wanted and name != whole):
        require_source(name)
        options = dict(
            labelled=labelled, class_names=class_names, window=window, background=background, stretch=stretch
        )
        return load_images(name, image_size, channels, **options)  # type: ignore[arg-type]
    declared = _check_reading(labelled, class_names, window, background)
    if window is not None:
        raise InputError(f"{whole} has 8-bit images, in their own range; leave out --window (window=)")
    base, split = whole.removesuffix("-test"), "test" if whole.endswith("-test") else "train"
    named = digits(split, image_size) if base == "digits" else _external(base, split, image_size, channels)
    named = _with_contrast(dataclasses.replace(named, images=to_channels(named.images, channels)), stretch)
    images, names = named.images, named.class_names or ()
    if wanted:
        if declared is not None:
            raise InputError(f"{name} has no labels; leave the classes out")
        if wanted == "all":
            return ImageSet(images, notes=named.notes)
        if wanted not in names or named.labels is None:
            raise InputError(f"{whole!r} has no class {wanted!r}; it has {', '.join(names)}, or all")
        return ImageSet(images[named.labels == names.index(wanted)], notes=named.notes)
    if not labelled or named.labels is None:
        return ImageSet(images, notes=named.notes)
    labels = relabel(named.labels.numpy(), names, declared, name)
    return ImageSet(images, torch.as_tensor(labels), names if declared is None else declared, named.notes)


def require_source(name_or_path: str | os.PathLike[str]) -> None:
    """Raise `InputError` unless this is a named data set or something that exists."""
    name = os.fspath(name_or_path)
    if name.partition("/")[0] not in NAMED_DATA_SETS and not os.path.exists(name):
        known = ", ".join(NAMED_DATA_SETS)
        raise InputError(f"no such file or folder: {name!r}; give a folder, an .npz or one of {known}")


def digits(split: str = "train", image_size: int = 16) -> ImageSet:
    """scikit-learn's handwritten digits (Alpaydin & Kaynak 1998, UCI), white on black, ten classes.

    The split is public and fixed: ``sklearn.model_selection.train_test_split`` of the 1,797 indices with
    ``test_size=360, random_state=0, stratify=labels``, each part then in the original order.

    Parameters
    ----------
    split
        ``"train"`` (1,437 images) or ``"test"`` (360).
    image_size
        The 8 x 8 originals (levels 0 .. 16, spread over 0 .. 255) are resized to this side.

    Returns
    -------
    ImageSet

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
    everything = np.arange(len(source.target))
    parts = train_test_split(everything, test_size=360, random_state=0, stratify=source.target)
    index = np.sort(parts[0 if split == "train" else 1])
    levels = np.rint(source.images[index] * (255.0 / 16.0)).astype(np.uint8)
    return ImageSet(
        images=to_model_range(fit_levels(levels[..., None], image_size, channels=1)),
        labels=torch.as_tensor(source.target[index].astype(np.int64)),
        class_names=_DIGIT_NAMES,
        notes=() if image_size == 8 else (_resize_note([(8, 8)], image_size),),
    )


def _external(name: str, split: str, image_size: int, channels: int) -> ImageSet:
    """A data set of the table `data_sets.DATA_SETS`, from ``HYPERDP_DATA``."""
    stored = read(name, split)
    size = stored.images.shape[1:3]
    notes = [] if size == (image_size, image_size) else [_resize_note([size], image_size)]
    if DATA_SETS[name].caveat:
        notes.append(f"{name}: {DATA_SETS[name].caveat}")
    return ImageSet(
        images=to_model_range(fit_levels(stored.images, image_size, channels)),
        labels=torch.as_tensor(stored.labels),
        class_names=stored.class_names,
        notes=tuple(notes),
    )


def save_npz(path: str | os.PathLike[str], image_set: ImageSet) -> None:
    """Write ``images`` and, when labelled, ``labels`` and ``class_names``; :func:`load_images` reads it."""
    arrays = {"images": to_uint8(image_set.images)}
    if image_set.labels is not None and image_set.class_names is not None:
        arrays["labels"] = image_set.labels.cpu().numpy().astype(np.int64)
        arrays["class_names"] = np.array(image_set.class_names, dtype=np.str_)
    write_npz(Path(path), arrays)


def save_grid(path: str | os.PathLike[str], image_set: ImageSet, columns: int = 10, rows: int = 10) -> None:
    """Write a PNG sheet: the first images in reading order, or one row per class when labelled.

    At most ``columns`` images a row; at most ``rows`` rows when unlabelled, every class when labelled.
    Pixels are enlarged until an image is about 64 wide; gaps are mid-grey.
    """
    if image_set.labels is None:
        chosen = torch.arange(min(len(image_set), columns * rows)).split(columns)
    else:
        assert image_set.class_names is not None
        members = [(image_set.labels == k).nonzero()[:, 0] for k in range(len(image_set.class_names))]
        chosen = tuple(index[:columns] for index in members)
    channels, height, width = image_set.images.shape[1:]
    scale = max(1, 64 // width)
    sheet = torch.zeros(1, channels, len(chosen) * (height + 1) - 1, columns * (width + 1) - 1)
    for row, index in enumerate(chosen):
        for column, image in enumerate(image_set.images[index]):
            top, left = row * (height + 1), column * (width + 1)
            sheet[0, :, top : top + height, left : left + width] = image
    write_png(Path(path), to_uint8(sheet)[0].repeat(scale, axis=0).repeat(scale, axis=1))


def fit_levels(images: np.ndarray, image_size: int, channels: int, background: str = "white") -> np.ndarray:
    """uint8 ``(N, H, W, C)`` of any size to uint8 ``(N, image_size, image_size, channels)``, in chunks."""
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    fitted = np.empty((len(images), image_size, image_size, channels), dtype=np.uint8)
    step = max(1, _VALUES_AT_ONCE // int(np.prod(images.shape[1:])))
    for start in range(0, len(images), step):
        chunk = resize(to_channels(to_model_range(images[start : start + step]), channels, background), image_size)
        fitted[start : start + step] = to_uint8(chunk).reshape(-1, image_size, image_size, channels)
    return fitted


def _notes(files: ImageFiles, image_size: int, channels: int, background: str) -> tuple[str, ...]:
    notes = list(files.notes)
    if files.sizes - {(image_size, image_size)}:
        notes.append(_resize_note(sorted(files.sizes), image_size))
    if 4 in files.kinds:
        notes.append(f"laid transparent images over {background}")
    if channels == 1 and files.kinds & {3, 4}:
        notes.append("converted colour images to grey")
    if channels == 3 and 1 in files.kinds:
        notes.append("repeated grey images in three channels")
    return tuple(notes)


def _resize_note(sizes: list[tuple[int, int]], image_size: int) -> str:
    source = f"{sizes[0][0]} x {sizes[0][1]}"
    if len(sizes) > 1:
        source = f"{len(sizes)} different sizes ({source} .. {sizes[-1][0]} x {sizes[-1][1]})"
    stretched = ", stretching those not square" if any(height != width for height, width in sizes) else ""
    return f"resized (antialiased) from {source} to {image_size} x {image_size} pixels{stretched}"
