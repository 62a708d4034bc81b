"""What a checkpoint is, as a table for people; of its tensors nothing is read."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints.files import digest
from ldm.checkpoints.foreign.training import training
from ldm.checkpoints.lazy import FORMATS, LazyTensor
from ldm.checkpoints.model import NETWORKS, Model

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
WIDTH = 110
FIRST = ("format", "family", "weights")  # these facts in this order, then the rest as they come
ELSEWHERE = {"path", "step", "images", "notes", "metadata"}  # facts that have lines of their own
# Ends of the names of what is stored with the parameters, and is none: scales, counts, positions.
MEASURED = ("latent_shift", "latent_scale", ".counts", ".sums", ".updates", ".position_ids")


def describe(model: Model, path: Path, hash: bool = False) -> list[str]:
    """Lines of the table; `hash` reads the weights of a file, or all in a folder, for their sha256."""
    home = Path(model.facts.get("path", path))
    files = _weights(home)
    rows = [("path", f"{home} ({sum(file.stat().st_size for file in files) / 1e9:.2f} GB)")]
    rows += _facts(model)
    rows += [("note", str(note)) for note in model.facts.get("notes", ())]
    rows += [("metadata", f"{key}: {value!s:.150}") for key, value in model.facts.get("metadata", {}).items()]
    for file in files if hash else ():
        sha256 = digest(file)
        rows.append(("sha256", sha256 if file == home else f"{sha256}  {file.relative_to(home)}"))
        if file == home:
            rows.append(("short hash", f"{sha256[:10]} (of AUTOMATIC1111)"))
    return [*_aligned(rows), "", *_networks(model)]


def _weights(home: Path) -> list[Path]:
    if home.is_file():
        return [home]
    return sorted(file for file in home.rglob("*") if file.suffix in WEIGHTS and file.is_file())


def _facts(model: Model) -> Iterator[tuple[str, str]]:
    facts, config = model.facts, model.config
    for key in (*FIRST, *(key for key in facts if key not in FIRST)):
        if key not in ELSEWHERE and facts.get(key) is not None:
            yield key, str(facts[key])
    counts = [
        f"{facts[key]:,} {word}" for key, word in (("step", "steps"), ("images", "images")) if facts.get(key)
    ]
    yield "trained", ", ".join(counts) or "unknown"
    if facts.get("format") == "ldm" and config.get("run_name"):
        yield "trained as", str(config["run_name"])
    yield from (row for row in training(config) if row[1])
    side = (config.get("data") or {}).get("image_size")
    if side:
        yield "image size", f"{side}"
    noise = dict(config.get("noise_scheduler") or {})
    if noise:
        yield "predicts", str(noise.pop("prediction_type", "unknown"))
        yield (
            "noise",
            f"{_class(noise)}, " + ", ".join(f"{k} {v}" for k, v in noise.items() if k != "_target_"),
        )


def _networks(model: Model) -> list[str]:
    """A line for each network, and their sum."""
    table = [("network", "class", "parameters", "averages", "numbers")]
    total = 0
    for name in NETWORKS:
        own, averages = model.of(name), _below(model.ema, name)
        section = model.config.get(name)
        if not own and not section:
            continue
        count = _parameters(own)
        total += count
        held = f"{count:,}" if own else "not stored"
        table.append(
            (name, _class(section), held, f"{_parameters(averages):,}" if averages else "-", _formats(own))
        )
    table.append(("total", "", f"{total:,}", "", ""))
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    lines = []
    for row in table:
        left, right = (f"{row[i]:<{widths[i]}}" for i in (0, 1)), (f"{row[i]:>{widths[i]}}" for i in (2, 3))
        lines.append("  ".join((*left, *right, row[4])).rstrip())
    return lines


def _below(tensors: Mapping[str, LazyTensor], network: str) -> dict[str, LazyTensor]:
    return {name: value for name, value in tensors.items() if name.startswith(f"{network}.")}


def _parameters(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(value.count for name, value in tensors.items() if not name.endswith(MEASURED))


def _formats(tensors: Mapping[str, LazyTensor]) -> str:
    """Number formats of the parameters, what most of them have first."""
    counts: Counter[str] = Counter()
    for name, value in tensors.items():
        if not name.endswith(MEASURED):
            counts[FORMATS[value.format][0]] += value.count
    return ", ".join(name for name, _ in counts.most_common())


def _class(section: Mapping[str, Any] | None) -> str:
    return str((section or {}).get("_target_", "unknown")).rpartition(".")[2]


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    """Labels in a column, what is long folded beside it; a label is not said twice in a row."""
    room = 2 + max(len(label) for label, _ in rows)
    lines, before = [], ""
    for label, text in rows:
        shown = "".join(letter if letter.isprintable() else " " for letter in text)
        for line in textwrap.wrap(shown, WIDTH - room, max_lines=3, placeholder=" ...") or [""]:
            lines.append(f"{'' if label == before else label:<{room}}{line}".rstrip())
            before = label
    return lines
