"""Public photographs in colour, Tiny-ImageNet, as tasks like those of `glyphs` and `drawings`.

The private images may be CIFAR-10's, so what is public must not contain them:

* classes that are kinds of a CIFAR-10 class by WordNet, or look like one, are left out by a list (`OVERLAPPING`)
  written down from names before any result was seen; `PhotographConfig.overlap` keeps them;
* public photographs that show the same picture as one of CIFAR-10 are always left out (`DUPLICATES`, found by
  `duplicates.check`). That list was found by looking at CIFAR-10, which plays the private part here: nobody can make it
  for images that are private indeed. It takes pictures away and can only cost the methods that use public data.

A task is a class, photographs of a class that resemble each other, or several classes together, in one style: mirrored,
tinted, brighter or darker, or seen closer. A class in other colours, grey or with red and blue exchanged, is another
class, three in all. Only the training split is used.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdp_lib import data_sets
from hyperdp_lib.data import InputError, from_levels, resize, to_levels
from hyperdp_lib.public.drawings import look_alikes, mixed
from hyperdp_lib.public.glyphs import share_of

OVERLAPPING = {
    "automobile": ("beach wagon", "convertible", "go-kart", "limousine", "sports car"),
    "bird": ("goose", "black stork", "king penguin", "albatross"),
    "cat": ("tabby", "Persian cat", "Egyptian cat", "cougar", "lion"),
    "deer": ("gazelle",),  # no deer, but shaped like one
    "dog": (
        "Chihuahua", "Yorkshire terrier", "golden retriever", "Labrador retriever", "German shepherd",
        "standard poodle",
    ),
    "frog": ("bullfrog", "tailed frog"),
    "ship": ("lifeboat", "gondola"),
    # buses and a tractor are no trucks, but shaped like them
    "truck": ("moving van", "police van", "school bus", "tractor", "trolleybus"),
}  # fmt: skip
"""Of each CIFAR-10 class, the classes of Tiny-ImageNet that overlap it; none does with airplanes and horses."""

DUPLICATES = (
    1049, 1074, 1202, 1298, 1462, 1463, 1522, 1526, 1543, 1568, 1641, 1667, 1699, 1724, 1753, 1815, 1817, 1890, 1966,
    1995, 12244, 12281, 12357, 12368, 13290, 13631, 14007, 15028, 15047, 15077, 15164, 15169, 15278, 15281, 15393,
    15441, 15593, 15629, 15851, 16061, 16140, 16185, 20880, 21077, 23335, 35434, 47193, 55426, 57956, 60649, 60673,
    60699, 60724, 60730, 60736, 60848, 66614,
)  # fmt: skip
"""Rows of Tiny-ImageNet's training split: the suspects of the duplicate check's record ``tinyimagenet-cifar10``."""

COLOURS = 3  # as they are, grey, red and blue exchanged
FEWEST = 8  # photographs of a class
LOOKS = 4  # pixels of a side of the coarse pictures by which photographs resemble each other
NEIGHBOURS = 8  # classes to either side, in the order of WordNet, that a union may be taken from
CLOSEST = 0.6  # of the side, that is seen of a photograph
_SETS = {"tiny-imagenet-32", "tiny-imagenet-32-jpeg"}  # whose rows `DUPLICATES` are


@dataclass(frozen=True)
class PhotographConfig:
    """What the public tasks are made of (public).

    Attributes
    ----------
    data_sets : tuple of str
        Names of colour sets of `hyperdp_lib.data_sets.DATA_SETS`; the files are sought in ``HYPERDP_DATA``.
    image_size : int
        16 or 32.
    overlap : bool
        Keep the classes that overlap those of CIFAR-10.
    held_out : float
        Share of the classes kept from training.
    """

    data_sets: tuple[str, ...] = ("tiny-imagenet-32-jpeg",)
    image_size: int = 16
    overlap: bool = False
    held_out: float = 0.1

    about: ClassVar[str] = "small photographs held out from training"

    def tasks(self, split: str = "train", *, progress: bool = True) -> PhotographTasks:
        """The source of tasks."""
        return PhotographTasks(self, split)


class PhotographTasks:
    """An endless source of public tasks from photographs; used like `glyphs.GlyphTasks`.

    Parameters
    ----------
    config : what photographs there are.
    split : ``"train"`` or ``"held_out"``: classes, with all their photographs, belong to one of the two.

    Attributes
    ----------
    class_names : list of str
        ``"tiny-imagenet-32-jpeg/goldfish, Carassius auratus"``, in the order of WordNet.
    pixels : Tensor
        ``(N, 3, 32, 32)`` uint8.
    """

    def __init__(self, config: PhotographConfig | None = None, split: str = "train") -> None:
        self.config = config = PhotographConfig() if config is None else config
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        if config.image_size not in (16, 32):
            raise InputError(f"image_size must be 16 or 32, got {config.image_size}.")
        pixels, labels, names = load_photographs(config.data_sets, os.environ.get("HYPERDP_DATA", ""))
        members = [(labels == number).nonzero()[:, 0] for number in range(len(names))]
        chosen = [
            number
            for number, name in enumerate(names)
            if (config.overlap or not overlaps(name))
            and (share_of(name) < config.held_out) == (split == "held_out")
            and len(members[number]) >= FEWEST
        ]
        if not chosen:
            raise InputError(f"no class of {', '.join(config.data_sets)} is left for the split {split!r}.")
        kept = torch.cat([members[number] for number in chosen])
        self.pixels = pixels[kept]
        self.class_names = [names[number] for number in chosen]
        bounds = torch.tensor([0, *(len(members[number]) for number in chosen)]).cumsum(0)
        self._members = [torch.arange(int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        self._looks = torch.cat([_looks(part) for part in self.pixels.split(5000)])  # (N, 48)
        self._small = self.pixels if config.image_size == 32 else _shrunk(self.pixels, config.image_size)

    @property
    def num_classes(self) -> int:
        """Classes, each in three colourings."""
        return COLOURS * len(self._members)

    def describe(self) -> dict:
        """Counts for the model card."""
        classes, excluded = len(self._members), sorted(name for names in OVERLAPPING.values() for name in names)
        told = (
            "Classes that overlap CIFAR-10's are kept"
            if self.config.overlap
            else f"{len(excluded)} classes that overlap CIFAR-10's are left out"
        )
        return {
            "text": f"{len(self.pixels)} photographs of {classes} classes, each in three colourings, of the training "
            f"split of {', '.join(self.config.data_sets)}. {told}; single photographs that CIFAR-10 shares are left "
            "out always (`photographs.DUPLICATES`: found with CIFAR-10 at hand, unlike all else). Two thirds of the "
            "tasks hold photographs of one class, all or such as resemble each other, the others two classes to "
            "thirty; each has a style. ImageNet's terms: non-commercial research and education.",
            "limits": "Made for small colour photographs of single things; so small a model, trained for so short a "
            "time, draws their colours, layout and coarse shapes, no more",
            "data_sets": list(self.config.data_sets),
            "photographs": len(self.pixels),
            "classes": classes,
            "coloured": self.num_classes,
            "look_alikes": len(self.pixels),  # a task around each photograph
            "unions_of_two": classes * (classes - 1) // 2,
            "excluded": [] if self.config.overlap else excluded,
            "licence": "non-commercial research and education only: trained on photographs under ImageNet's terms",
        }

    def sample_tasks(
        self,
        num_tasks: int,
        images_per_task: int,
        generator: torch.Generator,
        *,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Draw tasks: (T, M, 3, S, S) float32 in [-1, 1]. ``classes`` (T,) fixes the class and its colouring."""
        rows, colours = self._choose(num_tasks, images_per_task, generator, classes)
        return torch.stack([
            self._dress(mine, int(colour), generator) for mine, colour in zip(rows, colours, strict=True)
        ])  # fmt: skip

    def _choose(
        self, num_tasks: int, per_task: int, g: torch.Generator, classes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Photographs (T, M) and colouring (T,): a class (40%), some that look alike (25%), classes together (35%)."""
        rows = torch.empty(num_tasks, per_task, dtype=torch.long)
        colours = torch.zeros(num_tasks, dtype=torch.long)
        for t in range(num_tasks):
            kind, draw = torch.rand(2, generator=g).tolist()
            if classes is not None:
                way, first = divmod(int(classes[t]), len(self._members))
                colours[t], kind = way, 0.0
            else:
                first = int(torch.randint(len(self._members), (), generator=g))
                colours[t] = 0 if draw < 0.7 else 1 if draw < 0.8 else 2
            mine = self._members[first]
            if kind < 0.4:
                pool, weights = mine, torch.ones(len(mine))
            elif kind < 0.65:
                pool = look_alikes(mine, self._looks[mine], g)
                weights = torch.ones(len(pool))
            else:
                parts = [self._members[number] for number in self._together(first, kind, g)]
                pool, weights = mixed(parts, g)
            # none twice in a task while there are others: fifty sharp copies are no data set
            enough = len(pool) >= 2 * per_task
            rows[t] = pool[torch.multinomial(weights, per_task, replacement=not enough, generator=g)]
        return rows, colours

    def _together(self, first: int, kind: float, g: torch.Generator) -> list[int]:
        """Classes of a union: two to five, related ones (15%) or any (10%), or up to thirty of any (10%)."""
        count = len(self._members)
        most = int(torch.randint(2, 6, (), generator=g)) if kind < 0.9 else int(torch.randint(6, 31, (), generator=g))
        if kind < 0.8:
            others = torch.arange(max(0, first - NEIGHBOURS), min(count, first + NEIGHBOURS + 1))
        else:
            others = torch.arange(count)
        picked = others[torch.randperm(len(others), generator=g)[: most - 1]].tolist()
        return list(dict.fromkeys([first, *picked]))

    def _dress(self, rows: Tensor, colour: int, g: torch.Generator) -> Tensor:
        """Photographs (M,) in the style of a task: (M, 3, S, S). Draws as many numbers whatever the style."""
        chance = torch.rand(8, generator=g)
        cast, each = torch.randn(3, 1, 1, generator=g), torch.rand(len(rows), 3, generator=g)
        if chance[0] < 0.3:  # seen closer, each photograph somewhere else near the middle
            side = self.pixels.shape[-1]
            seen = round(side * (CLOSEST + (1 - CLOSEST) * float(chance[1])))
            corner = (each[:, :2] * (side - seen + 1)).long()
            span = torch.arange(seen)
            y, x = corner[:, :1] + span, corner[:, 1:] + span
            cut = self.pixels[rows[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
            images = resize(from_levels(cut), self.config.image_size)
        else:
            images = from_levels(self._small[rows])
        mirrored = each[:, 2] < (0.5 if chance[2] < 0.5 else float(chance[2] < 0.75))
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if colour == 1:
            images = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        elif colour == 2:
            images = images.flip(1)
        if chance[3] < 0.4:  # one light for the whole task
            contrast = math.exp(0.5 * (2 * float(chance[4]) - 1))
            images = images * contrast + 0.5 * (2 * float(chance[5]) - 1)
        if chance[6] < 0.4:
            images = images + 0.25 * float(chance[7]) * cast
        return images.clamp(-1, 1)


def overlaps(class_name: str) -> bool:
    """Whether a public class, with or without its data set's name, is on the list of those that overlap CIFAR-10's.

    >>> overlaps("tiny-imagenet-32-jpeg/goose"), overlaps("lion, king of beasts, Panthera leo"), overlaps("teapot")
    (True, True, False)
    """
    first = class_name.split("/", 1)[-1].split(",")[0].strip()
    return any(first in names for names in OVERLAPPING.values())


@functools.lru_cache(maxsize=1)
def load_photographs(names: Sequence[str], folder: str) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels (N, 3, 32, 32) uint8, labels (N,) and the names of the classes; duplicates are left out.

    Reading 100,000 JPEG files takes half a minute; the last sets read are kept.
    """
    pixels, labels = [], []
    class_names: list[str] = []
    for name in names:
        if name not in data_sets.DATA_SETS or data_sets.DATA_SETS[name].channels != 3:
            colour = ", ".join(key for key, one in data_sets.DATA_SETS.items() if one.channels == 3)
            raise InputError(f"{name!r} is no set of colour photographs: choose from {colour}.")
        source = data_sets.read(name, "train", folder)
        kept = torch.ones(len(source.labels), dtype=torch.bool)
        if name in _SETS:
            kept[[row for row in DUPLICATES if row < len(kept)]] = False
        pixels.append(torch.from_numpy(source.images).permute(0, 3, 1, 2)[kept].contiguous())
        labels.append(torch.from_numpy(source.labels)[kept] + len(class_names))
        class_names += [f"{name}/{one}" for one in source.class_names]
    return torch.cat(pixels), torch.cat(labels), class_names


def _looks(pixels: Tensor) -> Tensor:
    """Coarse pictures (N, 48) of photographs, by which they resemble each other."""
    return F.adaptive_avg_pool2d(from_levels(pixels), LOOKS).flatten(1)


def _shrunk(pixels: Tensor, size: int) -> Tensor:
    """All photographs at the model's size, still as bytes: what `data` does with private ones."""
    return torch.cat([to_levels(resize(from_levels(part), size)) for part in pixels.split(5000)])
