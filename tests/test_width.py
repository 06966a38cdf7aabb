"""nano/width.py: the bound against numbers that do not use its formula, and a run as a user sees it."""

import json
import sys

import pytest
import torch
from PIL import Image

from nano import width


@pytest.mark.parametrize("tokens", [4, 16])
def test_bound_is_the_error_of_the_best_subspace_of_sampled_targets(tokens):
    torch.manual_seed(0)
    latents = 2 * torch.randn(tokens, 12) + torch.randn(12)
    targets = (torch.randn(20_000, tokens, 12) - latents).flatten(0, 1).double()
    targets -= targets.mean(dim=0)
    axes = torch.linalg.svd(targets, full_matrices=False).Vh
    for d in (0, 1, 5, 9, 12):
        rest = targets - targets @ axes[:d].T @ axes[:d]
        assert width.lower_bound(latents, d) == pytest.approx(rest.square().mean().item(), abs=0.01)
    assert width.lower_bound(latents, 15) == 0
    if tokens == 4:  # the latents span three directions, the others hold noise alone
        assert width.lower_bound(latents, 5) == pytest.approx((12 - 5) / 12)


def test_narrow_model_stays_above_the_bound_and_a_head_does_not():
    torch.manual_seed(0)
    latents, config = torch.randn(4, 32), width.Config(steps=200, batch=16)
    losses = []
    for size in (width.Size(8, 2), width.Size(8, 1, (64, 1))):
        model, _ = width.train(size, latents, config)
        losses.append(width.measure(model, latents, config))
        assert losses[-1] > width.lower_bound(latents, size.last_width)
    assert losses[0] > width.lower_bound(latents, 8) > losses[1] + 0.2


def test_run_writes_table_plot_and_the_same_results_for_the_same_seed(parts, tmp_path, monkeypatch, capsys):
    files = []
    for name in ("a", "b"):
        flags = [
            "--autoencoder",
            parts / "rae",
            "--steps",
            3,
            "--batch",
            2,
            "--out",
            tmp_path / f"{name}.png",
        ]
        monkeypatch.setattr(sys, "argv", ["width.py", *map(str, flags)])
        monkeypatch.setattr(width, "DRAWS", 64)
        width.main()
        files.append(json.loads((tmp_path / f"{name}.json").read_text()))
        assert Image.open(tmp_path / f"{name}.png").size[0] > 800
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + len(width.sizes(24))) and "24 (1.00 C)" in "".join(rows)
    assert files[0]["results"] == files[1]["results"]
    assert [row["metric"] for row in files[0]["results"]][:2] == ["loss/8x2", "loss/16x2"]
