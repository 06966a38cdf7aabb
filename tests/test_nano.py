"""The nano world: images are what captions, questions and requests say, on every machine. Its scorer, and
nano/evaluate.py as a user runs it."""

import hashlib
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage

import rae
from benchmarks import relative_position
from nano import evaluate, shapes
from nano.scorer import Detection, detect, overall, read_word, score

COUNT = 40  # prompts per task
SHAPE = rf"({'|'.join(shapes.SHAPES)})"


@pytest.fixture(scope="module")
def prompts():
    return {task: [shapes.prompt(task, 0, i) for i in range(COUNT)] for task in shapes.TASKS}


@pytest.fixture(scope="module")
def images(prompts):
    return {task: [shapes.render(p, i) for i, p in enumerate(some)] for task, some in prompts.items()}


def accuracy(images, prompts):
    pairs = {task: zip(images[task], prompts[task], strict=True) for task in shapes.TASKS}
    return overall({task: [score(*pair) for pair in some] for task, some in pairs.items()})["overall"]


def degrade(image, blur=0.6, noise=6.0):
    """An image as a decoder would return it: soft and a little noisy."""
    grain = np.random.default_rng(0).normal(0, noise, image.shape)
    soft = ndimage.gaussian_filter(image.astype(np.float64), (blur, blur, 0))
    return np.clip(np.round(soft + grain), 0, 255).astype(np.uint8)


def held_out_in(text):
    return [f"{color} {shape}" for shape, color in shapes.HELD_OUT if f"{color} {shape}" in text]


# -----------------------------------------------------------------------------------------------------------
# images, captions, prompts


def test_images_and_texts_never_change():
    """The shipped weights were trained on them."""
    digest = hashlib.sha256()
    for domain in shapes.DOMAINS:
        for i in range(100):
            sample = shapes.draw(domain, 7, i)
            digest.update(sample.image.tobytes() + repr((sample.caption, sample.questions)).encode())
    for task in shapes.TASKS:
        prompt = shapes.prompt(task, 7, 7)
        digest.update(shapes.render(prompt, 7, 64).tobytes() + prompt["prompt"].encode())
    assert digest.hexdigest() == "6c56af110b77dad369e711f17a1bb2e9dba76a57518d4a176a6973493fae1a3b"


