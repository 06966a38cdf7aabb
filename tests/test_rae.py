"""The models: published sizes, shapes, conditions, padding, the sampler, encoders, folders."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import common
import rae

LATENTS = (16, 24)


def tiny_dit(**kwargs) -> rae.DiT:
    torch.manual_seed(0)
    model = rae.DiT(LATENTS, width=32, depth=2, heads=2, **kwargs)
    for parameter in model.parameters():  # the zero initialisation would hide everything
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# --- DiT


@pytest.mark.parametrize(
    "name, count",
    [("0.5B", 0.481), ("2.4B", 2.436), ("3.1B", 3.082), ("5.5B", 5.475), ("9.8B", 9.729), ("0.5B-DH", 0.761),
     ("2.4B-DH", 2.712), ("3.1B-DH", 3.356)],
)  # fmt: skip
def test_scale_rae_sizes(name, count):
    size = rae.DITS[name]
    with torch.device("meta"):
        model = rae.DiT((256, 1152), condition_width=size["width"], **size)
    assert round(sum(unpadded_sizes(model)) / 1e9, 3) == count


@pytest.mark.parametrize(
    "name, count",
    [("DiT-XL", 677_248_384), ("DiT-DH-S", 196_455_764), ("DiT-DH-B", 294_295_892),
     ("DiT-DH-L", 621_744_436), ("DiT-DH-XL", 838_675_796)],
)  # fmt: skip
def test_rae_sizes(name, count):
    with torch.device("meta"):
        model = rae.DiT((256, 768), num_classes=1000, **rae.DITS[name])
    assert sum(unpadded_sizes(model)) == count


def unpadded_sizes(model: rae.DiT) -> list[int]:
    sizes = [p.numel() for p in model.parameters()]
    for mlp in [module for module in model.modules() if isinstance(module, rae.SwiGLU)]:
        padding = mlp.w3.in_features - mlp.hidden
        sizes.append(-padding * (2 * (mlp.w12.in_features + 1) + mlp.w3.out_features))
    return sizes


def test_the_padding_of_swiglu_stays_zero():
    """The padded layer computes what one of the published width does; in training too."""
    torch.manual_seed(0)
    layer, x = rae.SwiGLU(32), torch.randn(4, 32)
    assert (layer.hidden, layer.w12.out_features, layer.w3.in_features) == (85, 2 * 88, 88)

    def split(w12: torch.Tensor, bias: torch.Tensor, w3: torch.Tensor) -> tuple[list, list]:
        """The published part of each weight, and the padding."""
        w12, bias = w12.unflatten(0, (2, -1)), bias.unflatten(0, (2, -1))
        published = [w12[:, :85].flatten(0, 1), bias[:, :85].flatten(), w3[:, :85]]
        return published, [w12[:, 85:], bias[:, 85:], w3[:, 85:]]

    parameters = layer.w12.weight, layer.w12.bias, layer.w3.weight
    exact = {"w3.bias": layer.w3.bias.detach().clone()}
    exact |= zip(("w12.weight", "w12.bias", "w3.weight"), split(*parameters)[0], strict=True)
    gate, value = F.linear(x, exact["w12.weight"], exact["w12.bias"]).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * value, exact["w3.weight"], exact["w3.bias"])
    torch.testing.assert_close(layer(x), expected)
    other = rae.SwiGLU(32)
    other.load_state_dict(exact)
    assert all(torch.equal(*pair) for pair in zip(layer.parameters(), other.parameters(), strict=True))

    for muon in (False, True):
        biases, matrices = [layer.w12.bias, layer.w3.bias], [layer.w12.weight, layer.w3.weight]
        adamw = torch.optim.AdamW(biases if muon else layer.parameters(), 0.1, fused=True)
        more = [common.Muon(matrices, 0.1)] if muon else []
        optimizers = common.Optimizers(adamw, *more)
        for _ in range(3):
            before = layer.w12.weight.detach().clone()
            layer(x).square().mean().backward()
            for tensors in ([p.grad for p in parameters], parameters):
                trained, padding = split(*tensors)
                assert all(part.any() for part in trained) and not any(part.any() for part in padding)
            optimizers.step()
            assert not torch.equal(layer.w12.weight, before)
        assert not any(part.any() for part in split(*parameters)[1])


def test_initialisations_differ_as_published():
    dit = rae.DiT((16, 24), num_classes=3, **rae.DITS["DiT-S"] | {"depth": 1})
    wide = rae.DiT((16, 24), num_classes=3, **rae.DITS["DiT-DH-S"] | {"depth": 1, "head": (96, 1, 4)})
    for model, xavier in ((dit, True), (wide, False)):
        qkv = model.blocks[0].attn.qkv
        bound = math.sqrt(6 / (384 + 3 * 384)) if xavier else 1 / math.sqrt(384)
        assert qkv.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert (qkv.bias == 0).all() == xavier
        assert model.y_embedder.embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not model.final_layer.linear.weight.any()
        assert not model.blocks[-1].adaLN_modulation[1].weight.any()
    assert wide.readd_time and wide.silu_condition and not (dit.readd_time or dit.silu_condition)


def test_position_tables():
    rope = rae.rope_table(256, 72)
    assert rope[0, 17, [0, 2, 35, 37]].tolist() == pytest.approx(
        [0.540302, 0.825627, 1.0, 0.540302], abs=1e-6
    )
    token = 3 * 16 + 5  # row 3, column 5
    assert rope[1, token, [0, 2, 36, 38]].tolist() == pytest.approx(
        [0.14112, 0.974198, -0.958924, 0.143673], abs=1e-6
    )
    table = rae.sincos_table(256, 1152)[token, [0, 1, 288, 576, 864]]
    assert table.tolist() == pytest.approx([-0.958924, -0.991531, 0.283662, 0.14112, -0.989992], abs=1e-6)
    with pytest.raises(ValueError, match="square"):
        rae.rope_table(15, 8)


@pytest.mark.parametrize("head", [None, (48, 1, 2)])
@pytest.mark.parametrize("condition", ["class", "vectors", "none"])
def test_dit_shapes_and_zero_start(head, condition):
    given = {"class": {"num_classes": 5}, "vectors": {"condition_width": 20}, "none": {}}[condition]
    value = {"class": torch.tensor([1, 5]), "vectors": torch.randn(2, 16, 20), "none": None}[condition]
    x, t = torch.randn(2, *LATENTS), torch.tensor([0.2, 0.9])
    fresh = rae.DiT(LATENTS, 32, 2, 2, head=head, **given)
    assert fresh(x, t, value).abs().max() == 0  # adaLN-Zero: the velocity starts at zero
    assert tiny_dit(head=head, **given)(x, t, value).shape == (2, *LATENTS)


def test_small_scales_and_the_head_stay_fp32_under_autocast():
    x = torch.ones(1, 1, 8)
    small = torch.full((1, 1, 8), 0.003, dtype=torch.bfloat16)  # 1 + 0.003 is 1 in bf16
    assert rae.modulate(x, torch.zeros(1, 1, 8), small) == pytest.approx(1.003, abs=1e-5)
    model, streams = tiny_dit(head=(48, 1, 2)), []
    model.blocks[-1].register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 16, 24), torch.rand(2))
    assert streams == [torch.float32]


def test_null_conditions():
    x, t = torch.randn(3, *LATENTS), torch.tensor([0.2, 0.5, 0.9])
    labels = tiny_dit(num_classes=5)
    assert torch.equal(labels(x, t), labels(x, t, torch.full((3,), 5)))
    vectors, dropped = tiny_dit(condition_width=20), torch.tensor([True, False, True])
    condition = torch.randn(3, 16, 20)
    mixed = vectors(x, t, vectors.drop_condition(condition, dropped))
    torch.testing.assert_close(mixed[dropped], vectors(x, t)[dropped])
    torch.testing.assert_close(mixed[1], vectors(x, t, condition)[1])
    assert not torch.allclose(mixed[1], vectors(x, t)[1])


def test_wrong_conditions_raise():
    x, t = torch.randn(2, *LATENTS), torch.rand(2)
    with pytest.raises(ValueError, match="unconditional"):
        tiny_dit()(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="unconditional"):
        tiny_dit().drop_condition(None, torch.ones(2, dtype=torch.bool))
    with pytest.raises(IndexError):
        tiny_dit(num_classes=5)(x, t, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="not both"):
        tiny_dit(num_classes=5, condition_width=20)


# --- flow


def test_shift_and_training_times():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(rae.shift_time(t, 1.0), t)
    assert rae.shift_time(torch.tensor(0.5), math.sqrt(48)).item() == pytest.approx(0.8739, abs=1e-4)
    u = torch.linspace(1e-4, 1 - 1e-4, 4001)
    times = rae.sample_time(u, math.sqrt(48))
    assert times.mean().item() == pytest.approx(0.837, abs=2e-3)  # published for 256 px
    assert times.median().item() == pytest.approx(0.874, abs=2e-3)
    assert (times.diff() > 0).all() and times.max() < 1


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_a_timestep_shift_of_nothing_is_refused(alpha):
    with pytest.raises(ValueError, match="give a number above 0"):
        rae.ClassToImage({"width": 32, "depth": 1, "heads": 2}, (16, 24), "", alpha)


def test_time_grids():
    """The values of the papers' are in test_golden.py."""
    assert len(rae.time_grid(50, 2.0)) == 50
    paper = rae.time_grid(50, math.sqrt(48), "rae")
    assert len(paper) == 49 and paper[0][0] == 1
    assert sum(paper[-1]) == pytest.approx(0.006887, abs=1e-6)
    for steps, grid, message in ((1, "rae", "step"), (1, "scale-rae", "step"), (5, "other", "unknown grid")):
        with pytest.raises(ValueError, match=message):
            rae.time_grid(steps, 1.0, grid)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampler_integrates_a_straight_flow_exactly(solver):
    data, noise = torch.randn(3, *LATENTS), torch.randn(3, *LATENTS)
    out = rae.sample(lambda x, t: noise - data, noise, steps=7, alpha=3.0, solver=solver)
    torch.testing.assert_close(out, data, atol=1e-5, rtol=0)


