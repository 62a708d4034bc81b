"""Frozen networks that came from a checkpoint, stored once per run under the hash of their content.

`networks/<sha256>/` holds model.safetensors and config.yaml. A checkpoint refers to it by a relative path, so
that a run can be moved or copied as a whole; the hash is verified on every load.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.files import digest, load_document, staged, sync, write, write_tensors
from ldm.checkpoints.lazy import LazyTensor, open_safetensors
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("model.safetensors", "config.yaml")


def store_network(run_dir: Path, tensors: Mapping[str, Tensor | LazyTensor], config_yaml: str) -> str:
    """Put a network into the run's `networks/` unless it is there; returns the sha256 that names it."""
    scratch = run_dir / "networks" / "new"
    with staged(scratch) as folder:
        write_tensors(folder / FILES[0], tensors)
        write(folder / FILES[1], config_yaml)
    sha256 = _content_hash(scratch)
    target = scratch.with_name(sha256)
    if target.is_dir() and _content_hash(target) == sha256:
        shutil.rmtree(scratch)
        return sha256
    shutil.rmtree(target, ignore_errors=True)  # damaged: the good copy takes its place
    os.replace(scratch, target)
    sync(target.parent)
    return sha256


def _content_hash(folder: Path) -> str:
    if not all((folder / name).is_file() for name in FILES):
        return ""
    listing = "".join(f"{name} {digest(folder / name)}\n" for name in FILES)
    return hashlib.sha256(listing.encode()).hexdigest()


def network_entry(run_dir: Path, sha256: str, checkpoint_dir: Path) -> dict[str, str]:
    """What state.json says of a network: its hash, and its path relative to the checkpoint directory."""
    path = os.path.relpath(run_dir / "networks" / sha256, checkpoint_dir)
    return {"sha256": sha256, "path": Path(path).as_posix()}


def network_path(checkpoint_dir: Path, entry: Mapping[str, Any]) -> Path:
    """Where the network of an entry of state.json is, absolute."""
    return Path(os.path.normpath(checkpoint_dir.absolute() / str(entry["path"])))


def load_network(checkpoint_dir: Path, entry: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """(tensors, config YAML) of a network that a checkpoint refers to, after its hash is found right."""
    tensors, text = open_network(checkpoint_dir, entry)
    return {name: value.read() for name, value in tensors.items()}, text


def open_network(
    checkpoint_dir: Path, entry: Mapping[str, Any], hashed: bool = True
) -> tuple[dict[str, LazyTensor], str]:
    """The same, its tensors not read yet; `hashed` False: its files are not read to find the hash right."""
    path = network_path(checkpoint_dir, entry)
    if not path.is_dir():
        fix = "move or copy the whole run, with its networks/ folder, and open that"
        raise InputError(f"{path}", f"not found, but {checkpoint_dir.name} needs this network", fix)
    if hashed and _content_hash(path) != entry["sha256"]:
        raise InputError(
            f"{path}", "the network's sha256 is not the one its checkpoint names", "restore a copy"
        )
    return open_safetensors(path / FILES[0])[0], load_document(path, FILES[1])
