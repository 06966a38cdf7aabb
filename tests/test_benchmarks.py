"""benchmarks.py: rules and arithmetic against hand-made examples, and every benchmark as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, PngImagePlugin

import benchmarks
import common
from benchmarks import Detection, Item, confident, judge, relative_position
from eval import Config

ROOT = Path(__file__).parent.parent


def at(left, top, width=10, height=10, score=0.95):
    return Detection(score, (left, top, left + width, top + height))


def no_colors(objects, name):
    raise AssertionError("the prompt names no colour")


# -----------------------------------------------------------------------------------------------------------
# rows


def test_rows_are_split_over_processes_and_resumed(tmp_path):
    path, scored = tmp_path / "r-test.jsonl", []
    jobs = {(f"{i}.png", i): (i,) for i in range(5)}

    def score(number: int) -> dict:
        scored.append(number)
        return {"value": 10 * number}

    def score_all(rank: int, processes: int, network: str = "x") -> list[dict]:
        dist_ctx = common.DistContext(torch.device("cpu"), rank, processes, torch.float32)
        arguments = (("name", "number"), jobs, {"network": network}, lambda: score)
        return benchmarks.score_all("test", *arguments, Config(out=str(tmp_path / "r.json")), dist_ctx)

    with pytest.raises(ValueError, match="run this again"):  # rank 0 has not scored its rows yet
        score_all(1, 2)
    assert scored == [1, 3]
    path.write_text(path.read_text() + '{"cut o')
    rows = score_all(0, 1)
    assert scored == [1, 3, 0, 2, 4] and len(path.read_text().splitlines()) == 6
    expected = [{"value": 10 * i, "name": f"{i}.png", "number": i, "network": "x"} for i in range(5)]
    assert rows == expected == score_all(0, 2) == score_all(1, 2) and len(scored) == 5
    with pytest.raises(ValueError, match="choose another --out"):
        score_all(0, 1, "y")


# -----------------------------------------------------------------------------------------------------------
# GenEval: rules


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
def test_relative_positions(one, other, relations):
    assert relative_position(one, other) == relations


CAT, TWO = {"class": "cat", "count": 1}, {"class": "cat", "count": 2}
EXACTLY_TWO = {"include": [TWO], "exclude": [{"class": "cat", "count": 3}]}
LEFT = {"include": [{"class": "dog", "count": 1}, CAT | {"position": ["left of", 0]}]}


@pytest.mark.parametrize(
    "metadata, detections, reasons",
    [
        ({"include": [CAT]}, {"cat": [at(0, 0)]}, []),
        ({"include": [CAT]}, {"cat": [at(0, 0), at(9, 9)]}, []),
        ({"include": [CAT]}, {"dog": [at(0, 0)]}, ["expected cat>=1, found 0"]),
        (EXACTLY_TWO, {"cat": [at(0, 0)] * 2}, []),
        (EXACTLY_TWO, {"cat": [at(0, 0)] * 3}, ["expected cat<3, found 3"]),
        (EXACTLY_TWO, {"cat": [at(0, 0)]}, ["expected cat>=2, found 1"]),
        (LEFT, {"cat": [at(0, 50)], "dog": [at(50, 50)]}, []),
        (LEFT, {"cat": [at(50, 50)], "dog": [at(0, 50)]}, ["expected cat left of target"]),
        (LEFT, {"cat": [at(0, 50)]}, ["expected dog>=1, found 0", "no target for cat to be left of"]),
        (LEFT, {"dog": [at(0, 50)]}, ["expected cat>=1, found 0"]),
    ],
)
def test_judge_counts_and_positions(metadata, detections, reasons):
    assert judge(metadata, detections, no_colors) == (not reasons, reasons)


def test_judge_colors():
    metadata = {"include": [CAT | {"color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]}
    detections = {"cat": [at(0, 0), at(9, 9)], "dog": [at(30, 30)]}
    calls = []

    def classify_colors(objects, name):
        calls.append((name, len(objects)))
        return {"cat": ["red"], "dog": ["blue"]}[name]

    assert judge(metadata, detections, classify_colors) == (True, [])
    assert calls == [("cat", 1), ("dog", 1)]  # of the best detections, as many as the prompt names
    metadata["include"][1]["color"] = "green"
    expected = ["expected green dog>=1, found 1 blue"]
    assert judge(metadata, detections, classify_colors) == (False, expected)


def test_thresholds():
    scores = {"cat": (0.31, 0.95, 0.3), "dog": (0.2,)}
    detections = {name: [at(0, 0, score=s) for s in values] for name, values in scores.items()}
    assert [o.score for o in confident(detections, "colors")["cat"]] == [0.95, 0.31]
    assert "dog" not in confident(detections, "colors")
    assert [o.score for o in confident(detections, "counting")["cat"]] == [0.95]
    assert len(confident({"cat": [at(0, 0)] * 20}, "counting")["cat"]) == 16


def test_geneval_arithmetic():
    """Tasks are means of images, overall is the mean of the tasks."""
    rows = []
    for tag, metadata, images in (("a", "x", [1, 1, 0, 0]), ("a", "y", [0] * 4), ("b", "z", [1, 1, 1, 0])):
        rows += [{"tag": tag, "metadata": metadata, "correct": bool(correct)} for correct in images]
    some = {"a": (0.25, 8), "b": (0.75, 4), "images": (5 / 12, 12), "prompts": (2 / 3, 3)}
    assert benchmarks.geneval_summary(rows) == some  # overall is the mean of all six
    rows += [{"tag": tag, "metadata": tag, "correct": True} for tag in "cdef"]
    assert benchmarks.geneval_summary(rows)["overall"] == (pytest.approx(5 / 6), 16)


# -----------------------------------------------------------------------------------------------------------
# GenEval: networks, and the benchmark as a user runs it


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a detector and of a CLIP with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks")
    swin = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=12,
        id2label={0: "cat", 1: "mouse", 2: "dog"}, label2id={"cat": 0, "mouse": 1, "dog": 2},
    )  # fmt: skip
    detector = transformers.Mask2FormerForUniversalSegmentation(config)
    detector.class_predictor.weight.data.mul_(20)  # sure of something
    detector.save_pretrained(folder / "detector")
    processor = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(folder / "detector")
    letters = [chr(i) for i in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = transformers.CLIPTextConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **SMALL)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **SMALL)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = transformers.CLIPImageProcessor(**size)
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    return folder


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def test_boxes_are_those_of_the_masks(networks):
    detector = benchmarks.Detector(str(networks / "detector"), torch.device("cpu"))
    assert detector.names == ["cat", "mouse", "dog"]
    detections = detector(noise(60, 90))
    assert detections and set(detections) <= set(detector.names)
    for objects in detections.values():
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
        for detection in objects:
            rows, columns = np.nonzero(detection.mask)
            assert detection.mask.shape == (90, 60) and benchmarks.THRESHOLD < detection.score <= 1
            assert detection.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_colors_are_classified_from_the_object_on_grey(networks):
    clip = benchmarks.Clip(str(networks / "clip"), torch.device("cpu"))
    image, mask = noise(40, 40), np.zeros((40, 40), bool)
    mask[5:25, 10:30] = True
    mask[5, 10] = False
    expected = image.crop((10, 5, 30, 25))
    expected.putpixel((0, 0), (0x99, 0x99, 0x99))
    seen, embed = [], clip.images
    clip.images = lambda shown: seen.append(shown) or embed(shown)
    [color] = clip.colors(image, [Detection(1.0, (10, 5, 30, 25), mask)], "cat")
    assert color in benchmarks.COLORS
    assert np.array_equal(np.asarray(seen[0][0]), np.asarray(expected))
    texts = ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    mean = clip.texts(texts).mean(dim=0)
    torch.testing.assert_close(clip.color_embeddings["cat"][0], mean / mean.norm())


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


def read_results(path: Path) -> dict[str, dict]:
    return {row["metric"]: row for row in json.loads(path.read_text())["results"]}


def write_geneval(folder: Path) -> None:
    """Two images for each of two prompts, in the official layout."""
    for i, (tag, entry) in enumerate((("single_object", CAT), ("colors", CAT | {"color": "red"}))):
        (folder / f"{i:05d}/samples").mkdir(parents=True)
        metadata = {"tag": tag, "include": [entry], "prompt": "a photo of a cat"}
        (folder / f"{i:05d}/metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for k in range(2):
            noise(32, 32, seed=2 * i + k).save(folder / f"{i:05d}/samples/{k:05d}.png")


def test_geneval_end_to_end(networks, tmp_path, capsys):
    samples, rows_file = tmp_path / "samples", tmp_path / "results-geneval.jsonl"
    write_geneval(samples)
    flags = ["--detector", networks / "detector", "--clip", networks / "clip", "--samples", samples]
    command = ["eval.py", "geneval", *flags, "--out", tmp_path / "results.json"]
    run(capsys, *command)
    results = read_results(tmp_path / "results.json")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert len(rows) == 4 == results["geneval/images"]["n"]
    assert {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"} <= rows[0].keys()
    for tag in ("single_object", "colors"):
        task = np.mean([row["correct"] for row in rows if row["tag"] == tag])
        assert results[f"geneval/{tag}"]["value"] == pytest.approx(task)
    assert "geneval/overall" not in results  # of two tasks

    # an image that was drawn again is scored again
    image = samples / "00000/samples/00000.png"
    image.write_bytes((samples / "00000/samples/00001.png").read_bytes())
    run(capsys, *command)
    assert len(rows_file.read_text().splitlines()) == 5
    assert "choose another --out" in run(capsys, *command, "--clip", "another/clip", code=1)


def test_sample_writes_the_layouts_of_geneval_and_dpg(parts, tmp_path, capsys):
    prompts = [{"tag": "colors", "include": [CAT], "prompt": text} for text in ("a cat", "a red cat")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/a.txt").write_text("an image of a cat\n")
    command = ["sample.py", "--steps", 1, "--model", parts / "t2i"]
    run(capsys, *command, "--file", tmp_path / "prompts.jsonl", "--n", 2, "--out", tmp_path / "geneval")
    images = benchmarks.geneval_images(tmp_path / "geneval")
    assert [metadata for _, metadata in images] == [prompts[0]] * 2 + [prompts[1]] * 2
    run(capsys, *command, "--file", tmp_path / "prompts", "--out", tmp_path / "dpg")
    single, grid = Image.open(tmp_path / "dpg/a/3.png"), Image.open(tmp_path / "dpg/a.png")
    assert np.array_equal(np.asarray(benchmarks.crop_square(grid, 3)), np.asarray(single))


def test_geneval_refuses_other_layouts(tmp_path):
    write_geneval(tmp_path)
    assert len(benchmarks.geneval_images(tmp_path)) == 4
    (tmp_path / "00001/samples/00001.png").unlink()
    with pytest.raises(ValueError, match="00000 has 2 images, .*00001 has 1"):
        benchmarks.geneval_images(tmp_path)
    metadata = benchmarks.read_geneval(tmp_path / "00000")
    indented = json.dumps(metadata, indent=2) + "\n{}\n"
    (tmp_path / "00000/metadata.jsonl").write_text(indented, "utf-8-sig")  # with a byte order mark
    assert benchmarks.read_geneval(tmp_path / "00000") == metadata
    for text in ("{}", "[]", "", "junk"):
        (tmp_path / "00001/metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match="metadata.jsonl"):
            benchmarks.geneval_images(tmp_path)
    with pytest.raises(ValueError, match="not in GenEval's layout"):
        benchmarks.geneval_images(tmp_path / "00000")


def test_clipscore(networks, tmp_path, capsys):
    clip, expected = benchmarks.Clip(str(networks / "clip"), torch.device("cpu")), []
    for i, text in enumerate(("a cat", "a dog", "two red birds")):
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", text)
        noise(40, 40, i).save(tmp_path / f"{i}.png", pnginfo=info)
        cosine = torch.nn.functional.cosine_similarity(clip.images([noise(40, 40, i)]), clip.texts([text]))
        expected.append(max(100 * cosine.item(), 0))
    (tmp_path / "0.png").rename(tmp_path / "grid_0.png")  # as sample.py calls the image of "Grid"
    common.save_image(tmp_path / "grid.png", torch.rand(3, 82, 166), prompt="a cat\na dog", grid_of="12ab")
    command = ["eval.py", "clipscore", "--samples", tmp_path, "--clip", networks / "clip", "--batch", 2]
    run(capsys, *command, "--out", tmp_path / "results.json")
    result = read_results(tmp_path / "results.json")[f"clipscore/{networks / 'clip'}"]
    assert result["value"] == pytest.approx(np.mean(expected), rel=1e-4) and result["n"] == 3
    noise(8, 8).save(tmp_path / "no-prompt.png")
    assert "no-prompt.png: no prompt in the metadata" in run(capsys, *command, code=1)


# -----------------------------------------------------------------------------------------------------------
# DPG-Bench

COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
TABLE = f"""{COLUMNS}question_natural_language
a,,,1,0,entity,whole,,Is there a cat?
a,,,2,1,attribute,color,,Is the cat red?
a,,,3,"1,2",relation,spatial,,Is the red cat on a mat?
b,,,1,0,entity,whole,,Is there a dog?
b,,,2,0,attribute,color,,"Is it blue, or green?"
"""


def test_dpg_arithmetic(tmp_path):
    """A child counts only if its parents were answered with yes; means over questions, images and items."""
    (tmp_path / "t.csv").write_text(TABLE)
    items = benchmarks.read_dpg(str(tmp_path / "t.csv"))
    assert items["a"][3].parents == (1, 2) and items["b"][2].text == "Is it blue, or green?"
    rows = [
        {"item_id": "a", "answers": {"1": True, "2": True, "3": True}},  # 1
        {"item_id": "a", "answers": {"1": False, "2": True, "3": True}},  # 0: all depend on the first
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
    assert benchmarks.propagate({1: False, 2: True, 3: True}, chain) == {1: False, 2: False, 3: False}
    (tmp_path / "t.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="not DPG-Bench's table"):
        benchmarks.read_dpg(str(tmp_path / "t.csv"))


def test_squares_of_a_grid():
    grid = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    squares = [np.asarray(benchmarks.crop_square(Image.fromarray(grid), i)) for i in range(4)]
    rows = [np.concatenate(squares[:2], axis=1), np.concatenate(squares[2:], axis=1)]
    assert np.array_equal(np.concatenate(rows), grid)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("blip")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] is the cat yes no ?".split()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    ids = {"bos_token_id": 5, "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    text = transformers.BlipTextConfig(vocab_size=len(words), encoder_hidden_size=16, **SMALL, **ids)
    vision = transformers.BlipVisionConfig(image_size=32, patch_size=16, **SMALL)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.BlipForQuestionAnswering(config).save_pretrained(folder)
    image_processor = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    transformers.BlipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def test_dpg_end_to_end(blip, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(TABLE)
    for i, item in enumerate("ab"):
        noise(64, 64, i).save(tmp_path / f"{item}.png")
    flags = ["--samples", tmp_path, "--questions", tmp_path / "t.csv", "--vqa", blip]
    command = ["eval.py", "dpg", *flags, "--out", tmp_path / "results.json"]
    assert "only scores by mPLUG are comparable" in run(capsys, *command)
    rows = [json.loads(line) for line in (tmp_path / "results-dpg.jsonl").read_text().splitlines()]
    assert [(row["item_id"], row["square"], len(row["answers"])) for row in rows] == [
        *[("a", i, 3) for i in range(4)], *[("b", i, 2) for i in range(4)]
    ]  # fmt: skip
    summary = benchmarks.dpg_summary(rows, benchmarks.read_dpg(str(tmp_path / "t.csv")))
    results = read_results(tmp_path / "results.json")
    assert results[f"dpg ({blip})/overall"]["value"] == pytest.approx(summary["overall"][0])
    (tmp_path / "a.png").unlink()
    assert "1 of 2 grids are missing" in run(capsys, *command, code=1)


# -----------------------------------------------------------------------------------------------------------
# understanding


def item(*truth, options=()):
    return Item(None, "?", list(truth), options=list(options))


ANIMALS = ["dog", "a cat", "Ice cream", "U.S.A."]


@pytest.mark.parametrize(
    "answers, letter",
    [
        (["B", "b", "B.", "(b)", "(B) a cat", "b) cat", "B: cat", "B is right", "**B**",
          "B. I like that answer", "Answer: B", "answer: (b).", "The answer is B", "a cat", "A cat.",
          "The answer is a cat"], "B"),
        (["A", "a.", "Answer: A because", "dog"], "A"),
        (["The correct option is C, not the cat", "ice cream"], "C"),
        (["A cat is shown", "a bird", "I see a dog", "The answer is a bird", "Bee", "E", "", "answer"], ""),
    ],
)  # fmt: skip
def test_letters_of_short_answers(answers, letter):
    assert {benchmarks.option_letter(answer, ANIMALS) for answer in answers} == {letter}
    scores = [benchmarks.one_letter(answer, item("B", options=ANIMALS)) for answer in answers]
    assert scores == [letter == "B"] * len(answers)
    # options that are letters themselves, as in AI2D
    assert benchmarks.option_letter("(a)", ["C", "B", "A", "D"]) == "A"


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("Answer: H", "H"), ("The answer is C!", "C"), ("b", ""),
        ("(A) is wrong, so it must be (C).", "C"), ("(C) and not A or B", "C"), ("", ""),
        ("B. pie", "B"), ("It is pie", ""), ("I", "I"), ("It must be the Pie that they made", "C"),
        ("First a cake, then the pie, and then one more cake", "B"), ("a tart is not among all of these", ""),
        ("A or B or rather A then", "A"), ("not the one MADE of fruit", "E"),
    ],
)  # fmt: skip
def test_options_of_free_answers(answer, letter):
    """As MMMU's scorer; "" where that one guesses."""
    options = ["", "Cake", "pie", *(f"food {number}" for number in range(7))]  # the first was an image
    assert benchmarks.last_option(answer, options) == letter
    assert benchmarks.mmmu(answer, item("C", options=options)) == (letter == "C")


