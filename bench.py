"""Images a second of every hot loop, its FLOPs, and what share of the machine's it uses.

    python bench.py                                  # the nano sizes, on this machine
    python bench.py encode sample --images 64      # some of them
    python bench.py t2i-step class-step --compile    # each eager, then compiled
    python bench.py --dit DiT-DH-XL --dtype bf16 --compile --json bench.json     # RAE's, with random weights
    python bench.py --dit 2.4B --language-model 1.5B --checkpoint-blocks --batch 32    # Scale-RAE's
    python bench.py sample-plain --dit 2.4B --images 1 --graph --compile --dtype bf16    # one, soon
    python bench.py decoder-step --decoder ViT-B --batch 8
    python bench.py --plan --gpu H200 --gpus 64 --mfu 0.45    # the papers' runs on paper

Each loop is warmed up, then timed for --seconds. FLOPs are counted by torch in one eager call: a
multiplication and an addition are two, attention is counted whole, nothing that is computed twice is. They
are compared with a product of large matrices, measured first, and with what the card's maker promises.
Random weights are as fast as trained ones.
"""

import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

GPUS = {  # dense bf16 TFLOP/s, memory in GB, GB/s to the others of a machine of 8, and to other machines
    "A100": (312, 80, 300, 25),
    "H100": (989, 80, 450, 50),
    "H200": (989, 141, 450, 50),
    "B200": (2250, 180, 900, 50),
}
QWEN = {
    "1.5B": {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151_667,
             "tie_word_embeddings": True},
    "7B": {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "intermediate_size": 18_944, "vocab_size": 151_667,
           "tie_word_embeddings": False},
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
          "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
          "vision_use_head": False}  # fmt: skip
DINO_S8 = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
           "num_attention_heads": 6, "image_size": 224, "patch_size": 8}  # fmt: skip
DINO = {"model_type": "dinov2_with_registers", "image_size": 224, "patch_size": 14}  # the base size


@dataclass
class Config:
    what: list[str] = flag(
        (),
        "loader, jpeg, encode, decode, decoder-step (L1 alone), decoder-full (all losses, from the log of "
        "train_decoder.py), mlp-step, mlp-padded-step (one SwiGLU layer, and with a width that is a multiple "
        "of 8), t2i-step, sample, sample-plain, class-step, class-sample, class-sample-cfg, "
        "class-sample-auto; all that there are if none is named",
        nargs="*",
        metavar="WHAT",
    )
    dit: str = flag(
        "nano",
        "size of the DiT, and with it all else: the shipped nano parts; RAE's, with DINOv2-B for labels; or "
        "Scale-RAE's, with SigLIP-2 and a language model",
        choices=rae.DITS,
    )
    autoencoder: str = flag(str(common.WEIGHTS / "rae"), "RAE folder or hub id, of the nano size")
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id, of the nano size")
    language_model: str = flag("1.5B", "size of Scale-RAE's, Qwen2.5", choices=QWEN)
    guide: str = flag(
        "",
        "size of the class-conditional DiT's guide (default: nano-guide, DiT-DH-S)",
        choices=["", *rae.DITS],
    )
    decoder: str = flag(
        "", "for decoder-step, another behind the encoder: 256 tokens, 256 px", choices=["", *rae.DECODERS]
    )
    checkpoint_blocks: bool = flag(False, "compute the blocks of the three steps twice, to save memory")
    data: str = flag("nano", "source of the images and captions")
    batch: int = flag(64, "images at once", at_least=4)
    images: int = flag(4, "and drawn at once in the sample loops", at_least=1)
    graph: bool = flag(False, "draw as sample.py --graph does, with CUDA graphs")
    seconds: float = flag(5.0, "to time each loop", at_least=0.01)
    compile: bool = flag(False, "time each loop with its blocks compiled too")
    dtype: str = flag("auto", "of the compute; weights are fp32", choices=["auto", "bf16", "fp32"])
    json: str = flag("", "file for the results")
    plan: bool = flag(False, "compute, and measure nothing: time, memory and traffic of the papers' runs")
    gpu: str = flag("H200", "--plan: its kind", choices=GPUS)
    gpus: int = flag(8, "--plan: how many", at_least=1)
    mfu: float = flag(0.4, "--plan: share of the card's bf16 peak that a training reaches")


