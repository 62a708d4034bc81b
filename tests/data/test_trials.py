"""Real ranks and workers, killed at random: the order and the digest are those of one process; memory."""

import json
import os
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.datamodule import ShardDataModule

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trials(write, sample, tmp_path):
    """(seed, trials, context) -> what tests/data/trials.py found; 300 samples in uneven shards."""

    def run(seed, count, context, timeout=300):
        for name, numbers in (("0", range(90)), ("1", range(90, 250)), ("2", range(250, 300))):
            write(f"{seed}/shards/{name}.tar", [sample(i, width=6, height=4) for i in numbers])
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tests/data/trials.py", str(tmp_path / str(seed)), str(seed), str(count)]
        done = subprocess.run(
            [*command, context], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.slow
@pytest.mark.fault(16)
@pytest.mark.fault(17)
@pytest.mark.parametrize(("context", "count"), [("fork", 12), ("spawn", 4), ("forkserver", 4)])
def test_kill_and_resume(trials, counted, context, count):
    found = trials(count, count, context)
    assert found["trials"] == count
    counted(trials=count, starts=len(found["killed_at"]), deviations=0)
    assert len(set(found["killed_at"])) > count // 3, "else the kills came before any checkpoint"


@pytest.mark.soak
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("seed", range(10))
def test_kill_and_resume_more(trials, context, seed):
    trials(seed, 60 if context == "fork" else 20, context, timeout=3000)


def private_mb(pid):
    """Memory of a process that it shares with no other, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow(write, sample):
    folder = write("m/0.tar", [sample(i, width=6, height=4) for i in range(500)]).parent
    data = ShardDataModule(str(folder), 8, 250, num_workers=2, tokenize=Captions())
    points = []
    for step, batch in enumerate(data.stream(), start=1):
        data.health.add(batch)
        if step % 40 == 0:
            data.health.agree(250 * step)
            pids = [os.getpid(), *(child.pid for child in active_children())]
            points.append((250 * step / 10_000, sum(map(private_mb, pids))))
        if step == 200:
            break
    assert points[-1][0] == 5
    slope = np.polyfit(*zip(*points[1:], strict=True), 1)[0]
    assert slope < 1, f"{slope:.2f} MB for 10,000 samples: {points}"


class Captions:
    """A tokenizer that workers can be sent."""

    def __call__(self, captions):
        return torch.tensor([[len(caption)] for caption in captions])
