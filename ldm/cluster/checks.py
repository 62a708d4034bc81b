"""What the doctor says of facts: each check turns numbers from all ranks into lines, and measures nothing.

Facts are those of `probes.facts_of`, one dict a rank. Who is bad is named by host (and rank, where a host
has several), because that is what is taken out of a job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import Any

from ldm.cluster.links import bus_bandwidth

OK, WARN, FAIL = "ok", "warn", "FAIL"
SLOW, TOO_SLOW = 0.75, 0.5  # of the median's speed: worth a word; a run on it would crawl
ERROR = 1e-3  # of a float32 product: TF32's is 5e-4, a broken unit's is anything
CLOCK = 1.0, 60.0  # seconds apart: log lines out of order; heart-beats misjudged
FILES = 4096  # open files below which loaders with many workers fail
SAVING = 300.0  # seconds a checkpoint may take before somebody should know

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """`ok|warn|FAIL what: figure (fix)`."""

    level: str
    what: str
    figure: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4} {self.what}: {self.figure}" + (f" ({self.fix})" if self.fix else "")


def gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def who(facts: Sequence[Facts], chosen: Sequence[int]) -> str:
    """Hosts, with ranks where a host has several: `node2 (rank 3)`."""
    shared = Counter(fact["host"] for fact in facts)
    parts = [
        fact["host"] + (f" (rank {fact['rank']})" if shared[fact["host"]] > 1 else "")
        for fact in facts
        if fact["rank"] in chosen
    ]
    return ", ".join(dict.fromkeys(parts))


# ---- who is there --------------------------------------------------------------------------------------


def answers(world: int, silent: Mapping[int, str], timeout: float) -> Line:
    """`silent`: hosts of the ranks that said nothing in time."""
    if not silent:
        return Line(OK, "ranks", f"{world} of {world} answered")
    names = ", ".join(f"rank {rank} on {host}" for rank, host in sorted(silent.items()))
    fix = f"exclude the host: srun --exclude={','.join(dict.fromkeys(silent.values()))}"
    return Line(FAIL, "ranks", f"no answer within {timeout:g} s from {names}", fix)


def devices(facts: Sequence[Facts], needs: Facts) -> list[Line]:
    """Present, and as many as trainer.devices asks for; `needs`: accelerator, devices, num_nodes, world."""
    found = Counter(device["name"] for fact in facts for device in fact["devices"])
    figure = ", ".join(f"{count} x {name}" for name, count in found.most_common())
    hosts = list(dict.fromkeys(fact["host"] for fact in facts))
    if needs["accelerator"] == "gpu" and any(fact["visible"] == 0 for fact in facts):
        lacking = who(facts, [fact["rank"] for fact in facts if fact["visible"] == 0])
        return [
            Line(FAIL, "devices", f"no GPU on {lacking}", "trainer=cpu runs without; see nvidia-smi there")
        ]
    lines = [Line(OK, "devices", f"{figure} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}")]
    if len(found) > 1:
        rare = found.most_common()[-1][0]
        ranks = [fact["rank"] for fact in facts if any(d["name"] == rare for d in fact["devices"])]
        fix = "ask for one kind: sbatch --constraint or --gres=gpu:KIND:N"
        lines[0] = Line(WARN, "devices", f"{figure}: {rare} on {who(facts, ranks)}", fix)
    wanted, nodes = needs.get("devices"), needs.get("num_nodes") or 1
    if wanted and needs["world"] > 1 and wanted * nodes != needs["world"]:
        what = (
            f"trainer.devices={wanted} x trainer.num_nodes={nodes}, but {needs['world']} ranks were started"
        )
        lines.append(Line(FAIL, "ranks and devices", what, "make them equal"))
    elif wanted and len(facts) == needs["world"] > 1 and nodes != len(hosts):
        what = f"trainer.num_nodes={nodes}, but the ranks are on {len(hosts)} hosts"
        lines.append(Line(FAIL, "ranks and devices", what, f"set trainer.num_nodes={len(hosts)}"))
    elif wanted and needs["accelerator"] == "gpu":
        few = [f for f in facts if f["visible"] < wanted and not (f["visible"] == 1 and needs["world"] > 1)]
        if few:
            what = f"trainer.devices={wanted}, but {few[0]['host']} shows {few[0]['visible']}"
            lines.append(Line(FAIL, "ranks and devices", what, "ask for more (--gpus-per-node), or lower it"))
    return lines


def versions(facts: Sequence[Facts]) -> Line:
    """The same on all ranks, else those that differ from most are named."""
    for name in facts[0]["versions"]:
        found = Counter(fact["versions"][name] for fact in facts)
        if len(found) > 1:
            usual = found.most_common(1)[0][0]
            ranks = [fact["rank"] for fact in facts if fact["versions"][name] != usual]
            other = next(v for v in found if v != usual)
            what = f"{name} {usual}, but {other} on {who(facts, ranks)}"
            return Line(FAIL, "versions", what, "use one environment or image on all hosts")
    return Line(OK, "versions", ", ".join(f"{k} {v}" for k, v in facts[0]["versions"].items() if v != "-"))


# ---- devices at work -----------------------------------------------------------------------------------


def compute(facts: Sequence[Facts]) -> list[Line]:
    """Right, and as fast as the others of its kind: a device that is neither is named."""
    lines = []
    for fact in facts:
        for device in fact["devices"]:
            place = f"{device['name']} {device['index']} on {who(facts, [fact['rank']])}"
            if "broken" in device:
                lines.append(
                    Line(FAIL, "computing", f"{place} fails: {device['broken']}", "exclude the host")
                )
            elif not device["error"] <= ERROR:  # a NaN is no small error
                what = f"{place} computes wrong: a product is off by {device['error']:.1e} of its size"
                lines.append(Line(FAIL, "computing", what, "exclude the host; its device is broken"))
    for name in dict.fromkeys(device["name"] for fact in facts for device in fact["devices"]):
        lines += _speeds(name, facts)
    return lines


def _speeds(name: str, facts: Sequence[Facts]) -> list[Line]:
    rates = [
        (device["rate"], fact["rank"], device["index"])
        for fact in facts
        for device in fact["devices"]
        if device["name"] == name and "rate" in device
    ]
    if not rates:
        return []
    usual = median_high(rate for rate, _, _ in rates)
    slow = [item for item in rates if item[0] < SLOW * usual]
    if not slow:
        ranks = f"{len(rates)} x {name}, " if len(rates) > 1 else f"{name}, "
        spread = (
            f"{min(rates)[0] / usual:.0%} to {max(rates)[0] / usual:.0%} of the median"
            if len(rates) > 1
            else ""
        )
        return [
            Line(OK, "computing", f"{ranks}{usual / 1e12:.3g} TFLOP/s each{', ' + spread if spread else ''}")
        ]
    return [
        Line(
            FAIL if rate < TOO_SLOW * usual else WARN,
            "computing",
            f"{who(facts, [rank])} has a slow {name} {index}: {rate / 1e12:.3g} TFLOP/s, "
            f"{rate / usual:.0%} of the median {usual / 1e12:.3g}",
            "hot, power-capped, used by another job? nvidia-smi -q -d PERFORMANCE; or exclude the host",
        )
        for rate, rank, index in slow
    ]


# ---- between ranks -------------------------------------------------------------------------------------


def bandwidth(ranks: int, size: int, seconds: float, gradients: int = 0) -> Line:
    """An all-reduce of `size` bytes; `gradients`: bytes that a step would reduce."""
    rate = bus_bandwidth(ranks, size, seconds)
    figure = f"{gb(size)} over {ranks} ranks in {1000 * seconds:.3g} ms: {rate / 1e9:.2f} GB/s a bus"
    if gradients:
        needed = 2 * (ranks - 1) / ranks * gradients / rate
        figure += f"; the gradients ({gb(gradients)}) take {needed:.2g} s a step unless hidden behind work"
    return Line(OK, "all-reduce", figure)


def ring(links: Mapping[tuple[int, int], float], size: int, hosts: Sequence[str]) -> list[Line]:
    """Links of a ring by rank, in seconds; a member both of whose links are slow is named by host."""
    if not links:
        return []
    rates = {link: size / seconds for link, seconds in links.items()}
    usual = median_high(rates.values())
    slow = [link for link, rate in rates.items() if rate < TOO_SLOW * usual]
    alone = len({*hosts}) == 1
    name = [f"{host} (rank {rank})" if alone else host for rank, host in enumerate(hosts)]
    figure = (
        f"{len(rates)} in a ring, {min(rates.values()) / 1e9:.2f} to {max(rates.values()) / 1e9:.2f} GB/s"
    )
    if not slow:
        return [Line(OK, "links", figure)]
    count = Counter(rank for link in slow for rank in link)
    bad = [rank for rank, times in count.items() if times == 2]
    fix = "see its cable, its switch port and ibstat; or exclude it"
    if bad:
        own = [rate for link, rate in rates.items() if set(link) & set(bad)]
        what = f"both links of {', '.join(name[rank] for rank in bad)} are slow: {min(own) / 1e9:.2f} GB/s"
        return [Line(FAIL, "links", f"{what}, the median is {usual / 1e9:.2f}", fix)]
    pairs = "; ".join(f"{name[a]} to {name[b]} {rates[a, b] / 1e9:.2f} GB/s" for a, b in slow)
    return [Line(FAIL, "links", f"slow: {pairs}; the median is {usual / 1e9:.2f}", fix)]


def clocks(offsets: Mapping[str, float]) -> Line:
    """Seconds that hosts are ahead of rank 0's."""
    if not offsets:
        return Line(OK, "clocks", "one host")
    host = max(offsets, key=lambda name: abs(offsets[name]))
    worst = abs(offsets[host])
    if worst < CLOCK[0]:
        return Line(OK, "clocks", f"{len(offsets) + 1} hosts within {1000 * worst:.0f} ms")
    level = FAIL if worst >= CLOCK[1] else WARN
    return Line(
        level, "clocks", f"{host} is {offsets[host]:+.1f} s from rank 0's host", "start chronyd or ntpd there"
    )


