"""Released weights <-> the models of rae.py: the authors' RAE and Scale-RAE files, and diffusers folders.

rae.py imports this file only when something is opened or exported; what it calls is at the end. Submodules of
rae.py carry the released names, so a key map is a prefix, a rename and a reshape. Sizes are read from tensor
shapes; configs add what shapes cannot tell, such as attention heads. Loading is strict: all keys must fit.
"""

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rae

# -----------------------------------------------------------------------------------------------------------
# released names

COLLECTION = "nyu-visionx/RAE-collections"


def collection(family: str, decoder: str, statistics: str, encoder: str) -> dict[str, str]:
    return {
        "decoder": f"{COLLECTION}/decoders/{family}/{decoder}/model.pt",
        "stats": f"{COLLECTION}/stats/{family}/{statistics}/stat.pt",
        "encoder": rae.ENCODERS[encoder],
    }


def raev2(folder: str, layers: list[int] | None) -> dict:
    path = f"nyu-visionx/RAEv2-models/stage1/{folder}"
    parts = {
        "decoder": f"{path}/decoder.pt",
        "stats": f"{path}/stats.pt",
        "encoder": rae.ENCODERS["dinov3-l"],
    }
    return parts | {"layers": layers, "denormalise": False}


RELEASED = {  # arguments of `RAE.from_pretrained`; the encoder's input size follows from the number of tokens
    "rae-dinov2-b": collection("dinov2/wReg_base", "ViTXL_n08", "imagenet1k", "dinov2-b"),
    "rae-dinov2-b-512": collection("dinov2/wReg_base", "ViTXL_n08_i512", "imagenet1k_512", "dinov2-b"),
    "rae-mae-b": collection("mae/base_p16", "ViTXL_n08", "ImageNet1k", "mae-b"),
    "rae-siglip2-b": collection("siglip2/base_p16_i256", "ViTXL_n08", "ImageNet1k", "siglip2-b"),
    # Scale-RAE does not normalise its latents: no statistics
    "scale-rae-siglip2-so400m": {
        "decoder": "nyu-visionx/siglip2_decoder",
        "encoder": rae.ENCODERS["siglip2-so400m"],
    },
    "scale-rae-webssl-l": {"decoder": "nyu-visionx/webssl300m_decoder", "encoder": rae.ENCODERS["webssl-l"]},
    # RAEv2: trained on ImageNet, or on four general sources
    "raev2-k1": raev2("imagenet/dinov3l-k1", None),
    "raev2-k7": raev2("imagenet/dinov3l-k7", rae.LAYERS["k7"]),
    "raev2-k23": raev2("imagenet/dinov3l-k23", rae.LAYERS["k23"]),
    "raev2-k7-general": raev2("general/dinov3l-k7", rae.LAYERS["k7"]),
    "raev2-k23-general": raev2("general/dinov3l-k23", rae.LAYERS["k23"]),
}

DITS_FOLDER = f"{COLLECTION}/DiTs/Dinov2/wReg_base"
RELEASED_DITS = {  # (file, autoencoder); the S models are guides for AutoGuidance
    "rae-dit-dh-xl-256": (f"{DITS_FOLDER}/ImageNet256/DiTDH-XL/stage2_model.pt", "rae-dinov2-b"),
    "rae-dit-dh-s-256": (f"{DITS_FOLDER}/ImageNet256/DiTDH-S_ep14/stage2_model.pt", "rae-dinov2-b"),
    "rae-dit-dh-xl-512": (f"{DITS_FOLDER}/ImageNet512/DiTDH-XL_ep400/stage2_model.pt", "rae-dinov2-b-512"),
    "rae-dit-dh-s-512": (f"{DITS_FOLDER}/ImageNet512/DiTDH-S_ep20/stage2_model.pt", "rae-dinov2-b-512"),
    "raev2-imagenet": ("nyu-visionx/RAEv2-models/stage2/imagenet/dinov3l-k7/checkpoint.pt", "raev2-k7"),
}

RELEASED_TEXT_TO_IMAGE = {  # hub ids; 64ep: finetuned for 64 epochs
    "scale-rae-1.5b-2.4b": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B",
    "scale-rae-1.5b-2.4b-64ep": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-64ep",
    "scale-rae-1.5b-2.4b-webssl": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-WebSSL",
    "scale-rae-7b-9.8b": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B",
    "scale-rae-7b-9.8b-64ep": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B-64ep",
}


# -----------------------------------------------------------------------------------------------------------
# recognising a state dict, and loading it strictly


def from_official(state_dict: dict[str, Tensor], **options) -> nn.Module:
    """Build the model of a released state dict, in eval mode. The keys tell which model it is:

    - RAE's decoder -> Decoder
    - a whole RAE -> RAE; needs encoder= (config or model of `transformers`), image_mean= and image_std=;
      takes encoder_size= (default: from the number of tokens) and stats= ({"mean", "var"}, (C, h, w) or None)
    - LightningDiT, DiT-DH, or Scale-RAE's DiT without its prefix `diff_head.model.` -> DiT
    - RAEv2's DiT, for labels or text -> InContextDiT; takes base_depth= (default: 8, the released one's)
    - a whole Scale-RAE model -> TextToImage; needs language_model= (config or model of `transformers`, no hub
      id); takes im_start= and im_end=, ids of the tokens around an image. Set its tokenizer and autoencoder
      afterwards

    heads= is needed for a decoder whose size is not in `rae.DECODERS`, and for a DiT without RoPE tables;
    depth= for a DiT whose DDT head is as wide as its backbone, for nothing tells where the head begins. Other
    sizes are read from the tensors; options such as width= are checked. With the DDT head, heads, width
    and depth are pairs (backbone, head), or one number for both. Raises ValueError for an unknown or damaged
    state dict, naming the first keys that do not fit, and for options that contradict it.
    """
    weights = unwrapped(state_dict)
    # lists, from JSON, become tuples: these compare equal to the sizes read from the tensors
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    modules = {name.split(".")[0] for name in weights}
    if "diff_head" in modules:
        return build_text_to_image(weights, **options)
    if {"encoder", "decoder"} <= modules:
        return build_whole_rae(weights, **options)
    if "decoder_layers" in modules:
        return load_official(rae.Decoder(**decoder_sizes(weights, options)), weights)
    if "ctx_embedder" in modules:
        return build_in_context(weights, **options)
    if modules & {"blocks", "dit_blocks"}:
        released = ReleasedDiT(weights)
        dit = rae.DiT(**released.sizes(options))
        return load_official(dit, released.reshaped(), released.rename, released.rope_tables(dit))
    raise ValueError(f"unknown state dict, no decoder_layers, blocks or dit_blocks: {list(state_dict)[:5]}")


