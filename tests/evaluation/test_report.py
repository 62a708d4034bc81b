"""Scores meet their bars: the references pass, blurred reconstructions and wrong pictures do not."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.errors import InputError
from ldm.evaluation.report import (
    BARS,
    evaluate,
    held_out_images,
    report_autoencoder,
    report_diffusion,
)


class Fading(nn.Module):
    """An autoencoder whose reconstructions have `fade` of the contrast."""

    def __init__(self, fade):
        super().__init__()
        self.fade = nn.Parameter(torch.tensor(fade))

    def encode(self, x, noise=None):
        return x

    def decode(self, x):
        return x * self.fade


class Perfect:
    """A pipeline that draws the references, perhaps of the wrong objects."""

    def __init__(self, tiny_set, shift=0, fade=1.0):
        self.set, self.shift, self.autoencoder = tiny_set, shift, Fading(fade)

    def __call__(self, prompts, **options):
        assert len(prompts) == 12
        return [Image.fromarray(self.set.picture((i + self.shift) % 12, j)) for i, j in self.set.held_out]


def test_references_pass_and_every_bar_is_shown(tiny_set):
    report = evaluate(Perfect(tiny_set), tiny_set)
    assert report.passed
    assert set(BARS) <= set(report.scores)
    table = report.table()
    assert "BELOW" not in table
    assert table.count("ok") == 4
    for text in (">= 98 %", ">= 80 %", ">= 25.00 dB", ">= 0.8", "chance"):
        assert text in table
    loaded = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert loaded["passed"]
    assert loaded["scores"]["object"] == 1.0
    assert len(loaded["pairs"]) == 12


@pytest.mark.parametrize("options", [{"shift": 1}, {"fade": 0.8}])
def test_below_a_bar_fails(tiny_set, options):
    report = evaluate(Perfect(tiny_set, **options), tiny_set)
    assert not report.passed
    assert "BELOW" in report.table()


def test_only_what_was_asked(tiny_set):
    report = evaluate(Perfect(tiny_set, shift=1), tiny_set, metrics=("reconstruction",))
    assert set(report.scores) == {"psnr", "psnr_pooled", "edge_energy"}
    assert report.passed
    with pytest.raises(InputError, match="metrics: unknown 'psnr'; choose from composition"):
        evaluate(Perfect(tiny_set), tiny_set, metrics=("psnr",))


def test_distances_carry_the_name_of_their_network(tiny_set):
    pytest.importorskip("torchmetrics")
    network = nn.Flatten()
    network.name = "PIXELS"
    inner = network.forward
    network.forward = lambda x: inner(x[:, :, ::4, ::4].float() / 255)
    report = evaluate(Perfect(tiny_set, shift=4), tiny_set, ("kid", "fid"), network=network)
    assert {"KID-PIXELS", "FID-PIXELS"} <= set(report.scores)
    assert "object" not in report.scores
    assert "not comparable to published" in report.table()


def test_held_out_images(tiny_set):
    images = held_out_images(tiny_set)
    assert images.shape == (12, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert images[1, :, 0, 0].tolist() == tiny_set.colours[1].tolist()


def test_lines_at_the_end_of_training(tiny_set, tmp_path):
    data = SimpleNamespace(emoji_set=tiny_set)
    line = report_autoencoder(Perfect(tiny_set, fade=0.9), tmp_path, data)
    assert re.fullmatch(r"PSNR \d+\.\d dB \(pooled \d+\.\d\), edge energy 0\.81", line)
    assert report_diffusion(Perfect(tiny_set), tmp_path, data).startswith(
        "held-out: background 100 %, object 100 %"
    )
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 144
