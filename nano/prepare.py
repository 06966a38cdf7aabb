"""Trains the parts that the papers take off the shelf, at the size of a laptop, as ordinary `transformers`
and `diffusers` folders.

    python -m nano.prepare language-model       # stands in for Qwen2.5: a ChatML tokenizer and a Qwen2 model
    python -m nano.prepare encoder              # stands in for SigLIP-2: a vision tower that knows objects
    python -m nano.prepare vae                  # stands in for FLUX's VAE, to compare with the RAE
    python -m nano.prepare ship                 # what nano.speedrun trained -> nano/weights, as bf16

Encoder: each token predicts, through one linear layer, what the nearest object or letter is, where its centre
lies, and what the background looks like, in place of what SigLIP-2 learns from captions. Noise on the tokens
makes the encoder keep this and drop pixels, which the decoder redraws: fewer numbers to generate.

Language model: answers questions about captions and about images, which it reads as the encoder's targets,
through one linear layer. After a request for an image, the hidden states at the places of the later latent
queries predict, through noise and one linear layer, what the caption says. From images alone the queries
would learn that slowly.

VAE: L1 of pixels and of their differences, and a trace of KL. Packed 2x2, it has as many tokens as the RAE.
"""

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import common
import data
import rae
from nano import shapes

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE, PATCH = 48, 8  # sides in pixels of an image and of one token's patch
WIDTH = 96  # channels of a token
NOISE = 0.5  # largest sigma of the noise on a token that has to predict
CLASSES = (*shapes.SHAPES, *shapes.GLYPHS)
# of the squared errors of `describe`: an outline is right if its centre, radius and tilt are
WEIGHTS = (
    [1.0] * len(shapes.SHAPES) + [4.0] * len(shapes.GLYPHS) + [9.0, 9.0, 4.0, 4.0] + [1.0] * 7 + [0.5] * 16
)
DOMAINS = ("objects", "objects", "scenes", "text")  # in turn, for the encoder
TEXTS = ("objects", "position", "scenes", "text")  # and for the language model
IMAGES = "nano:objects=0.7,nano:scenes=0.15,nano:text=0.15"


# -----------------------------------------------------------------------------------------------------------
# text


