"""The tokenizer's files: transformers reads our tokens out of them, and we read them back."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from ldm.checkpoints.foreign import tokenizer
from ldm.conditioning.text import Tokenizer
from ldm.errors import InputError

transformers = pytest.importorskip("transformers")

WORDS = [
    "apple", "Caf\xe9", "na\xefve", "\xfcber", "\u0141\xf3d\u017a", "\u4e1c\u4eac", "\u043c\u0438\u0440",
    "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "don't",
    "it's", "I'VE", "3.14", "1999", "#tag", "a/b", "(really)", "[x]", "{y}", "100%", "$5", "e=mc^2",
    "re-do", "...", "--", "?", "supercalifragilistic", "\u03b1\u03b2\u03b3", "\u05e9\u05dc\u05d5\u05dd",
    "\u0e44\u0e17\u0e22", "x,y;z:w", "~`|\\", '"quoted"', "under_score", "UPPER", "cafe\u0301", "a  b",
    "tab\there", "line\nbreak", "&", "<b>", "+1", "@home",
]  # fmt: skip


def captions(loud: bool):
    """200 captions; `loud`: with exclamation marks."""
    chosen = random.Random(0)
    words = [*WORDS, "wow!", "!!!", "no!?"] if loud else WORDS
    lengths = itertools.cycle([0, 1, 2, 5, 12, 40, 120])
    return [" ".join(chosen.choices(words, k=next(lengths))) for _ in range(200)]


def theirs(folder, padding, length=77):
    folder.mkdir()
    for name, text in tokenizer.files(length, padding).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize(("padding", "length"), [("end", 77), ("zero", 77), ("end", 16)])
def test_transformers_gives_our_tokens(tmp_path, padding, length):
    found = theirs(tmp_path / "tokenizer", padding, length)
    assert found.model_max_length == length
    texts = captions(loud=padding == "end")
    tokens = found(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ours = Tokenizer(length, padding)(texts)
    assert len({tuple(row.tolist()) for row in ours}) > 150
    assert [text for text, a, b in zip(texts, tokens, ours, strict=True) if not a.equal(b)] == []
    assert tokenizer.read(tmp_path / "tokenizer") == (length, padding, [])


@pytest.mark.parametrize(
    ("text", "padding"),
    [
        ("wow!", "zero"),  # "!" is the padding
        ("&amp;", "end"),
        ("\u201cquoted\u201d", "end"),
        ("<|endoftext|>", "end"),
    ],
)
def test_where_transformers_reads_otherwise(tmp_path, text, padding):
    """What the file's docstring says, so that it is noticed when it changes."""
    found = theirs(tmp_path / "tokenizer", padding)
    tokens = found([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert not tokens.equal(Tokenizer(77, padding)([text]))


def test_transformers_saves_what_we_read(tmp_path):
    found = theirs(tmp_path / "tokenizer", "zero")
    found.save_pretrained(tmp_path / "saved")
    assert tokenizer.read(tmp_path / "saved") == (77, "zero", [])
    found.add_tokens(["<my-cat>"])
    found.save_pretrained(tmp_path / "more")
    assert tokenizer.read(tmp_path / "more")[:2] == (77, "zero")


def test_padding_is_read_from_every_place_it_has(tmp_path):
    files = tokenizer.files(77, "zero")
    (tmp_path / "vocab.json").write_text(files["vocab.json"], encoding="utf-8")
    assert tokenizer.read(tmp_path) == (None, "end", [])  # transformers' own default
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    assert tokenizer.read(tmp_path)[1] == "zero"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "?", "model_max_length": 1e30}))
    with pytest.raises(InputError, match=r"pad_token='\?'"):
        tokenizer.read(tmp_path)


def test_more_tokens_are_noted(tmp_path):
    words = dict(tokenizer.vocabulary())
    assert len(words) == 49408
    (tmp_path / "vocab.json").write_text(json.dumps(words | {"<my-cat>": 49408}), encoding="utf-8")
    assert tokenizer.read(tmp_path)[2] == [f"{tmp_path.name} has 49409 tokens"]
