"""Progressive resolution: a second stage that starts from the weights of the first, at twice the size."""

import os
import shutil
import signal

import pytest

import train
from ldm.checkpoints import native
from ldm.config import CONFIG_DIR, compose
from ldm.errors import REQUEUE
from ldm.training.assembly import build_stages
from ldm.training.module import TrainingModule

EXPERIMENTS = {
    "growing": ["run_name: growing", "stages: [growing_16, growing_32]"],
    "growing_16": ["stage: low", "data: {image_size: 16}"],
    "growing_32": ["stage: high", "seed: 1", "data: {image_size: 32}", "init_from: ${run_dir}/low"],
}
FEW = [
    *("trainer.max_steps=4", "callbacks.checkpoint.every=2", "callbacks.validation.every=100"),
    "callbacks.pictures.every=100",
]


@pytest.fixture
def growing(recipe, tmp_path, monkeypatch):
    """(run_root, overrides) -> the command line of the run."""
    folder = shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    for name, lines in EXPERIMENTS.items():
        (folder / f"experiment/{name}.yaml").write_text("\n".join(["# @package _global_", *lines, ""]))
    monkeypatch.setattr("ldm.config.CONFIG_DIR", folder)
    common = [text for text in recipe(2, "x") if not text.startswith(("data.image_size=", "run_"))]
    return lambda root, *more, of="growing": [f"experiment={of}", *common, *FEW, f"run_root={root}", *more]


def test_the_second_stage_starts_from_the_average_of_the_first(growing, tmp_path):
    assert train.command(growing(tmp_path / "runs", "trainer.max_steps=2", "lr_schedule.warmup=1")) == 0
    run = tmp_path / "runs/growing"
    low, high = (native.load_tensors(native.resolve(run, stage), "ema") for stage in ("low", "high"))
    assert low.keys() == high.keys()
    norm, change = (
        sum(float(t.square().sum()) for t in ts) for ts in (low.values(), (high[k] - low[k] for k in low))
    )
    assert 0 < change < 1e-3 * norm
    assert native.resolve(run).parent.parent == run / "high"
    documents = (native.load_document(native.resolve(run, stage), "config.yaml") for stage in ("low", "high"))
    assert [f"image_size: {size}" in text for size, text in zip((16, 32), documents, strict=True)] == [
        True
    ] * 2


@pytest.mark.slow
def test_growing_resumes_bit_by_bit(growing, assert_same_run, tmp_path, monkeypatch):
    """Run whole; run with a signal in the middle of the second stage; and the second stage by hand."""
    assert train.command(growing(tmp_path / "whole")) == 0
    run, whole = tmp_path / "parts/growing", tmp_path / "whole/growing"
    original = TrainingModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        if self.trainer.global_step == 2 and self.trainer.datamodule.transform.size == 32:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "optimizer_step", optimizer_step)
        assert train.command(growing(tmp_path / "parts")) == REQUEUE
    assert native.resolve(run).parent.parent == run / "high", "the unfinished stage is the run's newest"
    assert train.command(growing(tmp_path / "parts")) == 0
    for stage in ("low", "high"):
        assert_same_run(run / stage, whole / stage)

    by_hand = growing(tmp_path, "run_name=hand", "stage=''", f"init_from={whole}/low", of="growing_32")
    assert train.command(by_hand) == 0
    assert_same_run(tmp_path / "hand", whole / "high")


def test_deterministic_reaches_torch_and_is_undone(recipe, monkeypatch):
    import torch

    seen = []
    original = TrainingModule.optimizer_step

    def flags():
        cublas = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, cublas

    def optimizer_step(self, *args, **kwargs):
        seen.append(flags())
        original(self, *args, **kwargs)

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    before = flags()
    for name, more in (("bits", ["deterministic=true"]), ("free", [])):
        assert train.command(recipe(1, name, "trainer.max_steps=1", *more)) == 0
        assert flags() == before
    assert seen == [(True, False, ":4096:8"), (False, True, None)]


def test_what_a_run_starts_from_is_not_for_stages_that_go_on_from_another(growing, tmp_path):
    argv = growing(tmp_path / "runs", "init_from=elsewhere")
    stages = build_stages(compose("train", argv), argv)
    assert [cfg.init_from for cfg in stages] == ["elsewhere", f"{tmp_path}/runs/growing/low"]


def test_a_conditioner_for_sampling_alone_is_refused(recipe, refused, tmp_path):
    depth = ["conditioner=depth", "conditioner.parts.text.layer=last", "backbone.in_channels=5"]
    text = "conditioner.parts.text.model={width: 16, layers: 1, heads: 2, embed_dim: 16, quick_gelu: false}"
    argv = [word for word in recipe(2, "run") if not word.startswith("conditioner")]
    line = refused(
        [*argv, *depth, "conditioner.parts.text.pretrained=random", "conditioner.context_dim=16", text]
    )
    assert line == "conditioner: reads what no training data has; it is for sampling alone"
    assert not (tmp_path / "run").exists()
