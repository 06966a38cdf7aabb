"""What the sampler's settings, and the times that it goes through, make of a text-to-image model's images.

    python -m nano.sampling                      # the shipped model: docs/sampling.png, docs/sampling.json
    python -m nano.sampling --model runs/t2i/model --out runs/sampling.png --limit 5

Scores images of fresh prompts of the six tasks (nano/scorer.py) over the scale of classifier-free
guidance, over the number of steps of either solver, and over the t at which sampling starts: not from noise
but from true images for the prompts, their latents noised to that t. At t = 0 it is the autoencoder alone
that is scored, and where the curve falls, there the model loses what the image had to show. Takes 17
minutes of one CPU core with --dtype bf16. Prints a table, writes a plot, and the results as JSON beside it.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import common
import data
import eval
import rae
from common import flag
from nano import scorer, shapes


@dataclass
class Config:
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id")
    limit: int = flag(10, "prompts a task", at_least=1)
    images: int = flag(4, "for each prompt", at_least=1)
    batch: int = flag(64, "images at once", at_least=1)
    seed: int = flag(1000, "of the prompts and noise; training uses small ones")
    skip: int | None = flag(
        None, "a block of the DiT, from 0: guide also, at scale 2, by the model itself without it"
    )
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("docs/sampling.png", "the plot; the results are beside it, as .json")


class Setting(NamedTuple):
    solver: str = "euler"
    steps: int = 50
    guidance: float = 3.0
    start: float = 1.0  # t of the noised latents that sampling begins with


GUIDANCES = [Setting(guidance=scale) for scale in (1.0, 2.0, 3.0, 5.0, 8.0)]
STEPS = [Setting(steps=n) for n in (5, 10, 25, 50, 100)] + [Setting("heun", n) for n in (5, 13, 25)]
STARTS = [Setting(start=t) for t in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)]


@torch.no_grad()
def measure(
    model: rae.TextToImage, wanted: list[dict], setting: Setting, config: Config, dist_ctx: common.DistContext
) -> dict[str, float]:
    """The share of right images in each task, and overall. An image has the same noise in all settings."""
    right = defaultdict(list)
    for start in range(0, len(wanted), config.batch):
        batch = wanted[start : start + config.batch]
        numbers = range(start, start + len(batch))
        prompts = [request["prompt"] for request in batch]
        noise, *_ = data.flow_draws(model.latent_shape, config.seed, numbers, dist_ctx.device)
        size = model.autoencoder.image_size
        drawn = [shapes.render(each, config.seed + i, size) for i, each in zip(numbers, batch, strict=True)]
        true = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in drawn])
        with dist_ctx.autocast():
            latents = model.autoencoder.encode(data.to_unit(true, dist_ctx.device)).float()
            noised = (1 - setting.start) * latents + setting.start * noise
        how = setting._asdict() | {"skip": config.skip}
        _, images = eval.generate(model, prompts, noised, dist_ctx, **how)
        for request, image in zip(batch, images, strict=True):
            right[request["tag"]].append(scorer.score(image, request)[0])
    return scorer.overall(right)


def plot(scores: dict[Setting, dict[str, float]], path: Path) -> None:
    """Over the guidance, over the evaluations of the network that steps cost, and over the start."""
    with common.plotting(path, 1, 3, figsize=(13, 4), sharey=True) as axes:
        tasks = {"overall": "k-o", "single_object": "C0--.", "colors": "C1--.", "counting": "C2--."}
        for axis, settings, name in ((axes[0], GUIDANCES, "guidance"), (axes[2], STARTS, "start")):
            places = [getattr(setting, name) for setting in settings]
            for task, style in tasks.items():
                values = [scores[setting][task] for setting in settings]
                axis.plot(places, values, style, label=task.replace("_", " "))
        for solver, cost, style in (("euler", 1, "k-o"), ("heun", 2, "C3-s")):
            own = [setting for setting in STEPS if setting.solver == solver]
            values = [scores[setting]["overall"] for setting in own]
            axes[1].plot([cost * setting.steps for setting in own], values, style, label=f"overall, {solver}")
        axes[0].set(xlabel="guidance scale, 50 Euler steps", ylabel="share of right images", ylim=(0, 1))
        axes[1].set(xlabel="velocities, guided by 3", xscale="log")
        axes[2].set(xlabel="t of the noised true latents at the start")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)


def main() -> None:
    config = common.parse(Config, __doc__)
    dist_ctx = common.init_distributed(config.dtype)
    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    wanted = [
        shapes.prompt(task, config.seed, i)
        for task in shapes.TASKS
        for i in range(config.limit)
        for _ in range(config.images)
    ]
    scores, results = {}, []
    for setting in tqdm(dict.fromkeys(GUIDANCES + STEPS + STARTS), desc="settings"):
        scores[setting] = measure(model, wanted, setting, config, dist_ctx)
        solver, steps, guidance, start = setting
        name = f"{solver}, {steps} steps, guidance {guidance:g}, from {start:g}"
        for task, value in scores[setting].items():
            n = len(wanted) // (1 if task == "overall" else len(shapes.TASKS))
            results.append({"metric": f"{task}/{name}", "value": value, "n": n})
    print(eval.table(results))
    plot(scores, Path(config.out))
    common.save_results(results, config.seed, Path(config.out).with_suffix(".json"))


if __name__ == "__main__":
    common.main(main)
