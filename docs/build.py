"""Renders the notebooks to a static site: `python docs/build.py`, then open docs/_site/index.html.

nbdev prepares the notebooks (_proc/), `adapt` turns what it wrote for Quarto into what MyST-NB reads (docs/_src/), and
Sphinx builds the pages; any warning fails the build. No notebook is executed: the pages show the saved outputs.
"""
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from base64 import b64decode, b64encode
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from io import BytesIO
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

from PIL import Image, ImageChops, ImageStat

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SOURCE, SITE = DOCS / "_src", DOCS / "_site"
SPLIT_CODE = re.compile(r"(^ {0,3}(?P<f>```+|~~~+).*?^ {0,3}(?P=f)[`~]*\s*?$|(?P<t>`+)[^`].*?(?P=t)(?!`))", re.M | re.S)


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def text(value):
    return value if isinstance(value, str) else "".join(value)


def options(source):
    "The `#|` options on top of a cell, and its code without them."
    found, lines = {}, source.splitlines()
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        key, _, value = re.sub(r"^\s*#\s*\|", "", lines.pop(0)).strip().replace(":", " ", 1).partition(" ")
        if key:
            found[key] = value.strip().strip("\"'")
    return found, "\n".join(lines)


# --- preparation by nbdev

def show_imports(cell):
    "An exported cell that begins with imports stays, folded: without it no cell that is copied from the page would run."
    lines = getattr(cell, "directives_", {})
    if cell.cell_type != "code" or "export" not in lines or not isinstance((cell.parsed_() or [0])[0], ast.Import | ast.ImportFrom):
        return
    del lines["export"]
    cell.set_source("#| code-fold: true\n#| code-summary: What this page imports\n" + cell.source)


def prepare():
    "Run nbdev's processors over the notebooks; returns the folder with the results."
    import nbdev.serve
    from nbdev.processors import FilterDefaults

    # Left out: what executes cells, what writes Quarto's front matter, and links to pages named as Quarto names them.
    unwanted = {"FrontmatterProc", "insert_warning", "exec_show_docs", "add_links"}

    class Procs(FilterDefaults):
        def base_procs(self):
            return [show_imports, *(o for o in super().base_procs() if o.__name__ not in unwanted)]

    nbdev.serve.FilterDefaults = Procs
    shutil.rmtree(ROOT / "_proc", ignore_errors=True)
    return nbdev.serve.proc_nbs(n_workers=0, force=True)


# --- API entries

def modules():
    "Name of the module that each notebook exports to."
    cfg, res = settings(), {}
    for path in (ROOT / cfg["nbs_path"]).glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(text(o["source"]) for o in cells), re.MULTILINE)
        if found:
            res[path.name] = f"{cfg['lib_name']}.{found[1]}".removesuffix(".__init__")
    return res