def test_the_last_answer_of_mmmu_pro():
    free = "(A) is wrong.\nAnswer: C"
    scores = [score(free, item("C", options="wxyz")) for score in (benchmarks.mmmu, benchmarks.mmmu_pro)]
    assert scores == [0, 1]
    assert (
        benchmarks.mmmu_pro("Answer: Car, (C)", item("C", options="wxyz")) == 1
    )  # only one letter of A to D
    assert benchmarks.mmmu_pro("Answer: A or (C)", item("C", options="wxyz")) == 1  # two: as in MMMU


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        ("7", "7", 1), ("7.0", "7", 1), ("7.004", "7", 1), ("It is 1,234.", "1234", 1), ("1.5e3", "1500", 1),
        ("x = 3 + 4 = 7", "7", 1), ("The result is 8", "7", 0), ("17", "7", 0), ("-7", "7", 0),
        ("So the answer is the red blood cell.", "Red blood cell", 1), ("blood", "red blood", 0),
        ("It is a\nso b", "b", 1), ("vitamin b is good", "b", 0), ("vitamin b", "b", 1), ("", "7", 0),
        ("It cost 7 and that is all", "7", 0), ("because of 7 men", "7", 1), ("42", "['24', '42']", 1),
        ("is :", "is :", 1),
    ],
)  # fmt: skip
def test_open_answers(answer, truth, score):
    assert benchmarks.mmmu(answer, item(*benchmarks.read_list(truth))) == score


