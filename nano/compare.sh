#!/usr/bin/env bash
# The switches that Scale-RAE compares, each tried once in the nano world, with flags alone: the timestep shift, the
# wide head at two widths, a VAE's latents, a second encoder, a noise-augmented decoder, a frozen language model, and
# finetuning by epochs with questions in the mixture. Says what each costs and its velocity errors on 256 unseen
# pictures: a few hundred steps show that the switches work, not which side is better.
#
#     bash nano/compare.sh [OUT]        # resumes what was stopped; default runs/compare; STEPS=300, FLAGS="--dtype bf16"
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${1:-runs/compare} steps=${STEPS:-300}
mkdir -p "$out"
trained() {  # NAME FLAGS...
    "$python" train_t2i.py --resume --out "$out/$1" --steps "$steps" --save-every "$steps" \
        --noise-first $((steps / 5)) ${FLAGS:-} "${@:2}"
}
decoder() {  # NAME FLAGS...
    "$python" train_decoder.py --resume --out "$out/$1" --steps "$steps" --save-every "$steps" ${FLAGS:-} "${@:2}"
}

trained base
trained no-shift --alpha 1
trained head --dit nano-DH
trained narrow --dit nano-guide
trained narrow-head --dit nano-guide-DH
trained frozen --freeze language-model

[ -e "$out/parts/vae/config.json" ] || "$python" -m nano.prepare vae --out "$out/parts" --steps "$steps"
trained vae --autoencoder "$out/parts/vae" --reader nano/weights/rae

[ -e "$out/parts/encoder/config.json" ] ||  # of another seed
    "$python" -m nano.prepare encoder --out "$out/parts" --steps "$steps" --seed 1
decoder second --encoder "$out/parts/encoder"
trained encoder --autoencoder "$out/second/model"

decoder clean --encoder nano/weights/encoder --tau 0
decoder noisy --encoder nano/weights/encoder --tau 0.2
for name in clean noisy; do  # the same latents, drawn by the base model, through both
    [ -e "$out/$name.json" ] || "$python" eval.py recon --autoencoder "$out/$name/model" --data nano:objects --out "$out/$name.json"
    "$python" sample.py "a red circle" "two blue stars" --model "$out/base/model" --autoencoder "$out/$name/model" --out "$out/drawn-$name"
done

[ -e "$out/few/talks.jsonl" ] || "$python" - "$out/few" << 'END'  # requests and questions about 256 pictures
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
    talk = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns)]
    lines.append(json.dumps({"image": f"{i}.png", "conversations": talk}) + "\n")
(folder / "talks.jsonl").write_text("".join(lines))
END
for epochs in 4 16; do
    "$python" train_t2i.py --resume --out "$out/epochs-$epochs" --init "$out/base/model" --data "$out/few/talks.jsonl" \
        --epochs "$epochs" --warmup 0.03 --lr 1e-4 --dit-lr 2e-4 ${FLAGS:-}
done

"$python" - "$out" << 'END'
import json
import sys
from pathlib import Path

import torch

import data
import rae

print("| training | learned, M | steps | images/s | velocity error at t = 0.3 | 0.6 | 0.9 | cross-entropy of answers |")
print("|---" * 8 + "|")
names = "base no-shift head narrow narrow-head frozen vae encoder epochs-4 epochs-16".split()
for name in names:
    folder = Path(sys.argv[1]) / name
    model = rae.TextToImage.from_pretrained(folder / "model").eval()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loader = data.Loader(data.open_source("nano:objects", model.autoencoder.image_size, 1000), 256, workers=0)
    batch, generator = next(loader), torch.Generator().manual_seed(0)
    images = data.to_unit(batch["image"], torch.device("cpu"))
    questions = data.Loader(data.open_source("nano:objects", model.autoencoder.image_size, 1000, understanding=1.0), 256, workers=0)
    asked = next(questions)
    with torch.no_grad():
        latents, condition = model.autoencoder.encode(images), model.condition(batch["caption"])
        noise = torch.randn(latents.shape, generator=generator)
        errors = [
            rae.flow_loss(model.dit, latents, condition, 1.0, noise, torch.full((256,), t)).mean() for t in (0.3, 0.6, 0.9)
        ]
        chat = model.chat(asked["conversation"])
        read = model.reader.encode(data.to_unit(asked["image"], torch.device("cpu")))
        none = torch.zeros(256)
        text, _ = model(chat, torch.zeros(256, *model.latent_shape), torch.zeros(256, *model.latent_shape), none, none.bool(), read)
    frozen = "language_model." if name == "frozen" else "-"
    learned = sum(p.numel() for key, p in model.named_parameters() if p.requires_grad and not key.startswith(frozen))
    speed = sorted(row["images_per_second"] for row in rows)[len(rows) // 2]
    shown = " | ".join(f"{error:.3f}" for error in errors)
    print(f"| {name} | {learned / 1e6:.2f} | {rows[-1]['step']} | {speed:.0f} | {shown} | {text / len(chat.targets):.3f} |")
END
