"""What `on_gpu.py` checks and measures: each call is one part, or one process's share of it, in a process of its own.

    python3 benchmarks/gpu_parts.py PART FOLDER [--share 0/6] [--wait] [--device cuda] [--authors-code PATH] [--timm-train PATH]

Writes FOLDER/PART.SHARE.json again and again while it works, so that a part that is stopped keeps what it has. With --wait, a part that times
something loads and compiles first, writes FOLDER/PART.ready, and begins when a line comes on its standard input.
"""
import argparse
import gc
import importlib
import itertools
import json
import re
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch._dynamo
from loss import machine_facts, make_maps, measure_step, prepare_benchmark, recorded, run_benchmark

import spatial_entropy as se
from spatial_entropy.measure import cuda as kernels
from spatial_entropy.measure import operators
from spatial_entropy.measure.entropy import clear_entropy
from spatial_entropy.measure.regions import clear_labels
from spatial_entropy.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (7, 7), (14, 14), (13, 17), (16, 16), (24, 24), (32, 32), (33, 31), (37, 37),
          (5, 130), (64, 64), (128, 128), (200, 90)]
KINDS = ("mix", "white", "s1", "s2", "blob", "dots", "spiral", "serpentine", "constant", "broken")
READ = ((torch.float32, 1.), (torch.float64, 1.), (torch.float16, 1.), (torch.bfloat16, 1.), (torch.float32, 1.5), (torch.float32, 0.)) # dtype, k
COMPILED = ("vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224",
            "hiera_tiny_224")
entropy = torch.ops.spatial_entropy.entropy


def in_short(error):
    "Type and first line of an error that may be pages long."
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def alive(device):
    "Whether the device still answers: after an illegal address nothing does, in this process."
    try: torch.zeros(1, device=device).add_(1).cpu()
    except RuntimeError: return False
    return True


def maps_of(kind, B, H, h, w, seed=0): return make_maps(kind, (B, H, h, w), seed=seed)


def errors_of(E, g, maps, connectivity, k, floor):
    "(largest error of the entropy, of the gradient as a share of its size, what is wrong besides) against the clear answer on the CPU in float64."
    flat = maps.detach().cpu().double().flatten(0, 1)
    want, slope = clear_entropy(flat, connectivity, k, floor)
    E, g = E.detach().cpu().double().flatten(), g.detach().cpu().double().flatten(0, 1)
    fine = ~want.isnan()
    if not torch.equal(E.isnan(), want.isnan()): return 0., 0., "NaN in the wrong place"
    if not (g[~fine] == 0).all(): return 0., 0., "a broken map has a gradient"
    if not g.isfinite().all(): return 0., 0., "a gradient is not finite"
    excess = (flat - k*flat.mean((-2, -1), keepdim=True)).relu().sum((-2, -1))
    unit = 1/excess.maximum(floor*flat.abs().sum((-2, -1)).clamp_min(1))
    size = slope.abs().amax((-2, -1)).maximum(unit/100)[fine]
    if not fine.any(): return 0., 0., None
    return (E - want)[fine].abs().max().item(), ((g - slope).abs().amax((-2, -1))[fine]/size).max().item(), None


def compared(x, connectivity, k):
    "(error of the entropy, of the gradient, what is wrong besides) of maps, by the function, the operator and autograd."
    leaf = (x.abs() if k != 1 else x).requires_grad_()
    E = se.spatial_entropy(leaf, connectivity, times_mean=k)
    again, g = entropy(leaf.detach(), connectivity, k, 1e-3, True)
    off, bent, wrong = errors_of(again, g, leaf, connectivity, k, 1e-3)
    if not torch.equal(E.nan_to_num(-1), again.nan_to_num(-1)): wrong = wrong or "two calls differ"
    sent, half = torch.autograd.grad(E.nansum(), leaf)[0], x.dtype in (torch.float16, torch.bfloat16)
    if not torch.allclose(sent.to(g.dtype), g, *((torch.finfo(x.dtype).eps, 1e-7) if half else (0, 0))): wrong = wrong or "autograd's gradient is another"
    return off, bent, wrong


