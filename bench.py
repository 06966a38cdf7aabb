"""Images per second of every hot loop, its FLOPs, how much of the machine's peak it reaches, and its memory.

    python bench.py                                  # the nano sizes, on this machine
    python bench.py encode sample --images 64        # some of the loops
    python bench.py t2i-step class-step --compile    # each eager, then compiled
    python bench.py --dit DiT-DH-XL --dtype bf16 --compile --json bench.json     # RAE's sizes
    python bench.py --dit 2.4B --language-model 1.5B --activation-checkpointing --batch 32    # Scale-RAE's
    python bench.py decoder-step --decoder ViT-B --batch 8

Every loop is warmed up, then timed for --seconds. torch counts the FLOPs of one eager call: a multiplication
and an addition are two, attention is counted whole, recomputation is not counted. They are compared with a
product of large matrices, measured first, and with the GPU's published bf16 peak (MFU). Sizes other than nano
have random weights, which are as fast as trained ones.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import rae
from common import DistContext, flag
from nano import shapes

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense bf16
QWEN = {  # Qwen2.5
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
DINOV2 = {"model_type": "dinov2_with_registers", "image_size": 224, "patch_size": 14}  # the base size
DINO_S8 = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12,
           "num_attention_heads": 6, "image_size": 224, "patch_size": 8}  # fmt: skip


@dataclass
class Config:
    loops: list[str] = flag(
        (),
        "loader, jpeg, encode, decode, decoder-step (L1 alone), decoder-full (all losses, as train_decoder.py "
        "logs it), t2i-step, sample, sample-cfg, class-step, class-sample, class-sample-cfg, "
        "class-sample-auto (AutoGuidance) (default: all that --dit has)",
        nargs="*",
        metavar="LOOP",
    )
    dit: str = flag(
        "nano",
        "size of the DiT. It decides the other models: the shipped nano ones; DINOv2-B for RAE's sizes; "
        "SigLIP-2 and a language model for Scale-RAE's",
        choices=rae.DITS,
    )
    language_model: str = flag("1.5B", "size of Qwen2.5 beside Scale-RAE's DiTs", choices=QWEN)
    decoder: str = flag(
        "", "size of the decoder in decoder-step and decoder-full, for 256 tokens and 256 px "
        "(default: nano or ViT-XL)", choices=["", *rae.DECODERS],
    )  # fmt: skip
    activation_checkpointing: bool = flag(False, "recompute activations of blocks in the steps")
    batch: int = flag(64, "images per call", at_least=4)
    images: int = flag(4, "images per call of the sampling loops", at_least=1)
    seconds: float = flag(5.0, "time for every loop", at_least=0.01)
    compile: bool = flag(False, "time every loop compiled, too")
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    json: str = flag("", "write the results to this file")


# -----------------------------------------------------------------------------------------------------------
# models


def is_nano(config: Config) -> bool:
    return config.dit.startswith("nano")


def build_autoencoder(config: Config, dist_ctx: DistContext, decoder: str = "") -> rae.RAE:
    """The autoencoder of the size, maybe with another decoder, for 256 tokens and 256 px."""
    if is_nano(config):
        autoencoder = common.load_autoencoder(str(common.WEIGHTS / "rae"), dist_ctx)
        if not decoder:
            return autoencoder
        arguments = autoencoder._hub_mixin_config
        arguments = arguments | {"encoder_size": 16 * autoencoder.encoder.config.patch_size}
    else:
        encoder = DINOV2 if config.dit.startswith("DiT") else SIGLIP
        arguments = {"encoder": encoder, "encoder_size": 224}
        arguments |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    arguments |= {"decoder_config": rae.DECODERS[decoder or "ViT-XL"] | {"patch_size": 16}}
    with dist_ctx.device:
        return rae.RAE(**arguments).to(dist_ctx.device)


def build_text_to_image(config: Config, dist_ctx: DistContext) -> rae.TextToImage:
    if is_nano(config):
        return common.load_model(rae.TextToImage, str(common.WEIGHTS / "t2i"), "", dist_ctx)
    with dist_ctx.device:
        model = rae.TextToImage(QWEN[config.language_model], rae.DITS[config.dit], (256, 1152))
    # The nano tokenizer's ids are in every vocabulary. It makes a few more tokens of a text than Qwen's.
    model.set_tokenizer(transformers.AutoTokenizer.from_pretrained(common.WEIGHTS / "t2i"))
    return model.to(dist_ctx.device)


def build_class_to_image(config: Config, dist_ctx: DistContext, size: str) -> rae.ClassToImage:
    shape = build_autoencoder(config, dist_ctx).latent_shape if is_nano(config) else (256, 768)
    with dist_ctx.device:
        return rae.ClassToImage(rae.class_dit(size, 1000), shape).to(dist_ctx.device)


# -----------------------------------------------------------------------------------------------------------
# loops


@dataclass
class Loop:
    run: Callable[[int], object]  # on so many images
    images: int  # per timed call
    blocks: list[nn.Module] = field(default_factory=list)  # to compile and to checkpoint; none: no FLOPs
    trains: bool = False
    tokens: int = 0  # in a conversation


def loader(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    size = build_autoencoder(config, dist_ctx).image_size if is_nano(config) else 256
    batches = data.Loader(data.open_source("nano", size, 0), config.batch)
    return Loop(lambda n: next(batches), config.batch)


def jpeg(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    """Reads 8 tar files of 256 captioned JPEGs of 256 px on all cores."""
    for shard in range(8):
        with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
            for number in range(shard, 256, 8):
                sample, file = shapes.draw("scenes", 0, number, 256), io.BytesIO()
                Image.fromarray(sample.image).save(file, "JPEG", quality=90)
                for suffix, content in (("jpg", file.getvalue()), ("txt", sample.caption.encode())):
                    member = tarfile.TarInfo(f"{number}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    batches = data.Loader(data.open_source(folder, 256, 0), config.batch, workers=os.cpu_count())
    return Loop(lambda n: next(batches), config.batch)


def inference_loop(call: Callable[[int], Tensor], images: int, dist_ctx: DistContext, *modules) -> Loop:
    def run(n: int) -> Tensor:
        with torch.no_grad(), dist_ctx.autocast():
            return call(n)

    blocks = []
    for module in modules:
        module.eval().requires_grad_(False)  # torch's FLOP counter fails where gradients never come
        blocks += blocks_of(module)
    return Loop(run, images, blocks)


def training_loop(
    loss: Callable[[int], Tensor], images: int, dist_ctx: DistContext, model: nn.Module, *frozen, tokens=0
) -> Loop:
    trainable = [p for p in model.parameters() if p.requires_grad]
    # a learning rate of 0: the weights stay as they are, however long the loop runs
    stepper = common.Stepper(torch.optim.AdamW(trainable, lr=0.0, fused=True))

    def run(n: int) -> None:
        with dist_ctx.autocast():
            value = loss(n)
        value.backward()
        stepper.step()

    blocks = [block for module in (model, *frozen) for block in blocks_of(module)]
    return Loop(run, images, blocks, trains=True, tokens=tokens)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, rae.RAE):
        return [*module.encoder.blocks, *module.decoder.decoder_layers]
    return module.blocks


def encode(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    autoencoder = build_autoencoder(config, dist_ctx)
    size = autoencoder.image_size
    images = torch.rand(config.batch, 3, size, size, device=dist_ctx.device)
    return inference_loop(lambda n: autoencoder.encode(images[:n]), config.batch, dist_ctx, autoencoder)


def decode(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    autoencoder = build_autoencoder(config, dist_ctx)
    latents = torch.randn(config.batch, *autoencoder.latent_shape, device=dist_ctx.device)
    return inference_loop(lambda n: autoencoder.decode(latents[:n]), config.batch, dist_ctx, autoencoder)


def decoder_step(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    autoencoder = build_autoencoder(config, dist_ctx, config.decoder)
    size = autoencoder.image_size
    images = torch.rand(config.batch, 3, size, size, device=dist_ctx.device)

    def loss(n: int) -> Tensor:
        return F.l1_loss(autoencoder.decode(autoencoder.encode(images[:n])), images[:n])

    return training_loop(loss, config.batch, dist_ctx, autoencoder)


def flow_inputs(batch: int, autoencoder: rae.RAE, dist_ctx: DistContext) -> tuple[Tensor, ...]:
    """Images, noise, t and condition dropout of a batch."""
    size, shape = autoencoder.image_size, autoencoder.latent_shape
    images = torch.rand(batch, 3, size, size, device=dist_ctx.device)
    noise, for_t, for_dropout = data.flow_draws(shape, 0, list(range(batch)), dist_ctx.device)
    t = rae.sample_time(for_t, rae.default_alpha(shape))
    return images, noise, t.to(dist_ctx.device), (for_dropout < 0.1).to(dist_ctx.device)


def t2i_step(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    autoencoder, model = build_autoencoder(config, dist_ctx), build_text_to_image(config, dist_ctx)
    images, noise, t, dropped = flow_inputs(config.batch, autoencoder, dist_ctx)
    source = data.open_source("nano", autoencoder.image_size, 0)
    conversations = next(data.Loader(source, config.batch))["conversation"]
    chats = {n: model.chat(conversations[:n]).to(dist_ctx.device) for n in (4, config.batch)}

    def loss(n: int) -> Tensor:
        latents = autoencoder.encode(images[:n])
        cross_entropy, errors = model(chats[n], latents, noise[:n], t[:n], dropped[:n])
        return cross_entropy / len(chats[n].targets) + 2 * errors.mean()

    tokens = chats[config.batch].ids.shape[1]
    return training_loop(loss, config.batch, dist_ctx, model, autoencoder, tokens=tokens)


def class_step(config: Config, dist_ctx: DistContext, folder: str) -> Loop:
    autoencoder = build_autoencoder(config, dist_ctx)
    model = build_class_to_image(config, dist_ctx, config.dit)
    images, noise, t, dropped = flow_inputs(config.batch, autoencoder, dist_ctx)
    labels = torch.arange(config.batch, device=dist_ctx.device) % 1000

    def loss(n: int) -> Tensor:
        return model(labels[:n], autoencoder.encode(images[:n]), noise[:n], t[:n], dropped[:n]).mean()

    return training_loop(loss, config.batch, dist_ctx, model, autoencoder)


def sample(config: Config, dist_ctx: DistContext, folder: str, guidance: float = 1.0) -> Loop:
    model = build_text_to_image(config, dist_ctx)
    noise = torch.randn(config.images, *model.latent_shape, device=dist_ctx.device)
    prompts = ["a red circle above a blue square"] * config.images
    return inference_loop(
        lambda n: model.generate(prompts[:n], guidance=guidance, noise=noise[:n]),
        config.images,
        dist_ctx,
        model,
    )


def class_sample(
    config: Config, dist_ctx: DistContext, folder: str, guidance: float = 1.0, autoguidance: bool = False
) -> Loop:
    model, guide = build_class_to_image(config, dist_ctx, config.dit), None
    if autoguidance:
        guide = build_class_to_image(config, dist_ctx, "nano-guide" if is_nano(config) else "DiT-DH-S")
    noise = torch.randn(config.images, *model.latent_shape, device=dist_ctx.device)
    labels = list(range(config.images))

    def draw(n: int) -> Tensor:
        return model.generate(labels[:n], guidance=guidance, noise=noise[:n], guide=guide)

    return inference_loop(draw, config.images, dist_ctx, model, *([guide] if guide else []))


LOOPS = {
    "loader": loader,
    "jpeg": jpeg,
    "encode": encode,
    "decode": decode,
    "decoder-step": decoder_step,
    "decoder-full": None,  # train_decoder.py times it
    "t2i-step": t2i_step,
    "sample": sample,
    "sample-cfg": partial(sample, guidance=3.0),
    "class-step": class_step,
    "class-sample": class_sample,
    "class-sample-cfg": partial(class_sample, guidance=1.42),
    "class-sample-auto": partial(class_sample, guidance=1.42, autoguidance=True),
}


def loops_of(dit: str) -> list[str]:
    """The nano DiT is there for text and for labels, Scale-RAE's for text, all others for labels."""
    is_text = dit == "nano" or dit.removesuffix("-DH") in rae.SCALE_DITS
    names = [name for name in LOOPS if is_text or not name.startswith(("t2i", "sample"))]
    return [name for name in names if dit == "nano" or not is_text or not name.startswith("class")]


