"""The explorer's content: learning curves and tables of all recorded experiments on one task.

python figures/explorer.py       writes _static/explorer-data.js, which _static/explorer.js draws,
                                 and figures/explorer.md, which explorer.md includes
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from bpfree import recipes, results, style

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100", "svhn": "SVHN", "tiny-imagenet": "Tiny ImageNet",
    "imagenet": "ImageNet",
}  # fmt: skip
CHAPTERS = {  # beginning of the recipes' names -> label, short name
    "mnist": ("ch-feedback", "Feedback alignment"),
    "pepita": ("ch-pepita", "PEPITA"),
    "ekdaa": ("ch-ekdaa", "EKDAA"),
    "lfnn": ("ch-leader-follower", "Leaders and followers"),
    "attention": ("ch-attention", "Next-layer attention"),
    "forward": ("ch-two-more-ways", "Two more ways"),
}
SAME = {"forward-mnist": "lfnn-fc-mnist"}  # network and protocol
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh", "sign": "signum"}
LABELS = {  # ending of the recipe's name -> label, where that of the rule does not say it
    "greedy": "greedy local losses",
    "own-4": "LFNN-l, 4 that see their own units",
    "lfnn-l-100": "LFNN-l, all lead",
    "lfnn-l-100-of-8": "LFNN-l, all of 8 lead",
    "lfnn-l-72": "LFNN-l, 23 of 32 lead",
    "lfnn-l-72-followers": "LFNN-l, 23 of 32 lead, followers taught",
    "lfnn-l-30": "LFNN-l, 10 of 32 lead",
    "lfnn-l-30-followers": "LFNN-l, 10 of 32 lead, followers taught",
    "lfnn-100": "LFNN, all lead",
    "lfnn-72": "LFNN, 23 of 32 lead",
    "lfnn-72-followers": "LFNN, 23 of 32 lead, followers taught",
    "lfnn-30": "LFNN, 10 of 32 lead",
    "lfnn-30-followers": "LFNN, 10 of 32 lead, followers taught",
    "p-1": "attention, p = 1",
    "p-1.5": "attention, p = 1.5",
    "p-3": "attention, p = 3",
    "relative": "attention, shares",
    "pepita-mirrored": "PEPITA, mirrored",
    "pepita-mirrored-first": "PEPITA, mirrored, first pass's activity",
    "released": "PEPITA, released update",
    "summed": "PEPITA, summed over positions",
    "ekdaa-gamma-1": "EKDAA, kernels fixed",
    "fg-a": "forward gradient, activities",
    "fg-w": "forward gradient, weights",
}
# matplotlib's named line styles, and those of a rule's further arms; in line widths
DASHES = {"-": (), "--": (3.7, 1.6), "-.": (6.4, 1.6, 1, 1.6), ":": (1, 1.65)}
MORE = [
    (), (1, 2), (9, 2, 1, 2), (4, 4), (9, 2, 1, 2, 1, 2), (14, 4), (9, 2, 1, 2, 1, 2, 1, 2),
    (9, 2, 9, 2, 1, 2), (1, 7), *((3 * n, 3, 1, 3) for n in range(5, 15)),
]  # fmt: skip


def group(recipe: dict) -> tuple[str, str]:
    """Experiment and arm: what the recipe's name says before and after its data set."""
    head, data, arm = recipe["name"].partition(recipe["data"])
    if not head:  # mnist-fc-bp
        kind, _, arm = arm[1:].partition("-")
        return f"{data}-{kind}", arm
    return SAME.get(head + data, head + data), arm[1:]


def experiments(least: int = 2) -> dict[str, dict[str, dict]]:
    """{experiment: {arm: record}}, chapter by chapter: all but sequences of tasks, and
    experiments of which fewer than ``least`` arms are recorded."""
    found: dict[str, dict[str, dict]] = {}
    for name in recipes.RECIPES:
        if not name.startswith("continual") and results.path(name).exists():
            record = results.read(name)
            experiment, arm = group(record["recipe"])
            found.setdefault(experiment, {})[arm] = record
    # backprop first, what is taught nothing last
    order = ["Backprop", *(r for r in style.RULES if r not in ("Backprop", "Frozen")), "Frozen"]
    rank = {rule: n for n, rule in enumerate(order)}
    for experiment, arms in found.items():
        by_rule = sorted(arms.items(), key=lambda a: rank.get(a[1]["recipe"]["rule"], len(rank)))
        found[experiment] = dict(by_rule)
    chapters = list(CHAPTERS)
    return {
        name: found[name]
        for name in sorted(found, key=lambda name: chapters.index(name.partition("-")[0]))
        if len(found[name]) >= least
    }


def hidden(recipe: dict) -> list[int] | None:
    """Widths of its hidden blocks; None for a network that is known by its name."""
    kind, args, _ = recipe["network"]
    parts = {"mlp": lambda: args[1:-1], "convnet": lambda: [n for part in args[1:] for n in part]}
    return parts[kind]() if kind in parts else None


def activation(recipe: dict) -> str:
    return ACTIVATIONS[recipe["network"][2].get("activation", "relu")]


