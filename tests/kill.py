"""Kills runs at random with SIGKILL and checks that the final weights and losses match an uninterrupted run
bit for bit.

    python tests/kill.py --runs 50

Each run is two processes under `torchrun --max-restarts`, one of which is killed several times.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
STEPS = 12


def flags(parts: Path, out: Path) -> list[str]:
    line = f"--init {parts / 'rae'} --out {out} --batch 4 --steps {STEPS} --save-every 2 --log-every 1"
    return f"{line} --workers 1 --resume auto --shard full".split()


def launch(parts: Path, out: Path, restarts: int) -> subprocess.Popen:
    line = "-m torch.distributed.run --standalone --nproc-per-node 2 --monitor-interval 0.1 --max-restarts"
    command = [sys.executable, *line.split(), str(restarts), "train_decoder.py", *flags(parts, out)]
    with open(f"{out}.log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)


def workers(process: subprocess.Popen) -> list[int]:
    """The ids of torchrun's children."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def last_step(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def run(parts: Path, out: Path, rng: random.Random, kills: int) -> int:
    """Trains under torchrun; returns how often a process was killed."""
    process, killed = launch(parts, out, kills), 0
    for _ in range(kills):  # each after some more steps, at a random moment of a step
        goal = min(last_step(out) + rng.randint(1, 5), STEPS - 1)
        while process.poll() is None and last_step(out) < goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        if process.poll() is None and (alive := workers(process)):
            victim = rng.choice(alive)
            os.kill(victim, 9)
            killed += 1
            while process.poll() is None and victim in workers(process):
                time.sleep(0.01)
    if process.wait(timeout=300):
        raise RuntimeError(f"failed, see {out}.log")
    return killed


def is_identical(one: Path, other: Path) -> bool:
    weights = [load_file(out / "model/model.safetensors") for out in (one, other)]
    rows = [map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) for out in (one, other)]
    losses = [[(row["step"], row["loss"]) for row in part] for part in rows]
    return losses[0] == losses[1] and all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=Path, default=ROOT / "nano/weights", help="holds rae/")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        run(args.parts, whole, rng, kills=0)
        for number in range(1, args.runs + 1):
            kills = run(args.parts, killed, rng, args.kills)
            if not is_identical(whole, killed):
                sys.exit(f"run {number}: differs after {kills} kills")
            print(f"run {number}: identical after {kills} kills", flush=True)
            shutil.rmtree(killed)


if __name__ == "__main__":
    main()
