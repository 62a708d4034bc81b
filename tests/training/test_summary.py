"""What a run would be, against what such runs are: counts, shapes, bytes, epochs."""

import re

import pytest

import train
from ldm.config import CONFIG_DIR, compose, plain
from ldm.errors import InputError
from ldm.training.assembly import build_module, build_stages
from ldm.training.summary import memory, parameters, summary

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def test_stable_diffusion_1_without_its_weights(capsys, tmp_path):
    """`--cfg job` says it all and still composes; nothing is fetched, and 4 GB are not taken."""
    argv = ["experiment=laion_subset", "data.shards=/nowhere/x.tar", "autoencoder_from=x"]
    argv += ["trainer.devices=8", "trainer.num_nodes=4", "optimizer=adamw_8bit"]
    assert train.command(["--cfg", "job", *argv]) == 0
    text = capsys.readouterr().out
    for line in (
        "steps       237,000 of 2,048 images",
        "shapes      images [64 3 256 256], latents [64 4 32 32], context [64 77 768] of each of 32 devices",
        "tokens      77 a caption, 157,696 a step",
        "parameters  backbone: 859,520,964 trained",
        "parameters  autoencoder: 83,653,863 frozen",
        "parameters  conditioner: 123,060,480 frozen",
        "epoch       not known: data.shards: no shard matches '/nowhere/x.tar'",
    ):
        assert f"#   {line}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("#   memory ")]
    assert "weights 3.44 GB, gradients 3.44 GB, average 3.44 GB, optimizer 1.7" in line
    assert "frozen 0.83 GB: 12.8" in line
    (tmp_path / "train.yaml").write_text(text)
    assert plain(compose("train", [], config_dir=tmp_path)) == plain(compose("train", argv))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_summary(name):
    given = [f"experiment={name}"]
    while True:
        try:
            cfg = compose("train", given)
            break
        except InputError as error:  # what the recipe leaves to the user
            missing = re.match(r"(\S+): missing value", str(error))
            if not missing:
                raise
            given.append(f"{missing[1]}=x")
    for stage in build_stages(cfg, given):
        assert any(line.startswith("memory ") for line in summary(plain(stage)))


def test_of_an_upscaler():
    """Its conditioner has a noise scheduler of its own, a table of numbers where networks are on paper."""
    given = ["experiment=laion_subset", "data.shards=x", "autoencoder_from=x", "conditioner=upscaling"]
    given += ["backbone.in_channels=7", "backbone.num_classes=1000"]
    lines = summary(plain(compose("train", given)))
    assert any("concat [" in line for line in lines)


def test_each_stage_has_its_summary(capsys):
    assert train.command(["--cfg", "job", "experiment=quickstart"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    titles = [line for line in lines if not line.startswith("#   ")]
    assert titles == ["# quickstart autoencoder", "# quickstart diffusion"]
    assert "#   epoch       945 images, 14.8 steps; the run is 51.47 epochs" in lines


def test_of_a_tiny_run(recipe):
    """The shards are indexed already; trained and frozen are told apart."""
    cfg = plain(compose("train", recipe(2, "x", "parameter_groups=[{match: '^conditioner', train: false}]")))
    lines = summary(cfg)
    assert "shapes      images [4 3 16 16], latents [4 4 4 4], context [4 12 16] of each of 1 device" in lines
    assert "epoch       40 images, 10.0 steps; the run is 0.70 epochs" in lines
    real, counted = build_module(cfg), parameters(build_module(cfg, device="meta"))
    for name, network in (("backbone", real.backbone), ("conditioner", real.conditioner)):
        what = "frozen" if name == "conditioner" else "trained"
        assert f"{name}: {sum(p.numel() for p in network.parameters()):,} {what}" in counted
    size = memory(build_module(cfg, device="meta"))
    assert size["weights"] == size["average"] == 4 * sum(p.numel() for p in real.backbone.parameters())
    frozen = sum(
        p.numel() for p in (*real.conditioner.parameters(), *real.frozen["autoencoder"].parameters())
    )
    assert size["frozen"] == pytest.approx(4 * frozen, rel=1e-3), "and some buffers"


def test_in_the_log_if_asked_for(recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    for name, more in (("quiet", []), ("told", ["summary=true"])):
        assert train.command(recipe(1, name, "trainer.max_steps=1", *more)) == 0
        assert ("parameters  autoencoder: " in (tmp_path / name / "log.txt").read_text()) == bool(more)
