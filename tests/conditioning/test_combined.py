"""Several conditioners in one, and the whole of SDXL's conditioning against diffusers and transformers."""

from types import SimpleNamespace

import pytest
import torch

from ldm.backbones.unet import CrossAttentionUNet
from ldm.conditioning.combined import Combined, Sizes
from ldm.conditioning.frozen import FrozenOpenCLIP
from ldm.conditioning.label import ClassLabel
from ldm.conditioning.text import TextTransformer
from ldm.errors import InputError
from ldm.types import Batch

CAPTIONS = ["a red apple on a blue background", "two cats"]


def sizes_of(*facts):
    names = ("original_size", "crop", "target_size")
    tensors = {name: torch.tensor([value] * 2) for name, value in zip(names, facts, strict=True)}
    return Batch(torch.arange(2), torch.ones(2), caption=CAPTIONS, **tensors)


def tower(**options):
    return FrozenOpenCLIP(**{"model": "tiny", "pretrained": "random", "context_length": 12, **options})


def from_transformers(text, hf):
    """Put a transformers CLIP text model's weights into an open_clip tower."""
    theirs, own = hf.state_dict(), {}
    model = getattr(hf, "text_model", hf)
    own["token_embedding.weight"] = model.embeddings.token_embedding.weight
    own["positional_embedding"] = model.embeddings.position_embedding.weight
    for i, layer in enumerate(model.encoder.layers):
        at, attention = f"transformer.resblocks.{i}.", layer.self_attn
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        own[at + "attn.in_proj_weight"] = torch.cat([linear.weight for linear in qkv])
        own[at + "attn.in_proj_bias"] = torch.cat([linear.bias for linear in qkv])
        modules = {"attn.out_proj": attention.out_proj, "ln_1": layer.layer_norm1, "ln_2": layer.layer_norm2}
        modules |= {"mlp.c_fc": layer.mlp.fc1, "mlp.c_proj": layer.mlp.fc2}
        for name, module in modules.items():
            own |= {f"{at}{name}.weight": module.weight, f"{at}{name}.bias": module.bias}
    own |= {"ln_final.weight": model.final_layer_norm.weight, "ln_final.bias": model.final_layer_norm.bias}
    if "text_projection.weight" in theirs:
        own["text_projection"] = theirs["text_projection.weight"].T
    found = text.state_dict()
    text.load_state_dict({name: own[name] for name in found})


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def clip(transformers):
    """(activation, class) -> a tiny transformers text tower with redrawn weights."""

    def make(activation, kind):
        config = transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=16, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=12, projection_dim=8, hidden_act=activation,
            bos_token_id=49406, eos_token_id=49407, pad_token_id=0,
        )  # fmt: skip
        model = getattr(transformers, kind)(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model.requires_grad_(False)

    return make


@pytest.fixture
def sdxl(build_tiny, clip):
    """Our conditioner with the two towers of transformers that its weights come from."""
    ours = build_tiny("sdxl")
    torch.manual_seed(2)
    towers = clip("quick_gelu", "CLIPTextModel"), clip("quick_gelu", "CLIPTextModelWithProjection")
    for name, theirs in zip(("clip_l", "big_g"), towers, strict=True):
        from_transformers(ours.parts[name].text, theirs)
    return ours, towers


def test_the_towers_and_sizes_are_those_of_diffusers(sdxl):
    """StableDiffusionXLPipeline: hidden_states[-2] of both towers, text_embeds, and _get_add_time_ids."""
    diffusers = pytest.importorskip("diffusers")
    ours, (first, second) = sdxl
    given = ours(sizes_of((1024, 768), (16, 0), (512, 640)))
    with torch.no_grad():
        one = first(ours.parts["clip_l"].tokenize(CAPTIONS), output_hidden_states=True)
        two = second(ours.parts["big_g"].tokenize(CAPTIONS), output_hidden_states=True)
    context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    torch.testing.assert_close(given.context, context, rtol=0, atol=1e-5)
    torch.testing.assert_close(given.pooled[:, :8], two.text_embeds, rtol=0, atol=1e-5)
    width = ours.parts["sizes"].width
    linear = SimpleNamespace(in_features=8 + 6 * width)
    pipeline = SimpleNamespace(
        unet=SimpleNamespace(
            config=SimpleNamespace(addition_time_embed_dim=width),
            add_embedding=SimpleNamespace(linear_1=linear),
        )
    )
    ids = diffusers.StableDiffusionXLPipeline._get_add_time_ids(
        pipeline, (1024, 768), (16, 0), (512, 640), dtype=torch.float32, text_encoder_projection_dim=8
    )
    timesteps = diffusers.models.embeddings.Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
    expected = timesteps(ids.flatten()).reshape(1, -1).expand(2, -1)
    torch.testing.assert_close(given.pooled[:, 8:], expected, rtol=0, atol=1e-5)


def test_the_backbone_takes_it_as_diffusers_does(sdxl):
    """UNet2DConditionModel with addition_embed_type=text_time on the same weights, texts and sizes."""
    diffusers = pytest.importorskip("diffusers")
    ours, (first, second) = sdxl
    width, pooled = ours.parts["sizes"].width, ours.pooled_dim
    torch.manual_seed(3)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, cross_attention_dim=32,
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=width,
        projection_class_embeddings_input_dim=pooled,
    ).eval()  # fmt: skip
    backbone = CrossAttentionUNet(
        block_out_channels=[8, 16], layers_per_block=1, transformer_depth=[0, 2], mid_depth=2,
        num_heads=[2, 4], context_dim=32, linear_projection=True, pooled_dim=pooled, norm_groups=4,
    ).eval()  # fmt: skip
    backbone.load_state_dict(theirs.state_dict())
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    facts = (1024, 768), (16, 0), (512, 640)
    with torch.no_grad():
        one = first(ours.parts["clip_l"].tokenize(CAPTIONS), output_hidden_states=True)
        two = second(ours.parts["big_g"].tokenize(CAPTIONS), output_hidden_states=True)
        ids = torch.tensor([[number for pair in facts for number in pair]] * 2)
        expected = theirs(
            x,
            time,
            encoder_hidden_states=torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1),
            added_cond_kwargs={"text_embeds": two.text_embeds, "time_ids": ids},
        ).sample
        found = backbone(x, time, ours(sizes_of(*facts)))
        other = backbone(x, time, ours(sizes_of((1024, 768), (0, 16), (512, 640))))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (other - expected).abs().max() > 1e-4  # the order of the sizes counts


