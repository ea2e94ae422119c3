"""The pages that are read in a row as one PDF, printed by Chromium from the built book.

    python tools/pdf.py     after `make book`; writes _build/html/_static/bpfree.pdf, and a link to
                            it on the landing page

They are the notebooks on the top level of the table of contents, and the references. On paper
folded text is open, and folded code is left out.
"""

from __future__ import annotations

import html
import io
import logging
import mimetypes
import re
import shutil
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Page, Route, sync_playwright
from pypdf import PdfReader, PdfWriter

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
PDF = HTML / "_static" / "bpfree.pdf"
PLACE = '<p id="as-pdf" hidden></p>'  # of the link, in intro.md
SITE = "http://book.invalid/"
WIDTH = 658  # CSS pixels: A4 without its margins
MARGINS = {"top": "18mm", "bottom": "20mm", "left": "18mm", "right": "18mm"}
NUMBER = """<div style="width: 100%; text-align: center; font: 8pt sans-serif">
<span class="pageNumber"></span></div>"""
STYLE = """
html { font-size: 10.5pt; scroll-padding: 0 }
body { display: block; color: #000; background: #fff; min-height: 0 }
article, #title, #contents { break-after: page }
#title { padding-top: 70mm; text-align: center }
#title h1 { font-size: 28pt }
#contents ol { list-style: none; padding: 0; columns: 2; column-gap: 2em; font-size: 9pt }
#contents li { display: flex; justify-content: space-between; gap: 1em; break-inside: avoid }
#contents .title { font-weight: 700; margin-top: .6em; break-after: avoid }
#contents .section { padding-left: 1em }
a:not([href]), #contents a, a.api { color: inherit; text-decoration: none !important }
pre, .highlight, .cell, .cell_input, table { break-inside: auto !important; orphans: 4; widows: 4 }
h1, h2, h3, h4, .admonition-title { break-after: avoid }
figure, tr, .admonition, .proof, .cell_output, img { break-inside: avoid }
mjx-container[display] { break-inside: avoid }
.cell_output:has(pre, table) { break-inside: auto }
.admonition:has(p ~ p ~ p), .proof:has(p ~ p ~ p) { break-inside: auto }
img { max-width: 100% !important; min-width: 0 !important; height: auto; max-height: 230mm }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; font-size: 7.8pt !important }
pre, figure, .output, mjx-container, span.math, div.math { overflow: visible !important }
.headerlink, .copybtn, .tex2jax_ignore > button, mjx-assistive-mml { display: none !important }
.pst-scrollable-table-container { overflow: visible !important }
table { font-size: 8.5pt }
"""
# what is wider than the page becomes smaller, not cut
FIT = """width => {
  document.querySelectorAll("mjx-assistive-mml").forEach(e => e.remove());
  for (const e of document.querySelectorAll("mjx-container, table")) {
    const room = e.parentElement.getBoundingClientRect();
    const kids = [e, ...e.querySelectorAll("mjx-math, mjx-mtable, tbody")];
    const right = Math.max(...kids.map(k => k.getBoundingClientRect().right));
    const over = (right - room.left) / (width - room.left);
    if (over > 1) e.style.fontSize = parseFloat(getComputedStyle(e).fontSize) / over * .98 + "px";
  }
  return [...document.querySelectorAll("pre, img, table, mjx-container")].filter(
    e => e.getBoundingClientRect().right > width + 2 ||
      e.matches("pre") && e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 120));
}"""

Heading = tuple[str, str, str]  # "title" or "section", words, id of its place


