"""What the papers' training runs would take, on paper: memory, time and traffic. Nothing is measured.

    python docs/plan.py --gpus 64 > docs/plan.md
    python docs/plan.py --gpu H100 --gpus 512 --mfu 0.45

The models are built on the meta device, where they take no memory. torch counts the FLOPs of one sample's
forward pass and the bytes that autograd saves for the backward pass. The assumptions:

    compute   bf16 on fp32 weights; checkpointed blocks, whose recomputation is not in the MFU
    sharding  --shard full on up to 8 GPUs, --shard hybrid on more: only gradients travel between nodes
    time      the largest of compute, NVLink and network, as if they overlapped perfectly
"""

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
from bench import DINOV2, QWEN, SIGLIP, flops_of  # noqa: E402
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
    batch: int
    steps: int
    ema: bool = False


def encoder(model_class: type[nn.Module], config: dict) -> Part:
    model, images = model_class(model_class.config_class(**config)), torch.zeros(1, 3, 224, 224)
    return Part(model, lambda m: m(images).last_hidden_state, model.config.hidden_size, NO_GRAD)


def decoder(channels: int, passes: int) -> Part:
    model = rae.Decoder((256, channels), 14, **rae.DECODERS["ViT-XL"])
    return Part(model, lambda m: m(torch.zeros(1, 256, channels)), 1152, passes)


def dit(channels: int, config: dict, condition: Tensor) -> Part:
    model = rae.DiT((256, channels), **config)
    inputs = torch.zeros(1, 256, channels), torch.zeros(1), condition
    return Part(model, lambda m: m(*inputs), config["width"], TRAINABLE)


def language_model(size: str, passes: int) -> Part:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN[size]))
    width = model.config.hidden_size
    embeddings = torch.zeros(1, TOKENS, width)

    def forward(m: nn.Module) -> Tensor:
        return m.lm_head(m.model(inputs_embeds=embeddings).last_hidden_state[:, :SUPERVISED])

    return Part(model, forward, width, passes)


def text_run(dit_size: str, qwen_size: str, steps: int = 30_000, passes: int = TRAINABLE) -> Run:
    width = rae.DITS[dit_size]["width"]
    config = rae.DITS[dit_size] | {"condition_width": width}
    parts = [dit(1152, config, torch.zeros(1, 256, width)), language_model(qwen_size, passes)]
    parts += [encoder(transformers.SiglipVisionModel, SIGLIP), decoder(1152, IDLE)]
    return Run(parts, batch=2048, steps=steps)


def class_run(epochs: int) -> Run:
    parts = [dit(768, rae.class_dit("DiT-DH-XL", 1000), torch.zeros(1, dtype=torch.long))]
    parts += [encoder(transformers.Dinov2WithRegistersModel, DINOV2), decoder(768, IDLE)]
    return Run(parts, batch=1024, steps=epochs * 1251, ema=True)


def decoder_run(images: float) -> Run:
    parts = [decoder(1152, TRAINABLE), encoder(transformers.SiglipVisionModel, SIGLIP)]
    return Run(parts, batch=512, steps=round(images / 512), ema=True)


RUNS = {
    "DiT-DH-XL, ImageNet 256, 80 epochs": partial(class_run, 80),
    "DiT-DH-XL, ImageNet 256, 800 epochs": partial(class_run, 800),
    "decoder ViT-XL, 73M images, L1 alone": partial(decoder_run, 73e6),
    "0.5B + 1.5B, 30k steps": partial(text_run, "0.5B", "1.5B"),
    "0.5B + 1.5B frozen, 30k": partial(text_run, "0.5B", "1.5B", passes=FROZEN),
    "2.4B + 1.5B, 30k": partial(text_run, "2.4B", "1.5B"),
    "2.4B + 1.5B frozen, 30k": partial(text_run, "2.4B", "1.5B", passes=FROZEN),
    "2.4B + 1.5B, 60k": partial(text_run, "2.4B", "1.5B", 60_000),
    "9.8B + 7B, 30k": partial(text_run, "9.8B", "7B"),
    "9.8B + 7B frozen, 30k": partial(text_run, "9.8B", "7B", passes=FROZEN),
    "9.8B + 7B, 60k": partial(text_run, "9.8B", "7B", 60_000),
}


# -----------------------------------------------------------------------------------------------------------
# cost of a run


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(part: Part) -> int:
    """Bytes that autograd saves of one sample for the backward pass, without the weights. The meta device has
    no fused attention: the attention matrices are in it."""
    weights = {p.untyped_storage()._cdata for p in [*part.module.parameters(), *part.module.buffers()]}
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
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
    sample: int = 0  # bytes of one sample: fp32 inputs of all blocks, everything inside one block, logits

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
                cost.flops += part.passes * flops_of(partial(part.forward, part.module))
        if part.passes < FROZEN:
            cost.replicated += 4 * parameters
            continue
        blocks = max((m for m in part.module.modules() if isinstance(m, nn.ModuleList)), key=len)
        is_trainable = part.passes == TRAINABLE
        cost.trainable += parameters * is_trainable
        cost.sharded += parameters * (16 + 4 * run.ema if is_trainable else 4)
        cost.traffic += parameters * (12 if is_trainable else 8)
        cost.gathered += 6 * (parameters - size(blocks) + 2 * size(blocks[0]))
        cost.sample += 4 * TOKENS * part.width * len(blocks)
        largest_block = max(largest_block, saved_bytes(part) // 2 // len(blocks))  # // 2: bf16
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
    head += ["GB without samples on 1, 8, 64 GPUs", "MB per sample"]
    rows = [head + ["samples that fit on 1 GPU of 24, 80, 141 GB", "on each of 8 GPUs"]]
    for name, (_, cost) in costs.items():
        row = [name, f"{cost.trainable / 1e9:.2f}B", f"{cost.flops / 1e9:,.0f}", f"{peak / cost.flops:,.0f}"]
        row.append(", ".join(f"{cost.fixed(gpus):.1f}" for gpus in (1, 8, 64)))
        row.append(f"{cost.sample / 1e6:.0f}")
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

{time_table(costs, config)}""")


if __name__ == "__main__":
    common.main(main)
