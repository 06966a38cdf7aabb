"""Images, captions and conversations in, batches out.

--data names a source, or several with weights, separated by commas:

    nano                           the synthetic world of nano/shapes.py: the domains of NANO_MIXTURE
    nano:DOMAIN                    objects, scenes, text, questions, classes, or a task such as counting
    nano:lessons                   nano, but simple images first: NANO_LESSONS
    path/to/folder                 images; captions in its metadata.jsonl or in .txt files beside the images,
                                   or one subfolder per class
    path/to/shards                 .tar files (jpg, png, ... beside txt, cls or json) or .parquet files
    path/to/latents                the output of encode.py: latents instead of images
    path/to/file.jsonl             conversations, and paths of their images from the file's folder
    path/to/wds_manifest.json      a list of tars: URLs, or paths from its folder
    org/name                       a data set on the Hugging Face hub, streamed
    web=0.7,synthetic=0.2,nano=0.1 a mixture

docs/data.md has examples of the files. Rows of shards may have conversations too. <image> marks the place of
the image: in a human turn the model looks at it, in a gpt turn the model draws it. A caption becomes a
conversation that asks for the image.

Sample j of the batch of step s has the number s * batch + j. A sample depends on the seed and its number
only, not on the number of processes or workers. `Loader` yields the batches of a training run, without end.
`OnePass` yields every sample once, for an evaluation or for statistics. Samples that cannot be used are
skipped and reported.
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

REQUESTS = ("Generate an image of {}", "Can you draw {}?", "Please make a picture of {}", "Show me {}")
# the hard tasks get extra weight, because they are learned last
NANO_MIXTURE = {"nano:objects": 0.3, "nano:counting": 0.15, "nano:position": 0.15, "nano:color_attr": 0.15}
NANO_MIXTURE |= {"nano:scenes": 0.1, "nano:text": 0.05, "nano:questions": 0.1}
NANO_LESSONS = {  # from this sample on, however long the run: simple images first (docs/speedrun.md)
    0: "nano:colors",
    12_800: "nano:color_attr=0.35,nano:position=0.25,nano:counting=0.25,nano:colors=0.15",
    38_400: "nano",
}

CAPTIONS = ("text", "caption", "txt", "prompt")  # columns and file extensions, in order of preference
LABELS = ("label", "cls")
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval"}  # splits that are not trained on
# Formats that PIL decodes by itself. EPS, for one, would run Ghostscript on an untrusted file. The last ones
# have weak signatures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "ICO", "TGA")
IMAGES = ("jpg", "jpeg", "png", "webp", "jpe", "jfif", "mpo", "apng", "gif", "bmp", "dib", "tif", "tiff")
IMAGES += ("ppm", "pgm", "pbm", "pnm", "pfm", "avif", "jp2", "j2k", "jpx", "qoi", "ico", "tga")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.zstd")

# Limits on untrusted data: one bad file among millions must not end a run.
MAX_PIXELS = 2**26  # checked before an image is decoded
MAX_ASPECT = 50  # resizing the short side of a longer strip could exhaust memory
MAX_SCANNED = 2**31  # pixels times scans of a JPEG: about two seconds
MAX_FILE = 2**26  # bytes of a file in a tar
MAX_HEADER = 2**20  # bytes of a long name or of pax attributes in a tar
MAX_RATIO = 200  # of compression, after the first gigabyte of a tar
MAX_CAPTION = 1000  # characters; longer captions are cut
MAX_CONVERSATION = 2**15  # characters; longer ones are skipped
SPECIAL_TOKEN = r"<\|\w+\|>|<im_\w+>"  # tokens of language models; <image> is text
MAX_SKIPPED = 100  # unusable samples in a row before a run stops with an error
MAX_STREAM = 100_000  # unusable samples in a row of shards before it does
MAX_DEATHS = 10  # worker processes that die for one batch before it does
TIMEOUT = 1200  # seconds without data before it does: on resume, shards are read again up to their places
CHECK = 1  # seconds without data before it looks whether its worker processes are alive

# These are part of what a seed means: with other values the batches of every run change.
DRAWS = 4  # uniform numbers per sample: wording of the request, crop x, crop y, flip
CHUNK = 64  # rows of a lane that are shuffled together, at least
BLOCK = 1024  # the same, of all lanes together

PER_SAMPLE = ("caption", "label", "conversation", "index")  # entries of a batch with B items
PER_IMAGE = ("image_index", "image", "latents")  # entries of a batch with P <= B items


class SkipSample(ValueError):
    """A sample cannot be used; the message names it and says why."""

    def __str__(self) -> str:
        return encodable(super().__str__())


def hash_seed(*keys: int | str) -> int:
    """A 63-bit seed from several keys, the same on every machine."""
    # A hash, because sums such as seed + index make streams of different seeds overlap.
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


@cache
def say(message: str) -> None:
    """Prints a warning, once and on the main process."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def short_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()


def rng(*keys: int | str) -> np.random.Generator:
    return np.random.default_rng(hash_seed(*keys))


# -----------------------------------------------------------------------------------------------------------
# one sample: its text


def request(caption: str, uniform: float) -> list[tuple[str, str]]:
    """A conversation that asks for the image of a caption; `uniform` in [0, 1) picks the wording."""
    template = REQUESTS[int(uniform * len(REQUESTS))]
    return [("user", template.format(caption)), ("assistant", "Here you go:\n<image>")]


def requested_caption(conversation: list[tuple[str, str]]) -> str | None:
    """The caption of the image that a conversation asks for, or None."""
    for (_, text), (role, answer) in itertools.pairwise(conversation):
        if role == "assistant" and "<image>" in answer:
            # The wording of `request` is no part of the caption.
            for head, tail in (template.split("{}") for template in REQUESTS):
                if text.startswith(head):
                    return clean(text.removeprefix(head).removesuffix(tail))
            return clean(text)
    return None


def clean(caption: str) -> str:
    """The caption cut to MAX_CAPTION, without special tokens, <image> and a byte order mark."""
    # Anything in angle brackets goes: the special tokens of the language model are not known here.
    caption = encodable(caption.removeprefix("\ufeff")[:MAX_CAPTION])
    return re.sub(r"<\|?\w+\|?>", " ", caption).strip()


def encodable(text: str) -> str:
    """The text with lone surrogates replaced by "?"."""
    # JSON and file names can contain them; tokenizers and text files raise on them.
    return text.encode(errors="replace").decode()


