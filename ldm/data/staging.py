"""Copies of shards on the node's own disk, made before training: all of a set, or what a command writes.

A copy appears under its name only when it is whole (.part, fsync, rename); a small file beside it says of
what it is the copy, so that a second start copies only what is missing or has changed. One process of a node
copies, the others wait at a lock. Where the shards' folder has a SHA256SUMS (`sha256sum *.tar`), copies are
checked against it. The folder is never emptied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.sidecars import STATS, TABLES
from ldm.data.storage import CHUNK, ChangedError, Stat, existing, expand, is_remote, open_shard, public, stats
from ldm.errors import InputError

THREADS = 4  # shards copied at a time
TRIES = 5
BACKOFF = 1.0  # seconds before the second try, then twice as many each time
END = 1024  # zero bytes, how a tar ends
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copy:
    """A file, where its copy belongs, and what is known of it (a command's output: nothing)."""

    source: str
    target: Path
    facts: Stat | None

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".source")

    def done(self) -> bool:
        """Whether the copy is there, whole, and of what the source is now."""
        try:
            said = json.loads(self.note.read_text())
            size = self.target.stat().st_size
        except (OSError, ValueError):
            return False
        return size == said["size"] and (self.facts is None or [*self.facts] == [said["size"], said["tag"]])


def staged(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None,
    where: str = "data.shards",
    stage: bool = False,
    allow_pipe: bool = False,
) -> str | Sequence[str]:
    """What to read in place of `shards`: with `stage` copies of all, else copies of the output of pipe: only.

    Tables beside the shards are copied with them. Without either option, `shards` as they are. Raises
    `InputError` for what cannot be copied, or for want of space.
    """
    planned = _planned(shards, cache_dir, where, stage, allow_pipe)
    if planned is None:
        return shards
    paths, copies = planned
    folder = Path(cache_dir or "")
    with _alone(folder):
        missing = [copy for copy in copies if not copy.done()]
        _ask_for_space(folder, missing)
        if missing:
            log.info("copying %d of %d files to %s", len(missing), len(copies), folder)
            _copy_all(missing, where)
    return paths


def staged_already(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None,
    stage: bool = False,
    allow_pipe: bool = False,
) -> str | Sequence[str] | None:
    """What `staged` returns, if it would copy nothing; else None."""
    planned = _planned(shards, cache_dir, "data.shards", stage, allow_pipe)
    if planned is None:
        return shards
    paths, copies = planned
    return paths if all(copy.done() for copy in copies) else None


def _planned(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None,
    where: str,
    stage: bool,
    allow_pipe: bool,
) -> tuple[list[str], list[Copy]] | None:
    """What will be read, and the copies to make for that; None: nothing is to be copied."""
    given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if not stage and not any(str(item).startswith("pipe:") for item in given):
        return None
    paths = expand(shards, where, allow_pipe)
    if cache_dir is None:
        asked = "data.stage=true" if stage else "data.allow_pipe=true"
        what = f"{asked} copies shards, but there is no folder for them"
        raise InputError("data.cache_dir", what, "set data.cache_dir=FOLDER")
    folder = Path(cache_dir).absolute() / "staged"
    copies = {path: Copy(path, _target(folder, path), None) for path in paths if path.startswith("pipe:")}
    if stage:
        named = [path for path in paths if path not in copies]
        beside = [path.removesuffix(".tar") + suffix for path in named for suffix in (STATS, *TABLES)]
        facts = dict(zip(named, stats(named, where), strict=True)) | existing(beside, where)
        copies |= {path: Copy(path, _target(folder, path), known) for path, known in facts.items()}
    return [str(copies[path].target) if path in copies else path for path in paths], list(copies.values())


def _target(folder: Path, source: str) -> Path:
    """The name stays (keys of samples begin with it), below a folder for where it came from."""
    if source.startswith("pipe:"):
        return folder / "pipe" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.tar"
    parent, _, name = _plain(source).rpartition("/")
    return folder / hashlib.sha256(parent.encode()).hexdigest()[:8] / name