# ---- files, memory -------------------------------------------------------------------------------------


def shared_folder(
    folder: str, seen: Mapping[int, Facts], facts: Sequence[Facts], timeout: float
) -> list[Line]:
    """What `shared_files.watch` found on each rank but 0."""
    blind = [rank for rank, found in seen.items() if found.get("seen") is None]
    if blind:
        what = f"{who(facts, blind)} does not see what rank 0 writes in {folder} within {timeout:g} s"
        return [Line(FAIL, "shared folder", what, "set run_root= to a file system that all hosts mount")]
    lines = []
    torn = [rank for rank, found in seen.items() if found["torn"]]
    if torn:
        what = f"{who(facts, torn)} saw half a file where one was put in another's place"
        lines.append(Line(WARN, "shared folder", what, "config.yaml and run.json may be read half"))
    free = [rank for rank, found in seen.items() if found["lock"] != "held"]
    if free:
        what = f"a lock of rank 0 does not hold on {who(facts, free)}"
        fix = "start a run once only; mount with locks (Lustre: -o flock)"
        lines.append(Line(WARN, "locks", what, fix))
    if not lines:
        late = max((found["seen"] for found in seen.values()), default=0.0)
        reads = sum(found["reads"] for found in seen.values())
        what = f"{folder} seen after {late:.1f} s, {reads:,} reads of a file being replaced whole, locks hold"
        lines.append(Line(OK, "shared folder", what))
    return lines