# -----------------------------------------------------------------------------------------------------------
# all losses of the decoder, from the log of train_decoder.py


def decoder_full_flags(config: Config, folder: str) -> list[str]:
    """Sizes other than nano get an encoder and a discriminator of random weights, written to the folder."""
    flags = {"preset": "nano-full", "disc-start": 0, "gan-start": 0, "data": "nano"}
    flags |= {"dtype": config.dtype, "batch": config.batch, "statistics": config.batch}
    flags |= {"encoder": common.WEIGHTS / "encoder", "discriminator": common.WEIGHTS / "encoder"}
    if is_nano(config) and config.decoder:
        patch = transformers.AutoConfig.from_pretrained(flags["encoder"]).patch_size
        flags |= {"decoder": config.decoder, "patch-size": 16, "encoder-size": 16 * patch}
    if not is_nano(config):
        flags |= {"decoder": config.decoder or "ViT-XL", "patch-size": 16, "encoder-size": 224}
        networks = {
            "encoder": rae.Encoder(DINOV2 if config.dit.startswith("DiT") else SIGLIP).model,
            "discriminator": transformers.ViTModel(transformers.ViTConfig(**DINO_S8)),
        }
        half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        processor = transformers.ViTImageProcessor(size={"height": 224, "width": 224}, **half)
        for name, network in networks.items():
            flags[name] = f"{folder}/{name}"
            network.save_pretrained(flags[name])
            processor.save_pretrained(flags[name])
    return [f"--{name}={value}" for name, value in flags.items()]


