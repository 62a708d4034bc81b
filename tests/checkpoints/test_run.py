"""The run directory: one config, one writer, a record that is never half-written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from ldm.checkpoints import run as module
from ldm.checkpoints.run import RunDirectory, global_rank
from ldm.errors import InputError


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def test_paths(tmp_path):
    run = RunDirectory(tmp_path, "quick")
    assert run.path == tmp_path / "quick"
    stage = run.stage("diffusion")
    assert (stage.checkpoints, stage.samples) == (
        tmp_path / "quick/diffusion/checkpoints",
        tmp_path / "quick/diffusion/samples",
    )
    assert run.stage().checkpoints == tmp_path / "quick/checkpoints"
    assert run.networks == tmp_path / "quick/networks"
    assert not run.path.exists()
    assert RunDirectory(tmp_path, "sweep/a").path == tmp_path / "sweep/a"


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/abs", "."])
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(InputError, match=f"^run_name={name}: is not a name for a folder"):
        RunDirectory(tmp_path, name)


def test_record_counts_restarts_jobs_and_stages(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, "quick")
    assert run.record() == {}
    assert run.finished("autoencoder") is None
    run.start()
    record = run.record()
    assert (record["name"], record["restarts"], record["slurm_jobs"], record["stages"]) == (
        "quick",
        0,
        [],
        {},
    )
    for job in ("71", "71", "72"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        run = RunDirectory(tmp_path, "quick")
        run.start()
        run.start()  # the next stage of the same process is not another restart
    run.note(wandb_id="abc")
    run.finish("autoencoder", "PSNR 26.1 dB")
    run.finish("diffusion", "object 86 %")
    again = RunDirectory(tmp_path, "quick")
    record = again.record()
    assert (record["restarts"], record["slurm_jobs"], record["wandb_id"]) == (3, ["71", "72"], "abc")
    assert again.finished("autoencoder") == "PSNR 26.1 dB"
    assert list(record["stages"]) == ["autoencoder", "diffusion"]
    assert sorted(p.name for p in run.path.iterdir()) == ["run.json"]


def test_a_record_is_replaced_whole(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, "quick")
    run.start()
    before = (run.path / "run.json").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            with pytest.raises(KeyboardInterrupt):
                run.note(wandb_id="abc")
        assert (run.path / "run.json").read_text() == before
    (run.path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: is not JSON .*; repair or delete it$"):
        run.record()


def test_start_removes_half_written_checkpoints(tmp_path):
    run = RunDirectory(tmp_path, "quick")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [run.networks, run.stage().checkpoints, run.stage("diffusion").checkpoints]
    for folder in left:
        (folder / f"x.tmp-{dead.pid}").mkdir(parents=True)
        (folder / "x").mkdir()
    run.start()
    assert [[p.name for p in folder.iterdir()] for folder in left] == [["x"]] * 3


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert global_rank() == 3
    run = RunDirectory(tmp_path, "quick")
    with run.lock():
        run.start()
        run.settle_config({"seed": 1})
        run.note(a=1)
        run.finish("diffusion", "x")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert global_rank() == 2
    monkeypatch.delenv("SLURM_PROCID")
    assert global_rank() == 0


# ---- config --------------------------------------------------------------------------------------------


def test_config_is_stored_and_another_refused(tmp_path):
    config = {"backbone": {"channels": 320, "heads": 8}, "trainer": {"max_steps": 5}, "name": "a"}
    run = RunDirectory(tmp_path, "quick")
    run.settle_config(config)
    assert (run.path / "config.yaml").read_text().startswith("backbone:\n  channels: 320\n")
    longer = {**config, "trainer": {"max_steps": 9}}
    run.settle_config(longer)
    assert "max_steps: 9" in (run.path / "config.yaml").read_text()
    before = (run.path / "config.yaml").read_text()
    other = {**config, "backbone": {"channels": 256, "heads": 4}}
    for rank in (0, 1):
        with pytest.raises(InputError) as caught:
            RunDirectory(tmp_path, "quick", rank=rank).settle_config(other)
        assert str(caught.value) == (
            f"{run.path}: has a run with backbone.channels=320, the config says 256 "
            "(and 1 more: backbone.heads); choose another run_name, or take the old value"
        )
    with pytest.raises(InputError, match=r"has a run with name='a', the config says \(absent\); choose"):
        run.settle_config({key: value for key, value in config.items() if key != "name"})
    assert (run.path / "config.yaml").read_text() == before


def test_each_stage_has_its_own_config(tmp_path):
    run = RunDirectory(tmp_path, "quick")
    run.settle_config({"a": 1}, stage="autoencoder")
    run.settle_config({"a": 2}, stage="diffusion")
    run.settle_config({"a": 1}, stage="autoencoder")
    with pytest.raises(InputError, match=r"/autoencoder: has a run with a=1, the config says 2"):
        run.settle_config({"a": 2}, stage="autoencoder")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    run = RunDirectory(tmp_path / "file", "quick")
    with pytest.raises(
        InputError, match=r"quick: cannot be made or written \(Not a directory\); set run_root="
    ):
        run.start()
    with pytest.raises(InputError, match="cannot be made or written"), run.lock():
        pass


# ---- lock ----------------------------------------------------------------------------------------------

HOLDER = textwrap.dedent(
    """
    import os, sys, time
    from ldm.checkpoints.run import RunDirectory
    with RunDirectory(sys.argv[1], "quick").lock():
        # a forked child is like a loader worker that outlives its parent: it gives the lock up as it starts
        if sys.argv[2] == "alone" or os.fork() == 0:
            print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.mark.fault(18)
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_one_writer_until_it_is_killed(tmp_path, how):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        run = RunDirectory(tmp_path, "quick")
        with pytest.raises(InputError) as caught, run.lock():
            pass
        line = str(caught.value)
        assert line.startswith(
            f"{run.path}/run.lock: held by pid {holder.pid} on {os.uname().nodename} since "
        )
        assert line.endswith("; wait, stop it, or choose another run_name")
        holder.kill()
        holder.wait()
        with run.lock():
            assert f"pid {os.getpid()} " in (run.path / "run.lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL) if how == "fork" else holder.kill()
        holder.wait()
        holder.stdout.close()


def test_the_lock_is_given_back_also_after_an_error(tmp_path):
    run = RunDirectory(tmp_path, "quick")
    with run.lock():
        run.start()
    with pytest.raises(InputError, match="held by pid"), run.lock(), run.lock():
        pass
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        assert len(module._held) == 1
    assert not module._held
    assert (run.path / "run.lock").read_text() == ""


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lock_that_goes_soon_is_waited_for(tmp_path, monkeypatch, restarted):
    """`ldm status` looks for an instant; what a lost node held the file server may keep for a while."""
    if restarted:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr(module, "INSTANT", 0.0)
    run = RunDirectory(tmp_path, "quick")
    run.start()
    file = (run.path / "run.lock").open("a")
    fcntl.flock(file, fcntl.LOCK_SH)
    threading.Timer(0.3, file.close).start()
    with run.lock():
        assert file.closed


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunDirectory(tmp_path, "quick").lock():
        pass
    assert "has no locks; start one process only" in caplog.text


def test_record_is_readable_json(tmp_path):
    run = RunDirectory(tmp_path, "quick")
    run.start()
    assert json.loads((run.path / "run.json").read_text())["created"].endswith("+00:00")


def test_events_are_kept_newest_last(tmp_path):
    run = RunDirectory(tmp_path, "run", rank=0)
    run.start()
    for step in range(module.EVENTS + 5):
        run.event("resume", step, "on\nhost a")
    found = run.record()["events"]
    assert [event["step"] for event in found] == list(range(5, module.EVENTS + 5))
    assert {(event["kind"], event["what"]) for event in found} == {("resume", "on host a")}
    assert RunDirectory(tmp_path, "run", rank=1).event("resume", 1) is None
    assert len(run.record()["events"]) == module.EVENTS
    assert run.record()["restarts"] == 0


def test_threads_that_note_at_once_lose_nothing(tmp_path):
    run = RunDirectory(tmp_path, "run", rank=0)
    run.start()

    def note(name):
        for i in range(20):
            run.event(name, i)
            run.note(**{f"{name}{i}": i})

    threads = [threading.Thread(target=note, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = run.record()
    assert {(e["kind"], e["step"]) for e in record["events"]} == {(n, i) for n in "ab" for i in range(20)}
    assert all(record[f"{name}{i}"] == i for name in "ab" for i in range(20))


def test_an_event_that_cannot_be_written_is_said(tmp_path, caplog):
    run = RunDirectory(tmp_path, "run", rank=0)
    run.start()
    (run.path / "run.json.new").symlink_to("/dev/full")
    before = run.record()
    run.event("resume", 1)
    run.finish("", "done")
    assert run.record() == before
    assert caplog.text.count("run.json cannot be written (No space left on device)") == 1
    (run.path / "run.json.new").unlink()
    run.event("resume", 2)
    assert [event["step"] for event in run.record()["events"]] == [2]
