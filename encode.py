"""Encodes a data set once, so that train_t2i.py reads latents instead of images.

    python encode.py --data my_images --out my_latents           # nano:... has no end and needs --limit
    torchrun --nproc-per-node 8 encode.py --data imagenet/train --flip --autoencoder rae-dinov2-b
    python train_t2i.py --data latents --condition class --autoencoder rae-dinov2-b

For data sets that fit on disk: 16 x 16 tokens of 768 channels take 0.4 MB per image, 0.8 MB with --flip.
Images are centre crops. Writes OUT/latents.json and, per process, OUT/RANK.npy (rows, 1 or 2, N, C) float16
and OUT/RANK.jsonl with the caption, label and conversation of each row.
"""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import rae
from common import DistContext, flag


@dataclass
class Config:
    # data
    data: str = flag("nano:classes", "source of images, see data.py")
    limit: int | None = flag(None, "number of images (default: all)", at_least=1)
    flip: bool = flag(False, "also encode the mirror image of each image")
    seed: int = flag(0, "seed of the order, and of the nano world")
    out: str = flag("latents", "folder to write to")

    # model
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE, or VAE (its means): folder, hub id or name")

    # system
    batch: int = flag(64, "images per batch and process", at_least=1)
    workers: int = flag(1, "data loading processes per process", at_least=0)
    dtype: str = flag("auto", "compute dtype", choices=["auto", "bf16", "fp32"])


@torch.no_grad()
def encode(
    autoencoder: rae.RAE | rae.VAE, images: torch.Tensor, flip: bool, dist_ctx: DistContext
) -> np.ndarray:
    """(B, 3, H, W) uint8 -> (B, 1 or 2, N, C) float16; the second view is the mirror image."""
    views = [images, images.flip(3)] if flip else [images]
    with dist_ctx.autocast():
        latents = [autoencoder.encode(data.to_unit(view, dist_ctx.device)) for view in views]
    latents = torch.stack(latents, dim=1).half()
    # also beyond the range of float16
    common.check_finite("latents in float16", latents)
    return latents.cpu().numpy()


def write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The header of a float16 .npy."""
    # numpy pads it, so that its length is the same for any number of rows.
    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_part(
    folder: Path, config: Config, source: data.Mixture, autoencoder: rae.RAE | rae.VAE, dist_ctx: DistContext
) -> int:
    """Encodes this process's part of the images and returns their number."""
    rank, count = dist_ctx.rank, 0
    batches = data.OnePass(source, config.batch, config.limit, config.workers, rank, dist_ctx.world_size)
    shape = (1 + config.flip, *autoencoder.latent_shape)
    path = folder / f"{rank:05d}.npy"
    with path.open("wb") as file, path.with_suffix(".jsonl").open("w") as texts:
        # The number of rows is known at the end, because damaged images are skipped.
        write_header(file, (0, *shape))
        for batch in tqdm(batches, desc="encode", unit="batch", disable=not dist_ctx.is_main):
            file.write(encode(autoencoder, batch["image"], config.flip, dist_ctx).tobytes())
            count += len(batch["image"])
            fields = zip(batch["caption"], batch["label"], batch["conversation"], strict=True)
            for caption, label, conversation in fields:
                row = {"caption": caption, "label": label}
                # a mere request for the caption is left out: the reader varies its wording
                if caption is None or data.requested_caption(conversation) is None:
                    row["conversation"] = conversation
                texts.write(json.dumps(row) + "\n")
        file.seek(0)
        write_header(file, (count, *shape))
    if batches.skipped:
        print(f"skipped {len(batches.skipped)} images: {batches.skipped[0]}", flush=True)
    return count


def main() -> None:
    config = common.parse(Config, __doc__)
    dist_ctx = common.init_distributed(config.dtype, minutes=common.LONG_TIMEOUT)
    out = Path(config.out)
    if os.path.lexists(out):
        raise ValueError(f"{out} already exists: choose another --out, or remove it")
    common.check_output(out)
    autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
    source = data.open_source(config.data, autoencoder.image_size, config.seed)

    # A name of this run only: no other folder is ever removed. The sum tells it to the other processes.
    [number] = common.global_sum(int.from_bytes(os.urandom(4), "big") if dist_ctx.is_main else 0)
    temporary = out.with_name(f".{out.name}.{int(number)}.tmp")
    # as Ctrl-C does: the folder of a stopped run is removed; nohup ignores SIGHUP
    for signal_ in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signal_) is signal.SIG_DFL:
            signal.signal(signal_, signal.default_int_handler)
    try:
        if dist_ctx.is_main:
            with common.writing(out):
                temporary.mkdir(parents=True)
        common.global_sum(0)  # a barrier: the folder exists
        count = write_part(temporary, config, source, autoencoder, dist_ctx)
        [total] = common.global_sum(count)  # a barrier: all parts are written
        if total == 0:
            raise ValueError(f"--data {config.data} holds no image that can be used")
        if dist_ctx.is_main:
            info = {"autoencoder": config.autoencoder, "fingerprint": common.fingerprint(autoencoder)}
            info |= {"latent_shape": autoencoder.latent_shape, "classes": source.classes}
            info |= {"class_names": getattr(source, "class_names", None)}
            info |= {"data": config.data, "images": int(total)}
            with common.writing(out):
                (temporary / "latents.json").write_text(json.dumps(info, indent=1) + "\n")
                temporary.rename(out)
            size = sum(path.stat().st_size for path in out.iterdir())
            print(f"{out}: {int(total)} images, {size / 1e6:.0f} MB")
    finally:
        if dist_ctx.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    common.main(main)
