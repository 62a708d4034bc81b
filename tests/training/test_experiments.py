"""Every file of configs/ composes and builds; every recipe and debug switch runs at tiny size."""

import csv

import pytest
import torch
from PIL import Image

import train
from ldm.checkpoints import native
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.config import CONFIG_DIR, build, compose, plain
from ldm.training.assembly import FITTING, build_callbacks, build_module
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.callbacks.guard import Guard
from ldm.training.diffusion_module import LatentDiffusionModule
from ldm.training.module import TrainingModule
from ldm.training.summary import without_weights

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
GROUPS = (path for path in CONFIG_DIR.glob("*/*.yaml") if path.parent.name != "experiment")
OPTIONS = sorted((path.parent.name, path.stem) for path in GROUPS)
GIVEN = ["run_name=x", "data.shards=x.tar", "autoencoder_from=x"]  # what recipes leave to the user
FILTERS = (
    "[{_target_: ldm.data.filters.MinValue, column: aesthetic, value: 5.0},"
    "{_target_: ldm.data.filters.MaxValue, column: punsafe, value: 0.5},"
    "{_target_: ldm.data.filters.MaxValue, column: pwatermark, value: 0.5},"
    "{_target_: ldm.data.filters.MinValue, column: similarity, value: 0.3},"
    "{_target_: ldm.data.filters.MinSize, pixels: 512},"
    "{_target_: ldm.data.filters.AspectRatio, min: 0.5, max: 2.0},"
    "{_target_: ldm.data.filters.CaptionLength, min: 5}]"
)
KWARGS = {
    "snapshots": {"folder": "x"},
    "metrics": {"path": "x"},
    "guard": {},
    "checkpoint": {"folder": "x", "guard": Guard()},
    "validation": {"metrics": None},
    "watchdog": {"run": None},
    "heartbeat": {"run": None, "stage": None},
    "spikes": {"folder": "x", "rows": 1},
}


TINY_STAGE_1 = [  # a recipe of stage 1 on pictures of 16 px
    *(
        "autoencoder.block_out_channels=[8,8,8]",
        "autoencoder.layers_per_block=1",
        "++autoencoder.norm_groups=4",
    ),
    *("autoencoder.mid_attention=false", "++autoencoder.attention_levels=null", "perceptual.weights=random"),
    *("discriminator.width=8", "discriminator.layers=1", "discriminator.norm_groups=4"),
]


TOYS = ("quickstart", "emoji")  # they bring their pictures, and a report on them


def is_stage_1(name):
    return name.startswith("autoencoder_")


@pytest.fixture
def small(small_diffusion):
    """experiment -> overrides that make it tiny."""
    found = {"laion_subset": small_diffusion}
    return lambda name: TINY_STAGE_1 if is_stage_1(name) else found.get(name, [])


def given_to(name):
    """What a user has to say beside the name of the recipe."""
    if name.startswith((*TOYS, "bench")):
        return []
    asked = "required: [init_from]" in (CONFIG_DIR / f"experiment/{name}.yaml").read_text()
    return GIVEN[1:2] if is_stage_1(name) else [*GIVEN[1:], *(["init_from=x"] if asked else [])]


