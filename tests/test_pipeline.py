"""Pictures from exact toy networks (a Gaussian around each caption's colour), and from a tiny checkpoint."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters

import ldm
from ldm.conditioning.base import ConditionerModule
from ldm.diffusion.noise_scheduler import RectifiedFlow
from ldm.diffusion.samplers import ddim, dpmpp_2m
from ldm.errors import InputError
from ldm.nn import compiling, norm
from ldm.nn.graph import Graphed
from ldm.pictures import parse_recipe, to_tensor
from ldm.pipeline import Pipeline
from ldm.sampling.request import soft_edge
from ldm.types import Conditioning
from tests.taped import Recorder

COLOURS = {
    "red": (0.8, -0.6, -0.6),
    "green": (-0.6, 0.5, -0.6),
    "blue": (-0.6, -0.5, 0.8),
    "": (0.0, 0.0, 0.0),
}
SPREAD = 0.3  # standard deviation of the toy's pictures around their colour


class Pixels(nn.Module):
    """An exact autoencoder of factor 2: a block of pixels becomes channels."""

    factor, latent_channels = 2, 12

    def encode(self, images, noise=None):
        assert noise is None
        return nn.functional.pixel_unshuffle(images, 2)

    def decode(self, latents):
        return nn.functional.pixel_shuffle(latents, 2)


class Names(ConditionerModule):
    """Context is the colour that the caption names."""

    def forward(self, batch):
        colour = [COLOURS[caption.split(",")[0]] for caption in batch.caption]
        return Conditioning(context=torch.tensor(colour)[:, None])

    def null(self, given):
        return Conditioning(context=torch.zeros_like(given.context))


class Exact(nn.Module):
    """The flow of N(colour, SPREAD^2), in closed form; counts what it is called with."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.down_blocks = [None, None]  # two levels

    def forward(self, x, time, conditioning):
        self.batches.append(len(x))
        t = (time / 1000).view(-1, 1, 1, 1)
        mean = conditioning.context[:, 0].repeat_interleave(4, dim=1)[:, :, None, None]
        gain = (1 - t) * SPREAD**2 / ((1 - t) ** 2 * SPREAD**2 + t**2)
        clean = mean + gain * (x - (1 - t) * mean)
        return (x - (1 - t) * clean) / t - clean


@pytest.fixture
def toy():
    sampling = {"num_steps": 8, "spacing": "uniform", "guidance_scale": 1.0, "height": 16, "width": 16}
    return Pipeline(Pixels(), Names(), Exact(), RectifiedFlow(), ddim, sampling, device="cpu", name="toy")


def mean_colour(picture):
    return np.asarray(picture).reshape(-1, 3).mean(0) / 127.5 - 1


def test_each_prompt_gets_its_pictures_in_order(toy):
    pictures = toy(["red", "green", "blue"], num_images=2)
    assert [p.size for p in pictures] == [(16, 16)] * 6
    for picture, name in zip(pictures, ("red", "red", "green", "green", "blue", "blue"), strict=True):
        assert mean_colour(picture) == pytest.approx(COLOURS[name], abs=0.1)
    fine = np.asarray(toy("", num_steps=100)[0])
    assert fine.std() / 127.5 == pytest.approx(SPREAD, rel=0.1)
    assert toy("red")[0].tobytes() == pictures[0].tobytes()
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_picture_i_is_that_of_seed_plus_i_whatever_the_batch(toy, sampler, batch_size):
    together = toy(["red", "green"], num_images=2, seed=5, sampler=sampler, batch_size=4)
    apart = toy(["red", "green"], num_images=2, seed=5, sampler=sampler, batch_size=batch_size)
    alone = [toy(p, seed=5 + i, sampler=sampler)[0] for i, p in enumerate(["red", "red", "green", "green"])]
    for other in (apart, alone):
        difference = to_tensor(together).int() - to_tensor(other).int()
        assert difference.abs().max() <= 1


