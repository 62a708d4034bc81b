"""Making a cache: pictures in several crops on their way in, shards of arrays on their way out.

The selection, bucket after bucket, is cut into chunks of S samples; chunk i becomes shard i, or nothing: it
is written beside its place, synced, renamed. So any number of processes may take part, die, and start again,
and the bytes are the same. What is computed between the two ends is not known here.

k variants, S samples of a chunk.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from ldm.data.bucket_crop import Assigned, BucketPictures
from ldm.data.cached import DATASET, MADE_BY, CacheFacts, read_facts
from ldm.data.columns import SIZES
from ldm.data.datamodule import ShardDataModule
from ldm.data.index import Index, build_index
from ldm.data.loader import Share, as_is, outlive_signals
from ldm.data.makers import Maker, Part, Pictures
from ldm.data.plan import Ints, Walk
from ldm.data.reader import Raw
from ldm.data.scan import numbers
from ldm.data.selection import Selection
from ldm.data.shapes import CHUNK, Sorted, tally
from ldm.data.stages import Places
from ldm.errors import InputError

DAMAGED = ("not_image", "corrupt_image", "too_large", "corrupt")  # such samples are left out; others stop us
OWN = ("key", "source", *SIZES[:4], "target_size", "crop")


class Variants:
    """Pictures in k keyed crops and flips, and the sample's metadata and caption as they are."""

    def __init__(self, data: ShardDataModule, variants: int) -> None:
        self.makers = [_pictures(data, variants) for _ in range(variants)]
        self.kinds = tuple(dict.fromkeys((*self.makers[0].kinds, "json", "caption")))

    def fields(self, n: Ints) -> Part:
        k = len(self.makers)
        parts = [maker.fields(n * k + v) for v, maker in enumerate(self.makers)]
        return {"variants": parts, "meta": [b""] * len(n), "words": [b""] * len(n)}

    def prepare(self, raw: Raw) -> tuple[Any, int]:
        pixels, size = self.makers[0].prepare(raw)
        return (pixels, raw.parts["json"], raw.parts["caption"]), size

    def finish(self, part: Part, i: int, prepared: Any) -> None:
        pixels, part["meta"][i], part["words"][i] = prepared
        for maker, own in zip(self.makers, part["variants"], strict=True):
            maker.finish(own, i, pixels)


def _pictures(data: ShardDataModule, variants: int) -> Maker:
    if data.sorted is None:
        return Pictures(data.transform)
    assigned = Assigned(data.sorted.numbers[0], data.sorted.final, variants)
    return BucketPictures(assigned, data.sorted.shapes, data.transform)


class Members:
    """Which samples a bucket has, in the order of the selection, without a list of them all."""

    def __init__(self, found: Sorted) -> None:
        self.numbers, self.final = found.numbers[0], found.final
        starts = range(0, len(self.numbers.array), CHUNK)
        counts = [tally(self.final[self.numbers.array[s : s + CHUNK]], len(found.shapes)) for s in starts]
        self.before = np.concatenate([np.zeros((1, len(found.shapes)), np.int64), np.cumsum(counts, 0)])

    def __call__(self, bucket: int, first: int, end: int) -> Ints:
        """Places of the selection that are number `first` until before `end` of the bucket."""
        before = self.before[:, bucket]
        pieces = range(int(np.searchsorted(before, first, "right")) - 1, int(np.searchsorted(before, end)))
        found = [
            np.flatnonzero(self.final[self.numbers.array[i * CHUNK : (i + 1) * CHUNK]] == bucket) + i * CHUNK
            for i in pieces
        ]
        at = int(before[pieces.start])
        return np.concatenate(found)[first - at : end - at]


class Batch(NamedTuple):
    """Neighbours in a shard."""

    chunk: int
    first: int  # number of the first in the shard
    n: Ints  # places of the selection


