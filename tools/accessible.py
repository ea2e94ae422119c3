"""Sphinx extension: mends what docutils writes and a screen reader cannot read."""

from sphinx.application import Sphinx


def mend_roles(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Make a bibliography's entries items of its list: ARIA asks that of a list's children."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", mend_roles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