def measure(run: Callable[[], object], seconds: float, dist_ctx: common.DistContext) -> dict:
    """Milliseconds of a call, after three calls to warm up, and the peak of the memory in GB, with all models
    of the size in it: CUDA's, which is given ten calls at a time, or on Linux the process's."""
    cuda = dist_ctx.device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    peak_memory(cuda, reset=True)
    for _ in range(3):
        run()
    wait()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(10 if cuda else 1):
            run()
            calls += 1
        wait()
    result = {"ms": 1000 * (time.perf_counter() - started) / calls}
    return result | peak_memory(cuda)


def peak_memory(cuda: bool, reset: bool = False) -> dict:
    """Since the last reset; {} where nobody knows."""
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return {"peak_gb": peak / 1e9}
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except (OSError, ValueError):
        return {}
    return {"peak_gb": int(peak) * 1024 / 1e9}


def matrix_product(dist_ctx: common.DistContext, seconds: float) -> float:
    """TFLOP/s of a product of large square matrices in the dtype of the compute."""
    n = 8192 if dist_ctx.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=dist_ctx.device, dtype=dist_ctx.dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, seconds, dist_ctx)["ms"] / 1e9


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Counts FLOPs by torch; what is yielded tells how many."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's is not counted
        yield counter.get_total_flops


# -----------------------------------------------------------------------------------------------------------
# what is timed


class World(NamedTuple):
    """The models of one size; what it has no weights for is None."""

    autoencoder: rae.RAE
    trained: rae.RAE  # of decoder-step: the same, or with a decoder of another size
    text: rae.TextToImage | None
    classes: rae.ClassToImage | None
    guide: rae.ClassToImage | None
    mlps: torch.nn.ModuleList  # the DiT's widest SwiGLU as it is, and with a width that is a multiple of 8

    @property
    def blocks(self) -> list[torch.nn.Module]:
        every = [self.mlps, *(model.blocks for model in (self.text, self.classes, self.guide) if model)]
        for model in (self.autoencoder, self.trained):
            every += [model.encoder.blocks, model.decoder.decoder_layers]
        return list(dict.fromkeys(block for blocks in every for block in blocks))


