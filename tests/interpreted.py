"""The CUDA kernels in Triton's interpreter, on the CPU, against the oracle. Run in a process of its own by test_gpu_kernels.py."""
import gc
import os
import warnings
from functools import cache, partial

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore", module="triton")      # numpy, on lanes that are masked out

import numpy as np
import torch
import triton.language as tl
from kinds import STRUCTURE, blob, dots, kinds, oracle, serpentine, smooth, spiral
from scipy import ndimage
from triton.runtime import interpreter

import spatial_entropy as se
from spatial_entropy.measure import cuda as gpu_kernels
from spatial_entropy.measure import gather, operators, tiled

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
done = dict(entropy=0, gradient=0, labels=0)


def patch_once(real=interpreter._patch_lang):
    "Triton patches its language again at each call of a helper, a third of the time. Here: once a launch, until it is restored."
    done, languages = set(), cache(lambda fn: frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core))

    def patch(fn):
        if languages(fn) <= done:
            return None                                                         # of a helper, which does not look at it
        outermost, scope = not done, real(fn)
        done.update(languages(fn))
        if outermost:
            restore = scope.restore
            scope.restore = lambda: (restore(), done.clear())
        return scope
    return patch


interpreter._patch_lang = patch_once()
of_scalars = cache(interpreter._get_np_dtype)                                   # which fills a table of all types at each call
interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else of_scalars(t.scalar)
gc.disable()                                                                    # a launch leaves no rings of objects


def check(maps, connectivity=8, times_mean=1., floor=1e-3):
    "maps (n, h, w)"
    E, g = gpu_kernels.entropy_and_gradient(maps[None], connectivity, times_mean, floor, True)
    tolerance = TOLERANCE[maps.dtype]
    for m, e, slope in zip(maps.double().numpy(), E[0].tolist(), g[0].double().numpy()):
        want, bent, _, size = oracle(m, connectivity, times_mean, floor)
        assert np.isnan(e) if np.isnan(want) else abs(e - want) <= tolerance and e >= 0, (maps.shape, maps.dtype, e, want)
        assert np.abs(slope - bent).max() <= 10 * tolerance * size, (maps.shape, maps.dtype, np.abs(slope - bent).max(), size)
        done["entropy"] += 1
        done["gradient"] += 1


def with_broken(maps):
    maps = torch.cat([maps, maps[-2:].clone()])
    maps[-1, 0, 0], maps[-2, -1, -1] = torch.nan, -torch.inf
    return maps


def check_both(maps, connectivity):
    check(maps.float(), connectivity)
    check_labels(maps > maps.mean((1, 2), keepdim=True), connectivity)


def check_labels(mask, connectivity):
    got = gpu_kernels.label_regions(mask[None], connectivity)[0].numpy()
    want = np.stack([ndimage.label(m, STRUCTURE[connectivity])[0] for m in mask.numpy()])
    assert got.dtype == np.int32 and np.array_equal(got, want), (mask.shape, connectivity)
    done["labels"] += len(mask)


def both_forms(h, w, run, tiled_run=None):
    "The form that the size asks for, and for small maps the tiled one too, of two or three tiles."
    run()
    if h * w <= 100:
        kept = gather.GATHER_CELLS, tiled.TILE, gpu_kernels.TILE
        gather.GATHER_CELLS, tiled.TILE, gpu_kernels.TILE = 0, *[32 if h * w > 40 else 16] * 2
        try:
            (tiled_run or run)()
        finally:
            gather.GATHER_CELLS, tiled.TILE, gpu_kernels.TILE = kept


