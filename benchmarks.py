"""Benchmarks that compare with other work, run by eval.py: GenEval, DPG-Bench and CLIPScore of generated
images, and MME, TextVQA, AI2D, SEED, MMMU and MMMU-Pro of answers to questions about images.

Rules and arithmetic are those of the official scorers, except where the list says so. The networks are the
same too, through `transformers`.

geneval: --samples is a folder in GenEval's layout, as sample.py --file evaluation_metadata.jsonl draws it.
No mmdetection is needed. For three models that others scored both ways (nanogen-evals), the overall differs
by up to 0.010.
dpg: --samples is a folder of 2 x 2 grids ITEM.png, as sample.py --file FOLDER draws them for the official
prompts. A BLIP or another visual question answering model of `transformers` works, but only scores by mPLUG
are comparable with published ones. The official script drops the first row of its table, and takes categories
from the last image of an item only; all of them count here.
clipscore: --samples is a folder of PNGs with their prompt in the metadata, as sample.py writes it.
understanding asks --model itself. An image is squeezed into a square; of several images the first is shown.

- MME: sum of the official accuracies, of perception only. The question ends with the one-word instruction.
- TextVQA: the answer processor and the soft accuracy of M4C's evaluator, without OCR tokens in the question.
- MMMU, MMMU-Pro: the parsing of free answers of MMMU-Pro's scorer and of lmms-eval, but an answer that names
  no option counts as wrong. The official scorers guess one at random.
- AI2D, SEED: letters by the rule of `option_letter`. There is no one official rule; other evaluations compare
  the first letter, or the likelihood of each option.

All but clipscore append one row per image or question to OUT-NAME.jsonl, and never score a row twice.
"""

import ast
import contextlib
import csv
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
import data
import rae

# -----------------------------------------------------------------------------------------------------------
# rows: one for each image or question, in a file from which a stopped run resumes


def read_scored(path: Path, fields: tuple[str, ...], networks: dict[str, str]) -> dict[tuple, dict]:
    """Rows of a file by the values of `fields`. Raises ValueError for rows scored with other networks."""
    scored = {}
    for row in common.read_rows(path, fields[0]) if path.exists() else []:
        for flag, source in networks.items():
            if row.get(flag) != source:
                was = f"{flag} {row.get(flag)}, not {source}"
                raise ValueError(f"{path} has rows scored with {was}: choose another --out")
        scored[tuple(row[field] for field in fields)] = row
    return scored


def score_all(
    name: str,
    fields: tuple[str, ...],
    jobs: dict[tuple, tuple],
    networks: dict[str, str],
    open_scorer: Callable[[], Callable[..., dict]],
    config,
    dist_ctx: common.DistContext,
) -> list[dict]:
    """A row for each job, kept in OUT-NAME.jsonl. Each process scores its part of the missing rows.

    fields, jobs: names of the values that identify a row, and {values: arguments of the scorer}.
    networks: what the scores depend on; kept in every row.
    open_scorer: loads the networks and returns the function that scores; called only if a row is missing.
    """
    path = Path(config.out).with_name(f"{Path(config.out).stem}-{name}.jsonl")
    scored = read_scored(path, fields, networks)
    if dist_ctx.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            # a killed run may have left half a line: the next row must not be appended to it
            if path.read_bytes()[-1:] not in (b"", b"\n"):
                file.write(b"\n")
    common.global_sum(0)  # a barrier: all have read before one writes
    missing = [item for item in jobs.items() if item[0] not in scored]
    missing = missing[dist_ctx.rank :: dist_ctx.world_size]
    if missing:
        score = open_scorer()
        with path.open("a") as file:
            for key, arguments in tqdm(missing, desc=name, disable=not dist_ctx.is_main):
                row = score(*arguments) | dict(zip(fields, key, strict=True)) | networks
                # whole lines only, because all processes append to one file
                file.write(json.dumps(row) + "\n")
                file.flush()
    common.global_sum(0)
    # file systems over a network may lose appends of several machines
    scored = read_scored(path, fields, networks)
    if lost := [key for key in jobs if key not in scored]:
        raise ValueError(f"{path} has lost {len(lost)} rows, such as {lost[0]}: run this again")
    return [scored[key] for key in jobs]


