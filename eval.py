"""Images to numbers: reconstruction metrics and the FID family. benchmarks.py runs the other evaluations.

    python eval.py                                                   # the shipped nano RAE: PSNR, SSIM, rFID
    python eval.py fid --samples samples --reference nano:objects    # FID, sFID, precision, recall

    # the papers' tables of reconstructions and of generated images, on 8 GPUs
    torchrun --nproc-per-node 8 eval.py recon --autoencoder runs/decoder/model --features inception \\
        --lpips vgg --data imagenet=path/to/val,yfcc=path/to/yfcc,text=path/to/text --limit 50000
    torchrun --nproc-per-node 8 eval.py fid --features inception --samples fid.npz \\
        --reference VIRTUAL_imagenet256_labeled.npz

    # GenEval: draw in the official layout, then detect and judge; both commands resume where they stopped
    torchrun --nproc-per-node 8 sample.py --preset scale-rae --model runs/t2i/model \\
        --file evaluation_metadata.jsonl --out geneval --resume
    torchrun --nproc-per-node 8 eval.py geneval --samples geneval

Prints a table and writes OUT: command, seed, versions, date and a list of results {metric, value, n}. `recon`
also writes a strip of originals above reconstructions beside it. For the nano world see `nano.evaluate`.

recon: rFID compares reconstructions with their originals, which are centre crops, unless --reference names
something else. For ImageNet these are the 50,000 validation images, not ADM's file of the training set. Only
rfid-inception is the papers' metric; rfid-encoder needs no download.

fid: as in ADM's evaluator (Dhariwal and Nichol, 2021, guided-diffusion/evaluations). Samples and reference
are a .npz (images arr_0, statistics mu, sigma, mu_s, sigma_s, or both) or a source of data.py. Samples are
compared as they are; the images of a reference source are cropped to the same size. The grids of sample.py
are skipped.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

STRIP = 8  # images of each data set in the strip of reconstructions
SPATIAL = 7  # channels that sFID keeps at every position
SPLIT = 5000  # images in one split of the Inception score
NEIGHBOURS = 3  # k of the k-nearest-neighbour manifolds of precision and recall
MANIFOLD = 10_000  # reference images for precision and recall, as many as ADM's file holds
ROWS = 1000  # rows of a distance matrix computed at once


@dataclass
class Config:
    what: list[str] = flag((), "recon (default), fid, geneval, clipscore, dpg, understanding", nargs="*")
    # inputs
    model: str = flag(str(common.WEIGHTS / "t2i"), "understanding: TextToImage folder or hub id")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "recon: RAE or VAE folder or hub id")
    data: str = flag(
        "objects=nano:objects,scenes=nano:scenes,text=nano:text",
        "recon: data sets, NAME=SOURCE,...; one column of the table each; sources of data.py or .npz files",
    )
    samples: str = flag("", "fid: a .npz like ADM's or a source of images; benchmarks: a folder of images")
    reference: str = flag("", "fid, and recon in place of the originals: a .npz like ADM's or a source")
    limit: int | None = flag(None, "images per data set or benchmark (default all; nano 256)", at_least=2)
    # metrics
    features: str = flag("encoder", "network for FID (encoder: nano's)", choices=["inception", "encoder"])
    inception: str = flag("", "file with Inception's weights (default: torch-fidelity downloads them)")
    lpips: str = flag("none", "LPIPS network; torchvision downloads it", choices=["vgg", "alex", "none"])
    detector: str = flag("facebook/mask2former-swin-small-coco-instance", "geneval: Mask2Former")
    clip: str = flag("openai/clip-vit-large-patch14", "CLIP for clipscore and for the colours of geneval")
    questions: str = flag("dpg_bench.csv", "dpg: DPG-Bench's table of questions")
    vqa: str = flag("Salesforce/blip-vqa-base", "dpg: visual question answering model")
    sets: str = flag(",".join(benchmarks.QUESTION_SETS), "understanding: question sets, comma separated")
    # system
    seed: int = flag(1000, "order of the images, and the images of nano sources (training uses small seeds)")
    batch: int = flag(64, "images at once, per process", at_least=1)
    workers: int = flag(1, "data loading workers per process", at_least=0)
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("results.json", "results file")


@contextmanager
def explain(action: str):
    """Turns any error inside into one line that says what could not be done (ValueError)."""
    try:
        yield
    except Exception as error:  # from torch, numpy, zipfile, the file system or the network
        raise ValueError(f"cannot {action}: {common.one_line(error)}") from error


# -----------------------------------------------------------------------------------------------------------
# metrics of image pairs


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of image pairs (B, 3, H, W) in [0, 1]: (B,)."""
    return -10 * (one - other).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of image pairs (B, 3, H, W) in [0, 1]: (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, per_pixel = structural_similarity_index_measure(one, other, data_range=1.0, return_full_image=True)
    # The Gaussian window has 11 pixels (sigma 1.5). Windows that cross the border do not count, as in Wang et
    # al. and scikit-image; torchmetrics' mean includes them.
    return per_pixel[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))


