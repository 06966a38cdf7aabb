"""Images to numbers.

    python eval.py                         # the shipped nano models: recon and shapes
    python eval.py recon                   # reconstruction of unseen images: PSNR, SSIM, rFID
    python eval.py shapes --limit 5        # text to image: the six GenEval tasks, 5 prompts each
    python eval.py shapes --model runs/t2i/model --out runs/t2i/shapes.json
    python eval.py fid --samples samples --reference nano:objects  # FID, sFID, precision and recall

    # GenEval: draw in the official layout, then detect and judge; both go on where they were stopped
    torchrun --nproc-per-node 8 sample.py --file evaluation_metadata.jsonl --out geneval --resume
    torchrun --nproc-per-node 8 eval.py geneval --samples geneval

    # the papers' table of reconstructions, on 8 GPUs
    torchrun --nproc-per-node 8 eval.py recon --autoencoder runs/decoder/model --features inception \\
        --lpips vgg --data imagenet=path/to/val,yfcc=path/to/yfcc,text=path/to/text --limit 50000

    # the papers' table of generated images, on 8 GPUs: FID, sFID, Inception score, precision, recall
    torchrun --nproc-per-node 8 eval.py fid --features inception --samples fid.npz \\
        --reference VIRTUAL_imagenet256_labeled.npz

Prints a table and writes a list of results as JSON: metric, value, n, seed, command, versions, date. `recon`
draws a strip beside it, originals above their reconstructions: results.png.

rFID compares the reconstructions of a data set with its own originals, the centre crops that they were made
from (ImageNet: the 50,000 of the validation set, not ADM's file of the training set), unless --reference
names something else. Only rfid-inception is the papers' metric; rfid-encoder needs no download.

fid compares as ADM's evaluator does. Samples and reference are each a .npz (images arr_0, or statistics mu,
sigma, mu_s, sigma_s, or both, as ADM's file of the training set) or a source of data.py. Samples are taken as
they are, in one size; images of a reference that is no .npz are cropped to it, as those of ADM's file were.

geneval needs no mmdetection: the same Mask2Former and CLIP come through `transformers`. Published figures
that others have scored both ways differ by about 0.01. A row of every image, as the official file has them,
is added to OUT-geneval.jsonl, and not scored again. clipscore is 100 times the cosine, or 0, of each
image of a folder and of the prompt in its PNG, which sample.py writes there. dpg wants grids of 2 x 2
images, ITEM.png, as sample.py --file FOLDER draws them for the official prompts; any visual question
answering model of `transformers` answers, but only figures of mPLUG compare with published ones.
understanding asks --model itself; an image is squeezed into its square, of several the first is shown.
"""

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import benchmarks
import common
import data
import rae
from common import flag

STRIP = 8  # images of each data set that are shown
SPATIAL = 7  # channels that sFID compares at every place
SPLIT = 5000  # images of an Inception score, of which the mean over all splits is given
NEIGHBOURS = 3  # the nearest one that a manifold reaches as far as
MANIFOLD = 10_000  # images of the reference that precision and recall compare with, as many as ADM's file has
ROWS = 1000  # of a matrix of distances at once


