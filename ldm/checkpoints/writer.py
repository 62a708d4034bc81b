"""Checkpoints written beside training: tensors are copied off the device, and a thread does the rest.

Several ranks may write into the same folder. None waits for another: each leaves a note beside its files, and
rank 0's thread, which has seen all notes, adds the documents and the manifest and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.files import remove, sync, write, write_tensors
from ldm.checkpoints.pieces import file_name

MARGIN = 1.05  # of the bytes of a checkpoint, that must be free before it is written
LOOK = 0.05  # seconds between looks for the other ranks' notes
NOTE = "rank-{:05d}.json"
GIVEN_UP = "given-up"  # rank 0's note: what the others write is for nothing

log = logging.getLogger(__name__)

Named = Mapping[str, Mapping[str, Tensor]]  # file -> name -> tensor


class Snapshot:
    """Host memory for the tensors of a checkpoint, taken once and used again; pinned for those of a GPU."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._event: Any = None

    @torch.no_grad()
    def take(self, tensors: Named) -> dict[str, dict[str, Tensor]]:
        """Copies of all. From a GPU they are on their way (`ready`), in order with what is computed next."""
        copies: dict[str, dict[str, Tensor]] = {}
        pairs: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}  # by whether on a GPU
        kept, self._memory = self._memory, {}
        for file, named in tensors.items():
            copies[file] = {}
            for name, value in named.items():
                old = kept.get((file, name))
                if old is None or old.shape != value.shape or old.dtype != value.dtype:
                    old = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self._memory[file, name] = copies[file][name] = old
                pairs[value.is_cuda].append((old, value))
        for on_gpu, found in pairs.items():
            if found:
                places, values = [old for old, _ in found], [value for _, value in found]
                torch._foreach_copy_(places, values, non_blocking=on_gpu)
        if pairs[True]:
            self._event = torch.cuda.Event()
            self._event.record()
        return copies

    def ready(self) -> None:
        """Waits until the copies are there."""
        if self._event is not None:
            self._event.synchronize()


@dataclass(frozen=True)
class Part:
    """What one rank writes of a checkpoint; `documents` are rank 0's.

    `token` names the folder until it is whole: the same on all ranks, and another for each attempt.
    """

    root: Path
    step: int
    tensors: Named
    documents: Mapping[str, str | dict[str, Any]]
    rank: int = 0
    ranks: int = 1
    token: int = 0

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for values in self.tensors.values() for value in values.values())


class Writer:
    """One part after another, in a thread; `after` is called there when a checkpoint is whole (on rank 0).

    `patience`: seconds that rank 0 waits for the other ranks, unless `stopped()` says that one of them has
    failed. A part that cannot be written is lost, and said; `failures` counts those since the last one that
    could.
    """

    def __init__(
        self,
        after: Callable[[], None] = lambda: None,
        patience: float = 600.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.after, self.patience, self.stopped = after, patience, stopped
        self.failures, self.problem = 0, ""  # in a row; what the newest was
        self.snapshot = Snapshot()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def submit(self, part: Part) -> None:
        """Copies the tensors and returns; waits only for the part before this one."""
        self.wait()
        mine = replace(part, tensors=self.snapshot.take(part.tensors))
        returned = threading.Event()  # else the thread has the interpreter first, for milliseconds

        def work() -> None:
            returned.wait()
            self._work(mine)

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()
        returned.set()

    def wait(self, timeout: float | None = None) -> None:
        """Until what was submitted is written, or lost."""
        if self._thread is not None:
            self._thread.join(timeout)

    def lose(self, root: Path, step: int, error: Exception) -> None:
        """Count a checkpoint that is not written, and say so."""
        self.failures += 1
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        self.problem = f"the checkpoint of step {step} was not written ({reason}), {free(root)}"
        log.warning("%s: %s; %d in a row", root, self.problem, self.failures)

    def _work(self, part: Part) -> None:
        try:
            self.snapshot.ready()
            store(part, self.patience, self.stopped)
            self.failures, self.problem = 0, ""
        except Exception as error:  # a full disk, one that is gone, another rank's: training goes on
            self.lose(part.root, part.step, error)
            return
        try:
            if part.rank == 0:
                self.after()
        except Exception as error:
            log.warning("%s: old checkpoints stay (%s)", part.root, error)


def free(root: Path) -> str:
    """How much room there is, in words."""
    try:
        return f"{shutil.disk_usage(root).free / 1e9:.2f} GB are free"
    except OSError:
        return "the disk does not answer"


def store(part: Part, patience: float = 600.0, stopped: Callable[[], bool] = lambda: False) -> None:
    """Write a part, and on rank 0 wait for the others' and make the checkpoint of all. Raises OSError."""
    target = part.root / f"step-{part.step:09d}"
    folder = target.with_name(f"{target.name}.tmp-{part.token or os.getpid()}")
    if part.rank:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            note = _written(part, folder)
        except Exception as error:
            with contextlib.suppress(OSError):  # a disk that takes no note either: `stopped`
                _leave(folder, part.rank, {"error": f"rank {part.rank}: {error}"})
            raise
        _leave(folder, part.rank, note)
        return
    _sweep(part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notes = [_written(part, folder)]
        notes += [_note(folder, rank, patience, stopped) for rank in range(1, part.ranks)]
        files = {name: facts for each in notes for name, facts in each["files"].items()}
        native.complete(folder, part.step, part.documents, files)
        sync(folder)
        if target.exists():
            remove(target)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if part.ranks > 1:
            with contextlib.suppress(OSError):
                folder.mkdir()
                (folder / GIVEN_UP).touch()
        raise
    sync(part.root)


def _sweep(part: Part) -> None:
    """Delete what ranks that were late wrote of checkpoints that rank 0 had given up."""
    for old in part.root.glob("step-*.tmp-*") if part.ranks > 1 else ():
        if not old.name.endswith(f"-{part.token}"):
            shutil.rmtree(old, ignore_errors=True)


def _written(part: Part, folder: Path) -> dict[str, Any]:
    """Write this rank's files; their sizes and hashes."""
    needed, disk = int(part.nbytes * part.ranks * MARGIN), shutil.disk_usage(folder)
    if part.rank == 0 and needed > disk.free:
        raise OSError(errno.ENOSPC, f"needs {needed / 1e9:.2f} GB")
    files = {}
    for name, values in part.tensors.items():
        if part.rank and (folder / GIVEN_UP).exists():
            raise OSError(errno.EIO, "rank 0 has given it up")
        path = folder / file_name(name, part.rank, part.ranks)
        files[path.name] = write_tensors(path, values)
    return {"files": files}


def _leave(folder: Path, rank: int, note: Mapping[str, Any]) -> None:
    path = folder / NOTE.format(rank)
    write(path.with_suffix(".new"), json.dumps(note))
    os.replace(path.with_suffix(".new"), path)


def _note(folder: Path, rank: int, patience: float, stopped: Callable[[], bool]) -> dict[str, Any]:
    """What another rank says that it has written; takes its note away."""
    path, end = folder / NOTE.format(rank), time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            raise OSError(errno.ETIMEDOUT, f"rank {rank} did not write its part within {patience:.0f} s")
        if stopped():
            raise OSError(errno.EIO, "another rank could not write its part")
        time.sleep(LOOK)
    note = dict(json.loads(path.read_text(encoding="utf-8")))
    path.unlink()
    if "error" in note:
        raise OSError(errno.EIO, str(note["error"]))
    return note
