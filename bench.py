"""Images a second of every hot loop.

    python bench.py                        # the nano sizes, on this machine
    python bench.py encode sample          # some of them
    python bench.py decoder-step --decoder ViT-XL --checkpoint-blocks --batch 32
    python bench.py class-step class-sample class-sample-cfg class-sample-auto \\
        --dit DiT-DH-XL --guide DiT-DH-S
    python bench.py --compile --json bench.json

Each loop is warmed up, then timed for --seconds. Random weights of the preset's sizes are as fast as trained
ones.
"""

import io
import json
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import rae
from common import flag
from nano import shapes


@dataclass
class Config:
    what: list[str] = flag(
        (),
        "loader, jpeg, encode, decode, decoder-step, t2i-step, class-step, sample, class-sample, and with "
        "guidance class-sample-cfg, class-sample-auto; all if none is named",
        nargs="*",
        metavar="WHAT",
    )
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id")
    decoder: str = flag(
        "", "for decoder-step, another behind its encoder: 256 tokens, 256 px", choices=["", *rae.DECODERS]
    )
    checkpoint_blocks: bool = flag(
        False, "compute the layers of decoder-step and class-step twice, to save memory"
    )
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id")
    dit: str = flag("nano", "size of the class-conditional DiT", choices=rae.DITS)
    guide: str = flag("nano-guide", "size of its guide, for AutoGuidance", choices=rae.DITS)
    data: str = flag("nano", "source of the pictures and captions")
    batch: int = flag(64, "pictures at once", at_least=4)
    seconds: float = flag(5.0, "to time each loop", at_least=0.01)
    compile: bool = flag(False, "compile the blocks")
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    json: str = flag("", "file for the results")


def measure(run: Callable[[], object], images: int, seconds: float, where: common.Launch) -> dict:
    """Milliseconds of a call and images a second, after three calls to warm up; on CUDA the peak of its
    memory, in GB."""
    cuda = where.device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.reset_peak_memory_stats()

    for _ in range(3):
        run()
    wait()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run()
        wait()
        calls += 1
    elapsed = time.perf_counter() - started
    result = {"ms": 1000 * elapsed / calls, "images_per_second": images * calls / elapsed}
    return result | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if cuda else {})


def jpeg_loader(folder: str, batch: int, pictures: int = 256) -> data.Loader:
    """Reads tars of JPEG files of 256 px with captions on all cores, as fast as a training could."""
    for shard in range(8):
        with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
            for number in range(shard, pictures, 8):
                sample, file = shapes.draw("scenes", 0, number, 256), io.BytesIO()
                Image.fromarray(sample.image).save(file, "JPEG", quality=90)
                for name, content in (("jpg", file.getvalue()), ("txt", sample.caption.encode())):
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return data.Loader(data.open_source(folder, 256, 0), batch, workers=os.cpu_count())


def trained_autoencoder(config: Config, autoencoder: rae.RAE) -> rae.RAE:
    """The one of decoder-step: the same, or with its encoder and a decoder of another size."""
    if not config.decoder:
        return autoencoder
    size = rae.DECODERS[config.decoder] | {"patch_size": 16}
    side = 16 * autoencoder.encoder.config.patch_size
    return rae.RAE(**autoencoder._hub_mixin_config | {"decoder_config": size, "encoder_size": side})


def class_model(size: str, shape: tuple[int, int], where: common.Launch) -> rae.ClassToImage:
    return rae.ClassToImage(rae.class_dit(size, 1000), shape).to(where.device)


