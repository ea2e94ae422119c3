"""The book's drawings of rules: one network, and the path of the teaching signal under each.

python figures/paths.py        writes figures/paths.svg, all rules, and paths-NAME.svg,
                               for the stories and the landing page
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

from bpfree import style

# lengths are pixels of the drawing at its own size, y upwards
PIXEL = 0.72  # points
WIDTH, STEP, RADIUS = 190, 56, 14  # of a panel, of a block, of a node
UP, MIDDLE, SIGNAL = 36, 79, 122  # columns: activities, differences, teaching signals
GREY, INK = "#8A8A8A", "#444444"
ACTIVITY = ("$x$", "$h_1$", "$h_2$", "$p$")
SYMBOLS = r"$x$ input    $h$ hidden    $p$ output    $e=p-y$ error"

# rule -> (matrices of blocks 2 and 1, what happens in a few words, the formula)
RULES = {
    "Backprop": (
        ("$W_3$", "$W_2$"), "the error goes down\nthrough the weights",
        r"$\delta_l=\phi'\odot(\delta_{l+1}W_{l+1})$",
    ),
    "FeedbackAlignment": (
        ("$B_3$", "$B_2$"), "the same way, through\nfixed random matrices",
        r"$\delta_l=\phi'\odot(\delta_{l+1}B_{l+1})$",
    ),
    "SignSymmetry": (
        (r"$\pm S_3$", r"$\pm S_2$"), "the same way, only the\nweights' signs are read",
        r"$B_l=\mathrm{sign}\,W_l\odot S_l$",
    ),
    "KolenPollack": (
        (r"$B_3$", r"$B_2$"), "the same way, and each\nB learns with its W",
        r"$\Delta B_l=\Delta W_l$",
    ),
    "DirectFeedbackAlignment": (
        ("$D_2$", "$D_1$"), "straight to each block,\nfixed random matrices",
        r"$\delta_l=\phi'\odot(e\,D_l)$",
    ),
    "DRTP": (
        ("$D_2$", "$D_1$"), "straight to each block,\nthe target, no error",
        r"$\delta_l=\phi'\odot(y\,D_l)$",
    ),
    "PEPITA": (
        (), "to the input: a second\npass forward teaches", r"$\delta_l=h_l-h_l^{\mathrm{err}}$",
    ),
    "EKDAA": (
        ("$E_3$", "$E_2$"), "error kernels move each\nactivity to a target",
        r"$\delta_l=h_l-\phi(a_l-\beta\,\delta_{l+1}E_{l+1})$",
    ),
    "LeaderFollower": (
        (), "each block's own heads\nteach it, none above it",
        r"$\delta_l=\phi'\odot\sum_w q_w V_w$",
    ),
    "NextLayerAttention": (
        (r"$\alpha'(W_3)$", r"$\alpha'(W_2)$"), "each neuron seeks the\nnext layer's attention",
        r"$\delta_l=\phi'\odot(\delta_{l+1}\,\alpha'(W_{l+1}))$",
    ),
}  # fmt: skip

# what stands beside a panel drawn alone: a title, and what its marks mean
STEPS = {
    "Backprop": (
        "What backprop asks for",
        ("transposed weights", "the way back reads every $W$ of the way up"),
        ("a backward phase", "a second sweep, in which nothing else happens"),
        ("stored activities", "kept, and no weight moved, until the error is back"),
        ("a global error", "one vector $e$, on which every block depends"),
    ),
    "PEPITA": (
        "Twice forward, never back",
        ("first pass", "the network answers; the error is $e=p-y$"),
        ("to the input", r"$x^{\mathrm{err}}=x+e\,F^{\top}$, with a fixed random $F$"),
        ("second pass", "the same weights, from the changed input"),
        ("difference", r"each block learns from $\delta_l=h_l-h_l^{\mathrm{err}}$"),
    ),
    "EKDAA": (
        "Targets, no derivative",
        ("error kernels", "$E_l$ in the place of $W_l$; they learn beside the weights"),
        ("target", r"what a unit should have said: $h_l^{*}=\phi(a_l-\beta\,\delta_{l+1}E_{l+1})$"),
        ("difference", r"what it said minus the target: $\delta_l=h_l-h_l^{*}$"),
    ),
    "LeaderFollower": (
        "A loss of its own in every block",
        ("workers", "heads of the block; each reads $h_l$ and scores the classes"),
        ("leaders", "on each sample the few who do best; the label $y$ teaches them"),
        ("followers", "the others; the scores of the best teach them"),
        ("walls", "only activity leaves a block, upwards"),
    ),
    "NextLayerAttention": (
        "To be heard by the next layer",
        ("the audience learns", r"neuron $j$ above moves its synapses by its own $\delta_j$"),
        ("attention", r"what all of them pay to neuron $i$: $A_i=\sum_j\alpha(w_{ji})$"),
        ("best response", r"for more of it, $h_i$ moves against $\sum_j\alpha'(w_{ji})\,\delta_j$"),
    ),
    "ForwardGradient": (
        "Guess, and hear how well it did",
        ("guess", "a random direction $U_l$ for each activity, or each weight"),
        ("carried up", "what it would change above, through the same weights"),
        ("slope", "one number $d$ for each sample: what it would do to the loss"),
        ("teach", r"$\delta_l=d\,U_l$: back along a bad guess, on along a good one"),
    ),
}  # fmt: skip
MARKS = {  # where 1, 2, ... are, in columns and blocks; a kind of worker is its own mark
    "Backprop": ((SIGNAL + 46, 1.5), (SIGNAL - 20, 2.42), (UP - 26, 1), (SIGNAL + 26, 3)),
    "PEPITA": ((UP - 26, 3), (SIGNAL + 52, 2.35), (SIGNAL - 18, 0.5), (MIDDLE, 2.36)),
    "EKDAA": ((SIGNAL + 36, 2.5), (SIGNAL + 28, 2), (MIDDLE, 2.4)),
    "LeaderFollower": ((SIGNAL + 68, 2), "leads", "follows", (SIGNAL + 68, 1.28)),
    "NextLayerAttention": ((SIGNAL + 26, 3), (UP - 44, 2.5), (SIGNAL + 72, 2.5)),
    "ForwardGradient": ((SIGNAL, 0.5), (MIDDLE + 15, 1.5), (SIGNAL + 26, 3), (SIGNAL + 58, 2)),
}


class Drawing:
    """A sheet of paper of so many pixels."""

    def __init__(self, width: float, height: float) -> None:
        style.use()
        fig = plt.figure(figsize=(width / 100, height / 100), layout="none")
        self.ax = fig.add_axes((0, 0, 1, 1))
        self.ax.set(xlim=(0, width), ylim=(0, height))
        self.ax.axis("off")
        self.fig = fig

    def text(self, x, y, text, color="black", size=14, ha="center", va="center", **kw) -> None:
        self.ax.text(x, y, text, color=color, fontsize=size * PIXEL, ha=ha, va=va, **kw)

    def node(self, x, y, text, color, size=15, radius=RADIUS) -> None:
        look = dict(facecolor="white", edgecolor=color, linewidth=1.2, zorder=3, clip_on=False)
        self.ax.add_patch(Circle((x, y), radius, **look))
        self.text(x, y - 0.5, text, dark(color), size, zorder=4)

    def mark(self, x, y, number) -> None:
        self.ax.add_patch(
            Circle((x, y), 9, facecolor=INK, edgecolor="none", zorder=3, clip_on=False)
        )
        self.text(x, y - 0.5, str(number), "white", 12, fontweight="bold", zorder=4)

    def arrow(self, start, end, color, dashes="-", width=2.0, gaps=(16, 16)) -> None:
        shrink = dict(shrinkA=gaps[0] * PIXEL, shrinkB=gaps[1] * PIXEL)
        self.head(color, dashes, width, posA=start, posB=end, **shrink)

    def around(self, start, end, color, dashes) -> None:
        """An arrow that leaves a node to the right and enters another from the right."""
        (x, y), (_, low) = start, end
        points = [(x + 16, y), (x + 46, y), (x + 46, low), (x + 18, low)]
        bow = Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3])
        self.head(color, dashes, 2.0, path=bow)

    def head(self, color, dashes, width, **kw) -> None:
        look = dict(color=color, linestyle=dashes, linewidth=width, zorder=2, clip_on=False)
        self.ax.add_patch(FancyArrowPatch(arrowstyle="-|>", mutation_scale=10, **look, **kw))

    def teaches(self, start, block: int, x: float, y: float, color, gap=15) -> None:
        """A dotted arrow to the weights into a block."""
        end = (x + UP, y + (block - 0.5) * STEP)
        self.arrow(start, end, color, (0, (1, 1.4)), width=1.3, gaps=(gap, 5))

    def worker(self, x, y, color, leads: bool) -> None:
        look = dict(facecolor=color if leads else "white", edgecolor=color, linewidth=1.2)
        self.ax.add_patch(Circle((x, y), 6.5, **look, zorder=3, clip_on=False))

    def walls(self, x, y, width, height, color) -> None:
        pale = [1 - 0.12 * (1 - c) for c in to_rgb(color)]
        look = dict(facecolor=pale, edgecolor=color, linewidth=0.9, zorder=0, clip_on=False)
        round_ = "round,pad=0,rounding_size=8"
        self.ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=round_, **look))

    def follows(self, start, end, color) -> None:
        """A thin bow from a follower to the best worker, above those between them."""
        look = dict(color=color, linestyle="-", linewidth=0.9, zorder=2, clip_on=False)
        bow = dict(connectionstyle="arc3,rad=0.26", shrinkA=4.5, shrinkB=5)
        self.ax.add_patch(
            FancyArrowPatch(start, end, arrowstyle="->", mutation_scale=6, **bow, **look)
        )

    def save(self, name: str) -> None:
        svg = io.StringIO()
        self.fig.savefig(svg, format="svg", metadata={"Date": None})
        plt.close(self.fig)
        Path(__file__).with_name(f"{name}.svg").write_text(small(svg.getvalue()))


def dark(color: str) -> tuple[float, ...]:
    """The colour for text, with the contrast that small letters need on white."""
    r, g, b = to_rgb(color)
    light = 0.2126 * r + 0.7152 * g + 0.0722 * b
    return tuple(c * min(1.0, 0.36 / light) if light else 0.0 for c in (r, g, b))


def small(svg: str) -> str:
    """The same drawing in half the bytes: two decimals, no comments, short names of glyphs."""
    for pattern, new in (
        (r"<!--.*?-->|stroke-dashoffset: 0; ?", ""),
        (r"\b([1-9]\d*\.\d\d)\d+", r"\1"),
        (r"\s*\n\s*(?=[A-Zz\"])", " "),
        (r"\n\s+", "\n"),
        ("DejaVuSans-", "g"),
    ):
        svg = re.sub(pattern, new, svg)
    return svg


def up(draw: Drawing, x: float, y: float) -> None:
    """The network and its first pass, the same in every panel."""
    for l, text in enumerate(ACTIVITY):
        draw.node(x + UP, y + l * STEP, text, INK)
        if l:
            draw.arrow((x + UP, y + (l - 1) * STEP), (x + UP, y + l * STEP), GREY, width=1.5)
            draw.text(x + UP - 8, y + (l - 0.55) * STEP, f"$W_{l}$", INK, ha="right")
    draw.arrow((x + UP, y + 3 * STEP), (x + SIGNAL, y + 3 * STEP), GREY, width=1.5)


def down(draw: Drawing, rule: str, x: float, y: float, color, dashes) -> None:
    """Teaching signals of their own, block by block or straight from the output."""
    target, direct = rule == "DRTP", rule in ("DRTP", "DirectFeedbackAlignment")
    top = (x + SIGNAL, y + 3 * STEP)
    source = (top[0] + 40, top[1]) if target else top
    mine = INK if target else color  # DRTP's error stays at the output, and teaches it only
    draw.node(*top, "$e$", mine)
    draw.teaches(top, 3, x, y, mine)
    if target:
        draw.node(*source, "$y$", color)
    for l, matrix in zip((2, 1), RULES[rule][0], strict=True):
        here = (x + SIGNAL, y + l * STEP)
        start = source if direct else (here[0], here[1] + STEP)
        bent = direct and not target and l == 1
        (draw.around if bent else draw.arrow)(start, here, color, dashes)
        side, height = (42, STEP) if bent else (8, STEP / 2)
        if target:
            side, height = (11, STEP / 2 + 1) if l == 2 else (26, STEP - 6)
        ha = "right" if target and l == 2 else "left"
        draw.text(here[0] + side, here[1] + height, matrix, dark(color), ha=ha)
        draw.node(*here, rf"$\delta_{l}$", color)
        draw.teaches(here, l, x, y, color)


def twice(draw: Drawing, x: float, y: float, color, dashes) -> None:
    """PEPITA: the error goes to the input, and the difference of two activities teaches."""
    top, bottom = (x + SIGNAL, y + 3 * STEP), (x + SIGNAL, y)
    draw.node(*top, "$e$", color)
    draw.teaches(top, 3, x, y, color)
    draw.around(top, bottom, color, dashes)
    draw.text(x + SIGNAL + 44, y + 1.5 * STEP, "$F$", dark(color), ha="left")
    for l, text in enumerate(("x", "h_1", "h_2")):
        here = (x + SIGNAL, y + l * STEP)
        draw.node(*here, rf"${text}^{{\mathrm{{err}}}}$", color, 11.5, 15)
        if l:
            draw.arrow((here[0], here[1] - STEP), here, color, dashes)
            draw.text(here[0] + 8, here[1] - STEP / 2, f"$W_{l}$", dark(color), ha="left")
            difference(draw, l, "$-$", x, y, color)


def targets(draw: Drawing, x: float, y: float, color, dashes) -> None:
    """EKDAA: the feedback makes a target, and the activity minus the target teaches."""
    start = (x + SIGNAL, y + 3 * STEP)
    draw.node(*start, "$e$", color)
    draw.teaches(start, 3, x, y, color)
    for l, matrix in zip((2, 1), RULES["EKDAA"][0], strict=True):
        here = (x + SIGNAL, y + l * STEP)
        draw.arrow(start, here, color, dashes)
        draw.text(here[0] + 9, here[1] + STEP / 2, matrix, dark(color), ha="left")
        draw.node(*here, f"$h_{l}^{{*}}$", color, 13)
        difference(draw, l, rf"$\delta_{l}$", x, y, color)
        start = (x + MIDDLE, here[1])


def crowds(draw: Drawing, x: float, y: float, color, dashes) -> None:
    """LFNN-l: in each hidden block workers of its own make the signal, and nothing crosses."""
    draw.node(x + SIGNAL, y + 3 * STEP, "$e$", color)
    draw.teaches((x + SIGNAL, y + 3 * STEP), 3, x, y, color)
    for l in (1, 2, 3):
        draw.walls(x + 3, y + (l - 1) * STEP + 17, 170, STEP - 2, color)
    for l in (1, 2):
        middle, low = y + l * STEP, y + l * STEP - 24
        draw.arrow((x + UP, middle), (x + MIDDLE, middle), GREY, width=1.5, gaps=(15, 4))
        delta, first = (x + MIDDLE + 29, low), (x + MIDDLE + 5, middle)
        for w in range(4):  # two lead, two follow the first
            here = (first[0] + 24 * w, middle)
            draw.worker(*here, color, leads=w < 2)
            draw.arrow(here, delta, color, dashes, width=1.6, gaps=(8, 10))
            if w > 1:
                draw.follows(here, first, color)
        draw.text(x + 161, low, "$y$", INK)
        draw.arrow((x + 161, low), delta, GREY, width=1.5, gaps=(8, 11))
        draw.node(*delta, rf"$\delta_{l}$", color, 12, 10)
        draw.teaches(delta, l, x, y, color, gap=11)


def guesses(draw: Drawing, x: float, y: float, color, dashes) -> None:
    """Forward gradient: a guess is carried up, and comes back as one number."""
    top = (x + SIGNAL, y + 3 * STEP)
    draw.node(*top, "$d$", color)
    for l in (1, 2):
        guess, carried = (x + SIGNAL, y + l * STEP), (x + MIDDLE, y + l * STEP)
        draw.arrow(guess, carried, color, width=1.2, gaps=(15, 11))
        draw.arrow(carried, top if l == 2 else (carried[0], carried[1] + STEP), color, width=1.2,
                   gaps=(11, 15 if l == 2 else 11))  # fmt: skip
        draw.node(*carried, f"$h'_{l}$", color, 11.5, 10)
        draw.node(*guess, f"$U_{l}$", color, 13)
        (draw.arrow if l == 2 else draw.around)(top, guess, color, dashes)
        draw.teaches(guess, l, x, y, color)


def difference(draw: Drawing, l: int, text: str, x: float, y: float, color) -> None:
    here, radius = (x + MIDDLE, y + l * STEP), 8 if text == "$-$" else 12
    for column in (UP, SIGNAL):
        draw.ax.plot(
            (x + column, here[0]), (here[1],) * 2, color=color, linestyle="-", lw=1.2, clip_on=False
        )
    draw.node(*here, text, color, 13, radius)
    draw.teaches(here, l, x, y, color, gap=radius + 1)


def panel(draw: Drawing, rule: str, x: float, y: float) -> None:
    """A rule's network and signals, with the input's node at height ``y``."""
    look = style.line(rule)
    color, dashes = look["color"], look["linestyle"]
    up(draw, x, y)
    if rule == "PEPITA":
        twice(draw, x, y, color, dashes)
    elif rule == "EKDAA":
        targets(draw, x, y, color, dashes)
    elif rule == "LeaderFollower":
        crowds(draw, x, y, color, dashes)
    elif rule == "ForwardGradient":
        guesses(draw, x, y, color, dashes)
    else:
        down(draw, rule, x, y, color, dashes)


def legend(draw: Drawing, rule: str, width: float) -> None:
    """What arrows and letters mean, in one line if it holds them."""
    look, x = style.line(rule), 12
    entries = (
        ("activity, forward", GREY, "-", 1.5, 191),
        ("thick: teaching signal", look["color"], look["linestyle"], 2.0, 219),
        ("the weights it teaches", look["color"], (0, (1, 1.4)), 1.3, 0),
    )
    for text, color, dashes, thick, wide in entries:
        draw.arrow((x, 14), (x + 34, 14), color, dashes, width=thick, gaps=(0, 0))
        draw.text(x + 41, 14, text, INK, 13, ha="left")
        x += wide
    one_line = width > 900
    draw.text(width - 12 if one_line else 12, 14 if one_line else 36, SYMBOLS, INK, 13,
              ha="right" if one_line else "left")  # fmt: skip


def beside(name: str, rows: list[list[str]], formulas: bool = True) -> None:
    """Panels side by side, one rule each."""
    width, below = WIDTH * len(rows[0]), 38 + 24 * formulas
    height, foot = 3 * STEP + 94 + below, 28 if len(rows[0]) > 4 else 48
    draw = Drawing(width, height * len(rows) + foot)
    for j, rules in enumerate(reversed(rows)):
        low = foot + j * height
        for i, rule in enumerate(rules):
            x, middle = i * WIDTH + 8, (i + 0.5) * WIDTH - 2
            y = low + below + 38
            panel(draw, rule, x, y)
            color = dark(style.line(rule)["color"])
            draw.text(middle, y + 3 * STEP + 32, style.label(rule), color, 17, fontweight="bold")
            if formulas:
                draw.text(middle, y - 34, RULES[rule][-1], size=13)
            draw.text(middle, low + 40, RULES[rule][1], INK, 13, va="top", linespacing=1.25)
            if i:
                ends = (low + 10, y + 3 * STEP + 40)
                draw.ax.plot((i * WIDTH,) * 2, ends, color="#DDDDDD", ls="-", lw=1, clip_on=False)
    legend(draw, rows[0][0], width)
    draw.save(name)


def alone(name: str, rule: str) -> None:
    """One panel, with marks that are explained beside it."""
    draw = Drawing(760, 3 * STEP + 110)
    panel(draw, rule, 30, 80)
    marks, number = [], 0
    for place in MARKS[rule]:
        number += not isinstance(place, str)
        marks.append(place if isinstance(place, str) else number)
        if marks[-1] == number:
            draw.mark(30 + place[0], 80 + place[1] * STEP, number)
    x, y = 290, 3 * STEP + 84
    title, *steps = STEPS[rule]
    color = dark(style.line(rule)["color"])
    draw.text(x - 10, y, title, color, 17, ha="left", fontweight="bold")
    for mark, (head, said) in zip(marks, steps, strict=True):
        y -= 43
        if isinstance(mark, str):
            draw.worker(x, y, style.line(rule)["color"], mark == "leads")
        else:
            draw.mark(x, y, mark)
        draw.text(x + 18, y, head, ha="left", fontweight="bold")
        draw.text(x + 18, y - 20, said, INK, 13.5, ha="left")
    legend(draw, rule, 760)
    draw.save(name)


def main() -> None:
    rules = list(RULES)
    five = ["Backprop", "FeedbackAlignment", "DirectFeedbackAlignment", "PEPITA", "EKDAA"]
    alone("paths-bp", "Backprop")
    beside("paths-feedback", [rules[1:6]])
    alone("paths-pepita", "PEPITA")
    alone("paths-ekdaa", "EKDAA")
    beside("paths-landing", [five], formulas=False)
    alone("paths-lfnn", "LeaderFollower")
    alone("paths-attention", "NextLayerAttention")
    alone("paths-forward", "ForwardGradient")
    beside("paths", [rules[:5], rules[5:]])


if __name__ == "__main__":
    main()
