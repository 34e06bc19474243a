"""Runs in forked children: started, killed, gone on with, compared. Everything slow is imported once, by the parent.

Of a run's seconds most go into matplotlib's drawings and into validating on a thousand pictures; these runs draw `quick` and validate on 40. Runs that
draw and validate as they are meant to: tests/test_commands.py, test_machines.py, test_torchrun in test_processes.py.
"""
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from spatial_entropy import SpatialEntropyLoss, label_regions
from spatial_entropy.data import shapes
from spatial_entropy.training import archives, files, jobs
from spatial_entropy.training import loop as training
from spatial_entropy.training.config import TrainConfig
from spatial_entropy.training.loop import resume, train
from spatial_entropy.training.models import load_weights
from spatial_entropy.training.progress import RunProgress
from spatial_entropy.training.sources import ShapeSource

processes = multiprocessing.get_context("fork")
# Everything that draws random numbers, and everything that has a state, is on.
everything = dict(limit=64, batch_size=8, epochs=2, model_kwargs=dict(depth=2, embed_dim=24, num_heads=2, patch_size=8), mixup=.8, cutmix=1.,
                  aa="rand-m5-mstd0.5", reprob=.3, color_jitter=.3, drop_path=.2, grad_accum_steps=2, model_ema=True, model_ema_decay=.9, smoothing=.1,
                  recovery_interval=1, entropy_weight=.1, entropy_warmup=0, warmup_epochs=1, picture_interval=2, layer_decay=.8, experiment="run",
                  device="cpu", img_size=32)
shapes(64, size=32).images, shapes(40, "val", 32).images    # drawn once, before the forks; and what else each child would load for itself:
SpatialEntropyLoss()(torch.rand(1, 1, 4, 4, requires_grad=True)).backward(), label_regions(torch.ones(1, 1, 4, 4) > 0)
jobs._versions()
with suppress(ImportError):
    import datasets  # noqa: F401


class Quick(Figure):
    "Stands for a drawing, of which matplotlib makes one a second: the same numbers, as grey pixels."
    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers

    def savefig(self, path, dpi=None, metadata=None):
        said = PngInfo()
        for k, v in (metadata or {}).items():
            said.add_text(k, v)
        grey = (self.numbers.double().flatten()[:4096] * 997).abs().remainder(256).byte()
        Image.frombytes("L", (len(grey), 1), bytes(grey.tolist())).save(path, "PNG", pnginfo=said)


def quick_maps(pixels, maps, names):
    return Quick(torch.cat([pixels.flatten()[:500], maps.flatten()]))


def quick_curves(rows):
    return Quick(torch.tensor([v for r in rows for k, v in r.items() if k not in ("seconds", "images_per_s")]))


@contextmanager
def quick():
    "Inside, runs draw grey pixels and validate on 40 of the shapes."
    few = lambda n, split, size, name: ShapeSource(40 if split == "val" else n, split, size, name)
    with patch.multiple(training, picture_of_maps=quick_maps, plot_metrics=quick_curves), patch.object(archives, "ShapeSource", few):
        yield


def _kill_at(point):
    "Kill this process (SIGKILL) at the n-th call of a function that writes."
    name, n = point
    where, what = {"sync": (files, "_push"), "state": (jobs, "seal"), "prune": (jobs, "_prune"), "write": (jobs, "_write_state")}[name]
    real, calls = getattr(where, what), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return patch.object(where, what, call)


def go(output, settings, point=None, rank=None, world=1, port=None, said=None, hook=None):
    "Start the run, or go on with it if its folder is there."
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    with open(said or os.devnull, "a", buffering=1) as out, ExitStack() as stack:
        stack.enter_context(quick())
        if point:
            stack.enter_context(_kill_at(point))
        if hook:
            stack.enter_context(hook())
        console, folder = Console(file=out, width=200), Path(output) / "run"
        try:
            run = resume(folder, console, False) if (folder / "config.yaml").exists() else train(TrainConfig(output=str(output), **settings), console, False)
        except Exception as e:
            console.print(f"{type(e).__name__}: {e}", highlight=False, markup=False, soft_wrap=True)
            os._exit(1)
        out.flush()
    os._exit(3 if run.stopped else 0)


def exit_codes(*children, seconds=200):
    "Wait for the children, but not for ever; their exit codes."
    until = time.monotonic() + seconds
    for child in children:
        child.join(max(until - time.monotonic(), 0))
    late = [child for child in children if child.is_alive()]
    for child in late:
        child.kill()
        child.join()
    assert not late, f"{len(late)} of {len(children)} process(es) still ran after {seconds} s, and were killed"
    return [child.exitcode for child in children]


def until(happened, *children, seconds=200):
    "Wait until something has happened, or one of the children has ended; fail when neither comes."
    end = time.monotonic() + seconds
    while not happened() and all(child.is_alive() for child in children):
        if time.monotonic() > end:
            for child in children:
                child.kill()
            raise AssertionError(f"nothing happened in {seconds} s; the process(es) that were waited for are killed")
        time.sleep(.01)


def slow():
    "A tenth of a second more for each update, so that what is to happen in the middle of a run does."
    real = RunProgress.update
    return patch.object(RunProgress, "update", lambda *args, **kwargs: (time.sleep(.1), real(*args, **kwargs))[1])


def start(output, settings=everything, **options):
    child = processes.Process(target=go, args=(output, settings), kwargs=options)
    child.start()
    return child


def whole(output, settings=everything, **options):
    "To the end, in one go."
    code, = exit_codes(start(output, settings, **options))
    assert code == 0, code
    return Path(output) / "run"


def forked(act, **environment):
    "Exit code, stdout and stderr of what a fork does, as of a program with other variables (None: without it), but whose imports are paid."
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        def child():
            torch.set_num_threads(1)
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = open(1, "w", encoding="utf-8", closefd=False), open(2, "w", encoding="utf-8", closefd=False)
            try:
                act()
            finally:
                sys.stdout.flush()

        process = processes.Process(target=child)
        process.start()
        code, = exit_codes(process)
        return code, *((f.seek(0), f.read())[1] for f in (out, err))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def pair(output, settings=everything, points=(None, None), said=(None, None), hook=None):
    "Two gloo processes."
    port = free_port()
    return [start(output, settings, rank=r, world=2, port=port, point=points[r], said=said[r], hook=hook) for r in range(2)]


def state(run):
    "Everything that a run ends with: weights, averaged weights, optimiser, place."
    last = jobs.checkpoints(run)[-1]
    ours = torch.load(last / "place.pt", weights_only=True)
    optimizer = torch.load(last / "optimizer.bin", weights_only=True)
    for row in ours["place"]["rows"]:
        row.pop("seconds"), row.pop("images_per_s")
    return dict(saved=load_weights(run / "model.safetensors"), trained=load_weights(last / "model.safetensors"), optimizer=optimizer["state"], ours=ours)


def assert_same(a, b, where=""):
    "Bit for bit."
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{k}]")
    else:
        assert a == b, (where, a, b)
