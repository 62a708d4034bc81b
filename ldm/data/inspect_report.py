"""`ldm data inspect` on a terminal: filters from its options, lines for the user, files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.data.captions import clean
from ldm.data.filters import Filter, MaxValue, MinSize, MinValue, OptOut
from ldm.data.hashes import HASHES
from ldm.data.index import Index
from ldm.data.inspect import Inspection
from ldm.data.inspect_page import page, share
from ldm.data.reader import ShardReader
from ldm.errors import InputError


def filters_of(
    index: Index, least: Sequence[str], most: Sequence[str], size: int | None, opt_out: Sequence[str]
) -> list[Filter]:
    """Filters from COLUMN=VALUE texts, a size in pixels, and lists; raises `InputError`."""
    filters: list[Filter] = [MinValue(*_limit(index, "--min", text)) for text in least]
    filters += [MaxValue(*_limit(index, "--max", text)) for text in most]
    filters += [MinSize(size)] if size is not None else []
    return filters + ([OptOut(list(opt_out))] if opt_out else [])


def _limit(index: Index, option: str, text: str) -> tuple[str, float]:
    column, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise InputError(
            f"{option} {text}", "expected COLUMN=NUMBER", f"write {option} aesthetic=5"
        ) from None
    if column not in index.columns:
        near = difflib.get_close_matches(column, index.columns, 1, 0.5)
        fix = f"did you mean {near[0]}?" if near else f"have: {', '.join(index.columns)}"
        raise InputError(f"{option} {text}", f"no sample has '{column}'", fix)
    return column, number


def summary(index: Index, found: Inspection, captions: int) -> list[str]:
    """Lines for the terminal: counts, damage, ranges, what filters drop, some captions."""
    lines = [index.summary()]
    for shard, key, reason, offset in index.problems:
        lines.append(f"left out {Path(shard).name}/{key}: {reason} at byte {offset}")
    lines.append(f"{'column':24}{'present':>9}{'least':>12}{'median':>12}{'most':>12}")
    for name, column in index.columns.items():
        if name in HASHES:
            continue
        values = column[np.isfinite(column)]
        cells = np.quantile(values, (0, 0.5, 1)) if len(values) else ()
        lines.append(f"{name:24}{len(values) / len(index):9.1%}" + "".join(f"{cell:12.5g}" for cell in cells))
    for verdict in found.verdicts:
        lines.append(
            f"{verdict.filter}: rejects {verdict.rejects:,} ({share(verdict.rejects, len(index))}), "
            f"{verdict.first:,} of them first"
        )
    if found.verdicts:
        lines.append(f"kept: {found.kept:,} of {len(index):,} ({share(found.kept, len(index))})")
    if found.duplicates:
        lines.append(f"{found.duplicates:,} samples have a key that another shard has, too")
    rows = np.unique(np.linspace(0, len(index) - 1, max(captions, 0)).astype(np.int64))
    for key, raw in zip(index.keys(rows), ShardReader(index, ("caption",))(rows), strict=True):
        text = raw.parts.get("caption", b"").decode("utf-8", "replace")
        lines.append(f"{key}: {raw.reason or clean(text)}")
    return lines


def write_page(found: Inspection, file: str) -> str:
    """Write the page; returns the line that says so."""
    return _written(file, page(found))


def write_json(found: Inspection, file: str) -> str:
    return _written(file, json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")


def _written(file: str, text: str) -> str:
    path = Path(file)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            file, f"cannot write there ({error.strerror or error})", "name another file"
        ) from None
    return f"written to {path} ({len(text.encode()) / 1e6:.1f} MB)"
