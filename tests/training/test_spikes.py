"""Steps whose loss leaps are named with their samples; nothing else is, and training knows nothing of it."""

import csv
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.spikes import NAMED, SpikeLog, usual_before
from ldm.training.module import TrainingModule

STEPS = ["trainer.max_steps=40", "callbacks.metrics.every=5", "callbacks.spikes.window=64"]
RARE = [f"callbacks.{name}.every=100" for name in ("checkpoint", "validation", "pictures")]
BAD = "/000000017"  # the sample that is poisoned


def spikes(folder):
    with (folder / "spikes.csv").open(newline="") as file:
        return [
            (int(row["step"]), float(row["loss"]), row["keys"].split(";")) for row in csv.DictReader(file)
        ]


@pytest.fixture
def poisoned(monkeypatch):
    """Micro-batches with the sample have 50 times the loss; gives {step: [keys, loss, poisoned]}."""
    seen, original = {}, AutoencoderModule.training_step

    def training_step(self, batch, batch_idx):
        bad = any(key.endswith(BAD) for key in batch.key)
        loss = original(self, batch, batch_idx) * (50 if bad else 1)
        step = seen.setdefault(self.trainer.global_step + 1, [[], 0.0, False])
        step[0] += batch.key
        step[1] += float(loss.detach()) / self.trainer.accumulate_grad_batches
        step[2] |= bad
        return loss

    monkeypatch.setattr(AutoencoderModule, "training_step", training_step)
    return seen


@pytest.mark.parametrize("micro_batches", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_the_steps_of_a_poisoned_sample_are_listed_and_no_other(
    micro_batches, poisoned, recipe, rows, tmp_path, caplog
):
    more = [*STEPS, *RARE, f"trainer.accumulate_grad_batches={micro_batches}"]
    assert train.command(recipe(1, "run", *more)) == 0
    expected = {step: (keys, loss) for step, (keys, loss, bad) in poisoned.items() if bad and step > 16}
    assert len(expected) >= 2, "once in each pass over the 40 samples"
    found = spikes(tmp_path / "run")
    assert {step: keys for step, _, keys in found} == {step: keys for step, (keys, _) in expected.items()}
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss in expected.values()], rel=1e-5)
    counts = {int(step): float(n) for step, name, n in rows(tmp_path / "run") if name == "train/loss_spikes"}
    assert counts == {row: sum(row - 5 < step <= row for step in expected) for row in range(5, 41, 5)}
    lines = [record.getMessage() for record in caplog.records if "were usual" in record.getMessage()]
    assert len(lines) == len(expected)
    for line, (step, (keys, _)) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"step {step}: loss ")
        assert line.endswith(", ".join(keys))
        assert line in (tmp_path / "run/log.txt").read_text()


def test_a_run_in_parts_lists_what_a_whole_one_does(poisoned, recipe, assert_same_run, tmp_path):
    """Also a spike between the last row of the log and the checkpoint; rows ahead of that are cut."""
    assert train.command(recipe(1, "whole", *STEPS, *RARE)) == 0
    expected = spikes(tmp_path / "whole")
    last = expected[-1][0]
    for steps in (expected[0][0], last - 1, last):
        argv = recipe(1, "parts", *STEPS[1:], *RARE, f"trainer.max_steps={steps}")
        assert train.command(argv) == 0
        with (tmp_path / "parts/spikes.csv").open("a") as file:
            file.write(f"{steps + 1},9,9,9,a;b\r\n")
        (tmp_path / "parts/spikes-rank-00001.csv").write_text(
            f"step,loss,median,mad,keys\r\n{steps},1,1,1,c\r\n{steps + 1},1,1,1,c\r\n"
        )
    assert train.command(recipe(1, "parts", *STEPS, *RARE)) == 0
    assert spikes(tmp_path / "parts") == expected
    other = (tmp_path / "parts/spikes-rank-00001.csv").read_text()
    assert other.splitlines()[1:] == [f"{last},1,1,1,c"], "another rank's too"
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_ordinary_run_has_none_and_is_the_same_without_the_log(stage, recipe, tmp_path):
    assert train.command(recipe(stage, "with", *STEPS, *RARE)) == 0
    assert train.command(recipe(stage, "without", *STEPS[:2], *RARE, "callbacks.spikes=null")) == 0
    assert not (tmp_path / "with/spikes.csv").exists()
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-000000040/{name}.safetensors"
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()


