"""Names and shapes of the tensors in single files of Stable Diffusion, worked out from a network's widths.

What CompVis' and Stability's files hold, by their architectures (stable-diffusion-v1, v2, SDXL base, latent
diffusion's autoencoders); no code of theirs. Prefixes are those of a single file only in `single_file`.
`small`: the same layout in small widths. b batch and sizes of pictures play no part.
"""

from __future__ import annotations

from collections.abc import Sequence

Shapes = dict[str, tuple[int, ...]]

BUFFERS = [
    "betas",
    *(f"{kind}alphas_cumprod" for kind in ("", "sqrt_", "sqrt_one_minus_", "log_one_minus_")),
    "alphas_cumprod_prev",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    *(f"posterior_{kind}" for kind in ("variance", "log_variance_clipped", "mean_coef1", "mean_coef2")),
]


class Listing(Shapes):
    """Names of tensors under a prefix, to which layers are added."""

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (width,)

    def linear(self, name: str, i: int, o: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = (o, i)
        if bias:
            self[f"{name}.bias"] = (o,)

    def conv(self, name: str, i: int, o: int, size: int = 3) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (o, i, size, size), (o,)

    def unet_resnet(self, name: str, i: int, o: int, emb: int) -> None:
        self.norm(f"{name}.in_layers.0", i)
        self.conv(f"{name}.in_layers.2", i, o)
        self.linear(f"{name}.emb_layers.1", emb, o)
        self.norm(f"{name}.out_layers.0", o)
        self.conv(f"{name}.out_layers.3", o, o)
        if i != o:
            self.conv(f"{name}.skip_connection", i, o, 1)

    def transformer(self, name: str, width: int, depth: int, context: int, linear: bool, own: bool) -> None:
        """`own`: the first attention of a block looks at the pixels, else at the context."""
        self.norm(f"{name}.norm", width)
        for end in ("proj_in", "proj_out"):
            if linear:
                self.linear(f"{name}.{end}", width, width)
            else:
                self.conv(f"{name}.{end}", width, width, 1)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for attention, source in (("attn1", width if own else context), ("attn2", context)):
                self.linear(f"{block}.{attention}.to_q", width, width, bias=False)
                self.linear(f"{block}.{attention}.to_k", source, width, bias=False)
                self.linear(f"{block}.{attention}.to_v", source, width, bias=False)
                self.linear(f"{block}.{attention}.to_out.0", width, width)
            self.linear(f"{block}.ff.net.0.proj", width, 8 * width)
            self.linear(f"{block}.ff.net.2", 4 * width, width)
            for norm in ("norm1", "norm2", "norm3"):
                self.norm(f"{block}.{norm}", width)

    def resnet(self, name: str, i: int, o: int) -> None:
        self.norm(f"{name}.norm1", i)
        self.conv(f"{name}.conv1", i, o)
        self.norm(f"{name}.norm2", o)
        self.conv(f"{name}.conv2", o, o)
        if i != o:
            self.conv(f"{name}.nin_shortcut", i, o, 1)

    def pixels(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", width, width, 1)


def unet(
    channels: Sequence[int],
    depths: Sequence[int],
    mid_depth: int = 1,
    *,
    ins: int = 4,
    out: int = 4,
    context: int,
    linear: bool = False,
    own: Sequence[bool] | None = None,
    pooled: int | None = None,
    classes: int | None = None,
    layers: Sequence[int] | None = None,
) -> Shapes:
    d, emb, own = Listing(), 4 * channels[0], own or [True] * len(channels)
    layers = layers or [2] * len(channels)
    d.linear("time_embed.0", channels[0], emb)
    d.linear("time_embed.2", emb, emb)
    if pooled:
        d.linear("label_emb.0.0", pooled, emb)
        d.linear("label_emb.0.2", emb, emb)
    if classes:
        d["label_emb.weight"] = (classes, emb)
    d.conv("input_blocks.0.0", ins, channels[0])
    skips, width, block = [channels[0]], channels[0], 1
    for level, (wide, depth) in enumerate(zip(channels, depths, strict=True)):
        for _ in range(layers[level]):
            d.unet_resnet(f"input_blocks.{block}.0", width, wide, emb)
            if depth:
                d.transformer(f"input_blocks.{block}.1", wide, depth, context, linear, own[level])
            skips.append(width := wide)
            block += 1
        if level < len(channels) - 1:
            d.conv(f"input_blocks.{block}.0.op", wide, wide)
            skips.append(wide)
            block += 1
    d.unet_resnet("middle_block.0", width, width, emb)
    d.transformer("middle_block.1", width, mid_depth, context, linear, True)
    d.unet_resnet("middle_block.2", width, width, emb)
    block = 0
    for level in reversed(range(len(channels))):
        wide, depth = channels[level], depths[level]
        for i in range(layers[level] + 1):
            d.unet_resnet(f"output_blocks.{block}.0", width + skips.pop(), wide, emb)
            width = wide
            if depth:
                d.transformer(f"output_blocks.{block}.1", wide, depth, context, linear, own[level])
            if level and i == layers[level]:
                d.conv(f"output_blocks.{block}.{2 if depth else 1}.conv", wide, wide)
            block += 1
    d.norm("out.0", width)
    d.conv("out.2", width, out)
    return d


def autoencoder(
    channels: Sequence[int], latent: int, *, attention: Sequence[int] = (), codes: int | None = None
) -> Shapes:
    """`attention`: levels that have it; `codes`: rows of the codebook, None: KL."""
    d, last = Listing(), len(channels) - 1
    moments = latent if codes else 2 * latent
    d.conv("encoder.conv_in", 3, channels[0])
    width = channels[0]
    for level, wide in enumerate(channels):
        for i in range(2):
            d.resnet(f"encoder.down.{level}.block.{i}", width, wide)
            width = wide
            if level in attention:
                d.pixels(f"encoder.down.{level}.attn.{i}", wide)
        if level < last:
            d.conv(f"encoder.down.{level}.downsample.conv", wide, wide)
    d.conv("decoder.conv_in", latent, width)
    for coder in ("encoder", "decoder"):
        d.resnet(f"{coder}.mid.block_1", width, width)
        d.pixels(f"{coder}.mid.attn_1", width)
        d.resnet(f"{coder}.mid.block_2", width, width)
    d.norm("encoder.norm_out", width)
    d.conv("encoder.conv_out", width, moments)
    for level in reversed(range(len(channels))):
        for i in range(3):
            d.resnet(f"decoder.up.{level}.block.{i}", width, channels[level])
            width = channels[level]
            if level in attention:
                d.pixels(f"decoder.up.{level}.attn.{i}", width)
        if level:
            d.conv(f"decoder.up.{level}.upsample.conv", width, width)
    d.norm("decoder.norm_out", width)
    d.conv("decoder.conv_out", width, 3)
    d.conv("quant_conv", moments, moments, 1)
    d.conv("post_quant_conv", latent, latent, 1)
    if codes:
        d["quantize.embedding.weight"] = (codes, latent)
    return d


def clip(width: int, layers: int, vocab: int = 49408, position_ids: bool = True) -> Shapes:
    """transformers' CLIPTextModel, as in SD 1 and SDXL."""
    d = Listing({"text_model.embeddings.position_ids": (1, 77)} if position_ids else {})
    d["text_model.embeddings.token_embedding.weight"] = (vocab, width)
    d["text_model.embeddings.position_embedding.weight"] = (77, width)
    for block in (f"text_model.encoder.layers.{i}" for i in range(layers)):
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            d.linear(f"{block}.self_attn.{part}", width, width)
        d.norm(f"{block}.layer_norm1", width)
        d.linear(f"{block}.mlp.fc1", width, 4 * width)
        d.linear(f"{block}.mlp.fc2", 4 * width, width)
        d.norm(f"{block}.layer_norm2", width)
    d.norm("text_model.final_layer_norm", width)
    return d


def open_clip(width: int, layers: int, out: int, vocab: int = 49408, logit_scale: bool = True) -> Shapes:
    """The text tower of open_clip, as in SD 2 and SDXL."""
    d = Listing({"positional_embedding": (77, width), "text_projection": (width, out)})
    if logit_scale:
        d["logit_scale"] = ()
    d["token_embedding.weight"] = (vocab, width)
    for block in (f"transformer.resblocks.{i}" for i in range(layers)):
        d.norm(f"{block}.ln_1", width)
        d[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        d[f"{block}.attn.in_proj_bias"] = (3 * width,)
        d.linear(f"{block}.attn.out_proj", width, width)
        d.norm(f"{block}.ln_2", width)
        d.linear(f"{block}.mlp.c_fc", width, 4 * width)
        d.linear(f"{block}.mlp.c_proj", 4 * width, width)
    d.norm("ln_final", width)
    return d


def network(name: str, small: bool = False) -> Shapes:
    """A network by its name in NETWORKS, under its own names.

    Small: a tenth of the U-Net's widths (32, 64, 128), a quarter of the autoencoder's, towers of 32 (clip_l,
    2 layers), 48 (clip_h, 3) and 64 (big_g, 3, projected to 48); 6 size facts of 16; 64 codes and classes 11.
    """
    a, b, c, d = (32, 64, 128, 128) if small else (320, 640, 1280, 1280)
    e = 32 if small else 128  # of autoencoders
    l_width, h_width = (32, 48) if small else (768, 1024)
    codes, classes = (64, 11) if small else (None, 1001)
    sd1 = {"channels": (a, b, c, d), "depths": (1, 1, 1, 0), "context": l_width}
    sd2 = sd1 | {"context": h_width, "linear": True}
    sdxl = {
        "channels": (a, b, c),
        "depths": (0, 1, 2) if small else (0, 2, 10),
        "mid_depth": 2 if small else 10,
        "context": 32 + 64 if small else 2048,
        "linear": True,
        "pooled": 48 + 6 * 16 if small else 2816,
    }
    first = 32 if small else 256
    upscaler = {
        "channels": (first, 2 * first, 2 * first, 4 * first),
        "depths": (0, 1, 1, 1),
        "ins": 7,
        "context": h_width,
        "linear": True,
        "own": (False, False, False, True),
        "classes": 1000,
    }
    first = 32 if small else 192
    by_class = {
        "channels": (first, 2 * first, 3 * first, 5 * first),
        "depths": (0, 1, 1, 1),
        "ins": 3,
        "out": 3,
        "context": 32 if small else 512,
    }
    networks = {
        "unet_sd1": lambda: unet(**sd1),
        "unet_sd1_inpaint": lambda: unet(**sd1, ins=9),
        "unet_sd2": lambda: unet(**sd2),
        "unet_sd2_inpaint": lambda: unet(**sd2, ins=9),
        "unet_sd2_depth": lambda: unet(**sd2, ins=5),
        "unet_sdxl": lambda: unet(**sdxl),
        "unet_sdxl_inpaint": lambda: unet(**sdxl, ins=9),
        "unet_upscaler": lambda: unet(**upscaler),
        "unet_ldm_class": lambda: unet(**by_class),
        "unet_ldm_text": lambda: unet(**sd1 | {"context": 40 if small else 1280}),
        "kl_f4": lambda: autoencoder((e, 2 * e, 4 * e), 3),
        "kl_f4_4": lambda: autoencoder((e, 2 * e, 4 * e), 4),
        "kl_f8": lambda: autoencoder((e, 2 * e, 4 * e, 4 * e), 4),
        "kl_f16": lambda: autoencoder((e, e, 2 * e, 2 * e, 4 * e), 16, attention=(4,)),
        "kl_f32": lambda: autoencoder((e, e, 2 * e, 2 * e, 4 * e, 4 * e), 64, attention=(4, 5)),
        "vq_f4": lambda: autoencoder((e, 2 * e, 4 * e), 3, codes=codes or 8192),
        "vq_f8": lambda: autoencoder((e, 2 * e, 2 * e, 4 * e), 4, attention=(3,), codes=codes or 16384),
        "vq_f16": lambda: autoencoder((e, e, 2 * e, 2 * e, 4 * e), 8, attention=(4,), codes=codes or 16384),
        "clip_l": lambda: clip(l_width, 2 if small else 12),
        "clip_h": lambda: open_clip(h_width, 3 if small else 24, h_width),
        "big_g": lambda: open_clip(*((64, 3, 48) if small else (1280, 32, 1280))),
        "class_token": lambda: {"embedding.weight": (classes, 32 if small else 512)},
    }
    return networks[name]()


# Parts of the single file of each family: prefix and network.
SD, FIRST = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = ("cond_stage_model.transformer.", "clip_l"), ("cond_stage_model.model.", "clip_h")
XL = [("conditioner.embedders.0.transformer.", "clip_l"), ("conditioner.embedders.1.model.", "big_g")]
FAMILIES = {
    "sd1": [(SD, "unet_sd1"), (FIRST, "kl_f8"), CLIP],
    "sd1_inpaint": [(SD, "unet_sd1_inpaint"), (FIRST, "kl_f8"), CLIP],
    "sd2": [(SD, "unet_sd2"), (FIRST, "kl_f8"), OPEN_CLIP],
    "sd2_inpaint": [(SD, "unet_sd2_inpaint"), (FIRST, "kl_f8"), OPEN_CLIP],
    "sd2_depth": [(SD, "unet_sd2_depth"), (FIRST, "kl_f8"), OPEN_CLIP],
    "sdxl": [*XL, (FIRST, "kl_f8"), (SD, "unet_sdxl")],
    "sdxl_inpaint": [*XL, (FIRST, "kl_f8"), (SD, "unet_sdxl_inpaint")],
    "upscaler": [(SD, "unet_upscaler"), (FIRST, "kl_f4_4"), OPEN_CLIP],
    "ldm_class": [(SD, "unet_ldm_class"), (FIRST, "vq_f4"), ("cond_stage_model.", "class_token")],
}


def buffers(family: str) -> Shapes:
    """What a single file holds beside the networks: 12 of the schedule, or SDXL's sigmas."""
    if family.startswith("sdxl"):
        return {"denoiser.sigmas": (1000,)}
    more = {"scale_factor": ()} if family == "upscaler" else {}
    if family == "upscaler":
        more |= {f"low_scale_model.{name}": (1000,) for name in BUFFERS}
    return {name: (1000,) for name in BUFFERS} | more


def single_file(family: str, small: bool = False, with_buffers: bool = True, ema: bool = False) -> Shapes:
    """All of a single file; `ema`: with averages of the U-Net, as files fresh from training have them."""
    d = buffers(family) if with_buffers else {}
    for prefix, name in FAMILIES[family]:
        d |= {prefix + tensor: shape for tensor, shape in network(name, small).items()}
        if ema and prefix == SD:
            d |= {"model_ema.decay": (), "model_ema.num_updates": ()}
            for tensor, shape in network(name, small).items():
                d["model_ema." + f"diffusion_model.{tensor}".replace(".", "")] = shape
    return d