# DDP's, torch_xla's, torch.compile's, FSDP's and activation checkpointing's, anywhere in a key
WRAPPERS = "module _orig_module _orig_mod _fsdp_wrapped_module _fpw_module _checkpoint_wrapped_module".split()


def unwrapped(state_dict: dict) -> dict[str, Tensor]:
    """The weights of a checkpoint, EMA before trained ones, without the prefixes of wrappers."""
    for name in ("ema", "model", "module", "state_dict"):
        if isinstance(state_dict.get(name), dict):
            return unwrapped(state_dict[name])
    wrappers = rf"(?<![^.])({'|'.join(WRAPPERS)})\."
    weights = {re.sub(wrappers, "", str(name)): tensor for name, tensor in state_dict.items()}
    if len(weights) < len(state_dict):
        raise ValueError(
            "weights occur with and without a wrapper's prefix, such as module.: keep one of each"
        )
    return weights


def config_of(model) -> dict | None:
    """The config of a `transformers` model as a dict; configs and dicts are accepted too."""
    config = getattr(model, "config", model)
    if isinstance(config, transformers.PretrainedConfig):
        config = config.to_diff_dict() | {"model_type": config.model_type}
    return config


def size_of(weights: dict[str, Tensor], name: str, axis: int = 0) -> int:
    if name not in weights or weights[name].ndim <= axis:
        raise ValueError(f"damaged state dict: {name} is missing or has fewer than {axis + 1} axes")
    return weights[name].shape[axis]


def count_blocks(weights: dict[str, Tensor], blocks: str) -> int:
    numbers = [re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in weights]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def check_options(options: dict, sizes: dict, widths: tuple, heads: tuple) -> None:
    """Raise ValueError for options that contradict the tensors, and for numbers of heads that cannot be."""
    for name, value in options.items():
        if name not in sizes or sizes[name] != value:
            raise ValueError(f"{name}={value}, but the state dict says {sizes.get(name, 'nothing of it')}")
    if len(heads) != len(widths) or not all(h and w % h == 0 for w, h in zip(widths, heads, strict=True)):
        raise ValueError(f"give heads=, the attention heads, divisors of the width {widths}; not {heads}")


def load_official(model: nn.Module, weights: dict, rename=str, rope_tables: dict | None = None) -> nn.Module:
    """Load released weights, `unwrapped`, strictly; returns the model in eval mode.

    rename: function, our key -> the released key. rope_tables: what the RoPE tables must be, by released key.
    Raises ValueError with the first keys that do not fit.
    """
    shapes = {rename(name): tensor.shape for name, tensor in model.state_dict().items()}
    # SwiGLU rounds its hidden width up and pads what it loads. It would pad a damaged tensor too, so the
    # width is checked here: the published one, or ours.
    exact = {rename(name): shape for name, shape in published_swiglu_shapes(model).items()}
    rope_tables = rope_tables or {}
    if weights.keys() & rope_tables.keys():  # a file has all of them or none
        shapes |= {name: table.shape for name, table in rope_tables.items()}

    problems = [f"{name} is missing" for name in shapes if name not in weights]
    for name, tensor in weights.items():
        if name not in shapes:
            problems.append(f"{name} is unknown")
        elif tensor.shape not in (shapes[name], exact.get(name)):
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(shapes[name])}")
        # the tolerance is bf16's rounding: other heads, or another grid, are off by more
        elif name in rope_tables and not torch.allclose(tensor.float(), rope_tables[name], atol=4e-3):
            problems.append(f"{name} is not the RoPE table of these heads")
    if problems:
        first = "; ".join(problems[:5])
        raise ValueError(f"{type(model).__name__}: {len(problems)} keys do not fit: {first}")
    model.load_state_dict({name: weights[rename(name)] for name in model.state_dict()})
    return model.eval()


def published_swiglu_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of SwiGLU's weights with the exact hidden width, by our keys."""
    shapes = {}
    for name, layer in model.named_modules():
        if isinstance(layer, rae.SwiGLU):
            width, hidden = layer.w3.out_features, layer.hidden
            shapes |= {f"{name}.w12.weight": (2 * hidden, width), f"{name}.w12.bias": (2 * hidden,)}
            shapes |= {f"{name}.w3.weight": (width, hidden)}
    return shapes


# -----------------------------------------------------------------------------------------------------------
# decoder


