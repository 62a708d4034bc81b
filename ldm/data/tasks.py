"""Which share of a piece of work is this process's: --task I/N, or what a launcher says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldm.errors import InputError


def task_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Process I of N, from 0: by --task, else as torchrun, srun and Slurm's arrays say it, else the only one.

    Not SLURM_NTASKS: sbatch sets that for a script that starts one process, too. Raises `InputError`.
    """
    if text is not None:
        given = re.fullmatch(r"(\d+)/(\d+)", text)
        if not given or int(given[1]) >= int(given[2]):
            raise InputError(f"--task {text}", "expected I/N with 0 <= I < N", "for example --task 0/16")
        return int(given[1]), int(given[2])
    found = {name: int(value) for name, value in environment.items() if value.lstrip("-").isdecimal()}
    task, tasks = 0, 1
    if {"RANK", "WORLD_SIZE"} <= found.keys():
        task, tasks = found["RANK"], found["WORLD_SIZE"]
    elif {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= found.keys():
        task, tasks = found["SLURM_PROCID"], found["SLURM_STEP_NUM_TASKS"]
    if {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= found.keys():
        first, step = found.get("SLURM_ARRAY_TASK_MIN", 0), found.get("SLURM_ARRAY_TASK_STEP", 1)
        place, count = (found["SLURM_ARRAY_TASK_ID"] - first) // step, found["SLURM_ARRAY_TASK_COUNT"]
        if place >= count:
            what = (
                f"task {found['SLURM_ARRAY_TASK_ID']} of an array of {count} that begins at {first} has gaps"
            )
            raise InputError("SLURM_ARRAY_TASK_ID", what, "pass --task I/N")
        task, tasks = place * tasks + task, count * tasks
    return task, tasks