@dataclass
class Config:
    what: list[str] = flag(
        (),
        "recon, shapes, scaling, fid, geneval, clipscore, dpg, understanding; the first two if none is named",
        nargs="*",
        metavar="WHAT",
    )
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id, for shapes")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id, for recon")
    data: str = flag(
        ",".join(f"{name.removeprefix('nano:')}={name}" for name in data.NANO_MIXTURE),
        "data sets for recon, NAME=SOURCE,...: a column of the table each; sources are those of data.py",
    )
    limit: int | None = flag(
        None,
        "images a data set (recon, fid; all, of nano 256) or in all (others), and prompts a "
        "task (shapes, 20)",
        at_least=2,
    )
    features: str = flag(
        "encoder",
        "what FID and rFID compare: features of Inception, or of the nano world's encoder",
        choices=["inception", "encoder"],
    )
    inception: str = flag("", "file of Inception's weights, if torch-fidelity is not to download them")
    lpips: str = flag(
        "none", "network of LPIPS; torchvision downloads its weights", choices=["vgg", "alex", "none"]
    )
    samples: str = flag("", "for fid, a .npz as ADM's or a source of images; for the others, a folder")
    detector: str = flag("facebook/mask2former-swin-small-coco-instance", "Mask2Former of geneval")
    questions: str = flag("dpg_bench.csv", "DPG-Bench's table")
    vqa: str = flag("Salesforce/blip-vqa-base", "what answers them")
    sets: str = flag(",".join(benchmarks.ASKED), "of understanding, comma separated")
    local: str = flag("", "read them from LOCAL/NAME/*.parquet with the hub's columns, instead of from there")
    clip: str = flag("openai/clip-vit-large-patch14", "CLIP of geneval's colours, and of clipscore")
    reference: str = flag(
        "", "for fid, and for rFID instead of the originals: a .npz as ADM's, or a source of images"
    )
    save_reference: str = flag("", "write the statistics that samples were compared with to this .npz")
    npz: str = flag("", "write the reconstructions to this .npz, as ADM's: arr_0 uint8 (N, H, W, 3)")
    images: int = flag(4, "for each prompt", at_least=1)
    candidates: int = flag(32, "scaling: images to choose from for each prompt", at_least=4)
    seeds: int = flag(3, "scaling: over how many seeds", at_least=1)
    steps: int = flag(50, "steps of the sampler", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance")
    skip: int | None = flag(
        None, "a block of the DiT, from 0: guide also, at scale 2, by the model itself without it"
    )
    solver: str = flag("euler", "of the flow's differential equation", choices=["euler", "heun"])
    seed: int = flag(1000, "of the images, prompts and noise; training uses small ones")
    batch: int = flag(64, "images at once, on each process", at_least=1)
    workers: int = flag(1, "data loading processes for each process", at_least=0)
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("results.json", "file for the results")


# -----------------------------------------------------------------------------------------------------------
# metrics


def to_uint8(images: Tensor) -> Tensor:
    """What is written to a file: clamped to [0, 1], rounded to 8 bits."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each pair of images (B, 3, H, W) in [0, 1]: (B,)."""
    return -10 * (one - other).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (Gaussian window of 11, sigma 1.5, where it lies inside of the image, as Wang's
    and scikit-image's) of each pair of images in [0, 1]: (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, everywhere = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)
    return everywhere[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))


def load_lpips(network: str, dist_ctx: common.DistContext) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS 0.1: a function of pairs of images (B, 3, H, W) in [0, 1] -> (B,)."""
    import lpips

    with loading("LPIPS"):
        model = lpips.LPIPS(net=network, verbose=False).to(dist_ctx.device)
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
    """A frozen network by which images are compared: uint8 (B, 3, H, W) -> what FID sees (B, width), and
    what sFID sees (B, spatial), a few channels at every place."""

    name: str
    width: int
    spatial: int
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    classifier: Tensor | None = None  # (classes, width): what makes logits of the first, without a bias


def load_features(name: str, weights: str, dist_ctx: common.DistContext) -> Features:
    """inception: see `load_inception`. encoder: the mean token of the encoder in nano/weights, whatever is
    evaluated, so that numbers of different autoencoders can be compared, and the first channels of each."""
    if name == "inception":
        return load_inception(weights, dist_ctx)
    folder = str(common.WEIGHTS / "encoder")
    with common.loading(folder):
        model = rae.RAE(folder, rae.DECODERS["nano"]).to(dist_ctx.device)
    tokens, width = model.latent_shape

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        x = model.encode(data.to_unit(images, dist_ctx.device))
        return x.mean(dim=1), x[:, :, :SPATIAL].flatten(1)

    return Features(name, width, tokens * SPATIAL, extract)


def load_inception(weights: str, dist_ctx: common.DistContext) -> Features:
    """The 2048 pooled features by which FID is defined, in torch-fidelity's port, which resizes images as
    TensorFlow did; `weights` is a file of them. Spatial features and classifier are those of ADM's evaluator:
    7 channels of mixed_6/conv, its rows of pixels one after the other, and 1008 logits without their bias."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with loading("Inception"):
        if weights:
            torch.load(weights, weights_only=True)  # the library itself would run code out of the file
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    network.to(dist_ctx.device)
    # In TensorFlow's graph a scope of convolution, batch norm and ReLU (mixed_6/conv/Conv2D, .../batchnorm)
    # gives its own name, mixed_6/conv, to its last operation, the ReLU: the output of the whole BasicConv2d.
    kept = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, x: kept.update(x=x[:, :SPATIAL]))

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        [pooled] = network(images.to(dist_ctx.device))
        return pooled, rearrange(kept.pop("x"), "b c h w -> b (h w c)")

    return Features("inception", 2048, 17 * 17 * SPATIAL, extract, network.fc.weight.cpu())


