"""What a config asks of the machines, found out on rank 0 before anything is trained or fetched.

Networks are built on the meta device; checkpoints are opened, not read; of shards the index alone is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.cluster.checks import FAIL, OK, WARN, Line
from ldm.errors import InputError

WORKER = 400e6  # bytes of RAM that a worker takes before it reads: its imports
STATED = 16  # shards whose sizes all hosts compare with rank 0's


@dataclass
class Needs:
    """Of the greediest stage; without a config only the machines are looked at."""

    accelerator: str = "auto"
    devices: int | None = None
    num_nodes: int = 1
    world: int = 1
    run_root: str = "runs"
    run_dir: str = ""
    keep_last: int = 0
    checkpoint_bytes: int = 0
    gradient_bytes: int = 0
    worker_bytes: int = 0  # RAM of a rank's workers
    batch_bytes: int = 0  # shared memory of a rank's batches in waiting
    weights: list[str] = field(default_factory=list)  # files and folders that every host must see
    shards: list[tuple[str, int]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)  # said already, of weights and shards

    def told(self) -> dict[str, Any]:
        """What the other ranks are to know."""
        return {k: v for k, v in asdict(self).items() if k != "lines"}


def needs_of(overrides: Sequence[str], world: int) -> Needs:
    """Raises InputError for a config that no machine could run."""
    if not overrides:
        return Needs(world=world)
    from ldm.config import compose, plain

    cfg = compose("train", list(overrides))  # before the imports that take seconds: most mistakes are here
    from ldm.training.assembly import build_stages

    found = Needs(world=world, run_root=str(cfg.run_root), run_dir=str(cfg.run_dir))
    stages = [plain(stage) for stage in build_stages(cfg, list(overrides))]
    for stage in stages:
        _add_stage(found, stage)
    return found


def _add_stage(found: Needs, cfg: Mapping[str, Any]) -> None:
    from ldm.training.assembly import build_module, checkpoint_bytes
    from ldm.training.summary import without_weights

    trainer = cfg["trainer"]
    found.accelerator = str(trainer.get("accelerator", "auto"))
    devices = trainer.get("devices")
    count = len(devices) if isinstance(devices, (list, tuple)) else devices
    found.devices = count if isinstance(count, int) and count > 0 else None  # -1, auto: all there are
    found.num_nodes = int(trainer.get("num_nodes") or 1)
    module = build_module(without_weights(cfg), device="meta")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    found.checkpoint_bytes = max(found.checkpoint_bytes, checkpoint_bytes(module))
    found.gradient_bytes = max(found.gradient_bytes, 4 * trained)
    found.keep_last = max(found.keep_last, int(cfg["callbacks"]["checkpoint"].get("keep_last", 3)))
    found.lines += list(_weights(found, cfg))
    found.lines += list(_data(found, cfg))


# ---- weights -------------------------------------------------------------------------------------------


def _weights(found: Needs, cfg: Mapping[str, Any]) -> Iterator[Line]:
    """The checkpoints that a stage starts from can be opened; weights by a tag are here, or named."""
    from ldm.training import starting

    options = [key for key in ("resume", "init_from", "autoencoder_from", "conditioner_from") if cfg.get(key)]
    if (Path(found.run_dir) / cfg["stage"] / "checkpoints").is_dir():
        options = [key for key in options if Path(str(cfg[key])).exists()]  # the run has its own by now
    earlier = [key for key in options if _inside(str(cfg[key]), found.run_dir)]
    for key in earlier:
        yield Line(OK, "weights", f"{key}={cfg[key]} is made by an earlier stage of this run")
    given = {key: str(cfg[key]) for key in options if key not in earlier}
    missing = [key for key, path in given.items() if not os.path.exists(path)]
    for key in missing:
        yield Line(
            FAIL, "weights", f"{key}={given[key]}: no such file or folder", "give a checkpoint or a run"
        )
    if not missing:
        chosen = {**cfg, **dict.fromkeys(earlier)}
        try:
            starting.opened(chosen, None, str(cfg["stage"]))
            found.weights += given.values()
            for key, path in given.items():
                yield Line(OK, "weights", f"{key}={path}")
        except InputError as error:
            yield Line(FAIL, "weights", str(error))
    brought = "conditioner_from" in given or "init_from" in given
    for place, model, tag in _tags(cfg):
        files = tag_file(model, tag)
        if files is not None:
            found.weights += files
            yield Line(OK, "weights", f"{place}={tag} is in {', '.join(files)}")
        elif not (brought and place.startswith("conditioner")):
            what = f"{place}={tag} is not on this machine and will be fetched by the first start"
            yield Line(WARN, "weights", what, "fetch it once where the nodes see it, or give a file")


def _inside(path: str, folder: str) -> bool:
    return bool(folder) and os.path.abspath(path).startswith(os.path.abspath(folder) + os.sep)


def _tags(node: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, model, tag or file) of what names weights anywhere in a config."""
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        place = f"{path}.{key}" if path else str(key)
        if key in ("pretrained", "weights") and isinstance(value, str) and value != "random" and path:
            yield place, str(node.get("model", "")), value
        yield from _tags(value, place)