def check_values(save, share=0, of=1, device="cuda", shapes=SHAPES, kinds=KINDS, B=4):
    "Every shape, kind, connectivity, threshold and dtype against the clear answer; labels too. A share takes its own dtypes and thresholds."
    facts = dict(maps=0, cases=0, worst=dict(entropy=0., gradient=0.), failing=[], kernels=operators.backend("cuda"))
    if facts["kernels"] != "triton": facts["failing"].append(dict(error=f"CUDA is served by {facts['kernels']} and not by Triton"))
    work = [((h, w), option, kind) for (h, w) in shapes for option in READ[share::of] for kind in kinds]
    for n, ((h, w), (dtype, k), kind) in enumerate(work):
        maps = maps_of(kind, B, 6, h, w, seed=h*w)
        allowed = 1e-9 if dtype == torch.float64 else 1e-5
        for connectivity in (8, 4):
            case = dict(shape=f"{h}x{w}", kind=kind, dtype=str(dtype).removeprefix("torch."), k=k, connectivity=connectivity)
            try:
                off, bent, wrong = compared(maps.to(dtype).to(device), connectivity, k)
                if wrong is None and not (off <= allowed and bent <= 10*allowed): wrong = f"entropy is off by {off:.1e}, gradient by {bent:.1e}"
                facts["worst"] = dict(entropy=max(facts["worst"]["entropy"], off), gradient=max(facts["worst"]["gradient"], bent))
                if (dtype, k) == READ[0]:
                    mask = se.above_mean(maps)
                    same = torch.equal(se.label_regions(mask.to(device), connectivity).cpu(), clear_labels(mask, connectivity))
                    if not same: wrong = f"{wrong or ''} labels differ".strip()
            except Exception as e: wrong = in_short(e)
            facts["cases"] += 1; facts["maps"] += B*6
            if wrong: facts["failing"].append(dict(case, error=wrong))
            if wrong and not alive(device): raise RuntimeError(f"the device no longer answers, after {case}: {wrong}")
        if (n + 1) % len(kinds) == 0: save(facts | dict(done=n + 1, of=len(work)))
    return facts


def _strides(device):
    "A view without a copy, also of an attention that passes 2**31 numbers."
    attention = torch.randn(64, 6, 197, 197, device=device)
    view = attention[:, :, 0, 1:].unflatten(-1, (14, 14))
    assert torch.equal(se.spatial_entropy(view), se.spatial_entropy(view.contiguous())), "a view gives another value"
    del attention, view
    if device == "cpu": return "small only"
    room = torch.empty(2**31 + 10**6, dtype=torch.float16, device=device)
    for h in (14, 64):
        far = room.as_strided((2, 3, h, h), (2**31, 5000, h, 1))
        far.copy_(maps_of("mix", 2, 3, h, h))
        assert torch.equal(se.spatial_entropy(far), se.spatial_entropy(far.contiguous())), f"{h}x{h} far apart gives another value"
    return True


def _deterministic(device):
    for h in (14, 37, 128):
        x = maps_of("mix", 4, 6, h, h).to(device)
        first, named = entropy(x, 8, 1., 1e-3, True), se.label_regions(x > 0)
        for _ in range(100 if device != "cpu" else 1):
            assert all(torch.equal(a, b) for a, b in zip(first, entropy(x, 8, 1., 1e-3, True))), f"another value at {h}x{h}"
            assert torch.equal(named, se.label_regions(x > 0)), f"other labels at {h}x{h}"
    return True


def _classic(device, B=256): return maps_of("mix", B, 6, 14, 14).to(device).requires_grad_()


def _synchronisations(device):
    "None in forward, backward and labels, small and large, once everything is compiled."
    loss = se.SpatialEntropyLoss().to(device)
    both = [_classic(device), maps_of("mix", 4, 6, 64, 64).to(device).requires_grad_()]
    def everything():
        for x in both: loss(x).backward(); se.spatial_entropy(x).sum().backward(); se.label_regions(x > 0)
    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: everything()
    finally: torch.cuda.set_sync_debug_mode("default")
    return 0


def _differs(compile, device):
    "Largest difference of the compiled gradient from the plain one, as a share of its size; of several calls, with other maps."
    loss, x = se.SpatialEntropyLoss().to(device), _classic(device)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    call, worst = compile(lambda m: loss(m*2)), 0.
    for turn in range(4):                                               # the third is the first that replays a recorded graph
        with torch.no_grad(): x.copy_(maps_of("mix", 256, 6, 14, 14, seed=turn))
        if device != "cpu": torch.compiler.cudagraph_mark_step_begin()
        got = torch.autograd.grad(call(x), x)[0].clone()                # the next run writes over it
        want, = torch.autograd.grad(loss(x*2), x)
        worst = max(worst, ((want - got).abs().max()/want.abs().max()).item())
    assert worst < 1e-5, f"the gradient differs by {worst:.1e} of its size"
    return dict(differs_by=worst, graphs_not_recorded=torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] - before)


