"""What each text tower promises beside the laws of test_laws.py."""

import pickle

import pytest
import torch

from ldm.conditioning.text import END, START, TextConditioner, TextTransformer, Tokenizer
from ldm.types import Batch

CAPTIONS = ["a red apple on a blue background", "", "two cats"]


def batch(captions=None, tokens=None):
    b = len(captions) if captions is not None else len(tokens)
    return Batch(n=torch.arange(b), weight=torch.ones(b), caption=captions, tokens=tokens)


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
    context = [TextConditioner(Tokenizer(8, p), 1, None).null_tokens[0].tolist() for p in ("zero", "end")]
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
