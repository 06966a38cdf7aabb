"""What makes a step fast, most of which can be seen without a GPU: nothing reads a number back or leaves the
card, blocks compile whole. With a GPU the same steps run on it too."""

import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import compiled_cheaply
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import data
import rae
import train_decoder

WISH = [("user", "Draw a star"), ("assistant", "Here you go:\n<image>")]
QUESTION = [("user", "<image>\nhow many?"), ("assistant", "two")]
MAKERS = ("text", "classes", "autoencoder")
CARD = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


def valueless(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The module, inside of a FakeTensorMode, with tensors that have no values and claim to be on the device:
    whatever has to know one raises, as does an operation between devices."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(
                    torch.empty_like(p.data, device=device), p.requires_grad
                )
        for name, buffer in part._buffers.items():
            part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


class Unread(TorchDispatchMode):
    """Raises where a number is read back, as FakeTensorMode does, which `transformers` notices and then goes
    another way."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise DataDependentOutputException(operation)
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["values", "valueless", pytest.param("cuda", marks=needs_cuda)])
def models(parts, request, monkeypatch):
    """Two of each: to train, and its average. And what is made on the CPU before: a chat."""
    made = {name: [make(name, parts) for _ in range(2)] for name in MAKERS}
    made["chat"] = make("text", parts).chat([WISH, QUESTION, WISH])
    if request.param == "cuda":
        for name in MAKERS:
            [model.to(CARD) for model in made[name]]
        torch.cuda.set_sync_debug_mode("error")
        yield made | {"device": CARD}
        torch.cuda.set_sync_debug_mode("default")
        return
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # for which a card has to be there
    if request.param == "values":
        with Unread():
            yield made | {"device": torch.device("cpu")}
        return
    grid = rae.time_grid(3, 1.0)
    monkeypatch.setattr(rae, "time_grid", lambda *_: grid)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in MAKERS:
            [valueless(model, torch.device("cpu")) for model in made[name]]
        yield made | {"device": torch.device("cpu")}


def learn(
    model: torch.nn.Module, average: torch.nn.Module, loss: Callable[[torch.nn.Module], torch.Tensor]
) -> None:
    """A step of a training that has its warm-up behind it: no log line, no checkpoint."""
    learned = [p for p in model.parameters() if p.requires_grad]
    stepper = common.Stepper(torch.optim.AdamW(learned, 1e-3, fused=True))
    value = loss(model)
    common.backward(value)
    norm = stepper.step()
    common.update_ema(average, model, 0.999, 200)
    assert norm.shape == () and all(p.grad is None for p in learned)
    waits = RuntimeError if value.is_cuda else DataDependentOutputException
    for read in (stepper.check, value.item):  # what a log line does, and a step must not
        with pytest.raises(waits):
            read()


def text_loss(
    model: rae.TextToImage, models: dict, noise: torch.Tensor, u: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """As train_t2i.py has it, of three images with two draws each."""
    device = models["device"]
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8).pin_memory()  # as the loader does
    chat = models["chat"].to(device)
    with torch.autocast(device.type, torch.bfloat16):
        latents = models["autoencoder"][0].encode(data.to_unit(images, device))
        t, dropped = rae.to_device(rae.sample_time(u, model.alpha), device), rae.to_device(v < 0.1, device)
        cross_entropy, errors = model(chat, latents, noise, t, dropped)
    assert errors.shape == (4,)
    return cross_entropy / len(chat.targets) + 2 * errors.sum() / 4


def test_a_step_of_text_to_image_waits_for_nothing(models):
    draws = data.flow_draws((16, 24), 0, [0, 1, 2], models["device"], draws=2)
    learn(*models["text"], lambda model: text_loss(model, models, *draws))


def test_a_step_with_classes_waits_for_nothing(models):
    with models["device"]:
        labels, t, dropped = torch.arange(1, 3), torch.rand(2), torch.rand(2) < 0.1
        pair = torch.randn(2, 2, 16, 24)
    learn(*models["classes"], lambda model: model(labels, *pair, t, dropped).mean())


def test_a_step_of_a_decoder_waits_for_nothing(models):
    images = torch.rand(2, 3, 32, 32, device=models["device"])
    learn(*models["autoencoder"], lambda model: F.l1_loss(model.decode(model.encode(images)), images))


def test_sampling_waits_for_nothing(models):
    with models["device"]:
        labels, noise = torch.arange(1, 3), torch.randn(2, 16, 24)
    dit = models["classes"][0].eval().dit
    velocity = partial(dit, condition=labels)
    velocity = rae.guided(velocity, partial(dit, condition=None), 3.0)
    latents = rae.sample(velocity, noise, 3, solver="heun")
    assert models["autoencoder"][0].decode(latents).shape == (2, 3, 32, 32)


class Transfers(TorchDispatchMode):
    """Collects the operations between the CPU and a card, as text."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        before, after = (
            {each.device.type for each in tree_leaves(some) if isinstance(each, torch.Tensor)}
            for some in ((args, kwargs), out)
        )
        if len(before | after) > 1:
            how = "at once" if (kwargs or {}).get("non_blocking") else "waits"
            self.found.append(f"{'+'.join(sorted(before))} to {'+'.join(after)}, {how}")
        return out


