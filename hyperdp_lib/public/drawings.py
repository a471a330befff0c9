"""Public data drawn by people: Omniglot, Kuzushiji-Kanji and Quick, Draw!, as tasks like those of `glyphs`.

Every drawing becomes the same two fields as a rendered character, so that the same styles (pen, slant, bend, crop)
apply. What is new:

* a class has its own, natural variety: a task is all drawings of a class, a few that resemble each other, a few
  classes together, or a whole alphabet;
* a class turned by a quarter or mirrored is another class, eight in all;
* closed shapes are also had filled, and inked areas may be shaded: the private images may be garments;
* a margin may be left around the drawing, as MNIST has one.

Only the training split of each data set is used. Omniglot's Latin, Greek and Cyrillic alphabets are left out: their
O, I, Z, S look like digits. Other scripts have circles and bars too; those stay, and so the tasks of this module are
not free of look-alikes. Kuzushiji-Kanji's numerals are left out, too (`NUMERALS`).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperdp_lib import data_sets
from hyperdp_lib.progress import progress_bar
from hyperdp_lib.public.glyphs import (
    GLYPH_BOX,
    GlyphTasks,
    cached_fields,
    on_canvas,
    share_of,
    signed_fields,
)

EXCLUDED = ("Latin-", "Greek-", "Cyrillic-", "Old_Church_Slavonic_(Cyrillic)-")
# Kuzushiji-Kanji holds numerals, and a class turned or mirrored looks like yet another digit.
NUMERALS = tuple(f"kkanji/U+{ord(character):04X}" for character in "一二三四五六七八十")
INK = 96  # of 255
FILLED_GROWTH = 1.3  # a filled drawing is kept when it has so many times the ink
WITH_NUMERALS = "No Arabic digits, but Kanji numerals, one of them a single stroke"
FEWEST = 8  # drawings of a class: some are closed, and filled, only now and then
TURNS = 8  # of the square: quarter turns and mirror images


@dataclass(frozen=True)
class DrawingConfig:
    """What the public tasks are made of (public).

    Attributes
    ----------
    data_sets : tuple of str
        Names of `hyperdp_lib.data_sets.DATA_SETS`; the files are sought in ``HYPERDP_DATA``.
    image_size : int
        16 or 32.
    held_out : float
        Share of the classes kept from training.
    excluded : tuple of str
        Classes left out of both splits, filled or not.
    """

    data_sets: tuple[str, ...] = ("omniglot", "kkanji", "quickdraw")
    image_size: int = 16
    held_out: float = 0.1
    excluded: tuple[str, ...] = NUMERALS

    about: ClassVar[str] = "drawings by people held out from training"

    def tasks(self, split: str = "train", *, progress: bool = True) -> DrawingTasks:
        """The source of tasks."""
        return DrawingTasks(self, split, progress=progress)


class DrawingTasks(GlyphTasks):
    """An endless source of public tasks from drawings by people; see `GlyphTasks`.

    Parameters
    ----------
    config : what drawings there are.
    split : ``"train"`` or ``"held_out"``: classes, with all their drawings, belong to one of the two.
    """

    coarse = 0.0

    def __init__(
        self, config: DrawingConfig | None = None, split: str = "train", *, progress: bool = True
    ) -> None:
        self.drawn = config = DrawingConfig() if config is None else config
        if split not in ("train", "held_out"):
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        fields, names = load_drawings(config.data_sets, progress=progress)
        plain = [name.removesuffix(" filled") for name in names]
        held_out = [share_of(name) < config.held_out for name in plain]
        enough = {name for name, count in Counter(names).items() if count >= FEWEST}
        keep = [
            i
            for i, out in enumerate(held_out)
            if out == (split == "held_out") and names[i] in enough and plain[i] not in config.excluded
        ]
        self._set(fields[keep], [names[i] for i in keep])

    def _set(self, fields: np.ndarray, names: list[str]) -> None:
        super()._set(fields, names)
        self.image_size = self.drawn.image_size
        class_names = list(dict.fromkeys(names))
        groups: dict[str, list[int]] = {}  # alphabets and data sets
        for number, name in enumerate(class_names):
            alphabet = name.rsplit("-", 1)[0] if "-" in name else name.split("/")[0]
            groups.setdefault(alphabet, []).append(number)
        self._group_of = {number: members for members in groups.values() for number in members}
        sets: dict[str, list[int]] = {}
        for number, name in enumerate(class_names):
            sets.setdefault(name.split("/")[0], []).append(number)
        self._sets = [torch.tensor(members) for members in sets.values()]
        self._looks = F.avg_pool2d(self.fields[:, 0].float()[:, None], 5).flatten(1)  # (G, 64): coarse pictures
        self._turned = torch.zeros(1, dtype=torch.long)

    @property
    def num_classes(self) -> int:
        """Classes, each turned and mirrored."""
        return TURNS * len(self._members)

    def describe(self) -> dict:
        """Counts and licence for the model card."""
        used = [data_sets.DATA_SETS[name] for name in self.drawn.data_sets]
        numerals = "No digits, no Kanji numerals" if set(NUMERALS) <= set(self.drawn.excluded) else WITH_NUMERALS
        return {
            "text": f"{len(self.names)} drawings of {len(self._members)} classes, each turned and mirrored too, of the "
            f"training splits of {', '.join(self.drawn.data_sets)}. {numerals}. Omniglot's Latin, Greek and Cyrillic "
            "alphabets, whose letters look like digits, are left out; other shapes that do so are not.",
            "data_sets": list(self.drawn.data_sets),
            "shapes": len(self.names),
            "classes": len(self._members),
            "turned": self.num_classes,
            "excluded": [*EXCLUDED, *self.drawn.excluded],
            "licence": "trained on " + "; ".join(f"{one.title} ({one.licence})" for one in used),
        }

    def _choose_shapes(self, num_tasks: int, per_task: int, g: torch.Generator, classes: Tensor | None) -> Tensor:
        """(T, M) drawing of each image: a class (45%), a few that look alike (20%), some classes (25%), an alphabet."""
        chosen = torch.empty(num_tasks, per_task, dtype=torch.long)
        self._turned = torch.zeros(num_tasks, dtype=torch.long)
        for t in range(num_tasks):
            kind = torch.rand((), generator=g).item()
            if classes is not None:
                way, first = divmod(int(classes[t]), len(self._members))
                self._turned[t], kind = way, 0.0
            else:
                source = self._sets[int(torch.randint(len(self._sets), (), generator=g))]
                first = int(source[torch.randint(len(source), (), generator=g)])
                if torch.rand((), generator=g) < 0.5:
                    self._turned[t] = torch.randint(TURNS, (), generator=g)
            mine = self._members[first]
            if kind < 0.45:
                pool, weights = mine, torch.ones(len(mine))
            elif kind < 0.65:
                pool = look_alikes(mine, self._looks[mine], g)
                weights = torch.ones(len(pool))
            else:
                group = torch.tensor(self._group_of[first])
                most = int(torch.randint(2, 6, (), generator=g)) if kind < 0.9 else 30
                others = group[torch.randperm(len(group), generator=g)[: most - 1]].tolist()
                parts = [self._members[number] for number in dict.fromkeys([first, *others])]
                pool, weights = mixed(parts, g)
            chosen[t] = pool[torch.multinomial(weights, per_task, replacement=True, generator=g)]
        return chosen

    def _dress(self, ink: Tensor, num_tasks: int, per_task: int, g: torch.Generator) -> Tensor:
        """Turn or mirror, leave a margin, shade: each the same for a task, the shading a little different by image."""
        pictures = ink.view(num_tasks, per_task, GLYPH_BOX, GLYPH_BOX)
        pictures = torch.stack([turn(picture, int(way)) for picture, way in zip(pictures, self._turned, strict=True)])
        ink = pictures.reshape(-1, 1, GLYPH_BOX, GLYPH_BOX)

        def task(low: float, high: float) -> Tensor:
            return (low + (high - low) * torch.rand(num_tasks, 1, generator=g)).expand(num_tasks, per_task).reshape(-1)

        def coin(p: float) -> Tensor:
            return (torch.rand(num_tasks, 1, generator=g) < p).expand(num_tasks, per_task).reshape(-1)

        zoom = torch.where(coin(0.5), task(1.0, 1.5), torch.ones(len(ink)))
        affine = torch.zeros(len(ink), 2, 3)
        affine[:, 0, 0] = affine[:, 1, 1] = zoom
        grid = F.affine_grid(affine, list(ink.shape), align_corners=False)
        ink = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
        # shading: a smooth field of light, mostly the task's own
        waves = len(self._basis)
        light = torch.randn(num_tasks, 1, waves, generator=g).expand(num_tasks, per_task, waves) + 0.5 * torch.randn(
            num_tasks, per_task, waves, generator=g
        )
        field = (light.reshape(-1, waves) @ self._basis).view(-1, GLYPH_BOX, GLYPH_BOX)
        level = task(0.5, 1.1)[:, None, None] + 0.1 * torch.randn(len(ink), 1, 1, generator=g)
        shaded = ink * (level + task(0.0, 0.35)[:, None, None] * field).clamp(0.1, 1.0)
        return torch.where(coin(0.35)[:, None, None], shaded, ink)


def look_alikes(members: Tensor, looks: Tensor, g: torch.Generator) -> Tensor:
    """Of the members (N,) of a class a random one and those that look most like it (N, D): 5 to 40 %, at least two."""
    anchor = looks[torch.randint(len(members), (), generator=g)]
    few = max(2, int(len(members) * (0.05 + 0.35 * torch.rand((), generator=g))))
    return members[(looks - anchor).square().sum(1).topk(few, largest=False).indices]


def mixed(parts: Sequence[Tensor], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Members of several classes together (N,), and weights (N,) that give each class a share at random."""
    shares = torch.rand(len(parts), generator=g) + 0.2
    sizes = torch.tensor([len(part) for part in parts])
    return torch.cat(list(parts)), (shares / sizes).repeat_interleave(sizes)


