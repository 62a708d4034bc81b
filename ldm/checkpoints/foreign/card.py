"""The model card of an export: what is known of the model, and that the rest is not known.

Nothing here is guessed: a line comes from the checkpoint's config or its facts, or says that nobody said.
Paths of this machine are left out: of data sets and checkpoints the last part of the name is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import ldm
from ldm.checkpoints.foreign.families import FAMILIES
from ldm.checkpoints.foreign.granted import family_in
from ldm.checkpoints.foreign.towers import kind
from ldm.checkpoints.foreign.training import UNKNOWN, count, training
from ldm.checkpoints.model import Model
from ldm.errors import InputError

LICENCES = {  # the Hub's words
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "MIT": "mit",
}
PIPELINES = {  # of diffusers
    "sd1": "StableDiffusionPipeline",
    "sd1_inpaint": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd2_inpaint": "StableDiffusionInpaintPipeline",
    "sd2_depth": "StableDiffusionDepth2ImgPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
}
TASKS = {
    "sd1": "text-to-image",
    "sd2": "text-to-image",
    "sdxl": "text-to-image",
}  # others start from a picture
PREDICTED = {
    "epsilon": "the noise (epsilon)",
    "v_prediction": "the velocity v (v_prediction)",
    "sample": "the clean latents (sample)",
    "flow": "the velocity of a straight path (flow)",
}
ALONE = ("unet", "autoencoder")  # networks, of which no picture is drawn
OF_MODELS = ("predicts", "captions dropped in training")  # and not of an autoencoder alone
LIMITS = """\
- It shows what its data shows, with what is wrong in them: wrong captions, prejudice, things not to
  be shown. Look at what it makes before anybody else does.
