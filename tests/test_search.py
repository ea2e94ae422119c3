"""Whoever looks for a rule, by any of its names, finds its story: in the book's own search, and by
what each page says of itself to other sites."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Page
from test_book import CONFIG, HTML, PAGES, ROOT, built
from test_browser import CHROMIUM, served

from bpfree import rules, style

in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
GLOSSARY = built("glossary").find("section", id="rules").find("dl")
# each term of the glossary's first list -> the page to which the last link of its definition leads
STORIES = {
    term.find(string=True).strip(): term.find_next("dd").find_all("a")[-1]["href"].partition(".")[0]
    for term in GLOSSARY.find_all("dt")
}
SHORT = "BP FA DFA DRTP KP PEPITA EKDAA LFNN LFNN-l FG-W FG-A".split()
FIRST = """words => words.map(q => Search._performSearch(...Search._parseQuery(q))
  .reverse().slice(0, 3).map(found => found[0]))"""


@pytest.fixture(scope="module")
def search(browser) -> Iterator[Page]:
    with served(HTML) as base:
        page = browser.new_page(base_url=base)
        page.goto("search.html")
        page.wait_for_function("Search._index")
        yield page


@in_a_browser
def test_each_rule_is_found_by_each_of_its_names(search):
    names = [*STORIES, *(name.replace("-", " ") for name in STORIES)]
    wanted = [*STORIES.values()] * 2
    found = dict(zip(names, search.evaluate(FIRST, names), strict=True))
    assert [n for n, page in zip(names, wanted, strict=True) if page not in found[n]] == []


@in_a_browser
def test_the_page_shows_what_was_found_in_that_order(search):
    for word in ("KP", "DRTP"):
        search.goto(f"search.html?q={word}")
        search.wait_for_selector("ul.search > li > a")
        first = search.locator("ul.search > li > a").first.get_attribute("href")
        assert STORIES[word] in first


def test_the_glossary_has_every_rule_by_its_name_and_abbreviation():
    labels = [style.label(rule) for rule in rules.__all__ if rule not in ("Frozen", "shuffled")]
    assert {*SHORT, *labels} - STORIES.keys() == {"attention"}  # it is next-layer attention there


def test_every_term_that_a_page_defines_is_in_the_glossary():
    """Defined is what is bold, in at most three words that begin no sentence."""
    terms = {
        t.find(string=True).strip().lower() for t in built("glossary").select("dl.glossary dt")
    }
    undefined = {"subtracted", "you give"}  # bold for weight
    for twin in (ROOT / "chapters" / "text").glob("*/*.md"):
        text = re.sub(r"```.*?```", "", twin.read_text(), flags=re.S)
        for bold in re.findall(r"(?<!\*)\*\*([a-z][\w -]*)\*\*(?!\*)", text):
            if len(bold.split()) < 4 and not {bold, bold.removesuffix("s")} & terms:
                assert bold in undefined, f"{twin.name}: {bold} is not in glossary.md"
    assert len(terms) > 80


def test_the_index_of_symbols_is_what_the_pages_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "figures")
    symbols = import_module("symbols")
    assert (ROOT / "figures" / "symbols.md").read_text() == symbols.page(), "make figures"
    tables = "\n".join(twin.read_text() for twin in (ROOT / "chapters" / "text").glob("*/*.md"))
    heads = len(re.findall(r"^\| (?:symbol|letter) \| meaning ", tables, flags=re.M))
    assert heads > 8
    index = built("glossary").find("section", id="index-of-symbols").find("table")
    assert len({a["href"] for a in index.find_all("a", href=True)}) >= heads
    assert "" not in {row.find_all("td")[-1].get_text() for row in index.find_all("tr")[1:]}


@cache
def meta(page: str) -> dict[str, str]:
    head = (HTML / f"{page}.html").read_text().partition("</head>")[0]
    tags = BeautifulSoup(head, "html.parser").find_all("meta", content=True)
    return {tag.get("property") or tag.get("name"): tag["content"] for tag in tags}


def opening(page: str) -> tuple[str, str]:
    """Title and first paragraph, without parsing the whole of a large page."""
    article = (HTML / f"{page}.html").read_text().partition("<article")[2]
    found = re.search(r"<h1>(.*?)</h1>\s*(?:<p>(.*?)</p>)?", article, flags=re.S)
    return tuple(
        " ".join(BeautifulSoup(part or "", "html.parser").get_text().split())
        for part in found.groups()
    )


def test_each_page_has_a_description_of_its_own():
    said = {page: meta(page)["description"] for page in PAGES}
    assert len(set(said.values())) == len(PAGES)
    assert [page for page, text in said.items() if not 20 <= len(text) <= 340] == []
    assert not re.findall(r"[{}`$\\]", " ".join(said.values()))


@pytest.mark.parametrize("page", PAGES)
def test_description_and_preview_say_what_the_page_says_first(page):
    found, base, (title, first) = meta(page), CONFIG["html"]["baseurl"], opening(page)
    assert found["og:title"] in title
    assert found["og:description"] == found["description"]
    assert first.startswith(found["description"]) if page != "references" else not first
    picture = found["og:image"]
    if base:
        assert found["og:url"] == f"{base.rstrip('/')}/{page}.html"
        assert picture == f"{base.rstrip('/')}/_static/preview.png"
    else:
        assert "og:url" not in found
        picture = (HTML / f"{page}.html").parent / picture
        assert picture.resolve() == HTML / "_static" / "preview.png"


def test_the_picture_is_what_its_script_draws(monkeypatch):
    """But for the edges of letters, which depend on the font library."""
    from PIL import Image, ImageChops, ImageStat

    monkeypatch.syspath_prepend(ROOT / "figures")
    file = ROOT / "_static" / "preview.png"
    both = Image.open(file), import_module("preview").draw()
    kept, drawn = (image.convert("L") for image in both)
    assert kept.size == drawn.size == (1200, 630)
    assert ImageStat.Stat(ImageChops.difference(kept, drawn)).mean[0] < 1  # of 255
    assert file.stat().st_size < 100_000
