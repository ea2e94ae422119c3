"""bpfree: learning without backpropagation, the library of the book."""

from . import recipes, results, style
from .block import Block
from .data import load
from .measure import alignment
from .network import Network, convnet, mlp
from .rule import Rule, Update
from .rules import (
    DRTP,
    EKDAA,
    PEPITA,
    Backprop,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    Frozen,
    KolenPollack,
    SignSymmetry,
    shuffled,
)
from .train import fit

__version__ = "0.1.0"

__all__ = [
    "DRTP",
    "EKDAA",
    "PEPITA",
    "Backprop",
    "Block",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "Frozen",
    "KolenPollack",
    "Network",
    "Rule",
    "SignSymmetry",
    "Update",
    "alignment",
    "convnet",
    "fit",
    "load",
    "mlp",
    "recipes",
    "results",
    "shuffled",
    "style",
]
