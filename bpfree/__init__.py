"""bpfree: learning without backpropagation, the library of the book."""

from . import rules, style
from .audit import audit
from .block import Block
from .convert import convert
from .data import load
from .experiments import recipes, results
from .measure import alignment
from .network import Network, convnet, mlp
from .rule import Rule, Update
from .rules import *  # noqa: F403
from .stages import Stage, Stages, split
from .training.fit import fit

__version__ = "0.1.0"

__all__ = [
    "Block", "Network", "Rule", "Stage", "Stages", "Update", "alignment", "audit", "convert",
    "convnet", "fit", "load", "mlp", "recipes", "results", "split", "style",
] + rules.__all__  # fmt: skip
