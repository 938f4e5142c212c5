"""Damages the folder of a run in many ways, and looks at what reading it does: `python -m` this module.

Each mutant is one change of one file: bits, bytes, lengths, a missing or another file, values of JSON.
It is loaded (`best` and `latest`) and resumed (`auto`). With `corrected` the checksums are made right again,
as a foreign program might do: other values are legal then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

import hvd_train
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, DataConfig, EvaluateConfig, ModelConfig, OptimConfig, StopConfig
from hvd_train.errors import UserError
from hvd_train.io.sealed import seal
from hvd_train.preparation import prepare
from hvd_train.record.reports import NullRecorder
from hvd_train.run.claim import NoClaim
from hvd_train.run.directory import _find
from hvd_train.run.layout import saved_config
from hvd_train.run.packing import pack, unpack
from hvd_train.run.signals import StopRequest
from hvd_train.wiring import Wiring
from tests.faults.changes import change_bytes, change_json

HANGS_AFTER_S = 30
LEGAL = "other values, legal"
BAD = ("foreign exception", "hang", "differing value accepted")


def make_run(runs: Path) -> Path:
    """A run of one rank whose best checkpoint is not its newest."""
    config = Config(
        runs=str(runs),
        name="run",
        backend="solo",
        threads=1,
        seed=4,
        data=DataConfig(path="digits", batch_size=32),
        model=ModelConfig(hidden=(4,)),
        optim=OptimConfig(name="AdamW", lr=0.2),
        stop=StopConfig(patience=0, max_rounds=60),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=10),
        checkpoint=replace(Config().checkpoint, every_rounds=10),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return hvd_train.train(config).run


def load(run: Path, pointer: str) -> dict[str, Any]:
    """What `load_model` gives."""
    return dict(hvd_train.load_model(run, pointer).state_dict())


def resume(run: Path) -> tuple[int, bool, dict[str, Any]]:
    """What `--resume auto` goes on with: the round, whether the best model was lost, and every state."""
    saved = saved_config(run)
    config = replace(saved, runs=str(run.parent), resume="auto", stop=replace(saved.stop, max_rounds=10**6))
    found = _find(config, run, False, NoClaim())  # claims have tests of their own, and wait
    wiring = Wiring(prepared=prepare(config, None, SoloCommunicator()))
    training = wiring.assemble(found, NullRecorder(), StopRequest(), NoClaim())
    try:
        states: dict[str, Any] = {n: dict(p.state_dict()) for n, p in training.checkpoints.parts.items()}
        states["model"] = {n: t.clone() for n, t in wiring.prepared.model.state_dict().items()}
        lost = any(fault.kind == "best_model_lost" for fault in wiring.faults)
        return training.progress.rounds, lost, states
    finally:
        wiring.reader.close()


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    return repr(a) == repr(b)


@dataclass
class Truth:
    """What an undamaged run gives: the models by pointer, and every state by round."""

    models: dict[str, dict[str, Any]]
    states: dict[int, dict[str, Any]]

    @classmethod
    def of(cls, run: Path, scratch: Path) -> Truth:
        """Reads `run`; works on copies."""
        models = {pointer: load(run, pointer) for pointer in ("best", "latest")}
        states = {}
        for checkpoint in run.glob("checkpoints/round-*"):
            copy = copy_of(run, scratch)
            for other in copy.glob("checkpoints/round-*"):
                if int(other.name[6:]) > int(checkpoint.name[6:]):
                    shutil.rmtree(other)
            rounds, _, states[rounds] = resume(copy)
        return cls(models, states)


def copy_of(run: Path, scratch: Path) -> Path:
    """A fresh copy of a run, to be damaged."""
    copy = scratch / run.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    return copy


# --- One change of one file.


def change_line(text: str, rng: random.Random) -> str:
    """Another value of one key of a configuration."""
    lines = text.splitlines()
    # Not the threads, which are torch's in this process.
    at = rng.choice([i for i, line in enumerate(lines) if " = " in line and not line.startswith("threads")])
    value = rng.choice(["0", "1", "-1", "7.5", "true", '"x"', "[]", "[3, 3]", "nan", "1e308", "{}", "99999"])
    lines[at] = f"{lines[at].partition(' = ')[0]} = {value}"
    return "\n".join(lines)


def change_tensors(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """A tensor that is missing, renamed, of another type or shape, or has other values."""
    if not tensors:
        return {"new": torch.ones(1)}
    key = rng.choice(sorted(tensors))
    t = tensors[key]
    kind = rng.randrange(7)
    rest = {k: v for k, v in tensors.items() if k != key}
    if kind == 0:
        return rest
    if kind == 1:
        return {**rest, key + "x": t}
    if kind == 2:
        return {**rest, key.partition("/")[2] or "x/y": t}
    changed = [
        t.to(torch.float64),
        t[None],
        t.flatten()[:1],
        t.to(torch.uint8),
        torch.full_like(t, 1) * 0 - 1,
    ]
    return {**rest, key: changed[kind - 3] if kind < 7 else changed[4]}


def damage(run: Path, rng: random.Random) -> str:
    """Changes one file as it comes; returns its kind."""
    files = sorted(p for p in run.rglob("*") if p.is_file() and p.name != "events.jsonl")
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        by_kind.setdefault(file.name, []).append(file)
    name = rng.choice([*sorted(by_kind), "manifest.json", "best", "latest", "index.json"])
    file = rng.choice(by_kind[name])
    kind = rng.randrange(12)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(rng.choice(files).read_bytes())
    elif kind == 2:
        file.unlink()
        file.mkdir()
    elif kind == 3 and name in ("best", "latest"):
        file.write_text(
            rng.choice(["round-10\n", "round-50\n", "round-60\n", "round-99\n", "/etc\n", "round-²\n"])
        )
    elif kind <= 7 and file.suffix == ".toml":
        file.write_text(change_line(file.read_text(), rng))
    elif kind <= 5 and file.suffix == ".json":
        file.write_text(json.dumps(change_json(json.loads(file.read_text()), rng)))
    else:
        file.write_bytes(change_bytes(file.read_bytes(), rng))
    return name


def damage_corrected(run: Path, rng: random.Random) -> str:
    """Changes values and makes every checksum right again; returns the file's name."""
    folder = rng.choice(sorted(run.glob("checkpoints/round-*")))
    name = rng.choice(["manifest.json", "model.safetensors", "rank-00000.safetensors", "index.json"])
    if name == "index.json":
        index = json.loads((folder.parent / name).read_text())
        del index["checksum"]
        write_sealed(folder.parent / name, change_json(index, rng))
        return name
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    if name == "manifest.json":
        manifest = change_json(manifest, rng)
    else:
        content = changed_state((folder / name).read_bytes(), rng)
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"num_bytes": len(content), "xxh3_64": xxhash.xxh3_64_hexdigest(content)}
    write_sealed(folder / "manifest.json", manifest)
    return name


