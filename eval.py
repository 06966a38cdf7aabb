"""Pictures to numbers.

    python eval.py                         # the shipped nano models: everything below
    python eval.py recon                   # reconstruction of unseen pictures: PSNR, SSIM, rFID
    python eval.py shapes --limit 5        # text to image: the six GenEval tasks, 5 prompts each
    python eval.py shapes --model runs/t2i/model --out runs/t2i/shapes.json

    # the papers' table of reconstructions, on 8 GPUs
    torchrun --nproc-per-node 8 eval.py recon --autoencoder runs/decoder/model --features inception \\
        --lpips vgg --data imagenet=path/to/val,yfcc=path/to/yfcc,text=path/to/text --limit 50000

Prints a table and writes a list of results as JSON: metric, value, n, seed, command, versions, date. `recon`
draws a strip beside it, originals above their reconstructions: results.png.

rFID compares the reconstructions of a data set with its own originals, the centre crops that they were made
from (ImageNet: the 50,000 of the validation set, not ADM's file of the training set), unless --reference
names something else. Only rfid-inception is the papers' metric; rfid-encoder needs no download.
"""

import json
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import common
import data
import rae
from common import flag

WHAT = ("recon", "shapes")
STRIP = 8  # pictures of each data set that are shown


@dataclass
class Config:
    what: list[str] = flag((), "recon, shapes; everything if none is named", nargs="*", metavar="WHAT")
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id, for shapes")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id, for recon")
    data: str = flag(
        ",".join(f"{name.removeprefix('nano:')}={name}" for name in data.NANO_MIXTURE),
        "data sets for recon, NAME=SOURCE,...: a column of the table each; sources are those of data.py",
    )
    limit: int | None = flag(
        None,
        "pictures a data set (recon; all, of nano 256) and prompts a task (shapes, 20) at most",
        at_least=2,
    )
    features: str = flag(
        "encoder",
        "what rFID compares: features of Inception, or of the nano world's encoder",
        choices=["inception", "encoder"],
    )
    inception: str = flag("", "file of Inception's weights, if torch-fidelity is not to download them")
    lpips: str = flag(
        "none", "network of LPIPS; torchvision downloads its weights", choices=["vgg", "alex", "none"]
    )
    reference: str = flag(
        "", "what rFID compares with instead of the originals: a .npz as ADM's, or a source of pictures"
    )
    save_reference: str = flag("", "write the statistics that rFID compared with to this .npz")
    npz: str = flag("", "write the reconstructions to this .npz, as ADM's: arr_0 uint8 (N, H, W, 3)")
    pictures: int = flag(4, "for each prompt", at_least=1)
    steps: int = flag(50, "steps of the sampler", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance")
    solver: str = flag("euler", "of the flow's differential equation", choices=["euler", "heun"])
    seed: int = flag(1000, "of the pictures, prompts and noise; training uses small ones")
    batch: int = flag(64, "pictures at once, on each process", at_least=1)
    workers: int = flag(1, "data loading processes for each process", at_least=0)
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


def load_lpips(network: str, where: common.Launch) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS 0.1: a function of pairs of pictures (B, 3, H, W) in [0, 1] -> (B,)."""
    import lpips

    with loading("LPIPS"):
        model = lpips.LPIPS(net=network, verbose=False).to(where.device)
    return lambda one, other: model(one, other, normalize=True).flatten()


@contextmanager
def loading(name: str):
    """Around what reads or downloads a metric's network: an error that a user understands."""
    try:
        yield
    except Exception as error:  # from torch, the file or the network
        raise ValueError(f"cannot load the weights of {name}: {common.one_line(error)}") from error


# -----------------------------------------------------------------------------------------------------------
# Frechet distance


class Features(NamedTuple):
    """A frozen network by whose features pictures are compared: uint8 (B, 3, H, W) -> (B, width)."""

    name: str
    width: int
    extract: Callable[[Tensor], Tensor]


def load_features(name: str, weights: str, where: common.Launch) -> Features:
    """inception: the 2048 pooled features by which FID is defined, in torch-fidelity's port, which resizes
    pictures as TensorFlow did; `weights` is a file of them. encoder: the mean token of the encoder in
    nano/weights, whatever is evaluated, so that numbers of different autoencoders can be compared."""
    if name == "encoder":
        folder = str(common.WEIGHTS / "encoder")
        with common.loading(folder):
            model = rae.RAE(folder, rae.DECODERS["nano"]).to(where.device)
        width = model.latent_shape[1]
        return Features(name, width, lambda x: model.encode(data.to_unit(x, where.device)).mean(dim=1))
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with loading("Inception"):
        if weights:
            torch.load(weights, weights_only=True)  # the library itself would run code out of the file
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    network.to(where.device)
    return Features(name, 2048, lambda x: network(x.to(where.device))[0])


class Gaussian(NamedTuple):
    """What FID sees of pictures: mean (D,) and unbiased covariance (D, D) of their features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # of the pictures, where it is known


class FeatureSums:
    """Features of pictures, kept only as sums, in float64 on the CPU."""

    def __init__(self, features: Features):
        self.extract = features.extract
        self.count = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(features.width, dtype=torch.float64)
        self.products = torch.zeros(features.width, features.width, dtype=torch.float64)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """uint8 (B, 3, H, W)."""
        x = self.extract(images).cpu().double()
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products += x.T @ x

    def gaussian(self) -> Gaussian:
        """Of the pictures of all processes. Raises ValueError if there are less than two."""
        if dist.is_initialized():
            for tensor in (self.count, self.total, self.products):
                dist.all_reduce(tensor)
        count = int(self.count)
        if count < 2:
            raise ValueError(f"FID needs at least 2 pictures, but only {count} can be used")
        mean = self.total / count
        covariance = (self.products - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean.numpy(), covariance.numpy(), count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2.

    Both roots are of symmetric matrices and come from eigenvalues in float64; a general matrix root (scipy's
    sqrtm) takes far longer, and some versions of it were wrong.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return max(0.0, float(np.square(one.mean - other.mean).sum() + traces - 2 * cross))


def save_gaussian(path: str, gaussian: Gaussian, features: str) -> None:
    """A .npz with ADM's keys mu and sigma; and n, and the name of the features."""
    with common.replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance, n=gaussian.count, features=features)


