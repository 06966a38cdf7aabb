"""Stage 1: trains the decoder of a representation autoencoder on the latents of a frozen encoder.

    python train_decoder.py                                        # the nano world, on a laptop
    python train_decoder.py --resume                               # continues after an interruption
    torchrun --nproc-per-node 8 train_decoder.py --preset rae-dinov2-b --data imagenet/train
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_decoder.py ...

First the mean and standard deviation of the latents are measured. Then the decoder learns to invert the
encoder: loss = L1 + perceptual + Gram + adversarial, with weights (RAE section 3.1, Scale-RAE table 7).
Writes OUT/model (an RAE folder for the other scripts), OUT/checkpoints/, OUT/metrics.jsonl, OUT/losses.png
and OUT/samples/.
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

# -----------------------------------------------------------------------------------------------------------
# presets

EPOCH = 2502  # steps of one epoch of ImageNet at batch 512
RAE_RECIPE = {  # RAE's code, for all encoders
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
    "perceptual": "lpips",
    "gan_weight": 0.75,
    "discriminator": rae.ENCODERS["dino-s8"],
    "disc_lr": 2e-4,
    "disc_warmup": EPOCH,
    "disc_start": 6 * EPOCH,
    "gan_start": 8 * EPOCH,
    "statistics": -1,
    "workers": 8,
}
VIRTUAL = 2500  # steps of Scale-RAE's virtual epoch of 1.28 M images
SCALE_RAE_RECIPE = RAE_RECIPE | {  # Scale-RAE table 7; crops, EMA and clipping are not in it
    "patch_size": 14,
    "steps": 80 * VIRTUAL,
    "warmup": 2 * VIRTUAL,
    "tau": 0.0,
    "gram_weight": 100.0,
    "gan_weight": 10.0,
    "adaptive": False,
    "discriminator": rae.ENCODERS["dino-s16"],
    "disc_warmup": VIRTUAL,
    "statistics": 0,  # latents are not normalised
}
PRESETS = {
    "nano": {"muon": 0.008, "tau": 0.3, "batch": 32, "steps": 5000},
    "nano-full": {  # every loss, at the size of a laptop
        "perceptual": "encoder",
        "gram_weight": 1e4,  # the features are smaller than VGG's
        "gan_weight": 0.75,
        "disc_start": 1000,
        "gan_start": 1500,
    },
    "rae-dinov2-b": RAE_RECIPE | {"encoder": rae.ENCODERS["dinov2-b"], "encoder_size": 224},
    "rae-siglip2-b": RAE_RECIPE | {"encoder": rae.ENCODERS["siglip2-b"]},
    "rae-mae-b": RAE_RECIPE | {"encoder": rae.ENCODERS["mae-b"], "encoder_size": 256},
    # RAEv2: no crops. Its "general" decoders are trained on four sources at equal weight, 0.54 M steps
    "raev2-k7": RAE_RECIPE
    | {
        "encoder": rae.ENCODERS["dinov3-l"],
        "encoder_size": 256,
        "layers": ",".join(map(str, rae.LAYERS["k7"])),
        "crop": "centre",
    },
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
class Config(common.TrainConfig):
    out: str = flag("runs/decoder", "folder of this run")
    # model
    encoder: str = flag(str(common.WEIGHTS / "encoder"), "frozen encoder: transformers folder or hub id")
    layers: str = flag("", "encoder layers to average, like 11,17,23 counted from 0 (default: only the last)")
    encoder_size: int | None = flag(
        None, "side of the encoder's input in pixels (default: that of its config)", at_least=1
    )
    decoder: str = flag("nano", "size of the decoder", choices=rae.DECODERS)
    patch_size: int | None = flag(None, "pixels per token and side (default: the encoder's)", at_least=1)
    init: str = flag("", "start from this RAE (folder, hub id or name) instead of a new decoder")
    statistics: int = flag(8192, "images to measure latent mean and std on (0: none; -1: all)", at_least=-1)
    # data
    data: str = flag(
        "nano:objects=0.7,nano:scenes=0.15,nano:text=0.15",
        "source of images, or several with weights, see data.py",
    )
    crop: str = flag("centre", "random: crop after resizing to 1.5 x the size", choices=["centre", "random"])
    # losses
    tau: float = flag(0.0, "noise-augmented decoding: an image's sigma is uniform in [0, tau)", at_least=0)
    perceptual: str = flag(
        "none", "perceptual loss on features of VGG16 or of the encoder", choices=["lpips", "encoder", "none"]
    )
    gram_weight: float = flag(
        0.0,
        "weight of the Gram loss, on VGG16's features with --perceptual lpips, else the encoder's",
        at_least=0,
    )
    gan_weight: float = flag(0.0, "weight of the adversarial loss (0: no discriminator)", at_least=0)
    adaptive: bool = flag(True, "scale the adversarial gradient to that of the other losses (VQGAN)")
    discriminator: str = flag(
        str(common.WEIGHTS / "encoder"), "frozen backbone of the discriminator: folder or hub id"
    )
    disc_lr: float = flag(2e-4, "peak learning rate of the discriminator", above=0)
    disc_warmup: int = flag(100, "warm-up steps of the discriminator, after --disc-start", at_least=0)
    disc_start: int = flag(0, "step at which the discriminator starts to train", at_least=0)
    gan_start: int = flag(0, "step at which the adversarial loss is added", at_least=0)
    # optimization
    steps: int = flag(3000, "optimizer steps", at_least=1)
    lr: float = flag(1e-3, "peak learning rate", above=0)
    muon: float = flag(0.0, "peak learning rate of Muon for the decoder's matrices (0: AdamW)", at_least=0)
    warmup: int = flag(100, "steps of linear warm-up, before the cosine decay", at_least=0)
    final_lr: float = flag(0.02, "final learning rate, as a fraction of the peak", at_least=0, at_most=1)
    clip: float = flag(1.0, "gradient norm to clip to (0: no clipping)", at_least=0)
    ema: float = flag(0.998, "EMA decay of the weights that are saved", at_least=0, at_most=1)


# -----------------------------------------------------------------------------------------------------------
# latents


@torch.no_grad()
def latent_statistics(
    model: rae.RAE, batches: Iterable[dict], dist_ctx: common.DistContext
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation sqrt(var + 1e-5) of the raw latents, (N, C) each, per token and channel
    (RAE section 4). Exact sums in fp64 over all batches of all ranks."""
    # on the CPU: MPS has no fp64
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
    return mean.float(), (square - mean**2 + 1e-5).sqrt().float()


