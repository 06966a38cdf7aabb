"""Draws images from prompts or class labels.

    python sample.py "a red circle above a blue square"            # the shipped nano model, on a laptop
    python sample.py "three green stars" "a pink ring" --n 8 --guidance 4
    python sample.py "two red stars" --best-of 32 --n 4            # the language model picks 4 of 32 images
    python sample.py "a cat in the snow" --model runs/t2i/model    # your own model
    python sample.py --classes 3,17 --model runs/class/model       # class labels, or --classes all
    python sample.py --reconstruct image.png                       # original | reconstruction
    python sample.py --ask image.png "how many stars are there?" "what color are the stars?"
    python sample.py --chat "draw a red circle"                    # the model answers in words or draws
    torchrun --nproc-per-node 8 sample.py --file prompts.txt       # one prompt per line, on 8 GPUs

    # 50,000 images for an FID with the settings of the RAE paper; --resume continues an interrupted run.
    # The "--" is needed, or torchrun takes --n for an abbreviation of its own flags.
    torchrun --nproc-per-node 8 -- sample.py --preset rae-256 --classes all --n 50000 --out fid --npz fid.npz

Writes a PNG per image, with prompt, seed and settings in its metadata, and for up to 256 images a grid with
one row per prompt. An image is named after its prompt in lower case, with a hash if that loses anything, such
as "!". A file is only ever replaced by the same image. --latents also saves latents, which --ask and
--reconstruct accept instead of an image.
Image k of a prompt, or of all class labels, is drawn from seed + k, whatever the batch size and the number of
processes. With a text --file, image k of prompt i is drawn from seed + i + 1,000,000 k: no noise comes twice.
"""

import json
import re
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import common
import convert
import data
import rae
from common import DistContext, flag
from rae import LatentModel

# RAE's configs for its released ImageNet models: AutoGuidance by a DiT-DH-S, 50 points, fp32
IMAGENET = {"grid": "rae", "dtype": "fp32"}
PRESETS = {
    "nano": {},
    # Scale-RAE: no guidance, 50 points
    "scale-rae": {"model": "scale-rae-1.5b-2.4b", "guidance": 1.0, "grid": "scale-rae", "dtype": "fp32"},
    "rae-256": IMAGENET | {"model": "rae-dit-dh-xl-256", "guide": "rae-dit-dh-s-256", "guidance": 1.42},
    "raev2-imagenet": {  # RAEv2: internal guidance, no second evaluation
        "model": "raev2-imagenet",
        "steps": 100,
        "guidance": 1.0,
        "internal_guidance": 1.78,
        "interval": "0.1,1",
    },
    "raev2-t2i": {"guidance": 6.0},
    "rae-512": IMAGENET | {"model": "rae-dit-dh-xl-512", "guide": "rae-dit-dh-s-512", "guidance": 1.5},
}
CONFLICTS = {
    "classes": ("prompts", "reconstruct", "ask", "chat", "best_of"),
    "reconstruct": ("ask", "chat", "best_of", "latents", "prompts", "model"),
    "ask": ("best_of", "latents", "guide", "n"),
    "chat": ("best_of", "latents", "guide", "n"),
}
PATHS = ("model", "autoencoder", "guide", "source")
MAX_GRID = 256  # a run of more images makes no grid


