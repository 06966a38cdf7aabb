"""What others wrote: the authors' decoders, repositories and whole text-to-image models, autoencoders of
diffusers. All are tiny and untrained, in the layouts of the published files."""

import json
import os
import re

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
import zstandard
from diffusers.models.autoencoders import autoencoder_rae
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

import common
import convert
import rae

DECODER = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48}
RAMP = torch.linspace(-1, 1, 24 * 16).view(24, 4, 4)
STATISTICS = {"mean": RAMP, "var": RAMP + 1.5}


def randomise(model: torch.nn.Module) -> None:
    """What starts as a constant, biases and norms, is something else."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture
def decoder(parts) -> dict[str, torch.Tensor]:
    """A decoder's state dict as the authors saved it; its position table is a trained one."""
    torch.manual_seed(0)
    module = rae.Decoder((16, 24), **DECODER)
    randomise(module)
    module.trainable_cls_token.data.normal_()
    module.decoder_pos_embed.data.add_(0.1 * torch.randn_like(module.decoder_pos_embed))
    return dict(module.state_dict())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Files of the hub are those of a folder: org/repository/path."""

    def download(repository, file, revision=None):
        if not (path := tmp_path / "hub" / repository / file).is_file():
            raise FileNotFoundError(f"{repository} has no {file}")
        return str(path)

    monkeypatch.setattr(rae, "hf_hub_download", download)
    return tmp_path / "hub"


def save(content, path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


def check_decoder(model: rae.RAE, parts, decoder: dict, stats: dict) -> None:
    """The encoder with its own weights, and this decoder between these statistics."""
    assert not model.training and model.image_size == 16 and model.encoder_size == 32
    image = torch.rand(2, 3, 40, 30)
    tokens = rae.RAE(str(parts / "encoder"), DECODER).encode(image)
    mean = torch.zeros(16, 24) if stats.get("mean") is None else stats["mean"].flatten(1).T
    std = torch.ones(16, 24) if stats.get("var") is None else (stats["var"].flatten(1).T + 1e-5).sqrt()
    latents = model.encode(image)
    torch.testing.assert_close(latents, (tokens - mean) / std)
    module = rae.from_official(decoder, heads=2)
    torch.testing.assert_close(model.decode(latents), module(tokens) * 0.5 + 0.5, atol=1e-5, rtol=0)


# -- the authors' files


@pytest.mark.parametrize("stats", [{}, {"mean": None, "var": STATISTICS["var"]}, STATISTICS])
def test_decoder_file(parts, decoder, stats, tmp_path):
    path = save(decoder, tmp_path / "decoders/model.pt")
    given = {"stats": save(stats, tmp_path / "stats/stat.pt")} if stats else {}
    model = rae.RAE.from_pretrained(path, encoder=str(parts / "encoder"), heads=2, **given)
    check_decoder(model, parts, decoder, stats)
    model.save_pretrained(tmp_path / "ours")
    again = rae.RAE.from_pretrained(tmp_path / "ours")
    latents = torch.randn(1, 16, 24)
    assert torch.equal(again.decode(latents), model.decode(latents))


def test_published_name(parts, decoder, hub, monkeypatch):
    monkeypatch.setitem(rae.DECODERS, "tiny", {k: v for k, v in DECODER.items() if k != "patch_size"})
    for name, given in convert.RELEASED.items():
        collection = name.startswith("rae-")
        save(decoder, hub / given["decoder"] / ("" if collection else "model.pt"))
        if collection:
            save(STATISTICS, hub / given["stats"])
        else:
            (hub / given["decoder"] / "config.json").write_text(json.dumps({"decoder_hidden_size": 1}))
        monkeypatch.setitem(convert.RELEASED, name, given | {"encoder": str(parts / "encoder")})
        check_decoder(rae.RAE.from_pretrained(name), parts, decoder, STATISTICS if collection else {})
    dist_ctx = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)
    check_decoder(common.load_autoencoder(name, dist_ctx), parts, decoder, {})


def test_scale_rae_repository(parts, decoder, tmp_path):
    config = {"model_type": "vit_mae", "hidden_size": 768, "patch_size": "SHOULD BE RELOADED"}
    config |= {"decoder_hidden_size": 512, "decoder_num_attention_heads": 2, "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no file .*model.pt"):
        rae.RAE.from_pretrained(tmp_path, encoder=str(parts / "encoder"))
    save(decoder, tmp_path / "model.pt")
    check_decoder(rae.RAE.from_pretrained(tmp_path, encoder=str(parts / "encoder")), parts, decoder, {})
    with pytest.raises(ValueError, match="encoder="):
        rae.open_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act relu"):
        rae.RAE.from_pretrained(tmp_path, encoder=str(parts / "encoder"))


def test_whole_rae_with_every_kind_of_encoder(parts):
    """A config, a dict, a folder, or a model of it; SigLIP's whole config has it as its vision_config."""
    model = rae.RAE.from_pretrained(parts / "rae")
    randomise(model)
    model.latent_mean.normal_()
    weights = model.state_dict()
    vision = transformers.SiglipVisionModel.from_pretrained(parts / "encoder")
    both = transformers.SiglipConfig(vision_config=vision.config.to_dict())
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for encoder in (vision, vision.config, vision.config.to_dict(), both, str(parts / "encoder")):
        again = rae.from_official(weights, encoder=encoder, heads=2, **pixels)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name


