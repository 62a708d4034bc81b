"""What is in a set of shards, as numbers and a few pictures: the facts of `ldm data inspect`.

Read from the index; only the pictures of the contact sheet are read from the shards. What is unknown to the
index (a picture that does not decode) is found there for those few alone.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.captions import clean
from ldm.data.columns import ALIASES, SIZES
from ldm.data.filters import Filter, MaxValue, MinSize, MinValue
from ldm.data.hashes import HASHES
from ldm.data.image import BadImage, decode
from ldm.data.index import Index
from ldm.data.reader import ShardReader
from ldm.data.remote import public

BINS = 40
THUMBNAIL = 240  # pixels of a thumbnail's shorter side: drawn at half that, sharp on fine screens
WIDEST = 3.0  # times that side, so that a panorama does not fill the page
NAMED = 20  # duplicate keys that are listed
Values = NDArray[np.float64]


@dataclass
class Histogram:
    """Counts of a column between `edges` (one more than counts), of all samples and of those kept."""

    name: str
    unit: str
    present: int  # samples that have a value
    least: float
    median: float
    most: float
    edges: list[float]
    counts: list[int]
    kept: list[int]
    marks: list[float] = field(default_factory=list)  # where filters cut
    log: bool = False  # the edges are evenly spaced in the logarithm


@dataclass
class Verdict:
    """What one filter does to the whole set, and what is left for it after those before it."""

    filter: str
    rejects: int  # samples, by itself
    first: int  # samples that no filter before it rejected
    missing: int  # samples it rejects because they have no value


@dataclass
class Thumbnail:
    key: str  # shard/key
    caption: str
    width: int
    height: int
    scores: dict[str, float]
    reason: str = ""  # why there is no picture
    jpeg: str = ""  # base64
    ratio: float = 1.0


@dataclass
class Bucket:
    height: int
    width: int
    samples: int
    cut: float  # share of a picture's area that the crop removes, on average


@dataclass
class Inspection:
    """All that the page shows; `as_dict` is the JSON, without the pictures."""

    shards: list[str]
    samples: int
    kept: int
    bytes: int
    left_out: dict[str, int]  # reason -> samples
    problems: list[dict[str, Any]]  # shard, key, reason, offset of the first few of each shard
    duplicates: int  # samples whose key another shard has, too
    duplicate_keys: dict[str, list[str]]  # the first few, and where
    verdicts: list[Verdict]
    histograms: list[Histogram]
    resolution: int | None
    buckets: list[Bucket]
    enlarged: int  # samples that are smaller than their bucket
    thumbnails: list[Thumbnail]

    def as_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        for thumbnail in facts["thumbnails"]:
            del thumbnail["jpeg"], thumbnail["ratio"]
        return facts


class Shapes(Protocol):
    """The shapes of aspect-ratio buckets, and which of them a picture goes to."""

    def shapes(self) -> NDArray[np.int64]:
        """Height, width [k 2]."""

    def assign(self, width: NDArray[Any], height: NDArray[Any]) -> NDArray[Any]:
        """A row of `shapes` for each picture."""


def examine(
    index: Index,
    filters: Sequence[Filter] = (),
    resolution: int | None = None,
    shapes: Shapes | None = None,
    pictures: int = 36,
) -> Inspection:
    """Judge the whole index, read `pictures` evenly spaced samples of those kept.

    `shapes` are those that buckets at `resolution` pixels would have.
    """
    keep, verdicts = _judged(index, filters)
    several, named = _duplicates(index)
    buckets, enlarged = _buckets(index, keep, shapes)
    return Inspection(
        shards=[public(shard) for shard in index.shards],
        samples=len(index),
        kept=int(keep.sum()),
        bytes=int(np.sum(index.sizes)),
        left_out=dict(index.damage.most_common()),
        problems=[dict(zip(("shard", "key", "reason", "offset"), p, strict=True)) for p in index.problems],
        duplicates=several,
        duplicate_keys=named,
        verdicts=verdicts,
        histograms=_histograms(index, keep, filters),
        resolution=resolution,
        buckets=buckets,
        enlarged=enlarged,
        thumbnails=_thumbnails(index, np.flatnonzero(keep), pictures),
    )


def _judged(index: Index, filters: Sequence[Filter]) -> tuple[NDArray[np.bool_], list[Verdict]]:
    """Which samples all filters keep."""
    table, keep, verdicts = index.columns, np.ones(len(index), bool), []
    for condition in filters:
        rejected = ~condition.mask(table)
        missing = int((rejected & condition.absent(table)).sum())
        first = int((rejected & keep).sum())
        verdicts.append(Verdict(spoken(condition), int(rejected.sum()), first, missing))
        keep &= ~rejected
    return keep, verdicts


def spoken(condition: Filter) -> str:
    """A filter as a person writes it."""
    if isinstance(condition, MinValue):
        return f"{condition.column} >= {condition.value:g}"
    if isinstance(condition, MaxValue):
        return f"{condition.column} <= {condition.value:g}"
    if isinstance(condition, MinSize):
        return f"original size >= {condition.pixels} px"
    return str(condition)


def _duplicates(index: Index) -> tuple[int, dict[str, list[str]]]:
    """Keys that several shards have: no damage, but often the same pictures twice."""
    keys, counts = np.unique(index.samples["key"], return_counts=True)
    several = keys[counts > 1]
    found = {}
    for key in several[:NAMED]:
        shards = index.shard_of(np.flatnonzero(index.samples["key"] == key))
        found[key.decode()] = [Path(index.shards[shard]).name for shard in shards.tolist()]
    return int(counts[counts > 1].sum()), found


# ---- histograms ------------------------------------------------------------------------------------------


def _histograms(index: Index, keep: NDArray[np.bool_], filters: Sequence[Filter]) -> list[Histogram]:
    table = index.columns
    width, height = (table[name].astype(np.float64) for name in ("width", "height"))
    original = np.minimum(table["original_width"], table["original_height"])
    sizes = [f.pixels for f in filters if isinstance(f, MinSize)]
    found = [
        _histogram("shorter side", "pixels, as stored", np.minimum(width, height), keep),
        _histogram("shorter side of the original", "pixels, before it was resized", original, keep, sizes),
        _histogram("aspect ratio", "width / height", width / height, keep, log=True),
        _histogram("caption length", "characters", table["caption_length"], keep),
    ]
    for known, name in _scores(index).items():
        limits = [f for f in filters if isinstance(f, (MinValue, MaxValue))]
        cuts = [f.value for f in limits if name in table.sources(f.column)]
        unit = "from the json" if known == name else f"{name} in the json"
        found.append(_histogram(known, unit, table[name], keep, cuts))
    return [histogram for histogram in found if histogram.present]


def _scores(index: Index) -> dict[str, str]:
    """Columns from the json, each once, by the name that the field gives it or else by its own."""
    table = index.columns
    names = [name for name in table if name not in SIZES and name not in HASHES]
    known = {name: alias for alias in reversed(ALIASES) for name in table.sources(alias)[:1]}
    return {known.get(name, name): name for name in names}


def _histogram(
    name: str,
    unit: str,
    values: NDArray[Any],
    keep: NDArray[np.bool_],
    marks: Sequence[float] = (),
    log: bool = False,
) -> Histogram:
    """Bars between the 1st and the last thousandth of the values; what lies outside is in the end bars."""
    there = np.isfinite(values)
    given, kept = values[there].astype(np.float64), keep[there]
    if not given.size:
        return Histogram(name, unit, 0, 0, 0, 0, [], [], [])
    least, median, most = np.quantile(given, (0, 0.5, 1)).tolist()
    low, high = np.quantile(given, (0.001, 0.999)).tolist()
    low, high = min([low, *marks]), max([high, *marks])
    if log:
        widest = max(2.0, high, 1 / low)
        edges = np.geomspace(1 / widest, widest, BINS + 1)  # 1 is in the middle
    else:
        edges = _round_edges(low, high, whole=bool((given == np.round(given)).all()))
    at = np.clip(np.searchsorted(edges, given, side="right") - 1, 0, len(edges) - 2)
    counts, left = (np.bincount(part, minlength=len(edges) - 1).tolist() for part in (at, at[kept]))
    size = int(given.size)
    return Histogram(name, unit, size, least, median, most, edges.tolist(), counts, left, list(marks), log)


def _round_edges(low: float, high: float, whole: bool) -> Values:
    """About BINS edges at round numbers, at least one bar; bars of whole numbers are whole numbers wide."""
    rough = (high - low) / BINS or 1.0
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = np.floor(low / step), np.floor(high / step) + 1
    return np.arange(first, last + 1) * step


# ---- buckets ---------------------------------------------------------------------------------------------


def _buckets(index: Index, keep: NDArray[np.bool_], shapes: Shapes | None) -> tuple[list[Bucket], int]:
    """How many of the samples kept go to each shape, and how many of them would be enlarged to fill it."""
    if shapes is None:
        return [], 0
    width, height = (index[name][keep].astype(np.float64) for name in ("width", "height"))
    sides, at = shapes.shapes(), shapes.assign(width, height).astype(np.int64)
    scale = np.maximum(sides[at, 0] / height, sides[at, 1] / width)  # covers the shape, then is cropped
    cut = 1 - sides[at].prod(1) / (width * height * scale**2)
    counts = np.bincount(at, minlength=len(sides))
    cuts = np.bincount(at, cut, len(sides)) / np.maximum(counts, 1)
    rows = zip(sides.tolist(), counts.tolist(), cuts.tolist(), strict=True)
    found = [Bucket(side[0], side[1], count, loss) for side, count, loss in rows if count]
    return sorted(found, key=lambda bucket: bucket.width / bucket.height), int((scale > 1).sum())


# ---- contact sheet ---------------------------------------------------------------------------------------


def _thumbnails(index: Index, rows: NDArray[np.int64], number: int) -> list[Thumbnail]:
    """Evenly spaced samples of `rows`, with picture and caption."""
    if not len(rows) or number < 1:
        return []
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, number).astype(np.int64))]
    table = index.columns
    scores = {known: table[name][rows] for known, name in _scores(index).items()}
    found = []
    for i, (key, raw) in enumerate(zip(index.keys(rows), ShardReader(index)(rows), strict=True)):
        facts = index.samples[rows[i]]
        mine = {name: float(values[i]) for name, values in scores.items() if np.isfinite(values[i])}
        caption = clean(raw.parts.get("caption", b"").decode("utf-8", "replace"))
        thumbnail = Thumbnail(key, caption, int(facts["width"]), int(facts["height"]), mine, raw.reason)
        if not raw.reason:
            try:
                thumbnail.jpeg, thumbnail.ratio = _jpeg(raw.parts["image"])
            except BadImage as error:
                thumbnail.reason = str(error)
        found.append(thumbnail)
    return found


def _jpeg(data: bytes) -> tuple[str, float]:
    """A small JPEG of our own making in base64, and its width / height."""
    image = Image.fromarray(decode(data, THUMBNAIL).pixels)
    ratio = image.width / image.height
    image.thumbnail((round(THUMBNAIL * min(max(ratio, 1.0), WIDEST)), round(THUMBNAIL * max(1 / ratio, 1.0))))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode(), ratio


def reasons(inspection: Inspection) -> Counter[str]:
    """Damage that the index found, and pictures of the contact sheet that did not decode."""
    return Counter(inspection.left_out) + Counter(t.reason for t in inspection.thumbnails if t.reason)
