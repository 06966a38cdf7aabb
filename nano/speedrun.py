"""From nothing to images that follow the prompt: trains and evaluates every part of the nano world.

    python -m nano.speedrun --compile                              # 90 minutes on two cores
    python -m nano.speedrun --compile --scale 2 --out runs/long    # twice the steps of every stage
    python -m nano.prepare ship --runs runs/long                   # how the shipped weights were made

Started again, it resumes where it was stopped: a trainer at its newest checkpoint, the language model and the
encoder from their beginning. Prints a table and writes OUT/speedrun.json and OUT/shapes.json. FLOPs are those
of the weights, without attention: per token 6 for a trained weight, 2 for a frozen one, and 4 for one of the
frozen language model, through which gradients pass. Questions count as images: up to a tenth too much.
"""

import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

import common
import train_decoder
import train_t2i
from common import flag
from nano import prepare

# mean tokens of a conversation, in the language model's stage and in that of text-to-image
SHORT_CHAT, CHAT = 72, 85


@dataclass
class Config:
    scale: float = flag(1.0, "factor of the steps of every stage", above=0)
    seed: int = flag(0, "seed of every stage")
    dtype: str = flag("bf16", "compute dtype; fp32 on a CPU without AVX512-BF16", choices=["bf16", "fp32"])
    compile: bool = flag(False, "torch.compile in decoder and text to image; a CPU needs a C++ compiler")
    limit: int = flag(50, "prompts per task of the evaluation", at_least=2)
    eval_seed: int = flag(9000, "seed of the evaluation's prompts, also used to choose the number of steps")
    out: str = flag("runs/speedrun", "folder of the run")


@dataclass
class Stage:
    name: str
    command: list[str]
    steps: int = 0  # at scale 1
    batch: int = 0  # samples per step


def stages(config: Config) -> list[Stage]:
    out, seed, compute = Path(config.out), ["--seed", str(config.seed)], ["--dtype", config.dtype]
    part = ["-m", "nano.prepare", "--out", str(out), *seed, *compute]
    trainer = [*seed, *compute, "--resume", *(["--compile"] if config.compile else [])]
    decoder = ["train_decoder.py", "--encoder", str(out / "encoder"), "--out", str(out / "decoder")]
    t2i = ["train_t2i.py", "--autoencoder", str(out / "decoder/model"), "--out", str(out / "t2i")]
    t2i += ["--language-model", str(out / "language-model")]
    evaluation = ["-m", "nano.evaluate", "shapes", "--model", str(out / "t2i/model"), "--steps", "25"]
    evaluation += [*compute, "--limit", str(config.limit), "--seed", str(config.eval_seed)]
    # steps and batch are those of the commands themselves
    presets = train_decoder.PRESETS["nano"], train_t2i.PRESETS["nano"]
    of_decoder, of_t2i = ((preset["steps"], preset["batch"]) for preset in presets)
    return [
        Stage("language model", [*part, "language-model"], *prepare.PARTS["language-model"][1:]),
        Stage("encoder", [*part, "encoder"], *prepare.PARTS["encoder"][1:]),
        Stage("decoder", [*decoder, *trainer], *of_decoder),
        Stage("text to image", [*t2i, *trainer], *of_t2i),
        Stage("evaluation", [*evaluation, "--out", str(out / "shapes.json")]),
    ]


def flops_per_sample(config: Config) -> dict[str, float]:
    """FLOPs per sample of every stage."""
    out = Path(config.out)

    def count(folder: str, prefix: str = "") -> int:
        with safe_open(out / folder / "model.safetensors", framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]
            return sum(math.prod(file.get_slice(key).get_shape()) for key in keys)

    encoder, language_model = count("encoder"), count("language-model")
    draws = json.loads((out / "t2i/config.json").read_text())["draws"]
    dit = count("t2i/model", "dit.")
    return {
        "language model": 6 * language_model * SHORT_CHAT,
        "encoder": 6 * encoder * prepare.TOKENS,
        "decoder": (6 * count("decoder/model", "decoder.") + 2 * encoder) * prepare.TOKENS,
        "text to image": (6 * draws * dit + 2 * encoder) * prepare.TOKENS + 4 * language_model * CHAT,
    }


