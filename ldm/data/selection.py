"""Which rows of an index a run uses: what filters keep, one side of a split, the first so many.

Judged a piece of the table at a time and stored beside the index, so that neither the first start nor a later
one holds a big set's rows in memory; without a condition there is no list of rows at all.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import SIZES, Columns
from ldm.data.filters import Filter
from ldm.data.index import Index
from ldm.data.parts import mapped, replace
from ldm.data.plan import mix
from ldm.data.remote import public
from ldm.errors import InputError

SELECTION_VERSION = 1  # raise it when a filter of ours judges otherwise than before
PIECE = 1 << 20  # rows judged at a time
Split = tuple[float, Literal["train", "validation"]]
Ints = NDArray[np.int64]
log = logging.getLogger(__name__)


class First:
    """Rows 0, 1, ..., size - 1 as an array, which is not made."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return np.arange(*at.indices(self.size), dtype=np.int64)
        at = np.asarray(at, np.int64)
        if ((at < -self.size) | (at >= self.size)).any():
            raise IndexError(f"a row beyond {self.size:,}")
        return np.where(at < 0, at + self.size, at)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.arange(self.size, dtype=dtype or np.int64)

    def tolist(self) -> list[int]:
        return list(range(self.size))


class Stored:
    """Rows in an .npy as an array; to another process it travels as a path."""

    def __init__(self, path: Path) -> None:
        self.path, self.array = path, mapped(path)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: Any) -> Any:
        return np.asarray(self.array[at])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.array, dtype)

    def tolist(self) -> list[int]:
        return self.array.tolist()

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.path,)


@dataclass
class Selection:
    """The samples of an index that the filters keep, in index order."""

    rows: Any  # of the index, ascending: int64 [n], or as good as that (`First`, `Stored`)
    counts: Ints  # kept samples of each shard: what the plan deals
    digest: str  # of the index's content and of what was kept
    dropped: dict[str, int]  # filter -> samples that it was the first to reject
    missing: dict[str, int]  # filter -> those of them that it rejected for a missing value
    path: Path | None = None  # the stored rows

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> list[str]:
        """Lines for the log: what each filter dropped."""
        total = len(self) + sum(self.dropped.values())
        lines = [f"{len(self):>14,}  kept of {total:,} samples"]
        for name, count in self.dropped.items():
            missing = f", {self.missing[name]:,} of them without a value" if self.missing[name] else ""
            lines.append(f"{count:>14,}  dropped by {name}{missing}")
        return lines


class NothingKept(InputError):
    """No sample passes the filters."""


def select(
    index: Index,
    filters: Sequence[Filter] = (),
    where: str = "data.filters",
    limit: int | None = None,
    split: Split | None = None,
) -> Selection:
    """Take one side of a split, apply filters in order, then keep the first `limit`.

    `split=(0.01, "validation")` is about a hundredth of the samples, `(0.01, "train")` all others; a sample's
    side depends on its key alone, not on a seed or on what other samples there are.
    Raises `InputError` if a filter names an unknown column, or nothing is kept.
    """
    for i, condition in enumerate(filters):
        unknown = [name for name in condition.needs if name not in index.columns]
        if unknown:
            raise _unknown(index, unknown[0], f"{where}[{i}]")
    if not filters and split is None:
        rows = First(len(index))
        return _limited(index, Selection(rows, index.counts, _digest(index, rows), {}, {}), limit)
    path = _path(index, filters, split)
    selection = path and _load(index, path)
    if not selection:
        selection = _judge(index, filters, where, split, path)
    return _limited(index, selection, limit)


def _judge(
    index: Index, filters: Sequence[Filter], where: str, split: Split | None, path: Path | None
) -> Selection:
    names = _names(filters, split)
    dropped, missing = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    columns = list(index.columns)
    conditions: list[Any] = [split, *filters] if split else list(filters)

    def kept() -> Iterator[Ints]:
        for start in range(0, len(index), PIECE):
            piece = index.samples[start : start + PIECE]
            table = Columns({name: piece[name] for name in columns}, index.names)
            keep = np.ones(len(piece), bool)
            for name, condition in zip(names, conditions, strict=True):
                if isinstance(condition, Filter):
                    rejected = keep & ~condition.mask(table)
                    missing[name] += int((rejected & condition.absent(table)).sum())
                else:
                    rejected = keep & ~on_side(piece["key"], condition)
                dropped[name] += int(rejected.sum())
                keep &= ~rejected
            yield np.flatnonzero(keep) + start

    rows: Any = _written(path, kept) if path else None
    if rows is None:
        path, rows = None, np.concatenate([np.empty(0, np.int64), *kept()])
    if not len(rows):
        if path is not None:
            path.unlink(missing_ok=True)
        most = max(dropped, key=lambda name: dropped[name])
        what = f"filter keeps 0 of {len(index):,} samples"
        raise NothingKept(where, what, f"{most} drops {dropped[most]:,}: relax it")
    if len(rows) == len(index):
        rows = First(len(index))
    counts = np.diff(np.searchsorted(rows, index.cumulative)) if not isinstance(rows, First) else index.counts
    selection = Selection(rows, counts, _digest(index, rows), dropped, missing, path)
    if path is not None:
        _save(selection, path)
    return selection