def test_damaged_decoder_files(parts, decoder, tmp_path, hub):
    def read(content, **given):
        path = save(content, tmp_path / "model.pt")
        return rae.RAE.from_pretrained(path, **{"encoder": str(parts / "encoder"), "heads": 2} | given)

    for name in ("decoder_norm.bias", "decoder_layers.1.output.dense.weight", "trainable_cls_token"):
        with pytest.raises(ValueError, match=name):
            read({key: w for key, w in decoder.items() if key != name})
        with pytest.raises(ValueError, match=name):
            read(decoder | {name: torch.cat([decoder[name]] * 2)})
    with pytest.raises(ValueError, match="extra is unknown"):
        read(decoder | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="encoder gives"):
        read(decoder | {"decoder_embed.weight": torch.zeros(32, 20)})
    with pytest.raises(ValueError, match="encoder gives"):
        read(decoder, encoder_size=64)
    with pytest.raises(ValueError, match="heads="):
        read(decoder, heads=5)
    with pytest.raises(ValueError, match="encoder="):
        read(decoder, encoder=None)
    for stats in (
        {"var": STATISTICS["var"][:12]},
        {"var": STATISTICS["var"].flatten(1)},
        {"std": STATISTICS["var"]},
        {"var": 1},
    ):
        with pytest.raises(ValueError, match="statistics"):
            read(decoder, stats=save(stats, tmp_path / "stat.pt"))
    for content in (os.getcwd, [1]):
        with pytest.raises(ValueError, match="damaged|list"):
            read(content)
    (tmp_path / "model.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        rae.RAE.from_pretrained(str(tmp_path / "model.pt"), encoder=str(parts / "encoder"))
    for missing in (
        "nothing.pt",
        str(tmp_path / "nothing.pt"),
        "org/name/nothing.pt",
        "org/name",
        "rae-dinov9",
        "",
    ):
        with pytest.raises(ValueError, match="no file"):
            rae.RAE.from_pretrained(missing, encoder=str(parts / "encoder"))
    with pytest.raises(ValueError, match="has its own encoder"):
        rae.RAE.from_pretrained(parts / "rae", encoder=str(parts / "encoder"))


# -- diffusers


def autoencoder(kind: str, side: int = 16, **changes) -> rae.RAE:
    """One that diffusers can hold, with side x side tokens."""
    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1}
    encoder = rae.diffusers_encoder(sizes | {"encoder_type": kind}) | changes
    model = rae.RAE(encoder, DECODER, 14 * side, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]).eval()
    randomise(model)
    model.decoder.trainable_cls_token.data.normal_()
    model.latent_mean.normal_()
    model.latent_std.uniform_(0.05, 2)
    return model


