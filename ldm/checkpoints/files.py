"""Files and folders that are on the disk whole, or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.lazy import LazyTensor, write_safetensors
from ldm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEFTOVER = re.compile(r".+\.tmp-(\d+)(-gone)?")

log = logging.getLogger(__name__)
_lost: dict[str, int] = {}  # what cannot be written just now -> how often


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


def write_tensors(path: Path, values: Mapping[str, Tensor | LazyTensor]) -> dict[str, Any]:
    """A safetensors file, on to the disk, and what a manifest says of it.

    Tensors may be on any device, strided, or share storage. It is read back: raises OSError if the disk has
    something else than was written.
    """
    lazy = {name: v if isinstance(v, LazyTensor) else LazyTensor.of(v) for name, v in values.items()}
    written = write_safetensors(path, lazy)
    if written != digest(path, anew=True):
        raise OSError(errno.EIO, f"{path.name} reads back otherwise than it was written")
    return {"bytes": path.stat().st_size, "sha256": written}


def write(path: Path, text: str) -> None:
    """Text to a file and on to the disk."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """A file with new content, at once: readers see the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    write(new, text)
    os.replace(new, path)


def append_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Add lines to a CSV file, all or none: what a full disk took of them is cut off again."""
    with open(path, "ab", buffering=0) as file:
        before, text = file.tell(), io.StringIO(newline="")
        csv.writer(text).writerows([*([] if before else [header]), *rows])
        data = memoryview(text.getvalue().encode())
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def spared(what: str) -> Iterator[None]:
    """Go on after an OSError of the block: `what` (a name, best a path) was not written.

    Said once, and again when it works again, with how often it failed in between.
    """
    try:
        yield
    except OSError as error:
        _lost[what] = _lost.get(what, 0) + 1
        if _lost[what] == 1:
            reason = error.strerror or error
            log.warning("%s cannot be written (%s): what would be in it is lost until it can", what, reason)
    else:
        if times := _lost.pop(what, 0):
            log.warning("%s is written again; %d times it was not, and that is lost", what, times)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path, anew: bool = False) -> str:
    """sha256 of a file, in hex; `anew`: from the disk itself where the system can be told so."""
    with open(path, "rb") as file:
        if anew and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(folder: Path) -> None:
    """Delete a folder so that a part of it is never taken for the whole: out of its name first."""
    gone = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def clean(root: Path, alone: bool = False) -> None:
    """Delete what killed processes left half-written in `root`; call it before this process writes there.

    `alone`: nobody else writes there, so that also goes what another machine's process of a number that
    lives here left.
    """
    for path in root.glob("*.tmp-*") if root.is_dir() else ():
        match = LEFTOVER.fullmatch(path.name)
        if match and (alone or int(match[1]) == os.getpid() or not _alive(int(match[1]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ldm.checkpoints.pieces import files_of, open_pieces

    file = path / f"{name}.safetensors"
    if len(files_of(path, name)) > 1:
        return {key: tensor.read().to(device) for key, tensor in open_pieces(path, name).items()}
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
