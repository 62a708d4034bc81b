"""Pictures beside the latents: masks, what is hidden, and the noise on a small picture."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ldm.conditioning.spatial import Depth, Inpainting, Upscaling, random_masks, resized
from ldm.diffusion.noise_scheduler import VariancePreserving


@pytest.fixture
def inpainting(autoencoder):
    conditioner = Inpainting(seed=1)
    conditioner.use_autoencoder(autoencoder)
    return conditioner


@pytest.fixture
def upscaling(autoencoder):
    scheduler = VariancePreserving(schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
    conditioner = Upscaling(scheduler, seed=1)
    conditioner.use_autoencoder(autoencoder)
    return conditioner


@pytest.mark.parametrize("size", [(24, 40), (32, 32)])
def test_masks_are_functions_of_seed_and_place(size):
    n = torch.arange(40)
    masks = random_masks(3, n, *size)
    assert masks.shape == (40, 1, *size)
    assert masks.unique().tolist() == [0, 1]
    assert torch.equal(masks, random_masks(3, n, *size))
    assert torch.equal(masks[[7, 30]], random_masks(3, n[[7, 30]], *size))
    assert not torch.equal(masks, random_masks(4, n, *size))
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 25


@pytest.mark.parametrize("full", [0.25, 0.6])
def test_the_share_of_full_masks_is_as_stated(full):
    masks = random_masks(0, torch.arange(2000), 16, 16, full)
    covered = masks.mean((1, 2, 3))
    assert (covered == 1).double().mean() == pytest.approx(full, abs=0.03)
    partial = covered[covered < 1]
    assert partial.min() > 0
    assert 0.2 < partial.mean() < 0.6
    assert (random_masks(0, torch.arange(100), 16, 16, 0.0).mean((1, 2, 3)) < 1).all()


def test_masks_are_boxes_and_strokes():
    """A box fills its bounding box; a stroke does not. Both are about as many."""
    masks = random_masks(0, torch.arange(400), 32, 32, 0.0)[:, 0].bool()
    filled = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        filled.append(bool(mask.sum() == area))
    single = sum(filled) / len(filled)
    assert 0.04 < single < 0.3  # half are boxes, one in eight of these a single one, or more that overlap


def test_what_is_to_be_painted_is_hidden(inpainting, autoencoder, whole_batch):
    batch = replace(whole_batch(), mask=torch.zeros(3, 1, 32, 32))
    batch.mask[0, :, 8:16, 12:24] = 1
    batch.mask[1] = 1
    concat = inpainting(batch).concat
    assert concat.shape == (3, 5, 8, 8)
    expected = torch.zeros(8, 8)
    expected[2:4, 3:6] = 1
    assert torch.equal(concat[0, 0], expected)
    torch.testing.assert_close(concat[2, 1:], autoencoder.encode(batch.image[2:] / 127.5 - 1)[0])
    grey = (batch.image / 127.5 - 1)[:1]
    grey[:, :, 8:16, 12:24] = 0
    torch.testing.assert_close(concat[0, 1:], autoencoder.encode(grey)[0])
    other = batch.image.clone()
    other[0, :, 8:16, 12:24], other[1] = 99, 99  # behind the masks
    assert torch.equal(inpainting(replace(batch, image=other)).concat, concat)


def test_training_draws_its_masks(inpainting, whole_batch):
    concat = inpainting(whole_batch(50)).concat
    masks = random_masks(1, torch.arange(50), 32, 32, 0.25)
    assert torch.equal(concat[:, :1], F.interpolate(masks, (8, 8)))


def test_without_a_picture_everything_is_painted(inpainting, whole_batch):
    size = torch.tensor([[16, 32]]).expand(3, -1)
    concat = inpainting(replace(whole_batch(), image=None, target_size=size)).concat
    assert concat.shape == (3, 5, 4, 8)
    assert (concat[:, 0] == 1).all()
    with pytest.raises(ValueError, match="latents made beforehand cannot be masked"):
        inpainting(replace(whole_batch(), image=None, moments=torch.zeros(3, 8, 8, 8), target_size=size))


def test_a_small_picture_gets_noise_of_its_level(upscaling, whole_batch):
    given = upscaling(whole_batch(1000))
    assert 0 <= given.label.min() < 10
    assert 340 < given.label.max() <= 350
    batch = whole_batch(1000)
    low = resized(batch.image / 127.5 - 1, 8, 8)
    alpha, sigma = (
        f(given.label.float()).view(-1, 1, 1, 1)
        for f in (upscaling.noise_scheduler.alpha, upscaling.noise_scheduler.sigma)
    )
    noise = (given.concat - alpha * low) / sigma
    assert noise.mean().abs() < 0.01
    assert noise.std() == pytest.approx(1, abs=0.01)
    again = upscaling(whole_batch(1000, 7))
    assert given.label[7] == again.label[0]  # of the place in the run alone


def test_a_given_picture_gets_the_sampling_level(upscaling, whole_batch):
    batch = whole_batch()
    small = upscaling(replace(batch, image=None, source=batch.image[:, :, :8, :8].contiguous()))
    assert small.label.tolist() == [20, 20, 20]
    assert small.concat.shape == (3, 3, 8, 8)
    size = torch.tensor([[32, 32]]).expand(3, -1)
    large = upscaling(replace(batch, image=None, source=batch.image, target_size=size))
    assert large.concat.shape == (3, 3, 8, 8)
    clean = resized(batch.image / 127.5 - 1, 8, 8)
    assert (large.concat - clean).std() < 0.2
    with pytest.raises(ValueError, match="upscaling needs a picture to enlarge"):
        upscaling(replace(batch, image=None))


def test_noise_is_that_of_diffusers(upscaling):
    """The upscaler's pipeline noises its small picture with a DDPMScheduler."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
    image, noise = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    level = torch.tensor([0, 20, 350])
    expected = theirs.add_noise(image, noise, level)
    ours = upscaling.noise_scheduler
    alpha, sigma = (f(level.float()).view(-1, 1, 1, 1) for f in (ours.alpha, ours.sigma))
    torch.testing.assert_close(alpha * image + sigma * noise, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def depth(autoencoder):
    conditioner = Depth()
    conditioner.use_autoencoder(autoencoder)
    return conditioner


def test_depth_is_prepared_as_by_diffusers(depth, whole_batch):
    """The depth pipeline: bicubic to the latents' size, then by its own least and greatest value."""
    batch = whole_batch()
    source = batch.image[:, :, :20, :28]
    given = depth(replace(batch, source=source)).concat
    grey = source.float().mean(1, keepdim=True)
    grey = F.interpolate(grey, size=(8, 8), mode="bicubic", align_corners=False)
    low, high = torch.amin(grey, dim=[1, 2, 3], keepdim=True), torch.amax(grey, dim=[1, 2, 3], keepdim=True)
    torch.testing.assert_close(given, 2.0 * (grey - low) / (high - low) - 1.0)
    assert given.amin((1, 2, 3)).tolist() == [-1, -1, -1]
    assert given.amax((1, 2, 3)).tolist() == [1, 1, 1]


def test_a_flat_map_is_far_and_finite(depth, whole_batch):
    batch = whole_batch()
    flat = torch.full((3, 3, 30, 22), 201, dtype=torch.uint8)
    assert (depth(replace(batch, source=flat)).concat == -1).all()


def test_depth_has_the_size_of_the_latents(depth, whole_batch):
    batch = replace(whole_batch(), image=None, source=whole_batch().image)
    assert depth(batch).concat.shape == (3, 1, 8, 8)
    assert depth(replace(batch, moments=torch.zeros(3, 8, 5, 6))).concat.shape == (3, 1, 5, 6)
    size = torch.tensor([[16, 24]]).expand(3, -1)
    assert depth(replace(batch, target_size=size)).concat.shape == (3, 1, 4, 6)
    assert depth.to(torch.bfloat16)(batch).concat.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"needs a map of it: batch.source, in sampling init_image"):
        depth(replace(batch, source=None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inpainting(full=1.5), "full=1.5 is not a share"),
        (lambda: Upscaling(None, max_noise_level=1000), "max_noise_level=1000, num_classes=1000"),
        (lambda: Upscaling(None, noise_level=400), "noise_level=400, max_noise_level=350"),
    ],
)
def test_wrong_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
