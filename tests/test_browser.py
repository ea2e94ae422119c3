"""Every page of the built book in a real browser: dark and light, narrow and wide, no network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Page, Request, TimeoutError
from test_book import HTML, PAGES

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")

OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
THEME = "document.documentElement.dataset.theme"
NARROW, WIDE = 390, 1400  # pixels, of a phone and of a window
# Processor time until the mathematics stands, in times of LOOP on the same machine a moment
# before: 10 are 1.8 s where LOOP takes 0.18 s, which leaves a core that has other work within 3 s.
# A page of 6,000 words takes 3 to 7, a chapter on one page 10 to 14.
MOST_TURNS = 10

TYPESET = "async () => { if (window.MathJax) await MathJax.startup.promise }"
# Work of the kind that typesetting is, as a measure of the machine: elements, style and layout.
LOOP = """() => {
  const box = document.body.appendChild(document.createElement("div"));
  for (let turn = 0; turn < 40; turn++) {
    box.replaceChildren();
    for (let i = 0; i < 500; i++) {
      const span = box.appendChild(document.createElement("span"));
      span.textContent = "x" + i;
      span.style.fontSize = 10 + i % 7 + "px";
    }
    box.offsetHeight;
  }
  box.remove();
}"""
# What sticks out of the page, is cut off, or moves where only a formula, a table or code may.
OVERFLOW = """() => {
  const root = document.scrollingElement, found = [];
  const name = e => e.tagName.toLowerCase() + "." + e.className + " " + e.textContent.slice(0, 40);
  if (root.scrollWidth > innerWidth)
    found.push(`page is ${root.scrollWidth} px wide on a screen of ${innerWidth}`);
  for (const e of document.querySelectorAll("main, main :not(mjx-container *)")) {
    if (e.scrollWidth <= e.clientWidth + 1 || e.clientWidth <= 1) continue;
    const overflow = getComputedStyle(e).overflowX;
    if (overflow === "hidden" || overflow === "clip") {
      if (e.closest("article")) found.push("cut off: " + name(e));
    } else if (overflow !== "visible"
        && !e.matches(
          "pre, figure, .pst-scrollable-table-container, .output, mjx-container, span.math"))
      found.push("scrolls sideways: " + name(e));
  }
  return found;
}"""
BROKEN = """() => [...document.querySelectorAll("mjx-merror, .math:not(:has(mjx-container))")]
  .map(e => "formula not typeset: " + e.textContent.slice(0, 60))"""
# axe needs minutes for the tens of thousands of elements of formulas and code. A formula keeps its
# size and one token of each kind its colour; the rest of them becomes plain.
THIN = """() => {
  const seen = new Set();
  for (const e of document.querySelectorAll("mjx-math")) {
    const width = e.getBoundingClientRect().width;
    e.replaceChildren();
    e.style.cssText += `; display: inline-block; width: ${width}px`;
  }
  for (const e of document.querySelectorAll("mjx-assistive-mml")) e.replaceChildren();
  for (const e of document.querySelectorAll(".highlight pre span")) {
    if (seen.has(e.className)) e.replaceWith(e.textContent);
    seen.add(e.className);
  }
}"""
AXE = """async () => (await axe.run({resultTypes: ["violations"], preload: false})).violations
  .filter(v => v.impact === "serious" || v.impact === "critical")
  .flatMap(v => v.nodes.map(n => [v.id, n.target.join(" ")]))"""


class Handler(SimpleHTTPRequestHandler):
    """A folder's files, and at /blank an empty page."""

    def do_GET(self) -> None:
        if self.path != "/blank":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>blank</title><link rel=icon href='data:,'><body>")

    def log_message(self, *args: object) -> None:
        pass


