"""One conditioner made of others, and the sizes of SDXL (Podell et al. 2023, section 2.2).

Stable Diffusion XL is two text towers and the sizes; an inpainting model a text tower and the masked picture.
b batch, l tokens, d width, p pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.base import ConditionerModule
from ldm.nn.embeddings import sinusoid
from ldm.types import Batch, Conditioning

JOINED = (("context", "context_dim", -1), ("pooled", "pooled_dim", -1), ("concat", "concat_channels", 1))


class Combined(ConditionerModule):
    """The fields of `parts`, joined in order: contexts and pooled along the width, concat along channels.

    Contexts have equal length. A label comes from one part alone. `context_dim` and `pooled_dim` are what the
    configuration told the backbone, checked against the parts.
    """

    def __init__(
        self, parts: Mapping[str, Any], context_dim: int | None = None, pooled_dim: int | None = None
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self._measure()
        for name, told in (("context_dim", context_dim), ("pooled_dim", pooled_dim)):
            widths = {key: getattr(part, name) or 0 for key, part in parts.items()}
            if told not in (None, sum(widths.values())):
                raise ValueError(f"{name}={told}, but the parts have {widths}")
        lengths = {part.tokenizer.context_length for part in self._readers()}
        if len(lengths) > 1:
            raise ValueError(f"the text towers have different context_length: {sorted(lengths)}")
        labelled = [name for name, part in parts.items() if part.num_classes]
        if len(labelled) > 1:
            raise ValueError(f"a backbone takes one label, but {' and '.join(labelled)} give one each")
        self.tokenizer = next((part.tokenizer for part in self._readers()), None)

    def _measure(self) -> None:
        for _, width, _ in JOINED[:2]:
            setattr(self, width, sum(getattr(part, width) or 0 for part in self._all()) or None)
        self.concat_channels = sum(part.concat_channels for part in self._all())
        self.num_classes = next((part.num_classes for part in self._all() if part.num_classes), None)
        self.source_scale = next((part.source_scale for part in self._all() if part.source_scale), None)
        self.needs_source = any(part.needs_source for part in self._all())
        self.draws_only = any(part.draws_only for part in self._all())

    def _all(self) -> list[Any]:
        return list(self.parts.values())

    def _readers(self) -> list[Any]:
        return [part for part in self._all() if part.tokenizer is not None]

    def use_autoencoder(self, autoencoder: Any) -> None:
        for part in self._all():
            part.use_autoencoder(autoencoder)
        self._measure()

    def reading(self, weighted: bool = False, clip_skip: int = 1) -> Combined:
        if not self._readers():
            return super().reading(weighted, clip_skip)
        parts: dict[str, Any] = dict(self.parts.items())
        read = {name: part.reading(weighted, clip_skip) for name, part in parts.items() if part.tokenizer}
        return Combined(parts | read)

    def towers(self) -> Combined | None:
        parts: dict[str, Any] = dict(self.parts.items())
        readers = {name: part.towers() for name, part in parts.items() if part.tokenizer is not None}
        return Combined(readers) if readers and all(readers.values()) else None

    def forward(self, batch: Batch) -> Conditioning:
        batches = iter(self._shares(batch))
        own = [batch if part.tokenizer is None else next(batches) for part in self._all()]
        return self._joined([part(given) for part, given in zip(self._all(), own, strict=True)])

    def _shares(self, batch: Batch) -> list[Batch]:
        """For each part that reads captions the batch with its own of the outputs made beforehand."""
        readers = self._readers()
        if batch.context is None:
            return [batch] * len(readers)
        contexts = batch.context.split([part.context_dim for part in readers], -1)
        widths = [part.pooled_dim or 0 for part in readers]
        pooled = [None] * len(readers) if batch.pooled is None else batch.pooled.split(widths, -1)
        return [replace(batch, context=c, pooled=p) for c, p in zip(contexts, pooled, strict=True)]

    def null(self, given: Conditioning) -> Conditioning:
        return self._joined(
            [part.null(own) for part, own in zip(self._all(), self._split(given), strict=True)]
        )

    def _joined(self, values: Sequence[Conditioning]) -> Conditioning:
        fields: dict[str, Tensor | None] = {}
        for field, _, dim in JOINED:
            found = [getattr(value, field) for value in values if getattr(value, field) is not None]
            fields[field] = torch.cat([x.to(found[0].dtype) for x in found], dim) if found else None
        for field in ("context_mask", "label"):
            found = [getattr(value, field) for value in values if getattr(value, field) is not None]
            fields[field] = found[0] if found else None
        return Conditioning(**fields)

    def _split(self, given: Conditioning) -> list[Conditioning]:
        """What of `given` each part gave."""
        starts = dict.fromkeys((field for field, _, _ in JOINED), 0)
        owned = []
        for part in self._all():
            fields: dict[str, Tensor | None] = {"label": given.label if part.num_classes else None}
            fields["context_mask"] = given.context_mask if part.context_dim else None
            for field, width, dim in JOINED:
                size, value = getattr(part, width) or 0, getattr(given, field)
                fields[field] = value.narrow(dim, starts[field], size) if size else None
                starts[field] += size
            owned.append(Conditioning(**fields))
        return owned


class Sizes(ConditionerModule):
    """Pooled: a sinusoid for each of height and width before any resize, top and left of the crop, height and
    width of the picture. Dropped captions keep it.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.width, self.pooled_dim = width, 6 * width

    def forward(self, batch: Batch) -> Conditioning:
        target = batch.target_size
        if target is None and batch.image is not None:
            target = torch.stack([torch.full_like(batch.n, side) for side in batch.image.shape[2:]], dim=1)
        facts = {"original_size": batch.original_size, "crop": batch.crop, "target_size": target}
        missing = [name for name, value in facts.items() if value is None]
        if missing:
            raise ValueError(f"the sizes need batch.{' and batch.'.join(missing)}, None here")
        numbers = torch.cat([value for value in facts.values() if value is not None], dim=1)
        return Conditioning(pooled=sinusoid(numbers.flatten(), self.width).view(len(numbers), -1))

    def null(self, given: Conditioning) -> Conditioning:
        return given
