"""Head scores against slow oracles: plain Python loops over maps, scipy's labels, float64."""
import csv
import math
import os
from collections import UserDict
from itertools import islice
from math import isnan
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import STRUCTURE, kinds
from scipy import ndimage
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import spatial_entropy as se
from spatial_entropy.analysis import heads as module
from spatial_entropy.analysis.chance import entropy_against_chance
from spatial_entropy.analysis.evaluation import score_masks
from spatial_entropy.analysis.heads import Heads, entropy_heatmap, framed_maps, head_maps, rank_heads
from spatial_entropy.analysis.localization import elbow, localization_entropy, localization_heads
from spatial_entropy.analysis.masks import mask_jaccard, pointing
from spatial_entropy.analysis.outliers import outliers
from spatial_entropy.attention.tap import AttentionTap

pytestmark = pytest.mark.filterwarnings("ignore:spatial_entropy. got maps with NaN")  # said once a process, wherever that is
NAN, INF = float("nan"), float("inf")


# ---- the oracles -----------------------------------------------------------------------------------------------------

def entropy_of_shares(P):
    return sum(-p * math.log(p) for p in P if p > 0)


def regions_of(on):
    labels, R = ndimage.label(on, STRUCTURE[8])
    return [labels == n for n in range(1, R + 1)]


def plain_entropy(s, kept=None):
    "Spatial entropy and number of regions of the cells that are kept."
    s, kept = np.asarray(s, float), np.ones(np.shape(s), bool) if kept is None else kept
    if not np.isfinite(s).all():
        return NAN, NAN
    if not kept.any():
        return 0., 0
    d = s - s[kept].min()
    a = np.where(kept, d - d[kept].mean(), 0)
    a[a < 0] = 0
    found = regions_of(a > 0)
    return entropy_of_shares([a[c].sum() / a.sum() for c in found]), len(found)


def localization_oracle(s, variant, threshold=1e-3):
    s = np.asarray(s, float)
    if not np.isfinite(s).all():
        return NAN
    d = s - s.flat[0]
    a = np.maximum(d - d.mean(), 0)
    found = regions_of(a > threshold)
    if variant == "paper":
        total = sum(a[c].sum() for c in found)
        return entropy_of_shares([a[c].sum() / total for c in found]) if found else INF
    return entropy_of_shares([a[c].sum() / a.sum() for c in found]) if a.sum() > 0 else INF


def chord_distances(values):
    "Distance of each sorted point to the chord, in the plane."
    y = np.sort(np.asarray(values, float))
    start, end = np.array([0, y[0]]), np.array([len(y) - 1., y[-1]])
    out = []
    for i, v in enumerate(y):
        (dx, dy), (px, py) = end - start, np.array([i, v]) - start
        out.append(abs(dx * py - dy * px) / math.hypot(dx, dy) if len(y) > 1 else 0.)
    return y, out


def elbow_value(values):
    y, far = chord_distances(values)
    return y[int(np.argmax(far))]


def far_oracle(s, k, most):
    s = np.asarray(s, float)
    d = s - s.flat[0]
    d = d - np.median(d)
    reach = np.sort(d.ravel())[int((1 - most) * (d.size - 1) + 1e-9)]
    if reach <= 4 * np.finfo(float).eps * abs(s).max():
        reach = abs(d).mean()
    return (d > k * reach) & (d > 4 * np.finfo(float).eps * abs(s).max())


def softmax(s):
    return s.flatten(-2).softmax(-1).view(s.shape)


# ---- maps and models -------------------------------------------------------------------------------------------------

