"""`ldm status` on the folders of real trainings: stopped by a signal, finished, killed, while they train."""

import os
import re
import signal
import socket
import time

import pytest

import train
from ldm import cli
from ldm.cluster.status import read_status
from ldm.errors import REQUEUE
from ldm.training.module import TrainingModule

NUMBERS = [  # what depends on the clock or on the machine
    (r"\d{4}-\d\d-\d\d \d\d:\d\d UTC \([^)]*\)", "TIME"),
    (r"\d+ s old, [\d.]+ MB", "AGE, SIZE"),
    (r"[\d,.]+ images/s, [\d,.]+ a device", "RATE"),
    (r"data wait \d+ %, [\d.]+ GB", "WAIT, MEMORY"),
    (r"loss( +)[\d.]+", r"loss\1LOSS"),
    (r"PSNR [\d.]+ dB", "PSNR"),
    (r" \d:\d\d ", " TOOK "),
    (re.escape(socket.gethostname()), "HOST"),
    (r"pid \d+", "pid PID"),
    (r", \d+ s left", ", LEFT left"),
]


def said(run, capsys):
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    for pattern, word in NUMBERS:
        text = re.sub(pattern, word, text)
    return text.splitlines()


def test_stopped_and_finished(recipe, monkeypatch, caplog, capsys, tmp_path):
    caplog.set_level("INFO")
    argv, run = recipe(1, "run"), tmp_path / "run"
    original = TrainingModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "optimizer_step", optimizer_step)
        assert train.command(argv) == REQUEUE
    lines = said(run, capsys)
    assert lines[0] == "run         stopped by a signal, saved since TIME"
    assert lines[-6:] == [
        "speed       RATE, WAIT, MEMORY (at step 4)",
        "loss        LOSS, PSNR, lr 0.001",
        "checkpoint  step 5, AGE, SIZE; 1 older",
        "restarts    0",
        "failures    none recorded",
        "next        the same train.py command goes on from step 5",
    ]
    assert "step        5 of 7 (71.4%)" in lines
    assert train.command(argv) == 0
    lines = said(run, capsys)
    assert lines[0] == "run         finished since TIME"
    assert lines[-5:] == [
        "result      7 steps TOOK loss LOSS",
        "checkpoint  step 7, AGE, SIZE; 2 older",
        "restarts    1",
        "failures    none recorded",
        f"next        ldm info {run}",
    ]
    assert lines[1] == "where       HOST, 1 x cpu"


@pytest.mark.slow
def test_a_killed_training_is_dead_with_its_last_step(recipe, process, capsys, tmp_path):
    """Rows at 2, 4 and 6, checkpoints at 3 and 6: it is killed in step 6, before both."""
    run = tmp_path / "run"
    one = process(recipe(1, "run"), hold=6)
    while not (run / "checkpoints/step-000000003").exists() or read_status(run).stages[0].step < 4:
        assert one.poll() is None, one.communicate()[0]
        time.sleep(0.05)
    lines = said(run, capsys)
    assert lines[0] == "run         running since TIME"
    assert "where       HOST, pid PID, 1 x cpu" in lines
    assert read_status(run).pid == one.pid
    assert any(line.startswith("step        4 of 7 (57.1%), ") for line in lines)
    assert lines[-1] == f"next        tail -f {run}/log.txt"
    one.kill()
    one.wait()
    lines = said(run, capsys)
    assert lines[0] == "run         dead since TIME"
    assert "step        4 of 7 (57.1%)" in lines
    assert lines[-1] == "next        the same train.py command goes on from step 3 (1 steps are done again)"


@pytest.mark.slow
def test_stages_of_a_real_run(two_stages, capsys, tmp_path):
    assert train.command(two_stages(tmp_path)) == 0
    status = read_status(tmp_path / "tiny")
    assert (status.state, status.planned) == ("finished", ["autoencoder", "diffusion"])
    assert [(stage.name, stage.step, stage.max_steps) for stage in status.stages] == [
        ("autoencoder", 7, 7),
        ("diffusion", 7, 7),
    ]
    lines = said(tmp_path / "tiny", capsys)
    assert "autoencoder 7 steps TOOK PSNR" in lines
    assert lines[-1].startswith("next        python sample.py checkpoint=")