class OldSiglip(torch.nn.Module):
    """As SigLIP was in the transformers for which diffusers 0.42 was written."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = autoencoder_rae.transformers_siglip(config)

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)


@pytest.fixture
def old_siglip(monkeypatch):
    model = autoencoder_rae.SiglipVisionModel
    monkeypatch.setattr(autoencoder_rae, "transformers_siglip", model, raising=False)
    if "vision_model" not in dict(model(model.config_class(num_hidden_layers=1)).named_children()):
        monkeypatch.setattr(autoencoder_rae, "SiglipVisionModel", OldSiglip)


def maps(tokens: torch.Tensor) -> torch.Tensor:
    return rae.rearrange(tokens, "b (h w) c -> b c h w", h=int(tokens.shape[1] ** 0.5))


@torch.no_grad()
def check_same(ours: rae.RAE, theirs: diffusers.AutoencoderRAE) -> None:
    image = torch.rand(1, 3, 230, 220)
    latents, wanted = ours.encode(image), theirs.encode(image).latent
    torch.testing.assert_close(maps(latents), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(wanted).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", rae.DIFFUSERS_ENCODERS)
def test_to_diffusers_and_back(kind, old_siglip, tmp_path):
    model = autoencoder(kind)
    model.save_diffusers(tmp_path)
    theirs, info = diffusers.AutoencoderRAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    check_same(model, theirs.eval())
    again = rae.open_autoencoder(tmp_path)
    assert not again.training
    for name, tensor in model.state_dict().items():
        if name == "decoder.decoder_pos_embed":
            torch.testing.assert_close(again.state_dict()[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(again.state_dict()[name], tensor), name
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(again.encode(image), model.encode(image))


@pytest.mark.parametrize("kind", rae.DIFFUSERS_ENCODERS)
@pytest.mark.parametrize("side", [16, 5])
def test_from_diffusers(kind, side, old_siglip, tmp_path):
    """Of other grids, too, whose table of positions is not the authors'."""
    torch.manual_seed(0)
    statistics = {}
    if side == 5:
        statistics = {"latents_mean": torch.randn(64, 5, 5), "latents_std": torch.rand(64, 5, 5) + 0.1}
        statistics["scaling_factor"] = 0.7
    theirs = diffusers.AutoencoderRAE(
        kind,
        encoder_hidden_size=64,
        encoder_num_hidden_layers=2,
        encoder_input_size=14 * side,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=48,
        patch_size=4,
        encoder_norm_mean=[0.1, 0.2, 0.3],
        **statistics,
    ).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    check_same(rae.RAE.from_pretrained(tmp_path), theirs)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = {rae.old_encoder_name(name, "encoder."): w for name, w in load_file(path).items()}
    save_file(weights, path)  # the published ones have the names of transformers 4
    check_same(rae.RAE.from_pretrained(tmp_path), theirs)


def test_a_trained_position_table(tmp_path):
    model = autoencoder("mae")
    model.save_diffusers(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    table = torch.randn(1, 257, 32)
    save_file(load_file(path) | {"decoder.decoder_pos_embed": table}, path)
    again = rae.RAE.from_pretrained(tmp_path)
    assert torch.equal(again.decoder.decoder_pos_embed, table)
    with pytest.raises(ValueError, match="position table"):
        again.save_diffusers(tmp_path / "no")
    with pytest.raises(ValueError, match="position table"):
        autoencoder("mae", side=5).save_diffusers(tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dinov2", {"model_type": "dinov2"}),
        ("dinov2", {"num_register_tokens": 3}),
        ("dinov2", {"mlp_ratio": 2}),
        ("siglip2", {"num_attention_heads": 2}),
        ("siglip2", {"intermediate_size": 32}),
        ("mae", {"image_size": 256}),
        ("mae", {"layer_norm_eps": 1e-6}),
    ],
)
def test_encoders_that_diffusers_does_not_build(kind, change, tmp_path):
    with pytest.raises(ValueError, match=f"diffusers builds .*{next(iter(change))[:5]}|no encoder dinov2,"):
        autoencoder(kind, **change).save_diffusers(tmp_path)


