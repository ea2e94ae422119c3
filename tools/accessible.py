"""Sphinx extension: mends what docutils and the theme write and a screen reader cannot read."""

from collections.abc import Callable

from sphinx.application import Sphinx


def mend_roles(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Make a bibliography's entries items of its list: ARIA asks that of a list's children."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def name_toggles(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Name the arrows beside the chapters in the table of contents, which are icons only."""
    toctree: Callable[..., object] = context["generate_toctree_html"]

    def named(*args: object, **options: object) -> str:
        name = '<summary aria-label="Pages of this chapter">'
        return str(toctree(*args, **options)).replace("<summary>", name)

    context["generate_toctree_html"] = named


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", mend_roles)
    app.connect("html-page-context", name_toggles, priority=900)  # after the theme's own
    return {"parallel_read_safe": True, "parallel_write_safe": True}
