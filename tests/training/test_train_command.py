"""The command as users meet it: wrong input ends in one line, exit code 2, and nothing written."""

import pytest

import train
from ldm.config import compose, plain


def without(argv, *keys):
    return [text for text in argv if text.partition("=")[0] not in keys]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (["trainer.max_step=3"], "trainer.max_step: unknown key; did you mean trainer.max_steps?"),
        (["lernrate=3"], "lernrate: unknown key"),
        (["train_batch_size=3"], "train_batch_size: unknown key; did you mean data.batch_size?"),
        (["experiment=quickstartt"], "experiment=quickstartt: no such option; did you mean quickstart?"),
        (["sampler=dimm"], "sampler=dimm: no such option; did you mean ddim?"),
        (["trainer.max_steps=many"], "trainer.max_steps: expected int, got 'many'"),
        (["trainer.max_steps=3.5"], "trainer.max_steps: expected int, got 3.5"),
        (
            ["data.global_batch_size=5", "trainer.accumulate_grad_batches=2"],
            "data.global_batch_size=5: not div",
        ),
        (["data.global_batch_size=4", "data.batch_size=3"], "data.global_batch_size=4: not divisible by"),
        (["data.global_batch_size=0"], "data.global_batch_size: expected at least 1, got 0"),
        (["data.limit=0"], "data.limit: expected at least 1, got 0"),
        (["data.shards=/nowhere/{00..03}.tar"], "data.shards: no shard matches '/nowhere/{00..03}.tar'"),
        (["resume=/nowhere/run"], "resume=/nowhere/run: no such checkpoint"),
        (["init_from=/nowhere/run"], "init_from=/nowhere/run: no such checkpoint"),
        (["autoencoder_from=/nowhere/run"], "autoencoder_from=/nowhere/run: no such checkpoint"),
        (["autoencoder.latent_channels=8"], "autoencoder_from="),
        (["autoencoder.block_out_channels=[8,16,16]"], "autoencoder_from="),
        (["backbone.norm_groups=3"], "backbone: "),
        (["backbone.in_channels=3"], "module: backbone.in_channels=3, but latents have 4 channels"),
        (["conditioner.context_length=1"], "conditioner: "),
        (["module.drop=1.5"], "module: drop=1.5"),
        (["conditioner.pooled_dim=8"], "module: backbone.pooled_dim=None, but conditioner.pooled_dim=8"),
        (["module.ema_decay=1.0"], "module: ema_decay=1.0"),
        (["lr_schedule=cosine", "lr_schedule.warmup=7"], "lr_schedule: warmup=7 must be below total=7 steps"),
        (["callbacks.checkpoint.every=0"], "callbacks.checkpoint: every=0 must be"),
        (["callbacks.metrics.every=0"], "callbacks.metrics: every=0 must be"),
        (["trainer.precision=12-true"], "trainer: "),
        (["trainer=gpu"], "trainer: "),
        (["run_name=../x"], "run_name=../x: is not a name for a folder"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(wrong, line, recipe, refused, tmp_path, autoencoder_run):
    folder = tmp_path / "new/runs"
    found = refused([*recipe(2, "x", f"run_root={folder}"), *wrong])
    assert found.startswith(line), found
    assert "Traceback" not in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("data.shards", "data.shards: missing value; set data.shards="),
        ("run_name", "run_name: missing value"),
    ],
)
def test_what_is_missing_is_asked_for(key, line, recipe, refused, tmp_path):
    assert refused(without(recipe(1, "x"), key)).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_process(process, tmp_path, recipe):
    one = process(recipe(1, "x", "optimizer.learning_rate=1"))
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 2
    assert output == "ldm: error: optimizer.learning_rate: unknown key; did you mean optimizer.lr?\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("experiment", ["quickstart", "quickstart_autoencoder", "quickstart_diffusion"])
def test_cfg_job_prints_what_composes_again(experiment, capsys, tmp_path):
    argv = [f"experiment={experiment}", "seed=7", "data.global_batch_size=16"]
    assert train.command(["--cfg", "job", *argv]) == 0
    text = capsys.readouterr().out
    (tmp_path / "train.yaml").write_text(text)
    again = plain(compose("train", [], config_dir=tmp_path))
    assert again == plain(compose("train", argv))
    assert again["seed"] == again["data"]["seed"] == again["module"]["seed"] == 7
    assert "${" not in text


def test_help_needs_no_config(capsys):
    assert train.command(["--help"]) == 0
    text = capsys.readouterr().out
    assert "python train.py experiment=quickstart" in text
    assert "--cfg job" in text


def test_unknown_flags(refused):
    assert refused(["--multirun"]).startswith("--multirun: unknown flag")
