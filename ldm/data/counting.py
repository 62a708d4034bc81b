"""How many samples shards have and a filter would keep, by img2dataset's files alone: no tar is opened."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import SIZES, Columns
from ldm.data.remote import public
from ldm.data.scan import usable
from ldm.data.sidecars import STATS, Sidecars
from ldm.data.storage import expand
from ldm.errors import InputError

CONDITION = re.compile(r"\s*([0-9A-Za-z_.:-]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")
COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt}
THREADS = 16


class Condition(NamedTuple):
    """A comparison of a column with a number, such as aesthetic>=5."""

    text: str
    column: str
    compare: Callable[[Any, Any], NDArray[np.bool_]]
    value: float


def condition_of(text: str) -> Condition:
    """Raises `InputError` if it is no comparison."""
    found = CONDITION.fullmatch(text)
    try:
        value = float(found[3]) if found else np.nan
    except ValueError:
        value = np.nan
    if not found or np.isnan(value):
        raise InputError(f"--where {text}", "no comparison of a column", "for example --where 'aesthetic>=5'")
    return Condition(text, found[1], COMPARE[found[2]], value)


class Count(NamedTuple):
    """Samples of a shard that was downloaded to its end, and how many are left after each condition."""

    samples: int
    left: list[int]


def count_shards(shards: str | Sequence[str], where: Sequence[str] = ()) -> list[str]:
    """Lines: shards, samples, and what is left after each condition; a missing value fails every one.

    Raises `InputError` if no shard has a _stats.json, or one has no column of that name.
    """
    conditions = [condition_of(text) for text in where]
    paths = expand(shards, "shards")
    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(lambda path: _counted(path, conditions), paths))
    known = [count for count in counts if count is not None]
    if not known:
        what = f"none of {len(paths):,} shards has a NAME{STATS}, which img2dataset writes beside a tar"
        raise InputError("shards", what, "index them: ldm data index SHARDS")
    lines = [f"{len(known):>14,}  shards", f"{sum(count.samples for count in known):>14,}  samples"]
    for i, condition in enumerate(conditions):
        left = sum(count.left[i] for count in known)
        lines.append(f"{left:>14,}  {'and ' if i else ''}{condition.text}")
    if len(known) < len(paths):
        lines.append(f"{len(paths) - len(known):>14,}  shards more have no {STATS}: download not finished")
    return lines


def _counted(path: str, conditions: Sequence[Condition]) -> Count | None:
    try:
        return count_shard(path, conditions)
    except OSError as error:
        what = f"what lies beside {public(path)} cannot be read: {error.strerror or error}"
        raise InputError("shards", what, "run it again") from None


def count_shard(path: str, conditions: Sequence[Condition]) -> Count | None:
    """The count of one shard; None if its download was not finished."""
    files = Sidecars(path)
    samples = files.promised()
    if samples is None or not conditions:
        return None if samples is None else Count(samples, [])
    arrays: dict[str, NDArray[Any]] = {}
    keys: list[str] = []
    for these, columns in files.tables(lambda name: name in SIZES or usable(name)):
        if not keys:
            keys, arrays = these, dict(columns)
            continue
        places = {key: i for i, key in enumerate(these)}
        at = np.array([places.get(key, -1) for key in keys], np.int64)
        for name, values in columns.items():
            joined = np.where(at >= 0, values[at], np.nan)
            arrays[name] = np.where(np.isnan(joined), arrays.get(name, np.nan), joined)
    table = Columns(arrays)
    keep, left = np.ones(len(keys), bool), []
    for condition in conditions:
        if condition.column not in table:
            what = f"{PurePosixPath(path).name} has no table with '{condition.column}' beside it"
            have = f"it has: {', '.join(table)}" if len(table) else "make one: ldm data score"
            raise InputError(f"--where {condition.text}", what, have)
        values = table[condition.column]
        # as the index has it: NaN compares to nothing, failed downloads have no width
        keep &= condition.compare(values.astype(np.float32), np.float32(condition.value))
        failed = np.isnan(arrays["width"]) if "width" in arrays else np.zeros(len(keys), bool)
        left.append(int((keep & ~failed).sum()))
    return Count(samples, left)
