"""A whole training run: plain, with the surgery, with the regulariser, and timm's own train.py; explained in nbs/91_training_benchmark.ipynb.

    python benchmarks/training.py [--quick] [--timm-train PATH] [-o FOLDER]

All contenders take turns in one process. Takes about five minutes. `--help` lists the flags.
"""
import ctypes
import importlib.util
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from accelerate import Accelerator
from loss import checked_output, fresh_folder, in_fork, in_python, machine_facts
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table

from spatial_entropy.commands import Parser, lenient_output, once, outcome, pair
from spatial_entropy.data import shapes
from spatial_entropy.training.config import TrainConfig
from spatial_entropy.training.files import write_json, write_whole
from spatial_entropy.training.jobs import prepare, try_forward
from spatial_entropy.training.loop import train_epoch
from spatial_entropy.training.models import build_model


@dataclass
class _Request:
    "What is measured."
    model: str = "deit_tiny_patch16_224"
    img_size: int = 128
    batch_size: int = 32
    updates: int = 4 # of a contender in a round
    rounds: int = 9
    workers: int = 0
    data: str | None = None # an image folder; None: generated
    timm_train: str | None = None
    amp_dtype: str | None = None
    compile: str | None = None
    device: str | None = None
    model_kwargs: dict = field(default_factory=dict)


def _pictures(folder, q):
    "An image folder of shapes: what all contenders read."
    for part, n in (("train", q.updates*q.batch_size), ("validation", q.batch_size)):
        drawn = shapes(max(n, 10), "train" if part == "train" else "val", q.img_size)
        for i in range(len(drawn)):
            path = Path(folder)/part/drawn.classes[drawn.labels[i]]/f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.images[i]).save(path, quality=95)


def _ours(kind, q, data, output): # "plain", "plain again", "surgery" or "regulariser"
    "A function that does so many updates of our loop."
    c = TrainConfig(data=data, model=q.model, model_kwargs=q.model_kwargs, img_size=q.img_size, batch_size=q.batch_size, workers=q.workers,
                    device=q.device, amp_dtype=q.amp_dtype, compile=q.compile, epochs=1000, entropy_warmup=0, warmup_epochs=0,
                    limit=q.updates*q.batch_size, interpolation="bicubic", keep_skip=kind.startswith("plain"),
                    entropy_weight=.01 if kind == "regulariser" else 0., output=output, experiment=kind.replace(" ", "-"))
    job = prepare(c, say=lambda said: None)
    if kind != "regulariser":
        job.tap.close(); nothing = torch.zeros((), device=job.accelerator.device)
        job.tap, job.criterion = SimpleNamespace(maps=lambda: nothing), lambda maps: maps
    quiet = SimpleNamespace(update=lambda *a, **k: None, note=lambda said: None)
    def updates():
        with job.states.ours(): train_epoch(job, quiet, [])             # accelerate's states, which know its device
        job.place.epoch, job.place.update = job.place.epoch + 1, 0
    updates.job = job
    return updates


def _script(path):
    "timm's train.py as a module. Raises ValueError when it is another file, or timm is too old for it."
    path = Path(path)
    if not path.is_file(): raise FileNotFoundError(f"timm-train: {path}: no such file; expected train.py of timm's repository")
    spec = importlib.util.spec_from_file_location("timm_train", path)
    module = importlib.util.module_from_spec(spec)
    try: spec.loader.exec_module(module)
    except Exception as e: raise ValueError(f"timm-train: {path} cannot be imported ({type(e).__name__}: {e}); is it of this timm's version?") from None
    missing = [n for n in ("main", "train_one_epoch", "validate") if not hasattr(module, n)]
    if missing: raise ValueError(f"timm-train: {path} has no {missing[0]}(), so it is not timm's train.py")
    return module


