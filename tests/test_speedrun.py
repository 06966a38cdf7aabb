"""nano/speedrun.py: every stage from nothing, a stop in between, and the shipping of the result."""

import json
import subprocess
import sys

import rae
from nano import speedrun


def run(*flags) -> str:
    command = [sys.executable, "-m", *map(str, flags)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_stage_from_nothing(tmp_path):
    flags = ["nano.speedrun", "--scale", 0.0004, "--limit", 2, "--out", tmp_path / "run"]
    lines = run(*flags).splitlines()
    table = [line for line in lines[lines.index("|---|---|---|---|---|---|") - 1 :] if line.startswith("| ")]
    names = [stage.name for stage in speedrun.stages(speedrun.Config())]
    assert [line.split(" | ")[0].strip("| ") for line in table] == ["stage", *names, "all"]
    assert json.loads((tmp_path / "run/speedrun.json").read_text())["finished"] == names

    # started again, finished stages are not run again; one that is not goes on
    state = tmp_path / "run/speedrun.json"
    done = json.loads(state.read_text())
    done["finished"].remove("text to image")
    state.write_text(json.dumps(done))
    again = run(*flags).splitlines()
    assert [line for line in again if ": python" in line and "train_t2i.py" in line]
    assert sum(": python" in line for line in again) == 1
    minutes = json.loads(state.read_text())["minutes"]["text to image"]
    assert all(new > old for new, old in zip(minutes, done["minutes"]["text to image"], strict=True))

    run("nano.prepare", "ship", "--runs", tmp_path / "run", "--out", tmp_path / "weights")
    model = rae.TextToImage.from_pretrained(tmp_path / "weights/t2i")
    assert model.autoencoder.latent_shape == model.latent_shape
    for part in ("encoder", "language-model", "rae", "t2i"):
        assert (tmp_path / "weights" / part / "log.jsonl").stat().st_size
