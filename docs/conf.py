"""Sphinx settings; docs/build.py runs Sphinx with them."""
import inspect
import json
import re
import sys
from configparser import ConfigParser
from functools import cache
from html import escape
from importlib import import_module
from pathlib import Path

from pygments.formatters import HtmlFormatter
from pygments.lexers import find_lexer_class_by_name
from pygments.token import Name, Punctuation, Text, Whitespace
from sphinx.environment.adapters.toctree import global_toctree_for_doc
from sphinx.highlighting import PygmentsBridge, lexer_classes
from sphinx.search.en import SearchEnglish

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
_ini = ConfigParser(delimiters=["="])
_ini.read(ROOT / "settings.ini", encoding="utf-8")
_cfg = _ini["DEFAULT"]
_symbols, _parts = (json.loads((ROOT / f"docs/_src/{name}.json").read_text(encoding="utf-8")) for name in ("symbols", "parts"))

project = _cfg["title"]
author = _cfg["author"]
copyright = _cfg["copyright"]
version = release = _cfg["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = [".doctrees"]
nitpicky = False
suppress_warnings = ["myst.header"]  # a notebook may step from # to ###

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # plain CommonMark has no tables
myst_enable_extensions = ["alert", "amsmath", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_dmath_double_inline = True
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {version}"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], [("site.js", {"defer": "defer"})]
html_copy_source = False
html_theme_options = {
    "source_repository": _cfg["git_url"],
    "source_branch": _cfg["branch"],
    "source_directory": f"{_cfg['nbs_path']}/",
}


class Sparing(HtmlFormatter):
    "Leaves code unmarked that has the colour of plain text in both styles: half of a page would be marks."

    def format_unencoded(self, tokensource, outfile):
        plain = {Name, Punctuation, Whitespace}
        return super().format_unencoded(((Text if kind in plain else kind, said) for kind, said in tokensource), outfile)


make_formatter, formatters = PygmentsBridge.get_formatter, {}


def formatter_of(bridge, **options):
    "One formatter for all blocks that are set alike: making it, with its style sheet, takes longer than a short block."
    key = bridge, str(sorted(options.items()))
    if key not in formatters:
        formatters[key] = make_formatter(bridge, **options)
    return formatters[key]


PygmentsBridge.html_formatter, PygmentsBridge.get_formatter = Sparing, formatter_of
lexer_classes["ipython3"] = find_lexer_class_by_name("ipython3")  # found once, not among all lexers there are for each block
SearchEnglish.stem = cache(SearchEnglish.stem)  # kept from page to page

# What a piece of a docstring is. First what stays as it is: reST literals, roles and links, bold, emphasis.
_PIECES = re.compile(
    r"(?P<keep>``[^`]+``|:[\w:]+:`[^`]+`|`[^`]+`__?|\*\*[^*\s][^*]*\*\*(?!\w)|(?<![\w*])\*[^*\s][^*]*\*(?![\w*]))"
    r"|`(?P<code>[^`]+)`|\$(?P<math>[^$\n]+)\$|\[(?P<label>[^\]]+)\]\((?P<url>https?://[^)\s]+)\)|(?P<special>[*|_\\])")


def _piece(m):
    if m["code"]:
        name = m["code"].removesuffix("()")
        return f":py:obj:`{m['code']} <{_symbols[name]}>`" if name in _symbols else f"``{m['code']}``"
    if m["math"]:
        return f":math:`{m['math']}`"
    if m["label"]:
        return f"`{m['label']} <{m['url']}>`__"
    return "\\" + m["special"] if m["special"] else m[0]


def rst(markdown):
    "A line of Markdown as reST."
    return _PIECES.sub(_piece, markdown)


def docstring(lines):
    "A docstring in Markdown as reST: inline marks, lists, fences; indented lines and doctests stay as they are."
    res, fenced = [], False
    for line in lines:
        item = re.match(r"\s*([-*]|\d+\.) ", line)
        if line.lstrip().startswith("```"):
            fenced = not fenced
            res += ["", f".. code-block:: {line.strip().strip('`') or 'python'}", ""] if fenced else [""]
        elif fenced:
            res.append("   " + line)
        elif line.startswith(("    ", ">>> ", "... ")):
            res.append(line)
        else:
            if item and res and res[-1].strip() and not re.match(r"\s*([-*]|\d+\.) |  ", res[-1]):
                res.append("")
            res.append(line[:item.end()] + rst(line[item.end():]) if item else rst(line))
    return res


def comments(obj):
    "What nbdev's comments say about each parameter, and about what comes back."
    from fastcore.docments import docments

    try:
        found = docments(obj, full=True)
    except Exception:  # no source, or no signature
        return {}
    return {k: " ".join(v.docment.split()) for k, v in found.items() if getattr(v, "docment", None)}


def on_docstring(app, what, name, obj, opts, lines):
    "Turn docstrings from Markdown to reST, and add the parameters' comments to them."
    lines[:] = docstring(lines)
    if what not in ("function", "method", "class", "exception") or any(o.startswith(":param") for o in lines):
        return
    found = comments(obj)
    fields = [f":param {k}: {rst(v)}" for k, v in found.items() if k not in ("return", "self", "cls")]
    if "return" in found and not inspect.isclass(obj):
        fields.append(f":returns: {rst(found['return'])}")
    if fields:
        lines += ["", *fields, ""]


def on_member(app, what, name, obj, skip, opts):
    "The fields of named tuples carry a docstring that says nothing."
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


LINES = re.compile(r"<dl>\s*((?:<dd>.*?</dd>\s*)+)</dl>", re.S)  # a parameter a line, which Sphinx writes as a list without terms


def places(page):
    "Where a page's notebook can be opened: (name, address)."
    there = f"{_cfg['user']}/{_cfg['repo']}"
    path = f"{_cfg['nbs_path']}/{page}.ipynb"
    return [("GitHub", f"{_cfg['git_url']}/blob/{_cfg['branch']}/{path}"),
            ("Colab", f"https://colab.research.google.com/github/{there}/blob/{_cfg['branch']}/{path}"),
            ("Binder", f"https://mybinder.org/v2/gh/{there}/{_cfg['branch']}?labpath={path}")]


@cache
def sidebar(builder, folders, **options):
    "The sidebar as HTML, with no entry marked, for pages that are so many folders down."
    tree = global_toctree_for_doc(builder.env, "_/"*folders + "_", builder, tags=builder.tags, **options)
    return builder.render_partial(tree)["fragment"]


def on_sidebar(app, pagename, templatename, context, doctree):
    "The sidebar is resolved once, not once a page; only the entry of the page itself differs."
    def toctree(**options):
        html = sidebar(app.builder, pagename.count("/"), **options)
        own, marked = (f'<li class="toctree-l1{a}"><a class="{b}reference internal" href="{c}">'
                       for a, b, c in (("", "", f"{pagename}.html"), (" current", "current ", "#")))
        before, found, after = html.partition(own)
        if not found:
            return html
        above, _, beside = before.rpartition("<ul>")
        return f'{above}<ul class="current">{beside}{marked}{after}'
    if "toctree" in context:
        context["toctree"] = toctree


def on_page(app, pagename, templatename, context, doctree):
    "On top of a page: in which part it stands, and where its notebook can be opened. Text only: reading a page asks no other host."
    above = ""
    if part := _parts.get(pagename):
        above = (f'<nav class="crumbs" aria-label="Breadcrumbs"><ol><li><a href="index.html">{escape(project)}</a></li>'
                 f'<li><a href="index.html#map-of-the-notebooks">{escape(part)}</a></li><li aria-current="page">{context["title"]}</li></ol></nav>')
    if (ROOT / _cfg["nbs_path"] / f"{pagename}.ipynb").exists():
        links = " ".join(f'<a href="{escape(url)}">{name}</a>' for name, url in places(pagename))
        above += f'<p class="open">Open this notebook: {links} <span>(Colab and Binder were not tried)</span></p>'
    context["body"] = above + LINES.sub(lambda m: f'<span class="lines">{m[1].replace("dd>", "span>")}</span>', context.get("body", ""))
    if "furo_navigation_tree" in context:
        context["furo_navigation_tree"] = context["furo_navigation_tree"].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    import_module("sphinx-mathjax-offline").setup(app)      # named in `extensions` it would have all pages read by one process
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-skip-member", on_member)
    app.connect("html-page-context", on_sidebar, priority=100)  # before the theme's own
    app.connect("html-page-context", on_page, priority=900)  # after it
