"""Files and folders that are on the disk whole, or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.errors import InputError

LEFTOVER = re.compile(r".+\.tmp-(\d+)(-gone)?")


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well; what was at `target` goes then."""
    folder = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        sync(folder)
        if target.exists():
            remove(target)
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync(target.parent)


def write_tensors(path: Path, values: Mapping[str, Tensor]) -> None:
    """A safetensors file, on to the disk; tensors may be on any device, strided, or share storage."""
    save_file(_storable(values), path)
    sync(path)


def _storable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each with a storage of its own, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in values.items():
        tensor = value.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        found[name] = tensor
    return found


def write(path: Path, text: str) -> None:
    """Text to a file and on to the disk."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(folder: Path) -> None:
    """Delete a folder so that a part of it is never taken for the whole: out of its name first."""
    gone = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean(root: Path) -> None:
    """Delete what killed processes left half-written in `root`; call it before this process writes there."""
    for path in root.glob("*.tmp-*") if root.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def load_tensors(path: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """What NAME.safetensors of a checkpoint (or any folder) holds; not checked against the manifest again."""
    file = path / f"{name}.safetensors"
    try:
        return load_file(file, device=str(device))
    except FileNotFoundError:
        raise InputError(f"{file}", "not found") from None
    except SafetensorError as error:
        raise InputError(f"{file}", f"is not a safetensors file ({error})") from None


def load_document(path: Path, name: str) -> Any:
    """A file of a checkpoint: what the JSON says if it is JSON, else its text."""
    try:
        text = (path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path / name}", "not found") from None
    return json.loads(text) if name.endswith(".json") else text