def test_draws_do_not_depend_on_their_order():
    keys = [(domain, i) for domain in shapes.DOMAINS + shapes.TASKS for i in range(5)]
    forward = [shapes.draw(domain, 1, i) for domain, i in keys]
    backward = [shapes.draw(domain, 1, i) for domain, i in keys[::-1]][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert np.array_equal(one.image, other.image) and one.caption == other.caption
    assert len({sample.image.tobytes() for sample in forward}) == len(forward)
    assert not np.array_equal(shapes.draw("objects", 2, 0).image, forward[0].image)


@pytest.mark.parametrize("domain", shapes.DOMAINS + shapes.TASKS)
@pytest.mark.parametrize("size", [48, 64])
def test_samples_are_well_formed(domain, size):
    for i in range(10):
        sample = shapes.draw(domain, 2, i, size)
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert 2 <= len(sample.questions) <= 4 and len(dict(sample.questions)) == len(sample.questions)
        assert (sample.word is None) == (domain != "text")
        tasks = {"scenes": [None], "text": [None], "objects": shapes.TASKS}
        assert sample.metadata.get("tag") in tasks.get(domain, [domain])
        assert not re.search(r"\ban? (?<=\ba )[aeiou]|\ban [^aeiou]", sample.caption), sample.caption


def test_held_out_pairs_never_occur_in_training():
    assert {shape for shape, _ in shapes.HELD_OUT} == set(shapes.SHAPES)
    for i in range(1000):
        sample = shapes.draw("scenes" if i % 3 == 0 else "objects", 3, i)
        assert not any((thing.shape, thing.color) in shapes.HELD_OUT for thing in sample.objects)
        assert not held_out_in(sample.caption)


def test_held_out_prompts_hold_nothing_else():
    for task in ("colors", "color_attr"):
        for i in range(COUNT):
            prompt = shapes.prompt(task, 0, i, held_out=True)
            assert len(held_out_in(prompt["prompt"])) == len(prompt["include"])
            assert score(shapes.render(prompt, i), prompt)
    with pytest.raises(ValueError, match="counting"):
        shapes.prompt("counting", 0, 0, held_out=True)


def test_prompts_have_genevals_form(prompts):
    for task, some in prompts.items():
        for prompt in some:
            assert prompt["tag"] == task and not held_out_in(prompt["prompt"])
            for entry in prompt["include"]:
                assert entry["class"] in prompt["prompt"] and entry.get("color", "") in prompt["prompt"]
            assert len({entry["class"] for entry in prompt["include"]}) == len(prompt["include"])
    for prompt in prompts["counting"]:
        [included], [excluded] = prompt["include"], prompt["exclude"]
        assert excluded == {"class": included["class"], "count": included["count"] + 1}
    assert all(p["include"][1]["position"][1] == 0 for p in prompts["position"])
    assert {"color" in p["include"][0] for p in prompts["position"]} == {True, False}


def test_prompts_are_not_the_training_captions():
    captions = [shapes.draw(task, 0, i).caption for task in shapes.TASKS for i in range(10)]
    prompts = [shapes.prompt(task, 0, i)["prompt"] for task in shapes.TASKS for i in range(10)]
    assert sum(one == other for one, other in zip(captions, prompts, strict=True)) < 10


# -----------------------------------------------------------------------------------------------------------
# what is drawn is what is said


def test_scorer_accepts_true_images_and_rejects_others(images, prompts):
    assert accuracy(images, prompts) >= 0.99
    large = {task: [shapes.render(p, i, 64) for i, p in enumerate(some)] for task, some in prompts.items()}
    assert accuracy(large, prompts) >= 0.99
    soft = {task: [degrade(image) for image in some] for task, some in images.items()}
    assert accuracy(soft, prompts) >= 0.97
    shifted = {task: some[1:] + some[:1] for task, some in images.items()}
    assert accuracy(shifted, prompts) < 0.12


def test_noise_and_grey_hold_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (10, 48, 48, 3)).astype(np.uint8)
    assert sum(len(detect(image)) for image in noise) == 0
    grey = np.full((48, 48, 3), 128, np.uint8)
    assert detect(grey) == [] and read_word(grey) == ""


def test_captions_of_objects_are_true():
    for i in range(80):
        sample = shapes.draw("objects", 4, i)
        assert sample.metadata["prompt"] == sample.caption
        assert score(sample.image, sample.metadata)
        seen = Counter((d.shape, d.color) for d in detect(sample.image))
        assert seen == Counter((thing.shape, thing.color) for thing in sample.objects)


def box(thing):
    x, y, r = thing.x, thing.y, thing.radius
    return Detection(thing.shape, thing.color, (x - r, y - r, x + r, y + r), 1.0)


def test_captions_of_scenes_are_true():
    related = 0
    for i in range(150):
        sample = shapes.draw("scenes", 4, i)
        groups = Counter((thing.color, thing.shape) for thing in sample.objects)
        for (color, shape), count in groups.items():
            plural = shape + ("es" if shape == "cross" else "s")
            name = f"{color} {plural}" if count > 1 else f"{color} {shape}"
            assert f"{shapes.NUMBERS[count]} {name}" in sample.caption or shapes.an(name) in sample.caption
        assert len(groups) == len(re.findall("|".join(shapes.SHAPES), sample.caption))
        for relation in shapes.RELATIONS:
            sentence = rf"{SHAPE}\w* ?(?:,|and) [a-z]+ [a-z]+ {SHAPE}\w* (?:to the )?{relation} (?:it|them)"
            if match := re.search(sentence, sample.caption):
                targets = [box(thing) for thing in sample.objects if thing.shape == match[1]]
                things = [box(thing) for thing in sample.objects if thing.shape == match[2]]
                assert all(relation in relative_position(a, b) for a in things for b in targets)
                related += len(things) * len(targets)
    assert related > 20


