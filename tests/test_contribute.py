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


def run(folder: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(beginning: str) -> list[list[str]]:
    """The guide's commands that begin so, each as its words."""
    lines = "".join(block for language, block in BLOCKS if language == "bash").splitlines()
    parts = [re.findall(r'"[^"]*"|\S+', line) for line in lines if line.startswith(beginning)]
    assert parts
    return [[word.strip('"') for word in words] for words in parts]


def test_every_test_for_every_rule_runs_on_the_new_one(copy):
    for _, *words in commands("pytest"):
        said = run(copy, "-m", "pytest", *words, "-p", "no:nbval", "-p", "no:cacheprovider")
        assert int(re.search(r"(\d+) passed", said)[1]) > 40


def test_its_mutant_is_caught(copy):
    for _, *words in commands("python tests/mutate.py"):
        assert "1 of 1 caught" in run(copy, *words)


def test_it_can_be_audited_run_and_reported(copy):
    """All in one process, whose start is most of the time."""
    audit = next(b for language, b in BLOCKS if language == "python" and "bpfree.audit" in b)
    calls = [words + ["--results", str(copy / "results")] for _, *words in commands("bpfree")]
    main = f"from bpfree.experiments.cli import main\nassert [*map(main, {calls})] == [0, 0]"
    said = run(copy, "-c", f"{audit}\n{main}")
    assert re.search(r"\{'\w[^:]*': True, '[^:]*': True, '[^:]*': False, '[^:]*': False\}", said)
    assert "| loud feedback | digits |" in said