def parse_conversation(row: dict) -> list[tuple[str, str]]:
    """The (role, text) turns of a row's "conversations". If no turn has <image>, the image goes before
    the first one, as in Scale-RAE. Raises SkipSample unless human and gpt alternate, or if <image> does not
    occur as often as the row has images (0 or 1)."""
    name, images = row["name"], 1 if row.get("image") else 0
    try:
        turns = [(turn["from"], encodable(turn["value"])) for turn in row["conversations"]]
    except (TypeError, KeyError, AttributeError):
        raise SkipSample(f"{name}: conversations is not a list of turns {{from, value}}") from None
    # A leading system turn is dropped, as in Scale-RAE: the chat template writes the same one everywhere.
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    speakers, texts = [speaker for speaker, _ in turns], [text for _, text in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise SkipSample(f"{name}: turns do not alternate between human and gpt")
    if not all(text.strip() for text in texts):
        raise SkipSample(f"{name}: a turn is empty")
    length = sum(map(len, texts))
    if length > MAX_CONVERSATION:
        raise SkipSample(f"{name}: {length:,} characters in turns, the limit is {MAX_CONVERSATION:,}")
    # Special tokens in a text could end its turn early, or speak as the system.
    if special := re.search(SPECIAL_TOKEN, "\n".join(texts)):
        raise SkipSample(f"{name}: special token {special[0]} in a turn")
    count = sum(text.count("<image>") for text in texts)
    if images and not count:
        texts[0] = f"<image>\n{texts[0]}"
    elif count != images:
        raise SkipSample(f"{name}: {count} <image> for {images} images")
    roles = ("user" if speaker == "human" else "assistant" for speaker in speakers)
    return list(zip(roles, texts, strict=True))


# -----------------------------------------------------------------------------------------------------------
# one sample: its image


def open_image(source: str | Path | bytes, name: str = "") -> Image.Image:
    """An RGB image as a viewer shows it, from a path or the bytes of a file: turned as EXIF says, on white,
    and the first of several. Raises SkipSample if it is missing, damaged, too large or too narrow."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=FORMATS) as image:
            check_size(name, image)
            image.load()
            # In place, the pixels come first: damaged EXIF data is no reason to lose the image.
            with suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                return scaled_grey(name, image).convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except SkipSample:
        raise
    except UnidentifiedImageError:
        raise SkipSample(f"cannot read the image {name}: not one of {', '.join(FORMATS)}") from None
    # Decoders raise all sorts of errors on a damaged file.
    except Exception as error:
        raise SkipSample(f"cannot read the image {name}: {type(error).__name__}: {error}") from None


def check_size(name: str, image: Image.Image) -> None:
    """Raises SkipSample for an opened image that would take too much time or memory to decode or resize."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SkipSample(f"{name} has {width} x {height} pixels, the limit is {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SkipSample(f"{name} is a strip of {width} x {height} pixels")
    if image.format in ("JPEG", "MPO"):
        # A progressive JPEG may have thousands of scans, a few bytes each, which all go over every pixel.
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        if scans * width * height > MAX_SCANNED:
            raise SkipSample(f"{name} has {scans} scans of {width} x {height} pixels")


def scaled_grey(name: str, image: Image.Image) -> Image.Image:
    """8-bit greyscale from 16 or 32 bits: floats in [0, 1] and integers in [0, 65535] become [0, 255]; beyond
    that, the image's own range does."""
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise SkipSample(f"{name} has values that are not finite")
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = values.min(), values.max()
    values = 255 * (values - low) / max(high - low, 1e-12)
    return Image.fromarray(values.round().astype(np.uint8))


def open_metadata(path: str) -> dict[str, str]:
    """The text chunks of a PNG; {} for any other file."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return dict(image.text)
    except (UnidentifiedImageError, OSError):
        return {}


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The evaluation crop of ADM: (size, size, 3) uint8 from an RGB image."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    image = image.resize(scaled_size(image, size), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def random_crop(image: Image.Image, size: int, across: float, down: float) -> np.ndarray:
    """The training crop of RAE stage 1: (size, size, 3) uint8 from an RGB image resized to a short side of
    1.5 * size. `across` and `down` in [0, 1) place it."""
    width, height = scaled_size(image, size * 3 // 2)
    left, top = int(across * (width - size + 1)), int(down * (height - size + 1))
    # Resize only the box of the crop: five times faster than the whole image, equal up to rounding.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return np.array(image.resize((size, size), Resampling.BICUBIC, box=box))


def scaled_size(image: Image.Image, short_side: int) -> tuple[int, int]:
    scale = short_side / min(image.size)
    return round(image.width * scale), round(image.height * scale)


# -----------------------------------------------------------------------------------------------------------
# one sample: text and image together


@dataclass(frozen=True)
class Transform:
    """How the rows of a source become samples. The nano world ignores all but the size."""

    size: int  # side of the images, in pixels
    crop: str = "centre"  # or "random"
    flip: bool = False  # mirror half of the images
    text_only: bool = False  # keep conversations without an image, which are skipped otherwise
    captions: bool = False  # skip images without a caption
    num_classes: int | None = None  # skip images without a label below it
    encode_chat: Callable[[list], tuple[list, list]] | None = None  # tokens and labels of a conversation
    max_seq_len: int = 0  # conversations with more tokens are skipped

    def pixels(self, image: Image.Image, across: float, down: float, mirror: float) -> np.ndarray:
        """(size, size, 3) uint8 of an RGB image; three numbers in [0, 1) decide the crop and the flip."""
        random = self.crop == "random"
        pixels = random_crop(image, self.size, across, down) if random else centre_crop(image, self.size)
        return np.ascontiguousarray(pixels[:, ::-1]) if self.flip and mirror < 0.5 else pixels


def make_sample(row: dict, transform: Transform, uniform: np.ndarray) -> dict:
    """{"image", "caption", "label", "conversation"} from a row and DRAWS uniform numbers, or SkipSample.
    A row has a "name" for messages, and perhaps "image" (path or bytes) and what `known_fields` keeps; or
    an "error", why it cannot be used."""
    name, caption = row["name"], None
    if "error" in row:
        raise SkipSample(f"{name}: {row['error']}")
    label = next((row[key] for key in LABELS if key in row), None)
    if "conversations" in row:
        conversation = parse_conversation(row)
    else:
        caption = next(filter(None, (clean(row[key]) for key in CAPTIONS if key in row)), None)
        conversation = request(caption or "", uniform[0])
    check_text(name, caption, label, conversation, transform)
    if row.get("image"):
        watch(name)
        image = transform.pixels(open_image(row["image"], name), *uniform[1:])
    elif "conversations" in row and transform.text_only:
        # Black, so that workers know the shape of an image; `collate` drops it.
        image = np.zeros((transform.size, transform.size, 3), np.uint8)
    else:
        unread = f", for the name of {row['unread']} has two dots" if "unread" in row else ""
        raise SkipSample(f"{name}: no image{unread}")
    return {"image": image, "caption": caption, "label": label, "conversation": conversation}


def known_fields(row: dict) -> dict:
    """The captions, label and conversations of a row."""
    # Any other column goes, because it may be called "name" or "error", and empty captions are often null.
    types = dict.fromkeys(CAPTIONS, str) | dict.fromkeys(LABELS, int) | {"conversations": object}
    fields = {key: value for key, value in row.items() if isinstance(value, types.get(key, ()))}
    # True is an int, too, and None an object
    return {key: value for key, value in fields.items() if not isinstance(value, bool | None)}


def sample_or_reason(row: dict, transform: Transform, uniform: np.ndarray) -> dict:
    """`make_sample`, or {"skipped": [reason]} if that raises SkipSample."""
    try:
        return make_sample(row, transform, uniform)
    except SkipSample as error:
        return {"skipped": [str(error)]}


def check_text(name: str, caption: str | None, label: int | None, conversation: list, transform: Transform):
    """Raises SkipSample without the caption or label that the transform needs, or beyond max_seq_len."""
    # With text_only, conversations need no caption, but a request must not be empty.
    talks = transform.text_only and requested_caption(conversation) != ""
    if transform.captions and not (caption or talks):
        raise SkipSample(f"{name}: no caption")
    if transform.num_classes and not isinstance(label, int):
        raise SkipSample(f"{name}: no label")
    if transform.num_classes and not 0 <= label < transform.num_classes:
        raise SkipSample(f"{name}: label {label}, but the classes are 0 to {transform.num_classes - 1}")
    length = len(transform.encode_chat(conversation)[0]) if transform.encode_chat else 0
    if length > transform.max_seq_len:
        raise SkipSample(f"{name}: {length} tokens of conversation, the limit is {transform.max_seq_len}")


# -----------------------------------------------------------------------------------------------------------
# sources that map numbers to samples
#
# source[number] is a sample. source.once(limit, rank, world_size) yields this process's part of one pass over
# the rows: samples, or {"skipped": [reason]}, each with an "index" (a tuple) that orders the whole pass.


class NanoSource:
    """One domain of the nano world. It never repeats, and its images are drawn at the right size."""

    def __init__(self, domain: str, size: int, seed: int):
        from nano import shapes

        domains = (*shapes.DOMAINS, "questions", "classes", *shapes.TASKS)
        if domain not in domains:
            raise ValueError(f"nano has no domain {domain!r}: choose from {', '.join(domains)}, lessons")
        self.draw, self.domain, self.size, self.seed = shapes.draw, domain, size, seed
        names = [f"{color} {shape}" for shape, color in shapes.PAIRS]
        self.class_names = names if domain == "classes" else None
        self.identity = f"nano:{domain}"

    def __getitem__(self, number: int) -> dict:
        first, second = rng(self.seed, number).random(2)
        if self.domain == "questions":
            # A seed of its own: these are not the images that the other domains ask for.
            domain = "objects" if first < 0.7 else "scenes" if first < 0.85 else "text"
            sample = self.draw(domain, hash_seed(self.seed, "questions"), number, self.size)
            conversation = sample.dialogue(rng(self.seed, number, "order"))
        else:
            sample = self.draw(self.domain, self.seed, number, self.size)
            conversation = request(sample.caption, second)
        result = {"image": sample.image, "caption": sample.caption, "label": sample.label}
        return result | {"conversation": conversation}

    def once(self, limit: int | None, rank: int, world_size: int) -> Iterator[dict]:
        if limit is None:
            raise ValueError(f"nano:{self.domain} has no end: give a limit")
        for number in range(rank, limit, world_size):
            yield self[number] | {"index": (number,)}


class NanoLessons(NanoSource):
    """The mixtures of NANO_LESSONS, one after another."""

    def __init__(self, size: int, seed: int):
        self.lessons = {
            first: open_source(names, size, hash_seed(seed, first)) for first, names in NANO_LESSONS.items()
        }
        self.domain, self.class_names, self.identity = "lessons", None, "nano:lessons"

    def __getitem__(self, number: int) -> dict:
        first = max(first for first in self.lessons if first <= number)
        return self.lessons[first][number - first]


class Shuffled:
    """The endless order of a source with random access: all rows, then all again in another order."""

    def __init__(self, name: str, count: int, seed: int):
        self.name, self.count, self.seed, self.epoch, self.order = name, count, seed, -1, np.empty(0)

    def row(self, number: int) -> int:
        epoch, position = divmod(number, self.count)
        if self.epoch != epoch:
            self.epoch, self.order = epoch, rng(self.seed, epoch).permutation(self.count)
        return int(self.order[position])

    def usable(self, number: int, make: Callable[[int], dict], draws: np.random.Generator) -> dict:
        """`make(row)` of row `number`, or of a random row instead of one that raises SkipSample."""
        row, skipped = self.row(number), []
        while len(skipped) < MAX_SKIPPED:
            try:
                return make(row) | {"skipped": skipped}
            except SkipSample as error:
                skipped.append(str(error))
                row = int(draws.integers(self.count))
        raise ValueError(f"{self.name}: {MAX_SKIPPED} unusable samples in a row; the last: {skipped[-1]}")


class ImageSource:
    """Images with random access, shuffled anew in every epoch."""

    def __init__(self, name: str, rows: "Folder | JsonLines", transform: Transform, seed: int):
        if not len(rows):
            raise ValueError("it is empty")
        self.rows, self.transform, self.seed = rows, transform, seed
        self.class_names, self.identity = rows.class_names, rows.identity
        self.shuffled = Shuffled(name, len(rows), seed)

    def __getitem__(self, number: int) -> dict:
        draws = rng(self.seed, number, 0)
        return self.shuffled.usable(number, partial(self.sample, draws=draws), draws)

    def sample(self, row: int, draws: np.random.Generator) -> dict:
        return make_sample(self.rows[row], self.transform, draws.random(DRAWS))

    def once(self, limit: int | None, rank: int, world_size: int) -> Iterator[dict]:
        # In random order, because the first files of a folder are of one class.
        order = rng(self.seed).permutation(len(self.rows)).tolist()
        for row in order[:limit][rank::world_size]:
            uniform = rng(self.seed, row).random(DRAWS)
            yield sample_or_reason(self.rows[row], self.transform, uniform) | {"index": (row,)}


class Packed(Sequence):
    """Strings in two arrays. Worker processes share these, but would copy a list by reading it."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.content, self.ends = b"".join(encoded), np.cumsum([len(x) for x in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        end, start = self.ends[row], self.ends[row - 1] if row else 0
        return os.fsdecode(self.content[start:end])


def list_files(folder: str) -> list[str]:
    """The files below a folder as sorted relative paths, without hidden ones. Links are followed."""
    root, shared = os.path.abspath(folder), dist.is_initialized()
    paths, seen, directories = [], set(), [root]
    # The main process lists for all: 64 that list ImageNet are a load for a network file system.
    while directories and not (shared and dist.get_rank()):
        directory = directories.pop()
        # Links may form cycles.
        real = os.path.realpath(directory)
        if real not in seen:
            seen.add(real)
            files, folders, links = scan(directory, os.stat(directory).st_mtime_ns)
            paths += files
            # Links come last: if they lead to a folder below this one, its own path counts.
            directories = links + directories + folders
    result = [sorted(path[len(root) :].lstrip("/") for path in paths)]
    if shared:
        dist.broadcast_object_list(result)
    return result[0]


@cache
def scan(directory: str, changed: int) -> tuple[list[str], list[str], list[str]]:
    """The files, folders and links to folders in a directory; read again only if it was changed since."""
    with os.scandir(directory) as entries:
        shown = [x for x in entries if not x.name.startswith(".") and x.name != "__MACOSX"]
    # An entry's own is_dir raises where links form a loop.
    links = sorted((x.path for x in shown if x.is_symlink() and os.path.isdir(x.path)), reverse=True)
    folders = [x.path for x in shown if x.is_dir(follow_symlinks=False)]
    # A broken link is skipped and named when it is read; a pipe would wait for ever.
    paths = [x.path for x in shown if x.is_symlink() or x.is_file()]
    return [path for path in paths if path not in links], folders, links


class Folder:
    """The images of a folder: those that metadata files name, with their captions and labels, or all of them,
    with captions from .txt files beside them. Without metadata, subfolders are classes."""

    def __init__(self, path: str):
        self.path, files = path, list_files(path)
        images = [file for file in files if file.rpartition(".")[2].lower() in IMAGES]
        others = sorted(set(files).difference(images))
        metadata = [file for file in others if os.path.basename(file) == "metadata.jsonl"]
        metadata = metadata or [file for file in others if os.path.basename(file) == "metadata.csv"]
        rows = [row for file in metadata for row in read_metadata(path, file)]
        # GenEval's layout has other files of that name.
        if rows and all(fields.get("error", "").endswith("'file_name'") for _, fields in rows):
            say(f"{path}: ignored {metadata[0]}, which has no file_name, and all like it")
            metadata, rows = [], []
        # ---- say what is not used
        suffixes = Counter(os.path.splitext(file)[1].lower() for file in others)
        self.has_texts = bool(suffixes[".txt"]) and not metadata
        unknown = [(n, s) for s, n in suffixes.most_common(9) if s not in (".txt", ".jsonl", ".csv")]
        if unknown:
            counts = ", ".join(f"{count:,} {suffix or 'no suffix'}" for count, suffix in unknown)
            say(f"{path}: ignored files that are no image of a known format: {counts}")
        if metadata:
            named = [image for image, _ in rows]
            if unnamed := len(set(images).difference(named)):
                say(f"{path}: ignored {unnamed:,} images that no metadata file names")
            images = named
        self.images, self.fields = Packed(images), Packed(json.dumps(fields) for _, fields in rows)
        self.identity = f"{len(images):,} images ({short_hash(self.images.content)})"
        # ---- classes
        classes = {image.partition("/")[0] for image in images if not metadata}
        loose = [] if metadata else [image for image in images if "/" not in image]
        in_classes = len(classes) > 1 and not loose
        if loose and len(loose) < len(images) and not self.has_texts:
            say(f"{path}: no classes: {len(loose):,} images are in no subfolder, such as {loose[0]}")
        self.class_names = sorted(classes) if in_classes else None
        self.labels = {name: label for label, name in enumerate(self.class_names or [])}
        if in_classes and all(name.lower() in ("train", *HELD_OUT) for name in classes):
            say(f"{path}: its classes are {', '.join(self.class_names)}; for one of them, give its folder")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict:
        image = self.images[row]
        path = os.path.join(self.path, image)
        fields = {"image": path, "name": path} | (json.loads(self.fields[row]) if self.fields else {})
        if self.class_names:
            fields["label"] = self.labels[image.partition("/")[0]]
        if self.has_texts and (text := Path(path).with_suffix(".txt")).is_file():
            # A caption that cannot be read counts as missing.
            with suppress(OSError):
                fields["text"] = text.read_text("utf-8-sig", errors="replace")
        return fields


def read_metadata(folder: str, file: str) -> Iterator[tuple[str, dict]]:
    """Paths from the folder, and fields, of the rows of a metadata.jsonl or metadata.csv in it."""
    csv.field_size_limit(2**31 - 1)  # a long caption is cut later
    with open(os.path.join(folder, file), encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines) if file.endswith(".csv") else filter(str.strip, lines)
        for number, row in enumerate(rows, start=1):
            try:
                if isinstance(row, str):
                    row = json.loads(row)
                else:
                    row |= {key: int(row[key]) for key in LABELS if (row.get(key) or "").isdecimal()}
                path = PurePosixPath(row["file_name"])
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"file_name leads out of the folder: {path}")
                os.fsencode(path)  # raises ValueError for what no file can be called
                yield str(PurePosixPath(file).parent / path), known_fields(row)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                yield file, {"error": f"row {number} is damaged: {type(error).__name__} {error}"}


class JsonLines:
    """The rows of a .jsonl of conversations."""

    class_names = None

    def __init__(self, path: Path):
        # Where lines start instead of their text, because a file may have gigabytes. Arrays, because every
        # worker would get a copy of a list.
        self.path, self.numbers, self.starts, start = path, array("q"), array("q"), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.numbers.append(number)
                    self.starts.append(start)
                start += len(line)
        self.identity = f"{len(self.starts):,} lines ({short_hash(self.starts.tobytes())})"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> dict:
        name = f"{self.path}: line {self.numbers[row]}"
        with self.path.open("rb") as file:
            file.seek(self.starts[row])
            line = file.readline()
        try:
            fields = json.loads(line)
            images = fields.get("image")
            images = images if isinstance(images, list) else [images]
            # Scale-RAE's files write a missing image in all of these ways.
            images = [image for image in images if image not in (None, "", "None", "nan")]
            if len(images) > 1:
                raise ValueError(f"{len(images)} images in a conversation")
            image = str(self.path.parent / images[0]) if images else None
            return {"name": name, "image": image, "conversations": fields.get("conversations")}
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            return {"name": name, "error": f"damaged json: {type(error).__name__} {error}"}


class LatentFolder:
    """The output of encode.py with random access, shuffled anew in every epoch."""

    def __init__(self, folder: Path, seed: int, transform: Transform):
        self.info = json.loads((folder / "latents.json").read_text())
        # (rows, 1 or 2, N, C) float16; the second view is the mirror image
        # A Mac leaves hidden files, ._NAME, beside those it copies.
        self.parts = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("[!.]*.npy"))]
        text = "".join(path.read_text() for path in sorted(folder.glob("[!.]*.jsonl")))
        self.rows = Packed(text.splitlines())
        self.ends = np.cumsum([len(part) for part in self.parts])
        if not self.rows or not self.ends[-1] == len(self.rows) == self.info["images"]:
            raise ValueError("the number of latents differs from that of captions: encode again")
        shapes = {part.shape[2:] for part in self.parts}
        shape, fields = tuple(self.info["latent_shape"]), {"caption", "label"}
        if shapes != {shape} or any(fields - set(json.loads(row)) for row in self.rows):
            raise ValueError("its files do not fit latents.json: encode again")
        self.views = 2 if transform.flip else 1
        if self.views > self.parts[0].shape[1]:
            raise ValueError("it has no mirror images: encode with --flip, or train without it")
        self.folder, self.seed, self.transform = folder, seed, transform
        self.class_names = self.info.get("class_names")
        self.identity = f"{len(self.rows):,} latents ({short_hash(text.encode(errors='replace'))})"
        self.shuffled = Shuffled(str(folder), len(self.rows), seed)

    def __getitem__(self, number: int) -> dict:
        draws = rng(self.seed, number)
        uniform = draws.random(2)
        return self.shuffled.usable(number, partial(self.sample, uniform=uniform), draws)

    def sample(self, row: int, uniform: np.ndarray) -> dict:
        fields = json.loads(self.rows[row])
        caption, label = fields["caption"], fields["label"]
        conversation = fields.get("conversation") or request(caption or "", uniform[1])
        check_text(f"{self.folder}: row {row}", caption, label, conversation, self.transform)
        part = int(np.searchsorted(self.ends, row, side="right"))
        views = self.parts[part][row - self.ends[part]]  # a negative index: from the end of the part
        latents = np.array(views[int(uniform[0] * self.views)])
        if not np.isfinite(latents).all():
            raise SkipSample(f"{self.folder}: row {row} has latents that are not finite")
        return fields | {"latents": latents, "conversation": conversation}

    def once(self, limit: int | None, rank: int, world_size: int) -> Iterator[dict]:
        raise ValueError(f"{self.folder} holds latents, not images")


