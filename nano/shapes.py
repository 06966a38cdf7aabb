"""The nano world of shapes and words: synthetic data with which everything in this project runs on a laptop.

`draw(domain, seed, index)` makes an image with its caption, `prompt` a GenEval request and `render` a true
image for one. The same arguments give the same bytes on every machine and with every library version. Random
numbers come only from `random.Random(int).random()`, whose stream Python guarantees. Pixels come only from
the four operations, square roots, floor and comparisons, which IEEE 754 makes exact (numpy's sin, exp, matmul
and float sums differ between processors).

Captions and questions are part of the data that the shipped weights were trained on: do not reword them.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

DOMAINS = ("objects", "scenes", "text")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 30, 40),
    "orange": (250, 125, 15),
    "yellow": (250, 225, 40),
    "green": (40, 165, 60),
    "cyan": (25, 205, 220),
    "blue": (35, 85, 230),
    "purple": (140, 40, 180),
    "pink": (250, 110, 185),
}
# Pairs that occur in the domain `classes` only: they test whether colour and shape were learned separately.
HELD_OUT = frozenset({
    ("circle", "purple"), ("square", "green"), ("square", "cyan"), ("triangle", "orange"),
    ("star", "blue"), ("cross", "yellow"), ("cross", "pink"), ("ring", "red"),
})  # fmt: skip
PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
TRAINING_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT)
HELD_OUT_PAIRS = tuple(pair for pair in PAIRS if pair in HELD_OUT)

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
LEVELS = (246, 205, 155, 95, 35)  # grey levels of a plain background
TEXTURES = ("striped", "checked", "dotted", "shaded")
TONES = {
    "white": (236, 236, 236),
    "grey": (150, 150, 150),
    "dark": (52, 52, 52),
    "beige": (220, 204, 178),
    "brown": (112, 92, 76),
}
# Radii as fractions of the image's side, by the number of objects in it.
RADII = {1: (0.15, 0.24), 2: (0.13, 0.23), 3: (0.12, 0.18), 4: (0.11, 0.16), 5: (0.10, 0.15)}

DARK_INKS = {"black": (25, 25, 25)} | {name: COLORS[name] for name in ("red", "green", "blue", "purple")}
LIGHT_INKS = {"white": (240, 240, 240)} | {n: COLORS[n] for n in ("orange", "yellow", "cyan", "pink")}
DESCRIBE = "Describe this image."  # the request of `rae.verify`
WORDS = tuple(
    "A I GO NO UP WE ON IN IT MY CAT DOG SUN RED BOX CAR CUP HAT KEY MAP PEN BUS SKY SEA ICE JAM FOX OWL "
    "BEE ANT EGG PIE TEA ZOO BIRD FISH TREE MOON STAR BOOK DOOR FIRE RAIN SNOW WIND BLUE PINK FROG DUCK "
    "BEAR LION CAKE MILK RICE SHIP BALL KING HOME LOVE PLAY QUIZ JAZZ".split()
)
# Letters of 5 columns by 7 rows, A to M above N to Z.
FONT = """
.###. ####. .###. ####. ##### ##### .###. #...# ##### ..### #...# #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. ...#. #..#. #.... ##.##
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #.#.. #.... #.#.#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ##... #.... #.#.#
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. ...#. #.#.. #.... #...#
#...# #...# #...# #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...#
#...# ####. .###. ####. ##### #.... .#### #...# ##### .##.. #...# ##### #...#
#...# .###. ####. .###. ####. .#### ##### #...# #...# #...# #...# #...# #####
#...# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# #...# #...# ....#
##..# #...# #...# #...# #...# #.... ..#.. #...# #...# #...# .#.#. .#.#. ...#.
#.#.# #...# ####. #...# ####. .###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#..
#..## #...# #.... #.#.# #.#.. ....# ..#.. #...# #...# #.#.# .#.#. ..#.. .#...
#...# #...# #.... #..#. #..#. ....# ..#.. #...# .#.#. #.#.# #...# ..#.. #....
#...# .###. #.... .##.# #...# ####. ..#.. .###. ..#.. .#.#. #...# ..#.. #####
"""
ROWS = FONT.split("\n")[1:-1]
GLYPHS = {
    chr(ord("A") + letter): np.array(
        [[row[6 * (letter % 13) + i] == "#" for i in range(5)] for row in ROWS[7 * (letter // 13) :][:7]]
    )
    for letter in range(26)
}


@dataclass(frozen=True)
class Object:
    """One shape or letter in an image."""

    shape: str  # one of SHAPES or of GLYPHS
    color: str  # name of the colour
    x: float  # centre in pixels, y downwards
    y: float
    radius: float  # of the circumscribed circle, in pixels
    tilt: float  # tangent of half the rotation, so that its sine and cosine are rational functions
    rgb: tuple[float, float, float]  # exact colour


@dataclass(frozen=True)
class Sample:
    """An image with its caption and what is in it."""

    image: np.ndarray  # (size, size, 3) uint8
    background: np.ndarray  # (size, size, 3) in [0, 255], the image without its objects
    caption: str
    objects: tuple[Object, ...]  # shapes, or the letters of the word
    questions: tuple[tuple[str, str], ...]  # (question, answer) pairs
    word: str | None  # in the domain `text`
    metadata: dict[str, Any]  # what the caption says; in `objects` a GenEval request
    label: int | None = None  # index in PAIRS, in the domain `classes`

    def dialogue(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """The turns of a conversation with all questions about the image, in random order."""
        questions = [self.questions[i] for i in rng.permutation(len(self.questions))]
        questions.sort(key=lambda pair: pair[0] == DESCRIBE)  # last: it would answer the others
        turns = [turn for pair in questions for turn in zip(("user", "assistant"), pair, strict=True)]
        return [("user", f"<image>\n{turns[0][1]}"), *turns[1:]]


class Chance:
    """A stream of random draws that depends only on the given integers."""

    def __init__(self, *keys: int):
        state = 0
        for key in keys:  # splitmix64, so that neighbouring seeds and indices give unrelated streams
            state = (state + key + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            state ^= state >> 31
        self.random = random.Random(state).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def integer(self, count: int) -> int:
        return int(self.random() * count)

    def coin(self, probability: float = 0.5) -> bool:
        return self.random() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.integer(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


def draw(domain: str, seed: int, index: int, size: int = 48) -> Sample:
    """Sample number `index` of the endless stream `seed` of a domain. Raises ValueError for an unknown one.

    domain: one of DOMAINS; or one of TASKS, `objects` of that task only; or `classes`, a single object of any
        pair of shape and colour. Only `classes` contains held-out pairs.
    size: side of the image in pixels; everything in it scales with it.
    """
    others = len(DOMAINS) + len(TASKS) + 1  # earlier streams belong to domains, prompts and renderings
    if domain == "classes":
        return _draw_class(Chance(others, seed, index), size)
    if domain in TASKS:
        return _draw_objects(Chance(others + 1 + TASKS.index(domain), seed, index), size, domain)
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r}; choose one of {', '.join(DOMAINS + TASKS)}, classes")
    chance = Chance(DOMAINS.index(domain), seed, index)
    return {"objects": _draw_objects, "scenes": _draw_scene, "text": _draw_text}[domain](chance, size)


def prompt(task: str, seed: int, index: int, held_out: bool = False) -> dict[str, Any]:
    """Request number `index` of one of TASKS in GenEval's format: tag, include, (counting) exclude, prompt.

    Entries of `include` hold class, count and, depending on the task, color and position: [relation, index of
    the other entry], as in GenEval's evaluation_metadata.jsonl. With `held_out` every object is a pair of
    HELD_OUT, otherwise none is. Prompts are worded like training captions but come from another stream.
    """
    if held_out and task not in ("colors", "color_attr"):
        raise ValueError(f"{task} has no held-out prompts: choose colors or color_attr, which name pairs")
    chance = Chance(len(DOMAINS) + TASKS.index(task), seed, index)
    metadata = _request(chance, task, HELD_OUT_PAIRS if held_out else TRAINING_PAIRS)
    return metadata | {"prompt": caption(chance, metadata)}


def render(metadata: dict[str, Any], seed: int, size: int = 48) -> np.ndarray:
    """An image (size, size, 3) uint8 that fulfils a GenEval request, random where the request leaves freedom.

    It shows nothing else, and a held-out pair only if the request names it.
    """
    chance = Chance(len(DOMAINS) + len(TASKS), seed)
    return _paint(_plain(chance, size), _place(chance, metadata["include"], size, gap=2.5))


def coverage(thing: Object, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The window of an image that an object can touch, and the fraction of its pixels that it covers."""
    low = [max(0, math.floor(center - thing.radius - 1)) for center in (thing.y, thing.x)]
    high = [min(size, math.ceil(center + thing.radius + 1)) for center in (thing.y, thing.x)]
    down = (np.arange(low[0], high[0])[:, None] + 0.5 - thing.y) / thing.radius
    right = (np.arange(low[1], high[1])[None, :] + 0.5 - thing.x) / thing.radius
    cos, sin = _turn(thing.tilt)
    distance = _distance(thing.shape, cos * right + sin * down, cos * down - sin * right)
    return (slice(low[0], high[0]), slice(low[1], high[1])), _ramp(distance * thing.radius)


