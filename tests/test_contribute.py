"""The contributor's guide, done as it stands there, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "contribute.md").read_text(), re.M | re.S)
pytestmark = pytest.mark.processes


def add(file: Path, diff: str) -> None:
    """What a plus begins, after the line above it."""
    lines, at = file.read_text().splitlines(), None
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at + 1, line[1:])
            at += 1
        else:
            assert lines.count(line[1:]) == 1, f"{file.name} must have this line once: {line[1:]!r}"
            at = lines.index(line[1:])
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with all files and lines that the guide adds."""
    folder = tmp_path_factory.mktemp("contributor")
    for part in ("bpfree", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "test_book.py", "test_browser.py")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for language, block in BLOCKS:
        if block.startswith("# "):
            head, _, text = block.partition("\n")
            file = folder / head.removeprefix("# ")
            assert file.exists() == (language == "diff")
            add(file, text) if language == "diff" else file.write_text(text)
    return folder


def commands(beginning: str) -> list[list[str]]:
    """The guide's commands that begin so, each as the words after that."""
    lines = "".join(block for language, block in BLOCKS if language == "bash").splitlines()
    return [line.removeprefix(beginning).split() for line in lines if line.startswith(beginning)]


# in one process, as starting one is most of the time; mutants come before the library is imported
DRIVER = """
import sys

sys.path[:0] = ["tests", "."]
import mutate
import pytest

for files in {mutants}:
    assert mutate.main(files) == 0
for words in {tests}:
    assert pytest.main([*words, "-p", "no:nbval", "-p", "no:cacheprovider"]) == 0
{audit}
from bpfree.experiments.cli import main

for words in {calls}:
    assert main([*words, "--results", "results"]) == 0
"""


def test_a_new_contributor_comes_through(copy):
    script = DRIVER.format(
        mutants=commands("python tests/mutate.py"),
        tests=commands("pytest"),
        calls=commands("bpfree"),
        audit=next(block for language, block in BLOCKS if "bpfree.audit" in block),
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "1 of 1 caught" in said
    assert int(re.search(r"(\d+) passed", said)[1]) > 40  # the tests for every rule
    answers = re.search(r"\{('.*)\}", said)[1]  # does it drop each of the four demands?
    assert re.findall("True|False", answers) == ["True", "True", "False", "False"]
    assert "| clipped feedback | digits |" in said
    assert float(re.search(r"digits-clipped: ([\d.]+)", said)[1]) > 60
