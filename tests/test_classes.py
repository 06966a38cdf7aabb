"""Class labels to images: labels of data, training, latents on disk, released files."""

import json
import math
import shutil
import tarfile
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import common
import data
import rae
from nano import shapes

TINY = {"width": 32, "depth": 2, "heads": 2}


def tiny(num_classes=48, **changes) -> rae.ClassToImage:
    """With weights of some size everywhere: a new DiT's velocity is zero."""
    model = rae.ClassToImage(TINY | {"num_classes": num_classes} | changes, (16, 24))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture
def trainer(monkeypatch, parts):
    """Flags of a training on tiny parts, of which `nano` is the size of the DiT."""
    monkeypatch.setitem(rae.DITS, "nano", TINY)
    return ["train_t2i.py", "--condition", "class", "--autoencoder", parts / "rae", "--batch", 8,
            "--warmup", 2, "--log-every", 1, "--save-every", 2, "--sample-steps", 2]  # fmt: skip


def shrink() -> None:
    """In the processes of a world."""
    rae.DITS["nano"] = TINY


def test_draws_of_a_image_are_as_if_it_came_that_often():
    torch.manual_seed(0)
    net, labels, latents = tiny(), torch.tensor([3, 7]), torch.randn(2, 16, 24)
    noise, t, dropped = torch.randn(4, 16, 24), torch.rand(4), torch.tensor([False, True, True, False])
    flow = net(labels, latents, noise, t, dropped)
    halves = [net(labels, latents, noise[h], t[h], dropped[h]) for h in (slice(2), slice(2, 4))]
    torch.testing.assert_close(flow, torch.cat(halves))
    assert len(set(flow.tolist())) == 4


@pytest.fixture(scope="module")
def model(tmp_path_factory, parts):
    """Folder of an untrained model of eight classes."""
    folder = tmp_path_factory.mktemp("classes") / "model"
    model = tiny(8)
    model.autoencoder_path = str(parts / "rae")
    model.save_pretrained(folder)
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- labels


def png(color) -> bytes:
    file = BytesIO()
    Image.new("RGB", (40, 36), color).save(file, "PNG")
    return file.getvalue()


def test_labels_of_folders_tars_and_json(tmp_path):
    for number, name in enumerate(("n01", "n02", "n03")):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "a.png").write_bytes(png((number, 0, 0)))
    source = data.open_source(str(tmp_path / "folders"), 32, 0)
    assert source.classes == 3
    for number in range(3):
        assert source[number]["label"] == source[number]["image"][0, 0, 0]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        files = {"0.png": png("red"), "0.cls": b"7", "1.png": png("red"), "1.json": b'{"label": 5}',
                 "2.png": png("red"), "3.png": png("red"), "3.cls": b"seven"}  # fmt: skip
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    (tmp_path / "tars").mkdir()
    (tmp_path / "0.tar").rename(tmp_path / "tars/0.tar")
    source = data.open_source(str(tmp_path / "tars"), 32, 0)
    assert source.classes is None
    [batch] = data.OnePass(source, 8, workers=0)
    assert sorted(map(str, batch["label"])) == ["5", "7", "None"]
    assert "damaged cls" in batch["skipped"][0]


def test_nano_classes_are_single_objects_of_every_pair():
    source = data.open_source("nano:classes", 48, 3)
    drawn = [source[number] for number in range(400)]
    assert source.classes == 48 and {one["label"] for one in drawn} == set(range(48))
    for number, one in enumerate(drawn[:40]):
        [thing] = shapes.draw("classes", 3, number).objects
        assert (thing.shape, thing.color) == shapes.PAIRS[one["label"]]
        assert one["caption"] == shapes.an(f"{thing.color} {thing.shape}")


# -- training


