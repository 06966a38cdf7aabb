"""The papers' claims about design, tested in the nano world.

    python -m nano.claims                        # the table of what was measured so far
    python -m nano.claims width head             # two claims, 3 seeds; started again, it resumes
    python -m nano.claims all --smoke            # every claim end to end, in two minutes

A claim that fails here is not refuted: this world is a toy. It is a question worth asking.

Every claim is one number per seed, its contrast, which is positive if the claim is right. The verdict is
Student's t test of the contrasts against 0, two-sided at 0.10: "agrees" if their mean is above 2.92 standard
errors (with three seeds), "disagrees" if it is below -2.92, else "cannot tell".

Arms that are compared see equally many samples (in `understanding`: equally many questions). Each DiT trains
with the better of two learning rates, chosen on seed 0; finetuning keeps the one of its model. Encoders and
decoders are trained once, with seed 0; only `data` trains its decoders per seed. Writes RESULTS/NAME.json and
NAME.png. Nothing that exists is made again.
"""

import importlib
import json
import math
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.stats
import torch
from PIL import Image

import common
import rae
import train_t2i
from common import flag
from nano import evaluate, shapes

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RATES = (0.008, 0.02)  # peak learning rates of Muon
TEXT = 3  # steps of a text-to-image model, in those of a class-conditional one
WIDTHS, ALPHAS, EPOCHS = (48, 96, 192), (1, 2, 4, 8), (4, 32, 128)
Figures = dict[str, float]  # by arm


@dataclass
class Config:
    names: list[str] = flag((), "claims to measure, or all (default: only the table)", nargs="*")
    seeds: int = flag(3, "number of seeds", at_least=1)
    steps: int = flag(300, "steps of a class-conditional DiT; others train for multiples of it", at_least=1)
    smoke: bool = flag(False, "one seed and two steps: shows that everything runs")
    dtype: str = flag("bf16", "compute dtype; fp32 on a CPU without AVX512-BF16", choices=["bf16", "fp32"])
    out: str = flag("runs/claims", "folder of the runs")
    results: str = flag("docs/claims", "folder of the results")


