"""Stage 1's losses, discriminator, statistics and recipes; the numbers of the authors' are in test_golden."""

import itertools
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import rae
import train_decoder
from train_decoder import Backbone, Discriminator, Perceptual, augment, latent_statistics, noise_scale

CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


@pytest.fixture(scope="module")
def model(parts):
    return rae.RAE.from_pretrained(parts / "rae").eval()


@pytest.fixture(scope="module")
def backbone(parts):
    return Backbone.from_pretrained(str(parts / "encoder"))


# -- latents


@pytest.mark.parametrize("per", ["token", "channel"])
def test_statistics_are_exact(model, per):
    """Whatever the batches are: torch.var over everything at once."""
    images = torch.randint(256, (23, 3, 32, 32), dtype=torch.uint8)
    latents = model.encode(images / 255).double()
    axes = (0,) if per == "token" else (0, 1)
    for sizes in ([23], [5, 5, 5, 5, 3]):
        batches = ({"image": part} for part in images.split(sizes))
        mean, std = latent_statistics(model, batches, per, CPU)
        expected = (latents.var(dim=axes, unbiased=False, keepdim=True) + 1e-5).sqrt().float()
        torch.testing.assert_close(std, expected[0].expand_as(std), atol=1e-6, rtol=1e-6)
        expected = latents.mean(dim=axes, keepdim=True).float()[0].expand_as(mean)
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-6)


def test_noise_scales():
    u = (torch.arange(100_000) + 0.5) / 100_000
    normal, uniform = (noise_scale(u, 0.8, name) for name in ("normal", "uniform"))
    half_normal = torch.distributions.HalfNormal(0.8)
    assert normal.mean().item() == pytest.approx(half_normal.mean.item(), rel=1e-3)
    assert normal.var().item() == pytest.approx(half_normal.variance.item(), rel=1e-3)
    assert uniform.mean().item() == pytest.approx(0.4) and uniform.max().item() == pytest.approx(
        0.8, rel=1e-4
    )


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
        found = encoder(pixels)
        torch.testing.assert_close(F.layer_norm(features[0], (24,), eps=eps), found, atol=1e-5, rtol=1e-4)