def test_training_resumes_bit_for_bit(world, trainer, tmp_path):
    world(1, *trainer, "--steps", 4, "--out", tmp_path / "a", patch=shrink).wait()
    world(1, *trainer, "--steps", 4, "--out", tmp_path / "b", "--save-every", 3, patch=shrink).wait()
    (tmp_path / "b/checkpoints/0000004").rename(tmp_path / "gone")
    world(1, "train_t2i.py", "--resume", "--out", tmp_path / "b", patch=shrink).wait()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 4
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("flags", [["--accumulate", 3, "--checkpoint-blocks"], ["--shard", "full"]])
def test_processes_and_accumulation_change_nothing(flags, world, trainer, tmp_path):
    size = 2 if "--shard" in flags else 1
    trainer = [*trainer, "--steps", 3, "--schedule", "linear", "--time", "uniform"]
    world(1, *trainer, "--out", tmp_path / "a", patch=shrink).wait()
    world(size, *trainer, *flags, "--out", tmp_path / "b", patch=shrink).wait()
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), atol=1e-5)


def test_unconditional_training_and_the_average(world, trainer, tmp_path):
    trainer = [*trainer, "--condition", "none", "--data", "nano:objects", "--steps", 3]
    world(1, *trainer, "--dit-lr", 0.01, "--out", tmp_path, patch=shrink).wait()
    average = rae.ClassToImage.from_pretrained(tmp_path / "model")
    assert average.num_classes is None and average.generate([0, 0], 2).shape == (2, 16, 24)
    with pytest.raises(ValueError, match="give a guide"):
        average.generate([0, 0], 2, guidance=2.0)
    online = load_file(next((tmp_path / "checkpoints/0000003").glob("*.safetensors")))
    name = "dit.blocks.0.attn.proj.weight"  # the average lags behind
    assert not torch.equal(online[f"model.{name}"], online[f"ema.{name}"])
    assert torch.equal(average.state_dict()[name], online[f"ema.{name}"])
    new = rae.DiT((16, 24), **TINY)  # the authors trained these two unknowingly, and their average moved them
    assert torch.equal(average.dit.pos_embed, new.pos_embed)
    assert torch.equal(average.dit.t_embedder.W, new.t_embedder.W)


def test_labels_are_dropped_in_training_only_where_asked():
    model, noise = tiny(), torch.randn(64, 16, 24)
    labels, t = torch.full((64,), 7), torch.full((64,), 0.5)
    model.train()  # in the authors' code an evaluation in this mode loses a tenth of its labels
    given = model.forward(labels, noise, noise.flip(0), t, torch.zeros(64, dtype=torch.bool))
    model.eval()
    null = model.forward(torch.full((64,), 48), noise, noise.flip(0), t, torch.zeros(64, dtype=torch.bool))
    dropped = torch.arange(64) % 2 == 0
    mixed = model.forward(labels, noise, noise.flip(0), t, dropped)
    torch.testing.assert_close(mixed, torch.where(dropped, null, given))
    assert not torch.allclose(null, given)


