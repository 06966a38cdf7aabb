"""Staying alive: the same numbers on any number of processes, exact resumption, no lost step."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import kill
import pytest
import torch
from conftest import write_encoder
from harness import compiled_cheaply
from safetensors import safe_open
from safetensors.torch import load_file
from test_data import write_jsonl, write_tars

import common
import data
import rae


def decoder_flags(parts, out):
    flags = ["--encoder", parts / "encoder", "--out", out, "--batch", 4, "--statistics", 16, "--workers", 0]
    return [*flags, "--muon", 0]


def t2i_flags(parts, out):
    return [
        "--autoencoder", parts / "rae", "--language-model", parts / "language-model", "--out", out,
        "--batch", 4, "--workers", 0, "--understanding", 0.4, "--sample-steps", 1, "--noise-first", 1,
        "--muon", 0,
    ]  # fmt: skip


TRAINERS = {"train_decoder.py": decoder_flags, "train_t2i.py": t2i_flags}
EVERY = ["--log-every", 1, "--lr", 0.01, "--warmup", 1]


def logged(out: Path, *names: str) -> dict[int, list[float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "lr", "grad_norm", "images_per_second", "waiting"} <= set(row) for row in rows)
    return {row["step"]: [row[name] for name in names if name in row] for row in rows}


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
        torch.testing.assert_close(
            one[key], other[key], atol=atol, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
        )


# -----------------------------------------------------------------------------------------------------------
# the number of processes changes nothing


def plain_sgd() -> None:
    """Adam turns the rounding of a zero gradient into a full step; SGD shows the gradients themselves."""

    class Plain(torch.optim.SGD):
        def __init__(self, groups, lr=0.0, **kwargs):
            super().__init__(groups, lr)

    torch.optim.AdamW = Plain


@pytest.mark.parametrize("script", TRAINERS)
def test_processes_shards_and_accumulation_change_nothing(script, world, parts, tmp_path):
    flags = [*EVERY, "--steps", 3, "--save-every", 3]
    runs = {
        "one": world(1, script, *TRAINERS[script](parts, tmp_path / "one"), *flags, patch=plain_sgd),
        "two": world(2, script, *TRAINERS[script](parts, tmp_path / "two"), *flags, patch=plain_sgd),
    }
    variants = {
        "full": (2, ["--shard", "full"], 1),
        "hybrid": (4, ["--shard", "hybrid"], 2),
        "pieces": (1, ["--accumulate", 3], 1),
        "both": (2, ["--accumulate", 2, "--shard", "full"], 1),
    }
    for name, (size, more, machines) in variants.items():
        out = TRAINERS[script](parts, tmp_path / name)
        runs[name] = world(size, script, *out, *flags, *more, patch=plain_sgd, machines=machines)
    printed = {name: run.wait() for name, run in runs.items()}
    assert "2 processes (gloo), float32 compute, fp32 weights in 2 copies of 1 parts" in printed["two"]
    assert "4 processes (gloo), float32 compute, fp32 weights in 2 copies of 2 parts" in printed["hybrid"]
    expected = logged(tmp_path / "one", "loss", "grad_norm")
    assert expected[1] != expected[2] != expected[3]
    for name in runs:
        for step, values in logged(tmp_path / name, "loss", "grad_norm").items():
            assert values == pytest.approx(expected[step], rel=1e-5), (name, step)
        assert_same(weights(tmp_path / name), weights(tmp_path / "one"), atol=1e-5)


def test_nor_do_they_with_requests_questions_and_text_mixed(world, parts, tmp_path):
    """Batches of unequal counts, some parts without an image, stopped in the middle of a pass."""
    flags = [*EVERY, "--data", write_jsonl(tmp_path, 11), "--steps", 4, "--save-every", 2]
    runs = {
        "one": world(1, "train_t2i.py", *t2i_flags(parts, tmp_path / "one"), *flags, patch=plain_sgd),
        "two": world(2, "train_t2i.py", *t2i_flags(parts, tmp_path / "two"), *flags, patch=plain_sgd),
    }
    more = [*flags, "--accumulate", 3]
    runs["pieces"] = world(1, "train_t2i.py", *t2i_flags(parts, tmp_path / "pieces"), *more, patch=plain_sgd)
    [run.wait() for run in runs.values()]
    names = ("loss", "text_loss", "flow_loss", "grad_norm")
    expected = logged(tmp_path / "one", *names)
    for name in ("two", "pieces"):
        for step, values in logged(tmp_path / name, *names).items():
            assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-6), (name, step)
        assert_same(weights(tmp_path / name), weights(tmp_path / "one"), atol=1e-5)
    whole = weights(tmp_path / "one")
    (tmp_path / "one/metrics.jsonl").write_text("")
    shutil.rmtree(tmp_path / "one/checkpoints/0000004")
    world(1, "train_t2i.py", "--out", tmp_path / "one", "--resume", patch=plain_sgd).wait()
    again = logged(tmp_path / "one", *names)
    assert list(again) == [3, 4] and all(again[step] == expected[step] for step in again)
    assert_same(weights(tmp_path / "one"), whole)


@pytest.mark.parametrize(
    ("script", "more_flags", "matrix", "bound"),
    [
        ("train_t2i.py", ["--draws", 3], "ema.dit.blocks.0.mlp.w12", 0.5),
        ("train_decoder.py", [], "model.decoder.decoder_layers.0.intermediate.dense", 0.75),
    ],
)
def test_nor_do_they_with_muon_and_more_draws_a_image(
    script, more_flags, matrix, bound, world, parts, tmp_path
):
    """Muon makes the smallest directions of a gradient, which are rounding, as large as the others: the
    updates are much the same, also of matrices that are spread."""
    flags = ["--muon", 0.02, *more_flags, "--steps", 3, "--save-every", 1, "--keep", 9, *EVERY]
    flags += ["--ema", 0]
    variants = {
        "one": (1, []),
        "two": (2, []),
        "full": (2, ["--shard", "full"]),
        "pieces": (1, ["--accumulate", 3]),
    }
    runs = [
        world(size, script, *TRAINERS[script](parts, tmp_path / name), *flags, *more, patch=plain_sgd)
        for name, (size, more) in variants.items()
    ]
    [run.wait() for run in runs]
    expected, kept = logged(tmp_path / "one", "loss", "grad_norm"), weights(tmp_path / "one")
    assert expected[1] != expected[2] != expected[3]
    first = state(tmp_path / "one/checkpoints/0000001")
    assert f"optimizer.{matrix}.weight.momentum_buffer" in first
    for name in variants:
        for step, values in logged(tmp_path / name, "loss", "grad_norm").items():
            assert values == pytest.approx(expected[step], rel=1e-5 if step == 1 else 5e-3), (name, step)
        for key, tensor in weights(tmp_path / name).items():
            moved = (kept[key] - first.get(f"ema.{key}", kept[key])).norm()  # tables are not trained
            assert (tensor - kept[key]).norm() <= bound * moved + 1e-6, (name, key)


def test_muon_leaves_a_step_that_is_not_finite_out():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(4, 4))
    stepper = common.Stepper(torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0))
    for step, good in enumerate((True, False, True)):
        before = matrix.detach().clone(), stepper.state()[0][1]["momentum_buffer"].clone()
        matrix.grad = torch.randn(4, 4) if good else torch.full((4, 4), torch.nan)
        stepper.step()
        after = matrix, stepper.state()[0][1]["momentum_buffer"]
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [not good] * 2, step
    assert matrix.isfinite().all() and stepper.check() == 1


def test_without_an_average_the_weights_themselves_are_saved(world, parts, tmp_path):
    flags = [*EVERY, "--steps", 4, "--save-every", 2, "--ema", 0]
    world(1, "train_t2i.py", *t2i_flags(parts, tmp_path), *flags).wait()
    newest = state(tmp_path / "checkpoints/0000004")
    assert not [name for name in newest if name.startswith("model.")]
    saved = weights(tmp_path)
    trained = {name for name in saved if f"ema.{name}" in newest}  # the rest is frozen: tables
    assert "latent_queries" in trained and len(trained) > 0.9 * len(saved)
    assert all(torch.equal(saved[name], newest[f"ema.{name}"]) for name in trained)
    shutil.rmtree(tmp_path / "checkpoints/0000004")
    world(1, "train_t2i.py", "--out", tmp_path, "--resume").wait()
    assert_same(weights(tmp_path), saved)


@pytest.mark.parametrize(
    "freeze, moved",
    [
        ("language-model", {"dit", "diff_head_projector", "latent_queries", "mm_projector"}),
        ("all-but-dit", {"dit", "diff_head_projector", "latent_queries"}),
    ],
)
def test_what_is_frozen_stays_as_it_is(freeze, moved, world, parts, tmp_path):
    """Finetuning by epochs: 9 samples, 4 at a time, twice; in the latents of the model's own autoencoder."""
    flags = [*EVERY, "--data", write_jsonl(tmp_path, 9), "--epochs", 2, "--init", parts / "t2i"]
    _, _, *others = t2i_flags(parts, tmp_path / "run")
    world(1, "train_t2i.py", *others, *flags, "--freeze", freeze).wait()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert Path(config["autoencoder"]).samefile(parts / "rae")
    assert list(logged(tmp_path / "run", "loss")) == [1, 2, 3, 4, 5]
    before, after = load_file(parts / "t2i/model.safetensors"), weights(tmp_path / "run")
    assert {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])} == moved


