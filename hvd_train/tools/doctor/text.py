"""The report as text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_train.io.text import counted
from hvd_train.tools.doctor.check import ranks
from hvd_train.tools.doctor.world import ReportedCheck

_NARROWEST, _WIDEST = 60, 110


def in_words(report: Mapping[str, Any], findings: Sequence[ReportedCheck], host_of: Mapping[int, str]) -> str:
    """A line or more for each finding, then what to start.

    Args:
        host_of: the host of each rank.
    """
    hosts = list(dict.fromkeys(host_of.values()))
    what = counted(len(host_of), "rank") if len(host_of) > 1 else "this process"
    lines = [f"hvd_train doctor: {what} on {', '.join(hosts)}"]
    width = max(len(f.check.name) for f in findings)
    for finding in findings:
        check = finding.check
        whose = "" if finding.everywhere else f"{_whose(finding.ranks, host_of)}: "
        lines += _wrapped(f"{check.status:<8} {check.name:<{width}}  ", whose + check.seen)
        if check.remedy:
            lines += _wrapped(" " * (9 + width) + "  -> ", check.remedy)
    tally = f"{counted(report['errors'], 'error')}, {counted(report['warnings'], 'warning')}."
    return "\n".join([*lines, *_wrapped("", report["start"]), tally])


def _whose(whose: Sequence[int], host_of: Mapping[int, str]) -> str:
    hosts = dict.fromkeys(host_of[rank] for rank in whose)
    return f"{ranks(whose)} ({', '.join(hosts)})"


def _wrapped(head: str, text: str) -> list[str]:
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((_WIDEST, 0)).columns))
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