def test_null_is_zeros_or_the_empty_caption_and_keeps_the_sizes(build_tiny):
    ours = build_tiny("sdxl")
    given = ours(sizes_of((64, 64), (0, 0), (32, 32)))
    null = ours.null(given)
    assert not null.context.any()
    assert not null.pooled[:, :8].any()
    assert torch.equal(null.pooled[:, 8:], given.pooled[:, 8:])
    for part in (ours.parts["clip_l"], ours.parts["big_g"]):
        part.zero_null = False
    batch = sizes_of((64, 64), (0, 0), (32, 32))
    empty = ours(Batch(batch.n, batch.weight, caption=["", ""], original_size=batch.original_size,
                       crop=batch.crop, target_size=batch.target_size))  # fmt: skip
    torch.testing.assert_close(ours.null(given).context, empty.context)
    torch.testing.assert_close(ours.null(given).pooled, empty.pooled)


def test_towers_with_different_padding_share_the_tokens_of_a_batch(build_tiny):
    ours = build_tiny("sdxl")
    batch = sizes_of((64, 64), (0, 0), (32, 32))
    assert ours.parts["clip_l"].tokenizer.padding != ours.parts["big_g"].tokenizer.padding
    for part in ("clip_l", "big_g"):
        tokens = ours.parts[part].tokenize(CAPTIONS)
        given = ours(Batch(**{**vars(batch), "caption": None, "tokens": tokens}))
        assert torch.equal(given.context, ours(batch).context)
    assert ours.tokenizer is ours.parts["clip_l"].tokenizer


