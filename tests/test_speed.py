"""What makes a step fast and can be seen without a GPU: nothing reads a number back, blocks compile whole."""

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import compiled_cheaply
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import common
import data
import rae

WISH = [("user", "Draw a star"), ("assistant", "Here you go:\n<image>")]
QUESTION = [("user", "<image>\nhow many?"), ("assistant", "two")]
MAKERS = ("text", "classes", "autoencoder")


def make(name: str, parts) -> torch.nn.Module:
    """New models of the small parts' sizes."""
    if name == "classes":
        return rae.ClassToImage(
            {"width": 32, "depth": 2, "heads": 2, "num_classes": 8, "head": (48, 1, 2)}, (16, 24)
        )
    config = json.loads((parts / {"text": "t2i", "autoencoder": "rae"}[name] / "config.json").read_text())
    if name == "autoencoder":
        return rae.RAE(**config)
    model = rae.TextToImage(**config)
    model.set_tokenizer(transformers.AutoTokenizer.from_pretrained(parts / "t2i"))
    return model


def shake(model: torch.nn.Module) -> None:
    """A new DiT's velocity is zero, whatever its blocks do."""
    for p in model.dit.parameters() if hasattr(model, "dit") else ():
        p.data.add_(0.1 * torch.randn_like(p))


def valueless(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """The model with tensors that have no values: whatever has to know one raises. On a GPU it would have to
    wait."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.data), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = mode.from_tensor(buffer)
    return model


@pytest.fixture
def models(parts):
    """Two of each: to train, and its average. And what is made on the CPU before: a chat, sampling times."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made = {name: [valueless(make(name, parts), mode) for _ in range(2)] for name in MAKERS}
    made["chat"] = make("text", parts).chat([WISH, QUESTION, WISH])
    grid = rae.time_grid(3, 1.0)
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rae, "time_grid", lambda *_: grid)
        yield made


def learn(
    model: torch.nn.Module, average: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]
) -> None:
    """A step of a training that has its warm-up behind it: no log line, no checkpoint."""
    learned = [p for p in model.parameters() if p.requires_grad]
    stepper = common.Stepper(torch.optim.AdamW(learned, 1e-3, fused=True))
    value = loss(model)
    common.backward(value)
    norm = stepper.step()
    common.update_average(average, model, 0.999, 200)
    assert norm.shape == () and all(p.grad is None for p in learned)
    for read in (stepper.check, value.item):  # what a log line does, and a step must not
        with pytest.raises(DataDependentOutputException):
            read()


def test_a_step_of_text_to_image_waits_for_nothing(models):
    noise, u, v = data.flow_draws((16, 24), 0, [0, 1, 2], torch.device("cpu"), draws=2)

    def loss(model: rae.TextToImage) -> torch.Tensor:
        chat = models["chat"].to(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            latents = models["autoencoder"][0].encode(torch.rand(3, 3, 32, 32))
            t = rae.sample_time(u, model.alpha)
            cross_entropy, errors = model(chat, latents, noise, t, v < 0.1)
        assert errors.shape == (4,)
        return cross_entropy / len(chat.targets) + 2 * errors.sum() / 4

    learn(*models["text"], loss)


def test_a_step_with_classes_waits_for_nothing(models):
    labels, t, dropped = torch.tensor([1, 2]), torch.rand(2), torch.rand(2) < 0.1
    pair = torch.randn(2, 2, 16, 24)
    learn(*models["classes"], lambda model: model(labels, *pair, t, dropped).mean())


def test_a_step_of_a_decoder_waits_for_nothing(models):
    pictures = torch.rand(2, 3, 32, 32)
    learn(*models["autoencoder"], lambda model: F.l1_loss(model.decode(model.encode(pictures)), pictures))


def test_sampling_waits_for_nothing(models):
    dit, noise = models["classes"][0].eval().dit, torch.randn(2, 16, 24)
    velocity = partial(dit, condition=torch.tensor([1, 2]))
    velocity = rae.guided(velocity, partial(dit, condition=None), 3.0)
    latents = rae.sample(velocity, noise, 3, solver="heun")
    assert models["autoencoder"][0].decode(latents).shape == (2, 3, 32, 32)


def test_compiled_sampling_draws_the_same(world, parts, tmp_path):
    model = make("text", parts)
    shake(model)
    model.autoencoder_path = str(parts / "rae")
    model.save_pretrained(tmp_path / "model")
    flags = ["a red circle", "--model", tmp_path / "model", "--n", 2, "--steps", 3, "--latents"]
    runs = [
        world(1, "sample.py", *flags, "--out", tmp_path / name, *more, patch=compiled_cheaply)
        for name, more in (("plain", []), ("compiled", ["--compile"]))
    ]
    printed = [run.wait() for run in runs]
    assert ["compiles" in each for each in printed] == [False, True]
    one, other = (
        load_file(tmp_path / name / "a-red-circle-1.safetensors")["latents"] for name in ("plain", "compiled")
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_linear_layers_in_the_dtype_of_the_compute_change_nothing(parts):
    model = rae.TextToImage.from_pretrained(parts / "t2i").eval()
    shake(model)
    where = common.Launch(torch.device("cpu"), 0, 1, torch.bfloat16)
    size = sum(p.nbytes for p in model.dit.parameters())

    def draw() -> torch.Tensor:
        with torch.no_grad(), where.autocast():
            latents = model.generate(["a star"], 3, 2.0, generator=torch.Generator().manual_seed(0))
            return model.autoencoder.decode(latents)

    before = draw()
    common.cast_linear([*model.dit.blocks, *model.autoencoder.decoder.decoder_layers], where)
    assert torch.equal(draw(), before)
    assert sum(p.nbytes for p in model.dit.parameters()) < 0.7 * size


@pytest.mark.parametrize("name", MAKERS)
def test_blocks_compile_without_a_break(name, parts):
    """`fullgraph` raises at what cannot be compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make(name, parts)
    shake(model)
    pair = torch.randn(2, 2, 16, 24)
    pictures = torch.rand(2, 3, 32, 32)
    t, dropped = torch.rand(2), torch.tensor([False, True])
    run = {
        "text": lambda: model(model.chat([WISH, WISH]), *pair, t, dropped)[1],
        "classes": lambda: model(torch.tensor([1, 2]), *pair, t, dropped),
        "autoencoder": lambda: model.decode(model.encode(pictures)),
    }[name]
    blocks = model.blocks if name != "autoencoder" else [*model.decoder.decoder_layers, *model.encoder.blocks]
    plain, calls = run(), []

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        def counted(*args):
            calls.append(graph)
            return graph(*args)

        return counted

    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(), plain)
    assert len(calls) == len(blocks)
