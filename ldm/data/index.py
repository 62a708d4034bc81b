"""The index of a set of shards: what is there, where, and its metadata; built once, then cached.

One row a good sample, in shard order, then in the order of the file. The cache holds a part for each shard,
found by its name, size and time of change (adding shards reads only those), and the whole as one
memory-mapped table that all workers share. No pickle: npz, npy, JSON.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from ldm.data.columns import SIZES, Columns
from ldm.data.scan import REPORTED, Part, Problem, scan_shard
from ldm.errors import InputError

INDEX_VERSION = 2
FOLDER = ".ldm_index"
PATIENCE = 2.0  # seconds before a progress bar appears
log = logging.getLogger(__name__)


@dataclass
class Index:
    """Rows of all good samples; `index["width"]`, `index["aesthetic"]` are columns."""

    samples: NDArray[Any]  # scan.FIELDS, then the numbers of the json
    shards: list[str]  # absolute paths
    counts: NDArray[np.int64]  # good samples of each shard
    sizes: list[int]  # bytes of each shard
    digest: str  # of names, captions, metadata, image headers and their order; not of where the files lie
    damage: Counter[str] = field(default_factory=Counter)  # reason -> samples (or shards) left out
    problems: list[Problem] = field(default_factory=list)  # the first few of each shard
    names: Mapping[str, str | None] = field(default_factory=dict)  # the user's aliases
    path: Path | None = None  # the cached table

    def __post_init__(self) -> None:
        self.cumulative = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def columns(self) -> Columns:
        """Sizes and scores, by name or alias."""
        return Columns({name: self.samples[name] for name in (*SIZES, *self.scores())}, self.names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.samples)

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which shard holds each row."""
        return np.searchsorted(self.cumulative, rows, side="right") - 1

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """ "shard/key" of each row: keys alone need not be unique."""
        shards = self.shard_of(rows).tolist()
        stems = {shard: Path(self.shards[shard]).stem for shard in set(shards)}
        return [
            f"{stems[s]}/{key.decode()}" for s, key in zip(shards, self.samples["key"][rows], strict=True)
        ]

    def scores(self) -> list[str]:
        """Names of the columns that came from the json."""
        return [name for name in self.samples.dtype.names or () if self.samples.dtype[name] == np.float32]

    def summary(self) -> str:
        """One line for the log."""
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in self.damage.most_common())
        return f"{len(self.shards):,} shards, {len(self):,} samples" + (
            f"; left out: {left_out}" if left_out else ""
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the table if it can be mapped again: a worker then shares it instead of getting a copy."""
        state = dict(self.__dict__)
        if self.path is not None:
            del state["samples"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "samples" not in state:
            self.samples = np.load(state["path"], mmap_mode="r")


def expand(shards: str | Sequence[str], where: str = "data.shards") -> list[str]:
    """Absolute paths of local shards named by paths, globs, braces ({00000..00009}.tar) or folders."""
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    found: list[str] = []
    for i, pattern in enumerate(map(str, patterns)):
        place = where if len(patterns) == 1 else f"{where}[{i}]"
        if pattern.startswith("pipe:"):
            raise InputError(
                place, f"'{pattern}' runs a shell command, which has no byte offsets", "give local tars"
            )
        if "://" in pattern:
            raise InputError(place, f"'{pattern}' is not a local path", "copy or mount the shards")
        try:
            candidates = list(braceexpand(pattern))
        except ValueError:
            raise InputError(place, f"unbalanced braces in '{pattern}'", "write {00000..00009}.tar") from None
        paths = [path for candidate in candidates for path in _existing(candidate)]
        if not paths:
            raise InputError(place, f"no shard matches '{pattern}' (checked {len(candidates):,} paths)")
        if len(candidates) > len(paths):
            log.warning(
                "%s: %d of %d paths do not exist", place, len(candidates) - len(paths), len(candidates)
            )
        found += paths
    found = [os.path.abspath(path) for path in found]
    twice = next((path for path, count in Counter(found).items() if count > 1), None)
    if twice:
        raise InputError(where, f"{twice} is given twice", "name each shard once")
    if not found:
        raise InputError(
            where, "no shards given", f"set {where}=FOLDER or a glob, a brace list, a list of tars"
        )
    return found


def _existing(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def build_index(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    names: Mapping[str, str | None] | None = None,
    where: str = "data.shards",
) -> Index:
    """The index of `shards` (see `expand`), from the cache where it can be.

    The cache is `cache_dir`, or .ldm_index beside the first shard, or one in the user's cache folder if that
    cannot be written. Damaged samples are left out, counted by reason and the first ten named in the log.
    Raises `InputError` if no good sample is left.
    """
    paths = expand(shards, where)
    stats = [os.stat(path) for path in paths]
    folders = _folders(paths, cache_dir)
    keys = {folder: _keys(folder, paths, stats) for folder in folders}
    index = next((found for folder in folders if (found := _load(folder, keys[folder], paths))), None)
    if index is None:
        index = _build(paths, [s.st_size for s in stats], keys, progress)
        log.info("indexed %s", index.summary())
        for problem in index.problems[:REPORTED]:
            log.warning("left out %s/%s: %s at byte %d", *problem)
        if not len(index):
            raise InputError(
                where, f"no good sample in {index.summary()}", "see the log for the first of them"
            )
        index = _save(index, keys) or index
    index.names = dict(names or {})
    return index


def cached_index(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> Index | None:
    """What `build_index` would find in a cache; None if it would read shards."""
    paths = expand(shards)
    stats = [os.stat(path) for path in paths]
    caches = ((folder, _keys(folder, paths, stats)) for folder in _folders(paths, cache_dir))
    index = next((found for cache in caches if (found := _load(*cache, paths))), None)
    if index is not None:
        index.names = dict(names or {})
    return index


def _folders(paths: Sequence[str], cache_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Where the cache may be, best first."""
    if cache_dir is not None:
        return [Path(cache_dir).absolute()]
    parent = Path(paths[0]).parent
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [parent / FOLDER, home / "ldm" / "index" / hashlib.sha256(str(parent).encode()).hexdigest()[:16]]


def _keys(folder: Path, paths: Sequence[str], stats: Sequence[os.stat_result]) -> list[str]:
    """What each shard is called in a cache: relative to it, so that both can be moved together."""
    keys = []
    for path, stat in zip(paths, stats, strict=True):
        facts = f"{INDEX_VERSION} {os.path.relpath(path, folder)} {stat.st_size} {stat.st_mtime_ns}"
        keys.append(hashlib.sha256(facts.encode()).hexdigest()[:32])
    return keys


def _whole(folder: Path, keys: Sequence[str]) -> Path:
    return folder / f"index-{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}.npy"


def _load(folder: Path, keys: Sequence[str], paths: list[str]) -> Index | None:
    path = _whole(folder, keys)
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        samples = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    facts["counts"] = np.array(facts["counts"], np.int64)
    facts["problems"] = [Problem(*problem) for problem in facts["problems"]]
    facts["damage"] = Counter(facts["damage"])
    return Index(samples=samples, shards=paths, path=path, **facts)


def _save(index: Index, keys: Mapping[Path, Sequence[str]]) -> Index | None:
    facts = {"counts": index.counts.tolist(), "sizes": index.sizes, "digest": index.digest}
    facts |= {"damage": index.damage, "problems": index.problems}
    for folder in keys:
        path = _whole(folder, keys[folder])
        try:
            _replace(path, lambda file: np.save(file, index.samples))
            _replace(path.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode()))
        except OSError as error:
            log.warning("index not cached in %s: %s", folder, error.strerror)
            continue
        return _load(folder, keys[folder], index.shards)
    return None


