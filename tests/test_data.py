"""Sources and batches: a sample depends on the seed and its number only, and unusable files are skipped."""

import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import struct
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from datasets import Dataset
from PIL import Image

import data
from nano import shapes

SIZE = 32
CPU = torch.device("cpu")


def png(value: int, size: tuple[int, int] = (40, 60), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(file, format=format)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def write_parquet(path: Path, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(path)


# -----------------------------------------------------------------------------------------------------------
# rows in every format. Image i has the colour (i, 0, 0). It has the caption "image i", or ("talking") a
# conversation: by i % 3 a request for it, a question about it, or text without the image.

KINDS = ("request", "question", "text")


def turns(i: int) -> tuple[str, str]:
    return {
        "request": (f"Can you draw image {i}?", "Here you go:\n<image>"),
        "question": (f"<image>\nwhich of {i}?", f"number {i}"),
        "text": (f"say {i}", f"it is {i}"),
    }[KINDS[i % 3]]


def talk(i: int) -> list[dict]:
    """With a system turn, which is dropped, for every other i."""
    human, gpt = turns(i)
    system = [{"from": "system", "value": "Be brief."}] if i % 2 else []
    return [*system, {"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


def write_folder(path: Path, count: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{i}.png", "text": f"image {i}"} for i in range(count)]
    for i in range(count):
        (path / f"{i}.png").write_bytes(png(i))
    write_lines(path / "metadata.jsonl", rows)


def write_jsonl(path: Path, count: int) -> None:
    rows = []
    for i in range(count):
        image = ({}, {"image": None}, {"image": ""}, {"image": []})[i % 4]  # all of them mean none
        if i % 3 < 2:
            image = {"image": [f"{i}.png"] if i % 2 else f"{i}.png"}
            (path.parent / f"{i}.png").write_bytes(png(i))
        rows.append({"conversations": talk(i), "metadata": {"id": i}} | image)
    write_lines(path, rows)


def write_tars(path: Path, shards: int, rows: int, talking=False) -> None:
    """JPEG and PNG, with captions in txt and json files."""
    for shard in range(shards):
        files = {}
        for i in range(shard * rows, (shard + 1) * rows):
            if talking:
                files[f"{i:03d}.json"] = json.dumps({"conversations": talk(i), "metadata": None}).encode()
            elif i % 3:
                files[f"a/{i:03d}.txt"] = f"image {i}".encode()
            else:
                files[f"a/{i:03d}.json"] = json.dumps({"caption": f"image {i}", "url": None}).encode()
            if talking and i % 3 < 2:
                files[f"{i:03d}.png"] = png(i)
            elif not talking:
                extension, format = ("jpg", "JPEG") if i % 2 else ("png", "PNG")
                files[f"a/{i:03d}.{extension}"] = png(i, format=format)
        write_tar(path / f"{shard:02d}.tar", files)


def write_tables(path: Path, shards: int, rows: int, talking=False) -> None:
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        images = [None if talking and i % 3 == 2 else {"bytes": png(i), "path": None} for i in numbers]
        texts = {"text": [f"image {i}" for i in numbers]}
        if talking:
            texts = {"conversations": [talk(i) for i in numbers]}
        write_parquet(path / f"{shard:02d}.parquet", image=images, **texts)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """48 captioned images in three formats, 48 conversations in four, and text alone."""
    root = tmp_path_factory.mktemp("sources")
    write_folder(root / "folder", 48)
    write_tars(root / "tar", 8, 6)
    write_tables(root / "parquet", 8, 6)
    write_jsonl(root / "talks.jsonl", 48)
    write_tars(root / "talks-tar", 8, 6, talking=True)
    write_tables(root / "talks-parquet", 8, 6, talking=True)
    tars = [f"talks-tar/{i:02d}.tar" if i % 2 else str(root / f"talks-tar/{i:02d}.tar") for i in range(8)]
    (root / "wds_manifest.json").write_text(json.dumps({"dataset_name": "talks", "tars": tars}))
    write_lines(root / "words.jsonl", [{"conversations": talk(i)} for i in range(2, 60, 3)])
    return root


CAPTIONED = ("folder", "tar", "parquet")
TALKING = ("talks.jsonl", "talks-tar", "talks-parquet", "wds_manifest.json")


def take(loader: data.Loader, steps: int, *keys: str) -> list[list]:
    batches = list(itertools.islice(loader, steps))
    return [[sample for batch in batches for sample in batch[key]] for key in keys]


# -----------------------------------------------------------------------------------------------------------
# what a sample is


@pytest.mark.parametrize("name", CAPTIONED)
def test_an_epoch_has_every_image_once_with_its_caption(name, root):
    loader = data.Loader(data.open_source(str(root / name), SIZE, seed=0), 8, workers=0)
    images, captions, conversations = take(loader, 6, "image", "caption", "conversation")
    assert sorted(captions) == sorted(f"image {i}" for i in range(48))
    for image, caption, conversation in zip(images, captions, conversations, strict=True):
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8
        assert abs(int(image[0, 0, 0]) - int(caption.split()[1])) <= 2  # JPEG
        assert caption in conversation[0][1]
    [again] = take(loader, 6, "caption")
    assert sorted(again) == sorted(captions) and again != captions
    assert loader.skipped == []


def count_talks(batch: dict) -> Counter:
    """Kinds of conversations in a batch; checks that each has the image whose number it mentions."""
    assert len(batch["image"]) == len(batch["image_index"]) and batch["image"].shape[1:] == (3, SIZE, SIZE)
    images, counts = dict(zip(batch["image_index"], batch["image"], strict=True)), Counter()
    for index, conversation in zip(batch["index"], batch["conversation"], strict=True):
        i = int("".join(c for c in conversation[0][1] if c.isdigit()))
        kind = KINDS[i % 3]
        assert conversation == [["user", turns(i)[0]], ["assistant", turns(i)[1]]]
        assert data.requested_caption(conversation) == (f"image {i}" if kind == "request" else None)
        assert (index in images) == (kind != "text")
        assert index not in images or (images[index][0] == i).all()
        counts[kind] += 1
    return counts


@pytest.mark.parametrize("name", TALKING)
def test_conversations_in_every_format(name, root):
    source = data.open_source(str(root / name), SIZE, 0, text_only=True)
    loader = data.Loader(source, 8, workers=0)
    batches = list(itertools.islice(loader, 6))
    assert sum(map(count_talks, batches), Counter()) == dict.fromkeys(KINDS, 16)
    assert len({talk[0][1] for batch in batches for talk in batch["conversation"]}) == 48
    assert loader.skipped == []
    # Without text_only, text alone is skipped and counted.
    source = data.open_source(str(root / name), SIZE, 0)
    loader = data.Loader(source, 8, workers=0)
    for batch in itertools.islice(loader, 12):
        assert batch["image_index"] == batch["index"] and set(count_talks(batch)) == {"request", "question"}
    assert loader.skipped and all("no image" in message for message in loader.skipped)
    once = data.OnePass(source, 5, workers=0)
    assert sum(len(batch["image"]) for batch in once) == 32 and len(once.skipped) == 16


def test_a_batch_without_any_image(root):
    source = data.open_source(str(root / "words.jsonl"), SIZE, 0, text_only=True)
    batch = next(data.Loader(source, 4, workers=2))
    assert batch["image"].shape == (0, 3, SIZE, SIZE) and batch["image"].dtype == torch.uint8
    assert batch["image_index"] == [] and count_talks(batch) == {"text": 4}
    noise, u, v = data.flow_draws((16, 24), 0, batch["image_index"], CPU)
    assert noise.shape == (0, 16, 24) and len(u) == len(v) == 0


def test_nano_asks_for_images_and_about_them():
    source = data.open_source("nano", 48, seed=0)
    assert [f"nano:{part.domain}" for part in source.sources] == list(data.NANO_MIXTURE)
    assert (source.counts / 1000).tolist() == pytest.approx(list(data.NANO_MIXTURE.values()))
    batch = data.collate([source[i] for i in range(200)])
    # Every sample serves those who need images and captions only.
    assert batch["image"].shape == (200, 3, 48, 48) and all(batch["caption"])
    wordings = Counter()
    for number, conversation in zip(batch["index"], batch["conversation"], strict=True):
        (_, question), (_, answer), *_ = conversation
        wanted = data.requested_caption(conversation)
        if source.sources[source.place(number)[0]].domain == "questions":
            assert wanted is None and question.startswith("<image>\n") and "<image>" not in answer
        else:
            assert wanted == data.clean(batch["caption"][number])
            wordings[next(t for t in data.REQUESTS if question.startswith(t.split("{}")[0]))] += 1
    assert len(wordings) == len(data.REQUESTS) and 20 < min(wordings.values())


def test_nano_lessons_follow_each_other():
    source = data.open_source("nano:lessons", 48, seed=0)
    first, second, third = data.NANO_LESSONS

    def captions(start: int) -> list[str]:
        return [source[number]["caption"] for number in range(start, start + 100)]

    assert all(len(caption.split()) <= 6 for caption in captions(first) + captions(second - 100))
    assert sum(" and " in caption or " of " in caption for caption in captions(second)) > 40
    assert data.open_source("nano", 48, data.hash_seed(0, third))[0]["caption"] == captions(third)[0]
    assert [*data.OnePass(source, 8, limit=16, workers=0)][0]["caption"] == captions(0)[:8]


def test_nano_questions_are_about_their_images():
    source, domains = data.open_source("nano:questions", 48, seed=5), Counter()
    for number in range(200):
        sample = source[number]
        domain = next(  # the one that draws this caption
            domain for domain in shapes.DOMAINS
            if shapes.draw(domain, data.hash_seed(5, "questions"), number).caption == sample["caption"]
        )  # fmt: skip
        drawn = shapes.draw(domain, data.hash_seed(5, "questions"), number)
        assert (sample["image"] == drawn.image).all() and sample["label"] is None
        texts = [text for _, text in sample["conversation"]]  # all questions, in any order
        assert texts[0].startswith("<image>\n")
        texts[0] = texts[0].removeprefix("<image>\n")
        assert sorted(zip(texts[::2], texts[1::2], strict=True)) == sorted(drawn.questions)
        domains[domain] += 1
    assert abs(domains["objects"] - 140) < 20 and min(domains["scenes"], domains["text"]) > 15


def test_captions_without_the_wording_of_their_requests():
    for uniform in (0.0, 0.3, 0.6, 0.9):
        assert data.requested_caption(data.request("a star?", uniform)) == "a star?"
    assert data.requested_caption([("user", "A cat, please"), ("assistant", "<image>")]) == "A cat, please"
    assert data.requested_caption([("user", "<image>\nwhat is it?"), ("assistant", "a cat")]) is None
    assert data.clean("half a pair \ud800") == "half a pair ?"


def test_random_numbers_depend_on_the_sample_and_not_on_its_batch():
    noise, u, v = data.flow_draws((16, 24), 7, [3, 4, 5, 6], CPU)
    for row, index in enumerate([3, 4, 5, 6]):
        alone = data.flow_draws((16, 24), 7, [index], CPU)
        assert torch.equal(alone[0][0], noise[row]) and alone[1][0] == u[row] and alone[2][0] == v[row]
    more = data.flow_draws((16, 24), 7, [3, 4, 5, 6], CPU, draws=3)
    assert [len(values) for values in more] == [12, 12, 12] and torch.equal(more[0][:4], noise)
    assert torch.equal(more[1][:4], u) and len(set(more[1].tolist())) == 12
    assert torch.equal(more[0][9], data.flow_draws((16, 24), 7, [4], CPU, draws=3)[0][2])
    many, u, v = data.flow_draws((16, 24), 0, list(range(500)), CPU)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs(u.mean() - 0.5) < 0.05 and abs(v.mean() - 0.5) < 0.05
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.15
    assert not torch.equal(many[0], data.flow_draws((16, 24), 1, [0], CPU)[0][0])


# -----------------------------------------------------------------------------------------------------------
# pixels as a viewer shows them


def encoded(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_as_exif_says(format):
    seen = np.zeros((60, 40, 3), np.uint8)
    seen[:30, :, 0] = seen[30:, :, 2] = 255  # red above blue
    turn = Image.Transpose
    stored = {1: None, 2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
              5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # fmt: skip
    for number, method in stored.items():
        exif, image = Image.Exif(), Image.fromarray(seen)
        exif[0x0112] = number
        content = encoded(image if method is None else image.transpose(method), format, exif=exif)
        pixels = np.asarray(data.open_image(content)).astype(int)
        assert pixels.shape == seen.shape and abs(pixels - seen)[[2, -3]].max() < 40, number
    # Damaged EXIF data are no reason to lose an image.
    damaged = encoded(seen, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert data.open_image(damaged).size == (40, 60)


def test_transparency_is_white():
    hidden = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    hidden[2:6, 2:6] = (255, 0, 0, 255)
    hidden[0, 0] = (0, 0, 0, 128)
    rgba = Image.fromarray(hidden)
    grey = Image.fromarray(np.full((8, 8), 77, np.uint8))
    palette = Image.fromarray(hidden[..., :3]).quantize(8)
    for content, inside in (
        (encoded(rgba, "PNG"), (255, 0, 0)),
        (encoded(rgba, "WEBP", lossless=True, exact=True), (255, 0, 0)),
        (encoded(rgba.convert("LA"), "PNG"), (76, 76, 76)),
        (encoded(palette, "PNG", transparency=palette.getpixel((7, 7))), (255, 0, 0)),
        (encoded(rgba.convert("PA"), "TIFF"), (255, 0, 0)),
    ):
        image = data.open_image(content)
        assert image.mode == "RGB" and image.getpixel((7, 7)) == (255, 255, 255)
        assert max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), inside, strict=True)) <= 1
    assert data.open_image(encoded(rgba, "PNG")).getpixel((0, 0)) == (127, 127, 127)
    # one colour of an image without alpha
    assert data.open_image(encoded(grey, "PNG", transparency=77)).getpixel((0, 0)) == (255, 255, 255)
    assert data.open_image(encoded(grey.convert("RGB"), "PNG", transparency=(77, 77, 77))).getextrema()[
        0
    ] == (255, 255)
    opaque = encoded(Image.fromarray(hidden[..., :3]).convert("RGBA"), "PNG")
    np.testing.assert_array_equal(np.asarray(data.open_image(opaque)), hidden[..., :3])


def test_deep_greyscale_is_scaled():
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for values, formats in (
        ((ramp * 65535).astype(np.uint16), ("PNG", "TIFF", "PPM", "JPEG2000")),
        ((ramp * 65535).astype(np.int32), ("TIFF",)),
        ((ramp * 2e9 - 1e9).astype(np.int32), ("TIFF",)),
        (ramp.astype(np.float32), ("TIFF",)),
        ((ramp * 9000 - 70).astype(np.float32), ("TIFF",)),
    ):
        for format in formats:
            pixels = np.asarray(data.open_image(encoded(values, format)))
            assert pixels.shape == (16, 16, 3) and abs(pixels[..., 1] - expected).max() <= 1, (
                values.dtype,
                format,
            )
    half = np.full((8, 8), 0.5, np.float32)
    assert data.open_image(encoded(half, "TIFF")).getpixel((0, 0)) == (128, 128, 128)
    half[0, 0] = np.nan
    with pytest.raises(data.SkipSample, match="not finite"):
        data.open_image(encoded(half, "TIFF"))


def test_formats_and_modes():
    image = Image.new("RGB", (40, 60), (200, 30, 90))
    for format in (
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "PPM",
        "AVIF",
        "JPEG2000",
        "QOI",
        "ICO",
        "TGA",
    ):
        pixel = data.open_image(encoded(image, format)).getpixel((20, 20))
        assert max(abs(a - b) for a, b in zip(pixel, (200, 30, 90), strict=True)) < 6, format
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 60))] * 2}
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        assert data.open_image(encoded(image, format, **frames)).getpixel((20, 20))[0] > 190
    cmyk = data.open_image(encoded(image.convert("CMYK"), "JPEG")).getpixel((20, 20))
    assert max(abs(a - b) for a, b in zip(cmyk, (200, 30, 90), strict=True)) < 6
    assert data.open_image(encoded(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    for format in ("EPS", "PDF"):
        with pytest.raises(data.SkipSample, match="not one of JPEG"):
            data.open_image(encoded(image, format))


def test_a_jpeg_of_many_scans_is_skipped(tmp_path, monkeypatch):
    content = encoded(Image.new("L", (512, 512), 128), "JPEG", progressive=True)
    first, end = content.rfind(b"\xff\xda"), content.rfind(b"\xff\xd9")
    (tmp_path / "x.jpg").write_bytes(content[:first] + content[first:end] * 9000 + content[end:])
    data.open_image(content)
    with pytest.raises(data.SkipSample, match="scans of 512 x 512"):
        data.open_image(tmp_path / "x.jpg")


# -----------------------------------------------------------------------------------------------------------
# folders


def names_in(path: Path) -> list[str]:
    folder = data.Folder(str(path))
    return [os.path.relpath(folder[row]["image"], path) for row in range(len(folder))]


def write_images(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))


def test_a_folder_has_every_image_whatever_its_name(tmp_path, capsys):
    names = ["ILSVRC2012_val_1.JPEG", "COCO_val2014_1.jpg", "test-drive.png", "a photo of a train.PNG",
             "[1]?*.gif", "x.avif"]  # fmt: skip
    for folder in ("pictures [2024]", "what?", "star*", "a, b=1", "val"):
        write_images(tmp_path / folder, *names)
        assert names_in(tmp_path / folder) == sorted(names)
        source = data.open_source(str(tmp_path / folder), SIZE, 0)
        assert sum("image" in sample for sample in source.once(None, 0, 1)) == len(names)
        assert source.class_names is None
    assert capsys.readouterr().err == ""
    write_images(
        tmp_path / "val",
        ".hidden.png",
        "._x.avif",
        ".DS_Store",
        "__MACOSX/x.png",
        "a.heic",
        "b.heic",
        "c.svg",
    )
    assert names_in(tmp_path / "val") == sorted(names)
    assert capsys.readouterr().err.count("2 .heic, 1 .svg") == 1


def test_subfolders_are_classes(tmp_path, capsys):
    write_images(tmp_path / "classes", "truck/a.png", "train/b.png", "car/deep/er/c.png", "car/d.png")
    source = data.open_source(str(tmp_path / "classes"), SIZE, 0)
    assert source.class_names == ["car", "train", "truck"] and source.classes == 3
    rows = [source.sources[0].rows[i] for i in range(4)]
    assert [(Path(row["image"]).name, row["label"]) for row in rows] == [
        ("d.png", 0), ("c.png", 0), ("b.png", 1), ("a.png", 2)
    ]  # fmt: skip
    # An image without a class: there are none.
    write_images(tmp_path / "classes", "e.png")
    assert data.Folder(str(tmp_path / "classes")).class_names is None
    assert "no classes: 1 images are in no subfolder, such as e.png" in capsys.readouterr().err
    write_images(tmp_path / "others", "bus/a.png", "car/b.png", "van/b.png")
    write_images(tmp_path / "same", "bus/a.png", "car/b.png", "van/b.png")
    data.open_source(f"{tmp_path}/others,{tmp_path}/same", SIZE, 0)
    (tmp_path / "same/van").rename(tmp_path / "same/tram")
    with pytest.raises(ValueError, match="different classes"):
        data.open_source(f"{tmp_path}/others,{tmp_path}/same", SIZE, 0)
    assert data.open_source("nano:classes", SIZE, 0).class_names[:1] == ["red circle"]


def test_classes_with_the_names_of_splits_are_pointed_out(tmp_path, capsys):
    write_images(tmp_path, "train/a/0.png", "val/a/1.png")
    assert data.Folder(str(tmp_path)).class_names == ["train", "val"]
    assert "its classes are train, val" in capsys.readouterr().err


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "real", "ant/0.png", "bee/1.png")
    write_images(tmp_path / "some", "dog/2.png")
    (tmp_path / "some/ant").symlink_to(tmp_path / "real/ant")
    (tmp_path / "some/aaa").symlink_to(tmp_path / "some/dog")
    (tmp_path / "some/dog/circle").symlink_to(tmp_path / "some")
    (tmp_path / "some/dog/gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "some/dog/loop.png").symlink_to("loop.png")
    assert names_in(tmp_path / "some") == ["ant/0.png", "dog/2.png", "dog/gone.png", "dog/loop.png"]
    samples = data.open_source(f"{tmp_path}/some", SIZE, 0).once(None, 0, 1)
    skipped = " ".join(reason for sample in samples for reason in sample.get("skipped", []))
    assert "gone.png" in skipped and "loop.png" in skipped
    write_tar(tmp_path / "elsewhere/0.tar", {"0.png": png(0)})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/part").symlink_to(tmp_path / "elsewhere")
    assert len(one_pass(data.open_source(f"{tmp_path}/shards", SIZE, 0))) == 1


def test_a_folder_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    write_images(tmp_path, *(f"{c}/{i}.png" for c in range(5) for i in range(9)))
    real, listed = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    for _ in range(3):
        assert len(data.open_source(str(tmp_path), SIZE, 0).sources[0].rows) == 45
    assert len(listed) == 6
    write_images(tmp_path, "3/new.png")
    assert len(data.Folder(str(tmp_path))) == 46


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_captions_of_folders(kind, tmp_path, capsys):
    write_images(tmp_path, "a/1.png", "a/2.png", "3.x.png", "extra.png", *(["x.md"] if kind == "txt" else []))
    if kind == "jsonl":
        rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": "two", "label": 4}]
        (tmp_path / "a/metadata.jsonl").write_bytes(
            b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows)
        )
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.x.png", "text": "three"}\n')
    elif kind == "csv":
        text = "\ufefffile_name,text,label\r\na/1.png,one,\r\na/2.png,two,4\r\n3.x.png,three,\r\n"
        (tmp_path / "metadata.csv").write_bytes(text.encode())
    else:
        for name, text in (("a/1.txt", "\ufeffone"), ("a/2.txt", "two\r\n"), ("3.x.txt", " three")):
            (tmp_path / name).write_text(text)
    samples = list(data.open_source(str(tmp_path), SIZE, 0, captions=True).once(None, 0, 1))
    found = {sample["caption"]: sample["label"] for sample in samples if "image" in sample}
    assert found == {"one": None, "two": None if kind == "txt" else 4, "three": None}
    message = capsys.readouterr().err
    if kind == "txt":
        assert "1 .md" in message and [s["skipped"][0] for s in samples if "skipped" in s][0].endswith(
            "no caption"
        )
    else:
        assert "1 images that no metadata file names" in message


def test_damaged_rows_of_metadata_are_skipped(tmp_path):
    write_images(tmp_path, "1.png")
    rows = [{"file_name": "1.png"}, "{", "3", {"file_name": 3}, {"text": "x"}, {"file_name": "../1.png"},
            {"file_name": "/etc/passwd"}, {"file_name": "\ud83d.png"}]  # fmt: skip
    write_lines(tmp_path / "metadata.jsonl", rows)
    samples = list(data.open_source(str(tmp_path), SIZE, 0).once(None, 0, 1))
    assert sum("image" in sample for sample in samples) == 1
    reasons = [reason for sample in samples for reason in sample.get("skipped", [])]
    assert all(any(f"row {n} is damaged" in reason for reason in reasons) for n in range(2, 9))
    write_lines(tmp_path / "metadata.jsonl", [{"tag": "counting", "prompt": "two cats"}])  # GenEval's
    assert len(one_pass(data.open_source(str(tmp_path), SIZE, 0))) == 1
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png," + 200_000 * "x" + "\n")
    assert len(one_pass(data.open_source(str(tmp_path), SIZE, 0))) == 1


# -----------------------------------------------------------------------------------------------------------
# tables and tars of other programs


def captions_in(path: Path, **options) -> list:
    return sorted(one_pass(data.open_source(str(path), SIZE, 0, **options)).values())


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "struct"])
def test_columns_of_other_programs(kind, tmp_path):
    struct = pyarrow.struct([("bytes", pyarrow.large_binary()), ("path", pyarrow.large_string())])
    type = struct if kind == "struct" else getattr(pyarrow, kind)()
    cells = [{"bytes": png(i), "path": None} if kind == "struct" else png(i) for i in range(3)]
    table = {
        "image": pyarrow.array(cells, type),
        "text": pyarrow.array(["a", "b", None], pyarrow.large_string()),
    }
    (tmp_path / "[1]").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "[1]/0.PARQUET")
    for name in ("[1]", "[1]/0.PARQUET"):
        assert captions_in(tmp_path / name, captions=True) == ["a", "b"]


