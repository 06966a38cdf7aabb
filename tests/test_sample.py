"""sample.py: which images are drawn, from what noise, with what guidance, and into which files."""

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT
from PIL import Image
from safetensors.torch import load_file

import convert
import data
import rae
import sample


@pytest.fixture
def run(monkeypatch, capsys):
    """run(flag, ...) draws in this process and returns the printed lines."""
    monkeypatch.chdir(ROOT)

    def call(*flags) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        capsys.readouterr()
        sample.main()
        return capsys.readouterr().out.splitlines()

    return call


def tiny(num_classes=48, seed=0, autoencoder=None, shape=(16, 24), width=32) -> rae.ClassToImage:
    """With random weights everywhere: a new DiT's velocity is zero."""
    torch.manual_seed(seed)
    dit = {"width": width, "depth": 2, "heads": 2, "num_classes": num_classes}
    model = rae.ClassToImage(dit, shape, autoencoder)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, parts):
    """A model of eight classes, a guide, and guides of other latents and of fewer classes."""
    folder, autoencoder = tmp_path_factory.mktemp("classes"), str(parts / "rae")
    tiny(8, autoencoder=autoencoder).save_pretrained(folder / "MODEL")
    tiny(8, 1, autoencoder, width=16).save_pretrained(folder / "GUIDE")
    tiny(8, 1, autoencoder, (4, 24)).save_pretrained(folder / "SMALL")
    tiny(3, 1, autoencoder).save_pretrained(folder / "FEW")
    return folder


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_images_carry_their_settings(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--steps", 2, "--out", tmp_path]
    lines = run("a red star", "two rings", "--n", 2, "--seed", 5, *flags)
    names = ["a-red-star-5.png", "a-red-star-6.png", "two-rings-5.png", "two-rings-6.png", "grid.png"]
    assert lines == [str(tmp_path / name) for name in names]
    assert {"prompt": "two rings", "seed": "6", "steps": "2"}.items() <= data.open_metadata(lines[3]).items()
    before = pixels(lines[3])
    run("two rings", "--n", 1, "--seed", 6, *flags)  # alone
    assert np.array_equal(pixels(lines[3]), before) and before.shape == (32, 32, 3)


def test_names_are_readable_and_differ():
    names = {
        "a red star": "a-red-star",
        "红色的 星": "红色的-星",
        "une étoile": "une-étoile",
        "A red star": "a-red-star_",  # differs in nothing else, where file names ignore case
        "a red star!": "a-red-star_",
        "a red-star": "a-red-star_",
        "a red star_": "a-red-star_",
        " a red star": "a-red-star_",
        "../red star": "red-star_",
        "une e\u0301toile": "une-étoile_",
        "eine Straße": "eine-strasse_",
        "⭐": "image_",
        "⭐⭐": "image_",
        "a star " * 20: "a-star-" * 8 + "a-st_",
        "a star " * 21: "a-star-" * 8 + "a-st_",
        "𠀀" * 90: "𠀀" * 45 + "_",
    }
    assert len({sample.file_name(prompt) for prompt in names}) == len(names)
    for prompt, name in names.items():
        assert re.fullmatch(
            re.escape(name) + ("[0-9a-f]{12}" if name[-1] == "_" else ""), sample.file_name(prompt)
        )
        assert len(sample.file_name(prompt).encode()) <= 200
    jobs = sample.prompt_jobs(sample.Config(["a star", "a ring", "a star"]), 2)
    assert [job.name for group in jobs for job in group] == ["a-star-0", "a-star-1", "a-ring-0", "a-ring-1"]
    # A FID of images that share their noise would be far too high.
    jobs = sample.prompt_jobs(sample.Config(["a star", "a ring"], file="prompts.txt", seed=7), 2)
    assert [job.name for group in jobs for job in group] == [
        "a-star-7",
        "a-star-1000007",
        "a-ring-8",
        "a-ring-1000008",
    ]


def test_no_file_is_replaced_but_by_the_same_image(run, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--n", 1, "--steps", 1, "--out", tmp_path]
    image, grid = run("a star", *flags)
    for name in (".mine.tmp", ".a-star-0.png.9.tmp"):
        (tmp_path / name).write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("a star", *flags) == [image, grid]
    others = (["--steps", 2], ["--seed", 0, "--guidance", 1], ["--best-of", 2], ["--resume", "--grid", "rae"])
    for more in others:
        with pytest.raises(ValueError, match="a-star-0.png was drawn with .*: choose another --out"):
            run("a star", *flags, *more)
    # the grid of another image has another name, which stays
    _, other = lines = run("a ring", *flags)
    assert re.fullmatch("grid_[0-9a-f]{12}.png", Path(other).name) and run("a ring", *flags) == lines
    assert {path: path.read_bytes() for path in before} == before
    assert np.array_equal(pixels(grid), np.kron(pixels(image), np.ones((4, 4, 1))))
    # somebody's files, and a folder
    for name, more in (("a-cat-0.png", []), ("a-cat-0.safetensors", ["--latents"]),
                       ("a-cat-0-scores.json", ["--best-of", 1])):  # fmt: skip
        (tmp_path / name).write_text("[1]")
        with pytest.raises(ValueError, match=f"{name} exists"):
            run("a cat", *flags, *more)
        assert (tmp_path / name).read_text() == "[1]"
        (tmp_path / name).unlink()
    (tmp_path / "a-cat-0.png").mkdir()
    with pytest.raises(ValueError, match="a-cat-0.png exists"):
        run("a cat", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        "a red star|--model|BROKEN",
        "a red star|--model|BROKEN|--best-of|4",
        "--chat|a red star|--model|BROKEN",
        "--reconstruct|in.png|--autoencoder|RAE",
        "--classes|3|--model|CLASSES",
    ],
)
def test_no_black_images(flags, run, parts, tmp_path, monkeypatch):
    """A model whose result is not finite ends in an error that names the image."""
    model, autoencoder = (
        rae.TextToImage.from_pretrained(parts / "t2i"),
        rae.RAE.from_pretrained(parts / "rae"),
    )
    with torch.no_grad():
        model.dit.final_layer.linear.weight[0] = np.nan
        autoencoder.decoder.decoder_pred.weight[0] = np.inf
    model.save_pretrained(tmp_path / "BROKEN")
    autoencoder.save_pretrained(tmp_path / "RAE")
    tiny(4, 0, str(tmp_path / "RAE")).save_pretrained(tmp_path / "CLASSES")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in.png")
    draws = "Here you go:", torch.zeros(1, 16, 20)
    monkeypatch.setattr(rae.Dialogue, "say", lambda self, text, image: draws)
    named = {"--classes": "label 3, seed 0", "--reconstruct": "in.png"}.get(
        flags.split("|")[0], "a red star'"
    )
    own = [tmp_path / flag if flag.isupper() or flag == "in.png" else flag for flag in flags.split("|")]
    with pytest.raises(ValueError, match=f"{named}.*: the model's result is not finite"):
        run(*own, "--steps", 1, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_prompts_of_any_text_file(run, parts, tmp_path):
    """Windows' Notepad, JSON of several kinds."""
    flags = ["--model", parts / "t2i", "--steps", 1, "--n", 1, "--out", tmp_path / "out"]
    rows = [{"tag": "colors", "prompt": "a red cat"}, {"tag": "colors", "prompt": "ein gr\u00fcner Ring"}]
    prompts = [row["prompt"] for row in rows]
    for name, text in (
        ("1.txt", "a red cat\r\n\r\nein gr\u00fcner Ring \r\n"),
        ("2.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("3.jsonl", json.dumps(rows, indent=2)),
        ("4.json", json.dumps(rows)),
        ("dpg/1.txt", prompts[0]),
        ("dpg/2.txt", prompts[1]),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"\ufeff{text}".encode())
        if not name.startswith("dpg"):
            assert sample.read_prompts(sample.Config(file=str(path))) == prompts
    (tmp_path / "dpg/._1.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # from a Mac
    assert sample.read_prompts(sample.Config(file=str(tmp_path / "dpg"))) == prompts
    run("--file", tmp_path / "3.jsonl", *flags)
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == rows[1]
    (tmp_path / "out/00001/metadata.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="00001/metadata.jsonl is of another prompt"):
        run("--file", tmp_path / "3.jsonl", *flags)
    for text, message in (
        ("a cat".encode("utf-16"), "not a text file in UTF-8"),
        (b'[{"tag": 1}]', '"prompt"'),
    ):
        (tmp_path / "3.jsonl").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            run("--file", tmp_path / "3.jsonl", *flags)


def print_drawn():
    save = sample.save

    def logged(job, *args):
        print(f"drew {job.name}\n", end="", flush=True)
        save(job, *args)

    sample.save = logged


@pytest.mark.parametrize("more", [["--n", 3], ["--n", 1, "--best-of", 2]])
def test_processes_share_the_work(more, world, parts, tmp_path):
    flags = ["--model", parts / "t2i", "--steps", 1, "--out", tmp_path / "out", *more]
    started = world(2, "sample.py", "a star", "a ring", *flags, patch=print_drawn)
    started.wait()
    drawn = [re.findall("drew (.*)", log.read_text()) for log in started.logs]
    assert len(drawn[0]) == len(drawn[1]) == more[1] and not set(drawn[0]) & set(drawn[1])


def test_class_names_are_in_the_metadata(run, folders, tmp_path):
    model = rae.ClassToImage.from_pretrained(folders / "MODEL")
    model.class_names = [f"class {i}" for i in range(8)]
    model.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--classes", "3,5", "--n", 2, "--steps", 1]
    *images, grid = run(*flags, "--out", tmp_path / "out")
    assert [data.open_metadata(path)["class"] for path in images] == ["class 3", "class 5"]
    assert data.open_metadata(grid)["prompt"] == "class 3\nclass 5"


def test_labels_are_balanced():
    jobs = sample.class_jobs(sample.Config(classes="all", n=50_000, seed=7), 1000)
    assert Counter(job.input for job in jobs) == dict.fromkeys(range(1000), 50)
    assert [job.seed for job in jobs] == [*range(7, 50_007)] and len({job.name for job in jobs}) == 50_000


def test_images_depend_on_neither_processes_nor_batch_nor_interruption(run, world, folders, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    flags = ["--model", folders / "MODEL", "--classes", "all", "--n", 280, "--steps", 1, "--resume"]
    run(*flags, "--batch", 100, "--out", a, "--npz", tmp_path / "a.npz")
    b.mkdir()
    for i in range(0, 280, 3):  # the first was cut off by a full disk
        (b / f"{i:06d}.png").write_bytes((a / f"{i:06d}.png").read_bytes() if i else b"")
    before = (b / "000003.png").stat().st_mtime_ns
    flags += ["--npz", tmp_path / "b.npz", "--out", b]
    world(2, "sample.py", *flags, "--batch", 7).wait()
    one, other = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "ab")
    assert one.shape == (280, 32, 32, 3) and len(np.unique(one, axis=0)) == 280
    assert np.abs(one - other).max() <= 1  # another batch size rounds otherwise
    assert np.array_equal(one[12], pixels(a / "000012.png"))
    assert len(list(b.iterdir())) == 280 and (b / "000003.png").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="000000.png was drawn with label 0, not 1"):
        run(*flags, "--classes", "1,0")


def test_resume_refuses_images_of_other_settings(run, parts, tmp_path):
    flags = ["--model", tmp_path / "m", "--classes", "1,2", "--n", 2, "--steps", 1, "--out", tmp_path / "o"]
    tiny(4, 0, str(parts / "rae")).save_pretrained(tmp_path / "m")
    run(*flags)
    before = (tmp_path / "o/000001.png").stat().st_mtime_ns
    run(*flags, "--resume", "--model", f"{tmp_path}/o/../m/")  # the same model
    assert (tmp_path / "o/000001.png").stat().st_mtime_ns == before
    run(*flags, "--resume", "--latents")  # draws again, for the latents are missing
    assert load_file(tmp_path / "o/000001.safetensors")["latents"].shape == (16, 24)
    with pytest.raises(ValueError, match="was drawn with solver euler, not heun"):
        run(*flags, "--resume", "--solver", "heun")
    # other weights at the same path
    tiny(4, 1, str(parts / "rae")).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="was drawn with weights"):
        run(*flags, "--resume")
    autoencoder = rae.RAE.from_pretrained(parts / "rae")
    torch.nn.init.ones_(autoencoder.decoder.decoder_pred.weight)
    autoencoder.save_pretrained(tmp_path / "rae")
    tiny(4, 0, str(tmp_path / "rae")).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="was drawn with autoencoder_weights"):
        run(*flags, "--resume")


def test_layouts_of_the_benchmarks(run, parts, tmp_path):
    lines = ['{"tag": "colors", "prompt": "a red cat"}\n', '{"tag": "colors", "prompt": "a cat"}\n']
    (tmp_path / "p.jsonl").write_text("".join(lines))
    flags = ["--model", parts / "t2i", "--steps", 1]
    geneval = ["--file", tmp_path / "p.jsonl", "--out", tmp_path / "geneval", *flags]
    run(*geneval, "--n", 2)
    for i, line in enumerate(lines):
        folder = tmp_path / f"geneval/{i:05d}"
        assert (folder / "metadata.jsonl").read_text() == line
        assert sorted(path.name for path in folder.glob("samples/*")) == ["00000.png", "00001.png"]
    with pytest.raises(ValueError, match="with seed 0, not 1"):
        run(*geneval, "--n", 2, "--resume", "--seed", 1)
    geneval += ["--best-of", 2, "--n", 1, "--out", tmp_path / "best"]
    run(*geneval)
    with pytest.raises(ValueError, match="was drawn with seed 0, not 1"):
        run(*geneval, "--resume", "--seed", 1)
    (tmp_path / "dpg").mkdir()
    for item in "ab":
        (tmp_path / f"dpg/{item}.txt").write_text(f"an image of {item}\n")
    run("--file", tmp_path / "dpg", "--out", tmp_path / "out", *flags)
    one, two, three, four = (pixels(tmp_path / f"out/b/{k}.png") for k in range(4))
    assert np.array_equal(pixels(tmp_path / "out/b.png"), np.block([[[one], [two]], [[three], [four]]]))


@pytest.mark.parametrize("reads_images", [False, True])
def test_best_of_keeps_what_the_verifier_prefers(reads_images, run, parts, tmp_path):
    model = rae.TextToImage.from_pretrained(parts / "t2i")
    if reads_images:  # as beside a VAE, whose latents it does not read
        model.reader_path = model.autoencoder_path
        model._hub_mixin_config["reader_channels"] = 24
    model.eval().save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--steps", 2, "--seed", 3, "--batch", 4, "--out", tmp_path]
    flags += ["--best-of", 6, "--verifier", "prompt_confidence"]
    lines = run("a red star", "two rings", *flags, "--n", 2)
    noise = torch.stack([sample.draw_noise(seed, (16, 24)) for seed in range(3, 9)])
    for prompt, stem, shown in (("a red star", "a-red-star", lines), ("two rings", "two-rings", lines[2:])):
        latents = model.generate([prompt] * 6, 2, 3.0, noise=noise)
        images = model.autoencoder.decode(latents).detach().clamp(0, 1)
        verdicts = rae.verify(model, prompt, model.reader.encode(images) if reads_images else latents)
        best = rae.best(verdicts, "prompt_confidence", 2)
        assert shown[:2] == [str(tmp_path / f"{stem}-{3 + i}.png") for i in best]
        image = pixels(shown[1]).transpose(2, 0, 1)
        assert np.abs(image - images[best[1]].numpy() * 255).max() < 1
        assert len(list(tmp_path.glob(f"{stem}-*.png"))) == 2  # the others are not decoded
        rows = json.loads((tmp_path / f"{stem}-3-scores.json").read_text())["candidates"]
        assert [row["seed"] for row in rows] == [*range(3, 9)] and [rows[i]["rank"] for i in best] == [0, 1]
        expected = [verdict.prompt_confidence for verdict in verdicts]
        assert [row["prompt_confidence"] for row in rows] == pytest.approx(expected, rel=1e-4)
        assert data.open_metadata(shown[0])["prompt_confidence"] == str(rows[best[0]]["prompt_confidence"])
    (tmp_path / lines[0]).unlink()
    before = (tmp_path / lines[2]).stat().st_mtime_ns
    assert run("a red star", "two rings", *flags, "--n", 2, "--resume") == lines
    assert (tmp_path / lines[0]).exists() and (tmp_path / lines[2]).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="with n 2, not 3"):
        run("two rings", *flags, "--n", 3, "--resume")
    (tmp_path / "prompts.txt").write_text("two rings")
    with pytest.raises(ValueError, match="candidates with other seeds"):
        run("--file", tmp_path / "prompts.txt", *flags, "--n", 2, "--resume")
    # damaged scores
    scores = tmp_path / "two-rings-3-scores.json"
    settings = json.loads(scores.read_text())["settings"]
    for part in ({"settings": [1]}, {"settings": settings}, {"settings": settings, "candidates": [{}]}):
        scores.write_text(json.dumps(part))
        with pytest.raises(ValueError, match="two-rings-3-scores.json exists and is not from sample.py"):
            run("two rings", *flags, "--n", 2, "--resume")


def test_reconstruct_and_ask(run, parts, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "in.png")
    decoder = ["--autoencoder", parts / "rae", "--out", tmp_path]
    [line] = run("--reconstruct", tmp_path / "in.png", *decoder)
    assert "PSNR" in line and Image.open(tmp_path / "in-reconstruction.png").size == (32 + 2 + 32, 32)
    assert run("--reconstruct", tmp_path / "in.png", *decoder) == [line]
    assert run("--reconstruct", f"{tmp_path}/./in.png", *decoder) == [line]
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="in-reconstruction.png was drawn with content"):
        run("--reconstruct", tmp_path / "in.png", *decoder)
    flags = ["--model", parts / "t2i", "--steps", 2, "--out", tmp_path]
    assert len(run("--ask", tmp_path / "in.png", "what is it?", "and which colour?", *flags)) >= 2

    (tmp_path / "prompts.txt").write_text("a star\n\ntwo rings\n")
    run("--file", tmp_path / "prompts.txt", "--n", 1, "--latents", *flags)
    latents = tmp_path / "two-rings-1.safetensors"
    assert run("\udcff", "--n", 1, *flags)  # an argument that is not UTF-8
    [line] = run("--reconstruct", latents, *decoder)
    assert np.array_equal(pixels(line), pixels(tmp_path / "two-rings-1.png"))
    assert run("--ask", latents, "what is it?", *flags)
    with pytest.raises(ValueError, match=r"has latents \(16, 24\)"):
        run("--ask", latents, "what?")  # the nano model
    latents.write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot read latents"):
        run("--ask", latents, "what?", *flags)


