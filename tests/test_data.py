"""Sources and batches: what a sample is depends on the seed and its number alone; and what bad files do."""

import io
import itertools
import json
import os
import random
import tarfile
import time
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


def write_folder(path: Path, count: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with (path / "metadata.jsonl").open("w") as file:
        for i in range(count):
            (path / f"{i}.png").write_bytes(png(i))
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}) + "\n")


def write_tars(path: Path, shards: int, rows: int) -> None:
    """Images of the colour (i, 0, 0) with the caption "image i", some in json, some in txt."""
    for shard in range(shards):
        files = {}
        for i in range(shard * rows, (shard + 1) * rows):
            caption = f"image {i}"
            files[f"a/{i:03d}.jpg" if i % 2 else f"a/{i:03d}.png"] = png(i, format="JPEG" if i % 2 else "PNG")
            if i % 3:
                files[f"a/{i:03d}.txt"] = caption.encode()
            else:
                files[f"a/{i:03d}.json"] = json.dumps({"caption": caption, "url": None}).encode()
        write_tar(path / f"{shard:02d}.tar", files)


def write_tables(path: Path, shards: int, rows: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        columns = {"image": [{"bytes": png(i), "path": None} for i in numbers],
                   "text": [f"image {i}" for i in numbers]}  # fmt: skip
        Dataset.from_dict(columns).to_parquet(path / f"{shard:02d}.parquet")


WRITERS = {"folder": lambda path: write_folder(path, 48), "tar": lambda path: write_tars(path, 8, 6),
           "parquet": lambda path: write_tables(path, 8, 6)}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One folder of each kind, with the same 48 images."""
    root = tmp_path_factory.mktemp("sources")
    for name, write in WRITERS.items():
        write(root / name)
    return root


def take(loader: data.Loader, steps: int, *keys: str) -> list[list]:
    batches = list(itertools.islice(loader, steps))
    return [[sample for batch in batches for sample in batch[key]] for key in keys]


# -----------------------------------------------------------------------------------------------------------
# order


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_once_in_a_pass_with_its_caption(kind, sources):
    loader = data.Loader(data.open_source(str(sources / kind), SIZE, seed=0), 8, workers=0)
    images, captions, turns = take(loader, 6, "image", "caption", "conversation")
    assert sorted(captions) == sorted(f"image {i}" for i in range(48))
    for image, caption, conversation in zip(images, captions, turns, strict=True):
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8
        assert abs(int(image[0, 0, 0]) - int(caption.split()[1])) <= 2  # JPEG
        assert caption in conversation[0][1]
    [again] = take(loader, 6, "caption")
    assert sorted(again) == sorted(captions) and again != captions
    assert loader.skipped == []


@pytest.mark.parametrize("name", [*WRITERS, "nano", "folder=2,tar=1,parquet=0.5,nano=1"])
def test_the_order_is_the_same_for_any_number_of_processes_and_workers(name, sources):
    names = ",".join(part if part.startswith("nano") else f"{sources}/{part}" for part in name.split(","))

    def open_loader(rank=0, world=1, **kwargs) -> data.Loader:
        source = data.open_source(names, SIZE, seed=3, understanding=0.2)
        return data.Loader(source, 8, rank=rank, world=world, **kwargs)

    whole = open_loader(workers=0)
    first, second = take(whole, 5, "caption", "index"), take(whole, 6, "caption", "index")
    assert first[1] + second[1] == list(range(8 * 11))
    for world, workers in ((1, 1), (1, 3), (2, 0), (4, 2)):
        parts = [
            take(open_loader(rank, world, workers=workers), 5, "caption", "index") for rank in range(world)
        ]
        width = 8 // world
        for row, merged in enumerate(first):
            micro_batches = [
                parts[i // width % world][row][i // 8 * width + i % width] for i in range(len(merged))
            ]
            assert micro_batches == merged, (world, workers)

    # stopped after five steps on two processes, resumed on one, on four and with workers
    halves = [open_loader(rank, 2, workers=1) for rank in range(2)]
    for half in halves:
        take(half, 5, "caption")
    positions = json.loads(json.dumps(halves[0].positions | halves[1].positions))
    assert take(open_loader(start=5, positions=positions, workers=2), 6, "caption", "index") == second
    parts = [open_loader(rank, 4, start=5, positions=positions, workers=0) for rank in range(4)]
    ahead = [take(part, 6, "caption") for part in parts]
    assert [ahead[i // 2 % 4][0][i // 8 * 2 + i % 2] for i in range(48)] == second[0]
    positions = {key: value for part in parts for key, value in part.positions.items()}  # and once more
    assert take(open_loader(start=11, positions=positions, workers=0), 3, "caption") == take(
        whole, 3, "caption"
    )


def test_mixtures_keep_their_weights(sources):
    source = data.open_source(f"nano:objects=3,nano:text=1,{sources}/folder=0.5", SIZE, 0, understanding=0.2)
    samples = [source[i] for i in range(2000)]
    text = sum('"' in s["caption"] or "letters" in s["caption"] for s in samples)
    folder = Counter(s["caption"] for s in samples if s["caption"].startswith("image "))
    assert sum(folder.values()) == 2 * 111 and abs(text - 2 * 222) <= 2  # of 1000: 667, 222, 111
    assert set(folder.values()) == {4, 5}  # passes over its 48 images
    asked = np.mean(["<image>" in s["conversation"][0][1] for s in samples])
    assert abs(asked - 0.2 * 0.889) < 0.04
    assert all(sum("<image>" in t for _, t in s["conversation"]) == 1 for s in samples)


def test_requests_use_every_wording_and_the_caption():
    source = data.open_source("nano", 48, seed=0)
    turns = [source[i]["conversation"][0][1] for i in range(200)]
    for template in data.REQUESTS:
        head = template.partition("{}")[0]
        assert 20 < sum(turn.startswith(head) for turn in turns) < 90


def test_held_out_pairs_never_reach_the_training_stream():
    source = data.open_source("nano", 48, seed=0)
    names = [f"{color} {shape}" for shape, color in shapes.HELD_OUT]
    assert not any(name in source[i]["caption"] for i in range(1500) for name in names)


def test_pieces_of_a_batch():
    batch = {"index": list(range(7)), "image_index": list(range(7)), "image": torch.arange(7)}
    parts = data.micro_batches(batch, 3)
    assert [part["index"] for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert torch.equal(torch.cat([part["image"] for part in parts]), batch["image"])
    assert [part["index"] for part in data.micro_batches(batch, 20)] == [[i] for i in range(7)]
    batch = {"index": list(range(10, 17)), "image_index": [11, 12, 16], "latents": torch.tensor([11, 12, 16])}
    for count, images in ((1, [[11, 12, 16]]), (2, [[11, 12], [16]]), (3, [[11, 12], [], [16]]),
                            (7, [[], [11], [12], [], [], [], [16]])):  # fmt: skip
        parts = data.micro_batches(batch, count)
        assert sum((part["index"] for part in parts), []) == batch["index"]
        assert (
            [part["image_index"] for part in parts] == [part["latents"].tolist() for part in parts] == images
        )


def test_pieces_pad_little():
    talks = [[("user", "x" * length)] for length in (50, 3, 48, 1, 49, 2)]
    batch = {
        "index": list(range(6)),
        "conversation": talks,
        "image_index": [1, 4],
        "latents": torch.tensor([1, 4]),
    }
    short, long = data.micro_batches(batch, 2)
    assert (short["index"], long["index"]) == ([3, 5, 1], [2, 4, 0])
    assert short["conversation"] == [talks[i] for i in short["index"]]
    assert (short["latents"].tolist(), long["latents"].tolist()) == ([1], [4])
    assert data.micro_batches(batch, 1) == [batch]


# -----------------------------------------------------------------------------------------------------------
# crops


def noise_image(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width * height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(40, 60), (64, 64), (333, 131), (517, 1031), (20, 33)])
def test_centre_crop_is_that_of_the_evaluations(size):
    image = smaller = noise_image(*size)
    while min(smaller.size) >= 64:
        smaller = smaller.resize((smaller.width // 2, smaller.height // 2), Image.Resampling.BOX)
    width, height = (round(side * 32 / min(smaller.size)) for side in smaller.size)
    pixels = np.array(smaller.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 32) // 2, (width - 32) // 2
    np.testing.assert_array_equal(data.centre_crop(image, 32), pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("size", [(40, 60), (333, 131), (517, 1031), (20, 33)])
def test_random_crop_is_a_square_of_the_resized_image(size):
    image = noise_image(*size)
    width, height = (round(side * 48 / min(size)) for side in size)
    resized = np.array(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    for across, down in ((0.0, 0.0), (0.999999, 0.999999), (0.3, 0.8)):
        left, top = int(across * (width - 31)), int(down * (height - 31))
        expected = resized[top : top + 32, left : left + 32]
        assert abs(data.random_crop(image, 32, across, down) - expected).max() <= 2


@pytest.mark.parametrize("kind", WRITERS)
def test_random_crops_and_flips_depend_on_the_seed_and_the_sample(kind, tmp_path):
    ramp = np.zeros((48, 48, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(48), np.arange(48)[:, None]  # where a pixel was
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    if kind == "tar":
        write_tar(tmp_path / "0.tar", {f"{i:02d}.png": file.getvalue() for i in range(16)})
    elif kind == "parquet":
        rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 16}
        Dataset.from_dict(rows).to_parquet(tmp_path / "0.parquet")
    else:
        for i in range(16):
            (tmp_path / f"{i:02d}.png").write_bytes(file.getvalue())

    def places(seed: int, **kwargs) -> list[tuple]:
        source = data.open_source(str(tmp_path), SIZE, seed, crop="random", **kwargs)
        [images] = take(data.Loader(source, 16, workers=0), 4, "image")
        return [(int(i[0, 0, 0]), int(i[1, 0, 0]), int(i[0, 0, -1]) - int(i[0, 0, 0])) for i in images]

    first = places(0, flip=True)
    assert first == places(0, flip=True) != places(1, flip=True)
    assert {width for *_, width in first} == {31, -31}
    assert 16 < sum(width > 0 for *_, width in first) < 48
    lefts, tops = ({place[axis] for place in places(0)} for axis in (0, 1))
    assert lefts == tops == set(range(17))
    assert {width for *_, width in places(0)} == {31}


def test_the_nano_world_is_neither_cropped_nor_mirrored():
    plain, other = (data.open_source("nano", 48, 0, **k) for k in ({}, {"crop": "random", "flip": True}))
    assert all((plain[i]["image"] == other[i]["image"]).all() for i in range(4))
    with pytest.raises(ValueError, match="no crop 'corner'"):
        data.open_source("nano", 48, 0, crop="corner")


def test_a_strip_is_refused():
    file = io.BytesIO()
    Image.new("RGB", (4, 201)).save(file, "PNG")
    with pytest.raises(data.SkipSample, match="strip of 4 x 201"):
        data.open_image(file.getvalue())


# -----------------------------------------------------------------------------------------------------------
# every sample once


def everything(names: str, limit=None, worlds=1, workers=0, batch=5) -> dict[tuple, str]:
    """What all processes together get: captions by index, in order."""
    samples = []
    for rank in range(worlds):
        source = data.open_source(names, SIZE, seed=0)
        for part in data.OnePass(source, batch, limit, workers, rank, worlds):
            assert part["image"].shape[1:] == (3, SIZE, SIZE) and len(part["image"]) <= batch
            samples += zip(map(tuple, part["index"]), part["caption"], strict=True)
    assert len(dict(samples)) == len(samples)
    return dict(sorted(samples))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_finite_pass_has_every_sample_once_however_it_is_split(kind, sources):
    whole = everything(str(sources / kind))
    assert sorted(whole.values()) == sorted(f"image {i}" for i in range(48))
    for worlds, workers in ((2, 0), (3, 2), (11, 0)):  # 11: more than there are shards
        assert everything(str(sources / kind), None, worlds, workers) == whole
    some = everything(str(sources / kind), 20)
    assert len(some) == 20 and some.items() <= whole.items()
    assert some != dict(list(whole.items())[:20])  # not those of one class
    for worlds, workers in ((2, 0), (3, 2)):
        assert everything(str(sources / kind), 20, worlds, workers) == some
    assert everything(str(sources / kind), 1000, 2) == whole


def test_a_finite_pass_over_a_mixture(sources):
    names = f"{sources}/tar=3,{sources}/folder=1"
    whole = everything(names)
    assert Counter(whole.values()) == Counter([f"image {i}" for i in range(48)] * 2)
    part = everything(names, 40, worlds=2)
    assert part.items() <= whole.items() and len(part) == 40
    assert sum(owner == 0 for owner, *_ in part) > 20
    source = data.open_source("nano:text,nano:scenes", SIZE, seed=0)
    drawn = everything("nano:text,nano:scenes", 7, worlds=3)
    assert set(drawn.values()) == {source[i]["caption"] for i in range(7)}
    with pytest.raises(ValueError, match="nano:text has no end: give a limit"):
        everything("nano:text")


def test_a_finite_pass_leaves_out_and_names_what_is_damaged(tmp_path):
    write_folder(tmp_path / "folder", 8)
    write_tars(tmp_path / "tar", 2, 4)
    for i in (0, 6, 7):
        (tmp_path / f"folder/{i}.png").write_bytes(b"junk")
    content = (tmp_path / "tar/01.tar").read_bytes()
    (tmp_path / "tar/01.tar").write_bytes(content[:700])
    for kind, left, messages in (("folder", 5, ["0.png", "6.png", "7.png"]), ("tar", 4, ["rest of shard 1"])):
        for workers in (0, 2):
            batches = data.OnePass(data.open_source(str(tmp_path / kind), SIZE, 0), 2, workers=workers)
            assert sum(len(batch["index"]) for batch in batches) == left
            assert len(batches.skipped) == len(messages)
            assert all(any(m in s for s in batches.skipped) for m in messages), batches.skipped


def test_draws_depend_on_the_sample_and_not_on_its_batch():
    noise, u, v = data.flow_draws((16, 24), 7, [3, 4, 5, 6], torch.device("cpu"))
    for row, index in enumerate([3, 4, 5, 6]):
        alone = data.flow_draws((16, 24), 7, [index], torch.device("cpu"))
        assert torch.equal(alone[0][0], noise[row]) and alone[1][0] == u[row] and alone[2][0] == v[row]
    more = data.flow_draws((16, 24), 7, [3, 4, 5, 6], torch.device("cpu"), draws=3)
    assert [len(each) for each in more] == [12, 12, 12] and torch.equal(more[0][:4], noise)
    assert torch.equal(more[1][:4], u) and len(set(more[1].tolist())) == 12
    assert torch.equal(more[0][9], data.flow_draws((16, 24), 7, [4], torch.device("cpu"), draws=3)[0][2])
    many, u, v = data.flow_draws((16, 24), 0, list(range(500)), torch.device("cpu"))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs(u.mean() - 0.5) < 0.05 and abs(v.mean() - 0.5) < 0.05
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.15
    assert not torch.equal(many[0], data.flow_draws((16, 24), 1, [0], torch.device("cpu"))[0][0])


# -----------------------------------------------------------------------------------------------------------
# conversations

KINDS = ("request", "question", "text")


def talk(i: int) -> list[dict]:
    """A request for image i, a question about it, or neither, after a system turn that is dropped."""
    human, gpt = {
        "request": (f"Can you draw image {i}?", "Here you go:\n<image>"),
        "question": (f"<image>\nwhich of {i}?", f"number {i}"),
        "text": (f"say {i}", f"it is {i}"),
    }[KINDS[i % 3]]
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return [{"from": "system", "value": "Be brief."}, *turns][i % 2 :]


def write_lines(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n")
    return str(path)


def write_jsonl(root: Path, count: int) -> str:
    rows = []
    for i in range(count):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / f"images/{i}.png").write_bytes(png(i))
        none = ({}, {"image": None}, {"image": ""}, {"image": []})[i % 4]
        some = {"image": [f"images/{i}.png"] if i % 2 else f"images/{i}.png"}
        rows.append({"conversations": talk(i), "metadata": {"id": i}} | (none if i % 3 == 2 else some))
    return write_lines(root / "talks.jsonl", rows)


def write_talking_tars(root: Path, shards: int, rows: int) -> str:
    for shard in range(shards):
        files = {}
        for i in range(shard * rows, (shard + 1) * rows):
            about = {"conversations": talk(i), "metadata": None, "image_filename": f"{i:03d}.png"}
            files[f"{i:03d}.json"] = json.dumps(about).encode()
            if i % 3 < 2:
                files[f"{i:03d}.png"] = png(i)
        write_tar(root / f"tars/{shard:02d}.tar", files)
    return str(root / "tars")


def write_manifest(root: Path, shards: int, rows: int) -> str:
    write_talking_tars(root, shards, rows)
    tars = [f"tars/{i:02d}.tar" if i % 2 else str(root / f"tars/{i:02d}.tar") for i in range(shards)]
    (root / "wds_manifest.json").write_text(json.dumps({"dataset_name": "talks", "tars": tars}))
    return str(root / "wds_manifest.json")


def write_talking_tables(root: Path, shards: int, rows: int) -> str:
    (root / "tables").mkdir()
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        images = [{"bytes": png(i), "path": None} if i % 3 < 2 else None for i in numbers]
        Dataset.from_dict({"image": images, "conversations": [talk(i) for i in numbers]}).to_parquet(
            root / f"tables/{shard:02d}.parquet"
        )
    return str(root / "tables")


def check_talks(batch: dict) -> Counter:
    """Every image of a batch belongs to the conversation whose number it shows. How many of each kind."""
    assert len(batch["image"]) == len(batch["image_index"]) and batch["image"].shape[1:] == (3, SIZE, SIZE)
    shown, counts = dict(zip(batch["image_index"], batch["image"], strict=True)), Counter()
    for index, caption, turns in zip(batch["index"], batch["caption"], batch["conversation"], strict=True):
        if caption is None:  # not of the nano world or a caption of a tar
            i = int("".join(c for c in turns[0][1] if c.isdigit()))
            assert turns == [["user", talk(i)[-2]["value"]], ["assistant", talk(i)[-1]["value"]]]
            assert data.requested_caption(turns) == (f"image {i}" if KINDS[i % 3] == "request" else None)
            assert (index in shown) == (i % 3 < 2)
            if index in shown:
                assert (shown[index][0] == i).all()
            counts[KINDS[i % 3]] += 1
    return counts


TALKS = {"jsonl": lambda root: write_jsonl(root, 48), "tar": lambda root: write_talking_tars(root, 8, 6),
         "manifest": lambda root: write_manifest(root, 8, 6),
         "parquet": lambda root: write_talking_tables(root, 8, 6)}  # fmt: skip


@pytest.mark.parametrize("kind", TALKS)
def test_conversations_of_every_format(kind, tmp_path):
    name = TALKS[kind](tmp_path)
    loader = data.Loader(data.open_source(name, SIZE, 0, text_only=True), 8, workers=0)
    batches = list(itertools.islice(loader, 6))
    assert sum(map(check_talks, batches), Counter()) == dict.fromkeys(KINDS, 16)
    assert len({turns[0][1] for batch in batches for turns in batch["conversation"]}) == 48
    assert loader.skipped == []

    source = data.open_source(name, SIZE, 0)  # where images are needed, text is left out and counted
    loader = data.Loader(source, 8, workers=1)
    for batch in itertools.islice(loader, 12):
        assert batch["image_index"] == batch["index"] and set(check_talks(batch)) == {"request", "question"}
    assert loader.skipped and all("no image" in message for message in loader.skipped)
    once = data.OnePass(source, 5)
    assert sum(len(batch["image"]) for batch in once) == 32 and len(once.skipped) == 16


def test_mixed_conversations_are_the_same_for_any_number_of_processes_and_workers(tmp_path):
    write_jsonl(tmp_path, 48), write_manifest(tmp_path, 8, 6), write_tars(tmp_path / "captions", 8, 6)
    names = f"{tmp_path}/talks.jsonl=3,{tmp_path}/wds_manifest.json=3,{tmp_path}/captions=1,nano:text=1"
    names += f",{tmp_path}/words.jsonl=4"  # text alone, so that some workers have no image at all
    write_lines(tmp_path / "words.jsonl", [{"conversations": talk(i)} for i in range(2, 60, 3)])

    def open_loader(rank=0, world=1, **kwargs) -> data.Loader:
        source = data.open_source(names, SIZE, seed=3, text_only=True)
        return data.Loader(source, 8, rank=rank, world=world, **kwargs)

    def run(loaders: list[data.Loader], steps: int) -> list[dict]:
        """The global batches of all processes."""
        parts = [list(itertools.islice(loader, steps)) for loader in loaders]
        keys = ("index", "image_index", "conversation", "caption")
        return [
            {key: [x for batch in batches for x in batch[key]] for key in keys}
            | {"image": torch.cat([batch["image"] for batch in batches])}
            for batches in zip(*parts, strict=True)
        ]

    def same(some: list[dict], others: list[dict]) -> None:
        for one, other in zip(some, others, strict=True):
            assert torch.equal(one.pop("image"), other["image"])
            assert one == {key: other[key] for key in one}

    whole = open_loader(workers=0)
    first, second = run([whole], 6), run([whole], 6)
    counts = Counter()
    for batch in first + second:
        counts += check_talks(batch)
        assert batch["image_index"] == [
            number for number, turns in zip(batch["index"], batch["conversation"], strict=True)
            if "<image>" in turns[0][1] + turns[1][1]
        ]  # fmt: skip
    assert counts["text"] > 96 * 0.4 and min(counts["request"], counts["question"]) > 10
    assert len({len(batch["image_index"]) for batch in first + second}) > 3
    for world, workers in ((1, 3), (2, 0), (4, 2)):
        same(run([open_loader(rank, world, workers=workers) for rank in range(world)], 6), first)

    halves = [open_loader(rank, 2, workers=1) for rank in range(2)]  # stopped and resumed on another number
    run(halves, 6)
    positions = json.loads(json.dumps(halves[0].positions | halves[1].positions))
    same(run([open_loader(start=6, positions=positions, workers=2)], 6), second)
    same(run([open_loader(r, 4, start=6, positions=positions, workers=0) for r in range(4)], 6), second)


def test_a_batch_without_a_image(tmp_path):
    rows = [{"conversations": talk(i)} for i in (2, 5, 8)]
    source = data.open_source(write_lines(tmp_path / "t.jsonl", rows), SIZE, 0, text_only=True)
    batch = next(data.Loader(source, 4, workers=2))
    assert batch["image"].shape == (0, 3, SIZE, SIZE) and batch["image"].dtype == torch.uint8
    assert batch["image_index"] == [] and len(batch["conversation"]) == 4 and check_talks(batch)["text"] == 4
    noise, u, v = data.flow_draws((16, 24), 0, batch["image_index"], torch.device("cpu"))
    assert noise.shape == (0, 16, 24) and len(u) == len(v) == 0


def say(*texts: str, speakers=("human", "gpt")) -> list[dict]:
    return [{"from": s, "value": text} for s, text in zip(itertools.cycle(speakers), texts)]  # noqa: B905


BAD = {
    "an image without placeholder": ("p.png", say("draw", "here"), "0 <image> for 1 images"),
    "a placeholder without image": (None, say("draw", "<image>"), "1 <image> for 0 images"),
    "two placeholders": ("p.png", say("<image>", "<image>"), "2 <image> for 1 images"),
    "a placeholder in the dropped turn": (
        "p.png", [{"from": "system", "value": "<image>"}, *say("a", "b")], "0 <image> for 1 images"),
    "two images": (["p.png", "p.png"], say("<image>", "b"), "its image is not one path"),
    "a number for an image": (3, say("<image>", "b"), "its image is not one path"),
    "a missing image": ("q.png", say("<image>", "b"), "no image at"),
    "a damaged image": ("junk.png", say("<image>", "b"), "no image that can be read"),
    "a zero in its path": ("a\0b", say("<image>", "b"), "is damaged"),
    "no conversation": (None, None, "no list of turns"),
    "an empty conversation": (None, [], "by turns"),
    "only a system turn": (None, say("hi", speakers=["system"]), "by turns"),
    "text for turns": (None, "hello", "no list of turns"),
    "a turn without text": (None, [{"from": "human"}], "no list of turns"),
    "a number for a text": (None, say(3, "a"), "no list of turns"),
    "no answer": (None, say("a", "b", "c"), "by turns"),
    "two questions": (None, say("a", "b", speakers=["human"]), "by turns"),
    "unknown speakers": (None, say("a", "b", speakers=["user", "assistant"]), "by turns"),
    "an empty turn": (None, say("a", " \n"), "a turn is empty"),
    "a turn's end": (None, say("a<|im_end|>\n", "b"), "special token <|im_end|>"),
    "an image's start": (None, say("a", "b <im_start>"), "special token <im_start>"),
    "too long": (None, say("x" * 2**15, "b"), "32,769 characters, the limit is 32,768"),
    "too many tokens": (None, say("y" * 600, "b"), "its conversation has 601 tokens, the limit is 600"),
}  # fmt: skip
GOOD = {"image": "p.png", "conversations": say("<image>\na \ud800 <b>", "fine")}


@pytest.mark.parametrize("kind", BAD)
def test_bad_conversations_are_left_out_and_named(kind, tmp_path):
    image, conversation, reason = BAD[kind]
    (tmp_path / "p.png").write_bytes(png(1))
    (tmp_path / "junk.png").write_bytes(b"junk")
    name = write_lines(
        tmp_path / "t.jsonl", ["", GOOD, {"image": image, "conversations": conversation}, GOOD]
    )
    names = [(name, "line 3")]
    if image in (None, "p.png", "junk.png"):
        files = {"a.json": json.dumps(GOOD).encode(), "a.png": png(1),
                 "b.json": json.dumps({"conversations": conversation}).encode()}  # fmt: skip
        files |= {"b.png": (tmp_path / image).read_bytes()} if image else {}
        write_tar(tmp_path / "tars/0.tar", files)
        names.append((str(tmp_path / "tars"), "0.tar: b"))
    limit = {"length": lambda turns: sum(len(text) for _, text in turns), "longest": 600}
    for name, dist_ctx in names:
        loader = data.Loader(data.open_source(name, SIZE, 0, text_only=True, **limit), 2, workers=0)
        [conversations] = take(loader, 6, "conversation")
        assert conversations == [[["user", "<image>\na ? <b>"], ["assistant", "fine"]]] * 12
        assert loader.skipped and all(dist_ctx in m and reason in m for m in loader.skipped), loader.skipped


@pytest.mark.parametrize("line", ["{", "[1]", "null", "3", "[" * 100_000, '{"image": "p.png"}', "\0\0\0"])
def test_damaged_lines_are_left_out_and_named(line, tmp_path):
    (tmp_path / "p.png").write_bytes(png(1))
    source = data.open_source(write_lines(tmp_path / "t.jsonl", [GOOD, line]), SIZE, 0)
    loader = data.Loader(source, 2, workers=0)
    assert len(take(loader, 6, "conversation")[0]) == 12
    assert loader.skipped and all("line 2" in message for message in loader.skipped)


def test_no_conversation_that_can_be_used_is_an_error(tmp_path):
    rows = [{"image": None, "conversations": talk(1)}] * 3
    write_tar(tmp_path / "tars/0.tar", {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)})
    (tmp_path / "wds.json").write_text('{"tars": ["tars/0.tar"]}')
    (tmp_path / "gone.json").write_text('{"tars": ["tars/1.tar"]}')
    lines = write_lines(tmp_path / "t.jsonl", rows)
    for name, message in ((lines, "100 images or conversations.*1 <image> for 0 images"),
                          (tmp_path / "wds.json", "nothing in it can be used.*1 <image> for 0"),
                          (tmp_path / "gone.json", "nothing in it can be used.*FileNotFound")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            next(data.Loader(data.open_source(str(name), SIZE, 0, text_only=True), 2, workers=0))
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(ValueError, match="empty.jsonl is empty"):
            data.open_source(str(tmp_path / "empty.jsonl"), SIZE, 0)
    for content in ("{", "[]", "3", "{}", '{"tars": 3}', '{"tars": [3]}', '{"tars": "a"}', '{"tars": []}'):
        (tmp_path / "wds.json").write_text(content)
        with pytest.raises(ValueError, match="wds.json"):
            data.open_source(str(tmp_path / "wds.json"), SIZE, 0)


def test_the_wish_of_a_request():
    for uniform in (0.0, 0.3, 0.6, 0.9):
        assert data.requested_caption(data.request("a star?", uniform)) == "a star?"
    assert data.requested_caption([("user", "A cat, please"), ("assistant", "<image>")]) == "A cat, please"
    assert data.requested_caption([("user", "<image>\nwhat is it?"), ("assistant", "a cat")]) is None
    assert data.clean("half a pair \ud800") == "half a pair ?"


# -----------------------------------------------------------------------------------------------------------
# what is wrong with a source as a whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no data source"), ("./no/where", "no data source"), ("nano:birds", "no domain"),
        ("nano:text=x", "above zero"), ("nano:text=0", "above zero"), ("nano=nan", "above zero"),
        ("nano,nowhere", "no data source"), ("EMPTY", "contain any data file"),
        ("CAPTIONS", "no column of images"),
        ("nano:text=5000,nano:scenes", "differ too much"),
    ],
)  # fmt: skip
def test_bad_sources(name, message, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CAPTIONS").mkdir()
    Dataset.from_dict({"text": ["no image"]}).to_parquet(tmp_path / "CAPTIONS/0.parquet")
    with pytest.raises((ValueError, OSError), match=message):
        data.open_source(str(tmp_path / name) if name.isupper() else name, 48, 0)


def test_batches_and_shards_that_cannot_be_split(sources):
    with pytest.raises(ValueError, match="split over 3"):
        data.Loader(data.open_source("nano", SIZE, 0), 8, world=3)
    with pytest.raises(ValueError, match="8 shards in 8 lanes, which 16 processes"):
        data.Loader(data.open_source(str(sources / "tar"), SIZE, 0), 64, world=16)
    loader = data.Loader(
        data.open_source(str(sources / "tar"), SIZE, 0), 12, workers=0
    )  # 6 lanes of 8 shards
    assert len(set(take(loader, 6, "caption")[0])) == 48  # two lanes have read two of them, four one twice


# -----------------------------------------------------------------------------------------------------------
# what is wrong with some samples


def test_five_per_cent_of_damaged_images_are_left_out_and_named(tmp_path):
    write_folder(tmp_path / "folder", 40)
    write_tars(tmp_path / "tar", 4, 10)
    write_tables(tmp_path / "parquet", 4, 10)
    for i, content in ((7, b""), (8, png(8)[:60])):
        (tmp_path / f"folder/{i}.png").write_bytes(content)
    (tmp_path / "folder/9.png").unlink()
    write_tar(
        tmp_path / "tar/01.tar", {"x.jpg": b"junk", "x.txt": b"bad", "y.jpg": png(10), "y.txt": b"image 10"}
    )
    rows = {"image": [{"bytes": b"junk", "path": None}, {"bytes": png(10), "path": None}, None]}
    Dataset.from_dict(rows | {"text": ["bad", "image 10", "none"]}).to_parquet(
        tmp_path / "parquet/01.parquet"
    )
    for kind, names in (
        ("folder", {"7.png", "8.png", "9.png"}),
        ("tar", {"01.tar: x"}),
        ("parquet", {"row 0", "row 2"}),
    ):
        source = data.open_source(str(tmp_path / kind), SIZE, 0)
        loader = data.Loader(source, 8, workers=1)
        [captions] = take(loader, 12, "caption")
        messages = loader.skipped
        assert len(captions) == 96 and "bad" not in captions
        assert all(any(name in message for message in messages) for name in names), messages
        assert all(any(name in message for name in names) for message in messages), messages


def test_nothing_usable_is_an_error(tmp_path):
    write_folder(tmp_path / "folder", 3)
    for i in range(3):
        (tmp_path / f"folder/{i}.png").write_bytes(b"junk")
    write_tar(tmp_path / "tar/0.tar", {"x.jpg": b"junk", "y.txt": b"no image"})
    write_tar(tmp_path / "empty/0.tar", {})
    for kind, message in (("folder", "100 images"), ("tar", "y: no image"), ("empty", "empty")):
        loader = data.Loader(data.open_source(str(tmp_path / kind), SIZE, 0), 2, workers=0)
        with pytest.raises(ValueError, match=message):
            next(loader)


def test_a_shard_that_vanishes_or_ends_in_the_middle(tmp_path):
    write_tars(tmp_path, 4, 70)  # more rows than a block has
    whole = (tmp_path / "02.tar").read_bytes()
    (tmp_path / "02.tar").write_bytes(whole[: len(whole) // 3])
    loader = data.Loader(data.open_source(str(tmp_path), SIZE, 0), 4, workers=0)
    take(loader, 2, "caption")
    (tmp_path / "01.tar").unlink()
    [captions] = take(loader, 200, "caption")
    messages = loader.skipped
    assert any("the rest of shard 1: FileNotFoundError" in message for message in messages), messages
    assert any("the rest of shard 2: EOFError" in message for message in messages)
    numbers = {int(caption.split()[1]) for caption in captions}
    assert set(range(70)) | set(range(210, 280)) <= numbers and 140 in numbers


def test_a_whole_tar_is_never_taken_for_a_damaged_one(tmp_path):
    for size in range(0, 24 * 512, 512):  # wherever its end lies in the blocks that tarfile reads
        write_tar(tmp_path / "x.tar", {"a.txt": bytes(size), "b.png": png(1)})
        assert [row["name"][-1] for row in data.tar_rows(str(tmp_path / "x.tar"))] == ["a", "b"]


class Stalled(data.NanoSource):
    def __getitem__(self, number: int) -> dict:
        if number == 9:
            time.sleep(60)
        return super().__getitem__(number)


def test_a_stalled_read_ends_in_an_error(monkeypatch):
    monkeypatch.setattr(data, "STALL", 1)
    loader = data.Loader(data.Mixture([Stalled("objects", SIZE, 0)], [1.0], 0), 4)
    take(loader, 2, "caption")
    with pytest.raises(OSError, match="no data for 1 s"):
        next(loader)


def test_hostile_files(tmp_path, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    caption = "star <image> <|im_end|> <im_start> " + "x" * 2**20
    write_tar(tmp_path / "t/0.tar", {
        "../outside.png": png(1), "../outside.txt": b"up",
        "/absolute.png": png(1), "/absolute.txt": b"root",
        "bomb.png": bomb.getvalue(), "bomb.txt": b"boom",
        "deep.png": png(1), "deep.json": b"[" * 100_000,
        "list.png": png(1), "list.json": b"[1]",
        "long.png": png(200), "long.txt": caption.encode(), "long.json": b'{"url": "x"}',
        "bytes.png": png(201), "bytes.txt": b"\xff\xfe star",
        ".png": png(202), "number.png": png(203), "number.json": b'{"text": 3, "caption": "three"}',
    })  # fmt: skip
    monkeypatch.setattr(data, "BYTES", 2**21)
    with tarfile.open(tmp_path / "t/0.tar", "a") as tar:
        member = tarfile.TarInfo("large.png")
        member.size = 2**21 + 1
        tar.addfile(member, io.BytesIO(bytes(member.size)))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    loader = data.Loader(data.open_source(str(tmp_path / "t"), SIZE, 0), 1, workers=0)
    [captions] = take(loader, 9, "caption")
    messages = "\n".join(loader.skipped)
    for reason in ("outside: an unsafe name", "absolute: an unsafe name", "bomb is no image",
                   "deep: damaged json", "list: damaged json", "large.png has 2,097,153 bytes"):  # fmt: skip
        assert reason in messages
    assert set(tmp_path.rglob("*")) == before and not (tmp_path.parent / "outside.png").exists()
    [long] = {c for c in captions if c.startswith("star")}
    assert "<" not in long and len(long) <= data.CHARACTERS and "three" in captions
    assert not {"up", "root", "boom"} & set(captions)


def test_fuzz(tmp_path):
    """Random bytes and truncations of every kind of file raise the documented errors, or nothing."""
    chance = random.Random(0)
    write_tars(tmp_path / "tar", 1, 4)
    write_tables(tmp_path / "parquet", 1, 4)
    write_folder(tmp_path / "folder", 2)
    files = [tmp_path / "tar/00.tar", tmp_path / "parquet/00.parquet", tmp_path / "folder/metadata.jsonl"]
    images = [png(1), png(1, format="JPEG"), png(1, format="WEBP"), png(1, format="GIF")]
    outcomes = Counter()
    for trial in range(400):
        content = bytearray(chance.choice(images))
        for _ in range(chance.randint(0, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        content = bytes(content[: chance.randint(0, len(content))] if trial % 2 else content)
        try:
            outcomes[data.open_image(content, "x").mode] += 1
        except data.SkipSample:
            outcomes["unusable"] += 1
    assert outcomes["RGB"] > 20 and outcomes["unusable"] > 100
    for trial in range(60):
        file = files[trial % 3]
        good = file.read_bytes()
        content = bytearray(good[: chance.randint(0, len(good))] if trial % 2 else good)
        for _ in range(chance.randint(1, 20) if content else 0):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.write_bytes(bytes(content))
        os.utime(file, (trial, trial))  # the readers of `datasets` keep what they read by its time
        try:
            take(data.Loader(data.open_source(str(file.parent), SIZE, 0), 1, workers=0), 3, "caption")
            outcomes["read"] += 1
        except (ValueError, OSError):
            outcomes["refused"] += 1
        file.write_bytes(good)
    assert outcomes["read"] > 5 and outcomes["refused"] > 5