def _flags(q, data, output):
    "The same run, in the script's words."
    words = dict(data_dir=data, model=q.model, img_size=q.img_size, batch_size=q.batch_size, workers=q.workers, epochs=q.rounds, output=output,
                 opt="adamw", lr=1e-3, weight_decay=.05, warmup_epochs=0, clip_grad=1., smoothing=0., color_jitter=0., hflip=.5,
                 train_interpolation="bicubic", log_interval=10**6,
                 num_classes=len(list((Path(data)/"train").iterdir())), device=q.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    line = [w for k, v in words.items() for w in ("--" + k.replace("_", "-"), str(v))] + ["--scale", ".6", "1"]
    if q.amp_dtype: line += ["--amp", "--amp-dtype", q.amp_dtype]
    if q.compile: line += ["--torchcompile", q.compile]
    return line + ["--model-kwargs", *(f"{k}={v}" for k, v in {**q.model_kwargs, "img_size": q.img_size}.items())]


def _beside_timm(q, data, output, turn):
    "Run timm's script; each of its epochs is turn(function that does the epoch)."
    module, original = _script(q.timm_train), None
    def epoch(*args, **kwargs):
        result = []
        turn(lambda: result.append(original(*args, **kwargs)))
        return result[-1]
    original, nothing = module.train_one_epoch, lambda *a, **k: OrderedDict(loss=0., top1=0., top5=0.)
    words = [str(q.timm_train), *_flags(q, data, output)]
    with patch.object(module, "train_one_epoch", epoch), patch.object(module, "validate", nothing), patch.object(sys, "argv", words):
        with open(os.devnull, "w", encoding="utf-8") as null, patch.object(sys, "stdout", null), _no_logs(): module.main()


@contextmanager
def _no_logs():
    logging.disable(logging.WARNING)
    try: yield
    finally: logging.disable(logging.NOTSET)


def _timed(call, device):
    if device.startswith("cuda"): torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.startswith("cuda"): torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, peak=peak)


def _turns(q, data, output, say, ready):
    "Rounds of all contenders: a list of {name: seconds}. The first round warms up and does not count; ready() is called after it."
    contenders = {k: _ours(k, q, data, output) for k in ("plain", "surgery", "regulariser", "plain again")}
    device, rounds = str(contenders["plain"].job.accelerator.device), []
    def turn(timm=None):
        calls = {**({"timm": timm} if timm else {}), **contenders}
        names = list(calls)
        start = len(rounds) % len(names)
        rounds.append({n: _timed(calls[n], device) for n in names[start:] + names[:start]})
        say(f"round {len(rounds)} of {q.rounds + 1}")
        if len(rounds) == 1: ready()
    if q.timm_train: _beside_timm(_with(q, rounds=q.rounds + 1), data, output, turn)
    else:
        for _ in range(q.rounds + 1): turn()
    return rounds[1:], _shares(contenders["regulariser"], device)


def _with(q, **changes): return _Request(**{**asdict(q), **changes})


def _shares(updates, device):
    "Share of an update's time in each piece of the loop."
    job, spent = updates.job, {}
    def clocked(name, function):
        def call(*args, **kwargs):
            if device.startswith("cuda"): torch.cuda.synchronize()
            start = time.perf_counter()
            try: return function(*args, **kwargs)
            finally:
                if device.startswith("cuda"): torch.cuda.synchronize()
                spent[name] = spent.get(name, 0.) + time.perf_counter() - start
        return call
    def pieces(batches):
        following = clocked("data", lambda: next(batches, None))
        while (batch := following()) is not None: yield batch
    at, a = job.loaders.train.at, job.accelerator
    where = [(job.task, "forward", "forward"), (job.tap, "maps", "regulariser"), (job.criterion, "forward", "regulariser"), (a, "backward", "backward"),
             (a, "clip_grad_norm_", "optimiser"), (job.optimizer, "step", "optimiser")]
    with ExitStack() as stack:
        for thing, what, name in where: stack.enter_context(patch.object(thing, what, clocked(name, getattr(thing, what))))
        stack.enter_context(patch.object(job.loaders.train, "at", lambda *place: pieces(iter(at(*place)))))
        start = time.perf_counter(); updates(); whole = time.perf_counter() - start
    return {**{k: v/whole for k, v in spent.items()}, "other": 1 - sum(spent.values())/whole}


