"""The index as an object, and the files that hold it.

index-HASH.npy is one memory-mapped table that all workers share, index-HASH.npz what there is of each
shard, index-HASH.json the rest. A folder with an index.json stands for the shards of one. No pickle.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import SIZES, Columns
from ldm.data.hashes import HASHES
from ldm.data.parts import mapped, replace
from ldm.data.remote import Stat, public
from ldm.data.scan import Problem
from ldm.data.storage import is_remote, stat
from ldm.errors import InputError

INDEX_VERSION = 3
POINTER = "index.json"
LOOKED_AT = 8  # shards whose size is compared when an index folder is opened


@dataclass
class Index:
    """Rows of all good samples; `index["width"]`, `index["aesthetic"]` are columns."""

    samples: NDArray[Any]  # key, {kind}_offset, _size, _check, SIZES, HASHES, then scores: see scan.Part
    shards: list[str]  # absolute paths and urls
    counts: NDArray[np.int64]  # good samples of each shard
    sizes: NDArray[np.int64]  # bytes of each shard
    tags: NDArray[np.bytes_]  # storage.Stat.tag of each shard
    digest: str  # of names, texts, metadata, image headers and their order; not of where the files lie
    checked: bool = True  # checksums are known
    damage: Counter[str] = field(default_factory=Counter)  # reason -> samples (or shards) left out
    problems: list[Problem] = field(default_factory=list)  # the first few of each shard
    lacking: list[str] = field(default_factory=list)  # shards that were not downloaded to their end
    names: Mapping[str, str | None] = field(default_factory=dict)  # the user's aliases
    path: Path | None = None  # the cached table

    def __post_init__(self) -> None:
        self.cumulative = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def columns(self) -> Columns:
        """Sizes, hashes and scores, by name or alias."""
        hashes = [name for name in HASHES if name in (self.samples.dtype.names or ())]
        names = (*SIZES, *hashes, *self.scores())
        return Columns({name: self.samples[name] for name in names}, self.names)

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
        stems = {shard: Path(public(self.shards[shard])).stem for shard in set(shards)}
        return [
            f"{stems[s]}/{key.decode()}" for s, key in zip(shards, self.samples["key"][rows], strict=True)
        ]

    def scores(self) -> list[str]:
        """Names of the columns that came from the json or a table beside the shard."""
        return [name for name in self.samples.dtype.names or () if self.samples.dtype[name] == np.float32]

    def kinds(self) -> list[str]:
        """Kinds of members that a sample may have: "caption", "json", "image", arrays of a cache."""
        names = self.samples.dtype.names or ()
        return [name.removesuffix("_check") for name in names if self.samples.dtype[name] == np.uint32]

    @property
    def mean_bytes(self) -> float:
        """Bytes of a shard file that a sample takes, headers and all, without reading the table."""
        return float(self.sizes.sum() / max(len(self), 1))

    def known(self, shard: int) -> Stat:
        """What a shard was when it was indexed."""
        return Stat(int(self.sizes[shard]), self.tags[shard].decode())

    def summary(self) -> str:
        """One line for the log."""
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in self.damage.most_common())
        return f"{len(self.shards):,} shards, {int(self.counts.sum()):,} samples" + (
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
            self.samples = mapped(state["path"])


def save_index(index: Index, path: Path) -> None:
    """What belongs to the table at `path`; the JSON last, as it makes the index complete."""
    shards = [s if is_remote(s) else os.path.relpath(s, path.parent) for s in index.shards]
    arrays = {"counts": index.counts, "sizes": index.sizes, "tags": index.tags}
    arrays["shards"] = np.array([os.fsencode(shard) for shard in shards], np.bytes_)
    replace(path.with_suffix(".npz"), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    facts = {"version": INDEX_VERSION, "digest": index.digest, "checked": index.checked}
    facts |= {"damage": index.damage, "problems": index.problems, "lacking": index.lacking}
    facts |= {"root": os.path.abspath(path.parent)}
    replace(path.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode()))


def load_index(path: Path, shards: list[str] | None = None) -> Index | None:
    """The index whose table is at `path`, of `shards` or of those that it names; None if it is not whole."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text())
        samples = mapped(path)
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {name: file[name] for name in ("counts", "sizes", "tags")}
            names = file["shards"] if shards is None else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    root = facts.pop("root")
    if facts.pop("version") != INDEX_VERSION:
        return None
    if names is not None:
        shards = _shard_paths([os.fsdecode(name) for name in names.tolist()], path.parent, root)
    facts["problems"] = [Problem(*problem) for problem in facts["problems"]]
    facts["damage"] = Counter(facts["damage"])
    return Index(samples=samples, shards=shards or [], path=path, **arrays, **facts)


def _shard_paths(names: Sequence[str], folder: Path, root: str) -> list[str]:
    """Absolute paths of shards: beside the index as they were, or else where they were."""
    base = os.path.abspath(folder)
    local = next((name for name in names if not is_remote(name)), None)
    if local is not None and not os.path.exists(os.path.join(base, local)):
        base = root
    folders: dict[str, str] = {}  # hundreds of thousands of shards share few
    paths = []
    for name in names:
        head, _, tail = name.rpartition("/")
        if head not in folders:
            folders[head] = head if is_remote(name) else os.path.normpath(os.path.join(base, head))
        paths.append(f"{folders[head]}/{tail}")
    return paths


def name_index(index: Index, folder: Path) -> None:
    """Let `folder` stand for this index, whose table is in it."""
    assert index.path is not None
    facts = {"version": INDEX_VERSION, "table": index.path.name}
    replace(folder / POINTER, lambda file: file.write(json.dumps(facts).encode()))


def open_index(folder: Path, where: str = "data.shards") -> Index:
    """The index that a folder stands for; raises `InputError` if it is not whole, or older than its shards.

    Only a few shards are looked at: the others are when they are opened.
    """
    try:
        name = str(json.loads((folder / POINTER).read_text())["table"])
        index = load_index(folder / Path(name).name)
    except (OSError, ValueError, KeyError, TypeError):
        index = None
    if index is None:
        raise InputError(where, f"{folder} holds no index of this version", "run ldm data index again")
    for shard in np.unique(np.linspace(0, len(index.shards) - 1, LOOKED_AT).astype(int)).tolist():
        check_size(index, shard, where)
    return index


def check_size(index: Index, shard: int, where: str) -> None:
    """Raise `InputError` if a local shard is not as long as it was when it was indexed."""
    path = index.shards[shard]
    if is_remote(path):
        return
    try:
        size = stat(path).size
    except OSError as error:
        raise InputError(where, f"{path}: {error.strerror}", "restore it, or re-index") from None
    if size != index.sizes[shard]:
        what = f"shard {Path(path).name} is {size:,} bytes, index says {int(index.sizes[shard]):,}"
        raise InputError(where, what, "re-index")