@dataclass
class Config:
    # what to draw
    prompts: list[str] = flag((), "what to draw; the turns of --ask or --chat", nargs="*", metavar="PROMPT")
    file: str = flag("", "prompts: a text file, GenEval's .jsonl or .json, DPG-Bench's folder of .txt")
    classes: str = flag("", "class labels: 3,17 or all; none for an unconditional model")
    n: int | None = flag(None, "images per prompt, or with --classes in total (default 4 each)", at_least=1)
    best_of: int | None = flag(None, "draw this many candidates per prompt, keep the best --n", at_least=1)
    verifier: str = flag("answer_logits", "score that ranks the candidates", choices=[*rae.VERIFIERS])
    reconstruct: str = flag("", "encode and decode this image, or decode these latents")
    ask: str = flag("", "answer questions about this image or these latents")
    chat: bool = flag(False, "send the prompts verbatim; the model replies in words or draws")
    # models
    model: str = flag("", "TextToImage or ClassToImage: folder, hub id or name (default: the nano model)")
    autoencoder: str = flag("", "RAE or VAE: folder or hub id (default: the one that the model names)")
    # sampler
    steps: int = flag(50, "sampling steps", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance, or of --guide; 1 is off", at_least=0)
    guide: str = flag("", "weaker model of the same latents, for AutoGuidance")
    internal_guidance: float = flag(1.0, "scale of the guidance by the base head of a RAEv2 model; 1 is off")
    interval: str = flag("0,1", "guidance interval of t; t = 1 is noise")
    solver: str = flag("euler", "ODE solver", choices=["euler", "heun"])
    grid: str = flag(
        "full",
        "timesteps: full ends at t = 0, the others are the authors'",
        choices=["full", "rae", "scale-rae"],
    )
    seed: int = flag(0, "seed of the first image", at_least=0, at_most=2**63)
    # output
    out: str = flag("samples", "output folder")
    latents: bool = flag(False, "also save the latents as NAME.safetensors, fp32 (N, C)")
    npz: str = flag("", "also pack all images into this .npz: arr_0 uint8 (N, H, W, 3), as ADM does")
    resume: bool = flag(False, "skip the images that are already in OUT")
    # system
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    batch: int = flag(64, "images per batch and process", at_least=1)
    compile: bool = flag(False, "compile the transformer blocks; pays off for many images")


# -----------------------------------------------------------------------------------------------------------
# jobs: what to draw


class Job(NamedTuple):
    """An image to draw from a prompt or class label and a seed, into OUT/NAME.png."""

    input: str | int
    seed: int
    name: str  # may contain folders
    class_name: str = ""


def benchmark(config: Config) -> str:
    """The benchmark that --file belongs to, whose layout the output follows: geneval, dpg or none."""
    if config.file and Path(config.file).is_dir():
        return "dpg"
    return "geneval" if config.file.endswith((".jsonl", ".json")) else "none"


def read_text(path: str | Path) -> str:
    try:
        # Files of Windows' Notepad begin with a byte order mark.
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8: save it as UTF-8") from None


def read_geneval(path: str) -> list[dict]:
    """The prompts of GenEval with their metadata, from JSON lines or any other JSON."""
    text = read_text(path)
    try:
        try:
            rows = json.loads(text)
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        if all(isinstance(row["prompt"], str) for row in rows):
            return rows
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f'{path} is not a GenEval file: each row needs a "prompt"')


def dpg_files(config: Config) -> list[Path]:
    # A Mac leaves hidden files, ._NAME, beside those it copies.
    return sorted(Path(config.file).glob("[!.]*.txt"))


def read_prompts(config: Config) -> list[str]:
    """The prompts of the command line and of --file."""
    layout = benchmark(config)
    if layout == "none":
        lines = read_text(config.file).split("\n") if config.file else []
        return [*config.prompts, *(line.strip() for line in lines if line.strip())]
    if config.prompts:
        raise ValueError(f"{config.file} is a whole set of prompts: leave out {config.prompts[0]!r}")
    if layout == "geneval":
        return [row["prompt"] for row in read_geneval(config.file)]
    files = dpg_files(config)
    if not files or config.best_of or config.n not in (None, 4):
        raise ValueError(f"{config.file}: DPG-Bench is a folder of .txt, with --n 4, without --best-of")
    return [read_text(file).strip() for file in files]


