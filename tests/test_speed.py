"""What makes a step fast, and most of it without a GPU: nothing waits for the GPU or leaves it, and blocks
compile whole. With a GPU the same steps run there, too.

Two devices stand in for a GPU. On the CPU, whatever reads a value raises. Fake CUDA tensors, which have no
values, also show copies and mistakes of placement, but not the backward pass: autograd wants a real GPU. And
`transformers` notices fake tensors and takes another path.
"""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import TINY_DIT
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import common
import data
import rae
import sample
import train_decoder
import train_t2i

PROMPT = [("user", "Draw a star"), ("assistant", "Here you go:\n<image>")]
QUESTION = [("user", "<image>\nhow many?"), ("assistant", "two")]
NAMES = ("text", "classes", "autoencoder")
GPU, BF16 = torch.device("cuda", 0), torch.bfloat16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def build(name: str, parts) -> torch.nn.Module:
    """A new model of the small parts' sizes."""
    if name == "classes":
        dit = {"width": 32, "depth": 2, "heads": 2, "num_classes": 8, "head": (48, 1, 2)}
        return rae.ClassToImage(dit, (16, 24))
    folder = parts / {"text": "t2i", "autoencoder": "rae"}[name]
    config = json.loads((folder / "config.json").read_text())
    if name == "autoencoder":
        return rae.RAE(**config)
    model = rae.TextToImage(**config)
    model.set_tokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    return model


def prepare(model: rae.TextToImage) -> train_t2i.Inputs:
    batch = {"conversation": [PROMPT, QUESTION, PROMPT], "image_index": [0, 1, 2]}
    return train_t2i.prepare(train_t2i.Config(), model, batch)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """A new DiT's velocity is zero, whatever its blocks compute."""
    for p in model.dit.parameters() if hasattr(model, "dit") else ():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


# -----------------------------------------------------------------------------------------------------------
# devices


class RaiseOnRead(TorchDispatchMode):
    """Raises where a value is read, as FakeTensorMode does."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise DataDependentOutputException(operation)
        return operation(*args, **(kwargs or {}))


class Host(TorchDispatchMode):
    """Beside fake tensors on a GPU: computes with ordinary tensors as a CPU does, and lists the operations
    between the two."""

    def __init__(self):
        super().__init__()
        self.transfers = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not to_gpu and not any(isinstance(x, FakeTensor) for x in inputs):
            with _disable_current_modes():
                return operation(*args, **kwargs)
        out = operation(*args, **kwargs)
        before = {x.device.type for x in inputs}
        after = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if len(before | after) > 1:
            waits = "without waiting" if kwargs.get("non_blocking") else "waits"
            self.transfers.append(f"{'+'.join(sorted(before))} to {'+'.join(after)}, {waits}")
        return out


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def models(parts, request, monkeypatch):
    """Of every name a model and its EMA, on a device where reading a value raises; the device; and what
    train_t2i.py prepares on the CPU: a chat."""
    device = GPU if request.param == "cuda" else torch.device("cpu")
    models = {name: [build(name, parts).to(device) for _ in range(2)] for name in NAMES}
    models |= {"device": device, "inputs": prepare(models["text"][0])}
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        yield models
        torch.cuda.set_sync_debug_mode("default")
        return

    def read(*_) -> None:
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)

    def positions_of_host_mask(*args) -> torch.Tensor:
        with _disable_current_modes():
            return positions(*args)

    grid, positions = rae.time_grid(3, 1.0), rae.TextToImage.positions
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(torch.Tensor, "numpy", read)
    monkeypatch.setattr(rae, "time_grid", lambda *_: grid)  # it reads, but only what is on the CPU
    monkeypatch.setattr(rae.TextToImage, "positions", positions_of_host_mask)  # likewise
    with RaiseOnRead():
        yield models


@pytest.fixture
def on_gpu(parts, monkeypatch):
    """The models and the decoder's losses on a GPU that need not be there, with its autocast."""
    models, half = {name: build(name, parts) for name in NAMES}, torch.full((3,), 0.5)
    backbone = train_decoder.Backbone(models["autoencoder"].encoder, 32, half, half)
    models["perceptual"] = train_decoder.Perceptual("encoder", backbone)
    models["discriminator"] = train_decoder.Discriminator(backbone)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # it needs a GPU, as do the next two
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1, device=GPU)[:, None]
        except RuntimeError:
            pytest.skip("this version of torch has fake CUDA tensors only where there is a GPU")
        for module in [part for model in (*models.values(), backbone) for part in model.modules()]:
            for name, p in module.named_parameters(recurse=False):
                fake = torch.nn.Parameter(torch.empty_like(p.data, device=GPU), p.requires_grad)
                setattr(module, name, fake)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=GPU))
        with torch.autocast("cuda", BF16):
            yield models


# -----------------------------------------------------------------------------------------------------------
# steps


