"""The book's central drawing: one network, and the path of the teaching signal under each rule.

python figures/paths.py        writes figures/paths.svg
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from bpfree import style

FORWARD = "#999999"
UP, SIGNAL = 0.0, 1.25  # horizontal places of the activities and of the teaching signals
ACTIVITY = {0: r"$x$", 1: r"$h_1$", 2: r"$h_2$", 3: r"$p$"}

# rule -> (where the signal starts, labels of the arrows into delta_2 and delta_1, chain or
# broadcast, the formula below the panel)
PANELS = {
    "Backprop": ("e", (r"$W_3$", r"$W_2$"), True, r"$\delta_l=\phi'\odot(\delta_{l+1}W_{l+1})$"),
    "FeedbackAlignment": (
        "e", (r"$B_3$", r"$B_2$"), True, r"$\delta_l=\phi'\odot(\delta_{l+1}B_{l+1})$",
    ),
    "SignSymmetry": (
        "e", (r"$\pm S_3$", r"$\pm S_2$"), True,
        r"$\delta_l=\phi'\odot(\delta_{l+1}(\mathrm{sign}\,W_{l+1}\odot S_{l+1}))$",
    ),
    "KolenPollack": (
        "e", (r"$B_3\!\to\! W_3$", r"$B_2\!\to\! W_2$"), True,
        r"as FA, and $\Delta B_l=\Delta W_l$",
    ),
    "DirectFeedbackAlignment": ("e", (r"$D_2$", r"$D_1$"), False, r"$\delta_l=\phi'\odot(e\,D_l)$"),
    "DRTP": ("y", (r"$D_2$", r"$D_1$"), False, r"$\delta_l=\phi'\odot(y\,D_l)$"),
    "PEPITA": None,  # teaches by a second pass: drawn by itself
    "EKDAA": (
        "e", (r"$E_3$", r"$E_2$"), True, r"$\delta_l=h_l-\phi(a_l-\beta\,\delta_{l+1}E_{l+1})$",
    ),
}  # fmt: skip


def node(ax, x: float, y: float, text: str, color: str = "black", size: int = 11) -> None:
    ax.text(
        x, y, text, ha="center", va="center", color=color, fontsize=size, zorder=3,
        bbox=dict(boxstyle="circle,pad=0.25", facecolor="white", edgecolor=color, linewidth=1.1),
    )  # fmt: skip


def arrow(ax, start, end, color, linestyle="-", bend=0.0, width=1.6) -> None:
    ax.annotate(
        "", end, start, zorder=2,
        arrowprops=dict(
            arrowstyle="-|>", color=color, linestyle=linestyle, linewidth=width, shrinkA=11,
            shrinkB=11, connectionstyle=f"arc3,rad={bend}",
        ),
    )  # fmt: skip


def forward_path(ax) -> None:
    for l, text in ACTIVITY.items():
        node(ax, UP, l, text, "#555555")
        if l:
            arrow(ax, (UP, l - 1), (UP, l), FORWARD, width=1.1)
            ax.text(UP - 0.12, l - 0.5, rf"$W_{l}$", ha="right", va="center", color="#555555")
    arrow(ax, (UP, 3), (SIGNAL, 3), FORWARD, width=1.1)


def second_pass(ax, color: str, dashes) -> None:
    """The error goes to the input, and the difference of two activities teaches."""
    node(ax, SIGNAL, 3, "$e$", color)
    arrow(ax, (SIGNAL, 3), (UP + 0.02, 2.5), color, ":", width=1.0)
    arrow(ax, (SIGNAL, 3), (SIGNAL, 0), color, dashes, -0.55)
    ax.text(SIGNAL + 0.97, 1.5, "$F$", va="center", color=color)
    for l, text in enumerate(("x", "h_1", "h_2")):
        node(ax, SIGNAL, l, rf"${text}^{{\mathrm{{err}}}}$", color, size=9)
        if not l:
            continue
        arrow(ax, (SIGNAL, l - 1), (SIGNAL, l), color, dashes)
        ax.text(SIGNAL + 0.1, l - 0.5, rf"$W_{l}$", va="center", color=color)
        middle = (UP + SIGNAL) / 2
        ax.plot((UP + 0.24, SIGNAL - 0.3), (l, l), color=color, linestyle="-", linewidth=1.0)
        node(ax, middle, l, "$-$", color, size=7)
        arrow(ax, (middle, l), (UP + 0.02, l - 0.5), color, ":", width=1.0)


def other_path(ax, rule: str, color: str, dashes) -> None:
    """Teaching signals of their own, from the output down."""
    start, matrices, chain, _ = PANELS[rule]
    target = start == "y"  # the error stays at the output, where it teaches the last block only
    node(ax, SIGNAL, 3, "$e$", "#555555" if target else color)
    arrow(ax, (SIGNAL, 3), (UP + 0.02, 2.5), "#555555" if target else color, ":", width=1.0)
    if target:
        node(ax, SIGNAL + 0.85, 3, "$y$", color)
    for l, matrix in zip((2, 1), matrices, strict=True):
        node(ax, SIGNAL, l, rf"$\delta_{l}$", color)
        source = (SIGNAL + 0.85 * target, 3 if target or not chain else l + 1)
        straight = target or source[1] == l + 1
        arrow(ax, source, (SIGNAL, l), color, dashes, 0.0 if straight else -0.55)
        beside = 0.72 if not straight else -0.4 if target and l == 2 else 0.14
        x, y = (source[0] + SIGNAL) / 2 + beside, (source[1] + l) / 2
        ax.text(x, y, matrix, va="center", color=color)
        # what the signal teaches: the weights into block l
        arrow(ax, (SIGNAL, l), (UP + 0.02, l - 0.5), color, ":", width=1.0)


def panel(ax, rule: str) -> None:
    look = style.line(rule)
    forward_path(ax)
    if PANELS[rule] is None:
        second_pass(ax, look["color"], look["linestyle"])
        formula = r"$\delta_l=h_l-h_l^{\mathrm{err}}$,  $x^{\mathrm{err}}=x+e F^{\!\top}$"
    else:
        other_path(ax, rule, look["color"], look["linestyle"])
        formula = PANELS[rule][-1]
    ax.text(0.75, -0.62, formula, ha="center", va="center", fontsize=9)
    ax.text(0.75, 3.72, style.label(rule), ha="center", va="center", fontweight="bold")
    ax.set(xlim=(-0.75, 2.35), ylim=(-0.85, 3.95), aspect="equal")
    ax.axis("off")


def main() -> None:
    style.use()
    fig, axes = plt.subplots(2, 4, figsize=(11.2, 8.4))
    for ax, rule in zip(axes.flat, PANELS, strict=True):
        panel(ax, rule)
    fig.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
