"""How fast two chart libraries draw a page like the dashboard's in a headless Chromium, and how large it is.

Eight lines of 2,000 points and a heat map of 64 x 200, in one self-contained file of each library, loaded in
turn. `ready` is the browser's own time from the start of the navigation until all is drawn. Needs bokeh
beside what the tests need: pip install bokeh.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bokeh
import numpy as np
import plotly
from bokeh.embed import file_html
from bokeh.layouts import column
from bokeh.plotting import figure
from bokeh.resources import INLINE

from tests.dashboards import chromium

LINES, POINTS, HEAT = 8, 2000, (64, 200)

_WHEN_BOKEH_IS_IDLE = """<script>(function look() {
  const first = window.Bokeh && Bokeh.documents && Bokeh.documents[0];
  if (first && first.is_idle) window.ready = performance.now(); else setTimeout(look, 5);
})()</script></body>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    rng = np.random.default_rng(0)
    x = np.arange(POINTS, dtype=np.float64) * 10
    lines = [np.cumsum(rng.normal(size=POINTS)) for _ in range(LINES)]
    heat = rng.random(HEAT).astype(np.float32)
    pages = {"plotly": by_plotly(x, lines, heat), "bokeh": by_bokeh(x, lines, heat)}
    found = measure(pages, given.repeat)
    found["conditions"] = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "load_before": load,
        "plotly": plotly.__version__,
        "bokeh": bokeh.__version__,
    }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def by_plotly(x: np.ndarray, lines: list[np.ndarray], heat: np.ndarray) -> str:
    """The page of Plotly, with arrays in base64."""

    def packed(values: np.ndarray) -> dict[str, str]:
        kind = {"float64": "f8", "float32": "f4"}[str(values.dtype)]
        shape = {"shape": ",".join(map(str, values.shape))} if values.ndim > 1 else {}
        return {"dtype": kind, "bdata": base64.b64encode(values.tobytes()).decode(), **shape}

    figures: list[dict[str, Any]] = [
        {
            "data": [{"type": "scatter", "mode": "lines", "x": packed(x), "y": packed(y)}],
            "layout": {"height": 260},
        }
        for y in lines
    ]
    figures.append({"data": [{"type": "heatmap", "z": packed(heat)}], "layout": {"height": 300}})
    script = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_text()
    places = "".join(f"<div id=c{i}></div>" for i in range(len(figures)))
    draw = "Promise.all(F.map((f, i) => Plotly.newPlot('c' + i, f.data, f.layout, {responsive: true})))"
    return (
        f"<!doctype html><html><body>{places}<script>{script}</script><script>const F = "
        f"{json.dumps(figures)}; {draw}.then(() => "
        f"{{ window.ready = performance.now(); }})</script></body></html>"
    )


def by_bokeh(x: np.ndarray, lines: list[np.ndarray], heat: np.ndarray) -> str:
    """The page of Bokeh, by its own inline export."""
    plots = []
    for y in lines:
        plot = figure(height=260, sizing_mode="stretch_width")
        plot.line(x, y)
        plots.append(plot)
    image = figure(height=300, sizing_mode="stretch_width")
    image.image(image=[heat], x=0, y=0, dw=HEAT[1], dh=HEAT[0], palette="Viridis256")
    html: str = file_html(column(*plots, image, sizing_mode="stretch_width"), INLINE)
    return html.replace("</body>", _WHEN_BOKEH_IS_IDLE)


def measure(pages: dict[str, str], repeat: int) -> dict[str, Any]:
    """Loads the pages in turn: each in a browser's context of its own, which has nothing in its caches, and
    then once more in the same one."""
    times: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in pages}
    heap: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name, html in pages.items():
            (Path(folder) / f"{name}.html").write_text(html)
        for _ in range(repeat):
            for name in pages:
                page = browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
                for kind in ("cold", "warm"):
                    page.goto(f"file://{folder}/{name}.html")
                    page.wait_for_function("() => window.ready")
                    times[name][kind].append(page.evaluate("window.ready"))
                heap[name] = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
                page.context.close()
    found: dict[str, Any] = {}
    for kind in ("cold", "warm"):
        both = zip(times["plotly"][kind], times["bokeh"][kind], strict=True)
        ratios = sorted(plotly / bokeh for plotly, bokeh in both)
        found[kind] = {
            "ready_ms": {name: round(statistics.median(of[kind])) for name, of in times.items()},
            "plotly_over_bokeh": {
                "median": round(statistics.median(ratios), 3),
                "smallest": round(ratios[0], 3),
                "largest": round(ratios[-1], 3),
            },
        }
    return {
        **found,
        "file_mb": {name: round(len(html) / 1e6, 2) for name, html in pages.items()},
        "heap_mb": {name: round(size, 1) for name, size in heap.items()},
    }


if __name__ == "__main__":
    main()
