"""Stage 2: trains text-to-image (Scale-RAE), or class-to-image (RAE), in the latent space of an autoencoder.

    python train_t2i.py                                            # the nano world, on a laptop
    python train_t2i.py --resume                                   # goes on after an interruption
    python train_t2i.py --preset nano-class                        # class labels instead of text
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-2.4b --shard full --out runs/t2i \\
        --data web=0.6,synthetic=0.3,questions.jsonl=0.1
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-finetune --data blip3o-60k.jsonl \\
        --init runs/t2i/model --shard full --out runs/finetuned
    torchrun --nproc-per-node 8 train_t2i.py --preset dit-dh-xl-imagenet256 --data imagenet/train
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_t2i.py ...
    python train_t2i.py --preset dit-dh-s-imagenet256 --data imagenet/train --accumulate 16 \\
        --checkpoint-blocks                                        # one small GPU

A language model reads the request, its hidden states at the latent queries condition the DiT, and all three
learn together: loss = cross-entropy + 2 x velocity error (Scale-RAE section 3). A share of the samples are
questions about images, which train the way back in. With --condition class the DiT alone learns, from the
labels of folders, .cls files or a column `label`: loss = velocity error. Latents are encoded on the fly, or
read from a folder that encode.py wrote. Writes OUT/model (a TextToImage or ClassToImage
folder for the other scripts), OUT/checkpoints/, OUT/metrics.jsonl and OUT/samples/.
"""

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

import common
import data
import rae
from common import flag

EPOCH = 1251  # steps of a pass over ImageNet at batch 1024
IMAGENET = {  # RAE's code; its paper reports epoch 80 and 800 of one run
    "condition": "class",
    "classes": 1000,
    "flip": True,
    "batch": 1024,
    "steps": 800 * EPOCH,
    "dit_lr": 2e-4,
    "schedule": "linear",
    "decay_start": 40 * EPOCH,
    "decay_end": 800 * EPOCH,
    "final_lr": 0.1,
    "warmup": 0,
    "ema": 0.9995,
    "guidance": 1.0,
    "workers": 8,
    "save_every": 2 * EPOCH,
}
SCALE_RAE = {  # the authors' script; their table 8 rounds to 5e-5 and 5e-4. Other choices of theirs:
    # --language-model Qwen/Qwen2.5-7B-Instruct; --autoencoder scale-rae-webssl-l, or a FLUX VAE with --reader
    "autoencoder": "scale-rae-siglip2-so400m",
    "language_model": "Qwen/Qwen2.5-1.5B-Instruct",
    "batch": 2048,
    "lr": 5.65e-5,
    "dit_lr": 5.65e-4,
    "steps": 30_000,
    "warmup": 0.0134,
    "ema": 0.0,
    "guidance": 1.0,
    "workers": 8,
    "checkpoint_blocks": True,
    "save_every": 1000,
}
NANO = {"alpha": 3.0, "time": "uniform", "muon": 0.02, "batch": 32, "draws": 2}
PRESETS = {
    # A nano image has little in it and shines through noise even at t = 0.9, where it needs the prompt: the
    # papers' factor hardly trains such times. Uniform draws keep the low ones, for the outlines.
    # Of pure noise nothing is known but the prompt: unless the first steps see only that, the language model
    # has forgotten the prompt by the time the DiT could use it.
    "nano": NANO | {"noise_first": 400},
    "nano-class": NANO | {"condition": "class", "steps": 3000, "out": "runs/class"},
    "dit-dh-xl-imagenet256": IMAGENET | {"dit": "DiT-DH-XL", "autoencoder": "rae-dinov2-b"},
    "dit-dh-xl-imagenet512": IMAGENET | {"dit": "DiT-DH-XL", "autoencoder": "rae-dinov2-b-512"},
    "dit-dh-s-imagenet256": IMAGENET | {"dit": "DiT-DH-S", "autoencoder": "rae-dinov2-b"},
    "dit-xl-imagenet256": IMAGENET | {"dit": "DiT-XL", "autoencoder": "rae-dinov2-b"},
    **{  # stage 1: 0.5b, 2.4b, 3.1b, 5.5b, 9.8b, and each with the wide head, 0.5b-dh, ...
        f"scale-rae-{name.lower()}": SCALE_RAE | {"dit": name}
        for name in (n + head for n in rae.SCALE_RAE_DITS for head in ("", "-DH"))
    },
    "scale-rae-finetune": SCALE_RAE  # stage 2, table 9
    | {
        "autoencoder": "",
        "init": "runs/t2i/model",
        "batch": 1024,
        "steps": None,
        "epochs": 4.0,
        "lr": 5.66e-5,
        "dit_lr": 5.66e-4,
        "warmup": 0.03,
        "longest": 1024,
    },
}


