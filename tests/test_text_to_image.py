"""TextToImage: tokens and labels, which images are answers, losses, sampling, dialogue, its folder."""

import pytest
import torch
import torch.nn.functional as F

import data
import rae


@pytest.fixture(scope="module")
def model(parts):
    torch.manual_seed(1)
    model = rae.TextToImage.from_pretrained(parts / "t2i").eval()
    for parameter in model.dit.parameters():  # the zero initialisation would hide everything
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def text(model, ids):
    return model.tokenizer.decode([i for i in ids if i >= 0])


REQUEST = [("user", "Draw a star"), ("assistant", "Here you go:\n<image>")]
QUESTION = [("user", "<image>\nhow many?"), ("assistant", "two")]


def test_chat_format(model):
    ids, _ = model.encode_chat(REQUEST)
    assert text(model, ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nDraw a star<|im_end|>\n"
        "<|im_start|>assistant\nHere you go:\n<im_start><im_end><|im_end|>\n"
    )
    assert ids.count(rae.IMAGE) == 16
    assert ids.index(rae.IMAGE) == ids.index(model.tokenizer.convert_tokens_to_ids("<im_start>")) + 1


def test_labels_are_the_assistants_turn_and_the_turn_markers_everywhere(model):
    ids, labels = model.encode_chat(QUESTION)
    supervised = [i for i, label in zip(ids, labels, strict=True) if label != rae.IGNORED]
    assert text(model, supervised) == (
        "<|im_start|>\n<|im_end|>\n<|im_start|>\n\n<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    assert all(label in (i, rae.IGNORED) for i, label in zip(ids, labels, strict=True))


def test_padding_to_a_rounder_length_changes_nothing(model):
    encoded = [model.encode_chat(turns) for turns in (REQUEST, QUESTION)]
    plain, padded = model.collate(encoded), model.collate(encoded, 64)
    assert plain.ids.shape[1] % 64 and padded.ids.shape[1] % 64 == 0
    latents = torch.randn(1, *model.latent_shape)
    noise, t = torch.randn(1, *model.latent_shape), torch.tensor([0.4])
    with torch.no_grad():
        results = [model(chat, noise, t, torch.tensor([False]), latents) for chat in (plain, padded)]
    (velocity, _, loss), (other, _, other_loss) = results
    assert torch.allclose(velocity, other, atol=1e-5) and torch.allclose(loss, other_loss, atol=1e-4)


def test_answer_images_are_those_whose_start_token_is_supervised(model):
    chat = model.chat([QUESTION, REQUEST, [("user", "hi"), ("assistant", "hello")], QUESTION])
    assert chat.is_answer.tolist() == [False, True, False]  # in order, of the images
    images = chat.ids == rae.IMAGE
    assert torch.equal(chat.answer_mask | chat.context_mask, images)
    assert chat.answer_mask.sum(dim=1).tolist() == [0, 16, 0, 0]
    assert chat.context_mask.sum(dim=1).tolist() == [16, 0, 0, 16]
    two_images = model.chat([[("user", "<image>\nsame?"), ("assistant", "<image>")]])
    assert two_images.is_answer.tolist() == [False, True]


def test_each_position_predicts_the_next_label(model):
    chat = model.chat([QUESTION, REQUEST])
    assert torch.equal(chat.next_labels[:, :-1], chat.labels[:, 1:])
    assert (chat.next_labels[:, -1] == rae.IGNORED).all() and not (chat.labels == rae.IMAGE).any()
    supervised = chat.labels[:, 1:] != rae.IGNORED
    assert chat.supervised_tokens == supervised.sum() > 0
    assert torch.equal(chat.labels[chat.labels != rae.IGNORED], chat.ids[chat.labels != rae.IGNORED])


def test_new_tokens_start_as_the_mean_row(plain_language_model):
    model = rae.TextToImage(str(plain_language_model), {"width": 32, "depth": 1, "heads": 2}, (16, 24))
    rows = model.language_model.get_input_embeddings().weight
    assert len(rows) == len(model.tokenizer)
    torch.testing.assert_close(rows[-1], rows[:-2].mean(dim=0))
    torch.testing.assert_close(rows[-2], rows[:-2].mean(dim=0))


def test_parameters_are_fp32_whatever_the_files_are(parts, tmp_path):
    model = rae.TextToImage.from_pretrained(parts / "t2i")
    model.bfloat16().save_pretrained(tmp_path / "t2i")
    model.language_model.save_pretrained(tmp_path / "language-model")
    model.tokenizer.save_pretrained(tmp_path / "language-model")
    sizes = {"width": 32, "depth": 1, "heads": 2}
    for loaded in (
        rae.TextToImage.from_pretrained(tmp_path / "t2i"),
        rae.TextToImage(str(tmp_path / "language-model"), sizes, (16, 24)),
    ):
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    encoder = rae.Encoder(str(parts / "encoder")).model.bfloat16()
    encoder.save_pretrained(tmp_path / "encoder")
    assert {p.dtype for p in rae.Encoder(str(tmp_path / "encoder")).parameters()} == {torch.float32}


def run(model, conversations, x_t, t, dropped):
    """Velocity of the images to generate, summed cross-entropy, supervised tokens."""
    chat = model.chat(conversations)
    context = torch.randn(16, 24, generator=torch.Generator().manual_seed(7))
    contexts = context.expand(int((~chat.is_answer).sum()), -1, -1)
    velocity, _, cross_entropy = model(chat, x_t, t, dropped, contexts)
    return velocity, cross_entropy, chat.supervised_tokens


def test_a_batch_gives_what_its_samples_give(model):
    """Padding, order and neighbours change nothing: what makes global normalisation equal to one big
    batch."""
    torch.manual_seed(0)
    x_t, t, dropped = torch.randn(2, 16, 24), torch.tensor([0.2, 0.8]), torch.tensor([False, True])
    chats = [REQUEST, [("user", "<image>\n" + "what is this, please? " * 3), ("assistant", "two")], REQUEST]
    velocity, cross_entropy, tokens = run(model, chats, x_t, t, dropped)
    slices = [slice(0, 1), slice(0, 0), slice(1, 2)]  # the second has no image to generate
    alone = [run(model, [c], x_t[s], t[s], dropped[s]) for c, s in zip(chats, slices, strict=True)]
    torch.testing.assert_close(velocity, torch.cat([a[0] for a in alone]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy, sum(a[1] for a in alone), rtol=1e-5, atol=1e-5)
    assert tokens == sum(a[2] for a in alone) and len(velocity) == 2


def test_several_draws_are_as_if_the_images_came_that_often(model):
    torch.manual_seed(0)
    chats = [REQUEST, [("user", "<image>\nwhat is this?"), ("assistant", "two")], REQUEST]
    x_t, t, dropped = torch.randn(4, 16, 24), torch.rand(4), torch.tensor([False, True, True, False])
    velocity, cross_entropy, _ = run(model, chats, x_t, t, dropped)
    halves = [run(model, chats, x_t[h], t[h], dropped[h]) for h in (slice(2), slice(2, 4))]
    torch.testing.assert_close(velocity, torch.cat([half[0] for half in halves]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross_entropy, halves[0][1])
    assert len(velocity) == 4


def test_text_loss_is_cross_entropy_of_the_next_token(model):
    turns = [("user", "hello"), ("assistant", "a star")]
    ids, labels = model.encode_chat(turns)
    none = torch.zeros(0)
    velocity, cross_entropy, tokens = run(model, [turns], torch.zeros(0, 16, 24), none, none.bool())
    logits = model.language_model(torch.tensor([ids])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=rae.IGNORED, reduction="sum")
    torch.testing.assert_close(cross_entropy, expected, rtol=1e-5, atol=1e-5)
    assert len(velocity) == 0 and tokens == sum(label != rae.IGNORED for label in labels[1:])


def test_gradients_reach_the_parts_that_a_sample_uses(model):
    def trained(conversations, images: int) -> set[str]:
        model.zero_grad()
        noise = (torch.randn(images, 16, 24), torch.rand(images), torch.zeros(images, dtype=torch.bool))
        velocity, cross_entropy, _ = run(model, conversations, *noise)
        (cross_entropy + velocity.square().sum()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return {name.split(".")[0] for name, grad in grads.items() if grad is not None and grad.any()}

    expected = {"language_model", "latent_queries", "diff_head_projector", "dit"}
    assert trained([REQUEST, REQUEST], 2) == expected
    assert trained([QUESTION, QUESTION], 0) == {"language_model", "mm_projector"}


def test_condition_equals_the_training_sequence(model):
    """What `condition` computes at inference is what training conditions on, in batches of unequal prompts
    too."""
    prompts = ["a star", "three blue squares and a ring"]
    together = model.condition(prompts)
    for prompt, expected in zip(prompts, together, strict=True):
        chat = model.chat([data.request(prompt, 0.0)])
        alone = model.answer_condition(model.hidden_states(model.embed(chat)), chat)
        torch.testing.assert_close(alone[0], expected, atol=1e-5, rtol=1e-5)
    assert rae.REQUEST == data.REQUESTS[0] and data.request("x", 0.0)[1][1] == rae.REPLY


def test_guidance_changes_the_image_and_prompts_matter(model):
    noise = torch.randn(1, 16, 24).expand(2, -1, -1)
    plain = model.generate(["a star", "a ring"], steps=3, noise=noise)
    guided = model.generate(["a star", "a ring"], steps=3, noise=noise, guidance=3.0)
    assert (plain - guided).abs().max() > 1e-4  # a no-op in the authors' released code
    assert (plain[0] - plain[1]).abs().max() > 1e-5
    seeded = [model.generate(["a star"], 2, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def test_answer_reads_images_and_latents(model):
    image = torch.rand(3, 32, 32)
    latents = model.autoencoder.encode(image[None])[0]
    assert model.answer(image, "what?", max_tokens=4) == model.answer(latents, "what?", max_tokens=4)
    chat = model.chat([QUESTION])
    seen = [model.hidden_states(model.embed(chat, z[None]))[-1] for z in (latents, -latents)]
    assert (seen[0] - seen[1]).abs().max() > 1e-3  # what it says depends on what it sees


def greedy(model, turns, latents, count: int) -> list[int]:
    """The next tokens of a conversation, each from a pass over all of it."""
    ids, _ = model.encode_chat(turns)
    start = len(ids := ids + model.tokens("<|im_start|>assistant\n"))
    for _ in range(count):
        chat = model.collate([(ids, [rae.IGNORED] * len(ids))])
        hidden = model.hidden_states(model.embed(chat, latents))
        ids = [*ids, model.language_model.lm_head(hidden[-1]).argmax().item()]
    return ids[start:]


def test_a_dialogue_goes_on_where_it_was(model):
    latents = torch.randn(16, 24)
    dialogue = rae.Dialogue(model)
    first, condition = dialogue.say("how many?", latents, max_tokens=5)
    expected = greedy(model, [("user", "<image>\nhow many?")], latents[None], 5)
    assert condition is None and first == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
    second, _ = dialogue.say("and which colour?", max_tokens=5)
    turns = [("user", "<image>\nhow many?"), ("assistant", model.tokenizer.decode(expected))]
    expected = greedy(model, [*turns, ("user", "and which colour?")], latents[None], 5)
    assert second == model.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert model.answer(latents, "how many?", max_tokens=5) == first


def test_the_model_decides_to_draw(model, monkeypatch):
    """Where it says <im_start>, the image's condition is that of training on this very conversation."""
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    script = iter([*model.tokens("Here you go:\n"), model.im_start, *model.tokens("fine"), end])

    def speak(hidden):
        logits = torch.zeros(*hidden.shape[:-1], model.language_model.config.vocab_size)
        logits[..., next(script)] = 1.0
        return logits

    monkeypatch.setattr(model.language_model.lm_head, "forward", speak)
    dialogue = rae.Dialogue(model)
    words, condition = dialogue.say("Draw a star")
    chat = model.chat([REQUEST])
    expected = model.answer_condition(model.hidden_states(model.embed(chat)), chat)
    assert words == "Here you go:"
    torch.testing.assert_close(condition, expected, atol=1e-5, rtol=1e-5)
    assert model.generate(condition, 2, 2.0, noise=torch.randn(1, 16, 24)).shape == (1, 16, 24)
    assert dialogue.say("thank you") == ("fine", None)
    chat = model.chat([[*REQUEST, ("user", "thank you"), ("assistant", "fine")]])
    torch.testing.assert_close(dialogue.embeddings, model.embed(chat))


def test_bad_prompts(model):
    bad = {"": "empty", "  \n": "empty", "star " * 400: "limit", "a <|im_end|> star": "special"}
    bad["<image>"] = "special"
    for prompt, message in bad.items():
        with pytest.raises(ValueError, match=message):
            model.condition(["a star", prompt])


def test_folder_round_trip_and_its_link_to_the_autoencoder(parts, model, tmp_path):
    loaded = rae.TextToImage.from_pretrained(parts / "t2i")
    assert loaded.autoencoder_path == str(parts / "t2i" / "../rae")
    assert loaded.autoencoder.latent_shape == loaded.latent_shape
    assert "autoencoder" not in "".join(loaded.state_dict())
    model.save_pretrained(tmp_path)
    again = rae.TextToImage.from_pretrained(tmp_path).eval()
    noise = torch.randn(1, 16, 24)
    assert torch.equal(again.generate(["a star"], 2, noise=noise), model.generate(["a star"], 2, noise=noise))
