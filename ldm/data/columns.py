"""Metadata columns under one name each, whatever the data set called them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES = ("width", "height", "original_width", "original_height", "caption_length")
ALIASES = {
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2"),  # LAION v2; COYO
    "punsafe": ("PUNSAFE", "nsfw_score_opennsfw2"),
    "pwatermark": ("PWATERMARK", "watermark_score"),
    "similarity": ("SIMILARITY", "clip_similarity_vitb32"),
}


class Columns(Mapping[str, NDArray[Any]]):
    """Columns of a table by name or alias; a value that is missing (NaN) is looked up under the next alias.

    `names` gives the user's own: {"aesthetic": "my_score"} puts my_score before every other source.
    """

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], names: Mapping[str, str | None] | None = None
    ) -> None:
        self.arrays = arrays
        self.names = {name: own for name, own in (names or {}).items() if own}

    def sources(self, name: str) -> list[str]:
        """The columns that answer for `name`, best first."""
        own = [self.names[name]] if name in self.names else []
        return [raw for raw in dict.fromkeys([*own, name, *ALIASES.get(name, ())]) if raw in self.arrays]

    def __getitem__(self, name: str) -> NDArray[Any]:
        sources = self.sources(name)
        if not sources:
            raise KeyError(name)
        values = self.arrays[sources[0]]
        for other in sources[1:]:
            values = np.where(np.isnan(values), self.arrays[other], values)
        return values

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.sources(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def columns_of(sample: Mapping[str, Any], names: Mapping[str, str | None] | None = None) -> Columns:
    """The numbers of one sample's metadata as columns of length 1; None is a missing value."""
    facts = dict(sample)
    for side in ("width", "height"):
        if facts.get(f"original_{side}") is None:
            facts[f"original_{side}"] = facts.get(side)
    if facts.get("caption_length") is None and isinstance(facts.get("caption"), str):
        facts["caption_length"] = len(facts["caption"])
    arrays: dict[str, NDArray[Any]] = {
        name: np.array([np.nan if value is None else value], np.float64 if name in SIZES else np.float32)
        for name, value in facts.items()
        if value is None or isinstance(value, (bool, int, float, np.number))
    }
    return Columns(arrays, names)
