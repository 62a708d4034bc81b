"""Two processes over gloo do what one process with the double batch does, and go on after a stop."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import native
from ldm.config import build, compose
from ldm.random import keyed_normal, keyed_uniform

ROOT = Path(__file__).parents[2]
EXACT = ["trainer=cpu", "trainer.precision=64-true", "lr_schedule.warmup=0", "optimizer.fused=false"]
TWO = ["trainer.strategy=ddp", "trainer.devices=2"]


def run(*overrides):
    """train.py as a user starts it; Lightning starts the second process itself."""
    command = [sys.executable, ROOT / "train.py", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_double_batch(tmp_path, data, small_diffusion):
    common = [*small_diffusion, *data, *EXACT, f"run_root={tmp_path}", "callbacks.checkpoint.every=2"]
    common += ["callbacks.validation.every=4", "callbacks.metrics.every=2"]
    run(*common, "run_name=one", "trainer.max_steps=4")
    run(*common, "run_name=two", "trainer.max_steps=4", *TWO)
    run(*common, "run_name=stopped", "trainer.max_steps=2", *TWO)
    run(*common, "run_name=stopped", "trainer.max_steps=4", *TWO)

    def weights(name):
        return native.load_tensors(native.resolve(tmp_path / name), "model")

    one, two, stopped = (weights(name) for name in ("one", "two", "stopped"))
    before = native.load_tensors(tmp_path / "one/checkpoints/step-000000002", "model")
    assert any(not torch.equal(one[name], before[name]) for name in one), "something was learned"
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(stopped[name], two[name]), f"{name} after a stop"
    rows = {name: (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")}
    for name in ("train/loss,", "validation/loss,"):
        figures = [[float(row.split(",")[2]) for row in rows[run] if name in row] for run in rows]
        assert len(figures[0]) > 0
        assert figures[1] == pytest.approx(figures[0], rel=1e-6), "the log is of all ranks, written once"


def test_ranks_draw_other_noise_and_times_and_the_same_again(data, small_diffusion):
    cfg = compose("train", [*small_diffusion, *data, "run_name=x", "trainer=cpu"])
    datamodule = build(cfg.data)
    ranks = [next(iter(datamodule.stream(rank, 2, start=40))).n for rank in (0, 1)]
    again = [next(iter(datamodule.stream(rank, 2, start=40))).n for rank in (0, 1)]
    assert sorted(torch.cat(ranks).tolist()) == [40, 41, 42, 43]
    for draw in (lambda n: keyed_normal(0, n, "noise", (4, 2, 2)), lambda n: keyed_uniform(0, n, "time")):
        first, second = (draw(n) for n in ranks)
        assert not torch.isclose(first, second).any()
        assert torch.equal(first, draw(again[0]))
