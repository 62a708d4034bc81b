"""The run directory `runs/NAME/`: its config, its record, its lock, and one folder per stage.

The same command resumes a run, so the directory refuses what would quietly make it another run: a config that
differs in what is learned, and a second process that writes. Only rank 0 writes; other ranks ask for paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ldm.checkpoints.differences import ABSENT, differences
from ldm.checkpoints.files import clean, replace, spared
from ldm.config import from_yaml, plain, to_yaml
from ldm.errors import InputError, global_rank

RECORD, LOCK, CONFIG = "run.json", "run.lock", "config.yaml"
EVENTS = 200  # newest kept in run.json
INSTANT, LOST = 1.0, 120.0  # seconds to wait for a lock: of anybody, of this job's start before
WAIT = 5.0  # seconds that a thread waits for another one that writes run.json

log = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of the locks that this process holds


@functools.cache
def _watch_forks() -> None:
    """Once per process: a forked loader worker must not keep the lock of its dead parent."""
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor in _held:
        os.dup2(nothing, descriptor)  # closes our copy of the lock, and the number stays taken
    os.close(nothing)
    _held.clear()


@dataclass(frozen=True)
class Stage:
    """Where one stage of a run keeps its things; `name` is empty in a run of one stage."""

    name: str
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"


class RunDirectory:
    """`root/name`; nothing is written before `start`, and nothing ever by a rank other than 0.

    `planned`: names of the stages that the run is to have, noted for who looks from outside.
    """

    def __init__(
        self, root: Path | str, name: str, rank: int | None = None, planned: Sequence[str] = ()
    ) -> None:
        place = PurePosixPath(str(name))
        if not place.parts or place.is_absolute() or ".." in place.parts:
            raise InputError(f"run_name={name}", "is not a name for a folder", "use letters, digits, - and _")
        self.name = str(name)
        self.path = Path(root) / self.name
        self.rank = global_rank() if rank is None else rank
        self.planned = list(planned)
        self._started = False
        self._writing = threading.Lock()  # of run.json: the watchdog and the loggers have threads

    def stage(self, name: str = "") -> Stage:
        """The folder of a stage, or the run itself for a run of one stage."""
        return Stage(name, self.path / name)

    @property
    def networks(self) -> Path:
        return self.path / "networks"

    # ---- record ----------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What run.json says; empty for a run that has not started."""
        try:
            return dict(json.loads((self.path / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(
                f"{self.path / RECORD}", f"is not JSON ({error})", "repair or delete it"
            ) from None

    def start(self) -> None:
        """Make the directory, or count a restart, once; notes the Slurm job. Call it under the lock."""
        if self.rank != 0 or self._started:
            return
        self._started = True
        self._make()
        for folder in (self.networks, self.stage().checkpoints, *self.path.glob("*/checkpoints")):
            clean(folder)
        record = self.record()
        if "restarts" in record:
            record["restarts"] += 1
        else:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            record = {
                "name": self.name,
                "created": created,
                "restarts": 0,
                "slurm_jobs": [],
                "stages": {},
                **record,
            }
        if self.planned:
            record["planned"] = self.planned
        job = os.environ.get("SLURM_JOB_ID")
        if job and job not in record["slurm_jobs"]:
            record["slurm_jobs"].append(job)
        self._replace(RECORD, json.dumps(record, indent=1) + "\n")

    def note(self, needed: bool = False, **values: Any) -> None:
        """Add facts, such as a logger's id, to run.json; training goes on where that cannot be written.

        needed: it does not, but raises OSError.
        """
        self._change(lambda record: {**record, **values}, needed)

    def event(self, kind: str, step: int | None, what: str = "") -> None:
        """Add to the events of run.json, of which the newest stay; goes on where it cannot be written."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        event = {"time": now, "kind": kind, "step": step, "what": " ".join(what.split())}
        self._change(lambda record: {**record, "events": [*record.get("events", []), event][-EVENTS:]})

    def _change(self, change: Callable[[dict[str, Any]], dict[str, Any]], needed: bool = False) -> None:
        """Read run.json, change it, write it: on rank 0, and no two threads at once."""
        if self.rank != 0:
            return
        mine = self._writing.acquire(timeout=WAIT)  # a disk that hangs may hold the other thread for good
        try:
            with contextlib.nullcontext() if needed else spared(f"{self.path / RECORD}"):
                self._replace(RECORD, json.dumps(change(self.record()), indent=1) + "\n")
        finally:
            if mine:
                self._writing.release()

    def finish(self, stage: str, result: str) -> None:
        """Note that a stage is done, with its result as one line for the reader."""
        self._change(lambda record: {**record, "stages": {**record.get("stages", {}), stage: result}})

    def finished(self, stage: str) -> str | None:
        """The result line of a stage that is done, else None."""
        found = self.record().get("stages", {}).get(stage)
        return None if found is None else str(found)

    # ---- config ----------------------------------------------------------------------------------------

    def check_config(self, config: Mapping[str, Any], stage: str = "") -> None:
        """Refuse a config that would make the run (or a stage) another one: `ldm.checkpoints.differences`."""
        folder = self.stage(stage).folder
        file = folder / CONFIG
        if file.is_file():
            old = plain(from_yaml(file.read_text(encoding="utf-8"), where=f"{file}"))
            found = differences(old, plain(config))
            if found:
                key, was, now = found[0]
                more = (
                    f" (and {len(found) - 1} more: {', '.join(k for k, _, _ in found[1:4])})"
                    if found[1:]
                    else ""
                )
                what = f"has a run with {key}={_shown(was)}, the config says {_shown(now)}{more}"
                raise InputError(f"{folder}", what, "choose another run_name, or take the old value")

    def settle_config(self, config: Mapping[str, Any], stage: str = "") -> None:
        """Check the config of the run (or of a stage), and store it resolved: the newer one stays."""
        self.check_config(config, stage)
        folder = self.stage(stage).folder
        file = folder / CONFIG
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._replace(f"{file.relative_to(self.path)}", to_yaml(config))

    # ---- lock ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer of this run, as long as the block or the process lasts.

        The operating system drops the lock of a killed process, so there is never a stale one. run.lock says
        who holds it. On a file system without locks a warning takes its place. If the block fails before
        `start`, the folders made for the lock go again.
        """
        if self.rank != 0:
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self._make()
        with open(self.path / LOCK, "a+", encoding="utf-8") as file:
            self._take(file)
            _watch_forks()
            _held.add(file.fileno())
            try:
                yield
            finally:
                file.truncate(0)
                _held.discard(file.fileno())
                if made and not (self.path / RECORD).exists():
                    (self.path / LOCK).unlink()
                    with contextlib.suppress(OSError):  # not empty: another process uses it
                        for folder in made:
                            folder.rmdir()

    def _take(self, file: IO[str]) -> None:
        try:
            self._wait_for(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "held by another process"
            raise InputError(
                f"{self.path / LOCK}", holder, "wait, stop it, or choose another run_name"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s: this file system has no locks; start one process only", self.path / LOCK)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"held by pid {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()

    def _wait_for(self, file: IO[str]) -> None:
        """`ldm status` holds it for an instant, a node that is gone until the file server notices that."""
        again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        end = time.monotonic() + (LOST if again else INSTANT)
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    # ---- writing ---------------------------------------------------------------------------------------

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            what = f"cannot be made or written ({error.strerror})"
            raise InputError(f"{self.path}", what, "set run_root=... to a folder of yours") from None

    def _replace(self, name: str, text: str) -> None:
        replace(self.path / name, text)


def _shown(value: Any) -> str:
    return value if value == ABSENT else repr(value)