def letters(word: str) -> np.ndarray:
    """Bitmap (7, 6 n - 1) of a word of n capitals, with one empty column between letters."""
    bitmap = np.zeros((7, 6 * len(word) - 1), dtype=bool)
    for i, letter in enumerate(word):
        bitmap[:, 6 * i : 6 * i + 5] = GLYPHS[letter]
    return bitmap


def an(phrase: str) -> str:
    """The phrase with its indefinite article: a circle, an orange circle."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _draw_objects(chance: Chance, size: int, task: str | None = None) -> Sample:
    metadata = _request(chance, task or chance.choice(TASKS), TRAINING_PAIRS)
    if metadata["tag"] == "counting" and chance.coin(1 / 3):
        entry = metadata["include"][0]
        entry["color"] = chance.choice([color for shape, color in TRAINING_PAIRS if shape == entry["class"]])
    metadata["prompt"] = caption(chance, metadata)
    objects = _place(chance, metadata["include"], size, gap=2.5)
    background = _plain(chance, size)
    questions = (*_judgements(chance, metadata), *chance.shuffled(_questions(chance, objects))[:2])
    image = _paint(background, objects)
    return Sample(image, background, metadata["prompt"], objects, questions, None, metadata)


def _draw_class(chance: Chance, size: int) -> Sample:
    label = chance.integer(len(PAIRS))
    shape, color = PAIRS[label]
    objects = _place(chance, [{"class": shape, "count": 1, "color": color}], size, gap=2.5)
    background = _plain(chance, size)
    questions, image = tuple(_questions(chance, objects)), _paint(background, objects)
    metadata = {"include": [{"class": shape, "count": 1, "color": color}]}
    caption = an(f"{color} {shape}")
    return Sample(image, background, caption, objects, questions, None, metadata, label)


def _draw_scene(chance: Chance, size: int) -> Sample:
    include = _scene(chance)
    texture, tone = chance.choice(TEXTURES), chance.choice(list(TONES))
    objects = _place(chance, include, size, gap=-0.03 * size)
    background = _textured(chance, texture, TONES[tone], size)
    behind, things = f"{an(texture)} {tone} background", _listing(include)
    caption = chance.choice((f"{behind} with {things}", f"{things} on {behind}"))
    other = chance.choice(TEXTURES)
    yes_no = (f"is the background {other}?", "yes" if other == texture else "no")
    question = chance.choice((("what is the background like?", texture), yes_no))
    questions = _some(chance, [question, *_questions(chance, objects)])
    metadata, image = {"include": include, "background": [texture, tone]}, _paint(background, objects)
    return Sample(image, background, caption, objects, questions, None, metadata)


def _draw_text(chance: Chance, size: int) -> Sample:
    spelling = "".join(chr(ord("A") + chance.integer(26)) for _ in range(1 + chance.integer(4)))
    word = chance.choice(WORDS) if chance.coin() else spelling
    inks, level = chance.choice(((DARK_INKS, chance.uniform(205, 250)), (LIGHT_INKS, chance.uniform(15, 70))))
    ink = chance.choice(list(inks))
    background = np.zeros((size, size, 3)) + level
    image, objects = _write(chance, background, word, ink, _jittered(chance, inks[ink], 8))
    caption = chance.choice(
        (
            f'the word "{word}"',
            f'the word "{word}" in {ink}',
            f'{ink} letters that say "{word}"',
            f'a sign that says "{word}"',
        )
    )
    other = ink if chance.coin() else chance.choice([name for name in inks if name != ink])
    questions = [
        ("what does it say?", word),
        (f"what color {'is the letter' if len(word) == 1 else 'are the letters'}?", ink),
        ("how many letters are there?", NUMBERS[len(word)]),
        (f"is the word {other}?", "yes" if other == ink else "no"),
    ]
    metadata = {"include": [], "word": word} | ({"ink": ink} if ink in caption else {})
    return Sample(image, background, caption, objects, _some(chance, questions), word, metadata)


def _request(chance: Chance, task: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What an image of the task has to show: GenEval's metadata without the prompt."""
    first = chance.choice(pairs)
    second = chance.choice([pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    colored = task in ("colors", "color_attr") or (task == "position" and chance.coin())
    chosen = (first, second) if task in ("two_object", "position", "color_attr") else (first,)
    include = [
        {"class": shape, "count": 1} | ({"color": color} if colored else {}) for shape, color in chosen
    ]
    metadata = {"tag": task, "include": include}
    if task == "position":
        include[1]["position"] = [chance.choice(list(RELATIONS)), 0]
    if task == "counting":
        include[0]["count"] = 2 + chance.integer(3)
        metadata["exclude"] = [{"class": first[0], "count": include[0]["count"] + 1}]
    return metadata


def _scene(chance: Chance) -> list[dict[str, Any]]:
    """Two or three groups of objects, two to five objects in all, like GenEval's include."""
    include = []
    for shape, most in zip(chance.shuffled(SHAPES), (3, 2, 1), strict=False):
        color = chance.choice([color for other, color in TRAINING_PAIRS if other == shape])
        include.append({"class": shape, "count": 1 + chance.integer(most), "color": color})
    total = include[0]["count"] + include[1]["count"]
    if total <= 3 and chance.coin(0.75):
        include[1]["position"] = [chance.choice(list(RELATIONS)), 0]
    return include[: 3 if total <= 4 and chance.coin() else 2]


def caption(chance: Chance, metadata: dict[str, Any]) -> str:
    """A sentence for a GenEval request; the last entry of a position is named first, as in GenEval."""
    things = [_phrase(entry) for entry in metadata["include"]]
    if metadata["tag"] == "position":
        relation = metadata["include"][1]["position"][0]
        if relation in ("left of", "right of") and chance.coin(2 / 3):
            relation = f"to the {relation}"
        things = [f"{things[1]} {relation} {things[0]}"]
    elif metadata["tag"] == "single_object" and chance.coin(0.2):
        things = [f"one {metadata['include'][0]['class']}"]
    frame = chance.choice(("{}", "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}"))
    return frame.format(" and ".join(things))


def _phrase(entry: dict[str, Any]) -> str:
    """A circle, two red circles."""
    name = f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]
    return an(name) if entry["count"] == 1 else f"{NUMBERS[entry['count']]} {_plural(name)}"


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("cross") else "s")


