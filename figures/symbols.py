"""The index of symbols: every row of the pages' own tables, by letter, with a link to its page.

python figures/symbols.py        writes figures/symbols.md, which glossary.md includes
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

TEXT = Path(__file__).resolve().parent.parent / "chapters" / "text"
HEAD = ("symbol", "meaning", "shape", "name in code", "page")
LETTERS = "a b c d e f g h i j k l ell m n o p q r s t u v w x y z".split()
LETTERS += """alpha beta gamma delta varepsilon zeta eta theta kappa lambda mu pi rho sigma varphi
    omega""".split()
# what may stand before the letter that a symbol is looked up by
DRESS = r"\\(mathbb|mathcal|mathrm|bar|tilde|dot|hat|lVert|langle|operatorname)|[{}(\[$ ]"


def letter(symbol: str) -> tuple[int, str]:
    """The place in the index: Latin letters, then Greek ones, then the rest; upper case first."""
    bare = re.sub(rf"^({DRESS})+", "", symbol)
    found = re.match(r"\\([A-Za-z]+)|([A-Za-z])", bare)
    name = (found[1] or found[2]) if found else ""
    known = name.lower() in LETTERS
    return LETTERS.index(name.lower()) if known else len(LETTERS), bare


def cells(line: str) -> list[str]:
    """A row of a table; a bar in mathematics is written \\lvert, so every bar parts cells."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> Iterator[tuple[str, list[str]]]:
    """The label and a row of each table of symbols of a page, in the order of its columns."""
    label, columns = "", []
    for line in text.splitlines():
        if found := re.match(r"\((.+)\)=$", line):
            label = found[1]
        if not line.startswith("|"):
            columns = []
        elif cells(line)[0] in ("symbol", "letter") and cells(line)[1] == "meaning":
            columns = cells(line)
        elif columns and not line.startswith("|-"):
            yield label, cells(line) + [""] * (4 - len(columns))


def page() -> str:
    """The table, as MyST."""
    found = []
    for file in sorted(TEXT.glob("*/*.md")):
        text = file.read_text()
        title = re.search(r"^# ([^:\n]+)", text, flags=re.M)[1]
        for label, row in tables(text):
            said = title.partition(", ")[0] + ", theory" * file.stem.endswith("_theory")
            found.append([*row, f"{{ref}}`{said} <{label}>`"])
    rows = [HEAD, ["---"] * len(HEAD), *sorted(found, key=lambda row: letter(row[0]))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f":::{{table}}\n:class: symbols\n\n{table}\n:::\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
