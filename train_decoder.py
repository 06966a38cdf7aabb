"""Stage 1: trains the decoder of a representation autoencoder on the latents of a frozen encoder.

    python train_decoder.py                                        # the nano world, on a laptop
    python train_decoder.py --resume                               # goes on after an interruption
    torchrun --nproc-per-node 8 train_decoder.py --preset rae-dinov2-b --data imagenet/train
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_decoder.py ...

First the mean and standard deviation of the latents are measured, then the decoder learns to invert the
encoder: loss = L1 + perceptual + Gram + GAN, each with a weight (RAE section 3.1, Scale-RAE table 7). Writes
OUT/model (an RAE folder for the other scripts), OUT/checkpoints/, OUT/metrics.jsonl and OUT/samples/.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

import common
import convert
import data
import rae
from common import flag

EPOCH = 2502  # steps of a pass over ImageNet at batch 512
RAE_RECIPE = {  # RAE's code, the same for all encoders; its discriminator's cosine never reached its end
    "decoder": "ViT-XL",
    "patch_size": 16,
    "crop": "random",
    "batch": 512,
    "steps": 16 * EPOCH,
    "lr": 2e-4,
    "warmup": EPOCH,
    "final_lr": 0.1,
    "clip": 0.0,
    "ema": 0.9978,
    "tau": 0.8,
    "sigma": "uniform",
    "perceptual": "lpips",
    "gan_weight": 0.75,
    "discriminator": rae.ENCODERS["dino-s8"],
    "disc_lr": 2e-4,
    "disc_warmup": EPOCH,
    "disc_start": 6 * EPOCH,
    "gan_start": 8 * EPOCH,
    "statistics": 0,
    "workers": 8,
}
VIRTUAL = 2500  # steps of Scale-RAE's virtual epoch of 1.28 M images
SCALE_RAE_RECIPE = (
    RAE_RECIPE
    | {  # Scale-RAE table 7; crops, EMA and clipping are not in it, nor an adaptive weight
        "patch_size": 14,
        "steps": 80 * VIRTUAL,
        "warmup": 2 * VIRTUAL,
        "tau": 0.0,
        "gram_weight": 100.0,
        "gan_weight": 10.0,
        "adaptive": False,
        "discriminator": rae.ENCODERS["dino-s16"],
        "disc_warmup": VIRTUAL,
        "normalise": "none",
    }
)
PRESETS = {
    "nano": {"muon": 0.02, "tau": 0.2},
    "nano-full": {  # every loss, at the size of a laptop
        "perceptual": "encoder",
        "gram_weight": 1e4,  # of smaller features than VGG's
        "gan_weight": 0.75,
        "disc_start": 1000,
        "gan_start": 1500,
    },
    "rae-dinov2-b": RAE_RECIPE | {"encoder": rae.ENCODERS["dinov2-b"], "encoder_size": 224},
    "rae-siglip2-b": RAE_RECIPE | {"encoder": rae.ENCODERS["siglip2-b"]},
    "rae-mae-b": RAE_RECIPE | {"encoder": rae.ENCODERS["mae-b"], "encoder_size": 256},
    "scale-rae-siglip2": SCALE_RAE_RECIPE
    | {
        "encoder": rae.ENCODERS["siglip2-so400m"],
        "lr": 4e-4,
        "disc_lr": 5e-5,
        "disc_start": 7 * VIRTUAL,
        "gan_start": 8 * VIRTUAL,
    },
    "scale-rae-webssl": SCALE_RAE_RECIPE
    | {
        "encoder": rae.ENCODERS["webssl-l"],
        "lr": 2e-4,
        "disc_lr": 2e-5,
        "disc_start": 10 * VIRTUAL,
        "gan_start": 11 * VIRTUAL,
    },
}


@dataclass
class Config:
    out: str = flag("runs/decoder", "folder of this training")
    resume: str = flag(
        "",
        "go on from the newest checkpoint of OUT, if there is one (auto), or from a folder",
        nargs="?",
        const="auto",
    )
    seed: int = flag(0, "of weights, data order, crops, noise and augmentations")
    data: str = flag("nano", "a source of images, or several with weights, see data.py")
    crop: str = flag(
        "centre",
        "of images: their centre, or a random square of them at 1.5 times the size",
        choices=["centre", "random"],
    )
    encoder: str = flag(
        str(common.WEIGHTS / "encoder"), "transformers folder or hub id of the frozen encoder"
    )
    encoder_size: int | None = flag(None, "side of its input in pixels, if not the one of its config")
    decoder: str = flag("nano", "size of the decoder", choices=rae.DECODERS)
    init: str = flag(
        "",
        "start from this RAE, a folder, hub id or name, instead of a new decoder of --encoder, --decoder and "
        "--statistics (default: a generator's)",
    )
    patch_size: int | None = flag(
        None, "side in pixels of the square that each token becomes (default: the encoder's)"
    )
    steps: int = flag(3000, "optimizer steps in all", at_least=1)
    batch: int = flag(64, "images a step, over all processes", at_least=1)
    lr: float = flag(1e-3, "peak learning rate")
    muon: float = flag(
        0.0, "peak learning rate of Muon, for the matrices of the decoder's layers (0: AdamW)", at_least=0
    )
    warmup: int = flag(100, "steps of linear warm-up, before the cosine", at_least=0)
    final_lr: float = flag(0.02, "fraction of the peak at the last step")
    clip: float = flag(1.0, "norm to which gradients are clipped (0: they are not)", at_least=0)
    ema: float = flag(0.998, "decay of the averaged weights, which are what is saved")
    tau: float = flag(0.0, "noise on the latents, of a sigma drawn for each image (0: none)", at_least=0)
    sigma: str = flag("normal", "its distribution: |N(0, tau^2)| or U(0, tau)", choices=["normal", "uniform"])
    generator: str = flag(
        "",
        "text-to-image model that makes the latents to decode from noised ones, so that it leaves its marks",
    )
    perceptual: str = flag(
        "none", "features to compare: VGG16's (lpips), the encoder's", choices=["lpips", "encoder", "none"]
    )
    perceptual_weight: float = flag(1.0, "of their distance", at_least=0)
    gram_weight: float = flag(0.0, "of the distance of their Gram matrices", at_least=0)
    gan_weight: float = flag(0.0, "of the adversarial loss (0: no discriminator)", at_least=0)
    adaptive: bool = flag(True, "multiply it so that its gradient is as large as that of all other losses")
    discriminator: str = flag(
        str(common.WEIGHTS / "encoder"), "transformers folder or hub id of its frozen backbone"
    )
    disc_lr: float = flag(2e-4, "peak learning rate of the discriminator")
    disc_warmup: int = flag(100, "steps of its linear warm-up, before the cosine", at_least=0)
    disc_start: int = flag(0, "step at which it begins to learn", at_least=0)
    gan_start: int = flag(0, "step at which the decoder begins to learn from it", at_least=0)
    normalise: str = flag(
        "token",
        "latents by their statistics: for each token, or channel",
        choices=["token", "channel", "none"],
    )
    statistics: int = flag(
        8192, "images to measure them on (0: those of every source, once, whatever its weight)", at_least=0
    )
    dtype: str = flag(
        "auto",
        "of the compute; weights are fp32 (on CUDA, fp32 multiplies as TF32)",
        choices=["auto", "bf16", "fp32"],
    )
    shard: str = flag(
        "none",
        "weights held by each process: all (none), a share (full), a share of its machine's (hybrid)",
        choices=["none", "full", "hybrid"],
    )
    grad_accum: int = flag(
        1, "pieces that each process cuts its part of a step into; each has its adaptive weight", at_least=1
    )
    checkpoint_blocks: bool = flag(False, "compute the decoder's layers twice, to save more of it")
    compile: bool | None = flag(None, "compile the layers of all three networks (default: on CUDA)")
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of reconstructions", at_least=1)
    keep: int = flag(2, "checkpoints to keep, the newest", at_least=1)
    tensorboard: bool = flag(False, "log to OUT/tensorboard too")


# -----------------------------------------------------------------------------------------------------------
# latents


@torch.no_grad()
def latent_statistics(
    model: rae.RAE, batches: Iterable[dict], per: str, dist_ctx: common.DistContext
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sqrt(var + 1e-5) of the raw latents, (N, C) each: per token and channel
    (RAE section 4), or per channel. Exact sums in fp64 over all batches of all processes."""
    total, count = torch.zeros(2, *model.latent_shape, dtype=torch.float64, device="cpu"), 0
    for batch in batches:
        latents = model.encode(data.to_unit(batch["image"], dist_ctx.device)).cpu().double()
        total += torch.stack([latents.sum(dim=0), latents.square().sum(dim=0)])
        count += len(latents)
    if dist_ctx.world_size > 1:
        dist.all_reduce(total)
    [count] = common.global_sum(count)
    if not count:
        raise ValueError("no image to measure the latents on")
    mean, square = total / count
    if per == "channel":
        mean, square = (table.mean(dim=0).expand_as(table) for table in (mean, square))
    return mean.float(), (square - mean**2 + 1e-5).sqrt().float()


