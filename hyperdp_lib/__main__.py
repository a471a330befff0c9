"""``python -m hyperdp_lib``: the ``hyperdp`` command."""

import sys

from hyperdp_lib.cli import main

if __name__ == "__main__":
    sys.exit(main())
