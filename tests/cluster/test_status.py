"""A run seen from outside, by made-up histories: every state, what is said of it, and what is no run."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from ldm import cli
from ldm.checkpoints import native
from ldm.cluster.status import lock_held, newest_row, read_status
from ldm.cluster.status_table import document, duration, table
from ldm.errors import InputError

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC).timestamp()
HERE = socket.gethostname()
CONFIG = """\
trainer: {accelerator: gpu, devices: 8, num_nodes: 2, max_steps: 200000}
data: {global_batch_size: 2048}
"""
ROW = {
    "train/loss": 0.1234,
    "train/lr": 1e-4,
    "validation/loss": 0.13,
    "perf/images_per_sec": 4096.0,
    "perf/images_per_sec_per_gpu": 256.0,
    "perf/mfu": 0.331,
    "perf/data_wait_percent": 2.0,
    "perf/memory_gb": 41.2,
}


def iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def event(ago, kind, step, what=""):
    return {"time": iso(NOW - ago), "kind": kind, "step": step, "what": what}


@pytest.fixture
def history(tmp_path):
    """(facts) -> a run's folder; `beat_ago`, `holder` and so on as below, None: the file is not there."""

    def make(
        record=None,
        beat_ago=None,
        beat=None,
        holder=None,
        host=HERE,
        steps=(4000, 5000),
        stage="",
        saved_ago=180,
    ):
        run = tmp_path / "sd1"
        folder = run / stage
        folder.mkdir(parents=True, exist_ok=True)
        if record is not None:
            facts = {"name": "sd1", "created": iso(NOW - 7200), "restarts": 0, "slurm_jobs": [], "stages": {}}
            (run / "run.json").write_text(json.dumps(facts | record))
        (folder / "config.yaml").write_text(CONFIG)
        if holder is not None:
            (run / "run.lock").write_text(f"held by pid 4242 on {host} since {iso(NOW - holder)}\n")
        else:
            (run / "run.lock").write_text("")
        if beat_ago is not None:
            facts = {
                "time": NOW - beat_ago,
                "host": host,
                "pid": 4242,
                "job": "991",
                "step": 5120,
                "stage": stage,
            }
            (run / "heartbeat.json").write_text(json.dumps(facts | (beat or {})))
        for step in steps:
            path = native.save(folder / "checkpoints", step, {"model": {"w": torch.zeros(step)}}, {})
            os.utime(path, (NOW - max(saved_ago, beat_ago or 0),) * 2)
        lines = ["step,name,value", *(f"5100,{name},{value}" for name, value in ROW.items())]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n5150,train/l")  # a row half written
        (run / "log.txt").write_text("")
        for file in (folder / "metrics.csv", run / "log.txt"):
            os.utime(file, (NOW - 30 if beat_ago is None else NOW - beat_ago,) * 2)
        return run

    return make


@pytest.fixture
def held():
    """(run) -> run.lock is held, as by a training, until the test ends."""
    files = []

    def hold(run):
        files.append((run / "run.lock").open("a"))
        fcntl.flock(files[-1], fcntl.LOCK_EX)

    yield hold
    for file in files:
        file.close()


def said(run):
    return table(read_status(run, NOW), NOW)


def test_a_running_run(history, held):
    """2,048 pictures at 4,096 a second: half a second a step, 194,880 steps are 27 h 04 min."""
    failed = [
        event(3000, "exception", 3100, "CUDA error:\n illegal access"),
        event(2500, "resume", 3000),
    ]
    record = {"restarts": 1, "slurm_jobs": ["980", "991"], "events": failed}
    run = history(record, beat_ago=10, holder=2500, host="node1")
    held(run)
    size = sum(f.stat().st_size for f in (run / "checkpoints/step-000005000").iterdir())
    assert said(run) == [
        "sd1         running since 2026-11-23 11:18 UTC (42 min)",
        "where       node1, pid 4242, job 991, 2 nodes of 8 x gpu",
        "step        5,120 of 200,000 (2.6%), 27 h 04 min left",
        "speed       4,096.0 images/s, 256.0 a device, MFU 33.1%, data wait 2 %, 41.2 GB (at step 5,100)",
        "loss        0.1234, validation 0.1300, lr 0.0001",
        f"checkpoint  step 5,000, 3 min old, {size / 1e6:.2f} MB; 1 older",
        "restarts    1",
        "failures    1 x exception",
        "            2026-11-23T11:10:00+00:00  exception at step 3,100: CUDA error: illegal access",
        f"next        tail -f {run}/log.txt",
    ]


def test_the_time_left_is_the_runs_own_if_it_says_it(history, held):
    """50 h at step 5,100 are 50 h * 194,880 / 194,900 at step 5,120."""
    run = history({}, beat_ago=10, holder=2500)
    held(run)
    with (run / "metrics.csv").open("a") as file:
        file.write("\n5100,perf/hours_left,50\n")
    assert read_status(run, NOW).stages[0].hours_left == pytest.approx(50 * 194880 / 194900)


