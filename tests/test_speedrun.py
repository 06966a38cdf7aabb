"""nano/speedrun.py: every stage from nothing, a stop in between, and the shipping of the result."""

import importlib
import json
import multiprocessing
import sys
from functools import partial
from types import SimpleNamespace

import common
import rae
import train_decoder
from nano import prepare, speedrun


class Fork:
    """subprocess.Popen without the seconds of imports."""

    def __init__(self, command: list[str]):
        script, *flags = command[2:] if command[1] == "-m" else command[1:]
        self.process = multiprocessing.Process(target=self.run, args=(script.removesuffix(".py"), flags))
        self.process.start()

    def run(self, module: str, flags: list[str]) -> None:
        sys.argv = [module, *flags]
        common.main(importlib.import_module(module).main)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        self.process.join()
        self.returncode = self.process.exitcode


def quickly() -> None:
    """A patch."""
    speedrun.subprocess = SimpleNamespace(Popen=Fork)
    prepare.make_tokenizer = partial(prepare.make_tokenizer, documents=300)
    train_decoder.PRESETS["nano"] |= {"statistics": 32}


def test_every_stage_from_nothing(world, tmp_path):
    flags = ["--scale", 0.0003, "--limit", 2, "--dtype", "fp32", "--out", tmp_path / "run"]
    lines = world(1, "nano.speedrun", *flags, patch=quickly).wait().splitlines()
    table = [line for line in lines[lines.index("|---|---|---|---|---|---|") - 1 :] if line.startswith("| ")]
    names = [stage.name for stage in speedrun.stages(speedrun.Config())]
    assert [line.split(" | ")[0].strip("| ") for line in table] == ["stage", *names, "all"]
    assert json.loads((tmp_path / "run/speedrun.json").read_text())["finished"] == names
    t2i = json.loads((tmp_path / "run/t2i/config.json").read_text())
    assert (t2i["data"], t2i["val_data"], t2i["freeze"]) == ("nano:lessons", "nano", "language-model")

    # started again, finished stages are not run again; one that is not goes on
    state = tmp_path / "run/speedrun.json"
    done = json.loads(state.read_text())
    done["finished"].remove("text to image")
    state.write_text(json.dumps(done))
    again = world(1, "nano.speedrun", *flags, patch=quickly).wait().splitlines()
    assert [line for line in again if ": python" in line and "train_t2i.py" in line]
    assert sum(": python" in line for line in again) == 1
    minutes = json.loads(state.read_text())["minutes"]["text to image"]
    assert all(new > old for new, old in zip(minutes, done["minutes"]["text to image"], strict=True))

    prepare.ship(tmp_path / "weights", tmp_path / "run")
    model = rae.TextToImage.from_pretrained(tmp_path / "weights/t2i")
    assert model.autoencoder.latent_shape == model.latent_shape
    for part in ("encoder", "language-model", "rae", "t2i"):
        assert (tmp_path / "weights" / part / "log.jsonl").stat().st_size