@dataclass(frozen=True)
class Chunks:
    """Batches, chunk after chunk; each is made by one worker, and is of one chunk."""

    chunks: Sequence[int]
    spans: Ints  # CacheFacts.spans
    batch_size: int
    members: Members | None = None  # None: one bucket has them all

    def __call__(self) -> Iterator[Ints]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for i, batch in enumerate(self.batches()):
            if i % workers == worker:
                yield batch.n

    def batches(self) -> Iterator[Batch]:
        for chunk in self.chunks:
            bucket, first, end = self.spans[chunk].tolist()
            n = np.arange(first, end) if self.members is None else self.members(bucket, first, end)
            for at in range(0, len(n), self.batch_size):
                yield Batch(chunk, at, n[at : at + self.batch_size])

    def __len__(self) -> int:
        """Samples."""
        spans = self.spans[list(self.chunks)]
        return int((spans[:, 2] - spans[:, 1]).sum())


def chosen(data: ShardDataModule) -> tuple[Index, Selection]:
    """What of which index is cached; raises `InputError` where that is not one set."""
    data.setup()
    if len(data.sources) != 1:
        raise InputError("data.mix", "a cache is made of one data set", "run it for each, and mix the caches")
    return data.sources[0].index, data.sources[0].selection


def pictures(data: ShardDataModule, chunks: Chunks, variants: int) -> Iterator[Part]:
    """The parts of the chunks, in order, made by the workers of the datamodule."""
    _, selection = chosen(data)
    maker, places = Variants(data, variants), Places(Share(chunks.batch_size))
    load = data.load(data.sources, maker, data.captions, places, Walk([len(selection)]))
    workers = data.num_workers
    options: dict[str, Any] = {"prefetch_factor": 2, "multiprocessing_context": data.multiprocessing_context}
    yield from DataLoader(
        wds.DataPipeline(chunks, load),
        batch_size=None,
        num_workers=workers,
        collate_fn=as_is,
        worker_init_fn=outlive_signals,
        **(options if workers else {}),
    )


def facts_of(data: ShardDataModule, part: Part, i: int, key: str) -> dict[str, Any]:
    """The json of a sample: what its own json says, and what became of the picture."""
    index, selection = chosen(data)
    row = index.samples[selection.rows[int(part["n"][i])]]
    meta = json.loads(part["meta"][i] or b"{}")
    if "label" in part and part["label"][i] >= 0:
        meta["label"] = int(part["label"][i])
    sizes = {name: int(row[name]) for name in ("width", "height", "original_width", "original_height")}
    target = list(part["variants"][0]["image"].shape[2:])
    crops = [own["crop"][i].tolist() for own in part["variants"]]
    own = {"crop": crops, "key": key, "source": part["key"][i], **sizes, "target_size": target}
    told = numbers(meta)
    for name in index.scores():  # what a table beside the shard says otherwise, or alone
        value = row[name]
        if name != "label" and np.isfinite(value) and (name not in told or np.float32(told[name]) != value):
            meta[name] = float(value)
    return {**own, **{name: value for name, value in meta.items() if name not in OWN}}


