"""Verbs of the `ldm` command for clusters, one thin function each; imports are late, as in cli.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from ldm.errors import InputError


def plan(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Say what a run would take: speed, hours, money, memory, failures, on any number of GPUs."""
    from ldm.cluster.plan_command import add_options, run

    add_options(parser)
    for line in run(parser.parse_intermixed_args(argv)):
        print(line, flush=True)
    return 0


def slurm_submit(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Check a run, show its batch script and submit it; what follows -- goes to sbatch."""
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for train.py: experiment=NAME")
    parser.add_argument("--nodes", type=int, metavar="N", help="default: as the script says")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="one process each (default: the script)"
    )
    parser.add_argument("--time", metavar="HH:MM:SS", help="until it is stopped and requeued")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--preemptible", action="store_true", help="slurm/preemptible.sbatch")
    parser.add_argument("--array", metavar="FILE", help="a sweep: overrides of one run a line")
    parser.add_argument(
        "--container", metavar="IMAGE", help="a name or .sqsh for pyxis, a .sif for apptainer"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and stop")
    words = list(argv)
    mark = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:mark])
    from ldm.cluster.slurm import Wish, plan, submit

    names = ("nodes", "gpus_per_node", "time", "partition", "account", "preemptible", "array", "container")
    options = {name: getattr(args, name) for name in names}
    job = plan(Wish(tuple(args.overrides), **options, options=tuple(words[mark + 1 :])))
    print("\n".join(job.lines()), flush=True)
    if not args.dry_run:
        print("\n" + "\n".join(submit(job)))
    return 0


def status(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Say of a run from outside: alive or not, step, speed, last checkpoint, restarts, failures."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run: runs/NAME")
    parser.add_argument("--json", action="store_true", help="the same for programs")
    args = parser.parse_args(argv)
    import time
    from pathlib import Path

    from ldm.cluster.status import read_status
    from ldm.cluster.status_table import document, table

    found, now = read_status(Path(args.run)), time.time()
    print(document(found, now) if args.json else "\n".join(table(found, now)))
    return 0


def doctor(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Look at the machines before the first step, alone or under torchrun or srun; 1 if one is not fit."""
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for train.py: experiment=NAME")
    parser.add_argument("--bandwidth-mb", type=float, default=256, help="of messages (default 256)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each answer (default 60)")
    args = parser.parse_intermixed_args(argv)
    for name in ("bandwidth_mb", "timeout"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')}", f"expected above 0, got {getattr(args, name)}")
    from ldm.cluster.checks import FAIL
    from ldm.cluster.doctor import examine
    from ldm.cluster.place import place_of

    failed = False
    for line in examine(place_of(os.environ), args.overrides, int(1e6 * args.bandwidth_mb), args.timeout):
        print(line, flush=True)
        failed = failed or line.level == FAIL
    return int(failed)


VERBS: dict[str, Callable[[argparse.ArgumentParser, Sequence[str]], int]] = {
    "plan": plan,
    "slurm submit": slurm_submit,
    "doctor": doctor,
    "status": status,
}