def _peak(name, q, folder):
    "Peak of a contender in bytes while it trains, above what it had when it was built."
    status = lambda: Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    read = lambda key: next(int(line.split()[1]) for line in status() if line.startswith(key))*1024
    peaks = []
    def peak(call):
        before = read("VmRSS"); Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        call(); peaks.append(read("VmHWM") - before)
    if name == "timm": _beside_timm(_with(q, rounds=2), folder, folder + "/runs", peak)
    else: updates = _ours(name, q, folder, folder + "/runs"); peak(updates); peak(updates)
    return peaks[-1]                                                    # the first time, things are compiled and loaded


def _memory_child():
    "Read a request from stdin, write {name: bytes} as the last line of stdout; each contender trains in a fork."
    q = _Request(**json.load(sys.stdin))
    libc = ctypes.CDLL(None); libc.mallopt(-3, 1 << 16); libc.prctl(41, 1, 0, 0, 0)     # freed blocks go back at once; no rounding to 2 MiB pages
    importlib.import_module("torch._dynamo")                            # as the first step of an optimiser does: once, not in every fork
    names = (["timm"] if q.timm_train else []) + ["plain", "surgery", "regulariser"]
    with tempfile.TemporaryDirectory() as folder:
        _pictures(folder, q)
        print(json.dumps({name: in_fork(_peak, name, q, folder) for name in names}))


def _peaks(q):
    "Bytes by contender; {} where the kernel does not tell."
    if not Path("/proc/self/clear_refs").exists(): return {}
    return in_python("from training import _memory_child; _memory_child()", asdict(q))[0] or {}


def prepare_training_benchmark(output: str = "benchmark-results", quick: bool = False, **settings):
    "Check a request. Raises ValueError, TypeError or OSError in one sentence; returns (request, folder)."
    q = _Request(**{k: v for k, v in settings.items() if v is not None})
    if quick: q.rounds, q.updates = min(q.rounds, 2), min(q.updates, 2)
    for name in ("rounds", "updates", "batch_size", "img_size"):
        if getattr(q, name) < 1: raise ValueError(f"{name.replace('_', '-')}: got {getattr(q, name)}, expected at least 1")
    if q.timm_train: _script(q.timm_train); q.timm_train = str(q.timm_train)
    c = TrainConfig(model=q.model, model_kwargs=q.model_kwargs, img_size=q.img_size, amp_dtype=q.amp_dtype)
    try_forward(build_model(c, 10), c, 10, Accelerator(cpu=True))
    if q.data and not (Path(q.data)/"train").is_dir(): raise FileNotFoundError(f"data: {q.data}: expected an image folder with train/ and validation/")
    return q, checked_output(output)


def _summary(rounds, q):
    "Images a second, and ratios to plain of neighbours in a round."
    images, names = q.updates*q.batch_size, [n for n in ("timm", "plain", "plain again", "surgery", "regulariser") if n in rounds[0]]
    quartiles = lambda v: statistics.quantiles(v, n=4, method="inclusive") if len(v) > 1 else v*3
    one = lambda n: {clock: dict(images_per_s=images/statistics.median(r[n][clock] for r in rounds),
                                 to_plain=quartiles([r["plain"][clock]/r[n][clock] for r in rounds])) for clock in ("wall", "cpu")}
    found = {n: one(n) for n in names}
    if "timm" in names:
        for clock in ("wall", "cpu"): found["regulariser"][clock]["to_timm"] = quartiles([r["timm"][clock]/r["regulariser"][clock] for r in rounds])
    return found


def run_training_benchmark(request, folder, console=None, ready=lambda: None): # the report, as training.json holds it
    "Measure, write training.json and training.png, print the table. ready() is called when everything is compiled."
    console = console or Console(file=sys.stdout)                       # this one, whatever becomes of sys.stdout while the script runs
    with tempfile.TemporaryDirectory() as work:
        data = request.data or work + "/pictures"
        if not request.data: _pictures(data, request)
        rounds, shares = _turns(request, data, work + "/runs", lambda said: console.print(said, highlight=False, markup=False), ready)
    cuda = rounds[0]["plain"]["peak"] is not None
    peaks = {n: max(r[n]["peak"] for r in rounds) for n in rounds[0]} if cuda else _peaks(request)
    report = dict(request=asdict(request), machine={**machine_facts(torch.device("cuda" if cuda else "cpu")), "threads": torch.get_num_threads()},
                  clock="wall" if cuda else "cpu", contenders=_summary(rounds, request), shares=shares, peak_bytes=peaks, rounds=rounds)
    folder = fresh_folder(folder)
    report["request"].pop("timm_train"); write_json(folder/"training.json", report)
    write_whole(folder/"training.png", lambda p: draw_training(report).savefig(p, dpi=120))
    _print(report, console)
    console.print(f"written: {folder/'training.json'}, training.png", highlight=False, markup=False)
    return report

