"""What is made of a host's facts, and what needs no host: the probe's Python, its listener, the table."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.cli import main
from hvd_train.errors import RunDirectoryError
from hvd_train.launching.check_hosts import probe
from hvd_train.launching.check_hosts import run as check_hosts
from hvd_train.launching.check_hosts.finding import OK, CheckFailed, Finding, explanations, table
from hvd_train.launching.check_hosts.judge import Standard, judge
from hvd_train.launching.check_hosts.probe import Answer, Facts, ProbeRequest, RecordedMPI
from hvd_train.launching.check_hosts.remote import ProbeResult, parse_facts
from hvd_train.launching.hosts import Host
from tests.deadlines import seconds

SOURCE = Path(probe.__file__).read_text()

REQUEST = ProbeRequest(
    cwd="/",
    path=[],
    mpirun="/mpi/bin/mpirun",
    runs="/runs",
    mark="mark",
    home="10.0.0.1",
    port=1234,
    token="t",
)
WELL = Facts(
    started=1000.5,
    python="3.11.2",
    cores=4,
    package=Answer(found="0.1.0", wrong=""),
    torch="2.9.0",
    record=RecordedMPI(version="Open MPI v5.0.8, and more", library="/mpi/lib/libmpi.so", there=True),
    mpirun=Answer(found="mpirun (Open MPI) 5.0.8", wrong=""),
    home=Answer(found="10.0.0.2 eth0", wrong=""),
    runs=Answer(found="", wrong=""),
    ended=1000.6,
)


def found(facts: Facts, slots: int = 4, answered: float = 1001.0, end: str = "") -> dict[str, Finding]:
    """What is found beside a host that is well, where it is not well itself."""
    visit = ProbeResult(facts=facts, asked=1000.0, answered=answered, home="10.0.0.1", end=end)
    row = judge(Host("h2", slots), visit, Standard(facts=WELL, python="/env/python", request=REQUEST))
    return {check: finding for check, finding in row.items() if finding != OK}


def test_a_host_that_is_like_this_one() -> None:
    assert found(WELL) == {}


DIFFERENT: dict[str, tuple[Facts, str, str, str]] = {
    # What differs; the check, the cell, and what is seen.
    "python": ({"python": "3.9.1"}, "python", "3.9.1", "/env/python is Python 3.9.1"),
    "no package": (
        {"package": Answer(found="absent", wrong="ImportError: no")},
        "package",
        "absent",
        "hvd_train cannot be imported there: ImportError: no",
    ),
    "package": ({"package": Answer(found="0.2.0", wrong="")}, "package", "0.2.0", "hvd_train is 0.2.0"),
    "torch": ({"torch": "2.4.0"}, "package", "torch 2.4.0", "torch is 2.4.0"),
    "no torch": ({"torch": ""}, "package", "torch absent", "torch is absent"),
    "record": (
        {"record": RecordedMPI(version="MPICH Version:\t4.3.2", library="/m", there=True)},
        "mpi",
        "MPICH 4.3.2",
        "the package there was built for MPICH 4.3.2",
    ),
    "no record": (
        {"record": RecordedMPI(version="", library="", there=False)},
        "mpi",
        "unrecorded",
        "the package there was built for no MPI",
    ),
    "no library": (
        {"record": RecordedMPI(version="Open MPI v5.0.8", library="/mpi/lib/libmpi.so", there=False)},
        "mpi",
        "no library",
        "the library that the package was built for, /mpi/lib/libmpi.so, is not there",
    ),
    "no mpirun": (
        {"mpirun": Answer(found="absent", wrong="No such file or directory")},
        "mpi",
        "absent",
        "/mpi/bin/mpirun cannot be used there: No such file or directory",
    ),
    "mpirun": (
        {"mpirun": Answer(found="mpirun (Open MPI) 4.1.8", wrong="")},
        "mpi",
        "4.1.8",
        "/mpi/bin/mpirun is of Open MPI 4.1.8",
    ),
}


@pytest.mark.parametrize("which", DIFFERENT)
def test_a_host_that_differs(which: str) -> None:
    difference, check, cell, seen = DIFFERENT[which]
    row = found({**WELL, **difference})
    assert list(row) == [check]
    assert (row[check].cell, row[check].seen) == (cell, seen)
    assert row[check].failed
    assert row[check].expected
    assert row[check].remedy


@pytest.mark.parametrize(
    ("started", "ended", "answered", "cell"),
    [
        # The question left at 1000. Of a round trip of 0.5 s the probe took 0.1.
        (1000.2, 1000.3, 1000.5, None),
        (1002.2, 1002.3, 1000.5, None),  # 2.0 s ahead, give or take 0.2
        (1002.5, 1002.6, 1000.5, "+2.3 s"),
        (997.9, 998.0, 1000.5, "-2.3 s"),
        (998.2, 998.3, 1000.5, None),
        (4600.2, 4600.3, 1000.5, "+3600.0 s"),
        # A login of 6 s: the same clock, whether the question or the answer took them.
        (1006.0, 1006.1, 1006.2, None),
        (1000.1, 1000.2, 1006.2, None),
    ],
)
def test_a_clock_that_is_wrong(started: float, ended: float, answered: float, cell: str | None) -> None:
    row = found({**WELL, "started": started, "ended": ended}, answered=answered)
    assert [finding.cell for finding in row.values()] == ([] if cell is None else [cell])
    assert not any(finding.failed for finding in row.values())


def test_more_slots_than_cores() -> None:
    row = found(WELL, slots=5)
    assert row == {"cores": row["cores"]}
    assert (row["cores"].cell, row["cores"].warning) == ("4 < 5", True)


def test_the_first_missing_check_is_the_one_that_hung() -> None:
    """Its file server is gone: the folder of the runs is looked at last, and the clock after it."""
    partial = Facts(**{name: WELL[name] for name in WELL if name not in ("runs", "ended")})  # type: ignore[typeddict-item, literal-required]
    row = found(partial, end="no answer within 7 s")
    assert list(row) == ["runs"]
    assert "no answer within 7 s" in row["runs"].seen
    assert "ls /runs" in row["runs"].remedy


def test_facts_among_what_a_login_prints() -> None:
    whole = f'Welcome!\n{probe.MARK} ["python", "3.9.1"]\nnews\n{probe.MARK} ["cores", 4]\n'
    assert parse_facts(f'{whole}{probe.MARK} ["torch", "2') == {"python": "3.9.1", "cores": 4}
    assert parse_facts("Welcome!\n") == {}


def test_the_table_and_its_lines() -> None:
    failed = CheckFailed("ssh", Finding(cell="host key", seen="a", expected="b", remedy="Do c"))
    warned = Finding(cell="4 < 5", seen="d", expected="e", remedy="Do f", warning=True)
    rows = {"first": {"resolves": OK, "cores": warned}, "h2": failed.row()}
    assert table(rows) == [
        "host   resolves  reachable  ssh       python  package  mpi  runs  port  clock  cores",
        "first  ok        -          -         -       -        -    -     -     -      4 < 5",
        "h2     ok        ok         host key  -       -        -    -     -     -      -",
    ]
    assert explanations(rows) == [
        "h2: ssh: a; expected b. Do c.",
        "warning: first: cores: d; expected e. Do f.",
    ]


def test_the_probe_is_plain_enough_for_old_interpreters() -> None:
    tree = ast.parse(SOURCE, feature_version=(3, 8))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def interpreters() -> dict[str, str]:
    """Paths of this one, and of what this machine happens to have of other versions, by what they call
    themselves."""
    names = [f"python3.{minor}" for minor in range(8, 20)]
    paths = [path for name in names if (path := shutil.which(name)) is not None]
    paths += map(str, Path.home().glob(".pyenv/versions/3.*/bin/python"))
    found = {}
    for path in [*paths, sys.executable]:
        asked = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=seconds(30), check=False
        )
        version = asked.stdout.removeprefix("Python ").strip()
        # A name of pyenv for a version that is not chosen answers with an error.
        if asked.returncode == 0 and tuple(map(int, re.findall(r"\d+", version))) >= (3, 8):
            found[version] = path
    return found


def test_a_probe_says_which_python_it_is(tmp_path: Path) -> None:
    """And the rest that it can, given to a real process by its standard input."""
    (tmp_path / "mark").touch()
    with check_hosts._listening() as listener:
        request = REQUEST | ProbeRequest(
            cwd=str(Path(probe.__file__).parents[3]),
            path=[],
            mpirun="/bin/false",
            runs=str(tmp_path),
            mark="mark",
            home="127.0.0.1",
            port=listener.server_address[1],
            token=listener.token,
        )
        program = f"{SOURCE}\nmain({json.dumps(request)!r})\n"
        for version, python in interpreters().items():
            done = subprocess.run(
                [python, "-"], input=program, capture_output=True, text=True, timeout=seconds(30), check=True
            )
            facts = parse_facts(done.stdout)
            assert facts["python"] == version
            assert list(facts) == list(Facts.__annotations__)
            assert facts["cores"] == len(os.sched_getaffinity(0))
            assert facts["home"] == {"found": "127.0.0.1 lo", "wrong": ""}
            assert facts["runs"]["wrong"] == ""
            assert facts["package"]["wrong"] == ""
            assert facts["started"] <= facts["ended"]


def test_the_listener_answers_only_with_the_token_and_never_blocks() -> None:
    with check_hosts._listening() as listener:
        address = ("127.0.0.1", listener.server_address[1])
        with (
            socket.create_connection(address, timeout=seconds(10)),
            socket.create_connection(address, timeout=seconds(10)) as wrong,
        ):
            wrong.sendall(b"something else\n")
            assert wrong.recv(100) == b""
            with socket.create_connection(address, timeout=seconds(10)) as right:
                right.sendall(f"{listener.token}\n".encode())
                assert right.recv(100) == probe.REPLY


def test_a_job_on_this_host_needs_no_ssh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    names = ["localhost", socket.gethostname()]
    assert check_hosts.run([Host(name, 1) for name in names], tmp_path / "new" / "runs", None) == 0
    assert "2 hosts checked, none failed.\n" in capsys.readouterr().out
    assert not (tmp_path / "new" / "runs").exists()


def test_no_hosts_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--check-hosts"]) == 2
    assert "none is named: expected --hosts or --hostfile" in capsys.readouterr().err


def test_a_folder_of_runs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"cannot be written here: .*Choose another --runs"):
        check_hosts.run([Host("localhost", 1)], tmp_path / "file", None)