def test_strange_paths_in_tables_are_skipped(tmp_path):
    paths = ["a\0b", "no://where", "/", "/nowhere.png"]
    cells = [{"bytes": None, "path": path} for path in paths] + [{"bytes": png(0), "path": None}]
    write_parquet(tmp_path / "0.parquet", image=cells, text=["a", "b", "c", "d", "e"])
    assert captions_in(tmp_path) == ["e"]


def test_only_the_train_split_of_a_hub_data_set(monkeypatch):
    files = ["datasets/me/train-tests/train-0.tar", "datasets/me/train-tests/test-0.tar"]
    monkeypatch.setattr("huggingface_hub.HfFileSystem.glob", lambda *_: files)
    [shards] = [source.shards for source in data.open_source("me/train-tests", SIZE, 0).sources]
    assert [shard.args for shard in shards] == [("hf://" + files[0],)]


def test_only_the_train_split_of_a_local_copy(tmp_path, capsys):
    for split in ("train", "validation", "test", "extra"):
        files = {"0.png": png(0), "0.txt": split.encode()}
        write_tar(tmp_path / f"tars/{split}-0000.tar", files)
        write_tar(tmp_path / f"folders/{split}/0.tar", files)
        write_parquet(
            tmp_path / f"tables/data/{split}-0.parquet", image=[{"bytes": png(0), "path": None}], text=[split]
        )
    for name in ("tars", "folders", "tables"):
        assert captions_in(tmp_path / name) == ["extra", "train"]
    capsys.readouterr()
    assert captions_in(tmp_path / "folders/test") == ["test"]
    assert capsys.readouterr().err == ""
    write_images(tmp_path / "tars", "logo.png")
    assert captions_in(tmp_path / "tars") == ["extra", "train"]
    assert "not the images beside them (1)" in capsys.readouterr().err
    (tmp_path / "tars/train-0000.tar").unlink()
    (tmp_path / "tars/extra-0000.tar").unlink()
    assert captions_in(tmp_path / "tars") == ["test", "validation"]
    assert "only files for validation or tests" in capsys.readouterr().err