def figure(config: Config, stage: Stage) -> str:
    """What a finished stage reached."""
    out = Path(config.out)
    if stage.name == "evaluation":
        results = json.loads((out / "shapes.json").read_text())["results"]
        values = {row["metric"]: row["value"] for row in results}
        return f"overall {values['shapes/model/overall']:.3f}, ceiling {values['shapes/decoded/overall']:.3f}"
    log, key = {
        "language model": ("language-model/log.jsonl", "loss"),
        "encoder": ("encoder/log.jsonl", "loss"),
        "decoder": ("decoder/metrics.jsonl", "l1_loss"),
        "text to image": ("t2i/metrics.jsonl", "val_loss"),
    }[stage.name]
    row = common.read_rows(out / log, key)[-1]
    return f"{key.replace('_', ' ')} {row[key]:.4f}"


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of all cores that the finished stages computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.time(), used.ru_utime + used.ru_stime


def run(stage: Stage, config: Config) -> tuple[bool, list[float]]:
    """Runs the rest of a stage: whether it is finished, and its minutes, also if it was stopped."""
    steps = ["--steps", str(steps_of(stage, config))] if stage.steps else []
    print(f"\n{stage.name}: python {' '.join([*stage.command, *steps])}", flush=True)
    started, stopped = clocks(), False
    with subprocess.Popen([sys.executable, *stage.command, *steps]) as process:
        try:
            process.wait()
        except KeyboardInterrupt:  # a trainer saves a checkpoint first, and then ends well
            stopped = True
            process.send_signal(signal.SIGINT)
            process.wait()
    minutes = [(now - then) / 60 for now, then in zip(clocks(), started, strict=True)]
    if process.returncode == 0 and not stopped and "--resume" in stage.command:
        folder = Path(stage.command[stage.command.index("--out") + 1])
        stopped = common.read_rows(folder / "metrics.jsonl")[-1]["step"] < steps_of(stage, config)
    return process.returncode == 0 and not stopped, minutes


def steps_of(stage: Stage, config: Config) -> int:
    return max(1, round(stage.steps * config.scale))


def main() -> None:
    config = common.parse(Config, __doc__)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "speedrun.json"
    settings = dataclasses.asdict(config)
    done = {"settings": settings, "finished": [], "minutes": {}}
    if state.exists():
        done = json.loads(state.read_text())
        changed = [name for name, value in settings.items() if done["settings"].get(name, value) != value]
        if changed:
            before = ", ".join(f"--{name.replace('_', '-')} {done['settings'][name]}" for name in changed)
            raise ValueError(f"{out} was begun with {before}: give the same, or another --out")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C does
    for stage in stages(config):
        if stage.name in done["finished"]:
            continue
        is_finished, minutes = run(stage, config)
        before = done["minutes"].get(stage.name, (0, 0))
        done["minutes"][stage.name] = [sum(pair) for pair in zip(before, minutes, strict=True)]
        done["finished"] += [stage.name] if is_finished else []
        with common.replacing(state) as temporary:
            temporary.write_text(json.dumps(done, indent=1) + "\n")
        if not is_finished:
            sys.exit(f"{stage.name} was stopped: the same command resumes")
    flops, totals = flops_per_sample(config), [0.0, 0.0, 0.0]
    print("\n| stage | minutes | core-minutes | samples | PFLOP | reached |\n|---|---|---|---|---|---|")
    for stage in stages(config):
        samples = steps_of(stage, config) * stage.batch
        numbers = [*done["minutes"][stage.name], samples * flops.get(stage.name, 0) / 1e15]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        minutes, core_minutes, petaflops = numbers
        cells = f"{minutes:.1f} | {core_minutes:.1f} | {samples:,} | {petaflops:.3f}"
        print(f"| {stage.name} | {cells} | {figure(config, stage)} |")
    print(f"| all | {totals[0]:.1f} | {totals[1]:.1f} | | {totals[2]:.3f} | |")


if __name__ == "__main__":
    common.main(main)
