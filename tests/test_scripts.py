"""The scripts as a user runs them, on tiny parts: training, interruption, resumption, numbers, mistakes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import rae
import train_decoder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process, which spares its imports; returns what it printed. With a code it is
    meant to fail, and the last line of its errors is returned."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(ROOT)

    def call(script: str, *flags, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capsys.readouterr()
        left = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            left = end.code or 0
        printed = capsys.readouterr()
        if isinstance(left, str):  # what the interpreter would print before it leaves with 1
            printed, left = printed._replace(err=f"{printed.err}{left}"), 1
        assert left == code, printed.err
        return printed.err.strip().splitlines()[-1] if code else printed.out

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_own_images(parts, tmp_path):
    """The script of the README on 200 captioned PNGs."""
    readme = (ROOT / "README.md").read_text()
    [script] = [block for block in readme.split("```") if block.startswith("sh\n# own images\n")]
    chance, lines = np.random.default_rng(0), []
    (tmp_path / "my_images").mkdir()
    for i in range(200):
        color, ramp = chance.integers(256, size=3), np.linspace(0, 1, 40)[None, :, None]
        Image.fromarray((ramp * color * np.ones((30, 1, 1))).astype(np.uint8)).save(
            tmp_path / f"my_images/{i}.png"
        )
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a ramp to {color[0]} red"}))
    (tmp_path / "my_images/metadata.jsonl").write_text("\n".join(lines))
    small = {"ENCODER": parts / "encoder", "LANGUAGE_MODEL": parts / "language-model", "DECODER": "nano",
             "DIT": "nano", "STEPS": 4, "BATCH": 8, "PROMPT": "a ramp to 9 red"}  # fmt: skip
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {name: str(value) for name, value in small.items()} | {"PATH": paths}
    (tmp_path / "own.sh").write_text(script.removeprefix("sh\n").replace("python ", f"python {ROOT}/"))
    done = subprocess.run(["bash", "-e", "own.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "samples/own/a-ramp-to-9-red-3.png").size == (32, 32)
    assert "nano" not in script


def test_eval_writes_the_result_format(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--autoencoder", parts / "rae", "--steps", 2, "--images", 1]
    out = run("eval.py", "--limit", 2, *flags, "--out", tmp_path / "results.json")
    results = {r["metric"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert {"psnr/objects", "ssim/text", "shapes/model/overall", "shapes/decoded/counting"} <= set(results)
    for result in results.values():
        assert set(result) == {"metric", "value", "n", "seed", "command", "versions", "date"}
    assert results["psnr/scenes"]["n"] == 2 and results["shapes/true/overall"]["value"] == 1.0
    assert results["shapes/model/words"]["n"] == 2
    assert "held-out colors" in out and "| overall" in out


def test_scaling_by_verifiers_chance_and_scorer(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--steps", 1, "--limit", 2, "--candidates", 8, "--seeds", 2]
    run("eval.py", "scaling", *flags, "--out", tmp_path / "scaling.json")
    found = {r["metric"]: r for r in json.loads((tmp_path / "scaling.json").read_text())}
    for name in ("answer_logits", "prompt_confidence", "chance"):
        assert found[f"best 4 of 8/{name}"]["value"] <= found["best 4 of 8/scorer"]["value"]
        assert found[f"best 4 of 4/{name}"]["value"] == found["best 4 of 4/scorer"]["value"]
    assert found["best 4 of 8/chance"]["value"] == found["best 4 of 4/chance"]["value"]
    assert found["best 4 of 8/chance"]["n"] == 6 * 2 * 4 * 2 and "best 4 of 16/chance" not in found


def test_bench_runs_every_loop(run, parts, tmp_path):
    flags = ["--autoencoder", parts / "rae", "--model", parts / "t2i", "--batch", 4, "--seconds", 0.1]
    run("bench.py", *flags, "--json", tmp_path / "bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert {"loader", "jpeg", "encode", "decode", "decoder-step", "t2i-step", "sample"} < set(results)
    assert all(result["images_per_second"] > 0 for result in results.values())
    assert sys.platform != "linux" or all(
        0.1 < results[name]["peak_gb"] < 10 for name in ("encode", "sample")
    )
    assert all(
        0 < result["of_matrix_product"]
        for name, result in results.items()
        if name not in ("loader", "jpeg", "decoder-full")
    )
    plain, cfg, auto = (results[f"class-sample{name}"] for name in ("", "-cfg", "-auto"))
    assert cfg["gflop_per_image"] == pytest.approx(2 * plain["gflop_per_image"])
    assert plain["gflop_per_image"] < auto["gflop_per_image"] < cfg["gflop_per_image"]
    for name, hidden in (("mlp-step", 682), ("mlp-padded-step", 688)):  # 16 tokens of a width of 256
        forward = 2 * 16 * 3 * 256 * hidden
        backward = 2 * forward - 2 * 16 * 2 * 256 * hidden  # no gradient of what goes in
        assert results[name]["gflop_per_image"] == pytest.approx((forward + backward) / 1e9)


@pytest.mark.parametrize(
    "script",
    [
        "sample.py",
        "encode.py",
        "eval.py",
        "bench.py",
        "plot.py",
        "report.py",
        "train_decoder.py",
        "train_t2i.py",
    ],
)
def test_help_and_unknown_flags(script, run):
    assert "--out" in run(script, "-h") or script in ("bench.py", "report.py")
    positional = ["a"] if script == "plot.py" else []
    assert "--colour" in run(script, *positional, "--colour", "red", code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample.py"], "give a prompt"),
        (["sample.py", "a star", "--model", "DAMAGED"], "cannot load"),
        (["sample.py", "a star", "--model", "EMPTY"], "no config.json"),
        (["train_t2i.py", "--batch", "0", "--out", "OUT"], "at least 1"),
        (["train_t2i.py", "--data", "nano:text=0", "--out", "OUT"], "above zero"),
        (["train_t2i.py", "--autoencoder", "DAMAGED", "--out", "OUT"], "cannot load"),
        (["train_t2i.py", "--language-model", "DAMAGED", "--out", "OUT"], "cannot load"),
        (["eval.py", "shapes", "--limit", "2", "--skip", "9", "--out", "OUT"], "no block 9"),
        (["eval.py", "scaling", "--limit", "2", "--skip", "9", "--out", "OUT"], "no block 9"),
        (["eval.py", "nothing"], "unknown evaluation"),
        (["bench.py", "nothing"], "has no nothing"),
        (["train_t2i.py", "--data", "nowhere", "--out", "OUT"], "no data source"),
        (["train_decoder.py", "--encoder", "nowhere/at/all", "--out", "OUT"], "nowhere/at/all"),
    ],
)
def test_mistakes_end_in_one_line(command, message, run, parts, tmp_path):
    damaged, empty = tmp_path / "damaged", tmp_path / "empty"
    damaged.mkdir()
    empty.mkdir()
    (damaged / "config.json").write_text((parts / "t2i/config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"not safetensors")
    names = {"DAMAGED": damaged, "EMPTY": empty, "OUT": tmp_path / "out"}
    defaults = {
        "sample.py": ["--model", parts / "t2i"],
        "bench.py": ["--autoencoder", parts / "rae", "--model", parts / "t2i"],
        "train_t2i.py": ["--autoencoder", parts / "rae", "--language-model", parts / "language-model"],
    }
    script, *rest = command
    error = run(script, *defaults.get(script, []), *(names.get(part, part) for part in rest), code=1)
    assert message in error


def test_a_full_disk_leaves_the_old_file_or_folder(tmp_path, monkeypatch):
    file, folder = tmp_path / "image.png", tmp_path / "model"
    file.write_text("good")
    folder.mkdir()
    (folder / "config.json").write_text("good")
    with pytest.raises(OSError, match="cannot write"), common.replacing(file) as temporary:
        temporary.write_text("half")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="cannot write"), common.replacing(folder):
        pass  # nothing was written: the last renaming fails
    assert file.read_text() == (folder / "config.json").read_text() == "good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "image.png"]


def test_a_missing_tensor_is_no_model(parts, tmp_path):
    dist_ctx = common.init_distributed()
    shutil.copytree(parts / "t2i", tmp_path / "t2i")
    weights = load_file(tmp_path / "t2i/model.safetensors")
    del weights["dit.final_layer.linear.bias"]
    save_file(weights, tmp_path / "t2i/model.safetensors")
    with pytest.raises(ValueError, match="cannot load"):
        common.load_model(rae.TextToImage, str(tmp_path / "t2i"), "", dist_ctx)


def test_learning_rate_and_average():
    rates = [common.cosine(step, 10, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[10] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.55) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    common.update_ema(average, model, decay=0.75, step=0)
    assert average.weight.item() == pytest.approx(0.9)  # the decay starts at 0.1
    common.update_ema(average, model, decay=0.75, step=1000)
    assert average.weight.item() == pytest.approx(0.925)


def test_latent_statistics_are_those_of_all_images(parts):
    model, dist_ctx = rae.RAE.from_pretrained(parts / "rae").eval(), common.init_distributed()
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    batches = iter([{"image": part} for part in images.split(4)])
    mean, std = train_decoder.latent_statistics(model, batches, 12, dist_ctx)
    latents = model.encode(images / 255).double()
    torch.testing.assert_close(mean, latents.mean(dim=0).float(), atol=1e-6, rtol=0)
    expected = (latents.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(std, expected.float(), atol=1e-5, rtol=0)


def test_images_without_captions_do_not_train_text_to_image(run, parts, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    flags = ["--autoencoder", parts / "rae", "--language-model", parts / "language-model"]
    error = run("train_t2i.py", *flags, "--data", tmp_path, "--out", tmp_path / "out", "--batch", 4, code=1)
    assert "without captions" in error


def test_plot_draws_every_loss(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "loss": 1 / s, "text_loss": 0.0, "images_per_second": 9.0} for s in range(1, 40)]
        lines = [json.dumps(row) for row in rows] + ['{"step": 40, "lo']  # cut off by a crash
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    assert run("plot.py", tmp_path / "a").strip() == str(tmp_path / "a/plot.png")
    run("plot.py", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.png")
    image = Image.open(tmp_path / "both.png")
    assert image.width > 500 and len(image.convert("RGB").getcolors(2**20)) > 20
    assert "no metrics.jsonl" in run("plot.py", tmp_path, code=1)
