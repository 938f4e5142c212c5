"""A server that has imported what a rank needs, and forks ranks: torch alone is most of what a trial costs.

As a script this is what mpirun starts in a rank's place: `python -I -S warm.py ADDRESS ARGUMENTS`. It has the
server fork the rank, with its own environment and output, and ends as that ends, by a signal too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys


def client(address: str, arguments: list[str]) -> None:
    request = json.dumps({"environment": dict(os.environ), "arguments": arguments}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{address}")
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [1, 2])
        server.sendall(request)
        status = int.from_bytes(server.recv(8), "big")
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def serve(address: str) -> None:
    """Forks ranks until it is killed; each has a guard that ends it when its client is gone."""
    from tests.faults import rank

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                guard(connection, rank.main)
            connection.close()


def guard(connection: socket.socket, main: object) -> None:
    header, descriptors, _, _ = socket.recv_fds(connection, 8, 2)
    request = json.loads(connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        be_rank(request, descriptors, main)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if ended in ready:
        connection.sendall(status.to_bytes(8, "big"))
    os._exit(0)


def be_rank(request: dict[str, object], descriptors: list[int], main: object) -> None:
    for standard, given in zip((1, 2), descriptors, strict=True):
        os.dup2(given, standard)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    code = 1
    try:
        main()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    client(sys.argv[1], sys.argv[2:])