def _names(filters: Sequence[Filter], split: Split | None) -> list[str]:
    names: list[str] = [f"the split: {split[0]:g} for validation"] if split else []
    for condition in filters:
        name = str(condition)
        while name in names:
            name += " (again)"
        names.append(name)
    return names


def on_side(keys: NDArray[np.bytes_], split: Split) -> NDArray[np.bool_]:
    """Which keys are on a side of a split: bool [N]."""
    fraction, side = split
    width = -(-keys.dtype.itemsize // 8) * 8
    words = np.ascontiguousarray(keys.astype(f"S{width}")).view("<i8").reshape(len(keys), -1)
    hashed = np.zeros(len(keys), np.int64)
    for word in words.T:  # padding says nothing: a set whose longest key is longer splits alike
        hashed = np.where(word != 0, mix(hashed, word), hashed)
    validation = (mix(hashed).view(np.uint64) >> np.uint64(11)) < np.uint64(round(fraction * (1 << 53)))
    return validation if side == "validation" else ~validation


def _limited(index: Index, selection: Selection, limit: int | None) -> Selection:
    if limit is None or limit >= len(selection):
        return selection
    rows = First(limit) if isinstance(selection.rows, First) else np.array(selection.rows[:limit])
    ends = np.minimum(np.cumsum(selection.counts), limit)
    dropped = {**selection.dropped, "limit": len(selection) - limit}
    missing = {**selection.missing, "limit": 0}
    return Selection(rows, np.diff(ends, prepend=0), _digest(index, rows), dropped, missing)


def _digest(index: Index, rows: Any) -> str:
    """Of the index's content and the rows kept."""
    digest = hashlib.sha256(index.digest.encode())
    if isinstance(rows, First):
        digest.update(f"first {len(rows)}".encode())
    else:
        for start in range(0, len(rows), PIECE):
            digest.update(rows[start : start + PIECE].tobytes())
    return digest.hexdigest()


# ---- stored selections


def _path(index: Index, filters: Sequence[Filter], split: Split | None) -> Path | None:
    """Where a selection is stored; nowhere if the index is not, or a filter's code is not ours to know."""
    if index.path is None or not all(type(item).__module__.startswith("ldm.") for item in filters):
        return None
    facts = [SELECTION_VERSION, index.digest, sorted(dict(index.names).items()), split]
    content = hashlib.sha256(repr(facts).encode())
    for condition in filters:
        content.update(type(condition).__qualname__.encode() + _content(vars(condition)))
    return index.path.parent / f"selection-{content.hexdigest()[:32]}.npy"


def _content(value: Any) -> bytes:
    """What a filter was given, and the lists that it has read."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str} {value.shape} ".encode() + value.tobytes()
    if isinstance(value, Mapping):
        return b"".join(f"{name}: ".encode() + _content(value[name]) + b"\n" for name in sorted(value))
    return repr(value).encode()


def _written(path: Path, kept: Callable[[], Iterator[Ints]]) -> Stored | None:
    """Write rows as they come and map the file; None if there is no room to write."""

    def write(file: BinaryIO) -> None:
        count, header = 0, {"descr": "<i8", "fortran_order": False}
        np.lib.format.write_array_header_2_0(file, header | {"shape": (1 << 60,)})
        for rows in kept():
            file.write(rows.astype("<i8").tobytes())
            count += len(rows)
        file.seek(0)  # the header is padded: a shorter number has room
        np.lib.format.write_array_header_2_0(file, header | {"shape": (count,)})

    try:
        replace(path, write)
    except OSError as error:
        log.warning("selection not cached in %s: %s", path.parent, error.strerror)
        return None
    return Stored(path)


def _save(selection: Selection, path: Path) -> None:
    facts: dict[str, Any] = {"digest": selection.digest, "counts": selection.counts.tolist()}
    facts |= {"dropped": selection.dropped, "missing": selection.missing}
    facts["all"] = isinstance(selection.rows, First)
    replace(path.with_suffix(".json"), lambda file: file.write(json.dumps(facts).encode()))


def _load(index: Index, path: Path) -> Selection | None:
    try:
        facts: Mapping[str, Any] = json.loads(path.with_suffix(".json").read_text())
        rows: Any = First(len(index)) if facts["all"] else Stored(path)
        counts = np.array(facts["counts"], np.int64)
        return Selection(rows, counts, facts["digest"], facts["dropped"], facts["missing"], path)
    except (OSError, ValueError, KeyError, EOFError):
        return None


def _unknown(index: Index, column: str, where: str) -> InputError:
    scores = index.scores()
    first = Path(public(index.shards[0])).name
    what = f"filter uses '{column}' but {first} has: {', '.join([*scores, *SIZES])}"
    lowered = {name.lower(): name for name in scores}
    near = difflib.get_close_matches(column.lower(), lowered, 1, 0.5)
    example = lowered[near[0]] if near else (scores[0] if scores else "NAME_IN_THE_JSON")
    return InputError(where, what, f"add data.columns.{column}={example}")
