"""The pages: notebooks that ran cleanly, files that exist, and the HTML of `make test`."""

import contextlib
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_device import pretend, pretending

import bpfree
from bpfree.training.fit import Run
from bpfree.training.lockstep import Lockstep

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
NOTEBOOKS = sorted((ROOT / "chapters").glob("[0-9]*/*.ipynb"))
ADDRESS = CONFIG["repository"]["url"]
KINDS = ("theory", "experiments", "exercises")
# the headings that a page must have, in this order, and the most words on the built page, code
# included: what a reader manages in one sitting
BLOCKS = {
    "story": (
        ["The question", "Setup", "Notation", "The rule", "Build it", "Check it", "Try it",
         "The paper and we", "Recap", "When is it backprop?"], 4000,
    ),
    "theory": (["Setup"], 6000),
    "experiments": (["Setup", "Break it"], 6000),
    "exercises": (["Setup", "Exercises", "Project", "Questions", "Reading", "Versions"], 4000),
    "notation": (["Setup"], 6000),
    "audit": (["The question", "Setup", "Cheats", "What it cannot see", "Recap"], 4000),
    "theorems": (["Setup"], 2500),
    "side_by_side": (
        ["The question", "Setup", "Accuracy", "Choose and look", "Alignment",
         "Arithmetic, time and memory", "Locality", "Robustness", "Forgetting",
         "What each rule still needs", "Recap"], 6000,
    ),
    "your_rule": (
        ["The question", "Setup", "Notation", "The rule", "First checks", "The audit",
         "The theorem", "Try it", "Its place", "The project", "Questions", "Recap"], 3500,
    ),
    "two_more_ways": (
        ["The question", "Setup", "Notation", "The rule", "Build it", "Check it", "Try it",
         "The paper and we", "Recap", "When is it backprop?", "Questions", "Reading"], 3000,
    ),
    "errata": (["Setup", "PEPITA", "EKDAA", "Leader-follower networks", "Next-layer attention"],
               2500),
    "reproduce": (["Setup", "What is recorded", "What is not run", "The other records"], 6000),
    "speed": (["The question", "Setup", "Break it", "Exercises", "Recap", "Reading", "Versions"],
              6000),
}  # fmt: skip


def listed(entries: list[dict]) -> list[str]:
    """The files of a table of contents, pages before the pages nested under them."""
    return [f for e in entries for f in (e["file"], *listed(e.get("sections", [])))]


PAGES = [TOC["root"], *listed([c for part in TOC["parts"] for c in part["chapters"]])]
STORIES = [p for p in NOTEBOOKS if p.with_name(f"{p.stem}_theory.ipynb").exists()]

on_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
on_stories = pytest.mark.parametrize("path", STORIES, ids=lambda p: p.stem)
on_pages = pytest.mark.parametrize("page", PAGES)


def kind(path: Path) -> str:
    """story, theory, experiments, exercises, or the name of a page that stands alone."""
    last = path.stem.rpartition("_")[2]
    return last if last in KINDS else "story" if path in STORIES else path.stem


def built(page: str) -> BeautifulSoup:
    return BeautifulSoup((HTML / f"{page}.html").read_text(), "html.parser")


def cells(path: Path, kind: str) -> list[dict]:
    found = json.loads(path.read_text())["cells"]
    return [c for c in found if c["cell_type"] == kind and "".join(c["source"]).strip()]


def prose(path: Path) -> str:
    return "\n\n".join("".join(c["source"]) for c in cells(path, "markdown"))


def test_every_notebook_is_in_the_table_of_contents():
    found = {str(p.relative_to(ROOT).with_suffix("")) for p in NOTEBOOKS}
    assert found == {p for p in PAGES if re.match(r"chapters/\d", p)}


def test_a_chapter_is_a_story_and_its_three_pages():
    folders = {p.parent for p in NOTEBOOKS}
    pages = {f.name: sorted(kind(p) for p in f.glob("*.ipynb")) for f in folders}
    assert {n: k for n, k in pages.items() if len(k) > 1 and k != sorted(["story", *KINDS])} == {}


