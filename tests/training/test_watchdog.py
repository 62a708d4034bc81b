"""Runs that stand still, and ranks that die: real processes, each of which must be gone in time."""

import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from ldm.training.callbacks.watchdog import CALM, StepWatchdog

AT_LEAST, FIRST = 5, 60  # seconds
BUSY = 20  # seconds that a process may be late on a busy machine
STEP = CALM + 4  # where the trouble comes
SETTINGS = [
    *(f"callbacks.watchdog.at_least={AT_LEAST}", f"callbacks.watchdog.first={FIRST}"),
    *(f"callbacks.{name}.every=100" for name in ("checkpoint", "validation", "pictures")),
    *("callbacks.watchdog.factor=1.5", "callbacks.metrics.every=4"),
]
SEVERAL = ["trainer.devices=2", "trainer.strategy=ddp"]
SCRIPT = """
import ctypes, os, signal, sys, time
from pathlib import Path
import train
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.module import TrainingModule

folder, rank, step, trouble = Path({folder!r}), {rank!r}, {step!r}, {trouble!r}
original, score = TrainingModule.optimizer_step, AutoencoderModule.score


def stand_still():
    time.sleep(600)


def hold_the_lock():
    time.sleep(1)  # steps are quick here: the timer that needs no lock has the limit of the start yet
    ctypes.PyDLL(None).sleep(600)


def optimizer_step(self, *args, **kwargs):
    mine = int(os.environ.get("LOCAL_RANK", "0"))
    note = folder / f"pid-{{mine}}"
    if not note.exists():
        note.write_text(str(os.getpid()))
    if mine == rank and self.trainer.global_step + 1 == step:
        (folder / "since").touch()
        if trouble == "exit":
            os._exit(9)
        elif trouble in ("stand_still", "hold_the_lock"):
            globals()[trouble]()
        else:
            os.kill(os.getpid(), getattr(signal, trouble))
    original(self, *args, **kwargs)


def slow_score(self, *args):
    time.sleep(trouble == "slow validation" and 2.5)
    return score(self, *args)


TrainingModule.optimizer_step = optimizer_step
AutoencoderModule.score = slow_score
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.fixture
def troubled(process, recipe, tmp_path):
    """(run name, trouble, rank, step, overrides) -> that run as a process, and the folder of its notes."""
    count = iter(range(100))

    def start(name, trouble, rank=0, step=STEP, *more):
        folder = tmp_path / f"notes{next(count)}"
        folder.mkdir()
        source = SCRIPT.format(folder=str(folder), rank=rank, step=step, trouble=trouble)
        return process([*recipe(1, name, *SETTINGS, "trainer.max_steps=40"), *more], source=source), folder

    return start


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ended(one, folder, timeout):
    """Wait for the end of all ranks; gives (exit code, output, when the trouble began)."""
    output, _ = one.communicate(timeout=200)
    assert (folder / "since").exists(), output
    since = (folder / "since").stat().st_mtime
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    while any(map(lives, pids)):
        assert time.time() - since < timeout, f"left alone: {pids}, {output}"
        time.sleep(0.05)
    return one.returncode, output, since


def dumped(run, rank=0):
    """The stacks that a rank left, and when."""
    path = run / f"stacks/rank-{rank:05d}.txt"
    return path.read_text(), path.stat().st_mtime


@pytest.mark.slow
@pytest.mark.fault(14)
def test_one_process_that_stands_still(troubled, tmp_path):
    """Asleep; asleep with the interpreter's lock; and one that does not stand still, but validates long."""
    runs = {name: troubled(name, name, 0, STEP) for name in ("stand_still", "hold_the_lock")}
    more = ["callbacks.validation.every=14", "callbacks.watchdog.first=10", "data.validation_batch_size=1"]
    calm, _ = troubled("calm", "slow validation", -1, STEP, *more, "trainer.max_steps=16")
    for name, code in (("stand_still", 4), ("hold_the_lock", 1)):
        found, output, since = ended(*runs[name], timeout=60)
        assert found == code, output
        stacks, when = dumped(tmp_path / name)
        assert AT_LEAST - 1 <= when - since < 1.25 * AT_LEAST + BUSY
        assert f"in {name}\n" in stacks
        assert f"pid {runs[name][0].pid}, step 0: started" in stacks
        assert not json.loads((tmp_path / name / "heartbeat.json").read_text())["ended"]
    run = tmp_path / "stand_still"
    said = rf"no sign of life for \d+ s \(limit {AT_LEAST}\), at step {STEP - 1}, in "
    assert re.search(f"rank 0: {said}", (run / "log.txt").read_text())
    assert re.search(said, dumped(run)[0])
    last = json.loads((run / "run.json").read_text())["events"][-1]
    assert (last["kind"], last["step"]) == ("hang", STEP - 1)
    output, _ = calm.communicate(timeout=200)
    assert calm.returncode == 0, output
    assert "validation/psnr" in (tmp_path / "calm/metrics.csv").read_text()
    assert not (tmp_path / "calm/stacks").exists()


