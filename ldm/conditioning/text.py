"""Captions to context: a CLIP-shaped text transformer trained here, and the frozen towers of open_clip.

The only file that uses open_clip (and imports it late: it takes seconds). Both conditioners keep open_clip's
parameter names under `text.`, as its CustomTextCLIP does. b batch, l tokens, d width, p pooled width.
Radford et al., "Learning transferable visual models from natural language supervision", 2021.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.conditioning.base import ConditionerModule
from ldm.conditioning.prompts import Chunk, chunked, emphasised
from ldm.errors import InputError
from ldm.types import Batch, Conditioning

START, END = 49406, 49407  # the two special tokens of CLIP's vocabulary
PADDING = {
    "zero": 0,
    "end": END,
}  # how open_clip and the original (OpenAI) tokenizer fill up to context_length
TEXT_CONFIG = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}  # a CLIP-shaped tower


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


class FrozenOpenCLIP(TextConditioner):
    """The text tower of an open_clip model, never trained: no gradient, no dropout, no training mode.

    `layer` is `last`, `penultimate`, or N for the output of the N-th block; `final_norm` puts the model's
    last layer norm on it. `pooled` adds the projected end token of the whole tower. SDXL: CLIP ViT-L/14 with
    layer 11 of 12 and OpenCLIP ViT-bigG/14 with `penultimate` and `pooled`, both without final norm and with
    `zero_null`, see `TextConditioner`. `pretrained` is a tag of
    open_clip, a local file (safetensors, or tensors saved by torch) or the word `random`. Blocks that nothing
    needs are dropped. `context_dim` is what the configuration told the backbone, checked against the tower.
    """

    def __init__(
        self,
        model: str,
        pretrained: str,
        layer: str | int = "last",
        final_norm: bool = True,
        pooled: bool = False,
        context_length: int = 77,
        padding: str = "zero",
        context_dim: int | None = None,
        zero_null: bool = False,
    ) -> None:
        config, text_config = _model_config(model)
        depth = _depth(layer, text_config["layers"])
        if context_length > text_config.get("context_length", 77):
            raise InputError(
                f"conditioner.context_length={context_length}",
                f"{model} has {text_config.get('context_length', 77)} positions",
                "give at most that",
            )
        if context_dim not in (None, text_config["width"]):
            raise InputError(
                f"conditioner.context_dim={context_dim}",
                f"the text tower of {model} has width {text_config['width']}",
                f"set conditioner.context_dim={text_config['width']}",
            )
        path = None if pretrained == "random" else _weights_file(model, pretrained)
        pooled_dim = config["embed_dim"] if pooled else None
        super().__init__(Tokenizer(context_length, padding), text_config["width"], pooled_dim, zero_null)
        import open_clip
        from open_clip.transformer import QuickGELU
        from open_clip.transformer import TextTransformer as Tower

        quick = config.get("quick_gelu", False) or open_clip.get_pretrained_cfg(model, pretrained).get(
            "quick_gelu", False
        )  # the activation belongs to the weights: ViT-L-14 with the tag openai is quick, too
        text = Tower(
            **{**text_config, "context_length": context_length},
            output_dim=config["embed_dim"],
            act_layer=QuickGELU if quick else nn.GELU,
        )
        if path is not None:
            _load(text, path, pretrained)
        if not pooled:
            text.transformer.resblocks = text.transformer.resblocks[:depth]
            text.text_projection = None
        if not pooled and not final_norm:
            text.ln_final = nn.Identity()
        self.text, self.depth, self.final_norm = text.requires_grad_(False).eval(), depth, final_norm

    def train(self, mode: bool = True) -> FrozenOpenCLIP:
        """Stays in evaluation mode whatever the parent asks."""
        return super().train(False)

    def _skip(self, blocks: int) -> None:
        if not 0 <= blocks < self.depth:
            raise InputError(f"clip_skip={blocks + 1}", f"need 1 to {self.depth} for this text tower")
        self.depth -= blocks

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Conditioning:
        output = self.text.forward_intermediates(
            tokens,
            indices=[self.depth - 1],
            stop_early=self.pooled_dim is None,
            normalize_intermediates=self.final_norm,
            intermediates_only=self.pooled_dim is None,
            output_fmt="NLC",
        )
        return Conditioning(context=output["text_intermediates"][0], pooled=output.get("text_features"))


def _nearest(word: str, known: Sequence[str]) -> str:
    """A hint naming the known word most like `word`, or the first few known ones."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:12])}"


def _model_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's description of a model and of its text tower; refuses towers that are not CLIP's."""
    import open_clip

    where, config = f"conditioner.model={model!r}", open_clip.get_model_config(model)
    if config is None:
        raise InputError(where, "no such open_clip model", _nearest(model, open_clip.list_models()))
    text_config = config["text_cfg"]
    strange = sorted(set(text_config) - TEXT_CONFIG)
    if strange:
        raise InputError(
            where,
            f"its text tower is not a plain CLIP transformer ({', '.join(strange)})",
            "choose one like ViT-L-14-quickgelu, ViT-H-14 or ViT-bigG-14",
        )
    return config, text_config


def _depth(layer: str | int, layers: int) -> int:
    """How many blocks run before the context is taken."""
    depth = {"last": layers, "penultimate": layers - 1}.get(str(layer), layer)
    if not isinstance(depth, int) or not 1 <= depth <= layers:
        raise InputError(
            f"conditioner.layer={layer!r}", "no such layer", f"give last, penultimate or 1 to {layers}"
        )
    return depth


def _weights_file(model: str, pretrained: str) -> Path:
    """The local file itself, or the tag's file, which open_clip fetches into its cache on first use."""
    import open_clip

    where = f"conditioner.pretrained={pretrained!r}"
    if Path(pretrained).is_file():
        return Path(pretrained)
    weights = open_clip.get_pretrained_cfg(model, pretrained)
    if not weights:
        if "/" in pretrained or Path(pretrained).suffix in {".safetensors", ".pt", ".pth", ".bin"}:
            raise InputError(where, "no such file", "give a local file or a tag of open_clip")
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise InputError(
            where,
            f"open_clip has no such weights for {model}",
            _nearest(pretrained, tags) if tags else "give a local file",
        )
    try:
        return Path(open_clip.download_pretrained(weights))
    except Exception as error:  # whatever a network, a hub client or a full disk throws
        raise InputError(where, "weights not found (offline?)", "give a local file or another tag") from error


def _load(text: nn.Module, path: Path, pretrained: str) -> None:
    """Fill the tower from the weights of a CLIP, CustomTextCLIP or text tower; never runs pickled code."""
    where = f"conditioner.pretrained={pretrained!r}"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
        found = {key.removeprefix("module.").removeprefix("text."): value for key, value in found.items()}
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are formats
        raise InputError(
            where, f"{path.name} is no file of tensors", "give safetensors, or tensors saved by torch"
        ) from error
    wanted = text.state_dict()
    missing = [key for key in wanted if key not in found]
    if missing:
        raise InputError(
            where,
            f"{len(missing)} of the text tower's {len(wanted)} tensors are not in it (first: {missing[0]})",
            "give weights in open_clip's names",
        )
    given = {key: found[key] for key in wanted}
    given["positional_embedding"] = given["positional_embedding"][: len(wanted["positional_embedding"])]
    for key, value in wanted.items():
        if given[key].shape != value.shape:
            raise InputError(
                where,
                f"{key} has shape {list(given[key].shape)}, the model needs {list(value.shape)}",
                "give the model that these weights belong to",
            )
    text.load_state_dict(given)
