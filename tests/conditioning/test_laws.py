"""Laws over every YAML of the group: null, drop, where, cat, lone rows, devices; and a step of training."""

from dataclasses import fields, replace

import pytest
import torch

from ldm.backbones.unet import CrossAttentionUNet
from ldm.config import CONFIG_DIR
from ldm.diffusion.denoiser import Simple, Uniform
from ldm.diffusion.guidance import guided
from ldm.diffusion.noise_scheduler import VariancePreserving
from ldm.training.diffusion_module import LatentDiffusionModule
from ldm.training.optim import Constant
from ldm.types import Conditioning

NAMES = sorted(path.stem for path in (CONFIG_DIR / "conditioner").glob("*.yaml"))
SHOWN = {  # what is kept of a dropped caption
    "depth": ["concat"],
    "inpainting": ["concat"],
    "upscaling": ["concat", "label"],
}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def conditioner(name, build_tiny):
    return build_tiny(name)


@pytest.fixture
def whole_batch(whole_batch, name):
    """With a source for what has no other picture to go by."""

    def make(*place):
        batch = whole_batch(*place)
        return replace(batch, source=batch.image) if name == "depth" else batch

    return make


def given_fields(conditioning):
    values = {f.name: getattr(conditioning, f.name) for f in fields(conditioning)}
    return {name: value for name, value in values.items() if value is not None}