def file_name(prompt: str) -> str:
    """A readable name, different for every prompt, also where file names ignore case."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt.casefold()))
    name = "-".join(words)[:60].encode()[:180].decode(errors="ignore").strip("-")
    if name.replace("-", " ") == prompt:
        return name
    # Letters in upper case, punctuation or the end are missing. "_" marks the hash: no name has it otherwise.
    return f"{name or 'image'}_{short_hash(prompt)}"


def short_hash(*keys) -> str:
    return f"{data.hash_seed(*keys):016x}"[:12]


def prompt_jobs(config: Config, count: int) -> list[list[Job]]:
    """`count` jobs for each prompt, in the layout of the benchmark or as PROMPT-SEED.png."""
    layout, prompts = benchmark(config), config.prompts
    if layout == "none":
        # A prompt that is given twice would give the same images twice.
        prompts = list(dict.fromkeys(prompts))
    stems = [file.stem for file in dpg_files(config)] if layout == "dpg" else map(file_name, prompts)
    groups = []
    for i, (prompt, stem) in enumerate(zip(prompts, stems, strict=True)):
        group = []
        for k in range(count):
            names = {"geneval": f"{i:05d}/samples/{k:05d}", "dpg": f"{stem}/{k}"}
            # an FID needs noise of its own for every image
            seed = config.seed + (i + 1_000_000 * k if config.file and layout == "none" else k)
            group.append(Job(prompt, seed, names.get(layout, f"{stem}-{seed}")))
        groups.append(group)
    return groups


def class_jobs(config: Config, num_classes: int | None) -> list[Job]:
    """--n jobs in total, of the classes in turn."""
    if (config.classes == "none") != (num_classes is None):
        cure = "" if num_classes else ": give --classes none"
        raise ValueError(
            f"--classes {config.classes}: {config.model} has {num_classes or 'no'} classes{cure}"
        )
    labels = list(range(num_classes or 1))
    if config.classes not in ("all", "none"):
        try:
            labels = [int(label) for label in config.classes.split(",")]
        except ValueError:
            raise ValueError(f"--classes {config.classes}: give labels like 3,17, or all") from None
    n = config.n or 4 * len(labels)
    # The FID of images whose classes are not balanced would be another quantity.
    if len(set(labels)) < len(labels) or n % len(labels):
        cure = f"give each class once, and --n as a multiple of {len(set(labels))}"
        raise ValueError(f"--classes {config.classes} --n {n}: all are drawn equally often; {cure}")
    return [Job(labels[i % len(labels)], config.seed + i, f"{i:06d}") for i in range(n)]


# -----------------------------------------------------------------------------------------------------------
# drawing


def sampler_settings(config: Config, guide: LatentModel | None = None) -> dict:
    """The keyword arguments of `generate` that are the same for all images."""
    try:
        low, high = map(float, config.interval.split(","))
    except ValueError:
        low, high = 1.0, 0.0  # refused below
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--interval {config.interval}: give two numbers from 0 to 1, like 0.1,0.9")
    names = ("steps", "guidance", "internal_guidance", "solver", "grid")
    return {name: getattr(config, name) for name in names} | {"guide": guide, "interval": (low, high)}


def draw_noise(seed: int, latent_shape: tuple[int, int]) -> Tensor:
    # On the CPU, so that a seed means the same image on every device.
    return torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed))


def draw_latents(jobs: list[Job], model: LatentModel, sampler: dict, batch: int) -> Tensor:
    """(B, N, C)."""
    latents = []
    for start in range(0, len(jobs), batch):
        inputs = [job.input for job in jobs[start : start + batch]]
        noise = [draw_noise(job.seed, model.latent_shape) for job in jobs[start : start + batch]]
        latents.append(model.generate(inputs, noise=torch.stack(noise), **sampler))
    return torch.cat(latents)


def load_guide(config: Config, model: LatentModel) -> LatentModel | None:
    if not config.guide or config.guidance == 1:
        return None
    with common.loading(config.guide):
        guide = type(model).from_pretrained(config.guide).eval().to(model.device)
    if config.classes and guide.num_classes not in (None, model.num_classes):
        raise ValueError(f"--guide {config.guide} has {guide.num_classes} classes, not {model.num_classes}")
    return guide


def draw(config: Config, dist_ctx: DistContext) -> None:
    # ---- models -------------------------------------------------------------------------------------------
    model_class = rae.ClassToImage if config.classes else rae.text_model_class(config.model)
    if config.best_of and model_class is rae.CaptionToImage:
        raise ValueError(f"{config.model} cannot judge images: --best-of needs a TextToImage")
    model = common.load_model(model_class, config.model, config.autoencoder, dist_ctx)
    guide = load_guide(config, model)
    sampler = sampler_settings(config, guide)
    settings = describe_settings(config, model, guide, dist_ctx)

    # ---- speed --------------------------------------------------------------------------------------------
    dits = [model.dit, guide.dit] if guide else [model.dit]
    blocks = [block for dit in dits for block in dit.blocks]
    if isinstance(model.autoencoder, rae.RAE):
        blocks += model.autoencoder.decoder.decoder_layers
    common.cast_linear(blocks, dist_ctx)
    # CUDA graphs, because small batches wait for kernel launches. They reuse memory from step to step: a step
    # is one evaluation of a DiT, not one block, whose output the next block still reads.
    mode = "reduce-overhead" if dist_ctx.device.type == "cuda" else None
    common.compile_blocks(blocks, config.compile, dist_ctx, mode)
    if config.compile and mode:
        for dit in dits:
            dit.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    # ---- jobs: mistakes in any input show before the work begins ------------------------------------------
    if config.classes:
        jobs = class_jobs(config, model.num_classes)
        model.condition([job.input for job in jobs])
        names = dict(enumerate(model.class_names or []))
        groups = [[job._replace(class_name=names.get(job.input, "")) for job in jobs]]
    else:
        model.check_prompts(config.prompts)
        groups = prompt_jobs(config, config.best_of or config.n)

    # ---- chunks for this process: batches of jobs, or with --best-of all candidates of a prompt -----------
    # Other images in the same place are refused now, with and without --resume.
    jobs = [job for group in groups for job in group][dist_ctx.rank :: dist_ctx.world_size]
    missing = [job for job in jobs if not is_drawn(job, settings, config)]
    check_layout(groups, settings, config)
    if config.best_of:
        chunks = groups[dist_ctx.rank :: dist_ctx.world_size]
        kept = [kept_jobs(group, settings, config) for group in chunks]
        if config.resume:
            chunks = [group for group, old in zip(chunks, kept, strict=True) if not old]
    else:
        jobs = missing if config.resume else jobs
        chunks = [jobs[start : start + config.batch] for start in range(0, len(jobs), config.batch)]

    # ---- draw; threads write the images of a chunk while the next one is drawn ----------------------------
    writes = []
    with torch.no_grad(), dist_ctx.autocast(), ThreadPoolExecutor() as pool:
        for jobs in tqdm(chunks, "draw", disable=not dist_ctx.is_main):
            latents = draw_latents(jobs, model, sampler, config.batch)  # (B, N, C)
            scores = [{}] * len(jobs)
            if config.best_of:
                jobs, latents, scores = keep_best(jobs, latents, model, settings, config)
            images = model.autoencoder.decode(latents).float()  # (B, 3, H, W)
            images, latents = images.cpu(), latents.cpu()
            # Wait for the chunk before, so that at most two are in memory; raise what went wrong in a thread.
            for write in writes:
                write.result()
            writes = []
            for job, image, tokens, extra in zip(jobs, images, latents, scores, strict=True):
                writes.append(pool.submit(save, job, image, tokens, settings | extra, config))
        for write in writes:
            write.result()
    # A barrier: the main process needs the images of all.
    common.global_sum(0)

    # ---- grids and archives -------------------------------------------------------------------------------
    if dist_ctx.is_main:
        if config.best_of:
            groups = [kept_jobs(group, settings, config) for group in groups]
        finish(groups, settings, config)


# -----------------------------------------------------------------------------------------------------------
# best-of-N: the language model ranks candidates (Scale-RAE section 5)


def keep_best(group: list[Job], latents: Tensor, model: LatentModel, settings: dict, config: Config):
    """The best --n candidates of a prompt, best first: jobs, latents, scores. Writes the scores of all."""
    check_result(group[0], latents)
    verdicts = []
    for batch in latents.split(config.batch):
        # A model with a reader cannot read the latents that it draws, so it looks at the images.
        if model.reader_path:
            batch = model.autoencoder.decode(batch).float().clamp(0, 1)
        # In bf16 many candidates have equal logits.
        with torch.autocast(batch.device.type, enabled=False):
            if model.reader_path:
                batch = model.reader.encode(batch)
            verdicts += rae.verify(model, group[0].input, batch)
    best = rae.best(verdicts, config.verifier, config.n)
    scores = [verdict._asdict() for verdict in verdicts]
    ranks = {i: rank for rank, i in enumerate(best)}
    rows = [{"seed": job.seed, "rank": ranks.get(i), **scores[i]} for i, job in enumerate(group)]
    with common.replacing(Path(config.out) / f"{group[0].name}-scores.json") as temporary:
        content = {"settings": describe(group[0], settings), "candidates": rows}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return [group[i] for i in best], latents[best], [scores[i] for i in best]


def kept_jobs(group: list[Job], settings: dict, config: Config) -> list[Job]:
    """The kept candidates of a prompt, best first; an empty list unless all of them are there."""
    path = Path(config.out) / f"{group[0].name}-scores.json"
    if not path.exists():
        return []
    try:
        scores = json.loads(path.read_text())
        old = dict(scores["settings"])
        seeds = [row["seed"] for row in scores["candidates"]]
        jobs = {row["rank"]: job for row, job in zip(scores["candidates"], group, strict=False)}
    except (ValueError, KeyError, TypeError):
        old = {}
    check_same(path, old, describe(group[0], settings))
    if seeds != [job.seed for job in group]:
        raise ValueError(f"{path} has scores of candidates with other seeds: choose another --out")
    kept = [jobs[rank] for rank in range(config.n) if rank in jobs]
    return kept if len(kept) == config.n and all(is_drawn(job, settings, config) for job in kept) else []


# -----------------------------------------------------------------------------------------------------------
# saving


def describe_settings(config: Config, model: LatentModel, guide: LatentModel | None, dist_ctx: DistContext):
    """All that determines how an image looks, besides its input and seed."""
    names = ["model", "autoencoder", "steps", "guidance", "internal_guidance", "guide"]
    names += ["interval", "solver", "grid"]
    names += ["best_of", "n", "verifier"] if config.best_of else []
    settings = {name: getattr(config, name) for name in names} | {"dtype": dist_ctx.dtype}
    # A training run may have written other weights to the same path since.
    parts = {"weights": model, "autoencoder_weights": model.autoencoder, "guide_weights": guide}
    return settings | {name: common.fingerprint(part) for name, part in parts.items()}


def describe(job: Job, settings: dict) -> dict[str, str]:
    """The metadata of a job's PNG."""
    values = {"prompt" if isinstance(job.input, str) else "label": job.input}
    if job.class_name:
        values["class"] = job.class_name
    return {name: str(value) for name, value in {**values, "seed": job.seed, **settings}.items()}


