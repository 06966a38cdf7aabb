"""Autoencoders that others wrote: the authors' decoders and repositories, folders of diffusers, VAEs. All are
tiny and untrained, in the layouts of the published files."""

import json
import os

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.autoencoders import autoencoder_rae
from safetensors.torch import load_file, save_file

import common
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
    picture = torch.rand(2, 3, 40, 30)
    tokens = rae.RAE(str(parts / "encoder"), DECODER).encode(picture)
    mean = torch.zeros(16, 24) if stats.get("mean") is None else stats["mean"].flatten(1).T
    std = torch.ones(16, 24) if stats.get("var") is None else (stats["var"].flatten(1).T + 1e-5).sqrt()
    latents = model.encode(picture)
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
    for name, given in rae.RELEASED.items():
        collection = name.startswith("rae-")
        save(decoder, hub / given["decoder"] / ("" if collection else "model.pt"))
        if collection:
            save(STATISTICS, hub / given["stats"])
        else:
            (hub / given["decoder"] / "config.json").write_text(json.dumps({"decoder_hidden_size": 1}))
        monkeypatch.setitem(rae.RELEASED, name, given | {"encoder": str(parts / "encoder")})
        check_decoder(rae.RAE.from_pretrained(name), parts, decoder, STATISTICS if collection else {})
    where = common.Launch(torch.device("cpu"), 0, 1, torch.float32)
    check_decoder(common.load_autoencoder(name, where), parts, decoder, {})


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
    picture = torch.rand(1, 3, 230, 220)
    latents, wanted = ours.encode(picture), theirs.encode(picture).latent
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
    picture = torch.rand(1, 3, 224, 224)
    assert torch.equal(again.encode(picture), model.encode(picture))


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


@pytest.fixture
def vae_folder(tmp_path):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        norm_num_groups=4,
        latent_channels=6,
        sample_size=1024,
        scaling_factor=0.36,
        shift_factor=0.11,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


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
    where = common.Launch(torch.device("cpu"), 0, 1, torch.float32)
    model = common.load_model(rae.TextToImage, str(tmp_path / "t2i"), "", where)
    assert isinstance(model.autoencoder, rae.VAE)


def test_published_paths():
    """As the collection on the hub names them."""
    path = "nyu-visionx/RAE-collections"
    assert {(given["decoder"], given.get("stats")) for given in rae.RELEASED.values()} == {
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