def _plain(source: str) -> str:
    """A url without its query."""
    return source.partition("?")[0] if is_remote(source) else source


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".staging.lock", "w")  # noqa: SIM115  # closed below
    except OSError as error:
        raise InputError(
            "data.cache_dir", f"{folder}: {error.strerror}", "name a folder to write to"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process copies shards to %s: waiting for it", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ask_for_space(folder: Path, copies: Sequence[Copy]) -> None:
    needed, free = sum(copy.facts.size for copy in copies if copy.facts), shutil.disk_usage(folder).free
    if needed > free:
        what = f"the shards need {needed / 1e9:,.1f} GB more, {free / 1e9:,.1f} GB are free in {folder}"
        raise InputError("data.cache_dir", what, "name a bigger disk, fewer shards, or set data.stage=false")


def _copy_all(copies: Sequence[Copy], where: str) -> None:
    sums = {parent: _sums(parent) for parent in {_parent(copy) for copy in copies if copy.facts}}
    total = sum(copy.facts.size for copy in copies if copy.facts)
    with _progress(total) as advance, ThreadPoolExecutor(THREADS) as pool:
        jobs = []
        for copy in copies:
            name = copy.target.name
            known = sums[_parent(copy)].get(name) if copy.facts else None
            jobs.append(pool.submit(_tried, copy, known, advance))
        try:
            for copy, job in zip(copies, jobs, strict=True):
                _reported(copy, job.result, where)
        finally:
            pool.shutdown(cancel_futures=True)


def _reported(copy: Copy, result: Callable[[], None], where: str) -> None:
    try:
        result()
    except OSError as error:
        what = f"{public(copy.source)}: {error.strerror or error}"
        fix = (
            "make space in data.cache_dir"
            if error.errno == errno.ENOSPC
            else "run it again to go on with the rest"
        )
        raise InputError(where, what, fix) from None


def _tried(copy: Copy, known: str | None, advance: Callable[[int], None]) -> None:
    """One copy, with patience for a network."""
    for attempt in range(TRIES):
        try:
            return _copy(copy, known, advance)
        except OSError as error:
            final = isinstance(error, (FileNotFoundError, PermissionError, ChangedError))
            if final or error.errno == errno.ENOSPC or copy.facts is None or attempt == TRIES - 1:
                raise
            log.warning("%s: %s; trying again", public(copy.source), error.strerror or error)
            time.sleep(BACKOFF * 2**attempt)


def _copy(copy: Copy, known: str | None, advance: Callable[[int], None]) -> None:
    part = copy.target.with_name(copy.target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        digest = _fetch(copy, file, advance) if copy.facts else _run(copy.source, file)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if known is not None and known != digest:
        raise OSError(errno.EIO, "the copy's sha256 is not that of SHA256SUMS")
    copy.note.unlink(missing_ok=True)  # from here to the end there is no copy
    os.replace(part, copy.target)
    said = {"source": public(copy.source), "size": size, "tag": copy.facts.tag if copy.facts else ""}
    part.write_text(json.dumps(said | {"sha256": digest}))
    os.replace(part, copy.note)


def _fetch(copy: Copy, file: Any, advance: Callable[[int], None]) -> str:
    """sha256 of all bytes of the source, written to the file."""
    digest, begun = hashlib.sha256(), 0
    shard = open_shard(copy.source, known=copy.facts)
    try:
        assert copy.facts is not None
        if shard.size != copy.facts.size:
            raise ChangedError(errno.ESTALE, "its size changed meanwhile")
        for start in range(0, shard.size, CHUNK):
            data = shard.read(start, min(CHUNK, shard.size - start))
            digest.update(data)
            file.write(data)
            advance(len(data))
            begun += len(data)
    except OSError:
        advance(-begun)
        raise
    finally:
        shard.close()
    return digest.hexdigest()


def _run(source: str, file: Any) -> str:
    """sha256 of what the command wrote to the file, if that is all of a tar."""
    command = source.removeprefix("pipe:")
    shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
    done = subprocess.run([*shell, command], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise OSError(
            errno.EIO, f"the command ended with exit code {done.returncode} ({last or 'no message'})"
        )
    digest, tail = hashlib.sha256(), b""
    file.seek(0, os.SEEK_END)
    with open(file.name, "rb") as written:
        while data := written.read(CHUNK):
            digest.update(data)
            tail = (tail + data)[-END:]
    if tail != bytes(END) or file.tell() % 512:
        raise OSError(errno.EIO, f"the command wrote {file.tell():,} bytes that are not a whole plain tar")
    return digest.hexdigest()


def _parent(copy: Copy) -> str:
    return _plain(copy.source).rpartition("/")[0]


def _sums(parent: str) -> dict[str, str]:
    """Name -> sha256 as the folder's SHA256SUMS says; empty if there is none."""
    path = f"{parent}/SHA256SUMS"
    try:
        with closing(open_shard(path)) as file:
            lines = file.read(0, file.size).decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, PermissionError):
        return {}
    except OSError as error:
        fix = "run it again, or remove the file"
        raise InputError(public(path), f"cannot be read: {error.strerror or error}", fix) from None
    return {name.lstrip(" *"): digest.lower() for digest, _, name in (line.partition(" ") for line in lines)}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes with rate and time left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = ("copying shards", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)
