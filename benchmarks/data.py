"""The data path beside its peers: `python -m benchmarks.data [--only C1,C2,...] [--json FILE]`.

C1 tar members to bytes; C2 JPEGs to uint8 batches of 256 px and tokens; C3 cached latents and tokens;
C8 memory over many samples; C9 resume at sample 1,000,000. Equal work is asserted before anything is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness, peers, samples
from benchmarks.harness import Measured, Race, Table
from ldm.data.blocks import BlockReader, InOrder, Reads
from ldm.data.datamodule import ShardDataModule
from ldm.data.index import Index, build_index
from ldm.data.loader import Loader
from ldm.data.mixture import Source, deal
from ldm.data.reader import Raw, ShardReader
from ldm.data.selection import select

PARTS = ("C1", "C2", "C3", "C8", "C9")
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "webdataset", "litdata", "numpy")
LENGTH = 77  # of the tokens
Contestants = dict[str, Callable[[], Iterator[peers.Fields]]]


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int = 5
    batch: int = 64
    size: int = 256
    sides: tuple[int, int] = samples.SIDES
    distinct: int = 200  # photographs
    per_shard: int = 250  # of the four shards of C2
    tar_samples: int = 8_000
    latents: int = 16_000
    jpegs_timed: int = 512
    memory_samples: int = 50_000
    resume_at: int = 1_000_000
    replayed: int = 10_000

    def small(self) -> Scale:
        """For the test of the benchmark: seconds."""
        return replace(
            self,
            rounds=1,
            batch=8,
            size=32,
            sides=(48, 96),
            distinct=4,
            per_shard=16,
            tar_samples=64,
            latents=64,
            jpegs_timed=32,
            memory_samples=256,
            resume_at=300,
            replayed=100,
        )


class Tokenizer:
    """open_clip's tokenizer of SD's text tower: captions -> int64 [b 77]."""

    def __init__(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        tokens: Tensor = self.tokenizer(list(captions), LENGTH)
        return tokens


class Bytes:
    """A token a byte: next to no work, so that C3 measures the loaders and not a tokenizer."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        cut = [caption.encode()[:LENGTH].ljust(LENGTH, b"\0") for caption in captions]
        rows = np.frombuffer(b"".join(cut), np.uint8).reshape(-1, LENGTH)
        return torch.from_numpy(rows.astype(np.int64))


def loader(module: ShardDataModule, workers: int, start: int = 0) -> Loader:
    """The module's training loader; as many samples are fetched ahead as the peers do."""
    module.prefetch_factor = 2 * workers or None
    module.setup()
    made = module.stream(start=start, num_workers=workers)
    made.pin = False
    return made


def ours(module: ShardDataModule, workers: int) -> Iterator[peers.Fields]:
    for made in loader(module, workers):
        assert float(made.weight.min()) == 1, made.reason
        keys = [key.rpartition("/")[2] for key in made.key]
        images = made.moments if made.image is None else made.image
        assert images is not None
        assert made.tokens is not None
        yield keys, images, made.tokens


def sizes(batches: Iterator[peers.Fields], batch: int, shape: tuple[int, ...]) -> Iterator[int]:
    """How many samples come, with their shapes asserted."""
    for keys, images, tokens in batches:
        assert images.shape == (batch, *shape), images.shape
        assert tokens.shape == (batch, LENGTH), tokens.shape
        yield len(keys)


def coarse(image: Tensor) -> Tensor:
    """4 x 4 means of each channel: peers round sizes and crops to other pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), 4)


def same(contestants: Contestants, count: int, tolerance: float) -> tuple[float, float]:
    """Raise unless all give the same tokens for a sample, and coarse pictures within `tolerance` on average.

    Returns the largest mean difference of coarse pictures, and the mean one of all pixels.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    worst, differences = 0.0, []
    for name, batches in contestants.items():
        seen: set[str] = set()
        for keys, images, tokens in batches():
            for key, image, row in zip(keys, images, tokens, strict=True):
                reference = found.setdefault(key, (image.clone(), row.clone()))
                difference = float((coarse(image) - coarse(reference[0])).abs().mean())
                differences.append(float((image.float() - reference[0].float()).abs().mean()))
                worst = max(worst, difference)
                assert difference <= tolerance, f"{name}: sample {key} differs by {difference:.3g} on average"
                assert torch.equal(row, reference[1]), f"{name}: the tokens of sample {key} differ"
                seen.add(key)
            if len(seen) >= count:
                break
    return worst, float(np.mean(differences))