# -----------------------------------------------------------------------------------------------------------
# features of frozen networks, and distances between them

DINO_CHANGES = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}  # as in RAE's code


class Backbone(nn.Module):
    """Inner features of a frozen vision transformer: images (B, 3, H, W) in [-1, 1], resized to its input
    (bilinear, no antialias) -> a map (B, C, N) after each of `layers`, by default after each quarter."""

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
        """From a hub id or folder. A DINO gets the tanh GELU that the published discriminators have."""
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        encoder = rae.Encoder(source, DINO_CHANGES if config.model_type == "vit" else {})
        size, mean, std = rae.input_settings(source, encoder)
        return cls(encoder, size, mean, std, layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = F.interpolate(images, (self.size, self.size), mode="bilinear")
        # [-1, 1] -> [0, 1] -> the backbone's own statistics
        pixels = ((images + 1) / 2 - self.mean) / self.std
        return [tokens.mT for tokens in self.encoder.features(pixels, self.layers)]


class Perceptual(nn.Module):
    """Features of a frozen network, and the distance between those of two batches of images.

    kind: "lpips", VGG16's with trained channel weights (arXiv 1801.03924), "encoder", those of `backbone`, or
        "none", no distance: the Gram loss alone takes the features of `backbone`.
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
        """Maps (B, C, P) with P positions, of images (B, 3, H, W) in [-1, 1]."""
        if self.lpips:
            return [x.flatten(2) for x in self.lpips.net(self.lpips.scaling_layer(images))]
        # tokens of inner layers have a few huge channels, which would decide every distance
        return [F.layer_norm(x.mT, x.shape[1:2]).mT for x in self.backbone(images)]

    def distance(self, maps: list[Tensor], others: list[Tensor]) -> Tensor:
        """LPIPS of two lists of maps, or its analogue for the encoder's; (B,)."""
        total = 0.0
        for i, (a, b) in enumerate(zip(maps, others, strict=True)):
            a = a.float() / (a.float().norm(dim=1, keepdim=True) + 1e-10)
            b = b.float() / (b.float().norm(dim=1, keepdim=True) + 1e-10)
            difference = (a - b).square()
            # (B, C, P) -> (B, P): weighted by LPIPS' trained channels, or all alike
            if self.lpips:
                with torch.autocast(a.device.type, enabled=False):
                    difference = self.lpips.lins[i](difference[..., None]).flatten(2)
            total = total + difference.sum(dim=1).mean(dim=1)
        return total if self.lpips else total / len(maps)


def gram_distance(maps: list[Tensor], others: list[Tensor]) -> Tensor:
    """Mean squared difference of the Gram matrices of two lists of maps, summed over the maps; (B,)."""
    pairs = zip(maps, others, strict=True)
    return sum((gram_matrix(a) - gram_matrix(b)).square().mean(dim=(1, 2)) for a, b in pairs)


def gram_matrix(features: Tensor) -> Tensor:
    """Products of the channels (B, C, C) of a map (B, C, P), over C P. Scale-RAE gives the weight of the Gram
    loss but not its scale."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        return features @ features.mT / features[0].numel()


# -----------------------------------------------------------------------------------------------------------
# discriminator: small heads on the features of a frozen DINO (StyleGAN-T, arXiv 2301.09515)


class SpectralConv1d(nn.Module):
    """Convolution with circular padding, its weight divided by an estimate of its largest singular value. In
    training, each call first improves the estimate by one power iteration."""

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
        # in fp32: bf16 would spoil the estimate
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                self.iterate()
            sigma = self.weight_u @ self.weight_orig.flatten(1) @ self.weight_v
        padding = self.weight_orig.shape[2] // 2
        x = F.pad(x, (padding, padding), mode="circular") if padding else x
        return F.conv1d(x, self.weight_orig / sigma, self.bias)


class TokenNorm(nn.Module):
    """Normalises each channel of each image over its tokens, in fp32; then a trained scale and shift."""

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
    """Real or reconstructed? Images (B, 3, H, W) in [-1, 1] -> logits (B, maps * tokens): those of the
    backbone's last map first, then those of all its maps in order, each by a head of its own (RAE's code).

    The frozen backbone, which may be a hub id or folder, is not part of the state dict.
    """

    def __init__(self, backbone: Backbone | str):
        super().__init__()
        if isinstance(backbone, str):
            backbone = Backbone.from_pretrained(backbone)
        self._backbone = [backbone]  # in a list it is no submodule
        channels = backbone.encoder.config.hidden_size
        heads = []
        for _ in range(len(backbone.layers) + 1):
            residual = Residual(convolution(channels, 9))
            heads.append(nn.Sequential(convolution(channels, 1), residual, SpectralConv1d(channels, 1, 1)))
        self.heads = nn.ModuleList(heads)

    @property
    def backbone(self) -> Backbone:
        return self._backbone[0]

    def _apply(self, fn, recurse: bool = True) -> "Discriminator":
        self.backbone._apply(fn)  # .to(device) moves the backbone too
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
        be a state dict of DINO's own release. One that is not a small DINO also needs `heads` (attention
        heads) and `layers` (blocks whose maps are used). Raises ValueError for dicts that do not fit."""
        if isinstance(backbone, dict):
            encoder, size = convert.official_dino(backbone, heads, DINO_CHANGES)
            backbone = Backbone(encoder, size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), layers)
        elif heads or layers and not isinstance(backbone, str):
            raise ValueError(f"heads={heads}, layers={layers}: this backbone has its own")
        elif isinstance(backbone, str):
            backbone = Backbone.from_pretrained(backbone, layers)
        return convert.load_official(cls(backbone), convert.unwrapped(heads_dict))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.backbone(images)
        pairs = zip(self.heads, [maps[-1], *maps], strict=True)
        return torch.cat([head(x).flatten(1) for head, x in pairs], dim=1)