# -----------------------------------------------------------------------------------------------------------
# sources that are read in order: tars and tables


class ShardStream:
    """Shards, each a function that yields rows (see `make_sample`), read in order."""

    # Random access is slow in a tar and hopeless over a network. Instead, the shards are dealt anew to the
    # lanes in every epoch, and rows are shuffled within blocks.
    class_names = None  # labels are numbers; no shard says how many classes there are

    def __init__(self, name: str, shards: dict[str, Callable], transform: Transform, seed: int):
        self.name, self.shards, self.transform, self.seed = name, list(shards.values()), transform, seed
        self.identity = f"{len(shards):,} shards ({short_hash(repr([*shards]).encode())})"

    def lane(self, lane: int, lanes: int, epoch=0, turn=0, first=0, taken=0) -> Iterator[dict]:
        """The samples of one lane, without end, from a position on. Every sample carries the position after
        it: the epoch, which of this lane's shards, the first row of a block, rows taken of the block."""
        skipped, empty_epochs = [], 0
        # Every epoch deals other shards to this lane, so one without a usable sample proves little.
        while empty_epochs <= 20:
            shards = rng(self.seed, epoch).permutation(len(self.shards))[lane::lanes].tolist()
            while turn < len(shards):
                for sample in self.samples(epoch, shards[turn], max(CHUNK, BLOCK // lanes), first, taken):
                    skipped += sample.get("skipped", [])
                    if "image" in sample:
                        position = (epoch, turn, *sample["position"])
                        yield sample | {"position": position, "skipped": skipped}
                        skipped, empty_epochs = [], 0
                    elif len(skipped) == MAX_STREAM:
                        reason = f"{MAX_STREAM} unusable samples in a row: {skipped[-1]}"
                        raise ValueError(f"{self.name}: {reason}")
                turn, first, taken = turn + 1, 0, 0
            epoch, turn, empty_epochs = epoch + 1, 0, empty_epochs + 1
        reason = skipped[-1] if skipped else "its shards are empty"
        raise ValueError(f"{self.name}: no usable sample: {reason}")

    def samples(self, epoch: int, shard: int, size: int, first: int, taken: int) -> Iterator[dict]:
        """The samples of one shard, or why they are skipped, with (first, taken) as position, shuffled within
        blocks of `size` rows."""
        rows = itertools.islice(self.read(shard), first, None)
        while block := list(itertools.islice(rows, size)):
            draws = rng(self.seed, epoch, shard, first)
            order, uniform = draws.permutation(len(block)).tolist(), draws.random((len(block), DRAWS))
            for row in order[taken:]:
                taken += 1
                sample = sample_or_reason(block[row], self.transform, uniform[row])
                yield sample | {"position": (first, taken)}
            first, taken = first + len(block), 0

    def read(self, shard: int) -> Iterator[dict]:
        """The rows of a shard in order. A shard that fails midway ends with a row that has the error."""
        try:
            yield from self.shards[shard]()
        except Exception as error:  # from tarfile, pyarrow, the file system or the hub
            reason = f"{type(error).__name__} {error}"
            yield {"name": f"{self.name}: the rest of shard {shard}", "error": reason}

    def once(self, limit: int | None, rank: int, world_size: int) -> Iterator[dict]:
        shards = rng(self.seed).permutation(len(self.shards)).tolist()
        # Without a limit every process reads its own shards. With one, all read the first `limit` rows and
        # decode their own, because the number of rows in a shard is unknown.
        if limit is None:
            shards = shards[rank::world_size]
        rows = (((shard, n), row) for shard in shards for n, row in enumerate(self.read(shard)))
        if limit is not None:
            rows = itertools.islice(rows, rank, limit, world_size)
        for index, row in rows:
            uniform = rng(self.seed, *index).random(DRAWS)
            yield sample_or_reason(row, self.transform, uniform) | {"index": index}


class TailReader:
    """A file that remembers the last 512 bytes, a block of a tar, read from it. Raises ValueError beyond
    `limit`, and for a decompression bomb, with `packed` as the compressed file."""

    def __init__(self, file, packed):
        self.file, self.packed, self.tail, self.size, self.limit = file, packed, b"", 0, MAX_HEADER

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.tail = (self.tail + content)[-512:]
        self.size += len(content)
        if self.size > self.limit:
            raise ValueError(f"a header of more than {MAX_HEADER:,} bytes")
        if self.size > 16 * MAX_FILE and self.size > MAX_RATIO * self.packed.tell():
            raise ValueError(f"{self.size:,} bytes were compressed into {self.packed.tell():,}")
        return content


def tar_rows(url: str) -> Iterator[dict]:
    """The rows of a webdataset tar: consecutive files with the same name up to its first dot are one row."""
    import fsspec

    row: dict = {}
    # Two suffixes that fsspec does not know.
    compression = {"tgz": "gzip", "zstd": "zstd"}.get(url.rpartition(".")[2].lower(), "infer")
    opened = fsspec.open(url, "rb", compression=compression)
    with opened as file:
        reader = TailReader(file, opened.fobjects[0])
        with tarfile.open(fileobj=reader, mode="r|") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep them all
                # It reads long names and attributes into memory, whatever their size.
                reader.limit = reader.size + member.size + MAX_HEADER
                path = PurePosixPath(member.name)
                # macOS writes its attributes of a file before it.
                if not member.isfile() or path.name.startswith("._") or "__MACOSX" in path.parts:
                    continue
                stem, _, extension = path.name.partition(".")
                name = f"{url}: {path.with_name(stem) if stem else path}"
                if row and row["name"] != name:
                    yield row
                    row = {}
                row |= {"name": name} | read_member(tar, member, path, extension.lower())
        # A whole tar ends with zeros. tarfile takes any end of the file for the end of the archive.
        if reader.tail.strip(b"\0"):
            raise EOFError("the file ends in the middle")
        if row:
            yield row


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: PurePosixPath, extension: str) -> dict:
    """What one file in a tar adds to its row: an image, a text, a label (cls) or several fields (json)."""
    if path.is_absolute() or ".." in path.parts:
        return {"error": "unsafe file name"}
    if encodable(member.name) != member.name:
        return {"error": "the file name is not UTF-8"}
    if extension not in (*IMAGES, *CAPTIONS, "cls", "json"):
        is_image = extension.rpartition(".")[2] in IMAGES
        return {"unread": path.name} if is_image else {}
    if member.size > MAX_FILE:
        return {"error": f"{path.name} has {member.size:,} bytes, the limit is {MAX_FILE:,}"}
    content = tar.extractfile(member).read()
    if extension in IMAGES:
        return {"image": content}
    text = content.decode("utf-8-sig", errors="replace")
    if extension in CAPTIONS:
        return {"text": text}
    try:
        return {"label": int(text)} if extension == "cls" else known_fields(json.loads(text))
    except (ValueError, AttributeError, RecursionError) as error:
        return {"error": f"damaged {extension}: {error}"}


def open_table(name: str, path: str, files: list[str] | None = None) -> dict[str, Callable]:
    """The shards of a streamed table, see `ShardStream`; path and files as in `datasets.load_dataset`."""
    from datasets import Image as ImageColumn
    from datasets import load_dataset

    # load_dataset takes file names as glob patterns
    files = files and [glob.escape(file) for file in files]
    table = load_dataset(path, data_files=files, split="train", streaming=True)
    features = table.features or {}
    columns = [key for key, feature in features.items() if isinstance(feature, ImageColumn)]
    if columns:
        table = table.cast_column(columns[0], ImageColumn(decode=False))
    # Tables that `datasets` did not write have bytes, or {bytes, path}, in a column with a usual name.
    columns += [key for key in ("image", *IMAGES) if "binary" in str(features.get(key))]
    if not columns:
        raise ValueError(f"no image column, only {', '.join(features) or 'none'}")
    return {str(n): partial(table_rows, name, table, n, columns[0]) for n in range(table.num_shards)}


def table_rows(name: str, table, shard: int, column: str) -> Iterator[dict]:
    """The rows of one shard of a streamed table, with images as bytes."""
    from datasets.utils.file_utils import xopen

    number = itertools.count()
    # .iter, because plain iteration would divide the rows among the DataLoader's workers.
    for block in table.shard(table.num_shards, shard).iter(CHUNK):  # a list for every column
        for values in zip(*block.values(), strict=True):
            row = dict(zip(block, values, strict=True))
            result = known_fields(row) | {"name": f"{name}: shard {shard}, row {next(number)}"}
            image = row[column] or {}
            if isinstance(image, dict):
                try:
                    image = image.get("bytes") or (image.get("path") and xopen(image["path"], "rb").read())
                except Exception as error:  # from the file system or fsspec, for a strange path
                    result["error"] = f"cannot read the image: {error}"
            yield result | {"image": image}


# -----------------------------------------------------------------------------------------------------------
# --data -> sources


class Mixture:
    """Several sources with weights: every thousand samples have the exact shares, in a random order.

    classes, class_names: number and names of classes, None if no source knows them
    latents: the latents.json of every source of latents; [] for images
    identity: what the sources hold, wherever they lie
    """

    def __init__(self, sources: list, weights: list[float], seed: int):
        # Rounded edges instead of rounded counts: these sum to 1000.
        edges = np.round(1000 * np.cumsum([0.0, *weights]) / sum(weights)).astype(int)
        self.sources, self.counts = sources, np.diff(edges)
        if not self.counts.all():
            raise ValueError(f"the weights {weights} differ too much: every share must be at least 1/1000")
        self.owners = rng(seed).permutation(np.repeat(np.arange(len(sources)), self.counts))
        # How many of the samples before this one, in the same thousand, have the same owner.
        self.earlier = [(self.owners[:n] == owner).sum() for n, owner in enumerate(self.owners)]
        names = [source.class_names for source in sources if source.class_names]
        self.class_names = names[0] if names else None
        self.latents = [source.info for source in sources if isinstance(source, LatentFolder)]
        # Latents that were encoded without names of classes may have their number.
        classes = {len(x) for x in names} | {info["classes"] for info in self.latents if info["classes"]}
        wrong = len(classes) > 1 or any(x != self.class_names for x in names)
        if wrong or len(self.latents) not in (0, len(sources)):
            raise ValueError("cannot mix sources with different classes, or latents with images")
        self.classes = classes.pop() if classes else None
        self.identity = [source.identity for source in sources]

    def need_labels(self, classes: int) -> None:
        """From now on, samples without the label of one of so many classes are skipped."""
        for source in self.sources:
            if not isinstance(source, NanoSource):
                source.transform = replace(source.transform, num_classes=classes)

    def place(self, number: int) -> tuple[int, int]:
        """Which source a sample comes from, and its number there."""
        thousand, rest = divmod(number, 1000)
        owner = int(self.owners[rest])
        return owner, int(thousand * self.counts[owner] + self.earlier[rest])

    def __getitem__(self, number: int) -> dict:
        owner, number_there = self.place(number)
        return self.sources[owner][number_there] | {"index": number}

    def once(self, limit: int | None, rank: int, world_size: int) -> Iterator[dict]:
        """This process's part of one pass over all sources, or over their shares of `limit` samples."""
        for owner, source in enumerate(self.sources):
            share = limit
            if limit is not None:
                share = limit // 1000 * self.counts[owner] + (self.owners[: limit % 1000] == owner).sum()
            for sample in source.once(share, rank, world_size):
                yield sample | {"index": (owner, *sample["index"])}


def open_source(names: str, size: int, seed: int, **options) -> Mixture:
    """The sources of a --data flag, see the top of this file; options of `Transform`."""
    transform = Transform(size, **options)
    sources, weights = [], []
    # The name of a folder may have "," and "=" in it.
    for part in [names] if os.path.exists(names) else names.split(","):
        name, _, text = (part, "", "") if os.path.exists(part) else part.partition("=")
        if not name:
            raise ValueError(f"--data {names!r} has an empty name: give a folder or another source")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"--data {part}: the weight after = must be a number above zero")
        shares = NANO_MIXTURE if name == "nano" else {name: 1.0}
        sources += [open_one(name, transform, seed) for name in shares]
        weights += [weight * share for share in shares.values()]
    return Mixture(sources, weights, seed)


