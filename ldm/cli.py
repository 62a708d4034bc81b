"""The `ldm` command: one thin function a verb; imports are late, so that help comes at once."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.cluster import commands
from ldm.errors import InputError, reported, say


class Parser(argparse.ArgumentParser):
    """Says what is wrong in the one line that all our errors have."""

    def error(self, message: str) -> NoReturn:
        raise InputError(self.prog, message, f"see {self.prog} --help")


def data_pack(parser: Parser, argv: Sequence[str]) -> int:
    """Pack a folder of pictures and captions into tar shards."""
    parser.add_argument("folder", help="img.jpg beside img.txt, or a metadata.jsonl with file_name and text")
    parser.add_argument("out", help="folder for the shards: new, empty, or packed before")
    args = parser.parse_args(argv)
    from ldm.data.pack import pack

    print("\n".join(pack(args.folder, args.out).summary()))
    return 0


def data_index(parser: Parser, argv: Sequence[str]) -> int:
    """Build the index of shards, which training does otherwise on first use; or count them unopened."""
    from ldm.data.indexing import add_options, run

    add_options(parser)
    print("\n".join(run(parser.parse_args(argv))))
    return 0


def data_inspect(parser: Parser, argv: Sequence[str]) -> int:
    """Say what is in shards: counts, what was left out, ranges of sizes and scores; a page of it."""
    parser.add_argument(
        "shards", nargs="+", help="tars, a folder of tars, a glob, or braces {00000..00009}.tar"
    )
    parser.add_argument("--out", metavar="FILE.html", help="write a page of it: one file, opens anywhere")
    parser.add_argument("--json", metavar="FILE.json", help="write the same facts for programs")
    parser.add_argument("--min", action="append", default=[], metavar="COLUMN=VALUE", help="try a filter")
    parser.add_argument("--max", action="append", default=[], metavar="COLUMN=VALUE", help="try a filter")
    parser.add_argument(
        "--min-size", type=int, metavar="PIXELS", help="try one: shorter side of the original"
    )
    parser.add_argument("--opt-out", action="append", default=[], metavar="FILE", help="try a list")
    parser.add_argument("--resolution", type=int, default=512, help="of aspect-ratio buckets (default 512)")
    parser.add_argument("--pictures", type=int, default=36, help="on the page, evenly spaced (default 36)")
    parser.add_argument("--captions", type=int, default=5, help="captions to show, evenly spaced (default 5)")
    args = parser.parse_args(argv)
    from ldm.data.index import build_index
    from ldm.data.inspect import examine
    from ldm.data.inspect_report import filters_of, summary, write_json, write_page

    index = build_index(args.shards, where="shards")
    filters = filters_of(index, args.min, args.max, args.min_size, args.opt_out)
    if not (args.out or args.json):
        print("\n".join(summary(index, examine(index, filters, pictures=0), args.captions)))
        return 0
    from ldm.data.shapes import Buckets

    found = examine(index, filters, args.resolution, Buckets([args.resolution]), args.pictures)
    lines = summary(index, found, args.captions)
    lines += [write_page(found, args.out)] if args.out else []
    lines += [write_json(found, args.json)] if args.json else []
    print("\n".join(lines))
    return 0


def data_score(parser: Parser, argv: Sequence[str]) -> int:
    """Add columns to shards by your own functions, in a table beside each tar."""
    parser.add_argument(
        "shards", nargs="+", help="tars, a folder of tars, a glob, or braces {00000..00009}.tar"
    )
    what = "a function uint8 [b 3 S S] -> b numbers, or of (pictures, captions); a class is made first"
    parser.add_argument("--scorer", action="append", required=True, metavar="MODULE:FUNCTION", help=what)
    parser.add_argument("--column", action="append", required=True, metavar="NAME", help="of each --scorer")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side of S (default 224)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures a call (default 64)")
    parser.add_argument("--num-threads", type=int, default=4, help="that decode (default 4)")
    parser.add_argument("--task", metavar="I/N", help="default: as torchrun, srun or a Slurm array says")
    parser.add_argument("--overwrite", action="store_true", help="make the columns again")
    args = parser.parse_args(argv)
    if len(args.scorer) != len(args.column):
        what = f"{len(args.column)} for {len(args.scorer)} --scorer"
        raise InputError("--column", what, "give one --column for each --scorer")
    for name in ("image_size", "batch_size", "num_threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}", f"expected at least 1, got {getattr(args, name)}")
    from ldm.data.score import Scorer, score
    from ldm.data.tasks import task_of

    origins = zip(args.column, args.scorer, strict=True)
    scorers = [Scorer(column, _made(origin, "--scorer", False), origin) for column, origin in origins]
    sizes = args.image_size, args.batch_size, args.num_threads
    part = task_of(args.task, os.environ)
    for shard, count in score(args.shards, scorers, *sizes, args.overwrite, part):
        say(f"{shard}: {count:,} samples scored" if count else f"{shard}: done before")
    return 0


def data_cache(parser: Parser, argv: Sequence[str]) -> int:
    """Encode pictures and captions once, for data=cached; the same command goes on where it stopped."""
    parser.add_argument("out", metavar="OUT", help="folder for the cache: new, or begun by the same command")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for train.py: experiment=NAME")
    parser.add_argument("--variants", type=int, default=1, help="crops and flips a picture (default 1)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="on disk (default fp16)")
    parser.add_argument("--no-text", action="store_true", help="leave out what frozen text towers give")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default 10000")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="at once (default 32)")
    parser.add_argument("--device", help="default: a GPU for each process, or the CPU")
    parser.add_argument("--task", metavar="I/N", help="default: as torchrun, srun or a Slurm array says")
    args = parser.parse_intermixed_args(argv)
    from ldm.data.tasks import task_of
    from ldm.training.precompute import CacheOptions, cache

    task, tasks = task_of(args.task, os.environ)
    flags = (args.variants, args.dtype, not args.no_text, args.samples_per_shard, args.batch_size)
    for line in cache(args.out, args.overrides, CacheOptions(*flags, args.device, (task, tasks))):
        say(line)
    return 0


def evaluate(parser: Parser, argv: Sequence[str]) -> int:
    """Score a checkpoint against its bars; exit code 1 if it is below one."""
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--set", default="quickstart", help="what is drawn: quickstart, its held-out pairs")
    parser.add_argument(
        "--metrics", default="composition,reconstruction", help="also kid and fid, of the same pictures"
    )
    parser.add_argument(
        "--features",
        metavar="MODULE:FUNCTION",
        help="makes the network of kid and fid: uint8 [b 3 H W] -> [b d]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    parser.add_argument("--json", metavar="FILE", help="default: evaluation.json in the run")
    args = parser.parse_args(argv)
    if args.set != "quickstart":
        raise InputError(f"--set {args.set}", "no such set", "have: quickstart")
    import ldm
    from ldm.checkpoints.native import resolve
    from ldm.evaluation.report import evaluate as measure

    network = None if args.features is None else _made(args.features, "--features")
    folder = resolve(Path(args.path))
    pipe = ldm.load(folder)
    report = measure(
        pipe, _quickstart_set(folder), args.metrics.split(","), args.seed, network=network, progress=True
    )
    print(report.table())
    out = Path(args.json) if args.json else _run_of(folder) / "evaluation.json"
    facts = {"checkpoint": str(folder), "set": args.set, "seed": args.seed, **report.as_dict()}
    try:
        out.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written to {out}")
        if report.composition is not None:
            report.composition.sheet().save(out.with_suffix(".png"))
            print(f"pictures in {out.with_suffix('.png')}")
    except OSError as error:
        raise InputError(
            f"{out}", f"cannot write there ({error.strerror or error})", "pass --json FILE"
        ) from None
    return 0 if report.passed else 1


def ema(parser: Parser, argv: Sequence[str]) -> int:
    """Average the weights over another length, from a run's snapshots, into a checkpoint."""
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", help="a run with module.ema_lengths=[0.05,0.1]")
    parser.add_argument("out", metavar="OUT", help="folder for the checkpoint, a new one")
    parser.add_argument("--length", type=float, required=True, help="as a share of the run: 0.03 to 0.2")
    parser.add_argument("--step", type=int, help="where it ends: a snapshot's (default: the checkpoint's)")
    args = parser.parse_args(argv)
    from ldm.checkpoints.native import resolve
    from ldm.checkpoints.posthoc import combine, store

    checkpoint = resolve(Path(args.path))
    average = combine(checkpoint, args.length, args.step, f"--length {args.length:g}")
    folder = store(checkpoint, Path(args.out), average)
    print(f"{folder}: weights averaged over length {args.length:g} up to step {average.profile.step:,}")
    print(f"{len(average.terms)} snapshots meet that profile to {average.error:.2%}")
    return 0


