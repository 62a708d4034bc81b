"""Our loop over batches does what Lightning's does, and less beside it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import SimpleProfiler

import train
from ldm.errors import InputError
from ldm.training import loop


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_it_trains_what_lightnings_loop_trains(
    stage, micro_batches, recipe, assert_same_run, monkeypatch, tmp_path
):
    accumulate = f"trainer.accumulate_grad_batches={micro_batches}"
    assert train.command(recipe(stage, "ours", accumulate)) == 0
    monkeypatch.setattr(loop, "install", lambda trainer, module: None)
    assert train.command(recipe(stage, "theirs", accumulate)) == 0
    assert_same_run(tmp_path / "ours", tmp_path / "theirs")


class Noting(pl.Callback):
    def __init__(self, name, heard):
        self.name, self.heard = name, heard


class Starts(Noting):
    def on_train_start(self, trainer, pl_module):
        self.heard.append((self.name, trainer, pl_module))


class Ends(Starts):
    def on_train_end(self, trainer, pl_module):
        self.heard.append((self.name, "ended"))


def test_callbacks_together_have_the_hooks_that_each_has_in_their_order():
    heard = []
    together = loop.Together([Noting("a", heard), Starts("b", heard), Ends("c", heard)])
    together.on_train_start("trainer", "module")
    together.on_train_end("trainer", "module")
    together.on_train_epoch_end("trainer", "module")
    assert heard == [("b", "trainer", "module"), ("c", "trainer", "module"), ("c", "ended")]
    assert together.on_train_epoch_end.__func__ is pl.Callback.on_train_epoch_end, "nobody has this one"


def test_a_profiler_hears_of_all_that_lightning_does():
    made = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made |= {"accelerator": "cpu", "enable_model_summary": False, "callbacks": [Noting("a", [])]}
    watched, trainer = pl.Trainer(profiler=SimpleProfiler(), **made), pl.Trainer(**made)
    for each in (watched, trainer):
        loop.install(each, pl.LightningModule())
    assert not isinstance(watched.fit_loop.epoch_loop, loop.StepLoop)
    assert type(watched.callbacks[0]) is Noting
    assert isinstance(trainer.fit_loop.epoch_loop, loop.StepLoop)
    assert trainer.fit_loop.epoch_loop.max_steps == watched.fit_loop.epoch_loop.max_steps


@pytest.mark.parametrize(
    ("precision", "ours"),
    [
        (Precision(), True),
        (MixedPrecision("bf16-mixed", "cpu"), True),
        (MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu")), False),
        (DoublePrecision(), True),
    ],
)
def test_a_step_with_a_scaler_is_lightnings(precision, ours):
    made = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(plugins=[precision], accelerator="cpu", enable_model_summary=False, **made)
    loop.install(trainer, pl.LightningModule())
    assert ("optimizer_step" in vars(trainer.strategy)) is ours


class Moving(pl.LightningModule):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Zeroing(pl.Callback):
    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pass


class Looking(pl.LightningModule):
    def on_after_backward(self):
        pass


@pytest.mark.parametrize(
    ("module", "callbacks", "words"),
    [
        (Moving(), [], "^Moving: transfer_batch_to_device is not called by ldm's loop; do it in"),
        (Looking(), [], "^Looking: on_after_backward is not"),
        (pl.LightningModule(), [Zeroing()], "^Zeroing: on_before_zero_grad is not"),
    ],
)
def test_a_hook_that_would_never_be_called_is_refused(module, callbacks, words):
    made = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made |= {"accelerator": "cpu", "enable_model_summary": False, "callbacks": callbacks}
    with pytest.raises(InputError, match=words):
        loop.install(pl.Trainer(**made), module)
    loop.install(pl.Trainer(profiler=SimpleProfiler(), **made), module)  # Lightning's calls them all
