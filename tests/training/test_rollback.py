"""Steps whose gradient is not finite change nothing; after some in a row the run goes back past the data."""

import json
import logging
import re

import pytest
import torch

import train
from ldm.checkpoints import native
from ldm.errors import NUMERICAL
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.module import TrainingModule

G = 4  # samples an optimizer step


def places(folder):
    return native.load_document(native.resolve(folder), "data.json")


# ---- gradients that are not finite


def states(trainer, module):
    """All that a step may change."""
    optimizer = trainer.optimizers[0].state
    moments = [value for state in optimizer.values() for value in state.values()]
    return [t.clone() for t in (*module.parameters(), *module.ema.average, *moments)]


@pytest.mark.fault(11)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon", "schedule_free"])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(
    optimizer, value, recipe, monkeypatch, rows, tmp_path
):
    original, step_of = AutoencoderModule.training_step, TrainingModule.optimizer_step
    changed = []

    def training_step(self, *args):
        loss = original(self, *args)
        return loss * value if self.trainer.global_step == 3 else loss

    def optimizer_step(self, *args, **kwargs):
        before = states(self.trainer, self)
        step_of(self, *args, **kwargs)
        after = states(self.trainer, self)
        same = len(before) == len(after)
        changed.append(not (same and all(map(torch.equal, before, after))))

    monkeypatch.setattr(AutoencoderModule, "training_step", training_step)
    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    argv = recipe(1, "run", f"optimizer={optimizer}", "callbacks.checkpoint.every=4")
    assert train.command(argv) == 0
    assert changed == [True, True, True, False, True, True, True]
    found = {row[0]: float(row[2]) for row in rows(tmp_path / "run") if row[1] == "train/skipped"}
    assert found == {"2": 0, "4": 0.5, "6": 0}
    assert not (tmp_path / "run/checkpoints/step-000000004").exists(), "no checkpoint while steps fail"
    assert (tmp_path / "run/checkpoints/step-000000007").exists()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_fused_optimizer_does_as_it_is_told_on_the_device(kind):
    """Torch's contract that `may_step` uses on a GPU; its fused kernels for the CPU have it too."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([parameter], lr=0.1, fused=True)
    for gradient, found in ((1.0, 0.0), (float("nan"), 1.0), (1.0, 0.0)):
        parameter.grad = torch.full((3,), gradient)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found)
        before = [parameter.detach().clone(), *(v.clone() for v in optimizer.state[parameter].values())]
        optimizer.step()
        after = [parameter.detach(), *optimizer.state[parameter].values()]
        if found:
            assert all(map(torch.equal, before, after))
        else:
            assert not torch.equal(before[0], after[0])


@pytest.mark.gpu
def test_on_a_gpu_a_fused_step_is_refused_without_a_wait():
    module = TrainingModule(None, None, 0.9, 0)
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    for gradient in (1.0, float("nan")):
        parameter.grad = torch.full_like(parameter, gradient)
        before = parameter.detach().clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert module.may_step(optimizer, torch.nn.utils.get_total_norm([parameter.grad]))
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(parameter, before) == (gradient != gradient)


# ---- going back


@pytest.fixture
def poisoned(monkeypatch):
    """(places) -> the loss of a batch with one of them is not a number; returns the batches' first places."""
    seen, original = [], AutoencoderModule.training_step

    def arrange(bad):
        def training_step(self, batch, batch_idx):
            seen.append(int(batch.n[0]))
            loss = original(self, batch, batch_idx)
            return loss * float("nan") if bad & set(batch.n.tolist()) else loss

        monkeypatch.setattr(AutoencoderModule, "training_step", training_step)
        return seen

    return arrange


BACK = ["callbacks.guard.rollback_after=2", "callbacks.guard.rollbacks=2"]