def main():
    for turn, (h, w) in enumerate([(1, 1), (1, 9), (9, 1), (2, 3), (5, 7), (7, 7), (14, 14), (13, 17), (16, 16)]):
        maps = torch.tensor(kinds(28, h, w, np.random.default_rng(h * w)))
        for connectivity in (8, 4):
            # All kinds at 5 x 7 and 7 x 7; elsewhere, and in the tiles of 5 x 7, every other one, which the sizes and connectivities take in turns.
            half = with_broken(maps[(turn + connectivity // 8) % 2::2])
            run = partial(check_both, with_broken(maps) if (h, w) in ((5, 7), (7, 7)) else half, connectivity)
            both_forms(h, w, run, partial(check_both, half, connectivity) if (h, w) != (7, 7) else run)
    for dtype in TOLERANCE:
        for k in (1., 0., 1.5):
            maps = torch.tensor(np.abs(smooth(4, 14, 14, 1, np.random.default_rng(3)))).to(dtype)
            check(maps, 8, k)
            check(maps[:, ::2, 1::3], 4, k)                                     # strides
    magnitudes()
    for h, w in [(33, 35), (64, 64)]:
        rng = np.random.default_rng(h)
        maps = torch.tensor(np.concatenate([smooth(1, h, w, 1, rng), blob(1, h, w, rng), spiral(h, w)[None], dots(h, w)[None], serpentine(h, w)[None]]))
        check(maps.float())
        check_labels(maps > .5, 8)
    through_the_front_door()
    print(done)


def magnitudes():
    "Maps at the ends of their type's range, cells that vanish beside others, and a cell that stands for many."
    map_ = torch.tensor(smooth(1, 7, 9, 1, np.random.default_rng(4)))
    map_ = map_ / map_.abs().max()
    for dtype, sizes in {torch.float32: (3e38, 1e-27), torch.float64: (1.7e308, 1e-297), torch.bfloat16: (3e38,)}.items():
        for size in sizes:
            for k in (1., .5):
                both_forms(7, 9, lambda d=dtype, s=size, k=k: check_scaled((map_.abs() if k != 1 else map_).mul(s).to(d), k))
    for dtype in (torch.float32, torch.float64):
        maps = torch.tensor([[[1e20, 1e3, 1e20], [0, 0, 0], [1e20, 1e20, 1e20]], [[1e20, 0, 1e20], [0, 0, 0], [1e3, 1, 1e20]]], dtype=dtype)
        both_forms(3, 3, lambda m=maps: check_values(m, 0.))
        both_forms(1, 9, lambda d=dtype: check(torch.randn(2, 5, 1).to(d).expand(2, 5, 6)))
        both_forms(1, 9, lambda d=dtype: check(torch.randn(2, 1, 1).to(d).expand(2, 5, 6)))


def check_values(maps, k):
    E, _ = gpu_kernels.entropy_and_gradient(maps[None], 8, k, 1e-3, True)
    want = [oracle(m, 8, k)[0] for m in maps.double().numpy()]
    assert np.allclose(E[0].double(), want, atol=TOLERANCE[maps.dtype]), (E, want)
    done["entropy"] += len(maps)


def check_scaled(maps, k):
    "As the map divided by 2**n, of which the gradient is 2**n times as large."
    power = 2. ** np.floor(np.log2(float(maps.double().abs().max())))
    E, g = gpu_kernels.entropy_and_gradient(maps[None], 8, k, 0., True)
    for m, e, slope in zip(maps.double().numpy() / power, E[0].tolist(), g[0].double().numpy()):
        want, bent, _, size = oracle(m, 8, k, 0.)
        least = float(torch.finfo(torch.float64 if maps.dtype == torch.float64 else torch.float32).tiny)
        off = np.abs(slope - bent / power).max()
        assert abs(e - want) <= TOLERANCE[maps.dtype], (maps.dtype, power, k, e, want)
        assert off <= 10 * TOLERANCE[maps.dtype] * size / power + least, (maps.dtype, power, k, off, size / power)
        done["entropy"] += 1
        done["gradient"] += 1


def through_the_front_door():
    "The operators as they run on a CUDA device: loss, backward, counting."
    operators._kernels = lambda device: gpu_kernels
    x = torch.randn(2, 3, 7, 7)
    x[0, 0, 3, 3] = torch.nan
    want, clear = operators.clear_entropy(x.flatten(0, 1))
    for dtype in (torch.float32, torch.float16):
        leaf, loss = x.clone().to(dtype).requires_grad_(), se.SpatialEntropyLoss()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(leaf)
        value.backward()
        assert loss.left_out == 1 and abs(value.item() - want[1:].mean().item()) < 1e-2 and leaf.grad.dtype == dtype
        if dtype == torch.float32:
            assert torch.allclose(leaf.grad.flatten(0, 1), clear / 5, atol=1e-7) and abs(value.item() - want[1:].mean().item()) < 1e-6
    leaf = x.clone().requires_grad_()
    weights = torch.rand(2, 3)
    (se.spatial_entropy(leaf).nan_to_num() * weights).sum().backward()
    assert torch.allclose(leaf.grad.flatten(0, 1), clear * weights.view(6, 1, 1), atol=1e-7)


if __name__ == "__main__":
    main()