def test_latents_on_disk_are_those_of_the_images(world, trainer, parts, tmp_path):
    out = tmp_path / "latents"
    flags = ["--autoencoder", parts / "rae", "--limit", 21, "--batch", 4, "--flip", "--out", out]
    world(2, "encode.py", *flags).wait()
    source = data.open_source(str(out), 32, 0, flip=True)
    autoencoder = rae.RAE.from_pretrained(parts / "rae")
    images, found = data.open_source("nano:classes", 32, 0), []
    for number in range(21):  # in whatever order they lie
        image = torch.from_numpy(images[number]["image"]).permute(2, 0, 1)[None] / 255
        views = torch.cat([autoencoder.encode(view) for view in (image, image.flip(3))])
        found.append((views, images[number]["label"]))
    for sample_ in [source[number] for number in range(63)]:
        near = [
            label for views, label in found
            if (views - torch.from_numpy(sample_["latents"]).float()).abs().amax(dim=(1, 2)).min() < 5e-3
        ]  # fmt: skip
        assert sample_["label"] in near
    assert len({source.sources[0].shuffled.row(number) for number in range(21)}) == 21
    world(1, *trainer, "--data", out, "--steps", 2, "--out", tmp_path / "run", patch=shrink).wait()
    assert len(losses(tmp_path / "run")) == 2
    assert "is there already" in world(1, "encode.py", *flags).wait(code=1)
    left = tmp_path / "latents.tmp"  # of a run of more processes that was killed
    left.mkdir()
    (left / "00002.npy").write_bytes((out / "00001.npy").read_bytes())
    (left / "00002.jsonl").write_bytes((out / "00001.jsonl").read_bytes())
    shutil.rmtree(out)
    flags.remove("--flip")
    world(1, "encode.py", *flags).wait()
    assert len(data.open_source(str(out), 32, 0).sources[0].rows) == 21
    with pytest.raises(ValueError, match="no mirror images"):
        data.open_source(str(out), 32, 0, flip=True)
    (out / "00000.jsonl").write_text("")
    with pytest.raises(ValueError, match="another number"):
        data.open_source(str(out), 32, 0)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nano:objects"], "does not say how many classes"),
        (["--data", "nano:objects", "--classes", 4], "without labels"),
        (["--data", "nano:classes", "--classes", 4], "has 48 classes, not --classes 4"),
        (["--condition", "none", "--classes", 4], "needs --condition class"),
        (["--init", "MODEL"], "has classes 8, not 48"),
        (["--data", "nano:classes", "--preset", "dit-dh-s-imagenet256"], "not --classes 1000"),
    ],
)
def test_wrong_classes(flags, message, world, trainer, model, tmp_path):
    flags = [model if flag == "MODEL" else flag for flag in flags]
    text = world(1, *trainer, "--steps", 1, *flags, "--out", tmp_path, patch=shrink).wait(code=1)
    assert message in text.splitlines()[-1]


def test_wrong_latents(tmp_path):
    import train_t2i

    source = SimpleNamespace(latents=[{"latent_shape": [16, 24], "autoencoder": "a"}])
    for autoencoder, shape in (("a", (16, 32)), ("b", (16, 24))):
        with pytest.raises(ValueError, match="give the one that made them"):
            train_t2i.check_latents(train_t2i.Config(data="x", autoencoder=autoencoder), source, shape)
    train_t2i.check_latents(train_t2i.Config(data="x", autoencoder="a"), source, (16, 24))


def test_the_published_schedule():
    import train_t2i

    recipe = train_t2i.Config(**train_t2i.PRESETS["dit-dh-xl-imagenet256"])
    ends = (recipe.decay_start, recipe.decay_end, recipe.final_lr)
    rates = [recipe.dit_lr * common.linear(step * 1251, *ends) for step in (0, 40, 420, 800, 1000)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5])
    assert (recipe.batch, recipe.ema, recipe.dropout, recipe.time) == (1024, 0.9995, 0.1, "logit-normal")


# -- released files


@pytest.mark.parametrize("layout", ["flat", "ema"])
def test_released_files(layout, parts, tmp_path):
    torch.manual_seed(1)
    dit = {"head": (48, 2, 2), "readd_time": True, "xavier": False}
    model = tiny(5, **dit)
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
    noise, labels = torch.randn(3, 16, 24), [0, 4, 2]
    expected = model.generate(labels, 3, 1.5, noise=noise)
    torch.testing.assert_close(loaded.generate(labels, 3, 1.5, noise=noise), expected)
    assert loaded.alpha == math.sqrt(16 * 24 / 4096) and loaded.autoencoder.latent_shape == (16, 24)
    loaded.save_pretrained(tmp_path / "folder")
    again = rae.ClassToImage.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(again.generate(labels, 3, 1.5, noise=noise), expected)
    assert again.autoencoder.latent_shape == (16, 24)
