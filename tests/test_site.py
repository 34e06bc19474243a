"""The rendered site in a browser: errors, requests, links, search, mathematics, pictures, widths."""
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from html import unescape
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from browser import Leaving, axe, browser, why_not
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs/_site"
pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def is_old():
    "Whether the site is not there, or something that it is made of has changed since."
    made = SITE / "index.html"
    return not made.exists() or any(o.stat().st_mtime > made.stat().st_mtime
                                    for o in (*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("docs/*.*"), *ROOT.glob("docs/_static/*")))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def site():
    "The address of the site, served here."
    if is_old():
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        made = subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=550)
        if made.returncode:
            pytest.fail(f"docs/build.py: {made.stderr[-1500:]}", pytrace=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def page(site):
    with browser() as tab:
        yield tab()


def names():
    return sorted(o.stem for o in ROOT.glob("nbs/*.ipynb")) + ["reference", "models", "changelog"]


class Anchors(HTMLParser):
    "The names in a page that can be linked to, and what it links to."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.ids |= {about[k] for k in ("id", "name") if about.get(k)}
        self.links += [about[k] for k in ("href", "src") if about.get(k)]


def test_every_link_and_anchor_leads_somewhere(site):
    read = functools.cache(Anchors)
    broken = []
    for path in sorted(SITE.glob("*.html")):
        for link in read(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            anchor = unquote(parts.fragment)
            if not there.exists() or (anchor and there.suffix == ".html" and anchor not in read(there).ids):
                broken.append(f"{path.name}: {link}")
    assert not broken, broken[:20]


def test_the_site_is_no_larger_than_twenty_megabytes(site):
    size = {o: o.stat().st_size for o in SITE.rglob("*") if o.is_file()}
    largest = sorted(size, key=size.get)[-5:]
    assert sum(size.values()) < 20 * 2**20, [f"{o.relative_to(SITE)}: {size[o] / 2**20:.2f} MB" for o in largest]


def test_no_picture_is_far_from_what_its_page_kept():
    "Palettes save most of the pictures' bytes: of textures, of photographs, of lines; what few colours would spoil stays as it is."
    build = spec_from_file_location("build", ROOT / "docs/build.py")
    build.loader.exec_module(made := module_from_spec(build))
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 220, (4, 4, 3), np.uint8).repeat(48, 0).repeat(48, 1) + rng.integers(0, 36, (192, 192, 3), np.uint8)
    thin = np.full((192, 192, 3), 255, np.uint8)
    thin[100] = 230, 10, 40
    for name, pixels, mode in (("texture", texture, "P"), ("lines", thin, "P"), ("noise", rng.integers(0, 256, (192, 192, 3), np.uint8), "RGB")):
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        after = Image.open(BytesIO(b64decode(made.smaller(b64encode(file.getvalue()).decode()))))
        assert after.mode == mode, name
        assert np.sqrt(((np.asarray(after.convert("RGB"), float) - pixels)**2).mean((0, 1))).max() < (made.CLOSE if mode == "P" else 1e-9), name


@pytest.mark.parametrize("name", names())
def test_a_page_has_no_error_asks_nobody_else_and_does_not_scroll_sideways(site, page, name):
    page.errors.clear(), page.requests.clear()
    page.size(1280, 900)
    page.open(f"{site}/{name}.html", "!window.MathJax || !MathJax.startup || !MathJax.startup.promise || MathJax.startup.promise.then(() => true)")
    for width, dark in ((1280, False), (1280, True), (390, True), (390, False)):
        page.size(width, 900, dark)
        wide = page.js("new Promise(done => requestAnimationFrame(() => done(document.documentElement.scrollWidth - window.innerWidth)))")
        assert wide <= 0, f"{width} px: {wide} px too wide"
        if width == 1280:                            # a laptop's: the 100 columns of a cell are all in sight
            cut = page.js("[...document.querySelectorAll('.cell_input pre')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent.slice(0, 60))")
            assert cut == []
    page.wait("[...document.images].every(i => i.complete || i.loading === 'lazy')")
    assert page.js("[...document.images].filter(i => i.complete && !i.naturalWidth && i.src).map(i => i.src)") == []
    assert page.js("[...document.images].filter(i => !i.closest('.sidebar-drawer') && !i.hasAttribute('alt')).length") == 0
    elsewhere = [r for r in page.requests if not r.startswith((site, "data:", "blob:"))]
    assert page.errors == [] and elsewhere == []


def test_a_page_shows_all_that_it_imports(site):
    "Without them, no cell that is copied from the page would run; those of cells that nobody sees, for Colab and for nbdev, may be missing."
    for path in ROOT.glob("nbs/*.ipynb"):
        cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        cells = [c for c in cells if not re.search(r"^#\| *(hide|include: *false|echo: *false)", c, re.M)]
        wanted = [line for c in cells for line in re.findall(r"^(?:import|from) .*", c, re.M)]
        shown = unescape(re.sub(r"<[^>]+>", "", (SITE / f"{path.stem}.html").read_text(encoding="utf-8")))
        assert [line for line in wanted if line not in shown] == [], path.stem


def test_mathematics_is_typeset(site, page):
    page.size(1280, 900)
    page.open(f"{site}/02_entropy.html")
    assert page.wait("document.querySelectorAll('mjx-container').length") > 10
    assert page.js("document.querySelectorAll('mjx-merror').length") == 0


def test_search_finds_the_entropy(site, page):
    page.open(f"{site}/search.html?q=spatial_entropy")
    found = page.wait("document.querySelectorAll('#search-results li a').length && "
                      "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))", 60)
    assert any("24_operators" in link for link in found), found[:10]


def test_every_page_stands_in_the_sidebar(site, page):
    page.open(f"{site}/index.html")
    listed = page.js("[...document.querySelectorAll('.sidebar-tree a.reference')].map(a => a.getAttribute('href'))")
    assert {re.sub(r"\.html.*", "", link) for link in listed} >= {n for n in names() if n != "index"}


def map_of_pages():
    "The pages in the order of the map, each with its part; then those to look up."
    index = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"])
    part = ""
    for line in index.splitlines():
        if found := re.match(r"\| \*\*(.+)\*\* \| \*(.+?):", line):
            part = found[1]
        elif found := re.match(r"\| \[\w+\]\((\w+)\.ipynb\) \|", line):
            yield found[1], part
    yield from ((name, "To look up") for name in ("reference", "models", "changelog"))


def test_previous_next_and_the_place_of_a_page_follow_the_map(site):
    listed = list(map_of_pages())
    order = ["index", *(page for page, _ in listed)]
    assert sorted(order) == sorted(names())
    for (page, part), before, after in zip(listed, order, [*order[2:], None]):
        html = (SITE / f"{page}.html").read_text(encoding="utf-8")
        linked = {k: re.search(rf'<a class="{k}-page" href="([^"]+)"', html) for k in ("prev", "next")}
        assert [m and m[1] for m in linked.values()] == [f"{before}.html", after and f"{after}.html"], page
        crumbs = re.search(r'<nav class="crumbs".*?</nav>', html, re.S)[0]
        assert [re.sub("<[^>]+>", "", li) for li in re.findall("<li.*?</li>", crumbs)][1] == part, page
        opened = re.findall(r'<a href="([^"]+)">(?:GitHub|Colab|Binder)</a>', html)
        assert len(opened) == (3 if (ROOT / f"nbs/{page}.ipynb").exists() else 0) and all(f"{page}.ipynb" in link for link in opened)


def test_the_way_of_the_data_can_be_read_and_clicked(site, page):
    for width in (390, 700):
        page.size(width, 900)
        page.open(f"{site}/index.html")
        boxes = page.js("[...document.querySelectorAll('.way a')].map(a => [a.getAttribute('href'), a.getBoundingClientRect().width, "
                        "...[...a.querySelectorAll('text')].flatMap(t => [t.getBoundingClientRect().width, t.getBoundingClientRect().height])])")
        assert len(boxes) == 7
        for link, wide, name, high, said, low in boxes:
            assert max(name, said) < wide and min(high, low) > 9, (width, link)     # inside of its box, and not tiny
    page.click(".way a:nth-of-type(6) text")
    page.wait("location.pathname.endsWith('/02_entropy.html') && document.readyState === 'complete'")


def test_waiting_outlives_the_page_that_was_asked(site, page):
    page.open(f"{site}/index.html")
    leave = "(setTimeout(() => { location.href = '02_entropy.html' }), new Promise(() => null))"    # never answered
    page.wait(f"location.pathname.endsWith('/02_entropy.html') || {leave}")
    page.open(f"{site}/index.html")
    with pytest.raises(Leaving):
        page.js(leave)


def test_the_film_plays_and_stands_still(site, page):
    page.size(700, 900)
    page.open(f"{site}/08_gallery.html")
    shown = "document.querySelector('.film img').currentSrc.slice(0, 14)"
    page.place(".film img")
    assert page.wait(f"document.querySelector('.film img').complete && {shown}") == "data:image/gif"
    page.click(".film button")
    page.wait(f"{shown} === 'data:image/png'")
    page.click(".film button")
    page.wait(f"{shown} === 'data:image/gif'")
    page.send("Emulation.setEmulatedMedia", features=[dict(name="prefers-reduced-motion", value="reduce")])
    page.open(f"{site}/08_gallery.html")
    assert page.wait(shown) == "data:image/png"
    page.send("Emulation.setEmulatedMedia", features=[])


def test_the_slider_shows_another_threshold(site, page):
    page.open(f"{site}/07_try.html")
    shown = "[...document.querySelectorAll('.slider img')].filter(i => !i.hidden).map(i => i.alt)"
    before = page.js(shown)
    page.choose(".slider input", 9)
    after = page.js(shown)
    assert len(before) == len(after) == 1 and before[0].startswith("k = 1.0") and after[0].startswith("k = 1.625")


@pytest.mark.skipif(axe() is None, reason="no axe-core here: pip install axe-playwright-python")
@pytest.mark.parametrize("name", "index 01_regions 02_entropy 06_glossary 07_try 31_regularizer 42_chance 63_widgets reference search".split())
def test_nothing_serious_stands_in_a_readers_way(site, page, name):
    "Accessibility, by axe-core: all of its rules in the light, the contrasts in the dark too."
    page.size(1280, 900)
    page.open(f"{site}/{name}.html", "!window.MathJax || !MathJax.startup || !MathJax.startup.promise || MathJax.startup.promise.then(() => true)")
    assert page.violations() == []
    page.size(1280, 900, dark=True)
    assert page.violations("color-contrast") == []
