"""Whether a folder is one folder on all hosts, as a run needs it: seen, replaced whole, locked, and how fast.

Rank 0 writes, the others watch, as in training.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 24
WRITTEN = 256 << 20  # bytes that are written to measure the rate, at most
TEXTS = (b"a" * 3000, b"b" * 5000)  # what a reader may see while one takes the place of the other
WATCHED = 1.0  # seconds that replacing is watched


@contextlib.contextmanager
def token(folder: Path, name: str) -> Iterator[Path]:
    """A file that others look for, and beside it a lock that is held as long as the block lasts."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, lock = folder / name, folder / f"{name}.lock"
    try:
        with lock.open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            replace(path, TEXTS[0])
            yield path
    finally:
        for left in folder.glob(f"{name}*"):
            left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others use it by now
            for one in made:
                one.rmdir()


def replace(path: Path, text: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(text)
    os.replace(new, path)


def replace_for(path: Path, seconds: float = WATCHED) -> int:
    """Put the two texts in each other's place for so long; returns how often."""
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        count += 1
        replace(path, TEXTS[count % 2])
        time.sleep(0.002)
    return count


def watch(path: Path, timeout: float) -> dict[str, Any]:
    """What another rank sees: `seen` after so many seconds or None, `torn` reads, `lock` free or held."""
    began = time.perf_counter()
    while not path.exists():
        if time.perf_counter() - began > timeout:
            return {"seen": None}
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.05)
    facts: dict[str, Any] = {"seen": time.perf_counter() - began, "torn": 0, "reads": 0}
    end = time.perf_counter() + WATCHED
    while time.perf_counter() < end:
        try:
            text = path.read_bytes()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):  # NFS may say so of a file just replaced
                raise
            facts["torn"] += error.errno == errno.ENOENT
            continue
        facts["reads"] += 1
        facts["torn"] += text not in TEXTS
        time.sleep(0.002)
    return {**facts, "lock": lock_of(path.with_name(f"{path.name}.lock"))}


def lock_of(path: Path) -> str:
    """held (by another process), free (though rank 0 holds it), or none (the file system has no locks)."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError:
        return "none"
    return "free"


def write_rate(folder: Path, name: str, size: int) -> float:
    """Bytes a second into a new file of the folder until they are on the disk."""
    size, path = max(1 << 20, min(size, WRITTEN)), folder / f"{name}.rate"
    chunk = os.urandom(min(CHUNK, size))
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(-(-size // len(chunk))):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return -(-size // len(chunk)) * len(chunk) / seconds
