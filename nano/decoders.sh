#!/usr/bin/env bash
# Which data and losses should a decoder be trained with? Trains five decoders for 1,200 steps and evaluates them on
# unseen images of four domains. About 25 minutes on 2 cores. Writes OUT/losses.png: originals, L1, all losses.
#
#     bash nano/decoders.sh [OUT]       # default runs/decoders; resumes what was stopped
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-runs/decoders}
domains=objects=nano:objects,scenes=nano:scenes,text=nano:text,photographs=$out/photographs/test
"$python" -m nano.prepare photographs --out "$out"

compare() {  # NAME FLAGS...
    "$python" train_decoder.py --out "$out/$1" --steps 1200 --save-every 1200 --resume "${@:2}"
    "$python" eval.py recon --autoencoder "$out/$1/model" --data "$domains" --out "$out/$1.json"
}

compare objects --data nano:objects
compare scenes --data nano:objects=0.7,nano:scenes=0.3
compare text --data nano:objects=0.7,nano:scenes=0.15,nano:text=0.15
compare photographs --data "nano:objects=0.6,nano:scenes=0.1,nano:text=0.1,$out/photographs/train=0.2" --crop random
compare full --preset nano-full --disc-start 400 --gan-start 600  # the data of "text"

"$python" - "$out" << 'END'
import sys

from PIL import Image

l1, full = (Image.open(f"{sys.argv[1]}/{name}.png") for name in ("text", "full"))
height = (l1.height + 2) // 8  # eight rows, 2 pixels apart: originals and reconstructions of four domains
rows = []
for domain in range(4):
    rows += [(l1, 2 * domain), (l1, 2 * domain + 1), (full, 2 * domain + 1)]
image = Image.new("RGB", (l1.width, height * len(rows)), "white")
for number, (strip, row) in enumerate(rows):
    image.paste(strip.crop((0, row * height, strip.width, (row + 1) * height - 2)), (0, number * height))
image.save(f"{sys.argv[1]}/losses.png")
END
