"""Kill and resume at random: a driver that forks ranks, which iterate a data module's stream and do no more.

Run as a program: `trials.py FOLDER SEED TRIALS CONTEXT`. FOLDER/shards has the tars. One chain of segments:
each starts from the checkpoint of the one before with another number of ranks, workers and micro-batches, and
is killed at a random moment, all but the last. Prints one JSON line; raises if anything is not as in one go.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from itertools import islice
from pathlib import Path

import numpy as np
from torch import distributed as dist

BATCH, EVERY = 24, 3  # samples a step, steps between checkpoints
SHARES = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 1)]  # ranks and micro-batches


def module(folder, **options):
    from ldm.data.datamodule import ShardDataModule  # not above: spawned workers import this file

    return ShardDataModule(str(folder / "shards"), 8, BATCH, seed=3, crop="random", **options)


def rank_main(folder, segment, rank, world, accumulate, workers, context, steps, pace):
    """One rank: consume, note every n and key, agree, and let rank 0 write the checkpoint."""
    os.setsid()  # its workers die with it by one signal
    store = f"file://{folder}/store-{segment}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    data = module(folder, multiprocessing_context=context)
    checkpoint = folder / "data.json"
    if checkpoint.exists():
        data.check_state(stored := json.loads(checkpoint.read_text()))
        data.start = stored["samples"]
    else:
        data.setup()
    batches = iter(data.stream(rank, world, data.start, accumulate, workers))
    with (folder / f"seen-{segment}-{rank}").open("w", buffering=1) as file:
        for step in range(data.start // BATCH, steps):
            for batch in islice(batches, accumulate):
                data.health.add(batch)
                rows = zip(batch.n.tolist(), batch.key, strict=True)
                file.write("".join(f"{n} {key}\n" for n, key in rows))
            if (step + 1) % EVERY == 0:
                data.health.agree((step + 1) * BATCH)
                if rank == 0:
                    new = folder / "data.json.new"
                    new.write_text(json.dumps(data.state((step + 1) * BATCH)))
                    os.replace(new, checkpoint)
            time.sleep(pace)
    batches.close()
    dist.barrier()


def start(function, *arguments):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def done_steps(folder):
    path = folder / "data.json"
    return json.loads(path.read_text())["samples"] // BATCH if path.exists() else 0


def run_segment(folder, segment, moments, context, steps, kill):
    world, accumulate = moments.choice(SHARES if context == "fork" else SHARES[:4])
    workers = moments.choice((0, 1, 2) if context == "fork" else (1, 2 if world == 1 else 1))
    first = done_steps(folder)
    options = (world, accumulate, workers, context if workers else None, steps, 0.02 if kill else 0.0)
    pids = [start(rank_main, folder, segment, rank, *options) for rank in range(world)]
    if kill:
        progress = folder / f"seen-{segment}-{world - 1}"
        while not (progress.exists() and progress.stat().st_size):
            gone = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert gone is None, f"a rank of segment {segment} ended by itself: {gone}"
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.4))
        os.killpg(pids[moments.randrange(world)], signal.SIGKILL)  # one rank; the others then fail or hang
        time.sleep(moments.uniform(0.0, 0.05))
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    assert kill or not any(codes), codes
    return first, world, workers


def main(folder, seed, trials, context):
    folder, moments = Path(folder), random.Random(seed)
    data = module(folder)
    data.setup()
    steps = 8 * trials * EVERY  # more than all segments reach before they are killed
    rows = data.plan().places(np.arange(steps * BATCH)).place
    order = data.sources[0].index.keys(data.sources[0].selection.rows[rows])
    starts = []
    for segment in range(trials + 1):
        starts.append(run_segment(folder, segment, moments, context, steps, kill=segment < trials)[0])
    committed = {}
    deviations = seen = 0
    for segment, first in enumerate(starts):
        end = starts[segment + 1] if segment < trials else steps
        for path in folder.glob(f"seen-{segment}-*"):
            lines = path.read_text().splitlines(keepends=True)
            for n, key in (line.split() for line in lines if line.endswith("\n")):
                seen += 1
                deviations += order[int(n)] != key
                if first * BATCH <= int(n) < end * BATCH:
                    assert int(n) not in committed, f"{n} twice"
                    committed[int(n)] = key
    whole = module(folder)
    for batch in islice(whole.stream(), steps):
        whole.health.add(batch)
    whole.health.agree(steps * BATCH)
    stored = json.loads((folder / "data.json").read_text())
    assert stored == whole.state(steps * BATCH), (stored, whole.state(steps * BATCH))
    assert len(committed) == steps * BATCH, f"{steps * BATCH - len(committed)} lost"
    assert deviations == 0
    return {"trials": trials, "samples": len(committed), "seen": seen, "killed_at": starts}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
