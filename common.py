"""What the scripts share: flags, distributed set-up, optimizer step, files, checkpoints, log."""

import argparse
import copy
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import operator
import os
import platform
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, get_args

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

import convert
import rae

WEIGHTS = Path(os.path.relpath(Path(__file__).parent / "nano" / "weights"))  # shipped with the repository
LONG_TIMEOUT = 12 * 60  # minutes, for ranks that finish sampling or encoding early and wait for the slowest
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12}
PEAK_FLOPS |= {"H200": 989e12, "B200": 2250e12}  # dense bf16, by device name; the first that fits

transformers.logging.disable_progress_bar()  # one for each small folder that is read
# every checkpoint of a single process would warn of it
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every data loading process prints a warning

# -----------------------------------------------------------------------------------------------------------
# flags


def flag(default, help: str, **kwargs):
    """A field of a config dataclass. `at_least`, `at_most` and `above` bound a number; the other options are
    argparse's."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


BOUNDS = {  # option of `flag`: what a refusal says, and whether a number is within
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "above": ("more than", operator.gt),
}
DTYPES = ("auto", "bf16", "fp32")
SHARDING = ("none", "full", "hybrid")


@dataclass
class TrainConfig:
    """The flags that both trainers share."""

    out: str = flag("runs/train", "folder of this run")
    resume: str = flag(
        "", "continue from OUT's newest checkpoint, or a given one, with the flags of OUT/config.json",
        nargs="?", const="auto",
    )  # fmt: skip
    seed: int = flag(0, "seed of weights, data order, noise and every other random draw")
    batch: int = flag(64, "samples per step, over all ranks", at_least=1)
    grad_accum: int = flag(1, "gradient accumulation: micro-batches per step and rank", at_least=1)
    dtype: str = flag("auto", "compute dtype; auto: bf16 on CUDA, else fp32 (on CUDA TF32)", choices=DTYPES)
    shard: str = flag("none", "FSDP2 sharding: full (all ranks) or hybrid (within a node)", choices=SHARDING)
    activation_checkpointing: bool = flag(False, "recompute the blocks in backward, to save memory")
    compile: bool | None = flag(None, "torch.compile the transformer blocks (default: on CUDA)")
    workers: int = flag(1, "data loading processes per rank", at_least=0)
    log_every: int = flag(50, "steps between log lines", at_least=1)
    save_every: int = flag(500, "steps between checkpoints, each with a grid of samples", at_least=1)
    keep: int = flag(2, "newest checkpoints to keep", at_least=1)
    wandb: str = flag("", "also log to this Weights & Biases project", metavar="PROJECT")

    given: ClassVar[frozenset] = frozenset()  # names of the flags on the command line
    resumed: ClassVar[bool] = False  # whether the other values are those of OUT/config.json


def parse(config: type, manual: str, presets: dict[str, dict] | None = None):
    """A config from the command line; `manual` is shown by --help. A tuple field is positional."""
    # ---- flags: with SUPPRESS as their default, only those on the command line are returned
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    preset = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    base = {}
    if presets:
        help = "values for the flags below (default nano)"
        preset.add_argument("--preset", choices=presets, default="nano", help=help)
        # known first: --help shows its values
        base = presets[preset.parse_known_args()[0].preset]
    parser = argparse.ArgumentParser(description=manual, parents=[preset], **options)
    for field in dataclasses.fields(config):
        add_argument(parser, field, base.get(field.name, field.default))
    flags = vars(parser.parse_args())
    flags.pop("preset", None)
    # ---- values: the dataclass's defaults, then --preset's (with --resume OUT/config.json's), then the flags
    saved = Path((base | flags).get("out", getattr(config, "out", ""))) / "config.json"
    if flags.get("resume") and saved.is_file():
        try:
            base = dict(json.loads(saved.read_text())) | {"out": str(saved.parent)}  # it may have moved
            config(**base)  # a TypeError names a value that this script does not know
        except (ValueError, TypeError) as error:
            raise ValueError(f"cannot read {saved}: {one_line(error)}") from error
    values = config(**(base | flags))
    values.given, values.resumed = set(flags), bool(flags.get("resume") and saved.is_file())
    # ---- checks: argparse has not seen the values of a config.json
    for field in dataclasses.fields(config):
        check_value(field, getattr(values, field.name))
    return values


def check_value(field: dataclasses.Field, value) -> None:
    """Raises ValueError for a value that its flag cannot have."""
    name, choices = "--" + field.name.replace("_", "-"), field.metadata.get("choices")
    types = get_args(field.type) or (field.type,)
    if isinstance(field.default, tuple):
        return
    if not isinstance(value, (*types, int) if float in types else types):
        raise ValueError(f"{name} {value!r}: give {types[0].__name__}")
    if choices is not None and value not in choices:
        raise ValueError(f"{name} {value}: choose from {', '.join(choices)}")
    if field.name == "out" and not value:
        raise ValueError("--out is empty: name a folder or file to write to")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} {value}: give a finite number")
    if isinstance(value, int) and abs(value) > 2**63:
        raise ValueError(f"{name} {value}: give a number of 64 bits")
    for option, (words, is_within) in BOUNDS.items():
        bound = field.metadata.get(option)
        if bound is not None and value is not None and not is_within(value, bound):
            raise ValueError(f"{name} {value}: give {words} {bound}")


def add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, default) -> None:
    kwargs = {key: value for key, value in field.metadata.items() if key not in BOUNDS}
    # a field with a tuple as its default takes all positional arguments
    if isinstance(field.default, tuple):
        parser.add_argument(field.name, type=str, **kwargs)
        return
    # "int | None" is an int or None
    type_ = get_args(field.type)[0] if get_args(field.type) else field.type
    if default not in (None, ""):
        kwargs["help"] += f" (default {default})"
    # --compile and --no-compile
    if type_ is bool:
        kwargs["action"] = argparse.BooleanOptionalAction
    else:
        kwargs["type"] = type_
    parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kwargs)


def main(run: Callable[[], None]) -> None:
    """Runs a script. A user's mistake (ValueError, OSError) ends in one line; TRACEBACK=1 shows all of it."""
    try:
        run()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        is_mistake = isinstance(error, (ValueError, OSError)) and not os.environ.get("TRACEBACK")
        if not is_mistake and not dist.is_initialized():
            raise
        if is_mistake:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if dist.is_initialized():
            # leave at once: tidying up would wait for the other processes
            os._exit(1)
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """The most informative line of an error message."""
    # torch.distributed.checkpoint collects the errors of all ranks: the first stands for them
    for failure, _ in getattr(error, "failures", {}).values():
        return one_line(failure)
    # a data loading process's message is its traceback, which ends with the error
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Original Traceback" in str(error) else 0]


