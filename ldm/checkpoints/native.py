"""The checkpoint directory `step-000012000/`: safetensors and JSON under a manifest, never pickle or code.

A checkpoint is written beside its place, its MANIFEST.json last, synced to the disk, and renamed: it is there
whole or it is not there. The manifest has the size and sha256 of every file and of itself, so damage is seen
before a value is used. Networks that were trained here and are frozen now are stored once per run, in
`networks/<sha256>/`, and referenced relatively: see `networks.py`; optimizers: see `optimizer.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ldm
from ldm.checkpoints.files import (
    clean,
    digest,
    load_document,
    load_tensors,
    remove,
    staged,
    write,
    write_tensors,
)
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.networks import load_network, network_entry, network_path, store_network
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "clean",
    "complete",
    "fingerprint",
    "load_document",
    "load_network",
    "load_state",
    "load_tensors",
    "network_entry",
    "network_path",
    "newest",
    "problem",
    "prune",
    "require_space",
    "resolve",
    "save",
    "save_at",
    "store_network",
    "verify",
]

FORMAT_VERSION = 2  # 1: no files of several ranks, no metrics in state.json
MANIFEST = "MANIFEST.json"
NEWER = "is newer than this program's"
STAGES = ("diffusion", "autoencoder")  # the order in which a run is asked for its checkpoints
NAME = re.compile(r"step-(\d{9,})")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

log = logging.getLogger(__name__)


# ---- writing -------------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    documents: Mapping[str, str | dict[str, Any]],
) -> Path:
    """Write `root/step-NNNNNNNNN/` and return it; one that is there already and good stays as it is.

    `tensors` maps a name to what NAME.safetensors holds, `documents` a file name to its text, or to what
    becomes JSON. Until the last rename nothing of the new checkpoint can be taken for one.
    """
    target = root / f"step-{step:09d}"
    if target.exists() and problem(target) is None:
        return target
    return save_at(target, step, tensors, documents)


def save_at(
    target: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor | LazyTensor]],
    documents: Mapping[str, str | dict[str, Any]],
) -> Path:
    """Write a checkpoint into a folder of any name, one tensor in memory at a time; what was there goes."""
    with staged(target) as folder:
        names = {name: f"{name}.safetensors" for name in tensors}
        files = {names[name]: write_tensors(folder / names[name], tensors[name]) for name in tensors}
        complete(folder, step, documents, files)
    return target


def complete(
    folder: Path, step: int, documents: Mapping[str, str | dict[str, Any]], files: Mapping[str, Any]
) -> None:
    """Add documents and manifest to a folder that has the tensors; `files` maps those to `fingerprint`."""
    for name, content in documents.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        write(folder / name, text)
    files = {**files, **{name: fingerprint(folder / name) for name in documents}}
    files = dict(sorted(files.items()))
    write(folder / MANIFEST, _manifest({"step": step, "ldm": ldm.__version__, "files": files}))


def fingerprint(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


# state.json of a version -> that of the next one
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda state: {"metrics": {}, **state}
}


def load_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint as this program writes it, whatever version wrote it."""
    state, version = dict(load_document(path, "state.json")), FORMAT_VERSION
    if (path / MANIFEST).is_file():
        version = load_document(path, MANIFEST)["format_version"]
    for older in range(version, FORMAT_VERSION):
        state = MIGRATIONS[older](state)
    return state


def _manifest(content: Mapping[str, Any]) -> str:
    """The manifest's text: `content`, the format's version, and a hash of both."""
    content = {"format_version": FORMAT_VERSION, **content}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def require_space(root: Path, needed: int, other: str = "set run_root=... to another disk") -> None:
    """Raise an InputError unless `needed` bytes fit on the disk of `root`; to be asked before training.

    `other` is how the user chooses another place.
    """
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        what = f"needs {needed / 1e9:.1f} GB free for a checkpoint, {free / 1e9:.1f} GB are"
        raise InputError(f"{root}", what, f"free some space, or {other}")


@dataclass(frozen=True)
class Best:
    """The `count` checkpoints with the lowest (`mode` min) or highest (max) `metric`; of equals the first."""

    metric: str = "validation/loss"
    mode: str = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max") or self.count < 1:
            what = f"mode is {self.mode!r} and count {self.count}"
            raise InputError("callbacks.checkpoint.keep_best", what, "mode: min or max; count: from 1")

    def of(self, paths: Iterable[Path]) -> list[Path]:
        """Those of `paths`; checkpoints that do not know the metric, or have no number for it, never are."""
        found, others = [], set()
        for path in paths:
            with contextlib.suppress(InputError, OSError, ValueError, KeyError, TypeError):
                metrics = load_document(path, "state.json")["metrics"]
                others |= {name for name in metrics if name.startswith(self.metric.split("/")[0])}
                value = float(metrics[self.metric])
                if not math.isnan(value):
                    found.append((value if self.mode == "min" else -value, path.name, path))
        if others and self.metric not in others:
            log.warning("keep_best: no checkpoint has %s, but %s", self.metric, ", ".join(sorted(others)))
        return [path for *_, path in sorted(found)[: self.count]]


