"""Images per second, FLOPs, MFU and peak memory of the hot loops.

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

import gc
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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn

import common
import data
import rae
from common import DistContext, flag
from nano import shapes

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
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass
class Config:
    loops: list[str] = flag(
        (),
        "loader, jpeg, encode, decode, decoder-step (L1 alone), decoder-full (all losses, from the log of "
        "train_decoder.py), t2i-step, sample, sample-cfg, class-step, class-sample, class-sample-cfg, "
        "class-sample-auto (AutoGuidance); default: all that exist for --dit",
        nargs="*",
        metavar="LOOP",
    )
    dit: str = flag(
        "nano",
        "size of the DiT, which decides the other models: the shipped nano ones; DINOv2-B for RAE and RAEv2; "
        "SigLIP-2 and a language model for Scale-RAE's",
        choices=rae.DITS,
    )
    language_model: str = flag("1.5B", "size of Qwen2.5 for Scale-RAE's DiTs", choices=QWEN)
    decoder: str = flag(
        "",
        "size of the decoder in decoder-step and decoder-full, for images of 256 px (default: nano, ViT-XL)",
        choices=["", *rae.DECODERS],
    )
    activation_checkpointing: bool = flag(False, "recompute the blocks' activations in the steps")
    batch: int = flag(64, "images per call", at_least=4)
    images: int = flag(4, "images per call of the sampling loops", at_least=1)
    seconds: float = flag(5.0, "time per loop", at_least=0.01)
    compile: bool = flag(False, "time every loop compiled, too")
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    json: str = flag("", "write the results to this file")

    @property
    def is_nano(self) -> bool:
        return self.dit.startswith("nano")

    @property
    def encoder(self) -> dict:
        return DINOV2 if self.dit.startswith(("DiT", "raev2")) else SIGLIP


# -----------------------------------------------------------------------------------------------------------
# models


def build_autoencoder(config: Config, dist_ctx: DistContext, decoder: str = "") -> rae.RAE:
    """decoder: size of another decoder than the usual one, for 256 tokens and 256 px."""
    if config.is_nano:
        autoencoder = common.load_autoencoder(str(common.WEIGHTS / "rae"), dist_ctx)
        if not decoder:
            return autoencoder
        side = 16 * autoencoder.encoder.config.patch_size
        arguments = autoencoder._hub_mixin_config | {"encoder_size": side}
    else:
        arguments = {"encoder": config.encoder, "encoder_size": 224} | HALF
    arguments["decoder_config"] = rae.DECODERS[decoder or "ViT-XL"] | {"patch_size": 16}
    with dist_ctx.device:
        return rae.RAE(**arguments).to(dist_ctx.device)


def build_text_to_image(config: Config, dist_ctx: DistContext) -> rae.TextToImage:
    if config.is_nano:
        return common.load_model(rae.TextToImage, str(common.WEIGHTS / "t2i"), "", dist_ctx)
    with dist_ctx.device:
        model = rae.TextToImage(QWEN[config.language_model], rae.DITS[config.dit], (256, 1152))
    # the nano tokenizer: its ids are in Qwen's vocabulary
    model.set_tokenizer(
        transformers.AutoTokenizer.from_pretrained(common.WEIGHTS / "t2i", trust_remote_code=False)
    )
    return model.to(dist_ctx.device)


def build_class_to_image(config: Config, dist_ctx: DistContext, size: str) -> rae.ClassToImage:
    shape = build_autoencoder(config, dist_ctx).latent_shape if config.is_nano else (256, 768)
    with dist_ctx.device:
        return rae.ClassToImage(rae.class_dit(size, 1000), shape).to(dist_ctx.device)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    is_rae = isinstance(model, rae.RAE)
    return [*model.encoder.blocks, *model.decoder.decoder_layers] if is_rae else model.blocks


# -----------------------------------------------------------------------------------------------------------
# loops: what to call with a number of images, and its models; a step returns the loss of the first model

Call = Callable[[int], object]


def data_loop(name: str, config: Config, dist_ctx: DistContext) -> tuple[Call, list[nn.Module]]:
    if name == "loader":
        size = build_autoencoder(config, dist_ctx).image_size if config.is_nano else 256
        batches = data.Loader(data.open_source("nano", size, 0), config.batch)
    else:  # jpeg: 8 tar files with 256 captioned JPEGs of 256 px, read on all cores
        folder = tempfile.TemporaryDirectory()
        for shard in range(8):
            with tarfile.open(f"{folder.name}/{shard}.tar", "w") as tar:
                for number in range(shard, 256, 8):
                    sample, path = shapes.draw("scenes", 0, number, 256), Path(folder.name, f"{number}.jpg")
                    Image.fromarray(sample.image).save(path, quality=90)
                    path.with_suffix(".txt").write_text(sample.caption)
                    for file in (path, path.with_suffix(".txt")):
                        tar.add(file, file.name)
                        file.unlink()
        batches = data.Loader(data.open_source(folder.name, 256, 0), config.batch, workers=os.cpu_count())
        batches.folder = folder  # is deleted with the loader
    return lambda n: next(batches), []


def autoencoder_loop(name: str, config: Config, dist_ctx: DistContext) -> tuple[Call, list[nn.Module]]:
    model = build_autoencoder(config, dist_ctx, config.decoder if name == "decoder-step" else "")
    images = torch.rand(config.batch, 3, model.image_size, model.image_size, device=dist_ctx.device)
    latents = torch.randn(config.batch, *model.latent_shape, device=dist_ctx.device)
    calls = {
        "encode": lambda n: model.encode(images[:n]),
        "decode": lambda n: model.decode(latents[:n]),
        "decoder-step": lambda n: F.l1_loss(model.decode(model.encode(images[:n])), images[:n]),
    }
    return calls[name], [model]


def dit_step(name: str, config: Config, dist_ctx: DistContext) -> tuple[Call, list[nn.Module]]:
    batch, device, autoencoder = config.batch, dist_ctx.device, build_autoencoder(config, dist_ctx)
    size, shape = autoencoder.image_size, autoencoder.latent_shape
    images, all_rows = torch.rand(batch, 3, size, size, device=device), torch.arange(batch, device=device)
    noise, for_t, for_dropout = data.flow_draws(shape, 0, list(range(batch)), device)
    t = rae.sample_time(for_t, rae.default_alpha(shape)).to(device)
    dropped = (for_dropout < 0.1).to(device)

    def flow_loss(inputs, latents: Tensor, rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x_t = (1 - t[rows, None, None]) * latents[rows] + t[rows, None, None] * noise[rows]
        velocity, _, cross_entropy = model(inputs, x_t, t[rows], dropped[rows], context)
        return (velocity - (noise[rows] - latents[rows])).square().mean(), cross_entropy

    def class_loss(n: int) -> Tensor:
        return flow_loss(all_rows[:n] % 1000, autoencoder.encode(images[:n]), all_rows[:n], None)[0]

    def text_loss(n: int) -> Tensor:
        chat, latents = model.chat(conversations[:n]), autoencoder.encode(images[:n])
        answers, contexts = (
            rae.to_device(mask.nonzero().flatten(), device) for mask in (chat.is_answer, ~chat.is_answer)
        )
        flow, cross_entropy = flow_loss(chat, latents, answers, latents[contexts])
        return cross_entropy / chat.supervised_tokens + 2 * flow

    if name == "class-step":
        model = build_class_to_image(config, dist_ctx, config.dit)
        return class_loss, [model, autoencoder]
    model = build_text_to_image(config, dist_ctx)
    # each asks for an image: FLOPs are counted on a few of them
    conversations = next(data.Loader(data.open_source("nano:objects", size, 0), batch))["conversation"]
    return text_loss, [model, autoencoder]


def sampling_loop(name: str, config: Config, dist_ctx: DistContext) -> tuple[Call, list[nn.Module]]:
    if name.startswith("class"):
        model, inputs = build_class_to_image(config, dist_ctx, config.dit), list(range(config.images))
    else:
        model, inputs = build_text_to_image(config, dist_ctx), ["a red circle"] * config.images
    sampler, models = {"guidance": 1.0}, [model]
    if name.endswith(("cfg", "auto")):
        sampler["guidance"] = 1.42 if name.startswith("class") else 3.0
    if name.endswith("auto"):
        size = "nano-guide" if config.is_nano else "DiT-DH-S"
        sampler["guide"] = build_class_to_image(config, dist_ctx, size)
        models.append(sampler["guide"])
    noise = torch.randn(config.images, *model.latent_shape, device=dist_ctx.device)
    return lambda n: model.generate(inputs[:n], noise=noise[:n], **sampler), models


LOOPS = {
    **dict.fromkeys(["loader", "jpeg"], data_loop),
    **dict.fromkeys(["encode", "decode", "decoder-step"], autoencoder_loop),
    "decoder-full": None,  # see below
    **dict.fromkeys(["t2i-step", "class-step"], dit_step),
    **dict.fromkeys(["sample", "sample-cfg"], sampling_loop),
    **dict.fromkeys(["class-sample", "class-sample-cfg", "class-sample-auto"], sampling_loop),
}


def available_loops(dit: str) -> list[str]:
    """The nano DiT comes for text and for labels, Scale-RAE's for text, all others for labels."""
    is_text = dit == "nano" or dit.removesuffix("-DH") in rae.SCALE_RAE_DITS
    skip = () if dit == "nano" else ("class",) if is_text else ("t2i", "sample")
    return [name for name in LOOPS if not name.startswith(skip)]


