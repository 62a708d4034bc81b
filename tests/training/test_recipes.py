"""The published recipes: their numbers, what headers and docs/recipes.md say of them, and that they run."""

import functools
import io
import json
import re
import shlex
from math import floor, log10
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from ldm.checkpoints import native
from ldm.config import CONFIG_DIR, compose, plain
from ldm.errors import InputError
from ldm.training.assembly import NETWORKS, build_module
from ldm.training.summary import one_sample, without_weights

PAGE = (Path(train.__file__).parent / "docs/recipes.md").read_text()
FOLDER = CONFIG_DIR / "experiment"
RECIPES = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith(("quickstart", "emoji", "bench"))
)
STAGED = {"sdxl_base": ["sdxl_base_256", "sdxl_base_512", "sdxl_base_1024"]}
SINGLE = [name for name in RECIPES if name not in STAGED]
DOLLARS = 2.5  # an hour of one H100
BUILT = {}
WORDS = ("Parameters", "Hardware", "Cost", "Data", "Expect")


class Header(NamedTuple):
    parameters: int
    gpus: int
    hours: int  # of all GPUs together
    gpu_hours: int
    dollars: int
    pictures: int
    tflop: float  # a picture
    rate: int  # TFLOP/s a GPU


def text_of(name):
    """The lines of a recipe's header as one."""
    lines = (line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("# "))
    return " ".join(line.removeprefix("#").strip() for line in lines)


def number(text):
    return float(text.replace(",", ""))


def header(name):
    text = text_of(name)
    parameters = re.search(r"Parameters: ([\d,]+) trained", text)[1]
    nodes, hours = re.search(r"Hardware: (?:(\d+) nodes of )?8 H100.*? Time: ([\d,]+) hours\.", text).groups()
    gpu_hours, dollars = re.search(r"Cost: ([\d,]+) H100-hours, \$([\d,]+): ", text).groups()
    if name in STAGED:
        parts = [header(stage) for stage in STAGED[name]]
        rest = (sum(part.pictures for part in parts), 0, parts[0].rate)
    else:
        cost = r"\$[\d,]+: ([\d,]+) pictures of ([\d.]+) TFLOP at (?:the goal of )?(\d+) TFLOP/s a GPU"
        rest = tuple(map(number, re.search(cost, text).groups()))
    parameters, hours, gpu_hours, dollars = map(number, (parameters, hours, gpu_hours, dollars))
    return Header(parameters, 8 * int(nodes or 1), hours, gpu_hours, dollars, *rest)


def about(value):
    """To two significant digits."""
    return round(value, 1 - floor(log10(value)))


def commands(text):
    """Each `python train.py` command of a text as its overrides."""
    lines = text.replace("\\\n", " ").splitlines()
    found = (shlex.split(line.lstrip("# ")) for line in lines if line.lstrip("# ").startswith("python train"))
    return [words[2:] for words in found]


def given_to(name):
    """The command of the recipe's header, the last one if it has several."""
    found = commands((FOLDER / f"{name}.yaml").read_text().replace("\n#", "\n"))
    return found[-1] if found else [f"experiment={name}", "data.shards=x"]


@functools.cache
def composed_of(words):
    return compose("train", words)


def composed(name):
    return composed_of(tuple(given_to(name)))


def on_paper(name):
    """The recipe's module without memory, one for all recipes of the same networks."""
    cfg = without_weights(plain(composed(name)))
    key = json.dumps([cfg.get(part) for part in NETWORKS])
    if key not in BUILT:
        BUILT[key] = build_module(cfg, device="meta")
    return BUILT[key]


# ---- published numbers ---------------------------------------------------------------------------------

