"""The CUDA kernels in Triton's interpreter, on the CPU, against the oracle. Run in a process of its own by test_gpu_kernels.py."""
import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("ignore", module="triton")      # numpy, on lanes that are masked out

import numpy as np
import torch
from kinds import STRUCTURE, blob, dots, kinds, oracle, serpentine, smooth, spiral
from scipy import ndimage

import spatial_entropy as se
from spatial_entropy import gpu_kernels, operators

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
done = dict(entropy=0, gradient=0, labels=0)


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


def check_labels(mask, connectivity):
    got = gpu_kernels.label_regions(mask[None], connectivity)[0].numpy()
    want = np.stack([ndimage.label(m, STRUCTURE[connectivity])[0] for m in mask.numpy()])
    assert got.dtype == np.int32 and np.array_equal(got, want), (mask.shape, connectivity)
    done["labels"] += len(mask)


def both_forms(h, w, run):
    "The form that the size asks for, and for small maps the tiled one too."
    run()
    if h * w <= 100:
        kept = gpu_kernels.GATHER_CELLS, gpu_kernels.TILE
        gpu_kernels.GATHER_CELLS, gpu_kernels.TILE = 0, 16
        try:
            run()
        finally:
            gpu_kernels.GATHER_CELLS, gpu_kernels.TILE = kept


def main():
    for h, w in [(1, 1), (1, 9), (9, 1), (2, 3), (5, 7), (7, 7), (14, 14), (13, 17), (16, 16)]:
        rng = np.random.default_rng(h * w)
        maps = torch.tensor(kinds(36, h, w, rng))[:: 1 if h * w < 100 else 2]
        maps = torch.cat([maps, maps[-2:].clone()])
        maps[-1, 0, 0], maps[-2, -1, -1] = torch.nan, -torch.inf
        for connectivity in (8, 4):
            both_forms(h, w, lambda: (check(maps.float(), connectivity), check_labels(maps > maps.mean((1, 2), keepdim=True), connectivity)))
    for dtype in TOLERANCE:
        for k in (1., 0., 1.5):
            maps = torch.tensor(np.abs(smooth(4, 14, 14, 1, np.random.default_rng(3)))).to(dtype)
            check(maps, 8, k)
            check(maps[:, ::2, 1::3], 4, k)                                     # strides
    for h, w in [(33, 35), (64, 64)]:
        rng = np.random.default_rng(h)
        maps = torch.tensor(np.concatenate([smooth(1, h, w, 1, rng), blob(1, h, w, rng), spiral(h, w)[None], dots(h, w)[None], serpentine(h, w)[None]]))
        check(maps.float())
        check_labels(maps > .5, 8)
    through_the_front_door()
    print(done)


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
