"""Stage 1: statistics, losses, discriminator, recipes, runs. The authors' numbers are in test_golden.py."""

import json
import shutil
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import TINY_DECODER, compiled_cheaply
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import rae
import train_decoder
from train_decoder import Backbone, Discriminator, Perceptual, latent_statistics

CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


@pytest.fixture(scope="module")
def model(parts):
    return rae.RAE.from_pretrained(parts / "rae").eval()


@pytest.fixture(scope="module")
def backbone(parts):
    return Backbone.from_pretrained(str(parts / "encoder"))


# -- latents


def test_statistics_are_exact(model):
    """For any split into batches: torch.var over everything at once."""
    images = torch.randint(256, (23, 3, 32, 32), dtype=torch.uint8)
    latents = model.encode(images / 255).double()
    expected = (latents.var(dim=0, unbiased=False) + 1e-5).sqrt().float()
    for sizes in ([23], [5, 5, 5, 5, 3]):
        mean, std = latent_statistics(model, ({"image": part} for part in images.split(sizes)), CPU)
        torch.testing.assert_close(std, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mean, latents.mean(dim=0).float(), atol=1e-6, rtol=1e-6)


def test_noise_has_the_scale_of_the_tokens(model):
    tokens, noise = torch.randn(2, 16, 24), torch.randn(2, 16, 24)
    sigma = torch.tensor([0.5, 0.0])
    mean, std = torch.randn(16, 24), torch.rand(16, 24) + 0.5
    other = rae.RAE(**model._hub_mixin_config)
    other.latent_mean.copy_(mean), other.latent_std.copy_(std)
    noisy = other.add_noise((tokens - mean) / std, noise, sigma) * std + mean
    torch.testing.assert_close(noisy, tokens + sigma[:, None, None] * noise)


# -- features


@pytest.mark.parametrize("patch, family", [(8, "siglip_vision_model"), (14, "dinov2"),
    (14, "dinov2_with_registers"), (16, "dinov3_vit"), (16, "vit_mae"), (16, "vit")])  # fmt: skip
