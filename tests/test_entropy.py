"""Entropy and gradient against a plain numpy float64 computation with scipy's labels."""
import warnings

import numpy as np
import pytest
import torch
from kinds import kinds, oracle
from torch.testing import assert_close

import spatial_entropy as se

GRIDS = [(1, 1), (1, 9), (9, 1), (5, 7), (14, 14), (13, 29), (37, 37), (3, 70)]


def maps_of(n, h, w):
    return torch.tensor(kinds(n, h, w, np.random.default_rng(h * w)))


@pytest.mark.parametrize("h,w", GRIDS)
@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("connectivity,times_mean,floor", [(8, 1., 1e-3), (4, 1., 0.), (8, 1.5, 1e-3), (8, 0., 1e-3)])
def test_value_and_gradient(h, w, dtype, tol, connectivity, times_mean, floor):
    maps = maps_of(60, h, w).to(dtype).requires_grad_()
    E = se.spatial_entropy(maps, connectivity, times_mean=times_mean, floor=floor)
    g, = torch.autograd.grad(E.sum(), maps)
    # the oracle sees the very numbers that arrived, so a float32 map is judged at its own values
    want = [oracle(m, connectivity, times_mean, floor) for m in maps.detach().double().numpy()]
    assert E.dtype == dtype and g.dtype == dtype
    assert_close(E.double(), torch.tensor([e for e, *_ in want], dtype=torch.float64), atol=tol, rtol=tol)
    for ours, (_, theirs, _, size) in zip(g.double(), want):
        assert (ours - torch.tensor(theirs)).abs().max() <= 10 * tol * size
    if times_mean == 1:
        assert (g.double().sum((-2, -1)).abs() <= tol * h * w * torch.tensor([size for *_, size in want], dtype=torch.float64)).all()


def test_gradcheck_where_labels_cannot_flip():
    torch.manual_seed(0)
    x = (torch.rand(4, 6, 5).round() * 4 + torch.rand(4, 6, 5) / 4).double().requires_grad_()
    assert torch.autograd.gradcheck(se.spatial_entropy, x)
    assert torch.autograd.gradcheck(se.SpatialEntropyLoss(4), x)
    labels = se.label_regions(se.above_mean(x))
    assert torch.autograd.gradcheck(lambda m: se.region_mass(m, labels), x)


def test_invariances():
    x = maps_of(90, 14, 14)
    E = se.spatial_entropy(x)
    assert_close(se.spatial_entropy(8 * x - 4), E, atol=1e-6, rtol=1e-6)
    assert_close(se.spatial_entropy(x.transpose(-1, -2)), E)
    assert (E >= 0).all() and (E <= se.label_regions(se.above_mean(x)).amax((-2, -1)).clamp_min(1).double().log() + 1e-9).all()


@pytest.mark.parametrize("R", [1, 2, 5, 9])
def test_equal_regions_give_ln_R(R):
    x = torch.zeros(5, 5)
    x.view(-1)[[0, 2, 4, 10, 12, 14, 20, 22, 24][:R]] = 1
    assert_close(se.spatial_entropy(x).item(), float(np.log(R)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_float32_inside(dtype):
    x = (maps_of(60, 14, 14) * 1000).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    E = se.spatial_entropy(x)
    assert E.dtype == torch.float32 and torch.equal(E, se.spatial_entropy(x.float()))
    (.01 * 65536. * E.mean()).backward()                       # as a GradScaler would
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_autocast_does_not_change_the_result():
    x = torch.randn(4, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        E = se.spatial_entropy(x)
    assert torch.equal(E, se.spatial_entropy(x))


@pytest.mark.parametrize("cell", [torch.nan, torch.inf, -torch.inf])
def test_broken_maps_are_left_out_counted_and_reported_once(cell):
    from spatial_entropy.measure.operators import _report_broken_maps
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
