"""Classes: prompts to rows, labels from shards to batches, and sampling by class."""

import io
import json

import pytest
import torch
import webdataset as wds
from PIL import Image
from torch import nn

from ldm.conditioning.label import ClassLabel, ClassToken
from ldm.data.datamodule import ShardDataModule
from ldm.diffusion.noise_scheduler import RectifiedFlow
from ldm.diffusion.samplers import ddim
from ldm.errors import InputError
from ldm.pipeline import Pipeline
from ldm.types import Batch

NAMES = ["tabby cat", "Golden Retriever", "tree frog"]


def batch(labels=None, captions=None):
    b = len(labels if captions is None else captions)
    return Batch(torch.arange(b), torch.ones(b), label=labels, caption=captions)


def test_a_prompt_is_an_index_or_a_name():
    conditioner = ClassLabel(4, NAMES)
    prompts = ["0", " 2 ", "golden retriever", "Tree frog", ""]
    assert conditioner(batch(captions=prompts)).label.tolist() == [0, 2, 1, 2, 3]
    both = Batch(torch.arange(2), torch.ones(2), label=torch.tensor([1, -1]), caption=["0", "0"])
    assert conditioner(both).label.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("golden retriver", "prompt='golden retriver': no such class; did you mean 'golden retriever'"),
        ("3", "no such class; give 0 to 2"),  # the null class has no index
        ("-1", "no such class"),
        ("1.5", "no such class"),
    ],
)
def test_other_prompts_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        ClassLabel(4, NAMES)(batch(captions=[prompt]))


def test_the_token_is_the_row_of_the_embedding():
    conditioner = ClassToken(4, 8, NAMES)
    labels = torch.tensor([2, -1])
    context = conditioner(batch(labels)).context
    assert torch.equal(context, conditioner.embedding.weight[[2, 3]][:, None])
    assert conditioner.num_classes is None
    conditioner.null(conditioner(batch(labels))).context.sum().backward()
    assert conditioner.embedding.weight.grad.abs().sum(1).tolist() == [0, 0, 0, 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassLabel(1), "num_classes=1 is below 2"),
        (lambda: ClassLabel(4, ["a", "b"]), "num_classes=4 with the null class, but there are 2 names"),
        (lambda: ClassLabel(4, context_dim=8), "context_dim=8, but a label is no context"),
    ],
)
def test_wrong_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_read_is_refused():
    with pytest.raises(ValueError, match="needs batch.label or batch.caption"):
        ClassLabel(4)(Batch(torch.arange(1), torch.ones(1)))
    with pytest.raises(InputError, match="prompt_weights=true: this checkpoint reads no text"):
        ClassLabel(4).reading(weighted=True)


@pytest.fixture
def shards(tmp_path):
    """Class 10 k for picture k: in KEY.cls without a caption, in the json with one, and nowhere."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    ways = [{"cls": 0}, {"txt": "one", "json": json.dumps({"label": 10}).encode()}, {"txt": "none"}]
    ways += [{"cls": 30, "json": json.dumps({"label": 5}).encode()}, {"cls": "a"}]
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for k, way in enumerate(ways):
            tar.write({"__key__": str(k), "png": buffer.getvalue(), **way})
    return tmp_path / "a.tar"


def test_labels_come_from_the_shards(shards):
    data = ShardDataModule(str(shards), image_size=8, global_batch_size=4)
    found = next(iter(data.stream()))
    labels = {key[-1]: label for key, label in zip(found.key, found.label.tolist(), strict=True)}
    assert labels == {"0": 0, "1": 10, "2": -1, "3": 30}
    assert found.label.dtype == torch.int64
    assert sorted(found.caption) == ["", "", "none", "one"]
    assert data.sources[0].index.damage == {"bad_label": 1}


class Shade(nn.Module):
    """An exact denoiser of flat pictures whose shade is the class."""

    in_channels = out_channels = 3

    def forward(self, x, time, conditioning):
        shade = torch.tensor([-0.8, 0.0, 0.8, 0.3])[conditioning.label].view(-1, 1, 1, 1)
        return (x - shade) / (time / 1000).view(-1, 1, 1, 1)


class Pixels(nn.Module):
    factor, latent_channels = 1, 3

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents


def test_a_pipeline_draws_a_class():
    sampling = {"num_steps": 2, "spacing": "uniform", "guidance_scale": 1.0, "height": 4, "width": 4}
    pipe = Pipeline(Pixels(), ClassLabel(4, NAMES), Shade(), RectifiedFlow(), ddim, sampling, device="cpu")
    pictures = pipe(["0", "tree frog", ""])
    assert [p.getpixel((0, 0))[0] for p in pictures] == [25, 230, 166]
    with pytest.raises(InputError, match="no such class"):
        pipe("a red apple")
