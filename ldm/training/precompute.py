"""Latents and outputs of frozen text towers, computed once for all epochs and written as shards.

Networks and data are those of a training config, opened as training opens them. In float32 (convolutions on a
GPU in TF32, torch's default): what is stored should be better than what a step in half precision sees.

b batch, k variants, m channels of the moments, h w latent size, l tokens, d width, p pooled width.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.checkpoints.files import write_tensors
from ldm.config import build, compose
from ldm.data.arrays import DTYPES
from ldm.data.cache import CacheFolder, Chunks, ChunkWriter, Members, chosen, facts_of, pictures
from ldm.data.cached import NULL, CacheFacts
from ldm.data.datamodule import ShardDataModule
from ldm.data.makers import Part
from ldm.data.sources import SvgEmojiDataModule
from ldm.errors import InputError
from ldm.training import starting
from ldm.training.assembly import build_stages
from ldm.training.fingerprint import fingerprint, named, null_of, text_towers
from ldm.training.module import TrainingModule, to_unit
from ldm.types import Batch, Conditioning

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheOptions:
    """The flags of `ldm data cache`."""

    variants: int = 1  # crops and flips of each picture
    dtype: str = "fp16"  # fp16 | fp32, on disk
    text: bool = True  # also what frozen text towers give, if the recipe has such
    samples_per_shard: int = 10_000
    batch_size: int = 32  # samples at once
    device: str | None = None  # None: a GPU of this process if there is one
    task: tuple[int, int] = (0, 1)  # which process of how many

    def __post_init__(self) -> None:
        for name in ("variants", "samples_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(flag, f"expected at least 1, got {getattr(self, name)}")
        task, tasks = self.task
        if not 0 <= task < tasks:
            raise InputError(
                f"--task {task}/{tasks}", "no such task", f"give 0/{tasks} to {tasks - 1}/{tasks}"
            )


class Encoders(TrainingModule):
    """The networks whose outputs are kept, where `starting.fill` finds them; there is nothing to train."""

    def __init__(self, autoencoder: Any, towers: Any) -> None:
        super().__init__(torch.optim.SGD, lambda step: 1.0, 0.0, 0)
        self.keep_frozen("autoencoder", autoencoder)
        if towers is not None:
            self.keep_frozen("conditioner", towers)
        self.autoencoder, self.towers = autoencoder, towers

    @torch.no_grad()
    def moments(self, variants: Sequence[Tensor]) -> Tensor:
        """k times uint8 [b 3 H W] -> [b k m h w]."""
        made = [self.autoencoder.moments(to_unit(images.to(self.device), self.dtype)) for images in variants]
        return torch.stack(made, dim=1)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Conditioning:
        """Context [b l d] and its companions."""
        if self.towers is None:
            return Conditioning()
        n = torch.arange(len(captions), device=self.device)
        batch = Batch(n, torch.ones(len(n), device=self.device), caption=list(captions))
        return self.towers(batch)  # type: ignore[no-any-return]


def opened(cfg: Any, text: bool) -> Encoders:
    """The networks of the config with the weights that training starts with. Raises `InputError`."""
    if cfg.get("autoencoder_from") is None and cfg.get("init_from") is None:
        fix = "set it, or init_from, to a checkpoint that holds them"
        raise InputError("autoencoder_from", "nothing brings the weights of the autoencoder", fix)
    sources = starting.opened(cfg, None, cfg.stage)
    bare = starting.building(cfg, None, sources)
    torch.manual_seed(cfg.seed)  # in this order, as training: a tower may ask for random weights
    autoencoder, conditioner = build(bare.autoencoder), build(bare.conditioner)
    conditioner.use_autoencoder(autoencoder)
    towers = text_towers(conditioner)
    frozen = text and towers is not None
    module = Encoders(autoencoder, conditioner if frozen else None)
    starting.fill(module, cfg, None, sources)
    module.towers = towers if frozen else None
    return module.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def cache(out: str | Path, overrides: Sequence[str], options: CacheOptions) -> Iterator[str]:
    """Make this process's part of the cache in `out`; gives lines for the user.

    `overrides` are those of train.py. Whoever finds all shards there completes the cache.
    """
    cfg = compose("train", overrides)
    cfg = build_stages(cfg, list(overrides))[-1]
    if cfg.get("conditioner") is None:
        raise InputError("experiment", "trains no denoiser on latents", "give a recipe of stage 2")
    data: ShardDataModule = build(cfg.data)
    if isinstance(data, SvgEmojiDataModule):
        what = "puts another background behind a picture each time, and a cache holds one"
        raise InputError("data=emoji_svg", what, "cache data=emoji")
    data.setup()
    module = opened(cfg, options.text)
    if module.towers is not None and data.captions.varies:
        what = "texts differ from epoch to epoch, and a cache holds what towers say of one a sample"
        raise InputError("data.captions", what, "pass --no-text, or leave them as they are in the shards")
    folder = CacheFolder(Path(out).expanduser().absolute(), settle(data, module, options))
    folder.claim()
    store_null(folder.path, null_of(module.towers) if module.towers is not None else {})
    task, tasks = options.task
    facts, todo = folder.facts, len(folder.missing(task, tasks))
    yield f"{facts.samples:,} samples in {facts.shards:,} shards; task {task} of {tasks} makes {todo:,}"
    encode(folder, data, module.to(options.device or default_device()), options)
    left_out = folder.finish()
    if left_out is None:
        yield f"{len(folder.missing()):,} shards are left to other tasks"
        return
    if left_out:
        yield "left out: " + ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common())
    yield f"complete: train with data=cached data.shards={out}"


def encode(folder: CacheFolder, data: ShardDataModule, module: Encoders, options: CacheOptions) -> None:
    """Make the shards of this process that are missing."""
    members = None if data.sorted is None else Members(data.sorted)
    chunks = Chunks(folder.missing(*options.task), folder.spans, options.batch_size, members)
    parts = zip(chunks.batches(), pictures(data, chunks, options.variants), strict=True)
    with progress(len(chunks)) as advance:
        for chunk, group in itertools.groupby(parts, lambda pair: pair[0].chunk):
            with folder.writing(chunk) as shard:
                for batch, part in group:
                    write(shard, data, module, part, batch.first)
                    advance(len(part["n"]))


def settle(data: ShardDataModule, module: Encoders, options: CacheOptions) -> CacheFacts:
    """What dataset.json says, from the data, the networks and the flags."""
    size, selection = data.transform.size, chosen(data)[1]
    buckets, found = None, data.sorted
    if found is not None:
        buckets = np.concatenate([found.shapes, found.counts[:, None]], 1).tolist()
        check_sides(found.shapes, module.autoencoder.factor)
    height, width = (size, size) if found is None else found.shapes[0].tolist()
    moments = module.moments([torch.zeros(1, 3, height, width, dtype=torch.uint8)])
    shapes = {kind: list(value.shape[1:]) for kind, value in named(module.text([""])).items()}
    return CacheFacts(
        autoencoder=fingerprint(module.autoencoder),
        conditioner=None if module.towers is None else fingerprint(module.towers),
        image_size=size,
        crop=data.transform.crop,
        flip=data.transform.flip,
        seed=data.seed,
        variants=options.variants,
        dtype=options.dtype,
        selection=selection.digest,
        samples=len(selection),
        samples_per_shard=options.samples_per_shard,
        shapes={"moments": [options.variants, *moments.shape[2:]], **shapes},
        buckets=buckets,
    )


def check_sides(shapes: NDArray[np.int64], factor: int) -> None:
    """Raise `InputError` unless the autoencoder halves these sides without a rest."""
    for side in np.unique(shapes[shapes % factor > 0]).tolist():
        fix = f"take a multiple of {factor}"
        raise InputError("data.buckets.step", f"the autoencoder divides by {factor}, a side is {side}", fix)


def write(shard: ChunkWriter, data: ShardDataModule, module: Encoders, part: Part, first: int) -> None:
    """Compute a part of a chunk and append it to its shard, as numbers `first` and on."""
    given = module.text(part["caption"])
    arrays = {"moments": module.moments([own["image"] for own in part["variants"]]), **named(given)}
    stored = {kind: as_stored(value, shard.folder.facts.dtype) for kind, value in arrays.items()}
    for i in range(len(part["n"])):
        if part["weight"][i] == 0:
            shard.leave_out(part["key"][i], part["reason"][i])
            continue
        own = {kind: value[i] for kind, value in stored.items()}
        if not all(np.isfinite(value).all() for value in own.values()):
            what = f"has numbers that {shard.folder.facts.dtype} cannot hold"
            raise InputError(part["key"][i], what, "pass --dtype fp32", every_rank=True)
        caption = part["caption"][i].encode() if module.towers is not None else part["words"][i]
        shard.write(own, caption, facts_of(data, part, i, shard.key(first + i)))


def as_stored(value: Tensor, dtype: str) -> NDArray[Any]:
    array: NDArray[Any] = value.cpu().numpy()
    if array.dtype == np.bool_:
        return array
    with np.errstate(over="ignore"):  # it becomes infinite, and is found
        return array.astype(DTYPES[dtype])


def store_null(folder: Path, null: Mapping[str, Tensor]) -> None:
    """Keep the null conditioning beside the shards."""
    if null and not (folder / NULL).is_file():
        temporary = folder / f".{NULL}.{uuid.uuid4().hex}"
        write_tensors(temporary, null)
        os.replace(temporary, folder / NULL)


def default_device() -> str:
    """One GPU for each process of a node, in turn."""
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return f"cuda:{local % torch.cuda.device_count()}"


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar on the terminal; the value is called with how many more samples are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("encoding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
