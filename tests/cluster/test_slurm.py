"""slurm/train.sh on a real Slurm: jobs that go on after whatever interrupts them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.project import BY_MPIRUN, LONG, Project
from tests.cluster.slurm import Slurm, missing
from tests.deadlines import Deadline, seconds
from tests.launching import ROOT
from tests.mpi.jobs import SHORT, events, model_bytes

pytestmark = pytest.mark.cluster

ONE_EACH = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def uninterrupted(slurm_cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The model of LONG by two ranks on two hosts, which nothing interrupted."""
    project = Project(tmp_path_factory.mktemp("uninterrupted"), slurm_cluster)
    project.hurry()
    job = project.submit(*ONE_EACH, training=LONG)
    project.wait(job, "COMPLETED")
    return model_bytes(project.run(job))


def assert_it_went_on(run: Path, model: bytes, starts: int = 2) -> None:
    """That each start went on from the newest checkpoint, and left no round out; and that the model is that
    of a run that nothing interrupted: no sample counted twice, and none was forgotten."""
    headers = [i for i, e in enumerate(events(run)) if e["event"] == "header"]
    assert len(headers) == starts
    parts = [events(run)[a:b] for a, b in pairwise([*headers, None])]
    for before, after in pairwise(parts):
        saved = [e["round"] for e in before if e["event"] == "checkpoint"]
        # A rank that is killed may have written a checkpoint and not yet told of it.
        assert after[0]["round"] >= saved[-1] > 0
    for part in parts:
        done = part[0]["round"]
        for event in part:
            if event["event"] == "round":
                assert event["rounds"][0] == done + 1
                done = event["rounds"][1]
    assert parts[-1][-1]["reason"] == "max_rounds"
    assert model_bytes(run) == model


def test_a_preempted_job_goes_on(project: Project, uninterrupted: bytes) -> None:
    """With a grace in which Slurm sends SIGTERM to the ranks."""
    job = project.submit(*ONE_EACH, training=LONG)
    project.wait_for_round(job, 5)
    wanted = ("--partition=high", "--nodes=4", "--exclusive", "--wrap", "true")
    high = project.slurm.sbatch(*wanted, cwd=project.folder)
    project.slurm.wait(high, "COMPLETED", deadline_s=40)
    assert project.finish(job)["Restarts"] == "1"
    assert_it_went_on(project.run(job), uninterrupted)
    assert "preempted; interrupted, with a checkpoint; job" in project.log(job)
    assert f"job {job} on h[1-2], start 2" in project.log(job)


def test_a_job_outlives_its_time_limit_and_what_depends_on_it_waits(
    project: Project, uninterrupted: bytes
) -> None:
    # Slurm looks every 30 s whose limit is near: the signal comes 20 to 50 s before the end.
    job = project.submit("--time=1", "--signal=B:USR1@20", *ONE_EACH, training=LONG)
    look = f"tail -n 1 runs/{job}/events.jsonl > seen"
    waits = project.slurm.sbatch(f"--dependency=afterok:{job}", "--wrap", look, cwd=project.folder)
    project.wait_for_restart(job, deadline_s=70)
    # A signal in the second start as well would do no harm, but take time.
    project.slurm.run("scontrol", "update", f"jobid={job}", "timelimit=10")
    assert project.slurm.job(waits)["JobState"] == "PENDING"
    assert project.finish(job)["Restarts"] == "1"
    project.slurm.wait(waits, "COMPLETED", deadline_s=20)
    assert '"reason":"max_rounds"' in (project.folder / "seen").read_text()
    assert_it_went_on(project.run(job), uninterrupted)
    assert "USR1, the time limit or a preemption is near" in project.log(job)
    assert f"interrupted, with a checkpoint; job {job} is in the queue again" in project.log(job)


def finish_elsewhere(project: Project, job: str, model: bytes) -> None:
    """Waits for the end of a job that lost h2 and is in the queue again."""
    ended = project.finish(job)
    assert ended["Restarts"] == "1"
    assert f"job {job} on {ended['NodeList']}, start 2" in project.log(job)
    hosts = project.slurm.run("scontrol", "show", "hostnames", ended["NodeList"]).stdout.split()
    assert "h2" not in hosts
    assert_it_went_on(project.run(job), model)


def test_jobs_that_lose_a_node_go_on(project: Project, uninterrupted: bytes) -> None:
    """A host that falls silent, under srun and under mpirun."""
    slurm = project.slurm
    by_srun, by_mpirun = (project.submit(*ONE_EACH, training=LONG, env=env) for env in ({}, BY_MPIRUN))
    for job in (by_srun, by_mpirun):
        project.wait_for_round(job, 12)
        assert slurm.job(job)["NodeList"] == "h[1-2]"
    slurm.hosts.poweroff(2)
    try:
        for job in (by_srun, by_mpirun):
            project.wait_for_restart(job, deadline_s=90)
        for job in (by_srun, by_mpirun):
            finish_elsewhere(project, job, uninterrupted)
    finally:
        slurm.boot(2)
    assert "DUE TO NODE FAILURE" in project.log(by_srun)
    # Here Slurm takes a silent host for down almost as soon as the script has found it out.
    said = project.log(by_mpirun)
    assert "a host of this job no longer answers" in said or "DUE TO NODE FAILURE" in said


