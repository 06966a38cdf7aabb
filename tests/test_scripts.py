"""The scripts from the command line: help, presets, mistakes, and the README's own images."""

import dataclasses
import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import rae
import train_decoder
import train_t2i

SCRIPTS = ["train_decoder.py", "train_t2i.py", "sample.py", "encode.py", "eval.py", "bench.py"]
SCRIPTS += ["docs/plan.py", "nano/evaluate.py"]
CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


@pytest.fixture
def parse(monkeypatch):
    """parse(module, flag, ...) -> its config"""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        return common.parse(module.Config, module.__doc__, module.PRESETS)

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_flags(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for flags, code in ((["-h"], 0), (["--colour", "red"], 2)):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        assert end.value.code == code
    printed = capsys.readouterr()
    assert runpy.run_path(script)["__doc__"].splitlines()[0] in printed.out
    assert "unrecognized arguments: --colour" in printed.err


@pytest.mark.parametrize("name", train_t2i.PRESETS)
def test_presets_of_stage_2(name, parse):
    config = parse(train_t2i, "--preset", name)
    assert 0 <= train_t2i.learning_rate(config, config.steps - 1) < train_t2i.learning_rate(config, 500) <= 1
    vectors = {"condition_width": rae.DITS[config.dit]["width"]} | rae.DITS[config.dit]
    size = rae.class_dit(config.dit, config.num_classes) if config.condition == "class" else vectors
    with torch.device("meta"):
        # nine blocks are enough for RAEv2's base head
        model = rae.build_dit((256, 1152), size | {"depth": min(size["depth"], 9)})
        inputs = {"class": torch.zeros(1, dtype=torch.long)}
        inputs["text"] = torch.zeros(1, 256, model.t_embedder.mlp[2].out_features)
        inputs["caption"] = rae.Caption(torch.zeros(1, 8, size["width"]), torch.ones(1, 8).bool())
        x, t = torch.zeros(1, 256, 1152), torch.zeros(1)
    assert common.count_flops(model, x, t, inputs[config.condition] if model.y_embedder else None) > 0


def test_resume_reads_the_config_of_its_preset(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, steps in (("runs/t2i", 5), ("runs/class", 7)):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(json.dumps({"out": "where/it/was", "steps": steps}))
    assert parse(train_t2i, "--resume").steps == 5 and parse(train_t2i, "--resume").out == "runs/t2i"
    assert parse(train_t2i, "--preset", "nano-class", "--resume").steps == 7


def test_flags_override_presets_and_a_resumed_config(parse, tmp_path):
    config = parse(train_t2i, "--preset", "scale-rae-2.4b", "--dit", "2.4B-DH", "--warmup", 0.1, "--no-flip")
    assert (config.dit, config.batch, config.warmup, config.flip) == ("2.4B-DH", 2048, 0.1, False)
    (tmp_path / "config.json").write_text('{"batch": 7, "steps": 11}')
    config = parse(train_decoder, "--out", tmp_path, "--resume", "--steps", 12)
    assert (config.batch, config.steps, config.resume, config.muon) == (7, 12, "auto", 0.0)
    for content, message in (('{"dtype": "fp64"}', "--dtype fp64: choose"), ('{"colour": 1}', "colour"),
                             ('{"batch": 0}', "--batch 0: give at least 1"), ("{", "cannot read"),
                             ('{"batch": "9"}', "--batch '9': give int")):  # fmt: skip
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            parse(train_decoder, "--out", tmp_path, "--resume")


@pytest.mark.parametrize("module", [train_decoder, train_t2i])
def test_numbers_without_a_meaning_are_refused(module, parse):
    floats = [
        field.name for field in dataclasses.fields(module.Config) if field.type in (float, float | None)
    ]
    wrong = [(name, value) for name in floats for value in ("nan", "inf", "-inf")]
    wrong += [(name, -0.1) for name in floats] + [
        ("lr", 0),
        ("ema", 1.1),
        ("final_lr", 2),
        ("steps", 0),
        ("out", ""),
        ("steps", 10**30),
        ("seed", -(10**30)),
    ]
    wrong += (
        [("alpha", 0), ("dit_lr", 0), ("dropout", 1.01), ("decay_end", 10**30)]
        if module is train_t2i
        else [("encoder_size", 0)]
    )
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} "):
            parse(module, f"--{name.replace('_', '-')}={value}")


def test_help_shows_the_values_of_the_preset(parse, capsys):
    for flags, muon in (([], 0.008), (["--preset", "nano-full"], 0.0)):
        with pytest.raises(SystemExit):
            parse(train_decoder, *flags, "-h")
        assert f"decoder's matrices (0: AdamW) (default {muon})" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_t2i.py", ["--data", "nano:text=0"], "above zero"),
        ("train_t2i.py", ["--data", "IMAGES"], "no caption"),
        ("train_t2i.py", ["--decay-end", 9], "--decay-end 9 needs a --decay-start"),
        ("train_t2i.py", ["--decay-start", 9, "--decay-end", 8], "--decay-end 8 needs a --decay-start"),
        ("train_t2i.py", ["--autoencoder", "DAMAGED"], "cannot load"),
        ("train_t2i.py", ["--autoencoder", "nowhere/at/all"], "no model at nowhere"),
        ("train_t2i.py", ["--init", "PARTS/t2i", "--dit", "nano"], "--dit is for a new model"),
        (
            "train_t2i.py",
            ["--condition", "class", "--lr", 0.1],
            "--lr is for --condition text: give --dit-lr",
        ),
        ("train_t2i.py", ["--data", "LLAVA.json"], "a .json is a manifest"),
        ("train_t2i.py", ["--language-model", "IMAGES"], "no config.json"),
        ("train_decoder.py", ["--gan-weight", 1, "--disc-start", 9], "--gan-start 0"),
        ("train_decoder.py", ["--init", "PARTS/rae", "--patch-size", 4], "to start from has 8"),
        ("train_decoder.py", ["--init", "PARTS/rae", "--layers", "0,1"], "--layers is for a new model"),
    ],
)
def test_mistakes_end_in_one_line(script, flags, message, parts, tmp_path, monkeypatch, capsys):
    (tmp_path / "DAMAGED").mkdir()
    shutil.copy(parts / "rae/config.json", tmp_path / "DAMAGED/config.json")
    (tmp_path / "DAMAGED/model.safetensors").write_bytes(b"not safetensors")
    common.save_image(tmp_path / "IMAGES/0.png", torch.zeros(3, 32, 32))
    flags = [str(flag).replace("PARTS", str(parts)) for flag in flags]
    (tmp_path / "LLAVA.json").write_text('[{"image": "0.png", "conversations": []}]')
    flags = [str(tmp_path / flag) if flag in ("DAMAGED", "IMAGES", "LLAVA.json") else flag for flag in flags]
    base = ["--out", tmp_path / "out", "--batch", 1, "--workers", 0]
    if script == "train_t2i.py" and "--init" not in flags:
        base += ["--autoencoder", parts / "rae", "--language-model", parts / "language-model"]
    monkeypatch.setattr(sys, "argv", [script, *map(str, base), *flags])
    monkeypatch.setitem(rae.DITS, "nano", {"width": 32, "depth": 1, "heads": 2, "condition_width": 20})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        common.main(importlib.import_module(script.removesuffix(".py")).main)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1 and last.startswith(f"{script}: error: ") and message in last


