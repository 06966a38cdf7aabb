"""Representation autoencoders and text-to-image in their latent space: every model in one file.

A frozen vision encoder turns an image into tokens and a trained decoder turns the tokens back into pixels
(RAE, arXiv 2510.11690). A diffusion transformer learns to generate such tokens, conditioned on class labels
(RAE) or on the hidden states of a language model (Scale-RAE, arXiv 2601.16208). RAEv2 (arXiv 2605.18324)
averages several encoder layers, puts timestep and condition into the sequence, and predicts clean latents.

    1. layers          RMSNorm, rotary and sin-cos positions, attention, SwiGLU, timestep embedding
    2. encoders        one wrapper around the vision models of `transformers`
    3. autoencoders    the ViT decoder; RAE = encoder + decoder + latent statistics; VAE, for comparison
    4. DiT             the diffusion transformer, with or without the DDT head; RAEv2's InContextDiT
    5. flow matching   timestep shift, loss, sampler, guidance
    6. models          ClassToImage: labels -> DiT; TextToImage: language model -> queries -> DiT;
                       CaptionToImage: tokens of a frozen language model -> InContextDiT
    7. dialogue        and test-time scaling
    8. sizes           the papers' names

Conventions: latents are tokens (B, N, C) in raster order; t = 0 is data and t = 1 is noise; images are (B, 3,
H, W) in [0, 1]. Conditions have width Z, captions K tokens. Of the images in a batch of conversations, A
(answers) are generated, with k draws of noise and t each, and R are read. Parameters are fp32. Run under
`torch.autocast` for bf16 compute: norms, rotary positions, losses and the sampler's state stay in fp32.
`convert.py` reads what the authors and diffusers released.
"""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
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


class Hub(PyTorchModelHubMixin, library_name="rae"):
    """`save_pretrained(folder)` writes config.json (the arguments of `__init__`) and model.safetensors;
    `from_pretrained(folder or hub id)` reads them back strictly; `push_to_hub(id)` uploads them."""

    @classmethod
    def _from_pretrained(cls, *, config: dict | None = None, **kwargs):
        if config is None:
            raise ValueError(
                f"{kwargs['model_id']} has no config.json, or is a hub repository that cannot be read"
            )
        # the mixin ignores arguments that `__init__` does not have, and loads weights that do not fit
        if unknown := sorted(set(config) - set(cls._hub_mixin_init_parameters)):
            raise ValueError(f"config.json has keys that {cls.__name__} does not know: {', '.join(unknown)}")
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):  # the mixin prints a line
            return super()._from_pretrained(**(kwargs | {"strict": True}))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # fp32 statistics whatever the input is
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).type_as(x) * self.weight


def grid_positions(tokens: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a square grid in raster order: two (N,) float64 tensors."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens do not form a square grid")
    # float64, so that the tables are rounded once, to fp32
    index = torch.arange(tokens, dtype=torch.float64)
    return index.div(side, rounding_mode="floor"), index % side


def sincos_table(tokens: int, width: int, spacing: float = 1.0) -> Tensor:
    """The fixed 2-D position table of MAE, (N, width): [sin, cos] of the column, then [sin, cos] of the row.
    spacing: distance of neighbouring positions, 1 except in diffusers' decoders."""
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = grid_positions(tokens)
    row, column = row[:, None] * spacing * frequency, column[:, None] * spacing * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()


def rope_table(tokens: int, head_width: int) -> Tensor:
    """cos and sin of the 2-D axial rotary embedding, (2, N, head_width)."""
    half = head_width // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = grid_positions(tokens)
    # Caution: the first half of the channels follows the row, the second the column, unlike in
    # `sincos_table`.
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)
    # each angle serves two neighbouring channels
    angle = angle.repeat_interleave(2, dim=1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates neighbouring channel pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin), in fp32."""
    # (..., d) -> two of (..., d / 2)
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-x1, x0], dim=-1).flatten(-2)
    return (x.float() * rope[0] + rotated * rope[1]).type_as(x)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; qk_norm: RMSNorm on queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """key_mask: (B, N) bool, which tokens are attended to; None: all."""
        # (B, N, width) -> three of (B, heads, N, width / heads)
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        # norms and rotation give fp32 under autocast, which SDPA would not mix with the bf16 of v
        q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        q, k = q.type_as(v), k.type_as(v)
        # Without a mask SDPA picks flash attention. It rejects an empty batch on CUDA; the product keeps the
        # graph alive, so that FSDP can still reduce the gradients of a rank without images.
        mask = None if key_mask is None else key_mask[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask) if len(x) else q * k * v
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the two halves of w12(x). Published weights, which are not padded,
    load too."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = int(2 / 3 * int(4 * width))  # the published rounding
        # It is often odd, and tensor cores want rows of a multiple of 8, so it is rounded up. The padding is
        # zero and so are its gradients: it stays zero, and the output is that of the published width.
        padded = self.hidden + -self.hidden % 8
        self.w12 = nn.Linear(width, 2 * padded)
        self.w3 = nn.Linear(padded, width)
        self.zero_padding()

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Call this after every initialisation."""
        self.w12.weight.unflatten(0, (2, -1))[:, self.hidden :] = 0
        self.w12.bias.unflatten(0, (2, -1))[:, self.hidden :] = 0
        self.w3.weight[:, self.hidden :] = 0

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        for name in (prefix + "w12.weight", prefix + "w12.bias"):
            if name in state_dict and len(state_dict[name]) != len(self.w12.bias):
                # (2 hidden, ...) -> (2, hidden, ...): each half is padded
                halves = state_dict[name].unflatten(0, (2, -1))
                padding = (0, 0) * (halves.ndim - 2) + (0, -halves.shape[1] % 8)
                state_dict[name] = F.pad(halves, padding).flatten(0, 1)
        name = prefix + "w3.weight"
        if name in state_dict and state_dict[name].shape != self.w3.weight.shape:
            state_dict[name] = F.pad(state_dict[name], (0, -state_dict[name].shape[1] % 8))
        super()._load_from_state_dict(state_dict, prefix, *args)


