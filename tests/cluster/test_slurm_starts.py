"""slurm/train.sh on a real Slurm: how many ranks a job starts, and starts that fail before the first step."""

from __future__ import annotations

import pytest

from tests.cluster.project import BY_MPIRUN, Project
from tests.mpi.jobs import SHORT, events

pytestmark = pytest.mark.cluster

OF_ANOTHER_SHELL = {"SLURM_NTASKS": "3", "SLURM_NPROCS": "3", "SLURM_NTASKS_PER_NODE": "3"}
"""What is set where a job is submitted from within an allocation; Slurm replaces only what it sets itself."""

ONE_A_NODE = "sbatch --ntasks or --ntasks-per-node asks for more"


def test_the_ranks_are_those_that_were_asked_for(project: Project) -> None:
    cases = (
        # options of sbatch, environment, ranks on each host, whether the log says why
        (("--nodes=2", "--ntasks-per-node=2"), {}, [2, 2], False),
        (("--ntasks=3",), OF_ANOTHER_SHELL, [3], False),
        (("--nodes=2",), OF_ANOTHER_SHELL, [1, 1], True),
        ((), {}, [1], True),
        (("--exclusive", "--nodes=2"), BY_MPIRUN, [1, 1], True),
        (("--exclusive", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"), {}, [2, 2], False),
    )
    for options, env, expected, says_why in cases:
        job = project.submit(*options, training=SHORT, env=env)
        project.wait(job, "COMPLETED", deadline_s=90)
        (header,) = events(project.run(job), "header")
        assert header["world_size"] == sum(expected), (options, project.log(job))
        assert len(header["hosts"]) == len(expected), (options, project.log(job))
        assert (ONE_A_NODE in project.log(job)) is says_why, (options, project.log(job))


CRASHING = """
import os, signal
import hvd_train
from hvd_train.tasks.built_in import Classification

TRIES = {tries}

class Crashing(hvd_train.Task):
    '''Ends rank 1 by a signal, as a library does that fails in MPI, until it was tried often enough.'''

    def __init__(self):
        self._task = Classification(hvd_train.Config().model)

    def build_model(self, spec):
        if os.environ.get("PMIX_RANK") == "1":
            with open("tries", "a+") as file:
                file.write("x")
            if os.path.getsize("tries") < TRIES:
                os.kill(os.getpid(), signal.SIGSEGV)
        return self._task.build_model(spec)

    def loss(self, model, batch):
        {in_loss}
        return self._task.loss(model, batch)

    def metrics(self, model, batch):
        return self._task.metrics(model, batch)
"""


def submit(project: Project, tries: int, in_loss: str = "pass") -> str:
    (project.folder / "tries").unlink(missing_ok=True)
    text = CRASHING.format(tries=tries, in_loss=in_loss)
    (project.folder / "crashing.py").write_text(text, encoding="utf-8")
    return project.submit(
        "--ntasks=2", training=("--task", "crashing.py:Crashing", "--data", "digits", *SHORT)
    )


def test_a_start_that_ends_before_its_first_step_is_tried_again(project: Project) -> None:
    job = submit(project, tries=3)
    assert project.wait(job, "COMPLETED", deadline_s=90)["Restarts"] == "0"
    said = project.log(job)
    assert "before its first step; try 2 of 3" in said
    assert "before its first step; try 3 of 3" in said
    assert len(events(project.run(job), "header")) == 1
    assert events(project.run(job), "stop")[-1]["reason"] == "max_rounds"


def test_starts_that_always_fail_are_not_tried_for_ever(project: Project) -> None:
    job = submit(project, tries=99)
    assert project.wait(job, "FAILED", deadline_s=120)["ExitCode"] == "1:0"
    said = project.log(job)
    assert said.count("before its first step; try") == 2
    assert "the training failed, exit code 1" in said
    assert (project.folder / "tries").read_text() == "xxx"


def test_a_permanent_failure_is_not_retried(project: Project) -> None:
    """A user's error, and a failure after the first step."""
    wrong = project.submit("--ntasks=2", training=("--optim.name", "SDG", *SHORT))
    assert project.wait(wrong, "FAILED", deadline_s=60)["ExitCode"] == "2:0"
    assert "Did you mean `SGD`?" in project.log(wrong)
    later = submit(project, tries=1, in_loss="if model.training: raise RuntimeError('the loss is broken')")
    assert project.wait(later, "FAILED", deadline_s=60)["ExitCode"] == "1:0"
    assert "the loss is broken" in project.log(later)
    for job in (wrong, later):
        assert "before its first step" not in project.log(job)