class Api:
    "Turns `show_doc(name)` into autodoc directives, and remembers what has been documented where."

    def __init__(self):
        self.modules, self.shown = modules(), {}

    def find(self, dotted, notebook):
        "The object, the object that holds it, and its full name; the notebook's own module first."
        first = self.modules.get(notebook)
        for module in [first] * bool(first) + [o for o in self.modules.values() if o != first]:
            holder, obj = None, importlib.import_module(module)
            try:
                for part in dotted.split("."):
                    holder, obj = obj, getattr(obj, part)
            except AttributeError:
                continue
            home = getattr(obj, "__module__", None) if isinstance(holder, ModuleType) else holder.__module__
            return obj, holder, f"{home or module}.{dotted}"
        raise SystemExit(f"{notebook}: show_doc({dotted}) names nothing in the package")

    def directive(self, source, notebook):
        dotted = ast.unparse(ast.parse(source).body[0].value.args[0])
        obj, holder, name = self.find(dotted, notebook)
        if inspect.isclass(obj):
            kind = "autoexception" if issubclass(obj, BaseException) else "autoclass"
        elif inspect.ismodule(holder):
            kind = "autofunction" if callable(obj) else "autodata"
        elif isinstance(inspect.getattr_static(holder, dotted.split(".")[-1]), property):
            kind = "autoproperty"
        else:
            kind = "automethod" if callable(obj) else "autoattribute"
        lines = [f".. {kind}:: {name}"]
        if self.shown.get(name, "") == "shown":
            lines.append("   :no-index:")
        self.shown[name] = "shown"
        if kind == "autoclass":
            lines += ["   :members:", "   :member-order: bysource"]
            inside = [c for c in obj.__mro__ if c.__module__.startswith(f"{obj.__module__.split('.')[0]}.")]
            if any(c.__name__.startswith("_") for c in inside[1:]):     # a class in steps: the last shows all
                foreign = next(c for c in obj.__mro__ if c not in inside)
                lines.append(f"   :inherited-members: {foreign.__name__}")
        return "\n".join(["```{eval-rst}", *lines, "```"])

    def hide_members(self, markdown):
        "A method with an entry of its own is left out of its class's."
        def option(m):
            own = [o.removeprefix(m[1] + ".") for o in self.shown if o.startswith(m[1] + ".")]
            return m[0] + ("\n   :exclude-members: " + ", ".join(own) if own else "")
        return re.sub(r"^\.\. autoclass:: (\S+)$", option, markdown, flags=re.MULTILINE)

    def reference(self):
        "The page of all public names: signature, what it is, where it is shown. Every name needs an entry on a page."
        package = importlib.import_module(settings()["lib_name"])
        homes = {module: page.removesuffix(".ipynb") for page, module in self.modules.items()}
        lines, missing = ["# Reference", "", ":::{container} lead", f"The {len(package.__all__)} names of "
                          f"`import {package.__name__} as se`; each leads to its parameters, errors and source.", ":::"], []
        rooms = {}
        for module, names in package._modules.items():
            rooms.setdefault(module.partition(".")[0] if "." in module else "at the top", []).extend((module, n) for n in names.split())
        for room, listed in rooms.items():
            lines += ["", f"## {room}", "", "| name | what it is | page |", "|---|---|---|"]
            for module, name in listed:
                obj = getattr(package, name)
                full = f"{getattr(obj, '__module__', None) or f'{package.__name__}.{module}'}.{name}"
                full = full if full in self.shown else f"{package.__name__}.{module}.{name}"
                missing += [name] * (full not in self.shown)
                page = homes[f"{package.__name__}.{module}"]
                said = (inspect.getdoc(obj) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
                missing += [f"{name} (no docstring)"] * (not said)
                lines.append(f"| {{py:obj}}`{name} <{full}>` | {said} | [{page.partition('_')[2]}]({page}.ipynb) |")
        if missing:
            raise SystemExit(f"public names without an entry on a page: {', '.join(missing)}")
        return "\n".join(lines) + "\n"

    def symbols(self):
        "Full names by the short names that mean one thing only."
        res, twice = {}, set()
        for full in self.shown:
            for short in {full.split(".")[-1], ".".join(full.split(".")[-2:])}:
                (twice.add if res.setdefault(short, full) != full else str)(short)
        return {k: v for k, v in res.items() if k not in twice}


# --- notebooks for MyST-NB

def tag(cell, *tags):
    cell["metadata"].setdefault("tags", []).extend(tags)


CLOSE = .025*255 # what a palette may be off, of 255


def in_few_colors(exact):
    """A picture with a palette of 256 colours, and how far its worst channel is from the exact one, of 255.

    Where a palette by halving is too far off, as in textures, the colours are the k-means of every sixteenth pixel."""
    def off(few):
        return max(ImageStat.Stat(ImageChops.difference(few.convert("RGB"), exact)).rms)
    few = exact.quantize(256)
    if off(few) < CLOSE or min(exact.size) < 64:
        return few, off(few)
    some = exact.resize([side//4 for side in exact.size], Image.Resampling.NEAREST).quantize(256, kmeans=2)
    few = exact.quantize(palette=some, dither=Image.Dither.NONE)
    return few, off(few)


def smaller(png):
    "An opaque picture, in base64, with a palette where hardly anybody sees it: where its 256 colours are 2.5 percent off or less."
    image = Image.open(BytesIO(b64decode(png)))
    if image.mode not in ("RGB", "RGBA") or image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        return png
    exact, file = image.convert("RGB"), BytesIO()
    few, off = in_few_colors(exact)
    (few if off < CLOSE else exact).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def plain(markdown):
    "Markdown as a screen reader should say it."
    return " ".join(re.sub(r"[*`$|#>]", "", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)).split())


def said_of(cells, i):
    "What the pictures of a cell show, as text: the caption below it, or else the last sentence before it."
    after = text(cells[i + 1]["source"]) if i + 1 < len(cells) and cells[i + 1]["cell_type"] == "markdown" else ""
    if caption := re.match(r"\*(?!\*)(.+?)(?<!\*)\*(?!\*)\s*(?:\n\n|$)", after, re.S):
        return plain(caption[1])
    before = next((text(c["source"]) for c in reversed(cells[:i]) if c["cell_type"] == "markdown" and "{eval-rst}" not in text(c["source"])), "")
    said = plain(before.strip().rpartition("\n\n")[2] or before)
    return re.split(r"(?<=[.:?!]) (?=[^a-z])", said)[-1][:300]


def pictures_of(books):
    "The pictures of all notebooks, once each."
    found = (output.get("data", {}) for nb in books.values() for cell in nb["cells"] for output in cell.get("outputs", []))
    return list(dict.fromkeys(text(data["image/png"]) for data in found if "image/png" in data))


def adapt_code(cell, said, small):
    "Quarto's options become MyST-NB's tags and metadata; all other `#|` lines go."
    opts, source = options(text(cell["source"]))
    cell["source"], cell["metadata"] = source, {"tags": list(cell["metadata"].get("tags", []))}
    mystnb = {}
    for data in (output.get("data", {}) for output in cell["outputs"]):
        if "image/png" in data:
            data["image/png"] = small[text(data["image/png"])]
        if "text/html" in data:                                           # links to pages, as in a drawing
            data["text/html"] = re.sub(r'(href="\w+)\.ipynb(?=[#"])', r"\1.html", text(data["text/html"]))
    if opts.get("include") == "false":
        tag(cell, "remove-cell")
    if opts.get("echo") == "false":
        tag(cell, "remove-input")
    if opts.get("output") == "false":
        tag(cell, "remove-output")
    if opts.get("warning") == "false":
        tag(cell, "remove-stderr")
    if opts.get("code-fold") == "true":
        tag(cell, "hide-input")
        summary = opts.get("code-summary", "Code")
        mystnb |= {"code_prompt_show": summary, "code_prompt_hide": summary}
    if opts.get("fig-cap"):
        mystnb["figure"] = {"caption": opts["fig-cap"]}
    mystnb["image"] = {"alt": plain(opts.get("fig-alt") or opts.get("fig-cap") or said)}
    cell["metadata"]["mystnb"] = mystnb
    return cell


def adapt_title(source):
    "`# Title` with its `> summary`: the summary becomes a paragraph of its own class."
    lines, quoted = source.splitlines(), []
    while len(lines) > 1 and (not lines[1].strip() or lines[1].startswith(">")):
        quoted.append(lines.pop(1).removeprefix(">").strip())
    summary = " ".join(o for o in quoted if o)
    lead = ["", ":::{container} lead", summary, ":::", ""] if summary else [""]
    return "\n".join([lines[0], *lead, *lines[1:]])


def adapt_markdown(source, symbols, home):
    "Links out of the notebooks' folder go to the repository; names of documented objects become links."
    cfg = settings()

    def outward(m):
        path, mark, rest = m[2].partition("#")
        there = (home / path).resolve()
        if there.parent == DOCS and there.suffix == ".md":
            return f"{m[1]}{there.name}"
        if re.match(r"[a-z][a-z0-9+.-]*:|#", m[2], re.I) or there.is_relative_to(home) or not there.exists():
            return m[0]
        kind = "tree" if there.is_dir() else "blob"
        return f"{m[1]}{cfg['git_url']}/{kind}/{cfg['branch']}/{there.relative_to(ROOT).as_posix()}{mark}{rest}"

    def link(m):
        code, name = m[0], m[0].strip("`").removesuffix("()")
        line_start = source.rfind("\n", 0, m.start()) + 1
        before = source[line_start:m.start()]
        in_link = source[m.end():m.end() + 1] == "]" or before.rfind("[") > before.rfind("]")
        if m["f"] or name not in symbols or in_link or before.startswith("#"):
            return code
        return f"{{py:obj}}`{code.strip('`')} <{symbols[name]}>`"

    source = SPLIT_CODE.sub(link, source)
    return re.sub(r"(\]\(\s*<?)([^)\s>]+)", outward, source)


def parts_of(index):
    "The parts of the map in the index: title, how long it takes to read, pages."
    rows = "\n".join(text(c["source"]) for c in index["cells"])
    found, pages = re.split(r"^\| \*\*(.+)\*\* \| (.*) \|$", rows, flags=re.M)[1:], r"^\| \[\w+\]\((\w+)\.(?:ipynb|html)\)"
    for title, about, body in zip(found[::3], found[1::3], found[2::3]):
        yield title, about.strip("*").partition(":")[0], re.findall(pages, body, re.M)


def contents(parts):
    "The sidebar."
    for title, takes, names in parts:
        caption = f"{title} · {takes}" if takes else title
        yield "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```"])


