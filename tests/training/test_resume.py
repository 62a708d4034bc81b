"""A run that was interrupted, killed, moved or extended ends as if nothing had happened, bit for bit."""

import json
import os
import random
import re
import signal
import time

import pytest
import torch

import ldm
import train
from ldm.checkpoints import native
from ldm.checkpoints.run import RunDirectory
from ldm.errors import REQUEUE
from ldm.training.module import TrainingModule

STAGES = ("autoencoder", "diffusion")


@pytest.fixture
def at_step(monkeypatch):
    """(step, do) -> `do()` is called once, in the middle of that optimizer step (counted from 1)."""

    def arrange(step, do):
        original, done = TrainingModule.optimizer_step, []

        def optimizer_step(self, *args, **kwargs):
            if self.trainer.global_step == step - 1 and not done:
                done.append(type(self).__name__)
                do()
            original(self, *args, **kwargs)

        monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
        return done

    return arrange


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def state(folder):
    return native.load_document(native.resolve(folder), "state.json")


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    stage, micro_batches, recipe, at_step, assert_same_run, tmp_path
):
    accumulate = f"trainer.accumulate_grad_batches={micro_batches}"
    assert train.command(recipe(stage, "whole", accumulate)) == 0
    argv = recipe(stage, "parts", accumulate)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step, number in ((2, signal.SIGINT), (5, signal.SIGTERM)):
        done = at_step(step, lambda number=number: interrupt(number))
        assert train.command(argv) == (130 if number == signal.SIGINT else REQUEUE)
        assert done
        assert (tmp_path / f"parts/checkpoints/step-{step:09d}").is_dir()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert train.command(argv) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts/run.json").read_text())["restarts"] == 2


def test_accumulation_changes_nothing_but_rounding(recipe, rows, tmp_path):
    """The global batch is one thing, how many micro-batches compute it another."""
    one = ["trainer.precision=64-true", "module.ema_lengths=[0.1]"]
    assert train.command(recipe(2, "one", *one)) == 0
    assert train.command(recipe(2, "two", *one, "trainer.accumulate_grad_batches=2")) == 0
    for kind in ("model", "ema", "ema-0.1"):
        one, two = (native.load_tensors(native.resolve(tmp_path / name), kind) for name in ("one", "two"))
        for name, value in one.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12)
    assert state(tmp_path / "one")["step"] == state(tmp_path / "two")["step"] == 7
    steps = [row[0] for row in rows(tmp_path / "two") if row[1] == "train/loss"]
    assert steps == ["2", "4", "6"], "a row an optimizer step, not a micro-batch"


