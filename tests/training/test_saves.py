"""Checkpoints while training goes on: what a disk that fails costs, which ones stay, who writes them."""

import errno
import json
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch

import train
from ldm.checkpoints import native, writer
from ldm.cluster.status import read_status
from ldm.cluster.status_table import table
from ldm.errors import REQUEUE
from ldm.training.callbacks import checkpoint
from ldm.training.callbacks.watchdog import CALM, StepWatchdog
from ldm.training.module import TrainingModule

EVERY = ["callbacks.checkpoint.every=1", "callbacks.validation.every=1"]


def steps(run):
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


@pytest.fixture
def disk(monkeypatch):
    """(steps, times) -> writing the checkpoints of these fails as on a full disk, so often each."""
    original = writer.store

    def arrange(bad, times=10):
        left = dict.fromkeys(bad, times)

        def store(part, *args):
            if left.get(part.step, 0):
                left[part.step] -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(part, *args)

        monkeypatch.setattr(writer, "store", store)

    return arrange


@pytest.mark.fault(5)
def test_a_full_disk_costs_the_checkpoints_and_training_goes_on(
    recipe, disk, rows, assert_same_run, caplog, tmp_path
):
    assert train.command(recipe(1, "whole", *EVERY)) == 0
    disk({2, 3, 5})
    assert train.command(recipe(1, "run", *EVERY)) == 0
    assert "the checkpoint of step 3 was not written (No space left on device)" in caplog.text
    assert steps(tmp_path / "run") == [4, 6, 7]
    failed = {row[0]: row[2] for row in rows(tmp_path / "run") if row[1] == "run/checkpoints_failed"}
    assert set(failed.values()) <= {"0", "1", "2"}
    assert "1" in failed.values()
    events = json.loads((tmp_path / "run/run.json").read_text())["events"]
    assert "save_failed" in [event["kind"] for event in events]
    mine, whole = (native.load_tensors(native.resolve(tmp_path / name), "model") for name in ("run", "whole"))
    assert all(torch.equal(mine[name], value) for name, value in whole.items())


@pytest.mark.fault(5)
def test_the_third_that_fails_in_a_row_ends_the_run(recipe, disk, refused, tmp_path):
    disk({2, 3, 4, 5, 6, 7})
    line = refused(recipe(1, "run", *EVERY))
    assert line.startswith(f"{tmp_path}/run/checkpoints: the checkpoint of step ")
    assert "was not written (No space left on device)" in line
    assert "GB are free; free some space" in line
    assert steps(tmp_path / "run") == [1]
    disk(set())
    assert train.command(recipe(1, "run", *EVERY)) == 0


def test_a_last_checkpoint_that_is_lost_is_no_success(recipe, disk, refused, tmp_path):
    disk({7})
    assert "step 7 was not written" in refused(recipe(1, "run"))
    disk(set())
    assert train.command(recipe(1, "run")) == 0
    assert steps(tmp_path / "run") == [3, 6, 7]


def test_a_last_checkpoint_is_tried_twice(recipe, disk, tmp_path):
    disk({7}, times=1)
    assert train.command(recipe(1, "run")) == 0
    assert steps(tmp_path / "run") == [3, 6, 7]


@pytest.fixture
def signalled(monkeypatch):
    """(step) -> SIGTERM comes in the optimizer step that makes this one."""
    original = TrainingModule.optimizer_step

    def arrange(step):
        def optimizer_step(self, *args, **kwargs):
            if self.trainer.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, *args, **kwargs)

        monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)

    return arrange


def test_a_signal_whose_checkpoint_is_lost_is_no_wrong_input(recipe, disk, signalled, caplog, tmp_path):
    """The job goes back into the queue, and on from the checkpoint before."""
    caplog.set_level("INFO")
    disk({5})
    signalled(5)
    assert train.command(recipe(1, "run")) == REQUEUE
    assert "could not save step 5" in caplog.text
    assert steps(tmp_path / "run") == [3]
    lines = table(read_status(tmp_path / "run"), time.time())
    assert " stopped by a signal, not saved since " in lines[0]
    events = json.loads((tmp_path / "run/run.json").read_text())["events"]
    assert events[-1]["what"] == f"signal {int(signal.SIGTERM)}: step 5 could not be saved"