def assert_same(one, other, **tolerance):
    one, other = given_fields(one), given_fields(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


def part(batch, rows):
    values = {f.name: getattr(batch, f.name) for f in fields(batch)}
    caption = [batch.caption[i] for i in rows]
    tensors = {k: v[list(rows)] for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(batch, **tensors, caption=caption)


def test_widths_are_those_that_it_states(conditioner, whole_batch):
    given = conditioner(whole_batch())
    widths = {
        "context_dim": None if given.context is None else given.context.shape[-1],
        "pooled_dim": None if given.pooled is None else given.pooled.shape[-1],
        "concat_channels": 0 if given.concat is None else given.concat.shape[1],
    }
    assert widths == {name: getattr(conditioner, name) for name in widths}
    assert (given.label is None) == (conditioner.num_classes is None)
    if given.label is not None:
        assert int(given.label.max()) < conditioner.num_classes


def test_null_keeps_shapes_and_what_is_shown(conditioner, name, whole_batch):
    given = conditioner(whole_batch())
    null = conditioner.null(given)
    assert {k: v.shape for k, v in given_fields(null).items()} == {
        k: v.shape for k, v in given_fields(given).items()
    }
    assert_same(conditioner.null(null), null)
    for field, value in given_fields(null).items():
        if field in SHOWN.get(name, ()):
            assert torch.equal(value, getattr(given, field))
        elif name == "sdxl":
            assert not value[:, ..., :8].any()
            assert torch.equal(value[:, 8:], given.pooled[:, 8:]) or field == "context"
            assert field == "pooled" or not value.any()
        else:
            torch.testing.assert_close(value[0], getattr(given, field)[1])  # row 1 says nothing
            assert not torch.equal(value[0], getattr(given, field)[0])


def test_dropped_rows_are_null_and_the_others_as_given(conditioner, whole_batch):
    given = conditioner(whole_batch())
    null = conditioner.null(given)
    dropped = given.where(torch.tensor([True, False, False]), null)
    for field, value in given_fields(dropped).items():
        assert torch.equal(value[0], getattr(given, field)[0])
        assert torch.equal(value[1:], getattr(null, field)[1:])


def test_cat_is_rowwise(conditioner, whole_batch):
    given = conditioner(whole_batch())
    null = conditioner.null(given)
    for field, value in given_fields(given.cat(null)).items():
        assert torch.equal(value[:3], getattr(given, field))
        assert torch.equal(value[3:], getattr(null, field))


def test_rows_do_not_see_each_other(conditioner, whole_batch):
    batch = whole_batch()
    together = conditioner(batch)
    for i in range(3):
        alone = given_fields(conditioner(part(batch, [i])))
        for field, value in alone.items():
            torch.testing.assert_close(value[0], getattr(together, field)[i], rtol=1e-4, atol=1e-5)


def test_it_goes_where_it_is_moved_and_never_waits_for_the_device(conditioner, autoencoder, whole_batch):
    """Of a meta tensor no value can be read: whatever asked the device for one would raise here."""
    batch = whole_batch()
    expected = given_fields(conditioner(batch))
    autoencoder.to("meta")
    moved = given_fields(conditioner.to("meta")(batch.to("meta")))
    assert {k: (v.device.type, v.shape) for k, v in moved.items()} == {
        k: ("meta", v.shape) for k, v in expected.items()
    }
    null = given_fields(conditioner.null(Conditioning(**moved)))
    assert {v.device.type for v in null.values()} == {"meta"}


def test_it_owns_no_autoencoder(conditioner):
    assert not [key for key in conditioner.state_dict() if "conv_in" in key or "picture" in key]


@pytest.fixture
def module(conditioner, autoencoder):
    torch.manual_seed(1)
    backbone = CrossAttentionUNet(
        in_channels=4 + conditioner.concat_channels,
        out_channels=4,
        block_out_channels=[8, 16],
        layers_per_block=1,
        transformer_depth=[0, 1],
        head_dim=8,
        norm_groups=4,
        **{name: getattr(conditioner, name) for name in ("context_dim", "pooled_dim", "num_classes")},
    )
    torch.nn.init.normal_(backbone.conv_out.weight, std=0.1)
    parts = (autoencoder, conditioner, backbone, VariancePreserving(), Simple(), Uniform())
    return LatentDiffusionModule(
        *parts, optimizer=torch.optim.AdamW, lr_schedule=Constant(), drop=0.5, seed=3
    ).train()


def test_a_backbone_trains_with_it(module, whole_batch):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    first, last = (module.training_step(whole_batch(8, start), 0) for start in (0, 8))
    assert first != last
    assert torch.equal(module.training_step(whole_batch(8), 0), first)  # all that is random is keyed
    first.backward()
    assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    assert module.training_step(whole_batch(8), 0) != first


def test_guidance_samples_with_it(module, conditioner, whole_batch):
    given = conditioner(whole_batch())
    row = module.noise_scheduler.grid(2, "trailing")[0]
    x = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        once, twice = (guided(module.denoiser, given, conditioner.null(given), s)(x, row) for s in (1.0, 2.0))
    assert once.shape == x.shape
    assert torch.isfinite(twice).all()


@pytest.mark.parametrize(("name", "option"), [("inpainting", "in_channels"), ("class_label", "num_classes")])
def test_a_backbone_of_other_width_is_refused(name, option, build_tiny, autoencoder):
    conditioner = build_tiny(name)
    widths = {"in_channels": 4, "num_classes": None, "context_dim": conditioner.context_dim}
    backbone = CrossAttentionUNet(
        **widths, block_out_channels=[8], transformer_depth=1, num_heads=1, norm_groups=4
    )
    message = {
        "in_channels": "backbone.in_channels=4, but latents have 4 channels and the conditioner joins 5",
        "num_classes": "backbone.num_classes=None, but conditioner.num_classes=11",
    }
    with pytest.raises(ValueError, match=message[option]):
        LatentDiffusionModule(
            *(autoencoder, conditioner, backbone, VariancePreserving(), Simple(), Uniform()),
            optimizer=torch.optim.AdamW,
            lr_schedule=Constant(),
        )


def test_a_shorter_context_is_masked():
    one = Conditioning(context=torch.ones(1, 2, 3))
    both = one.cat(Conditioning(context=torch.full((2, 4, 3), 2.0)))
    assert both.context.shape == (3, 4, 3)
    assert both.context_mask.tolist() == [[True, True, False, False]] + [[True] * 4] * 2
    again = both.cat(one)
    assert again.context_mask[3].tolist() == [True, True, False, False]
    assert torch.equal(again.context[3, :2], one.context[0])
