"""What the scripts share around their loops: flags, launch, files, checkpoints, log, learning rate, EMA."""

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from torch import Tensor, nn

import convert
import rae

WEIGHTS = Path(os.path.relpath(Path(__file__).parent / "nano" / "weights"))  # what the repository ships

transformers.logging.disable_progress_bar()  # one for each small folder that is read
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or every data loading process prints a warning

# -----------------------------------------------------------------------------------------------------------
# flags


def flag(default, help: str, **kwargs):
    """A field of a config dataclass with its line of help; `at_least` bounds a number, the rest is
    argparse's."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def parse(config: type, manual: str, presets: dict[str, dict] | None = None):
    """A config from the command line: the dataclass's defaults, then --preset's values (with --resume those
    of OUT/config.json), then the flags given.

    A field of a list is positional. `manual` is the script's docstring and heads `-h`.
    """
    parser = argparse.ArgumentParser(
        description=manual, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if presets:
        parser.add_argument("--preset", choices=presets, default="nano", help="values for the flags below")
    for field in dataclasses.fields(config):
        kind, kwargs = field.type, {k: v for k, v in field.metadata.items() if k != "at_least"}
        if isinstance(kind, types.UnionType):  # "int | None"
            kind = next(t for t in kind.__args__ if t is not type(None))
        shown = "" if field.default in (None, "", ()) else f" (default {field.default})"
        kwargs["help"] += shown
        if isinstance(field.default, tuple):
            parser.add_argument(field.name, type=str, **kwargs)
            continue
        if kind is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs["type"] = kind
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kwargs)
    given = vars(parser.parse_args())
    base = (presets or {}).get(given.pop("preset", ""), {})
    saved = Path(given.get("out", getattr(config, "out", ""))) / "config.json"
    if given.get("resume") and saved.is_file():
        base = json.loads(saved.read_text())
        if unknown := set(base) - {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"{saved} has values that this script does not know: {', '.join(unknown)}")
    values = config(**{**base, **given})
    for field in dataclasses.fields(config):
        value, least = getattr(values, field.name), field.metadata.get("at_least")
        choices, name = field.metadata.get("choices"), "--" + field.name.replace("_", "-")
        if choices is not None and value not in choices:  # of a config.json
            raise ValueError(f"{name} {value}: choose from {', '.join(choices)}")
        if None not in (value, least) and value < least:
            raise ValueError(f"{name} {value}: give at least {least}")
    return values


def main(run: Callable[[], None]) -> None:
    """Runs a script. A user's mistake (ValueError, OSError) ends in one line instead of a traceback, unless
    the environment variable TRACEBACK is set."""
    try:
        run()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        mistake = isinstance(error, (ValueError, OSError)) and not os.environ.get("TRACEBACK")
        if not mistake and not dist.is_initialized():
            raise
        if mistake:
            print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if dist.is_initialized():  # at once: to tidy up would be to wait for the other processes
            os._exit(1)
        sys.exit(1)


def one_line(error: BaseException) -> str:
    """The line that says most: of the traceback of a data loading process the last, else the first; of a
    failed checkpoint that of the first process."""
    for failure, _ in getattr(error, "failures", {}).values():
        return one_line(failure)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Original Traceback" in str(error) else 0]


# -----------------------------------------------------------------------------------------------------------
# launch


@dataclass
class DistContext:
    """Where this process runs. Alone, or one of `world` that torchrun started."""

    device: torch.device
    rank: int
    world_size: int
    dtype: torch.dtype  # of the compute; parameters are fp32
    mesh: "torch.distributed.DeviceMesh | None" = None  # (replicate, shard), of several processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.mesh is None:
            return f"{self.device.type}, 1 process, {dtype} compute, fp32 weights"
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        copies, parts = self.mesh.shape
        return (
            f"{self.device.type}, {self.world_size} processes ({backend}), {dtype} compute, fp32 weights in "
            f"{copies} copies of {parts} parts"
        )


def init_distributed(dtype: str = "auto", shard: str = "none") -> DistContext:
    """Picks the device (CUDA, MPS, CPU), joins the process group of torchrun, picks the compute dtype and
    who holds which part of the weights: none (each process all of them), full (each its share), hybrid (each
    machine all of them, each of its processes a share)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    mesh = None
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        parts = {"none": 1, "full": world, "hybrid": int(os.environ["LOCAL_WORLD_SIZE"])}[shard]
        names = ("replicate", "shard")
        mesh = dist.init_device_mesh(device.type, (world // parts, parts), mesh_dim_names=names)
    name = ("bf16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype
    return DistContext(device, rank, world, {"bf16": torch.bfloat16, "fp32": torch.float32}[name], mesh)


def shard_model(module: nn.Module, blocks: Iterable[nn.Module], dist_ctx: DistContext, *methods: str) -> None:
    """Moves a module to the device: whole, or of several processes a block at a time and each its share, with
    FSDP2, which gathers the weights of one block at a time; gradients are summed over the processes, not
    averaged. `methods` are its entrances beside `forward`.

    Every process has to go through every block, in the same order.
    """
    if dist_ctx.mesh is None:
        module.to(dist_ctx.device)
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in (*blocks, module):
        mesh = dist_ctx.mesh if dist_ctx.mesh.shape[0] > 1 else dist_ctx.mesh["shard"]
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def compile_blocks(blocks: Iterable[nn.Module], wanted: bool | None, dist_ctx: DistContext) -> None:
    """Compiles what is inside of the blocks, not the gathering of their weights; by default on CUDA."""
    if dist_ctx.device.type == "cuda" if wanted is None else wanted:
        for block in blocks:
            block.forward = torch.compile(block.forward)


def cast_linear(blocks: Iterable[nn.Module], dist_ctx: DistContext) -> None:
    """Gives linear layers that will not be trained the dtype of the compute. Autocast would, at every call of
    a compiled block; the results are the same, and the memory is half."""
    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.to(dist_ctx.dtype)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keeps only the inputs of the blocks for the backward pass, which computes the rest again."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def to_host(*tensors: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
    """Begins to copy tensors to the CPU. They are there when the function that is returned with them has been
    called: it waits for them alone, not for what CUDA was given since."""
    device = tensors[0].device
    copies = [tensor.to("cpu", non_blocking=device.type == "cuda") for tensor in tensors]
    if device.type != "cuda":
        return copies, lambda: None
    there = torch.cuda.Event(blocking=True)  # asleep
    there.record()

    def wait() -> None:
        with torch.cuda.device(device):  # a new thread's is the first one
            there.synchronize()

    return copies, wait


def global_sum(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that no GPU has to be waited for
    dist.all_reduce(total)
    return total.tolist()


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over processes."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes, on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_if_finite(loss: Tensor) -> Tensor:
    """Factor of a loss's gradients: of one that is not finite they all are not, and every process leaves the
    step out."""
    return torch.where(loss.isfinite(), 1.0, math.nan)


def backward(loss: Tensor) -> None:
    loss.backward(one_if_finite(loss))


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, of a module that every process holds whole."""
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(summed.view_as(p))


class Stepper:
    """Steps of one or more optimizers, with gradients clipped together (0: not clipped). A step whose
    gradients are not finite is left out, on the device, so that nothing has to wait for the number."""

    def __init__(self, *optimizers: torch.optim.Optimizer, clip: float = 1.0):
        self.optimizers, self.clip = optimizers, clip or math.inf
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.peaks = [group["lr"] for group in self.groups]
        self.parameters = [p for group in self.groups for p in group["params"]]
        device = local_tensor(self.parameters[0]).device
        self.skipped_steps, self.in_a_row, self.most_in_a_row = torch.zeros(3, device=device)
        self.make_state()

    def scale(self, factor: float) -> None:
        """Sets the learning rates to a part of those that the optimizers were made with, the peaks."""
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def make_state(self) -> None:
        """The optimizers' state, zeros all: it is the same in a checkpoint from before the first step."""
        self.scale(0.0)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.scale(1.0)
        for _, state in self.state():
            if "step" in state:
                state["step"].zero_()

    def state(self) -> list[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Of every parameter."""
        return [item for optimizer in self.optimizers for item in optimizer.state.items()]

    def step(self) -> Tensor:
        """Returns the norm of the gradients before clipping."""
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip))
        bad = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            before = []
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = bad  # the fused AdamW's own way out, made for GradScaler
            else:  # Muon has none
                changing = [t for p, state in optimizer.state.items() for t in (p.detach(), *state.values())]
                before = [(local_tensor(t), local_tensor(t).clone()) for t in changing]
            optimizer.step()
            for tensor, kept in before:
                tensor.copy_(torch.where(bad > 0, kept, tensor))
            optimizer.zero_grad()
        self.skipped_steps += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.most_in_a_row, self.in_a_row, out=self.most_in_a_row)
        return norm

    def check(self) -> float:
        """The number of steps left out; raises ValueError if ten in a row were."""
        if self.most_in_a_row >= 10:
            raise ValueError(
                "ten steps in a row had a loss or gradient that is not finite: lower the learning rate"
            )
        return self.skipped_steps.item()


# -----------------------------------------------------------------------------------------------------------
# files: written beside the old one, then renamed


@contextmanager
def writing(path: Path):
    """Around whatever writes to `path`: an error that a user understands (OSError)."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # all mean a full disk
        raise OSError(f"cannot write {path}: {one_line(error)}") from error


@contextmanager
def replacing(path: Path):
    """Yields a temporary path in the same folder, which takes the place of `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            yield temporary
            if path.is_dir():  # a folder cannot be renamed onto another
                path.rename(old)
            temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def save_image(path: Path, pixels: Tensor, **text) -> None:
    """(3, H, W) in [0, 1] -> PNG, rounded to 8 bits, with `text` in its metadata."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)


def image_grid(images: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Tensor:
    """(B, 3, H, W) -> one image (3, H', W') in raster order on white, each enlarged by the integer
    `scale`."""
    images = images.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    missing = -len(images) % columns
    images = nn.functional.pad(images, (0, gap, 0, gap, 0, 0, 0, missing), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    return torch.cat(rows, dim=1)[:, :-gap, :-gap]


@contextmanager
def plotting(path: Path, *grid: int, **options):
    """Yields the axes of a figure, rows and columns of them, with options as matplotlib's `subplots`; writes
    it to `path` as PNG."""
    import matplotlib

    matplotlib.use("Agg")  # needs no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*grid, **options)
    yield axes
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")
    pyplot.close(figure)
    print(path)


def save_results(results: list[dict], seed: int, path: Path) -> None:
    """Numbers {"metric", "value", "n"} as JSON, each with what it takes to make it again."""
    packages = ("torch", "transformers", "numpy", "torchmetrics", "torch-fidelity")
    about = {
        "seed": seed,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps([result | about for result in results], indent=1) + "\n")
    print(f"\n{path}")


@contextmanager
def loading(source: str | Path):
    """Around whatever reads a model: an error that a user understands (ValueError)."""
    folder, file = Path(source), str(source).endswith((".pt", ".zstd"))
    if folder.exists() and not file and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json")
    on_hub = str(source).count("/") == 1 and not str(source).startswith((".", "/"))
    released = {**convert.RELEASED, **convert.RELEASED_DITS, **convert.RELEASED_TEXT_TO_IMAGE}
    if not (folder.exists() or on_hub or file or str(source) in released):
        raise ValueError(
            f"no model at {source}: give a folder made by save_pretrained, or a hub id like org/name"
        )
    try:
        yield
    except Exception as error:  # from json, safetensors, torch, transformers or the hub
        raise ValueError(f"cannot load {source}: {one_line(error)}") from error


def load_autoencoder(source: str | Path, dist_ctx: DistContext) -> rae.RAE | rae.VAE:
    with loading(source):
        return rae.open_autoencoder(source).to(dist_ctx.device)


def load_model(
    kind: type[rae.LatentModel], source: str, autoencoder: str, dist_ctx: DistContext
) -> rae.LatentModel:
    """A TextToImage or ClassToImage with its autoencoder: the one that it names, or another of the same
    latents."""
    with loading(source):
        model = kind.from_pretrained(source).eval().to(dist_ctx.device)
    model.autoencoder_path = autoencoder or model.autoencoder_path
    if not model.autoencoder_path:
        raise ValueError(f"{source} does not name its autoencoder: give --autoencoder")
    with loading(model.autoencoder_path):
        shape = model.autoencoder.latent_shape
    if shape != model.latent_shape:
        raise ValueError(f"{source} makes latents {model.latent_shape}, {model.autoencoder_path} has {shape}")
    return model


def fingerprint(model: nn.Module | None) -> str:
    """A number that other weights do not have, the norm of all: a path may come to hold others."""
    if model is None:
        return ""
    return f"{sum(p.detach().cpu().double().square().sum().item() for p in model.parameters()):.9g}"


# -----------------------------------------------------------------------------------------------------------
# a training run: <out>/config.json, metrics.jsonl, skipped.log, checkpoints/, model/, samples/


class Run:
    """The folder of a training, its log and checkpoints, and the wish to stop it.

    A checkpoint is a folder named by its step: safetensors files of every process's share, and state.json. It
    can be read by any number of processes. It is written under another name, which it loses when complete.
    """

    def __init__(self, config, dist_ctx: DistContext):
        self.out, self.config, self.dist_ctx = Path(config.out), config, dist_ctx
        self.checkpoints, self.metrics = self.out / "checkpoints", self.out / "metrics.jsonl"
        self.stop, self.pending, self.board, self.skipped = None, None, None, 0
        self.group = dist.new_group(backend="gloo") if dist_ctx.world_size > 1 else None
        complete = sorted(p for p in self.checkpoints.glob("*") if p.name.isdigit())
        if complete and not config.resume:
            raise ValueError(
                f"{self.out} already holds a training: go on with --resume, or choose another --out"
            )
        self.source = complete[-1] if complete else None
        if (
            dist_ctx.world_size > 1
        ):  # file systems may show a new folder to one machine earlier than to another
            shared = [self.source]
            dist.broadcast_object_list(shared)
            self.source = shared[0]
        if config.resume not in ("", "auto"):
            self.source = Path(config.resume)
            if not (self.source / "state.json").is_file():
                raise ValueError(f"--resume {self.source}: give auto, or a folder of {self.checkpoints}")

    # -- checkpoints

    def load(self, modules: dict[str, nn.Module], steppers: list[Stepper], export: nn.Module | None) -> dict:
        """Takes what checkpoints are to hold, and restores it in place from the newest, if there is one.
        Returns its state: step, and positions of the data.

        The weights of modules["ema"] are what `save` writes as a model folder, in the shape of `export`:
        the main process's copy of the model from before it was spread over all.
        """
        self.modules, self.steppers, self.export = modules, steppers, export
        if self.source is None:
            return {"step": 0, "positions": {}}
        import torch.distributed.checkpoint as dcp

        try:
            state = json.loads((self.source / "state.json").read_text())
            self.skipped = state["skipped_samples"]
            for stepper, skipped_steps in zip(steppers, state["skipped_steps"], strict=True):
                stepper.skipped_steps.fill_(skipped_steps)
            tensors = training_state(modules, steppers)
            reader = dcp.HuggingFaceStorageReader(self.source)
            metadata = reader.read_metadata().state_dict_metadata
            saved = {k: (v.size, sum(c.sizes.numel() for c in v.chunks)) for k, v in metadata.items()}
            own = {k: (v.size(), v.numel()) for k, v in tensors.items()}  # the second: no piece is missing
            if wrong := [k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k)]:
                raise ValueError(f"{len(wrong)} tensors do not fit this model, such as {min(wrong)}")
            dcp.load(tensors, storage_reader=reader, no_dist=self.group is None)
        except (Exception, dcp.CheckpointException) as error:  # from json, safetensors or torch
            raise ValueError(f"cannot resume from {self.source}: {one_line(error)}") from error
        return state

    def save(self, step: int, loader) -> None:
        """Writes a checkpoint, in the background, and the averaged weights as a model folder for the other
        scripts."""
        import torch.distributed.checkpoint as dcp

        self.settle()
        path, temporary = self.checkpoints / f"{step:07d}", self.checkpoints / f".{step:07d}.tmp"
        self.count_skipped(loader)
        everyone = [loader.positions]
        if self.group:
            everyone = [None] * self.dist_ctx.world_size
            dist.all_gather_object(everyone, loader.positions, group=self.group)
        exported = self.export.state_dict() if self.dist_ctx.is_main else {}
        ema = self.modules["ema"].state_dict()
        for name, tensor in ema.items():  # one at a time, and kept by the main process only
            full = full_tensor(tensor)
            if self.dist_ctx.is_main:
                exported[name].copy_(full)
        if self.dist_ctx.is_main:
            positions = {key: value for each in everyone for key, value in each.items()}
            state = {"step": step, "positions": positions}
            state |= {"skipped_samples": self.skipped}
            state |= {"skipped_steps": [stepper.skipped_steps.item() for stepper in self.steppers]}
            with writing(path):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                with (temporary / "state.json").open("w") as file:
                    file.write(json.dumps(state) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            with replacing(self.out / "model") as folder:
                self.export.save_pretrained(folder)
        if self.group:
            dist.barrier(self.group)  # the folder is there
        future = dcp.async_save(  # copies all first
            training_state(self.modules, self.steppers),
            storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=self.group,
            no_dist=self.group is None,
        )
        published = Future()

        def publish(done: Future) -> None:  # when every process has written its share
            try:
                done.result()
                if self.dist_ctx.is_main:
                    self.publish(temporary, path)
                published.set_result(None)
            except BaseException as error:
                published.set_exception(error)

        future.add_done_callback(publish)
        self.pending = path, published

    def publish(self, temporary: Path, path: Path) -> None:
        """Gives a complete checkpoint its name, and removes those that are older than the newest --keep."""
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        complete = sorted(p for p in self.checkpoints.glob("*") if p.name.isdigit())
        for old in complete[: -self.config.keep]:
            shutil.rmtree(old)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self.pending:
            path, future = self.pending
            self.pending = None
            if error := future.exception():
                raise OSError(f"cannot write {path}: {one_line(error)}") from error

    # -- the loop

    def begin(self, step: int) -> None:
        """Before the loop: shows and saves the config, and lets Ctrl-C wait for the end of a step."""
        if self.dist_ctx.is_main:
            text = json.dumps(dataclasses.asdict(self.config), indent=2)
            print(f"{text}\n{self.dist_ctx}", flush=True)
            if step:
                print(f"goes on from {self.source}", flush=True)
            with replacing(self.out / "config.json") as temporary:
                temporary.write_text(text + "\n")
            self.forget_after(step)
            if self.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.out / "tensorboard", purge_step=step + 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        self.time_from(step)

    def forget_after(self, step: int) -> None:
        """Removes log lines and checkpoints beyond the step, and what a killed run left half-written."""
        for path in self.checkpoints.glob("*"):
            if not path.name.isdigit() or int(path.name) > step:
                shutil.rmtree(path)
        for path in self.out.glob(".model.*"):
            if path.suffix == ".old" and not (self.out / "model").exists():
                path.rename(self.out / "model")
            else:
                shutil.rmtree(path)
        if self.metrics.exists():
            rows = [row for row in read_rows(self.metrics) if row["step"] <= step]
            with replacing(self.metrics) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ask_to_stop(self, number: int, frame) -> None:
        self.stop = number  # once more changes nothing: torchrun passes a Ctrl-C on that has arrived already

    def stopping(self) -> bool:
        """Whether any process was told to stop before it came here: all leave the loop after the same
        step."""
        [told] = global_sum(self.stop is not None)
        if told:
            self.stop = self.stop or signal.SIGTERM
        return bool(told)

    def time_from(self, step: int) -> None:
        """Images per second are counted from here: after set-up, a log line, or a checkpoint."""
        self.since = (step, time.time())

    def log(self, step: int, write: Callable[[str], None], loader, **values) -> None:
        """One line on the screen and one in metrics.jsonl: the values, what the loader left out and how long
        it was waited for since the last line."""
        (since, clock), now = self.since, time.time()
        row = {"step": step, **{k: float(v) for k, v in values.items()}}
        row["images_per_second"] = (step - since) * self.config.batch / (now - clock)
        row["waiting"] = round(loader.waited / (now - clock), 4)  # share of the time, on the main process
        loader.waited = 0.0
        self.count_skipped(loader, write)
        if self.skipped:
            row["skipped_samples"] = self.skipped
        row["time"] = round(now, 1)
        if self.dist_ctx.is_main:
            shown = (
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "time"
            )
            write("  ".join(shown))
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name in row.keys() - {"step", "time"} if self.board else ():
                self.board.add_scalar(name, row[name], step)
        self.time_from(step)

    def count_skipped(self, loader, write: Callable[[str], None] = print) -> None:
        """Counts the samples that the loader left out since the last call, and names them in skipped.log."""
        messages, loader.skipped = loader.skipped, []
        if messages:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "skipped.log").open("a") as file:
                file.writelines(f"{message[:500]}\n" for message in messages)
            write(f"left out {len(messages)} samples, see {self.out / 'skipped.log'}: {messages[0][:200]}")
        self.skipped += int(global_sum(len(messages))[0])

    def finish(self, step: int) -> None:
        """After the loop: waits for the last checkpoint, and says where the model is."""
        self.settle()
        if self.board:
            self.board.close()
        if self.dist_ctx.is_main:
            print(f"step {step}: {self.out / 'model'}", flush=True)
            if self.stop:
                print(f"stopped after step {step}; go on with --resume --out {self.out}", file=sys.stderr)


def read_rows(metrics: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a line that was cut off by a crash is left out."""
    rows = []
    for line in metrics.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def training_state(modules: dict[str, nn.Module], steppers: list[Stepper]) -> dict:
    """Every tensor that a training changes, by name, as references: parameters and buffers of the modules,
    and the optimizers' state after the name of its parameter. What is frozen comes from where it came from.
    """
    state, names = {}, {}
    for prefix, module in modules.items():
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        state |= {f"{prefix}.{k}": v for k, v in module.state_dict().items() if k not in frozen}
        names |= {p: f"{prefix}.{name}" for name, p in module.named_parameters()}
    for stepper in steppers:
        for parameter, values in stepper.state():
            for key, value in values.items():
                state[f"optimizer.{names[parameter]}.{key}"] = value if value.ndim else value.view(1)
    return state


def cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up from 1 / warmup, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, start: int, end: int, floor: float) -> float:
    """Factor of the learning rate: 1 up to `start`, then in a line down to `floor` at `end`, and so on."""
    progress = (step - start) / max(1, end - start)
    return 1 - (1 - floor) * min(max(progress, 0.0), 1.0)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """EMA of the trained parameters; the decay grows from 0.1 to its value during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    old, new = zip(*((local_tensor(a), local_tensor(b)) for a, b in pairs if b.requires_grad), strict=True)
    torch._foreach_lerp_(old, new, 1 - decay)