# -----------------------------------------------------------------------------------------------------------
# distributed set-up


@dataclass
class DistContext:
    """Where this process runs: alone, or as one of `world_size` that torchrun started."""

    device: torch.device
    rank: int
    world_size: int
    dtype: torch.dtype  # of the compute; parameters are fp32
    mesh: "torch.distributed.DeviceMesh | None" = None  # (replicate, shard), if weights are sharded

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def peak_flops(self) -> float | None:
        """Of one device in bf16, if it is known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.world_size == 1:
            return f"{self.device.type}, 1 process, {dtype} compute, fp32 weights"
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        replicas, shards = self.mesh.shape if self.mesh else (self.world_size, 1)
        processes = f"{self.device.type}, {self.world_size} processes ({backend})"
        return f"{processes}, {dtype} compute, fp32 weights, {replicas} replicas of {shards} shards"


def init_distributed(dtype: str = "auto", shard: str = "none", minutes: int = 30) -> DistContext:
    """Picks device and compute dtype, joins torchrun's process group and lays out FSDP2 sharding: none
    (replicate), full (across all ranks) or hybrid (within a node). minutes: how long a rank waits for the
    others before it gives up."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        # launchers other than torchrun do not set LOCAL_RANK
        local_rank = int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count()))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    elif torch.backends.mps.is_available() and world_size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        # for models small enough for a CPU, plain matmuls are faster than its flash kernel
        torch.backends.cuda.enable_flash_sdp(False)
    mesh = None
    if world_size > 1:
        # gloo beside NCCL: counts and signals are summed on the CPU, without a host-device sync
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        # launchers other than torchrun do not set LOCAL_WORLD_SIZE
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.cuda.device_count() or world_size))
        shards = {"none": 1, "full": world_size, "hybrid": per_node}[shard]
        if shards > 1:
            names = ("replicate", "shard")
            mesh = dist.init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=names)
    name = ("bf16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype
    return DistContext(device, rank, world_size, {"bf16": torch.bfloat16, "fp32": torch.float32}[name], mesh)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy without weights: its tensors are on the meta device."""
    memo = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)


def build(make: Callable[[], nn.Module], dist_ctx: DistContext) -> nn.Module:
    """The module that `make` returns. With --shard only the main process makes it, and the others get its
    skeleton: a node's memory holds it once, not once for every GPU."""
    if dist_ctx.mesh is None:
        return make()
    whole = []

    def outline() -> nn.Module:
        whole.append(make())
        return skeleton(whole[0])

    outlined = from_main(outline, dist_ctx)
    return whole[0] if whole else outlined


def twin(module: nn.Module, dist_ctx: DistContext) -> nn.Module:
    """A copy to give to `shard_model`: with --shard only the skeleton, which that fills."""
    return copy.deepcopy(module) if dist_ctx.mesh is None else skeleton(module)


def shard_model(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    dist_ctx: DistContext,
    *methods: str,
    whole: nn.Module | None = None,
) -> None:
    """Moves a module to the device. With --shard, FSDP2 spreads it over ranks, one block at a time: every
    rank has to run every block, in the same order. `methods` are entry points beside `forward`. A skeleton
    gets the weights of the main process's `whole`.

    Gradients are summed over ranks, not averaged, because losses are divided by global counts: here by FSDP,
    without --shard by `Optimizers.step`."""
    if dist_ctx.mesh is None:
        module.to(dist_ctx.device)
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # a 2-D mesh is hybrid sharding: gradients are also summed over replicas
    mesh = dist_ctx.mesh if dist_ctx.mesh.shape[0] > 1 else dist_ctx.mesh["shard"]
    # FSDP splits dimension 0, so that tables (1, N, D) would be padded to a whole table for every rank.
    tables = {p for p in module.parameters() if p.shape[:1] == (1,) and not p.requires_grad}
    is_skeleton = any(p.is_meta for p in module.parameters())
    policy = MixedPrecisionPolicy()
    if dist_ctx.dtype != torch.float32 and dist_ctx.device.type == "cuda":
        # Blocks are gathered in bf16: half the bytes, and no copies for autocast. The rest stays fp32.
        policy = MixedPrecisionPolicy(dist_ctx.dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=tables)
    for part in (*blocks, module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)
    if is_skeleton:
        fill(module, whole, dist_ctx)


def fill(module: nn.Module, whole: nn.Module | None, dist_ctx: DistContext) -> None:
    """Gives a sharded skeleton the main process's weights and buffers, a tensor at a time."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    module.to_empty(device=dist_ctx.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, whole.state_dict() if whole else {}, options=options)
    values = dict(whole.named_buffers()) if whole else {}
    for name, buffer in module.named_buffers():  # also those that a state dict leaves out
        if name in values:
            buffer.copy_(values[name])
        dist.broadcast(buffer, 0)


def compile_blocks(
    blocks: Iterable[nn.Module], enabled: bool | None, dist_ctx: DistContext, mode: str | None = None
) -> None:
    """Compiles the forward pass of each block; by default on CUDA only."""
    if dist_ctx.device.type == "cuda" if enabled is None else enabled:
        # Blocks share their code, and so one list of compiled variants: the default limit of 8 is soon
        # reached, and from then on blocks run eagerly. `forward` alone: FSDP's hooks around it stay eager.
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.forward = torch.compile(block.forward, mode=mode)


def cast_linear(blocks: Iterable[nn.Module], dist_ctx: DistContext) -> None:
    """Casts the linear layers to the compute dtype, for inference."""
    # once instead of at every call of autocast: the same results in half of the memory
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dist_ctx.dtype)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing: keeps the inputs of each block and recomputes the rest in backward."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:  # nothing in them is random: there is no dropout
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def global_sum(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_main(function: Callable, dist_ctx: DistContext):
    """What the function returns or raises on the main process, on all ranks."""
    outcome = [None, None]
    if dist_ctx.is_main:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if dist_ctx.world_size > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_or_nan(loss: Tensor) -> Tensor:
    """1 for a finite loss, else NaN, to start its backward pass with. A non-finite loss can have finite
    gradients; NaN makes the global gradient norm NaN, so that all ranks skip the step (see
    `Optimizers.step`)."""
    return torch.where(loss.isfinite(), 1.0, math.nan)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, for parameters that FSDP does not hold."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not hasattr(p, "device_mesh")]
    while gradients:
        # buckets of at most 64 MB: fewer messages than parameters
        bucket, size = [], 0
        while gradients and (not bucket or size + gradients[-1].numel() < 2**24):
            bucket.append(gradients.pop())
            size += bucket[-1].numel()
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def flops_of(call: Callable[[], object]) -> int:
    """FLOPs of a call; a multiplication and an addition are two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The math backend: torch does not count the CPU's attention kernel, and it counts what flash attention
    # recomputes in the backward pass.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@torch.no_grad()
def count_flops(module: nn.Module, *inputs: Tensor, **kwargs: Tensor) -> int:
    """FLOPs of a forward pass on meta tensors, where nothing is computed."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    on_meta = {name: tensor.detach().to("meta") for name, tensor in tensors}
    return flops_of(partial(torch.func.functional_call, module, on_meta, inputs, kwargs))


# -----------------------------------------------------------------------------------------------------------
# optimizer step, schedule, EMA


# Newton-Schulz coefficients of Polar Express (arXiv 2505.16932), one triple per iteration, as RAEv2 uses them
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
)


def orthogonalise(x: Tensor) -> Tensor:
    """Moves all singular values of matrices (..., out, in) close to 1."""
    # fp32, TF32 on a GPU: rounding to bf16 adds directions without a gradient, which would grow to full size
    x = x.float() / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for a, b, c in POLAR_EXPRESS:
        # for singular values up to 1.05, which rounding can make
        a, b, c = a / 1.05, b / 1.05**3, c / 1.05**5
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of a matrix (out, in) is orthogonalised and then scaled by 0.2
    sqrt(max(out, in)), the size of an AdamW update, so that both take the same learning rates (RAEv2).

    Groups may have `parts`, the number of projections fused in a matrix, each orthogonalised by itself; and
    `side`, the larger side without padding. If `found_inf` is 1, a step changes nothing, as in fused AdamW.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1, "side": None}
        super().__init__(params, defaults)
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self) -> None:
        """Each rank orthogonalises one of every world_size matrices and broadcasts it."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        matrices = [(p, group) for group in self.param_groups for p in group["params"]]
        matrices.sort(key=lambda pair: pair[0].numel())  # so that all ranks have as much to do
        for start in range(0, len(matrices), world_size):
            some, mine = matrices[start : start + world_size], None
            for owner, (p, group) in enumerate(some):
                momentum = self.momentum(p, group)
                if owner == rank:
                    mine = orthogonalise(momentum.unflatten(0, (group["parts"], -1))).flatten(0, 1)
            for owner, (p, group) in enumerate(some):
                update = mine.contiguous() if owner == rank else torch.empty(p.shape, device=p.device)
                if world_size > 1:
                    dist.broadcast(update, owner)
                self.apply(p, update, group)

    def momentum(self, p: Tensor, group: dict) -> Tensor:
        """Updates the momentum of a matrix, or of its shard. Returns the whole Nesterov momentum."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"]
        averaged = group["momentum"] * buffer + p.grad
        skip = self.found_inf.to(p.device) > 0
        local_tensor(buffer).copy_(torch.where(skip, local_tensor(buffer), local_tensor(averaged)))
        return full_tensor(p.grad + group["momentum"] * averaged)

    def apply(self, p: Tensor, update: Tensor, group: dict) -> None:
        """One step of a matrix, or of its shard."""
        skip = self.found_inf.to(p.device) > 0
        side = group["side"] or max(update.shape[0] // group["parts"], update.shape[1])
        if hasattr(p, "device_mesh"):
            update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
        weights = local_tensor(p)
        decayed = (1 - group["lr"] * group["weight_decay"]) * weights
        new = decayed - group["lr"] * 0.2 * math.sqrt(side) * local_tensor(update)
        weights.copy_(torch.where(skip, weights, new))


def muon_groups(module: nn.Module, matrices: list[nn.Parameter]) -> list[dict]:
    """The parameter groups of `Muon` for matrices of a module: what is fused in rae.py's layers is split."""
    treatment = {}
    for layer in module.modules():
        if isinstance(layer, rae.Attention):
            treatment[layer.qkv.weight] = (3, None)
        elif isinstance(layer, rae.SwiGLU):
            side = max(layer.hidden, layer.w3.out_features)
            treatment |= {layer.w12.weight: (2, side), layer.w3.weight: (1, side)}
    groups = defaultdict(list)
    for matrix in matrices:
        groups[treatment.get(matrix, (1, None))].append(matrix)
    return [{"params": params, "parts": n, "side": side} for (n, side), params in groups.items()]


class Optimizers:
    """One or more optimizers that step together: one gradient norm, one schedule, one decision to skip."""

    def __init__(self, *optimizers: torch.optim.Optimizer, clip: float = 1.0):
        self.optimizers, self.clip = optimizers, clip or math.inf  # clip 0: gradients are not clipped
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.groups:
            group["peak_lr"] = group["lr"]
        self.parameters = [p for group in self.groups for p in group["params"]]
        # counters on the device: counting does not wait for the GPU
        device = local_tensor(self.parameters[0]).device
        self.skipped, self.skipped_in_a_row, self.most_in_a_row = torch.zeros(3, device=device)
        self.init_state()

    def step(self) -> Tensor:
        """Sums the gradients over ranks, clips and applies them; returns their norm before clipping."""
        sum_gradients(self.parameters)
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        # A non-finite norm is the same on all ranks, so that all skip the step together. The decision stays
        # on the device: reading the norm would make every step wait for the GPU.
        skip = (~grad_norm.isfinite()).float()
        for optimizer in self.optimizers:
            # made for GradScaler: the kernel leaves weights and state alone if it is 1
            optimizer.found_inf = skip
            optimizer.step()
            optimizer.zero_grad()
        self.skipped += skip
        self.skipped_in_a_row.add_(1).mul_(skip)
        torch.maximum(self.most_in_a_row, self.skipped_in_a_row, out=self.most_in_a_row)
        return grad_norm

    def set_lr(self, factor: float) -> None:
        """Scales the learning rates that the optimizers were made with."""
        for group in self.groups:
            group["lr"] = group["peak_lr"] * factor

    def check_skipped(self) -> float:
        """The number of skipped steps; raises ValueError after ten in a row."""
        if self.most_in_a_row >= 10:
            raise ValueError("ten steps in a row had a non-finite loss or gradient: lower the learning rate")
        return self.skipped.item()

    def init_state(self) -> None:
        """Creates the optimizers' state, all zeros, into which a checkpoint can be loaded."""
        # a step of zero gradients at a learning rate of zero, which counts as none
        self.set_lr(0.0)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.step()
        self.set_lr(1.0)
        for _, state in self.state():
            if "step" in state:
                state["step"].zero_()

    def state(self) -> list[tuple[nn.Parameter, dict[str, Tensor]]]:
        return [item for optimizer in self.optimizers for item in optimizer.state.items()]


def cosine(step: int, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up from 1 / warmup, then half a cosine down to `floor`."""
    # not from 0, at which the first step would do nothing
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, start: int, end: int, floor: float) -> float:
    """Factor of the learning rate: 1 up to `start`, then a line down to `floor` at `end`."""
    progress = (step - start) / max(1, end - start)
    return 1 - (1 - floor) * min(max(progress, 0.0), 1.0)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) model, for the trainable parameters."""
    # the decay starts at 0.1 and grows, so that the initial weights are soon forgotten
    decay = min(decay, (1 + step) / (10 + step))
    pairs = [(a, b) for a, b in zip(ema.parameters(), model.parameters(), strict=True) if b.requires_grad]
    # one kernel for many tensors, on this rank's shards
    torch._foreach_lerp_([local_tensor(a) for a, _ in pairs], [local_tensor(b) for _, b in pairs], 1 - decay)


# -----------------------------------------------------------------------------------------------------------
# files: written beside the old one, then renamed


@contextmanager
def writing(path: Path):
    """Turns what a full disk raises into one OSError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {one_line(error)}") from error


def check_is_file(path: Path) -> None:
    """Raises ValueError where a file would take the place of a folder or a device."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is not a file: choose another name for the output")


def check_output(path: Path, suffix: str = "") -> None:
    """Before a long computation: raises ValueError or OSError if the file cannot be written in the end, or
    if its name ends in another suffix, because it could replace a file of another kind."""
    if suffix and path.suffix != suffix:
        raise ValueError(f"{path} would be a {suffix} file: give it a name that ends in {suffix}")
    check_is_file(path)
    # where a missing folder would be made: a command that is refused later leaves none behind
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    with writing(path), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def replacing(path: Path, folder: bool = False):
    """Yields a temporary path in the same folder, renamed to `path` on success. With `folder`, an old folder
    is deleted: the caller must allow it."""
    if not folder:
        check_is_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            yield temporary
            # a folder cannot be renamed onto another
            if folder and path.exists():
                path.rename(old)
            temporary.rename(path)
    finally:
        # if the second renaming failed, the old folder comes back
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            is_folder = leftover.is_dir() and not leftover.is_symlink()
            shutil.rmtree(leftover) if is_folder else leftover.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, but not what a link points to. It is renamed first, so that no crash leaves a part of
    it under its good name."""
    if not path.is_symlink():
        doomed = path.with_name(f".{path.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        shutil.rmtree(path.rename(doomed))


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises ValueError for NaN or infinity, which would become black pixels."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{what}: the model's result is not finite; check its weights, or try --dtype fp32")


def to_uint8(images: Tensor) -> Tensor:
    """The 8-bit values of a saved file, from images clamped to [0, 1]; on the CPU."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


def save_image(path: Path, pixels: Tensor, **text) -> None:
    """(3, H, W) in [0, 1] -> PNG, rounded to 8 bits, with `text` in its metadata."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    array = to_uint8(pixels).permute(1, 2, 0).numpy()
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)


def image_grid(images: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Tensor:
    """(B, 3, H, W) -> one image (3, H', W') in raster order on white, enlarged by the integer `scale`."""
    images = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    # white to the right of and below each image, and in the empty places of the last row
    missing = -len(images) % columns
    images = nn.functional.pad(images, (0, gap, 0, gap, 0, 0, 0, missing), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    return torch.cat(rows, dim=1)[:, :-gap, :-gap]


@contextmanager
def plotting(path: Path, *grid: int, **options):
    """Yields the axes of matplotlib's `subplots(*grid, **options)`; writes the figure to `path` as PNG."""
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*grid, **options)
    yield axes
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
    pyplot.close(figure)


