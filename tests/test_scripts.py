"""The scripts as a user runs them, on tiny parts: training, interruption, resumption, sampling, numbers,
mistakes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def launch(*command, **kwargs) -> subprocess.Popen:
    """A real process, for signals and torchrun."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=ROOT, **pipes, **kwargs)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def decoder_flags(parts, out):
    return ["--encoder", parts / "encoder", "--out", out, "--batch", 4, "--statistics", 16, "--workers", 0]


def t2i_flags(parts, out):
    return [
        "--autoencoder", parts / "rae", "--language-model", parts / "language-model", "--out", out,
        "--batch", 4, "--workers", 0, "--understanding", 0.5,
    ]  # fmt: skip


TRAINERS = {"train_decoder.py": decoder_flags, "train_t2i.py": t2i_flags}


def logged(out: Path, *names: str) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "lr", "grad_norm", "images_per_second"} <= set(row) for row in rows)
    return {row["step"]: [row[name] for name in names] for row in rows}


@pytest.mark.parametrize("script", TRAINERS)
def test_training_writes_everything_and_resumes_exactly(script, run, parts, tmp_path, monkeypatch):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--steps", 4, "--log-every", 1, "--lr", 0.01, "--warmup", 1]
    run(script, *TRAINERS[script](parts, whole), *flags, "--save-every", 2)
    assert {p.name for p in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "model", "samples",
    }  # fmt: skip
    assert [p.name for p in sorted((whole / "samples").iterdir())] == ["0000002.png", "0000004.png"]
    assert "already holds a training" in run(script, *TRAINERS[script](parts, whole), code=1)

    calls = []

    def stop_after_two(self) -> bool:
        calls.append(1)
        self.stop = signal.SIGINT if len(calls) == 2 else None
        return len(calls) == 2

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "stopping", stop_after_two)
        assert "--resume" in run(script, *TRAINERS[script](parts, half), *flags, code=128 + signal.SIGINT)
    with (half / "metrics.jsonl").open("a") as file:  # as after a crash beyond the checkpoint
        file.write('{"step": 3, "loss": 99.0}\n')
    run(script, "--out", half, "--resume")  # all other flags come from its config.json
    assert logged(half, "loss", "lr", "grad_norm") == logged(whole, "loss", "lr", "grad_norm")
    one, other = (load_file(folder / "model/model.safetensors") for folder in (whole, half))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "step 4" in run(script, "--out", half, "--resume")  # nothing left to do

    online = torch.load(half / "checkpoint.pt", weights_only=True)
    assert any(not torch.equal(online["model"][key], online["average"][key]) for key in online["model"])
    assert all(torch.equal(online["average"][key], one[key]) for key in one if key in online["average"])

    (half / "checkpoint.pt").write_bytes(b"PK junk")
    assert "cannot resume" in run(script, "--out", half, "--resume", code=1)


