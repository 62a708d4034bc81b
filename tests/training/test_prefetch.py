"""The next batch is copied beside the step: what waits for what, and what is consumed."""

from contextlib import contextmanager

import pytest
import torch

import train
from ldm.training import loop
from ldm.training.prefetch import Prefetch
from ldm.types import Batch


class FakeStream:
    def __init__(self, name, heard):
        self.name, self.heard = name, heard

    def record_event(self):
        self.heard.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event):
        self.heard.append(f"{self.name} waits for {event}")


class FakeCuda:
    """As much of torch.cuda as `Prefetch` uses; notes what is asked, in which stream."""

    def __init__(self):
        self.heard = []
        self.now = self.main = FakeStream("main", self.heard)

    def Stream(self, device):
        return FakeStream("side", self.heard)

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


def watched(monkeypatch, cuda):
    """Let batches tell `cuda` of their copies, which are real copies, and of what their memory waits for."""

    original = Batch.to

    def to(self, device, non_blocking=False):
        if not non_blocking:  # validation's
            return original(self, device)
        cuda.heard.append(f"{cuda.now.name} copies {int(self.n[0])}")
        return Batch(**{**vars(self), **{k: v.clone() for k, v in self.tensors().items()}})

    monkeypatch.setattr(Batch, "to", to)
    record = lambda tensor, stream: cuda.heard.append(f"{stream.name} keeps")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)


def batch_of(n):
    return Batch(torch.tensor([n]), torch.ones(1), caption=["a"])


def test_a_step_waits_for_its_copy_and_keeps_its_memory(monkeypatch):
    cuda = FakeCuda()
    watched(monkeypatch, cuda)
    prefetch, (first, second) = Prefetch(torch.device("cpu"), cuda), map(batch_of, (1, 2))
    taken = prefetch.take(first)
    assert cuda.heard == ["main copies 1"]
    assert torch.equal(taken.n, first.n)
    cuda.heard.clear()
    prefetch.start(second)
    assert cuda.heard == ["side copies 2", "side records"]
    cuda.heard.clear()
    assert torch.equal(prefetch.take(second).n, second.n)
    assert cuda.heard == ["main waits for event of side", "main keeps", "main keeps"], "n and weight"
    prefetch.start(first)
    cuda.heard.clear()
    assert int(prefetch.take(second).n) == 2, "another batch than the one that was copied"
    assert cuda.heard == ["main copies 2"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_run_with_it_is_the_run_without_it(micro_batches, recipe, assert_same_run, monkeypatch, tmp_path):
    accumulate = f"trainer.accumulate_grad_batches={micro_batches}"
    assert train.command(recipe(2, "without", accumulate)) == 0
    cuda = FakeCuda()
    watched(monkeypatch, cuda)
    monkeypatch.setattr(loop.StepLoop, "prefetch", Prefetch(torch.device("cpu"), cuda))
    assert train.command(recipe(2, "with", accumulate)) == 0
    assert_same_run(tmp_path / "with", tmp_path / "without")
    steps = cuda.heard.count("main waits for event of side") + 1
    assert cuda.heard[0].startswith("main copies"), "the first batch alone has nothing to hide behind"
    assert sum(line.startswith("main copies") for line in cuda.heard) == 1
    assert steps >= 5 * micro_batches


@pytest.mark.gpu
def test_on_a_gpu_what_a_slow_step_reads_is_not_overwritten():
    device = torch.device("cuda", 0)
    prefetch = Prefetch(device)
    batches = [
        Batch(torch.arange(4), torch.ones(4), image=torch.full((4, 3, 512, 512), k).byte().pin_memory())
        for k in range(20)
    ]
    sums = []
    for k, batch in enumerate(batches):
        moved = prefetch.take(batch)
        if k + 1 < len(batches):
            prefetch.start(batches[k + 1])
        torch.cuda._sleep(10_000_000)
        assert moved.image.device == device
        sums.append(moved.image.float().mean())
        del moved
    assert torch.stack(sums).tolist() == [float(k) for k in range(20)]
