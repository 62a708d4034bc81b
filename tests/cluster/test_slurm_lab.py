"""slurm/*.sbatch on a real Slurm of two nodes: requeue, lost nodes, restarts without progress, training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Where the lab differs from the cluster that the scripts are written for: no GPUs, small nodes to share.
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=100"]
SMALL += ["--oversubscribe", "--time=10"]
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}

# Stands for a training run: what each start of the job does is the word in its place of the list.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path

start, rank = int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(os.environ["SLURM_PROCID"])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
deed = {deeds!r}[min(start, {last})]
run, notes = Path("runs/x").absolute(), Path(os.environ["LDM_JOB_DIR"])
print(f"start {{start}} rank {{rank}}: {{deed}} at {{os.environ['MASTER_ADDR']}}\\n", end="", flush=True)
(notes / f"here-{{start}}-{{rank}}").touch()
while not (notes / f"here-{{start}}-{{1 - rank}}").exists():
    time.sleep(0.05)  # else the end of one may come before the other's first word
if "until told" in deed:
    told = signal.sigtimedwait([signal.SIGUSR2], 90)
    print(f"rank {{rank}} told {{told.si_signo if told else None}}\\n", end="", flush=True)
if "late" in deed and rank == 0:
    time.sleep(6)
    print("rank 0 came to its end\\n", end="", flush=True)
if rank == 0:
    (notes / "run").write_text(str(run))
    if "save" in deed:
        folder = run / f"checkpoints/step-{{100 * (start + 1):09d}}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").touch()
    if deed.split()[-1].isdigit():
        code = int(deed.split()[-1])
        if code:
            (notes / "exit").write_text(f"{{code}}")
        sys.exit(code)
time.sleep(0 if deed.split()[-1] == "0" else 120)
"""


@pytest.fixture
def submit(slurm_lab, checkout):
    """(deeds of each start) -> number of a job of train.sbatch whose train.py does them."""
    jobs = []

    def start(*deeds, options=(), script="train", env=None):
        folder = checkout(PROGRAM.format(deeds=list(deeds), last=len(deeds) - 1))
        words = [*SMALL, *options, f"slurm/{script}.sbatch", "a=1"]
        jobs.append(slurm_lab.sbatch(*words, cwd=folder, env=ENV | (env or {})))
        return jobs[-1]

    yield start
    for job in jobs:
        slurm_lab.run("scancel", job, check=False)
    for node in slurm_lab.nodes:
        if slurm_lab.state(node).startswith("DOWN"):
            slurm_lab.boot(node)


def ended(slurm_lab, job):
    found = slurm_lab.wait(job)
    return found["JobState"], found["ExitCode"], int(found["Restarts"])


@pytest.mark.slow
def test_two_nodes_run_a_step(slurm_lab):
    shown = slurm_lab.run("srun", "-N2", "-l", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(shown.splitlines()) == ["0: node1", "1: node2"]


@pytest.mark.slow
def test_saved_and_requeued_until_done(slurm_lab, submit):
    job = submit("save 75", "0")
    assert ended(slurm_lab, job) == ("COMPLETED", "0:0", 1)
    log = slurm_lab.log(job)
    assert "start 0 rank 1: save 75 at 127.0.0.1" in log
    assert "task 1: Terminated" in log, "so srun's own code is 143"
    assert "exit code 75, requeued" in log
    assert "start 1 rank 0: 0" in log


@pytest.mark.slow
def test_a_process_that_is_done_early_stops_no_other(slurm_lab, submit):
    """Here Slurm's own WaitTime is a second."""
    job = submit("late 0")
    assert ended(slurm_lab, job) == ("COMPLETED", "0:0", 0)
    assert "rank 0 came to its end" in slurm_lab.log(job)


@pytest.mark.slow
def test_what_a_human_must_see_is_not_requeued(slurm_lab, submit):
    job = submit("save 3")
    assert ended(slurm_lab, job) == ("FAILED", "3:0", 0)
    assert "exit code 3: not started again" in slurm_lab.log(job)


@pytest.mark.slow
def test_three_restarts_without_progress_are_the_last(slurm_lab, submit, tmp_path):
    job = submit("1")
    assert ended(slurm_lab, job) == ("FAILED", "3:0", 3)
    assert slurm_lab.log(job).splitlines()[-1].endswith("then submit it again")
    assert list((tmp_path / "checkout/.ldm_jobs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("batch_node", [True, False], ids=["batch node", "other node"])
def test_a_crashed_node_puts_the_job_back(slurm_lab, submit, batch_node):
    job = submit("save hang", "0")
    slurm_lab.until(lambda: "rank 0" in slurm_lab.log(job) and "rank 1" in slurm_lab.log(job), 60, "a start")
    batch = slurm_lab.job(job)["BatchHost"]
    node = next(name for name in slurm_lab.nodes if (name == batch) == batch_node)
    slurm_lab.crash(node)
    slurm_lab.wait(job, "PENDING", timeout=30)
    slurm_lab.boot(node)
    assert ended(slurm_lab, job) == ("COMPLETED", "0:0", 1)


@pytest.mark.slow
def test_lost_starts_count_as_well(slurm_lab, submit):
    """The script never sees these ends: the next start judges them, from its own first lines."""
    job = submit("hang", env={"LDM_MAX_RESTARTS": "1"})
    for start in range(2):
        seen = f"start {start} rank 1: hang"
        slurm_lab.until(lambda seen=seen: seen in slurm_lab.log(job), 60, seen)
        slurm_lab.run("scontrol", "requeue", job)
    assert ended(slurm_lab, job) == ("FAILED", "3:0", 2)
    assert "start 2" not in slurm_lab.log(job)


@pytest.mark.slow
def test_a_better_job_takes_the_nodes_and_gives_them_back(slurm_lab, submit):
    job = submit("save until told 75", "0", options=["--partition=low"], script="preemptible")
    slurm_lab.until(lambda: "rank 1: save until told" in slurm_lab.log(job), 60, "a start")
    whole = ["--nodes=2", "--exclusive", "--partition=high", "--wrap=sleep 1"]
    better = slurm_lab.sbatch(*whole, "--output=/dev/null")
    assert slurm_lab.wait(better, timeout=60)["JobState"] == "COMPLETED"
    assert ended(slurm_lab, job) == ("COMPLETED", "0:0", 1)
    assert "rank 0 told 12" in slurm_lab.log(job), "SIGUSR2, as the script's --signal says"


@pytest.mark.soak  # two stages; test_slurm_faults.py has one, in the gate
def test_two_nodes_train(slurm_lab, checkout, real_train, two_stage_overrides, tmp_path):
    words = [word for word in two_stage_overrides if word != "trainer=cpu"]
    words += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]
    words += [f"run_root={tmp_path}/runs"]
    env = ENV | {"LDM_JOBS": "notes"}
    job = slurm_lab.sbatch(*SMALL, "slurm/train.sbatch", *words, cwd=checkout(real_train), env=env)
    assert ended(slurm_lab, job) == ("COMPLETED", "0:0", 0), slurm_lab.log(job)
    run = tmp_path / "runs/tiny"
    record = json.loads((run / "run.json").read_text())
    assert record["slurm_jobs"] == [job]
    assert list(record["stages"]) == ["autoencoder", "diffusion"]
    assert (run / "diffusion/checkpoints/step-000000007/MANIFEST.json").is_file()
    assert "MEMBER: 2/2" in slurm_lab.log(job), "Lightning counted two processes"
