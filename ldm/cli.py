"""The `ldm` command: one thin function a verb; imports are late, so that help comes at once."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ldm.errors import InputError, reported


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
    """Build and cache the index of shards, which training does otherwise on first use."""
    parser.add_argument(
        "shards", nargs="+", help="tars, a folder of tars, a glob, or braces {00000..00009}.tar"
    )
    args = parser.parse_args(argv)
    from ldm.data.index import build_index

    index = build_index(args.shards, where="shards")
    print(index.summary())
    print(f"columns: {', '.join(index.columns)}")
    return 0


def data_inspect(parser: Parser, argv: Sequence[str]) -> int:
    """Say what is in shards: counts, what was left out, ranges of sizes and scores, some captions."""
    parser.add_argument(
        "shards", nargs="+", help="tars, a folder of tars, a glob, or braces {00000..00009}.tar"
    )
    parser.add_argument("--captions", type=int, default=5, help="captions to show, evenly spaced (default 5)")
    args = parser.parse_args(argv)
    import numpy as np

    from ldm.data.index import build_index
    from ldm.data.reader import ShardReader

    index = build_index(args.shards, where="shards")
    print(index.summary())
    for shard, key, reason, offset in index.problems:
        print(f"left out {Path(shard).name}/{key}: {reason} at byte {offset}")
    print(f"{'column':24}{'present':>9}{'least':>12}{'median':>12}{'most':>12}")
    for name, column in index.columns.items():
        values = column[np.isfinite(column)]
        cells = np.quantile(values, (0, 0.5, 1)) if len(values) else ()
        print(f"{name:24}{len(values) / len(index):9.1%}" + "".join(f"{cell:12.5g}" for cell in cells))
    rows = np.unique(np.linspace(0, len(index) - 1, max(args.captions, 0)).astype(np.int64))
    for key, raw in zip(index.keys(rows), ShardReader(index)(rows), strict=True):
        print(f"{key}: {raw.caption.decode('utf-8', 'replace').strip()}")
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

    network = None if args.features is None else _made(args.features)
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


VERBS: dict[str, Callable[[Parser, Sequence[str]], int]] = {
    "data pack": data_pack,
    "data index": data_index,
    "data inspect": data_inspect,
    "evaluate": evaluate,
    "ema": ema,
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


def _made(reference: str) -> Any:
    """What the user's own function MODULE:FUNCTION returns; the working directory is searched, too."""
    import importlib

    module, _, function = reference.partition(":")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--features {reference}", str(error), "write MODULE:FUNCTION") from None
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
        typed = " ".join(w for w in words[: 2 if words[:1] == ["data"] else 1] if not w.startswith("-"))
        if not typed or typed == "data":
            print(_overview())
            return 0 if words else 2
        near = difflib.get_close_matches(typed, VERBS, 1, 0.5)
        fix = f"did you mean ldm {near[0]}?" if near else f"have: {', '.join(VERBS)}"
        raise InputError(f"ldm {typed}", "no such command", fix)


if __name__ == "__main__":
    sys.exit(main())
