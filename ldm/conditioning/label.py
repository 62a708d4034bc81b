"""Classes to conditioning: an embedding that joins the time's (in the backbone), or a token of the context.

Rombach et al. 2022, section 3.3, condition on classes with one token. Dropped labels become the null class,
the last row. b batch, d width.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.base import ConditionerModule
from ldm.errors import InputError
from ldm.types import Batch, Conditioning


class Classes(ConditionerModule):
    """What both share: the class of each row of a batch. Of `num_classes` rows the last is the null class.

    Labels are those of the batch, where below 0 is the null class; without any, each caption is a class: its
    index, or one of `names`, which are those of the classes in order. The empty caption is the null class.
    """

    def __init__(self, num_classes: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} is below 2, one class and the null class")
        if names is not None and len(names) != num_classes - 1:
            raise ValueError(
                f"num_classes={num_classes} with the null class, but there are {len(names)} names"
            )
        self.nothing = num_classes - 1
        self.names = {name.lower(): i for i, name in enumerate(names or ())}

    def labels(self, batch: Batch) -> Tensor:
        """int64 [b]."""
        label = batch.label
        if label is None:
            if batch.caption is None:
                raise ValueError("a class conditioner needs batch.label or batch.caption; both are None")
            label = torch.tensor([self.class_of(text) for text in batch.caption], device=batch.n.device)
        return label.where(label >= 0, self.nothing)

    def class_of(self, text: str) -> int:
        """The class that a prompt says, -1 for none; raises InputError."""
        text = text.strip().lower()
        if not text:
            return -1
        known = self.names.get(text, int(text) if text.isdecimal() else -1)
        if not 0 <= known < self.nothing:
            near = difflib.get_close_matches(text, self.names, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"give 0 to {self.nothing - 1} or a name it knows"
            raise InputError(f"prompt={text!r}", "no such class", fix)
        return known


class ClassLabel(Classes):
    """Conditioning.label, for a backbone with the same `num_classes`, which is told of no context (None)."""

    def __init__(
        self, num_classes: int, names: Sequence[str] | None = None, context_dim: int | None = None
    ) -> None:
        super().__init__(num_classes, names)
        if context_dim is not None:
            raise ValueError(f"context_dim={context_dim}, but a label is no context: need null")
        self.num_classes = num_classes

    def forward(self, batch: Batch) -> Conditioning:
        return Conditioning(label=self.labels(batch))

    def null(self, given: Conditioning) -> Conditioning:
        assert given.label is not None
        return Conditioning(label=torch.full_like(given.label, self.nothing))


class ClassToken(Classes):
    """The class as a context of one token, [b 1 d]; its embedding is trained with the backbone."""

    def __init__(self, num_classes: int, context_dim: int, names: Sequence[str] | None = None) -> None:
        super().__init__(num_classes, names)
        self.context_dim = context_dim
        self.embedding = nn.Embedding(num_classes, context_dim)

    def forward(self, batch: Batch) -> Conditioning:
        return Conditioning(context=self.embedding(self.labels(batch))[:, None])

    def null(self, given: Conditioning) -> Conditioning:
        assert given.context is not None
        return Conditioning(context=self.embedding.weight[-1].expand(len(given.context), 1, -1))
