"""A run whose steps fail goes back to its last checkpoint, and leaps over the data that it failed on.

As in PaLM (Chowdhery et al. 2022, section 5.1), where spikes did not come again with the same weights and
other data. run.json keeps which places of the plan are leapt over, so that a restart leaps over them too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import distributed as dist

from ldm.checkpoints import native
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.data.plan import Window, skipped
from ldm.errors import NUMERICAL
from ldm.training.callbacks.guard import Guard

AGAIN = -1  # no exit code

log = logging.getLogger(__name__)


def windows(run: RunDirectory, stage: Stage) -> list[Window]:
    """Places of the plan that the stage leaps over, as rank 0 reads them."""
    return [(one["window"][0], one["window"][1]) for one in _shared(_kept(run, stage))]


def outcome(run: RunDirectory, stage: Stage, began: Path | None, trainer: pl.Trainer, guard: Guard) -> int:
    """The exit code of a stage that is through with `trainer.fit`, or AGAIN; on all ranks, in step.

    AGAIN: the stage goes on from its newest checkpoint, past what was read since. `began`: the checkpoint
    that it began with, if any.
    """
    step = trainer.global_step
    if guard.signal is not None:
        newest = native.newest(stage.checkpoints, ())
        saved = newest is not None and newest.name == f"step-{step:09d}"
        what = f"saved step {step}" if saved else f"step {step} could not be saved"
        run.event("signal", step, f"signal {guard.signal}: {what}")
        return guard.exit_code
    if not guard.rollback:
        return 0
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    found = _shared(_found(stage, began, step, datamodule) if run.rank == 0 else [])[0]
    kept = _shared(_kept(run, stage))
    before = sum(one["checkpoint"] == found["checkpoint"] for one in kept)
    if before >= guard.rollbacks:
        what = f"step {step} failed after {before} attempts from step {found['checkpoint']}"
        run.event("rollback", step, f"{what}: given up")
        log.error("%s", what)
        return NUMERICAL
    run.note(needed=True, rollbacks={**run.record().get("rollbacks", {}), stage.name: [*kept, found]})
    first, end = found["window"]
    what = f"back to step {found['checkpoint']}; samples {first} to {end} of the run are left out"
    run.event("rollback", step, what)
    log.warning("%s", what)
    return AGAIN


def _found(stage: Stage, began: Path | None, step: int, datamodule: Any) -> list[dict[str, Any]]:
    """One entry: where the run goes back to, and what it then leaps over."""
    newest = native.newest(stage.checkpoints) or began
    state = native.load_state(newest) if newest else {"step": 0, "images": 0}
    consumed = state["images"] + (step - state["step"]) * datamodule.global_batch_size
    window = [skipped(state["images"], datamodule.skip), skipped(consumed, datamodule.skip)]
    return [{"step": step, "checkpoint": state["step"], "window": window}]


def _kept(run: RunDirectory, stage: Stage) -> list[dict[str, Any]]:
    return list(run.record().get("rollbacks", {}).get(stage.name, []))


def _shared(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What rank 0 has: on a shared file system another node may not see yet what it wrote."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    box = [values]
    dist.broadcast_object_list(box, src=0)
    return box[0]
