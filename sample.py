"""Prompts or class labels in, images out.

    python sample.py "a red circle above a blue square"            # the shipped nano model, on a laptop
    python sample.py "three green stars" "a pink ring" --n 8 --guidance 4
    python sample.py --reconstruct image.png                     # original | what the decoder makes of it
    python sample.py --ask image.png "how many stars are there?" "which colour are they?"
    python sample.py --chat "draw a red circle"                    # the model decides: words or an image
    torchrun --nproc-per-node 8 sample.py --file prompts.txt       # a prompt in each line
    python sample.py "two red stars" --best-of 32 --keep 4         # the language model chooses
    python sample.py "a cat in the snow" --model runs/t2i/model    # a model of your own
    python sample.py --classes 3,17 --model runs/class/model       # labels, or all of them

    # 50,000 images for an FID, the papers' settings, on 8 GPUs; --resume goes on where it stopped
    torchrun --nproc-per-node 8 sample.py --preset rae-256 --classes all --n 50000 --out fid --npz fid.npz

Writes single images and, of up to 256, one grid (a row for each prompt) into --out and prints their paths;
prompt, seed and settings are in the metadata of each PNG. --latents keeps the latents too, which --ask and
--reconstruct take in place of an image. Image k of a prompt is drawn from seed + k, and
image i of a run with labels from seed + i, whatever else is asked for and on however many processes.
"""

import json
import math
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import common
import data
import rae
from common import flag

PRESETS = {
    "nano": {},
    "scale-rae": {"guidance": 1.0, "grid": "scale-rae"},  # Scale-RAE's: its 49 evaluations
    "rae-256": {  # RAE's AutoGuidance
        "model": "rae-dit-dh-xl-256",
        "guide": "rae-dit-dh-s-256",
        "guidance": 1.42,
        "grid": "rae",
        "dtype": "fp32",
    },
    "rae-512": {
        "model": "rae-dit-dh-xl-512",
        "guide": "rae-dit-dh-s-512",
        "guidance": 1.5,
        "grid": "rae",
        "dtype": "fp32",
    },
}
SETTINGS = (  # in a PNG
    "model",
    "autoencoder",
    "size",
    "steps",
    "guidance",
    "guide",
    "interval",
    "skip",
    "solver",
    "grid",
)
SHOWN = 256  # images at most of a run that also makes a grid


@dataclass
class Config:
    prompts: list[str] = flag(
        (), "what to draw; with --ask or --chat, one turn after the other", nargs="*", metavar="PROMPT"
    )
    file: str = flag(
        "",
        "more prompts: a text file, one in each line; GenEval's .jsonl or DPG-Bench's folder of .txt, for "
        "their layouts",
    )
    classes: str = flag("", "draw these labels instead: 3,17 or all; none for an unconditional model")
    labels: str = flag("equal", "as many of each class, or drawn at random", choices=["equal", "random"])
    model: str = flag(
        "", "TextToImage or, with --classes, ClassToImage: folder, hub id or name (default: the nano one)"
    )
    autoencoder: str = flag("", "RAE or VAE: folder or hub id, if not the one that the model names")
    best_of: int | None = flag(None, "draw so many for each prompt and keep those it fits best", at_least=1)
    keep: int = flag(4, "how many of them, the best first", at_least=1)
    verifier: str = flag(
        "answer_logits", "score of the language model that decides", choices=[*rae.VERIFIERS]
    )
    verify_pixels: bool = flag(False, "let it look at the decoded images, not at the latents")
    reconstruct: str = flag("", "encode and decode this image, or decode these latents, instead")
    ask: str = flag("", "answer questions about this image, or these latents, instead")
    chat: bool = flag(False, "send the prompts as they are and let the model answer in words or draw")
    n: int | None = flag(
        None, "images for each prompt (default 4); of all classes together (4 for each)", at_least=1
    )
    steps: int = flag(50, "steps of the sampler", at_least=1)
    guidance: float = flag(3.0, "its scale; classifier-free, or with a guide AutoGuidance; 1 is none")
    guide: str = flag("", "a weaker model of the same latents, for AutoGuidance")
    interval: str = flag("0,1", "of t, in which there is guidance; t = 1 is noise")
    skip: int | None = flag(
        None, "a block of the DiT, from 0: guide also, at scale 2, by the model itself without it"
    )
    solver: str = flag("euler", "of the flow's differential equation", choices=["euler", "heun"])
    grid: str = flag(
        "full", "times of the steps; the papers' own are the others", choices=["full", "rae", "scale-rae"]
    )
    seed: int = flag(0, "of the first image of each prompt")
    size: int | None = flag(None, "side of the images, if not that of the training; multiples of a patch")
    out: str = flag("samples", "folder to write to")
    latents: bool = flag(False, "write NAME.safetensors beside each image: latents, fp32 (N, C)")
    npz: str = flag("", "write all images to this .npz too, as ADM's: arr_0 uint8 (N, H, W, 3)")
    resume: bool = flag(False, "leave the images that are in OUT already")
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    batch: int = flag(64, "images drawn at once, on each process", at_least=1)
    compile: bool = flag(False, "compile the blocks, which pays off for many images")
    graph: bool = flag(False, "CUDA: launch each evaluation of the DiT at once, which pays off for few")


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """The centred square of an image, (1, 3, size, size) in [0, 1]."""
    return torch.from_numpy(data.centre_crop(image, size)).permute(2, 0, 1)[None].float() / 255