def decoder_sizes(weights: dict[str, Tensor], options: dict, prefix: str = "") -> dict:
    """The arguments of `rae.Decoder`, from the shapes of the keys that start with `prefix`."""
    size = partial(size_of, weights)
    tokens = math.isqrt(size(f"{prefix}decoder_pos_embed", 1) - 1) ** 2  # its first row is the class token's
    # square roots are rounded down; where the number is no square, `load_official` reports the shape
    sizes = {
        "latent_shape": (tokens, size(f"{prefix}decoder_embed.weight", 1)),
        "patch_size": math.isqrt(size(f"{prefix}decoder_pred.bias") // 3),
        "width": size(f"{prefix}decoder_embed.weight"),
        "depth": count_blocks(weights, f"{prefix}decoder_layers"),
        "mlp_width": size(f"{prefix}decoder_layers.0.intermediate.dense.bias"),
        "heads": options.get("heads"),
    }
    # the number of heads leaves no trace in the tensors: the published sizes have known ones
    for preset in rae.DECODERS.values():
        same_size = all(preset[name] == sizes[name] for name in ("width", "depth", "mlp_width"))
        if sizes["heads"] is None and same_size:
            sizes["heads"] = preset["heads"]
    check_options(options, sizes, (sizes["width"],), (sizes["heads"],))
    return sizes


# -----------------------------------------------------------------------------------------------------------
# RAE: encoder + decoder + latent statistics


def build_whole_rae(weights: dict[str, Tensor], encoder=None, **options) -> rae.RAE:
    model = build_rae(weights, config_of(encoder), prefix="decoder.", **options)
    # the authors' encoder wrappers keep the `transformers` model under one of two names
    is_dino = model.encoder.config.model_type.startswith("dinov2")
    return load_rae(model, weights, "encoder.encoder." if is_dino else "encoder.model.")


def build_rae(
    weights,
    encoder,
    encoder_size=None,
    image_mean=None,
    image_std=None,
    stats=None,
    prefix="",
    layers=None,
    denormalise=None,
    **options,
) -> rae.RAE:
    """An RAE around a decoder of these sizes, with latent statistics but without the decoder's weights. The
    arguments are those of `from_official` and `RAE`; options: the decoder's. prefix: of its keys."""
    if encoder is None:
        raise ValueError("give encoder=, whose latents this decoder takes: a hub id, a folder or a config")
    sizes = decoder_sizes(weights, options, prefix)
    tokens, channels = sizes.pop("latent_shape")
    if encoder_size is None:  # one token per patch
        read = transformers.AutoConfig
        if isinstance(encoder, dict):
            config = read.for_model(**encoder)
        else:
            config = read.from_pretrained(encoder, trust_remote_code=False)
        encoder_size = math.isqrt(tokens) * getattr(config, "vision_config", config).patch_size
    pixels = list(image_mean or []), list(image_std or [])
    model = rae.RAE(encoder, sizes, encoder_size, *pixels, layers, denormalise)
    if model.latent_shape != (tokens, channels):
        raise ValueError(
            f"the decoder takes latents {(tokens, channels)}, this encoder gives {model.latent_shape} at "
            f"encoder_size {encoder_size}: give the encoder that it was trained with"
        )
    # the authors' statistics are (C, h, w), ours (N, C); 1e-5 as in their normalisation
    expected = (channels, math.isqrt(tokens), math.isqrt(tokens))
    for name, value in (stats or {}).items():
        shape = tuple(getattr(value, "shape", ()))
        if name not in ("mean", "var") or (value is not None and shape != expected):
            raise ValueError(f"statistics: {name} is {shape}; give mean and var, {expected} or None")
        if value is not None and name == "mean":
            model.latent_mean.copy_(value.flatten(1).mT)
        elif value is not None:
            model.latent_std.copy_((value.flatten(1).mT + 1e-5).sqrt())
    return model


def load_rae(model: rae.RAE, weights: dict[str, Tensor], prefix: str, rename=str) -> rae.RAE:
    """Load a whole RAE strictly; latent statistics that are not in the file keep their values. prefix: of the
    encoder's keys in the file; rename: our other keys -> the file's."""
    statistics = {"latent_mean": model.latent_mean, "latent_std": model.latent_std}

    def file_key(name: str) -> str:
        return old_encoder_key(re.sub(r"^encoder\.model\.", prefix, rename(name)), prefix)

    # files and the installed `transformers` may use old or new names: compare both in the old ones
    weights = {old_encoder_key(name, prefix): tensor for name, tensor in weights.items()}
    if model.encoder.config.model_type == "siglip_vision_model":  # our encoder has no pooling head
        weights = {name: w for name, w in weights.items() if not name.startswith(f"{prefix}head.")}
    return load_official(model, statistics | weights, file_key)


def old_encoder_key(name: str, prefix: str) -> str:
    """An encoder's key as in transformers 4.56, which the released files were made with. 5.23 renamed the
    linear layers of DINOv2 and MAE, and dropped `vision_model.` from SigLIP."""
    if not name.startswith(prefix):
        return name
    key = name.removeprefix(prefix)
    for new, old in (
        (r"^vision_model\.", ""),
        (r"^layers\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),  # MAE
        (r"^layers\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
        (r"^layers\.", "encoder.layer."),
        (r"attention\.q_proj", "attention.attention.query"),
        (r"attention\.k_proj", "attention.attention.key"),
        (r"attention\.v_proj", "attention.attention.value"),
        (r"attention\.o_proj", "attention.output.dense"),
    ):
        key = re.sub(new, old, key)
    return prefix + key


# -----------------------------------------------------------------------------------------------------------
# DiT: LightningDiT, DiT-DH (with the DDT head), and Scale-RAE's

# (project, has the DDT head) -> latent embedders and RoPE tables, of the backbone, then of the head.
# Caution: Scale-RAE names the embedders of the DDT head the other way round.
DIT_NAMES = {
    ("rae", False): (["x_embedder"], ["feat_rope"]),
    ("rae", True): (["s_embedder", "x_embedder"], ["enc_feat_rope", "dec_feat_rope"]),
    ("scale-rae", False): (["x_embedder"], ["feat_rope"]),
    ("scale-rae", True): (["x_embedder", "s_embedder"], ["enc_rope", "dec_rope"]),
    ("raev2", False): (["x_embedder"], ["rope"]),
    ("raev2", True): (["s_embedder", "x_embedder"], ["enc_rope", "dec_rope"]),
}


class ReleasedDiT:
    """The state dict of a released DiT, whose keys start with `prefix`: its names, sizes and weights."""

    def __init__(self, weights: dict[str, Tensor], prefix: str = ""):
        self.weights, self.prefix = weights, prefix
        modules = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
        self.scale_rae, self.ddt_head = "dit_blocks" in modules, "s_embedder" in modules
        self.blocks = "dit_blocks" if self.scale_rae else "blocks"
        project = "scale-rae" if self.scale_rae else "raev2" if "ctx_embedder" in modules else "rae"
        self.embedders, self.ropes = DIT_NAMES[project, self.ddt_head]

    def rename(self, name: str) -> str:
        """Our key of a DiT -> the released key. Ours are RAE's, but for `.proj` of the embedders."""
        module, dot, rest = name.partition(".")
        if module in ("s_embedder", "x_embedder"):
            module = self.embedders[0 if module == "s_embedder" else -1] + ".proj"
        elif module == "blocks":
            module = self.blocks
        return self.prefix + module + dot + rest

    def size(self, name: str, axis: int = 0) -> int:
        return size_of(self.weights, self.prefix + name, axis)

    def sizes(self, options: dict) -> dict:
        """The arguments of `rae.DiT`. Raises ValueError for options that contradict the tensors."""
        # ---- with the DDT head there are two of each: (backbone, head) -----------------------------
        options = dict(options)
        for name in ("width", "depth", "heads"):
            if isinstance(options.get(name), int):
                options[name] = (options[name],) * len(self.embedders)
        width = tuple(self.size(f"{name}.proj.weight") for name in self.embedders)
        blocks = count_blocks(self.weights, self.prefix + self.blocks)
        in_head = 0
        for i in range(blocks if self.ddt_head else 0):
            # a block of the head has the head's width, and its condition too
            is_wide = self.size(f"{self.blocks}.{i}.norm1.weight") == width[-1]
            condition_width = self.size(f"{self.blocks}.{i}.adaLN_modulation.1.weight", 1)
            in_head += is_wide and condition_width == width[-1]
        depth = (blocks - in_head, in_head) if self.ddt_head else (blocks,)
        if self.ddt_head and in_head == blocks:
            # all blocks are alike, and nothing tells where the head begins
            if "depth" not in options:
                warnings.warn(
                    "backbone and DDT head are equally wide: the head is taken to have two blocks, as in "
                    "both papers; for another give depth=(backbone, head)",
                    stacklevel=2,
                )
            depth = options.get("depth", (blocks - 2, 2))
        heads = options.get("heads", ())
        if f"{self.prefix}{self.ropes[0]}.freqs_cos" in self.weights:
            # a RoPE table has one column for every channel of an attention head
            head_widths = [self.size(f"{rope}.freqs_cos", 1) for rope in self.ropes]
            heads = tuple(w // h for w, h in zip(width, head_widths, strict=True))

        # ---- latents and condition -----------------------------------------------------------------
        # (width, C, p, p): a patch of p x p latents is one token
        embedder = f"{self.embedders[0]}.proj.weight"
        channels = self.size(embedder, 1) * self.size(embedder, 3) ** 2
        sizes = {"latent_shape": (math.isqrt(self.size("pos_embed", 1)) ** 2, channels)}
        if self.scale_rae:
            sizes |= {"num_classes": None, "condition_width": self.size("y_embedder.dropout_embedding")}
        else:  # the last row of the table is the null label
            classes = self.size("y_embedder.embedding_table.weight") - 1
            sizes |= {"num_classes": classes, "condition_width": None}

        # ---- what differs between the three models, and what tells --------------------------------
        check_options(options, sizes | {"width": width, "depth": depth, "heads": heads}, width, heads)
        # names in the blocks alone: a language model beside them may have a q_norm of its own
        in_blocks = [name for name in self.weights if name.startswith(f"{self.prefix}{self.blocks}.")]
        return sizes | {
            "width": width[0],
            "depth": depth[0],
            "heads": heads[0],
            "head": (width[1], depth[1], heads[1]) if self.ddt_head else None,
            "silu_condition": self.scale_rae or self.ddt_head,
            "readd_time": self.ddt_head and not self.scale_rae,
            "xavier": self.scale_rae or not self.ddt_head,
            "qk_norm": any(".q_norm." in name for name in in_blocks),
            "swiglu": not any(".mlp.fc1." in name for name in in_blocks),
        }

    def reshaped(self) -> dict[str, Tensor]:
        """The state dict with its tensors in our shapes, still under the released names."""
        weights = dict(self.weights)
        if self.scale_rae:  # its files leave the fixed frequencies out, which ours save
            weights.setdefault(f"{self.prefix}t_embedder.W", rae.TimeEmbedding(1).W)
        # patch embedding as a convolution -> linear layer on tokens of p * p * channels
        patch = self.size(f"{self.embedders[0]}.proj.weight", 3)
        for embedder in self.embedders:
            name = f"{self.prefix}{embedder}.proj.weight"
            weights[name] = weights[name].flatten(1)
            channels = weights[name].shape[1]
        # the output layer makes patches in the order (row, column, channel), ours are (channel, row, column)
        for name in weights:
            if "final_layer.linear." in name and len(weights[name]) == channels:
                weights[name] = rearrange(weights[name], "(p q c) ... -> (c p q) ...", p=patch, q=patch)
        return weights

    def rope_tables(self, dit: rae.DiT | rae.InContextDiT) -> dict[str, Tensor]:
        """Released key -> the RoPE table that it must be. These are in the authors' files, not in ours."""
        tables = {}
        ours = [dit.rope, dit.head_rope] if self.ddt_head else [dit.rope]
        for name, rope in zip(self.ropes, ours, strict=True):
            tables[f"{self.prefix}{name}.freqs_cos"], tables[f"{self.prefix}{name}.freqs_sin"] = rope
        return tables


# -----------------------------------------------------------------------------------------------------------
# RAEv2's DiT


def build_in_context(weights: dict[str, Tensor], base_depth: int = 8, **options) -> rae.InContextDiT:
    """base_depth: the block before the base head, which the tensors do not tell."""
    # the projector of a REPA loss, which no recipe uses, takes no part in the prediction
    weights = {name: w for name, w in weights.items() if not name.startswith("repa_projector.")}
    released = ReleasedDiT(weights)
    size, head, embedders = released.size, released.ddt_head, released.embedders
    # ---- sizes: pairs (backbone, head)
    width = tuple(size(f"{name}.proj.weight") for name in embedders)
    blocks = count_blocks(weights, "blocks")
    in_head = sum(f"blocks.{i}.adaln_modulation.1.weight" in weights for i in range(blocks))
    depth = (blocks - in_head, in_head) if head else (blocks,)
    firsts = (0, blocks - in_head)[: len(width)]  # the first block of each
    heads = tuple(w // size(f"blocks.{i}.attn.q_norm.weight") for w, i in zip(width, firsts, strict=True))
    channels = size(f"{embedders[0]}.proj.weight", 1) * size(f"{embedders[0]}.proj.weight", 3) ** 2
    time_tokens, rows = size("t_embedder.learnable_tokens"), size(f"{released.ropes[0]}.freqs_cos")
    sizes = {"num_classes": None, "condition_width": None, "time_tokens": time_tokens}
    if "ctx_embedder.embedding_table.weight" in weights:
        sizes["num_classes"] = size("ctx_embedder.embedding_table.weight") - 1
        sizes["condition_tokens"] = size("ctx_embedder.learnable_tokens")
        tokens = rows - time_tokens - sizes["condition_tokens"]
    else:
        sizes["condition_width"] = size("ctx_embedder.norm.weight")
        if head:
            tokens = size("dec_rope.freqs_cos")
        else:
            size("rope.freqs_sin")  # raises if it is missing
            # the last row of the table that is rotated is that of the last latent token
            tokens = 1 + int(weights["rope.freqs_sin"].any(1).nonzero().max())
        sizes["condition_tokens"] = rows - time_tokens - tokens
    sizes["latent_shape"] = (tokens, channels)
    sizes["base_depth"] = base_depth if "base_final_layer.linear.weight" in weights else None
    check_options(options, sizes | {"width": width, "depth": depth, "heads": heads}, width, heads)
    head = (width[1], depth[1], heads[1]) if head else None
    dit = rae.InContextDiT(width=width[0], depth=depth[0], heads=heads[0], head=head, **sizes)

    # ---- weights under our names
    renamed = {in_context_key(name): weight for name, weight in released.reshaped().items()}
    for i in range(blocks):
        for whole, parts in (("attn.qkv", ("attn.q", "attn.k", "attn.v")), ("mlp.w12", ("mlp.w1", "mlp.w2"))):
            for kind in ("weight", "bias"):
                names = [f"blocks.{i}.{part}.{kind}" for part in parts]
                if all(name in renamed for name in names):  # else `load_official` says that it is missing
                    renamed[f"blocks.{i}.{whole}.{kind}"] = torch.cat([renamed.pop(name) for name in names])
    return load_official(dit, renamed, rope_tables=released.rope_tables(dit))


def in_context_key(name: str) -> str:
    """RAEv2's key -> ours."""
    for theirs, ours in (
        ("adaln_modulation", "adaLN_modulation"),
        ("final_layer.norm.", "final_layer.norm_final."),
        ("t_embedder.learnable_tokens", "time_tokens"),
        ("ctx_embedder.", "y_embedder."),
        ("_embedder.proj.", "_embedder."),
    ):
        # the projection of the text keeps its name
        if not (theirs == "_embedder.proj." and name.startswith("y_embedder.")):
            name = name.replace(theirs, ours)
    return name


# -----------------------------------------------------------------------------------------------------------
# Scale-RAE: language model + latent queries + DiT


def build_text_to_image(
    weights, language_model=None, im_start=None, im_end=None, **options
) -> rae.TextToImage:
    """A whole Scale-RAE model; options: of its DiT. Keys that no released file has are errors, such as
    statistics of the latents (`diff_head.data_mean`), heads of other losses or a vision tower."""
    if language_model is None:
        raise ValueError("give language_model=, the config of the language model")
    released = ReleasedDiT(weights, "diff_head.model.")
    dit = released.sizes(options)
    latent_shape = dit.pop("latent_shape")
    # channels of the latents that are read; they differ where images are generated in a VAE's latents
    channels = size_of(weights, "model.mm_projector.0.weight", 1)
    reader_channels = None if channels == latent_shape[1] else channels
    config = {"model_type": "qwen2"} | config_of(language_model)
    model = rae.TextToImage(config, dit, latent_shape, reader_channels=reader_channels)

    weights = released.reshaped()
    tied = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in weights]
    if model.language_model.config.tie_word_embeddings and tied:  # files hold one of the two, or both
        embedding = weights[tied[0]]
        if not torch.equal(embedding, weights[tied[-1]]):
            raise ValueError(f"language_model= ties {tied[1]} to {tied[0]}, but they differ")
        weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}

    def released_key(name: str) -> str:
        if name.startswith("dit."):
            return released.rename(name.removeprefix("dit."))
        if name.startswith(("latent_queries", "mm_projector")):
            return f"model.{name}"
        return name.removeprefix("language_model.")

    load_official(model, weights, released_key, released.rope_tables(model.dit))
    rows = model.language_model.config.vocab_size
    for token in (im_start, im_end):
        if token is not None and not 0 <= token < rows:
            raise ValueError(f"im_start={im_start}, im_end={im_end}, but the state dict has {rows} tokens")
    model.im_start, model.im_end = im_start, im_end
    return model


# keys of their config.json that are Qwen2's
SCALE_RAE_LANGUAGE_MODEL = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings attention_dropout "
    "initializer_range"
).split()
SCALE_RAE_SWITCHES = {  # the only values that rae.py implements
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -1,
    "mm_use_im_start_end": True,
    "vision_loss_mode": "query",  # causal attention
    "dit_cls": "DiT",
    "use_sliding_window": False,
    "aux_regression": False,
    "diffusion_norm_stats_path": None,
}


def read_scale_rae(source: str, folder: str, config: dict, revision: str | None) -> rae.TextToImage:
    """A whole Scale-RAE model. source: of the weights; folder: of the config and the tokenizer."""
    check_config(folder, config, SCALE_RAE_SWITCHES)
    language_model = {name: config[name] for name in SCALE_RAE_LANGUAGE_MODEL if name in config}
    options = {}
    for option, key in (("width", "hidden_size"), ("depth", "depth"), ("heads", "heads")):
        if config.get(f"diffusion_model_{key}") is not None:
            options[option] = config[f"diffusion_model_{key}"]
    is_file = source.endswith(".zstd")
    weights = read_tensors(source, revision) if is_file else read_weights(source, revision)
    model = from_official(weights, language_model=language_model, **options)
    # with the config, AutoTokenizer does not read config.json, whose model type it does not know
    config_lm = model.language_model.config
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, config=config_lm, revision=revision, trust_remote_code=False
    )
    if len(tokenizer) > config_lm.vocab_size:
        raise ValueError(f"{folder}: {len(tokenizer)} tokens, but weights for only {config_lm.vocab_size}")
    model.set_tokenizer(tokenizer)

    # the config names only the encoder, from which the released autoencoder follows
    encoder = next(iter(config.get("mm_vision_tower_aux_list") or []), None)
    model.autoencoder_path = encoder
    for name, parts in RELEASED.items():
        if name.startswith("scale-rae-") and parts["encoder"] == encoder:
            model.autoencoder_path = name
    vae = config.get("generation_alignment_tower")
    if vae:  # images are generated in its latents and read through the vision encoder
        model.reader_path, model.autoencoder_path = model.autoencoder_path, re.sub(r"-res\d+$", "", vae)
    if config.get("diffusion_base_dim"):
        model.alpha = math.sqrt(math.prod(model.latent_shape) / config["diffusion_base_dim"])
    # `save_pretrained` writes these as config.json
    saved = {"autoencoder": model.autoencoder_path, "reader": model.reader_path, "alpha": model.alpha}
    model._hub_mixin_config.update(saved)
    return model


# -----------------------------------------------------------------------------------------------------------
# DINO, the backbone of the discriminator


def official_dino(weights: dict[str, Tensor], heads: int | None, changes: dict) -> tuple[rae.Encoder, int]:
    """A DINO of its own release, for the discriminator, and the side of its input in pixels. heads: of its
    attention, if they are not 64 channels wide; changes: of the config."""
    weights = unwrapped(weights)
    width, patch = (size_of(weights, "patch_embed.proj.weight", axis) for axis in (0, 3))
    side = patch * math.isqrt(size_of(weights, "pos_embed", 1) - 1)  # the first position is the class token's
    config = {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": count_blocks(weights, "blocks"),
        "intermediate_size": size_of(weights, "blocks.0.mlp.fc1.bias"),
        "num_attention_heads": heads or width // 64,
        "image_size": side,
        "patch_size": patch,
    }
    encoder = rae.Encoder(config, changes)
    names = {
        "blocks.": "layers.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
    }
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "attn.qkv" in name:  # one matrix for the three projections
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        elif not name.startswith("norm."):  # the final norm is not used
            renamed[name] = value
    load_official(encoder.model, renamed)
    return encoder, side


# -----------------------------------------------------------------------------------------------------------
# files: on disk or on the hub; safetensors, pickles, shards, zstd


def fetch(path: str, revision: str | None = None) -> str:
    """The local path of a file, which is on disk or on the hub as org/repository/path."""
    if os.path.isfile(path):
        return path
    org_repository_file = path.split("/", 2)
    if len(org_repository_file) < 3 or not all(org_repository_file) or os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"no file {path}")
    org, repository, file = org_repository_file
    try:
        return hf_hub_download(f"{org}/{repository}", file, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"no file {path}, neither here nor on the hub: {error}") from error