def noise_scale(uniform: Tensor, tau: float, distribution: str) -> Tensor:
    """Standard deviations (B,) of the latents' noise from uniform draws: of |N(0, tau^2)|, as RAE's text has
    it, or of U(0, tau), as its code."""
    if distribution == "normal":
        uniform = torch.special.ndtri((1 + uniform.double()) / 2).float()
    return tau * uniform


def remade(
    latents: Tensor, generator: rae.TextToImage, captions: list[str], seed: int, index: list[int], step: int
) -> Tensor:
    """Latents (B, N, C) noised to one t of U(0, 0.8) a step and sampled from there by a text-to-image model.

    What is where in an image is decided above and stays. Below, the model leaves its marks: parts that look
    clean and do not quite agree, which noise is not. A decoder learns which of them to believe. (Not of a
    paper: it was found in the nano world, see docs/nano.md.)
    """
    start = 0.8 * data.uniform_draws(1, seed, [step], "remade").item()
    unshifted = rae.shift_time(start, 1 / generator.alpha)
    steps = math.ceil(4 / max(unshifted, 1e-3))  # of which four are below the start
    noise, _, _ = data.flow_draws(
        generator.latent_shape, data.hash_seed(seed, "remade"), index, latents.device
    )
    noisy = torch.lerp(latents.float(), noise, start)
    return generator.generate(captions, steps, noise=noisy, start=start)


