"""Images, captions and conversations in, batches out.

A source is named by --data, several by a list with weights:

    nano                           the synthetic world of nano/shapes.py: objects, scenes and text
    nano:objects                   one of its domains, or nano:classes, single objects with a class label
    nano:counting                  or one of the six tasks of its objects
    path/to/folder                 images; captions in its metadata.jsonl ({"file_name": ..., "text": ...}),
                                   or a folder for each class, as ImageNet has them
    path/to/shards                 a folder of .tar (jpg, png or webp beside txt, cls or json) or of .parquet
    path/to/latents                what encode.py wrote: latents instead of images
    path/to/file.jsonl             conversations: lines of {"image": a path from the file's folder, or null,
                                   "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}
    path/to/wds_manifest.json      {"dataset_name": ..., "tars": [paths from its folder, or URLs]}
    org/name                       a data set of the Hugging Face hub, streamed
    web=0.7,synthetic=0.2,nano=0.1 a mixture

A json in a tar and a row of a table may have "conversations" instead of a caption. Where the image belongs
in a conversation it says <image>: in an answer it is to be drawn, in a question to be looked at. Captions
become conversations in which they are asked for.

Every sample has a number, place j of step s of a training of global batch B the number s B + j, and what it
is depends on the seed and its number alone, whatever the number of processes and workers. `nano` and folders
of images are maps from numbers to samples. Shards are read in order instead: they are dealt out to lanes,
each of which serves its own places of every batch, and a checkpoint holds how far every lane has come.

Loader makes the batches of a training, without an end. Once goes through a whole data set, every sample one
time, for an evaluation or for statistics.

Samples that cannot be used are left out, and named in the batch that follows.
"""

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Resampling
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

REQUESTS = ("Generate an image of {}", "Can you draw {}?", "Please make an image of {}", "Show me {}")
NANO_MIXTURE = {"nano:objects": 0.7, "nano:scenes": 0.15, "nano:text": 0.15}
PIXELS = 2**26  # an image of more is refused before it is decoded
STRIP = 50  # and so is one of that ratio of sides: resized by its short one it would fill the memory
BYTES = 2**26  # and so is a file in a tar of more
CHARACTERS = 1000  # of a caption; the rest is cut off
CONVERSATION = 2**15  # characters of one; of more it is left out. Tokens are for the trainer to count
SPECIAL = r"<\|\w+\|>|<im_\w+>"  # looks like a token of a language model; <image> is text
PER_SAMPLE = ("caption", "label", "conversation", "index")  # of a batch, one for each sample
PER_IMAGE = ("image_index", "image", "latents")  # and one for each image: numbers of samples, and a tensor
DRAWS = 4  # uniform numbers for a sample: wording of the request, place of the crop (2), mirroring
BLOCK = 64  # rows of a shard that are shuffled together
STALL = 300  # seconds without data after which a training gives up
IMAGES = ("jpg", "jpeg", "png", "webp")
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
)  # and none that runs another program, as EPS does
CAPTIONS = ("text", "caption", "txt", "prompt")
LABELS = ("label", "cls")


class SkipSample(ValueError):
    """A sample that is left out: which one, and why."""


