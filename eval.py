"""Pictures to numbers.

    python eval.py                         # the shipped nano models: everything below
    python eval.py recon                   # reconstruction of unseen pictures: PSNR, SSIM for each domain
    python eval.py shapes --limit 5        # text to image: the six GenEval tasks, 5 prompts each
    python eval.py shapes --model runs/t2i/model --out runs/t2i/shapes.json

Prints a table and writes a list of results as JSON: metric, value, n, seed, command, versions, date.
"""

import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
import data
import rae
from common import flag

WHAT = ("recon", "shapes")


@dataclass
class Config:
    what: list[str] = flag((), "recon, shapes; everything if none is named", nargs="*", metavar="WHAT")
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id, for shapes")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id, for recon")
    limit: int | None = flag(
        None, "pictures a domain (recon, 256) and prompts a task (shapes, 20) at most", at_least=2
    )
    pictures: int = flag(4, "for each prompt", at_least=1)
    steps: int = flag(50, "steps of the sampler", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance")
    solver: str = flag("euler", "of the flow's differential equation", choices=["euler", "heun"])
    seed: int = flag(1000, "of the pictures, prompts and noise; training uses small ones")
    batch: int = flag(64, "pictures at once", at_least=1)
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("results.json", "file for the results")


# -----------------------------------------------------------------------------------------------------------
# metrics


def to_uint8(pictures: Tensor) -> Tensor:
    """What is written to a file: clamped to [0, 1], rounded to 8 bits."""
    return (pictures.clamp(0, 1) * 255).round().byte().cpu()


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each pair of pictures (B, 3, H, W) in [0, 1]: (B,)."""
    return -10 * (one - other).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (Gaussian window of 11, sigma 1.5) of each pair of pictures in [0, 1]: (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")


def recon(config: Config, where: common.Launch) -> list[dict]:
    """PSNR and SSIM of unseen pictures of each domain, after rounding to 8 bits."""
    model = common.load_autoencoder(config.autoencoder, where)
    n, results = config.limit or 256, []
    for name in data.NANO_MIXTURE:
        source, domain = data.open_source(name, model.image_size, config.seed), name.removeprefix("nano:")
        values = defaultdict(list)
        for start in tqdm(range(0, n, config.batch), desc=f"recon {domain}", leave=False):
            samples = [source[i] for i in range(start, min(start + config.batch, n))]
            original = data.to_unit(data.collate(samples)["image"], where.device)
            with torch.no_grad(), where.autocast():
                decoded = model.decode(model.encode(original))
            decoded = data.to_unit(to_uint8(decoded), where.device)
            values["psnr"] += psnr(decoded, original).tolist()
            values["ssim"] += ssim(decoded, original).tolist()
        results += [{"metric": f"{k}/{domain}", "value": sum(v) / n, "n": n} for k, v in values.items()]
    return results


def draw(
    model: rae.TextToImage, prompts: list[str], config: Config, where: common.Launch
) -> Iterator[np.ndarray]:
    """A picture (H, W, 3) uint8 for each prompt; number i has noise of its own, whatever the batch size."""
    for start in tqdm(range(0, len(prompts), config.batch), desc="draw", leave=False):
        batch = prompts[start : start + config.batch]
        indices = [start + i for i in range(len(batch))]
        noise, *_ = data.flow_draws(model.latent_shape, config.seed, indices, torch.device("cpu"))
        with torch.no_grad(), where.autocast():
            latents = model.generate(batch, config.steps, config.guidance, noise=noise, solver=config.solver)
            pictures = model.autoencoder.decode(latents)
        yield from to_uint8(pictures).permute(0, 2, 3, 1).numpy()


def shapes(config: Config, where: common.Launch) -> list[dict]:
    """Accuracies of the six GenEval tasks in the nano world, and of objects in pairs of shape and colour that
    no training picture held; beside the model's pictures true renderings (the ceiling) and the model's
    pictures judged by another prompt of the task (the floor)."""
    from nano import scorer
    from nano.shapes import TASKS, prompt, render

    model = common.load_text_to_image(config.model, "", where)
    n, held_out = config.limit or 20, "held-out colors"
    wanted = {task: [prompt(task, config.seed, i) for i in range(n)] for task in TASKS}
    wanted[held_out] = [prompt("colors", config.seed, i, held_out=True) for i in range(n)]
    jobs = [(task, i) for task in wanted for i in range(n) for _ in range(config.pictures)]
    pictures = draw(model, [wanted[task][i]["prompt"] for task, i in jobs], config, where)

    right = {column: defaultdict(list) for column in ("model", "true", "shuffled")}
    for number, ((task, i), picture) in enumerate(zip(jobs, pictures, strict=True)):
        true = render(wanted[task][i], config.seed + number, len(picture))
        right["model"][task].append(scorer.score(picture, wanted[task][i])[0])
        right["true"][task].append(scorer.score(true, wanted[task][i])[0])
        right["shuffled"][task].append(scorer.score(picture, wanted[task][(i + 1) % n])[0])

    results = []
    for column, tasks in right.items():
        apart = tasks.pop(held_out)
        values = scorer.overall(tasks) | {held_out: float(np.mean(apart))}
        counts = {task: len(apart) for task in values} | {"overall": len(apart) * len(TASKS)}
        results += [{"metric": f"shapes/{column}/{k}", "value": v, "n": counts[k]} for k, v in values.items()]
    return results


# -----------------------------------------------------------------------------------------------------------
# results


def table(results: list[dict]) -> str:
    """Markdown: one row for each last part of the metrics' names, one column for each first part."""
    cells, columns = defaultdict(dict), []
    for result in results:
        column, _, row = result["metric"].rpartition("/")
        columns += [column] * (column not in columns)
        cells[row][column] = f"{result['value']:.3f}"
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(values.get(column, "") for column in columns)] for row, values in cells.items()]
    return "\n".join("| " + " | ".join(f"{cell:16}" for cell in line) + " |" for line in lines)


def main() -> None:
    config = common.parse(Config, __doc__)
    if unknown := set(config.what) - set(WHAT):
        raise ValueError(f"unknown evaluation {', '.join(unknown)}: choose from {', '.join(WHAT)}")
    where = common.launch(config.dtype)
    print(where)
    results = []
    for name in config.what or WHAT:
        part = {"recon": recon, "shapes": shapes}[name](config, where)
        print(f"\n{table(part)}")
        results += part
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    about = {
        "seed": config.seed,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": packages | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with common.replacing(Path(config.out)) as temporary:
        temporary.write_text(json.dumps([result | about for result in results], indent=1) + "\n")
    print(f"\n{config.out}")


if __name__ == "__main__":
    common.main(main)
