"""Representation autoencoders and text-to-image in their latent space: every model, in one file.

A frozen vision encoder turns an image into tokens, a trained decoder turns the tokens back into pixels (RAE,
arXiv 2510.11690), and a diffusion transformer learns to generate such tokens, from class labels (RAE) or from
the hidden states of a language model (Scale-RAE, arXiv 2601.16208). Read this file from top to bottom:

    1. layers          RMSNorm, rotary and sin-cos positions, attention, SwiGLU, time embedding
    2. encoders        one wrapper over the vision models of `transformers`
    3. autoencoders    the ViT decoder, and RAE = encoder + decoder + latent statistics; VAE, to compare with
    4. DiT             the diffusion transformer, with or without the wide head
    5. flow matching   timestep shift, loss, sampler, guidance
    6. ClassToImage    labels -> DiT
       TextToImage     language model -> latent queries -> connector -> DiT
    7. presets and released weights   the papers' names and sizes; the authors' and diffusers' files

Conventions: latents are tokens (B, N, C) in raster order; time t = 0 is data and t = 1 is noise; images are
(B, 3, H, W) in [0, 1]. Parameters are fp32; run under `torch.autocast` for bf16 compute: norms, rotary
positions, modulation, losses and the sampler's state stay in fp32.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

# -----------------------------------------------------------------------------------------------------------
# 1. layers


class Hub(PyTorchModelHubMixin):
    """`save_pretrained(folder)` writes config.json (the arguments of `__init__`) and model.safetensors;
    `from_pretrained(folder or hub id)` reads them back; `push_to_hub(id)`."""

    @classmethod
    def _from_pretrained(cls, *, config: dict | None = None, **kwargs):
        if unknown := set(config or ()) - set(cls._hub_mixin_init_parameters):
            raise ValueError(
                f"config.json has values that {cls.__name__} does not know: {', '.join(unknown)}"
            )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints a line
            return super()._from_pretrained(**(kwargs | {"strict": True}))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; the statistics are in fp32 whatever the input is."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def grid_positions(tokens: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a square grid in raster order: two (N,) float64 tensors."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square grid")
    index = torch.arange(tokens, dtype=torch.float64)
    return index.div(side, rounding_mode="floor"), index % side


def sincos_table(tokens: int, width: int, spacing: float = 1.0) -> Tensor:
    """The fixed 2-D position table of MAE, (N, width): the first half of the channels is the column's
    [sin, cos], the second half the row's. spacing: of neighbouring positions; not 1 in diffusers' files."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = (position[:, None] * spacing * frequency for position in grid_positions(tokens))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def rope_table(tokens: int, head_width: int, turned: bool = True, spacing: float = 1.0) -> Tensor:
    """cos and sin of the 2-D axial rotary embedding, (2, N, head_width): the first half of the channels turns
    with the row, the second with the column (the other way round than in `sincos_table`), each angle for two
    neighbours. Not `turned`: all angles are zero. spacing: of neighbouring positions."""
    half = head_width // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = (position[:, None] * spacing * frequency for position in grid_positions(tokens))
    angle = turned * torch.cat([row, column], dim=1).repeat_interleave(2, dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def resize_grid(table: Tensor, side: int, mode: str) -> Tensor:
    """A table of one row per token, (N, C), for a grid of side x side tokens."""
    grid = rearrange(table, "(h w) c -> 1 c h w", h=math.isqrt(len(table)))
    return F.interpolate(grid, (side, side), mode=mode).flatten(2)[0].T


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring channel pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in fp32."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
    return (x.float() * rope[0] + turned * rope[1]).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; qk_norm: RMSNorm on queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k = q.type_as(v), k.type_as(v)
        # of no sample CUDA's kernels raise, and the weights still need gradients: FSDP waits for all
        out = F.scaled_dot_product_attention(q, k, v) if len(x) else q * k * v
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """silu(a) * b, where one linear layer makes both halves.

    multiple: the hidden width, often odd, is filled up to one with zeros, which change nothing. By default to
    8 on CUDA, whose fast products want rows of 16 bytes, for more tokens than `width`: then copying the
    weights is cheap.
    """

    multiple: int | None = None

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        many = x.is_cuda and x.shape[:-1].numel() > x.shape[-1]
        more = -self.w3.in_features % (self.multiple or (8 if many else 1))
        if more:
            return self.padded(x, more)
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)

    def padded(self, x: Tensor, more: int) -> Tensor:
        weight, bias = (p.unflatten(0, (2, -1)) for p in (self.w12.weight, self.w12.bias))
        weight, bias = F.pad(weight, (0, 0, 0, more)).flatten(0, 1), F.pad(bias, (0, more)).flatten()
        a, b = F.linear(x, weight, bias).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, F.pad(self.w3.weight, (0, more)), self.w3.bias)


class MLP(nn.Module):
    """Two linear layers around a tanh GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of t in [0, 1] (no factor of 1000), then a two-layer MLP: (B,) -> (B, width).

    The frequencies `W` belong to the weights: RAE trained them, Scale-RAE drew them with this very seed and
    left them out of its files. Here they are saved and never trained.
    """

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        generator = torch.Generator().manual_seed(114514)
        self.W = nn.Parameter(
            torch.randn(frequencies, generator=generator, device="cpu"), requires_grad=False
        )
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t[:, None].float() * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


# -----------------------------------------------------------------------------------------------------------
# 2. encoders


class Family(NamedTuple):
    """What to take from a vision model of `transformers`."""

    model: str  # class name
    norm: str | None  # the final LayerNorm whose learned scale and shift are removed; None: kept as it is
    prefix: Callable[[object], int]  # tokens in front of the patches, from the model's config


FAMILIES = {  # by config.model_type
    "siglip_vision_model": Family("SiglipVisionModel", "post_layernorm", lambda config: 0),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "layernorm", lambda config: 1 + config.num_register_tokens
    ),
    "dinov2": Family("Dinov2Model", None, lambda config: 1),  # WebSSL-DINO: Scale-RAE keeps its affine norm
    "dinov3_vit": Family("DINOv3ViTModel", "norm", lambda config: 1 + config.num_register_tokens),
    "vit_mae": Family("ViTMAEModel", "layernorm", lambda config: 1),
    "vit": Family("ViTModel", "layernorm", lambda config: 1),  # DINO, the discriminator's
}


