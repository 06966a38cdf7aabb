"""Sources and batches: a sample depends on the seed and its number only, and unusable files are skipped."""

import io
import itertools
import json
import os
import random
import struct
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
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
    assert [part.domain for part in source.sources] == ["objects", "scenes", "text", "questions"]
    assert source.counts.tolist() == [630, 135, 135, 100]
    batch = data.collate([source[i] for i in range(200)])
    # Every sample serves those who need images and captions only.
    assert batch["image"].shape == (200, 3, 48, 48) and all(batch["caption"])
    wordings = Counter()
    for number, conversation in zip(batch["index"], batch["conversation"], strict=True):
        (_, question), (_, answer) = conversation
        wanted = data.requested_caption(conversation)
        if source.place(number)[0] == 3:
            assert wanted is None and question.startswith("<image>\n") and "<image>" not in answer
        else:
            assert wanted == data.clean(batch["caption"][number])
            wordings[next(t for t in data.REQUESTS if question.startswith(t.split("{}")[0]))] += 1
    assert len(wordings) == len(data.REQUESTS) and 20 < min(wordings.values())


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
        (_, question), (_, answer) = sample["conversation"]
        assert (question.removeprefix("<image>\n"), answer) in drawn.questions
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


@pytest.mark.parametrize("name", [*(f"ROOT/{name}" for name in CAPTIONED), "nano", *MIXTURES])
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


def test_batches_and_shards_that_cannot_be_split(root):
    with pytest.raises(ValueError, match="split over 3"):
        data.Loader(data.open_source("nano", SIZE, 0), 8, world_size=3)
    source = data.open_source(str(root / "tar"), SIZE, 0)
    with pytest.raises(ValueError, match="8 shards in 8 lanes, which cannot be split over 16"):
        data.Loader(source, 64, world_size=16)
    loader = data.Loader(source, 12, workers=0)  # 6 lanes of 8 shards
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
        "nowhere": "no data source", "./no/where": "no data source", "nano,nowhere": "no data source",
        "nano:birds": "no domain", "nano:text=x": "above zero", "nano:text=0": "above zero",
        "nano=nan": "above zero", "nano:text=5000,nano:scenes": "differ too much",
        f"{tmp_path}/empty": "it is empty", f"{tmp_path}/captions": "no image column",
        f"{tmp_path}/empty.jsonl": "empty.jsonl.* is empty",
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
# unusable samples are skipped and named


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
    ("p.png", say("draw", "here"), "0 <image> for 1 images"),
    (None, say("draw", "<image>"), "1 <image> for 0 images"),
    ("p.png", say("<image>", "<image>"), "2 <image> for 1 images"),
    ("p.png", [{"from": "system", "value": "<image>"}, *say("a", "b")], "0 <image> for 1 images"),
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


def test_unusable_conversations_are_skipped_and_named(tmp_path):
    (tmp_path / "p.png").write_bytes(png(1))
    (tmp_path / "junk.png").write_bytes(b"junk")
    rows, files, reasons = ["", GOOD], {"good.json": json.dumps(GOOD).encode(), "good.png": png(1)}, {}
    for i, (image, conversations, reason) in enumerate(BAD):
        rows.append({"image": image, "conversations": conversations})
        reasons[f"t.jsonl: line {len(rows)}:"] = reason
        if image in (None, "p.png", "junk.png"):
            files[f"bad{i}.json"] = json.dumps({"conversations": conversations}).encode()
            files |= {f"bad{i}.png": (tmp_path / image).read_bytes()} if image else {}
            reasons[f"0.tar: bad{i}:"] = reason
    for line in DAMAGED_LINES:
        rows.append(line)
        reasons[f"t.jsonl: line {len(rows)}:"] = ""
    write_lines(tmp_path / "t.jsonl", rows)
    write_tar(tmp_path / "tars/0.tar", files)
    limit = {"length": lambda turns: sum(len(text) for _, text in turns), "max_seq_len": 600}
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
    [long] = {c for c in captions if c.startswith("star")}
    assert "<" not in long and len(long) <= data.MAX_CAPTION and "three" in captions
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
