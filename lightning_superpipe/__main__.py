"""``python -m lightning_superpipe`` is the command ``superpipe``."""

import sys

from lightning_superpipe.app.main import main

if __name__ == "__main__":
    sys.exit(main())