@pytest.mark.slow
@pytest.mark.fault(14)
def test_two_processes_of_which_one_stands_still(troubled, tmp_path):
    """Rank 0 ends the other; where it is stopped itself, the other one ends it."""
    cases = {"asleep": ("stand_still", 1), "stopped": ("SIGSTOP", 1), "first": ("SIGSTOP", 0)}
    limit = 2 * AT_LEAST  # else a rank that waits for a busy disk is taken for one that cannot help itself
    several = [*SEVERAL, f"callbacks.watchdog.at_least={limit}"]
    runs = {name: troubled(name, what, rank, STEP, *several) for name, (what, rank) in cases.items()}
    for name, code in (("asleep", 4), ("stopped", 4), ("first", -signal.SIGKILL)):
        found, output, since = ended(*runs[name], timeout=60)
        assert found == code, (name, output)
        assert limit / 2 <= dumped(tmp_path / name, int(name == "first"))[1] - since < limit + BUSY
    stacks = {
        name: {path.name: path.read_text() for path in (tmp_path / name / "stacks").iterdir()}
        for name in runs
    }
    for name, rank in (("asleep", 0), ("asleep", 1), ("stopped", 0), ("first", 1)):
        assert "most recent call first" in stacks[name][f"rank-{rank:05d}.txt"], (name, rank)
    assert "in stand_still\n" in stacks["asleep"]["rank-00001.txt"]
    for name, rank in (("asleep", 0), ("stopped", 0), ("first", 1)):
        assert "no sign of life for " in stacks[name][f"rank-{rank:05d}.txt"]


DEATHS = [
    pytest.param([("SIGKILL", 0), ("SIGSEGV", 1), ("exit", 0)], marks=pytest.mark.slow),
    pytest.param([("exit", 1), ("SIGSEGV", 0), ("SIGKILL", 1)], marks=pytest.mark.soak),
]


@pytest.mark.fault(13)
@pytest.mark.parametrize("deaths", DEATHS, ids=["some", "others"])
def test_a_rank_that_dies_takes_the_other_along_and_the_run_goes_on(
    deaths, troubled, assert_same_run, tmp_path
):
    several = [*SEVERAL, "callbacks.watchdog.at_least=60"]
    # Rows at checkpoints: sums that go on after one are added in another order, so the last digit may differ.
    several += ["callbacks.checkpoint.every=5", "callbacks.metrics.every=5"]
    whole, _ = troubled("whole", None, -1, STEP, *several)
    for i, (how, rank) in enumerate(deaths):
        one, folder = troubled("parts", how, rank, 4 + 5 * i, *several)
        code, output, _ = ended(one, folder, timeout=60)
        assert code not in (0, 2), output
    last, _ = troubled("parts", None, -1, STEP, *several)
    for one in (whole, last):
        output, _ = one.communicate(timeout=200)
        assert one.returncode == 0, output
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_when_a_step_is_too_long(monkeypatch):
    watchdog = StepWatchdog(None, factor=10, at_least=120, first=1800)
    module = SimpleNamespace(long_works=0, alive=lambda doing, long=False: None)
    trainer = SimpleNamespace(global_step=20, max_steps=1000)
    assert watchdog.limit(module) == 1800
    watchdog.on_train_start(trainer, module)
    assert watchdog.limit(module) == 1800
    clock = [0.0]
    monkeypatch.setattr("ldm.training.callbacks.watchdog.time.monotonic", lambda: clock[0])
    watchdog._began = 0.0

    def steps(seconds):
        for step, took in enumerate(seconds, start=watchdog._step + 1):
            clock[0] += took
            watchdog.on_step(trainer, module, step)

    steps([3.0] * (CALM - 1))
    assert watchdog.limit(module) == 1800
    steps([500.0] + [3.0] * 40)
    assert watchdog.limit(module) == 120, "not below at_least"
    steps([20.0] * 64)
    assert watchdog.limit(module) == pytest.approx(200), "ten times the median"
    module.long_works += 1
    assert watchdog.limit(module) == 1800, "validation"
    steps([20.0] * CALM)
    assert watchdog.limit(module) == 1800, "another rank may draw pictures yet"
    steps([20.0])
    assert watchdog.limit(module) == pytest.approx(200)


@pytest.mark.parametrize(("name", "value"), [("factor", 1), ("at_least", 0), ("first", -1)])
def test_settings_that_mean_nothing(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        StepWatchdog(None, **{name: value})


def test_a_run_that_ends_well_leaves_no_stacks_and_keeps_old_ones(recipe, tmp_path):
    path = tmp_path / "run/stacks/rank-00000.txt"
    assert train.command(recipe(1, "run", "trainer.max_steps=2")) == 0
    assert not path.parent.exists()
    path.parent.mkdir()
    path.write_text("Thread 0x1 (most recent call first):\n  before\n")
    assert train.command(recipe(1, "run", "trainer.max_steps=4")) == 0
    assert path.read_text().startswith("Thread 0x1 (most recent call first):\n  before\n")
    path.write_text("a process that was killed: started\n")
    assert train.command(recipe(1, "run", "trainer.max_steps=6")) == 0
    assert not path.exists()