# -----------------------------------------------------------------------------------------------------------
# features of frozen networks, and distances between them


DINO_CHANGES = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}  # as in RAE's code


class Backbone(nn.Module):
    """Inner features of a frozen vision transformer: images (B, 3, H, W) in [-1, 1], resized to its input
    (bilinear, no antialias), -> a map (B, C, N) after each of `layers`, by default after each quarter."""

    def __init__(
        self, encoder: rae.Encoder, size: int, mean: Tensor, std: Tensor, layers: Sequence[int] = ()
    ):
        super().__init__()
        depth = len(encoder.blocks)
        self.encoder, self.size = encoder, size
        self.layers = tuple(layers) or tuple(math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4))
        self.register_buffer("mean", torch.as_tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_pretrained(cls, source: str, layers: Sequence[int] = ()) -> "Backbone":
        """From a hub id or folder. DINO's gets the tanh GELU that the published discriminators have."""
        config = transformers.AutoConfig.from_pretrained(source)
        encoder = rae.Encoder(source, DINO_CHANGES if config.model_type == "vit" else {})
        size, mean, std = rae.input_of(source, encoder)
        return cls(encoder, size, mean, std, layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        return [x.mT for x in self.encoder.features(((images + 1) / 2 - self.mean) / self.std, self.layers)]


class Perceptual(nn.Module):
    """Features of a frozen network, and distances between those of two batches of images.

    kind: "lpips", VGG16's with learned weights of channels (arXiv 1801.03924), or "encoder", `backbone`'s.
    """

    def __init__(self, kind: str, backbone: Backbone | None = None):
        super().__init__()
        self.backbone, self.lpips = backbone, None
        if kind == "lpips":
            import lpips

            try:
                self.lpips = lpips.LPIPS(net="vgg", verbose=False)
            except OSError as error:
                raise OSError(f"--perceptual lpips downloads VGG16, which failed: {error}") from error
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps (B, C, P), of P positions, of images (B, 3, H, W) in [-1, 1]."""
        if self.lpips:
            return [x.flatten(2) for x in self.lpips.net(self.lpips.scaling_layer(images))]
        return [F.layer_norm(x.mT, x.shape[1:2]).mT for x in self.backbone(images)]

    def distance(self, one: list[Tensor], other: list[Tensor]) -> Tensor:
        """LPIPS of two lists of maps, or its like for the encoder's; (B,)."""
        total = 0.0
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            a, b = (x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
            difference = (a - b).square()
            if self.lpips:
                with torch.autocast(a.device.type, enabled=False):
                    difference = self.lpips.lins[i](difference[..., None]).flatten(2)
            total = total + difference.sum(dim=1).mean(dim=1)
        return total if self.lpips else total / len(one)


def gram_distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Mean squared difference of the Gram matrices of two lists of maps, summed over them; (B,)."""
    pairs = zip(one, other, strict=True)
    return sum((gram_matrix(a) - gram_matrix(b)).square().mean(dim=(1, 2)) for a, b in pairs)


def gram_matrix(features: Tensor) -> Tensor:
    """Products of the channels (B, C, C) of a map (B, C, P), over C P. Scale-RAE gives the weight of the Gram
    loss, but not its scale."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        return features @ features.mT / features[0].numel()


# -----------------------------------------------------------------------------------------------------------
# discriminator: small heads on the features of a frozen DINO (StyleGAN-T, arXiv 2301.09515)


class SpectralConv1d(nn.Module):
    """Convolution with circular padding, its weight divided by an estimate of its largest singular value. In
    training, each call first makes the estimate better by one power iteration."""

    def __init__(self, channels: int, out_channels: int, kernel: int):
        super().__init__()
        weight = nn.Conv1d(channels, out_channels, kernel)
        self.bias, self.weight_orig = weight.bias, weight.weight
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(channels * kernel), dim=0))
        for _ in range(15):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        matrix = self.weight_orig.flatten(1)
        self.weight_v = F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12)
        self.weight_u = F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                self.iterate()
            sigma = self.weight_u @ self.weight_orig.flatten(1) @ self.weight_v
        padding = self.weight_orig.shape[2] // 2
        x = F.pad(x, (padding, padding), mode="circular") if padding else x
        return F.conv1d(x, self.weight_orig / sigma, self.bias)