def run_decoder_full(config: Config, compiled: bool, steps: int = 60) -> float:
    """Milliseconds of a step as it is logged: the median over every ten steps but the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train_decoder.py"))]
        command += decoder_full_flags(config, folder) + ["--compile" if compiled else "--no-compile"]
        command += [f"--out={folder}/run", f"--steps={steps}", f"--save-every={steps}", "--log-every=10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        rows = common.read_rows(Path(folder, "run/metrics.jsonl"))
    return 1000 * config.batch / statistics.median(row["images_per_second"] for row in rows[1:])


# -----------------------------------------------------------------------------------------------------------
# measuring


def flops_of(call: Callable[[], object]) -> int:
    # the math backend: torch does not count the CPU's attention kernel, and in the backward pass of flash
    # attention it counts what is recomputed
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def measure(call: Callable[[], object], seconds: float, dist_ctx: DistContext) -> dict:
    """Milliseconds of a call, after three to warm up, and the peak memory in GB."""
    cuda = dist_ctx.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    peak_memory(cuda, reset=True)
    for _ in range(3):
        call()
    wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10 if cuda else 1):  # a GPU is kept busy
            call()
            calls += 1
        wait()
    return {"ms": 1000 * (time.perf_counter() - start) / calls} | peak_memory(cuda)


def peak_memory(cuda: bool, reset: bool = False) -> dict:
    """Since the last reset: of CUDA's allocator, or on Linux of the process; {} elsewhere."""
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return {"peak_gb": peak / 1e9}
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    except OSError:
        return {}
    return {"peak_gb": int(kilobytes) * 1024 / 1e9}


