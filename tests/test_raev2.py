"""RAEv2 against numbers of the authors' own code, with weights made by a formula.

golden_raev2.json holds, for each case, the authors' settings, the official names and shapes of the weights,
and statistics of the outputs. Cases A to C: networks; D and E: losses and the sampler; F and G: latents;
H: the optimizer; I: sizes. `test_golden.py` explains the error.
"""

import json
import math
import shutil
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from harness import TINY_DIT, TINY_IN_CONTEXT
from safetensors.torch import load_file
from test_golden import check, expand, pack, unpack

import common
import convert
import rae
import train_t2i

GOLDEN = json.loads((Path(__file__).parent / "golden_raev2.json").read_text())
DIT_CASES = ["A1", "A2", "A3", "B1", "C1", "C2"]


def sine(count, a, b, chirp):
    j = torch.arange(count, dtype=torch.float64)
    return torch.sin(a * j + b + chirp * (j % 997) ** 2)


def ramp(*shape, a, b, scale=1.0, offset=0.0, chirp=0.007):
    return (scale * sine(math.prod(shape), a, b, chirp) + offset).float().view(shape)


@cache
def formula(keys, amplitude):
    """Weights by official name: a sine whose phase is the rank of the name."""
    shapes = dict(pair for key in GOLDEN["keys"][keys] for pair in expand(key))
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        plus_one = ("norm" in name and name.endswith("weight")) or name.endswith("lambda1")
        w = amplitude * sine(math.prod(shapes[name]), 0.37, 1.3 * i, 0.011) + plus_one
        weights[name] = w.float().view(shapes[name])
    return weights


def official(case, part="weights"):
    spec = GOLDEN[case][part]
    weights = formula(spec["keys"], spec["amplitude"])
    assert sum(w.double().abs().sum() for w in weights.values()) == pytest.approx(spec["sum_abs"], rel=1e-7)
    return dict(weights)


def check_all(output, expected, tolerance):
    """The statistics of test_golden.py, and the probe, which every element and permutation moves."""
    check(output, expected, tolerance)
    flat = output.detach().double().flatten()
    j = torch.arange(len(flat), dtype=torch.float64)
    error = ((flat * torch.sin(0.7 * j + 0.3)).sum() - expected["probe"]).abs()
    assert error / (1 + flat.abs().sum()) <= tolerance


# -- networks


def rope_tables(config, rows, heads, widths):
    """The authors' tables: latent tokens first, then rows that are not rotated."""
    tables, names = {}, ["enc_rope", "dec_rope"] if len(widths) == 2 else ["rope"]
    tokens = (config["input_size"] // torch.tensor(config["patch_size"]).flatten()[0].item()) ** 2
    for name, width, head, extra in zip(names, widths, heads, (rows, 0), strict=False):
        cos, sin = rae.rope_table(tokens, width // head)
        tables[f"{name}.freqs_cos"] = F.pad(cos, (0, 0, 0, extra), value=1.0)
        tables[f"{name}.freqs_sin"] = F.pad(sin, (0, 0, 0, extra))
    return tables


def official_dit(case):
    """The whole official state dict of a case."""
    config, weights = GOLDEN[case]["config"], official(case)
    weights["t_embedder.W"] = ramp(256, a=0.37, b=0.9, scale=1.5, chirp=0.0)
    widths, heads = (torch.tensor(config[key]).flatten().tolist() for key in ("hidden_size", "num_heads"))
    return weights | rope_tables(config, config["num_t_tokens"] + config["num_c_tokens"], heads, widths)


def in_context(case):
    """The DiT of a case, and its patch size."""
    config, weights = GOLDEN[case]["config"], official_dit(case)
    dit = rae.from_official(weights, base_depth=config.get("base_model_depth", 8))
    return dit, torch.tensor(config["patch_size"]).flatten()[0].item()


T = {
    "A1": [0.3, 0.8],
    "A2": [0.05, 0.95],
    "A3": [0.5, 0.9],
    "B1": [0.3, 0.8],
    "C1": [0.3, 0.8],
    "C2": [0.1, 0.6],
}
LABELS = {"A1": [3, 7], "A2": [4, 0], "A3": [5, 2], "C1": [3, 7]}
MASKS = {"B1": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], "C2": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]}