def load_lpips(network: str, dist_ctx: common.DistContext) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS 0.1: a function of image pairs (B, 3, H, W) in [0, 1] -> (B,)."""
    import lpips

    with explain("load the weights of LPIPS"):
        model = lpips.LPIPS(net=network, verbose=False).to(dist_ctx.device)
    return lambda one, other: model(one, other, normalize=True).flatten()


# -----------------------------------------------------------------------------------------------------------
# features and Frechet distance


class Features(NamedTuple):
    """A frozen network: uint8 (B, 3, H, W) -> features (B, width) for FID and (B, spatial) for sFID."""

    name: str
    width: int
    spatial: int
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    classifier: Tensor | None = None  # (classes, width), without bias: logits for the Inception score


def load_features(name: str, weights: str, dist_ctx: common.DistContext) -> Features:
    """inception: see `load_inception`. encoder: mean token of the nano encoder, and the first channels of all
    tokens."""
    if name == "inception":
        return load_inception(weights, dist_ctx)
    # always the shipped encoder, never that of --autoencoder: numbers of two autoencoders stay comparable
    folder = str(common.WEIGHTS / "encoder")
    with common.loading(folder):
        model = rae.RAE(folder, rae.DECODERS["nano"]).to(dist_ctx.device)
    tokens, width = model.latent_shape

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        x = model.encode(data.to_unit(images, dist_ctx.device))
        return x.mean(dim=1), x[:, :, :SPATIAL].flatten(1)

    return Features(name, width, tokens * SPATIAL, extract)


def load_inception(weights: str, dist_ctx: common.DistContext) -> Features:
    """The 2048 pooled features that define FID, from torch-fidelity's port, which resizes as TensorFlow did.
    Spatial features and classifier are ADM's: 7 channels of mixed_6/conv in (row, column, channel) order, and
    the 1008 logits without bias. `weights` is a file, or "" to download it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with explain("load the weights of Inception"):
        if weights:
            # the library would unpickle the file and run any code in it: this raises first
            torch.load(weights, weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights or None)
    network.to(dist_ctx.device)
    # TensorFlow names the last operation of a scope after the scope: mixed_6/conv is the output of the whole
    # BasicConv2d (convolution, batch norm, ReLU), not of its convolution.
    kept = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, x: kept.update(x=x[:, :SPATIAL]))

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        [pooled] = network(images.to(dist_ctx.device))
        return pooled, rearrange(kept.pop("x"), "b c h w -> b (h w c)")

    return Features("inception", 2048, 17 * 17 * SPATIAL, extract, network.fc.weight.cpu())