def raced(
    name: str,
    what: str,
    contestants: Contestants,
    scale: Scale,
    count: int,
    shape: tuple[int, ...],
    goals: dict[str, float],
    notes: list[str],
) -> Race:
    def run(batches: Callable[[], Iterator[peers.Fields]]) -> Callable[[], Measured]:
        warm_up = 6 * scale.batch  # more than is fetched ahead
        return lambda: harness.timed(sizes(batches(), scale.batch, shape), warm_up, count)

    races = {name: run(batches) for name, batches in contestants.items()}
    return harness.race(name, what, races, scale.rounds, goals=goals, notes=notes)


# ---- C1


KINDS = ("image", "caption", "json")


def in_index_order(index: Index, scale: Scale) -> Iterator[list[Raw]]:
    reader = ShardReader(index, KINDS)
    for first in range(0, len(index), scale.batch):
        yield reader(np.arange(first, min(first + scale.batch, len(index))))


def in_plan_order(index: Index, scale: Scale) -> Iterator[list[Raw]]:
    """As a worker reads that makes whole batches."""
    source = Source(index, select(index))
    plan = deal([source], scale.batch, 0, None)
    reads = Reads([source], [ShardReader(index, KINDS)])
    blocks = BlockReader(reads, InOrder(plan, scale.batch), range(scale.batch), 512 << 20)
    for first in range(0, len(index), scale.batch):
        n = np.arange(first, min(first + scale.batch, len(index)))
        at = plan.places(n)
        tickets = blocks(n) if blocks.turn else reads.submit(at, reads.rows(at))
        yield [ticket.take() for ticket in tickets]


def counted(samples_of_bytes: Iterable[int], expected: int) -> Measured:
    """Time over all samples; each item is the bytes of one."""
    begun, cpu, total, number = time.perf_counter(), time.process_time(), 0, 0
    for size in samples_of_bytes:
        assert size
        number, total = number + 1, total + size
    assert number == expected, f"{number} samples, expected {expected}"
    return Measured(number, time.perf_counter() - begun, time.process_time() - cpu)