def weights(n, h, w, seed=0):
    "n attention maps (n, h, w) float64 of every kind: smooth, spiky, flat, faint, one cell, none."
    rng = np.random.default_rng(seed)
    s = torch.tensor(kinds(n, h, w, rng))
    p = softmax((s - s.mean()) / s.std()) * torch.tensor(rng.uniform(.1, 1, (n, 1, 1)))
    p[0], p[1], p[2] = 0, 1 / (h * w), 0
    p[2, h // 2, w // 2] = .7
    faint = torch.tensor(rng.uniform(-2e-3, 2e-3, (n // 4, h, w))) + .01
    return torch.cat([p, faint])


def vit(heads=(3, 3), dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    m = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=4, num_classes=5, embed_dim=48, depth=len(heads), num_heads=heads[0], **kwargs)
    for block, h in zip(m.blocks, heads):
        block.attn = timm.layers.Attention(48, h, qkv_bias=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(.2 * torch.randn_like(p))
    return m.to(dtype).eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def objects():
    masks = torch.zeros(10, 16, 16, dtype=torch.bool)
    for i in range(9):
        masks[i, i:i + 6, 2:9] = True
    return masks  # the last one is empty


class Fake(torch.nn.Module):
    "A model whose maps are given: its pictures are their numbers."

    def __init__(self, maps):
        super().__init__()
        self.maps, self.now = maps, None

    def forward(self, x):
        self.now = x[:, 0, 0, 0].long()


class FakeTap:
    frame = 0, 0, 1, 1

    def __init__(self, model, block="all", query="auto", softmax=False):
        self.model, self.softmax, self.blocks = model, softmax, list(model.maps)
        self.found = SimpleNamespace(model=model)

    def maps(self):
        found = {b: m[self.model.now] for b, m in self.model.maps.items()}
        return {b: softmax(m) for b, m in found.items()} if self.softmax else found

    def valid(self):
        return dict.fromkeys(self.blocks)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def numbered(n, size):
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2)
    return list(x.split(size))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(module, "AttentionTap", FakeTap)
    return Fake


# ---- localization_entropy --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["paper", "as_released"])
@pytest.mark.parametrize("h,w", [(1, 1), (1, 9), (3, 5), (8, 8), (14, 14), (5, 70)])
def test_localization_entropy_is_the_oracles(h, w, variant):
    maps = weights(120, h, w)
    for threshold in (1e-3, 0., .01):
        want = torch.tensor([localization_oracle(s, variant, threshold) for s in maps])
        # the same cells count unless one lies on the threshold by rounding
        assert_close(localization_entropy(maps, variant, threshold), want.double(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("variant", ["paper", "as_released"])
@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0., .0005, .00099, .00101, .0015, .002, .01, .3]), min_size=12, max_size=12))
def test_localization_entropy_around_the_threshold(variant, excess):
    a = np.array(excess).reshape(3, 4)
    low = a == 0
    s = .02 + a - np.where(low, a.sum() / max(low.sum(), 1), 0)     # the mean stays at 0.02 if a cell is left to pay for it
    s = np.maximum(s, 0)
    got = localization_entropy(torch.tensor(s), variant).item()
    want = localization_oracle(s, variant)
    assert got == want or abs(got - want) < 1e-12


def test_the_variants_differ_where_the_page_says():
    m = weights(200, 8, 8)
    paper, released = (localization_entropy(m, v) for v in ("paper", "as_released"))
    d = m - m.mean((-2, -1), keepdim=True)
    mass, total = torch.where(d > 1e-3, d, 0).sum((-2, -1)), d.relu().sum((-2, -1))
    q = mass / total
    some = (mass > 0)
    assert_close(released[some], (q * paper)[some] - (q * q.log())[some], atol=1e-9, rtol=1e-9)
    only_faint = (mass == 0) & (total > 1e-6)
    assert only_faint.any() and paper[only_faint].isinf().all() and (released[only_faint] == 0).all()
    assert released[0].isinf() and released[1].isinf() and paper[0].isinf() and paper[1].isinf()    # constant maps


def test_localization_entropy_shapes_dtypes_and_broken_maps():
    m = weights(40, 6, 7)[:40].view(2, 4, 5, 6, 7)
    whole = localization_entropy(m)
    assert whole.shape == (2, 4, 5) and whole.dtype == torch.float64 and localization_entropy(m[0, 0, 0]).shape == ()
    single = localization_entropy(m.float())
    assert single.dtype == torch.float32 and localization_entropy(m.half()).dtype == torch.float32
    assert (single - whole).nan_to_num().abs().median() < 1e-6
    assert localization_entropy(m[:0]).shape == (0, 4, 5)
    broken = m[0, 0].clone()
    broken[1, 0, 0], broken[2, 0, 0], broken[3, 0, 0] = NAN, INF, -INF
    for v in ("paper", "as_released"):
        E = localization_entropy(broken, v)
        assert E.isnan().tolist() == [False, True, True, True, False]
    x = m.clone().requires_grad_()
    assert not localization_entropy(x).requires_grad


def test_localization_entropy_refuses():
    for bad, said in [(dict(maps=torch.randn(3, 3)), "softmax=True"), (dict(maps=torch.full((3, 3), 2.)), "softmax=True"),
                      (dict(maps=torch.rand(9)), "expected"), (dict(maps=torch.rand(3, 3), variant="released"), "as_released"),
                      (dict(maps=torch.rand(3, 3), threshold=-1), "threshold: got -1"), (dict(maps=torch.rand(3, 3), threshold=NAN), "threshold: got nan")]:
        with pytest.raises(ValueError, match=said):
            localization_entropy(**bad)
    with pytest.raises(TypeError, match="expected a tensor"):
        localization_entropy([[.1]])


# ---- elbow -----------------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_elbow_is_the_point_furthest_from_the_chord(values):
    at = elbow(torch.tensor(values, dtype=torch.float64)).item()
    y, far = chord_distances(values) if max(values) > min(values) or len(values) > 1 else (np.array(values), [0.])
    same = [f for f, v in zip(far, y) if v == values[at]]
    assert max(same) >= max(far) - 1e-9 * (1 + max(map(abs, values)))
    if max(far) == 0:
        assert values[at] == min(values)


def test_elbow_knows_neither_order_nor_units():
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        v = torch.rand(23, generator=g, dtype=torch.float64) ** 3
        p = torch.randperm(23, generator=g)
        assert v[elbow(v)] == v[p][elbow(v[p])] == v[elbow(1000 * v - 7)]
        assert_close(v[elbow(v)].item(), elbow_value(v.numpy()))


def test_elbow_in_batches_with_ties_and_nan():
    g = torch.Generator().manual_seed(1)
    v = torch.rand(6, 5, 17, generator=g, dtype=torch.float64) ** 4
    v[0, 0, 3:9] = NAN
    v[1, 2, 4:] = NAN
    v[2] = v[2].round(decimals=1)
    at = elbow(v)
    assert at.shape == (6, 5) and at.dtype == torch.int64
    for i in np.ndindex(6, 5):
        known = v[i][~v[i].isnan()]
        assert at[i] == elbow(v[i]) and v[i][at[i]] == known[elbow(known)]
    assert elbow([1., 2.]) == 0 and elbow([2., 1.]) == 1 and elbow([4.]) == 0 and elbow([3, 1, 2, 9]) == 0
    assert elbow(torch.tensor([.9801, .981, .98, .9802])) == 3     # gaps of less than a thousandth count
    line = torch.linspace(.1, .7, 30)
    assert elbow(line) == 0 and elbow(line.flip(0)) == 29         # float32 steps are not all alike, but that is rounding


@pytest.mark.parametrize("bad", [[], [NAN], [1., INF], 3., [[1., 2.], [NAN, NAN]]])
def test_elbow_refuses(bad):
    with pytest.raises(ValueError, match="sums: got shape"):
        elbow(bad)


# ---- localization_heads ----------------------------------------------------------------------------------------------

def slow_localization(maps, variant, top):
    "Selection frequencies, head by head and image by image. maps: {layer: (B, H, h, w)}"
    names = [(layer, h) for layer in sorted(maps) for h in range(maps[layer].shape[1])]
    chosen, images = {n: 0 for n in names}, len(next(iter(maps.values())))
    known = {n: 0 for n in names}
    for b in range(images):
        sums = [float(maps[layer][b, h].double().sum()) if maps[layer][b, h].isfinite().all() else NAN for layer, h in names]
        E = [localization_oracle(maps[layer][b, h], variant) for layer, h in names]
        fine = [s for s in sums if s == s]
        candidates = []
        if fine:
            cut = elbow_value(fine)
            at = min((i for i, s in enumerate(sums) if s == cut))
            passing = [s == s and (s >= cut if variant == "paper" else i >= at) for i, s in enumerate(sums)]
            candidates = sorted((e, i) for i, (e, p) in enumerate(zip(E, passing)) if p and math.isfinite(e))
        for n, e in zip(names, E):
            known[n] += e == e
        for _, i in candidates[:top]:
            chosen[names[i]] += 1
    return {n: (chosen[n] / known[n] if known[n] else NAN, known[n]) for n in names}


def many_maps(images=14):
    rng = np.random.default_rng(3)
    return {5: weights(images * 6, 5, 6, 1)[:images * 6].view(images, 6, 5, 6)[torch.tensor(rng.permutation(images))],
            2: weights(images * 3, 4, 4, 2)[:images * 3].view(images, 3, 4, 4)}


@pytest.mark.parametrize("variant", ["paper", "as_released"])
@pytest.mark.parametrize("top", [1, 3, 100])
def test_localization_heads_is_the_naive_loop(variant, top):
    maps = many_maps()
    maps[2][3, 1, 0, 0] = NAN
    maps[5][7, :, 1, 1] = INF
    maps[2][7] = NAN                                               # an image of nothing but broken maps
    want, got = slow_localization(maps, variant, top), localization_heads(maps, variant, top)
    assert got.by == "selected" and len(got) == 9
    for (layer, h), (share, known) in want.items():
        r = got[layer, h]
        assert r["images"] == known and r["broken"] == 14 - known
        assert_close(r["selected"], share)
    assert [r["selected"] for r in got] == sorted((r["selected"] for r in got), reverse=True)


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_localization_heads_takes_tensors_dictionaries_and_streams(variant):
    maps = weights(7 * 2 * 3, 5, 5, 4)[:42].view(7, 2, 3, 5, 5)
    whole = list(localization_heads(maps, variant, 2))
    assert_rows(list(localization_heads({1: maps[:, 1], 0: maps[:, 0]}, variant, 2)), whole)
    assert_rows(list(localization_heads(maps.split(3), variant, 2)), whole)
    assert_rows(list(localization_heads(({0: m[:, 0], 1: m[:, 1]} for m in maps.split(2)), variant, 2)), whole)
    assert_rows(list(localization_heads([maps[5:], maps[:0], maps[:5]], variant, 2)), whole)


def assert_rows(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k] == b[k] or a[k] != a[k] and b[k] != b[k] or abs(a[k] - b[k]) < 1e-9, (k, a, b)


def test_localization_heads_refuses():
    maps = weights(16, 4, 4)[:16].view(2, 2, 4, 4, 4)
    for bad, said in [(maps[0], "expected images × layers"), ({0: maps[0, 0]}, "expected \\(B, H, h, w\\)"), ({0: maps[0], 1: maps[1, :1]}, "as many"),
                      (maps[:0], "no image"), ([], "no image"), ([maps, maps[:, :, :2]], "block 0: got 2 heads after 4"), (-maps - 1, "softmax=True")]:
        with pytest.raises(ValueError, match=said):
            localization_heads(bad)
    with pytest.raises(TypeError, match="expected a tensor or a dictionary"):
        localization_heads([[1.]])
    for top in (0, 2.5):
        with pytest.raises(ValueError, match="top: got"):
            localization_heads(maps, top=top)
    with pytest.raises(ValueError, match="variant"):
        localization_heads(maps, "code")


# ---- rank_heads ------------------------------------------------------------------------------------------------------

def slow_rank(model, pictures, masks=None):
    "One picture, one block at a time, and every number by a loop."
    found = {}
    for i, x in enumerate(pictures):
        for block in range(len(model.blocks)):
            s, p = (one_pass(model, x, block, soft) for soft in (False, True))
            for h in range(s.shape[1]):
                E, R = plain_entropy(s[0, h])
                row = [E, R, R == 0, float(p[0, h].sum())]
                if masks is not None:
                    m = masks[i].numpy()
                    on_top = np.array([[s[0, h, y * s.shape[2] // m.shape[0], x * s.shape[3] // m.shape[1]] == s[0, h].max() for x in range(m.shape[1])]
                                       for y in range(m.shape[0])])
                    row += [float(mask_jaccard(s[:, h:h + 1], masks[i:i + 1])), m[on_top].mean()] if m.any() else [np.nan] * 2   # no object
                found.setdefault((block, h), []).append(row)
    return {k: np.nanmean(np.array(v, float), 0) for k, v in found.items()}


def one_pass(model, x, block, soft):
    with torch.no_grad(), AttentionTap(model, block, softmax=soft) as tap:
        model(x[None])
        return tap.maps()


@pytest.mark.parametrize("kwargs", [{}, dict(class_token=False, global_pool="avg"), dict(reg_tokens=2)])
def test_rank_heads_is_the_naive_loop(pictures, objects, kwargs):
    model = vit((3, 4), **kwargs)
    want = slow_rank(model, pictures, objects)
    got = rank_heads(model, list(zip(pictures.split(4), objects.split(4))))
    assert len(got) == 7 and got.blocks == [0, 1]
    for k, v in want.items():
        r = got[k]
        assert_close(torch.tensor([r[c] for c in ("entropy", "regions", "empty", "attention", "jaccard", "pointing")], dtype=torch.float64),
                     torch.tensor(v), atol=1e-6, rtol=0)                                    # Jaccard and maps' sums come in float32
        assert r["images"] == 10 and r["broken"] == 0
    assert got.grid().shape == (2, 4) and got.grid().isnan().tolist() == [[False] * 3 + [True], [False] * 4]


def test_entropy_stands_beside_the_chance_level_of_each_picture(pictures):
    "Of surrogates from a picture's own seed, so that no other picture has a say; and how dense the maps are."
    model, many = vit(), 64
    got = rank_heads(model, pictures.split(4), by="below_chance", surrogates=many)
    assert [r["below_chance"] for r in got] == sorted((r["below_chance"] for r in got), reverse=True)
    for block, s in next(head_maps(model, [pictures])).items():
        want = entropy_against_chance(s, many, seed=1).mean()             # other surrogates
        assert_close(got.grid("entropy_chance")[block].mean(), torch.tensor(want["chance"]).double(), atol=.03, rtol=0)
        assert_close(got.grid("density")[block], (s > s.mean((-2, -1), keepdim=True)).double().mean((0, 2, 3)))
    assert_close(got.grid("below_chance"), got.grid("entropy_chance") - got.grid("entropy"))
    none = rank_heads(model, [pictures], surrogates=0)
    assert {*got[0]} - {*none[0]} == {"entropy_chance", "below_chance"} and torch.equal(none.grid("density"), got.grid("density"))
    with pytest.raises(ValueError, match="by: got 'below_chance', expected one of entropy, regions, empty, attention"):
        rank_heads(model, [pictures], by="below_chance", surrogates=0)


def test_pointing_is_the_one_definition(pictures, objects):
    "The share of the brightest cell's pixels on the object, not whether its centre hits."
    model = vit()
    got = rank_heads(model, [(pictures, objects)], by="pointing")
    for block in (0, 1):
        every = torch.cat([pointing(one_pass(model, x, block, False), m[None]) for x, m in zip(pictures, objects)]).nanmean(0)
        assert_close(got.grid("pointing")[block], every, atol=1e-6, rtol=0)
    flat = torch.zeros(1, 1, 4, 4)
    assert pointing(flat, objects[:1]).item() == pytest.approx(objects[0].float().mean().item())


def test_neither_order_nor_batch_size_is_seen(pictures, objects):
    model, whole = vit((3, 6)), None
    for size, seed in [(10, None), (1, 0), (3, 1), (7, 2)]:
        at = torch.arange(10) if seed is None else torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        rows = list(rank_heads(model, list(zip(pictures[at].split(size), objects[at].split(size)))))
        whole = whole or rows
        assert_rows(rows, whole)


def test_what_loaders_give(pictures):
    model = vit()
    want = list(rank_heads(model, [pictures]))
    labels = torch.zeros(10, dtype=torch.long)
    for batch in [(pictures, labels), [pictures, labels, labels], dict(pixel_values=pictures, labels=labels), UserDict(pixel_values=pictures),
                  dict(image=pictures), (pictures,), pictures.float()]:
        got = rank_heads(model, [batch])
        assert_rows(list(got), want) if _double(batch) else len(got) == len(want)
        assert "jaccard" not in got[0]
    data = torch.utils.data.TensorDataset(pictures, labels)
    assert_rows(list(rank_heads(model, DataLoader(data, 4))), want)
    assert_rows(list(rank_heads(model, [pictures[:0], pictures])), want)
    for bad, error, said in [([pictures[0]], ValueError, "got pictures of shape \\(3, 32, 32\\), expected batches"), (data, ValueError, "DataLoader"),
                             ([dict(pixels=pictures)], TypeError, "keys pixels; expected one of pixel_values"), ([["a"]], TypeError, "batch of str"),
                             ([], ValueError, "no picture"), ([pictures[:0]], ValueError, "no picture")]:
        with pytest.raises(error, match=said):
            rank_heads(model, bad)


def _double(batch):
    x = batch if isinstance(batch, torch.Tensor) else next(iter(batch.values())) if hasattr(batch, "values") else batch[0]
    return x.dtype == torch.float64


def test_masks_from_the_loader_or_a_function(pictures, objects):
    model = vit()
    want = list(rank_heads(model, [(pictures, objects)], by="jaccard"))
    assert want[0]["jaccard"] == max(r["jaccard"] for r in want) > 0
    assert_rows(list(rank_heads(model, [dict(pixel_values=pictures, mask=objects)], by="jaccard")), want)
    assert_rows(list(rank_heads(model, [(pictures, 0, objects.int())], by="jaccard", masks=lambda batch: batch[2])), want)
    assert "jaccard" not in rank_heads(model, [(pictures, objects)], masks=None)[0]
    for batch, said in [((pictures, objects), "expected \\(10, S, S\\) bool"), ((pictures, 0), "expected \\(10, S, S\\) bool")]:
        with pytest.raises(ValueError, match=said):
            rank_heads(model, [batch], masks=lambda b: b[1][:3] if isinstance(b[1], torch.Tensor) else b[1])
    for by, masks in [("jaccard", "auto"), ("pointing", "auto"), ("jaccard", None), ("images", "auto"), ("selected", "auto")]:
        with pytest.raises(ValueError, match="by: got"):
            rank_heads(model, [pictures], by=by, masks=masks)


def test_the_model_is_left_as_it_was(pictures):
    model = vit(pos_drop_rate=.5).train()
    model.blocks[0].eval()                                         # frozen by its owner
    was = {n: m.training for n, m in model.named_modules()}
    classes = {n: type(m) for n, m in model.named_modules()}
    first = list(rank_heads(model, [pictures]))
    assert_rows(list(rank_heads(model, [pictures])), first)        # dropout was off
    after = lambda: ({n: m.training for n, m in model.named_modules()}, {n: type(m) for n, m in model.named_modules()})
    assert after() == (was, classes)
    with pytest.raises(ValueError):
        rank_heads(model, [pictures, pictures[0]])
    assert after() == (was, classes)
    stream = head_maps(model, [pictures, pictures])
    next(stream)
    assert not model.training and torch.is_grad_enabled()          # gradients are off in the forward pass only
    stream.close()
    assert after() == (was, classes) and all(p.grad is None for p in model.parameters())


def test_head_maps_are_the_taps_and_lazy(pictures):
    model = vit((3, 4, 2))

    def endless():
        while True:
            yield pictures[:2]

    for soft in (False, True):
        want = [torch.stack([one_pass(model, x, block, soft)[0] for x in pictures[:2]]) for block in range(3)]
        for maps in islice(head_maps(model, endless(), softmax=soft), 3):
            for block in range(3):
                assert_close(maps[block], want[block])
            assert not maps[0].requires_grad
    assert list(next(head_maps(model, endless(), block=-1))) == [2]
    assert sorted(next(head_maps(model, endless(), block=[0, 2]))) == [0, 2]
    patch = next(head_maps(model, endless(), block=1, query=(2, 3)))[1]
    assert patch.shape == (2, 4, 8, 8) and not torch.equal(patch, next(head_maps(model, endless(), block=1))[1])


def test_blocks_of_a_hierarchy_with_different_heads_and_grids():
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 4)).eval()
    x = torch.randn(3, 3, 64, 64)
    got = rank_heads(swin, x.split(2))
    assert got.grid().isnan().tolist() == [[False, False, True, True], [False] * 4]
    for block, m in next(head_maps(swin, [x])).items():
        for h in range(m.shape[1]):
            assert_close(got[block, h]["entropy"], float(np.mean([plain_entropy(s)[0] for s in m[:, h]])), atol=1e-5, rtol=0)
    assert len(localization_heads(head_maps(swin, [x], softmax=True))) == 6


def test_a_hugging_face_model_and_its_batches():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    model = transformers.ViTModel(config).train()
    x = torch.randn(4, 3, 32, 32)
    batch = transformers.BatchFeature(dict(pixel_values=x, labels=torch.zeros(4)))
    got = rank_heads(model, [batch])
    assert len(got) == 6 and model.training and got[0]["images"] == 4
    assert_rows(list(got), list(rank_heads(model, [x])))


def test_broken_and_empty_maps_are_counted_and_left_out(fake):
    torch.manual_seed(0)
    maps = {0: torch.randn(6, 2, 4, 4), 4: torch.randn(6, 3, 3, 5)}
    maps[0][2, 1, 0, 0], maps[0][3, 1], maps[4][:, 0], maps[4][:, 2] = NAN, .1, INF, 7.
    got = rank_heads(fake(maps), numbered(6, 4), attention=False)
    for b, m in maps.items():
        for h in range(m.shape[1]):
            E = np.array([plain_entropy(s) for s in m[:, h]])
            fine, r = ~np.isnan(E[:, 0]), got[b, h]
            assert (r["images"], r["broken"]) == (fine.sum(), (~fine).sum())
            if fine.any():
                assert_close([r["entropy"], r["regions"], r["empty"]], [*E[fine].mean(0), (E[fine, 1] == 0).mean()], atol=1e-6, rtol=0)
            else:
                assert all(math.isnan(r[c]) for c in ("entropy", "regions", "empty"))
    assert [(r["block"], r["head"]) for r in got][-2:] in ([(4, 2), (4, 0)], [(4, 0), (4, 2)])   # always empty, and never a map
    assert got[4, 2]["entropy"] == 0 and got[4, 2]["empty"] == 1
    assert "attention" not in got[0]


def test_memory_of_one_batch_only(fake):
    "A million pictures would do: nothing grows with the number of batches."
    maps = {0: torch.randn(5, 2, 4, 4)}
    model, once = fake(maps), numbered(5, 5)
    many = rank_heads(model, (b for _ in range(200) for b in once))
    for r, w in zip(many, rank_heads(model, once)):
        assert r["images"] == 1000 and w["images"] == 5
        assert_close([r["entropy"], r["attention"]], [w["entropy"], w["attention"]], atol=1e-12, rtol=0)


def test_device_is_checked(pictures):
    with pytest.raises(ValueError, match="device: got 'nowhere'"):
        rank_heads(vit(), [pictures], device="nowhere")
    assert rank_heads(vit(dtype=torch.float32), [pictures], device="cpu")[0]["images"] == 10       # float64 pictures, float32 model


# ---- the table and its picture ---------------------------------------------------------------------------------------

def rows(blocks=(0, 3), heads=(2, 3)):
    return [dict(block=b, head=h, entropy=(b + 1) / (h + 2), jaccard=.1 * h + .01 * b, images=4, broken=0) for b, n in zip(blocks, heads) for h in range(n)]


def test_the_table(tmp_path):
    t = Heads(rows())
    assert t[0] == min(rows(), key=lambda r: r["entropy"]) and t[-1] == max(rows(), key=lambda r: r["entropy"]) and len(t[:2]) == 2
    assert t[3, 2]["jaccard"] == pytest.approx(.23) and [r["block"] for r in t.sort("jaccard")][0] == 3
    assert t.sort("jaccard").by == "jaccard" and t.by == "entropy"
    lines = t.table().splitlines()
    assert lines[0].split() == list(rows()[0]) and len(lines) == 6 and len({len(line) for line in lines}) == 1 and str(t) == t.table()
    assert t.table(2).splitlines()[-1] == "… and 3 more" and len(t.table(2).splitlines()) == 4
    assert "<th" in t._repr_html_() and t._repr_html_().count("<tr>") == 6
    t.to_csv(tmp_path / "heads.csv")
    with open(tmp_path / "heads.csv", newline="") as f:
        back = list(csv.DictReader(f))
    assert [{k: float(v) for k, v in r.items()} for r in back] == list(t)
    big = Heads(rows(range(24), [16] * 24))
    assert repr(big).splitlines()[-1] == "… and 372 more" and "372 more" in big._repr_html_() and len(str(big).splitlines()) == 385


def test_a_column_of_texts_sorts_nothing():
    t = Heads([r | dict(looks_at="border cell" if r["head"] else "") for r in rows()])
    for call, said in ((lambda: t.sort("looks_at"), "by"), (lambda: Heads(t.rows, "looks_at"), "by"), (lambda: t.grid("looks_at"), "value"),
                       (lambda: entropy_heatmap(t, "looks_at"), "value")):
        with pytest.raises(ValueError, match=f"^{said}: got 'looks_at' .not all of it is numbers., expected one of block, head, .*images, broken; say which"):
            call()
    some = Heads([r | dict(jaccard=None if r["head"] else .5) for r in rows()])
    with pytest.raises(ValueError, match="by: got 'jaccard' .not all of it is numbers."):
        some.sort("jaccard")
    known = [np.float32(.3), torch.tensor(.2), 1, NAN]                            # numbers of NumPy and torch count
    assert [r["head"] for r in Heads([dict(block=0, head=h, entropy=v) for h, v in enumerate(known)])] == [1, 0, 2, 3]


def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    file, link, lost = tmp_path/"heads.csv", tmp_path/"link.csv", tmp_path/"lost.csv"
    Heads(rows()).to_csv(file)
    before = file.read_bytes()
    link.symlink_to(file)
    lost.symlink_to(tmp_path/"target.csv")
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        Heads([*rows(), dict(rows()[0], head=9, more=1)]).to_csv(file)              # in the middle of the file
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 3
    for i in range(2):
        with module.written(link) as f: f.write(f"new {i}\n")
    with module.written(lost) as f: f.write("there\n")
    assert file.read_text() == "new 1\n" and link.is_symlink() and lost.is_symlink() and (tmp_path/"target.csv").read_text() == "there\n"
    with pytest.raises(OSError, match="path: .* cannot be written"):
        Heads(rows()).to_csv(tmp_path)
    with module.written("/dev/null") as f: f.write("a")                             # a device stays one
    assert not os.path.isfile("/dev/null") and len(list(tmp_path.iterdir())) == 4


def test_a_writer_that_is_killed_leaves_the_old_table(tmp_path):
    (tmp_path/"t.csv").write_text("old")
    if not (child := os.fork()):
        with module.written(tmp_path/"t.csv") as f:
            f.write("n"*100_000)
            f.flush()
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path/"t.csv").read_text() == "old"


def test_ties_and_unknown_values_have_an_order():
    r = lambda b, h, E, J=.5: dict(block=b, head=h, entropy=E, jaccard=J)
    t = Heads([r(1, 1, .2), r(0, 2, NAN), r(1, 0, .2), r(0, 1, .1), r(0, 0, .2)])
    assert [(x["block"], x["head"]) for x in t] == [(0, 1), (0, 0), (1, 0), (1, 1), (0, 2)]
    t = Heads([r(0, 0, .3), r(0, 1, .1), r(0, 2, .2, NAN), r(0, 3, 9., .6)], "jaccard")
    assert [x["head"] for x in t] == [3, 1, 0, 2]
    with pytest.raises(ValueError, match="got 'area', expected one of block"):
        Heads([r(0, 0, 1.)], "area")
    with pytest.raises(KeyError, match="no head 9 in block 0"):
        t[0, 9]


@pytest.mark.parametrize("blocks,heads", [(1, 1), (4, 3), (12, 12), (24, 16), (32, 32)])
def test_heatmaps_draw_every_size(blocks, heads, tmp_path):
    from matplotlib import image
    counts = [heads if b % 3 or heads == 1 else heads // 2 for b in range(blocks)]
    t = Heads(rows(range(blocks), counts))
    fig = entropy_heatmap(t)
    ax = fig.axes[0]
    fig.savefig(tmp_path / "map.png")
    a = image.imread(tmp_path / "map.png")[..., :3]
    grey = (abs(a - 0xd9 / 255) < .01).all(-1).mean()
    missing = blocks * heads - sum(counts)
    assert (grey > .2 * missing / (blocks * heads)) if missing else grey < .02
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "block")
    assert len(ax.texts) == (sum(counts) if max(blocks, heads) <= 16 else 0) and len(ax.patches) == 1
    best = ax.patches[0]
    assert (best.get_x() + .5, best.get_y() + .5) == (t[0]["head"], t[0]["block"])
    assert len(ax.get_xticks()) <= 24 and a.shape[0] > 100


def test_heatmap_into_given_axes_and_of_other_columns():
    from matplotlib.figure import Figure
    fig = Figure()
    axes = fig.subplots(1, 2)
    t = Heads(rows((2, 5)))
    assert entropy_heatmap(t, ax=axes[0]) is fig and entropy_heatmap(t, "jaccard", axes[1]) is fig
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["2", "5"]
    assert fig.axes[3].get_ylabel() == "Jaccard index"
    with pytest.raises(ValueError, match="expected one of block"):
        entropy_heatmap(t, "area")
    unknown = entropy_heatmap(Heads([dict(block=0, head=h, entropy=NAN) for h in range(3)]))
    assert [x.get_text() for x in unknown.axes[0].texts] == ["–"] * 3 and not unknown.axes[0].patches


# ---- outliers --------------------------------------------------------------------------------------------------------

def slow_outliers(maps, k=5., recur=.5, most=.1, log=False, of=None):
    maps = np.asarray(maps, float)
    B, H, h, w = maps.shape
    of = maps if of is None else np.asarray(of, float)
    votes, broken = np.zeros((B, h, w)), np.zeros(B, int)
    for b in range(B):
        for head in range(H):
            s = maps[b, head]
            if not np.isfinite(s).all():
                broken[b] += 1
                continue
            votes[b] += far_oracle(np.log(np.maximum(s, np.finfo(np.float32).tiny)) if log else s, k, most)
        votes[b] /= max(H - broken[b], 1)
    mask = (votes >= recur) & (votes > 0)
    before = np.array([[plain_entropy(s)[0] for s in image] for image in of])
    after = np.array([[plain_entropy(s, ~mask[b])[0] for s in image] for b, image in enumerate(of)])
    share = np.where(broken == H, NAN, mask.mean((1, 2)))
    return dict(mask=mask, votes=votes, share=share, before=before, after=after, broken=broken)


def assert_outliers(got, want):
    assert torch.equal(got.mask, torch.tensor(want["mask"])) and torch.equal(got.broken, torch.tensor(want["broken"]))
    for name in ("votes", "share", "before", "after"):
        assert_close(getattr(got, name).double(), torch.tensor(want[name]), atol=1e-6, rtol=0, equal_nan=True)
    assert_close(got.change.double(), torch.tensor(want["after"] - want["before"]), atol=1e-6, rtol=0, equal_nan=True)


def spiky(B, H, h, w, seed=0):
    "Maps of every kind, some with spikes in the same cells of all heads."
    rng = np.random.default_rng(seed)
    m = kinds(B * H, h, w, rng)
    m = m[rng.permutation(len(m))].reshape(B, H, h, w)
    for b in range(0, B, 2):
        for _ in range(rng.integers(1, 3)):
            m[b, :, rng.integers(h), rng.integers(w)] += rng.uniform(5, 60) * (m[b].std() + .1)
    return torch.tensor(m)


@pytest.mark.parametrize("shape", [(8, 5, 8, 8), (6, 6, 14, 14), (10, 4, 3, 7), (30, 1, 1, 30), (40, 3, 2, 2)])
@pytest.mark.parametrize("options", [{}, dict(k=3., recur=1.), dict(k=8., recur=.01, most=.25)])
def test_outliers_are_the_oracles(shape, options):
    maps = spiky(*shape)
    found = outliers(maps, softmax=False, **options)
    assert_outliers(found, slow_outliers(maps, **options))
    if shape[-1] > 4 and not options:
        assert found.mask.any() and not found.mask.all()


def test_outliers_of_attention_judge_logarithms():
    s = 3 * torch.randn(8, 4, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s[::2, :, 2, 3] += 60
    p = softmax(s)
    for recur in (.5, .25):
        assert_outliers(outliers(p, recur=recur), slow_outliers(p, log=True, recur=recur))
        assert_outliers(outliers(p, recur=recur, softmax=False), slow_outliers(p, recur=recur))
    assert outliers(p, recur=.25).mask.sum() == 4 and outliers(p[1::2], recur=.25, softmax=False).mask.sum() > 10    # the tail of a healthy softmax
    assert torch.equal(outliers(p).mask, outliers(s).mask)
    p[0, 0], p[1, 1] = NAN, INF                                      # a broken map does not hide that the others are weights
    assert_outliers(outliers(p, recur=.25), slow_outliers(p, log=True, recur=.25))


def test_outliers_know_no_units_and_no_neighbours():
    s = spiky(8, 4, 6, 9, 2)
    found = outliers(s, softmax=False)
    assert found.mask.any()
    for other in (3 * s, s * 2**-10, s + 5):
        assert torch.equal(outliers(other, softmax=False).mask, found.mask)
    apart = [outliers(one[None], softmax=False) for one in s]
    assert torch.equal(torch.cat([o.mask for o in apart]), found.mask)
    assert_close(torch.cat([o.after for o in apart]), found.after)
    assert torch.equal(outliers(s.flip(1), softmax=False).mask, found.mask)


def test_a_cell_has_to_recur():
    s = torch.zeros(1, 4, 8, 8).double() + torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s[0, :2, 1, 1] += 100
    s[0, 0, 5, 5] += 100
    assert outliers(s).mask.nonzero().tolist() == [[0, 1, 1]] and outliers(s).votes[0, 1, 1] == .5 and outliers(s).votes[0, 5, 5] == .25
    assert outliers(s, recur=.25).mask.sum() == 2 and outliers(s, recur=.75).mask.sum() == 0
    s[0, 2:] = NAN                                                  # broken heads have no vote: one of two is a half
    assert outliers(s).mask.sum() == 2 and outliers(s).broken.tolist() == [2]


def test_a_removed_bridge_parts_its_regions():
    s = torch.zeros(1, 1, 5, 7)
    s[0, 0, 2] = 1.
    s[0, 0, 2, 3] = 100.
    found = outliers(s, softmax=False)
    assert found.mask.nonzero().tolist() == [[0, 2, 3]]
    assert found.before.item() == 0 and found.after.item() == pytest.approx(math.log(2), abs=1e-6)
    assert found.change.item() == pytest.approx(math.log(2), abs=1e-6) and found.share.item() == pytest.approx(1 / 35)


def test_constant_tied_broken_and_tiny_maps():
    for value in (0., .1, -3.3, 1e30):
        found = outliers(torch.full((2, 3, 5, 7), value))
        assert not found.mask.any() and (found.before == 0).all() and (found.after == 0).all()
    noise = torch.full((1, 1, 9, 9), .1) + 1e-8 * torch.randn(1, 1, 9, 9)     # rounding around a constant
    noise[0, 0, 3, 3] = torch.nextafter(torch.tensor(.1), torch.tensor(1.))
    assert not outliers(noise, softmax=False).mask.any()
    step = torch.full((1, 1, 9, 9), .1)
    step[0, 0, 3, 3] = torch.nextafter(torch.tensor(.1), torch.tensor(1.))
    assert not outliers(step, softmax=False).mask.any() and not outliers(step).mask.any()
    one = torch.full((1, 1, 8, 8), -2.)
    one[0, 0, 0, 0] = -1.9                                          # the first cell, which everything is measured from
    assert outliers(one).mask.nonzero().tolist() == [[0, 0, 0]] and outliers(one).after.item() == 0
    few = torch.zeros(1, 1, 8, 8)
    few[0, 0, 2, 1:6] = 1.                                           # five of 64, all alike
    assert outliers(few, softmax=False).mask.sum() == 5
    assert not outliers(torch.rand(4, 3, 1, 1)).mask.any() and not outliers(torch.rand(4, 1, 1)).mask.any()
    for none in (torch.rand(0, 3, 4, 4), torch.rand(0, 4, 4), torch.rand(2, 0, 4, 4)):
        found = outliers(none)
        assert found.mask.shape == (len(none), 4, 4) and not found.mask.any() and "0 cells" in repr(found)
    broken = torch.rand(2, 2, 4, 4)
    broken[0, 0, 0, 0], broken[0, 1, 2, 2] = NAN, INF
    found = outliers(broken)
    assert found.broken.tolist() == [2, 0] and found.share.isnan().tolist() == [True, False] and found.before.isnan().tolist() == [[True] * 2, [False] * 2]
    assert "2 broken maps" in repr(found)


def test_norms_and_dtypes():
    g = torch.Generator().manual_seed(0)
    norms = 40 + 5 * torch.randn(6, 14, 14, generator=g)
    norms[:, 3, 4], norms[2, 0, 0] = 300., 180.
    maps = torch.randn(6, 3, 14, 14, generator=g)
    found = outliers(norms, of=maps)
    assert_outliers(found, slow_outliers(norms[:, None], of=maps))
    assert found.mask.sum() == 7 and found.before.shape == (6, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int32):
        assert torch.equal(outliers(norms.to(dtype)).mask, found.mask)
    assert outliers(norms).before.shape == (6, 1) and not outliers(maps.requires_grad_()).after.requires_grad


@pytest.mark.parametrize("call,said", [(dict(maps=torch.rand(4, 4)), "expected \\(B, H, h, w\\), or \\(B, h, w\\)"),
                                       (dict(maps=torch.rand(1, 1, 2, 4, 4)), "norms"),
                                       (dict(maps=torch.rand(2, 3, 0, 4)), "at least one cell"), (dict(maps=torch.rand(1, 4, 4), k=0), "k: got 0"),
                                       (dict(maps=torch.rand(1, 4, 4), recur=0), "recur: got 0"), (dict(maps=torch.rand(1, 4, 4), recur=1.5), "recur: got 1.5"),
                                       (dict(maps=torch.rand(1, 4, 4), most=.5), "most: got 0.5"),
                                       (dict(maps=torch.rand(2, 4, 4), of=torch.rand(2, 3, 4, 5)), "of: got shape \\(2, 3, 4, 5\\), expected \\(2, H, 4, 4\\)"),
                                       (dict(maps=torch.rand(2, 4, 4), of=torch.rand(1, 3, 4, 4)), "of: got shape")])
def test_outliers_refuse(call, said):
    with pytest.raises(ValueError, match=said):
        outliers(**call)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same(pictures):
    p = weights(200, 14, 14)[:200].view(10, 4, 5, 14, 14)
    for v in ("paper", "as_released"):
        assert_close(localization_entropy(p.cuda(), v).cpu(), localization_entropy(p, v), atol=1e-9, rtol=1e-9)
        assert_rows(list(localization_heads(p.cuda(), v)), list(localization_heads(p, v)))
    s = spiky(6, 6, 14, 14)
    a, b = outliers(s.cuda()), outliers(s)
    assert torch.equal(a.mask.cpu(), b.mask)
    assert_close(a.after.cpu(), b.after, atol=1e-6, rtol=0)
    assert_rows(list(rank_heads(vit(), [pictures], device="cuda")), list(rank_heads(vit(), [pictures])))


# ---- models that take words, too, and packed pictures ----------------------------------------------------------------

def two_towers(name, **vision):
    tf = pytest.importorskip("transformers")
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    config = getattr(tf, f"{name}Config")(text_config=dict(small, vocab_size=40, max_position_embeddings=8), vision_config=small | dict(patch_size=8) | vision)
    return getattr(tf, f"{name}Model")(config).eval()


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "AltCLIP", "ChineseCLIP"])
def test_a_model_of_pictures_and_words_is_ranked_by_its_vision_tower(name):
    if name in ("AltCLIP", "ChineseCLIP"):
        tf = pytest.importorskip("transformers")
        if not hasattr(tf, f"{name}Model"):
            pytest.skip("not in this transformers")
        from spatial_entropy.attention.families import UnsupportedModel, find
        try:
            find(two_towers(name, image_size=32))
        except UnsupportedModel:
            pytest.skip("no entry for this family")
    model, x = two_towers(name, image_size=32), torch.rand(4, 3, 32, 32)
    want = [r for r in rank_heads(model.vision_model, [x])]
    for batch in (x, (x, torch.zeros(4)), dict(pixel_values=x, input_ids=torch.zeros(4, 3, dtype=torch.long), labels=torch.zeros(4))):
        assert [r for r in rank_heads(model, [batch])] == want