def test_heun_is_second_order():
    exact = math.exp(-1)  # dx/dt = x from t = 1 to 0
    for solver, ratio in (("euler", 2), ("heun", 4)):
        results = [rae.sample(lambda x, t: x, torch.ones(1, 1, 1), n, 1.0, solver).item() for n in (10, 20)]
        assert (results[0] - exact) / (results[1] - exact) == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_both_solvers_end_at_the_clean_latents_that_are_predicted(solver):
    clean, noise = torch.randn(3, *LATENTS), torch.randn(3, *LATENTS)
    out = rae.sample(lambda x, t: rae.to_velocity(x, clean, t), noise, 20, alpha=8.0, solver=solver)
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)


# --- autoencoder


VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODERS = {
    "siglip_vision_model": {"image_size": 32, "patch_size": 8},
    "dinov2_with_registers": {"image_size": 42, "patch_size": 8, "num_register_tokens": 3, "mlp_ratio": 2},
    "dinov2": {"image_size": 42, "patch_size": 8, "mlp_ratio": 2},
    "vit_mae": {"image_size": 40, "patch_size": 8},
}
DECODER = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48}


def tiny_rae(family: str = "siglip_vision_model") -> rae.RAE:
    torch.manual_seed(0)
    config = {"model_type": family, **VISION, **ENCODERS[family]}
    return rae.RAE(
        config, DECODER, encoder_size=32, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    ).eval()


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_family_gives_one_normalised_token_per_patch_in_raster_order(family):
    model = tiny_rae(family)
    latents = model.encode(torch.rand(2, 3, 50, 40))
    assert latents.shape == (2, *model.latent_shape) == (2, 16, 24)
    assert model.decode(latents).shape == (2, 3, model.image_size, model.image_size) == (2, 3, 16, 16)
    assert latents.mean(dim=-1).abs().max() < 1e-5
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert not model.train().encoder.training
    image = torch.rand(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 8:16, 16:24] = 0  # patch of row 1, column 2
    difference = model.encode(changed) - model.encode(image)
    assert difference.square().sum(dim=-1).argmax().item() == 1 * 4 + 2


