"""Hugging Face's vision classes: maps against unfused attention, places by changing one patch, queries by the output's gradient."""
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.families import find

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from reference import Calls, hf_fold  # noqa: E402
from zoo_transformers import SPECS  # noqa: E402


def cases(specs):
    return [pytest.param(s, size, id=f"{s.name}-{i}-{size[0]}x{size[1]}") for i, s in enumerate(specs) for size in s.sizes]


def first_tensor(out):
    return out[-1] if isinstance(out, (list, tuple)) else out


@pytest.mark.parametrize("spec,size", cases(SPECS))
def test_maps(spec, size):
    """The tap's maps are those of unfused attention, laid out by the model's own functions, on every implementation."""
    for attn in spec.attn:
        model, inputs = spec.make(size, attn), spec.given(size)
        with se.AttentionTap(model, "all") as tap, torch.no_grad():
            model(**inputs, **spec.kwargs)
            maps = tap.maps()
        names = [n for n, _, _ in find(model).layers]
        assert len(names) == spec.layers
        other = deepcopy(model)
        with torch.no_grad():
            _, calls = Calls(find(other).model, names).run_on(other, inputs | spec.kwargs)
        for call, name, m in zip(calls, names, maps.values(), strict=True):
            want = hf_fold(call, spec, size)
            assert want.std() > 0
            assert_close(m, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4, msg=lambda e, at=(attn, name): f"{at}: {e}")


def changed(inputs, size, corner, step):
    """The same batch with one square of pixels replaced, by other ones in each picture."""
    (y, x), new = corner, {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    square = new["pixel_values"][..., y:y + step, x:x + step]
    square.copy_(torch.rand(square.shape, generator=torch.Generator().manual_seed(7)) * 4 - 2)
    return new


def corners(h, w):
    return sorted({(0, 0), (h - 1, w - 1), (h // 3, w // 2)})


@pytest.mark.parametrize("spec,size", cases(SPECS))
def test_geometry(spec, size):
    """One patch changed: in every layer of the first grid the map changes most where that patch lies."""
    model, inputs = spec.make(size), {k: v.repeat(4, *[1] * (v.ndim - 1)) for k, v in spec.given(size).items()}
    with se.AttentionTap(model, "all") as tap, torch.no_grad():
        model(**inputs, **spec.kwargs)
        before = tap.maps()
        h, w = before[0].shape[-2:]
        cell = size[0] // h, size[1] // w
        for y, x in corners(h, w):
            model(**changed(inputs, size, (y * cell[0], x * cell[1]), cell[0]), **spec.kwargs)
            for i, m in tap.maps().items():
                if m.shape[-2:] != (h, w):
                    break
                at = divmod((m - before[i]).abs().sum((0, 1)).argmax().item(), w)
                off = max(abs(at[0] - y), abs(at[1] - x))
                assert off <= spec.near, f"layer {i}: patch ({y}, {x}) of {h}×{w}; the map changed at {at}"


@pytest.mark.parametrize("spec", SPECS, ids=[f"{s.name}-{i}" for i, s in enumerate(SPECS)])
def test_query(spec):
    """The tokens whose output the model's own output reads are those that the query "auto" stands for."""
    size = spec.sizes[0]
    model, inputs, kept = spec.make(size), spec.given(size), []
    found = find(model)
    name, layer, kind = found.layers[-1]
    keep = layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    out = first_tensor(getattr(model(**inputs, **spec.kwargs), spec.output))
    keep.remove()
    kept[0].retain_grad() if kept[0].requires_grad else None
    g, = torch.autograd.grad((out * torch.randn_like(out)).sum(), kept[0], allow_unused=True)
    assert g is not None, f"{spec.name}: the output does not read {name}"
    said = "pool" if kind.one_query else found.adapter.reads if isinstance(found.adapter.reads, str) else found.adapter.reads(found.model)
    assert said == spec.reads or said == "cls" and spec.reads == "mean" and not spec.prefix
    if said == "pool" or spec.fold == "swin":
        return
    share = g.abs().sum(-1).reshape(-1, g.shape[-2]).mean(0)
    share = share / share.sum()
    n = len(share) - spec.suffix
    parts = dict(cls=share[:min(spec.prefix, 1)].sum().item(), mean=share[spec.prefix:n].sum().item(), suffix=share[n:].sum().item())
    assert parts[said] > .5, f'{spec.name} reads {parts}, the query "auto" says {said}'
