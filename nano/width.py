"""Why a DiT must be at least as wide as the tokens: RAE's experiment (arXiv 2510.11690, section 4) on one
image.

    python -m nano.width                        # the shipped autoencoder: docs/width.png, docs/width.json
    python -m nano.width --autoencoder runs/decoder/model --out runs/width.png

Overfits the latents of one image, with fresh noise and timesteps in every step, with DiTs narrower than, as
wide as and wider than the C channels of a token, with deeper narrow ones, and with a narrow one that has a
DDT head (wide and shallow). Takes 9 minutes on one CPU core. Prints a table, writes the losses as a plot, and
the results as JSON beside it.

The bound: the last layer is linear, so the outputs for a token lie in a subspace of d dimensions, where d is
the width in front of it. The target, noise - x, fills all C dimensions, because the noise does. A model of
any depth loses what lies outside the best subspace: the C - d smallest eigenvalues of the target's
covariance. That covariance is I + Cov(x), where Cov(x) over the N tokens of one image has rank N - 1 at most.
So from d = N - 1 on these eigenvalues are all 1, and the bound of the loss, a mean over channels, is
(C - d) / C. With a DDT head d is the width of the head, and the width of the backbone no longer counts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import common
import data
import rae
from common import flag
from nano import shapes

HEADS = 2
ALPHA = 3.0  # timestep shift of train_t2i.py's nano preset
DRAWS = 1024  # draws of noise and t to measure a trained model with


@dataclass
class Config:
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE or VAE folder or hub id")
    steps: int = flag(1000, "optimizer steps of each model", at_least=2)
    batch: int = flag(32, "draws of noise and t per step", at_least=1)
    seed: int = flag(0, "of the image, weights, noise and t")
    out: str = flag("docs/width.png", "the plot; the results are beside it, as .json")


class Size(NamedTuple):
    """Width and depth of a DiT's backbone, and (width, depth) of its DDT head if it has one."""

    width: int
    depth: int
    head: tuple[int, int] | None = None

    @property
    def last_width(self) -> int:
        return self.head[0] if self.head else self.width

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}" + (f"+{self.head[0]}x{self.head[1]}" if self.head else "")


def sizes(channels: int) -> list[Size]:
    """The models to compare. RoPE needs a multiple of 4 channels per head."""
    widths = [
        max(1, round(part * channels / (4 * HEADS))) * 4 * HEADS for part in (0.25, 0.5, 0.75, 1.0, 1.5)
    ]
    half, wide = widths[1], widths[-1]
    plain = [Size(width, 2) for width in widths]
    return list(dict.fromkeys([*plain, Size(half, 4), Size(half, 8), Size(half, 2, (wide, 2))]))


def lower_bound(latents: Tensor, width: int) -> float:
    """The least flow loss on one image's latents (N, C) if the outputs for a token lie in a subspace of
    `width` dimensions: the C - width smallest eigenvalues of the target's covariance, summed, over C."""
    channels = latents.shape[1]
    covariance = torch.cov(latents.double().T, correction=0) + torch.eye(channels, dtype=torch.float64)
    smallest = torch.linalg.eigvalsh(covariance)[: max(0, channels - width)]  # in ascending order
    return smallest.sum().item() / channels


# -----------------------------------------------------------------------------------------------------------
# one model


def flow_loss(model: rae.DiT, latents: Tensor, seed: int, first: int, count: int) -> Tensor:
    """Mean loss on the latents (N, C) over draws of noise and t number first, first + 1, ..."""
    noise, u, _ = data.flow_draws(latents.shape, seed, range(first, first + count), latents.device)
    t = rae.sample_time(u, ALPHA).to(latents.device)
    return rae.flow_loss(model, latents.expand(count, -1, -1), None, ALPHA, noise, t).mean()


