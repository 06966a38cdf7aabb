#!/usr/bin/env bash
# What a decoder should be trained on, and with which losses: five of them, 1,200 steps each, scored on
# pictures of four kinds that none has seen. About 25 minutes on 2 cores; the README has the table.
set -euo pipefail
out=${1:-runs/decoders}
kinds=objects=nano:objects,scenes=nano:scenes,text=nano:text,photographs=$out/photographs/test
python -m nano.prepare photographs --out "$out"

compare() {  # name of the decoder, flags of its training
    python train_decoder.py --out "$out/$1" --steps 1200 --save-every 1200 --resume auto "${@:2}"
    python eval.py recon --autoencoder "$out/$1/model" --data "$kinds" --out "$out/$1.json"
}

compare objects --data nano:objects
compare scenes --data nano:objects=0.7,nano:scenes=0.3
compare text --data nano:objects=0.7,nano:scenes=0.15,nano:text=0.15
compare photographs --data "nano:objects=0.6,nano:scenes=0.1,nano:text=0.1,$out/photographs/train=0.2" --crop random
compare full --preset nano-full --disc-start 400 --gan-start 600  # the data of "text"

python - "$out" << 'END'  # three rows for each kind: originals, L1 alone, every loss
import sys

from PIL import Image

l1, full = (Image.open(f"{sys.argv[1]}/{name}.png") for name in ("text", "full"))
row = (l1.height + 2) // 8  # of 8 rows with gaps of 2
rows = [(strip, 2 * kind + place) for kind in range(4) for strip, place in ((l1, 0), (l1, 1), (full, 1))]
picture = Image.new("RGB", (l1.width, row * len(rows)), "white")
for number, (strip, place) in enumerate(rows):
    picture.paste(strip.crop((0, place * row, strip.width, (place + 1) * row - 2)), (0, number * row))
picture.save(f"{sys.argv[1]}/losses.png")
END
