"""The status of a run as lines for a reader, and as a document for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ldm.cluster.status import RunStatus, StageStatus

SHOWN_FAILURES = 5  # the newest


def table(status: RunStatus, now: float) -> list[str]:
    """Lines `what   figures`; what is not known is left out."""
    rows = [(status.name, _state(status, now)), ("where", _where(status))]
    done = [stage for stage in status.stages if stage.result is not None]
    rows += [(stage.name or "result", _result(stage, status.name)) for stage in done]
    stage = status.stage
    if stage is not None and status.state != "finished":
        if stage.name:
            several = len(status.planned) > 1 and stage.name in status.planned
            place = f" ({status.planned.index(stage.name) + 1} of {len(status.planned)})" if several else ""
            rows.append(("stage", stage.name + place))
        rows += [("step", _step(stage, status.state)), ("speed", _speed(stage)), ("loss", _losses(stage))]
    if stage is not None:
        rows.append(("checkpoint", _checkpoint(stage, now)))
    rows += [("restarts", str(status.restarts)), ("failures", _failures(status))]
    for event in status.failures[-SHOWN_FAILURES:]:
        rows.append(("", _event(event)))
    rows.append(("next", _next(status)))
    width = max(11, *(len(name) for name, _ in rows))
    return [f"{name:{width}} {text}" for name, text in rows if text]


def document(status: RunStatus, now: float) -> str:
    """As JSON: the same facts, times in seconds since 1970; what is not finite is a string."""
    facts = {**asdict(status), "asked": now, "next": _next(status)}
    return json.dumps(_finite(facts), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- words ---------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """About how long, in two units at most: 42 s, 3 min, 2 h 05 min, 3 days 4 h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _state(status: RunStatus, now: float) -> str:
    state = status.state
    if state == "stopped":
        good = status.stage.good if status.stage is not None else None
        step = status.stops[-1].get("step", 0) if status.stops else 0
        state += " by a signal, " + ("saved" if good is not None and good.step >= step else "not saved")
    if status.since is not None:
        state += f" since {_date(status.since)} ({duration(now - status.since)})"
    if status.state in ("running", "hung") and status.seen is not None and now - status.seen > 60:
        state += f"; no sign of life for {duration(now - status.seen)}"
    return state


def _where(status: RunStatus) -> str:
    alive = status.state in ("running", "hung")
    words = [status.host] if status.host else []
    words += [f"pid {status.pid}"] if status.pid and alive else []
    words += [f"job {status.job}"] if status.job else []
    return ", ".join([*words, *([status.devices] if status.devices else [])])


def _result(stage: StageStatus, run: str) -> str:
    """The line of run.json less the name that it begins with."""
    return " ".join((stage.result or "").split()).removeprefix(stage.name or run).strip()


def _step(stage: StageStatus, state: str) -> str:
    text = f"{stage.step:,}"
    if stage.max_steps:
        text += f" of {stage.max_steps:,} ({stage.step / stage.max_steps:.1%})"
    if state == "running" and stage.hours_left is not None:
        text += f", {duration(3600 * stage.hours_left)} left"
    return text


def _speed(stage: StageStatus) -> str:
    shown = {
        "perf/images_per_sec": "{:,.1f} images/s",
        "perf/images_per_sec_per_gpu": "{:,.1f} a device",
        "perf/mfu": "MFU {:.1%}",
        "perf/data_wait_percent": "data wait {:.0f} %",
        "perf/slowest_rank_ratio": "slowest rank {:.2f} of the fastest",
        "perf/memory_gb": "{:.1f} GB",
    }
    words = [text.format(stage.row[name]) for name, text in shown.items() if name in stage.row]
    return ", ".join(words) + (f" (at step {stage.row_step:,})" if words else "")


def _losses(stage: StageStatus) -> str:
    shown = {
        "train/loss": "{:.4f}",
        "validation/loss": "validation {:.4f}",
        "validation/psnr": "PSNR {:.1f} dB",
        "train/lr": "lr {:.2g}",
    }
    return ", ".join(text.format(stage.row[name]) for name, text in shown.items() if name in stage.row)


def _checkpoint(stage: StageStatus, now: float) -> str:
    good, bad = stage.good, [one for one in stage.checkpoints if one.problem]
    if good is None:
        text = "none yet"
    else:
        text = f"step {good.step:,}, {duration(now - good.time)} old, {_bytes(good.bytes)}"
        older = sum(not one.problem for one in stage.checkpoints) - 1
        text += f"; {older} older" if older else ""
    for one in bad:
        text += f"; step {one.step:,} is damaged ({one.problem})"
    return text


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _failures(status: RunStatus) -> str:
    if not status.failures:
        return "none recorded"
    kinds = [str(event.get("kind")) for event in status.failures]
    counts = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    more = f"; the last {SHOWN_FAILURES}:" if len(kinds) > SHOWN_FAILURES else ""
    return counts + more


def _event(event: Mapping[str, Any]) -> str:
    step = event.get("step")
    at = f" at step {step:,}" if isinstance(step, int) else ""
    return (
        f"{event.get('time', '?')}  {event.get('kind')}{at}: {' '.join(str(event.get('what', '')).split())}"
    )


def _next(status: RunStatus) -> str:
    stage = status.stage
    good = stage.good if stage is not None else None
    again = "the same train.py command " + (
        f"goes on from step {good.step:,}" if good else "starts it" + (" again" if stage else "")
    )
    if good and stage is not None and status.state == "dead" and stage.step > good.step:
        again += f" ({stage.step - good.step:,} steps are done again)"
    if status.state == "running":
        return f"tail -f {status.path}/log.txt"
    if status.state == "hung":
        end = f"scancel {status.job}" if status.job else f"kill -9 {status.pid} on {status.host}"
        return f"{end}; then {again}"
    if status.state == "finished":
        draws = stage is not None and stage.name != "autoencoder" and "validation/psnr" not in stage.row
        return (
            f'python sample.py checkpoint={status.path} prompt="..."' if draws else f"ldm info {status.path}"
        )
    return again
