#!/usr/bin/env bash
# Class labels in the nano world: trains a DiT on 48 pairs of shape and colour, and a smaller one for a shorter
# time as its guide, and compares no guidance, classifier-free guidance and AutoGuidance by the FID, precision and
# recall of 480 pictures against 4,000 others, in features of the nano encoder.
#
#     bash nano/classes.sh [OUT]        # resumes what was stopped; default runs/classes
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-runs/classes}
flags=(--preset nano-class --resume --save-every 100)
"$python" train_t2i.py "${flags[@]}" --steps 700 --out "$out/model"
"$python" train_t2i.py "${flags[@]}" --steps 350 --dit nano-guide --out "$out/guide"
draw() {  # NAME FLAGS...: pictures, and their numbers
    "$python" sample.py --classes all --n 480 --seed 100000 --resume --model "$out/model/model" \
        --out "$out/$1" --npz "$out/$1.npz" "${@:2}"
    "$python" eval.py fid --samples "$out/$1.npz" --reference nano:classes --limit 4000 --out "$out/$1.json"
}
draw plain --guidance 1
draw cfg --guidance 1.5
draw auto --guidance 1.5 --guide "$out/guide/model"