def measure_matrix_product(dist_ctx: DistContext, seconds: float) -> float:
    """TFLOP/s of a product of large square matrices in the compute dtype."""
    n = 8192 if dist_ctx.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=dist_ctx.device, dtype=dist_ctx.dtype)
    return 2 * n**3 / measure(lambda: a @ b, seconds, dist_ctx)["ms"] / 1e9


def measure_loop(name: str, compiled: bool, config: Config, dist_ctx: DistContext) -> dict:
    if name == "decoder-full":
        ms = run_decoder_full(config, compiled)
        return {"ms": ms, "images_per_second": 1000 * config.batch / ms}
    with tempfile.TemporaryDirectory() as folder:
        loop = LOOPS[name](config, dist_ctx, folder)  # with new models: their blocks are changed below
        small, gflop = min(4, loop.images), None
        if loop.blocks:
            gflop = flops_of(lambda: loop.run(small)) / small / 1e9
        # ---- as the scripts do: compile, then checkpoint; to sample, linear layers in the compute dtype ----
        if not loop.trains:
            common.cast_linear(loop.blocks, dist_ctx)
        common.compile_blocks(loop.blocks, compiled, dist_ctx)
        if loop.trains and config.activation_checkpointing:
            common.checkpoint_blocks(loop.blocks)
        result = measure(lambda: loop.run(loop.images), config.seconds, dist_ctx)
    if compiled:
        torch._dynamo.reset()  # or the graphs of one loop count towards the next one's limit
    result["images_per_second"] = 1000 * loop.images / result["ms"]
    if gflop:
        result |= {"gflop_per_image": gflop, "tflops": result["images_per_second"] * gflop / 1000}
    return result | ({"tokens": loop.tokens} if loop.tokens else {})


