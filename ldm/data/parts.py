"""What is known of each shard, one file a shard, and how they become one table without all being in memory.

A part is found by its shard's name, size and tag and by what lies beside it, so a scan that was stopped, or
that many machines share, goes on where it was. No pickle: npz with JSON in it.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ldm.data.scan import Part, Problem

Fields = tuple[tuple[str, str], ...]


@lru_cache(maxsize=1024)
def shared(fields: Fields) -> Fields:
    """The same object for equal fields: a set has as many parts as shards."""
    return fields


def mapped(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of an .npy, its pages shared by all processes that map it; no `np.memmap`.

    That class looks after each piece that is taken of it: 70 us for three rows.
    """
    return np.load(path, mmap_mode="r").view(np.ndarray)  # type: ignore[no-any-return]


@dataclass
class Facts:
    """A part without its rows."""

    count: int
    fields: Fields
    digest: str
    damage: Counter[str]
    problems: list[Problem]
    checked: bool
    promised: int | None

    @classmethod
    def of(cls, part: Part) -> Facts:
        fields = shared(
            tuple((name, part.samples.dtype[name].str) for name in part.samples.dtype.names or ())
        )
        rest = (part.digest, part.damage, part.problems, part.checked, part.promised)
        return cls(len(part.samples), fields, *rest)


Piece = tuple[Facts, Path | NDArray[Any]]  # and its rows: where they are stored, or themselves


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def part_path(folder: Path, shard: str, key: str) -> Path:
    """Where the part of a shard lies in a cache."""
    stem = re.sub(r"[^0-9A-Za-z_.-]", "_", Path(shard).stem)[:80]
    return folder / "parts" / f"{stem}-{key}.npz"


def save_part(part: Part, path: Path) -> Facts:
    """Store a part; raises OSError."""
    facts = Facts.of(part)
    text = np.frombuffer(json.dumps(facts.__dict__).encode(), np.uint8)
    replace(path, lambda file: np.savez(file, samples=part.samples, facts=text))
    return facts


def load_facts(path: Path) -> Facts | None:
    """A stored part without its rows; None if there is no good one."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            facts = Facts(**json.loads(file["facts"].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    facts.fields = shared(tuple((name, code) for name, code in facts.fields))
    facts.damage = Counter(facts.damage)
    facts.problems = [Problem(*problem) for problem in facts.problems]
    return facts


def load_rows(path: Path) -> NDArray[Any]:
    with open(path, "rb") as raw, np.load(raw) as file:
        return file["samples"]


def union(parts: Iterable[Facts]) -> Fields:
    """The fields of all parts: keys, places of members, sizes, hashes, scores."""
    fields: dict[str, np.dtype[Any]] = {}
    for part in parts:
        for name, code in part.fields:
            kind = np.dtype(code)
            fields[name] = max(fields.get(name, kind), kind, key=lambda k: k.itemsize)
    places = [name for name in fields if name.endswith(("_offset", "_size", "_check"))]
    scores = [name for name in fields if fields[name] == np.float32]
    rest = [name for name in fields if name not in {"key", *places, *scores}]
    names = [name for name in ("key", *places, *rest, *scores) if name in fields]
    return tuple((name, fields[name].str) for name in names)


def widened(rows: NDArray[Any], fields: Fields) -> NDArray[Any]:
    """Rows with all the fields; NaN where they have no such score, 0 where no such member or hash."""
    wider = np.zeros(len(rows), list(fields))
    for name, code in fields:
        if name in (rows.dtype.names or ()):
            wider[name] = rows[name]
        elif np.dtype(code) == np.float32:
            wider[name] = np.nan
    return wider


def write_table(file: BinaryIO, tables: Iterator[NDArray[Any]], fields: Fields, count: int) -> None:
    """Write an .npy of `count` rows, one part after the other."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(list(fields))), "fortran_order": False}
    np.lib.format.write_array_header_2_0(file, header | {"shape": (count,)})
    for table in tables:
        file.write(table.tobytes())


def rows_of(places: Sequence[Path | NDArray[Any]], fields: Fields) -> Iterator[NDArray[Any]]:
    """Each part's rows, widened, in turn; of a part that is stored, or in memory."""
    for place in places:
        yield widened(load_rows(place) if isinstance(place, Path) else place, fields)
