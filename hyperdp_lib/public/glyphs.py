"""Public data: characters rendered from the fonts that matplotlib ships, plus random pen strokes.

A *task* is one small public data set: a few shapes drawn in one random style. Tasks are drawn afresh at every
training step (a fixed bank of tasks is memorised and generalises badly), so there are as many as one asks for.

No digits: every character whose Unicode category or name says number, digit, numeral or fraction is left out, and
by default so are the letters that *look* like digits (``LOOKALIKE_NAMES``, a list written down from Unicode names
before any result was seen). The pen strokes are random splines; nothing stops one from resembling a digit by chance.

A shape is kept as two fields on a 40 x 40 grid: the signed distance to its outline, and the distance to its
skeleton. Drawing it with any pen width, slant or wobble is then one bilinear look-up and one threshold.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import platformdirs
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from hyperdp_lib.artefacts import write_atomic
from hyperdp_lib.progress import progress_bar

FIELD_SIZE = 40  # grid of a stored shape; the shape's longer side is 32 of these pixels
GLYPH_BOX = 32
FIELD_LIMIT = 12.0  # distances are clipped to +-12 grid pixels and stored in int8
BASIS_ORDER = 3  # displacement fields are sums of BASIS_ORDER**2 - 1 cosine waves

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmss10", "cmtt10", "cmti10", "cmb10", "cmmi10", "cmsy10",
)  # fmt: skip
# Computer Modern's character maps are its own: only the ASCII letters there are what their codes say.
ASCII_ONLY = ("cmr10", "cmss10", "cmtt10", "cmti10", "cmb10", "cmmi10", "cmsy10")

NUMBER_NAMES = re.compile(
    r"DIGIT|NUMBER|NUMERAL|NUMERIC|FRACTION|PLAYING CARD|DOMINO|TONE (ONE|TWO|THREE|FOUR|FIVE|SIX)|COMBINING"
    r"|\b(ZERO|ONE|TWO|THREE|FOUR|FIVE|SIX|SEVEN|EIGHT|NINE|TEN|HUNDRED|THOUSAND)\b"
    r"|BRAILLE|HEXAGRAM|TETRAGRAM|VARIATION SELECTOR"
)
LOOKALIKE_NAMES = re.compile(
    r"(LETTER|MATHEMATICAL [A-Z-]+( [A-Z-]+)?|DOUBLE-STRUCK|BLACK-LETTER|SCRIPT|TURNED|REVERSED)"
    r"( CAPITAL| SMALL| BARRED| LONG| OPEN| CLOSED| REVERSED| TURNED| DOTLESS| SIDEWAYS| SCRIPT)*"
    r" (O|Q|D|I|L|J|Z|S|B|G|E|EZH|YOGH|OU|THETA|OMICRON|IOTA|ZETA|SIGMA|BETA|EPSILON|XI|PHI|GAMMA|ZE|CHE|ES|BE|VE|YERU"
    r"|KSI|DZE|IE|UKRAINIAN I|PALOCHKA|BYELORUSSIAN-UKRAINIAN I|FITA|SAMEKH|VAV|ZAYIN|YOD|NUN|DALET|RESH|ALEF|HEH)\b"
    # Alphabets whose letters are shaped like Latin capitals, under other names.
    r"|^(LISU|OLD ITALIC|COPTIC|TIFINAGH) "
    r"|\bCIRCLE\b|\bRING\b|VERTICAL (LINE|BAR|STROKE)|EXCLAMATION|AMPERSAND|INFINITY|LAZY S|SECTION SIGN|DOLLAR"
    r"|\bBAR\b|NOT SIGN|QUESTION|POUND SIGN|PARENTHESIS|INTEGRAL"
)


@dataclass(frozen=True)
class GlyphConfig:
    """What the public tasks are made of (public).

    ``lookalikes``: keep the letters that look like digits. ``num_strokes``: how many random pen-stroke shapes.
    ``held_out``: share of the characters kept from training, on which everything is validated and tuned.
    ``mixed``: share of tasks of several shapes: one character in several fonts, or, three in eight, several characters.
    """

    lookalikes: bool = False
    num_strokes: int = 12_000
    held_out: float = 0.06
    seed: int = 20_260_625
    mixed: float = 0.4

    about: ClassVar[str] = "characters of fonts and pen strokes held out from training"

    def tasks(self, split: str = "train", *, progress: bool = True) -> GlyphTasks:
        """The source of tasks."""
        return GlyphTasks(self, split, progress=progress)


def is_number(character: str) -> bool:
    """Whether a character is, or names, a number: never part of the public data.

    >>> [is_number(c) for c in "7Ⅶ½②aΩ"]
    [True, True, True, True, False, False]
    """
    return unicodedata.category(character)[0] == "N" or bool(
        NUMBER_NAMES.search(unicodedata.name(character, ""))
    )


def is_lookalike(character: str) -> bool:
    """Whether a character's Unicode name is on the fixed list of shapes that resemble a digit.

    >>> [is_lookalike(c) for c in "OlSZgбaKΩм"]
    [True, True, True, True, True, True, False, False, False, False]
    """
    return bool(LOOKALIKE_NAMES.search(unicodedata.name(character, "")))


def _characters(font_name: str, font) -> list[str]:
    chosen = []
    for code in font.get_charmap():
        c = chr(code)
        if font_name in ASCII_ONLY and not (c.isascii() and c.isalpha()):
            continue
        category = unicodedata.category(c)
        if (
            category in ("Lu", "Ll", "Lt", "Lo", "Sm", "So", "Sc", "Po")
            and unicodedata.name(c, "") != ""
            and not is_number(c)
        ):
            chosen.append(c)
    return sorted(chosen)


def signed_fields(ink: np.ndarray, skeleton: np.ndarray | None = None) -> np.ndarray:
    """(2, 40, 40) int8: signed distance to the outline (inside positive) and minus the distance to the skeleton."""
    from scipy.ndimage import distance_transform_edt
    from skimage.morphology import skeletonize

    if skeleton is None:
        skeleton = skeletonize(ink)
    outline = distance_transform_edt(ink) - distance_transform_edt(~ink)
    pen = -distance_transform_edt(~skeleton)
    scaled = np.clip(np.stack([outline, pen]), -FIELD_LIMIT, FIELD_LIMIT) * (127 / FIELD_LIMIT)
    return np.rint(scaled).astype(np.int8)


def on_canvas(picture: np.ndarray) -> np.ndarray:
    """A cropped picture (H, W) uint8 scaled to the box, in the middle of the (40, 40) grid."""
    from PIL import Image

    height, width = picture.shape
    scale = GLYPH_BOX / max(height, width)
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    kind = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    canvas = np.zeros((FIELD_SIZE, FIELD_SIZE), np.uint8)
    top, left = (FIELD_SIZE - size[1]) // 2, (FIELD_SIZE - size[0]) // 2
    canvas[top : top + size[1], left : left + size[0]] = np.asarray(Image.fromarray(picture).resize(size, kind))
    return canvas


def _render_fonts(progress: bool) -> tuple[np.ndarray, list[str]]:
    import matplotlib
    from matplotlib.ft2font import FT2Font, LoadFlags

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fields, names = [], []
    for font_name in progress_bar(FONTS, desc="rendering fonts", show=progress):
        font = FT2Font(str(folder / f"{font_name}.ttf"))
        font.set_size(48, 72)
        for c in _characters(font_name, font):
            font.clear()
            font.set_text(c, 0.0, flags=LoadFlags.NO_HINTING)
            font.draw_glyphs_to_bitmap(antialiased=True)
            image = np.asarray(font.get_image())
            rows, columns = (
                np.flatnonzero(image.max(1, initial=0) > 64),
                np.flatnonzero(image.max(0, initial=0) > 64),
            )
            if len(rows) == 0 or len(columns) == 0:
                continue
            image = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            if max(image.shape) < 8:  # dots and commas
                continue
            ink = on_canvas(image) > 110
            if not 0.02 < ink.mean() < 0.45:  # nothing, or a solid block
                continue
            fields.append(signed_fields(ink))
            names.append(c)
    return np.stack(fields), names


def _draw_strokes(count: int, seed: int, progress: bool) -> np.ndarray:
    """Random pen-stroke shapes: one to three cubic splines whose knots walk about the box."""
    from scipy.interpolate import CubicSpline
    from scipy.ndimage import binary_dilation

    rng = np.random.default_rng(seed)
    fields = np.empty((count, 2, FIELD_SIZE, FIELD_SIZE), np.int8)
    for i in progress_bar(range(count), desc="drawing strokes", show=progress):
        points = []
        for _ in range(rng.choice([1, 2, 3], p=[0.55, 0.33, 0.12])):
            knots = rng.integers(2, 7)
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(
                rng.normal(rng.choice([-0.9, 0.0, 0.9]), 0.7, knots)
            )
            step = rng.uniform(0.4, 1.0, knots)[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1)
            walk = np.cumsum(np.concatenate([rng.uniform(-0.6, 0.6, (1, 2)), step]), 0)
            curve = CubicSpline(np.arange(len(walk)), walk)(np.linspace(0, len(walk) - 1, 220))
            points.append(curve)
        xy = np.concatenate(points)
        low, high = xy.min(0), xy.max(0)
        xy = (xy - (low + high) / 2) / max((high - low).max(), 1e-6) * (GLYPH_BOX - 2) + FIELD_SIZE / 2
        column, row = np.clip(xy.astype(int), 0, FIELD_SIZE - 1).T
        skeleton = np.zeros((FIELD_SIZE, FIELD_SIZE), bool)
        skeleton[row, column] = True
        fields[i] = signed_fields(binary_dilation(skeleton, iterations=2), skeleton)
    return fields


def load_shapes(config: GlyphConfig, *, progress: bool = True) -> tuple[np.ndarray, list[str]]:
    """Fields (G, 2, 40, 40) int8 and the name of each: a character, or ``"stroke 17"``.

    The first call renders everything (half a minute); later ones read files in `cache_folder`.
    """
    fonts, names = cached_fields(("fonts", FONTS, NUMBER_NAMES.pattern), lambda: _render_fonts(progress))
    strokes, stroke_names = cached_fields(
        ("strokes", config.num_strokes, config.seed),
        lambda: (
            _draw_strokes(config.num_strokes, config.seed, progress),
            [f"stroke {i}" for i in range(config.num_strokes)],
        ),
    )
    return np.concatenate([fonts, strokes]), names + stroke_names


def cached_fields(key: tuple, make: Callable[[], tuple[np.ndarray, list[str]]]) -> tuple[np.ndarray, list[str]]:
    """What ``make`` returns, made once and then read from a file of `cache_folder`.

    The file's name depends on ``key`` and on the versions of the libraries that draw. Processes that want the same
    wait for the first. Where no file can be written, it is made every time.
    """
    made_with = [metadata.version(name) for name in ("matplotlib", "numpy", "pillow", "scikit-image", "scipy")]
    decisive = (key, FIELD_SIZE, GLYPH_BOX, FIELD_LIMIT, made_with)
    digest = hashlib.sha256(repr(decisive).encode()).hexdigest()[:16]
    path = cache_folder() / f"{key[0]}-{digest}.npz"
    if (stored := _stored_fields(path)) is not None:
        return stored
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock").acquire()
    except (OSError, NotImplementedError):  # read-only, or a file system without locks
        return make()
    with held:
        if (stored := _stored_fields(path)) is not None:
            return stored
        fields, names = make()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, fields=fields, names=np.array(names))
        with contextlib.suppress(OSError):  # no space left
            write_atomic(path, buffer.getvalue())
        return fields, names


def cache_folder() -> Path:
    """Where shapes are kept: ``$HYPERDP_CACHE``, else ``hyperdp`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    return Path(os.environ.get("HYPERDP_CACHE") or platformdirs.user_cache_dir("hyperdp", appauthor=False))


def _stored_fields(path: Path) -> tuple[np.ndarray, list[str]] | None:
    try:
        # opened here: np.load leaves a damaged archive open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["fields"], [str(name) for name in stored["names"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # none, or a damaged one
        return None


def _cosine_basis(size: int) -> Tensor:
    """(B, size*size): smooth waves cos(pi i x) cos(pi j y), damped with their frequency; the constant is left out."""
    grid = (torch.arange(size) + 0.5) / size
    waves = [
        torch.outer(torch.cos(torch.pi * j * grid), torch.cos(torch.pi * i * grid)).flatten()
        / (i * i + j * j) ** 0.5
        for i in range(BASIS_ORDER)
        for j in range(BASIS_ORDER)
        if i + j > 0
    ]
    return torch.stack(waves)


class GlyphTasks:
    """An endless source of public tasks.

    Parameters
    ----------
    config : what shapes exist, see ``GlyphConfig``.
    split : ``"train"`` or ``"held_out"``; characters (in all their fonts) belong to one of the two, so do strokes.

    >>> tasks = GlyphTasks.from_fields(np.zeros((3, 2, 40, 40), np.int8), ["a", "b", "c"])
    >>> tasks.sample_tasks(2, 5, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 5, 1, 16, 16])
    """

    image_size = 16
    text = ""  # what the shapes are, if they are not rendered here
    coarse = 0.5  # share of the tasks seen by a scanner of 8 x 8 pixels, which is what the private images may be

    def __init__(
        self, config: GlyphConfig | None = None, split: str = "train", *, progress: bool = True
    ) -> None:
        config = GlyphConfig() if config is None else config
        fields, names = load_shapes(config, progress=progress)
        in_split = {
            "train": lambda share: share >= config.held_out,
            "held_out": lambda share: share < config.held_out,
        }
        if split not in in_split:
            raise ValueError(f"split must be 'train' or 'held_out', not {split!r}")
        keep = [
            i
            for i, name in enumerate(names)
            if in_split[split](share_of(name))
            and (config.lookalikes or len(name) > 1 or not is_lookalike(name))
        ]
        self._set(fields[keep], [names[i] for i in keep])
        self.config = config

    @classmethod
    def from_fields(cls, fields: np.ndarray, names: list[str], text: str = "") -> GlyphTasks:
        """Tasks over given shapes (tests, or shapes of one's own); ``text`` says on the model card what they are."""
        tasks = cls.__new__(cls)
        tasks.text = text
        tasks.config = GlyphConfig()
        tasks._set(fields, names)
        return tasks

    def _set(self, fields: np.ndarray, names: list[str]) -> None:
        self.fields = torch.from_numpy(np.ascontiguousarray(fields))
        self.names = names
        by_name: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            by_name.setdefault(name, []).append(i)
        self._members = [torch.tensor(v) for v in by_name.values()]
        self._basis = _cosine_basis(GLYPH_BOX)

    @property
    def num_classes(self) -> int:
        """How many different characters and strokes there are."""
        return len(self._members)

    def describe(self) -> dict:
        """Counts for the model card."""
        if self.text:
            return {"text": self.text, "shapes": len(self.names), "classes": self.num_classes}
        strokes = sum(name.startswith("stroke ") for name in self.names)
        lookalikes = "kept" if self.config.lookalikes else "left out"
        return {
            "text": f"{len(self.names)} shapes of {self.num_classes} classes: {strokes} random pen strokes, the rest "
            "characters rendered from the fonts shipped with matplotlib. No digits. Letters that look like digits: "
            f"{lookalikes}.",
            "licence": "Apache-2.0; characters from matplotlib's DejaVu, STIX and Computer Modern fonts",
            **asdict(self.config),
            "shapes": len(self.names),
            "classes": self.num_classes,
            "strokes": strokes,
        }

    def _choose_shapes(
        self, num_tasks: int, per_task: int, g: torch.Generator, classes: Tensor | None
    ) -> Tensor:
        """(T, M) shape of each image: one shape, one character in several fonts, or several characters."""
        several, characters = 1 - self.config.mixed, 1 - 0.375 * self.config.mixed
        chosen = torch.empty(num_tasks, per_task, dtype=torch.long)
        for t in range(num_tasks):
            kind = torch.rand((), generator=g).item()
            forms = 1 if kind < several else int(torch.randint(2, 4, (), generator=g))
            first = (
                int(torch.randint(self.num_classes, (), generator=g)) if classes is None else int(classes[t])
            )
            pool = []
            for j in range(forms):
                other = (
                    first if j == 0 or kind < characters else int(torch.randint(self.num_classes, (), generator=g))
                )
                members = self._members[other]
                pool.append(members[torch.randint(len(members), (), generator=g)])
            weights = torch.rand(forms, generator=g) + 0.2
            chosen[t] = torch.stack(pool)[torch.multinomial(weights, per_task, replacement=True, generator=g)]
        return chosen

    def sample_tasks(
        self,
        num_tasks: int,
        images_per_task: int,
        generator: torch.Generator,
        *,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Draw tasks: (T, M, 1, 16, 16) float32 in [-1, 1], white on black. ``classes`` (T,) fixes the character."""
        g, T, M = generator, num_tasks, images_per_task
        shapes = self._choose_shapes(T, M, g, classes).flatten()

        def task(low: float, high: float) -> Tensor:  # one number a task
            return (low + (high - low) * torch.rand(T, 1, generator=g)).expand(T, M).reshape(-1)

        def image() -> Tensor:  # one standard normal number an image
            return torch.randn(T * M, generator=g)

        def coin(p: float) -> Tensor:
            return (torch.rand(T, 1, generator=g) < p).expand(T, M).reshape(-1)

        # Style of the task, and how much its images differ from each other.
        wobble = task(0.0, 1.0)  # 0: print, 1: a child's handwriting
        angle = task(-0.15, 0.15) + image() * 0.18 * wobble
        slant = task(-0.35, 0.35) + image() * 0.25 * wobble
        width = torch.exp(task(-0.55, 0.25) + image() * 0.22 * wobble)
        height = torch.exp(task(-0.30, 0.10) + image() * 0.15 * wobble)
        shift = torch.stack([image() * 0.06, image() * 0.06], 1) * wobble[:, None]
        num_waves = self._basis.shape[0]
        bend = (
            torch.randn(T, 1, 2, num_waves, generator=g)
            .expand(T, M, 2, num_waves)
            .reshape(T * M, 2, num_waves)
        )
        bend = bend * task(0.0, 0.12)[:, None, None]  # the same for all images of a task: a new letter shape
        bend = bend + torch.randn(T * M, 2, num_waves, generator=g) * (0.13 * wobble)[:, None, None]

        # Where each output pixel looks: bend, then the inverse affine map; the shape fills [-1, 1].
        line = (torch.arange(GLYPH_BOX) + 0.5) / GLYPH_BOX * 2 - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        xy = (
            torch.stack([x.flatten(), y.flatten()])[None]
            - shift[:, :, None]
            + torch.matmul(bend, self._basis)
        )
        cos, sin = torch.cos(angle), torch.sin(angle)
        inverse = torch.stack(
            [
                torch.stack([cos / width, (sin + slant * cos) / width], 1),
                torch.stack([-sin / height, cos / height], 1),
            ],
            1,
        )
        where = torch.matmul(inverse, xy) * (GLYPH_BOX / FIELD_SIZE)
        where = where.transpose(1, 2).reshape(T * M, GLYPH_BOX, GLYPH_BOX, 2)

        pen = coin(0.75)
        field = self.fields[shapes, pen.long()].float()[:, None] * (FIELD_LIMIT / 127)
        distance = F.grid_sample(field, where, mode="bilinear", padding_mode="border", align_corners=False)[
            :, 0
        ]
        pen_width = torch.exp(task(0.35, 1.35) + image() * 0.2 * wobble)  # half the stroke, in 32-grid pixels
        weight = task(-0.8, 0.8) + image() * 0.3 * wobble  # outlines: thinner or bolder
        level = torch.where(pen, pen_width, weight)[:, None, None]
        ink = torch.sigmoid((distance + level) / task(0.35, 0.9)[:, None, None])
        ink = torch.where(coin(0.6)[:, None, None], _fill_height(ink, width), ink)
        pixels = self._dress(ink, T, M, g)[:, None] * 2 - 1
        fine = F.avg_pool2d(pixels, GLYPH_BOX // self.image_size)
        coarse = coin(self.coarse)
        if coarse.any():
            from hyperdp_lib.data import resize

            fine[coarse] = resize(F.avg_pool2d(pixels[coarse], GLYPH_BOX // 8), self.image_size)
        gain = torch.where(coin(0.5), task(1.0, 1.5), task(0.75, 1.0))[:, None, None, None]
        return ((fine + 1) * gain - 1).clamp(-1, 1).reshape(T, M, 1, self.image_size, self.image_size)

    def _dress(self, ink: Tensor, num_tasks: int, per_task: int, g: torch.Generator) -> Tensor:
        """What else a style may do to the ink (T * M, 32, 32) in [0, 1]; here nothing."""
        return ink


def _fill_height(ink: Tensor, width: Tensor) -> Tensor:
    """Stretch each (32, 32) drawing so that its ink just fills the height, as scanners of single characters crop."""
    size = ink.shape[-1]
    line = (torch.arange(size) + 0.5) / size * 2 - 1

    def extent(profile: Tensor) -> tuple[Tensor, Tensor]:
        inked = profile > 0.5
        low = torch.where(inked, line, 1.0).amin(1)
        high = torch.where(inked, line, -1.0).amax(1)
        empty = ~inked.any(1)
        return torch.where(empty, 0.0, (low + high) / 2), torch.where(
            empty, 1.0, ((high - low) / 2).clamp_min(0.3)
        )

    middle_y, half_y = extent(ink.amax(2))
    middle_x, half_x = extent(ink.amax(1))
    stretch_x = (half_y * 0.9 + 0.1).clamp_min(0.0)
    stretch_x = torch.maximum(stretch_x, half_x)  # never cut the width
    rows = middle_y[:, None] + line[None] * (half_y * 1.04)[:, None]
    columns = middle_x[:, None] + line[None] * (stretch_x * 1.04)[:, None]
    where = torch.stack([columns[:, None, :].expand(-1, size, -1), rows[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(ink[:, None], where, mode="bilinear", padding_mode="zeros", align_corners=False)[
        :, 0
    ]


def share_of(name: str) -> float:
    """A fixed number in [0, 1) for a name: decides its split, whatever else is in the data."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
