"""The playground: its JavaScript computes what the library computes, and its page shows it."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import generator, mlp_problem, seeds
from playwright.sync_api import Page, sync_playwright
from test_browser import CHROMIUM, OFFLINE

import bpfree

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
SOURCE = (Path(__file__).resolve().parent.parent / "_static" / "playground.js").read_text()

# name there, the library's rule, its options but for the two that only draw matrices
RULES: dict[str, tuple[str, Callable[..., bpfree.Rule], dict[str, Any]]] = {
    "bp": ("bp", bpfree.Backprop, {}),
    "fa": ("fa", bpfree.FeedbackAlignment, {}),
    "sign": ("sign", bpfree.SignSymmetry, {"scale": 0.7}),
    "kp": ("kp", bpfree.KolenPollack, {}),
    "dfa": ("dfa", bpfree.DirectFeedbackAlignment, {}),
    "drtp": ("drtp", bpfree.DRTP, {}),
    "pepita": ("pepita", partial(bpfree.PEPITA, feedback_scale=0.8), {}),
    "pepita, first pass": (
        "pepita", partial(bpfree.PEPITA, feedback_scale=0.8),
        {"sign": -1, "output_error": "first", "presynaptic": "first"},
    ),
    "ekdaa": ("ekdaa", partial(bpfree.EKDAA, start="random"), {"beta": 0.7, "gamma": 0.3}),
    "lfnn-l": (
        "lfnn", partial(bpfree.LeaderFollower, workers=5),
        {"leaders": 0.5, "lambda_leader": 0.8, "lambda_follower": 0.6},
    ),
    "lfnn-l, all lead": ("lfnn", partial(bpfree.LeaderFollower, workers=3), {"leaders": 1.0}),
    "attention": ("attention", bpfree.NextLayerAttention, {"p": 1.5}),
    "attention, p = 1": ("attention", bpfree.NextLayerAttention, {"p": 1.0}),
    "frozen": ("frozen", bpfree.Frozen, {}),
}  # fmt: skip
DEFAULTS = {"pepita": {}, "ekdaa": {}, "lfnn-l": {"leaders": 0.7}}  # options left out


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with sync_playwright() as playwright:
        args = ["--no-sandbox", OFFLINE]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser.new_page()
        browser.close()


def load(tab: Page, source: str = SOURCE) -> None:
    tab.goto("about:blank")
    tab.evaluate(source)


def both(tab: Page, case: str, activation: str, sizes: list[int], batch: int, seed: int):
    """[(name, there, here)]: loss, signals and all gradients of a random problem."""
    name, make, options = RULES[case]
    net, x, y = mlp_problem(*sizes, size=batch, seed=seed, activation=activation)
    rule = make(net, **options, generator=generator(seed + 2)).double()
    fixed = {n.removeprefix("rule."): p for n, p in [*rule.params().items(), *rule.state().items()]
             if n[0] != "S" and "linear" not in n}  # fmt: skip
    here = rule.update(rule.params(), rule.state(), x, y)
    there = tab.evaluate("input => playground.gradients(input)", {
        "rule": name, "options": options, "activation": activation,
        "W": [None, *(block.linear.weight.tolist() for block in net)],
        "b": [None, *(block.linear.bias.tolist() for block in net)],
        "feedback": {n: p.tolist() for n, p in fixed.items()},
        "x": x.tolist(), "y": y.tolist(),
    })  # fmt: skip
    found = [("loss", there["loss"], here.loss)]
    for l, (r, delta) in enumerate(here.signals, 1):
        found += [
            (f"delta{l}", there["delta"][l], delta),
            (f"r{l}", there["r"][l], r),
            (f"W{l}", there["W"][l], here.grads[f"{l - 1}.linear.weight"]),
            (f"b{l}", there["b"][l], here.grads[f"{l - 1}.linear.bias"]),
        ]
    own = {n.removeprefix("rule."): g for n, g in here.grads.items() if n.startswith("rule.")}
    assert there["own"].keys() == own.keys()
    return found + [(n, there["own"][n], g) for n, g in own.items()]


def furthest(compared) -> float:
    """The largest difference over all that was compared."""
    return max(
        float((torch.tensor(there, dtype=torch.float64) - here).abs().max())
        for _, there, here in compared
    )


shapes = st.integers(1, 3).flatmap(
    lambda depth: st.lists(st.integers(2, 8), min_size=depth + 2, max_size=depth + 2, unique=True)
)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("case", RULES)
@given(sizes=shapes, batch=st.integers(2, 6), seed=seeds)
def test_every_rule_is_the_librarys(tab, case, activation, sizes, batch, seed):
    if tab.url != "about:blank" or not tab.evaluate("globalThis.playground?.gradients != null"):
        load(tab)
    assert furthest(both(tab, case, activation, sizes, batch, seed)) < 1e-9