def digest(path: Path) -> str:
    """Identifies the content of a file: a new image may take the place of one that was scored."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def samples_folder(config, name: str) -> Path:
    if not config.samples:
        raise ValueError(f"{name} needs --samples, a folder of images from sample.py: see benchmarks.py")
    return Path(config.samples)


def as_results(name: str, figures: dict[str, tuple[float, int]]) -> list[dict]:
    return [{"metric": f"{name}/{key}", "value": value, "n": n} for key, (value, n) in figures.items()]


# -----------------------------------------------------------------------------------------------------------
# GenEval (arXiv 2310.11513): are the objects of the prompt there, in number, colour and position

# the official evaluate_images.py's numbers
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # lowest score of a detection
MAX_OBJECTS = 16  # per class
POSITION_MARGIN = 0.1  # distance beyond which one object is beside another, in units of their sizes
QUERIES = 100  # detections per image, before the threshold
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}")
COLOR_PROMPTS += ("a photo of a {color} object",)
GREY = "#999999"  # background of an object whose colour is classified
CLASSES = (  # COCO's 80 in their order, spelled as in GenEval's prompts
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
    "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, "
    "zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports "
    "ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine "
    "glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot "
    "dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")


class Detection(NamedTuple):
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    mask: np.ndarray | None = None  # (H, W) bool


def relative_position(one: Detection, other: Detection) -> set[str]:
    """Where `one` is as seen from the other: up to two of left of, right of, above and below."""
    (x0, y0, x1, y1), (u0, v0, u1, v1) = one.box, other.box
    # between the centres, and without the margin within which neither is beside the other
    offset = np.array([x0 + x1 - u0 - u1, y0 + y1 - v0 - v1]) / 2
    sizes = np.abs([x1 - x0 + 0.0, y1 - y0]) + np.abs([u1 - u0 + 0.0, v1 - v0])
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    # the official rule divides by the length of the whole offset, so that a pair at 45 degrees is both
    across, down = beyond / np.linalg.norm(offset)
    holds = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, true in holds.items() if true}


def check_objects(entry: dict, objects: list[Detection], classify_colors: Callable) -> str:
    """Why the objects are not those of an entry of `include`, in number and colour; "" if they are."""
    name, count = entry["class"], entry["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    if "color" not in entry:
        return ""
    # as many of the best detections as the prompt names: further cats may have any colour
    colors = classify_colors(objects, name)
    if colors.count(entry["color"]) >= count:
        return ""
    named = dict.fromkeys((*COLORS, *colors))  # in the official order
    present = ", ".join(f"{colors.count(color)} {color}" for color in named if color in colors)
    return f"expected {entry['color']} {name}>={count}, found {present}"


def check_position(entry: dict, objects: list[Detection], targets: list[Detection] | None) -> str:
    """Why the objects are not where the entry says, relative to the targets; "" if they are."""
    relation = entry["position"][0]
    if targets is None:
        return f"no target for {entry['class']} to be {relation}"
    for one in objects:
        for other in targets:
            if relation not in relative_position(one, other):
                return f"expected {entry['class']} {relation} target"
    return ""


def judge(
    metadata: dict, detections: dict[str, list[Detection]], classify_colors: Callable
) -> tuple[bool, list[str]]:
    """Whether an image fulfils a line of GenEval's prompts, and every reason why not.

    metadata: its `include` and `exclude`. detections: by class, best first.
    classify_colors(objects, name): the colour of each object.
    """
    reasons, groups = [], []  # objects of each entry of `include`, None if the entry does not hold
    for entry in metadata.get("include", []):
        objects = detections.get(entry["class"], [])[: entry["count"]]
        reason = check_objects(entry, objects, classify_colors)
        if not reason and "position" in entry:
            reason = check_position(entry, objects, groups[entry["position"][1]])
        groups.append(None if reason else objects)
        if reason:
            reasons.append(reason)
    for entry in metadata.get("exclude", []):
        count = len(detections.get(entry["class"], []))
        if count >= entry["count"]:
            reasons.append(f"expected {entry['class']}<{entry['count']}, found {count}")
    return not reasons, reasons


def confident(detections: dict[str, list[Detection]], tag: str) -> dict[str, list[Detection]]:
    """The detections that count for a task, best first."""
    # counting needs sure detections: a doubtful third cat would fail an image of two
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept = {}
    for name, objects in detections.items():
        best = sorted(objects, key=lambda o: -o.score)[:MAX_OBJECTS]
        if best := [o for o in best if o.score > threshold]:
            kept[name] = best
    return kept


class Detector:
    """Mask2Former on one image at a time: detections by class name."""

    def __init__(self, source: str, device: torch.device):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        size = {"shortest_edge": 800, "longest_edge": 1333}
        self.processor = AutoImageProcessor.from_pretrained(source, size=size, trust_remote_code=False)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(source).float().eval().to(device)
        labels = [name for _, name in sorted(self.model.config.id2label.items())]
        # COCO's files spell some names otherwise ("mouse"), prompts and detector must agree
        self.names = CLASSES if len(labels) == len(CLASSES) else labels

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """As mmdetection does: a score is the class probability times the mean mask probability inside the
        mask, and boxes are those of the masks."""
        inputs = self.processor(image, return_tensors="pt").to(self.model.device)
        out = self.model(inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
        # the processor pads on the right and below, which masks must not cover
        height = int(inputs["pixel_mask"][0].any(dim=1).sum())
        width = int(inputs["pixel_mask"][0].any(dim=0).sum())

        # ---- the most probable (query, class) pairs; the last class is "no object" ----
        probabilities = out.class_queries_logits[0].softmax(dim=-1)[:, :-1].flatten()
        probabilities, index = probabilities.topk(min(QUERIES, len(probabilities)))

        # ---- their masks, at the size of the image ------------------------------------
        masks = out.masks_queries_logits[0, index // len(self.names)][None]
        masks = F.interpolate(masks, inputs["pixel_values"].shape[-2:], mode="bilinear")
        masks = masks[..., :height, :width]
        masks = F.interpolate(masks, (image.height, image.width), mode="bilinear")[0]
        inside = masks > 0
        area = inside.flatten(1).sum(dim=1)
        scores = probabilities * (masks.sigmoid() * inside).flatten(1).sum(dim=1) / area.clamp(min=1)

        detections = defaultdict(list)
        for i, label in enumerate((index % len(self.names)).tolist()):
            if scores[i] <= THRESHOLD or not area[i]:
                continue
            rows = inside[i].any(dim=1).nonzero().flatten()
            columns = inside[i].any(dim=0).nonzero().flatten()
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            detection = Detection(scores[i].item(), tuple(map(float, box)), inside[i].cpu().numpy())
            detections[self.names[label]].append(detection)
        return {name: sorted(objects, key=lambda o: -o.score) for name, objects in detections.items()}


class Clip:
    """Normalised embeddings of CLIP, (B, D)."""

    def __init__(self, source: str, device: torch.device):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        self.model = CLIPModel.from_pretrained(source).float().eval().to(device)
        self.color_embeddings: dict[str, Tensor] = {}  # by class name, (10, D)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        out = self.model.get_image_features(**inputs)
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)  # `transformers` 5 wraps the tensor

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        out = self.model.get_text_features(**inputs.to(self.model.device))
        return F.normalize(getattr(out, "pooler_output", out), dim=-1)

    def colors(self, image: Image.Image, objects: list[Detection], name: str) -> list[str]:
        """The colour of each object, classified from its pixels on grey."""
        if name not in self.color_embeddings:
            means = []
            for color in COLORS:
                prompts = [prompt.format(color=color, name=name) for prompt in COLOR_PROMPTS]
                means.append(self.texts(prompts).mean(dim=0))
            self.color_embeddings[name] = F.normalize(torch.stack(means), dim=-1)
        crops = []
        for detection in objects:
            shown = image
            if detection.mask is not None:
                grey = Image.new("RGB", image.size, GREY)
                shown = Image.composite(image, grey, Image.fromarray(detection.mask))
            crops.append(shown.crop(tuple(map(round, detection.box))))
        nearest = (self.images(crops) @ self.color_embeddings[name].T).argmax(dim=-1)
        return [COLORS[i] for i in nearest.tolist()]


def read_geneval(prompt: Path) -> dict:
    """The metadata of one prompt's folder."""
    path = prompt / "metadata.jsonl"
    try:
        # the first JSON value, of one line or indented; utf-8-sig: editors may add a byte order mark
        metadata, _ = json.JSONDecoder().raw_decode(path.read_text("utf-8-sig").lstrip())
        if {"tag", "prompt", "include"} <= metadata.keys():
            return metadata
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    raise ValueError(f"{path} is not GenEval's: it needs tag, prompt and include")


