"""The quickstart's scores together, against their bars: what `ldm evaluate` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.evaluation.composition import CompositionScore, ReferenceSet, evaluate_quickstart, percent
from ldm.evaluation.distribution import evaluate_distribution
from ldm.evaluation.reconstruction import evaluate_reconstruction
from ldm.pictures import to_tensor

METRICS = ("composition", "reconstruction", "kid", "fid")
BARS = {"background": 0.98, "object": 0.80, "psnr": 25.0, "edge_energy": 0.8}  # fraction, fraction, dB, ratio


@dataclass
class Report:
    """Scores by name, and the held-out pictures if they were drawn; `passed`: none is below its bar."""

    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    composition: CompositionScore | None = None

    @property
    def passed(self) -> bool:
        return all(value >= BARS[name] for name, value in self.scores.items() if name in BARS)

    def table(self) -> str:
        """One line a score: name, value, and its bar with the verdict."""
        rows = [("score", "value", "bar", "")]
        for name, value in self.scores.items():
            bar = BARS.get(name)
            verdict = "" if bar is None else ("ok" if value >= bar else "BELOW")
            rows.append(
                (name, _shown(name, value), "" if bar is None else f">= {_shown(name, bar)}", verdict)
            )
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: scores, bars, and per picture what was right."""
        result: dict[str, Any] = {"scores": self.scores, "bars": BARS, "passed": self.passed}
        if self.composition is not None:
            c = self.composition
            result["pairs"] = [
                {"caption": caption, "background": b, "object": o}
                for caption, b, o in zip(c.captions, c.background_right, c.object_right, strict=True)
            ]
        return result


def _shown(name: str, value: float) -> str:
    if name in ("background", "object") or name.startswith("chance"):
        return percent(value)
    return f"{value:.2f} dB" if name.startswith("psnr") else f"{value:.4g}"


def held_out_images(emoji_set: ReferenceSet) -> Tensor:
    """The reference picture of every held-out pair, uint8 [n 3 H W]."""
    pictures = [emoji_set.picture(i, j) for i, j in emoji_set.held_out]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def evaluate(
    pipe: Any,
    emoji_set: ReferenceSet,
    metrics: Sequence[str] = ("composition", "reconstruction"),
    seed: int = 0,
    batch_size: int = 45,
    network: nn.Module | None = None,
    progress: bool = False,
) -> Report:
    """Measure a pipeline (a callable with `.autoencoder`) on the held-out pairs, one picture each."""
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise InputError("metrics", f"unknown {unknown[0]!r}", f"choose from {', '.join(METRICS)}")
    report = Report()
    distances = tuple(m for m in metrics if m in ("kid", "fid"))
    if "composition" in metrics or distances:
        c = report.composition = evaluate_quickstart(pipe, emoji_set, seed, batch_size, progress)
    if "composition" in metrics:
        report.scores |= {"background": c.background, "object": c.object}
        report.scores |= {"chance_background": c.chance_background, "chance_object": c.chance_object}
        report.notes.append(c.line())
    real = held_out_images(emoji_set)
    if "reconstruction" in metrics:
        r = evaluate_reconstruction(pipe.autoencoder, real, batch_size)
        report.scores |= {"psnr": r.psnr, "psnr_pooled": r.psnr_pooled, "edge_energy": r.edge_energy}
    if distances:
        d = evaluate_distribution(
            real, to_tensor(c.pictures), network, distances, seed=seed, batch_size=batch_size
        )
        if d.kid is not None and d.kid_std is not None:
            report.scores |= {f"KID-{d.name}": d.kid, f"KID-{d.name}_std": d.kid_std}
        if d.fid is not None:
            report.scores |= {f"FID-{d.name}": d.fid}
        report.notes.append(d.line())
    return report


def report_autoencoder(pipe: Any, run: Path, data: Any) -> str:
    """For the end of training: how well held-out pictures survive; `data` has the `emoji_set`."""
    return evaluate_reconstruction(pipe.autoencoder, held_out_images(data.emoji_set)).line()


def report_diffusion(pipe: Any, run: Path, data: Any, batch_size: int = 45, shown: int | None = None) -> str:
    """For the end of training: do held-out pairs come out right; draws them into run/contact_sheet.png.

    `shown` of them, evenly spaced; None: all.
    """
    score = evaluate_quickstart(pipe, data.emoji_set, batch_size=batch_size)
    sheet = run / "contact_sheet.png"
    score.sheet(shown).save(sheet)
    prompt = next((caption for caption in score.captions if "red apple" in caption), score.captions[0])
    following = f'python sample.py checkpoint={run} prompt="{prompt}"'
    return f"{score.line()}\n{'pictures':<11}  {sheet}      next: {following}"