def check_same(path: Path, old: dict[str, str], new: dict[str, str]) -> None:
    """Raises ValueError where a file would be replaced by another image, or mixed with such images."""
    if not old:
        raise ValueError(f"{path} exists and is not from sample.py: choose another --out")
    for name, value in new.items():
        # Paths may be spelled in several ways; the weights tell.
        if name not in PATHS and old.get(name, "None") != value:
            change = f"{name} {old.get(name)}, not {value}"
            raise ValueError(f"{path} was drawn with {change}: choose another --out")


def exists(path: Path, metadata: dict[str, str]) -> bool:
    """Whether the image is there already. Raises ValueError if it would replace another file."""
    # A crash or a full disk may leave an empty file.
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return False
    check_same(path, data.open_metadata(str(path)), metadata)
    return True


def is_drawn(job: Job, settings: dict, config: Config) -> bool:
    path = Path(config.out) / f"{job.name}.png"
    latents = path.with_suffix(".safetensors")
    if config.latents and latents.exists() and not path.exists():
        raise ValueError(f"{latents} exists without an image: choose another --out")
    return exists(path, describe(job, settings)) and (latents.exists() or not config.latents)


def geneval_files(config: Config) -> dict[Path, str]:
    """The files that GenEval's scorer reads beside the images, and their content."""
    rows = enumerate(read_geneval(config.file))
    return {Path(config.out) / f"{i:05d}/metadata.jsonl": json.dumps(row) + "\n" for i, row in rows}