def test_noise_is_a_function_of_the_seed_and_the_purpose(toy):
    shape = (12, 8, 8)
    both = toy._noise([3, 4], shape, "noise")
    assert torch.equal(both[1:], toy._noise([4], shape, "noise"))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(toy._noise([3], shape, "step-0"), both[:1])


def test_guidance_pushes_away_from_null_and_from_the_negative_prompt(toy):
    plain = mean_colour(toy("red")[0])
    toy.backbone.batches.clear()
    toward = mean_colour(toy("red", guidance_scale=1.5)[0])
    assert set(toy.backbone.batches) == {2}  # the prompt and nothing
    away = mean_colour(toy("red", guidance_scale=1.5, negative_prompt="green")[0])
    assert (np.abs(toward) > np.abs(plain) + 0.05).any()
    assert away[1] < toward[1] - 0.1
    rescaled = mean_colour(toy("red", guidance_scale=3.0, guidance_rescale=1.0)[0])
    assert not np.allclose(rescaled, mean_colour(toy("red", guidance_scale=3.0)[0]), atol=0.01)


def sketch(size=(16, 16)):
    picture = Image.new("RGB", size, "white")
    picture.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return picture


def test_image_to_image_follows_sketch_and_text(toy):
    steps = {}
    for strength in (0.05, 0.5, 1.0):
        toy.backbone.batches.clear()
        picture = np.asarray(toy("red", init_image=sketch(), strength=strength, num_steps=20)[0]) / 127.5 - 1
        steps[strength] = len(toy.backbone.batches)
        left, right = picture[:, :8].mean((0, 1)), picture[:, 8:].mean((0, 1))
        contrast = (right - left).mean()
        if strength == 0.05:
            assert contrast > 1.0  # of 2: next to the sketch itself
        elif strength == 0.5:
            assert contrast > 0.2  # still light on the right,
            assert (left + right)[0] / 2 - (left + right)[1] / 2 > 0.5  # and red
        else:
            assert abs(contrast) < 0.15
    assert steps == {0.05: 1, 0.5: 10, 1.0: 20}


def white(box, size=(16, 16)):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_white_of_the_mask_is_drawn_anew_and_the_rest_kept_bit_for_bit(toy, sampler):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    options = {"init_image": image, "strength": 1.0, "num_steps": 20, "sampler": sampler}
    [picture] = toy("red", mask_image=white((8, 0, 16, 16)), **options)
    drawn, before = np.asarray(picture), np.asarray(image)
    assert (drawn[:, :6] == before[:, :6]).all()  # a latent cell, two pixels, away from white
    assert drawn[:, 8:].reshape(-1, 3).mean(0) / 127.5 - 1 == pytest.approx(COLOURS["red"], abs=0.2)
    recipe = parse_recipe(picture.info["parameters"])
    assert (recipe["Denoising strength"], len(recipe["Init image hash"]), len(recipe["Mask hash"])) == (
        "1",
        16,
        16,
    )
    [whole] = toy("red", mask_image=white((0, 0, 16, 16)), **options)
    assert whole.tobytes() == toy("red", num_steps=20, sampler=sampler)[0].tobytes()


def test_soft_edge_is_one_on_the_mask_and_nothing_a_cell_away():
    mask = torch.zeros(1, 1, 9, 40, dtype=torch.bool)
    mask[..., 20:] = True
    share = soft_edge(mask, 8)[0, 0, 4]
    assert (share[20:] == 1).all()
    assert (share[:12] == 0).all()
    assert (share[12:21].diff() > 0).all()


def test_guidance_acts_within_its_interval(toy):
    plain, always = toy("red")[0].tobytes(), toy("red", guidance_scale=2.0)[0].tobytes()
    toy.backbone.batches.clear()
    part = toy("red", guidance_scale=2.0, guidance_interval=[0.5, 2.0])[0]
    assert set(toy.backbone.batches) == {1, 2}
    assert part.tobytes() not in (plain, always)
    assert parse_recipe(part.info["parameters"])["CFG interval"] == "0.5 to 2"
    assert toy("red", guidance_scale=2.0, guidance_interval=(0, float("inf")))[0].tobytes() == always


