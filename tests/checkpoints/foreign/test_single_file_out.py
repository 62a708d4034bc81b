"""Single files in the original names: names, tables, options, refusals; what is written reads back."""

import hashlib
import json

import numpy as np
import pytest
import torch

from ldm.checkpoints.building import networks
from ldm.checkpoints.foreign import single_file, single_file_out
from ldm.checkpoints.foreign.families import FAMILIES
from ldm.checkpoints.lazy import FORMAT_OF, LazyTensor, open_safetensors
from ldm.checkpoints.model import Asked, Model
from ldm.errors import InputError

SLUGS = [
    pytest.param(family.slug, marks=[pytest.mark.slow] if family.slug.endswith(("inpaint", "depth")) else [])
    for family in FAMILIES
]
SCHEDULES = {"upscaler": (0.0001, 0.02), "ldm_class": (0.0015, 0.0195)}
OURS_LACK = ("logit_scale", "cond_stage_model.model.text_projection")  # no network here has them
RESIDUAL = "ldm.autoencoder.residual.ResidualAutoencoderKL"
FLOW = "ldm.diffusion.noise_scheduler.RectifiedFlow"


def values(path):
    return {name: value.read() for name, value in open_safetensors(path)[0].items()}


def original_tables(start, end):
    """As register_schedule of latent diffusion computes them."""
    betas = (torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).numpy()
    kept = np.cumprod(1.0 - betas, axis=0)
    before = np.append(1.0, kept[:-1])
    variance = betas * (1.0 - before) / (1.0 - kept)
    return {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - kept),
        "log_one_minus_alphas_cumprod": np.log(1.0 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / kept),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / kept - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1.0 - kept),
        "posterior_mean_coef2": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - kept),
    }


@pytest.mark.parametrize("slug", SLUGS)
def test_every_family_is_written_as_it_was_read(slug, small, asked, sd_names, tmp_path):
    model, tensors = small(slug)
    path = tmp_path / "out.safetensors"
    single_file_out.write(model, path)
    found = values(path)
    lacking = {name for name in tensors if name.endswith(OURS_LACK)}
    assert found.keys() - tensors.keys() <= sd_names.buffers(slug).keys()
    assert tensors.keys() - found.keys() == lacking
    for name in tensors.keys() - lacking:
        assert torch.equal(found[name], tensors[name]), name
    start, end = SCHEDULES.get(slug, (0.00085, 0.012))
    tables = {
        name: torch.tensor(table, dtype=torch.float32) for name, table in original_tables(start, end).items()
    }
    if slug.startswith("sdxl"):
        kept = original_tables(start, end)["alphas_cumprod"]
        tables = {"denoiser.sigmas": torch.tensor((1 - kept) / kept, dtype=torch.float32) ** 0.5}
    if slug == "upscaler":
        noise = list(original_tables(0.0001, 0.02).items())[:8]
        tables |= {f"low_scale_model.{name}": torch.tensor(t, dtype=torch.float32) for name, t in noise}
    assert found.keys() - tensors.keys() == tables.keys()
    for name, table in tables.items():
        assert torch.equal(found[name], table), name
    again = single_file.read(path, asked(slug))
    assert {k: v for k, v in again.config.items() if k != "run_name"} == {
        k: v for k, v in model.config.items() if k != "run_name"
    }
    assert again.tensors.keys() == model.tensors.keys()
    assert all(torch.equal(again.tensors[n].read(), v.read()) for n, v in model.tensors.items())


