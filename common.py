"""What the scripts share around their loops: flags, launch, files, checkpoints, log, learning rate, EMA."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError
from torch import Tensor, nn

import rae

WEIGHTS = Path(os.path.relpath(Path(__file__).parent / "nano" / "weights"))  # what the repository ships

transformers.logging.disable_progress_bar()  # one for each small folder that is read

# -----------------------------------------------------------------------------------------------------------
# flags


def flag(default, help: str, **kwargs):
    """A field of a config dataclass with its line of help; `at_least` bounds a number, the rest is
    argparse's."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def parse(config: type, manual: str, presets: dict[str, dict] | None = None):
    """A config from the command line: the dataclass's defaults, then --preset's values (with --resume those
    of OUT/config.json), then the flags given.

    Fields with `nargs` are positional. `manual` is the script's docstring and heads `-h`.
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
        if "nargs" in kwargs:
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
    values = config(**{**base, **given})
    for field in dataclasses.fields(config):
        value, least = getattr(values, field.name), field.metadata.get("at_least")
        if None not in (value, least) and value < least:
            raise ValueError(f"--{field.name.replace('_', '-')} {value}: give at least {least}")
    return values


def main(run: Callable[[], None]) -> None:
    """Runs a script. A user's mistake (ValueError, OSError) ends in one line instead of a traceback, unless
    the environment variable TRACEBACK is set."""
    try:
        run()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def one_line(error: Exception) -> str:
    """The line that says most: of the traceback of a data loading process the last, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Original Traceback" in str(error) else 0]


# -----------------------------------------------------------------------------------------------------------
# launch


@dataclass
class Launch:
    """Where this process runs. Alone, or one of `world` that torchrun started."""

    device: torch.device
    rank: int
    world: int
    dtype: torch.dtype  # of the compute; parameters are fp32

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def __str__(self) -> str:
        return (
            f"{self.device.type}, {self.world} process(es), {str(self.dtype).removeprefix('torch.')} compute"
        )


def launch(dtype: str = "auto") -> Launch:
    """Picks the device (CUDA, MPS, CPU), joins the process group of torchrun, picks the compute dtype."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    elif torch.backends.mps.is_available() and world == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    name = ("bf16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype
    return Launch(device, rank, world, {"bf16": torch.bfloat16, "fp32": torch.float32}[name])


def global_sum(*values: float) -> list[float]:
    """Sums of numbers over all processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that no GPU has to be waited for
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up the gradients of all processes; one that a process did not need is zero there, and in a process
    on its own too, since the optimizer's momentum moves the parameter all the same."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)


# -----------------------------------------------------------------------------------------------------------
# files: written beside the old one, then renamed


@contextmanager
def replacing(path: Path):
    """Yields a temporary path in the same folder, which takes the place of `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be renamed onto another
            path.rename(old)
        temporary.rename(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # all three mean a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left in (temporary, old):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def save_picture(path: Path, pixels: Tensor, **text) -> None:
    """(3, H, W) in [0, 1] -> PNG, rounded to 8 bits, with `text` in its metadata."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG", pnginfo=info)