def title(recipe: dict) -> str:
    """Data set, network and epochs."""
    kind, args, keywords = recipe["network"]
    widths = hidden(recipe)
    shape = str(args[0] if kind == "torchvision_model" else kind).replace("resnet", "ResNet-")
    if widths:
        rows = [widths] if kind == "mlp" else args[1:]
        names = [""] if kind == "mlp" else ["conv ", "then "]
        shape = ", ".join(
            name + ", ".join(f"{n:,}" for n in row)
            for name, row in zip(names, rows, strict=False)
        )  # fmt: skip
        shape += f" {activation(recipe)}{', dropout' * ('dropout' in keywords)}"
    return f"{DATA[recipe['data']]}: {shape}, {recipe['epochs']} epochs"


def labels(arms: dict[str, dict]) -> list[str]:
    """Rule, and what it has of its own beside the experiment's first arm."""
    first, found = next(iter(arms.values()))["recipe"], []
    for arm, record in arms.items():
        recipe = record["recipe"]
        label = LABELS.get(arm.removesuffix("-shifts")) or style.label(recipe["rule"])
        if hidden(recipe) is not None and activation(recipe) != activation(first):
            label += f", {activation(recipe)}"
        widths = hidden(recipe)
        if widths is not None and len(widths) != len(hidden(first) or []):
            label += f", {len(widths)} hidden layer{'s' * (len(widths) > 1)}"
        if recipe.get("shifts", 0) != first.get("shifts", 0):
            label += ", images shifted"
        if rate := re.search(r"-rate-([\d.]+)$", arm):
            label += f", rate {rate[1]}"
        found.append(f"{label}, {arm.replace('-', ' ')}" if label in found else label)
    return found


def curves(record: dict) -> dict[str, list[float]]:
    """Mean, and sd of several, at each epoch; of the seeds that did not diverge, if there are any,
    else of all as far as each goes."""
    runs = list(record["runs"].values())
    kept = [r["test_accuracy"] for r in runs if r["diverged"] is None]
    kept = kept or [[v for v in r["test_accuracy"] if v is not None] for r in runs]
    epochs = list(zip(*kept, strict=False))
    found = {"mean": [round(statistics.fmean(e), 2) for e in epochs]}
    return found | ({"sd": [round(statistics.stdev(e), 2) for e in epochs]} if kept[1:] else {})


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two line styles of one colour are hard to tell apart."""
    return len(one) == len(other) and abs(sum(one) - sum(other)) < 2.5


def drawn(arms: dict[str, dict]) -> list[dict]:
    """Each arm as the script draws it. Its line is the rule's; further arms of a rule have the
    rule's colour and a line style of their own."""
    found, used = [], {}  # used: colour -> line styles
    for (arm, record), label in zip(arms.items(), labels(arms), strict=True):
        look = style.line(record["recipe"]["rule"])
        dash, taken = look["linestyle"], used.setdefault(look["color"], [])
        dash = DASHES[dash] if isinstance(dash, str) else dash[1]
        if taken:
            dash = next(d for d in MORE if not any(alike(d, t) for t in taken))
        taken.append(dash)
        kept = len(results.final(record))
        found.append({
            "id": arm, "label": label, "colour": look["color"], "dash": list(dash),
            "first": len(taken) == 1, "seeds": kept, "lost": len(record["runs"]) - kept,
            "paper": record["recipe"]["paper"], **curves(record),
        })  # fmt: skip
    return found


def data() -> str:
    """The script that sets ``explorerData``."""
    content = []
    for name, arms in experiments().items():
        content.append({
            "id": name, "title": title(next(iter(arms.values()))["recipe"]),
            "chapter": CHAPTERS[name.partition("-")[0]][1], "arms": drawn(arms),
        })  # fmt: skip
    lines = ",\n".join(json.dumps(each, separators=(",", ":")) for each in content)
    head = "// Written by figures/explorer.py from figures/results; see explorer.js."
    return f"{head}\nglobalThis.explorerData = [\n{lines}\n];\n"


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def page() -> str:
    """One table for each experiment, as MyST."""
    parts = []
    for name, arms in experiments().items():
        recipe = next(iter(arms.values()))["recipe"]
        about = f"{{ref}}`{CHAPTERS[name.partition('-')[0]][0]}`; batches of "
        about += span([r["recipe"]["batch_size"] for r in arms.values()])
        rows = ["| rule | learning rate | seeds | test accuracy, % | paper, % |",
                "|---|--:|--:|--:|--:|"]  # fmt: skip
        for record, label in zip(arms.values(), labels(arms), strict=True):
            its, final = record["recipe"], results.final(record)
            lost = len(record["runs"]) - len(final)
            seeds = f"{len(final)}{f' (+ {lost} diverged)' if lost else ''}"
            rows.append(f"| {label} | {its['lr']:g} | {seeds} | {results.spread(final)} "
                        f"| {its['paper'] or '–'} |")  # fmt: skip
        table = "\n".join([":::{table}", ":class: landing", "", *rows, ":::"])
        parts.append(f"### {title(recipe)}\n\n{about}.\n\n{table}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "_static" / "explorer-data.js").write_text(data())
    Path(__file__).with_suffix(".md").write_text(page())