@pytest.mark.parametrize(
    "module, flag, suffix",
    [
        ("eval", "--out", ".json"),
        ("bench", "--json", ".json"),
        ("nano.evaluate", "--out", ".json"),
    ],
)
def test_a_file_is_refused_before_the_work(module, flag, suffix, tmp_path, monkeypatch):
    """Where a folder is, where a file of another kind may be, and where nothing can be written."""
    (tmp_path / f"photos{suffix}").mkdir()
    (tmp_path / "cat.jpg").write_text("mine")
    monkeypatch.setattr(common, "init_distributed", lambda *_: pytest.fail("the work began"))
    names = {"photos": "ends in", f"photos{suffix}": "not a file", "cat.jpg": "ends in"}
    for name, message in (names | {f"cat.jpg/r{suffix}": "cannot write"}).items():
        monkeypatch.setattr(sys, "argv", [module, flag, str(tmp_path / name)])
        with pytest.raises((ValueError, OSError), match=message):
            importlib.import_module(module).main()
    assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "cat.jpg").read_text() == "mine"


def test_own_images(world, parts, tmp_path):
    """The commands of the README on 40 captioned PNGs."""
    readme = (ROOT / "README.md").read_text()
    [script] = [block for block in readme.split("```") if block.startswith("sh\n# own images\n")]
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "my_images").mkdir()
    for i in range(40):
        color, ramp = rng.integers(256, size=3), np.linspace(0, 1, 40)[None, :, None]
        image = Image.fromarray((ramp * color * np.ones((30, 1, 1))).astype(np.uint8))
        image.save(tmp_path / f"my_images/{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a ramp to {color[0]} red"}))
    (tmp_path / "my_images/metadata.jsonl").write_text("\n".join(lines))
    small = {"ENCODER": parts / "encoder", "LANGUAGE_MODEL": parts / "language-model", "DECODER": "nano",
             "DIT": "nano", "STEPS": 2, "BATCH": 4, "PROMPT": "a ramp to 9 red"}  # fmt: skip
    setting = "".join(f"{name}='{value}'\n" for name, value in small.items())
    shown = "python() { printf '%s\\t' \"$@\"; echo; }\n" + setting + script.removeprefix("sh\n")
    commands = subprocess.run(["bash", "-euc", shown], capture_output=True, text=True, check=True).stdout
    for command in commands.splitlines():
        name, *flags = command.removesuffix("\t").split("\t")
        own = ("runs/", "samples/", "my_images")
        world(1, name, *(tmp_path / flag if flag.startswith(own) else flag for flag in flags)).wait()
    image = Image.open(tmp_path / "samples/own/a-ramp-to-9-red-3.png")
    assert image.size == (32, 32) and len(commands.splitlines()) == 3 and "nano" not in script


