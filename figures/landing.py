"""The landing page's table: rules by data sets, from the recorded runs.

python figures/landing.py        writes figures/landing.md, which intro.md includes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bpfree import results, style

# beginning of the recipes' names, which share network and protocol -> (data set, chapter)
COLUMNS = {
    "mnist-fc": ("MNIST", "ch-feedback"),
    "pepita-fc-mnist": ("MNIST", "ch-pepita"),
    "ekdaa-fc-fashion-mnist": ("Fashion-MNIST", "ch-ekdaa"),
    "ekdaa-fc-cifar10": ("CIFAR-10", "ch-ekdaa"),
    "pepita-conv-cifar10": ("CIFAR-10", "ch-pepita"),
}
ROWS = {  # ending of the recipe's name -> rule
    "bp": "Backprop",
    "fa": "FeedbackAlignment",
    "sign-symmetry": "SignSymmetry",
    "dfa": "DirectFeedbackAlignment",
    "drtp": "DRTP",
    "pepita": "PEPITA",
    "ekdaa": "EKDAA",
    "frozen": "Frozen",
}
NAMES = {
    "Backprop": "backprop (BP)",
    "FeedbackAlignment": "feedback alignment (FA)",
    "DirectFeedbackAlignment": "direct feedback alignment (DFA)",
}
ACTIVATION = {"relu": "ReLU", "tanh": "tanh"}


def record(column: str, row: str) -> dict | None:
    """The recorded runs of a cell; None where there are none."""
    name = f"{column}-{row}"
    return results.read(name) if results.path(name).exists() else None


def cell(column: str, row: str) -> str:
    """Test accuracy, mean and sd over seeds; a dash where nothing was recorded."""
    found = record(column, row)
    return results.spread(results.final(found)) if found else "–"


def span(numbers: Sequence[int], noun: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low} to {high} {noun}s" if low < high else f"{low} {noun}{'s' * (low > 1)}"


def head(column: str) -> str:
    """Data set, which leads to the chapter, hidden layers, epochs and seeds of a column."""
    found = [r for row in ROWS if (r := record(column, row))]
    (data, chapter), bp = COLUMNS[column], found[0]["recipe"]
    kind, args, keywords = bp["network"]
    hidden = args[1:-1] if kind == "mlp" else args[1]
    shape = f"{'conv ' * (kind == 'convnet')}{', '.join(f'{n:,}' for n in hidden)}"
    shape += f" {ACTIVATION[keywords['activation']]}{', dropout' * ('dropout' in keywords)}"
    seeds = span([len(r["runs"]) for r in found], "seed")
    return f"{{ref}}`{data} <{chapter}>`<br>{shape}<br>{bp['epochs']} epochs<br>{seeds}"


def page() -> str:
    """The table, as MyST."""
    rows = [["test accuracy, %", *map(head, COLUMNS)], ["---", *["--:"] * len(COLUMNS)]]
    for row, rule in ROWS.items():
        name = NAMES.get(rule, style.label(rule))
        rows.append([name, *(cell(column, row) for column in COLUMNS)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f":::{{table}}\n:class: landing\n\n{table}\n:::\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page())