def test_encoding_in_chunks_changes_nothing(model, monkeypatch):
    images = torch.rand(130, 3, 40, 40)
    encoded, sizes = model.encode(images), []
    model.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    parts = [model.encode(part) for part in images.split(65)]
    model.encode(images)
    assert sizes == [65, 65, 128, 2]
    torch.testing.assert_close(encoded, torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_a_larger_input_keeps_the_weights(model):
    same, larger = model.resized(32), model.resized(48)
    images = torch.rand(2, 3, 32, 32)
    latents = model.encode(images)
    assert torch.equal(same.encode(images), latents) and torch.equal(
        same.decode(latents), model.decode(latents)
    )
    assert (larger.latent_shape, larger.image_size) == ((36, 24), 48)
    assert larger.decode(larger.encode(torch.rand(1, 3, 48, 48))).shape == (1, 3, 48, 48)
    old, new = (x.decoder.decoder_pos_embed[0, 1:].T.view(32, -1).mean(dim=1) for x in (model, larger))
    torch.testing.assert_close(old, new, atol=0.1, rtol=0)


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


def test_spectral_norm_finds_the_largest_singular_value():
    layer = train_decoder.SpectralConv1d(24, 24, 9)
    for _ in range(200):
        layer.iterate()
    largest = torch.linalg.matrix_norm(layer.weight_orig.flatten(1), 2)
    sigma = layer.weight_u @ layer.weight_orig.flatten(1) @ layer.weight_v
    torch.testing.assert_close(sigma, largest, rtol=1e-4, atol=0)


def test_damaged_discriminators(parts, backbone):
    weights = Discriminator(backbone).state_dict()
    folder = str(parts / "encoder")
    assert isinstance(Discriminator.from_official(weights, folder), Discriminator)
    with pytest.raises(ValueError, match="heads=77"):
        Discriminator.from_official(weights, folder, heads=77)
    as_double = Discriminator.from_official(weights, folder).double()
    assert {p.dtype for p in as_double._backbone[0].parameters()} == {torch.float64}
    without = {name: value for name, value in weights.items() if name != "heads.0.2.bias"}
    with pytest.raises(ValueError, match="heads.0.2.bias is missing"):
        Discriminator.from_official(without, folder)
    with pytest.raises(ValueError, match="heads.9 is unknown"):
        Discriminator.from_official(weights | {"heads.9": torch.zeros(1)}, folder)
    with pytest.raises(ValueError, match="no state dict of a DINO"):
        Discriminator.from_official(weights, {"blocks.0.norm1.weight": torch.zeros(1)})


def test_augmentation_moves_and_recolours():
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    middle = torch.full((7, 1), 0.5)  # no move, no change of brightness, saturation or contrast
    torch.testing.assert_close(augment(image, middle), image)
    for place, axis in ((0, 2), (1, 3)):
        draws = middle.clone()
        draws[place] = 0.999  # by the most, an eighth of the side
        moved = augment(image, draws)
        assert torch.equal(moved.narrow(axis, 14, 2), torch.zeros_like(moved.narrow(axis, 14, 2)))
        torch.testing.assert_close(moved.narrow(axis, 0, 14), image.narrow(axis, 2, 14))
    grey = middle.clone()
    grey[3] = 0.0
    grey = augment(image, grey)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


def test_rounding_to_256_levels():
    levels = train_decoder.to_256_levels(torch.linspace(-1.5, 1.5, 10_001))
    assert len(levels.unique()) == 256 and (levels.min(), levels.max()) == (-1, 1)


def test_adaptive_weight_is_bounded():
    weight = train_decoder.adaptive_weight(torch.ones(3, 4), torch.zeros(3, 4))
    assert weight == 1e4
    assert train_decoder.adaptive_weight(torch.ones(3, 4), 2 * torch.ones(3, 4)) == pytest.approx(0.5)


# -- recipes


@pytest.mark.parametrize("name", train_decoder.PRESETS)
def test_presets_fit_together(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", "--preset", name, "--decoder", "ViT-S"])
    config = common.parse(train_decoder.Config, "", train_decoder.PRESETS)
    assert config.decoder == "ViT-S" and config.disc_start <= config.gan_start < config.steps
    grid = {"dinov2": 14, "siglip2-base": 16, "mae": 16, "so400m": 14, "webssl": 14}
    patch = next((patch for part, patch in grid.items() if part in config.encoder), None)
    if patch:  # 16 x 16 tokens, and the papers' image sizes
        assert (config.encoder_size or {14: 224, 16: 256}[patch]) == 16 * patch
        assert config.patch_size * 16 == (224 if name.startswith("scale") else 256)


def test_published_numbers(monkeypatch):
    """RAE's training config and Scale-RAE's table 7."""
    recipe = train_decoder.PRESETS["rae-dinov2-b"]
    epochs = {"steps": 16, "warmup": 1, "disc_warmup": 1, "disc_start": 6, "gan_start": 8}
    assert {name: recipe[name] / 2502 for name in epochs} == epochs
    numbers = {"lr": 2e-4, "disc_lr": 2e-4, "final_lr": 0.1, "tau": 0.8, "gan_weight": 0.75, "ema": 0.9978}
    assert numbers.items() <= recipe.items() and recipe["batch"] == 512 and recipe["clip"] == 0
    for name, lr, disc_lr, starts in (("siglip2", 4e-4, 5e-5, (7, 8)), ("webssl", 2e-4, 2e-5, (10, 11))):
        recipe = train_decoder.PRESETS[f"scale-rae-{name}"]
        assert (recipe["lr"], recipe["disc_lr"], recipe["gram_weight"], recipe["gan_weight"]) == (
            lr,
            disc_lr,
            100,
            10,
        )
        assert tuple(recipe[key] / 2500 for key in ("disc_start", "gan_start")) == starts
        assert (recipe["steps"], recipe["warmup"], recipe["tau"]) == (80 * 2500, 5000, 0)


def test_gram_alone_is_gram_alone(world, parts, tmp_path):
    """And bf16 compute leaves the discriminator's own state in fp32."""
    flags = ["--encoder", parts / "encoder", "--discriminator", parts / "encoder", "--out", tmp_path]
    flags += ["--statistics", 4, "--batch", 4, "--steps", 2, "--log-every", 1, "--workers", 0]
    world(1, "train_decoder.py", *flags, "--gram-weight", 10, "--gan-weight", 0.5, "--dtype", "bf16").wait()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "perceptual" not in rows[0]
    total = rows[0]["l1"] + 10 * rows[0]["gram"] + rows[0]["gan_weight"] * rows[0]["gan"]
    assert rows[0]["loss"] == pytest.approx(total, rel=1e-4)
    [file] = (tmp_path / "checkpoints/0000002").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_what_is_shown_and_saved_is_the_average(world, parts, tmp_path):
    """A large step with a slow average: the two weights decode differently, the grid is the average's."""
    flags = ["--encoder", parts / "encoder", "--out", tmp_path, "--statistics", 4, "--batch", 4]
    flags += ["--steps", 3, "--lr", 0.05, "--warmup", 0, "--workers", 0, "--ema", 0.9999]
    world(1, "train_decoder.py", *flags).wait()
    average = rae.RAE.from_pretrained(tmp_path / "model")
    [file] = (tmp_path / "checkpoints/0000003").glob("*.safetensors")
    online = {k.removeprefix("model."): v for k, v in load_file(file).items() if k.startswith("model.")}
    images = next(data.Loader(data.open_source("nano", 32, 1), 16, workers=0))["image"] / 255
    saved = np.array(Image.open(tmp_path / "samples/0000003.png")).astype(int)
    differences = []
    for weights in (average.state_dict(), average.state_dict() | online):
        average.load_state_dict(weights)
        with torch.no_grad():
            pairs = torch.stack([images, average.decode(average.encode(images))], dim=1).flatten(0, 1)
        common.save_image(tmp_path / "own.png", common.image_grid(pairs, 8, scale=2))
        own = np.array(Image.open(tmp_path / "own.png")).astype(int)
        differences.append(np.abs(own - saved).max())
    assert differences[0] <= 1 and differences[1] > 5


def test_starting_from_another_model(world, parts, tmp_path):
    """Its encoder, decoder and statistics: where nothing is learnt, all of it is saved again."""
    still = ["--lr", 0, "--muon", 0, "--steps", 1, "--batch", 2, "--workers", 0]
    flags = [*still, "--data", "nano:text", "--out"]
    world(1, "train_decoder.py", "--init", parts / "rae", *flags, tmp_path / "init").wait()
    flags = [*flags, tmp_path / "remade", "--generator", parts / "t2i"]
    world(1, "train_decoder.py", *flags).wait()
    given = rae.RAE.from_pretrained(parts / "rae").state_dict()
    for out in ("init", "remade"):  # a generator brings its own autoencoder
        torch.testing.assert_close(rae.RAE.from_pretrained(tmp_path / out / "model").state_dict(), given)
    losses = [json.loads((tmp_path / out / "metrics.jsonl").read_text())["l1"] for out in ("init", "remade")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)  # of other latents
    other = ["--init", parts / "rae", "--patch-size", 4, "--out", tmp_path / "other"]
    assert "the model to start from has 8" in world(1, "train_decoder.py", *other).wait(1)


def test_a_generator_needs_captions(world, parts, tmp_path):
    common.save_image(tmp_path / "images/0.png", torch.zeros(3, 32, 32))
    flags = ["--data", tmp_path / "images", "--out", tmp_path / "out", "--batch", 1, "--workers", 0]
    printed = world(1, "train_decoder.py", *flags, "--generator", parts / "t2i").wait(1)
    assert "has images without captions" in printed and "Traceback" not in printed


def test_latents_remade(parts):
    """Noised to one t below 0.8 a step, each number by noise of its own, and sampled from there by the asked
    caption in four steps and what is left of a fifth."""
    generator = rae.TextToImage.from_pretrained(parts / "t2i").eval()
    latents = torch.randn(64, 16, 24, generator=torch.Generator().manual_seed(0))
    numbers, captions = list(range(64)), ["a red circle"] * 64
    torch.nn.init.zeros_(generator.dit.final_layer.linear.weight)
    torch.nn.init.zeros_(generator.dit.final_layer.linear.bias)
    starts = []
    for step in range(20):  # a generator that stays where it is
        noised = train_decoder.remade(latents, generator, captions, 7, numbers, step)
        starts.append(1 - ((noised * latents).mean() / latents.square().mean()).item())
        noise = noised - (1 - starts[-1]) * latents
        assert noise.std().item() == pytest.approx(starts[-1], abs=0.01)
    assert 0 < min(starts) < 0.2 and 0.6 < max(starts) < 0.81
    some = train_decoder.remade(latents[5:7], generator, captions[:2], 7, [5, 6], 19)
    torch.testing.assert_close(some, noised[5:7])  # whatever the batch

    torch.nn.init.normal_(generator.dit.final_layer.linear.weight)
    made = train_decoder.remade(latents[:2], generator, captions[:2], 7, [0, 1], 19)
    start = 0.8 * data.uniform_draws(1, 7, [19], "remade").item()
    linear = start / (generator.alpha - (generator.alpha - 1) * start)
    grid = torch.arange(math.ceil(4 / linear) + 1).double() / math.ceil(4 / linear)
    times = [t for t in rae.shift_time(grid, generator.alpha).tolist() if t < start][::-1]
    assert len(times) in (4, 5)
    x, condition = noised[:2], generator.condition(captions[:2])
    for t, after in itertools.pairwise([start, *times]):
        with torch.no_grad():
            x = x + (after - t) * generator.dit(x, torch.full((2,), t), condition)
    assert not torch.allclose(x, noised[:2], atol=0.1)
    torch.testing.assert_close(made, x, atol=1e-4, rtol=1e-4)


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
    model = rae.RAE(str(tmp_path), rae.DECODERS["nano"] | {"patch_size": 8})
    assert (model.encoder_size, model.latent_shape) == (28, (4, 24))


def test_latents_of_another_shape(model):
    with pytest.raises(ValueError, match="this autoencoder has"):
        model.decode(torch.zeros(1, 9, 24))
    with pytest.raises(ValueError, match="no square grid"):
        model.decoder(torch.zeros(1, 15, 24))


def test_checkpointed_layers_have_the_same_gradients(model):
    other = rae.RAE(**model._hub_mixin_config)
    other.load_state_dict(model.state_dict())
    common.checkpoint_blocks(other.decoder.decoder_layers)
    latents = torch.randn(2, 16, 24)
    for each in (model, other):
        each.zero_grad()
        each.decode(latents).square().mean().backward()
    pairs = itertools.zip_longest(model.parameters(), other.parameters())
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.requires_grad)
    model.zero_grad()


def test_upsampling_decoder(parts):
    """A token becomes a square of any size, whatever the encoder's patches are (RAE section 3)."""
    size = rae.DECODERS["nano"] | {"patch_size": 16}
    model = rae.RAE(str(parts / "encoder"), size)
    assert model.latent_shape == (16, 24) and model.image_size == 64
    assert model.decode(model.encode(torch.rand(1, 3, 32, 32))).shape == (1, 3, 64, 64)


def test_uniform_draws_depend_on_the_sample_alone():
    all_at_once = data.uniform_draws(7, 3, [5, 6, 7], "real")
    assert torch.equal(all_at_once[:, 1:2], data.uniform_draws(7, 3, [6], "real"))
    assert not torch.equal(all_at_once, data.uniform_draws(7, 3, [5, 6, 7], "fake"))


def test_lpips_without_its_weights_says_so(world, parts, tmp_path):
    flags = ["--encoder", parts / "encoder", "--out", tmp_path, "--statistics", 4, "--batch", 4]
    printed = world(1, "train_decoder.py", *flags, "--perceptual", "lpips", patch=no_downloads).wait(1)
    assert "error: --perceptual lpips downloads VGG16, which failed" in printed and "Traceback" not in printed


def no_downloads() -> None:
    import urllib.error
    import urllib.request

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    urllib.request.urlopen = refuse
