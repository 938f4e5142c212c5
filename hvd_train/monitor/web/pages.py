"""HTML from the templates in page/. Names and messages of runs are escaped: they are anything."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hvd_train.errors import EnvironmentMismatch
from hvd_train.monitor.charts.figure import Chart

_FOLDER = Path(__file__).parent / "page"
_NEEDED = ("starlette", "uvicorn", "jinja2")


def text_of(name: str) -> str:
    """A file of page/."""
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    jinja2 = _installed("jinja2")
    loader = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _code
    return environment


def render(template: str, **values: Any) -> str:
    """A template with its values; texts are escaped, unless they are `safe`."""
    text = str(_environment().get_template(template).render(**values))
    return text.encode("utf-8", "backslashreplace").decode()  # names that are no UTF-8


def safe(text: str) -> Any:
    """Text of this package that is HTML, a script or a style already."""
    return _installed("markupsafe").Markup(text)


def _code(text: str) -> Any:
    """A sentence as HTML, with what is in backticks as code."""
    escaped = str(_installed("markupsafe").escape(text))
    return safe(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))


def plain(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Charts as the script of the pages takes them."""
    return [
        {"name": c.name, "title": c.title, "data": c.data, "layout": c.layout, "height": c.height}
        for c in charts
    ]


def figures(charts: Sequence[Chart]) -> Any:
    """The same as JSON for a script element, which `</script>` or `<!--` in a name must not end."""
    return safe(json.dumps(plain(charts), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def plotly() -> Path:
    """Plotly's script, in its Python package, which is not imported. Raises `EnvironmentMismatch` without
    it."""
    found = find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise _missing("plotly")
    script = Path(next(iter(found.submodule_search_locations))) / "package_data" / "plotly.min.js"
    if not script.is_file():
        raise EnvironmentMismatch(f"there is no {script}, which draws the charts. Install plotly 6 or later.")
    return script


def require() -> None:
    """Raises `EnvironmentMismatch` where a package that serves or draws the pages is missing."""
    for name in _NEEDED:
        _installed(name)
    plotly()


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(name) from None


def _missing(name: str) -> EnvironmentMismatch:
    return EnvironmentMismatch(
        f"{name} is not installed, which the pages and reports need. Install it with "
        "`pip install 'hvd_train[monitor]'`."
    )