def condition(case):
    if case in LABELS:
        return torch.tensor(LABELS[case])
    mask = torch.tensor(MASKS[case]).bool()
    return rae.Caption(ramp(2, mask.shape[1], 20, a=0.47, b=0.8, scale=2.0), mask)


def test_a_missing_rope_table_is_named():
    weights, table = official_dit("C2"), "rope.freqs_sin"
    weights.pop(table)
    with pytest.raises(ValueError, match=table):
        rae.from_official(weights)


@pytest.mark.parametrize("case", DIT_CASES)
@torch.no_grad()
def test_in_context_dit(case):
    dit, patch = in_context(case)
    config, expected = GOLDEN[case]["config"], GOLDEN[case]["outputs"]
    x = pack(ramp(2, config["in_channels"], config["input_size"], config["input_size"], a=0.61, b=0.2), patch)
    t, y = torch.tensor(T[case]), condition(case)
    tap = []
    if "z_pred" in expected:
        block = dit.blocks[config["repa_layer_depth"] - 1]
        block.register_forward_hook(lambda module, args, out: tap.append(out[:, : x.shape[1]]))
    results = {"full": dit(x, t, y), "null": dit(x, t)}
    if case in MASKS:
        # hidden by the mask, as the authors do it
        dropped = dit.drop_condition(y, torch.ones(2).bool())
        assert torch.allclose(dit(x, t, dropped)[0], results["null"][0], atol=1e-5)
        if "full_nomask" in expected:
            results["full_nomask"] = dit(x, t, rae.Caption(y.tokens, torch.ones_like(y.mask)))
    for name, (out, base) in results.items():
        check_all(unpack(out, patch), expected[name], 5e-6)
        assert (base is None) == (f"{name}_base" not in expected)
        if base is not None:
            check_all(unpack(base, patch), expected[f"{name}_base"], 5e-6)
    if tap:  # the projector of a REPA loss, which the model leaves out
        weights = official(case)
        projected = F.linear(tap[0], weights["repa_projector.weight"], weights["repa_projector.bias"])
        check_all(projected, expected["z_pred"], 5e-6)


@torch.no_grad()
def test_text_encoder(tmp_path, monkeypatch):
    """Hidden states after the final norm; padding on the right changes nothing."""
    config = dict(GOLDEN["B2"]["config"])
    theta = config.pop("rope_theta")
    config = transformers.Qwen3Config(**config, rope_parameters={"rope_type": "default", "rope_theta": theta})
    model = transformers.Qwen3ForCausalLM(config)
    weights = {f"model.{name}": w for name, w in official("B2").items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 17, 8, 29, 5, 0, 0, 0], [11, 2, 0, 0, 0, 0, 0, 0]])
    mask = (torch.arange(8) < torch.tensor([[5], [2]])).long()

    class Tokenizer:
        def __call__(self, prompts, **options):
            return {"input_ids": ids, "attention_mask": mask}

    dit = {"width": 32, "depth": 1, "heads": 2, "condition_width": 32, "time_tokens": 1}
    captions = rae.CaptionToImage(str(tmp_path), dit, (16, 24))
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    monkeypatch.setattr(rae, "open_text_encoder", lambda path, device: (Tokenizer(), encoder.eval()))
    caption = captions.condition(["a", "b"], truncate=True)
    assert torch.equal(caption.mask, mask.bool())
    check_all(caption.tokens, GOLDEN["B2"]["outputs"]["tokens"], 5e-6)


# -- losses


def test_training_timesteps():
    normal = torch.tensor([-2.5, -1.0, -0.1, 0.0, 0.7, 2.0, 8.0])
    for alpha, expected in GOLDEN["D0"].items():
        expected = torch.tensor(expected)
        assert torch.allclose(rae.shift_time(normal.sigmoid(), float(alpha)), expected, atol=2e-6)
        # `sample_time` cuts at 0.999, which no draw that differs from 1 in fp32 reaches
        u = torch.special.ndtr(normal[:-1])
        assert torch.allclose(rae.sample_time(u, float(alpha)), expected[:-1], atol=2e-6)


