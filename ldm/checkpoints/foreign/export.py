"""`ldm export`: a checkpoint as other programs open it, loaded back and compared before it gets its name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.checkpoints.files import digest, sync, write
from ldm.checkpoints.foreign import folder_in, folder_out, single_file, single_file_out
from ldm.checkpoints.foreign.card import beside, card
from ldm.checkpoints.foreign.fold import one_scale, statistics
from ldm.checkpoints.foreign.granted import heads_of, prediction_of, sizes
from ldm.checkpoints.foreign.loadback import Compared, compare, compare_averages
from ldm.checkpoints.foreign.towers import towers
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import NETWORKS, Asked, Model
from ldm.checkpoints.native import require_space
from ldm.config import build
from ldm.errors import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Write = Callable[[Model, Path, torch.dtype | None, str, bool], list[str] | None]
Read = Callable[[Path, Asked], Model]


def _folder(model: Model, out: Path, dtype: torch.dtype | None, weights: str, full: bool) -> list[str]:
    return folder_out.write(model, out, dtype, weights)


def _autoencoder(model: Model, out: Path, dtype: torch.dtype | None, weights: str, full: bool) -> None:
    single_file_out.write_autoencoder(model, out, dtype, weights)


FORMATS: dict[str, tuple[Write, Read]] = {
    "diffusers": (_folder, folder_in.read),
    "single-file": (single_file_out.write, single_file.read),
    "autoencoder": (_autoencoder, single_file.read),
}


@dataclass(frozen=True)
class Report:
    """What an export did: files as (name, bytes, sha256), what was compared, notes."""

    out: Path
    files: list[tuple[str, int, str]]
    compared: list[Compared]
    notes: list[str]

    def lines(self) -> list[str]:
        found = [
            f"{c.network:14}{c.tensors:6,} tensors   max difference {c.most:.3g}, relative {c.relative:.2g}"
            for c in self.compared
        ]
        for name, size, sha256 in self.files:
            short = "" if "/" in name else f"   model hash {sha256[:10]}"  # as A1111 shows it
            found.append(f"{name}   {size:,} bytes   sha256 {sha256}{short}")
        return [*found, *(f"note: {note}" for note in self.notes)]


def export(
    model: Model,
    out: Path,
    form: str = "diffusers",
    weights: str = "ema",
    dtype: str | None = None,
    full: bool = False,
) -> Report:
    """Write `model` to `out`, which must not be there: a folder, or with `form` a file and its card NAME.md.

    form     diffusers | single-file | autoencoder
    weights  ema: the averages, where there are; raw: those that the optimizer last left
    dtype    fp32 | fp16 | bf16, of the networks; None: as they are
    full     of a single file: raw weights and averages both

    What was written is read back and compared with what was meant; only then it gets its name. Raises
    InputError, with nothing written, for what has no place in the format, too little space, or a difference.
    """
    (put, read), number = FORMATS[form], None if dtype is None else DTYPES[dtype]
    try:
        _check_place(out, form, full)
    except OSError as error:
        raise _unwritable(out, error) from None
    part = {"diffusers": folder_out.alone(model), "autoencoder": "autoencoder"}.get(form)
    meant = whole(model if part is None else _alone(model, part))
    model = meant if part is None else model
    _check_space(out, meant, number, full)
    scratch = out.with_name(f"{out.stem}.tmp-{os.getpid()}{out.suffix}")
    new = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        notes = put(model, scratch, number, weights, full) or []
        if weights == "ema" and not model.ema:
            notes.append("the checkpoint has no averages: these are its weights")
        found = read(scratch, _asked(model, form))
        compared = compare(_raw_unet(meant) if full else meant, found, weights, number)
        if full:
            compared.append(compare_averages(model, found, number))
        notes += _latents(meant, found, form)
        files = _files(scratch, out)
        text = card(meant, out.name, form, weights, dtype or _number(meant), files, notes)
        if form == "diffusers":
            write(scratch / "README.md", text)
            sync(scratch)
        os.replace(scratch, out)
        if form != "diffusers":
            write(beside(out), text)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # after an export they are not empty, and stay
            for folder in new:
                folder.rmdir()
    return Report(out, files, compared, notes)


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out}", f"cannot write there ({error.strerror or error})")


def whole(model: Model) -> Model:
    """With the tensors of frozen networks that the checkpoint leaves to those who made them."""
    missing = {name for name in NETWORKS if model.config.get(name) is not None and not model.of(name)}
    tensors = dict(model.tensors)
    for name in missing:
        values = build(model.config[name]).state_dict()
        tensors |= {f"{name}.{key}": LazyTensor.of(value) for key, value in values.items()}
    return Model(model.config, tensors, model.ema, model.facts)


def _alone(model: Model, network: str) -> Model:
    """The model, less its other networks; what is known of it stays."""
    others = {name: None for name in NETWORKS if name != network} | {"noise_scheduler": None}
    own = [{k: v for k, v in t.items() if k.startswith(f"{network}.")} for t in (model.tensors, model.ema)]
    return Model(model.config | others, own[0], own[1], model.facts)


def _latents(meant: Model, found: Model, form: str) -> list[str]:
    """A note on the number that latents are multiplied by, where a reader could be in doubt."""
    if form == "diffusers" or meant.config.get("autoencoder") is None:
        return []  # a folder says it itself
    ours, theirs = (
        one_scale(*statistics(model.of("autoencoder"), model.config["autoencoder"]))
        for model in (meant, found)
    )
    if ours != theirs:
        where = "quant_conv and post_quant_conv"
        return [f"latents' own shift and scale are now in {where}: what it gives times {theirs:.5g} is left"]
    return [f"latents are what it gives times {theirs:.5g}"] if form == "autoencoder" else []


def _raw_unet(model: Model) -> Model:
    """The model without averages of its U-Net."""
    rest = {name: value for name, value in model.ema.items() if not name.startswith("backbone.")}
    return Model(model.config, model.tensors, rest, model.facts)


# ---- before and after ----------------------------------------------------------------------------------


def _check_place(out: Path, form: str, full: bool) -> None:
    for path in [out] if form == "diffusers" else [out, beside(out)]:
        if path.exists():
            raise InputError(f"{path}", "is there already", "choose a new name")
    if form != "diffusers" and out.suffix != ".safetensors":
        raise InputError(f"{out}", "this format is a safetensors file", "let its name end in .safetensors")
    if full and form != "single-file":
        raise InputError("--full", "is of single files alone", "use --format single-file, or leave it out")


def _check_space(out: Path, model: Model, dtype: torch.dtype | None, full: bool) -> None:
    """Room for the weights, and the averages beside them in a full file."""
    parts: list[Mapping[str, LazyTensor]] = [model.tensors, model.ema if full else {}]
    needed = sum((v if dtype is None else v.to(dtype)).nbytes for part in parts for v in part.values())
    require_space(out, needed, "choose another disk")


def _asked(model: Model, form: str) -> Asked:
    """What the file's tensors do not tell our own reader."""
    if form == "diffusers":
        return Asked()
    if form == "autoencoder":
        return Asked(latent_scale=single_file_out.autoencoder_scale(model))
    family, _ = single_file_out.family_in(model)
    models = [
        tower.section.get("model")
        for tower in towers(model.config.get("conditioner"), model.of("conditioner"))
    ]
    heads = [sizes["heads"] for sizes in models if isinstance(sizes, Mapping)]
    split = heads_of(sizes(model.config["backbone"]))
    return Asked(
        prediction_type=prediction_of(model),
        num_heads=split.get("num_heads"),
        head_dim=split.get("head_dim"),
        text_heads=heads[0] if heads else None,
        latent_scale=family.latent_scale,
    )


def _number(model: Model) -> str:
    found = {
        str(value.dtype).removeprefix("torch.")
        for value in model.tensors.values()
        if value.dtype.is_floating_point
    }
    return ", ".join(sorted(found))


def _files(scratch: Path, out: Path) -> list[tuple[str, int, str]]:
    """Files of tensors by the names that they will have."""
    if scratch.is_file():
        return [(out.name, scratch.stat().st_size, digest(scratch))]
    found = sorted(scratch.rglob("*.safetensors"))
    return [(f"{path.relative_to(scratch)}", path.stat().st_size, digest(path)) for path in found]
