"""``python -m imagen_kit``: the command line without its script."""

import sys

from imagen_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
