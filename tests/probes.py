"""Questions to a running model that share nothing with how the tap reads a map: what a patch moves, and what an output reads."""
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn import functional as F

import spatial_entropy as se
from spatial_entropy.attention.families import find
from spatial_entropy.attention.tap import cells_off, patches_at, peaks

PLACES = ((.12, .12), (.12, .88), (.88, .12), (.88, .88), (.38, .62))    # of an image, none on an axis of symmetry


def maps_of(model, run, block="all", query="auto"):
    with se.AttentionTap(model, block, query) as tap, torch.no_grad():
        run(model)
        return tap.maps()


def moved_by_pixels(model, size, images=3, call=lambda model, x: model(x)):
    """{layer: [cells between the largest change and the patch that was changed]}; changes that are spread evenly are left out."""
    g = torch.Generator().manual_seed(0)
    boxes = patches_at(PLACES, size)
    x = torch.rand(images, 1, 3, *size, generator=g).repeat(1, 1 + len(boxes), 1, 1, 1)
    for j, (top, left, h, w) in enumerate(boxes):
        x[:, 1 + j, :, top:top + h, left:left + w] = 4 * torch.randn(images, 3, h, w, generator=g)
    maps = maps_of(model, lambda m: call(m, x.flatten(0, 1)))
    return {i: _off(m.unflatten(0, (images, -1)), boxes, size) for i, m in maps.items()}


def _off(m, boxes, size):
    change = (m[:, 1:] - m[:, :1]).abs().mean((0, 2))                    # (places, h, w)
    cells = zip(peaks(change), boxes)
    return [cells_off(c, m.shape[-2:], b, size) for c, b in cells if c is not None]


@contextmanager
def changed_input(layer, change):
    """The layer's first argument is passed through `change`."""
    def before(module, args, kwargs):
        return (change(args[0]), *args[1:]), kwargs
    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def spatial_axes(layer, model, run, size):
    """The axes of (h, w) in the layer's input, or None where it is a sequence."""
    seen = []
    with changed_input(layer, lambda x: seen.append(x.shape) or x), torch.no_grad():
        run(model)
    shape, ratio = seen[0], size[0] / size[1]
    alike = lambda i: abs(shape[i] / shape[i + 1] / ratio - 1) < .2 and shape[i] < size[0]
    return None if len(shape) != 4 else next(((i, i + 1) for i in (1, 2) if alike(i)), None)


def moved_by_features(model, number, axes, size, images=3):
    """[cells between the largest change of a layer's map and the place of its own input that was changed]."""
    layer, boxes, full = find(model).layers[number][1], [], []
    g = torch.Generator().manual_seed(0)

    def change(t):
        t = t.clone()
        full[:] = [t.shape[a] for a in axes]
        boxes[:] = [(int(y * full[0]), int(x * full[1]), 1, 1) for y, x in PLACES]
        views = t.movedim(axes, (1, 2)).unflatten(0, (images, -1))       # (images, places, h, w, c)
        for j, (y, x, *_) in enumerate(boxes):
            views[:, 1 + j, y, x] += 4 * t.std() * torch.randn(views[:, 0, 0, 0].shape, generator=g)
        return t
    x = torch.rand(images, 3, *size, generator=g).repeat_interleave(1 + len(PLACES), 0)
    with changed_input(layer, change):
        m = maps_of(model, lambda m: m(x), number).unflatten(0, (images, -1))
    moved = (m[:, 1:] - m[:, :1]).abs().mean((0, 2))
    return [cells_off(d.argmax().item(), d.shape, b, full) for d, b in zip(moved, boxes)]


def other_padding(model, numbers, x, value=3.):
    """{layer: (its map, its map with another value in the padding)} of the layers that pad, by `torch.nn.functional.pad`."""
    pairs = {}
    for number in numbers:
        plain = maps_of(model, lambda m: m(x), number)
        with padding_of(find(model).layers[number][1], value) as seen:
            other = maps_of(model, lambda m: m(x), number)
        if seen:
            pairs[number] = plain, other
    return pairs


@contextmanager
def padding_of(layer, value):
    """Within one layer, padding has another value than 0; gives the list of what was padded."""
    pad, on, seen = F.pad, [], []

    def filled(t, sides, *args, **kwargs):
        if not on or not any(sides):
            return pad(t, sides, *args, **kwargs)
        seen.append(sides)
        return pad(t, sides, value=value)
    handles = layer.register_forward_pre_hook(lambda *_: on.append(1)), layer.register_forward_hook(lambda *_: on.clear())
    with patch.object(F, "pad", filled):
        yield seen
    for handle in handles:
        handle.remove()


def entropies(model, weights, x, lr, updates=30):
    "Spatial entropy of the tap's maps, update by update, when AdamW lowers it and nothing else."
    loss, optimizer, values = se.SpatialEntropyLoss(), torch.optim.AdamW(weights, lr), []
    with se.AttentionTap(model) as tap:
        for _ in range(updates):
            model(x)
            values.append(loss(tap.maps()))
            optimizer.zero_grad()
            values[-1].backward()
            optimizer.step()
    return values