def packed_batch():
    n, shapes = torch.arange(16), torch.tensor([[4, 4], [2, 6]])
    real = n < shapes.prod(1, keepdim=True)
    where = torch.stack([n // shapes[:, 1:], n % shapes[:, 1:]], -1)
    patches = torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(0)) * real[..., None]
    return patches, real, shapes, where


def test_packed_pictures_are_ranked_by_name():
    patches, real, shapes, where = packed_batch()
    model = two_towers("Siglip2", num_patches=16)
    batch = dict(pixel_values=patches, pixel_attention_mask=real.long(), spatial_shapes=shapes)
    for m in (model, model.vision_model):
        maps = list(head_maps(m, [batch]))[0]
        with AttentionTap(m, "all") as tap, torch.no_grad():
            model.vision_model(**batch)
        assert all(torch.equal(maps[i], tap.maps()[i]) for i in maps) and len(rank_heads(m, [batch])) == 6
    naflex = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, patch_size=8, img_size=32).eval()
    batch = dict(patches=patches, patch_coord=where, patch_valid=real)
    got = list(head_maps(naflex, [(batch, torch.zeros(2))]))[0]
    with AttentionTap(naflex, "all") as tap, torch.no_grad():
        naflex(patches, patch_coord=where, patch_valid=real)
    assert all(torch.equal(got[i], m) for i, m in tap.maps().items())
    with pytest.raises(ValueError, match="expected batches"):
        next(head_maps(naflex, [patches]))


