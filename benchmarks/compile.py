"""What torch.compile brings: local steps of the cnn (MNIST) and of the transformer of examples/, plain and
compiled in turn, and the seconds of compiling. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.averaging_cost import ROOT, markdown
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import LocalStep, make_optimizer
from hvd_train.config import Config, ModelConfig
from hvd_train.config_file import load_config
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import TaskError
from hvd_train.io.user_module import load_module
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.built_in import Classification


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--blocks", type=int, default=15, help="of steps, each plain and compiled in turn")
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--starts", type=int, default=3, help="processes of each model: the first is cold")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


def cnn() -> tuple[Config, Task, SampleSpec, Batch]:
    config = load_config(ROOT / "examples" / "mnist-cnn.toml")
    fields = {
        "inputs": FieldSpec(shape=(28, 28), dtype="uint8"),
        "targets": FieldSpec(shape=(), dtype="int64"),
    }
    spec = SampleSpec(inputs="inputs", targets="targets", fields=fields, num_classes=10, scale=1 / 255)
    n = config.data.batch_size
    inputs = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
    model = ModelConfig(name="cnn", channels=config.model.channels, hidden=config.model.hidden)
    return config, Classification(model), spec, {"inputs": inputs, "targets": torch.randint(0, 10, (n,))}


def transformer() -> tuple[Config, Task, SampleSpec, Batch]:
    config = load_config(ROOT / "examples" / "transformer.toml")
    example = load_module(str(ROOT / "examples" / "characters.py"), "task", TaskError)
    field = FieldSpec(shape=(example.LENGTH,), dtype="uint8")
    spec = SampleSpec(inputs="inputs", targets="targets", fields={"inputs": field, "targets": field})
    tokens = torch.randint(0, 96, (2, config.data.batch_size, example.LENGTH), dtype=torch.uint8)
    return config, example.Characters(), spec, {"inputs": tokens[0], "targets": tokens[1]}


MODELS: dict[str, Callable[[], tuple[Config, Task, SampleSpec, Batch]]] = {
    "cnn": cnn,
    "transformer": transformer,
}


def measure(name: str, blocks: int, steps: int) -> dict[str, Any]:
    """In this process: seconds of compiling, and of a step in each block."""
    torch.set_num_threads(1)
    config, task, spec, batch = MODELS[name]()
    gradients: dict[str, Gradients] = {}
    made: dict[str, LocalStep] = {}
    for way, rows in (("plain", None), ("compiled", config.data.batch_size)):
        torch.manual_seed(0)
        model = task.build_model(spec)
        gradients[way] = Gradients(model, task, config.optim, rows)
        made[way] = LocalStep(gradients[way], make_optimizer(model, config.optim), config.optim)
    began, cpu = time.perf_counter(), cpu_s()
    gradients["compiled"].warm_up(batch)
    compile_s, compile_cpu_s = time.perf_counter() - began, cpu_s() - cpu
    wall: dict[str, list[float]] = {way: [] for way in made}
    busy: dict[str, list[float]] = {way: [] for way in made}
    for block in range(blocks + 1):
        for way in sorted(made, reverse=block % 2 == 0):
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                made[way]([batch])
            if block > 0:  # the first one warms up
                wall[way].append((time.perf_counter() - began) / steps)
                busy[way].append((time.process_time() - cpu) / steps)
    return {"compile_s": compile_s, "compile_cpu_s": compile_cpu_s, "step_s": wall, "step_cpu_s": busy}


def cpu_s() -> float:
    """Of this process, and of the compilers that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def start(name: str, given: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Measures in a process of its own, with this cache."""
    words = ["--measure", name, "--blocks", str(given.blocks), "--steps", str(given.steps)]
    # One compiler at a time: as a child that has ended its CPU time is known.
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    argv = [sys.executable, "-m", "benchmarks.compile", *words]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return {"model": name, **json.loads(done.stdout)}


def ratio(run: dict[str, Any], key: str) -> list[float]:
    """By block: the plain steps over the compiled ones right beside them."""
    return [p / c for p, c in zip(run[key]["plain"], run[key]["compiled"], strict=True)]


def table(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    head = ["", "compile s, cold (CPU)", "from the cache (CPU)", "plain ms", "compiled ms"]
    rows = [[*head, "speed-up, CPU time", "min to max", "speed-up, clock"]]
    for name in dict.fromkeys(run["model"] for run in runs):
        cold, *warm = (run for run in runs if run["model"] == name)
        step = {
            way: 1000 * statistics.median(s for r in warm for s in r["step_cpu_s"][way])
            for way in ("plain", "compiled")
        }
        by_cpu = [r for run in warm for r in ratio(run, "step_cpu_s")]
        by_clock = [r for run in warm for r in ratio(run, "step_s")]
        cached = [statistics.median(r[key] for r in warm) for key in ("compile_s", "compile_cpu_s")]
        rows.append(
            [
                name,
                f"{cold['compile_s']:.0f} ({cold['compile_cpu_s']:.0f})",
                f"{cached[0]:.0f} ({cached[1]:.0f})",
                f"{step['plain']:.1f}",
                f"{step['compiled']:.1f}",
                f"{statistics.median(by_cpu):.2f}",
                f"{min(by_cpu):.2f} to {max(by_cpu):.2f}",
                f"{statistics.median(by_clock):.2f}",
            ]
        )
    return rows


def main() -> None:
    given = arguments()
    if given.measure:
        print(json.dumps(measure(given.measure, given.blocks, given.steps)))
        return
    load = os.getloadavg()[0]
    runs = []
    for name in given.models:
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(given.starts):
                runs.append(start(name, given, Path(cache)))
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": 1,
        "blocks": given.blocks,
        "steps": given.steps,
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    print(markdown(table(runs)))
    if given.json:
        given.json.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
