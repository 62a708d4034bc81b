"""Fair races: contestants take turns, each round in another order; medians, spread, CPU time, the machine.

Wall time on a shared machine says little alone, so the ratio to a peer is the median of the ratios within
rounds, and CPU time (of this process and its workers) is given beside it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """One run of a contestant."""

    count: int  # samples, steps: whatever the race counts
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.count / self.seconds


@dataclass
class Race:
    """What one race gave. `ours` is the contestant that the others are compared with."""

    name: str
    what: str  # the work, in words
    unit: str
    ours: str
    runs: dict[str, list[Measured]]
    goals: dict[str, float] = field(default_factory=dict)  # peer -> ratio that is hoped for
    notes: list[str] = field(default_factory=list)

    def ratio(self, peer: str, cpu: bool = False) -> float:
        """How many times the peer's rate ours is: the median over rounds."""
        pairs = zip(self.runs[self.ours], self.runs[peer], strict=True)
        if cpu:
            return statistics.median(
                b.cpu_seconds / b.count / max(a.cpu_seconds / a.count, 1e-9) for a, b in pairs
            )
        return statistics.median(a.rate / b.rate for a, b in pairs)

    def rows(self) -> Iterator[list[str]]:
        """Contestant, rate, quartiles, CPU a sample, ratio, ratio of CPU time, goal."""
        for name, runs in self.runs.items():
            rates = sorted(run.rate for run in runs)
            low, high = rates[len(rates) // 4], rates[-1 - len(rates) // 4]
            cpu = statistics.median(run.cpu_seconds / run.count for run in runs)
            row = [name, number(statistics.median(rates)), f"{number(low)} .. {number(high)}"]
            row += [f"{number(cpu * 1e6)} us"]
            if name == self.ours:
                yield [*row, "", "", ""]
            else:
                goal = f">= {self.goals[name]:g}" if name in self.goals else ""
                yield [*row, f"{self.ratio(name):.2f}", f"{self.ratio(name, cpu=True):.2f}", goal]


@dataclass
class Table:
    """Results that are no race: a heading, columns, rows."""

    name: str
    what: str
    columns: list[str]
    cells: list[list[str]]
    values: dict[str, Any]  # the same as numbers
    notes: list[str] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits, or all of a large number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def race(
    name: str,
    what: str,
    contestants: Mapping[str, Callable[[], Measured]],
    rounds: int,
    unit: str = "samples",
    goals: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Race:
    """Run the contestants `rounds` times in turn; the first is ours."""
    names = list(contestants)
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for i in range(rounds):
        for k in range(len(names)):
            turn = names[(i + k) % len(names)]
            runs[turn].append(contestants[turn]())
            print(f"{name} {turn}: {number(runs[turn][-1].rate)} {unit}/s", file=sys.stderr, flush=True)
    return Race(name, what, unit, names[0], runs, dict(goals or {}), list(notes))


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that it has now."""
    own = time.process_time()
    tick = os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended, or no Linux
            continue
        own += (int(fields[11]) + int(fields[12])) / tick
    return own


def timed(batches: Iterable[int], warm_up: int, count: int) -> Measured:
    """Time until at least `count` samples came, after the first `warm_up`; `batches` gives sizes."""
    iterator, done = iter(batches), 0
    while done < warm_up:
        done += next(iterator)
    done, begun, cpu = 0, time.perf_counter(), cpu_seconds()
    while done < count:
        size = next(iterator, None)
        if size is None:
            raise RuntimeError(f"the stream ended after {done} of {count} samples")
        done += size
    return Measured(done, time.perf_counter() - begun, cpu_seconds() - cpu)


def missing(*modules: str) -> str | None:
    """The first of these packages that is not here."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            return module
    return None


def facts(packages: Sequence[str]) -> dict[str, Any]:
    """What ran where: words about the machine, no names."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return {
        "command": "python -m " + " ".join(["benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {model}",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def commit() -> str:
    """The commit that is measured, with a plus if files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+" if dirty.stdout.strip() else "")


def markdown(about: Mapping[str, Any], results: Sequence[Race | Table]) -> str:
    """The report that people read."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"`{about['command']}`",
        "",
        f"{about['date']}, commit {about['commit']}; {about['machine']}, load {about['load']} when it began;"
        f" Python {about['python']}, {versions}.",
    ]
    for result in results:
        lines += ["", f"## {result.name}", "", result.what, ""]
        if isinstance(result, Race):
            columns = ["", f"{result.unit}/s", "quartiles", f"CPU a {result.unit[:-1]}"]
            columns += ["ours is x times", "in CPU time", "goal"]
            cells: Iterable[list[str]] = result.rows()
        else:
            columns, cells = result.columns, result.cells
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
        lines += [f"\n{note}" for note in result.notes]
    return "\n".join(lines) + "\n"


def added(race: Race, base: str, what: str) -> Table:
    """Microseconds that each adds to a turn of `base`: the median over rounds, and the quartiles."""
    cells, values = [], {}
    for name, runs in race.runs.items():
        if name == base:
            continue
        row, values[name] = [name], {}
        for kind in ("cpu_seconds", "seconds"):
            pairs = zip(runs, race.runs[base], strict=True)
            found = sorted(1e6 * (getattr(a, kind) - getattr(b, kind)) / a.count for a, b in pairs)
            low, high = found[len(found) // 4], found[-1 - len(found) // 4]
            values[name][kind] = statistics.median(found)
            row.append(f"{values[name][kind]:.0f} ({low:.0f} .. {high:.0f})")
        cells.append(row)
    return Table("", what, ["added to a step", "CPU, us (quartiles)", "wall, us (quartiles)"], cells, values)


def report(path: Path | None, about: Mapping[str, Any], results: Sequence[Race | Table]) -> None:
    """Print the tables; with a path also write JSON there and the tables beside it (.md)."""
    store(path, about, results)
    print(markdown(about, results))


def store(path: Path | None, about: Mapping[str, Any], results: Sequence[Race | Table]) -> None:
    """Write JSON to `path`, if there is one, and the tables beside it (.md)."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {**about, "results": [asdict(result) for result in results]}
        path.write_text(json.dumps(values, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(about, results))


def chosen(parser: argparse.ArgumentParser, only: str | None, parts: Sequence[str]) -> list[str]:
    """The parts that --only names, all without it."""
    names = parts if only is None else [name.strip().upper() for name in only.split(",")]
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"--only: no part '{unknown[0]}'; there are {', '.join(parts)}")
    return list(names)
