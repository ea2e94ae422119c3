"""Sphinx extension: a page says to search engines and other sites what it is about, and the book's
own search leads from each term of the glossary to the pages that the glossary names."""

from collections import defaultdict
from html import escape

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

LONGEST = 340  # characters of a description
PREVIEW = "_static/preview.png"  # figures/preview.py
GLOSSARY = "glossary"


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


def collect(app: Sphinx, env: BuildEnvironment) -> None:
    """Which terms lead to which page, and to which label there: each ``ref`` of a definition."""
    labels = env.get_domain("std").anonlabels
    env.findable = defaultdict(list)
    for item in env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        terms = {t.astext() for t in item.children if isinstance(t, nodes.term)}
        terms |= {term.replace("-", " ") for term in terms}
        for ref in item.findall(addnodes.pending_xref):
            if (ref["refdomain"], ref["reftype"]) == ("std", "ref"):
                page, label, *_ = labels[ref["reftarget"]]
                env.findable[page] += [("single", t, label, "main", None) for t in sorted(terms)]


def lead(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Entries of the search's index, which nobody sees on the page."""
    if entries := app.env.findable.get(page):
        doctree += addnodes.index(entries=entries)


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", describe)
    app.connect("env-updated", collect)
    app.connect("doctree-resolved", lead)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