def test_a_hung_run(history, held):
    run = history({"slurm_jobs": ["991"]}, beat_ago=1200, holder=7000)
    held(run)
    lines = said(run)
    assert lines[0] == "sd1         hung since 2026-11-23 11:40 UTC (20 min); no sign of life for 20 min"
    assert lines[-1] == "next        scancel 991; then the same train.py command goes on from step 5,000"
    history({}, beat_ago=1200, beat={"job": ""}, holder=7000)
    assert "kill -9 4242 on " in said(run)[-1]


def test_the_heart_beat_of_the_process_before_says_nothing_of_this_one(history, held):
    run = history({}, beat_ago=4000, holder=600)
    held(run)
    assert read_status(run, NOW).state == "running"


def test_a_killed_run_is_dead_with_its_last_step(history):
    run = history({}, beat_ago=1200, holder=7000)
    lines = said(run)
    assert lines[0] == "sd1         dead since 2026-11-23 11:40 UTC (20 min)"
    assert lines[2] == "step        5,120 of 200,000 (2.6%)"
    assert lines[-1] == (
        "next        the same train.py command goes on from step 5,000 (120 steps are done again)"
    )


@pytest.mark.parametrize(
    ("kind", "since"), [("start", 600), ("resume", 600), ("rollback", 600), ("exception", 3600)]
)
def test_since_when_it_is_dead(kind, since, history):
    """A process that was killed noted nothing: what it noted last was hours before."""
    run = history({"events": [event(3600, kind, 100)]}, beat_ago=600, holder=7000)
    found = read_status(run, NOW)
    assert (found.state, found.since) == ("dead", NOW - since)


def test_between_two_stages_no_heart_beats(history, held):
    run = history({"planned": ["a", "b"]}, beat_ago=1200, beat={"ended": True}, holder=7000, stage="a")
    held(run)
    assert said(run)[0].startswith("sd1         running since 2026-11-23 10:03 UTC")
    assert said(run)[2] == "stage       a (1 of 2)"


def test_a_stage_that_the_record_does_not_know(history):
    """run.json was damaged, and the user deleted it, as the error says."""
    run = history(None, holder=7000, stage="a")
    assert "stage       a" in said(run)


@pytest.mark.parametrize(("devices", "words"), [("[0, 1]", "2 x gpu"), ("-1", "all x gpu"), ("3", "3 x gpu")])
def test_devices_in_each_form(devices, words, history):
    run = history({})
    (run / "config.yaml").write_text(f"trainer: {{accelerator: gpu, devices: {devices}}}\n")
    assert said(run)[1].endswith(words)


@pytest.mark.parametrize(("step", "words"), [(5000, "saved"), (5100, "not saved")])
def test_what_a_signal_left(step, words, history):
    run = history({"events": [event(500, "signal", step)]})
    assert said(run)[0].startswith(f"sd1         stopped by a signal, {words} since")


@pytest.mark.parametrize(("beat_ago", "state"), [(60, "running"), (299, "running"), (301, "dead")])
def test_the_heart_beat_speaks_where_the_lock_does_not_reach(beat_ago, state, history):
    run = history({}, beat_ago=beat_ago, holder=7000, host="another-node")
    assert read_status(run, NOW).state == state


@pytest.mark.parametrize(("quiet", "state"), [(100, "running"), (400, "dead")])
def test_without_a_heart_beat_the_files_say_when_it_was_alive(quiet, state, history):
    run = history({}, holder=7000, host="another-node", saved_ago=1000)
    for file in ("metrics.csv", "log.txt"):
        os.utime(run / file, (NOW - quiet,) * 2)
    assert read_status(run, NOW).state == state


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["signal"], "stopped"),
        (["signal", "resume"], "dead"),
        (["hang"], "dead"),
        (["rollback", "exception"], "dead"),
    ],
)
def test_how_it_ended_is_the_last_event(kinds, state, history):
    run = history({"events": [event(500 - i, kind, 5100) for i, kind in enumerate(kinds)]})
    assert read_status(run, NOW).state == state


def test_failures_are_counted_and_the_last_ones_shown(history):
    many = [event(3000 - i, "save_failed", 4000 + i, "No space left on device") for i in range(4)]
    many += [
        event(2000, "rollback", 4900, "10 steps with a gradient that is not finite"),
        event(1000, "signal", 5100),
    ]
    many += [event(900, "hang", 5100, "no step for 120 s: rank 3 on node2")]
    lines = said(history({"events": many, "restarts": 3}))
    at = lines.index("failures    4 x save_failed, 1 x rollback, 1 x hang; the last 5:")
    assert lines[at + 1].endswith("save_failed at step 4,001: No space left on device")
    assert (
        lines[at + 5]
        == "            2026-11-23T11:45:00+00:00  hang at step 5,100: no step for 120 s: rank 3 on node2"
    )
    assert len(lines) == at + 7