def hash_seed(*keys: int | str) -> int:
    """A 63-bit number from integers, the same everywhere: seeds that share nothing."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


# -----------------------------------------------------------------------------------------------------------
# one sample


def request(caption: str, uniform: float) -> list[tuple[str, str]]:
    """A caption as a conversation in which it is asked for, by one of several wordings."""
    template = REQUESTS[int(uniform * len(REQUESTS))]
    return [("user", template.format(caption)), ("assistant", "Here you go:\n<image>")]


def requested_caption(conversation: list[tuple[str, str]]) -> str | None:
    """What image a conversation asks for: the turn before the answer with it, without the wording of
    `request`. None if it asks for none."""
    for (_, text), (role, answer) in itertools.pairwise(conversation):
        if role == "assistant" and "<image>" in answer:
            for head, tail in (template.split("{}") for template in REQUESTS):
                if text.startswith(head):
                    return clean(text.removeprefix(head).removesuffix(tail))
            return clean(text)
    return None


def shows(sample: dict) -> bool:
    """Whether there is an image in it. The rule of every source: one image, one <image>, or neither."""
    return any("<image>" in text for _, text in sample["conversation"])


def clean(caption: str) -> str:
    """Its first 1,000 characters, without anything that looks like a special token, such as <image> or
    <|im_end|>, or cannot be written as UTF-8."""
    return re.sub(r"<\|?\w+\|?>", " ", writable(caption[:CHARACTERS])).strip()


def writable(text: str) -> str:
    """Half a surrogate pair, which JSON can say and tokenizers raise at, becomes a question mark."""
    return text.encode(errors="replace").decode()


def turns_of(row: dict) -> list[tuple[str, str]]:
    """The (role, text) turns of a row's "conversations", human and gpt by turns. Raises Unusable for any
    others, and for another number of <image> than of images. A first turn that is not the human's is
    dropped, as in the reference: every chat gets the same system turn."""
    name, roles = row["name"], {"human": "user", "gpt": "assistant"}
    try:
        turns = [(turn["from"], writable(turn["value"])) for turn in row["conversations"]]
    except (TypeError, KeyError, AttributeError):
        raise SkipSample(f"{name}: its conversation is no list of turns {{from, value}}") from None
    turns = turns[1:] if turns and turns[0][0] != "human" else turns
    texts = [text for _, text in turns]
    if not turns or [speaker for speaker, _ in turns] != [*roles] * (len(turns) // 2):
        raise SkipSample(f"{name}: its turns are not those of human and gpt by turns")
    if not all(map(str.strip, texts)):
        raise SkipSample(f"{name}: a turn is empty")
    if (length := sum(map(len, texts))) > CONVERSATION:
        raise SkipSample(f"{name}: its conversation has {length:,} characters, the limit is {CONVERSATION:,}")
    if found := re.search(SPECIAL, "\n".join(texts)):
        raise SkipSample(f"{name}: its conversation contains the special token {found[0]}")
    placeholders, images = sum(text.count("<image>") for text in texts), int(bool(row.get("image")))
    if placeholders != images:
        raise SkipSample(f"{name}: its conversation has {placeholders} <image> for {images} images")
    return [(roles[speaker], text) for speaker, text in turns]


def open_image(source: str | bytes, name: str = "") -> Image.Image:
    """The RGB image of a file, given by its path or as its bytes. Raises Unusable for what is none, for
    more than 67 megapixels, and for strips."""
    name = name or (source if isinstance(source, str) else "image")
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            if image.width * image.height > PIXELS:
                raise SkipSample(f"{name} has {image.width} x {image.height} pixels, the limit is {PIXELS:,}")
            if max(image.size) > STRIP * min(image.size):
                raise SkipSample(f"{name} is a strip of {image.width} x {image.height} pixels")
            return image.convert("RGB")
    except FileNotFoundError:
        raise SkipSample(f"no image at {name}") from None
    except SkipSample:
        raise
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise SkipSample(f"{name} is no image that can be read{reason}") from None
    except Exception as error:  # a damaged file can raise anything inside of a decoder
        raise SkipSample(f"{name} is damaged: {type(error).__name__} {error}") from None


def open_metadata(path: str) -> dict[str, str]:
    """The texts in a PNG; nothing of a file that is none."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return dict(image.text)
    except (UnidentifiedImageError, OSError):
        return {}


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centred square of an RGB image, as evaluations take it (ADM): halved while the short side is at
    least 2 size, resized to a short side of size, cropped. (size, size, 3) uint8."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    image = image.resize(short_side(image, size), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def random_crop(image: Image.Image, size: int, across: float, down: float) -> np.ndarray:
    """A square of an RGB image that was resized to a short side of 1.5 size (RAE, stage 1); its place comes
    from two uniform numbers. (size, size, 3) uint8.

    Only the square itself is computed, from its box in the image: five times faster, the same up to the
    rounding of pixels.
    """
    width, height = short_side(image, size * 3 // 2)
    left, top = int(across * (width - size + 1)), int(down * (height - size + 1))
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return np.array(image.resize((size, size), Resampling.BICUBIC, box=box))


def short_side(image: Image.Image, side: int) -> tuple[int, int]:
    """The width and height of an image whose short side is resized to `side`."""
    scale = side / min(image.size)
    return round(image.width * scale), round(image.height * scale)


class Transform(NamedTuple):
    """What is taken of an image: a square of that side, which one, and whether half of them are mirrored."""

    size: int
    crop: str = "centre"  # or random
    flip: bool = False
    text_only: bool = False  # conversations without an image are samples too
    length: Callable[[list], int] | None = None  # tokens of a conversation
    max_seq_len: int = 0  # of more it is left out

    def pixels(self, image: Image.Image, across: float, down: float, mirror: float) -> np.ndarray:
        """(size, size, 3) uint8 of an RGB image, decided by three uniform numbers."""
        if self.crop == "centre":
            square = centre_crop(image, self.size)
        else:
            square = random_crop(image, self.size, across, down)
        return np.ascontiguousarray(square[:, ::-1]) if self.flip and mirror < 0.5 else square

    def check_length(self, name: str, conversation: list[tuple[str, str]]) -> None:
        """Raises Unusable."""
        if (length := self.length(conversation)) > self.max_seq_len:
            raise SkipSample(f"{name}: its conversation has {length} tokens, the limit is {self.longest}")


def sample_of(row: dict, view: Transform, uniform: np.ndarray) -> dict:
    """A sample from a row {"name", perhaps "image": path or bytes, perhaps conversations, or a caption and a
    label} and DRAWS uniform numbers; or Unusable. One that is only text has a black image, which `collate`
    leaves out, and one of a conversation has no caption."""
    if "error" in row:
        raise SkipSample(f"{row['name']}: {row['error']}")
    talks, caption = "conversations" in row, None
    if talks:
        conversation = turns_of(row)
    else:
        caption = clean(next((row[key] for key in CAPTIONS if isinstance(row.get(key), str)), ""))
        conversation = request(caption, uniform[0])
    if view.length:
        view.check_length(row["name"], conversation)
    if row.get("image"):
        image = view.pixels(open_image(row["image"], row["name"]), *uniform[1:])
    elif talks and view.text_only:
        image = np.zeros((view.size, view.size, 3), np.uint8)
    else:
        raise SkipSample(f"{row['name']}: no image")
    label = next((row[key] for key in LABELS if isinstance(row.get(key), int)), None)
    return {"image": image, "caption": caption, "label": label, "conversation": conversation}


def try_sample(row: dict, view: Transform, *keys: int) -> dict:
    """A sample whose draws depend on the keys, or without one only {"skipped": [the reason]}."""
    try:
        return sample_of(row, view, np.random.default_rng(hash_seed(*keys)).random(DRAWS))
    except SkipSample as error:
        return {"skipped": [str(error)]}


# -----------------------------------------------------------------------------------------------------------
# sources


class NanoSource:
    """One domain of the nano world: a map without an end. A share of the samples, `understanding`, is a
    question about the image instead of a request for it."""

    def __init__(self, domain: str, size: int, seed: int, understanding: float = 0.0):
        from nano import shapes

        domains = (*shapes.DOMAINS, *shapes.TASKS, "classes")
        if domain not in domains:
            raise ValueError(f"nano has no domain {domain!r}: choose from {', '.join(domains)}")
        self.draw, self.domain, self.size = shapes.draw, domain, size
        self.seed, self.understanding = seed, understanding
        self.classes = len(shapes.PAIRS) if domain == "classes" else None

    def __getitem__(self, number: int) -> dict:
        uniform = np.random.default_rng(hash_seed(self.seed, number)).random(2)
        sample = self.draw(self.domain, self.seed, number, self.size)
        conversation = request(sample.caption, uniform[1])
        if uniform[0] < self.understanding:
            question, answer = sample.questions[int(uniform[1] * len(sample.questions))]
            conversation = [("user", f"<image>\n{question}"), ("assistant", answer)]
        return {
            "image": sample.image,
            "caption": sample.caption,
            "label": sample.label,
            "conversation": conversation,
        }

    def once(self, limit: int | None, rank: int, world: int) -> Iterator[dict]:
        if limit is None:
            raise ValueError(f"nano:{self.domain} has no end: give a limit")
        for number in range(rank, limit, world):
            yield self[number] | {"index": (number,)}


class Shuffled:
    """Which of `count` rows a sample takes: all of them, then all again in another order."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch, self.order = count, seed, -1, np.empty(0)

    def row(self, number: int) -> int:
        epoch, position = divmod(number, self.count)
        if self.epoch != epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng(hash_seed(self.seed, epoch)).permutation(self.count),
            )
        return int(self.order[position])


class Folder:
    """The rows of a folder of images, through the `imagefolder` reader of `datasets`."""

    def __init__(self, path: str):
        from datasets import Image as Column
        from datasets import load_dataset

        rows = load_dataset("imagefolder", data_dir=path, split="train")
        self.classes = getattr(rows.features.get("label"), "num_classes", None)  # by the folders' names
        self.rows = rows.cast_column("image", Column(decode=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        found = self.rows[row]
        path = found["image"]["path"]
        return found | {"image": path, "name": path}


class JsonLines:
    """The rows of a .jsonl of conversations, of which only the places are kept in memory."""

    classes = None

    def __init__(self, path: Path):
        with path.open("rb") as file:
            lengths = np.fromiter((len(line) if line.strip() else -len(line) for line in file), np.int64)
        self.path, self.starts = path, np.cumsum(abs(lengths)) - abs(lengths)
        self.lines = np.flatnonzero(lengths > 0)  # without blank ones

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> dict:
        line = int(self.lines[row])
        name = f"{self.path}: line {line + 1}"
        with self.path.open("rb") as file:
            file.seek(self.starts[line])
            text = file.readline()
        try:
            fields = json.loads(text)
            images = fields.get("image")
        except (ValueError, AttributeError, RecursionError) as error:
            return {"name": name, "error": f"damaged json: {error}"}
        images = images if isinstance(images, list) else [images]
        images = [image for image in images if image not in (None, "", "None", "nan")]  # as in the reference
        if len(images) > 1 or not all(isinstance(image, str) for image in images):
            return {"name": name, "error": "its image is not one path"}
        image_path = str(self.path.parent / images[0]) if images else None
        return {"name": name, "image": image_path, "conversations": fields.get("conversations")}


def usable(use: Callable, row: int, rows: int, chance: np.random.Generator, name: str | Path) -> dict:
    """`use(row)`, or that of another row drawn by `chance` for as long as it is Unusable."""
    skipped = []
    while len(skipped) < 100:
        try:
            return use(row) | {"skipped": skipped}
        except SkipSample as error:
            skipped.append(str(error))
            row = int(chance.integers(rows))
    raise ValueError(f"{name}: 100 images or conversations in a row cannot be used, the last: {skipped[-1]}")


class ImageSource:
    """Rows that have a number: a map that starts over without an end, in another order each time. For a row
    that cannot be used another one is drawn.

    rows: see `sample_of`.
    """

    def __init__(self, name: str, rows: Folder | JsonLines, view: Transform, seed: int):
        if not len(rows):
            raise ValueError(f"{name} is empty")
        self.name, self.rows, self.view, self.seed, self.classes = name, rows, view, seed, rows.classes
        self.shuffled = Shuffled(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        chance = np.random.default_rng(hash_seed(self.seed, number, 0))

        def use(row: int) -> dict:
            return sample_of(self.rows[row], self.view, chance.random(DRAWS))

        return usable(use, self.shuffled.row(number), len(self.rows), chance, self.name)

    def once(self, limit: int | None, rank: int, world: int) -> Iterator[dict]:
        order = np.random.default_rng(hash_seed(self.seed)).permutation(len(self.rows)).tolist()
        for row in order[:limit][rank::world]:  # the first files of a folder are one class
            yield try_sample(self.rows[row], self.view, self.seed, row) | {"index": (row,)}


class ShardStream:
    """Shards that are read in order: rows are shuffled within blocks, and shards before each pass over them.

    shards: functions that yield rows, see `sample_of`.
    """

    classes = None  # labels are numbers, nobody says how many

    def __init__(self, name: str, shards: list, view: Transform, seed: int):
        self.name, self.shards, self.view, self.seed = name, shards, view, seed

    def lane(self, lane: int, lanes: int, epoch=0, turn=0, first=0, taken=0) -> Iterator[dict]:
        """The samples of one of `lanes` without an end, from a position on: the pass, which shard of this
        lane's in that pass, the first row of a block, and how many rows of the block are done. Each sample
        comes with the position behind it."""
        skipped, empty = [], 0
        while empty <= 20:  # passes of this lane, over other shards each time
            shards = np.random.default_rng(hash_seed(self.seed, epoch)).permutation(len(self.shards))[
                lane::lanes
            ]
            while turn < len(shards):
                for sample in self.rows(epoch, int(shards[turn]), first, taken, skipped):
                    sample["position"] = (epoch, turn, *sample["position"])
                    yield sample | {"skipped": list(skipped)}
                    skipped.clear()
                    empty = 0
                turn, first, taken = turn + 1, 0, 0
            epoch, turn, empty = epoch + 1, 0, empty + 1
        reason = skipped[-1] if skipped else "its shards are empty"
        raise ValueError(f"{self.name}: nothing in it can be used: {reason}")

    def rows(self, epoch: int, shard: int, first: int, taken: int, skipped: list[str]) -> Iterator[dict]:
        """The samples of one shard, block by block, each with the last two numbers of its position."""
        rows, block = itertools.islice(self.read(shard), first, None), [None]
        while block:
            block = list(itertools.islice(rows, BLOCK))
            chance = np.random.default_rng(hash_seed(self.seed, epoch, shard, first))
            order, uniform = chance.permutation(len(block)).tolist(), chance.random((len(block), DRAWS))
            for done, row in enumerate(order[taken:], start=taken + 1):
                try:
                    yield sample_of(block[row], self.view, uniform[row]) | {"position": (first, done)}
                except SkipSample as error:
                    skipped.append(str(error))
            first, taken = first + len(block), 0

    def read(self, shard: int) -> Iterator[dict]:
        """The rows of a shard in order. One that cannot be read further ends with a row that says so."""
        try:
            yield from self.shards[shard]()
        except Exception as error:  # from tarfile, pyarrow, the file system or the hub
            name = f"{self.name}: the rest of shard {shard}"
            yield {"name": name, "error": f"{type(error).__name__} {error}"}

    def once(self, limit: int | None, rank: int, world: int) -> Iterator[dict]:
        """Without a limit every process reads its own shards; with one, since nobody knows how many rows a
        shard has, all read the first `limit` rows and decode their own."""
        shards = np.random.default_rng(hash_seed(self.seed)).permutation(len(self.shards)).tolist()
        shards = shards[rank::world] if limit is None else shards
        rows = (((shard, n), row) for shard in shards for n, row in enumerate(self.read(shard)))
        for index, row in rows if limit is None else itertools.islice(rows, rank, limit, world):
            yield try_sample(row, self.view, self.seed, *index) | {"index": index}


def tar_rows(url: str) -> Iterator[dict]:
    """Rows of a webdataset tar: files in a row that share a name up to its first dot are one sample. Nothing
    is unpacked to the disk."""
    import fsspec

    with (
        fsspec.open(url, "rb", compression="infer") as file,
        tarfile.open(fileobj=(end := Tail(file)), mode="r|") as tar,
    ):
        row: dict = {}
        for member in tar:
            if not member.isfile():
                continue
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            key = str(path.with_name(stem)) if stem else member.name
            name = f"{url}: {key}"
            if row and row["name"] != name:
                yield row
                row = {}
            row.setdefault("name", name)
            if path.is_absolute() or ".." in path.parts:
                row["error"] = "an unsafe name"
            elif member.size > BYTES:
                row["error"] = f"{path.name} has {member.size:,} bytes, the limit is {BYTES:,}"
            elif extension.lower() in IMAGES:
                row["image"] = tar.extractfile(member).read()
            elif extension.lower() in (*CAPTIONS, "cls", "json"):
                row |= text_fields(tar.extractfile(member).read(), extension.lower())
        if end.tail.strip(b"\0"):  # tarfile takes the end of the file for the end of the archive
            raise EOFError("the file ends in the middle")
        if row:
            yield row


class Tail:
    """A file that remembers the last bytes read of it."""

    def __init__(self, file):
        self.file, self.tail = file, b""

    def read(self, size: int) -> bytes:
        content = self.file.read(size)
        self.tail = (self.tail + content)[-512:]  # zeros where a tar is whole
        return content


def text_fields(text: bytes, extension: str) -> dict:
    """The captions, conversations and the label among the fields of a json file, the label of a cls, the text
    of others."""
    if extension not in ("cls", "json"):
        return {"text": text.decode("utf-8", errors="replace")}
    try:
        if extension == "cls":
            return {"label": int(text)}
        fields = json.loads(text)
        found = {key: fields[key] for key in CAPTIONS if isinstance(fields.get(key), str)}
        found |= {key: fields[key] for key in LABELS if isinstance(fields.get(key), int)}
        return found | ({"conversations": fields["conversations"]} if "conversations" in fields else {})
    except (ValueError, AttributeError, RecursionError) as error:
        return {"error": f"damaged {extension}: {error}"}


def table_rows(name: str, table, shard: int, column: str) -> Iterator[dict]:
    """Rows of one shard of a streamed table of `datasets`, with its images as bytes."""
    from datasets.utils.file_utils import xopen

    number = 0
    for rows in table.shard(table.num_shards, shard).iter(BLOCK):  # plain iteration deals rows to workers
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            image = row[column]
            if isinstance(image, dict):
                image = image["bytes"] or (image["path"] and xopen(image["path"], "rb").read())
            yield row | {"name": f"{name}: shard {shard}, row {number}", "image": image}
            number += 1


def open_table(name: str, **kwargs) -> list:
    """The shards of a streamed data set with a column of images."""
    from datasets import Image as Column
    from datasets import Value, load_dataset

    def holds_bytes(kind) -> bool:
        return kind == Value("binary") or (isinstance(kind, dict) and kind.get("bytes") == Value("binary"))

    table = load_dataset(split="train", streaming=True, **kwargs)
    features = table.features or {}
    columns = [key for key, kind in features.items() if isinstance(kind, Column)]
    columns += [key for key in ("image", *IMAGES) if holds_bytes(features.get(key))]
    if not columns:
        raise ValueError(f"{name} has no column of images, only {', '.join(features) or 'none'}")
    if isinstance(features[columns[0]], Column):
        table = table.cast_column(columns[0], Column(decode=False))
    return [partial(table_rows, name, table, shard, columns[0]) for shard in range(table.num_shards)]


class LatentFolder:
    """What encode.py wrote, a map that starts over without an end, in another order each time.

    A folder with latents.json, and for each process that wrote it a NAME.npy (rows, 1 or 2, N, C) float16,
    whose second entry is of the mirrored image, beside a NAME.jsonl of captions and labels, and of the
    conversations of images that had no caption.
    """

    def __init__(self, folder: Path, seed: int, view: Transform):
        try:
            self.about = json.loads((folder / "latents.json").read_text())
            self.parts = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]
            rows = [path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))]
            self.rows = [json.loads(line) for part in rows for line in part]
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the latents in {folder}: {error}") from error
        self.ends = np.cumsum([len(part) for part in self.parts])
        if not self.rows or not self.ends[-1] == len(self.rows) == self.about["images"]:
            raise ValueError(f"{folder} has latents of another number of images than it has captions")
        self.view, self.views = view, 1 + view.flip
        if self.views > self.parts[0].shape[1]:
            raise ValueError(f"{folder} has no mirror images: encode them with --flip, or train without")
        self.folder, self.seed, self.classes = folder, seed, self.about["classes"]
        self.shuffled = Shuffled(len(self.rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        chance = np.random.default_rng(hash_seed(self.seed, number))
        uniform = chance.random(2)

        def use(row: int) -> dict:
            about = self.rows[row]
            conversation = about.get("conversation") or request(about["caption"], uniform[1])
            if self.view.length:
                self.view.check_length(f"{self.folder}: row {row}", conversation)
            part = int(np.searchsorted(self.ends, row, side="right"))
            views = self.parts[part][row - self.ends[part]]  # counted from the part's end
            latents = np.array(views[int(uniform[0] * self.views)])
            return about | {"latents": latents, "conversation": conversation}

        return usable(use, self.shuffled.row(number), len(self.rows), chance, self.folder)

    def once(self, limit: int | None, rank: int, world: int) -> Iterator[dict]:
        raise ValueError(f"{self.folder} holds latents, not images")


def read_manifest(path: Path) -> list[str]:
    """The tars that a wds_manifest.json names, from its folder on if they are not absolute or URLs."""
    try:
        tars = json.loads(path.read_text())["tars"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of tars: {type(error).__name__} {error}") from None
    if not (tars and isinstance(tars, list) and all(isinstance(tar, str) for tar in tars)):
        raise ValueError(f'{path}: "tars" has to be a list of paths')
    return [tar if "://" in tar else str(path.parent / tar) for tar in tars]


def open_one(
    name: str, view: Transform, seed: int, understanding: float
) -> NanoSource | ImageSource | ShardStream | LatentFolder:
    """The source of one name, see the top of this file."""
    if name.startswith("nano:"):
        return NanoSource(name.removeprefix("nano:"), view.size, seed, understanding)
    path = Path(name)
    if (path / "latents.json").is_file():
        return LatentFolder(path, seed, view)
    if path.suffix == ".jsonl" and path.is_file():
        return ImageSource(name, JsonLines(path), view, seed)
    if path.suffix == ".json" and path.is_file():
        return ShardStream(name, [partial(tar_rows, url) for url in read_manifest(path)], view, seed)
    if path.is_dir():
        tars = sorted(
            str(file) for file in path.rglob("*.tar*") if re.search(r"\.tar(\.\w?z2?)?$", file.name)
        )
        tables = sorted(map(str, path.rglob("*.parquet")))
        if tars:
            return ShardStream(name, [partial(tar_rows, url) for url in tars], view, seed)
        if tables:
            return ShardStream(name, open_table(name, path="parquet", data_files=tables), view, seed)
        return ImageSource(name, Folder(name), view, seed)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ValueError(
            f"no data source {name!r}: give nano, a folder of images or shards, a .jsonl of conversations, "
            f"a wds_manifest.json, or a hub id like org/name"
        )
    from huggingface_hub import HfFileSystem

    tars = HfFileSystem().glob(f"datasets/{name}/**/*.tar")
    tars = [url for url in tars if "train" in url.removeprefix(f"datasets/{name}")] or tars  # the split
    if tars:
        return ShardStream(name, [partial(tar_rows, f"hf://{url}") for url in tars], view, seed)
    return ShardStream(name, open_table(name, path=name), view, seed)


class Mixture:
    """Sources with weights. In every thousand samples each has exactly its share, in an order of the seed."""

    def __init__(self, sources: list, weights: list[float], seed: int):
        edges = np.round(1000 * np.cumsum([0.0, *weights]) / sum(weights)).astype(int)
        owners = np.repeat(np.arange(len(sources)), np.diff(edges))
        self.sources, self.counts = sources, np.diff(edges)
        if not self.counts.all():
            raise ValueError(
                f"the weights {weights} differ too much: each share has to be 1 in 1000 at least"
            )
        self.owners = np.random.default_rng(hash_seed(seed)).permutation(owners)
        known = {source.classes for source in sources if source.classes}
        if len(known) > 1 or len({isinstance(source, LatentFolder) for source in sources}) > 1:
            raise ValueError("sources of different classes, or latents and images, cannot be mixed")
        self.classes = known.pop() if known else None  # how many, where a source says it
        self.latents = [source.about for source in sources if isinstance(source, LatentFolder)]
        earlier = np.cumsum(self.owners[:, None] == np.arange(len(sources)), axis=0)
        self.earlier = earlier[np.arange(1000), self.owners] - 1

    def __len__(self) -> int:
        """Samples of a pass over all of it, each source counted once. Raises ValueError for a source whose
        length nobody knows: nano has none, shards do not say theirs."""
        unknown = [type(source).__name__ for source in self.sources if not hasattr(source, "__len__")]
        if unknown:
            raise ValueError(f"the length of a source is not known ({unknown[0]}): give steps, not epochs")
        return sum(map(len, self.sources))

    def place(self, number: int) -> tuple[int, int]:
        """Which source the sample comes from, and its number there."""
        thousand, rest = divmod(number, 1000)
        owner = int(self.owners[rest])
        return owner, int(thousand * self.counts[owner] + self.earlier[rest])

    def __getitem__(self, number: int) -> dict:
        owner, own_number = self.place(number)
        return self.sources[owner][own_number] | {"index": number}

    def once(self, limit: int | None, rank: int, world: int) -> Iterator[dict]:
        """This process's share of every sample of every source, or of the first `limit` samples, of which
        each source has its share. `index` puts the samples of all processes in order. A sample that cannot
        be used has no image, but says why in `skipped`."""
        for owner, source in enumerate(self.sources):
            own = limit
            if limit is not None:
                own = limit // 1000 * self.counts[owner] + (self.owners[: limit % 1000] == owner).sum()
            for sample in source.once(own, rank, world):
                yield sample | {"index": (owner, *sample["index"])}


def open_source(
    names: str,
    size: int,
    seed: int,
    understanding: float = 0.0,
    crop: str = "centre",
    flip: bool = False,
    text_only: bool = False,
    length: Callable[[list], int] | None = None,
    max_seq_len: int = 0,
) -> Mixture:
    """The sources of a --data flag, see the top of this file. Raises ValueError for a name that is none.

    understanding: share of the nano world's samples that are a question about the image.
    crop, flip: of each image its centre or a random square, see `centre_crop` and `random_crop`, and half
        of them mirrored. The nano world draws its images as they should be.
    text_only: conversations without an image are samples too, instead of being left out.
    length, longest: a function that counts a conversation's tokens, and how many it may have.
    """
    if crop not in ("centre", "random"):
        raise ValueError(f"no crop {crop!r}: choose from centre, random")
    view = Transform(size, crop, flip, text_only, length, max_seq_len)
    parts = []
    for part in names.split(","):
        name, _, weight = part.partition("=")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf"):
            raise ValueError(f"--data {part}: the weight after = has to be a number above zero")
        shares = NANO_MIXTURE if name == "nano" else {name: 1.0}
        parts += [(name, weight * share) for name, share in shares.items()]
    try:
        sources = [open_one(name, view, seed, understanding) for name, _ in parts]
    except (ValueError, OSError):
        raise
    except Exception as error:  # from pyarrow, datasets or the hub
        raise ValueError(f"cannot read --data {names}: {error}") from error
    return Mixture(sources, [weight for _, weight in parts], seed)


# -----------------------------------------------------------------------------------------------------------
# batches


class Batches(IterableDataset):
    """This process's part of every global batch, in parts of the worker processes that make it."""

    def __init__(self, source: Mixture, batch: int, start: int, rank: int, world: int, positions: dict):
        if batch % world:
            raise ValueError(
                f"a global batch of {batch} cannot be split over {world} processes: choose a multiple"
            )
        shards = min((len(s.shards) for s in source.sources if isinstance(s, ShardStream)), default=batch)
        self.lanes = max(n for n in range(1, max(shards, 1) + 1) if batch % n == 0)
        if self.lanes % world:
            raise ValueError(
                f"a batch of {batch} reads {shards} shards in {self.lanes} lanes, which {world} processes "
                f"cannot share: choose another --batch, or write more shards"
            )
        self.source, self.batch, self.start = source, batch, start
        self.own = range(rank * self.lanes // world, (rank + 1) * self.lanes // world)
        names = {s.name for s in source.sources if isinstance(s, ShardStream)}
        known = {key: key.rsplit("|", 2) for key in positions if key.rsplit("|", 2)[0] in names}
        if any(int(lanes) != self.lanes for _, _, lanes in known.values()):
            raise ValueError(
                "the checkpoint has read its data in other lanes: resume with the --batch it had"
            )
        self.positions = {key: positions[key] for key, (_, lane, _) in known.items() if int(lane) in self.own}

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, last = (len(self.own) * w // workers for w in (worker, worker + 1))
        width = self.batch // self.lanes  # places of a lane
        places = range(self.own.start * width + first * width, self.own.start * width + last * width)
        streams: dict[str, Iterator[dict]] = {}
        for step in itertools.count(self.start):
            samples = [self.sample(step * self.batch + place, place // width, streams) for place in places]
            yield collate(samples)

    def sample(self, number: int, lane: int, streams: dict[str, Iterator[dict]]) -> dict:
        owner, _ = self.source.place(number)
        source = self.source.sources[owner]
        if not isinstance(source, ShardStream):
            return self.source[number]
        key = f"{source.name}|{lane}|{self.lanes}"
        if key not in streams:
            streams[key] = source.lane(lane, self.lanes, *self.positions.get(key, ()))
        sample = next(streams[key])
        return sample | {"index": number, "position": {key: sample["position"]}}


def collate(samples: list[dict]) -> dict:
    """Of B samples, P of which have an image: lists of captions, labels, conversations and numbers, (B,);
    images (P, 3, H, W) uint8, or latents (P, N, C), and the list "images" of their samples' numbers, (P,);
    the positions of streams; and what was skipped."""
    batch = {key: [sample[key] for sample in samples] for key in PER_SAMPLE}
    with_image = [sample for sample in samples if shows(sample)]
    batch["image_index"] = [sample["index"] for sample in with_image]
    kind = "latents" if "latents" in samples[0] else "image"
    stack = torch.from_numpy(np.stack([sample[kind] for sample in with_image or samples]))[: len(with_image)]
    batch[kind] = stack.float() if kind == "latents" else stack.permute(0, 3, 1, 2)
    batch["positions"] = {k: v for s in samples for k, v in s.get("position", {}).items()}
    batch["skipped"] = [message for s in samples for message in s.get("skipped", ())]
    return batch


class Loader:
    """Batches (see `collate`) without an end, one for each step, made ahead by worker processes (0: in this
    one).

    positions: how far the lanes of streams have come with the batches that were handed out; goes into a
        checkpoint, and back in as `positions`.
    skipped, waited: which samples were left out, and the seconds that batches were waited for; the caller
        sets them back.
    """

    def __init__(
        self, source: Mixture, batch: int, workers=1, start=0, rank=0, world=1, positions: dict | None = None
    ):
        batches = Batches(source, batch, start, rank, world, positions or {})
        self.positions, self.skipped, self.waited = batches.positions, [], 0.0
        self.parts = min(workers, len(batches.own)) or 1
        self.loader = iter(make_loader(batches, self.parts if workers else 0))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict:
        started = time.perf_counter()
        with reading():
            parts = [next(self.loader) for _ in range(self.parts)]
        batch = {k: [x for part in parts for x in part[k]] for k in (*PER_SAMPLE, "image_index")}
        [kind] = {"image", "latents"} & parts[0].keys()
        batch[kind] = torch.cat([part[kind] for part in parts])
        if torch.cuda.is_available():
            batch[kind] = batch[kind].pin_memory()
        for part in parts:
            self.positions |= part["positions"]
            self.skipped += part["skipped"]
        self.waited += time.perf_counter() - started
        return batch


class OnePass:
    """This process's share of every sample, one time each: batches (see `collate`) of up to `batch` samples.
    `index` puts the samples of all processes in order; which of them share a batch depends on their number.

    limit: samples of the whole source, over all processes; a source without an end needs one.
    skipped: which samples were left out so far.
    """

    def __init__(self, source: Mixture, batch: int, limit: int | None = None, workers=1, rank=0, world=1):
        self.loader = make_loader(OnePassBatches(source, batch, limit, rank, world), workers)
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[dict]:
        with reading():
            for batch in self.loader:
                self.skipped += batch["skipped"]
                if "image" in batch:
                    yield batch


class OnePassBatches(IterableDataset):
    """One process's share of every sample, which its worker processes share again."""

    def __init__(self, source: Mixture, batch: int, limit: int | None, rank: int, world: int):
        self.source, self.batch, self.limit, self.rank, self.world = source, batch, limit, rank, world

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.source.once(self.limit, self.rank * workers + worker, self.world * workers)
        while samples := list(itertools.islice(share, self.batch)):
            usable = [sample for sample in samples if "image" in sample]
            skipped = [message for sample in samples for message in sample.get("skipped", ())]
            yield (collate(usable) if usable else {}) | {"skipped": skipped}


def make_loader(batches: IterableDataset, workers: int) -> DataLoader:
    """Makes batches ahead in that many worker processes (0: in this one, when they are asked for)."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals,
        timeout=STALL if workers else 0,
    )


@contextmanager
def reading():
    """Around whatever waits for worker processes: an error that a user understands (OSError)."""
    try:
        yield
    except RuntimeError as error:  # a worker that stalls, or was killed for memory
        stalled = f"no data for {STALL} s, a read stalls" if "timed out" in str(error) else error
        raise OSError(f"data loading failed: {stalled}") from error


def micro_batches(batch: dict, count: int) -> list[dict]:
    """The batch cut into that many pieces, as equal as they can be, one at least of a sample each. Alike long
    conversations go together, so that little is padded; images go with their samples."""
    if count == 1:
        return [batch]
    talks = batch.get("conversation", [()] * len(batch["index"]))
    length = [sum(len(text) for _, text in turns) for turns in talks]
    order = sorted(range(len(length)), key=length.__getitem__)
    place = {number: row for row, number in enumerate(batch["image_index"])}
    cut = []
    for part in np.array_split(order, min(count, len(length))):
        samples = [int(row) for row in part]
        images = [place[batch["index"][row]] for row in samples if batch["index"][row] in place]
        rows = {key: images if key in PER_IMAGE else samples for key in batch}
        cut.append({key: take(values, rows[key]) for key, values in batch.items()})
    return cut


def take(values: list | torch.Tensor, rows: list[int]) -> list | torch.Tensor:
    return values[rows] if isinstance(values, torch.Tensor) else [values[row] for row in rows]


def leave_signals(worker: int) -> None:
    """Ctrl-C and torchrun signal whole process groups; stopping is the trainer's business, not a worker's."""
    os.setpgrp()


def to_unit(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pixels -> fp32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


def flow_draws(
    latent_shape: tuple[int, int], seed: int, indices: list[int], device: torch.device, draws: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise (B, N, C) on the device, and on the CPU two uniform numbers (B,) each, for the time and for the
    condition dropout: every row depends on (seed, sample number) alone, not on the batch or the process. With
    more `draws` a sample, (draws B, ...), all samples' first draws first."""
    seeds = [seed, *(hash_seed(seed, "draw", k) for k in range(1, draws))]
    keys = [(each, index) for each in seeds for index in indices]
    noise, noisy = torch.empty(len(keys), *latent_shape, device=device), torch.Generator(device)
    for row, key in enumerate(keys):
        noise[row].normal_(generator=noisy.manual_seed(hash_seed(*key)))
    return noise, *torch.cat([uniform_draws(2, each, indices, 1) for each in seeds], dim=1)


def uniform_draws(count: int, seed: int, indices: list[int], purpose: int | str) -> torch.Tensor:
    """Uniform numbers (count, B) that depend on (seed, sample number) and on what they are for."""
    draws, chance = torch.empty(count, len(indices)), torch.Generator()
    for row, index in enumerate(indices):
        draws[:, row].uniform_(generator=chance.manual_seed(hash_seed(seed, index, purpose)))
    return draws