@dataclass
class Config:
    out: str = flag("runs/t2i", "folder of this training")
    resume: str = flag(
        "",
        "go on from the newest checkpoint of OUT, if there is one (auto), or from a folder",
        nargs="?",
        const="auto",
    )
    seed: int = flag(0, "of weights, data order, noise and times")
    condition: str = flag("text", "what images are asked for with", choices=["text", "class", "none"])
    classes: int | None = flag(None, "how many, if --data does not say it", at_least=1)
    data: str = flag(
        "", "a source of images, or several with weights, see data.py (default: nano, nano:classes)"
    )
    flip: bool = flag(False, "mirror half of the images")
    autoencoder: str = flag("", "RAE folder or hub id (default: that of --init, or the shipped nano one)")
    language_model: str = flag(str(common.WEIGHTS / "language-model"), "transformers folder or hub id")
    reader: str = flag("", "another, of whose latents questions are answered; beside a VAE for one")
    dit: str = flag("nano", "size of the DiT", choices=rae.DITS)
    init: str = flag(
        "",
        "start from this model, a folder, hub id or name, whose --dit and --alpha stay, instead of a new one",
    )
    freeze: str = flag(
        "none",
        "what stays as it is: the language model; or all but the DiT, its connector and the queries",
        choices=["none", "language-model", "all-but-dit"],
    )
    steps: int | None = flag(None, "optimizer steps in all (default 10,000)", at_least=1)
    epochs: float = flag(0.0, "or passes over the data", at_least=0)
    batch: int = flag(64, "samples a step, over all processes", at_least=1)
    lr: float = flag(5e-4, "peak learning rate of the language model, queries and projector")
    dit_lr: float = flag(1e-3, "peak learning rate of the DiT and its connector")
    muon: float = flag(
        0.0, "peak learning rate of Muon, for the matrices of the DiT's blocks (0: AdamW)", at_least=0
    )
    warmup: float = flag(
        200, "steps of linear warm-up, before the cosine; below 1, their share of all", at_least=0
    )
    schedule: str = flag("cosine", "from the peak down to FINAL_LR", choices=["cosine", "linear"])
    decay_start: int = flag(0, "step at which the linear schedule leaves the peak", at_least=0)
    decay_end: int | None = flag(None, "and is down (default: the last)", at_least=1)
    final_lr: float = flag(0.0, "fraction of the peak at the end")
    time: str = flag(
        "logit-normal", "distribution of t, before its shift", choices=["logit-normal", "uniform"]
    )
    draws: int = flag(1, "noises and times an image: what it is conditioned on is computed once", at_least=1)
    noise_first: int = flag(0, "first steps of a new model whose images are all noise, t = 1", at_least=0)
    understanding: float = flag(0.1, "share of the samples that ask about an image (nano)")
    max_seq_len: int = flag(
        512, "tokens of a conversation, images included; longer ones are left out, but for nano's"
    )
    alpha: float | None = flag(None, "factor of the timestep shift (default: sqrt(N C / 4096))")
    dropout: float = flag(0.1, "share of the images trained with the null condition")
    ema: float = flag(0.999, "decay of the averaged weights, which are what is saved; 0: none")
    sample_steps: int = flag(25, "sampling steps of the sample grids", at_least=1)
    guidance: float = flag(3.0, "their scale of classifier-free guidance")
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
        1, "pieces that each process cuts its part of a step into, to save memory", at_least=1
    )
    checkpoint_blocks: bool = flag(False, "compute the blocks twice, to save more of it")
    compile: bool | None = flag(
        None, "compile the blocks of the DiT and of the language model (default: on CUDA)"
    )
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of samples", at_least=1)
    keep: int = flag(2, "checkpoints to keep, the newest", at_least=1)
    tensorboard: bool = flag(False, "log to OUT/tensorboard too")