def augment(images: Tensor, uniform: Tensor, cutout: float = 0.0) -> Tensor:
    """DiffAug (arXiv 2006.10738) of images (B, 3, H, W) in [-1, 1], by uniform draws (7, B): translation by
    up to 1/8, filled with grey; brightness, saturation and contrast; a square of side `cutout` H is
    removed."""
    b, _, h, w = images.shape
    r, images = rae.to_device(uniform, images.device), images.float()
    rows, columns = torch.arange(h, device=images.device), torch.arange(w, device=images.device)

    # translation: positions in the image with a grey frame of one pixel, clamped into it
    y = rows + (r[0][:, None] * (2 * round(h / 8) + 1)).floor().long() - round(h / 8) + 1  # (B, H)
    x = columns + (r[1][:, None] * (2 * round(w / 8) + 1)).floor().long() - round(w / 8) + 1  # (B, W)
    framed = F.pad(images, (1, 1, 1, 1))
    y, x = y.clamp(0, h + 1)[:, None, :, None], x.clamp(0, w + 1)[:, None, None, :]
    sample, channel = torch.arange(b, device=r.device), torch.arange(3, device=r.device)
    images = framed[sample[:, None, None, None], channel[:, None, None], y, x]

    # colour: an offset, the distance to grey, and the distance to the mean
    brightness, saturation, contrast = r[2:5, :, None, None, None]
    images = images + brightness - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (contrast + 0.5)

    # cutout: a grey square, which may lie partly outside
    if side := round(cutout * h):
        y = rows - (r[5][:, None] * (h + 1 - side % 2)).floor() + side // 2
        x = columns - (r[6][:, None] * (w + 1 - side % 2)).floor() + side // 2
        inside = ((y >= 0) & (y < side))[:, None, :, None] & ((x >= 0) & (x < side))[:, None, None, :]
        images = images.masked_fill(inside, 0.0)
    return images


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: 0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def to_256_levels(images: Tensor) -> Tensor:
    """Clamps images in [-1, 1] and rounds them to 256 levels, as real images are: otherwise the discriminator
    could tell reconstructions by their finer levels."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class LastLayer:
    """Gradient of the decoder's last weight, computed from the gradient of its output images: one matrix
    product instead of another backward pass. Works for sharded weights, too."""

    def __init__(self, model: rae.RAE):
        self.model = model
        model.decoder.decoder_pred.register_forward_pre_hook(self.keep_input)

    def keep_input(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.tokens = args[0].detach()

    def gradient(self, of_images: Tensor) -> Tensor:
        """(B, 3, H, W), of the images decoded last -> (3 p^2, width), summed over all ranks."""
        p = self.model.decoder.patch_size
        pixels = (of_images * self.model.output_std).type_as(self.tokens)
        pixels = rearrange(pixels, "b c (h p) (w q) -> (b h w) (p q c)", p=p, q=p)
        gradient = pixels.T.float() @ self.tokens.flatten(0, 1).float()
        if dist.is_initialized():
            dist.all_reduce(gradient)
        return gradient


def adaptive_weight(reconstruction_grad: Tensor, gan_grad: Tensor) -> Tensor:
    """Factor that scales the second gradient to the norm of the first (VQGAN, arXiv 2012.09841), up to
    10^4."""
    return (reconstruction_grad.norm() / (gan_grad.norm() + 1e-6)).clamp(0, 1e4)


# -----------------------------------------------------------------------------------------------------------
# the stages of a step, on one micro-batch; each returns its losses by name


def reconstruction_losses(
    config: Config, perceptual: Perceptual | None, pixels: Tensor, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + perceptual + Gram loss of reconstructions and originals (B, 3, H, W) in [0, 1], and its parts."""
    loss = F.l1_loss(pixels, images)
    losses = {"l1_loss": loss}
    if perceptual:
        with torch.no_grad():
            originals = perceptual.features(2 * images - 1)
        maps = perceptual.features(2 * pixels - 1)
        if config.perceptual != "none":
            losses["perceptual_loss"] = perceptual.distance(originals, maps).mean()
            loss = loss + losses["perceptual_loss"]
        if config.gram_weight:
            losses["gram_loss"] = gram_distance(originals, maps).mean()
            loss = loss + config.gram_weight * losses["gram_loss"]
    return loss, losses


