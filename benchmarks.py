"""The papers' benchmarks that compare with other work, called by eval.py: GenEval, CLIPScore and DPG-Bench of
images, and MME, TextVQA, AI2D, SEED, MMMU and MMMU-Pro of answers to questions about images.

Rules and arithmetic are those of the official scorers: a results file of theirs and one of ours sum up to the
same numbers. Networks are the same ones through `transformers`, without mmdetection.
"""

import ast
import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data

# -----------------------------------------------------------------------------------------------------------
# GenEval (arXiv 2310.11513): are the objects of the prompt there, as many, of the colours, and where it says

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's score
MOST = 16  # objects of a class
MARGIN = 0.1  # of both objects' sizes, by which one has to be beside the other
QUERIES = 100  # detections of an image, before the threshold
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
GREY = "#999999"  # around an object whose colour is asked for
NAMES = (  # of COCO's 80 classes in their order, as GenEval's prompts have them
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
    "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, "
    "zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports "
    "ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine "
    "glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot "
    "dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")


class Found(NamedTuple):
    """A detected object."""

    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: np.ndarray | None = None  # (H, W) bool


def position(one: Found, other: Found) -> set[str]:
    """Where `one` is, seen from the other: of left of, right of, above and below up to two."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = one.box, other.box
    offset = np.array([x0 + x1 - u0 - u1, y0 + y1 - v0 - v1]) / 2
    sizes = np.abs([x1 - x0 + 0.0, y1 - y0]) + np.abs([u1 - u0 + 0.0, v1 - v0])
    beyond = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    across, down = beyond / np.linalg.norm(offset)
    named = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in named.items() if holds}


def judge(wanted: dict, found: dict[str, list[Found]], colors_of) -> tuple[bool, list[str]]:
    """Whether an image is right for a line of GenEval's prompts, and every reason why not.

    wanted: its `include` and `exclude`; found: detections by class, the best first; colors_of(objects, name):
    the colour of each.
    """
    reasons, groups = [], []
    for part in wanted.get("include", []):
        name, count = part["class"], part["count"]
        objects, right = found.get(name, [])[:count], True
        if len(objects) < count:
            right = False
            reasons.append(f"expected {name}>={count}, found {len(objects)}")
        else:
            if "color" in part:
                colors = colors_of(objects, name)
                if colors.count(part["color"]) < count:
                    right = False
                    shown = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
                    reasons.append(f"expected {part['color']} {name}>={count}, found {shown}")
            if right and "position" in part:
                relation, target = part["position"]
                if groups[target] is None:
                    right = False
                    reasons.append(f"no target for {name} to be {relation}")
                elif any(relation not in position(a, b) for a in objects for b in groups[target]):
                    right = False
                    reasons.append(f"expected {name} {relation} target")
        groups.append(objects if right else None)
    for part in wanted.get("exclude", []):
        if (count := len(found.get(part["class"], []))) >= part["count"]:
            reasons.append(f"expected {part['class']}<{part['count']}, found {count}")
    return not reasons, reasons


def confident(found: dict[str, list[Found]], tag: str) -> dict[str, list[Found]]:
    """The detections that count for a task, the best first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ranked = {name: sorted(objects, key=lambda o: -o.score)[:MOST] for name, objects in found.items()}
    ranked = {name: [o for o in objects if o.score > least] for name, objects in ranked.items()}
    return {name: objects for name, objects in ranked.items() if objects}