PUBLISHED = {  # steps, side, batch, learning rate, warm-up, share dropped: model cards and papers
    "sd1_256": (237_000, 256, 2048, 1e-4, 10_000, 0.0),
    "sd1_512": (194_000, 512, 2048, 1e-4, 10_000, 0.0),
    "sd1_512_aesthetic": (595_000, 512, 2048, 1e-4, 10_000, 0.1),
    "sd1_inpaint": (440_000, 512, 2048, 7.5e-5, 2_500, 0.1),
    "sd2_base_256": (550_000, 256, 2048, 1e-4, 10_000, 0.1),
    "sd2_base_512": (850_000, 512, 2048, 1e-4, 10_000, 0.1),
    "sd2_v_512": (150_000, 512, 2048, 1e-4, 10_000, 0.1),
    "sd2_v_768": (140_000, 768, 2048, 1e-4, 10_000, 0.1),
    "sdxl_base_256": (600_000, 256, 2048, 1e-4, 10_000, 0.1),
    "sdxl_base_512": (200_000, 512, 2048, 1e-4, 10_000, 0.1),
    "sdxl_base_1024": (100_000, 1024, 2048, 1e-4, 10_000, 0.1),
    "ldm_class": (178_000, 256, 1200, 1e-4, 0, 0.1),
    "upscaler_x4": (1_250_000, 512, 2048, 1e-4, 10_000, 0.1),
    "laion_subset": (237_000, 256, 2048, 1e-4, 10_000, 0.1),
}
KEPT = {  # (column, least, most), or (side, least, None)
    "sd1_512": [("side", 1024, None)],
    "sd1_512_aesthetic": [("aesthetic", 5.0, None), ("side", 512, None), ("pwatermark", None, 0.5)],
    "sd1_inpaint": [("aesthetic", 5.0, None), ("side", 512, None), ("pwatermark", None, 0.8)],
    "sd2_base_256": [("punsafe", None, 0.1), ("aesthetic", 4.5, None)],
    "sd2_base_512": [("punsafe", None, 0.1), ("aesthetic", 4.5, None), ("side", 512, None)],
    "sd2_v_512": [("punsafe", None, 0.1), ("aesthetic", 4.5, None), ("side", 512, None)],
    "sd2_v_768": [("punsafe", None, 0.1), ("aesthetic", 4.5, None), ("side", 768, None)],
    "upscaler_x4": [("side", 2048, None)],
}
PARAMETERS = {  # of the U-Net, as counted in the published checkpoints
    "sd1_256": 859_520_964,
    "sd1_inpaint": 859_520_964 + 5 * 320 * 9,
    "sd2_v_768": 865_910_724,
    "sdxl_base_1024": 2_567_463_684,
    "ldm_class": 400_920_579,
    "upscaler_x4": 473_398_020,
}
BETAS = {"ldm_class": (0.0015, 0.0195), "upscaler_x4": (0.0001, 0.02)}
STARTS = {  # what a recipe goes on from
    "sd1_512": "sd1_256",
    "sd1_512_aesthetic": "sd1_512",
    "sd1_inpaint": "sd1_512_aesthetic",
    "sd2_base_512": "sd2_base_256",
    "sd2_v_512": "sd2_base_512",
    "sd2_v_768": "sd2_v_512",
    "sdxl_base_512": "sdxl_base_256",
    "sdxl_base_1024": "sdxl_base_512",
}


def test_every_recipe_of_stage_2_is_in_the_table():
    stage_1 = {name for name in SINGLE if name.startswith("autoencoder_")}
    assert set(SINGLE) - stage_1 == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_those_published(name):
    cfg = composed(name)
    found = (cfg.trainer.max_steps, cfg.data.image_size, cfg.data.global_batch_size)
    assert (*found, cfg.optimizer.lr, cfg.lr_schedule.warmup, cfg.module.drop) == PUBLISHED[name]
    table = cfg.noise_scheduler
    assert (table.beta_start, table.beta_end) == BETAS.get(name, (0.00085, 0.012))
    assert table.schedule == "scaled_linear"
    predicts_v = name.startswith(("sd2_v", "upscaler"))
    assert table.prediction_type == ("v_prediction" if predicts_v else "epsilon")
    weighting = cfg.module.weighting["_target_"].rpartition(".")[2]
    assert weighting == ("Unweighted" if predicts_v else "Simple"), "squared error of what is predicted"
    assert cfg.module.offset_noise == (0.05 if name == "sdxl_base_1024" else 0.0)
    assert cfg.module.ema_decay == 0.9999