def load_reference(
    source: str, features: Features, size: int, config: Config, where: common.Launch
) -> Gaussian:
    """The statistics in a .npz, or those of its pictures, or of a whole source of pictures. Raises ValueError
    for a file that is damaged or holds other features."""
    sums = FeatureSums(features)
    if not source.endswith(".npz"):
        for batch in open_once(source, size, None, config, where):
            sums.add(batch["image"])
        return sums.gaussian()
    arrays = read_npz(source)
    if "mu" in arrays:
        return check_gaussian(source, arrays, features)
    own = torch.from_numpy(arrays["arr_0"][where.rank :: where.world]).permute(0, 3, 1, 2)
    for part in own.split(config.batch) if len(own) else ():
        sums.add(part)
    return sums.gaussian()


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Statistics as `save_gaussian` or ADM wrote them, or pictures {"arr_0": uint8 (N, H, W, 3)}."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" in file:
                given = {"features": file["features"]} if "features" in file else {}
                return {"mu": file["mu"], "sigma": file["sigma"]} | given
            pictures = file["arr_0"]
    except Exception as error:  # from numpy, zipfile or zlib
        raise ValueError(
            f"cannot read statistics or pictures from {path}: {common.one_line(error)}"
        ) from error
    if pictures.dtype != np.uint8 or pictures.shape[3:] != (3,):
        raise ValueError(f"{path}: arr_0 is {pictures.dtype} {pictures.shape}, not uint8 (N, H, W, 3)")
    return {"arr_0": pictures}


def check_gaussian(path: str, arrays: dict[str, np.ndarray], features: Features) -> Gaussian:
    """Of the arrays of a file, which is ADM's, with Inception's features, if it does not say which."""
    known = str(arrays.get("features", "inception"))
    if known != features.name:
        raise ValueError(
            f"{path} holds statistics of {known} features, not of {features.name}: see --features"
        )
    mean, covariance, width = arrays["mu"], arrays["sigma"], features.width
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{path} holds mu {mean.shape} and sigma {covariance.shape} of {width} {known} features"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} holds numbers that are not finite")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


