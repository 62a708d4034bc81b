"""The same picture from the same initial latents: diffusers' pipeline of our folder, and our own.

Both go over the same grid. Ours starts at sigma * noise of its first row; theirs begins where the scheduler
says, so that it is given the latents that come to the same. Euler and DDIM are one function here: Euler on
x / alpha of diffusers is our step on x.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints.foreign import folder_in, folder_out
from ldm.checkpoints.model import Asked
from ldm.conditioning.spatial import Upscaling
from ldm.errors import InputError
from ldm.pictures import to_tensor
from ldm.pipeline import Pipeline
from ldm.random import keyed_normal
from ldm.sampling.request import soft_edge
from ldm.types import Batch

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs, under numpy 2

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
SPACINGS = {"ddim": "leading", "euler": "leading", "dpmpp_2m": "trailing"}
STEPS, SCALE, SEED, PROMPT = 4, 5.0, 7, "a red apple, on (blue) wood"
NEAR = 2  # of 255


def cases(families, plain):
    """Every family with every sampler; slow but for those in `plain`, by family or family-sampler."""
    return [
        pytest.param(
            family, sampler, marks=[] if {family, f"{family}-{sampler}"} & plain else [pytest.mark.slow]
        )
        for family in families
        for sampler in SAMPLERS
    ]


@pytest.fixture(scope="session")
def both(saved, peers, tmp_path_factory):
    """(family, sampler) -> our pipeline, and diffusers' with that sampler, of the folder that we write."""
    root = tmp_path_factory.mktemp("pictures")

    @functools.cache
    def opened(family):
        theirs, folder = saved(family, peers.lively)
        folder_out.write(folder_in.read(folder, Asked()), root / family, None, "raw")
        options = {"depth_estimator": None, "feature_extractor": None} if family == "sd2_depth" else {}
        pipe = type(theirs).from_pretrained(root / family, local_files_only=True, **options)
        pipe.set_progress_bar_config(disable=True)
        return Pipeline.of(folder_in.read(root / family, Asked()), "raw", device="cpu"), pipe

    def sampling(family, sampler):
        ours, theirs = opened(family)
        config = dict(theirs.scheduler.config) | {"timestep_spacing": SPACINGS[sampler]}
        theirs.scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(config)
        return ours, theirs

    return sampling


def asked(pipe, sampler, **options):
    settings = {"sampler": sampler, "spacing": SPACINGS[sampler], "num_steps": STEPS, "guidance_scale": SCALE}
    return pipe.request(height=64, width=64, **settings | options)