class TokenNorm(nn.Module):
    """Each channel of each image is normalised over its tokens, in fp32; then learned scale and shift."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x.float(), weight=self.weight, bias=self.bias, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.fn(x)) / math.sqrt(2)


def convolution(channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(channels, channels, kernel), TokenNorm(channels), nn.LeakyReLU(0.2))


class Discriminator(nn.Module):
    """Real or reconstructed? Images (B, 3, H, W) in [-1, 1] -> logits (B, maps * tokens): those of the last
    map of the backbone first, then of all of its maps in order, each by a head of its own (RAE's code).

    The frozen backbone, a hub id or folder maybe, is not part of the state dict.
    """

    def __init__(self, backbone: Backbone | str):
        super().__init__()
        if isinstance(backbone, str):
            backbone = Backbone.from_pretrained(backbone)
        self._backbone = [backbone]  # in a list it is no submodule
        channels = backbone.encoder.config.hidden_size
        self.heads = nn.ModuleList(
            nn.Sequential(
                convolution(channels, 1), Residual(convolution(channels, 9)), SpectralConv1d(channels, 1, 1)
            )
            for _ in range(len(backbone.layers) + 1)
        )

    def _apply(self, fn, recurse: bool = True) -> "Discriminator":
        self._backbone[0]._apply(fn)  # .to(device) and its like
        return super()._apply(fn, recurse)

    @classmethod
    def from_official(
        cls,
        heads_dict: dict[str, Tensor],
        backbone: Backbone | str | dict[str, Tensor],
        heads: int | None = None,
        layers: Sequence[int] = (),
    ) -> "Discriminator":
        """The authors' discriminator, in eval mode: the state dict of its heads, and its backbone, which may
        be a state dict of DINO's own release, with its attention heads and the layers of the maps if they are
        not a small DINO's. Raises ValueError for dicts that do not fit."""
        if isinstance(backbone, dict):
            backbone = official_dino(backbone, heads, layers)
        elif heads or layers and not isinstance(backbone, str):
            raise ValueError(f"heads={heads}, layers={layers}: this backbone has its own")
        elif isinstance(backbone, str):
            backbone = Backbone.from_pretrained(backbone, layers)
        return convert.load_official(cls(backbone), heads_dict)

    def forward(self, images: Tensor) -> Tensor:
        maps = self._backbone[0](images)
        pairs = zip(self.heads, [maps[-1], *maps], strict=True)
        return torch.cat([head(x).flatten(1) for head, x in pairs], dim=1)


def official_dino(weights: dict[str, Tensor], heads: int | None, layers: Sequence[int]) -> Backbone:
    """A DINO of its own release, with the changes of `Backbone.from_pretrained`."""
    try:
        width, patch = weights["patch_embed.proj.weight"].shape[::3]
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        size = patch * math.isqrt(weights["pos_embed"].shape[1] - 1)
        hidden = len(weights["blocks.0.mlp.fc1.bias"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"no state dict of a DINO: {error} is missing") from error
    encoder = rae.Encoder(
        {"model_type": "vit", "hidden_size": width, "num_hidden_layers": depth, "intermediate_size": hidden,
         "num_attention_heads": heads or width // 64, "image_size": size, "patch_size": patch},
        DINO_CHANGES,
    )  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        name = name.replace("blocks.", "layers.").replace("norm1", "layernorm_before")
        name = name.replace("norm2", "layernorm_after").replace("attn.proj", "attention.o_proj")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = name.replace("pos_embed", "embeddings.position_embeddings")
        if "attn.qkv" in name:
            for part, micro_batch in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = micro_batch
        elif not name.startswith("norm."):  # the last norm is not used
            renamed[name] = value
    convert.load_official(encoder.model, renamed)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Backbone(encoder, size, mean, std, layers)


def augment(images: Tensor, uniform: Tensor, cutout: float = 0.0) -> Tensor:
    """DiffAug (arXiv 2006.10738) of images (B, 3, H, W) in [-1, 1], by uniform draws (7, B): translation by
    up to 1/8, filled with grey; brightness, saturation and contrast; a square of side `cutout` H removed."""
    b, _, h, w = images.shape
    r, images = rae.to_device(uniform, images.device), images.float()
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)

    y, x = (
        places + (draw[:, None] * (2 * round(side / 8) + 1)).floor().long() - round(side / 8) + 1
        for places, draw, side in ((rows, r[0], h), (columns, r[1], w))
    )  # (B, H) and (B, W), of the image with a grey frame of one pixel
    framed = F.pad(images, (1, 1, 1, 1))
    y, x = y.clamp(0, h + 1)[:, None, :, None], x.clamp(0, w + 1)[:, None, None, :]
    sample, channel = torch.arange(b, device=r.device), torch.arange(3, device=r.device)
    images = framed[sample[:, None, None, None], channel[:, None, None], y, x]

    brightness, saturation, contrast = r[2:5, :, None, None, None]
    images = images + brightness - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (contrast + 0.5)

    if side := round(cutout * h):
        y, x = (
            (places - (draw[:, None] * (length + 1 - side % 2)).floor() + side // 2)
            for places, draw, length in ((rows, r[5], h), (columns, r[6], w))
        )
        inside = ((y >= 0) & (y < side))[:, None, :, None] & ((x >= 0) & (x < side))[:, None, None, :]
        images = images.masked_fill(inside, 0.0)
    return images


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: 0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def to_256_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1], clamped and rounded as 8-bit files are, which real ones come from."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class LastLayer:
    """Gradients of the weight of a decoder's last layer, from those of its images: without a second pass
    through the losses' networks, and where the weight itself is spread over processes."""

    def __init__(self, model: rae.RAE):
        self.model = model
        model.decoder.decoder_pred.register_forward_pre_hook(self.keep)

    def keep(self, module: nn.Module, given: tuple[Tensor]) -> None:
        self.tokens = given[0].detach()

    def gradient(self, of_images: Tensor) -> Tensor:
        """(B, 3, H, W) of the last batch that was decoded -> (3 p^2, width), over all processes."""
        p = self.model.decoder.patch_size
        pixels = (of_images * self.model.image_std).type_as(self.tokens)
        pixels = rearrange(pixels, "b c (h p) (w q) -> (b h w) (p q c)", p=p, q=p)
        gradient = pixels.T.float() @ self.tokens.flatten(0, 1).float()
        if dist.is_initialized():
            dist.all_reduce(gradient)
        return gradient


def adaptive_weight(of_reconstruction: Tensor, of_gan: Tensor) -> Tensor:
    """Factor that makes the second gradient as long as the first (VQGAN, arXiv 2012.09841), up to 10^4."""
    return (of_reconstruction.norm() / (of_gan.norm() + 1e-6)).clamp(0, 1e4)


# -----------------------------------------------------------------------------------------------------------


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    if config.gan_weight and config.gan_start < config.disc_start:
        raise ValueError(
            f"--gan-start {config.gan_start}: the discriminator begins to learn at --disc-start "
            f"{config.disc_start}, the decoder cannot learn from it earlier"
        )
    dist_ctx = common.init_distributed(config.dtype, config.shard)
    run = common.Run(config, dist_ctx)

    # -------------------------------------------------------------------------------------------------------
    # model -> average -> shard -> compile -> optimizer
    torch.manual_seed(config.seed)
    patch = {"patch_size": config.patch_size} if config.patch_size else {}
    size = rae.DECODERS[config.decoder] | patch
    generator = None
    if config.generator:
        generator = common.load_model(rae.TextToImage, config.generator, config.init, dist_ctx)
    if generator or config.init:
        model = generator.autoencoder if generator else common.load_autoencoder(config.init, dist_ctx)
        if not isinstance(model, rae.RAE):
            raise ValueError("--init, or the generator's autoencoder, is a VAE: this trains an RAE's decoder")
        for name, own in (("patch_size", model.decoder.patch_size), ("encoder_size", model.encoder_size)):
            if (given := getattr(config, name)) not in (None, own):
                raise ValueError(f"--{name.replace('_', '-')} {given}: the model to start from has {own}")
    else:
        with common.loading(config.encoder):
            model = rae.RAE(config.encoder, size, config.encoder_size).to(dist_ctx.device)
    options = {"crop": config.crop}
    if generator:  # captions longer than it takes are left out
        options |= {
            "length": partial(rae.chat_length, tokenizer=generator.tokenizer, image=0),
            "longest": 256,
        }
    source = data.open_source(config.data, model.image_size, config.seed, **options)

    def batches(start: int, positions: dict) -> data.Loader:
        return data.Loader(
            source, config.batch, config.workers, start, dist_ctx.rank, dist_ctx.world_size, positions
        )

    if run.source is None and not (generator or config.init) and config.normalise != "none":
        centres = data.open_source(config.data, model.image_size, config.seed)
        limit, world = config.statistics or None, dist_ctx.world_size
        measured = data.OnePass(centres, config.batch, limit, config.workers, dist_ctx.rank, world)
        bar = tqdm(measured, "statistics", disable=not dist_ctx.is_main)
        statistics = latent_statistics(model, bar, config.normalise, dist_ctx)
        run.count_skipped(measured)
        model.latent_mean.copy_(statistics[0])
        model.latent_std.copy_(statistics[1])
    perceptual = discriminator = None
    if config.perceptual != "none" or config.gram_weight:
        own = Backbone(model.encoder, model.encoder_size, model.image_mean, model.image_std)
        perceptual = Perceptual(config.perceptual, own).to(dist_ctx.device)
    if config.gan_weight:
        with common.loading(config.discriminator):
            backbone = Backbone.from_pretrained(config.discriminator)
        torch.manual_seed(config.seed)  # the same on every process
        discriminator = Discriminator(backbone).to(dist_ctx.device).eval()
    ema = copy.deepcopy(model, {id(model.encoder): model.encoder})  # the frozen encoder is shared
    export = copy.deepcopy(model).cpu() if dist_ctx.is_main else None  # on its own, to save the average with
    for each in (model, ema):
        common.shard_model(each.decoder, each.decoder.decoder_layers, dist_ctx)
    frozen = [*model.encoder.blocks, *(backbone.encoder.blocks if discriminator else ())]
    frozen += generator.dit.blocks if generator else []
    common.compile_blocks([*model.decoder.decoder_layers, *frozen], config.compile, dist_ctx)
    if config.checkpoint_blocks:
        common.checkpoint_blocks(model.decoder.decoder_layers)
    named = {name: p for name, p in model.decoder.named_parameters() if p.requires_grad}
    matrices = {
        n: p for n, p in named.items() if config.muon and n.startswith("decoder_layers") and p.ndim == 2
    }
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    others = [p for name, p in named.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(others, config.lr, **adamw)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices.values(), config.muon, weight_decay=0.0))
    steppers = [common.Stepper(*optimizers, clip=config.clip)]
    modules = {"model": model, "ema": ema}
    if discriminator:
        heads = list(discriminator.parameters())
        steppers.append(common.Stepper(torch.optim.AdamW(heads, config.disc_lr, **adamw), clip=config.clip))
        modules["discriminator"] = discriminator
    state = run.load(modules, steppers, export)
    last_layer = LastLayer(model)

    # -------------------------------------------------------------------------------------------------------
    # images of another seed, to look at
    others = data.open_source(config.data, model.image_size, config.seed + 1)
    shown = data.to_unit(next(data.Loader(others, 16, workers=0))["image"], dist_ctx.device)

    @torch.no_grad()
    def checkpoint(step: int, with_samples: bool) -> None:
        run.save(step, loader)
        if not with_samples:
            return
        with dist_ctx.autocast():
            pairs = torch.stack([shown, ema.decode(ema.encode(shown))], dim=1).flatten(0, 1)
        if dist_ctx.is_main:
            grid = common.image_grid(pairs, 8, scale=2)
            common.save_image(run.out / "samples" / f"{step:07d}.png", grid)

    # -------------------------------------------------------------------------------------------------------
    # the two halves of a step, on one piece of the batch; both return the losses, by name

    def learn_to_decode(images: Tensor, latents: Tensor, index: list[int], adversarial: bool) -> dict:
        if config.tau:
            noise, uniform, _ = data.flow_draws(model.latent_shape, config.seed, index, dist_ctx.device)
            sigma = rae.to_device(noise_scale(uniform, config.tau, config.sigma), dist_ctx.device)
            latents = model.add_noise(latents, noise, sigma)
        with dist_ctx.autocast():
            reconstruction = model.decode(latents)
        pixels = reconstruction.detach().requires_grad_()  # the losses' gradients meet here
        losses = {"l1": F.l1_loss(pixels, images)}
        if perceptual:
            with dist_ctx.autocast():
                with torch.no_grad():
                    maps = perceptual.features(2 * images - 1)
                maps = maps, perceptual.features(2 * pixels - 1)
            if config.perceptual != "none":
                losses["perceptual"] = perceptual.distance(*maps).mean()
            if config.gram_weight:
                losses["gram"] = gram_distance(*maps).mean()
        weights = {"l1": 1.0, "perceptual": config.perceptual_weight, "gram": config.gram_weight}
        loss = sum(weights[name] * value for name, value in losses.items())
        share = len(images) / config.batch
        [gradient] = torch.autograd.grad(loss * share, pixels)
        if adversarial:
            draws = data.uniform_draws(7, config.seed, index, "generator")
            with dist_ctx.autocast():
                gan = -discriminator(augment(2 * pixels - 1, draws)).float().mean()
            [of_gan] = torch.autograd.grad(gan * share, pixels)
            weight = torch.full((), config.gan_weight, device=dist_ctx.device)
            if config.adaptive:
                weight = weight * adaptive_weight(last_layer.gradient(gradient), last_layer.gradient(of_gan))
            losses |= {"gan": gan, "gan_weight": weight}
            gradient, loss = gradient + weight * of_gan, loss + weight * gan
        reconstruction.backward(gradient * common.one_if_finite(loss))
        return {"loss": loss} | losses

    def learn_to_discriminate(images: Tensor, latents: Tensor, index: list[int], first: bool) -> dict:
        with torch.no_grad(), dist_ctx.autocast():
            fake = to_256_levels(2 * model.decode(latents) - 1)
        draws = [data.uniform_draws(7, config.seed, index, kind) for kind in ("real", "fake")]
        with dist_ctx.autocast():
            discriminator.train(first)  # one power iteration a step
            on_real = discriminator(augment(2 * images - 1, draws[0])).float()
            on_fake = discriminator.eval()(augment(fake, draws[1])).float()
        loss = hinge_loss(on_real, on_fake)
        common.backward(loss * len(images) / config.batch)
        return {"disc_loss": loss, "on_real": on_real.mean(), "on_fake": on_fake.mean()}

    # -------------------------------------------------------------------------------------------------------
    # the loop
    done = start = state["step"]
    loader = batches(start, state["positions"])
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not dist_ctx.is_main)
    for step in bar:
        factor = common.cosine(step, config.steps, config.warmup, config.final_lr)
        steppers[0].scale(factor)
        losses = defaultdict(float)  # this process's share of each

        def count(found: dict, images: Tensor, losses=losses) -> None:
            for name, value in found.items():
                losses[name] += value.detach() * len(images) / config.batch

        micro_batches = []
        for micro_batch in data.micro_batches(next(loader), config.grad_accum):
            images = data.to_unit(micro_batch["image"], dist_ctx.device)
            with dist_ctx.autocast():
                latents = model.encode(images)
                if generator:
                    if not all(micro_batch["caption"]):
                        raise ValueError(f"{config.data} has images without captions, --generator needs them")
                    latents = remade(
                        latents, generator, micro_batch["caption"], config.seed, micro_batch["index"], step
                    )
            micro_batches.append((images, latents, micro_batch["index"]))
        adversarial = discriminator is not None and step >= config.gan_start
        for micro_batch in micro_batches:
            count(learn_to_decode(*micro_batch, adversarial), micro_batch[0])
        norm = steppers[0].step()
        common.update_ema(ema, model, config.ema, step)

        if discriminator and step >= config.disc_start:
            own, total = step - config.disc_start, config.steps - config.disc_start
            disc_factor = common.cosine(own, total, config.disc_warmup, config.final_lr)
            steppers[1].scale(disc_factor)
            for number, micro_batch in enumerate(micro_batches):
                count(learn_to_discriminate(*micro_batch, first=number == 0), micro_batch[0])
            common.sum_gradients(steppers[1].parameters)
            steppers[1].step()

        done = step + 1
        if done % 10 == 0:
            [stepper.check() for stepper in steppers]
        if done % config.log_every == 0 or done == config.steps:
            values = dict(zip(losses, common.global_sum(*map(float, losses.values())), strict=True))
            values |= {"lr": config.lr * factor, "grad_norm": norm}
            values["skipped_steps"] = sum(stepper.check() for stepper in steppers)
            run.log(done, bar.write, loader, **values)
        stop = run.stopping()
        if done % config.save_every == 0 or done == config.steps or stop:
            checkpoint(done, with_samples=not stop)
            run.time_from(done)
        if stop:
            break
    run.finish(done)


if __name__ == "__main__":
    common.main(main)
