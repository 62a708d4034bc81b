"""Where shards lie, local or behind a url: names, globs, braces, folders; sizes; ranges of bytes.

What is remote goes through `remote`. Reads are not tried again: that is the reader's policy.
"""

from __future__ import annotations

import errno
import glob
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, Protocol

from braceexpand import braceexpand

from ldm.data import remote
from ldm.data.remote import ChangedError as ChangedError
from ldm.data.remote import Stat as Stat
from ldm.data.remote import public as public
from ldm.errors import InputError

__all__ = [
    "ChangedError",
    "ReadAhead",
    "Shard",
    "Stat",
    "expand",
    "is_remote",
    "open_shard",
    "public",
    "stat",
    "stats",
    "write",
]
TIMEOUT = 60.0  # seconds for a question about one file
CHUNK = 8 << 20  # bytes of a read when a shard is read from end to end
log = logging.getLogger(__name__)
_known: dict[str, Stat] = {}  # of urls, as they were when `expand` or `stat` last asked


class Shard(Protocol):
    """An open shard; `read` may be called from several threads at a time."""

    size: int

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), all of them.

        Raises OSError: FileNotFoundError, PermissionError, TimeoutError, `ChangedError`, or OSError itself.
        """

    def close(self) -> None: ...


def is_remote(path: str) -> bool:
    """Whether it is a url, and not of a local file."""
    return "://" in path and not path.startswith(("file://", "pipe:"))


def expand(shards: str | Sequence[str], where: str = "data.shards", allow_pipe: bool = False) -> list[str]:
    """Absolute paths and urls of shards named by paths, globs, braces ({00000..00009}.tar) or folders.

    Names in braces that do not exist are left out with a warning, as sets have gaps. Web servers cannot list:
    http takes braces only. With `allow_pipe`, "pipe:COMMAND" is passed on as it is.
    """
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    found: list[str] = []
    for i, pattern in enumerate(map(str, patterns)):
        place = where if len(patterns) == 1 else f"{where}[{i}]"
        if pattern.startswith("pipe:") and not allow_pipe:
            fix = "set data.allow_pipe=true only for URLs you wrote"
            raise InputError(place, "pipe: URLs run a shell", fix)
        try:
            candidates = list(braceexpand(pattern))
        except ValueError:
            what = f"unbalanced braces in '{public(pattern)}'"
            raise InputError(place, what, "write {00000..00009}.tar") from None
        paths = _found(candidates, place)
        if not paths:
            what = f"no shard matches '{public(pattern)}' (checked {len(candidates):,} paths)"
            raise InputError(place, what)
        if len(candidates) > len(paths):
            log.warning(
                "%s: %d of %d paths do not exist", place, len(candidates) - len(paths), len(candidates)
            )
        found += paths
    twice = next((path for path, count in Counter(found).items() if count > 1), None)
    if twice:
        raise InputError(where, f"{public(twice)} is given twice", "name each shard once")
    if not found:
        raise InputError(
            where, "no shards given", f"set {where}=FOLDER or a glob, a brace list, a list of tars"
        )
    return found


def _found(candidates: Sequence[str], place: str) -> list[str]:
    """What there is of the names that one pattern stands for."""
    first = candidates[0]
    try:
        if first.startswith("pipe:"):
            return list(candidates)
        if not is_remote(first):
            return [path for candidate in candidates for path in _local(candidate.removeprefix("file://"))]
        if remote.is_web(first) and (set("*[") & set(first) or first.endswith("/")):
            what = f"'{public(first)}' names many files, but a web server lists none"
            raise InputError(place, what, "name the shards: {00000..00009}.tar")
        facts = remote.find(candidates, TIMEOUT)
    except OSError as error:
        what = f"{error.filename or first}: {error.strerror or error}"
        fix = "check that you may read it" if isinstance(error, PermissionError) else ""
        raise InputError(place, what, fix) from None
    _known.update(facts)
    return [url for url, _ in facts]


def _local(path: str) -> list[str]:
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        return sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".tar"))
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def stat(path: str, timeout: float = TIMEOUT) -> Stat:
    """Size and tag; of a url that `expand` found, what it was then. Raises OSError."""
    if not is_remote(path):
        facts = os.stat(path)
        return Stat(facts.st_size, str(facts.st_mtime_ns))
    if path not in _known:
        _known[path] = remote.look(path, timeout)
    return _known[path]


def stats(paths: Sequence[str], where: str = "data.shards") -> list[Stat]:
    """`stat` of many, several at a time; raises `InputError` for the first that cannot be had."""
    try:
        with ThreadPoolExecutor(remote.THREADS) as pool:
            return list(pool.map(stat, paths))
    except OSError as error:
        raise InputError(where, f"{error.filename}: {error.strerror}") from None


def existing(paths: Sequence[str], where: str = "data.shards") -> dict[str, Stat]:
    """Those of the files that there are; raises `InputError` if that cannot be told."""
    found = {path: stat(path) for path in paths if not is_remote(path) and os.path.exists(path)}
    protocols: dict[str, list[str]] = {}
    for path in filter(is_remote, paths):
        protocols.setdefault(path.partition("://")[0], []).append(path)
    try:
        for urls in protocols.values():
            found |= remote.find(urls, TIMEOUT)
    except OSError as error:
        raise InputError(where, f"{error.filename}: {error.strerror}") from None
    _known.update({path: facts for path, facts in found.items() if is_remote(path)})
    return found


def open_shard(path: str, timeout: float = 120.0, known: Stat | None = None) -> Shard:
    """A local file or url to read ranges of, each in at most `timeout` seconds (a local file: no limit).

    `known` saves the question for a url's size; reads then raise `ChangedError` if it is another file.
    """
    if is_remote(path):
        return _RemoteShard(path, known or stat(path, timeout), timeout)
    return _LocalShard(path)


def write(path: str, data: bytes) -> None:
    """Put a small file there, whole or not at all; raises OSError."""
    if is_remote(path):
        _known.pop(path, None)
        return remote.put(path, data, 10 * TIMEOUT)
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


class _LocalShard:
    def __init__(self, path: str) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self.file).st_size

    def read(self, start: int, size: int) -> bytes:
        pieces, got = [], 0
        while got < size:
            piece = os.pread(self.file, size - got, start + got)
            if not piece:
                what = f"got {got:,} of {size:,} bytes at {start:,}"
                raise OSError(errno.EIO, what, self.path)
            pieces.append(piece)
            got += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
        self.file = -1

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.close()


class _RemoteShard:
    def __init__(self, url: str, known: Stat, timeout: float) -> None:
        self.url, self.known, self.timeout = url, known, timeout
        self.size = known.size

    def read(self, start: int, size: int) -> bytes:
        if size == 0:
            return b""
        return remote.fetch(self.url, start, size, self.timeout, self.known)

    def close(self) -> None:
        """Nothing is held: connections belong to the process."""


class ReadAhead(io.RawIOBase, BinaryIO):  # type: ignore[misc]  # as the standard library's own files
    """A shard as a file that is read from end to end: big reads, the next ones under way meanwhile."""

    def __init__(self, shard: Shard, chunk: int = CHUNK, ahead: int = 2) -> None:
        self.shard, self.chunk, self.ahead = shard, chunk, ahead
        self.at = 0
        self.chunks: dict[int, Future[bytes]] = {}
        self.pool = ThreadPoolExecutor(max(1, ahead))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.shard.size)[whence])
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.shard.size - self.at)
        size = left if size is None or size < 0 else min(size, left)
        pieces = []
        while size > 0:
            number, start = divmod(self.at, self.chunk)
            piece = self._piece(number)[start : start + size]
            pieces.append(piece)
            size, self.at = size - len(piece), self.at + len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _piece(self, number: int) -> bytes:
        """A chunk, with those after it asked for and those elsewhere forgotten."""
        last = (self.shard.size - 1) // self.chunk
        wanted = range(number, min(number + self.ahead, last) + 1)
        self.chunks = {n: future for n, future in self.chunks.items() if n in wanted}
        for n in wanted:
            if n not in self.chunks:
                size = min(self.chunk, self.shard.size - n * self.chunk)
                self.chunks[n] = self.pool.submit(self.shard.read, n * self.chunk, size)
        return self.chunks[number].result()

    def close(self) -> None:
        """Ends the reading ahead; the shard stays open."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.chunks = {}
        super().close()
