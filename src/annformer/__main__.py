"""`python -m annformer` is the command `annformer`."""

from __future__ import annotations

import sys

from annformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