# -----------------------------------------------------------------------------------------------------------
# reconstruction


def data_sets(names: str) -> dict[str, str]:
    """The sources of NAME=SOURCE,... by name; a source alone is called by the last part of its path."""
    pairs = [part.partition("=") for part in names.split(",")]
    sets = {(name if equals else Path(name).name): source or name for name, equals, source in pairs}
    if len(sets) < len(pairs) or not all(sets) or any("/" in name for name in sets):
        raise ValueError(f"--data {names}: give every data set a plain name of its own, NAME=SOURCE")
    return sets


def open_once(source: str, size: int, limit: int | None, config: Config, where: common.Launch) -> data.Once:
    opened = data.open_source(source, size, config.seed)
    return data.Once(opened, config.batch, limit, config.workers, where.rank, where.world)


def in_order(items: list[tuple], where: common.Launch) -> list[tuple]:
    """Tuples (index, ...) of all processes, sorted, on the main process; elsewhere nothing."""
    parts = [items]
    if where.world > 1:
        parts = [None] * where.world if where.main else None
        dist.gather_object(items, parts)
    return sorted((item for part in parts for item in part), key=lambda item: item[0]) if where.main else []


def recon(config: Config, where: common.Launch) -> list[dict]:
    """PSNR, SSIM, LPIPS and FID of the reconstructions of each data set, after rounding to 8 bits."""
    sets = data_sets(config.data)
    if len(sets) > 1 and (config.reference or config.save_reference or config.npz):
        raise ValueError("--reference, --save-reference and --npz belong to one data set: name one in --data")
    model = common.load_autoencoder(config.autoencoder, where)
    features = load_features(config.features, config.inception, where)
    metrics = {"psnr": psnr, "ssim": ssim}
    if config.lpips != "none":
        metrics[f"lpips-{config.lpips}"] = load_lpips(config.lpips, where)
    reference = None
    if config.reference:
        reference = load_reference(config.reference, features, model.image_size, config, where)
    results, strip = [], []
    for name, source in sets.items():
        values, count, shown = reconstruct(name, source, model, metrics, features, reference, config, where)
        results += [{"metric": f"{k}/{name}", "value": v, "n": count} for k, v in values.items()]
        strip.append(shown)
    if where.main:
        columns = min(shown.shape[1] for shown in strip)
        strip = torch.cat([shown[:, :columns].flatten(0, 1) for shown in strip])
        grid = common.picture_grid(strip / 255, columns, scale=max(1, 128 // model.image_size))
        common.save_picture(Path(config.out).with_suffix(".png"), grid, data=config.data)
    return results


@torch.no_grad()
def reconstruct(
    name: str,
    source: str,
    model: rae.RAE,
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]],
    features: Features,
    reference: Gaussian | None,
    config: Config,
    where: common.Launch,
) -> tuple[dict[str, float], int, Tensor]:
    """One data set, of which every process takes its share: means of the metrics and the FID, the number of
    pictures, and the first originals and reconstructions (2, n, 3, H, W) uint8, on the main process."""
    limit = config.limit or (256 if source.startswith("nano") else None)
    batches = open_once(source, model.image_size, limit, config, where)
    sums, originals, decoded_sums = dict.fromkeys(metrics, 0.0), FeatureSums(features), FeatureSums(features)
    first, written = [], []
    for batch in tqdm(batches, desc=f"recon {name}", leave=False, disable=not where.main):
        original = data.to_unit(batch["image"], where.device)
        with where.autocast():
            rounded = to_uint8(model.decode(model.encode(original)))
        decoded = data.to_unit(rounded, where.device)
        for key, metric in metrics.items():
            sums[key] += sum(metric(decoded, original).tolist())
        decoded_sums.add(rounded)
        if reference is None:
            originals.add(batch["image"])
        first += zip(batch["index"], batch["image"].numpy(), rounded.numpy(), strict=True)
        first = sorted(first, key=lambda item: item[0])[:STRIP]
        if config.npz:
            written += zip(batch["index"], rounded.permute(0, 2, 3, 1).numpy(), strict=True)
    if batches.skipped:
        print(f"{name}: left out {len(batches.skipped)} pictures: {batches.skipped[0]}", file=sys.stderr)

    gaussian = decoded_sums.gaussian()
    reference = reference or originals.gaussian()
    totals = common.global_sum(*sums.values())
    values = {key: total / gaussian.count for key, total in zip(sums, totals, strict=True)}
    first, written = in_order(first, where)[:STRIP], in_order(written, where)
    if not where.main:
        return values, gaussian.count, torch.empty(0)
    values[f"rfid-{features.name}"] = frechet_distance(gaussian, reference)
    if gaussian.count < features.width:
        print(
            f"{name}: {gaussian.count} pictures are few for a FID of {features.width} features: compare it "
            "with others of as many only",
            file=sys.stderr,
        )
    if config.save_reference:
        save_gaussian(config.save_reference, reference, features.name)
    if config.npz:
        with common.replacing(Path(config.npz)) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=np.stack([picture for _, picture in written]))
    return values, gaussian.count, torch.from_numpy(np.stack([pair for _, *pair in first], axis=1))