def test_latent_statistics_are_inverted_by_decode_and_saved(tmp_path):
    model, image = tiny_rae(), torch.rand(2, 3, 32, 32)
    raw, decoded = model.encode(image), model.decode(model.encode(image))
    model.latent_mean.normal_()
    model.latent_std.uniform_(0.5, 2)
    torch.testing.assert_close(model.encode(image), (raw - model.latent_mean) / model.latent_std)
    torch.testing.assert_close(model.decode(model.encode(image)), decoded, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = rae.RAE.from_pretrained(tmp_path)
    assert torch.equal(again.encode(image), model.encode(image))
    assert torch.equal(again.decode(raw), model.decode(raw))


def test_arguments_beside_an_encoder_folder(tmp_path):
    config = transformers.SiglipVisionConfig(**VISION, **ENCODERS["siglip_vision_model"])
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "encoder")
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "encoder/preprocessor_config.json").write_text(json.dumps(processor))
    plain = rae.RAE(str(tmp_path / "encoder"), DECODER)
    assert plain.encoder_size == 32 and plain.image_mean.unique().tolist() == [0.5]
    given = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    model = rae.RAE(str(tmp_path / "encoder"), DECODER, **given, layers=range(2))
    assert model.image_mean.flatten().tolist() == pytest.approx(given["image_mean"])
    assert model.image_std.flatten().tolist() == pytest.approx(given["image_std"])
    model.save_pretrained(tmp_path / "rae")
    again = rae.RAE.from_pretrained(tmp_path / "rae")
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(again.encode(image), model.encode(image))


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        rae.ClassToImage.from_pretrained(tmp_path)


