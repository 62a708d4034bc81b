"""The perceptual distances that a config can name: LPIPS from files or a download, and a packaged one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.autoencoder.perceptual import LPIPS, FeatureDistance
from ldm.errors import InputError
from ldm.evaluation.distribution import EfficientNetLite0

# (address, sha256): torchvision's VGG16 of ImageNet, and the weights of LPIPS 0.1 for its channels
DOWNLOADS = (
    (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    (
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
        "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
)
WHERE = "perceptual.weights"


def lpips(weights: str) -> LPIPS:
    """LPIPS on VGG16 with the weights of files, separated by commas, of `download`, or of `random`.

    A file is safetensors, or tensors saved by torch: VGG16 in torchvision's names and the channels' weights
    in those of the package lpips, in one or two files. `download` (554 MB, once) keeps them where torch.hub
    does. Raises InputError.
    """
    distance = LPIPS()
    if weights != "random":
        found: dict[str, Tensor] = {}
        for path in _downloaded() if weights == "download" else [Path(part) for part in weights.split(",")]:
            found |= _tensors(path)
        try:
            distance.load_weights(found)
        except ValueError as error:
            fix = "give VGG16 (torchvision) and the weights of lpips: FILE,FILE"
            raise InputError(f"{WHERE}={weights}", str(error), fix) from None
    return distance


def packaged_feature_distance() -> FeatureDistance:
    """Unweighted distance in EfficientNet-Lite0, before it halves the size and at its end; no download.

    For pictures whose sides are multiples of 32. Not comparable to LPIPS.
    """
    network: nn.Module = EfficientNetLite0("perceptual").network
    layers = ("_blocks.0", "_blocks.2", "_blocks.4", "_blocks.10", "_blocks.15")
    # It was trained on (level - 127) / 128, and images are level / 127.5 - 1.
    return FeatureDistance(
        Features(network), [f"network.{name}" for name in layers], [-0.5 / 127.5] * 3, [128 / 127.5] * 3
    )


class Features(nn.Module):
    """A classifier without its last layers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)  # type: ignore[operator, no-any-return]


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{WHERE}={path}", "no such file", "give a file, or download")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return dict(found.get("state_dict", found))
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are formats
        fix = "give safetensors, or tensors saved by torch"
        raise InputError(f"{WHERE}={path}", "is no file of tensors", fix) from error


def cached_files() -> list[Path]:
    """Where `download` keeps its files, whether they are there or not."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return [folder / ("lpips-vgg.pth" if "lpips" in a else a.rpartition("/")[2]) for a, _ in DOWNLOADS]


def _downloaded() -> list[Path]:
    paths = cached_files()
    for path, (address, sha256) in zip(paths, DOWNLOADS, strict=True):
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address, str(path), sha256, progress=False)
            except (OSError, RuntimeError) as error:  # no network, a full disk; a wrong hash
                what = f"cannot fetch {address} ({error})"
                raise InputError(f"{WHERE}=download", what, f"put the file at {path}") from None
    return paths
