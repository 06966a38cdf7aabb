"""Released weights: the authors' files and diffusers folders <-> the modules of rae.py.

`rae.py` imports this file only inside of `from_pretrained` and `from_official`. A released state dict is recognised
by its keys; a key map is a prefix, a rename and a reshape. Loading is strict.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import transformers
from einops import rearrange
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rae

# -----------------------------------------------------------------------------------------------------------
# names


def collection(decoder: str, stats: str, encoder: str) -> dict[str, str]:
    parts = {"decoder": f"decoders/{decoder}/model.pt", "stats": f"stats/{stats}/stat.pt"}
    parts = {name: f"nyu-visionx/RAE-collections/{path}" for name, path in parts.items()}
    return parts | {"encoder": rae.ENCODERS[encoder]}


RELEASED = {  # arguments of `RAE.from_pretrained`; the number of tokens tells the size of the encoder's input
    "rae-dinov2-b": collection("dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k", "dinov2-b"),
    "rae-dinov2-b-512": collection(
        "dinov2/wReg_base/ViTXL_n08_i512", "dinov2/wReg_base/imagenet1k_512", "dinov2-b"
    ),
    "rae-mae-b": collection("mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", "mae-b"),
    "rae-siglip2-b": collection(
        "siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k", "siglip2-b"
    ),
    "scale-rae-siglip2-so400m": {
        "decoder": "nyu-visionx/siglip2_decoder",
        "encoder": rae.ENCODERS["siglip2-so400m"],
    },
    "scale-rae-webssl-l": {"decoder": "nyu-visionx/webssl300m_decoder", "encoder": rae.ENCODERS["webssl-l"]},
}


def released_dit(path: str, autoencoder: str) -> tuple[str, str]:
    folder = "nyu-visionx/RAE-collections/DiTs/Dinov2/wReg_base"
    return f"{folder}/{path}/stage2_model.pt", autoencoder


RELEASED_DITS = {  # file, autoencoder; S are the guides
    "rae-dit-dh-xl-256": released_dit("ImageNet256/DiTDH-XL", "rae-dinov2-b"),
    "rae-dit-dh-s-256": released_dit("ImageNet256/DiTDH-S_ep14", "rae-dinov2-b"),
    "rae-dit-dh-xl-512": released_dit("ImageNet512/DiTDH-XL_ep400", "rae-dinov2-b-512"),
    "rae-dit-dh-s-512": released_dit("ImageNet512/DiTDH-S_ep20", "rae-dinov2-b-512"),
}


RELEASED_TEXT_TO_IMAGE = {  # hub ids; 64ep: finetuned for 64 epochs
    "scale-rae-1.5b-2.4b": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B",
    "scale-rae-1.5b-2.4b-64ep": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-64ep",
    "scale-rae-1.5b-2.4b-webssl": "nyu-visionx/Scale-RAE-Qwen1.5B_DiT2.4B-WebSSL",
    "scale-rae-7b-9.8b": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B",
    "scale-rae-7b-9.8b-64ep": "nyu-visionx/Scale-RAE-Qwen7B_DiT9.8B-64ep",
}


def from_official(state_dict: dict[str, Tensor], **given) -> nn.Module:
    """The module of a state dict that the authors released, in eval mode, recognised by its keys: a whole
    RAE or its decoder, LightningDiT or DiT-DH, Scale-RAE's diffusion head in both forms (without
    `diff_head.model.`), or a whole Scale-RAE model. What trainers wrap around names is removed.

    Sizes are read from the tensors; `given` adds what they cannot tell and is checked where they can: heads=,
    needed for a decoder that is not of a size in DECODERS, and where a DiT's RoPE tables were left out. With
    the wide head, heads=, width= and depth= are pairs (backbone, head), and one number of heads stands for
    both. A whole RAE needs encoder=, a config or model of `transformers`, image_mean= and image_std=, and
    takes encoder_size= and stats=, {"mean", "var"} of its latents, each (C, h, w) or None. A whole Scale-RAE
    needs language_model=, a config or model of `transformers`, and takes im_start= and im_end=, the ids of
    the tokens around an image; tokenizer and autoencoder are set later, neither is in the dict. Raises
    ValueError, with the first keys that do not fit, for a dict that is unknown or damaged, and for a keyword
    that contradicts it.
    """
    state_dict = {unwrapped(name): tensor for name, tensor in state_dict.items()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    parts = {name.split(".")[0] for name in state_dict}
    if "diff_head" in parts:
        return official_text_to_image(state_dict, given)
    if {"encoder", "decoder"} <= parts:
        return official_rae(state_dict, given)
    if "decoder_layers" in parts:
        return official_decoder(state_dict, given)
    if parts & {"blocks", "dit_blocks"}:
        return official_dit(state_dict, given, scale="dit_blocks" in parts, wide="s_embedder" in parts)
    raise ValueError(f"unknown state dict, no decoder_layers, blocks or dit_blocks: {list(state_dict)[:5]}")


def unwrapped(name: str) -> str:
    wrappers = ("_orig_module", "module", "_fsdp_wrapped_module", "_fpw_module")  # of torch_xla, DDP, FSDP
    return ".".join(part for part in name.split(".") if part not in wrappers)


def config_of(model) -> dict | None:
    """The config of a model of `transformers`; a config, or a dict of it, may be given itself."""
    config = getattr(model, "config", model)
    if isinstance(config, transformers.PretrainedConfig):
        config = config.to_diff_dict() | {"model_type": config.model_type}
    return config


def official_decoder(weights: dict[str, Tensor], given: dict) -> rae.Decoder:
    return load_official(rae.Decoder(**decoder_sizes(weights, given)), weights)


def decoder_sizes(weights: dict[str, Tensor], given: dict, prefix: str = "") -> dict:
    def size(name: str, axis: int = 0) -> int:
        return official_size(weights, prefix + name, axis)

    sizes = {  # a number that should be a square and is not gives a shape that does not fit
        "latent_shape": (math.isqrt(size("decoder_pos_embed", 1) - 1) ** 2, size("decoder_embed.weight", 1)),
        "patch_size": math.isqrt(size("decoder_pred.bias") // 3),
        "width": size("decoder_embed.weight"),
        "depth": official_depth(weights, f"{prefix}decoder_layers"),
        "mlp_width": size("decoder_layers.0.intermediate.dense.bias"),
    }
    same = ("width", "depth", "mlp_width")
    known = (
        size["heads"] for size in rae.DECODERS.values() if all(size[name] == sizes[name] for name in same)
    )
    sizes["heads"] = given.get("heads", next(known, None))
    check_given(given, sizes, [sizes["width"]], [sizes["heads"]])
    return sizes


def official_rae(weights: dict[str, Tensor], given: dict) -> rae.RAE:
    model = rae_of_decoder(weights, given | {"encoder": config_of(given.get("encoder"))}, "decoder.")
    dino = model.encoder.config.model_type.startswith("dinov2")
    return load_rae(model, weights, "encoder.encoder." if dino else "encoder.model.")


def load_rae(
    model: rae.RAE, weights: dict[str, Tensor], prefix: str, rename: Callable[[str], str] = str
) -> rae.RAE:
    """Loads strictly; statistics that are not in the file stay as they are. prefix: of the encoder's keys;
    rename: our other keys -> theirs."""

    def theirs(name: str) -> str:
        return old_encoder_name(re.sub(r"^encoder\.model\.", prefix, rename(name)), prefix)

    weights = {old_encoder_name(name, prefix): tensor for name, tensor in weights.items()}
    if model.encoder.config.model_type == "siglip_vision_model":  # its pooling head is not used
        weights = {name: w for name, w in weights.items() if not name.startswith(f"{prefix}head.")}
    weights = {name: getattr(model, name) for name in ("latent_mean", "latent_std")} | weights
    return load_official(model, weights, theirs)


def rae_of_decoder(weights: dict[str, Tensor], given: dict, prefix: str = "") -> rae.RAE:
    """An RAE of the sizes of this decoder, without its weights but with the latent statistics."""
    names = ("encoder", "encoder_size", "image_mean", "image_std", "stats")
    encoder, encoder_size, image_mean, image_std, stats = (given.get(name) for name in names)
    given = {name: value for name, value in given.items() if name not in names}
    if encoder is None:
        raise ValueError("give encoder=, whose latents this decoder takes: a hub id or folder, or a config")
    sizes = decoder_sizes(weights, given, prefix)
    tokens, channels = sizes.pop("latent_shape")
    if encoder_size is None:
        read = transformers.AutoConfig
        config = read.for_model(**encoder) if isinstance(encoder, dict) else read.from_pretrained(encoder)
        encoder_size = math.isqrt(tokens) * getattr(config, "vision_config", config).patch_size
    model = rae.RAE(
        encoder, sizes, encoder_size, image_mean and list(image_mean), image_std and list(image_std)
    )
    if model.latent_shape != (tokens, channels):
        raise ValueError(
            f"the decoder takes latents {(tokens, channels)}, this encoder gives {model.latent_shape} at "
            f"encoder_size {encoder_size}: give the encoder that it was trained with"
        )
    if stats:
        set_statistics(model, stats)
    return model


def set_statistics(model: rae.RAE, stats: dict[str, Tensor | None]) -> None:
    """The authors' statistics, {"mean", "var"}, each (C, h, w) or None; the std is sqrt(var + 1e-5)."""
    tokens, channels = model.latent_shape
    shape = (channels, math.isqrt(tokens), math.isqrt(tokens))
    for name, value in stats.items():
        found = getattr(value, "shape", type(value).__name__)
        if name not in ("mean", "var") or value is not None and found != shape:
            raise ValueError(f"statistics: {name} is {found}; give mean and var, each {shape} or None")
    if stats.get("mean") is not None:
        model.latent_mean.copy_(stats["mean"].flatten(1).mT)
    if stats.get("var") is not None:
        model.latent_std.copy_((stats["var"].flatten(1).mT + 1e-5).sqrt())


