"""What each text tower promises beside the laws of test_laws.py."""

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from ldm.conditioning.text import END, START, FrozenOpenCLIP, TextTransformer, Tokenizer
from ldm.errors import InputError
from ldm.types import Batch

CAPTIONS = ["a red apple on a blue background", "", "two cats"]


def batch(captions=None, tokens=None):
    b = len(captions) if captions is not None else len(tokens)
    return Batch(n=torch.arange(b), weight=torch.ones(b), caption=captions, tokens=tokens)


def frozen(**options):
    return FrozenOpenCLIP(**{"model": "tiny", "pretrained": "random", **options})


@pytest.fixture(params=["text_transformer", "open_clip"])
def conditioner(request, build_tiny):
    return build_tiny(request.param)


def test_context_says_something(conditioner):
    out = conditioner(batch(CAPTIONS))
    assert out.context.shape == (3, 12, conditioner.context_dim)
    assert out.context.std() > 0.1
    assert out.pooled.std() > 0.01


def test_later_tokens_do_not_change_earlier_context(conditioner):
    tokens = conditioner.tokenize(["a red apple on a blue background"] * 2)
    tokens[1, 5] = 1000
    a, b = conditioner(batch(tokens=tokens)).context
    torch.testing.assert_close(a[:5], b[:5], rtol=1e-4, atol=1e-5)
    assert (a[5:] - b[5:]).abs().amax(dim=1).min() > 1e-4


def test_tokens_and_captions_agree(conditioner):
    given = conditioner(batch(tokens=conditioner.tokenize(CAPTIONS)))
    assert torch.equal(given.context, conditioner(batch(CAPTIONS)).context)


def test_wrong_input_is_refused(conditioner):
    with pytest.raises(ValueError, match="length 7 for a context_length of 12"):
        conditioner(batch(tokens=torch.zeros(1, 7, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"both are None"):
        conditioner(Batch(n=torch.arange(1), weight=torch.ones(1)))


# The tokenizer


def test_tokens_of_a_caption():
    tokens = Tokenizer(8)(["Hello  WORLD!", "", "word " * 50])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 8)
    assert tokens[0].tolist() == [START, 3306, 1002, 256, END, 0, 0, 0]
    assert tokens[1].tolist() == [START, END, 0, 0, 0, 0, 0, 0]
    assert tokens[2, 0] == START
    assert tokens[2, -1] == END
    assert END not in tokens[2, :-1]


def test_padding_with_the_end_token():
    tokens = Tokenizer(8, "end")(["! !", ""])
    assert tokens[0].tolist() == [START, 256, 256, *[END] * 5]
    assert tokens[1].tolist() == [START, *[END] * 7]


def test_padding_keeps_the_end_token_where_it_was():
    context = [frozen(context_length=8, padding=p).null_tokens[0].tolist() for p in ("zero", "end")]
    assert context == [Tokenizer(8, p)([""])[0].tolist() for p in ("zero", "end")]


def test_tokenizer_is_a_plain_value():
    tokenizer = TextTransformer(16, 1, 1, context_length=9).tokenizer
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 200
    assert torch.equal(pickle.loads(sent)(CAPTIONS), tokenizer(CAPTIONS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokenizer(1), "context_length=1 is below 2"),
        (lambda: Tokenizer(8, "left"), "padding='left'"),
        (lambda: Tokenizer(8)("a cat"), "expected a list of captions"),
        (lambda: TextTransformer(30, 1, 4), "width=30 is not divisible by heads=4"),
        (lambda: TextTransformer(32, 1, 4, context_dim=64), "context_dim=64, .* width=32"),
    ],
)
def test_wrong_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The jointly trained tower


@pytest.mark.parametrize("pooled_dim", [None, 8])
def test_every_parameter_is_trained(pooled_dim):
    tower = TextTransformer(16, 2, 2, context_length=8, pooled_dim=pooled_dim)
    out = tower(batch(CAPTIONS))
    sum(v.square().sum() for v in (out.context, out.pooled) if v is not None).backward()
    assert all(p.requires_grad and p.grad is not None and p.grad.any() for p in tower.parameters())
    assert (out.pooled is None) == (pooled_dim is None)


def test_pooled_is_the_projected_end_token():
    tower = TextTransformer(16, 2, 2, context_length=12, pooled_dim=8)
    out = tower(batch(CAPTIONS))
    ends = (tower.tokenize(CAPTIONS) == END).int().argmax(dim=1)
    assert ends.tolist() == [8, 1, 3]
    torch.testing.assert_close(out.pooled, out.context[torch.arange(3), ends] @ tower.text.text_projection)


def test_initialisation_is_that_of_clip():
    tower = TextTransformer(64, 2, 2)
    block = tower.text.transformer.resblocks[1]
    for tensor, std in [
        (tower.text.token_embedding.weight, 0.02),
        (tower.text.positional_embedding, 0.01),
        (block.attn.in_proj_weight, 64**-0.5),
        (block.attn.out_proj.weight, 64**-0.5 * 4**-0.5),
        (block.mlp.c_fc.weight, 128**-0.5),
        (block.mlp.c_proj.weight, 64**-0.5 * 4**-0.5),
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.1)


def test_training_and_evaluation_agree():
    tower = TextTransformer(16, 2, 2, context_length=12)
    trained = tower(batch(CAPTIONS)).context
    with torch.no_grad():
        torch.testing.assert_close(tower.eval()(batch(CAPTIONS)).context, trained, rtol=1e-4, atol=1e-5)


# The frozen tower


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
            assert len(tower.text.transformer.resblocks) == blocks


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


def test_only_the_text_tower_is_built():
    assert not [name for name, _ in frozen().named_parameters() if "visual" in name or "logit_scale" in name]


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
        (str(tmp_path / "other.safetensors"), "of the text tower's 41 tensors are not in it"),
        (weights(clip, tmp_path, "torch"), r"positional_embedding has shape \[77, 24\].*needs \[77, 16\]"),
    ]:
        with pytest.raises(InputError, match=message):
            frozen(pretrained=path)