class Gaussian(NamedTuple):
    """What FID sees of images: mean (D,) and unbiased covariance (D, D) of their features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # of the images, where it is known


class FeatureSums:
    """Features of images, kept only as sums, in float64 on the CPU."""

    def __init__(self, width: int):
        self.count = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """(B, width)."""
        x = features.cpu().double()
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products += x.T @ x

    def gaussian(self) -> Gaussian:
        """Of the images of all processes. Raises ValueError if there are less than two."""
        if dist.is_initialized():
            for tensor in (self.count, self.total, self.products):
                dist.all_reduce(tensor)
        count = int(self.count)
        if count < 2:
            raise ValueError(f"FID needs at least 2 images, but only {count} can be used")
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


def warn_of_few(name: str, gaussian: Gaussian, features: Features) -> None:
    if gaussian.count is not None and gaussian.count < features.width:
        print(
            f"{name}: {gaussian.count} images are few for a FID of {features.width} features: compare it "
            "with others of as many only",
            file=sys.stderr,
        )


# -----------------------------------------------------------------------------------------------------------
# Inception score, precision and recall


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence of p(class | image) from their mean, of logits (n, classes): of every
    5,000 in the order given, the last ones also if they are fewer, and then the mean (ADM)."""
    scores = []
    for part in logits.split(SPLIT):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(samples: Tensor, reference: Tensor, device: torch.device) -> tuple[float, float]:
    """Share of the samples (n, D) on the manifold of the reference (m, D), and the other way round
    (Kynkaanniemi et al., 2019, arXiv 1904.06991).

    Distances are of float64, for ADM's own, of float16 where they are not too large, depend on rounding.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    samples, reference = samples.to(device).double(), reference.to(device).double()
    return on_manifold(samples, reference), on_manifold(reference, samples)


def on_manifold(points: Tensor, others: Tensor) -> float:
    """Share of the points (n, D) that lie in a ball around one of the others (m, D), each of which reaches as
    far as its third nearest neighbour."""
    pairs = (torch.cdist(part, others) for part in others.split(ROWS))
    radii = torch.cat([pair.kthvalue(NEIGHBOURS + 1, dim=1).values for pair in pairs])  # the first is itself
    inside = [(torch.cdist(part, others) <= radii).any(dim=1) for part in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


# -----------------------------------------------------------------------------------------------------------
# what is compared: files and sources of images


class Whole:
    """Instead of a data.View: images as they are, all of the size (height, width) of the first."""

    size, text_only, length = None, False, None

    def pixels(self, image: Image.Image, *draws: float) -> np.ndarray:
        own = (image.height, image.width)
        self.size = self.size or own
        if own != self.size:
            raise ValueError(
                f"images of mixed sizes: one has {pixels_of(own)} pixels, the first {pixels_of(self.size)}"
            )
        return np.array(image)


class Compared(NamedTuple):
    """What there is to compare: the statistics in a .npz (of images {}), and images."""

    source: str
    statistics: dict[str, np.ndarray]
    size: tuple[int, int] | None = None  # height, width
    batches: Iterable[tuple[Iterable, Tensor]] = ()  # this process's: numbers, uint8 (B, 3, H, W)


def pixels_of(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def open_compared(
    source: str, size: int | None, limit: int | None, config: Config, dist_ctx: common.DistContext
) -> Compared:
    """A .npz, or a source of images, of which centred squares of `size` are taken, or all of each (None).
    Images are read later. Raises ValueError for a file that is damaged, or holds no such thing."""
    if source.endswith(".npz"):
        statistics, shape = read_npz(source)
        if shape is None:
            return Compared(source, statistics)
        return Compared(source, statistics, shape[1:3], npz_batches(source, shape, limit, config, dist_ctx))
    opened = data.open_source(source, size or 48, config.seed)
    found = (size, size) if size else take_whole(source, opened, limit)
    once = data.OnePass(opened, config.batch, limit, config.workers, dist_ctx.rank, dist_ctx.world_size)
    return Compared(source, {}, found, source_batches(source, once))


def take_whole(source: str, opened: data.Mixture, limit: int | None) -> tuple[int, int]:
    """Makes a source give its images as they are, and returns their size."""
    full_tensor = Whole()
    for part in opened.sources:
        part.view = (
            full_tensor  # the nano world has no use for it: it draws in the size that it was opened with
        )
    first = next((sample for sample in opened.once(limit, 0, 1) if "image" in sample), None)
    if first is None:
        raise ValueError(f"{source} holds no image that can be used")
    full_tensor.size = first["image"].shape[:2]
    return full_tensor.size


def source_batches(source: str, once: data.OnePass) -> Iterator[tuple[list, Tensor]]:
    for batch in once:
        yield batch["index"], batch["image"]
    if once.skipped:
        print(f"{source}: left out {len(once.skipped)} images: {once.skipped[0]}", file=sys.stderr)


def npz_batches(
    path: str, shape: tuple[int, ...], limit: int | None, config: Config, dist_ctx: common.DistContext
) -> Iterator[tuple[range, Tensor]]:
    """Every world-th batch of the images in a file: 50,000 of 256 px are 10 GB, of which no process holds
    more than a batch."""
    count = min(shape[0], limit or shape[0])
    with reading(path), np.load(path, allow_pickle=False) as file, file.zip.open("arr_0.npy") as entry:
        read_header(entry)
        for number, start in enumerate(range(0, count, config.batch)):
            rows = range(start, min(start + config.batch, count))
            content = entry.read(len(rows) * int(np.prod(shape[1:])))
            if number % dist_ctx.world_size == dist_ctx.rank:
                images = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(rows), *shape[1:])
                yield rows, rearrange(images, "b h w c -> b c h w")


def read_npz(path: str) -> tuple[dict[str, np.ndarray], tuple[int, ...] | None]:
    """Statistics as `save_gaussian` or ADM wrote them, {} if there are none, and the shape (N, H, W, 3) of
    the images, None if there are none."""
    with reading(path), np.load(path, allow_pickle=False) as file:
        pairs = [pair for pair in (("mu", "sigma"), ("mu_s", "sigma_s")) if pair[0] in file]
        statistics = {key: file[key] for pair in pairs for key in pair}
        if "features" in file:
            statistics["features"] = file["features"]
        if "mu" in file and "arr_0" not in file:
            return statistics, None
        with file.zip.open("arr_0.npy") as images:
            shape, by_columns, dtype = read_header(images)
    if dtype != np.uint8 or shape[3:] != (3,) or by_columns:
        order = ", in Fortran's order" if by_columns else ""
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}{order}, not uint8 (N, H, W, 3)")
    return statistics, shape


def read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype of the .npy whose numbers follow in the file."""
    formats = np.lib.format
    one = formats.read_magic(file) == (1, 0)
    return formats.read_array_header_1_0(file) if one else formats.read_array_header_2_0(file)


@contextmanager
def reading(path: str):
    """Around whatever reads a .npz: an error that a user understands."""
    try:
        yield
    except Exception as error:  # from numpy, zipfile or zlib
        raise ValueError(f"cannot read statistics or images from {path}: {common.one_line(error)}") from error


