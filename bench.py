"""Images a second of every hot loop.

    python bench.py                        # the nano sizes, on this machine
    python bench.py encode sample          # some of them
    python bench.py decoder-step --decoder ViT-XL --checkpoint-blocks --batch 32
    python bench.py class-step class-sample class-sample-cfg class-sample-auto \\
        --dit DiT-DH-XL --guide DiT-DH-S
    python bench.py --compile --json bench.json
    python bench.py --plan --gpu H200 --gpus 64 --mfu 0.45    # the papers' runs on paper

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
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
    plan: bool = flag(False, "compute, and measure nothing: time, memory and traffic of the papers' runs")
    gpu: str = flag("H200", "--plan: its kind", choices=["A100", "H100", "H200", "B200"])
    gpus: int = flag(8, "--plan: how many", at_least=1)
    mfu: float = flag(0.4, "--plan: share of the card's bf16 peak that a training reaches")


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


# -----------------------------------------------------------------------------------------------------------
# on paper: nothing of the following is measured

GPUS = {  # dense bf16 TFLOP/s, memory in GB, GB/s to the others of a machine of 8, and to other machines
    "A100": (312, 80, 300, 25),
    "H100": (989, 80, 450, 50),
    "H200": (989, 141, 450, 50),
    "B200": (2250, 180, 900, 50),
}
QWEN = {
    "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_667,
             "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 151_667,
           "tie_word_embeddings": False},
}  # fmt: skip
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "image_size": 224, "patch_size": 14, "vision_use_head": False}  # fmt: skip
TOKENS = 256 + 64  # of a conversation: a picture and the text around it
LEARNED = 24  # of them with a loss: their logits over the vocabulary are computed, and kept


class Part(NamedTuple):
    """A module on the meta device, where it takes no memory, and one sample's pass through it."""

    module: torch.nn.Module
    call: Callable[[torch.nn.Module], torch.Tensor]
    passes: int  # 3: it learns; 2: it is frozen, but gradients go through it; 1: it only runs; 0: or not even


class Paper(NamedTuple):
    """A training of the papers."""

    parts: list[Part]
    batch: int
    steps: int
    ema: bool = False


def siglip() -> Part:
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    return Part(model, lambda m: m(torch.zeros(1, 3, 224, 224)).last_hidden_state, 1)


def qwen(size: str, frozen: bool) -> Part:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN[size]))
    given = torch.zeros(1, TOKENS, QWEN[size]["hidden_size"])

    def call(m: torch.nn.Module) -> torch.Tensor:
        return m.lm_head(m.model(inputs_embeds=given).last_hidden_state[:, :LEARNED])

    return Part(model, call, 2 if frozen else 3)


def text_training(size: str, language_model: str, steps: int = 30_000, frozen: bool = False) -> Paper:
    width = rae.DITS[size]["width"]
    dit = rae.DiT((256, 1152), condition_width=width, **rae.DITS[size])
    given = torch.zeros(1, 256, 1152), torch.zeros(1), torch.zeros(1, 256, width)
    parts = [Part(dit, lambda m: m(*given), 3), qwen(language_model, frozen), siglip(), decoder_xl(1152, 0)]
    return Paper(parts, 2048, steps)


def class_training(epochs: int) -> Paper:
    dit = rae.DiT((256, 768), **rae.class_dit("DiT-DH-XL", 1000))
    encoder = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig())
    given = torch.zeros(1, 256, 768), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    picture = torch.zeros(1, 3, 224, 224)
    run = Part(encoder, lambda m: m(picture).last_hidden_state, 1)
    return Paper([Part(dit, lambda m: m(*given), 3), run, decoder_xl(768, 0)], 1024, epochs * 1251, ema=True)


def decoder_xl(channels: int, passes: int) -> Part:
    decoder = rae.Decoder((256, channels), 14, **rae.DECODERS["ViT-XL"])
    return Part(decoder, lambda m: m(torch.zeros(1, 256, channels)), passes)


def decoder_training(pictures: float) -> Paper:
    return Paper([decoder_xl(1152, 3), siglip()], 512, round(pictures / 512), ema=True)


PAPERS = {
    "DiT-DH-XL, ImageNet 256, 80 epochs": partial(class_training, 80),
    "DiT-DH-XL, ImageNet 256, 800 epochs": partial(class_training, 800),
    "decoder ViT-XL, 73M pictures, L1 alone": partial(decoder_training, 73e6),
    "0.5B + 1.5B, 30k steps": partial(text_training, "0.5B", "1.5B"),
    "0.5B + 1.5B frozen, 30k": partial(text_training, "0.5B", "1.5B", frozen=True),
    "2.4B + 1.5B, 30k": partial(text_training, "2.4B", "1.5B"),
    "2.4B + 1.5B frozen, 30k": partial(text_training, "2.4B", "1.5B", frozen=True),
    "2.4B + 1.5B, 60k": partial(text_training, "2.4B", "1.5B", 60_000),
    "9.8B + 7B, 30k": partial(text_training, "9.8B", "7B"),
    "9.8B + 7B frozen, 30k": partial(text_training, "9.8B", "7B", frozen=True),
    "9.8B + 7B, 60k": partial(text_training, "9.8B", "7B", 60_000),
}


