"""Look for private images among the public ones: a research check, not differentially private.

    python data_scripts/check_duplicates.py glyphs digits --out book/results/duplicates/glyphs-digits.json
    python data_scripts/check_duplicates.py omniglot+omniglot-test+quickdraw mnist --image-size 28 --out check.json

PUBLIC is `glyphs` (tasks drawn afresh), a data set, a folder or an .npz, or several of them joined by `+`. Writes one
JSON record and, with --picture, the closest pairs: for each measure a row of private images above the nearest public
ones. That picture shows the images: publish it only if both sets may be. Indices of public images count through PUBLIC
in its order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hyperdp_lib import data, records
from hyperdp_lib.cli import DEFAULT_FEATURES, Parser, feature_network
from hyperdp_lib.public import glyphs
from hyperdp_lib.scores import duplicates

IMAGES_PER_TASK = 16


def public_images(names: str, image_size: int, channels: int, num_tasks: int) -> Tensor:
    """All images of the named sources, (N, channels, image_size, image_size) in [-1, 1]."""
    parts = []
    for name in names.split("+"):
        if name == "glyphs":
            generator = torch.Generator().manual_seed(0)
            drawn = glyphs.GlyphTasks().sample_tasks(num_tasks, IMAGES_PER_TASK, generator).flatten(0, 1)
            parts.append(data.resize(data.to_channels(drawn, channels), image_size))
        else:
            parts.append(data.load_named_or_path(name, image_size, channels, labelled=False).images)
    return torch.cat(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="check_duplicates.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("public", metavar="PUBLIC", help="glyphs, data sets or paths, joined by +")
    add("private", metavar="PRIVATE", help="a data set or a path")
    add("--image-size", type=int, default=16, help="pixels of a side at which images are compared; default: 16")
    add("--channels", type=int, choices=(1, 3), default=1, help="1 grey (default) or 3 colour")
    add("--features", default=DEFAULT_FEATURES, metavar="NAME|PATH", help="default: glyphnet")
    add("--tasks", type=int, default=2500, help="public tasks to draw when PUBLIC is glyphs; default: 2500")
    add("--out", type=Path, required=True, metavar="JSON", help="record to write")
    add("--picture", type=Path, metavar="PNG", help="also write the closest pairs")
    try:
        options = parser.parse_args(arguments)
        network = feature_network(options.features)
        private = data.load_named_or_path(options.private, options.image_size, options.channels, labelled=False)
        public = public_images(options.public, options.image_size, options.channels, options.tasks)
        found = duplicates.check(public, private.images, network, progress=True)
        record = {"public": _shown(options.public), "private": _shown(options.private), **found.to_plain()}
        record["provenance"] = records.provenance()
        lines = (f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items())
        records.write_atomically(options.out, "{\n" + ",\n".join(lines) + "\n}\n")
        if options.picture is not None:
            options.picture.parent.mkdir(parents=True, exist_ok=True)
            data.save_grid(options.picture, closest_pairs(public, private.images, found))
    except (data.InputError, OSError) as error:
        print(f"check_duplicates.py: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}: {len(found.suspects)} of {found.num_private} private images are suspects (not DP)")
    return 0


def closest_pairs(public: Tensor, private_images: Tensor, found: duplicates.Check) -> data.ImageSet:
    """For each measure a row of private images and, below, a row of the nearest public ones."""
    rows, names = [], []
    for likeness in found.likenesses:
        index = torch.tensor([pair[:2] for pair in likeness.pairs])
        rows += [private_images[index[:, 0]], public[index[:, 1]]]
        names += [f"private, {likeness.measure}", f"public, {likeness.measure}"]
    labels = torch.cat([torch.full((len(row),), k) for k, row in enumerate(rows)])
    return data.ImageSet(torch.cat(rows), labels, tuple(names))


def _shown(names: str) -> str:
    """Names as they are, paths without their folders."""
    return "+".join(Path(name).name for name in names.split("+"))


if __name__ == "__main__":
    raise SystemExit(main())