def start(ours, theirs, request):
    """The latents to give to theirs."""
    factor = ours.autoencoder.factor
    noise = ours._noise([SEED], (4, request.height // factor, request.width // factor), "noise")
    first = request.grid[0]
    theirs.scheduler.set_timesteps(STEPS)
    assert [int(t) for t in theirs.scheduler.timesteps] == [int(row.model_time) for row in request.grid[:-1]]
    level = first.alpha if isinstance(theirs.scheduler, diffusers.EulerDiscreteScheduler) else 1.0
    return first.sigma * noise / level / theirs.scheduler.init_noise_sigma


def pixels(picture):
    return np.asarray(picture).astype(int)


def agree(ours, theirs):
    ours, theirs = pixels(ours), pixels(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= NEAR


@pytest.mark.parametrize(("family", "sampler"), cases(["sd1", "sd2", "sdxl"], {"sd1", "sdxl-euler"}))
def test_text_to_image(both, family, sampler):
    ours, theirs = both(family, sampler)
    options = {"sampler": sampler, "spacing": SPACINGS[sampler], "num_steps": STEPS, "guidance_scale": SCALE}
    (mine,) = ours(PROMPT, seed=SEED, height=64, width=64, **options)
    latents = start(ours, theirs, asked(ours, sampler))
    their = theirs(
        PROMPT, height=64, width=64, num_inference_steps=STEPS, guidance_scale=SCALE, latents=latents
    )
    agree(mine, their.images[0])


def differ(one, other):
    """So much that the comparisons of this file would see it."""
    assert np.abs(pixels(one) - pixels(other)).max() > 20 * NEAR


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_pictures_show_what_is_compared(both, family):
    ours, _ = both(family, "ddim")
    same = {
        "seed": SEED,
        "sampler": "ddim",
        "spacing": "leading",
        "num_steps": STEPS,
        "guidance_scale": SCALE,
    }
    (one,) = ours(PROMPT, height=64, width=64, **same)
    for other in (
        {"guidance_scale": 4.0},
        {"sampler": "dpmpp_2m"},
        {"spacing": "trailing"},
        {"num_steps": 5},
    ):
        differ(one, ours(PROMPT, height=64, width=64, **same | other)[0])
    differ(one, ours("a red apple, on (blue) wool", height=64, width=64, **same)[0])


@pytest.mark.slow
def test_negative_prompts(both):
    ours, theirs = both("sdxl", "ddim")
    options = {"sampler": "ddim", "spacing": "leading", "num_steps": STEPS, "guidance_scale": SCALE}
    (mine,) = ours(PROMPT, seed=SEED, height=64, width=64, negative_prompt="grey", **options)
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "negative_prompt": "grey"}
    latents = start(ours, theirs, asked(ours, "ddim"))
    agree(mine, theirs(PROMPT, height=64, width=64, latents=latents, **given).images[0])


def picture(size=64):
    rows, columns = np.mgrid[0:size, 0:size] / size
    return Image.fromarray(np.uint8(255 * np.stack([rows, columns, (rows + columns) % 1], -1)))


def mask(size=64):
    shown = np.zeros((size, size), np.uint8)
    shown[8:40, 20:61] = 255
    return Image.fromarray(shown)


@pytest.mark.parametrize(
    ("family", "sampler"), cases(["sd1_inpaint", "sdxl_inpaint"], {"sd1_inpaint-dpmpp_2m"})
)
def test_inpainting(both, family, sampler):
    """Their pipeline samples the hidden picture's latents, ours takes their mode: theirs is given that.
    What is away from the mask ours keeps as it is."""
    ours, theirs = both(family, sampler)
    request = asked(ours, sampler, init_image=picture(), mask_image=mask(), strength=1)
    conditioning, _ = ours._conditioning([PROMPT], [SEED], request)
    shown = to_tensor([picture()]) / 127.5 - 1
    hidden = shown * (torch.from_numpy(pixels(mask()))[None, None] < 128)
    mode = theirs.vae.encode(hidden).latent_dist.mode() * theirs.vae.config.scaling_factor
    torch.testing.assert_close(conditioning.concat[:, 1:], mode)
    given = {
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "strength": 1.0,
        "height": 64,
        "width": 64,
    }
    given |= {"image": picture(), "mask_image": mask(), "masked_image_latents": mode}
    their = pixels(theirs(PROMPT, latents=start(ours, theirs, request), **given).images[0])
    same = {"sampler": sampler, "spacing": SPACINGS[sampler], "num_steps": STEPS, "guidance_scale": SCALE}
    (mine,) = ours(PROMPT, seed=SEED, height=64, width=64, init_image=picture(), mask_image=mask(), **same)
    painted, far = pixels(mask()) > 127, soft_edge(request.mask, ours.autoencoder.factor)[0, 0] == 0
    agree(pixels(mine)[painted], their[painted])
    assert (pixels(mine)[far] == pixels(picture())[far]).all()
    differ(their[far], pixels(picture())[far])
    (other,) = ours(PROMPT, seed=SEED, height=64, width=64, init_image=mask(), mask_image=mask(), **same)
    differ(pixels(mine)[painted], pixels(other)[painted])


@pytest.mark.slow
def test_inpainting_of_everything_needs_no_further_word(both):
    ours, theirs = both("sd1_inpaint", "ddim")
    everything = Image.new("L", (64, 64), 255)
    options = {"sampler": "ddim", "spacing": "leading", "num_steps": STEPS, "guidance_scale": SCALE}
    given = {"init_image": picture(), "mask_image": everything, "strength": 1}
    (mine,) = ours(PROMPT, seed=SEED, height=64, width=64, **options, **given)
    hidden = (
        theirs.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode() * theirs.vae.config.scaling_factor
    )
    given = {
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "strength": 1.0,
        "height": 64,
        "width": 64,
    }
    given |= {"image": picture(), "mask_image": everything, "masked_image_latents": hidden}
    their = theirs(PROMPT, latents=start(ours, theirs, asked(ours, "ddim")), **given).images[0]
    agree(mine, their)


@pytest.mark.parametrize(("family", "sampler"), cases(["upscaler"], {"upscaler-ddim"}))
def test_upscaling(both, family, sampler, monkeypatch):
    """The small picture gets the same noise: theirs draws its own, and is lent ours."""
    ours, theirs = both(family, sampler)
    small = picture(16)
    part = ours.conditioner.parts["picture"]
    assert isinstance(part, Upscaling)
    noise = keyed_normal(part.seed, torch.tensor([SEED]), "low-resolution", (3, 16, 16))
    place = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale.randn_tensor"
    monkeypatch.setattr(place, lambda *args, **kwargs: noise)
    request = asked(ours, sampler, init_image=small)
    given = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "noise_level": part.noise_level}
    their = theirs(PROMPT, image=small, latents=start(ours, theirs, request), **given).images[0]
    same = {"sampler": sampler, "spacing": SPACINGS[sampler], "num_steps": STEPS, "guidance_scale": SCALE}
    (mine,) = ours(PROMPT, seed=SEED, init_image=small, **same)
    assert mine.size == (64, 64)
    agree(mine, their)
    differ(mine, ours(PROMPT, seed=SEED, init_image=small.rotate(90), **same)[0])
    with pytest.raises(InputError, match="init_image: this checkpoint draws from a picture; give it"):
        ours(PROMPT)


def test_depth(both):
    ours, theirs = both("sd2_depth", "ddim")
    depth = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(3))
    source = (255 * depth).round().to(torch.uint8)
    size = torch.tensor([[64, 64]])
    batch = Batch(torch.tensor([SEED]), torch.ones(1), caption=[PROMPT], target_size=size)
    with torch.no_grad():
        conditioning = ours.conditioner(replace(batch, source=source[:, None].expand(-1, 3, -1, -1)))
    theirs_map = theirs.prepare_depth_map(
        picture(), source.float(), 1, False, torch.float32, torch.device("cpu")
    )
    torch.testing.assert_close(conditioning.concat, theirs_map, rtol=0, atol=1e-5)