@pytest.mark.slow
def test_two_stages_are_interrupted_and_go_on_each_in_its_own(two_stages, at_step, assert_same_run, tmp_path):
    assert train.command(two_stages(tmp_path / "whole")) == 0
    argv = two_stages(tmp_path / "parts")
    run = tmp_path / "parts/tiny"
    assert at_step(5, interrupt) == []
    assert train.command(argv) == 130
    assert not (run / "diffusion").exists()
    trained = at_step(2, interrupt)
    assert train.command(argv) == 130
    assert trained == ["LatentDiffusionModule"], (
        "stage 1 was at step 5 and is done, the signal came in stage 2"
    )
    assert list(json.loads((run / "run.json").read_text())["stages"]) == ["autoencoder"]
    first = {path: path.stat().st_mtime_ns for path in (run / "autoencoder").rglob("*") if path.is_file()}
    assert train.command(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first, "stage 1 is not touched again"
    for stage in STAGES:
        assert_same_run(run / stage, tmp_path / "whole/tiny" / stage)
    record = (run / "run.json").read_text()
    assert train.command(argv) == 0, "a finished run trains no more"
    assert json.loads(record)["stages"] == json.loads((run / "run.json").read_text())["stages"]
    assert_same_run(run / "diffusion", tmp_path / "whole/tiny/diffusion")


@pytest.mark.slow
def test_a_process_that_dies_in_a_step_loses_the_steps_since_the_checkpoint_alone(
    two_stages, process, assert_same_run, rows, tmp_path
):
    assert train.command(two_stages(tmp_path / "whole")) == 0
    argv = two_stages(tmp_path / "parts")
    run = tmp_path / "parts/tiny"
    died = process(argv, at=("LatentDiffusionModule", 6))
    output, _ = died.communicate(timeout=120)
    assert died.returncode == 9, output
    assert native.newest(run / "diffusion/checkpoints").name == "step-000000003"
    assert rows(run / "diffusion")[-1][0] == "4", "the log is ahead of the checkpoint"
    assert train.command(argv) == 0
    for stage in STAGES:
        assert_same_run(run / stage, tmp_path / "whole/tiny" / stage)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_loader_workers_too(
    recipe, process, rows, assert_same_run, tmp_path
):
    """A terminal signals the whole process group: the workers must go on until the trainer has saved."""
    whole = recipe(2, "whole", "data.num_workers=2")
    assert train.command(whole) == 0
    argv = recipe(2, "parts", "data.num_workers=2")
    one = process(argv, step_time=0.3)
    wait_for_step_2(one, tmp_path / "parts", rows)
    os.killpg(one.pid, signal.SIGINT)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 130, output
    assert "Traceback" not in output
    assert 2 <= state(tmp_path / "parts")["step"] < 7
    assert train.command(argv) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def wait_for_step_2(one, run, rows):
    while not ((run / "metrics.csv").exists() and ("2", "train/loss") in [row[:2] for row in rows(run)]):
        assert one.poll() is None, one.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
def test_the_second_ctrl_c_does_not_wait_for_the_step(recipe, process, rows, tmp_path):
    one = process(recipe(1, "stuck"), step_time=3.0)
    wait_for_step_2(one, tmp_path / "stuck", rows)
    for _ in range(2):
        os.kill(one.pid, signal.SIGINT)
        time.sleep(0.3)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 130, output
    assert "Traceback" not in output
    assert native.newest(tmp_path / "stuck/checkpoints") is None, "step 3 would have been saved"


@pytest.mark.fault(18)
def test_one_process_a_run(recipe, tmp_path, refused):
    argv = recipe(1, "taken")
    with RunDirectory(tmp_path, "taken").lock():
        line = refused(argv)
        assert line.startswith(f"{tmp_path}/taken/run.lock: held by pid {os.getpid()} on ")
        assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == ["run.lock"]
    assert train.command(argv) == 0


def test_another_config_is_another_run(recipe, tmp_path, refused):
    assert train.command(recipe(1, "mine")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    assert before[tmp_path / "mine/run.lock"] == b"", "let go"
    line = refused(recipe(1, "mine", "optimizer.lr=0.01", "trainer.max_steps=9"))
    assert "optimizer.lr=0.001" in line
    assert "0.01" in line
    assert "run_name" in line
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("stage", [1, 2])
def test_more_steps_go_on_from_the_end(stage, recipe, assert_same_run, tmp_path):
    assert train.command(recipe(stage, "whole", "trainer.max_steps=6")) == 0
    assert train.command(recipe(stage, "longer", "trainer.max_steps=4")) == 0
    assert train.command(recipe(stage, "longer", "trainer.max_steps=6")) == 0
    assert_same_run(tmp_path / "longer", tmp_path / "whole")
    assert "6 steps" in RunDirectory(tmp_path, "longer").finished("")


def test_more_steps_under_a_decaying_schedule_are_asked_for_by_name(recipe, tmp_path, refused):
    cosine = ["lr_schedule=cosine", "trainer.max_steps=4"]
    assert train.command(recipe(1, "short", *cosine)) == 0
    line = refused(recipe(1, "short", *cosine, "trainer.max_steps=6"))
    assert "lr_schedule.total=4, the config says 6" in line
    assert train.command(recipe(1, "short", *cosine, "trainer.max_steps=6", "lr_schedule.total=4")) == 0
    assert state(tmp_path / "short")["step"] == 6


def test_a_finished_stage_whose_last_words_were_lost_says_them_again(recipe, tmp_path):
    """Killed between the last checkpoint and the note that the stage is done."""
    argv = recipe(1, "done")
    assert train.command(argv) == 0
    said = RunDirectory(tmp_path, "done").finished("")
    assert re.fullmatch(r"done         7 steps      0:\d\d   PSNR \d+\.\d dB", said)
    record = tmp_path / "done/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"stages": {}}))
    newest = native.newest(tmp_path / "done/checkpoints")
    before = (newest.stat().st_mtime_ns, (tmp_path / "done/metrics.csv").read_bytes())
    assert train.command(argv) == 0
    again = RunDirectory(tmp_path, "done").finished("")
    assert again.split("PSNR")[1] == said.split("PSNR")[1]
    assert (newest.stat().st_mtime_ns, (tmp_path / "done/metrics.csv").read_bytes()) == before


def test_a_longer_stage_1_is_not_measured_before_its_new_end(recipe, tmp_path):
    """Stage 2 refuses an autoencoder whose latent shift and scale belong to older weights."""
    assert train.command(recipe(1, "longer", "callbacks.checkpoint.keep_last=3")) == 0
    more = ["callbacks.checkpoint.keep_last=3", "trainer.max_steps=10"]
    assert train.command(recipe(1, "longer", *more)) == 0
    steps = sorted((tmp_path / "longer/checkpoints").glob("step-*"))
    measured = {int(path.name[-2:]): state(path)["latents_measured"] for path in steps}
    assert measured == {7: 12, 9: 0, 10: 12}


def test_resume_takes_the_full_state_of_another_run(recipe, rows, assert_same_run, tmp_path):
    assert train.command(recipe(2, "whole")) == 0
    assert train.command(recipe(2, "start", "trainer.max_steps=5")) == 0
    taken = {path: path.read_bytes() for path in (tmp_path / "start").rglob("*") if path.is_file()}
    assert train.command(recipe(2, "branch", f"resume={tmp_path}/start")) == 0
    assert {path: path.read_bytes() for path in taken} == taken
    whole = rows(tmp_path / "whole")
    (tmp_path / "whole/metrics.csv").write_text(
        "\n".join(["step,name,value", *(",".join(row) for row in whole if int(row[0]) > 5)])
    )
    assert_same_run(tmp_path / "branch", tmp_path / "whole")


def test_init_from_takes_the_averaged_weights_and_starts_anew(recipe, tmp_path):
    assert train.command(recipe(2, "first")) == 0
    argv = recipe(2, "second", f"init_from={tmp_path}/first", "optimizer.lr=0.0", "trainer.max_steps=3")
    assert train.command(argv) == 0
    found, source = (native.resolve(tmp_path / name) for name in ("second", "first"))
    average = native.load_tensors(source, "ema")
    raw = native.load_tensors(source, "model")
    assert any(not torch.equal(raw[name], value) for name, value in average.items())
    for kind in ("model", "ema"):
        for name, value in native.load_tensors(found, kind).items():
            torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-7)
    assert state(found)["step"] == 3
    assert native.load_document(found, "data.json")["samples"] == 12


def test_a_moved_run_goes_on_and_samples(recipe, at_step, assert_same_run, tmp_path, autoencoder_run):
    assert train.command(recipe(2, "whole")) == 0
    at_step(4, interrupt)
    assert train.command(recipe(2, "here")) == 130
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").rename(tmp_path / "elsewhere/there")
    there = [f"run_root={tmp_path}/elsewhere", "run_name=there"]
    assert train.command(recipe(2, "here", *there)) == 0
    assert_same_run(tmp_path / "elsewhere/there", tmp_path / "whole")
    (tmp_path / "elsewhere/there").rename(tmp_path / "moved")
    pictures = [ldm.load(tmp_path / name)("one", num_steps=2)[0].tobytes() for name in ("moved", "whole")]
    assert pictures[0] == pictures[1]


def held_by(one, lock):
    """Wait until the process has imported all it needs and holds the lock of the run."""
    while f"pid {one.pid} " not in (lock.read_text() if lock.exists() else ""):
        assert one.poll() is None, one.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.fault(1)
def test_sigkill_at_random_moments(two_stages, process, assert_same_run, trials, counted, tmp_path):
    """Also while networks are built, files written, stages changed."""
    more = ["trainer.max_steps=30", "callbacks.checkpoint.every=4", "callbacks.metrics.every=3"]
    whole = process(two_stages(tmp_path / "whole", *more))
    held_by(whole, tmp_path / "whole/tiny/run.lock")
    started = time.monotonic()
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    took = time.monotonic() - started

    moments = random.Random(0)
    for trial in range(trials(1, 13)):
        root = tmp_path / f"parts{trial}"
        argv = two_stages(root, *more)
        for _ in range(4):
            one = process(argv)
            held_by(one, root / "tiny/run.lock")
            time.sleep(moments.uniform(0.02, 0.4) * took)
            assert one.poll() is None, "the moments are too late to tell anything"
            one.kill()
            one.communicate()
        last = process(argv)
        output, _ = last.communicate(timeout=300)
        assert last.returncode == 0, output
        for stage in STAGES:
            assert_same_run(root / "tiny" / stage, tmp_path / "whole/tiny" / stage)
        left = [path for path in root.rglob("*") if ".tmp-" in path.name or path.suffix == ".new"]
        assert left == []
        counted(kills=4, deviations=0)
