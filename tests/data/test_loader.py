"""Loader workers that die, hang or end: what the training process sees of it."""

import os
import signal
import threading
import time
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data import loader
from ldm.data.datamodule import ShardDataModule
from ldm.data.health import Budget, Health
from ldm.data.loader import BY_VALUE, Crew, by_value, join
from ldm.errors import InputError


class Deadly:
    """A tokenizer that kills its process at picture 40, as often as the file says."""

    def __init__(self, file, times):
        self.file = Path(file)
        self.file.write_text(str(times))

    def __call__(self, captions):
        left = int(self.file.read_text())
        if left and any(caption.endswith(" 40") for caption in captions):
            self.file.write_text(str(left - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(captions), 1, dtype=torch.int64)


class Wrong:
    """A tokenizer with a bug."""

    def __call__(self, captions):
        raise KeyError("of a worker")


@pytest.fixture
def module(shards):
    def make(**options):
        settings = {"image_size": 8, "global_batch_size": 12, "seed": 1, "crop": "random", "flip": 0.5}
        return ShardDataModule(str(shards), **settings | options)

    return make


def take(stream, count):
    return list(islice(stream, count))


def seen(batches):
    """(n, key, picture) of every sample, in order, and the digest of them."""
    health = Health(Budget())
    rows = []
    for batch in batches:
        health.add(batch)
        pixels = [image.numpy().tobytes() for image in batch.image]
        rows += zip(batch.n.tolist(), batch.key, pixels, strict=True)
    health.agree(len(rows))
    return rows, health.digest


def kill_a_worker(number):
    workers = sorted(active_children(), key=lambda child: child.pid)
    os.kill(workers[number % len(workers)].pid, signal.SIGKILL)


@pytest.mark.parametrize(("context", "accumulate"), [("fork", 1), ("fork", 3), ("forkserver", 1)])
def test_a_killed_worker_costs_nothing(module, context, accumulate, caplog):
    before = signal.getsignal(signal.SIGCHLD)
    whole = seen(take(module().stream(accumulate=accumulate), 21))
    stream = iter(module(multiprocessing_context=context).stream(accumulate=accumulate, num_workers=2))
    batches = take(stream, 1)
    for number in (0, 1):
        kill_a_worker(number)
        time.sleep(0.1)  # its death must not raise here, in the middle of a step
        batches += take(stream, 10)
    assert seen(batches) == whole
    assert caplog.text.count("was killed by signal 9") == 2
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_killed_worker_of_validation_costs_nothing(module):
    whole = seen(module(validation_filters=[]).validation_stream(num_workers=0))
    stream = iter(module(validation_filters=[], prefetch_factor=1).validation_stream(num_workers=2))
    batches = take(stream, 1)
    kill_a_worker(0)
    assert seen(batches + list(stream)) == whole


@pytest.mark.parametrize("times", [1, 3])
def test_a_sample_that_kills_some_workers(module, tmp_path, times, caplog):
    whole = seen(take(module().stream(), 6))
    data = module(tokenize=Deadly(tmp_path / "times", times), prefetch_factor=1)
    assert seen(take(data.stream(num_workers=1), 6)) == whole
    assert caplog.text.count("starts again") == times


def test_a_sample_that_kills_every_worker_is_an_error(module, tmp_path):
    data = module(tokenize=Deadly(tmp_path / "times", 99), prefetch_factor=1)
    whole = seen(take(module().stream(), 6))[0]
    fatal = next(n for n, key, _ in whole if key.endswith("/000000040"))
    stream, batches = iter(data.stream(num_workers=2)), []
    message = (
        r"was killed by signal 9, 4 times at the same place; if memory ran out, lower data.num_workers=2"
    )
    with pytest.raises(InputError, match=message) as error:
        batches += iter(lambda: next(stream), None)
    assert error.value.every_rank
    assert len(batches) == fatal // 12, "all that came before"
    assert int((tmp_path / "times").read_text()) == 99 - 4


def test_a_worker_that_died_with_half_a_message_does_not_hang_the_run(module, monkeypatch):
    """The thread then reads for ever; the main thread sees the process."""
    whole = seen(take(module().stream(), 6))
    reads, gate, original = threading.Event(), threading.Event(), loader.join

    def half_read(parts, pin):
        if parts[0]["n"][0] == 24 and not reads.is_set():
            reads.set()
            gate.wait()
        return original(parts, pin)

    monkeypatch.setattr(loader, "join", half_read)
    stream = iter(module(num_workers=2).stream())
    batches = take(stream, 2)
    assert reads.wait(30)
    kill_a_worker(1)
    batches += take(stream, 4)
    gate.set()
    assert seen(batches) == whole


def test_a_workers_own_error_is_that_error(module):
    with pytest.raises(KeyError, match="of a worker"):
        take(module(tokenize=Wrong()).stream(num_workers=1), 1)


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_workers_end_with_their_loader(module, batches):
    def running():
        """Not the readers: those of other tests may still wait for a server that does not answer."""
        return {*active_children(), *(t for t in threading.enumerate() if not t.name.startswith("ldm read"))}

    before = running()
    take(module().stream(num_workers=2), batches)
    end = time.monotonic() + 10
    while running() - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not running() - before


def test_what_is_made_ahead_is_bounded():
    made = []

    def parts():
        for n in range(1000):
            made.append(n)
            yield {"n": np.array([n]), "weight": np.ones(1, np.float32)}

    crew = Crew(parts, 1, False)
    assert crew.batches.get(timeout=60).n.tolist() == [0]
    time.sleep(0.2)
    assert len(made) <= 3
    crew.close()


def test_join_keeps_the_order():
    parts = [
        {
            "n": np.array([2 * i, 2 * i + 1]),
            "weight": np.ones(2, np.float32),
            "image": torch.full((2, 3, 2, 2), i, dtype=torch.uint8),
            "events": [(i, "missing", 2 * i)],
        }
        for i in range(3)
    ]
    batch = join(parts, False)
    assert batch.n.tolist() == list(range(6))
    assert batch.image[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.events == [(0, "missing", 0), (1, "missing", 2), (2, "missing", 4)]


@pytest.mark.parametrize("side", [9, 400])
def test_small_tensors_travel_by_value_and_join_to_the_same(side):
    parts = []
    for value, count in ((0.0, 1), (1.0, 2)):
        image = torch.full((count, 3, side, side), value)
        sent = by_value({"n": np.arange(count), "weight": np.ones(count, np.float32), "image": image})
        assert (sent["image"] is image) == (image.nbytes > BY_VALUE)
        parts.append(sent)
    whole = join(parts, False)
    assert whole.image.shape == (3, 3, side, side)
    assert whole.image.mean((1, 2, 3)).tolist() == [0, 1, 1]
    assert whole.n.tolist() == [0, 0, 1]
