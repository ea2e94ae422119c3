"""Make the assignments from their sources, and grade what comes back.

    python tools/assignments.py [NAME ...]              student versions in chapters/assignments,
                                                        the rest in _build/assignments
    python tools/assignments.py --variant 1 [NAME ...]  another variant, in _build/assignments
    python tools/assignments.py --grade NAME FILE ...   marks and hints for notebooks handed in;
                                                        they run here and now, with your rights

A source, chapters/assignments/source/NAME.md, is a text twin with otter-grader's markers in fences.
``{{ repository }}`` in it stands for the address in _config.yml, and ``{{ A | B | C }}`` for A in
variant 0, B in variant 1, and so on; the last one stands for all that follow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from notebooks import ROOT, render

ASSIGNMENTS = ROOT / "chapters" / "assignments"
BUILD = ROOT / "_build" / "assignments"


class Made(NamedTuple):
    """The notebooks of one assignment. The solution holds all tests in its metadata."""

    student: Path
    solution: Path


class Marks(NamedTuple):
    """Of one question."""

    score: float
    possible: float
    hints: list[str]  # one per failed test


def sources() -> list[Path]:
    """In the order of the book."""
    order = re.findall(r"assignments/(\w+)", (ROOT / "_toc.yml").read_text())
    found = sorted((ASSIGNMENTS / "source").glob("*.md"))
    return sorted(found, key=lambda path: (order + [path.stem]).index(path.stem))


def master(source: Path, variant: int = 0):
    """The notebook that otter reads."""

    def choose(found: re.Match) -> str:
        options = found[1].split(" | ")
        return options[min(variant, len(options) - 1)]

    nb = render(source, lambda text: re.sub(r"\{\{ (.+? \| .+?) \}\}", choose, text))
    nb.metadata["kernelspec"]["language"] = "python"
    return nb


def make(source: Path, variant: int = 0, build: Path = BUILD) -> Made:
    """Let otter take the source apart, without a network, a PDF or a kernel."""
    import nbformat
    from otter.assign import main as assign

    name = f"{source.stem}.ipynb"
    folder = build / f"variant-{variant}" / source.stem
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    nbformat.write(master(source, variant), folder / name)
    assign(str(folder / name), str(folder), no_pdfs=True, no_run_tests=True)
    made = Made(folder / "student" / name, folder / "autograder" / name)
    for bundle in made.solution.parent.glob("*.zip"):  # named after the time of day
        bundle.rename(bundle.with_name(f"{source.stem}.zip"))
    for path in made:
        nb = nbformat.read(path, 4)
        for i, cell in enumerate(nb.cells):
            cell["id"] = f"cell-{i}"  # drawn at random
            for key in ("editable", "deletable"):
                cell.metadata.pop(key, None)
        nb.nbformat, nb.nbformat_minor = 4, 5
        nbformat.validate(nb)
        nbformat.write(nb, path)
    return made


def grade(
    submission, solution, names: dict | None = None, again: Callable[..., bool] = lambda cell: True
) -> dict[str, Marks]:
    """Marks by question, of a notebook that is run in this process.

    As otter does it: a cell that fails is left, and a question is tested after its last cell.
    ``names`` holds what the notebook defines, in the end; where it is not empty at the start, only
    the cells that must run ``again`` do.
    """
    from otter.test_files.exception_test import ExceptionTestFile

    names = {} if names is None else names
    names |= {"__name__": "__main__", "display": lambda *shown: None}
    tests = {
        question: ExceptionTestFile.from_metadata(text, question)
        for question, text in solution.metadata["otter"]["tests"].items()
    }
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in submission.cells:
            if cell.cell_type == "code" and again(cell):
                with contextlib.suppress(Exception, SystemExit):
                    exec(compile(cell.source, "<cell>", "exec"), names)
            for question in cell.metadata.get("otter", {}).get("tests", []):
                tests[question].run(names)
        for test in tests.values():
            if not test.test_case_results:  # its last cell was deleted
                test.run(names)
    return {question: marks(test) for question, test in tests.items()}


def marks(test) -> Marks:
    failed = [result.message for result in test.test_case_results if not result.passed]
    hints = [message.rpartition("Error: ")[2].strip() for message in failed]
    return Marks(test.score, test.possible, hints)


def mistakes(source: Path) -> list[dict]:
    """What students get wrong, as replacements in the solution, and what it costs."""
    import yaml

    return yaml.safe_load(source.with_suffix(".yml").read_text())


def overview() -> str:
    """The table of assignments, from what they say of themselves."""
    rows = ["| assignment | minutes | points by tests | written |", "|---|---|---|---|"]
    pattern = r"\((as-.+?)\)=.*?Time\*\*: (\d+) min.*?Points\*\*: (\d+) by tests, (\d+) for"
    for source in sources():
        label, *numbers = re.search(pattern, source.read_text(), re.S).groups()
        rows.append(" | ".join(["| {ref}`" + label + "`", *numbers]) + " |")
    return "\n".join(rows) + "\n"


def table() -> str:
    """The mistakes of all assignments."""
    rows = ["| assignment | mistake | points lost, in |", "|---|---|---|"]
    for source in sources():
        name = source.stem.removesuffix("_assignment").replace("_", " ")
        for entry in mistakes(source):
            points = ", ".join(f"{lost}, {q}" for q, lost in entry["loses"].items())
            rows.append(f"| {name} | {entry['mistake']} | {points} |")
    return "\n".join(rows) + "\n"


def show(marks: dict[str, Marks]) -> str:
    lines = [f"  {q:28}{m.score:4g} of {m.possible:g}" for q, m in marks.items()]
    lines += [f"  {question}: {hint}" for question, m in marks.items() for hint in m.hints]
    score, possible = sum(m.score for m in marks.values()), sum(m.possible for m in marks.values())
    return "\n".join([f"{score:g} of {possible:g}", *lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--variant", type=int, choices=range(100), default=0, metavar="N")
    parser.add_argument("--grade", metavar="NAME")
    args = parser.parse_args()
    known = {source.stem: source for source in sources()}
    wanted = [args.grade] if args.grade else args.names or list(known)
    if missing := set(wanted) - set(known):
        parser.error(f"no source for {', '.join(sorted(missing))}")
    if args.grade:
        import nbformat

        with contextlib.redirect_stdout(io.StringIO()):
            solution = nbformat.read(make(known[args.grade], args.variant).solution, 4)
        for file in args.names:
            print(f"{file}: {show(grade(nbformat.read(file, 4), solution))}")
        return 0
    for name in wanted:
        made = make(known[name], args.variant)
        if args.variant == 0:
            shutil.copy(made.student, ASSIGNMENTS)
        print(f"{name}: {made.solution.parent.relative_to(ROOT)}", flush=True)
    (ASSIGNMENTS / "overview.md").write_text(overview())
    (ASSIGNMENTS / "mistakes.md").write_text(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
