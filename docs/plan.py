"""What the papers' training runs would take, on paper: memory, time and traffic. Nothing is measured.

    python docs/plan.py --gpus 64 > docs/plan.md
    python docs/plan.py --gpu H100 --gpus 512 --mfu 0.45

The models are built on the meta device, where they take no memory. torch counts the FLOPs of one sample's
forward pass and the bytes that autograd saves for the backward pass. The assumptions:

    compute   bf16 on fp32 weights; blocks are checkpointed where the preset says so, and their recomputation
              is not in the MFU; compiled, others keep three quarters of what autograd saves
    sharding  --shard full on up to 8 GPUs, --shard hybrid on more: only gradients travel between nodes
    time      the largest of compute, NVLink and network, as if they overlapped perfectly
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import rae  # noqa: E402
import train_decoder  # noqa: E402
import train_t2i  # noqa: E402
from bench import DINOV2, QWEN, SIGLIP  # noqa: E402
from common import flag  # noqa: E402


class Gpu(NamedTuple):
    memory: int  # GB
    nvlink: int  # GB/s to the other GPUs of its node
    network: int  # GB/s to other nodes


GPUS = {
    "A100": Gpu(80, 300, 25),
    "H100": Gpu(80, 450, 50),
    "H200": Gpu(141, 450, 50),
    "B200": Gpu(180, 900, 50),
}
NODE = 8  # GPUs
TOKENS = 256 + 64  # in a conversation: an image and the text around it
SUPERVISED = 24  # of them; only their logits over the vocabulary are computed


@dataclass
class Config:
    gpu: str = flag("H200", "type of the GPUs", choices=GPUS)
    gpus: int = flag(8, "number of GPUs", at_least=1)
    mfu: float = flag(0.4, "fraction of the GPU's bf16 peak that a run reaches")


# -----------------------------------------------------------------------------------------------------------
# the papers' runs

# How a module takes part in a step: the number of forward passes that its FLOPs amount to
TRAINABLE = 3  # forward, gradients of the activations, gradients of the weights
FROZEN = 2  # forward, gradients of the activations on their way to a trainable module
NO_GRAD = 1  # forward
IDLE = 0  # only decodes the sample images at checkpoints


class Part(NamedTuple):
    module: nn.Module
    forward: Callable[[nn.Module], Tensor]  # of one sample
    width: int  # of the residual stream
    passes: int


class Run(NamedTuple):
    parts: list[Part]
    preset: dict
    steps: int
    tokens: int = TOKENS

    @property
    def batch(self) -> int:
        return self.preset["batch"]


def encoder(model_class: type[nn.Module], config: dict, tokens: int = 256) -> Part:
    side = 14 * math.isqrt(tokens)
    model, images = model_class(model_class.config_class(**config)), torch.zeros(1, 3, side, side)
    return Part(model, lambda m: m(images).last_hidden_state, model.config.hidden_size, NO_GRAD)


def decoder(channels: int, passes: int) -> Part:
    model = rae.Decoder((256, channels), 14, **rae.DECODERS["ViT-XL"])
    return Part(model, lambda m: m(torch.zeros(1, 256, channels)), 1152, passes)


def dit(channels: int, config: dict, condition: Tensor, tokens: int = 256) -> Part:
    model = rae.DiT((tokens, channels), **config)
    inputs = torch.zeros(1, tokens, channels), torch.zeros(1), condition
    return Part(model, lambda m: m(*inputs), config["width"], TRAINABLE)


def language_model(size: str, passes: int) -> Part:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN[size]))
    width = model.config.hidden_size
    embeddings = torch.zeros(1, TOKENS, width)

    def forward(m: nn.Module) -> Tensor:
        return m.lm_head(m.model(inputs_embeds=embeddings).last_hidden_state[:, :SUPERVISED])

    return Part(model, forward, width, passes)


def text_run(preset: str, qwen_size: str, steps: int = 30_000, passes: int = TRAINABLE) -> Run:
    preset = train_t2i.PRESETS[preset]
    width = rae.DITS[preset["dit"]]["width"]
    config = rae.DITS[preset["dit"]] | {"condition_width": width}
    parts = [dit(1152, config, torch.zeros(1, 256, width)), language_model(qwen_size, passes)]
    parts += [encoder(transformers.SiglipVisionModel, SIGLIP), decoder(1152, IDLE)]
    return Run(parts, preset, steps)


def class_run(preset: str, epochs: int, tokens: int = 256) -> Run:
    preset = train_t2i.PRESETS[preset]
    config = rae.class_dit(preset["dit"], 1000)
    parts = [dit(768, config, torch.zeros(1, dtype=torch.long), tokens)]
    parts += [encoder(transformers.Dinov2WithRegistersModel, DINOV2, tokens), decoder(768, IDLE)]
    return Run(parts, preset, epochs * train_t2i.EPOCH, tokens)


def decoder_run(images: float) -> Run:
    parts = [decoder(1152, TRAINABLE), encoder(transformers.SiglipVisionModel, SIGLIP)]
    preset = train_decoder.PRESETS["scale-rae-siglip2"]
    return Run(parts, preset, round(images / preset["batch"]))


RUNS = {
    "DiT-DH-XL, ImageNet 256, 80 epochs": partial(class_run, "dit-dh-xl-imagenet256", 80),
    "DiT-DH-XL, ImageNet 256, 800 epochs": partial(class_run, "dit-dh-xl-imagenet256", 800),
    "DiT-DH-XL, ImageNet 512, 800 epochs": partial(class_run, "dit-dh-xl-imagenet512", 800, 1024),
    "decoder ViT-XL, 102M images, L1 alone": partial(decoder_run, 102.4e6),
    "0.5B + 1.5B, 30k steps": partial(text_run, "scale-rae-0.5b", "1.5B"),
    "0.5B + 1.5B frozen, 30k": partial(text_run, "scale-rae-0.5b", "1.5B", passes=FROZEN),
    "2.4B + 1.5B, 30k": partial(text_run, "scale-rae-2.4b", "1.5B"),
    "2.4B + 1.5B frozen, 30k": partial(text_run, "scale-rae-2.4b", "1.5B", passes=FROZEN),
    "2.4B + 1.5B, 60k": partial(text_run, "scale-rae-2.4b", "1.5B", 60_000),
    "9.8B + 7B, 30k": partial(text_run, "scale-rae-9.8b", "7B"),
    "9.8B + 7B frozen, 30k": partial(text_run, "scale-rae-9.8b", "7B", passes=FROZEN),
    "9.8B + 7B, 60k": partial(text_run, "scale-rae-9.8b", "7B", 60_000),
}


# -----------------------------------------------------------------------------------------------------------
# cost of a run


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(part: Part) -> int:
    """Bytes that autograd saves of one sample for the backward pass, without the weights and without the
    attention matrices, which fused attention does not keep."""
    weights = {p.untyped_storage()._cdata for p in [*part.module.parameters(), *part.module.buffers()]}
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_attention = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]
        if storage._cdata not in weights and not is_attention:
            saved[storage._cdata] = storage  # a reference, so that the address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        part.forward(part.module)
    return sum(storage.nbytes() for storage in saved.values())


@dataclass
class Cost:
    trainable: int = 0  # parameters
    flops: int = 0  # of one sample, forward and backward
    sharded: int = 0  # bytes over all GPUs of a node: fp32 weights, gradients, AdamW's moments, EMA
    replicated: int = 0  # bytes on every GPU: fp32 weights of the modules without gradients
    gathered: int = 0  # bytes on every GPU: fp32 and bf16 weights of two blocks and of all outside the blocks
    traffic: int = 0  # bytes that a GPU moves in a step: fp32 weights twice, and gradients
    # bytes of one sample: logits, and what the blocks keep, or if they are checkpointed their fp32 inputs and
    # everything inside one
    sample: int = 0

    def fixed(self, gpus: int) -> float:
        """GB on each GPU without samples."""
        return (self.sharded / min(gpus, NODE) + self.replicated + (gpus > 1) * self.gathered) / 1e9

    def fits(self, gpus: int, memory: float) -> int:
        """Samples that fit on each GPU of so many GB; 0 where not even the weights do."""
        return max(0, int((memory - self.fixed(gpus)) * 1e9 // self.sample))

    def seconds(self, batch: int, gpus: int, config: Config) -> dict[str, float]:
        """Of a step, by what they are spent on."""
        gpu = GPUS[config.gpu]
        return {
            "compute": batch * self.flops / (gpus * common.PEAK_FLOPS[config.gpu] * config.mfu),
            "NVLink": self.traffic / (gpu.nvlink * 1e9) * (gpus > 1),
            # a GPU's shard of the fp32 gradients, 4 bytes out and 4 bytes in
            "network": 8 * self.trainable / NODE / (gpu.network * 1e9) * (gpus > NODE),
        }

    def limit(self, batch: int, gpus: int, config: Config) -> str:
        """What limits the speed, or makes the run impossible."""
        if not self.fits(gpus, GPUS[config.gpu].memory):
            return "memory"
        seconds = self.seconds(batch, gpus, config)
        return "batch" if gpus > batch else max(seconds, key=seconds.get)


def cost_of(run: Run) -> Cost:
    """Of a run whose modules are on the meta device."""
    cost, largest_block = Cost(), 0
    for part in run.parts:
        parameters = size(part.module)
        if part.passes:
            with torch.no_grad():
                cost.flops += part.passes * common.flops_of(partial(part.forward, part.module))
        if part.passes < FROZEN:
            cost.replicated += 4 * parameters
            continue
        blocks = max((m for m in part.module.modules() if isinstance(m, nn.ModuleList)), key=len)
        is_trainable = part.passes == TRAINABLE
        cost.trainable += parameters * is_trainable
        cost.sharded += parameters * (16 + 4 * bool(run.preset["ema"]) if is_trainable else 4)
        cost.traffic += parameters * (12 if is_trainable else 8)
        cost.gathered += 6 * (parameters - size(blocks) + 2 * size(blocks[0]))
        if run.preset.get("activation_checkpointing"):
            cost.sample += 4 * run.tokens * part.width * len(blocks)
            largest_block = max(largest_block, saved_bytes(part) // 2 // len(blocks))  # // 2: bf16
        else:
            cost.sample += 3 * saved_bytes(part) // 8  # bf16, and compiled
        vocabulary = getattr(getattr(part.module, "config", None), "vocab_size", 0)
        cost.sample += SUPERVISED * vocabulary * (2 + 4 + 4)  # logits in bf16 and fp32, and their gradients
    cost.sample += largest_block
    return cost


def build(name: str) -> tuple[Run, Cost]:
    with torch.device("meta"):
        run = RUNS[name]()
        for part in run.parts:
            part.module.to("meta")  # some buffers are drawn on the CPU
        return run, cost_of(run)


# -----------------------------------------------------------------------------------------------------------
# tables


def table(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def memory_table(costs: dict[str, tuple[Run, Cost]], config: Config) -> str:
    peak = common.PEAK_FLOPS[config.gpu]
    head = ["run", "trainable", "GFLOP per sample", f"samples/s at the peak of one {config.gpu}"]
    head += ["GB without samples on 1, 8, 64 GPUs", "blocks are checkpointed", "MB per sample"]
    rows = [head + ["samples that fit on 1 GPU of 24, 80, 141 GB", "on each of 8 GPUs"]]
    for name, (run, cost) in costs.items():
        row = [name, f"{cost.trainable / 1e9:.2f}B", f"{cost.flops / 1e9:,.0f}", f"{peak / cost.flops:,.0f}"]
        row.append(", ".join(f"{cost.fixed(gpus):.1f}" for gpus in (1, 8, 64)))
        row += ["yes" if run.preset.get("activation_checkpointing") else "no", f"{cost.sample / 1e6:.0f}"]
        for gpus in (1, 8):
            row.append(", ".join(str(cost.fits(gpus, memory) or "-") for memory in (24, 80, 141)))
        rows.append(row)
    return table(rows)


def time_table(costs: dict[str, tuple[Run, Cost]], config: Config) -> str:
    head = ["run", "PFLOP per step", "seconds per step: compute, NVLink, network", "hours", "GPU hours"]
    rows = [head + ["limited by, on 64, 512, 4096 GPUs"]]
    for name, (run, cost) in costs.items():
        seconds = cost.seconds(run.batch, config.gpus, config).values()
        hours = run.steps * max(seconds) / 3600
        row = [name, f"{run.batch * cost.flops / 1e15:.1f}", ", ".join(f"{s:.2f}" for s in seconds)]
        row += [f"{hours:.1f}", f"{hours * config.gpus:,.0f}"]
        rows.append(row + [", ".join(cost.limit(run.batch, gpus, config) for gpus in (64, 512, 4096))])
    return table(rows)


def main() -> None:
    config = common.parse(Config, __doc__)
    costs = {name: build(name) for name in RUNS}
    gpu, peak = GPUS[config.gpu], common.PEAK_FLOPS[config.gpu]
    print(f"""# What the papers' runs take, on paper

`{" ".join(["python", *sys.argv])}`; the assumptions are at the top of `docs/plan.py`.

Computed, not measured. {TOKENS - 256} tokens of text beside an image's 256, {SUPERVISED} of them supervised.
Fragmentation and the allocator's reserve are not included.

{memory_table(costs, config)}

On {config.gpus} {config.gpu} of {peak / 1e12:.0f} TFLOP/s at an MFU of {config.mfu:.0%};
{gpu.nvlink} GB/s inside a node of {NODE}, {gpu.network} GB/s between nodes.
"batch": there are more GPUs than samples in a batch.

{time_table(costs, config)}""")


if __name__ == "__main__":
    common.main(main)
