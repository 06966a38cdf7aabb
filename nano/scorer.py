"""GenEval for the nano world: detects shapes and reads words in images without a network.

The rules are GenEval's, in benchmarks.py. Its detector (Mask2Former) and its colour classifier (CLIP) are
replaced by segmentation by hue and by templates drawn with `shapes.coverage`.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from scipy import ndimage

import benchmarks
from nano.shapes import COLORS, GLYPHS, SHAPES, TASKS, Object, coverage

MIN_AREA = 0.007  # fraction of the image; the smallest star that shapes.py draws covers 0.011
MIN_OVERLAP = 0.72  # intersection over union with the best template, below which a blob is no shape
SYMMETRY = {"circle": 1, "ring": 1, "square": 4, "cross": 4, "triangle": 3, "star": 5}  # rotational
GRID = 20  # samples per side of a normalised mask
CONTRAST = 40  # minimum distance of a word's ink from its background, in levels


@dataclass(frozen=True)
class Detection:
    """A shape in an image: box (x0, y0, x1, y1) in pixels, end exclusive; confidence from 0 to 1."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    confidence: float


def detect(image: np.ndarray) -> list[Detection]:
    """The shapes in an image (H, W, 3) uint8 on a neutral background, most confident first.

    Every pixel gets the palette's nearest hue, which blending with grey at an object's edge does not change.
    Connected pixels of one hue that are more than half covered are an object if a template fits them well.
    """
    labels, cover = _segment(image)
    detections = []
    for label, color in enumerate(COLORS):
        mask = (labels == label) & (cover > 0.5)
        if mask.sum() >= MIN_AREA * mask.size:
            detections += _blobs(mask, np.where(labels == label, cover, 0), color)
    return sorted(detections, key=lambda detection: -detection.confidence)


def score(image: np.ndarray, metadata: dict[str, Any]) -> bool:
    """Whether an image fulfils a GenEval request, by the rules of benchmarks.py."""
    objects = defaultdict(list)
    for detection in detect(image):
        objects[detection.shape].append(detection)
    right, _ = benchmarks.judge(metadata, objects, lambda found, _: [one.color for one in found])
    return right