def sparse(path, shapes):
    """A file of float32 (position_ids int64) whose header is true, and whose values take no place."""
    kinds = {n: torch.int64 if n.endswith("position_ids") else torch.float32 for n in shapes}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * kinds[name].itemsize
        header[name] = {
            "dtype": FORMAT_OF[str(kinds[name])],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("slug", "count"), [("sd1", 1143), pytest.param("sdxl", None, marks=pytest.mark.slow)]
)
def test_the_published_sizes_have_the_published_names(slug, count, sd_names, tmp_path):
    """Names, shapes and numbers of tensors alone are looked at: no value is read."""
    sparse(tmp_path / "in.safetensors", sd_names.single_file(slug, with_buffers=False))
    model = single_file.read(tmp_path / "in.safetensors", Asked())
    found = single_file_out.contents(model)
    wanted = {n: s for n, s in sd_names.single_file(slug).items() if not n.endswith("logit_scale")}
    assert {name: value.shape for name, value in found.items()} == wanted
    kinds = {torch.int64 if n.endswith("position_ids") else torch.float32: 0 for n in found}
    assert {value.dtype for value in found.values()} == kinds.keys()
    if count:
        assert len(found) == count == 12 + 686 + 248 + 197
        model.ema = {name: value for name, value in model.tensors.items() if name.startswith("backbone.")}
        full = single_file_out.contents(model, full=True)
        assert len(full) == 1831
        assert {n: v.shape for n, v in full.items()} == sd_names.single_file(slug, ema=True)


@pytest.fixture
def trained(small):
    """A small model of SD 1 with averages of its U-Net, half of its weights."""
    model, tensors = small("sd1")
    model.ema = {
        name: LazyTensor.of(0.5 * value.read())
        for name, value in model.tensors.items()
        if name.startswith("backbone.")
    }
    model.facts |= {"step": 7}
    return model, tensors


UNET = "model.diffusion_model.out.2.weight"


def test_weights_are_the_averages_or_raw_ones_or_both(trained, tmp_path):
    model, tensors = trained
    raw, average = tensors[UNET], 0.5 * tensors[UNET]
    for weights, wanted in (("ema", average), ("raw", raw)):
        single_file_out.write(model, tmp_path / f"{weights}.safetensors", weights=weights)
        found = values(tmp_path / f"{weights}.safetensors")
        assert torch.equal(found[UNET], wanted)
        assert not [name for name in found if name.startswith("model_ema")]
    single_file_out.write(model, tmp_path / "full.safetensors", full=True)
    full = values(tmp_path / "full.safetensors")
    assert torch.equal(full[UNET], raw)
    assert torch.equal(full["model_ema.diffusion_modelout2weight"], average)
    assert full["model_ema.decay"].item() == pytest.approx(0.9999)
    assert (full["model_ema.num_updates"].dtype, full["model_ema.num_updates"].item()) == (torch.int32, 7)
    assert len(full) - len(found) == 686 + 2


