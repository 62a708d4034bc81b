"""A checkpoint of any format, stored as one of this house: `ldm import SRC DST`.

DST is a checkpoint directory without an optimizer: it samples, exports, and starts runs with init_from=.
"""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoints import native
from ldm.checkpoints.model import Model
from ldm.config import build, to_yaml
from ldm.errors import InputError


def store(model: Model, out: Path) -> Path:
    """Write the model as the checkpoint directory `out`, one tensor in memory at a time; returns it."""
    needed = sum(value.nbytes for part in (model.tensors, model.ema) for value in part.values())
    try:
        if out.exists():
            raise InputError(f"{out}", "is there already", "choose a new folder")
        native.require_space(out, needed, "choose another disk")
    except OSError as error:
        raise _unwritable(out, error) from None
    _check_schedulers(model)
    step = int(model.facts.get("step") or 0)
    known = {
        key: value for key, value in model.facts.items() if key not in ("path", "format", "step", "images")
    }
    known["source"] = f"{model.facts['format']} {Path(model.facts['path']).name}"
    state = {"step": step, "images": model.facts.get("images"), "networks": {}, "imported": known}
    tensors = {"model": model.tensors} | ({"ema": model.ema} if model.ema else {})
    try:
        return native.save_at(out, step, tensors, {"state.json": state, "config.yaml": to_yaml(model.config)})
    except OSError as error:
        raise _unwritable(out, error) from None


def _check_schedulers(model: Model) -> None:
    """Raises InputError for a noise scheduler that cannot be built: the checkpoint could never be opened."""
    parts = (model.config.get("conditioner") or {}).get("parts", {})
    for section in (model.config, *parts.values()):
        try:
            build(section.get("noise_scheduler") or {})
        except InputError as error:
            raise InputError(f"{model.facts['path']}: noise_scheduler", f"{error}") from None


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out!s:.100}", f"cannot write there ({error.strerror or error})")