def naflex_batch(sizes):
    n, shapes = torch.arange(max(h*w for h, w in sizes)), torch.tensor(sizes)
    real = n < shapes.prod(1, keepdim=True)
    where = torch.stack([n // shapes[:, 1:], n % shapes[:, 1:]], -1) * real[..., None]
    patches = torch.zeros(len(sizes), len(n), 192)
    for one, (h, w) in zip(patches, sizes): one[:h*w] = torch.randn(h*w, 192, generator=torch.Generator().manual_seed(100*h + w))
    return dict(patches=patches, patch_coord=where, patch_valid=real)


def test_a_packed_picture_is_measured_as_if_it_were_alone():
    torch.manual_seed(0)
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=48, depth=2, num_heads=3, patch_size=8, img_size=32).eval()
    masks, sizes = torch.zeros(2, 48, 48, dtype=torch.bool), [(6, 6), (4, 12)]
    masks[0, :, :24] = masks[1, 10:30] = True
    ranked = lambda some, masks: rank_heads(model, [naflex_batch(some) | dict(mask=masks)], surrogates=4)
    both, alone = ranked(sizes, masks), [ranked(sizes[i:i + 1], masks[i:i + 1]) for i in (0, 1)]
    for row in both:
        for name in ("entropy", "entropy_chance", "below_chance", "density", "regions", "attention", "jaccard", "pointing"):
            assert row[name] == pytest.approx(sum(one[row["block"], row["head"]][name] for one in alone)/2, abs=2e-3), name
    with pytest.raises(ValueError, match=r"maps: 60 cell\(s\) hold no patch.*; give pictures of one size"):
        next(framed_maps(model, [naflex_batch(sizes)]))
    maps, frame = next(framed_maps(model, [naflex_batch(sizes[1:])]))
    assert maps[0].shape[-2:] == (4, 12) and frame == (0, 0, 1, 1)        # of one size: its own grid, which covers all of it


def test_where_patches_are_hidden_there_is_no_chance_level():
    tf = pytest.importorskip("transformers")
    config = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=48, patch_size=8)
    mae, x = tf.ViTMAEModel(tf.ViTMAEConfig(**config)).eval(), torch.randn(3, 3, 48, 48)
    torch.manual_seed(0)
    for weight in mae.parameters(): torch.nn.init.normal_(weight, std=.2)
    masks = torch.rand(3, 48, 48) > .5
    for row in rank_heads(mae, [(x, masks)]):
        assert all(isnan(row[name]) for name in ("entropy_chance", "below_chance", "jaccard", "pointing"))
        assert row["entropy"] >= 0 and .2 < row["density"] < .8 and row["images"] == 3
    for measure in (se.score_objects, score_masks):
        with pytest.raises(ValueError, match="hold no patch.*mask_ratio=0"): measure(mae, TensorDataset(x, masks))