def test_a_signal_while_the_one_before_is_being_written(recipe, signalled, monkeypatch, tmp_path):
    """The watchdog, which is short here, knows that this may take its time."""
    original, ended = writer.store, []

    def store(part, *args):
        time.sleep(4.0 if part.step == 15 else 0.0)
        original(part, *args)

    monkeypatch.setattr(writer, "store", store)
    monkeypatch.setattr(StepWatchdog, "_end", lambda *args: ended.append(args))
    signalled(15 + CALM + 3)
    more = ["callbacks.checkpoint.every=15", "callbacks.watchdog.at_least=1", "callbacks.metrics.every=50"]
    more += [f"callbacks.{name}.every=100" for name in ("validation", "pictures")]
    assert train.command(recipe(1, "run", *more, "trainer.max_steps=100")) == REQUEUE
    assert steps(tmp_path / "run") == [15, 15 + CALM + 3]
    assert ended == []


def test_a_signal_during_the_last_write_is_not_forgotten(two_stages, signalled, monkeypatch, tmp_path):
    """It came after the last question of stage 1: stage 2 would know nothing of it."""
    original = writer.store

    def store(part, *args):
        if part.root.parent.name == "autoencoder" and part.step == 7:
            os.kill(os.getpid(), signal.SIGUSR2)
        original(part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "store", store)
        assert train.command(two_stages(tmp_path)) == REQUEUE
    assert not (tmp_path / "tiny/diffusion/checkpoints").exists()
    assert train.command(two_stages(tmp_path)) == 0


def test_a_disk_that_hangs_costs_checkpoints(recipe, monkeypatch, caplog, tmp_path):
    original, hangs = writer.store, threading.Event()

    def store(part, *args):
        if part.step == 3:
            hangs.wait(60)
        original(part, *args)

    def answers(self, trainer, *args):
        if trainer.global_step == 6:
            hangs.set()

    monkeypatch.setattr(writer, "store", store)
    monkeypatch.setattr(checkpoint, "SOON", 0.2)
    monkeypatch.setattr(checkpoint.Checkpoints, "on_train_batch_start", answers)
    monkeypatch.setattr(checkpoint, "Writer", partial(writer.Writer, patience=0.5))
    assert train.command(recipe(1, "run")) == 0
    assert "the checkpoint of step 6 was not written (the disk does not answer)" in caplog.text
    assert steps(tmp_path / "run") == [3, 7]


def test_the_best_by_a_metric_stays(recipe, tmp_path):
    best = "callbacks.checkpoint.keep_best={metric: validation/psnr, mode: max}"
    argv = recipe(1, "run", *EVERY, "callbacks.checkpoint.keep_last=7", "run_name=all")
    assert train.command(argv) == 0
    found = {}
    for path in (tmp_path / "all/checkpoints").iterdir():
        found[int(path.name[5:])] = native.load_state(path)["metrics"]["validation/psnr"]
    assert len(set(found.values())) == 7
    wanted = max(found, key=found.get)
    assert train.command(recipe(1, "run", *EVERY, "callbacks.checkpoint.keep_last=1", best)) == 0
    assert steps(tmp_path / "run") == sorted({wanted, 7})


@pytest.mark.parametrize(
    ("stage", "strategy", "writers"),
    [
        pytest.param(1, "ddp", 1, marks=pytest.mark.slow),
        pytest.param(2, "ddp", 2, marks=pytest.mark.soak),
        pytest.param(2, "fsdp", 2, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_write_a_share_each_and_any_number_resumes(
    stage, strategy, writers, recipe, process, tmp_path
):
    """Weights of a run by one, two and one process are those of a run by one, in float64."""
    exact = ["trainer.precision=64-true", "module.ema_lengths=[0.1]"]
    assert train.command(recipe(stage, "whole", *exact)) == 0
    two = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", *exact]
    two.append(f"callbacks.checkpoint.writers={writers}")
    for number, (more, last) in enumerate([([], 2), (two, 5), ([], 7)]):
        argv = recipe(stage, "run", *exact, *more, f"trainer.max_steps={last}")
        one = process(argv)
        output, _ = one.communicate(timeout=300)
        assert one.returncode == 0, output
        folder = tmp_path / f"run/checkpoints/step-{last:09d}"
        files = {path.name for path in folder.glob("model*")}
        ranks = [f"model.rank-{rank:05d}-of-00002.safetensors" for rank in range(2)]
        assert files == (set(ranks) if number == 1 and writers == 2 else {"model.safetensors"})
    for kind in ("model", "ema", "ema-0.1", "optimizer"):
        mine, whole = (native.load_tensors(native.resolve(tmp_path / n), kind) for n in ("run", "whole"))
        assert mine.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-12)