class Lab:
    """Trains and measures for one seed."""

    def __init__(self, config: Config, seed: int, rates: dict[str, float]):
        self.config, self.seed, self.rates = config, seed, rates
        self.eval_seed = 5000 + seed  # of images, prompts and noise that no training has seen
        self.runs = {}  # by DiT: the loss that chose its learning rate, samples and PFLOP
        self.dist_ctx = common.init_distributed(config.dtype)

    # ---- training runs; each returns the folder of a model

    def script(self, module: str, *flags) -> None:
        """Runs a script's `main` in this process, which saves the seconds of its imports."""
        handlers = {number: signal.getsignal(number) for number in STOPS}
        with mock.patch.object(sys, "argv", [module, *map(str, flags)]):
            importlib.import_module(module).main()
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def steps(self, multiple: float) -> int:
        return 2 if self.config.smoke else max(1, round(multiple * self.config.steps))

    def train(self, script: str, name: str, steps: int, *flags) -> Path:
        """A finished run of a trainer. Ends the program if that was stopped."""
        out = Path(self.config.out) / name
        metrics = out / "metrics.jsonl"

        def is_finished() -> bool:
            rows = common.read_rows(metrics) if metrics.exists() else []
            return (out / "model/config.json").exists() and any(row["step"] >= steps for row in rows)

        if not is_finished():
            flags = ("--out", out, "--steps", steps, "--resume", *flags)
            self.script(script, "--dtype", self.config.dtype, *flags)
            if not is_finished():
                sys.exit(f"{out} was stopped: the same command resumes")
        return out

    def prepared(self, part: str, name: str, multiple: float, *flags) -> Path:
        """An encoder or a VAE."""
        out = Path(self.config.out) / name
        if not out.exists():
            begun = out.with_name(f"{name}-begun")
            small = ["--batch", 4] if self.config.smoke else []
            steps = self.steps(multiple) if multiple else 0
            flags = ("--out", begun, "--steps", steps, "--dtype", self.config.dtype, *small, *flags)
            self.script("nano.prepare", part, *flags)
            begun.rename(out)
        return out / part

    def decoder(self, name: str, *flags, multiple: float = 5, seed: int = 0) -> Path:
        small = ["--statistics", 16, "--batch", 4, "--workers", 0] if self.config.smoke else []
        name, steps = f"decoder-{name}-{seed}", self.steps(multiple)
        return self.train("train_decoder", name, steps, "--seed", seed, *small, *flags) / "model"

    def dit(self, name: str, *flags, multiple: float = 1) -> Path:
        """With the better of two learning rates, by the validation loss on seed 0."""
        steps, trained = self.steps(multiple), {}
        small = ["--batch", 4, "--draws", 1, "--workers", 0] if self.config.smoke else ["--draws", 2]
        every = max(1, steps // 20)
        small += ["--warmup", 0.05, "--log-every", every, "--eval-every", steps]
        for rate in RATES[: 1 if self.config.smoke else None]:
            if self.rates.get(name, rate) == rate:
                values = ("--seed", self.seed, "--muon", rate, *small, *flags)
                out = self.train("train_t2i", f"{name}-muon{rate}-{self.seed}", steps, *values)
                trained[rate] = common.read_rows(out / "metrics.jsonl", "val_loss")[-1]["val_loss"], out
        rate = self.rates[name] = min(trained, key=trained.get)
        loss, out = trained[rate]
        samples = steps * settings_of(out)["batch"]
        self.runs[name] = {"val_loss": loss, "samples": samples, "pflop": pflop(out)}
        return out / "model"

    # ---- figures: shares of 1 unless said otherwise

    def right(self, folder: Path, autoencoder: Path | str = "", **sampler) -> float:
        """Share of a class-conditional model's images that show their label's shape and colour."""
        model = common.load_model(rae.ClassToImage, folder, str(autoencoder), self.dist_ctx)
        count, steps = (8, 2) if self.config.smoke else (480, 25)
        labels, right = [i % len(shapes.PAIRS) for i in range(count)], []
        config = evaluate.Config(seed=self.eval_seed, batch=80)
        images = evaluate.draw_images(model, labels, {"steps": steps} | sampler, config, self.dist_ctx)
        for label, image in zip(labels, images, strict=True):
            shape, color = shapes.PAIRS[label]
            entry = {"class": shape, "count": 1, "color": color}
            right.append(evaluate.is_right(image, {"include": [entry]}))
        return float(np.mean(right))

    def right_decoded(self, autoencoder: Path) -> float:
        """The same of true images after an autoencoder."""
        autoencoder, right = common.load_autoencoder(autoencoder, self.dist_ctx), []
        for i in range(8 if self.config.smoke else 480):
            sample = shapes.draw("classes", self.eval_seed, i)
            decoded = evaluate.reconstruct(autoencoder, sample.image, self.dist_ctx)
            right.append(evaluate.is_right(decoded, sample.metadata))
        return float(np.mean(right))

    def overall(self, folder: Path) -> tuple[float, float]:
        """GenEval's overall of a text-to-image model, and of true images after its autoencoder."""
        model = common.load_model(rae.TextToImage, folder, "", self.dist_ctx)
        limit, images, steps = (2, 1, 2) if self.config.smoke else (10, 4, 25)
        config = evaluate.Config(limit=limit, images=images, seed=self.eval_seed)
        results = evaluate.evaluate_shapes(model, {"steps": steps, "guidance": 3.0}, config, self.dist_ctx)
        values = {row["metric"]: row["value"] for row in results}
        return values["shapes/model/overall"], values["shapes/decoded/overall"]

    def psnr(self, folder: Path, domain: str) -> float:
        """In dB."""
        autoencoder, values = common.load_autoencoder(folder, self.dist_ctx), []
        for i in range(4 if self.config.smoke else 256):
            image = shapes.draw(domain, self.eval_seed, i).image
            error = (evaluate.reconstruct(autoencoder, image, self.dist_ctx) / 255.0 - image / 255.0) ** 2
            values.append(-10 * math.log10(error.mean()))
        return float(np.mean(values))

    def answers(self, folder: Path) -> tuple[float, float]:
        """Share of correct answers to questions about true images, by a model and by always giving the most
        frequent one."""
        model = common.load_model(rae.TextToImage, folder, "", self.dist_ctx)
        config = evaluate.Config(limit=1 if self.config.smoke else 100, seed=self.eval_seed)
        results = evaluate.evaluate_questions(model, {}, config, self.dist_ctx)
        values = {row["metric"]: row["value"] for row in results}
        return values["questions/model/all"], values["questions/most frequent/all"]


def settings_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def pflop(run: Path) -> float:
    """Of a training run, without its encoder; a conversation has about 80 tokens."""
    config = train_t2i.Config(**settings_of(run))
    model = (rae.TextToImage if config.condition == "text" else rae.ClassToImage).from_pretrained(
        run / "model"
    )
    return train_t2i.flops_per_step(config, model, None, 80) * config.steps / 1e15


# -----------------------------------------------------------------------------------------------------------
# the claims

rae.DITS |= {  # for --dit
    **{f"claim-{width}x{depth}": {"width": width, "depth": depth, "heads": 2}
       for width, depth in ((48, 2), (48, 8), (96, 2), (144, 2))},
    "claim-48x2-head": {"width": 48, "depth": 2, "heads": 2, "head": (144, 2, 2)},
}  # fmt: skip
HEAD = 256  # its width, the same for all sizes
BACKBONES = (128, 192, 256)  # 0.5 to 1 of it, in the paper 0.48 to 0.86
for width in BACKBONES:
    plain = {"width": width, "depth": 4, "heads": width // 32}
    rae.DITS[f"claim-{width}"] = plain
    rae.DITS[f"claim-{width}-head"] = plain | {"head": (HEAD, 2, HEAD // 32)}
    # as many parameters more as the head's two blocks have
    rae.DITS[f"claim-{width}-deep"] = plain | {"depth": 4 + round(2 * (HEAD / width) ** 2)}
IN_CONTEXT = ("--preset", "nano-class", "--dit", "nano-guide-in-context")
CLASS = ("--preset", "nano-class", "--dit", "nano-guide")  # 128 wide, 4 deep


def autoencoder_of(lab: Lab, name: str, multiple: float, *flags) -> Path:
    """An RAE whose encoder is trained by nano.prepare with some flags."""
    return lab.decoder(name, "--encoder", lab.prepared("encoder", f"encoder-{name}", multiple, *flags))


def encoder_96(lab: Lab) -> Path:
    """The encoder of most claims, whose tokens have 96 channels."""
    return lab.prepared("encoder", "encoder-96", 10)


def rae_96(lab: Lab) -> Path:
    return autoencoder_of(lab, "96", 10)


def semantics(lab: Lab) -> Figures:
    """One encoder learns what is in the image, one to reconstruct it, one nothing."""
    autoencoders = {
        "objects": rae_96(lab),
        "pixels": autoencoder_of(lab, "pixels", 10, "--target", "pixels"),
        "random": autoencoder_of(lab, "random", 0),
    }
    figures = {}
    for arm, autoencoder in autoencoders.items():
        figures[arm] = lab.right(lab.dit(f"semantics-{arm}", *CLASS, "--autoencoder", autoencoder))
        figures[f"{arm}, true images"] = lab.right_decoded(autoencoder)
    return figures


def shift(lab: Lab) -> Figures:
    """The DiT's head is wider than the widest latents."""
    figures = {}
    for width in WIDTHS:
        autoencoder = autoencoder_of(lab, str(width), 10, "--width", width)
        for alpha in ALPHAS:
            flags = ("--dit", "claim-128-head", "--autoencoder", autoencoder, "--alpha", alpha)
            model = lab.dit(f"shift-{width}-{alpha}", "--preset", "nano-class", *flags)
            figures[f"{width} channels, alpha {alpha}"] = lab.right(model)
    return figures


def mean_alpha(figures: Figures, channels: int) -> float:
    """The mean binary logarithm of alpha, weighted by the share of correct images: it moves as the best alpha
    does, but does not jump between the four."""
    weights = [figures[f"{channels} channels, alpha {alpha}"] for alpha in ALPHAS]
    return float(np.average(np.log2(ALPHAS), weights=weights)) if any(weights) else 0.0


def dit_width(lab: Lab) -> Figures:
    """DiTs overfit one image, whose tokens have 96 channels. The bound is (96 - width) / 96 for narrower
    ones: the last layer cannot reach more directions than it is wide, and the noise has all."""
    folder = Path(lab.config.out) / f"one-image-{lab.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shapes.draw("objects", lab.seed, 0).image).save(folder / "0.png")
    figures = {}
    for size in ("48x2", "48x8", "96x2", "144x2", "48x2-head"):
        flags = ("--condition", "none", "--data", folder, "--val-data", folder, "--dit", f"claim-{size}")
        flags += ("--autoencoder", rae_96(lab))
        lab.dit(f"width-{size}", "--preset", "nano-class", *flags, multiple=4)
        figures[size] = lab.runs[f"width-{size}"]["val_loss"]
    return figures


def head(lab: Lab) -> Figures:
    names = [f"{width}{kind}" for width in BACKBONES for kind in ("", "-head", "-deep")]
    flags = ("--preset", "nano-class", "--autoencoder", rae_96(lab), "--dit")
    return {name: lab.right(lab.dit(f"head-{name}", *flags, f"claim-{name}")) for name in names}


def noise(lab: Lab) -> Figures:
    """Two decoders of the same latents, on images of DiTs trained briefly, longer and long."""
    clean, noisy = (lab.decoder(f"tau{tau}", "--encoder", encoder_96(lab), "--tau", tau) for tau in (0, 0.4))
    figures = {}
    for when, multiple in {"early": 0.5, "midway": 1, "late": 4}.items():
        model = lab.dit(f"noise-{when}", *CLASS, "--autoencoder", clean, multiple=multiple)
        figures |= {f"{when}, clean": lab.right(model, clean), f"{when}, noisy": lab.right(model, noisy)}
    true = {"true images, clean": lab.right_decoded(clean), "true images, noisy": lab.right_decoded(noisy)}
    return figures | true


JOINTLY = ("--freeze", "none", "--val-data", "nano:objects")  # trains the language model, as the paper does
QUESTIONS = (*JOINTLY, "--dit", "nano-guide", "--data")


def weights(part: str) -> str:
    """Tells shipped weights from others."""
    return common.file_checksum(common.WEIGHTS / part / "model.safetensors")[:6]


def text_name(arm: str) -> str:
    return f"text-{arm}-{weights('language-model')}"


def text_models(lab: Lab) -> dict[str, Path]:
    """Text-to-image in the latents of an RAE and of a VAE, of equally many tokens and of equal DiTs. Both
    autoencoders have seen equally many images. Of 32 samples 10 are questions. The VAE's latents have 32
    channels, those of the RAE 96: alpha follows the root of the dimension, as in the papers."""
    vae = lab.prepared("vae", "vae", 15)
    mixed = (*QUESTIONS, "nano:objects=0.6875,nano:questions=0.3125", "--autoencoder")
    of_vae = (vae, "--reader", rae_96(lab), "--alpha", 3 * (32 / 96) ** 0.5)
    return {
        "RAE": lab.dit(text_name("RAE"), *mixed, rae_96(lab), multiple=TEXT),
        "VAE": lab.dit(text_name("VAE"), *mixed, *of_vae, multiple=TEXT),
    }


def rae_or_vae(lab: Lab) -> Figures:
    figures = {}
    for name, model in text_models(lab).items():
        figures[name], figures[f"{name}, true images"] = lab.overall(model)
    return figures


def finetuning(lab: Lab) -> Figures:
    """Score and held-out loss after many epochs of 256 images."""
    folder = Path(lab.config.out) / f"few-{lab.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(256):
        sample = shapes.draw("objects", 77 + lab.seed, i)
        Image.fromarray(sample.image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(sample.caption)
    figures = {}
    for arm, model in text_models(lab).items():
        flags = (*JOINTLY, "--init", model, "--data", folder)
        flags += ("--reader", rae_96(lab)) if arm == "VAE" else ()
        for epochs in EPOCHS:
            name = text_name(f"{arm}-{epochs}-epochs")
            # the better one on held-out images would be the one that finetunes least
            lab.rates[name] = lab.rates[text_name(arm)]
            tuned = lab.dit(name, *flags, multiple=epochs * 8 / lab.config.steps)
            figures[f"{arm}, {epochs} epochs, score"], _ = lab.overall(tuned)
            figures[f"{arm}, {epochs} epochs"] = lab.runs[name]["val_loss"]
    return figures


def overfitting(figures: Figures, arm: str) -> float:
    """Logarithm of how much the held-out loss grows from the shortest to the longest finetuning."""
    return math.log(figures[f"{arm}, {EPOCHS[-1]} epochs"] / figures[f"{arm}, {EPOCHS[0]} epochs"])


def decoder_data(lab: Lab) -> Figures:
    mixtures = {
        "without words": "nano:objects=0.7,nano:scenes=0.3",
        "with words": "nano:objects=0.7,nano:scenes=0.15,nano:text=0.15",
    }
    figures = {}
    for arm, mixture in mixtures.items():
        flags = ("--encoder", encoder_96(lab), "--data", mixture)
        autoencoder = lab.decoder(arm.replace(" ", "-"), *flags, multiple=8, seed=lab.seed)
        figures[arm] = lab.psnr(autoencoder, "text")
    return figures


def verification(lab: Lab) -> Figures:
    """The best 4 of 32 images of the shipped model, by each verifier."""
    limit, candidates, steps = (1, 4, 2) if lab.config.smoke else (5, 32, 25)
    config = evaluate.Config(limit=limit, candidates=candidates)
    model = common.load_model(rae.TextToImage, common.WEIGHTS / "t2i", "", lab.dist_ctx)
    sampler = {"steps": steps, "guidance": 3.0}
    scores = evaluate.scale_one_seed(model, [candidates], lab.eval_seed, sampler, config, lab.dist_ctx)
    return {name: score for (_, name), score in scores.items()}


def understanding(lab: Lab) -> Figures:
    """Equally many questions with and without requests for images."""
    models, none = text_models(lab), text_name("none")
    flags = ("nano:questions", "--batch", 4 if lab.config.smoke else 10, "--autoencoder", rae_96(lab))
    lab.rates[none] = RATES[0]  # of the DiT's matrices, which are not trained here
    models["no generation"] = lab.dit(none, *QUESTIONS, *flags, multiple=TEXT)
    figures = {}
    for name, model in models.items():
        figures[name], figures["most frequent answer"] = lab.answers(model)
    return figures


def layers(lab: Lab) -> Figures:
    figures = {}
    for arm in ("5", "3,4,5"):
        autoencoder = lab.decoder(f"layers{arm}", "--encoder", encoder_96(lab), "--layers", arm)
        figures[f"layers {arm}"] = lab.right(lab.dit(f"layers{arm}", *CLASS, "--autoencoder", autoencoder))
    return figures


def prediction(lab: Lab) -> Figures:
    flags = (*IN_CONTEXT, "--autoencoder", rae_96(lab), "--base-weight", 0, "--prediction")
    return {kind: lab.right(lab.dit(f"predicts-{kind}", *flags, kind)) for kind in ("velocity", "x")}


def base_head(lab: Lab) -> Figures:
    model = lab.dit("base-head", *IN_CONTEXT, "--autoencoder", rae_96(lab), "--base-weight", 1)
    figures = {"no guidance": lab.right(model)}
    for scale in (1.5, 2.5):
        figures[f"classifier-free {scale}"] = lab.right(model, guidance=scale)
        figures[f"internal {scale}"] = lab.right(model, internal_guidance=scale)
    return figures


@dataclass
class Claim:
    says: str
    source: str
    paper: str  # the paper's figure
    figure: str  # what is measured of every arm
    measure: Callable[[Lab], Figures]
    contrast: Callable[[Figures], float]
    uses: tuple[str, ...] = ()  # shipped weights


RIGHT, SCORE = "correct images", "overall of the six tasks"
CLAIMS = {
    "semantics": Claim(
        "Latents of an encoder that knows what it sees are easier to generate than others",
        *("RAE", "47x faster than SiT at equal FID", RIGHT, semantics),
        lambda f: f["objects"] - max(f["pixels"], f["random"]),
    ),
    "shift": Claim(
        "The timestep shift has to grow with the dimension of the latents",
        *("RAE 4, Scale-RAE 3.1", "GenEval 23.6 -> 49.6", RIGHT, shift),
        lambda f: mean_alpha(f, WIDTHS[-1]) - mean_alpha(f, WIDTHS[0]),
    ),
    "width": Claim(
        "The DiT has to be as wide as the tokens, and depth is no cure",
        *("RAE 4.1", "the loss of narrower ones ends at a plateau", "velocity error on one image", dit_width),
        lambda f: min(f["48x2"], f["48x8"]) - max(f["96x2"], f["48x2-head"]),
    ),
    "head": Claim(
        "The DDT head helps small models more than large ones",
        *("Scale-RAE 3.3", "+11.2 GenEval at 0.5B, +0.5 at 3.1B", RIGHT, head),
        lambda f: (f["128-head"] - f["128"]) - (f["256-head"] - f["256"]),
    ),
    "noise": Claim(
        "Noise-augmented decoding helps early in training more than late",
        *("Scale-RAE 3.2", "+5.1 at 1k steps, +0.2 at 120k", RIGHT, noise),
        lambda f: (f["early, noisy"] - f["early, clean"]) - (f["late, noisy"] - f["late, clean"]),
    ),
    "vae": Claim(
        "After equal training, text-to-image is better in RAE latents than in a VAE's",
        *("Scale-RAE 4", "4.0x (GenEval), 4.6x (DPG)", SCORE, rae_or_vae),
        lambda f: f["RAE"] - f["VAE"],
        ("language-model",),
    ),
    "finetuning": Claim(
        "In long finetuning models in VAE latents overfit more than models in RAE latents",
        *("Scale-RAE 4.2", "GenEval 66.6 against 82.8 at 128 epochs", "held-out loss; " + SCORE, finetuning),
        lambda f: overfitting(f, "VAE") - overfitting(f, "RAE"),
        ("language-model",),
    ),
    "data": Claim(
        "What the decoder is trained on decides what it reconstructs",
        *("Scale-RAE 2", "rFID of text 2.41 -> 1.62", "PSNR of words, dB", decoder_data),
        lambda f: f["with words"] - f["without words"],
    ),
    "verification": Claim(
        "The language model can judge latents",
        *("Scale-RAE 5", "GenEval 53.2 -> 64.3, best 4 of 32", SCORE, verification),
        lambda f: f["answer_logits"] - f["chance"],
        ("t2i",),
    ),
    "understanding": Claim(
        "A model that learns to generate in the latents it reads loses at most a tenth of reading's gain",
        *("Scale-RAE 4.3", "MME 1468.7 (RAE), 1481.7 (VAE), 1374.8 (no generation)"),
        *("correct answers", understanding),
        # a gain over the most frequent answer
        lambda f: f["RAE"] - f["no generation"] + 0.1 * (f["no generation"] - f["most frequent answer"]),
        ("language-model",),
    ),
    "layers": Claim(
        "The mean of several of the encoder's layers is better than one",
        *("RAEv2", "80 epochs instead of 800, by these three together", RIGHT, layers),
        lambda f: f["layers 3,4,5"] - f["layers 5"],
    ),
    "prediction": Claim(
        "Clean latents are a better prediction than the velocity",
        *("RAEv2", "as `layers`", RIGHT, prediction),
        lambda f: f["x"] - f["velocity"],
    ),
    "base-head": Claim(
        "Internal guidance by a base head is better than classifier-free guidance",
        *("RAEv2", "as `layers`", RIGHT, base_head),
        lambda f: (
            max(f["internal 1.5"], f["internal 2.5"])
            - max(f["classifier-free 1.5"], f["classifier-free 2.5"])
        ),
    ),
}


# -----------------------------------------------------------------------------------------------------------
# results


def verdict(contrasts: list[float]) -> str:
    if len(contrasts) < 3:
        return "too few seeds"
    if len(set(contrasts)) == 1:  # the test would divide by a spread of 0
        p = {-1.0: 1.0, 0.0: 0.5, 1.0: 0.0}[float(np.sign(contrasts[0]))]
    else:
        p = scipy.stats.ttest_1samp(contrasts, 0, alternative="greater").pvalue
    return "agrees" if p < 0.05 else "disagrees" if p > 0.95 else "cannot tell"


def settings(config: Config) -> dict:
    return {"steps": config.steps, "dtype": config.dtype, "smoke": config.smoke}


def refuse_change(path: Path, before: dict, now: dict) -> None:
    if before != now:
        raise ValueError(f"{path} was begun with {before}, not {now}: give another --out and --results")


def write(path: Path, content: dict) -> None:
    with common.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def measure(name: str, config: Config) -> None:
    """The seeds that are missing. Writes after every one."""
    claim, path = CLAIMS[name], Path(config.results) / f"{name}.json"
    content = {"settings": settings(config) | {part: weights(part) for part in claim.uses}, "seeds": []}
    if path.exists():
        before = json.loads(path.read_text())
        refuse_change(path, before["settings"], content["settings"])
        content = before
    rates = content.get("learning_rates", {})
    for seed in range(len(content["seeds"]), 1 if config.smoke else config.seeds):
        lab = Lab(config, seed, rates)
        figures = claim.measure(lab)
        content["seeds"].append({"figures": figures, "contrast": claim.contrast(figures), "runs": lab.runs})
        content |= {"learning_rates": lab.rates, "torch": torch.__version__}
        content["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        write(path, content)
        plot(claim, content["seeds"], path.with_suffix(".png"))


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def plot(claim: Claim, seeds: list[dict], path: Path) -> None:
    """A bar for every arm: the mean over seeds and their standard deviation."""
    arms = list(seeds[0]["figures"])
    means, deviations = zip(*(spread([row["figures"][arm] for row in seeds]) for arm in arms), strict=True)
    with common.plotting(path, 1, 1, figsize=(7, 1 + 0.35 * len(arms))) as axis:
        axis.barh(arms, means, xerr=deviations)
        axis.invert_yaxis()
        axis.set(xlabel=claim.figure, title=claim.says)


def table(results: Path) -> str:
    """Markdown: every claim, with what is known of it."""
    lines = ["| claim | paper | here | contrast | verdict |", "|---|---|---|---|---|"]
    for name, claim in CLAIMS.items():
        here, contrast, conclusion = claim.figure, "", "not measured"
        if seeds := measured(results, name):
            arms = {arm: spread([row["figures"][arm] for row in seeds]) for arm in seeds[0]["figures"]}
            values = (f"{arm} {mean:.3f} ± {deviation:.3f}" for arm, (mean, deviation) in arms.items())
            here += f": {'; '.join(values)}"
            contrasts = [row["contrast"] for row in seeds]
            contrast, conclusion = "{:+.3f} ± {:.3f}".format(*spread(contrasts)), verdict(contrasts)
        paper = f"{claim.source}: {claim.paper}"
        lines.append(f"| `{name}`: {claim.says} | {paper} | {here} | {contrast} | {conclusion} |")
    return "\n".join(lines)


def summary(results: Path) -> str:
    """Markdown: the claims by verdict."""
    names = defaultdict(list)
    for name in CLAIMS:
        seeds = measured(results, name)
        names[verdict([row["contrast"] for row in seeds]) if seeds else "not measured"].append(name)
    return "\n".join(f"- {conclusion}: {', '.join(some)}" for conclusion, some in sorted(names.items()))


def measured(results: Path, name: str) -> list[dict]:
    path = results / f"{name}.json"
    return json.loads(path.read_text())["seeds"] if path.exists() else []


def main() -> None:
    config = common.parse(Config, __doc__)
    names = list(CLAIMS) if config.names == ["all"] else config.names
    if unknown := set(names) - CLAIMS.keys():
        raise ValueError(f"no claim {', '.join(sorted(unknown))}: choose all, or from {', '.join(CLAIMS)}")
    if config.smoke:
        config.out = f"{config.out}-smoke"
        config.results = f"{config.out}/results"
        train_t2i.GRID_STEPS = 1
    if names:
        begun = Path(config.out) / "settings.json"
        if begun.exists():
            refuse_change(begun.parent, json.loads(begun.read_text()), settings(config))
        write(begun, settings(config))
    for name in names:
        measure(name, config)
    print(table(Path(config.results)))


if __name__ == "__main__":
    common.main(main)
