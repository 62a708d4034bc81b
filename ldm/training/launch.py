"""How this process was started, by srun, by torchrun or by itself, and what it leaves for the batch script.

Lightning guesses from names of jobs and from what is installed; here it is what the environment says, and
where that contradicts the config the run is refused before anything waits for a process that never comes.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from ldm.errors import InputError, global_rank

JOB = "LDM_JOB_DIR"  # slurm/launch.sh: where a job keeps its notes
ENVIRONMENTS = {"torchrun": TorchElasticEnvironment, "local": LightningEnvironment}


def devices_of(trainer: Mapping[str, Any]) -> int | None:
    """Processes a node that a trainer section asks for; None where only Lightning can tell."""
    devices, accelerator = trainer.get("devices", "auto"), trainer.get("accelerator", "auto")
    if isinstance(devices, str) and devices != "auto":
        devices = [place for place in devices.split(",") if place] if "," in devices else int(devices)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1 if accelerator in ("cpu", "auto") else None


def launcher(devices: int, num_nodes: int, found: Mapping[str, str]) -> str:
    """srun, torchrun or local, by the environment `found`; raises `InputError` if the config says otherwise.

    One process needs no launcher: in an allocation it is local, wherever it was started.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= found.keys():
        world = int(found["WORLD_SIZE"])
        local = int(found.get("LOCAL_WORLD_SIZE", world))
        _agree("devices", devices, "LOCAL_WORLD_SIZE", local)
        _agree("num_nodes", num_nodes, "WORLD_SIZE/LOCAL_WORLD_SIZE", world // local)
        return "torchrun"
    if "SLURM_JOB_ID" not in found:
        if num_nodes > 1 and "NODE_RANK" not in found:
            what, fix = "but nothing starts the other nodes", "use srun, or torchrun on each"
            raise InputError(f"trainer.num_nodes={num_nodes}", what, fix)
        return "local"
    tasks = int(found.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1 and devices * num_nodes == 1:
        return "local"
    if tasks == 1:
        what = "is set but the process was not started by srun"
        other = f", or, on one node, with torchrun --nproc-per-node={devices}" if num_nodes == 1 else ""
        raise InputError("SLURM_JOB_ID", what, "start it with srun, as slurm/train.sbatch does" + other)
    if "SLURM_NTASKS_PER_NODE" not in found:
        raise InputError(f"SLURM_NTASKS={tasks}", "without --ntasks-per-node", "give it to srun or sbatch")
    _agree("devices", devices, "SLURM_NTASKS_PER_NODE", int(found["SLURM_NTASKS_PER_NODE"]))
    _agree("num_nodes", num_nodes, "SLURM_NNODES", int(found.get("SLURM_NNODES", "1")))
    if tasks != devices * num_nodes:
        what = f"but trainer.num_nodes*trainer.devices = {num_nodes}*{devices} = {num_nodes * devices}"
        raise InputError(f"SLURM_STEP_NUM_TASKS={tasks}", what, "start one task for each device")
    return "srun"


def _agree(key: str, value: int, name: str, expected: int) -> None:
    if value != expected:
        raise InputError(f"trainer.{key}={value}", f"but {name}={expected}", f"set trainer.{key}={expected}")


def cluster_environment(trainer: Mapping[str, Any]) -> ClusterEnvironment | None:
    """Lightning's plugin for whoever started this process, checked; None for devices that are not there."""
    devices = devices_of(trainer)
    if not devices:
        return None
    kind = launcher(devices, int(trainer.get("num_nodes") or 1), os.environ)
    if kind == "srun":
        with warnings.catch_warnings():  # "srun is not used", in a job that is called interactive
            warnings.simplefilter("ignore")
            return SLURMEnvironment(auto_requeue=False)
    return ENVIRONMENTS[kind]()


# ---- for slurm/launch.sh -------------------------------------------------------------------------------


def note_run(folder: str | os.PathLike[str]) -> None:
    """Tell the batch script which run this is, so that it sees whether its checkpoints get on."""
    if global_rank() == 0:
        _note("run", str(Path(folder).absolute()), "w")


def noted(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """The exit code of a command line; the first process to end with one that is not 0 notes it for the job.

    srun returns the largest code of all processes: 143, if the first one's end made it stop the others.
    """
    code: Any = 1
    try:
        code = command(argv)
    except SystemExit as stop:
        code = stop.code
        raise
    finally:
        if code not in (0, None):
            _note("exit", str(code) if isinstance(code, int) else "1", "x")
    return int(code or 0)


def _note(name: str, text: str, mode: str) -> None:
    folder = os.environ.get(JOB)
    if folder:
        with contextlib.suppress(OSError), open(Path(folder, name), mode, encoding="utf-8") as file:
            file.write(text + "\n")
