"""Stage 2: trains text-to-image in the latent space of a representation autoencoder (Scale-RAE).

    python train_t2i.py                                            # the nano world, on a laptop
    python train_t2i.py --resume                                   # goes on after an interruption
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-0.5b --data my_pictures \\
        --autoencoder runs/decoder/model --shard full --out runs/t2i
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_t2i.py ...

A language model reads the request, its hidden states at the latent queries condition the DiT, and all three
learn together: loss = cross-entropy + 2 x velocity error (Scale-RAE section 3). A share of the samples are
questions about pictures, which train the way back in. Writes OUT/model (a TextToImage folder for the other
scripts), OUT/checkpoints/, OUT/metrics.jsonl and OUT/samples/.
"""

import copy
from dataclasses import dataclass

import torch
from tqdm import tqdm

import common
import data
import rae
from common import flag

PRESETS = {
    # A nano picture has many latents and little in them, so that it shines through noise even at t = 0.95;
    # only noisier times need the prompt, and with the papers' factor, 1.06 here, they are one sample in 500.
    "nano": {"alpha": 6.0},
    "scale-rae-0.5b": {  # Scale-RAE's stage 1
        "language_model": "Qwen/Qwen2.5-1.5B-Instruct",
        "dit": "0.5B",
        "batch": 2048,
        "lr": 5.65e-5,
        "dit_lr": 5.65e-4,
        "steps": 30_000,
        "warmup": 402,
        "understanding": 0.0,
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
    data: str = flag("nano", "a source of captioned pictures, or several with weights, see data.py")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id")
    language_model: str = flag(str(common.WEIGHTS / "language-model"), "transformers folder or hub id")
    dit: str = flag("nano", "size of the DiT", choices=rae.DITS)
    init: str = flag("", "TextToImage folder or hub id with weights to start from (default: a new DiT)")
    steps: int = flag(10_000, "optimizer steps in all", at_least=1)
    batch: int = flag(64, "samples a step, over all processes", at_least=1)
    lr: float = flag(5e-4, "peak learning rate of the language model, queries and projector")
    dit_lr: float = flag(1e-3, "peak learning rate of the DiT and its connector")
    warmup: int = flag(200, "steps of linear warm-up, before the cosine", at_least=0)
    final_lr: float = flag(0.0, "fraction of the peak at the last step")
    understanding: float = flag(0.1, "share of the samples that ask about a picture (nano)")
    alpha: float | None = flag(None, "factor of the timestep shift (default: sqrt(N C / 4096); nano: 6)")
    dropout: float = flag(0.1, "share of the pictures trained with the null condition")
    ema: float = flag(0.999, "decay of the averaged weights, which are what is saved")
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
    accumulate: int = flag(
        1, "pieces that each process cuts its part of a step into, to save memory", at_least=1
    )
    compile: bool | None = flag(
        None, "compile the blocks of the DiT and of the language model (default: on CUDA)"
    )
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of samples", at_least=1)
    keep: int = flag(2, "checkpoints to keep, the newest", at_least=1)
    tensorboard: bool = flag(False, "log to OUT/tensorboard too")


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    where = common.launch(config.dtype, config.shard)
    run = common.Run(config, where)

    # -------------------------------------------------------------------------------------------------------
    # model -> average -> shard -> compile -> optimizer
    torch.manual_seed(config.seed)
    autoencoder = common.load_autoencoder(config.autoencoder, where)
    shape = autoencoder.latent_shape
    with common.loading(config.language_model):
        model = rae.TextToImage(
            config.language_model, rae.DITS[config.dit], shape, config.autoencoder, config.alpha
        )
    if config.init and run.source is None:
        with common.loading(config.init):
            model.load_state_dict(rae.TextToImage.from_pretrained(config.init).state_dict())
    export = copy.deepcopy(model).cpu() if where.main else None  # on its own, to save the average with
    model.to(where.device)
    average = copy.deepcopy(model)
    for each in (model, average):
        blocks = [*each.dit.blocks, *each.language_model.model.layers]
        common.distribute(each, blocks, where, "generate")
        common.compile_blocks(blocks if each is model else (), config.compile, where)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_dit = ("dit.", "diff_head_projector.")
    groups = [  # learning rate and beta2 by module, as in Scale-RAE
        {"params": [p for name, p in named.items() if not name.startswith(of_dit)], "betas": (0.9, 0.999)},
        {"params": [p for name, p in named.items() if name.startswith(of_dit)], "betas": (0.9, 0.95)},
    ]
    peaks = (config.lr, config.dit_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    stepper = common.Stepper(optimizer)
    state = run.load({"model": model, "average": average}, [stepper], export)
    start = state["step"]

    # -------------------------------------------------------------------------------------------------------
    # data: the training stream, and captions of another seed, to look at
    size = autoencoder.image_size
    source = data.open_source(config.data, size, config.seed, config.understanding)
    loader = data.Loader(
        source, config.batch, config.workers, start, where.rank, where.world, state["positions"]
    )
    captions = next(data.Loader(data.open_source(config.data, size, config.seed + 1), 16, workers=0))[
        "caption"
    ]
    if not all(captions):
        raise ValueError(f"{config.data} has pictures without captions: write them into its metadata.jsonl")
    fixed_noise, *_ = data.flow_draws(shape, config.seed + 1, list(range(16)), where.device)

    @torch.no_grad()
    def checkpoint(step: int, with_samples: bool) -> None:
        run.save(step, loader)
        if not with_samples:
            return
        with where.autocast():
            latents = average.generate(captions, config.sample_steps, config.guidance, noise=fixed_noise)
            pictures = autoencoder.decode(latents)
        if where.main:
            grid = common.picture_grid(pictures, 8, scale=2)
            common.save_picture(run.out / "samples" / f"{step:07d}.png", grid, prompts="\n".join(captions))

    # -------------------------------------------------------------------------------------------------------
    # the loop
    done = start
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not where.main)
    for step in bar:
        factor = common.cosine(step, config.steps, config.warmup, config.final_lr)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        pieces = data.pieces(next(loader), config.accumulate)
        chats = [model.chat(piece["conversation"]).to(where.device) for piece in pieces]
        tokens, pictures = common.global_sum(
            sum(len(chat.targets) for chat in chats), sum(len(chat.answers) for chat in chats)
        )
        losses = torch.zeros(2, device=where.device)  # this process's share of the two
        for piece, chat in zip(pieces, chats, strict=True):
            noise, for_time, for_dropout = data.flow_draws(shape, config.seed, piece["index"], where.device)
            t = rae.sample_time(for_time, model.alpha).to(where.device, non_blocking=True)
            dropped = (for_dropout < config.dropout).to(where.device, non_blocking=True)
            with where.autocast():
                latents = autoencoder.encode(data.to_unit(piece["image"], where.device))
                cross_entropy, velocity_errors = model(chat, latents, noise, t, dropped)
            text_loss, flow_loss = cross_entropy / tokens, velocity_errors.sum() / max(pictures, 1)
            common.backward(text_loss + 2 * flow_loss)
            losses += torch.stack([text_loss, flow_loss]).detach()
        norm = stepper.step()
        common.update_average(average, model, config.ema, step)

        done = step + 1
        if done % 10 == 0:
            stepper.check()
        if done % config.log_every == 0 or done == config.steps:
            text, flow = common.global_sum(*losses.tolist())
            values = {"loss": text + 2 * flow, "text_loss": text, "flow_loss": flow}
            values |= {"lr": config.dit_lr * factor, "grad_norm": norm, "skipped_steps": stepper.check()}
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