def open_one(name: str, transform: Transform, seed: int):
    """The source of one name: a NanoSource, ImageSource, LatentFolder or ShardStream."""
    path = Path(name)
    try:
        if name == "nano:lessons":
            return NanoLessons(transform.size, seed)
        if name.startswith("nano:"):
            return NanoSource(name.removeprefix("nano:"), transform.size, seed)
        if (path / "latents.json").is_file():
            return LatentFolder(path, seed, transform)
        if path.suffix.lower() == ".jsonl" and path.is_file():
            return ImageSource(name, JsonLines(path), transform, seed)
        if shards := find_shards(name, path):
            return ShardStream(name, shards, transform, seed)
        return ImageSource(name, Folder(name), transform, seed)
    except Exception as error:  # also from pyarrow, datasets or the hub
        raise ValueError(f"cannot open --data {name}: {type(error).__name__}: {error}") from error


def find_shards(name: str, path: Path) -> dict[str, Callable]:
    """The shards of a manifest, folder or hub data set, see `ShardStream`; {} for a folder of images."""
    if path.suffix.lower() == ".json" and path.is_file():
        manifest = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(manifest, dict) or "tars" not in manifest:
            raise ValueError('a .json is a manifest, {"tars": [...]}; conversations are lines of a .jsonl')
        tars = manifest["tars"]
        return {tar: partial(tar_rows, tar if "://" in tar else str(path.parent / tar)) for tar in tars}
    if path.exists():
        # One shard may be named itself.
        folder, files = (path, list_files(name)) if path.is_dir() else (path.parent, [path.name])
        tars = train_split(name, [file for file in files if file.lower().endswith(TARS)])
        tables = [file for file in files if file.lower().endswith(".parquet") and not tars]
        tables = train_split(name, tables)
        images = sum(file.rpartition(".")[2].lower() in IMAGES for file in files)
        if images and (tars or tables):
            shards = f"{len(tars or tables):,} tar or parquet files"
            say(f"{name}: reads its {shards}, not the images beside them ({images:,})")
        if tars:
            return {tar: partial(tar_rows, str(folder / tar)) for tar in tars}
        if not (tables or path.is_dir()):
            raise ValueError("a file of another kind: give its folder, or see the top of data.py")
        return open_table(name, "parquet", [str(folder / table) for table in tables]) if tables else {}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError("no such folder, and no data source of that name: see the top of data.py")
    from huggingface_hub import HfFileSystem

    try:
        # without the name of the data set, which may contain "train" or "test"
        prefix = f"datasets/{name}/"
        files = [file.removeprefix(prefix) for file in HfFileSystem().glob(f"{prefix}**/*.tar")]
        tars = train_split(name, files)
        shards = {prefix + tar: partial(tar_rows, f"hf://{prefix}{tar}") for tar in tars}
        return shards or open_table(name, name)
    except Exception as error:  # from datasets or the hub
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"no such folder, and no data set of the hub that can be read: {reason}") from error