@pytest.mark.parametrize("side, pads", [(41, False), (41, True), (42, False)])
def test_masks_lie_on_the_patches_where_the_side_is_no_multiple(side, pads):
    "A mask that is one patch is on one cell, whether the model drops the rest of the picture or pads it."
    torch.manual_seed(0)
    if pads:
        model = timm.create_model("vit_tiny_patch16_224", img_size=42, patch_size=14, embed_dim=24, depth=1, num_heads=2, num_classes=0,
                                  dynamic_img_size=True, dynamic_img_pad=True).eval()
    else:
        tf = pytest.importorskip("transformers")
        model = tf.Dinov2Model(tf.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14)).eval()
    x, masks = torch.randn(4, 3, side, side), torch.zeros(4, side, side, dtype=torch.bool)
    for i, mask in enumerate(masks): mask[14:28, 14*(i % 2):14*(i % 2) + 14] = True
    maps = next(head_maps(model, [x]))[0]
    assert maps.shape[-2:] == ((3, 3) if pads or side == 42 else (2, 2))
    on = torch.stack([(m[:, 1, i % 2] == m.amax((-2, -1))).double() for i, m in enumerate(maps)])
    assert_close(se.score_objects(model, TensorDataset(x, masks), surrogates=0).own["pointing"][:, 0].double(), on)
    rows = rank_heads(model, [(x, masks)], surrogates=0)
    assert [rows[0, h]["pointing"] for h in (0, 1)] == pytest.approx(on.mean(0).tolist())
    s = maps.flatten(2).softmax(-1).view(maps.shape)
    best = torch.zeros(maps.shape[:2])
    for i in range(4):
        for h in range(2):
            cells, kept, at = s[i, h].flatten().sort(descending=True), 0., set()
            for value, cell in zip(*cells):
                if kept < .6: at.add(cell.item())
                kept += value.item()
            own = maps.shape[-1] + i % 2
            best[i, h] = (own in at)/len(at | {own})
    assert score_masks(model, TensorDataset(x, masks))["jaccard_mean_head"] == pytest.approx(best.mean().item(), abs=1e-5)
    side_ = 14*maps.shape[-1]/side                                    # what the cells cover, in shares
    box = [torch.tensor([[14*(i % 2)/side, 14/side, (14*(i % 2) + 14)/side, 28/side]]) for i in range(4)]
    found = se.score_box_pairs(model, [*zip(x, box)], thresholds=[1.])
    assert side_ == pytest.approx({(41, False): 28/41, (41, True): 42/41, (42, False): 1}[side, pads])
    assert torch.equal(found.right[:, :, 2, 0].double(), on)          # the brightest cell is the box, or is not