def losses(case, dropped, base_weight):
    """Per sample: the loss of both heads, and that of the base head; by the trainer's own function."""
    dit, _ = in_context({"D1": "A1", "D2": "B1", "D3": "A1"}[case])
    prediction = "velocity" if case == "D3" else "x"
    latents, noise = pack(ramp(3, 24, 4, 4, a=0.23, b=1.1)), pack(ramp(3, 24, 4, 4, a=0.61, b=0.2))
    t = torch.tensor([0.02, 0.3, 0.9])
    if case == "D2":
        mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]).bool()
        y = rae.Caption(ramp(3, 6, 20, a=0.47, b=0.8, scale=2.0), mask)
    else:
        y = torch.tensor([3, 7, 1])
    model = rae.ClassToImage({"width": 8, "depth": 1, "heads": 1}, (16, 24), prediction=prediction)
    model.dit = dit
    y = dit.drop_condition(y, torch.tensor(dropped))
    x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
    velocity, base = model.velocities(x_t, t, y)
    target = rae.to_velocity(x_t, latents, t)
    errors = [(v - target).square().mean(dim=(1, 2)) for v in (velocity, base)]
    return dit, errors[0] + base_weight * errors[1], errors[1]


def official_gradient(dit, name):
    """The gradient of a parameter by its official name."""
    ours = convert.in_context_key(name)
    for part, (fused, index, count) in {
        "attn.q.": ("attn.qkv.", 0, 3),
        "mlp.w2.": ("mlp.w12.", 1, 2),
        "mlp.w3.": ("mlp.w3.", 0, 1),
    }.items():
        if part in ours:
            return dit.get_parameter(ours.replace(part, fused)).grad.chunk(count)[index]
    return dit.get_parameter(ours).grad


@pytest.mark.parametrize(
    "case, dropped, base_weight",
    [("D1", [False] * 3, 1.0), ("D2", [True, False, False], 0.25), ("D3", [False] * 3, 1.0)],
)
def test_loss_and_gradients(case, dropped, base_weight):
    expected = GOLDEN[case]
    dit, per_sample, base = losses(case, dropped, base_weight)
    per_sample.mean().backward()
    assert per_sample.mean().item() == pytest.approx(expected["loss"], rel=2e-5)
    assert per_sample.tolist() == pytest.approx(expected["per_sample"], rel=2e-5)
    assert base.tolist() == pytest.approx(expected["base_per_sample"], rel=2e-5)
    for name, norm in expected["grad_norm"].items():
        assert official_gradient(dit, name).norm().item() == pytest.approx(norm, rel=1e-4), name
    total = math.sqrt(sum(p.grad.double().square().sum() for p in dit.parameters() if p.requires_grad))
    assert total == pytest.approx(expected["grad_norm_total"], rel=1e-4)
    check_all(dit.time_tokens.grad, expected["outputs"]["grad_full:t_embedder.learnable_tokens"], 1e-4)


# -- sampler


@pytest.mark.parametrize("case", ["E1", "E2"])
@torch.no_grad()
def test_sampler_and_guidance(case):
    dit, _ = in_context(case)
    y = condition({"E1": "A1", "E2": "B1"}[case])
    noise = pack(ramp(2, 24, 4, 4, a=0.53, b=0.7, scale=1.3))
    model = rae.ClassToImage({"width": 8, "depth": 1, "heads": 1}, (16, 24))
    model.dit = dit
    for name, settings in GOLDEN[case]["settings"].items():
        model.prediction = settings.get("prediction", "x")
        cfg, ig = settings.get("cfg", {"scale": 1.0}), settings.get("ig", {"scale": 1.0})
        scales = [ig["scale"], ig.get("unconditional_scale", ig["scale"])]
        if name == "off":  # the authors' way to say it
            scales = [1.0, 1.0]
        parts = []
        for part, scale in zip((y, None), scales, strict=True):
            interval = (ig.get("t_min", 0.0), ig.get("t_max", 1.0))
            parts.append(rae.internally_guided(partial(model.velocities, condition=part), scale, interval))
        velocity = rae.guided(*parts, cfg["scale"], (cfg.get("t_min", 0.0), cfg.get("t_max", 1.0)))
        times = []

        def recorded(x, t, velocity=velocity, times=times):
            times.append(t[0].item())
            return velocity(x, t)

        latents = rae.sample(recorded, noise, settings["steps"], settings["alpha"])
        assert times == pytest.approx(settings["times"], abs=2e-6), name
        check_all(unpack(latents), GOLDEN[case]["outputs"][name], 2e-5)