def first_lines(cells):
    """Where each cell begins, were their texts one file.

    MyST-NB takes this for a cell's line; its own, 10,000 lines a cell, are as many blank lines to parse before an API entry."""
    return list(accumulate((text(cell["source"]).count("\n") + 1 for cell in cells[:-1]), initial=0))


def entries(books):
    "Turns the cells that show a name into entries; gives them all, and the names that can be linked to."
    api = Api()
    for name, nb in books.items():
        for cell in nb["cells"]:
            source = options(text(cell["source"]))[1]
            if cell["cell_type"] == "code" and re.match(r"show_doc\(", source):
                cell.update(cell_type="markdown", entry=True, source=api.directive(source, name))
    return api, api.symbols()


def adapt(books, small):
    "Write what Sphinx reads, of nbdev's notebooks and of their pictures made smaller; returns the names of the pages."
    home = ROOT / settings()["nbs_path"]
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir()
    api, symbols = entries(books)
    (SOURCE / "symbols.json").write_text(json.dumps(symbols), encoding="utf-8")

    pages, written = [o.removesuffix(".ipynb") for o in books if o != "index.ipynb"], [o.stem for o in sorted(DOCS.glob("*.md"))]
    for page in written:
        shutil.copy(DOCS / f"{page}.md", SOURCE)
    (SOURCE / "reference.md").write_text(api.reference(), encoding="utf-8")
    (SOURCE / "changelog.md").write_text(adapt_markdown((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), symbols, ROOT), encoding="utf-8")
    written = ["reference", *written, "changelog"]
    for name, nb in books.items():
        cells, titled = [], False
        for i, cell in enumerate(nb["cells"]):
            if cell.pop("entry", False):
                cell["source"] = api.hide_members(cell["source"])
            elif cell["cell_type"] == "markdown":
                cell["source"] = adapt_markdown(text(cell["source"]), symbols, home)
                if not titled and cell["source"].startswith("# "):
                    cell["source"], titled = adapt_title(cell["source"]), True
            elif cell["cell_type"] == "code":
                cell = adapt_code(cell, said_of(nb["cells"], i), small)
                if not cell["source"].strip() and not cell["outputs"]:
                    continue
            else:
                continue
            if cell["cell_type"] == "markdown":
                cell = {k: cell[k] for k in ("cell_type", "id", "source")} | {"metadata": {}}
            cells.append({k: v for k, v in cell.items() if k != "has_sd"})
        if name == "index.ipynb":
            parts = [*parts_of(nb), ("To look up", "", written)]
            (SOURCE / "parts.json").write_text(json.dumps({page: title for title, _, listed in parts for page in listed}), encoding="utf-8")
            cells.append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": "\n\n".join(contents(parts))})
        nb["cells"] = cells
        nb["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
                          "language_info": {"name": "python", "pygments_lexer": "ipython3"},
                          "source_map": first_lines(cells)}
        (SOURCE / name).write_text(json.dumps(nb, ensure_ascii=False), encoding="utf-8")
    if (home / "images").is_dir():
        shutil.copytree(home / "images", SOURCE / "images")
    return ["index", *pages, *written]


