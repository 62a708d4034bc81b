"""How long a checkpoint keeps training waiting.

`python -m benchmarks.checkpoint --json benchmarks/results/checkpoint.json`

The state of a network of 60 million parameters (weights, average, two moments, float32: 0.96 GB) in as many
tensors as Stable Diffusion's U-Net has. Ours is what the training thread waits for; the writing itself, with
hashes, reading back and syncing, is waited for outside the clock and timed beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Measured
from ldm.checkpoints.writer import Part, Writer

PARAMETERS, TENSORS = 60_000_000, 686
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")


def state(parameters: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of unequal sizes, as networks have: half of them small."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(TENSORS, generator=generator) ** 4
    sizes = (weights / weights.sum() * parameters).long().clamp(min=8).tolist()
    return {
        kind: {f"w{i}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)} for kind in KINDS
    }


def clocked(work: Callable[[], object]) -> Measured:
    began, cpu = time.perf_counter(), time.thread_time()  # of the thread that trains
    work()
    return Measured(1, time.perf_counter() - began, time.thread_time() - cpu)


def race(parameters: int, rounds: int, folder: Path) -> harness.Race:
    tensors, writer, steps, written = state(parameters), Writer(), iter(range(1, 10**9)), []
    flat = [value for values in tensors.values() for value in values.values()]
    places = [torch.empty_like(value) for value in flat]
    nbytes = sum(value.nbytes for value in flat)

    def ours() -> Measured:
        part = Part(folder, next(steps), tensors, {"state.json": {}})
        took = clocked(lambda: writer.submit(part))
        began = time.perf_counter()
        writer.wait()
        written.append(time.perf_counter() - began)
        if writer.problem:
            raise SystemExit(writer.problem)
        shutil.rmtree(folder / f"step-{part.step:09d}")
        return took

    def memcpy() -> Measured:
        return clocked(lambda: torch._foreach_copy_(places, flat))

    def torch_save() -> Measured:
        return clocked(lambda: torch.save(tensors, folder / "state.pt"))

    contestants = {"ours, what training waits for": ours, "one memcpy": memcpy, "torch.save": torch_save}
    for each in contestants.values():
        each()  # memory is taken once
    what = f"{nbytes / 1e9:.2f} GB in {len(flat):,} tensors, into memory that is there already."
    found = harness.race("C10", what, contestants, rounds, "saves", {"one memcpy": 1 / 1.2, "torch.save": 10})
    behind = sorted(written[1:])[len(written[1:]) // 2]
    found.notes.append(f"Behind training, written, hashed, synced and read back: {behind:.1f} s (median).")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a thousandth, to see that it runs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    about = harness.facts(["torch"])
    with tempfile.TemporaryDirectory() as folder:
        parameters, rounds = (60_000, 2) if args.small else (PARAMETERS, args.rounds)
        harness.report(args.json, about, [race(parameters, rounds, Path(folder))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