_clocks = {"cpu": "by CPU time", "wall": "by wall clock"} # of a CPU, where others may be at work; of a GPU, which is not a CPU's time


def _print(report, console):
    clock = report["clock"]
    t = Table("", "images/s", "images per CPU second", f"speed to plain, {_clocks[clock]}", "(quartiles)", "peak, MiB",
              title="{model}, {img_size} px, batch {batch_size}".format(**report["request"]))
    for name, c in report["contenders"].items():
        low, mid, high = c[clock]["to_plain"]
        peak = report["peak_bytes"].get(name)
        t.add_row(name, f"{c['wall']['images_per_s']:.1f}", f"{c['cpu']['images_per_s']:.1f}", f"{mid:.3f}", f"{low:.3f}–{high:.3f}",
                  f"{peak/2**20:.0f}" if peak else "–")
    console.print(t)
    if "to_timm" in report["contenders"]["regulariser"]["cpu"]:
        for clock, what in _clocks.items():
            low, mid, high = report["contenders"]["regulariser"][clock]["to_timm"]
            console.print(f"everything on, against timm's script: {mid:.3f}× its throughput ({low:.3f}–{high:.3f}), {what}", highlight=False, markup=False)


def draw_training(report):
    "Figure: throughput of the contenders against plain, and where an update's time goes."
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), dpi=90, layout="constrained")
    for k, c in enumerate(report["contenders"].values()):
        low, mid, high = c[report["clock"]]["to_plain"]
        left.errorbar(mid, k, xerr=[[mid - low], [high - mid]], fmt="o", color="C0")
    left.axvline(1, color="gray", lw=.5); left.set_yticks(range(len(report["contenders"])), list(report["contenders"]))
    left.set(title="throughput, to plain", ylim=(len(report["contenders"]) - .5, -.5))
    left.set_xlabel(_clocks[report["clock"]], fontsize=8)
    right.barh(list(report["shares"])[::-1], [100*v for v in report["shares"].values()][::-1]); right.set(title="share of an update's time, %")
    plt.close(fig)
    return fig


def parser():
    p = Parser("training.py", description="Measure our training loop, plain, with the surgery and with the regulariser, against timm's train.py, in turns.")
    p.add_argument("--timm-train", metavar="PATH", help="train.py of timm's repository, to measure it too")
    p.add_argument("--quick", action="store_true", help="two rounds of two updates")
    p.add_argument("--model", help="a timm model name (deit_tiny_patch16_224)")
    p.add_argument("--model-kwargs", nargs="+", type=pair, metavar="KEY=VALUE", help="arguments of timm.create_model")
    p.add_argument("--data", help="an image folder with train/ and validation/ (generated)")
    for flag, text in (("img-size", "pixels a side (128)"), ("batch-size", "pictures a step (32)"), ("updates", "of a contender in a round (4)"),
                       ("rounds", "that count (9)"), ("workers", "processes that load pictures (0)")): p.add_argument("--" + flag, type=int, help=text)
    p.add_argument("--amp-dtype", help="bfloat16 or float16 (none)")
    p.add_argument("--compile", nargs="?", const="inductor", metavar="NAME", help="compile the model")
    p.add_argument("--device", help="such as cpu (what accelerate finds)")
    p.add_argument("-o", "--output", default="benchmark-results", help="a folder; an existing one is kept, the new one gets a number (benchmark-results)")
    return p


def prepared(args):
    "Check the request; returns what does the work."
    settings = vars(args)
    settings["model_kwargs"] = once(settings["model_kwargs"] or [])
    request, folder = prepare_training_benchmark(**settings)

    def work(): run_training_benchmark(request, folder)
    return work


def main(argv=None):
    "0: done; 1: it had to stop; 2: the request was wrong."
    with lenient_output():
        return outcome("training.py", prepared, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
