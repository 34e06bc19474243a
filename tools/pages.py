"""Counts what makes a page easy or hard to read, a line for each notebook.

    python tools/pages.py                  every notebook of nbs/, and all together
    python tools/pages.py 02_entropy       the ones named
    python tools/pages.py --where 100      also lists the lines over 100 columns, and exported cells that nothing runs

An exported cell counts as run by the next cell that is not exported and has code in it. Cells that hold nothing but
imports need no run.
"""
import argparse
import ast
import json
import re
import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Page:
    "What is counted of a notebook; sums, but for the median and the longest row."
    cells: int = 0      # code cells
    median: float = 0   # lines of a code cell, without directives and empty lines
    outputs: int = 0    # percent of code cells with an output
    unrun: int = 0      # longest row of exported cells with no cell that runs code between them
    wide: int = 0       # lines of code over 100 columns
    glued: int = 0      # methods set on a class from outside of it
    private: int = 0    # private names imported from the package
    crowded: int = 0    # exported lines with a second statement after a semicolon


def lines_of(source):
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def tree_of(source):
    "The syntax tree of a cell; None where a magic or a shell command makes it no Python."
    try:
        return ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))))
    except SyntaxError:
        return None


def only_imports(source):
    tree = tree_of(source)
    return tree is not None and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body)


def exported(source):
    return re.search(r"^#\|\s*exports?i?\b", source, re.M) is not None


def glued_in(tree):
    "Methods that an assignment `Class.method = function` adds."
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for t in node.targets:
                for one in t.elts if isinstance(t, ast.Tuple) else [t]:
                    if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id[:1].isupper():
                        yield ast.unparse(one)


def private_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spatial_entropy"):
            yield from (a.name for a in node.names if a.name.startswith("_"))


def crowded_in(source):
    "Lines on which one statement follows another: `a = 1; b = 2`."
    tree = tree_of(source)
    bodies = [b for n in ast.walk(tree) for b in vars(n).values() if isinstance(b, list)] if tree else []
    for body in bodies:
        starts = [n.lineno for n in body if isinstance(n, ast.stmt)]
        yield from (n for n in set(starts) if starts.count(n) > 1)


def count(path, where=0):
    "The counts of one notebook; with `where`, also prints what is over."
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    page, row, lengths, shown = Page(), 0, [], 0
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        body = lines_of(source)
        if not body:
            continue
        page.cells += 1
        lengths.append(len(body))
        shown += bool(cell["outputs"])
        tree = tree_of(source)
        long = [line for line in body if len(line) > 100]
        page.wide += len(long)
        if tree is not None:
            page.glued += len(list(glued_in(tree)))
            page.private += len(list(private_in(tree)))
        if exported(source):
            page.crowded += len(list(crowded_in(source)))
            row += not only_imports(source)
            page.unrun = max(page.unrun, row)
        elif not only_imports(source):
            row = 0
        if where:
            for line in long:
                print(f"{path.stem} cell {i}: {len(line)} columns: {line.strip()[:60]}")
            if row > 2:
                print(f"{path.stem} cell {i}: exported cell {row} in a row")
    page.median = statistics.median(lengths) if lengths else 0
    page.outputs = round(100 * shown / page.cells) if page.cells else 0
    return page, lengths, shown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*")
    parser.add_argument("--where", type=int, default=0, metavar="COLUMNS")
    args = parser.parse_args()
    names = [f.name for f in fields(Page)]
    print(f"{'':22}" + "".join(f"{n:>9}" for n in names))
    total, lengths, shown = Page(), [], 0
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        if args.notebooks and path.stem not in {Path(n).stem for n in args.notebooks}:
            continue
        page, own, with_output = count(path, args.where)
        print(f"{path.stem:22}" + "".join(f"{getattr(page, n):>9g}" for n in names))
        lengths += own
        shown += with_output
        for n in ("cells", "wide", "glued", "private", "crowded"):
            setattr(total, n, getattr(total, n) + getattr(page, n))
        total.unrun = max(total.unrun, page.unrun)
    total.median = statistics.median(lengths)
    total.outputs = round(100 * shown / total.cells)
    print(f"{'all':22}" + "".join(f"{getattr(total, n):>9g}" for n in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
