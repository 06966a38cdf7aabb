"""Class labels to images: labels of data, latents on disk, training, released files."""

import copy
import json
import math
import sys
import tarfile
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import TINY_DIT
from PIL import Image
from safetensors.torch import load_file

import common
import data
import rae
import train_decoder
import train_t2i
from nano import shapes

FLAGS = ["--condition", "class", "--batch", 4, "--workers", 0, "--muon", 0, "--dit-lr", 0.01, "--warmup", 1,
         "--log-every", 1]  # fmt: skip


def tiny(num_classes: int | None = 48, **changes) -> rae.ClassToImage:
    """With random weights everywhere: a new DiT's velocity is zero."""
    model = rae.ClassToImage(TINY_DIT | {"num_classes": num_classes} | changes, (16, 24))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def losses(out) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if name.endswith("loss") or "val_" in name]


# -- labels


def png(value: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 36), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_labels_of_folders_tars_and_json(tmp_path):
    for number, name in enumerate(("n01", "n02", "n03")):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "a.png").write_bytes(png(number))
    source = data.open_source(str(tmp_path / "folders"), 32, 0)
    assert source.classes == 3
    for number in range(3):
        assert source[number]["label"] == source[number]["image"][0, 0, 0]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        files = {"0.png": png(1), "0.cls": b"7", "1.png": png(1), "1.json": b'{"label": 5}',
                 "2.png": png(1), "3.png": png(1), "3.cls": b"seven"}  # fmt: skip
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    source = data.open_source(str(tmp_path / "tars"), 32, 0)
    assert source.classes is None
    [batch] = data.OnePass(source, 8, workers=0)
    assert sorted(map(str, batch["label"])) == ["5", "7", "None"] and len(batch["skipped"]) == 1


def test_nano_classes_are_single_objects_of_every_pair():
    source = data.open_source("nano:classes", 48, 3)
    drawn = [source[number] for number in range(400)]
    assert source.classes == 48 and {sample["label"] for sample in drawn} == set(range(48))
    for number, sample in enumerate(drawn[:40]):
        [thing] = shapes.draw("classes", 3, number).objects
        assert (thing.shape, thing.color) == shapes.PAIRS[sample["label"]]
        assert sample["caption"] == shapes.an(f"{thing.color} {thing.shape}")


@pytest.mark.parametrize(
    "flags, classes, message",
    [
        ({}, None, "give --num-classes"),
        ({"num_classes": 4}, 48, "has 48 classes, not 4"),
        ({"num_classes": 4, "condition": "none"}, None, "needs --condition class"),
    ],
)
def test_wrong_numbers_of_classes(flags, classes, message):
    config = train_t2i.Config(**{"condition": "class"} | flags)
    with pytest.raises(ValueError, match=message):
        train_t2i.count_classes(config, SimpleNamespace(classes=classes))


def test_models_and_data_that_do_not_fit():
    config = train_t2i.Config(condition="class", init="x")
    for shape, classes, message in (((16, 24), 8, "has classes 48, not 8"), ((4, 24), 48, "has latents")):
        with pytest.raises(ValueError, match=message):
            train_t2i.build_model(config, tiny(), shape, classes, None)
    with pytest.raises(ValueError, match="without labels"):
        train_t2i.prepare(config, tiny(), {"label": [3, None], "image_index": [0, 1]})


def test_validation_classes_have_the_same_names(parts, tmp_path):
    for path in ("train/cat", "train/dog", "val/0", "val/1"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / path / "0.png")
    folders = {"data": str(tmp_path / "train"), "val_data": str(tmp_path / "val")}
    config = train_t2i.Config(condition="class", **folders)
    autoencoder = rae.RAE.from_pretrained(parts / "rae")
    with pytest.raises(ValueError, match="class folders have other names"):
        train_t2i.open_data(config, None, autoencoder, None)
    config.val_data, config.flip = "", True
    sources = train_t2i.open_data(config, None, autoencoder, None)
    assert [source.sources[0].transform.flip for source in sources] == [True, False]


# -- training


def test_several_draws_are_as_if_the_images_came_that_often():
    torch.manual_seed(0)
    model, labels, x_t, t = tiny(), torch.tensor([3, 7]), torch.randn(4, 16, 24), torch.rand(4)
    dropped = torch.tensor([False, True, True, False])
    velocity, _, text_loss = model(labels, x_t, t, dropped)
    halves = [model(labels, x_t[h], t[h], dropped[h])[0] for h in (slice(2), slice(2, 4))]
    torch.testing.assert_close(velocity, torch.cat(halves))
    assert len(velocity) == 4 and text_loss == 0