@on_notebooks
def test_every_code_cell_ran_in_order_without_error_or_stderr(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@on_notebooks
def test_notebook_is_small_enough_to_open(path):
    assert path.stat().st_size < 600_000


@on_notebooks
def test_bootstrap_cell_follows_the_configured_address(path):
    first = "".join(cells(path, "code")[0]["source"])
    assert re.findall(r'"(https?://[^"]+)"', first) == [ADDRESS]


@on_pages
def test_launch_buttons_open_this_very_page(page):
    """A page that is a notebook has both buttons, another has none."""
    hosts = [CONFIG["launch_buttons"][name] for name in ("colab_url", "binderhub_url")]
    links = [a["href"] for a in built(page).find_all("a", href=True)]
    at, branch = ADDRESS.removeprefix("https://github.com/"), CONFIG["repository"]["branch"]
    expected = [
        f"{hosts[0]}/github/{at}/blob/{branch}/{page}.ipynb",
        f"{hosts[1]}/v2/gh/{at}/{branch}?urlpath=lab/tree/{page}.ipynb",
    ] if (ROOT / f"{page}.ipynb").exists() else []  # fmt: skip
    assert sorted(link for link in links if link.startswith(tuple(hosts))) == sorted(expected)


@on_pages
def test_scripts_named_after_a_page_load_there_only(page):
    loaded = {
        Path(s["src"].partition("?")[0]).stem for s in built(page).find_all("script", src=True)
    }
    own = {p.stem for p in (ROOT / "_static").glob("*.js") if (ROOT / f"{p.stem}.md").exists()}
    assert len(own) == 2
    assert loaded & own == own & {page}


def test_address_is_written_in_one_place_only():
    files = subprocess.run(
        ["git", "grep", "-lF", ADDRESS, "--", ":!chapters/*/*.ipynb"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert files == ["_config.yml"]


def test_bootstrap_fetches_the_library_where_it_is_missing(tmp_path):
    """As in a fresh Colab: an empty folder, no bpfree, and git that finds the address."""
    first = "".join(cells(NOTEBOOKS[0], "code")[0]["source"])
    script = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}]\n{first}\n"
        "import bpfree; print(bpfree.__file__); print(bpfree.results.path('x').parent.is_dir())"
    )
    env = {
        **os.environ,
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
        "GIT_CONFIG_KEY_1": "safe.directory",
        "GIT_CONFIG_VALUE_1": "*",
    }
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "bpfree-book/bpfree/__init__.py"), "True"]


class Enough(Exception):
    """A cell has trained for as many steps as it may here."""


@pretending
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if kind(p) == "experiments"],
                         ids=lambda p: p.stem)  # fmt: skip