def geneval_images(folder: Path) -> list[tuple[Path, dict]]:
    """Images in GenEval's layout, NUMBER/samples/NUMBER.png, with their prompt's NUMBER/metadata.jsonl."""
    images, counts = [], Counter()
    for prompt in sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()):
        metadata = read_geneval(prompt)
        paths = sorted(path for path in (prompt / "samples").glob("*.png") if path.stem.isdigit())
        counts[prompt] = len(paths)
        images += [(path, metadata) for path in paths]
    if not counts:
        layout = "00000/metadata.jsonl, 00000/samples/0000.png, ..."
        raise ValueError(f"{folder} is not in GenEval's layout: {layout}")
    # of a run of sample.py that was stopped, the last prompts have fewer images: the mean would lean
    (prompt, most), (other, least) = counts.most_common()[0], counts.most_common()[-1]
    if least == 0 or least < most:
        raise ValueError(f"{prompt} has {most} images, {other} has {least}: resume sample.py, or draw anew")
    return images


class GenEvalScorer:
    """Detects the objects in an image, and judges it; returns a row with the keys of the official file."""

    def __init__(self, detector: str, clip: str, device: torch.device):
        with common.loading(detector):
            self.detector = Detector(detector, device)
        with common.loading(clip):
            self.clip = Clip(clip, device)

    def __call__(self, path: Path, metadata: dict) -> dict:
        image = data.open_image(str(path))
        classes = {entry["class"] for entry in [*metadata["include"], *metadata.get("exclude", [])]}
        if unknown := classes - set(self.detector.names):
            raise ValueError(f"{path} should show a {min(unknown)}, which the detector does not know")
        detections = confident(self.detector(image), metadata["tag"])
        correct, reasons = judge(metadata, detections, partial(self.clip.colors, image))
        details = {}
        for name, objects in detections.items():
            details[name] = [[round(x, 2) for x in (*o.box, o.score)] for o in objects]
        row = {"filename": str(path), "tag": metadata["tag"], "prompt": metadata["prompt"]}
        row |= {"correct": correct, "reason": "\n".join(reasons)}
        return row | {"metadata": json.dumps(metadata), "details": json.dumps(details)}


