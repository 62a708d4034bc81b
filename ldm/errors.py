"""The one error that users see: `ldm: error: WHERE: WHAT; FIX`, one line, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Exit codes of train.py, beside 0: slurm/*.sbatch starts the job again after those that a restart may mend.
BAD_INPUT, NUMERICAL, HANG, REQUEUE = 2, 3, 4, 75  # 3: also restarts without progress; 75: saved, go on later


class InputError(ValueError):
    """Something the user gave is wrong: the place, the value, and what to do about it.

    every_rank: it is this process's own trouble, which rank 0 need not have.
    """

    def __init__(self, where: str, what: str, fix: str = "", every_rank: bool = False) -> None:
        self.every_rank = every_rank
        self.given = where, what, fix, every_rank
        super().__init__(f"{where}: {what}" + (f"; {fix}" if fix else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        return InputError, self.given  # from another process it comes pickled


def global_rank() -> int:
    """This process's rank by the environment, as before any process group exists; 0 for exactly one process.

    LOCAL_RANK goes before SLURM_PROCID: a process that Lightning starts inside `salloc` inherits the latter.
    """
    found = os.environ
    if "RANK" in found:
        return int(found["RANK"])
    if "LOCAL_RANK" in found:
        node = int(found.get("NODE_RANK", found.get("GROUP_RANK", "0")))
        return int(found["LOCAL_RANK"]) + node * int(found.get("LOCAL_WORLD_SIZE", "1024"))
    return int(found.get("SLURM_PROCID", "0"))


def say(*lines: object, error: bool = False) -> None:
    """Lines for the user, each by one write: where processes share a pipe, print() would tear them apart."""
    stream = sys.stderr if error else sys.stdout
    for line in lines:
        stream.write(f"{line}\n")
    stream.flush()


@contextmanager
def reported() -> Iterator[None]:
    """Turn an `InputError` into its line on stderr (of rank 0, mostly) and exit code 2."""
    try:
        yield
    except InputError as error:
        if error.every_rank or global_rank() == 0:
            say("ldm: error: " + " ".join(str(error).split()), error=True)
        raise SystemExit(BAD_INPUT) from None
