"""A list of pictures through its pipelines: all is checked first, then drawn and saved batch by batch.

`pipe_of(checkpoint, weights, precision)` opens a pipeline; this knows none by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ldm.errors import InputError
from ldm.sampling.items import Item
from ldm.sampling.output import Array, Folder
from ldm.sampling.request import Request

PipeOf = Callable[..., Any]


def survey(items: Sequence[Item], pipe_of: PipeOf) -> list[Request]:
    """What each picture asks for; raises the InputError of whatever cannot be drawn."""
    known: dict[str, Request] = {}
    requests = []
    for item in items:
        key = repr((item.model, item.options))
        if key not in known:
            try:
                known[key] = pipe_of(*item.model).request(**item.options)
            except InputError as error:
                raise (InputError(item.place, str(error)) if item.place else error) from None
        requests.append(known[key])
    return requests


def draw(
    items: Sequence[Item],
    groups: Sequence[Sequence[int]],
    pipe_of: PipeOf,
    out: Folder | Array,
    advance: Callable[[], None],
) -> None:
    """Draw and save the pictures of `groups`, places in the list that are drawn together."""
    for group in groups:
        first = items[group[0]]
        size, place = first.batch or (len(group), 0)
        drawn = [first] * size if first.batch else [items[i] for i in group]
        pictures = pipe_of(*first.model)(
            [item.prompt for item in drawn],
            seed=[item.seed for item in drawn],
            batch_size=size,
            progress=advance,
            **first.options,
        )
        for i, picture in zip(group, pictures[place:], strict=False):
            out.save(i, picture)
