"""Stage 2: trains text-to-image (Scale-RAE) or class-to-image (RAE) in the latent space of an autoencoder.

    python train_t2i.py                                            # the nano world, on a laptop
    python train_t2i.py --resume                                   # continues after an interruption
    python train_t2i.py --preset nano-class                        # class labels instead of text
    torchrun --nproc-per-node 8 train_t2i.py --preset raev2-imagenet --data imagenet/train   # RAEv2
    python train_t2i.py --preset dit-dh-s-imagenet256 --data imagenet/train --grad-accum 16 \\
        --activation-checkpointing                                 # one small GPU
    torchrun --nproc-per-node 8 train_t2i.py --preset dit-dh-xl-imagenet256 --data imagenet/train
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-2.4b --shard full --grad-accum 8 \\
        --data web=0.55,synthetic=0.35,qa.jsonl=0.1 --out runs/t2i
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-finetune --shard full --grad-accum 8 \\
        --data blip3o-60k --init runs/t2i/model --out runs/finetuned
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_t2i.py ...

A language model reads the request, and its hidden states at the latent queries condition the DiT. Both are
trained jointly, loss = cross-entropy + 2 x velocity error (Scale-RAE section 3), unless --freeze is given, as
by the nano preset. Questions about images, mixed into the data, train the projector that reads latents. With
--condition class the DiT alone is trained, on the labels of folders, .cls files or a column `label`: loss =
velocity error (RAE section 5); with --condition caption, on captions that a frozen text encoder reads
(RAEv2). Latents are encoded on the fly, or read from a folder that encode.py wrote. Writes OUT/model (a
TextToImage or ClassToImage folder for the other scripts), OUT/checkpoints/, OUT/metrics.jsonl, OUT/losses.png
and OUT/samples/.
"""

import itertools
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import common
import data
import rae
from common import flag

# -----------------------------------------------------------------------------------------------------------
# presets