def _listing(include: list[dict[str, Any]]) -> str:
    """Two red circles, a blue star below them and a green ring."""
    things = [_phrase(entry) for entry in include]
    for i, entry in enumerate(include):
        if "position" in entry:
            relation, other = entry["position"]
            relation = f"to the {relation}" if relation in ("left of", "right of") else relation
            things[i] += f" {relation} {'it' if include[other]['count'] == 1 else 'them'}"
    return f"{', '.join(things[:-1])} and {things[-1]}"


def _questions(chance: Chance, objects: tuple[Object, ...]) -> list[tuple[str, str]]:
    """Question and answer pairs about objects of which each shape has one colour."""
    present = {thing.shape: thing.color for thing in objects}
    shape = chance.choice(list(present))
    count = sum(thing.shape == shape for thing in objects)
    absent = [name for name in SHAPES if name not in present]
    there = chance.coin()
    asked = chance.choice(list(present) if there else absent)
    questions = [
        (f"how many {_plural(shape)} are there?", NUMBERS[count]),
        (f"what color {f'is the {shape}' if count == 1 else f'are the {_plural(shape)}'}?", present[shape]),
        (f"is there {an(asked)}?", "yes" if there else "no"),
    ]
    if len(objects) == 2 and len(present) == 2:
        first, second = chance.shuffled(objects)
        for relation in RELATIONS:
            if _holds(relation, first, second):
                where = f"to the {relation}" if relation in ("left of", "right of") else relation
                questions.append((f"what is {where} the {second.shape}?", an(first.shape)))
    return questions


