"""A user's own folder on a cluster: what the tests of Slurm submit jobs from."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.slurm import Slurm
from tests.deadlines import Deadline
from tests.launching import ROOT
from tests.mpi.jobs import has_recorded

BY_MPIRUN = {"HVD_TRAIN_SITE": "slurm/site-nopmix.sh"}
"""Has slurm/train.sh start its ranks with mpirun."""

PATIENT = (
    *("--config", str(ROOT / "hvd_train/demo/digits.toml"), "--task", f"{ROOT}/tests/mpi/sleepy.py:Patient"),
    *("--threads", "1", "--patience", "0", "--checkpoint.every-rounds", "10"),
)
"""A training with 0.3 s a round, until it is told to hurry."""

LONG = (*PATIENT, "--max-rounds", "200")


class Project:
    """A user's own folder, with copies of the job's scripts; the package is installed elsewhere."""

    def __init__(self, folder: Path, slurm: Slurm) -> None:
        self.folder, self.slurm = folder, slurm
        folder.mkdir(exist_ok=True)
        shutil.copytree(ROOT / "slurm", folder / "slurm")

    def submit(self, *options: str, training: tuple[str, ...], env: Mapping[str, str] | None = None) -> str:
        line = (*options, "slurm/train.sh", *training)
        return self.slurm.sbatch(*line, cwd=self.folder, env={"VENV": sys.prefix, **(env or {})})

    def run(self, job: str) -> Path:
        return self.folder / "runs" / job

    def log(self, job: str) -> str:
        return (self.folder / f"hvd_train-{job}.log").read_text()

    def wait(self, job: str, *states: str, deadline_s: float = 60) -> dict[str, str]:
        return self.slurm.wait(job, *states, deadline_s=deadline_s, log=self.folder / f"hvd_train-{job}.log")

    def wait_for_round(self, job: str, round_: int) -> None:
        """Until the run has come so far."""
        deadline = Deadline(60)
        while not has_recorded(self.run(job), "round", round_):
            seen = self.slurm.job(job)
            assert seen["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), (seen, self.log(job))
            assert not deadline.passed(), self.log(job)
            time.sleep(0.05)

    def wait_for_restart(self, job: str, deadline_s: float) -> None:
        """Until Slurm has taken a job back into its queue."""
        deadline = Deadline(deadline_s)
        while self.slurm.job(job)["Restarts"] == "0":
            assert not deadline.passed(), f"{self.slurm.job(job)}\n{self.log(job)}"
            time.sleep(0.1)

    def hurry(self, wanted: bool = True) -> None:
        """From now on trainings do not sleep."""
        file = self.folder / "hurry"
        file.touch() if wanted else file.unlink(missing_ok=True)

    def finish(self, job: str) -> dict[str, str]:
        """Waits until a job that is in the queue again has come to its end."""
        self.hurry()
        return self.wait(job, "COMPLETED", deadline_s=60)
