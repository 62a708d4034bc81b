"""What a network is, as one hash: so that what was computed with it is never taken for another's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.files import load_tensors
from ldm.data.cached import NULL, TEXT, CachedDataModule
from ldm.errors import InputError
from ldm.training.hidden import hidden
from ldm.training.module import TrainingModule
from ldm.types import Batch, Conditioning

TOLERANCE = 1e-2  # of the largest number: number formats and devices may differ


def fingerprint(network: nn.Module) -> str:
    """sha256 over names, shapes and bytes of its tensors and over what no tensor tells, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    for name, said in sorted(hidden(network).items()):
        digest.update(f"{name} {said}\n".encode())
    return digest.hexdigest()


def text_towers(conditioner: Any) -> Any:
    """The part of a conditioner whose outputs can be made beforehand, or None.

    Raises `InputError` if it needs pictures, which nobody has who reads a cache.
    """
    if conditioner.source_scale is not None:
        what = f"{type(conditioner).__name__} is shown the pictures, and a cache holds latents alone"
        raise InputError("conditioner", what, "use data=shards")
    return conditioner.towers()


def connect(module: TrainingModule, data: Any) -> None:
    """Tell the data how captions are read, and refuse a cache that other networks made."""
    data.tokenize = module.tokenizer
    if not isinstance(data, CachedDataModule):
        return
    autoencoder = module.frozen.get("autoencoder")
    if autoencoder is None:
        return data.require(None, None)
    towers = text_towers(module.frozen.get("conditioner") or getattr(module, "conditioner", None))
    data.require(fingerprint(autoencoder), None if towers is None else fingerprint(towers))
    if data.reads_text:
        data.tokenize = None
        for folder in data.folders():
            require_null(towers, folder)


@torch.no_grad()
def null_of(towers: Any) -> dict[str, Tensor]:
    """What text towers give where a caption is dropped, one row a field."""
    n = torch.zeros(1, dtype=torch.int64, device=next(towers.parameters()).device)
    return named(towers.null(towers(Batch(n, torch.ones_like(n), caption=[""]))))


def named(given: Conditioning) -> dict[str, Tensor]:
    """The fields that a cache keeps of it."""
    found = {kind: getattr(given, kind) for kind in TEXT}
    return {kind: value for kind, value in found.items() if value is not None}


def require_null(towers: Any, folder: Path) -> None:
    """Equal weights may be run in another way (another release of open_clip): compare what comes out."""
    mine, theirs = null_of(towers), load_tensors(folder, Path(NULL).stem)
    for kind, value in mine.items():
        error = float((value.float() - theirs[kind].float()).abs().max())
        if error > TOLERANCE * max(1.0, float(value.abs().max())):
            what = f"the text towers give another {kind} for a dropped caption than in {folder / NULL}"
            raise InputError("data.shards", f"{what} (by up to {error:.3g})", "make the cache anew")
