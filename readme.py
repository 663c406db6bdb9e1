"""The generated parts of README.md, from recorded runs, presets and the files themselves.

    python readme.py            writes them between the "table" and "end" comments
"""

import ast
import re
from pathlib import Path

from checkpoint import write_atomically
from errors import UserError, run
from evaluation_records import records_under, table
from presets import PRESETS

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"


def headline():
    return table(records_under([HERE / "results" / "embedded"]))


def presets():
    rows = []
    for (dataset, method, stage, variant), p in PRESETS.items():
        if dataset != "digits":
            fid = "-" if p.paper_fid is None else f"{p.paper_fid:.2f}"
            cells = [dataset, method, str(stage), variant or "-", p.source, p.gpus,
                     str(p.config.batch), f"{p.config.iterations:,}", f"{p.images / 1e6:,.0f}M",
                     fid, "no"]
            rows.append(f"| {' | '.join(cells)} |")
    head = ["dataset", "method", "stage", "variant", "source", "authors' hardware", "batch",
            "iterations", "images", "paper's FID", "run here"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def files():
    """Every script with the first line of what it says of itself."""
    rows = []
    for path in sorted(HERE.glob("*.py")):
        line = ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
        rows.append(f"| `{path.name}` | {line} |")
    return "\n".join(["| file | |", "|---|---|", *rows])


TABLES = {"headline": headline, "presets": presets, "files": files}


def filled(text):
    """The README with every table made again."""
    def block(match):
        name = match[1]
        if name not in TABLES:
            raise UserError(f"README.md asks for a table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main():
    text = filled(README.read_text())
    write_atomically(README, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run(main)