def test_vqa_soft_accuracy():
    """n of ten people gave the answer: leaving one out, n times n - 1 are left, else n."""
    for n, expected in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        truth = item(*["nokia"] * n, *["phone"] * (10 - n))
        assert benchmarks.soft_accuracy("A Nokia", truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Red, Car!", "red car"), ("1,000", "1000"), ("3.14", "3.14"), ("st. john", "st john"),
        ("dont", "don't"), ("none", "0"), ("half-full", "half full"), ("we were", "we were"),
        ("route 66.", "route 66"), ("the\tTwelve\nTEN", "twelve 10"), ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"), ("couldntve", "couldntve"), ("hadnt've", "hadn't've"), ("Im", "im"),
        ("I'm", "i'm"), ("yall'd've", "y'all'd've"), ("somebody'd", "somebodyd"), ("hes", "he's"),
        ("McDonald's", "mcdonald 's"), ("let's", "let 's"), ("1,000-2,000", "1000 2000"), ("a,b", "ab"),
        ("what?now", "whatnow"), ("yes/no", "yes no"), ("yes / no", "yes no"), ("- 5-6", "56"),
        ("$5.00", "$5.00"), (".5", ".5"), ("5.", "5"), ("u.s.a.", "usa"), ("www.x.com", "wwwxcom"),
        ("a-an-apple", "apple"), ("re:zero", "re:zero"), ("50%", "50%"), ("x@y.z", "x yz"), ("its", "its"),
        ("." * 33, "."), ("(one)", "1"), ("a 'quoted' word", "'quoted' word"), ("#1", "#1"), ("a - the", ""),
    ],
)  # fmt: skip
def test_normalised_answers(text, expected):
    """As M4C's processor, slips included."""
    assert benchmarks.normalise_answer(text) == expected