def _recorded(device):
    "A CUDA graph of forward and backward gives what a plain call gives, after the maps have changed, and counts what is left out."
    loss, x = se.SpatialEntropyLoss().to(device), _classic(device)
    def call():
        value = loss(x)
        return value.detach(), torch.autograd.grad(value, x)[0]
    graph, (value, g) = recorded(call)
    for seed, kind in ((1, "mix"), (2, "broken")):
        with torch.no_grad(): x.copy_(maps_of(kind, 256, 6, 14, 14, seed=seed))
        before = loss.left_out.item()
        graph.replay()
        found = value.clone(), g.clone(), loss.left_out.item() - before
        want = call()
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1]), f"{kind}: another value or gradient"
        assert found[2] == (0 if kind == "mix" else 96), f"{kind}: {found[2]} left out"
    return True


def _side_stream(device):
    x = maps_of("mix", 64, 6, 37, 37).to(device)
    want = entropy(x, 8, 1., 1e-3, True)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10**8)                                        # who does not wait for its stream reads zeros
        late.copy_(x)
        got = entropy(late, 8, 1., 1e-3, True)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want)), "another value"
    return True


def _scaler(device):
    half = (1e-6*torch.randn(256, 6, 14, 14, device=device)).half().requires_grad_()
    (65536*.01*se.SpatialEntropyLoss().to(device)(half)).backward()
    assert half.grad.isfinite().all(), "a gradient is not finite"
    return True


FACTS = dict(strides=_strides, deterministic=_deterministic, synchronisations=_synchronisations, scaler=_scaler, recorded=_recorded,
             side_stream=_side_stream, compiled=partial(_differs, partial(torch.compile, fullgraph=True)),
             reduced=partial(_differs, partial(torch.compile, fullgraph=True, mode="reduce-overhead")))


def check_behaviour(save, device="cuda", facts=tuple(FACTS)):
    "Strides, determinism, synchronisation, a scaler, graphs, streams, the compiler: each tried, whatever became of the others."
    report = dict(facts={}, failing=[])
    for name in facts:
        try: report["facts"][name] = FACTS[name](device)
        except Exception as e: report["failing"].append(dict(fact=name, error=in_short(e), where=traceback.format_exc()[-1500:]))
        if not alive(device): raise RuntimeError(f"the device no longer answers, after {name}")
        save(report)
    return report


def heard(model, x):
    "Every layer's maps, on the CPU."
    with se.AttentionTap(model, "all") as tap, torch.no_grad(): model(x)
    return [m.float().cpu() for m in tap.maps().values()]


def worst_of(got, want): return max(((g - w).abs().max()/w.abs().max()).item() for g, w in zip(got, want, strict=True))


def _tapped(spec, device):
    "(model and picture on the device, what the CPU hears, facts, what is wrong)."
    model, x = spec.make(spec.sizes[0]), torch.rand(2, 3, *spec.sizes[0], generator=torch.Generator().manual_seed(0))
    model, other = deepcopy(model), model                               # some models keep tables of their first pass on its device
    want = heard(other, x)
    with torch.autocast("cpu", torch.bfloat16): coarse = worst_of(heard(other, x), want)
    model, x = model.to(device), x.to(device)
    facts = dict(float32=worst_of(heard(model, x), want))
    with torch.autocast(torch.device(device).type, torch.bfloat16), se.AttentionTap(model, "all") as tap, torch.no_grad():
        model(x); half = list(tap.maps().values())
    facts |= dict(bfloat16=worst_of([m.cpu() for m in half], want), bfloat16_on_a_cpu=coarse)
    wrong = "" if facts["float32"] < 1e-3 else f"float32 differs by {facts['float32']:.1e}; "
    if not facts["bfloat16"] < max(.2, 3*coarse): wrong += f"bfloat16 differs by {facts['bfloat16']:.1e}, on the CPU by {coarse:.1e}; "
    if any(m.dtype != torch.float32 for m in half): wrong += "maps under autocast are not float32"
    return model, x, want, facts, wrong


