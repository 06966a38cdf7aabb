"""Evaluates a text-to-image model in the nano world.

    python -m nano.evaluate                                    # the shipped model: the six GenEval tasks
    python -m nano.evaluate shapes --limit 5 --model runs/t2i/model --out runs/t2i/shapes.json
    python -m nano.evaluate scaling --limit 5 --steps 25       # test-time scaling: best of N by verifier
    python -m nano.evaluate questions                          # answers to questions about images
    python -m nano.evaluate binding                            # what the condition says, in seconds

Prints a table and writes OUT: command, seed, versions, date and a list of results {metric, value, n}.

shapes scores the model's images of unseen prompts with nano/scorer.py, and puts beside them a ceiling (true
renderings, and these as the autoencoder returns them) and a floor (the model's images, judged by the next
prompt of the same task). Beyond the six tasks, `held-out colors` are pairs of shape and colour that no
training image holds, and `words` are read in the image.

scaling keeps the best 4 of 4, 8, ... --candidates images by each verifier, and reports the overall of the six
tasks. `chance` is the mean over all, `scorer` the ceiling.

questions asks about 6 x --limit true images of `objects`. The kind of a question is its first two words. The
floor is to give the most frequent answer of each kind.

binding tells how far the condition vectors move if a prompt's two colors are swapped, its relation reversed
or its number changed: their mean squared distance, as a share of that of two captions of `objects`. What is
lost here cannot be drawn. 3 x --limit prompts each.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
import data
import rae
from common import flag
from nano import scorer, shapes

KEEP = 4  # images kept of all candidates, as in Scale-RAE


@dataclass
class Config:
    what: list[str] = flag((), "shapes (default), scaling, questions, binding", nargs="*")
    model: str = flag(str(common.WEIGHTS / "t2i"), "TextToImage folder or hub id")
    limit: int = flag(20, "prompts per task (binding: 3 times as many); questions: images / 6", at_least=2)
    images: int = flag(4, "shapes: images per prompt", at_least=1)
    candidates: int = flag(32, "scaling: images per prompt to choose from", at_least=KEEP)
    seeds: int = flag(3, "scaling: number of seeds", at_least=1)
    # sampler
    steps: int = flag(50, "sampler steps", at_least=1)
    guidance: float = flag(3.0, "scale of classifier-free guidance", at_least=0)
    solver: str = flag("euler", "ODE solver", choices=["euler", "heun"])
    # system
    seed: int = flag(1000, "seed of prompts, images and noise; training uses small seeds")
    batch: int = flag(64, "images at once", at_least=1)
    dtype: str = flag("auto", "compute dtype; weights are fp32", choices=["auto", "bf16", "fp32"])
    out: str = flag("results.json", "results file")


@torch.no_grad()
def generate(
    model: rae.LatentModel, prompts: list, noise: Tensor, dist_ctx: common.DistContext, **sampler
) -> tuple[Tensor, np.ndarray]:
    """Latents (B, N, C) and images (B, H, W, 3) uint8, from noise (B, N, C)."""
    with dist_ctx.autocast():
        latents = model.generate(prompts, noise=noise, **sampler)
        images = model.autoencoder.decode(latents)
    common.check_finite(f"prompts from {prompts[0]!r}", latents, images)
    return latents, common.to_uint8(images).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def reconstruct(autoencoder: rae.RAE, image: np.ndarray, dist_ctx: common.DistContext) -> np.ndarray:
    """One image (H, W, 3) uint8, encoded and decoded."""
    images = data.to_unit(torch.from_numpy(image).permute(2, 0, 1)[None], dist_ctx.device)
    with dist_ctx.autocast():
        decoded = autoencoder.decode(autoencoder.encode(images))
    return common.to_uint8(decoded)[0].permute(1, 2, 0).numpy()


def draw_images(
    model: rae.LatentModel, prompts: list, sampler: dict, config: Config, dist_ctx: common.DistContext
) -> Iterator[np.ndarray]:
    """An image (H, W, 3) uint8 for each prompt, or label. Its noise depends on its number, not on the batch
    size."""
    for start in tqdm(range(0, len(prompts), config.batch), desc="draw", leave=False):
        batch = prompts[start : start + config.batch]
        indices = list(range(start, start + len(batch)))
        noise, *_ = data.flow_draws(model.latent_shape, config.seed, indices, torch.device("cpu"))
        _, images = generate(model, batch, noise, dist_ctx, **sampler)
        yield from images


def is_right(image: np.ndarray, request: dict) -> bool:
    """Whether an image shows the word of a request, or fulfils it as a GenEval request."""
    if "word" in request:
        return scorer.read_word(image) == request["word"]
    return scorer.score(image, request)


def evaluate_shapes(
    model: rae.TextToImage, sampler: dict, config: Config, dist_ctx: common.DistContext
) -> list[dict]:
    n, seed, size = config.limit, config.seed, model.autoencoder.image_size
    requests = {task: [shapes.prompt(task, seed, i) for i in range(n)] for task in shapes.TASKS}
    requests["held-out colors"] = [shapes.prompt("colors", seed, i, held_out=True) for i in range(n)]
    words = [shapes.draw("text", seed, i, size) for i in range(n)]
    requests["words"] = [{"prompt": sample.caption, "word": sample.word} for sample in words]

    jobs = [(task, i) for task in requests for i in range(n) for _ in range(config.images)]
    prompts = [requests[task][i]["prompt"] for task, i in jobs]
    right = {column: defaultdict(list) for column in ("model", "true", "decoded", "shuffled")}
    for number, image in enumerate(draw_images(model, prompts, sampler, config, dist_ctx)):
        task, i = jobs[number]
        request, other = requests[task][i], requests[task][(i + 1) % n]
        true = words[i].image if task == "words" else shapes.render(request, seed + number, size)
        right["model"][task].append(is_right(image, request))
        right["true"][task].append(is_right(true, request))
        right["decoded"][task].append(is_right(reconstruct(model.autoencoder, true, dist_ctx), request))
        right["shuffled"][task].append(is_right(image, other))

    results, per_task = [], n * config.images
    for column, tasks in right.items():
        values = scorer.overall(tasks)
        for task in ("held-out colors", "words"):
            values[task] = float(np.mean(tasks[task]))
        for name, value in values.items():
            count = per_task * len(shapes.TASKS) if name == "overall" else per_task
            results.append({"metric": f"shapes/{column}/{name}", "value": value, "n": count})
    return results


def keep_best(verdicts: list[rae.Verdict], scores: list[bool]) -> dict[str, list[int]]:
    """Numbers of the candidates kept by each verifier, by chance (all, for their mean) and by the scorer."""
    kept = {name: rae.best(verdicts, name, KEEP) for name in rae.VERIFIERS}
    numbers = range(len(verdicts))
    return kept | {"chance": numbers, "scorer": sorted(numbers, key=lambda i: -scores[i])[:KEEP]}


def scale_one_seed(
    model: rae.TextToImage, sizes: list[int], seed: int, sampler: dict, config: Config, dist_ctx
) -> dict[tuple[int, str], float]:
    """The overall of the six tasks by (candidates, verifier)."""
    right = defaultdict(lambda: defaultdict(list))
    jobs = [(task, i) for task in shapes.TASKS for i in range(config.limit)]
    for task, i in tqdm(jobs, desc=f"scaling, seed {seed}", leave=False):
        request, candidates = shapes.prompt(task, seed, i), list(range(config.candidates))
        noise_seed = data.hash_seed(seed, task, i)
        noise, *_ = data.flow_draws(model.latent_shape, noise_seed, candidates, torch.device("cpu"))
        prompts = [request["prompt"]] * len(candidates)
        latents, images = generate(model, prompts, noise, dist_ctx, **sampler)
        verdicts = rae.verify(model, request["prompt"], latents)
        scores = [scorer.score(image, request) for image in images]
        for size in sizes:
            for name, kept in keep_best(verdicts[:size], scores[:size]).items():
                right[size, name][task] += [scores[k] for k in kept]
    return {key: scorer.overall(tasks)["overall"] for key, tasks in right.items()}


def evaluate_scaling(
    model: rae.TextToImage, sampler: dict, config: Config, dist_ctx: common.DistContext
) -> list[dict]:
    if model.reader_path:
        raise ValueError(
            f"{config.model} reads other latents than it generates: it cannot judge them undecoded"
        )
    sizes = [KEEP * 2**i for i in range(12) if KEEP * 2**i <= config.candidates]
    overalls = defaultdict(list)  # by (candidates, verifier), one value per seed
    for seed in range(config.seed, config.seed + config.seeds):
        for key, value in scale_one_seed(model, sizes, seed, sampler, config, dist_ctx).items():
            overalls[key].append(value)
    results = []
    for (size, name), values in overalls.items():
        n = (size if name == "chance" else KEEP) * len(shapes.TASKS) * config.limit * config.seeds
        metric = f"best {KEEP} of {size}/{name}"
        results.append({"metric": metric, "value": float(np.mean(values)), "n": n})
        if len(values) > 1:
            deviation = float(np.std(values, ddof=1))
            results.append({"metric": f"{metric}, standard deviation", "value": deviation, "n": n})
    return results


@torch.no_grad()
def evaluate_questions(
    model: rae.TextToImage, sampler: dict, config: Config, dist_ctx: common.DistContext
) -> list[dict]:
    right, expected = defaultdict(list), defaultdict(Counter)
    for i in tqdm(range(config.limit * len(shapes.TASKS)), desc="questions", leave=False):
        sample = shapes.draw("objects", config.seed, i, model.reader.image_size)
        image = data.to_unit(torch.from_numpy(sample.image).permute(2, 0, 1), dist_ctx.device)
        with dist_ctx.autocast():
            latents = model.reader.encode(image[None])[0]
            for question, answer in sample.questions:
                if question != shapes.DESCRIBE:
                    kind = " ".join(question.lower().split()[:2])
                    expected[kind][answer] += 1
                    right[kind].append(model.answer(latents, question, max_tokens=8) == answer)
    most_frequent = {kind: max(answers.values()) for kind, answers in expected.items()}
    right["all"], most_frequent["all"] = sum(right.values(), []), sum(most_frequent.values())
    results = []
    for kind, values in right.items():
        columns = {"model": np.mean(values), "most frequent": most_frequent[kind] / len(values)}
        for column, value in columns.items():
            metric = f"questions/{column}/{kind}"
            results.append({"metric": metric, "value": float(value), "n": len(values)})
    return results


def swapped_colors(request: dict) -> dict:
    one, other = request["include"]
    return request | {"include": [one | {"color": other["color"]}, other | {"color": one["color"]}]}


def reversed_relation(request: dict) -> dict:
    one, other = request["include"]
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    relation, target = other["position"]
    return request | {"include": [one, other | {"position": [opposite[relation], target]}]}


def other_count(request: dict) -> dict:
    [entry] = request["include"]
    return request | {"include": [entry | {"count": {2: 3, 3: 4, 4: 2}[entry["count"]]}]}


CHANGES = {
    "swapped colors": ("color_attr", swapped_colors),
    "reversed relation": ("position", reversed_relation),
    "other count": ("counting", other_count),
}


@torch.no_grad()
def evaluate_binding(
    model: rae.TextToImage, sampler: dict, config: Config, dist_ctx: common.DistContext
) -> list[dict]:
    seed, count = config.seed, 3 * config.limit

    def conditions(captions: list[str]) -> Tensor:
        with dist_ctx.autocast():
            return model.condition(captions).float()

    captions = conditions([shapes.draw("objects", seed, i).caption for i in range(count)])
    distance = 2 * captions.var(dim=0).sum()  # mean squared distance of two of them
    results = []
    for name, (task, change) in CHANGES.items():
        before, after = [], []
        for i in range(count):
            request = shapes.prompt(task, seed, i)
            for prompts, asked in ((before, request), (after, change(request))):
                prompts.append(shapes.caption(shapes.Chance(seed, i), asked))  # the same wording
        moved = (conditions(before) - conditions(after)).square().sum(dim=(1, 2)).mean()
        results.append({"metric": f"binding/model/{name}", "value": (moved / distance).item(), "n": count})
    return results


EVALUATIONS = {
    "shapes": evaluate_shapes,
    "scaling": evaluate_scaling,
    "questions": evaluate_questions,
    "binding": evaluate_binding,
}


def main() -> None:
    config = common.parse(Config, __doc__)
    names = config.what or ["shapes"]
    if unknown := set(names) - EVALUATIONS.keys():
        raise ValueError(f"unknown evaluation {', '.join(unknown)}: choose from {', '.join(EVALUATIONS)}")
    common.check_output(Path(config.out), ".json")
    dist_ctx = common.init_distributed(config.dtype)
    print(dist_ctx)
    model = common.load_model(rae.TextToImage, config.model, "", dist_ctx)
    sampler = {"steps": config.steps, "guidance": config.guidance, "solver": config.solver}
    results = []
    for name in names:
        part = EVALUATIONS[name](model, sampler, config, dist_ctx)
        print(f"\n{common.table(part)}", flush=True)
        results += part
    common.save_results(results, config.seed, Path(config.out))


if __name__ == "__main__":
    common.main(main)