def geneval_summary(rows: list[dict]) -> dict[str, tuple[float, int]]:
    """(value, n) of each figure: the share of correct images of every task; their mean `overall`, of all six
    tasks only; and the shares of correct `images` and of `prompts` with a correct image."""
    tasks, prompts = defaultdict(list), defaultdict(list)
    for row in rows:
        tasks[row["tag"]].append(row["correct"])
        prompts[row["metadata"]].append(row["correct"])
    images = [row["correct"] for row in rows]
    figures = {tag: (float(np.mean(task)), len(task)) for tag, task in sorted(tasks.items())}
    if len(tasks) == 6:
        # the mean of tasks, not of images: the tasks have different numbers of prompts
        figures["overall"] = float(np.mean([value for value, _ in figures.values()])), len(images)
    figures["images"] = float(np.mean(images)), len(images)
    figures["prompts"] = float(np.mean([any(group) for group in prompts.values()])), len(prompts)
    return figures


def geneval(config, dist_ctx: common.DistContext) -> list[dict]:
    """config: eval.Config."""
    jobs = {}
    for path, metadata in geneval_images(samples_folder(config, "geneval"))[: config.limit]:
        jobs[str(path), digest(path)] = (path, metadata)
    networks = {"detector": config.detector, "clip": config.clip}
    scorer = partial(GenEvalScorer, config.detector, config.clip, dist_ctx.device)
    rows = score_all("geneval", ("filename", "digest"), jobs, networks, scorer, config, dist_ctx)
    return as_results("geneval", geneval_summary(rows))


# -----------------------------------------------------------------------------------------------------------
# CLIPScore (arXiv 2104.08718): cosine of image and prompt, from 0 to 100


def clipscore(config, dist_ctx: common.DistContext) -> list[dict]:
    """Mean over a folder of images, each with the prompt in its metadata. config: eval.Config."""
    folder = samples_folder(config, "clipscore")
    texts = {path: data.open_metadata(str(path)) for path in sorted(folder.rglob("*.png"))}
    pairs = [(path, text.get("prompt")) for path, text in texts.items() if "grid_of" not in text]
    pairs = pairs[: config.limit]
    culprit = next((path for path, prompt in pairs if prompt is None), None if pairs else folder)
    if culprit:
        raise ValueError(f"{culprit}: no prompt in the metadata; give images of sample.py")
    with common.loading(config.clip):
        clip = Clip(config.clip, dist_ctx.device)
    count, pairs = len(pairs), pairs[dist_ctx.rank :: dist_ctx.world_size]
    total = 0.0
    for start in tqdm(range(0, len(pairs), config.batch), desc="clipscore", disable=not dist_ctx.is_main):
        batch = pairs[start : start + config.batch]
        images = [data.open_image(str(path)) for path, _ in batch]
        cosines = (clip.images(images) * clip.texts([prompt for _, prompt in batch])).sum(dim=-1)
        total += (100 * cosines.clamp(min=0)).sum().item()
    [total] = common.global_sum(total)
    return [{"metric": f"clipscore/{config.clip}", "value": total / count, "n": count}]


