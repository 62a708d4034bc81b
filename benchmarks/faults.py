"""Faults injected into running training, in full counts: `python -m benchmarks.faults`, some hours.

The trials are those of the tests, which make few of them: tests marked `fault(row)` ask the fixture `trials`
how many, and tell `counted` what they counted. The table is written after each row, so that a machine that
goes away leaves what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness

RESULTS = harness.ROOT / "benchmarks" / "results" / "faults.json"
ROWS = {  # of the table of faults (docs/cluster.md)
    1: "SIGKILL at random moments",
    2: "death at each stage of a save",
    3: "USR2, USR1, TERM at each moment of a step",
    4: "TERM to one of two ranks",
    5: "a disk that is full",
    6: "a byte flipped, a file cut or gone",
    11: "gradients that are not finite",
    13: "death of one rank",
    14: "a rank that stands still",
    15: "resume with 4, 2, 8, 1 ranks",
    16: "kill and resume, again and again in a pass",
    17: "workers that fork or spawn",
    18: "the same run launched twice",
    19: "weights that change while they are written",
    20: "half an hour with a kill a minute",
    21: "W&B that does not answer",
    22: "a job on Slurm that meets all of them",
}


class Collector:
    """A pytest plugin: notes the tests that are marked `fault(row)`."""

    def __init__(self) -> None:
        self.rows: dict[int, list[str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("fault"):
                self.rows.setdefault(mark.args[0], []).append(item.nodeid)


def collect() -> dict[int, list[str]]:
    """Row -> ids of its tests."""
    collector = Collector()
    quiet = ["--collect-only", "-qqq", "-n", "0", "-m", "fault", "-p", "no:cacheprovider"]
    pytest.main([*quiet, f"--rootdir={harness.ROOT}", str(harness.ROOT / "tests")], plugins=[collector])
    return dict(sorted(collector.rows.items()))


def run(tests: Sequence[str], full: bool) -> dict[str, Any]:
    """Run the tests of one row: how many, how many failed, and what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-c", str(harness.ROOT / "pyproject.toml"), "-q", "-n", "0", "-m", "fault"]
        options += ["--timeout=36000", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        env = {**os.environ, "LDM_TRIALS": "full" if full else "few"}
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *tests, *options]
        done = subprocess.run(command, cwd=harness.ROOT, env=env, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if not report.exists():
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return {**summed(report), "seconds": round(seconds, 1), "trials": env["LDM_TRIALS"]}


def summed(report: Path) -> dict[str, Any]:
    """From pytest's report: tests, failures and why, skips, and the sums of what the tests counted."""
    found: dict[str, Any] = {"tests": 0, "failed": 0, "skipped": 0, "counts": {}, "problems": []}
    for case in ElementTree.parse(report).iter("testcase"):
        found["tests"] += 1
        found["failed"] += case.find("failure") is not None or case.find("error") is not None
        for kind in ("failure", "error"):
            found["problems"] += [f"{case.get('name')}: {one.get('message')}" for one in case.iter(kind)]
        found["skipped"] += case.find("skipped") is not None
        for item in case.iter("property"):
            if item.get("name") == "counted":
                for name, value in json.loads(item.get("value") or "{}").items():
                    found["counts"][name] = found["counts"].get(name, 0) + value
    return found


def table(rows: dict[str, dict[str, Any]]) -> harness.Table:
    cells = []
    for row, found in rows.items():
        counts = ", ".join(f"{value:g} {name}" for name, value in found["counts"].items())
        ran = f"{found['tests'] - found['skipped']} of {found['tests']}"
        minutes = f"{found['seconds'] / 60:.1f}"
        cells.append([row, ROWS[int(row)], found["trials"], ran, str(found["failed"]), counts, minutes])
    columns = ["row", "fault", "trials", "tests run", "failed", "counted", "minutes"]
    return harness.Table("Faults", "Each row's tests, with what they counted.", columns, cells, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", help="rows, with commas: 1,3,11")
    parser.add_argument("--few", action="store_true", help="as few trials as the tests make")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in results/")
    args = parser.parse_args(argv)
    tests = collect()
    rows = harness.chosen(parser, args.only, [str(row) for row in tests])
    about = harness.facts(["torch", "lightning"])
    kept = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    for row in rows:
        kept[row] = run(tests[int(row)], full=not args.few)
        found = {name: kept[name] for name in sorted(kept, key=int)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
        args.json.with_suffix(".md").write_text(harness.markdown(about, [table(found)]))
        print(harness.markdown(about, [table({row: kept[row]})]).splitlines()[-1], flush=True)
        for problem in kept[row]["problems"]:
            print(problem, file=sys.stderr, flush=True)
    return int(any(kept[row]["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