# -- latents


FAMILIES = {"F1": "dinov3_vit", "F2": "siglip_vision_model", "F3": "dinov3_vit", "F4": "siglip_vision_model"}
LAYERS = {
    "k1": None,
    "mls_with_last": [1, 3, 4],
    "mls_without_last": [0, 2, 3],
    "mls_last_only": [4],
    "mls": [0, 1, 2],
}
DECODER = {"patch_size": 8, "width": 32, "depth": 1, "heads": 2, "mlp_width": 48}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = partial(ramp, 2, 3, 64, 64, a=0.031, b=0.4, scale=0.5, offset=0.5, chirp=0.0009)


def load_encoder(encoder, weights):
    """Official weights under the names of this version of `transformers`."""
    names = list(encoder.model.state_dict())
    prefix = "model." if any(name.startswith("model.layer.") for name in names) else ""
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else prefix
    renamed = {}
    for name, w in weights.items():
        is_layer = name.startswith("layer.") or prefix == "vision_model."
        renamed[prefix + name if is_layer else name] = w
    has_norm = any(name.endswith("norm.weight") and "layers" not in name for name in names)
    if not any(name in names for name in ("norm.weight", "post_layernorm.weight")) and not has_norm:
        renamed = {name: w for name, w in renamed.items() if name not in ("norm.weight", "norm.bias")}
    encoder.model.load_state_dict({name: w for name, w in renamed.items() if name in names}, strict=True)


@pytest.mark.parametrize("case", ["F1", "F2", "F3", "F4"])
@torch.no_grad()
def test_latents_of_layers(case):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for name, expected in GOLDEN[case]["outputs"].items():
        config = {"model_type": FAMILIES[case]} | GOLDEN[case]["config"]
        # RAEv2 keeps SigLIP-2's learned norm, also for one layer
        encoder = rae.Encoder(config, layers=LAYERS[name], affine="siglip" in FAMILIES[case])
        load_encoder(encoder, official(case))
        check_all(encoder((IMAGE() - mean) / std), expected, 5e-6)


@torch.no_grad()
def test_autoencoder_without_pixel_statistics():
    expected, config = GOLDEN["G1"]["outputs"], {"model_type": "dinov3_vit"} | GOLDEN["G1"]["config"]
    stats = {
        "mean": ramp(64, 4, 4, a=0.31, b=0.5, scale=0.4, offset=0.1),
        "var": ramp(64, 4, 4, a=0.17, b=0.9, scale=0.299, offset=0.3),
    }
    decoder = official("G1", "decoder")
    tokens, width = 16, 48
    decoder["decoder_pos_embed"] = F.pad(rae.sincos_table(tokens, width), (0, 0, 1, 0))[None]
    options = {"image_mean": MEAN, "image_std": STD, "stats": stats, "layers": [1, 3, 4], "heads": 3}
    model = convert.build_rae(decoder, config, **options)
    convert.load_official(model.decoder, decoder)
    load_encoder(model.encoder, official("G1", "encoder"))
    latents = model.encode(IMAGE())
    check_all(unpack(latents), expected["latent"], 5e-6)
    check_all(model.decode(latents), expected["recon"], 5e-6)
    check_all(model.decode(pack(ramp(2, 64, 4, 4, a=0.43, b=0.6, scale=0.8))), expected["decode_of_z"], 5e-6)
    other = ramp(2, 3, 80, 80, a=0.047, b=0.1, scale=0.5, offset=0.5, chirp=0.0011)
    check_all(unpack(model.encode(other)), expected["latent_of_resized"], 5e-6)


