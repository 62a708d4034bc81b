"""The data sets that a configuration names: their indexes, and what of them is trained on or held out.

One set is `data.shards`; several are the entries of `data.mix`, each with shards and a weight, and with
filters and names of columns of its own where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

from ldm.data.filters import Filter
from ldm.data.index import Index, build_index, cached_index
from ldm.data.mixture import Source, checked
from ldm.data.selection import NothingKept, Split, select
from ldm.data.staging import staged, staged_already
from ldm.errors import InputError


@dataclass
class Sets:
    """What `data.` says of shards; raises `InputError` where that is contradictory.

    `limit` is of each set; `validation_filters` None: those of training. Held out are `validation_shards`, or
    else what `validation_filters` and `validation_fraction` take out of the training shards.
    """

    shards: str | Sequence[str] | None
    mix: Sequence[Mapping[str, Any]] | None = None
    filters: Sequence[Filter] = ()
    columns: Mapping[str, str | None] | None = None
    limit: int | None = None
    validation_shards: str | Sequence[str] | None = None
    validation_filters: Sequence[Filter] | None = None
    validation_fraction: float = 0.0
    index_dir: str | PathLike[str] | None = None
    allow_incomplete: bool = False
    staging: Mapping[str, Any] = field(default_factory=dict)  # options of `staged`

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.mix is None):
            given = "neither" if self.mix is None else "both"
            raise InputError("data.shards, data.mix", f"{given} given", "give one of them; null is none")
        if self.mix is not None:
            self.mix = checked(self.mix)
        fraction = self.validation_fraction
        if not 0 <= fraction < 1:
            raise InputError("data.validation_fraction", f"expected 0 to 1, got {fraction}")
        if fraction and self.validation_shards is not None:
            what = "shards of their own are held out already"
            raise InputError("data.validation_fraction", what, "leave out one of it and validation_shards")
        self.validates = (
            self.validation_shards is not None or self.validation_filters is not None or fraction > 0
        )

    def training(self) -> list[Source]:
        """Index and selection of each set; builds what is missing."""
        sources: list[Source] = []
        nothing: NothingKept | None = None
        for place, entry in self._entries():
            index = self._index(entry["shards"], f"{place}.shards", entry["columns"])
            filters = entry["filters"]
            try:
                selection = select(index, filters, f"{place}.filters", self.limit, self._split("train"))
            except NothingKept as error:
                if not entry.get("optional"):
                    raise
                nothing = error
                continue
            sources.append(Source(index, selection, float(entry["weight"]), str(entry["name"])))
        if nothing is not None and not sources:
            raise nothing
        return sources

    def held_out(self, training: Sequence[Source]) -> list[Source] | None:
        """What is validated on, given the training sets; None: nothing."""
        if not self.validates:
            return None
        pairs = zip(training, self._entries(), strict=True)
        sets = [(source.index, source.name, entry["filters"]) for source, (_, entry) in pairs]
        if self.validation_shards is not None:
            name = "data.validation_shards"
            sets = [(self._index(self.validation_shards, name, self.columns), name, self.filters)]
        given = self.validation_filters
        where, split = "data.validation_filters", self._split("validation")
        return [
            Source(index, select(index, own if given is None else given, where, split=split), name=name)
            for index, name, own in sets
        ]

    def known_size(self) -> int | None:
        """Samples in an epoch of training, if that is known without reading a shard."""
        total = 0
        for _, entry in self._entries():
            shards = entry["shards"] and staged_already(entry["shards"], **self.staging)
            index = cached_index(shards, self.index_dir, entry["columns"]) if shards else None
            if index is None:
                return None
            total += len(select(index, entry["filters"], limit=self.limit, split=self._split("train")))
        return total

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        """Where each set stands in the config, and what it says."""
        usual = {"filters": self.filters, "columns": self.columns, "weight": 1.0}
        if self.mix is None:
            return [("data", {**usual, "shards": self.shards, "name": "data.shards"})]
        places = [entry.get("place", f"data.mix[{i}]") for i, entry in enumerate(self.mix)]
        entries = zip(places, self.mix, strict=True)
        return [(place, {**usual, "name": place, **entry}) for place, entry in entries]

    def _index(self, shards: Any, where: str, columns: Mapping[str, str | None] | None) -> Index:
        shards = staged(shards, where=where, **self.staging)
        allow = self.allow_incomplete
        return build_index(shards, self.index_dir, names=columns, where=where, allow_incomplete=allow)

    def _split(self, side: Literal["train", "validation"]) -> Split | None:
        return (self.validation_fraction, side) if self.validation_fraction else None