@pytest.fixture
def card(parts, monkeypatch):
    """The models on a card that need not be there, with its autocast, a chat, and losses of a decoder."""
    made = {name: [make(name, parts)] for name in MAKERS} | {"device": CARD}
    chat, grid = made["text"][0].chat([WISH, QUESTION, WISH]), rae.time_grid(3, 1.0)
    encoder = made["autoencoder"][0].encoder
    backbone = train_decoder.Backbone(encoder, 32, *[torch.full((3,), 0.5)] * 2)
    perceptual = train_decoder.Perceptual("encoder", backbone)
    discriminator = train_decoder.Discriminator(backbone)
    monkeypatch.setattr(rae, "time_grid", lambda *_: grid)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1, device=CARD)[:, None]
        except RuntimeError:
            pytest.skip("this version of torch has tensors of a card only where there is one")
        for each in (*(made[name][0] for name in MAKERS), backbone, perceptual, discriminator):
            valueless(each, CARD)
        yield made | {"chat": chat, "perceptual": perceptual, "discriminator": discriminator}


def test_a_step_on_a_card_takes_its_batch_there_and_waits_for_nothing(card):
    """The forward pass: autograd needs a card that is there."""
    noise, (u, v) = torch.empty(6, 16, 24, device=CARD), torch.rand(2, 6)
    with Transfers() as transfers:
        loss = text_loss(card["text"][0], card, noise, u, v)
    assert loss.device == CARD
    assert transfers.found == 10 * ["cpu to cuda, at once"]  # seven of a chat, images, times, dropout
    with torch.autocast("cuda", torch.bfloat16):
        assert card["text"][0].dit.blocks[0].mlp(noise.new_empty(1, 1, 32)).dtype == torch.bfloat16


def test_the_losses_of_a_decoder_stay_on_a_card(card):
    images, draws = torch.empty(2, 3, 32, 32, device=CARD), torch.rand(7, 2)
    with Transfers() as transfers, torch.autocast("cuda", torch.bfloat16):
        fake = card["autoencoder"][0].decode(card["autoencoder"][0].encode(images))
        maps = [card["perceptual"].features(2 * pair - 1) for pair in (images, fake)]
        distances = card["perceptual"].distance(*maps) + train_decoder.gram_distance(*maps)
        logits = card["discriminator"](train_decoder.augment(2 * fake - 1, draws, cutout=0.2))
    assert distances.device == logits.device == CARD
    assert transfers.found == ["cpu to cuda, at once"]  # the draws


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_an_evaluation_can_be_a_cuda_graph(card, kind):
    """It neither waits nor takes anything from the CPU."""
    model, noise = card[kind][0].eval(), torch.empty(2, 16, 24, device=CARD)
    condition = torch.empty(2, 16, 20, device=CARD) if kind == "text" else torch.empty(2, device=CARD).long()
    with Transfers() as transfers, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        for given in ({"condition": None}, {"condition": condition}, {"condition": condition, "skip": 1}):
            assert model.dit(noise, noise.new_ones(2), **given).shape == noise.shape
    assert not transfers.found


def test_drawing_on_a_card_takes_the_noise_there_and_waits_for_nothing(card):
    model, condition = card["text"][0].eval(), torch.empty(2, 16, 20, device=CARD)
    with Transfers() as transfers, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        latents = model.generate(condition, 3, 2.0, noise=torch.empty(2, 16, 24), solver="heun", skip=1)
        images = card["autoencoder"][0].decode(latents)
    assert images.device == CARD
    assert transfers.found == ["cpu to cuda, at once"]