def changed_state(content: bytes, rng: random.Random) -> bytes:
    """A state file with other bytes, tensors or values."""
    if rng.randrange(3) == 0:
        return change_bytes(content, rng)
    tensors, plain = unpack(content)
    if rng.randrange(2):
        return pack(change_tensors(tensors, rng), plain)
    return pack(tensors, change_json(plain, rng))


def write_sealed(file: Path, values: Any) -> None:
    """JSON with the checksum that belongs to it; what is no object gets none."""
    file.write_text(seal(values) if isinstance(values, dict) else json.dumps(values))


# --- What becomes of it.


def outcomes(copy: Path, truth: Truth, name: str) -> Iterator[str]:
    """What loading and resuming a damaged run does, one word for each."""
    for pointer in ("best", "latest"):
        yield outcome(lambda p=pointer: "the same" if equal(load(copy, p), truth.models[p]) else BAD[2])

    def resumed() -> str:
        rounds, lost, states = resume(copy)
        expected = truth.states.get(rounds, {})
        if lost:  # the watch took another one, as it must
            states["watch"] |= {key: expected["watch"][key] for key in ("best", "best_round")}
        if name == "config.toml":
            return "another configuration"
        if not equal(states, expected):
            return BAD[2]
        return "the same" if rounds == max(truth.states) and not lost else "went on from another"

    yield outcome(resumed)


def outcome(action: Callable[[], str]) -> str:
    """What an action returns, or how it failed."""
    try:
        return action()
    except UserError:
        return "refused"
    except TimeoutError:
        return BAD[1]
    except Exception as error:
        if len(shown) < 20:
            shown.append(f"{type(error).__name__}: {error}"[:600])
        return BAD[0]


shown: list[str] = []
"""The first foreign exceptions."""


def count(num: int, seed: int, corrected: bool = False) -> dict[str, Counter[str]]:
    """Makes so many mutants; how many had which outcome, by file. The outcome of a mutant is the worst of
    loading `best`, loading `latest` and resuming."""
    order = [*BAD, "refused", "went on from another", LEGAL, "another configuration", "the same"]
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run = make_run(Path(folder))
        scratch = Path(folder, "scratch")
        truth = Truth.of(run, scratch)
        for i in range(num):
            rng = random.Random(f"{seed} {i}")
            copy = copy_of(run, scratch)
            name = (damage_corrected if corrected else damage)(copy, rng)
            found = list(outcomes(copy, truth, name))
            if corrected:
                found = [LEGAL if f == BAD[2] else f for f in found]
            worst = min(found, key=order.index)
            if worst in BAD:
                shown.append(f"mutant {i}, {name}: {found}")
            counts.setdefault(name, Counter())[worst] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corrected", action="store_true", help="make the checksums right again")
    args = parser.parse_args()

    def hangs(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, hangs)
    began = time.monotonic()
    counts = count(args.count, args.seed, args.corrected)
    total = sum(counts.values(), Counter())
    for name, found in sorted(counts.items()):
        print(f"{name:24} {found.total():6}  " + ", ".join(f"{k}: {n}" for k, n in sorted(found.items())))
    print(f"{'all':24} {total.total():6}  " + ", ".join(f"{k}: {n}" for k, n in sorted(total.items())))
    how = ", checksums corrected" if args.corrected else ""
    print(f"seed {args.seed}{how}, {time.monotonic() - began:.0f} s")
    for line in shown:
        print(line)
    return int(any(total[bad] for bad in BAD))


if __name__ == "__main__":
    sys.exit(main())