# -----------------------------------------------------------------------------------------------------------
# decoder-full: all losses of the decoder, from the log of train_decoder.py


def decoder_networks(config: Config, folder: str) -> dict:
    """Flags for the networks: the nano ones, or new ones with random weights, written to the folder."""
    if config.is_nano:
        encoder = str(common.WEIGHTS / "encoder")
        patch = transformers.AutoConfig.from_pretrained(encoder, trust_remote_code=False).patch_size
        sizes = {"decoder": config.decoder, "patch-size": 16, "encoder-size": 16 * patch}
        return {"encoder": encoder, "discriminator": encoder} | (sizes if config.decoder else {})
    dino = transformers.ViTModel(transformers.ViTConfig(**DINO_S8))
    processor = transformers.ViTImageProcessor(size={"height": 224, "width": 224}, **HALF)
    for name, network in (("encoder", rae.Encoder(config.encoder).model), ("discriminator", dino)):
        network.save_pretrained(f"{folder}/{name}")
        processor.save_pretrained(f"{folder}/{name}")
    flags = {"encoder": f"{folder}/encoder", "discriminator": f"{folder}/discriminator"}
    return flags | {"decoder": config.decoder or "ViT-XL", "patch-size": 16, "encoder-size": 224}


def measure_decoder_full(config: Config, compiled: bool, steps: int = 60) -> dict:
    """Milliseconds per step: the median over intervals of ten steps, without the first."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"preset": "nano-full", "disc-start": 0, "gan-start": 0, "data": "nano"}
        flags |= {"dtype": config.dtype, "batch": config.batch, "statistics": config.batch}
        flags |= decoder_networks(config, folder)
        flags |= {"out": f"{folder}/run", "steps": steps, "save-every": steps, "log-every": 10}
        command = [sys.executable, str(Path(__file__).with_name("train_decoder.py"))]
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += ["--compile" if compiled else "--no-compile"]
        command += ["--activation-checkpointing"] * config.activation_checkpointing
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        rows = common.read_rows(Path(folder, "run/metrics.jsonl"))
    speed = statistics.median(row["images_per_second"] for row in rows[1:])
    return {"ms": 1000 * config.batch / speed, "images_per_second": speed}


# -----------------------------------------------------------------------------------------------------------
# measuring


def peak_memory(cuda: bool, reset: bool = False) -> dict:
    """Since the last reset: of CUDA's allocator, or on Linux of the process; {} elsewhere."""
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return {"peak_gb": peak / 1e9}
    if sys.platform != "linux":
        return {}
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    kilobytes = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
    return {"peak_gb": int(kilobytes) * 1024 / 1e9}