class MLP(nn.Module):
    """Two linear layers around a tanh GELU: an option of RAE's code that no released weights use."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of t in [0, 1], then a two-layer MLP: (B,) -> (B, width)."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        # RAE trained the frequencies; Scale-RAE drew them with this seed and left them out of its files. Here
        # they are saved, and trainable in InContextDiT alone.
        generator = torch.Generator().manual_seed(114514)
        frequency = torch.randn(frequencies, generator=generator, device="cpu")
        self.W = nn.Parameter(frequency, requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # t is not scaled by 1000, as it is in other DiTs
        angle = 2 * math.pi * t[:, None].float() * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


# -----------------------------------------------------------------------------------------------------------
# 2. encoders


class Family(NamedTuple):
    """How to use one family of vision models of `transformers`."""

    model: str  # class name
    norm: str | None  # the final LayerNorm, whose affine part is removed; None: kept as it is
    class_tokens: int  # leading tokens to drop; register tokens are counted from the config
    interpolate: bool  # other image sizes need interpolate_pos_encoding=True
    pooled: bool = False  # several layers: whether their mean also gets the pooled vector (RAEv2)


# By config.model_type. Add a line to support another model of `transformers` whose config has hidden_size and
# patch_size; then a name in ENCODERS below, and a preset in train_decoder.py.
FAMILIES = {
    "siglip_vision_model": Family("SiglipVisionModel", "post_layernorm", 0, True, True),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm", 1, False),
    "dinov2": Family("Dinov2Model", None, 1, False),  # WebSSL-DINO: Scale-RAE keeps its affine norm
    "dinov3_vit": Family("DINOv3ViTModel", "norm", 1, False, True),
    "vit_mae": Family("ViTMAEModel", "layernorm", 1, True),
    "vit": Family("ViTModel", "layernorm", 1, True),  # DINO, the backbone of the discriminator
}


class Encoder(nn.Module):
    """A frozen vision transformer: normalised pixels (B, 3, S, S) -> patch tokens (B, N, C).

    source: hub id or local `transformers` folder (pretrained weights), or the config of one as a dict
        (weights are loaded later, from a state dict). `overrides` replace values of its config.
    layers: blocks, counted from 0, whose normalised tokens are averaged (RAEv2); default: the last one alone.
    affine: keep the learned scale and shift of the final norm. The papers drop them, except for SigLIP with
        `layers`, which is the default; WebSSL (`dinov2`) always keeps them.
    """

    def __init__(
        self,
        source: str | dict,
        overrides: dict | None = None,
        layers: Sequence[int] | None = None,
        affine: bool | None = None,
    ):
        super().__init__()
        overrides = overrides or {}
        if isinstance(source, dict):
            config = transformers.AutoConfig.for_model(**(source | overrides))
        else:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        # of SigLIP only the vision tower is used
        config = getattr(config, "vision_config", config)
        if config.model_type not in FAMILIES:
            raise ValueError(f"encoder {source!r} is a {config.model_type}; supported: {', '.join(FAMILIES)}")
        family = FAMILIES[config.model_type]
        depth = config.num_hidden_layers
        if layers is not None and not (layers and sorted(set(layers) & set(range(depth))) == list(layers)):
            raise ValueError(f"layers {list(layers)}: give increasing numbers from 0 to {depth - 1}")
        if affine is None:
            affine = layers is not None and config.model_type == "siglip_vision_model"
        model_class = getattr(transformers, family.model)
        if isinstance(source, dict):
            model = model_class(config)
        else:
            # `transformers` only warns of weights that are missing and initialises them at random
            model, report = model_class.from_pretrained(source, output_loading_info=True, **overrides)
            unused = ("pooler", "head") if affine else ("pooler", "head", family.norm)
            check_encoder(source, model, report, unused)
        if family.norm and not affine:
            # Without the affine part of the final LayerNorm each token has mean 0 and variance 1 over its
            # channels (RAE section 3; Scale-RAE appendix).
            norm = getattr(model, family.norm)
            norm.weight = norm.bias = None
        # pooling heads would be computed for nothing
        if getattr(model, "use_head", False):
            model.use_head, model.head = False, None
        if getattr(model, "pooler", None):
            model.pooler = None
        # files are often bf16; the encoder runs in fp32, or under autocast
        self.model = model.float().requires_grad_(False).eval()
        self.layers, self.pooled = layers, family.pooled
        # a buffer, so that common.fingerprint tells autoencoders of other layers apart
        self.register_buffer("layer_numbers", torch.tensor(layers or []), persistent=False)
        self.norm = family.norm or "layernorm"  # name of the final norm
        self.prefix_tokens = family.class_tokens + getattr(config, "num_register_tokens", 0)
        self.interpolate = family.interpolate
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
        """Patch tokens (B, N, C) after each of these blocks, counted from 0, before any final norm."""
        outputs = {}

        def keep(layer: int, block: nn.Module, inputs: tuple, output) -> None:
            outputs[layer] = (output[0] if isinstance(output, tuple) else output)[:, self.prefix_tokens :]

        hooks = [self.blocks[layer].register_forward_hook(partial(keep, layer)) for layer in set(layers)]
        try:
            self.last_layer(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return [outputs[layer] for layer in layers]

    def last_layer(self, pixels: Tensor) -> Tensor:
        options = {"interpolate_pos_encoding": True} if self.interpolate else {}
        if self.is_mae:
            # MAE shuffles tokens by the order of this "noise": an increasing one keeps raster order
            patches = (pixels.shape[-1] // self.config.patch_size) ** 2
            options["noise"] = torch.arange(patches, device=pixels.device).expand(len(pixels), -1)
        return self.model(pixels, **options).last_hidden_state[:, self.prefix_tokens :]

    def forward(self, pixels: Tensor) -> Tensor:
        if self.layers is None:
            return self.last_layer(pixels)
        # the same norm for each layer; not `output_hidden_states`, whose last one is normalised or not
        # depending on the version of `transformers`
        norm = getattr(self.model, self.norm)
        tokens = [norm(layer) for layer in self.features(pixels, self.layers)]
        mean = torch.stack(tokens).mean(dim=0)
        # RAEv2 adds to every token the mean over tokens of the deepest layer
        return mean + tokens[-1].mean(dim=1, keepdim=True) if self.pooled else mean


def check_encoder(source: str, model: nn.Module, report: dict, unused: tuple) -> None:
    """Raises ValueError if weights that are used are missing, unknown or of another shape."""
    # other parts of the file, such as a text tower, do not matter
    parts = {name for name, _ in model.named_children()}
    wrong = [key for key in report["missing_keys"] if key.split(".")[0] not in unused]
    wrong += [str(key) for key in report["mismatched_keys"]]
    wrong += [key for key in report["unexpected_keys"] if key.split(".")[0] in parts]
    if wrong:
        raise ValueError(f"encoder {source}: {len(wrong)} weights are missing or unknown: {wrong[:5]}")


def input_settings(source: str, encoder: Encoder) -> tuple[int, list[float], list[float]]:
    """Side in pixels, mean and std of an encoder's input, from its folder's image processor."""
    # DINO's processors resize to `size` and crop to `crop_size`; SigLIP's only resize
    processor = transformers.AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    sizes = [getattr(processor, name, None) or {} for name in ("crop_size", "size")]
    side = next((size["height"] for size in sizes if size.get("height")), encoder.config.image_size)
    side = min(side, encoder.config.image_size)
    return side, list(processor.image_mean), list(processor.image_std)


# -----------------------------------------------------------------------------------------------------------
# 3. autoencoders


class DecoderLayer(nn.Module):
    """Pre-norm transformer block with exact GELU and LayerNorm eps 1e-12."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        # the names of the released checkpoints, which are ViT-MAE's
        qkv = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        output = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.attention = nn.ModuleDict({"attention": qkv, "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_width, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.attention["attention"]
        # (B, N, width) -> three of (B, heads, N, width / heads)
        q, k, v = [rearrange(layer(x), "b n (h d) -> b h n d", h=self.heads) for layer in qkv.values()]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.attention["output"]["dense"](rearrange(out, "b h n d -> b n (h d)"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.layernorm_before(x))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Decoder(nn.Module):
    """ViT decoder (RAE section 3.1): tokens (B, N, C) -> normalised pixels (B, 3, p sqrt(N), p sqrt(N))."""

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
        # its first row is the class token's
        table = torch.cat([torch.zeros(1, width), sincos_table(tokens, width)])
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_layers = nn.ModuleList(DecoderLayer(width, heads, mlp_width) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.decoder_embed(latents)
        if x.shape[1] != self.side**2:
            # another square grid is resized to the trained one, as in the authors' code
            side = math.isqrt(x.shape[1])
            if side**2 != x.shape[1]:
                raise ValueError(f"{x.shape[1]} latent tokens are no square grid; give {self.side**2}")
            x = rearrange(x, "b (h w) d -> b d h w", h=side)
            x = F.interpolate(x, (self.side, self.side), mode="bilinear").flatten(2).mT
        # a class token in front, whose output is discarded
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1).type_as(x), x], dim=1)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        # (B, N, 3 p^2) -> (B, 3, H, W); the channel varies fastest within a patch
        x = self.decoder_pred(self.decoder_norm(x)[:, 1:])
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.side, p=self.patch_size, c=3)


class RAE(nn.Module, Hub):
    """Representation autoencoder: frozen encoder, trained decoder, latent statistics (RAE section 3).

    encoder: hub id or local `transformers` folder; or its config as a dict, as `save_pretrained` writes it.
    decoder_config: width, depth, heads, mlp_width and patch_size (of the output; default: the encoder's).
    encoder_size: side of the encoder's input in pixels; images of another size are resized.
    image_mean, image_std: the encoder's pixel statistics. These three default to those of the hub id or
        folder; a config needs them.
    layers: encoder layers that are averaged, see `Encoder` (RAEv2).
    denormalise: whether the decoder's output is in the encoder's normalised pixels (RAE) or in [0, 1] already
        (RAEv2, the default with `layers`).
    """

    def __init__(
        self,
        encoder: str | dict,
        decoder_config: dict,
        encoder_size: int | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        layers: list[int] | None = None,
        denormalise: bool | None = None,
    ):
        super().__init__()
        self.encoder = Encoder(encoder, layers=layers)
        if not isinstance(encoder, dict):
            side, mean, std = input_settings(encoder, self.encoder)
            encoder_size = encoder_size or side
            image_mean, image_std = image_mean or mean, image_std or std
        if not (encoder_size and image_mean and image_std):
            raise ValueError("an encoder config needs encoder_size, image_mean and image_std beside it")
        patch = self.encoder.config.patch_size
        if encoder_size % patch:
            raise ValueError(f"encoder_size {encoder_size} is not a multiple of the encoder's patch, {patch}")
        decoder_config = {"patch_size": patch, **decoder_config}
        # config.json holds all that is needed to rebuild this module without the encoder's folder
        self._hub_mixin_config.update(
            decoder_config=decoder_config,
            encoder=self.encoder.config.to_diff_dict() | {"model_type": self.encoder.config.model_type},
            encoder_size=encoder_size,
            image_mean=image_mean,
            image_std=image_std,
            layers=None if layers is None else list(layers),  # JSON knows no range
        )
        side = encoder_size // patch
        self.encoder_size = encoder_size
        self.latent_shape = (side * side, self.encoder.config.hidden_size)
        self.image_size = side * decoder_config["patch_size"]
        self.decoder = Decoder(self.latent_shape, **decoder_config)
        # the latents' normalisation: the identity, until statistics are loaded or measured
        self.register_buffer("latent_mean", torch.zeros(self.latent_shape))
        self.register_buffer("latent_std", torch.ones(self.latent_shape))
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        # from the decoder's output to [0, 1]
        if denormalise is None:
            denormalise = layers is None
        mean = self.image_mean.clone() if denormalise else torch.zeros(3, 1, 1)
        std = self.image_std.clone() if denormalise else torch.ones(3, 1, 1)
        self.register_buffer("output_mean", mean, persistent=False)
        self.register_buffer("output_std", std, persistent=False)

    def train(self, mode: bool = True) -> "RAE":
        super().train(mode)
        self.encoder.eval()  # always frozen
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, N, C), fp32. Other sizes are resized, not cropped."""
        tokens, size = [], (self.encoder_size, self.encoder_size)
        # in parts, so that a larger batch takes no more memory for activations
        for part in images.split(128):
            if part.shape[-2:] != size:
                # without antialias, as RAE's code does for every encoder
                part = F.interpolate(part, size, mode="bicubic")
            tokens.append(self.encoder((part - self.image_mean) / self.image_std).float())
        return (torch.cat(tokens) - self.latent_mean) / self.latent_std

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Latents of tokens + sigma (B,) * noise (B, N, C): noise-augmented decoding (RAE)."""
        # the noise has the scale of the tokens before their normalisation
        return latents + sigma[:, None, None] * noise / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) -> (B, 3, image_size, image_size), around [0, 1] but not clamped."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {tuple(latents.shape[1:])}, this autoencoder has {self.latent_shape}")
        # callers clamp: the training losses need the gradient outside [0, 1]
        pixels = self.decoder(latents * self.latent_std + self.latent_mean)
        return pixels.float() * self.output_std + self.output_mean

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        encoder: str | None = None,
        stats: str | None = None,
        encoder_size: int | None = None,
        heads: int | None = None,
        layers: list[int] | None = None,
        denormalise: bool | None = None,
        revision: str | None = None,
    ) -> "RAE":
        """An autoencoder in eval mode. `source` is one of

        - a folder of `save_pretrained`, `save_diffusers` or diffusers' `AutoencoderRAE`, or a hub id;
        - a name in `convert.RELEASED`, such as "rae-dinov2-b": what the authors published;
        - a decoder of RAE (`model.pt`) or a decoder repository of Scale-RAE, together with `encoder`, a hub
          id or folder that has its weights, and optionally `stats`, the file of latent statistics. A file on
          the hub is org/repository/path. encoder_size and heads are known for what is published. layers
          and denormalise (False): of a decoder of RAEv2.
        """
        import convert

        options = {"encoder": encoder, "stats": stats, "encoder_size": encoder_size, "heads": heads}
        options |= {"layers": layers, "denormalise": denormalise}
        model = convert.open_rae(str(source), revision, **options)
        return model or super().from_pretrained(source, revision=revision)

    def save_diffusers(self, folder: str | Path) -> None:
        """Writes a folder that `diffusers.AutoencoderRAE.from_pretrained` opens. Raises ValueError for what
        that class cannot represent: other encoders, and another position table of the decoder."""
        import convert

        convert.write_diffusers(self, Path(folder))