class Detector:
    """Mask2Former on one image at a time: instances by class name."""

    def __init__(self, source: str, device: torch.device):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        size = {"shortest_edge": 800, "longest_edge": 1333}
        self.processor = AutoImageProcessor.from_pretrained(source, size=size)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(source).float().eval().to(device)
        labels = [name for _, name in sorted(self.model.config.id2label.items())]
        self.names = NAMES if len(labels) == len(NAMES) else labels  # files spell some of them in other ways

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Found]]:
        """Scores are the class's probability times the mean of the mask's over its own pixels, boxes those of
        masks, as mmdetection has them."""
        given = self.processor(image, return_tensors="pt").to(self.model.device)
        out = self.model(given["pixel_values"], pixel_mask=given["pixel_mask"])
        height, width = (
            int(given["pixel_mask"][0].any(dim=axis).sum()) for axis in (1, 0)
        )  # without padding
        chances = out.class_queries_logits[0].softmax(dim=-1)[:, :-1].flatten()
        chances, index = chances.topk(min(QUERIES, len(chances)))
        masks = out.masks_queries_logits[0, index // len(self.names)][None]
        masks = F.interpolate(masks, given["pixel_values"].shape[-2:], mode="bilinear")[..., :height, :width]
        masks = F.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
        inside = masks > 0
        area = inside.flatten(1).sum(dim=1)
        scores = chances * (masks.sigmoid() * inside).flatten(1).sum(dim=1) / area.clamp(min=1)
        found = defaultdict(list)
        for i, label in enumerate((index % len(self.names)).tolist()):
            if scores[i] <= THRESHOLD or not area[i]:
                continue
            rows, columns = (inside[i].any(dim=axis).nonzero().flatten() for axis in (1, 0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            object_ = Found(scores[i].item(), tuple(float(x) for x in box), inside[i].cpu().numpy())
            found[self.names[label]].append(object_)
        return {name: sorted(objects, key=lambda o: -o.score) for name, objects in found.items()}


class Clip:
    """Embeddings of CLIP, normalised."""

    def __init__(self, source: str, device: torch.device):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(source)
        self.model = CLIPModel.from_pretrained(source).float().eval().to(device)
        self.classes: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        out = self.model.get_image_features(
            **self.processor(images=images, return_tensors="pt").to(self.model.device)
        )
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)  # `transformers` 5 wraps it

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        given = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        out = self.model.get_text_features(**given.to(self.model.device))
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)

    def scores(self, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
        """CLIPScore (arXiv 2104.08718) of each image and text, from 0 to 100: (B,)."""
        return 100 * (self.images(images) * self.texts(texts)).sum(dim=-1).clamp(min=0)

    def colors(self, image: Image.Image, objects: list[Found], name: str) -> list[str]:
        """The colour of each object, of its pixels on grey."""
        if name not in self.classes:
            of_color = [[t.format(color=color, name=name) for t in TEMPLATES] for color in COLORS]
            means = torch.stack([self.texts(texts).mean(dim=0) for texts in of_color])
            self.classes[name] = F.normalize(means, dim=-1)
        crops = []
        for found in objects:
            shown = image
            if found.mask is not None:
                shown = Image.composite(
                    image, Image.new("RGB", image.size, GREY), Image.fromarray(found.mask)
                )
            crops.append(shown.crop(tuple(map(round, found.box))))
        return [COLORS[i] for i in (self.images(crops) @ self.classes[name].T).argmax(dim=-1).tolist()]


def geneval_images(folder: Path) -> list[tuple[Path, dict]]:
    """The images of a folder in GenEval's layout, each with the line of its prompt: NUMBER/metadata.jsonl
    beside NUMBER/samples/NUMBER.png. Raises ValueError for any other."""
    found = []
    for prompt in sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()):
        try:
            wanted = json.loads((prompt / "metadata.jsonl").read_text().splitlines()[0])
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{prompt}/metadata.jsonl cannot be read: {error}") from None
        if not (isinstance(wanted, dict) and {"tag", "prompt", "include"} <= wanted.keys()):
            raise ValueError(
                f"{prompt}/metadata.jsonl is no line of GenEval's: it needs tag, prompt, include"
            )
        images = sorted(path for path in (prompt / "samples").glob("*.png") if path.stem.isdigit())
        if not images:
            raise ValueError(f"{prompt} has a prompt, but no images in samples/")
        found += [(path, wanted) for path in images]
    counts = Counter(path.parent.parent for path, _ in found)
    if len(set(counts.values())) > 1:
        most, least = (counts.most_common()[place] for place in (0, -1))
        raise ValueError(
            f"{most[0]} has {most[1]} images, {least[0]} has {least[1]}: draw into an empty folder"
        )
    if not found:
        raise ValueError(
            f"{folder} is not in GenEval's layout: 00000/metadata.jsonl, 00000/samples/0000.png, ..."
        )
    return found


def score_geneval(path: Path, wanted: dict, detector: Detector, clip: Clip) -> dict:
    """A row of the results, with the keys of the official file."""
    image = data.open_image(str(path)).convert("RGB")
    asked = {part["class"] for part in [*wanted["include"], *wanted.get("exclude", [])]}
    if unknown := asked - set(detector.names):
        raise ValueError(f"{path} is asked for a {min(unknown)}, which the detector does not know")
    found = confident(detector(image), wanted["tag"])
    right, reasons = judge(wanted, found, lambda objects, name: clip.colors(image, objects, name))
    details = {
        name: [[round(x, 2) for x in (*o.box, o.score)] for o in objects] for name, objects in found.items()
    }
    return {
        "filename": str(path),
        "tag": wanted["tag"],
        "prompt": wanted["prompt"],
        "correct": right,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(wanted),
        "details": json.dumps(details),
    }


def geneval_summary(rows: Iterable[dict]) -> dict[str, tuple[float, int]]:
    """Value and number of each figure, of rows of a results file: the share of right images of every task,
    `overall`, the mean of the tasks, and the shares of right images and of prompts with a right one."""
    tasks, prompts = defaultdict(list), defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(row["correct"])
        prompts[row["metadata"]].append(row["correct"])
    every = [correct for task in tasks.values() for correct in task]
    figures = {tag: (float(np.mean(task)), len(task)) for tag, task in sorted(tasks.items())}
    figures["overall"] = float(np.mean([value for value, _ in figures.values()])), len(every)
    figures["images"] = float(np.mean(every)), len(every)
    figures["prompts"] = float(np.mean([any(each) for each in prompts.values()])), len(prompts)
    return figures


# -----------------------------------------------------------------------------------------------------------
# DPG-Bench (arXiv 2403.05135): questions about dense prompts, of which some make sense only after others


class Question(NamedTuple):
    """A row of DPG-Bench's table."""

    text: str
    parents: tuple[int, ...]  # questions that must be answered with yes before this one counts
    category: str  # entity, attribute, relation, ...
    detail: str  # and a finer one


def read_dpg(path: str) -> dict[str, dict[int, Question]]:
    """Questions by number, by item. Raises ValueError for a table without the official columns."""
    items, columns = defaultdict(dict), ("item_id", "proposition_id", "dependency", "category_broad")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                parents = tuple(int(parent) for parent in row["dependency"].split(",") if int(parent))
                items[row["item_id"]][int(row["proposition_id"])] = Question(
                    row["question_natural_language"], parents, row["category_broad"], row["category_detailed"]
                )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of DPG-Bench, with {', '.join(columns)}, ...: {error!r}"
        ) from None
    return dict(items)


