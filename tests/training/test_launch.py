"""Who started the processes: what the environment says, what contradicts the config, and torchrun itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from ldm.errors import InputError
from ldm.training import launch

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


def slurm(tasks=None, per_node=None, nodes=1, name="ldm"):
    """The environment in a job: of a batch script, or of one of the `tasks` that srun started."""
    found = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": name, "SLURM_PROCID": "0", "SLURM_NNODES": str(nodes)}
    found |= {} if per_node is None else {"SLURM_NTASKS_PER_NODE": str(per_node)}
    found |= {} if tasks is None else {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_NTASKS": str(tasks)}
    return {**found, "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def torchrun(world, local):
    found = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local)}
    return {**found, "TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture
def environment(monkeypatch):
    """(variables) sets them, and removes all others of launchers."""

    def become(found):
        for name in [*os.environ]:
            if name.startswith("SLURM_") or name in LAUNCHERS:
                monkeypatch.delenv(name)
        for name, value in found.items():
            monkeypatch.setenv(name, value)

    return become


@pytest.mark.parametrize(
    ("devices", "num_nodes", "found", "kind"),
    [
        (1, 1, {}, LightningEnvironment),
        (8, 1, {}, LightningEnvironment),
        (1, 1, slurm(), LightningEnvironment),  # one process in a batch script
        (1, 1, slurm(tasks=1, per_node=8), LightningEnvironment),  # in the shell of an allocation
        (1, 1, slurm(tasks=1, per_node=1), LightningEnvironment),
        (8, 4, slurm(tasks=32, per_node=8, nodes=4), SLURMEnvironment),
        (2, 1, slurm(tasks=2, per_node=2, name="interactive"), SLURMEnvironment),  # srun inside salloc
        (2, 1, torchrun(2, 2), TorchElasticEnvironment),
        (4, 2, torchrun(8, 4), TorchElasticEnvironment),
        (4, 2, {"NODE_RANK": "1", "MASTER_ADDR": "node1"}, LightningEnvironment),  # Lightning's own way
        (4, 2, slurm(tasks=2, per_node=1, nodes=2) | torchrun(8, 4), TorchElasticEnvironment),
    ],
)
def test_who_started_it(devices, num_nodes, found, kind, environment):
    environment(found)
    trainer = {"devices": devices, "num_nodes": num_nodes, "accelerator": "cpu"}
    made = launch.cluster_environment(trainer)
    assert type(made) is kind
    assert not getattr(made, "auto_requeue", False), "the batch script requeues"


@pytest.mark.parametrize(
    ("devices", "num_nodes", "found", "line"),
    [
        (
            4,
            2,
            {},
            "trainer.num_nodes=2: but nothing starts the other nodes; use srun, or torchrun on each",
        ),
        (4, 1, slurm(8, 8), "trainer.devices=4: but SLURM_NTASKS_PER_NODE=8; set trainer.devices=8"),
        (1, 1, slurm(8, 8), "trainer.devices=1: but SLURM_NTASKS_PER_NODE=8; set trainer.devices=8"),
        (8, 1, slurm(32, 8, 4), "trainer.num_nodes=1: but SLURM_NNODES=4; set trainer.num_nodes=4"),
        (
            8,
            4,
            slurm(None, 8, 4),
            "SLURM_JOB_ID: is set but the process was not started by srun; start it with srun, as "
            "slurm/train.sbatch does",
        ),
        (
            2,
            1,
            slurm(1, 2),
            "SLURM_JOB_ID: is set but the process was not started by srun; start it with srun, as "
            "slurm/train.sbatch does, or, on one node, with torchrun --nproc-per-node=2",
        ),
        (2, 2, slurm(4, None, 2), "SLURM_NTASKS=4: without --ntasks-per-node; give it to srun or sbatch"),
        (
            8,
            2,
            slurm(10, 8, 2),
            "SLURM_STEP_NUM_TASKS=10: but trainer.num_nodes*trainer.devices = 2*8 = 16; "
            "start one task for each device",
        ),
        (1, 1, torchrun(2, 2), "trainer.devices=1: but LOCAL_WORLD_SIZE=2; set trainer.devices=2"),
        (
            4,
            1,
            torchrun(8, 4),
            "trainer.num_nodes=1: but WORLD_SIZE/LOCAL_WORLD_SIZE=2; set trainer.num_nodes=2",
        ),
    ],
)
def test_contradictions_are_one_line(devices, num_nodes, found, line):
    with pytest.raises(InputError) as error:
        launch.launcher(devices, num_nodes, found)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("devices", "count"),
    [(3, 3), ("3", 3), ([0, 1], 2), ("0,1", 2), ("1,", 1), (-1, 1), ("auto", 1), ("-1", 1)],
)
def test_devices_are_counted(devices, count):
    assert launch.devices_of({"devices": devices, "accelerator": "cpu"}) == count


def test_a_run_is_refused_before_it_begins(environment, refused, recipe, tmp_path):
    environment(slurm(8, 8))
    line = refused(recipe(1, "x", "trainer.devices=4"))
    assert line == "trainer.devices=4: but SLURM_NTASKS_PER_NODE=8; set trainer.devices=8"
    assert not (tmp_path / "x").exists()


# ---- what the batch script is told -------------------------------------------------------------------------


def test_the_first_that_fails_is_noted(monkeypatch, tmp_path):
    monkeypatch.setenv(launch.JOB, str(tmp_path))

    def refuse(argv):
        raise SystemExit(2)

    def crash(argv):
        raise RuntimeError("cuda")

    assert launch.noted(lambda argv: 0, []) == 0
    assert not (tmp_path / "exit").exists()
    with pytest.raises(SystemExit):
        launch.noted(refuse, [])
    assert (tmp_path / "exit").read_text() == "2\n"
    assert launch.noted(lambda argv: 3, []) == 3
    assert (tmp_path / "exit").read_text() == "2\n"
    (tmp_path / "exit").unlink()
    with pytest.raises(RuntimeError):
        launch.noted(crash, [])
    assert (tmp_path / "exit").read_text() == "1\n"


def test_no_notes_without_a_job_or_a_place(monkeypatch, tmp_path):
    monkeypatch.delenv(launch.JOB, raising=False)
    assert launch.noted(lambda argv: 3, []) == 3
    monkeypatch.setenv(launch.JOB, str(tmp_path / "gone"))
    launch.note_run("runs/x")
    assert launch.noted(lambda argv: 3, []) == 3
    assert list(tmp_path.iterdir()) == []


def test_the_run_is_noted_by_rank_0(monkeypatch, tmp_path, environment):
    monkeypatch.setenv(launch.JOB, str(tmp_path))
    environment({"RANK": "1"})
    launch.note_run("runs/x")
    assert not (tmp_path / "run").exists()
    environment({"RANK": "0"})
    launch.note_run("runs/x")
    assert (tmp_path / "run").read_text() == f"{Path('runs/x').absolute()}\n"


# ---- torchrun ----------------------------------------------------------------------------------------------


def by_torchrun(argv, configs, tmp_path, devices):
    """train.py as two processes of torchrun, with the recipes of `configs`."""
    script, root = tmp_path / "script.py", Path(__file__).parents[2]
    lines = ["import sys, ldm.config, train", "from pathlib import Path", "from ldm.training import launch"]
    lines += [f"ldm.config.CONFIG_DIR = Path({str(configs)!r})"]
    lines += ["if __name__ == '__main__':", "    sys.exit(launch.noted(train.command, sys.argv[1:]))"]
    script.write_text("\n".join(lines) + "\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["trainer.accelerator=cpu", f"trainer.devices={devices}"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in LAUNCHERS}
    env = {**clean, "PYTHONPATH": f"{root}:{clean.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    env[launch.JOB] = str(tmp_path)
    command = [*launcher, str(script), *argv, *options, f"run_root={tmp_path}/runs"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_torchrun_trains(two_stage_configs, two_stage_overrides, tmp_path):
    done = by_torchrun(two_stage_overrides, two_stage_configs, tmp_path, devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MEMBER: 2/2" in done.stderr
    assert list(json.loads((tmp_path / "runs/tiny/run.json").read_text())["stages"]) == [
        "autoencoder",
        "diffusion",
    ]
    assert (tmp_path / "run").read_text() == f"{tmp_path}/runs/tiny\n"


@pytest.mark.slow
def test_torchrun_with_other_devices_is_refused(two_stage_configs, two_stage_overrides, tmp_path):
    done = by_torchrun(two_stage_overrides, two_stage_configs, tmp_path, devices=3)
    assert done.returncode != 0, "torchrun's own code: it is 1 whatever that of its processes is"
    assert (tmp_path / "exit").read_text() == "2\n"
    found = [line for line in done.stderr.splitlines() if line.startswith("ldm: error:")]
    assert found == ["ldm: error: trainer.devices=3: but LOCAL_WORLD_SIZE=2; set trainer.devices=2"]
    assert not (tmp_path / "runs").exists()
