"""What the tests of the documents share: fenced blocks, tables and inline code of Markdown files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.launching import ROOT


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    section: str
    """The heading of level 2 above it; empty before the first."""

    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found, section, language, lines = [], "", None, list[str]()
    for line in path.read_text().splitlines():
        if language is not None:
            if line.startswith("```"):
                found.append(Block(section, language, "\n".join(lines)))
                language, lines = None, []
            else:
                lines.append(line)
        elif line.startswith("```"):
            language = line[3:]
        elif line.startswith("## "):
            section = line[3:]
    assert language is None, f"{path}: a fenced block is not closed"
    return found


def tables(path: Path) -> list[list[list[str]]]:
    """The tables of a document: rows of cells, the heading first and without the line below it."""
    found: list[list[list[str]]] = []
    inside = False
    for line in path.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not all(set(cell) <= set("-: ") for cell in cells):
            found[-1].append(cells)
    return found


def inline_code(path: Path) -> list[str]:
    """What stands between single backticks outside fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", text)


def documents() -> list[Path]:
    """Every document of the project that speaks to its users."""
    folders = ("docs", "docs/adr", "examples", "hostfiles", "benchmarks")
    return sorted([*ROOT.glob("*.md"), *(p for f in folders for p in (ROOT / f).glob("*.md"))])