def test_chat_draws_or_answers(run, parts, tmp_path, monkeypatch):
    flags = ["--chat", "--model", parts / "t2i", "--steps", 2, "--out", tmp_path]
    run("hello", *flags)
    reply = "Here you go:", torch.zeros(1, 16, 20)
    monkeypatch.setattr(rae.Dialogue, "say", lambda self, text, image: reply)
    lines = run("draw a star", *flags)
    assert lines == ["Here you go:", str(tmp_path / "0-draw-a-star-0.png")]
    assert data.open_metadata(lines[1])["prompt"] == "draw a star" and pixels(lines[1]).shape == (32, 32, 3)
    # the same turn after other turns is another image
    images = [run(first, "draw a star", *flags)[-1] for first in ("hello", "hi")]
    assert len(set(images)) == 2 and all(Path(image).is_file() for image in images)


def test_every_flag_reaches_the_sampler(run, folders, tmp_path):
    model, guide = (rae.ClassToImage.from_pretrained(folders / name).eval() for name in ("MODEL", "GUIDE"))
    noise = torch.stack([sample.draw_noise(seed, (16, 24)) for seed in (9, 10)])
    run("--model", folders / "MODEL", "--classes", "3,5", "--n", 2, "--latents", "--out", tmp_path,
        "--seed", 9, "--steps", 3, "--guidance", 1.5, "--guide", folders / "GUIDE",
        "--interval", "0.2,0.9", "--solver", "heun", "--grid", "rae")  # fmt: skip
    drawn = torch.stack([load_file(tmp_path / f"00000{i}.safetensors")["latents"] for i in range(2)])
    settings = {"solver": "heun", "grid": "rae", "guide": guide, "interval": (0.2, 0.9)}
    torch.testing.assert_close(drawn, model.generate([3, 5], 3, 1.5, noise=noise, **settings))


