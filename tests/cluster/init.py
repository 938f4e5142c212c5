"""Process 1 of an emulated host: makes a host of the namespaces that it was started in, and keeps it up until
its standard input ends. Run by hosts.py, as a script.

All that it writes lies in memory, in file systems that only this host has mounted, and goes with it.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

_SIOCETHTOOL, _SET_SEGMENTATION, _SET_RECEIVE_OFFLOAD = 0x8946, 0x1F, 0x2C


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True)


def private_files(files: dict[str, str]) -> None:
    """What differs from host to host; all else of the file system is shared."""
    mount("-t", "proc", "proc", "/proc")
    for folder in ("/dev/shm", "/run", "/etc/ssh"):
        mount("-t", "tmpfs", "-o", "mode=755", "host", folder)
    os.chmod("/dev/shm", 0o1777)
    # sshd refuses to start without this folder, which a machine has only once its own sshd has run.
    os.mkdir("/run/sshd", 0o755)
    os.mkdir("/run/tmp")
    for path, text in files.items():
        Path(path).touch(0o600)
        Path(path).write_text(text)
    os.chmod("/run/hosts", 0o644)
    mount("--bind", "/run/hosts", "/etc/hosts")


def send_frames(device: str) -> None:
    """Lets the frames of a real wire pass the device, and gathers those that arrive, as network cards do. The
    kernel would pass up to 64 KiB at once, and count one header for them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command, on in ((_SET_SEGMENTATION, 0), (_SET_RECEIVE_OFFLOAD, 1)):
            value = array.array("B", struct.pack("II", command, on))
            request = struct.pack("16sP", device.encode(), value.buffer_info()[0])
            fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def start_sshd(path: str, address: str) -> None:
    sshd = subprocess.Popen([path, "-D", "-e"], stdin=subprocess.DEVNULL)
    while sshd.poll() is None:
        try:
            socket.create_connection((address, 22)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise SystemExit(f"sshd ended with {sshd.returncode}")


def main() -> None:
    host = json.loads(sys.stdin.readline())
    # As long as /proc is the old one: the number of this process outside.
    pid = os.readlink("/proc/self")
    socket.sethostname(host["name"])
    private_files(host["files"])
    send_frames("eth0")
    start_sshd(host["sshd"], host["address"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans come to process 1, and none may stay a zombie
    print(pid, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
