"""What the papers' training runs would take, on paper: memory, time and traffic. Nothing is measured.

    python docs/plan.py --gpus 64 > docs/plan.md
    python docs/plan.py --gpu H100 --gpus 512 --mfu 0.45

The models are built on the meta device, where they take no memory. torch counts the FLOPs of one sample's
forward pass and the bytes that autograd saves for the backward pass. The assumptions:

    compute   bf16 on fp32 weights; the blocks are checkpointed, and their recomputation is not in the MFU
    sharding  --shard full on up to 8 GPUs, --shard hybrid on more: only gradients travel between nodes
    time      the slowest of compute, NVLink and network, which overlap
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import rae  # noqa: E402
from bench import DINOV2, QWEN, SIGLIP, count_flops  # noqa: E402
from common import flag  # noqa: E402


@dataclass
class Gpu:
    tflops: int  # dense bf16 TFLOP/s
    memory: int  # GB
    nvlink: int  # GB/s to the other GPUs of a node of 8
    network: int  # GB/s to other nodes


GPUS = {
    "A100": Gpu(312, 80, 300, 25),
    "H100": Gpu(989, 80, 450, 50),
    "H200": Gpu(989, 141, 450, 50),
    "B200": Gpu(2250, 180, 900, 50),
}
NODE = 8  # GPUs

TOKENS = 256 + 64  # in a conversation: an image and the text around it
SUPERVISED = 24  # of them: their logits over the vocabulary are computed and kept


@dataclass
class Config:
    gpu: str = flag("H200", "type of the GPUs", choices=GPUS)
    gpus: int = flag(8, "number of GPUs", at_least=1)
    mfu: float = flag(0.4, "fraction of the GPU's bf16 peak that a run reaches")


# -----------------------------------------------------------------------------------------------------------
# the papers' runs

# How a module takes part in a step, as the number of forward passes that its FLOPs amount to.
TRAINABLE = 3  # forward, gradients of the activations, gradients of the weights
FROZEN = 2  # forward, gradients of the activations, on their way to a trainable module
NO_GRAD = 1  # forward
IDLE = 0  # only decodes the sample images at checkpoints


@dataclass
class Component:
    module: nn.Module
    forward: Callable[[nn.Module], Tensor]  # of one sample
    width: int  # of the residual stream
    passes: int


@dataclass
class Run:
    components: list[Component]
    batch: int
    steps: int
    ema: bool = False


def encoder(config: dict, model_class: type[nn.Module]) -> Component:
    model = model_class(model_class.config_class(**config))
    images = torch.zeros(1, 3, 224, 224)
    return Component(model, lambda m: m(images).last_hidden_state, model.config.hidden_size, NO_GRAD)


def decoder(channels: int, passes: int) -> Component:
    model = rae.Decoder((256, channels), 14, **rae.DECODERS["ViT-XL"])
    return Component(model, lambda m: m(torch.zeros(1, 256, channels)), 1152, passes)


def dit(channels: int, config: dict, condition: Tensor) -> Component:
    model = rae.DiT((256, channels), **config)
    inputs = torch.zeros(1, 256, channels), torch.zeros(1), condition
    return Component(model, lambda m: m(*inputs), config["width"], TRAINABLE)


def language_model(size: str, passes: int) -> Component:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN[size]))
    width = model.config.hidden_size
    inputs = torch.zeros(1, TOKENS, width)

    def forward(m: nn.Module) -> Tensor:
        return m.lm_head(m.model(inputs_embeds=inputs).last_hidden_state[:, :SUPERVISED])

    return Component(model, forward, width, passes)


def text_run(dit_size: str, qwen_size: str, steps: int = 30_000, passes: int = TRAINABLE) -> Run:
    width = rae.DITS[dit_size]["width"]
    config = rae.DITS[dit_size] | {"condition_width": width}
    components = [dit(1152, config, torch.zeros(1, 256, width)), language_model(qwen_size, passes)]
    components += [encoder(SIGLIP, transformers.SiglipVisionModel), decoder(1152, IDLE)]
    return Run(components, batch=2048, steps=steps)


def class_run(epochs: int) -> Run:
    config = rae.class_dit("DiT-DH-XL", 1000)
    components = [dit(768, config, torch.zeros(1, dtype=torch.long))]
    components += [encoder(DINOV2, transformers.Dinov2WithRegistersModel), decoder(768, IDLE)]
    return Run(components, batch=1024, steps=epochs * 1251, ema=True)


def decoder_run(images: float) -> Run:
    components = [decoder(1152, TRAINABLE), encoder(SIGLIP, transformers.SiglipVisionModel)]
    return Run(components, batch=512, steps=round(images / 512), ema=True)


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


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def saved_bytes(component: Component) -> int:
    """Bytes that autograd saves of one sample for the backward pass, without the weights."""
    module = component.module
    weights = {p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]}
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # a reference, so that the address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        component.forward(module)
    return sum(storage.nbytes() for storage in saved.values())


@dataclass
class Cost:
    trainable: int = 0  # parameters
    flops: int = 0  # of one sample, forward and backward
    sharded: int = 0  # bytes over all GPUs of a node: fp32 weights, gradients, AdamW's moments, EMA
    replicated: int = 0  # bytes on every GPU: fp32 weights of the modules that get no gradients
    gathered: int = 0  # bytes on every GPU: fp32 and bf16 weights of two blocks and of all outside the blocks
    traffic: int = 0  # bytes that a GPU moves in a step: fp32 weights twice, and gradients
    sample: int = 0  # bytes of one sample: fp32 inputs of all blocks, everything inside one block, logits

    def fixed(self, gpus: int) -> float:
        """GB on each GPU without samples."""
        return (self.sharded / min(gpus, NODE) + self.replicated + (gpus > 1) * self.gathered) / 1e9

    def fits(self, gpus: int, memory: float) -> int:
        """Samples that fit on each GPU of so many GB; 0 where not even the weights do."""
        return max(0, int((memory - self.fixed(gpus)) * 1e9 // self.sample))

    def seconds(self, batch: int, gpus: int, gpu: Gpu, mfu: float) -> dict[str, float]:
        """Of a step, by what they are spent on."""
        return {
            "compute": batch * self.flops / (gpus * gpu.tflops * 1e12 * mfu),
            "NVLink": self.traffic / (gpu.nvlink * 1e9) * (gpus > 1),
            # fp32 gradients are summed once more over the nodes: 4 bytes, there and back, an eighth each
            "network": 8 * self.trainable / NODE / (gpu.network * 1e9) * (gpus > NODE),
        }


def cost_of(run: Run) -> Cost:
    """Of a run whose modules are on the meta device."""
    cost, largest_block = Cost(), 0
    for component in run.components:
        module, passes = component.module, component.passes
        parameters = count(module)
        with torch.device("meta"):
            cost.flops += passes * count_flops(partial(component.forward, module)) if passes else 0
        if passes < FROZEN:
            cost.replicated += 4 * parameters
            continue
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        blocks = max(lists, key=len)
        if passes == TRAINABLE:
            cost.trainable += parameters
            cost.sharded += (16 + 4 * run.ema) * parameters
            cost.traffic += 12 * parameters
        else:
            cost.sharded += 4 * parameters
            cost.traffic += 8 * parameters
        cost.gathered += 6 * (parameters - count(blocks) + 2 * count(blocks[0]))
        cost.sample += 4 * TOKENS * component.width * len(blocks)
        with torch.device("meta"):
            largest_block = max(largest_block, saved_bytes(component) // 2 // len(blocks))  # fp32 -> bf16
        vocabulary = getattr(getattr(module, "config", None), "vocab_size", 0)
        cost.sample += SUPERVISED * vocabulary * (2 + 4 + 4)  # logits in bf16, in fp32, and their gradients
    cost.sample += largest_block
    return cost


# -----------------------------------------------------------------------------------------------------------
# tables


def table(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def memory_table(costs: dict[str, tuple[Run, Cost]], config: Config) -> str:
    peak = GPUS[config.gpu].tflops * 1e12
    rows = [
        ["run", "trainable", "GFLOP per sample", f"samples/s at the peak of one {config.gpu}",
         "GB without samples on 1, 8, 64 GPUs", "MB per sample",
         "samples that fit on 1 GPU of 24, 80, 141 GB", "on each of 8 GPUs"]
    ]  # fmt: skip
    for name, (_, cost) in costs.items():
        fixed = ", ".join(f"{cost.fixed(gpus):.1f}" for gpus in (1, 8, 64))
        row = [name, f"{cost.trainable / 1e9:.2f}B", f"{cost.flops / 1e9:,.0f}", f"{peak / cost.flops:,.0f}"]
        row += [fixed, f"{cost.sample / 1e6:.0f}"]
        for gpus in (1, 8):
            row.append(", ".join(str(cost.fits(gpus, memory) or "-") for memory in (24, 80, 141)))
        rows.append(row)
    return table(rows)


def limit(run: Run, cost: Cost, gpus: int, config: Config) -> str:
    """What limits the speed first."""
    if not cost.fits(gpus, GPUS[config.gpu].memory):
        return "memory"
    seconds = cost.seconds(run.batch, gpus, GPUS[config.gpu], config.mfu)
    return "batch" if gpus > run.batch else max(seconds, key=seconds.get)


def time_table(costs: dict[str, tuple[Run, Cost]], config: Config) -> str:
    rows = [
        ["run", "PFLOP per step", "seconds per step: compute, NVLink, network", "hours", "GPU hours",
         "limited by, on 64, 512, 4096 GPUs"]
    ]  # fmt: skip
    for name, (run, cost) in costs.items():
        seconds = cost.seconds(run.batch, config.gpus, GPUS[config.gpu], config.mfu).values()
        hours = run.steps * max(seconds) / 3600
        row = [name, f"{run.batch * cost.flops / 1e15:.1f}", ", ".join(f"{s:.2f}" for s in seconds)]
        row += [f"{hours:.1f}", f"{hours * config.gpus:,.0f}"]
        row.append(", ".join(limit(run, cost, gpus, config) for gpus in (64, 512, 4096)))
        rows.append(row)
    return table(rows)


def main() -> None:
    config = common.parse(Config, __doc__)
    costs = {}
    for name, build in RUNS.items():
        with torch.device("meta"):
            run = build()
        for component in run.components:
            component.module.to("meta")  # some buffers are drawn on the CPU
        costs[name] = run, cost_of(run)
    gpu = GPUS[config.gpu]
    print(
        f"""# What the papers' runs take, on paper

`{" ".join(["python", *sys.argv])}`; the top of `docs/plan.py` has the assumptions.

Computed, not measured. bf16 compute on fp32 weights, checkpointed blocks; {TOKENS - 256} tokens of text beside
an image's 256, {SUPERVISED} of them supervised. Fragmentation and the allocator's reserve are not included.

{memory_table(costs, config)}

On {config.gpus} {config.gpu} of {gpu.tflops} TFLOP/s at an MFU of {config.mfu:.0%}, which does not count recomputation;
{gpu.nvlink} GB/s inside a node of {NODE}, {gpu.network} GB/s between nodes.

{time_table(costs, config)}"""
    )


if __name__ == "__main__":
    common.main(main)