def test_guidance_is_the_formula_and_wastes_nothing():
    model, guide, labels, null = tiny(), tiny(width=16), torch.tensor([3, 40]), torch.tensor([48, 48])
    noise = torch.randn(2, 16, 24)
    for options, weaker in (
        ({}, partial(model.dit, condition=null)),
        ({"guide": guide, "interval": (0.0, 0.9)}, partial(guide.dit, condition=labels)),
    ):
        x = noise
        for t, dt in rae.time_grid(2, model.alpha):
            time = torch.full((2,), t)
            with torch.no_grad():
                v, base = model.dit(x, time, labels), weaker(x, time)
            x = x + dt * (base + 1.42 * (v - base) if t <= options.get("interval", (0, 1))[1] else v)
        drawn = model.generate(labels, 2, 1.42, noise=noise, **options)
        torch.testing.assert_close(drawn, x, atol=1e-5, rtol=1e-5)

    calls = {model: [], guide: []}  # the t of every evaluation
    for m, times in calls.items():
        m.dit.register_forward_pre_hook(lambda _, args, times=times: times.append(args[1][0].item()))
    model.generate(labels, 10, noise=noise)
    model.generate(labels, 10, 1.0, noise=noise, guide=guide)  # a scale of 1 needs no guide
    assert (len(calls[model]), len(calls[guide])) == (20, 0)
    model.generate(labels, 10, 1.42, noise=noise)
    assert (len(calls[model]), len(calls[guide])) == (40, 0)
    model.generate(labels, 10, 1.42, noise=noise, guide=guide, interval=(0.0, 0.9))
    assert calls[guide] == [t for t in calls[model][40:] if t <= 0.9] and 0 < len(calls[guide]) < 10