# -----------------------------------------------------------------------------------------------------------
# DPG-Bench (arXiv 2403.05135): questions about dense prompts; some count only if others are answered with yes

GRID = 2  # a grid of GRID x GRID images for each prompt


class Question(NamedTuple):
    """A row of DPG-Bench's table."""

    text: str
    parents: tuple[int, ...]  # questions that must be answered with yes before this one counts
    category: str  # entity, attribute, relation, ...
    detail: str  # a finer category


def read_dpg(path: str) -> dict[str, dict[int, Question]]:
    """Questions by item and number. Raises ValueError for a table without the official columns."""
    items = defaultdict(dict)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                parents = tuple(int(parent) for parent in row["dependency"].split(",") if int(parent))
                items[row["item_id"]][int(row["proposition_id"])] = Question(
                    row["question_natural_language"], parents, row["category_broad"], row["category_detailed"]
                )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        table = "DPG-Bench's table (item_id, proposition_id, ...)"
        raise ValueError(f"{path} is not {table}: {error!r}") from None
    return dict(items)


def propagate(answers: dict[int, bool], questions: dict[int, Question]) -> dict[int, bool]:
    """Turns a yes into a no where a parent is, or has become, a no."""
    kept = dict(answers)
    for number in answers:  # in the order of the table, where parents come first
        kept[number] = kept[number] and all(kept[parent] for parent in questions[number].parents)
    return kept


def dpg_summary(rows: list[dict], items: dict[str, dict[int, Question]]) -> dict[str, tuple[float, int]]:
    """(percentage, n) of each figure. `overall`: mean over items of the mean over images of the mean over
    questions. Categories: mean over all questions of all images, as answered."""
    # the official script, by mistake, takes the categories of the last image of an item only
    images, categories = defaultdict(list), defaultdict(list)
    for row in rows:
        questions = items[row["item_id"]]
        answers = {int(number): yes for number, yes in row["answers"].items()}  # keys of JSON are text
        images[row["item_id"]].append(np.mean(list(propagate(answers, questions).values())))
        for number, yes in answers.items():
            question = questions[number]
            categories[question.category].append(yes)
            categories[f"{question.category} - {question.detail}"].append(yes)
    figures = {name: (100 * float(np.mean(yes)), len(yes)) for name, yes in sorted(categories.items())}
    overall = np.mean([np.mean(values) for values in images.values()])
    return figures | {"overall": (100 * float(overall), len(images))}


def crop_square(grid: Image.Image, number: int) -> Image.Image:
    """Image number 0, 1, ... of a grid, in raster order."""
    row, column = divmod(number, GRID)
    width, height = grid.width // GRID, grid.height // GRID
    return grid.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


class DPGScorer:
    """Asks a visual question answering model, BLIP or its like, about one image of a grid."""

    def __init__(self, vqa: str, items: dict[str, dict[int, Question]], device: torch.device):
        from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

        self.items = items
        with common.loading(vqa):
            options = {"trust_remote_code": False}
            model = AutoModelForVisualQuestionAnswering.from_pretrained(vqa, **options)
            self.model = model.float().eval().to(device)
            self.processor = AutoProcessor.from_pretrained(vqa, **options)

    def __call__(self, path: Path, square: int) -> dict:
        image = crop_square(data.open_image(str(path)), square)
        answers = {}
        for number, question in self.items[path.stem].items():
            answers[number] = self.answer(image, question.text).lower().startswith("yes")
        return {"item_id": path.stem, "square": square, "answers": answers}

    @torch.no_grad()
    def answer(self, image: Image.Image, question: str) -> str:
        """A short answer, greedy."""
        inputs = self.processor(images=image, text=question, return_tensors="pt").to(self.model.device)
        out = self.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        return self.processor.decode(out[0], skip_special_tokens=True).strip()


def dpg(config, dist_ctx: common.DistContext) -> list[dict]:
    """config: eval.Config."""
    folder, items = samples_folder(config, "dpg"), read_dpg(config.questions)
    paths = [folder / f"{item}.png" for item in items]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{len(missing)} of {len(paths)} grids are missing, the first is {missing[0]}")
    images = [(path, square) for path in paths for square in range(GRID * GRID)][: config.limit]
    # an image's content is part of its key: a grid that was drawn again is asked about again
    digests = {path: digest(path) for path in {path for path, _ in images}}
    jobs = {(path.stem, square, digests[path]): (path, square) for path, square in images}
    fields, scorer = ("item_id", "square", "digest"), partial(DPGScorer, config.vqa, items, dist_ctx.device)
    networks = {"vqa": config.vqa, "questions": digest(Path(config.questions))}
    rows = score_all("dpg", fields, jobs, networks, scorer, config, dist_ctx)
    if dist_ctx.is_main and "mplug" not in config.vqa.lower():
        print(f"answered by {config.vqa}: only scores by mPLUG are comparable with published ones")
    return as_results(f"dpg ({config.vqa})", dpg_summary(rows, items))


