"""Collects nbs/*.ipynb: every code cell runs, in order; cells that assert something and export cells are tests.

An export cell is not executed. Its names are taken from the built module instead, and its text has to be in that
module, so a stale or broken package fails here. Cells between two tests run as set-up of the next one.

Outputs that are kept have to be those of today's code: the same words, and numbers to 5 percent or in their
last digit. A cell whose output cannot be repeated (a duration, a long training) carries the directive `#| varies`.
"""
import ast
import atexit
import contextlib
import copy
import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
if sys.dont_write_bytecode:                        # many tests start programs, and each would compile all of torch anew
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(ROOT / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with all threads each would wait for one another
# addresses, which nbdev cleans; colours; and a run's line for each epoch, which a notebook shows as a table that moves
SHOWN_ELSEWHERE = re.compile(r" at 0x[0-9a-fA-F]+|\x1b\[[0-9;]*m|^epoch +\d+/\d+ .*$", re.MULTILINE)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?")
CHECKS = re.compile(r"assert\w*$|test_\w+$|(raises|warns|fail|expect_fail|ExceptionExpected|gradcheck)$")
EXPORTS = ("export", "exporti", "exports")


@cache
def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def pytest_addoption(parser):
    parser.addoption("--write-models", action="store_true", help="write docs/models.md from the run of tests/test_models.py")
    parser.addoption("--flags", default="", help="flags of tst_flags whose notebook cells run, as in 'slow cuda'")


def pytest_configure(config):
    gc.disable()                                       # until all is imported and collected
    cfg = settings()
    config.nb_home = ROOT / cfg["nbs_path"]
    config.nb_off = set(cfg.get("tst_flags", "").split()) - set(config.getoption("--flags").split())
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        interpret_triton()                             # which imports torch: not where other processes run the tests
    listen_again()
    config.nb_ipython = tempfile.TemporaryDirectory(prefix="ipython")  # leaves the user's profile alone


def listen_again():
    "Tests send signals; a launcher such as nohup may have had them ignored, which children inherit."
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGTERM", signal.SIG_DFL), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), handler)


def interpret_triton():
    "Without a GPU, Triton's kernels run in its interpreter, which has to be chosen before Triton is first imported."
    if "triton" not in sys.modules:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


def pytest_sessionfinish():
    "What a test left behind when its time was over would be waited for when the interpreter ends."
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # torch's handler raises where a loading process is killed
    for child in multiprocessing.active_children():
        child.kill()


def pytest_unconfigure(config):
    if hasattr(config, "nb_ipython"):
        config.nb_ipython.cleanup()


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and file_path.parent == parent.config.nb_home and file_path.name[0] not in "._":
        return Notebook.from_parent(parent, path=file_path)


SLOWEST = ("test_site.py test_gpu_kernels.py test_lab.py test_language.py test_graphs.py test_tap.py test_models.py test_resume.py test_callbacks.py "
           "test_comparing.py test_machines.py 60_comparing.ipynb test_hostile.py test_progress.py test_commands.py test_faults.py test_processes.py "
           "test_kernels.py test_surgery.py 64_robustness.ipynb 08_gallery.ipynb 92_last_block.ipynb 90_loss_benchmark.ipynb test_explorer_app.py "
           "18_simpool.ipynb 58_loop.ipynb 33_transformers.ipynb 91_training_benchmark.ipynb test_training.py 80_commands.ipynb 11_families.ipynb "
           "59_evaluating.ipynb 31_regularizer.ipynb 48_scoring.ipynb 50_files.ipynb 42_chance.ipynb 34_fastai.ipynb").split()


def pytest_collection_modifyitems(items):
    "Files that take long come first, so that no worker is left alone with one at the end."
    place = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_runtest_setup():
    "Tests fork, and a fork waits for ever in an operation on more threads than one, once its parent has run one."
    torch = sys.modules.get("torch")
    if "PYTEST_XDIST_WORKER" in os.environ and torch and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def pytest_collection_finish():
    "What is imported by now stays: nobody has to go through millions of objects again for each piece of rubbish."
    gc.collect()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


@cache
def parsed(cell):
    "The cell's statements; None where it holds a magic."
    return cell.parsed_()


def tree(cell):
    return ast.Module(parsed(cell) or [], [])


def asserts(cell):
    "Whether anything in the cell can fail a test on purpose."
    if parsed(cell) is None:
        return bool(re.search(r"^\s*assert\b|\bassert_\w+\(|\braises\(", cell.source, re.MULTILINE))
    for node in ast.walk(tree(cell)):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if CHECKS.match(name):
                return True
    return False


class Names(ast.NodeVisitor):
    "The names that a cell binds at the top level, in order."

    def __init__(self):
        self.defs, self.others, self.stars = [], [], []

    def visit_ClassDef(self, node):
        self.defs.append(node.name)

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef

    def visit_Lambda(self, node):
        pass

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda

    def visit_Import(self, node):
        for o in node.names:
            if o.name == "*":
                self.stars.append(node.module)
            else:
                self.others.append(o.asname or o.name.partition(".")[0])

    def visit_ImportFrom(self, node):
        if node.module != "__future__":
            self.visit_Import(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.others.append(node.id)
        elif isinstance(node.ctx, ast.Del) and node.id in self.others:
            self.others.remove(node.id)


def names(cell):
    found = Names()
    found.visit(tree(cell))
    return found


def title(cell, heading):
    "A few words that say what the cell is about."
    if any(o in cell.directives_ for o in EXPORTS):
        found = names(cell)
        words = found.defs or [o for o in found.others if not o.startswith("_")] or found.others or ["export"]
        if all(isinstance(o, ast.Import | ast.ImportFrom) for o in tree(cell).body):
            words = ["imports"]
        return " ".join(words[:3])
    return re.sub(r"[^\w\s().,=+-]", "", heading).strip()[:40].strip()


class CellError(Exception):
    "A failure in a cell: which one, and the error or the message."

    def __init__(self, number, cell, error):
        super().__init__(number, cell, error)
        self.number, self.cell, self.error = number, cell, error


class Kept(CellError):
    "An output that is kept, and not today's; the cells after it can run."


class Notebook(pytest.File):
    def collect(self):
        from nbdev.process import NBProcessor

        self.cells = NBProcessor(self.path, rm_directives=False).nb.cells
        self.default_exp, heading, last = None, "", -1
        items, codes = [], []
        for i, cell in enumerate(self.cells):
            if cell.cell_type == "markdown":
                found = re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)
                heading = found[-1] if found else heading
            if cell.cell_type != "code" or not cell.source.strip():
                continue
            dirs = cell.directives_
            if "default_exp" in dirs:
                self.default_exp = dirs["default_exp"][0]
            if self.unwanted(cell) or not tree(cell).body and parsed(cell) is not None:
                continue
            codes.append(i)
            if any(o in dirs for o in EXPORTS) or asserts(cell) or self.flags(cell):
                label = f"cell {i + 1} {title(cell, heading)}".strip()
                items.append(Cell.from_parent(self, name=label, index=i))
                last = i
        if codes and codes[-1] > last:
            items.append(Cell.from_parent(self, name="rest", index=len(self.cells) - 1))
        return items

    def flags(self, cell):
        return set(settings().get("tst_flags", "").split()) & set(cell.directives_)

    def unwanted(self, cell):
        return cell.directives_.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in cell.source

    def setup(self):
        self.shell, self.at, self.broken = None, 0, False
        self.folder, self.sys_path = self.path.parent, [str(self.path.parent), str(ROOT), *sys.path]

    def teardown(self):
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
        if self.shell is not None:
            self.shell.atexit_operations()  # closes its history before the folder goes, and frees its names
            atexit.unregister(self.shell.atexit_operations)
            gc.freeze()                        # which collected the rubbish: what is left are libraries that the notebook imported
        self.shell = None

    def start(self):
        from execnb.shell import CaptureShell

        self.shell = CaptureShell(mpl_format="png")
        self.shell._run("set_matplotlib_formats('png', bbox_inches=None)")     # a figure that is cut to what it shows is drawn twice
        quiet = lambda *args, **kwargs: None
        self.shell.showtraceback = self.shell.showsyntaxerror = self.shell.showindentationerror = quiet

    def run_to(self, index):
        "Run what has not run yet, up to and with cell `index`; return what the last one printed."
        printed, main = "", sys.modules["__main__"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a kernel: shown, never errors, and not those of libraries to come
            for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", quiet)
            for key, value in dict(IN_TEST="1", MPLBACKEND="Agg", PYTHONPATH=path, COLUMNS="100", NO_COLOR="1").items():
                patch.setenv(key, value)
            patch.setenv("IPYTHONDIR", self.config.nb_ipython.name)
            patch.chdir(self.folder)
            patch.setattr(sys, "path", self.sys_path)
            try:
                if self.shell is None:
                    self.start()
                sys.modules["__main__"] = self.shell.user_module  # so that what a cell defines can be pickled
                while self.at <= index:
                    cell, self.at = self.cells[self.at], self.at + 1
                    if cell.cell_type == "code" and not self.unwanted(cell) and cell.source.strip():
                        if not self.flags(cell) & self.config.nb_off:
                            printed = self.run_cell(self.at, cell)
            except BaseException as e:
                self.broken = not isinstance(e, pytest.skip.Exception | Kept)
                raise
            finally:
                sys.modules["__main__"] = main
                self.sys_path = sys.path
                with contextlib.suppress(OSError):  # a cell may change the folder, and even remove it
                    self.folder = os.getcwd()
        return printed

    def run_cell(self, number, cell):
        if any(o in cell.directives_ for o in EXPORTS):
            self.shell.user_ns.update(self.built(number, cell))
            return ""
        done = self.shell.run_cell(cell.source)
        if isinstance(done.exception, KeyboardInterrupt | pytest.skip.Exception):
            raise done.exception
        if done.exception is not None:
            error = CellError(number, cell, done.exception)
            error.printed = done.stdout + done.stderr
            raise error
        self.compare(number, cell, done)
        return done.stdout + done.stderr

    def compare(self, number, cell, done):
        "Raise where the outputs that are kept are not today's."
        if "varies" in cell.directives_ or not cell.get("outputs"):
            return
        now = done.stdout
        value = done.result.result
        if value is not None and not done.quiet:
            words = self.shell.display_formatter.format(value, include={"text/plain"})[0]      # pictures were drawn once, when the cell ran
            now += "\n" + words.get("text/plain", "")
        kept = "\n".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell.outputs
                         if o.output_type in ("stream", "execute_result"))
        if found := difference(kept, now):
            error = Kept(number, cell, "the kept output is not that of today's code: run tools/notebooks.py "
                                            f"{self.path.stem}\n{found}")
            error.printed = now
            raise error

    def built(self, number, cell):
        "The names of an export cell, out of the built module."
        lib = settings()["lib_name"]
        kind = next(o for o in EXPORTS if o in cell.directives_)
        to = (cell.directives_[kind] or [self.default_exp])[0]
        if to is None:
            raise CellError(number, cell, "the notebook exports but has no '#| default_exp' cell")
        file = ROOT / settings()["lib_path"] / (to.replace(".", "/") + ".py")
        name = f"{lib}.{to}".removesuffix(".__init__")
        if not file.exists():
            raise CellError(number, cell, f"{file.relative_to(ROOT)} does not exist: run nbdev_export")
        if exported(cell, f"{lib}.{to}".rpartition(".")[0]) not in file.read_text(encoding="utf-8"):
            raise CellError(number, cell, f"{file.relative_to(ROOT)} does not hold this cell as it stands: "
                                          "run nbdev_export")
        try:
            module = importlib.import_module(name)
        except Exception as e:
            raise CellError(number, cell, e) from e
        if Path(module.__file__).resolve() != file:
            raise CellError(number, cell, f"{name} comes from {module.__file__}, not from this repository")
        found = names(cell)
        wanted = found.defs + found.others
        for star in found.stars:
            source = importlib.import_module(star)
            wanted += getattr(source, "__all__", [o for o in vars(source) if not o.startswith("_")])
        missing = [o for o in wanted if not hasattr(module, o)]
        if missing:
            raise CellError(number, cell, f"{name} lacks {', '.join(missing)}: run nbdev_export")
        return {o: getattr(module, o) for o in wanted}


def numbers_in(text):
    "Each number of a text, and how far another one may be from it."
    for said in NUMBER.findall(text):
        value, decimals = float(said.replace(",", "").rstrip(".")), len(said.partition(".")[2].partition("e")[0])
        yield value, max(.05 * abs(value), min(10.**-decimals, .05) if decimals else 0, .001)


def difference(kept, now):
    "None where two outputs say the same: the same words, and numbers that agree to 5 percent or in their last digit."
    kept, now = (re.sub(SHOWN_ELSEWHERE, "", t) for t in (kept, now))
    words = [re.sub(r"[\s─-╿]+", " ", NUMBER.sub("#", t)).strip() for t in (kept, now)]
    if words[0] != words[1]:
        return f"kept: {words[0][:400]}\nnow:  {words[1][:400]}"
    pairs = zip(numbers_in(kept), numbers_in(now), strict=True)
    far = [f"{a:g}, now {b:g}" for (a, near), (b, _) in pairs if abs(a - b) > near * (1 + 1e-9)]
    return f"kept: {'; '.join(far[:5])}" if far else None


def exported(cell, folder):
    "The cell's text as nbdev writes it into a module of that folder, such as spatial_entropy.measure."
    from nbdev.export import scrub_magics
    from nbdev.process import extract_directives

    cell = copy.deepcopy(cell)
    extract_directives(cell)
    cell.set_source(cell.source)  # forgets the tree of the text with its directives
    scrub_magics(cell)
    cell.import2relative(folder.replace(".", "/"))
    return f"\n{cell.source}\n"


class Cell(pytest.Item):
    def __init__(self, *, index, **kwargs):
        super().__init__(**kwargs)
        self.index = index

    def reportinfo(self):
        return self.path, None, f"{self.path.name} {self.name}"

    def runtest(self):
        book = self.parent
        if book.broken:
            pytest.skip("not run: an earlier cell failed")
        off = book.flags(book.cells[self.index]) & self.config.nb_off
        if off and self.name != "rest":
            pytest.skip(f"flag {' '.join(sorted(off))} is off: --flags \"{' '.join(sorted(off))}\"")
        printed = book.run_to(self.index)
        if printed:
            self.add_report_section("call", "output", printed)

    def repr_failure(self, excinfo):
        error = excinfo.value
        if not isinstance(error, CellError):
            return super().repr_failure(excinfo)
        source = "".join(f"    {o}\n" for o in error.cell.source.splitlines())
        printed = getattr(error, "printed", "")
        why = explain(error.error, error.number)
        parts = [f"{self.path.name}, cell {error.number}: {why.strip().splitlines()[-1]}", source, why]
        return "\n".join(parts + ([f"It had printed:\n{printed}"] if printed else []))


def explain(error, number):
    "The error with the frames of the cell and of the repository, and the innermost one."
    if isinstance(error, str):
        return error
    report = traceback.TracebackException.from_exception(error)
    stack, todo = report.stack, []
    cellish = lambda f: "ipykernel_" in f.filename or f.filename.startswith("<ipython-input")
    ours = lambda f: cellish(f) or Path(f.filename).is_relative_to(ROOT) and "site-packages" not in f.filename
    start = next((i for i, f in enumerate(stack) if cellish(f)), 0)
    for i, frame in enumerate(stack[start:], start):
        if (ours(frame) and frame.filename != __file__) or i == len(stack) - 1:
            where = f"cell {number}" if cellish(frame) else frame.filename.removeprefix(f"{ROOT}/")
            todo.append(f"  {where}, line {frame.lineno}, in {frame.name}\n    {frame.line}\n")
    return "".join(todo) + "".join(report.format_exception_only())