def tar_read(folder: Path, scale: Scale) -> list[Race]:
    """Bytes of all members of each sample; one process."""
    races = []
    for kilobytes in (8, 60):
        name = f"tar_{scale.tar_samples}_{kilobytes}"
        path = samples.pictures(folder / name, 4, scale.tar_samples // 4, 8, (60, 80), kilobytes << 10)
        shards = samples.urls(path)
        index = build_index(shards, progress=False)

        def mine(batches: Callable[..., Iterator[list[Raw]]], index: Index = index) -> Callable[[], Measured]:
            return lambda: counted((raw.nbytes for b in batches(index, scale) for raw in b), len(index))

        def web(shards: list[str] = shards) -> Measured:
            sizes = (sum(len(s[m]) for m in ("jpg", "txt", "json")) for s in peers.raw(shards))
            return counted(sizes, scale.tar_samples)

        first = [raw.parts for raw in next(in_index_order(index, scale))]
        theirs = list(islice(peers.raw(shards), len(first)))
        for ours, other in zip(first, theirs, strict=True):
            assert [ours[k] for k in KINDS] == [other[m] for m in ("jpg", "txt", "json")]
        contestants: dict[str, Callable[[], Measured]] = {
            "ldm, in the order of the plan": mine(in_plan_order),
            "ldm, in the order of the index": mine(in_index_order),
            "webdataset": web,
        }
        what = (
            f"{scale.tar_samples:,} samples of a JPEG of {kilobytes} KB, txt and json in 4 shards, from the "
            "page cache to bytes in one process. Same bytes, asserted."
        )
        title = f"C1 tar read, {kilobytes} KB"
        races.append(harness.race(title, what, contestants, scale.rounds, goals={"webdataset": 5}))
    return races


# ---- C2


def jpeg_contestants(
    path: Path, packed: Path | None, scale: Scale, workers: int, tokenize: peers.Tokenize
) -> Contestants:
    def mine() -> Iterator[peers.Fields]:
        module = ShardDataModule(str(path), scale.size, scale.batch, tokenize=tokenize)
        return ours(module, workers)

    def web(decoder: Any) -> Callable[[], Iterator[peers.Fields]]:
        return lambda: peers.web(samples.urls(path), scale.size, scale.batch, workers, tokenize, decoder)

    contestants: Contestants = {"ldm": mine}
    if not harness.missing("torchvision"):
        contestants["webdataset + PIL"] = web("pil")
        contestants["webdataset + torchvision decode"] = web(peers.torchvision_jpeg)
    if packed is not None:
        contestants["litdata"] = lambda: peers.lit(packed, scale.size, scale.batch, workers, tokenize)
    return contestants


def jpeg(folder: Path, scale: Scale) -> list[Race]:
    """JPEGs of all sizes to uint8 batches and tokens, with workers and without."""
    name = f"{scale.size}_{4 * scale.per_shard}"
    path = samples.pictures(folder / f"jpeg_{name}", 4, scale.per_shard, scale.distinct, scale.sides)
    tokenize, packed, notes = Tokenizer(), None, []
    for package in ("torchvision", "litdata"):
        if gone := harness.missing(package):
            notes.append(f"{package}'s contestants are left out: {gone} is not installed.")
    if not harness.missing("torchvision", "litdata"):
        packed = peers.pack_for_litdata(samples.urls(path), folder / f"lit_{name}")
    worst, mean = same(jpeg_contestants(path, packed, scale, 0, tokenize), 4 * scale.batch, 768 / scale.size)
    notes.append(
        f"Equal work: same tokens; pictures {mean:.2f} of 255 levels apart on average (peers round sizes and "
        f"crops to other pixels), their 4 x 4 means {worst:.2f} at most."
    )
    goals = {"webdataset + PIL": 1.5, "webdataset + torchvision decode": 1.2, "litdata": 1.3}
    races = []
    for workers in (2, 0):
        where = f"{workers} workers" if workers else "in-process"
        what = (
            f"Photographs of {scale.sides[0]} to {scale.sides[1]} px (log-uniform), JPEG q90, to batches of "
            f"{scale.batch} x 3 x {scale.size} x {scale.size} uint8 and {LENGTH} tokens each, {where}."
        )
        contestants = jpeg_contestants(path, packed, scale, workers, tokenize)
        title, shape = f"C2 JPEG to {scale.size} px, {where}", (3, scale.size, scale.size)
        races.append(raced(title, what, contestants, scale, scale.jpegs_timed, shape, goals, notes))
        notes = []
    return races


# ---- C3


def cached(folder: Path, scale: Scale) -> list[Race]:
    """Moments 8 x 32 x 32 in fp16 and tokens; 2 workers, and in-process."""
    from ldm.data.cached import CachedDataModule, CacheFacts

    def dataset(count: int) -> str:
        facts = CacheFacts(
            autoencoder="0" * 64,
            conditioner=None,
            image_size=256,
            crop="center",
            flip=0.0,
            seed=0,
            variants=1,
            dtype="fp16",
            selection="0" * 64,
            samples=count,
            samples_per_shard=count // 4,
            shapes={"moments": [1, 8, 32, 32]},
            complete=True,
        )
        return facts.text()

    path = samples.latents(folder / f"latents_{scale.latents}", 4, scale.latents // 4, dataset)
    tokenize = Bytes()

    def contestants(workers: int) -> Contestants:
        def mine() -> Iterator[peers.Fields]:
            module = CachedDataModule(str(path), 256, global_batch_size=scale.batch, tokenize=tokenize)
            return ours(module, workers)

        return {
            "ldm": mine,
            "webdataset": lambda: peers.web_latents(samples.urls(path), scale.batch, workers, tokenize),
        }

    same(contestants(0), 4 * scale.batch, 0.0)
    races = []
    for workers in (2, 0):
        where = f"{workers} workers" if workers else "in-process"
        what = (
            f"Cached moments 8 x 32 x 32 in fp16, captions and {LENGTH} tokens (a byte each: no tokenizer's "
            f"work), batches of {scale.batch}, {where}. Same numbers, asserted."
        )
        title, goals = f"C3 cached latents, {where}", {"webdataset": 4.0}
        races.append(
            raced(title, what, contestants(workers), scale, scale.latents // 2, (8, 32, 32), goals, [])
        )
    return races


# ---- C8


def memory_mb() -> tuple[float, float]:
    """MB of this process and its workers, shared pages in proportion: what is not files, and all."""
    own = peak = 0.0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        values = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines[1:]}
        own += values["Pss_Anon"] + values["Pss_Shmem"]
        peak += values["Pss"]
    return own, peak


def memory(folder: Path, scale: Scale) -> list[Table]:
    """Growth over many samples with 2 workers, after the first fifth."""
    path = samples.pictures(folder / "small_pictures", 4, max(scale.memory_samples // 20, 16), 16, (60, 80))
    tokenize = Tokenizer()

    def mine() -> Iterator[peers.Fields]:
        module = ShardDataModule(str(path), 32, scale.batch, tokenize=tokenize)
        return ours(module, 2)

    contestants: Contestants = {"ldm": mine}
    if not harness.missing("torchvision"):
        contestants["webdataset + PIL"] = lambda: peers.web(
            samples.urls(path), 32, scale.batch, 2, tokenize, "pil"
        )
    cells, values = [], {}
    for name, batches in contestants.items():
        done = 0
        seen: list[tuple[float, ...]] = []
        for keys, _, _ in batches():
            done += len(keys)
            if len(seen) < 50 * done // scale.memory_samples:
                seen.append((done, *memory_mb()))
            if done >= scale.memory_samples:
                break
        kept = np.array(seen)[len(seen) // 5 :]
        slope = float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]) * 10_000
        peak = float(kept[:, 2].max())
        values[name] = {"mb_per_10000": slope, "peak_mb": peak, "series": [list(map(float, x)) for x in seen]}
        cells.append([name, f"{slope:+.2f}", f"{peak:.0f}"])
    what = (
        f"{scale.memory_samples:,} samples, 2 workers, pictures of 60 to 80 px to 32: memory of all "
        "processes that is not files, a line fitted after the first fifth. Goal: below 1 MB a 10,000 samples."
    )
    return [Table("C8 memory", what, ["", "MB a 10,000 samples", "peak MB (PSS)"], cells, values)]


# ---- C9


def resume(folder: Path, scale: Scale) -> list[Table]:
    """Time to the first batch at a late sample of the epoch, and that it is the right one."""
    total = scale.resume_at * 11 // 10
    path = samples.many(folder / f"many_{total}", total, min(10_000, max(scale.resume_at // 3, 1)))
    shards = samples.urls(path)

    def fresh() -> ShardDataModule:
        return ShardDataModule(shards, 32, scale.batch, index_dir=folder / "index")

    begun = time.perf_counter()
    fresh().setup()
    indexed = time.perf_counter() - begun

    at = scale.resume_at // scale.batch * scale.batch
    early = iter(loader(fresh(), 0, at - 3 * scale.batch))
    expected = [list(next(early).key) for _ in range(4)][3]
    cells, values = [], {}
    for workers in (0, 2):
        times = []
        for _ in range(scale.rounds):
            begun = time.perf_counter()
            batches = iter(loader(fresh(), workers, at))
            first = next(batches)
            times.append(time.perf_counter() - begun)
            assert list(first.key) == expected, "resume came to other samples"
            del batches
        name = f"ldm, {f'{workers} workers' if workers else 'in-process'}"
        values[name] = times
        cells.append([name, f"{np.median(times):.3f}", ""])

    begun = time.perf_counter()
    for number, _ in enumerate(peers.raw(shards)):
        if number == scale.replayed:
            break
    replay = (time.perf_counter() - begun) * scale.resume_at / scale.replayed
    values["webdataset"] = [replay]
    fastest = float(np.median(values["ldm, 2 workers"]))
    name = f"webdataset, replay of {scale.replayed:,} samples, scaled"
    cells.append([name, f"{replay:.1f}", f"{replay / fastest:.0f}"])
    values["ratio"] = [replay / fastest]
    what = (
        f"A data module is built from the cached index of {total:,} samples and gives its first batch of "
        f"{scale.batch} at sample {at:,}; webdataset, which cannot seek, reads on without decoding (one "
        "process). Goals: below 1 s, and 50 times faster."
    )
    notes = [
        f"The index was loaded or built in {indexed:.1f} s before. The batch is the one that a run comes to "
        "that began three batches earlier."
    ]
    return [Table("C9 resume", what, ["", "s to the first batch", "ours is x times"], cells, values, notes)]


RUN: dict[str, Callable[[Path, Scale], Sequence[Race | Table]]] = {
    "C1": tar_read,
    "C2": jpeg,
    "C3": cached,
    "C8": memory,
    "C9": resume,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--only", help="parts, with commas: C1,C2")
    parser.add_argument("--json", type=Path, help="write results here, and the tables beside it")
    parser.add_argument(
        "--folder", type=Path, help="keep the data sets here (1.2 GB); default: a temporary one"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument(
        "--small", action="store_true", help="seconds instead of minutes; figures mean nothing"
    )
    options = parser.parse_args(arguments)
    scale = Scale().small() if options.small else Scale()
    scale = replace(scale, rounds=options.rounds) if options.rounds else scale
    torch.set_num_threads(1)  # as in a worker
    about = harness.facts(PACKAGES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        results = [
            result
            for part in harness.chosen(parser, options.only, PARTS)
            for result in RUN[part](folder, scale)
        ]
    harness.report(options.json, about, results)


if __name__ == "__main__":
    main()