def test_after_steps_that_fail_the_run_goes_back_and_leaps_over_their_data(
    recipe, poisoned, tmp_path, caplog
):
    seen = poisoned({17, 21})  # in the fifth and the sixth step
    with caplog.at_level(logging.WARNING):
        assert train.command(recipe(1, "run", *BACK)) == 0
    assert seen == [0, 4, 8, 12, 16, 20, *(24, 28, 32, 36)], "back to step 3, then steps 4 to 7"
    assert "back to step 3; samples 12 to 24 of the run are left out" in caplog.text
    found = places(tmp_path / "run")
    assert found["samples"] == 7 * G
    assert found["skip"] == [[12, 24]]
    (one,) = json.loads((tmp_path / "run/run.json").read_text())["rollbacks"][""]
    assert one == {"step": 6, "checkpoint": 3, "window": [12, 24]}
    events = json.loads((tmp_path / "run/run.json").read_text())["events"]
    assert ("rollback", 6) in [(event["kind"], event["step"]) for event in events]
    digest = found["digest"]

    seen.clear()
    poisoned(set())
    argv = recipe(1, "told")
    assert train.command([*argv, "trainer.max_steps=3"]) == 0
    record = json.loads((tmp_path / "told/run.json").read_text())
    (tmp_path / "told/run.json").write_text(json.dumps({**record, "rollbacks": {"": [one]}}))
    assert train.command(argv) == 0, "as a process that is started again after a rollback"
    assert seen == [0, 4, 8, 24, 28, 32, 36]
    assert places(tmp_path / "told")["digest"] == digest
    one, two = (native.load_tensors(native.resolve(tmp_path / name), "model") for name in ("run", "told"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_fails_before_its_first_checkpoint_starts_anew_past_the_data(recipe, poisoned, tmp_path):
    seen = poisoned({0, 4})
    assert train.command(recipe(1, "run", *BACK, "trainer.max_steps=2")) == 0
    assert seen == [0, 4, 8, 12]
    assert places(tmp_path / "run")["skip"] == [[0, 8]]


def test_a_run_that_took_up_another_goes_back_to_that_one(recipe, poisoned, tmp_path):
    assert train.command(recipe(1, "other", "trainer.max_steps=3")) == 0
    seen = poisoned({12, 16})
    assert train.command(recipe(1, "run", f"resume={tmp_path / 'other'}", *BACK, "trainer.max_steps=5")) == 0
    assert seen == [12, 16, 20, 24]
    assert places(tmp_path / "run")["skip"] == [[12, 20]]


@pytest.mark.fault(11)
def test_a_run_that_goes_on_failing_ends_with_a_code_that_nobody_restarts(recipe, poisoned, caplog, tmp_path):
    seen = poisoned(set(range(12, 4000)))
    with caplog.at_level(logging.ERROR):
        assert train.command(recipe(1, "run", *BACK)) == NUMERICAL
    assert seen == [0, 4, 8, *(12, 16), *(20, 24), *(28, 32)]
    assert "step 5 failed after 2 attempts from step 3" in caplog.text
    assert native.newest(tmp_path / "run/checkpoints").name == "step-000000003"


def test_never_going_back_is_an_option(recipe, poisoned, tmp_path):
    poisoned(set(range(12, 4000)))
    assert train.command(recipe(1, "run", "callbacks.guard.rollback_after=null")) == 0
    assert places(tmp_path / "run")["skip"] == []


POISONED = """
import os, sys
from pathlib import Path
import ldm.config
ldm.config.CONFIG_DIR = Path({configs!r})
import train
from ldm.training.autoencoder_module import AutoencoderModule

original = AutoencoderModule.training_step


def training_step(self, batch, batch_idx):
    loss = original(self, batch, batch_idx)
    print(f"SEEN {{self.global_rank}} {{batch.n.tolist()}}\\n", end="", flush=True)  # by one write
    return loss * float("nan") if {{18, 22}} & set(batch.n.tolist()) else loss


AutoencoderModule.training_step = training_step
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_one_rank_fails_on_both_leap_over(recipe, process, two_stage_configs, tmp_path):
    """Samples 18 and 22 are rank 1's; the answer comes two steps after the question."""
    argv = recipe(1, "run", "trainer.devices=2", "trainer.strategy=ddp", *BACK, "trainer.max_steps=13")
    one = process([*argv, "callbacks.guard.every=2"], source=POISONED.format(configs=str(two_stage_configs)))
    output, _ = one.communicate(timeout=200)
    assert one.returncode == 0, output
    seen = re.findall(r"SEEN (\d) (\[.*?\])", output)  # not by line: two processes write to one pipe
    mine = [json.loads(ns)[0] for rank, ns in seen if rank == "0"]
    theirs = [json.loads(ns)[0] for rank, ns in seen if rank == "1"]
    assert theirs == [n + 2 for n in mine]
    window = places(tmp_path / "run")["skip"]
    assert window == [[12, 32]], "failed in steps 5 and 6, asked at step 6, heard at step 8"
    assert mine == [*range(0, 32, 4), *range(32, 72, 4)]
    weights = native.load_tensors(native.resolve(tmp_path / "run"), "model")
    assert all(torch.isfinite(value).all() for value in weights.values())