def test_a_full_disk_leaves_the_old_file_or_folder(tmp_path):
    file, folder = tmp_path / "image.png", tmp_path / "model"
    file.write_text("good")
    folder.mkdir()
    (folder / "config.json").write_text("good")
    with pytest.raises(OSError, match="cannot write"), common.replacing(file) as temporary:
        temporary.write_text("half")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="cannot write"), common.replacing(folder, folder=True):
        pass  # nothing was written: the last rename fails
    assert file.read_text() == (folder / "config.json").read_text() == "good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "model"]
    with pytest.raises(RuntimeError, match="a bug"), common.writing(file):  # which no full disk raises
        raise RuntimeError("a bug")


def test_a_folder_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/config.json").write_text("good")
    (tmp_path / "model").symlink_to("disk")
    with common.replacing(tmp_path / "model", folder=True) as temporary:
        temporary.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "model"]
    assert (tmp_path / "disk/config.json").read_text() == "good" and not (tmp_path / "model").is_symlink()


def test_a_model_without_one_of_its_tensors_is_refused(parts, tmp_path):
    shutil.copytree(parts / "t2i", tmp_path / "t2i")
    weights = load_file(tmp_path / "t2i/model.safetensors")
    del weights["dit.final_layer.linear.bias"]
    save_file(weights, tmp_path / "t2i/model.safetensors")
    with pytest.raises(ValueError, match="cannot load"):
        common.load_model(rae.TextToImage, str(tmp_path / "t2i"), "", CPU)


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("mine")
    with pytest.raises(ValueError, match="not a file"), common.replacing(tmp_path / "photos"):
        pytest.fail("refused before anything is written")
    with pytest.raises(ValueError, match="not a file"):
        common.check_output(Path("/dev/null"))
    assert (tmp_path / "photos/cat.jpg").read_text() == "mine"
    with pytest.raises(OSError, match="cannot write"):
        common.check_output(tmp_path / "photos/cat.jpg/results.json")