def import_(parser: Parser, argv: Sequence[str]) -> int:
    """Store a single file or a diffusers folder as a checkpoint of this house."""
    parser.add_argument("src", metavar="SRC", help=".safetensors or .ckpt, or a diffusers folder")
    parser.add_argument("dst", metavar="DST", help="folder for the checkpoint, a new one")
    asking(parser)
    args = parser.parse_args(argv)
    from ldm.checkpoints.importing import store
    from ldm.checkpoints.info import describe
    from ldm.checkpoints.opening import open_model

    model = open_model(args.src, asked(args), where="SRC")
    folder = store(model, Path(args.dst))
    print("\n".join(describe(model, Path(args.src))))
    print(f"stored in {folder}      next: python sample.py checkpoint={folder} prompt=...")
    return 0


def info(parser: Parser, argv: Sequence[str]) -> int:
    """Say what a checkpoint is: family, networks, numbers, averages, steps, licence."""
    parser.add_argument("path", metavar="PATH", help="a run, a checkpoint, a diffusers folder, a single file")
    parser.add_argument(
        "--hash", action="store_true", help="also sha256 of its weights, which reads them all"
    )
    asking(parser)
    args = parser.parse_args(argv)
    from ldm.checkpoints.info import describe
    from ldm.checkpoints.opening import open_model

    path = Path(args.path)
    print("\n".join(describe(open_model(path, asked(args), where="PATH", hashed=False), path, args.hash)))
    return 0