def forward_flops(part: Part) -> int:
    """Of one sample, counted by torch: a multiplication and an addition are two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        part.call(part.module)
    return counter.get_total_flops()


def kept_bytes(part: Part) -> int:
    """What autograd keeps of one sample for the backward pass, weights left out."""
    weights = {p.untyped_storage()._cdata for p in [*part.module.parameters(), *part.module.buffers()]}
    seen = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        part.call(part.module)
    return sum(storage.nbytes() for storage in seen.values())


def blocks_of(part: Part) -> torch.nn.ModuleList:
    return max((m for m in part.module.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Cost(NamedTuple):
    learned: int  # parameters
    flops: int  # of one sample, forward and backward, nothing computed twice
    spread: int  # bytes of fp32 weights, gradients, AdamW's two moments and an average, over all GPUs
    held: int  # bytes that each GPU has: fp32 weights of what only runs, or draws samples at checkpoints
    gathered: int  # and of what is spread two blocks at a time and what is in no block, fp32 and bf16
    moved: int  # bytes that it gathers and sums in a step: fp32 weights twice, and gradients
    sample: int  # bytes that one sample keeps: inputs of all blocks, fp32; everything of one block; logits


def cost(paper: Paper) -> Cost:
    spread = held = gathered = moved = inputs = largest = logits = 0
    with torch.device("meta"):
        for part in paper.parts:
            blocks, whole = blocks_of(part), size(part.module)
            if part.passes < 2:
                held += 4 * whole
                continue
            learns = part.passes == 3
            spread += whole * (16 + 4 * paper.ema if learns else 4)
            moved += whole * (12 if learns else 8)
            gathered += 6 * (whole - size(blocks) + 2 * size(blocks[0]))
            width = next(p.shape[0] for p in blocks.parameters() if p.ndim == 1)
            inputs += 4 * TOKENS * width * len(blocks)
            largest = max(largest, kept_bytes(part) // 2 // len(blocks))  # counted in fp32, kept as bf16
            vocabulary = getattr(getattr(part.module, "config", None), "vocab_size", 0)
            logits += LEARNED * vocabulary * (2 + 4 + 4)  # bf16, fp32, and its gradient
        flops = sum(part.passes * forward_flops(part) for part in paper.parts if part.passes)
    learned = sum(size(part.module) for part in paper.parts if part.passes == 3)
    return Cost(learned, flops, spread, held, gathered, moved, inputs + largest + logits)


def plan(config: Config) -> str:
    """Two tables: what fits where, and how long it takes; of `--shard full` on a machine of 8 GPUs, and of
    `--shard hybrid`, which moves gradients alone between machines, on more."""
    peak, memory, inside, between = GPUS[config.gpu]
    costs = {}
    for name, make in PAPERS.items():
        with torch.device("meta"):
            paper = make()
        for part in paper.parts:
            part.module.to("meta")  # also what is drawn on the CPU
        costs[name] = paper, cost(paper)

    def used(each: Cost, gpus: int) -> float:
        """GB on a GPU without samples."""
        return (each.spread / min(gpus, 8) + each.held + (gpus > 1) * each.gathered) / 1e9

    def fits(each: Cost, gpus: int, limit: float) -> str:
        count = int((limit - used(each, gpus)) * 1e9 // each.sample)
        return str(count) if count > 0 else "-"

    def seconds(paper: Paper, each: Cost, gpus: int) -> dict[str, float]:
        return {
            "compute": paper.batch * each.flops / (gpus * peak * 1e12 * config.mfu),
            "NVLink": each.moved / (inside * 1e9) * (gpus > 1),
            "network": 8 * each.learned / 8 / (between * 1e9) * (gpus > 8),  # gradients, once more
        }

    def first(paper: Paper, each: Cost, gpus: int) -> str:
        """What ends first."""
        if fits(each, gpus, memory) == "-":
            return "memory"
        times = seconds(paper, each, gpus)
        return "batch" if gpus > paper.batch else max(times, key=times.get)

    lines = [
        f"Computed, not measured. bf16 compute on fp32 weights, checkpointed blocks; {TOKENS - 256} tokens "
        f"of text beside a picture's 256, {LEARNED} of them learned. Fragmentation and the "
        "allocator's reserve are not in it; at the start each GPU holds the whole model in fp32.",
        "",
        "| training | learned | GB without samples on 1, 8, 64 GPUs | MB a sample "
        "| samples at once on 1 GPU of 24, 80, 141 GB | on each of 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, each) in costs.items():
        alone, eight = (", ".join(fits(each, gpus, limit) for limit in (24, 80, 141)) for gpus in (1, 8))
        use = ", ".join(f"{used(each, gpus):.1f}" for gpus in (1, 8, 64))
        cells = f"{each.learned / 1e9:.2f}B", use, f"{each.sample / 1e6:.0f}", alone, eight
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"On {config.gpus} {config.gpu} of {peak} TFLOP/s at an MFU of {config.mfu:.0%}, which does not "
        f"count what is computed twice; {inside} GB/s inside of a machine of 8, {between} GB/s outside.",
        "",
        "| training | PFLOP a step | seconds a step: compute, NVLink, network | hours | GPU hours "
        "| ends first on 64, 512, 4096 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (paper, each) in costs.items():
        times = seconds(paper, each, config.gpus)
        hours = paper.steps * max(times.values()) / 3600
        ends = ", ".join(first(paper, each, gpus) for gpus in (64, 512, 4096))
        shown = ", ".join(f"{value:.2f}" for value in times.values())
        cells = (
            f"{paper.batch * each.flops / 1e15:.1f}",
            shown,
            f"{hours:.1f}",
            f"{hours * config.gpus:,.0f}",
            ends,
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    config = common.parse(Config, __doc__)
    if config.plan:
        print(plan(config))
        return
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
