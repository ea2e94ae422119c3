"""Fixtures of all tests: small problems in float64, the digits, one thread, fixed examples."""

import dataclasses
import os

import pytest
import torch
from hypothesis import Phase, settings
from oracles import PROBLEMS, Problem, conv_problem, mlp_problem

import bpfree

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
settings.register_profile(
    "book", deadline=None, derandomize=True, max_examples=25, database=None, print_blob=False
)
settings.register_profile(
    "mutants", settings.get_profile("book"), phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("again", settings.get_profile("book"), max_examples=5)
settings.load_profile("book")


@pytest.fixture(autouse=True)
def _seed():
    """What a test draws from the global generator is the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request):
    """Processes beside one another have a thread each, in a run with two threads as well."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("processes"):
            patch.setenv("OMP_NUM_THREADS", "1")
            torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def mlp() -> Problem:
    return mlp_problem()


@pytest.fixture
def convnet() -> Problem:
    return conv_problem()


@pytest.fixture(params=PROBLEMS)
def either(request) -> Problem:
    """An MLP and a convnet, both with biases."""
    return PROBLEMS[request.param]()


@pytest.fixture(scope="session")
def digits() -> bpfree.data.Data:
    return bpfree.load("digits")


@pytest.fixture(scope="session")
def few_digits(digits) -> bpfree.data.Data:
    """100 images to train on and 30 to test on."""
    few = {"train_x": 100, "train_y": 100, "test_x": 30, "test_y": 30}
    return dataclasses.replace(digits, **{k: getattr(digits, k)[:n] for k, n in few.items()})


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that reaches nothing but this machine."""
    from playwright.sync_api import sync_playwright
    from test_browser import CHROMIUM, OFFLINE

    with sync_playwright() as playwright:
        args = ["--no-sandbox", OFFLINE]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()