def writing(folder: str, rate: float, checkpoint: int) -> Line:
    figure = f"{rate / 1e6:,.0f} MB/s to {folder}"
    if not checkpoint:
        return Line(OK, "writing", figure)
    seconds = checkpoint / rate
    figure += f": a checkpoint of {gb(checkpoint)} takes {seconds:,.0f} s"
    if seconds > SAVING:
        return Line(WARN, "writing", figure, "save less often: callbacks.checkpoint.every=")
    return Line(OK, "writing", figure)


def disk(folder: str, free: int, checkpoint: int, keep: int, there: int = 0) -> Line:
    """Room for the checkpoints that are kept and the one being written; `there`: bytes that the run has."""
    needed = max(checkpoint, checkpoint * (keep + 1) - there)
    if not checkpoint:
        return Line(OK, "disk", f"{gb(free)} free at {folder}")
    more = "" if not there else f", besides {gb(there)} that are there,"
    figure = f"{gb(free)} free at {folder}, {keep} + 1 checkpoints{more} need {gb(needed)}"
    if needed > free:
        return Line(FAIL, "disk", figure, "free some, or set run_root= or callbacks.checkpoint.keep_last=")
    return Line(OK, "disk", figure)


def memory(facts: Sequence[Facts], needs: Facts) -> list[Line]:
    """RAM and shared memory for loaders; `needs`: worker_bytes, batch_bytes of a rank."""
    lines = []
    hosts = Counter(fact["host"] for fact in facts)
    by_host = {fact["host"]: fact for fact in facts}
    for key, what, each, fix in (
        ("memory", "RAM", needs.get("worker_bytes", 0), "lower data.num_workers or data.reading.memory_mb"),
        (
            "shared_memory",
            "/dev/shm",
            needs.get("batch_bytes", 0),
            "docker --shm-size, or lower data.num_workers",
        ),
    ):
        room = {host: fact[key] for host, fact in by_host.items() if fact[key] is not None}
        if not room:
            continue
        short = [host for host, free in room.items() if free < each * hosts[host]]
        least = min(room, key=lambda host: room[host])
        if short:
            host = short[0]
            figure = f"{gb(room[host])} on {host}, its loaders take up to {gb(each * hosts[host])}"
            lines.append(Line(WARN if key == "memory" else FAIL, what, figure, fix))
        else:
            wanted = f", loaders take up to {gb(each * hosts[least])}" if each else ""
            lines.append(Line(OK, what, f"{gb(room[least])} at least{wanted}"))
    return lines


def open_files(facts: Sequence[Facts]) -> Line:
    least = min(facts, key=lambda fact: fact["open_files"] if fact["open_files"] >= 0 else 1 << 62)
    count = least["open_files"]
    if 0 <= count < FILES:
        return Line(WARN, "open files", f"{count:,} on {least['host']}", "ulimit -n 65536 before the start")
    return Line(OK, "open files", "unlimited" if count < 0 else f"{count:,} at least")


def seen_files(
    what: str, paths: int, lacking: Mapping[int, Sequence[str]], facts: Sequence[Facts]
) -> list[Line]:
    """Files that rank 0 has and every host must; `lacking`: what is wrong, by rank."""
    bad = {rank: found for rank, found in lacking.items() if found}
    if bad:
        first = next(iter(bad.values()))[0]
        fix = "put it where all hosts see it"
        return [Line(FAIL, what, f"{who(facts, list(bad))} does not see the same: {first}", fix)]
    return [Line(OK, what, f"{paths} seen by all {len(facts)} ranks")] if paths and len(facts) > 1 else []