def test_a_damaged_checkpoint_is_no_checkpoint_to_go_on_from(history):
    run = history({})
    file = run / "checkpoints/step-000005000/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = [line for line in said(run) if line.startswith("checkpoint")]
    assert line.startswith("checkpoint  step 4,000, ")
    assert "; step 5,000 is damaged (model.safetensors: has " in line
    assert said(run)[-1].endswith("goes on from step 4,000 (1,100 steps are done again)")


def test_stages_are_finished_one_after_another(history):
    first = "autoencoder  1,000 steps  2:31   PSNR 26.1 dB"
    planned = ["autoencoder", "diffusion"]
    half = {"planned": planned, "stages": {"autoencoder": first}}
    run = history(half, stage="autoencoder", steps=(200000,))
    assert read_status(run, NOW).state == "dead", "between its stages"
    history(half, stage="diffusion")
    lines = said(run)
    assert "autoencoder 1,000 steps 2:31 PSNR 26.1 dB" in lines
    assert "stage       diffusion (2 of 2)" in lines
    both = {"autoencoder": first, "diffusion": "diffusion  200,000 steps  9:99   held-out: 98 %"}
    history({"planned": planned, "stages": both}, stage="diffusion", steps=(200000,))
    lines = said(run)
    assert lines[0].startswith("sd1         finished")
    assert "diffusion   200,000 steps 9:99 held-out: 98 %" in lines
    assert not any(line.startswith(("stage", "step", "speed")) for line in lines)
    assert lines[-1] == f'next        python sample.py checkpoint={run} prompt="..."'
    config = run / "diffusion/config.yaml"
    config.write_text(config.read_text().replace("200000", "300000"))
    assert read_status(run, NOW).state == "dead", "it was to go on"


def test_a_run_that_has_not_begun(tmp_path, held):
    run = tmp_path / "new"
    run.mkdir()
    (run / "run.lock").write_text(f"held by pid 4242 on {HERE} since {iso(NOW - 20)}\n")
    assert said(run)[0] == "new         not started since 2026-11-23 11:59 UTC (20 s)"
    held(run)
    assert said(run)[0] == "new         running since 2026-11-23 11:59 UTC (20 s)"


def test_as_json(history):
    facts = json.loads(document(read_status(history({}, beat_ago=20, holder=7000), NOW), NOW))
    assert (facts["state"], facts["host"], facts["asked"]) == ("dead", HERE, NOW)
    assert facts["stages"][0]["row"] == ROW
    assert [(one["step"], one["problem"]) for one in facts["stages"][0]["checkpoints"]] == [
        (5000, ""),
        (4000, ""),
    ]
    assert facts["next"].startswith("the same train.py command goes on")


def test_numbers_that_are_not_finite(history):
    run = history({})
    (run / "metrics.csv").write_text("step,name,value\n7,train/loss,nan\n7,train/grad_norm,inf\n")
    assert json.loads(document(read_status(run, NOW), NOW))["stages"][0]["row"]["train/loss"] == "nan"
    assert "loss        nan" in said(run)


def test_the_end_of_a_long_log_is_enough(tmp_path):
    file = tmp_path / "metrics.csv"
    rows = [f"{step},{name},{step + len(name)}\n" for step in range(1, 30001) for name in ("a", "bb")]
    file.write_text("step,name,value\n" + "".join(rows) + "30001,a,4")
    assert newest_row(file) == (30000, {"a": 30001.0, "bb": 30002.0})
    assert newest_row(tmp_path / "none.csv") == (0, {})


def test_asking_leaves_the_lock_free(history, held):
    run = history({})
    assert not lock_held(run / "run.lock")
    held(run)
    assert lock_held(run / "run.lock")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "no such folder; give the folder of a run, as runs/NAME"),
        (lambda folder: folder, "is not a run: it has no run.json; give runs/NAME"),
        (lambda folder: folder / "run/diffusion", "is a folder inside a run; give "),
    ],
)
def test_what_is_no_run(make, message, tmp_path, capsys):
    (tmp_path / "run/diffusion").mkdir(parents=True)
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["status", str(make(tmp_path))])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ldm: error: RUN={make(tmp_path)}: {message}")


def test_a_record_that_is_no_json(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: cannot be read"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 00 min"), (3 * 86400 + 4 * 3600, "3 days 4 h")],
)
def test_how_long(seconds, text):
    assert duration(seconds) == text


def test_it_comes_without_torch(history):
    run = history({})
    code = (
        f"import sys; from ldm.cli import main; assert main(['status', {str(run)!r}]) == 0;"
        "heavy = {'torch', 'numpy', 'hydra', 'lightning'} & set(sys.modules); assert not heavy, heavy"
    )
    root, command = Path(cli.__file__).parents[1], [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sd1         dead")
