"""Loss and throughput of trainings, from their metrics.jsonl, as an image.

python plot.py runs/t2i                        # writes runs/t2i/plot.png
python plot.py runs/a runs/b --out both.png    # several in one image
"""

from dataclasses import dataclass
from pathlib import Path

import common
from common import flag


@dataclass
class Config:
    runs: list[str] = flag((), "folders of trainings", nargs="+", metavar="RUN")
    out: str = flag("", "the image (default: plot.png in the first folder)")


def read(run: str) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no folder of a training: it has no metrics.jsonl")
    rows = common.read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no log lines yet")
    return rows


def main() -> None:
    config = common.parse(Config, __doc__)
    runs = {run: read(run) for run in config.runs}
    names = list(dict.fromkeys(key for rows in runs.values() for key in rows[0] if key.endswith("loss")))
    out = Path(config.out or Path(config.runs[0]) / "plot.png")
    size = (8, 2.5 * len(names) + 2.5)
    with common.plotting(out, len(names) + 1, 1, figsize=size, sharex=True, dpi=120) as axes:
        for axis, name in zip(axes, [*names, "images_per_second"], strict=True):
            for run, rows in runs.items():
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points, strict=True), label=run, marker="." if len(points) < 30 else "")
            axis.set_ylabel(name.replace("_", " "))
            axis.grid(alpha=0.3)
            if name != "images_per_second" and all(
                row.get(name, 1) > 0 for rows in runs.values() for row in rows
            ):
                axis.set_yscale("log")
        axes[-1].set_xlabel("step")
        axes[0].legend()


if __name__ == "__main__":
    common.main(main)
