"""Model cards: what is known is there, what is not known is said to be so, and nothing of this machine."""

import pytest
import yaml

from ldm.checkpoints.foreign.card import beside, card
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Model

FILES = [("a.safetensors", 1234567, "ab" * 32)]
CONFIG = {
    "run_name": "birds",
    "init_from": "/data/somebody/runs/before",
    "module": {"drop": 0.1},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-4},
    "data": {
        "_target_": "ldm.data.datamodule.ShardDataModule",
        "shards": "/data/secret/birds-{00000..00009}.tar",
        "image_size": 256,
        "global_batch_size": 2048,
        "filters": [{"_target_": "ldm.data.filters.MinValue", "column": "aesthetic", "value": 5.0}],
    },
    "backbone": None,
    "noise_scheduler": {
        "_target_": "ldm.diffusion.noise_scheduler.VariancePreserving",
        "prediction_type": "v_prediction",
        "zero_terminal_snr": True,
    },
}
FACTS = {"format": "ldm", "path": "/data/somebody/runs/birds/checkpoints/step-000012000", "step": 12000}


def text_of(model, form="single-file", notes=()):
    return card(model, "a.safetensors", form, "ema", "fp16", FILES, notes)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_what_a_run_knows_is_told():
    facts = FACTS | {"images": 24576000, "licence": "CreativeML Open RAIL-M", "author": "A | B"}
    model = Model(CONFIG, {}, {"backbone.a": None}, facts)
    text = text_of(model, notes=["something to know"])
    found = rows(text)
    assert found["licence"] == "CreativeML Open RAIL-M"
    assert found["author"] == "A / B"
    assert found["trained as"] == "birds"
    assert found["trained on"] == "ShardDataModule; shards birds-{00000..00009}.tar; MinValue aesthetic 5.0"
    assert (found["optimizer steps"], found["images seen"]) == ("12,000", "24,576,000")
    assert found["resolution"] == "256 x 256 pixels"
    assert found["predicts"] == "the velocity v (v_prediction), VariancePreserving, zero terminal SNR"
    assert found["captions dropped in training"] == "10%"
    assert found["started from"] == "before"
    assert (found["optimizer"], found["learning rate"]) == ("AdamW", "0.0001")
    assert found["global batch"] == "2,048"
    assert found["from"] == "step-000012000 (ldm)"
    assert (found["weights"], found["number format"]) == ("averages (EMA), where there are", "fp16")
    assert "- something to know\n" in text
    assert f"- `a.safetensors` 1,234,567 bytes, sha256 `{'ab' * 32}`" in text
    assert "somebody" not in text
    assert "/data" not in text


def test_what_is_not_known_is_said_to_be_not_known():
    text = text_of(Model({"backbone": None}, {}))
    found = rows(text)
    for name in (
        "author",
        "trained as",
        "trained on",
        "optimizer steps",
        "images seen",
        "resolution",
        "optimizer",
    ):
        assert found[name] == "not known"
    assert found["licence"].startswith("not known")
    assert found["from"] == "not known"
    assert found["weights"] == "raw"
    assert front_matter(text)["license"] == "unknown"


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("CreativeML Open RAIL++-M", {"license": "openrail++"}),
        ("MIT", {"license": "mit"}),
        ('my "own"', {"license": "other", "license_name": "my 'own'"}),
    ],
)
def test_licences_have_the_words_of_the_hub(licence, said):
    found = front_matter(text_of(Model({"backbone": None}, {}, {}, {"licence": licence})))
    assert {key: found[key] for key in found if key.startswith("license")} == said


@pytest.mark.parametrize(
    ("slug", "form", "task", "call"),
    [
        ("sd1", "diffusers", "text-to-image", 'StableDiffusionPipeline.from_pretrained("a.safetensors")'),
        ("sd1", "single-file", "text-to-image", "StableDiffusionPipeline.from_single_file("),
        ("sdxl", "single-file", "text-to-image", "StableDiffusionXLPipeline.from_single_file("),
        ("upscaler", "single-file", "image-to-image", "StableDiffusionUpscalePipeline.from_single_file("),
        ("ldm_class", "single-file", None, "open no single file of this kind"),
        ("sd1", "autoencoder", None, "AutoencoderKL.from_single_file("),
    ],
)
def test_how_to_use_it(slug, form, task, call, small):
    text = text_of(small(slug)[0], form)
    assert call in text
    found = front_matter(text)
    assert found.get("pipeline_tag") == task
    assert found["library_name"] == "diffusers"
    assert slug.replace("_", "-") in found["tags"]


def test_published_sizes_open_in_other_programs(sd_names):
    unet = {
        "_target_": "ldm.backbones.unet.CrossAttentionUNet",
        "num_heads": 8,
        "transformer_depth": [1, 1, 1, 0],
        "mid_depth": 1,
    }
    text = text_of(Model({"backbone": unet}, {"backbone.a": LazyTensor((1,), "F32", None)}))
    assert rows(text)["kind"] == "Stable Diffusion 1"
    assert "A1111: put it into `models/Stable-diffusion/`. ComfyUI: into `models/checkpoints/`." in text


def test_the_card_of_a_file_is_beside_it(tmp_path):
    assert beside(tmp_path / "a.fp16.safetensors") == tmp_path / "a.fp16.md"
