"""Re-runs notebooks top to bottom and saves their outputs in place.

    python tools/notebooks.py                     every notebook of nbs/
    python tools/notebooks.py 02_entropy index    the ones named (paths work too)
    python tools/notebooks.py --check             writes nothing; exit 1 if outputs would change

Each notebook gets a fresh kernel in its own folder, with fixed settings, so that a second run changes no byte. Cells
with `eval: false` or a flag of `tst_flags` do not run and keep the outputs they have, and cells that call
`nbdev_export()` do not run either. A notebook that fails, warns, or shows a figure as text is left as it was.
"""
import argparse
import json
import os
import re
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.process import extract_directives

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
CONFIG = """c = get_config()
c.InlineBackend.figure_formats = {"png"}
c.HistoryManager.enabled = False
c.IPKernelApp.log_level = "ERROR"
"""


class Failed(Exception):
    pass


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


class Runner(NotebookClient):
    "A client that leaves alone the cells that are not to run."

    flags = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        dirs = extract_directives(cell, remove=False) if cell.cell_type == "code" else {}
        off = dirs.get("eval:", [""])[0].lower() == "false" or self.flags & dirs.keys()
        if off or "nbdev_export(" in cell.source:
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


WIDGET = "application/vnd.jupyter.widget-view+json"


def merged(outputs):
    "Outputs without widgets, and with neighbouring pieces of the same stream joined."
    res = []
    for out in outputs:
        if WIDGET in out.get("data", {}) or out.get("data", {}).get("text/html") == "":  # a live bar leaves nothing to keep
            continue
        if res and out.output_type == res[-1].output_type == "stream" and out.name == res[-1].name:
            res[-1].text += out.text
        else:
            res.append(out)
    return res


def rerun(path, flags):
    "The text of the notebook with fresh outputs."
    nb = nbformat.read(path, as_version=4)
    client = Runner(nb, timeout=None, kernel_name=KERNEL["name"], record_timing=False,
                    resources={"metadata": {"path": str(path.parent)}})
    client.flags = flags
    try:
        client.execute()
    except CellExecutionError as e:
        raise Failed(re.sub(r"\x1b\[[0-9;]*m", "", str(e)).strip()) from None
    except DeadKernelError:
        raise Failed("the kernel died") from None
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type != "code":
            continue
        cell.outputs = merged(cell.outputs)
        for out in cell.outputs:
            if out.output_type == "stream" and out.name == "stderr" and re.search(r"warn(ing)?\b", out.text, re.I):
                raise Failed(f"cell {number} warns:\n{out.text.strip()}")
            if out.get("data", {}).keys() == {"text/plain"} and out.data["text/plain"].startswith("<Figure size"):
                raise Failed(f"cell {number} shows a figure as text: a kernel draws it only after %matplotlib inline "
                             "or an import of matplotlib.pyplot, in an earlier cell")
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    plain = json.loads(nbformat.writes(nb))
    cfg = settings()
    clean_nb(plain, allowed_metadata_keys=cfg.get("allowed_metadata_keys", "").split(),
             allowed_cell_metadata_keys=cfg.get("allowed_cell_metadata_keys", "").split())
    return nb2str(plain)


def environment(folder):
    "What a kernel needs to print and draw the same on every machine; none of the user's own configuration."
    (folder / "profile_default").mkdir()
    (folder / "profile_default/ipython_config.py").write_text(CONFIG, encoding="utf-8")
    (folder / "matplotlibrc").write_text("figure.dpi: 100\nsavefig.dpi: figure\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update(IPYTHONDIR=str(folder), MATPLOTLIBRC=str(folder / "matplotlibrc"), PYTHONPATH=path,
                      PYTHONHASHSEED="0", COLUMNS="100", NO_COLOR="1",
                      OMP_NUM_THREADS="1",  # sums in the same order, whatever the number of cores
                      PYTHONWARNINGS="ignore:IProgress not found")  # tqdm, where ipywidgets is not installed
    os.environ.pop("MPLBACKEND", None)


def find(names, home):
    if not names:
        return sorted(o for o in home.glob("*.ipynb") if o.name[0] not in "._")
    paths = [next((o for o in (Path(n), home / n, home / f"{n}.ipynb") if o.is_file()), None) for n in names]
    for name, path in zip(names, paths, strict=True):
        if path is None:
            sys.exit(f"no such notebook: {name}")
    return [o.resolve() for o in paths]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="paths or names; all of nbs/ if none is given")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if outputs would change")
    parser.add_argument("--flags", default="", help="flags of tst_flags whose cells run as well, as in 'slow cuda'")
    args = parser.parse_args()
    cfg = settings()
    off = frozenset(cfg.get("tst_flags", "").split()) - set(args.flags.split())
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        environment(Path(folder))
        for path in find(args.notebooks, ROOT / cfg["nbs_path"]):
            old = path.read_text(encoding="utf-8")
            try:
                new = rerun(path, off)
            except Failed as e:
                print(f"FAILED   {path.name}\n{e}\n", flush=True)
                bad += 1
                continue
            if new == old:
                print(f"same     {path.name}", flush=True)
            elif args.check:
                print(f"CHANGED  {path.name}", flush=True)
                bad += 1
            else:
                path.write_text(new, encoding="utf-8")
                print(f"saved    {path.name}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
