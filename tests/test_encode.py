"""encode.py: what it writes, and what it refuses. test_classes.py trains on its latents."""

import json
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

import common
import data
import encode
import rae


@pytest.fixture
def run(monkeypatch, parts, tmp_path):
    """run(flag, ...) encodes into tmp_path/latents, in this process."""
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (0, 0, 80 * i)).save(tmp_path / f"images/{i}.png")

    def call(*flags) -> None:
        flags = ["--data", tmp_path / "images", "--autoencoder", parts / "rae", "--workers", 0, *flags]
        monkeypatch.setattr(sys, "argv", ["encode.py", "--out", str(tmp_path / "latents"), *map(str, flags)])
        encode.main()

    return call


def test_latents_know_their_autoencoder_and_nothing_else_is_touched(run, parts, tmp_path):
    for name in ("latents.tmp", ".latents.1.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    run()
    info = json.loads((tmp_path / "latents/latents.json").read_text())
    assert info["fingerprint"] == common.fingerprint(rae.RAE.from_pretrained(parts / "rae"))
    assert info["images"] == 3 and info["class_names"] is None
    assert (tmp_path / "latents.tmp/mine").exists() and (tmp_path / ".latents.1.tmp/mine").exists()
    assert len(list(tmp_path.glob("*latents*"))) == 3


@pytest.mark.parametrize("damage", ["a Mac's", "shape", "no label", "text label"])
def test_damaged_latents_are_refused_or_skipped(damage, run, tmp_path):
    run()
    folder = tmp_path / "latents"
    if damage == "a Mac's":
        for name in ("._00000.npy", "._00000.jsonl"):
            (folder / name).write_bytes(b"\0\5\26\7\xff")
        assert len(data.open_source(str(folder), 32, 0).sources[0].rows) == 3
        return
    if damage == "shape":
        np.save(folder / "00000.npy", np.zeros((3, 1, 16, 5), np.float16))
    else:
        row = {"caption": None} | ({} if damage == "no label" else {"label": "cat"})
        (folder / "00000.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    message = "no label" if damage == "text label" else "do not fit latents.json"
    with pytest.raises(ValueError, match=message):
        data.open_source(str(folder), 32, 0, num_classes=2)[0]


def test_a_stopped_run_leaves_nothing(world, parts, tmp_path):
    flags = ["--autoencoder", parts / "rae", "--limit", 20_000, "--out", tmp_path / "latents"]
    started = world(1, "encode.py", *flags)
    # until rows are there: a signal in the middle of forking a data loading process would be lost
    while not any(path.stat().st_size > 1000 for path in tmp_path.glob(".latents.*/*.npy")):
        time.sleep(0.01)
    started.signal(signal.SIGHUP)
    assert "interrupted" in started.wait(code=1)
    assert not list(tmp_path.glob("*latents*"))


@pytest.mark.parametrize("kind", ["nan", "float16", "unusable images", "exists", "link", "read-only"])
def test_refusals_leave_no_folder(kind, run, parts, tmp_path):
    flags, message = [], "the model's result is not finite"
    if kind in ("nan", "float16"):
        model = rae.RAE.from_pretrained(parts / "rae")
        model.latent_mean.fill_(float("nan") if kind == "nan" else 1e5)
        model.save_pretrained(tmp_path / "rae")
        flags = ["--autoencoder", tmp_path / "rae"]
    elif kind == "unusable images":
        for path in (tmp_path / "images").iterdir():
            path.write_bytes(b"junk")
        message = "holds no image that can be used"
    elif kind == "exists":
        (tmp_path / "latents").write_text("mine")
        message = "already exists"
    elif kind == "link":
        (tmp_path / "latents").symlink_to(tmp_path / "nowhere")
        message = "already exists"
    else:
        flags, message = ["--out", tmp_path / "images/0.png/latents"], "cannot write"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        run(*flags)
    assert sorted(tmp_path.rglob("*")) == before