def test_tars_of_other_programs(tmp_path):
    members = {}
    for i in range(3):
        for name, content in ((f"{i}.jpg", png(i)), (f"{i}.txt", f"\ufeffcaption {i}".encode())):
            members |= {
                f"./._{name}": b"\0\5\26\7" + bytes(80),
                f"__MACOSX/{name}": b"x",
                f"./{name}": content,
            }
    members |= {"3.webp": png(3), "3.json": '\ufeff{"caption": "caption 3"}'.encode()}
    members |= {
        "4.a.png": b"a mask",
        "4.png": png(4),
        "4.txt": b"caption 4",
        "4.z.png": b"x",
        "4.z.json": b"x",
    }
    members |= {"5.image.png": png(5), "5.txt": b"caption 5"}
    members |= {"\udcff.png": png(4), "\udcff.txt": b"x"}  # a name that is not UTF-8
    expected = [f"caption {i}" for i in range(5)]
    write_tar(tmp_path / "plain/0.tar", members)
    content = (tmp_path / "plain/0.tar").read_bytes()
    for suffix, packed in (("TGZ", gzip.compress(content)), ("tar.zst", zstandard.compress(content))):
        (tmp_path / suffix).mkdir()
        (tmp_path / suffix / f"0.{suffix}").write_bytes(packed)
    for name in ("plain", "plain/0.tar", "TGZ", "tar.zst"):
        assert captions_in(tmp_path / name) == expected
    once = data.OnePass(data.open_source(f"{tmp_path}/plain", SIZE, 0), 8, workers=0)
    list(once)
    two_dots, not_utf8 = sorted(once.skipped, key=lambda reason: "UTF-8" in reason)
    assert two_dots.endswith("5: no image, for the name of 5.image.png has two dots")
    assert not_utf8.endswith("?: the file name is not UTF-8")


