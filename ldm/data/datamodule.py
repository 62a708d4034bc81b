"""Tar shards as a LightningDataModule: index, selection, plan and loaders under one configuration.

The state of the data is one integer, n samples consumed by the run = completed optimizer steps * G; whoever
counts steps gives it (`resume_at`), so what workers have prefetched never matters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import lightning
import torch
import webdataset as wds

from ldm.data.filters import Filter, Selection, select
from ldm.data.index import Index, build_index, cached_index
from ldm.data.loader import FiniteLoader, Load, Loader, Places, Share, Tokenize, Tokens
from ldm.data.plan import PLAN_VERSION, Stream, plan_constants
from ldm.data.transforms import SquareCrop
from ldm.errors import InputError
from ldm.types import Batch

HEADERS = 3 * 512  # bytes of a sample's tar headers
log = logging.getLogger(__name__)


class ShardDataModule(lightning.LightningDataModule):
    """Endless training batches in the order of the plan; validation samples in index order.

    Sizes in pixels, `flip` a probability, `limit` (training samples that the filters keep: the first so many)
    for debugging, `batch_size` samples a device and micro-batch (None: G / (W k)).
    `tokenize` (captions -> int64 [b l], picklable) may be set later. `validation_shards=None` with
    `validation_filters` given takes the held-out samples out of the training shards.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
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
        rebase: bool = False,
    ) -> None:
        super().__init__()
        counts = {"global_batch_size": global_batch_size, "batch_size": batch_size, "limit": limit}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"data.{name}", f"expected at least 1, got {value}")
        self.shards, self.validation_shards, self.index_dir = shards, validation_shards, index_dir
        self.filters, self.limit, self.columns = list(filters), limit, columns
        self.validation_filters = self.filters if validation_filters is None else list(validation_filters)
        self.validates = validation_shards is not None or validation_filters is not None
        self.global_batch_size, self.batch_size, self.seed = global_batch_size, batch_size, seed
        self.validation_batch_size = validation_batch_size
        self.transform = SquareCrop(image_size, crop, flip, seed)  # type: ignore[arg-type]
        self.validation_transform = SquareCrop(image_size)
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.multiprocessing_context, self.memory_cache_mb = multiprocessing_context, memory_cache_mb
        self.tokenize, self.rebase = tokenize, rebase
        self.start = 0
        self.constants: tuple[int, int] | None = None  # lanes and block, frozen with the first state
        self.index: Index | None = None
        self.selection: Selection | None = None
        self.validation: tuple[Index, Selection] | None = None

    # ---- what there is

    def prepare_data(self) -> None:
        """Build the indexes where they are missing (Lightning calls this on one process a node)."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the indexes and select; call it early to have wrong input reported before other work."""
        if self.trainer is not None and not self.validates:
            self.trainer.limit_val_batches = 0  # Lightning warns about an empty list
        if self.selection is not None:
            return
        self.index = self._index(self.shards, "data.shards")
        selection = select(self.index, self.filters, limit=self.limit)
        if self.validates:
            index = self.index
            if self.validation_shards is not None:
                index = self._index(self.validation_shards, "data.validation_shards")
            self.validation = index, select(index, self.validation_filters, "data.validation_filters")
        self.selection = selection

    def known_size(self) -> int | None:
        """Samples in an epoch of training, if that is known without reading a shard."""
        if self.selection is not None:
            return len(self.selection)
        index = cached_index(self.shards, self.index_dir, self.columns) if self.shards else None
        return None if index is None else len(select(index, self.filters, limit=self.limit))

    def _index(self, shards: str | Sequence[str], where: str) -> Index:
        return build_index(shards, self.index_dir, names=self.columns, where=where)

    def _ready(self) -> tuple[Index, Selection]:
        self.setup()
        assert self.index is not None
        assert self.selection is not None
        return self.index, self.selection

    def plan(self) -> Stream:
        """n -> (source, epoch, shard, index) over the selection."""
        index, selection = self._ready()
        if self.constants is None:
            sizes = ("image_size", "caption_size", "json_size")
            mean_bytes = HEADERS + sum(float(index.samples[name][selection.rows].mean()) for name in sizes)
            self.constants = plan_constants(len(selection), mean_bytes, self.global_batch_size)
        return Stream(selection.counts, *self.constants, self.seed)

    def summary(self) -> list[str]:
        """Lines for the log: what was indexed, what was dropped and why, how it is dealt."""
        index, selection = self._ready()
        plan = self.plan()
        steps = len(selection) / self.global_batch_size
        dealt = f"{plan.lanes:,} lanes, blocks of {plan.block}, {steps:,.1f} steps an epoch"
        held_out = f"validation: {len(self.validation[1]):,} samples" if self.validation else "no validation"
        return [index.summary(), *selection.table(), dealt, held_out]

    # ---- state

    def resume_at(self, n: int) -> None:
        """Let the next training loader begin at place n of the run."""
        self.start = n

    def state(self, n: int) -> dict[str, Any]:
        """What a checkpoint stores after n samples; the same on every rank."""
        plan = self.plan()
        return {
            "plan_version": PLAN_VERSION,
            "seed": self.seed,
            "lanes": plan.lanes,
            "block": plan.block,
            "global_batch_size": self.global_batch_size,
            "index": self._ready()[1].digest,
            "samples": n,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of a checkpoint's `state`; raises `InputError` if that is not this data.

        With `rebase`, other data, seed or batch size begin a new segment with a plan of its own.
        """
        if state["plan_version"] > PLAN_VERSION:
            what = f"data plan_version {state['plan_version']} is newer than this program ({PLAN_VERSION})"
            raise InputError("resume", what, "update ldm")
        mine = {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "index": self._ready()[1].digest,
        }
        differ = [name for name, value in mine.items() if state[name] != value]
        if state["plan_version"] < PLAN_VERSION:
            differ.append("plan_version")
        if not differ:
            self.constants = state["lanes"], state["block"]
            return
        theirs = ", ".join(f"{name} {str(state[name])[:12]}" for name in differ)
        ours = ", ".join(str(mine.get(name, PLAN_VERSION))[:12] for name in differ)
        if not self.rebase:
            fix = "restore them, or pass data.rebase=true to start a new pass (samples may repeat)"
            raise InputError("data", f"checkpoint has {theirs}; now {ours}", fix)
        self.constants = None
        log.warning("data.rebase: %s became %s; samples of the current epoch may repeat", theirs, ours)

    # ---- loaders

    def stream(
        self,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        accumulate: int = 1,
        num_workers: int | None = None,
    ) -> Loader:
        """The training (micro-)batches of one rank from place `start` of the run, endlessly."""
        index, selection = self._ready()
        workers = self.num_workers if num_workers is None else num_workers
        plan, share = self.plan(), Share(self.global_batch_size, rank, world_size, accumulate, workers)
        places = Places(share, start)
        load = Load(index, selection.rows, self.transform, places, plan, self.memory_cache_mb)
        local = self.global_batch_size // (world_size * accumulate)
        return Loader(self._pipeline(places, load), **self._options(workers, local))

    def validation_stream(
        self, rank: int = 0, world_size: int = 1, num_workers: int | None = None
    ) -> FiniteLoader:
        """The validation batches of one rank: n counts held-out samples; all ranks get equally many."""
        self._ready()
        if self.validation is None:
            raise InputError(
                "data.validation_shards", "no validation data", "set it, or data.validation_filters"
            )
        index, selection = self.validation
        local = self.validation_batch_size or self.batch_size or max(1, self.global_batch_size // world_size)
        workers = self.num_workers if num_workers is None else num_workers
        steps = -(-len(selection) // (local * world_size))
        places = Places(Share(local * world_size, rank, world_size, 1, workers), 0, steps)
        load = Load(index, selection.rows, self.validation_transform, places, None, self.memory_cache_mb)
        return FiniteLoader(self._pipeline(places, load), steps, **self._options(workers, local))

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
        return (
            (0, 1, 1)
            if trainer is None
            else (
                trainer.global_rank,
                trainer.world_size,
                trainer.accumulate_grad_batches,
            )
        )

    def train_dataloader(self) -> Loader:
        rank, world_size, accumulate = self._world()
        self.check_batch(world_size, accumulate)
        return self.stream(rank, world_size, self.start, accumulate)

    def val_dataloader(self) -> FiniteLoader | list[Any]:
        rank, world_size, _ = self._world()
        self._ready()
        return self.validation_stream(rank, world_size) if self.validates else []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)
