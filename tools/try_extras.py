"""Runs each framework's tutorial as a script, in a fresh environment that has the package and that one extra, and nothing else.

    python tools/try_extras.py                     all of them
    python tools/try_extras.py lightning fastai    the ones named; "none" is timm's task, which needs no extra

Needs uv (`pip install uv`) and a package index. Each environment is made in a temporary folder and removed. The exit code is the number of failures.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = {"lightning": "32_lightning", "transformers": "33_transformers", "fastai": "34_fastai", "none": "35_timm", "torchmetrics": "36_torchmetrics"}


def script(notebook):
    "The code cells that a reader types: all but those that define the exported module, which is installed, and hidden ones."
    cells = json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    module = next(c.split("default_exp", 1)[1].split()[0] for c in code if "#| default_exp" in c)
    typed = [c for c in code if not c.lstrip().startswith(("#| default_exp", "#| hide", "#| exports", "#| exporti"))]
    own = f"import spatial_entropy.{module} as _own\nglobals().update({{k: v for k, v in vars(_own).items() if not k.startswith('__')}})"
    return "\n\n".join([own, *typed])


def attempt(extra, notebook, uv):
    with tempfile.TemporaryDirectory() as folder:
        python = f"{folder}/venv/bin/python"
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, f"{folder}/venv"], check=True)
        target = f"{ROOT}[{extra}]" if extra != "none" else str(ROOT)
        subprocess.run([uv, "pip", "install", "-q", "--python", python, "-e", target], check=True)
        file = Path(folder) / "tutorial.py"
        file.write_text(script(notebook), encoding="utf-8")
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment = env | dict(MPLBACKEND="Agg")
        return subprocess.run([python, str(file)], cwd=folder, env=environment, capture_output=True,
                              encoding="utf-8", errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", default=list(TUTORIALS), help=f"some of {', '.join(TUTORIALS)}")
    names, failed = parser.parse_args().extras, 0
    if unknown := [n for n in names if n not in TUTORIALS]:
        parser.error(f"got {', '.join(unknown)}, expected some of {', '.join(TUTORIALS)}")
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    for name in names:
        done = attempt(name, TUTORIALS[name], uv)
        print(f"{name:13} {TUTORIALS[name]:16} {'ran' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed += 1
            print("    " + "\n    ".join((done.stdout + done.stderr).strip().splitlines()[-12:]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