def _replace(path: Path, write: Any) -> None:
    """Write a file so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _build(
    paths: Sequence[str], sizes: list[int], keys: Mapping[Path, Sequence[str]], progress: bool
) -> Index:
    parts = []
    for i, path in _shown(list(enumerate(paths)), progress):
        places = [folder / "parts" / f"{Path(path).stem}-{keys[folder][i]}.npz" for folder in keys]
        part = next((found for place in places if (found := _load_part(place))), None)
        if part is None:
            try:
                part = scan_shard(path)
            except OSError as error:
                raise InputError("data.shards", f"{path}: {error.strerror}") from None
            _save_part(part, places)
        parts.append(part)
    digest = hashlib.sha256(f"{INDEX_VERSION} {' '.join(part.digest for part in parts)}".encode()).hexdigest()
    counts = np.array([len(part.samples) for part in parts], np.int64)
    damage = sum((part.damage for part in parts), Counter())
    problems = [problem for part in parts for problem in part.problems]
    return Index(
        _join([part.samples for part in parts]), list(paths), counts, sizes, digest, damage, problems
    )


def _load_part(path: Path) -> Part | None:
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            facts = json.loads(file["facts"].tobytes())
            problems = [Problem(*problem) for problem in facts["problems"]]
            return Part(file["samples"], facts["digest"], Counter(facts["damage"]), problems)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _save_part(part: Part, places: Sequence[Path]) -> None:
    facts = {"digest": part.digest, "damage": part.damage, "problems": part.problems}
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    for place in places:
        try:
            return _replace(place, lambda file: np.savez(file, samples=part.samples, facts=text))
        except OSError:
            continue


def _join(tables: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One table with the columns of all; NaN where a shard has no such number."""
    fields: dict[str, np.dtype[Any]] = {}
    for table in tables:
        for name in table.dtype.names or ():
            kind = table.dtype[name]
            fields[name] = max(fields.get(name, kind), kind, key=lambda k: k.itemsize)
    joined = np.empty(sum(map(len, tables)), list(fields.items()))
    start = 0
    for table in tables:
        rows = joined[start : start + len(table)]
        for name in fields:
            rows[name] = table[name] if name in (table.dtype.names or ()) else np.nan
        start += len(table)
    return joined


def _shown(items: Sequence[Any], progress: bool) -> Iterator[Any]:
    """The items, under a progress bar from the moment that it takes long."""
    if not progress:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console, begun = Console(stderr=True), time.monotonic()
    columns = ("indexing shards", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=len(items))
    try:
        for i, item in enumerate(items):
            if time.monotonic() - begun > PATIENCE and not bar.live.is_started:
                bar.start()
            bar.update(task, completed=i)
            yield item
    finally:
        bar.stop()