@pytest.mark.filterwarnings("ignore:got pictures of")
@pytest.mark.parametrize("compiled", [False, True])
def test_pixels_that_a_model_drops_change_no_score(compiled):
    "Pictures with a rest beside the patches are scored as if they, their masks and boxes were cut; also where sizes differ, and where the model is compiled."
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.Dinov2ForImageClassification(tf.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
                                                            num_labels=3)).eval()
    x, masks, label = torch.randn(8, 3, 41, 41), torch.rand(8, 41, 41) > .5, torch.arange(8) % 3
    corner = torch.tensor([[.1, .2, .5, .6]])*28                                    # pixels, of what the patches cover
    sides = [41]*4 + [35]*4                                                         # two cells a side, both
    cut, mixed = x[..., :28, :28], [p[:, :s, :s] for p, s in zip(x, sides)]
    whole, model_ = TensorDataset(cut, masks[:, :28, :28]), torch.compile(model, backend="eager") if compiled else model
    want, got = se.score_objects(model, whole), se.score_objects(model_, TensorDataset(x, masks))
    assert_close([got.own, got.chance], [want.own, want.chance], equal_nan=True)
    assert score_masks(model_, TensorDataset(x, masks)) == pytest.approx(score_masks(model, whole))
    for a, b in zip(rank_heads(model_, [(x, masks)], surrogates=0), rank_heads(model, [whole.tensors], surrogates=0)): assert a == pytest.approx(b)
    if compiled: return                                                             # to compile for more sizes takes long
    want = se.score_box_pairs(model, [(p, corner/28) for p in cut], batch_size=4)
    got = se.score_box_pairs(model_, [(p, corner/s) for p, s in zip(mixed, sides)], batch_size=4)
    assert torch.equal(got.right, want.right) and torch.equal(got.corloc, want.corloc)
    want = se.occlusion_curves(model, DataLoader(TensorDataset(cut, label), 4), (0., .25, .5, .75))
    got = se.occlusion_curves(model, DataLoader([*zip(mixed, label)], 4), (0., .25, .5, .75))
    assert all(torch.equal(got.right[order], want.right[order]) for order in want.right)


