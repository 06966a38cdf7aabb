"""nano/claims.py: the rule of verdicts, and every claim end to end."""

import json
import math
import shutil

import harness
import pytest

from nano import claims


def few_arms() -> None:
    """A patch: fewer and smaller DiTs."""
    import rae
    from nano import claims

    claims.WIDTHS, claims.ALPHAS, claims.EPOCHS = (48, 96), (1, 4), (4,)
    for name in [name for name in rae.DITS if name.startswith("claim-")]:
        head = {"head": (48, 1, 2)} if name.endswith("head") else {}
        rae.DITS[name] = harness.TINY_DIT | head


@pytest.mark.parametrize(
    "contrasts, expected",
    [
        ([0.1, 0.2, 0.3], "agrees"),  # 3.46 standard errors
        ([0.1, 0.2, 0.4], "cannot tell"),  # 2.65
        ([-0.1, -0.2, -0.3], "disagrees"),
        ([0.1, -0.1, 0.0], "cannot tell"),
        ([1.0, 1.0, 1.0], "agrees"),
        ([0.0, 0.0, 0.0], "cannot tell"),
        ([0.5, 0.5], "too few seeds"),
    ],
)
def test_verdict(contrasts, expected):
    assert claims.verdict(contrasts) == expected


def test_every_claim_end_to_end(world, tmp_path):
    flags = ["all", "--smoke", "--out", tmp_path / "run", "--dtype", "fp32"]
    tmp_path = tmp_path / "run-smoke"
    printed = world(1, "nano.claims", *flags, patch=few_arms).wait()
    assert printed.count("| too few seeds |") == len(claims.CLAIMS)
    for name in claims.CLAIMS:
        content = json.loads((tmp_path / f"results/{name}.json").read_text())
        [seed] = content["seeds"]
        assert math.isfinite(seed["contrast"])
        assert (tmp_path / f"results/{name}.png").read_bytes().startswith(b"\x89PNG")
        for run in seed["runs"].values():
            assert run["samples"] > 0 and run["pflop"] > 0

    # trainings are not repeated, and figures of other settings are not mixed
    shutil.rmtree(tmp_path / "results")
    again = world(1, "nano.claims", "prediction", *flags[1:], patch=few_arms).wait()
    assert "val_loss" not in again and again.count("not measured") == len(claims.CLAIMS) - 1
    assert "was begun with" in world(1, "nano.claims", *flags, "--steps", 5).wait(1)