def prune():
    """MathJax ships every variant of itself; the pages load one, its fonts, and TeX extensions on demand.

    Formulas are read out from the MathML in the page; MathJax's own speech would need 4 MB of tables."""
    home = SITE / "_static/mathjax"
    keep = [home / o for o in ("tex-chtml.js", "input/tex", "output/chtml/fonts/woff-v2")]
    for path in [o for o in home.rglob("*") if o.is_file()]:
        if path.name == "all-packages.js" or not any(path.is_relative_to(o) for o in keep):
            path.unlink()
    for path in (SITE / "_static").rglob("*.map"):
        path.unlink()
    for path in SITE.rglob("*.html"):                                     # lines of templates and lists begin with what nobody sees
        pieces = re.split(r"(<pre.*?</pre>)", path.read_text(encoding="utf-8"), flags=re.S)
        pieces[::2] = (re.sub(r"\n\s+", "\n", piece) for piece in pieces[::2])
        path.write_text("".join(pieces), encoding="utf-8")
    shutil.rmtree(SITE / "_sources", ignore_errors=True)
    sources = SITE / "_modules/index.html"
    if sources.exists():  # viewcode lists modules that have no source, too
        there = lambda m: m[0] if (sources.parent / m[1]).exists() else ""
        listed = re.sub(r'<li><a href="([^"]+)">[^<]*</a></li>\n', there, sources.read_text(encoding="utf-8"))
        sources.write_text(listed, encoding="utf-8")