def build(
    config: Config,
    shape: tuple[int, int],
    classes: int | None = None,
    read_shape: tuple[int, int] | None = None,
    model: rae.TextToImage | rae.ClassToImage | None = None,
) -> rae.TextToImage | rae.ClassToImage:
    """A new model on the CPU, or that of --init, if it is of these latents and classes; else ValueError."""
    text = config.condition == "text"
    reads = {"reader": config.reader, "reader_channels": read_shape[1]} if read_shape else {}
    if model:
        for name, found, own in (
            ("latents", model.latent_shape, shape),
            ("classes", getattr(model, "num_classes", None), classes),
            ("latents to read", getattr(model, "read_shape", None), (read_shape or shape) if text else None),
        ):
            if found != own:
                more = ": give its --reader" if name == "latents to read" else ""
                raise ValueError(f"--init {config.init} has {name} {found}, not {own}{more}")
        if config.reader:
            model.reader_path = config.reader
    elif text:
        size = rae.DITS[config.dit]
        with common.loading(config.language_model):
            model = rae.TextToImage(
                config.language_model, size, shape, config.autoencoder, config.alpha, **reads
            )
    else:
        model = rae.ClassToImage(rae.class_dit(config.dit, classes), shape, config.autoencoder, config.alpha)
    for name, parameter in model.named_parameters():
        frozen = {
            "none": False,
            "language-model": name.startswith("language_model."),
            "all-but-dit": not name.startswith(("dit.", "diff_head_projector.", "latent_queries")),
        }
        if frozen[config.freeze]:
            parameter.requires_grad_(False)
    return model


def count_classes(config: Config, source: data.Mixture) -> int | None:
    """Of a class-conditional model: what the data says, or --classes. Raises ValueError if they disagree."""
    if config.condition != "class":
        if config.classes:
            raise ValueError(f"--classes {config.classes} needs --condition class")
        return None
    if not (source.classes or config.classes):
        raise ValueError(f"{config.data} does not say how many classes it has: give --classes")
    if source.classes and config.classes not in (None, source.classes):
        raise ValueError(f"{config.data} has {source.classes} classes, not --classes {config.classes}")
    return source.classes or config.classes


def check_latents(config: Config, source: data.Mixture, shape: tuple[int, int]) -> None:
    """Raises ValueError for a folder of latents that another autoencoder made."""
    if source.latents and config.reader:
        raise ValueError(f"--reader {config.reader} reads images, and {config.data} has latents only")
    for about in source.latents:
        if tuple(about["latent_shape"]) != shape or about["autoencoder"] != config.autoencoder:
            raise ValueError(
                f"{config.data} has latents {tuple(about['latent_shape'])} of {about['autoencoder']}, "
                f"--autoencoder {config.autoencoder} has {shape}: give the one that made them"
            )