def test_labels_are_dropped_only_where_asked():
    model, x_t = tiny(), torch.randn(8, 16, 24)
    labels, null, t = torch.full((8,), 7), torch.full((8,), 48), torch.full((8,), 0.5)
    never, dropped = torch.zeros(8, dtype=torch.bool), torch.arange(8) % 2 == 0
    model.train()  # in the authors' code an evaluation in this mode loses a tenth of its labels
    conditional, unconditional = model(labels, x_t, t, never)[0], model(null, x_t, t, never)[0]
    expected = torch.where(dropped[:, None, None], unconditional, conditional)
    torch.testing.assert_close(model(labels, x_t, t, dropped)[0], expected)
    assert not torch.allclose(unconditional, conditional)


def test_latents_on_disk_train_as_on_any_number_of_processes(world, parts, tmp_path, monkeypatch):
    """encode.py on two processes; then the same losses with sharding, and with micro-batches."""
    out = tmp_path / "latents"
    flags = ["--autoencoder", parts / "rae", "--limit", 21, "--batch", 4, "--flip", "--out", out]
    world(2, "encode.py", *flags).wait()
    assert "already exists" in world(1, "encode.py", *flags).wait(code=1)
    source, autoencoder = data.open_source(str(out), 32, 0, flip=True), rae.RAE.from_pretrained(parts / "rae")
    nano, encoded = data.open_source("nano:classes", 32, 0), []
    for number in range(21):  # in whatever order they lie
        image = torch.from_numpy(nano[number]["image"]).permute(2, 0, 1)[None] / 255
        views = torch.cat([autoencoder.encode(view) for view in (image, image.flip(3))])
        encoded.append((views, nano[number]["label"]))
    for sample in [source[number] for number in range(42)]:
        latents = torch.from_numpy(sample["latents"]).float()
        errors = [((views - latents).abs().amax(dim=(1, 2)).min(), label) for views, label in encoded]
        assert min(errors)[0] < 5e-3 and min(errors)[1] == sample["label"]

    flags = [*FLAGS, "--autoencoder", parts / "rae", "--data", out, "--flip", "--t-distribution", "uniform"]
    flags += ["--steps", 3, "--eval-every", 2, "--decay-start", 1, "--ema", 0.5]
    variants = {"one": (1, []), "full": (2, ["--shard", "full"])}
    variants["micro"] = (1, ["--grad-accum", 3, "--activation-checkpointing"])
    runs = [
        world(size, "train_t2i.py", *flags, *more, "--out", tmp_path / name)
        for name, (size, more) in variants.items()
    ]
    [run.wait() for run in runs]
    expected = losses(tmp_path / "one")
    assert len(expected) == 3 + 2 * 4 and expected[0] != expected[1]
    for name in variants:
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5)

    flags = ["--data", str(out), "--out", str(tmp_path / "decoder")]
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", *flags])
    with pytest.raises(ValueError, match="holds latents: a decoder needs images"):
        train_decoder.main()

    config = train_t2i.Config(condition="class", data=str(out), autoencoder=str(parts / "rae"))
    other = SimpleNamespace(latent_shape=(16, 12), image_size=32)
    changed = copy.deepcopy(autoencoder)
    changed.latent_mean += 1
    train_t2i.open_data(config, None, autoencoder, None)
    for wrong in (other, changed):
        with pytest.raises(ValueError, match="give the one that made them"):
            train_t2i.open_data(config, None, wrong, None)
    broken = np.load(out / "00000.npy")
    broken[0] = np.nan
    np.save(out / "00000.npy", broken)
    source = data.open_source(str(out), 32, 0)
    reasons = [reason for number in range(42) for reason in source[number]["skipped"]]
    assert reasons and all("row 0 has latents that are not finite" in reason for reason in reasons)
    (out / "00000.jsonl").write_text("")
    with pytest.raises(ValueError):
        data.open_source(str(out), 32, 0)


def test_names_of_classes_are_saved_and_printed(world, parts, tmp_path):
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / "animals" / name).mkdir(parents=True)
        (tmp_path / "animals" / name / "a.png").write_bytes(png(number))
    flags = [
        *FLAGS,
        "--autoencoder",
        parts / "rae",
        "--data",
        tmp_path / "animals",
        "--out",
        tmp_path / "run",
    ]
    assert "3 classes: 0 ant, 1 bee, 2 cat" in world(1, "train_t2i.py", *flags, "--steps", 1).wait()
    model = rae.ClassToImage.from_pretrained(tmp_path / "run/model")
    assert model.class_names == ["ant", "bee", "cat"]
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    del config["class_names"]  # as an older model
    (tmp_path / "run/model/config.json").write_text(json.dumps(config))
    assert rae.ClassToImage.from_pretrained(tmp_path / "run/model").class_names is None