def built(cfg, name, small):
    """The module, on paper where the recipe is too large to build and is not made small here."""
    if small(name) or name.startswith(TOYS):
        return build_module(cfg)
    return build_module(without_weights(plain(cfg)), device="meta")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name, small, tmp_path):
    cfg = compose("train", [f"experiment={name}", *given_to(name), *small(name)])
    if cfg.stages:
        assert set(cfg.stages) <= set(EXPERIMENTS)
        return
    module = built(cfg, name, small)
    assert isinstance(module, LatentDiffusionModule if "backbone" in cfg else AutoencoderModule)
    assert sum(p.numel() for p in module.parameters()) > 1000
    datamodule = build(cfg.data)
    assert datamodule.global_batch_size == cfg.data.global_batch_size
    run, stage = RunDirectory(tmp_path, "x"), Stage(cfg.stage, tmp_path)
    callbacks, metrics, checkpoints = build_callbacks(cfg, run, stage, None)
    assert callbacks[-1] is checkpoints
    assert metrics in callbacks
    assert (cfg.report is None) == (not name.startswith(TOYS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_says_what_it_needs_and_gives(name):
    """A recipe's header: hardware, time, and the result to expect."""
    header = [
        line for line in (CONFIG_DIR / f"experiment/{name}.yaml").read_text().splitlines() if line[:1] == "#"
    ]
    assert header[0] == "# @package _global_"
    for word in ("Hardware:", "Time:", "Expect:"):
        assert any(word in line for line in header), word


def choices(group, option, small):
    """Overrides under which this option makes a whole config."""
    chosen = [f"{group}={option}"]
    if group == "debug":
        return ["experiment=quickstart_diffusion", *chosen]
    if (group, option) == ("module", "autoencoder_gan"):
        chosen += ["discriminator=patchgan"]
    if option.startswith("autoencoder") and group in ("module", "callbacks"):
        chosen += ["backbone=null", "conditioner=null", "noise_scheduler=null", "sampler=null"]
    elif group == "module":
        chosen += small
    return [*chosen, "trainer=cpu"] if group != "trainer" else chosen


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group, option, small_diffusion):
    unsharded = group == "data" and option not in ("shards", "cached")
    given = [text for text in GIVEN if not (unsharded and "shards" in text)]
    if group == "debug":
        given = []
    extra = ["data.folder=x"] if option == "folder" else []
    cfg = compose("train", [*choices(group, option, small_diffusion), *given, *extra])
    assert plain(cfg)
    if group == "debug":
        return
    section = cfg[group]
    if group == "callbacks":
        pictures = {"folder": "x"} | ({"sampler": None} if option == "latent_diffusion" else {})
        for name, part in section.items():
            if part is None:  # a benchmark, which debug=bench has
                continue
            built = build(part, **({**KWARGS, "pictures": pictures}[name]))
            assert built.every == part.get("every", 1)
    elif group == "trainer" and option != "cpu":
        assert section.accelerator == "gpu"  # what a machine without one says is in test_train_command
    elif group == "trainer":
        assert build(section, **FITTING).max_steps == section.max_steps
    elif group == "module":
        assert isinstance(build_module(cfg), TrainingModule)
    elif group in ("autoencoder", "backbone", "conditioner"):
        for part in [section, *section.get("parts", {}).values()]:
            if "pretrained" in part:
                part.pretrained = "random"
        with torch.device("meta"):
            built = build(section)
        assert option == "class_label" or sum(p.numel() for p in built.parameters()) > 0
    elif (group, option) == ("perceptual", "lpips"):
        section.weights = "random"
        assert build(section) is not None
    else:
        if option == "lpips":
            section.weights = "random"
        assert build(section) is not None


def test_laion_subset_has_the_sizes_of_stable_diffusion_1():
    cfg = compose("train", ["experiment=laion_subset", *GIVEN[1:]])
    with torch.device("meta"):
        backbone, autoencoder = build(cfg.backbone), build(cfg.autoencoder)
    assert sum(p.numel() for p in backbone.parameters()) == 859_520_964
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863
    assert cfg.data.global_batch_size == 2048
    assert cfg.data.image_size == 256


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if is_stage_1(name)])
def test_stage_1_recipes_run_on_tiny_shards(name, data, tmp_path):
    often = ["trainer.max_steps=2", "callbacks.metrics.every=1", "callbacks.validation.every=2"]
    argv = [f"experiment={name}", *data, *TINY_STAGE_1, *often, "trainer=cpu", f"run_root={tmp_path}"]
    assert train.command([*argv, "module.start=1", "module.latent_samples=8"]) == 0
    run = tmp_path / name
    assert len(values(run, "train/perceptual")) == 2
    assert len(values(run, "train/adversarial")) == 1
    assert all(value > 0 for value in values(run, "validation/psnr"))


def final(folder):
    return native.load_document(native.resolve(folder), "state.json")


def values(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[2]) for row in csv.reader(file) if row[1] == name]


@pytest.fixture
def laion_subset(small_diffusion, data, autoencoder_run, tmp_path):
    """The experiment as a user would shrink it: by overrides alone."""
    given = [f"autoencoder_from={autoencoder_run}", f"run_root={tmp_path}", f"data.filters={FILTERS}"]
    return ["experiment=laion_subset", *small_diffusion, *data, *given, "lr_schedule.warmup=2"]


