"""Stage 1: trains the decoder of a representation autoencoder on the latents of a frozen encoder.

    python train_decoder.py                                        # the nano world, on a laptop
    python train_decoder.py --resume                               # goes on after an interruption
    torchrun --nproc-per-node 8 train_decoder.py --preset siglip2-so400m --data my_pictures
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_decoder.py ...

First the mean and standard deviation of the latents are measured, then the decoder learns to invert the
encoder. Writes OUT/model (an RAE folder for the other scripts), OUT/checkpoints/, OUT/metrics.jsonl and
OUT/samples/.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import common
import data
import rae
from common import flag

PRESETS = {
    "nano": {},
    "siglip2-so400m": {  # Scale-RAE table 7, the L1 term
        "encoder": rae.ENCODERS["siglip2-so400m"],
        "decoder": "ViT-XL",
        "patch_size": 14,
        "batch": 512,
        "steps": 200_000,
        "lr": 4e-4,
        "warmup": 5000,
        "final_lr": 0.1,
        "ema": 0.9978,
        "statistics": 50_000,
        "workers": 8,
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
    seed: int = flag(0, "of weights, data order and pictures")
    data: str = flag("nano", "a source of pictures, or several with weights, see data.py")
    encoder: str = flag(
        str(common.WEIGHTS / "encoder"), "transformers folder or hub id of the frozen encoder"
    )
    encoder_size: int | None = flag(None, "side of its input in pixels, if not the one of its config")
    decoder: str = flag("nano", "size of the decoder", choices=rae.DECODERS)
    patch_size: int = flag(8, "side in pixels of the square that each token becomes")
    steps: int = flag(3000, "optimizer steps in all", at_least=1)
    batch: int = flag(64, "pictures a step, over all processes", at_least=1)
    lr: float = flag(1e-3, "peak learning rate")
    warmup: int = flag(100, "steps of linear warm-up, before the cosine", at_least=0)
    final_lr: float = flag(0.02, "fraction of the peak at the last step")
    ema: float = flag(0.998, "decay of the averaged weights, which are what is saved")
    statistics: int = flag(8192, "pictures for the mean and standard deviation of the latents", at_least=1)
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
    compile: bool | None = flag(None, "compile the decoder's layers (default: on CUDA)")
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of reconstructions", at_least=1)
    keep: int = flag(2, "checkpoints to keep, the newest", at_least=1)
    tensorboard: bool = flag(False, "log to OUT/tensorboard too")


@torch.no_grad()
def latent_statistics(
    model: rae.RAE, batches: Iterator[dict], pictures: int, where: common.Launch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation sqrt(var + 1e-5) of the raw latents per token and channel, (N, C) each,
    over that many pictures (RAE section 4)."""
    total = torch.zeros(2, *model.latent_shape, dtype=torch.float64, device="cpu")
    count = 0
    while count < pictures:
        images = data.to_unit(next(batches)["image"], where.device)
        latents = model.encode(images).cpu().double()
        total += torch.stack([latents.sum(dim=0), latents.square().sum(dim=0)])
        count += len(images) * where.world
    if where.world > 1:
        dist.all_reduce(total)
    mean, square = (total / count).cpu()
    return mean.float(), (square - mean**2 + 1e-5).sqrt().float()


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    where = common.launch(config.dtype, config.shard)
    run = common.Run(config, where)

    # -------------------------------------------------------------------------------------------------------
    # model -> average -> shard -> compile -> optimizer
    torch.manual_seed(config.seed)
    size = rae.DECODERS[config.decoder] | {"patch_size": config.patch_size}
    with common.loading(config.encoder):
        model = rae.RAE(config.encoder, size, config.encoder_size).to(where.device)
    source = data.open_source(config.data, model.image_size, config.seed)

    def batches(start: int, positions: dict) -> data.Loader:
        return data.Loader(source, config.batch, config.workers, start, where.rank, where.world, positions)

    if run.source is None:
        statistics = latent_statistics(model, batches(0, {}), config.statistics, where)
        model.latent_mean.copy_(statistics[0])
        model.latent_std.copy_(statistics[1])
    average = copy.deepcopy(model, {id(model.encoder): model.encoder})  # the frozen encoder is shared
    export = copy.deepcopy(model).cpu() if where.main else None  # on its own, to save the average with
    for each in (model, average):
        layers = each.decoder.decoder_layers
        common.distribute(each.decoder, layers, where)
        common.compile_blocks(layers if each is model else (), config.compile, where)
    trained = [p for p in model.decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    stepper = common.Stepper(optimizer)
    state = run.load(model, average, stepper)

    # -------------------------------------------------------------------------------------------------------
    # pictures of another seed, to look at
    others = data.open_source(config.data, model.image_size, config.seed + 1)
    shown = data.to_unit(next(data.Loader(others, 16, workers=0))["image"], where.device)

    @torch.no_grad()
    def checkpoint(step: int, with_samples: bool) -> None:
        run.save(step, model, average, stepper, loader, export)
        if not with_samples:
            return
        with where.autocast():
            pairs = torch.stack([shown, average.decode(average.encode(shown))], dim=1).flatten(0, 1)
        if where.main:
            grid = common.picture_grid(pairs, 8, scale=2)
            common.save_picture(run.out / "samples" / f"{step:07d}.png", grid)

    # -------------------------------------------------------------------------------------------------------
    # the loop
    done = start = state["step"]
    loader = batches(start, state["positions"])
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not where.main)
    for step in bar:
        factor = common.cosine(step, config.steps, config.warmup, config.final_lr)
        optimizer.param_groups[0]["lr"] = config.lr * factor
        loss = torch.zeros((), device=where.device)  # this process's share of it
        for piece in data.pieces(next(loader), config.accumulate):
            images = data.to_unit(piece["image"], where.device)
            with where.autocast():
                reconstruction = model.decode(model.encode(images))
            share = F.l1_loss(reconstruction, images) * len(images) / config.batch
            common.backward(share)
            loss += share.detach()
        norm = stepper.step()
        common.update_average(average, model, config.ema, step)

        done = step + 1
        if done % 10 == 0:
            stepper.check()
        if done % config.log_every == 0 or done == config.steps:
            [total] = common.global_sum(loss.item())
            values = {"loss": total, "lr": config.lr * factor, "grad_norm": norm}
            run.log(done, bar.write, loader, **values, skipped_steps=stepper.check())
        stop = run.stopping()
        if done % config.save_every == 0 or done == config.steps or stop:
            checkpoint(done, with_samples=not stop)
            run.time_from(done)
        if stop:
            break
    run.finish(done)


if __name__ == "__main__":
    common.main(main)
