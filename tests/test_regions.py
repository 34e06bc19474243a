"""Labels against scipy.ndimage.label, which shares no code with ours."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kinds import STRUCTURE, serpentine
from scipy import ndimage

import spatial_entropy as se
from spatial_entropy.measure.regions import clear_labels

GRIDS = [(1, 1), (1, 17), (17, 1), (2, 3), (5, 7), (7, 7), (8, 8), (13, 11), (14, 14), (16, 9), (37, 21), (64, 33)]


def oracle(masks, connectivity):
    return np.stack([ndimage.label(m, STRUCTURE[connectivity])[0] for m in masks]).astype(np.int32)


LABELS = pytest.mark.parametrize("label", [se.label_regions, clear_labels])


@pytest.mark.parametrize("connectivity", [4, 8])
@LABELS
def test_ten_thousand_random_maps_without_a_mismatch(connectivity, label):
    rng, seen = np.random.default_rng(connectivity), 0
    for h, w in GRIDS:
        n = 10_000 // len(GRIDS) + 1
        masks = rng.random((n, h, w)) < rng.uniform(.05, .95, (n, 1, 1))
        assert np.array_equal(label(torch.tensor(masks), connectivity).numpy(), oracle(masks, connectivity)), (h, w)
        seen += n
    assert seen >= 10_000


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("h,w", [(15, 15), (33, 47), (128, 128)])
@LABELS
def test_adversarial_masks(h, w, connectivity, label):
    checks = np.indices((h, w)).sum(0) % 2 == 0
    dots = np.zeros((h, w), bool)
    dots[::2, ::2] = True
    comb = np.zeros((h, w), bool)
    comb[:, ::2] = True
    comb[-1] = True
    rings = np.minimum.reduce([*np.indices((h, w)), *(np.indices((h, w))[:, ::-1, ::-1])]) % 2 == 0
    masks = np.stack([serpentine(h, w) > 0, serpentine(w, h).T > 0, checks, dots, comb, ~comb, rings, ~rings,
                      np.zeros((h, w), bool), np.ones((h, w), bool), np.eye(h, w, dtype=bool)])
    assert np.array_equal(label(torch.tensor(masks), connectivity).numpy(), oracle(masks, connectivity))


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda s: arrays(bool, s)), st.sampled_from([4, 8]))
def test_any_small_mask(mask, connectivity):
    assert np.array_equal(se.label_regions(torch.tensor(mask), connectivity).numpy(), oracle(mask[None], connectivity)[0])


def test_leading_dimensions_dtype_and_determinism():
    mask = torch.rand(2, 3, 4, 9, 11) < .5
    labels = se.label_regions(mask)
    assert labels.shape == mask.shape and labels.dtype == torch.int32
    assert torch.equal(labels[1, 2, 3], se.label_regions(mask[1, 2, 3]))
    assert all(torch.equal(labels, se.label_regions(mask)) for _ in range(20))
    assert se.label_regions(mask[:0]).shape == (0, 3, 4, 9, 11)
    assert torch.equal(se.label_regions(mask.transpose(-1, -2)).cpu(), se.label_regions(mask.transpose(-1, -2).contiguous()))


@pytest.mark.parametrize("call,said", [
    (lambda: se.label_regions(torch.ones(3)), r"got shape \(3,\), expected \(\.\.\., h, w\)"),
    (lambda: se.label_regions(torch.ones(3, 0)), "at least one cell"),
    (lambda: se.label_regions(torch.ones(3, 3), 6), "got 6, expected 4 or 8"),
    (lambda: se.label_regions(np.ones((3, 3))), "got ndarray, expected a tensor"),
    (lambda: se.keep_mass(torch.ones(3, 3), 0), r"got 0, expected a share in \(0, 1\]"),
])
def test_error_texts(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@pytest.mark.parametrize("mass", [.1, .6, .95, 1.])
def test_keep_mass_is_smallest_and_enough(mass):
    maps = torch.rand(50, 6, 7, dtype=torch.float64)
    kept = se.keep_mass(maps, mass)
    total = maps.sum((-2, -1))
    held = (maps * kept).sum((-2, -1))
    weakest = torch.where(kept, maps, torch.inf).amin((-2, -1))
    assert (held >= mass * total * (1 - 2e-6)).all() and (held - weakest < mass * total).all()


def test_a_mass_of_one_keeps_every_cell_above_zero():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        maps = torch.tensor([[1., 1e-7, 0.], [1e-12, 1e-30, 0.]], dtype=dtype)
        assert torch.equal(se.keep_mass(maps, 1), maps > 0) and torch.equal(se.keep_mass(maps, 1.), maps > 0)
        assert se.keep_mass(maps, .999).sum() == 1
    assert not se.keep_mass(torch.tensor([[1., torch.nan], [2., 3.]]), 1.).any() and not se.keep_mass(torch.zeros(2, 2), 1.).any()
