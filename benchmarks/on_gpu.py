"""Check, tune and measure the CUDA kernels in one call, on a machine that has a GPU.

    PYTHONPATH=. python3 benchmarks/on_gpu.py -o FOLDER [--authors-code PATH] [--skip tune]

Needs the package's requirements and nothing of its development tools. Every part writes its own JSON file into FOLDER as soon as it is done, with
the device, the versions and the commit; a part that fails says so, and the next one runs. Exit code 1 if any failed. About ten minutes.
"""
import argparse
import importlib
import itertools
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from spatial_entropy.training.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 1), (1, 9), (9, 1), (5, 7), (7, 7), (14, 14), (13, 17), (16, 16), (24, 24), (32, 32), (33, 31), (37, 37),
          (5, 130), (64, 64), (128, 128), (200, 90)]
KINDS = ("mix", "white", "s1", "s2", "blob", "dots", "spiral", "serpentine", "constant", "broken")


def maps_of(kind, B, H, h, w, seed=0):
    from loss import make_maps
    return make_maps(kind, (B, H, h, w), seed=seed)


def close(E, g, maps, connectivity, k, floor, tolerance):
    "Largest errors against the clear answer on the CPU in float64, as shares of the tolerance."
    from spatial_entropy.measure.entropy import clear_entropy
    flat = maps.detach().cpu().double().flatten(0, 1)
    want, slope = clear_entropy(flat, connectivity, k, floor)
    E, g = E.detach().cpu().double().flatten(), g.detach().cpu().double().flatten(0, 1)
    assert torch.equal(E.isnan(), want.isnan()), "NaN in the wrong place"
    fine = ~want.isnan()
    excess = (flat - k * flat.mean((-2, -1), keepdim=True)).relu().sum((-2, -1))
    unit = 1 / excess.maximum(floor * flat.abs().sum((-2, -1)).clamp_min(1))
    size = slope.abs().amax((-2, -1)).maximum(unit / 100)[fine]
    off = (E - want)[fine].abs().max().item() if fine.any() else 0.
    bent = ((g - slope).abs().amax((-2, -1))[fine] / size).max().item() if fine.any() else 0.
    assert (g[~fine] == 0).all(), "a broken map has a gradient"
    assert off <= tolerance and bent <= 10 * tolerance, f"entropy is off by {off:.1e}, gradient by {bent:.1e}"
    return off, bent


def check_values():
    "Every shape, kind, connectivity, threshold and dtype against the clear answer."
    import spatial_entropy as se
    from spatial_entropy.measure.operators import backend
    from spatial_entropy.measure.regions import clear_labels
    assert backend("cuda") == "triton"
    done, worst = 0, [0., 0.]
    for (h, w), kind, connectivity in itertools.product(SHAPES, KINDS, (8, 4)):
        maps = maps_of(kind, 4, 6, h, w, seed=h * w)
        for dtype, k in ((torch.float32, 1.), (torch.float64, 1.), (torch.float16, 1.), (torch.bfloat16, 1.), (torch.float32, 1.5), (torch.float32, 0.)):
            x = maps.to(dtype).cuda()
            x = (x.abs() if k != 1 else x).requires_grad_()
            E = se.spatial_entropy(x, connectivity, times_mean=k)
            E2, g = torch.ops.spatial_entropy.entropy(x.detach(), connectivity, k, 1e-3, True)
            assert torch.equal(E.nan_to_num(-1), E2.nan_to_num(-1))
            off, bent = close(E, g, x, connectivity, k, 1e-3, 1e-9 if dtype == torch.float64 else 1e-5)
            worst, done = [max(worst[0], off), max(worst[1], bent)], done + 24
        mask = se.above_mean(maps).cuda()
        assert torch.equal(se.label_regions(mask, connectivity).cpu(), clear_labels(mask.cpu(), connectivity)), ("labels", h, w, kind)
    return dict(maps=done, worst_entropy=worst[0], worst_gradient=worst[1])