def test_trainings_of_a_page_go_to_a_gpu_where_there_is_one(path, monkeypatch):
    """All but those of rules that draw on the CPU at each step, which are trained seed by seed.

    The page's cells run. In the place of ``fit`` each kind of rule takes a step on tensors that
    only say that they are on a GPU, and the result is zeros: a cell ends where it asserts more.
    """
    went, seen, wrong, steps = [], set(), [], 0

    def counted(method):
        def count(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps > 20:
                raise Enough
            return method(*args, **kwargs)

        return count

    def fit(make, data, *, epochs, seeds=(0,), device="cpu", vectorize=None,
            optimizer=torch.optim.SGD, **others):  # fmt: skip
        nonlocal steps
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        rules, before = [make(g) for g in generators], steps
        name, L = (type(rules[0]).__name__, len(seeds)), len(rules[0].net)
        went.append((device, vectorize is not False))
        if device == "cuda" and name not in seen:
            seen.add(name)
            (group,) = optimizer([torch.zeros(1, requires_grad=True)]).param_groups
            if not group.get("capturable", True):
                wrong.append((*name, "an optimiser whose count of steps stays on the host"))
            steps = -1000
            try:
                pretend(Lockstep(rules, generators, data, 4, torch.optim.SGD), optimizer)
            except Exception as error:
                if "hasPrimaryContext" not in str(error):  # autograd wants a real card
                    wrong.append((*name, repr(error)))
            steps = before
        curve, angles = torch.zeros(len(seeds), epochs), torch.zeros(len(seeds), epochs + 1, L)
        return Run(rules, curve, curve, curve, angles, angles, [None] * len(seeds), 0.0)

    for method in ("update", "backward"):
        monkeypatch.setattr(bpfree.Rule, method, counted(getattr(bpfree.Rule, method)))
    monkeypatch.setattr(bpfree, "fit", fit)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(path.parent)
    names = {}
    for i, cell in enumerate(cells(path, "code")):
        steps = 0
        with monkeypatch.context() as patch, contextlib.suppress(*[Exception] * (i > 1)):
            if i == 1:  # the imports, and the line that chooses
                patch.setattr(torch.cuda, "is_available", lambda: True)
            exec("".join(cell["source"]), names)
    assert wrong == []
    assert ("cuda", True) in went
    assert set(went) <= {("cuda", True), ("cpu", False)}


def test_bootstrap_does_nothing_where_the_library_is_and_clones_where_it_is_not(
    tmp_path, monkeypatch
):
    (first,) = {"".join(cells(path, "code")[0]["source"]) for path in NOTEBOOKS}
    ran, before = [], [*sys.path]
    monkeypatch.setattr(subprocess, "run", lambda command, **how: ran.append((command, how)))
    monkeypatch.setattr(sys, "path", [*before])
    monkeypatch.chdir(tmp_path)
    exec(first, {})
    assert (ran, sys.path) == ([], before)
    monkeypatch.setitem(sys.modules, "bpfree", None)  # so that its import fails
    exec(first, {})
    # and no pip: Colab's packages stay as they are
    clone = ["git", "clone", "-q", "--depth", "1", ADDRESS, "bpfree-book"]
    assert ran == [(clone, {"check": True})]
    assert sys.path == ["bpfree-book", *before]


def test_what_colab_has_is_what_the_library_asks_for():
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tools" / "colab.txt").read_text(), flags=re.M)
    has = {canonicalize_name(name): version for name, version in pins}
    wanted = re.search(
        r"^dependencies = \[(.+?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    asked = [Requirement(text) for text in re.findall(r'"(.+)"', wanted.group(1))]
    assert {r.name for r in asked} >= {"torch", "torchvision", "numpy", "scikit-learn"}
    assert [r for r in asked if not r.specifier.contains(has[canonicalize_name(r.name)])] == []


def test_pages_ran_with_colabs_packages_and_left_them_alone():
    """As `make colab` recorded; a page that is newer than the record is not in it."""
    record = json.loads((ROOT / "figures" / "results" / "colab.json").read_text())
    assert record["pages"].keys() <= {path.stem for path in NOTEBOOKS}
    for page in record["pages"].values():
        assert page["seconds"] < 180
        assert page["slowest_cell"] < 60
        assert page["other_outputs"] == []
    assert record["packages_added"] == record["packages_replaced"] == []
    assert record["pip_install_would_add"] == ["bpfree"]


def test_binder_has_the_python_of_colab_and_what_a_clone_asks_for():
    asked = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    colabs = re.search(r"Python (3\.\d+)", (ROOT / "tools" / "colab.txt").read_text()).group(1)
    assert asked == [f"python={colabs}", "pip", {"pip": ["-e .[book,dev]"]}]


def test_every_page_is_of_a_kind():
    assert {kind(p) for p in NOTEBOOKS} - BLOCKS.keys() == set(), "add what it must have to BLOCKS"


@on_notebooks
def test_page_has_its_blocks_in_order(path):
    headings = re.findall(r"^## (.+?)\s*$", prose(path), flags=re.M)
    expected, _ = BLOCKS[kind(path)]
    assert [h for h in headings if h in expected] == expected


@on_notebooks
def test_page_is_read_in_one_sitting(path):
    page = built(path.relative_to(ROOT).with_suffix(""))
    words = len(page.find("article").get_text().split())
    assert words <= BLOCKS[kind(path)][1]


@on_stories
def test_story_opens_with_the_rules_drawing_and_says_how_long_it_takes(path):
    opening = prose(path).partition("## Setup")[0]
    drawing = re.search(r":::\{figure\} \S+/figures/paths-[\w-]+\.svg\n:alt: (.{40,})", opening)
    assert drawing, "no drawing, or no alternative text of at least a sentence"
    assert ":::{admonition} At a glance" in opening


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if kind(p) in ("exercises", "speed")],
                         ids=lambda p: p.stem)  # fmt: skip