def summary(name: str, result: dict) -> str:
    parts = [f"{name:22} {result['ms']:9.1f} ms {result['images_per_second']:9.1f} images/s"]
    if "tflops" in result:
        parts.append(f"{result['gflop_per_image']:9.2f} GFLOP/image {result['tflops']:7.3f} TFLOP/s")
        parts.append(f"{result['of_matrix_product']:4.0%} of the matrix product")
    for key, text in (("mfu", "{:.1%} MFU"), ("peak_gb", "{:.1f} GB"), ("of_eager", "{:.2f} x eager")):
        if key in result:
            parts.append(text.format(result[key]))
    return "  ".join(parts)


def main() -> None:
    config = common.parse(Config, __doc__)
    dist_ctx = common.init_distributed(config.dtype)
    names = config.loops or loops_of(config.dit)
    if unknown := set(names) - set(loops_of(config.dit)):
        raise ValueError(
            f"--dit {config.dit} has no {', '.join(unknown)}: choose from {', '.join(loops_of(config.dit))}"
        )
    cuda, threads = dist_ctx.device.type == "cuda", torch.get_num_threads()
    card = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if gpu in card), None)
    product = measure_matrix_product(dist_ctx, min(config.seconds, 2.0))
    print(
        f"{dist_ctx}, {card}, {threads} threads, torch {torch.__version__}, --dit {config.dit}, "
        f"batch {config.batch}; a product of large matrices: {product:.3f} TFLOP/s"
    )
    results = {}
    for name in names:
        for compiled in (False, True) if config.compile and name not in ("loader", "jpeg") else (False,):
            result = measure_loop(name, compiled, config, dist_ctx)
            if "tflops" in result:
                result["of_matrix_product"] = result["tflops"] / product
            if "tflops" in result and peak and dist_ctx.dtype == torch.bfloat16:
                result["mfu"] = result["tflops"] / peak
            if compiled:
                result["of_eager"] = results[name]["ms"] / result["ms"]
            label = f"{name} compiled" if compiled else name
            results[label] = result
            print(summary(label, result), flush=True)
    if config.json:
        file = {"command": " ".join(["python", *sys.argv]), "where": str(dist_ctx), "card": card}
        file |= {"machine": platform.machine(), "threads": threads, "torch": torch.__version__}
        file |= {"batch": config.batch, "images": config.images, "dit": config.dit}
        file |= {"date": time.strftime("%Y-%m-%d"), "matrix_product_tflops": product, "results": results}
        with common.replacing(Path(config.json)) as temporary:
            temporary.write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    common.main(main)
