#!/usr/bin/env bash
# Guidance, steps and solver of the sampler against the six-task score of a model: one plot. Scored at 10 prompts
# a task, 4 pictures each; not timed yet. What is scored already is not scored again.
#
#     bash nano/sampling.sh [MODEL] [OUT]        # default nano/weights/t2i runs/sampling
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} model=${1:-nano/weights/t2i} out=${2:-runs/sampling}
score() {  # SOLVER STEPS GUIDANCE
    local file="$out/$1-$2-$3.json"
    [ -e "$file" ] || "$python" eval.py shapes --model "$model" --limit "${LIMIT:-10}" \
        --solver "$1" --steps "$2" --guidance "$3" --out "$file"
}
for guidance in 1 2 3 5 8; do score euler 50 "$guidance"; done
for steps in 5 10 25 100; do score euler "$steps" 3; done
for steps in 5 13 25; do score heun "$steps" 3; done
"$python" - "$out" << 'END'
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

scores = {}
for path in Path(sys.argv[1]).glob("*.json"):
    solver, steps, guidance = path.stem.split("-")
    found = {row["metric"]: row["value"] for row in json.loads(path.read_text())}
    scores[solver, int(steps), float(guidance)] = found
figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
for task, style in (("overall", "k-o"), ("single_object", "C0--."), ("colors", "C1--.")):
    points = [(g, found[f"shapes/model/{task}"]) for (s, n, g), found in sorted(scores.items()) if (s, n) == ("euler", 50)]
    left.plot(*zip(*points), style, label=task.replace("_", " "))
for solver, cost, style in (("euler", 1, "k-o"), ("heun", 2, "C2-s")):
    points = [(cost * n, found["shapes/model/overall"]) for (s, n, g), found in sorted(scores.items()) if (s, g) == (solver, 3)]
    right.plot(*zip(*points), style, label=solver)
left.set(xlabel="guidance scale, 50 Euler steps", ylabel="share of right pictures", ylim=(0, 1))
right.set(xlabel="evaluations of the network with guidance and of that without", xscale="log")
for axis in (left, right):
    axis.grid(alpha=0.3)
    axis.legend()
figure.savefig(f"{sys.argv[1]}/sampling.png", dpi=100, bbox_inches="tight")
print(f"{sys.argv[1]}/sampling.png")
END
