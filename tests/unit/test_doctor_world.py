"""What doctor makes of the reports of all ranks: what is alike, what differs, and what a host must hold."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import Config, DataConfig, EvaluateConfig, OptimConfig, SyncConfig
from hvd_train.config_file import embedded_config
from hvd_train.data.catalog import open_catalog
from hvd_train.environment import machine
from hvd_train.environment.binding import CoreBinding
from hvd_train.environment.launcher import Launcher
from hvd_train.errors import ConfigError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tools.doctor import need, world
from hvd_train.tools.doctor.check import Check, size
from hvd_train.tools.doctor.memory import Need, Place, loaded_bytes, state_bytes
from hvd_train.tools.doctor.text import in_words
from hvd_train.tools.doctor.world import Report
from tests.unit.data.shards import write_foreign
from tests.unit.environment.test_machine import tree

MIB = 1 << 20


ALONE = Launcher(name="", size=1, rank=0, provides="nothing")
MPIRUN = Launcher(name="mpirun of Open MPI", size=2, rank=0, provides="mpi")


def report(
    rank: int,
    host: str = "a",
    *checks: Check,
    cores: tuple[int, ...] = (0, 1),
    there: int = 2,
    promised: int = 0,
    free: int = 0,
) -> Report:
    binding = CoreBinding(
        rank=rank,
        host=host,
        cores=frozenset(cores),
        host_cores=there,
        starter_cores=there,
        promised_cores=promised,
        threads=1,
    )
    return Report(binding=binding, cpu_limit=None, free_bytes=free, checks=tuple(checks))


def test_a_report_is_sent_as_plain_values() -> None:
    sent = report(3, "b", Check(name="python", seen="3.11.7", alike="3.11.7"), cores=(4, 2), free=7)
    assert Report.from_json(json.loads(json.dumps(sent.to_json()))) == sent


def test_equal_values_are_printed_once_and_different_ones_by_rank() -> None:
    python = Check(name="python", seen="3.11.7", alike="3.11.7")
    here, there = (Check(name="affinity", seen=f"cores {c} of 4") for c in ("0-3", "0"))
    reports = [report(r, "ab"[r // 2], python, there if r in (1, 3) else here) for r in range(4)]
    findings = world.merge(reports)
    assert [(f.check, f.ranks, f.everywhere) for f in findings] == [
        (python, (0, 1, 2, 3), True),
        (here, (0, 2), False),
        (there, (1, 3), False),
    ]
    text = in_words({"errors": 0, "warnings": 0, "start": "Go."}, findings, {r.rank: r.host for r in reports})
    assert text.splitlines() == [
        "hvd_train doctor: 4 ranks on a, b",
        "ok       python    3.11.7",
        "ok       affinity  ranks 0,2 (a, b): cores 0-3 of 4",
        "ok       affinity  ranks 1,3 (a, b): cores 0 of 4",
        "Go.",
        "0 errors, 0 warnings.",
    ]


def test_hosts_with_different_versions_are_an_error() -> None:
    reports = [
        report(r, h, Check(name="torch", seen=v, alike=v)) for r, h, v in ((0, "a", "2.4"), (1, "b", "2.5"))
    ]
    findings = world.merge(reports)
    assert [(f.check.status, f.check.seen, f.ranks) for f in findings] == [
        ("error", "2.4", (0,)),
        ("error", "2.5", (1,)),
    ]
    assert all("install the same version on every host" in f.check.remedy for f in findings)
    broken = Check(name="torch", status="error", seen="cannot be imported", remedy="pip install torch")
    assert world.merge([reports[0], report(1, "b", broken)])[1].check == broken, "its own remedy stays"


def test_a_check_of_one_rank_per_host_is_not_a_difference() -> None:
    horovod = Check(name="Horovod", seen="0.28.1")
    (finding,) = world.merge([report(0, "a", horovod), report(1), report(2, "b", horovod), report(3, "b")])
    assert (finding.ranks, finding.everywhere) == ((0, 2), True)


def test_ranks_of_a_host_that_do_not_share_memory() -> None:
    hosts = world.by_host([report(0), report(1), report(2, "b")])
    assert world.places(hosts, "ring", 2).seen == ("3 ranks on 2 hosts (a: 0-1, b: 2) connected by `ring`")
    apart = world.places(hosts, "ring", 3)
    assert apart.status == "warning"
    assert "as if on 3 hosts" in apart.seen


@pytest.mark.parametrize(
    ("masks", "present", "status", "words"),
    [
        ([(0, 1, 2, 3)] * 2, 4, "ok", "2 for each of 2 ranks on 4 cores"),
        ([(0,), (1,)], 4, "warning", "bound to one core each"),
        ([(0,), (1,)], 2, "ok", "1 for each of 2 ranks on 2 cores"),
        ([(0, 1)] * 3, 2, "warning", "1 for each of 3 ranks on 2 cores"),
        ([(0, 1, 2), (3, 4)], 6, "ok", "2 to 3 for each of 2 ranks"),
    ],
)
def test_threads(masks: list[tuple[int, ...]], present: int, status: str, words: str) -> None:
    ranks = [report(i, cores=mask, there=present) for i, mask in enumerate(masks)]
    (check,) = world.threads(ranks, MPIRUN)
    assert check.status == status, check
    assert words in check.seen
    assert bool(check.remedy) is (status != "ok")


def test_the_remedy_is_that_of_the_launcher() -> None:
    (bound,) = world.threads([report(i, cores=(i,), there=4) for i in range(2)], MPIRUN)
    assert bound.remedy.startswith("Start them with `mpirun --bind-to none`")
    srun = Launcher(name="srun", size=2, rank=0, provides="mpi")
    (short,) = world.threads([report(i, there=4, promised=4) for i in range(2)], srun)
    assert short.seen == (
        "1 for each of 2 ranks on 2 cores: all ranks are bound to 2 cores, but SLURM_CPUS_PER_TASK is 4"
    )
    assert short.remedy == "Start them with `srun --cpus-per-task`, which srun does not take from the job."


def test_cores_that_are_wrong_on_one_of_two_hosts() -> None:
    reports = [report(0), report(1, cores=(0,)), report(2, "b", cores=(0,)), report(3, "b", cores=(0,))]
    found = [f for f in world.checks_of_job(reports, "ring", 2, None, MPIRUN) if f.check.name == "threads"]
    assert [(f.check.status, f.ranks, f.everywhere) for f in found] == [
        ("ok", (0, 1), False),
        ("warning", (2, 3), False),
    ]
    assert "all ranks are bound to core 0 of 2 and take turns on it" in found[1].check.seen


def needs(**parts: int) -> Need:
    """S of 8 MiB, half of it moments; gradients of 4 MiB."""
    usual = {"state_bytes": 8, "gradient_bytes": 4, "model_bytes": 4, "averaged_moment_bytes": 4}
    return Need(words="1 parameter", **{name: mib * MIB for name, mib in {**usual, **parts}.items()})


STEADY = {"ring": 2 + 2, "mpi": 2 * 3, "horovod": 2 * 3}
"""Copies of S of two ranks on a host."""


@pytest.mark.parametrize("backend", ["ring", "mpi", "horovod"])
def test_the_peak_is_at_the_start_in_a_step_in_an_average_or_in_a_checkpoint(backend: str) -> None:
    at = Place(ranks=2, world_size=2, num_hosts=1, backend=backend)
    assert at.copies == STEADY[backend]
    steady = 8 * at.copies + 8  # the slices of both are one S
    gradients = 2 * 4
    average = gradients + (16 if backend == "horovod" else 0)

    def peak(need: Need) -> float:
        return state_bytes(need, at) / MIB

    assert peak(needs()) == steady + max(average, gradients + 4 + 3 * 4), "rank 0 writes"
    assert peak(needs(averaged_moment_bytes=20)) == steady + gradients + 3 * 20
    assert peak(needs(gradient_bytes=0, model_bytes=0)) == steady + 16, "the model as it was built"
    assert peak(needs(activation_bytes=50)) == steady + gradients + 2 * 50
    assert peak(needs(own_bytes=5, own_moment_bytes=5)) == steady + 10 + gradients + 6 * 5 + 4 + 12
    wide = 2 * 16 if backend != "ring" else 0
    moving = steady + 4 + max(average, gradients + 4 + 4 * 4)
    assert peak(needs(ema_bytes=4)) == moving, "slices of 2, and one more file on rank 0"
    outer = steady + 8 + max(average, gradients + 4 + 3 * 4 + 3 * 2 * 2)
    assert peak(needs(outer_bytes=8)) == outer, "two slots of 4, one of which is saved in the files of both"
    every_step = steady + 4 + 8 + max(average, gradients + 4 + 3 * 4 + 3 * 2 * 4)
    found = peak(needs(stepped_bytes=4, sliced_moment_bytes=8))
    assert found == every_step, "the moments of both are saved in their files"
    assert peak(needs(wide_bytes=16)) == steady + 8 + wide + max(average, gradients + 16), "half types"


def test_the_slices_of_several_hosts() -> None:
    at = Place(ranks=2, world_size=6, num_hosts=3, backend="ring")
    S = 8 * MIB
    expected = 4 * S + S // 3 + S // 3 + (8 + 4 + 12) * MIB
    assert state_bytes(needs(), at) == expected
    assert state_bytes(needs(staged_bytes=3), at) == expected + 2 * 3 * MIB, "each rank's, between hosts"
    alone = Place(ranks=2, world_size=2, num_hosts=1, backend="ring")
    assert state_bytes(needs(staged_bytes=3), alone) == state_bytes(needs(), alone)


@pytest.mark.parametrize(
    ("reading", "free", "data"),
    [("auto", 1000, 40), ("auto", 159, 7), ("memory", 10, 40), ("stream", 1000, 7)],
)
def test_data_are_held_whole_or_by_windows(reading: str, free: int, data: int) -> None:
    need = needs(data_bytes=160, window_bytes=7, process_bytes=100, library_bytes=50)
    at = Place(ranks=2, world_size=4, num_hosts=2, backend="ring")
    held = loaded_bytes(replace(need, reading=reading), at, free * MIB)
    assert held == (50 + 2 * (100 + data)) * MIB


def test_with_a_global_order_every_rank_holds_all_rows() -> None:
    need = needs(data_bytes=160, window_bytes=7)
    at = Place(ranks=2, world_size=4, num_hosts=2, backend="ring")
    loaded = [
        loaded_bytes(replace(need, reading="memory", order=order), at, 0) for order in ("rank", "global")
    ]
    assert loaded[1] - loaded[0] == 2 * (need.data_bytes - need.data_bytes // 4)


@pytest.mark.parametrize(("ranks", "backend"), [(2, "ring"), (2, "mpi"), (1, "solo")])
def test_memory_is_estimated_for_the_ranks_of_a_host(ranks: int, backend: str) -> None:
    need = needs(process_bytes=10)
    at = Place(ranks=ranks, world_size=ranks, num_hosts=1, backend=backend)
    needed = state_bytes(need, at) + ranks * 10 * MIB

    def check(free: int) -> Check:
        of_host = [report(r, free=free, cores=(0,)) for r in range(ranks)]
        return world.memory(of_host, backend, need, ranks)

    assert check(needed).status == "ok"
    short = check(needed - 1)
    assert short.status == "error"
    assert f"for torch and the data: {size(needed)} of" in short.seen
    assert short.remedy


def test_a_limit_that_is_too_small_for_so_many_parameters(tmp_path: Path) -> None:
    root = tree(tmp_path, "/a", {"a/memory.max": str(200 * MIB), "a/memory.current": "0"}, free_kb=10**6)
    of_host = [report(r, free=machine.available_memory(root)) for r in range(2)]
    for parameters, status in ((2_000_000, "ok"), (4_000_000, "error")):
        check = world.memory(of_host, "ring", need.of(Config(), parameters), 2)
        assert check.status == status, check
    assert "4,000,000 parameters, S = 30.5 MiB: 2 ranks need 4 S" in check.seen
    assert "of 200 MiB free" in check.seen


def test_of_several_hosts_those_that_have_too_little() -> None:
    values = asdict(needs())
    peak = state_bytes(needs(), Place(ranks=2, world_size=6, num_hosts=3, backend="ring")) // MIB + 1

    def findings(*more: int) -> list[tuple[str, tuple[int, ...]]]:
        reports = [report(r, "abc"[r // 2], free=(peak + more[r // 2]) * MIB) for r in range(6)]
        found = world.checks_of_job(reports, "ring", 3, values, ALONE)
        return [(f.check.status, f.ranks) for f in found if f.check.name == "memory"]

    assert findings(40, 0, 10) == [("ok", (2, 3))], "b has the least"
    assert findings(40, -2, -4) == [("error", (2, 3)), ("error", (4, 5))]


def test_alone_a_rank_for_each_core_should_fit_too() -> None:
    three = state_bytes(needs(), Place(ranks=3, world_size=3, num_hosts=1, backend="ring"))
    (alone,) = [report(0, free=three, cores=(0, 1, 2, 3))]
    check = world.memory([alone], "solo", needs(), 1)
    assert check.status == "warning"
    assert "4 ranks need 6 S" in check.seen
    assert "no more than 3 ranks" in check.remedy


def test_what_each_optimizer_keeps() -> None:
    n = 1_000_003
    sgd = need.of(Config(), n)
    assert (sgd.state_bytes, sgd.gradient_bytes) == (8 * n, 4 * n), "parameters and momentum; gradients"
    assert (sgd.model_bytes, sgd.averaged_moment_bytes, sgd.own_bytes) == (4 * n, 4 * n, 0)
    adam = Config(optim=OptimConfig(name="AdamW", lr=1e-3))
    assert need.of(adam, n).state_bytes == 12 * n
    kept = need.of(replace(adam, sync=SyncConfig(optimizer_state="keep")), n)
    assert (kept.state_bytes, kept.own_bytes, kept.own_moment_bytes) == (4 * n, 8 * n, 8 * n)
    assert need.of(replace(adam, sync=SyncConfig(optimizer_state="reset")), n).own_moment_bytes == 0
    apart = need.of(replace(adam, sync=SyncConfig(every_rounds={"exp_avg": 3})), n)
    assert (apart.state_bytes, apart.averaged_moment_bytes, apart.own_moment_bytes) == (12 * n, 4 * n, 4 * n)
    mixed = need.of(replace(adam, sync=SyncConfig(moments={"exp_avg": "keep"})), n)
    assert (mixed.state_bytes, mixed.own_bytes, mixed.own_moment_bytes) == (8 * n, 4 * n, 4 * n)
    assert need.of(replace(adam, sync=SyncConfig(ema=0.9)), n).ema_bytes == 4 * n
    assert need.of(replace(adam, sync=SyncConfig(outer="nesterov")), n).outer_bytes == 2 * 4 * n, "two slots"
    assert (sgd.ema_bytes, sgd.outer_bytes) == (0, 0)
    every_step = need.of(replace(adam, sync=SyncConfig(mode="gradients")), n)
    assert (every_step.state_bytes, every_step.stepped_bytes) == (4 * n, 4 * n)
    assert (every_step.sliced_moment_bytes, every_step.own_bytes, every_step.averaged_moment_bytes) == (
        8 * n,
        0,
        0,
    )
    assert (every_step.staged_bytes, sgd.staged_bytes) == (2 * n, 0), "of the last ones with a third, half"
    clipped = OptimConfig(clip_norm=1.0)
    assert need.of(Config(optim=clipped, sync=SyncConfig(mode="gradients")), n).staged_bytes == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(sync=SyncConfig(mode="gradients"), optim=OptimConfig(name="Adafactor")),
            "optim.name = 'Adafactor': sync.mode = 'gradients' steps on slices of the parameters; ",
        ),
        (
            Config(evaluate=EvaluateConfig(batch_norm_batches=2)),
            "evaluate.batch_norm_batches: expected 0 with the model Mlp, ",
        ),
    ],
)
def test_what_a_run_refuses_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        need.of(config, None)
    assert str(caught.value).startswith(message)


def test_the_embedded_model() -> None:
    config = embedded_config()
    found = need.of(config, None)
    assert found.words.endswith(" parameters")
    num = int(found.words.split()[0].replace(",", ""))
    assert 2 * 4 * num <= found.state_bytes <= 2 * (4 * num + 64 * 20), "each tensor begins at 64 bytes"
    assert found.gradient_bytes == found.model_bytes == 4 * num
    row = 8 * 8 + 8  # pixels and an int64
    assert found.data_bytes % row == 0
    assert found.data_bytes // row > 1000
    assert found.window_bytes == 64 * MIB


ROW = 3 * 4 + 8


class Tanhs(Task):
    """Keeps its two hidden layers of 50 float32 for the backward pass, and the logits of 7 classes."""

    def build_model(self, spec: object) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 7))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])


@pytest.mark.parametrize("validation", ["", 0.5])
def test_activations_grow_with_the_batch(validation: float | str, tmp_path: Path) -> None:
    write_foreign(tmp_path / "a.h5", 40)
    data = DataConfig(path=str(tmp_path / "a.h5"), batch_size=100, validation=validation)
    config = Config(data=data, evaluate=EvaluateConfig(batch_size=10_000))
    catalog = open_catalog(data)
    found = need._activations(Tanhs(), catalog, config)
    kept = 2 * 100 * (2 * 50 * 4 + 7 * 4 + 2 * ROW)
    passed = 10_000 * (2 * 50 * 4 + ROW)
    if validation:
        assert found == pytest.approx(passed, rel=0.1)
    else:
        assert found == pytest.approx(kept, rel=0.15)


def test_a_process_with_torch_is_not_small() -> None:
    own, files = need.of_process()
    assert own > 50 * MIB
    assert files > 20 * MIB
