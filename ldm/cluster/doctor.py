"""Look at the machines before the first step: all ranks take part, rank 0 judges and speaks.

Ranks talk through a key-value store with a time limit on every key, so that one that never comes, or stops
half-way, is named instead of waited for. Collectives come last, and only among ranks that came so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldm.cluster import checks, links, probes, shared_files
from ldm.cluster.checks import FAIL, Line
from ldm.cluster.needs import Needs, needs_of
from ldm.cluster.place import Place
from ldm.errors import InputError

PATIENCE = 600.0  # seconds that other ranks wait for rank 0, which reads the config first
MEETING = 120.0  # seconds, at least, until rank 0 must be there at all

Words = dict[str, Any]


class Talk:
    """JSON under keys that all ranks see; on one process alone nobody else is there to hear."""

    def __init__(self, place: Place, timeout: float) -> None:
        self.place, self.timeout = place, timeout
        self.store: Any = dist.HashStore()
        if place.world > 1:
            first, patience = place.rank == 0 and not place.agent, timedelta(seconds=max(timeout, MEETING))
            where = place.address, place.port
            try:
                found = dist.TCPStore(*where, None, first, timeout=patience, wait_for_workers=False)
            except RuntimeError as error:  # of torch.distributed: DistError
                what, fix = (
                    "rank 0 does not answer there",
                    f"exclude the host: srun --exclude={place.address}",
                )
                if first:
                    what, fix = "rank 0 cannot listen there, the port is taken", "set MASTER_PORT to another"
                raise InputError(f"{place.address}:{place.port}", what, fix, every_rank=True) from error
            self.store = dist.PrefixStore("ldm-doctor", found)

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> Any:
        """Raises TimeoutError if nobody told it in time, or the store is gone."""
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except RuntimeError as error:  # torch's own kinds of errors, by version
            raise TimeoutError(key) from error

    def gather(self, key: str, ranks: Sequence[int], seconds: float) -> tuple[dict[int, Any], list[int]]:
        """What ranks told under `key/RANK` within `seconds` for all together, and who told nothing."""
        end, found, silent = time.monotonic() + seconds, {}, []
        for rank in ranks:
            try:
                found[rank] = self.hear(f"{key}/{rank}", end - time.monotonic())
            except TimeoutError:
                silent.append(rank)
        return found, silent


def examine(place: Place, overrides: Sequence[str], size: int, timeout: float) -> Iterator[Line]:
    """Lines on rank 0, nothing on others; `size` bytes for messages, `timeout` seconds for each answer.

    Raises InputError on rank 0 for a config that no machine could run.
    """
    talk = Talk(place, timeout)
    talk.tell(f"hello/{place.rank}", place.host)
    if place.rank:
        with contextlib.suppress(TimeoutError):  # rank 0 is gone, and it is the one that reports
            _follow(talk, size)
        return
    try:
        needs = needs_of(overrides, place.world)
    except BaseException:
        talk.tell("needs", None)
        raise
    talk.tell("needs", needs.told())
    yield from _lead(talk, needs, size)
    talk.tell("bye", True)
    if place.world > 1:
        talk.gather("bye", range(1, place.world), 2.0)  # the store ends with this process


# ---- rank 0 --------------------------------------------------------------------------------------------


def _lead(talk: Talk, needs: Needs, size: int) -> Iterator[Line]:
    place, told = talk.place, needs.told()
    own = probes.facts_of(0, place.host, devices_of(place, told))
    found, silent = talk.gather("facts", range(1, place.world), talk.timeout)
    facts = [own, *found.values()]
    present = [fact["rank"] for fact in facts]
    talk.tell("present", present)
    yield checks.answers(place.world, _hosts_of(talk, silent), talk.timeout)
    yield from checks.devices(facts, told)
    yield checks.versions(facts)
    yield from checks.compute(facts)
    if len(present) > 1:
        yield _clocks(talk, facts)
    yield from _files(talk, needs, facts)
    yield from needs.lines
    for what, key, count in (
        ("weights", "weights", len(needs.weights)),
        ("shards", "shards", len(needs.shards)),
    ):
        lacking = {fact["rank"]: fact.get(key, []) for fact in facts[1:]}
        yield from checks.seen_files(f"{what} everywhere", count, lacking, facts)
    yield from checks.memory(facts, told)
    yield checks.open_files(facts)
    if len(present) > 1:
        yield from _network(talk, needs, present, facts, size)


def _hosts_of(talk: Talk, ranks: Sequence[int]) -> dict[int, str]:
    known, _ = talk.gather("hello", range(talk.place.world), 0.0) if ranks else ({}, [])
    return {rank: talk.place.host_of(rank, known) for rank in ranks}


def _clocks(talk: Talk, facts: Sequence[Words]) -> Line:
    """One rank of each host says its time between two of rank 0's: half of the round trip is the error."""
    offsets = {}
    for fact in facts[1:]:
        if fact["host"] == facts[0]["host"] or fact["host"] in offsets:
            continue
        before = time.time()
        talk.tell(f"turn/{fact['rank']}", before)
        with contextlib.suppress(TimeoutError):
            theirs = talk.hear(f"time/{fact['rank']}", talk.timeout)
            offsets[fact["host"]] = theirs - (before + time.time()) / 2
    for fact in facts[1:]:
        talk.tell(f"turn/{fact['rank']}", 0)
    return checks.clocks(offsets)


