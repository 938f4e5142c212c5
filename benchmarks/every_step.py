"""What averaging gradients in every local step costs: samples/s of `--sync gradients`, of torch's
DistributedDataParallel and of Horovod's DistributedOptimizer, beside ranks that never average; on this
machine or, as root, between emulated hosts. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.averaging_cost import ROOT, circumstances, markdown, read_run, write_data
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.config import Config, DataConfig, ModelConfig, OptimConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.deal import deal
from hvd_train.data.readers.make import make_reader
from hvd_train.tasks.base import Batch
from hvd_train.tasks.building import build
from hvd_train.tasks.load import make_task
from tests.cluster.hosts import Hosts, missing, mpirun

BATCH = 64
OURS = {"not averaging": ["--sync", "none"], "hvd_train": ["--sync", "gradients"]}
"""The ways that are trainings of this program, by name: their options. What the others are divided by is the
first."""
AT_ONCE = {"hvd_train at once": ["--sync", "gradients", "--optim.clip-norm", "1e9"]}
"""Between hosts: with clipping, which here changes nothing, no average begins within the backward pass."""
PEERS = {
    "DDP": ("ddp", {"GLOO_SOCKET_IFNAME": "lo"}),
    "Horovod": ("horovod", {}),
    "Horovod, cycle of 0.1 ms": ("horovod", {"HOROVOD_CYCLE_TIME": "0.1"}),
}
"""The others, by name: what trains, and its environment. By default Horovod waits up to 1 ms before it begins
an exchange."""

MODELS = {
    "mlp": ModelConfig(hidden=(500, 100)),
    "cnn": ModelConfig(name="cnn", channels=(64, 128, 256), hidden=(6000, 1800)),
}
"""The MNIST mlp of 0.4 million parameters, and a cnn of 25 million."""
STEPS = {"mlp": (500, 3000), "cnn": (20, 80)}
"""Local steps of a run: those at its start that do not count, and all."""
PERIOD = 10
RATES = {"100mbit": "64kb", "1gbit": "512kb", "4gbit": "2mb"}
"""Of the links between hosts: the burst with which tc keeps to each."""
DEADLINE_S = 900


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each way, interleaved")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank")
    parser.add_argument("--hosts", type=int, default=1, help="emulated, with equally many of the ranks each")
    parser.add_argument("--rate", choices=RATES, default="1gbit", help="of the links between them")
    parser.add_argument("--steps", type=int, help="local steps of a run, in place of the model's own number")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--mnist", default=os.environ.get("MNIST_DIR"), help="folder with MNIST's idx files")
    parser.add_argument("--json", type=Path, help="write everything that was measured into this file")
    parser.add_argument("--peer", nargs=3, metavar=("WAY", "MODEL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hosts > 1 and args.ranks % args.hosts:
        parser.error(f"--ranks {args.ranks}: expected a multiple of --hosts {args.hosts}")
    return args


def emulated(args: argparse.Namespace) -> Hosts | None:
    """The hosts, not up yet; None: the ranks are on this machine."""
    if args.hosts == 1:
        return None
    if reason := missing():
        sys.exit(f"every_step: {reason}")
    return Hosts(args.hosts)


def launched(ranks: int, line: list[str], variables: dict[str, str], hosts: Hosts | None) -> str:
    """Runs a program on all ranks, without binding; its output."""
    variables = {"PYTHONPATH": str(ROOT), **variables}
    if hosts is None:
        start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable]
        env = {**os.environ, **variables}
        done = subprocess.run([*start, *line], capture_output=True, text=True, env=env, check=False)
    else:
        slots = [ranks // len(hosts.numbers)] * len(hosts.numbers)
        start = mpirun(slots, line, "--oversubscribe", env=variables.keys() - {"PYTHONPATH"})
        done = hosts.run(1, start, deadline_s=DEADLINE_S, env=variables)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(line)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def measure(
    way: str, name: str, repetition: int, folder: Path, args: argparse.Namespace, hosts: Hosts | None
) -> dict[str, Any]:
    """Trains in a job of its own."""
    model, warm_up, steps = MODELS[name], STEPS[name][0], args.steps or STEPS[name][1]
    if way in PEERS:
        kind, variables = PEERS[way]
        if hosts is not None and "GLOO_SOCKET_IFNAME" in variables:
            variables = {"GLOO_SOCKET_IFNAME": "eth0"}
        peer = ["--peer", kind, name, str(folder), "--threads", str(args.threads), "--steps", str(steps)]
        text = launched(args.ranks, ["-m", "benchmarks.every_step", *peer], variables, hosts)
        return {"samples_per_s": float(text.split()[-1])}
    run = f"{name}-{way.replace(' ', '-')}-{repetition}"
    options = {
        "--data": folder / "data",
        "--runs": folder / "runs",
        "--name": run,
        "--max-rounds": steps // PERIOD,
        "--period": PERIOD,
        "--threads": args.threads,
        "--batch-size": BATCH,
        "--patience": 0,
        "--evaluate.every-epochs": 0,
        "--evaluate.every-rounds": steps // PERIOD,  # at the end only, after what is counted
        "--model.name": model.name,
    }
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--model.hidden", *map(str, model.hidden), "--model.channels", *map(str, model.channels)]
    launched(args.ranks, ["-m", "hvd_train", *words, *{**OURS, **AT_ONCE}[way]], {}, hosts)
    found = read_run(way, repetition, folder / "runs" / run / "events.jsonl", warm_up // PERIOD)
    shutil.rmtree(folder / "runs" / run)
    return {
        "samples_per_s": found.samples_per_s,
        "seconds_per_round": found.seconds_per_round,
        "measurement": found,
    }


def batches(config: Config, rank: int, ranks: int) -> Iterator[Batch]:
    """Batches of the rank's rows in random order, from memory: a peer reads no file while it trains."""
    catalog = open_catalog(config.data)
    part = deal(catalog.train, ranks)[rank]
    reader = make_reader(part, config.data, 0, catalog.sample.fields, 1 << 40)
    whole = reader.next_batch(reader.num_samples)
    tensors = {name: torch.from_numpy(values) for name, values in (whole or {}).items()}
    rows = len(tensors["targets"])
    while True:
        for chosen in torch.randperm(rows)[: rows // BATCH * BATCH].split(BATCH):
            yield {name: values[chosen] for name, values in tensors.items()}


def train_peer(way: str, name: str, folder: str, args: argparse.Namespace) -> None:
    """One rank of a peer: the same model, loss and optimizer. Rank 0 prints the samples/s of all."""
    torch.set_num_threads(args.threads)
    rank, ranks = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    config = Config(data=DataConfig(path=f"{folder}/data"), model=MODELS[name])
    task = make_task(config)
    torch.manual_seed(0)
    model = build(task, open_catalog(config.data))
    optimizer = make_optimizer(model, OptimConfig())
    model, optimizer = {"ddp": _ddp, "horovod": _horovod}[way](model, optimizer, folder, rank, ranks)
    gradients, drawn = Gradients(model, task, OptimConfig()), batches(config, rank, ranks)
    warm_up, steps = STEPS[name][0], args.steps
    began = 0.0
    for step in range(steps):
        if step == warm_up:
            began = time.perf_counter()
        gradients([next(drawn)])
        optimizer.step()
    if rank == 0:
        print((steps - warm_up) * BATCH * ranks / (time.perf_counter() - began))


Made = tuple[nn.Module, Any]


def _ddp(model: nn.Module, optimizer: Any, folder: str, rank: int, ranks: int) -> Made:
    import torch.distributed as dist

    # The launcher's own number: a file of an earlier run would connect nothing.
    job = os.environ.get("PMIX_NAMESPACE", "job").replace("/", "-")
    dist.init_process_group("gloo", init_method=f"file://{folder}/{job}", rank=rank, world_size=ranks)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


def _horovod(model: nn.Module, optimizer: Any, folder: str, rank: int, ranks: int) -> Made:
    import horovod.torch as hvd

    hvd.init()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of cells: median and spread of samples/s, beside not averaging and beside the better peer."""
    speeds: dict[str, dict[int, float]] = {}
    for run in runs:
        speeds.setdefault(run["way"], {})[run["repetition"]] = run["samples_per_s"]
    middle = {way: statistics.median(of.values()) for way, of in speeds.items()}
    alone, better = next(iter(OURS)), max(PEERS, key=middle.__getitem__)
    rows = [["", "samples/s", "min to max", f"of {alone}", f"of {better}"]]
    for way, of in speeds.items():
        # Of the same repetition: what slows the machine down for a while slows both.
        ratios = [statistics.median(of[n] / speeds[base][n] for n in of) for base in (alone, better)]
        spread = f"{min(of.values()):,.0f} to {max(of.values()):,.0f}"
        rows.append([way, f"{middle[way]:,.0f}", spread, f"{ratios[0]:.1%}", f"{ratios[1]:.2f}"])
    return rows


def main() -> None:
    args = arguments()
    if args.peer:
        train_peer(*args.peer, args)
        return
    load = os.getloadavg()[0]
    ways, runs, measurements = [*OURS, *(AT_ONCE if args.hosts > 1 else ()), *PEERS], [], []
    with tempfile.TemporaryDirectory() as temporary, emulated(args) or nullcontext() as hosts:
        for number in hosts.numbers if hosts else ():
            hosts.rate(number, args.rate, RATES[args.rate])
        data = write_data(Path(temporary) / "data", args.mnist, args.ranks)
        for name in args.models:
            for repetition in range(args.repetitions):
                # Another one is first each time: what comes first may find a cooler or a warmer machine.
                first = repetition % len(ways)
                for way in ways[first:] + ways[:first]:
                    found = measure(way, name, repetition, Path(temporary), args, hosts)
                    measurements += [m for m in [found.pop("measurement", None)] if m]
                    runs.append({"model": name, "way": way, "repetition": repetition, **found})
                    print(
                        f"{name} {repetition} {way}: {found['samples_per_s']:,.0f} samples/s", file=sys.stderr
                    )
    rounds = {name: (args.steps or steps) // PERIOD for name, (_, steps) in STEPS.items()}
    given = argparse.Namespace(**vars(args), period=PERIOD, rounds=rounds, warm_up=None)
    about = circumstances(given, data, load, measurements) | {
        "warm_up": {n: STEPS[n][0] for n in args.models},
        "hosts": args.hosts,
        "rate": args.rate if args.hosts > 1 else None,
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()), end="\n\n")
    for name in args.models:
        print(f"{name}:\n\n{markdown(table([r for r in runs if r['model'] == name]))}\n")
    if args.json:
        args.json.write_text(json.dumps({"about": about, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