def test_no_step_but_those_of_the_log_reads_a_number(recipe, monkeypatch):
    """The dispatcher does not see `tolist` on a CPU, so it is counted where it is called."""
    now, read = [None], set()
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def noting(self, *args, original=original):
            read.add(now[0])
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, noting)
    start, end = TrainingModule.on_train_batch_start, TrainingModule.on_train_batch_end

    def on_start(self, batch, batch_idx):
        start(self, batch, batch_idx)  # a generator on the host
        now[0] = self.trainer.global_step + 1

    def on_end(self, outputs, batch, batch_idx):
        now[0] = None
        end(self, outputs, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", on_start)
    monkeypatch.setattr(TrainingModule, "on_train_batch_end", on_end)
    monkeypatch.setattr(TrainingModule, "on_host", False)  # as on a GPU
    often = ["trainer.max_steps=11", "callbacks.metrics.every=4", "trainer.accumulate_grad_batches=2"]
    assert train.command(recipe(1, "run", *often, *RARE)) == 0
    assert {4, 8} <= read - {None} <= {4, 8, 11}, "11 is the last"


def judged(log, before, loss):
    """(median, MAD, whether it is a spike) of one loss after those before."""
    ((middle, mad),) = usual_before([loss], before, log.window)
    return middle, mad, log.is_spike(loss, middle, mad, len(before))


def test_what_a_spike_is():
    log = SpikeLog(Path("x"), rows=5, window=64, mads=6)
    before = [float(i) for i in range(17)]  # median 8, MAD 4
    assert judged(log, before, 32.0) == (8, 4, False)
    assert judged(log, before, 32.001) == (8, 4, True)
    assert not judged(log, before[:15], 1e9)[2], "too few to tell"
    assert judged(log, before, math.inf)[2]
    assert judged(log, [], math.nan)[2]
    assert not judged(log, [2.0] * 17, 2.01)[2], "equal but for rounding"
    assert judged(log, [2.0] * 17, 2.02)[2]


@pytest.mark.parametrize("known", [0, 3, 15, 16, 40])
def test_what_was_usual_is_that_of_the_window_before_each(known):
    window, drawn = 16, np.random.default_rng(known).normal(size=known + 20).tolist()
    before, losses = drawn[:known][-window:], drawn[known:]
    losses[4], losses[9] = math.nan, math.inf
    usual = usual_before(losses, before, window)
    for i, (middle, mad) in enumerate(usual):
        last = [x for x in [*before, *losses[:i]] if math.isfinite(x)][-window:]
        if not last:
            assert math.isnan(middle)
            continue
        assert middle == statistics.median(last)
        assert mad == statistics.median(abs(x - middle) for x in last)


def test_a_log_of_many_spikes_stays_short(tmp_path, caplog):
    log = SpikeLog(tmp_path, rows=5)
    found = [(step, "9", "1", "0.1", "a;b") for step in range(1, 31)]
    log._tell(found[:4], log.path(3))
    log._tell(found[4:], log.path(3))
    assert len((tmp_path / "spikes-rank-00003.csv").read_text().splitlines()) == 31
    assert len(caplog.records) == NAMED + 1
    assert caplog.records[-1].getMessage().startswith("more such steps are named in ")


@pytest.mark.parametrize(("name", "value"), [("window", 4), ("mads", 0)])
def test_settings_that_mean_nothing(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SpikeLog(Path("x"), rows=5, **{name: value})
