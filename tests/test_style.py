"""The shared look: every rule has its own, and figures come out the same twice."""

import io
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from bpfree import rules, style

pytestmark = pytest.mark.processes
matplotlib.use("agg")
ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in rules.__all__ if name != "shuffled"]


def test_every_rule_has_a_look_of_its_own():
    missing = [name for name in NAMES if name not in style.RULES]
    assert not missing, "add a line for each to RULES in bpfree/style.py"
    looks = [style.RULES[name] for name in NAMES]
    for part in zip(*looks, strict=True):  # labels, colours, line styles, markers
        assert len(set(part)) == len(looks)


@pytest.mark.parametrize("name", NAMES)
def test_matplotlib_draws_the_look_of_a_rule_and_of_its_shuffled_twin(name):
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    for rule in (name, f"Shuffled{name}"):
        (line,) = ax.plot([0, 1], **style.line(rule))
        assert line.get_label() == style.label(rule)
    assert style.label(f"Shuffled{name}") == f"{style.label(name)}, shuffled signal"
    plt.close(fig)


def test_svg_is_the_same_twice():
    import matplotlib.pyplot as plt

    style.use()
    files = []
    for _ in range(2):
        fig, ax = plt.subplots()
        ax.plot([0, 1], **style.line("DRTP"))
        files.append(io.BytesIO())
        fig.savefig(files[-1], format="svg", metadata={"Date": None})
        plt.close(fig)
    assert files[0].getvalue() == files[1].getvalue()


def test_drawings_of_rules_are_what_their_script_draws(tmp_path):
    script = (ROOT / "figures" / "paths.py").read_text()
    (tmp_path / "paths.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "paths.py"], check=True, cwd=tmp_path)
    drawn, kept = tmp_path.glob("*.svg"), (ROOT / "figures").glob("paths*.svg")
    # text is drawn as curves whose last digits depend on the font library
    parts = [{p.name: p.read_text().count("<g id=") for p in files} for files in (drawn, kept)]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 9