@torch.no_grad()
def test_every_family_gives_its_inner_features(patch, family):
    """And the last of them, normalised without scale and shift, is what the encoder returns."""
    size, eps = 2 * patch, 1e-6
    encoder = rae.Encoder(
        {"model_type": family, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "image_size": size, "patch_size": patch, "layer_norm_eps": eps}
    )  # fmt: skip
    assert len(encoder.blocks) == 3
    for side in (size, 2 * size):  # beyond the grid of training, positions are interpolated
        tokens, channels = (side // patch) ** 2, 24
        pixels = torch.randn(2, 3, side, side)
        features = encoder.features(pixels, (2, 0, 2))
        assert [x.shape for x in features] == [(2, tokens, channels)] * 3
        assert torch.equal(features[0], features[2]) and not torch.equal(features[0], features[1])
        last = F.layer_norm(features[0], (24,), eps=eps)
        torch.testing.assert_close(last, encoder(pixels), atol=1e-5, rtol=1e-4)


def test_perceptual_distances(backbone):
    perceptual = Perceptual("encoder", backbone)
    one, other = (perceptual.features(torch.rand(2, 3, 32, 32) * 2 - 1) for _ in range(2))
    for distance in (perceptual.distance, train_decoder.gram_distance):
        assert distance(one, other).shape == (2,) and (distance(one, other) > 0).all()
        assert torch.equal(distance(one, one), torch.zeros(2))
    shuffled = torch.randperm(16)
    features = torch.randn(2, 24, 16)
    gram = train_decoder.gram_matrix(features)
    torch.testing.assert_close(train_decoder.gram_matrix(features[:, :, shuffled]), gram)  # no places
    torch.testing.assert_close(gram[0, 3, 5], features[0, 3] @ features[0, 5] / (24 * 16))


# -- discriminator


def test_discriminator_learns_to_tell_and_leaves_its_backbone(backbone):
    torch.manual_seed(0)
    model = Discriminator(backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert not any("backbone" in name for name in model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    real, fake = torch.rand(8, 3, 40, 40) * 2 - 1, F.interpolate(torch.rand(8, 3, 5, 5) * 2 - 1, 40)
    for _ in range(40):
        loss = train_decoder.hinge_loss(model(real), model(fake))
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert model(real).shape == (8, 5 * 16) and loss < 0.6
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_released_heads_are_loaded_strictly(parts, backbone):
    weights, folder = Discriminator(backbone).state_dict(), str(parts / "encoder")
    assert isinstance(Discriminator.from_official(weights, folder), Discriminator)
    double = Discriminator.from_official(weights, folder).double()
    assert {p.dtype for p in double.backbone.parameters()} == {torch.float64}
    without = {name: value for name, value in weights.items() if name != "heads.0.2.bias"}
    for changed, name in ((without, "heads.0.2.bias"), (weights | {"heads.9": torch.zeros(1)}, "heads.9")):
        with pytest.raises(ValueError, match=name):
            Discriminator.from_official(changed, folder)


def test_rounding_to_256_levels():
    levels = train_decoder.to_256_levels(torch.linspace(-1.5, 1.5, 10_001))
    assert len(levels.unique()) == 256 and (levels.min(), levels.max()) == (-1, 1)


def test_adaptive_weight_is_bounded():
    assert train_decoder.adaptive_weight(torch.ones(3, 4), torch.zeros(3, 4)) == 1e4
    assert train_decoder.adaptive_weight(torch.ones(3, 4), 2 * torch.ones(3, 4)) == pytest.approx(0.5)


# -- recipes


@pytest.mark.parametrize("name", train_decoder.PRESETS)
def test_presets_fit_together(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", "--preset", name])
    config = common.parse(train_decoder.Config, "", train_decoder.PRESETS)
    assert config.disc_start <= config.gan_start < config.steps
    grid = {"dinov2": 14, "siglip2-base": 16, "mae": 16, "so400m": 14, "webssl": 14}
    patch = next((patch for part, patch in grid.items() if part in config.encoder), None)
    if patch:  # 16 x 16 tokens, and the papers' image sizes
        assert config.encoder_size in (None, 16 * patch)
        with torch.device("meta"):
            decoder = rae.Decoder((256, 768), config.patch_size, **rae.DECODERS[config.decoder])
            size = 224 if name.startswith("scale") else 256
            assert decoder(torch.zeros(1, 256, 768)).shape == (1, 3, size, size)


def test_published_numbers():
    """RAE's training config and Scale-RAE's table 7."""
    recipe = train_decoder.PRESETS["rae-dinov2-b"]
    epochs = {"steps": 16, "warmup": 1, "disc_warmup": 1, "disc_start": 6, "gan_start": 8}
    assert {name: recipe[name] / 2502 for name in epochs} == epochs
    numbers = {"lr": 2e-4, "disc_lr": 2e-4, "final_lr": 0.1, "tau": 0.8, "gan_weight": 0.75, "ema": 0.9978}
    assert (numbers | {"batch": 512, "clip": 0}).items() <= recipe.items()
    for name, lr, disc_lr, starts in (("siglip2", 4e-4, 5e-5, (7, 8)), ("webssl", 2e-4, 2e-5, (10, 11))):
        recipe = train_decoder.PRESETS[f"scale-rae-{name}"]
        numbers = {"lr": lr, "disc_lr": disc_lr, "gram_weight": 100, "gan_weight": 10, "tau": 0}
        assert (numbers | {"steps": 80 * 2500, "warmup": 5000}).items() <= recipe.items()
        assert tuple(recipe[key] / 2500 for key in ("disc_start", "gan_start")) == starts


# -- runs


def flags(parts, out, *more) -> list:
    fixed = ["--statistics", 4, "--batch", 4, "--workers", 0, "--log-every", 1, "--muon", 0]
    return ["train_decoder.py", "--encoder", parts / "encoder", "--out", out, *fixed, *more]


def test_the_loss_is_the_sum_of_its_parts_in_bf16_too(world, parts, tmp_path):
    """Gram matrices without a perceptual loss; the discriminator's weights and state stay fp32."""
    more = ["--discriminator", parts / "encoder", "--gram-weight", 10, "--gan-weight", 0.5, "--dtype", "bf16"]
    world(1, *flags(parts, tmp_path, *more, "--steps", 2)).wait()
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert "perceptual_loss" not in row
    total = row["l1_loss"] + 10 * row["gram_loss"] + row["gan_weight"] * row["gan_loss"]
    assert row["loss"] == pytest.approx(total, rel=1e-4)
    [file] = (tmp_path / "checkpoints/0000002").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_ema_weights_are_saved_and_shown_when_compiled_too(world, parts, tmp_path):
    """Large steps and a slow EMA: the two weights decode differently, and the sample grid is the EMA's."""
    more = ["--steps", 3, "--lr", 0.05, "--warmup", 0, "--ema", 0.9999, "--compile"]
    assert "compiles" in world(1, *flags(parts, tmp_path, *more), patch=compiled_cheaply).wait()
    model = rae.RAE.from_pretrained(tmp_path / "model")
    [file] = (tmp_path / "checkpoints/0000003").glob("*.safetensors")
    saved = load_file(file)
    online = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    assert all(torch.equal(saved[f"ema.{key}"], model.state_dict()[key]) for key in online)
    source = data.open_source(train_decoder.Config().data, 32, 1)
    images = next(data.Loader(source, 16, workers=0))["image"] / 255
    shown = np.array(Image.open(tmp_path / "samples/0000003.png")).astype(int)
    differences = []
    for weights in (model.state_dict(), model.state_dict() | online):
        model.load_state_dict(weights)
        with torch.no_grad():
            pairs = torch.stack([images, model.decode(model.encode(images))], dim=1).flatten(0, 1)
        common.save_image(tmp_path / "grid.png", common.image_grid(pairs, 8, scale=2))
        differences.append(np.abs(np.array(Image.open(tmp_path / "grid.png")).astype(int) - shown).max())
    assert differences[0] <= 1 and differences[1] > 5


def test_starting_from_another_model(world, parts, tmp_path):
    """Its encoder, decoder and statistics: at a learning rate of almost 0, all of it is saved again."""
    still = ["--lr", 1e-30, "--muon", 0, "--steps", 1, "--batch", 2, "--workers", 0]
    world(1, "train_decoder.py", "--init", parts / "rae", *still, "--out", tmp_path).wait()
    expected = rae.RAE.from_pretrained(parts / "rae").state_dict()
    torch.testing.assert_close(rae.RAE.from_pretrained(tmp_path / "model").state_dict(), expected)


def test_lpips_without_its_weights_says_so(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(OSError, match="--perceptual lpips downloads VGG16, which failed"):
        Perceptual("lpips")


def test_a_damaged_encoder_is_refused(parts, tmp_path):
    shutil.copytree(parts / "encoder", tmp_path / "encoder")
    file = tmp_path / "encoder/model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if ".layers.1." not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="weights are missing or unknown"):
        rae.Encoder(str(tmp_path / "encoder"))
    save_file(weights | {"encoder.layers.7.x": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="encoder.layers.7.x"):
        rae.Encoder(str(tmp_path / "encoder"))
    save_file(weights | {"decoder.layers.7.x": torch.zeros(1)}, file, {"format": "pt"})
    rae.Encoder(str(tmp_path / "encoder"))  # another part of the file, as MAE's decoder


def test_the_size_of_an_encoders_input(tmp_path):
    """DINOv2's table of positions is larger than the images that its processor makes."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(
        crop_size={"height": 28, "width": 28}, size={"shortest_edge": 32}
    )
    processor.save_pretrained(tmp_path)
    model = rae.RAE(str(tmp_path), TINY_DECODER | {"patch_size": 8})
    assert (model.encoder_size, model.latent_shape) == (28, (4, 24))


def test_latents_of_another_shape(model):
    with pytest.raises(ValueError, match="this autoencoder has"):
        model.decode(torch.zeros(1, 9, 24))
    with pytest.raises(ValueError, match="no square grid"):
        model.decoder(torch.zeros(1, 15, 24))


def test_upsampling_decoder(parts):
    """A token becomes a square of any size, whatever the encoder's patches are (RAE section 3)."""
    size = TINY_DECODER | {"patch_size": 16}
    model = rae.RAE(str(parts / "encoder"), size)
    assert model.latent_shape == (16, 24) and model.image_size == 64
    assert model.decode(model.encode(torch.rand(1, 3, 32, 32))).shape == (1, 3, 64, 64)