def train(size: Size, latents: Tensor, config: Config) -> tuple[rae.DiT, list[float]]:
    """An unconditional DiT trained on these latents (N, C) alone, and its loss in every step."""
    torch.manual_seed(config.seed)
    head = (*size.head, HEADS) if size.head else None
    model = rae.DiT(tuple(latents.shape), size.width, size.depth, HEADS, head).to(latents.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=config.steps, pct_start=0.05)
    losses = []
    for step in (bar := tqdm(range(config.steps), desc=str(size), leave=False, dynamic_ncols=True)):
        loss = flow_loss(model, latents, config.seed, step * config.batch, config.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return model, losses


@torch.no_grad()
def measure(model: rae.DiT, latents: Tensor, config: Config) -> float:
    """The loss over draws that training has not used."""
    first = config.steps * config.batch
    losses = [flow_loss(model, latents, config.seed, first + start, 64) for start in range(0, DRAWS, 64)]
    return torch.stack(losses).mean().item()


# -----------------------------------------------------------------------------------------------------------
# results


class Result(NamedTuple):
    size: Size
    parameters: int  # trainable
    losses: list[float]  # in every step
    loss: float  # in the end, on fresh draws
    bound: float


def table(results: list[Result], channels: int) -> str:
    """Markdown."""
    lines = [["width", "depth", "head", "parameters", "loss", "lower bound"], ["---"] * 6]
    for size, parameters, _, loss, bound in results:
        head = f"{size.head[0]} x {size.head[1]}" if size.head else ""
        width = f"{size.width} ({size.width / channels:.2f} C)"
        lines.append([width, str(size.depth), head, f"{parameters:,}", f"{loss:.4f}", f"{bound:.3f}"])
    return "\n".join("| " + " | ".join(f"{cell:12}" for cell in line) + " |" for line in lines)


def plot(results: list[Result], latents: Tensor, path: Path) -> None:
    """Left: loss over steps. Right: final loss over width, with its bound."""
    channels = latents.shape[1]
    with common.plotting(path, 1, 2, figsize=(12, 4.5)) as (left, right):
        window = max(1, len(results[0].losses) // 50)  # steps of a moving average
        for i, (size, _, losses, loss, _) in enumerate(results):
            smooth = torch.tensor(losses).unfold(0, window, 1).mean(dim=1)
            label = f"{size.width} wide, {size.depth} deep"
            label += f", head {size.head[0]} wide, {size.head[1]} deep" if size.head else ""
            style = {"color": f"C{i}", "label": label}
            left.plot(range(window, len(losses) + 1), smooth, **style, linestyle="--" if size.head else "-")
            right.plot(size.width, loss, **style, linestyle="", marker="*" if size.head else "o")
        widest = max(result.size.width for result in results)
        bounds = [lower_bound(latents, width) for width in range(widest + 1)]
        right.plot(bounds, color="black", linewidth=1, label="lower bound, without a head")
        right.axvline(channels, color="gray", linestyle=":", label=f"width of a token, {channels}")
        left.set(xlabel="step", ylabel="flow loss", yscale="log")
        top = 1.05 * max(1.0, *(result.loss for result in results))
        right.set(xlabel="width of the backbone", ylabel="final flow loss")
        right.set(xlim=(0, 1.05 * widest), ylim=(-0.03, top))
        for axis in (left, right):
            axis.grid(alpha=0.3)
        right.legend(fontsize=8)


def main() -> None:
    config = common.parse(Config, __doc__)
    common.check_output(Path(config.out), ".png")
    common.check_output(Path(config.out).with_suffix(".json"))
    dist_ctx = common.init_distributed("fp32")
    autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
    sample = shapes.draw("objects", config.seed, 0, autoencoder.image_size)
    image = data.to_unit(torch.from_numpy(sample.image).permute(2, 0, 1)[None], dist_ctx.device)
    with torch.no_grad():
        latents = autoencoder.encode(image)[0]
    tokens, channels = latents.shape
    print(f"{dist_ctx}\n{sample.caption!r}, {tokens} tokens of {channels} channels, C")
    results = []
    for size in sizes(channels):
        model, losses = train(size, latents, config)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        final, bound = measure(model, latents, config), lower_bound(latents, size.last_width)
        results.append(Result(size, parameters, losses, final, bound))
    print(f"\n{table(results, channels)}\n")
    out = Path(config.out)
    plot(results, latents, out)
    # n of a loss is its number of draws, n of a bound the tokens of the image
    rows = [{"metric": f"loss/{r.size}", "value": r.loss, "n": DRAWS} for r in results]
    rows += [{"metric": f"bound/{r.size}", "value": r.bound, "n": tokens} for r in results]
    common.save_results(rows, config.seed, out.with_suffix(".json"))


if __name__ == "__main__":
    common.main(main)