def filtered(answers: dict[int, bool], questions: dict[int, Question]) -> dict[int, bool]:
    """Yes only where all parents have stayed a yes, in the order of the table: what hangs on a no falls with
    it, and what hangs on that."""
    kept = dict(answers)
    for number in answers:
        kept[number] = kept[number] and all(kept[parent] for parent in questions[number].parents)
    return kept


def dpg_summary(rows: list[dict], items: dict[str, dict[int, Question]]) -> dict[str, tuple[float, int]]:
    """Value, in percent, and number of each figure: `overall`, the mean over items of the mean over their
    images of the mean over questions; and of each category the mean over all questions of all images,
    as they were answered (the official script, by mistake, takes those of the last image)."""
    images, categories = defaultdict(list), defaultdict(list)
    for row in rows:
        questions = items[row["item_id"]]
        answers = {int(n): yes for n, yes in row["answers"].items()}
        images[row["item_id"]].append(np.mean(list(filtered(answers, questions).values())))
        for number, yes in answers.items():
            question = questions[number]
            for name in (question.category, f"{question.category} - {question.detail}"):
                categories[name].append(yes)
    figures = {name: (100 * float(np.mean(each)), len(each)) for name, each in sorted(categories.items())}
    overall = np.mean([np.mean(each) for each in images.values()])
    return figures | {"overall": (100 * float(overall), len(images))}