# -----------------------------------------------------------------------------------------------------------
# understanding: questions about images, worded as in the LLaVA line of work

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"
PERCEPTION = tuple(  # MME's categories of perception; its others are cognition
    "existence count position color posters celebrity scene landmark artwork OCR".split()
)


class Item(NamedTuple):
    """One question."""

    image: dict  # as `datasets` stores it: the bytes of the file, or its path
    question: str
    truth: list[str]  # a letter or words; in TextVQA the answers of ten people
    group: str = ""  # MME's category and image, which has two questions
    options: list[str] = []  # texts of A, B, ...


def with_options(question: str, options: list[str]) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, ONE_LETTER])


def read_mme(row: dict) -> Item:
    question = f"{row['question'].strip()}\n{ONE_WORD}"
    return Item(row["image"], question, [row["answer"]], f"{row['category']}/{row['question_id']}")


def read_textvqa(row: dict) -> Item:
    return Item(row["image"], f"{row['question'].capitalize()}\n{ONE_WORD}", row["answers"])


def read_ai2d(row: dict) -> Item:
    options, truth = row["options"], [LETTERS[int(row["answer"])]]
    return Item(row["image"], with_options(row["question"], options), truth, options=options)


def read_seed(row: dict) -> Item:
    image = row["image"][0] if isinstance(row["image"], list) else row["image"]
    options = [row[f"choice_{letter}"] for letter in "abcd"]
    return Item(image, with_options(row["question"], options), [row["answer"]], options=options)


def read_list(value: str | list) -> list[str]:
    """A list, or a list that is stored as a string; any other string is the only one of its list."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            stored = ast.literal_eval(value)
            value = stored if isinstance(stored, list) else value
    return [str(item) for item in value] if isinstance(value, list) else [value]


def read_mmmu(row: dict) -> Item:
    """With the first of several images; their places in the text are removed."""
    question, *options = [
        re.sub(r"\s*<image \d+>\s*", " ", text).strip()
        for text in [row["question"], *read_list(row["options"] or [])]
    ]
    truth, image = read_list(row["answer"]), row.get("image_1") or row["image"]
    if not options:
        return Item(image, f"{question}\n{ONE_WORD}", truth)
    return Item(image, with_options(question, options), truth, options=options)


# ---- TextVQA: the answer processor of M4C's evaluator

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTIONS = {"somebody'd": "somebodyd"}  # the official slip; then each word without one of its apostrophes
for word in (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
    "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've "
    "must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't "
    "shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's "
    "something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
).split():
    for apostrophe in re.finditer("'", word):
        CONTRACTIONS[word[: apostrophe.start()] + word[apostrophe.end() :]] = word


def normalise_answer(text: str) -> str:
    """Lower case, without articles and most punctuation, numbers as digits, apostrophes in their place."""
    # ---- words: a possessive becomes a word of its own
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = re.sub(r"[\n\t]", " ", text).strip()
    # ---- punctuation: a mark that touches a space is removed, one between letters or digits parts two words
    original = text
    for mark in ';/[]"{}()=+\\_-><@`!':  # "," and "?" are gone, and with them the official rule for 1,000
        beside_space = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_space else " ")
    # by another official slip 32, the value of re.UNICODE, is the number of periods that are removed
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    # ---- digits, articles, contractions
    words = [DIGITS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def soft_accuracy(answer: str, item: Item) -> float:
    """VQA accuracy: min(1, people with the same answer / 3), averaged over leaving out each of ten people."""
    answer = normalise_answer(answer)
    same = [answer == normalise_answer(truth) for truth in item.truth]
    # left_out is 1 for a person with the same answer, who is then missing among those who agree
    return float(np.mean([min(1, (sum(same) - left_out) / 3) for left_out in same]))


# ---- MMMU: letters, options, words and numbers in free answers


def last_option(answer: str, options: list[str]) -> str:
    """The option that a free answer names, "" for none: by a letter as in "(B)", else "B ", else "B.", else,
    in more than five words, by its text. Of several the one that is named last."""
    letters = LETTERS[: len(options)]
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    # what names an option, and what decides where it was named last
    for sign, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if sign.format(letter) in answer]
        if named:
            return max(named, key=lambda letter: answer.rfind(place.format(letter)))
    answer = answer.lower()
    texts = {letter: text.lower() for letter, text in zip(letters, options, strict=False)}
    named = [letter for letter, text in texts.items() if text and text in answer]
    if not named or len(answer.split()) <= 5:
        return ""
    return max(named, key=lambda letter: answer.rfind(texts[letter]))


KEY_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.5e-3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 1.5
)


def key_parts(answer: str) -> list[str]:
    """What follows "is ", "so ", ... in each line, the shortest of them; the whole answer if nothing does."""
    answer = answer.strip().strip(".").lower()
    lines, keys = answer.split("\n"), []
    for number, line in enumerate(lines, 1):
        key = ""
        for sign in (*KEY_SIGNS, "=") if number == len(lines) else KEY_SIGNS:
            part = line.rpartition(sign)[2].strip()
            if sign in line and (not key or len(part) < len(key)):
                key = part
        if key and key not in tuple(":,.!?;'"):
            keys.append(key)
    return keys or [answer]


def words_or_number(text: str) -> list[str | float]:
    """A number rounded to two decimals, or text in lower case; a single character counts only at a space."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answer(answer: str, item: Item) -> float:
    """1 if a key part of the answer contains a true answer, or one of its numbers equals one."""
    parts = key_parts(answer)
    parts += [number for part in parts for form in NUMBER_FORMS for number in re.findall(form, part)]
    truths = [value for truth in item.truth for value in words_or_number(truth)]
    words = [truth for truth in truths if isinstance(truth, str)]
    for value in [value for part in parts for value in words_or_number(part)]:
        if value in truths or isinstance(value, str) and any(word in value for word in words):
            return 1.0
    return 0.0


