"""Whatever real map arrives: every dtype, layout and magnitude against exact fractions, transforms, and shapes without numbers."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kinds import STRUCTURE, dots, serpentine, spiral
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.measure.entropy import LEAST, clear_entropy
from spatial_entropy.measure.regions import LONG, REAL, clear_labels

WHOLE = sorted((d for d in REAL if not d.is_floating_point), key=str)
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
EIGHT = sorted((d for d in REAL if d.is_floating_point and d.itemsize == 1), key=str)


def cells(maps):
    "The numbers themselves, as fractions."
    return [[Fraction(c) for c in row] for row in (maps.double() if maps.is_floating_point() else maps).tolist()]


def log(f):
    return math.log(f.numerator) - math.log(f.denominator)


def exact(rows, connectivity, k, floor, least):
    "Excess, labels, E, dE/ds of one map, rounded nowhere but in the logarithm; the size below which a gradient is rounding."
    s = [c for row in rows for c in row]
    t = Fraction(k) * sum(s) / len(s)
    a = [max(c - t, Fraction(0)) for c in s]
    on = np.array([x > 0 for x in a]).reshape(len(rows), -1)
    labels, count = ndimage.label(on, STRUCTURE[connectivity])
    mass = [Fraction(0)] * (count + 1)
    for n, x in zip(labels.ravel().tolist(), a):
        mass[n] += x
    A = sum(mass)
    E = -sum(float(m / A) * log(m / A) for m in mass[1:])
    by = max(A, Fraction(floor) * max(Fraction(1), sum(map(abs, s))), Fraction(least))
    u = [-(log(mass[n] / A) + E) if n else 0. for n in labels.ravel().tolist()]
    g = np.array([float(Fraction(v) / by) for v in u])
    g = (g - k * g.mean()).reshape(on.shape) if count > 1 else np.zeros(on.shape)
    return a, labels, E, g, max(np.abs(g).max(), float(1 / by) / 100)


def numbers(kind, h, w, rng):
    if kind == "steps":
        return rng.integers(0, 4, (h, w)) * 1.
    if kind == "shapes":
        return [dots, spiral, serpentine][rng.integers(3)](h, w) * rng.integers(1, 5, (h, w))
    if kind == "flat":
        return np.full((h, w), rng.standard_normal())
    if kind == "far":
        return 1e4 + rng.standard_normal((h, w))
    if kind == "wild":
        return 10. ** rng.uniform(-30, 30, (h, w))
    return rng.standard_normal((h, w))


SIZES = {torch.float64: [1., 1e150, 1e306, 1.7e308, 1e-150, 1e-308], torch.float32: [1., 1e20, 1e38, 1e-20, 1e-38],
         torch.float16: [1., 1e4, 1e-6], torch.bfloat16: [1., 1e38, 1e-38]}

LAYOUTS = {
    "plain": lambda x: x,
    "turned": lambda x: x.t(),
    "cut": lambda x: x[:, ::2],
    "inside": lambda x: torch.stack([x, x, x], -1).flatten(1)[:, 1::3],
    "wide": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "high": lambda x: x[:1].expand(x.shape[0], -1),
    "one cell": lambda x: x[:1, :1].expand(x.shape),
    "overlapping": lambda x: x.contiguous().as_strided((x.shape[0], (x.shape[1] + 1) // 2), (x.shape[1] // 2 or 1, 1)),
}


@st.composite
def float_maps(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    h, w, dtype = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from(FLOATS))
    kind = draw(st.sampled_from(["steps", "shapes", "flat", "far", "wild", "noise"]))
    values = numbers(kind, h, w, rng)
    if kind != "wild":
        values = values / max(1, np.abs(values).max()) * draw(st.sampled_from(SIZES[dtype]))
    most = torch.finfo(dtype).max
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](torch.tensor(values.clip(-most, most), dtype=torch.float64).to(dtype))


@st.composite
def whole_maps(draw):
    dtype, (h, w) = draw(st.sampled_from(WHOLE)), (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    base = draw(st.sampled_from([low, high - 3, max(0, high // 2), 0])) if dtype != torch.bool else 0
    steps = st.integers(0, 3).map(lambda d: min(high, base + d)) if draw(st.booleans()) else st.integers(low, high)
    rows = draw(st.lists(st.lists(steps, min_size=w, max_size=w), min_size=h, max_size=h))
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](torch.tensor(rows, dtype=dtype))


def decided(a, rows, k, dtype):
    "Whether no cell lies so near the threshold that the rounding of a float64 sum decides about it."
    size = max(max(map(abs, row)) for row in rows) * max(1, Fraction(k))
    whole = all(c.denominator == 1 and abs(c) < 2**24 for row in rows for c in row)
    return whole or k == 0 or len({c for row in rows for c in row}) == 1 and k == 1 or all(
        abs(c) > size * Fraction(1, 10**11) for c in distances(rows, k))


def distances(rows, k):
    s = [c for row in rows for c in row]
    t = Fraction(k) * sum(s) / len(s)
    return [c - t for c in s]


ANY = dict(connectivity=st.sampled_from([8, 4]), k=st.sampled_from([1., 1., 0., .5, 1.5]))


@settings(max_examples=70, deadline=None)
@given(maps=float_maps(), floor=st.sampled_from([1e-3, 0.]), **ANY)
def test_floating_point_maps(maps, connectivity, k, floor):
    rows = cells(maps)
    out = torch.float64 if maps.dtype == torch.float64 else torch.float32
    a, labels, E, g, size = exact(rows, connectivity, k, floor, LEAST[out])
    assume(decided(a, rows, k, maps.dtype))
    leaf, tol = maps.detach().requires_grad_(), 1e-9 if out == torch.float64 else 1e-5
    got = se.spatial_entropy(leaf, connectivity, times_mean=k, floor=floor)
    clear, slope = clear_entropy(maps[None], connectivity, k, floor)
    assert got.dtype == clear.dtype == out and abs(got.item() - E) <= tol and abs(clear.item() - E) <= tol
    assert np.array_equal(se.above_mean(maps, k).numpy(), labels > 0)
    assert np.array_equal(se.label_regions(se.above_mean(maps, k), connectivity).numpy(), labels)
    near = 10 * tol * size + torch.finfo(out).tiny
    assert np.abs(slope[0].double().numpy() - g).max() <= near
    if maps.dtype == out:
        ours, = torch.autograd.grad(got, leaf)
        assert np.abs(ours.double().numpy() - g).max() <= near


@settings(max_examples=120, deadline=None)
@given(maps=whole_maps(), **ANY)
def test_whole_numbers_of_any_size(maps, connectivity, k):
    rows = cells(maps)
    a, labels, E, *_ = exact(rows, connectivity, k, 0, 1)
    if k == 1:                                             # differences are exact, but their mean is rounded
        base = rows[0][0]
        rows = [[c - base for c in row] for row in rows]
    assume(decided(a, rows, k, maps.dtype))
    got, clear = se.spatial_entropy(maps, connectivity, times_mean=k), clear_entropy(maps[None], connectivity, k)[0]
    assert got.dtype == clear.dtype == torch.float32 and abs(got.item() - E) <= 1e-5 and abs(clear.item() - E) <= 1e-5
    assert np.array_equal(se.above_mean(maps, k).numpy(), labels > 0)
    assert np.array_equal(clear_labels(se.above_mean(maps, k), connectivity).numpy(), labels)
    assert torch.equal(se.label_regions(maps), se.label_regions(maps.bool()))
    if k == 1 and labels.max():
        shares = se.region_mass(maps, torch.tensor(labels))
        total = sum(a)
        for n, share in enumerate(shares.tolist(), 1):
            assert abs(share - float(sum(x for x, m in zip(a, labels.ravel()) if m == n) / total)) <= 1e-6


@settings(max_examples=100, deadline=None)
@given(maps=st.one_of(float_maps(), whole_maps()), mass=st.sampled_from([.1, .5, .6, .95, 1.]))
def test_kept_mass(maps, mass):
    maps = maps.abs() if maps.is_floating_point() else maps
    assume(maps.is_floating_point() or not any(c < 0 for row in cells(maps) for c in row))
    s = [c for row in cells(maps) for c in row]
    slack = Fraction(1, 10**6) if mass < 1 else Fraction(-1)                    # of a mass of 1 nothing is forgiven: all above 0
    enough, before, want = Fraction(mass) * sum(s) * (1 - slack), Fraction(0), [False] * len(s)
    for i in sorted(range(len(s)), key=lambda i: (-s[i], i)):
        assume(abs(before - enough) > enough * Fraction(1, 10**11) or not enough)
        want[i] = before < enough and s[i] > 0
        before += s[i]
    assume(maps.dtype not in (torch.int64, torch.uint64) or max(s) < 2**53)
    assert se.keep_mass(maps, mass).flatten().tolist() == want
    kept = se.keep_mass(maps, mass)
    if maps.is_floating_point():
        inside = torch.where(kept, maps, torch.zeros_like(maps))
        assert_close(se.spatial_entropy(maps, mass=mass), se.spatial_entropy(inside, times_mean=0))


@pytest.mark.parametrize("times_mean,maps,E", [
    (0., [[1e20, 1e3, 1e20]], 0.),
    (0., [[1e20, 0, 1e3, 0, 1e20]], math.log(2)),
    (.5, [[1e30, 1e30, 1e-30, 1e30]], -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)),
    (1., [[1.7e308, -1.7e308, 1.7e308]], math.log(2)),
    (1., [[1.7e308] * 3], 0.),
    (0., [[1e300, 0, 1e-30]], 0.),
])
def test_named_magnitudes(times_mean, maps, E):
    maps = torch.tensor([maps], dtype=torch.float64)
    assert_close(se.spatial_entropy(maps, times_mean=times_mean).item(), E)
    assert_close(clear_entropy(maps, times_mean=times_mean)[0].item(), E)
    if max(map(abs, maps.flatten().tolist())) < 1e38:
        assert_close(se.spatial_entropy(maps.float(), times_mean=times_mean).item(), E, atol=1e-6, rtol=0)


@pytest.mark.parametrize("big", [2**24, 2**31 - 2, 2**53, 2**62])
def test_neighbours_among_large_whole_numbers(big):
    m = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.int64) + big
    assert_close(se.spatial_entropy(m).item(), math.log(4), atol=1e-6, rtol=0)
    assert se.above_mean(m).sum() == 4
    if big < 2**31:
        assert_close(se.spatial_entropy(m.int()).item(), math.log(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", EIGHT)
def test_eight_bit_floats(dtype):
    x = torch.rand(3, 2, 6, 7).mul(4).to(dtype)
    assert torch.equal(se.spatial_entropy(x), se.spatial_entropy(x.float()))
    assert torch.equal(se.keep_mass(x), se.keep_mass(x.float())) and torch.equal(se.above_mean(x), se.above_mean(x.float()))
    leaf, plain = x.clone().requires_grad_(), x.float().requires_grad_()
    se.SpatialEntropyLoss()(leaf).backward()
    se.SpatialEntropyLoss()(plain).backward()
    assert leaf.grad.dtype == dtype and torch.equal(leaf.grad.float(), plain.grad.to(dtype).float())


def test_views_that_negate():
    z = torch.randn(2, 3, 5, 6, dtype=torch.complex64)
    x = z.conj().imag                                       # shares the memory of z.imag, with its sign turned
    assert x.is_neg()
    assert torch.equal(se.spatial_entropy(x), se.spatial_entropy(x.clone())) and torch.equal(se.label_regions(x), se.label_regions(x.clone()))


def packed():
    return torch.zeros(3, 3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


@pytest.mark.parametrize("make,said", [
    (lambda: torch.eye(3) * 1j, "complex64, expected real numbers, one a cell; take .abs"),
    (lambda: torch.quantize_per_tensor(torch.eye(3), .1, 0, torch.qint8), "qint8, expected real numbers"),
    (lambda: torch.eye(3).to_sparse(), "got a sparse_coo tensor, expected an ordinary one .* call .to_dense"),
    (lambda: torch.eye(4).to_sparse_csr(), "got a sparse_csr tensor"),
    (lambda: torch.nested.nested_tensor([torch.eye(3)], layout=torch.jagged), "got a nested tensor, .* pad it"),
    pytest.param(packed, "float4_e2m1fn_x2, expected real", marks=pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="not in this torch")),
])
@pytest.mark.parametrize("function", [
    se.spatial_entropy, se.SpatialEntropyLoss(), se.above_mean, se.keep_mass, clear_entropy, lambda m: se.region_mass(m, torch.ones(3, 3).int()),
], ids=["spatial_entropy", "loss", "above_mean", "keep_mass", "clear_entropy", "region_mass"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_real_tensor_is_refused(function, make, said):
    with pytest.raises(TypeError, match=said):
        function(make())


@pytest.mark.parametrize("shape", [(0, 0, 0, 3, 3), (0, 3, 3), (2, 0, 4, 5, 6), (0, 1, 1), (3, 0, 0, 2, 1, 1)])
def test_nothing_along_any_axis(shape):
    x = torch.zeros(shape, requires_grad=True)
    E = se.spatial_entropy(x)
    E.sum().backward()
    assert E.shape == shape[:-2] and x.grad.shape == shape and se.SpatialEntropyLoss()(x) == 0
    assert se.label_regions(x > 0).shape == se.above_mean(x).shape == se.keep_mass(x).shape == shape
    for cells in ((2, 3, 0), (2, 0, 3), (0, 0, 0)):
        with pytest.raises(ValueError, match="a map needs at least one cell"):
            se.spatial_entropy(torch.zeros(cells))


def test_shapes_without_numbers():
    loss = se.SpatialEntropyLoss()
    for way in ("meta", "fake"):
        with FakeTensorMode() if way == "fake" else torch.device("meta"):
            x = torch.rand(2, 3, 5, 6, requires_grad=True)
            assert se.spatial_entropy(x).shape == (2, 3) and se.spatial_entropy(x, mass=.6).shape == (2, 3)
            value = loss(x)
            value.backward()
            assert value.shape == () and x.grad.shape == x.shape and se.label_regions(x > 0).shape == x.shape
    assert loss.left_out == 0 and loss(torch.full((2, 3, 3), torch.nan)) == 0 and loss.left_out == 2
    with pytest.raises(ValueError, match="meta device, which has no numbers"):
        clear_labels(torch.ones(3, 3, device="meta"))


def test_a_default_device_without_numbers():
    x = torch.randn(2, 3, 5, 6)
    want, labels = se.SpatialEntropyLoss()(x), se.label_regions(x > 0)
    torch.set_default_device("meta")
    try:
        loss = se.SpatialEntropyLoss()
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        assert torch.equal(value, want) and leaf.grad.is_cpu and torch.equal(se.label_regions(x > 0), labels)
        assert torch.equal(clear_labels(x > 0), labels) and clear_entropy(x.flatten(0, 1))[0].is_cpu
    finally:
        torch.set_default_device(None)
    assert loss.left_out.is_cpu and loss.left_out == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_first_call_in_inference_mode_on_another_device(compiled):
    loss, x = se.SpatialEntropyLoss().to("meta"), torch.randn(1, 3, 5, 6)      # the count is not where the maps are
    torch._dynamo.reset()
    run = torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss
    with torch.inference_mode():
        run(x)
    run(x.requires_grad_()).backward()
    assert loss.left_out == 0 and loss.left_out.is_cpu and not loss.left_out.is_inference()


@pytest.mark.filterwarnings("ignore:.*jit.script")
def test_transforms_of_functions():
    torch.manual_seed(0)
    x, loss = torch.randn(4, 3, 5, 6, dtype=torch.float64), se.SpatialEntropyLoss()
    f = lambda m: (se.spatial_entropy(m) ** 2).sum()
    leaf = x.clone().requires_grad_()
    E = se.spatial_entropy(leaf)
    rows = torch.stack([torch.autograd.grad(e, leaf, retain_graph=True)[0] for e in E.flatten()]).view(4, 3, 4, 3, 5, 6)
    slope, = torch.autograd.grad((E**2).sum(), leaf)
    E = E.detach()
    assert_close(grad(f)(x), slope)
    assert_close(vmap(grad(f))(x), slope)
    assert_close(vmap(grad(f), in_dims=3, out_dims=3)(x.movedim(0, 3)), slope.movedim(0, 3))
    assert_close(grad(lambda m: vmap(f)(m).sum())(x), slope)
    assert_close(vmap(vmap(se.spatial_entropy))(x), E)
    assert_close(jacrev(se.spatial_entropy)(x), rows)
    assert_close(jacfwd(se.spatial_entropy)(x), rows)
    along = torch.randn_like(x)
    assert_close(jvp(se.spatial_entropy, (x,), (along,))[1], (rows * along).sum((2, 3, 4, 5)))
    assert_close(vjp(se.spatial_entropy, x)[1](E)[0], slope / 2)
    assert_close(vmap(loss)(x), E.mean(1))
    assert_close(vmap(grad(loss))(x), 4 * grad(loss)(x))
    assert_close(functional_call(loss, {}, (x,)), E.mean())
    assert torch.equal(vmap(se.label_regions)(x > 0), se.label_regions(x > 0))
    assert torch.equal(vmap(se.above_mean)(x), se.above_mean(x))
    for options in (dict(mass=.6), dict(connectivity=4, times_mean=.5)):
        assert_close(vmap(lambda m, options=options: se.spatial_entropy(m, **options))(x.abs()), se.spatial_entropy(x.abs(), **options))
    with pytest.raises(ValueError, match="got negative cells"):
        vmap(lambda m: se.spatial_entropy(m, mass=.6))(x)


@pytest.mark.filterwarnings("ignore")
def test_transforms_leave_broken_maps_out():
    x = torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    x[1, 0, 2, 2] = torch.nan
    loss = se.SpatialEntropyLoss(4)
    assert_close(grad(loss)(x), torch.autograd.grad(loss(y := x.clone().requires_grad_()), y)[0])
    g = vmap(grad(loss))(x)
    assert g.isfinite().all() and not g[1, 0].any() and g[1, 1].any() and loss.left_out == 1


@pytest.mark.parametrize("twice", [
    lambda f, x: hessian(f)(x),
    lambda f, x: grad(lambda m: grad(f)(m).square().sum())(x),
    lambda f, x: jvp(grad(f), (x,), (x,)),
    lambda f, x: torch.autograd.functional.hessian(f, x),
    lambda f, x: torch.autograd.grad(f(y := x.clone().requires_grad_()), y, create_graph=True),
], ids=["hessian", "grad of grad", "forward over reverse", "autograd hessian", "create_graph"])
@pytest.mark.filterwarnings("ignore")
def test_a_second_derivative_is_refused_not_zero(twice):
    for f in (se.SpatialEntropyLoss(), lambda m: se.spatial_entropy(m, 4).sum()):
        with pytest.raises(RuntimeError, match="asked for a second derivative"):
            twice(f, torch.randn(2, 3, 3))


def test_a_loss_that_is_built_in_inference_mode_trains():
    with torch.inference_mode(): losses = [se.SpatialEntropyLoss(), se.SpatialEntropyLoss(mass=.6)]
    for loss in losses:
        x = torch.rand(2, 3, 5, 5, requires_grad=True)
        loss(x).backward()
        assert x.grad.isfinite().all() and loss.left_out == 0


def test_the_clear_answer_takes_what_it_says():
    for bad in (torch.rand(2, 3, 5, 5), torch.rand(3, 3, 3, 3), torch.rand(5, 5)):
        with pytest.raises(ValueError, match=r"maps: got shape .*, expected \(M, h, w\)"): clear_entropy(bad)
    for name in ("times_mean", "floor"):
        for value in (-1, math.nan, "1"):
            with pytest.raises(ValueError, match=f"{name}: got .*, expected a number of at least 0"): clear_entropy(torch.rand(3, 5, 5), **{name: value})


@pytest.mark.parametrize("connectivity", [8., np.float32(4), "8", True, None])
def test_a_connectivity_that_is_no_whole_number(connectivity):
    x = torch.rand(1, 5, 5)
    for call in (lambda c: se.spatial_entropy(x, c), lambda c: se.label_regions(x > .5, c), se.SpatialEntropyLoss, lambda c: clear_entropy(x, c),
                 lambda c: clear_labels(x > .5, c)):
        with pytest.raises(ValueError, match="connectivity: got .*, expected 4 or 8"): call(connectivity)
        call(np.int64(8))


@pytest.mark.filterwarnings("ignore:.*jit.script")
def test_forward_mode():
    from torch.autograd import forward_ad
    x, along = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        for f in (se.SpatialEntropyLoss(), lambda m: se.spatial_entropy(m).sum()):
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, along))).tangent
            assert_close(tangent, (grad(f)(x) * along).sum())
    assert torch.autograd.gradcheck(se.spatial_entropy, (x * 4).round().add(along / 99).requires_grad_(), check_forward_ad=True,
                                    check_batched_grad=True, check_batched_forward_grad=True)


def test_compiled_transforms():
    loss, x = se.SpatialEntropyLoss(), torch.randn(4, 3, 5, 6)
    compiled = torch.compile(lambda m: vmap(grad(loss))(m), backend="aot_eager")
    assert_close(compiled(x), vmap(grad(loss))(x))


@pytest.mark.parametrize("name,arguments", [
    ("entropy", lambda m: (m, 8, 1., 1e-3, True)), ("mean_entropy", lambda m: (m, 4, .5, 1e-3, True)),
    ("label_regions", lambda m: (m.detach() > 0, 8)), ("keep_mass", lambda m: (m.detach().abs(), .6)),
])
def test_operators_keep_their_promises(name, arguments):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for maps in (torch.randn(1, 2, 5, 1).expand(2, 2, 5, 4), torch.randn(0, 2, 3, 3)):
        torch.library.opcheck(getattr(torch.ops.spatial_entropy, name).default, arguments(maps.requires_grad_()), test_utils=tests)


def test_long_types_are_those_that_float32_does_not_hold():
    assert set(LONG) == {d for d in WHOLE if d != torch.bool and torch.iinfo(d).max > 2**24}
