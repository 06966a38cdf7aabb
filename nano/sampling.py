"""How sampler settings, and the noise level at which sampling starts, change a text-to-image model's images.

    python -m nano.sampling                      # the shipped model: docs/sampling.png, docs/sampling.json
    python -m nano.sampling --model runs/t2i/model --out runs/sampling.png --limit 5

Scores images of unseen prompts of the six tasks (nano/scorer.py) over the guidance scale, over the number of
steps of both solvers, and over the t at which sampling starts: not from noise, but from the latents of true
images noised to that t. At t = 0 the autoencoder alone is scored; where the curve falls, the model loses what
the image had to show. Takes 17 minutes on one CPU core with --dtype bf16. Prints a table, writes a plot, and
the results as JSON beside it.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import common
import data
import rae
from common import flag
from nano import scorer, shapes
from nano.evaluate import generate


@dataclass
class Config:
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id")
    limit: int = flag(10, "prompts per task", at_least=1)
    images: int = flag(4, "images per prompt", at_least=1)
    batch: int = flag(64, "images at once", at_least=1)
    seed: int = flag(1000, "of the prompts and noise; training uses small ones")
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("docs/sampling.png", "the plot; the results are beside it, as .json")


class Setting(NamedTuple):
    solver: str = "euler"
    steps: int = 50
    guidance: float = 3.0
    start: float = 1.0  # t of the noised latents that sampling starts from


GUIDANCES = [Setting(guidance=scale) for scale in (1.0, 2.0, 3.0, 5.0, 8.0)]
STEPS = [Setting(steps=n) for n in (5, 10, 25, 50, 100)] + [Setting("heun", n) for n in (5, 13, 25)]
STARTS = [Setting(start=t) for t in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)]


@torch.no_grad()
def measure(
    model: rae.TextToImage, requests: list[dict], setting: Setting, config: Config, dist_ctx
) -> dict[str, float]:
    """Share of right images in each task, and overall. An image has the same noise in all settings."""
    right, size = defaultdict(list), model.autoencoder.image_size
    for start in range(0, len(requests), config.batch):
        batch = requests[start : start + config.batch]
        numbers = range(start, start + len(batch))
        noise, *_ = data.flow_draws(model.latent_shape, config.seed, numbers, dist_ctx.device)
        true = []
        for number, request in zip(numbers, batch, strict=True):
            image = shapes.render(request, config.seed + number, size)
            true.append(torch.from_numpy(image).permute(2, 0, 1))
        with dist_ctx.autocast():
            latents = model.autoencoder.encode(data.to_unit(torch.stack(true), dist_ctx.device)).float()
            noised = (1 - setting.start) * latents + setting.start * noise
        prompts = [request["prompt"] for request in batch]
        _, images = generate(model, prompts, noised, dist_ctx, **setting._asdict())
        for request, image in zip(batch, images, strict=True):
            right[request["tag"]].append(scorer.score(image, request)[0])
    return scorer.overall(right)


def plot(scores: dict[Setting, dict[str, float]], path: Path) -> None:
    """Scores over the guidance scale, the number of network evaluations, and the start."""
    with common.plotting(path, 1, 3, figsize=(13, 4), sharey=True) as axes:
        tasks = {"overall": "k-o", "single_object": "C0--.", "colors": "C1--.", "counting": "C2--."}
        for axis, settings, name in ((axes[0], GUIDANCES, "guidance"), (axes[2], STARTS, "start")):
            places = [getattr(setting, name) for setting in settings]
            for task, style in tasks.items():
                values = [scores[setting][task] for setting in settings]
                axis.plot(places, values, style, label=task.replace("_", " "))
        for solver, evaluations, style in (("euler", 1, "k-o"), ("heun", 2, "C3-s")):
            settings = [setting for setting in STEPS if setting.solver == solver]
            places = [evaluations * setting.steps for setting in settings]
            values = [scores[setting]["overall"] for setting in settings]
            axes[1].plot(places, values, style, label=f"overall, {solver}")
        axes[0].set(xlabel="guidance scale, 50 Euler steps", ylabel="share of right images", ylim=(0, 1))
        axes[1].set(xlabel="network evaluations, guidance scale 3", xscale="log")
        axes[2].set(xlabel="t of the noised true latents at the start")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)


def main() -> None:
    config = common.parse(Config, __doc__)
    common.check_output(Path(config.out), ".png")
    common.check_output(Path(config.out).with_suffix(".json"))
    dist_ctx = common.init_distributed(config.dtype)
    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    requests = []
    for task in shapes.TASKS:
        for i in range(config.limit):
            requests += [shapes.prompt(task, config.seed, i)] * config.images
    scores, results = {}, []
    for setting in tqdm(dict.fromkeys(GUIDANCES + STEPS + STARTS), desc="settings"):
        scores[setting] = measure(model, requests, setting, config, dist_ctx)
        solver, steps, guidance, start = setting
        name = f"{solver}, {steps} steps, guidance {guidance:g}, from {start:g}"
        for task, value in scores[setting].items():
            n = len(requests) // (1 if task == "overall" else len(shapes.TASKS))
            results.append({"metric": f"{task}/{name}", "value": value, "n": n})
    print(common.table(results))
    plot(scores, Path(config.out))
    common.save_results(results, config.seed, Path(config.out).with_suffix(".json"))


if __name__ == "__main__":
    common.main(main)