def old_encoder_name(name: str, prefix: str) -> str:
    """A key of an encoder as transformers 4.56 had it, with which the released files were made. 5.23 calls
    the linear layers of DINOv2 and MAE otherwise, and has no `vision_model.` in SigLIP."""
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


class DiTNames(NamedTuple):
    """The authors' names in a DiT."""

    embedders: list[str]  # of the latents, for the backbone and for the wide head
    ropes: list[str]  # likewise
    rename: Callable[[str], str]  # our key -> theirs


def dit_names(scale: bool, wide: bool, prefix: str = "") -> DiTNames:
    """scale: Scale-RAE's, not RAE's; wide: with the wide head."""
    embedders, ropes = ["x_embedder.proj"], ["feat_rope"]
    if wide:
        embedders, ropes = ["s_embedder.proj", "x_embedder.proj"], ["enc_feat_rope", "dec_feat_rope"]
    if wide and scale:  # here x_embedder feeds the backbone and s_embedder the head
        embedders, ropes = embedders[::-1], ["enc_rope", "dec_rope"]
    blocks = "dit_blocks" if scale else "blocks"
    names = {"s_embedder": embedders[0], "x_embedder": embedders[-1], "blocks": blocks}

    def rename(name: str) -> str:
        return prefix + re.sub(r"^\w+", lambda first: names.get(first[0], first[0]), name)

    return DiTNames([prefix + name for name in embedders], [prefix + name for name in ropes], rename)


