"""What `ldm plan` prints, and writes for programs. GB are 1000 MB; times say their unit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.cluster.hardware import GPUS
from ldm.cluster.planning import SCALES, Forecast, Options, Stage, forecast
from ldm.cluster.published import Prediction, predictions, sensitivity
from ldm.errors import InputError

BAR = 0.15  # error of a held-out row that we want to stay within


def lines(
    stage: Stage, options: Options, found: Forecast, source: str, scales: Sequence[Forecast]
) -> list[str]:
    """One stage: what it asks for, the step, memory, money, failures, and a table of other sizes."""
    load, gpu, batch = stage.load, options.device, found.batch
    parts = ", ".join(f"{name} {value:,.3g}" for name, value in load.tflop.items())
    ms = ", ".join(f"{name} {1e3 * value:,.1f}" for name, value in vars(found.step).items() if value)
    accumulate = f" {batch.accumulate} times" if batch.accumulate > 1 else ""
    configured = stage.cfg["trainer"]["accumulate_grad_batches"]
    differs = "" if batch.accumulate == configured else f" (the config says {configured})"
    speed, node = found.images_per_second, found.images_per_second / found.gpus * options.per_node
    pictures = stage.steps * stage.global_batch_size
    fails = found.reliability
    chosen = int(stage.cfg["callbacks"]["checkpoint"]["every"])
    seconds, stays = found.step.seconds, load.stays(found.gpus) / 1e9
    kept, most = fails.goodput(chosen * seconds), load.fits(gpu.memory, found.gpus)
    return [
        f"{stage.name}: {pictures:,} pictures, {stage.steps:,} steps of {stage.global_batch_size:,}, "
        f"on {found.gpus:,} {gpu.name}",
        f"work        {load.work.flops / 1e12:,.3g} TFLOP a picture ({parts}), "
        f"{load.work.parameters:,} parameters trained",
        f"rate        {found.rate / 1e12:,.0f} TFLOP/s a GPU, {found.rate / gpu.flops:.0%} of peak: {source}",
        f"step        {batch.pictures:,.0f} pictures a GPU{accumulate}, {1e3 * seconds:,.0f} ms: {ms}",
        f"            trainer.accumulate_grad_batches={batch.accumulate}{differs}",
        f"speed       {speed:,.0f} pictures/s, {speed / found.gpus:,.1f} a GPU, "
        f"{speed / found.gpus * load.work.flops / gpu.flops:.0%} of peak",
        f"memory      {found.memory / 1e9:,.1f} of {gpu.memory / 1e9:,.1f} GB: {stays:,.1f} stay, "
        f"{(load.each + load.block) / 1e9:,.3f} a picture; at most {most:,} fit",
        f"data        {node:,.0f} pictures/s and {node * load.picture_bytes / 1e6:,.0f} MB/s a node",
        f"checkpoint  {load.checkpoint / 1e9:,.1f} GB, {fails.save:,.1f} s; best every {found.every:,} steps "
        f"({found.every * seconds / 60:,.0f} min, Young/Daly); as configured {chosen:,}: goodput {kept:.1%}",
        f"failures    one in {fails.between / 3600:,.0f} h, {found.failures:,.1f} expected; "
        f"{fails.restart:,.0f} s to the next step; goodput {found.goodput:.1%}",
        f"cost        {found.hours:,.1f} h, {found.hours * found.gpus:,.0f} GPU-hours, ${found.dollars:,.0f} "
        f"at ${options.dollars:g}",
        "",
        *table(scales, stage.global_batch_size),
    ]


def table(scales: Sequence[Forecast], global_batch_size: int) -> list[str]:
    """The stage from 8 to 4,096 GPUs; * where the global batch is not the recipe's."""
    rows = [["GPUs", "a GPU", "pictures/s", "each", "goodput", "interval", "failures", "hours", "dollars"]]
    for each in scales:
        other = "" if each.global_batch_size == global_batch_size else "*"
        times = f"{each.batch.accumulate} x " if each.batch.accumulate > 1 else ""
        minutes = each.every * each.step.seconds / 60
        rows.append(
            [
                f"{each.gpus:,}{other}",
                f"{times}{each.batch.pictures:,.0f}",
                f"{each.images_per_second:,.0f}",
                f"{each.images_per_second / each.gpus:,.1f}",
                f"{each.goodput:.1%}",
                f"{minutes:,.0f} min",
                f"{each.failures:,.1f}",
                f"{each.hours:,.1f}",
                f"{each.dollars:,.0f}",
            ]
        )
    told = aligned(rows)
    grown = [each.global_batch_size for each in scales if each.global_batch_size != global_batch_size]
    note = f"* with a global batch of {', '.join(f'{size:,}' for size in dict.fromkeys(grown))}"
    return [*told, *([note] if grown else [])]


def scales(stage: Stage, options: Options, rate: float) -> list[Forecast]:
    return [forecast(stage, options, gpus, rate, grown=True) for gpus in SCALES]


def aligned(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Columns of equal width, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def errors(found: Sequence[Prediction] | None = None) -> list[str]:
    """Every published row with its prediction and signed error."""
    found = predictions() if found is None else found
    rows = [["table", "GPUs", "", "a GPU", "published", "predicted", "error", ""]]
    for one in found:
        row, held = one.row, one.held_out
        times = f"{row.accumulate} x " if row.accumulate > 1 else ""
        note = "over 15 %" if held and abs(one.error) > BAR else ""
        told = [f"{row.images_per_second:,.0f}", f"{one.predicted:,.0f}"]
        told.append(f"{one.error:+.1%}" if held else "calibrates")
        rows.append(
            [one.table.name, f"{row.gpus:,}", GPUS[row.gpu].name, f"{times}{row.pictures}", *told, note]
        )
    held_out = [one for one in found if one.held_out]
    within = sum(abs(one.error) <= BAR for one in held_out)
    moved = [f"{name} {less} / {more}" for name, (less, more) in sensitivity(BAR).items()]
    return [
        *aligned(rows, 1),
        f"{within} of {len(held_out)} held-out rows within {100 * BAR:.0f} %; speeds in pictures/s",
        f"with an assumed constant halved / doubled: {', '.join(moved)}",
    ]


def as_dict(stage: Stage, options: Options, found: Sequence[Forecast], source: str) -> dict[str, Any]:
    """The stage's numbers, the planned size first; seconds, bytes, dollars."""
    return {
        "stage": stage.name,
        "options": asdict(options),
        "calibration": source,
        "work": {**asdict(stage.load.work), "tflop": dict(stage.load.tflop)},
        "bytes": {**stage.load.static, "checkpoint": stage.load.checkpoint, "picture": stage.load.each},
        "most_pictures": stage.load.fits(options.device.memory, found[0].gpus),
        "forecasts": [asdict(each) | {"step_seconds": each.step.seconds} for each in found],
    }


def write_json(path: str, stages: Sequence[dict[str, Any]]) -> str:
    checked = [
        {
            "table": one.table.name,
            "source": one.table.source,
            **asdict(one.row),
            "predicted": one.predicted,
            "held_out": one.held_out,
            "error": one.error,
        }
        for one in predictions()
    ]
    text = json.dumps({"stages": list(stages), "published": checked}, indent=1, allow_nan=False) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            "--json", f"cannot write {path} ({error.strerror or error})", "give another FILE"
        ) from None
    return f"written to {path}"
