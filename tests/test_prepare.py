"""nano/prepare.py: parts trained for a few steps are folders that the ordinary loading code reads."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
import rae
from nano import prepare, shapes


def test_parts_are_ordinary_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "make_tokenizer", functools.partial(prepare.make_tokenizer, documents=300))
    prepare.train_language_model(tmp_path / "language-model", steps=8, batch=4, seed=0)
    prepare.train_encoder(tmp_path / "encoder", steps=8, batch=4, seed=0)
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


def test_targets_describe_the_nearest_object():
    circle = shapes.Object("circle", "red", 12.0, 20.0, 8.0, 0.1, (255, 0, 127.5))
    known = prepare.describe([circle]).reshape(6, 6, 14)  # tokens of 8 pixels: centres at 4, 12, 20, ...
    assert known[2, 1].tolist() == [1.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 1]
    assert known[2, 2].tolist() == [1.5, 0, 0, 0, 0, 0, -1, 0, 0, 0, 1, -1, 0, 1]  # on its edge
    assert not known[2, 3:].any() and not known[5].any()  # eight pixels and more away from it
    corner = known[1, 2]  # 8 right and 8 above: 3.3 pixels from the edge
    assert corner == pytest.approx(known[2, 1] * corner[13] + corner[13] * np.eye(14)[[6, 7]].T @ [-1, 1])
    assert corner[13] == pytest.approx((7 - (128**0.5 - 8)) / 6)
    star = shapes.Object("star", "blue", 36.0, 20.0, 6.0, 0.115, (0, 0, 0))
    both = prepare.describe([circle, star]).reshape(6, 6, 14)
    assert np.array_equal(both[:, :2], known[:, :2])
    assert both[2, 4].tolist() == pytest.approx([0, 0, 0, 1.5, 0, 0, 0, 0, -1, 1, -1, -1, -1, 1])
    assert not prepare.describe([]).any()


def test_vae_is_a_folder_of_diffusers_with_measured_statistics(tmp_path):
    prepare.train_vae(tmp_path, steps=8, batch=4, seed=0)
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


def test_conversations_ask_for_images_or_about_captions():
    chats = [prepare.conversation(0, i) for i in range(60)]
    assert {len(chat) for chat in chats} == {3} and chats[0] == prepare.conversation(0, 0)
    requests = [chat for chat in chats if chat[2]["content"].startswith("Here you go:\n")]
    assert 15 < len(requests) < 45
    heads = tuple(template.partition("{}")[0] for template in data.REQUESTS)
    for _, request, answer in requests:
        assert request["content"].startswith(heads)
        assert answer["content"].removeprefix("Here you go:\n") in request["content"]  # the caption, again


def test_shipped_models_are_bf16_matrices_with_exact_statistics(parts, tmp_path):
    for run, part in (("decoder", "rae"), ("t2i", "t2i")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "model").symlink_to(parts / part)
        rows = "".join(f'{{"step": {i}, "loss": 1.0}}\n{{"step": {i}, "val_loss": 1.0}}\n' for i in range(25))
        (tmp_path / "runs" / run / "metrics.jsonl").write_text(rows)
    (tmp_path / "runs/rae").symlink_to(parts / "rae")
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