def test_each_picture_may_have_its_own_seed(toy):
    pictures = toy(["red"] * 3, seed=[7, 3, 7])
    assert [parse_recipe(p.info["parameters"])["Seed"] for p in pictures] == ["7", "3", "7"]
    assert pictures[0].tobytes() == pictures[2].tobytes() != pictures[1].tobytes()
    with pytest.raises(InputError, match="seed: 2 for 1 pictures"):
        toy("red", seed=[1, 2])


def test_tiles_of_an_exact_autoencoder_change_nothing(toy):
    calls = []
    decode = toy.autoencoder.decode
    toy.autoencoder.decode = lambda latents: (calls.append(latents.shape[-2:]), decode(latents))[1]
    at_once, tiled = (toy("red", height=32, width=48, tile=tile)[0] for tile in (None, 16))
    difference = to_tensor([at_once]).int() - to_tensor([tiled]).int()
    assert difference.abs().max() <= 1
    assert (calls[0], set(calls[1:])) == ((16, 24), {(8, 8)})
    assert parse_recipe(tiled.info["parameters"])["Tile"] == "16"


def test_init_image_is_turned_covered_cut_and_put_on_white(toy, tmp_path):
    wide = Image.new("RGBA", (64, 16), (0, 0, 0, 0))  # transparent, with an opaque middle
    wide.paste((200, 0, 0, 255), (26, 0, 38, 16))
    wide.save(tmp_path / "wide.png")
    [picture] = toy("", init_image=tmp_path / "wide.png", strength=0.01, num_steps=100, height=16, width=16)
    pixels = np.asarray(picture).astype(int)
    assert (pixels[:, 7:9] - (200, 0, 0) < 40).all()
    assert (pixels[:, [0, 15]] > 200).all()


def test_defaults_come_from_the_checkpoint_and_the_recipe_tells_all(toy):
    recipe = parse_recipe(toy("red", seed=9)[0].info["parameters"])
    assert recipe == {
        "prompt": "red",
        "negative_prompt": "",
        "Steps": "8",
        "Sampler": "DDIM",
        "Schedule type": "Uniform",
        "CFG scale": "1",
        "Seed": "9",
        "Size": "16x16",
        "Model": "toy",
        "Version": f"ldm {ldm.__version__}",
    }
    options = {"num_steps": 4, "sampler": "euler_ancestral", "spacing": "karras", "guidance_scale": 1.5}
    more = {
        "guidance_rescale": 0.5,
        "height": 8,
        "width": 24,
        "seed": 2,
        "init_image": sketch(),
        "strength": 0.5,
    }
    pictures = toy(["red", "red, dark"], negative_prompt="blue", **options, **more)
    assert pictures[1].size == (24, 8)
    recipe = parse_recipe(pictures[1].info["parameters"])
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["Seed"]) == ("red, dark", "blue", "3")
    assert (recipe["Sampler"], recipe["Schedule type"], recipe["Steps"]) == ("Euler a", "Karras", "4")
    assert (recipe["CFG scale"], recipe["CFG rescale"], recipe["Denoising strength"]) == ("1.5", "0.5", "0.5")


