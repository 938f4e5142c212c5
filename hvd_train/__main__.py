"""`python -m hvd_train`."""

from __future__ import annotations

import sys

from hvd_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
