"""The latent shift and scale of an autoencoder, put into the convolutions around its latents.

Here latents are (z - shift) * scale, each a number a channel; elsewhere they are z * scaling_factor, one
number that readers know by the family or from a config. What is left over goes, exactly, into quant_conv and
post_quant_conv. c latent channels, r = scale / scaling_factor [c].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints.lazy import LazyTensor, Tensors
from ldm.errors import InputError

OWN = ("latent_shift", "latent_scale")


def statistics(tensors: Tensors, section: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale of an autoencoder, float32 [c]: of its tensors, or else of its config section."""
    channels = tensors["decoder.conv_in.weight"].shape[1]
    found = []
    for name, default in zip(OWN, (0.0, 1.0), strict=True):
        value = tensors[name].read() if name in tensors else torch.tensor(section.get(name, default))
        found.append(value.to(torch.float32).expand(channels))
    return found[0], found[1]


def one_scale(shift: Tensor, scale: Tensor) -> float | None:
    """The scaling_factor that says it all; None: there is no one such number."""
    return None if shift.any() or (scale != scale[0]).any() else scale[0].item()


def folded(
    tensors: Tensors, section: Mapping[str, Any], factor: float, always: bool = False
) -> dict[str, LazyTensor]:
    """An autoencoder's tensors without shift and scale, whose z times `factor` are the latents of ours.

    mean' = r (mean - shift), log variance' = log variance + 2 ln r, z = z' / r + shift; the codes of a
    codebook move as the mean does. Nothing changes where r = 1 and shift = 0; otherwise an autoencoder
    without the two convolutions gets them (use_quant_conv). The clamp of the log variance to [-30, 20] stays
    where it is. `always`: the two convolutions are there afterwards, needed or not. Raises InputError for a
    codebook whose r differs by channel: it would choose other codes.
    """
    shift, scale = statistics(tensors, section)
    rest = {name: value for name, value in tensors.items() if name not in OWN}
    factor = torch.tensor(factor, dtype=torch.float32).item()  # as those who multiply by it have it
    needed = bool(shift.any() or (scale != factor).any())
    if not needed and not (always and "quant_conv.weight" not in rest):
        return rest
    ratio, shift = scale.double() / factor, shift.double()
    codebook = "quantize.embedding.weight" in rest
    if codebook and (ratio != ratio[0]).any():
        what = f"its latent_scale differs by channel ({scale.tolist()}), which a codebook cannot take in"
        raise InputError("autoencoder", what, "measure one scale for all channels")
    c = len(ratio)
    moments = c if codebook else 2 * c
    dtype = rest["decoder.conv_in.weight"].dtype
    for name, size in (("quant_conv", moments), ("post_quant_conv", c)):
        rest.setdefault(f"{name}.weight", LazyTensor.of(torch.eye(size, dtype=dtype)[:, :, None, None]))
        rest.setdefault(f"{name}.bias", LazyTensor.of(torch.zeros(size, dtype=dtype)))
    factors, offsets = torch.ones(moments).double(), torch.zeros(moments).double()
    factors[:c] = ratio
    if not codebook:
        offsets[c:] = 2 * ratio.log()
    moved = torch.cat([shift, torch.zeros(moments - c)])
    after = rest["post_quant_conv.weight"]

    def bias(post: Tensor) -> Tensor:
        return post + after.read().double().flatten(1) @ shift

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "quant_conv.weight": lambda w: w * factors[:, None, None, None],
        "quant_conv.bias": lambda b: (b - moved) * factors + offsets,
        "post_quant_conv.weight": lambda w: w / ratio[None, :, None, None],
        "post_quant_conv.bias": bias,
    }
    if codebook:
        changes["quantize.embedding.weight"] = lambda codes: (codes - shift) * ratio
    for name, change in changes.items():
        rest[name] = _changed(rest[name], change)
    return rest


def _changed(lazy: LazyTensor, change: Callable[[Tensor], Tensor]) -> LazyTensor:
    def read() -> Tensor:
        value = lazy.read()
        found = change(value.double()).to(lazy.dtype)
        if value.isfinite().all() and not found.isfinite().all():
            what = f"its latent_shift and latent_scale leave no finite numbers ({lazy.dtype})"
            raise InputError("autoencoder", what, "measure them again")
        return found

    return LazyTensor(lazy.shape, lazy.dtype, read)
