"""Sources and batches: what sample i is depends on (seed, i) alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
from nano import shapes


def take(steps: data.Steps, count: int) -> list[list[int]]:
    return [list(indices) for indices, _ in zip(steps, range(count), strict=False)]


def test_steps_split_the_global_batch_and_resume():
    whole = take(data.Steps(8), 4)
    assert whole == [list(range(8 * s, 8 * s + 8)) for s in range(4)]
    halves = [take(data.Steps(8, 0, rank, 2), 4) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert take(data.Steps(8, start=2), 2) == whole[2:]
    with pytest.raises(ValueError, match="split over 3"):
        data.Steps(8, world=3)


def test_nano_mixture_and_shares():
    source = data.open_source("nano:objects=3,text=1", 48, seed=0, understanding=0.2)
    samples = [source[i] for i in range(800)]
    text = np.mean(['"' in s["caption"] or "letters" in s["caption"] for s in samples])
    asked = np.mean(["<image>" in s["conversation"][0][1] for s in samples])
    assert abs(text - 0.25) < 0.05 and abs(asked - 0.2) < 0.05
    assert all(sum("<image>" in t for _, t in s["conversation"]) == 1 for s in samples)
    again = data.open_source("nano:objects=3,text=1", 48, seed=0, understanding=0.2)[17]
    assert again["caption"] == samples[17]["caption"] and (again["image"] == samples[17]["image"]).all()


def test_requests_use_every_wording_and_the_caption():
    source = data.open_source("nano", 48, seed=0)
    turns = [source[i]["conversation"][0][1] for i in range(200)]
    for template in data.REQUESTS:
        head = template.partition("{}")[0]
        assert 20 < sum(turn.startswith(head) for turn in turns) < 90


def test_loader_gives_the_same_batches_with_and_without_workers():
    source = data.open_source("nano", 48, seed=3)
    streams = [data.load(source, data.Steps(4, start=5), workers) for workers in (0, 1)]
    for _ in range(3):
        here, there = (next(stream) for stream in streams)
        assert here["image"].shape == (4, 3, 48, 48) and here["image"].dtype == torch.uint8
        assert torch.equal(here["image"], there["image"]) and here["index"] == there["index"]
        assert here["caption"] == there["caption"]
    assert here["index"][0] == 7 * 4


@pytest.fixture
def folder(tmp_path):
    with (tmp_path / "metadata.jsonl").open("w") as file:
        for i in range(5):
            Image.new("RGB", (40 + i, 60), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n")
    return tmp_path


def test_folder_of_captioned_pictures(folder):
    source = data.open_source(str(folder), 32, seed=0)
    epochs = [[source[5 * epoch + i] for i in range(5)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(s["caption"] for s in epoch) == [f"picture {i}" for i in range(5)]
        for sample in epoch:
            assert sample["image"].shape == (32, 32, 3)
            assert sample["image"][0, 0, 0] == 50 * int(sample["caption"].split()[1])
            assert sample["caption"] in sample["conversation"][0][1]
    orders = [[s["caption"] for s in epoch] for epoch in epochs]
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_square_takes_the_centre():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (data.square(Image.fromarray(wide), 10) == 255).all()


def test_draws_depend_on_the_sample_and_not_on_its_batch():
    noise, u, v = data.flow_draws((16, 24), 7, [3, 4, 5, 6], torch.device("cpu"))
    for row, index in enumerate([3, 4, 5, 6]):
        alone = data.flow_draws((16, 24), 7, [index], torch.device("cpu"))
        assert torch.equal(alone[0][0], noise[row]) and alone[1][0] == u[row] and alone[2][0] == v[row]
    many, u, v = data.flow_draws((16, 24), 0, list(range(500)), torch.device("cpu"))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert abs(u.mean() - 0.5) < 0.05 and abs(v.mean() - 0.5) < 0.05
    assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.15
    assert not torch.equal(many[0], data.flow_draws((16, 24), 1, [0], torch.device("cpu"))[0][0])


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no data source"), ("nano:birds", "no domain"), ("nano:text=x", "could not convert")],
)
def test_bad_sources(name, message):
    with pytest.raises(ValueError, match=message):
        data.open_source(name, 48, 0)


def test_held_out_pairs_never_reach_the_training_stream():
    source = data.open_source("nano", 48, seed=0)
    names = [f"{color} {shape}" for shape, color in shapes.HELD_OUT]
    assert not any(name in source[i]["caption"] for i in range(1500) for name in names)
