"""What bench.py computes instead of measuring, against tensors that are there."""

import pytest
import torch

import bench
import rae
import train_decoder


def part(passes=3, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        model = rae.DiT((16, 24), width=32, depth=3, heads=2, condition_width=20).to(device)
        given = torch.zeros(1, 16, 24), torch.zeros(1), torch.zeros(1, 16, 20)
        return bench.Part(model, lambda m: m(*given), passes)


def test_what_a_sample_keeps_is_known_without_memory():
    """But for what attention keeps, of which the CPU has a kernel of its own."""
    assert bench.kept_bytes(part(device="meta")) == pytest.approx(bench.kept_bytes(part()), rel=0.05)
    assert bench.kept_bytes(part()) > 3 * 16 * 32 * 4 * 10


def test_flops_are_two_for_each_weight_and_token():
    """And attention: two products of (16, 16) and the width, in each block."""
    model = part().module
    linear = {
        name: p.numel() for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2
    }
    per_image = sum(count for name, count in linear.items() if "t_embedder" in name)
    per_token = sum(linear.values()) - per_image
    attention = 3 * 2 * 2 * 16 * 16 * 32
    assert bench.forward_flops(part()) == 2 * per_image + 2 * 16 * per_token + attention


def test_states_are_those_of_a_training():
    """Weights, gradients, both moments and an average in fp32; a frozen part has weights alone."""
    learned, frozen = part(), part(passes=2)
    optimizer = torch.optim.AdamW([p for p in learned.module.parameters() if p.requires_grad])
    learned.call(learned.module).sum().backward()
    optimizer.step()
    tensors = [*learned.module.parameters(), *learned.module.parameters(), *frozen.module.parameters()]
    tensors += [p.grad for p in learned.module.parameters() if p.grad is not None]
    tensors += [v for values in optimizer.state.values() for v in values.values() if v.ndim]
    measured = sum(tensor.nbytes for tensor in tensors)
    meta = [part(device="meta"), part(passes=2, device="meta")]
    computed = bench.cost(bench.Paper(meta, 8, 1, ema=True)).spread
    fixed = sum(p.numel() for p in learned.module.parameters() if p.grad is None)  # tables, frequencies
    assert computed == measured + 12 * fixed
    assert fixed < 0.1 * bench.size(learned.module)


def test_the_papers_costs():
    """By hand: 2 FLOPs for a weight and a token, three passes where it learns, one where it runs."""
    with torch.device("meta"):
        paper = bench.PAPERS["0.5B + 1.5B frozen, 30k"]()
    for each in paper.parts:
        each.module.to("meta")
    cost = bench.cost(paper)
    language_model = 1.31e9 * bench.TOKENS * 2  # without its embeddings
    by_hand = 3 * 0.48e9 * 256 * 2 + 2 * language_model + 0.41e9 * 256 * 2
    assert cost.flops == pytest.approx(by_hand, rel=0.1)
    assert cost.learned == pytest.approx(0.481e9, rel=0.01)
    assert cost.held == pytest.approx(4 * (0.41e9 + 0.416e9), rel=0.03)  # encoder and decoder
    assert cost.moved == pytest.approx(12 * 0.481e9 + 8 * 1.54e9, rel=0.01)


def test_the_full_loss_of_other_sizes_has_networks(parts, tmp_path):
    model = rae.RAE.from_pretrained(parts / "rae")
    models = bench.World(model, model, None, None, None, None)
    flags = bench.all_losses(models, bench.Config(dit="DiT-S", decoder="ViT-S"), str(tmp_path))
    given = dict(flag.removeprefix("--").split("=") for flag in flags)
    encoder = rae.Encoder(given["encoder"])
    assert torch.equal(encoder(pixels := torch.rand(1, 3, 32, 32)), model.encoder(pixels))
    dino = train_decoder.Backbone.from_pretrained(given["discriminator"])
    assert [x.shape for x in dino(torch.rand(1, 3, 32, 32))] == 4 * [(1, 384, 28 * 28)]