# -- optimizer


def test_muon():
    for name, spec in GOLDEN["H1"]["matrices"].items():

        def made(numbers, shape=spec["shape"]):
            return ramp(*shape, **dict(zip(("a", "b", "scale", "offset", "chirp"), numbers, strict=True)))

        w = torch.nn.Parameter(made(spec["weight"]))
        before, optimizer = w.detach().clone(), common.Muon([w], spec["lr"], weight_decay=spec.get("wd", 0.0))
        for step, gradient in enumerate(spec["grads"], start=1):
            w.grad = made(gradient)
            optimizer.step()
            expected = GOLDEN["H1"]["outputs"][f"{name}.after{step}"]
            delta = (w.detach() - before).double().flatten()
            # the update is small beside the rounding of the weights: relative to the update itself
            j = torch.arange(len(delta), dtype=torch.float64)
            probe = (delta * torch.sin(0.7 * j + 0.3)).sum().item()
            assert delta.std().item() == pytest.approx(expected["std"], rel=1e-4)
            assert probe == pytest.approx(expected["probe"], abs=1e-4 * expected["sum_abs"])
            assert delta[:5].tolist() == pytest.approx(expected["first5"], abs=1e-4 * expected["std"] * 5)


def test_schedules():
    for name, spec in GOLDEN["H2"].items():
        start, end = (
            int(spec[key] * spec["steps_per_epoch"]) for key in ("warmup_epochs", "decay_end_epoch")
        )
        floor = spec["final_lr"] / spec["base_lr"]
        for step, expected in spec["points"].items():
            if name == "decoder":
                factor = common.cosine(min(int(step), end), end, start, floor)
            else:
                factor = common.linear(int(step), start, end, floor)
            assert spec["base_lr"] * factor == pytest.approx(expected, rel=1e-7), (name, step)


def test_three_optimizer_steps():
    """Clipping, Muon beside AdamW, schedule and EMA, with the trainer's own optimizers."""
    expected = GOLDEN["H3"]["exact"]
    dit, _ = in_context("H3")
    model = rae.ClassToImage({"width": 8, "depth": 1, "heads": 1}, (16, 24), prediction="x")
    model.dit = dit
    ema = rae.ClassToImage({"width": 8, "depth": 1, "heads": 1}, (16, 24), prediction="x")
    ema.dit = in_context("H3")[0]
    config = train_t2i.Config(dit_lr=0.004, muon=0.004, final_lr=0.1, decay_start=1, decay_end=3, steps=3)
    optimizers = train_t2i.make_optimizers(config, model)
    latents, noise = pack(ramp(3, 24, 4, 4, a=0.23, b=1.1)), pack(ramp(3, 24, 4, 4, a=0.61, b=0.2))
    t = torch.tensor([0.2, 0.5, 0.9])
    x_t = (1 - t[:, None, None]) * latents + t[:, None, None] * noise

    def loss(model):
        velocity, base, _ = model(torch.tensor([3, 7, 1]), x_t, t, torch.zeros(3).bool())
        target = rae.to_velocity(x_t, latents, t)
        return sum((v - target).square().mean(dim=(1, 2)) for v in (velocity, base)).mean()

    # Muon's matrices by official name: the fused ones are three or two of these
    muon = {p for group in optimizers.optimizers[1].param_groups for p in group["params"]}
    names = {name for name, p in dit.named_parameters() if p in muon}
    official_names = {convert.in_context_key(name) for name in GOLDEN["H3"]["muon"]}
    fused = {"attn.q.": "attn.qkv.", "attn.k.": "", "attn.v.": "", "mlp.w1.": "mlp.w12.", "mlp.w2.": ""}
    for part, whole in fused.items():
        for name in [name for name in official_names if part in name]:
            official_names.remove(name)
            official_names |= {name.replace(part, whole)} if whole else set()
    of_first = {name for name in names if not name.startswith("blocks.") or name.startswith("blocks.0.")}
    of_head = {name for name in names if "adaLN" in name}
    assert of_first | of_head == official_names

    start = {name: w for name, w in official("H3").items()}
    start["t_embedder.W"] = ramp(256, a=0.37, b=0.9, scale=1.5, chirp=0.0)
    for step in range(3):
        optimizers.set_lr(train_t2i.learning_rate(config, step))
        value = loss(model)
        value.backward()
        assert value.item() == pytest.approx(expected["losses"][step], rel=1e-4)
        assert optimizers.step().item() == pytest.approx(expected["grad_norm"][step], rel=1e-4)
        common.update_ema(ema, model, 0.9, step=10**9)  # without the warm-up of the decay
        for name, norm in expected[f"delta_norm{step + 1}"].items():
            now = official_weight(dit, name)
            assert (now - start[name].flatten(1) if now.ndim == 2 else now - start[name]).norm().item() == (
                pytest.approx(norm, rel=1e-4)
            ), name
    with torch.no_grad():
        assert loss(model).item() == pytest.approx(expected["after"], rel=1e-4)
        assert loss(ema).item() == pytest.approx(expected["ema"], rel=1e-4)


