"""Open any checkpoint: a run, a checkpoint directory, a diffusers folder, a single file.

Nothing is guessed from a name: a folder is told by what lies in it, a file by what it begins with. `ldm info`
opens in well under a second, so neither torch nor hydra is imported before it is needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ldm.checkpoints import native
from ldm.checkpoints.files import digest
from ldm.checkpoints.foreign import folder_in, single_file
from ldm.checkpoints.lazy import FORMATS
from ldm.checkpoints.model import Asked, Model
from ldm.checkpoints.networks import open_network
from ldm.checkpoints.pieces import files_of, open_pieces
from ldm.errors import InputError

DIFFUSERS = ("model_index.json", "config.json")  # in the folder of a pipeline, of one network
DAMAGED = (  # what the readers run into where a name, a shape or a value is not what it must be
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # and RecursionError
    TypeError,
    ValueError,
)


def open_model(
    path: str | os.PathLike[str],
    asked: Asked | None = None,
    where: str = "checkpoint",
    stage: str | None = None,
    hashed: bool = True,
    otherwise: Asked | None = None,
) -> Model:
    """The checkpoint at `path`, of any format; `where` is the option that gave it, for messages.

    A run answers with the newest good checkpoint of its last stage, or of `stage`. The files of a checkpoint
    directory are verified (`hashed` False: their sizes alone); of others headers alone are read. `otherwise`
    answers what nothing else does.
    """
    path, asked = Path(path), asked or Asked()
    try:
        single = path.is_file()
        pipeline, network = ((path / name).is_file() for name in DIFFUSERS)
    except OSError as error:  # such as a path that is too long
        raise InputError(f"{where}={path!s:.100}", f"cannot be opened ({error.strerror})") from None
    if single:
        return _foreign(partial(single_file.read, otherwise=otherwise), path, asked)
    if pipeline or network:
        _refuse_unused(asked, {"prediction_type"} if pipeline else set(), f"{path}")
        return _foreign(folder_in.read, path, asked)
    folder = native.resolve(path, stage, where, None if hashed else ())
    _refuse_unused(asked, set(), f"{path}")
    return open_native(folder, hashed)


def _refuse_unused(asked: Asked, used: set[str], where: str) -> None:
    """Raises InputError for an answer to what the checkpoint at `where` itself says."""
    for name, value in vars(asked).items():
        if value is not None and name not in used:
            what = f"{where} says that itself, and the option would change nothing"
            raise InputError(f"--{name.replace('_', '-')} {value}", what, "leave it out")


def _foreign(read: Callable[[Path, Asked], Model], path: Path, asked: Asked) -> Model:
    """What the reader makes of a file or folder that anyone may have written: a Model or an InputError."""
    try:
        model = read(path, asked)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}", f"cannot be read ({error.strerror or error})") from None
    except DAMAGED as error:
        what = f"is damaged, or of no kind that is known here ({type(error).__name__}: {error!s:.200})"
        raise InputError(f"{path}", " ".join(what.split()), "get it again, or make it anew") from None
    for name, tensor in (model.tensors | model.ema).items():
        if not tensor.is_floating_point:
            what = f"{name} is of {FORMATS[tensor.format][0]}, and no floating-point numbers"
            raise InputError(f"{path}", what, "give the file that it was made from")
    return model


def open_native(folder: Path, hashed: bool = True) -> Model:
    """A checkpoint directory, with the frozen networks that it refers to."""
    from ldm.config import from_yaml, plain

    state = native.load_state(folder)
    config = plain(from_yaml(native.load_document(folder, "config.yaml"), f"{folder / 'config.yaml'}"))
    tensors, ema = (open_pieces(folder, name) for name in ("model", "ema"))
    if not tensors:
        raise InputError(f"{folder / 'model.safetensors'}", "not found", "give a checkpoint of a run")
    for name, entry in state.get("networks", {}).items():
        own, text = open_network(folder, entry, hashed)
        config[name] = plain(from_yaml(text, f"networks/{entry['sha256'][:8]}.../config.yaml"))
        tensors |= {f"{name}.{key}": value for key, value in own.items()}
    facts = {"format": "ldm", "path": folder, "step": state["step"], "images": state.get("images")}
    facts |= {"latents_measured": state["latents_measured"]} if "latents_measured" in state else {}
    return Model(config, tensors, ema, state.get("imported", {}) | facts)


def content_hash(model: Model, weights: str = "raw") -> str:
    """sha256 that stands for the checkpoint in recipes: of the weights used, or of the file.

    For a single file its first ten digits are the model hash that other tools show.
    """
    path = Path(model.facts["path"])
    if model.facts["format"] == "ldm":
        name = "ema" if weights == "ema" and model.ema else "model"
        listed = native.load_document(path, native.MANIFEST)["files"]
        hashes = [str(listed[file.name]["sha256"]) for file in files_of(path, name)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    if path.is_file():
        return digest(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin"))
    return hashlib.sha256("".join(digest(file) for file in files).encode()).hexdigest()
