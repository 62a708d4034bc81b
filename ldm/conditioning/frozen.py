"""Text towers of CLIP's shape that are not trained: those of open_clip, and those that a checkpoint brings.

b batch, l tokens, d width.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.text import TextConditioner, Tokenizer
from ldm.errors import InputError
from ldm.types import Batch, Conditioning

TEXT_CONFIG = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}  # a CLIP-shaped tower
WHOLE = TEXT_CONFIG - {"mlp_ratio"} | {"embed_dim"}


class FrozenOpenCLIP(TextConditioner):
    """A text tower of CLIP's shape, never trained: no gradient, no dropout, no training mode.

    model        open_clip's name of the model, or the sizes of a tower that has none: {width, layers, heads,
                 embed_dim, quick_gelu, vocab_size, mlp_ratio, context_length}, the first four needed
    pretrained   a tag of open_clip, a local file (safetensors, or tensors saved by torch), the word `random`,
                 or None: random until a checkpoint brings the weights (see `ConditionerModule.unfilled`)
    layer        `last`, `penultimate`, or N for the output of the N-th block; `final_norm` puts the tower's
                 last layer norm on it. All blocks are kept, for exports; no more are run than needed
    pooled       also give the projected end token of the whole tower; otherwise it has no projection
    context_dim  what the configuration told the backbone, checked against the tower

    SDXL: CLIP ViT-L/14 with layer 11 of 12 and OpenCLIP ViT-bigG/14 with `penultimate` and `pooled`, both
    without final norm and with `zero_null`, see `TextConditioner`.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        pretrained: str | None,
        layer: str | int = "last",
        final_norm: bool = True,
        pooled: bool = False,
        context_length: int = 77,
        padding: str = "zero",
        context_dim: int | None = None,
        zero_null: bool = False,
    ) -> None:
        config, text_config = _sizes(model) if isinstance(model, Mapping) else _model_config(model)
        called = model if isinstance(model, str) else "this model"
        depth = _depth(layer, text_config["layers"])
        if context_length > text_config.get("context_length", 77):
            raise InputError(
                f"conditioner.context_length={context_length}",
                f"{called} has {text_config.get('context_length', 77)} positions",
                "give at most that",
            )
        if context_dim not in (None, text_config["width"]):
            raise InputError(
                f"conditioner.context_dim={context_dim}",
                f"the text tower of {called} has width {text_config['width']}",
                f"set conditioner.context_dim={text_config['width']}",
            )
        tag = pretrained if pretrained not in (None, "random") else None
        path = None if tag is None else _weights_file(called, tag)
        pooled_dim = config["embed_dim"] if pooled else None
        super().__init__(Tokenizer(context_length, padding), text_config["width"], pooled_dim, zero_null)
        import open_clip
        from open_clip.transformer import QuickGELU
        from open_clip.transformer import TextTransformer as Tower

        published = open_clip.get_pretrained_cfg(called, tag) if tag else {}
        quick = config.get("quick_gelu", False) or published.get("quick_gelu", False)
        # the activation belongs to the weights: ViT-L-14 with the tag openai is quick, too
        text = Tower(
            **{**text_config, "context_length": context_length},
            output_dim=pooled_dim,
            act_layer=QuickGELU if quick else nn.GELU,
        )
        if path is not None and tag is not None:
            _load(text, path, tag)
        self.unfilled = pretrained is None
        self.text, self.depth, self.final_norm = text.requires_grad_(False).eval(), depth, final_norm

    def train(self, mode: bool = True) -> FrozenOpenCLIP:
        """Stays in evaluation mode whatever the parent asks."""
        return super().train(False)

    def towers(self) -> FrozenOpenCLIP:
        return self

    def forward(self, batch: Batch) -> Conditioning:
        """As of every tower, or what it gave for the captions beforehand, if the batch has that."""
        if batch.context is None:
            return super().forward(batch)
        dtype = self.text.token_embedding.weight.dtype  # type: ignore[union-attr]
        pooled = batch.pooled if self.pooled_dim else None
        return Conditioning(
            batch.context.to(dtype), batch.context_mask, None if pooled is None else pooled.to(dtype)
        )

    def _skip(self, blocks: int) -> None:
        if not 0 <= blocks < self.depth:
            raise InputError(f"clip_skip={blocks + 1}", f"need 1 to {self.depth} for this text tower")
        self.depth -= blocks

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Conditioning:
        output = self.text.forward_intermediates(
            tokens,
            indices=[self.depth - 1],
            stop_early=self.pooled_dim is None,
            normalize_intermediates=self.final_norm,
            intermediates_only=self.pooled_dim is None,
            output_fmt="NLC",
        )
        return Conditioning(context=output["text_intermediates"][0], pooled=output.get("text_features"))


