"""Training on what `ldm data cache` made: latents and, where a frozen tower reads them, captions in numbers.

A cache is a folder of shards KEY.moments.npy [k m h w], KEY.context.npy [l d], KEY.pooled.npy [p], KEY.txt,
KEY.json, and dataset.json, which says by which networks, from which pictures, at which size. Other networks
or another size are refused. A cache of buckets has a folder WxH for each: a shard holds one shape.

k variants (crops, flips), m channels of the moments, h w latent size, l tokens, d width, p pooled width.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.data.arrays import Layout
from ldm.data.buckets import Regroup
from ldm.data.datamodule import ShardDataModule
from ldm.data.image import BadImage
from ldm.data.makers import Maker, Part, Pictures
from ldm.data.mixture import Mixture
from ldm.data.plan import Ints, Plan, Stream
from ldm.data.reader import Raw
from ldm.data.turns import Turns, turns
from ldm.errors import InputError

log = logging.getLogger(__name__)
DATASET, MADE_BY, FORMAT_VERSION = "dataset.json", "ldm data cache", 1
NULL = "null.safetensors"  # beside it: what the text towers give where a caption is dropped, one row a field
CROP = b'{"crop": '  # how the json of a sample begins: the rest is not parsed in training
Side = tuple[int, int]  # height, width
TEXT = ("context", "context_mask", "pooled")  # fields of a Batch that stand for its captions


@dataclass(frozen=True)
class CacheFacts:
    """What dataset.json says. All but the last two is settled before the first shard is written."""

    autoencoder: str  # fingerprint of the network that made the moments
    conditioner: str | None  # of the frozen text towers; None: no text
    image_size: int  # pixels a side
    crop: str
    flip: float
    seed: int  # of crops and flips
    variants: int
    dtype: str  # fp16 | fp32
    selection: str  # digest of the samples it was made of
    samples: int
    samples_per_shard: int
    shapes: dict[str, list[int]]  # of each kind of array; moments: in the first bucket
    buckets: list[list[int]] | None = None  # height, width, samples of each, as they lie in the shards
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> samples
    complete: bool = False

    @property
    def sides(self) -> list[Side]:
        """Height and width in pixels of what the moments stand for, in each bucket."""
        return [(h, w) for h, w, _ in self.buckets or [[self.image_size, self.image_size, 0]]]

    @property
    def parts(self) -> list[str]:
        """Folders of the shards of each bucket, in that of the cache."""
        return [f"{w}x{h}" for h, w, _ in self.buckets] if self.buckets else [""]

    @property
    def factor(self) -> int:
        """Pixels of a latent."""
        return self.sides[0][0] // self.shapes["moments"][2]

    def spans(self) -> Ints:
        """Bucket, first sample in it and end of each shard: [shards 3]. No shard is of two buckets."""
        size, rows = self.samples_per_shard, []
        for b, count in enumerate([count for *_, count in self.buckets or [[self.samples]]]):
            first = np.arange(0, count, size)
            rows.append(np.stack([np.full_like(first, b), first, np.minimum(first + size, count)], 1))
        return np.concatenate(rows)

    @property
    def shards(self) -> int:
        return len(self.spans())

    def layouts(self, side: Side | None = None) -> dict[str, Layout]:
        """How the arrays of each kind are stored, in the bucket of this shape or in the first."""
        dtypes, (h, w) = {"context_mask": "bool"}, side or self.sides[0]
        moments = [*self.shapes["moments"][:2], h // self.factor, w // self.factor]
        shapes = self.shapes | {"moments": moments}
        return {kind: Layout(kind, dtypes.get(kind, self.dtype), s) for kind, s in shapes.items()}

    def alike(self) -> dict[str, Any]:
        """What caches that are trained on together must agree on."""
        moments = [*self.shapes["moments"][:2], self.factor]
        own = {name: getattr(self, name) for name in ("autoencoder", "conditioner", "dtype")}
        return {**own, "shapes": self.shapes | {"moments": moments}, "buckets": self.buckets is not None}

    def settled(self) -> dict[str, Any]:
        """What two makers of one cache must agree on."""
        return {name: value for name, value in asdict(self).items() if name not in ("left_out", "complete")}

    def text(self) -> str:
        """As it stands in dataset.json."""
        facts = {"made_by": MADE_BY, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(facts, indent=1) + "\n"


def read_facts(folder: Path, where: str) -> CacheFacts:
    """dataset.json of a cache; raises `InputError` if the folder is none, or a newer one."""
    try:
        found = json.loads((folder / DATASET).read_bytes())
        ours = found.pop("made_by") == MADE_BY
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise InputError(where, f"{folder} was not made by {MADE_BY}", f"run {MADE_BY} OUT experiment=NAME")
    if (version := found.pop("format_version", None)) != FORMAT_VERSION:
        what = f"{folder} has format_version {version}, this program reads {FORMAT_VERSION}"
        raise InputError(where, what, "update ldm, or make the cache anew")
    if found.keys() != {f.name for f in fields(CacheFacts)}:
        raise InputError(where, f"{folder / DATASET} is damaged", "make the cache anew")
    return CacheFacts(**found)


class Moments:
    """The moments of one variant of a sample, and what text towers gave for its caption.

    The variants of a sample take turns from epoch to epoch, from one that depends on seed and sample;
    without a plan it is always the first. `sides` are the shapes of the plan's buckets, if it has such.
    """

    def __init__(
        self,
        facts: CacheFacts,
        text: bool,
        seed: int = 0,
        plan: Plan | None = None,
        sides: Sequence[Side] | None = None,
    ) -> None:
        layouts, self.sides = facts.layouts(), sides or facts.sides[:1]
        self.stored = [facts.layouts(side)["moments"] for side in self.sides]
        self.moments = self.stored[0]
        self.text = {kind: layouts[kind] for kind in TEXT if kind in layouts and text}
        self.kinds: tuple[str, ...] = ("moments", *self.text, "json")
        self.decoder = json.JSONDecoder()
        self.seed, self.plan = seed, plan

    def fields(self, n: Ints) -> Part:
        plan = self.plan
        bucket = plan.bucket(int(n[0]) // plan.batch) if isinstance(plan, Turns) and len(n) else 0
        self.moments = self.stored[bucket]
        known = self.plan if self.moments.shape[0] > 1 else None  # one variant: no turns to take
        self.turns = np.zeros_like(n) if known is None else known.places(n).epoch
        shapes = {"moments": self.moments.shape[1:], **{kind: own.shape for kind, own in self.text.items()}}
        dtypes = {"moments": self.moments.dtype, **{kind: own.dtype for kind, own in self.text.items()}}
        self.arrays = {kind: np.zeros((len(n), *shape), dtypes[kind]) for kind, shape in shapes.items()}
        tensors = {kind: torch.from_numpy(array) for kind, array in self.arrays.items()}
        self.crops = np.zeros((len(n), 2), np.int64)
        target = np.tile(np.array(self.sides[bucket], np.int64), (len(n), 1))
        return {**tensors, "crop": self.crops, "target_size": target}

    def prepare(self, raw: Raw) -> tuple[tuple[NDArray[Any], list[Any], Ints, int], int]:
        moments = self.moments.unpack(raw.parts["moments"])
        text = [(kind, layout.unpack(raw.parts[kind])) for kind, layout in self.text.items()]
        facts = raw.parts["json"]
        try:
            crops = np.array(self.decoder.raw_decode(facts.decode(), len(CROP))[0], np.int64)
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise BadImage("bad_json") from None
        if not facts.startswith(CROP) or crops.shape != (len(moments), 2):
            raise BadImage("bad_json")
        first = 0 if self.plan is None else zlib.crc32(facts, self.seed & 0xFFFFFFFF)
        return (moments, text, crops, first), raw.nbytes

    def finish(self, part: Part, i: int, prepared: Any) -> None:
        moments, text, crops, first = prepared
        variant = (first + int(self.turns[i])) % len(moments)
        self.arrays["moments"][i] = moments[variant]
        self.crops[i] = crops[variant]
        for kind, array in text:
            self.arrays[kind][i] = array


class CachedDataModule(ShardDataModule):
    """`ShardDataModule` over caches; `options` are its other ones, but for those of transforms.

    shards             folders that `ldm data cache` made, by equal settings
    crop, flip         None, or what the cache was made with
    text               take the text towers' outputs if the cache holds them; False: read the captions
    validation_shards  another cache, or tars of pictures
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        image_size: int,
        crop: str | None = None,
        flip: float | None = None,
        text: bool = True,
        validation_shards: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if options.get("mix") is not None:
            fix = "set data.mix=null; several caches go into data.shards"
            raise InputError("data.mix", "caches have no such option", fix)
        super().__init__(shards, image_size, validation_shards=validation_shards, **options)
        self.asked = {"image_size": image_size, "crop": crop, "flip": flip}
        self.reads_text = text
        self.facts: CacheFacts | None = None
        self.sides: list[Side] = []  # of the buckets, if the caches have such: one source each
        self.validation_facts: CacheFacts | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.facts is None:
            found = self._facts(self.sets.shards, "data.shards")
            self._lay_out(found)
            held_out, validated = self.sets.validation_shards, found
            where = "data.validation_filters" if held_out is None else "data.validation_shards"
            if held_out is not None and _is_cache(held_out):
                validated = self._facts(held_out, where)
            if held_out is None or validated is not found:
                self.validation_facts = validated[0]
                if self.sets.validates and len({side for own in validated for side in own.sides}) > 1:
                    fix = "give data.validation_shards: a cache of squares, or tars of pictures"
                    raise InputError(where, "samples of several shapes are not validated on", fix)
            self.facts = found[0]
            self.reads_text = self.reads_text and self.facts.conditioner is not None
        super().setup(stage)
        if self.sets.mix is not None:  # filters may have left nothing of some
            self.sides = [self.named[source.name] for source in self.sources]

    def _lay_out(self, found: Sequence[CacheFacts]) -> None:
        """A data set for each bucket, if there are such, of the folders of all caches."""
        sides = list(dict.fromkeys(side for own in found for side in own.sides))
        if self.buckets is not None:
            known = {(h, w) for h, w in self.buckets.shapes().tolist()}
            fix = f"set data.buckets=null, or run {MADE_BY} with these buckets"
            if found[0].buckets is None:
                raise InputError("data.buckets", "the pictures of the cache are squares", fix)
            for h, w in sides:
                if (h, w) not in known:
                    raise InputError("data.buckets", f"the cache has pictures of {w} x {h}, not among", fix)
        self.buckets, self.named = None, {f"{w} x {h}": (h, w) for h, w in sides}
        if found[0].buckets is not None:
            folders = [
                folder / part for folder, own in zip(self.folders(), found, strict=True) for part in own.parts
            ]
            self.sets.mix = [
                {"place": "data", "name": name, "weight": 1.0, "optional": True}
                | {"shards": [str(folder) for folder in folders if folder.name == f"{w}x{h}"]}
                for name, (h, w) in self.named.items()
            ]

    def prepare_data(self) -> None:
        """Look at the buckets, too (Lightning calls this on one process a node)."""
        super().prepare_data()
        if isinstance(plan := self.plan(), Turns):
            for source, times in zip(self.sources, plan.repeats, strict=True):
                if times > 2:
                    few = f"{len(source):,} pictures, fewer than half a batch of {self.global_batch_size:,}"
                    log.warning("bucket %s: %s: a pass plays each %.1f times", source.name, few, times)

    def plan(self) -> Stream | Mixture | Regroup | Turns:
        self.setup()
        if self.sets.mix is None:
            return super().plan()
        plan = turns(self.sources, self.global_batch_size, self.seed, self.constants)
        self.constants = plan.constants
        return plan

    def _facts(self, shards: str | Sequence[str] | None, where: str) -> list[CacheFacts]:
        """What the folders say, if it is what the configuration asks for."""
        folders = _folders(shards)
        found = {folder: read_facts(folder, where) for folder in folders}
        if not found:
            raise InputError(where, "no cache given", f"set {where} to a folder that {MADE_BY} made")
        facts = found[folders[0]]
        for folder, own in found.items():
            there = sum(len(list((folder / part).glob("*.tar"))) for part in own.parts)
            if not own.complete or there != own.shards:
                what = f"{folder} is not complete ({there} of {own.shards} shards)"
                raise InputError(where, what, f"run the same {MADE_BY} again")
            for name, value in self.asked.items():
                if value not in (None, getattr(own, name)):
                    what = f"{value}, but {folder} was made with {name}={getattr(own, name)}"
                    raise InputError(f"data.{name}", what, f"set it so, or run {MADE_BY} with {name}={value}")
            ours, theirs = facts.alike(), own.alike()
            for name in ours:
                if ours[name] != theirs[name]:
                    raise InputError(where, f"{folders[0]}, {folder} differ in {name}", "give caches alike")
        return list(found.values())

    def require(self, autoencoder: str | None, conditioner: str | None) -> None:
        """Raise `InputError` unless these are the fingerprints of the networks that made the caches.

        `autoencoder` None: it is trained in this run; `conditioner` None: it has no frozen text towers.
        """
        self.setup()
        if autoencoder is None:
            raise InputError("data=cached", "holds no pictures to train an autoencoder on", "use data=shards")
        for facts, where in ((self.facts, "data.shards"), (self.validation_facts, "data.validation_shards")):
            if facts is None:
                continue
            if facts.autoencoder != autoencoder:
                theirs, ours = facts.autoencoder[:12], autoencoder[:12]
                what = f"the cache is of autoencoder {theirs}, and this run has {ours}"
                raise InputError(where, what, f"give that autoencoder, or run {MADE_BY} with this one")
            if self.reads_text and facts.conditioner not in (None, conditioner):
                theirs, ours = (str(name)[:12] for name in (facts.conditioner, conditioner))
                what = f"the cache is of text tower {theirs}, and this run has {ours}"
                raise InputError(where, what, f"data.text=false reads the captions, or run {MADE_BY} anew")

    def folders(self) -> list[Path]:
        """The caches that are trained on."""
        return _folders(self.sets.shards)

    def maker(self, plan: Stream | Mixture | Regroup | Turns | None) -> Maker:
        facts = self.facts if plan is not None else self.validation_facts
        if facts is None:
            return Pictures(self.validation_transform)
        sides = self.sides if isinstance(plan, Turns) else None
        return Moments(facts, self.reads_text, self.seed, plan, sides)


def _folders(shards: str | Sequence[str] | None) -> list[Path]:
    given = [shards] if isinstance(shards, str) else list(shards or ())
    return [Path(folder).expanduser().absolute() for folder in given]


def _is_cache(shards: str | Sequence[str]) -> bool:
    return any((folder / DATASET).is_file() and _made_here(folder) for folder in _folders(shards))


def _made_here(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / DATASET).read_bytes())["made_by"] == MADE_BY)
    except (OSError, ValueError, KeyError, TypeError):
        return False