@pytest.mark.parametrize(("images", "hidden"), [(2, 85), (3, 88)])
def test_products_of_many_rows_have_rows_of_16_bytes(card, images, hidden):
    """On a card: of a width of 32 SwiGLU's is 85, filled up to 88 for more than 32 tokens."""
    layer, widths = card["classes"][0].dit.blocks[0].mlp, set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation == torch.ops.aten.addmm.default:
                widths.update(size for weight in args[1:] for size in weight.shape)
            return operation(*args, **(kwargs or {}))

    with Products(), torch.no_grad():
        layer(torch.empty(images, 16, 32, device=CARD))
    assert widths == {16 * images, 32, hidden, 2 * hidden}


def test_a_padded_width_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    layer, x, results = rae.SwiGLU(32, 85), torch.randn(2, 5, 32), []
    for multiple in (1, 8):
        monkeypatch.setattr(layer, "multiple", multiple)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
    torch.testing.assert_close(*results)


def test_a_graph_keeps_what_it_reads(card, monkeypatch):
    """The graph itself knows addresses only. Nothing is captured here."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    for name in ("graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    like, condition = torch.empty(2, 16, 24, device=CARD), torch.empty(2, device=CARD).long()
    held = weakref.ref(condition)
    with torch.no_grad():
        replay = rae.graphed(partial(card["classes"][0].dit, condition=condition), like)
    del condition
    assert held() is not None
    del replay
    assert held() is None


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "compiled", "how"),
    [
        ("text", False, {"solver": "heun", "skip": 1}),
        ("text", False, {"interval": (0.2, 0.9)}),
        ("classes", False, {}),  # with a guide
        ("text", True, {}),
    ],
)
def test_a_cuda_graph_draws_the_same(parts, dtype, kind, compiled, how):
    model, guide = (make(kind, parts).eval() for _ in range(2))
    for each in (model, guide):
        shake(each)
        each.to(CARD)
    dist_ctx = common.DistContext(CARD, 0, 1, dtype)
    common.cast_linear(model.dit.blocks, dist_ctx)
    common.compile_blocks(model.dit.blocks, compiled, dist_ctx)
    how = how | {"guide": guide} if kind == "classes" else how
    inputs = {"text": ["a star", "a ring"], "classes": [1, 2]}[kind]
    for seed in range(2):
        noise, drawn = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(seed)), []
        for graph in (True, False):
            with dist_ctx.autocast():
                drawn.append(model.generate(inputs, 5, 2.0, noise=noise, graph=graph, **how))
        torch.testing.assert_close(*drawn)


@needs_cuda
def test_what_is_on_its_way_from_a_card_is_waited_for():
    numbers = torch.arange(2**22, device=CARD, dtype=torch.float32)
    for _ in range(50):
        numbers = numbers + 1
    [there], wait = common.to_host(numbers)
    numbers.zero_()  # what the card is given later changes nothing
    wait()
    assert there.is_pinned() and torch.equal(there, torch.arange(2**22) + 50.0)


@needs_cuda
def test_a_card_and_a_cpu_agree(parts):
    """In bf16, too, as closely as bf16 allows."""
    model = make("text", parts).eval()
    shake(model)
    noise = torch.randn(2, 16, 24)

    def draw() -> torch.Tensor:
        return model.generate(["a star", "a ring"], 5, 2.0, noise=noise).cpu()

    on_cpu = draw()
    model.to(CARD)
    torch.testing.assert_close(draw(), on_cpu, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert (draw() - on_cpu).norm() < 0.05 * on_cpu.norm()


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
    dist_ctx = common.DistContext(torch.device("cpu"), 0, 1, torch.bfloat16)
    size = sum(p.nbytes for p in model.dit.parameters())

    def draw() -> torch.Tensor:
        with torch.no_grad(), dist_ctx.autocast():
            latents = model.generate(["a star"], 3, 2.0, generator=torch.Generator().manual_seed(0))
            return model.autoencoder.decode(latents)

    before = draw()
    common.cast_linear([*model.dit.blocks, *model.autoencoder.decoder.decoder_layers], dist_ctx)
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
    images = torch.rand(2, 3, 32, 32)
    t, dropped = torch.rand(2), torch.tensor([False, True])
    run = {
        "text": lambda: model(model.chat([WISH, WISH]), *pair, t, dropped)[1],
        "classes": lambda: model(torch.tensor([1, 2]), *pair, t, dropped),
        "autoencoder": lambda: model.decode(model.encode(images)),
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
