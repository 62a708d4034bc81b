"""Captions to context: what text towers share, and a CLIP-shaped one that is trained here.

The frozen ones are in frozen.py. No other file uses open_clip (imported late: it takes seconds). Towers keep
its parameter names under `text.`, as its CustomTextCLIP does. b batch, l tokens, d width, p pooled width.
Radford et al., "Learning transferable visual models from natural language supervision", 2021.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ldm.conditioning.base import ConditionerModule
from ldm.conditioning.prompts import Chunk, chunked, emphasised
from ldm.errors import InputError
from ldm.types import Batch, Conditioning

START, END = 49406, 49407  # the two special tokens of CLIP's vocabulary
PADDING = {
    "zero": 0,
    "end": END,
}  # how open_clip and the original (OpenAI) tokenizer fill up to context_length


@dataclass(frozen=True)
class Tokenizer:
    """Captions to tokens, int64 [b l], by CLIP's byte-pair vocabulary, which lies in open_clip's package.

    A plain value, so that data workers can be sent it. A caption is START, its tokens, END, padding; one
    that is too long is cut and still ends in END.
    """

    context_length: int = 77
    padding: str = "zero"  # zero | end

    def __post_init__(self) -> None:
        if self.padding not in PADDING:
            raise ValueError(f"padding={self.padding!r} is none of {', '.join(PADDING)}")
        if self.context_length < 2:
            raise ValueError(f"context_length={self.context_length} is below 2, the start and end tokens")

    def __call__(self, captions: Sequence[str]) -> Tensor:
        import open_clip

        if isinstance(captions, str):
            raise ValueError(f"expected a list of captions, got the text {captions!r}")
        return self.padded(open_clip.tokenize(list(captions), self.context_length))

    def padded(self, tokens: Tensor) -> Tensor:
        """The same tokens, whatever they were padded with: towers with different padding share a batch's."""
        ends = tokens == END
        return tokens.masked_fill(ends.cumsum(dim=1) > ends, PADDING[self.padding])

    def encode(self, text: str) -> list[int]:
        """All tokens of a text, without start, end and padding."""
        return _vocabulary().encode(text)  # type: ignore[no-any-return]

    def wrapped(self, chunk: Chunk) -> tuple[list[int], list[float]]:
        """Tokens and weights of a chunk with start, end and padding, whose weights are 1."""
        rest = self.context_length - 2 - len(chunk.tokens)
        tokens = [START, *chunk.tokens, END, *[PADDING[self.padding]] * rest]
        return tokens, [1.0, *chunk.weights, *[1.0] * (rest + 1)]


@functools.cache
def _vocabulary() -> Any:
    import open_clip

    return open_clip.SimpleTokenizer()


