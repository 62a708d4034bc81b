"""Tar shards as a LightningDataModule: indexes, selections, plan and loaders under one configuration.

The state of the data is one integer, samples consumed by the run = completed optimizer steps * G; whoever
counts steps gives it (`resume_at`), so what workers have prefetched never matters.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import lightning
import numpy as np
import torch
import webdataset as wds

from ldm.data import state
from ldm.data.bucket_crop import BucketPictures
from ldm.data.buckets import Regroup
from ldm.data.captions import Captions
from ldm.data.filters import Filter
from ldm.data.health import Budget, Health
from ldm.data.loader import FiniteLoader, Loader, Share
from ldm.data.makers import Maker, Pictures
from ldm.data.mixture import Constants, Mixture, Source, deal
from ldm.data.plan import PLAN_VERSION, Stream, Walk, Window
from ldm.data.range_cache import range_cache
from ldm.data.reader import ReadPolicy, ShardReader
from ldm.data.sets import Sets
from ldm.data.shapes import Buckets, Sorted, report, sort
from ldm.data.stages import Load, Places, Tokenize, Tokens
from ldm.data.transforms import SquareCrop
from ldm.data.turns import Turns
from ldm.errors import InputError
from ldm.types import Batch

PROBED = 16  # samples whose json is looked at for the fields that captions name
log = logging.getLogger(__name__)


class ShardDataModule(lightning.LightningDataModule):
    """Endless training batches in the order of the plan; validation samples, as squares, in index order.

    `mix` gives several data sets instead of `shards`: `mixture.SETTINGS` of each; `buckets` the fields of
    `Buckets`.
    Sizes in pixels, `flip` a probability, `limit` (training samples that the filters keep: the first so many
    of each data set) for debugging, `batch_size` samples a device and micro-batch (None: G / (W k)).
    `tokenize` (captions -> int64 [b l], picklable) may be set later. `validation_shards=None` with
    `validation_filters` given takes the held-out samples out of the training shards.
    """

    def __init__(
        self,
        shards: str | Sequence[str] | None,
        image_size: int,
        global_batch_size: int,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        filters: Sequence[Filter] = (),
        limit: int | None = None,
        columns: Mapping[str, str | None] | None = None,
        crop: str = "center",
        flip: float = 0.0,
        validation_shards: str | Sequence[str] | None = None,
        validation_filters: Sequence[Filter] | None = None,
        validation_batch_size: int | None = None,
        tokenize: Tokenize | None = None,
        index_dir: str | PathLike[str] | None = None,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | None = None,
        memory_cache_mb: int = 0,
        cache_dir: str | PathLike[str] | None = None,
        cache_gb: float = 0.0,
        stage: bool = False,
        allow_pipe: bool = False,
        reading: ReadPolicy | None = None,
        captions: Mapping[str, Any] | None = None,
        rebase: bool = False,
        mix: Sequence[Mapping[str, Any]] | None = None,
        buckets: Mapping[str, Any] | None = None,
        budget: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.0,
        allow_incomplete: bool = False,
    ) -> None:
        super().__init__()
        counts = {"global_batch_size": global_batch_size, "batch_size": batch_size, "limit": limit}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"data.{name}", f"expected at least 1, got {value}")
        self.sets = Sets(
            shards,
            mix,
            filters,
            columns,
            limit,
            validation_shards,
            validation_filters,
            validation_fraction,
            index_dir,
            allow_incomplete,
            staging={"cache_dir": cache_dir, "stage": stage, "allow_pipe": allow_pipe},
        )
        self.buckets = None if buckets is None else Buckets.of(buckets, image_size)
        self.global_batch_size, self.batch_size, self.seed = global_batch_size, batch_size, seed
        self.validation_batch_size = validation_batch_size
        self.transform = SquareCrop(image_size, crop, flip, seed)  # type: ignore[arg-type]
        self.validation_transform = SquareCrop(image_size)
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.multiprocessing_context, self.memory_cache_mb = multiprocessing_context, memory_cache_mb
        self.tokenize, self.rebase = tokenize, rebase
        self.reading = reading or ReadPolicy()
        self.range_cache = range_cache(cache_dir, cache_gb)
        self.captions = Captions(**(captions or {}), seed=seed)
        self.health = Health(Budget(**budget or {}))
        self.start = 0  # samples consumed when the next training loader begins
        self.skip: list[Window] = []  # places of the run that it leaps over
        self.constants: Constants | None = None  # lanes and blocks, frozen with the first state
        self.sources: list[Source] = []
        self.sorted: Sorted | None = None
        self.validation: list[Source] | None = None

    # ---- what there is

    def prepare_data(self) -> None:
        """Build the indexes where they are missing (Lightning calls this on one process a node)."""
        self.setup()
        for source in self.sources if self.captions.fields else ():
            at = np.unique(np.linspace(0, len(source) - 1, PROBED).astype(np.int64))
            raws = ShardReader(source.index, ("json",))(source.selection.rows[at])
            for line in self.captions.warnings([raw.parts["json"] for raw in raws if not raw.reason]):
                log.warning("%s: %s", source.name, line)

    def setup(self, stage: str | None = None) -> None:
        """Load the indexes and select; call it early to have wrong input reported before other work."""
        if self.trainer is not None and not self.sets.validates:
            self.trainer.limit_val_batches = 0  # Lightning warns about an empty list
        if self.sources:
            return
        sources = self.sets.training()
        self.validation = self.sets.held_out(sources)
        if self.buckets is not None:
            base = deal(sources, self.global_batch_size, self.seed, self.constants)
            self.sorted = sort(sources, base.shares if isinstance(base, Mixture) else [1.0], self.buckets)
            if self.buckets.period < 2 * len(self.sorted.shapes):
                what = f"{self.buckets.period} steps are too few for {len(self.sorted.shapes)} buckets"
                raise InputError("data.buckets.period", what, "leave it at 4096")
        self.sources = sources
        self.health.shards = [shard for source in sources for shard in source.index.shards]

    def known_size(self) -> int | None:
        """Samples in an epoch of training, if that is known without reading a shard."""
        if self.sources:
            return sum(map(len, self.sources))
        return self.sets.known_size()

    def plan(self) -> Stream | Mixture | Regroup | Turns:
        """Which sample is played at which place of the run."""
        self.setup()
        base = deal(self.sources, self.global_batch_size, self.seed, self.constants)
        self.constants = base.constants
        if self.sorted is None or self.buckets is None:
            return base
        found, batch = self.sorted, self.global_batch_size
        return Regroup(base, found.numbers, found.final, len(found.shapes), batch, self.buckets.period)

    def maker(self, plan: Stream | Mixture | Regroup | Turns | None) -> Maker:
        """What makes the fields of training samples, dealt by the plan, or of validation samples (None)."""
        if isinstance(plan, Regroup):
            assert self.sorted is not None
            return BucketPictures(plan, self.sorted.shapes, self.transform)
        return Pictures(self.validation_transform if plan is None else self.transform)

    def summary(self) -> list[str]:
        """Lines for the log: what was indexed, what was dropped and why, how it is dealt."""
        plan, lines = self.plan(), []
        base: Any = plan.base if isinstance(plan, Regroup) else plan
        for d, source in enumerate(self.sources):
            lines += [source.index.summary(), *source.selection.table()]
            if len(self.sources) > 1:
                share, block = base.shares[d], base.streams[d].block
                lines.append(f"{source.name}: {share:.2%} of what is played, in blocks of {block}")
        steps = sum(map(len, self.sources)) / self.global_batch_size
        blocks = f"blocks of {base.block}, " if isinstance(base, Stream) else ""
        lines.append(f"{base.lanes:,} lanes, {blocks}{steps:,.1f} steps an epoch")
        if self.sorted is not None and self.buckets is not None:
            lines += report(self.sorted, self.sources, self.buckets, self.global_batch_size)
        count = sum(map(len, self.validation or ()))
        return [*lines, f"validation: {count:,} samples" if self.validation else "no validation"]

    # ---- state

    def resume_at(self, consumed: int) -> None:
        """Let the next training loader begin after so many samples, not counting those in `skip`."""
        self.start = consumed

    def state(self, n: int) -> dict[str, Any]:
        """What a checkpoint stores after n samples: the same on every rank, after `health.agree`."""
        self.plan()
        assert self.constants is not None
        lanes, block = self.constants
        return {
            "form": state.FORM,
            "plan_version": PLAN_VERSION,
            **self._identity(),
            "lanes": lanes,
            "block": block,
            "samples": n,
            "skip": [list(window) for window in self.skip],
            **self.health.state(),
        }

    def _identity(self) -> dict[str, Any]:
        """What the plan is made from."""
        self.setup()
        digests = [source.selection.digest for source in self.sources]
        buckets = None
        if self.sorted is not None and self.buckets is not None:
            enlarge = self.buckets.enlarge
            buckets = {
                "shapes": self.sorted.shapes.tolist(),
                "period": self.buckets.period,
                "enlarge": enlarge,
            }
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "index": digests[0]
            if len(digests) == 1
            else hashlib.sha256("".join(digests).encode()).hexdigest(),
            "mix": None if self.sets.mix is None else [source.weight for source in self.sources],
            "buckets": buckets,
        }

    def check_state(self, stored: Mapping[str, Any]) -> None:
        """Go on with the plan of a checkpoint's `state`; raises `InputError` if that is not this data.

        With `rebase`, other data, seed or batch size begin a new segment with a plan of its own.
        """
        mine = self._identity()
        same = state.check(stored, mine, self.rebase)
        self.constants = (stored["lanes"], stored["block"]) if same else None
        self.skip = [(first, end) for first, end in stored.get("skip", [])] if same else []
        n, batch = int(stored["samples"]), self.global_batch_size
        if not same and n % batch:  # steps of a plan of its own begin at multiples of G
            self.skip = [(n, n + -n % batch)]
        same_shards = stored["index"] == mine["index"] and not self.rebase
        self.health.load(stored, same_shards)

    # ---- loaders

    def stream(
        self,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        accumulate: int = 1,
        num_workers: int | None = None,
    ) -> Loader:
        """The training (micro-)batches of one rank after `start` samples of the run, endlessly."""
        workers = self.num_workers if num_workers is None else num_workers
        plan, share = self.plan(), Share(self.global_batch_size, rank, world_size, accumulate, workers)
        places = Places(share, start, skip=tuple(self.skip))
        maker = self.maker(plan)
        load = self.load(self.sources, maker, self.captions, places, plan)
        local = self.global_batch_size // (world_size * accumulate)
        return Loader(self._pipeline(places, load), **self._options(workers, local))

    def validation_stream(
        self, rank: int = 0, world_size: int = 1, num_workers: int | None = None
    ) -> FiniteLoader:
        """The validation batches of one rank: n counts held-out samples; all ranks get equally many."""
        self.setup()
        if self.validation is None:
            raise InputError(
                "data.validation_shards", "no validation data", "set it, or data.validation_filters"
            )
        sizes = [len(source) for source in self.validation]
        local = self.validation_batch_size or self.batch_size or max(1, self.global_batch_size // world_size)
        workers = self.num_workers if num_workers is None else num_workers
        steps = -(-sum(sizes) // (local * world_size))
        places = Places(Share(local * world_size, rank, world_size, 1, workers), 0, steps)
        maker = self.maker(None)
        load = self.load(self.validation, maker, self.captions.plain(), places, Walk(sizes))
        return FiniteLoader(self._pipeline(places, load), steps, **self._options(workers, local))

    def load(
        self,
        sources: Sequence[Source],
        maker: Maker,
        captions: Captions,
        places: Places,
        plan: Stream | Mixture | Regroup | Turns | Walk,
    ) -> Load:
        """The stage that reads, as the options say."""
        numbered_alike = not isinstance(plan, Walk) or self.sets.validation_shards is None
        reading = self.reading, self.range_cache, self.health.quarantine if numbered_alike else {}
        return Load(sources, maker, captions, places, plan, self.memory_cache_mb, *reading)

    def _pipeline(self, places: Places, load: Load) -> wds.DataPipeline:
        return wds.DataPipeline(places, load, Tokens(self.tokenize) if self.tokenize else None)

    def _options(self, workers: int, local: int) -> dict[str, Any]:
        return {
            "workers": workers,
            "prefetch_factor": self.prefetch_factor or (2 * workers if local < 32 else 8),  # parts of a batch
            "context": self.multiprocessing_context,
            "pin": torch.cuda.is_available(),
        }

    def check_batch(self, world_size: int, accumulate: int) -> None:
        """Raise `InputError` unless G = W * batch_size * k."""
        g, b = self.global_batch_size, self.batch_size
        terms, values = "world_size*batch_size*accumulate", f"{world_size}*{b}*{accumulate}"
        if b is None:
            terms, values = "world_size*accumulate", f"{world_size}*{accumulate}"
        unit = world_size * (b or 1) * accumulate
        where = f"data.global_batch_size={g}"
        if g % unit:
            nearest = ", ".join(str(m) for m in (g // unit * unit, (g // unit + 1) * unit) if m)
            raise InputError(where, f"not divisible by {terms} = {values} = {unit}", f"nearest: {nearest}")
        if b is not None and g != unit:
            fix = f"set data.batch_size={g // (world_size * accumulate)}, or trainer.accumulate_grad_batches="
            raise InputError(where, f"not {terms} = {values} = {unit}", fix + str(g // (world_size * b)))

    def _world(self) -> tuple[int, int, int]:
        trainer = self.trainer
        if trainer is None:
            return 0, 1, 1
        return trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches

    def train_dataloader(self) -> Loader:
        rank, world_size, accumulate = self._world()
        self.check_batch(world_size, accumulate)
        return self.stream(rank, world_size, self.start, accumulate)

    def val_dataloader(self) -> FiniteLoader | list[Any]:
        rank, world_size, _ = self._world()
        return self.validation_stream(rank, world_size) if self.sets.validates else []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch if device.type == "cpu" else batch.to(device, non_blocking=True)