def test_interrupt_of_a_terminal_saves_and_says_how_to_go_on(parts, tmp_path):
    flags = t2i_flags(parts, tmp_path / "t2i") + ["--log-every", 1, "--workers", 1]
    process = launch("train_t2i.py", *flags, start_new_session=True)
    while not (tmp_path / "t2i/metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: workers get it too
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT and "--resume" in err and "Traceback" not in err
    rae.TextToImage.from_pretrained(tmp_path / "t2i/model")


@pytest.mark.parametrize("script", TRAINERS)
def test_two_processes_equal_one(script, run, parts, tmp_path):
    flags = ["--steps", 3, "--log-every", 1, "--lr", 0.01, "--warmup", 1]
    run(script, *TRAINERS[script](parts, tmp_path / "one"), *flags)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    finish(launch(*torchrun, script, *TRAINERS[script](parts, tmp_path / "two"), *flags))
    one, two = (logged(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    for step in (1, 2, 3):
        assert one[step] == pytest.approx(two[step], rel=1e-4 if step > 1 else 1e-5), step


def test_resume_of_nothing(run, parts, tmp_path):
    assert "nothing to resume" in run("train_t2i.py", *t2i_flags(parts, tmp_path / "x"), "--resume", code=1)
    assert not (tmp_path / "x").exists()


def test_sample_writes_pictures_with_their_settings(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--steps", 2, "--out", tmp_path]
    out = run("sample.py", "a red star", "two rings", "--n", 2, "--seed", 5, *flags).split()
    assert [Path(line).name for line in out] == [
        "a-red-star-5.png", "a-red-star-6.png", "two-rings-5.png", "two-rings-6.png", "grid.png",
    ]  # fmt: skip
    picture = Image.open(tmp_path / "two-rings-6.png")
    assert picture.size == (32, 32)
    assert (
        picture.text["prompt"] == "two rings" and picture.text["seed"] == "6" and picture.text["steps"] == "2"
    )
    before = picture.tobytes()
    run("sample.py", "two rings", "--n", 1, "--seed", 6, *flags)
    assert Image.open(tmp_path / "two-rings-6.png").tobytes() == before  # whatever else is drawn


def test_reconstruct_and_ask(run, parts, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in.png")
    out = run(
        "sample.py", "--reconstruct", tmp_path / "in.png", "--autoencoder", parts / "rae", "--out", tmp_path
    )
    assert "PSNR" in out and Image.open(tmp_path / "in-reconstruction.png").size == (32 + 2 + 32, 32)
    run("sample.py", "--ask", tmp_path / "in.png", "what is it?", "--model", parts / "t2i")


def test_eval_writes_the_result_format(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--autoencoder", parts / "rae", "--steps", 2, "--pictures", 1]
    out = run("eval.py", "--limit", 2, *flags, "--out", tmp_path / "results.json")
    results = {r["metric"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert {"psnr/objects", "ssim/text", "shapes/model/overall", "shapes/true/counting"} <= set(results)
    for result in results.values():
        assert set(result) == {"metric", "value", "n", "seed", "command", "versions", "date"}
    assert results["psnr/scenes"]["n"] == 2 and results["shapes/true/overall"]["value"] == 1.0
    assert "held-out colors" in out and "| overall" in out


def test_bench_runs_every_loop(run, parts, tmp_path):
    flags = ["--autoencoder", parts / "rae", "--model", parts / "t2i", "--batch", 4, "--seconds", 0.1]
    run("bench.py", *flags, "--json", tmp_path / "bench.json")
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert set(results) == {"loader", "encode", "decode", "decoder-step", "t2i-step", "sample"}
    assert all(result["images_per_second"] > 0 for result in results.values())


@pytest.mark.parametrize("script", ["sample.py", "eval.py", "bench.py", "train_decoder.py", "train_t2i.py"])
def test_help_and_unknown_flags(script, run):
    assert "--out" in run(script, "-h") or script == "bench.py"
    assert "--colour" in run(script, "--colour", "red", code=2)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample.py"], "give a prompt"),
        (["sample.py", ""], "empty prompt"),
        (["sample.py", "star " * 500], "limit"),
        (["sample.py", "a star", "--model", "nowhere/at/all"], "no model at"),
        (["sample.py", "a star", "--model", "DAMAGED"], "cannot load"),
        (["sample.py", "a star", "--model", "EMPTY"], "no config.json"),
        (["sample.py", "--reconstruct", "nothing.png"], "no picture at"),
        (["sample.py", "--reconstruct", "README.md"], "no picture that can be read"),
        (["sample.py", "--ask", "nothing.png", "what?"], "no picture at"),
        (["sample.py", "a star", "--n", "0"], "at least 1"),
        (["train_t2i.py", "--batch", "0", "--out", "OUT"], "at least 1"),
        (["train_t2i.py", "--data", "nano:text=0", "--out", "OUT"], "above zero"),
        (["train_t2i.py", "--autoencoder", "DAMAGED", "--out", "OUT"], "cannot load"),
        (["train_t2i.py", "--language-model", "DAMAGED", "--out", "OUT"], "cannot load"),
        (["sample.py", "a star", "--autoencoder", "nowhere/at/all"], "no model at"),
        (["sample.py", "a star", "--steps", "1", "--out", "README.md"], "README.md"),
        (["eval.py", "fid"], "unknown evaluation"),
        (["bench.py", "nothing"], "unknown loop"),
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
    file, folder = tmp_path / "picture.png", tmp_path / "model"
    file.write_text("good")
    folder.mkdir()
    (folder / "config.json").write_text("good")
    with pytest.raises(OSError, match="cannot write"), common.replacing(file) as temporary:
        temporary.write_text("half")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="cannot write"), common.replacing(folder):
        pass  # nothing was written: the last renaming fails
    assert file.read_text() == (folder / "config.json").read_text() == "good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "picture.png"]


def test_a_missing_tensor_is_no_model(parts, tmp_path):
    where = common.launch()
    shutil.copytree(parts / "t2i", tmp_path / "t2i")
    weights = load_file(tmp_path / "t2i/model.safetensors")
    del weights["dit.final_layer.linear.bias"]
    save_file(weights, tmp_path / "t2i/model.safetensors")
    with pytest.raises(ValueError, match="cannot load"):
        common.load_text_to_image(str(tmp_path / "t2i"), "", where)


def test_learning_rate_and_average():
    rates = [common.cosine(step, 10, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[10] == pytest.approx(0.1)
    assert rates[6] == pytest.approx(0.55) and rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    average.weight.data.fill_(0.0)
    common.update_average(average, model, decay=0.75, step=0)
    assert average.weight.item() == pytest.approx(0.9)  # the decay starts at 0.1
    common.update_average(average, model, decay=0.75, step=1000)
    assert average.weight.item() == pytest.approx(0.925)


def test_latent_statistics_are_those_of_all_pictures(parts):
    model, where = rae.RAE.from_pretrained(parts / "rae").eval(), common.launch()
    pictures = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    batches = iter([{"image": part} for part in pictures.split(4)])
    mean, std = train_decoder.latent_statistics(model, batches, 12, where)
    latents = model.encode(pictures / 255).double()
    torch.testing.assert_close(mean, latents.mean(dim=0).float(), atol=1e-6, rtol=0)
    expected = (latents.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(std, expected.float(), atol=1e-5, rtol=0)


def test_prompts_of_the_same_name_do_not_overwrite_each_other(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--steps", 1, "--n", 1, "--out", tmp_path]
    out = run("sample.py", "红色的星", "蓝色的圆", *flags).split()
    assert len(set(out)) == 3 and all(Path(path).is_file() for path in out)


def test_one_unreadable_picture_is_named(run, parts, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    flags = ["--encoder", parts / "encoder", "--data", tmp_path, "--out", tmp_path / "out", "--batch", 4]
    for workers in (0, 1):
        assert "b.png is no picture" in run("train_decoder.py", *flags, "--workers", workers, code=1)
    flags = [*t2i_flags(parts, tmp_path / "out"), "--data", tmp_path]
    (tmp_path / "b.png").unlink()
    assert "without captions" in run("train_t2i.py", *flags, code=1)