def train_step(models: dict, name: str, loss_of: Callable[[torch.nn.Module], torch.Tensor]) -> None:
    """A step without log line and checkpoint."""
    model, ema = models[name]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = common.Optimizers(torch.optim.AdamW(trainable, 1e-3, fused=True))
    loss = loss_of(model)
    loss.backward(common.one_or_nan(loss))
    grad_norm = optimizers.step()
    common.update_ema(ema, model, 0.999, 200)
    assert grad_norm.shape == () and all(p.grad is None for p in trainable)
    waits = RuntimeError if loss.is_cuda else DataDependentOutputException
    for read in (optimizers.check_skipped, loss.item):  # what a log line does, and a step must not
        with pytest.raises(waits):
            read()


def text_loss(model: rae.TextToImage, autoencoder: rae.RAE, inputs, noise, u_time, u_drop) -> torch.Tensor:
    """As in train_t2i.py. Two of the three images are to be generated, with two draws each."""
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    images = images.pin_memory() if model.device.type == "cuda" else images  # as the loader does
    batch = {"image": images, "image_index": [0, 1, 2]}
    dist_ctx = common.DistContext(model.device, 0, 1, BF16)
    latents, readable = train_t2i.encode(train_t2i.Config(), model, autoencoder, None, batch, dist_ctx)
    latents = latents[inputs.answers].repeat(2, 1, 1)
    t = rae.to_device(rae.sample_time(u_time, model.alpha), model.device)
    dropped = rae.to_device(u_drop < 0.1, model.device)
    x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
    with dist_ctx.autocast():
        velocity, _, text_loss = model(inputs.condition, x_t, t, dropped, readable[inputs.contexts])
    return text_loss / inputs.tokens + 2 * (velocity - (noise - latents)).square().mean()


def test_a_text_to_image_step_waits_for_nothing(models):
    draws = data.flow_draws((16, 24), 0, [0, 2], models["device"], draws=2)
    autoencoder, inputs = models["autoencoder"][0], models["inputs"]
    train_step(models, "text", lambda model: text_loss(model, autoencoder, inputs, *draws))


def test_a_step_with_classes_waits_for_nothing(models):
    with models["device"]:
        labels, t, dropped = torch.arange(1, 3), torch.rand(2), torch.rand(2) < 0.1
        x_t = torch.randn(2, 16, 24)
    train_step(models, "classes", lambda model: model(labels, x_t, t, dropped)[0].square().mean())


def test_a_decoder_step_waits_for_nothing(models):
    images = torch.rand(2, 3, 32, 32, device=models["device"])
    train_step(models, "autoencoder", lambda model: F.l1_loss(model.decode(model.encode(images)), images))


def test_sampling_waits_for_nothing(models):
    with models["device"]:
        condition, noise = torch.randn(2, 16, 20), torch.randn(2, 16, 24)
    model = models["text"][0].eval()
    latents = model.generate(condition, 3, 3.0, noise=noise, solver="heun")
    assert models["autoencoder"][0].decode(latents).shape == (2, 3, 32, 32)


def test_a_step_on_a_gpu_takes_its_batch_there_and_waits_for_nothing(on_gpu):
    """The forward pass."""
    noise, draws, model = torch.empty(4, 16, 24, device=GPU), torch.rand(2, 4, device="cpu"), on_gpu["text"]
    with Host() as host:
        loss = text_loss(model, on_gpu["autoencoder"], prepare(model), noise, *draws)
    assert loss.device == GPU
    # answers, contexts, images, t, dropout; of the chat its ids, targets and four times positions
    assert host.transfers == 11 * ["cpu to cuda, without waiting"]
    assert model.dit.blocks[0].mlp(torch.empty(1, 1, 32, device=GPU)).dtype == BF16


def test_the_decoders_losses_stay_on_a_gpu(on_gpu):
    images, draws = torch.empty(2, 3, 32, 32, device=GPU), torch.rand(7, 2, device="cpu")
    with Host() as host:
        fake = on_gpu["autoencoder"].decode(on_gpu["autoencoder"].encode(images))
        originals, maps = (on_gpu["perceptual"].features(2 * x - 1) for x in (images, fake))
        distances = on_gpu["perceptual"].distance(originals, maps)
        distances = distances + train_decoder.gram_distance(originals, maps)
        logits = on_gpu["discriminator"](train_decoder.augment(2 * fake - 1, draws, cutout=0.2))
    assert distances.device == logits.device == GPU
    assert host.transfers == ["cpu to cuda, without waiting"]  # the draws


@pytest.mark.parametrize("name", ["text", "classes"])
def test_sampling_on_a_gpu_takes_the_noise_there_and_waits_for_nothing(on_gpu, name):
    """So that the DiT's evaluations can be CUDA graphs, which --compile makes of them."""
    model, noise = on_gpu[name].eval(), torch.empty(2, 16, 24, device="cpu")
    inputs = torch.empty(2, 16, 20, device=GPU) if name == "text" else [1, 2]
    with Host() as host, torch.no_grad():
        latents = model.generate(inputs, 3, 2.0, noise=noise, solver="heun")
        images = on_gpu["autoencoder"].decode(latents)
    assert images.device == GPU
    assert host.transfers == ["cpu to cuda, without waiting"] * (1 if name == "text" else 2)  # the labels


