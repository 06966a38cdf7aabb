"""Pictures and captions in, batches out.

A source is a map from a sample's number to the sample. Numbers never end (a folder starts over, reshuffled),
and what number i holds depends on (seed, i) alone, so that step s of a training of global batch B reads the
samples s B ... (s + 1) B - 1 whatever the number of processes, and a resumed run goes on where it stopped.

    nano                       the synthetic world of nano/shapes.py: objects, scenes and text
    nano:objects               one of its domains
    nano:objects=3,text=1      a mixture with weights
    path/to/folder             pictures, captions in its metadata.jsonl ({"file_name": ..., "text": ...})
"""

import hashlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

REQUESTS = ("Generate an image of {}", "Can you draw {}?", "Please make a picture of {}", "Show me {}")
NANO_MIXTURE = {"objects": 0.7, "scenes": 0.15, "text": 0.15}


def mix(*keys: int) -> int:
    """A 63-bit number from integers, the same everywhere: seeds that share nothing."""
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "little") >> 1


class Nano(Dataset):
    """The nano world. A share of the samples, `understanding`, is a question about the picture instead of a
    request for it."""

    def __init__(self, mixture: dict[str, float], size: int, seed: int, understanding: float = 0.0):
        from nano import shapes

        if unknown := set(mixture) - set(shapes.DOMAINS):
            raise ValueError(f"nano has no domain {sorted(unknown)}: choose from {', '.join(shapes.DOMAINS)}")
        self.draw, self.size, self.seed, self.understanding = shapes.draw, size, seed, understanding
        self.domains = list(mixture)
        self.edges = np.cumsum([mixture[name] for name in self.domains]) / sum(mixture.values())

    def __getitem__(self, index: int) -> dict:
        uniform = np.random.default_rng(mix(self.seed, index)).random(3)
        domain = self.domains[int(np.searchsorted(self.edges, uniform[0], side="right"))]
        sample = self.draw(domain, self.seed, index, self.size)
        if uniform[1] < self.understanding:
            question, answer = sample.questions[int(uniform[2] * len(sample.questions))]
            conversation = [("user", f"<image>\n{question}"), ("assistant", answer)]
        else:
            conversation = request(sample.caption, uniform[2])
        return {
            "image": sample.image,
            "caption": sample.caption,
            "conversation": conversation,
            "index": index,
        }


class Folder(Dataset):
    """A folder of pictures with captions, through the `imagefolder` reader of `datasets`; every epoch has an
    order of its own. Pictures are cropped to a centred square and resized."""

    def __init__(self, path: str, size: int, seed: int):
        from datasets import Image as Column
        from datasets import load_dataset

        self.rows = load_dataset("imagefolder", data_dir=path, split="train", drop_labels=True)
        self.rows = self.rows.cast_column("image", Column(decode=False))
        self.size, self.seed, self.order = size, seed, (-1, None)

    def __getitem__(self, index: int) -> dict:
        epoch, position = divmod(index, len(self.rows))
        if self.order[0] != epoch:
            self.order = (epoch, np.random.default_rng(mix(self.seed, epoch)).permutation(len(self.rows)))
        row = self.rows[int(self.order[1][position])]
        caption = clean(row.get("text") or "")
        uniform = np.random.default_rng(mix(self.seed, index)).random()
        return {
            "image": square(open_picture(row["image"]["path"]), self.size),
            "caption": caption,
            "conversation": request(caption, uniform),
            "index": index,
        }


def clean(caption: str) -> str:
    """Without anything that looks like a special token, such as <image> or <|im_end|>; at most 1,000
    characters."""
    return re.sub(r"<\|?\w+\|?>", " ", caption).strip()[:1000]


def request(caption: str, uniform: float) -> list[tuple[str, str]]:
    """A caption as a conversation in which it is asked for, by one of several wordings."""
    template = REQUESTS[int(uniform * len(REQUESTS))]
    return [("user", template.format(caption)), ("assistant", "Here you go:\n<image>")]


def open_picture(path: str) -> Image.Image:
    """The picture of a file, in memory, RGB. Raises ValueError for what is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no picture at {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from None


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centred square of an RGB picture, resized: (size, size, 3) uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def open_source(name: str, size: int, seed: int, understanding: float = 0.0) -> Dataset:
    """The source of that name, see the top of this file. Raises ValueError for a name that is none."""
    if name.partition(":")[0] == "nano":
        return Nano(parse_mixture(name.partition(":")[2]) or NANO_MIXTURE, size, seed, understanding)
    if not Path(name).is_dir():
        raise ValueError(f"no data source {name!r}: give nano, nano:objects=3,text=1 or a folder of pictures")
    return Folder(name, size, seed)


def parse_mixture(text: str) -> dict[str, float]:
    """ "a=3,b=1" -> {"a": 3.0, "b": 1.0}; a name without a weight has 1."""
    parts = [part.partition("=") for part in text.split(",") if part]
    mixture = {name: float(weight or 1) for name, _, weight in parts}
    if not all(0 < weight < float("inf") for weight in mixture.values()):
        raise ValueError(f"the weights of a mixture have to be above zero: {text}")
    return mixture


class Steps:
    """The sample numbers of each step, from `start` on, for process `rank` of `world`: a slice of the global
    batch."""

    def __init__(self, batch: int, start: int = 0, rank: int = 0, world: int = 1):
        if batch % world:
            raise ValueError(
                f"a global batch of {batch} cannot be split over {world} processes: choose a multiple"
            )
        self.batch, self.start, self.rank, self.local = batch, start, rank, batch // world

    def __iter__(self) -> Iterator[range]:
        step = self.start
        while True:
            first = step * self.batch + self.rank * self.local
            yield range(first, first + self.local)
            step += 1


def collate(samples: list[dict]) -> dict:
    """images (B, 3, H, W) uint8, and lists of the rest."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    batch["image"] = torch.from_numpy(np.stack(batch["image"])).permute(0, 3, 1, 2)
    return batch


def load(source: Dataset, steps: Steps, workers: int = 1) -> Iterator[dict]:
    """Batches for ever, one per step, made ahead by worker processes (0: in this one)."""
    loader = DataLoader(
        source,
        batch_sampler=steps,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_interrupts,
    )
    return iter(loader)


def leave_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; stopping is the trainer's business, not a worker's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_unit(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pixels -> fp32 in [0, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 255


def flow_draws(
    latent_shape: tuple[int, int], seed: int, indices: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise (B, N, C) on the device, and on the CPU two uniform numbers (B,) each, for the time and for the
    condition dropout: every row depends on (seed, sample number) alone, not on the batch or the process."""
    noise, uniform = torch.empty(len(indices), *latent_shape, device=device), torch.empty(2, len(indices))
    noisy, chance = torch.Generator(device), torch.Generator()
    for row, index in enumerate(indices):
        noise[row].normal_(generator=noisy.manual_seed(mix(seed, index)))
        uniform[:, row].uniform_(generator=chance.manual_seed(mix(seed, index, 1)))
    return noise, uniform[0], uniform[1]