def dpg_grid(group: list[Job], config: Config) -> Path:
    """ITEM.png, beside the folder ITEM of its four images."""
    return Path(config.out) / f"{Path(group[0].name).parent}.png"


def check_layout(groups: list[list[Job]], settings: dict, config: Config) -> None:
    """Raises ValueError if a benchmark's files beside the images would replace others."""
    if benchmark(config) == "geneval":
        for path, content in geneval_files(config).items():
            if path.exists() and path.read_text() != content:
                raise ValueError(f"{path} is of another prompt: choose another --out")
    elif benchmark(config) == "dpg":
        for group in groups:
            exists(dpg_grid(group, config), describe(group[0], settings))


def check_result(job: Job, *tensors: Tensor) -> None:
    """Raises ValueError for latents or an image with NaN or infinity, which would be a black image."""
    kind = "prompt" if isinstance(job.input, str) else "label"
    common.check_finite(f"{kind} {job.input!r}, seed {job.seed}", *tensors)


def save(job: Job, image: Tensor, latents: Tensor, settings: dict, config: Config) -> None:
    """Writes a PNG and, with --latents, the latents."""
    check_result(job, latents, image)
    path = Path(config.out) / f"{job.name}.png"
    common.save_image(path, image, **describe(job, settings))
    if config.latents:
        with common.replacing(path.with_suffix(".safetensors")) as temporary:
            save_file({"latents": latents.contiguous()}, temporary)