def _judgements(chance: Chance, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The two questions with which a model judges its own images (`rae.verify`)."""
    aligned = chance.coin()
    prompt = caption(chance, metadata if aligned else _altered(chance, metadata))
    return [
        (f"Does this image align with the prompt: {prompt}?", "yes" if aligned else "no"),
        (DESCRIBE, metadata["prompt"]),
    ]


def _altered(chance: Chance, metadata: dict[str, Any]) -> dict[str, Any]:
    """The request with one change, so that its images do not fit any more: the number, the relation, or the
    shape or colour of one entry. No pair is held out."""
    include = [dict(entry) for entry in metadata["include"]]
    entry = chance.choice(include)
    shape, color = entry["class"], entry.get("color")
    others = [s for s, c in TRAINING_PAIRS if color in (None, c) and s not in {e["class"] for e in include}]
    changes = [{"class": chance.choice(others)}]
    if color:
        changes += [{"color": chance.choice([c for s, c in TRAINING_PAIRS if s == shape and c != color])}]
    if metadata["tag"] == "counting":
        changes += [{"count": chance.choice([n for n in (2, 3, 4) if n != entry["count"]])}]
    if "position" in entry:
        relation, target = entry["position"]
        changes += [{"position": [chance.choice([r for r in RELATIONS if r != relation]), target]}]
    entry.update(chance.choice(changes))
    return metadata | {"include": include}


def _some(chance: Chance, questions: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple(chance.shuffled(questions)[: 2 + chance.integer(3)])


def _place(chance: Chance, include: list[dict[str, Any]], size: int, gap: float) -> tuple[Object, ...]:
    """Objects for the entries of `include`: at least `gap` pixels apart, uncut, in the right positions."""
    colors = [entry.get("color") or _free_color(chance, entry["class"]) for entry in include]
    total = sum(entry["count"] for entry in include)
    while True:  # until every object fits at one of its 20 random places
        placed: list[list[Object]] = []
        for entry, color in zip(include, colors, strict=True):
            placed.append([])
            for _ in range(entry["count"]):
                throws = (_throw(chance, entry["class"], color, RADII[total], size) for _ in range(20))
                thing = next((thing for thing in throws if _fits(thing, entry, placed, gap)), None)
                if thing is not None:
                    placed[-1].append(replace(thing, rgb=_jittered(chance, COLORS[color], 10)))
        things = tuple(thing for group in placed for thing in group)
        if len(things) == total:
            return things


def _free_color(chance: Chance, shape: str) -> str:
    return chance.choice([color for other, color in TRAINING_PAIRS if other == shape])


def _throw(chance: Chance, shape: str, color: str, radii: tuple[float, float], size: int) -> Object:
    radius = chance.uniform(*radii) * size
    x, y = (chance.uniform(radius + 1.5, size - radius - 1.5) for _ in range(2))
    return Object(shape, color, x, y, radius, chance.uniform(-0.2, 0.2), COLORS[color])


def _fits(thing: Object, entry: dict[str, Any], placed: list[list[Object]], gap: float) -> bool:
    """Whether an object is clear of those already placed, and where its entry of `include` wants it."""
    if not all(_apart(thing, other, gap) for group in placed for other in group):
        return False
    relation, target = entry.get("position", (None, 0))
    return relation is None or all(_holds(relation, thing, other) for other in placed[target])


def _apart(one: Object, other: Object, gap: float) -> bool:
    reach = one.radius + other.radius + gap
    return (one.x - other.x) * (one.x - other.x) + (one.y - other.y) * (one.y - other.y) >= reach * reach


def _holds(relation: str, one: Object, other: Object) -> bool:
    """Whether the relation clearly holds: GenEval's rule, and along the longer axis."""
    across, down = RELATIONS[relation]
    x, y = one.x - other.x, one.y - other.y
    along, aside = x * across + y * down, abs(x * down) + abs(y * across)
    margin = 0.1 * 2 * (one.radius + other.radius)
    return along > 1.2 * aside and along - margin > 0.6 * math.sqrt(x * x + y * y)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance, negative inside, to a shape in the unit circle; corners stay sharp."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - 0.9
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - 0.735) - 0.215
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.7071
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 0.94, short - 0.32)
    if shape == "triangle":
        return np.maximum(np.maximum(0.8660254 * x, -0.8660254 * x) - 0.5 * y, y) - 0.5
    # A star is the set of points inside at least four of the five lines through its inner pentagon's sides.
    sides = [0.58778525 * x + 0.80901699 * y, 0.95105652 * x - 0.30901699 * y]
    sides += [0.80901699 * y - 0.58778525 * x, -0.30901699 * y - 0.95105652 * x, -y + 0 * x]
    largest, second = np.maximum(sides[0], sides[1]), np.minimum(sides[0], sides[1])
    for side in sides[2:]:
        largest, second = np.maximum(largest, side), np.maximum(second, np.minimum(largest, side))
    return second - 0.30901699