def check_behaviour():
    "Strides, determinism, graphs, the compiler, synchronisation, a scaler."
    import spatial_entropy as se
    loss, facts = se.SpatialEntropyLoss().cuda(), {}
    attention = torch.randn(64, 6, 197, 197, device="cuda", requires_grad=True)
    view = attention[:, :, 0, 1:].unflatten(-1, (14, 14))
    assert torch.equal(se.spatial_entropy(view), se.spatial_entropy(view.contiguous()))
    for h in (14, 37, 128):
        x = maps_of("mix", 4, 6, h, h).cuda()
        first = torch.ops.spatial_entropy.entropy(x, 8, 1., 1e-3, True)
        for _ in range(100):
            again = torch.ops.spatial_entropy.entropy(x, 8, 1., 1e-3, True)
            assert all(torch.equal(a, b) for a, b in zip(first, again)), f"not deterministic at {h}x{h}"
            assert torch.equal(se.label_regions(x > 0), se.label_regions(x > 0))
    x = maps_of("mix", 256, 6, 14, 14).cuda().requires_grad_()
    loss(x).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(x).backward()
        se.label_regions(x > 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    facts["synchronisations"] = 0
    plain, = torch.autograd.grad(loss(x * 2), x)
    compiled, = torch.autograd.grad(torch.compile(lambda m: loss(m * 2), fullgraph=True)(x), x)
    reduced, = torch.autograd.grad(torch.compile(lambda m: loss(m * 2), fullgraph=True, mode="reduce-overhead")(x), x)
    facts["compiled_differs_by"] = max((plain - compiled).abs().max().item(), (plain - reduced).abs().max().item())
    assert facts["compiled_differs_by"] < 1e-6
    half = (1e-6 * torch.randn(256, 6, 14, 14, device="cuda")).half().requires_grad_()
    (65536 * .01 * loss(half)).backward()
    assert half.grad.isfinite().all()
    return facts


def check_taps(device="cuda", models=None, compiled=("vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224",
                                                     "swin_tiny_patch4_window7_224", "cait_xxs24_224", "hiera_tiny_224")):
    "Every family of the tests: maps on the device against the CPU's, under bfloat16, and compiled."
    import spatial_entropy as se
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo import TIMM

    def heard(model, x):
        with se.AttentionTap(model, "all") as tap, torch.no_grad():
            model(x)
        return [m.cpu() for m in tap.maps().values()]

    def error(got, want):
        return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, want, strict=True))

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = {}
    for spec in [s for s in TIMM if models is None or s.name in models]:
        model, x = spec.make(spec.sizes[0]), torch.rand(2, 3, *spec.sizes[0], generator=torch.Generator().manual_seed(0))
        want, model, x = heard(model, x), model.to(device), x.to(device)
        facts = report[spec.name] = dict(float32=error(heard(model, x), want))
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            half = heard(model, x)
        assert all(m.dtype == torch.float32 for m in half), spec.name
        facts["bfloat16"] = error(half, want)
        if spec.name in compiled:
            torch._dynamo.reset()
            facts["compiled"] = error(heard(torch.compile(model, fullgraph=True), x), want)
    worst = {k: max(f[k] for f in report.values() if k in f) for k in ("float32", "bfloat16", "compiled") if any(k in f for f in report.values())}
    assert worst["float32"] < 1e-3 and worst.get("compiled", 0) < 1e-3 and worst["bfloat16"] < .2, worst
    return dict(models=len(report), worst=worst, errors=report)


def replay_us(call, replays=200):
    "Microseconds a replay of a recorded CUDA graph, the median of seven rounds."
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop) / replays)
    return sorted(times)[3]


def variant(folder, number, **constants):
    "The kernels with other constants, from files of their own, since Triton reads the source."
    package = folder / f"variant_{number}"
    package.mkdir()
    for name in ("gather", "tiled", "cuda"):
        text = (ROOT / f"spatial_entropy/measure/{name}.py").read_text(encoding="utf-8")
        text = text.replace("from .entropy", "from spatial_entropy.measure.entropy")
        for constant, value in constants.items():
            text = re.sub(rf"^{constant} = .*$", f"{constant} = {value}", text, flags=re.M)
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(f"variant_{number}.cuda")