def test_unconditional_training_saves_the_ema(world, parts, tmp_path):
    flags = [*FLAGS, "--condition", "none", "--autoencoder", parts / "rae", "--data", "nano:objects"]
    world(1, "train_t2i.py", *flags, "--steps", 3, "--out", tmp_path).wait()
    model = rae.ClassToImage.from_pretrained(tmp_path / "model")
    assert model.num_classes is None and model.generate([0, 0], 2).shape == (2, 16, 24)
    with pytest.raises(ValueError, match="an unconditional model needs 1"):
        model.generate([0, 0], 2, guidance=2.0)
    flags = ["--classes", "none", "--model", tmp_path / "model", "--n", 1, "--steps", 1]
    world(1, "sample.py", *flags, "--out", tmp_path / "images").wait()  # without a guidance scale
    assert Image.open(tmp_path / "images/000000.png").text["guidance"] == "1.0"
    world(1, "sample.py", *flags, "--guide", tmp_path / "model", "--out", tmp_path / "guided").wait()
    assert Image.open(tmp_path / "guided/000000.png").text["guidance"] == "3.0"
    saved = load_file(next((tmp_path / "checkpoints/0000003").glob("*.safetensors")))
    name = "dit.blocks.0.attn.proj.bias"
    assert not torch.equal(saved[f"model.{name}"], saved[f"ema.{name}"])
    assert torch.equal(model.state_dict()[name], saved[f"ema.{name}"])
    new = rae.DiT((16, 24), **TINY_DIT)  # two tables that the authors' optimizer moved
    assert torch.equal(model.dit.pos_embed, new.pos_embed)
    assert torch.equal(model.dit.t_embedder.W, new.t_embedder.W)


def test_the_published_schedule():
    recipe = train_t2i.Config(**train_t2i.PRESETS["dit-dh-xl-imagenet256"])
    factors = [train_t2i.learning_rate(recipe, epoch * 1251) for epoch in (0, 40, 420, 800)]
    assert [2e-4 * factor for factor in factors] == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5])
    values = (recipe.batch, recipe.dit_lr, recipe.ema, recipe.dropout, recipe.t_distribution)
    assert values == (1024, 2e-4, 0.9995, 0.1, "logit-normal")


def test_learning_rate_and_ema():
    rates = [common.cosine(step, 10, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[10] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.55) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    ema.weight.data.fill_(0.0)
    common.update_ema(ema, model, decay=0.75, step=0)
    assert ema.weight.item() == pytest.approx(0.9)  # the decay starts at 0.1
    common.update_ema(ema, model, decay=0.75, step=1000)
    assert ema.weight.item() == pytest.approx(0.925)


# -- released files


@pytest.mark.parametrize("layout", ["flat", "ema"])
def test_released_files(layout, parts, tmp_path):
    torch.manual_seed(1)
    model = tiny(5, head=(48, 2, 2), readd_time=True, xavier=False)
    model.dit.pos_embed.data += 0.1 * torch.randn_like(model.dit.pos_embed)  # the authors trained both
    model.dit.t_embedder.W.data.mul_(1.1)
    weights = {}
    for name, tensor in model.dit.state_dict().items():
        if name in ("x_embedder.weight", "s_embedder.weight"):
            tensor = tensor[:, :, None, None]
        weights[name.replace("embedder.", "embedder.proj.") if name[:2] in ("x_", "s_") else name] = tensor
    for name, table in (("enc", model.dit.rope), ("dec", model.dit.head_rope)):
        weights |= {f"{name}_feat_rope.freqs_cos": table[0], f"{name}_feat_rope.freqs_sin": table[1]}
    torch.save(weights if layout == "flat" else {"ema": weights, "step": 3}, tmp_path / "stage2_model.pt")
    loaded = rae.ClassToImage.from_pretrained(tmp_path / "stage2_model.pt", str(parts / "rae"))
    loaded.save_pretrained(tmp_path / "folder")
    noise, labels = torch.randn(3, 16, 24), [0, 4, 2]
    expected = model.generate(labels, 3, 1.5, noise=noise)
    for other in (loaded, rae.ClassToImage.from_pretrained(tmp_path / "folder")):
        torch.testing.assert_close(other.generate(labels, 3, 1.5, noise=noise), expected)
        assert other.alpha == math.sqrt(16 * 24 / 4096) and other.autoencoder.latent_shape == (16, 24)