def picture_grid(pictures: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Tensor:
    """(B, 3, H, W) -> one picture (3, H', W') in raster order on white, each enlarged by the integer
    `scale`."""
    pictures = pictures.clamp(0, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    missing = -len(pictures) % columns
    pictures = nn.functional.pad(pictures, (0, gap, 0, gap, 0, 0, 0, missing), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    return torch.cat(rows, dim=1)[:, :-gap, :-gap]


@contextmanager
def loading(source: str | Path):
    """Around whatever reads a model: an error that a user understands (ValueError)."""
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json")
    if not folder.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise ValueError(
            f"no model at {source}: give a folder made by save_pretrained, or a hub id like org/name"
        )
    try:
        yield
    except Exception as error:  # from json, safetensors, torch, transformers or the hub
        raise ValueError(f"cannot load {source}: {one_line(error)}") from error


def load_autoencoder(source: str | Path, where: Launch) -> rae.RAE:
    with loading(source):
        return rae.RAE.from_pretrained(str(source)).eval().to(where.device)


def load_text_to_image(source: str, autoencoder: str, where: Launch) -> rae.TextToImage:
    """The model with its autoencoder: the one that it names, or another of the same latents."""
    with loading(source):
        model = rae.TextToImage.from_pretrained(source).eval().to(where.device)
    model.autoencoder_path = autoencoder or model.autoencoder_path
    with loading(model.autoencoder_path):
        shape = model.autoencoder.latent_shape
    if shape != model.latent_shape:
        raise ValueError(f"{source} makes latents {model.latent_shape}, {model.autoencoder_path} has {shape}")
    return model


# -----------------------------------------------------------------------------------------------------------
# a training run: <out>/config.json, metrics.jsonl, checkpoint.pt, model/, samples/


class Run:
    """The folder of a training, its log and checkpoints, and the wish to stop it."""

    def __init__(self, out: str, config, where: Launch, resume: bool):
        self.out, self.config, self.where, self.stop = Path(out), config, where, None
        self.checkpoint, self.metrics = self.out / "checkpoint.pt", self.out / "metrics.jsonl"
        if self.checkpoint.exists() and not resume:
            raise ValueError(f"{out} already holds a training: go on with --resume, or choose another --out")
        if resume and not self.checkpoint.exists():
            raise ValueError(f"nothing to resume: there is no {self.checkpoint}")

    def begin(self, step: int) -> None:
        """Before the loop: shows and saves the config, and lets Ctrl-C wait for the end of a step."""
        if self.where.main:
            text = json.dumps(dataclasses.asdict(self.config), indent=2)
            print(f"{text}\n{self.where}", flush=True)
            with replacing(self.out / "config.json") as temporary:
                temporary.write_text(text + "\n")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        self.time_from(step)

    def ask_to_stop(self, number: int, frame) -> None:
        self.stop = number

    def stopping(self) -> bool:
        """Whether any process was told to stop: all leave the loop after the same step."""
        if global_sum(self.stop is not None)[0] and self.stop is None:
            self.stop = signal.SIGTERM
        return self.stop is not None

    def load(self, **parts) -> int:
        """Restores modules and optimizers; returns the next step. Log lines beyond it are forgotten."""
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except Exception as error:  # from zip, pickle or torch
            raise ValueError(f"cannot resume from {self.checkpoint}: {one_line(error)}") from error
        if self.where.main and self.metrics.exists():
            rows = self.metrics.read_text().splitlines(keepends=True)
            with replacing(self.metrics) as temporary:
                temporary.write_text("".join(row for row in rows if json.loads(row)["step"] <= state["step"]))
        return state["step"]

    def save(self, step: int, export: nn.Module, **parts) -> None:
        """Writes the training state and `export` as a model folder for the other scripts."""
        if self.where.main:
            state = {name: part.state_dict() for name, part in parts.items()}
            with replacing(self.checkpoint) as temporary:
                torch.save({"step": step, **state}, temporary)
            with replacing(self.out / "model") as temporary:
                export.save_pretrained(temporary)

    def time_from(self, step: int) -> None:
        """Images per second are counted from here: after set-up, a log line, or a checkpoint."""
        self.since = (step, time.time())

    def log(self, step: int, write: Callable[[str], None], **values) -> None:
        """One line on the screen and one in metrics.jsonl."""
        (since, clock), now = self.since, time.time()
        row = {"step": step, **{k: float(v) for k, v in values.items()}}
        row["images_per_second"] = (step - since) * self.config.batch / (now - clock)
        row["time"] = round(now, 1)
        if self.where.main:
            shown = (
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "time"
            )
            write("  ".join(shown))
            with self.metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.time_from(step)

    def finish(self, step: int) -> None:
        """After the loop: says where the model is; exits with 128 + the signal's number if it was stopped."""
        if self.where.main:
            print(f"step {step}: {self.out / 'model'}", flush=True)
        if self.stop:
            if self.where.main:
                print(f"stopped after step {step}; go on with --resume --out {self.out}", file=sys.stderr)
            sys.exit(128 + self.stop)


def cosine(step: int, total: int, warmup: int, floor: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up from 1 / warmup, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """EMA of the trained parameters; the decay grows from 0.1 to its value during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    old, new = zip(*((a, b) for a, b in pairs if b.requires_grad), strict=True)
    torch._foreach_lerp_(old, new, 1 - decay)