def _turn(tilt: float) -> tuple[float, float]:
    """Cosine and sine of the angle whose half has the tangent `tilt`, without trigonometric functions."""
    return (1 - tilt * tilt) / (1 + tilt * tilt), 2 * tilt / (1 + tilt * tilt)


def _ramp(distance: np.ndarray) -> np.ndarray:
    """Coverage of pixels by their signed distance to an edge, in pixels."""
    return np.minimum(np.maximum(0.5 - distance, 0.0), 1.0)


def _paint(background: np.ndarray, objects: tuple[Object, ...]) -> np.ndarray:
    canvas = background.copy()
    for thing in objects:
        window, mask = coverage(thing, canvas.shape[0])
        canvas[window] += (np.array(thing.rgb) - canvas[window]) * mask[..., None]
    return _bytes(canvas)


def _bytes(canvas: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(np.floor(canvas + 0.5), 0), 255).astype(np.uint8)


def _jittered(chance: Chance, rgb: tuple[float, ...], reach: float) -> tuple[float, float, float]:
    red, green, blue = (channel + chance.uniform(-reach, reach) for channel in rgb)
    return red, green, blue


def _plain(chance: Chance, size: int) -> np.ndarray:
    return np.zeros((size, size, 3)) + (chance.choice(LEVELS) + chance.uniform(-8, 8))