@pytest.mark.filterwarnings("ignore:got pictures of")
@pytest.mark.parametrize("family, side, patch, covers", [("swinv2", 41, 4, 44), ("swinv2", 44, 4, 44), ("torchvision swin", 41, 4, 40),
                                                         ("open_clip", 35, 8, 32)])
def test_masks_lie_on_the_patches_of_models_of_windows_and_others(family, side, patch, covers):
    "A mask that is one patch is on one cell: where an embedding pads, where windows do, and where the rest is dropped."
    torch.manual_seed(0)
    if family == "open_clip":
        model = pytest.importorskip("open_clip").transformer.VisionTransformer(32, 8, 24, 1, 2, 4., output_dim=24).eval()
    elif family == "swinv2":
        tf = pytest.importorskip("transformers")
        model = tf.Swinv2Model(tf.Swinv2Config(image_size=64, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4)).eval()
    else:
        model = pytest.importorskip("torchvision").models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4]).eval()
    x, masks, n = torch.randn(4, 3, side, side), torch.zeros(4, side, side, dtype=torch.bool), covers//patch
    if family == "open_clip": model.positional_embedding = torch.nn.Parameter(torch.randn(n*n + 1, 24))
    maps, frame = next(framed_maps(model, [x], 0))
    assert maps[0].shape[-2:] == (n, n) and frame == pytest.approx((0, 0, covers/side, covers/side))
    for mask, m in zip(masks, maps[0]):                                             # the first head's brightest cell, but for a padded one
        y, z = divmod(m[0, :side//patch, :side//patch].reshape(-1).argmax().item(), side//patch)
        mask[patch*y:patch*y + patch, patch*z:patch*z + patch] = True
    on = se.score_objects(model, TensorDataset(x, masks), block=0, surrogates=0).own["pointing"][:, 0, 0]
    assert on.tolist() == [float(m[0, :side//patch, :side//patch].amax() == m[0].amax()) for m in maps[0]] and on.any()


def test_masks_of_other_types_count_and_what_is_no_mask_is_refused():
    x, masks = torch.rand(4, 3, 32, 32), torch.rand(4, 16, 16) > .5
    valid, rank = torch.rand(4, 16, 16) > .2, lambda *batch, **more: list(rank_heads(vit(), [batch], surrogates=0, **more))
    assert_rows(rank(x, masks.byte()), rank(x, masks))
    assert_rows(rank(x, masks, valid.byte()), rank(x, masks, valid))
    for batch, more, said in (((x, masks.byte()*255), {}, "masks: got values outside 0–1.*masks=None leaves them out"),
                              ((x, masks, valid.byte()*255), {}, "loader: got torch.uint8 .* after the masks, expected booleans"),
                              ((x, masks), dict(masks=masks), "masks: got Tensor, expected 'auto'"),
                              ((x, masks), dict(masks="all"), "masks: got str, expected 'auto'")):
        with pytest.raises(ValueError, match=said): rank(*batch, **more)


def test_a_first_weight_of_whole_numbers_is_not_the_type_of_pictures():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = torch.nn.Parameter(torch.zeros(1, dtype=torch.int8), requires_grad=False)
            self.vit = vit()

        def forward(self, x): return self.vit(x)

    x = torch.rand(2, 3, 32, 32)
    assert_rows(list(rank_heads(Counting(), [x], surrogates=0)), list(rank_heads(vit(), [x], surrogates=0)))


def test_no_heads_and_patches_of_a_language_model_are_said():
    with pytest.raises(ValueError, match="rows: got none, expected a row for each head"): Heads([])
    with pytest.raises(ValueError, match=r"loader: got patches \(96, 384\), .*rank_text_heads"):
        rank_heads(vit(), [dict(pixel_values=torch.rand(96, 384), image_grid_thw=torch.tensor([[1, 8, 12]]))])


@pytest.mark.parametrize("value, said", [(0., ".00"), (.004, ".00"), (.244, ".24"), (.994, ".99"), (.996, "1.00"), (1., "1.00"), (1.594, "1.59"), (12.6, "13"),
                                         (-.49, "-.49"), (-.01, "-.01"), (-.6, "-.60"), (-.001, ".00"), (-12.6, "-13"), (9.997, "10")])
def test_a_number_of_a_heat_map_is_that_of_its_cell(value, said):
    fig = entropy_heatmap(Heads([dict(block=0, head=0, entropy=value)]))
    assert said in [t.get_text() for t in fig.axes[0].texts]


def test_paths_swapped_arguments_and_whole_numbers_are_refused_in_a_sentence():
    model, x = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2), torch.rand(2, 3, 32, 32)
    wrong = [((model, "/folder"), "loader: got the path '/folder', expected batches"), ((model, None), "loader: got NoneType, expected batches"),
             (([x], model), "model: got list, expected an nn.Module; the model comes first, then the loader"),
             ((model, [(x * 255).to(torch.uint8)]), "got pictures of torch.uint8, which the model does not take; expected floats")]
    for call in (rank_heads, lambda *arguments: next(head_maps(*arguments))):
        for arguments, said in wrong:
            with pytest.raises(TypeError, match=said):
                call(*arguments)
    whole = torch.nn.Sequential(Whole(), model)
    assert len(rank_heads(whole, [(x * 255).to(torch.uint8)])) == 2


class Whole(torch.nn.Module):
    "A transform inside the model, which takes whole numbers."
    def forward(self, x):
        return x / 255