# -----------------------------------------------------------------------------------------------------------
# with a GPU


@needs_cuda
def test_a_gpu_and_a_cpu_agree(parts):
    """In bf16, too, as closely as bf16 allows."""
    model = randomise(build("text", parts)).eval()
    noise, prompts = torch.randn(2, 16, 24), ["a star", "a ring"]
    on_cpu = model.generate(prompts, 5, 2.0, noise=noise)
    model.to(GPU)
    torch.testing.assert_close(
        model.generate(prompts, 5, 2.0, noise=noise).cpu(), on_cpu, rtol=1e-3, atol=1e-3
    )
    with torch.autocast("cuda", torch.bfloat16):
        difference = model.generate(prompts, 5, 2.0, noise=noise).cpu() - on_cpu
    assert difference.norm() < 0.05 * on_cpu.norm()


# -----------------------------------------------------------------------------------------------------------
# compiled blocks, and linear layers in the compute dtype


def compile_counting(calls: list, **options) -> Callable:
    """A torch.compile without a C++ compiler's seconds, which notes each call of a compiled graph."""

    def backend(graph: torch.fx.GraphModule, _) -> Callable:
        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    compile_ = torch.compile
    return lambda forward, **_: compile_(forward, backend=backend, **options)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_compile_without_a_break(name, parts, monkeypatch):
    """`fullgraph` raises at what cannot be compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = randomise(build(name, parts))
    x_t, images = torch.randn(2, 16, 24), torch.rand(2, 3, 32, 32)
    t, dropped = torch.rand(2), torch.tensor([False, True])
    run = {
        "text": lambda: model(model.chat([PROMPT, PROMPT]), x_t, t, dropped),
        "classes": lambda: model(torch.tensor([1, 2]), x_t, t, dropped),
        "autoencoder": lambda: model.decode(model.encode(images)),
    }[name]
    is_rae = name == "autoencoder"
    blocks = [*model.decoder.decoder_layers, *model.encoder.blocks] if is_rae else model.blocks
    eager, calls = run(), []
    monkeypatch.setattr(torch, "compile", compile_counting(calls, fullgraph=True))
    common.compile_blocks(blocks, True, common.DistContext(torch.device("cpu"), 0, 1, torch.float32))
    torch.testing.assert_close(run(), eager)
    assert len(calls) == len(blocks)


@needs_cuda
def test_compiled_and_eager_agree_in_bf16(parts):
    """On a CPU the compiler takes 25 s; docs/speed.md has what that showed."""
    torch.manual_seed(0)
    dit = TINY_DIT | {"head": (48, 1, 2), "condition_width": 20}
    model = randomise(rae.TextToImage(str(parts / "language-model"), dit, (16, 24))).dit.cuda()
    x, t, condition = (torch.randn(4, 16, 24), torch.rand(4), torch.randn(4, 16, 20))
    inputs = [tensor.cuda() for tensor in (x, t, condition)]
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cuda", torch.bfloat16):
            eager = model(*inputs).float()
            common.compile_blocks(model.blocks, True, common.DistContext(GPU, 0, 1, torch.bfloat16))
            compiled = model(*inputs).float()
    for result in (eager, compiled):
        assert (result - exact).norm() < 0.02 * exact.norm()
    assert (compiled - eager).norm() < 0.01 * exact.norm()


def test_compiled_sampling_draws_the_same(parts, tmp_path, monkeypatch):
    model, calls, latents = randomise(build("text", parts)), [], []
    model.autoencoder_path = str(parts / "rae")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch, "compile", compile_counting(calls))
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        argv = [
            "sample.py",
            "a red circle",
            "--model",
            tmp_path / "model",
            "--n",
            2,
            "--steps",
            2,
            "--latents",
        ]
        monkeypatch.setattr("sys.argv", [*map(str, argv), "--out", str(tmp_path / name), *flags])
        assert not calls
        sample.main()
        latents.append(load_file(tmp_path / name / "a-red-circle-1.safetensors")["latents"])
    assert calls
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)


def test_linear_layers_in_the_compute_dtype_change_nothing(parts):
    model = randomise(rae.TextToImage.from_pretrained(parts / "t2i").eval())
    dist_ctx = common.DistContext(torch.device("cpu"), 0, 1, BF16)

    def draw() -> torch.Tensor:
        with torch.no_grad(), dist_ctx.autocast():
            latents = model.generate(["a star"], 3, 2.0, generator=torch.Generator().manual_seed(0))
            return model.autoencoder.decode(latents)

    before, size = draw(), sum(p.nbytes for p in model.dit.parameters())
    common.cast_linear([*model.dit.blocks, *model.autoencoder.decoder.decoder_layers], dist_ctx)
    assert torch.equal(draw(), before)
    assert sum(p.nbytes for p in model.dit.parameters()) < 0.7 * size