def test_full_needs_averages(small, tmp_path):
    with pytest.raises(InputError, match="--full: the checkpoint has no averages"):
        single_file_out.write(small("sd1")[0], tmp_path / "a.safetensors", full=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_networks_are_rounded(dtype, small, tmp_path):
    model, tensors = small("sd1")
    single_file_out.write(model, tmp_path / "half.safetensors", dtype=dtype)
    found = values(tmp_path / "half.safetensors")
    assert torch.equal(found[UNET], tensors[UNET].to(dtype))
    assert found["alphas_cumprod"].dtype == torch.float32
    ids = found["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert (ids.dtype, ids.shape, ids[0, 76].item()) == (torch.int64, (1, 77), 76)


def test_the_header_says_what_the_file_is(small, tmp_path):
    path = tmp_path / "out.safetensors"
    model, _ = small("sdxl")
    model.facts |= {"licence": "MIT", "author": "somebody"}
    single_file_out.write(model, path)
    spec = {k.removeprefix("modelspec."): v for k, v in open_safetensors(path)[1].items()}
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert spec.pop("hash_sha256") == "0x" + hashlib.sha256(data).hexdigest()
    assert len(spec.pop("date")) == 10
    assert spec == {
        "sai_model_spec": "1.0.1",
        "architecture": "latent-diffusion/sdxl",  # of other sizes than the published one
        "implementation": "https://github.com/CompVis/stable-diffusion",
        "title": "sdxl",
        "resolution": "1024x1024",
        "author": "somebody",
        "license": "MIT",
        "prediction_type": "epsilon",
    }


def test_v_prediction_and_zero_terminal_snr_are_marked(small, tmp_path):
    model, _ = small("sdxl")
    model.config["noise_scheduler"] |= {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    single_file_out.write(model, tmp_path / "out.safetensors")
    said = single_file.read(
        tmp_path / "out.safetensors", Asked(head_dim=16, text_heads=4, latent_scale=0.13025)
    )
    scheduler = said.config["noise_scheduler"]
    assert (scheduler["prediction_type"], scheduler["zero_terminal_snr"]) == ("v_prediction", True)


def test_an_autoencoder_with_statistics_of_its_own(small, asked, tmp_path):
    """They are folded: the file's autoencoder, at the family's scale, makes the same latents and pictures."""
    model, _ = small("sd1")
    torch.manual_seed(0)
    model.tensors["autoencoder.latent_shift"] = LazyTensor.of(torch.randn(4))
    model.tensors["autoencoder.latent_scale"] = LazyTensor.of(torch.rand(4) + 0.5)
    single_file_out.write(model, tmp_path / "out.safetensors")
    single_file_out.write_autoencoder(model, tmp_path / "vae.safetensors")
    mine = networks(model)["autoencoder"].double()
    images, latents = torch.randn(1, 3, 32, 32).double(), torch.randn(1, 4, 4, 4).double()
    for name in ("out", "vae"):
        found = single_file.read(tmp_path / f"{name}.safetensors", asked("sd1"))
        theirs = networks(found)["autoencoder"].double()
        assert theirs.latent_scale.unique().tolist() == pytest.approx([0.18215])
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(images), mine.encode(images), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(theirs.decode(latents), mine.decode(latents), rtol=1e-5, atol=1e-6)


def test_an_autoencoder_alone_has_no_prefix_and_keeps_its_scale(small, tmp_path):
    model, tensors = small("sdxl")
    single_file_out.write_autoencoder(model, tmp_path / "vae.safetensors")
    own = {n.removeprefix("first_stage_model."): v for n, v in tensors.items() if n.startswith("first_stage")}
    found = values(tmp_path / "vae.safetensors")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    assert single_file_out.autoencoder_scale(model) == 0.13025


@pytest.mark.parametrize(
    ("slug", "change", "message"),
    [
        ("sd1", {"backbone": {"norm_groups": 16}}, "norm_groups=16, and readers"),
        ("sd1", {"backbone": {"head_dim": [16, 32, 16, 64]}}, "neither the number of heads nor their width"),
        ("sd1", {"conditioner": {"padding": "zero"}}, "padding=zero, and readers"),
        ("sd1", {"conditioner": {"layer": 1}}, "layer=penultimate, and readers"),
        ("sd2", {"conditioner": {"final_norm": False}}, "final_norm=False, and readers"),
        ("sd1", {"noise_scheduler": {"prediction_type": "sample"}}, "know no VariancePreserving with sample"),
        ("sd1", {"noise_scheduler": {"beta_end": 0.02}}, "beta_end=0.02, and readers"),
        ("sd1", {"autoencoder": {"_target_": RESIDUAL}}, "no other program"),
        ("sd1", {"backbone": None}, "use --format autoencoder"),
        ("ldm_class", {"conditioner": {"_target_": "ldm.conditioning.label.ClassLabel"}}, "no family"),
        (
            "sd1",
            {"noise_scheduler": {"_target_": FLOW, "prediction_type": "flow"}},
            "know no RectifiedFlow with flow",
        ),
        ("sd2_inpaint", {"conditioner": {"parts": ["text"]}}, "no family"),
    ],
)  # fmt: skip
def test_what_has_no_place_in_a_single_file_is_refused(slug, change, message, small, tmp_path):
    model, _ = small(slug)
    config = dict(model.config)
    for name, section in change.items():
        old = config[name] or {}
        if section and "parts" in section:
            section = {"parts": {part: old["parts"][part] for part in section["parts"]}}
        config[name] = section and (old | section)
    with pytest.raises(InputError, match=message):
        single_file_out.write(Model(config, model.tensors), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
