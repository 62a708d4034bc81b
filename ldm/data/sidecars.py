"""What img2dataset and `ldm data score` write beside NNNNN.tar: _stats.json, .parquet, _scores.parquet.

The first is written when the tar is complete, so a tar without one, among others that have it, is not.
The tables have a row a sample, also of failed ones; their numbers go before those in the samples' json.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.storage import is_remote, open_shard
from ldm.errors import InputError

STATS = "_stats.json"
TABLES = (".parquet", "_scores.parquet")  # the later goes before the earlier
MAX_ID = 1 << 24  # whole numbers beyond are ids, not scores: float32 cannot hold them


def stem_of(path: str) -> str | None:
    """What the names beside a shard begin with; None if nothing can be beside it."""
    return path.removesuffix(".tar") if path.endswith(".tar") else None


class Sidecars:
    """The files beside one shard; those that are not there say nothing."""

    def __init__(self, path: str) -> None:
        self.stem = stem_of(path)

    def read(self, suffix: str) -> bytes | None:
        if self.stem is None:
            return None
        try:
            if not is_remote(self.stem):
                return Path(self.stem + suffix).read_bytes()
            with closing(open_shard(self.stem + suffix)) as file:
                return file.read(0, file.size)
        except (FileNotFoundError, PermissionError):  # a bucket that may not be listed says 403 for "none"
            return None

    def stats(self) -> dict[str, Any] | None:
        """What _stats.json says; None if there is none, or no good one."""
        try:
            facts = json.loads(self.read(STATS) or b"null")
        except ValueError:
            return None
        return facts if isinstance(facts, dict) else None

    def promised(self) -> int | None:
        """How many samples the tar should have."""
        count = (self.stats() or {}).get("successes")
        return count if isinstance(count, int) else None

    def tables(self, usable: Callable[[str], bool]) -> Iterable[tuple[list[str], dict[str, NDArray[Any]]]]:
        """Keys and columns of each table, the more important later."""
        for suffix in TABLES:
            data = self.read(suffix)
            if data is not None:
                yield read_table(data, f"{self.stem}{suffix}", usable)

    def joined(
        self, samples: NDArray[Any], digest: Any, most: int, usable: Callable[[str], bool]
    ) -> NDArray[Any]:
        """Samples with the tables' numbers as columns, at most `most`; `digest` is fed what was added."""
        for keys, columns in self.tables(usable):
            places = {key: i for i, key in enumerate(keys)}
            names = [key.decode() for key in samples["key"].tolist()]
            at = [places.get(name, places.get(name.rpartition("/")[2], -1)) for name in names]
            rows = np.array(at, np.int64)
            here = np.flatnonzero(rows >= 0)
            scores = [name for name in samples.dtype.names or () if samples.dtype[name] == np.float32]
            for name in columns:
                values = columns[name][rows[here]].astype(np.float32)
                good = np.isfinite(values)
                if not good.any() or name not in scores and len(scores) >= most:
                    continue
                if name not in scores:
                    samples = _with_column(samples, name)
                    scores.append(name)
                samples[name][here[good]] = values[good]
                digest.update(f"{name}\n".encode() + samples[name].tobytes())
        return samples


def _with_column(samples: NDArray[Any], name: str) -> NDArray[Any]:
    wider = np.empty(len(samples), [*samples.dtype.descr, (name, "f4")])
    for other in samples.dtype.names or ():
        wider[other] = samples[other]
    wider[name] = np.nan
    return wider


def read_table(
    data: bytes, where: str, usable: Callable[[str], bool]
) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Keys, and the numbers of each column as float64 with NaN for what is missing or an id."""
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(where, "reading it needs pyarrow", 'pip install "ldm[parquet]"') from None
    try:
        file = ParquetFile(io.BytesIO(data))
        schema = file.schema_arrow
        numbers = (types.is_integer, types.is_floating, types.is_boolean)
        good = [column for column in schema if usable(column.name)]
        numeric = [column.name for column in good if any(is_a(column.type) for is_a in numbers)]
        if "key" not in schema.names:
            return [], {}
        table = file.read(["key", *numeric])
    except (ArrowException, OSError) as error:
        what = f"not a table ({str(error).splitlines()[0]})"
        raise InputError(where, what, "make it again, or remove it") from None
    columns = {}
    for name in numeric:
        column = table.column(name)
        values = column.cast("float64", safe=False).to_numpy().astype(np.float64)
        if types.is_integer(column.type):
            values = np.where(np.abs(values) > MAX_ID, np.nan, values)
        columns[name] = values
    return [str(key) for key in table.column("key").to_pylist()], columns


def beside(paths: Sequence[str]) -> dict[str, str]:
    """Local sidecars of these shards by path, with a text that changes when they do: one listing a folder."""
    found = {}
    for folder in {os.path.dirname(path) for path in paths if not is_remote(path)}:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith((STATS, *TABLES)):
                        facts = entry.stat()
                        found[entry.path] = f"{facts.st_size} {facts.st_mtime_ns}"
        except OSError:
            continue
    return found


def unfinished(paths: Sequence[str], finished: Sequence[bool]) -> list[str]:
    """Shards without a _stats.json in folders where others have one."""
    folders = [os.path.dirname(path) for path in paths]
    some = {folder for folder, done in zip(folders, finished, strict=True) if done}
    every = zip(paths, folders, finished, strict=True)
    return [path for path, folder, done in every if not done and folder in some and stem_of(path)]


def refuse(lacking: Sequence[str], where: str) -> None:
    """Raise `InputError` for the first shard whose download was not finished."""
    if lacking:
        name = PurePosixPath(lacking[0]).name
        more = f" (nor have {len(lacking) - 1:,} more)" if len(lacking) > 1 else ""
        what = f"{name} has no {stem_of(name)}{STATS}: download not finished{more}"
        allow = "pass --allow-incomplete" if where == "shards" else "set data.allow_incomplete=true"
        raise InputError(where, what, f"finish it or {allow}")
