"""The ring between emulated hosts on slow links, beside MPI and Horovod: the time over what the wire needs.
Needs root. `python -m benchmarks.ring_between_hosts`, see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_train.tools.bench.allreduce.options import parse_size, size_name
from hvd_train.tools.bench.table import align
from tests.cluster.hosts import Hosts, missing, mpirun, placement

LAYOUTS = {"2x2": (2, 2), "4x1": (1, 1, 1, 1), "3+1": (3, 1)}
"""Ranks on each host, by name."""

WIRES = ("float32", "bfloat16", "float16", "int8")

DEADLINE_S = 1800.0

HEAD = ["hosts", "wire", "backend", "setting", "MB sent", "least s", "median s", "min s", "max s", "/ least"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=100, help="of each host's link, in Mbit/s")
    parser.add_argument("--size", default="16MiB", help="of each rank's buffer of float32")
    parser.add_argument("--repeat", type=int, default=5, help="timed averages of each kind")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES))
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    return parser.parse_args()


def measure(hosts: Hosts, layout: str, wire: str, given: argparse.Namespace) -> dict[str, Any]:
    """The report of `bench allreduce --json`; the peers are in that with float32, which is all they know."""
    backends = "ring,mpi,horovod" if wire == "float32" else "ring"
    program = ["-m", "hvd_train", "bench", "allreduce", "--json", "--backends", backends, "--wire", wire]
    program += ["--sizes", given.size, "--repeat", str(given.repeat), "--wire-rate", str(given.rate * 10**6)]
    job = hosts.run(1, mpirun(LAYOUTS[layout], program), deadline_s=DEADLINE_S)
    if job.returncode != 0:
        sys.exit(f"{layout}, {wire}: bench ended with {job.returncode}\n{job.output}")
    report: dict[str, Any] = json.loads(job.stdout)
    circumstances = {
        "layout": layout,
        "ranks_on_hosts": LAYOUTS[layout],
        "wire": wire,
        "rate_mbit": given.rate,
    }
    return circumstances | report


def rows(report: dict[str, Any]) -> list[list[str]]:
    """The cold ones, as cells."""
    least_s = next(row["wire_s"] for row in report["limit"] if row["cold"])
    cells = []
    for row in (row for row in [*report["rows"], *report["variants"]] if row["cold"]):
        sent = row["sent_bytes_per_host"]
        times = [f"{row[name]:.3f}" for name in ("median_s", "min_s", "max_s")]
        cells.append(
            [
                report["layout"],
                report["wire"],
                row["backend"],
                row["setting"],
                f"{sent / 1e6:.2f}" if sent else "",
                f"{least_s:.3f}",
                *times,
                f"{row['median_s'] / least_s:.3f}",
            ]
        )
    return cells


def main() -> None:
    given = arguments()
    if reason := missing():
        sys.exit(f"ring_between_hosts: {reason}")
    reports: list[dict[str, Any]] = []
    count = max(len(LAYOUTS[layout]) for layout in given.layouts)
    with Hosts(count) as hosts:
        for number in hosts.numbers:
            hosts.rate(number, f"{given.rate}mbit")
        for layout in given.layouts:
            for wire in given.wires:
                print(f"measuring {placement(LAYOUTS[layout])}, {wire}", file=sys.stderr, flush=True)
                reports.append(measure(hosts, layout, wire, given))
    show(reports, size_name(parse_size(given.size)), given.rate)
    if given.json:
        given.json.write_text(json.dumps(reports, indent=1) + "\n")


def show(reports: Sequence[dict[str, Any]], size: str, rate: int) -> None:
    print(f"{size} of float32 on each rank, {rate} Mbit/s each way for each host, cold\n")
    print(align([HEAD, *(cells for report in reports for cells in rows(report))]))


if __name__ == "__main__":
    main()