def train_split(name: str, files: list[str]) -> list[str]:
    """The files without those for validation and tests, if names say that some are for training."""
    words = [set(re.split("[^a-z]+", file.lower())) for file in files]
    in_train = [any(word.startswith("train") for word in some) for some in words]
    in_test = [bool(some & HELD_OUT) for some in words]
    if not any(in_train):
        if files and all(in_test):
            say(f"{name} has only files for validation or tests: they are used")
        return files
    return [file for file, train, test in zip(files, in_train, in_test, strict=True) if train or not test]


# -----------------------------------------------------------------------------------------------------------
# batches


def collate(samples: list[dict]) -> dict:
    """A batch of B samples, P of which have an image:

    caption, label, conversation, index: lists of B
    image_index: list of P, the index of every sample with an image
    image or latents: (P, 3, H, W) uint8 or (P, N, C) float32
    positions, skipped: for a checkpoint; reasons for skipped samples
    """
    batch = {key: [sample[key] for sample in samples] for key in PER_SAMPLE}
    # Every source ensures one <image> in the conversation for an image, and none for none.
    with_image = [sample for sample in samples if "<image>" in str(sample["conversation"])]
    batch["image_index"] = [sample["index"] for sample in with_image]
    key = "latents" if "latents" in samples[0] else "image"
    # Without any image, stack the black ones and drop them all: the shape of an image stays, P = 0.
    stack = torch.from_numpy(np.stack([sample[key] for sample in with_image or samples]))[: len(with_image)]
    batch[key] = stack.float() if key == "latents" else stack.permute(0, 3, 1, 2)
    batch |= {"positions": {}, "skipped": []}
    for sample in samples:
        batch["positions"] |= sample.get("position", {})
        batch["skipped"] += sample.get("skipped", [])
    return batch


