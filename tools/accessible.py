"""Sphinx extension: mends what docutils and the theme write and a screen reader cannot read, and
loads scripts where they are used."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from sphinx.application import Sphinx


def mend_roles(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Make a bibliography's entries items of its list: ARIA asks that of a list's children."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def mend_signatures(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Lines of a signature are no list of definitions: nothing is defined there."""

    def lines(found: re.Match) -> str:
        return re.sub("<(/?)dd>", r"<\1span>", f'<span class="sig-lines">{found[1]}</span>')

    if "body" in context:
        context["body"] = re.sub(r"<dl>\n(<dd>.*?)</dl>", lines, context["body"], flags=re.S)


def name_toggles(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Name the arrows beside the chapters in the table of contents, which are icons only."""
    toctree: Callable[..., object] = context["generate_toctree_html"]

    def named(*args: object, **options: object) -> str:
        name = '<summary aria-label="Pages of this chapter">'
        return str(toctree(*args, **options)).replace("<summary>", name)

    context["generate_toctree_html"] = named


def load_where_used(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """A script that is named after a page loads there only; else every page would have it."""

    def used(script: object) -> bool:
        name = PurePosixPath(getattr(script, "filename", None) or "").name
        pages = [p for p in app.env.found_docs if name.startswith(p)]
        return not pages or page in pages

    context["script_files"] = [script for script in context["script_files"] if used(script)]


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", mend_roles)
    app.connect("html-page-context", mend_signatures)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme's own
    app.connect("html-page-context", load_where_used, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
