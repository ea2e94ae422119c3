"""The explorer: its files are what the records make, and its script draws what they hold."""

import importlib.util
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page
from test_browser import CHROMIUM, OVERFLOW

from bpfree import results

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("explorer", ROOT / "figures" / "explorer.py")
explorer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(explorer)
SCRIPT = ROOT / "_static" / "explorer-data.js"
DATA = json.loads(SCRIPT.read_text().partition("=")[2].rstrip(";\n"))
PLACE = next(s for s in (ROOT / "explorer.md").read_text().splitlines() if s.startswith("<div"))
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
pytestmark = pytest.mark.processes


def test_files_are_what_the_records_make():
    assert SCRIPT.read_text() == explorer.data(), "make figures"
    assert (ROOT / "figures" / "explorer.md").read_text() == explorer.page(), "make figures"
    assert SCRIPT.stat().st_size < 300_000


def test_every_recorded_curve_is_there_once():
    """Counted here once more, from the files alone."""
    finals = []
    for file in (ROOT / "figures" / "results").glob("*.json"):
        runs = json.loads(file.read_text()).get("runs")
        if isinstance(runs, dict) and not any("matrix" in run for run in runs.values()):
            ends = [r["test_accuracy"][-1] for r in runs.values() if r["diverged"] is None]
            sd = f"{statistics.stdev(ends):.2f}" if len(ends) > 1 else None
            finals.append((len(ends), f"{statistics.fmean(ends):.2f}" if ends else None, sd))
    shown = [
        (a["seeds"], f"{a['mean'][-1]:.2f}" if a["seeds"] else None,
         f"{a['sd'][-1]:.2f}" if "sd" in a else None)
        for each in DATA for a in each["arms"]
    ]  # fmt: skip
    alone = [f for f in explorer.experiments(1) if f not in explorer.experiments()]
    assert len(shown) == len(finals) - len(alone)
    for one in shown:
        finals.remove(one)


def test_no_two_lines_of_an_experiment_look_or_sound_alike():
    assert len({each["title"] for each in DATA}) == len(DATA)
    for each in DATA:
        for look in ("id", "label"):
            assert len({arm[look] for arm in each["arms"]}) == len(each["arms"])
        assert len({(arm["colour"], *arm["dash"]) for arm in each["arms"]}) == len(each["arms"])


def test_the_arms_of_an_experiment_have_one_protocol():
    keys = ("data", "epochs", "batch_size", "momentum", "milestones")
    for arms in explorer.experiments().values():
        assert len({str([r["recipe"][key] for key in keys]) for r in arms.values()}) == 1
        networks = [r["recipe"]["network"] for r in arms.values()]
        assert len({f"{kind} {args[0]} {args[-1]}" for kind, args, _ in networks}) == 1


@pytest.fixture
def tab(browser, tmp_path) -> Iterator[Page]:
    """A page of the explorer alone, opened as a file; nothing may fail there or leave it."""
    static = f"{ROOT}/_static/explorer"
    (tmp_path / "page.html").write_text(
        f"<!doctype html><meta charset=utf-8><link rel=stylesheet href='{static}.css'>"
        f"<script src='{static}.js'></script><script src='{static}-data.js'></script>"
        f"<main><article><section id=explorer><h1>Explorer</h1>{PLACE}</section></article></main>"
    )
    heard = []
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.on("request", lambda r: r.url.startswith("file:///") or heard.append(r.url))
    page.on("console", lambda m: m.type == "error" and heard.append(m.text))
    page.on("pageerror", lambda e: heard.append(str(e)))
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    assert page.text_content("h1") == "Explorer"  # the place is replaced, and no more
    page.close()
    assert heard == []


def drawn(tab: Page) -> dict[str, list[float]]:
    """{arm: accuracy at each epoch}, read off the drawing with the grid as the ruler."""
    grid = tab.eval_on_selector_all(
        ".ex-grid", "lines => lines.map(l => [+l.dataset.value, +l.getAttribute('y1')])"
    )
    (low, at_low), (high, at_high) = grid[0], grid[-1]
    assert high > low
    assert at_low > at_high  # upwards
    said = tab.eval_on_selector_all(".ex-grid + text", "all => all.map(t => +t.textContent)")
    assert said == [value for value, _ in grid]
    lines = tab.eval_on_selector_all(
        ".ex-chart polyline", "lines => lines.map(l => [l.dataset.arm, l.getAttribute('points')])"
    )
    return {
        arm: [
            low + (float(point.split(",")[1]) - at_low) / (at_high - at_low) * (high - low)
            for point in points.split()
        ]
        for arm, points in lines
    }