def official_weight(dit, name):
    """A weight under its official name, without SwiGLU's padding."""
    ours = convert.in_context_key(name)
    if "attn.q." in ours:
        return dit.get_parameter(ours.replace("attn.q.", "attn.qkv.")).detach().chunk(3)[0]
    weight = dit.get_parameter(ours).detach()
    if "mlp.w3.weight" in ours:
        return weight[:, : dit.get_submodule(ours.removesuffix(".w3.weight")).hidden]
    return weight


def test_sizes():
    expected = {"imagenet": [875216500, 871046688], "t2i": [875240564, 871068288]}
    for name, (parameters, in_matrices) in expected.items():
        assert GOLDEN["I1"][f"training/{name}-dinov3l-k7"][:2] == [parameters, in_matrices]
        text = {"condition_width": 1024, "condition_tokens": rae.CAPTION_TOKENS}
        more = {"num_classes": 1000} if name == "imagenet" else text
        with torch.device("meta"):
            dit = rae.build_dit((256, 1024), rae.DITS["raev2"] | more)
        padding, matrices = 0, 0
        for module in dit.modules():
            if isinstance(module, rae.SwiGLU):
                extra = module.w3.in_features - module.hidden
                padding += extra * (3 * module.w3.out_features + 2)
        count = sum(p.numel() for p in dit.parameters())
        assert count - padding == parameters
        matrices = sum(
            p.numel()
            for n, p in dit.named_parameters()
            if p.ndim == 2 and not n.startswith(("x_emb", "s_emb"))
        )
        heads = [m for m in dit.modules() if isinstance(m, rae.SwiGLU)]
        padding = sum((m.w3.in_features - m.hidden) * 3 * m.w3.out_features for m in heads)
        assert matrices - padding == in_matrices
    assert rae.default_alpha((256, 1024)) == 8


# -- training and sampling with the scripts


def train_flags(parts, condition, out):
    return [
        *("--condition", condition, "--dit", "nano-in-context", "--prediction", "x", "--out", out),
        *("--autoencoder", parts / "rae", "--language-model", parts / "language-model", "--batch", 4),
        *("--data", "nano:objects" if condition == "caption" else "nano:classes", "--workers", 0),
        *("--muon", 0.01, "--dit-lr", 0.01, "--warmup", 0, "--draws", 1),
        *("--steps", 3, "--save-every", 2, "--keep", 9, "--log-every", 1, "--eval-every", 3),
    ]


