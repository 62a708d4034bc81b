"""Half an hour of training, killed every minute: it ends as one that nobody touched; what that cost."""

import os
import random
import signal
import threading
import time

import pytest

from ldm.checkpoints import native

EVERY = 50  # optimizer steps between checkpoints
STEP = 0.1  # seconds that each step sleeps, so that two runs do not share a core for long


def step_of(run):
    """Of the newest row of the log; 0 before the first."""
    path = run / "metrics.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def saved(run):
    newest = native.newest(run / "checkpoints")
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


@pytest.mark.soak
@pytest.mark.fault(20)
def test_killed_every_minute(recipe, process, assert_same_run, trials, counted, tmp_path):
    minutes, pauses = trials(2, 30), random.Random(0)
    more = [f"callbacks.checkpoint.every={EVERY}", "callbacks.checkpoint.keep_every=500"]
    more += ["callbacks.metrics.every=5"]
    more += ["callbacks.validation.every=100000", "callbacks.pictures.every=100000"]
    more += [f"trainer.max_steps={round(minutes * 60 * 0.7 / (STEP + 0.03) / EVERY) * EVERY}"]

    def start(name):
        one = process(recipe(1, name, *more), step_time=STEP)
        threading.Thread(target=one.communicate, daemon=True).start()  # else it waits for us to read
        return one, tmp_path / name, time.monotonic()

    whole, calm, _ = start("whole")
    lost = {"restart": 0.0, "steps": 0}
    began, kills = time.monotonic(), 0
    while True:
        one, run, started = start("parts")
        base, moment = saved(run), started + pauses.expovariate(1 / 60)
        for ahead in (False, True):  # rows are cut, rows are added
            while (step_of(run) > base) != ahead and one.poll() is None and time.monotonic() < moment:
                time.sleep(0.1)
        lost["restart"] += time.monotonic() - started
        while one.poll() is None and time.monotonic() < moment:
            time.sleep(0.1)
        if one.poll() is not None:
            break
        os.killpg(one.pid, signal.SIGKILL)
        one.wait()
        kills += 1
        lost["steps"] += max(0, step_of(run) - saved(run))
    took = time.monotonic() - began
    assert one.returncode == 0
    whole.wait(minutes * 60)
    assert whole.returncode == 0
    assert_same_run(tmp_path / "parts", calm)
    steps = step_of(calm)
    kept = sorted((calm / "checkpoints").glob("step-?????????/MANIFEST.json"))
    first, last = ((int(path.parent.name[5:]), path.stat().st_mtime) for path in (kept[0], kept[-1]))
    each = (last[1] - first[1]) / (last[0] - first[0])  # seconds of a step, with its share of a save
    goodput = steps * each / took
    counted(minutes=round(took / 60, 1), kills=kills, steps=steps, deviations=0, hands=0)
    counted(**{"% goodput": round(100 * goodput, 1), "% restarts": round(100 * lost["restart"] / took, 1)})
    counted(**{"% steps done again": round(100 * lost["steps"] * each / took, 1)})
    print(f"{kills} kills in {took:.0f} s: goodput {goodput:.1%}, lost {lost}, {each:.3f} s a step")
    assert kills >= minutes / 3
    assert goodput >= 0.6 if minutes >= 30 else goodput > 0
