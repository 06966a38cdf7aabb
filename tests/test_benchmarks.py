"""GenEval's rules against detections made by hand, its arithmetic, and both networks from folders."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, PngImagePlugin

import benchmarks
from benchmarks import Found, confident, judge, position

ROOT = Path(__file__).parent.parent


def at(left, top, width=10, height=10, score=0.95):
    return Found(score, (left, top, left + width, top + height))


def no_colors(objects, name):
    raise AssertionError("no colour was asked for")


# -- rules


@pytest.mark.parametrize(
    "one, other, relations",
    [
        (at(0, 50), at(50, 50), {"left of"}),
        (at(50, 50), at(0, 50), {"right of"}),
        (at(50, 0), at(50, 50), {"above"}),
        (at(50, 50), at(50, 0), {"below"}),
        (at(0, 0), at(50, 50), {"left of", "above"}),
        (at(50, 50), at(50, 50), set()),
        (at(0, 0), at(2, 0), set()),  # 2 apart, the margin is 0.1 * (10 + 10)
        (at(0, 0), at(3, 0), set()),  # 1 beyond it, a third of the distance
        (at(0, 0), at(4.1, 0), {"left of"}),  # 2.1 of 4.1
        (at(0, 0), at(50, 20), {"left of"}),  # above by 18 of 54
    ],
)
def test_positions(one, other, relations):
    assert position(one, other) == relations


CAT, TWO = {"class": "cat", "count": 1}, {"class": "cat", "count": 2}
LEFT = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]


@pytest.mark.parametrize(
    "wanted, found, reasons",
    [
        ({"include": [CAT]}, {"cat": [at(0, 0)]}, []),
        ({"include": [CAT]}, {"cat": [at(0, 0), at(9, 9)]}, []),
        ({"include": [CAT]}, {"dog": [at(0, 0)]}, ["expected cat>=1, found 0"]),
        ({"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}, {"cat": [at(0, 0)] * 2}, []),
        ({"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}, {"cat": [at(0, 0)] * 3},
         ["expected cat<3, found 3"]),
        ({"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}, {"cat": [at(0, 0)]},
         ["expected cat>=2, found 1"]),
        ({"include": LEFT}, {"cat": [at(0, 50)], "dog": [at(50, 50)]}, []),
        ({"include": LEFT}, {"cat": [at(50, 50)], "dog": [at(0, 50)]}, ["expected cat left of target"]),
        ({"include": LEFT}, {"cat": [at(0, 50)]},
         ["expected dog>=1, found 0", "no target for cat to be left of"]),
        ({"include": LEFT}, {"dog": [at(0, 50)]}, ["expected cat>=1, found 0"]),
    ],
)  # fmt: skip
def test_judgement(wanted, found, reasons):
    assert judge(wanted, found, no_colors) == (not reasons, reasons)


def test_colors():
    wanted = {"include": [CAT | {"color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}
    found = {"cat": [at(0, 0), at(9, 9)], "dog": [at(30, 30)]}
    said = {"cat": ["red"], "dog": ["blue"]}
    asked = []

    def colors_of(objects, name):
        asked.append((name, len(objects)))
        return said[name]

    assert judge(wanted, found, colors_of) == (True, [])
    assert asked == [("cat", 1), ("dog", 1)]  # of as many as were asked for, the best
    said["dog"] = ["green"]
    assert judge(wanted, found, colors_of) == (False, ["expected blue dog>=1, found 1 green"])


def test_thresholds():
    found = {
        "cat": [at(0, 0, score=0.31), at(0, 0, score=0.95), at(0, 0, score=0.3)],
        "dog": [at(0, 0, score=0.2)],
    }
    assert [o.score for o in confident(found, "colors")["cat"]] == [0.95, 0.31]
    assert "dog" not in confident(found, "colors")
    assert [o.score for o in confident(found, "counting")["cat"]] == [0.95]
    assert len(confident({"cat": [at(0, 0)] * 20}, "counting")["cat"]) == 16


def test_summary():
    """Tasks are means of images, overall is the mean of the tasks."""
    rows = [("a", "x", [1, 1, 0, 0]), ("a", "y", [0, 0, 0, 0]), ("b", "z", [1, 1, 1, 0])]
    rows = [{"tag": t, "metadata": m, "correct": bool(c)} for t, m, each in rows for c in each]
    assert benchmarks.geneval_summary(rows) == {
        "a": (0.25, 8), "b": (0.75, 4), "overall": (0.5, 12), "images": (5 / 12, 12), "prompts": (2 / 3, 3),
    }  # fmt: skip


# -- networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Random ones of the same classes, as folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        id2label={0: "cat", 1: "mouse", 2: "dog"}, label2id={"cat": 0, "mouse": 1, "dog": 2},
    )  # fmt: skip
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.weight.data.mul_(20)  # sure of something
    detector.save_pretrained(folder / "detector")
    transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(
        folder / "detector"
    )
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *map(chr, range(97, 123))])
    }
    vocabulary |= {f"{token}</w>": i + len(vocabulary) for i, token in enumerate(map(chr, range(97, 123)))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **small)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **small)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    clip.save_pretrained(folder / "clip")
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_detections_fit_the_image(networks):
    detector = benchmarks.Detector(str(networks / "detector"), torch.device("cpu"))
    assert detector.names == ["cat", "mouse", "dog"]
    found = detector(noise(60, 90))
    assert found and set(found) <= set(detector.names)
    for objects in found.values():
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
        for each in objects:
            rows, columns = np.nonzero(each.mask)
            assert each.mask.shape == (90, 60) and benchmarks.THRESHOLD < each.score <= 1
            assert each.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_colors_are_those_of_the_pixels_in_the_mask(networks):
    """Of an image with a mask CLIP sees what it would see of the object alone on grey."""
    clip = benchmarks.Clip(str(networks / "clip"), torch.device("cpu"))
    image, mask = noise(40, 40), np.zeros((40, 40), bool)
    mask[5:25, 10:30] = True
    alone = Image.new("RGB", (40, 40), "#999999")
    alone.paste(image.crop((10, 5, 30, 25)), (10, 5))
    seen = []
    images = clip.images
    clip.images = lambda shown: seen.append(shown) or images(shown)
    [color] = clip.colors(image, [Found(1.0, (10, 5, 30, 25), mask)], "cat")
    assert color in benchmarks.COLORS
    assert np.array_equal(np.asarray(seen[0][0]), np.asarray(alone.crop((10, 5, 30, 25))))
    texts = ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    mean = clip.texts(texts).mean(dim=0)
    torch.testing.assert_close(clip.classes["cat"][0], mean / mean.norm())


def run(capsys, *args, code=0):
    old, sys.argv = sys.argv, [str(a) for a in args]
    try:
        runpy.run_path(str(ROOT / args[0]), run_name="__main__")
    except SystemExit as left:
        assert left.code == code, capsys.readouterr().err
    finally:
        sys.argv = old
    printed = capsys.readouterr()
    return printed.err.strip().splitlines()[-1] if code else printed.out


def test_geneval_from_prompts_to_figures(networks, parts, tmp_path, capsys):
    red = CAT | {"color": "red"}
    lines = [
        {"tag": "single_object", "include": [CAT], "prompt": "a photo of a cat"},
        {"tag": "colors", "include": [red], "prompt": "a photo of a red cat"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "geneval"
    draw = [
        "sample.py",
        "--file",
        tmp_path / "prompts.jsonl",
        "--n",
        2,
        "--steps",
        1,
        "--model",
        parts / "t2i",
    ]
    run(capsys, *draw, "--out", out)
    assert [json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) for i in range(2)] == lines
    assert sorted(path.name for path in out.glob("*/samples/*")) == ["00000.png"] * 2 + ["00001.png"] * 2
    flags = ["--detector", networks / "detector", "--clip", networks / "clip", "--samples", out]
    command = ["eval.py", "geneval", *flags, "--out", tmp_path / "results.json"]
    run(capsys, *command)
    results = {r["metric"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    kept = tmp_path / "results-geneval.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 4 == results["geneval/overall"]["n"]
    assert {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"} <= rows[0].keys()
    tasks = [np.mean([r["correct"] for r in rows if r["tag"] == tag]) for tag in ("single_object", "colors")]
    assert results["geneval/overall"]["value"] == pytest.approx(np.mean(tasks))
    rows[0]["correct"], rows[1]["correct"] = True, False  # are kept, not scored again
    left = "".join(json.dumps(row) + "\n" for row in rows[:2])
    kept.write_text(left + '{"cut o')
    run(capsys, *command)
    assert kept.read_text().startswith(left) and len(kept.read_text().splitlines()) == 5
    image = out / "00000/samples/00000.png"
    image.write_bytes((out / "00000/samples/00001.png").read_bytes())  # drawn anew: scored anew
    run(capsys, *command)
    assert len(kept.read_text().splitlines()) == 6
    image.unlink()
    assert "has 2 images" in run(capsys, *command, code=1)
    noise(32, 32).save(image)
    wrong = [*command, "--clip", "another/clip"]
    assert "choose another --out" in run(capsys, *wrong, code=1)
    for path in (out / "00001/samples").iterdir():
        path.unlink()
    assert "00001 has a prompt, but no images" in run(capsys, *command, code=1)
    (out / "00001/metadata.jsonl").write_text("{}")
    assert "is no line of GenEval's" in run(capsys, *command, code=1)
    empty = ["eval.py", "geneval", "--samples", networks, "--out", tmp_path / "none.json"]
    assert "not in GenEval's layout" in run(capsys, *empty, code=1)
    (tmp_path / "prompts.jsonl").write_text("[]\n")
    assert 'needs a "prompt"' in run(capsys, *draw, "--out", out, code=1)


def test_clipscore(networks, tmp_path, capsys):
    clip = benchmarks.Clip(str(networks / "clip"), torch.device("cpu"))
    expected = []
    for i, text in enumerate(("a cat", "a dog", "two red birds")):
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", text)
        noise(40, 40, i).save(tmp_path / f"{i}.png", pnginfo=info)
        cosine = torch.nn.functional.cosine_similarity(clip.images([noise(40, 40, i)]), clip.texts([text]))
        expected.append(max(100 * cosine.item(), 0))
    flags = ["eval.py", "clipscore", "--samples", tmp_path, "--clip", networks / "clip", "--batch", 2]
    run(capsys, *flags, "--out", tmp_path / "results.json")
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert result["value"] == pytest.approx(np.mean(expected), rel=1e-4) and result["n"] == 3
    assert str(networks / "clip") in result["metric"]
    os.makedirs(tmp_path / "more")
    noise(8, 8).save(tmp_path / "more/4.png")
    assert "no images with a prompt" in run(capsys, *flags, code=1)


# -- DPG-Bench

COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
TABLE = f"""{COLUMNS}question_natural_language
a,,,1,0,entity,whole,,Is there a cat?
a,,,2,1,attribute,color,,Is the cat red?
a,,,3,"1,2",relation,spatial,,Is the red cat on a mat?
b,,,1,0,entity,whole,,Is there a dog?
b,,,2,0,attribute,color,,"Is it blue, or green?"
"""


def test_dpg_arithmetic(tmp_path):
    """By hand: a child counts where its parents were answered with yes; means over questions, images,
    items."""
    (tmp_path / "t.csv").write_text(TABLE)
    items = benchmarks.read_dpg(str(tmp_path / "t.csv"))
    assert items["a"][3].parents == (1, 2) and items["b"][2].text == "Is it blue, or green?"
    rows = [
        {"item_id": "a", "answers": {"1": True, "2": True, "3": True}},  # 1
        {"item_id": "a", "answers": {"1": False, "2": True, "3": True}},  # 0: all hang on the first
        {"item_id": "a", "answers": {"1": True, "2": False, "3": True}},  # 1/3
        {"item_id": "a", "answers": {"1": True, "2": True, "3": False}},  # 2/3
        *[{"item_id": "b", "answers": {"1": True, "2": False}}] * 4,  # 1/2
    ]
    figures = benchmarks.dpg_summary(rows, items)
    assert figures["overall"] == (pytest.approx(100 * (0.5 + 0.5) / 2), 2)
    assert figures["entity"] == (pytest.approx(100 * 7 / 8), 8)
    assert figures["attribute - color"] == figures["attribute"] == (pytest.approx(100 * 3 / 8), 8)
    assert figures["relation"] == (pytest.approx(75), 4)  # categories are of what was answered
    chain = {n: benchmarks.Question("", (n - 1,) * (n > 1), "", "") for n in (1, 2, 3)}
    assert benchmarks.filtered({1: False, 2: True, 3: True}, chain) == {1: False, 2: False, 3: False}
    (tmp_path / "t.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="no table of DPG-Bench"):
        benchmarks.read_dpg(str(tmp_path / "t.csv"))


def test_squares_of_a_grid():
    grid = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    squares = [np.asarray(benchmarks.square_of(grid, i)) for i in range(4)]
    assert np.array_equal(
        np.block([[[squares[0]], [squares[1]]], [[squares[2]], [squares[3]]]]), np.asarray(grid)
    )


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
        "is",
        "the",
        "cat",
        "yes",
        "no",
        "?",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    text = transformers.BlipTextConfig(vocab_size=len(words), encoder_hidden_size=16, **small, **ids)
    vision = transformers.BlipVisionConfig(image_size=32, patch_size=16, **small)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.BlipForQuestionAnswering(config).save_pretrained(folder)
    processor = transformers.BlipProcessor(
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}),
        transformers.BertTokenizer(str(folder / "vocab.txt")),
    )
    processor.save_pretrained(folder)
    return folder


def test_dpg_from_prompts_to_figures(blip, parts, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TABLE)
    (tmp_path / "prompts").mkdir()
    for item in "ab":
        (tmp_path / f"prompts/{item}.txt").write_text(f"an image of {item}\n")
    out = tmp_path / "dpg"
    run(
        capsys,
        "sample.py",
        "--file",
        tmp_path / "prompts",
        "--steps",
        1,
        "--model",
        parts / "t2i",
        "--out",
        out,
    )
    single, grid = np.asarray(Image.open(out / "b/3.png")), Image.open(out / "b.png")
    assert grid.size == (64, 64)
    assert np.array_equal(np.asarray(benchmarks.square_of(grid, 3)), single)
    flags = ["--samples", out, "--questions", tmp_path / "t.csv", "--vqa", blip]
    command = ["eval.py", "dpg", *flags, "--out", tmp_path / "results.json"]
    assert "only figures of mPLUG compare" in run(capsys, *command)
    rows = [json.loads(line) for line in (tmp_path / "results-dpg.jsonl").read_text().splitlines()]
    assert [(row["item_id"], row["square"], len(row["answers"])) for row in rows] == [
        *[("a", i, 3) for i in range(4)], *[("b", i, 2) for i in range(4)]
    ]  # fmt: skip
    results = {r["metric"]: r["value"] for r in json.loads((tmp_path / "results.json").read_text())}
    items = benchmarks.read_dpg(str(tmp_path / "t.csv"))
    assert results[f"dpg ({blip})/overall"] == pytest.approx(
        benchmarks.dpg_summary(rows, items)["overall"][0]
    )
    (out / "a.png").unlink()
    assert "1 of 2 grids are missing" in run(capsys, *command, code=1)


# -- understanding


def asked(*truth):
    return benchmarks.Item(None, "?", list(truth))


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        ("B", "B", 1), ("B.", "B", 1), ("(B) a cat", "B", 1), ("B: cat", "B", 1), ("b", "B", 0),
        ("Bee", "B", 0), ("A", "B", 0), ("", "B", 0), ("The answer is B", "B", 0),
        ("12", "12", 1), ("Twelve", "12", 0), ("two", "2", 1), ("the cat.", "Cat", 1), ("a dog", "cat", 0),
    ],
)  # fmt: skip
def test_exact_match(answer, truth, score):
    assert benchmarks.exact(answer, asked(truth)) == score


def test_vqa_soft_accuracy():
    """By hand: with n of ten who said it, leave one out: n ones out of ten see n - 1 left, the others n."""
    for n, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        truth = asked(*["nokia"] * n, *["phone"] * (10 - n))
        assert benchmarks.soft_accuracy("A Nokia", truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Red, Car!", "red car"), ("1,000", "1000"), ("3.14", "3.14"), ("st. john", "st john"),
        ("dont", "don't"), ("none", "0"), ("half-full", "half full"), ("we were", "we were"),
        ("route 66.", "route 66"),
    ],
)  # fmt: skip
def test_plain_answers(text, expected):
    assert benchmarks.plain(text) == expected


def test_yes_or_no():
    scores = [
        benchmarks.yes_or_no(said, asked("Yes"))
        for said in ("Yes, it is", "yes", " YES.", "No", "", "yesterday")
    ]
    assert scores == [1, 1, 1, 0, 0, 0]


def test_mme_sums_questions_and_images():
    """Two categories: accuracies 3/4 and 1/2 of one, 1 and 1 of the other."""
    rows = [("count/a", 1), ("count/a", 1), ("count/b", 1), ("count/b", 0), ("color/c", 1), ("color/c", 1)]
    rows = [{"group": group, "score": float(score)} for group, score in rows]
    assert benchmarks.understanding_summary("mme", rows) == (pytest.approx(100 * (0.75 + 0.5 + 1 + 1)), 6)
    assert benchmarks.understanding_summary("ai2d", rows) == (pytest.approx(500 / 6), 6)


ROWS = {  # two rows each, with the hub's columns
    "mme": [{"question_id": "a.jpg", "question": "Is it red? Please answer yes or no.", "answer": "Yes",
             "category": "color"},
            {"question_id": "b", "question": "1 + 1 = 3? Please answer yes or no.", "answer": "No",
             "category": "numerical_calculation"}],
    "textvqa": [{"question": "what brand?", "answers": ["x"] * 10}] * 2,
    "ai2d": [{"question": "which?", "options": ["a", "b", "c", "d"], "answer": "2"}] * 2,
    "seed": [{"question": "how?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d",
              "answer": "C", "data_type": kind} for kind in ("image", "video")],
    "mmmu": [{"question": "What is <image 1>?", "options": "['x', 'y']", "answer": "B"},
             {"question": "How many?", "options": "[]", "answer": "7"}],
    "mmmu-pro": [{"question": "<image 1> Which?", "options": "['x', 'y', 'z']", "answer": "C"}] * 2,
}  # fmt: skip


def test_questions_as_they_are_asked():
    first = {
        name: benchmarks.ASKED[name].read({"image": None, "image_1": "p"} | rows[0])
        for name, rows in ROWS.items()
    }
    assert (
        first["mme"].question == "Is it red? Please answer yes or no." and first["mme"].group == "color/a.jpg"
    )
    assert first["textvqa"].question == f"What brand?\n{benchmarks.ONE_WORD}"
    assert first["ai2d"].question == f"which?\nA. a\nB. b\nC. c\nD. d\n{benchmarks.ONE_LETTER}"
    assert first["ai2d"].truth == ["C"] == first["seed"].truth
    assert first["mmmu"].question == f"What is ?\nA. x\nB. y\n{benchmarks.ONE_LETTER}"
    assert (
        benchmarks.ASKED["mmmu"]
        .read({"image_1": "p"} | ROWS["mmmu"][1])
        .question.endswith(benchmarks.ONE_WORD)
    )


def test_understanding_end_to_end(parts, tmp_path, capsys):
    import datasets

    for name, rows in ROWS.items():
        column = "image_1" if name.startswith("mmmu") else "image"
        table = datasets.Dataset.from_list([row | {column: noise(20, 30)} for row in rows])
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "part.parquet")
    command = ["eval.py", "understanding", "--model", parts / "t2i", "--out", tmp_path / "results.json"]
    run(capsys, *command, "--local", tmp_path)
    results = {r["metric"]: r["n"] for r in json.loads((tmp_path / "results.json").read_text())}
    assert results == {f"understanding/{name}": 1 if name in ("mme", "seed") else 2 for name in ROWS}
    files = tmp_path.glob("results-understanding-*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 10 and all(row["model"] == str(parts / "t2i") for row in rows)
    assert "choose from mme" in run(capsys, *command, "--sets", "mme,vqa", code=1)
    assert "no .parquet files" in run(capsys, *command, "--local", tmp_path / "nothing", code=1)
