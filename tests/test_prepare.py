"""nano/prepare.py: parts trained for a few steps are folders that the ordinary loading code reads."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import data
import rae
from nano import prepare, shapes

FP32 = common.DistContext(torch.device("cpu"), 0, 1, torch.float32)


def test_parts_are_ordinary_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "make_tokenizer", functools.partial(prepare.make_tokenizer, documents=300))
    prepare.train_language_model(tmp_path / "language-model", steps=8, batch=8, seed=0, dist_ctx=FP32)
    prepare.train_encoder(tmp_path / "encoder", steps=8, batch=4, seed=0, dist_ctx=FP32)
    for part in ("language-model", "encoder"):
        rows = [json.loads(line) for line in (tmp_path / part / "log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == 7 and rows[-1]["loss"] < rows[0]["loss"]
    decoder = {"patch_size": 8, "width": 32, "depth": 1, "heads": 2, "mlp_width": 48}
    autoencoder = rae.RAE(str(tmp_path / "encoder"), decoder)
    assert autoencoder.latent_shape == (36, prepare.WIDTH) and autoencoder.image_size == 48
    assert autoencoder.image_mean.flatten().tolist() == [0.5, 0.5, 0.5]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "language-model")
    language_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "language-model")
    assert language_model.config.vocab_size == len(tokenizer)


def sample_of(background: float, *objects: shapes.Object) -> shapes.Sample:
    canvas = np.full((48, 48, 3), background)
    return shapes.Sample(canvas.astype(np.uint8), canvas, "", objects, (), None, {})


def test_targets_describe_the_nearest_object_and_the_background():
    circle = shapes.Object("circle", "red", 12.0, 20.0, 8.0, 0.1, (255, 0, 127.5))
    known = prepare.describe(sample_of(255, circle))
    assert known.shape == (36, len(prepare.WEIGHTS))
    assert (known[:, 40:43] == 1).all() and not known[:, 43:].any()  # plain and white
    known = known.reshape(6, 6, -1)[..., :40]  # tokens of 8 pixels: centres at 4, 12, 20, ...
    assert not known[..., 1:32].any()
    assert known[2, 1, [0, *range(32, 40)]].tolist() == [1.5, 0, 0, 0, 0, 1, -1, 0, 1]
    assert known[2, 2, 32:].tolist() == [-1, 0, 0, 0, 1, -1, 0, 1]  # on its edge
    assert not known[2, 3:].any() and not known[5].any()  # eight pixels and more away from it
    corner = known[1, 2]  # 8 right and 8 above: 3.3 pixels from the edge
    assert corner == pytest.approx(known[2, 1] * corner[39] + corner[39] * np.eye(40)[[32, 33]].T @ [-1, 1])
    assert corner[39] == pytest.approx((7 - (128**0.5 - 8)) / 6)
    star = shapes.Object("star", "blue", 36.0, 20.0, 6.0, 0.115, (0, 0, 0))
    both = prepare.describe(sample_of(255, circle, star)).reshape(6, 6, -1)
    assert np.array_equal(both[:, :2, :40], known[:, :2])
    assert both[2, 4, 3] == 1.5 and both[2, 4, 32:40].tolist() == pytest.approx([0, 0, -1, 1, -1, -1, -1, 1])


def test_targets_of_words_and_textures():
    word = shapes.draw("text", 0, 3)
    known = prepare.describe(word)
    for letter in word.objects:
        token = int(letter.y // 8) * 6 + int(letter.x // 8)
        nearest = prepare.CLASSES[known[token, :32].argmax()]
        assert nearest in word.word and known[token, 39] == 1
    assert "".join(letter.shape for letter in word.objects) == word.word
    scene = shapes.draw("scenes", 0, 0)
    light = scene.background.mean(axis=-1)
    pattern = prepare.describe(scene)[7, 43:].reshape(4, 4)  # of the token at row 1, column 1
    expected = (light[8:10, 10:12].mean() - light[8:16, 8:16].mean()) / 32
    assert pattern[0, 1] == pytest.approx(expected, abs=1e-5) and abs(pattern).max() > 0.05


def test_facts_are_what_a_caption_says():
    def said(metadata: dict) -> dict[str, float]:
        values = prepare.facts(metadata)
        return {name: values[index] for index, name in enumerate(prepare.FACTS) if values[index]}

    def red(what: str) -> dict[str, float]:
        values = np.array(shapes.COLORS["red"], np.float32) / 127.5 - 1
        return {f"{channel} of {what}": value for channel, value in zip("rgb", values, strict=True)}

    above = {"class": "star", "count": 1, "color": "red", "position": ["above", 0]}
    assert said({"include": [{"class": "ring", "count": 2}, above]}) == {
        "": 2, "ring": 2, "red": 1, "star": 1, "1": 1, "2": 1, **red("star"),
        "above": 1, "subject star": 1, "reference ring": 1, "top star": 1, "bottom ring": 1, **red("top"),
    }  # fmt: skip
    left = [{"class": "ring", "count": 1}, above | {"position": ["right of", 0]}]
    assert said({"include": left}).items() > ({"left ring": 1, "right star": 1} | red("right")).items()
    assert said({"include": [], "word": "AB", "ink": "pink"}) == {
        "ink pink": 1, "letter 0 A": 1, "letter 1 B": 1,
    }  # fmt: skip
    assert said({"include": [], "background": ["dotted", "beige"]}) == {
        "background dotted": 1, "background beige": 1,
    }  # fmt: skip


def test_vae_is_a_folder_of_diffusers_with_measured_statistics(tmp_path):
    prepare.train_vae(tmp_path, steps=8, batch=4, seed=0, dist_ctx=FP32)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 7 and rows[-1]["loss"] < rows[0]["loss"]
    model = rae.open_autoencoder(tmp_path)
    assert model.latent_shape == (36, 32) and model.image_size == 48  # as many tokens as the nano RAE
    images = torch.from_numpy(np.stack([shapes.draw("objects", 1, i).image for i in range(32)]))
    images = images.permute(0, 3, 1, 2) / 255
    latents = model.encode(images)
    assert latents.mean().abs() < 0.2 and 0.8 < latents.std() < 1.2
    assert model.decode(latents).shape == images.shape


def test_tokenizer_spells_capitals_and_loses_nothing(parts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(parts / "language-model")
    text = 'the word "CAT", drawn twice:\n\n<|im_end|> émigré 12'
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("CAT") == ["C", "A", "T"]
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_batch_without_all_kinds_of_conversations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--batch 7: give at least 8"):
        prepare.train_language_model(tmp_path, steps=1, batch=7, seed=0, dist_ctx=FP32)


def test_conversations_ask_for_images_or_about_images_or_captions():
    pairs = [prepare.conversation(0, i) for i in range(80)]
    assert pairs[0][0] == prepare.conversation(0, 0)[0]
    heads, kinds = tuple(template.partition("{}")[0] for template in data.REQUESTS), []
    for turns, sample in pairs:
        (user, first), *_, (role, last) = turns
        assert (user, role) == ("user", "assistant")
        if "<image>" in last:
            kinds.append("request")
            assert len(turns) == 2 and first.startswith(heads) and sample.caption in first
        elif "<image>" in first:
            kinds.append("image")
            asked = [text.removeprefix("<image>\n") for role, text in turns if role == "user"]
            assert sorted(asked) == sorted(question for question, _ in sample.questions)
            assert shapes.DESCRIBE not in asked[:-1]
        else:
            kinds.append("caption")
            question = first.removeprefix(f"{sample.caption}\n")
            assert (question, last) in sample.questions
    assert all(
        sorted(kinds[i : i + 8]) == ["caption", "image", "image"] + 5 * ["request"] for i in range(0, 80, 8)
    )


def test_shipped_models_are_bf16_matrices_with_exact_statistics(parts, tmp_path):
    for run, part in (("decoder", "rae"), ("t2i", "t2i")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "model").symlink_to(parts / part)
        rows = "".join(f'{{"step": {i}, "loss": 1.0}}\n{{"step": {i}, "val_loss": 1.0}}\n' for i in range(25))
        (tmp_path / "runs" / run / "metrics.jsonl").write_text(rows)
    (tmp_path / "runs/rae").symlink_to(parts / "rae")
    (tmp_path / "runs/encoder").mkdir()
    with pytest.raises(ValueError, match="no model at .*language-model: train it first"):
        prepare.ship(tmp_path / "weights", tmp_path / "runs")
    assert not (tmp_path / "weights").exists()
    (tmp_path / "runs/language-model").mkdir()
    prepare.ship(tmp_path / "weights", tmp_path / "runs")
    tensors = load_file(tmp_path / "weights/t2i/model.safetensors")
    assert tensors["dit.x_embedder.weight"].dtype == torch.bfloat16
    assert tensors["dit.t_embedder.W"].dtype == tensors["dit.pos_embed"].dtype == torch.float32
    tensors = load_file(tmp_path / "weights/rae/model.safetensors")
    assert tensors["latent_std"].dtype == torch.float32
    model = rae.TextToImage.from_pretrained(tmp_path / "weights/t2i")
    assert model.autoencoder.latent_shape == model.latent_shape
    assert json.loads((tmp_path / "weights/t2i/config.json").read_text())["autoencoder"] == "../rae"
    log = (tmp_path / "weights/rae/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [9, 19, 24]
