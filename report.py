"""Writes the tables of README.md anew, from the results files that they name.

    python eval.py --out docs/results.json && python report.py
    python bench.py --json docs/bench.json && python report.py

A table stands between `<!-- table FILE [PREFIX ...] -->` and `<!-- end -->`; of an evaluation's file it shows
the metrics whose names begin with one of the prefixes. Below it stand the command and the date.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import common
import eval
from common import flag

TABLE = re.compile(r"(<!-- table (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Config:
    file: str = flag("README.md", "the Markdown file")


def of_evaluation(results: list[dict], prefixes: list[str]) -> str:
    shown = [row for row in results if row["metric"].startswith(tuple(prefixes) or "")]
    if not shown:
        raise ValueError(f"no metric begins with {' or '.join(prefixes)}")
    first = shown[0]
    counts = ", ".join(map(str, sorted({row["n"] for row in shown})))
    about = f"`{first['command']}`, torch {first['versions']['torch']}, {first['date'][:10]}; n = {counts}"
    return f"{eval.table(shown)}\n\n{about}"


def of_bench(bench: dict) -> str:
    columns = {
        "ms": ("ms", ".1f"),
        "images/s": ("images_per_second", ".1f"),
        "GFLOP an image": ("gflop_per_image", ".2f"),
        "of a matrix product": ("of_matrix_product", ".0%"),
        "MFU": ("mfu", ".1%"),
        "GB": ("peak_gb", ".1f"),
        "times eager": ("of_eager", ".2f"),
    }
    lines = [f"| loop | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in bench["results"].items():
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    about = (
        f"`{bench['command']}`: {bench['where']}, {bench['card']}, {bench['threads']} threads, torch "
        f"{bench['torch']}, {bench['date']}; a product of large matrices "
        f"{1000 * bench['matrix_product_tflops']:.0f} GFLOP/s"
    )
    return "\n".join(lines) + f"\n\n{about}"


def rendered(text: str, folder: Path) -> str:
    """The text with its tables made from the files as they are. Raises ValueError for a file that cannot be
    read or has no such metric."""

    def table(found: re.Match) -> str:
        path = folder / found[2]
        try:
            results = json.loads(path.read_text())
            new = of_bench(results) if isinstance(results, dict) else of_evaluation(results, found[3].split())
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"no table from {path}: {common.one_line(error)}") from None
        return f"{found[1]}{new}\n{found[4]}"

    return TABLE.sub(table, text)


def main() -> None:
    config = common.parse(Config, __doc__)
    path = Path(config.file)
    old = path.read_text()
    new = rendered(old, path.parent)
    if new != old:
        with common.replacing(path) as temporary:
            temporary.write_text(new)
    print(f"{path}: {len(TABLE.findall(new))} tables{', as they were' if new == old else ''}")


if __name__ == "__main__":
    common.main(main)
