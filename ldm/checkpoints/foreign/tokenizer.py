"""CLIP's byte-pair vocabulary as the files of a transformers tokenizer, and what such files say.

The vocabulary lies in open_clip's package, which need not be imported for it (Radford et al. 2021, 2.4).
What the files cannot say: we mend captions first (HTML entities, curly quotes, ligatures, mojibake) and take
special tokens that are written out for text; transformers does neither. And where "!" is the padding, as in
the published Stable Diffusion 2 and XL, transformers takes every "!" of a caption for it.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm.checkpoints.foreign.documents import load_json
from ldm.errors import InputError

FILE = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48894  # 49408 tokens less 2 * 256 bytes and the two special ones
START, END = "<|startoftext|>", "<|endoftext|>"
PADS = {"end": END, "zero": "!"}


@functools.cache
def merges() -> tuple[str, ...]:
    """Pairs of tokens, "a b", in the order in which they are joined. Raises InputError without open_clip."""
    found = importlib.util.find_spec("open_clip")  # looks for the package, and does not run it
    if found is None or not found.submodule_search_locations:
        raise InputError("tokenizer", "the vocabulary is in open_clip, which is missing", "install open_clip")
    lines = gzip.decompress((Path(found.submodule_search_locations[0]) / FILE).read_bytes()).decode()
    return tuple(lines.split("\n")[1 : MERGES + 1])


@functools.cache
def vocabulary() -> Mapping[str, int]:
    """Token to number: bytes, bytes that end a word, merges, start and end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]  # shown as the characters from 256 on
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(pair.replace(" ", "") for pair in merges()),
    ]
    return MappingProxyType({word: i for i, word in enumerate([*words, START, END])})


def read(folder: Path) -> tuple[int | None, str, list[str]]:
    """(context_length, padding, notes) of the folder tokenizer/; raises InputError for another vocabulary."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        given |= load_json(folder / name, required=False)
    pad = given.get("pad_token") or END
    pad = pad["content"] if isinstance(pad, dict) else pad
    padding = next((name for name, token in PADS.items() if token == pad), None)
    if padding is None:
        fix = f"have: {', '.join(PADS.values())}"
        raise InputError(
            f"{folder.name}: pad_token={pad!r}", "captions cannot be filled up with it here", fix
        )
    words = load_json(folder / "vocab.json", required=False)
    if not words:
        words = load_json(folder / "tokenizer.json")["model"]["vocab"]
    ours = vocabulary()
    notes = [f"{folder.name} has {len(words)} tokens"] * (len(words) > len(ours))
    if any(words.get(word) != i for word, i in ours.items()):
        raise InputError(folder.name, "its vocabulary is not CLIP's, which is the only one here")
    length = given.get("model_max_length")
    return (length if isinstance(length, int) and 0 < length < 2**20 else None), padding, notes


def files(context_length: int, padding: str) -> dict[str, str]:
    """Text of each file of the folder tokenizer/, by name; `padding` end | zero."""
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PADS[padding]}
    config = {
        **tokens,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(dict(vocabulary()), ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges(), ""]),
        "special_tokens_map.json": json.dumps(tokens, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