def read(folder):
    "{name: notebook} of a folder."
    return {o.name: json.loads(o.read_text(encoding="utf-8")) for o in sorted(folder.glob("*.ipynb"))}


def main():
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    pictures = pictures_of(read(ROOT / settings()["nbs_path"]))
    with ProcessPoolExecutor(2, get_context("spawn")) as others:           # while this process imports what the entries are of
        proc, small = others.submit(prepare), others.map(smaller, pictures, chunksize=8)
        for module in modules().values():
            importlib.import_module(module)
        books, small = read(proc.result()), dict(zip(pictures, small))
    pages = adapt(books, small)
    if not (SOURCE / "index.ipynb").exists():
        raise SystemExit("there is no index.ipynb to land on")

    from sphinx.cmd.build import build_main
    sys.modules.setdefault("rfc3987_syntax", None)                        # a check of addresses in JSON that makes 38 parsers when it is imported
    shutil.rmtree(SITE, ignore_errors=True)
    failed = build_main(["-W", "--keep-going", "-q", "-j", "2", "-b", "html", "-c", str(DOCS), "-d", str(SOURCE / ".doctrees"),
                         str(SOURCE), str(SITE)])
    prune()
    raw = [page.name for page in SITE.glob("*.html") if "<p>| " in page.read_text(encoding="utf-8")]
    if raw:
        print(f"a table is shown as text: {', '.join(raw)}", file=sys.stderr)
        return 1
    if not failed:
        size = sum(o.stat().st_size for o in SITE.rglob("*") if o.is_file()) / 2**20
        print(f"{len(pages)} pages, {size:.1f} MB: {(SITE / 'index.html').relative_to(ROOT)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
