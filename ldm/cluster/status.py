"""A run seen from outside: its files alone are read, so any host that sees them can ask, and nothing waits.

Alive is what holds run.lock, which the operating system drops when its process ends. A lock may not reach
from one host to another; there the heart-beat decides, which rank 0 writes every half minute.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.checkpoints import native
from ldm.errors import InputError

RECORD, LOCK, HEARTBEAT, LOG = "run.json", "run.lock", "heartbeat.json", "log.txt"
SILENT = 300.0  # seconds without a heart-beat after which a run that should have one hangs, or is dead
TAIL = 1 << 16  # bytes of metrics.csv and log.txt that are read: some hundred rows
FAILURES = ("exception", "rollback", "save_failed", "hang")  # kinds of events that somebody should look at
LAST = ("signal", "exception", "hang", "finished")  # kinds that a process ends with
HOLDER = re.compile(r"held by pid (\d+) on (\S+) since (\S+)")
Holder = tuple[int | None, str, str]  # pid, host, since
SAVED = re.compile(r"signal (\d+): saved step (\d+)")


@dataclass
class CheckpointFacts:
    """A checkpoint by its name and sizes; `problem` says what is wrong with it."""

    step: int
    time: float
    bytes: int
    problem: str = ""


@dataclass
class StageStatus:
    """How far a stage is; `name` is empty in a run of one stage. Rates are those of its newest row."""

    name: str
    step: int = 0
    max_steps: int | None = None
    result: str | None = None  # of a finished stage, one line
    row: dict[str, float] = field(default_factory=dict)  # newest value of each name in metrics.csv
    row_step: int = 0
    hours_left: float | None = None
    checkpoints: list[CheckpointFacts] = field(default_factory=list)  # newest first

    @property
    def good(self) -> CheckpointFacts | None:
        return next((found for found in self.checkpoints if not found.problem), None)


@dataclass
class RunStatus:
    """What `ldm status` knows. Times are seconds since 1970; None where nothing says."""

    path: str
    name: str
    state: str  # running | finished | stopped | dead | hung | not started
    since: float | None = None
    host: str = ""
    pid: int | None = None
    job: str = ""
    devices: str = ""
    created: str = ""
    seen: float | None = None  # last sign of life
    restarts: int = 0
    stages: list[StageStatus] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    stops: list[dict[str, Any]] = field(default_factory=list)  # by a signal: nothing was wrong
    planned: list[str] = field(default_factory=list)

    @property
    def stage(self) -> StageStatus | None:
        """The one that is being trained, or was last."""
        return self.stages[-1] if self.stages else None


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """Raises an InputError where `path` is no run."""
    now = time.time() if now is None else now
    record = _record(path)
    holder, held = _holder(path / LOCK), lock_held(path / LOCK)
    beat = _json(path / HEARTBEAT)
    if held and float(beat.get("time") or 0) < (_seconds(holder[2]) or 0):
        beat = {}  # of the process before, and the one that holds the lock has not come to its first
    config = _config(path, str(beat.get("stage") or ""))
    events = [event for event in record.get("events", []) if isinstance(event, Mapping)]
    status = RunStatus(str(path), str(record.get("name", path.name)), "not started")
    status.created, status.restarts = str(record.get("created", "")), int(record.get("restarts", 0))
    status.planned = [str(name) for name in record.get("planned", [])]
    status.stages = _stages(path, record, beat, status.planned)
    status.failures = [dict(event) for event in events if event.get("kind") in FAILURES]
    status.stops = [dict(event) for event in events if event.get("kind") == "signal"]
    status.devices = _devices(config)
    status.host, status.pid = str(beat.get("host", "")) or holder[1], beat.get("pid") or holder[0]
    status.job = str(beat.get("job") or (record.get("slurm_jobs") or [""])[-1] or "")
    status.seen = _seen(path, beat, status.stages)
    status.state = _state(path, status, beat, holder, held, events, now)
    status.since = _since(status, holder, events)
    return status


def _record(path: Path) -> dict[str, Any]:
    file = path / RECORD
    if not path.is_dir():
        raise InputError(f"RUN={path}", "no such folder", "give the folder of a run, as runs/NAME")
    if not file.is_file() and (path.parent / RECORD).is_file():
        raise InputError(f"RUN={path}", "is a folder inside a run", f"give {path.parent}")
    if not file.is_file():
        if (path / LOCK).is_file():
            return {}
        raise InputError(f"RUN={path}", f"is not a run: it has no {RECORD}", "give runs/NAME")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{file}", f"cannot be read ({error})", "repair or delete it") from None


def _json(file: Path) -> dict[str, Any]:
    """What a file that may be missing or half there says."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _config(folder: Path, stage: str = "") -> dict[str, Any]:
    """The resolved config of a stage, or of the newest that has one."""
    import yaml  # type: ignore[import-untyped]

    files = [folder / stage / "config.yaml", folder / "config.yaml", *folder.glob("*/config.yaml")]
    with contextlib.suppress(OSError, yaml.YAMLError):
        file = next((file for file in files if file.is_file()), None)
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
        return found if isinstance(found, dict) else {}
    return {}


