"""The child that loads libraries, starts MPI and connects the ranks: `python -m` this module.

It reports each result at once, one JSON object a line on standard output, so that the results so far are
known if it hangs or crashes:

    {"begin": ["MPI", ...]}   the check that it does next, and in words
    {"check": {...}}          of this rank
    {"failed": {...}}         a check: the ranks did not connect; "agreed" if every rank knows
    {"joined": {...}}         they connected; on rank 0 with everything that is known of all
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hvd_train.environment.launcher import detect
from hvd_train.errors import HvdTrainError
from hvd_train.tools.doctor import parts, storage
from hvd_train.tools.doctor.check import Check, attempt, attempt_apart, failed
from hvd_train.tools.doctor.host import fabrics
from hvd_train.tools.doctor.options import Options

if TYPE_CHECKING:  # it loads torch, of which nothing is known yet
    from hvd_train.comm.base import Communicator

_PR_SET_PDEATHSIG = 1

Run = Callable[[str, Callable[[], Check]], Check]
"""`attempt` or `attempt_apart`."""


class _Output:
    """The pipe to the parent."""

    def __init__(self) -> None:
        # Libraries print to standard output; here that goes to a file.
        self._to_parent = os.fdopen(os.dup(1), "w")
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        os.dup2(self._printed.fileno(), 1)
        self.checks: list[Check] = []

    def send(self, kind: str, value: Any) -> None:
        self._to_parent.write(json.dumps({kind: value}) + "\n")
        self._to_parent.flush()

    def begin(self, name: str, words: str = "") -> None:
        """Reports what is done next."""
        self.send("begin", [name, words or f"checking {name}"])

    def check(self, name: str, check: Callable[[], Check], run: Run = attempt) -> None:
        """Runs one check, and reports it."""
        self.begin(name)
        self.checks.append(run(name, check))
        self.send("check", self.checks[-1].to_json())

    def fail(self, seen: str, remedy: str, agreed: bool) -> None:
        """Reports why the ranks do not connect, and whether all of them know."""
        check = Check(name="world", status="error", seen=seen, remedy=remedy)
        self.send("failed", {"check": check.to_json(), "agreed": agreed})

    def printed(self) -> str:
        """What libraries have printed so far. After they were flushed."""
        self._printed.seek(0)
        return self._printed.read().decode(errors="replace")


@dataclass
class _Library:
    """MPI, once it is loaded."""

    mpi: Any = None

    def load(self) -> Check:
        check, self.mpi = parts.mpi_library(detect())
        return check


def main() -> None:
    """The argument is the options of doctor as JSON; this rank's report so far comes on standard input."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever ends the parent ends this one
    output, options = _Output(), Options(**json.loads(sys.argv[1]))
    parts.set_debug_variables()
    launcher, library = detect(), _Library()
    output.check("torch", parts.torch)
    has_torch = output.checks[0].status == "ok"
    # It may have been built for another torch, or beside another MPI than the one that is loaded next.
    output.check("Horovod", parts.horovod, attempt_apart)
    output.check("ring in a host", parts.shm)
    need = _need(output, options) if launcher.rank == 0 and has_torch else None
    output.check("MPI", library.load)
    output.check("mpirun", lambda: parts.mpirun(library.mpi, launcher))
    output.check("ring of hosts", parts.ring)
    if not has_torch:
        output.fail("the ranks cannot connect without torch", "See torch.", agreed=False)
        return
    several = f"connecting {launcher.size or 'an unknown number of'} ranks"
    output.begin("world", several if launcher.size != 1 else "MPI_Init")
    from hvd_train.comm.factory import connect

    try:
        comm = connect()
    except HvdTrainError as error:
        output.fail(str(error), "", error.agreed)
        return
    if need is not None:
        from hvd_train.tools.doctor.need import of_process

        need["process_bytes"], need["library_bytes"] = of_process()
    with comm:
        _send_world(output, comm, options, library.mpi, need)


def _need(output: _Output, options: Options) -> dict[str, Any] | None:
    from hvd_train.tools.doctor import need

    output.begin("model", "building the model")
    try:
        return asdict(need.of(options.load(), options.parameters))
    except HvdTrainError as error:
        check = Check(name="model", status="error", seen=str(error))
    except Exception as error:
        check = failed("model", f"it cannot be built: {type(error).__name__}: {error}")
    output.checks.append(check)
    output.send("check", check.to_json())
    return None


def _send_world(output: _Output, comm: Communicator, options: Options, mpi: Any, need: Any) -> None:
    """Collective."""
    of_world: list[Check] = []
    alone = comm.name == "solo"
    if mpi and (alone or detect().provides == "mpi"):
        from hvd_train.comm import _mpi

        _mpi.start(mpi)  # not yet done for a single process; in a job of MPI it is up
        output.check("fault tolerance", lambda: parts.fault_tolerance(mpi, fabrics()))
        if alone:
            _mpi.finish()
        elif comm.rank == 0:
            parts.flush_libraries()
            said = output.printed()
            of_world.append(attempt("transports", lambda: parts.transports(mpi, said, fabrics())))
    if not alone:
        shared = storage.seen_by_all(comm, Path(options.load().runs))
        of_world += [shared] if shared else []
    report = json.loads(sys.stdin.read())
    report["checks"] += [check.to_json() for check in output.checks]
    reports = comm.allgather(report)
    world = {
        "reports": reports,
        "checks": [check.to_json() for check in of_world],
        "backend": comm.name,
        "library": comm.library,
        "num_hosts": comm.num_hosts,
        "need": need,
    }
    output.send("joined", world if comm.rank == 0 else None)


if __name__ == "__main__":
    main()
