"""The README's tables are those of the results files."""

import json
from pathlib import Path

import pytest

import report

ROOT = Path(__file__).parent.parent
ABOUT = {"n": 4, "seed": 0, "command": "python eval.py", "versions": {"torch": "2"}, "date": "2026-01-02T03"}
TEXT = "a\n<!-- table r.json psnr ssim -->\nold\n<!-- end -->\nb\n<!-- table b.json -->\n<!-- end -->\n"


def test_the_readme_shows_the_files():
    readme = (ROOT / "README.md").read_text()
    assert len(report.TABLE.findall(readme)) >= 2
    assert report.rendered(readme, ROOT) == readme


def test_tables_take_the_place_of_what_was_there(tmp_path):
    metrics = {"psnr/objects": 29.7, "psnr/text": 21.0, "ssim/objects": 0.9, "shapes/model/overall": 0.1}
    rows = [{"metric": name, "value": value} | ABOUT for name, value in metrics.items()]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    bench = {
        "command": "bench.py",
        "where": "cpu",
        "card": "2 CPU cores",
        "threads": 2,
        "torch": "2",
        "date": "d",
    }
    loops = {"encode": {"ms": 2.0, "images_per_second": 500.0, "of_eager": 1.25}}
    (tmp_path / "b.json").write_text(json.dumps(bench | {"matrix_product_tflops": 0.1, "results": loops}))
    new = report.rendered(TEXT, tmp_path)
    assert "old" not in new and new.startswith("a\n<!--") and "\nb\n" in new
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in new.splitlines() if line[:1] == "|"]
    assert cells[:4] == [
        ["", "objects", "text"],
        ["---"] * 3,
        ["psnr", "29.700", "21.000"],
        ["ssim", "0.900", ""],
    ]
    assert cells[-1] == ["encode", "2.0", "500.0", "", "", "", "", "1.25"]
    assert "`python eval.py`, torch 2, 2026-01-02" in new and "overall" not in new
    assert report.rendered(new, tmp_path) == new


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("psnr ssim", "nothing")])
def test_a_file_that_is_missing_or_has_no_such_metric(text, tmp_path):
    (tmp_path / "b.json").write_text("{}")
    if text != TEXT:
        (tmp_path / "r.json").write_text(json.dumps([{"metric": "psnr/a", "value": 1.0} | ABOUT]))
    with pytest.raises(ValueError, match=r"no table from .*r\.json"):
        report.rendered(text, tmp_path)
