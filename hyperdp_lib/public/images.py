"""Public images of one's own as endless tasks, like those of `glyphs`, `drawings` and `photographs`.

Folders of class sub-folders, flat folders and ``.npz`` archives, several of them together, grey or colour:

* exact copies are left out but for one;
* each class is divided into *groups* of images that look alike, by k-means of the leading principal components of its
  pixels; a class of few images is one group;
* a tenth of the groups, chosen by a hash of their names, is held out from training: they serve `forecast`, the table
  of losses and the checks;
* a task is a group, images that resemble one, neighbouring groups, several of a class, or a mixture of any, in one
  style: light, contrast, gamma, sharpness, zoom, stretch, turn and shift, mirrored where that is allowed.

If contrast is stretched (`hyperdp_lib.data.stretched`, image by image), that is so for public and private images alike.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor

from hyperdp_lib import image_files
from hyperdp_lib.data import InputError, fit_levels, from_levels, stretched, to_levels, to_model_range
from hyperdp_lib.pretrained import COPIES_FILE, image_hashes
from hyperdp_lib.public.drawings import look_alikes, mixed
from hyperdp_lib.public.glyphs import share_of

FEWEST_IMAGES, FEWEST_GROUPS = 500, 8
FEWEST = 8  # images of a group; of a smaller cluster they go to the nearest others of its class
PER_GROUP = (20, 120)  # images of a group, about: fewer where there are few
WANTED_GROUPS = 280  # in between
LOOKS = 24  # principal components by which images resemble each other
SIDES = (16, 64)
_EDGES = 4  # groups to which a group is a neighbour


@dataclass(frozen=True)
class ImageConfig:
    """What the public tasks are made of (public).

    Attributes
    ----------
    sources : tuple of str
        Folders and ``.npz`` files. One that is not there is sought by its name in ``HYPERDP_DATA``.
    size : int, optional
        Side in pixels to which images are resized: 16 to 64, a multiple of 4, above 32 of 8. Default: the images' own.
    channels : int, optional
        1 grey, 3 colour. Default: the images' own.
    mirror : bool
        Whether a mirrored image is as likely as the image itself.
    stretch : bool
        Whether every image's contrast is stretched, public or private; see `hyperdp_lib.data.stretched`.
    held_out : float
        Share of the groups kept from training; at least two are.
    licence : str
        Of the images, for the model card.
    sha256 : str
        Of the images as loaded: other images under the same names are refused. Empty: any.
    """

    sources: tuple[str, ...] = ()
    size: int | None = None
    channels: int | None = None
    mirror: bool = False
    stretch: bool = True
    held_out: float = 0.1
    licence: str = "not stated"
    sha256: str = ""

    about: ClassVar[str] = "groups of your public images held out from training"

    def tasks(self, split: str = "train", *, progress: bool = True) -> ImageTasks:
        """The source of tasks."""
        return ImageTasks(self, split)

    def require(self) -> None:
        """Raise `InputError` unless all sources are there; reads none of them."""
        for source in self.sources:
            find(source)


class Groups(NamedTuple):
    """Public images, read and divided.

    ``images`` (N, C, S, S) uint8, ``group_of`` (N,), ``looks`` (N, D) float32, and of each group its class's number,
    of each class its name; ``copies`` and ``lost`` images were left out, as copies and in classes of too few.
    """

    images: Tensor
    group_of: Tensor
    looks: Tensor
    class_of: tuple[int, ...]
    class_names: tuple[str, ...]
    copies: int
    lost: int
    notes: tuple[str, ...]
    sha256: str


class ImageTasks:
    """An endless source of public tasks from images of one's own; used like `glyphs.GlyphTasks`.

    Parameters
    ----------
    config : what images there are.
    split : ``"train"`` or ``"held_out"``: groups, with all their images, belong to one of the two.

    Attributes
    ----------
    pixels : Tensor
        ``(N, C, S, S)`` uint8: the images of the split.
    group_names : list of str
        Class and number, ``"xrays/chest 3"``.

    Raises
    ------
    InputError
        If sources are missing or unreadable, mix grey and colour or sizes that were not declared, or hold fewer than
        500 images or 8 groups.

    Examples
    --------
    >>> tasks = ImageTasks(ImageConfig(("xrays/",)))  # doctest: +SKIP
    >>> tasks.sample_tasks(4, 10, torch.Generator()).shape  # doctest: +SKIP
    torch.Size([4, 10, 1, 28, 28])
    """

    def __init__(self, config: ImageConfig, split: str = "train") -> None:
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        self.config = config
        self._all = everything = load_groups(config)
        names = [f"{everything.class_names[number]} {group}" for group, number in enumerate(everything.class_of)]
        out = max(2, round(config.held_out * len(names)))
        kept_out = set(sorted(range(len(names)), key=lambda group: (share_of(names[group]), group))[:out])
        self._held_out = len(kept_out)
        chosen = [group for group in range(len(names)) if (group in kept_out) == (split == "held_out")]
        self.group_names = [names[group] for group in chosen]
        members = [(everything.group_of == group).nonzero()[:, 0] for group in chosen]
        rows = torch.cat(members)
        self.pixels, self._looks = everything.images[rows], everything.looks[rows]
        bounds = torch.tensor([0, *map(len, members)]).cumsum(0)
        self._members = [torch.arange(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        classes = torch.tensor([everything.class_of[group] for group in chosen])
        self._relatives = [(classes == number).nonzero()[:, 0] for number in classes]
        centres = torch.stack([self._looks[mine].mean(0) for mine in self._members])
        order = torch.cdist(centres, centres).argsort(1)
        self._neighbours = order[:, 1 : 1 + _EDGES]

    @property
    def num_classes(self) -> int:
        """Groups of the split."""
        return len(self._members)

    def describe(self) -> dict:
        """Counts and licence for the model card."""
        config, all_images = self.config, self._all
        per_class = torch.tensor(all_images.class_of)[all_images.group_of].bincount()
        sources = ", ".join(Path(source).name for source in config.sources)
        left_out = f" Left out: {all_images.copies} exact copies" + (
            f", {all_images.lost} images of classes with fewer than {FEWEST}." if all_images.lost else "."
        )
        contrast = "stretched image by image, of private images too" if config.stretch else "as it is"
        return {
            "text": f"{len(all_images.images)} public images of {sources}, {len(all_images.class_names)} classes in "
            f"{len(all_images.class_of)} groups that look alike, {self._held_out} of which are held out from training."
            f"{left_out} Contrast {contrast}. A task is a group (30 %), images that look alike (20 %), neighbouring "
            "groups (15 %), several of a class (20 %) or 2 to 24 of any (15 %), each in a style.",
            "limits": "Made for images like these public ones. How far private images may differ was not measured",
            "licence": config.licence,
            "sources": list(config.sources),
            "images": len(all_images.images),
            "images_per_class": dict(zip(all_images.class_names, per_class.tolist(), strict=True)),
            "classes": self.num_classes,
            "groups": len(all_images.class_of),
            "held_out_groups": self._held_out,
            "copies": all_images.copies,
            "mirror": config.mirror,
            "stretch": config.stretch,
            "reading": list(all_images.notes),
        }

    def sample_tasks(
        self,
        num_tasks: int,
        images_per_task: int,
        generator: torch.Generator,
        *,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Draw tasks: (T, M, C, S, S) float32 in [-1, 1]. ``classes`` (T,) fixes the group of each."""
        rows = torch.stack([
            self._choose(images_per_task, generator, None if classes is None else int(classes[t]))
            for t in range(num_tasks)
        ])  # fmt: skip
        images = from_levels(self.pixels[rows.flatten()])
        return self._dress(images, num_tasks, images_per_task, generator).unflatten(0, rows.shape)

    def _choose(self, count: int, g: torch.Generator, group: int | None) -> Tensor:
        """Images (M,) of a task, none twice if there are enough."""
        kind, draw = torch.rand(2, generator=g).tolist()
        first = min(int(draw * self.num_classes), self.num_classes - 1)
        if group is not None:
            first, kind = group, 0.0
        relatives = self._relatives[first]
        parts = [self._members[first]]
        if 0.3 <= kind < 0.5:
            mine = torch.cat([self._members[one] for one in relatives])
            parts = [look_alikes(mine, self._looks[mine], g)]
        elif kind >= 0.5:
            others = self._neighbours[first] if kind < 0.65 else relatives
            most = len(others) + 1 if kind < 0.65 else 8
            if kind >= 0.85:
                others, most = torch.arange(self.num_classes), 24
            picked = others[torch.randperm(len(others), generator=g)]
            number = int(torch.randint(1, max(2, min(most, len(picked) + 1)), (), generator=g))
            together = dict.fromkeys([first, *picked[:number].tolist()])
            parts = [self._members[one] for one in together]
        pool, weights = mixed(parts, g)
        return pool[torch.multinomial(weights, count, replacement=len(pool) < 2 * count, generator=g)]

    def _dress(self, images: Tensor, num_tasks: int, per_task: int, g: torch.Generator) -> Tensor:
        """Images (T * M, C, S, S) in the styles of their tasks; draws as many numbers whatever the styles."""

        def task(low: float, high: float) -> Tensor:  # one number a task
            return (low + (high - low) * torch.rand(num_tasks, 1, generator=g)).expand(-1, per_task).reshape(-1)

        def coin(p: float) -> Tensor:
            return (torch.rand(num_tasks, 1, generator=g) < p).expand(-1, per_task).reshape(-1)

        def image() -> Tensor:  # one standard normal number an image
            return torch.randn(len(images), generator=g)

        # where each pixel looks: the task's own zoom, stretch, turn and shift, each image's a little different
        moved, jitter = coin(0.5), task(0.0, 1.0)
        zoom = torch.exp(task(-0.05, 0.22) + 0.04 * jitter * image())
        stretch = torch.exp(task(-0.08, 0.08) + 0.03 * jitter * image())
        angle = task(-0.12, 0.12) + 0.05 * jitter * image()
        x, y = (task(-0.08, 0.08) + 0.04 * jitter * image() for _ in range(2))
        mirrored = torch.rand(len(images), generator=g) < torch.where(coin(0.5), 0.5, coin(0.5).float())
        if self.config.mirror:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if moved.any():
            cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
            where = torch.stack([
                torch.stack([cos / stretch, -sin / stretch, x], 1), torch.stack([sin * stretch, cos * stretch, y], 1)
            ], 1)[moved]  # fmt: skip
            chosen = images[moved]
            grid = F.affine_grid(where, list(chosen.shape), align_corners=False)
            images = images.clone()
            images[moved] = F.grid_sample(chosen, grid, mode="bilinear", padding_mode="border", align_corners=False)
        # softer, or sharper: away from the image's own blurred copy, or towards it
        altered, amount = coin(0.4), task(-0.5, 0.9)
        if altered.any():
            chosen = images[altered]
            blurred = F.avg_pool2d(F.pad(chosen, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
            images = images.clone()
            images[altered] = chosen.lerp(blurred, amount[altered, None, None, None])
        # one light for the whole task, each image's a little different
        lit = coin(0.6)[:, None, None, None]
        gamma = torch.exp(task(-0.4, 0.4) + 0.08 * jitter * image())[:, None, None, None]
        contrast = torch.exp(task(-0.35, 0.15) + 0.05 * jitter * image())[:, None, None, None]
        light = (task(-0.2, 0.2) + 0.04 * jitter * image())[:, None, None, None]
        bright = (images.clamp(-1, 1) + 1) / 2
        return torch.where(lit, (2 * bright.pow(gamma) - 1) * contrast + light, images).clamp(-1, 1)


# ---- reading and dividing ----------------------------------------------------------------------------------


def find(source: str) -> Path:
    """Where a source is: as given, else by its name in the folder named by ``HYPERDP_DATA``."""
    path, folder = Path(source), os.environ.get("HYPERDP_DATA", "")
    for place in (path, *([Path(folder) / path.name] if folder else [])):
        if place.exists():
            return place
    raise InputError(
        f"the public images {source!r} are not there; give a folder or .npz that is, or name the folder that holds "
        f"{path.name!r} in HYPERDP_DATA"
    )


_KEPT: dict[ImageConfig, Groups] = {}


def load_groups(config: ImageConfig) -> Groups:
    """Public images, read, stretched if so declared, and divided into groups; the last ones are kept in memory."""
    key = dataclasses.replace(config, sha256="", licence="", mirror=False, held_out=0.0)
    if key not in _KEPT:
        read = _load(key)
        _KEPT.clear()  # the last ones, under what was declared and under what was found
        _KEPT[key] = read
        _KEPT[dataclasses.replace(key, size=read.images.shape[-1], channels=read.images.shape[1])] = read
    found = _KEPT[key]
    if config.sha256 not in ("", found.sha256):
        raise InputError(
            f"the images of {', '.join(config.sources)} are not those that the weights were trained on: put those "
            "back, or train again"
        )
    return found


def settled(config: ImageConfig) -> ImageConfig:
    """The configuration with size, channels and hash of the images that are there; errors as of `ImageTasks`."""
    found = load_groups(config)
    return dataclasses.replace(
        config, size=found.images.shape[-1], channels=found.images.shape[1], sha256=found.sha256
    )


def _load(config: ImageConfig) -> Groups:
    if not config.sources:
        raise InputError("no public images: give a folder or an .npz")
    places = [find(source) for source in config.sources]
    kinds = [_peek(place) for place in places]
    size, channels = _shape(config, places, kinds)
    names: list[str] = []
    pixels, labels, notes = [], [], []
    for place, name in zip(places, _distinct([place.stem for place in places]), strict=True):
        files = _read(place, size, channels)
        met = {1 if kind == 1 else 3 for kind in files.kinds}
        if config.channels is None and met - {channels}:
            raise InputError(f"{str(place)!r} holds grey and colour images; give --channels 1 or 3 to make all alike")
        sides = sorted(files.sizes)
        if config.size is None and sides and sides != [(size, size)]:
            raise InputError(f"{str(place)!r} holds images that are not {size} x {size}; say the size: --size {size}")
        numbers = np.zeros(len(files.images), dtype=np.int64) if files.labels is None else files.labels
        pixels.append(files.images)
        labels.append(numbers + len(names))
        names += [name] if files.class_names is None else [f"{name}/{one}" for one in files.class_names]
        notes += [f"{name}: {note}" for note in files.notes]
    images = to_model_range(np.concatenate(pixels))
    if config.stretch:
        images = stretched(images)
    levels, label = to_levels(images), torch.from_numpy(np.concatenate(labels))
    kept = _first_of_each(image_hashes(levels))
    copies = len(levels) - len(kept)
    levels, label = levels[kept], label[kept]
    if len(levels) < FEWEST_IMAGES:
        raise InputError(
            f"{len(levels)} different public images{f' ({copies} more are copies)' if copies else ''} are too few: "
            f"give {FEWEST_IMAGES - len(levels)} more, {FEWEST_IMAGES} at least"
        )
    looks = _looks(levels)
    group_of, class_of = _divide(looks, label, len(names))
    if len(class_of) < FEWEST_GROUPS:
        raise InputError(
            f"the public images make {len(class_of)} groups of {FEWEST} images or more, {FEWEST_GROUPS} are needed: "
            f"give more images, or larger classes (now: {len(names)} of {len(levels) // len(names)} on average)"
        )
    present = group_of >= 0
    levels, group_of, looks = levels[present], group_of[present], looks[present]
    used = sorted(set(class_of))
    digest = hashlib.sha256(np.sort(image_hashes(levels)).tobytes() + group_of.numpy().tobytes()).hexdigest()
    return Groups(
        levels, group_of, looks, tuple(used.index(number) for number in class_of), tuple(names[one] for one in used),
        copies, int((~present).sum()), tuple(notes), digest,
    )  # fmt: skip


def _peek(place: Path) -> tuple[int, int, int] | None:
    """Height, width and channels (1 or 3) of the first image of a source; None if it holds none."""
    if place.is_dir():
        folders = [place, *sorted(one for one in place.iterdir() if one.is_dir() and not one.name.startswith("."))]
        for folder in folders:
            for file in sorted(folder.iterdir()):
                if file.suffix.lower() in image_files.IMAGE_SUFFIXES and not file.name.startswith("."):
                    shape = image_files.decode(file).shape
                    return shape[0], shape[1], 1 if shape[2] == 1 else 3
        return None
    if place.suffix.lower() != ".npz":
        raise InputError(f"{str(place)!r} is neither a folder nor an .npz; give a folder of images or an .npz")
    stored = image_files.array_names(place)
    key = next((images for images, _ in image_files.LAYOUTS if images in stored), "images")
    images = image_files.read_arrays(place, (key,)).get(key)
    if images is None or images.ndim not in (3, 4) or not len(images):
        return None  # what is wrong is said where it is read
    return images.shape[1], images.shape[2], 3 if images.ndim == 4 and images.shape[3] != 1 else 1


def _shape(
    config: ImageConfig, places: Sequence[Path], kinds: Sequence[tuple[int, int, int] | None]
) -> tuple[int, int]:
    """Size and channels to read with: as declared, else the first images'."""
    seen = {str(place): kind for place, kind in zip(places, kinds, strict=True) if kind is not None}
    size, channels = config.size, config.channels
    if channels is None:
        if len({kind[2] for kind in seen.values()}) > 1:
            told = ", ".join(f"{place} {'grey' if kind[2] == 1 else 'colour'}" for place, kind in seen.items())
            raise InputError(f"the public images are grey and colour ({told}); give --channels 1 or 3")
        channels = next((kind[2] for kind in seen.values()), 1)
    if channels not in (1, 3):
        raise InputError(f"--channels must be 1 (grey) or 3 (colour), got {channels}")
    if size is None:
        sides = {side for kind in seen.values() for side in kind[:2]}
        if len(sides) > 1:
            raise InputError("the public images differ in size; say to which they are brought: --size, for example 28")
        size = next(iter(sides), SIDES[0])
    if not SIDES[0] <= size <= SIDES[1] or size % 4 or (size > 32 and size % 8):
        raise InputError(
            f"--size must be a multiple of 4 from {SIDES[0]} to 32, or of 8 to {SIDES[1]}, got {size}; give one of them"
        )
    return size, channels


def _read(place: Path, size: int, channels: int) -> image_files.ImageFiles:
    """A source as it is read for private images; but labels without names may say here which classes there are."""
    fit = functools.partial(fit_levels, image_size=size, channels=channels)
    if place.is_dir():
        return image_files.read_folder(place, fit)
    stored = image_files.array_names(place)
    key = next((labels for images, labels in image_files.LAYOUTS if images in stored), "labels")
    declared = None
    if key in stored and "class_names" not in stored:
        labels = image_files.read_arrays(place, (key,))[key]
        if labels.dtype.kind in "iu" and labels.size and labels.min() >= 0:
            one_hot = labels.ndim == 2 and labels.shape[1] > 1
            declared = [str(number) for number in range(labels.shape[1] if one_hot else int(labels.max()) + 1)]
        elif labels.dtype.kind == "U":
            declared = sorted({str(label) for label in labels.flatten()})
    return image_files.read_npz(place, fit, class_names=declared)


def _distinct(stems: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same."""
    return [f"{stem}-{stems[:i].count(stem) + 1}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]


def _first_of_each(hashes: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sort(np.unique(hashes, return_index=True)[1]))


def _looks(levels: Tensor) -> Tensor:
    """Principal components (N, D) of images of at most 16 x 16 pixels, by which they resemble each other."""
    small = torch.cat([F.adaptive_avg_pool2d(from_levels(part), 16).flatten(1) for part in levels.split(5000)])
    centred = (small - small.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return (centred @ vectors.flip(1)[:, :LOOKS]).float()


def _divide(looks: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, list[int]]:
    """Group of each image (N,), -1 for none, and the class of each group."""
    wanted = min(max(len(looks) / WANTED_GROUPS, PER_GROUP[0]), PER_GROUP[1])
    group_of = torch.full((len(looks),), -1)
    class_of: list[int] = []
    for number in range(num_classes):
        mine = (labels == number).nonzero()[:, 0]
        if len(mine) < FEWEST:
            continue
        found = _clusters(looks[mine].double().numpy(), max(1, round(len(mine) / wanted)))
        group_of[mine] = torch.from_numpy(found) + len(class_of)
        class_of += [number] * (int(found.max()) + 1)
    return group_of, class_of


def _clusters(points: np.ndarray, count: int) -> np.ndarray:
    """Cluster of each point (N,), numbered from 0, none of fewer than `FEWEST` if there are as many points."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        fitted = KMeans(count, n_init=1, max_iter=50, random_state=0).fit(points)
    sizes = np.bincount(fitted.labels_, minlength=count)
    large = np.flatnonzero(sizes >= FEWEST)
    if not len(large):
        return np.zeros(len(points), dtype=np.int64)
    gaps = np.square(points[:, None] - fitted.cluster_centers_[large][None]).sum(2)
    nearest = large[gaps.argmin(1)]
    labels = np.where(sizes[fitted.labels_] >= FEWEST, fitted.labels_, nearest)
    return np.searchsorted(large, labels).astype(np.int64)


# ---- which images were public ------------------------------------------------------------------------------


def save_hashes(folder: Path, config: ImageConfig) -> None:
    """Write which images these weights were trained on, as hashes in order, 8 bytes each."""
    hashes = np.sort(image_hashes(load_groups(config).images))
    (folder / COPIES_FILE).write_bytes(to_safetensors({"hashes": torch.from_numpy(hashes)}))