def mmmu(answer: str, item: Item) -> float:
    if not item.options:
        return open_answer(answer, item)
    return float(last_option(answer, item.options) in item.truth)


def mmmu_pro(answer: str, item: Item) -> float:
    """As `mmmu`, but what follows the last "Answer:" decides if it has the letter of one option only."""
    _, found, end = answer.rpartition("Answer:")
    named = [letter for letter in LETTERS[: len(item.options)] if found and letter in end]
    return float(named == item.truth) if len(named) == 1 else mmmu(answer, item)


# ---- AI2D, SEED and MME: short answers


def option_letter(answer: str, options: list[str]) -> str:
    """The option that an answer names, "" for none. These rules are tried on the whole answer, then on what
    follows the last "answer", "option" or "choice" (and "is", and punctuation):

    1. It is the text of an option, in any case, with or without a period.
    2. It begins with an option's letter, in any case: alone, in brackets or before . ) : , or ;
    3. It begins with an option's capital letter and a space. At the start of the whole answer this leaves out
       A and I, which are words there: "A cat", "I see".
    """
    texts = [text.strip().strip(".").lower() for text in options]
    plain = re.sub(r"[*\"'`]", "", answer).strip()
    end = re.search(r"(?is).*\b(?:answer|option|choice)\b(?:\s+is\b)?\W*(.*)", plain)
    for part, capitals in ((plain, "B-HJ"), (end[1] if end else "", "A-J")):
        text = part.strip().strip(".").lower()
        if len(text) > 1 and text in texts:
            return LETTERS[texts.index(text)]
        found = re.match(rf"[(\[]?(?:([A-Ja-j])\s*(?:[).:,;\]]|$)|([{capitals}])\s)", part)
        letter = (found[1] or found[2]).upper() if found else ""
        if letter and letter in LETTERS[: len(options)]:
            return letter
    return ""


def one_letter(answer: str, item: Item) -> float:
    return float(option_letter(answer, item.options) in item.truth)


def yes_or_no(answer: str, item: Item) -> float:
    """The official rule: the first four characters have a yes, or else a no."""
    start = answer.lower().strip().replace(".", "")[:4]
    said = next((word for word in ("yes", "no") if word in start), "other")
    return float(said == item.truth[0].lower())


class QuestionSet(NamedTuple):
    """Where a set's rows are on the hub, how they are read, and how answers are scored."""

    path: str
    split: str
    read: Callable[[dict], Item]
    score: Callable[[str, Item], float]
    only: tuple[str, tuple[str, ...]] | None = None  # a column, and its values in the rows that are asked
    configs: tuple[str, ...] | None = None  # None: the data set has one; (): all of them


