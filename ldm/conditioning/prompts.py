"""Prompts as users of AUTOMATIC1111 write them, to chunks of tokens with weights; an option, off by default.

    (word) 1.1 times    (word:1.3) 1.3 times    [word] 1 / 1.1 times    after a backslash: the bracket itself

Brackets nest and multiply; one that is never closed reaches to the end, one that was never opened is text.
BREAK starts a new chunk, and so does a chunk that is full: 75 tokens, each chunk between its own start and
end token; their contexts follow one another. Pure functions: the vocabulary is passed in.
b chunks, l tokens, d width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 1.1  # weight of a bare bracket
BACKTRACK = 20  # a full chunk is cut after its last comma if that is among its last so many tokens
LITTLE_MEAN = 0.01  # of the root mean square, below which a context has no mean worth restoring
SYNTAX = re.compile(r"(\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|\s*\bBREAK\b\s*)")


class Piece(NamedTuple):
    """Text under one weight."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """Tokens without start, end and padding, and the weight of each."""

    tokens: list[int]
    weights: list[float]


def parse(prompt: str) -> list[list[Piece]]:
    """Pieces of the prompt, in a list for each part between BREAKs; neighbours of equal weight are one."""
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket that is open begins

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for i, word in enumerate(SYNTAX.split(prompt)):
        syntax = word.strip()[:1] if i % 2 else ""
        if syntax in opened:
            opened[syntax].append(len(texts))
        elif syntax == ")" and opened["("]:
            multiply(opened["("].pop(), STEP)
        elif syntax == ":" and opened["("]:
            multiply(opened["("].pop(), float(word[1:-1]))
        elif syntax == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / STEP)
        elif word:
            texts.append(None if syntax == "B" else word[1:] if syntax == "\\" else word)
            weights.append(1.0)
    for start in opened["("]:
        multiply(start, STEP)
    for start in opened["["]:
        multiply(start, 1 / STEP)
    return _merged(texts, weights)


def _merged(texts: list[str | None], weights: list[float]) -> list[list[Piece]]:
    parts: list[list[Piece]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == weight:
            parts[-1][-1] = Piece(parts[-1][-1].text + text, weight)
        else:
            parts[-1].append(Piece(text, weight))
    return parts


def chunked(prompt: str, encode: Callable[[str], list[int]], room: int) -> list[Chunk]:
    """The prompt in chunks of at most `room` tokens, at least one; `encode` gives the tokens of a text."""
    comma = encode(",")[0]
    parts = parse(prompt)
    done: list[Chunk] = []
    for part in parts:
        tokens: list[int] = []
        weights: list[float] = []
        for piece in part:
            for token in encode(piece.text):
                if len(tokens) == room:
                    cut = room if token == comma else _cut(tokens, comma)
                    done.append(Chunk(tokens[:cut], weights[:cut]))
                    tokens, weights = tokens[cut:], weights[cut:]
                tokens.append(token)
                weights.append(piece.weight)
        if tokens or part is not parts[-1] or not done:
            done.append(Chunk(tokens, weights))
    return done


def _cut(tokens: list[int], comma: int) -> int:
    """How many tokens of a full chunk stay in it."""
    after = next((k for k, token in enumerate(reversed(tokens)) if token == comma), len(tokens))
    return len(tokens) - after if after < min(BACKTRACK, len(tokens)) else len(tokens)


def emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """Context [b l d] times weights [b l], with the mean of each chunk over l and d put back.

    As AUTOMATIC1111 does; but for a context whose mean is next to nothing, where the quotient of two means
    would be noise: there the weights alone act. Weights of 1 change no bit.
    """
    scaled = context * weights.to(context.dtype)[..., None]
    before, after = (x.float().mean((1, 2), keepdim=True) for x in (context, scaled))
    least = LITTLE_MEAN * context.float().square().mean((1, 2), keepdim=True).sqrt()
    good = torch.minimum(before.abs(), after.abs()) > least
    return scaled * torch.where(good, before / after, torch.ones_like(after)).to(context.dtype)
