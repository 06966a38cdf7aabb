#!/usr/bin/env bash
# Trains the nano model once for every choice that Scale-RAE compares: timestep shift, DDT head at two widths, a
# VAE's latents, another encoder, a noise-augmented decoder, a frozen language model, and finetuning for 4 and 16
# epochs with questions in the data. Prints speed and validation loss. A few hundred steps show that the options
# work, not which one is better.
#
#     bash nano/compare.sh [OUT]      # default runs/compare; resumes; STEPS=300 and FLAGS="--dtype bf16" change it
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-runs/compare} steps=${STEPS:-300}
mkdir -p "$out"
train() {  # NAME FLAGS...
    "$python" train_t2i.py --resume --out "$out/$1" --steps "$steps" --save-every "$steps" \
        --val-data nano:objects ${FLAGS:-} "${@:2}"
}
train_decoder() {  # NAME FLAGS...
    "$python" train_decoder.py --resume --out "$out/$1" --steps "$steps" --save-every "$steps" ${FLAGS:-} "${@:2}"
}

# ---- timestep shift, DDT head, frozen language model --------------------------------------------------------------
train base
train no-shift --alpha 1
train head --dit nano-DH
train narrow --dit nano-guide
train narrow-head --dit nano-guide-DH
train frozen --freeze language-model

# ---- other latents: a VAE, and an RAE with an encoder of another seed ---------------------------------------------
[ -e "$out/parts/vae/config.json" ] || "$python" -m nano.prepare vae --out "$out/parts" --steps "$steps"
train vae --autoencoder "$out/parts/vae" --reader nano/weights/rae
[ -e "$out/parts/encoder/config.json" ] ||
    "$python" -m nano.prepare encoder --out "$out/parts" --steps "$steps" --seed 1
train_decoder second --encoder "$out/parts/encoder"
train encoder --autoencoder "$out/second/model"

# ---- noise-augmented decoder: the same generated latents through both decoders ------------------------------------
train_decoder clean --encoder nano/weights/encoder --tau 0
train_decoder noisy --encoder nano/weights/encoder --tau 0.2
for name in clean noisy; do
    [ -e "$out/$name.json" ] ||
        "$python" eval.py recon --autoencoder "$out/$name/model" --data nano:objects --out "$out/$name.json"
    "$python" sample.py "a red circle" "two blue stars" --model "$out/base/model" \
        --autoencoder "$out/$name/model" --out "$out/samples-$name"
done

# ---- finetuning on 256 images: three requests for one question, 4 and 16 epochs at batch 32 -----------------------
[ -e "$out/few/conversations.jsonl" ] || "$python" - "$out/few" << 'END'
import json
import sys
from pathlib import Path

from PIL import Image

from nano import shapes

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
lines = []
for i in range(256):
    sample = shapes.draw("objects", 77, i, 48)
    Image.fromarray(sample.image).save(folder / f"{i}.png")
    turns = [f"Draw {sample.caption}", "Here you go:\n<image>"]
    if i % 4 == 0:
        question, answer = sample.questions[i // 4 % 4]
        turns = [f"<image>\n{question}", answer]
    conversation = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns)]
    lines.append(json.dumps({"image": f"{i}.png", "conversations": conversation}) + "\n")
(folder / "conversations.jsonl").write_text("".join(lines))
END
for epochs in 4 16; do
    "$python" train_t2i.py --resume --out "$out/epochs-$epochs" --init "$out/base/model" --steps $((epochs * 8)) \
        --data "$out/few/conversations.jsonl" --val-data nano:objects --warmup 0.03 --lr 1e-4 --dit-lr 2e-4 ${FLAGS:-}
done

# ---- table --------------------------------------------------------------------------------------------------------
"$python" - "$out" << 'END'
import json
import sys
from pathlib import Path

columns = ("images_per_second", "text_loss", "val_loss", "val_loss_0.3", "val_loss_0.6", "val_loss_0.9")
print(f"| run | step | {' | '.join(columns)} |")
print("|---" * (len(columns) + 2) + "|")
for name in "base no-shift head narrow narrow-head frozen vae encoder epochs-4 epochs-16".split():
    last = {}
    for line in (Path(sys.argv[1]) / name / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    print(f"| {name} | {last['step']} | {' | '.join(f'{last[column]:.3f}' for column in columns)} |")
END