def _files(talk: Talk, needs: Needs, facts: Sequence[Words]) -> Iterator[Line]:
    """The folder of runs: one for all, writable, fast, with room."""
    root, name = Path(needs.run_root).absolute(), f".ldm-doctor-{uuid.uuid4().hex[:12]}"
    others = [fact["rank"] for fact in facts[1:]]
    try:
        with shared_files.token(root, name) as path:
            talk.tell("token", str(path))
            if others:
                shared_files.replace_for(path, 3 * shared_files.WATCHED)
                seen, late = talk.gather("token", others, talk.timeout + 2 * shared_files.WATCHED)
                seen |= {rank: {"seen": None} for rank in late}
                yield from checks.shared_folder(str(root), seen, facts, talk.timeout)
            rate = shared_files.write_rate(root, name, needs.checkpoint_bytes or shared_files.WRITTEN // 4)
            free = shutil.disk_usage(root).free
        yield checks.writing(str(root), rate, needs.checkpoint_bytes)
        kept = sum(file.stat().st_size for file in Path(needs.run_dir).glob("**/checkpoints/step-*/*"))
        yield checks.disk(str(root), free, needs.checkpoint_bytes, needs.keep_last, kept)
    except OSError as error:
        talk.tell("token", None)
        what = f"{root} cannot be written ({error.strerror})"
        yield Line(FAIL, "shared folder", what, "set run_root= to a folder of yours")


def _network(
    talk: Talk, needs: Needs, present: list[int], facts: Sequence[Words], size: int
) -> Iterator[Line]:
    """All-reduce and ring; who does not come back from them is named."""
    own = _measured(talk, needs.told(), present, size)
    found, silent = talk.gather("links", present[1:], talk.timeout)
    failed = {rank: words["error"] for rank, words in {0: own, **found}.items() if "error" in words}
    if silent or failed:
        for rank in silent:
            yield Line(
                FAIL, "all-reduce", f"{checks.who(facts, [rank])} did not come back", "exclude the host"
            )
        for rank, error in failed.items():
            if rank or not silent:
                what = f"{checks.who(facts, [rank])}: {error}"
                yield Line(FAIL, "all-reduce", what, "see NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME")
        return
    results = [own, *found.values()]
    slowest = max(words["all_reduce"] for words in results)
    yield checks.bandwidth(len(present), size, slowest, needs.gradient_bytes)
    pairs = {tuple(map(int, k.split("-"))): v for words in results for k, v in words["ring"].items()}
    hosts = [fact["host"] for fact in facts]
    yield from checks.ring(pairs, size, hosts)  # type: ignore[arg-type]


# ---- the others ----------------------------------------------------------------------------------------


def _follow(talk: Talk, size: int) -> None:
    rank = talk.place.rank
    told = talk.hear("needs", PATIENCE)
    if told is None:
        return
    facts = probes.facts_of(rank, talk.place.host, devices_of(talk.place, told))
    facts["weights"] = probes.missing_files(told["weights"])
    facts["shards"] = probes.wrong_shards(told["shards"])
    talk.tell(f"facts/{rank}", facts)
    present = talk.hear("present", PATIENCE)
    if rank in present:
        if talk.hear(f"turn/{rank}", PATIENCE):
            talk.tell(f"time/{rank}", time.time())
        token = talk.hear("token", PATIENCE)
        if token is not None:
            talk.tell(f"token/{rank}", shared_files.watch(Path(token), talk.timeout))
        talk.tell(f"links/{rank}", _measured(talk, told, present, size))
    talk.hear("bye", PATIENCE)
    talk.tell(f"bye/{rank}", True)


# ---- all -----------------------------------------------------------------------------------------------


def devices_of(place: Place, told: Mapping[str, Any]) -> list[torch.device]:
    """Those that this rank looks at: its own of several ranks, else all that the config takes."""
    count = torch.cuda.device_count() if told["accelerator"] != "cpu" else 0
    if not count:
        return [torch.device("cpu")]
    if place.world > 1:
        return [torch.device("cuda", place.local_rank if place.local_rank < count else 0)]
    return [torch.device("cuda", i) for i in range(min(count, told["devices"] or count))]


def _measured(talk: Talk, told: Mapping[str, Any], present: list[int], size: int) -> Words:
    """All-reduce and ring of this rank, in seconds, or the error that ended them."""
    (device,), me = devices_of(talk.place, told), present.index(talk.place.rank)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a timeout raises, and does not end the process
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        talk.tell(f"ready/{me}", True)
        _, late = talk.gather("ready", range(len(present)), PATIENCE if me else talk.timeout + 10)
        if late:
            return {"error": f"waited for rank {present[late[0]]}"}
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", talk.store),
            rank=me,
            world_size=len(present),
            timeout=timedelta(seconds=talk.timeout),
        )
        hosts = [str(talk.hear(f"hello/{rank}", talk.timeout)) for rank in present]
        seconds = links.all_reduce_seconds(size, device)
        return {"all_reduce": seconds, "ring": links.ring_seconds(size, device, links.members(hosts))}
    except (RuntimeError, TimeoutError, InputError) as error:
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
