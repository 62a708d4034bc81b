"""Which differences between two configs make another run, and which only say where and how fast it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = "(absent)"  # value of a key that one of two configs does not have

MAY_CHANGE_ON_RESUME = (  # dotted prefixes: what decides where and how fast, never what is learned
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",  # the plan fixes the global batch, whoever computes it
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "autoencoder_from",  # another place for the same network: its content is compared
    "conditioner_from",
    "data.shards",  # likewise: the digest of the samples is compared
    "data.mix",
    "data.allow_incomplete",
    "data.validation_shards",
    "data.folder",
    "data.index_dir",
    "data.num_workers",
    "data.batch_size",
    "data.prefetch_factor",
    "data.memory_cache_mb",
    "data.multiprocessing_context",
    "data.validation_batch_size",
    "data.cache_dir",
    "data.cache_gb",
    "data.reading",
    "data.stage",
    "data.allow_pipe",
    "data.rebase",
    "data.budget",
    "backbone.gradient_checkpointing",
    "optimizer.fused",
    "module.discriminator_optimizer.fused",
    "deterministic",
    "speed",
    "summary",
    "logger",
    "callbacks",
    "sampler",
    "sampling",
    "report",
    "stages",
    "run_dir",
    "run_name",
    "run_root",
    "resume",
    "init_from",
    "required",
)


def is_measured(config: Mapping[str, Any]) -> bool:
    """Whether the config is a benchmark's: of such a run nothing is kept that another config would spoil."""
    return (config.get("callbacks") or {}).get("benchmark") is not None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of all that differs and may not change between a run and its resumption."""
    if is_measured(old) or is_measured(new):
        return []
    a, b = (dict(_flat(values)) for values in (old, new))
    found = []
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key, ABSENT), b.get(key, ABSENT)
        if left != right and not any(f"{key}.".startswith(f"{p}.") for p in MAY_CHANGE_ON_RESUME):
            found.append((key, left, right))
    return found


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