TOKENS = (SIZE // PATCH) ** 2  # of an image
KEPT = 12  # random ones of the 36 latent queries, which saves time


def conversation(seed: int, index: int) -> tuple[list[tuple[str, str]], shapes.Sample]:
    """The turns of a conversation and the sample it is about. Of eight, five ask for an image, two about an
    image, and one about a caption."""
    sample = shapes.draw(TEXTS[index % len(TEXTS)], seed, index, SIZE)
    number, kind = data.hash_seed(seed, index), (index + index // 8) % 8  # each kind with every domain
    if kind < 5:
        turns = data.request(sample.caption, number % 1000 / 1000)
    elif kind < 7:
        turns = sample.dialogue(data.rng(seed, index))
    else:
        question, answer = sample.questions[number % len(sample.questions)]
        turns = [("user", f"{sample.caption}\n{question}"), ("assistant", answer)]
    return turns, sample


COLORS = ("", *shapes.COLORS)
SIDES = {"left of": ("left", "right"), "above": ("top", "bottom")}  # of subject and reference
SIDES |= {"right of": SIDES["left of"][::-1], "below": SIDES["above"][::-1]}
PLACES = (*SIDES["left of"], *SIDES["above"])
FACTS = {  # what a caption can say, and its weight: what is rare or hard counts for more
    # not one number per pair of colour and shape: pairs that never occur would have none
    **{f"{channel} of {what}": 4.0 for what in (*shapes.SHAPES, *PLACES) for channel in "rgb"},
    **dict.fromkeys((*COLORS, *shapes.SHAPES, *(str(count) for count in range(1, 5))), 1.0),
    **dict.fromkeys(shapes.RELATIONS, 4.0),
    **{f"{role} {shape}": 4.0 for role in ("subject", "reference") for shape in shapes.SHAPES},
    # follow from these, but the DiT would have to multiply
    **{f"{place} {shape}": 2.0 for place in PLACES for shape in shapes.SHAPES},
    **{f"background {name}": 4.0 for name in (*shapes.TEXTURES, *shapes.TONES)},
    **{f"ink {name}": 4.0 for name in shapes.DARK_INKS | shapes.LIGHT_INKS},
    **{f"letter {place} {letter}": 2.0 for place in range(4) for letter in shapes.GLYPHS},
}


def facts(metadata: dict) -> np.ndarray:
    """What a caption says as numbers (len(FACTS),), 0 if nothing: how many objects there are, of which shapes
    and colours; red, green and blue of every shape's colour, from -1 to 1; the relation of two objects, and
    what is on each side; texture and tone of the background; colour and letters of a word."""
    include, said = metadata["include"], Counter()

    def say_color(what: str, entry: dict) -> None:
        if "color" in entry:
            for channel, value in zip("rgb", shapes.COLORS[entry["color"]], strict=True):
                said[f"{channel} of {what}"] = value / 127.5 - 1

    for entry in include:
        shape, count = entry["class"], entry["count"]
        said.update({entry.get("color", ""): count, shape: count, str(count): 1})
        say_color(shape, entry)
        if "position" in entry:
            relation, other = entry["position"]
            said.update([relation, f"subject {shape}", f"reference {include[other]['class']}"])
            for side, thing in zip(SIDES[relation], (entry, include[other]), strict=True):
                said[f"{side} {thing['class']}"] = 1
                say_color(side, thing)
    said.update(f"background {name}" for name in metadata.get("background", ()))
    said.update([f"ink {metadata['ink']}"] if "ink" in metadata else [])
    said.update(f"letter {place} {letter}" for place, letter in enumerate(metadata.get("word", "")))
    return np.array([said[name] for name in FACTS], dtype=np.float32)


def make_tokenizer(vocabulary: int = 576, documents: int = 20_000) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE in which every capital is a token, so that words to be drawn are spelled out."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[A-Z]| ?[a-z]+| ?[^\sA-Za-z]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = (text.replace("<image>", "") for i in range(documents) for _, text in conversation(0, i)[0])
    headers = f"assistant user system\n{rae.SYSTEM}\n"
    tokenizer.train_from_iterator((headers + text for text in texts), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=special[0],
        additional_special_tokens=special[1:],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_language_model(out: Path, steps: int, batch: int, seed: int, dist_ctx: common.DistContext) -> None:
    if batch < 8:
        raise ValueError(f"--batch {batch}: give at least 8, the number of kinds of conversations")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_theta=1e4,
            tie_word_embeddings=True,
        )
    )

    readout, projector = torch.nn.Linear(128, len(FACTS)), torch.nn.Linear(len(WEIGHTS), 128)
    weights = torch.tensor(list(FACTS.values()))

    def encode(turns: list[tuple[str, str]]) -> tuple[torch.Tensor, ...]:
        """Token ids, labels and positions (L,) of a conversation, and where its queries are."""
        # The labels have to be those of text-to-image. Otherwise its loss is mostly that of headers, and
        # queries and projector are trained to predict these.
        ids, labels = map(torch.tensor, rae.encode_chat(turns, tokenizer, TOKENS))
        labels[0] = rae.IGNORED  # no token is before it
        queries = (ids == rae.IMAGE) & ("<image>" in turns[-1][1])
        kept = torch.ones(len(ids), dtype=torch.bool)
        if queries.any():
            kept[queries.nonzero()[torch.randperm(TOKENS)[KEPT:]]] = False
        return ids[kept], labels[kept], torch.arange(len(ids))[kept], queries[kept]

    def loss(step: int) -> torch.Tensor:
        pairs = [conversation(seed, step * batch + i) for i in range(batch)]
        pairs.sort(key=lambda pair: len(pair[0]))  # similar lengths together
        encoded = list(zip(*(encode(turns) for turns, _ in pairs), strict=True))
        lengths = [len(row) for row in encoded[0]]
        # (L,), all conversations one after another
        ids, labels, positions, queries = map(torch.cat, encoded)
        images = (ids == rae.IMAGE) & ~queries
        # ---- inputs: of an image to read, what the encoder predicts; queries as they are initialised
        described = [describe(sample) for turns, sample in pairs if "<image>" in turns[0][1]]
        said = np.stack([facts(sample.metadata) for turns, sample in pairs if "<image>" in turns[-1][1]])
        embeddings = model.get_input_embeddings()(ids.clamp(min=0))
        embeddings[images] = projector(torch.from_numpy(np.concatenate(described))).float()
        embeddings[queries] = torch.randn(queries.sum(), 128) / 128**0.5
        # ---- last hidden states (L, 128)
        hidden = []
        for start in range(0, batch, 16):
            part = slice(start, start + 16)
            x, position_ids = (
                torch.nn.utils.rnn.pad_sequence(flat.split(lengths)[part], batch_first=True)
                for flat in (embeddings, positions)
            )
            # `use_cache` is on: otherwise a gap in the positions would count as the border of two documents
            states = model.model(inputs_embeds=x, position_ids=position_ids).last_hidden_state
            hidden += [row[:length] for row, length in zip(states, lengths[part], strict=True)]
        hidden = torch.cat(hidden)
        # ---- supervised tokens, each predicted by the one before it
        supervised = labels != rae.IGNORED
        logits = model.lm_head(hidden[supervised.roll(-1)]).float()
        text_loss = F.cross_entropy(logits, labels[supervised])
        # ---- what the caption says, at every query
        states = hidden[queries].view(len(said), KEPT, 128)
        sigma = NOISE * torch.rand(len(said), 1, 1)
        error = readout(states + sigma * torch.randn_like(states)) - torch.from_numpy(said)[:, None]
        facts_loss = (weights * error.square()).sum(dim=-1).mean()
        # half of the tokens are headers; with a weight of 2 instead it learns to read images later
        return 10 * text_loss + facts_loss

    tokenizer.save_pretrained(out)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    parts = torch.nn.ModuleList([model, readout, projector])
    # decay, because large matrices learn slowly
    train(parts, loss, steps, dist_ctx, lr=2e-3, out=out, save=model, muon=matrices, muon_decay=0.1)


# -----------------------------------------------------------------------------------------------------------
# images


def describe(sample: shapes.Sample) -> np.ndarray:
    """What each token has to predict, (N, 59): of its nearest object, one-hot class, offset to the centre,
    radius, tilt if it is visible, colour, and 1, which all fade to 0 outside of the object's edge; and of the
    background, colour and pattern."""
    side = SIZE // PATCH
    middle = (np.arange(side) + 0.5) * PATCH
    tokens = np.stack(np.meshgrid(middle, middle), axis=-1).reshape(-1, 1, 2)
    # ---- the nearest object
    to_center = np.array([(thing.x, thing.y) for thing in sample.objects]) - tokens  # (N, objects, 2)
    to_edge = np.linalg.norm(to_center, axis=-1) - [thing.radius for thing in sample.objects]
    nearest, rows = to_edge.argmin(axis=1), np.arange(side**2)
    one_hot = 1.5 * np.eye(len(CLASSES))[[CLASSES.index(thing.shape) for thing in sample.objects]]
    known = []
    for thing in sample.objects:
        tilt = 0 if thing.shape in ("circle", "ring") else thing.tilt / 0.115
        known.append(((thing.radius - 8) / 2, tilt, *(np.array(thing.rgb) / 127.5 - 1), 1))
    offset = to_center[rows, nearest] / PATCH
    of_object = np.concatenate([one_hot[nearest], offset, np.array(known)[nearest]], axis=1)
    fade = np.clip((7 - to_edge[rows, nearest, None]) / 6, 0, 1)
    # ---- the background: its mean colour, and how much lighter each quarter of a side is
    patches = rearrange(sample.background, "(h p) (w q) c -> (h w) p q c", p=PATCH, q=PATCH)
    color = patches.mean(axis=(1, 2)) / 127.5 - 1
    light = rearrange(patches.mean(axis=-1), "n (h p) (w q) -> n (h w) p q", p=2, q=2).mean(axis=(2, 3))
    pattern = (light - light.mean(axis=1, keepdims=True)) / 32
    return np.concatenate([of_object * fade, color, pattern], axis=1, dtype=np.float32)


def train_encoder(
    out: Path,
    steps: int,
    batch: int,
    seed: int,
    dist_ctx: common.DistContext,
    width: int = WIDTH,
    target: str = "objects",
) -> None:
    """`objects`: tokens predict what is there. `pixels`: they predict their own pixels, to compare with."""
    torch.manual_seed(seed)
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=4,
            num_hidden_layers=6,
            image_size=SIZE,
            patch_size=PATCH,
            vision_use_head=False,
        )
    )
    model.post_layernorm.requires_grad_(False)  # RAE takes tokens without its scale and shift
    weights = torch.tensor(WEIGHTS if target == "objects" else [1.0] * (3 * PATCH**2))
    head = torch.nn.Linear(width, len(weights))

    def loss(step: int) -> torch.Tensor:
        numbers = range(step * batch, (step + 1) * batch)
        samples = [shapes.draw(DOMAINS[number % len(DOMAINS)], seed, number, SIZE) for number in numbers]
        images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
        pixels = data.to_unit(images, torch.device("cpu")) * 2 - 1
        if target == "pixels":
            targets = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
        else:
            targets = torch.from_numpy(np.stack([describe(sample) for sample in samples]))
        tokens = model(pixels).last_hidden_state  # (B, N, width)
        sigma = NOISE * torch.rand(batch, 1, 1)
        error = head((tokens + sigma * torch.randn_like(tokens)).float()) - targets
        return (weights * error.square()).sum(dim=-1).mean()

    matrices = [p for p in model.encoder.parameters() if p.ndim == 2]
    parts = torch.nn.ModuleList([model, head])
    train(parts, loss, steps, dist_ctx, lr=1e-3, out=out, save=model, muon=matrices)
    half = [0.5, 0.5, 0.5]
    transformers.SiglipImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half
    ).save_pretrained(out)


