"""Which samples to use: conditions on metadata, decided on the index before the run, never while it runs.

A filter is a picklable object that judges whole columns at once (`mask`), or one sample's metadata (a call).
Values at a limit are kept. A value may be missing (NaN, null, or no such field in one shard): `missing` says
whether such a sample is dropped, kept, or an error. To add one: subclass `Filter`, name its columns, judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import columns_of
from ldm.data.hashes import hash_text, hashes_of, host_of
from ldm.errors import InputError

Missing = Literal["drop", "keep", "error"]
Table = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]
DIGEST = re.compile(r"[0-9A-Fa-f]{32}|[0-9A-Fa-f]{64}|[0-9A-Fa-f]{128}")  # md5, sha256, sha512
HOST = re.compile(r"[\w-]+(\.[\w-]+)+\.?")


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


@dataclass(frozen=True)
class OptOut(Filter):
    """Drop samples whose URL, host or picture is in a list.

    A line of `files` is a URL (compared to the letter), a host (its subdomains are other hosts, `www.` is
    not) or a hexadecimal digest as the shards' json has it; lines that begin with # say nothing. `missing`
    is of samples that lack what the list names.
    """

    files: str | Sequence[str]
    missing: Missing = "keep"
    listed: dict[str, NDArray[np.uint64]] = field(init=False, repr=False, compare=False)  # sorted hashes

    def __post_init__(self) -> None:
        files = [self.files] if isinstance(self.files, str) else list(self.files)
        found: dict[str, list[int]] = {}
        for file in files:
            for column, value in _opted_out(file):
                found.setdefault(column, []).append(value)
        listed = {column: np.unique(np.array(found[column], np.uint64)) for column in sorted(found)}
        object.__setattr__(self, "listed", listed)

    @property
    def needs(self) -> tuple[str, ...]:
        return ()  # `mask` says itself what to do about an index without them

    def absent(self, table: Table) -> Mask:
        return np.logical_or.reduce([self._column(table, name) == 0 for name in self.listed] or [False])

    def mask(self, table: Table) -> Mask:
        """True where no list names the sample. Raises `InputError` if no sample has the column."""
        size = len(next(iter(table.values())))
        keep = np.ones(size, bool)
        for name, hashes in self.listed.items():
            values = self._column(table, name)
            at = np.minimum(np.searchsorted(hashes, values), len(hashes) - 1)
            keep &= (hashes[at] != values) | (values == 0)
        if self.missing == "keep":
            return keep
        absent = self.absent(table)
        if self.missing == "error" and absent.any():
            what = f"{self} can say nothing of {int(absent.sum()):,} of {size:,} samples"
            raise InputError("data.filters", what, "set missing: drop or missing: keep")
        return keep & ~absent

    def _column(self, table: Table, name: str) -> NDArray[np.uint64]:
        if name not in table:
            what = (
                f"{self} names a {name}, and this index has none: it is older than that, or the json has none"
            )
            raise InputError("data.filters", what, "index again with ldm data index")
        return table[name]

    def __call__(self, sample: Mapping[str, Any]) -> bool:
        return bool(self.mask({k: np.array([v], np.uint64) for k, v in hashes_of(sample).items()})[0])


def _opted_out(file: str) -> Iterator[tuple[str, int]]:
    """Column and hash of each line of an opt-out list."""
    path = Path(file).expanduser()
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                text = line.strip().lstrip("\ufeff")
                if not text or text.startswith("#"):
                    continue
                if "://" in text:
                    yield "url", hash_text(text)
                elif DIGEST.fullmatch(text):
                    yield "picture", hash_text(text.lower())
                elif HOST.fullmatch(text):
                    yield "domain", hash_text(host_of(text))
                else:
                    what = f"'{text[:80]}' is no URL, host or digest"
                    raise InputError(
                        f"{path}:{number}", what, "write one a line: https://..., or example.org"
                    )
    except OSError as error:
        raise InputError(
            f"data.filters: {path}", error.strerror or str(error), "give the list's path"
        ) from None
