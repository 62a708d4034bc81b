"""Signals: each ends a run saved, on all ranks after the same step, without a wait in any step."""

import itertools
import os
import random
import re
import signal
import time

import pytest
import torch

import train
from ldm.checkpoints import native
from ldm.checkpoints.writer import Writer
from ldm.data.loader import Loader
from ldm.errors import REQUEUE
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.guard import SIGNALS, Guard

G = 4  # samples an optimizer step


@pytest.fixture
def around(monkeypatch):
    """(owner, name, at) -> `at(owner's self)` is called before each call of that function."""

    def arrange(owner, name, at):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            at(*args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    return arrange


# ---- signals


MOMENTS = {  # where a run is when a signal comes: (owner, function, calls that it may come in)
    "forward": (AutoencoderModule, "training_step", range(1, 6)),
    "backward": (torch.Tensor, "backward", range(1, 6)),
    "optimizer": (torch.optim.AdamW, "step", range(1, 6)),
    "validation": (AutoencoderModule, "validation_terms", range(2)),
    "save": (Writer, "submit", range(1)),  # of the second the last step would be the next
    "data": (Loader, "__iter__", range(2, 6)),
}


@pytest.mark.fault(3)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_the_run_saved(
    moment, recipe, assert_same_run, monkeypatch, trials, counted, tmp_path
):
    owner, name, moments = MOMENTS[moment]
    original, first = getattr(owner, name), list(MOMENTS).index(moment)
    assert train.command(recipe(1, "whole")) == 0
    for trial in range(trials(1, 20)):
        number = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)[(first + trial) % 3]
        before_training, calls = signal.getsignal(number), itertools.count()
        before, run = moments[trial % len(moments)], f"parts{trial}"

        def call(number=number, calls=calls, before=before, handler=before_training):
            if signal.getsignal(number) != handler and next(calls) == before:
                os.kill(os.getpid(), number)

        def wrapper(*args, call=call, **kwargs):
            call()
            return original(*args, **kwargs)

        def batches(self, call=call):
            for batch in original(self):
                call()
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, batches if moment == "data" else wrapper)
            assert train.command(recipe(1, run)) == REQUEUE
        assert signal.getsignal(number) == before_training
        assert next(calls) > before
        step = native.load_document(native.resolve(tmp_path / run), "state.json")["step"]
        assert 2 <= step < 7, "the step that was being made, or the next"
        assert train.command(recipe(1, run)) == 0
        assert_same_run(tmp_path / run, tmp_path / "whole")
        counted(signals=1, lost_steps=0)


SKEWED = """
import os, sys, time
from pathlib import Path
import ldm.config
ldm.config.CONFIG_DIR = Path({configs!r})
import train
from ldm.training.autoencoder_module import AutoencoderModule

original, slow = AutoencoderModule.training_step, os.environ.get("LOCAL_RANK", "0") == "1"


def training_step(self, *args):
    time.sleep(0.2 if slow else 0.01)
    Path(os.environ["PIDS"], str(os.getpid())).write_text(str(self.global_rank))
    return original(self, *args)


AutoencoderModule.training_step = training_step
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.fault(4)
def test_a_signal_to_one_of_two_skewed_ranks_stops_both(
    recipe, process, rows, two_stage_configs, trials, counted, tmp_path
):
    """Stock Lightning hung here five times of five: it saves inside the handler, which ends in a barrier."""
    moments = random.Random(0)
    for trial in range(trials(1, 20)):
        pids = tmp_path / f"pids{trial}"
        pids.mkdir()
        argv = recipe(
            1, f"run{trial}", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=10000"
        )
        argv.append("callbacks.checkpoint.every=5000")
        one = process(argv, source=SKEWED.format(configs=str(two_stage_configs)), env={"PIDS": str(pids)})
        end = time.monotonic() + 120
        found = {}
        while not {"0", "1"} <= found.keys():
            found = {path.read_text(): int(path.name) for path in pids.iterdir()}
            assert one.poll() is None, one.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(moments.uniform(1, 3))
        os.kill(found[str(trial % 2)], signal.SIGTERM)
        began = time.monotonic()
        output, _ = one.communicate(timeout=60)
        counted(signals=1, seconds=time.monotonic() - began)
        assert one.returncode == REQUEUE, output
        state = native.load_document(native.resolve(tmp_path / f"run{trial}"), "state.json")
        assert state["step"] >= int(rows(tmp_path / f"run{trial}")[-1][0]), "no step is lost"


def test_lightning_installs_no_handler_and_hears_of_no_signal(recipe, around, monkeypatch):
    """Under Slurm as well, where it has one that saves inside the handler and requeues."""
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def look(module, *_):
        connector = module.trainer._signal_connector
        handlers = [signal.getsignal(number) for number in SIGNALS]
        seen.append((handlers, dict(connector._original_handlers), connector.received_sigterm))

    around(AutoencoderModule, "training_step", look)
    assert train.command(recipe(1, "run", "trainer.max_steps=2")) == 0
    assert len(seen) == 2
    for handlers, original, received in seen:
        assert all(handler.__func__ is Guard._flag for handler in handlers)
        assert not original
        assert not received
    assert [signal.getsignal(number) for number in SIGNALS] == before


COUNTING = """
import collections, sys
from pathlib import Path
import torch.distributed as dist
import ldm.config
ldm.config.CONFIG_DIR = Path({configs!r})
import train
from ldm.training.module import TrainingModule

counts, rows, sent = collections.Counter(), [], TrainingModule.on_train_batch_start
for name in ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object"):
    def counting(*args, call=getattr(dist, name), name=name, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)
    setattr(dist, name, counting)


def on_train_batch_start(self, *args):
    rows.append(dict(counts))
    counts.clear()
    return sent(self, *args)


TrainingModule.on_train_batch_start = on_train_batch_start
if __name__ == "__main__":
    code = train.command(sys.argv[1:])
    if self_rank := __import__("os").environ.get("LOCAL_RANK", "0") == "0":
        print(f"CALLS {{rows}}\\n", end="")
    sys.exit(code)
"""


@pytest.mark.slow
def test_two_ranks_ask_each_other_every_fourth_step_and_nothing_else(
    recipe, process, two_stage_configs, data
):
    quiet = [f"callbacks.{name}.every=100" for name in ("metrics", "validation", "pictures", "checkpoint")]
    argv = recipe(1, "run", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=10", *quiet)
    one = process(argv, source=COUNTING.format(configs=str(two_stage_configs)))
    output, _ = one.communicate(timeout=200)
    assert one.returncode == 0, output
    rows = eval(re.search(r"CALLS (\[.*\])", output)[1])
    assert rows[1:] == [{"all_reduce": 1} if step % 4 == 0 else {} for step in range(1, 10)]


def test_an_answer_is_the_largest_of_all_ranks_and_comes_when_it_is_asked_for():
    """Without a process group: what one process asks it hears."""
    from ldm.training.callbacks.guard import Question

    question = Question(8, [12, 1], torch.tensor(3), torch.device("cpu"), shared=False)
    assert question.step == 8
    assert question.answer() == [12, 1, 3]