def test_sampler_may_be_a_name_a_section_or_a_function(toy):
    section = {"_target_": "ldm.diffusion.samplers.dpmpp_2m", "_partial_": True}
    pictures = [toy("red", sampler=s)[0] for s in ("dpmpp_2m", section, dpmpp_2m, partial(dpmpp_2m))]
    assert len({p.tobytes() for p in pictures}) == 1
    names = [parse_recipe(p.info["parameters"])["Sampler"] for p in pictures]
    assert names == ["DPM++ 2M"] * 4
    section = {"_target_": "ldm.diffusion.samplers.ddim", "_partial_": True, "eta": 0.25}
    recipe = parse_recipe(toy("red", sampler=section)[0].info["parameters"])
    assert (recipe["Sampler"], recipe["Sampler eta"]) == ("DDIM", "0.25")
    recipe = parse_recipe(toy("red", sampler=partial(dpmpp_2m, eta=1.0))[0].info["parameters"])
    assert recipe["Sampler"] == "DPM++ 2M SDE"
    assert "Sampler eta" not in recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps=0: need 1..1000"),
        ({"num_steps": 2.5}, "num_steps=2.5: need 1..1000"),
        ({"num_images": 0}, "num_images=0: need 1 or more"),
        ({"batch_size": 0}, "batch_size=0: need 1 or more"),
        ({"height": 50}, "height=50: must be a multiple of 4; nearest: 48, 52"),
        ({"width": 3}, "width=3: must be a multiple of 4; nearest: 4"),
        ({"width": -4}, "width=-4: need 1 or more"),
        ({"guidance_scale": "x"}, "guidance_scale=x: need a number"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: need a number"),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5: need a number in 0..1"),
        ({"spacing": "leading"}, "sampling: spacing=leading .* RectifiedFlow"),
        ({"sampler": "lms"}, "sampler=lms: no such option; have: ddim"),
        ({"init_image": "missing.png"}, "init_image=missing.png: no such file"),
        ({"init_image": "sample.yaml"}, "init_image=.*sample.yaml: not a picture"),
        ({"init_image": Image.new("RGB", (8, 8)), "strength": 0}, "strength=0: need more than 0"),
        ({"init_image": Image.new("RGB", (8, 8)), "strength": 1.1}, "strength=1.1: need a number in 0..1"),
        ({"prompts": []}, "prompt: there is none"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_before_any_work(toy, options, message, pytestconfig):
    if options.get("init_image") == "sample.yaml":
        options = {"init_image": pytestconfig.rootpath / "configs" / "sample.yaml"}
    with pytest.raises(InputError, match=message) as error:
        toy(**({"prompts": "red"} | options))
    assert "\n" not in str(error.value)
    assert toy.backbone.batches == []


def test_progress_bar_counts_steps(toy, capsys):
    toy(["red"] * 3, batch_size=2, progress=True)
    assert capsys.readouterr().out == ""


# ---- a real checkpoint ----


def test_load_draws_and_repeats(tiny_run):
    pipe = ldm.load(tiny_run, device="cpu")
    pictures = pipe(["red apple", "blue pear"], seed=3)
    assert [p.size for p in pictures] == [(16, 16)] * 2
    again = ldm.load(tiny_run / "diffusion", device="cpu")(["red apple", "blue pear"], seed=3)
    assert [p.tobytes() for p in again] == [p.tobytes() for p in pictures]
    assert pictures[0].tobytes() != pipe("blue pear", seed=3)[0].tobytes()  # the prompt counts
    recipe = parse_recipe(pictures[1].info["parameters"])
    assert recipe["Model"] == "tiny step-000000012"
    assert len(recipe["Model hash"]) == 10
    assert (recipe["Steps"], recipe["CFG scale"], recipe["Seed"]) == ("3", "2", "4")
    assert not any(p.requires_grad for p in pipe.backbone.parameters())
    assert not (pipe.backbone.training)
    assert not (pipe.conditioner.training)
    assert not (pipe.autoencoder.training)
    assert pipe.multiple == 8


def test_weights_are_ema_unless_raw_is_asked_for(tiny_run):
    ema, raw = ldm.load(tiny_run, device="cpu"), ldm.load(tiny_run, weights="raw", device="cpu")
    for one, other in zip(ema.backbone.parameters(), raw.backbone.parameters(), strict=True):
        assert torch.allclose(one, other * 0.9)
    assert ema.digest != raw.digest
    assert ema("red apple")[0].tobytes() != raw("red apple")[0].tobytes()
    assert torch.equal(ema.autoencoder.latent_scale, torch.full((4,), 0.5))


def test_without_averages_the_weights_are_those_there_are(make_run, tmp_path):
    make_run(tmp_path / "run", ema=False)
    raw = ldm.load(tmp_path / "run", weights="raw", device="cpu")("a")[0]
    assert ldm.load(tmp_path / "run", device="cpu")("a")[0].tobytes() == raw.tobytes()
    with pytest.raises(InputError, match="weights=best: no such option; have: ema, raw, ema:LENGTH"):
        ldm.load(tmp_path / "run", weights="best")


def test_moved_run_still_samples(make_run, tmp_path):
    make_run(tmp_path / "here")
    before = ldm.load(tmp_path / "here", device="cpu")("a")[0]
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert ldm.load(tmp_path / "there", device="cpu")("a")[0].tobytes() == before.tobytes()


def test_first_stage_alone_reconstructs_but_draws_nothing(make_run, tmp_path):
    from ldm.checkpoints import native

    source = ldm.load(make_run(tmp_path / "run"), device="cpu").autoencoder
    config = "\n".join(
        [
            "run_name: first",
            "data: {image_size: 16}",
            "conditioner: null",
            "autoencoder: {_target_: ldm.autoencoder.kl.AutoencoderKL, latent_channels: 4,",
            "  layers_per_block: 1, block_out_channels: [8, 8, 8], norm_groups: 4, mid_attention: false}",
        ]
    )
    raw = {f"autoencoder.{key}": value for key, value in source.state_dict().items()}
    ema = {key: value * 0.5 for key, value in raw.items() if "latent" not in key}
    documents = {"state.json": {"step": 1, "networks": {}}, "config.yaml": config}
    native.save(tmp_path / "first/checkpoints", 1, {"model": raw, "ema": ema}, documents)
    pipe = ldm.load(tmp_path / "first", device="cpu")
    assert torch.equal(pipe.autoencoder.encoder.conv_in.weight, source.encoder.conv_in.weight * 0.5)
    assert torch.equal(pipe.autoencoder.latent_scale, source.latent_scale)
    with pytest.raises(InputError, match="checkpoint=first step-000000001: holds an autoencoder alone"):
        pipe("a")


@pytest.mark.parametrize("target", ["os.system", "ldm.pipeline.load", "builtins.eval"])
def test_a_strangers_checkpoint_runs_nothing(make_run, tmp_path, target):
    make_run(tmp_path / "run")
    config = (tmp_path / "run/diffusion/checkpoints/step-000000012/config.yaml").read_text()
    config = config.replace("ldm.diffusion.samplers.ddim", target)
    from ldm.checkpoints import native

    folder = tmp_path / "run/diffusion/checkpoints/step-000000012"
    tensors = {name: native.load_tensors(folder, name) for name in ("model", "ema")}
    state = native.load_document(folder, "state.json")
    native.save(folder.parent, 13, tensors, {"state.json": state, "config.yaml": config})
    with pytest.raises(InputError, match="not in the allowed list"):
        ldm.load(tmp_path / "run", device="cpu")("a")


def test_weights_that_do_not_fit_are_one_line(make_run, tmp_path):
    from ldm.checkpoints import native

    folder = make_run(tmp_path / "run")
    tensors = {name: native.load_tensors(folder, name) for name in ("model", "ema")}
    for values in tensors.values():
        del values["backbone.conv_in.weight"]
    documents = {name: native.load_document(folder, name) for name in ("state.json", "config.yaml")}
    native.save(folder.parent, 13, tensors, documents)
    with pytest.raises(InputError, match=r"weights do not fit its backbone: .*conv_in.weight") as error:
        ldm.load(tmp_path / "run")
    assert "\n" not in str(error.value)


def test_bfloat16_is_close_and_computed_in_bfloat16(tiny_run):
    exact, rough = (ldm.load(tiny_run, device="cpu", dtype=d) for d in (None, torch.bfloat16))
    seen = []
    rough.backbone.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    a, b = exact("red apple")[0], rough("red apple")[0]
    assert set(seen) == {torch.bfloat16}
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() < 8


# What conditioners are told: tests/conditioning has what they make of it


class Listening(Names):
    """Notes the batches that it is asked about, and how it is read."""

    def __init__(self):
        super().__init__()
        self.source_scale, self.batches, self.readings = 1, [], []

    def forward(self, batch):
        self.batches.append(batch)
        return super().forward(batch)

    def reading(self, *how):
        self.readings.append(how)
        return self


def test_prompt_weights_and_clip_skip_reach_the_conditioner_and_the_recipe(toy):
    toy.conditioner = Listening()
    assert "Clip skip" not in parse_recipe(toy("red")[0].info["parameters"])
    assert toy.conditioner.readings == []
    [picture] = toy("red", prompt_weights=True, clip_skip=2, guidance_scale=2, negative_prompt="green")
    assert toy.conditioner.readings == [(True, 2)]
    fields = parse_recipe(picture.info["parameters"])
    assert fields["Clip skip"] == "2"
    assert fields["Prompt weights"] == "on"
    with pytest.raises(InputError, match="clip_skip=0: need 1 or more"):
        toy("red", clip_skip=0)


def test_conditioners_are_told_sizes_seeds_and_the_picture_to_start_from(toy):
    toy.conditioner = Listening()
    toy(["red", "green"], seed=7, height=16, width=24, init_image=sketch(), batch_size=1)
    first, second = toy.conditioner.batches
    assert [batch.n.tolist() for batch in (first, second)] == [[7], [8]]  # not the place in the batch
    for name, value in {"original_size": [16, 24], "crop": [0, 0], "target_size": [16, 24]}.items():
        assert getattr(first, name).tolist() == [value]
    assert first.source.shape == (1, 3, 16, 24)


# ---- what `speed` switches on


def close(found, expected):
    """Pictures of 8 bits, equal but for rounding."""
    for a, b in zip(found, expected, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_networks_draw_the_same(tiny_run, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    limits = {"recompile_limit": 8, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(limits):
        quick = ldm.load(tiny_run, device="cpu", speed={"compile": True})
        found = quick("red apple", num_images=2)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        quick("blue pear", num_images=2, seed=5)
    assert counters["stats"]["unique_graphs"] == graphs
    close(found, ldm.load(tiny_run, device="cpu")("red apple", num_images=2))


def test_the_fused_norm_draws_the_same_and_is_of_the_pipeline(tiny_run, monkeypatch):
    pytest.importorskip("triton")
    from ldm.nn.kernels import group_norm as kernels

    used, original = [], kernels.group_norm
    monkeypatch.setattr(kernels, "group_norm", lambda *a: used.append(a) or original(*a))
    expected = ldm.load(tiny_run, device="cpu")("red apple")
    assert not used
    close(ldm.load(tiny_run, device="cpu", speed={"fused_norm": True})("red apple"), expected)
    assert used
    assert not norm._fused


def test_a_graph_of_the_backbone_draws_the_same(tiny_run, monkeypatch):
    """With what stands in for a graph, one for the passes with guidance and one for those without."""
    made = []
    monkeypatch.setattr("ldm.pipeline.Graphed", lambda net: made.append(Graphed(net, Recorder())) or made[-1])
    monkeypatch.setattr(Pipeline, "_may_record", lambda self: True)
    options = {"num_images": 3, "batch_size": 2, "guidance_interval": (1.0, 5.0), "sampler": "heun"}
    pipe = ldm.load(tiny_run, device="cpu", speed={"cuda_graph": True})
    found = pipe("red apple", **options)
    assert len(made[0].graphs) == 3, "of 4 rows, of 2 and of 1"
    close(found, ldm.load(tiny_run, device="cpu")("red apple", **options))


def test_without_a_gpu_a_graph_is_refused(tiny_run):
    with pytest.raises(InputError, match="speed.cuda_graph: there is no GPU"):
        ldm.load(tiny_run, device="cpu", speed={"cuda_graph": True})
