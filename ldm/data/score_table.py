"""The table beside a tar: NNNNN_scores.parquet, a row a sample: `key`, and a float32 for each column.

NaN where there is no number. The index joins it to the samples by key. Its metadata says of how large a tar
it is, and which function made each column; it is written whole or not at all.
"""

from __future__ import annotations

import fcntl
import io
import json
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data.remote import is_web
from ldm.data.storage import is_remote, open_shard, public, stat, write
from ldm.errors import InputError

SUFFIX = "_scores.parquet"
NOTE = b"ldm"  # of the metadata
Scores = NDArray[np.float32]


@dataclass
class Table:
    """Keys, columns of as many numbers, and what made each column."""

    keys: list[str] = field(default_factory=list)
    columns: dict[str, Scores] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def table_path(shard: str) -> str:
    """Where the table of a shard belongs; raises `InputError` if there can be none."""
    if not shard.endswith(".tar"):
        raise InputError("shards", f"'{public(shard)}' does not end in .tar", "name plain tars")
    if is_web(shard):
        what = f"'{public(shard)}' is on a web server, which takes no tables"
        raise InputError("shards", what, "score local shards, or ones in s3://")
    return shard.removesuffix(".tar") + SUFFIX


def load(shard: str) -> Table:
    """The shard's table; an empty one if there is none, or one of a tar of another size."""
    pa, pq = _arrow()
    try:
        with closing(open_shard(table_path(shard))) as file:
            table = pq.read_table(io.BytesIO(file.read(0, file.size)))
        said = json.loads(table.schema.metadata[NOTE])
    except (FileNotFoundError, pa.ArrowException, KeyError, TypeError, ValueError):
        return Table()
    if said["size"] != stat(shard).size:
        return Table()
    columns = {name: table.column(name).to_numpy() for name in said["origins"]}
    return Table(table.column("key").to_pylist(), columns, said["origins"])


def save(shard: str, table: Table) -> None:
    """Write the shard's table."""
    pa, pq = _arrow()
    note = json.dumps({"size": stat(shard).size, "origins": table.origins})
    made = pa.table({"key": table.keys, **table.columns}).replace_schema_metadata({NOTE: note})
    buffer = io.BytesIO()
    pq.write_table(made, buffer)
    write(table_path(shard), buffer.getvalue())


def add(shard: str, keys: list[str], columns: dict[str, Scores], origins: dict[str, str]) -> None:
    """Put columns into the shard's table, beside those that another process may have put there meanwhile."""
    with ExitStack() as stack:
        if not is_remote(shard):
            file = stack.enter_context(open(shard, "rb"))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        table = load(shard)
        save(shard, Table(keys, table.columns | columns, table.origins | origins))


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        what = f"*{SUFFIX} needs pyarrow, which is not installed"
        raise InputError("ldm data score", what, 'pip install "ldm[parquet]"') from None
    return pyarrow, pyarrow.parquet
