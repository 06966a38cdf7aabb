#!/usr/bin/env bash
# Class conditioning in the nano world: trains a DiT on the 48 pairs of shape and colour, and a smaller one for half
# the steps as its guide. Compares no guidance, classifier-free guidance and AutoGuidance by FID, precision and recall
# of 480 images against 4,000 others, in features of the nano encoder.
#
#     bash nano/classes.sh [OUT]        # default runs/classes; resumes what was stopped
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-runs/classes}
flags=(--preset nano-class --resume --save-every 100)
"$python" train_t2i.py "${flags[@]}" --steps 700 --out "$out/model"
"$python" train_t2i.py "${flags[@]}" --steps 350 --dit nano-guide --out "$out/guide"
evaluate() {  # NAME FLAGS...
    "$python" sample.py --classes all --n 480 --seed 100000 --resume --model "$out/model/model" \
        --out "$out/$1" --npz "$out/$1.npz" "${@:2}"
    "$python" eval.py fid --samples "$out/$1.npz" --reference nano:classes --limit 4000 --out "$out/$1.json"
}
evaluate plain --guidance 1
evaluate cfg --guidance 1.5
evaluate auto --guidance 1.5 --guide "$out/guide/model"