def _nearest(word: str, known: Sequence[str]) -> str:
    """A hint naming the known word most like `word`, or the first few known ones."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:12])}"


def _sizes(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_model_config`, of a tower whose sizes are given one by one."""
    needed, known = {"width", "layers", "heads", "embed_dim"}, TEXT_CONFIG | {"embed_dim", "quick_gelu"}
    for wrong, what in ((needed - set(model), "is missing"), (set(model) - known, "is unknown")):
        if wrong:
            fix = f"it has: {', '.join(sorted(known))}"
            raise InputError("conditioner.model", f"{min(wrong)} {what}", fix)
    for key, value in model.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if key in WHOLE and not (whole and value > 0):
            raise InputError(f"conditioner.model.{key}={value}", "is no whole number above 0", "give one")
    if model["width"] % model["heads"]:
        what = f"does not divide the width {model['width']}"
        raise InputError(f"conditioner.model.heads={model['heads']}", what, "give another")
    return dict(model), {key: value for key, value in model.items() if key in TEXT_CONFIG}


def _model_config(model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's description of a model and of its text tower; refuses towers that are not CLIP's."""
    import open_clip

    where, config = f"conditioner.model={model!r}", open_clip.get_model_config(model)
    if config is None:
        raise InputError(where, "no such open_clip model", _nearest(model, open_clip.list_models()))
    text_config = config["text_cfg"]
    strange = sorted(set(text_config) - TEXT_CONFIG)
    if strange:
        raise InputError(
            where,
            f"its text tower is not a plain CLIP transformer ({', '.join(strange)})",
            "choose one like ViT-L-14-quickgelu, ViT-H-14 or ViT-bigG-14",
        )
    return config, text_config


def _depth(layer: str | int, layers: int) -> int:
    """How many blocks run before the context is taken."""
    depth = {"last": layers, "penultimate": layers - 1}.get(str(layer), layer)
    if not isinstance(depth, int) or not 1 <= depth <= layers:
        raise InputError(
            f"conditioner.layer={layer!r}", "no such layer", f"give last, penultimate or 1 to {layers}"
        )
    return depth


def _weights_file(model: str, pretrained: str) -> Path:
    """The local file itself, or the tag's file, which open_clip fetches into its cache on first use."""
    import open_clip

    where = f"conditioner.pretrained={pretrained!r}"
    if Path(pretrained).is_file():
        return Path(pretrained)
    weights = open_clip.get_pretrained_cfg(model, pretrained)
    if not weights:
        if "/" in pretrained or Path(pretrained).suffix in {".safetensors", ".pt", ".pth", ".bin"}:
            raise InputError(where, "no such file", "give a local file or a tag of open_clip")
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise InputError(
            where,
            f"open_clip has no such weights for {model}",
            _nearest(pretrained, tags) if tags else "give a local file",
        )
    try:
        return Path(open_clip.download_pretrained(weights))
    except Exception as error:  # whatever a network, a hub client or a full disk throws
        raise InputError(where, "weights not found (offline?)", "give a local file or another tag") from error


def cached_weights(model: str, pretrained: str) -> str | None:
    """Where open_clip has the weights of a tag already; None if it would fetch them, or knows no such tag."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    weights = open_clip.get_pretrained_cfg(model, pretrained) or {}
    hub, _, name = weights.get("hf_hub", "").rpartition("/")
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    for name in names if hub else ():
        found = try_to_load_from_cache(hub, name)
        if isinstance(found, str):
            return found
    file = Path("~/.cache/clip").expanduser() / weights.get("url", "").rpartition("/")[2]
    return str(file) if not hub and weights.get("url") and file.is_file() else None


def _load(text: nn.Module, path: Path, pretrained: str) -> None:
    """Fill the tower from the weights of a CLIP, CustomTextCLIP or text tower; never runs pickled code."""
    where = f"conditioner.pretrained={pretrained!r}"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
        found = {key.removeprefix("module.").removeprefix("text."): value for key, value in found.items()}
    except Exception as error:  # a damaged or foreign file fails in as many ways as there are formats
        raise InputError(
            where, f"{path.name} is no file of tensors", "give safetensors, or tensors saved by torch"
        ) from error
    wanted = text.state_dict()
    missing = [key for key in wanted if key not in found]
    if missing:
        raise InputError(
            where,
            f"{len(missing)} of the text tower's {len(wanted)} tensors are not in it (first: {missing[0]})",
            "give weights in open_clip's names",
        )
    given = {key: found[key] for key in wanted}
    given["positional_embedding"] = given["positional_embedding"][: len(wanted["positional_embedding"])]
    for key, value in wanted.items():
        if given[key].shape != value.shape:
            raise InputError(
                where,
                f"{key} has shape {list(given[key].shape)}, the model needs {list(value.shape)}",
                "give the model that these weights belong to",
            )
    text.load_state_dict(given)
