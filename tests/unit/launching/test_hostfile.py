"""Hosts and their slots: every launcher's syntax, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_train.errors import ConfigError
from hvd_train.launching.hosts import Host, parse_hosts, read_hostfile


def test_the_list_of_the_command_line() -> None:
    assert parse_hosts("h1:2,h2:3") == [Host("h1", 2), Host("h2", 3)]
    assert parse_hosts("node-1.site, 10.99.0.2:16") == [Host("node-1.site", 1), Host("10.99.0.2", 16)]
    assert parse_hosts("b:2,a,b") == [Host("b", 3), Host("a", 1)]
    assert str(parse_hosts("h1:2")[0]) == "h1:2"


FILE = """
# a comment

h1 slots=2   # another
h2:3
h3
  h4   slots=2 max_slots=4
h5 max-slots=4
h3
"""


def test_one_file_in_all_syntaxes(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(FILE)
    expected = [("h1", 2), ("h2", 3), ("h3", 2), ("h4", 2), ("h5", 1)]
    assert read_hostfile(file) == [Host(*host) for host in expected]


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("h2:x", "'x' is no number of ranks"),
        ("h2:0", "'0' is no number of ranks"),
        ("h2:-1", "'-1' is no number of ranks"),
        ("h2:", "'' is no number of ranks"),
        ("h2:²", "'²' is no number of ranks"),
        ("h2 slots", "'' is no number of ranks"),
        ("h2 slots=two", "'two' is no number of ranks"),
        ("h2:2 slots=2", "'slots=2' is not understood"),
        ("h2 slot=2", "'slot=2' is not understood"),
        ("h2 2", "'2' is not understood"),
        ("h2 slots=4 max_slots=2", "4 slots, but at most 2"),
        ("slots=2", "'slots=2' names no host"),
        ("-h2", "'-h2' names no host"),
        ("user@h2", "'user@h2' names no host"),
        ("h1:2,h2:2", "'2,h2:2' is no number of ranks"),
    ],
)
def test_invalid_lines_are_refused_with_file_and_line(line: str, seen: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"h1\n\n{line}\n")
    with pytest.raises(ConfigError) as refused:
        read_hostfile(file)
    assert str(refused.value).startswith(f"{file}, line 3: {seen}")


def test_files_without_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    with pytest.raises(ConfigError, match=r"hosts: cannot read the hosts: .*No such file"):
        read_hostfile(file)
    file.write_text("# h1\n")
    with pytest.raises(ConfigError, match=r"hosts: names no host\. Expected `node1`"):
        read_hostfile(file)


@pytest.mark.parametrize("text", ["", "h1,", ",h1", "h1:2,,h2"])
def test_a_list_with_a_gap(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--hosts {text}: '' names no host"):
        parse_hosts(text)