def _devices(config: Mapping[str, Any]) -> str:
    trainer = config.get("trainer") or {}
    if "devices" not in trainer:
        return ""
    devices = trainer["devices"]
    devices = len(devices) if isinstance(devices, list) else "all" if devices in (-1, "-1") else devices
    nodes = int(trainer.get("num_nodes") or 1)
    each = f"{devices} x {trainer.get('accelerator', 'device')}"
    return each if nodes == 1 else f"{nodes} nodes of {each}"


# ---- stages --------------------------------------------------------------------------------------------


def _stages(
    path: Path, record: Mapping[str, Any], beat: Mapping[str, Any], planned: list[str]
) -> list[StageStatus]:
    """In the order they are trained: those that are finished, then those begun."""
    results = record.get("stages") or {}
    known = [*planned, *results, *reversed(native.STAGES)]
    begun = {folder.parent.name for folder in path.glob("*/checkpoints")}
    begun |= {name for name in known if name and (path / name / "config.yaml").is_file()} | {*results} - {""}
    names = sorted(begun, key=lambda name: known.index(name) if name in known else len(known))
    if not names and ((path / "config.yaml").is_file() or "" in results):
        names = [""]
    return [_stage(path, name, results.get(name), beat) for name in names]


def _stage(path: Path, name: str, result: str | None, beat: Mapping[str, Any]) -> StageStatus:
    folder = path / name
    found = StageStatus(name, result=result)
    config = _config(folder)
    found.max_steps = (config.get("trainer") or {}).get("max_steps")
    found.row_step, found.row = newest_row(folder / "metrics.csv")
    found.checkpoints = checkpoints(folder / "checkpoints")
    steps = [found.row_step, *(one.step for one in found.checkpoints)]
    if beat and str(beat.get("stage") or "") in ("", name):
        steps.append(int(beat.get("step") or 0))
    found.step = max(steps)
    rate, batch = found.row.get("perf/images_per_sec"), (config.get("data") or {}).get("global_batch_size")
    if found.max_steps is not None:
        if rate and batch:
            found.hours_left = (found.max_steps - found.step) * batch / rate / 3600
        rest = found.max_steps - found.row_step
        if "perf/hours_left" in found.row and rest > 0:
            share = max(found.max_steps - found.step, 0) / rest
            found.hours_left = found.row["perf/hours_left"] * share
    return found


def newest_row(file: Path) -> tuple[int, dict[str, float]]:
    """The last step that the log has, and the newest value under each name; of the file's end alone."""
    last, row = 0, {}
    for step, name, value in csv.reader(io.StringIO(_tail(file))):
        last = max(last, int(step))
        row[name] = float(value)
    return last, row


