"""The options of `ldm plan`, and what it does with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ldm.errors import InputError

if TYPE_CHECKING:
    from ldm.cluster.planning import Options, Stage


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for train.py: experiment=NAME")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--gpu", default="h100", help="a100, h100 (default), h200, b200 or gb200")
    parser.add_argument(
        "--fit", action="store_true", help="the largest batch that fits; tried where a GPU is"
    )
    parser.add_argument(
        "--check", action="store_true", help="only predictions of published runs, with errors"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="only the start of all ranks, and their samples"
    )
    parser.add_argument("--network", type=float, metavar="GBIT/S", help="of a GPU's card (default: a DGX's)")
    parser.add_argument("--dollars-per-gpu-hour", type=float, default=2.5, metavar="X", help="default 2.5")
    what = "GPU-hours for each failure (default 29500: Meta's RSC-1; Llama 3: 50700)"
    parser.add_argument("--gpu-hours-per-failure", type=float, default=29_500.0, metavar="X", help=what)
    what = "from a failure to the start of the processes (default 180)"
    parser.add_argument("--requeue", type=float, default=180.0, metavar="SECONDS", help=what)
    parser.add_argument("--write", type=float, default=1.0, metavar="GB/S", help="of checkpoints (default 1)")
    parser.add_argument("--storage", type=float, metavar="GB/S", help="of pictures, all nodes (default: any)")
    parser.add_argument("--loader", type=float, metavar="PICTURES/S", help="of a node (default: any)")
    what = "calibrate on a run of this config: --measured 8=1084"
    parser.add_argument("--measured", metavar="GPUS=PICTURES/S", help=what)
    parser.add_argument("--cuda-graph", action="store_true", help="as if one CUDA graph launched the step")
    parser.add_argument("--json", metavar="FILE", help="write the numbers for programs")


SD_CHECKPOINT = 13.8e9  # bytes: 860 million parameters, their average and two moments

POSITIVE = (
    *("nodes", "gpus_per_node", "network", "dollars_per_gpu_hour", "gpu_hours_per_failure"),
    *("write", "storage", "loader"),
)


def check(args: argparse.Namespace) -> None:
    """Raise `InputError` for a number that no machine has."""
    from ldm.build import nearest
    from ldm.cluster.hardware import GPUS

    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')}", f"expected above 0, got {value:g}")
    if not (args.requeue >= 0 and math.isfinite(args.requeue)):
        raise InputError("--requeue", f"expected at least 0, got {args.requeue:g}")
    if args.gpu not in GPUS:
        near = nearest(args.gpu, list(GPUS))
        have = f"have: {', '.join(GPUS)}"
        raise InputError(f"--gpu {args.gpu}", "not known", f"did you mean {near}? ({have})" if near else have)


def measured_of(text: str | None) -> tuple[int, float] | None:
    if text is None:
        return None
    gpus, _, speed = text.partition("=")
    try:
        found = int(gpus), float(speed)
    except ValueError:
        found = 0, 0.0
    if found[0] < 1 or not (found[1] > 0 and math.isfinite(found[1])):
        raise InputError("--measured", f"cannot read {text!r}", "write GPUS=PICTURES/S, as 8=1084")
    return found


def run(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the answer, as they are known."""
    check(args)
    measured = measured_of(args.measured)
    from ldm.cluster import plan_report

    if args.check:
        yield from plan_report.errors()
        if args.json:
            yield plan_report.write_json(args.json, [])
        return
    from ldm.cluster.planning import Options, configs

    scaled = {
        "network": args.network and args.network * 1e9 / 8,
        "write": args.write * 1e9,
        "storage": args.storage and args.storage * 1e9,
    }
    options = Options(
        args.nodes,
        args.gpus_per_node,
        args.gpu,
        dollars=args.dollars_per_gpu_hour,
        gpu_hours=args.gpu_hours_per_failure,
        requeue=args.requeue,
        loader=args.loader,
        measured=measured,
        graph=args.cuda_graph,
        **scaled,
    )
    if args.json and (args.simulate or args.fit):
        raise InputError("--json", "holds forecasts, and this makes none", "leave out --simulate and --fit")
    if args.simulate:
        yield from simulated(args, options.per_node)
        return
    from ldm.cluster.planning import Stage, forecast, rate_of
    from ldm.cluster.workload import workload

    documents = []
    for cfg in configs(args.overrides):
        name = f"{cfg['run_name']} {cfg['stage']}".strip()
        stage = Stage(name, cfg, workload(cfg))
        if args.fit:
            yield from fitted(stage, options)
            continue
        rate, source = rate_of(stage, options)
        found = forecast(stage, options, options.nodes * options.per_node, rate)
        scales = plan_report.scales(stage, options, rate)
        yield from plan_report.lines(stage, options, found, source, scales)
        yield ""
        documents.append(plan_report.as_dict(stage, options, [found, *scales], source))
    if not args.fit:
        yield "How well this model predicts published runs (ldm plan --check):"
        yield from plan_report.errors()
    if args.json:
        yield plan_report.write_json(args.json, documents)


def fitted(stage: Stage, options: Options) -> Iterator[str]:
    """The largest batch by forecast, and by trial where a GPU is."""
    import torch

    gpu, gpus = options.device, options.nodes * options.per_node
    here = torch.cuda.is_available()
    name, capacity = gpu.name, gpu.memory
    if here:
        facts = torch.cuda.get_device_properties(0)
        name, capacity = facts.name, float(facts.total_memory)
    most = stage.load.fits(capacity, gpus)
    used = stage.load.memory(most, gpus) / 1e9
    has = capacity / 1e9
    yield f"{stage.name}: {most:,} pictures fit in {name} by forecast, {used:,.1f} of {has:,.1f} GB"
    if not here:
        yield "not tried: there is no GPU here"
        return
    from ldm.cluster.allocator import largest
    from ldm.cluster.workload import RESERVE

    pictures, taken = largest(stage.cfg, most, "cuda")
    error = (stage.load.memory(pictures, 1) - RESERVE) / max(1, taken) - 1
    without = f"forecast {error:+.0%}, without buckets of DDP and the CUDA context"
    yield f"tried: {pictures:,} fit and took {taken / 1e9:,.1f} GB ({without})"


def simulated(args: argparse.Namespace, per_node: int) -> Iterator[str]:
    """Samples of every rank for some steps, and the clock of a start."""
    import time

    from ldm.cluster.layout import Startup, deal, start_up
    from ldm.cluster.planning import configs

    began, ranks = time.perf_counter(), args.nodes * per_node
    pictures, checkpoint, shares, workers = 2 * ranks, SD_CHECKPOINT, 1, 8
    if args.overrides:
        from ldm.training.assembly import build_module
        from ldm.training.summary import memory, without_weights

        (cfg, *_) = configs(args.overrides)
        pictures = int(cfg["data"]["global_batch_size"])
        checkpoint = memory(build_module(without_weights(cfg), device="meta"))["checkpoint"]
        shares = int(cfg["trainer"].get("accumulate_grad_batches") or 1)
        workers = int(cfg["data"].get("num_workers", workers))
    dealt = deal(ranks, per_node, pictures, shares, workers)
    yield from dealt.lines()
    yield (
        f"start with a checkpoint of {checkpoint / 1e9:,.1f} GB: "
        + start_up(dealt.nodes, per_node, checkpoint, 0.0, Startup()).line()
    )
    yield f"simulated in {time.perf_counter() - began:,.1f} s"