class Loader(Iterator):
    """The batches of a training run (see `collate`), one per step, without end.

    workers: processes that prepare batches ahead; 0 prepares them in this process
    positions: how far the lanes were read for the batches yielded so far; a checkpoint stores it
    skipped, waited: reasons for skipped samples, and seconds spent waiting; the caller resets them
    """

    def __init__(self, source: Mixture, batch: int, workers=1, start=0, rank=0, world_size=1, positions=None):
        self.source, self.args, self.step, self.workers = source, (batch, rank, world_size), start, workers
        self.skipped, self.waited, self.positions, self.deaths = [], 0.0, positions or {}, Counter()
        self.begin()

    def begin(self) -> None:
        """Starts workers at the current step."""
        batch, rank, world_size = self.args
        lanes = Lanes(self.source, batch, self.step, rank, world_size, self.positions)
        self.positions, self.parts = lanes.positions, min(self.workers, len(lanes.local)) or 1
        if self.parts < min(self.workers, batch // world_size):
            say(f"--workers {self.workers}: only {self.parts} per process have shards to read")
        self.batches = receive(lanes.batches, self.parts if self.workers else 0, self.deaths)

    def __next__(self) -> dict:
        started, parts, deaths = time.perf_counter(), [], 0
        while not parts:
            # DataLoader takes turns between its workers, and every worker makes one part of every batch.
            try:
                parts = [next(self.batches) for _ in range(self.parts)]
            except WorkerDied as error:
                deaths += 1
                if deaths == MAX_DEATHS:
                    raise
                print(f"{error}: its work begins again", file=sys.stderr)
                self.begin()
        self.step += 1
        batch = {key: [x for part in parts for x in part[key]] for key in (*PER_SAMPLE, "image_index")}
        key = "latents" if "latents" in parts[0] else "image"
        batch[key] = torch.cat([part[key] for part in parts])
        # Only pinned memory is copied to a GPU while it computes.
        if torch.cuda.is_available():
            batch[key] = batch[key].pin_memory()
        for part in parts:
            self.positions |= part["positions"]
            self.skipped += part["skipped"]
        self.waited += time.perf_counter() - started
        return batch


class Lanes:
    """This process's part of every global batch."""

    # A batch consists of lanes of equal width: as many as there are shards, or fewer so that they divide the
    # batch. Every process has a range of the lanes, and each of its workers a part of that range. A lane
    # keeps its shards and its places in the batch, whoever reads it: so the world size may change on resume.

    def __init__(self, source: Mixture, batch: int, start: int, rank: int, world_size: int, positions: dict):
        if batch % world_size:
            raise ValueError(f"a global batch of {batch} cannot be split over {world_size} processes")
        streams = [part for part in source.sources if isinstance(part, ShardStream)]
        shards = min((len(stream.shards) for stream in streams), default=batch)
        count = max(n for n in range(1, shards + 1) if batch % n == 0)
        if streams and shards % count:
            lanes = f"{shards} shards in {count} unequal lanes"
            say(f"batch {batch}: {lanes}: rows come equally often only on average")
        if count % world_size:
            lanes = f"{shards} shards in {count} lanes, which cannot be split over {world_size} processes"
            raise ValueError(f"batch {batch} reads {lanes}: choose another --batch, or write more shards")
        self.source, self.batch, self.start, self.count = source, batch, start, count
        self.local = range(rank * count // world_size, (rank + 1) * count // world_size)
        # Streams by their place in the mixture and by what they hold: data may move, or be other data.
        self.keys = {stream: f"{source.sources.index(stream)} {stream.identity}" for stream in streams}
        self.positions, names = {}, {key: stream.name for stream, key in self.keys.items()}
        for key, position in positions.items():
            stream, lane, saved_count = key.rsplit("|", 2)
            if stream in names and int(saved_count) != count:
                name = f"{names[stream]} in {saved_count} lanes"
                raise ValueError(f"the checkpoint has {name}: resume with its --batch")
            if stream in names and int(lane) in self.local:
                self.positions[key] = position

    def batches(self, worker: int, workers: int) -> Iterator[dict]:
        """What one worker process makes of every batch."""
        width, size = self.batch // self.count, len(self.local)
        lanes = self.local[size * worker // workers : size * (worker + 1) // workers]
        streams: dict[str, Iterator[dict]] = {}
        for first in itertools.count(self.start * self.batch, self.batch):
            numbers = range(first + lanes.start * width, first + lanes.stop * width)
            yield collate([self.sample(number, number % self.batch // width, streams) for number in numbers])

    def sample(self, number: int, lane: int, streams: dict[str, Iterator[dict]]) -> dict:
        """Sample `number`, of a source with random access, or the next one of the lane's stream."""
        owner, _ = self.source.place(number)
        source = self.source.sources[owner]
        if not isinstance(source, ShardStream):
            return self.source[number]
        key = f"{self.keys[source]}|{lane}|{self.count}"
        if key not in streams:
            streams[key] = source.lane(lane, self.count, *self.positions.get(key, ()))
        sample = next(streams[key])
        return sample | {"index": number, "position": {key: sample["position"]}}


class OnePass:
    """This process's part of one pass over the source: batches of at most `batch` samples, see `collate`.

    limit: number of samples over all processes (None: all); a source without end needs one
    index: tuples; sorting by them restores the order of the whole pass
    skipped: reasons for the samples skipped so far
    """

    def __init__(self, source: Mixture, batch: int, limit=None, workers=1, rank=0, world_size=1):
        self.source, self.batch, self.limit, self.workers = source, batch, limit, workers
        self.rank, self.world_size, self.skipped = rank, world_size, []

    def batches(self, worker: int, workers: int) -> Iterator[dict]:
        """What one worker process makes; only "skipped" if no sample of a batch can be used."""
        # a few shards go to the first workers of all processes, not to all workers of the first process
        part = worker * self.world_size + self.rank
        samples = self.source.once(self.limit, part, self.world_size * workers)
        while block := list(itertools.islice(samples, self.batch)):
            usable = [sample for sample in block if "image" in sample]
            skipped = [reason for sample in block for reason in sample.get("skipped", [])]
            yield (collate(usable) if usable else {}) | {"skipped": skipped}

    def __iter__(self) -> Iterator[dict]:
        for batch in receive(self.batches, self.workers, Counter()):
            self.skipped += batch["skipped"]
            if "index" in batch:
                yield batch


WATCH = None  # in a worker process: its note, and how often workers died on which sample before it started


def watch(name: str) -> None:
    """Notes that this worker process reads a sample. Raises SkipSample if two have died on it."""
    if WATCH is None:
        return
    note, deaths = WATCH
    key = encodable(name)[-100:]
    if deaths[key] > 1:
        raise SkipSample(f"{name}: two worker processes died on it")
    note.value = f"{os.getpid()} {key}".encode()


class WorkerDied(OSError):
    """A worker process was killed, mostly for memory, or crashed in a decoder."""


class PerWorker(IterableDataset):
    """The batches of `make(worker, workers)` in a worker process, or of `make(0, 1)` in the main one."""

    def __init__(self, make: Callable[[int, int], Iterator[dict]], notes: list, deaths: Counter):
        self.make, self.notes, self.deaths = make, notes, deaths

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        if info is None:
            return self.make(0, 1)
        # Ctrl-C and torchrun signal the whole process group of the trainer, which stops its workers itself.
        os.setpgrp()
        global WATCH
        WATCH = self.notes[info.id], self.deaths
        return self.make(info.id, info.num_workers)


def receive(make: Callable[[int, int], Iterator[dict]], workers: int, deaths: Counter) -> Iterator[dict]:
    """Batches of `workers` processes, made ahead, or of this one (0). Raises OSError after TIMEOUT seconds
    without data, and WorkerDied, whose sample is counted in `deaths`."""
    # What each worker reads, in shared memory that outlives it.
    notes = [multiprocessing.Array("c", 600, lock=False) for _ in range(workers)]
    # Four batches ahead even out slow reads; PyTorch refuses both options without workers. Only at a timeout
    # does it look whether a worker is alive.
    ahead = {"prefetch_factor": 4, "timeout": min(CHECK, TIMEOUT)} if workers else {}
    loader = DataLoader(PerWorker(make, notes, deaths), batch_size=None, num_workers=workers, **ahead)
    handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    batches, last = iter(loader), time.monotonic()
    # When a worker dies, PyTorch's handler raises wherever the trainer is, such as in the middle of a step.
    signal.signal(signal.SIGCHLD, handler)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error)
            # A dead worker's batches cannot be received: it would hand over their shared memory.
            lost = isinstance(error, (ConnectionError, FileNotFoundError, EOFError))
            if workers and "Caught" not in reason and (lost or "exited unexpectedly" in reason):
                raise WorkerDied(f"a data worker died, reading {blame(notes, deaths)}") from error
            if not isinstance(error, RuntimeError):
                raise
            if reason.startswith("DataLoader timed out"):
                if time.monotonic() < last + TIMEOUT:
                    continue
                reason = f"no data for {TIMEOUT} s"
            raise OSError(f"data loading failed: {reason}") from error
        yield batch
        last = time.monotonic()


def blame(notes: list, deaths: Counter) -> str:
    """Counts and returns the samples that dead workers read."""
    time.sleep(0.1)  # a process that is killed takes a moment to end
    alive = {child.pid for child in multiprocessing.active_children()}
    parts = [note.value.decode(errors="replace").partition(" ") for note in notes]
    names = [name for pid, _, name in parts if name and int(pid) not in alive]
    deaths.update(names)
    return ", ".join(names) or "no image"


# -----------------------------------------------------------------------------------------------------------
# what the trainers do with a batch


def micro_batches(batch: dict, count: int) -> list[dict]:
    """The batch split into `count` micro-batches of nearly equal numbers of samples, at least one in each."""
    if count == 1:
        return [batch]
    # Conversations of similar length share a micro-batch, so that little is padded.
    lengths = [sum(len(text) for _, text in turns) for turns in batch["conversation"]]
    order = np.argsort(lengths, kind="stable")
    image_rows = {index: row for row, index in enumerate(batch["image_index"])}
    result = []
    for part in np.array_split(order, min(count, len(order))):
        samples = part.tolist()
        indices = [batch["index"][row] for row in samples]
        images = [image_rows[index] for index in indices if index in image_rows]
        micro_batch = {}
        for key, values in batch.items():
            rows = images if key in PER_IMAGE else samples
            if isinstance(values, torch.Tensor):
                chosen = values[rows]
                micro_batch[key] = chosen.pin_memory() if values.is_pinned() else chosen
            else:
                micro_batch[key] = [values[row] for row in rows]
        result.append(micro_batch)
    return result


def to_unit(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images -> fp32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


def flow_draws(
    latent_shape: tuple[int, int], seed: int, indices: list[int], device: torch.device, draws: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random numbers for flow matching: noise (B, N, C) on the device, and on the CPU two tensors (B,) in
    [0, 1), for the timestep and for condition dropout. They depend on (seed, sample index) only. With several
    `draws` there are draws * B rows, the first of every sample first."""
    seeds = [seed] + [hash_seed(seed, "draw", k) for k in range(1, draws)]
    noise = torch.empty(draws * len(indices), *latent_shape, device=device)
    generator = torch.Generator(device)
    for row, (draw_seed, index) in enumerate(itertools.product(seeds, indices)):
        noise[row].normal_(generator=generator.manual_seed(hash_seed(draw_seed, index)))
    uniform = torch.cat([uniform_draws(2, draw_seed, indices, 1) for draw_seed in seeds], dim=1)
    return noise, uniform[0], uniform[1]


def uniform_draws(count: int, seed: int, indices: list[int], purpose: int | str) -> torch.Tensor:
    """(count, B) numbers in [0, 1) that depend on (seed, sample index, purpose) only."""
    uniform, generator = torch.empty(count, len(indices)), torch.Generator()
    for column, index in enumerate(indices):
        uniform[:, column].uniform_(generator=generator.manual_seed(hash_seed(seed, index, purpose)))
    return uniform
