"""Maps of every kind, and the oracle: the formulas in numpy and float64 with scipy's labels, one map at a time."""
import numpy as np
from PIL import Image
from scipy import ndimage

STRUCTURE = {8: np.ones((3, 3)), 4: ndimage.generate_binary_structure(2, 1)}


def oracle(s, connectivity=8, times_mean=1., floor=1e-3):
    "E, dE/ds, the labels, and the size below which a gradient is rounding, of one map."
    s = np.asarray(s, np.float64)
    if not np.isfinite(s).all():
        return np.nan, np.zeros_like(s), None, 0.
    d = s - s.flat[0] if times_mean == 1 else s
    a = d - times_mean * d.sum() / d.size
    on = a > 0
    labels, count = ndimage.label(on, STRUCTURE[connectivity])
    if not count:
        return 0., np.zeros_like(s), labels, 0.
    A = a[on].sum()
    P = ndimage.sum(np.where(on, a, 0), labels, np.arange(1, count + 1)) / A
    E = -(P * np.log(P)).sum()
    unit = 1 / max(A, floor * max(1., np.abs(s).sum()))
    g = np.where(on, -(np.log(P)[labels - 1] + E) * unit, 0)
    g = g - times_mean * g.mean()
    return E, g, labels, max(np.abs(g).max(), unit / 100)


def smooth(n, h, w, sigma, rng):
    return ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, sigma, sigma)) if sigma else rng.standard_normal((n, h, w))


def blob(n, h, w, rng):
    y, x = np.mgrid[:h, :w]
    c = rng.uniform(0, 1, (n, 2, 1, 1)) * [[[h]], [[w]]]
    return np.exp(-((y - c[:, 0]) ** 2 + (x - c[:, 1]) ** 2) / (2 * rng.uniform(1, max(h, w) / 4 + 1, (n, 1, 1)) ** 2))


def serpentine(h, w):
    m = np.zeros((h, w))
    m[::2] = 1
    m[1::4, -1] = 1
    m[3::4, 0] = 1
    return m


def spiral(h, w):
    "A one-cell-wide spiral to the middle: one region."
    m, y, x, dy, dx = np.zeros((h, w)), 0, 0, 0, 1
    inside = lambda b, a: 0 <= b < h and 0 <= a < w
    m[0, 0], turned = 1, 0
    while turned < 2:
        b, a, c, d = y + dy, x + dx, y + 2 * dy, x + 2 * dx
        if inside(b, a) and not m[b, a] and not (inside(c, d) and m[c, d]):
            m[b, a], y, x, turned = 1, b, a, 0
        else:
            dy, dx, turned = dx, -dy, turned + 1
    return m


def dots(h, w):
    m = np.zeros((h, w))
    m[::2, ::2] = 1
    return m


def kinds(n, h, w, rng):
    "n maps (n, h, w): white, smooth, blobs, ties, dots, spirals, serpentines, checkers, flat, faint, far from zero."
    awkward = np.stack([dots(h, w), spiral(h, w), serpentine(h, w), serpentine(w, h).T, 1 - spiral(h, w), np.indices((h, w)).sum(0) % 2,
                        np.full((h, w), .1), np.full((h, w), -3.3), np.eye(h, w), np.arange(h * w).reshape(h, w)])
    m = max(1, (n - 2 * len(awkward)) // 8)
    parts = [awkward, awkward * rng.uniform(.5, 2, awkward.shape), smooth(m, h, w, 0, rng), smooth(m, h, w, 1, rng), smooth(m, h, w, 2, rng),
             blob(m, h, w, rng), rng.integers(0, 4, (m, h, w)) * 1., 1e-6 * smooth(m, h, w, 1, rng), 1e4 + smooth(m, h, w, 1, rng)]
    rest = n - sum(map(len, parts))
    return np.concatenate([*parts, *([smooth(rest, h, w, 1, rng) ** 3] if rest > 0 else [])])[:n]


def grey_noise(seed, strength, side=36):
    "A picture of noise. Pillow's own cannot be seeded, and depends on what ran before."
    noise = np.random.default_rng((seed, strength)).normal(128, strength, (side, side))
    return Image.fromarray(noise.clip(0, 255).astype("uint8")).convert("RGB")