def test_yes_or_no():
    answers = ("Yes, it is", "yes", " YES.", "No", "", "(yes)", "not at all", "I say yes")
    assert [benchmarks.yes_or_no(answer, item("Yes")) for answer in answers] == [1, 1, 1, 0, 0, 1, 0, 0]
    assert [benchmarks.yes_or_no(answer, item("No")) for answer in answers] == [0, 0, 0, 1, 0, 0, 1, 0]


def test_mme_sums_questions_and_images():
    """Accuracies of questions and images: 3/4 and 1/2 in one category, 1 and 1 in the other."""
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
             {"question": "How many?", "options": "[]", "answer": "['7', 'seven']"}],
    "mmmu-pro": [{"question": "<image 1> Which?", "options": "['x', 'y', 'z']", "answer": "C"}] * 2,
}  # fmt: skip


def test_wording_of_the_questions():
    first = {}
    for name, rows in ROWS.items():
        first[name] = benchmarks.QUESTION_SETS[name].read({"image": None, "image_1": "p"} | rows[0])
    assert first["mme"].question == f"Is it red? Please answer yes or no.\n{benchmarks.ONE_WORD}"
    assert first["mme"].group == "color/a.jpg"
    assert first["textvqa"].question == f"What brand?\n{benchmarks.ONE_WORD}"
    assert first["ai2d"].question == f"which?\nA. a\nB. b\nC. c\nD. d\n{benchmarks.ONE_LETTER}"
    assert first["ai2d"].truth == ["C"] == first["seed"].truth
    assert first["mmmu"].question == f"What is ?\nA. x\nB. y\n{benchmarks.ONE_LETTER}"
    open_question = benchmarks.read_mmmu({"image_1": "p"} | ROWS["mmmu"][1])
    assert open_question.question == f"How many?\n{benchmarks.ONE_WORD}"
    assert (open_question.truth, open_question.options) == (["7", "seven"], [])
    in_options = {"question": "?", "options": "['<image 2>', 'red <image 3>']", "answer": "B", "image_1": "p"}
    assert benchmarks.read_mmmu(in_options).options == ["", "red"]
    assert "<image" not in benchmarks.read_mmmu(in_options).question


