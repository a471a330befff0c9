"""Download the original files of data sets, and check them.

    python data_scripts/download.py mnist omniglot --dest data     # into data/originals
    python data_scripts/download.py all --dest data

Files that are there and right are not downloaded again. What is used, from where, under which licence: the book's data
cards. Next: `python data_scripts/prepare.py NAME --dest data`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hyperdp_lib.cli import Parser
from hyperdp_lib.image_files import InputError
from hyperdp_lib.public.originals import ORIGINALS, REGISTRY, fetch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="download.py", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*ORIGINALS, "all"], help="a data set, or: all")
    parser.add_argument("--dest", type=Path, required=True, metavar="DIR", help="files go to DIR/originals")
    try:
        options = parser.parse_args(arguments)
        folder = options.dest / "originals"
        for name in ORIGINALS if "all" in options.names else dict.fromkeys(options.names):
            for original in ORIGINALS[name]:
                path, on_trust = fetch(original, folder)
                checked = original.known_hash or f"pinned in {REGISTRY}"
                print(f"{path}: {f'no published hash; TRUSTED ON FIRST USE, {checked}' if on_trust else checked}")
    except InputError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