def dpg_images(folder: Path, items: dict, side: int = 2) -> list[tuple[Path, int]]:
    """The squares of every grid ITEM.png, side x side images. Raises ValueError for missing ones."""
    paths = [folder / f"{item}.png" for item in items]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{len(missing)} of {len(paths)} grids are missing, the first is {missing[0]}")
    return [(path, square) for path in paths for square in range(side * side)]


def square_of(grid: Image.Image, number: int, side: int = 2) -> Image.Image:
    row, column = divmod(number, side)
    width, height = grid.width // side, grid.height // side
    return grid.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


class Answerer:
    """A visual question answering model: BLIP and its like, or one with a chat template."""

    def __init__(self, source: str, device: torch.device):
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoModelForVisualQuestionAnswering,
            AutoProcessor,
        )

        mapping = AutoModelForVisualQuestionAnswering._model_mapping
        self.talks = type(AutoConfig.from_pretrained(source)) not in mapping
        kind = AutoModelForImageTextToText if self.talks else AutoModelForVisualQuestionAnswering
        self.model = kind.from_pretrained(source).float().eval().to(device)
        self.processor = AutoProcessor.from_pretrained(source)

    @torch.no_grad()
    def __call__(self, image: Image.Image, question: str) -> str:
        """A short answer, greedy."""
        text = question
        if self.talks:
            content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer with one word."}]
            turns = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        given = self.processor(images=image, text=text, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**given, max_new_tokens=10, do_sample=False)
        out = out[:, given["input_ids"].shape[1] :] if self.talks else out
        return self.processor.decode(out[0], skip_special_tokens=True).strip()


def score_dpg(path: Path, square: int, questions: dict[int, Question], answerer: Answerer) -> dict:
    """A row of the results: which questions about an image are answered with yes."""
    image = square_of(data.open_image(str(path)).convert("RGB"), square)
    yes = {n: answerer(image, question.text).lower().startswith("yes") for n, question in questions.items()}
    return {"item_id": path.stem, "square": square, "answers": yes}


# -----------------------------------------------------------------------------------------------------------
# understanding: questions about images, with the prompts that the LLaVA line of work asks them with

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"
PERCEPTION = tuple(
    "existence count position color posters celebrity scene landmark artwork OCR".split()
)  # of MME's categories; the others are cognition


class Item(NamedTuple):
    """One question."""

    image: Image.Image
    question: str
    truth: list[str]  # a letter, or words: of TextVQA ten people's
    group: str = ""  # MME's category and image, two questions each


def with_options(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ONE_LETTER])


def of_mme(row: dict) -> Item:
    return Item(row["image"], row["question"], [row["answer"]], f"{row['category']}/{row['question_id']}")


def of_textvqa(row: dict) -> Item:
    return Item(row["image"], f"{row['question'].capitalize()}\n{ONE_WORD}", row["answers"])


def of_ai2d(row: dict) -> Item:
    return Item(row["image"], with_options(row["question"], row["options"]), [LETTERS[int(row["answer"])]])


def of_seed(row: dict) -> Item:
    image = row["image"][0] if isinstance(row["image"], list) else row["image"]
    options = [row[f"choice_{letter}"] for letter in "abcd"]
    return Item(image, with_options(row["question"], options), [row["answer"]])


def of_mmmu(row: dict) -> Item:
    """Of several images the first; where they belong in the text is left out. MMMU's own scorer looks for
    the option in longer answers too, and guesses where there is none."""
    question = re.sub(r"\s*<image \d+>\s*", " ", row["question"]).strip()
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else row["options"]
    image = row.get("image_1") or row["image"]
    if not options:
        truth = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        return Item(image, f"{question}\n{ONE_WORD}", truth)
    return Item(image, with_options(question, options), [row["answer"]])


class Asked(NamedTuple):
    """A set of questions: where its rows are on the hub, how one is read, and how answers are scored."""

    path: str
    split: str
    read: Callable[[dict], Item]
    score: Callable[[str, Item], float]
    only: tuple[str, tuple[str, ...]] | None = None  # a column, and its values of the rows that are asked
    configs: tuple[str, ...] | None = None  # None: the only one; (): all


