"""The repository keeps its own rules: a clean export, arrows that point down, cells that fit on a screen."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "spatial_entropy"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CELLS = [(nb.name, c) for nb in NOTEBOOKS for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]]


def module_of(notebook):
    found = re.search(r"#\| default_exp ([\w.]+)", notebook.read_text(encoding="utf-8"))
    return found and found.group(1)


MODULES = {module_of(nb): nb for nb in NOTEBOOKS if module_of(nb)}


def test_exporting_again_changes_nothing_and_leaves_no_orphan(tmp_path):
    for name in ("nbs", "settings.ini", "pyproject.toml", "setup.py"):
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, check=True, capture_output=True)
    fresh = {str(p.relative_to(tmp_path / "spatial_entropy")): p.read_text(encoding="utf-8") for p in (tmp_path / "spatial_entropy").rglob("*.py")}
    built = {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    assert sorted(built) == sorted(fresh), "a module without a notebook, or a notebook never exported; run nbdev_export"
    stale = [n for n in fresh if fresh[n] != built[n]]
    assert not stale, f"stale or edited by hand: {stale}; change the notebook and run nbdev_export"


def path_of(module):
    return PACKAGE / (module.replace(".", "/") + ".py")


def inner_imports(module):
    "The modules of the package that a module imports, at its top or in a function."
    parts = ["spatial_entropy", *module.split(".")]
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = parts[:-node.level] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            if target[:1] != ["spatial_entropy"]:
                continue
            assert all(a.name != "*" for a in node.names), f"{module} imports * from {'.'.join(target)}"
            inside = ".".join(target[1:])
            yield from [inside] if inside in MODULES else [f"{inside}.{a.name}".lstrip(".") for a in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("spatial_entropy."))


def test_imports_point_down_the_map():
    for module, notebook in MODULES.items():
        for target in inner_imports(module):
            assert target in MODULES, f"{module} imports {target}, which no notebook makes"
            assert MODULES[target].name < notebook.name, f"{module} imports {target}, which is not below it"


def test_imports_at_the_top_of_a_module_are_relative():
    "nbdev writes them so, but not one over several lines whose last is shorter than its beginning."
    for module in MODULES:
        for node in ast.parse(path_of(module).read_text(encoding="utf-8")).body:
            assert not (isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("spatial_entropy")), f"{module}: {ast.unparse(node)}"


ROOMS = {  # room: the rooms that it may import
    "pictures": set(),
    "data": {"measure"},
    "boxes": {"data"},
    "demo": set(),
    "measure": set(),
    "attention": set(),
    "language": {"measure", "attention", "analysis", "pictures", "data"},
    "loops": {"measure", "attention"},
    "analysis": {"measure", "attention", "pictures"},
    "training": {"measure", "attention", "loops", "analysis", "pictures", "data", "boxes", "demo"},
    "exploring": {"measure", "attention", "analysis", "training", "pictures", "data", "demo"},
    "serving": {"exploring"},
    "widgets": {"exploring"},
    "commands": {"measure", "attention", "language", "loops", "analysis", "training", "pictures", "data", "exploring", "serving"},
    "__init__": set(),
}


def test_rooms_know_only_those_that_they_may():
    "Prints the graph (`-s`); it has no circle."
    arrows = {room: set() for room in ROOMS}
    for module in MODULES:
        room = module.partition(".")[0]
        arrows[room] |= {target.partition(".")[0] for target in inner_imports(module)} - {room}
    for room, known in arrows.items():
        print(f"{room:10} → {', '.join(sorted(known)) or 'nothing'}")
    assert arrows.keys() == ROOMS.keys(), "a module that stands in no room"
    assert not {(a, b) for a, known in arrows.items() for b in known - ROOMS[a]}
    list(TopologicalSorter(arrows).static_order())                      # raises CycleError for a circle


def test_no_private_name_crosses_a_module():
    for module in MODULES:
        for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("spatial_entropy")):
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{module} imports {', '.join(private)}"


def test_every_page_leads_to_the_next_one_of_the_map():
    "The map in the index, the sidebar of the site and the last line of every page are in one order."
    index = (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")
    order = re.findall(r"\| \[\w+\]\((\w+)\.ipynb\) \|", index)
    assert order == [nb.stem for nb in NOTEBOOKS if nb.stem != "index"]
    for page, following in zip(order, [*order[1:], "index"]):
        said = "".join("".join(c["source"]) for name, c in CELLS if name == f"{page}.ipynb" and c["cell_type"] == "markdown")
        assert re.findall(r"\*\*Next\.\*\*[^(\n]*\((\w+)\.ipynb\)", said) == [following], page


def test_links_between_pages_lead_somewhere():
    stems = {nb.stem for nb in NOTEBOOKS}
    for name, c in CELLS:
        if c["cell_type"] == "markdown":
            for target in re.findall(r"\]\((\w+)\.ipynb", "".join(c["source"])):
                assert target in stems, f"{name} links to {target}"


def test_every_page_installs_the_package_where_colab_opens_it():
    "The first cell of code does so, there alone; it names the repository of settings.ini."
    known = ConfigParser(delimiters=["="])
    known.read(ROOT / "settings.ini", encoding="utf-8")
    for nb in NOTEBOOKS:
        first = next("".join(c["source"]) for name, c in CELLS if name == nb.name and c["cell_type"] == "code")
        assert first.startswith("#| hide\n") and 'if "google.colab" in sys.modules:' in first and known["DEFAULT"]["git_url"] in first, nb.name
        assert all(line.startswith("    ") for line in first.splitlines()[3:]), nb.name          # nothing runs elsewhere


def test_the_package_needs_no_development_tool():
    for path in PACKAGE.rglob("*.py"):
        imported = {(n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name
                    for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, (ast.Import, ast.ImportFrom))}
        assert not {i.split(".")[0] for i in imported} & {"nbdev", "fastcore", "execnb", "IPython", "pytest", "scipy", "skimage"}, path.name


def test_public_names_are_documented_and_found():
    import spatial_entropy as se
    for name in se.__all__:
        value = getattr(se, name)
        assert value.__doc__ and len(value.__doc__) > 20, f"{name} has no docstring"
        assert value.__module__.removeprefix("spatial_entropy.") in MODULES


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_form(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    assert re.match(r"# .+\n\n> .+", first), "begin with a title and one > line"
    pictures = 0
    for c in (c for c in cells if c["cell_type"] == "code"):
        source = "".join(c["source"])
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= 25, f"a cell of {len(lines)} lines: {lines[0]}"
        assert c["execution_count"] is None
        for o in c["outputs"]:
            assert o["output_type"] != "error", source
            assert o.get("name") != "stderr", f"a warning is kept: {o.get('text')}"
            pictures += "image/png" in o.get("data", {})
    assert pictures, "no picture is kept"


def test_pages_can_be_read():
    "What `tools/pages.py` counts: nothing is believed unrun, no method is glued on, no line runs off the page."
    found = subprocess.run([sys.executable, "tools/pages.py"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    names, *pages = (line.split() for line in found.stdout.splitlines())
    pages = {page: dict(zip(names, map(float, counts))) for page, *counts in pages}
    assert len(pages) == len(NOTEBOOKS) + 1
    for page, count in pages.items():
        assert count["unrun"] <= 2, f"{page}: {count['unrun']:g} exported cells in a row with no cell that runs them"
        for name in ("wide", "glued", "private", "crowded"):
            assert count[name] == 0, f"{page}: {count[name]:g} {name}; see tools/pages.py --where 100 {page}"
    assert pages["all"]["median"] <= 6 and pages["all"]["outputs"] >= 45


def test_no_paths_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.split()
    for f in files:
        if Path(f).suffix in {".py", ".md", ".ipynb", ".ini", ".toml", ".json", ".csv", ".yaml", ".yml"}:
            found = re.search(r"/home/\w|/roo[t]/|/wor[k]/|/tm[p]/\w", (ROOT / f).read_text(encoding="utf-8"))
            assert not found, f"{f} contains {found.group(0)}"


def without_encoding(source):
    "Lines that open text, or a program's output as text, and leave the encoding to the machine."
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        told = {k.arg: ast.unparse(k.value) for k in node.keywords}
        words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)] + [told.get("mode", "")]
        binary = any(re.fullmatch(r"['\"]?[rwxa]\+?b\+?['\"]?|.*[:|].*", w) for w in words)
        opens = (name in ("read_text", "write_text") or name == "fdopen" or name == "open" and owner in ("", "io")
                 or name == "open" and owner not in ("os", "Image", "tarfile", "tar", "self") and (not node.args or words[:1] > [""]))
        pipes = owner == "subprocess" and {"text", "universal_newlines"} & set(told)
        if (opens and not binary or pipes) and "encoding" not in told and name + str(len(node.args)) != "read_text1":
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_the_text_of_a_file_never_depends_on_the_machine():
    "Every text is opened with its encoding: in the package, the tools, the site and these tests' own machinery."
    for wrong in ("open(p)", "open(p, 'w')", "p.read_text()", "p.write_text(t)", "os.fdopen(f)", "(a/'b').open()", "p.open('w')",
                  "subprocess.run(c, text=True)"):
        assert list(without_encoding(wrong)), wrong
    for right in ("open(p, 'rb')", "Image.open(p)", "read_text(p)", "p.read_text(encoding='utf-8')", "tarfile.open(p, 'r:')", "source.open(3)"):
        assert not list(without_encoding(right)), right
    files = [*PACKAGE.rglob("*.py"), *(p for d in ("tools", "docs", "benchmarks") for p in (ROOT / d).glob("*.py")),
             ROOT / "conftest.py", ROOT / "setup.py", Path(__file__)]
    found = {str(p.relative_to(ROOT)): lines for p in files if (lines := list(without_encoding(p.read_text(encoding="utf-8"))))}
    assert not found, found


def test_readme_is_the_index_and_ci_runs_its_command():
    subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT, check=True)
    commands = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("python3 -m venv")]
    assert [c.split(" && ")[-1] for c in commands] == [".venv/bin/spatial-entropy compare --jobs 2", ".venv/bin/python -m pytest"]
    assert "grep -m 1 -- '-m pytest$' README.md" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_the_files_for_the_forge_are_well_formed():
    "YAML that can be read; the workflows call what CONTRIBUTING names; the citation names the paper."
    for path in [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]:
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    flow = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob(".github/workflows/*.yml")}
    assert flow.keys() == {"tests", "site", "publish"}
    assert ".ci/run" in flow["tests"] and "docs/build.py" in flow["site"] and "id-token: write" in flow["publish"]
    for hook in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]:
        assert shutil.which(hook["entry"].split()[0], path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"), hook
    assert "Peruzzo" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_no_table_of_the_measurements_runs_off_the_page():
    for path in NOTEBOOKS:
        if "92" <= path.name[:2] <= "99":
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                for output in cell.get("outputs", []):
                    lines = "".join(output.get("text", [])).splitlines()
                    wide = [line for line in lines if len(line.rstrip()) > 100]
                    assert not wide, f"{path.name}, {cell['id']}: a line of {len(wide[0])} columns, of which a site shows 103: {wide[0]}"
