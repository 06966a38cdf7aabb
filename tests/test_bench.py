"""bench.py runs every loop, docs/plan.py computes what real tensors show, docs/tables.py copies results."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import TINY_DECODER

import bench
import common
import rae
import train_decoder

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import plan  # noqa: E402
import tables  # noqa: E402


def run_here(monkeypatch, command: list[str], **_) -> SimpleNamespace:
    """subprocess.run of a trainer, without the seconds of its imports."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", command[1:])
        patch.setattr("signal.signal", lambda *_: None)
        train_decoder.main()
    return SimpleNamespace(returncode=0)


def test_every_loop_runs(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "WEIGHTS", parts)
    monkeypatch.setitem(rae.DITS, "nano", {"width": 32, "depth": 2, "heads": 2})
    monkeypatch.setitem(rae.DITS, "nano-guide", {"width": 16, "depth": 1, "heads": 2})
    monkeypatch.setitem(rae.DECODERS, "nano", TINY_DECODER)
    monkeypatch.setattr(bench.measure_decoder_full, "__defaults__", (20,))
    monkeypatch.setattr(bench.subprocess, "run", partial(run_here, monkeypatch))
    grid = rae.time_grid(3, 1.0)
    monkeypatch.setattr(rae, "time_grid", lambda *_: grid)
    flags = ["--batch", "4", "--images", "1", "--seconds", "0.01", "--json", str(tmp_path / "bench.json")]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()
    file = json.loads((tmp_path / "bench.json").read_text())
    assert list(file["results"]) == list(bench.LOOPS) == bench.available_loops("nano")
    assert set(bench.LOOPS) - set(bench.available_loops("DiT-S")) == {"t2i-step", "sample", "sample-cfg"}
    assert bench.available_loops("2.4B-DH")[-2:] == ["sample", "sample-cfg"]
    assert all(result["images_per_second"] > 0 for result in file["results"].values())
    flops = {name: result.get("gflop_per_image") for name, result in file["results"].items()}
    assert [name for name in flops if not flops[name]] == ["loader", "jpeg", "decoder-full"]
    assert flops["class-sample-cfg"] == pytest.approx(2 * flops["class-sample"])
    assert flops["class-sample"] < flops["class-sample-auto"] < flops["class-sample-cfg"]
    assert tables.bench_table(file).count("\n| ") == len(bench.LOOPS)


def test_decoder_full_of_other_sizes_has_networks(tmp_path, monkeypatch):
    small = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    for name in ("DINOV2", "DINO_S8"):
        monkeypatch.setattr(bench, name, getattr(bench, name) | small)
    flags = bench.decoder_networks(bench.Config(dit="DiT-S"), str(tmp_path))
    assert rae.Encoder(flags["encoder"])(torch.rand(1, 3, 224, 224)).shape == (1, 256, 24)
    assert len(train_decoder.Backbone.from_pretrained(flags["discriminator"])(torch.rand(1, 3, 32, 32))) == 4


def test_the_plan_of_a_paper():
    """By hand: two FLOPs per weight and token, embeddings left out."""
    _, cost = plan.build("0.5B + 1.5B frozen, 30k")
    by_hand = 3 * 0.48e9 * 256 * 2 + 2 * 1.31e9 * plan.TOKENS * 2 + 0.41e9 * 256 * 2
    assert cost.flops == pytest.approx(by_hand, rel=0.1)
    assert cost.trainable == pytest.approx(0.481e9, rel=0.01)
    assert cost.replicated == pytest.approx(4 * (0.41e9 + 0.416e9), rel=0.03)  # encoder and decoder
    assert cost.traffic == pytest.approx(12 * 0.481e9 + 8 * 1.54e9, rel=0.01)
    parts = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            part = plan.dit(24, {"width": 32, "depth": 3, "heads": 2}, None)
        parts.append(part._replace(module=part.module.to(device)))
    on_meta, on_cpu = map(plan.saved_bytes, parts)
    assert on_meta == pytest.approx(on_cpu, rel=0.02)  # without the attention that the CPU does not save


def test_tables_come_from_the_files(tmp_path):
    rows = [{"metric": m, "value": v, "n": 4} for m, v in (("psnr/objects", 29.7), ("ssim/text", 0.5))]
    file = {"command": "python eval.py", "seed": 0, "versions": {"torch": "2"}, "date": "2026-01-02T03"}
    (tmp_path / "r.json").write_text(json.dumps(file | {"results": rows}))
    text = tables.update("a\n<!-- table r.json psnr -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert "29.700" in text and "`python eval.py`, torch 2, 2026-01-02; n = 4" in text
    assert "old" not in text and "0.500" not in text and text.endswith("<!-- end -->\nb\n")
    with pytest.raises(ValueError, match=r"no table from .*r\.json"):
        tables.update(text.replace("psnr", "fid"), tmp_path)


def test_the_documents_show_the_files():
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        assert tables.update(path.read_text(), path.parent) == path.read_text()