def world(config: Config, dist_ctx: common.DistContext) -> World:
    text = classes = guide = None
    if config.dit.startswith("nano"):
        autoencoder = common.load_autoencoder(config.autoencoder, dist_ctx)
        if config.dit == "nano":
            text = common.load_model(rae.TextToImage, config.model, config.autoencoder, dist_ctx)
    else:
        encoder = DINO if config.dit.startswith("DiT") else SIGLIP
        half = {"encoder_size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        autoencoder = rae.RAE(encoder, rae.DECODERS["ViT-XL"] | {"patch_size": 16}, **half)
    shape = autoencoder.latent_shape
    if config.dit.removesuffix("-DH") in rae.SCALE_RAE_DITS:
        with dist_ctx.device:
            text = rae.TextToImage(QWEN[config.language_model], rae.DITS[config.dit], shape)
        tokenizer = transformers.AutoTokenizer.from_pretrained(common.WEIGHTS / "t2i")
        text.set_tokenizer(tokenizer)  # its numbers are in every vocabulary
    else:
        weaker = config.guide or ("nano-guide" if config.dit.startswith("nano") else "DiT-DH-S")
        classes, guide = (rae.ClassToImage(rae.class_dit(size, 1000), shape) for size in (config.dit, weaker))
    trained = autoencoder
    if config.decoder:
        size = rae.DECODERS[config.decoder] | {"patch_size": 16}
        side = 16 * autoencoder.encoder.config.patch_size
        changes = {"decoder_config": size, "encoder_size": side}
        trained = rae.RAE(**autoencoder._hub_mixin_config | changes)
    size = rae.DITS[config.dit]
    width = max([size["width"], *size.get("head", ())[:1]])
    mlps = torch.nn.ModuleList(rae.SwiGLU(width, rae.swiglu_width(width)) for _ in range(2))
    mlps[0].multiple, mlps[1].multiple = 1, 8
    every = (each and each.to(dist_ctx.device) for each in (autoencoder, trained, text, classes, guide, mlps))
    return World(*every)


def jpeg_loader(folder: str, batch: int, images: int = 256) -> data.Loader:
    """Reads tars of JPEG files of 256 px with captions on all cores, as fast as a training could."""
    for shard in range(8):
        with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
            for number in range(shard, images, 8):
                sample, file = shapes.draw("scenes", 0, number, 256), io.BytesIO()
                Image.fromarray(sample.image).save(file, "JPEG", quality=90)
                for name, content in (("jpg", file.getvalue()), ("txt", sample.caption.encode())):
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return data.Loader(data.open_source(folder, 256, 0), batch, workers=os.cpu_count())


def all_losses(models: World, config: Config, folder: str) -> list[str]:
    """Flags of train_decoder.py for its full loss, on networks of random weights where the size has none."""
    encoder = discriminator = f"{common.WEIGHTS}/encoder"
    if not config.dit.startswith("nano"):
        half = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        networks = {
            "encoder": models.trained.encoder.model,
            "dino": transformers.ViTModel(transformers.ViTConfig(**DINO_S8)),
        }
        for name, network in networks.items():
            network.save_pretrained(f"{folder}/{name}")
            transformers.ViTImageProcessor(**half).save_pretrained(f"{folder}/{name}")
        encoder, discriminator = f"{folder}/encoder", f"{folder}/dino"
    size = config.decoder or ("nano" if config.dit.startswith("nano") else "ViT-XL")
    flags = {"encoder": encoder, "discriminator": discriminator, "decoder": size, "data": config.data}
    flags |= {"encoder-size": models.trained.encoder_size}
    flags |= {"dtype": config.dtype, "batch": config.batch, "statistics": config.batch}
    flags |= {"preset": "nano-full", "disc-start": 0, "gan-start": 0}
    flags |= {"patch-size": 16} if size != "nano" else {}
    return [f"--{name}={value}" for name, value in flags.items()]


def by_its_log(flags: list[str], images: int, compiled: bool, steps: int = 60) -> dict:
    """Milliseconds of a step of train_decoder.py as it logs them: the median of tens, without the first."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*flags, "--compile" if compiled else "--no-compile"]
        flags += [f"--out={out}/run", f"--steps={steps}", "--log-every=10", f"--save-every={steps}"]
        command = [sys.executable, str(Path(__file__).with_name("train_decoder.py")), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        rows = [json.loads(row) for row in Path(out, "run/metrics.jsonl").read_text().splitlines()]
    return {"ms": 1000 * images / statistics.median(row["images_per_second"] for row in rows[1:])}


class Loop(NamedTuple):
    run: Callable[[], object]
    images: int  # in a call
    computes: bool = True
    tokens: int = 0  # of a conversation, in a step with a language model
    flags: Callable[[], list[str]] | None = None  # of train_decoder.py, which times itself, in place of `run`


def loops(
    models: World, config: Config, dist_ctx: common.DistContext, batch: int, steppers: dict | None
) -> dict[str, Loop]:
    """Every loop by name, on `batch` images, all to be drawn. Steps keep their optimizers in `steppers`;
    with None, to count FLOPs, they end before it, and nothing is a CUDA graph."""
    autoencoder, trained, text, classes, guide, mlps = models
    source = data.open_source(config.data, autoencoder.image_size, 0)
    stream = data.Loader(source, batch)
    drawn = next(stream)
    images = data.to_unit(drawn["image"], dist_ctx.device)
    decoder_images = F.interpolate(images, (trained.image_size, trained.image_size), mode="bilinear")
    shape = autoencoder.latent_shape
    latents = torch.randn(batch, *shape, device=dist_ctx.device)
    noise, u, v = data.flow_draws(shape, 0, list(range(batch)), dist_ctx.device)
    t, dropped = (
        rae.sample_time(u, rae.default_alpha(shape)).to(dist_ctx.device),
        (v < 0.1).to(dist_ctx.device),
    )
    labels = torch.arange(batch, device=dist_ctx.device) % 1000
    inner = torch.randn(batch, shape[0], mlps[0].w12.in_features, device=dist_ctx.device)
    folder = tempfile.TemporaryDirectory()

    @cache
    def jpeg() -> data.Loader:
        return jpeg_loader(folder.name, batch)

    def train(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        with dist_ctx.autocast():
            value = loss()
        value.backward()
        if steppers is None:
            model.zero_grad()
            return
        if model not in steppers:
            learned = [p for p in model.parameters() if p.requires_grad]
            steppers[model] = common.Stepper(torch.optim.AdamW(learned, lr=0.0, fused=True))
        steppers[model].step()

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return infer(autoencoder.encode, pixels)

    def decoder_loss() -> torch.Tensor:
        return F.l1_loss(trained.decode(trained.encode(decoder_images)), decoder_images)

    def t2i_loss() -> torch.Tensor:
        cross_entropy, errors = text(chat, encode(images), noise, t, dropped)
        return cross_entropy / len(chat.targets) + 2 * errors.mean()

    def class_loss() -> torch.Tensor:
        return classes(labels, encode(images), noise, t, dropped).mean()

    def infer(call: Callable, *args, **kwargs) -> torch.Tensor:
        with torch.no_grad(), dist_ctx.autocast():
            return call(*args, **kwargs)

    every = {
        "loader": Loop(lambda: next(stream), batch, computes=False),
        "jpeg": Loop(lambda: next(jpeg()), batch, computes=False),
        "encode": Loop(lambda: encode(images), batch),
        "decode": Loop(lambda: infer(autoencoder.decode, latents), batch),
        "decoder-step": Loop(lambda: train(trained, decoder_loss), batch),
        "decoder-full": Loop(
            None, batch, computes=False, flags=partial(all_losses, models, config, folder.name)
        ),
        "mlp-step": Loop(lambda: train(mlps[0], lambda: mlps[0](inner).mean()), batch),
        "mlp-padded-step": Loop(lambda: train(mlps[1], lambda: mlps[1](inner).mean()), batch),
    }
    count = config.images
    how = {
        "noise": torch.randn(count, *shape, device=dist_ctx.device),
        "graph": config.graph and steppers is not None,
    }
    if text:
        chat = text.chat(drawn["conversation"]).to(dist_ctx.device)
        prompts = [drawn["caption"][k % batch] for k in range(count)]
        plain = partial(infer, text.generate, prompts, **how)
        every |= {
            "t2i-step": Loop(lambda: train(text, t2i_loss), batch, tokens=chat.ids.shape[1]),
            "sample": Loop(partial(plain, guidance=3.0), count),
            "sample-plain": Loop(plain, count),
        }
    if classes:
        plain = partial(infer, classes.generate, list(range(count)), **how)
        guided = partial(plain, guidance=1.42)
        every |= {
            "class-step": Loop(lambda: train(classes, class_loss), batch),
            "class-sample": Loop(plain, count),
            "class-sample-cfg": Loop(guided, count),
            "class-sample-auto": Loop(partial(guided, guide=guide), count),
        }
    return every


def line(name: str, result: dict) -> str:
    parts = [f"{name:22} {result['ms']:9.1f} ms {result['images_per_second']:9.1f} images/s"]
    if "gflop_per_image" in result:
        parts.append(f"{result['gflop_per_image']:9.2f} GFLOP/image {result['tflops']:7.3f} TFLOP/s")
        parts.append(f"{result['of_matrix_product']:4.0%} of the matrix product")
    parts += [f"{result['mfu']:.1%} MFU"] if "mfu" in result else []
    parts += [f"{result['peak_gb']:.1f} GB"] if "peak_gb" in result else []
    parts += [f"{result['of_eager']:.2f} x eager"] if "of_eager" in result else []
    return "  ".join(parts)


# -----------------------------------------------------------------------------------------------------------
# on paper: nothing of the following is measured

TOKENS = 256 + 64  # of a conversation: an image and the text around it
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
    encoder = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINO))
    given = torch.zeros(1, 256, 768), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    image = torch.zeros(1, 3, 224, 224)
    run = Part(encoder, lambda m: m(image).last_hidden_state, 1)
    return Paper([Part(dit, lambda m: m(*given), 3), run, decoder_xl(768, 0)], 1024, epochs * 1251, ema=True)


def decoder_xl(channels: int, passes: int) -> Part:
    decoder = rae.Decoder((256, channels), 14, **rae.DECODERS["ViT-XL"])
    return Part(decoder, lambda m: m(torch.zeros(1, 256, channels)), passes)


def decoder_training(images: float) -> Paper:
    return Paper([decoder_xl(1152, 3), siglip()], 512, round(images / 512), ema=True)


PAPERS = {
    "DiT-DH-XL, ImageNet 256, 80 epochs": partial(class_training, 80),
    "DiT-DH-XL, ImageNet 256, 800 epochs": partial(class_training, 800),
    "decoder ViT-XL, 73M images, L1 alone": partial(decoder_training, 73e6),
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
    with counting() as total, torch.no_grad():
        part.call(part.module)
    return total()


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
            blocks, full_tensor = blocks_of(part), size(part.module)
            if part.passes < 2:
                held += 4 * full_tensor
                continue
            learns = part.passes == 3
            spread += full_tensor * (16 + 4 * paper.ema if learns else 4)
            moved += full_tensor * (12 if learns else 8)
            gathered += 6 * (full_tensor - size(blocks) + 2 * size(blocks[0]))
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
        f"of text beside an image's 256, {LEARNED} of them learned. Fragmentation and the "
        "allocator's reserve are not in it.",
        "",
        f"| training | learned | GFLOP a sample | samples/s at the peak of one {config.gpu} "
        "| GB without samples on 1, 8, 64 GPUs | MB a sample "
        "| samples at once on 1 GPU of 24, 80, 141 GB | on each of 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, each) in costs.items():
        alone, eight = (", ".join(fits(each, gpus, limit) for limit in (24, 80, 141)) for gpus in (1, 8))
        use = ", ".join(f"{used(each, gpus):.1f}" for gpus in (1, 8, 64))
        flops = f"{each.flops / 1e9:,.0f}", f"{peak * 1e12 / each.flops:,.0f}"
        cells = f"{each.learned / 1e9:.2f}B", *flops, use, f"{each.sample / 1e6:.0f}", alone, eight
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


@contextmanager
def changed(
    blocks: list[torch.nn.Module], config: Config, dist_ctx: common.DistContext, compiled: bool, learns: bool
):
    """The blocks as the scripts have them: compiled; in a step with --checkpoint-blocks checkpointed, and to
    draw with linear layers in the dtype of the compute."""
    before = {block: block.forward for block in blocks}
    if not learns:
        common.cast_linear(blocks, dist_ctx)
    common.compile_blocks(blocks, compiled, dist_ctx)
    if learns and config.checkpoint_blocks:
        common.checkpoint_blocks(blocks)
    yield
    for block, forward in before.items():
        block.forward = forward
        block.float()
    if compiled:
        torch._dynamo.reset()  # what one loop compiled for its shapes is not the next one's


def main() -> None:
    config = common.parse(Config, __doc__)
    if config.plan:
        print(plan(config))
        return
    dist_ctx = common.init_distributed(config.dtype)
    models = world(config, dist_ctx)
    steppers = {}
    every, small = (
        loops(models, config, dist_ctx, config.batch, steppers),
        loops(models, config, dist_ctx, 4, None),
    )
    if unknown := set(config.what) - set(every):
        raise ValueError(f"--dit {config.dit} has no {', '.join(unknown)}: choose from {', '.join(every)}")
    card = torch.cuda.get_device_name() if dist_ctx.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    peak = next((values[0] for name, values in GPUS.items() if name in card), None)
    product = matrix_product(dist_ctx, min(config.seconds, 2.0))
    tokens = f", {every['t2i-step'].tokens} tokens a conversation" if "t2i-step" in every else ""
    print(
        f"{dist_ctx}, {card}, {torch.get_num_threads()} threads, torch {torch.__version__}, --dit {config.dit}, "
        f"batch {config.batch}{tokens}; a product of large matrices: {product:.3f} TFLOP/s"
    )
    results = {}
    for name in config.what or every:
        loop, learns, gflop = every[name], name.endswith("-step"), None
        if loop.computes:
            learned = [p for model in models if model for p in model.parameters() if p.requires_grad]
            for p in learned:  # torch's counter fails at parameters that want gradients and get none
                p.requires_grad_(learns)
            with counting() as total:
                small[name].run()
            for p in learned:
                p.requires_grad_(True)
            gflop = total() / small[name].images / 1e9
        for compiled in (False, True)[: 1 + (config.compile and (loop.computes or loop.flags is not None))]:
            with changed(models.blocks if loop.computes else [], config, dist_ctx, compiled, learns):
                if loop.flags:
                    result = by_its_log(loop.flags(), loop.images, compiled)
                else:
                    result = measure(loop.run, config.seconds, dist_ctx)
            result["images_per_second"] = 1000 * loop.images / result["ms"]
            if gflop:
                tflops = result["images_per_second"] * gflop / 1000
                result |= {"gflop_per_image": gflop, "tflops": tflops, "of_matrix_product": tflops / product}
                result |= {"mfu": tflops / peak} if peak and dist_ctx.dtype == torch.bfloat16 else {}
            if compiled:
                result["of_eager"] = results[name]["ms"] / result["ms"]
            label = name + " compiled" * compiled
            results[label] = result
            print(line(label, result), flush=True)
        steppers.clear()
    if config.json:
        about = {"command": "python " + " ".join(sys.argv), "where": str(dist_ctx), "card": card}
        about |= {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        about |= {name: getattr(config, name) for name in ("batch", "images", "dit", "graph")}
        about |= {"tokens": {name: loop.tokens for name, loop in every.items() if loop.tokens}}
        about |= {"date": time.strftime("%Y-%m-%d"), "matrix_product_tflops": product, "results": results}
        with common.replacing(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    common.main(main)