def plain(text: str) -> str:
    """As the VQA challenge compares answers: lower case, without articles and most punctuation, numbers as
    digits, apostrophes where they belong."""
    text = re.sub(r"[\n\t]", " ", text).strip().lower()
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        spaced = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        text = text.replace(mark, "" if spaced else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (DIGITS.get(word, word) for word in text.split() if word not in ("a", "an", "the"))
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


DIGITS = {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
DIGITS["none"] = "0"
CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't how'd how'll "
        "how's isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock "
        "oughtn't shan't she'd've should've shouldn't somebody'd somebody's someone'd someone'll "
        "someone's something'd something'll that's there'd there're there's they'd they'll they're "
        "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's "
        "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
        "you'll you're you've "
    ).split()
}


def soft_accuracy(answer: str, item: Item) -> float:
    """VQA's: the mean, over the ten people with one left out, of min(1, those who said the same / 3)."""
    said, truth = plain(answer), [plain(each) for each in item.truth]
    same = [said == each for each in truth]
    return float(np.mean([min(1, (sum(same) - left) / 3) for left in same]))


def letter_of(answer: str) -> str:
    """The option that an answer names: "B", "B.", "(B) a cat"; "" for none."""
    found = re.match(r"\s*\(?([A-J])(?:[).:,\s]|$)", answer)
    return found[1] if found else ""


def exact(answer: str, item: Item) -> float:
    """Of the letter where that is the answer, else of the words."""
    if len(item.truth) == 1 and re.fullmatch("[A-J]", item.truth[0]):
        return float(letter_of(answer) == item.truth[0])
    return float(plain(answer) in [plain(each) for each in item.truth])


def yes_or_no(answer: str, item: Item) -> float:
    """Of the first word."""
    word = re.match(r"\W*(yes|no)\b", answer.lower())
    return float(bool(word) and word[1] == item.truth[0].lower())


ASKED = {
    "mme": Asked("lmms-lab/MME", "test", of_mme, yes_or_no, ("category", PERCEPTION)),
    "textvqa": Asked("lmms-lab/textvqa", "validation", of_textvqa, soft_accuracy),
    "ai2d": Asked("lmms-lab/ai2d", "test", of_ai2d, exact),
    "seed": Asked("lmms-lab/SEED-Bench", "test", of_seed, exact, ("data_type", ("image",))),
    "mmmu": Asked("MMMU/MMMU", "validation", of_mmmu, exact, None, ()),
    "mmmu-pro": Asked("MMMU/MMMU_Pro", "test", of_mmmu, exact, None, ("standard (10 options)",)),
}


def open_asked(name: str, local: str) -> list:
    """The tables of a set: of the hub, or the parquet files of LOCAL/NAME. Raises ValueError without them."""
    import datasets

    asked = ASKED[name]
    if local:
        files = sorted(str(file) for file in (Path(local) / name).rglob("*.parquet"))
        if not files:
            raise ValueError(f"{Path(local) / name} has no .parquet files with the columns of {asked.path}")
        return [datasets.load_dataset("parquet", data_files=files, split="train")]
    if asked.configs is None:
        return [datasets.load_dataset(asked.path, split=asked.split)]
    configs = asked.configs or datasets.get_dataset_config_names(asked.path)
    return [datasets.load_dataset(asked.path, config, split=asked.split) for config in configs]


def asked_rows(name: str, table) -> list[int]:
    """The rows of a table that are asked; no image is decoded to find them."""
    column, values = ASKED[name].only or (None, ())
    return (
        [i for i, value in enumerate(table[column]) if value in values] if column else list(range(len(table)))
    )


def understanding_summary(name: str, rows: list[dict]) -> tuple[float, int]:
    """In percent the mean of all answers; of MME the sum over its categories of the accuracy of the
    questions and of that of the images, both of whose two have to be right: 2000 at most."""
    if name != "mme":
        return 100 * float(np.mean([row["score"] for row in rows])), len(rows)
    images = defaultdict(lambda: defaultdict(list))
    for row in rows:
        category, _, image = row["group"].partition("/")
        images[category][image].append(row["score"])
    total = 0.0
    for each in images.values():
        questions = [score for scores in each.values() for score in scores]
        total += 100 * (np.mean(questions) + np.mean([min(scores) for scores in each.values()]))
    return float(total), len(rows)