def test_chapter_has_solved_exercises_and_a_project(path):
    text = prose(path)
    exercises = set(re.findall(r"\{exercise(?:-start)?\}[^\n]*\n:label: (\S+)", text))
    solutions = set(re.findall(r":::+\{solution(?:-start)?\} (\S+)", text))
    assert solutions <= exercises
    assert len(solutions) >= (3 if kind(path) == "speed" else 6)
    assert len(exercises - solutions) >= 1  # the project has no published answer


@on_notebooks
def test_prose_types_no_number_of_a_chapter_figure_or_theorem(path):
    typed = re.findall(r"\b(?:[Cc]hapter|[Ff]igure|[Tt]heorem|[Ss]ection) \d+", prose(path))
    assert not typed


@on_notebooks
def test_referenced_files_exist(path):
    targets = re.findall(r"\]\(([^)#]+)\)|\{(?:image|figure)\} (\S+)", prose(path))
    local = [
        a or b for a, b in targets if "://" not in (a or b) and not (a or b).startswith("mailto")
    ]
    assert [t for t in local if not (path.parent / t).exists()] == []


def test_every_figure_of_a_cell_has_caption_and_alternative_text():
    bare = []
    for path in NOTEBOOKS:
        for i, cell in enumerate(cells(path, "code")):
            data = [o.get("data", {}) for o in cell["outputs"]]
            if any(k.startswith("image/") for d in data for k in d):
                look = cell["metadata"].get("mystnb", {})
                if not (look.get("figure", {}).get("caption") and look.get("image", {}).get("alt")):
                    bare.append(f"{path.name}, code cell {i}")
    assert bare == []


@on_pages
def test_page_is_built_and_holds_its_title_and_mathematics(page):
    file = HTML / f"{page}.html"
    assert file.exists(), f"{file} was not built"
    soup = BeautifulSoup(file.read_text(), "html.parser")
    source = next(p for p in (ROOT / f"{page}.ipynb", ROOT / f"{page}.md") if p.exists())
    text = prose(source) if source.suffix == ".ipynb" else source.read_text()
    title = re.search(r"^# (.+)$", text, flags=re.M).group(1).strip()
    heading = soup.find("h1").get_text().rstrip("#").strip()
    assert heading.endswith(title)
    assert len(soup.find_all("div", class_="math")) >= text.count("$$") // 2
    last = re.findall(r"^## (.+)$", text, flags=re.M)[-1:]
    assert all(any(h in tag.get_text() for tag in soup.find_all("h2")) for h in last)


