"""speed.cuda_graph: forward and backward of a step recorded once and replayed, and the run is the same."""

import pytest
import torch

import train
from ldm import random
from ldm.training import graphed, loop
from tests.taped import Recorder

ON = "speed.cuda_graph=true"
LONGER = ("trainer.max_steps=7", "callbacks.metrics.every=3")


@pytest.fixture
def recorder(monkeypatch):
    """Steps are recorded by the stand-in, and draw their noise by torch's operations as on a GPU."""
    made = Recorder()
    monkeypatch.setattr(graphed, "recorded", made)
    monkeypatch.setattr(graphed, "_may_record", lambda device: True)
    monkeypatch.setattr(random, "_arrays", lambda n: (torch, n.to(torch.int64).reshape(-1, 1)))
    return made


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_with_it_is_the_run_without(
    stage, precision, recipe, recorder, assert_same_run, monkeypatch, tmp_path
):
    steps = (*LONGER, f"trainer.precision={precision}")
    assert train.command(recipe(stage, "plain", *steps)) == 0
    computed, compute = [], graphed.GraphedStep._compute
    monkeypatch.setattr(
        graphed.GraphedStep, "_compute", lambda self, batch: computed.append(1) or compute(self, batch)
    )
    assert train.command(recipe(stage, "graphed", *steps, ON)) == 0
    assert len(recorder.tapes) == 1
    assert len(computed) == 2, "to warm up and to record: Python sees none of the seven steps"
    assert_same_run(tmp_path / "graphed", tmp_path / "plain")


def test_it_is_interrupted_and_resumed(recipe, recorder, assert_same_run, tmp_path):
    assert train.command(recipe(2, "plain", *LONGER)) == 0
    assert train.command(recipe(2, "graphed", *LONGER[1:], "trainer.max_steps=4", ON)) == 0
    assert train.command(recipe(2, "graphed", *LONGER, ON)) == 0
    assert len(recorder.tapes) == 2
    assert_same_run(tmp_path / "graphed", tmp_path / "plain")


GAN = ["module=autoencoder_gan", "module.latent_samples=12", "module.start=0", "discriminator=patchgan"]
GAN += [f"discriminator.{setting}" for setting in ("width=8", "layers=1", "norm_groups=4")]
REFUSED = {
    "accumulating": (2, ["trainer.accumulate_grad_batches=2"], "makes whole gradients; trainer.acc"),
    "dropout": (2, ["++backbone.dropout=0.1"], "would replay the first step's dropout; set dropout=0.0"),
    "adversarial": (1, GAN, "does not move codebooks or discriminators"),
    "ranks": (2, ["trainer.devices=2", "trainer.strategy=ddp"], "is of one process"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_do_is_refused(name, recipe, recorder, refused):
    stage, overrides, words = REFUSED[name]
    assert f"speed.cuda_graph: {words}" in refused(recipe(stage, "run", *overrides, ON))


def test_without_a_gpu_it_is_refused(recipe, refused):
    assert "speed.cuda_graph: there is no GPU to record one on" in refused(recipe(2, "run", ON))


def test_a_profiler_or_another_size_of_batch_is_refused(recipe, recorder, refused, monkeypatch):
    assert "speed.cuda_graph: a profiler hears of each" in refused(recipe(2, "profiled", ON, "debug=profile"))
    advance = loop.StepLoop._train

    def smaller(self, batch, index):
        rows = {name: t[:-1] for name, t in batch.tensors().items()}
        return advance(self, graphed.replace(batch, **rows) if self.global_step else batch, index)

    monkeypatch.setattr(loop.StepLoop, "_train", smaller)
    assert "speed.cuda_graph: batches are of several sizes" in refused(recipe(2, "run", ON))


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2])
def test_on_a_gpu_a_run_with_it_is_the_run_without(stage, recipe, rows, tmp_path):
    steps = (*LONGER, "trainer.accelerator=gpu", "trainer.devices=1")
    for name, more in (("plain", ()), ("graphed", (ON,))):
        assert train.command(recipe(stage, name, *steps, *more)) == 0
    plain, found = (
        {key: value for key, value in rows(tmp_path / name).items() if "loss" in str(key)}
        for name in ("plain", "graphed")
    )
    assert found == pytest.approx(plain, rel=1e-4)