def test_the_size_of_the_picture_is_that_of_the_image():
    batch = sizes_of((64, 64), (0, 0), (32, 48))
    image = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    same = Batch(**{**vars(batch), "target_size": None, "image": image})
    assert torch.equal(Sizes(8)(same).pooled, Sizes(8)(batch).pooled)
    with pytest.raises(ValueError, match=r"need batch.crop and batch.target_size"):
        Sizes(8)(Batch(batch.n, batch.weight, original_size=batch.original_size))


def test_prompts_are_read_by_every_tower(build_tiny):
    ours = build_tiny("sdxl")
    batch = sizes_of((64, 64), (0, 0), (32, 32))
    weighted = Batch(**{**vars(batch), "caption": ["a (red:1.5) apple BREAK tree", "cat"]})
    read = ours.reading(weighted=True, clip_skip=2)
    given = read(weighted)
    assert given.context.shape == (2, 24, 32)
    assert given.context_mask.sum(1).tolist() == [24, 12]
    for part, columns in (("clip_l", slice(16)), ("big_g", slice(16, 32))):
        alone = ours.parts[part].reading(weighted=True, clip_skip=2)(weighted)
        assert torch.equal(given.context[..., columns], alone.context)
    null = read.null(given)
    assert null.context.shape == given.context.shape
    assert torch.equal(null.pooled[:, 8:], given.pooled[:, 8:])
    with pytest.raises(InputError, match="reads no text"):
        Combined({"sizes": Sizes(8)}).reading(weighted=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Combined({"a": tower(), "s": Sizes(8)}, context_dim=9), r"context_dim=9, .*'a': 16, 's': 0"),
        (lambda: Combined({"s": Sizes(8)}, pooled_dim=9), r"pooled_dim=9, but the parts have {'s': 48}"),
        (lambda: Combined({"a": tower(), "b": tower(context_length=9)}), r"context_length: \[9, 12\]"),
        (lambda: Combined({"a": ClassLabel(3), "b": ClassLabel(4)}), "takes one label, but a and b give one"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trained_part_stays_trained_and_a_frozen_one_frozen():
    both = Combined({"own": TextTransformer(16, 1, 2, context_length=12), "clip": tower()}).train()
    assert both.parts["own"].training
    assert not both.parts["clip"].training
    trained = {name.split(".")[1] for name, p in both.named_parameters() if p.requires_grad}
    assert trained == {"own"}


def test_outputs_of_towers_may_be_made_beforehand():
    """They stand for the captions; sizes are still those of the batch, which a crop may change."""
    torch.manual_seed(0)
    parts = {"clip_l": tower(), "big_g": tower(pooled=True), "sizes": Sizes(4)}
    both, size = Combined(parts), torch.tensor([[64, 48], [32, 32]])
    facts = {"original_size": size, "crop": size, "target_size": size}
    batch = Batch(torch.arange(2), torch.ones(2), caption=["one", ""], **facts)
    given = both.towers()(batch)
    beforehand = {"context": given.context.half(), "pooled": given.pooled.half()}
    found = both(Batch(torch.arange(2), torch.ones(2), **beforehand, **facts))
    expected = both(batch)
    assert found.pooled.shape[1] == given.pooled.shape[1] + 24
    torch.testing.assert_close(found.context, expected.context, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=2e-3, rtol=2e-3)
    assert found.context.dtype == torch.float32


def test_towers_that_are_trained_are_asked_in_every_step():
    trained = TextTransformer(16, 1, 2, context_length=12)
    assert trained.towers() is None
    assert Combined({"a": tower(), "b": trained}).towers() is None
    assert Combined({"sizes": Sizes(4)}).towers() is None