def prune(root: Path, keep_last: int, every: int | None = None, best: Best | None = None) -> None:
    """Delete all but the last `keep_last` checkpoints, those of a multiple of `every` steps, and the best."""
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: a run keeps at least 1 checkpoint")
    steps = _steps(root)
    kept = {*steps[:keep_last], *(best.of(steps) if best is not None else ())}
    for path in steps:
        if path not in kept and (not every or int(path.name.removeprefix("step-")) % every):
            remove(path)


# ---- checking ------------------------------------------------------------------------------------------


def problem(path: Path, files: Collection[str] | None = None) -> tuple[str, str] | None:
    """(file, what is wrong with it) of a checkpoint, or None; `files` limits what is hashed, not the rest."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text)
        listed, _ = content["files"], content["sha256"]
    except FileNotFoundError:
        return MANIFEST, "not found, so this checkpoint was never finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return MANIFEST, f"cannot be read ({type(error).__name__})"
    del content["sha256"]  # _manifest computes it again: this rule holds for every format_version
    if _manifest(content) != text:
        return MANIFEST, "is damaged"
    if content["format_version"] > FORMAT_VERSION:
        return MANIFEST, f"format_version {content['format_version']} {NEWER} ({FORMAT_VERSION})"
    for name, facts in listed.items():
        if not (path / name).is_file():
            return name, f"missing, though {MANIFEST} lists it"
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            return name, f"has {size:,} bytes, {MANIFEST} says {facts['bytes']:,}"
    for name, facts in listed.items():
        if (files is None or name in files) and digest(path / name) != facts["sha256"]:
            return name, f"sha256 differs from {MANIFEST}"
    return None


def verify(path: Path, files: Collection[str] | None = None) -> None:
    """Raise an InputError that names the damaged file and the newest good neighbour; `files` as above."""
    if found := problem(path, files):
        name, what = found
        raise InputError(f"{path / name}", what, _advice(path, what, files))


def _advice(path: Path, what: str, files: Collection[str] | None) -> str:
    if NEWER in what:
        return "update ldm"
    others = (other for other in _steps(path.parent) if other != path)
    good = next((other for other in others if problem(other, files) is None), None)
    return f"newest good checkpoint: {good.name}" if good else "no other checkpoint beside it is good"


def newest(root: Path, files: Collection[str] | None = None) -> Path | None:
    """The last good checkpoint in `root`; says which bad ones it passed over. A newer format is an error."""
    for path in _steps(root):
        found = problem(path, files)
        if found is None:
            return path
        if NEWER in found[1]:
            verify(path, files)
        log.warning("%s: %s; trying the checkpoint before it", path / found[0], found[1])
    return None


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders, newest first, good or bad."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


# ---- finding -------------------------------------------------------------------------------------------


def resolve(
    path: Path,
    stage: str | None = None,
    where: str = "checkpoint",
    files: Collection[str] | None = None,
) -> Path:
    """The good checkpoint directory that `path` means: itself, or the newest in a run, a stage, a folder.

    A run of several stages answers with the last that has a checkpoint, unless `stage` says which.
    `where` is the option that gave the path, for messages. What is returned has been verified; `files` as
    above.
    """
    path = Path(path)
    place = f"{where}={path}"
    if path.is_file():
        if path.suffix in PICKLES:
            fix = "ldm opens checkpoint directories and safetensors only"
            raise InputError(place, "is a pickle, which can run code when it is opened", fix)
        raise InputError(place, "is a file", "give the checkpoint directory, or the run that it is in")
    if not path.is_dir():
        raise InputError(place, "no such checkpoint", "give a run, or a checkpoint directory")
    if (path / MANIFEST).is_file() or NAME.fullmatch(path.name):
        verify(path, files)
        return path
    stages = _stages(path)
    if stages and stage is not None:
        stages = [path / stage]
    folders = [folder for home in stages or [path] for folder in (home / "checkpoints", home)]
    for folder in folders:
        if found := newest(folder, files):
            return found
    damaged = sum(len(_steps(folder)) for folder in folders)
    what = f"no good checkpoint ({damaged} damaged)" if damaged else "no such checkpoint"
    raise InputError(place, what, "give a run that has saved one: checkpoints/step-*/")


def _stages(run: Path) -> list[Path]:
    """Folders of a run's stages, the last first: what is not finished, then back through run.json."""
    names = [name for name in STAGES if (run / name).is_dir()]
    finished: list[str] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        finished = list(json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"])
        names += sorted({folder.parent.name for folder in run.glob("*/checkpoints")} - set(names))
    place = {name: i for i, name in enumerate(finished)}
    return [run / name for name in sorted(names, key=lambda name: -place.get(name, len(place)))]
