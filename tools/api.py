"""Sphinx extension: the page of the library's names, made from their docstrings.

Listed is what ``bpfree.__all__`` names, what the pages of the book use, and what any of these
takes, returns or raises. So a new public name appears by itself, and nothing is typed twice.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

import bpfree

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- names -->"  # where they go in api.md
STORIES = {int(p.parent.name[:2]): p for p in sorted((ROOT / "chapters").glob("[0-9]*/*.ipynb"),
                                                     key=lambda p: -len(p.name))}  # fmt: skip
WINGS = ("", ".rules", ".training", ".experiments")  # imports run one way, the other way round
# a name in code and in text, as Pygments and docutils write it
NAME = r'<span class="n">(\w+)</span>'
DOTTED = (r'<span class="n">bpfree</span>(?:<span class="o">\.</span><span class="n">\w+</span>)+'
          r'|(?<=<span class="pre">)bpfree(?:\.\w+)+(?=</span></code>)')  # fmt: skip
IMPORTED = (r'(<span class="kn">from</span><span class="w"> </span><span class="nn">(bpfree[\w.]*)'
            r'</span><span class="w"> </span><span class="kn">import</span>)(.*)')  # fmt: skip


def find(path: str) -> Any:
    """The object of a dotted path, whose modules may be shadowed (``bpfree.audit.Audit``)."""
    *above, name = path.split(".")
    if not above:
        return bpfree
    try:
        return getattr(importlib.import_module(".".join(above)), name)
    except (ImportError, AttributeError):
        try:
            return getattr(find(".".join(above)), name)
        except AttributeError:
            return None


def ours(thing: Any) -> bool:
    """A class or function of this library, no method, that is not for its own use only."""
    return (
        (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith("bpfree.")
        and thing.__qualname__.isidentifier()
        and not thing.__name__.startswith("_")
    )


def used() -> set[str]:
    """Dotted paths that begin with bpfree, in the code and the text of all pages."""
    found: set[str] = set()
    for page in (ROOT / "chapters" / "text").glob("*/*.md"):
        text = page.read_text()
        found |= {*re.findall(r"\bbpfree(?:\.[A-Za-z_]\w*)+", text)}
        for module, names in re.findall(r"^from (bpfree[\w.]*) import ([\w, ]+)", text, flags=re.M):
            for name in names.replace(" ", "").split(","):
                inside = re.findall(rf"\b{name}\.(\w+)", text)  # of a module
                found |= {f"{module}.{name}", *(f"{module}.{name}.{n}" for n in inside)}
    return found


def met(thing: Any) -> list[Any]:
    """Types of this library that a function, or a class's methods, take, return or raise."""
    parts = [thing] if inspect.isfunction(thing) else [*vars(thing).values()]
    todo: list[Any] = []
    for part in filter(inspect.isfunction, parts):
        if not part.__name__.startswith("_"):
            todo += typing.get_type_hints(part).values()
            raises = (part.__doc__ or "").partition("Raises:")[2]
            todo += [part.__globals__.get(n) for n in re.findall(r"^ +(\w+):", raises, flags=re.M)]
    for hint in todo:  # grows on the way
        todo += typing.get_args(hint)
    return [hint for hint in todo if inspect.isclass(hint) and ours(hint)]


@cache
def names() -> dict[Any, str]:
    """{class or function: the path by which a user reaches it}, those in ``__all__`` first."""
    found: dict[Any, str] = {}
    for name in bpfree.__all__:
        thing = getattr(bpfree, name)
        members = vars(thing) if isinstance(thing, ModuleType) else {}
        inside = {m: f"bpfree.{name}.{k}" for k, m in members.items() if ours(m)
                  and m.__module__ == thing.__name__}  # fmt: skip
        found |= {thing: f"bpfree.{name}"} if ours(thing) else inside
    more = [thing for path in sorted(used()) if ours(thing := find(path))]
    more += [t for thing in [*found, *more] for t in met(thing)]
    return found | {t: f"{t.__module__}.{t.__name__}" for t in more if t not in found}


def chapter(module: ModuleType) -> float:
    """The number of the chapter that a module's docstring names first."""
    number = re.search(r"\bchapter (\d+)", module.__doc__ or "")
    return int(number[1]) if number else 99