def train_vae(out: Path, steps: int, batch: int, seed: int, dist_ctx: common.DistContext) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,  # 48 px -> 12 x 12, packed 6 x 6
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[24, 32, 48],
        norm_num_groups=8,
        latent_channels=8,
        sample_size=SIZE,
        use_quant_conv=False,  # like FLUX's
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    batches = data.Loader(data.open_source(IMAGES, SIZE, seed), batch)

    def pixels() -> torch.Tensor:
        return data.to_unit(next(batches)["image"], torch.device("cpu")) * 2 - 1

    def loss(step: int) -> torch.Tensor:
        original = pixels()
        posterior = model.encode(original).latent_dist
        error = model.decode(posterior.sample()).sample - original
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + edges + 1e-6 * posterior.kl().mean()

    train(model, loss, steps, dist_ctx, lr=1e-3, out=out)
    # mean and std that normalise each channel of its latents, measured on the trained weights
    with torch.no_grad():
        latents = torch.cat([model.float().encode(pixels()).latent_dist.mean for _ in range(8)])
    mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    model.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    model.save_config(out)


def ship(out: Path, runs: Path) -> None:
    """Copies the parts of a speedrun, with one log line in ten of the trainers. Matrices become bf16;
    statistics, frequencies and position tables stay as they are."""
    for part in ("language-model", "encoder", "decoder/model", "t2i/model"):
        if not (runs / part).is_dir():
            raise ValueError(f"no model at {runs / part}: train it first")
    for part in ("language-model", "encoder"):
        shutil.copytree(runs / part, out / part, dirs_exist_ok=True)
    model = rae.TextToImage.from_pretrained(runs / "t2i" / "model")
    model.autoencoder_path = str(out / "rae")
    parts = {"decoder": (rae.RAE.from_pretrained(runs / "decoder" / "model"), "rae"), "t2i": (model, "t2i")}
    for run, (part, name) in parts.items():
        for key, parameter in part.named_parameters():
            if key.startswith("encoder.") or (parameter.requires_grad and parameter.ndim > 1):
                parameter.data = parameter.data.bfloat16()
        part.save_pretrained(out / name)
        (out / name / "README.md").unlink()  # an empty model card
        rows = common.read_rows(runs / run / "metrics.jsonl")
        rows = [row for row in rows if "loss" in row]  # those of the training loss, not of validation
        kept = [*rows[9:-1:10], rows[-1]]
        (out / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def train(
    model,
    loss,
    steps: int,
    dist_ctx: common.DistContext,
    lr: float,
    out: Path,
    save=None,
    muon: Sequence = (),
    muon_decay: float = 0.0,
) -> None:
    """AdamW, and Muon with a weight decay for some matrices, with warm-up and cosine decay of the learning
    rates. Writes the model, or its part `save`, as bf16 and a log into `out`. loss(step): the loss of one
    batch."""
    others = [p for p in model.parameters() if p.requires_grad and not any(p is matrix for matrix in muon)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    if muon:
        optimizers.append(common.Muon(muon, lr=0.01, weight_decay=muon_decay))
    optimizers = common.Optimizers(*optimizers)
    out.mkdir(parents=True, exist_ok=True)
    started, log = time.time(), []
    for step in (bar := tqdm(range(steps), dynamic_ncols=True)):
        optimizers.set_lr(common.cosine(step, steps, steps // 20, 0.0))
        with dist_ctx.autocast():
            value = loss(step)
        value.backward()
        grad_norm = optimizers.step()
        if step % 50 == 0 or step == steps - 1:
            row = {"step": step, "loss": value.item(), "grad_norm": grad_norm.item()}
            log.append(row | {"seconds": time.time() - started})
            bar.set_postfix(loss=f"{row['loss']:.3f}")
    (model if save is None else save).bfloat16().save_pretrained(out)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


PARTS = {  # how each is trained: the function, its steps and samples per step
    "language-model": (train_language_model, 2000, 64),
    "encoder": (train_encoder, 6000, 32),
    "vae": (train_vae, 2000, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "ship"])
    parser.add_argument("--out", type=Path, help="writes OUT/PART (default: runs/nano; ship: nano/weights)")
    defaults = [", ".join(f"{part} {recipe[i]}" for part, recipe in PARTS.items()) for i in (1, 2)]
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {defaults[0]})")
    parser.add_argument("--batch", type=int, help=f"samples per step (default: {defaults[1]})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/speedrun"), help="ship: folder of a speedrun")
    parser.add_argument("--width", type=int, default=WIDTH, help="encoder: channels of a token")
    parser.add_argument(
        "--target", default="objects", choices=["objects", "pixels"], help="encoder: what its tokens predict"
    )
    parser.add_argument("--dtype", default="fp32", choices=["bf16", "fp32"], help="compute dtype")
    args = parser.parse_args()
    dist_ctx = common.init_distributed(args.dtype)
    out = args.out or (common.WEIGHTS if args.part == "ship" else Path("runs/nano"))
    if args.part == "ship":
        ship(out, args.runs)
    else:
        train_part, steps, batch = PARTS[args.part]
        options = {"width": args.width, "target": args.target} if args.part == "encoder" else {}
        steps = steps if args.steps is None else args.steps  # 0: random weights
        train_part(out / args.part, steps, args.batch or batch, args.seed, dist_ctx, **options)


if __name__ == "__main__":
    common.main(main)
