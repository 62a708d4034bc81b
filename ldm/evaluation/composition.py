"""Do pictures follow prompts they were never trained on? The quickstart's score, by pixels alone.

Every object was trained on all backgrounds but one; the score asks for each object on that one. It tests the
composition of known words, not unknown objects. n pictures, k backgrounds, m objects, H W picture size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.pictures import contact_sheet


class ReferenceSet(Protocol):
    """Objects times backgrounds, some pairs held out of training; `ldm.data.emoji.EmojiSet` is one."""

    objects: Any  # m of them
    colours: NDArray[np.uint8]  # of the backgrounds, RGB [k 3]
    held_out: Any  # pairs (i, j)

    def picture(self, i: int, j: int) -> NDArray[np.uint8]: ...  # object i on background j, [H W 3]

    def caption(self, i: int, j: int) -> str: ...


@dataclass(frozen=True)
class CompositionScore:
    """Fractions of pictures with the right background and the right object, and what guessing would give."""

    background: float
    object: float
    chance_background: float
    chance_object: float
    background_right: list[bool]  # by picture
    object_right: list[bool]
    pictures: list[Image.Image]
    captions: list[str]

    def line(self) -> str:
        chance = f"chance {percent(self.chance_background)}, {percent(self.chance_object)}"
        right = f"background {percent(self.background)}, object {percent(self.object)}"
        return f"held-out: {right} ({len(self.captions)} pairs; {chance})"

    def sheet(self, shown: int | None = None) -> Image.Image:
        """So many pictures, evenly spaced, each with its prompt; None: all."""
        count = len(self.pictures)
        chosen = [k * count // shown for k in range(shown)] if shown and shown < count else range(count)
        return contact_sheet([self.pictures[k] for k in chosen], [self.captions[k] for k in chosen])


def percent(fraction: float) -> str:
    """A percentage with at most one decimal, rounded down so that no bar is met by rounding."""
    tenths = int(fraction * 1000 + 1e-9)
    return f"{tenths // 10} %" if tenths % 10 == 0 else f"{tenths / 10} %"


def background_of(picture: NDArray[np.uint8], colours: NDArray[Any]) -> int:
    """Index of the colour [k 3] nearest to the median of the picture's outermost pixels (uint8 [H W 3])."""
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    distance = ((colours.astype(np.float64) - np.median(border, axis=0)) ** 2).sum(1)
    return int(distance.argmin())


def objects_of(pictures: NDArray[np.uint8], references: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Index [n] of the reference, uint8 [m H W 3], with the least squared error to each picture [n H W 3].

    That is |r|^2 - 2 p.r + |p|^2 without the last term, row after row of pixels; exact in float64.
    """
    errors = np.zeros((len(pictures), len(references)))
    for y in range(pictures.shape[1]):
        p, r = (values[:, y].reshape(len(values), -1).astype(np.float64) for values in (pictures, references))
        errors += (r**2).sum(1) - 2 * p @ r.T
    return errors.argmin(1)


def score_pictures(pictures: Sequence[Image.Image], emoji_set: ReferenceSet) -> CompositionScore:
    """Score one picture of every held-out pair, in the order of the pairs."""
    pairs = list(emoji_set.held_out)
    if len(pictures) != len(pairs):
        raise ValueError(f"{len(pictures)} pictures but {len(pairs)} held-out pairs")
    objects = range(len(emoji_set.objects))
    arrays = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    wanted, on = np.array(pairs).T
    found = np.zeros(len(pairs), np.intp)
    for j in set(on.tolist()):  # references on one background at a time: all emoji on all are gigabytes
        references = np.stack([emoji_set.picture(i, j) for i in objects])
        found[on == j] = objects_of(arrays[on == j], references)
    object_right = (found == wanted).tolist()
    background_right = [
        background_of(a, emoji_set.colours) == j for a, (_, j) in zip(arrays, pairs, strict=True)
    ]
    return CompositionScore(
        background=float(np.mean(background_right)),
        object=float(np.mean(object_right)),
        chance_background=1 / len(emoji_set.colours),
        chance_object=1 / len(objects),
        background_right=background_right,
        object_right=object_right,
        pictures=list(pictures),
        captions=[emoji_set.caption(i, j) for i, j in pairs],
    )


def evaluate_quickstart(
    pipe: Callable[..., list[Image.Image]],
    emoji_set: ReferenceSet,
    seed: int = 0,
    batch_size: int = 45,
    progress: bool = False,
) -> CompositionScore:
    """Draw every held-out pair once from its caption, as the checkpoint itself would sample, and score it."""
    pairs = list(emoji_set.held_out)
    height, width, _ = emoji_set.picture(*pairs[0]).shape
    captions = [emoji_set.caption(i, j) for i, j in pairs]
    pictures = pipe(captions, seed=seed, batch_size=batch_size, height=height, width=width, progress=progress)
    return score_pictures(pictures, emoji_set)
