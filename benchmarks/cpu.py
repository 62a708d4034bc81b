"""What our own code costs, on a CPU: `python -m benchmarks.cpu --json benchmarks/results/cpu.json`.

C4 the trainer's cost of a step, C5 the moving average, C6 samplers, C7 start-up, C8 memory of a long run,
C11 two processes, C12 the U-Net. C1 to C3 and C9 are benchmarks.data's, C10 is benchmarks.checkpoint's.
Peers are diffusers, accelerate and Lightning. Results are written after each part; one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, loops, network, pieces, startup
from benchmarks.harness import Measured, Race, Table

PARTS = ("C4", "C5", "C6", "C7", "C8", "C11", "C12")
PACKAGES = ["torch", "lightning", "diffusers", "accelerate"]
GOAL_US = 150  # of C4: what a step may cost beside a loop by hand


def trainer_cost(rounds: int, steps: int) -> list[Any]:
    contestants = dict(loops.TRAINERS)
    if harness.missing("accelerate", "diffusers") is not None:
        del contestants["accelerate"]
    first, losses = min(100, steps), {}

    def turn(name: str) -> Measured:
        measured, losses[name] = loops.trained(contestants[name], steps, first)
        return measured

    found = harness.race(
        "C4",
        "A small network (12 linear layers of 32), batch 8, AdamW, clipping, EMA.",
        {name: partial(turn, name) for name in contestants},
        rounds,
        "steps",
        {"Lightning, its callbacks": 1.0},
        [f"{steps} steps a turn after {first}, {rounds} turns each; all are at the same loss after 50."],
    )
    for name, loss in losses.items():
        if abs(loss / losses["ours, all callbacks"] - 1) > 1e-5:
            raise SystemExit(f"C4: {name} is at a loss of {loss}, ours at {losses['ours, all callbacks']}")
    added = harness.added(found, "loop by hand", "Microseconds of a step beyond the loop by hand's.")
    added.name, added.notes = "C4, cost of a step", [f"Goal: ours at most {GOAL_US} us."]
    return [found, added]


def memory(steps: int) -> list[Any]:
    """Each trainer in a process of its own: memory at a fifth of the steps, and at the end."""
    cells, values = [], {}
    for name in ("ours, all callbacks", "loop by hand", "Lightning, its callbacks"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.loops", name, str(steps)]
        done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
        values[name] = found = json.loads(done.stdout.splitlines()[-1])
        slope = (found["end"] - found["early"]) / (0.8 * steps) * 10_000
        row = [name, f"{found['early']:.1f}", f"{found['end']:.1f}", f"{slope:+.2f}"]
        cells.append([*row, f"{found['end'] / values['ours, all callbacks']['end']:.2f}"])
    what = f"Memory (RSS, MB) of a process that trains {steps:,} steps. Goal of the slope: below 1 MB."
    columns = [
        "trainer",
        "after a fifth",
        "at the end",
        "slope, MB per 10,000 steps",
        "times ours at the end",
    ]
    return [Table("C8", what, columns, cells, values)]


def processes(small: bool, rounds: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ddp.json"
        command = [sys.executable, "-m", "benchmarks.ddp", "--json", str(path), "--rounds", str(rounds)]
        command += ["--small"] if small else []
        subprocess.run(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, check=True)
        (race,) = json.loads(path.read_text())["results"]
    race["runs"] = {name: [Measured(**run) for run in runs] for name, runs in race["runs"].items()}
    return [Race(**{**race, "name": f"C11: {race['name']}"})]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--only", help="parts, with commas: C4,C5")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--small", action="store_true", help="seconds; figures mean nothing")
    parser.add_argument("--json", type=Path, help="write results here, and the tables beside it")
    args = parser.parse_args(argv)
    small, rounds = args.small, 1 if args.small else args.rounds
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    work: dict[str, Callable[[], list[Any]]] = {
        "C4": lambda: trainer_cost(rounds, 20 if small else 2000),
        "C5": lambda: pieces.moving_average(rounds, 600_000 if small else 60_000_000),
        "C6": lambda: pieces.samplers(rounds, 1 if small else 20),
        "C7": lambda: startup.starts(rounds),
        "C8": lambda: memory(100 if small else 10_000),
        "C11": lambda: processes(small, rounds),
        "C12": lambda: network.training_step(rounds, *((1, 8, 1, False) if small else ())),
    }
    about, results = harness.facts(PACKAGES), []
    for name in harness.chosen(parser, args.only, PARTS):
        results += work[name]()
        harness.store(args.json, about, results)
    print(harness.markdown(about, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
