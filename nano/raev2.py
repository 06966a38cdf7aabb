"""RAEv2's ideas at nano scale: what the DiT predicts, where its condition enters, and what guides it.

    python -m nano.raev2                             # 3 seeds: about 2 hours of one core; resumes
    taskset -c 0 python -m nano.raev2 --seeds 0,1 & taskset -c 1 python -m nano.raev2 --seeds 2 & wait

Trains a small DiT on the 48 pairs of shape and colour, on cached latents, with equal steps and seeds for all
arms. Measures the velocity error on unseen images, and for each kind of guidance the share of sampled images
that show the shape and the colour of their label. Prints a table; writes OUT/results.json.
"""

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import common
import data
import rae
from common import flag
from nano import scorer, shapes

IN_CONTEXT = ["--dit", "nano-guide-in-context", "--base-weight"]
ARMS = {  # flags of train_t2i.py
    "adaLN, velocity": ["--dit", "nano-guide", "--prediction", "velocity"],
    "adaLN, x": ["--dit", "nano-guide", "--prediction", "x"],
    "in context, velocity": [*IN_CONTEXT, "0", "--prediction", "velocity"],
    "in context, x": [*IN_CONTEXT, "0", "--prediction", "x"],
    "in context, velocity, base head": [*IN_CONTEXT, "1", "--prediction", "velocity"],
    "in context, x, base head": [*IN_CONTEXT, "1", "--prediction", "x"],
}
GUIDANCE = {  # arguments of `generate`
    "none": {},
    "classifier-free 1.5": {"guidance": 1.5},
    "classifier-free 2.5": {"guidance": 2.5},
    "internal 1.5": {"internal_guidance": 1.5},
    "internal 2.5": {"internal_guidance": 2.5},
}


@dataclass
class Config:
    seeds: str = flag("0,1,2", "seeds of the runs, comma separated")
    steps: int = flag(600, "optimizer steps of each run", at_least=1)
    images: int = flag(16384, "images whose latents are cached", at_least=64)
    samples: int = flag(240, "images sampled from each model and guidance", at_least=48)
    out: str = flag("runs/raev2", "folder of the runs; results.json is the table")


def script(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


def train(name: str, seed: int, config: Config) -> Path:
    """The folder of a finished run; one that was stopped goes on."""
    folder = Path(config.out) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    script(
        *("train_t2i.py", "--preset", "nano-class", "--data", f"{config.out}/latents", "--resume"),
        *("--val-data", "nano:classes", "--seed", str(seed), "--steps", str(config.steps)),
        *("--save-every", str(config.steps), "--eval-every", str(config.steps), "--out", str(folder)),
        *("--batch", "64", "--draws", "1", "--warmup", "50", "--dtype", "bf16", *ARMS[name]),
    )
    return folder


@torch.no_grad()
def share_right(model: rae.ClassToImage, settings: dict, config: Config) -> float:
    """Share of the images that show their label's shape and colour, the same noise for every model."""
    right = []
    for start in range(0, config.samples, 96):
        indices = list(range(start, min(start + 96, config.samples)))
        noise, *_ = data.flow_draws(model.latent_shape, 0, indices, torch.device("cpu"))
        labels = [i % len(shapes.PAIRS) for i in indices]
        images: Tensor = model.autoencoder.decode(model.generate(labels, 25, noise=noise, **settings))
        for label, image in zip(labels, common.to_uint8(images).permute(0, 2, 3, 1).numpy(), strict=True):
            shape, color = shapes.PAIRS[label]
            entry = {"class": shape, "count": 1, "color": color}
            right.append(scorer.score(image, {"include": [entry]})[0])
    return float(np.mean(right))


def measure(name: str, folder: Path, config: Config) -> dict[str, float]:
    """The figures of one run, kept in its folder."""
    kept = folder / "figures.json"
    if not kept.exists():
        rows = common.read_rows(folder / "metrics.jsonl")
        figures = next(row for row in reversed(rows) if "val_loss" in row)
        figures = {key: value for key, value in figures.items() if key.startswith("val_loss")}
        model = rae.ClassToImage.from_pretrained(folder / "model").eval()
        for guidance, settings in GUIDANCE.items():
            if "internal_guidance" not in settings or name.endswith("base head"):
                figures[guidance] = share_right(model, settings, config)
        with common.replacing(kept) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
    return json.loads(kept.read_text())


def main() -> None:
    config = common.parse(Config, __doc__)
    seeds = [int(seed) for seed in config.seeds.split(",")]
    out = Path(config.out)
    common.check_output(out / "results.json")
    if not (out / "latents").exists():
        script(
            "encode.py",
            "--data",
            "nano:classes",
            "--limit",
            str(config.images),
            "--out",
            str(out / "latents"),
        )
    values = defaultdict(list)
    for seed in seeds:
        for name in ARMS:
            for figure, value in measure(name, train(name, seed, config), config).items():
                values[f"{figure}/{name}"].append(value)
    results = []
    for metric, numbers in values.items():
        results.append({"metric": metric, "value": float(np.mean(numbers)), "n": len(numbers)})
        spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
        results.append({"metric": f"spread of {metric}", "value": spread, "n": len(numbers)})
    print(common.table([row for row in results if not row["metric"].startswith("spread")]))
    common.save_results(results, seeds[0], out / "results.json")


if __name__ == "__main__":
    common.main(main)
