"""Files that cannot be written cost what would be in them, and no step: real errors, of /dev/full mostly."""

import csv
import errno
import json
import logging
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest

import train
from ldm.checkpoints.files import append_rows, spared
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks import loggers
from ldm.training.callbacks.heartbeat import FILE
from ldm.training.callbacks.loggers import Loggers
from ldm.training.log import LogFile, log_to_file
from ldm.training.module import TrainingModule

FULL = Path("/dev/full")  # every write to it is ENOSPC
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="Linux has /dev/full")


def full(path):
    """Put a file in the place of `path` that takes nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(FULL)


def forget_log_files():
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LogFile)]:
        root.removeHandler(handler)
        with open(os.devnull, "w") as file:
            os.dup2(file.fileno(), handler.stream.fileno())  # what was kept for a full disk goes somewhere
        handler.close()


def test_a_full_disk_costs_what_it_did_not_take(recipe, monkeypatch, caplog, tmp_path):
    """From step 3 nothing can be written but checkpoints; metrics.csv can again from step 9."""
    often = ["trainer.max_steps=20", "callbacks.spikes.window=64", "callbacks.heartbeat.seconds=0.05"]
    often += ["callbacks.snapshots.every=2", "module.ema_lengths=[0.1]", "logger=tensorboard"]
    original, step = TrainingModule.optimizer_step, AutoencoderModule.training_step
    run, kept = tmp_path / "troubled", []
    forget_log_files()

    def break_disk():
        kept.append((run / "metrics.csv").read_bytes())
        for name in ("metrics.csv", "spikes.csv", "run.json.new", f"{FILE}.new", "samples", "ema"):
            full(run / name)
        (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, LogFile)]
        with FULL.open("w") as file:
            os.dup2(file.fileno(), handler.stream.fileno())

    def optimizer_step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.trainer.global_step == 3 and self.trainer.default_root_dir == str(run):
            break_disk()
        if self.trainer.global_step == 9 and kept:
            (run / "metrics.csv").unlink()
            (run / "metrics.csv").write_bytes(kept[0])

    def leap(self, batch, i):
        return step(self, batch, i) * (99 if self.trainer.global_step == 18 else 1)

    monkeypatch.setattr(AutoencoderModule, "training_step", leap)
    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    assert train.command(recipe(1, "calm", *often)) == 0
    forget_log_files()
    assert train.command(recipe(1, "troubled", *often)) == 0
    forget_log_files()
    assert kept
    for name in ("model", "ema", "ema-0.1", "optimizer"):
        file = f"checkpoints/step-000000020/{name}.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "calm" / file).read_bytes()
    said = [record.getMessage() for record in caplog.records]
    for name in ("metrics.csv", "spikes.csv", "run.json", FILE, "samples", "ema", "log.txt"):
        lines = [line for line in said if line.startswith(f"{run / name} cannot be written")]
        assert len(lines) == 1, (name, said)
    (again,) = [line for line in said if f"{run / 'metrics.csv'} is written again" in line]
    assert "8 times it was not" in again, "rows and speeds of steps 4, 6, 8, and validation at 4 and 8"
    with (run / "metrics.csv").open(newline="") as file:
        steps = {int(row["step"]) for row in csv.DictReader(file)}
    assert steps == {2, *range(10, 21, 2)}
    assert (tmp_path / "calm/spikes.csv").exists()


def test_rows_are_added_whole_or_not_at_all(tmp_path):
    """A limit on the size of a file cuts a write in the middle, as a full disk does."""
    path = tmp_path / "a.csv"
    append_rows(path, ["step", "value"], [(1, 0.5)])
    before = path.read_bytes()
    assert before == b"step,value\r\n1,0.5\r\n"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, limits[1]))
        with pytest.raises(OSError, match="too large") as error:
            append_rows(path, ["step", "value"], [(2, 0.5), (3, 0.5)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    append_rows(path, ["step", "value"], [(4, 0.5)])
    assert path.read_bytes() == before + b"4,0.5\r\n"


def test_a_folder_that_is_gone_and_there_again(tmp_path, caplog):
    path = tmp_path / "folder/a.csv"

    def write():
        with spared(f"{path}"):
            append_rows(path, ["step"], [(1,)])

    for _ in range(3):
        write()
    path.parent.mkdir()
    write()
    write()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{path} cannot be written (No such file or directory)")
    assert second == f"{path} is written again; 3 times it was not, and that is lost"
    with pytest.raises(ZeroDivisionError), spared("x"):
        _ = 1 / 0


def test_a_log_file_on_a_full_disk(tmp_path, caplog, capfd):
    forget_log_files()
    log_to_file(tmp_path / "log.txt")
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, LogFile)]
    good = os.dup(handler.stream.fileno())
    with FULL.open("w") as file:
        os.dup2(file.fileno(), handler.stream.fileno())
    for i in range(3):
        logging.getLogger("x").warning("line %d", i)
    os.dup2(good, handler.stream.fileno())
    os.close(good)
    logging.getLogger("x").warning("line 3")
    forget_log_files()
    said = [record.getMessage() for record in caplog.records if "log.txt" in record.getMessage()]
    assert len(said) == 2
    assert "cannot be written (No space left on device)" in said[0]
    assert "is written again" in said[1]
    assert "Traceback" not in capfd.readouterr().err
    assert [line.split(" WARNING ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()][
        -2
    ] == "line 3"


class Stuck:
    """A logger whose write never returns, as one that waits for a server."""

    def __init__(self):
        self.wrote, self.free = threading.Event(), threading.Event()

    def start(self, run, stage, config, step, history):
        pass

    def write(self, step, values, pictures):
        self.wrote.set()
        self.free.wait(60)

    def close(self, failed):
        pass


def test_a_logger_that_never_returns_keeps_neither_the_steps_nor_the_end(
    recipe, monkeypatch, caplog, tmp_path
):
    stuck, original = Stuck(), Loggers.__init__
    monkeypatch.setattr(Loggers, "__init__", lambda self, given, *rest: original(self, [stuck], *rest))
    monkeypatch.setattr(loggers, "INIT_SECONDS", 0.2)
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.3)
    assert train.command(recipe(1, "run")) == 0
    assert stuck.wrote.is_set()
    stuck.free.set()
    assert "Stuck: the last rows were not taken within 0 s; metrics.csv has all" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["stages"]
