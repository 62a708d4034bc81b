"""Weighted prompts: the parser on tables of AUTOMATIC1111's behaviour, chunks of tokens, contexts."""

from dataclasses import replace

import pytest
import torch

from ldm.conditioning.frozen import FrozenOpenCLIP
from ldm.conditioning.prompts import Piece, chunked, emphasised, parse
from ldm.conditioning.text import END, START, TextTransformer, Tokenizer
from ldm.errors import InputError
from ldm.types import Batch

COMMA, WORD = 267, 2653  # "," and "word"


def batch(*captions):
    return Batch(n=torch.arange(len(captions)), weight=torch.ones(len(captions)), caption=list(captions))


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("an ((important)) word", [("an ", 1.0), ("important", 1.21), (" word", 1.0)]),
        ("a (red:1.3) [blue] apple", [("a ", 1), ("red", 1.3), (" ", 1), ("blue", 1 / 1.1), (" apple", 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[un(balanced", [("un", 1 / 1.1), ("balanced", 1.0)]),
        ("closed) too] often:1.2)", [("closed) too] often:1.2)", 1.0)]),
        (r"\(literal\] \[and\) \\", [("(literal] [and) \\", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(a:0.5)(b: 1.5 )(c:.25)(d:-1)", [("a", 0.5), ("b", 1.5), ("c", 0.25), ("d", -1)]),
        ("(no: weight) 12:30", [("no: weight", 1.1), (" 12:30", 1.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)]
            + [(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
        ),
        ("", []),
        ("()", []),
    ],
)  # fmt: skip
def test_weights(prompt, pieces):
    [found] = parse(prompt)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a BREAK b", [[("a", 1)], [("b", 1)]]),
        ("a  BREAK\nb BREAK", [[("a", 1)], [("b", 1)], []]),
        ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),
        ("BREAKFAST break", [[("BREAKFAST break", 1)]]),
    ],
)
def test_break(prompt, parts):
    assert parse(prompt) == [[Piece(*piece) for piece in part] for part in parts]


# Chunks, with a vocabulary in which each word is its length and a comma 0


def words(text):
    return [0 if word == "," else len(word) for word in text.replace(",", " , ").split()]


@pytest.mark.parametrize(
    ("prompt", "room", "chunks"),
    [
        ("", 3, [[]]),
        ("a bb ccc", 3, [[1, 2, 3]]),
        ("a bb ccc dddd", 3, [[1, 2, 3], [4]]),
        ("a BREAK bb", 3, [[1], [2]]),
        ("BREAK a BREAK", 3, [[], [1]]),
        ("a bb ccc BREAK dddd", 3, [[1, 2, 3], [4]]),
        ("a, bb ccc dddd", 4, [[1, 0], [2, 3, 4]]),  # cut after the comma
        ("a bb ccc, dddd", 3, [[1, 2, 3], [0, 4]]),  # a comma itself moves nothing
        ("a, bb, ccc dddd eeeee", 5, [[1, 0, 2, 0], [3, 4, 5]]),
    ],
)
def test_chunks(prompt, room, chunks):
    found = chunked(prompt, words, room)
    assert [chunk.tokens for chunk in found] == chunks
    assert all(len(chunk.tokens) == len(chunk.weights) for chunk in found)


def test_a_comma_far_from_the_end_of_a_chunk_is_left_alone():
    for tail, first in ((19, 75 - 19), (20, 75)):  # tokens after the comma of a full chunk
        prompt = " ".join(["x"] * (74 - tail)) + ", " + " ".join(["x"] * (tail + 5))
        assert len(chunked(prompt, words, 75)[0].tokens) == first


def test_tokens_of_a_long_weighted_prompt():
    tokenizer = Tokenizer(77, "end")
    chunks = chunked("(word, word:1.5) " + "word " * 80, tokenizer.encode, 75)
    assert [len(chunk.tokens) for chunk in chunks] == [75, 8]
    assert chunks[0].tokens == [WORD, COMMA, *[WORD] * 73]
    assert chunks[0].weights == [1.5] * 3 + [1.0] * 72
    tokens, weights = tokenizer.wrapped(chunks[1])
    assert tokens == [START, *[WORD] * 8, *[END] * 68]
    assert weights == [1.0] * 77


# Contexts


@pytest.fixture(params=["transformer", "tower"])
def tower(request):
    torch.manual_seed(0)
    if request.param == "tower":
        made = FrozenOpenCLIP("tiny", "random", context_length=12, padding="end", pooled=True)
    else:
        made = TextTransformer(16, 2, 2, context_length=12, pooled_dim=8)
    torch.nn.init.normal_(made.text.ln_final.bias, mean=0.5)  # a mean to restore
    return made


def test_prompts_are_verbatim_unless_asked(tower):
    prompt = "(red:1.5) apple [x] BREAK"
    plain = tower(batch(prompt))
    assert torch.equal(plain.context, tower.encode(tower.tokenize([prompt])).context)
    weighted = tower.reading(weighted=True)(batch(prompt))
    assert not torch.equal(weighted.context, plain.context)
    assert tower.weighted is False


def test_without_syntax_nothing_changes(tower):
    prompts = ["a red apple", "", "one two three four five six"]
    plain, read = tower(batch(*prompts)), tower.reading(weighted=True)(batch(*prompts))
    assert torch.equal(read.context, plain.context)
    assert torch.equal(read.pooled, plain.pooled)
    assert read.context_mask is None


def test_weights_multiply_rows_and_the_mean_is_restored(tower):
    plain = tower(batch("a red apple"))
    read = tower.reading(weighted=True)(batch("a (red:1.5) apple"))
    weights = torch.ones(12)
    weights[2] = 1.5
    scaled = plain.context * weights[:, None]
    torch.testing.assert_close(read.context, scaled * plain.context.mean() / scaled.mean())
    torch.testing.assert_close(read.context.mean(), plain.context.mean())
    assert torch.equal(read.pooled, plain.pooled)


def test_a_mean_of_nothing_is_not_restored():
    context = torch.randn(1, 4, 8)
    context -= context.mean()
    weights = torch.tensor([[1, 2, 1, 1.0]])
    torch.testing.assert_close(emphasised(context, weights), context * weights[..., None])


def test_chunks_follow_one_another(tower):
    read = tower.reading(weighted=True)
    out = read(batch("red apple BREAK (two cats:1.2)"))
    first, second = read(batch("red apple")), read(batch("(two cats:1.2)"))
    torch.testing.assert_close(out.context, torch.cat([first.context, second.context], 1))
    torch.testing.assert_close(out.pooled, first.pooled)
    assert out.context_mask is None


def test_rows_with_fewer_chunks_are_masked(tower):
    read = tower.reading(weighted=True)
    out = read(batch("one", "one BREAK two BREAK three"))
    assert out.context.shape == (2, 36, 16)
    assert out.context_mask.sum(1).tolist() == [12, 36]
    assert out.context_mask[0, :12].all()
    torch.testing.assert_close(out.context[:1, :12], read(batch("one")).context)


def test_prompt_and_negative_prompt_get_equally_many_chunks(tower):
    read = tower.reading(weighted=True)
    prompt, negative = read(batch("one BREAK two")), read(batch("bad"))
    both = prompt.cat(negative)
    assert both.context.shape == (2, 24, 16)
    assert both.context_mask.sum(1).tolist() == [24, 12]
    null = read.null(prompt)
    empty = read(batch("")).context
    torch.testing.assert_close(null.context, torch.cat([empty, empty], 1))
    assert prompt.cat(null).context_mask is None


def test_tokens_of_the_batch_are_not_taken_for_a_weighted_prompt(tower):
    given = replace(batch("(red:1.5)"), tokens=tower.tokenize(["(red:1.5)"]))
    read = tower.reading(weighted=True)
    assert torch.equal(read(given).context, read(batch("(red:1.5)")).context)


def test_clip_skip_is_the_layer_before():
    torch.manual_seed(0)
    towers = {n: FrozenOpenCLIP("tiny", "random", layer=n, context_length=12, pooled=True) for n in (1, 2, 3)}
    for n in (1, 2):
        towers[n].text.load_state_dict(towers[3].text.state_dict())
    for skip in (1, 2, 3):
        out = towers[3].reading(clip_skip=skip)(batch("a cat"))
        expected = towers[4 - skip](batch("a cat"))
        assert torch.equal(out.context, expected.context)
        assert torch.equal(out.pooled, expected.pooled)
    assert towers[3].depth == 3
    with pytest.raises(InputError, match="clip_skip=4: need 1 to 3"):
        towers[3].reading(clip_skip=4)
    with pytest.raises(InputError, match="clip_skip=2: this text tower was trained with its last layer"):
        TextTransformer(16, 2, 2, context_length=12).reading(clip_skip=2)
