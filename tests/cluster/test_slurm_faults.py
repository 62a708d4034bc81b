"""Training by two skewed ranks on a real Slurm, hit by whatever happens to a job: it ends as if nothing had.

Nobody lifts a hand between the submission and the end. Stock Lightning, which saves inside the handler of a
signal, hung here five times of five.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import native

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=100"]
SMALL += ["--oversubscribe", "--time=10", "--partition=low"]
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
STEPS = 150  # Slurm looks for jobs whose time is up every 30 s: half of them
SKEW = """
import os, time
from ldm.training.autoencoder_module import AutoencoderModule

step, slow = AutoencoderModule.training_step, os.environ["SLURM_PROCID"] == "1"


def training_step(self, *args):
    time.sleep(float(os.environ["SKEW"]) if slow else 0.01)
    return step(self, *args)


AutoencoderModule.training_step = training_step
if __name__ == "__main__":
"""


class Job:
    """One run in the lab: submitted, looked at from outside, hurt."""

    def __init__(self, lab, folder, argv, skew, partition="low"):
        self.lab, self.run = lab, folder / "runs/run"
        env = ENV | {"LDM_JOBS": str(folder / "notes"), "SKEW": str(skew)}
        options = [*SMALL, f"--partition={partition}"]
        self.number = lab.sbatch(*options, "slurm/train.sbatch", *argv, cwd=folder / "checkout", env=env)

    def start(self):
        return int(self.lab.job(self.number)["Restarts"])

    def saved(self):
        """The newest step that is saved: a job whose starts save nothing new gives up."""
        found = self.run.glob("checkpoints/step-?????????/MANIFEST.json")  # not those being written
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def trains(self, starts, since):
        """Until this start of the job has saved more than step `since`."""

        def more():
            return self.start() >= starts and self.saved() > since

        self.lab.until(more, 150, lambda: f"start {starts} of {self.number}\n{self.lab.log(self.number)}")

    def rank(self, rank):
        """The process that is this rank now."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    said = (folder / "environ").read_bytes().split(b"\0")
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    above = Path(f"/proc/{parent}/comm").read_text()
                except OSError:
                    continue
                mine = {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()} <= set(said)
                if mine and b"train.py" in words and above.startswith("slurmstepd"):
                    return int(folder.name)
        raise AssertionError(f"no rank {rank}")

    def node(self, batch):
        """The node of the batch script, or the other one."""
        host = self.lab.job(self.number)["BatchHost"]
        return next(name for name in self.lab.nodes if (name == host) == batch)

    def back(self, node=None):
        """Until it waits again; then the node is brought back."""
        self.lab.wait(self.number, "PENDING", timeout=60)
        if node is not None:
            self.lab.boot(node)


def time_is_up(job):
    """Less than the 300 s of --signal are left: Slurm, which looks every 30 s, sends USR2 to all tasks."""
    starts = job.start()
    job.lab.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=5")
    job.lab.until(lambda: job.start() > starts, 90, lambda: job.lab.log(job.number))
    job.lab.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")


def preemption(job):
    whole = ["--nodes=2", "--exclusive", "--partition=high", "--wrap=sleep 1", "--output=/dev/null"]
    better = job.lab.sbatch(*whole)
    assert job.lab.wait(better, timeout=90)["JobState"] == "COMPLETED"


def node_down(job):
    job.lab.run("scontrol", "update", f"NodeName={job.node(batch=False)}", "State=DOWN", "Reason=test")


def crash_of_the_batch_node(job):
    node = job.node(batch=True)
    job.lab.crash(node)
    job.back(node)


def crash_of_the_other_node(job):
    node = job.node(batch=False)
    job.lab.crash(node)
    job.back(node)


def kill_of_one_rank(job):
    os.kill(job.rank(random.randrange(2)), signal.SIGKILL)


FAULTS = [
    time_is_up,
    preemption,
    node_down,
    crash_of_the_batch_node,
    crash_of_the_other_node,
    kill_of_one_rank,
]


@pytest.fixture
def submit(slurm_lab, checkout, real_train, training, tmp_path):
    """(overrides) -> a `Job` of a run of stage 1 in tmp_path/runs/run with W&B offline; rank 1 is slower."""
    jobs = []
    source = real_train.replace('if __name__ == "__main__":\n', SKEW)

    def start(name, *overrides, skew=0.4):
        folder = tmp_path / name
        folder.mkdir()
        checkout(source, folder)
        argv = [word for word in training.STAGE1 + training.OFTEN if word != "trainer=cpu"]
        argv += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true", "logger=wandb"]
        argv += [f"trainer.max_steps={STEPS}", "callbacks.checkpoint.every=3", "callbacks.metrics.every=1"]
        argv += [f"callbacks.{name}.every=1000" for name in ("pictures", "validation")]
        argv += [f"run_root={folder}/runs", "run_name=run", *overrides]
        jobs.append(Job(slurm_lab, folder, argv, skew))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm_lab.run("scancel", job.number, check=False)
    for node in slurm_lab.nodes:
        if slurm_lab.state(node).startswith("DOWN"):
            slurm_lab.boot(node)


def content(run):
    folder = native.newest(run / "checkpoints")
    assert folder is not None
    return {kind: native.load_tensors(folder, kind) for kind in ("model", "ema", "optimizer")}, folder


@pytest.mark.fault(22)
def test_a_job_that_meets_every_fault_ends_as_one_that_meets_none(submit, data, trials, counted):
    whole = submit("whole", *data, skew=0.02)
    assert whole.lab.wait(whole.number, timeout=300)["JobState"] == "COMPLETED", whole.lab.log(whole.number)
    expected, folder = content(whole.run)
    assert folder.name == f"step-{STEPS:09d}"
    for trial in range(trials(1, 10)):
        job, since = submit(f"parts{trial}", *data), 0
        for starts, fault in enumerate(FAULTS):
            job.trains(starts, since)
            began = time.monotonic()
            fault(job)
            job.lab.until(lambda n=starts, j=job: j.start() > n, 90, lambda j=job: j.lab.log(j.number))
            since = job.saved()  # it saved once more as it was stopped
            counted(**{fault.__name__: 1, "seconds until requeued": round(time.monotonic() - began, 1)})
        found = job.lab.wait(job.number, timeout=300)
        assert (found["JobState"], int(found["Restarts"])) == ("COMPLETED", len(FAULTS))
        tensors, folder = content(job.run)
        assert folder.name == f"step-{STEPS:09d}"
        for kind, values in expected.items():
            assert tensors[kind].keys() == values.keys()
            assert all(torch.equal(tensors[kind][name], value) for name, value in values.items())
        data_of = [native.load_document(f, "data.json")["digest"] for f in (folder, content(whole.run)[1])]
        assert data_of[0] == data_of[1]
        # offline-run-TIME-ID, or with -1 after it if the same second has another
        runs = {path.name.split("-")[3] for path in job.run.glob("wandb/offline-run-*")}
        assert len(runs) == 1, "one W&B run"
        counted(hands=0, hangs=0, deviations=0)