def state(tab: Page) -> tuple[str, list[str]]:
    boxes = tab.eval_on_selector_all(".ex-arms input:checked", "all => all.map(b => b.value)")
    return tab.input_value("#ex-experiment"), boxes


def choose(tab: Page, experiment: str, *arms: str) -> None:
    tab.select_option("#ex-experiment", experiment)
    tab.click("#ex-none")
    for arm in arms:
        tab.check(f".ex-arms input[value='{arm}']")


@in_a_browser
@pytest.mark.parametrize("experiment, arms", [
    ("mnist-fc", ("fa", "frozen")), ("pepita-fc-mnist", ("bp", "pepita")),
    ("lfnn-fc-mnist", ("bp", "lfnn-l-100")),
])  # fmt: skip
def test_two_rules_are_two_lines_of_what_is_recorded(tab, experiment, arms):
    choose(tab, experiment, *arms)
    lines, words = drawn(tab), tab.get_attribute(".ex-chart", "aria-label")
    assert list(lines) == list(arms)
    for arm, line in lines.items():
        record = results.read(f"{experiment}-{arm}")
        curves = zip(*(run["test_accuracy"] for run in record["runs"].values()), strict=True)
        assert line == pytest.approx([statistics.fmean(epoch) for epoch in curves], abs=0.01)
        said = results.spread(results.final(record))
        assert said in words
        assert said in tab.text_content(f".ex-arm:has([value='{arm}'])")
        assert said in tab.text_content("output")  # the slider is at the last epoch
    assert tab.text_content(".ex-says") in words
    assert tab.get_attribute(".ex-says", "role") == "status"
    assert len(re.findall(r"±|\d\.\d\d(?= |;|\.)", words)) >= 2


@in_a_browser
def test_the_address_keeps_the_choice(tab):
    first = state(tab)
    choose(tab, "ekdaa-fc-fashion-mnist", "bp", "ekdaa")
    assert tab.evaluate("location.hash") == "#experiment=ekdaa-fc-fashion-mnist&rules=bp,ekdaa"
    chosen, lines = state(tab), drawn(tab)
    tab.reload()
    assert (state(tab), drawn(tab)) == (chosen, lines)
    assert chosen == ("ekdaa-fc-fashion-mnist", ["bp", "ekdaa"]) != first
    tab.check("#ex-close")
    close, far = drawn(tab), lines
    assert tab.evaluate("location.hash").endswith("&rules=bp,ekdaa&close=1")
    tab.reload()
    assert drawn(tab) == close
    for arm, line in far.items():
        assert close[arm] == pytest.approx(line, abs=0.01)
    tab.evaluate("location.hash = '#experiment=mnist-fc&rules=dfa'")
    tab.wait_for_function("document.querySelector('#ex-experiment').value === 'mnist-fc'")
    assert state(tab) == ("mnist-fc", ["dfa"])
    tab.goto(tab.url.partition("#")[0] + "#experiment=nonsense&rules=<b>")
    tab.reload()
    assert state(tab) == (first[0], [])


@in_a_browser
def test_everything_works_from_the_keyboard(tab):
    seen = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("document.activeElement.id || document.activeElement.value"))
    assert seen == ["ex-experiment", "ex-close", "ex-epoch", "ex-all", "ex-none", "bp"]
    before = list(drawn(tab))
    tab.keyboard.press("Space")
    assert list(drawn(tab)) == before[1:]
    tab.keyboard.press("Space")
    assert list(drawn(tab)) == before
    for _ in range(3):
        tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Home")
    curve = next(arm["mean"] for arm in DATA[0]["arms"] if arm["id"] == "bp")
    assert f"BP {curve[0]:.2f}" in tab.text_content("output")
    tab.keyboard.press("ArrowRight")
    assert f"BP {curve[1]:.2f}" in tab.evaluate("document.activeElement.ariaValueText")
    tab.focus("#ex-experiment")
    tab.keyboard.press("ArrowDown")
    assert state(tab)[0] == DATA[1]["id"]


@in_a_browser
def test_the_pointer_reads_an_epoch_and_nothing_sticks_out(tab):
    for experiment in DATA:
        tab.select_option("#ex-experiment", experiment["id"])
        tab.click("#ex-all")
        assert list(drawn(tab)) == [arm["id"] for arm in experiment["arms"]]
        assert tab.evaluate(OVERFLOW) == []
    box = tab.locator(".ex-chart").bounding_box()
    tab.mouse.move(box["x"] + 36, box["y"] + 100)
    assert tab.input_value("#ex-epoch") == "1"
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 100)
    longest = max(len(arm["mean"]) for arm in DATA[-1]["arms"])
    assert tab.input_value("#ex-epoch") == str(longest)
