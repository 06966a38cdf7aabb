"""Kills trainings at random moments and checks that they end as if nothing had happened.

    python tests/kill.py --runs 50

Each run is two processes under `torchrun --max-restarts`; one of them gets SIGKILL several times. At the end
the weights and the log have to be those of a run without a kill, bit for bit.
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
STEPS = 30


def launch(parts: Path, out: Path, restarts: int) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", str(restarts), "--monitor-interval", "0.1",
        "train_decoder.py", "--encoder", parts / "encoder", "--out", out, "--batch", "4",
        "--statistics", "16", "--steps", str(STEPS), "--save-every", "2", "--log-every", "1",
        "--workers", "1", "--resume", "auto", "--shard", "full",
    ]  # fmt: skip
    with open(f"{out}.log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(list(map(str, command)), env=env, cwd=ROOT, stdout=log, stderr=log)


def workers(process: subprocess.Popen) -> list[int]:
    """The trainings among torchrun's children."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def last_step(out: Path) -> int:
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def trial(parts: Path, folder: Path, chance: random.Random, kills: int) -> str:
    """One run that is killed, beside one that is not: "identical", or what is not."""
    done = 0
    for name, restarts in (("whole", 0), ("killed", kills)):
        if not (folder / name).exists():
            process = launch(parts, folder / name, restarts)
            for _ in range(restarts):  # each after some more steps, at a random moment of a step
                goal = last_step(folder / name) + chance.randint(1, 6)
                while process.poll() is None and last_step(folder / name) < min(goal, STEPS - 1):
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.2))
                if process.poll() is None and (alive := workers(process)):
                    victim = chance.choice(alive)
                    os.kill(victim, 9)
                    done += 1
                    while process.poll() is None and victim in workers(process):
                        time.sleep(0.01)
            if process.wait(timeout=300):
                return f"failed, see {folder / name}.log"
    if not done:
        return "nothing was killed"
    one, other = (load_file(folder / name / "model/model.safetensors") for name in ("whole", "killed"))
    if not all(one[key].equal(other[key]) for key in one):
        return "other weights"
    rows = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[(row["step"], row["loss"]) for row in map(json.loads, lines)] for lines in rows]
    return "identical" if losses[0] == losses[1] else "another log"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=Path, default=ROOT / "nano/weights", help="holds encoder/")
    args = parser.parse_args()
    chance, results = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.runs):
            results.append(trial(args.parts, Path(folder), chance, args.kills))
            print(f"run {number + 1}: {results[-1]}", flush=True)
            if results[-1] != "identical":
                break
            shutil.rmtree(Path(folder) / "killed")
    print(f"{results.count('identical')} of {args.runs} identical")
    sys.exit(results.count("identical") != args.runs)


if __name__ == "__main__":
    main()