def test_understanding_end_to_end(parts, tmp_path, monkeypatch, capsys):
    tables = {}
    for name, rows in ROWS.items():
        column = "image_1" if name.startswith("mmmu") else "image"
        tables[name] = datasets.Dataset.from_list([row | {column: noise(20, 30)} for row in rows])
    # a list of images, and one that is an error of its row only
    tables["seed"] = datasets.Dataset.from_list([row | {"image": [noise(20, 30)]} for row in ROWS["seed"]])
    broken = {"image": [{"bytes": b"junk", "path": None}] * 2}
    broken = datasets.Dataset.from_dict(broken, datasets.Features(image=datasets.Image()))
    tables["ai2d"] = datasets.concatenate_datasets([tables["ai2d"].remove_columns("image"), broken], axis=1)
    monkeypatch.setattr(benchmarks, "open_tables", lambda name: [tables[name]])
    command = ["eval.py", "understanding", "--model", parts / "t2i", "--out", tmp_path / "results.json"]
    assert "ai2d: 2 questions count as wrong, the first because cannot read" in run(capsys, *command)
    results = {name: row["n"] for name, row in read_results(tmp_path / "results.json").items()}
    assert results == {f"understanding/{name}": 1 if name in ("mme", "seed") else 2 for name in ROWS}
    files = tmp_path.glob("results-understanding-*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 10 and all(row["model"] == str(parts / "t2i") for row in rows)
    assert "choose from mme" in run(capsys, *command, "--sets", "mme,vqa", code=1)