def test_images_are_read_by_another_encoder(world, parts, tmp_path):
    """Half of the tokens' channels to draw, all to read; a batch without an image to draw too."""
    torch.manual_seed(0)
    write_encoder(tmp_path / "encoder", width=12, hidden=16, layers=1)
    small = {"patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
    rae.RAE(str(tmp_path / "encoder"), small).save_pretrained(tmp_path / "small")
    flags = [*t2i_flags(parts, tmp_path / "run"), "--autoencoder", tmp_path / "small", *EVERY, "--steps", 3]
    flags += ["--data", write_jsonl(tmp_path, 9), "--batch", 2, "--reader", parts / "rae"]
    world(1, "train_t2i.py", *flags).wait()
    model = rae.TextToImage.from_pretrained(tmp_path / "run/model").eval()
    assert (model.latent_shape, model.read_shape) == ((16, 12), (16, 24))
    image = torch.rand(3, 32, 32)
    expected = rae.RAE.from_pretrained(parts / "rae").encode(image[None])[0]
    assert model.answer(image, "what?", 4) == model.answer(expected, "what?", 4)
    assert model.autoencoder.latent_shape == (16, 12) and model.reader.latent_shape == (16, 24)
    wrong = [*flags, "--out", tmp_path / "wrong", "--init", parts / "t2i"]
    assert "has latents (16, 24), not (16, 12)" in world(1, "train_t2i.py", *wrong).wait(code=1)


@torch.no_grad()
def test_a_vae_is_trained_on_samples_of_its_posterior(world, vae_folder, tmp_path):
    """A new DiT returns zeros, so that the first loss is the mean square of the velocity."""
    config = vae_folder / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 1024', '"sample_size": 32'))
    flags = ["--autoencoder", vae_folder, "--condition", "none", "--dit", "nano-guide", "--muon", 0]
    flags += ["--data", "nano:objects", "--batch", 4, "--workers", 0, "--steps", 1, "--sample-steps", 1]
    world(1, "train_t2i.py", *flags, *EVERY, "--out", tmp_path / "run").wait()
    vae, numbers = rae.VAE(vae_folder), list(range(4))
    images = torch.stack(
        [torch.from_numpy(data.NanoSource("objects", vae.image_size, 0)[i]["image"]) for i in numbers]
    )
    noise, of_posterior = (
        data.flow_draws(vae.latent_shape, seed, numbers, torch.device("cpu"), draws)[0]
        for seed, draws in ((0, 2), (data.hash_seed(0, "posterior"), 1))
    )
    pixels = data.to_unit(images.permute(0, 3, 1, 2), torch.device("cpu"))
    sampled, mean = (
        (noise - vae.encode(pixels, *z).repeat(2, 1, 1)).square().mean() for z in ([of_posterior], [])
    )
    [[loss]] = logged(tmp_path / "run", "loss").values()
    assert loss == pytest.approx(sampled.item(), rel=1e-5) and abs(loss - mean.item()) > 0.01


def test_epochs_of_what_has_no_end(world, parts, tmp_path):
    flags = [*t2i_flags(parts, tmp_path), "--epochs", 1]
    assert "give steps, not epochs" in world(1, "train_t2i.py", *flags).wait(code=1)


def every_loss(parts, out):
    return [
        *decoder_flags(parts, out), "--batch", 8, "--discriminator", parts / "encoder", "--tau", 0.5,
        "--perceptual", "encoder", "--gram-weight", 100, "--gan-weight", 0.75, "--gan-start", 1,
        "--disc-lr", 0.01, "--disc-warmup", 1, *EVERY,
    ]  # fmt: skip


def fixed_adaptive_weight() -> None:
    plain_sgd()
    parse = common.parse

    def patched(*given):
        globals_of_script = sys.modules["__main__"].__dict__
        globals_of_script["adaptive_weight"] = lambda *_: torch.tensor(3.0)
        return parse(*given)

    common.parse = patched


def test_nor_with_every_loss_and_a_discriminator(world, parts, tmp_path):
    """Its gradients are summed over the processes, the adaptive weight comes from summed gradients, and its
    power iterations are one a step."""
    variants = {
        "one": (1, [], plain_sgd),
        "two": (2, [], plain_sgd),
        "full": (2, ["--shard", "full", "--checkpoint-blocks"], plain_sgd),
        "one-fixed": (1, [], fixed_adaptive_weight),
        "pieces-fixed": (1, ["--accumulate", 2], fixed_adaptive_weight),
        "both-fixed": (2, ["--accumulate", 2], fixed_adaptive_weight),
    }
    runs = {
        name: world(
            size, "train_decoder.py", *every_loss(parts, tmp_path / name), "--steps", 4, *more, patch=patch
        )
        for name, (size, more, patch) in variants.items()
    }
    [run.wait() for run in runs.values()]
    names = "loss l1 perceptual gram disc_loss on_real on_fake grad_norm gan gan_weight".split()
    for name in variants:
        base = tmp_path / ("one-fixed" if "fixed" in name else "one")
        expected = logged(base, *names)
        assert [len(values) for values in expected.values()] == [8, 10, 10, 10]
        for step, values in logged(tmp_path / name, *names).items():
            assert values == pytest.approx(expected[step], rel=1e-5, abs=1e-5), (name, step)
        assert_same(weights(tmp_path / name), weights(base), atol=1e-5)
    assert logged(tmp_path / "one-fixed", "gan_weight")[2] == [0.75 * 3]


@pytest.mark.parametrize("script", TRAINERS)
def test_stopped_on_two_processes_and_resumed_on_one_and_four(script, world, parts, tmp_path):
    flags = [*TRAINERS[script](parts, tmp_path / "whole"), *EVERY, "--steps", 4]
    whole = world(1, script, *flags, patch=plain_sgd)
    half = world(
        2, script, *flags, "--out", tmp_path / "half", "--shard", "full", "--save-every", 2, patch=plain_sgd
    )
    whole.wait(), half.wait()
    for size in (1, 4):
        out = tmp_path / f"half-{size}"
        shutil.copytree(tmp_path / "half", out)
        shutil.rmtree(out / "checkpoints/0000004")
        world(size, script, "--out", out, "--resume", "auto", patch=plain_sgd).wait()
        expected = logged(tmp_path / "whole", "loss", "grad_norm")
        for step, values in logged(out, "loss", "grad_norm").items():
            assert values == pytest.approx(expected[step], rel=1e-5), (size, step)
        assert_same(weights(out), weights(tmp_path / "whole"), atol=1e-5)


# -----------------------------------------------------------------------------------------------------------
# stop, kill and resume


def stop_after_two_steps() -> None:
    stopping = common.Run.stopping

    def patched(self) -> bool:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return stopping(self)

    common.Run.stopping = patched


@pytest.mark.parametrize("script", TRAINERS)
def test_training_writes_everything_and_resumes_bit_for_bit(script, world, parts, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = [*EVERY, "--steps", 5, "--save-every", 2]
    runs = [
        world(1, script, *TRAINERS[script](parts, whole), *flags, "--tensorboard"),
        world(1, script, *TRAINERS[script](parts, half), *flags, patch=stop_after_two_steps),
    ]
    assert "go on with --resume" in [run.wait() for run in runs][1]  # and exit status 0
    assert {p.name for p in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "model", "samples", "tensorboard",
    }  # fmt: skip
    assert [p.name for p in sorted((whole / "samples").iterdir())] == [f"{s:07d}.png" for s in (2, 4, 5)]
    assert checkpoints(whole) == ["0000004", "0000005"] and checkpoints(half) == ["0000002"]
    assert "already holds a training" in world(1, script, *TRAINERS[script](parts, whole)).wait(1)

    with (half / "metrics.jsonl").open("a") as file:  # as after a crash beyond the checkpoint
        file.write('{"step": 3, "loss": 99.0}\n')
    (half / "checkpoints/.0000004.tmp").mkdir()
    assert (
        "goes on from" in world(1, script, "--out", half, "--resume").wait()
    )  # flags are in its config.json
    assert logged(half, "loss", "lr", "grad_norm") == logged(whole, "loss", "lr", "grad_norm")
    assert_same(weights(half), weights(whole))
    assert checkpoints(half) == ["0000004", "0000005"]
    assert_same(state(half / "checkpoints/0000005"), state(whole / "checkpoints/0000005"))


def test_a_discriminator_is_resumed_bit_for_bit_on_two_processes(world, parts, tmp_path):
    """Stopped before it has begun to learn, so that the checkpoint holds an optimizer without a past."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = ["--steps", 5, "--disc-start", 2, "--gan-start", 3, "--shard", "full"]
    runs = [
        world(2, "train_decoder.py", *every_loss(parts, whole), *flags),
        world(2, "train_decoder.py", *every_loss(parts, half), *flags, patch=stop_after_two_steps),
    ]
    [run.wait() for run in runs]
    world(2, "train_decoder.py", "--out", half, "--resume").wait()
    names = ("loss", "grad_norm", "disc_loss", "gan", "gan_weight")
    assert logged(half, *names) == logged(whole, *names)
    assert_same(weights(half), weights(whole))
    for rank in (1, 2):
        one, other = (state(out / "checkpoints/0000005", f"shard-0000{rank}-*") for out in (half, whole))
        assert_same(one, other)
    assert {"discriminator.heads.0.0.0.weight_u", "optimizer.discriminator.heads.0.2.bias.step"} <= {
        key for rank in (1, 2) for key in state(half / "checkpoints/0000005", f"shard-0000{rank}-*")
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_saves_and_ends_well(number, world, parts, tmp_path):
    """What a terminal and torchrun do: the data loading processes are in the group too."""
    flags = [*t2i_flags(parts, tmp_path / "out"), *EVERY, "--workers", 1]
    run = world(2, "train_t2i.py", *flags, "--shard", "full", patch=os.setsid)
    while not (tmp_path / "out/metrics.jsonl").exists() and run.processes[0].is_alive():
        time.sleep(0.01)
    for process in run.processes if number == signal.SIGINT else run.processes[:1]:  # one of them is enough
        os.killpg(process.pid, number)
    assert "go on with --resume" in run.wait(0) and "Traceback" not in run.output()
    [step] = checkpoints(tmp_path / "out")
    assert max(logged(tmp_path / "out", "loss")) == int(step)
    rae.TextToImage.from_pretrained(tmp_path / "out/model")


def told_to_stop_while_asking() -> None:
    """The first process hears of it when it has just told the others that it did not."""
    global_sum, stopping = common.global_sum, common.Run.stopping

    def late_signal(*values):
        result = global_sum(*values)
        signal.raise_signal(signal.SIGTERM)
        return result

    def patched(self) -> bool:
        common.global_sum = late_signal if self.dist_ctx.is_main else global_sum
        stop = stopping(self)
        common.global_sum = global_sum
        return stop

    common.Run.stopping = patched


def test_all_processes_leave_after_the_same_step(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--steps", 9]
    assert (
        "stopped after step 2" in world(2, "train_decoder.py", *flags, patch=told_to_stop_while_asking).wait()
    )


def test_shards_go_on_in_the_middle_of_a_pass(world, parts, tmp_path):
    """The positions of streams are in the checkpoint; the second half is read by two processes."""
    write_tars(tmp_path / "tars", 4, 9)
    os.truncate(tmp_path / "tars/03.tar", 7000)
    whole, half = tmp_path / "whole", tmp_path / "half"
    flags = [
        "--data",
        f"{tmp_path / 'tars'}=3,nano=1",
        "--workers",
        1,
        *EVERY,
        "--steps",
        7,
        "--save-every",
        3,
    ]
    runs = [
        world(1, "train_decoder.py", *decoder_flags(parts, whole), *flags, patch=plain_sgd),
        world(2, "train_decoder.py", *decoder_flags(parts, half), *flags, patch=stop_and_plain_sgd),
    ]
    [run.wait() for run in runs]
    assert checkpoints(half) == ["0000002"]
    world(1, "train_decoder.py", "--out", half, "--resume", patch=plain_sgd).wait()
    one, other = (logged(out, "loss", "grad_norm") for out in (whole, half))
    assert all(one[step] == pytest.approx(other[step], rel=1e-5) for step in range(1, 8))
    counts = [
        json.loads((out / "checkpoints/0000007/state.json").read_text())["skipped_samples"]
        for out in (whole, half)
    ]
    assert counts[0] == counts[1] > 0 and "the rest of shard 3" in (half / "skipped.log").read_text()


def stop_and_plain_sgd() -> None:
    plain_sgd()
    stop_after_two_steps()


def test_going_on_from_an_older_checkpoint_forgets_the_newer(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--steps", 6, "--save-every", 2, "--keep", 9]
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
    assert {p.name for p in tmp_path.iterdir()} >= {"model"} and not list(tmp_path.glob(".model.*"))


def killed_while_writing() -> None:
    publish = common.Run.publish

    def patched(self, temporary: Path, path: Path) -> None:
        if path.name == "0000004":
            (temporary / "state.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, temporary, path)

    common.Run.publish = patched


def test_a_kill_in_the_middle_of_writing_leaves_the_checkpoint_before(world, parts, tmp_path):
    flags = [*t2i_flags(parts, tmp_path), *EVERY, "--steps", 5, "--save-every", 2]
    world(1, "train_t2i.py", *flags, patch=killed_while_writing).wait(-signal.SIGKILL)
    assert checkpoints(tmp_path) == [".0000004.tmp", "0000002"]
    assert "checkpoints/0000002" in world(1, "train_t2i.py", *flags, "--resume", "auto").wait()
    assert checkpoints(tmp_path) == ["0000004", "0000005"]
    assert list(logged(tmp_path, "loss")) == [1, 2, 3, 4, 5]


def test_killed_at_random_and_restarted_by_torchrun(parts, tmp_path):
    """One of the runs of `python tests/kill.py --runs 50`."""
    assert kill.trial(parts, tmp_path, random.Random(0), kills=1) == "identical"


def test_resume_auto_of_nothing_begins(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--steps", 1, "--resume", "auto"]
    assert "step 1: " in world(1, "train_decoder.py", *flags).wait()
    assert "give auto, or a folder" in world(1, "train_decoder.py", *flags[:-1], tmp_path / "nowhere").wait(1)


class Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {Path.cwd() / 'exploded'}",))


def test_what_is_no_checkpoint_is_refused_and_never_run(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--steps", 2]
    world(1, "train_decoder.py", *flags).wait()
    [file] = (tmp_path / "checkpoints/0000002").glob("*.safetensors")
    good = file.read_bytes()
    for content in (good[:-10], b"", b"PK junk"):
        file.write_bytes(content)
        assert "error: cannot resume from" in world(1, "train_decoder.py", *flags, "--resume").wait(1)
    for name in (file.name, ".metadata"):
        file.with_name(name).write_bytes(pickle.dumps(Bomb()))
    assert "error: cannot resume from" in world(1, "train_decoder.py", *flags, "--resume").wait(1)
    assert not (Path(common.__file__).parent / "exploded").exists() and not Path("exploded").exists()

    file.write_bytes(good)
    file.with_name(".metadata").unlink()
    (tmp_path / "two").mkdir()
    world(2, "train_decoder.py", *flags, "--shard", "full", "--out", tmp_path / "two").wait()
    [last] = (tmp_path / "two/checkpoints/0000002").glob("shard-00001*")
    last.unlink()  # the share of one process
    assert "do not fit" in world(1, "train_decoder.py", *flags, "--out", tmp_path / "two", "--resume").wait(1)
    other = ["--decoder", "ViT-B"]
    assert "tensors do not fit" in world(1, "train_decoder.py", *flags, "--resume", *other).wait(1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "fp64"}))
    assert "--dtype fp64: choose" in world(1, "train_decoder.py", *flags, "--resume").wait(1)
    (tmp_path / "config.json").write_text(json.dumps(config | {"colour": "red"}))
    assert "does not know: colour" in world(1, "train_decoder.py", *flags, "--resume").wait(1)


# -----------------------------------------------------------------------------------------------------------
# numbers that are not finite, and the average


def not_finite(steps: range) -> None:
    """The loss of the decoder is infinite at some of its steps, although its gradients are not."""
    l1_loss, calls = torch.nn.functional.l1_loss, []

    def patched(one, other):
        calls.append(1)
        return l1_loss(one, other) + (float("inf") if len(calls) - 1 in steps else 0.0)

    torch.nn.functional.l1_loss = patched


def one_bad_step() -> None:
    not_finite(range(2, 3))


def twelve_bad_steps() -> None:
    not_finite(range(1, 13))


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(size, world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--save-every", 1, "--keep", 9, "--shard", "full"]
    world(size, "train_decoder.py", *flags, "--steps", 4, patch=one_bad_step).wait()
    assert [v for [v] in logged(tmp_path, "skipped_steps").values()] == [0, 0, 1, 1]
    if size == 1:
        second, third, fourth = (state(tmp_path / f"checkpoints/000000{s}") for s in (2, 3, 4))
        ours = {key for key in second if not key.startswith("ema.")}
        assert_same({k: second[k] for k in ours}, {k: third[k] for k in ours})
        assert any(not torch.equal(third[key], fourth[key]) for key in ours)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), "--steps", 50]
    assert "ten steps in a row" in world(1, "train_decoder.py", *flags, patch=twelve_bad_steps).wait(1)


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_the_average_differs_from_the_model_and_is_what_is_saved(compiled, world, parts, tmp_path):
    flags = [*t2i_flags(parts, tmp_path), *EVERY, "--steps", 3, compiled]
    world(1, "train_t2i.py", *flags, patch=compiled_cheaply).wait()
    saved, exported = state(tmp_path / "checkpoints/0000003"), weights(tmp_path)
    pairs = [
        (saved[f"model.{key}"], saved[f"ema.{key}"], exported[key])
        for key in exported
        if f"model.{key}" in saved
    ]
    assert len(pairs) > 20 and all(torch.equal(average, sampled) for _, average, sampled in pairs)
    assert any(not torch.equal(model, average) for model, average, _ in pairs)
    model = rae.TextToImage.from_pretrained(tmp_path / "model")
    assert torch.equal(model.latent_queries, saved["ema.latent_queries"])


def test_a_full_disk_ends_the_run_in_one_line(world, parts, tmp_path):
    flags = [*decoder_flags(parts, tmp_path), *EVERY, "--steps", 2]
    printed = world(1, "train_decoder.py", *flags, patch=no_space).wait(1)
    assert "error: cannot write" in printed and "No space left" in printed and "Traceback" not in printed
    assert not checkpoints(tmp_path) or checkpoints(tmp_path) == [".0000002.tmp"]


def no_space() -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    def write_data(self, plan, planner):
        raise OSError("No space left on device")

    HuggingFaceStorageWriter.write_data = write_data
