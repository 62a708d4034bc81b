"""Which process this is, and of how many: as torchrun or srun says it; alone otherwise."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

PORTS = 20000, 12000  # the first, and how many (systems hand out 32768 and up): a job's own by its number


@dataclass(frozen=True)
class Place:
    """A rank, and where rank 0 is met; `hosts` of all ranks where the launcher tells them, else empty."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    host: str = ""
    address: str = "127.0.0.1"
    port: int = 0
    agent: bool = False  # torchrun keeps a store at the port already
    hosts: tuple[str, ...] = ()

    def host_of(self, rank: int, known: Mapping[int, str]) -> str:
        """Of a rank that may never have said it: from the launcher, or from its neighbours on the node."""
        if rank in known:
            return known[rank]
        if self.hosts:
            return self.hosts[rank]
        node = rank // self.local_world
        same = sorted({host for other, host in known.items() if other // self.local_world == node})
        return same[0] if same else "an unknown host"


def place_of(environment: Mapping[str, str]) -> Place:
    """Raises a KeyError where a launcher leaves out what it always gives."""
    found, host = environment, socket.gethostname()
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= found.keys():
        world = int(found["WORLD_SIZE"])
        return Place(
            int(found["RANK"]),
            world,
            int(found.get("LOCAL_RANK", "0")),
            int(found.get("LOCAL_WORLD_SIZE", str(world))),
            host,
            found["MASTER_ADDR"],
            int(found["MASTER_PORT"]),
            found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in found:
        nodes = hostnames(found.get("SLURM_STEP_NODELIST", found.get("SLURM_NODELIST", "")))
        tasks = tasks_per_node(found.get("SLURM_STEP_TASKS_PER_NODE", ""))
        hosts = tuple(name for name, count in zip(nodes, tasks, strict=False) for _ in range(count))
        rank, world = int(found["SLURM_PROCID"]), int(found["SLURM_STEP_NUM_TASKS"])
        first, many = PORTS
        port = int(found.get("MASTER_PORT", first + int(found.get("SLURM_JOB_ID", "0")) % many))
        return Place(
            rank,
            world,
            int(found.get("SLURM_LOCALID", "0")),
            max(tasks, default=world),
            host,
            found.get("MASTER_ADDR") or (nodes[0] if nodes else host),
            port,
            hosts=hosts if len(hosts) == world else (),
        )
    return Place(host=host)


def hostnames(text: str) -> list[str]:
    """Slurm's short form in full: node[01-03,7],x -> node01 node02 node03 node7 x."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not ranges:
            names.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            low, _, high = part.partition("-")
            numbers = range(int(low), int(high or low) + 1)
            names += [f"{prefix}{number:0{len(low)}d}{suffix}" for number in numbers]
    return names


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form in full: 8(x2),4 -> 8 8 4."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
