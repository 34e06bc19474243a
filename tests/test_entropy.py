"""Entropy and gradient against a plain numpy float64 computation with scipy's labels."""
import warnings

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.testing import assert_close

import spatial_entropy as se


def oracle(s):
    """E and dE/ds of one map, from the formulas, in float64."""
    s = np.asarray(s, np.float64)
    a = s - s.mean()
    on = a > 1e-12 * max(1., np.abs(s).max())
    labels, count = ndimage.label(on, np.ones((3, 3)))
    A = a[on].sum()
    if not count:
        return 0., np.zeros_like(s)
    P = ndimage.sum(np.where(on, a, 0), labels, np.arange(1, count + 1)) / A
    E = -(P * np.log(P)).sum()
    g = np.where(on, -(np.log(P)[labels - 1] + E) / A, 0)
    return E, g - g.mean()


def smooth(n, h, w, sigma, rng):
    return ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, sigma, sigma)) if sigma else rng.standard_normal((n, h, w))


def blob(n, h, w, rng):
    y, x = np.mgrid[:h, :w]
    c = rng.uniform(0, 1, (n, 2, 1, 1)) * [[[h]], [[w]]]
    return np.exp(-((y - c[:, 0]) ** 2 + (x - c[:, 1]) ** 2) / 6)


def kinds(h, w):
    rng = np.random.default_rng(h * w)
    dots = np.zeros((1, h, w))
    dots[:, ::2, ::2] = 1
    return np.concatenate([smooth(30, h, w, 0, rng), smooth(30, h, w, 1, rng), smooth(30, h, w, 2, rng), blob(10, h, w, rng),
                           dots, np.full((1, h, w), .1), 1e-6 * smooth(5, h, w, 1, rng), 1e4 + smooth(5, h, w, 1, rng)])


@pytest.mark.parametrize("h,w", [(1, 9), (9, 1), (5, 7), (14, 14), (13, 29), (37, 37)])
@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_value_and_gradient(h, w, dtype, tol):
    maps = torch.tensor(kinds(h, w)).to(dtype).requires_grad_()
    E = se.spatial_entropy(maps)
    g, = torch.autograd.grad(E.sum(), maps)
    # the oracle sees the very numbers that arrived, so a float32 map is judged at its own values
    want = [oracle(m) for m in maps.detach().double().numpy()]
    A = (maps - maps.mean((-2, -1), keepdim=True)).relu().sum((-2, -1)).double()
    assert E.dtype == dtype and g.dtype == dtype
    assert_close(E.double(), torch.tensor([e for e, _ in want]), atol=tol, rtol=tol)
    for ours, (_, theirs), a in zip(g.double(), want, A):            # a gradient is of the order of 1/A
        assert (ours - torch.tensor(theirs)).abs().max() <= 10 * tol / max(a.item(), 1e-30)
    assert (g.double().sum((-2, -1)).abs() <= 1e-5 * h * w / A.clamp_min(1e-30)).all()


def test_gradcheck_where_labels_cannot_flip():
    torch.manual_seed(0)
    x = (torch.rand(4, 6, 5).round() * 4 + torch.rand(4, 6, 5) / 4).double().requires_grad_()
    assert torch.autograd.gradcheck(se.spatial_entropy, x)
    assert torch.autograd.gradcheck(se.SpatialEntropyLoss(4), x)
    labels = se.label_regions(se.above_mean(x))
    assert torch.autograd.gradcheck(lambda m: se.region_mass(m, labels), x)


def test_invariances():
    x = torch.tensor(kinds(14, 14)[:90])
    E = se.spatial_entropy(x)
    assert_close(se.spatial_entropy(7 * x - 3), E)
    assert_close(se.spatial_entropy(x.transpose(-1, -2)), E)
    assert (E >= 0).all() and (E <= se.label_regions(se.above_mean(x)).amax((-2, -1)).double().log() + 1e-9).all()


@pytest.mark.parametrize("R", [1, 2, 5, 9])
def test_equal_regions_give_ln_R(R):
    x = torch.zeros(5, 5)
    x.view(-1)[[0, 2, 4, 10, 12, 14, 20, 22, 24][:R]] = 1
    assert_close(se.spatial_entropy(x).item(), float(np.log(R)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_inside(dtype):
    x = (torch.tensor(kinds(14, 14)[:60]) * 1000).to(dtype).requires_grad_()
    E = se.spatial_entropy(x)
    assert E.dtype == torch.float32 and torch.equal(E, se.spatial_entropy(x.float()))
    (65536. * E.mean()).backward()                       # as a GradScaler would
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_autocast_does_not_change_the_result():
    x = torch.randn(4, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        E = se.spatial_entropy(x)
    assert torch.equal(E, se.spatial_entropy(x))


@pytest.mark.parametrize("cell", [torch.nan, torch.inf, -torch.inf])
def test_broken_maps_are_left_out_counted_and_reported_once(cell):
    from spatial_entropy.entropy import _report_broken_maps
    _report_broken_maps.cache_clear()
    x = torch.randn(6, 8, 8)
    x[2, 3, 3] = cell
    x.requires_grad_()
    loss = se.SpatialEntropyLoss()
    with pytest.warns(UserWarning, match="NaN or infinite cells"):
        value = loss(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(x)
    value.backward()
    good = [0, 1, 3, 4, 5]
    assert_close(value, se.spatial_entropy(x[good]).mean())
    assert loss.left_out == 2 and x.grad.isfinite().all() and (x.grad[2] == 0).all()


@pytest.mark.parametrize("value", [0., .1, -3.3, 1e30, 1e-30])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 14])
def test_constant_maps_are_empty(value, size):
    x = torch.full((2, size, size), value, requires_grad=True)
    E = se.spatial_entropy(x)
    E.sum().backward()
    assert (E == 0).all() and (x.grad == 0).all() and not se.above_mean(x).any()


def test_nothing_at_all():
    assert se.spatial_entropy(torch.zeros(0, 3, 4, 4)).shape == (0, 3)
    assert se.SpatialEntropyLoss()(torch.zeros(0, 3, 4, 4)) == 0
    x = torch.full((1, 4, 4), torch.nan, requires_grad=True)
    loss = se.SpatialEntropyLoss()(x)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_strided_input_and_second_derivative():
    x = torch.randn(2, 3, 17, 20, requires_grad=True)
    part = x[..., 1:15, 2:19]
    assert torch.equal(se.spatial_entropy(part), se.spatial_entropy(part.contiguous()))
    with pytest.raises(RuntimeError, match="asked for a second derivative"):
        torch.autograd.grad(se.spatial_entropy(part).sum(), x, create_graph=True)