def grid_prompts(config: Config, source: data.Mixture) -> list[str]:
    """What 16 samples of the data ask for. Raises ValueError if there is no such thing."""
    batches = itertools.islice(data.Loader(source, 16, workers=0), 64)
    found = (data.requested_caption(turns) for batch in batches for turns in batch["conversation"])
    texts = list(itertools.islice((text for text in found if text is not None), 16))
    if not texts:
        raise ValueError(f"{config.data} asks for no image in its first 1,024 samples")
    if not all(texts):
        raise ValueError(f"{config.data} has images without captions: write them into its metadata.jsonl")
    return texts


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    text = config.condition == "text"
    config.data = config.data or ("nano" if text else "nano:classes")
    dist_ctx = common.init_distributed(config.dtype, config.shard)
    run = common.Run(config, dist_ctx)
    start_from = None
    if config.init:
        kind = rae.TextToImage if text else rae.ClassToImage
        with common.loading(config.init):
            start_from = kind.from_pretrained(config.init, config.autoencoder).train()
        config.autoencoder = start_from.autoencoder_path
    config.autoencoder = config.autoencoder or str(common.WEIGHTS / "rae")

    # -------------------------------------------------------------------------------------------------------
    # data: the training stream, and what to look at: captions of another seed, or some of the classes
    autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
    shape, size = autoencoder.latent_shape, autoencoder.image_size
    options = {"understanding": config.understanding * text, "flip": config.flip, "text_only": text}
    torch.manual_seed(config.seed)
    reader = common.load_autoencoder(config.reader, dist_ctx) if config.reader else None
    if reader and not (text and reader.latent_shape[0] == shape[0]):
        raise ValueError(
            f"--reader {config.reader} has {reader.latent_shape[0]} tokens: it needs as many as the latents, "
            f"{shape[0]}, and --condition text"
        )
    if text:
        model = build(config, shape, read_shape=reader and reader.latent_shape, model=start_from)
        length = partial(rae.chat_length, tokenizer=model.tokenizer, image=shape[0])
        options |= {"length": length, "longest": config.max_seq_len}
    source = data.open_source(config.data, size, config.seed, **options)
    classes = count_classes(config, source)
    check_latents(config, source, shape)
    if not text:
        model = build(config, shape, classes, model=start_from)
    samples = [i * (classes or 16) // 16 for i in range(16)]
    if text:
        samples = grid_prompts(config, data.open_source(config.data, size, config.seed + 1, **options))
    fixed_noise, *_ = data.flow_draws(shape, config.seed + 1, list(range(len(samples))), dist_ctx.device)

    if config.epochs and config.steps:
        raise ValueError(f"--steps {config.steps} and --epochs {config.epochs:g}: give one, and 0 epochs")
    steps = config.steps or 10_000
    if config.epochs:
        steps = math.ceil(config.epochs * len(source) / config.batch)
    warmup = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)

    # -------------------------------------------------------------------------------------------------------
    # average -> shard -> compile -> optimizer
    export = copy.deepcopy(model) if dist_ctx.is_main else None  # on its own, to save the average with
    ema = copy.deepcopy(model) if config.ema else model
    modules = {"model": model, "ema": ema} if config.ema else {"ema": model}
    for each in modules.values():
        common.shard_model(each, each.blocks, dist_ctx, "generate")
    encoder = getattr(autoencoder, "encoder", None)  # a VAE has none
    frozen = list(encoder.blocks) if encoder else []
    common.compile_blocks([*model.blocks, *frozen], config.compile, dist_ctx)
    if config.checkpoint_blocks:
        common.checkpoint_blocks(model.blocks)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_dit = ("dit.", "diff_head_projector.")
    matrices = {n: p for n, p in named.items() if config.muon and n.startswith("dit.blocks.") and p.ndim == 2}
    others = {name: p for name, p in named.items() if name not in matrices}
    groups = [  # learning rate and beta2 by module, as in Scale-RAE
        {"params": [], "lr": config.dit_lr, "betas": (0.9, 0.95)},
        {"params": [], "lr": config.lr, "betas": (0.9, 0.999)},
    ]
    for name, parameter in others.items():
        groups[not name.startswith(of_dit)]["params"].append(parameter)
    optimizers = [torch.optim.AdamW(groups[: 1 + text], weight_decay=0.0, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices.values(), config.muon, weight_decay=0.0))
    stepper = common.Stepper(*optimizers)
    state = run.load(modules, [stepper], export)
    start = state["step"]
    loader = data.Loader(
        source, config.batch, config.workers, start, dist_ctx.rank, dist_ctx.world_size, state["positions"]
    )

    def prepare(micro_batch: dict) -> tuple:
        """What the model is conditioned on, a Chat or labels, and its numbers of learned tokens and of
        images to generate."""
        if text:
            chat = model.chat(micro_batch["conversation"]).to(dist_ctx.device)
            return chat, len(chat.targets), len(chat.answers)
        if config.condition == "class" and None in micro_batch["label"]:
            raise ValueError(f"{config.data} has images without labels: see the top of data.py")
        return model.condition(micro_batch["label"]), 0, len(micro_batch["label"])

    @torch.no_grad()
    def checkpoint(step: int, with_samples: bool) -> None:
        run.save(step, loader)
        if not with_samples:
            return
        guidance = 1.0 if config.condition == "none" else config.guidance
        with dist_ctx.autocast():
            latents = ema.generate(samples, config.sample_steps, guidance, noise=fixed_noise)
            images = autoencoder.decode(latents)
        if dist_ctx.is_main:
            grid = common.image_grid(images, 8, scale=2)
            prompts = "\n".join(map(str, samples))
            common.save_image(run.out / "samples" / f"{step:07d}.png", grid, prompts=prompts)

    # -------------------------------------------------------------------------------------------------------
    # the loop
    done = start
    run.begin(start)
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=not dist_ctx.is_main)
    for step in bar:
        if config.schedule == "linear":
            factor = common.linear(step, config.decay_start, config.decay_end or steps, config.final_lr)
        else:
            factor = common.cosine(step, steps, warmup, config.final_lr)
        stepper.scale(factor)
        micro_batches = data.micro_batches(next(loader), config.grad_accum)
        inputs, of_tokens, of_images = zip(*map(prepare, micro_batches), strict=True)
        tokens, drawn = common.global_sum(sum(of_tokens), config.draws * sum(of_images))
        losses = torch.zeros(2, device=dist_ctx.device)  # this process's share of the two
        for micro_batch, condition in zip(micro_batches, inputs, strict=True):
            noise, for_time, for_dropout = data.flow_draws(
                shape, config.seed, micro_batch["image_index"], dist_ctx.device, config.draws
            )
            mean = 0.0 if config.time == "logit-normal" else None
            t = rae.to_device(rae.sample_time(for_time, model.alpha, mean), dist_ctx.device)
            if step < config.noise_first and not config.init:
                t = torch.ones_like(t)
            dropped = rae.to_device(for_dropout < config.dropout, dist_ctx.device)
            with dist_ctx.autocast():
                read = ()
                if "latents" in micro_batch:
                    latents = rae.to_device(micro_batch["latents"], dist_ctx.device)
                elif micro_batch["image_index"]:
                    pixels, sampled = data.to_unit(micro_batch["image"], dist_ctx.device), ()
                    if not encoder:  # of a VAE's posterior, as Scale-RAE has it
                        of_posterior = data.hash_seed(config.seed, "posterior")
                        sampled = data.flow_draws(
                            shape, of_posterior, micro_batch["image_index"], dist_ctx.device
                        )[:1]
                    latents = autoencoder.encode(pixels, *sampled)
                    read = (reader.encode(pixels),) if reader else ()
                else:
                    latents = noise  # none, of the right shape: text alone
                    read = (noise.new_zeros(0, *model.read_shape),) if reader else ()
                out = model(condition, latents, noise, t, dropped, *read)
            cross_entropy, velocity_errors = out if text else (torch.zeros((), device=dist_ctx.device), out)
            text_loss, flow_loss = cross_entropy / max(tokens, 1), velocity_errors.sum() / max(drawn, 1)
            common.backward(text_loss + 2 * flow_loss if text else flow_loss)
            losses += torch.stack([text_loss, flow_loss]).detach()
        norm = stepper.step()
        if config.ema:
            common.update_ema(ema, model, config.ema, step)

        done = step + 1
        if done % 10 == 0:
            stepper.check()
        if done % config.log_every == 0 or done == steps:
            text_loss, flow_loss = common.global_sum(*losses.tolist())
            values = {"loss": flow_loss}
            if text:
                values = {"loss": text_loss + 2 * flow_loss, "text_loss": text_loss, "flow_loss": flow_loss}
            values |= {"lr": config.dit_lr * factor, "grad_norm": norm, "skipped_steps": stepper.check()}
            run.log(done, bar.write, loader, **values)
        stop = run.stopping()
        if done % config.save_every == 0 or done == steps or stop:
            checkpoint(done, with_samples=not stop)
            run.time_from(done)
        if stop:
            break
    run.finish(done)


if __name__ == "__main__":
    common.main(main)