def check_taps(save, share=0, of=1, device="cuda", models=None, compiled=COMPILED):
    "Every family of the tests: maps on the device against the CPU's, under bfloat16, and compiled. A model that fails is named."
    sys.path.insert(0, str(ROOT/"tests"))
    from zoo import TIMM
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = dict(models=0, worst={}, failing=[], errors={}, not_in_this_timm=[])
    last = [s for s in TIMM if s.name in compiled and s.name in (models or [s.name])][share::of]
    first = [s for s in TIMM if s.name not in compiled and s.name in (models or [s.name])][share::of]
    for spec in [*first, *last]:                                        # what is compiled takes long
        wrong, facts = "", {}
        try:
            model, x, want, facts, wrong = _tapped(spec, device)
            if spec in last:
                torch._dynamo.reset()
                facts["compiled"] = worst_of(heard(torch.compile(model, fullgraph=True), x), want)
                if not facts["compiled"] < 1e-3: wrong += f"compiled differs by {facts['compiled']:.1e}"
        except Exception as e:
            if "Unknown model" in str(e): report["not_in_this_timm"].append(spec.name); continue
            wrong += in_short(e)
        report["errors"][spec.name] = facts; report["models"] += 1
        for key, error in facts.items(): report["worst"][key] = max(report["worst"].get(key, 0.), error)
        if wrong: report["failing"].append(dict(model=spec.name, error=wrong))
        if wrong and not alive(device): raise RuntimeError(f"the device no longer answers, after {spec.name}: {wrong}")
        save(report | dict(of=len(first) + len(last)))
    return report