class CacheFolder:
    """The folder that a cache is made in."""

    def __init__(self, path: Path, facts: CacheFacts) -> None:
        self.path, self.facts, self.spans = path, facts, facts.spans()
        self.layouts = [facts.layouts(side) for side in facts.sides]
        self.digits = max(4, len(str(facts.samples_per_shard - 1)))

    def claim(self) -> None:
        """Write dataset.json, or find that it says the same; raises `InputError` if it does not."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(str(self.path), "is a file", "give a folder for the cache")
        found = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        if DATASET in found:
            theirs, ours = read_facts(self.path, "OUT").settled(), self.facts.settled()
            differ = [name for name in ours if theirs[name] != ours[name]]
            if differ:
                values = [str(facts[differ[0]])[:12] for facts in (theirs, ours)]
                what = f"{self.path} was begun with {differ[0]} {values[0]}, this command has {values[1]}"
                raise InputError("OUT", what, "restore it, or give a new folder")
            return
        if any(not name.startswith(".") for name in found):
            raise InputError("OUT", f"{self.path} is not empty", f"give a new folder, or one of {MADE_BY}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.put(self.path / DATASET, self.facts.text().encode())

    def put(self, path: Path, data: bytes) -> None:
        """A small file, whole or not there, whoever else writes the same."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def shard(self, chunk: int) -> Path:
        return self.path / self.facts.parts[int(self.spans[chunk, 0])] / f"{chunk:05d}.tar"

    def stats(self, chunk: int) -> Path:
        return self.shard(chunk).with_name(f"{chunk:05d}_stats.json")

    def missing(self, task: int = 0, tasks: int = 1) -> list[int]:
        """Chunks that process `task` of `tasks` has still to make."""
        return [i for i in range(task, len(self.spans), tasks) if not self.shard(i).exists()]

    @contextmanager
    def writing(self, chunk: int) -> Iterator[ChunkWriter]:
        """The shard of a chunk to be filled; it is there when the block ends well.

        Raises `InputError` if another process is at it.
        """
        shard = self.shard(chunk)
        temporary = shard.with_suffix(".tar.tmp")
        shard.parent.mkdir(exist_ok=True)
        with open(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
                busy = shard.exists()  # they were faster, and its name was changed under us
            except BlockingIOError:
                busy = True
            if busy:
                what, fix = "is being written by another process", "give each process its own --task I/N"
                raise InputError(str(temporary), what, fix, every_rank=True)
            file.truncate(0)
            writer = ChunkWriter(self, chunk, wds.TarWriter(file, encoder=False, mtime=0))
            try:
                yield writer
            except BaseException:
                with suppress(OSError):  # a full disk
                    writer.tar.close()
                raise
            writer.tar.close()
            file.flush()
            os.fsync(file.fileno())
            counts = {"success": writer.count, **dict(sorted(writer.left_out.items()))}
            facts = {"count": sum(counts.values()), "successes": writer.count, "status_dict": counts}
            self.put(self.stats(chunk), (json.dumps(facts) + "\n").encode())
            os.replace(temporary, shard)
            _sync(shard.parent)

    def finish(self) -> Counter[str] | None:
        """Index the shards and mark the cache complete, if all are there; every process may call it.

        Returns what was left out, by reason, or None: shards are missing.
        """
        if self.missing():
            return None
        left_out: Counter[str] = Counter()
        for chunk in range(len(self.spans)):
            left_out += json.loads(self.stats(chunk).read_bytes())["status_dict"]
        del left_out["success"]
        for folder in [self.path / part for part in self.facts.parts]:
            for pattern in ("*.tar.tmp", ".*_stats.json.*"):  # what dead processes left
                for path in folder.glob(pattern):
                    path.unlink(missing_ok=True)
            build_index(str(folder), where="OUT")
        self.put(
            self.path / DATASET, replace(self.facts, left_out=dict(left_out), complete=True).text().encode()
        )
        return left_out


@dataclass
class ChunkWriter:
    """Samples into one open shard; their keys are their places, so what is left out moves nothing."""

    folder: CacheFolder
    chunk: int
    tar: Any

    def __post_init__(self) -> None:
        self.count, self.layouts = 0, self.folder.layouts[int(self.folder.spans[self.chunk, 0])]
        self.left_out: Counter[str] = Counter()  # reason -> samples

    def leave_out(self, source: str, reason: str) -> None:
        """Count a damaged sample; raises `InputError` if it is storage that failed, which may pass."""
        if reason not in DAMAGED:
            fix = "the same command goes on from here; or leave that shard out of data.shards"
            raise InputError(source, f"cannot be read ({reason})", fix, every_rank=True)
        self.left_out[reason] += 1

    def write(self, arrays: Mapping[str, NDArray[Any]], caption: bytes, facts: dict[str, Any]) -> None:
        """Append a sample; `facts` are its json, and hold its key."""
        members = {f"{kind}.npy": self.layouts[kind].pack(array) for kind, array in arrays.items()}
        members |= {"txt": caption, "json": json.dumps(facts).encode()}
        self.tar.write({"__key__": facts["key"], **members})
        self.count += 1

    def key(self, inside: int) -> str:
        """Of the shard's sample of that number."""
        return f"{self.chunk:05d}{inside:0{self.folder.digits}d}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