def test_bombs_in_tars(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 2**16)
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * (data.MAX_HEADER + 1)))
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("x")
        member.pax_headers = {"comment": "x" * (data.MAX_HEADER + 1)}
        tar.addfile(member)
    write_tar(tmp_path / "zeros.tar", {"a.png": png(1), "b.png": bytes(2**24)})
    (tmp_path / "zeros.tar.zst").write_bytes(zstandard.compress((tmp_path / "zeros.tar").read_bytes()))
    for name, reason in (
        ("long.tar", "a header of"),
        ("pax.tar", "a header of"),
        ("zeros.tar.zst", "compressed into"),
    ):
        with pytest.raises((tarfile.ReadError, ValueError), match=reason):
            list(data.tar_rows(str(tmp_path / name)))
    assert len(list(data.tar_rows(str(tmp_path / "zeros.tar")))) == 2


# -----------------------------------------------------------------------------------------------------------
# crops


def noise_image(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width * height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(40, 60), (64, 64), (333, 131), (517, 1031), (20, 33)])
def test_the_centre_crop_is_that_of_adm(size):
    image = smaller = noise_image(*size)
    while min(smaller.size) >= 64:
        smaller = smaller.resize((smaller.width // 2, smaller.height // 2), Image.Resampling.BOX)
    width, height = (round(side * 32 / min(smaller.size)) for side in smaller.size)
    pixels = np.array(smaller.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(data.centre_crop(image, 32), pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("size", [(40, 60), (333, 131), (517, 1031), (20, 33)])
def test_the_random_crop_is_a_square_of_the_resized_image(size):
    image = noise_image(*size)
    width, height = (round(side * 48 / min(size)) for side in size)
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    for across, down in ((0.0, 0.0), (0.999999, 0.999999), (0.3, 0.8)):
        left, top = int(across * (width - 31)), int(down * (height - 31))
        expected = resized[top : top + 32, left : left + 32]
        assert abs(data.random_crop(image, 32, across, down) - expected).max() <= 2


@pytest.mark.parametrize("name", CAPTIONED)
def test_random_crops_and_flips_depend_on_the_seed_and_the_sample(name, tmp_path):
    ramp = np.zeros((48, 48, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(48), np.arange(48)[:, None]  # the place of every pixel
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    if name == "tar":
        write_tar(tmp_path / "0.tar", {f"{i:02d}.png": file.getvalue() for i in range(16)})
    elif name == "parquet":
        write_parquet(tmp_path / "0.parquet", image=[{"bytes": file.getvalue(), "path": None}] * 16)
    else:
        for i in range(16):
            (tmp_path / f"{i:02d}.png").write_bytes(file.getvalue())

    def places(seed: int, flip: bool) -> list[tuple]:
        source = data.open_source(str(tmp_path), SIZE, seed, crop="random", flip=flip)
        [images] = take(data.Loader(source, 16, workers=0), 4, "image")
        return [(int(i[0, 0, 0]), int(i[1, 0, 0]), int(i[0, 0, -1]) - int(i[0, 0, 0])) for i in images]

    first = places(0, flip=True)
    assert first == places(0, flip=True) != places(1, flip=True)
    assert {width for *_, width in first} == {31, -31}
    assert 16 < sum(width > 0 for *_, width in first) < 48
    lefts, tops, widths = (set(values) for values in zip(*places(0, flip=False), strict=True))
    assert lefts == tops == set(range(17)) and widths == {31}


def test_the_nano_world_is_neither_cropped_nor_flipped():
    plain = data.open_source("nano", 48, 0)
    other = data.open_source("nano", 48, 0, crop="random", flip=True)
    assert all((plain[i]["image"] == other[i]["image"]).all() for i in range(4))


# -----------------------------------------------------------------------------------------------------------
# order: any number of processes and workers, and resume


def global_batches(names: str, steps: int, world_size=1, workers=0, start=0, positions=None) -> tuple:
    """The global batches of all processes, and their positions as a checkpoint stores them."""
    source = data.open_source(names, SIZE, 3, crop="random", flip=True, text_only=True)
    loaders = [
        data.Loader(source, 8, workers, start, rank, world_size, positions) for rank in range(world_size)
    ]
    batches = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        batch = {key: [x for part in parts for x in part[key]] for key in (*data.PER_SAMPLE, "image_index")}
        batches.append(batch | {"image": torch.cat([part["image"] for part in parts]).numpy().tobytes()})
    positions = {key: value for loader in loaders for key, value in loader.positions.items()}
    return batches, json.loads(json.dumps(positions))


MIXTURES = {
    "captions": "ROOT/folder=2,ROOT/tar=1,ROOT/parquet=0.5,nano=1",
    # With so much text alone, some workers have no image at all.
    "talks": "ROOT/talks.jsonl=3,ROOT/wds_manifest.json=3,ROOT/tar=1,nano:questions=1,ROOT/words.jsonl=4",
}


@pytest.mark.parametrize("name", ["ROOT/folder", "ROOT/tar", *MIXTURES])
def test_batches_do_not_depend_on_the_number_of_processes_and_workers(name, root):
    names = MIXTURES.get(name, name).replace("ROOT", str(root))
    whole, _ = global_batches(names, 9)
    assert [index for batch in whole for index in batch["index"]] == list(range(8 * 9))
    if name == "talks":
        assert len({len(batch["image_index"]) for batch in whole}) > 3
    for world_size, workers in ((1, 3), (4, 0), (2, 1)):
        batches, positions = global_batches(names, 4, world_size, workers)
        assert batches == whole[:4], (world_size, workers)
    # Stopped after four steps on two processes; resumed on four, then on one.
    batches, positions = global_batches(names, 3, 4, 0, 4, positions)
    assert batches == whole[4:7]
    batches, _ = global_batches(names, 2, 1, 2, 7, positions)
    assert batches == whole[7:]


def test_mixtures_keep_their_weights(root):
    source = data.open_source(f"nano:objects=3,nano:text=1,{root}/folder=0.5", SIZE, 0)
    assert source.counts.tolist() == [667, 222, 111]
    places = [source.place(number) for number in range(3000)]
    for owner, count in enumerate(source.counts):
        assert [number for which, number in places if which == owner] == list(range(3 * count))
    passes = Counter(source[n]["caption"] for n in range(2000) if places[n][0] == 2)
    assert len(passes) == 48 and set(passes.values()) == {4, 5}


def test_few_shards_are_shuffled_in_larger_blocks(tmp_path):
    write_tables(tmp_path, 1, 200)
    loader = data.Loader(data.open_source(str(tmp_path), SIZE, 0), 64, workers=0)
    first = take(loader, 1, "caption")[0]
    assert len(set(first)) == 64 and sum(int(caption.split()[1]) > 63 for caption in first) > 30


def test_batches_and_shards_that_cannot_be_split(root, capsys):
    with pytest.raises(ValueError, match="split over 3"):
        data.Loader(data.open_source("nano", SIZE, 0), 8, world_size=3)
    source = data.open_source(str(root / "tar"), SIZE, 0)
    with pytest.raises(ValueError, match="8 shards in 8 lanes, which cannot be split over 16"):
        data.Loader(source, 64, world_size=16)
    loader = data.Loader(source, 12, workers=0)  # 6 lanes of 8 shards
    assert "8 shards in 6 unequal lanes" in capsys.readouterr().err
    assert len(set(take(loader, 6, "caption")[0])) == 48
    with pytest.raises(ValueError, match="in 6 lanes: resume with its --batch"):
        data.Loader(source, 8, workers=0, positions=loader.positions)


def one_pass(source: data.Mixture, limit=None, world_size=1, workers=0) -> dict[tuple, str]:
    """What all processes together get in one pass: captions by index, in order."""
    samples = []
    for rank in range(world_size):
        for batch in data.OnePass(source, 5, limit, workers, rank, world_size):
            assert batch["image"].shape[1:] == (3, SIZE, SIZE) and len(batch["image"]) <= 5
            samples += zip(map(tuple, batch["index"]), batch["caption"], strict=True)
    assert len(dict(samples)) == len(samples)
    return dict(sorted(samples))


@pytest.mark.parametrize("name", CAPTIONED)
def test_one_pass_has_every_sample_once_however_it_is_split(name, root):
    source = data.open_source(str(root / name), SIZE, seed=0)
    whole = one_pass(source)
    assert sorted(whole.values()) == sorted(f"image {i}" for i in range(48))
    assert one_pass(source, None, 2, 2) == one_pass(source, None, 11) == whole  # more processes than shards
    some = one_pass(source, 20)
    assert len(some) == 20 and some.items() <= whole.items()
    assert some != dict(list(whole.items())[:20])  # these could be of one class
    assert one_pass(source, 20, 3) == one_pass(source, 20, 1, 2) == some
    assert one_pass(source, 1000, 2) == whole


def test_few_shards_are_divided_between_processes_before_their_workers(root):
    source = data.open_source(str(root / "tar"), SIZE, seed=0)  # 8 shards of 6
    for rank in range(2):
        once = data.OnePass(source, 5, None, 8, rank, 2)
        assert sum(len(batch.get("index", ())) for w in range(8) for batch in once.batches(w, 8)) == 24


def test_one_pass_over_a_mixture(root):
    source = data.open_source(f"{root}/tar=3,{root}/folder=1", SIZE, seed=0)
    whole = one_pass(source)
    assert Counter(whole.values()) == Counter([f"image {i}" for i in range(48)] * 2)
    part = one_pass(source, 40, world_size=2)
    assert part.items() <= whole.items() and len(part) == 40
    assert sum(owner == 0 for owner, *_ in part) > 20
    source = data.open_source("nano:text,nano:scenes", SIZE, seed=0)
    assert set(one_pass(source, 7, world_size=3).values()) == {source[i]["caption"] for i in range(7)}
    with pytest.raises(ValueError, match="nano:text has no end: give a limit"):
        one_pass(source)


# -----------------------------------------------------------------------------------------------------------
# micro-batches


def test_micro_batches_have_equal_sizes_and_their_own_images():
    batch = {"index": list(range(10, 17)), "conversation": [[]] * 7, "image_index": [11, 12, 16]}
    batch["latents"] = torch.tensor(batch["image_index"])
    images = {
        1: [[11, 12, 16]], 2: [[11, 12], [16]], 3: [[11, 12], [], [16]],
        7: [[], [11], [12], [], [], [], [16]], 20: [[], [11], [12], [], [], [], [16]],
    }  # fmt: skip
    for count, expected in images.items():
        parts = data.micro_batches(batch, count)
        assert sum((part["index"] for part in parts), []) == batch["index"]
        assert max(len(part["index"]) for part in parts) - min(len(part["index"]) for part in parts) <= 1
        assert [part["image_index"] for part in parts] == expected
        assert [part["latents"].tolist() for part in parts] == expected


def test_micro_batches_group_conversations_by_length():
    talks = [[("user", "x" * length)] for length in (50, 3, 48, 1, 49, 2)]
    batch = {"index": list(range(6)), "conversation": talks, "image_index": [1, 4]}
    batch["latents"] = torch.tensor(batch["image_index"])
    short, long = data.micro_batches(batch, 2)
    assert (short["index"], long["index"]) == ([3, 5, 1], [2, 4, 0])
    assert short["conversation"] == [talks[i] for i in short["index"]]
    assert (short["latents"].tolist(), long["latents"].tolist()) == ([1], [4])


# -----------------------------------------------------------------------------------------------------------
# unusable sources


def test_unusable_sources_are_refused_when_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    write_parquet(tmp_path / "captions/0.parquet", text=["no image"])
    write_lines(tmp_path / "empty.jsonl", [""])
    names = {
        "nowhere": "no such folder", "./no/where": "no such folder", "nano,nowhere": "no such folder",
        "my/pics": "no such folder, and no data set of the hub",
        "nano:birds": "no domain", "nano:text=x": "above zero", "nano:text=0": "above zero",
        "nano=nan": "above zero", "nano:text=5000,nano:scenes": "differ too much",
        f"{tmp_path}/empty": "it is empty", f"{tmp_path}/captions": "no image column",
        f"{tmp_path}/empty.jsonl": "empty.jsonl.* is empty", "": "empty name", "nano,": "empty name",
        "README.md": "a file of another kind",
    }  # fmt: skip
    for i, content in enumerate(("{", "[]", "3", "{}", '{"tars": 3}', '{"tars": [3]}', '{"tars": []}')):
        (tmp_path / f"{i}.json").write_text(content)
        names[f"{tmp_path}/{i}.json"] = f"{i}.json"
    for name, message in names.items():
        with pytest.raises(ValueError, match=message):
            data.open_source(name, 48, 0)


def test_a_source_without_a_usable_sample_ends_in_an_error(tmp_path):
    write_folder(tmp_path / "folder", 3)
    for i in range(3):
        (tmp_path / f"folder/{i}.png").write_bytes(b"junk")
    write_tar(tmp_path / "tar/0.tar", {"x.jpg": b"junk", "y.txt": b"no image"})
    write_tar(tmp_path / "empty/0.tar", {})
    rows = [{"image": None, "conversations": talk(1)}] * 3  # its image is missing
    write_lines(tmp_path / "talks.jsonl", rows)
    write_tar(tmp_path / "talks/0.tar", {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)})
    (tmp_path / "wds.json").write_text('{"tars": ["talks/0.tar"]}')
    (tmp_path / "gone.json").write_text('{"tars": ["talks/1.tar"]}')
    for name, message in (
        ("folder", "100 unusable"), ("tar", "y: no image"), ("empty", "empty"),
        ("talks.jsonl", "100 unusable.*1 <image> for 0"), ("wds.json", "1 <image> for 0"),
        ("gone.json", "no usable sample.*FileNotFound"),
    ):  # fmt: skip
        source = data.open_source(str(tmp_path / name), SIZE, 0, text_only=True)
        with pytest.raises(ValueError, match=message):
            next(data.Loader(source, 2, workers=0))


class Stalled(data.NanoSource):
    def __getitem__(self, number: int) -> dict:
        if number == 9:
            time.sleep(60)
        return super().__getitem__(number)


def test_a_stalled_read_ends_in_an_error(monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.5)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # else it is joined for 5 s
    loader = data.Loader(data.Mixture([Stalled("objects", SIZE, 0)], [1.0], 0), 4)
    take(loader, 2, "caption")
    with pytest.raises(OSError, match="no data for 0.5 s"):
        next(loader)


# -----------------------------------------------------------------------------------------------------------
# worker processes that are killed


def die_at(pattern: str, times: int, log: Path):
    """An open_image that kills its process for the samples of such names, the first times."""
    real = data.open_image

    def open_image(content: bytes, name: str) -> Image.Image:
        if re.search(pattern, name) and log.stat().st_size < times:
            log.write_bytes(log.read_bytes() + b"x")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(content, name)

    return open_image


@pytest.mark.parametrize("name, times", [("folder", 1), ("tar", 1), ("tar", 9), ("folder", 9)])
def test_batches_do_not_change_when_a_worker_is_killed(name, times, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CHECK", 0.1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    source = data.open_source(str(root / name), SIZE, 0)
    [expected] = take(data.Loader(source, 8, workers=0), 6, "caption")
    (tmp_path / "log").touch()
    monkeypatch.setattr(data, "open_image", die_at(r"/0?20\b", times, tmp_path / "log"))
    loader = data.Loader(source, 8, workers=2)
    [captions] = take(loader, 6, "caption")
    err = capsys.readouterr().err
    if times == 1:
        assert captions == expected and loader.skipped == [] and err.count("a data worker died, reading") == 1
        return
    # A second death is the last one that this sample causes.
    assert "image 20" not in captions
    assert err.count("a data worker died, reading") == 2 and (tmp_path / "log").read_bytes() == b"xx"
    [message] = set(loader.skipped)
    assert message.endswith(": two worker processes died on it")


def test_workers_that_die_again_and_again_end_in_an_error(root, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHECK", 0.1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    (tmp_path / "log").touch()
    monkeypatch.setattr(data, "open_image", die_at("", 99, tmp_path / "log"))
    monkeypatch.setattr(data, "MAX_DEATHS", 3)
    loader = data.Loader(data.open_source(str(root / "folder"), SIZE, 0), 8, workers=1)
    with pytest.raises(OSError, match=r"a data worker died, reading .*\d.png"):
        next(loader)
    with pytest.raises(OSError, match=r"a data worker died, reading .*\d.png"):
        list(data.OnePass(loader.source, 8))


# -----------------------------------------------------------------------------------------------------------
# data that change between stop and resume


@pytest.mark.parametrize("name", ["tar", "folder", "parquet"])
def test_data_that_moved_go_on_and_data_that_changed_have_another_identity(name, root, tmp_path):
    _, positions = global_batches(f"{root}/{name}=2,nano:text=1", 3)
    expected, _ = global_batches(f"{root}/{name}=2,nano:text=1", 3, 1, 0, 3, positions)
    shutil.copytree(root / name, tmp_path / "moved")
    names = f"{tmp_path}/moved=2,nano:text=1"
    assert global_batches(names, 3, 2, 0, 3, positions)[0] == expected
    before = data.open_source(f"{root}/{name}=2,nano:text=1", SIZE, 0).identity
    assert data.open_source(names, SIZE, 0).identity == before
    if name == "folder":
        write_folder(tmp_path / "moved", 50)
    else:
        next((tmp_path / "moved").glob("07.*")).unlink()
    # Streams begin anew.
    global_batches(names, 1, 1, 0, 3, positions)
    changed, nano = data.open_source(names, SIZE, 0).identity
    numbers = ("48 images", "50 images") if name == "folder" else ("8 shards", "7 shards")
    assert (before[0].split(" (")[0], changed.split(" (")[0]) == numbers and nano == "nano:text"


# -----------------------------------------------------------------------------------------------------------
# unusable samples are skipped and named


NO_CAPTIONS = (None, 3, ["a", "b"], " ", "")


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_captions_that_are_none_are_skipped_if_they_are_needed(kind, tmp_path, capsys):
    for number, caption in enumerate([*NO_CAPTIONS, "good"]):
        row = {"text": caption, "conversations": None}
        if kind == "folder":
            write_images(tmp_path, f"{number}.png")
            with (tmp_path / "metadata.jsonl").open("a") as file:
                file.write(json.dumps({"file_name": f"{number}.png"} | row) + "\n")
        elif kind == "tar":
            files = {"x.png": png(number), "x.json": json.dumps(row).encode()}
            write_tar(tmp_path / f"{number}.tar", files)
        else:
            columns = {key: [value] for key, value in row.items()}
            write_parquet(
                tmp_path / f"{number}/0.parquet", image=[{"bytes": png(number), "path": None}], **columns
            )
    paths = [tmp_path] if kind != "parquet" else [tmp_path / str(number) for number in range(6)]
    samples, needed = [], []
    for path in paths:  # tables of different types cannot be in one folder
        samples += data.open_source(str(path), SIZE, 0).once(None, 0, 1)
        needed += data.open_source(str(path), SIZE, 0, captions=True).once(None, 0, 1)
    assert sorted(map(str, (sample["caption"] for sample in samples))) == ["None"] * 5 + ["good"]
    assert [sample["caption"] for sample in needed if "image" in sample] == ["good"]
    reasons = [reason for sample in needed for reason in sample.get("skipped", [])]
    assert len(reasons) == 5 and all(reason.endswith(": no caption") for reason in reasons)


def test_requests_for_nothing_are_skipped_and_questions_are_not():
    nothing, question = data.request("", 0.6), [("user", "<image>\nwhat?"), ("assistant", "a cat")]
    talks = data.Transform(SIZE, text_only=True, captions=True)  # as text-to-image, also from latents
    data.check_text("x", None, None, question, talks)
    data.check_text("x", None, None, nothing, data.Transform(SIZE))
    for conversation, transform in ((nothing, talks), (question, data.Transform(SIZE, captions=True))):
        with pytest.raises(data.SkipSample, match="x: no caption"):
            data.check_text("x", None, None, conversation, transform)


def test_labels_out_of_range_are_skipped(tmp_path):
    labels = (0, 9, 10, -1, None, True)
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number}.png": png(number), f"{number}.json": json.dumps({"label": label}).encode()}
    write_tar(tmp_path / "0.tar", files)
    source = data.open_source(str(tmp_path), SIZE, 0)
    assert len(list(source.once(None, 0, 1))) == 6
    source.need_labels(10)
    samples = list(source.once(None, 0, 1))
    assert sorted(sample["label"] for sample in samples if "image" in sample) == [0, 9]
    reasons = sorted(reason.split(": ")[-1] for sample in samples for reason in sample.get("skipped", []))
    wrong = ", but the classes are 0 to 9"
    assert reasons == [f"label -1{wrong}", f"label 10{wrong}", "no label", "no label"]


def test_damaged_images_are_skipped_and_named(tmp_path):
    write_folder(tmp_path / "folder", 40)
    write_tars(tmp_path / "tar", 4, 10)
    write_tables(tmp_path / "parquet", 4, 10)
    (tmp_path / "folder/7.png").write_bytes(b"")
    (tmp_path / "folder/8.png").write_bytes(png(8)[:60])
    (tmp_path / "folder/9.png").unlink()
    files = {"x.jpg": b"junk", "x.txt": b"bad", "y.jpg": png(10), "y.txt": b"image 10"}
    write_tar(tmp_path / "tar/01.tar", files)
    images = [{"bytes": b"junk", "path": None}, {"bytes": png(10), "path": None}, None]
    write_parquet(tmp_path / "parquet/01.parquet", image=images, text=["bad", "image 10", "none"])
    for name, usable, bad in (
        ("folder", 37, ["7.png", "8.png", "9.png"]),
        ("tar", 31, ["01.tar: x"]),
        ("parquet", 31, ["row 0", "row 2"]),
    ):
        source = data.open_source(str(tmp_path / name), SIZE, 0)
        loader = data.Loader(source, 8, workers=1)
        [captions] = take(loader, 12, "caption")
        assert len(captions) == 96 and "bad" not in captions
        once = data.OnePass(source, 4, workers=2)
        assert sum(len(batch["index"]) for batch in once) == usable and len(once.skipped) == len(bad)
        for messages in (loader.skipped, once.skipped):
            assert all(any(part in message for message in messages) for part in bad), messages
            assert all(any(part in message for part in bad) for message in messages), messages


def test_a_shard_that_vanishes_or_ends_in_the_middle(tmp_path):
    write_tars(tmp_path, 4, 70)  # more rows than a block has
    whole = (tmp_path / "02.tar").read_bytes()
    (tmp_path / "02.tar").write_bytes(whole[: len(whole) // 3])
    loader = data.Loader(data.open_source(str(tmp_path), SIZE, 0), 4, workers=0)
    take(loader, 2, "caption")
    (tmp_path / "01.tar").unlink()
    [captions] = take(loader, 140, "caption")
    messages = loader.skipped
    assert any("the rest of shard 1: FileNotFoundError" in message for message in messages), messages
    assert any("the rest of shard 2:" in message for message in messages)
    numbers = {int(caption.split()[1]) for caption in captions}
    assert set(range(70)) | set(range(210, 280)) <= numbers and 140 in numbers


def test_the_end_of_a_tar_tells_whether_it_is_whole(tmp_path):
    for size in range(0, 24 * 512, 512):  # wherever its end lies in the blocks that tarfile reads
        write_tar(tmp_path / "x.tar", {"a.txt": bytes(size), "b.png": png(1)})
        assert [row["name"][-1] for row in data.tar_rows(str(tmp_path / "x.tar"))] == ["a", "b"]
    write_tar(tmp_path / "x.tar", {"a.txt": b"x" * 3000, "b.png": png(1)})
    whole = (tmp_path / "x.tar").read_bytes()
    for length in range(256, len(whole.rstrip(b"\0")), 256):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises((EOFError, tarfile.ReadError)):
            list(data.tar_rows(str(tmp_path / "x.tar")))


def say(*texts: str, speakers=("human", "gpt")) -> list[dict]:
    return [{"from": s, "value": text} for s, text in zip(itertools.cycle(speakers), texts)]  # noqa: B905


BAD = (  # image, conversations, why it is skipped
    (None, say("draw", "<image>"), "1 <image> for 0 images"),
    ("p.png", say("<image>", "<image>"), "2 <image> for 1 images"),
    (["p.png", "p.png"], say("<image>", "b"), "2 images"),
    (3, say("<image>", "b"), "damaged json"),
    ("q.png", say("<image>", "b"), "No such file"),
    ("junk.png", say("<image>", "b"), "cannot read the image"),
    ("a\0b", say("<image>", "b"), "null byte"),
    (None, None, "not a list of turns"),
    (None, [], "do not alternate"),
    (None, say("hi", speakers=["system"]), "do not alternate"),
    (None, "hello", "not a list of turns"),
    (None, [{"from": "human"}], "not a list of turns"),
    (None, say(3, "a"), "not a list of turns"),
    (None, say("a", "b", "c"), "do not alternate"),
    (None, say("a", "b", speakers=["human"]), "do not alternate"),
    (None, say("a", "b", speakers=["user", "assistant"]), "do not alternate"),
    (None, say("a", " \n"), "a turn is empty"),
    (None, say("a<|im_end|>\n", "b"), "special token <|im_end|>"),
    (None, say("a", "b <im_start>"), "special token <im_start>"),
    (None, say("x" * 2**15, "b"), "32,769 characters"),
    (None, say("y" * 600, "b"), "601 tokens of conversation, the limit is 600"),
)
DAMAGED_LINES = ("{", "[1]", "null", "3", "[" * 100_000, '{"image": "p.png"}', "\0\0\0")
GOOD = {"image": "p.png", "conversations": say("<image>\na \ud800 <b>", "fine")}


@pytest.mark.parametrize("dropped", [[], [{"from": "system", "value": "<image>"}]])
def test_image_without_placeholder_is_read_in_the_first_turn(dropped):
    row = {"name": "a", "image": "p.png", "conversations": [*dropped, *say("what?", "a cat")]}
    assert data.parse_conversation(row) == [("user", "<image>\nwhat?"), ("assistant", "a cat")]


def test_unusable_conversations_are_skipped_and_named(tmp_path):
    (tmp_path / "p.png").write_bytes(png(1))
    (tmp_path / "junk.png").write_bytes(b"junk")
    rows, files, reasons = ["", GOOD], {"good.json": json.dumps(GOOD).encode(), "good.png": png(1)}, {}
    for i, (image, conversations, reason) in enumerate(BAD):
        rows.append({"image": image, "conversations": conversations})
        reasons[f"t.jsonl: line {len(rows)}:"] = reason
        if image in (None, "p.png", "junk.png") and conversations is not None:  # null is none in a tar
            files[f"bad{i}.json"] = json.dumps({"conversations": conversations}).encode()
            files |= {f"bad{i}.png": (tmp_path / image).read_bytes()} if image else {}
            reasons[f"0.tar: bad{i}:"] = reason
    for line in DAMAGED_LINES:
        rows.append(line)
        reasons[f"t.jsonl: line {len(rows)}:"] = ""
    write_lines(tmp_path / "t.jsonl", rows)
    write_tar(tmp_path / "tars/0.tar", files)

    def encode_chat(turns):  # a token per character
        return "".join(text for _, text in turns), ""

    limit = {"encode_chat": encode_chat, "max_seq_len": 600}
    source = data.open_source(f"{tmp_path}/t.jsonl,{tmp_path}/tars", SIZE, 0, text_only=True, **limit)
    once = data.OnePass(source, 8, workers=0)
    usable = [conversation for batch in once for conversation in batch["conversation"]]
    assert usable == [[["user", "<image>\na ? <b>"], ["assistant", "fine"]]] * 2
    assert len(once.skipped) == len(reasons)
    for name, reason in reasons.items():
        [message] = [message.replace("/junk.png", ":") for message in once.skipped if name in message + ":"]
        assert reason in message, (name, message)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to have so many pixels."""
    header = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00"
    checked = header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + checked + png(1)[33:]


def test_hostile_files_are_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE", 2**21)
    caption = "star <image> <|im_end|> <im_start> " + "x" * 2**20
    write_tar(tmp_path / "t/0.tar", {
        "../outside.png": png(1), "../outside.txt": b"up",
        "/absolute.png": png(1), "/absolute.txt": b"root",
        "huge.png": bomb(20_000, 20_000), "huge.txt": b"boom",
        "large.png": bomb(10_000, 10_000), "large.txt": b"boom",
        "strip.png": png(1, (4, 201)), "strip.txt": b"boom",
        "deep.png": png(1), "deep.json": b"[" * 100_000,
        "list.png": png(1), "list.json": b"[1]",
        "long.png": png(200), "long.txt": caption.encode(), "long.json": b'{"url": "x"}',
        "bytes.png": png(201), "bytes.txt": b"\xff\xfe star",
        ".png": png(202), "number.png": png(203), "number.json": b'{"text": 3, "caption": "three"}',
        "heavy.png": bytes(2**21 + 1),
    })  # fmt: skip
    with tarfile.open(tmp_path / "t/0.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    loader = data.Loader(data.open_source(str(tmp_path / "t"), SIZE, 0), 1, workers=0)
    [captions] = take(loader, 9, "caption")
    messages = "\n".join(loader.skipped)
    for reason in (
        "outside: unsafe file name", "absolute: unsafe file name", "huge: DecompressionBombError",
        "large has 10000 x 10000 pixels", "strip is a strip of 4 x 201", "deep: damaged json",
        "list: damaged json", "heavy.png has 2,097,153 bytes",
    ):  # fmt: skip
        assert reason in messages, messages
    assert set(tmp_path.rglob("*")) == before and not (tmp_path.parent / "outside.png").exists()
    [long] = {c for c in captions if c and c.startswith("star")}
    assert "<" not in long and len(long) <= data.MAX_CAPTION and "three" in captions
    assert None in captions and "" not in captions
    assert not {"up", "root", "boom"} & set(captions)


def damage(content: bytes, chance: random.Random, truncate: bool, most: int) -> bytes:
    """Some bytes changed at random, and perhaps the rest cut off."""
    damaged = bytearray(content[: chance.randint(0, len(content))] if truncate else content)
    for _ in range(chance.randint(0, most) if damaged else 0):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    return bytes(damaged)


def test_random_damage_raises_nothing_but_the_documented_errors(tmp_path):
    chance, outcomes = random.Random(0), Counter()
    images = [png(1, format=format) for format in ("PNG", "JPEG", "WEBP", "GIF")]
    for trial in range(400):
        try:
            content = damage(chance.choice(images), chance, trial % 2 == 1, 8)
            outcomes[data.open_image(content, "x").mode] += 1
        except data.SkipSample:
            outcomes["skipped"] += 1
    assert outcomes["RGB"] > 20 and outcomes["skipped"] > 100
    write_tars(tmp_path / "tar", 1, 4)
    write_tables(tmp_path / "parquet", 1, 4)
    write_folder(tmp_path / "folder", 2)
    files = [tmp_path / "tar/00.tar", tmp_path / "parquet/00.parquet", tmp_path / "folder/metadata.jsonl"]
    for trial in range(60):
        file = files[trial % 3]
        good = file.read_bytes()
        file.write_bytes(damage(good, chance, trial % 2 == 1, 20))
        os.utime(file, (trial, trial))  # `datasets` caches files by their time
        try:
            take(data.Loader(data.open_source(str(file.parent), SIZE, 0), 1, workers=0), 3, "caption")
            outcomes["read"] += 1
        except (ValueError, OSError):
            outcomes["refused"] += 1
        file.write_bytes(good)
    assert outcomes["read"] > 5 and outcomes["refused"] > 5
