"""Sphinx extension: mends what docutils and the theme write and a screen reader cannot read, loads
scripts where they are used, and says to search engines and other sites what a page is about."""

import re
from collections.abc import Callable
from html import escape
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.application import Sphinx

LONGEST = 340  # characters of a description
PREVIEW = "_static/preview.png"  # figures/preview.py


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


def claim(doctree: nodes.document) -> str:
    """What a page says of itself: whole sentences of its first paragraph, or none."""
    section = next(iter(doctree.findall(nodes.section)), doctree)
    first = next((n for n in section.children if isinstance(n, nodes.paragraph)), None)
    text = " ".join(first.astext().split()) if first is not None else ""
    while len(text) > LONGEST and ". " in text:
        text = text[: text.rindex(". ")] + "."
    return text


def describe(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Description, title and picture, as search engines and Open Graph read them.

    Addresses there must be whole, so they are once ``html: baseurl`` in _config.yml is set; until
    then the picture's is relative, and the page's is left out.
    """
    if not isinstance(doctree, nodes.document):
        return
    base, title = app.config.html_baseurl, app.env.titles[page].astext()
    about = claim(doctree) or f"{title}, in: {app.config.html_title}"
    tags = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": title,
        "og:description": about,
        "og:image": base.rstrip("/") + "/" + PREVIEW if base else context["pathto"](PREVIEW, 1),
        "og:image:alt": "One network under three learning rules, and the way of its error in each",
    }
    if base:
        tags["og:url"] = context["pageurl"]
    lines = [f'<meta name="description" content="{escape(about)}" />']
    lines += [f'<meta property="{name}" content="{escape(v)}" />' for name, v in tags.items()]
    lines += ['<meta name="twitter:card" content="summary_large_image" />']
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines, ""])


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", describe)
    app.connect("html-page-context", mend_roles)
    app.connect("html-page-context", mend_signatures)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme's own
    app.connect("html-page-context", load_where_used, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