def marked_up(lines: list[str]) -> list[str]:
    """A docstring as reST: equations, which are indented, literal; chapters linked; and no other
    character but the backquote with a meaning."""
    new: list[str] = []
    literal = section = False
    for before, line in zip(["", *lines], [*lines, ""], strict=True):
        if line[:1].strip():
            literal, section = False, bool(re.fullmatch(r"(Args|Raises|Returns):", line))
        elif line.startswith("    ") and not section and not before and not literal:
            literal = True
            new += [".. code-block:: text", ""]
        if not literal:
            parts = re.split(r"(``.+?``)", line)
            parts[::2] = [linked(re.sub(r"([\\*|_'\"])", r"\\\1", part)) for part in parts[::2]]
            line = "".join(parts)
        new.append(line)
    return new[:-1]


def linked(text: str) -> str:
    """Chapters by number become links to their stories."""

    def link(found: re.Match) -> str:
        story = STORIES[int(found[1])].relative_to(ROOT).with_suffix("")
        return f":doc:`{found[0]} </{story}>`"

    return re.sub(r"\b[Cc]hapter (\d+)", link, text)


def is_record(thing: Any) -> bool:
    return dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")


def fields(thing: Any) -> list[str]:
    """The fields of a dataclass or named tuple, as its source has them, comments included."""
    source = inspect.getsource(thing).partition('"""')[2].partition('"""')[2]
    found = re.match(r"(?:\s*\n| {4}\w+: .*\n| {4}#.*\n| {5,}.*\n)*", source)
    return [".. code-block::", "", *found[0].strip("\n").splitlines(), ""] if found else []


def entries(source: str) -> str:
    """The page: packages, their modules in the chapters' order, and the names of each."""
    packages: dict[str, dict[str, list[tuple[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for thing, path in names().items():
        module = thing.__module__
        packages[module.rpartition(".")[0]][module].append((path, thing))

    def doc(name: str) -> list[str]:
        text = marked_up((importlib.import_module(name).__doc__ or "").strip().splitlines())
        return ["", "```{eval-rst}", *text, "```", ""]

    out: list[str] = []
    for package in sorted(packages, key=[*map("bpfree".__add__, WINGS)].index):
        out += ["", f"## {package}", *doc(package)]
        modules = sorted(packages[package], key=lambda m: (chapter(importlib.import_module(m)), m))
        for module in modules:
            out += ["", f"### {module.rpartition('.')[2]}", *doc(module), "```{eval-rst}"]
            order = sorted(packages[package][module], key=lambda e: line_of(e[1]))
            for path, thing in order:
                kind = "function" if inspect.isfunction(thing) else (
                    "exception" if issubclass(thing, Exception) else "class")  # fmt: skip
                out += [f".. auto{kind}:: {path}", "   :members:" * (kind == "class"), ""]
            out += ["```", ""]
    return source.replace(MARK, "\n".join(out))


def line_of(thing: Any) -> int:
    return inspect.getsourcelines(thing)[1]


def write(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "api":
        source[0] = entries(source[0])


def mark_up(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [*marked_up(lines), *(fields(thing) if is_record(thing) else [])]


def leave_out(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool:
    """A named tuple's fields, which stand in its docstring."""
    return skip or type(thing).__name__ == "_tuplegetter"


def sign(app: Sphinx, what: str, name: str, thing: Any, *args: Any) -> tuple[str, str] | None:
    """A record has its fields instead of a signature."""
    return ("", "") if is_record(thing) else None


def link_code(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Where a page's code or text names one of them first, a link to what is said of it."""
    if page == "api" or "body" not in context:
        return
    known, seen = app.env.get_domain("py").objects, set()  # type: ignore[attr-defined]
    paths = names()

    def link(path: str, html: str) -> str:
        thing = find(path)
        name = paths.get(thing) if ours(thing) else None
        if name not in known or name in seen:
            return html
        seen.add(name)
        target = f"{context['pathto']('api')}#{known[name].node_id}"
        return f'<a class="api" href="{target}">{html}</a>'

    def dotted(found: re.Match) -> str:
        return link(re.sub(r"<[^>]+>", "", found[0]), found[0])

    def imported(found: re.Match) -> str:
        module = found[2]
        each = re.sub(NAME, lambda n: link(f"{module}.{n[1]}", n[0]), found[3])
        return found[1] + each

    body = re.sub(DOTTED, dotted, context["body"])
    context["body"] = re.sub(IMPORTED, imported, body)


def setup(app: Sphinx) -> dict:
    app.connect("source-read", write)
    app.connect("autodoc-process-docstring", mark_up, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("html-page-context", link_code)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
