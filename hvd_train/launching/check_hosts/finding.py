"""What a check of a host found, and how a user reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd_train.io.text import counted

CHECKS = ("resolves", "reachable", "ssh", "python", "package", "mpi", "runs", "port", "clock", "cores")
"""In the order in which a host is checked; each may need those before it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Of one check on one host; made without arguments: all is well."""

    cell: str = "ok"
    """In a word or two, for the table."""
    seen: str = ""
    expected: str = ""
    remedy: str = ""
    warning: bool = False
    """A training can be started all the same."""

    @property
    def failed(self) -> bool:
        return bool(self.seen) and not self.warning


OK = Finding()


class CheckFailed(Exception):
    """A failed check, without which no further check of this host is possible."""

    def __init__(self, check: str, finding: Finding) -> None:
        super().__init__(f"{check}: {finding.seen}")
        self.check, self.finding = check, finding

    def row(self) -> dict[str, Finding]:
        """The findings so far."""
        return dict.fromkeys(CHECKS[: CHECKS.index(self.check)], OK) | {self.check: self.finding}


def table(rows: Mapping[str, Mapping[str, Finding]]) -> list[str]:
    """The lines of a table of findings by host and check; what was not checked is a dash."""
    cells = [["host", *CHECKS]]
    for host, row in rows.items():
        cells.append([host, *(row[check].cell if check in row else "-" for check in CHECKS)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def explanations(rows: Mapping[str, Mapping[str, Finding]]) -> list[str]:
    """A line for each failure, then one for each warning."""
    found = [(h, c, row[c]) for h, row in rows.items() for c in CHECKS if c in row and row[c].seen]
    return [_line(*which) for warning in (False, True) for which in found if which[2].warning == warning]


def _line(host: str, check: str, finding: Finding) -> str:
    kind = "warning: " if finding.warning else ""
    return f"{kind}{host}: {check}: {finding.seen}; expected {finding.expected}. {finding.remedy}."


def listed(names: Sequence[str]) -> str:
    """Some names in a sentence; of many the number."""
    return ", ".join(names) if len(names) <= 8 else counted(len(names), "host")