def dit_sizes(weights: dict[str, Tensor], given: dict, scale: bool, wide: bool, names: DiTNames) -> dict:
    """The arguments of `DiT`. With the wide head, the sizes given are pairs (backbone, head)."""
    size, (embedders, ropes, rename) = partial(official_size, weights), names
    tuples = {name: (given[name],) * len(ropes) for name in given if isinstance(given[name], int)}
    given = given | {name: tuples[name] for name in ("width", "depth", "heads") if name in tuples}

    width, blocks = tuple(size(f"{name}.weight") for name in embedders), rename("blocks")
    widths = [size(f"{blocks}.{i}.norm1.weight") for i in range(official_depth(weights, blocks))]
    in_head = widths.count(width[-1])
    depth = (len(widths) - in_head, in_head) if wide else (len(widths),)
    if wide and width[0] == width[1]:  # no telling where the head begins: it has two blocks in both papers
        depth = given.get("depth", (len(widths) - 2, 2))
    heads = given.get("heads", ())
    if f"{ropes[0]}.freqs_cos" in weights:
        heads = tuple(w // size(f"{rope}.freqs_cos", 1) for w, rope in zip(width, ropes, strict=True))
    channels = size(f"{embedders[0]}.weight", 1) * size(f"{embedders[0]}.weight", 3) ** 2
    sizes = {
        "latent_shape": (math.isqrt(size(rename("pos_embed"), 1)) ** 2, channels),
        "num_classes": None if scale else size(rename("y_embedder.embedding_table.weight")) - 1,
        "condition_width": size(rename("y_embedder.dropout_embedding")) if scale else None,
    }
    check_given(given, sizes | {"width": width, "depth": depth, "heads": heads}, width, heads)
    return sizes | {
        "width": width[0],
        "depth": depth[0],
        "heads": heads[0],
        "head": (width[1], depth[1], heads[1]) if wide else None,
        "silu_condition": scale or wide,
        "readd_time": wide and not scale,
        "xavier": scale or not wide,
        "qk_norm": any(".q_norm." in name for name in weights),
        "swiglu": not any(".mlp.fc1." in name for name in weights),
    }


def dit_weights(weights: dict[str, Tensor], scale: bool, names: DiTNames) -> dict[str, Tensor]:
    """The authors' weights in our shapes."""
    weights = {name: rae.pad_swiglu(name, tensor) for name, tensor in weights.items()}
    patch = weights[f"{names.embedders[0]}.weight"].shape[3]
    if scale:  # its files leave the frequencies out
        weights.setdefault(names.rename("t_embedder.W"), rae.TimeEmbedding(1).W)
    for name in names.embedders:
        weights[f"{name}.weight"] = weights[f"{name}.weight"].flatten(1)
    channels = weights[f"{names.embedders[0]}.weight"].shape[1]
    for name in map(names.rename, ("final_layer.linear.weight", "final_layer.linear.bias")):
        if patch > 1 and name in weights and len(weights[name]) == channels:  # patches: ours are (c p q)
            weights[name] = rearrange(weights[name], "(p q c) ... -> (c p q) ...", p=patch, q=patch)
    return weights


def dit_tables(dit: rae.DiT, names: DiTNames) -> dict[str, Tensor]:
    """The RoPE tables, which are in the authors' files and not in ours."""
    tables = zip(names.ropes, [dit.rope, dit.head_rope] if dit.head else [dit.rope], strict=True)
    return {
        f"{name}.freqs_{part}": table[i] for name, table in tables for i, part in enumerate(("cos", "sin"))
    }


def official_dit(weights: dict[str, Tensor], given: dict, scale: bool, wide: bool) -> rae.DiT:
    names = dit_names(scale, wide)
    dit = rae.DiT(**dit_sizes(weights, given, scale, wide, names))
    return load_official(dit, dit_weights(weights, scale, names), names.rename, dit_tables(dit, names))


HEAD_PREFIX = "diff_head.model."  # of the DiT in a whole Scale-RAE model


def scale_rae_name(dit: DiTNames, name: str) -> str:
    """Our key of a TextToImage -> theirs."""
    if name.startswith("dit."):
        return dit.rename(name.removeprefix("dit."))
    return re.sub("^(?=latent_queries|mm_projector)", "model.", name.removeprefix("language_model."))


def official_text_to_image(weights: dict[str, Tensor], given: dict) -> rae.TextToImage:
    """What the released files have not is unknown here: statistics of the latents (`diff_head.data_mean`),
    heads of other losses, a vision tower."""
    language_model = config_of(given.pop("language_model", None))
    tokens = {name: given.pop(name, None) for name in ("im_start", "im_end")}
    if language_model is None:
        raise ValueError("give language_model=, the config of the language model")
    wide = any(name.startswith(f"{HEAD_PREFIX}s_embedder.") for name in weights)
    names = dit_names(True, wide, HEAD_PREFIX)
    sizes = dit_sizes(weights, given, True, wide, names)
    shape = sizes.pop("latent_shape")
    read = official_size(weights, "model.mm_projector.0.weight", 1)
    read = None if read == shape[1] else read  # latents of a VAE, and a vision encoder to read with
    model = rae.TextToImage({"model_type": "qwen2"} | language_model, sizes, shape, reader_channels=read)
    weights = dit_weights(weights, True, names)
    if model.language_model.config.tie_word_embeddings:  # files have one of them, or both
        tied = ("model.embed_tokens.weight", "lm_head.weight")
        for name, other in (tied, tied[::-1]):
            if name in weights and not torch.equal(weights.setdefault(other, weights[name]), weights[name]):
                raise ValueError(f"language_model= ties {other} to {name}, but they differ")
    load_official(model, weights, partial(scale_rae_name, names), dit_tables(model.dit, names))
    rows = model.language_model.config.vocab_size
    for name, token in tokens.items():
        if token is not None and not 0 <= token < rows:
            raise ValueError(f"{name}={token}, but the state dict has {rows} tokens")
        setattr(model, name, token)
    return model


def official_size(weights: dict[str, Tensor], name: str, axis: int = 0) -> int:
    if name not in weights or weights[name].ndim <= axis:
        raise ValueError(f"damaged state dict: {name} is missing or has less than {axis + 1} axes")
    return weights[name].shape[axis]


def official_depth(weights: dict[str, Tensor], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def check_given(given: dict, sizes: dict, width: list[int], heads: list[int | None]) -> None:
    for name, value in given.items():
        if name not in sizes or sizes[name] != value:
            raise ValueError(f"{name}={value}, but the state dict says {sizes.get(name, 'nothing of it')}")
    if len(heads) != len(width) or not all(h and w % h == 0 for w, h in zip(width, heads, strict=True)):
        raise ValueError(f"give heads=, the attention heads, divisors of the width {width}; not {heads}")


def load_official(
    model: nn.Module,
    weights: dict[str, Tensor],
    rename: Callable[[str], str] = str,
    tables: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Loads strictly. rename: our name -> theirs; tables: what the RoPE tables must be."""
    own, tables = model.state_dict(), tables or {}
    theirs = {name: rename(name) for name in own}
    expected = {theirs[name]: tensor for name, tensor in own.items()}
    if weights.keys() & tables.keys():
        expected |= tables
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in expected]
    both = [(name, weights[name], tensor) for name, tensor in expected.items() if name in weights]
    wrong += [f"{n} is {tuple(w.shape)}, not {tuple(e.shape)}" for n, w, e in both if w.shape != e.shape]
    for name in [] if wrong else tables.keys() & weights.keys():
        if not torch.allclose(weights[name].float(), tables[name], atol=4e-3):  # bf16 rounds them
            wrong.append(f"{name} is another table")
    if wrong:
        raise ValueError(f"{type(model).__name__}: {len(wrong)} keys do not fit: {'; '.join(wrong[:5])}")
    model.load_state_dict({name: weights[theirs[name]] for name in own})
    return model.eval()


# -- files: the authors' and diffusers'


def fetch(path: str, revision: str | None = None) -> str:
    """The local path of a file that is given by its path, or on the hub by org/repository/path."""
    if os.path.isfile(path):
        return path
    org, repository, file = [*path.split("/", 2), "", ""][:3]
    if not (org and file) or os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"no file {path}")
    try:
        return hf_hub_download(f"{org}/{repository}", file, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"no file {path}, neither here nor on the hub: {error}") from error


def read_config(source: str, revision: str | None = None) -> tuple[dict, str]:
    """config.json of a model, and the folder that has it: pipelines such as FLUX's keep their VAE in vae."""
    folder = ""
    try:
        path = fetch(f"{source}/config.json", revision)
    except ValueError as error:
        folder = "vae"
        try:
            path = fetch(f"{source}/vae/config.json", revision)
        except ValueError:
            raise error from None
    return json.loads(Path(path).read_text()), folder


def exists(path: str, revision: str | None) -> bool:
    try:
        return bool(fetch(path, revision))
    except ValueError:
        return False


def read_tensors(path: str, revision: str | None) -> dict[str, Tensor]:
    """A state dict from a file of safetensors, or of torch, which may be compressed (`.zstd`)."""
    path = fetch(path, revision)
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        with unpacked(path) if path.endswith(".zstd") else open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, zipfile, torch, safetensors or zstandard
        raise ValueError(f"{path} is damaged, or holds more than tensors: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def unpacked(path: str) -> BinaryIO:
    """A temporary file, since torch jumps about in what it reads."""
    import zstandard

    file = tempfile.TemporaryFile()
    with open(path, "rb") as packed:
        reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
        shutil.copyfileobj(reader, file, 2**20)
    file.seek(0)
    return file


def read_weights(source: str, revision: str | None) -> dict[str, Tensor]:
    """The state dict of a folder or hub id: as `transformers` writes it, in one file or in shards, or as
    Scale-RAE's trainer does, a `.zstd` file, which may be given itself."""
    names = ("model.safetensors", "pytorch_model.bin", "model.pth.zstd")
    for file in [source] if source.endswith(".zstd") else [f"{source}/{name}" for name in names]:
        if exists(f"{file}.index.json", revision):
            index = json.loads(Path(fetch(f"{file}.index.json", revision)).read_text())
            shards = [f"{source}/{shard}" for shard in sorted(set(index.get("weight_map", {}).values()))]
            return {name: w for shard in shards for name, w in read_tensors(shard, revision).items()}
        if exists(file, revision):
            content = read_tensors(file, revision)
            return content["model"] if isinstance(content.get("model"), dict) else content
    raise ValueError(f"{source} has no weights: there is none of {', '.join(names)}")


def check_config(source: str, config: dict, known: dict) -> None:
    """Raises ValueError for another value of these switches than the one that this code has."""
    for name, value in known.items():
        if config.get(name) not in (value, None):
            raise ValueError(f"{source}: config.json has {name} {config[name]}, only {value} is known")


def read_decoder(source: str, config: dict, revision: str | None, given: dict) -> rae.RAE:
    """An RAE of a decoder's file (its config is then {}) or repository. Of the config, a ViT-MAE's whose
    sizes may be placeholders, only what the tensors cannot tell is read."""
    check_config(source, config, {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True})
    if "decoder_num_attention_heads" in config:
        given = {"heads": config["decoder_num_attention_heads"], **given}
    if "stats" in given:
        given = given | {"stats": read_tensors(given["stats"], revision)}
    weights = read_tensors(f"{source}/model.pt" if config else source, revision)
    model = rae_of_decoder(weights, given)
    load_official(model.decoder, weights)
    return model.eval()


SCALE_RAE_LANGUAGE_MODEL = (  # what is Qwen2's in their config.json
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("tie_word_embeddings", "attention_dropout", "initializer_range"),
)
SCALE_RAE_DIT = {  # ours: theirs; lists of two with the wide head
    "width": "diffusion_model_hidden_size",
    "depth": "diffusion_model_depth",
    "heads": "diffusion_model_heads",
}
SCALE_RAE_SWITCHES = {  # what this code has of them
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -1,
    "mm_use_im_start_end": True,
    "vision_loss_mode": "query",  # causal attention
    "dit_cls": "DiT",
    "use_sliding_window": False,
    "aux_regression": False,
    "diffusion_norm_stats_path": None,
}
SCALE_RAE_AUTOENCODERS = {  # by the encoder, which is all that their config.json names
    parts["encoder"]: name for name, parts in RELEASED.items() if name.startswith("scale-rae-")
}


def read_scale_rae(source: str, folder: str, config: dict, revision: str | None) -> rae.TextToImage:
    """source: of the weights; folder: of the config and the tokenizer."""
    check_config(folder, config, SCALE_RAE_SWITCHES)
    language_model = {name: config[name] for name in SCALE_RAE_LANGUAGE_MODEL if name in config}
    given = {ours: config[theirs] for ours, theirs in SCALE_RAE_DIT.items() if theirs in config}
    model = from_official(read_weights(source, revision), language_model=language_model, **given)
    language_model = model.language_model.config  # else it looks for one in config.json
    model.set_tokenizer(
        transformers.AutoTokenizer.from_pretrained(folder, config=language_model, revision=revision)
    )
    if len(model.tokenizer) > language_model.vocab_size:
        raise ValueError(
            f"{folder}: {len(model.tokenizer)} tokens, but weights of only {language_model.vocab_size}"
        )
    encoder = next(iter(config.get("mm_vision_tower_aux_list") or []), None)
    model.autoencoder_path = SCALE_RAE_AUTOENCODERS.get(encoder, encoder)
    if vae := config.get("generation_alignment_tower"):  # it is drawn with, and the vision encoder read with
        model.reader_path, model.autoencoder_path = model.autoencoder_path, re.sub(r"-res\d+$", "", vae)
        model._hub_mixin_config["reader"] = model.reader_path
    if config.get("diffusion_base_dim"):
        model.alpha = math.sqrt(math.prod(model.latent_shape) / config["diffusion_base_dim"])
    model._hub_mixin_config.update(autoencoder=model.autoencoder_path, alpha=model.alpha)
    return model


DIFFUSERS_ENCODERS = {  # what AutoencoderRAE builds, by encoder_type; image_size: of the position table
    "dinov2": {"model_type": "dinov2_with_registers", "image_size": 518},
    "siglip2": {"model_type": "siglip_vision_model", "image_size": 256},
    "mae": {"model_type": "vit_mae", "image_size": 224},
}
DIFFUSERS_SIZES = {  # the decoder's, ours: theirs
    "patch_size": "patch_size",
    "width": "decoder_hidden_size",
    "depth": "decoder_num_hidden_layers",
    "heads": "decoder_num_attention_heads",
    "mlp_width": "decoder_intermediate_size",
}


def diffusers_encoder(config: dict) -> dict:
    """The config of the encoder that AutoencoderRAE builds: what is not here has its class's default."""
    if config["encoder_type"] not in DIFFUSERS_ENCODERS:
        raise ValueError(f"encoder_type {config['encoder_type']}: known are {', '.join(DIFFUSERS_ENCODERS)}")
    return DIFFUSERS_ENCODERS[config["encoder_type"]] | {
        "hidden_size": config["encoder_hidden_size"],
        "patch_size": config["encoder_patch_size"],
        "num_hidden_layers": config["encoder_num_hidden_layers"],
        "num_attention_heads": config["encoder_hidden_size"] // 64,
    }


def diffusers_table(tokens: int, width: int) -> Tensor:
    """The decoder's positions in diffusers, (1, 1 + N, width): whatever the grid, they span 16 x 16."""
    table = rae.sincos_table(tokens, width, spacing=16 / math.isqrt(tokens))
    return torch.nn.functional.pad(table, (0, 0, 1, 0))[None]


def diffusers_name(name: str) -> str:
    """Our key of the decoder -> theirs."""
    if not name.startswith("decoder."):
        return name
    name = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.to_\1", name)
    return name.replace("attention.output.dense", "attention.to_out.0")


def read_diffusers(source: str, config: dict, revision: str | None) -> rae.RAE:
    """A folder of `diffusers.AutoencoderRAE`, whose latents are divided by std + 1e-5. It makes the
    decoder's position table anew; one that is in the file all the same is the trained one, and is used."""
    weights = load_file(fetch(f"{source}/diffusion_pytorch_model.safetensors", revision))
    buffers = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
    try:
        encoder, size = diffusers_encoder(config), config["encoder_input_size"]
        decoder = {ours: config[theirs] for ours, theirs in DIFFUSERS_SIZES.items()}
        pixel_mean, pixel_std, mean, std = (weights.pop(name) for name in buffers)
    except KeyError as error:
        raise ValueError(f"damaged folder {source}: {error} is missing") from error
    model = rae.RAE(encoder, decoder, size, pixel_mean.flatten().tolist(), pixel_std.flatten().tolist())
    (tokens, channels), side = model.latent_shape, math.isqrt(model.latent_shape[0])
    for buffer, stat in ((model.latent_mean, mean.double()), (model.latent_std, std.double() + 1e-5)):
        if stat.numel() not in (1, tokens * channels):
            raise ValueError(f"{source}: statistics {tuple(stat.shape)}, not {(channels, side, side)}")
        buffer.copy_(stat.expand(1, channels, side, side).flatten(2)[0].mT)
    model.latent_std /= config.get("scaling_factor", 1.0)
    weights.setdefault("decoder.decoder_pos_embed", diffusers_table(tokens, decoder["width"]))
    return load_rae(model, weights, "encoder.", diffusers_name)


def write_diffusers(model: rae.RAE, folder: Path) -> None:
    side = model.decoder.side
    config = diffusers_config(model)
    weights = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    mean, std, table = (weights.pop(k) for k in ("latent_mean", "latent_std", "decoder.decoder_pos_embed"))
    if not torch.allclose(table, diffusers_table(side**2, table.shape[-1]), atol=1e-5):
        raise ValueError(
            "diffusers makes the decoder's position table itself, the sin-cos one of 16 x 16 tokens; this "
            f"decoder, of {side} x {side} tokens, has another"
        )
    prefix = "encoder."
    if config["encoder_type"] == "siglip2":
        prefix = "encoder.vision_model."
        with torch.device("meta"):  # the pooling head, which is there and not used
            head = transformers.SiglipVisionModel(
                transformers.AutoConfig.for_model(**diffusers_encoder(config))
            ).head.state_dict(prefix="encoder.model.head.")
        weights |= {name: torch.zeros(tensor.shape) for name, tensor in head.items()}
    weights = {re.sub(r"^encoder\.model\.", prefix, diffusers_name(k)): w for k, w in weights.items()}
    for name, statistic in (("mean", mean), ("std", (std.double() - 1e-5).float())):
        statistic = statistic.mT.unflatten(1, (side, side)).contiguous()
        pixels = getattr(model, f"image_{name}").cpu()
        weights |= {f"_latents_{name}": statistic, f"encoder_{name}": pixels[None]}
        config |= {f"latents_{name}": statistic.tolist(), f"encoder_norm_{name}": pixels.flatten().tolist()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def diffusers_config(model: rae.RAE) -> dict:
    """The arguments of AutoencoderRAE for this model's sizes; ValueError for an encoder that it cannot
    build."""
    encoder, decoder = model.encoder.config, model.decoder
    families = {known["model_type"]: name for name, known in DIFFUSERS_ENCODERS.items()}
    if encoder.model_type not in families:
        raise ValueError(f"diffusers builds no encoder {encoder.model_type}, only {', '.join(families)}")
    sizes = decoder_sizes(decoder.state_dict(), {"heads": decoder.decoder_layers[0].heads})
    config = {theirs: sizes[ours] for ours, theirs in DIFFUSERS_SIZES.items()} | {
        "_class_name": "AutoencoderRAE",
        "encoder_type": families[encoder.model_type],
        "encoder_hidden_size": encoder.hidden_size,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": encoder.num_hidden_layers,
        "encoder_input_size": model.encoder_size,
    }
    built = transformers.AutoConfig.for_model(**diffusers_encoder(config))
    for name in (
        *("image_size", "num_attention_heads", "intermediate_size", "mlp_ratio", "hidden_act"),
        *("layer_norm_eps", "qkv_bias", "num_register_tokens", "use_swiglu_ffn"),
    ):
        given, known = getattr(encoder, name, None), getattr(built, name, None)
        if given != known:
            raise ValueError(f"diffusers builds encoders with {name} {known} only; this one has {given}")
    return config


# -----------------------------------------------------------------------------------------------------------
# what `from_pretrained` of rae.py calls


def open_rae(source: str, revision: str | None, **given) -> rae.RAE | None:
    """An RAE that was released, or a folder of diffusers; None for a folder of `save_pretrained`."""
    given = {name: value for name, value in given.items() if value is not None}
    if source in RELEASED:
        source, given = RELEASED[source]["decoder"], RELEASED[source] | given
        del given["decoder"]
    config = {} if source.endswith(".pt") else read_config(source, revision)[0]
    of_diffusers = config.get("_class_name")
    if not of_diffusers and (source.endswith(".pt") or "decoder_hidden_size" in config):
        return read_decoder(source, config, revision, given)
    if given:
        raise ValueError(f"{source} is a whole autoencoder: it has its own {', '.join(given)}")
    if of_diffusers == "AutoencoderRAE":
        return read_diffusers(source, config, revision)
    if of_diffusers:
        raise ValueError(f"{source} is no RAE but diffusers' {of_diffusers}: see open_autoencoder")
    return None


def open_class_to_image(source: str, revision: str | None) -> rae.ClassToImage | None:
    """A DiT that was released; None for a folder of `save_pretrained`."""
    autoencoder = None
    if source in RELEASED_DITS:
        source, autoencoder = RELEASED_DITS[source]
    if not source.endswith(".pt"):
        return None
    weights = read_tensors(source, revision)
    dit = from_official(weights["ema"] if isinstance(weights.get("ema"), dict) else weights)
    given = {name: value for name, value in dit._hub_mixin_config.items() if name != "latent_shape"}
    with torch.device("meta"):  # the DiT is there already
        model = rae.ClassToImage(given, dit._hub_mixin_config["latent_shape"], autoencoder)
    model.dit = dit
    return model.eval()


def open_text_to_image(source: str, revision: str | None) -> rae.TextToImage | None:
    """A Scale-RAE model that was released; None for a folder of `save_pretrained`."""
    source = RELEASED_TEXT_TO_IMAGE.get(source, source)
    folder = os.path.dirname(source) if source.endswith(".zstd") else source
    config, _ = read_config(folder, revision)
    if "diffusion_model_hidden_size" not in config:
        return None
    return read_scale_rae(source, folder, config, revision)
