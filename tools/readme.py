"""Makes README.md out of nbs/index.ipynb; `--check` writes nothing and exits 1 if anything would change.

Markdown stays as it is, but for relative links, which start at the repository's root here. Code becomes fences unless
`echo: false`; `#|` lines go; outputs follow. Cells with `hide`, `include: false` or `default_exp` are left out. The
figures of a cell that has no markdown output are saved as nbs/images/index-1.png, -2.png, … What comes after the comment
"The README ends here." is on the site only.
"""
import argparse
import base64
import json
import posixpath
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRONT = "<!-- Made from {} by tools/readme.py: edit the notebook. -->"
LINK = re.compile(r'(\]\(\s*<?|^\[[^\]]+\]:\s+|\b(?:src|href)=")([^)\s">]+)', re.MULTILINE)
END = "<!-- The README ends here. -->"
CODE = re.compile(r"(^ {0,3}(?P<f>```+|~~~+).*?^ {0,3}(?P=f)[`~]*\s*?$|(?P<t>`+)[^`].*?(?P=t)(?!`))", re.M | re.S)


def text(value):
    return value if isinstance(value, str) else "".join(value)


def relink(markdown, home):
    "The markdown with its relative links rewritten from the notebook's folder to the root."
    def link(m):
        target = m[2]
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", target, re.I):
            return m[0]
        path, mark, rest = target.partition("#")
        return m[1] + posixpath.normpath(posixpath.join(home, path)) + mark + rest

    pieces, at = [], 0  # code is left alone
    for m in CODE.finditer(markdown):
        pieces += [LINK.sub(link, markdown[at:m.start()]), m[0]]
        at = m.end()
    # a link whose text is code, as in [`x`](y), is cut at the code: its target starts the next piece
    return "".join(pieces) + LINK.sub(link, markdown[at:])


def fence(body, language):
    ticks = "`" * max([3, *(len(o) + 1 for o in re.findall(r"`{3,}", body))])
    return f"{ticks}{language}\n{body.strip(chr(10))}\n{ticks}"


def split(source):
    "The `#|` options of a cell, and its code without them."
    options, lines = {}, source.splitlines()
    while lines and (not lines[0].strip() or re.match(r"\s*#\s*\|", lines[0])):
        key, _, value = re.sub(r"^\s*#\s*\|", "", lines.pop(0)).strip().replace(":", " ", 1).partition(" ")
        if key:
            options[key] = value.strip().strip("\"'")
    return options, "\n".join(o for o in lines if not re.search(r"#\|\s*hide_line\s*$", o)).strip("\n")


def code(source):
    "A fence for the code, as shell where it is shell."
    if m := re.match(r"%%(bash|sh)\b.*\n", source):
        return fence(source[m.end():], "sh")
    lines = source.splitlines()
    if all(o.startswith("!") for o in lines):
        return fence("\n".join(o[1:].strip() for o in lines), "sh")
    return fence(source, "python")


def outputs(cell, options, home, images):
    "The outputs of a cell as markdown; its figures go to `images`."
    found = [o.get("data", {}) for o in cell["outputs"]]
    has_markdown = any("text/markdown" in o for o in found)
    for out in cell["outputs"]:
        data = out.get("data", {})
        if out["output_type"] == "stream":
            if out["name"] == "stdout" and text(out["text"]).strip():
                yield fence(text(out["text"]), "text")
        elif "text/markdown" in data:
            yield relink(text(data["text/markdown"]).strip(), home)
        elif "image/png" in data:
            if not has_markdown:
                name = f"{home}/images/index-{len(images) + 1}.png"
                images[name] = base64.b64decode(text(data["image/png"]))
                caption = options.get("fig-cap", "")
                yield f"![{options.get('fig-alt') or caption or 'figure'}]({name})"
                if caption:
                    yield f"*{caption}*"
        elif "text/plain" in data:
            yield fence(text(data["text/plain"]), "text")


def build(notebook, home):
    "The text of the README, and its images by path."
    blocks, images = [FRONT.format(notebook.relative_to(ROOT).as_posix())], {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = text(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(relink(source.partition(END)[0].strip(), home))
        if END in source:
            break
        if cell["cell_type"] != "code":
            continue
        options, body = split(source)
        if "hide" in options or "default_exp" in options or options.get("include") == "false":
            continue
        if body and options.get("echo") != "false":
            blocks.append(code(body))
        if options.get("output") != "false":
            blocks += outputs(cell, options, home, images)
    return "\n\n".join(o for o in blocks if o) + "\n", images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if anything would change")
    args = parser.parse_args()
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = ini["DEFAULT"]
    readme, images = build(ROOT / cfg["nbs_path"] / cfg.get("readme_nb", "index.ipynb"), cfg["nbs_path"])

    new = {ROOT / "README.md": readme.encode(), **{ROOT / k: v for k, v in images.items()}}
    stale = [o for o in (ROOT / cfg["nbs_path"]).glob("images/index-*.png")
             if re.fullmatch(r"index-\d+", o.stem) and o not in new]
    changed = [k for k, v in new.items() if not k.exists() or k.read_bytes() != v]
    for path in changed + stale:
        verb = "remove" if path in stale else "write"
        print(f"{'would ' if args.check else ''}{verb} {path.relative_to(ROOT)}")
    if args.check:
        return 1 if changed or stale else 0
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(new[path])
    for path in stale:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