@pytest.mark.parametrize("name", PUBLISHED)
def test_filters_are_those_published(name):
    kept = [
        (f.get("column", "side"), f.get("pixels", f["value"] if "MinV" in f["_target_"] else None), None)
        if "Min" in f["_target_"]
        else (f["column"], None, f["value"])
        for f in plain(composed(name))["data"]["filters"]
    ]
    assert kept == KEPT.get(name, [])


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_unet_is_the_published_one(name, count):
    assert sum(p.numel() for p in on_paper(name).backbone.parameters()) == count


@pytest.mark.parametrize(("name", "before"), STARTS.items())
def test_a_stage_takes_weights_of_the_one_before(name, before):
    """Equal names and shapes, but for the channels that inpainting adds."""
    ours, theirs = (on_paper(stage).backbone.state_dict() for stage in (name, before))
    assert ours.keys() == theirs.keys()
    new = {key for key, value in ours.items() if value.shape != theirs[key].shape}
    assert new == ({"conv_in.weight"} if name == "sd1_inpaint" else set())
    if name.startswith("sdxl"):
        assert composed(name).init_from == f"runs/sdxl_base/{composed(before).stage}"
    else:
        assert composed(name).required == ["init_from"]


def test_a_later_stage_asks_for_the_one_before():
    with pytest.raises(InputError, match=r"^init_from: missing value; set init_from="):
        compose("train", ["experiment=sd1_512", "data.shards=x", "autoencoder_from=x"])


# ---- headers and the page ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_all(name):
    text = text_of(name)
    assert all(f" {word}: " in text or f" {word} and " in text for word in WORDS)
    assert re.search(r"[Dd]iffers: ", text)
    assert given_to(name)[0] == f"experiment={name}"
    assert len(given_to(name)) > 2 or "started like it" in text or name.startswith("autoencoder")
    assert "not yet run at size" in text
    assert (FOLDER / f"{name}.yaml").read_text().startswith("# @package _global_\n# ")


@pytest.mark.parametrize("name", SINGLE)
def test_the_header_counts_parameters_and_pictures(name):
    cfg, said = composed(name), header(name)
    trained = sum(p.numel() for p in on_paper(name).parameters() if p.requires_grad)
    assert trained == said.parameters
    assert cfg.trainer.max_steps * cfg.data.global_batch_size == said.pictures


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_counts_hours_and_dollars(name):
    said = header(name)
    if name in STAGED:
        assert composed(name).stages == STAGED[name]
        parts = [header(stage) for stage in STAGED[name]]
        seconds = sum(part.pictures * part.tflop / part.rate for part in parts)
    else:
        seconds = said.pictures * said.tflop / said.rate
    hours = seconds / 3600
    shown = (about(hours / said.gpus), about(hours), about(hours * DOLLARS))
    assert (said.hours, said.gpu_hours, said.dollars) == shown
    assert said.rate == (200 if name.startswith("autoencoder_") else 330)


def expected_row(name):
    """What the page's table says of a recipe, in columns 3 to 9."""
    said = header(name)
    cfgs = [composed(stage) for stage in STAGED.get(name, [name])]
    batch = {cfg.data.global_batch_size for cfg in cfgs}.pop()
    sides = ", ".join(str(cfg.data.image_size) for cfg in cfgs)
    steps, tflop = sum(cfg.trainer.max_steps for cfg in cfgs), f"{said.tflop:#.3g}" if said.tflop else ""
    numbers = [f"{said.parameters:,.0f}", sides, f"{steps:,}", f"{batch:,}", f"{said.pictures:,.0f}", tflop]
    return [*numbers, f"{said.gpu_hours:,.0f}", f"{said.dollars:,.0f}"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_has_the_numbers_of_the_recipe(name):
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in PAGE.splitlines()]
    (row,) = [row for row in rows if row[0] == f"`{name}`"]
    assert row[2:-1] == expected_row(name)
    before = STARTS.get(name)
    assert before is None or before in row[-1]