@pytest.mark.parametrize("domain", ["objects", "scenes"])
def test_answers_are_true_and_balanced(domain):
    counts = Counter()
    for i in range(300):
        sample = shapes.draw(domain, 5, i)
        for question, answer in sample.questions:
            assert answer == true_answer(question, sample), question
            assert not held_out_in(question)
            counts[question[:8], answer] += 1
    for start in {start for start, answer in counts if answer == "no"} - {"is the b"}:
        assert 0.4 < counts[start, "yes"] / (counts[start, "yes"] + counts[start, "no"]) < 0.6


def true_answer(question, sample):
    """Derived from the objects and, for backgrounds, from the caption."""
    shape = next((shape for shape in shapes.SHAPES if shape in question), None)
    things = [thing for thing in sample.objects if thing.shape == shape]
    texture = next((texture for texture in shapes.TEXTURES if texture in sample.caption), None)
    if question.startswith("Describe"):
        return sample.caption
    if question.startswith("Does"):
        return "yes" if is_aligned(question, sample.objects) else "no"
    if question.startswith("how many"):
        return shapes.NUMBERS[len(things)]
    if question.startswith("what color"):
        return things[0].color
    if question.startswith("is there"):
        return "yes" if things else "no"
    if question.startswith("is the background"):
        return "yes" if texture in question else "no"
    if question.startswith("what is the background"):
        return texture
    relation = next(relation for relation in shapes.RELATIONS if relation in question)
    other = next(thing for thing in sample.objects if thing.shape != shape)
    return shapes.an(other.shape) if relation in relative_position(box(other), box(things[0])) else None


def is_aligned(sentence, objects):
    """Whether exactly the objects of a caption are there, and the first is in the relation to the second."""
    pattern = rf"(one|two|three|four|an?) (?:({'|'.join(shapes.COLORS)}) )?({'|'.join(shapes.SHAPES)})"
    groups = []
    for number, color, shape in re.findall(pattern, sentence):
        group = [thing for thing in objects if thing.shape == shape and color in ("", thing.color)]
        if len(group) != (shapes.NUMBERS.index(number) if number in shapes.NUMBERS else 1):
            return False
        groups.append(group)
    relation = next((relation for relation in shapes.RELATIONS if relation in sentence), None)
    return relation is None or relation in relative_position(box(groups[0][0]), box(groups[1][0]))


def test_questions_are_worded_as_the_verifiers_ask_them(parts, monkeypatch):
    (align, _), (describe, _), *_ = shapes.draw("objects", 5, 0).questions
    model, asked = rae.TextToImage.from_pretrained(parts / "t2i").eval(), []
    encode = model.encode_chat
    monkeypatch.setattr(model, "encode_chat", lambda turns: asked.append(turns) or encode(turns))
    rae.verify(model, align.split(": ", 1)[1][:-1], torch.zeros(1, *model.read_shape))
    assert asked == [[("user", f"<image>\n{question}")] for question in (align, describe)]


@pytest.mark.parametrize("size", [48, 64])
def test_words_are_read_back(size):
    samples = [shapes.draw("text", 6, i, size) for i in range(50)]
    assert all(f'"{sample.word}"' in sample.caption for sample in samples)
    assert np.mean([read_word(sample.image) == sample.word for sample in samples]) >= 0.97
    assert np.mean([read_word(degrade(sample.image)) == sample.word for sample in samples]) >= 0.95
    for sample in samples:
        answers = dict(sample.questions)
        assert answers.get("what does it say?", sample.word) == sample.word
        count = shapes.NUMBERS[len(sample.word)]
        assert answers.get("how many letters are there?", count) == count


# -----------------------------------------------------------------------------------------------------------
# GenEval's rules


def test_overall_is_the_mean_of_tasks():
    results = {task: [True] for task in shapes.TASKS} | {"counting": [False] * 9 + [True]}
    assert overall(results)["overall"] == pytest.approx(5.1 / 6)
    with pytest.raises(ValueError, match="counting"):
        overall(results | {"counting": []})


# -----------------------------------------------------------------------------------------------------------
# nano/evaluate.py


def run(monkeypatch, tmp_path, *flags):
    flags = ["--limit", 2, "--steps", 1, "--out", tmp_path / "results.json", *flags]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    return {r["metric"]: r for r in json.loads((tmp_path / "results.json").read_text())["results"]}