def read_images(paths: list[Path]) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    images = np.stack([np.asarray(data.open_image(str(path))) for path in paths])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def finish(groups: list[list[Job]], settings: dict, config: Config) -> None:
    """On the main process, once all images are there: grids, a benchmark's files, the .npz."""
    out = Path(config.out)
    if benchmark(config) == "geneval":
        for path, content in geneval_files(config).items():
            with common.replacing(path) as temporary:
                temporary.write_text(content)
    elif benchmark(config) == "dpg":
        # The four images of ITEM/ without gaps: the benchmark cuts the grid at the middle.
        for group in groups:
            images = read_images([out / f"{job.name}.png" for job in group])
            grid = rearrange(images, "(r c) ch h w -> ch (r h) (c w)", r=2)
            common.save_image(dpg_grid(group, config), grid, **describe(group[0], settings), grid_of=4)

    jobs = [job for group in groups for job in group]
    paths = [out / f"{job.name}.png" for job in jobs]
    if len(jobs) <= MAX_GRID:
        grid = save_grid(jobs, settings, 8 if config.classes else len(groups[0]), config)
        print(*paths, grid, sep="\n")
    else:
        print(f"{len(paths)} images in {out}")
    if config.npz:
        pack(Path(config.npz), paths)
        print(config.npz)


