"""The index of a set of shards: what is there, where, and its metadata; built once, then cached.

One row a good sample, in shard order, then in the order of the file. A cache folder holds a part for each
shard (adding shards reads only those), and the whole: see `table`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldm.data.parts import Piece, part_path, replace, rows_of, union, write_table
from ldm.data.remote import public
from ldm.data.scan import REPORTED
from ldm.data.scanning import Job, scan_all, stored
from ldm.data.sidecars import STATS, TABLES, beside, refuse, stem_of, unfinished
from ldm.data.storage import expand, is_remote, stats
from ldm.data.table import INDEX_VERSION, POINTER, Index, load_index, open_index, save_index
from ldm.errors import InputError

__all__ = ["Index", "Survey", "build_index", "cached_index", "index_folder"]
FOLDER = ".ldm_index"
LISTED = 1000  # problems that the whole index names
log = logging.getLogger(__name__)


def build_index(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    names: Mapping[str, str | None] | None = None,
    where: str = "data.shards",
    checksums: bool = True,
    allow_incomplete: bool = False,
    processes: int = 1,
) -> Index:
    """The index of `shards` (see `expand`, or an index folder), from the cache where it can be.

    The cache is `cache_dir`, or .ldm_index beside the first shard, or one in the user's cache folder if that
    cannot be written. Damaged samples are left out, counted by reason and the first ten named in the log.
    Raises `InputError` if no good sample is left, or a shard was not downloaded to its end.
    """
    folder = index_folder(shards)
    if folder is not None:
        index = open_index(folder, where)
    else:
        survey = Survey(shards, cache_dir, where)
        if not allow_incomplete:
            refuse(survey.lacking(), where)
        index = survey.load(checksums) or survey.build(checksums, progress, processes)
    if not allow_incomplete:
        refuse(index.lacking, where)
    index.names = dict(names or {})
    return index


def cached_index(
    shards: str | Sequence[str],
    cache_dir: str | os.PathLike[str] | None = None,
    names: Mapping[str, str | None] | None = None,
) -> Index | None:
    """What `build_index` would find in a cache; None if it would read shards."""
    folder = index_folder(shards)
    index = open_index(folder) if folder is not None else Survey(shards, cache_dir).load(checksums=False)
    if index is not None:
        index.names = dict(names or {})
    return index


def index_folder(shards: str | Sequence[str]) -> Path | None:
    """The index folder that `shards` is, if it is one."""
    names = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if len(names) != 1 or is_remote(str(names[0])):
        return None
    folder = Path(names[0]).expanduser()
    return folder if (folder / POINTER).is_file() else None


class Survey:
    """The shards as they are now, and what caches know of them."""

    def __init__(
        self,
        shards: str | Sequence[str],
        cache_dir: str | os.PathLike[str] | None = None,
        where: str = "data.shards",
    ) -> None:
        self.where, self.paths = where, expand(shards, where)
        self.stats = stats(self.paths, where)
        self.beside = beside(self.paths)
        self.folders = _folders(self.paths, cache_dir)
        self._jobs: dict[Path, list[Job]] = {}

    def lacking(self) -> list[str]:
        """Local shards without a _stats.json where others have one."""
        finished = [f"{stem_of(path)}{STATS}" in self.beside for path in self.paths]
        return [path for path in unfinished(self.paths, finished) if not is_remote(path)]

    def jobs(self, folder: Path) -> list[Job]:
        """The shards by the keys they have in a cache: relative to it, so that both can be moved together."""
        if folder not in self._jobs:
            jobs = self._jobs[folder] = []
            for i, (path, known) in enumerate(zip(self.paths, self.stats, strict=True)):
                name = path if is_remote(path) else os.path.relpath(path, folder)
                near = [self.beside.get(f"{stem_of(path)}{suffix}", "") for suffix in (STATS, *TABLES)]
                facts = " ".join([str(INDEX_VERSION), name, str(known.size), known.tag, *near])
                jobs.append(Job(i, path, known.size, hashlib.sha256(facts.encode()).hexdigest()[:32]))
        return self._jobs[folder]

    def whole(self, folder: Path) -> Path:
        """The table of all these shards in a cache."""
        keys = " ".join(job.key for job in self.jobs(folder))
        return folder / f"index-{hashlib.sha256(keys.encode()).hexdigest()[:32]}.npy"

    def load(self, checksums: bool) -> Index | None:
        """The whole index from a cache, if it is there."""
        found = (load_index(self.whole(folder), self.paths) for folder in self.folders)
        return next((index for index in found if index and (index.checked or not checksums)), None)

    def cache(self) -> Path | None:
        """The first cache folder that can be written."""
        for folder in self.folders:
            try:
                (folder / "parts").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                log.warning("index not cached in %s: %s", folder, error.strerror)
                continue
            if os.access(folder / "parts", os.W_OK):
                return folder
        return None

    def known(self, number: int, checksums: bool) -> Piece | None:
        """The part of one shard, from any cache."""
        found = (stored(folder, self.jobs(folder)[number], checksums) for folder in self.folders)
        return next((part for part in found if part), None)

    def scan(self, numbers: Sequence[int], checksums: bool, progress: bool, processes: int) -> bool:
        """Store the parts of some shards that no cache knows; whether the cache then has those of all."""
        folder = self.cache()
        if folder is None:
            what = f"none of {', '.join(map(str, self.folders))} can be written"
            raise InputError(self.where, what, "give another folder with --out")
        jobs = self.jobs(folder)
        todo = [jobs[number] for number in numbers if self.known(number, checksums) is None]
        for _ in scan_all(todo, folder, checksums, processes, progress):
            pass
        there = {entry.name for entry in os.scandir(folder / "parts")}
        return all(part_path(folder, job.path, job.key).name in there for job in jobs)

    def build(self, checksums: bool, progress: bool, processes: int) -> Index:
        """Index what no cache knows, and join all parts."""
        folder = self.cache()
        pieces = [self.known(number, checksums) for number in range(len(self.paths))]
        jobs = self.jobs(folder or self.folders[0])
        todo = [job for job, piece in zip(jobs, pieces, strict=True) if piece is None]
        for job, piece in scan_all(todo, folder, checksums, processes, progress):
            pieces[job.number] = piece
        return self._join([piece for piece in pieces if piece is not None], folder)

    def _join(self, pieces: Sequence[Piece], folder: Path | None) -> Index:
        every = [facts for facts, _ in pieces]
        fields, places = union(every), [place for _, place in pieces]
        counts = np.array([facts.count for facts in every], np.int64)
        text = f"{INDEX_VERSION} {' '.join(facts.digest for facts in every)}"
        index = Index(
            samples=np.empty(0, list(fields)),
            shards=self.paths,
            counts=counts,
            sizes=np.array([known.size for known in self.stats], np.int64),
            tags=np.array([known.tag.encode() for known in self.stats], np.bytes_),
            digest=hashlib.sha256(text.encode()).hexdigest(),
            checked=all(facts.checked for facts in every),
            damage=sum((facts.damage for facts in every if facts.damage), Counter()),
            problems=[problem for facts in every for problem in facts.problems][:LISTED],
            lacking=unfinished(self.paths, [facts.promised is not None for facts in every])[:LISTED],
        )
        log.info("indexed %s", index.summary())
        for problem in index.problems[:REPORTED]:
            log.warning("left out %s/%s: %s at byte %d", *problem)
        if not counts.any():
            fix = "unpack them with gunzip" if set(index.damage) == {"gzip"} else "see the log for the first"
            raise InputError(self.where, f"no good sample in {index.summary()}", fix)
        if folder is None:
            index.samples = np.concatenate(list(rows_of(places, fields)))
            return index
        path = self.whole(folder)
        replace(path, lambda file: write_table(file, rows_of(places, fields), fields, int(counts.sum())))
        save_index(index, path)
        return load_index(path, self.paths) or index


def _folders(paths: Sequence[str], cache_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Where the cache may be, best first."""
    if cache_dir is not None:
        return [Path(cache_dir).absolute()]
    parent = os.path.dirname(paths[0])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = home / "ldm" / "index" / hashlib.sha256(public(parent).encode()).hexdigest()[:16]
    return [own] if is_remote(parent) else [Path(parent) / FOLDER, own]