@pytest.mark.parametrize("name, scale", [("rae-256", 1.42), ("rae-512", 1.5)])
def test_presets_name_what_is_released(name, scale):
    preset = sample.PRESETS[name]
    file, autoencoder = convert.RELEASED_DITS[preset["model"]]
    guide, same = convert.RELEASED_DITS[preset["guide"]]
    assert file.endswith("stage2_model.pt") and "DiTDH-S" in guide and preset["guidance"] == scale
    assert autoencoder == same and autoencoder in convert.RELEASED


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give a prompt"),
        ("a star| ", "empty prompt"),
        ("--ask|nothing.png|what?", "cannot read the image nothing.png"),
        ("a star|--out|README.md", "cannot write README.md"),
        ("a star|--npz|docs", "a name that ends in .npz"),
        ("a star|--npz|README.md/images.npz", "cannot write README.md/images.npz"),
        ("a star|--out|images.npz|--npz|images.npz", "choose another name"),
        ("a star|--guidance|-1", "at least 0"),
        ("a star|--guidance|nan", "finite"),
        ("a star|--interval|0,nan", "give two numbers"),
        ("a star|--interval|0.5", "give two numbers"),
        ("a star|--best-of|2", "at most"),
        ("a star|--chat|--n|2", "--chat does not go with n"),
        ("--reconstruct|a.png|--latents", "--reconstruct does not go with latents"),
        ("--reconstruct|a.png", "--reconstruct does not go with model"),
        ("a star|--file|.ci", "whole set of prompts"),
        ("--file|.ci", "DPG-Bench is a folder of .txt"),
        ("--classes|3", "--classes needs --model"),
        ("--classes|3,8|--batch|1|--model|MODEL", "label 8: this model has the classes 0 to 7"),
        ("--classes|3,3|--model|MODEL", "give each class once"),
        ("--classes|3,x|--model|MODEL", "give labels like 3,17"),
        ("--classes|all|--n|9|--model|MODEL", "give each class once, and --n as a multiple of 8"),
        ("--classes|all|--guide|SMALL|--model|MODEL", r"latents \(4, 24\)"),
        ("--classes|all|--guide|FEW|--model|MODEL", "has 3 classes"),
        ("--classes|all|--guide|FEW|--guidance|1|--model|MODEL", "needs a --guidance other than 1"),
    ],
)
def test_careless_use(flags, message, run, parts, folders, tmp_path):
    flags = [folders / flag if flag.isupper() else flag for flag in flags.split("|") if flag]
    flags = ["--out", tmp_path / "out", *flags]  # unless it is among them
    if "--classes" not in flags:
        flags += ["--model", parts / "t2i"]
    with pytest.raises((ValueError, OSError), match=message):
        run(*flags)
    assert not (tmp_path / "out").exists()
