"""The scripts as a user runs them, on tiny parts: training, interruption, resumption, sampling, numbers,
mistakes."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

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


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "lr", "grad_norm", "images_per_second"} <= set(row) for row in rows)
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.parametrize("script", TRAINERS)
def test_training_writes_everything_and_resumes_exactly(script, run, parts, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = TRAINERS[script](parts, whole)
    run(script, *flags, "--steps", 4, "--log-every", 1, "--save-every", 2)
    assert {p.name for p in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "model", "samples",
    }  # fmt: skip
    assert [p.name for p in sorted((whole / "samples").iterdir())] == ["0000002.png", "0000004.png"]
    assert "already holds a training" in run(script, *flags, code=1)

    flags = [*TRAINERS[script](parts, half), "--steps", 4, "--log-every", 1]
    process = launch(script, *flags, "--save-every", 100, "--workers", 1, start_new_session=True)
    while not (half / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C in a terminal does: workers get it too
    _, err = process.communicate(timeout=300)
    if process.returncode != 0:  # else it was faster than we
        assert process.returncode == 128 + signal.SIGINT and "--resume" in err and "Traceback" not in err
        finish(launch(script, *flags, "--resume"))
    assert losses(half) == losses(whole)
    one, other = (load_file(folder / "model/model.safetensors") for folder in (whole, half))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("script", TRAINERS)
def test_two_processes_equal_one(script, run, parts, tmp_path):
    flags = ["--steps", 3, "--log-every", 1]
    run(script, *TRAINERS[script](parts, tmp_path / "one"), *flags)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    finish(launch(*torchrun, script, *TRAINERS[script](parts, tmp_path / "two"), *flags))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


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
        (["sample.py", "a star", "--model", "DAMAGED"], "cannot load TextToImage"),
        (["sample.py", "a star", "--model", "EMPTY"], "no config.json"),
        (["sample.py", "--reconstruct", "nothing.png"], "no picture at"),
        (["sample.py", "--reconstruct", "README.md"], "no picture that can be read"),
        (["sample.py", "--ask", "nothing.png", "what?"], "no picture at"),
        (["sample.py", "a star", "--n", "0"], "at least 1"),
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


def test_a_full_disk_leaves_the_old_file(tmp_path):
    import common

    path = tmp_path / "picture.png"
    path.write_text("good")
    with pytest.raises(OSError, match="cannot write"), common.replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("No space left on device")
    assert path.read_text() == "good" and [p.name for p in tmp_path.iterdir()] == ["picture.png"]