def test_laion_subset_runs_on_tiny_shards(laion_subset, tmp_path):
    often = ["trainer.max_steps=4", "callbacks.metrics.every=2", "callbacks.validation.every=4"]
    pictures = ["callbacks.pictures.every=4", "sampling.num_steps=2"]
    argv = [*laion_subset, "trainer=cpu", *often, *pictures, "data.validation_filters=[]"]
    assert train.command(argv) == 0
    run = tmp_path / "laion_subset"
    assert final(run)["step"] == 4
    assert final(run)["images"] == 16
    assert len(values(run, "train/loss")) == 2
    assert len(values(run, "validation/loss")) == 1
    with Image.open(run / "samples/step-000000004.png") as picture:
        assert picture.width > 32


@pytest.mark.slow
def test_debug_fast_shows_that_the_whole_quickstart_runs(tmp_path):
    size = ["data.num_objects=4", f"data.cache_dir={tmp_path}/data", f"run_root={tmp_path}"]
    assert train.command(["experiment=quickstart", "debug=fast", *size]) == 0
    run = tmp_path / "debug_fast"
    for stage in ("autoencoder", "diffusion"):
        assert final(run / stage)["step"] == 2
        assert (run / stage / "samples/step-000000002.png").is_file()
    assert values(run / "autoencoder", "validation/psnr")
    assert values(run / "diffusion", "validation/loss")
    assert (run / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_all_emoji_at_toy_size_on_a_cpu(tmp_path):
    """The path of the recipe for a GPU, less its size."""
    size = [
        "data.num_objects=6",
        "data.image_size=32",
        f"data.cache_dir={tmp_path}/data",
        f"run_root={tmp_path}",
    ]
    fewer = ["data.global_batch_size=4", "data.num_workers=1", "data.validation_batch_size=6"]
    for stage, more in (
        ("autoencoder", ["module.latent_samples=8"]),
        (
            "diffusion",
            ["backbone.block_out_channels=[32,64]", "conditioner.width=64", "conditioner.layers=1"],
        ),
    ):
        narrow = ["autoencoder.block_out_channels=[16,16]", "autoencoder.norm_groups=8"]
        argv = [f"experiment=emoji_{stage}", "debug=fast", "trainer=cpu", *size, *fewer, *narrow, *more]
        assert train.command(argv) == 0
    run = tmp_path / "debug_fast"
    assert values(run / "autoencoder", "validation/psnr")
    assert values(run / "diffusion", "validation/loss")
    assert (run / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_debug_overfit_brings_the_loss_down(recipe, tmp_path):
    steps = ["trainer.max_steps=160", "callbacks.metrics.every=20", "callbacks.checkpoint.every=160"]
    calm = ["callbacks.validation.every=160", "callbacks.pictures.every=160", "optimizer.lr=0.01"]
    argv = recipe(1, "debug_overfit", "lr_schedule=cosine", "debug=overfit")
    assert train.command([*(text for text in argv if text != "lr_schedule.warmup=3"), *steps, *calm]) == 0
    losses = values(tmp_path / "debug_overfit", "train/l1")
    assert losses[-1] < losses[0] / 2.5  # the pictures' own grain is a sixth of the first loss


def test_debug_overfit_sees_eight_samples(recipe):
    cfg = compose("train", [*recipe(1, "x"), "debug=overfit"])
    datamodule = build(cfg.data)
    seen = {key for _, batch in zip(range(12), datamodule.stream(), strict=False) for key in batch.key}
    assert len(seen) == 8


@pytest.mark.slow
def test_debug_profile_writes_a_table_and_a_trace(recipe, tmp_path):
    assert train.command([*recipe(2, "debug_profile"), "debug=profile", "trainer.max_steps=6"]) == 0
    run = tmp_path / "debug_profile"
    (table,) = run.glob("*profile*.txt")
    assert "aten::" in table.read_text()
    assert list(run.glob("*profile*.json"))


@pytest.mark.slow
def test_debug_ddp_cpu_runs_the_recipe_on_two_processes(laion_subset, process, tmp_path):
    one = process([*laion_subset, "debug=ddp_cpu", "sampling.num_steps=2", "data.validation_filters=[]"])
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    run = tmp_path / "debug_ddp_cpu"
    assert final(run)["step"] == 4
    assert final(run)["images"] == 16
    assert len(values(run, "train/loss")) == 4
    assert (run / "samples/step-000000004.png").is_file()