@pytest.mark.parametrize("condition", ["class", "caption"])
def test_processes_accumulation_and_resume_agree(condition, world, parts, tmp_path):
    variants = {
        "one": (1, []),
        "full": (2, ["--shard", "full"]),
        "micro": (1, ["--grad-accum", 2]),
    }
    runs = [
        world(size, "train_t2i.py", *train_flags(parts, condition, tmp_path / name), *more)
        for name, (size, more) in variants.items()
    ]
    [run.wait() for run in runs]
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in variants
    }
    for name in variants:
        assert list((tmp_path / name / "samples").glob("*.png"))
        for row, expected in zip(rows[name], rows["one"], strict=True):
            assert row.keys() == expected.keys()
            for key in {"loss", "grad_norm", "val_loss"} & row.keys():
                assert row[key] == pytest.approx(expected[key], rel=1e-4), (name, row["step"], key)
    assert len({row["loss"] for row in rows["one"][:3]}) == 3

    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/0000003")
    world(1, "train_t2i.py", "--resume", "--out", tmp_path / "resumed").wait()
    final, resumed = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "resumed"))
    assert final.keys() == resumed.keys() and all(torch.equal(final[key], resumed[key]) for key in final)

    flags = ["--resume", "--prediction", "velocity", "--out", tmp_path / "resumed"]
    assert "trained with --prediction x, not velocity" in world(1, "train_t2i.py", *flags).wait(1)

    prompt = ["a red star"] if condition == "caption" else ["--classes", "3"]
    flags = ["--n", 1, "--steps", 2, "--guidance", 2, "--internal-guidance", 1.5, "--interval", "0.2,1"]
    world(
        1, "sample.py", *prompt, *flags, "--model", tmp_path / "one/model", "--out", tmp_path / "images"
    ).wait()
    assert len(list((tmp_path / "images").glob("*.png"))) == 2  # the image and its grid


def test_wrong_input(parts, tmp_path, world):
    config = {"model_type": "dinov3_vit"} | GOLDEN["F1"]["config"]
    for layers in ([5], [2, 1], [-1], []):
        with pytest.raises(ValueError, match="increasing numbers from 0 to 4"):
            rae.Encoder(config, layers=layers)
    with pytest.raises(ValueError, match="unknown prediction"):
        rae.ClassToImage(TINY_DIT, (16, 24), prediction="noise")
    with pytest.raises(ValueError, match="base_depth 3"):
        rae.InContextDiT((16, 24), **TINY_DIT | TINY_IN_CONTEXT | {"base_depth": 3})
    dit = TINY_DIT | TINY_IN_CONTEXT | {"num_classes": 10, "base_depth": None}
    with pytest.raises(ValueError, match="needs a model with a base head"):
        rae.ClassToImage(dit, (16, 24)).generate([1], internal_guidance=1.5)
    dit = TINY_DIT | TINY_IN_CONTEXT | {"condition_width": 20}
    long = rae.Caption(torch.zeros(1, 4, 20), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="4 tokens, this DiT takes up to 3"):
        rae.build_dit((16, 24), dit)(torch.zeros(1, 16, 24), torch.ones(1), long)
    model = rae.CaptionToImage(str(parts / "language-model"), dit, (16, 24), str(parts / "rae"))
    with pytest.raises(ValueError, match="has width 32, the DiT takes 20"):
        model.condition(["a"])
    model = rae.CaptionToImage(str(parts / "language-model"), dit | {"condition_width": 32}, (16, 24))
    with pytest.raises(ValueError, match="limit is 3: shorten it"):
        model.generate(["a red star beside a blue circle"])
    assert model.condition(["a red star beside a blue circle"], truncate=True).tokens.shape == (1, 3, 32)
    velocity = rae.ClassToImage(
        TINY_DIT | TINY_IN_CONTEXT | {"num_classes": 48}, (16, 24), str(parts / "rae")
    )
    velocity.save_pretrained(tmp_path / "velocity")
    flags = ["--condition", "class", "--init", tmp_path / "velocity", "--prediction", "x"]
    flags += ["--autoencoder", parts / "rae", "--data", "nano:classes", "--out", tmp_path / "run"]
    assert "prediction velocity, not x" in world(1, "train_t2i.py", *flags).wait(1)
