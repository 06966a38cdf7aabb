"""Stage 2: trains text-to-image in the latent space of a representation autoencoder (Scale-RAE).

    python train_t2i.py                                            # the nano world, on a laptop
    python train_t2i.py --resume                                   # goes on after an interruption
    torchrun --nproc-per-node 8 train_t2i.py --preset scale-rae-0.5b --data my_pictures \\
        --autoencoder runs/decoder/model --out runs/t2i
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_t2i.py ...

A language model reads the request, its hidden states at the latent queries condition the DiT, and all three
learn together: loss = cross-entropy + 2 x velocity error (Scale-RAE section 3). A share of the samples are
questions about pictures, which train the way back in. Writes OUT/model (a TextToImage folder for the other
scripts), OUT/checkpoint.pt, OUT/metrics.jsonl and OUT/samples/.
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
    "nano": {},
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
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    seed: int = flag(0, "of weights, data order, noise and times")
    data: str = flag("nano", "nano, nano:objects=3,text=1, or a folder of pictures with metadata.jsonl")
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id")
    language_model: str = flag(str(common.WEIGHTS / "language-model"), "transformers folder or hub id")
    dit: str = flag("nano", "size of the DiT", choices=rae.DITS)
    steps: int = flag(10_000, "optimizer steps in all", at_least=1)
    batch: int = flag(64, "samples a step, over all processes", at_least=1)
    lr: float = flag(5e-4, "peak learning rate of the language model, queries and projector")
    dit_lr: float = flag(1e-3, "peak learning rate of the DiT and its connector")
    warmup: int = flag(200, "steps of linear warm-up, before the cosine", at_least=0)
    final_lr: float = flag(0.0, "fraction of the peak at the last step")
    understanding: float = flag(0.1, "share of the samples that ask about a picture (nano)")
    dropout: float = flag(0.1, "share of the pictures trained with the null condition")
    ema: float = flag(0.999, "decay of the averaged weights, which are what is saved")
    guidance: float = flag(3.0, "scale of classifier-free guidance in the sample grids")
    dtype: str = flag(
        "auto",
        "of the compute; weights are fp32 (on CUDA, fp32 multiplies as TF32)",
        choices=["auto", "bf16", "fp32"],
    )
    compile: bool = flag(False, "compile the blocks of the DiT and of the language model")
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of samples", at_least=1)


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    where = common.launch(config.dtype)
    run = common.Run(config.out, config, where, config.resume)

    # -------------------------------------------------------------------------------------------------------
    # models, average, optimizer
    torch.manual_seed(config.seed)
    autoencoder = common.load_autoencoder(config.autoencoder, where)
    shape = autoencoder.latent_shape
    with common.loading(config.language_model):
        model = rae.TextToImage(config.language_model, rae.DITS[config.dit], shape, config.autoencoder)
    model.to(where.device)
    average = copy.deepcopy(model)
    if config.compile:
        for block in (*model.dit.blocks, *model.language_model.model.layers):
            block.compile()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained, of_dit = list(named.values()), ("dit.", "diff_head_projector.")
    groups = [  # learning rate and beta2 by module, as in Scale-RAE
        {"params": [p for name, p in named.items() if not name.startswith(of_dit)], "betas": (0.9, 0.999)},
        {"params": [p for name, p in named.items() if name.startswith(of_dit)], "betas": (0.9, 0.95)},
    ]
    peaks = (config.lr, config.dit_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    start = run.load(**parts) if config.resume else 0

    # -------------------------------------------------------------------------------------------------------
    # data: the training stream, and captions that are not in it, to look at
    size = autoencoder.image_size
    source = data.open_source(config.data, size, config.seed, config.understanding)
    stream = data.load(source, data.Steps(config.batch, start, where.rank, where.world), config.workers)
    captions = [data.open_source(config.data, size, config.seed + 1)[i]["caption"] for i in range(16)]
    if not all(captions):
        raise ValueError(f"{config.data} has pictures without captions: write them into its metadata.jsonl")
    fixed_noise, *_ = data.flow_draws(shape, config.seed + 1, list(range(16)), where.device)

    @torch.no_grad()
    def checkpoint(step: int) -> None:
        run.save(step, average, **parts)
        if where.main:
            with where.autocast():
                latents = average.generate(captions, guidance=config.guidance, noise=fixed_noise)
                pictures = autoencoder.decode(latents)
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
        batch = next(stream)
        chat = model.chat(batch["conversation"]).to(where.device)
        noise, for_time, for_dropout = data.flow_draws(shape, config.seed, batch["index"], where.device)
        t = rae.sample_time(for_time, model.alpha).to(where.device)
        dropped = (for_dropout < config.dropout).to(where.device)
        with where.autocast():
            latents = autoencoder.encode(data.to_unit(batch["image"], where.device))
            cross_entropy, velocity_errors = model(chat, latents, noise, t, dropped)
        tokens, pictures = common.global_sum(len(chat.targets), len(chat.answers))
        text_loss, flow_loss = cross_entropy / tokens, velocity_errors.sum() / max(pictures, 1)
        (text_loss + 2 * flow_loss).backward()
        common.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        common.update_average(average, model, config.ema, step)

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            text, flow = common.global_sum(text_loss.item(), flow_loss.item())
            losses = {"loss": text + 2 * flow, "text_loss": text, "flow_loss": flow}
            run.log(done, bar.write, **losses, lr=config.dit_lr * factor, grad_norm=norm)
        stop = run.stopping()
        if done % config.save_every == 0 or done == config.steps or stop:
            checkpoint(done)
            run.time_from(done)
        if stop:
            break
    run.finish(done)


if __name__ == "__main__":
    common.main(main)