def test_the_page_sums_up_the_chains():
    """Text like `sd1_256`, `sd1_512`, `sd1_512_aesthetic`: 5,200 H100-hours, $13,000."""
    chains = re.findall(r"^\| (.+) \| (`.+`) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.M)
    assert len(chains) >= 3
    for _, names, hours, dollars in chains:
        total = 0.0
        for name, steps in re.findall(r"`(\w+)`(?: of ([\d,]+) steps)?", names):
            said, scale = header(name), 1.0
            if steps:
                scale = number(steps) / composed(name).trainer.max_steps
            total += scale * said.pictures * said.tflop / said.rate / 3600
        assert (number(hours), number(dollars)) == (about(total), about(total * DOLLARS)), names


@pytest.mark.parametrize("words", commands(PAGE), ids=" ".join)
def test_commands_of_the_page_compose(words):
    cfg = composed_of(tuple(words))
    assert cfg.trainer.max_steps > 0
    assert cfg.init_from or cfg.autoencoder_from or "backbone" not in cfg


def counted(call, *given):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        told = call(*given)
    return counter.get_total_flops() / 1e12, told


def operations(name):
    """TFLOP a picture, of matrix products and convolutions: docs/recipes.md says what is counted."""
    module, side = on_paper(name), composed(name).data.image_size
    picture = torch.empty(1, 3, side, side, device="meta")
    if name.startswith("autoencoder_"):
        own = module.autoencoder
        latents = torch.empty(1, own.latent_channels, side // own.factor, side // own.factor, device="meta")
        encode, decode = counted(own.moments, picture)[0], counted(own.decode, latents)[0]
        features = counted(module.frozen["perceptual"].features, picture)[0]
        return 3 * (encode + decode) + 4 * features + 9 * counted(module.discriminator, picture)[0]
    autoencoder = module.frozen["autoencoder"]
    encode = counted(autoencoder.moments, picture)[0]
    read, told = counted(module._conditioner, one_sample(side))
    sides = [side // autoencoder.factor] * 2
    latents = torch.empty(1, autoencoder.latent_channels, *sides, device="meta")
    network = counted(module.backbone, latents, torch.empty(1, device="meta"), told)[0]
    return (4 if module.backbone.gradient_checkpointing else 3) * network + encode + read


@pytest.mark.slow
def test_operations_of_stable_diffusion_1():
    """Against counts of others: the U-Net 0.1801, the encoder 0.273, CLIP ViT-L/14 0.0133."""
    assert operations("sd1_256") == pytest.approx(3 * 0.1801 + 0.273 + 0.0133, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_the_header_counts_operations(name):
    assert f"{operations(name):#.3g}" == f"{header(name).tflop:#.3g}"


# ---- they run ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_is_printed_without_weights_or_network(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked for the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    given = ["experiment=sdxl_base", "data.shards=x", "autoencoder_from=x"]
    assert train.command(["--cfg", "job", *given]) == 0
    text = capsys.readouterr().out
    assert text.count("#   parameters  backbone: 2,567,463,684 trained") == 3
    assert [f"at_{side}" in text for side in (256, 512, 1024)] == [True] * 3


TOWER = "{width: 16, layers: 2, heads: 2, embed_dim: 16}"
TINY = [  # any recipe of stage 2 on pictures of 16 px
    *("autoencoder.block_out_channels=[8,8,8]", "autoencoder.layers_per_block=1"),
    *("++autoencoder.norm_groups=4", "autoencoder.mid_attention=false"),
    *("backbone.layers_per_block=1", "++backbone.norm_groups=4", "data.filters=[]", "sampling.num_steps=2"),
    *("trainer=cpu", "trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "lr_schedule.warmup=1"),
    *("callbacks.metrics.every=1", "callbacks.validation.every=2", "callbacks.pictures.every=2"),
]
NARROW = ["backbone.block_out_channels=[8,16,16,16]"]


@pytest.fixture
def tiny(data, tmp_path):
    """(recipe, overrides) -> its newest state, after two steps at tiny size."""

    def run(name, *overrides):
        argv = [f"experiment={name}", *data, *TINY, f"run_root={tmp_path}", *overrides]
        assert train.command(argv) == 0
        return native.load_document(native.resolve(tmp_path / composed(name).run_name), "state.json")

    return run


def test_inpainting_goes_on_from_a_model_without(tiny, autoencoder_run, tmp_path):
    """The run before brings the autoencoder, and all channels of conv_in but those of mask and picture."""
    small = [*NARROW, "backbone.num_heads=2", "conditioner.context_dim=16"]
    text = [f"conditioner.{key}" for key in ("pretrained=random", f"model={TOWER}")]
    assert tiny("sd1_256", *small, *text, f"autoencoder_from={autoencoder_run}")["step"] == 2
    text = [f"conditioner.parts.text.{key}" for key in ("pretrained=random", f"model={TOWER}")]
    before = f"init_from={tmp_path}/sd1_256"
    assert tiny("sd1_inpaint", *small, *text, before)["step"] == 2


@pytest.mark.parametrize("name", ["sdxl_base_256", pytest.param("sdxl_base", marks=pytest.mark.slow)])
def test_sdxl(name, tiny, autoencoder_run, tmp_path):
    """One stage, and the command of all three: each starts from the one before."""
    towers = [
        f"conditioner.parts.{part}.{key}"
        for part in ("clip_l", "big_g")
        for key in (f"model={TOWER}", "pretrained=random")
    ]
    widths = ["conditioner.parts.sizes.width=4", "conditioner.context_dim=32", "conditioner.pooled_dim=40"]
    small = ["backbone.block_out_channels=[8,16,16]", "backbone.transformer_depth=[0,1,1]"]
    small += ["backbone.mid_depth=1", "backbone.head_dim=8", "backbone.pooled_dim=40"]
    small += ["conditioner.parts.clip_l.layer=1", f"autoencoder_from={autoencoder_run}"]
    if name in STAGED:  # the last one is published with buckets
        small.append("data.buckets={resolutions:[16],step:4}")
    assert tiny(name, *towers, *widths, *small)["step"] == 2
    ended = list((tmp_path / "sdxl_base").glob("at_*/checkpoints/step-000000002"))
    assert len(ended) == len(STAGED.get(name, [name]))


def test_class_model_on_latents_of_a_codebook(tiny, tmp_path):
    """Both stages, on shards of pictures and classes without a caption."""
    folder = tmp_path / "classes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("00000.tar", 12), ("held_out.tar", 4)):
        with wds.TarWriter(str(folder / name)) as tar:
            for i in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(buffer, "JPEG")
                tar.write({"__key__": f"{name[0]}{i:03d}", "jpg": buffer.getvalue(), "cls": str(i % 3)})
    shards = [f"data.shards={folder}/00000.tar", f"data.validation_shards={folder}/held_out.tar"]
    stage_1 = [text for text in TINY if not text.startswith(("backbone", "++backbone", "sampling"))]
    stage_1 += ["perceptual.weights=random", "discriminator.width=8", "discriminator.norm_groups=4"]
    stage_1 += ["discriminator.layers=1"]
    size = ["data.image_size=16", "data.global_batch_size=4", "data.num_workers=0", f"run_root={tmp_path}"]
    codes = ["autoencoder.quantizer.num_codes=16"]
    argv = ["experiment=autoencoder_vq_f4", *shards, *size, *stage_1, *codes, "module.latent_samples=8"]
    assert train.command(argv) == 0
    small = [*NARROW, "conditioner.context_dim=16", "conditioner.num_classes=4"]
    pictures = ['callbacks.pictures.prompts=["0","2"]', f"autoencoder_from={tmp_path}/autoencoder_vq_f4"]
    assert tiny("ldm_class", *shards, *codes, *small, *pictures)["step"] == 2


def test_upscaler(tiny, autoencoder_run):
    text = [f"conditioner.parts.text.{key}" for key in ("pretrained=random", f"model={TOWER}", "layer=last")]
    small = [*NARROW, "backbone.num_heads=2", "conditioner.context_dim=16"]
    assert tiny("upscaler_x4", *text, *small, f"autoencoder_from={autoencoder_run}")["step"] == 2