EPOCH = 1251  # steps of one epoch of ImageNet at batch 1024
IMAGENET = {  # RAE's code and paper, which reports epochs 80 and 800 of one run
    "condition": "class",
    "num_classes": 1000,
    "flip": True,
    "batch": 1024,
    "steps": 800 * EPOCH,
    "dit_lr": 2e-4,
    "warmup": 0,
    "decay_start": 40 * EPOCH,  # constant for 40 epochs, then linear to a tenth at epoch 800,
    "decay_end": 800 * EPOCH,  # also in a run that stops earlier, at --steps
    "final_lr": 0.1,
    "ema": 0.9995,
    "workers": 8,
    "save_every": 2 * EPOCH,
}
SCALE_RAE = {  # stage 1, from the authors' script. Variants: --dit 2.4B-DH for the DDT head,
    # --language-model Qwen/Qwen2.5-7B-Instruct, --autoencoder scale-rae-webssl-l, or a FLUX VAE with --reader
    "autoencoder": "scale-rae-siglip2-so400m",
    "language_model": "Qwen/Qwen2.5-1.5B-Instruct",
    "batch": 2048,
    "lr": 5.65e-5,  # table 8 rounds to 5e-5,
    "dit_lr": 5.65e-4,  # and to 5e-4
    "steps": 30_000,
    "warmup": 0.0134,
    "ema": 0.0,
    "workers": 8,
    "save_every": 1000,
}
RAEV2 = {  # RAEv2's configs. Muon and AdamW have the same learning rate; constant for a while, then linear
    "autoencoder": "raev2-k7",
    "dit": "raev2",
    "prediction": "x",
    "batch": 1024,
    "muon": 2e-4,
    "dit_lr": 2e-4,
    "warmup": 0,
    "final_lr": 0.1,
    "ema": 0.9995,
    "grad_accum": 2,  # room on 8 GPUs of 80 GB (estimate)
    "workers": 8,
    "save_every": 2 * EPOCH,
}
NANO = {  # A nano image is still recognisable at t = 0.9, where only the prompt should count: the papers'
    # formula (alpha 0.92) hardly trains such noise levels. Uniform t keeps low ones, which draw outlines.
    "alpha": 3.0,
    "t_distribution": "uniform",
    "muon": 0.015,
    "batch": 32,
    "draws": 4,
    "ema": 0.998,
}
PRESETS = {
    # if trained, the language model forgets which colour belongs to which shape (docs/speedrun.md)
    "nano": NANO | {"freeze": "language-model", "steps": 3200},
    "nano-class": NANO | {"condition": "class", "steps": 3000, "out": "runs/class"},
    # accumulation leaves room on 8 GPUs of 80 GB (docs/plan.md)
    "dit-dh-xl-imagenet256": IMAGENET | {"dit": "DiT-DH-XL", "autoencoder": "rae-dinov2-b", "grad_accum": 2},
    "dit-dh-xl-imagenet512": IMAGENET
    | {"dit": "DiT-DH-XL", "autoencoder": "rae-dinov2-b-512", "grad_accum": 4},
    "dit-dh-s-imagenet256": IMAGENET | {"dit": "DiT-DH-S", "autoencoder": "rae-dinov2-b"},
    "dit-xl-imagenet256": IMAGENET | {"dit": "DiT-XL", "autoencoder": "rae-dinov2-b"},
    "raev2-imagenet": RAEV2
    | {
        "condition": "class",
        "num_classes": 1000,
        "steps": 80 * EPOCH,
        "decay_start": 25 * EPOCH,
        "decay_end": 50 * EPOCH,
    },
    "raev2-t2i": RAEV2
    | {
        "condition": "caption",
        "language_model": "Qwen/Qwen3-0.6B",
        "grad_accum": 4,
        "steps": 200_000,
        "decay_start": 50_000,
        "decay_end": 150_000,
    },
    "scale-rae-0.5b": SCALE_RAE | {"dit": "0.5B"},
    "scale-rae-2.4b": SCALE_RAE | {"dit": "2.4B"},
    # 32 samples per GPU of the larger ones would hardly fit in 80 GB otherwise (estimate)
    "scale-rae-3.1b": SCALE_RAE | {"dit": "3.1B", "activation_checkpointing": True},
    "scale-rae-5.5b": SCALE_RAE | {"dit": "5.5B", "activation_checkpointing": True},
    "scale-rae-9.8b": SCALE_RAE | {"dit": "9.8B", "activation_checkpointing": True},
    "scale-rae-finetune": SCALE_RAE  # stage 2, table 9
    | {
        "autoencoder": "",  # that of --init
        "init": "runs/t2i/model",
        "out": "runs/finetuned",
        "batch": 1024,
        "steps": 225,  # 4 epochs of the 57,553 images of BLIP3o-60k
        "lr": 5.66e-5,
        "dit_lr": 5.66e-4,
        "warmup": 0.03,
        "max_seq_len": 1024,
        "save_every": 225,
    },
}
VAL_TIMES = (0.3, 0.6, 0.9)  # noise levels of the validation loss
VAL_SAMPLES = 64
GRID_STEPS, GRID_GUIDANCE = 25, 3.0  # of the sample grids