class Desk:
    """A reader's browser at a served folder, and what is to be complained of in a page there."""

    def __init__(self, browser: Browser, base: str):
        self.base = base
        self.context = browser.new_context(color_scheme="dark")
        self.heard: list[str] = []
        self.context.on("request", self.note)
        self.loop = min(self.measured() for _ in range(3))

    def note(self, request: Request) -> None:
        if not request.url.startswith((self.base, "data:", "blob:")):
            self.heard.append(f"request leaves: {request.url}")

    def open(self, path: str, script: str) -> tuple[Page, float]:
        """A new tab after the script, and its main thread's seconds of processor until then."""
        page = self.context.new_page()
        page.on("console", lambda m: m.type == "error" and self.heard.append(m.text))
        page.on("pageerror", lambda e: self.heard.append(f"uncaught: {e}"))
        page.set_viewport_size({"width": NARROW, "height": 900})
        cdp = self.context.new_cdp_session(page)
        cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(f"{self.base}/{path}")
        page.evaluate(script)
        metrics = cdp.send("Performance.getMetrics")["metrics"]
        return page, next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    def measured(self) -> float:
        """The seconds of LOOP."""
        blank, seconds = self.open("blank", LOOP)
        blank.close()
        return seconds

    def turns(self, path: str) -> float:
        """The page's time until the mathematics stands: so many times that of LOOP."""
        loop = self.measured()
        page, typesetting = self.open(path, TYPESET)
        page.close()
        return typesetting / loop

    def complaints(self, path: str) -> list[str]:
        """A page that opens on a phone at night, is turned, and stays open into the day."""
        self.heard.clear()
        page, typesetting = self.open(path, TYPESET)
        found = page.evaluate(BROKEN)
        for width in (NARROW, WIDE, NARROW):
            page.set_viewport_size({"width": width, "height": 900})
            found += page.evaluate(OVERFLOW)
        page.evaluate(AXE_SCRIPT)
        for scheme, width in (("dark", NARROW), ("light", WIDE)):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            try:  # the page hears of a change when it has time
                page.wait_for_function(f"{THEME} === '{scheme}'", timeout=3000)
            except TimeoutError:
                found.append(f"theme is {page.evaluate(THEME)} where the reader's is {scheme}")
            page.wait_for_timeout(400)  # the theme looks for boxes that scroll 0.3 s later
            page.evaluate(THIN)
            found += [f"axe, {scheme}: {rule}: {target}" for rule, target in page.evaluate(AXE)]
        page.close()
        turns = typesetting / self.loop
        for _ in range(2):  # a measurement can be disturbed; a long page stays long
            if turns > MOST_TURNS:
                turns = min(turns, self.turns(path))
        if turns > MOST_TURNS:
            found.append(f"mathematics takes {turns:.1f} turns, more than {MOST_TURNS}")
        return found + self.heard


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def desk(browser: Browser) -> Iterator[Desk]:
    with served(HTML) as base:
        yield Desk(browser, base)


@pytest.mark.parametrize("page", PAGES)
def test_page_is_sound_on_any_screen(desk, page):
    assert desk.complaints(f"{page}.html") == []


DEFECTS = {
    "none": ("", None),
    "wide": ("<div style='width: 500px'>wide</div>", "page is"),
    "wide box": ("<div style='overflow: auto' tabindex=0><p style='width: 1500px'>-</p></div>",
                 "scrolls sideways"),
    "cut off": ("<p style='overflow: hidden; width: 3em; white-space: nowrap'>a line of text</p>",
                "cut off"),
    "console": ("<script>console.error('broken')</script>", "broken"),
    "exception": ("<script>throw Error('broken')</script>", "uncaught: broken"),
    "missing": ("<img src='missing.png' alt='not there'>", "404"),
    "remote": ("<img src='https://example.org/image.png' alt='remote'>", "request leaves"),
    "contrast by night": ("<p style='color: #222'>faint on black</p>", "axe, dark: color-contrast"),
    "contrast by day": ("<p style='color: #ddd'>faint on white</p>", "axe, light: color-contrast"),
    "alternative": ("<img src='_static/file.png'>", "axe, light: image-alt"),
    "theme": ("<script>onload = () => document.documentElement.dataset.theme = 'blue'</script>",
              "theme is blue"),
    "theme that stays": ("<script>document.documentElement.dataset.mode = 'dark'</script>",
                         "theme is dark where"),
    "raw": ("<p class='math tex2jax_ignore'>\\(x\\)</p>", "formula not typeset"),
}  # fmt: skip


@pytest.fixture(scope="module")
def copies(browser, tmp_path_factory) -> Iterator[tuple[Path, Desk]]:
    """The book with room for damaged copies of its pages, and the desk that looks at it."""
    folder = tmp_path_factory.mktemp("book")
    for part in HTML.iterdir():
        (folder / part.name).symlink_to(part)
    with served(folder) as base:
        yield folder, Desk(browser, base)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(copies, defect):
    folder, desk = copies
    markup, complaint = DEFECTS[defect]
    page = (HTML / "references.html").read_text()
    (folder / "page.html").write_text(page.replace("</article>", f"{markup}</article>"))
    found = desk.complaints("page.html")
    assert found == [] if complaint is None else any(complaint in f for f in found), found


def test_a_page_three_times_as_long_is_seen(copies):
    """Nearly as many formulas as three of the densest theory pages have."""
    folder, desk = copies
    name = next(p for p in PAGES if p.startswith("chapters/"))
    page = (HTML / f"{name}.html").read_text().replace("../../_static", "_static")
    formula = (
        r"<p><span class='math'>\(\delta_l = \varphi_l' \odot (\delta_{l+1} W_{l+1})\)</span></p>"
    )
    (folder / "long.html").write_text(page.replace("</article>", f"{formula * 1000}</article>"))
    assert desk.turns("long.html") > MOST_TURNS
