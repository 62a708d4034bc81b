"""heartbeat.json and the events of run.json, as a person elsewhere reads them."""

import json
import os
import signal
import socket
import time

import pytest

import train
from ldm.training.callbacks.heartbeat import Heartbeat
from ldm.training.module import TrainingModule


def beat(run):
    return json.loads((run / "heartbeat.json").read_text())


def events(run):
    return [(e["kind"], e["step"]) for e in json.loads((run / "run.json").read_text())["events"]]


def test_it_goes_on_while_a_step_is_long_and_says_when_it_ended(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    original, seen, run = TrainingModule.optimizer_step, [], tmp_path / "run"

    def optimizer_step(self, *args, **kwargs):
        if self.trainer.global_step == 4:
            end = time.monotonic() + 20
            while len({found["time"] for found in seen if found["step"] == 4}) < 3:
                seen.append(beat(run))
                assert time.monotonic() < end
                time.sleep(0.01)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    began = time.time()
    assert train.command(recipe(1, "run", "callbacks.heartbeat.seconds=0.05")) == 0
    assert not any(found["ended"] for found in seen)
    last = beat(run)
    assert began <= seen[0]["time"] < last.pop("time") <= time.time()
    where = {"host": socket.gethostname(), "pid": os.getpid(), "job": "71"}
    assert last == {**where, "step": 7, "max_steps": 7, "stage": "", "ended": True}
    assert list(run.glob("*.new")) == []


def test_what_happened_is_in_the_record(recipe, monkeypatch, tmp_path):
    run, original = tmp_path / "run", TrainingModule.optimizer_step
    assert train.command(recipe(1, "run", "trainer.max_steps=3")) == 0

    def optimizer_step(self, *args, **kwargs):
        if self.trainer.global_step == 4:
            raise RuntimeError("the device\nis gone")
        original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    with pytest.raises(RuntimeError, match="the device"):
        train.command(recipe(1, "run"))
    assert beat(run)["ended"]
    monkeypatch.setattr(TrainingModule, "optimizer_step", original)
    assert train.command(recipe(1, "run")) == 0
    expected = [
        ("start", 0),
        ("finished", 3),
        ("resume", 3),
        ("exception", 4),
        ("resume", 3),
        ("finished", 7),
    ]
    assert events(run) == expected
    (trouble,) = [e for e in json.loads((run / "run.json").read_text())["events"] if e["kind"] == "exception"]
    assert trouble["what"] == "RuntimeError: the device is gone"


def test_a_stopped_run_is_not_finished(recipe, monkeypatch, tmp_path):
    original = TrainingModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    assert train.command(recipe(1, "run")) == 75
    assert "finished" not in dict(events(tmp_path / "run"))


def test_off_is_off(recipe, tmp_path):
    off = [f"callbacks.{name}=null" for name in ("heartbeat", "watchdog", "spikes")]
    assert train.command(recipe(1, "run", *off)) == 0
    assert not {"heartbeat.json", "stacks"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_settings_that_mean_nothing():
    with pytest.raises(ValueError, match="seconds=0"):
        Heartbeat(None, None, seconds=0)
