"""Training runs: the same numbers on any number of processes, exact resumption, no lost step."""

import copy
import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import kill
import pytest
import torch
from conftest import write_encoder
from harness import TINY_DIT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import rae
import train_t2i

EVERY = ["--batch", 4, "--workers", 0, "--muon", 0, "--log-every", 1, "--lr", 0.01, "--warmup", 1]
CPU = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


def decoder_flags(parts, out) -> list:
    return ["--encoder", parts / "encoder", "--out", out, "--statistics", 16, *EVERY]


def every_loss(parts, out) -> list:
    losses = "--tau 0.5 --perceptual encoder --gram-weight 100 --gan-weight 0.75".split()
    losses += ["--discriminator", parts / "encoder", "--disc-lr", 0.01, "--disc-warmup", 1]
    return [*decoder_flags(parts, out), *losses]


def t2i_flags(parts, out) -> list:
    models = ["--autoencoder", parts / "rae", "--language-model", parts / "language-model"]
    all_trained = "--freeze none --data nano:objects=0.6,nano:questions=0.4".split()
    return [*models, *all_trained, "--out", out, *EVERY]


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_mixed(root: Path, count: int) -> Path:
    """Conversations: a third requests, a third questions, a third text."""
    rows = []
    for i in range(count):
        (root / f"{i}.png").write_bytes(png(20 * i))
        request = ("draw " + "it " * i, "Here you go:\n<image>")
        human, gpt = (request, ("<image>\nwhich?", f"{i}"), ("say", f"{i}"))[i % 3]
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
        rows.append({"image": None if i % 3 == 2 else f"{i}.png", "conversations": turns})
    (root / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root / "mixed.jsonl"


def logged(out: Path, *names: str) -> dict[int, list[float]]:
    rows = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return {step: [row[name] for name in names if name in row] for step, row in rows.items()}


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model/model.safetensors")


def state(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """The tensors that one process wrote to a checkpoint."""
    with safe_open(next(folder.glob(pattern)), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def assert_same(one: dict, other: dict, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=atol, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


# -----------------------------------------------------------------------------------------------------------
# the number of processes changes nothing


def use_sgd() -> None:
    """Adam turns the rounding of a zero gradient into a full step; SGD shows the gradients themselves."""

    class SGD(torch.optim.SGD):
        def __init__(self, groups, lr=0.0, **_):
            super().__init__(groups, lr, momentum=0.9)

        def step(self) -> None:
            self.found_inf = None  # which SGD refuses
            super().step()

    torch.optim.AdamW = SGD


def only_the_main_process_builds() -> None:
    use_sgd()
    import train_t2i

    build = train_t2i.build_model

    def on_main(*args) -> torch.nn.Module:
        assert os.environ["RANK"] == "0"
        return build(*args)

    train_t2i.build_model = on_main


VARIANTS = {
    "train_t2i.py": {
        "one": (1, []),
        "two": (2, []),
        "full": (2, ["--shard", "full", "--grad-accum", 2]),
        "four": (4, ["--shard", "full"]),
        "hybrid": (4, ["--shard", "hybrid"]),
        "micro": (1, ["--grad-accum", 3, "--activation-checkpointing"]),
    },
    "train_decoder.py": {
        "one": (1, []),
        "two": (2, []),
        "full": (2, ["--shard", "full", "--activation-checkpointing"]),
        # the adaptive weight is of a micro-batch, so without it
        "fixed one": (1, ["--no-adaptive"]),
        "fixed micro": (2, ["--no-adaptive", "--grad-accum", 2]),
    },
}


def test_a_skeleton_is_the_model_without_its_weights(parts):
    model = rae.TextToImage.from_pretrained(parts / "t2i")
    model.dit.requires_grad_(False)
    outline = pickle.loads(pickle.dumps(common.skeleton(model)))
    assert all(x.is_meta for x in (*outline.parameters(), *outline.buffers()))
    for (name, x), (other, y) in zip(model.named_parameters(), outline.named_parameters(), strict=True):
        assert (name, x.shape, x.requires_grad) == (other, y.shape, y.requires_grad)
    language_model = outline.language_model
    assert language_model.get_input_embeddings().weight is language_model.get_output_embeddings().weight
    assert outline.tokenizer.encode("a star") == model.tokenizer.encode("a star")
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("script, resumed_on", [("train_t2i.py", 1), ("train_decoder.py", 4)])
def test_processes_shards_and_accumulation_change_nothing(script, resumed_on, world, parts, tmp_path):
    """Text: requests, questions and text mixed, so that counts are unequal and some ranks have no image.
    Decoder: all losses; power iterations and adaptive weights are the same on all ranks. A checkpoint of two
    processes is continued by another number of them."""
    if is_text := script == "train_t2i.py":
        names = "loss text_loss flow_loss grad_norm val_loss val_loss_0.3 val_loss_0.6 val_loss_0.9".split()
        flags = [*t2i_flags(parts, ""), "--data", write_mixed(tmp_path, 11), "--eval-every", 2]
    else:
        names = "loss l1_loss perceptual_loss gram_loss disc_loss real_logits fake_logits grad_norm".split()
        names += ["gan_loss", "gan_weight"]
        flags = [*every_loss(parts, ""), "--gan-start", 1]
    flags += ["--steps", 4, "--save-every", 2]
    runs = {}
    for name, (size, more) in VARIANTS[script].items():
        nodes = 2 if name == "hybrid" else 1
        patch = only_the_main_process_builds if "--shard" in more and is_text else use_sgd
        runs[name] = world(size, script, *flags, *more, "--out", tmp_path / name, patch=patch, nodes=nodes)
    printed = {name: run.wait() for name, run in runs.items()}
    assert "2 processes (gloo), float32 compute, fp32 weights, 2 replicas of 1 shards" in printed["two"]
    assert "hybrid" not in printed or "2 replicas of 2 shards" in printed["hybrid"]

    shutil.copytree(tmp_path / "full", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/0000004")
    more = ["--out", tmp_path / "resumed", "--resume"]
    assert "resumed from" in world(resumed_on, script, *more, patch=use_sgd).wait()
    for name in [*runs, "resumed"]:
        base = tmp_path / ("fixed one" if "fixed" in name else "one")
        expected = logged(base, *names)
        assert expected[1] != expected[3] != expected[4] and len(expected[4]) >= 8
        for step, values in logged(tmp_path / name, *names).items():
            assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-5), (name, step)
        assert_same(weights(tmp_path / name), weights(base), atol=1e-5)


def count_communication() -> None:
    """A patch: prints how often Muon orthogonalises and communicates in a step."""
    from torch.distributed.tensor.debug import CommDebugMode

    use_sgd()
    step, orthogonalise, done = common.Muon.step, common.orthogonalise, []

    def counted(self) -> None:
        matrices = sum(len(group["params"]) for group in self.param_groups)
        with CommDebugMode() as mode:
            step(self)
        print(f"{matrices} matrices, {len(done)} here, {mode.get_total_counts()} collectives", flush=True)
        done.clear()

    common.Muon.step = counted
    common.orthogonalise = lambda x: (done.append(1), orthogonalise(x))[1]


@pytest.mark.parametrize(
    "script, matrix, variants",
    [
        ("train_t2i.py", "dit.blocks.0.mlp.w12", ["--draws", 3]),
        ("train_decoder.py", "decoder.decoder_layers.0.intermediate.dense", []),
    ],
)
def test_nor_do_they_with_muon_several_draws_and_no_ema(script, matrix, variants, world, parts, tmp_path):
    """Muon makes the smallest directions of a gradient, which are rounding, as large as the others: the
    updates are much the same, also of sharded matrices."""
    is_text = script == "train_t2i.py"
    flags = [*(t2i_flags if is_text else decoder_flags)(parts, ""), "--muon", 0.02, *variants]
    flags += ["--steps", 3, "--save-every", 1, "--keep", 9, "--ema", 0]
    sizes = {"one": (1, []), "full": (2, ["--shard", "full"]), "micro": (1, ["--grad-accum", 3])}
    runs = {
        name: world(size, script, *flags, *more, "--out", tmp_path / name, patch=count_communication)
        for name, (size, more) in sizes.items()
    }
    printed = {name: run.wait() for name, run in runs.items()}
    # every rank orthogonalises its share; a sharded matrix is gathered once, and its update sent once
    counts = re.findall(r"(\d+) matrices, (\d+) here, (\d+) collectives", printed["full"])
    assert len(counts) == 8  # of 2 ranks: 3 steps, and the one that makes the state
    for matrices, here, collectives in (map(int, row) for row in counts):
        assert (matrices + 1) // 2 >= here >= matrices // 2 and collectives == 2 * matrices
    expected, final = logged(tmp_path / "one", "loss", "grad_norm"), weights(tmp_path / "one")
    first = state(tmp_path / "one/checkpoints/0000001")
    prefix = "ema" if is_text else "model"  # without EMA only the saved weights exist
    assert f"optimizer.{prefix}.{matrix}.weight.momentum_buffer" in first
    assert not is_text or not any(key.startswith("model.") for key in first)
    for name in sizes:
        for step, values in logged(tmp_path / name, "loss", "grad_norm").items():
            assert values == pytest.approx(expected[step], rel=1e-5 if step == 1 else 5e-3), (name, step)
        for key, tensor in weights(tmp_path / name).items():
            moved = (final[key] - first.get(f"ema.{key}", final[key])).norm()  # tables are not trained
            assert (tensor - final[key]).norm() <= 0.75 * moved + 1e-6, (name, key)


def test_hashes_tell_values_names_and_places_apart():
    tensors = {"a": torch.randn(40, 3), "b": torch.zeros(0), "c": torch.tensor(True)}
    known = common.hash_tensors(tensors)
    assert known == common.hash_tensors({name: tensor.clone() for name, tensor in tensors.items()})
    assert known == common.hash_tensors(dict(reversed(tensors.items())))
    swapped = tensors["a"].flip(0)
    nudged = tensors["a"].clone()
    nudged[7, 1] = torch.nextafter(nudged[7, 1], torch.tensor(9.0))
    for change in (
        {"a": swapped},
        {"a": nudged},
        {"a": tensors["a"].T},
        {"c": torch.tensor(False)},
        {"d": swapped},
    ):
        assert common.hash_tensors(tensors | change) != known
    single = {common.hash_tensors({"x": value[None]}) for value in torch.randn(3000)}
    assert len(single) == 3000


def test_gradients_are_summed_in_buckets(monkeypatch):
    """By an all-reduce that doubles, as if two ranks had the same gradients."""
    monkeypatch.setattr(common.dist, "is_initialized", lambda: True)
    calls = []
    monkeypatch.setattr(common.dist, "all_reduce", lambda flat: calls.append(flat.numel()) or flat.mul_(2))
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 2**24, 5, 7)]
    for p in parameters[:3]:  # the last has no gradient
        p.grad = torch.full_like(p, 1.5)
    common.sum_gradients(parameters)
    assert sorted(calls) == [3, 5, 2**24]
    assert all((p.grad == 3).all() for p in parameters[:3]) and parameters[3].grad is None


def test_optimizers_skip_a_step_that_is_not_finite():
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    adamw = torch.optim.AdamW([vector], 0.1, fused=True)
    optimizers = common.Optimizers(common.Muon([matrix], lr=0.1), adamw)
    for is_good in (True, False, True):
        tensors = [matrix, vector, *(x for _, values in optimizers.state() for x in values.values())]
        before = [tensor.detach().clone() for tensor in tensors]
        matrix.grad, vector.grad = torch.randn(4, 4), torch.full((4,), 1.0 if is_good else torch.nan)
        optimizers.step()
        unchanged = [torch.equal(*pair) for pair in zip(before, tensors, strict=True)]
        assert unchanged == [not is_good] * len(tensors)
    assert matrix.isfinite().all() and optimizers.check_skipped() == 1


# -----------------------------------------------------------------------------------------------------------
# what is trained


@pytest.mark.parametrize(
    "freeze, trained, more, alpha",
    [
        (
            "language-model",
            {"dit", "diff_head_projector", "latent_queries", "mm_projector"},
            [],
            384**0.5 / 64,
        ),
        ("all-but-dit", {"dit", "diff_head_projector", "latent_queries"}, ["--alpha", 2], 2),
    ],
)
def test_frozen_parts_stay_as_they_are(freeze, trained, more, alpha, world, parts, tmp_path):
    """Finetuning, in the latents of the model's own autoencoder. A preset's alpha is for new models."""
    flags = ["--init", parts / "t2i", "--freeze", freeze, "--data", write_mixed(tmp_path, 9), "--steps", 5]
    world(2, "train_t2i.py", *flags, *more, *EVERY, "--shard", "full", "--out", tmp_path / "run").wait()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert json.loads((tmp_path / "run/model/config.json").read_text())["alpha"] == config["alpha"] == alpha
    assert Path(config["autoencoder"]).samefile(parts / "rae")
    before, after = load_file(parts / "t2i/model.safetensors"), weights(tmp_path / "run")
    assert {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])} == trained


