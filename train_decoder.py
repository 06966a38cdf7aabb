"""Stage 1: trains the decoder of a representation autoencoder on the latents of a frozen encoder.

    python train_decoder.py                                        # the nano world, on a laptop
    python train_decoder.py --resume                               # goes on after an interruption
    torchrun --nproc-per-node 8 train_decoder.py --preset siglip2-so400m --data my_pictures
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train_decoder.py ...

First the mean and standard deviation of the latents are measured, then the decoder learns to invert the
encoder. Writes OUT/model (an RAE folder for the other scripts), OUT/checkpoint.pt, OUT/metrics.jsonl and
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
    resume: bool = flag(False, "go on from OUT/checkpoint.pt")
    seed: int = flag(0, "of weights, data order and pictures")
    data: str = flag("nano", "nano, nano:objects=3,text=1, or a folder of pictures")
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
    compile: bool = flag(False, "compile the decoder's layers")
    workers: int = flag(1, "data loading processes for each training process", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of reconstructions", at_least=1)


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
        total = total.to(where.device)
        dist.all_reduce(total)
    mean, square = (total / count).cpu()
    return mean.float(), (square - mean**2 + 1e-5).sqrt().float()


def main() -> None:
    config = common.parse(Config, __doc__, PRESETS)
    where = common.launch(config.dtype)
    run = common.Run(config.out, config, where, config.resume)

    # -------------------------------------------------------------------------------------------------------
    # model, average, optimizer
    torch.manual_seed(config.seed)
    size = rae.DECODERS[config.decoder] | {"patch_size": config.patch_size}
    with common.loading(config.encoder):
        model = rae.RAE(config.encoder, size, config.encoder_size).to(where.device)
    source = data.open_source(config.data, model.image_size, config.seed)

    def batches(start: int) -> Iterator[dict]:
        return data.load(source, data.Steps(config.batch, start, where.rank, where.world), config.workers)

    average = copy.deepcopy(model, {id(model.encoder): model.encoder})  # the frozen encoder is shared
    if config.compile:
        for layer in model.decoder.decoder_layers:
            layer.compile()
    trained = [p for p in model.decoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    start = 0
    if config.resume:
        start = run.load(**parts)
    else:
        statistics = latent_statistics(model, batches(0), config.statistics, where)
        for rae_model in (model, average):
            rae_model.latent_mean.copy_(statistics[0])
            rae_model.latent_std.copy_(statistics[1])

    # -------------------------------------------------------------------------------------------------------
    # pictures that are not trained on, to look at
    held_out = data.open_source(config.data, model.image_size, config.seed + 1)
    shown = data.to_unit(data.collate([held_out[i] for i in range(16)])["image"], where.device)

    @torch.no_grad()
    def checkpoint(step: int) -> None:
        run.save(step, average, **parts)
        if where.main:
            with where.autocast():
                pairs = torch.stack([shown, average.decode(average.encode(shown))], dim=1).flatten(0, 1)
            common.save_picture(
                run.out / "samples" / f"{step:07d}.png", common.picture_grid(pairs, 8, scale=2)
            )

    # -------------------------------------------------------------------------------------------------------
    # the loop
    done, stream = start, batches(start)
    run.begin(start)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, disable=not where.main)
    for step in bar:
        images = data.to_unit(next(stream)["image"], where.device)
        factor = common.cosine(step, config.steps, config.warmup, config.final_lr)
        optimizer.param_groups[0]["lr"] = config.lr * factor
        with where.autocast():
            reconstruction = model.decode(model.encode(images))
        loss = F.l1_loss(reconstruction, images) / where.world
        loss.backward()
        common.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        common.update_average(average, model, config.ema, step)

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            values = {"loss": common.global_sum(loss.item())[0], "lr": config.lr * factor, "grad_norm": norm}
            run.log(done, bar.write, **values)
        stop = run.stopping()
        if done % config.save_every == 0 or done == config.steps or stop:
            checkpoint(done)
            run.time_from(done)
        if stop:
            break
    run.finish(done)


if __name__ == "__main__":
    common.main(main)