def export(parser: Parser, argv: Sequence[str]) -> int:
    """Write a checkpoint as diffusers, A1111 or ComfyUI open it, and compare what was written."""
    parser.add_argument("src", metavar="SRC", help="a run, a checkpoint, a diffusers folder or a single file")
    parser.add_argument("dst", metavar="DST", help="a new folder, or a new file NAME.safetensors")
    parser.add_argument("--format", choices=("diffusers", "single-file", "autoencoder"), default="diffusers")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="default: the averages")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="default: as they are (a run's: fp32)"
    )
    parser.add_argument("--full", action="store_true", help="a single file with raw weights and averages")
    asking(parser)
    args = parser.parse_args(argv)
    from ldm.checkpoints.foreign.export import export as write
    from ldm.checkpoints.opening import open_model

    model = open_model(args.src, asked(args), where="SRC")
    report = write(model, Path(args.dst), args.format, args.weights, args.dtype, args.full)
    print("\n".join([*report.lines(), f"written to {args.dst}, read back and compared"]))
    return 0


def asking(parser: Parser) -> None:
    """Options that say of a foreign file what its tensors do not."""
    parser.add_argument(
        "--config", type=Path, metavar="ORIGINAL.yaml", help="the YAML that it was trained by"
    )
    parser.add_argument("--prediction-type", choices=("epsilon", "v_prediction", "sample"))
    parser.add_argument("--num-heads", type=int, help="of the U-Net's attention, on every level")
    parser.add_argument("--head-dim", type=int, help="or the width of a head")
    parser.add_argument("--text-heads", type=int, help="of a text tower of no published size")
    parser.add_argument(
        "--latent-scale", type=float, help="of an autoencoder alone: 0.18215 (SD 1, 2), 0.13025 (XL)"
    )


def asked(args: argparse.Namespace) -> Any:
    from dataclasses import fields

    from ldm.checkpoints.model import Asked

    return Asked(**{field.name: getattr(args, field.name) for field in fields(Asked)})


VERBS: dict[str, Callable[[Any, Sequence[str]], int]] = {
    "data pack": data_pack,
    "data index": data_index,
    "data inspect": data_inspect,
    "data score": data_score,
    "data cache": data_cache,
    "evaluate": evaluate,
    "ema": ema,
    "import": import_,
    "export": export,
    "info": info,
    **commands.VERBS,
}


def _quickstart_set(folder: Path) -> Any:
    """The pictures that the checkpoint's run was trained on, and those held out of it, as its config says."""
    from ldm.checkpoints.native import load_document
    from ldm.config import build, from_yaml

    config = from_yaml(load_document(folder, "config.yaml"), f"{folder / 'config.yaml'}")
    emoji_set = getattr(build(config["data"]), "emoji_set", None)
    if emoji_set is None:
        what = f"{folder.name} was not trained on the quickstart's pictures"
        raise InputError("--set quickstart", what, "give a run of experiment=quickstart")
    return emoji_set


def _run_of(checkpoint: Path) -> Path:
    """The run's folder: what holds the stages, or the checkpoints of the only one."""
    from ldm.checkpoints.native import STAGES

    home = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    of_stage = (home.parent / "run.json").is_file() and not (home / "run.json").is_file()
    return home.parent if of_stage or home.name in STAGES else home


def _made(reference: str, option: str, always: bool = True) -> Any:
    """What the user's own MODULE:FUNCTION returns (not `always`: itself, unless it is a class).

    The working directory is searched, too.
    """
    import importlib

    module, _, name = reference.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
        return found() if always or isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{option} {reference}", str(error), "write MODULE:FUNCTION") from None
    finally:
        sys.path.remove("")


def _overview() -> str:
    lines = [f"  ldm {verb:14}{(function.__doc__ or '').strip()}" for verb, function in VERBS.items()]
    return "\n".join(["usage: ldm VERB ...   (ldm VERB --help says more)", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, or raises SystemExit(2) after one line of error."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = next((v for v in VERBS if words[: len(v.split())] == v.split()), None)
    with reported():
        if verb is not None:
            parser = Parser(prog=f"ldm {verb}", description=VERBS[verb].__doc__)
            return VERBS[verb](parser, words[len(verb.split()) :])
        groups = {v.partition(" ")[0] for v in VERBS if " " in v}
        typed = " ".join(
            w for w in words[: 2 if words[:1] and words[0] in groups else 1] if not w.startswith("-")
        )
        if not typed or typed in groups:
            print(_overview())
            return 0 if words else 2
        near = difflib.get_close_matches(typed, VERBS, 1, 0.5)
        fix = f"did you mean ldm {near[0]}?" if near else f"have: {', '.join(VERBS)}"
        raise InputError(f"ldm {typed}", "no such command", fix)


if __name__ == "__main__":
    sys.exit(main())
