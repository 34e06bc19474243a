"""The fast lane: which files it picks, and that it fails when they do."""
import importlib.util
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


@pytest.fixture
def repository(tmp_path):
    "Two pages, a slow test and two quick ones, on a branch that left main."
    files = {"conftest.py": 'SLOWEST = ("test_long.py "\n           "58_loop.ipynb").split()\n', "nbs/02_entropy.ipynb": "#| default_exp measure.entropy",
             "nbs/12_tap.ipynb": "#| default_exp attention.tap", "nbs/03_text.ipynb": "no module",
             "tests/test_long.py": "from spatial_entropy.attention import tap", "tests/test_tables.py": "from spatial_entropy.attention.tap import f",
             "tests/test_other.py": "from spatial_entropy.attention import surgery"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path)
    git(tmp_path, "checkout", "-q", "-b", "mine")
    return tmp_path


def git(root, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=root, check=True, capture_output=True)


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "x")


def test_what_is_picked(repository):
    assert check.plan(repository, []) == (check.ALWAYS, [])
    (repository / "nbs/12_tap.ipynb").write_text("#| default_exp attention.tap\nmore", encoding="utf-8")
    picked = ["nbs/12_tap.ipynb", *check.ALWAYS, "tests/test_tables.py"], ["tests/test_long.py"]
    assert check.plan(repository, []) == picked          # changed, not committed
    commit(repository)
    assert check.plan(repository, []) == picked          # committed on the branch
    (repository / "nbs/04_new.ipynb").write_text("new", encoding="utf-8")
    (repository / "tests/test_new.py").write_text("", encoding="utf-8")
    assert check.plan(repository, [])[0] == ["nbs/04_new.ipynb", "nbs/12_tap.ipynb", *check.ALWAYS, "tests/test_tables.py", "tests/test_new.py"]
    for word in ("02", "02_entropy", "nbs/02_entropy.ipynb"):
        assert check.plan(repository, [word]) == (["nbs/02_entropy.ipynb", *check.ALWAYS], [])
    for word, said in (("0", "names 3 pages"), ("77", "names 0 pages of nbs/, expected one: none")):
        with pytest.raises(SystemExit, match=said):
            check.plan(repository, [word])


@pytest.mark.parametrize("fails", [None, "ruff", "pytest"])
def test_it_says_what_it_runs_and_fails_with_it(repository, fails, monkeypatch, capfd):
    real = subprocess.run

    def run(command, **options):
        return real(command, **options) if command[0] == "git" else SimpleNamespace(returncode=int(command[2] == fails))
    monkeypatch.setattr(check.subprocess, "run", run)
    assert check.main(["12"], repository) == int(fails is not None)
    said = capfd.readouterr().out
    assert "$ python -m ruff check ." in said and "-n 0 --durations=5 nbs/12_tap.ipynb tests/test_repository.py" in said
    assert "take long: tests/test_long.py" in said and ("all is well" in said) == (fails is None) and (not fails or f"{fails} failed" in said)


def test_slow_files_are_those_of_the_suite():
    slow = check.slow_files(ROOT)
    assert {"test_models.py", "test_gpu_kernels.py", "58_loop.ipynb"} <= slow
    assert all((ROOT / folder / name).exists() for name in slow for folder in [("nbs" if name.endswith("ipynb") else "tests")])