def tune():
    "Warps, jumps and regions weighed at once for small maps; tile and warps for large ones. Microseconds by kind, forward with gradient."
    from tempfile import TemporaryDirectory
    rows = []
    small = {"14": (256, 6, 14, 14), "24": (128, 6, 24, 24), "32": (64, 6, 32, 32)}
    large = {"37": (64, 12, 37, 37), "64": (8, 16, 64, 64), "128": (2, 16, 128, 128)}
    maps = {(s, k): maps_of(k, *shape).cuda() for s, shape in {**small, **large}.items() for k in ("mix", "dots", "spiral")}
    with TemporaryDirectory() as temporary:
        number = itertools.count()
        for warps, jumps, regions in itertools.product((1, 2, 4, 8), (1, 2, 3), (2, 4, 8, 16)):
            m = variant(Path(temporary), next(number), GATHER_WARPS={1024: warps}, JUMPS=f"tl.constexpr({jumps})", REGIONS=regions)
            rows.append(dict(form="gather", warps=warps, jumps=jumps, regions=regions, **timed(m, maps, small)))
        for tile, warps in itertools.product((512, 1024, 2048), (2, 4, 8)):
            m = variant(Path(temporary), next(number), **{"TILE, TILE_WARPS": f"{tile}, {warps}"})
            rows.append(dict(form="tiled", tile=tile, warps=warps, **timed(m, maps, large)))
    best = {s: min((r for r in rows if f"{s}.mix" in r), key=lambda r: r[f"{s}.mix"], default={}) for s in (*small, *large)}
    for s, r in best.items():
        print(s, {k: round(v, 1) if isinstance(v, float) else v for k, v in r.items()} or "no variant ran", flush=True)
    return dict(best=best, rows=rows)


def timed(module, maps, sizes):
    "us for every kind; a variant that does not compile or launch is noted."
    out = {}
    for (s, kind), x in maps.items():
        if s in sizes:
            try:
                out[f"{s}.{kind}"] = replay_us(lambda x=x: module.entropy_and_gradient(x, 8, 1., 1e-3, True))
            except Exception as e:
                out[f"{s}.{kind} failed"] = str(e).splitlines()[0][:120]
    return out


def growth():
    "Nanoseconds a cell from 14² to 128², and the floor: a copy of the same size."
    import spatial_entropy as se
    loss, out = se.SpatialEntropyLoss().cuda(), {}
    for h in (14, 16, 24, 32, 37, 48, 64, 96, 128):
        M = max(1, 256 * 6 * 196 // (h * h) // 6)
        for kind in ("mix", "dots", "spiral"):
            x = maps_of(kind, M, 6, h, h).cuda().requires_grad_()
            us = replay_us(lambda x=x: torch.autograd.grad(loss(x), x))
            out[f"{h}.{kind}"] = dict(us=us, ns_per_cell=1000 * us / x.numel())
        out[f"{h}.copy_us"] = replay_us(lambda x=x: x.detach().clone())
    print({k: round(v["us"], 1) for k, v in out.items() if isinstance(v, dict)}, flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("-o", "--output", required=True)
    p.add_argument("--authors-code")
    p.add_argument("--skip", nargs="*", default=[], choices=("values", "behaviour", "taps", "growth", "benchmark", "tune", "training"))
    p.add_argument("--timm-train", help="train.py of timm's repository, to measure beside our loop")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("on_gpu.py: torch sees no CUDA device on this machine; nothing was run")
    folder, failed = Path(args.output), []
    folder.mkdir(parents=True, exist_ok=True)
    from loss import machine_facts
    machine = machine_facts(torch.device("cuda"))

    def benchmark():
        words = ["--device", "cuda", "-o", str(folder / "benchmark"), *(["--authors-code", args.authors_code] if args.authors_code else [])]
        return dict(exit=subprocess.run([sys.executable, str(ROOT / "benchmarks/loss.py"), *words], check=True).returncode)
    def training():
        "deit_small at 224 pixels, batch 256, bfloat16, compiled: throughput in turns, peaks, and where the time goes. Its logic was run on a CPU."
        words = ("--model deit_small_patch16_224 --img-size 224 --batch-size 256 --amp-dtype bfloat16 --compile --updates 8 --rounds 9 "
                 "--workers 12 -o").split() + [str(folder / "training"), *(["--timm-train", args.timm_train] if args.timm_train else [])]
        return dict(exit=subprocess.run([sys.executable, str(ROOT / "benchmarks/training.py"), *words], check=True).returncode)

    parts = dict(values=check_values, behaviour=check_behaviour, taps=check_taps, growth=growth, benchmark=benchmark, training=training, tune=tune)
    for name, part in parts.items():
        if name in args.skip:
            continue
        start = time.time()
        try:
            facts = part()
        except Exception:
            failed.append(name)
            facts = dict(failed=traceback.format_exc())
            print(facts["failed"], flush=True)
        report = dict(part=name, seconds=round(time.time() - start, 1), **machine, **facts)
        write_json(folder / f"{name}.json", report)
        print(f"{name}: {'FAILED' if name in failed else 'done'} in {report['seconds']} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
