"""Frozen towers against open_clip's own, towers of sizes given one by one, and what is refused."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ldm.conditioning.frozen import FrozenOpenCLIP
from ldm.conditioning.text import Tokenizer
from ldm.errors import InputError
from ldm.types import Batch

CAPTIONS = ["a red apple on a blue background", "", "two cats"]
SIZES = {"width": 16, "layers": 3, "heads": 2, "embed_dim": 8, "quick_gelu": True}  # those of `tiny`


def batch(captions):
    b = len(captions)
    return Batch(n=torch.arange(b), weight=torch.ones(b), caption=captions)


def frozen(**options):
    return FrozenOpenCLIP(**{"model": "tiny", "pretrained": "random", **options})


@pytest.fixture
def clip():
    """A whole open_clip model of our tiny shape, every parameter redrawn so that norms and biases count."""
    torch.manual_seed(1)
    model = open_clip.create_model("tiny", load_weights=False).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def weights(model, folder, form):
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if form == "text.":
        state = {f"text.{k}": v for k, v in state.items() if not k.startswith(("visual", "logit"))}
    if form == "torch":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "clip.pt")
        return str(folder / "clip.pt")
    save_file(state, folder / "clip.safetensors")
    return str(folder / "clip.safetensors")


@pytest.mark.parametrize("form", ["safetensors", "torch", "text."])
@pytest.mark.parametrize(("layer", "blocks"), [("last", 3), ("penultimate", 2), (1, 1)])
@pytest.mark.parametrize("final_norm", [True, False])
def test_frozen_tower_equals_open_clip(clip, tmp_path, form, layer, blocks, final_norm):
    path = weights(clip, tmp_path, form)
    tokens = Tokenizer()(CAPTIONS)
    with torch.no_grad():
        x = clip.token_embedding(tokens) + clip.positional_embedding
        for block in clip.transformer.resblocks[:blocks]:
            x = block(x, attn_mask=clip.attn_mask)
        expected = clip.ln_final(x) if final_norm else x
        pooled = clip.encode_text(tokens)
    for ask in (False, True):
        tower = frozen(pretrained=path, layer=layer, final_norm=final_norm, pooled=ask)
        out = tower(batch(CAPTIONS))
        torch.testing.assert_close(out.context, expected, rtol=1e-4, atol=1e-5)
        assert tower.context_dim == 16
        assert tower.pooled_dim == (8 if ask else None)
        if ask:
            torch.testing.assert_close(out.pooled, pooled, rtol=1e-4, atol=1e-5)
        else:
            assert out.pooled is None


def test_short_context_is_the_start_of_the_long_one(clip, tmp_path):
    path = weights(clip, tmp_path, "safetensors")
    long, short = (frozen(pretrained=path, context_length=n)(batch(CAPTIONS)).context for n in (77, 20))
    torch.testing.assert_close(short, long[:, :20], rtol=1e-4, atol=1e-5)


def test_frozen_tower_never_trains():
    tower = frozen(pooled=True)
    parent = torch.nn.ModuleList([tower]).train()
    assert parent.training
    assert not any(module.training for module in tower.modules())
    assert not any(p.requires_grad for p in tower.parameters())
    assert not tower(batch(CAPTIONS)).context.requires_grad


def test_the_whole_text_tower_is_built_and_nothing_else():
    for options in ({}, {"layer": 1, "final_norm": False}):
        names = set(frozen(**options).state_dict())
        assert len(names) == 40
        assert {name.split(".")[1] for name in names} == {
            *("token_embedding", "positional_embedding", "transformer", "ln_final")
        }
        assert set(frozen(pooled=True, **options).state_dict()) == names | {"text.text_projection"}


def test_no_more_blocks_are_run_than_needed():
    tower, ran = frozen(layer=1), []
    for i, block in enumerate(tower.text.transformer.resblocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    tower(batch(CAPTIONS))
    assert ran == [0]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_sizes_given_one_by_one(clip, tmp_path, quick, pooled):
    """The same numbers as the model of these sizes by its name; the activation counts."""
    path = weights(clip, tmp_path, "safetensors")
    tower = frozen(model=SIZES | {"quick_gelu": quick}, pretrained=path, pooled=pooled)
    named = frozen(pretrained=path, pooled=pooled)
    assert tower.state_dict().keys() == named.state_dict().keys()
    a, b = tower(batch(CAPTIONS)), named(batch(CAPTIONS))
    assert torch.equal(a.context, b.context) == quick
    if pooled:
        assert torch.equal(a.pooled, b.pooled) == quick


def test_every_size_counts():
    sizes = SIZES | {"vocab_size": 49410, "mlp_ratio": 2.0, "context_length": 20}
    text = frozen(model=sizes, context_length=20, pooled=True).text
    assert text.token_embedding.weight.shape == (49410, 16)
    assert text.transformer.resblocks[0].mlp.c_fc.weight.shape == (32, 16)
    assert text.positional_embedding.shape == (20, 16)
    with pytest.raises(InputError, match=r"context_length=21: this model has 20 positions"):
        frozen(model=sizes, context_length=21)


def test_without_weights_until_a_checkpoint_brings_them(clip, tmp_path):
    given = frozen(pretrained=weights(clip, tmp_path, "safetensors"), pooled=True)
    with torch.device("meta"):
        names = frozen(model=SIZES, pretrained=None, pooled=True).state_dict()
    assert {name: value.shape for name, value in names.items()} == {
        name: value.shape for name, value in given.state_dict().items()
    }
    empty = frozen(model=SIZES, pretrained=None, pooled=True)
    assert empty.unfilled
    assert not given.unfilled
    assert not frozen().unfilled
    empty.load_state_dict(given.state_dict())
    assert torch.equal(empty(batch(CAPTIONS)).pooled, given(batch(CAPTIONS)).pooled)


@pytest.fixture
def openai(monkeypatch):
    """A tag of the tiny model, as of OpenAI's models: trained with the quick activation."""
    tags = {"openai": {"hf_hub": "nobody/nothing/", "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "slow", tags)
    config = {**open_clip.get_model_config("tiny"), "quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "slow", config)


@pytest.mark.usefixtures("openai")
def test_the_activation_belongs_to_the_weights(clip, tmp_path, monkeypatch):
    path = weights(clip, tmp_path, "safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda config: path)
    kinds = [
        type(FrozenOpenCLIP("slow", tag).text.transformer.resblocks[0].mlp.gelu).__name__
        for tag in ("openai", "random", path)
    ]
    assert kinds == ["QuickGELU", "GELU", "GELU"]


@pytest.mark.usefixtures("openai")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "ViT-L-41"},
            r"conditioner.model='ViT-L-41': no such open_clip model; did you mean 'ViT-L-1",
        ),
        ({"model": "foreign"}, r"not a plain CLIP transformer \(no_causal_mask\)"),
        ({"layer": "final"}, r"conditioner.layer='final'.*last, penultimate or 1 to 3"),
        ({"layer": 4}, r"conditioner.layer=4.*1 to 3"),
        (
            {"context_dim": 768},
            r"conditioner.context_dim=768: .* tiny has width 16; set conditioner.context_dim=16",
        ),
        ({"context_length": 78}, r"conditioner.context_length=78: tiny has 77 positions"),
        (
            {"pretrained": "openai"},
            r"conditioner.pretrained='openai': open_clip has no such weights for tiny",
        ),
        ({"pretrained": "no/such.pt"}, r"conditioner.pretrained='no/such.pt': no such file"),
        ({"model": "slow", "pretrained": "opnai"}, r"did you mean 'openai'"),
        ({"model": {"width": 16}}, r"conditioner.model: embed_dim is missing; it has: .*width"),
        ({"model": SIZES | {"depth": 2}}, r"conditioner.model: depth is unknown; it has: .*layers"),
        ({"model": SIZES | {"heads": 5}}, r"conditioner.model.heads=5: does not divide the width 16; give"),
        ({"model": SIZES | {"layers": 1.5}}, r"conditioner.model.layers=1.5: is no whole number above 0"),
        ({"model": SIZES | {"heads": 0}}, r"conditioner.model.heads=0: is no whole number above 0"),
        ({"model": SIZES, "pretrained": "openai"}, r"open_clip has no such weights for this model"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        frozen(**options)


@pytest.mark.usefixtures("openai")
def test_weights_that_cannot_be_fetched(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it retries for long
    with pytest.raises(InputError) as error:
        FrozenOpenCLIP("slow", "openai")
    assert str(error.value) == (
        "conditioner.pretrained='openai': weights not found (offline?); give a local file or another tag"
    )


def test_wrong_files(clip, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"not tensors")
    torch.save({"object": Path}, tmp_path / "code.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    clip.positional_embedding = torch.nn.Parameter(torch.zeros(77, 24))
    for path, message in [
        (str(tmp_path / "junk.safetensors"), "is no file of tensors"),
        (str(tmp_path / "code.pt"), "is no file of tensors"),
        (str(tmp_path / "other.safetensors"), "of the text tower's 40 tensors are not in it"),
        (weights(clip, tmp_path, "torch"), r"positional_embedding has shape \[77, 24\].*needs \[77, 16\]"),
    ]:
        with pytest.raises(InputError, match=message):
            frozen(pretrained=path)
