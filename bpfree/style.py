"""One look for every figure: colours that colour-blind readers tell apart, plus a line style."""

from __future__ import annotations

from cycler import cycler

# rule class -> (label, colour of Okabe & Ito 2008, line style, marker)
RULES = {
    "Backprop": ("BP", "#000000", "-", "o"),
    "FeedbackAlignment": ("FA", "#0072B2", "--", "s"),
    "SignSymmetry": ("sign symmetry", "#56B4E9", "-.", "^"),
    "KolenPollack": ("Kolen-Pollack", "#009E73", (0, (5, 1)), "D"),
    "DirectFeedbackAlignment": ("DFA", "#D55E00", (0, (3, 1, 1, 1)), "v"),
    "DRTP": ("DRTP", "#CC79A7", (0, (1, 1)), "P"),
    "PEPITA": ("PEPITA", "#E69F00", (0, (7, 2)), "*"),
    "EKDAA": ("EKDAA", "#882255", (0, (5, 1, 1, 1, 1, 1)), "X"),
    "LeaderFollower": ("LFNN", "#332288", (0, (2, 1)), "h"),
    "NextLayerAttention": ("attention", "#117733", (0, (4, 1, 1, 1)), "p"),
    "ForwardGradient": ("forward gradient", "#DDAA33", (0, (2, 1, 1, 1)), "1"),
    "Stages": ("stages", "#44AA99", (0, (3, 1)), "d"),
    "Shrunk": ("BP, feedback shrunk", "#999933", (0, (6, 1, 1, 1)), ">"),
    "EWC": ("BP with EWC", "#AA4499", (0, (2, 2)), "<"),
    "Frozen": ("frozen hidden layers", "#7F7F7F", ":", "x"),
    "Shuffled": ("shuffled signal", "#A6761D", (0, (4, 2, 1, 2)), "+"),
}


def _look(rule: str) -> tuple:
    if rule not in RULES:
        raise KeyError(f"{rule} has no look: add a line to RULES in bpfree/style.py")
    return RULES[rule]


def label(rule: str) -> str:
    """Short name of a rule class, as figures and tables print it."""
    if rule.startswith("Released"):
        return f"{label(rule.removeprefix('Released'))}, released"
    if rule.startswith("Shuffled"):
        return f"{_look(rule.removeprefix('Shuffled'))[0]}, {RULES['Shuffled'][0]}"
    return _look(rule)[0]


def line(rule: str) -> dict:
    """Keyword arguments of ``Axes.plot`` for a rule class, given by its name."""
    _, color, linestyle, marker = _look("Shuffled" if rule.startswith("Shuffled") else rule)
    return dict(label=label(rule), color=color, linestyle=linestyle, marker=marker)


def use() -> None:
    """Set matplotlib's defaults: opaque white ground (dark pages too), reproducible SVG."""
    import matplotlib as mpl

    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": cycler(color=[r[1] for r in RULES.values()])
            + cycler(linestyle=[r[2] for r in RULES.values()]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "figure.figsize": (6.4, 3.2),
            "font.size": 10,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4,
            "savefig.facecolor": "white",
            "svg.fonttype": "path",
            "svg.hashsalt": "bpfree",
        }
    )
