"""Prompts in, pictures out.

    python sample.py "a red circle above a blue square"            # the shipped nano model, on a laptop
    python sample.py "three green stars" "a pink ring" --n 8 --guidance 4
    python sample.py --reconstruct picture.png                     # original | what the decoder makes of it
    python sample.py --ask picture.png "how many stars are there?"
    python sample.py "a cat in the snow" --model runs/t2i/model    # a model of your own

Writes single pictures and one grid (a row for each prompt) into --out and prints their paths; prompt, seed
and settings are in the metadata of each PNG. Picture k of a prompt is drawn from seed + k, whatever else is
asked for.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

import common
import data
from common import flag

PRESETS = {"nano": {}, "scale-rae": {"guidance": 1.0, "grid": "scale-rae"}}  # Scale-RAE's: its 49 evaluations


@dataclass
class Config:
    prompts: list[str] = flag((), "what to draw; with --ask, the question", nargs="*", metavar="PROMPT")
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id")
    autoencoder: str = flag("", "RAE or VAE: folder or hub id, if not the one that the model names")
    reconstruct: str = flag("", "encode and decode this picture instead")
    ask: str = flag("", "answer the question about this picture instead")
    n: int = flag(4, "pictures for each prompt", at_least=1)
    steps: int = flag(50, "steps of the sampler", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance; 1 is none")
    solver: str = flag("euler", "of the flow's differential equation", choices=["euler", "heun"])
    grid: str = flag(
        "full", "times of the steps; the papers' own are the others", choices=["full", "rae", "scale-rae"]
    )
    seed: int = flag(0, "of the first picture of each prompt")
    out: str = flag("samples", "folder to write to")
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    batch: int = flag(64, "pictures drawn at once", at_least=1)


def to_pixels(picture: Image.Image, size: int) -> torch.Tensor:
    """The centred square of a picture, (1, 3, size, size) in [0, 1]."""
    return torch.from_numpy(data.centre_crop(picture, size)).permute(2, 0, 1)[None].float() / 255


def file_name(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def reconstruct(config: Config, where: common.Launch) -> None:
    picture = data.open_picture(config.reconstruct)
    model = common.load_autoencoder(config.autoencoder or common.WEIGHTS / "rae", where)
    original = to_pixels(picture, model.image_size).to(where.device)
    with torch.no_grad(), where.autocast():
        decoded = model.decode(model.encode(original))
    error = (decoded.clamp(0, 1) - original).square().mean()
    path = Path(config.out) / f"{Path(config.reconstruct).stem}-reconstruction.png"
    common.save_picture(
        path, common.picture_grid(torch.cat([original, decoded]), 2), source=config.reconstruct
    )
    print(f"{path}  (left original, right reconstruction; PSNR {-10 * error.log10().item():.1f} dB)")


def ask(config: Config, where: common.Launch) -> None:
    if len(config.prompts) != 1:
        raise ValueError('--ask needs one question: sample.py --ask picture.png "what is this?"')
    picture = data.open_picture(config.ask)
    model = common.load_text_to_image(config.model, config.autoencoder, where)
    with where.autocast():
        print(model.answer(to_pixels(picture, model.autoencoder.image_size)[0], config.prompts[0]))


def draw(config: Config, where: common.Launch) -> None:
    model = common.load_text_to_image(config.model, config.autoencoder, where)
    model.plain_text(config.prompts)
    names = [file_name(prompt) for prompt in config.prompts]
    if len(set(names)) < len(names):
        names = [f"{i:03d}-{name}" for i, name in enumerate(names)]
    jobs = [
        (prompt, name, config.seed + k)
        for prompt, name in zip(config.prompts, names, strict=True)
        for k in range(config.n)
    ]
    pictures = []
    for start in range(0, len(jobs), config.batch):
        prompts, _, seeds = zip(*jobs[start : start + config.batch], strict=True)
        noise = torch.stack([draw_noise(seed, model.latent_shape) for seed in seeds])
        with torch.no_grad(), where.autocast():
            latents = model.generate(
                list(prompts),
                config.steps,
                config.guidance,
                noise=noise,
                solver=config.solver,
                grid=config.grid,
            )
            pictures.append(model.autoencoder.decode(latents).float().cpu())
    pictures = torch.cat(pictures)
    settings = {
        k: v for k, v in asdict(config).items() if k in ("model", "steps", "guidance", "solver", "grid")
    }
    for (prompt, name, seed), picture in zip(jobs, pictures, strict=True):
        path = Path(config.out) / f"{name}-{seed}.png"
        common.save_picture(path, picture, prompt=prompt, seed=seed, **settings)
        print(path)
    path = Path(config.out) / "grid.png"
    scale = max(1, 128 // pictures.shape[-1])
    grid = common.picture_grid(pictures, config.n, scale=scale)
    common.save_picture(path, grid, prompt="\n".join(config.prompts), seed=config.seed, **settings)
    print(path)


def draw_noise(seed: int, latent_shape: tuple[int, int]) -> torch.Tensor:
    """On the CPU, so that a seed means the same picture on every device."""
    return torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    if not (config.prompts or config.reconstruct):
        raise ValueError('give a prompt: sample.py "a red circle above a blue square"')
    run = reconstruct if config.reconstruct else ask if config.ask else draw
    run(config, common.launch(config.dtype))


if __name__ == "__main__":
    common.main(main)