def test_a_job_sees_by_itself_that_a_node_is_lost(project: Project, uninterrupted: bytes) -> None:
    job = project.submit(*ONE_EACH, training=LONG, env=BY_MPIRUN)
    project.wait_for_round(job, 12)
    project.slurm.hosts.kill(2)
    try:
        project.wait_for_restart(job, deadline_s=30)
        finish_elsewhere(project, job, uninterrupted)
    finally:
        project.slurm.boot(2)
    said = project.log(job)
    # On a busy machine Slurm may take the host for down before the script has asked it.
    assert f"job {job} is in the queue again" in said or "DUE TO NODE FAILURE" in said
    assert "a host of this job no longer answers" in said


def test_an_interrupted_job_that_stays_where_it_is_has_the_code_75(project: Project) -> None:
    job = project.submit("--ntasks=1", training=LONG, env={"HVD_TRAIN_REQUEUE": "0"})
    waits = project.slurm.sbatch(f"--dependency=afterok:{job}", "--wrap", "true", cwd=project.folder)
    project.wait_for_round(job, 2)
    # What Slurm sends before the time limit.
    project.slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert project.wait(job, "FAILED", deadline_s=30)["ExitCode"] == "75:0"
    assert "not put into the queue again: HVD_TRAIN_REQUEUE=0" in project.log(job)
    assert events(project.run(job), "stop")[-1]["reason"] == "interrupted"
    deadline = Deadline(20)
    while project.slurm.job(waits)["Reason"] != "DependencyNeverSatisfied":
        assert not deadline.passed(), project.slurm.job(waits)
        time.sleep(0.1)
    project.slurm.run("scancel", waits)


def test_a_cancelled_job_stays_cancelled(project: Project) -> None:
    job = project.submit("--ntasks=1", training=LONG)
    project.wait_for_round(job, 2)
    project.slurm.run("scancel", job)
    project.wait(job, "CANCELLED", deadline_s=30)
    project.slurm.wait_for_nodes(1)  # the job's processes have ended
    assert project.slurm.job(job)["JobState"] == "CANCELLED"
    assert events(project.run(job), "stop")[-1]["reason"] == "interrupted"


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_an_srun_of_another_mpi_is_refused_in_one_message(mpi: str, project: Project) -> None:
    job = project.submit(
        *("--nodes=4", "--ntasks=8", "--ntasks-per-node=2"), training=SHORT, env={"SLURM_MPI_TYPE": mpi}
    )
    assert project.wait(job, "FAILED", deadline_s=30)["ExitCode"] == "2:0"
    said = project.log(job)
    assert said.count("started this process as one of 8, but") == 1, said
    assert "srun --mpi=pmix" in said
    assert "Traceback" not in said
    assert not project.run(job).exists()


def test_an_array_job_has_one_run_for_each_seed(project: Project) -> None:
    own = ("--array=1-2", "--output=%x-%A_%a.log", "--ntasks=1")
    array = project.submit(*own, training=SHORT)
    for task in (1, 2):
        name = f"{array}_{task}"
        project.wait(name, "COMPLETED")
        assert f"job {name} on h1, start 1" in project.log(name)
        assert f"seed = {task}\n" in (project.run(name) / "config.toml").read_text()
        assert events(project.run(name), "stop")[-1]["reason"] == "max_rounds"


def test_an_interactive_allocation_trains(project: Project) -> None:
    line = ("slurm/interactive.sh", *ONE_EACH, "--", *SHORT, "--name", "now")
    job = project.slurm.run(*line, cwd=project.folder, env={"VENV": sys.prefix})
    assert job.returncode == 0, job.output
    assert "find-available" not in job.output, "the wheel's PMIx laments that it has no munge"
    (header,) = events(project.run("now"), "header")
    assert header["hosts"] == ["h1", "h2"]


def script(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The job's script as Slurm would start it, up to where it would call Slurm."""
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "h1", "PYTHONPATH": str(ROOT)}
    environ = {"PATH": os.environ["PATH"], "VENV": sys.prefix, **job, **env}
    line = ["bash", str(ROOT / "slurm/train.sh")]
    return subprocess.run(
        line, cwd=folder, env=environ, capture_output=True, text=True, timeout=seconds(60), check=False
    )


def test_a_job_without_progress_ends(tmp_path: Path) -> None:
    """Slurm gives a preempted job back without asking: the script looks before it starts again."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    run = tmp_path / "runs" / "17"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text('{"event": "header", "round": 0}\n' * 2)
    ended = script(tmp_path, SLURM_RESTART_COUNT="2", HVD_TRAIN_RESTARTS="2")
    assert ended.returncode == 75, ended.stderr
    assert "runs/17: 2 starts in a row resumed from round 0 and wrote no later checkpoint" in ended.stdout
    assert "job 17 on h1, start 3" in ended.stdout
    assert "job 17 ends here, interrupted" in ended.stdout


def test_a_job_without_its_folder_or_package_reports_it(tmp_path: Path) -> None:
    lost = script(tmp_path)
    assert lost.returncode == 2
    assert f"no slurm/site.sh in {tmp_path}; submit from the folder that holds slurm/" in lost.stdout
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    empty = script(tmp_path, VENV="/nowhere")
    assert empty.returncode == 2
    assert "/nowhere/bin/python has no hvd_train; say in slurm/site.sh which environment" in empty.stdout


def test_nothing_of_slurm_stays(emulated: None) -> None:
    if reason := missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        slurm = Slurm(hosts)
        ran = slurm.run("srun", "--nodes=2", "--mpi=pmix", "sh", "-c", "echo $PMIX_RANK $(hostname)")
        assert sorted(ran.stdout.split("\n")) == ["", "0 h1", "1 h2"], ran.output
        daemons = [pid for n in hosts.numbers for pid in hosts.pids(n, "munged|slurmctld|slurmd")]
        assert len(daemons) >= 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in daemons)
    assert not Path("/run/slurm").exists()