def save_gaussian(path: str, gaussian: Gaussian, features: str, spatial: Gaussian | None = None) -> None:
    """A .npz with ADM's keys mu, sigma, mu_s, sigma_s; with n, if it is known, and the features' name."""
    arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance, "features": features}
    if spatial:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if gaussian.count:
        arrays["n"] = gaussian.count
    with common.replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def check_gaussian(
    path: str, arrays: dict[str, np.ndarray], features: Features, spatial: bool = False
) -> Gaussian:
    """Of the arrays of a file, which is ADM's, with Inception's features, if it does not say which. Raises
    ValueError for other features than those, and for numbers that are not finite."""
    known = str(arrays.get("features", "inception"))
    if known != features.name:
        raise ValueError(
            f"{path} holds statistics of {known} features, not of {features.name}: see --features"
        )
    kind, width = ("_s", features.spatial) if spatial else ("", features.width)
    mean, covariance = arrays[f"mu{kind}"], arrays[f"sigma{kind}"]
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise ValueError(
            f"{path} holds mu{kind} {mean.shape} and sigma{kind} {covariance.shape} of {width} {known} "
            "features"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} holds numbers that are not finite")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def load_reference(
    source: str, features: Features, size: int, config: Config, dist_ctx: common.DistContext
) -> Gaussian:
    """For rFID: the statistics in a .npz, or those of its images, or of a whole source of images."""
    compared = open_compared(source, size, None, config, dist_ctx)
    if "mu" in compared.statistics:
        return check_gaussian(source, compared.statistics, features)
    sums = FeatureSums(features.width)
    for _, images in compared.batches:
        sums.add(features.extract(images)[0])
    return sums.gaussian()


# -----------------------------------------------------------------------------------------------------------
# reconstruction


def data_sets(names: str) -> dict[str, str]:
    """The sources of NAME=SOURCE,... by name; a source alone is called by the last part of its path."""
    pairs = [part.partition("=") for part in names.split(",")]
    sets = {(name if equals else Path(name).name): source or name for name, equals, source in pairs}
    if len(sets) < len(pairs) or not all(sets) or any("/" in name for name in sets):
        raise ValueError(f"--data {names}: give every data set a plain name of its own, NAME=SOURCE")
    return sets


def limit_of(source: str, config: Config) -> int | None:
    return config.limit or (256 if source.startswith("nano") else None)


def in_order(items: list[tuple], dist_ctx: common.DistContext) -> list[tuple]:
    """Tuples (index, ...) of all processes, sorted, on the main process; elsewhere nothing."""
    parts = [items]
    if dist_ctx.world_size > 1:
        parts = [None] * dist_ctx.world_size if dist_ctx.is_main else None
        dist.gather_object(items, parts)
    return (
        sorted((item for part in parts for item in part), key=lambda item: item[0])
        if dist_ctx.is_main
        else []
    )