@on_pages
def test_page_has_no_broken_image_or_local_link(page):
    file = HTML / f"{page}.html"
    soup = BeautifulSoup(file.read_text(), "html.parser")
    targets = [t["src"] for t in soup.find_all("img")]
    targets += [t["href"] for t in soup.find_all("a", href=True)]
    local = {t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|//|#|data:", t)} - {""}
    assert [t for t in local if not (file.parent / t).resolve().exists()] == []


@on_pages
def test_page_shows_no_raw_markup(page):
    soup = BeautifulSoup((HTML / f"{page}.html").read_text(), "html.parser")
    for tag in soup.find_all(["pre", "code", "script", "style"]):
        tag.decompose()
    text = soup.find("article").get_text()
    assert not re.findall(
        r"^\|.*\|$|:::|\$\$|\{(?:ref|eq|cite|numref|prf)[^}]*\}`", text, flags=re.M
    )


def test_landing_page_shows_what_is_recorded():
    """Each number of its table is computed here once more, from the files."""
    script = (
        "import json, landing as l; print(json.dumps([l.page(), *map(list, (l.COLUMNS, l.ROWS))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "figures", check=True, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    page, columns, rows = json.loads(done.stdout)
    assert (ROOT / "figures" / "landing.md").read_text() == page, "make figures"
    shown = [tr.find_all("td")[1:] for tr in built("intro").select("table.landing tbody tr")]
    assert [len(cells) for cells in shown] == [len(columns)] * len(rows)
    for column, cells in zip(columns, zip(*shown, strict=True), strict=True):
        protocols = []
        for row, cell in zip(rows, cells, strict=True):
            file, text = ROOT / "figures" / "results" / f"{column}-{row}.json", cell.get_text()
            if not file.exists():
                assert text.strip() == "–"
                continue
            recipe, runs = (json.loads(file.read_text())[key] for key in ("recipe", "runs"))
            last = [run["test_accuracy"][-1] for run in runs.values()]
            numbers = [f(last) for f in (statistics.fmean, statistics.stdev)[: len(last)]]
            assert text.strip() == " ± ".join(f"{number:.2f}" for number in numbers)
            kind, sizes, options = recipe["network"]
            if row == "drtp":  # the page says so
                options["activation"] = "relu" if options["activation"] == "tanh" else None
            same = ("data", "epochs", "batch_size", "momentum", "milestones")
            protocols.append([kind, sizes, options, *(recipe[key] for key in same)])
        assert all(protocol == protocols[0] for protocol in protocols), column


def test_every_public_name_is_described():
    entries = {dt["id"]: dt.find_next_sibling("dd") for dt in built("api").select("dl.py > dt[id]")}
    for name in bpfree.__all__:
        thing = getattr(bpfree, name)
        members = vars(thing).items() if inspect.ismodule(thing) else ()
        inside = [k for k, v in members if not k.startswith("_")
                  and getattr(v, "__module__", "") == thing.__name__]  # fmt: skip
        for path in [f"bpfree.{name}.{k}" for k in inside] or [f"bpfree.{name}"]:
            assert len(entries[path].get_text().split()) > 3, path


@pytest.mark.parametrize("name", bpfree.rules.__all__)
def test_a_rule_is_linked_with_its_story(name):
    module = sys.modules[getattr(bpfree, name).__module__]
    number = int(re.search(r"chapter (\d+)", module.__doc__)[1])
    (story,) = (p for p in PAGES if re.match(rf"chapters/{number:02d}_(\w+)/\1$", p))
    assert built(story).select_one(f'a.api[href="../../api.html#bpfree.{name}"]')
    entry = built("api").find(id=f"bpfree.{name}")
    assert entry.find_parent("section").select_one(f'a[href="{story}.html"]')


def test_loop_of_the_landing_page_runs_as_it_stands_there():
    names = {}
    exec(built("intro").find("div", class_="highlight-python").get_text(), names)
    assert 0 < float(names["loss"]) < 1  # chance is 2.3


def test_pages_typeset_mathematics_without_a_network():
    html = (HTML / f"{PAGES[1]}.html").read_text()
    scripts = [s["src"] for s in BeautifulSoup(html, "html.parser").find_all("script", src=True)]
    mathjax = [s for s in scripts if "mathjax" in s.lower()]
    assert mathjax
    assert not [s for s in mathjax if "://" in s]