def replay_us(call, calls=1, replays=200, rounds=7):
    "Microseconds a call, the median of some rounds of replays of a recorded CUDA graph; without a GPU, of plain calls."
    if not torch.cuda.is_available():
        start = time.perf_counter(); call()
        return 1e6*(time.perf_counter() - start)
    graph, _ = recorded(call, calls)
    times = []
    for _ in range(rounds):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays): graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000*start.elapsed_time(stop)/replays/calls)
    return sorted(times)[rounds//2]


def growth(save, ready, device="cuda", sides=(14, 16, 24, 32, 37, 48, 64, 96, 128), cells=256*6*196):
    "Microseconds from 14² to 128², one call a graph and 20 in a row, and the floor: a copy of the same size."
    loss, out, calls = se.SpatialEntropyLoss().to(device), {}, {}
    for h, kind in itertools.product(sides, ("mix", "dots", "spiral")):
        x = maps_of(kind, max(1, cells//(h*h)//6), 6, h, h).to(device).requires_grad_()
        calls[h, kind] = x, lambda x=x: torch.autograd.grad(loss(x), x)
        calls[h, kind][1]()                                             # compiles
    ready()
    for (h, kind), (x, call) in calls.items():
        try:
            us, row = replay_us(call), replay_us(call, 20, 10, 5)
            out[f"{h}.{kind}"] = dict(us=us, in_a_row_us=row, ns_per_cell=1000*us/x.numel())
            if kind == "mix": out[f"{h}.copy"] = dict(us=replay_us(lambda x=x: x.detach().clone()))
        except Exception as e: out[f"{h}.{kind}"] = dict(error=in_short(e))
        save(out)
    print({k: round(v["us"], 1) for k, v in out.items() if "us" in v}, flush=True)
    return out


def benchmark(save, ready, folder, device="cuda", authors_code=None, timm_train=None, **asked):
    "The loss beside its peers, as benchmarks/loss.py measures it; of the loops over maps, which all wait for the host, OpenCV's alone."
    asked = dict(peers=["authors", "scipy-strip", "opencv", "skimage-strip", "cc3d-strip", "kornia"], budget=12., step=False) | asked
    job = prepare_benchmark(device=device, authors_code=authors_code, output=str(folder/"benchmark"), **asked)
    torch.zeros(1, device=device)
    ready()
    return dict(written=run_benchmark(job).name)


def step(save, ready, device="cuda", **asked):
    "What tap and regulariser add to a training step of deit_small, batch 256, bfloat16, compiled."
    return measure_step(torch.device(device), ready=ready, **asked)


def training(save, ready, folder, authors_code=None, timm_train=None, device="cuda", **asked):
    "deit_small at 224 pixels, batch 256, bfloat16, compiled: throughput in turns, peaks, and where the time goes."
    from rich.console import Console
    from training import prepare_training_benchmark, run_training_benchmark
    asked = dict(model="deit_small_patch16_224", img_size=224, batch_size=256, amp_dtype="bfloat16", compile="inductor", updates=4, rounds=5,
                 workers=8) | asked
    request, place = prepare_training_benchmark(str(folder/"training"), device=device, timm_train=timm_train, **asked)
    run_training_benchmark(request, place, Console(file=sys.stdout), ready)
    return dict(request=asked)


RUNS = dict(first=[], second=[], killed=[], bfloat16=["--amp-dtype", "bfloat16"], float16=["--amp-dtype", "float16"], compiled=["--compile"],
            corrected=["--regularizer", "chance-corrected"], averaged=["--model-ema"], simpool=["--pooling", "simpool"])
SETTINGS = ("--data shapes --img-size 64 --limit 1024 --epochs 3 -b 32 --workers 1 --seed 1 --recovery-interval 5 "
            "--regularizer spatial-entropy --entropy-weight .1").split()


def _command(*words):
    code = "import sys; from spatial_entropy.commands import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", code, "train", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                            errors="replace")


def _trained(name, folder, device, timeout):
    "One run by the command line; `killed` is killed after its first checkpoint, and goes on."
    run, facts = Path(folder)/name, {}
    p = _command(*SETTINGS, *RUNS[name], "--device", device, "--output", folder, "--experiment", name)
    if name == "killed":
        while not list(run.glob("checkpoints/step-*")) and p.poll() is None: time.sleep(.05)
        p.kill(); p.communicate()
        facts, p = dict(checkpoints_when_killed=len(list(run.glob("checkpoints/step-*")))), _command("--resume", str(run))
    try: said, _ = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        p.kill()
        return dict(error=f"not ended after {timeout} s: {p.communicate()[0][-1000:]}")
    if p.returncode: return dict(error=said[-1000:])
    found = json.loads((run/"evaluation.json").read_text(encoding="utf-8"))
    return facts | dict(weights=found["weights_sha256"], top1=found["top1"], entropy=found["entropy"])


def runs(save, ready, device="cuda", chosen=tuple(RUNS), timeout=80):
    "Whole runs, side by side: the same twice, killed and gone on with, half precision, compiled, other terms. Their speed says nothing."
    ready()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(len(chosen)) as pool:
        found = dict(zip(chosen, pool.map(lambda name: _trained(name, folder, device, timeout), chosen)))
    same = lambda name: found["first"].get("weights") == found[name].get("weights") if name in found else None
    return dict(runs=found, same_twice=same("second"), same_after_a_kill=same("killed"),
                failing=[dict(run=name, **f) for name, f in found.items() if "error" in f])


def variant(folder, number, **constants):
    "The kernels with other constants, from files of their own, since Triton reads the source."
    package = folder/f"variant_{number}"
    package.mkdir()
    for name in ("gather", "tiled", "cuda"):
        text = (ROOT/f"spatial_entropy/measure/{name}.py").read_text(encoding="utf-8")
        text = text.replace("from .entropy", "from spatial_entropy.measure.entropy")
        for constant, value in constants.items(): text = re.sub(rf"^{constant} = .*$", f"{constant} = {value}", text, flags=re.M)
        (package/f"{name}.py").write_text(text, encoding="utf-8")
    if str(folder) not in sys.path: sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(f"variant_{number}.cuda")


TUNED = {"14": (256, 6, 14, 14), "24": (128, 6, 24, 24), "37": (64, 12, 37, 37), "64": (8, 16, 64, 64), "128": (2, 16, 128, 128)}


def variants():
    "(form, sizes, what is told of it, constants): warps, jumps and regions weighed at once for small maps; tile and warps for large ones."
    rows = [("tiled", ("37", "64", "128"), dict(tile=tile, warps=warps), {"TILE, TILE_WARPS": f"{tile}, {warps}"})
            for tile, warps in itertools.product((512, 1024, 2048), (2, 4, 8))]
    for size, warps in (("14", (1, 2, 4)), ("24", (4, 8, 16))):
        rows += [("gather", (size,), dict(warps=w, jumps=j, regions=r), dict(GATHER_WARPS={1024: w}, JUMPS=f"tl.constexpr({j})", REGIONS=r))
                 for w, j, r in itertools.product(warps, (1, 2, 3), (2, 4, 8, 16))]
    return rows


def timed(module, maps, sizes, clock):
    "us for every kind; a variant that does not compile or launch is noted."
    out = {}
    for (s, kind), x in maps.items():
        if s not in sizes: continue
        try: out[f"{s}.{kind}"] = clock(lambda x=x: module.entropy_and_gradient(x, 8, 1., 1e-3, True))
        except Exception as e: out[f"{s}.{kind} failed"] = in_short(e)
    return out


def compile_variants(save, share, of, device="cuda", tuned=TUNED, chosen=slice(None)):
    "Each variant of this share is called once: what Triton compiles stays on the disk, for all processes."
    with TemporaryDirectory() as folder:
        for n, (_, sizes, _, constants) in enumerate(variants()[chosen][share::of]):
            maps = {(s, "mix"): maps_of("mix", *tuned[s]).to(device) for s in sizes}
            timed(variant(Path(folder), n, **constants), maps, sizes, lambda call: call() and 0.)
    return {}


def tune(save, ready, device="cuda", tuned=TUNED, chosen=slice(None), processes=4):
    "Microseconds by kind, forward with gradient, 10 calls in a row, of every variant; and of the kernels as they are."
    helpers = [subprocess.Popen([sys.executable, __file__, "compile", "unused", "--share", f"{n}/{processes}"]) for n in range(processes)]
    maps = {(s, k): maps_of(k, *shape).to(device) for s, shape in tuned.items() for k in ("mix", "dots", "spiral")}
    clock = partial(replay_us, calls=10, replays=10, rounds=5)
    for helper in helpers: helper.wait()
    ready()
    report = dict(now=timed(kernels, maps, tuned, clock), best={}, rows=[])
    with TemporaryDirectory() as folder:
        for n, (form, sizes, told, constants) in enumerate(variants()[chosen]):
            found = timed(variant(Path(folder), n, **constants), maps, sizes, clock)
            report["rows"].append(dict(form=form, **told, **found))
            for s in sizes:
                measured = [r for r in report["rows"] if f"{s}.mix" in r]
                if measured: report["best"][s] = min(measured, key=lambda r, s=s: r[f"{s}.mix"])
            save(report)
    for s, r in report["best"].items(): print(s, {k: round(v, 1) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    return report


CHECKS = dict(values=check_values, behaviour=check_behaviour, taps=check_taps)
TIMED = dict(growth=growth, benchmark=benchmark, step=step, runs=runs, training=training, tune=tune)


def work(args):
    "What the arguments ask for, as a function of save and ready."
    share, of = map(int, args.share.split("/"))
    here = dict(device=args.device)
    if args.part in ("values", "taps"): return lambda save, ready: CHECKS[args.part](save, share, of, **here)
    if args.part == "behaviour": return lambda save, ready: check_behaviour(save, **here)
    if args.part == "compile": return lambda save, ready: compile_variants(save, share, of, **here)
    if args.part in ("benchmark", "training"):
        here |= dict(folder=Path(args.folder), authors_code=args.authors_code, timm_train=args.timm_train)
    return lambda save, ready: TIMED[args.part](save, ready, **here)


def run_part(part, do, folder, share="0", device="cuda", wait=False):
    "Do it, and keep what it found, or why it failed, in FOLDER/PART.SHARE.json. Returns whether it did not fail."
    start, machine, known = time.time(), None, SimpleNamespace(facts={}, prepared={})
    def save(facts, done=False):
        nonlocal machine
        if machine is None: machine = machine_facts(torch.device(device))
        here = dict(part=part, complete=done, seconds=round(time.time() - start, 1))
        write_json(folder/f"{part}.{share}.json", here | known.prepared | machine | facts)
    def keep(facts): known.facts = facts; save(facts)
    def ready():
        nonlocal start
        known.prepared = dict(prepared_seconds=round(time.time() - start, 1))
        gc.collect(); gc.freeze()                                       # no long collections while it is timed
        (folder/f"{part}.ready").write_text("", encoding="utf-8")
        if wait and not sys.stdin.readline(): raise SystemExit("nobody waits for this part any more")
        start = time.time()
    try:
        if device == "cuda" and not torch.cuda.is_available(): raise RuntimeError("torch sees no CUDA device on this machine")
        save(do(keep, ready), done=True)
    except Exception:
        print(traceback.format_exc(), flush=True)
        machine = machine or {}
        save(known.facts | dict(failed=traceback.format_exc()[-3000:]))
        return False
    return True


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("part", choices=(*CHECKS, *TIMED, "compile"))
    p.add_argument("folder")
    p.add_argument("--share", default="0/1", help="which share of how many (0/1)")
    p.add_argument("--wait", action="store_true", help="prepare, then wait for a line on standard input")
    p.add_argument("--device", default="cuda")
    p.add_argument("--authors-code")
    p.add_argument("--timm-train")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.part == "compile": work(args)(print, print); return 0
    return 0 if run_part(args.part, work(args), Path(args.folder), args.share.split("/")[0], args.device, args.wait) else 1


if __name__ == "__main__":
    sys.exit(main())