def test_shapes_has_floor_and_ceiling(parts, tmp_path, monkeypatch, capsys):
    results = run(monkeypatch, tmp_path, "--model", parts / "t2i", "--images", 1)
    assert results["shapes/true/overall"]["value"] == 1.0 and results["shapes/true/overall"]["n"] == 12
    assert results["shapes/model/words"]["n"] == 2
    columns, rows = ("model", "true", "decoded", "shuffled"), (*shapes.TASKS, "overall", "held-out colors")
    assert {f"shapes/{column}/{row}" for column in columns for row in rows} < set(results)
    assert "held-out colors" in capsys.readouterr().out


def test_a_model_that_is_not_finite_is_not_scored(parts, tmp_path, monkeypatch):
    model = rae.TextToImage.from_pretrained(parts / "t2i")
    torch.nn.init.constant_(model.dit.final_layer.linear.weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    for what in ("shapes", "scaling"):
        with pytest.raises(ValueError, match="the model's result is not finite"):
            run(monkeypatch, tmp_path, what, "--model", tmp_path / "model")
    assert not (tmp_path / "results.json").exists()


def test_scaling_lies_between_chance_and_scorer(parts, tmp_path, monkeypatch):
    # an untrained model is never right
    monkeypatch.setattr(evaluate.scorer, "score", lambda image, _: int(image.astype(int).sum()) % 3 == 0)
    flags = ["scaling", "--model", parts / "t2i", "--candidates", 8, "--seeds", 2]
    results = run(monkeypatch, tmp_path, *flags)
    values = {name: results[f"best 4 of 8/{name}"]["value"] for name in (*rae.VERIFIERS, "chance", "scorer")}
    assert values["chance"] < values["scorer"] and max(values.values()) == values["scorer"]
    for name in values:  # all are kept
        assert results[f"best 4 of 4/{name}"]["value"] == results["best 4 of 4/scorer"]["value"]
    counts = [results[f"best 4 of 8/{name}"]["n"] for name in ("chance", "scorer")]
    assert counts == [6 * 2 * 8 * 2, 6 * 2 * 4 * 2] and "best 4 of 16/chance" not in results


def test_questions_are_grouped_by_kind(parts, tmp_path, monkeypatch):
    def answer(model, latents, question, max_tokens):
        assert latents.shape == model.read_shape and question.endswith("?")
        return "one"

    monkeypatch.setattr(rae.TextToImage, "answer", answer)
    results = run(monkeypatch, tmp_path, "questions", "--model", parts / "t2i")
    kinds = {name.split("/")[2] for name in results}
    assert kinds == {"does this", "how many", "what color", "is there", "what is", "all"}
    counted, everything = results["questions/model/how many"], results["questions/model/all"]
    assert 0 < counted["value"] == results["questions/most frequent/how many"]["value"] < 1
    assert everything["value"] * everything["n"] == pytest.approx(counted["value"] * counted["n"])


def test_changes_of_a_prompt_move_the_condition(parts, tmp_path, monkeypatch):
    changed = {}
    for name, (task, change) in evaluate.CHANGES.items():
        request = shapes.prompt(task, 5, 0)
        before, after = (shapes.caption(shapes.Chance(5), asked) for asked in (request, change(request)))
        changed[name] = (before, after)
    before, after = changed["swapped colors"]
    assert before != after and sorted(before.replace("an ", "a ")) == sorted(after.replace("an ", "a "))
    for name, words in (("reversed relation", shapes.RELATIONS), ("other count", ("two", "three", "four"))):
        said = [[word for word in words if word in text] for text in changed[name]]
        assert len(said[0]) == len(said[1]) == 1 and said[0] != said[1]

    def condition(model, prompts):  # knows the colors' order, but neither relations nor numbers
        named = [[word for word in prompt.split() if word in shapes.COLORS] for prompt in prompts]
        ranks = [[words.index(c) + 1 if c in words else 0 for c in shapes.COLORS] for words in named]
        return torch.tensor(ranks).float()[:, None]

    monkeypatch.setattr(rae.TextToImage, "condition", condition)
    results = run(monkeypatch, tmp_path, "binding", "--model", parts / "t2i")
    assert results["binding/model/swapped colors"]["value"] > 0.1
    assert results["binding/model/reversed relation"]["value"] == 0
