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
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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
from ldm.checkpoints.networks import load_network, network_entry, network_path, store_network
from ldm.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from ldm.errors import InputError

__all__ = [
    "clean",
    "flatten_optimizer",
    "load_document",
    "load_network",
    "load_tensors",
    "network_entry",
    "network_path",
    "newest",
    "problem",
    "prune",
    "require_space",
    "resolve",
    "restore_optimizer",
    "save",
    "store_network",
    "verify",
]

FORMAT_VERSION = 1
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
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, str | dict[str, Any]],
) -> Path:
    """Write `root/step-NNNNNNNNN/` and return it; one that is there already and good stays as it is.

    `tensors` maps a name to what NAME.safetensors holds, `documents` a file name to its text, or to what
    becomes JSON. Until the last rename nothing of the new checkpoint can be taken for one.
    """
    target = root / f"step-{step:09d}"
    if target.exists() and problem(target) is None:
        return target
    with staged(target) as folder:
        for name, values in tensors.items():
            write_tensors(folder / f"{name}.safetensors", values)
        for name, content in documents.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            write(folder / name, text)
        files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
        write(folder / MANIFEST, _manifest({"step": step, "ldm": ldm.__version__, "files": files}))
    return target


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _manifest(content: Mapping[str, Any]) -> str:
    """The manifest's text: `content`, the format's version, and a hash of both."""
    content = {"format_version": FORMAT_VERSION, **content}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def require_space(root: Path, needed: int) -> None:
    """Raise an InputError unless `needed` bytes fit on the disk of `root`; to be asked before training."""
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        what = f"needs {needed / 1e9:.1f} GB free for a checkpoint, {free / 1e9:.1f} GB are"
        raise InputError(f"{root}", what, "free some space, or set run_root=... to another disk")


def prune(root: Path, keep_last: int, every: int | None = None) -> None:
    """Delete all but the last `keep_last` checkpoints and those whose step is a multiple of `every`."""
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last}: a run keeps at least 1 checkpoint")
    for path in _steps(root)[keep_last:]:
        if not every or int(path.name.removeprefix("step-")) % every:
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
    if content["format_version"] != FORMAT_VERSION:
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
        raise InputError(f"{path / name}", what, _advice(path, what))


def _advice(path: Path, what: str) -> str:
    if NEWER in what:
        return "update ldm"
    good = next((other for other in _steps(path.parent) if other != path and problem(other) is None), None)
    return f"newest good checkpoint: {good.name}" if good else "no other checkpoint beside it is good"


def newest(root: Path) -> Path | None:
    """The last good checkpoint in `root`; says which bad ones it passed over. A newer format is an error."""
    for path in _steps(root):
        found = problem(path)
        if found is None:
            return path
        if NEWER in found[1]:
            verify(path)
        log.warning("%s: %s; trying the checkpoint before it", path / found[0], found[1])
    return None


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders, newest first, good or bad."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


# ---- finding -------------------------------------------------------------------------------------------


def resolve(path: Path, stage: str | None = None, where: str = "checkpoint") -> Path:
    """The good checkpoint directory that `path` means: itself, or the newest in a run, a stage, a folder.

    A run of several stages answers with the last that has a checkpoint, unless `stage` says which.
    `where` is the option that gave the path, for messages. What is returned has been verified.
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
        verify(path)
        return path
    stages = _stages(path)
    if stages and stage is not None:
        stages = [path / stage]
    folders = [folder for home in stages or [path] for folder in (home / "checkpoints", home)]
    for folder in folders:
        if found := newest(folder):
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