def measure(call: Callable[[], object], seconds: float, dist_ctx: DistContext) -> dict:
    """Milliseconds per call, after three to warm up, and the peak memory in GB."""
    cuda = dist_ctx.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    peak_memory(cuda, reset=True)
    for _ in range(3):
        call()
    wait()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10 if cuda else 1):  # a wait after every call would leave the GPU idle
            call()
            calls += 1
        wait()
    return {"ms": 1000 * (time.perf_counter() - start) / calls} | peak_memory(cuda)


def measure_loop(name: str, compiled: bool, config: Config, dist_ctx: DistContext) -> dict:
    if name == "decoder-full":
        return measure_decoder_full(config, compiled)
    gc.collect()  # the last loop's models: their changed blocks are reference cycles
    call, models = LOOPS[name](name, config, dist_ctx)
    blocks = [block for model in models for block in blocks_of(model)]
    images = config.images if "sample" in name else config.batch
    trains = name.endswith("-step")
    if trains:
        trainable = [p for p in models[0].parameters() if p.requires_grad]
        # a learning rate of 0: the weights stay as they are, however long the loop runs
        optimizers = common.Optimizers(torch.optim.AdamW(trainable, lr=0.0, fused=True))
    else:
        for model in models:
            model.eval().requires_grad_(False)  # or torch's FLOP counter waits for gradients, and fails

    def run(n: int = images) -> None:
        with torch.set_grad_enabled(trains), dist_ctx.autocast():
            out = call(n)
        if trains:
            out.backward()
            optimizers.step()

    # ---- FLOPs, of few images: the math backend takes memory --------------------------------------------
    few = min(4, images)
    gflop = common.flops_of(lambda: run(few)) / few / 1e9 if models else 0
    # ---- as in the scripts: compiled, then checkpointed; to sample, linear layers in the compute dtype --
    if not trains:
        common.cast_linear(blocks, dist_ctx)
    mode = "reduce-overhead" if "sample" in name and dist_ctx.device.type == "cuda" else None
    if compiled and mode:  # CUDA graphs: without the hook every block would start a new step
        for model in models:
            model.dit.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    common.compile_blocks(blocks, compiled, dist_ctx, mode)
    if trains and config.activation_checkpointing:
        common.checkpoint_blocks(blocks)
    result = measure(run, config.seconds, dist_ctx)
    if compiled:
        torch._dynamo.reset()  # what one loop compiled for its shapes is not the next one's
    result["images_per_second"] = 1000 * images / result["ms"]
    if gflop:
        result |= {"gflop_per_image": gflop, "tflops": gflop * result["images_per_second"] / 1000}
    return result


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
    if config.json:
        common.check_output(Path(config.json), ".json")
    dist_ctx = common.init_distributed(config.dtype)
    available = available_loops(config.dit)
    if unknown := set(config.loops) - set(available):
        raise ValueError(
            f"--dit {config.dit} has no {', '.join(unknown)}: choose from {', '.join(available)}"
        )

    # ---- the machine, and what it reaches at best -------------------------------------------------------
    cuda, threads = dist_ctx.device.type == "cuda", torch.get_num_threads()
    card = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    peak = dist_ctx.peak_flops()
    n = 8192 if cuda else 2048
    a, b = torch.randn(2, n, n, device=dist_ctx.device, dtype=dist_ctx.dtype)
    product = 2 * n**3 / measure(lambda: a @ b, min(config.seconds, 2.0), dist_ctx)["ms"] / 1e9  # TFLOP/s
    print(
        f"{dist_ctx}, {card}, {threads} threads, torch {torch.__version__}, --dit {config.dit}, batch "
        f"{config.batch}; a product of large matrices: {product:.3f} TFLOP/s"
    )

    # ---- every loop, eager and compiled -----------------------------------------------------------------
    results = {}
    for name in config.loops or available:
        can_compile = config.compile and LOOPS[name] is not data_loop
        for compiled in (False, True) if can_compile else (False,):
            result = measure_loop(name, compiled, config, dist_ctx)
            if "tflops" in result:
                result["of_matrix_product"] = result["tflops"] / product
                if peak:
                    result["mfu"] = result["tflops"] * 1e12 / peak
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