def test_an_encoder_of_another_family():
    with pytest.raises(ValueError, match="supported: siglip"):
        rae.Encoder({"model_type": "beit", **VISION})


# --- language models


IMAGE_TOKENS = ["<im_start>", "<im_end>"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "tokens, spare",  # that the tokenizer has beyond the nano one's, and rows of the table beyond its tokens
    [([], 0), ([], 100), (IMAGE_TOKENS, 0), (IMAGE_TOKENS, 5), (IMAGE_TOKENS[::-1], 0), (IMAGE_TOKENS[:1], 0),
     (["<a>", *IMAGE_TOKENS, "<b>", "<c>"], 0), (["<a>", "<im_end>", "<b>"], 64), (["<a>", "<b>"], -2),
     (IMAGE_TOKENS, -2)],
)  # fmt: skip
def test_rows_of_tokens_that_a_language_model_has_are_kept(tokens, spare, tied, parts, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "language-model")
    tokenizer.add_tokens(tokens, special_tokens=True)
    config = transformers.AutoConfig.from_pretrained(parts / "language-model")
    config.vocab_size, config.tie_word_embeddings = len(tokenizer) + spare, tied
    before = transformers.Qwen2ForCausalLM(config)
    before.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = rae.TextToImage(str(tmp_path), {"width": 32, "depth": 1, "heads": 2}, (16, 24))
    vocabulary = model.tokenizer.get_vocab()
    assert [vocabulary[token] for token in IMAGE_TOKENS] == [model.im_start, model.im_end]
    known = min(len(tokenizer), config.vocab_size)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(lm, table)().weight for lm in (before, model.language_model))
        assert len(new) == len(vocabulary) and torch.equal(new[:known], old[:known])
        mean = old[:known].mean(dim=0).expand(len(new) - known, -1)
        torch.testing.assert_close(new[known:], mean)


def test_a_language_model_without_some_of_its_weights(parts, tmp_path):
    shutil.copytree(parts / "language-model", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are missing: .*model.norm.weight"):
        rae.TextToImage(str(tmp_path), {"width": 32, "depth": 1, "heads": 2}, (16, 24))


def test_a_tokenizer_without_chat_ml(parts, tmp_path):
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz_<>|")}
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(parts / "language-model").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no <\|im_end\|>: ChatML's tokens, as Qwen2.5-Instruct"
    ) as error:
        rae.TextToImage(str(tmp_path), {"width": 32, "depth": 1, "heads": 2}, (16, 24))
    assert "\n" not in str(error.value)