class Encoder(nn.Module):
    """A frozen vision transformer: normalised pixels (B, 3, S, S) -> patch tokens (B, N, C).

    `source` is a hub id or local `transformers` folder (pretrained weights), or the config of one as a dict
    (weights come later, from a state dict). Tokens are the last hidden state, after a final LayerNorm without
    scale and shift where the family has one, so that each has mean 0 and variance 1 over its channels (RAE
    section 3; Scale-RAE appendix). `changes` of its config are for those who need another variant. Raises
    ValueError for a model type that is not in FAMILIES.
    """

    def __init__(self, source: str | dict, changes: dict | None = None):
        super().__init__()
        pretrained = not isinstance(source, dict)
        if not pretrained:
            source = source | (changes or {})
        config = (
            transformers.AutoConfig.from_pretrained(source)
            if pretrained
            else transformers.AutoConfig.for_model(**source)
        )
        config = getattr(config, "vision_config", config)  # SigLIP: the text tower stays where it is
        if config.model_type not in FAMILIES:
            raise ValueError(f"encoder {source!r} is a {config.model_type}; known: {', '.join(FAMILIES)}")
        family = FAMILIES[config.model_type]
        model_class = getattr(transformers, family.model)
        if pretrained:
            model, report = model_class.from_pretrained(source, output_loading_info=True, **changes or {})
            check_encoder(source, model, report, unused=("pooler", "head", family.norm))
        else:
            model = model_class(config)
        if family.norm:
            getattr(model, family.norm).weight = getattr(model, family.norm).bias = None
        if getattr(model, "use_head", False):  # pooling heads: computed for nothing
            model.use_head, model.head = False, None
        if getattr(model, "pooler", None):
            model.pooler = None
        self.model = model.float().requires_grad_(False).eval()  # files are often bf16
        self.prefix = family.prefix(config)
        self.is_mae = config.model_type == "vit_mae"
        if self.is_mae:
            model.config.mask_ratio = 0.0

    @property
    def config(self):
        return self.model.config

    @property
    def blocks(self) -> nn.ModuleList:
        return next(module for module in self.model.modules() if isinstance(module, nn.ModuleList))

    def features(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Patch tokens (B, N, C) after each of those blocks, counted from 0, before any final norm."""
        found = {}

        def keep(layer: int, output) -> None:
            found[layer] = (output[0] if isinstance(output, tuple) else output)[:, self.prefix :]

        hooks = [
            self.blocks[layer].register_forward_hook(lambda _, __, output, i=layer: keep(i, output))
            for layer in set(layers)
        ]
        try:
            self(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[layer] for layer in layers]

    def forward(self, pixels: Tensor) -> Tensor:
        given = {}
        if self.config.model_type in ("siglip_vision_model", "vit_mae", "vit"):
            given["interpolate_pos_encoding"] = True  # the newer DINO models always do
        if self.is_mae:  # it shuffles tokens by the order of this "noise": keep them in raster order
            patches = (pixels.shape[-1] // self.config.patch_size) ** 2
            given["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        return self.model(pixels, **given).last_hidden_state[:, self.prefix :]


def check_encoder(source: str, model: nn.Module, report: dict, unused: tuple) -> None:
    """Raises ValueError where weights are missing that are used, have another shape, or are more than the
    model has. Other parts of the file, as a text tower, do not matter."""
    parts = {name for name, _ in model.named_children()}
    wrong = [key for key in report["missing_keys"] if key.split(".")[0] not in unused]
    wrong += [str(key) for key in report["mismatched_keys"]]
    wrong += [key for key in report["unexpected_keys"] if key.split(".")[0] in parts]
    if wrong:
        raise ValueError(f"encoder {source}: {len(wrong)} weights are missing or unknown: {wrong[:5]}")


def input_of(source: str, encoder: Encoder) -> tuple[int, list[float], list[float]]:
    """The side in pixels and the statistics of an encoder's input, as its folder's image processor has them.
    DINOv2's config has another size, that of its table of positions."""
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    sizes = [getattr(processor, name, None) or {} for name in ("crop_size", "size")]
    side = next((size["height"] for size in sizes if size.get("height")), encoder.config.image_size)
    side = min(side, encoder.config.image_size)
    return side, list(processor.image_mean), list(processor.image_std)


# -----------------------------------------------------------------------------------------------------------
# 3. autoencoders


class DecoderLayer(nn.Module):
    """Pre-norm transformer block with the released checkpoints' (ViT-MAE's) names; exact GELU, LayerNorm eps
    1e-12."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        qkv = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": qkv, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_width, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def attend(self, x: Tensor) -> Tensor:
        project = self.attention["attention"]
        q, k, v = (
            rearrange(project[name](x), "b n (h d) -> b h n d", h=self.heads)
            for name in ("query", "key", "value")
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.attention["output"]["dense"](rearrange(out, "b h n d -> b n (h d)"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Decoder(nn.Module):
    """ViT decoder (RAE section 3.1): tokens (B, N, C) -> (B, 3, p sqrt(N), p sqrt(N)), before pixel
    de-normalisation."""

    def __init__(
        self,
        latent_shape: tuple[int, int],
        patch_size: int,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_width: int = 4096,
    ):
        super().__init__()
        tokens, channels = latent_shape
        self.patch_size, self.side = patch_size, math.isqrt(tokens)
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        table = torch.cat([torch.zeros(1, width), sincos_table(tokens, width)])
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_layers = nn.ModuleList(DecoderLayer(width, heads, mlp_width) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.decoder_embed(latents)
        if x.shape[1] != self.side**2:  # another square grid: resized, as the authors do
            if math.isqrt(x.shape[1]) ** 2 != x.shape[1]:
                raise ValueError(f"{x.shape[1]} latent tokens are no square grid; give {self.side**2}")
            x = rearrange(x, "b (h w) d -> b d h w", h=math.isqrt(x.shape[1]))
            x = F.interpolate(x, (self.side, self.side), mode="bilinear").flatten(2).mT
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1).type_as(x), x], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x)[:, 1:])
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, c=3)


class RAE(nn.Module, Hub, library_name="rae"):
    """Representation autoencoder: frozen encoder, trained decoder, latent statistics (RAE section 3).

    encoder: hub id or local `transformers` folder; or its config as a dict, as written by `save_pretrained`.
    decoder_config: width, depth, heads, mlp_width, and patch_size, of the output, the encoder's by default.
    encoder_size: side of the encoder's input in pixels; other images are resized (bicubic, no antialias).
    image_mean, image_std: the encoder's pixel statistics. All three are read from the hub id or folder.

    `latent_mean` and `latent_std`, (N, C) buffers, normalise the latents; they start as 0 and 1 (none).
    """

    def __init__(
        self,
        encoder: str | dict,
        decoder_config: dict,
        encoder_size: int | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
    ):
        super().__init__()
        self.encoder = Encoder(encoder)
        if not isinstance(encoder, dict):
            side, image_mean, image_std = input_of(encoder, self.encoder)
            encoder_size = encoder_size or side
        if not (encoder_size and image_mean and image_std):
            raise ValueError(
                "an encoder given as a config needs encoder_size, image_mean and image_std beside it"
            )
        patch = self.encoder.config.patch_size
        if encoder_size % patch:
            raise ValueError(
                f"encoder_size {encoder_size} is not a multiple of the encoder's patch size {patch}"
            )
        decoder_config = {"patch_size": patch, **decoder_config}
        # what rebuilds this module without the encoder's folder; saved as config.json
        self._hub_mixin_config.update(
            decoder_config=decoder_config,
            encoder=self.encoder.config.to_diff_dict() | {"model_type": self.encoder.config.model_type},
            encoder_size=encoder_size,
            image_mean=image_mean,
            image_std=image_std,
        )
        side = encoder_size // patch
        self.encoder_size = encoder_size
        self.latent_shape = (side * side, self.encoder.config.hidden_size)
        self.image_size = side * decoder_config["patch_size"]
        self.decoder = Decoder(self.latent_shape, **decoder_config)
        self.register_buffer("latent_mean", torch.zeros(self.latent_shape))
        self.register_buffer("latent_std", torch.ones(self.latent_shape))
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "RAE":
        super().train(mode)
        self.encoder.eval()  # always frozen
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, N, C), fp32. Images of another size are resized, not
        cropped (bicubic without antialias, RAE's code, for every encoder: squares come from data.py, not from
        the encoders' own processors of files). 128 at once: a larger batch takes no more memory."""
        parts = []
        for part in images.split(128):
            if part.shape[-2:] != (self.encoder_size, self.encoder_size):
                part = F.interpolate(part, (self.encoder_size, self.encoder_size), mode="bicubic")
            parts.append(self.encoder((part - self.image_mean) / self.image_std).float())
        return (torch.cat(parts) - self.latent_mean) / self.latent_std

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Latents of tokens + sigma (B,) noise (B, N, C): the noise has the scale of the tokens before their
        normalisation (RAE section 4.2, noise-augmented decoding)."""
        return latents + sigma[:, None, None] * noise / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) -> (B, 3, image_size, image_size), around [0, 1] but not clamped."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {tuple(latents.shape[1:])}, this autoencoder has {self.latent_shape}")
        pixels = self.decoder(latents * self.latent_std + self.latent_mean)
        return pixels.float() * self.image_std + self.image_mean

    def resized(self, image_size: int) -> "RAE":
        """A copy for images of another size in pixels, in which the decoder's positions and the statistics
        are interpolated; the encoder interpolates its own."""
        side, rest = divmod(image_size, self.decoder.patch_size)
        if rest or not side:
            raise ValueError(f"{image_size} px is not a multiple of the patch of {self.decoder.patch_size}")
        other = RAE(**self._hub_mixin_config | {"encoder_size": side * self.encoder.config.patch_size})
        weights = self.state_dict()
        for name in ("latent_mean", "latent_std"):
            weights[name] = resize_grid(weights[name], side, "bilinear")
        table = weights["decoder.decoder_pos_embed"][0]
        table = torch.cat([table[:1], resize_grid(table[1:], side, "bicubic")])
        weights["decoder.decoder_pos_embed"] = table[None]
        other.load_state_dict(weights)
        return other.to(self.image_mean.device).train(self.training)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        encoder: str | None = None,
        stats: str | None = None,
        encoder_size: int | None = None,
        heads: int | None = None,
        revision: str | None = None,
    ) -> "RAE":
        """An autoencoder in eval mode. `source` is one of

        - a folder of `save_pretrained` or `save_diffusers`, or of diffusers' `AutoencoderRAE`; or a hub id;
        - a name in `convert.RELEASED`, such as "rae-dinov2-b": what the authors published;
        - a decoder of RAE (`model.pt`) or a decoder repository of Scale-RAE, with `encoder`, a hub id or
          folder whose weights are read from there, and maybe with `stats`, the file of latent statistics.

        Single files are given by their path, on the hub as org/repository/path. encoder_size and heads (of
        the decoder) are known of what is published. Raises ValueError for a file that is missing, unknown or
        does not fit, naming the first keys, and for arguments that `source` has itself.
        """
        import convert

        model = convert.open_rae(
            str(source), revision, encoder=encoder, stats=stats, encoder_size=encoder_size, heads=heads
        )
        return model or super().from_pretrained(source, revision=revision)

    def save_diffusers(self, folder: str | Path) -> None:
        """Writes a folder that `diffusers.AutoencoderRAE.from_pretrained` opens, with the same latents and
        images (SigLIP: with a `transformers` that has the names of 4.x, the only ones it knows by 0.42).

        Raises ValueError for what that class cannot hold: another encoder than those that it builds, another
        position table of the decoder than the one that it makes, the sin-cos one of 16 x 16 tokens.
        """
        import convert

        convert.write_diffusers(self, Path(folder))


class VAE(nn.Module):
    """A convolutional VAE of `diffusers` (FLUX's, or another AutoencoderKL) with the interface of RAE: the
    other latent space of Scale-RAE's comparison. Four neighbours of its latents are one token, in the order
    (channel, row, column): (256, 64) for FLUX at 256 px.

    name_or_path: folder or hub id of an AutoencoderKL, or of a pipeline that has one in its folder vae.
    image_size: side of the images in pixels; by default 256, or the file's sample_size if that is smaller.
    """

    def __init__(self, name_or_path: str | Path, image_size: int | None = None):
        super().__init__()
        from diffusers import AutoencoderKL

        import convert

        self.source = source = str(name_or_path)
        config, subfolder = convert.read_config(source)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{source} is no AutoencoderKL of diffusers but {config.get('_class_name')}")
        options = {"subfolder": subfolder, "output_loading_info": True, "low_cpu_mem_usage": False}
        try:
            self.vae, info = AutoencoderKL.from_pretrained(source, **options)
        except RuntimeError as error:  # of another shape
            raise ValueError(f"{source}: {error}") from error
        if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
            raise ValueError(f"{source}: {len(wrong)} keys are missing or unknown: {', '.join(wrong[:5])}")
        self.vae.float().requires_grad_(False).eval()
        config = self.vae.config
        self.image_size = image_size or min(256, config.sample_size)
        side, rest = divmod(self.image_size, 2 ** len(config.block_out_channels))
        if rest:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.image_size // side}")
        self.latent_shape = (side * side, 4 * config.latent_channels)
        self.shift, self.scale = config.shift_factor or 0.0, config.scaling_factor

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, N, C), fp32: the mean of the posterior, or with `noise`
        (B, N, C), standard normal, a sample of it, as Scale-RAE trains on. Images of another size are
        resized, not cropped. 32 at once: a larger batch takes no more memory."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        posteriors = [self.vae.encode(2 * part - 1).latent_dist for part in images.split(32)]
        mean, std = (
            rearrange(torch.cat(parts).float(), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
            for parts in zip(*((each.mean, each.std) for each in posteriors), strict=True)
        )
        z = mean if noise is None else mean + std * noise
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) -> (B, 3, image_size, image_size), around [0, 1] but not clamped."""
        side = math.isqrt(latents.shape[1])
        z = latents / self.scale + self.shift
        z = rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", h=side, p=2, q=2)
        return self.vae.decode(z).sample.float() / 2 + 0.5

    def resized(self, image_size: int) -> "VAE":
        """A copy for images of another size in pixels: a convolution takes any."""
        return VAE(self.source, image_size).to(next(self.parameters()).device)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VAE":
        return cls(source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder as diffusers does."""
        self.vae.save_pretrained(folder)


def open_autoencoder(source: str | Path) -> RAE | VAE:
    """The autoencoder of a folder, of a hub id or of a name in `convert.RELEASED`, in eval mode, whatever wrote it."""
    import convert

    source = str(source)
    if (
        source not in convert.RELEASED
        and convert.read_config(source)[0].get("_class_name") == "AutoencoderKL"
    ):
        return VAE(source)
    return RAE.from_pretrained(source)


# -----------------------------------------------------------------------------------------------------------
# 4. DiT


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition, per token
    (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, condition_width: int, qk_norm: bool, swiglu: bool):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = SwiGLU(width, swiglu_width(width)) if swiglu else MLP(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, channels: int, condition_width: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale)).float()


class LabelCondition(nn.Module):
    """Class labels (B,) -> (B, 1, width); the table's last row is the null condition."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def drop(self, labels: Tensor | None, dropped: Tensor) -> Tensor:
        labels = dropped.new_zeros(len(dropped), dtype=torch.long) if labels is None else labels
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]


class TokenCondition(nn.Module):
    """One condition vector per token, (B, N, width), taken as it is; a learned vector is the null
    condition."""

    def __init__(self, width: int):
        super().__init__()
        self.dropout_embedding = nn.Parameter(torch.zeros(width))

    def drop(self, vectors: Tensor | None, dropped: Tensor) -> Tensor:
        null = self.dropout_embedding.expand(len(dropped), 1, -1)
        return (
            null if vectors is None else torch.where(dropped[:, None, None], null.type_as(vectors), vectors)
        )

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors


class DiT(nn.Module, Hub, library_name="rae"):
    """Diffusion transformer on latent tokens, LightningDiT's blocks; the velocity of `flow_loss`.

    latent_shape: (N, C), a square grid of tokens.
    head: (width, depth, heads) of the wide shallow head of DiT-DH (RAE section 5), or None.
    num_classes or condition_width: class labels, or one vector of that width per token; with neither,
        unconditional.
    silu_condition: SiLU on time + condition before adaLN's own SiLU (Scale-RAE, RAE's DiT-DH; not RAE's DiT).
    readd_time: the time embedding is added again in front of the wide head (RAE; not Scale-RAE).
    xavier: xavier-uniform linear layers (RAE's DiT, Scale-RAE); RAE's DiT-DH has PyTorch's default.
    qk_norm: RMSNorm on queries and keys. swiglu: else a plain MLP. rotary, table: positions as rotations in
        attention and as a sin-cos table added to the tokens. Options of RAE's code; in all released weights
        the first is off, the others are on.
    spacing: of neighbouring positions, below 1 for more tokens than in the training (`LatentModel.resize`).
    """

    def __init__(
        self,
        latent_shape: tuple[int, int],
        width: int,
        depth: int,
        heads: int,
        head: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        condition_width: int | None = None,
        silu_condition: bool = True,
        readd_time: bool = False,
        xavier: bool = True,
        qk_norm: bool = False,
        swiglu: bool = True,
        rotary: bool = True,
        table: bool = True,
        spacing: float = 1.0,
    ):
        super().__init__()
        if num_classes and condition_width:
            raise ValueError(
                "a DiT is conditioned on labels (num_classes) or on vectors (condition_width), not on both"
            )
        if readd_time and condition_width not in (None, width):
            raise ValueError(
                f"readd_time adds the time embedding ({condition_width}) to the tokens ({width})"
            )
        tokens, channels = latent_shape
        self.depth, self.head = depth, head
        self.silu_condition, self.readd_time = silu_condition, readd_time
        z = condition_width or width
        self.t_embedder = TimeEmbedding(z)
        self.y_embedder = None
        if num_classes:
            self.y_embedder = LabelCondition(num_classes, z)
        elif condition_width:
            self.y_embedder = TokenCondition(z)
        positions = table * sincos_table(tokens, width, spacing)[None]
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        rope = rope_table(tokens, width // heads, rotary, spacing)
        self.register_buffer("rope", rope, persistent=False)
        blocks = [Block(width, heads, z, qk_norm, swiglu) for _ in range(depth)]
        out_width, out_condition = width, z
        if head:  # `s_embedder` feeds the backbone and `x_embedder` the head: the names of RAE's checkpoints
            out_width = out_condition = head[0]
            self.s_embedder = nn.Linear(channels, width)
            self.s_projector = nn.Identity() if head[0] == width else nn.Linear(width, head[0])
            rope = rope_table(tokens, head[0] // head[2], rotary, spacing)
            self.register_buffer("head_rope", rope, persistent=False)
            blocks += [Block(head[0], head[2], head[0], qk_norm, swiglu) for _ in range(head[1])]
        self.x_embedder = nn.Linear(channels, out_width)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(out_width, channels, out_condition)
        self.initialise(xavier)

    def initialise(self, xavier: bool) -> None:
        embedders = [self.x_embedder] + ([self.s_embedder] if self.head else [])
        for layer in [m for m in self.modules() if isinstance(m, nn.Linear)] if xavier else embedders:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(self.y_embedder, LabelCondition):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # every block starts as the identity and the velocity as zero
        modulations = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def drop_condition(self, condition: Tensor | None, dropped: Tensor) -> Tensor:
        """The null condition where `dropped` (B,) is true, `condition` elsewhere (None: null everywhere)."""
        if self.y_embedder is None:
            raise ValueError("this DiT is unconditional: it has no null condition")
        return self.y_embedder.drop(condition, dropped)

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, skip: int | None = None
    ) -> Tensor:
        """Velocity (B, N, C) at x (B, N, C), t (B,) in [0, 1].

        condition: labels (B,) or vectors (B, N, condition_width); None, or the label `num_classes`, is the
        null condition. Raises IndexError for labels beyond it, ValueError for a condition where the model has
        none. skip: the number of a block to leave out, from 0.
        """
        time = self.t_embedder(t)[:, None]
        c = (
            time
            if self.y_embedder is None and condition is None
            else time + self.embed_condition(condition, t)
        )
        if self.silu_condition:
            c = F.silu(c)
        s = (self.s_embedder if self.head else self.x_embedder)(x) + self.pos_embed
        for number, block in enumerate(self.blocks[: self.depth]):
            if number != skip:
                s = block(s, c, self.rope)
        if self.head:
            c = self.s_projector(F.silu(time + s if self.readd_time else s))
            s = self.x_embedder(x)
            for block in self.blocks[self.depth :]:
                s = block(s, c, self.head_rope)
        return self.final_layer(s, c)

    def embed_condition(self, condition: Tensor | None, t: Tensor) -> Tensor:
        if self.y_embedder is None:
            raise ValueError("this DiT is unconditional, but a condition was given")
        if condition is None:
            condition = self.y_embedder.drop(None, torch.ones_like(t, dtype=torch.bool))
        return self.y_embedder(condition)


def swiglu_width(width: int) -> int:
    """Hidden width of SwiGLU that keeps the parameters of a 4x MLP; the published rounding."""
    return int(2 / 3 * int(4 * width))


# -----------------------------------------------------------------------------------------------------------
# 5. flow matching: x_t = (1 - t) data + t noise, velocity = noise - data


def default_alpha(latent_shape: tuple[int, int]) -> float:
    """The factor of the timestep shift, sqrt(N C / 4096) (RAE section 4.3)."""
    return math.sqrt(latent_shape[0] * latent_shape[1] / 4096)


def shift_time(t: Tensor | float, alpha: float) -> Tensor | float:
    """alpha t / (1 + (alpha - 1) t): more noise for latents of more dimensions."""
    return alpha * t / (1 + (alpha - 1) * t)


def sample_time(u: Tensor, alpha: float, mean: float | None = 0.0, std: float = 1.0) -> Tensor:
    """Training times from uniform draws `u` in (0, 1): logit-normal(mean, std) or, with mean None, uniform;
    cut off at 0.999, then shifted."""
    if mean is None:
        return shift_time(0.999 * u, alpha)
    limit = NormalDist(mean, std).cdf(math.log(0.999 / 0.001))
    return shift_time((mean + std * torch.special.ndtri(u * limit)).sigmoid().clamp(0, 0.999), alpha)


def flow_loss(
    model: Callable[..., Tensor],
    latents: Tensor,
    condition: Tensor | None,
    alpha: float,
    noise: Tensor | None = None,
    t: Tensor | None = None,
) -> Tensor:
    """Mean squared velocity error of each sample, (B,). A given `t` (B,) is already shifted.

    Of more noise (k B, N, C), with its t (k B,) and condition, every latent takes k rows, B apart.
    """
    noise = torch.randn_like(latents) if noise is None else noise
    if len(noise) > len(latents):
        latents = latents.repeat(len(noise) // len(latents), 1, 1)
    t = sample_time(torch.rand(len(latents), device=latents.device), alpha) if t is None else t
    x = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
    return (model(x, t, condition) - (noise - latents)).square().mean(dim=(1, 2))


def time_grid(steps: int, alpha: float, grid: str = "full", start: float = 1.0) -> list[tuple[float, float]]:
    """(t, dt) of every Euler step.

    "full" goes from 1 to 0 in `steps` evaluations. "rae" has `steps` points from 1 to shift(0.001), which is
    one evaluation less. "scale-rae" also has steps - 1: it starts below 1 and ends with a small step back up
    to 1. What of the full grid lies below `start` begins there.
    """
    if start < 1 and grid != "full":
        raise ValueError(f"only grid 'full' can start at {start}, not {grid!r}")
    if steps < 1 + (grid != "full"):
        raise ValueError(f"grid {grid!r} needs more than {steps} step(s)")
    if grid == "full":
        base = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    elif grid == "rae":
        base = 1 - torch.linspace(0, 0.999, steps, dtype=torch.float64)
    elif grid == "scale-rae":
        base = (
            torch.tensor([round(k * 999 / (steps - 1)) + 1 for k in range(steps)], dtype=torch.float64) / 1000
        )
        base = torch.cat([base[:-1].flip(0), base[-1:]])  # downwards from the last but one
    else:
        raise ValueError(f"unknown grid {grid!r}: full, rae or scale-rae")
    points = shift_time(base, alpha).tolist()
    if start < 1:
        points = [start, *(t for t in points if t < start)]
    pairs = [(t, after - t) for t, after in zip(points, points[1:], strict=False)]
    if grid == "scale-rae":
        pairs[-1] = (points[0], 1 - points[0])
    return pairs


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int = 50,
    alpha: float | None = None,
    solver: str = "euler",
    grid: str = "full",
    start: float = 1.0,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t (B,)) from noise (B, N, C) to latents; the state is fp32.

    alpha: factor of the timestep shift, sqrt(N C / 4096) by default.
    solver: "euler", or "heun" (two evaluations a step).
    grid: see `time_grid`. start: the t that `noise` is at, if it is latents noised to less than 1.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: euler or heun")
    alpha = default_alpha(noise.shape[1:]) if alpha is None else alpha
    x = noise.float()
    for t, dt in time_grid(steps, alpha, grid, start):
        v = velocity(x, x.new_full((len(x),), t))
        if solver == "heun":
            v = (v + velocity(x + dt * v, x.new_full((len(x),), t + dt))) / 2
        x = x + dt * v
    return x


def guided(
    velocity: Callable[[Tensor, Tensor], Tensor],
    weaker: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, Tensor], Tensor]:
    """weaker + scale (velocity - weaker) while t is inside the interval (ends included), else `velocity`
    alone.

    With the null condition as `weaker` this is classifier-free guidance, with a smaller model AutoGuidance.
    The weaker one is only evaluated where its result is used.
    """
    if scale == 1:
        return velocity

    def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
        if interval != (0.0, 1.0) and not interval[0] <= t[0] <= interval[1]:
            return velocity(x, t)
        base = weaker(x, t)
        return base + scale * (velocity(x, t) - base)

    return guided_velocity


def graphed(velocity: Callable[[Tensor, Tensor], Tensor], like: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """`velocity` as a CUDA graph, for x of the shape of `like` (B, N, C): one launch in place of a thousand,
    which for few images take longer than the kernels themselves. On other devices as it is. To be used
    inside of the autocast that it was made in, while the weights stay where they are."""
    if not like.is_cuda:
        return velocity
    x, t, graph = torch.zeros_like(like), like.new_ones(len(like)), torch.cuda.CUDAGraph()
    with torch.cuda.device(like.device):
        velocity(x, t)  # compiles, and makes the casts that autocast keeps
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            v = velocity(x, t)

    def replay(x_now: Tensor, t_now: Tensor) -> Tensor:
        x.copy_(x_now)
        t.copy_(t_now)
        graph.replay()
        return v.clone()  # the next replay writes over it

    replay.reads = velocity  # its condition: the graph knows the address alone
    return replay


# -----------------------------------------------------------------------------------------------------------
# 6. labels to image, text to image


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; to CUDA from pinned memory, without waiting for what it has to do before."""
    cuda = device.type == "cuda" and not tensor.is_cuda
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


AUTOENCODERS = ("autoencoder", "reader")  # that a model may name


class LatentModel(nn.Module, Hub):
    """What makes latents with a DiT has in common: `dit`, `latent_shape`, `alpha`, the autoencoder that its
    latents belong to, and sampling. Subclasses turn prompts or labels into a condition of the DiT."""

    def __init__(self, latent_shape: tuple[int, int], autoencoder: str | None, alpha: float | None):
        super().__init__()
        self.latent_shape = tuple(latent_shape)
        self.alpha = default_alpha(latent_shape) if alpha is None else alpha
        self.autoencoder_path = autoencoder
        self._opened = {}  # in a dict they are no submodules: their weights stay in their own folders

    @property
    def device(self) -> torch.device:
        return self.dit.pos_embed.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, which are compiled, checkpointed and spread one by one."""
        return list(self.dit.blocks)

    @property
    def autoencoder(self) -> RAE | VAE:
        """The autoencoder whose latents this model makes, loaded at first use; not part of the weights."""
        return self.open(self.autoencoder_path)

    def open(self, path: str) -> RAE | VAE:
        if path not in self._opened:
            self._opened[path] = open_autoencoder(path)
        return self._opened[path].to(self.device)

    @torch.no_grad()
    def generate(
        self,
        inputs: Sequence,
        steps: int = 50,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        solver: str = "euler",
        grid: str = "full",
        guide: "LatentModel | None" = None,
        interval: tuple[float, float] = (0.0, 1.0),
        start: float = 1.0,
        skip: int | None = None,
        graph: bool = False,
    ) -> Tensor:
        """Latents (B, N, C) for prompts or class labels.

        guidance: its scale; 1 is none. By default guidance is classifier-free; with a `guide`, a weaker model
            of the same latents, it is AutoGuidance (arXiv 2406.02507). interval: of t, where it is used.
        skip: the number of a block; what that makes is then guided, at scale 2, by the model without the
            block, a weaker one that costs no memory (arXiv 2411.18664).
        noise: (B, N, C); drawn with `generator`, on its device, unless it is given. start: see `sample`.
        graph: see `graphed`.
        """
        if guidance != 1 and guide is None and self.dit.y_embedder is None:
            raise ValueError("an unconditional model has no classifier-free guidance: give a guide")
        if guidance != 1 and guide is not None and guide.latent_shape != self.latent_shape:
            raise ValueError(f"the guide makes latents {guide.latent_shape}, not {self.latent_shape}")
        if skip is not None and not 0 <= skip < self.dit.depth:
            raise ValueError(f"no block {skip} to leave out: the DiT's are 0 to {self.dit.depth - 1}")
        condition = self.condition(inputs)
        if noise is None:
            device = generator.device if generator else self.device
            noise = torch.randn(len(inputs), *self.latent_shape, generator=generator, device=device)
        noise = to_device(noise.float(), self.device)

        def velocity_of(dit: DiT, condition: Tensor | None, skip: int | None = None) -> Callable:
            velocity = partial(dit, condition=condition, skip=skip)
            return graphed(velocity, noise) if graph else velocity

        velocity = velocity_of(self.dit, condition)
        if guidance != 1:
            weaker = (self.dit, None) if guide is None else (guide.dit, guide.condition(inputs))
            velocity = guided(velocity, velocity_of(*weaker), guidance, interval)
        if skip is not None:
            velocity = guided(velocity, velocity_of(self.dit, condition, skip), 2.0, interval)
        return sample(velocity, noise, steps, self.alpha, solver, grid, start)

    def resize(self, autoencoder: RAE | VAE) -> None:
        """Changes the model to draw images of another size: in the latents of its autoencoder for that size
        (see `resized` there). Positions lie closer together or further apart, what was trained of the tables
        and queries is interpolated, and the timestep shift grows with the root of the number of tokens (RAE
        section 4.3). Without training, the more blurred the further it is from the trained size. Raises
        ValueError for latents of other channels and for a model that reads other latents than it draws."""
        tokens, channels = autoencoder.latent_shape
        if channels != self.latent_shape[1] or getattr(self, "reader_path", None):
            raise ValueError(
                f"a model of latents {self.latent_shape} cannot take on {autoencoder.latent_shape}"
            )
        side, old = math.isqrt(tokens), self.dit
        ratio, config = math.sqrt(self.latent_shape[0] / tokens), old._hub_mixin_config
        spacing = ratio * config["spacing"]
        new = DiT(**config | {"latent_shape": autoencoder.latent_shape, "spacing": spacing})
        width = old.pos_embed.shape[-1]
        table = config["table"] * sincos_table(self.latent_shape[0], width, config["spacing"])
        learned = resize_grid(old.pos_embed[0].cpu() - table, side, "bicubic")
        weights = old.state_dict() | {"pos_embed": new.pos_embed + learned}
        new.load_state_dict(weights)
        self.dit = new.to(old.pos_embed.device).train(self.training)
        if hasattr(self, "latent_queries"):
            queries = resize_grid(self.latent_queries.detach(), side, "bicubic")
            self.latent_queries = nn.Parameter(queries)
            self.read_shape = (tokens, channels)
        self.latent_shape, self.alpha = (tokens, channels), self.alpha / ratio
        self._hub_mixin_config["latent_shape"] = self.latent_shape
        self._hub_mixin_config["dit"] = self._hub_mixin_config["dit"] | {"spacing": spacing}
        self._opened[self.autoencoder_path] = autoencoder

    # -- one folder: config.json, model.safetensors, and for text the tokenizer's files

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As every model's, once the autoencoder is on the hub too and `autoencoder_path` is its id."""
        for name in AUTOENCODERS:
            if os.path.isdir(path := getattr(self, f"{name}_path", None) or ""):
                raise ValueError(f"push {path} first, then set {name}_path to its hub id")
        return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        self._hub_mixin_config["alpha"] = self.alpha
        for name in AUTOENCODERS:
            if path := getattr(self, f"{name}_path", None):
                beside = os.path.isdir(path)
                self._hub_mixin_config[name] = os.path.relpath(path, save_directory) if beside else path

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, **kwargs):
        model = super()._from_pretrained(model_id=model_id, config=config, **kwargs)
        for name in AUTOENCODERS:
            path = getattr(model, f"{name}_path", None)
            if path and (beside := Path(model_id) / path).is_dir():
                setattr(model, f"{name}_path", str(beside))
        return model


class ClassToImage(LatentModel, library_name="rae"):
    """A DiT of class labels, or of none (RAE section 5).

    dit: arguments of `DiT` but for latent_shape: width, depth, heads, ...; num_classes, or unconditional.
    latent_shape, autoencoder, alpha: as `TextToImage` has them.
    """

    def __init__(
        self,
        dit: dict,
        latent_shape: tuple[int, int],
        autoencoder: str | None = None,
        alpha: float | None = None,
    ):
        super().__init__(latent_shape, autoencoder, alpha)
        self.dit = DiT(latent_shape, **dit)

    @property
    def num_classes(self) -> int | None:
        return getattr(self.dit.y_embedder, "num_classes", None)

    def condition(self, labels: Sequence[int] | Tensor) -> Tensor | None:
        """Labels (B,) on the model's device; None where it is unconditional. Raises ValueError for a label
        that is none of its classes."""
        if self.num_classes is None:
            return None
        labels = torch.as_tensor(labels)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels are {labels.dtype}, not integers")
        if wrong := [label for label in labels.tolist() if not 0 <= label < self.num_classes]:
            raise ValueError(f"label {wrong[0]}: this model has the classes 0 to {self.num_classes - 1}")
        return to_device(labels, self.device)

    def forward(self, labels: Tensor, latents: Tensor, noise: Tensor, t: Tensor, dropped: Tensor) -> Tensor:
        """Velocity error of each sample, (B,), at the shifted time t (B,); labels are null where `dropped`
        (B,) is true. Noise, t and `dropped` for k draws a sample are k B long, as in `flow_loss`."""
        condition = None
        if self.num_classes is not None:
            condition = self.dit.drop_condition(labels.repeat(len(noise) // len(labels)), dropped)
        return flow_loss(self.dit, latents, condition, self.alpha, noise, t)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, autoencoder: str | None = None, revision: str | None = None
    ) -> "ClassToImage":
        """A folder of `save_pretrained` or a hub id; a name in `convert.RELEASED_DITS`, such as "rae-dit-dh-xl-256"; or
        a released file, `stage2_model.pt`, by its path, here or on the hub as org/repository/path."""
        import convert

        model = convert.open_class_to_image(str(source), revision)
        model = model or super().from_pretrained(source, revision=revision)
        model.autoencoder_path = autoencoder or model.autoencoder_path
        return model


IMAGE = -200  # stands for one patch of an image in a sequence of token ids
IGNORED = -100  # label of a token that is not learned
SYSTEM = "You are a helpful assistant."
REQUEST = "Generate an image of {}"  # how a bare prompt becomes a user's turn
REPLY = "Here you go:\n<image>"  # the answer


def chat_ml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chat_length(conversation: list[tuple[str, str]], tokenizer, image: int) -> int:
    """Tokens of a conversation as `TextToImage.encode_chat` makes them; `image`: of an image."""
    micro_batches = "".join(chat_ml(*turn) for turn in [("system", SYSTEM), *conversation]).split("<image>")
    text = sum(len(tokenizer.encode(micro_batch, add_special_tokens=False)) for micro_batch in micro_batches)
    return text + (len(micro_batches) - 1) * (image + 2)


@dataclass
class Chat:
    """A batch of tokenised conversations. Positions index the flattened (B * L) sequence."""

    ids: Tensor  # (B, L), IMAGE where an image is
    predict: Tensor  # (T,) positions whose next token is learned
    targets: Tensor  # (T,) that token
    answers: Tensor  # (A, N) positions of the images to generate
    contexts: Tensor  # (C, N) positions of the images to read
    answer_index: Tensor  # (A,) which of the batch's images, in order, are to generate
    context_index: Tensor  # (C,) and which to read

    def to(self, device: torch.device) -> "Chat":
        return Chat(*(to_device(getattr(self, field.name), device) for field in fields(self)))


class TextToImage(LatentModel, library_name="rae"):
    """A language model that draws: learnable queries after the prompt collect one condition vector per latent
    token for a DiT, and images are read back through a projector (Scale-RAE section 3).

    language_model: hub id or local folder of a causal model of `transformers` with a ChatML tokenizer; or its
        config as a dict, as written by `save_pretrained`.
    dit: arguments of `DiT`: width, depth, heads, ...; condition_width is the width unless given.
    latent_shape: (N, C) of the autoencoder; there are N queries.
    autoencoder: its folder or hub id. A folder is remembered relative to this model's own folder.
    alpha: factor of the timestep shift, sqrt(N C / 4096) by default.
    reader, reader_channels: another autoencoder and the channels of its N tokens, as which images are read.
        Scale-RAE keeps SigLIP-2's for that where it draws in a VAE's latents.
    """

    def __init__(
        self,
        language_model: str | dict,
        dit: dict,
        latent_shape: tuple[int, int],
        autoencoder: str | None = None,
        alpha: float | None = None,
        reader: str | None = None,
        reader_channels: int | None = None,
    ):
        super().__init__(latent_shape, autoencoder, alpha)
        self.reader_path = reader
        self.read_shape = (latent_shape[0], reader_channels or latent_shape[1])
        self.tokenizer = None  # `from_pretrained` sets it where language_model is a config
        self.im_start = self.im_end = None  # its ids of the tokens around an image
        if isinstance(language_model, dict):
            config = transformers.AutoConfig.for_model(**language_model)
            self.language_model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
            self.language_model = transformers.AutoModelForCausalLM.from_pretrained(language_model)
            self.add_image_tokens(tokenizer)
        self.language_model.float()  # files are often bf16
        config = self.language_model.config
        self._hub_mixin_config["language_model"] = config.to_diff_dict() | {"model_type": config.model_type}
        tokens, width = latent_shape[0], config.hidden_size
        dit = {"condition_width": dit["width"], **dit}
        self.dit = DiT(latent_shape, **dit)
        self.latent_queries = nn.Parameter(torch.randn(tokens, width) / math.sqrt(width))
        read = nn.Linear(self.read_shape[1], width)
        self.mm_projector = nn.Sequential(read, nn.GELU(), nn.Linear(width, width))
        self.diff_head_projector = nn.Linear(width, dit["condition_width"])  # the connector
        # Scale-RAE's 0.02 from its width of 1536 on; below it as loud, for it is added to the time
        std = 0.02 * max(1.0, math.sqrt(1536 / width))
        nn.init.normal_(self.diff_head_projector.weight, std=std)
        nn.init.zeros_(self.diff_head_projector.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.dit.blocks, *self.language_model.model.layers]

    @property
    def reader(self) -> RAE | VAE:
        """The autoencoder whose latents are read, `read_shape` each; not part of the weights."""
        return self.open(self.reader_path or self.autoencoder_path)

    # -- tokens

    def set_tokenizer(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Raises ValueError for a vocabulary without <im_start> and <im_end>."""
        vocabulary = tokenizer.get_vocab()
        if missing := {"<im_start>", "<im_end>"} - vocabulary.keys():
            raise ValueError(f"the tokenizer has no {' and no '.join(sorted(missing))}")
        self.tokenizer = tokenizer
        self.im_start, self.im_end = vocabulary["<im_start>"], vocabulary["<im_end>"]

    def add_image_tokens(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Adds <im_start> and <im_end> (not Qwen's <|im_start|>); their rows start as the mean of all
        others."""
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
        self.set_tokenizer(tokenizer)
        self.language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # exactly
        for embeddings in (
            self.language_model.get_input_embeddings(),
            self.language_model.get_output_embeddings(),
        ):
            with torch.no_grad():
                embeddings.weight[-2:] = embeddings.weight[:-2].mean(dim=0)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_chat(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids and labels of a conversation of (role, text) turns, after the system turn.

        ChatML: <|im_start|>role, a line feed, the text, <|im_end|>, a line feed. Each <image> in a text
        becomes <im_start>, N times IMAGE, <im_end>. The assistant's turns are learned, header included, and
        everywhere the line feeds, <|im_start|> and <|im_end|> (the reference's rule); images never are.
        """
        always = {
            *self.tokens("\n"),
            *self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]),
        }
        ids, labels = [], []
        for role, text in [("system", SYSTEM), *turns]:
            turn = self.encode_turn(role, text)
            ids += turn
            learned = (i != IMAGE and (role == "assistant" or i in always) for i in turn)
            labels += [i if yes else IGNORED for i, yes in zip(turn, learned, strict=True)]
        return ids, labels

    def encode_turn(self, role: str, text: str) -> list[int]:
        first, *rest = chat_ml(role, text).split("<image>")
        ids = self.tokens(first)
        for micro_batch in rest:
            ids += [self.im_start, *[IMAGE] * self.latent_shape[0], self.im_end, *self.tokens(micro_batch)]
        return ids

    def chat(self, conversations: list[list[tuple[str, str]]]) -> Chat:
        """Tokenises a batch of conversations, see `encode_chat`; padded on the right to the longest."""
        return self.collate([self.encode_chat(turns) for turns in conversations])

    def collate(self, encoded: list[tuple[list[int], list[int]]]) -> Chat:
        """A batch from (ids, labels) pairs. An image is an answer where the token before it, its <im_start>,
        is learned; otherwise it is something to read."""
        max_seq_len = max(len(ids) for ids, _ in encoded)
        ids = torch.tensor([i + [0] * (max_seq_len - len(i)) for i, _ in encoded])  # nobody reads the padding
        labels = torch.tensor([i + [IGNORED] * (max_seq_len - len(i)) for _, i in encoded])
        next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        predict = (next_labels != IGNORED).nonzero().flatten()
        images = (ids == IMAGE).flatten().nonzero().view(-1, self.latent_shape[0])
        learned = labels.flatten()[images[:, 0] - 1] != IGNORED
        answer_index, context_index = learned.nonzero().flatten(), (~learned).nonzero().flatten()
        answers, contexts = images[answer_index], images[context_index]
        return Chat(ids, predict, next_labels[predict], answers, contexts, answer_index, context_index)

    # -- training

    def embed(self, chat: Chat, context_latents: Tensor | None = None) -> Tensor:
        """Input embeddings (B, L, width); images to generate are the queries, images to read, (C,
        *read_shape), are projected. Raises ValueError for latents of another space."""
        if context_latents is not None and context_latents.shape[1:] != self.read_shape:
            raise ValueError(
                f"latents {tuple(context_latents.shape[1:])} cannot be read, only {self.read_shape}"
            )
        embeddings = self.language_model.get_input_embeddings()(chat.ids.clamp(min=0))
        # no branches: every process touches every weight, even where its part of the batch needs it not
        flat, queries = embeddings.flatten(0, 1), self.latent_queries.repeat(len(chat.answers), 1)
        flat = flat.index_copy(0, chat.answers.flatten(), queries.type_as(flat))
        if context_latents is not None:
            projected = self.mm_projector(context_latents).type_as(flat)
            flat = flat.index_copy(0, chat.contexts.flatten(), projected.flatten(0, 1))
        return flat.view_as(embeddings)

    def hidden_states(self, embeddings: Tensor) -> Tensor:
        """(B, L, width) -> last hidden states, flattened to (B * L, width). Causal; padding on the right is
        harmless."""
        model, config = self.language_model.model, self.language_model.config
        masks = None
        causal = (config.model_type, config._attn_implementation) == ("qwen2", "sdpa")
        if causal and set(config.layer_types) == {"full_attention"}:
            # without a mask; to make one, `transformers` would ask the card whether positions are packed
            masks = {"full_attention": None}
        out = model(inputs_embeds=embeddings, attention_mask=masks, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)

    def forward(
        self,
        chat: Chat,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        dropped: Tensor,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two losses, unreduced over the batch: summed cross-entropy over len(chat.targets) tokens, and
        the velocity error of each of the An images to generate, (A,).

        latents, noise (P, N, C), shifted time t (P,) and the condition dropout (P,) belong to all P images
        of the batch, in order; so do the latents of another reader, `read` (P, *read_shape). The papers' loss
        is the mean of the first + 2 x the mean of the second, each over the global batch. With k draws of
        noise, time and dropout an image, k P rows, the language model still reads once, and k A errors come
        back.
        """
        answer = chat.answer_index
        draws = len(noise) // len(latents) if len(latents) else 1
        rows = torch.cat([answer + k * len(latents) for k in range(draws)])
        contexts = (latents if read is None else read)[chat.context_index]
        hidden = self.hidden_states(self.embed(chat, contexts))
        logits = self.language_model.lm_head(hidden[chat.predict]).float()
        cross_entropy = F.cross_entropy(logits, chat.targets, reduction="sum")
        condition = self.diff_head_projector(hidden[chat.answers]).repeat(draws, 1, 1)
        condition = self.dit.drop_condition(condition, dropped[rows])
        return cross_entropy, flow_loss(
            self.dit, latents[answer], condition, self.alpha, noise[rows], t[rows]
        )

    # -- inference

    def plain_text(self, texts: list[str], max_tokens: int = 256) -> None:
        """Raises ValueError for user text that is empty, over-long, or contains a special token."""
        special = [*self.tokenizer.get_added_vocab(), "<image>"]
        for text in texts:
            if not text.strip():
                raise ValueError("empty prompt: describe an image, for example 'a red circle'")
            if found := next((token for token in special if token in text), None):
                raise ValueError(f"the prompt contains the special token {found}: remove it")
            if (length := len(self.tokens(text))) > max_tokens:
                raise ValueError(f"the prompt has {length} tokens, the limit is {max_tokens}: shorten it")

    @torch.no_grad()
    def condition(self, prompts: list[str] | Tensor) -> Tensor:
        """Condition vectors (B, N, Z) for descriptions of images: one pass of the language model over the
        request, the beginning of the answer and the queries. Those of a `Dialogue` are taken as they are.
        Raises ValueError for an empty or over-long prompt."""
        if isinstance(prompts, Tensor):
            return prompts
        self.plain_text(prompts)
        chat = self.chat([[("user", REQUEST.format(p)), ("assistant", REPLY)] for p in prompts]).to(
            self.device
        )
        return self.diff_head_projector(self.hidden_states(self.embed(chat))[chat.answers])

    @torch.no_grad()
    def answer(self, image_or_latents: Tensor, question: str, max_tokens: int = 64) -> str:
        """Answers a question about one image, (3, H, W) in [0, 1], or about its latents, `read_shape`;
        greedy."""
        return Dialogue(self).say(question, image_or_latents, max_tokens)[0]

    # -- test-time scaling: the model judges its own latents (Scale-RAE section 5)

    @torch.no_grad()
    def verify(self, prompt: str, latents: Tensor, max_tokens: int = 16) -> list["Verdict"]:
        """What the language model thinks of images for a prompt, latents (B, *read_shape), without decoding
        them. Raises ValueError for a prompt that is empty, over-long or contains a special token."""
        self.plain_text([prompt])
        header = self.tokens("<|im_start|>assistant\n")
        question = f"<image>\nDoes this image align with the prompt: {prompt}?"
        question, description = (
            self.encode_chat([("user", text)])[0] + header
            for text in (question, "<image>\nDescribe this image.")
        )
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        answers = self.answer_logits(question, latents, *map(self.forms, ("yes", "no")), end, max_tokens)
        confidence = self.prompt_confidence(description, self.tokens(prompt), latents)
        return [Verdict(*each) for each in zip(*answers, confidence.tolist(), strict=True)]

    def forms(self, word: str) -> list[int]:
        """The ids of a word in lower case, with a capital and in capitals, with and without a space before
        it, as far as each is one token."""
        forms = [f"{space}{form}" for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
        return [ids[0] for form in forms if len(ids := self.tokens(form)) == 1]

    def answer_logits(
        self, ids: list[int], latents: Tensor, yes: list[int], no: list[int], end: int, max_tokens: int
    ) -> tuple[list[str], list[float], list[float]]:
        """Greedy answers to one question about each of B images: "yes" where any token is one of `yes`,
        otherwise "no" or "uncertain"; and the raw logits of the last token that is one of `yes` and of `no`,
        0 where there is none."""
        model, cache = self.language_model, transformers.DynamicCache(config=self.language_model.config)
        chat = self.collate([(ids, [IGNORED] * len(ids))] * len(latents)).to(self.device)
        embeddings, alive = (
            self.embed(chat, latents.to(self.device)),
            torch.ones(len(latents), dtype=torch.bool),
        )
        words = [torch.tensor(word, dtype=torch.long, device=self.device) for word in (yes, no)]
        alive = alive.to(self.device)
        logits = [alive.new_zeros(len(latents), dtype=torch.float) for _ in words]
        said = [torch.zeros_like(alive) for _ in words]
        for _ in range(max_tokens):
            hidden = model.model(None, None, None, cache, embeddings, use_cache=True).last_hidden_state[:, -1]
            logit, token = model.lm_head(hidden).float().max(dim=-1)
            for i, word in enumerate(words):
                found = alive & torch.isin(token, word)
                logits[i], said[i] = torch.where(found, logit, logits[i]), said[i] | found
            alive = alive & (token != end)
            if not alive.any():
                break
            embeddings = model.get_input_embeddings()(token)[:, None]
        answers = [
            "yes" if y else "no" if n else "uncertain" for y, n in zip(*map(Tensor.tolist, said), strict=True)
        ]
        return answers, *map(Tensor.tolist, logits)

    def prompt_confidence(self, ids: list[int], prompt: list[int], latents: Tensor) -> Tensor:
        """(B,): how certain the model is while it reads the prompt as a description of each of B images.
        Mean over the prompt's positions of KL(uniform || next token) (self-certainty, arXiv 2502.18581)."""
        ids = [*ids, *prompt]
        chat = self.collate([(ids, [IGNORED] * len(ids))] * len(latents)).to(self.device)
        hidden = self.hidden_states(self.embed(chat, latents.to(self.device)))
        hidden = hidden.view(len(latents), len(ids), -1)[:, -len(prompt) :]
        log_p = self.language_model.lm_head(hidden).float().log_softmax(dim=-1)
        return -(log_p.mean(dim=(1, 2)) + math.log(log_p.shape[-1]))

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, autoencoder: str | None = None, revision: str | None = None
    ) -> "TextToImage":
        """A folder of `save_pretrained` or a hub id; a name in `convert.RELEASED_TEXT_TO_IMAGE`, such as
        "scale-rae-1.5b-2.4b"; or the authors' own: a folder or hub id with their config.json, the tokenizer
        and the weights (safetensors or pickles, whole or in shards), or their trainer's `model.pth.zstd` with
        the other two beside it, by its path or its folder's.

        No file of theirs has the vision encoder, which their code keeps out of the state dict: it comes with
        the autoencoder, which follows from the encoder that their config names, unless it is given. Raises
        ValueError for a config, keys or shapes that this model has no place for.
        """
        import convert

        model = convert.open_text_to_image(str(source), revision)
        model = model or super().from_pretrained(source, revision=revision)
        model.autoencoder_path = autoencoder or model.autoencoder_path
        return model

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, **kwargs):
        model = super()._from_pretrained(model_id=model_id, config=config, **kwargs)
        model.set_tokenizer(transformers.AutoTokenizer.from_pretrained(model_id))
        return model


class Verdict(NamedTuple):
    """What a language model thinks of an image for a prompt."""

    answer: str  # to whether they align: yes, no or uncertain
    yes_logit: float
    no_logit: float
    prompt_confidence: float


VERIFIERS = {  # keys to sort verdicts by, the best first; ties stay in order
    "answer_logits": lambda verdict: (verdict.answer != "yes", -verdict.yes_logit, verdict.no_logit),
    "prompt_confidence": lambda verdict: -verdict.prompt_confidence,
}


def best(verdicts: list[Verdict], verifier: str, keep: int) -> list[int]:
    """Which images to keep, the best first."""
    order = sorted(range(len(verdicts)), key=lambda i: VERIFIERS[verifier](verdicts[i]))
    return order[:keep]


class Dialogue:
    """A conversation with a TextToImage model in which the model decides what to do: it answers in words,
    greedily, and may begin an image. Keys and values of what was said are kept, so that every turn costs its
    own tokens only.
    """

    def __init__(self, model: TextToImage):
        self.model, self.cache = model, transformers.DynamicCache(config=model.language_model.config)
        self.ahead = model.encode_turn("system", SYSTEM)  # tokens that are part of it, but not read yet

    @torch.no_grad()
    def say(
        self, text: str, image_or_latents: Tensor | None = None, max_tokens: int = 64
    ) -> tuple[str, Tensor | None]:
        """The reply to a user's turn, as it stands and with no request put around it: its words, and where
        they end with an image the condition vectors (1, N, Z) to draw it from, else None.

        image_or_latents: something to look at in this turn, (3, H, W) in [0, 1] or of `read_shape`. An image
        ends the turn, and later turns see its queries, as in training. Raises ValueError for a text that is
        empty, over-long or contains a special token.
        """
        model, latents = self.model, None
        model.plain_text([text], max_tokens=1024)
        if image_or_latents is not None:
            text, image = f"<image>\n{text}", image_or_latents.to(model.device)[None]
            latents = image if image.ndim == 3 else model.reader.encode(image)
        end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [*self.ahead, *model.encode_turn("user", text), *model.tokens("<|im_start|>assistant\n")]
        hidden, said = self.read(ids, latents), []
        while len(said) < max_tokens:
            token = model.language_model.lm_head(hidden[-1:]).argmax().item()
            if token in (end, model.im_start):
                break
            hidden = self.read([token])
            said.append(token)
        else:
            token = end
        condition = None
        self.ahead = model.tokens("<|im_end|>\n")
        if token == model.im_start:
            self.read([token])
            condition = model.diff_head_projector(self.forward(model.latent_queries[None]))[None]
            self.ahead = [model.im_end, *self.ahead]
        return model.tokenizer.decode(said, skip_special_tokens=True).strip(), condition

    def read(self, ids: list[int], latents: Tensor | None = None) -> Tensor:
        """Hidden states (L, width) of tokens that follow what was read, with one image among them if there
        are latents (1, N, C)."""
        chat = self.model.collate([(ids, [IGNORED] * len(ids))]).to(self.model.device)
        return self.forward(self.model.embed(chat, latents))

    def forward(self, embeddings: Tensor) -> Tensor:
        # by position: `transformers` 5.40 renames past_key_values to cache
        out = self.model.language_model.model(None, None, None, self.cache, embeddings, use_cache=True)
        return out.last_hidden_state[0]


# -----------------------------------------------------------------------------------------------------------
# 7. presets and released weights

ENCODERS = {  # hub ids
    "siglip2-so400m": "google/siglip2-so400m-patch14-224",
    "siglip2-b": "google/siglip2-base-patch16-256",
    "dinov2-s": "facebook/dinov2-with-registers-small",
    "dinov2-b": "facebook/dinov2-with-registers-base",
    "dinov2-l": "facebook/dinov2-with-registers-large",
    "dinov3-b": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "webssl-l": "facebook/webssl-dino300m-full2b-224",
    "mae-b": "facebook/vit-mae-base",
    "mae-l": "facebook/vit-mae-large",
    "dino-s8": "facebook/dino-vits8",  # the discriminators' backbones
    "dino-s16": "facebook/dino-vits16",
}

DECODERS = {  # RAE appendix; the XL's MLP is not 4 x its width; S is ours, for small GPUs
    "ViT-S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "ViT-B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "ViT-L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "ViT-XL": {"width": 1152, "depth": 28, "heads": 16, "mlp_width": 4096},
    "nano": {"width": 160, "depth": 4, "heads": 5, "mlp_width": 640},
}

HEAD = {"head": (2048, 2, 16), "readd_time": True, "xavier": False}  # of DiT-DH
WIDE = {"head": (2688, 2, 16)}  # Scale-RAE's; the number of its heads is not published
SCALE_DITS = {  # Scale-RAE table 10
    "0.5B": {"width": 1280, "depth": 16, "heads": 32},
    "2.4B": {"width": 2048, "depth": 32, "heads": 32},
    "3.1B": {"width": 2304, "depth": 32, "heads": 32},
    "5.5B": {"width": 3072, "depth": 32, "heads": 32},
    "9.8B": {"width": 4096, "depth": 32, "heads": 32},
}
DITS = {  # RAE, Scale-RAE with and without the wide head, and the laptop's
    "DiT-S": {"width": 384, "depth": 12, "heads": 6, "silu_condition": False},
    "DiT-B": {"width": 768, "depth": 12, "heads": 12, "silu_condition": False},
    "DiT-L": {"width": 1024, "depth": 24, "heads": 16, "silu_condition": False},
    "DiT-XL": {"width": 1152, "depth": 28, "heads": 16, "silu_condition": False},
    "DiT-DH-S": {"width": 384, "depth": 12, "heads": 6} | HEAD,
    "DiT-DH-B": {"width": 768, "depth": 12, "heads": 12} | HEAD,
    "DiT-DH-L": {"width": 1024, "depth": 24, "heads": 16} | HEAD,
    "DiT-DH-XL": {"width": 1152, "depth": 28, "heads": 16} | HEAD,
    **SCALE_DITS,
    **{f"{name}-DH": size | WIDE for name, size in SCALE_DITS.items()},
    "nano": {"width": 256, "depth": 6, "heads": 4, "condition_width": 128},
    "nano-DH": {"width": 256, "depth": 6, "heads": 4, "condition_width": 128, "head": (320, 2, 5)},
    "nano-guide": {"width": 128, "depth": 4, "heads": 4, "condition_width": 128},  # for AutoGuidance
    "nano-guide-DH": {"width": 128, "depth": 4, "heads": 4, "condition_width": 128, "head": (320, 2, 5)},
}


def class_dit(name: str, num_classes: int | None) -> dict:
    """Arguments of `DiT` for class labels, or with None for none, from a name in DITS."""
    size = {key: value for key, value in DITS[name].items() if key != "condition_width"}
    return size | ({"num_classes": num_classes} if num_classes else {})


def from_official(state_dict: dict[str, Tensor], **given) -> nn.Module:
    """The module of a state dict that the authors released; see `convert.from_official`."""
    import convert

    return convert.from_official(state_dict, **given)
