"""Pieces of shards on a disk of the node, shared by its workers and ranks; the least recently used go first.

A shard is cut into chunks on a fixed grid, since the blocks of one pass of the plan cut it elsewhere than
those of the next. A chunk is one file, named by the hash of what it is a piece of. It ends with a checksum:
what a kill, a full disk or a power cut has left is noticed when it is read, and fetched again. The files lie
in FOLDERS folders that each keep to their share of the cap, so that a sweep lists few of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ldm.errors import InputError

CHUNK = 512 << 10  # bytes: a block of about 2 MB then reads about a quarter too much, once
FOLDERS = 64
SMALLEST = 0.5  # GB: a folder's share should hold a few chunks
TALLY = 16  # a byte of a folder's tally stands for a chunk; a sweep frees 1/TALLY of the share
STALE = 600.0  # seconds after which an unfinished file was left by a process that is gone
log = logging.getLogger(__name__)


class RangeCache:
    """At most `gigabytes` (10^9 bytes) of chunks in `folder`, which any number of processes may use.

    The first write that fails (disk full, no permission) is one warning, and the last that is tried.
    """

    def __init__(self, folder: str | os.PathLike[str], gigabytes: float) -> None:
        self.folder, self.gigabytes = Path(folder).absolute(), gigabytes
        self.share = int(gigabytes * 1e9) // FOLDERS
        self.off = False  # writes nothing more
        self.hits = self.misses = 0  # chunks

    def __reduce__(self) -> tuple[type[RangeCache], tuple[Path, float]]:
        return RangeCache, (self.folder, self.gigabytes)

    def read(
        self, shard: str, size: int, start: int, length: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """Bytes [start, start + length) of `shard`, which has `size`; `fetch(start, length)` brings others.

        The name `shard` should differ when its content may.
        """
        first, last = start // CHUNK, -(-(start + length) // CHUNK)
        paths = {i: self._path(shard, size, i) for i in range(first, last)}
        found = {i: piece for i, path in paths.items() if (piece := _load(path)) is not None}
        missing = [i for i in paths if i not in found]
        self.hits, self.misses = self.hits + len(found), self.misses + len(missing)
        for run in _runs(missing):
            base = run.start * CHUNK
            data = memoryview(fetch(base, min(run.stop * CHUNK, size) - base))
            for i in run:
                found[i] = data[(i - run.start) * CHUNK : (i - run.start + 1) * CHUNK]
                self._save(paths[i], found[i])
        found[last - 1] = found[last - 1][: start + length - (last - 1) * CHUNK]
        found[first] = found[first][start - first * CHUNK :]
        return b"".join(found[i] for i in range(first, last))

    def _path(self, shard: str, size: int, chunk: int) -> Path:
        name = hashlib.blake2b(f"{shard} {size} {CHUNK} {chunk}".encode(), digest_size=16).hexdigest()
        return self.folder / f"{int(name[:8], 16) % FOLDERS:02d}" / name

    def _save(self, path: Path, data: memoryview) -> None:
        if self.off:
            return
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            try:
                if not path.parent.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                with open(part, "wb", buffering=0) as file:
                    if file.write(data) != len(data) or file.write(_checksum(data)) != 8:
                        raise OSError("the disk is full")
                os.replace(part, path)
                with open(path.parent / "tally", "ab", buffering=0) as tally:
                    tally.write(b".")
                    due = tally.tell() * CHUNK > self.share // TALLY
                if due:
                    self._sweep(path.parent)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            self.off = True
            log.warning("%s keeps nothing more of what this process reads: %s", self.folder, error)

    def _sweep(self, folder: Path) -> None:
        """Delete what was not used for longest; whoever comes while another process does it goes on."""
        with open(folder / "tally", "ab") as tally:
            try:
                fcntl.flock(tally, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            tally.truncate(0)
            used, files = 0, []
            for entry in os.scandir(folder):
                try:
                    facts = entry.stat()
                    if entry.name.endswith(".part"):
                        if time.time() - facts.st_mtime > STALE:
                            os.unlink(entry.path)
                    elif entry.name != "tally":
                        files.append((facts.st_mtime_ns, facts.st_size, entry.path))
                        used += facts.st_size
                except FileNotFoundError:  # just renamed, or found damaged by a reader
                    continue
            for _, size, path in sorted(files):
                if used <= self.share - self.share // TALLY:
                    break
                Path(path).unlink(missing_ok=True)
                used -= size


def range_cache(folder: str | os.PathLike[str] | None, gigabytes: float) -> RangeCache | None:
    """The cache that a config asks for; raises `InputError` if that makes no sense."""
    if not gigabytes:
        return None
    if folder is None:
        raise InputError(
            "data.cache_gb", f"{gigabytes:g}, but data.cache_dir is not set", "set it to a local disk"
        )
    if gigabytes < SMALLEST:
        raise InputError("data.cache_gb", f"expected 0 or at least {SMALLEST:g}, got {gigabytes:g}")
    return RangeCache(folder, gigabytes)


def _load(path: Path) -> memoryview | None:
    """What a file holds, if it is whole; a damaged one is deleted."""
    try:
        data = memoryview(path.read_bytes())
        if _checksum(data[:-8]) == data[-8:]:
            os.utime(path)  # the order of the sweep, on disks that note no time of access too
            return data[:-8]
        path.unlink(missing_ok=True)
    except OSError:  # not there, or deleted meanwhile, or a bad disk: the shard itself is still there
        pass
    return None


def _checksum(data: memoryview) -> bytes:
    return xxhash.xxh3_64_digest(data)


def _runs(numbers: list[int]) -> Iterator[range]:
    """[1, 2, 3, 7, 8] -> 1..3, 7..8."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield range(numbers[start], numbers[i - 1] + 1)
            start = i
