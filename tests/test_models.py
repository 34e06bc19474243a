"""Every family against an unfused reference: the same maps, the same gradients, at two image sizes."""
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.families import find

sys.path.insert(0, str(Path(__file__).parent))
from reference import FOLDS, Calls, grid_fold, swin_hf_fold  # noqa: E402
from zoo import HF, OTHERS, REFUSED, TIMM  # noqa: E402

CASES = [(spec, size) for spec in TIMM for size in spec.sizes]


def weights(maps):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(m.shape, generator=g) / m.detach().std() for m in maps]


def same_gradients(model, other):
    largest = max(p.grad.abs().max().item() for p in other.parameters() if p.grad is not None)
    assert largest > 0
    for (name, p), (_, r) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (r.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, r.grad, atol=1e-3 * largest, rtol=1e-3, msg=lambda m: f"{name}: {m}")


def against_reference(model, inputs, fold, layers):
    """Maps of all layers, and gradients of a random sum of them, from the tap and from the reference."""
    other = deepcopy(model)
    names = [n for n, _, _ in find(model).layers]
    assert len(names) == layers
    _, calls = Calls(find(other).model, names).run_on(other, inputs)
    want = [fold(c, find(other).model) for c in calls]
    with se.AttentionTap(model, "all") as tap:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    got = list(tap.maps().values())
    for w, g, n in zip(want, got, names, strict=True):
        assert w.std() > 0
        assert_close(g, w, atol=1e-4 * w.abs().max().item(), rtol=1e-4, msg=lambda m: f"{n}: {m}")
    scale = weights(want)
    sum((m * s).sum() for m, s in zip(got, scale)).backward()
    sum((m * s).sum() for m, s in zip(want, scale)).backward()
    same_gradients(model, other)
    return got


@pytest.mark.parametrize("spec,size", CASES, ids=[f"{s.name}-{h}x{w}" for s, (h, w) in CASES])
def test_timm(spec, size):
    model, x = spec.make(size), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = against_reference(model, x, lambda c, m: FOLDS[spec.fold](c, m, spec, size), spec.layers)
    assert all(m.dtype == torch.float32 and m.shape[0] == 2 for m in maps)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(se.UnsupportedModel, match=REFUSED[name]):
        se.AttentionTap(timm.create_model(name))


def other_cases(specs):
    return [pytest.param(s, size, id=f"{s.name}-{size[0]}x{size[1]}") for s in specs for size in s.sizes]


def fold_of(spec, size):
    fold = swin_hf_fold if spec.fold == "swin" else grid_fold
    return lambda c, m: fold(c, m, spec, size)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("spec,size", other_cases(HF))
def test_transformers(spec, size, attn):
    pytest.importorskip("transformers")
    if spec.name.startswith("Swinv2") and attn == "sdpa":
        pytest.skip("transformers has no sdpa for Swin V2")
    model, x = spec.make(size, attn=attn), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    against_reference(model, dict(pixel_values=x), fold_of(spec, size), spec.layers)


@pytest.mark.parametrize("spec,size", other_cases(OTHERS))
def test_multihead_attention(spec, size):
    pytest.importorskip("open_clip" if "open" in spec.name else "torchvision")
    model, x = spec.make(size), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    against_reference(model, x, fold_of(spec, size), spec.layers)