# -----------------------------------------------------------------------------------------------------------
# text to image


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


@torch.no_grad()
def through(autoencoder: rae.RAE, picture: np.ndarray, where: common.Launch) -> np.ndarray:
    """One picture (H, W, 3) uint8, encoded and decoded."""
    images = data.to_unit(torch.from_numpy(picture).permute(2, 0, 1)[None], where.device)
    with where.autocast():
        decoded = autoencoder.decode(autoencoder.encode(images))
    return to_uint8(decoded)[0].permute(1, 2, 0).numpy()


def shapes(config: Config, where: common.Launch) -> list[dict]:
    """Accuracies of the six GenEval tasks in the nano world, and of objects in pairs of shape and colour that
    no training picture held; beside the model's pictures true renderings, these as the autoencoder returns
    them (the ceiling), and the model's pictures judged by another prompt of the task (the floor)."""
    from nano import scorer
    from nano.shapes import TASKS, prompt, render

    model = common.load_model(rae.TextToImage, config.model, "", where)
    n, held_out = config.limit or 20, "held-out colors"
    wanted = {task: [prompt(task, config.seed, i) for i in range(n)] for task in TASKS}
    wanted[held_out] = [prompt("colors", config.seed, i, held_out=True) for i in range(n)]
    jobs = [(task, i) for task in wanted for i in range(n) for _ in range(config.pictures)]
    pictures = draw(model, [wanted[task][i]["prompt"] for task, i in jobs], config, where)

    right = {column: defaultdict(list) for column in ("model", "true", "decoded", "shuffled")}
    for number, ((task, i), picture) in enumerate(zip(jobs, pictures, strict=True)):
        true = render(wanted[task][i], config.seed + number, len(picture))
        decoded = through(model.autoencoder, true, where)
        right["model"][task].append(scorer.score(picture, wanted[task][i])[0])
        right["true"][task].append(scorer.score(true, wanted[task][i])[0])
        right["decoded"][task].append(scorer.score(decoded, wanted[task][i])[0])
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
    """Markdown. Of recon a row for each metric and a column for each data set, psnr/objects; of shapes the
    last part of a name is the row, shapes/model/counting."""
    cells, columns = defaultdict(dict), []
    for result in results:
        column, _, row = result["metric"].rpartition("/")
        if "/" not in column:
            column, row = row, column
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
    if where.main:
        print(where)
    results = []
    for name in config.what or WHAT:
        if name == "recon":
            part = recon(config, where)
        elif where.main:  # alone: it is not split
            part = shapes(config, where)
        if where.main:
            print(f"\n{table(part)}", flush=True)
            results += part
    if where.main:
        save(results, config)


def save(results: list[dict], config: Config) -> None:
    """As JSON, each result with what it takes to make it again."""
    packages = {
        name: version(name) for name in ("torch", "transformers", "numpy", "torchmetrics", "torch-fidelity")
    }
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
