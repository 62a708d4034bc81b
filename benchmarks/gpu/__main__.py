"""`python -m benchmarks.gpu --only G1,G2 --json benchmarks/results/gpu.json`; see `PARTS`.

Rows are added to those of the file, part by part, and written after each, so that nothing is lost when the
machine goes; each part takes less than nine minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu import device, parts, step

Rows = Iterator[dict[str, Any]]
PARTS: dict[str, tuple[str, Callable[[], Rows]]] = {
    "G1": (
        "SD 2 at 512 px: batches, then techniques one at a time",
        partial(step.sweep, "sd2", 64, (8, 16, 32, 48)),
    ),
    "G1A": ("SD 1.5 at 512 px", partial(step.sweep, "sd1", 64, (32,))),
    "G2": ("SD 2 at 256 px", partial(step.sweep, "sd2", 32, (64, 128, 192))),
    "G4": ("optimizer, clipping and EMA of 860 M parameters", parts.optimizer),
    "G5": ("group norm with SiLU, bf16, batch 32", parts.group_norms),
    "G5A": ("attention by each kernel, bf16, batch 16", parts.attentions),
    "G6": ("small batches, where the host decides", partial(step.host_bound, "sd2")),
    "G7": ("start: building, and the first step", parts.start),
    "G8": ("the largest batch at 512 px", partial(step.largest, "sd2")),
    "G9": ("moments of pictures", parts.encoder),
    "G11": ("50 guided steps at 512 px", parts.sampling),
    "G13": ("three minutes on end", parts.steady),
}


def table(name: str, rows: list[dict[str, Any]]) -> harness.Table:
    columns = list(
        dict.fromkeys(key for row in rows for key in row if key not in ("losses", "low", "high", "bytes"))
    )
    cells = [[_cell(row.get(key, "")) for key in columns] for row in rows]
    return harness.Table(name, PARTS[name][0], columns, cells, {"rows": rows})


def _cell(value: Any) -> str:
    return harness.number(value) if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", help="parts, with commas: " + ",".join(PARTS))
    parser.add_argument("--json", type=Path, help="add results here, and write the tables beside it")
    args = parser.parse_args(argv)
    about = harness.facts(["torch", "triton", "diffusers"]) | device.facts()
    about["command"] = "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if argv is None else argv)
    kept: dict[str, Any] = {}
    if args.json is not None and args.json.exists():
        kept = json.loads(args.json.read_text())["parts"]
    for name in harness.chosen(parser, args.only, list(PARTS)):
        kept[name] = {"about": about, "rows": []}
        for row in PARTS[name][1]():
            kept[name]["rows"].append(row)
            print(name, json.dumps(row), file=sys.stderr, flush=True)
            write(args.json, about, kept)
        if name in ("G1", "G1A", "G2"):
            step.same_start(kept[name]["rows"])
    print(text(about, kept))
    return 0


def text(about: dict[str, Any], kept: dict[str, Any]) -> str:
    what = f"{about['device']}: {about['matmul_tflops']:.0f} TFLOP/s in large bf16 products, "
    what += f"{about['bandwidth_tb']:.2f} TB/s in copies. MFU is of {device.SHEET / 1e12:.1f} TFLOP/s."
    head, *rest = harness.markdown(about, [table(name, part["rows"]) for name, part in kept.items()]).split(
        "\n## ", 1
    )
    return "\n## ".join([f"{head}\n{what}\n", *rest])


def write(path: Path | None, about: dict[str, Any], kept: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "parts": kept}, indent=1) + "\n")
        path.with_suffix(".md").write_text(text(about, kept))


if __name__ == "__main__":
    sys.exit(main())
