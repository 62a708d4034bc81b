"""Which samples to use: conditions on metadata, decided on the index before the run, never while it runs.

A filter is a picklable object that judges whole columns at once (`mask`), or one sample's metadata (a call).
Values at a limit are kept. A value may be missing (NaN, null, or no such field in one shard): `missing` says
whether such a sample is dropped, kept, or an error. To add one: subclass `Filter`, name its columns, judge.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import SIZES, columns_of
from ldm.data.index import Index
from ldm.errors import InputError

Missing = Literal["drop", "keep", "error"]
Table = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]


class Filter:
    """A condition on some columns."""

    missing: Missing = "drop"

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns it reads."""
        raise NotImplementedError

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        """Judge the values of `needs`; what it says of missing ones is not asked."""
        raise NotImplementedError

    def absent(self, table: Table) -> Mask:
        """Where a value is missing."""
        return np.logical_or.reduce([np.isnan(table[name]) for name in self.needs])

    def mask(self, table: Table) -> Mask:
        """True where a sample is kept: bool [N]. Raises `KeyError` if no sample has the column."""
        absent = self.absent(table)
        if self.missing == "error" and absent.any():
            what = f"{self} has no value for {int(absent.sum()):,} of {absent.size:,} samples"
            raise InputError("data.filters", what, "set missing: drop or missing: keep")
        return np.where(absent, self.missing == "keep", self.accepts(*[table[name] for name in self.needs]))

    def __call__(self, sample: Mapping[str, Any]) -> bool:
        """Judge one sample's metadata, a dict of numbers; a field that is not there is missing."""
        return bool(self.mask(columns_of(dict.fromkeys(self.needs) | dict(sample)))[0])


@dataclass(frozen=True)
class MinValue(Filter):
    """Keep samples whose score is at least `value`."""

    column: str
    value: float
    missing: Missing = "drop"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        return columns[0] >= self.value


@dataclass(frozen=True)
class MaxValue(Filter):
    """Keep samples whose score is at most `value`."""

    column: str
    value: float
    missing: Missing = "drop"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,)

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        return columns[0] <= self.value


@dataclass(frozen=True)
class MinSize(Filter):
    """Keep pictures whose shorter side had at least `pixels`, before any resize of the data set's making."""

    pixels: int

    @property
    def needs(self) -> tuple[str, ...]:
        return ("original_width", "original_height")

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        return np.minimum(*columns) >= self.pixels


@dataclass(frozen=True)
class AspectRatio(Filter):
    """Keep pictures whose width / height, as stored, lies in [min, max]."""

    min: float
    max: float

    @property
    def needs(self) -> tuple[str, ...]:
        return ("width", "height")

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        ratio = columns[0] / columns[1]
        return (ratio >= self.min) & (ratio <= self.max)


@dataclass(frozen=True)
class CaptionLength(Filter):
    """Keep captions of `min` to `max` characters."""

    min: int = 1
    max: int = 1_000_000

    @property
    def needs(self) -> tuple[str, ...]:
        return ("caption_length",)

    def accepts(self, *columns: NDArray[Any]) -> Mask:
        return (columns[0] >= self.min) & (columns[0] <= self.max)


@dataclass
class Selection:
    """The samples of an index that the filters keep, in index order."""

    rows: NDArray[np.int64]  # rows of the index
    counts: NDArray[np.int64]  # kept samples of each shard: what the plan deals
    digest: str  # of the index's content and of what was kept
    dropped: dict[str, int]  # filter -> samples that it was the first to reject
    missing: dict[str, int]  # filter -> those of them that it rejected for a missing value

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


def select(
    index: Index,
    filters: Sequence[Filter] = (),
    where: str = "data.filters",
    limit: int | None = None,
) -> Selection:
    """Apply filters in order, then keep the first `limit`.

    Raises `InputError` if a filter names an unknown column, or nothing is kept.
    """
    table = index.columns
    keep = np.ones(len(index), bool)
    dropped: dict[str, int] = {}
    missing: dict[str, int] = {}
    for i, condition in enumerate(filters):
        unknown = [name for name in condition.needs if name not in table]
        if unknown:
            raise _unknown(index, unknown[0], f"{where}[{i}]")
        rejected = keep & ~condition.mask(table)
        name = str(condition) if str(condition) not in dropped else f"{condition} (again)"
        dropped[name] = int(rejected.sum())
        missing[name] = int((rejected & condition.absent(table)).sum())
        keep &= ~rejected
    rows = np.flatnonzero(keep)
    if not rows.size:
        most = max(dropped, key=lambda name: dropped[name])
        raise InputError(
            where, f"filter keeps 0 of {len(index):,} samples", f"{most} drops {dropped[most]:,}: relax it"
        )
    if limit is not None and limit < len(rows):
        dropped["limit"], missing["limit"] = len(rows) - limit, 0
        rows = rows[:limit]
    counts = np.diff(np.searchsorted(rows, index.cumulative))
    digest = hashlib.sha256(index.digest.encode() + rows.tobytes()).hexdigest()
    return Selection(rows, counts, digest, dropped, missing)


def _unknown(index: Index, column: str, where: str) -> InputError:
    scores = index.scores()
    first = Path(index.shards[0]).name
    what = f"filter uses '{column}' but {first} has: {', '.join([*scores, *SIZES])}"
    lowered = {name.lower(): name for name in scores}
    near = difflib.get_close_matches(column.lower(), lowered, 1, 0.5)
    example = lowered[near[0]] if near else (scores[0] if scores else "NAME_IN_THE_JSON")
    return InputError(where, what, f"add data.columns.{column}={example}")