QUESTION_SETS = {
    "mme": QuestionSet("lmms-lab/MME", "test", read_mme, yes_or_no, ("category", PERCEPTION)),
    "textvqa": QuestionSet("lmms-lab/textvqa", "validation", read_textvqa, soft_accuracy),
    "ai2d": QuestionSet("lmms-lab/ai2d", "test", read_ai2d, one_letter),
    "seed": QuestionSet("lmms-lab/SEED-Bench", "test", read_seed, one_letter, ("data_type", ("image",))),
    "mmmu": QuestionSet("MMMU/MMMU", "validation", read_mmmu, mmmu, None, ()),
    "mmmu-pro": QuestionSet("MMMU/MMMU_Pro", "test", read_mmmu, mmmu_pro, None, ("standard (10 options)",)),
}


def open_tables(name: str) -> list:
    """The tables of a set, from the hub or its local cache."""
    import datasets

    question_set = QUESTION_SETS[name]
    path, split, configs = question_set.path, question_set.split, question_set.configs
    try:
        if configs is None:
            return [datasets.load_dataset(path, split=split)]
        configs = configs or datasets.get_dataset_config_names(path)
        return [datasets.load_dataset(path, config, split=split) for config in configs]
    except (OSError, ConnectionError) as error:
        raise ValueError(f"cannot read {path}: {common.one_line(error)}") from error


def asked_rows(name: str, table) -> list[int]:
    """Numbers of the rows that are asked."""
    # one column is read, so that no image is decoded
    if QUESTION_SETS[name].only is None:
        return list(range(len(table)))
    column, values = QUESTION_SETS[name].only
    return [i for i, value in enumerate(table[column]) if value in values]


class QuestionScorer:
    """Asks a model the questions of one set."""

    def __init__(self, model: rae.TextToImage, tables: list, dist_ctx: common.DistContext):
        self.model, self.tables, self.dist_ctx = model, tables, dist_ctx

    def __call__(self, name: str, table: int, row: int) -> dict:
        question_set = QUESTION_SETS[name]
        # as Arrow stores it: an image is the bytes of its file, which are opened as all images here are
        [stored] = self.tables[table].with_format("arrow")[row].to_pylist()
        item, side = question_set.read(stored), self.model.reader.image_size
        answer = error = ""
        try:
            image = data.open_image(item.image["bytes"] or item.image["path"])
            # squeezed rather than cropped: the answer may be at the edge
            image = np.array(image.resize((side, side), Image.Resampling.BICUBIC))
            pixels = data.to_unit(torch.from_numpy(image).permute(2, 0, 1), self.dist_ctx.device)
            with self.dist_ctx.autocast():
                answer = self.model.answer(pixels, item.question)
        except ValueError as refusal:  # wrong: an image that cannot be opened, a question that is too long
            error = str(refusal)
        score = question_set.score(answer, item)
        return {"group": item.group, "error": error, "answer": answer, "score": score}


def understanding_summary(name: str, rows: list[dict]) -> tuple[float, int]:
    """(percentage, n). For MME a sum of percentages, at most 2000."""
    if name != "mme":
        return 100 * float(np.mean([row["score"] for row in rows])), len(rows)
    categories = defaultdict(lambda: defaultdict(list))
    for row in rows:
        category, _, image = row["group"].partition("/")
        categories[category][image].append(row["score"])
    # of each category two accuracies: of questions, and of images, both of whose questions must be right
    total = 0.0
    for images in categories.values():
        questions = [score for scores in images.values() for score in scores]
        total += 100 * (np.mean(questions) + np.mean([min(scores) for scores in images.values()]))
    return float(total), len(rows)


def understanding(config, dist_ctx: common.DistContext) -> list[dict]:
    """Each of --sets, its questions split over the processes. config: eval.Config."""
    names = config.sets.split(",")
    if unknown := set(names) - QUESTION_SETS.keys():
        raise ValueError(f"--sets {', '.join(unknown)}: choose from {', '.join(QUESTION_SETS)}")
    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    networks = {"model": config.model, "weights": common.fingerprint(model), "dtype": str(dist_ctx.dtype)}
    results = []
    for name in names:
        tables = open_tables(name)
        places = [(name, t, row) for t, table in enumerate(tables) for row in asked_rows(name, table)]
        jobs = {place: place for place in places[: config.limit]}
        scorer = partial(QuestionScorer, model, tables, dist_ctx)
        fields = ("set", "table", "row")
        rows = score_all(f"understanding-{name}", fields, jobs, networks, scorer, config, dist_ctx)
        errors = [row["error"] for row in rows if row["error"]]
        if dist_ctx.is_main and errors:
            print(f"{name}: {len(errors)} questions count as wrong, the first because {errors[0]}")
        label = name if len(jobs) == len(places) else f"{name} (first {len(jobs)} questions)"
        results += as_results("understanding", {label: understanding_summary(name, rows)})
    return results
