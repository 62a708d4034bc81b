"""`ldm data index`: build an index with many processes and machines, or count shards without opening them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ldm.data.tasks import task_of
from ldm.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `ldm data index`."""
    add = parser.add_argument
    add("shards", nargs="+", help="tars, a folder of tars, a glob, braces {00000..00009}.tar; paths or urls")
    add("--out", metavar="DIR", help="folder for the index, which data.shards may then name")
    add("--processes", type=int, metavar="N", help="that read shards (default: one a core)")
    add("--task", metavar="I/N", help="only every N-th shard from the I-th (default: the Slurm array's)")
    add(
        "--no-checksums",
        action="store_true",
        help="read headers only; bad bytes are then not found",
    )
    add("--allow-incomplete", action="store_true", help="also shards that lack the _stats.json others have")
    add("--count", action="store_true", help="count samples by _stats.json and .parquet, and open no tar")
    add(
        "--where",
        action="append",
        default=[],
        metavar="COND",
        help="with --count: 'aesthetic>=5', repeatable",
    )


def run(args: argparse.Namespace) -> list[str]:
    """Do what the options say; lines that say what was done."""
    if args.where and not args.count:
        raise InputError("--where", "an index is of all samples", "add --count, or set data.filters")
    if args.count:
        from ldm.data.counting import count_shards

        return count_shards(args.shards, args.where)
    from ldm.data.index import Survey, build_index, index_folder
    from ldm.data.sidecars import refuse
    from ldm.data.table import name_index

    task, tasks = task_of(args.task, os.environ)
    if index_folder(args.shards) is not None:
        raise InputError("shards", "is an index already", "name the tars that it is of")
    if args.out and Survey(args.shards, args.out, "shards").cache() is None:
        raise InputError("--out", f"{args.out} cannot be written", "give another folder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = args.processes or cores
    checksums = not args.no_checksums
    if tasks > 1:
        survey = Survey(args.shards, args.out, "shards")
        if not args.allow_incomplete:
            refuse(survey.lacking(), "shards")
        mine = range(task, len(survey.paths), tasks)
        if not survey.scan(mine, checksums, True, processes):
            done = f"{len(mine):,} of {len(survey.paths):,} shards done"
            return [f"task {task} of {tasks}: {done}; the last task joins all"]
    index = build_index(
        args.shards,
        args.out,
        where="shards",
        checksums=checksums,
        allow_incomplete=args.allow_incomplete,
        processes=processes,
    )
    lines = [index.summary(), f"columns: {', '.join(index.columns)}"]
    if args.out is not None:
        name_index(index, Path(args.out))
        lines.append(f"use it with data.shards={args.out}")
    return lines
