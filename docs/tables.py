"""Rewrites the tables in README.md and docs/*.md from the results files that they name.

    python eval.py --out docs/results.json && python docs/tables.py
    python bench.py --json docs/bench.json && python docs/tables.py

A table stands between `<!-- table FILE [PREFIX ...] -->` and `<!-- end -->`, and below it the command and the
date. FILE is relative to the Markdown file's folder. The prefixes select metrics of an evaluation's file.
For nano.claims, FILE is the folder, and `short` lists the claims by verdict.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import flag  # noqa: E402
from nano import claims  # noqa: E402

TABLE = re.compile(r"(<!-- table (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
BENCH_COLUMNS = {  # head: key, format
    "ms": ("ms", ".1f"),
    "images/s": ("images_per_second", ".1f"),
    "GFLOP per image": ("gflop_per_image", ".2f"),
    "of a matrix product": ("of_matrix_product", ".0%"),
    "MFU": ("mfu", ".1%"),
    "GB": ("peak_gb", ".1f"),
    "times eager": ("of_eager", ".2f"),
}


@dataclass
class Config:
    files: list[str] = flag((), "Markdown files (default: README.md and docs/*.md)", nargs="*")


def eval_table(file: dict, prefixes: tuple[str, ...]) -> str:
    rows = [row for row in file["results"] if row["metric"].startswith(prefixes or "")]
    if not rows:
        raise ValueError(f"no metric begins with {' or '.join(prefixes)}")
    n = ", ".join(map(str, sorted({row["n"] for row in rows})))
    versions, date, command = file["versions"], file["date"][:10], f"`{file['command']}`"
    return f"{common.table(rows)}\n\n{command}, torch {versions['torch']}, {date}; n = {n}"


def bench_table(file: dict) -> str:
    lines = [f"| loop | {' | '.join(BENCH_COLUMNS)} |", "|---" * (len(BENCH_COLUMNS) + 1) + "|"]
    for name, row in file["results"].items():
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in BENCH_COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"`{file['command']}`: {file['where']}, {file['card']}, {file['threads']} threads, torch "
              f"{file['torch']}, {file['date']}; a product of large matrices "
              f"{1000 * file['matrix_product_tflops']:.0f} GFLOP/s"]  # fmt: skip
    return "\n".join(lines)


def update(text: str, folder: Path) -> str:
    """The text with every table made anew. Raises ValueError for a file that cannot be read or has no such
    metric."""

    def replace(match: re.Match) -> str:
        start, name, prefixes, end = match.groups()
        try:
            if not Path(name).suffix:  # the folder of nano.claims
                table = (claims.summary if "short" in prefixes else claims.table)(folder / name)
                return f"{start}{table}\n{end}"
            file = json.loads((folder / name).read_text())
            is_bench = isinstance(file["results"], dict)
            table = bench_table(file) if is_bench else eval_table(file, tuple(prefixes.split()))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no table from {folder / name}: {common.one_line(error)}") from None
        return f"{start}{table}\n{end}"

    return TABLE.sub(replace, text)


def main() -> None:
    config = common.parse(Config, __doc__)
    paths = [Path(file) for file in config.files] or [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for path in paths:
        old = path.read_text()
        new = update(old, path.parent)
        if new != old:
            path.write_text(new)
        print(f"{path}: {len(TABLE.findall(new))} tables{'' if new != old else ', unchanged'}")


if __name__ == "__main__":
    common.main(main)
