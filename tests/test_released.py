"""Released weights and diffusers folders: tiny untrained models in the layouts of the published files."""

import functools
import io
import json
import re

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
import zstandard
from diffusers.models.autoencoders import autoencoder_rae
from einops import rearrange
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

import benchmarks
import common
import convert
import rae
import train_decoder

DECODER = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48}
RAMP = torch.linspace(-1, 1, 24 * 16).view(24, 4, 4)
STATISTICS = {"mean": RAMP, "var": RAMP + 1.5}
DIST_CTX = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


def randomise_vectors(model: torch.nn.Module) -> None:
    """Biases and norms start as constants: make them tell one key from another."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def check_equal(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights, expected = model.state_dict(), expected.state_dict()
    assert not model.training and weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor) and weights[name].dtype == torch.float32, name


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder that stands for the hub: org/repository/path."""

    def download(repository, file, revision=None):
        path = tmp_path / "hub" / repository / file
        if not path.is_file():
            raise FileNotFoundError(f"{repository} has no {file}")
        return str(path)

    monkeypatch.setattr(convert, "hf_hub_download", download)
    return tmp_path / "hub"


class Payload:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def save(content, path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


# -- decoders of RAE and Scale-RAE


@pytest.fixture(scope="module")
def decoder() -> rae.Decoder:
    """With a trained position table, as the authors' have."""
    torch.manual_seed(0)
    model = rae.Decoder((16, 24), **DECODER).eval()
    randomise_vectors(model)
    model.trainable_cls_token.data.normal_()
    model.decoder_pos_embed.data.add_(0.1 * torch.randn_like(model.decoder_pos_embed))
    return model


def check_decoder(model: rae.RAE, parts, decoder: rae.Decoder, stats: dict, denormalised=True) -> None:
    """The encoder has its pretrained weights, and the decoder is this one, between these statistics."""
    assert (model.image_size, model.encoder_size) == (16, 32)
    check_equal(model.decoder, decoder)
    image = torch.rand(2, 3, 40, 30)
    layers = model.encoder.layers
    tokens = rae.RAE(str(parts / "encoder"), DECODER, layers=layers).encode(image)
    mean = torch.zeros(16, 24) if stats.get("mean") is None else stats["mean"].flatten(1).T
    std = torch.ones(16, 24) if stats.get("var") is None else (stats["var"].flatten(1).T + 1e-5).sqrt()
    latents = model.encode(image)
    torch.testing.assert_close(latents, (tokens - mean) / std)
    pixels = decoder(tokens) * 0.5 + 0.5 if denormalised else decoder(tokens)
    torch.testing.assert_close(model.decode(latents), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stats", [{}, {"mean": None, "var": STATISTICS["var"]}, STATISTICS])
def test_decoder_file_with_and_without_statistics(parts, decoder, stats, tmp_path):
    path = save(decoder.state_dict(), tmp_path / "decoders/model.pt")
    options = {"stats": save(stats, tmp_path / "stats/stat.pt")} if stats else {}
    model = rae.RAE.from_pretrained(path, encoder=str(parts / "encoder"), heads=2, **options)
    check_decoder(model, parts, decoder, stats)
    model.save_pretrained(tmp_path / "saved")
    check_equal(rae.RAE.from_pretrained(tmp_path / "saved"), model)


def test_released_autoencoders_by_name(parts, decoder, hub, monkeypatch):
    folder = "nyu-visionx/RAE-collections"
    assert convert.RELEASED["rae-dinov2-b-512"] == {
        "decoder": f"{folder}/decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "stats": f"{folder}/stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
        "encoder": "facebook/dinov2-with-registers-base",
    }
    monkeypatch.setitem(rae.DECODERS, "tiny", {k: v for k, v in DECODER.items() if k != "patch_size"})
    for name, files in convert.RELEASED.items():
        tiny = {"encoder": str(parts / "encoder"), "layers": [0, 1] if files.get("layers") else None}
        monkeypatch.setitem(convert.RELEASED, name, files | tiny)
        if "stats" in files:
            save(decoder.state_dict(), hub / files["decoder"])
            save(STATISTICS, hub / files["stats"])
        else:
            save(decoder.state_dict(), hub / files["decoder"] / "model.pt")
            (hub / files["decoder"] / "config.json").write_text(json.dumps({"decoder_hidden_size": 1}))
        model = common.load_autoencoder(name, DIST_CTX)
        is_raev2 = name.startswith("raev2")
        check_decoder(model, parts, decoder, STATISTICS if "stats" in files else {}, not is_raev2)
        assert model.encoder.layers == tiny["layers"]


def test_decoder_repository_of_scale_rae(parts, decoder, tmp_path):
    config = {"model_type": "vit_mae", "hidden_size": 768, "patch_size": "SHOULD BE RELOADED"}
    config |= {"decoder_hidden_size": 512, "decoder_num_attention_heads": 2, "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(decoder.state_dict(), tmp_path / "model.pt")
    check_decoder(rae.RAE.from_pretrained(tmp_path, encoder=str(parts / "encoder")), parts, decoder, {})
    with pytest.raises(ValueError, match="encoder="):
        rae.open_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act relu"):
        rae.RAE.from_pretrained(tmp_path, encoder=str(parts / "encoder"))


def test_whole_rae_takes_its_encoder_as_config_model_or_folder(parts):
    model = rae.RAE.from_pretrained(parts / "rae")
    randomise_vectors(model)
    model.latent_mean.normal_()
    vision = transformers.SiglipVisionModel.from_pretrained(parts / "encoder")
    both_towers = transformers.SiglipConfig(vision_config=vision.config.to_dict())
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for encoder in (vision, vision.config, vision.config.to_dict(), both_towers, str(parts / "encoder")):
        check_equal(rae.from_official(model.state_dict(), encoder=encoder, heads=2, **pixels), model)


def test_damaged_decoder_files(parts, decoder, tmp_path, hub):
    weights = dict(decoder.state_dict())

    def read(content, **options):
        path = save(content, tmp_path / "model.pt")
        return rae.RAE.from_pretrained(path, **{"encoder": str(parts / "encoder"), "heads": 2} | options)

    with pytest.raises(ValueError, match="decoder_norm.bias"):  # test_golden.py tries every key
        read({key: w for key, w in weights.items() if key != "decoder_norm.bias"})
    for change, options, message in (
        ({"extra": torch.zeros(1)}, {}, "extra is unknown"),
        ({"decoder_embed.weight": torch.zeros(32, 20)}, {}, "encoder gives"),
        ({}, {"encoder_size": 64}, "encoder gives"),
        ({}, {"heads": 5}, "heads="),
        ({}, {"stats": save({"var": RAMP[:12]}, tmp_path / "a.pt")}, "statistics"),
        ({}, {"stats": save({"std": RAMP}, tmp_path / "b.pt")}, "statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            read(weights | change, **options)
    with pytest.raises(ValueError, match="damaged"):
        read(Payload(tmp_path / "executed"))
    assert not (tmp_path / "executed").exists()
    for missing in (str(tmp_path / "nothing.pt"), "org/name/nothing.pt", "org/name", ""):
        with pytest.raises(ValueError, match="no file"):
            rae.RAE.from_pretrained(missing, encoder=str(parts / "encoder"))
    with pytest.raises(ValueError, match="has its own encoder"):
        rae.RAE.from_pretrained(parts / "rae", encoder=str(parts / "encoder"))


# -- checkpoints of wrapped models, and files with code


def wrap(weights: dict, container: str = "") -> dict:
    """As saved from inside of DDP, FSDP, torch.compile and activation checkpointing, in some order."""
    wrapped = {}
    for number, (name, tensor) in enumerate(weights.items()):
        inner = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module._orig_module.")[
            number % 3
        ]
        parts = name.rpartition(".")
        wrapped[f"module._orig_mod.{parts[0]}{parts[1]}{inner}{parts[2]}"] = tensor
    return {container: wrapped, "step": 3} if container else wrapped


def test_prefixes_of_wrappers_are_removed_alike(parts, decoder, tmp_path):
    path = save(wrap(decoder.state_dict(), "ema"), tmp_path / "model.pt")
    check_equal(rae.RAE.from_pretrained(path, encoder=str(parts / "encoder"), heads=2).decoder, decoder)
    discriminator = train_decoder.Discriminator(str(parts / "encoder")).eval()
    heads = wrap(discriminator.state_dict())
    check_equal(train_decoder.Discriminator.from_official(heads, discriminator.backbone), discriminator)
    _, weights, expected = scale_rae("wide")
    check_equal(from_official(wrap(weights, "state_dict")), expected)
    dit = {
        name.removeprefix("diff_head.model."): w for name, w in weights.items() if "diff_head.model" in name
    }
    dit = {"ema": wrap(dit), "model": {}, "optimizer": {}}
    check_equal(rae.from_official(dit), expected.dit)
    for content in (dit, dit["ema"]):
        model = rae.ClassToImage.from_pretrained(save(content, tmp_path / "stage2_model.pt"))
        check_equal(model.dit, expected.dit)
    with pytest.raises(ValueError, match="keep one of each"):
        rae.from_official({"module.decoder_layers.0.x": 1, "decoder_layers.0.x": 1})


def test_code_of_a_repository_is_never_run_and_never_asked_about(parts, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    ours = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    ours |= {"AutoTokenizer": ["code.Tokenizer", None], "AutoImageProcessor": "code.Processor"}
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ours", "auto_map": ours}))
    for open_it in (lambda: rae.Encoder(str(tmp_path)), lambda: rae.input_settings(str(tmp_path), None),
                    lambda: train_decoder.Backbone.from_pretrained(str(tmp_path)),
                    lambda: rae.TextToImage(str(tmp_path), {}, (16, 24)),
                    lambda: benchmarks.Detector(str(tmp_path), torch.device("cpu")),
                    lambda: convert.build_rae(scale_rae("narrow")[1], str(tmp_path))):  # fmt: skip
        with pytest.raises((ValueError, OSError)):
            open_it()
    assert not (tmp_path / "executed").exists()


# -- diffusers


def autoencoder(encoder_type: str, side: int = 16, **changes) -> rae.RAE:
    """An RAE that diffusers can hold, with side x side tokens."""
    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1}
    encoder = convert.diffusers_encoder(sizes | {"encoder_type": encoder_type}) | changes
    model = rae.RAE(encoder, DECODER, 14 * side, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]).eval()
    randomise_vectors(model)
    model.decoder.trainable_cls_token.data.normal_()
    model.latent_mean.normal_()
    model.latent_std.uniform_(0.05, 2)
    return model


@pytest.fixture
def old_siglip(monkeypatch):
    """diffusers 0.42 wants SigLIP as it was in transformers 4: with `vision_model.` in the names."""
    model = autoencoder_rae.SiglipVisionModel

    class OldSiglip(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.vision_model = model(config)

        def forward(self, *args, **kwargs):
            return self.vision_model(*args, **kwargs)

    if not hasattr(model(model.config_class(num_hidden_layers=1)), "vision_model"):
        monkeypatch.setattr(autoencoder_rae, "SiglipVisionModel", OldSiglip)


@torch.no_grad()
def check_same_as_diffusers(ours: rae.RAE, theirs: diffusers.AutoencoderRAE) -> None:
    image = torch.rand(1, 3, 230, 220)
    latents, expected = ours.encode(image), theirs.encode(image).latent
    torch.testing.assert_close(latents, rearrange(expected, "b c h w -> b (h w) c"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latents), theirs.decode(expected).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder_type", convert.DIFFUSERS_ENCODERS)
def test_to_diffusers_and_back(encoder_type, old_siglip, tmp_path):
    model = autoencoder(encoder_type)
    model.save_diffusers(tmp_path)
    theirs, report = diffusers.AutoencoderRAE.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    check_same_as_diffusers(model, theirs.eval())
    again = rae.open_autoencoder(tmp_path)
    table = again.decoder.decoder_pos_embed.data
    torch.testing.assert_close(table, model.decoder.decoder_pos_embed.data, atol=1e-6, rtol=0)
    table.copy_(model.decoder.decoder_pos_embed)  # it is computed with another formula
    check_equal(again, model)


@pytest.mark.parametrize(("encoder_type", "side"), [("dinov2", 16), ("siglip2", 5), ("mae", 5)])
def test_from_diffusers(encoder_type, side, old_siglip, tmp_path):
    """Grids of other than 16 x 16 tokens have another position table than the authors'."""
    torch.manual_seed(0)
    statistics = {"latents_mean": torch.randn(64, 5, 5), "latents_std": torch.rand(64, 5, 5) + 0.1}
    statistics = statistics | {"scaling_factor": 0.7} if side == 5 else {}
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "encoder_input_size": 14 * side}
    sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    sizes |= {"decoder_intermediate_size": 48, "patch_size": 4, "encoder_norm_mean": [0.1, 0.2, 0.3]}
    theirs = diffusers.AutoencoderRAE(encoder_type, **sizes, **statistics).eval()
    randomise_vectors(theirs)
    theirs.save_pretrained(tmp_path)
    check_same_as_diffusers(rae.RAE.from_pretrained(tmp_path), theirs)
    # the published folders have the names of transformers 4
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({convert.old_encoder_key(name, "encoder."): w for name, w in load_file(path).items()}, path)
    check_same_as_diffusers(rae.RAE.from_pretrained(tmp_path), theirs)


def test_models_that_diffusers_cannot_hold(tmp_path):
    """A trained position table can be read but not written, as can encoders that are not quite theirs."""
    autoencoder("mae").save_diffusers(tmp_path / "mae")
    path = tmp_path / "mae/diffusion_pytorch_model.safetensors"
    table = torch.randn(1, 257, 32)
    save_file(load_file(path) | {"decoder.decoder_pos_embed": table}, path)
    trained = rae.RAE.from_pretrained(tmp_path / "mae")
    assert torch.equal(trained.decoder.decoder_pos_embed, table)
    for model, message in (
        (trained, "position table"),
        (autoencoder("mae", side=5), "position table"),
        (autoencoder("dinov2", model_type="dinov2"), "no encoder dinov2,"),
        (autoencoder("dinov2", num_register_tokens=3), "num_register_tokens"),
        (autoencoder("siglip2", intermediate_size=32), "intermediate_size"),
        (autoencoder("mae", layer_norm_eps=1e-6), "layer_norm_eps"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_diffusers(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_damaged_diffusers_folders(tmp_path):
    autoencoder("mae").save_diffusers(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights, config = load_file(path), json.loads((tmp_path / "config.json").read_text())
    for name in ("decoder.decoder_layers.0.attention.to_q.weight", "_latents_mean"):
        save_file({key: w for key, w in weights.items() if key != name}, path)
        with pytest.raises(ValueError, match=name):
            rae.RAE.from_pretrained(tmp_path)
    for change in ({"extra": torch.zeros(1)}, {"_latents_std": torch.ones(64, 4, 4)}):
        save_file(weights | change, path)
        with pytest.raises(ValueError, match="extra|statistics"):
            rae.RAE.from_pretrained(tmp_path)
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="damaged"):
        rae.RAE.from_pretrained(tmp_path)
    save_file(weights, path)
    for change in ({"encoder_type": "clip"}, {"decoder_hidden_size": 64}, {"encoder_num_hidden_layers": 2}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="clip|do not fit"):
            rae.RAE.from_pretrained(tmp_path)


def save_everywhere(model, folder) -> list:
    """Pipelines and folders of a diffusers model, in one file, in shards and as variants."""
    layouts = {
        "plain": {},
        "shards": {"max_shard_size": "20KB"},
        "pickles": {"safe_serialization": False},
        "variant": {"variant": "bf16"},
        "both": {"variant": "own", "max_shard_size": "20KB"},
    }
    for name, options in layouts.items():
        model.save_pretrained(folder / name / "vae", **options)
        (folder / name / "model_index.json").write_text(json.dumps({"_class_name": "APipeline"}))
    assert len(list((folder / "both/vae").glob("*.own-00002-of-*"))) == 1
    assert len(list((folder / "shards/vae").glob("*-00002-of-*"))) == 1
    return [path for name in folder.iterdir() for path in (name, name / "vae")]


def test_pipelines_shards_and_variants(vae_folder, tmp_path, hub):
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 224}
    sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderRAE("mae", **sizes, decoder_intermediate_size=48, patch_size=4)
    paths = save_everywhere(theirs, tmp_path / "rae")
    expected = common.load_autoencoder(paths[0], DIST_CTX)
    theirs.save_pretrained(hub / "org/rae")
    for path in (*paths, "org/rae"):
        check_equal(common.load_autoencoder(path, DIST_CTX), expected)
    theirs = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    theirs.save_pretrained(hub / "org/kl")
    for path in ("org/kl", *save_everywhere(theirs, tmp_path / "kl")):
        check_equal(common.load_autoencoder(path, DIST_CTX).vae, theirs)
    (path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    for source in (path, path.parent):
        with pytest.raises(ValueError, match="diffusers' AutoencoderKLWan: give an AutoencoderKL or"):
            rae.open_autoencoder(source)
    for name in vae_folder.glob("*.safetensors"):
        name.unlink()
    with pytest.raises(ValueError, match="has no weights: none of diffusion_pytorch_model.safetensors"):
        rae.open_autoencoder(vae_folder)


def test_a_local_folder_asks_nothing_of_the_hub(vae_folder, parts, monkeypatch):
    monkeypatch.setattr(convert, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for folder in (vae_folder, parts / "rae"):
        monkeypatch.chdir(folder.parent.parent)  # a relative path could be org/repository
        common.load_autoencoder(f"{folder.parent.name}/{folder.name}", DIST_CTX)


# -- VAE


@torch.no_grad()
def test_vae_packs_as_torch_folds(vae_folder):
    assert rae.VAE(vae_folder).latent_shape == (32 * 32, 24)
    model, theirs = rae.VAE(vae_folder, image_size=48), diffusers.AutoencoderKL.from_pretrained(vae_folder)
    assert model.latent_shape == (36, 24) and not any(p.requires_grad for p in model.parameters())
    images, noise = torch.rand(2, 3, 48, 48), torch.randn(2, 36, 24)
    posterior = theirs.encode(images * 2 - 1).latent_dist
    sample = posterior.mean + posterior.std * F.fold(noise.mT, 12, 2, stride=2)
    for latents, z in ((model.encode(images), posterior.mean), (model.encode(images, noise), sample)):
        torch.testing.assert_close(latents, F.unfold((z - 0.11) * 0.36, 2, stride=2).mT)
    z = F.fold(latents.mT, 12, 2, stride=2) / 0.36 + 0.11
    torch.testing.assert_close(model.decode(latents), theirs.decode(z).sample / 2 + 0.5)
    assert model.encode(torch.rand(1, 3, 30, 60)).shape == (1, 36, 24)


def test_vae_folders(vae_folder, parts, tmp_path):
    for source in (vae_folder, str(vae_folder), vae_folder.parent):  # the last as FLUX's repository is
        assert isinstance(rae.open_autoencoder(source), rae.VAE)
    model = rae.VAE.from_pretrained(vae_folder)
    model.save_pretrained(tmp_path / "again")
    check_equal(rae.open_autoencoder(tmp_path / "again").eval(), model.eval())
    with pytest.raises(ValueError, match="no RAE but diffusers' AutoencoderKL"):
        rae.RAE.from_pretrained(vae_folder)
    with pytest.raises(ValueError, match="no AutoencoderKL"):
        rae.VAE(parts / "rae")
    with pytest.raises(ValueError, match="multiple of 8"):
        rae.VAE(vae_folder, image_size=44)
    path = vae_folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for change in ({"decoder.extra": torch.zeros(1)}, {"decoder.conv_in.bias": torch.zeros(3)}):
        save_file(weights | change, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="decoder"):
            rae.VAE(vae_folder)


@torch.no_grad()
def test_latents_of_a_vae_are_scaled_as_its_config_says(vae_folder):
    path, image = vae_folder / "config.json", torch.rand(1, 3, 32, 32)
    config = json.loads(path.read_text()) | {"shift_factor": None, "sample_size": [32, 32]}
    mean, std = torch.arange(6.0), torch.arange(1.0, 7.0)
    z = diffusers.AutoencoderKL.from_pretrained(vae_folder).encode(2 * image - 1).latent_dist.mean
    scaled = (z - mean[:, None, None]) / std[:, None, None] * 0.36
    path.write_text(json.dumps(config | {"latents_mean": mean.tolist(), "latents_std": std.tolist()}))
    model = rae.open_autoencoder(vae_folder)
    assert model.image_size == 32
    latents = model.encode(image)
    torch.testing.assert_close(latents, F.unfold(scaled, 2, stride=2).mT)
    torch.testing.assert_close(model.decode(latents), model.vae.decode(z).sample / 2 + 0.5)
    for change, message in (
        ({"latents_mean": [0.0] * 6}, "must be 6 numbers"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "must be 6 numbers"),
        ({"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6, "shift_factor": 0.1}, "no shift_factor"),
        ({"latents_mean": [0.0] * 6, "latents_std": [1.0] * 5 + [0.0]}, "scales latents by"),
        ({"scaling_factor": None}, "scales latents by None"),
        ({"in_channels": 4}, "4 to 3 channels|conv_in"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            rae.open_autoencoder(vae_folder)


def test_text_to_image_with_a_vae(vae_folder, parts, tmp_path):
    dit = {"width": 32, "depth": 1, "heads": 2}
    shape = rae.VAE(vae_folder).latent_shape
    model = rae.TextToImage(str(parts / "language-model"), dit, shape, str(vae_folder))
    model.save_pretrained(tmp_path / "t2i")
    model = common.load_model(rae.TextToImage, str(tmp_path / "t2i"), "", DIST_CTX)
    assert isinstance(model.autoencoder, rae.VAE)


# -- Scale-RAE

SIGLIP = "google/siglip2-so400m-patch14-224"
LANGUAGE_MODEL = {
    "vocab_size": 528, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
CONFIG = LANGUAGE_MODEL | {
    "model_type": "cambrian_qwen", "architectures": ["ScaleRAEQwenForCausalLM"], "rope_scaling": None,
    "torch_dtype": "float32", "mm_vision_tower_aux_list": [SIGLIP], "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -1, "vision_loss_mode": "query", "diffusion_model_hidden_size": 32,
    "diffusion_model_depth": 2, "diffusion_model_heads": 2, "diffusion_model_channels": 24,
    "diffusion_base_dim": None, "diffusion_norm_stats_path": None,
}  # fmt: skip
WIDE = {"diffusion_model_hidden_size": [32, 48], "diffusion_model_depth": [2, 2]}
WIDE |= {"diffusion_model_heads": [2, 4]}


@functools.cache
def scale_rae(size: str) -> tuple[dict, dict[str, torch.Tensor], rae.TextToImage]:
    """The config.json, the released weights and the model that they are of. wide: with the DDT head."""
    torch.manual_seed(0)
    head = (48, 2, 4) if size == "wide" else None
    dit = {"width": 32, "depth": 2, "heads": 2, "condition_width": 20, "head": head}
    model = rae.TextToImage({"model_type": "qwen2"} | LANGUAGE_MODEL, dit, (16, 24)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    for block in model.dit.blocks:
        block.mlp.zero_padding()
    return CONFIG | (WIDE if head else {}), released_weights(model), model


def released_weights(model: rae.TextToImage) -> dict[str, torch.Tensor]:
    """The model's weights with the keys and shapes of Scale-RAE's files."""
    dit, weights = model.dit, {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "language_model":
            name = rest
        elif part in ("latent_queries", "mm_projector"):
            name = f"model.{name}"
        elif part == "dit":
            module, dot, rest = rest.partition(".")
            if module in ("x_embedder", "s_embedder"):
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
                rest = f"proj.{rest}"
                if dit.head:  # the two have each other's names
                    module = "s_embedder" if module == "x_embedder" else "x_embedder"
            name = f"diff_head.model.{module.replace('blocks', 'dit_blocks')}{dot}{rest}"
        weights[name] = tensor.clone()
    del weights["diff_head.model.t_embedder.W"]
    for number, block in enumerate(dit.blocks):  # the hidden width is not padded
        mlp = f"diff_head.model.dit_blocks.{number}.mlp"
        for name in (f"{mlp}.w12.weight", f"{mlp}.w12.bias"):
            weights[name] = weights[name].unflatten(0, (2, -1))[:, : block.mlp.hidden].flatten(0, 1)
        weights[f"{mlp}.w3.weight"] = weights[f"{mlp}.w3.weight"][:, : block.mlp.hidden].contiguous()
    ropes = {"enc_rope": dit.rope, "dec_rope": dit.head_rope} if dit.head else {"feat_rope": dit.rope}
    for name, rope in ropes.items():
        weights[f"diff_head.model.{name}.freqs_cos"] = rope[0].clone()
        weights[f"diff_head.model.{name}.freqs_sin"] = rope[1].clone()
    return weights


@pytest.fixture
def tokenizer(parts):
    return transformers.AutoTokenizer.from_pretrained(parts / "t2i")


def write(folder, config, tokenizer) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return str(folder)


def from_official(weights, **options) -> rae.TextToImage:
    return rae.from_official(weights, **{"language_model": LANGUAGE_MODEL} | options)


def save_shards(weights, folder) -> None:
    save_torch_state_dict(weights, folder, max_shard_size="50KB", safe_serialization=False)


def compress(content, path) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(zstandard.ZstdCompressor().compress(buffer.getvalue()))


def save_consolidated(weights, folder) -> None:
    wrapped = {re.sub(r"(layers\.\d+)", r"\1._orig_module", name): w for name, w in weights.items()}
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
def test_layouts_of_scale_rae_folders(layout, tokenizer, tmp_path, monkeypatch):
    config, weights, expected = scale_rae("narrow")
    folder = write(tmp_path, config, tokenizer)
    LAYOUTS[layout](weights, tmp_path)
    assert len(list(tmp_path.glob("*-of-*"))) > 2 or "shards" not in layout
    check_equal(rae.TextToImage.from_pretrained(folder), expected)
    if layout == "consolidated":
        monkeypatch.chdir(folder)
        for file in (f"{folder}/model.pth.zstd", "model.pth.zstd"):
            check_equal(rae.TextToImage.from_pretrained(file), expected)
        with pytest.raises(ValueError, match="no tokenizer: call set_tokenizer"):
            expected.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("size", ["narrow", "wide"])
def test_scale_rae_folder_opens_generates_and_saves(size, tokenizer, tmp_path):
    config, weights, expected = scale_rae(size)
    folder = write(tmp_path / "official", config, tokenizer)
    save_shards(weights, tmp_path / "official")
    model = rae.TextToImage.from_pretrained(folder)
    check_equal(model, expected)
    assert tokenizer.convert_ids_to_tokens([model.im_start, model.im_end]) == ["<im_start>", "<im_end>"]
    assert model.autoencoder_path == "scale-rae-siglip2-so400m" in convert.RELEASED
    assert model.alpha == rae.default_alpha((16, 24))
    assert model.language_model.model.rotary_emb.config.rope_parameters["rope_theta"] == 1000000
    noise = torch.ones(1, 16, 24)
    latents = model.generate(["a red star"], steps=2, guidance=2.0, noise=noise)
    assert latents.shape == (1, 16, 24) and latents.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    again = rae.TextToImage.from_pretrained(tmp_path / "saved").eval()
    check_equal(again, expected)
    assert again.autoencoder_path == model.autoencoder_path
    assert torch.equal(again.generate(["a red star"], steps=2, guidance=2.0, noise=noise), latents)


def test_released_text_to_image_by_name(tokenizer, hub, monkeypatch):
    config, weights, expected = scale_rae("narrow")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    for name, source in convert.RELEASED_TEXT_TO_IMAGE.items():
        assert source.startswith("nyu-visionx/Scale-RAE-Qwen")
        write(hub / source, config, tokenizer)
        save_shards(weights, hub / source)
        check_equal(rae.TextToImage.from_pretrained(name), expected)


@pytest.mark.parametrize("size", ["narrow", "wide"])
def test_scale_rae_loads_strictly(size):
    config, weights, expected = scale_rae(size)
    heads = config["diffusion_model_heads"]
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    for name in tied:  # one of them is enough
        check_equal(from_official({key: w for key, w in weights.items() if key != name}), expected)
    check_equal(from_official({k: w for k, w in weights.items() if "freqs_" not in k}, heads=heads), expected)
    # layers and blocks are alike: one of the language model, of the backbone and of the head stands for all
    names = [name for name in weights if not re.search(r"(layers|blocks)\.[03]\.", name)]
    for name in names:
        if name not in tied:
            with pytest.raises(ValueError, match=re.escape(name)):
                from_official({key: w for key, w in weights.items() if key != name}, heads=heads)
        with pytest.raises(ValueError):
            from_official(weights | {name: torch.cat([weights[name]] * 2)})
    for extra in ("extra", "diff_head.data_mean", "diff_head.model.extra", "aux_vision_head.0.weight",
                  "model.vision_tower.embeddings.weight", "model.layers.2.mlp.up_proj.weight"):  # fmt: skip
        with pytest.raises(ValueError, match=extra):
            from_official(weights | {extra: torch.zeros(1)})
    table = next(name for name in weights if name.endswith("freqs_sin"))
    with pytest.raises(ValueError, match=table):
        from_official(weights | {table: weights[table].flip(0)})


@pytest.mark.parametrize("condition", [{"num_classes": 3}, {"condition_width": 32}, {"condition_width": 20}])
def test_a_head_as_wide_as_the_backbone(condition):
    """Where the head begins is told by the width of the condition, or has to be said."""
    torch.manual_seed(0)
    is_class = "num_classes" in condition
    more = {"readd_time": True, "xavier": False} if is_class else {}
    expected = rae.DiT((16, 24), 32, 2, 2, head=(32, 3, 2), **condition, **more).eval()
    weights = {}
    for name, tensor in expected.state_dict().items():
        module, dot, rest = name.partition(".")
        if module in ("x_embedder", "s_embedder"):
            rest = f"proj.{rest}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
            if not is_class:
                module = {"x": "s", "s": "x"}[module[0]] + module[1:]
        weights[(module if is_class else module.replace("blocks", "dit_blocks")) + dot + rest] = tensor
    if condition != {"condition_width": 20}:
        with pytest.warns(UserWarning, match="give depth="):
            rae.from_official(weights, heads=2)
        check_equal(rae.from_official(weights, heads=2, depth=(2, 3)), expected)
    else:
        check_equal(rae.from_official(weights, heads=2), expected)
        with pytest.raises(ValueError, match="depth"):
            rae.from_official(weights, heads=2, depth=(3, 2))


def test_swiglu_of_another_width_is_not_padded():
    """85 hidden values are loaded into 88: two rows less could be padded too, and would mix up the halves."""
    weights, mlp = scale_rae("narrow")[1], "diff_head.model.dit_blocks.0.mlp"
    assert weights[f"{mlp}.w12.weight"].shape == (170, 32)
    for name, tensor in ((f"{mlp}.w12.weight", weights[f"{mlp}.w12.weight"][:-2]),
                         (f"{mlp}.w12.bias", weights[f"{mlp}.w12.bias"][:-1]),
                         (f"{mlp}.w3.weight", weights[f"{mlp}.w3.weight"][:, :-1])):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is"):
            from_official(weights | {name: tensor})


def test_options_that_contradict_scale_rae():
    _, weights, expected = scale_rae("narrow")
    config = expected.language_model.config
    for options in ({"language_model": config, "heads": 2, "width": 32, "depth": 2, "im_start": 516},
                    {"language_model": config.to_dict()}):  # fmt: skip
        check_equal(from_official(weights, **options), expected)
    for options in ({"language_model": None}, {"language_model": config.to_dict() | {"model_type": "llama"}},
                    {"language_model": LANGUAGE_MODEL | {"num_hidden_layers": 1}}, {"heads": 4},
                    {"heads": (2, 2)}, {"width": 64}, {"latent_shape": (16, 1152)}, {"im_start": 528},
                    {"colour": 1}):  # fmt: skip
        with pytest.raises(ValueError):
            from_official(weights, **options)


def test_untied_scale_rae(tokenizer, tmp_path):
    config, weights, _ = scale_rae("narrow")
    folder = write(tmp_path, config | {"tie_word_embeddings": False}, tokenizer)
    weights = weights | {"lm_head.weight": 2 * weights["lm_head.weight"]}
    with pytest.raises(ValueError, match="differ"):
        from_official(weights)
    save_file(weights, tmp_path / "model.safetensors")
    model = rae.TextToImage.from_pretrained(folder)
    assert torch.equal(model.language_model.lm_head.weight, weights["lm_head.weight"])
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        rae.TextToImage.from_pretrained(folder)


def test_damaged_scale_rae_folders(tokenizer, plain_language_model, tmp_path, hub):
    config, weights, _ = scale_rae("narrow")
    folder = tmp_path / "folder"

    def fails(message, change=None):
        write(folder, config | (change or {}), tokenizer)
        with pytest.raises(ValueError, match=message):
            rae.TextToImage.from_pretrained(folder)

    fails("no weights")
    save_consolidated(weights, folder)
    for change in ({"diffusion_model_heads": 4}, {"diffusion_model_hidden_size": [32, 48]},
                   {"num_hidden_layers": 1}, {"vision_loss_mode": "query-block"},
                   {"mm_use_im_start_end": False}, {"diffusion_norm_stats_path": "stats.pt"}):  # fmt: skip
        fails("config|keys|state dict", change)
    packed = (folder / "model.pth.zstd").read_bytes()
    for content in (b"no", packed[:-9], packed[: len(packed) // 2]):
        (folder / "model.pth.zstd").write_bytes(content)
        fails("damaged")
    compress({"model": Payload(tmp_path / "executed")}, folder / "model.pth.zstd")
    fails("more than tensors")
    torch.save(weights | {"extra": Payload(tmp_path / "executed")}, folder / "pytorch_model.bin")
    fails("more than tensors")
    assert not (tmp_path / "executed").exists()
    save_shards(weights, folder)  # shards come before the others
    next(folder.glob("pytorch_model-00002-of-*.bin")).unlink()
    fails("pytorch_model-00002-of-")
    (folder / "model.safetensors").write_bytes(b"no")
    fails("damaged")
    save_file(weights, folder / "model.safetensors")
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    fails("tokens, but weights for only 528")
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_language_model)
    fails("no <im_end> and no <im_start>")
    for missing in ("nothing", "org/name", str(tmp_path / "nothing/model.pth.zstd")):
        with pytest.raises(ValueError, match="no file"):
            rae.TextToImage.from_pretrained(missing)


def test_scale_rae_that_generates_in_the_latents_of_a_vae(tokenizer, tmp_path):
    """It generates in FLUX's latents, and reads SigLIP-2's, which have other channels."""
    config, weights, _ = scale_rae("narrow")
    weights = weights | {"model.mm_projector.0.weight": torch.randn(32, 40)}
    config = config | {"generation_alignment_tower": "black-forest-labs/FLUX.1-dev-res256"}
    config |= {"diffusion_base_dim": 96}
    write(tmp_path / "folder", config, tokenizer)
    save_shards(weights, tmp_path / "folder")
    model = rae.TextToImage.from_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "saved")
    again = rae.TextToImage.from_pretrained(tmp_path / "saved").eval()
    check_equal(again, model)
    for one in (model, again):
        assert (one.latent_shape, one.read_shape, one.alpha) == ((16, 24), (16, 40), 2.0)
        assert one.autoencoder_path == "black-forest-labs/FLUX.1-dev"
        assert one.reader_path == "scale-rae-siglip2-so400m"