def overall(results: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy of every task and, as `overall`, their mean: GenEval weighs tasks equally, not images."""
    missing = [task for task in TASKS if not results.get(task)]
    if missing:
        raise ValueError(f"GenEval's overall is the mean of six tasks: no results of {', '.join(missing)}")
    accuracies = {task: float(np.mean(results[task])) for task in TASKS}
    return accuracies | {"overall": float(np.mean(list(accuracies.values())))}


def read_word(image: np.ndarray) -> str:
    """The word of one to four capitals in an image (H, W, 3) uint8 on a plain background, else "".

    The box of the ink gives scale and length, because every letter fills its five columns and seven rows.
    Each letter is then the glyph that fits best over small shifts and changes of scale.
    """
    ink = ndimage.gaussian_filter(_ink(image), 0.5)  # cells are read at single points: edges must be soft
    blobs, count = ndimage.label(ndimage.binary_dilation(ink > 0.5, iterations=len(ink) // 12))
    if count == 0:
        return ""
    kept = 1 + np.argmax(ndimage.sum_labels(ink, blobs, range(1, count + 1)))
    rows, columns = ndimage.find_objects(((ink > 0.5) & (blobs == kept)).astype(int))[0]
    return _fit_letters(ink, rows.start, columns.start, rows.stop, columns.stop)


def _segment(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the palette's nearest hue, and coverage by it, both (H, W)."""
    hues = _opponent(image.astype(np.float64))
    palette = _opponent(np.array(list(COLORS.values()), dtype=np.float64))
    strength = np.linalg.norm(palette, axis=-1)
    smooth = ndimage.uniform_filter(hues, (3, 3, 0))
    labels = np.argmax(smooth @ (palette / strength[:, None]).T, axis=-1)
    return labels, np.clip(np.linalg.norm(hues, axis=-1) / strength[labels], 0, 1)


def _opponent(rgb: np.ndarray) -> np.ndarray:
    """Chroma as a vector whose angle is the hue; greys are at the origin."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.stack([red - (green + blue) / 2, (green - blue) * 0.75**0.5], axis=-1)


def _blobs(mask: np.ndarray, cover: np.ndarray, color: str) -> list[Detection]:
    """Connected components of the mask that are shapes."""
    blobs, _ = ndimage.label(mask)
    detections = []
    for number, window in enumerate(ndimage.find_objects(blobs), start=1):
        rows, columns = window
        window = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in window)
        mine = blobs[window] == number
        if mine.sum() >= MIN_AREA * mask.size:
            shape, confidence = _classify(cover[window] * ndimage.binary_dilation(mine, np.ones((3, 3))))
            if confidence >= MIN_OVERLAP:
                detections.append(
                    Detection(shape, color, (columns.start, rows.start, columns.stop, rows.stop), confidence)
                )
    return detections


def _classify(cover: np.ndarray) -> tuple[str, float]:
    """The shape whose template has the largest soft intersection over union with a mask, and its value."""
    names, bank = _templates()
    mask = _normalise(cover)
    shared = np.minimum(mask, bank).sum(axis=-1)
    overlap = shared / (mask.sum() + bank.sum(axis=-1) - shared)
    best = int(np.argmax(overlap))
    return names[best], float(overlap[best])


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """Names and normalised masks (n, GRID * GRID) of all shapes: small, large, sharp, soft and rotated."""
    names, masks = [], []
    for shape, radius, blur in product(SHAPES, (6, 9), (0, 1)):
        turn = 360 / SYMMETRY[shape]
        for angle in np.arange(0, turn if SYMMETRY[shape] > 1 else 1, 7.5):
            tilt = float(np.tan(np.radians(angle / 2)))
            thing = Object(shape, "red", 16, 16, radius, tilt, (0, 0, 0))
            window, cover = coverage(thing, 32)
            canvas = np.zeros((32, 32))
            canvas[window] = cover
            names.append(shape)
            masks.append(_normalise(ndimage.gaussian_filter(canvas, blur)))
    return names, np.stack(masks)


def _normalise(cover: np.ndarray) -> np.ndarray:
    """A mask resampled around its centre to a standard area, as GRID * GRID values."""
    area = cover.sum()
    rows, columns = np.indices(cover.shape)
    center = (cover * rows).sum() / area, (cover * columns).sum() / area
    steps = np.linspace(-1, 1, GRID) * np.sqrt(area)
    places = np.stack(np.meshgrid(center[0] + steps, center[1] + steps, indexing="ij"))
    return ndimage.map_coordinates(cover, places, order=1).ravel()


def _ink(image: np.ndarray) -> np.ndarray:
    """Fraction (H, W) of ink in each pixel: the colour farthest from the background, the border's median."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    away = pixels - np.median(border, axis=0)
    distance = np.linalg.norm(away, axis=-1)
    strongest = distance >= np.percentile(distance, 99.5)
    direction = away[strongest].mean(axis=0)
    if np.linalg.norm(direction) < CONTRAST:
        return np.zeros(image.shape[:2])
    return np.clip(away @ direction / (direction @ direction), 0, 1)


def _fit_letters(ink: np.ndarray, top: float, left: float, bottom: float, right: float) -> str:
    """The word that differs least from the ink at its letters' cells, in roughly this box."""
    names, glyphs = _alphabet()
    least, word = 0.2, ""
    for length in range(1, 5):
        scale = (right - left) / (6 * length - 1)
        if 0.7 < scale * 7 / (bottom - top) < 1.4:
            cells = _cells(ink, (top + bottom) / 2, (left + right) / 2, scale, length)
            errors = ((cells[:, :, None] - glyphs) ** 2).mean(axis=-1)
            fit = errors.min(axis=-1).mean(axis=-1)
            best = int(np.argmin(fit))
            if fit[best] < least:
                least, word = fit[best], "".join(names[i] for i in errors[best].argmin(axis=-1))
    return word


def _cells(ink: np.ndarray, y: float, x: float, scale: float, length: int) -> np.ndarray:
    """Ink at the cells' centres (n, length, 35), for n small changes of scale and of the centre (y, x)."""
    stretch, down, right = np.meshgrid([0.92, 0.96, 1, 1.04], [-0.6, 0, 0.6], [-0.6, 0, 0.6])
    letter, row, column = np.indices((length, 7, 5)).reshape(3, 1, -1)
    step = scale * stretch.reshape(-1, 1)
    ys = y - 0.5 + down.reshape(-1, 1) + (row - 3) * step
    xs = x - 0.5 + right.reshape(-1, 1) + (6 * letter + column - 3 * length + 1) * step
    return ndimage.map_coordinates(ink, [ys, xs], order=1).reshape(len(step), length, 35)


@cache
def _alphabet() -> tuple[list[str], np.ndarray]:
    """The capitals and their bitmaps (26, 35)."""
    return list(GLYPHS), np.stack([glyph.ravel() for glyph in GLYPHS.values()]).astype(np.float64)