def add_losses(totals: dict[str, Tensor], losses: dict[str, Tensor], share: float) -> None:
    for name, value in losses.items():
        totals[name] += value.detach() * share


def discriminator_step(
    config: Config,
    discriminator: Discriminator,
    optimizer: common.Optimizers,
    model: rae.RAE,
    encoded: list[tuple[Tensor, Tensor, list[int]]],
    step: int,
    dist_ctx: common.DistContext,
) -> dict[str, Tensor]:
    """Trains the discriminator on all micro-batches, (images, latents, index) each. Returns this rank's part
    of the losses."""
    disc_step, disc_steps = step - config.disc_start, config.steps - config.disc_start
    optimizer.set_lr(common.cosine(disc_step, disc_steps, config.disc_warmup, config.final_lr))
    totals = defaultdict(float)
    for number, (images, latents, index) in enumerate(encoded):
        with dist_ctx.autocast():
            with torch.no_grad():
                fake = to_256_levels(2 * model.decode(latents) - 1)
            of_real, of_fake = (data.uniform_draws(7, config.seed, index, kind) for kind in ("real", "fake"))
            # spectral norms take one power iteration per step, however many micro-batches there are
            real_logits = discriminator.train(number == 0)(augment(2 * images - 1, of_real)).float()
            fake_logits = discriminator.eval()(augment(fake, of_fake)).float()
            loss = hinge_loss(real_logits, fake_logits)
        share = len(images) / config.batch
        (loss * share).backward(common.one_or_nan(loss))
        losses = {"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}
        add_losses(totals, {"disc_loss": loss, **losses}, share)
    optimizer.step()
    return totals


# -----------------------------------------------------------------------------------------------------------
# set-up


def build_model(config: Config, dist_ctx: common.DistContext) -> rae.RAE:
    """A new RAE, or that of --init."""
    torch.manual_seed(config.seed)
    if not config.init:
        size = dict(rae.DECODERS[config.decoder])
        if config.patch_size:
            size["patch_size"] = config.patch_size
        layers = None
        if config.layers:
            try:
                layers = [int(layer) for layer in config.layers.split(",")]
            except ValueError:
                raise ValueError(f"--layers {config.layers}: give numbers like 11,17,23") from None
        with common.loading(config.encoder):
            model = rae.RAE(config.encoder, size, config.encoder_size, layers=layers)
        return model.to(dist_ctx.device)
    model = common.load_autoencoder(config.init, dist_ctx)
    if not isinstance(model, rae.RAE):
        raise ValueError(f"--init {config.init} is a VAE: only an RAE's decoder is trained")
    for name in ("encoder", "layers", "decoder", "statistics"):
        if name in config.given and not config.resumed:
            raise ValueError(f"--{name} is for a new model: that of --init {config.init} has its own")
    for name, actual in (("patch_size", model.decoder.patch_size), ("encoder_size", model.encoder_size)):
        value = getattr(config, name)
        if value not in (None, actual):
            raise ValueError(f"--{name.replace('_', '-')} {value}: the model to start from has {actual}")
    return model


def build_loss_networks(
    config: Config, model: rae.RAE, dist_ctx: common.DistContext
) -> tuple[Perceptual | None, Discriminator | None]:
    perceptual = discriminator = None
    if config.perceptual != "none" or config.gram_weight:
        backbone = Backbone(model.encoder, model.encoder_size, model.image_mean, model.image_std)
        perceptual = Perceptual(config.perceptual, backbone).to(dist_ctx.device)
        if perceptual.lpips and dist_ctx.device.type == "cuda":  # cuDNN's convolutions want channels last
            perceptual.lpips.to(memory_format=torch.channels_last)
    if config.gan_weight:
        with common.loading(config.discriminator):
            backbone = Backbone.from_pretrained(config.discriminator)
        torch.manual_seed(config.seed)  # the same heads on every rank
        discriminator = Discriminator(backbone).to(dist_ctx.device).eval()
    return perceptual, discriminator


def measure_statistics(config: Config, model: rae.RAE, run: common.Run, dist_ctx: common.DistContext) -> None:
    """Sets the model's latent statistics, from centre crops."""
    source = data.open_source(config.data, model.image_size, config.seed)
    limit = None if config.statistics < 0 else config.statistics
    batch = max(1, config.batch // dist_ctx.world_size)
    batches = data.OnePass(source, batch, limit, config.workers, dist_ctx.rank, dist_ctx.world_size)
    bar = tqdm(batches, "statistics", disable=not dist_ctx.is_main)
    mean, std = latent_statistics(model, bar, dist_ctx)
    run.count_skipped(batches)
    run.skipped_samples = 0  # those of training are counted
    model.latent_mean.copy_(mean)
    model.latent_std.copy_(std)


def make_optimizers(
    config: Config, model: rae.RAE, discriminator: Discriminator | None
) -> list[common.Optimizers]:
    """The optimizers of the decoder and of the discriminator: AdamW, and with --muon, Muon for the decoder's
    matrices."""
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    matrices, rest = [], []
    for name, parameter in model.decoder.named_parameters():
        if parameter.requires_grad:
            to_muon = config.muon and name.startswith("decoder_layers") and parameter.ndim == 2
            (matrices if to_muon else rest).append(parameter)
    of_decoder = [adamw(rest, config.lr)]
    if matrices:
        of_decoder.append(common.Muon(matrices, config.muon))
    optimizers = [common.Optimizers(*of_decoder, clip=config.clip)]
    if discriminator:
        of_discriminator = adamw(discriminator.parameters(), config.disc_lr)
        optimizers.append(common.Optimizers(of_discriminator, clip=config.clip))
    return optimizers


def flops_per_step(config: Config, model: rae.RAE) -> float:
    """FLOPs of encoder and decoder in one step over the global batch, for the MFU; loss networks are not
    counted."""
    zeros = partial(torch.zeros, device="meta")
    encoder = common.count_flops(model.encoder, zeros(1, 3, model.encoder_size, model.encoder_size))
    decoder = common.count_flops(model.decoder, zeros(1, *model.latent_shape))
    return config.batch * (encoder + 3 * decoder)


@torch.no_grad()
def save_grid(run: common.Run, ema: rae.RAE, images: Tensor, dist_ctx: common.DistContext, step: int) -> None:
    """Originals and their reconstructions by the EMA weights, side by side."""
    with dist_ctx.autocast():
        decoded = ema.decode(ema.encode(images))
    if dist_ctx.is_main:
        pairs = torch.stack([images, decoded], dim=1).flatten(0, 1)
        common.save_image(run.out / "samples" / f"{step:07d}.png", common.image_grid(pairs, 8, scale=2))


# -----------------------------------------------------------------------------------------------------------


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    if config.gan_weight and config.gan_start < config.disc_start:
        flags = f"--gan-start {config.gan_start} is before --disc-start {config.disc_start}"
        raise ValueError(f"{flags}: the decoder cannot learn from an untrained discriminator")
    if config.gan_weight and config.gan_start >= config.steps:
        data.say(f"no adversarial loss: --gan-start {config.gan_start} is not before --steps {config.steps}")
    dist_ctx = common.init_distributed(config.dtype, config.shard)
    device = dist_ctx.device
    run = common.Run(config, dist_ctx)

    # ---- model and data ------------------------------------------------------------------------------------
    model = build_model(config, dist_ctx)
    source = data.open_source(config.data, model.image_size, config.seed, crop=config.crop)
    if source.latents:
        raise ValueError(f"--data {config.data} holds latents: a decoder needs images")
    perceptual, discriminator = build_loss_networks(config, model, dist_ctx)
    if run.source is None and config.statistics and not config.init:
        measure_statistics(config, model, run, dist_ctx)

    # ---- model -> EMA -> shard -> compile -> optimizer -----------------------------------------------------
    if dist_ctx.peak_flops():
        run.flops_per_step = flops_per_step(config, model)
    ema = copy.deepcopy(model, {id(model.encoder): model.encoder})  # the frozen encoder is shared
    # stays unsharded, to write OUT/model with
    export = copy.deepcopy(model).cpu() if dist_ctx.is_main else None
    for module in (model, ema):
        common.shard_model(module.decoder, module.decoder.decoder_layers, dist_ctx)
    blocks = [*model.decoder.decoder_layers, *model.encoder.blocks]
    blocks += discriminator.backbone.encoder.blocks if discriminator else []
    blocks += [perceptual.lpips.net] if perceptual and perceptual.lpips else []
    common.compile_blocks(blocks, config.compile, dist_ctx)
    if config.activation_checkpointing:
        common.checkpoint_blocks(model.decoder.decoder_layers)
    last_layer = LastLayer(model)
    optimizers = make_optimizers(config, model, discriminator)
    optimizer, disc_optimizer = optimizers[0], optimizers[-1]
    modules = {"model": model, "ema": ema} | ({"discriminator": discriminator} if discriminator else {})
    frozen = {"discriminator": discriminator.backbone if discriminator else None}
    state = run.load(modules, optimizers, export, frozen, source.identity)
    start = step = state["step"]
    val_source = data.open_source(config.data, model.image_size, config.seed + 1)
    grid_images = data.to_unit(next(data.Loader(val_source, 16, workers=0))["image"], device)
    loader = data.Loader(
        source, config.batch, config.workers, start, dist_ctx.rank, dist_ctx.world_size, state["positions"]
    )

    # ---- loop ----------------------------------------------------------------------------------------------
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not dist_ctx.is_main)
    for step in bar:
        lr_factor = common.cosine(step, config.steps, config.warmup, config.final_lr)
        optimizer.set_lr(lr_factor)
        is_adversarial = discriminator is not None and step >= config.gan_start
        totals = defaultdict(float)  # this rank's part of each loss
        encoded = []
        for micro_batch in data.micro_batches(run.next_batch(loader, step), config.grad_accum):
            # ---- latents: frozen encoder, no gradient ------------------------- (B, 3, H, W) -> (B, N, C)
            index = micro_batch["index"]
            images = data.to_unit(micro_batch["image"], device)
            with dist_ctx.autocast():
                latents = model.encode(images)
            encoded.append((images, latents, index))
            noisy = latents
            if config.tau:  # noise-augmented decoding (RAE)
                noise, uniform, _ = data.flow_draws(model.latent_shape, config.seed, index, device)
                noisy = model.add_noise(latents, noise, rae.to_device(config.tau * uniform, device))

            # ---- reconstruction losses
            # Each loss is backpropagated to the pixels only. There the gradients are added, and one backward
            # pass takes their sum through the decoder. Until then they are kept apart, because the adaptive
            # weight compares them.
            with dist_ctx.autocast():
                reconstruction = model.decode(noisy)
                pixels = reconstruction.detach().requires_grad_()
                loss, losses = reconstruction_losses(config, perceptual, pixels, images)
            share = len(images) / config.batch  # of the global batch: gradients are summed, not averaged
            [gradient] = torch.autograd.grad(loss * share, pixels)

            # ---- adversarial term
            if is_adversarial:
                draws = data.uniform_draws(7, config.seed, index, "generator")
                with dist_ctx.autocast():
                    gan_loss = -discriminator(augment(2 * pixels - 1, draws)).float().mean()
                [gan_gradient] = torch.autograd.grad(gan_loss * share, pixels)
                gan_weight = torch.full((), config.gan_weight, device=device)
                if config.adaptive:  # by the gradients of the last layer, taken from those of the pixels
                    reconstruction_grad = last_layer.gradient(gradient)
                    gan_grad = last_layer.gradient(gan_gradient)
                    gan_weight = gan_weight * adaptive_weight(reconstruction_grad, gan_grad)
                gradient, loss = gradient + gan_weight * gan_gradient, loss + gan_weight * gan_loss
                losses |= {"gan_loss": gan_loss, "gan_weight": gan_weight}

            reconstruction.backward(gradient * common.one_or_nan(loss))
            add_losses(totals, {"loss": loss, **losses}, share)
        grad_norm = optimizer.step()
        common.update_ema(ema, model, config.ema, step)

        # ---- discriminator: on reconstructions of the updated decoder, without noise
        if discriminator and step >= config.disc_start:
            losses = discriminator_step(config, discriminator, disc_optimizer, model, encoded, step, dist_ctx)
            totals |= losses

        # ---- log and save
        step += 1
        if run.is_due(step, config.log_every):
            sums = common.global_sum(*[float(value) for value in totals.values()])
            values = dict(zip(totals, sums, strict=True))
            run.log(step, bar.write, loader, **values, lr=config.lr * lr_factor, grad_norm=grad_norm)
        stop = run.stopping(step)
        if run.is_due(step, config.save_every) or stop:
            run.save(step, loader)
            if not stop:
                save_grid(run, ema, grid_images, dist_ctx, step)
            run.start_timer(step)
        if stop:
            break
    run.finish(step)


if __name__ == "__main__":
    common.main(main)
