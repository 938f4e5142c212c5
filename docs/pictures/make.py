"""Makes the pictures of docs/monitoring.md: trains MNIST on four ranks, healthy and with one symptom each,
and photographs the dashboard's pages in a headless Chromium.

    python docs/pictures/make.py FOLDER_WITH_IDX_FILES WORK_FOLDER [PICTURE ...]
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.dashboards import chromium, dashboard, visit
from tests.launching import command, environment

HERE = Path(__file__).resolve().parent
RANKS = 4
WIDTH = 1100
COMMON = ("--threads", "1", "--evaluate.every-rounds", "20")
BUILT_IN = ("--model.hidden", "500", "100")

RUNS: dict[str, tuple[str, Sequence[str]]] = {
    "healthy": ("mnist", (*BUILT_IN, "--max-rounds", "600", "--patience", "15")),
    "slow-rank": (
        "mnist",
        ("--task", f"{HERE}/symptoms.py:SlowRank", "--max-rounds", "150", "--patience", "0"),
    ),
    "period": (
        "by-class",
        (*BUILT_IN, "--period", "200", "--lr", "0.003", "--max-rounds", "40", "--evaluate.every-rounds", "1"),
    ),
    "dead-layer": (
        "mnist",
        (
            "--task",
            f"{HERE}/symptoms.py:DeadLayer",
            "--optim.name",
            "SGD",
            "--lr",
            "0.05",
            "--max-rounds",
            "300",
        ),
    ),
    "waits-for-data": (
        "mnist",
        ("--task", f"{HERE}/symptoms.py:SlowDisk", "--data.reading", "stream", "--max-rounds", "150"),
    ),
}
"""By the name of the run: its shards and its options."""


def main() -> None:
    mnist, work, *wanted = sys.argv[1:]
    write_shards(Path(mnist), Path(work))
    for name, (shards, options) in RUNS.items():
        if not (Path(work) / "runs" / name).exists():
            train(Path(work), name, shards, options)
    with dashboard(Path(work) / "runs") as (_, base), chromium() as browser:
        for picture, (path, scheme, take) in PICTURES.items():
            if not wanted or picture in wanted:
                photograph(browser, base, picture, path, scheme, take)


def hvd_train(*options: str) -> list[str]:
    return ["-m", "hvd_train", *options]


def run(argv: Sequence[str], folder: Path | None = None) -> None:
    subprocess.run(argv, check=True, cwd=folder, env=environment(), stdin=subprocess.DEVNULL)


def write_shards(mnist: Path, work: Path) -> None:
    """MNIST, shuffled and split by its classes."""
    part = {"train": ("train-images", "train-labels"), "validation": ("t10k-images", "t10k-labels")}
    kinds = {
        "mnist": ("--shuffle",),
        "by-class": ("--by-class",),
    }
    for kind, options in kinds.items():
        for name, prefixes in part.items() if not (work / kind).exists() else ():
            files = [str(next(mnist.glob(f"{prefix}*"))) for prefix in prefixes]
            given = ["--out", str(work / kind), "--part", name]
            more = ["--shards", str(RANKS), *options] if name == "train" else []
            run(command("python", 1, hvd_train("shard", "write", *files, *given, *more)))


def train(work: Path, name: str, shards: str, options: Sequence[str]) -> None:
    given = ["--name", name, "--data", shards]
    run(command("mpirun", RANKS, hvd_train(*given, *COMMON, *options)), work)


def photograph(
    browser: Browser, base: str, picture: str, path: str, scheme: str, take: Callable[[Page], object]
) -> None:
    seen = visit(browser, base, color_scheme=scheme, viewport={"width": WIDTH, "height": 900})
    page = seen.open(path, drawn=path != "")
    if path == "":
        page.locator("#runs tbody tr").first.wait_for()
    page.evaluate("document.fonts.ready.then(() => true)")
    page.screenshot(path=HERE / f"{picture}.png", full_page=True, clip=take(page))  # type: ignore[arg-type]
    page.close()
    print(f"{picture}.png: {(HERE / f'{picture}.png').stat().st_size / 1000:.0f} kB")


def top(height: int) -> Callable[[Page], object]:
    """The page from its top."""
    return lambda page: {"x": 0, "y": 0, "width": WIDTH, "height": height}


def charts(*names: str) -> Callable[[Page], object]:
    """What holds these charts."""

    def box(page: Page) -> object:
        boxes = [page.locator("figure", has=page.locator(f"#chart-{name}")).bounding_box() for name in names]
        found = [box for box in boxes if box is not None]
        x, y = min(b["x"] for b in found), min(b["y"] for b in found)
        right, bottom = max(b["x"] + b["width"] for b in found), max(b["y"] + b["height"] for b in found)
        return {"x": x - 8, "y": y - 8, "width": right - x + 16, "height": bottom - y + 16}

    return box


PICTURES: dict[str, tuple[str, str, Callable[[Page], object]]] = {
    "runs": ("", "light", top(352)),
    "healthy": ("run/healthy/curves", "light", top(1150)),
    "slow-rank": ("run/slow-rank/ranks", "dark", top(760)),
    "period": ("compare?run=healthy&run=period&over=samples", "light", charts("drift")),
    "dead-layer": ("run/dead-layer/layers", "light", charts("steps")),
    "waits-for-data": ("run/waits-for-data/curves?over=seconds", "light", charts("speed", "shares")),
}
"""By the name of the picture: the page, its colours, and the part of it."""


if __name__ == "__main__":
    main()