class VAE(nn.Module):
    """An `AutoencoderKL` of diffusers with the interface of RAE: the baseline in Scale-RAE's comparisons.
    2 x 2 neighbouring latents are one token, in the order (channel, row, column).

    name_or_path: folder or hub id of an AutoencoderKL, or of a pipeline that has one in its folder vae.
    image_size: side of the images in pixels; by default 256, or the file's sample_size if that is smaller.
    """

    def __init__(self, name_or_path: str | Path, image_size: int | None = None):
        super().__init__()
        from diffusers import AutoencoderKL

        import convert

        source = str(name_or_path)
        config, folder = convert.read_config(source)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{source} is no AutoencoderKL of diffusers but {config.get('_class_name')}")
        weights = convert.read_weights(folder, None, convert.diffusers_files(folder))
        self.vae = AutoencoderKL.from_config(config).requires_grad_(False)
        self.vae._fix_state_dict_keys_on_load(weights)  # renames old Stable Diffusion keys
        convert.load_official(self.vae, weights)
        config = self.vae.config
        if (config.in_channels, config.out_channels) != (3, 3):
            channels = f"{config.in_channels} to {config.out_channels}"
            raise ValueError(f"{source} is an AutoencoderKL of {channels} channels: give one of RGB images")
        sample_size = config.sample_size if isinstance(config.sample_size, int) else min(config.sample_size)
        self.image_size = image_size or min(256, sample_size)
        patch = 2 ** len(config.block_out_channels)  # side of a token in pixels
        side, rest = divmod(self.image_size, patch)
        if rest:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {patch}")
        # (256, 64) for FLUX at 256 px
        self.latent_shape = (side * side, 4 * config.latent_channels)
        # `force_upcast` guards against overflow in fp16; bf16 has the range of fp32
        shift, scale = latent_scale(source, config)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, N, C), fp32: the mean of the posterior, or with standard
        normal `noise` (B, N, C) a sample of it, on which Scale-RAE trains."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True)
        means, stds = [], []
        # in parts, so that a larger batch takes no more memory for activations
        for part in images.split(32):
            posterior = self.vae.encode(2 * part - 1).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        z = rearrange(torch.cat(means), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        if noise is not None:
            z = z + noise * rearrange(torch.cat(stds), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, N, C) -> (B, 3, image_size, image_size), around [0, 1] but not clamped."""
        z = latents / self.scale + self.shift
        z = rearrange(z, "b (h w) (c p q) -> b c (h p) (w q)", h=math.isqrt(z.shape[1]), p=2, q=2)
        return self.vae.decode(z).sample.float() / 2 + 0.5

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "VAE":
        return cls(source)

    def save_pretrained(self, folder: str | Path) -> None:
        self.vae.save_pretrained(folder)


def latent_scale(source: str, config) -> tuple[Tensor, Tensor]:
    """Shift and scale of an AutoencoderKL's latents, (z - shift) * scale: numbers, or vectors (4 C,). As in
    the pipelines of diffusers, the mean and std of each channel take the place of shift_factor."""
    shift, factor, channels = config.shift_factor or 0.0, config.scaling_factor or 0.0, config.latent_channels
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        shift, scale = torch.tensor(float(shift)), torch.tensor(float(factor))
    elif shift or not len(mean or ()) == len(std or ()) == channels:
        raise ValueError(
            f"{source}: latents_mean and latents_std must be {channels} numbers, no shift_factor"
        )
    else:
        # 2 x 2 values of each channel are neighbours in a token
        shift = torch.tensor(mean).float().repeat_interleave(4)
        scale = (factor / torch.tensor(std).float()).repeat_interleave(4)
    if not (shift.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"{source}: config.json scales latents by {config.scaling_factor} / {std or 1}")
    return shift, scale


def open_autoencoder(source: str | Path) -> RAE | VAE:
    """The autoencoder of a folder, a hub id or a name in `convert.RELEASED`, in eval mode, RAE or VAE."""
    import convert

    if str(source) in convert.RELEASED:
        return RAE.from_pretrained(source)
    config, _ = convert.read_config(str(source))
    is_vae = config.get("_class_name") == "AutoencoderKL"
    return VAE(source) if is_vae else RAE.from_pretrained(source)


# -----------------------------------------------------------------------------------------------------------
# 4. DiT


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    # under autocast the scale is bf16, in which 1 + 0.003 is 1
    return x * (1 + scale.float()) + shift


def adaln(condition_width: int | None, width: int, count: int) -> nn.Sequential | None:
    """condition (B, 1 or N, Z) -> `count` vectors of `width`; None without a condition."""
    return condition_width and nn.Sequential(nn.SiLU(), nn.Linear(condition_width, count * width))


class Block(nn.Module):
    """Transformer block with adaLN-Zero: the condition (B, 1 or N, Z) shifts, scales and gates each token.
    Without a condition_width it is a plain pre-norm block, as in the backbone of RAEv2."""

    def __init__(self, width: int, heads: int, condition_width: int | None, qk_norm: bool, swiglu=True):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = SwiGLU(width) if swiglu else MLP(width)
        self.adaLN_modulation = adaln(condition_width, width, 6)

    def forward(
        self, x: Tensor, condition: Tensor | None, rope: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        if self.adaLN_modulation is None:
            x = x + self.attn(self.norm1(x), rope, key_mask)
            return x + self.mlp(self.norm2(x))
        # six of (B, 1 or N, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope, key_mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """RMSNorm, modulated if there is a condition, and a linear layer to the latents' channels."""

    def __init__(self, width: int, channels: int, condition_width: int | None):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = adaln(condition_width, width, 2)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            # two of (B, 1 or N, width)
            shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        # fp32, because the loss and the sampler's state are
        return self.linear(x).float()


class LabelCondition(nn.Module):
    """Class labels (B,) -> (B, 1, width); the last row of the table is the null condition."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def drop(self, labels: Tensor | None, dropped: Tensor) -> Tensor:
        # None: all are dropped, and the labels do not matter
        labels = torch.zeros_like(dropped, dtype=torch.long) if labels is None else labels
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]


class TokenCondition(nn.Module):
    """One condition vector per token, (B, N, width), used as it is; the null condition is trained."""

    def __init__(self, width: int):
        super().__init__()
        # the null condition; the name is Scale-RAE's
        self.dropout_embedding = nn.Parameter(torch.zeros(width))

    def drop(self, vectors: Tensor | None, dropped: Tensor) -> Tensor:
        null = self.dropout_embedding.expand(len(dropped), 1, -1)
        if vectors is None:
            return null
        return torch.where(dropped[:, None, None], null.type_as(vectors), vectors)

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors


def initialise_dit(dit: nn.Module, xavier: bool) -> None:
    """Initial weights of a DiT or InContextDiT. xavier: of all linear layers, else PyTorch's default."""
    # the embedders of the latents in any case: the authors' are patch convolutions, initialised apart
    layers = [dit.x_embedder] + ([dit.s_embedder] if dit.head else [])
    if xavier:
        layers = [module for module in dit.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    # as in DiT
    for layer in (dit.t_embedder.mlp[0], dit.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    if hasattr(dit.y_embedder, "embedding_table"):
        nn.init.normal_(dit.y_embedder.embedding_table.weight, std=0.02)
    # adaLN-Zero: every modulated block starts as the identity, and the output as zero
    for module in dit.modules():
        if isinstance(module, SwiGLU):
            module.zero_padding()
        zero = [module.linear] if isinstance(module, FinalLayer) else []
        if getattr(module, "adaLN_modulation", None) is not None:
            zero.append(module.adaLN_modulation[1])
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class DiT(nn.Module, Hub):
    """Diffusion transformer on latent tokens with the blocks of LightningDiT; predicts the velocity.

    latent_shape: (N, C), a square grid of tokens.
    head: (width, depth, heads) of the DDT head, wide and shallow (RAE section 5), or None.
    num_classes: of class labels. condition_width: of one vector per token. Neither: unconditional.
    silu_condition: SiLU on timestep + condition, before adaLN's own SiLU (all but RAE's DiT).
    readd_time: the timestep embedding is added again in front of the DDT head (RAE; not Scale-RAE).
    xavier: xavier-uniform linear layers (all but RAE's DiT-DH, which has PyTorch's default).
    qk_norm: RMSNorm on queries and keys, a common cure for divergence in bf16. No released weights use it.
    swiglu: SwiGLU, as in all released weights, or a plain MLP.
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
    ):
        super().__init__()
        if num_classes and condition_width:
            raise ValueError("a DiT takes labels (num_classes) or vectors (condition_width), not both")
        assert not readd_time or condition_width in (None, width), "readd_time adds the timestep to tokens"
        tokens, channels = latent_shape
        self.depth, self.head = depth, head
        self.silu_condition, self.readd_time = silu_condition, readd_time
        # ---- embedders of timestep, condition and position
        z = condition_width or width
        self.t_embedder = TimeEmbedding(z)
        self.y_embedder = None
        if num_classes:
            self.y_embedder = LabelCondition(num_classes, z)
        elif condition_width:
            self.y_embedder = TokenCondition(z)
        self.pos_embed = nn.Parameter(sincos_table(tokens, width)[None], requires_grad=False)
        self.register_buffer("rope", rope_table(tokens, width // heads), persistent=False)
        # ---- backbone, and DDT head
        blocks = [Block(width, heads, z, qk_norm, swiglu) for _ in range(depth)]
        out_width, out_condition = width, z
        if head:
            # `s_embedder` feeds the backbone and `x_embedder` the head: the names of RAE's checkpoints
            out_width = out_condition = head[0]
            self.s_embedder = nn.Linear(channels, width)
            self.s_projector = nn.Identity() if head[0] == width else nn.Linear(width, head[0])
            self.register_buffer("head_rope", rope_table(tokens, head[0] // head[2]), persistent=False)
            blocks += [Block(head[0], head[2], head[0], qk_norm, swiglu) for _ in range(head[1])]
        self.x_embedder = nn.Linear(channels, out_width)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(out_width, channels, out_condition)
        initialise_dit(self, xavier)

    def drop_condition(self, condition: Tensor | None, dropped: Tensor) -> Tensor:
        """The null condition where `dropped` (B,) is true, `condition` elsewhere (None: null everywhere)."""
        if self.y_embedder is None:
            raise ValueError("this DiT is unconditional: it has no null condition")
        return self.y_embedder.drop(condition, dropped)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Velocity (B, N, C) at x (B, N, C), t (B,) in [0, 1].

        condition: labels (B,) or vectors (B, N, condition_width); None, or the label `num_classes`, is the
        null condition.
        """
        # ---- condition: timestep + label (B, 1, Z), or timestep + vector per token (B, N, Z)
        time = self.t_embedder(t)[:, None]
        c = time
        if self.y_embedder is not None:
            if condition is None:
                condition = self.y_embedder.drop(None, torch.ones_like(t, dtype=torch.bool))
            c = time + self.y_embedder(condition)
        elif condition is not None:
            raise ValueError("this DiT is unconditional, but a condition was given")
        if self.silu_condition:
            c = F.silu(c)

        # ---- backbone: (B, N, C) -> (B, N, width)
        s = (self.s_embedder if self.head else self.x_embedder)(x) + self.pos_embed
        for block in self.blocks[: self.depth]:
            s = block(s, c, self.rope)
        # ---- DDT head: it sees x anew, without positions, and the backbone's output is its condition
        if self.head:
            c = self.s_projector(F.silu(time + s if self.readd_time else s))
            s = self.x_embedder(x).float()  # a residual stream in fp32, like the backbone's
            for block in self.blocks[self.depth :]:
                s = block(s, c, self.head_rope)
        return self.final_layer(s, c)


@dataclass
class Caption:
    """Text tokens of a frozen language model, padded on the right; has `repeat` and `len`, as labels have."""

    tokens: Tensor  # (B, K, Z)
    mask: Tensor  # (B, K) bool, False for padding

    def __len__(self) -> int:
        return len(self.tokens)

    def repeat(self, times: int) -> "Caption":
        return Caption(self.tokens.repeat(times, 1, 1), self.mask.repeat(times, 1))


class ContextLabels(LabelCondition):
    """Class labels (B,) -> (B, count, width): trained tokens, to each of which the label is added."""

    def __init__(self, num_classes: int, width: int, count: int):
        super().__init__(num_classes, width)
        self.learnable_tokens = nn.Parameter(torch.randn(count, width) / math.sqrt(width))

    def forward(self, labels: Tensor) -> tuple[Tensor, None]:
        return self.learnable_tokens + super().forward(labels), None


class ContextCaption(nn.Module):
    """A Caption -> (B, K, width) and its mask. The null condition hides all text."""

    def __init__(self, condition_width: int, width: int, count: int):
        super().__init__()
        self.count = count
        self.norm = RMSNorm(condition_width)
        self.proj = nn.Linear(condition_width, width)

    def drop(self, caption: Caption | None, dropped: Tensor) -> Caption:
        if caption is None:
            no_tokens = self.norm.weight.new_zeros(len(dropped), 0, len(self.norm.weight))
            return Caption(no_tokens, dropped.new_zeros(len(dropped), 0))
        return Caption(caption.tokens, caption.mask & ~dropped[:, None])

    def forward(self, caption: Caption) -> tuple[Tensor, Tensor]:
        if (length := caption.tokens.shape[1]) > self.count:
            raise ValueError(f"a caption has {length} tokens, this DiT takes up to {self.count}: shorten it")
        return self.proj(self.norm(caption.tokens)), caption.mask


class InContextDiT(nn.Module, Hub):
    """The diffusion transformer of RAEv2: timestep and condition are tokens of the sequence beside the latent
    tokens, and the backbone has no adaLN. Only the DDT head is modulated, by the backbone.

    latent_shape, width, depth, heads, head, num_classes: as for `DiT`.
    condition_width: of the text tokens of a `Caption`. time_tokens, condition_tokens: how many tokens the
        timestep and the condition have (captions: the maximum).
    base_depth: the backbone block, counted from 1, after which a second output layer, the base head, makes a
        weaker prediction for internal guidance; None: no base head.
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
        time_tokens: int = 4,
        condition_tokens: int = 8,
        base_depth: int | None = None,
    ):
        super().__init__()
        if num_classes and condition_width:
            raise ValueError("a DiT takes labels (num_classes) or captions (condition_width), not both")
        if base_depth is not None and not 1 <= base_depth <= depth:
            raise ValueError(f"base_depth {base_depth}: the backbone has blocks 1 to {depth}")
        tokens, channels = latent_shape
        self.depth, self.head, self.base_depth = depth, head, base_depth
        # ---- embedders of timestep and condition; RAEv2 trains the frequencies
        self.t_embedder = TimeEmbedding(width)
        self.t_embedder.W.requires_grad_(True)
        self.time_tokens = nn.Parameter(torch.randn(time_tokens, width) / math.sqrt(width))
        self.y_embedder = None
        if num_classes:
            self.y_embedder = ContextLabels(num_classes, width, condition_tokens)
        elif condition_width:
            self.y_embedder = ContextCaption(condition_width, width, condition_tokens)
        # ---- positions: only the latent tokens have one, the others are not rotated
        rope = rope_table(tokens, width // heads)
        extra = time_tokens + (condition_tokens if self.y_embedder else 0)
        unrotated = torch.stack([torch.ones(extra, rope.shape[2]), torch.zeros(extra, rope.shape[2])])
        self.register_buffer("rope", torch.cat([rope, unrotated], dim=1), persistent=False)
        # ---- backbone, DDT head, base head
        blocks = [Block(width, heads, None, qk_norm=True) for _ in range(depth)]
        out_width = width
        if head:
            out_width = head[0]
            self.s_embedder = nn.Linear(channels, width)
            self.s_projector = nn.Identity() if out_width == width else nn.Linear(width, out_width)
            self.register_buffer("head_rope", rope_table(tokens, out_width // head[2]), persistent=False)
            blocks += [Block(out_width, head[2], out_width, qk_norm=True) for _ in range(head[1])]
        self.x_embedder = nn.Linear(channels, out_width)
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(out_width, channels, out_width if head else None)
        if base_depth:
            self.base_final_layer = FinalLayer(width, channels, width if head else None)
        initialise_dit(self, xavier=False)

    drop_condition = DiT.drop_condition

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor | Caption | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction (B, N, C) at x (B, N, C), t (B,) in [0, 1], and that of the base head or None.
        condition: labels (B,) or a `Caption`; None is the null condition."""
        # ---- sequence: latents, timestep, condition -> (B, N + T + K, width)
        tokens, time = x.shape[1], self.t_embedder(t)[:, None]
        parts = [(self.s_embedder if self.head else self.x_embedder)(x), self.time_tokens + time]
        key_mask = None
        if self.y_embedder is not None:
            if condition is None:
                condition = self.y_embedder.drop(None, torch.ones_like(t, dtype=torch.bool))
            context, mask = self.y_embedder(condition)
            parts.append(context)
            if mask is not None and mask.shape[1]:  # without a mask SDPA can use flash attention
                # padding is hidden as keys; all other tokens are seen
                key_mask = F.pad(mask, (tokens + len(self.time_tokens), 0), value=True)
        elif condition is not None:
            raise ValueError("this DiT is unconditional, but a condition was given")
        s = torch.cat([part.float() for part in parts], dim=1)

        # ---- backbone; the timestep is added again to what leaves it, if there is a DDT head
        base = None
        for number, block in enumerate(self.blocks[: self.depth], start=1):
            s = block(s, None, self.rope[:, : s.shape[1]], key_mask)
            if number == self.base_depth:
                u = F.silu(time + s[:, :tokens]) if self.head else s[:, :tokens]
                base = self.base_final_layer(u, u)
        s = s[:, :tokens]
        if not self.head:
            return self.final_layer(s), base

        # ---- DDT head: it sees x anew, and the backbone's output is its condition
        c = self.s_projector(F.silu(time + s))
        s = self.x_embedder(x).float()
        for block in self.blocks[self.depth :]:
            s = block(s, c, self.head_rope)
        return self.final_layer(s, c), base


def build_dit(latent_shape: tuple[int, int], config: dict) -> DiT | InContextDiT:
    """From its arguments; those of an InContextDiT have `time_tokens`."""
    return (InContextDiT if "time_tokens" in config else DiT)(latent_shape, **config)


# -----------------------------------------------------------------------------------------------------------
# 5. flow matching: x_t = (1 - t) data + t noise, velocity = noise - data


Velocity = Callable[[Tensor, Tensor], Tensor]  # x (B, N, C), t (B,) -> (B, N, C)
T_MIN = 0.05  # smallest denominator where clean latents become a velocity (RAEv2)


def to_velocity(x_t: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """The velocity (x_t - clean) / t at x_t (B, N, C), t (B,), for clean latents or a prediction of them."""
    # the error of a prediction would be divided by almost nothing near t = 0
    return (x_t - clean) / t.clamp(min=T_MIN)[:, None, None]


def default_alpha(latent_shape: tuple[int, int]) -> float:
    """The factor of the timestep shift, sqrt(N C / 4096) (RAE, dimension-dependent shift)."""
    return math.sqrt(latent_shape[0] * latent_shape[1] / 4096)


def shift_time(t: Tensor | float, alpha: float) -> Tensor | float:
    """alpha t / (1 + (alpha - 1) t) (RAE, dimension-dependent shift)."""
    # alpha > 1 moves t towards noise: latents of more dimensions need more of it to be hidden
    return alpha * t / (1 + (alpha - 1) * t)


def sample_time(u: Tensor, alpha: float, mean: float | None = 0.0, std: float = 1.0) -> Tensor:
    """Training timesteps (B,) from uniform draws `u` (B,) in (0, 1): logit-normal(mean, std), or uniform if
    mean is None; truncated at 0.999 as in RAE's code, then shifted."""
    if mean is None:
        return shift_time(0.999 * u, alpha)
    # truncated inverse CDF: u times the probability of t < 0.999, so that no draw lies beyond it
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
    """Mean squared velocity error of each sample, (B,); `t` (B,) is already shifted. The loop of train_t2i.py
    spells it out, and adds prediction x and the base head."""
    noise = torch.randn_like(latents) if noise is None else noise
    t = sample_time(torch.rand(len(latents), device=latents.device), alpha) if t is None else t
    x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
    return (model(x_t, t, condition) - (noise - latents)).square().mean(dim=(1, 2))


def time_grid(steps: int, alpha: float, grid: str = "full") -> list[tuple[float, float]]:
    """(t, dt) of every Euler step from noise to data, t shifted. "full" goes down to 0 in `steps`
    evaluations; "rae" and "scale-rae" are the grids of the authors' code, with one evaluation fewer."""
    if steps < 1 + (grid != "full"):
        raise ValueError(f"grid {grid!r} needs more than {steps} step(s)")
    if grid == "full":
        base = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    elif grid == "rae":
        # from 1 to shift(0.001), without a step to 0
        base = 1 - torch.linspace(0, 0.999, steps, dtype=torch.float64)
    elif grid == "scale-rae":
        # The authors' off-by-one: the last step is taken at the first point, t < 1, with dt = 1 - t > 0.
        index = [round(k * 999 / (steps - 1)) + 1 for k in range(steps)]
        base = torch.tensor(index, dtype=torch.float64) / 1000
        # downwards from the second to last; the last is only used by the step back up
        base = torch.cat([base[:-1].flip(0), base[-1:]])
    else:
        raise ValueError(f"unknown grid {grid!r}: full, rae or scale-rae")
    points = shift_time(base, alpha).tolist()
    # steps from each point to the next; the last point is not evaluated
    pairs = [(t, after - t) for t, after in zip(points, points[1:], strict=False)]
    if grid == "scale-rae":
        pairs[-1] = (points[0], 1 - points[0])
    return pairs


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    steps: int = 50,
    alpha: float | None = None,
    solver: str = "euler",
    grid: str = "full",
) -> Tensor:
    """Integrates dx/dt = velocity(x, t (B,)) from noise (B, N, C) to latents.

    alpha: factor of the timestep shift, sqrt(N C / 4096) by default.
    solver: "euler", or "heun": two evaluations per step, but one in a step that ends at t = 0, as in EDM.
    grid: see `time_grid`.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: euler or heun")
    alpha = default_alpha(noise.shape[1:]) if alpha is None else alpha
    # fp32: the sum of many small steps. dt is negative: from noise at t = 1 down to data at t = 0.
    x = noise.float()
    for t, dt in time_grid(steps, alpha, grid):
        v = velocity(x, x.new_full((len(x),), t))
        # at t = 0 a prediction of clean latents has no velocity: it would be 0 / 0
        if solver == "heun" and t + dt > 0:
            # the mean of the velocities at both ends of the step
            v = (v + velocity(x + dt * v, x.new_full((len(x),), t + dt))) / 2
        x = x + dt * v
    return x


def guided(
    velocity: Velocity, weaker: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """weaker + scale (velocity - weaker) while t is inside the guidance interval, else `velocity` alone.
    With the null condition as `weaker` this is classifier-free guidance, with a smaller model AutoGuidance
    (arXiv 2406.02507)."""
    if scale == 1:
        return velocity

    def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
        # The full interval must not read t: on CUDA that is a host-device sync.
        if interval != (0.0, 1.0) and not interval[0] <= t[0] <= interval[1]:
            return velocity(x, t)
        # the weaker model is evaluated only where its result is used
        base = weaker(x, t)
        return base + scale * (velocity(x, t) - base)

    return guided_velocity


def internally_guided(
    velocities: Callable, scale: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Internal guidance (RAEv2): the base head of the same model is the weaker one, so one evaluation is
    enough. velocities(x, t) -> (velocity, the base head's)."""

    def guided_velocity(x: Tensor, t: Tensor) -> Tensor:
        velocity, base = velocities(x, t)
        if scale == 1 or (interval != (0.0, 1.0) and not interval[0] <= t[0] <= interval[1]):
            return velocity
        return base + scale * (velocity - base)

    return guided_velocity


# -----------------------------------------------------------------------------------------------------------
# 6. labels to image, text to image


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to the device."""
    # from pinned memory, so that the copy does not wait for the work queued on the GPU
    to_cuda = device.type == "cuda" and not tensor.is_cuda
    return (tensor.pin_memory() if to_cuda else tensor).to(device, non_blocking=to_cuda)


class LatentModel(nn.Module, Hub):
    """Base class of the latent diffusion models. Subclasses set `dit` and turn prompts or labels into its
    condition."""

    PATHS = ("autoencoder", "reader")  # the folders that config.json may name, relative to the model's own

    def __init__(
        self,
        latent_shape: tuple[int, int],
        autoencoder: str | None,
        alpha: float | None,
        prediction: str = "velocity",
    ):
        super().__init__()
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha {alpha}: give a number above 0")
        if prediction not in ("velocity", "x"):
            raise ValueError(f"unknown prediction {prediction!r}: velocity or x")
        self.latent_shape, self.prediction = tuple(latent_shape), prediction
        self.alpha = default_alpha(latent_shape) if alpha is None else alpha
        self.autoencoder_path = autoencoder
        # opened ones by path, in a dict: not submodules, so not saved with this model
        self._autoencoders = {}

    @property
    def device(self) -> torch.device:
        return self.dit.x_embedder.weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, which are compiled, checkpointed and sharded one by one."""
        return list(self.dit.blocks)

    @property
    def autoencoder(self) -> RAE | VAE:
        """The autoencoder whose latents this model generates, loaded at first use."""
        return self.open(self.autoencoder_path)

    def open(self, path: str) -> RAE | VAE:
        if not path:
            raise ValueError("this model does not name its autoencoder: set its autoencoder_path")
        if path not in self._autoencoders:
            self._autoencoders[path] = open_autoencoder(path)
        return self._autoencoders[path].to(self.device)

    def velocities(self, x: Tensor, t: Tensor, condition=None) -> tuple[Tensor, Tensor | None]:
        """The velocity (B, N, C) at x (B, N, C), t (B,), and that of the base head, None without one."""
        outputs = self.dit(x, t, condition)
        velocity, base = outputs if isinstance(self.dit, InContextDiT) else (outputs, None)
        if self.prediction == "x":
            velocity = to_velocity(x, velocity, t)
            base = base if base is None else to_velocity(x, base, t)
        return velocity, base

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
        internal_guidance: float = 1.0,
    ) -> Tensor:
        """Latents (B, N, C) for B prompts or class labels.

        guidance: guidance scale, 1 for none: classifier-free guidance, or AutoGuidance with a `guide`, a
            weaker model of the same latents. interval: the guidance interval, in t.
        internal_guidance: scale of the guidance by the model's own base head, 1 for none (RAEv2).
        noise: (B, N, C); if None it is drawn with `generator`, on its device.
        steps, solver, grid: see `sample`.
        """
        if guidance != 1 and guide is None and self.dit.y_embedder is None:
            raise ValueError(f"guidance {guidance}: an unconditional model needs 1 (off) or a guide")
        if guidance != 1 and guide is not None and guide.latent_shape != self.latent_shape:
            raise ValueError(f"the guide generates latents {guide.latent_shape}, not {self.latent_shape}")
        if internal_guidance != 1 and not getattr(self.dit, "base_depth", None):
            raise ValueError(f"internal guidance {internal_guidance} needs a model with a base head")
        # ---- condition and noise
        condition = self.condition(inputs)
        if noise is None:
            # a generator draws on its own device: a CPU generator gives the same noise for every model device
            device = generator.device if generator else self.device
            noise = torch.randn(len(inputs), *self.latent_shape, generator=generator, device=device)
        noise = to_device(noise.float(), self.device)

        # ---- velocity, guided by weaker ones: the base head, the null condition or another model
        def velocity_of(model: LatentModel, condition, scale: float = 1.0) -> Velocity:
            return internally_guided(partial(model.velocities, condition=condition), scale, interval)

        velocity = velocity_of(self, condition, internal_guidance)
        if guidance != 1:
            if guide:
                weaker = velocity_of(guide, guide.condition(inputs))
            else:
                weaker = velocity_of(self, None, internal_guidance)
            velocity = guided(velocity, weaker, guidance, interval)
        return sample(velocity, noise, steps, self.alpha, solver, grid)

    # -- one folder: config.json, model.safetensors, and for text the tokenizer's files

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Uploads the model. Its autoencoder has to be on the hub already, with `autoencoder_path` its id."""
        for name in self.PATHS:
            if os.path.isdir(path := getattr(self, f"{name}_path", None) or ""):
                raise ValueError(f"push {path} first, then set {name}_path to its hub id")
        return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        # A folder is stored relative to the model's own, so that both can be moved together. Real paths,
        # because ".." after a symbolic link leads to the parent of what it points to.
        model_folder = os.path.realpath(save_directory)
        self._hub_mixin_config["alpha"] = self.alpha
        for name in self.PATHS:
            if path := getattr(self, f"{name}_path", None):
                if os.path.isdir(path):
                    path = os.path.relpath(os.path.realpath(path), model_folder)
                self._hub_mixin_config[name] = path

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, **kwargs):
        model = super()._from_pretrained(model_id=model_id, config=config, **kwargs)
        for name in cls.PATHS:
            # back from relative to the model's folder to relative to the working directory
            path = getattr(model, f"{name}_path", None)
            if path and (Path(model_id) / path).is_dir():
                setattr(model, f"{name}_path", str(Path(model_id) / path))
        return model


class ClassToImage(LatentModel):
    """A DiT conditioned on class labels, or unconditional (RAE section 5).

    dit: arguments of `DiT` or `InContextDiT` without latent_shape: width, depth, heads, ...; num_classes, or
        unconditional.
    latent_shape, autoencoder, alpha: as for `TextToImage`.
    prediction: what the DiT's output is, the velocity or the clean latents "x" (RAEv2).
    class_names: of the labels, for people to read.
    """

    def __init__(
        self,
        dit: dict,
        latent_shape: tuple[int, int],
        autoencoder: str | None = None,
        alpha: float | None = None,
        prediction: str = "velocity",
        class_names: list[str] | None = None,
    ):
        super().__init__(latent_shape, autoencoder, alpha, prediction)
        self.class_names = class_names
        self.dit = build_dit(latent_shape, dit)

    @property
    def num_classes(self) -> int | None:
        return getattr(self.dit.y_embedder, "num_classes", None)

    def condition(self, labels: Sequence[int] | Tensor) -> Tensor | None:
        """Labels (B,) on the model's device; None if the model is unconditional."""
        if self.num_classes is None:
            return None
        labels = torch.as_tensor(labels, dtype=None if len(labels) else torch.long)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels are {labels.dtype}, not integers")
        if wrong := [label for label in labels.tolist() if not 0 <= label < self.num_classes]:
            raise ValueError(f"label {wrong[0]}: this model has the classes 0 to {self.num_classes - 1}")
        return to_device(labels, self.device)

    def forward(
        self, condition, x_t: Tensor, t: Tensor, dropped: Tensor, context_latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Velocities of k draws for each label or caption, and a text loss of zero; see
        `TextToImage.forward`. There are no images to read, so context_latents has no rows."""
        if self.dit.y_embedder is not None:
            draws = len(x_t) // max(1, len(condition))
            condition = self.dit.drop_condition(condition.repeat(draws), dropped)
        return *self.velocities(x_t, t, condition), x_t.new_zeros(())

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.class_names:
            self._hub_mixin_config["class_names"] = self.class_names
        super()._save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, autoencoder: str | None = None, revision: str | None = None
    ) -> "ClassToImage":
        """A folder of `save_pretrained` or a hub id; a name in `convert.RELEASED_DITS`, such as
        "rae-dit-dh-xl-256"; or a released `stage2_model.pt`, on the hub as org/repository/path."""
        import convert

        model = convert.open_class_to_image(str(source), revision)
        model = model or super().from_pretrained(source, revision=revision)
        model.autoencoder_path = autoencoder or model.autoencoder_path
        return model


@cache
def open_text_encoder(path: str, device: torch.device) -> tuple:
    """Tokenizer and frozen language model without its output layer; a model and its EMA share them."""
    options = {"trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="right", **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModel.from_pretrained(path, **options).float().requires_grad_(False).eval()
    return tokenizer, model.to(device)


class CaptionToImage(ClassToImage):
    """An InContextDiT conditioned on the tokens of a frozen language model (RAEv2, text to image).

    text_encoder: folder or hub id of a language model of `transformers`, which keeps its weights.
    dit: arguments of `InContextDiT` with condition_width, the width of the language model.
    latent_shape, autoencoder, alpha, prediction: as for `ClassToImage`.
    """

    PATHS = ("autoencoder", "text_encoder")

    def __init__(
        self,
        text_encoder: str,
        dit: dict,
        latent_shape: tuple[int, int],
        autoencoder: str | None = None,
        alpha: float | None = None,
        prediction: str = "x",
    ):
        super().__init__(dit, latent_shape, autoencoder, alpha, prediction)
        self.text_encoder_path = text_encoder

    def check_prompts(self, texts: list[str]) -> None:
        """Raises ValueError for text that is empty or longer than the DiT's condition."""
        tokenizer, _ = open_text_encoder(self.text_encoder_path, self.device)
        most = self.dit.y_embedder.count
        for text in texts:
            if not text.strip():
                raise ValueError("empty prompt: describe an image, for example 'a red circle'")
            if (length := len(tokenizer.encode(text))) > most:
                raise ValueError(f"the prompt has {length} tokens, the limit is {most}: shorten it")

    @torch.no_grad()
    def condition(self, prompts: list[str] | Caption, truncate: bool = False) -> Caption:
        """Last hidden states of the prompts, after the final norm and without a chat template. Long prompts
        are cut with `truncate`, as in RAEv2's training, else refused."""
        if isinstance(prompts, Caption):
            return prompts
        if not any(prompts):  # no image on this rank, or no text: the null condition
            return self.dit.y_embedder.drop(None, torch.ones(len(prompts), device=self.device).bool())
        if not truncate:
            self.check_prompts(prompts)
        tokenizer, model = open_text_encoder(self.text_encoder_path, self.device)
        width = len(self.dit.y_embedder.norm.weight)
        if model.config.hidden_size != width:
            path, actual = self.text_encoder_path, model.config.hidden_size
            raise ValueError(f"{path} has width {actual}, the DiT takes {width}")
        options = {"truncation": True, "max_length": self.dit.y_embedder.count, "return_tensors": "pt"}
        ids = tokenizer(list(prompts), padding=True, **options)
        inputs = {name: to_device(ids[name], self.device) for name in ("input_ids", "attention_mask")}
        with torch.autocast(self.device.type, enabled=False):
            tokens = model(**inputs).last_hidden_state
        return Caption(tokens, inputs["attention_mask"].bool())


def text_model_class(source: str) -> type[LatentModel]:
    """CaptionToImage or TextToImage, whichever a folder or hub id holds."""
    import convert

    # the authors' names and files are Scale-RAE's
    has_config = convert.exists(f"{source}/config.json", None)
    is_caption = has_config and "text_encoder" in convert.read_config(source)[0]
    return CaptionToImage if is_caption else TextToImage


IMAGE = -200  # stands for one latent token of an image in a sequence of token ids
IGNORED = -100  # label of a token without a loss
SYSTEM = "You are a helpful assistant."
# how a bare prompt becomes a user's turn and the beginning of a reply
REQUEST = "Generate an image of {}"
REPLY = "Here you go:\n<image>"


def chat_ml(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def encode_turn(role: str, text: str, tokenizer, image_tokens: int) -> list[int]:
    """Token ids in ChatML; each <image> in the text becomes <im_start>, IMAGE per token, <im_end>."""
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    ids = []
    for i, part in enumerate(chat_ml(role, text).split("<image>")):
        ids += [start, *[IMAGE] * image_tokens, end] if i else []
        ids += tokenizer.encode(part, add_special_tokens=False)
    return ids


def encode_chat(turns: list[tuple[str, str]], tokenizer, image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation of (role, text) turns, after the system turn."""
    # As in the authors' code, assistant turns are supervised, header included, and everywhere line feeds,
    # <|im_start|> and <|im_end|>; never the positions of images.
    always = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    always += tokenizer.encode("\n", add_special_tokens=False)
    ids, labels = [], []
    for role, text in [("system", SYSTEM), *turns]:
        for token in encode_turn(role, text, tokenizer, image_tokens):
            supervised = token != IMAGE and (role == "assistant" or token in always)
            ids.append(token)
            labels.append(token if supervised else IGNORED)
    return ids, labels


@dataclass
class Chat:
    """A batch of tokenised conversations."""

    # All on the CPU: positions are computed here, without a host-device sync.
    ids: Tensor  # (B, L), IMAGE where an image is
    labels: Tensor  # (B, L), the ids of supervised tokens, IGNORED elsewhere
    answer_mask: Tensor  # (B, L) bool, images to generate
    context_mask: Tensor  # (B, L) bool, images to read

    @property
    def next_labels(self) -> Tensor:
        """(B, L): what each position should predict."""
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORED)

    @property
    def supervised_tokens(self) -> int:
        return int((self.next_labels != IGNORED).sum())

    @property
    def is_answer(self) -> Tensor:
        """(P,) bool: which of the batch's images, in order, are to be generated."""
        inside = self.ids == IMAGE
        # an image's first position has none before it
        first = inside & ~F.pad(inside[:, :-1], (1, 0))  # images are never adjacent
        return self.answer_mask[first]


class TextToImage(LatentModel):
    """A language model that generates images: trainable queries after the prompt collect one condition vector
    per latent token for a DiT, and images are read through a projector (Scale-RAE section 3).

    language_model: hub id or local folder of a causal model of `transformers` with a ChatML tokenizer; or its
        config as a dict, as `save_pretrained` writes it.
    dit: arguments of `DiT`: width, depth, heads, ...; condition_width is the width by default.
    latent_shape: (N, C) of the autoencoder; there are N queries.
    autoencoder: its folder or hub id. A folder is stored relative to this model's own folder.
    alpha: factor of the timestep shift, sqrt(N C / 4096) by default.
    reader, reader_channels: encoder for understanding, when images are generated in a VAE's latents: an RAE
        with N tokens, and its channels. Scale-RAE reads with SigLIP-2 there.
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
        self.tokenizer = None  # set by `from_pretrained` if language_model is a config
        self.im_start = self.im_end = None  # its ids of the tokens around an image
        auto = transformers.AutoModelForCausalLM
        if isinstance(language_model, dict):
            config = transformers.AutoConfig.for_model(**language_model)
            self.language_model = auto.from_config(config, trust_remote_code=False).float()
        else:
            # stated, because otherwise `transformers` asks on the terminal
            options = {"trust_remote_code": False}
            tokenizer = transformers.AutoTokenizer.from_pretrained(language_model, **options)
            model, report = auto.from_pretrained(language_model, output_loading_info=True, **options)
            if missing := sorted(report["missing_keys"]):  # initialised at random, with a warning only
                raise ValueError(f"{language_model}: {len(missing)} weights are missing: {missing[:5]}")
            self.language_model = model.float()  # files are often bf16
            self.add_image_tokens(tokenizer)
        # instruction-tuned models ship sampling settings and penalties, which decoding here must not inherit
        self.language_model.generation_config = transformers.GenerationConfig()
        config = self.language_model.config
        self._hub_mixin_config["language_model"] = config.to_diff_dict() | {"model_type": config.model_type}
        tokens, width = latent_shape[0], config.hidden_size
        # ---- DiT, latent queries, projector of images to read, connector
        dit = {"condition_width": dit["width"], **dit}
        self.dit = DiT(latent_shape, **dit)
        self.latent_queries = nn.Parameter(torch.randn(tokens, width) / math.sqrt(width))
        first = nn.Linear(self.read_shape[1], width)
        self.mm_projector = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
        self.diff_head_projector = nn.Linear(width, dit["condition_width"])  # the connector
        # Scale-RAE's std of 0.02 at its widths of 1536 and more. The output is added to the timestep
        # embedding, so narrower models need a larger std for the same scale.
        nn.init.normal_(self.diff_head_projector.weight, std=0.02 * max(1.0, math.sqrt(1536 / width)))
        nn.init.zeros_(self.diff_head_projector.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.dit.blocks, *self.language_model.model.layers]

    @property
    def reader(self) -> RAE | VAE:
        """The autoencoder whose latents, `read_shape`, are read."""
        return self.open(self.reader_path or self.autoencoder_path)

    # -- tokens

    def set_tokenizer(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Raises ValueError for a vocabulary without <im_start> and <im_end>, or without ChatML's tokens."""
        vocabulary, missing = tokenizer.get_vocab(), []
        for token in ("<im_end>", "<im_start>", "<|im_end|>", "<|im_start|>"):
            if tokenizer.encode(token, add_special_tokens=False) != [vocabulary.get(token)]:
                missing.append(token)
        if missing:
            needed = "ChatML's tokens, as Qwen2.5-Instruct has them, and those around an image are needed"
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}: {needed}")
        self.tokenizer = tokenizer
        self.im_start, self.im_end = vocabulary["<im_start>"], vocabulary["<im_end>"]

    def add_image_tokens(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Adds <im_start> and <im_end> (not Qwen's <|im_start|>), initialised to the mean of the other
        embeddings."""
        model = self.language_model
        # rows of tokens that the tokenizer and the table already had are kept; a table may have rows to spare
        known = min(max(tokenizer.get_vocab().values()) + 1, len(model.get_input_embeddings().weight))
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
        self.set_tokenizer(tokenizer)
        model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1, mean_resizing=False)
        # with tied embeddings both are the same matrix, and the second pass changes nothing
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                embeddings.weight[known:] = embeddings.weight[:known].mean(dim=0)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_turn(self, role: str, text: str) -> list[int]:
        return encode_turn(role, text, self.tokenizer, self.latent_shape[0])

    def encode_chat(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        return encode_chat(turns, self.tokenizer, self.latent_shape[0])

    def chat(self, conversations: list[list[tuple[str, str]]]) -> Chat:
        # cuDNN plans attention anew for every length, which takes up to half a second
        multiple = 64 if self.device.type == "cuda" else 1
        return self.collate([self.encode_chat(turns) for turns in conversations], multiple)

    def collate(self, encoded: list[tuple[list[int], list[int]]], multiple: int = 1) -> Chat:
        """A batch from (ids, labels) pairs, padded on the right to the longest, rounded up to a multiple."""
        length = max(len(ids) for ids, _ in encoded)
        length += -length % multiple
        # any id will do as padding: attention is causal, and no token sees what is behind it
        ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in encoded])
        labels = torch.tensor([row + [IGNORED] * (length - len(row)) for _, row in encoded])
        # flat positions of the batch's P images, (P, N), in raster order
        images = (ids == IMAGE).flatten().nonzero().view(-1, self.latent_shape[0])
        # an image is an answer if the token before it, its <im_start>, is supervised
        answers = images[labels.flatten()[images[:, 0] - 1] != IGNORED]
        answer_mask = torch.zeros(ids.numel(), dtype=torch.bool)
        answer_mask[answers.flatten()] = True
        answer_mask = answer_mask.view_as(ids)
        return Chat(ids, labels, answer_mask, (ids == IMAGE) & ~answer_mask)

    # -- forward

    def positions(self, mask: Tensor) -> Tensor:
        """Flat positions (n,) of a mask (B, L) on the CPU, on the model's device."""
        return to_device(mask.flatten().nonzero().flatten(), self.device)

    def embed(self, chat: Chat, context_latents: Tensor | None = None) -> Tensor:
        """Input embeddings (B, L, width): latent queries where images are to be generated, and projections of
        the images to read, (R, *read_shape)."""
        if context_latents is not None and context_latents.shape[1:] != self.read_shape:
            shape = tuple(context_latents.shape[1:])
            raise ValueError(f"latents {shape} cannot be read, only {self.read_shape}")
        embeddings = self.language_model.get_input_embeddings()(to_device(chat.ids.clamp(min=0), self.device))
        # No branches: FSDP needs every rank to use every weight, also if its samples have no image.
        flat, answers = embeddings.flatten(0, 1), self.positions(chat.answer_mask)
        queries = self.latent_queries.repeat(len(answers) // self.latent_shape[0], 1)
        # (B * L, width); out of place, so that autograd reaches the token embeddings and the queries
        flat = flat.index_copy(0, answers, queries.type_as(flat))
        if context_latents is not None:
            projected = self.mm_projector(context_latents).type_as(flat).flatten(0, 1)
            flat = flat.index_copy(0, self.positions(chat.context_mask), projected)
        return flat.view_as(embeddings)

    def hidden_states(self, embeddings: Tensor) -> Tensor:
        """(B, L, width) -> last hidden states, flattened to (B * L, width)."""
        # attention is causal, so that padding on the right needs no mask
        model = self.language_model.model
        out = model(inputs_embeds=embeddings, attention_mask=self.causal_mask, use_cache=False)
        return out.last_hidden_state.flatten(0, 1)

    @property
    def causal_mask(self) -> dict | None:
        """Mask argument for plain causal attention in Qwen2; None: the model builds its own mask."""
        config = self.language_model.config
        layers = set(getattr(config, "layer_types", ()))
        is_plain = (config.model_type, config._attn_implementation) == ("qwen2", "sdpa")
        # To make a mask, `transformers` would ask the GPU whether positions are packed, and wait for it.
        return {"full_attention": None} if is_plain and layers == {"full_attention"} else None

    def answer_condition(self, hidden: Tensor, chat: Chat) -> Tensor:
        """Condition vectors (A, N, Z) of the images to generate, from the hidden states at their queries."""
        at_queries = hidden[self.positions(chat.answer_mask)]
        return self.diff_head_projector(at_queries.view(-1, self.latent_shape[0], hidden.shape[-1]))

    def forward(
        self, chat: Chat, x_t: Tensor, t: Tensor, dropped: Tensor, context_latents: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Velocity (k A, N, C) of the chat's A images to generate, that of the base head or None, and
        cross-entropy summed over the supervised tokens.

        x_t (k A, N, C), shifted t (k A,), dropped (k A,) bool, the condition dropout: k draws per image, all
        images' first draws first. context_latents: (R, *read_shape), images to read.
        """
        # ---- text: one pass over prompts, images to read and queries
        hidden = self.hidden_states(self.embed(chat, context_latents))
        # Logits only at supervised positions: at all positions they would be the largest tensor of the step.
        labels = chat.next_labels.flatten()
        logits = self.language_model.lm_head(hidden[self.positions(labels != IGNORED)]).float()
        targets = to_device(labels[labels != IGNORED], self.device)
        cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
        # ---- images: the hidden states at the queries condition the DiT, the same for all k draws
        condition = self.answer_condition(hidden, chat)
        condition = condition.repeat(len(x_t) // max(1, len(condition)), 1, 1)
        velocities = self.velocities(x_t, t, self.dit.drop_condition(condition, dropped))
        return *velocities, cross_entropy

    # -- inference

    def check_prompts(self, texts: list[str], max_tokens: int = 256) -> None:
        """Raises ValueError for user text that is empty, too long or contains a special token."""
        # they would end the turn, or stand for an image that is not there
        special = [*self.tokenizer.get_added_vocab(), "<image>"]
        for text in texts:
            if not text.strip():
                raise ValueError("empty prompt: describe an image, for example 'a red circle'")
            if token := next((token for token in special if token in text), None):
                raise ValueError(f"the prompt contains the special token {token}: remove it")
            if (length := len(self.tokens(text))) > max_tokens:
                raise ValueError(f"the prompt has {length} tokens, the limit is {max_tokens}: shorten it")

    @torch.no_grad()
    def condition(self, prompts: list[str] | Tensor) -> Tensor:
        """Condition vectors (B, N, Z) for B prompts: one pass of the language model over the request, the
        beginning of the reply and the queries. Raises ValueError for what `check_prompts` refuses."""
        if isinstance(prompts, Tensor):
            # condition vectors already, from a `Dialogue`
            return prompts
        self.check_prompts(prompts)
        # no generation: the reply is known up to the image, and causal attention ignores what follows
        chat = self.chat([[("user", REQUEST.format(prompt)), ("assistant", REPLY)] for prompt in prompts])
        return self.answer_condition(self.hidden_states(self.embed(chat)), chat)

    @torch.no_grad()
    def answer(self, image_or_latents: Tensor, question: str, max_tokens: int = 64) -> str:
        """Answers a question about one image, (3, H, W) in [0, 1], or about its latents, `read_shape`."""
        return Dialogue(self).say(question, image_or_latents, max_tokens)[0]

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: call set_tokenizer first")
        super()._save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, autoencoder: str | None = None, revision: str | None = None
    ) -> "TextToImage":
        """A folder of `save_pretrained` or a hub id; a name in `convert.RELEASED_TEXT_TO_IMAGE`, such as
        "scale-rae-1.5b-2.4b"; or the authors' files, a folder or hub id: their config.json, the tokenizer and
        the weights, or their trainer's `model.pth.zstd`. The autoencoder follows from their config.
        """
        import convert

        model = convert.open_text_to_image(str(source), revision)
        model = model or super().from_pretrained(source, revision=revision)
        model.autoencoder_path = autoencoder or model.autoencoder_path
        return model

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, **kwargs):
        model = super()._from_pretrained(model_id=model_id, config=config, **kwargs)
        options = {"revision": kwargs.get("revision"), "trust_remote_code": False}
        model.set_tokenizer(transformers.AutoTokenizer.from_pretrained(model_id, **options))
        return model


# -----------------------------------------------------------------------------------------------------------
# 7. dialogue, and test-time scaling: the language model judges latents (Scale-RAE section 5)


def read(model: TextToImage, ids: list[int], latents: Tensor | None = None, batch: int = 1) -> Tensor:
    """Input embeddings (batch, L, width) of tokens without a loss, with the images to read among them."""
    chat = model.collate([(ids, [IGNORED] * len(ids))] * batch)
    return model.embed(chat, latents if latents is None else latents.to(model.device))


def decode_greedily(
    model: TextToImage, embeddings: Tensor, max_tokens: int, stop: list[int]
) -> transformers.generation.GenerateDecoderOnlyOutput:
    """Continues the embeddings (B, L, width). Returns `sequences` (B, T), the new tokens up to and including
    one of `stop`, then padding; and `logits`, T tensors (B, V)."""
    options = {"max_new_tokens": max_tokens, "eos_token_id": stop, "pad_token_id": stop[0]}
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    config = transformers.GenerationConfig(**options)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    model = model.language_model
    return model.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config)


class Dialogue:
    """A conversation in which the model decides whether it answers in words or begins an image."""

    def __init__(self, model: TextToImage):
        self.model = model
        with torch.no_grad():
            # (1, L, width), all turns so far
            self.embeddings = read(model, model.encode_turn("system", SYSTEM))

    @torch.no_grad()
    def say(
        self, text: str, image_or_latents: Tensor | None = None, max_tokens: int = 64
    ) -> tuple[str, Tensor | None]:
        """The reply to a user's turn: its words, and the condition vectors (1, N, Z) of an image if the reply
        ends with one, else None. image_or_latents: something to look at, (3, H, W) in [0, 1] or of
        `read_shape`. Raises ValueError for a text that `check_prompts` refuses."""
        model, latents, condition = self.model, None, None
        model.check_prompts([text], max_tokens=1024)
        if image_or_latents is not None:
            text, latents = f"<image>\n{text}", image_or_latents.to(model.device)[None]
            latents = latents if latents.ndim == 3 else model.reader.encode(latents)
        # ---- the user's turn, and the header of the reply
        self.append(read(model, model.encode_turn("user", text), latents))
        self.append(read(model, model.tokens("<|im_start|>assistant\n")))
        [end] = model.tokens("<|im_end|>")
        out = decode_greedily(model, self.embeddings, max_tokens, [end, model.im_start])
        reply = out.sequences[0].tolist()
        # ---- the reply ends with the turn, with an image, or at max_tokens, which counts as the turn's end
        words = [token for token in reply if token not in (end, model.im_start)]
        ending = model.tokens("<|im_end|>\n")
        if words:
            self.append(read(model, words))
        if reply[-1] == model.im_start:
            # with labels it is an image to generate: its embeddings are the latent queries, which later turns
            # see, as in training
            ids = [model.im_start, *[IMAGE] * model.latent_shape[0]]
            self.append(model.embed(model.collate([(ids, ids)])))
            at_queries = model.hidden_states(self.embeddings)[-model.latent_shape[0] :]
            condition = model.diff_head_projector(at_queries)[None]
            ending = [model.im_end, *ending]
        self.append(read(model, ending))
        return model.tokenizer.decode(words, skip_special_tokens=True).strip(), condition

    def append(self, embeddings: Tensor) -> None:
        self.embeddings = torch.cat([self.embeddings, embeddings], dim=1)


class Verdict(NamedTuple):
    """The language model's verdict on whether an image matches a prompt."""

    answer: str  # whether they align: yes, no or uncertain
    yes_logit: float
    no_logit: float
    prompt_confidence: float


# Sort keys, the best verdict first; ties keep their order. Scale-RAE: yes answers by descending yes logit,
# then the others by ascending no logit.
VERIFIERS = {
    "answer_logits": lambda verdict: (verdict.answer != "yes", -verdict.yes_logit, verdict.no_logit),
    "prompt_confidence": lambda verdict: -verdict.prompt_confidence,
}


def best(verdicts: list[Verdict], verifier: str, keep: int) -> list[int]:
    """Indices of the images to keep, the best first."""
    return sorted(range(len(verdicts)), key=lambda i: VERIFIERS[verifier](verdicts[i]))[:keep]


@torch.no_grad()
def verify(model: TextToImage, prompt: str, latents: Tensor, max_tokens: int = 16) -> list[Verdict]:
    """The language model's verdicts on whether images match a prompt, from their latents (B, *read_shape)."""
    model.check_prompts([prompt])
    header = model.tokens("<|im_start|>assistant\n")
    question = f"<image>\nDoes this image align with the prompt: {prompt}?"
    question = model.encode_chat([("user", question)])[0] + header
    description = model.encode_chat([("user", "<image>\nDescribe this image.")])[0] + header
    [end] = model.tokens("<|im_end|>")
    yes, no = word_ids(model, "yes"), word_ids(model, "no")
    answers, yes_logits, no_logits = answer_logits(model, question, latents, yes, no, end, max_tokens)
    confidence = prompt_confidence(model, description, model.tokens(prompt), latents).tolist()
    return [Verdict(*row) for row in zip(answers, yes_logits, no_logits, confidence, strict=True)]


def word_ids(model: TextToImage, word: str) -> list[int]:
    """The ids of a word's spellings that are one token: three cases, with and without a leading space."""
    spellings = [space + form for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
    encoded = [model.tokens(spelling) for spelling in spellings]
    return [ids[0] for ids in encoded if len(ids) == 1]


@torch.no_grad()
def answer_logits(
    model: TextToImage,
    ids: list[int],
    latents: Tensor,
    yes: list[int],
    no: list[int],
    end: int,
    max_tokens: int,
) -> tuple[list[str], list[float], list[float]]:
    """Greedy answers to one question (ids, with an image) about each of B images, latents (B, *read_shape):
    "yes" if any token is in `yes`, else "no" or "uncertain"; and the raw logits of the last token that is in
    `yes` and in `no`, 0 if there is none."""
    out = decode_greedily(model, read(model, ids, latents, len(latents)), max_tokens, [end])
    # raw logits of the tokens that were chosen, (B, T)
    logits = torch.stack(out.logits, dim=1).gather(2, out.sequences[..., None])[..., 0]
    answers, yes_logits, no_logits = [], [], []
    for tokens, row in zip(out.sequences.tolist(), logits.tolist(), strict=True):
        # logits of the answer's tokens that say yes, and no, in order
        of_yes = [logit for token, logit in zip(tokens, row, strict=True) if token in yes]
        of_no = [logit for token, logit in zip(tokens, row, strict=True) if token in no]
        answers.append("yes" if of_yes else "no" if of_no else "uncertain")
        yes_logits.append(of_yes[-1] if of_yes else 0.0)
        no_logits.append(of_no[-1] if of_no else 0.0)
    return answers, yes_logits, no_logits


@torch.no_grad()
def prompt_confidence(model: TextToImage, ids: list[int], prompt: list[int], latents: Tensor) -> Tensor:
    """(B,): how certain the model is while it reads the prompt as the description of each of B images."""
    embeddings = read(model, [*ids, *prompt], latents, len(latents))
    # (B, L, width) -> the prompt's positions (B, n, width), the last ones
    hidden = model.hidden_states(embeddings).view(*embeddings.shape[:2], -1)[:, -len(prompt) :]
    # self-certainty: mean over the prompt's positions of KL(uniform || next token) (arXiv 2502.18581)
    log_p = model.language_model.lm_head(hidden).float().log_softmax(dim=-1)
    return -(log_p.mean(dim=(1, 2)) + math.log(log_p.shape[-1]))


# -----------------------------------------------------------------------------------------------------------
# 8. sizes by the papers' names

ENCODERS = {  # hub ids
    "siglip2-so400m": "google/siglip2-so400m-patch14-224",
    "siglip2-b": "google/siglip2-base-patch16-256",
    "dinov2-b": "facebook/dinov2-with-registers-base",
    "dinov3-l": "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "webssl-l": "facebook/webssl-dino300m-full2b-224",
    "mae-b": "facebook/vit-mae-base",
    "dino-s8": "facebook/dino-vits8",  # backbones of the discriminators
    "dino-s16": "facebook/dino-vits16",
}

# RAEv2's names for the layers of dinov3-l that are averaged, counted from 0; k1 is the last one alone
LAYERS = {"k7": [11, 13, 15, 17, 19, 21, 23], "k23": list(range(1, 24))}

# RAE appendix. Caution: the MLP of XL is not 4 x its width. S is ours, for small GPUs.
DECODERS = {
    "ViT-S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "ViT-B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "ViT-L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "ViT-XL": {"width": 1152, "depth": 28, "heads": 16, "mlp_width": 4096},
    "nano": {"width": 160, "depth": 4, "heads": 5, "mlp_width": 640},
}

RAE_HEAD = {"head": (2048, 2, 16), "readd_time": True, "xavier": False}  # of DiT-DH
SCALE_RAE_HEAD = {"head": (2688, 2, 16)}  # the number of its attention heads is not published
SCALE_RAE_DITS = {  # Scale-RAE table 10
    "0.5B": {"width": 1280, "depth": 16, "heads": 32},
    "2.4B": {"width": 2048, "depth": 32, "heads": 32},
    "3.1B": {"width": 2304, "depth": 32, "heads": 32},
    "5.5B": {"width": 3072, "depth": 32, "heads": 32},
    "9.8B": {"width": 4096, "depth": 32, "heads": 32},
}
IN_CONTEXT = {"time_tokens": 4, "condition_tokens": 8, "base_depth": 8}  # RAEv2
CAPTION_TOKENS = 256  # longer captions are cut (RAEv2)
DITS = {
    "DiT-S": {"width": 384, "depth": 12, "heads": 6, "silu_condition": False},
    "DiT-B": {"width": 768, "depth": 12, "heads": 12, "silu_condition": False},
    "DiT-L": {"width": 1024, "depth": 24, "heads": 16, "silu_condition": False},
    "DiT-XL": {"width": 1152, "depth": 28, "heads": 16, "silu_condition": False},
    "DiT-DH-S": {"width": 384, "depth": 12, "heads": 6} | RAE_HEAD,
    "DiT-DH-B": {"width": 768, "depth": 12, "heads": 12} | RAE_HEAD,
    "DiT-DH-L": {"width": 1024, "depth": 24, "heads": 16} | RAE_HEAD,
    "DiT-DH-XL": {"width": 1152, "depth": 28, "heads": 16} | RAE_HEAD,
    **SCALE_RAE_DITS,
    **{f"{name}-DH": size | SCALE_RAE_HEAD for name, size in SCALE_RAE_DITS.items()},
    # RAEv2; for captions with CAPTION_TOKENS
    "raev2": {"width": 1440, "depth": 28, "heads": 20, "head": (2048, 2, 16)} | IN_CONTEXT,
    "nano": {"width": 192, "depth": 6, "heads": 3, "condition_width": 128},
    "nano-in-context": {"width": 256, "depth": 6, "heads": 4} | IN_CONTEXT | {"base_depth": 3},
    "nano-guide-in-context": {"width": 128, "depth": 4, "heads": 4} | IN_CONTEXT | {"base_depth": 2},
    "nano-guide": {"width": 128, "depth": 4, "heads": 4, "condition_width": 128},  # for AutoGuidance
}


def class_dit(name: str, num_classes: int | None) -> dict:
    """Arguments of `DiT` for class labels (None: unconditional), from a name in DITS."""
    size = {key: value for key, value in DITS[name].items() if key != "condition_width"}
    return size | ({"num_classes": num_classes} if num_classes else {})


def from_official(state_dict: dict[str, Tensor], **given) -> nn.Module:
    """The module of a state dict that the authors released; see `convert.from_official`."""
    import convert

    return convert.from_official(state_dict, **given)
