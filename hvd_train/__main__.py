"""`python -m hvd_train`, and the command `hvd_train`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs one command; returns the exit code.

    While libraries load, and wherever nothing has to be cleaned up, Ctrl-C ends the process at once and
    without a traceback. A SIGINT that is ignored, as by a job in the background of a shell, stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hvd_train import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