def save_grid(jobs: list[Job], settings: dict, columns: int, config: Config) -> Path:
    """grid.png, or grid_HASH.png if that is a grid of other images. `grid_of` marks grids for eval.py."""
    images = read_images([Path(config.out) / f"{job.name}.png" for job in jobs])
    grid = common.image_grid(images, columns, scale=max(1, 128 // images.shape[3]))
    path, contents = Path(config.out) / "grid.png", short_hash(*[describe(job, settings) for job in jobs])
    if path.exists() and data.open_metadata(str(path)).get("grid_of") != contents:
        path = path.with_stem(f"grid_{contents}")
    inputs = dict.fromkeys(job.class_name or str(job.input) for job in jobs)
    common.save_image(path, grid, prompt="\n".join(inputs), seed=config.seed, grid_of=contents)
    return path


def pack(npz: Path, paths: list[Path]) -> None:
    """Packs images into one .npz."""
    # Streamed instead of np.savez: 50,000 images of 256 px are 10 GB.
    shape = (len(paths), *np.asarray(data.open_image(str(paths[0]))).shape)
    with common.replacing(npz) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for path in tqdm(paths, str(npz), leave=False):
                entry.write(data.open_image(str(path)).tobytes())


# -----------------------------------------------------------------------------------------------------------
# reconstruct, ask, chat


def crop_image(path: str, size: int) -> Tensor:
    """The centre square of an image, (1, 3, size, size) in [0, 1]."""
    pixels = data.centre_crop(data.open_image(path), size)  # (H, W, 3) uint8
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def load_latents(path: str, latent_shape: tuple[int, int]) -> Tensor:
    """(N, C), as --latents saves them."""
    try:
        latents = load_file(path)["latents"]
    except (OSError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot read latents from {path}: {type(error).__name__} {error}") from None
    if latents.shape != latent_shape:
        raise ValueError(f"{path} has latents {tuple(latents.shape)}, the model needs {latent_shape}")
    return latents


def describe_source(path: str) -> dict[str, str]:
    """Metadata of what is made from a file."""
    return {"source": path, "content": short_hash(Path(path).read_bytes())}


def reconstruct(config: Config, dist_ctx: DistContext) -> None:
    model = common.load_autoencoder(config.autoencoder or common.WEIGHTS / "rae", dist_ctx)
    with torch.no_grad(), dist_ctx.autocast():
        if config.reconstruct.endswith(".safetensors"):
            latents = load_latents(config.reconstruct, model.latent_shape)[None].to(dist_ctx.device)
            image, note, count = model.decode(latents)[0], "", 1
            common.check_finite(config.reconstruct, image)
        else:
            original = crop_image(config.reconstruct, model.image_size).to(dist_ctx.device)
            decoded = model.decode(model.encode(original)).clamp(0, 1)
            common.check_finite(config.reconstruct, decoded)
            psnr = -10 * (decoded - original).square().mean().log10().item()
            image, count = common.image_grid(torch.cat([original, decoded]), columns=2), 2
            note = f"  (left original, right reconstruction; PSNR {psnr:.1f} dB)"
    path = Path(config.out) / f"{Path(config.reconstruct).stem}-reconstruction.png"
    metadata = {"weights": common.fingerprint(model), "dtype": str(dist_ctx.dtype)}
    metadata |= describe_source(config.reconstruct)
    exists(path, metadata)
    common.save_image(path, image, **metadata, grid_of=count)
    print(f"{path}{note}")


def converse(config: Config, dist_ctx: DistContext) -> None:
    """The prompts are the user's turns, the first one about the image of --ask; prints the replies."""
    model = common.load_model(rae.TextToImage, config.model, config.autoencoder, dist_ctx)
    sampler, settings = sampler_settings(config), describe_settings(config, model, None, dist_ctx)
    image = None
    if config.ask.endswith(".safetensors"):
        if model.reader_path:
            raise ValueError(f"{config.model} reads other latents than it draws: --ask about an image")
        image = load_latents(config.ask, model.read_shape)
    elif config.ask:
        image = crop_image(config.ask, model.reader.image_size)[0]
    if config.ask:
        settings |= describe_source(config.ask)
    with torch.no_grad(), dist_ctx.autocast():
        dialogue = rae.Dialogue(model)
        for turn, text in enumerate(config.prompts):
            words, condition = dialogue.say(text, image if turn == 0 else None)
            print(words)
            # The model answers in words alone.
            if condition is None:
                continue
            # The image depends on the turns before, so its name does.
            name = file_name("\n".join(config.prompts[turn::-1] + ([config.ask] if config.ask else [])))
            job = Job(text, config.seed, f"{turn}-{name}-{config.seed}")
            path = Path(config.out) / f"{job.name}.png"
            exists(path, describe(job, settings))
            noise = draw_noise(job.seed, model.latent_shape)[None]
            latents = model.generate(condition, noise=noise, **sampler)
            drawn = model.autoencoder.decode(latents)[0]
            check_result(job, latents, drawn)
            common.save_image(path, drawn, **describe(job, settings))
            print(path)


# -----------------------------------------------------------------------------------------------------------
# main


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    config.prompts = [data.encodable(prompt) for prompt in read_prompts(config)]
    for name, others in CONFLICTS.items():
        for other in others:
            if getattr(config, name) and getattr(config, other):
                shown = other.replace("_", "-")
                raise ValueError(f"--{name} does not go with {shown}: leave one of them out")
    # without a condition only a guide can guide
    if config.classes == "none" and not config.guide and "guidance" not in config.given:
        config.guidance = 1.0
    if config.classes and not config.model:
        raise ValueError("--classes needs --model, such as one trained by train_t2i.py --preset nano-class")
    if config.model in convert.RELEASED_DITS and not config.classes:
        raise ValueError(f"{config.model} is class-conditional: give --classes, such as 207,360 or all")
    if config.guide and config.guidance == 1 and "guide" in config.given:
        raise ValueError(f"--guide {config.guide} needs a --guidance other than 1")
    if not (config.prompts or config.classes or config.reconstruct):
        raise ValueError('give a prompt: sample.py "a red circle above a blue square"')
    if not config.classes:
        config.n = config.n or 4
    if config.best_of and config.n > config.best_of:
        raise ValueError(f"--best-of {config.best_of}: give --n of at most that, not {config.n}")
    config.model = config.model or str(common.WEIGHTS / "t2i")
    if not config.ask:  # which mostly writes nothing
        common.check_output(Path(config.out) / "grid.png")
    if config.npz:
        common.check_output(Path(config.npz), ".npz")
        if Path(config.npz) == Path(config.out):
            raise ValueError(f"--npz {config.npz} is the folder of the images: choose another name")

    dist_ctx = common.init_distributed(config.dtype, minutes=common.LONG_TIMEOUT)
    if config.reconstruct:
        reconstruct(config, dist_ctx)
    elif config.ask or config.chat:
        converse(config, dist_ctx)
    else:
        draw(config, dist_ctx)


if __name__ == "__main__":
    common.main(main)