@dataclass
class Config(common.TrainConfig):
    out: str = flag("runs/t2i", "folder of this run")
    # model
    condition: str = flag(
        "text", "text is Scale-RAE's, caption RAEv2's", choices=["text", "caption", "class", "none"]
    )
    num_classes: int | None = flag(None, "number of classes, if --data does not tell", at_least=1)
    autoencoder: str = flag("", "RAE or VAE: folder, hub id or name (default: that of --init, or nano's)")
    language_model: str = flag(
        str(common.WEIGHTS / "language-model"),
        "transformers folder or hub id; with --condition caption the text encoder",
    )
    reader: str = flag("", "RAE that encodes images for understanding, if the autoencoder is a VAE")
    dit: str = flag("nano", "size of the DiT", choices=rae.DITS)
    init: str = flag("", "start from this model (folder, hub id or name), with its sizes")
    freeze: str = flag(
        "none",
        "frozen part: the language model with its embeddings, or all but DiT, connector and latent queries; "
        "--condition text only",
        choices=["none", "language-model", "all-but-dit"],
    )
    prediction: str = flag(
        "velocity", "output of the DiT: velocity or clean latents", choices=["velocity", "x"]
    )
    alpha: float | None = flag(
        None, "timestep shift (default: with --init its own, else the preset's or sqrt(N C / 4096))", above=0
    )
    # data
    data: str = flag("", "source of images, or several with weights, see data.py (default: the nano world)")
    val_data: str = flag("", "held-out source (default: --data with another seed, unseen for nano only)")
    eval_every: int = flag(500, "steps between validation losses", at_least=1)
    flip: bool = flag(False, "mirror half of the images")
    max_seq_len: int = flag(
        512,
        "maximum tokens of a sample with its images; longer ones are skipped; --condition text only",
        at_least=1,
    )
    # optimization
    steps: int = flag(10_000, "optimizer steps", at_least=1)
    lr: float = flag(
        5e-4, "peak learning rate of language model, queries and projector; --condition text only", above=0
    )
    dit_lr: float = flag(1e-3, "peak learning rate of the DiT and its connector", above=0)
    muon: float = flag(0.0, "peak learning rate of Muon for the DiT's matrices (0: AdamW)", at_least=0)
    warmup: float = flag(
        200, "steps of linear warm-up (below 1: a fraction of all); none with --decay-start", at_least=0
    )
    decay_start: int | None = flag(None, "first step of a linear decay (default: cosine decay)", at_least=0)
    decay_end: int | None = flag(None, "last step of the linear decay (default: --steps)", at_least=1)
    final_lr: float = flag(0.0, "final learning rate, as a fraction of the peak", at_least=0, at_most=1)
    t_distribution: str = flag(
        "logit-normal", "distribution of t, before the timestep shift", choices=["logit-normal", "uniform"]
    )
    base_weight: float = flag(1.0, "weight of the base head's loss, if the DiT has one", at_least=0)
    draws: int = flag(1, "draws of noise and t per image; the condition is computed once", at_least=1)
    dropout: float = flag(0.1, "condition dropout: probability of the null condition", at_least=0, at_most=1)
    ema: float = flag(0.999, "EMA decay of the weights that are saved (0: no EMA)", at_least=0, at_most=1)


# -----------------------------------------------------------------------------------------------------------
# model and optimizer


def build_model(
    config: Config,
    init: rae.LatentModel | None,
    latent_shape: tuple[int, int],
    num_classes: int | None,
    reader: rae.RAE | None,
    class_names: list[str] | None = None,
) -> rae.LatentModel:
    """A new model on the CPU, or that of --init, with the parts of --freeze frozen. Raises ValueError for an
    --init of other latents or classes."""
    read_shape = (reader.latent_shape if reader else latent_shape) if config.condition == "text" else None
    if init:
        for name, actual, expected in (
            ("latents", init.latent_shape, latent_shape),
            ("classes", getattr(init, "num_classes", None), num_classes),
            ("prediction", init.prediction, config.prediction),
            ("latents to read", getattr(init, "read_shape", None), read_shape),
        ):
            if actual != expected:
                hint = ": give its --reader" if name == "latents to read" else ""
                raise ValueError(f"--init {config.init} has {name} {actual}, not {expected}{hint}")
        model = init
        if config.alpha:
            model.alpha = config.alpha
        if class_names:
            model.class_names = class_names
        if config.reader:
            model.reader_path = config.reader
    elif config.condition == "text":
        if "time_tokens" in rae.DITS[config.dit] or config.prediction == "x":
            raise ValueError(
                f"--dit {config.dit} --prediction {config.prediction}: in-context DiTs and prediction x need "
                "--condition caption, class or none"
            )
        with common.loading(config.language_model):
            model = rae.TextToImage(
                config.language_model,
                rae.DITS[config.dit],
                latent_shape,
                config.autoencoder,
                config.alpha,
                config.reader or None,
                read_shape[1],
            )
    elif config.condition == "caption":
        if "time_tokens" not in rae.DITS[config.dit]:
            raise ValueError(f"--dit {config.dit} cannot read captions: give raev2 or nano-in-context")
        with common.loading(config.language_model):
            encoder = transformers.AutoConfig.from_pretrained(config.language_model, trust_remote_code=False)
        text = {"condition_width": encoder.hidden_size, "condition_tokens": rae.CAPTION_TOKENS}
        dit = rae.DITS[config.dit] | text
        model = rae.CaptionToImage(
            config.language_model, dit, latent_shape, config.autoencoder, config.alpha, config.prediction
        )
    else:
        dit = rae.class_dit(config.dit, num_classes)
        model = rae.ClassToImage(
            dit, latent_shape, config.autoencoder, config.alpha, config.prediction, class_names
        )
    for name, parameter in model.named_parameters():
        is_frozen = {
            "none": False,
            "language-model": name.startswith("language_model."),
            "all-but-dit": not name.startswith(("dit.", "diff_head_projector.", "latent_queries")),
        }
        if is_frozen[config.freeze]:
            parameter.requires_grad_(False)
    return model


