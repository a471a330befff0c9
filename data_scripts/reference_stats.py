"""Mean and covariance of a data set's features, for Fréchet distances: a research metric, not differentially private.

    python data_scripts/reference_stats.py mnist --out data/mnist_glyphnet.npz
    hyperdp evaluate samples.npz --reference data/mnist_glyphnet.npz

A file that is there is kept, unless --overwrite is given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hyperdp_lib import data
from hyperdp_lib.cli import DEFAULT_FEATURES, Parser, feature_network
from hyperdp_lib.scores.reference_stats import ReferenceStatistics


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="reference_stats.py", description=__doc__.splitlines()[0])
    parser.add_argument("images", metavar="NAME|IMAGES", help="a data set, a folder of images or an .npz")
    parser.add_argument("--features", default=DEFAULT_FEATURES, metavar="NAME|PATH", help="default: glyphnet")
    parser.add_argument("--out", type=Path, required=True, metavar="NPZ", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there")
    try:
        options = parser.parse_args(arguments)
        if options.out.exists() and not options.overwrite:
            print(f"{options.out}: kept; --overwrite makes it again")
            return 0
        network = feature_network(options.features)
        images = data.load_named_or_path(options.images, network.image_size, network.channels, labelled=False).images
        name = options.images if options.images in data.NAMED_DATA_SETS else Path(options.images).name
        made = ReferenceStatistics.of(images, network, f"{name}, {network.image_size} x {network.image_size}")
        made.save(options.out)
    except (data.InputError, OSError) as error:
        print(f"reference_stats.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {made.count} images, {made.features}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