def _textured(chance: Chance, texture: str, rgb: tuple[float, ...], size: int) -> np.ndarray:
    """A background in two shades of one tone."""
    cos, sin = _turn(chance.uniform(-1, 1))
    down = np.arange(size)[:, None] + chance.uniform(0, size)
    right = np.arange(size) + chance.uniform(0, size)
    x, y = cos * right + sin * down, cos * down - sin * right
    if texture == "shaded":
        start = (x - x.min()) / (x.max() - x.min())
        mask = start if chance.coin() else 1 - start
    else:
        mask = _pattern(texture, x, y, chance.uniform(0.12, 0.22) * size)
    contrast = (2 if texture == "shaded" else 1) * chance.uniform(22, 34) * (-1 if rgb[0] > 128 else 1)
    return np.array(_jittered(chance, rgb, 2)) + contrast * mask[..., None]


def _pattern(texture: str, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    """Coverage by stripes, checks or dots that repeat every `period` pixels."""
    wave_x, wave_y = (np.abs(a / period - np.floor(a / period) - 0.5) * period for a in (x, y))
    if texture == "dotted":
        return _ramp(np.sqrt(wave_x * wave_x + wave_y * wave_y) - 0.28 * period)
    stripes, bars = _ramp(wave_x - 0.25 * period), _ramp(wave_y - 0.25 * period)
    return stripes if texture == "striped" else stripes + bars - 2 * stripes * bars


def _write(
    chance: Chance, background: np.ndarray, word: str, color: str, rgb: tuple[float, float, float]
) -> tuple[np.ndarray, tuple[Object, ...]]:
    """The image of a word at a random scale and place, with 4 x 4 samples per pixel, and its letters."""
    size, bitmap = len(background), letters(word)
    height, width = bitmap.shape
    scale = chance.uniform(1.4 * size / 48, min(2.4 * size / 48, (size - 4) / width))
    top, left = (chance.uniform(1, size - 1 - scale * extent) for extent in (height, width))
    padded = np.zeros((height + 2, width + 2), dtype=np.int64)
    padded[1:-1, 1:-1] = bitmap
    samples = (np.arange(4 * size) + 0.5) / 4
    rows, columns = (
        np.minimum(np.maximum(np.floor((samples - start) / scale), -1), extent).astype(np.int64) + 1
        for start, extent in ((top, height), (left, width))
    )
    counts = padded[rows][:, columns].reshape(size, 4, size, 4).sum(axis=(1, 3))
    image = _bytes(background + (np.array(rgb) - background) * (counts / 16)[..., None])
    objects = [
        Object(letter, color, left + (6 * i + 2.5) * scale, top + 3.5 * scale, 3.5 * scale, 0.0, rgb)
        for i, letter in enumerate(word)
    ]
    return image, tuple(objects)