def turn(pictures: Tensor, way: int) -> Tensor:
    """One of the eight symmetries of the square, 0 for none, applied to the last two axes.

    >>> [turn(torch.tensor([[1, 2], [3, 4]]), way).flatten().tolist() for way in (0, 1, 4)]
    [[1, 2, 3, 4], [2, 4, 1, 3], [2, 1, 4, 3]]
    """
    pictures = pictures.flip(-1) if way >= TURNS // 2 else pictures
    return torch.rot90(pictures, way % 4, (-2, -1))


def load_drawings(names: Sequence[str], *, progress: bool = True) -> tuple[np.ndarray, list[str]]:
    """Fields (G, 2, 40, 40) int8 of all drawings of some data sets, and the class of each, ``"kkanji/U+4E00"``.

    The first call takes minutes; later ones read the cache of `public.glyphs`, keyed by the files' contents.
    """
    parts = [cached_fields(_key(name), _maker(name, progress)) for name in names]
    return np.concatenate([fields for fields, _ in parts]), [label for _, labels in parts for label in labels]


def _key(name: str) -> tuple:
    path = Path(os.environ.get("HYPERDP_DATA", "")) / data_sets.DATA_SETS[name].file
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""  # `read` says what is missing
    return (f"drawings-{name}", digest, EXCLUDED, INK, FILLED_GROWTH)


def _maker(name: str, progress: bool) -> Callable[[], tuple[np.ndarray, list[str]]]:
    def make() -> tuple[np.ndarray, list[str]]:
        source = data_sets.read(name, "train")
        fields, labels = [], []
        rows = zip(source.images[..., 0], source.labels, strict=True)
        for picture, label in progress_bar(rows, total=len(source.labels), desc=f"reading {name}", show=progress):
            class_name = source.class_names[label]
            if class_name.startswith(EXCLUDED):
                continue
            for suffix, ink in shapes_of(picture):
                fields.append(signed_fields(ink))
                labels.append(f"{name}/{class_name}{suffix}")
        return np.stack(fields), labels

    return make


def shapes_of(picture: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Ink (40, 40) of a drawing (28, 28) uint8 cropped and scaled to the box, and of its filled form if it has one."""
    from scipy.ndimage import binary_fill_holes

    inked = picture > INK
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    if len(rows) == 0:
        return []
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = on_canvas(cut) > INK
    if not ink.any():
        return []
    found = [("", ink)]
    filled = binary_fill_holes(ink)
    if filled.sum() > FILLED_GROWTH * ink.sum():
        found.append((" filled", filled))
    return found