@torch.no_grad()
def test_a_vae_with_a_reader(world, parts, vae_folder, tmp_path):
    """Trains on samples of the VAE's posterior: a new DiT returns zeros, so that the first flow loss is the
    mean square of the velocity. Questions are about latents of the reader, which have other channels."""
    config = vae_folder / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 1024', '"sample_size": 32'))
    write_encoder(tmp_path / "encoder", width=12, hidden=16, layers=1)
    small = {"patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
    rae.RAE(str(tmp_path / "encoder"), small).save_pretrained(tmp_path / "reader")
    out, name = tmp_path / "run", "nano:objects=0.6,nano:questions=0.4"
    flags = [*t2i_flags(parts, out), "--autoencoder", vae_folder, "--reader", tmp_path / "reader"]
    world(1, "train_t2i.py", *flags, "--draws", 2, "--steps", 2).wait()

    vae, source = rae.VAE(vae_folder), data.open_source(name, 32, 0)
    index = [i for i in range(4) if "<image>" in source[i]["conversation"][1][1]]
    assert 0 < len(index) < 4
    pixels = torch.stack([torch.from_numpy(source[i]["image"]).permute(2, 0, 1) / 255 for i in index])
    noise, *_ = data.flow_draws(vae.latent_shape, 0, index, CPU.device, draws=2)
    of_posterior, *_ = data.flow_draws(vae.latent_shape, data.hash_seed(0, "posterior"), index, CPU.device)
    sampled, mean = (vae.encode(pixels, z).repeat(2, 1, 1) for z in (of_posterior, None))
    [loss] = logged(out, "flow_loss")[1]
    assert loss == pytest.approx((noise - sampled).square().mean().item(), rel=1e-5)
    assert abs(loss - (noise - mean).square().mean().item()) > 0.01

    model, image = rae.TextToImage.from_pretrained(out / "model").eval(), torch.rand(3, 32, 32)
    assert (model.latent_shape, model.read_shape) == ((16, 24), (16, 12))
    latents = rae.RAE.from_pretrained(tmp_path / "reader").encode(image[None])[0]
    assert model.answer(image, "what?", 4) == model.answer(latents, "what?", 4)


# -----------------------------------------------------------------------------------------------------------
# log


@torch.no_grad()
def test_captions_that_are_no_prompts_are_left_out_of_the_grid(parts, tmp_path, capsys):
    model, config = rae.TextToImage.from_pretrained(parts / "t2i"), train_t2i.Config(data="nano:objects")
    batch = next(data.Loader(data.open_source(config.data, 32, 1), 2, workers=0))
    batch["conversation"][0] = data.request("圆" * 140, 0.1)  # more tokens than a prompt may have
    validation = train_t2i.Validation(config, model, model.autoencoder, None, batch, CPU)
    assert validation.grid_inputs == [data.requested_caption(batch["conversation"][1])]
    batch["conversation"][1] = batch["conversation"][0]
    validation = train_t2i.Validation(config, model, model.autoencoder, None, batch, CPU)
    validation.save_grid(model, tmp_path / "grid.png")
    assert "no sample grids" in capsys.readouterr().err and not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("condition", ["text", "class"])
@torch.no_grad()
def test_validation_loss_is_the_velocity_error_whatever_training_draws(condition, parts):
    is_text = condition == "text"
    config = train_t2i.Config(condition=condition, data="nano:objects" if is_text else "nano:classes")
    torch.manual_seed(0)
    model = rae.ClassToImage(TINY_DIT | {"num_classes": 48}, (16, 24), str(parts / "rae"))
    model = rae.TextToImage.from_pretrained(parts / "t2i") if is_text else model
    for parameter in model.dit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    source = data.open_source(config.data, 32, config.seed + 1)
    rows = []
    for draws, dropout, micro_batches in ((1, 0.1, 1), (3, 0.9, 1), (1, 0.1, 4)):
        # and torch's own generator has moved on
        config = dataclasses.replace(config, draws=draws, dropout=dropout, grad_accum=micro_batches)
        batch = next(data.Loader(source, 6, workers=0))
        validation = train_t2i.Validation(config, model.eval(), model.autoencoder, None, batch, CPU)
        rows.append(validation.losses(model))
        torch.rand(1)
    assert rows[0] == rows[1] and rows[2] == pytest.approx(rows[0], rel=1e-5)
    assert len(validation.parts) == 4 and max(len(part[1]) for part in validation.parts) == 2

    latents = model.autoencoder.encode(batch["image"] / 255)
    noise, *_ = data.flow_draws((16, 24), config.seed + 1, list(range(6)), CPU.device)
    if is_text:
        chat = model.chat(batch["conversation"])
        inputs = model.answer_condition(model.hidden_states(model.embed(chat)), chat)
    else:
        inputs = torch.tensor(batch["label"])
    for t in (0.3, 0.6, 0.9):
        velocity = model.dit((1 - t) * latents + t * noise, torch.full((6,), t), inputs)
        expected = (velocity - (noise - latents)).square().mean().item()
        assert rows[0][f"val_loss_{t}"] == pytest.approx(expected, rel=1e-4)
    assert rows[0]["val_loss"] == pytest.approx(sum(rows[0][f"val_loss_{t}"] for t in (0.3, 0.6, 0.9)) / 3)


@pytest.mark.parametrize(
    ("condition", "freeze"), [("text", "none"), ("text", "language-model"), ("class", "none")]
)
def test_flops_of_a_step_are_those_that_torch_counts(condition, freeze, parts):
    language_model = str(parts / "language-model")
    settings = {"condition": condition, "freeze": freeze, "language_model": language_model}
    config = train_t2i.Config(draws=2, batch=8, **settings)
    autoencoder = rae.RAE.from_pretrained(parts / "rae")
    num_classes = None if condition == "text" else 48
    model = train_t2i.build_model(config, None, (16, 24), num_classes, None)

    def count(module, *inputs, **kwargs) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(*inputs, **kwargs)
        return counter.get_total_flops()

    vectors = torch.randn(1, 16, rae.DITS["nano"]["condition_width"])
    inputs = vectors if condition == "text" else torch.tensor([3])
    expected = 3 * 2 * count(model.dit, torch.randn(1, 16, 24), torch.rand(1), inputs)
    expected += count(autoencoder.encoder, torch.randn(1, 3, 32, 32))
    if condition == "text":
        embeddings = torch.randn(1, 50, 32)
        passes = 3 if freeze == "none" else 2  # gradients pass through a frozen one
        expected += passes * count(model.language_model.model, inputs_embeds=embeddings, use_cache=False)
    assert train_t2i.flops_per_step(config, model, autoencoder, seq_len=50) == 8 * expected > 0


def test_wandb_offline(world, parts, tmp_path):
    pytest.importorskip("wandb")
    flags = [*decoder_flags(parts, tmp_path), "--steps", 1, "--wandb", "test"]
    world(1, "train_decoder.py", *flags, patch=stay_offline).wait()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def stay_offline() -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


# -----------------------------------------------------------------------------------------------------------
# stop, kill and resume


def stop_after_two_steps() -> None:
    stopping = common.Run.stopping

    def patched(self, step: int) -> bool:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return stopping(self, step)

    common.Run.stopping = patched


def stop_and_use_sgd() -> None:
    use_sgd()
    stop_after_two_steps()


def know_peak_flops() -> None:
    common.DistContext.peak_flops = lambda self: 1e9


def test_a_run_writes_everything_and_resumes_bit_for_bit(world, parts, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--steps", 5, "--save-every", 2, "--eval-every", 2]
    runs = [
        world(1, "train_t2i.py", *t2i_flags(parts, whole), *flags, patch=know_peak_flops, plots=True),
        world(1, "train_t2i.py", *t2i_flags(parts, half), *flags, patch=stop_after_two_steps),
    ]
    printed, stopped = [run.wait() for run in runs]  # a stopped run has exit status 0 too
    assert "continue with --resume" in stopped
    pattern = r"step 3/5  loss \S+  text_loss \S+  flow_loss \S+  lr \S+  grad_norm \S+  ms/step \S+  "
    assert re.search(pattern + r"images/s \S+  mfu \S+  ETA 0:00:\d\d  data_wait \S+\n", printed), printed
    assert re.search(r"step 4/5  val_loss \S+  val_loss_0.3 \S+  val_loss_0.6 \S+  val_loss_0.9", printed)
    files = {".lock", "config.json", "metrics.jsonl", "losses.png", "checkpoints", "model", "samples"}
    assert {path.name for path in whole.iterdir()} == files
    image = Image.open(whole / "losses.png")
    assert image.width > 500 and len(image.convert("RGB").getcolors(2**20)) > 20
    assert {path.name for path in (whole / "samples").iterdir()} == {f"{s:07d}.png" for s in (2, 4, 5)}
    assert checkpoints(whole) == ["0000004", "0000005"] and checkpoints(half) == ["0000002"]
    columns = {"images_per_second", "data_wait", "skipped_samples", "mfu", "eta_hours", "ms_per_step"}
    assert columns <= json.loads((whole / "metrics.jsonl").read_text().splitlines()[0]).keys()

    with (half / "metrics.jsonl").open("a") as file:  # as after a crash beyond the checkpoint
        file.write('{"step": 3, "loss": 99.0}\n')
    (half / "checkpoints/.0000004.tmp").mkdir()
    world(1, "train_t2i.py", "--out", half, "--resume").wait()  # the flags are in its config.json
    names = ("loss", "text_loss", "flow_loss", "lr", "grad_norm", "val_loss", "val_loss_0.9")
    assert logged(half, *names) == logged(whole, *names)
    assert_same(weights(half), weights(whole))
    assert checkpoints(half) == ["0000004", "0000005"]
    assert_same(state(half / "checkpoints/0000005"), state(whole / "checkpoints/0000005"))


def test_a_discriminator_is_resumed_bit_for_bit_on_two_processes(world, parts, tmp_path):
    """Stopped before it starts to train, so that the checkpoint holds an optimizer that has not stepped."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--steps", 4, "--disc-start", 2, "--gan-start", 3, "--shard", "full"]
    runs = [
        world(2, "train_decoder.py", *every_loss(parts, whole), *flags),
        world(2, "train_decoder.py", *every_loss(parts, half), *flags, patch=stop_after_two_steps),
    ]
    [run.wait() for run in runs]
    world(2, "train_decoder.py", "--out", half, "--resume").wait()
    names = ("loss", "grad_norm", "disc_loss", "gan_loss", "gan_weight")
    assert logged(half, *names) == logged(whole, *names) and len(logged(half, *names)[4]) == 5
    assert_same(weights(half), weights(whole))
    keys = set()
    for pattern in ("shard-00001-*", "shard-00002-*"):
        one, other = (state(out / "checkpoints/0000004", pattern) for out in (half, whole))
        assert_same(one, other)
        keys |= one.keys()
    assert {"discriminator.heads.0.0.0.weight_u", "optimizer.discriminator.heads.0.2.bias.step"} <= keys

    next((whole / "checkpoints/0000004").glob("shard-00001*")).unlink()
    flags = ["--out", whole, "--resume", "--steps", 5]
    assert "No such file" in world(1, "train_decoder.py", *flags).wait(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_process_group_saves_and_ends_well(number, world, parts, tmp_path):
    """What a terminal and torchrun do: the data loading processes are in the group too."""
    flags = [*t2i_flags(parts, tmp_path / "out"), "--workers", 1, "--shard", "full"]
    run = world(2, "train_t2i.py", *flags, patch=os.setsid)
    while not (tmp_path / "out/metrics.jsonl").exists() and run.processes[0].is_alive():
        time.sleep(0.01)
    for process in run.processes if number == signal.SIGINT else run.processes[:1]:  # one of them is enough
        os.killpg(process.pid, number)
    assert "continue with --resume" in run.wait(0) and "Traceback" not in run.output()
    [step] = checkpoints(tmp_path / "out")
    assert max(logged(tmp_path / "out", "loss")) == int(step)
    rae.TextToImage.from_pretrained(tmp_path / "out/model")


def test_nohup_is_respected(tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(signal, "signal", lambda number, _: installed.append(number))
    for ignored in (False, True):
        installed.clear()
        monkeypatch.setattr(
            signal, "getsignal", lambda _, ignored=ignored: signal.SIG_IGN if ignored else None
        )
        open_run(tmp_path)[0].begin(0)
        assert (signal.SIGHUP in installed) != ignored and signal.SIGINT in installed


def lose_the_data() -> None:
    """On the last process alone."""
    from torch import distributed

    get, calls = data.Loader.__next__, []

    def patched(self):
        calls.append(1)
        if len(calls) == 4 and distributed.get_rank() == 1:  # the first is of the sample grid
            raise OSError("data loading failed: a worker was killed")
        return get(self)

    data.Loader.__next__ = patched


def test_lost_data_ends_in_a_checkpoint_on_all_processes(world, parts, tmp_path):
    write_shards(tmp_path / "tars")
    flags = [*decoder_flags(parts, tmp_path), "--data", tmp_path / "tars", "--statistics", 0, "--steps", 4]
    printed = world(2, "train_decoder.py", *flags, patch=lose_the_data).wait(1)
    assert "error: data loading failed: a worker was killed (step 2 is saved: continue with" in printed
    assert "Traceback" not in printed and checkpoints(tmp_path) == ["0000002"]
    state = json.loads((tmp_path / "checkpoints/0000002/state.json").read_text())
    # of both processes: epoch, shard, first row of the block, rows taken of it
    assert list(state["positions"].values()) == [[0, 0, 0, 2]] * 4


def signal_while_asking() -> None:
    """The first process gets a signal when it has just told the others that it had none."""
    global_sum, stopping = common.global_sum, common.Run.stopping

    def late_signal(*values):
        result = global_sum(*values)
        signal.raise_signal(signal.SIGTERM)
        return result

    def patched(self, step: int) -> bool:
        common.global_sum = late_signal if self.dist_ctx.is_main else global_sum
        stop = stopping(self, step)
        common.global_sum = global_sum
        return stop

    common.Run.stopping = patched


def test_all_processes_leave_after_the_same_step(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), "--steps", 9]
    run = world(2, "train_decoder.py", *flags, patch=signal_while_asking)
    assert "stopped after step 2" in run.wait()


def write_shards(folder: Path) -> None:
    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(9 * shard, 9 * shard + 9):
                member = tarfile.TarInfo(f"{i:03d}.png")
                member.size = len(content := png(5 * i))
                tar.addfile(member, io.BytesIO(content))


def test_shards_resume_in_the_middle_of_a_pass(world, parts, tmp_path):
    """The positions of streams are in the checkpoint; the first half is read by two processes."""
    write_shards(tmp_path / "tars")
    os.truncate(tmp_path / "tars/3.tar", 7000)
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--data", f"{tmp_path / 'tars'}=3,nano:objects=1", "--statistics", 0, "--workers", 1]
    flags += ["--steps", 7, "--save-every", 3]
    runs = [
        world(1, "train_decoder.py", *decoder_flags(parts, whole), *flags, patch=use_sgd),
        world(2, "train_decoder.py", *decoder_flags(parts, half), *flags, patch=stop_and_use_sgd),
    ]
    [run.wait() for run in runs]
    assert checkpoints(half) == ["0000002"]
    world(1, "train_decoder.py", "--out", half, "--resume", patch=use_sgd).wait()
    one, other = (logged(out, "loss", "grad_norm") for out in (whole, half))
    assert all(one[step] == pytest.approx(other[step], rel=1e-5) for step in range(1, 8))
    states = [json.loads((out / "checkpoints/0000007/state.json").read_text()) for out in (whole, half)]
    assert states[0]["skipped_samples"] == states[1]["skipped_samples"] > 0
    assert "the rest of shard 3" in (half / "skipped.log").read_text()


def test_resuming_an_older_checkpoint_forgets_the_newer(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), "--steps", 6, "--save-every", 2, "--keep", 9]
    world(1, "train_decoder.py", *flags).wait()
    before = logged(tmp_path, "loss", "grad_norm")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off by a full disk
    (tmp_path / ".model.1.tmp").mkdir()
    (tmp_path / "model").rename(tmp_path / ".model.1.old")  # killed between two renames
    older = tmp_path / "checkpoints/0000002"
    assert str(older) in world(1, "train_decoder.py", *flags, "--steps", 3, "--resume", older).wait()
    assert checkpoints(tmp_path) == ["0000002", "0000003"]
    assert logged(tmp_path, "loss", "grad_norm")[2] == before[2] and max(logged(tmp_path, "loss")) == 3
    assert (tmp_path / "model").is_dir() and not list(tmp_path.glob(".model.*"))


def die_while_writing() -> None:
    publish = common.Run.publish

    def patched(self, temporary: Path, path: Path, *futures) -> None:
        if path.name == "0000004":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, temporary, path, *futures)

    common.Run.publish = patched


def test_a_kill_while_writing_leaves_the_checkpoint_before(world, parts, tmp_path):
    flags = [*t2i_flags(parts, tmp_path), "--steps", 5, "--save-every", 2]
    world(1, "train_t2i.py", *flags, patch=die_while_writing).wait(-signal.SIGKILL)
    assert checkpoints(tmp_path) == [".0000004.tmp", "0000002"]
    assert "checkpoints/0000002" in world(1, "train_t2i.py", *flags, "--resume", "auto").wait()
    assert checkpoints(tmp_path) == ["0000004", "0000005"]
    assert list(logged(tmp_path, "loss")) == [1, 2, 3, 4, 5]


def test_killed_at_random_and_restarted(world, parts, tmp_path):
    """What `python tests/kill.py` does many times under torchrun."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["train_decoder.py", *kill.flags(parts, killed), "--workers", 0]
    runs = [world(2, *flags, "--out", whole), world(2, *flags)]
    # the first checkpoint is complete before the second begins
    while not list(killed.glob("checkpoints/*/state.json")) and runs[1].processes[0].is_alive():
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    runs[1].signal(signal.SIGKILL, rank=random.randint(0, 1))
    runs[1].wait(code=None)  # the other process cannot go on alone
    assert kill.last_step(killed) < kill.STEPS
    assert "resumed from" in world(2, *flags).wait()
    runs[0].wait()
    assert kill.is_identical(whole, killed)


# -----------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(out: Path, step: int = 2, **flags) -> common.Run:
    run, _ = open_run(out, **flags)
    run.save(step, SimpleNamespace(positions={}, skipped=[]))
    run.check_checkpoint(wait=True)
    return run


def open_run(out: Path, width: int = 32, resume: str = "auto", **loaded) -> tuple[common.Run, dict]:
    torch.manual_seed(0)
    model = rae.DiT((16, 24), **TINY_DIT | {"width": width})
    trainable = [p for p in model.parameters() if p.requires_grad]
    keep = loaded.pop("keep", 2)
    run = common.Run(common.TrainConfig(out=str(out), resume=resume, keep=keep), CPU)
    optimizers = common.Optimizers(torch.optim.AdamW(trainable, fused=True))
    modules = {"model": model, "ema": copy.deepcopy(model)}
    return run, run.load(modules, [optimizers], copy.deepcopy(model), **loaded)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Of all files; None for folders and links."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def test_a_run_removes_its_own_checkpoints_only(tmp_path):
    folder = tmp_path / "checkpoints"
    save_checkpoint(tmp_path, 1)
    own = contents(folder)
    for name in ("best", "0000001-copy", "00001"):
        shutil.copytree(folder / "0000001", folder / name)
    for name in ("0000003/notes.txt", "backup/0000001/state.json", ".DS_Store", "notes.txt", ".0000001.mine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "latest").symlink_to("0000001-copy")
    (tmp_path / ".model.mine").mkdir()
    foreign = {path: content for path, content in contents(tmp_path).items() if path not in own}
    for name in (".0000002.tmp", ".0000001.old"):
        (folder / name).mkdir()
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, keep=1).forget_after(step)
    assert {path.name for path in common.Run.complete_checkpoints(open_run(tmp_path)[0])} == {"0000004"}
    after = contents(tmp_path)
    [renamed] = (path.name for path in folder.glob("0000003.*"))
    moved = {path.replace("0000003/", f"{renamed}/"): content for path, content in foreign.items()}
    for path, content in moved.items():
        if content == b"mine" or ".lock" not in path and "model" not in path:
            assert path in after and after[path] == content or path.endswith("0000003"), path
    assert (tmp_path / ".model.mine").is_dir()
    assert not list(folder.glob(".0*.tmp")) and not list(folder.glob(".0*.old"))


def test_the_checkpoint_named_by_resume_stays(tmp_path):
    save_checkpoint(tmp_path, 1)
    for step in (2, 3):
        save_checkpoint(tmp_path, step, keep=1, resume=str(tmp_path / "checkpoints/0000001"))
    assert checkpoints(tmp_path) == ["0000001", "0000003"]


def test_a_crash_while_removing_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "0000001").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)  # it never gets far
    common.remove_folder(tmp_path / "0000001")
    assert [path.name for path in tmp_path.iterdir()] == [".0000001.old"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (10_000_000, 9_999_999, 500):
        (tmp_path / f"checkpoints/{step:07d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step:07d}/state.json").write_text("{}")
    run = common.Run(common.TrainConfig(out=str(tmp_path), resume="auto"), CPU)
    assert [int(path.name) for path in run.sources] == [10_000_000, 9_999_999, 500]


@pytest.mark.parametrize("name", ["config.json", "model/config.json", "metrics.jsonl", "losses.png"])
@pytest.mark.parametrize("resume", ["", "auto"])
def test_somebody_elses_folder_is_no_out(name, resume, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"dit": {}, "latent_shape": [16, 24]}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not of a run of this script: choose another --out"):
        common.Run(common.TrainConfig(out=str(tmp_path), resume=resume), CPU)
    assert contents(tmp_path) == before


def test_the_checkpoint_of_one_run_does_not_overwrite_another(tmp_path):
    save_checkpoint(tmp_path / "one", 1)
    save_checkpoint(tmp_path / "other", 7)
    before = contents(tmp_path)
    source = str(tmp_path / "one/checkpoints/0000001")
    with pytest.raises(ValueError, match="holds another run: choose another --out"):
        open_run(tmp_path / "other", resume=source)
    shutil.rmtree(tmp_path / "other/checkpoints")  # of a finished run the model is left
    with pytest.raises(ValueError, match="no checkpoint to resume from: choose another --out"):
        (tmp_path / "other/config.json").write_text('{"batch": 4}')
        open_run(tmp_path / "other", resume="")
    assert set(contents(tmp_path / "one").items()) <= set(before.items())
    assert open_run(tmp_path / "new", resume=source)[1]["step"] == 1


def test_a_run_without_its_checkpoints_starts_anew_and_keeps_the_old_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    save_checkpoint(tmp_path, 7)
    shutil.rmtree(tmp_path / "checkpoints")
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    run, state = open_run(tmp_path)
    run.begin(state["step"])
    [kept] = tmp_path.glob("model.*")
    assert state["step"] == 0 and f"starts anew, and keeps {kept}" in capsys.readouterr().out
    assert (kept / "model.safetensors").read_bytes() == weights
    assert (kept / "metrics.jsonl").read_text() == '{"step": 7}\n'
    assert not (tmp_path / "model").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_checkpoints_leave_out_what_is_frozen(parts):
    model = rae.TextToImage.from_pretrained(parts / "t2i")
    assert model.language_model.config.tie_word_embeddings
    model.language_model.requires_grad_(False)
    state = common.training_state({"model": model}, [])
    assert state and not any("language_model" in name for name in state)


def test_two_runs_never_share_a_folder(tmp_path):
    take = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    hold = [sys.executable, "-c", f"{take}; print(flush=True); input()", tmp_path / ".lock"]
    other = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another run is writing to"):
        open_run(tmp_path)
    other.kill()  # which leaves the file, but no lock
    other.wait()
    run, _ = open_run(tmp_path)
    assert b"BlockingIOError" in subprocess.run(hold, input=b"", capture_output=True).stderr
    del run


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_foreign_checkpoints_are_refused_and_no_pickle_is_run(tmp_path):
    save_checkpoint(tmp_path)
    assert open_run(tmp_path)[1]["step"] == 2
    for kwargs, message in (({"width": 64}, "tensors do not fit"), ({"resume": ""}, "already holds a run"),
                            ({"resume": str(tmp_path)}, "give auto, or a folder")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_run(tmp_path, **kwargs)
    [file] = (tmp_path / "checkpoints/0000002").glob("*.safetensors")
    state = json.loads(file.with_name("state.json").read_text())
    del state["checksums"]
    bomb, good = pickle.dumps(Bomb(tmp_path / "exploded")), file.read_bytes()
    file.with_name(".metadata").write_bytes(bomb)
    for content in (good[:-10], b"", b"PK junk", bomb):
        file.write_bytes(content)
        # with right checksums, so that the content itself has to be refused
        checksums = {"state.json": common.state_checksum(state), file.name: common.file_checksum(file)}
        file.with_name("state.json").write_text(json.dumps(state | {"checksums": checksums}))
        with pytest.raises(ValueError, match="cannot resume from"):
            open_run(tmp_path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()


def test_damaged_log_lines_are_skipped(tmp_path):
    damaged = b'{"step": 1}\n\xff\n3\nnull\n{}\n{"step": null}\n{"step": 2, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert common.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("launcher", [{"RANK": "5"}, {"RANK": "5", "LOCAL_RANK": "3"}])
def test_the_device_of_a_launcher_without_local_rank(launcher, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    common.init_distributed()
    assert devices == [torch.device("cuda", int(launcher.get("LOCAL_RANK", 1)))]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_text("{}")


@pytest.mark.parametrize(
    "name, damage",
    [("state.json", flip_a_bit), ("state.json", cut), ("state.json", empty)]
    + [("*.safetensors", damage) for damage in (flip_a_bit, cut, Path.unlink)],
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(name, damage, tmp_path, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, step)
    newest = tmp_path / "checkpoints/0000002"
    [file] = newest.glob(name)
    damage(file)
    run, state = open_run(tmp_path)
    assert state["step"] == 1 and run.source.name == "0000001"
    assert re.search("cannot resume from .*0000002: .*; going back to .*0000001", capsys.readouterr().err)
    with pytest.raises(ValueError, match="0000002: "):
        open_run(tmp_path, resume=str(newest))
    save_checkpoint(tmp_path, 2)  # in its place
    assert open_run(tmp_path)[1]["step"] == 2


def test_what_a_checkpoint_depends_on_is_known_by_its_content(tmp_path, capsys):
    autoencoder = torch.nn.BatchNorm1d(4)
    save_checkpoint(tmp_path, frozen={"autoencoder": autoencoder, "reader": None}, data=["10 images (ab)"])
    same = copy.deepcopy(autoencoder).double()
    open_run(tmp_path, frozen={"autoencoder": same}, data=["10 images (ab)"])
    assert "changed" not in capsys.readouterr().out
    open_run(tmp_path, frozen={"autoencoder": same}, data=["11 images (cd)"])
    expected = "['10 images (ab)'] then, ['11 images (cd)'] now"
    assert "the data has changed since" in (printed := capsys.readouterr().out) and expected in printed
    autoencoder.running_mean += 1e-3  # a buffer
    with pytest.raises(ValueError, match="the weights of the autoencoder have changed since"):
        open_run(tmp_path, frozen={"autoencoder": autoencoder})


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def write_data(self, plan, planner):
        raise OSError("No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_data)
    with pytest.raises(OSError, match="cannot write .*0000002: .*No space left"):
        save_checkpoint(tmp_path)
    assert checkpoints(tmp_path) == [".0000002.tmp"]


def test_many_skipped_samples_are_worth_a_warning(tmp_path):
    config = common.TrainConfig(out=str(tmp_path), batch=16)
    for skipped, warned in ((1, 0), (3, 1)):
        run, lines = common.Run(config, CPU), []
        for step in (1, 2, 3, 4, 5, 6):
            run.count_skipped(SimpleNamespace(skipped=["a.png: no image"] * skipped), lines.append)
            run.warn_of_skips(step, lines.append)
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == warned
    assert warnings == [f"warning: 3 of 19 samples (16%) were skipped, see {tmp_path / 'skipped.log'}"]


# -----------------------------------------------------------------------------------------------------------
# steps that are not finite


def spoil_losses(steps: range) -> None:
    """The loss of the decoder is infinite at some of its steps, although its gradients are not."""
    l1_loss, calls = torch.nn.functional.l1_loss, []

    def patched(one, other):
        calls.append(1)
        return l1_loss(one, other) + (float("inf") if len(calls) - 1 in steps else 0.0)

    torch.nn.functional.l1_loss = patched


def spoil_one_loss() -> None:
    spoil_losses(range(2, 3))


def spoil_twelve_losses() -> None:
    spoil_losses(range(1, 13))


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(size, world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), "--save-every", 1, "--keep", 9, "--shard", "full", "--steps", 4]
    world(size, "train_decoder.py", *flags, patch=spoil_one_loss).wait()
    assert [v for [v] in logged(tmp_path, "skipped_steps").values()] == [0, 0, 1, 1]
    if size == 1:
        second, third, fourth = (state(tmp_path / f"checkpoints/000000{s}") for s in (2, 3, 4))
        trained = {key for key in second if not key.startswith("ema.")}
        assert_same({k: second[k] for k in trained}, {k: third[k] for k in trained})
        assert any(not torch.equal(third[key], fourth[key]) for key in trained)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), "--log-every", 99, "--steps", 50]
    printed = world(1, "train_decoder.py", *flags, patch=spoil_twelve_losses).wait(1)
    assert "error: ten steps in a row" in printed and "Traceback" not in printed
