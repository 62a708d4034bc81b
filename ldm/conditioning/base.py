"""What every conditioner has beside `forward`: how wide its fields are, and how it is read when sampling."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from ldm.errors import InputError
from ldm.types import Batch, Conditioning


class ConditionerModule(nn.Module):
    """Batch to conditioning. The widths say which fields it gives; training checks them on the backbone.

    tokenizer     captions -> tokens for data workers, picklable; None: it reads no text
    source_scale  in sampling it is shown a picture, so many times smaller than what is drawn; None: it is not
    needs_source  and cannot do without
    draws_only    no training data has what it reads
    """

    tokenizer: Any = None
    context_dim: int | None = None
    pooled_dim: int | None = None
    num_classes: int | None = None  # rows of the embedding of its label, the null class included
    concat_channels: int = 0
    source_scale: int | None = None
    needs_source: bool = False
    draws_only: bool = False
    unfilled: bool = False  # its weights are to come from a checkpoint; until then they mean nothing

    def forward(self, batch: Batch) -> Conditioning:
        raise NotImplementedError

    def null(self, given: Conditioning) -> Conditioning:
        """`given` as it is where nothing is asked for: the same shapes, and still what is not asked but shown
        (pictures, sizes). Dropped captions and guidance get it.
        """
        raise NotImplementedError

    def use_autoencoder(self, autoencoder: Any) -> None:
        """Take what is needed of the frozen autoencoder, which stays somebody else's; called before use."""

    def towers(self) -> ConditionerModule | None:
        """What of it reads captions, if none of that is trained here: its outputs may be made beforehand,
        and come as `batch.context` and its companions. None: nothing.
        """
        return None

    def reading(self, weighted: bool = False, clip_skip: int = 1) -> Self:
        """This conditioner with another way of reading prompts, and the same weights: `TextConditioner`."""
        where = f"clip_skip={clip_skip}" if clip_skip != 1 else "prompt_weights=true"
        raise InputError(where, "this checkpoint reads no text", "leave it out")
