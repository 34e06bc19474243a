"""The fast lane for someone who edits a page: what depends on it and takes seconds, in one go.

    python tools/check.py                  the pages that differ from HEAD and from where the branch left main
    python tools/check.py 02_entropy 12    the pages named; a beginning of the name is enough

Runs ruff, the cells of the pages, the repository's rules, the measure against its oracle, and the tests that import the
pages' modules or that were changed themselves. Test files that conftest.py calls slow are named, not run; pages
above these in the map are neither. Exit code 1 where something fails; the whole suite is `python -m pytest`.
"""
import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ["tests/test_repository.py", "tests/test_entropy.py"]


def git(root, *words):
    "The lines of an answer of git; none where it has no answer."
    said = subprocess.run(["git", *words], cwd=root, capture_output=True, encoding="utf-8")
    return said.stdout.splitlines() if said.returncode == 0 else []


def changed(root):
    "Files that differ from HEAD, from where this branch left main, or that git does not know yet."
    base = git(root, "merge-base", "HEAD", "main") or git(root, "merge-base", "HEAD", "origin/main") or ["HEAD"]
    found = {*git(root, "diff", "--name-only", "HEAD"), *git(root, "diff", "--name-only", base[0])}
    found |= set(git(root, "ls-files", "--others", "--exclude-standard"))
    return sorted(name for name in found if (root / name).is_file())


def named(root, words):
    "The notebooks that words name: a path, a name or the beginning of one."
    found = []
    for word in words:
        near = [p.name for p in sorted((root / "nbs").glob("*.ipynb")) if p.name.startswith(Path(word).name)]
        if len(near) != 1:
            raise SystemExit(f"{word}: names {len(near)} pages of nbs/, expected one: {', '.join(near[:8]) or 'none'}")
        found.append(f"nbs/{near[0]}")
    return found


def slow_files(root):
    "The names of the files that conftest.py puts first because they take long."
    text = (root / "conftest.py").read_text(encoding="utf-8")
    return set(re.findall(r"\w+\.(?:py|ipynb)", text[text.index("SLOWEST = "):text.index(".split()", text.index("SLOWEST = "))]))


def tests_of(root, pages):
    "The files of tests/ that import what these pages export."
    modules = []
    for page in pages:
        found = re.search(r"#\| default_exp ([\w.]+)", (root / page).read_text(encoding="utf-8"))
        modules += [found[1]] if found else []
    for path in sorted((root / "tests").glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for module in modules:
            folder, _, last = module.rpartition(".")
            inside = ".".join(filter(None, ["spatial_entropy", folder]))
            if f"spatial_entropy.{module} " in text or re.search(rf"from {re.escape(inside)} import [^\n]*\b{last}\b", text):
                yield f"tests/{path.name}"
                break


def plan(root, words):
    "(files to test, files left out since they are slow)"
    files = [] if words else changed(root)
    pages = named(root, words) if words else [f for f in files if re.fullmatch(r"nbs/[^/_.][^/]*\.ipynb", f)]
    tests = [f for f in files if re.fullmatch(r"tests/test_\w+\.py", f)]
    tests = dict.fromkeys([*ALWAYS, *tests_of(root, pages), *tests])
    slow = slow_files(root)
    return [*pages, *(t for t in tests if Path(t).name not in slow)], [t for t in tests if Path(t).name in slow]


def main(words=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="default: those that were changed")
    run, left = plan(root, parser.parse_args(words).pages)
    python, failed, began = sys.executable, [], time.monotonic()
    for name, command in {"ruff": [python, "-m", "ruff", "check", "."], "pytest": [python, "-m", "pytest", "-q", "-n", "0", "--durations=5", *run]}.items():
        print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
        if subprocess.run(command, cwd=root).returncode:
            failed.append(name)
    if left:
        print(f"left to the whole suite, since they take long: {' '.join(left)}")
    print(f"{' and '.join(failed) + ' failed' if failed else 'all is well'}, after {time.monotonic() - began:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