def pages() -> list[str]:
    """The notebooks of the table of contents' top level, and the references."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    files = [entry["file"] for part in parts for entry in part["chapters"]]
    return [f for f in files if f.startswith("chapters/") or f == "references"]


def anchor(page: str, name: str = "") -> str:
    return f"{page.replace('/', '-')}--{name}"


def article(page: str, among: list[str]) -> Tag:
    """A page's text: ids of its own, links to other pages of the PDF inside it, others as text."""
    soup = BeautifulSoup((HTML / f"{page}.html").read_text(), "html.parser")
    text = soup.select_one("article.bd-article")
    assert text, page
    folder = Path(page).parent

    def resolved(link: str) -> str:
        path = (HTML / folder / unquote(urlsplit(link).path)).resolve()
        return path.relative_to(HTML.resolve()).as_posix()

    for tag in text.find_all(True):
        if tag.decomposed:
            continue
        if tag.name in ("script", "button"):
            tag.decompose()
            continue
        if "id" in tag.attrs:
            tag["id"] = anchor(page, tag["id"])
        if "src" in tag.attrs and "://" not in tag["src"] and not tag["src"].startswith("data:"):
            tag["src"] = resolved(tag["src"])
        if tag.name == "img":
            tag.attrs.pop("loading", None)
        if tag.name == "details":
            tag["open"] = ""
            if "hide" in tag.get("class", []):  # code, not text
                tag.decompose()
                continue
        link = tag.get("href")
        if tag.name != "a" or not link or re.match(r"[a-z]+:", link):
            continue
        to = page if link.startswith("#") else resolved(link).removesuffix(".html")
        if to in among:
            tag["href"] = f"#{anchor(to, urlsplit(link).fragment)}"
        else:
            del tag["href"]
    text["id"] = anchor(page)
    return text


def headings(text: Tag) -> list[Heading]:
    """A page's title and its sections."""
    found = []
    for tag in text.find_all(["h1", "h2"]):
        words = re.sub(r"\s+", " ", tag.get_text()).strip().rstrip("#").strip()
        section = tag.find_parent("section")
        kind = "title" if tag.name == "h1" else "section"
        found.append((kind, words, section["id"] if section else text["id"]))
    return found


