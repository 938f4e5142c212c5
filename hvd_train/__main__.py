"""`python -m hvd_train`."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # While libraries load, and wherever nothing has to be put in order, Ctrl-C ends the process at once and
    # without a traceback. One that the shell ignores, as of a job in the background, stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    import sys

    from hvd_train.cli import main

    sys.exit(main())