def count_classes(config: Config, source: data.Mixture) -> int | None:
    """Of a class-conditional model: from the data, or --num-classes. Raises ValueError if they disagree."""
    if config.condition != "class":
        if config.num_classes:
            raise ValueError(f"--num-classes {config.num_classes} needs --condition class")
        return None
    if not (source.classes or config.num_classes):
        raise ValueError(f"{config.data} does not tell how many classes it has: give --num-classes")
    if source.classes and config.num_classes not in (None, source.classes):
        given, cure = config.num_classes, f"give --num-classes {source.classes}"
        raise ValueError(f"{config.data} has {source.classes} classes, not {given}: {cure}")
    return source.classes or config.num_classes


def make_optimizers(config: Config, model: nn.Module) -> common.Optimizers:
    """AdamW in two groups, the DiT and the rest. With --muon, all matrices of the DiT go to Muon but those of
    the latents' embedders, which are convolutions in the authors' code (RAEv2)."""
    dit, rest, matrices = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.muon and parameter.ndim == 2 and re.match(r"dit\.(?!x_embedder|s_embedder)", name):
            matrices.append(parameter)
        elif name.startswith(("dit.", "diff_head_projector.")):
            dit.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": dit, "lr": config.dit_lr, "betas": (0.9, 0.95)}]  # the betas of Scale-RAE's code
    if rest:
        groups.append({"params": rest, "lr": config.lr, "betas": (0.9, 0.999)})
    optimizers = [torch.optim.AdamW(groups, weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(common.Muon(common.muon_groups(model, matrices), config.muon))
    return common.Optimizers(*optimizers)


def learning_rate(config: Config, step: int) -> float:
    """Factor of the peak learning rates."""
    if config.decay_start is not None:
        return common.linear(step, config.decay_start, config.decay_end or config.steps, config.final_lr)
    warmup = math.ceil(config.warmup * config.steps) if config.warmup < 1 else int(config.warmup)
    return common.cosine(step, config.steps, warmup, config.final_lr)


def flops_per_step(
    config: Config, model: rae.LatentModel, autoencoder: rae.RAE | rae.VAE, seq_len: int
) -> float:
    """FLOPs of one step over the global batch, for the MFU: 3 x forward of what is trained, 2 x of a frozen
    language model and 1 x of the encoder, without recomputation and the text encoder of captions."""
    zeros = partial(torch.zeros, device="meta")
    tokens, channels = model.latent_shape
    condition = None
    if config.condition == "text":
        condition = zeros(1, tokens, model.diff_head_projector.out_features)
    elif config.condition == "class":
        condition = zeros(1, dtype=torch.long)
    elif config.condition == "caption":
        embedder = model.dit.y_embedder
        mask = torch.ones(1, embedder.count, dtype=torch.bool, device="meta")
        condition = rae.Caption(zeros(1, embedder.count, len(embedder.norm.weight)), mask)
    flops = 3 * config.draws * common.count_flops(model.dit, zeros(1, tokens, channels), zeros(1), condition)
    if config.condition == "text":
        language_model = model.language_model.model
        passes = 3 if config.freeze == "none" else 2  # gradients pass through a frozen one, to the queries
        if model.causal_mask:
            inputs = {"inputs_embeds": zeros(1, seq_len, language_model.config.hidden_size)}
            inputs |= {"attention_mask": model.causal_mask, "use_cache": False}
            flops += passes * common.count_flops(language_model, **inputs)
        else:  # masks cannot be made on the meta device: 2 FLOPs per weight and token, without attention
            weights = sum(p.numel() for layer in language_model.layers for p in layer.parameters())
            flops += passes * 2 * weights * seq_len
    if isinstance(autoencoder, rae.RAE):
        size = autoencoder.encoder_size
        flops += common.count_flops(autoencoder.encoder, zeros(1, 3, size, size))
    return flops * config.batch


# -----------------------------------------------------------------------------------------------------------
# batches


class Inputs(NamedTuple):
    """What the model is conditioned on in one micro-batch of B samples with P images."""

    condition: rae.Chat | rae.Caption | Tensor | None  # conversations, captions, or labels (B,)
    answers: Tensor  # (A,) which of the P images are to be generated
    contexts: Tensor  # (P - A,) which are to be read
    index: list[int]  # sample numbers of the images to generate
    tokens: int  # supervised tokens


def prepare(config: Config, model: rae.LatentModel, batch: dict) -> Inputs:
    numbers = torch.tensor(batch["image_index"], dtype=torch.long)
    if config.condition == "text":
        condition = model.chat(batch["conversation"])
        is_answer, tokens = condition.is_answer, condition.supervised_tokens
    else:
        if config.condition == "class" and None in batch["label"]:
            raise ValueError(f"{config.data} has images without labels: see the top of data.py")
        if config.condition == "caption":
            captions = [data.requested_caption(turns) for turns in batch["conversation"]]
            if None in captions:
                raise ValueError(
                    f"{config.data} has questions: --condition caption learns from captions only"
                )
            condition = model.condition(captions, truncate=True)
        else:
            condition = model.condition(batch["label"])
        is_answer, tokens = torch.ones_like(numbers, dtype=torch.bool), 0
    # indices are computed on the CPU and copied without a host-device sync
    answers, contexts = is_answer.nonzero().flatten(), (~is_answer).nonzero().flatten()
    to_device = partial(rae.to_device, device=model.device)
    return Inputs(condition, to_device(answers), to_device(contexts), numbers[answers].tolist(), tokens)


@torch.no_grad()
def encode(
    config: Config, model: rae.LatentModel, autoencoder, reader, batch: dict, dist_ctx: common.DistContext
) -> tuple[Tensor, Tensor]:
    """Latents (P, N, C) of a micro-batch's images, and what the language model reads of them, (P,
    *read_shape)."""
    if "latents" in batch:
        latents = rae.to_device(batch["latents"], dist_ctx.device)
        return latents, latents
    if not batch["image_index"]:  # text alone
        shapes = model.latent_shape, getattr(model, "read_shape", model.latent_shape)
        return tuple(torch.zeros(0, *shape, device=dist_ctx.device) for shape in shapes)
    images = data.to_unit(batch["image"], dist_ctx.device)
    with dist_ctx.autocast():
        if isinstance(autoencoder, rae.VAE):  # a sample of the posterior, as Scale-RAE trains on
            seed = data.hash_seed(config.seed, "posterior")
            noise, *_ = data.flow_draws(model.latent_shape, seed, batch["image_index"], dist_ctx.device)
            latents = autoencoder.encode(images, noise)
        else:
            latents = autoencoder.encode(images)
        return latents, reader.encode(images) if reader else latents


def open_data(
    config: Config, init: rae.LatentModel | None, autoencoder: rae.RAE | rae.VAE, reader: rae.RAE | None
) -> tuple[data.Mixture, data.Mixture]:
    """The training and the validation source. Raises ValueError for latents of another autoencoder, and for a
    reader that does not fit."""
    shape, is_text = autoencoder.latent_shape, config.condition == "text"
    options = {"flip": config.flip, "text_only": is_text, "captions": config.condition in ("text", "caption")}
    if is_text:
        if init:
            tokenizer = init.tokenizer
        else:
            with common.loading(config.language_model):
                name = config.language_model
                tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options["encode_chat"] = partial(rae.encode_chat, tokenizer=tokenizer, image_tokens=shape[0])
        options["max_seq_len"] = config.max_seq_len
    source = data.open_source(config.data, autoencoder.image_size, config.seed, **options)
    val_name = config.val_data or config.data
    options["flip"] = False
    val_source = data.open_source(val_name, autoencoder.image_size, config.seed + 1, **options)
    classes = count_classes(config, source)
    if classes and val_source.classes not in (None, classes):
        raise ValueError(f"--val-data {val_name} has {val_source.classes} classes, not {classes}")
    names = (source.class_names, val_source.class_names)
    if classes and None not in names and names[0] != names[1]:
        raise ValueError(f"--val-data {val_name}: its class folders have other names than those of --data")
    for part in (source, val_source):
        part.need_labels(classes)
    infos = [(config.data, info) for info in source.latents]
    infos += [(val_name, info) for info in val_source.latents]
    for name, info in infos:
        if tuple(info["latent_shape"]) != shape or info.get("fingerprint") != common.fingerprint(autoencoder):
            made_by = f"{tuple(info['latent_shape'])} of {info['autoencoder']}"
            now = f"--autoencoder {config.autoencoder} with {shape}, or its weights have changed"
            cure = "give the one that made them, or run encode.py again"
            raise ValueError(f"{name} has latents {made_by}. That is not {now}: {cure}")
    if reader and not (is_text and reader.latent_shape[0] == shape[0]):
        tokens = f"{reader.latent_shape[0]} tokens, the latents {shape[0]}"
        raise ValueError(f"--reader {config.reader} has {tokens}: use as many, and --condition text")
    if reader and source.latents:
        raise ValueError(f"--reader {config.reader} reads images, but {config.data} has latents only")
    return source, val_source


def validation_batch(config: Config, source: data.Mixture) -> dict:
    """The first of 16 batches that asks for an image, since data may begin with questions."""
    for batch in itertools.islice(data.Loader(source, VAL_SAMPLES, workers=0), 16):
        asks = map(data.requested_caption, batch["conversation"])
        if config.condition not in ("text", "caption") or any(caption is not None for caption in asks):
            return batch
    name = config.val_data or config.data
    count = 16 * VAL_SAMPLES
    raise ValueError(f"{name} asks for no image in its first {count} samples: give another --val-data")


def is_prompt(model: rae.TextToImage, text: str) -> bool:
    try:
        model.check_prompts([text])
    except ValueError:
        return False
    return True


class Validation:
    """Fixed held-out images with fixed noise, for the validation loss; and the inputs of the sample grid."""

    def __init__(self, config: Config, model: rae.LatentModel, autoencoder, reader, batch: dict, dist_ctx):
        self.dist_ctx, self.autoencoder, self.parts = dist_ctx, autoencoder, []
        draw = partial(data.flow_draws, model.latent_shape, config.seed + 1, device=dist_ctx.device)
        # ---- inputs, latents to generate, latents to read and noise of every micro-batch
        for micro_batch in data.micro_batches(batch, config.grad_accum):
            inputs = prepare(config, model, micro_batch)
            if not inputs.index:  # asks for no image
                continue
            if config.condition == "text":  # the text loss is not needed: without labels, there are no logits
                inputs.condition.labels.fill_(rae.IGNORED)
            latents, readable = encode(config, model, autoencoder, reader, micro_batch, dist_ctx)
            noise, *_ = draw(inputs.index)
            answers, contexts = latents[inputs.answers].float(), readable[inputs.contexts]
            self.parts.append((inputs.condition, answers, contexts, noise))
        self.count = sum(len(noise) for *_, noise in self.parts)
        self.guidance = 1.0 if config.condition == "none" else GRID_GUIDANCE
        if config.condition in ("text", "caption"):
            captions = map(data.requested_caption, batch["conversation"])
            captions = [caption for caption in captions if caption is not None]
            if config.condition == "text":  # the language model learns from captions too long for a prompt
                captions = [caption for caption in captions if is_prompt(model, caption)]
            self.grid_inputs = captions[:16]
            if not self.grid_inputs:
                data.say("no sample grids: no validation caption can be a prompt")
        else:
            classes = getattr(model, "num_classes", None) or 16
            self.grid_inputs = [i * classes // 16 for i in range(16)]
        self.grid_noise, *_ = draw(range(len(self.grid_inputs)))

    @torch.no_grad()
    def losses(self, ema: rae.LatentModel) -> dict[str, float]:
        """Velocity error at each noise level, and their mean."""
        levels, errors = len(VAL_TIMES), 0.0
        for condition, latents, contexts, noise in self.parts:
            weight = len(latents) / self.count
            latents, noise = latents.repeat(levels, 1, 1), noise.repeat(levels, 1, 1)
            t = torch.tensor(VAL_TIMES, device=noise.device).repeat_interleave(len(noise) // levels)
            x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
            with self.dist_ctx.autocast():
                velocity, *_ = ema(condition, x_t, t, torch.zeros_like(t).bool(), contexts)
            errors += weight * (velocity - (noise - latents)).square().view(levels, -1).mean(dim=1)
        errors = errors.tolist()
        losses = {f"val_loss_{level}": error for level, error in zip(VAL_TIMES, errors, strict=True)}
        return {"val_loss": sum(errors) / levels} | losses

    @torch.no_grad()
    def save_grid(self, ema: rae.LatentModel, path: Path) -> None:
        """Samples of the EMA weights; under FSDP every rank has to take part."""
        if not self.grid_inputs:
            return
        inputs = self.grid_inputs
        if isinstance(ema, rae.CaptionToImage):
            inputs = ema.condition(inputs, truncate=True)  # as in the loop, where long captions are cut
        with self.dist_ctx.autocast():
            latents = ema.generate(inputs, GRID_STEPS, self.guidance, noise=self.grid_noise)
            images = self.autoencoder.decode(latents)
        if self.dist_ctx.is_main:
            prompts = "\n".join(map(str, self.grid_inputs))
            common.save_image(path, common.image_grid(images, 8, scale=2), prompts=prompts)


# -----------------------------------------------------------------------------------------------------------


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    is_text = config.condition == "text"
    # captions: a source without questions; a model that can draw already: one without simple images first
    nano = {"text": "nano" if config.init else "nano:lessons", "caption": "nano:objects"}
    config.data = config.data or nano.get(config.condition, "nano:classes")
    if config.data == "nano:lessons":  # begins with single objects
        config.val_data = config.val_data or "nano"
    if config.decay_end is not None and (config.decay_start is None or config.decay_end < config.decay_start):
        raise ValueError(f"--decay-end {config.decay_end} needs a --decay-start before it")
    for name, other in (("lr", ": give --dit-lr"), ("freeze", ""), ("max_seq_len", "")):
        if not is_text and name in config.given and not config.resumed:
            raise ValueError(f"--{name.replace('_', '-')} is for --condition text{other}")
    dist_ctx = common.init_distributed(config.dtype, config.shard)
    device = dist_ctx.device
    run = common.Run(config, dist_ctx)

    # ---- autoencoder and data ------------------------------------------------------------------------------
    init = None
    if config.init:
        for name in ("dit", "language_model"):
            if name in config.given and not config.resumed:
                flag_name = name.replace("_", "-")
                raise ValueError(
                    f"--{flag_name} is for a new model: that of --init {config.init} has its own"
                )
        classes = {"text": rae.TextToImage, "caption": rae.CaptionToImage}
        cls = classes.get(config.condition, rae.ClassToImage)

        def load_init() -> rae.LatentModel:
            with common.loading(config.init):
                return cls.from_pretrained(config.init, config.autoencoder).eval()  # no dropout, as if new

        init = common.build(load_init, dist_ctx)
        config.autoencoder = init.autoencoder_path
        # a preset's alpha is for new models
        for name in ("alpha", "prediction"):
            if name not in config.given and not config.resumed:
                setattr(config, name, getattr(init, name))
    config.autoencoder = config.autoencoder or str(common.WEIGHTS / "rae")
    autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
    reader = common.load_autoencoder(config.reader, dist_ctx) if config.reader else None
    source, val_source = open_data(config, init, autoencoder, reader)

    # ---- model -> EMA -> shard -> compile -> optimizer -----------------------------------------------------
    torch.manual_seed(config.seed)
    num_classes = count_classes(config, source)
    class_names = source.class_names if num_classes else None
    build = partial(build_model, config, init, autoencoder.latent_shape, num_classes, reader, class_names)
    export = common.build(build, dist_ctx)
    model = common.twin(export, dist_ctx)
    ema = common.twin(export, dist_ctx) if config.ema else model
    export = export if dist_ctx.is_main else None  # stays unsharded, to write OUT/model with
    val_batch = validation_batch(config, val_source)
    if dist_ctx.peak_flops():
        seq_len = model.chat(val_batch["conversation"]).ids.shape[1] if is_text else 0
        run.flops_per_step = flops_per_step(config, model, autoencoder, seq_len)
    modules = {"model": model, "ema": ema} if config.ema else {"ema": model}
    for module in modules.values():
        common.shard_model(module, module.blocks, dist_ctx, "generate", whole=export)
    encoder_blocks = autoencoder.encoder.blocks if isinstance(autoencoder, rae.RAE) else []
    common.compile_blocks([*model.blocks, *encoder_blocks], config.compile, dist_ctx)
    if config.activation_checkpointing:
        common.checkpoint_blocks(model.blocks)
    optimizers = make_optimizers(config, model)
    frozen = {"autoencoder": autoencoder, "reader": reader}
    if config.condition == "caption":
        frozen["language model"] = rae.open_text_encoder(model.text_encoder_path, device)[1]
    state = run.load(modules, [optimizers], export, frozen, source.identity)
    start = step = state["step"]
    validation = Validation(config, model, autoencoder, reader, val_batch, dist_ctx)
    loader = data.Loader(
        source, config.batch, config.workers, start, dist_ctx.rank, dist_ctx.world_size, state["positions"]
    )
    if class_names and dist_ctx.is_main:
        shown = [f"{label} {name}" for label, name in enumerate(class_names)]
        shown = shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-3:]]
        print(f"{len(class_names)} classes: {', '.join(shown)}")
    flow_weight = 2.0 if is_text else 1.0  # Scale-RAE section 3; RAE has no other loss
    t_mean = 0.0 if config.t_distribution == "logit-normal" else None

    # ---- loop ----------------------------------------------------------------------------------------------
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not dist_ctx.is_main)
    for step in bar:
        lr_factor = learning_rate(config, step)
        optimizers.set_lr(lr_factor)
        micro_batches = data.micro_batches(run.next_batch(loader, step), config.grad_accum)
        prepared = [prepare(config, model, micro_batch) for micro_batch in micro_batches]
        # Loss sums are divided by global token and image counts, and FSDP sums gradients over ranks (see
        # common.shard_model). So any number of ranks and micro-batches, however unequal, gives the gradient
        # of one big batch.
        local_tokens = sum(inputs.tokens for inputs in prepared)
        local_images = sum(len(inputs.index) for inputs in prepared)
        total_tokens, total_images = common.global_sum(local_tokens, local_images)
        losses = torch.zeros(2, device=device)
        for micro_batch, inputs in zip(micro_batches, prepared, strict=True):
            # ---- latents: frozen encoder, no gradient ------------------------- (P, 3, H, W) -> (P, N, C)
            latents, readable = encode(config, model, autoencoder, reader, micro_batch, dist_ctx)
            latents = latents[inputs.answers].repeat(config.draws, 1, 1)  # (k A, N, C), k draws per image

            # ---- flow matching: noise and t depend on (seed, sample index) alone, not on rank or batch
            noise, u_time, u_drop = data.flow_draws(
                model.latent_shape, config.seed, inputs.index, device, config.draws
            )
            t = rae.to_device(rae.sample_time(u_time, model.alpha, t_mean), device)  # (k A,), shifted
            dropped = rae.to_device(u_drop < config.dropout, device)
            x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
            # the clean latents that the DiT predicts become a velocity in the same way, with a clamped t
            target = rae.to_velocity(x_t, latents, t) if model.prediction == "x" else noise - latents

            # ---- forward: language model, caption or labels -> condition -> DiT
            with dist_ctx.autocast():
                velocity, base_velocity, cross_entropy = model(
                    inputs.condition, x_t, t, dropped, readable[inputs.contexts]
                )

            # ---- loss
            squared_error = (velocity - target).square().mean(dim=(1, 2))
            if base_velocity is not None:  # RAEv2's base head learns the same
                base_error = (base_velocity - target).square().mean(dim=(1, 2))
                squared_error = squared_error + config.base_weight * base_error
            flow_loss = squared_error.sum() / max(1, total_images * config.draws)
            text_loss = cross_entropy / max(1, total_tokens)
            loss = text_loss + flow_weight * flow_loss
            loss.backward(common.one_or_nan(loss))
            losses += torch.stack([text_loss, flow_loss]).detach()
        grad_norm = optimizers.step()
        if config.ema:
            common.update_ema(ema, model, config.ema, step)

        # ---- log, validate, save
        step += 1
        if run.is_due(step, config.log_every):
            text_loss, flow_loss = common.global_sum(*losses.tolist())
            values = {"text_loss": text_loss, "flow_loss": flow_loss} if is_text else {}
            values |= {"lr": config.dit_lr * lr_factor, "grad_norm": grad_norm}
            run.log(step, bar.write, loader, loss=text_loss + flow_weight * flow_loss, **values)
        if run.is_due(step, config.eval_every):
            run.log_row(bar.write, {"step": step} | validation.losses(ema))
            run.start_timer(step)
        stop = run.stopping(step)
        if run.is_due(step, config.save_every) or stop:
            run.save(step, loader)
            if not stop:
                validation.save_grid(ema, run.out / "samples" / f"{step:07d}.png")
            run.start_timer(step)
        if stop:
            break
    run.finish(step)


if __name__ == "__main__":
    common.main(main)