def network(run: Callable[[], object], images: int, models: dict[str, rae.ClassToImage]) -> dict:
    """Evaluations of each DiT in a call, and GFLOP a picture, counted by torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counts = dict.fromkeys(models, 0)

    def count(name: str, *_) -> None:
        counts[name] += 1

    hooks = [model.dit.register_forward_hook(partial(count, name)) for name, model in models.items()]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's is not counted
        run()
    for hook in hooks:
        hook.remove()
    return {"evaluations": counts, "gflop_per_image": counter.get_total_flops() / images / 1e9}


def loops(
    config: Config, where: common.Launch
) -> tuple[dict[str, tuple[Callable[[], object], int]], dict[str, rae.ClassToImage]]:
    """Every loop by name: what to call, and the images in one call; and the models of classes."""
    autoencoder = common.load_autoencoder(config.autoencoder, where)
    trained = trained_autoencoder(config, autoencoder).to(where.device)
    model = common.load_model(rae.TextToImage, config.model, config.autoencoder, where)
    shape = model.latent_shape if config.dit == "nano" else (256, 768)  # DINOv2-B's
    classes, guide = (class_model(size, shape, where) for size in (config.dit, config.guide))
    common.compile_blocks(
        {
            *model.blocks,
            *classes.blocks,
            *guide.blocks,
            *autoencoder.decoder.decoder_layers,
            *trained.decoder.decoder_layers,
        },
        config.compile,
        where,
    )
    if config.checkpoint_blocks:
        common.checkpoint_blocks([*trained.decoder.decoder_layers, *classes.blocks])
    source = data.open_source(config.data, autoencoder.image_size, 0, understanding=0.1)
    stream = data.Loader(source, config.batch)
    batch = next(stream)
    images = data.to_unit(batch["image"], where.device)
    pictures = F.interpolate(images, (trained.image_size, trained.image_size), mode="bilinear")
    latents = autoencoder.encode(images)
    chat = model.chat(batch["conversation"]).to(where.device)
    noise, u, v = data.flow_draws(model.latent_shape, 0, batch["pictures"], where.device)
    t, dropped = rae.sample_time(u, model.alpha).to(where.device), (v < 0.1).to(where.device)
    optimizers = {
        part: torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=0.0, fused=True)
        for part in (trained, model, classes)
    }

    def train(part: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        with where.autocast():
            value = loss()
        value.backward()
        optimizers[part].step()
        optimizers[part].zero_grad()

    def decoder_loss() -> torch.Tensor:
        return F.l1_loss(trained.decode(trained.encode(pictures)), pictures)

    def t2i_loss() -> torch.Tensor:
        text, flow = model(chat, autoencoder.encode(images), noise, t, dropped)
        return text / len(chat.targets) + 2 * flow.mean()

    labels = torch.arange(config.batch, device=where.device) % 1000
    x = torch.randn(config.batch, *shape, device=where.device)

    def class_loss() -> torch.Tensor:  # of latents from the disk
        return classes(labels, x, x.flip(0), t, dropped).mean()

    folder = tempfile.TemporaryDirectory()

    @cache
    def jpeg() -> data.Loader:
        return jpeg_loader(folder.name, config.batch)

    def infer(call: Callable, *args, **kwargs) -> torch.Tensor:
        with torch.no_grad(), where.autocast():
            return call(*args, **kwargs)

    drawn = {"inputs": list(range(4)), "noise": x[:4]}
    guided = partial(infer, classes.generate, guidance=1.42, **drawn)

    return {
        "loader": (lambda: next(stream), config.batch),
        "jpeg": (lambda: next(jpeg()), config.batch),
        "encode": (lambda: infer(autoencoder.encode, images), config.batch),
        "decode": (lambda: infer(autoencoder.decode, latents), config.batch),
        "decoder-step": (lambda: train(trained, decoder_loss), config.batch),
        "t2i-step": (lambda: train(model, t2i_loss), config.batch),
        "class-step": (lambda: train(classes, class_loss), config.batch),
        "sample": (lambda: infer(model.generate, batch["caption"][:4], guidance=3.0, noise=noise[:4]), 4),
        "class-sample": (partial(infer, classes.generate, **drawn), 4),
        "class-sample-cfg": (guided, 4),
        "class-sample-auto": (partial(guided, guide=guide), 4),
    }, {"own": classes, "guide": guide}


def main() -> None:
    config = common.parse(Config, __doc__)
    where = common.launch(config.dtype)
    every, models = loops(config, where)
    if unknown := set(config.what) - set(every):
        raise ValueError(f"unknown loop {', '.join(unknown)}: choose from {', '.join(every)}")
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {config.batch}")
    results = {}
    for name in config.what or every:
        run, images = every[name]
        results[name] = measure(run, images, config.seconds, where)
        if name.startswith("class-sample"):
            results[name] |= network(run, images, models)
        shown = f"{results[name]['ms']:9.1f} ms {results[name]['images_per_second']:9.1f} images/s"
        peak = f"{results[name]['peak_gb']:7.1f} GB" if "peak_gb" in results[name] else ""
        counts = results[name].get("evaluations", {})
        counted = ", ".join(f"{count} {whose}" for whose, count in counts.items() if count)
        counted = (
            f"{counted} evaluations, {results[name]['gflop_per_image']:.1f} GFLOP/image" if counts else ""
        )
        print(f"{name:17} {shown} {peak} {counted}", flush=True)
    if config.json:
        about = {
            "where": str(where),
            "batch": config.batch,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        with common.replacing(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    common.main(main)