def document() -> tuple[str, list[Heading]]:
    """The whole book as one page, and its headings."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    among = pages()
    texts = [article(page, among) for page in among]
    listed = [heading for text in texts for heading in headings(text)]
    head = BeautifulSoup((HTML / "intro.html").read_text(), "html.parser").head
    some = BeautifulSoup((HTML / f"{among[0]}.html").read_text(), "html.parser")
    styles = "".join(str(s) for s in head.find_all("link", rel="stylesheet"))
    scripts = "".join(
        str(s).replace("../../", "") for s in some.find_all("script")
        if "mathjax" in str(s).lower()
    )  # fmt: skip
    rows = "".join(
        f'<li class="{kind}"><a href="#{to}">{html.escape(words)}</a> <span id="at-{to}"></span>'
        for kind, words, to in listed
    )
    title = html.escape(config["title"])
    front = (
        f'<section id="title"><h1>{title}</h1><p>{html.escape(config["author"])}, '
        f"{config['copyright']}</p>{config['html']['extra_footer']}<p>The stories. Proofs, "
        "experiments, exercises and the notebooks themselves are in the book.</p></section>"
        f'<nav id="contents"><h1>Contents</h1><ol>{rows}</ol></nav>'
    )
    body = front + "".join(map(str, texts))
    return (
        f'<!doctype html><html lang="en" data-theme="light" data-mode="light"><head>'
        f'<meta charset="utf-8"><title>{title}</title>{styles}{scripts}'
        f"<style>{STYLE}</style></head><body>{body}</body></html>"
    ), listed


def serve(route: Route, text: str) -> None:
    path = unquote(urlsplit(route.request.url).path).lstrip("/")
    file = HTML / path
    if not path:
        route.fulfill(body=text, content_type="text/html; charset=utf-8")
    elif file.is_file():
        route.fulfill(body=file.read_bytes(), content_type=mimetypes.guess_type(path)[0])
    else:
        route.fulfill(status=404)


def must(so: bool, what: object) -> None:
    if not so:
        raise SystemExit(f"the PDF is not as it must be: {what}")


def typeset(page: Page, text: str) -> None:
    """The document in the browser, its formulas set; SystemExit for what would be lost on paper."""
    page.route("**/*", lambda route: serve(route, text))
    page.goto(SITE, wait_until="load")
    page.evaluate("async () => { await MathJax.startup.promise; await document.fonts.ready }")
    wide = page.evaluate(FIT, WIDTH)
    must(not wide, f"too wide: {wide}")
    raw = page.locator("mjx-merror, .math:not(:has(mjx-container))").count()
    must(raw == 0, f"{raw} formulas are not typeset")
    lost = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    must(not lost, f"images that cannot be read: {lost}")


def printed(page: Page) -> bytes:
    return page.pdf(
        format="A4", margin=MARGINS, print_background=True, display_header_footer=True,
        header_template="<span></span>", footer_template=NUMBER,
    )  # fmt: skip


def plain(words: str) -> str:
    """Letters alone, ligatures taken apart."""
    return re.sub(r"\W+", "", unicodedata.normalize("NFKC", words))


def found(made: bytes, listed: list[Heading]) -> dict[str, int]:
    """The page on which each heading stands; SystemExit unless all links lead somewhere."""
    pdf = PdfReader(io.BytesIO(made))
    places = pdf.named_destinations
    links = [a.get_object().get("/Dest") for page in pdf.pages for a in page.get("/Annots", [])]
    must({f"/{to}" for _, _, to in listed} <= {*links}, "a heading is not in the contents")
    must({*links} <= {*places, None}, f"dead links: {({*links}) - {*places, None}}")
    numbers = {to: pdf.get_destination_page_number(places[f"/{to}"]) + 1 for _, _, to in listed}
    must([*numbers.values()] == sorted(numbers.values()), "headings are out of order")
    return numbers


def read(made: bytes, listed: list[Heading]) -> None:
    """SystemExit unless each title is in the text and each font in the file."""
    pdf = PdfReader(io.BytesIO(made))
    text = "".join(plain(page.extract_text()) for page in pdf.pages)
    for kind, words, _ in listed:  # in the contents, and where it stands
        must(kind != "title" or text.count(plain(words)) >= 2, f"no {words!r} in the text")
    for page in pdf.pages:
        for font in page["/Resources"].get("/Font", {}).values():
            must(embedded(font.get_object()), f"not embedded: {font.get_object()}")


def outlined(made: bytes, listed: list[Heading], numbers: dict[str, int]) -> bytes:
    """The same with bookmarks. Chromium's own need a tag for each part of each formula: 10 MB."""
    logging.getLogger("pypdf").setLevel("ERROR")  # it miscounts what it has cloned
    writer = PdfWriter(clone_from=io.BytesIO(made))
    title = None
    for kind, words, to in listed:
        parent = title if kind == "section" else None
        item = writer.add_outline_item(title=words, page_number=numbers[to] - 1, parent=parent)
        title = item if kind == "title" else title
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def embedded(font: Any) -> bool:
    if font["/Subtype"] == "/Type3":  # glyphs are drawings in the file
        return True
    if "/DescendantFonts" in font:
        return all(embedded(f.get_object()) for f in font["/DescendantFonts"])
    return any(f"/FontFile{n}" in font["/FontDescriptor"] for n in ("", 2, 3))


def main() -> int:
    start = time.monotonic()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        print("no Chromium here: apt-get install chromium", file=sys.stderr)
        return 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
        page.set_default_timeout(600_000)
        page.emulate_media(media="print")
        text, listed = document()
        typeset(page, text)
        numbers = found(printed(page), listed)
        page.evaluate(
            "n => { for (const to in n) document.getElementById('at-' + to).textContent = n[to] }",
            numbers,
        )
        made = printed(page)
        must(found(made, listed) == numbers, "page numbers moved headings to other pages")
        browser.close()
    read(made, listed)
    made = outlined(made, listed, numbers)
    PDF.write_bytes(made)
    count = len(PdfReader(PDF).pages)
    said = f"{count} pages, {len(made) / 1e6:.1f} MB"
    landing = HTML / "intro.html"
    link = f'<p id="as-pdf"><a href="_static/{PDF.name}">The stories as one PDF</a>: {said}.</p>'
    text = re.sub('<p id="as-pdf".*?</p>', link, landing.read_text())
    assert link in text, f"no place for the link in {landing}"
    landing.write_text(text)
    print(f"{PDF.relative_to(ROOT)}: {said}, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