def file_name(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


def open_latents(path: str, latent_shape: tuple[int, int]) -> torch.Tensor:
    """What --latents wrote, (N, C)."""
    try:
        latents = load_file(path)["latents"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot read latents from {path}: {type(error).__name__} {error}") from None
    if latents.shape != latent_shape:
        raise ValueError(f"{path} has latents {tuple(latents.shape)}, this needs {latent_shape}")
    return latents


def reconstruct(config: Config, dist_ctx: common.DistContext) -> None:
    path = Path(config.out) / f"{Path(config.reconstruct).stem}-reconstruction.png"
    model = common.load_autoencoder(config.autoencoder or common.WEIGHTS / "rae", dist_ctx)
    if config.reconstruct.endswith(".safetensors"):
        latents = open_latents(config.reconstruct, model.latent_shape)[None].to(dist_ctx.device)
        with torch.no_grad(), dist_ctx.autocast():
            common.save_image(path, model.decode(latents)[0], source=config.reconstruct)
        print(path)
        return
    original = to_pixels(data.open_image(config.reconstruct), model.image_size).to(dist_ctx.device)
    with torch.no_grad(), dist_ctx.autocast():
        decoded = model.decode(model.encode(original))
    error = (decoded.clamp(0, 1) - original).square().mean()
    common.save_image(path, common.image_grid(torch.cat([original, decoded]), 2), source=config.reconstruct)
    print(f"{path}  (left original, right reconstruction; PSNR {-10 * error.log10().item():.1f} dB)")


def converse(config: Config, dist_ctx: common.DistContext) -> None:
    """The prompts are a user's turns, the first about the image of --ask; prints what the model replies."""
    model = common.load_model(rae.TextToImage, config.model, config.autoencoder, dist_ctx)
    shown = None
    if config.ask.endswith(".safetensors"):
        if model.reader_path:
            raise ValueError(f"{config.model} reads other latents than it draws: --ask about an image")
        shown = open_latents(config.ask, model.read_shape)
    elif config.ask:
        shown = to_pixels(data.open_image(config.ask), model.reader.image_size)[0]
    dialogue = rae.Dialogue(model)
    for turn, text in enumerate(config.prompts):
        with dist_ctx.autocast():
            words, condition = dialogue.say(text, None if turn else shown)
        print(words)
        if condition is not None:
            job = Job(text, config.seed, f"{turn}-{file_name(text)}-{config.seed}")
            latents = latents_of([job], model, None, config, dist_ctx, condition)
            [image] = decode(latents, model, dist_ctx)
            path = Path(config.out) / f"{job.name}.png"
            common.save_image(path, image, **written(job, settings_of(config, dist_ctx, model)))
            print(path)


class Job(NamedTuple):
    """An image to draw: for a prompt or a label, from a seed, into OUT/NAME.png, with folders in NAME."""

    input: str | int
    seed: int
    name: str


def prompt_jobs(config: Config, count: int) -> list[list[Job]]:
    """`count` images of each prompt; of GenEval's as OUT/00000/samples/00000.png, of DPG-Bench's as
    OUT/ITEM/0.png, beside the grid OUT/ITEM.png."""
    layout = None
    if config.file.endswith(".jsonl"):
        layout = [f"{i:05d}/samples/{{:05d}}" for i in range(len(config.prompts))]
    elif Path(config.file).is_dir() and config.file:
        layout = [f"{path.stem}/{{}}" for path in dpg_files(config)]
    if layout:
        named = zip(config.prompts, layout, strict=True)
        return [
            [Job(prompt, config.seed + k, name.format(k)) for k in range(count)] for prompt, name in named
        ]
    names = [file_name(prompt) for prompt in config.prompts]
    if len(set(names)) < len(names):
        names = [f"{i:03d}-{name}" for i, name in enumerate(names)]
    seeds = range(config.seed, config.seed + count)
    named = zip(config.prompts, names, strict=True)
    return [[Job(prompt, seed, f"{name}-{seed}") for seed in seeds] for prompt, name in named]


def class_jobs(config: Config, num_classes: int | None) -> list[Job]:
    """Image i is of class i modulo their number, or of a random one that depends on (seed, i) alone."""
    if config.classes in ("all", "none") and (config.classes == "all") != (num_classes is not None):
        raise ValueError(f"--classes {config.classes}: {config.model} has {num_classes or 'no'} classes")
    try:
        classes = {"all": range(num_classes or 0), "none": [0]}.get(config.classes)
        classes = classes or [int(label) for label in config.classes.split(",")]
    except ValueError:
        raise ValueError(f"--classes {config.classes}: give labels like 3,17, or all") from None
    if len(set(classes)) < len(classes):
        raise ValueError(f"--classes {config.classes}: name every class once")
    n = config.n or 4 * len(classes)
    if config.labels == "equal" and n % len(classes):
        raise ValueError(
            f"--n {n}: {len(classes)} classes cannot have equal shares of it; give a multiple, or --labels "
            "random"
        )
    chosen = range(n)
    if config.labels == "random":
        chosen = (data.uniform_draws(1, config.seed, range(n), "label")[0] * len(classes)).long().tolist()
    pairs = enumerate(chosen, start=config.seed)
    return [Job(classes[k % len(classes)], seed, f"{seed - config.seed:06d}") for seed, k in pairs]


def missing(jobs: list[Job], config: Config, settings: dict) -> list[Job]:
    """The jobs whose files are not in the folder yet. Raises ValueError for one that differs."""
    left = []
    for job in jobs:
        path = Path(config.out) / f"{job.name}.png"
        if not path.exists() or (config.latents and not path.with_suffix(".safetensors").exists()):
            left.append(job)
            continue
        found = data.open_metadata(str(path))
        if not found:  # damaged
            left.append(job)
        elif wrong := [k for k, v in written(job, settings).items() if found.get(k, "None") != v]:
            raise ValueError(
                f"{path} was drawn with {wrong[0]} {found.get(wrong[0])}, not "
                f"{written(job, settings)[wrong[0]]}: choose another --out, or leave --resume out"
            )
    return left


def written(job: Job, settings: dict) -> dict[str, str]:
    """The metadata of a job's PNG."""
    key = "prompt" if isinstance(job.input, str) else "label"
    return {name: str(value) for name, value in {key: job.input, "seed": job.seed, **settings}.items()}


def load_guide(
    kind: type[rae.LatentModel], config: Config, model: rae.LatentModel, dist_ctx: common.DistContext
) -> rae.LatentModel | None:
    """The weaker model of AutoGuidance. Raises ValueError for one of other latents or classes."""
    if not config.guide or config.guidance == 1:
        return None
    with common.loading(config.guide):
        guide = kind.from_pretrained(config.guide).eval().to(dist_ctx.device)
    for name, own, others in (
        ("latents", model.latent_shape, guide.latent_shape),
        ("classes", *(getattr(each, "num_classes", None) for each in (model, guide))),
    ):
        if others not in (own, None):
            raise ValueError(f"--guide {config.guide} has {name} {others}, {config.model} has {own}")
    return guide


def settings_of(
    config: Config, dist_ctx: common.DistContext, model: rae.LatentModel, guide: rae.LatentModel | None = None
) -> dict:
    """What beside its input and seed decides how an image looks."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return settings | {
        "weights": common.fingerprint(model),
        "guide_weights": common.fingerprint(guide),
        "dtype": dist_ctx.dtype,
    }


def draw(config: Config, dist_ctx: common.DistContext) -> None:
    kind = rae.ClassToImage if config.classes else rae.TextToImage
    model = common.load_model(kind, config.model, config.autoencoder, dist_ctx)
    guide = load_guide(kind, config, model, dist_ctx)
    if config.size:
        autoencoder = model.autoencoder.resized(config.size)
        for each in [model, *[guide] * bool(guide)]:
            each.resize(autoencoder)
    if config.classes:
        jobs = class_jobs(config, model.num_classes)
        model.condition([job.input for job in jobs])  # a mistake shows before the work begins
    else:
        model.check_prompts(config.prompts)
        groups = prompt_jobs(config, config.best_of or config.n or 4)
        jobs = [job for group in groups for job in group]
    settings = settings_of(config, dist_ctx, model, guide)
    decoder = getattr(model.autoencoder, "decoder", None)  # diffusers' VAE has none of our layers
    blocks = [block for each in (model, guide) if each for block in each.dit.blocks]
    blocks += getattr(decoder, "decoder_layers", [])
    common.cast_linear(blocks, dist_ctx)
    common.compile_blocks(blocks, config.compile, dist_ctx)
    if config.best_of:
        draw_best(groups, config, dist_ctx, model, guide, settings)
    else:
        draw_all(jobs, config, dist_ctx, model, guide, settings)
    common.global_sum(0)  # waits for all processes
    if dist_ctx.is_main:
        for path in Path(config.out).rglob(".*.tmp"):  # of a run that was killed
            path.unlink()
        if config.file and Path(config.file).is_dir():
            for group in groups:
                write_dpg_grid(group, config)
        show(kept_of(groups, config) if config.best_of else jobs, Path(config.out), config)


def save(
    config: Config, settings: dict, job: Job, image: torch.Tensor, latents: torch.Tensor | None = None
) -> None:
    path = Path(config.out) / f"{job.name}.png"
    common.save_image(path, image, **written(job, settings))
    if latents is not None:
        with common.replacing(path.with_suffix(".safetensors")) as temporary:
            save_file({"latents": latents.cpu().contiguous()}, temporary)


def draw_all(
    jobs: list[Job],
    config: Config,
    dist_ctx: common.DistContext,
    model: rae.LatentModel,
    guide: rae.LatentModel | None,
    settings: dict,
) -> None:
    own = jobs[dist_ctx.rank :: dist_ctx.world_size]
    own = missing(own, config, settings) if config.resume else own
    with ThreadPoolExecutor() as pool:  # writes a batch while the next one is drawn
        saved = iter(())
        for start in tqdm(range(0, len(own), config.batch), desc="draw", disable=not dist_ctx.is_main):
            batch = own[start : start + config.batch]
            latents = latents_of(batch, model, guide, config, dist_ctx)  # CUDA is not waited for
            drawn, wait = common.to_host(decode(latents, model, dist_ctx), *[latents] * config.latents)

            def write(*item, wait=wait) -> None:
                wait()
                save(config, settings, *item)

            list(saved)  # raises what went wrong
            saved = pool.map(write, batch, *drawn)
        list(saved)


def scores_of(group: list[Job], config: Config) -> Path:
    return Path(config.out) / f"{group[0].name}-scores.json"


def kept_of(groups: list[list[Job]], config: Config) -> list[Job]:
    """Of each prompt's candidates those that `draw_best` kept, the best first."""
    kept = []
    for group in groups:
        rows = json.loads(scores_of(group, config).read_text())["candidates"]
        ranked = [(row["rank"], job) for row, job in zip(rows, group, strict=True)]
        kept += [job for rank, job in sorted(pair for pair in ranked if pair[0] is not None)]
    return kept


def draw_best(
    groups: list[list[Job]],
    config: Config,
    dist_ctx: common.DistContext,
    model: rae.TextToImage,
    guide: rae.LatentModel | None,
    settings: dict,
) -> None:
    """Draws --best-of candidates for each prompt, decodes only those that are kept, and writes the scores of
    all into NAME-scores.json."""
    if model.reader_path and not config.verify_pixels:
        raise ValueError(f"{config.model} reads other latents than it draws: give --verify-pixels")
    if not 1 <= config.keep <= config.best_of:
        raise ValueError(f"--keep {config.keep}: give 1 to {config.best_of}, as many as --best-of has")
    about = {name: str(getattr(config, name)) for name in ("best_of", "keep", "verifier", "verify_pixels")}
    about |= {name: str(value) for name, value in settings.items()}

    for group in tqdm(
        groups[dist_ctx.rank :: dist_ctx.world_size], desc="draw", disable=not dist_ctx.is_main
    ):
        about |= {"prompt": group[0].input, "seed": str(group[0].seed)}
        if config.resume and scores_of(group, config).exists():
            found = json.loads(scores_of(group, config).read_text())["settings"]
            if wrong := [name for name in about if found.get(name, "None") != about[name]]:
                raise ValueError(
                    f"{scores_of(group, config)} is of {wrong[0]} {found.get(wrong[0])}, not "
                    f"{about[wrong[0]]}: choose another --out, or leave --resume out"
                )
            continue
        latents, verdicts = [], []
        for start in range(0, len(group), config.batch):
            latents.append(latents_of(group[start : start + config.batch], model, guide, config, dist_ctx))
            read = latents[-1]
            if config.verify_pixels:
                read = model.reader.encode(decode(read, model, dist_ctx).clamp(0, 1))
            verdicts += rae.verify(model, group[0].input, read)  # fp32: in bf16 many logits are the same
        latents, kept = torch.cat(latents), rae.best(verdicts, config.verifier, config.keep)
        for i, image in zip(kept, decode(latents[kept], model, dist_ctx), strict=True):
            own = settings | verdicts[i]._asdict()
            save(config, own, group[i], image, latents[i] if config.latents else None)
        rows = [
            {"seed": job.seed, "rank": kept.index(i) if i in kept else None} | verdict._asdict()
            for i, (job, verdict) in enumerate(zip(group, verdicts, strict=True))
        ]
        with common.replacing(scores_of(group, config)) as temporary:
            text = {"settings": about, "candidates": rows}
            temporary.write_text(json.dumps(text, indent=1) + "\n")


def show(jobs: list[Job], out: Path, config: Config) -> None:
    """Prints where the images are, and packs them into a grid and an .npz."""
    paths = [out / f"{job.name}.png" for job in jobs]
    if len(jobs) <= SHOWN:
        print("\n".join(map(str, paths)))
        images = torch.cat(
            [to_pixels(image, min(image.size)) for image in map(data.open_image, map(str, paths))]
        )
        columns = len(jobs) // max(1, len(config.prompts)) if config.prompts else 8
        grid = common.image_grid(images, columns, scale=max(1, 128 // images.shape[-1]))
        prompts = "\n".join(dict.fromkeys(str(job.input) for job in jobs))
        common.save_image(out / "grid.png", grid, prompt=prompts, seed=config.seed)
        print(out / "grid.png")
    else:
        print(f"{len(jobs)} images in {out}")
    if config.npz:
        pack(Path(config.npz), paths)
        print(config.npz)


def draw_noise(seed: int, latent_shape: tuple[int, int]) -> torch.Tensor:
    """On the CPU, so that a seed means the same image on every device."""
    return torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def latents_of(
    jobs: list[Job],
    model: rae.LatentModel,
    guide: rae.LatentModel | None,
    config: Config,
    dist_ctx: common.DistContext,
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, N, C)."""
    noise = torch.stack([draw_noise(job.seed, model.latent_shape) for job in jobs])
    with dist_ctx.autocast():
        return model.generate(
            [job.input for job in jobs] if condition is None else condition,
            config.steps,
            config.guidance,
            noise=noise,
            solver=config.solver,
            grid=config.grid,
            guide=guide,
            interval=interval(config),
            skip=config.skip,
        )


@torch.no_grad()
def decode(latents: torch.Tensor, model: rae.LatentModel, dist_ctx: common.DistContext) -> torch.Tensor:
    """(B, 3, H, W)."""
    with dist_ctx.autocast():
        return model.autoencoder.decode(latents).float()


def interval(config: Config) -> tuple[float, float]:
    try:
        low, high = map(float, config.interval.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--interval {config.interval}: give two times from 0 to 1, like 0.1,0.9")
    return low, high


def pack(path: Path, files: list[Path]) -> None:
    """Images to one .npz, an image at a time: 50,000 of 256 px are 10 GB."""
    with Image.open(files[0]) as first:
        shape = (len(files), first.height, first.width, 3)
    with common.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for file in tqdm(files, desc=str(path), leave=False):
                entry.write(np.asarray(data.open_image(str(file))).tobytes())


def dpg_files(config: Config) -> list[Path]:
    return sorted(Path(config.file).glob("*.txt"))


def write_dpg_grid(group: list[Job], config: Config) -> None:
    """The images of a prompt as DPG-Bench reads them: a square without gaps."""
    files = [str(Path(config.out) / f"{job.name}.png") for job in group]
    images = [np.asarray(data.open_image(file)) for file in files]
    grid = rearrange(np.stack(images), "(r c) h w ch -> ch (r h) (c w)", r=math.isqrt(len(group)))
    path = Path(config.out) / f"{group[0].name.split('/')[0]}.png"
    common.save_image(path, torch.from_numpy(grid).float() / 255, prompt=group[0].input)


def geneval_prompts(lines: list[str], config: Config) -> list[str]:
    """The prompts of GenEval's file, each line of which is kept beside its images."""
    if config.prompts:
        raise ValueError(f"{config.file} is a whole set of prompts: leave out {config.prompts[0]!r}")
    try:
        prompts = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{config.file} is no file of GenEval\'s: each line needs a "prompt"') from None
    for i, line in enumerate(lines):
        with common.replacing(Path(config.out) / f"{i:05d}/metadata.jsonl") as temporary:
            temporary.write_text(line + "\n")
    return prompts


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    if config.classes and not config.model:
        raise ValueError(
            "--classes needs --model, a ClassToImage: train_t2i.py --preset nano-class makes one"
        )
    if config.file and Path(config.file).is_dir():
        if config.prompts or not dpg_files(config) or config.best_of or (config.n or 4) != 4:
            raise ValueError(f"--file {config.file}: DPG-Bench is a folder of .txt, alone, with --n 4")
        config.prompts = [file.read_text().strip() for file in dpg_files(config)]
    elif config.file:
        lines = [line for line in Path(config.file).read_text().splitlines() if line.strip()]
        if config.file.endswith(".jsonl"):
            lines = geneval_prompts(lines, config)
        config.prompts = [*config.prompts, *lines]
    modes = {  # and what they cannot do
        "classes": ("prompts", "reconstruct", "ask", "chat", "best_of"),
        "reconstruct": ("ask", "chat", "best_of", "size", "latents"),
        "ask": ("best_of", "size", "latents", "guide", "n"),
        "chat": ("best_of", "size", "latents", "guide", "n"),
        "best_of": ("n",),
    }
    for mode, others in modes.items():
        if getattr(config, mode) and (given := [name for name in others if getattr(config, name)]):
            mode, name = (each.replace("_", "-") for each in (mode, given[0]))
            raise ValueError(f"--{mode} does not go with {name}: leave one of them out")
    config.model = config.model or str(common.WEIGHTS / "t2i")
    if not (config.prompts or config.classes or config.reconstruct):
        raise ValueError('give a prompt: sample.py "a red circle above a blue square"')
    run = reconstruct if config.reconstruct else converse if config.ask or config.chat else draw
    run(config, common.init_distributed(config.dtype))


if __name__ == "__main__":
    common.main(main)