class TextConditioner(ConditionerModule):
    """What both towers share: tokens from the batch or its captions, and the null conditioning.

    `encode(tokens)` is theirs. The null conditioning is that of the empty caption, or with `zero_null` zeros
    (SDXL). `weighted` reads captions of any length by the rules of prompts.py: context [b k*l d] for k chunks
    (the mask leaves out those that a row lacks), and pooled of the first. Otherwise they are taken as they
    are, and cut.
    """

    null_tokens: Tensor  # int64 [1 l]

    def __init__(
        self, tokenizer: Tokenizer, context_dim: int, pooled_dim: int | None, zero_null: bool = False
    ) -> None:
        super().__init__()
        self.tokenizer, self.context_dim, self.pooled_dim = tokenizer, context_dim, pooled_dim
        self.zero_null, self.weighted = zero_null, False
        tokens, _ = tokenizer.wrapped(Chunk([], []))
        self.register_buffer("null_tokens", torch.tensor([tokens]), persistent=False)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Tokens of captions, int64 [b l]; send workers `tokenizer` instead, which holds no weights."""
        return self.tokenizer(captions)

    def forward(self, batch: Batch) -> Conditioning:
        """Context [b l d], and pooled [b p] if asked for, of `batch.tokens`, or else of `batch.caption`."""
        tokens = batch.tokens
        if tokens is None or self.weighted:
            if batch.caption is None:
                raise ValueError("a text conditioner needs batch.tokens or batch.caption; both are None")
            if self.weighted:
                return self._weighted(batch.caption)
            tokens = self.tokenize(batch.caption).to(self.null_tokens.device, non_blocking=True)
        if tokens.shape[-1] != self.tokenizer.context_length:
            raise ValueError(
                f"tokens of length {tokens.shape[-1]} for a context_length of {self.tokenizer.context_length}"
            )
        return self.encode(self.tokenizer.padded(tokens))

    def _weighted(self, captions: Sequence[str]) -> Conditioning:
        tokenizer, device = self.tokenizer, self.null_tokens.device
        rows = [chunked(text, tokenizer.encode, tokenizer.context_length - 2) for text in captions]
        most = max(map(len, rows))
        chunks = [chunk for row in rows for chunk in row + [Chunk([], [])] * (most - len(row))]
        tokens, weights = zip(*map(tokenizer.wrapped, chunks), strict=True)
        out = self.encode(torch.tensor(tokens, device=device))
        assert out.context is not None
        context = emphasised(out.context, torch.tensor(weights, device=device))
        mask = None
        if any(len(row) < most for row in rows):
            counts = torch.tensor([len(row) for row in rows], device=device)
            mask = torch.arange(most, device=device) < counts[:, None]
            mask = mask.repeat_interleave(tokenizer.context_length, dim=1)
        return Conditioning(
            context=context.unflatten(0, (-1, most)).flatten(1, 2),
            context_mask=mask,
            pooled=None if out.pooled is None else out.pooled[::most],
        )

    def reading(self, weighted: bool = False, clip_skip: int = 1) -> Self:
        """`clip_skip` counts as AUTOMATIC1111 does: 1 is the layer it was trained with, 2 the one before."""
        other = copy.copy(self)  # the same tensors
        other.weighted = weighted
        if clip_skip != 1:
            other._skip(clip_skip - 1)
        return other

    def _skip(self, blocks: int) -> None:
        fix = "leave it out"
        raise InputError(f"clip_skip={blocks + 1}", "this text tower was trained with its last layer", fix)

    def null(self, given: Conditioning) -> Conditioning:
        """The conditioning of the empty caption: one row computed, repeated for each row and chunk."""
        context, pooled, mask = given.context, given.pooled, given.context_mask
        assert context is not None
        if self.zero_null:
            context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
        else:
            one = self.encode(self.null_tokens)
            assert one.context is not None
            chunks = context.shape[1] // self.tokenizer.context_length
            context = one.context.repeat(1, chunks, 1).expand(len(context), -1, -1)
            pooled = None if one.pooled is None else one.pooled.expand(len(context), -1)
        return Conditioning(context, None if mask is None else torch.ones_like(mask), pooled)

    def encode(self, tokens: Tensor) -> Conditioning:
        raise NotImplementedError


class TextTransformer(TextConditioner):
    """A causal text transformer with CLIP's shape and initialisation, to be trained with the backbone.

    Context is taken after the last layer norm. `pooled_dim` adds the projection of the end token to that
    width; None leaves it out, parameter and all, so that every parameter takes part in every step.
    `context_dim` is what the configuration told the backbone, checked against `width`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        context_length: int = 77,
        pooled_dim: int | None = None,
        context_dim: int | None = None,
    ) -> None:
        if context_dim not in (None, width):
            raise ValueError(f"context_dim={context_dim}, but the text transformer has width={width}")
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        super().__init__(Tokenizer(context_length), width, pooled_dim)
        from open_clip.transformer import TextTransformer as Tower

        self.text = Tower(
            context_length=context_length,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=pooled_dim,
            output_tokens=True,
        )

    def encode(self, tokens: Tensor) -> Conditioning:
        pooled, context = self.text(tokens)
        return Conditioning(context=context, pooled=None if self.pooled_dim is None else pooled)
