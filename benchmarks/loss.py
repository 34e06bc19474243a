"""The loss, forward and backward, beside every tool that one would otherwise pick; explained in nbs/90_loss_benchmark.ipynb.

    python benchmarks/loss.py [--quick] [--authors-code PATH] [-o FOLDER]

Takes about three minutes; --quick half a minute. `--help` lists the flags.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from torch._dynamo.utils import counters
from torch.nn import functional as F

import spatial_entropy
from spatial_entropy.attention.surgery import drop_last_skip
from spatial_entropy.attention.tap import AttentionTap
from spatial_entropy.commands import Parser, lenient_output, outcome
from spatial_entropy.measure.entropy import clear_entropy
from spatial_entropy.measure.operators import SpatialEntropyLoss, backend
from spatial_entropy.pictures import Drawing
from spatial_entropy.training.files import write_json, write_whole

LOADS = ((64, 6, 14, 14), (256, 6, 14, 14), (256, 12, 14, 14), (64, 12, 37, 37), (8, 16, 64, 64), (2, 16, 128, 128)) # (B, H, h, w)
CLASSIC = LOADS[1]


def load_from(text):
    "'256x6x14' or '256x6x14x20' as (B, H, h, w)."
    try: sizes = [int(n) for n in re.split("[x×·*]", str(text).replace("²", ""))]
    except ValueError: sizes = []
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise ValueError(f"shapes: got {text!r}, expected images x heads x side, such as 256x6x14, or images x heads x height x width")
    sizes += sizes[-1:]*(4 - len(sizes))
    if np.prod(sizes, dtype=float) > 2**27: raise ValueError(f"shapes: got {text!r}, more than 2^27 cells; choose fewer images")
    return tuple(sizes)


def load_name(shape):
    "The load as tables name it: 256·6·14²."
    B, H, h, w = shape
    return f"{B}·{H}·" + (f"{h}²" if h == w else f"{h}×{w}")


def _smooth(x, # (M, h, w)
            sigma): # in cells
    "Gaussian smoothing, the picture mirrored at its border."
    for _ in range(2):
        r = min(int(4*sigma), x.shape[-1] - 1)
        window = torch.exp(-torch.arange(-r, r + 1)**2/(2*sigma**2))
        x = F.conv1d(F.pad(x, (r, r), mode="reflect").flatten(0, 1)[:, None], window[None, None]/window.sum()).view_as(x).mT
    return x


def _blob(M, h, w, rng):
    "One bump at a random place, an eighth to a quarter of the side wide."
    y, x, width = torch.rand(3, M, 1, 1, generator=rng)
    rows, columns = torch.arange(h).view(1, h, 1) - y*(h - 1), torch.arange(w) - x*(w - 1)
    return torch.exp(-(rows**2 + columns**2)/(2*((1 + width)*max(h, w)/8)**2))


def _spiral(h, w):
    "A one-cell-wide way inwards from the corner, as (h, w) bool."
    on = np.zeros((h, w), bool)
    y = x = dy = turns = 0; dx = 1; on[0, 0] = True
    while turns < 2:
        ahead, beyond = (y + dy, x + dx), (y + 2*dy, x + 2*dx)
        inside = [0 <= a < h and 0 <= b < w for a, b in (ahead, beyond)]
        if not inside[0] or on[ahead] or inside[1] and on[beyond]: dy, dx, turns = dx, -dy, turns + 1
        else: (y, x), turns = ahead, 0; on[ahead] = True
    return torch.from_numpy(on)


def _serpentine(h, w):
    "Every second row, joined at alternating ends, as (h, w) bool."
    on = torch.zeros(h, w, dtype=torch.bool)
    on[::2] = True; on[1::4, -1] = True; on[3::4, 0] = True
    return on


def _dots(h, w):
    on = torch.zeros(h, w, dtype=torch.bool)
    on[::2, ::2] = True
    return on


def _mix(M, h, w, rng):
    x = torch.randn(M, h, w, generator=rng)
    a, b, c = 2*M//5, 3*M//5, 4*M//5
    x[:a], x[a:b], x[c:] = _smooth(x[:a], 1), _smooth(x[a:b], 2), _blob(M - c, h, w, rng)
    return x[torch.randperm(M, generator=rng)]


def _drawn(mask): return lambda M, h, w, rng: mask(h, w) + torch.rand(M, h, w, generator=rng)/4

KINDS = dict(mix=_mix, white=lambda M, h, w, rng: torch.randn(M, h, w, generator=rng),
              s1=lambda M, h, w, rng: _smooth(torch.randn(M, h, w, generator=rng), 1),
              s2=lambda M, h, w, rng: _smooth(torch.randn(M, h, w, generator=rng), 2), blob=_blob,
              dots=_drawn(_dots), spiral=_drawn(_spiral), serpentine=_drawn(_serpentine),
              constant=lambda M, h, w, rng: torch.rand(M, 1, 1, generator=rng).expand(M, h, w), broken=_mix)


def make_maps(kind: str, # one of KINDS
              shape: tuple, # (B, H, h, w)
              seed: int = 0,
              dtype=torch.float32,
             ) -> torch.Tensor: # (B, H, h, w) on the CPU
    "Seeded maps of one kind, centred, with no cell within rounding of its map's mean."
    B, H, h, w = shape
    rng = torch.Generator().manual_seed(seed)
    x = KINDS[kind](B*H, h, w, rng).contiguous()
    if kind != "constant":
        x = x - x.mean((-2, -1), keepdim=True)
        margin = 1e-3*x.std((-2, -1), keepdim=True, correction=0)
        x = torch.where(x.abs() < margin, torch.where(x < 0, -margin, margin), x)
    if kind == "broken":
        x[::16, h//2, w//2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(len(x))[:len(x[::16])]
    return x.view(shape).to(dtype)


def labelled_loss(maps, # (B, H, h, w)
                  label): # (M, h, w) bool -> labels (M, h, w) int64, different from map to map, and their number of slots
    "Mean entropy in nats, with labels from a peer and the gradient from autograd."
    s = maps.flatten(0, -3).float()
    a = (s - s.mean((-2, -1), keepdim=True)).relu()
    with torch.no_grad(): labels, slots = label(a > 0)
    A = a.sum((-2, -1), keepdim=True)
    p = a/torch.where(A > 0, A, 1)
    P = p.new_zeros(slots).scatter_add(0, labels.flatten(), p.flatten())
    return -(P*P.clamp_min(torch.finfo(P.dtype).tiny).log()).sum()/len(s)


def map_by_map(label_picture): # (h, w) uint8 -> labels (h, w), number of regions
    "A labeller of batches that calls once per map."
    def label(mask):
        on = mask.cpu().numpy().view(np.uint8)
        labels, last = np.empty(on.shape, np.int64), 0
        for i, picture in enumerate(on):
            own, n = label_picture(picture)
            labels[i] = own; labels[i] += last; last += n + 1
        return torch.from_numpy(labels).to(mask.device), last
    return label


def in_one_strip(label_picture):
    "A labeller of batches that calls once, on all maps in one strip."
    def label(mask):
        M, h, w = mask.shape
        strip = np.zeros((M, h + 1, w), np.uint8)
        strip[:, :h] = mask.cpu().numpy()
        labels, n = label_picture(strip.reshape(-1, w))
        return torch.from_numpy(labels.reshape(M, h + 1, w)[:, :h].astype(np.int64)).to(mask.device), n + 1
    return label


def scipy_labeller(ndimage):
    "SciPy's way to label one picture."
    return lambda x: ndimage.label(x, np.ones((3, 3)), np.int32)
def _skimage(measure): return lambda x: measure.label(x, return_num=True, connectivity=2)
def _cc3d(cc3d): return lambda x: cc3d.connected_components(x, connectivity=8, return_N=True)


def _opencv(cv2):
    def label_picture(x):
        n, labels = cv2.connectedComponents(x, connectivity=8, ltype=cv2.CV_32S)
        return labels, n - 1
    return label_picture


def _pooling(contrib): return lambda mask: (contrib.connected_components(mask[:, None].float())[:, 0], mask.numel() + 1)
def _union_find(contrib): return lambda mask: (contrib.connected_components_union_find(mask[:, None])[:, 0], mask.numel() + 1)

_PEERS = {"scipy loop": ("scipy.ndimage", lambda m: map_by_map(scipy_labeller(m))), "scipy strip": ("scipy.ndimage", lambda m: in_one_strip(scipy_labeller(m))),
          "opencv loop": ("cv2", lambda m: map_by_map(_opencv(m))), "opencv strip": ("cv2", lambda m: in_one_strip(_opencv(m))),
          "cc3d loop": ("cc3d", lambda m: map_by_map(_cc3d(m))), "cc3d strip": ("cc3d", lambda m: in_one_strip(_cc3d(m))),
          "skimage loop": ("skimage.measure", lambda m: map_by_map(_skimage(m))), "skimage strip": ("skimage.measure", lambda m: in_one_strip(_skimage(m))),
          "kornia pooling": ("kornia.contrib", _pooling), "kornia union-find": ("kornia.contrib", _union_find)}
CONTENDERS = ("ours", "clear", "authors", *_PEERS)


def import_peer(module):
    "The module; ImportError says in a few words why not."
    if importlib.util.find_spec(module.split(".")[0]) is None: raise ImportError(module.split(".")[0])
    return importlib.import_module(module)

_SQUARE = re.compile(r"reshape\(\s*14\s*,\s*14\s*\)")


def read_authors(path: str # their checkout, or attention_losses.py itself
                ) -> str: # the source
    "Their loss as text. Raises FileNotFoundError or ValueError that say what was expected."
    file = Path(path)/"attention_losses.py" if Path(path).is_dir() else Path(path)
    expected = "expected a checkout of github.com/helia95/SAR, with attention_losses.py in it"
    if not file.is_file(): raise FileNotFoundError(f"authors-code: {file}: no such file; {expected}")
    source = file.read_text(encoding="utf-8-sig", errors="replace")
    if "class BlobLoss" not in source or not _SQUARE.search(source):
        raise ValueError(f"authors-code: {file} has no class BlobLoss with a 14×14 grid; {expected}")
    return source


def _authors(source, shape):
    "Their BlobLoss for h×w grids."
    for needed in ("cv2", "timm"): import_peer(needed)
    module = types.ModuleType("authors_losses")
    exec(compile(_SQUARE.sub("reshape({}, {})".format(*shape[-2:]), source), "attention_losses.py", "exec"), module.__dict__)
    return module.BlobLoss()


@dataclass
class _Contender:
    call: Callable # leaf -> value (), gradient like the leaf
    leaf: Callable = lambda maps: maps.detach().clone().requires_grad_() # maps -> what the call takes
    grad: Callable = lambda g: g # the gradient in the shape of the maps


def differentiated(loss, maps_of=lambda leaf: leaf.shape[0]*leaf.shape[1]):
    "The loss as a call that gives its value and its gradient."
    def call(leaf):
        value = loss(leaf)
        if value is None: raise FloatingPointError("the loss returned None")
        return value, torch.autograd.grad(value, leaf, torch.full_like(value, maps_of(leaf)))[0]
    return call


def _clear(leaf):
    E, g = clear_entropy(leaf.detach().flatten(0, 1).float())
    return E.nanmean(), (g*(len(E)/E.isfinite().sum())).view_as(leaf)


def make_contender(name, shape, source=None, device="cpu"): # source: the authors' code
    "What `name` does to maps of this shape. Raises ImportError when it is not there."
    if name == "ours": return _Contender(differentiated(SpatialEntropyLoss().to(device)))
    if name == "clear": return _Contender(_clear)
    if name == "authors":
        if source is None: raise ImportError("pass --authors-code PATH, a checkout of github.com/helia95/SAR")
        loss = _authors(source, shape)
        return _Contender(differentiated(lambda row: loss({"dot_qk": row})),
                          lambda maps: F.pad(maps.detach().flatten(2)[:, :, None], (1, 0)).requires_grad_(), lambda g: g[:, :, 0, 1:].reshape(shape))
    module, make = _PEERS[name]
    label = make(import_peer(module))
    return _Contender(differentiated(lambda maps: labelled_loss(maps, label)))


def difference_said(value, gradient, # of the contender
                    expected, slope, # ours
                    dtype): # of the maps
    "What is wrong, in a few words; None when they agree."
    allowed = max(1e-3, 4*torch.finfo(dtype).eps)
    off = abs(value.item() - expected.item())
    norm = slope.double().norm().item()
    bend = (gradient.double() - slope.double()).norm().item()/(norm or 1)
    if not off <= (1e-4 if dtype == torch.float32 else allowed): return f"entropy {value.item():.5g} instead of {expected.item():.5g}"
    if not bend <= allowed: return f"gradient off by {100*bend:.2g} %" if norm else f"gradient of norm {bend:.2g} instead of 0"


def check_contender(name, maps, ours, source):
    "(contender or None, facts): facts says 'ok', 'wrong', 'failed' or 'not installed', with a note on why."
    try: contender = make_contender(name, tuple(maps.shape), source, maps.device)
    except ImportError as e: return None, dict(status="not installed", note=str(e))
    try: leaf = contender.leaf(maps); value, g = contender.call(leaf)
    except Exception as e: return None, dict(status="failed", note=f"{type(e).__name__}: {' '.join(str(e).split())[:90]}")
    wrong = difference_said(value.float(), contender.grad(g), *ours, maps.dtype)
    return (None, dict(status="wrong", note=wrong)) if wrong else (lambda: contender.call(leaf), dict(status="ok"))

_SLOW = .3 # seconds a call, from which one repeat must do


def interleave(calls: dict, # name -> function of nothing
               timed: Callable, # function -> seconds that it took
               budget: float, # seconds, shared equally
               repeats: int = 31, # at most
              ) -> dict: # name -> list of seconds
    "Time the calls, one repeat of each in turn, until each has spent its share."
    times, spent = {name: [] for name in calls}, dict.fromkeys(calls, 0.)
    def hungry(name):
        n, share = len(times[name]), budget/len(calls)
        least = 1 if n and times[name][0] > _SLOW else 3
        return n < repeats and (n < least or spent[name]*(n + 1)/n <= share)
    while waiting := [name for name in calls if hungry(name)]:
        for name in waiting:
            began = time.perf_counter()
            times[name].append(timed(calls[name]))
            spent[name] += time.perf_counter() - began
    return times


def cpu_time(call):
    "Seconds of this process's processor time."
    began = time.process_time()
    call()
    return time.process_time() - began


def wall_time(call):
    "Seconds on the clock."
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _cuda_time(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(); start.record(); call(); end.record(); torch.cuda.synchronize()
    return start.elapsed_time(end)/1000


def _set_threads(n):
    "The same number of threads for torch, numba and OpenCV, where they are loaded; scipy, skimage and cc3d have one."
    if numba := sys.modules.get("numba"): numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    if cv2 := sys.modules.get("cv2"): cv2.setNumThreads(n)
    torch.set_num_threads(n)               # last: numba's first call gives OpenMP, and so torch, as many threads as there are cores


def _high_water(): # bytes
    return 1024*int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])


def _rise(call): # bytes
    "The highest mark during a call, above what there was before."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")     # sets the mark to the present use
    before = _high_water()
    kept = call()                                                       # noqa: F841 (the result is part of the use)
    return _high_water() - before


def peak_extra(call): # bytes
    "The most of three calls, of one where a call is slow. The very first loads what is loaded once."
    slow = wall_time(call) > _SLOW
    return max(_rise(call) for _ in range(1 if slow else 3))


def _cuda_peak_extra(call):
    call(); torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call(); torch.cuda.synchronize()                             # noqa: F841
    return torch.cuda.max_memory_allocated() - before


def in_fork(measure, *arguments, seconds=1800):
    """measure(…) -> int in a copy of this process with one thread, so that nobody finds holes that another has left; None when it died or is late.

    For a process that does nothing else, as `in_python` starts: a lock that another thread holds in this moment stays closed in the copy for ever.
    """
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            _set_threads(1)                # OpenMP's other threads stay behind, and an operation on two would wait for them for ever
            os.write(write, str(measure(*arguments)).encode())
        finally: os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as answer:
        if not select.select([answer], [], [], seconds)[0]: os.kill(pid, signal.SIGKILL)
        said = answer.read()
    os.waitpid(pid, 0)
    return int(said) if said else None


def in_python(code, asked=None):
    "(the last line that the code prints, read as JSON; None), from a process of its own that finds these modules and reads `asked`; or (None, why not)."
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}"
    child = subprocess.run([sys.executable, "-c", code], input=json.dumps(asked), capture_output=True, encoding="utf-8", errors="replace")
    if child.returncode: return None, (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    return json.loads(child.stdout.splitlines()[-1]), None


def _peak_of(name, maps, source):
    contender = make_contender(name, tuple(maps.shape), source)
    leaf = contender.leaf(maps)
    return peak_extra(lambda: contender.call(leaf))


def give_back_at_once():
    "This process hands freed memory back, and counts no more than it uses. For its whole life."
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)              # M_MMAP_THRESHOLD: freed blocks go back at once
    libc.prctl(41, 1, 0, 0, 0)             # PR_SET_THP_DISABLE: no rounding up to 2 MiB pages
    _set_threads(1)


def _memory_child():
    "Read a request from stdin, write [{name: bytes}], one for each case, as the last line of stdout."
    asked = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    give_back_at_once()
    for shape, _, names in asked["cases"]:
        for name in names: make_contender(name, tuple(shape), asked["source"])          # loads what the forks will share
    _set_threads(1)                        # of what has been loaded since, too
    SpatialEntropyLoss()(torch.rand(1, 1, 4, 4, requires_grad=True))    # compiled once; a backward pass here would forbid forks
    gc.collect(); gc.freeze()
    peaks = []
    for shape, kind, names in asked["cases"]:
        maps = make_maps(kind, shape, dtype=getattr(torch, asked["dtype"]))
        peaks.append({name: in_fork(_peak_of, name, maps, asked["source"]) for name in names})
    print(json.dumps(peaks))


def measure_memory(cases, dtype, source): # cases: (shape, kind, names)
    "([{name: bytes}], why not) of the cases, from a child process."
    if not Path("/proc/self/clear_refs").exists(): return [{} for _ in cases], "needs Linux"
    peaks, trouble = in_python("from loss import _memory_child; _memory_child()", dict(cases=cases, dtype=dtype, source=source))
    return ([{} for _ in cases] if trouble else peaks), trouble


def recorded(call, calls=1):
    "(a CUDA graph of so many calls, what the last one gave)."
    side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls): kept = call()
    return graph, kept


def _replay_seconds(call, replays=100, rounds=5):
    "Seconds a replay of the recorded call."
    graph, kept = recorded(call)                                         # what it gave lives as long as the graph
    return median(_cuda_time(lambda: [graph.replay() for _ in range(replays)]) for _ in range(rounds))/replays


def _synchronisations(call):
    "How often the call makes the host wait."
    call(); torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said: warnings.simplefilter("always"); call()
    finally: torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


def gpu_facts(call): # of our loss
    "Replay time and synchronisations; a call that cannot be recorded says why."
    facts = dict(synchronisations=_synchronisations(call))
    try: return facts | dict(replay_ms=1000*_replay_seconds(call))
    except RuntimeError as e: return facts | dict(replay="not recordable: " + str(e).splitlines()[0][:90])


def _stepper(kind, device, batch, model): # "without", "tap" or "with" the regulariser -> a function that does one step
    "One training step of a timm model: forward, cross-entropy (and the maps' mean, or the regulariser), backward, AdamW."
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    net = timm.create_model(model).to(device).train()
    drop_last_skip(net)
    tap, loss = AttentionTap(net) if kind != "without" else None, SpatialEntropyLoss().to(device) if kind == "with" else torch.mean
    run = torch.compile(net) if cuda else net
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=cuda)
    x, y = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)
    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda): total = F.cross_entropy(run(x), y)
        if tap is not None: total = total + .01*loss(tap.maps())
        total.backward(); optimizer.step(); optimizer.zero_grad()
    return step


def _new_graphs(step):
    "How many graphs the compiler made of the model in its first step: one, where nothing cuts it."
    before = counters["stats"]["unique_graphs"]
    step()
    return counters["stats"]["unique_graphs"] - before


def measure_step(device: torch.device,
                 batch: int | None = None, # 256 on a GPU, 2 elsewhere
                 model="deit_small_patch16_224",
                 rounds=15, steps=None, # steps in a round: 10 on a GPU, 1 elsewhere
                 ready: Callable = lambda: None, # called when everything is compiled and warm
                ) -> dict: # ms a step without, with the tap, and with the regulariser, and what they add in %
    "What tap and regulariser add to a training step, measured in pairs; on a CPU in one thread's time."
    cuda = device.type == "cuda"
    batch, steps, timed = batch or (256 if cuda else 2), steps or (10 if cuda else 1), _cuda_time if cuda else cpu_time
    threads = torch.get_num_threads()
    try:
        if not cuda: _set_threads(1)
        calls = {kind: _stepper(kind, device, batch, model) for kind in ("without", "tap", "with")}
        graphs = {kind: _new_graphs(step) for kind, step in calls.items()}
        for _ in range(2 if cuda else 0): [step() for step in calls.values()]
        ready()
        times = interleave(calls, lambda step: timed(lambda: [step() for _ in range(steps)])/steps, 1e9, rounds)
    finally: _set_threads(threads)
    facts = {f"{name}_ms": 1000*median(t) for name, t in times.items()}
    for name in ("tap", "with"): facts[f"{name}_adds_percent"] = 100*(median(b/a for a, b in zip(times["without"], times[name])) - 1)
    facts["noise_percent"] = 100*median(abs(b/a - 1) for a, b in zip(times["without"], times["without"][1:]))
    facts |= dict(batch=batch, model=model, rounds=rounds, compiled=cuda, dtype="bfloat16" if cuda else "float32")
    return facts | (dict(synchronisations={name: _synchronisations(step) for name, step in calls.items()}, graphs=graphs) if cuda else {})

_PACKAGES = ("torch", "numba", "triton", "numpy", "timm", "scipy", "scikit-image", "connected-components-3d", "kornia", "opencv-python-headless")


def version_of(package):
    "Its version, or None where it is not installed."
    for name in (package, package.removesuffix("-headless")):
        try: return version(name)
        except PackageNotFoundError: pass


def _commit():
    "(commit, whether it has changes) of the checkout that the package is imported from; (None, None) otherwise."
    file = Path(spatial_entropy.__file__)
    def git(*words):
        said = subprocess.run(["git", "-C", str(file.parent), *words], capture_output=True, check=True)
        return said.stdout.decode("utf-8", "replace").strip()
    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError): return None, None


def _cpu_model():
    try: return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))[1]
    except (OSError, TypeError): return platform.processor() or platform.machine()


def machine_facts(device):
    commit, dirty = _commit()
    return dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", cpu=_cpu_model(), cores=_cores(), system=platform.system(),
                backend=backend(device), python=platform.python_version(), versions={name: version_of(name) for name in _PACKAGES},
                commit=commit, dirty=dirty)


def _cores(): return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass
class _Job:
    "A checked request."
    cases: list # ((B, H, h, w), kind, threads)
    names: list # contenders, "ours" and "clear" first
    device: torch.device
    dtype: torch.dtype
    repeats: int # at most
    budget: float # seconds of timing, in all
    source: str | None # the authors' code
    memory: bool
    step: bool
    output: Path
    arguments: dict # as given


def _one_of(argument, got, known):
    unknown = [str(g) for g in got if g not in known]
    if unknown or not got: raise ValueError(f"{argument}: got {', '.join(unknown) or 'nothing'}, expected some of {', '.join(known)}")
    return list(got)


def chosen_peers(peers):
    "'scipy' means both of its ways, 'scipy-loop' one of them."
    rest = [n for n in CONTENDERS if n not in ("ours", "clear")]
    if peers is None: return ["ours", "clear", *rest]
    known = {w: [n for n in rest if n.replace(" ", "-") == w or n.split()[0] == w] for n in rest for w in (n.split()[0], n.replace(" ", "-"))}
    asked = sum((known[p] for p in _one_of("peers", [str(p).replace(" ", "-") for p in peers], known)), [])
    return ["ours", "clear", *dict.fromkeys(asked)]


def _cases(shapes, kinds, threads, quick):
    "((B, H, h, w), kind, threads): what is named, or the default set; several threads only on mix, by default on two loads."
    loads = [load_from(s) for s in shapes] if shapes else None
    kinds = _one_of("kinds", kinds, list(KINDS)) if kinds else None
    if loads or kinds: pairs = [(load, kind) for kind in kinds or ["mix"] for load in loads or [CLASSIC]]
    elif quick: pairs = [(LOADS[0], kind) for kind in ("mix", "dots", "spiral")]
    else: pairs = [(load, "mix") for load in LOADS] + [(CLASSIC, kind) for kind in KINDS if kind != "mix"]
    pairs = list(dict.fromkeys(pairs))
    wide = [p for p in pairs if p[1] == "mix" and (shapes or p[0] in (CLASSIC, LOADS[3]))]
    return [(*p, 1) for p in pairs] + [(*p, n) for n in threads if n > 1 for p in wide]


def _whole(argument, number, least=1):
    if not (isinstance(number, int) and number >= least): raise ValueError(f"{argument}: got {number!r}, expected a whole number from {least}")
    return number


def _checked_device(name):
    try: return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as e: raise ValueError(f"device: got {name!r}, which torch refuses ({str(e).splitlines()[0]})") from None


def prepare_benchmark(shapes: list[str] | None = None, # such as 256x6x14; default: six loads
                      kinds: list[str] | None = None, # such as mix, spiral; default: all
                      peers: list[str] | None = None, # such as scipy, opencv-strip; default: all
                      repeats: int = 31, # of each contender, at most
                      threads: int | None = None, # measured beside one thread; default: all cores
                      device: str = "cpu",
                      dtype: str = "float32", # or float16, bfloat16
                      authors_code: str | None = None, # a checkout of the authors' repository
                      quick: bool = False, # one small load, half a minute
                      step: bool | None = None, # measure a training step too; default: on a GPU
                      budget: float | None = None, # seconds of timing; default: 35, quick 6
                      output: str = "benchmark-results", # a folder; an existing one is left alone
                     ) -> _Job:
    "Check a request. Raises ValueError or OSError in one sentence, before anything is measured or written."
    place = _checked_device(device)
    _one_of("dtype", [dtype], ["float32", "float16", "bfloat16"])
    many = [] if place.type == "cuda" or quick and threads is None else [_whole("threads", _cores() if threads is None else threads)]
    budget = (6. if quick else 35.) if budget is None else budget
    if not 0 <= budget < float("inf"): raise ValueError(f"budget: got {budget!r}, expected seconds")
    arguments = dict(shapes=shapes, kinds=kinds, peers=peers, repeats=repeats, threads=threads, device=device, dtype=dtype,
                     authors_code=bool(authors_code), quick=quick, step=step, budget=budget)
    return _Job(_cases(shapes, kinds, many, quick), chosen_peers(peers), place, getattr(torch, dtype), _whole("repeats", repeats), budget,
                        read_authors(authors_code) if authors_code else None, not quick, place.type == "cuda" if step is None else step,
                        checked_output(output), arguments)


def checked_output(output):
    "The folder's path, when it can be made."
    folder = Path(output)
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK): raise OSError(f"output: no folder can be made in {above}; choose another --output")
    if folder.exists() and not folder.is_dir(): raise OSError(f"output: {folder} is a file; choose another --output")
    return folder


def fresh_folder(folder):
    "The folder, or its name with the first free number; never one that exists."
    for k in count(1):
        path = folder if k == 1 else folder.with_name(f"{folder.name}-{k}")
        try: path.mkdir(parents=True); return path
        except FileExistsError: continue


def _weight(shape, kind, threads): return 4 if (shape, kind, threads) == (CLASSIC, "mix", 1) else 1


def _measure_case(job, shape, kind, threads):
    "Facts of every contender on one load and kind."
    _set_threads(threads)
    maps = make_maps(kind, shape, dtype=job.dtype).to(job.device)
    ours = make_contender("ours", shape, None, job.device)
    value, g = ours.call(ours.leaf(maps))
    _set_threads(threads)                                               # again, for what the first call has loaded
    checked = {name: check_contender(name, maps, (value.float(), g), job.source) for name in job.names}
    _set_threads(threads)
    timed = _cuda_time if job.device.type == "cuda" else cpu_time if threads == 1 else wall_time
    calls = {name: call for name, (call, _) in checked.items() if call}
    times = interleave(calls, timed, job.budget*_weight(shape, kind, threads)/sum(_weight(*case) for case in job.cases), job.repeats)
    facts = {name: dict(known) for name, (_, known) in checked.items()}
    for name, t in times.items():
        facts[name] |= dict(ms=1000*median(t), lowest=1000*min(t), highest=1000*max(t), repeats=len(t), ratio=median(t)/median(times["ours"]))
    if job.device.type == "cuda":
        for name, call in calls.items(): facts[name]["memory"] = _cuda_peak_extra(call)/(maps.numel()*maps.element_size())
        facts["ours"] |= gpu_facts(calls["ours"])
    if "ms" in facts.get("authors", {}) and shape[-2:] != (14, 14): facts["authors"]["note"] = "measured with its 14×14 replaced in memory"
    return facts


def _add_memory(job, results):
    "Add the peak extra memory, in inputs, to the facts. Returns why it could not be measured, or None."
    each_grid = {(r["kind"], *r["shape"][2:]): r for r in results if r["kind"] in ("mix", "dots") and r["threads"] == 1}
    wanted = list(each_grid.values())
    names = [[n for n, f in r["contenders"].items() if f.get("ms", 1e9) < 4000] for r in wanted]
    dtype = str(job.dtype).removeprefix("torch.")
    peaks, trouble = measure_memory([(r["shape"], r["kind"], n) for r, n in zip(wanted, names)], dtype, job.source)
    for r, peak in zip(wanted, peaks):
        for name, extra in peak.items():
            if extra is not None: r["contenders"][name]["memory"] = extra/(np.prod(r["shape"])*job.dtype.itemsize)
    return trouble


def _growth(results):
    "{contender: how much dearer a cell of the largest grid is than one of the smallest}, on mix, one thread."
    mix = sorted((r for r in results if r["kind"] == "mix" and r["threads"] == 1), key=lambda r: (np.prod(r["shape"][-2:]), np.prod(r["shape"])))
    small = next((r for r in mix if tuple(r["shape"]) == CLASSIC), mix[0] if mix else None)
    if not mix or small["shape"][-2:] == mix[-1]["shape"][-2:]: return {}
    cost = [{n: f["ms"]/np.prod(r["shape"]) for n, f in r["contenders"].items() if "ms" in f} for r in (small, mix[-1])]
    return {n: float(cost[1][n]/cost[0][n]) for n in cost[0] if n in cost[1]} | dict(grids=[small["shape"][-2:], mix[-1]["shape"][-2:]])


def _tidy(x):
    "Numbers with four digits; a file of results is read by people too."
    if isinstance(x, dict): return {k: _tidy(v) for k, v in x.items()}
    if isinstance(x, list | tuple): return [_tidy(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def _measure_all(job, say):
    results, threads = [], torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # of broken maps, and of what the authors' code uses
            for shape, kind, n in job.cases:
                say(f"{load_name(shape)} {kind}, {n} thread{'s'*(n > 1)} …")
                results.append(dict(load=load_name(shape), shape=list(shape), kind=kind, threads=n, contenders=_measure_case(job, shape, kind, n)))
    finally: _set_threads(threads)
    return results


def _measure_report(job, say):
    "Everything there is to tell, as a dict for JSON."
    began = time.perf_counter()
    report = dict(date=datetime.now().astimezone().isoformat(timespec="seconds"), arguments=job.arguments, machine=machine_facts(job.device))
    report["clock"] = "CUDA events" if job.device.type == "cuda" else "process CPU time with one thread, wall time with several"
    results = _measure_all(job, say)
    if job.memory and job.device.type == "cpu": say("memory …"); report["memory_not_measured"] = _add_memory(job, results)
    report |= dict(growth=_growth(results), results=results)
    if job.step: say("training step …"); report["step"] = measure_step(job.device)
    return _tidy(report | dict(took_seconds=time.perf_counter() - began))


def run_benchmark(job: _Job,
                  say: Callable = lambda line: print(line, flush=True), # where progress goes
                 ) -> Path: # the folder with benchmark.json and benchmark.png
    "Measure, print the tables, and write the report into a new folder."
    report = _measure_report(job, say)
    folder = fresh_folder(job.output)
    write_json(folder/"benchmark.json", report)
    write_whole(folder/"benchmark.png", lambda path: draw_benchmark(report).savefig(path, format="png", dpi=150))
    print_report(report)
    print(f"report: {folder/'benchmark.json'}   picture: {folder/'benchmark.png'}")
    return folder


def _cell(facts, name):
    "'2.1 ms' for ours, '29.3×' for others, the repeats in brackets where they are few; or a word."
    if "ms" not in facts: return facts["status"]
    few = f" ({facts['repeats']})" if facts["repeats"] < 10 else ""
    if name == "ours": return f"{facts['ms']:.3g} ms" + few
    return (f"{facts['ratio']:.3g}×" if facts["ratio"] < 1000 else f"{facts['ratio']:,.0f}×") + few


def _table(results, title, show): # show(facts, name) -> text
    "A rich table: a row a contender, a column a case."
    from rich.table import Table
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for r in results: table.add_column(r["load"] if r["kind"] == "mix" else f"{r['kind']}\n{r['load']}", justify="right")
    for name in results[0]["contenders"]: table.add_row(name, *(show(r["contenders"][name], name) for r in results))
    return table


def _memory_cell(facts, name): return f"{facts['memory']:.1f}" if "memory" in facts else facts["status"] if facts["status"] != "ok" else "–"


def notes_of(results):
    "Lines such as 'scipy loop, cc3d loop wrong: gradient off by 3 % (256·6·14² spiral)': every reason once."
    names, cases = {}, {}
    for r in results:
        for name, facts in r["contenders"].items():
            if "note" in facts: names.setdefault((facts["status"], facts["note"], f"{r['load']} {r['kind']}"), {})[name] = None
    for (status, note, case), who in names.items(): cases.setdefault((", ".join(who), status, note), []).append(case)
    lines = [(f"{who}{'' if status == 'ok' else f' {status}'}: {note}", where) for (who, status, note), where in cases.items()]
    return [line + (f" ({', '.join(where)})" if len(where) < 6 else "") for line, where in lines]


def print_report(report: dict, # as benchmark.json holds it
                 ):
    "Print the tables, the notes and the machine."
    from rich.console import Console
    screen = Console(width=max(100, Console().width), highlight=False, force_jupyter=False)
    for threads in sorted({r["threads"] for r in report["results"]}):
        rows = [r for r in report["results"] if r["threads"] == threads]
        loads, rest = ([r for r in rows if (r["kind"] == "mix") == is_mix] for is_mix in (True, False))
        for part in [loads[k:k + 6] for k in range(0, len(loads), 6)] + [rest[k:k + 5] for k in range(0, len(rest), 5)]:
            screen.print(_table(part, f"{'mix' if part[0] in loads else 'kinds'}, {threads} thread{'s'*(threads > 1)}: times ours", _cell))
    weighed = [r for r in report["results"] if "memory" in r["contenders"]["ours"]]
    for part in (weighed[k:k + 7] for k in range(0, len(weighed), 7)): screen.print(_table(part, "peak extra memory, in inputs", _memory_cell))
    for line in _lines(report): screen.print(line, soft_wrap=True)


def _lines(report):
    "What does not fit into a table."
    for note in notes_of(report["results"]): yield f"• {note}"
    growth, machine = dict(report["growth"]), report["machine"]
    if growth:
        (h, w), (H, W) = growth.pop("grids")
        yield f"a cell of {H}×{W} against one of {h}×{w}: " + ", ".join(f"{name} {times:.2g}×" for name, times in growth.items())
    if why := report.get("memory_not_measured"): yield f"memory not measured: {why}"
    for r in report["results"]:
        ours = r["contenders"]["ours"]
        if "synchronisations" in ours:
            replay = f"{ours['replay_ms']:.3g} ms as a CUDA graph" if "replay_ms" in ours else ours["replay"]
            yield f"ours, {r['load']} {r['kind']}: {replay}; {ours['synchronisations']} synchronisations"
    if s := report.get("step"):
        yield (f"training step of {s['model']}, batch {s['batch']}, {s['dtype']}: {s['without_ms']:.4g} ms; the tap adds {s['tap_adds_percent']:+.1f} %, "
               f"tap and regulariser {s['with_adds_percent']:+.1f} % ({s['rounds']} paired rounds; two plain steps differ by {s['noise_percent']:.1f} %)")
    yield f"{machine['device']}; {machine['cpu']}, {machine['cores']} cores; ours: {machine['backend']}"
    yield f"{report['clock']}; {report['took_seconds']:.0f} s in all"


def draw_benchmark(report: dict, # as benchmark.json holds it
                   columns: int = 4, # panels side by side
                  ) -> Figure:
    "Ratio bars, a panel for each case."
    results = report["results"]
    names = [n for n in results[0]["contenders"] if n != "ours"]
    columns = min(columns, len(results)); rows = -(-len(results)//columns)
    fig = Drawing(figsize=(3*columns + 1, rows*(.19*len(names) + .7)), dpi=90, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
    longest = max([f["ratio"] for r in results for f in r["contenders"].values() if "ratio" in f] + [10.])
    for ax in axes.flat[len(results):]: ax.set_axis_off()
    for ax, r in zip(axes.flat, results): _draw_case(ax, r, names, longest)
    fig.suptitle(f"times ours, {report['machine']['device']} ({report['machine']['cpu']}), {report['date'][:10]}", fontsize=10)
    return fig


def _draw_case(ax, r, names, longest):
    "Bars of one case; words where there is no number."
    for y, name in enumerate(names):
        f = r["contenders"][name]
        if "ratio" in f: ax.barh(y, f["ratio"] - 1, left=1, color="C3" if name == "authors" else "C0")
        ax.text(max(f.get("ratio", 1), 1)*1.15, y, _cell(f, name), va="center", fontsize=7, color="k" if "ratio" in f else ".5")
    ax.axvline(1, color="k", lw=.8)
    ax.set(xscale="log", xlim=(.3, longest*12), yticks=range(len(names)), ylim=(len(names) - .4, -.6))
    ax.set_yticklabels(names, fontsize=7); ax.tick_params("x", labelsize=7, labelbottom=True)
    ax.set_title(f"{r['load']} {r['kind']}, {r['threads']} thread{'s'*(r['threads'] > 1)}: ours {_cell(r['contenders']['ours'], 'ours')}", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def parser():
    p = Parser("loss.py", description="Measure the loss, forward and backward, against every labelling tool that is installed.")
    p.add_argument("--quick", action="store_true", help="one small load and three kinds of map, no memory")
    p.add_argument("--shapes", nargs="+", metavar="BxHxS", help="images x heads x side, such as 256x6x14 (six loads)")
    p.add_argument("--kinds", nargs="+", help="mix white s1 s2 blob dots spiral serpentine constant broken (all)")
    p.add_argument("--peers", nargs="+", metavar="NAME", help="such as authors, scipy, opencv-strip, kornia (all)")
    p.add_argument("--authors-code", metavar="PATH", help="a checkout of the authors' repository, to measure their loss too")
    p.add_argument("--repeats", type=int, default=31, help="of each contender, at most (31)")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="of timing, in all (35; quick 6)")
    p.add_argument("--threads", type=int, help="measured beside one thread (all cores)")
    p.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    p.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (float32)")
    p.add_argument("--step", action=argparse.BooleanOptionalAction, help="measure a training step of deit_small too (on a GPU: yes)")
    p.add_argument("-o", "--output", default="benchmark-results", help="a folder; an existing one is kept, the new one gets a number (benchmark-results)")
    return p


def prepared(args):
    "Check the request; returns what does the work."
    job = prepare_benchmark(**vars(args))

    def work(): run_benchmark(job)
    return work


def main(argv=None):
    "0: done; 1: it had to stop; 2: the request was wrong."
    with lenient_output():
        return outcome("loss.py", prepared, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