class Gaussian(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of the features of images, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None  # images, None if unknown


class FeatureSums:
    """Accumulates features of any number of images into a Gaussian, in float64 on the CPU."""

    def __init__(self, width: int):
        self.count = torch.zeros(1, dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: (B, width)."""
        x = features.cpu().double()
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products += x.T @ x

    def gaussian(self) -> Gaussian:
        """Over the images of all processes. Raises ValueError for fewer than two."""
        if dist.is_initialized():
            for tensor in (self.count, self.total, self.products):
                dist.all_reduce(tensor)
        count = int(self.count)
        if count < 2:
            raise ValueError(f"FID needs at least 2 images, but only {count} can be used")
        if not self.products.isfinite().all():
            raise ValueError(f"the features of {count} images are not finite: check the network's weights")
        mean = self.total / count
        covariance = (self.products - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean.numpy(), covariance.numpy(), count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2."""
    # Both roots are of symmetric matrices, so eigenvalues give them. scipy's root of a general matrix is far
    # slower, and was wrong in some versions (SciPy issues 19415, 20178). Rounding makes tiny eigenvalues
    # negative: clip.
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return max(0.0, float(np.square(one.mean - other.mean).sum() + traces - 2 * cross))


def warn_if_few(name: str, gaussian: Gaussian, features: Features) -> None:
    # a covariance of fewer images than features is singular, and the distance depends on their number
    if gaussian.count is not None and gaussian.count < features.width:
        few = f"{gaussian.count} images are few for a FID of {features.width} features"
        print(f"{name}: {few}: compare it only with a FID of as many images", file=sys.stderr)


# -----------------------------------------------------------------------------------------------------------
# Inception score, precision and recall


def inception_score(logits: Tensor) -> float:
    """Mean over splits of 5,000 images of exp(mean KL(p(class | image) || mean p)), logits (n, classes). A
    shorter last split counts as much as the others (ADM)."""
    scores = []
    for split in logits.split(SPLIT):
        log_p = split.double().log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(samples: Tensor, reference: Tensor, device: torch.device) -> tuple[float, float]:
    """Share of the samples (n, D) on the manifold of the reference (m, D), and of the reference on the
    manifold of the samples (Kynkaanniemi et al., 2019, arXiv 1904.06991)."""
    # ADM's distances, partly in float16, depend on rounding: ours are float64, which MPS does not have
    device = torch.device("cpu") if device.type == "mps" else device
    samples, reference = samples.to(device).double(), reference.to(device).double()
    return on_manifold(samples, reference), on_manifold(reference, samples)


def on_manifold(points: Tensor, others: Tensor) -> float:
    """Share of the points (n, D) inside the union of balls around the others (m, D), whose radii are the
    distances to their third nearest neighbour."""
    # in blocks of rows: 50,000 x 10,000 distances at once would be 4 GB
    radii, inside = [], []
    for block in others.split(ROWS):
        # every point is its own first neighbour
        radii.append(torch.cdist(block, others).kthvalue(NEIGHBOURS + 1, dim=1).values)
    radii = torch.cat(radii)
    for block in points.split(ROWS):
        inside.append((torch.cdist(block, others) <= radii).any(dim=1))
    return torch.cat(inside).double().mean().item()


# -----------------------------------------------------------------------------------------------------------
# images to compare: .npz files and sources of data.py


class ImageSet(NamedTuple):
    """One side of a comparison: statistics from a .npz, and images."""

    source: str
    statistics: dict[str, np.ndarray]  # {} if there are none
    size: int | None = None  # side of the images in pixels, None without images
    batches: Iterable[tuple[Iterable, Tensor]] = ()  # this process's (sample indices, uint8 (B, 3, H, W))


class Whole:
    """Takes the place of data.Transform in a source: centre crops of `size`, or whole images (None), which
    must be squares of one size."""

    text_only, captions, num_classes, encode_chat, max_seq_len = False, False, None, None, 0

    def __init__(self, size: int | None):
        self.size, self.crop = size, size is not None

    def pixels(self, image: Image.Image, *uniform: float) -> np.ndarray:
        if "grid_of" in image.info:
            raise data.SkipSample("a grid of images from sample.py")
        if self.crop:
            return data.centre_crop(image, self.size)
        # cropping or resizing the samples would change the FID
        self.size = self.size or image.width
        if image.size != (self.size, self.size):
            shape = f"{image.width} x {image.height}"
            raise ValueError(f"samples must be squares of one size, here {self.size} pixels: one has {shape}")
        return np.array(image)


def open_images(source: str, size: int | None, config: Config, dist_ctx: common.DistContext) -> ImageSet:
    """A .npz, or a source of images: centre crops of `size`, or whole images (None)."""
    if source.endswith(".npz"):
        statistics, shape = read_npz(source)
        if shape is None:
            return ImageSet(source, statistics)
        return ImageSet(source, statistics, shape[1], npz_batches(source, shape, config, dist_ctx))
    opened = data.open_source(source, size or 48, config.seed)
    is_endless = any(isinstance(part, data.NanoSource) for part in opened.sources)
    limit = config.limit or (256 if is_endless else None)
    transform = Whole(size)
    for part in opened.sources:
        part.transform = transform  # nano sources ignore it: they draw at the size they were opened with
    if size is None:
        first = next((sample for sample in opened.once(limit, 0, 1) if "image" in sample), None)
        if first is None:
            raise ValueError(f"{source} holds no image that can be used")
        size = transform.size = len(first["image"])
    once = data.OnePass(opened, config.batch, limit, config.workers, dist_ctx.rank, dist_ctx.world_size)
    return ImageSet(source, {}, size, source_batches(source, once))


def source_batches(source: str, once: data.OnePass) -> Iterator[tuple[list, Tensor]]:
    for batch in once:
        yield batch["index"], batch["image"]
    if once.skipped:
        print(f"{source}: skipped {len(once.skipped)} images: {once.skipped[0]}", file=sys.stderr)


def npz_batches(
    path: str, shape: tuple[int, ...], config: Config, dist_ctx: common.DistContext
) -> Iterator[tuple[range, Tensor]]:
    """This process's batches of the images in a .npz, read as a stream: 50,000 images of 256 px are 10 GB."""
    count = min(shape[0], config.limit or shape[0])
    with explain(f"read images from {path}"), np.load(path, allow_pickle=False) as file:
        with file.zip.open("arr_0.npy") as entry:
            read_header(entry)
            for number, start in enumerate(range(0, count, config.batch)):
                rows = range(start, min(start + config.batch, count))
                content = entry.read(len(rows) * int(np.prod(shape[1:])))
                if number % dist_ctx.world_size == dist_ctx.rank:
                    images = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                    yield rows, rearrange(images.view(len(rows), *shape[1:]), "b h w c -> b c h w")


def read_npz(path: str) -> tuple[dict[str, np.ndarray], tuple[int, ...] | None]:
    """Statistics with ADM's keys ({} if there are none), and the shape (N, H, H, 3) of images, or None."""
    with explain(f"read statistics or images from {path}"), np.load(path, allow_pickle=False) as file:
        statistics = {}
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if mean in file:
                statistics |= {mean: file[mean], covariance: file[covariance]}
        if "mu" in file and "arr_0" not in file:
            return statistics, None
        with file.zip.open("arr_0.npy") as images:
            shape, fortran_order, dtype = read_header(images)
    if dtype != np.uint8 or shape[3:] != (3,) or shape[1] != shape[2] or fortran_order:
        order = ", in Fortran order" if fortran_order else ""
        raise ValueError(f"{path}: arr_0 is {dtype} {shape}{order}, not uint8 squares (N, H, H, 3)")
    return statistics, shape


def read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an open .npy, which is left at its first value."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def gaussian_from_file(images: ImageSet, features: Features, spatial: bool = False) -> Gaussian:
    """The statistics of a .npz, which are Inception's. Raises ValueError if they do not fit the features."""
    suffix, width = ("_s", features.spatial) if spatial else ("", features.width)
    mean, covariance = images.statistics[f"mu{suffix}"], images.statistics[f"sigma{suffix}"]
    if features.name != "inception":
        raise ValueError(f"{images.source} holds statistics of Inception: choose --features inception")
    if mean.shape != (width,) or covariance.shape != (width, width):
        shapes = f"mu{suffix} {mean.shape} and sigma{suffix} {covariance.shape}"
        raise ValueError(f"{images.source} holds {shapes}, not of {width} features")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{images.source} holds numbers that are not finite")
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def gather_sorted(items: list[tuple], dist_ctx: common.DistContext) -> list[tuple]:
    """Tuples (index, ...) of all processes in order, on the main process; an empty list elsewhere."""
    parts = [items]
    if dist_ctx.world_size > 1:
        parts = [None] * dist_ctx.world_size if dist_ctx.is_main else None
        dist.gather_object(items, parts)
    if not dist_ctx.is_main:
        return []
    return sorted((item for part in parts for item in part), key=lambda item: item[0])


# -----------------------------------------------------------------------------------------------------------
# recon: PSNR, SSIM, LPIPS and rFID


def parse_data_sets(names: str) -> dict[str, str]:
    """NAME=SOURCE,... as {name: source}; a source without a name is called by the last part of its path."""
    sets = {}
    for part in names.split(","):
        name, equals, source = part.partition("=")
        if not equals:
            name, source = Path(part).name, part
        if not name or "/" in name or name in sets:
            raise ValueError(f"--data {names}: give every data set a plain name of its own, NAME=SOURCE")
        sets[name] = source
    return sets


def recon(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    """Metrics of the reconstructions of each data set, after rounding to 8 bits."""
    data_sets = parse_data_sets(config.data)
    if len(data_sets) > 1 and config.reference:
        raise ValueError("--reference belongs to one data set: name one in --data")
    model = common.load_autoencoder(config.autoencoder, dist_ctx)
    features = load_features(config.features, config.inception, dist_ctx)
    metrics = {"psnr": psnr, "ssim": ssim}
    if config.lpips != "none":
        metrics[f"lpips-{config.lpips}"] = load_lpips(config.lpips, dist_ctx)
    reference = None  # the originals of each data set
    if config.reference:
        images = open_images(config.reference, model.image_size, replace(config, limit=None), dist_ctx)
        if images.size not in (None, model.image_size):
            raise ValueError(
                f"--reference {config.reference} has images of {images.size} pixels, not {model.image_size}"
            )
        reference = compute_statistics(images, features, 0, dist_ctx).pooled

    results, strips = [], []
    for name, source in data_sets.items():
        images = open_images(source, model.image_size, config, dist_ctx)
        if images.size != model.image_size:  # of a .npz; the images of other sources are cropped
            raise ValueError(f"{source} has images of {images.size} pixels, not {model.image_size}")
        values, count, strip = reconstruct(name, images, model, metrics, features, reference, dist_ctx)
        results += [{"metric": f"{key}/{name}", "value": v, "n": count} for key, v in values.items()]
        strips.append(strip)

    if dist_ctx.is_main:
        columns = min(strip.shape[1] for strip in strips)
        rows = torch.cat([strip[:, :columns].flatten(0, 1) for strip in strips])
        grid = common.image_grid(rows / 255, columns, scale=max(1, 128 // model.image_size))
        common.save_image(strip_path(config), grid, data=config.data)
    return results


def strip_path(config: Config) -> Path:
    return Path(config.out).with_suffix(".png")


@torch.no_grad()
def reconstruct(
    name: str,
    images: ImageSet,
    model: rae.RAE | rae.VAE,
    metrics: dict[str, Callable[[Tensor, Tensor], Tensor]],
    features: Features,
    reference: Gaussian | None,
    dist_ctx: common.DistContext,
) -> tuple[dict[str, float], int, Tensor]:
    """One data set, split over the processes: the metrics, the number of images, and the first originals and
    reconstructions (2, n, 3, H, W) uint8. On the main process; rFID and images are missing elsewhere."""
    sums, first = dict.fromkeys(metrics, 0.0), []
    original_sums, decoded_sums = FeatureSums(features.width), FeatureSums(features.width)
    progress = tqdm(images.batches, desc=f"recon {name}", leave=False, disable=not dist_ctx.is_main)
    for indices, batch in progress:
        original = data.to_unit(batch, dist_ctx.device)
        with dist_ctx.autocast():
            decoded = model.decode(model.encode(original))
        common.check_finite(f"reconstructions of {name}", decoded)
        rounded = common.to_uint8(decoded)
        # metrics are those of saved 8-bit images, not of the decoder's fp32 output
        decoded = data.to_unit(rounded, dist_ctx.device)
        for key, metric in metrics.items():
            sums[key] += sum(metric(decoded, original).tolist())
        decoded_sums.add(features.extract(rounded)[0])
        if reference is None:
            original_sums.add(features.extract(batch)[0])
        # the first images by index, whichever process holds them
        first += zip(indices, np.stack([batch, rounded], axis=1), strict=True)
        first = sorted(first, key=lambda item: item[0])[:STRIP]

    # ---- over all processes: each takes part in the sums, then the main process goes on alone ------
    gaussian = decoded_sums.gaussian()
    reference = reference or original_sums.gaussian()
    totals = common.global_sum(*sums.values())
    values = {key: total / gaussian.count for key, total in zip(sums, totals, strict=True)}
    first = gather_sorted(first, dist_ctx)[:STRIP]
    if not dist_ctx.is_main:
        return values, gaussian.count, torch.empty(0)
    values[f"rfid-{features.name}"] = frechet_distance(gaussian, reference)
    warn_if_few(name, gaussian, features)
    return values, gaussian.count, torch.from_numpy(np.stack([pair for _, pair in first], axis=1))


# -----------------------------------------------------------------------------------------------------------
# fid: FID, sFID, Inception score, precision, recall


class Statistics(NamedTuple):
    """What is compared of one side, over all processes. `rows` are on the main process only."""

    source: str
    pooled: Gaussian  # of the FID features
    spatial: Gaussian | None  # of the sFID features
    rows: Tensor | None  # (n, width) float32, FID features of each image


@torch.no_grad()
def compute_statistics(
    images: ImageSet, features: Features, most: int | None, dist_ctx: common.DistContext
) -> Statistics:
    """most: number of rows to keep, None for all. Statistics in a file take precedence over those of its
    images, as in ADM."""
    pooled = spatial = None
    if "mu" in images.statistics:
        pooled = gaussian_from_file(images, features)
        if "mu_s" in images.statistics:
            spatial = gaussian_from_file(images, features, spatial=True)
        if images.size is None or most == 0:
            return Statistics(images.source, pooled, spatial, None)

    sums, spatial_sums, rows = FeatureSums(features.width), FeatureSums(features.spatial), []
    progress = tqdm(images.batches, desc=f"fid {images.source}", leave=False, disable=not dist_ctx.is_main)
    for indices, batch in progress:
        x, y = features.extract(batch)
        sums.add(x)
        spatial_sums.add(y)
        # A subset is chosen by the hash of the index: the number of processes does not matter then. The
        # splits of the Inception score are mixed by it, too, because files in order may be of one class; a
        # .npz keeps its order, as in ADM. A row is copied: a view would keep the whole batch in memory.
        in_order = most is None and isinstance(indices, range)
        keys = indices if in_order else [data.hash_seed(index) for index in indices]
        rows += zip(keys, [row.copy() for row in x.cpu().numpy()], strict=True)
        if most is not None and len(rows) > 2 * most:
            rows = sorted(rows, key=lambda row: row[0])[:most]
    if not pooled:
        pooled, spatial = sums.gaussian(), spatial_sums.gaussian()
    rows = [row for _, row in gather_sorted(rows, dist_ctx)[:most]]
    return Statistics(images.source, pooled, spatial, torch.from_numpy(np.stack(rows)) if rows else None)


def fid(config: Config, dist_ctx: common.DistContext) -> list[dict]:
    if not (config.samples and config.reference):
        raise ValueError("fid compares images with others: give both --samples and --reference")
    samples = open_images(config.samples, None, config, dist_ctx)
    reference = open_images(config.reference, samples.size, config, dist_ctx)
    if samples.size and reference.size and samples.size != reference.size:
        sizes = f"{samples.size} pixels, {config.reference} of {reference.size}"
        raise ValueError(f"{config.samples} has images of {sizes}: compare images of one size")
    features = load_features(config.features, config.inception, dist_ctx)
    reference = compute_statistics(reference, features, MANIFOLD, dist_ctx)
    samples = compute_statistics(samples, features, None, dist_ctx)
    if not dist_ctx.is_main:
        return []
    for side in (samples, reference):
        warn_if_few(side.source, side.pooled, features)
    column, count = Path(config.samples).name, samples.pooled.count
    values = compare(samples, reference, features, dist_ctx.device)
    return [{"metric": f"{key}/{column}", "value": v, "n": count} for key, v in values.items()]


def compare(
    samples: Statistics, reference: Statistics, features: Features, device: torch.device
) -> dict[str, float]:
    """Every metric that the statistics and images allow; the others are named on stderr."""
    name, missing = features.name, []
    values = {f"fid-{name}": frechet_distance(samples.pooled, reference.pooled)}
    if samples.spatial and reference.spatial:
        values[f"sfid-{name}"] = frechet_distance(samples.spatial, reference.spatial)
    else:
        missing.append("sFID, which needs mu_s and sigma_s")
    if features.classifier is not None and samples.rows is not None:
        values["inception-score"] = inception_score(samples.rows @ features.classifier.T)
    elif features.classifier is not None:
        missing.append("Inception score, which needs images")
    rows = [side.rows for side in (samples, reference) if side.rows is not None]
    if len(rows) == 2 and min(len(rows[0]), len(rows[1])) > NEIGHBOURS:
        precision, recall = precision_recall(samples.rows, reference.rows, device)
        values |= {f"precision-{name}": precision, f"recall-{name}": recall}
    else:
        missing.append(f"precision and recall, which need {NEIGHBOURS + 1} images on each side")
    for metric in missing:
        print(f"without {metric}", file=sys.stderr)
    return values


# -----------------------------------------------------------------------------------------------------------
# main


EVALUATIONS = {
    "recon": recon,
    "fid": fid,
    "geneval": benchmarks.geneval,
    "clipscore": benchmarks.clipscore,
    "dpg": benchmarks.dpg,
    "understanding": benchmarks.understanding,
}


def main() -> None:
    config = common.parse(Config, __doc__)
    names = config.what or ["recon"]
    if unknown := set(names) - EVALUATIONS.keys():
        raise ValueError(f"unknown evaluation {', '.join(unknown)}: choose from {', '.join(EVALUATIONS)}")
    common.check_output(Path(config.out), ".json")
    if "recon" in names:
        strip = strip_path(config)
        common.check_output(strip)
        if strip.exists() and "data" not in data.open_metadata(str(strip)):
            raise ValueError(f"{strip}, the place of the strip, is not from eval.py: choose another --out")
    dist_ctx = common.init_distributed(config.dtype, minutes=common.LONG_TIMEOUT)
    if dist_ctx.is_main:
        print(dist_ctx)
    results = []
    for name in names:
        part = EVALUATIONS[name](config, dist_ctx)
        if dist_ctx.is_main:
            print(f"\n{common.table(part)}", flush=True)
            results += part
    if dist_ctx.is_main:
        common.save_results(results, config.seed, Path(config.out))


if __name__ == "__main__":
    common.main(main)