def _tail(file: Path) -> str:
    """The whole lines at the end of a file: of a CSV those of three columns that begin with a number."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - TAIL))
            text = opened.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)[1 if size > TAIL else 0 :]
    if file.suffix == ".csv":
        lines = [line for line in lines if re.fullmatch(r"\d+,[^,\n]+,[-+.\deinfa]+\s*", line)]
    return "".join(lines)


def checkpoints(folder: Path) -> list[CheckpointFacts]:
    """Newest first, good by their sizes or not."""
    found = []
    for path in folder.glob("step-*"):
        if not native.NAME.fullmatch(path.name) or not path.is_dir():
            continue
        with contextlib.suppress(OSError):  # pruned while we look
            wrong = native.problem(path, ())
            size = sum(file.stat().st_size for file in path.iterdir())
            facts = f"{wrong[0]}: {wrong[1]}" if wrong else ""
            found.append(
                CheckpointFacts(int(path.name.removeprefix("step-")), path.stat().st_mtime, size, facts)
            )
    return sorted(found, key=lambda one: one.step, reverse=True)


# ---- alive or not --------------------------------------------------------------------------------------


def _holder(file: Path) -> Holder:
    """(pid, host, since) of who holds or held the lock; a clean end leaves the file empty."""
    try:
        match = HOLDER.search(file.read_text(encoding="utf-8"))
    except OSError:
        match = None
    return (int(match[1]), match[2], match[3]) if match else (None, "", "")


def lock_held(file: Path) -> bool:
    """Whether a process that this host knows of holds the lock.

    Asked by taking a shared one for an instant: a run that starts in that instant would be refused.
    """
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not there, or a file system without locks
        return False
    return False


def _seen(path: Path, beat: Mapping[str, Any], stages: list[StageStatus]) -> float | None:
    files = [path / LOG, *(path / stage.name / "metrics.csv" for stage in stages)]
    times = [float(beat["time"])] if beat.get("time") else []
    times += [one.time for stage in stages for one in stage.checkpoints[:1]]
    for file in files:
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times, default=None)


def _state(
    path: Path,
    status: RunStatus,
    beat: Mapping[str, Any],
    holder: Holder,
    held: bool,
    events: list[Mapping[str, Any]],
    now: float,
) -> str:
    silent = now - float(beat["time"]) if beat.get("time") else None
    if beat.get("ended"):  # between stages, or at the report: indexing a set may take long
        silent = None
    if held:
        return "hung" if silent is not None and silent > SILENT else "running"
    if _finished(status):
        return "finished"
    elsewhere = bool(status.host) and status.host != socket.gethostname()
    if elsewhere and holder[0] is not None:  # the lock may be one of that host alone
        quiet = silent if silent is not None else now - (status.seen or 0)
        if quiet <= SILENT:
            return "running"
    if not status.stages:
        return "not started"
    if events:
        return "stopped" if events[-1].get("kind") == "signal" else "dead"
    said = SAVED.findall(_tail(path / LOG))  # of a run that knew no events yet
    saved = bool(said) and int(said[-1][1]) >= status.stages[-1].step
    return "stopped" if saved and holder[0] is None else "dead"


def _finished(status: RunStatus) -> bool:
    """All stages that the run was to have have a result, and their checkpoints are as far as configs say."""
    done = {stage.name for stage in status.stages if stage.result is not None and not _more_to_do(stage)}
    return bool(done) and {stage.name for stage in status.stages} | set(status.planned) <= done


def _more_to_do(stage: StageStatus) -> bool:
    good = stage.good
    return stage.max_steps is not None and good is not None and good.step < stage.max_steps


def _since(status: RunStatus, holder: Holder, events: list[Mapping[str, Any]]) -> float | None:
    if status.state in ("running", "not started"):
        return _seconds(holder[2])
    if status.state == "hung" or not events or events[-1].get("kind") not in LAST:
        return status.seen
    return _seconds(str(events[-1].get("time", ""))) or status.seen


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