def recon(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """PSNR, SSIM, LPIPS and FID of the reconstructions of each data set, after rounding to 8 bits."""
    sets = data_sets(config.data)
    if len(sets) > 1 and (config.reference or config.save_reference or config.npz):
        raise ValueError("--reference, --save-reference and --npz belong to one data set: name one in --data")
    model = common.load_autoencoder(config.autoencoder, dist_ctx)
    features = load_features(config.features, config.inception, dist_ctx)
    metrics = {"psnr": psnr, "ssim": ssim}
    if config.lpips != "none":
        metrics[f"lpips-{config.lpips}"] = load_lpips(config.lpips, dist_ctx)
    reference = None
    if config.reference:
        reference = load_reference(config.reference, features, model.image_size, config, dist_ctx)
    results, strip = [], []
    for name, source in sets.items():
        values, count, shown = reconstruct(
            name, source, model, metrics, features, reference, config, dist_ctx
        )
        results += [{"metric": f"{k}/{name}", "value": v, "n": count} for k, v in values.items()]
        strip.append(shown)
    if dist_ctx.is_main:
        columns = min(shown.shape[1] for shown in strip)
        strip = torch.cat([shown[:, :columns].flatten(0, 1) for shown in strip])
        grid = common.image_grid(strip / 255, columns, scale=max(1, 128 // model.image_size))
        common.save_image(Path(config.out).with_suffix(".png"), grid, data=config.data)
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
    dist_ctx: common.DistContext,
) -> tuple[dict[str, float], int, Tensor]:
    """One data set, of which every process takes its share: means of the metrics and the FID, the number of
    images, and the first originals and reconstructions (2, n, 3, H, W) uint8, on the main process."""
    opened, limit = data.open_source(source, model.image_size, config.seed), limit_of(source, config)
    batches = data.OnePass(opened, config.batch, limit, config.workers, dist_ctx.rank, dist_ctx.world_size)
    sums, first, written = dict.fromkeys(metrics, 0.0), [], []
    originals, decoded_sums = FeatureSums(features.width), FeatureSums(features.width)
    for batch in tqdm(batches, desc=f"recon {name}", leave=False, disable=not dist_ctx.is_main):
        original = data.to_unit(batch["image"], dist_ctx.device)
        with dist_ctx.autocast():
            rounded = to_uint8(model.decode(model.encode(original)))
        decoded = data.to_unit(rounded, dist_ctx.device)
        for key, metric in metrics.items():
            sums[key] += sum(metric(decoded, original).tolist())
        decoded_sums.add(features.extract(rounded)[0])
        if reference is None:
            originals.add(features.extract(batch["image"])[0])
        first += zip(batch["index"], batch["image"].numpy(), rounded.numpy(), strict=True)
        first = sorted(first, key=lambda item: item[0])[:STRIP]
        if config.npz:
            written += zip(batch["index"], rounded.permute(0, 2, 3, 1).numpy(), strict=True)
    if batches.skipped:
        print(f"{name}: left out {len(batches.skipped)} images: {batches.skipped[0]}", file=sys.stderr)

    gaussian = decoded_sums.gaussian()
    reference = reference or originals.gaussian()
    totals = common.global_sum(*sums.values())
    values = {key: total / gaussian.count for key, total in zip(sums, totals, strict=True)}
    first, written = in_order(first, dist_ctx)[:STRIP], in_order(written, dist_ctx)
    if not dist_ctx.is_main:
        return values, gaussian.count, torch.empty(0)
    values[f"rfid-{features.name}"] = frechet_distance(gaussian, reference)
    warn_of_few(name, gaussian, features)
    if config.save_reference:
        save_gaussian(config.save_reference, reference, features.name)
    if config.npz:
        with common.replacing(Path(config.npz)) as temporary, temporary.open("wb") as file:
            np.savez(file, arr_0=np.stack([image for _, image in written]))
    return values, gaussian.count, torch.from_numpy(np.stack([pair for _, *pair in first], axis=1))


# -----------------------------------------------------------------------------------------------------------
# generated images


class Survey(NamedTuple):
    """What is compared of the images of all processes: Gaussians of what FID and sFID see, and on the main
    process, where there are images, what FID sees of each: (n, width) float32, in the order of numbers."""

    source: str
    pooled: Gaussian
    spatial: Gaussian | None
    rows: Tensor | None


@torch.no_grad()
def survey(compared: Compared, features: Features, most: int | None, dist_ctx: common.DistContext) -> Survey:
    """Statistics in a file go before those of its images, as they do with ADM. Rows are kept of `most`
    images, drawn by their numbers, whatever the number of processes."""
    source, given = compared.source, compared.statistics
    if "mu" in given:
        pooled = check_gaussian(source, given, features)
        spatial = check_gaussian(source, given, features, spatial=True) if "mu_s" in given else None
        if compared.size is None:
            return Survey(source, pooled, spatial, None)
    sums, spatial_sums, rows = FeatureSums(features.width), FeatureSums(features.spatial), []
    for numbers, images in tqdm(
        compared.batches, desc=f"fid {source}", leave=False, disable=not dist_ctx.is_main
    ):
        x, y = features.extract(images)
        sums.add(x)
        spatial_sums.add(y)
        keys = [data.hash_seed(number) for number in numbers] if most else numbers
        rows += zip(keys, map(np.copy, x.cpu().numpy()), strict=True)
        if most and len(rows) > 2 * most:
            rows = sorted(rows, key=lambda row: row[0])[:most]
    if "mu" not in given:
        pooled, spatial = sums.gaussian(), spatial_sums.gaussian()
    rows = in_order(rows, dist_ctx)[:most]
    return Survey(source, pooled, spatial, torch.from_numpy(np.stack([x for _, x in rows])) if rows else None)


def open_both(config: Config, dist_ctx: common.DistContext) -> tuple[Compared, Compared]:
    """--samples and --reference, in one size."""
    if not (config.samples and config.reference):
        raise ValueError("fid compares images with others: give both --samples and --reference")
    samples = open_compared(config.samples, None, limit_of(config.samples, config), config, dist_ctx)
    height, width = samples.size or (None, None)
    if height != width:
        raise ValueError(f"{config.samples} holds images of {pixels_of(samples.size)} pixels: no squares")
    reference = open_compared(config.reference, height, limit_of(config.reference, config), config, dist_ctx)
    if None not in (samples.size, reference.size) and samples.size != reference.size:
        raise ValueError(
            f"{config.samples} holds images of {pixels_of(samples.size)} pixels, "
            f"{config.reference} of {pixels_of(reference.size)}: compare those of one size"
        )
    return samples, reference


def fid(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """FID, sFID, Inception score, precision and recall of the samples, as ADM's evaluator has them (Dhariwal
    and Nichol, 2021, guided-diffusion/evaluations). What the files cannot give is left out, and said."""
    samples, reference = open_both(config, dist_ctx)
    features = load_features(config.features, config.inception, dist_ctx)
    reference = survey(reference, features, MANIFOLD, dist_ctx)
    samples = survey(samples, features, None, dist_ctx)
    if not dist_ctx.is_main:
        return []
    for one in (samples, reference):
        warn_of_few(one.source, one.pooled, features)
    if config.save_reference:
        save_gaussian(config.save_reference, reference.pooled, features.name, reference.spatial)
    column, count = Path(config.samples).name, samples.pooled.count
    values = scores(samples, reference, features, dist_ctx.device)
    return [{"metric": f"{key}/{column}", "value": v, "n": count} for key, v in values.items()]


def scores(samples: Survey, reference: Survey, features: Features, device: torch.device) -> dict[str, float]:
    """The numbers that there are statistics and images for; the others are named on stderr."""
    kind, missing = features.name, {}
    values = {f"fid-{kind}": frechet_distance(samples.pooled, reference.pooled)}
    if without := [one.source for one in (samples, reference) if one.spatial is None]:
        missing["sFID"] = f"no mu_s and sigma_s in {without[0]}"
    else:
        values[f"sfid-{kind}"] = frechet_distance(samples.spatial, reference.spatial)
    if features.classifier is not None and samples.rows is not None:
        values["inception-score"] = inception_score(samples.rows @ features.classifier.T)
    elif features.classifier is not None:
        missing["Inception score"] = f"no images in {samples.source}"
    if without := [one.source for one in (samples, reference) if one.rows is None]:
        missing["precision and recall"] = f"no images in {without[0]}"
    elif min(len(samples.rows), len(reference.rows)) <= NEIGHBOURS:
        missing["precision and recall"] = f"they need {NEIGHBOURS + 1} images of each at least"
    else:
        both = precision_recall(samples.rows, reference.rows, device)
        values |= zip((f"precision-{kind}", f"recall-{kind}"), both, strict=True)
    for name, reason in missing.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    return values


# -----------------------------------------------------------------------------------------------------------
# text to image


def draw(
    model: rae.TextToImage, prompts: list[str], config: Config, dist_ctx: common.DistContext
) -> Iterator[np.ndarray]:
    """An image (H, W, 3) uint8 for each prompt; number i has noise of its own, whatever the batch size."""
    for start in tqdm(range(0, len(prompts), config.batch), desc="draw", leave=False):
        batch = prompts[start : start + config.batch]
        indices = [start + i for i in range(len(batch))]
        noise, *_ = data.flow_draws(model.latent_shape, config.seed, indices, torch.device("cpu"))
        yield from generate(model, batch, noise, dist_ctx, **settings(config))[1]


def settings(config: Config) -> dict:
    """How latents are sampled, as `rae.TextToImage.generate` takes it."""
    return {name: getattr(config, name) for name in ("steps", "guidance", "solver", "skip")}


@torch.no_grad()
def generate(
    model: rae.TextToImage, prompts: list[str], noise: Tensor, dist_ctx: common.DistContext, **how
) -> tuple[Tensor, np.ndarray]:
    """Latents (B, N, C), and images (B, H, W, 3) uint8, from noise (B, N, C)."""
    with dist_ctx.autocast():
        latents = model.generate(prompts, noise=noise, **how)
        return latents, to_uint8(model.autoencoder.decode(latents)).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def through(autoencoder: rae.RAE, image: np.ndarray, dist_ctx: common.DistContext) -> np.ndarray:
    """One image (H, W, 3) uint8, encoded and decoded."""
    images = data.to_unit(torch.from_numpy(image).permute(2, 0, 1)[None], dist_ctx.device)
    with dist_ctx.autocast():
        decoded = autoencoder.decode(autoencoder.encode(images))
    return to_uint8(decoded)[0].permute(1, 2, 0).numpy()


def shapes(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """Accuracies of the six GenEval tasks in the nano world; apart, of objects in pairs of shape and colour
    that no training image held, and of words, read in the image. Beside the model's images true
    renderings, these as the autoencoder returns them (the ceiling), and the model's images judged by
    another prompt of the task (the floor)."""
    from nano import scorer
    from nano import shapes as world

    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    n, size = config.limit or 20, model.autoencoder.image_size
    wanted = {task: [world.prompt(task, config.seed, i) for i in range(n)] for task in world.TASKS}
    wanted["held-out colors"] = [world.prompt("colors", config.seed, i, held_out=True) for i in range(n)]
    words = [world.draw("text", config.seed, i, size) for i in range(n)]
    wanted["words"] = [{"prompt": sample.caption, "word": sample.word} for sample in words]
    jobs = [(task, i) for task in wanted for i in range(n) for _ in range(config.images)]
    images = draw(model, [wanted[task][i]["prompt"] for task, i in jobs], config, dist_ctx)

    def is_right(image: np.ndarray, request: dict) -> bool:
        if "word" in request:
            return scorer.read_word(image) == request["word"]
        return scorer.score(image, request)[0]

    right = {column: defaultdict(list) for column in ("model", "true", "decoded", "shuffled")}
    for number, ((task, i), image) in enumerate(zip(jobs, images, strict=True)):
        request = wanted[task][i]
        true = words[i].image if task == "words" else world.render(request, config.seed + number, size)
        decoded = through(model.autoencoder, true, dist_ctx)
        for column, shown in (("model", image), ("true", true), ("decoded", decoded)):
            right[column][task].append(is_right(shown, request))
        right["shuffled"][task].append(is_right(image, wanted[task][(i + 1) % n]))

    results = []
    for column, tasks in right.items():
        values = scorer.overall(tasks)
        counts = {task: len(found) for task, found in tasks.items()}
        counts["overall"] = sum(counts[task] for task in world.TASKS)
        values |= {task: float(np.mean(found)) for task, found in tasks.items() if task not in values}
        results += [{"metric": f"shapes/{column}/{k}", "value": v, "n": counts[k]} for k, v in values.items()]
    return results


def scored(
    name: str,
    config: Config,
    dist_ctx: common.DistContext,
    fields: tuple[str, ...],
    jobs: dict[tuple, tuple],
    networks: dict[str, str],
    open_networks: Callable[[], Callable[..., dict]],
) -> list[dict]:
    """A row for each of the jobs, kept in OUT-NAME.jsonl: each process scores its share of those that are not
    there yet. jobs: what is scored, by the values of the fields that tell its row from the others. Raises
    ValueError for rows that other networks have scored."""
    rows = Path(config.out).with_name(f"{Path(config.out).stem}-{name}.jsonl")

    def known() -> dict[tuple, dict]:
        found = common.read_rows(rows) if rows.exists() else []
        for row in found:
            if wrong := [each for each, source in networks.items() if row.get(each) != source]:
                raise ValueError(
                    f"{rows} has rows of {wrong[0]} {row.get(wrong[0])}, not {networks[wrong[0]]}: choose "
                    "another --out"
                )
        return {itemgetter(*fields)(row): row for row in found}

    done = known()
    if dist_ctx.is_main:
        rows.parent.mkdir(parents=True, exist_ok=True)
        with rows.open("a+b") as file:  # a line that was cut off ends here
            if file.tell() and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
    common.global_sum(0)  # all have read before one writes
    left = [each for each in jobs.items() if each[0] not in done][dist_ctx.rank :: dist_ctx.world_size]
    if left:
        score = open_networks()
        with rows.open("a") as file:
            for told, job in tqdm(left, desc=name, disable=not dist_ctx.is_main):
                row = score(*job) | dict(zip(fields, told, strict=True)) | networks
                file.write(json.dumps(row) + "\n")
                file.flush()  # a line at once: processes share the file
    common.global_sum(0)
    done = known()
    if missing := [told for told in jobs if told not in done]:
        raise ValueError(f"{rows} has lost {len(missing)} rows, such as {missing[0]}: run this again")
    return [done[told] for told in jobs]


@cache
def digest(path: Path) -> str:
    """Of an image: a file may come to hold another."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def folder_of(config: Config, name: str) -> Path:
    if not config.samples:
        raise ValueError(
            f"{name} needs --samples, a folder of images that sample.py drew: see the top of eval.py"
        )
    return Path(config.samples)


def geneval(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    images = benchmarks.geneval_images(folder_of(config, "geneval"))[: config.limit]
    networks = {"detector": config.detector, "clip": config.clip}
    jobs = {(str(path), digest(path)): (path, wanted) for path, wanted in images}

    def open_networks() -> Callable[..., dict]:
        with common.loading(config.detector):
            detector = benchmarks.Detector(config.detector, dist_ctx.device)
        with common.loading(config.clip):
            clip = benchmarks.Clip(config.clip, dist_ctx.device)
        return lambda path, wanted: benchmarks.score_geneval(path, wanted, detector, clip)

    rows = scored("geneval", config, dist_ctx, ("filename", "digest"), jobs, networks, open_networks)
    figures = benchmarks.geneval_summary(rows)
    return [{"metric": f"geneval/{name}", "value": v, "n": n} for name, (v, n) in figures.items()]


def dpg(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    folder, items = folder_of(config, "dpg"), benchmarks.read_dpg(config.questions)
    images = benchmarks.dpg_images(folder, items)[: config.limit]
    jobs = {(path.stem, square, digest(path)): (path, square) for path, square in images}

    def open_networks() -> Callable[..., dict]:
        with common.loading(config.vqa):
            answerer = benchmarks.Answerer(config.vqa, dist_ctx.device)
        return lambda path, square: benchmarks.score_dpg(path, square, items[path.stem], answerer)

    fields = ("item_id", "square", "digest")
    rows = scored("dpg", config, dist_ctx, fields, jobs, {"vqa": config.vqa}, open_networks)
    if dist_ctx.is_main and "mplug" not in config.vqa.lower():
        print(f"answered by {config.vqa}: only figures of mPLUG compare with published ones")
    figures = benchmarks.dpg_summary(rows, items)
    name = f"dpg ({config.vqa})"
    return [{"metric": f"{name}/{each}", "value": v, "n": n} for each, (v, n) in figures.items()]


def understanding(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """Each of --sets, each process its share of the questions."""
    names = config.sets.split(",")
    if unknown := set(names) - benchmarks.ASKED.keys():
        raise ValueError(f"--sets {', '.join(unknown)}: choose from {', '.join(benchmarks.ASKED)}")
    model, results = common.load_model(rae.TextToImage, config.model, "", dist_ctx), []
    side, weights = model.reader.image_size, common.fingerprint(model)

    def answer(name: str, table: int, row: int) -> dict:
        asked = benchmarks.ASKED[name]
        item = asked.read(tables[table][row])
        image = item.image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)  # not cropped
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        with dist_ctx.autocast():
            try:
                said, error = model.answer(data.to_unit(pixels, dist_ctx.device), item.question), ""
            except ValueError as refused:  # a question that is too long, or has a special token: it is wrong
                said, error = "", str(refused)
        return {"group": item.group, "error": error, "answer": said, "score": asked.score(said, item)}

    for name in names:
        try:
            tables = benchmarks.open_asked(name, config.local)
        except (OSError, ConnectionError) as error:
            raise ValueError(f"cannot read {benchmarks.ASKED[name].path}: {error}") from error
        places = [(name, t, r) for t, table in enumerate(tables) for r in benchmarks.asked_rows(name, table)]
        jobs = {place: place for place in places[: config.limit]}
        networks, fields = {"model": config.model, "weights": weights}, ("set", "table", "row")
        rows = scored(f"understanding-{name}", config, dist_ctx, fields, jobs, networks, lambda: answer)
        if dist_ctx.is_main and (refused := [row["error"] for row in rows if row["error"]]):
            print(f"{name}: {len(refused)} questions count as wrong, the first because {refused[0]}")
        value, n = benchmarks.understanding_summary(name, rows)
        results.append({"metric": f"understanding/{name}", "value": value, "n": n})
    return results


def clipscore(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    folder = folder_of(config, "clipscore")
    grids = {folder / "grid.png", *(path.with_suffix(".png") for path in folder.iterdir() if path.is_dir())}
    paths = sorted(path for path in folder.rglob("*.png") if path not in grids)
    paths = paths[: config.limit]
    texts = [data.open_metadata(str(path)).get("prompt") for path in paths]
    if not paths or None in texts:
        without = paths[texts.index(None)] if paths else config.samples
        raise ValueError(f"{without} has no images with a prompt in their metadata")
    with common.loading(config.clip):
        clip = benchmarks.Clip(config.clip, dist_ctx.device)
    own = list(zip(paths, texts, strict=True))[dist_ctx.rank :: dist_ctx.world_size]
    total = 0.0
    for start in tqdm(range(0, len(own), config.batch), desc="clipscore", disable=not dist_ctx.is_main):
        files, prompts = zip(*own[start : start + config.batch], strict=True)
        images = [data.open_image(str(path)).convert("RGB") for path in files]
        total += clip.scores(images, list(prompts)).sum().item()
    [total] = common.global_sum(total)
    return [{"metric": f"clipscore/{config.clip}", "value": total / len(paths), "n": len(paths)}]


def scaling(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """Test-time scaling in the nano world: the six-task overall of the best 4 of 4, 8, ... --candidates, by
    each verifier, by chance (the floor) and by the scorer itself (the ceiling); the mean over --seeds, and
    their standard deviation."""
    from nano import scorer
    from nano.shapes import TASKS, prompt

    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    if model.reader_path:
        raise ValueError(f"{config.model} reads other latents than it draws: it cannot judge them undecoded")
    sizes = [4 * 2**i for i in range(12) if 4 * 2**i <= config.candidates]
    runs = defaultdict(list)  # of (size, choice) the overall of each seed
    prompts = config.limit or 20
    for seed in range(config.seed, config.seed + config.seeds):
        right = defaultdict(lambda: defaultdict(list))  # of (size, choice), of a task the images kept
        for task, i in tqdm(
            [(task, i) for task in TASKS for i in range(prompts)], desc="scaling", leave=False
        ):
            wanted = prompt(task, seed, i)
            text = wanted["prompt"]
            candidates = list(range(config.candidates))
            noise, *_ = data.flow_draws(
                model.latent_shape, data.hash_seed(seed, task, i), candidates, torch.device("cpu")
            )
            latents, images = generate(model, [text] * len(candidates), noise, dist_ctx, **settings(config))
            verdicts = rae.verify(model, text, latents)
            scores = [scorer.score(image, wanted)[0] for image in images]
            for size in sizes:
                kept = {name: rae.best(verdicts[:size], name, 4) for name in rae.VERIFIERS}
                kept["chance"] = candidates[:4]
                kept["scorer"] = sorted(candidates[:size], key=lambda k: -scores[k])[:4]
                for name, chosen in kept.items():
                    right[size, name][task] += [scores[k] for k in chosen]
        for key, tasks in right.items():
            runs[key].append(scorer.overall(tasks)["overall"])
    results, n = [], 4 * len(TASKS) * prompts * config.seeds
    for (size, name), values in runs.items():
        results.append({"metric": f"best 4 of {size}/{name}", "value": float(np.mean(values)), "n": n})
        if len(values) > 1:
            spread = float(np.std(values, ddof=1))
            results.append({"metric": f"best 4 of {size}/{name}, spread", "value": spread, "n": n})
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
    return "\n".join("| " + " | ".join(f"{cell:19}" for cell in line) + " |" for line in lines)


EVALUATIONS = {
    "recon": recon,
    "shapes": shapes,
    "scaling": scaling,
    "fid": fid,
    "geneval": geneval,
    "clipscore": clipscore,
    "dpg": dpg,
    "understanding": understanding,
}


def main() -> None:
    config = common.parse(Config, __doc__)
    if unknown := set(config.what) - EVALUATIONS.keys():
        raise ValueError(f"unknown evaluation {', '.join(unknown)}: choose from {', '.join(EVALUATIONS)}")
    dist_ctx = common.init_distributed(config.dtype)
    if dist_ctx.is_main:
        print(dist_ctx)
    results = []
    alone = ("shapes", "scaling")  # not split: last, so that the other processes do not wait for them
    for name in sorted(config.what or ("recon", "shapes"), key=alone.__contains__):
        if name not in alone or dist_ctx.is_main:
            part = EVALUATIONS[name](config, dist_ctx)
        if dist_ctx.is_main:
            print(f"\n{table(part)}", flush=True)
            results += part
    if dist_ctx.is_main:
        common.save_results(results, config.seed, Path(config.out))


if __name__ == "__main__":
    common.main(main)
