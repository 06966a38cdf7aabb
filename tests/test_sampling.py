"""nano/sampling.py: sampling from noised latents, and a run as a user sees it."""

import json
import sys

import pytest
import torch
from PIL import Image

import rae
from nano import sampling


def test_sampling_starts_at_a_given_t(parts):
    model = rae.TextToImage.from_pretrained(parts / "t2i").eval()
    torch.nn.init.normal_(model.dit.final_layer.linear.weight, std=0.1)  # a new one's velocity is 0
    noise, prompts = torch.randn(2, *model.latent_shape), ["a star", "two rings"]
    (_, dt), (t, _), *_ = rae.time_grid(4, model.alpha)
    for solver in ("euler", "heun"):
        full, none, short = (
            model.generate(prompts, 4, noise=noise, solver=solver, start=start) for start in (1.0, 0.0, 0.01)
        )
        assert torch.equal(none, noise)
        assert 0 < (short - noise).abs().max() < 0.1 * (full - noise).abs().max()
    with torch.no_grad():
        first = noise + dt * model.dit(noise, torch.ones(2), model.condition(prompts))
    rest = model.generate(prompts, 4, noise=first, start=t)
    torch.testing.assert_close(rest, model.generate(prompts, 4, noise=noise))
    with pytest.raises(ValueError, match="only grid 'full'"):
        model.generate(prompts, 4, noise=noise, grid="scale-rae", start=0.5)


def test_run_writes_plot_and_results(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "STEPS", [sampling.Setting(), sampling.Setting("heun", 2)])
    monkeypatch.setattr(sampling, "STARTS", [sampling.Setting(start=0.0), sampling.Setting(start=0.5)])
    monkeypatch.setattr(sampling, "GUIDANCES", [sampling.Setting(steps=3)])
    flags = ["--model", parts / "t2i", "--limit", 1, "--images", 2, "--out", tmp_path / "plot.png"]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *map(str, flags)])
    sampling.main()
    assert Image.open(tmp_path / "plot.png").size[0] > 800
    results = {row["metric"]: row for row in json.loads((tmp_path / "plot.json").read_text())["results"]}
    assert len(results) == 5 * 7 and results["overall/heun, 2 steps, guidance 3, from 1"]["n"] == 12
    assert all(0 <= row["value"] <= 1 for row in results.values())
    assert "counting" in capsys.readouterr().out