def test_damaged_diffusers_folders(tmp_path):
    autoencoder("mae").save_diffusers(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights, config = load_file(path), json.loads((tmp_path / "config.json").read_text())
    for name in (
        "decoder.decoder_norm.bias",
        "decoder.decoder_layers.0.attention.to_q.weight",
        "_latents_mean",
        "encoder_std",
        "encoder.embeddings.cls_token",
    ):
        save_file({key: w for key, w in weights.items() if key != name}, path)
        with pytest.raises(ValueError, match=name):
            rae.RAE.from_pretrained(tmp_path)
    for change in (
        {"extra": torch.zeros(1)},
        {"decoder.decoder_norm.bias": torch.zeros(2)},
        {"_latents_std": torch.ones(64, 4, 4)},
        {"decoder.decoder_pos_embed": torch.ones(1, 17, 32)},
    ):
        save_file(weights | change, path)
        with pytest.raises(ValueError, match="extra|decoder_norm|statistics|pos_embed"):
            rae.RAE.from_pretrained(tmp_path)
    save_file(weights, path)
    for change in ({"encoder_type": "clip"}, {"decoder_hidden_size": 64}, {"encoder_num_hidden_layers": 2}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="clip|do not fit"):
            rae.RAE.from_pretrained(tmp_path)
    del config["encoder_patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="encoder_patch_size"):
        rae.RAE.from_pretrained(tmp_path)


# -- VAE


@torch.no_grad()
def test_vae_packs_as_torch_folds(vae_folder):
    model, theirs = rae.VAE(vae_folder), diffusers.AutoencoderKL.from_pretrained(vae_folder)
    assert model.image_size == 256 and model.latent_shape == (32 * 32, 24)
    model = rae.VAE(vae_folder, image_size=48)
    assert model.latent_shape == (36, 24)
    assert not any(p.requires_grad for p in model.parameters())
    images, noise = torch.rand(2, 3, 48, 48), torch.randn(2, 36, 24)
    posterior = theirs.encode(images * 2 - 1).latent_dist
    for given, z in (
        (None, posterior.mean),
        (noise, posterior.mean + posterior.std * F.fold(noise.mT, 12, 2, stride=2)),
    ):
        latents = model.encode(images, given)
        wanted = F.unfold((z - 0.11) * 0.36, 2, stride=2).mT
        torch.testing.assert_close(latents, wanted)
    z = F.fold(latents.mT, 12, 2, stride=2) / 0.36 + 0.11
    torch.testing.assert_close(model.decode(latents), theirs.decode(z).sample / 2 + 0.5)
    assert model.encode(torch.rand(1, 3, 30, 60)).shape == (1, 36, 24)


def test_vae_folders(vae_folder, parts, tmp_path):
    for source in (vae_folder, str(vae_folder), vae_folder.parent):  # the last as FLUX's repository is
        assert isinstance(rae.open_autoencoder(source), rae.VAE)
    model = rae.VAE.from_pretrained(vae_folder)
    model.save_pretrained(tmp_path / "again")
    again = rae.open_autoencoder(tmp_path / "again").state_dict()
    assert all(torch.equal(w, again[name]) for name, w in model.state_dict().items())
    assert isinstance(rae.open_autoencoder(parts / "rae"), rae.RAE)
    with pytest.raises(ValueError, match="no RAE but diffusers' AutoencoderKL"):
        rae.RAE.from_pretrained(vae_folder)
    with pytest.raises(ValueError, match="no AutoencoderKL"):
        rae.VAE(parts / "rae")
    with pytest.raises(ValueError, match="multiple of 8"):
        rae.VAE(vae_folder, image_size=44)
    path = vae_folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for change in (
        {k: w for k, w in weights.items() if k != "decoder.conv_in.bias"},
        weights | {"decoder.extra": torch.zeros(1)},
        weights | {"decoder.conv_in.bias": torch.zeros(3)},
    ):
        save_file(change, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="decoder"):
            rae.VAE(vae_folder)


def test_text_to_image_with_a_vae(vae_folder, parts, tmp_path):
    model = rae.TextToImage(
        str(parts / "language-model"),
        {"width": 32, "depth": 1, "heads": 2},
        rae.VAE(vae_folder).latent_shape,
        str(vae_folder),
    )
    model.save_pretrained(tmp_path / "t2i")
    dist_ctx = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)
    model = common.load_model(rae.TextToImage, str(tmp_path / "t2i"), "", dist_ctx)
    assert isinstance(model.autoencoder, rae.VAE)


# -- text to image


def scale_rae_shapes(vocab, hidden, ffn, kv, layers, channels, width, heads, depth, z, tokens=256, head=None):
    """Keys and shapes of a whole Scale-RAE model; with the wide head (width, heads, depth), or without."""
    model = {"embed_tokens.weight": (vocab, hidden), "norm.weight": (hidden,)}
    model |= {"latent_queries": (tokens, hidden)}
    model |= {"mm_projector.0.weight": (hidden, channels), "mm_projector.2.weight": (hidden, hidden)}
    model |= {f"mm_projector.{i}.bias": (hidden,) for i in (0, 2)}
    for i in range(layers):
        layer = f"layers.{i}."
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            model[f"{layer}self_attn.{name}_proj.weight"] = (out, hidden)
            model[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        model[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        model |= {f"{layer}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        model[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
        model |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    head_width, head_heads, head_depth = head or (width, heads, 0)
    dit = {"pos_embed": (1, tokens, width), "y_embedder.dropout_embedding": (z,)}
    dit |= {"x_embedder.proj.weight": (width, channels, 1, 1), "x_embedder.proj.bias": (width,)}
    dit |= {"t_embedder.mlp.0.weight": (z, 512), "t_embedder.mlp.2.weight": (z, z)}
    dit |= {f"t_embedder.mlp.{i}.bias": (z,) for i in (0, 2)}
    if head:
        dit |= {"s_embedder.proj.weight": (head_width, channels, 1, 1), "s_embedder.proj.bias": (head_width,)}
        dit |= {"s_projector.weight": (head_width, width), "s_projector.bias": (head_width,)}
    ropes = {"enc_rope": width // heads, "dec_rope": head_width // head_heads}
    for name, size in (ropes if head else {"feat_rope": width // heads}).items():
        dit |= {f"{name}.freqs_{part}": (tokens, size) for part in ("cos", "sin")}
    for i in range(depth + head_depth):
        d, c = (width, z) if i < depth else (head_width, head_width)
        f = int(2 / 3 * int(4 * d))
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.w12": (2 * f, d), "mlp.w3": (d, f)}
        for name, shape in (linear | {"adaLN_modulation.1": (6 * d, c)}).items():
            dit |= {f"dit_blocks.{i}.{name}.weight": shape, f"dit_blocks.{i}.{name}.bias": shape[:1]}
        dit |= {f"dit_blocks.{i}.norm{k}.weight": (d,) for k in (1, 2)}
    c = head_width if head else z
    final = {"linear": (channels, head_width), "adaLN_modulation.1": (2 * head_width, c)}
    for name, shape in final.items():
        dit |= {f"final_layer.{name}.weight": shape, f"final_layer.{name}.bias": shape[:1]}
    dit["final_layer.norm_final.weight"] = (head_width,)
    others = {"lm_head.weight": (vocab, hidden), "diff_head_projector.weight": (z, hidden)}
    return (
        {f"model.{name}": shape for name, shape in model.items()}
        | {f"diff_head.model.{name}": shape for name, shape in dit.items()}
        | others
        | {"diff_head_projector.bias": (z,)}
    )


SMALL = {"vocab": 528, "hidden": 32, "ffn": 48, "kv": 16, "layers": 2, "channels": 24, "tokens": 16}
SMALL |= {"width": 32, "heads": 2, "depth": 2, "z": 20}
HEADS = {"narrow": None, "wide": (48, 4, 2)}
SIGLIP = "google/siglip2-so400m-patch14-224"
LANGUAGE_MODEL = {
    "vocab_size": 528,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(params=HEADS)
def scale_rae(request, parts):
    """The authors' config.json, state dict and tokenizer of a small model."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "t2i")
    head = HEADS[request.param]
    shapes = scale_rae_shapes(head=head, **SMALL)
    weights = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for name in weights:
        if "freqs_" in name:
            weights[name] = rae.rope_table(*weights[name].shape)[("cos", "sin").index(name[-3:])].clone()
    config = LANGUAGE_MODEL | {
        "model_type": "cambrian_qwen",
        "architectures": ["ScaleRAEQwenForCausalLM"],
        "rope_scaling": None,
        "torch_dtype": "float32",
        "mm_vision_tower_aux_list": [SIGLIP],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "vision_loss": "diffusion-loss",
        "vision_loss_mode": "query",
        "diffusion_model_hidden_size": [32, 48] if head else 32,
        "diffusion_model_depth": [2, 2] if head else 2,
        "diffusion_model_heads": [2, 4] if head else 2,
        "diffusion_model_channels": 24,
        "diffusion_model_z_channels": 20,
        "diffusion_base_dim": None,
        "diffusion_norm_stats_path": None,
        "si_token_len": 729,
    }
    return config, weights, tokenizer


narrow = pytest.mark.parametrize("scale_rae", ["narrow"], indirect=True)


def write(folder, config, tokenizer) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_small(weights, **given) -> rae.TextToImage:
    return rae.from_official(weights, **{"language_model": LANGUAGE_MODEL} | given)


def check_equal(model, wanted) -> None:
    assert not model.training
    found, wanted = model.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == torch.float32


def save_shards(weights, folder) -> None:
    names = sorted(weights)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def compress(content, path) -> None:
    torch.save(content, path.with_suffix(""))
    packed = zstandard.ZstdCompressor().compress(path.with_suffix("").read_bytes())
    path.write_bytes(packed)
    path.with_suffix("").unlink()


def save_consolidated(weights, folder) -> None:
    wrapped = {re.sub(r"(layers\.\d+)", r"\1._orig_module", k): w for k, w in weights.items()}
    wrapped = {f"_fsdp_wrapped_module.{name}": w for name, w in wrapped.items()}
    compress({"model": wrapped}, folder / "model.pth.zstd")


LAYOUTS = {
    "safetensors": lambda weights, folder: save_file(weights, folder / "model.safetensors"),
    "shards": lambda weights, folder: save_torch_state_dict(weights, folder, max_shard_size="50KB"),
    "bin": lambda weights, folder: torch.save(weights, folder / "pytorch_model.bin"),
    "bin shards": save_shards,
    "consolidated": save_consolidated,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_scale_rae_folder(layout, scale_rae, tmp_path):
    config, weights, tokenizer = scale_rae
    folder = write(tmp_path / "official", config, tokenizer)
    LAYOUTS[layout](weights, tmp_path / "official")
    assert len(list((tmp_path / "official").glob("*.safetensors"))) > 2 or layout != "shards"
    model = rae.TextToImage.from_pretrained(folder)
    wanted = read_small(weights, im_start=516, im_end=517)
    check_equal(model, wanted)
    assert (model.im_start, model.im_end) == (516, 517) == (wanted.im_start, wanted.im_end)
    assert tokenizer.convert_ids_to_tokens([516, 517]) == ["<im_start>", "<im_end>"]
    assert model.autoencoder_path == "scale-rae-siglip2-so400m" in convert.RELEASED
    assert model.alpha == rae.default_alpha((16, 24))
    assert model.language_model.model.rotary_emb.config.rope_parameters["rope_theta"] == 1000000
    latents = model.generate(["a red star"], steps=2, guidance=2.0, noise=torch.ones(1, 16, 24))
    assert latents.shape == (1, 16, 24) and latents.isfinite().all()
    if layout == "consolidated":
        check_equal(rae.TextToImage.from_pretrained(f"{folder}/model.pth.zstd"), wanted)
    model.save_pretrained(tmp_path / "plain")
    again = rae.TextToImage.from_pretrained(tmp_path / "plain").eval()
    check_equal(again, wanted)
    assert again.autoencoder_path == model.autoencoder_path
    same = again.generate(["a red star"], steps=2, guidance=2.0, noise=torch.ones(1, 16, 24))
    assert torch.equal(same, latents)


def test_scale_rae_export(scale_rae, parts, tmp_path):
    config, weights, tokenizer = scale_rae
    model = read_small(weights)
    model.set_tokenizer(tokenizer)
    model.autoencoder_path, model.alpha = str(parts / "rae"), 3.0
    model.save_official(tmp_path / "export")
    written = load_file(tmp_path / "export/model.safetensors")
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(written[name], tensor), name
    again = rae.TextToImage.from_pretrained(tmp_path / "export")
    check_equal(again, model)
    assert again.autoencoder_path == model.autoencoder_path and again.alpha == pytest.approx(3)
    assert rae.TextToImage.from_pretrained(tmp_path / "export", "other").autoencoder_path == "other"
    again.autoencoder_path, again.alpha = "scale-rae-webssl-l", rae.default_alpha((16, 24))
    again.save_official(tmp_path / "again")
    saved = json.loads((tmp_path / "again/config.json").read_text())
    expected = config | {"mm_vision_tower_aux_list": ["facebook/webssl-dino300m-full2b-224"]}
    expected |= {"rope_theta": saved["rope_theta"]}
    assert {k: saved[k] for k in expected if k in saved} == {k: expected[k] for k in expected if k in saved}
    assert expected.keys() - saved.keys() == {"rope_scaling", "torch_dtype", "si_token_len"}
    assert rae.TextToImage.from_pretrained(tmp_path / "again").autoencoder_path == "scale-rae-webssl-l"


def test_export_has_the_published_keys_and_shapes():
    """Of the model with 1.5B + 2.4B parameters, without memory for them."""
    language_model = {"model_type": "qwen2", "vocab_size": 151667, "hidden_size": 1536}
    language_model |= {"intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    language_model |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = rae.TextToImage(language_model, rae.DITS["2.4B"], (256, 1152))
    shapes = {"vocab": 151667, "hidden": 1536, "ffn": 8960, "kv": 256, "layers": 28, "channels": 1152}
    shapes |= {"width": 2048, "heads": 32, "depth": 32, "z": 2048}
    found = {name: tuple(w.shape) for name, w in rae.to_official(model).items()}
    assert found == scale_rae_shapes(**shapes)
    assert found["diff_head.model.dit_blocks.31.mlp.w12.weight"] == (10922, 2048)


@narrow
def test_models_that_scale_rae_cannot_hold(scale_rae):
    model = read_small(scale_rae[1])
    model.dit.t_embedder.W.data[0] += 1
    with pytest.raises(ValueError, match="frequencies"):
        rae.to_official(model)
    config = model.language_model.config.to_dict()
    for change in ({"readd_time": True, "condition_width": 32}, {"qk_norm": True}, {"swiglu": False}):
        sizes = {"width": 32, "depth": 1, "heads": 2} | change
        with pytest.raises(ValueError, match=next(iter(change))):
            rae.to_official(rae.TextToImage(config, sizes, (16, 24)))


def test_damaged_scale_rae(scale_rae):
    config, weights, _ = scale_rae
    heads, wanted = config["diffusion_model_heads"], read_small(weights)
    tied = ("lm_head.weight", "model.embed_tokens.weight")
    for name in weights:
        without = {key: w for key, w in weights.items() if key != name}
        if name in tied:  # one of them is enough
            check_equal(read_small(without), wanted)
        else:
            with pytest.raises(ValueError, match=re.escape(name)):
                read_small(without, heads=heads)
        with pytest.raises(ValueError):
            read_small(weights | {name: torch.cat([weights[name]] * 2)})
    check_equal(read_small({k: w for k, w in weights.items() if "freqs_" not in k}, heads=heads), wanted)
    for extra in (
        "extra",
        "diff_head.data_mean",
        "diff_head.model.extra",
        "aux_vision_head.0.weight",
        "model.vision_tower.embeddings.weight",
        "model.layers.2.mlp.up_proj.weight",
    ):
        with pytest.raises(ValueError, match=extra):
            read_small(weights | {extra: torch.zeros(1)})
    with pytest.raises(ValueError, match="differ"):
        read_small(weights | {"lm_head.weight": 2 * weights["lm_head.weight"]})
    table = next(name for name in weights if name.endswith("freqs_sin"))
    with pytest.raises(ValueError, match=table):
        read_small(weights | {table: weights[table].flip(0)})


@narrow
def test_keywords_that_contradict_scale_rae(scale_rae):
    weights = scale_rae[1]
    right = read_small(weights).language_model.config
    check_equal(read_small(weights, language_model=right, heads=2, width=32, depth=2), read_small(weights))
    check_equal(read_small(weights, language_model=right.to_dict()), read_small(weights))
    for given in (
        {"language_model": None},
        {"language_model": right.to_dict() | {"model_type": "llama"}},
        *({"language_model": LANGUAGE_MODEL | {name: value}} for name, value in (
            ("vocab_size", 529), ("hidden_size", 64), ("num_hidden_layers", 3), ("num_hidden_layers", 1),
            ("num_key_value_heads", 2), ("intermediate_size", 32),
        )),
        {"heads": 4},
        {"heads": (2, 2)},
        {"width": 64},
        {"depth": 3},
        {"condition_width": 32},
        {"latent_shape": (16, 1152)},
        {"im_start": 528},
        {"im_end": -1},
        {"colour": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            read_small(weights, **given)


@narrow
def test_untied_scale_rae(scale_rae, tmp_path):
    config, weights, tokenizer = scale_rae
    folder = write(tmp_path, config | {"tie_word_embeddings": False}, tokenizer)
    weights = weights | {"lm_head.weight": 2 * weights["lm_head.weight"]}
    save_file(weights, tmp_path / "model.safetensors")
    model = rae.TextToImage.from_pretrained(folder)
    assert torch.equal(model.language_model.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(rae.to_official(model)["lm_head.weight"], weights["lm_head.weight"])
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        rae.TextToImage.from_pretrained(folder)


@narrow
def test_damaged_scale_rae_folders(scale_rae, parts, tmp_path, hub):
    config, weights, tokenizer = scale_rae
    folder = tmp_path / "folder"

    def read(change=None):
        write(folder, config | (change or {}), tokenizer)
        return rae.TextToImage.from_pretrained(folder)

    with pytest.raises(ValueError, match="no weights"):
        read()
    save_consolidated(weights, folder)
    read()
    for change in (
        {"diffusion_model_heads": 4},
        {"diffusion_model_depth": 3},
        {"diffusion_model_hidden_size": 64},
        {"diffusion_model_hidden_size": [32, 48]},
        {"num_hidden_layers": 1},
        {"vocab_size": 529},
        {"vision_loss_mode": "query-block"},
        {"mm_projector_type": "linear"},
        {"mm_use_im_start_end": False},
        {"diffusion_norm_stats_path": "stats.pt"},
    ):
        with pytest.raises(ValueError):
            read(change)
    packed = (folder / "model.pth.zstd").read_bytes()
    for content in (b"no", packed[:-9], packed[: len(packed) // 2]):
        (folder / "model.pth.zstd").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            read()
    compress({"model": os.getcwd}, folder / "model.pth.zstd")
    with pytest.raises(ValueError, match="more than tensors"):
        read()
    save_shards(weights, folder)  # comes first
    read()
    (folder / "pytorch_model-00002-of-00002.bin").rename(folder / "other.bin")
    with pytest.raises(ValueError, match="pytorch_model-00002-of-00002.bin"):
        read()
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        read()
    save_file(weights, folder / "model.safetensors")
    read()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    with pytest.raises(ValueError, match="538 tokens"):
        read()
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "language-model")
    with pytest.raises(ValueError, match="no <im_end> and no <im_start>"):
        read()
    for missing in ("nothing", "org/name", str(tmp_path / "nothing/model.pth.zstd")):
        with pytest.raises(ValueError, match="no file"):
            rae.TextToImage.from_pretrained(missing)


@narrow
def test_scale_rae_with_latents_of_a_vae(scale_rae, tmp_path):
    """Drawn in FLUX's latents, read with SigLIP-2's, which have other channels."""
    config, weights, tokenizer = scale_rae
    width = weights["model.mm_projector.0.weight"].shape[0]
    weights = weights | {"model.mm_projector.0.weight": torch.randn(width, 40)}
    config = config | {"generation_alignment_tower": "black-forest-labs/FLUX.1-dev-res256"}
    write(tmp_path / "folder", config, tokenizer)
    save_shards(weights, tmp_path / "folder")
    model = rae.TextToImage.from_pretrained(tmp_path / "folder")
    assert (model.latent_shape, model.read_shape) == ((16, 24), (16, 40))
    paths = (model.autoencoder_path, model.reader_path)
    assert paths == ("black-forest-labs/FLUX.1-dev", "scale-rae-siglip2-so400m")
    model.save_pretrained(tmp_path / "plain")
    model.save_official(tmp_path / "again")
    saved = json.loads((tmp_path / "again/config.json").read_text())
    names = ("generation_alignment_tower", "mm_vision_tower_aux_list")
    assert [saved[name] for name in names] == [config[name] for name in names] and saved[
        "mm_hidden_size"
    ] == 40
    for again in map(rae.TextToImage.from_pretrained, (tmp_path / "plain", tmp_path / "again")):
        check_equal(again, model)
        assert (again.autoencoder_path, again.reader_path) == paths and again.read_shape == (16, 40)


@narrow
def test_released_text_to_image_by_name(scale_rae, tmp_path, hub, monkeypatch):
    config, weights, tokenizer = scale_rae
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    for name, source in convert.RELEASED_TEXT_TO_IMAGE.items():
        assert source.startswith("nyu-visionx/Scale-RAE-Qwen")
        write(hub / source, config, tokenizer)
        save_shards(weights, hub / source)
        check_equal(rae.TextToImage.from_pretrained(name), read_small(weights))


def test_published_paths():
    """As the collection on the hub names them."""
    path = "nyu-visionx/RAE-collections"
    assert {(given["decoder"], given.get("stats")) for given in convert.RELEASED.values()} == {
        (f"{path}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
         f"{path}/stats/dinov2/wReg_base/imagenet1k/stat.pt"),
        (f"{path}/decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
         f"{path}/stats/dinov2/wReg_base/imagenet1k_512/stat.pt"),
        (f"{path}/decoders/mae/base_p16/ViTXL_n08/model.pt", f"{path}/stats/mae/base_p16/ImageNet1k/stat.pt"),
        (f"{path}/decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
         f"{path}/stats/siglip2/base_p16_i256/ImageNet1k/stat.pt"),
        ("nyu-visionx/siglip2_decoder", None),
        ("nyu-visionx/webssl300m_decoder", None),
    }  # fmt: skip