def exists(path: str, revision: str | None) -> bool:
    try:
        return bool(fetch(path, revision))
    except ValueError:
        return False


def read_config(source: str, revision: str | None = None) -> tuple[dict, str]:
    """The config.json of a model, and its folder: pipelines such as FLUX's keep their VAE in vae/."""
    folders = (source, f"{source}/vae")
    folder = next((folder for folder in folders if exists(f"{folder}/config.json", revision)), source)
    return json.loads(Path(fetch(f"{folder}/config.json", revision)).read_text()), folder


def read_tensors(path: str, revision: str | None) -> dict[str, Tensor]:
    """The `unwrapped` weights of a safetensors file or a torch file, which may be compressed (`.zstd`)."""
    path = fetch(path, revision)
    try:
        if path.endswith(".safetensors"):
            content = load_file(path)
        else:
            with decompress(path) if path.endswith(".zstd") else open(path, "rb") as file:
                # weights_only: unpickling must not run code from a downloaded file
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, torch, safetensors and zstandard raise their own
        raise ValueError(f"{path} is damaged, or holds more than tensors: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return unwrapped(content)


def decompress(path: str) -> BinaryIO:
    """Decompress to a temporary file: `torch.load` needs to seek, and the content may not fit in memory."""
    import zstandard

    file = tempfile.TemporaryFile()
    with open(path, "rb") as packed:
        reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        shutil.copyfileobj(reader, file, 2**20)
    file.seek(0)
    return file


# as `transformers` writes them, and Scale-RAE's trainer
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth.zstd")


def diffusers_files(folder: str) -> list[str]:
    """Where diffusers may have put the weights of a folder or hub id: plain files come before variants."""
    variants = ["fp32", "bf16", "fp16"]
    if os.path.isdir(folder):  # a variant may have any name
        pattern = r"diffusion_pytorch_model\.(?:\w+\.index\.)?(\w+)\.(?:safetensors|bin|json)"
        found = [re.fullmatch(pattern, name) for name in sorted(os.listdir(folder))]
        variants = [match[1] for match in found if match]
    stems = ["diffusion_pytorch_model", *(f"diffusion_pytorch_model.{variant}" for variant in variants)]
    return [f"{stem}.{end}" for stem in stems for end in ("safetensors", "bin")]


def find_weights(source: str, names: Sequence[str], revision: str | None = None) -> str:
    """The first of these files of a folder or hub id, or its index if it is in shards."""
    for name in names:
        stem, *variant, end = name.split(".")
        for file in (".".join([stem, end, "index", *variant, "json"]), name):
            if exists(f"{source}/{file}", revision):
                return file
    raise ValueError(f"{source} has no weights: none of {', '.join(names)} is there")


def read_weights(source: str, revision: str | None, names: Sequence[str] = TRANSFORMERS_FILES) -> dict:
    """The state dict of a folder or hub id, from one file or from shards."""
    file = find_weights(source, names, revision)
    if not file.endswith(".json"):
        return read_tensors(f"{source}/{file}", revision)
    index = json.loads(Path(fetch(f"{source}/{file}", revision)).read_text())
    weights = {}
    for shard in sorted(set(index.get("weight_map", {}).values())):
        weights |= read_tensors(f"{source}/{shard}", revision)
    return weights


def check_config(source: str, config: dict, known: dict) -> None:
    """Raise ValueError for a switch with another value than the one that rae.py implements."""
    # older files lack some switches, which then have this value
    for name, value in known.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{source}: config.json has {name} {config[name]}, only {value} is known")


# -----------------------------------------------------------------------------------------------------------
# diffusers' AutoencoderRAE

# the encoder configs that it builds, by encoder_type; image_size: of the position table
DIFFUSERS_ENCODERS = {
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
    "mae": {"model_type": "vit_mae", "image_size": 224},
}
DIFFUSERS_DECODER = {  # our argument: its argument
    "patch_size": "patch_size",
    "width": "decoder_hidden_size",
    "depth": "decoder_num_hidden_layers",
    "heads": "decoder_num_attention_heads",
    "mlp_width": "decoder_intermediate_size",
}


def diffusers_encoder(config: dict) -> dict:
    """Config of the encoder that AutoencoderRAE builds; what is not here has its class's default."""
    if config["encoder_type"] not in DIFFUSERS_ENCODERS:
        raise ValueError(f"encoder_type {config['encoder_type']}: known are {', '.join(DIFFUSERS_ENCODERS)}")
    return DIFFUSERS_ENCODERS[config["encoder_type"]] | {
        "hidden_size": config["encoder_hidden_size"],
        "patch_size": config["encoder_patch_size"],
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": config["encoder_hidden_size"] // 64,
    }


def diffusers_table(tokens: int, width: int) -> Tensor:
    """The decoder's position table in diffusers, (1, 1 + N, width). Positions of any grid span 16 x 16."""
    table = rae.sincos_table(tokens, width, spacing=16 / math.isqrt(tokens))
    return F.pad(table, (0, 0, 1, 0))[None]


def diffusers_key(name: str) -> str:
    """Our key -> diffusers' key; only the decoder's attention differs."""
    if not name.startswith("decoder."):
        return name
    name = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.to_\1", name)
    return name.replace("attention.output.dense", "attention.to_out.0")


def read_diffusers(source: str, config: dict, revision: str | None) -> rae.RAE:
    """An RAE from a folder of `diffusers.AutoencoderRAE`."""
    weights = read_weights(source, revision, diffusers_files(source))
    try:
        encoder, encoder_size = diffusers_encoder(config), config["encoder_input_size"]
        decoder = {ours: config[theirs] for ours, theirs in DIFFUSERS_DECODER.items()}
        image_mean, image_std = (weights.pop(f"encoder_{x}").flatten().tolist() for x in ("mean", "std"))
        latent_mean, latent_std = (weights.pop(f"_latents_{x}").double() for x in ("mean", "std"))
    except KeyError as error:
        raise ValueError(f"damaged folder {source}: {error} is missing") from error
    model = rae.RAE(encoder, decoder, encoder_size, image_mean, image_std)

    # statistics: a scalar or (1, C, h, w) -> (N, C)
    tokens, channels = model.latent_shape
    side = math.isqrt(tokens)
    latent_std += 1e-5  # diffusers divides by std + 1e-5
    for buffer, value in ((model.latent_mean, latent_mean), (model.latent_std, latent_std)):
        if value.numel() not in (1, tokens * channels):
            raise ValueError(f"{source}: statistics {tuple(value.shape)}, not {(channels, side, side)}")
        buffer.copy_(value.expand(1, channels, side, side).flatten(2)[0].mT)
    model.latent_std /= config.get("scaling_factor") or 1.0
    # diffusers recomputes the position table, so files leave it out; one that is there was trained
    weights.setdefault("decoder.decoder_pos_embed", diffusers_table(tokens, decoder["width"]))
    return load_rae(model, weights, "encoder.", diffusers_key)


def write_diffusers(model: rae.RAE, folder: Path) -> None:
    """Write a folder that AutoencoderRAE opens. Raises ValueError for a model that it cannot hold."""
    config = diffusers_config(model)
    weights = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    table, side = weights.pop("decoder.decoder_pos_embed"), model.decoder.side
    if not torch.allclose(table, diffusers_table(side**2, table.shape[-1]), atol=1e-5):
        raise ValueError(
            "diffusers computes the decoder's position table itself, the sin-cos one of 16 x 16 tokens; "
            f"this decoder, of {side} x {side} tokens, has another"
        )
    prefix = "encoder."
    if config["encoder_type"] == "siglip2":
        # diffusers wants the unused pooling head too, and the names of transformers 4
        prefix = "encoder.vision_model."
        with torch.device("meta"):  # only its shapes are needed
            built = transformers.AutoConfig.for_model(**diffusers_encoder(config))
            head = transformers.SiglipVisionModel(built).head.state_dict(prefix="encoder.model.head.")
        weights |= {name: torch.zeros(tensor.shape) for name, tensor in head.items()}
    latent_mean = weights.pop("latent_mean")
    latent_std = (weights.pop("latent_std").double() - 1e-5).float()  # diffusers adds it when it divides
    weights = {re.sub(r"^encoder\.model\.", prefix, diffusers_key(name)): w for name, w in weights.items()}
    # statistics are in the config too, from which diffusers learns that there are any
    for name, latents in (("mean", latent_mean), ("std", latent_std)):
        latents = latents.mT.unflatten(1, (side, side)).contiguous()  # (N, C) -> (C, h, w)
        pixels = getattr(model, f"image_{name}").cpu()
        weights |= {f"_latents_{name}": latents, f"encoder_{name}": pixels[None]}
        config |= {f"latents_{name}": latents.tolist(), f"encoder_norm_{name}": pixels.flatten().tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def diffusers_config(model: rae.RAE) -> dict:
    """The arguments of AutoencoderRAE. Raises ValueError for an encoder that it would build differently."""
    encoder, decoder = model.encoder.config, model.decoder
    families = {known["model_type"]: name for name, known in DIFFUSERS_ENCODERS.items()}
    if model.encoder.layers is not None or not torch.equal(model.output_mean, model.image_mean):
        raise ValueError("diffusers has no autoencoder of RAEv2: no mean of layers, no output in [0, 1]")
    if encoder.model_type not in families:
        raise ValueError(f"diffusers builds no encoder {encoder.model_type}, only {', '.join(families)}")
    sizes = decoder_sizes(decoder.state_dict(), {"heads": decoder.decoder_layers[0].heads})
    config = {theirs: sizes[ours] for ours, theirs in DIFFUSERS_DECODER.items()} | {
        "_class_name": "AutoencoderRAE",
        "encoder_type": families[encoder.model_type],
        "encoder_hidden_size": encoder.hidden_size,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": encoder.num_hidden_layers,
        "encoder_input_size": model.encoder_size,
    }
    # AutoencoderRAE has no arguments for these: a difference would silently give other latents
    built = transformers.AutoConfig.for_model(**diffusers_encoder(config))
    for name in ("image_size", "num_attention_heads", "intermediate_size", "mlp_ratio", "hidden_act",
                 "layer_norm_eps", "qkv_bias", "num_register_tokens", "use_swiglu_ffn"):  # fmt: skip
        ours, theirs = getattr(encoder, name, None), getattr(built, name, None)
        if ours != theirs:
            raise ValueError(f"diffusers builds encoders with {name} {theirs} only; this one has {ours}")
    return config


# -----------------------------------------------------------------------------------------------------------
# entry points: each returns None for a folder of `save_pretrained`, which rae.py reads itself


def open_rae(source: str, revision: str | None, **options) -> rae.RAE | None:
    """A released RAE or a diffusers folder. options: arguments of `RAE.from_pretrained`, may be None."""
    options = {name: value for name, value in options.items() if value is not None}
    if source in RELEASED:
        options = {**RELEASED[source], **options}
        source = options.pop("decoder")
    config, folder = ({}, "") if source.endswith(".pt") else read_config(source, revision)
    class_name = config.get("_class_name")  # of diffusers
    if not config or (class_name is None and "decoder_hidden_size" in config):
        return read_decoder(source, config, revision, options)
    if options:
        raise ValueError(f"{source} is a whole autoencoder: it has its own {', '.join(options)}")
    if class_name == "AutoencoderRAE":
        return read_diffusers(folder, config, revision)
    if class_name == "AutoencoderKL":
        raise ValueError(f"{source} is no RAE but diffusers' AutoencoderKL: use open_autoencoder")
    if class_name:
        raise ValueError(f"{source} is diffusers' {class_name}: give an AutoencoderKL or an AutoencoderRAE")
    return None


def read_decoder(source: str, config: dict, revision: str | None, options: dict) -> rae.RAE:
    """An RAE from a released decoder: RAE's file (config is then {}) or Scale-RAE's repository."""
    # the config is a ViT-MAE's with placeholders for sizes: only what tensors cannot tell is read
    check_config(source, config, {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True})
    options = {"encoder": None, **options}
    if "decoder_num_attention_heads" in config:
        options.setdefault("heads", config["decoder_num_attention_heads"])
    if "stats" in options:
        options["stats"] = read_tensors(options["stats"], revision)
    weights = read_tensors(f"{source}/model.pt" if config else source, revision)
    model = build_rae(weights, **options)
    load_official(model.decoder, weights)
    return model.eval()


def open_class_to_image(source: str, revision: str | None) -> rae.ClassToImage | None:
    """A released class-conditional DiT, by name or file."""
    source, autoencoder = RELEASED_DITS.get(source, (source, None))
    if not source.endswith(".pt"):
        return None
    dit = from_official(read_tensors(source, revision))
    if not isinstance(dit, (rae.DiT, rae.InContextDiT)):
        raise ValueError(f"{source} holds a {type(dit).__name__}, not a DiT")
    if hasattr(dit.y_embedder, "proj"):
        raise ValueError(
            f"{source} is conditioned on captions: make a rae.CaptionToImage and set its `dit` to what "
            "rae.from_official gives"
        )
    sizes = dict(dit._hub_mixin_config)
    latent_shape = sizes.pop("latent_shape")
    with torch.device("meta"):  # no memory: the DiT exists already
        prediction = "x" if isinstance(dit, rae.InContextDiT) else "velocity"
        model = rae.ClassToImage(sizes, latent_shape, autoencoder, prediction=prediction)
    model.dit = dit
    return model.eval()


def open_text_to_image(source: str, revision: str | None) -> rae.TextToImage | None:
    """A released Scale-RAE model, by name, hub id, folder or `.zstd` file."""
    source = RELEASED_TEXT_TO_IMAGE.get(source, source)
    folder = (os.path.dirname(source) or ".") if source.endswith(".zstd") else source
    config, _ = read_config(folder, revision)
    if "diffusion_model_hidden_size" not in config:
        return None
    return read_scale_rae(source, folder, config, revision)