def tag_file(model: str, tag: str) -> list[str] | None:
    """Where the weights of a tag lie on this machine; None if they would be fetched."""
    if tag == "download":
        from ldm.evaluation.perceptual import cached_files

        files = [str(path) for path in cached_files()]
    else:
        files = [os.path.abspath(part) for part in tag.split(",")]
        if model and not os.path.exists(files[0]):
            from ldm.conditioning.frozen import cached_weights

            files = [cached_weights(model, tag) or ""]
    return files if all(os.path.exists(file) for file in files) else None


# ---- data ----------------------------------------------------------------------------------------------


def _data(found: Needs, cfg: Mapping[str, Any]) -> Iterator[Line]:
    """Shards and samples against readers; nothing is read but indexes that are there."""
    from ldm.config import build
    from ldm.data.storage import is_remote

    section, accumulate = cfg["data"], int(cfg["trainer"].get("accumulate_grad_batches") or 1)
    world = found.world if found.world > 1 else (found.devices or 1) * found.num_nodes
    try:
        datamodule = build(section)
        datamodule.check_batch(world, accumulate)
        samples = datamodule.known_size()
        if samples is None or section.get("stage"):
            what = "not indexed yet: the first start does it" if samples is None else f"{samples:,} samples"
            line = (
                Line(WARN, "shards", what, "ldm data index SHARDS does it before")
                if samples is None
                else None
            )
            yield line or Line(OK, "shards", f"{what}, copied to each node before the first step")
        else:
            datamodule.setup()
            yield _dealt(datamodule, world, section)
            files = [
                (path, int(size))
                for source in datamodule.sources
                for path, size in zip(source.index.shards, source.index.sizes, strict=True)
                if not is_remote(path) and not path.startswith("pipe:")
            ]
            found.shards += files[:: max(1, len(files) // STATED)][:STATED]
    except InputError as error:
        yield Line(FAIL, "data", str(error))
        return
    workers = int(section.get("num_workers") or 0)
    local = section["global_batch_size"] // (world * accumulate)
    if workers > local > 0:
        what = f"data.num_workers={workers}, but a device has {local} samples a batch"
        yield Line(
            WARN, "workers", f"{what}: {workers - local} would be idle", f"set data.num_workers={local}"
        )
    memory_mb = int((section.get("reading") or {}).get("memory_mb", 0))
    found.worker_bytes = max(found.worker_bytes, int(workers * (WORKER + 1e6 * memory_mb)))
    if workers:
        side, ahead = (
            int(section.get("image_size") or 0),
            datamodule._options(workers, local)["prefetch_factor"],
        )
        found.batch_bytes = max(found.batch_bytes, ahead * local * 3 * side * side)


def _dealt(datamodule: Any, world: int, section: Mapping[str, Any]) -> Line:
    """How the samples are dealt: to lanes, each of which one worker reads."""
    plan = datamodule.plan()
    base = getattr(plan, "base", plan)
    lanes = getattr(base, "lanes", 0)
    shards = sum(len(source.index.shards) for source in datamodule.sources)
    samples = sum(map(len, datamodule.sources))
    readers = world * max(1, int(section.get("num_workers") or 0))
    figure = f"{samples:,} samples in {shards:,} shards, {lanes:,} lanes for {readers:,} readers"
    batch = section["global_batch_size"]
    if samples < batch:
        fix = "lower data.global_batch_size, or loosen the filters"
        return Line(WARN, "shards", f"{figure}; a step of {batch:,} plays samples more than once", fix)
    if lanes and lanes < readers:
        fix = f"lower data.num_workers, {readers - lanes} readers would be idle"
        return Line(WARN, "shards", figure, fix)
    return Line(OK, "shards", f"{figure}; {samples / batch:,.1f} steps an epoch")
