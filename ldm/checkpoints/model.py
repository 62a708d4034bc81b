"""What a checkpoint of any format says, in this house's words: a config to build networks by, and tensors.

Readers of foreign formats make a `Model`, writers take one. Nothing is read but headers until a tensor is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoints.lazy import LazyTensor

NETWORKS = ("autoencoder", "conditioner", "backbone")


@dataclass(frozen=True)
class Asked:
    """What the user says of a foreign file that its tensors cannot tell; None: not said.

    config           the original YAML that the model was trained by
    prediction_type  epsilon | v_prediction | sample
    num_heads        of the U-Net's attention, at every level
    head_dim         or their width, at every level
    text_heads       of a text tower of no published size
    latent_scale     of an autoencoder without its U-Net
    """

    config: Path | None = None
    prediction_type: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    text_heads: int | None = None
    latent_scale: float | None = None


@dataclass
class Model:
    """A checkpoint, opened.

    config   sections as in a run's config.yaml: autoencoder, conditioner, backbone, noise_scheduler (None
             where the file has none), sampler, sampling, data.image_size, run_name
    tensors  by native name: `autoencoder.`, `conditioner.` or `backbone.`, and the name in the state dict
    ema      averages of them, under the same names; of those trained alone; empty: there are none
    facts    what else is known, for people: format, family, step, images, licence, author, source, and
             notes, a list of lines: what was taken for granted, what was left out
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    ema: dict[str, LazyTensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, network: str, weights: str = "raw") -> dict[str, LazyTensor]:
        """Tensors of a network under its own names; `weights` ema: the averages where there are any."""
        prefix = f"{network}."
        found = self.tensors | self.ema if weights == "ema" else self.tensors
        return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