def save_results(results: list[dict], seed: int, path: Path) -> None:
    """Rows {"metric", "value", "n"} as JSON, under one header with what it takes to reproduce them."""
    packages = ("torch", "transformers", "numpy", "torchmetrics", "torch-fidelity")
    content = {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n{path}")


def table(results: list[dict]) -> str:
    """Markdown. The metric psnr/objects is row psnr and column objects; in longer names, such as
    shapes/model/counting, the last part is the row."""
    cells, columns = defaultdict(dict), []
    for result in results:
        column, _, row = result["metric"].rpartition("/")
        if "/" not in column:
            column, row = row, column
        if column not in columns:
            columns.append(column)
        cells[row][column] = f"{result['value']:.3f}"
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for row, values in cells.items():
        lines.append([row, *(values.get(column, "") for column in columns)])
    return "\n".join("| " + " | ".join(f"{cell:19}" for cell in line) + " |" for line in lines)


def read_rows(path: Path, key: str = "step") -> list[dict]:
    """The rows of a metrics.jsonl, or of another .jsonl whose rows have a `key`; damaged lines, such as one
    that a crash cut off, are skipped."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get(key) is not None]


def plot_losses(metrics: Path, path: Path) -> None:
    """Losses and throughput over steps, from metrics.jsonl."""
    rows = read_rows(metrics)
    names = [name for name in dict.fromkeys(itertools.chain(*rows)) if name.endswith("loss")]
    if not names:
        return
    with plotting(path, 2, 1, figsize=(8, 8), sharex=True, dpi=100) as (losses, speed):
        for name in names:
            # not every row has every loss: validation has rows of its own
            steps = [row["step"] for row in rows if name in row]
            values = [row[name] for row in rows if name in row]
            losses.plot(steps, values, label=name, marker="." if len(steps) < 30 else "")
            # the adversarial loss has both signs
            if min(values) <= 0:
                losses.set_yscale("symlog", linthresh=0.01)
        if losses.get_yscale() == "linear":
            losses.set_yscale("log")
        losses.legend()
        timed = [row for row in rows if "images_per_second" in row]
        speed.plot([row["step"] for row in timed], [row["images_per_second"] for row in timed])
        speed.set(xlabel="step", ylabel="images/s", ylim=(0, None))
        for axis in (losses, speed):
            axis.grid(alpha=0.3)


# -----------------------------------------------------------------------------------------------------------
# models


@contextmanager
def loading(source: str | Path):
    """Turns whatever reading a model raises into one ValueError that names the source."""
    name, folder = str(source), Path(source)
    is_file = name.endswith((".pt", ".zstd"))
    # a pipeline of diffusers keeps its VAE in the folder vae
    has_config = any((folder / config).is_file() for config in ("config.json", "vae/config.json"))
    if folder.exists() and not is_file and not has_config:
        raise ValueError(f"{source} is no model folder: it has no config.json")
    on_hub = name.count("/") == 1 and not name.startswith((".", "/"))  # org/name
    released = {*convert.RELEASED, *convert.RELEASED_DITS, *convert.RELEASED_TEXT_TO_IMAGE}
    if not (folder.exists() or on_hub or is_file or name in released):
        raise ValueError(f"no model at {source}: give a folder of save_pretrained, or a hub id like org/name")
    try:
        yield
    except Exception as error:  # from json, safetensors, torch, transformers or the hub
        raise ValueError(f"cannot load {source}: {one_line(error)}") from error


def load_autoencoder(source: str | Path, dist_ctx: DistContext) -> rae.RAE | rae.VAE:
    with loading(source):
        return rae.open_autoencoder(source).to(dist_ctx.device)


def load_model(cls: type, source: str, autoencoder: str, dist_ctx: DistContext) -> rae.LatentModel:
    """A TextToImage or ClassToImage, with the autoencoder that it names or another of the same latents."""
    with loading(source):
        model = cls.from_pretrained(source).eval().to(dist_ctx.device)
    model.autoencoder_path = autoencoder or model.autoencoder_path
    if not model.autoencoder_path:
        raise ValueError(f"{source} does not name its autoencoder: give --autoencoder")
    with loading(model.autoencoder_path):
        shape = model.autoencoder.latent_shape
    if shape != model.latent_shape:
        raise ValueError(f"{source} has latents {model.latent_shape}, {model.autoencoder_path} has {shape}")
    return model


def fingerprint(model: nn.Module | None) -> str:
    """A hash of all parameters and buffers, the same on every device; "" for no model. Call it before weights
    are cast."""
    return hash_tensors(dict(model.named_parameters()) | dict(model.named_buffers())) if model else ""


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes and values, the latter as fp32, computed where they are and read back once."""
    total, sums = hashlib.blake2b(digest_size=16), [torch.zeros((), dtype=torch.int64)]
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {list(tensor.shape)}".encode())
        for part in tensor.detach().flatten().split(2**24):
            bits = part.float().view(torch.int32).long()
            # integers wrap around alike on every device; odd factors lose no bit of a value
            factors = 0x9E3779B97F4A7C1 * (2 * torch.arange(len(bits), device=bits.device) + 1)
            sums.append((bits * factors).sum())
    total.update(torch.stack([x.to(sums[-1].device) for x in sums]).cpu().numpy())
    return total.hexdigest()


# -----------------------------------------------------------------------------------------------------------
# a training run: OUT/config.json, metrics.jsonl, losses.png, skipped.log, checkpoints/, model/, samples/

SKIP_WARNING = 0.1  # share of skipped samples that is worth a warning


class Run:
    """The folder of a training run: its log, its checkpoints, and the request to stop. In OUT/checkpoints
    only complete checkpoints (names of digits, with a state.json) and temporary names are ever removed."""

    def __init__(self, config, dist_ctx: DistContext):
        self.out, self.config, self.dist_ctx = Path(config.out), config, dist_ctx
        self.checkpoints, self.metrics = self.out / "checkpoints", self.out / "metrics.jsonl"
        self.stop_signal, self.pending, self.wandb = None, None, None
        self.skipped_samples, self.has_warned = 0, False
        self.flops_per_step = 0
        # a group of its own: checkpoints are written in a thread, which must not mix with the loop's sums
        self.group = None
        if dist_ctx.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=LONG_TIMEOUT))
        # copies to the CPU through reused pinned memory, useless without a GPU
        self.stager = None
        if dist_ctx.device.type == "cuda":
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self.stager = DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False))
        # a file system may show a new folder to one node earlier than to another
        self.sources = from_main(self.open_folder, dist_ctx)
        self.source = self.sources[0] if self.sources else None

    def open_folder(self) -> list[Path]:
        """Claims OUT for this run. Returns the checkpoints to resume from, the best first; raises ValueError
        if OUT is in use, is another run's or holds somebody else's files."""
        complete, resume, another = self.complete_checkpoints(), self.config.resume, "choose another --out"
        if complete and not resume:
            raise ValueError(f"{self.out} already holds a run: give --resume, or {another}")
        # ---- what is not ours: a model folder, a project
        lock = self.out / ".lock"
        names = ("config.json", "model", "metrics.jsonl", "losses.png")
        found = [name for name in names if (self.out / name).exists()]
        if found and not (complete or lock.exists()):
            raise ValueError(f"{self.out / found[0]} is there, but not of a run of this script: {another}")
        if "model" in found and not resume:
            raise ValueError(f"{self.out / 'model'} is there, but no checkpoint to resume from: {another}")
        # ---- one run at a time
        with writing(self.out):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = lock.open("a")  # open as long as the process runs
        try:
            # the lock ends with this process, also if it is killed; data loading processes do not inherit it
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            message = f"another run is writing to {self.out}: wait for its end, or {another}"
            raise ValueError(message) from error
        except OSError:
            pass  # a file system without locks
        # ---- where to resume
        if resume in ("", "auto"):
            return complete[::-1]
        source = Path(resume)
        if not (source / "state.json").is_file():
            raise ValueError(f"--resume {source}: give auto, or a folder of {self.checkpoints}")
        if source.resolve().parent != self.checkpoints.resolve() and (complete or self.metrics.exists()):
            raise ValueError(f"--resume {source} is not of {self.out}, which holds another run: {another}")
        return [source]

    def complete_checkpoints(self) -> list[Path]:
        """In order of their steps."""
        paths = [path.parent for path in self.checkpoints.glob("*/state.json")]
        steps = [path for path in paths if re.fullmatch(r"\d{7,}", path.name)]
        return sorted(steps, key=lambda path: int(path.name))

    def gather(self, value) -> list:
        """The values of all ranks."""
        values = [value] * self.dist_ctx.world_size
        if self.group:
            dist.all_gather_object(values, value, group=self.group)
        return values

    # -- checkpoints

    def load(
        self,
        modules: dict[str, nn.Module],
        optimizers: list[Optimizers],
        export: nn.Module | None,
        frozen: dict[str, nn.Module | None] | None = None,
        data=None,
    ) -> dict:
        """Registers what checkpoints hold, and restores it in place from the newest one, if there is any.
        Returns the step and the positions of the data.

        export: the main process's unsharded copy of modules["ema"], through which `save` writes the
            model folder
        frozen: other models that the run depends on, by name; after a change of one it cannot be resumed
        data: what identifies the data, a list of str; after a change the run continues, and says so
        """
        self.modules, self.optimizers, self.export = modules, optimizers, export
        self.identity = from_main(partial(self.identify, frozen or {}, data), self.dist_ctx)
        state = {"step": 0, "positions": {}}
        if self.source:
            state = self.newest_undamaged()
            self.restore(state)
        self.saved_step = state["step"]
        return state

    def identify(self, frozen: dict[str, nn.Module | None], data) -> dict:
        """Hashes of everything that a checkpoint depends on but does not hold."""
        fixed = {name: p for name, p in self.export.named_parameters() if not p.requires_grad}
        hashes = {f"frozen {type(self.export).__name__}": hash_tensors(fixed)}
        hashes |= {name: fingerprint(model) for name, model in frozen.items() if model}
        hashes["prediction"] = getattr(self.export, "prediction", "")
        return {"frozen": hashes, "data": data}

    def newest_undamaged(self) -> dict:
        """The state of the first of `sources` whose files are as they were written; `source` is that one."""
        for source, before in itertools.zip_longest(self.sources, self.sources[1:]):
            self.source, state, damage = source, {}, None
            try:
                state = json.loads((source / "state.json").read_text())
                if "checksums" not in state:
                    raise ValueError("state.json is damaged: it has no checksums")
                checksums = state.pop("checksums")
                # every rank reads its part of the files
                for name in sorted(checksums)[self.dist_ctx.rank :: self.dist_ctx.world_size]:
                    actual = state_checksum(state) if name == "state.json" else file_checksum(source / name)
                    if actual != checksums[name]:
                        raise ValueError(f"{name} is damaged: its checksum differs")
            except Exception as error:  # from json or the file system
                damage = one_line(error)
            damages = [message for message in self.gather(damage) if message]
            if not damages:
                return state
            message = f"cannot resume from {source}: {damages[0]}"
            if before is None:
                raise ValueError(message)
            if self.dist_ctx.is_main:
                print(f"{message}; going back to {before}", file=sys.stderr, flush=True)

    def restore(self, state: dict) -> None:
        """Loads `source` into the modules and optimizers. Raises ValueError if it is of another model."""
        import torch.distributed.checkpoint as dcp

        try:
            # ---- counters
            self.skipped_samples = state["skipped_samples"]
            for optimizer, skipped in zip(self.optimizers, state["skipped_steps"], strict=True):
                optimizer.skipped.fill_(skipped)
            # ---- compare names and shapes with the model's, for one clear error
            tensors = training_state(self.modules, self.optimizers)
            reader = dcp.HuggingFaceStorageReader(self.source)
            saved = {k: v.size for k, v in reader.read_metadata().state_dict_metadata.items()}
            expected = {k: v.size() for k, v in tensors.items()}
            wrong = [k for k in expected.keys() | saved.keys() if expected.get(k) != saved.get(k)]
            if wrong:
                cure = "give the sizes, --ema, --muon and --gan-weight of that run"
                raise ValueError(f"{len(wrong)} tensors do not fit, such as {min(wrong)}: {cure}")
            # ---- what the checkpoint depends on but does not hold
            then = state["identity"]
            for name, value in self.identity["frozen"].items():
                before = then["frozen"].get(name, value)
                if before != value and name == "prediction":
                    raise ValueError(f"its model was trained with --prediction {before}, not {value}")
                if before != value:
                    raise ValueError(f"the weights of the {name} have changed since: put the old ones back")
            now = self.identity["data"]
            if then["data"] != now and self.dist_ctx.is_main:
                print(f"the data has changed since {self.source}: {then['data']} then, {now} now", flush=True)
            dcp.load(tensors, storage_reader=reader, no_dist=self.group is None)
        except (Exception, dcp.CheckpointException) as error:  # from json, safetensors or torch
            raise ValueError(f"cannot resume from {self.source}: {one_line(error)}") from error

    def save(self, step: int, loader) -> None:
        """Writes a checkpoint, the EMA weights as a model folder for the other scripts, and the losses' plot.
        A checkpoint is a folder named by its step: state.json, and safetensors files with every rank's
        shards, which any number of processes can read."""
        import torch.distributed.checkpoint as dcp

        # ---- the previous checkpoint first; counts and positions of all ranks
        self.check_checkpoint(wait=True)
        path, temporary = self.checkpoints / f"{step:07d}", self.checkpoints / f".{step:07d}.tmp"
        self.count_skipped(loader)
        positions = self.gather(loader.positions)
        state = {
            "step": step,
            "positions": {key: value for part in positions for key, value in part.items()},
            "skipped_samples": self.skipped_samples,
            "skipped_steps": [optimizer.skipped.item() for optimizer in self.optimizers],
            "identity": self.identity,
        }
        # ---- EMA weights, gathered one at a time into the main process's copy
        exported = self.export.state_dict() if self.dist_ctx.is_main else {}
        for name, tensor in self.modules["ema"].state_dict().items():
            gathered = full_tensor(tensor)
            if self.dist_ctx.is_main:
                exported[name].copy_(gathered)
        if self.dist_ctx.is_main:
            with writing(path):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        # ---- every rank's shards, and its part of what all ranks hold: `async_save` returns when they are
        # copied, and writes in the background
        state_dict = training_state(self.modules, self.optimizers)
        if self.group:
            # the folder exists before other ranks write into it
            dist.barrier(self.group)
            replicated = [name for name, tensor in state_dict.items() if not hasattr(tensor, "device_mesh")]
            of_others = set(replicated) - set(replicated[self.dist_ctx.rank :: self.dist_ctx.world_size])
            state_dict = {name: state_dict[name] for name in state_dict.keys() - of_others}
        future = dcp.async_save(
            state_dict,
            storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=self.group,
            no_dist=self.group is None,
            async_stager=self.stager,
        )
        published = Future()
        self.pending, self.saved_step = (path, published), step
        # at once, in the writing thread: a run that dies before its next step keeps the checkpoint
        future.add_done_callback(partial(self.publish, temporary, path, state, published))

    def publish(self, temporary: Path, path: Path, state: dict, published: Future, written: Future) -> None:
        """Writes the model folder; completes and renames a checkpoint that all ranks have written; keeps the
        newest --keep; draws the losses."""
        try:
            written.result()
            failure = self.write_model() if self.dist_ctx.is_main else None
            # every rank reads what it wrote
            shards = temporary.glob(f"shard-{self.dist_ctx.rank + 1:05d}-*")
            parts = self.gather((failure, {shard.name: file_checksum(shard) for shard in shards}))
            if failure := parts[0][0]:
                raise OSError(failure)
            if self.dist_ctx.is_main:
                checksums = {"state.json": state_checksum(state)}
                for _, part in parts:
                    checksums |= part
                with (temporary / "state.json").open("w") as file:
                    file.write(json.dumps(state | {"checksums": checksums}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                if os.path.lexists(path):
                    # not ours, or it would be gone (see `forget_after`)
                    path.rename(f"{path}.{time.time_ns()}")
                temporary.rename(path)
                for old in self.complete_checkpoints()[: -self.config.keep]:
                    # the one that was named on the command line stays
                    if old.resolve() != Path(self.config.resume).resolve():
                        remove_folder(old)
                if self.metrics.exists():
                    plot_losses(self.metrics, self.out / "losses.png")
            published.set_result(None)
        except BaseException as error:
            published.set_exception(error)

    def write_model(self) -> str | None:
        """The model folder; what went wrong, for all ranks to know."""
        try:
            with replacing(self.out / "model", folder=True) as folder:
                self.export.save_pretrained(folder)
        except Exception as error:
            return one_line(error)

    def check_checkpoint(self, wait: bool) -> None:
        """Raises OSError if the pending checkpoint could not be written."""
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        path, published = self.pending
        self.pending = None
        if error := published.exception():
            raise OSError(f"cannot write {path}: {one_line(error)}") from error

    # -- the loop

    def begin(self, step: int) -> None:
        """Before the loop: prints and saves the config, and lets Ctrl-C wait for the end of a step."""
        if self.dist_ctx.is_main:
            text = json.dumps(dataclasses.asdict(self.config), indent=2)
            print(f"{text}\n{self.dist_ctx}", flush=True)
            if step:
                print(f"resumed from {self.source}", flush=True)
            with replacing(self.out / "config.json") as temporary:
                temporary.write_text(text + "\n")
            self.forget_after(step)
            if self.config.wandb:
                self.wandb = start_wandb(self.config, self.out)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.request_stop)
        self.start_timer(step)

    def forget_after(self, step: int) -> None:
        """Removes log lines and checkpoints after the step, and what a killed run left half-written."""
        for path in self.complete_checkpoints():
            if int(path.name) > step:
                remove_folder(path)
        model = self.out / "model"
        for path in (*self.out.glob(".model.*"), *self.checkpoints.glob(".*")):
            if not re.fullmatch(r"\.(model\.\d+|\d{7,})\.(tmp|old)", path.name):
                continue
            # killed between the two renamings of `replacing`: the old folder is the only complete one
            if path.match(".model.*.old") and not model.exists():
                path.rename(model)
            else:
                shutil.rmtree(path, ignore_errors=True)
        if not step and model.exists():  # of a run whose checkpoints are gone
            kept = model.rename(f"{model}.{time.time_ns()}")
            if self.metrics.exists():
                self.metrics.rename(kept / "metrics.jsonl")
            print(f"no checkpoint to resume from: starts anew, and keeps {kept}", flush=True)
        if self.metrics.exists():
            rows = [row for row in read_rows(self.metrics) if row["step"] <= step]
            with replacing(self.metrics) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def request_stop(self, number: int, frame) -> None:
        # a second one changes nothing: torchrun repeats a Ctrl-C that arrived already
        self.stop_signal = number
        if number == signal.SIGHUP:
            # the terminal is gone, or the pipe to it: a log line would raise before the checkpoint is written
            for descriptor in (1, 2):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def next_batch(self, loader, step: int) -> dict:
        """The next batch of the loader. If the data of any rank fails, the last complete step is saved."""
        batch, failure, positions = None, None, dict(loader.positions)
        try:
            batch = next(loader)
        except (OSError, ValueError) as error:
            failure = error
        [failed] = global_sum(failure is not None)
        if not failed:
            return batch
        if step > self.saved_step:
            loader.positions = positions  # before the batch that the other ranks do not have
            self.save(step, loader)
        self.check_checkpoint(wait=True)
        reason = one_line(failure) if failure else "data loading failed on another rank"
        saved = f" (step {step} is saved: continue with --resume --out {self.out})" if step else ""
        raise OSError(reason + saved) from failure

    def is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps

    def stopping(self, step: int) -> bool:
        """After every step: whether any process was asked to stop, so that all leave the loop together."""
        self.check_checkpoint(wait=False)
        # reading the counter waits for the GPU, so not at every step
        if step % 10 == 0:
            for optimizer in self.optimizers:
                optimizer.check_skipped()
        [asked] = global_sum(self.stop_signal is not None)
        if asked:
            self.stop_signal = self.stop_signal or signal.SIGTERM
        return bool(asked)

    def start_timer(self, step: int) -> None:
        """Throughput is counted from here: after set-up, a log line, or a checkpoint."""
        self.since = (step, time.time())

    def log(self, step: int, write: Callable[[str], None], loader, **values) -> None:
        """The training losses and what else a person watches: throughput, MFU, memory, time left."""
        (first, began), now = self.since, time.time()
        seconds = (now - began) / max(1, step - first)  # per step
        row = {"step": step, **{name: float(value) for name, value in values.items()}}
        row["ms_per_step"] = 1000 * seconds
        row["images_per_second"] = self.config.batch / seconds
        if peak := self.dist_ctx.peak_flops():
            row["mfu"] = self.flops_per_step / seconds / (peak * self.dist_ctx.world_size)
        if self.dist_ctx.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["eta_hours"] = (self.config.steps - step) * seconds / 3600
        # share of the time, on the main process: near 0 unless --workers are too few
        row["data_wait"] = loader.waited / (now - began)
        loader.waited = 0.0
        self.count_skipped(loader, write)
        self.warn_of_skips(step, write)
        row["skipped_samples"] = self.skipped_samples
        row["skipped_steps"] = sum(optimizer.check_skipped() for optimizer in self.optimizers)
        row["time"] = now
        self.log_row(write, row)
        self.start_timer(step)

    def log_row(self, write: Callable[[str], None], row: dict) -> None:
        """One line on the screen, and one in metrics.jsonl."""
        if not self.dist_ctx.is_main:
            return
        shown = [f"step {row['step']}/{self.config.steps}"]
        for name, value in row.items():
            if name == "eta_hours":
                shown.append(f"ETA {timedelta(seconds=round(3600 * value))}")
            elif name not in ("step", "time") and not (name.startswith("skipped") and value == 0):
                shown.append(f"{name.replace('_per_', '/').replace('/second', '/s')} {value:.4g}")
        # tqdm's own write, which does not break the progress bar
        write("  ".join(shown))
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def count_skipped(self, loader, write: Callable[[str], None] = print) -> None:
        """Counts the samples that the loader skipped since the last call, and names them in skipped.log."""
        messages, loader.skipped = loader.skipped, []
        if messages:
            with (self.out / "skipped.log").open("a") as file:
                file.writelines(f"{message[:500]}\n" for message in messages)
            write(f"skipped {len(messages)} samples, see {self.out / 'skipped.log'}: {messages[0][:200]}")
        self.skipped_samples += int(global_sum(len(messages))[0])

    def warn_of_skips(self, step: int, write: Callable[[str], None]) -> None:
        """Says it, once, when many samples were skipped."""
        samples = step * self.config.batch + self.skipped_samples
        if self.skipped_samples > SKIP_WARNING * samples and not self.has_warned:
            self.has_warned = True
            if self.dist_ctx.is_main:
                share = f"{self.skipped_samples} of {samples} samples ({self.skipped_samples / samples:.0%})"
                write(f"warning: {share} were skipped, see {self.out / 'skipped.log'}")

    def finish(self, step: int) -> None:
        """After the loop: waits for the last checkpoint, and says where the model is."""
        self.check_checkpoint(wait=True)
        if self.wandb:
            self.wandb.finish()
        if self.dist_ctx.is_main:
            print(f"step {step}: {self.out / 'model'}", flush=True)
            if self.stop_signal:
                print(f"stopped after step {step}; continue with --resume --out {self.out}", file=sys.stderr)


def start_wandb(config, out: Path):
    """Continues the run of the same folder. WANDB_MODE=offline works without an account."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"--wandb {config.wandb} needs `pip install wandb`") from error
    # the id is kept in the folder, so that --resume continues the same curves, and a new run begins new ones
    id_file = out / "wandb_id"
    if not (config.resume and id_file.exists()):
        id_file.write_text(os.urandom(4).hex())
    settings = {"dir": out, "name": out.name, "id": id_file.read_text(), "resume": "allow"}
    return wandb.init(project=config.wandb, config=dataclasses.asdict(config), **settings)


def state_checksum(state: dict) -> str:
    return hashlib.blake2b(json.dumps(state).encode()).hexdigest()[:32]


def training_state(modules: dict[str, nn.Module], optimizers: list[Optimizers]) -> dict:
    """Every tensor that training changes, by name, as references: what is frozen is not saved."""
    # ---- parameters and buffers of the modules
    state, names = {}, {}
    for prefix, module in modules.items():
        parameters = module.named_parameters(remove_duplicate=False)  # tied weights have two names
        frozen = {name for name, p in parameters if not p.requires_grad}
        state |= {f"{prefix}.{name}": x for name, x in module.state_dict().items() if name not in frozen}
        names |= {p: f"{prefix}.{name}" for name, p in module.named_parameters()}
    # ---- the optimizers' state, under the name of its parameter
    for optimizer in optimizers:
        for parameter, values in optimizer.state():
            for key, value in values.items():
                state[f"optimizer.{names[parameter]}.{key}"] = value if value.ndim else value.view(1)
    return state