- Pictures of other sizes than it was trained at are worse, and those of far other sizes much worse.
- This export measured nothing: how good it is, is not known here.
"""


def card(
    model: Model,
    name: str,
    form: str,
    weights: str,
    dtype: str,
    files: Sequence[tuple[str, int, str]],
    notes: Sequence[str] = (),
) -> str:
    """The text of the card of an export `name`, of a format `form` (export.py).

    `files` are (name, bytes, sha256); `notes` those of the export, beside the model's own.
    """
    slug, published = _family(model)
    if form == "diffusers" and slug != "autoencoder" and model.config.get("autoencoder") is None:
        slug, published = "unet", False
    notes = [*(model.facts.get("notes", ()) if form != "autoencoder" else ()), *notes]
    facts = [
        row for row in _facts(model, slug, published) if form != "autoencoder" or row[0] not in OF_MODELS
    ]
    converted = [
        ("made with", f"ldm {ldm.__version__}, `ldm export --format {form}`"),
        ("from", _source(model)),
        ("weights", "averages (EMA), where there are" if weights == "ema" and model.ema else "raw"),
        ("number format", dtype),
    ]
    parts = [
        _front_matter(model, slug, form),
        f"# {name}\n",
        _table(facts),
        f"## Use\n\n{_usage(slug, published, name, form)}",
        f"## Limits\n\n{LIMITS}",
        f"## Where it comes from\n\n{_table(converted)}",
        *(["Notes:\n" + _list(notes)] if notes else []),
        "Files:\n" + _list(f"`{file}` {size:,} bytes, sha256 `{sha256}`" for file, size, sha256 in files),
    ]
    return "\n".join(parts)


def _family(model: Model) -> tuple[str, bool]:
    """What it is, as far as other programs know, and whether they know its sizes."""
    if model.config.get("backbone") is None:
        return "autoencoder", False
    try:
        family, published = family_in(model)
    except InputError:
        return str(model.facts.get("family", "")), False
    return family.slug, published


def _front_matter(model: Model, slug: str, form: str) -> str:
    licence = model.facts.get("licence")
    lines = [f"license: {LICENCES.get(str(licence), 'other' if licence else 'unknown')}"]
    if licence and licence not in LICENCES:
        lines.append(f'license_name: "{_plain(licence)}"')
    lines.append("library_name: diffusers")
    if slug in PIPELINES and form != "autoencoder":
        lines.append(f"pipeline_tag: {TASKS.get(slug, 'image-to-image')}")
    tags = ["latent-diffusion", *(["stable-diffusion"] if slug in PIPELINES else [])]
    tags += [slug.replace("_", "-")] if slug else []
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---\n"])


def _facts(model: Model, slug: str, published: bool) -> list[tuple[str, str]]:
    config, facts = model.config, model.facts
    scheduler, trained = config.get("noise_scheduler"), [(key, v or UNKNOWN) for key, v in training(config)]
    titles = {family.slug: family.title for family in FAMILIES}
    title = titles.get(slug, "an autoencoder" if slug == "autoencoder" else "a latent diffusion model")
    other = ", of other sizes than the published one" if slug in titles and not published else ""
    size = (config.get("data") or {}).get("image_size")
    run = config.get("run_name") if facts.get("format") == "ldm" else None
    return [
        ("kind", title + other),
        ("licence", str(facts.get("licence") or f"{UNKNOWN}: ask whoever trained it before you share it")),
        ("author", str(facts.get("author") or UNKNOWN)),
        ("trained as", str(run or UNKNOWN)),
        *trained[:1],
        ("optimizer steps", count(facts.get("step"))),
        ("images seen", count(facts.get("images"))),
        ("resolution", f"{size} x {size} pixels" if size else UNKNOWN),
        ("predicts", _objective(scheduler) if scheduler else UNKNOWN),
        *trained[1:],
    ]  # fmt: skip


def _objective(scheduler: Mapping[str, Any]) -> str:
    prediction = str(scheduler.get("prediction_type", "epsilon"))
    table = [str(scheduler[key]) for key in ("schedule", "beta_start", "beta_end") if key in scheduler]
    ends = ["zero terminal SNR"] if scheduler.get("zero_terminal_snr") else []
    said = [PREDICTED.get(prediction, prediction), kind(scheduler), " ".join(table), *ends]
    return ", ".join(part for part in said if part)


def _source(model: Model) -> str:
    facts = model.facts
    name = PurePath(str(facts.get("path") or facts.get("source") or "")).name
    return f"{name} ({facts.get('format', UNKNOWN)})" if name else UNKNOWN


def _plain(text: Any) -> str:
    return str(text).replace('"', "'").replace("\n", " ")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f"| {key} | {_plain(value).replace('|', '/')} |" for key, value in rows)
    return "\n".join(["| | |", "|---|---|", *cells]) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(["", *(f"- {line}" for line in lines)]) + "\n"


# ---- how to use it -------------------------------------------------------------------------------------


def _usage(slug: str, published: bool, name: str, form: str) -> str:
    lines = {"diffusers": _of_folder, "single-file": _of_file, "autoencoder": _of_autoencoder}[form]
    own = (
        []
        if slug in ALONE or form == "autoencoder"
        else [f"ldm: `python sample.py checkpoint={name} prompt=...`\n"]
    )
    return "\n".join([*lines(slug, published, name), *own])


def _of_folder(slug: str, published: bool, name: str) -> list[str]:
    if slug in ALONE:
        return [_python("from diffusers import AutoModel", f'network = AutoModel.from_pretrained("{name}")')]
    pipeline = PIPELINES.get(slug, "StableDiffusionPipeline")
    return [
        _python(f"from diffusers import {pipeline}", f'pipe = {pipeline}.from_pretrained("{name}")'),
        "A1111 and ComfyUI open single files: `ldm export SRC DST.safetensors --format single-file`.\n",
    ]


def _of_file(slug: str, published: bool, name: str) -> list[str]:
    pipeline = PIPELINES.get(slug)
    if pipeline is None:
        return ["diffusers, A1111 and ComfyUI open no single file of this kind.\n"]
    call = f'pipe = {pipeline}.from_single_file("{name}", config="FOLDER")'
    why = "FOLDER: the same model, exported with `--format diffusers`"
    lines = [
        _python(f"from diffusers import {pipeline}", call),
        f"{why}{'; needed offline' if published else ''}.\n",
    ]
    if not published:
        return [*lines, "A1111 and ComfyUI open the published sizes alone, and these are others.\n"]
    return [*lines, "A1111: put it into `models/Stable-diffusion/`. ComfyUI: into `models/checkpoints/`.\n"]


def _of_autoencoder(slug: str, published: bool, name: str) -> list[str]:
    call = f'vae = AutoencoderKL.from_single_file("{name}", config="FOLDER/vae")'
    return [
        _python("from diffusers import AutoencoderKL", call),
        "A1111: put it into `models/VAE/`. ComfyUI: into `models/vae/`. Both open published sizes alone.\n",
    ]


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```\n"])


def beside(path: Path) -> Path:
    """Where the card of an exported file is."""
    return path.with_suffix(".md")
