"""The assignments: what otter makes of their sources, and the marks that answers and mistakes get.

A mistake is a replacement in the reference solution. It must cost the points that the table beside
the source says, in these questions and in no other, and its hint must name the idea.
"""

import ast
import re
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import assignments  # noqa: E402

NAMES = [source.stem for source in assignments.sources()]
MISTAKES = {source.stem: assignments.mistakes(source) for source in assignments.sources()}
SOLUTION = "otter_assign_solution_cell"
TABLE = [(name, entry) for name in NAMES for entry in MISTAKES[name]]

on_assignments = pytest.mark.parametrize("name", NAMES)
# what is far off is far off in any arithmetic: left out where numbers are checked once more
of_one_arithmetic = pytest.mark.processes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(assignment, variant) -> its student version and its solution."""
    import nbformat

    folder = tmp_path_factory.mktemp("assignments")

    @cache
    def make(name, variant=0):
        source = assignments.ASSIGNMENTS / "source" / f"{name}.md"
        paths = assignments.make(source, variant, folder)
        return assignments.Made(*(nbformat.read(path, 4) for path in paths))

    return make


@pytest.fixture(scope="module")
def reference(made):
    """(assignment, variant) -> the names that its solution defines, and the marks it gets."""

    @cache
    def run(name, variant=0):
        names, solution = {}, made(name, variant).solution
        return names, assignments.grade(solution, solution, names)

    return run


class Again:
    """Which cells say something else than in the solution: those that are not the solution's, and
    those that use a name from such a cell. The others, a training run say, need not run again."""

    def __init__(self, solution):
        self.known, self.changed = {cell.source for cell in solution.cells}, set()

    def __call__(self, cell):
        tree = ast.parse(cell.source)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        if cell.source in self.known and not used & self.changed:
            return False
        for statement in tree.body:  # what a function names within itself is its own
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                self.changed.add(statement.name)
            else:
                named = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
                self.changed |= {node.id for node in named if isinstance(node.ctx, ast.Store)}
        return True


def lost(marks):
    return {q: m.possible - m.score for q, m in marks.items() if m.score < m.possible}


def with_mistake(solution, entry):
    wrong = deepcopy(solution)
    assert sum(cell.source.count(entry["replace"]) for cell in wrong.cells) == 1, entry["replace"]
    for cell in wrong.cells:
        cell.source = cell.source.replace(entry["replace"], entry["with"])
    return wrong


@on_assignments
def test_the_student_version_is_the_sources(name, made):
    import nbformat

    committed = nbformat.read(assignments.ASSIGNMENTS / f"{name}.ipynb", 4)
    assert committed == made(name).student, "make assignments"


@on_assignments
def test_the_student_version_shows_no_solution_output_or_hidden_test(name, made):
    student, solution = made(name)
    assert not any(cell.get("outputs") for cell in student.cells)
    text = "\n".join(cell.source for cell in student.cells) + str(student.metadata)
    assert not [w for w in ("SOLUTION", "TESTS", "hidden=True", "{{") if w in text]
    answers = [cell.source for cell in solution.cells if SOLUTION in cell.metadata.get("tags", [])]
    assert answers
    assert not [answer for answer in answers if answer in text]


@on_assignments
@pytest.mark.parametrize("variant", [0, 1])
def test_reference_gets_full_marks(name, variant, made, reference):
    _, marks = reference(name, variant)
    assert lost(marks) == {}
    if variant == 0:
        said = sum(m.possible for m in marks.values())
        assert f"{said:g} by tests" in made(name).solution.cells[0].source


@on_assignments
def test_untouched_student_version_gets_nothing(name, made):
    student, solution = made(name)
    assert sum(m.score for m in assignments.grade(student, solution).values()) == 0


@on_assignments
def test_untouched_student_version_fails_in_answers_and_checks_only(name, made):
    names, failed = {}, []
    for cell in made(name).student.cells:
        if cell.cell_type == "code":
            try:
                exec(cell.source, names)
            except (AssertionError, AttributeError, TypeError):
                if "otter_answer_cell" not in cell.metadata.get("tags", []):
                    failed.append(cell.source)
    assert failed
    assert [source for source in failed if not source.startswith("# check")] == []


@on_assignments
def test_first_cell_is_that_of_the_books_pages(name, made):
    import nbformat

    page = nbformat.read(ROOT / "chapters" / "00_notation" / "notation.ipynb", 4)
    first = [
        next(c.source for c in nb.cells if c.cell_type == "code")
        for nb in (page, made(name).student)
    ]
    assert first[0] == first[1]


@on_assignments
def test_every_question_has_a_mistake(name, made):
    tests = made(name).solution.metadata["otter"]["tests"]
    assert len(MISTAKES[name]) >= 3
    assert {q for entry in MISTAKES[name] for q in entry["loses"]} == set(tests)


@of_one_arithmetic
@pytest.mark.parametrize("name, entry", TABLE, ids=[f"{n}-{e['mistake']}" for n, e in TABLE])
def test_a_mistake_costs_its_own_points_and_is_named(name, entry, made, reference):
    solution = made(name).solution
    wrong = with_mistake(solution, entry)
    marks = assignments.grade(wrong, solution, dict(reference(name)[0]), Again(solution))
    assert lost(marks) == entry["loses"]
    assert any(entry["hint"] in hint for q in entry["loses"] for hint in marks[q].hints), marks


@of_one_arithmetic
@on_assignments
def test_published_solution_loses_a_quarter_in_another_variant(name, made):
    marks = assignments.grade(made(name, 0).solution, made(name, 1).solution)
    assert sum(lost(marks).values()) >= 0.25 * sum(m.possible for m in marks.values())


def test_variants_beyond_the_last_alternative_are_that_one():
    for source in assignments.sources():
        assert assignments.master(source, 2) == assignments.master(source, 1)


@on_assignments
def test_every_answer_has_a_name_of_its_own(name, made):
    """A question is tested after its last cell; no later cell may redefine what it tests."""
    answers = []
    for cell in made(name).solution.cells:
        if cell.cell_type == "code" and SOLUTION in cell.metadata.get("tags", []):
            body = ast.parse(cell.source).body
            answers += [node.name for node in body if isinstance(node, ast.FunctionDef)]
    assert len(answers) == len(set(answers)) > 0


def test_tables_of_the_instructors_page_are_the_sources():
    for file, text in (("overview", assignments.overview()), ("mistakes", assignments.table())):
        path = assignments.ASSIGNMENTS / f"{file}.md"
        assert path.read_text() == text, "make assignments"


def test_minutes_of_the_syllabuses_are_the_pages():
    minutes = {}
    for twin in (ROOT / "chapters" / "text").glob("*/*.md"):
        opening = twin.read_text().partition("## ")[0]
        if stated := re.search(r"\*\*Time\*\*: (\d+) minutes", opening):
            minutes[re.search(r"\((ch-.+?)\)=", opening)[1]] = int(stated[1])
    page = (ROOT / "instructors.md").read_text()
    rows = [row.split("|")[2:4] for row in page.splitlines() if re.match(r"\| \d", row)]
    assert len(rows) == 5 + 4 + 12
    for read, total in rows:
        assert sum(minutes[ref] for ref in re.findall(r"<(.+?)>`", read)) == int(total.strip() or 0)
    assert f"{{ref}}`ch-speed` ({minutes['ch-speed']} minutes)" in page
