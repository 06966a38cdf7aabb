"""Encodes a data set once, so that train_t2i.py reads latents instead of images.

    python encode.py --data my_images --out latents              # of the nano world: --limit too
    torchrun --nproc-per-node 8 encode.py --data imagenet/train --flip --autoencoder rae-dinov2-b
    python train_t2i.py --data latents --condition class

For data sets that fit: an image of 16 x 16 tokens of 768 channels is 0.4 MB, with its mirror image 0.8 MB.
Writes OUT/latents.json, and for each process OUT/RANK.npy (rows, 1 or 2, N, C) float16 beside OUT/RANK.jsonl
with captions and labels. The latents are those of the images' centre crops.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
import rae
from common import flag


@dataclass
class Config:
    data: str = flag("nano:classes", "a source of images, see data.py")
    limit: int | None = flag(None, "images at most (default: all; the nano world has no end)", at_least=1)
    autoencoder: str = flag(
        str(common.WEIGHTS / "rae"), "RAE or VAE, of which the means are taken: folder, hub id or name"
    )
    flip: bool = flag(False, "encode their mirror images too")
    seed: int = flag(0, "of the order, and of the nano world")
    batch: int = flag(64, "images at once, on each process", at_least=1)
    workers: int = flag(1, "data loading processes for each process", at_least=0)
    dtype: str = flag("auto", "of the compute", choices=["auto", "bf16", "fp32"])
    out: str = flag("latents", "folder to write to")


@torch.no_grad()
def encode(
    autoencoder: rae.RAE | rae.VAE, images: torch.Tensor, flip: bool, dist_ctx: common.DistContext
) -> np.ndarray:
    """(B, 3, H, W) uint8 -> (B, 1 or 2, N, C) float16, the mirror images second."""
    views = [images, images.flip(3)] if flip else [images]
    with dist_ctx.autocast():
        latents = [autoencoder.encode(data.to_unit(view, dist_ctx.device)) for view in views]
    return torch.stack(latents, dim=1).half().cpu().numpy()


class Rows:
    """A .npy file that grows: the number of its rows is written into its header at the end."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        self.file, self.shape, self.count = path.open("wb"), shape, 0
        self.header()

    def header(self) -> None:
        """Of a fixed length: numpy pads it for arrays that grow along their first axis."""
        self.file.seek(0)
        about = {"descr": "<f2", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, about)

    def add(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows).tobytes())
        self.count += len(rows)

    def close(self) -> None:
        self.header()
        self.file.close()


def write_share(
    folder: Path,
    config: Config,
    source: data.Mixture,
    autoencoder: rae.RAE | rae.VAE,
    dist_ctx: common.DistContext,
) -> int:
    """This process's share of the images; returns how many."""
    batches = data.OnePass(
        source, config.batch, config.limit, config.workers, dist_ctx.rank, dist_ctx.world_size
    )
    rows = Rows(folder / f"{dist_ctx.rank:05d}.npy", (1 + config.flip, *autoencoder.latent_shape))
    with (folder / f"{dist_ctx.rank:05d}.jsonl").open("w") as about:
        for batch in tqdm(batches, desc="encode", unit="batch", disable=not dist_ctx.is_main):
            rows.add(encode(autoencoder, batch["image"], config.flip, dist_ctx))
            for caption, label, turns in zip(
                batch["caption"], batch["label"], batch["conversation"], strict=True
            ):
                row = {"caption": caption, "label": label}
                about.write(json.dumps(row if caption is not None else row | {"conversation": turns}) + "\n")
    rows.close()
    if batches.skipped:
        print(f"left out {len(batches.skipped)} images: {batches.skipped[0]}", flush=True)
    return rows.count


def main() -> None:
    config = common.parse(Config, __doc__)
    dist_ctx = common.init_distributed(config.dtype)
    out = Path(config.out)
    temporary = out.with_name(f"{out.name}.tmp")
    if out.exists():
        raise ValueError(f"{out} is there already: choose another --out, or remove it")
    autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
    source = data.open_source(config.data, autoencoder.image_size, config.seed)
    if dist_ctx.is_main:
        with common.writing(out):
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
    common.global_sum(0)  # the folder is there
    count = write_share(temporary, config, source, autoencoder, dist_ctx)
    [total] = common.global_sum(count)  # all are done
    if dist_ctx.is_main:
        with common.writing(out):
            about = {
                "autoencoder": config.autoencoder,
                "latent_shape": autoencoder.latent_shape,
                "classes": source.classes,
                "data": config.data,
                "images": int(total),
            }
            (temporary / "latents.json").write_text(json.dumps(about, indent=1) + "\n")
            temporary.rename(out)
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"{out}: {int(total)} images, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    common.main(main)
