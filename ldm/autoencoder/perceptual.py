"""Distance of two pictures in the features of a frozen network, for a loss that sees what people see.

Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (LPIPS), 2018
(arXiv:1801.00924), equation 1: features of unit length at every place, squared differences weighted by
channel, mean over places, sum over layers. Files of weights are read in ldm/evaluation/perceptual.py.
b batch, c channels, h w size of a feature map, H W image size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-8  # added to the squared length of features, whose root has no slope at 0
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: halve the size
VGG16_LAYERS = {"3": 64, "8": 128, "15": 256, "22": 512, "29": 512}  # relu1_2, 2_2, 3_3, 4_3, 5_3: channels
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]


class FeatureDistance(nn.Module):
    """(output, target), images [b 3 H W] in [-1, 1] -> distance [b], in float32 at least.

    `network` is given (images - shift) / scale; `layers` names those of its submodules whose outputs
    [b c h w] are compared. Channels count alike; a subclass weighs them by `channel_weights`. No gradient
    flows to the target.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: nn.Module, layers: Sequence[str], shift: Sequence[float], scale: Sequence[float]
    ) -> None:
        super().__init__()
        self.network, self.layers = network, tuple(layers)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self._maps: list[Tensor] = []
        for name in self.layers:
            network.get_submodule(name).register_forward_hook(self._keep)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if output.shape != target.shape:
            raise ValueError(f"output has shape {list(output.shape)}, target {list(target.shape)}")
        with torch.no_grad():
            expected = self.features(target)
        distances = [
            (a - b).square().mul(w).sum(1).mean((1, 2))
            for a, b, w in zip(self.features(output), expected, self.channel_weights(), strict=True)
        ]
        return torch.stack(distances).sum(0)

    def channel_weights(self) -> Sequence[Tensor | float]:
        """One of [1 c 1 1] a layer, or a number."""
        return [1.0] * len(self.layers)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features [b c h w] of each layer."""
        self._maps.clear()
        self.network((images - self.shift) / self.scale)
        maps, self._maps = self._maps, []
        return [x / (x.square().sum(1, keepdim=True) + EPS).sqrt() for x in maps]

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._maps.append(output.to(torch.promote_types(output.dtype, torch.float32)))


class LPIPS(FeatureDistance):
    """LPIPS on VGG16 (version 0.1): about 0 for equal pictures, above 0.7 for unrelated ones.

    Untrained until `load_weights`. Names in the state dict: network.N as torchvision's features.N, and
    lins.K for the weights of layer K, [1 c 1 1].
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        incoming = 3
        for width in VGG16:
            if width:
                layers += [nn.Conv2d(incoming, width, 3, padding=1), nn.ReLU()]
                incoming = width
            else:
                layers.append(nn.MaxPool2d(2))
        super().__init__(nn.Sequential(*layers), list(VGG16_LAYERS), LPIPS_SHIFT, LPIPS_SCALE)
        self.lins = nn.ParameterList([torch.full((1, c, 1, 1), 1 / c) for c in VGG16_LAYERS.values()])

    def channel_weights(self) -> Sequence[Tensor]:
        return list(self.lins)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Names of torchvision's vgg16 and of the package lpips, in any mix; what else there is, is ignored.

        ValueError if a tensor is missing or has another shape.
        """
        found = {own_name(name): value for name, value in tensors.items()}
        own = self.state_dict()
        for name, value in own.items():
            if name not in found:
                raise ValueError(f"no tensor {name} among the {len(tensors)} that are given")
            if found[name].shape != value.shape:
                shapes = f"{list(found[name].shape)}, expected {list(value.shape)}"
                raise ValueError(f"{name} has shape {shapes}")
        self.load_state_dict({name: found[name] for name in own})


def own_name(name: str) -> str:
    """features.0.weight, net.slice1.0.weight -> network.0.weight; lin0.model.1.weight -> lins.0."""
    name = re.sub(r"^(net\.slice\d|features)\.(\d+)\.", r"network.\2.", name)
    return re.sub(r"^lin(\d)\.model\.\d\.weight$", r"lins.\1", name)
