"""The same maps by another way: unfused attention with the whole table of similarities, laid out by the models' own functions.

Nothing here uses the tap or its table of families, except the names of the layers to look in.
"""
import math
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch.nn import functional as F


class Calls:
    """Runs a model with unfused attention and keeps, for each of the named layers, its first table of logits and its arguments."""

    def __init__(self, model, names):
        self.model, self.names, self.stack, self.seen = model, names, [], {}
        self.softmax = torch.Tensor.softmax

    def keep(self, logits):
        if self.stack:
            self.seen[self.stack[-1]].setdefault("logits", logits)
            self.seen[self.stack[-1]].setdefault("calls", []).append(logits)

    def sdpa(self, q, k, v, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
        logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        self.keep(logits)
        return self.softmax(logits, -1) @ v

    def unfused(self, x, *args, **kwargs):
        if x.ndim > 2:
            self.keep(x)
        kwargs.pop("_stacklevel", None)
        return self.softmax(x, *args, **kwargs)

    def run_on(self, whole, inputs):
        """The family's model may sit inside another one, which is what is called."""
        modules, handles = dict(self.model.named_modules()), []
        for name in self.names:
            def enter(module, args, kw, name=name):
                self.seen[name] = dict(layer=module, args=(*args, *kw.values()), name=name)
                self.stack.append(name)
            handles.append(modules[name].register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(modules[name].register_forward_hook(lambda *_: self.stack.pop() and None))
        with ExitStack() as on:
            on.enter_context(patch.object(F, "scaled_dot_product_attention", self.sdpa))
            for where in (torch.Tensor, torch, F):
                on.enter_context(patch.object(where, "softmax", lambda x, *a, **k: self.unfused(x, *a, **k)))
            out = whole(**inputs) if isinstance(inputs, dict) else whole(inputs)
        for h in handles:
            h.remove()
        return out, [self.seen[n] for n in self.names]


def rows(logits, query, prefix):
    """(…, m) of one token or the mean patch."""
    return logits[..., prefix:, :].mean(-2) if query == "mean" else logits[..., query, :]


def unpartition(row, unwindow):
    """(B·W, H, n) -> (B, H, h, w) by a model's own reverse function on (B·W, n, H)."""
    return unwindow(row.transpose(1, 2)).permute(0, 3, 1, 2)


def windowed(call, window, shift, partition, reverse, mask=None, flat_heads=None):
    """Blocks on (B, h, w, C): each window's mean over its real patches that see the key, un-windowed by the model's own reverse."""
    x, logits = call["args"][0], call["logits"]
    b, h, w = x.shape[:3]
    hp, wp = math.ceil(h / window[0]) * window[0], math.ceil(w / window[1]) * window[1]
    real = torch.roll(torch.ones(1, h, w, 1), (-shift[0], -shift[1]), (1, 2))
    real = partition(F.pad(real, (0, 0, 0, wp - w, 0, hp - h)))
    real = real.reshape(-1, window[0] * window[1]) > 0
    see = torch.ones(len(real), real.shape[1], real.shape[1], dtype=torch.bool) if mask is None else mask.view(len(real), real.shape[1], -1) == 0
    see = (see & real[:, :, None]).float()
    if flat_heads:
        logits = logits.unflatten(0, (-1, flat_heads))
    logits = logits.unflatten(0, (b, len(real)))                       # (B, W, H, n, m)
    row = (logits * see[:, None]).sum(-2) / see.sum(-2).clamp_min(1)[:, None]
    out = reverse(row.flatten(0, 1).transpose(1, 2).unflatten(1, window), hp, wp)[:, :h, :w]
    return torch.roll(out, shift, (1, 2)).permute(0, 3, 1, 2)


def _plain(c, m, spec, size):
    grid = tuple(s // spec.step for s in size)
    n = grid[0] * grid[1]
    one = c["logits"].shape[-2] == 1 or "attn_pool" in c["name"]
    row = rows(c["logits"], 0 if one or spec.reads == "cls" else "mean", c["logits"].shape[-1] - n)
    return row[..., -n:].unflatten(-1, grid)


def _class(c, m, spec, size):
    grid = tuple(s // 8 for s in size)
    row = rows(c["logits"], 0 if c["logits"].shape[-2] == 1 else "mean", 0)
    return row[..., -grid[0] * grid[1]:].unflatten(-1, grid)


def _volo(c, m, spec, size):
    return _class(c, m, spec, [s // 2 for s in size]) if "post" in c["name"] else _nhwc(c)


def _nhwc(c, *_):
    return c["logits"].mean(-2).unflatten(-1, c["args"][0].shape[1:3])


def _nchw(c, *_):
    return c["logits"].mean(-2).unflatten(-1, c["args"][0].shape[2:4])


def _convit(c, m, spec, size):
    grid = tuple(s // 8 for s in size)
    late = type(c["layer"]).__name__ == "MHSA"
    return (c["logits"][..., 0, 1:] if late else c["logits"].mean(-2)).unflatten(-1, grid)


def _pit(c, m, spec, size):
    x, cls = m.patch_embed(torch.zeros(1, 3, *size)), m.cls_token
    for i, stage in enumerate(m.transformers):
        if stage.pool is not None:
            x, cls = stage.pool(x, cls)
        if c["name"].startswith(f"transformers.{i}."):
            return c["logits"][..., 0, cls.shape[1]:].unflatten(-1, x.shape[-2:])


def _crossvit(c, m, spec, size):
    part = c["name"].split(".")
    i = int(part[3]) if part[2] == "blocks" else 1 - int(part[3])
    grid = [s // p for s, p in zip(m.img_size_scaled[i], ((12, 12), (16, 16))[i])]
    return c["logits"][..., 0, 1:].unflatten(-1, grid)


def _swin(c, m, spec, size):
    from timm.models import swin_transformer as v1
    from timm.models import swin_transformer_v2 as v2
    from timm.models import swin_transformer_v2_cr as cr
    b, home = c["layer"], {"swin_transformer": v1, "swin_transformer_v2": v2, "swin_transformer_v2_cr": cr}[type(m).__module__.split(".")[-1]]
    back = (lambda t, h, w: v1.window_reverse(t, b.window_size, h, w)) if home is v1 else (lambda t, h, w: home.window_reverse(t, b.window_size, (h, w)))
    mask, ws = b.attn_mask, b.window_size
    if getattr(b, "dynamic_mask", False):
        mask = b.get_attn_mask(torch.zeros(1, *(-(-n // s) * s for n, s in zip(c["args"][0].shape[1:3], ws)), 1))
    return windowed(c, tuple(ws), tuple(b.shift_size), lambda t: home.window_partition(t, ws), back, mask)


def _gcvit(c, m, spec, size):
    from timm.models.gcvit import window_partition, window_reverse
    ws = c["layer"].window_size
    return windowed(c, ws, (0, 0), lambda t: window_partition(t, ws), lambda t, h, w: window_reverse(t, ws, (h, w)))


def _by_hand(c, ws):
    cut = lambda t: t.unflatten(1, (-1, ws)).unflatten(3, (-1, ws)).transpose(2, 3).flatten(0, 2)
    paste = lambda t, h, w: t.unflatten(0, (-1, h // ws, w // ws)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    return windowed(c, (ws, ws), (0, 0), cut, paste)


def _tiny_vit(c, m, spec, size):
    ws = c["layer"].window_size
    return _nhwc(c) if c["args"][0].shape[1:3] == (ws, ws) else _by_hand(c, ws)


def _sam(c, m, spec, size):
    from timm.models.vision_transformer_sam import window_partition, window_unpartition
    b, (h, w) = c["layer"], c["args"][0].shape[1:3]
    if not b.window_size:
        return c["logits"].unflatten(0, (-1, b.attn.num_heads)).mean(-2).unflatten(-1, (h, w))
    ws = b.window_size
    back = lambda t, hp, wp: window_unpartition(t, ws, (hp, wp), (hp, wp))
    return windowed(c, (ws, ws), (0, 0), lambda t: window_partition(t, ws)[0], back, flat_heads=b.attn.num_heads)


def _sam2(c, m, spec, size):
    from timm.models.hieradet_sam2 import window_partition, window_unpartition
    b, ws = c["layer"], c["layer"].window_size
    if not b.is_windowed:
        return _nhwc(c)
    if c["logits"].shape[-1] != c["logits"].shape[-2]:                 # pooled queries: their plain mean
        h, w = c["args"][0].shape[1:3]
        real = window_partition(F.pad(torch.ones(1, h, w, 1), (0, 0, 0, -w % ws[1], 0, -h % ws[0])), ws)
        real = F.max_pool2d(real.permute(0, 3, 1, 2), 2).flatten(1).repeat(len(c["args"][0]), 1)[:, None, :, None]
        row = (c["logits"] * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True).clamp_min(1)
        c = c | dict(logits=row.expand(*row.shape[:-2], ws[0] * ws[1], -1))
    return windowed(c, ws, (0, 0), lambda t: window_partition(t, ws), lambda t, h, w: window_unpartition(t, ws, (h, w)))


def _davit(c, m, spec, size):
    from timm.models.davit import window_partition, window_reverse
    ws, x = tuple(c["layer"].window_size), c["args"][0].permute(0, 2, 3, 1)
    return windowed(c | dict(args=(x,)), ws, (0, 0), lambda t: window_partition(t, ws), lambda t, h, w: window_reverse(t, ws, h, w))


def _twins(c, m, spec, size):
    (h, w), b = c["args"][1], c["layer"]
    if hasattr(b, "ws"):
        x = torch.zeros(c["args"][0].shape[0], h, w, 1)
        return _by_hand(c | dict(args=(x,), logits=c["logits"].flatten(0, 1)), b.ws)
    return c["logits"].mean(-2).unflatten(-1, (h // b.sr_ratio, w // b.sr_ratio))


def _nest(c, m, spec, size):
    from timm.models.nest import deblockify
    row = c["logits"].mean(-2)                                         # (B, H, T, n)
    return deblockify(row.permute(0, 2, 3, 1), math.isqrt(row.shape[-1])).permute(0, 3, 1, 2)


def _maxvit(c, m, spec, size):
    from timm.models import maxxvit as mx
    b, nchw = c["layer"], "2d" in type(c["layer"]).__name__
    if not hasattr(b, "partition_size"):
        return _nchw(c) if nchw else _nhwc(c)
    ps, x = tuple(b.partition_size), c["args"][0].permute(0, 2, 3, 1) if nchw else c["args"][0]
    cut, paste = (mx.window_partition, mx.window_reverse) if b.partition_block else (mx.grid_partition, mx.grid_reverse)
    return windowed(c | dict(args=(x,)), ps, (0, 0), lambda t: cut(t, ps), lambda t, h, w: paste(t, ps, (h, w)))


def _pvt(c, m, spec, size):
    (h, w), b = c["args"][1], c["layer"]
    shape = b.sr(b.pool(torch.zeros(1, b.sr.in_channels, h, w))) if b.pool is not None else b.sr(torch.zeros(1, b.sr.in_channels, h, w)) if b.sr else None
    return c["logits"].mean(-2).unflatten(-1, (h, w) if shape is None else shape.shape[-2:])


def _mvit(c, m, spec, size):
    (h, w), b, p = c["args"][1], c["layer"], int(m.cls_token is not None)
    grid = b.pool_k(torch.zeros(1, b.pool_k.in_channels, h, w)).shape[-2:] if b.pool_k is not None else (h, w)
    return (c["logits"][..., 0, 1:] if p else c["logits"].mean(-2)).unflatten(-1, grid)


def _levit(c, m, spec, size):
    n = math.isqrt(c["logits"].shape[-1])
    return c["logits"].mean(-2).unflatten(-1, (n, n))


def _hiera(c, m, spec, size):
    i, b, row = int(c["name"].split(".")[1]), c["layer"], c["logits"].mean(-2)
    if b.use_mask_unit_attn:
        row = row.transpose(2, 3).flatten(2)                           # token j·U + u is the j-th of unit u
    return m.reroll(row.transpose(1, 2), i - 1 if b.q_stride > 1 else i).permute(0, 3, 1, 2)


def _bottleneck(c, m, spec, size):
    x = c["args"][0]
    return c["logits"].unflatten(0, (len(x), -1)).mean(-2).unflatten(-1, x.shape[2:4])


def _halo(c, m, spec, size):
    x, b = c["args"][0], c["layer"]
    row = c["logits"].mean(-2).transpose(1, 2)                         # (B·H, window, blocks)
    fold = lambda t: F.fold(t, x.shape[2:4], b.win_size, stride=b.block_size, padding=b.halo_size)
    return (fold(row)/fold(torch.ones_like(row))).unflatten(0, (len(x), -1)).squeeze(2)


def _mobilevit(c, m, spec, size):
    stride = 2 ** (int(c["name"].split(".")[1]) + 1)
    h, w = (-(-s // stride // 2) for s in size)
    x = c["logits"].mean(-2).unflatten(0, (-1, 4)).transpose(2, 3)     # (B, pixels of a patch, patches, H)
    x = x.transpose(1, 3).reshape(-1, w, 2, 2).transpose(1, 2)
    return x.reshape(x.shape[0] // h // c["logits"].shape[1], -1, 2 * h, 2 * w)


def _msra(c, m, spec, size):
    """One call a head, in windows that are padded at the bottom and on the right."""
    x, ws = c["args"][0], c["layer"].attn.resolution
    logits = torch.stack(c["calls"], 1)                                # (B·W, H, n, m)
    if x.shape[2:4] == (ws, ws):
        return logits.mean(-2).unflatten(-1, (ws, ws))
    return _by_hand(c | dict(args=(x.permute(0, 2, 3, 1),), logits=logits), ws)


def _mqa(c, m, spec, size):
    x, key = c["args"][0], c["layer"].key
    return c["logits"].mean(-2).unflatten(-1, (key.down_conv(x) if hasattr(key, "down_conv") else x).shape[2:4])


def _metaformer(c, m, spec, size):
    x = m.stem(torch.zeros(1, 3, *size))
    for stage in m.stages[:int(c["name"].split(".")[1]) + 1]:
        x = stage.downsample(x)
        x = x.new_zeros(1, stage.blocks[0].norm1.weight.numel(), *x.shape[2:4])
    return c["logits"].mean(-2).unflatten(-1, x.shape[2:4])


def _grid_of(c, m, spec, size):
    """The grid after the layer's own strided step."""
    x, b = c["args"][0], c["layer"]
    for name in ("patch_embed", "pool2", "conv_proj"):
        x = getattr(b, name)(x) if hasattr(b, name) else x
    row = c["logits"].mean(-2)
    return (row if row.ndim == 3 else row[:, None]).unflatten(-1, x.shape[2:4])


def _pool(c, m, spec, size):
    return c["logits"][..., 0, 1:].unflatten(-1, c["args"][0].shape[2:4])


def grid_fold(c, m, spec, size):
    """Models of other libraries: [CLS], mean, or the pool's own query; nn.MultiheadAttention gives (B·H, n, m)."""
    logits, n = c["logits"], math.prod(s // spec.step for s in size)
    if logits.ndim == 3:
        logits = logits.unflatten(0, (-1, c["layer"].num_heads))
    one = logits.shape[-2] == 1 or "pool" in c["name"]
    row = rows(logits, 0 if one or spec.reads == "cls" else "mean", spec.prefix)
    return row[..., -n:].unflatten(-1, [s // spec.step for s in size])


def swin_hf_fold(c, m, spec, size):
    """Hugging Face rolls after padding: the roll and the mask live on the padded canvas."""
    from transformers.models.swin.modeling_swin import window_partition, window_reverse
    b, (h, w), (batch, ws) = c["layer"], c["args"][1], (c["args"][0].shape[0], c["layer"].window_size)
    hp, wp = -(-h // ws) * ws, -(-w // ws) * ws
    shift = b.shift_size
    real = torch.roll(F.pad(torch.ones(1, h, w, 1), (0, 0, 0, wp - w, 0, hp - h)), (-shift, -shift), (1, 2))
    real = window_partition(real, ws).reshape(-1, ws * ws) > 0
    size = [(hp, wp)] if "MaskFormer" in type(b).__name__ else [hp, wp]
    mask = b.get_attn_mask(*size, dtype=torch.float32, device="cpu")
    see = torch.ones(len(real), ws * ws, ws * ws, dtype=torch.bool) if mask is None else mask == 0
    see = (see & real[:, :, None]).float()
    logits = c["logits"].unflatten(0, (batch, len(real)))
    row = (torch.where(see[:, None] > 0, logits, 0.)).sum(-2) / see.sum(-2).clamp_min(1)[:, None]
    out = window_reverse(row.flatten(0, 1).transpose(1, 2).unflatten(1, (ws, ws)), ws, hp, wp)
    return torch.roll(out, (shift, shift), (1, 2))[:, :h, :w].permute(0, 3, 1, 2)


def hf_fold(c, spec, size):
    """transformers, by the specification of tests/zoo_transformers.py."""
    if spec.fold == "swin":
        return swin_hf_fold(c, None, spec, size)
    if spec.fold in HF_FOLDS:
        return HF_FOLDS[spec.fold](c, spec, size)
    logits, grid = c["logits"], [s // spec.step for s in size]
    if logits.ndim == 3:
        logits = logits.unflatten(0, (-1, c["layer"].num_heads))
    n, prefix = math.prod(grid), 0 if logits.shape[-2] == 1 else spec.prefix
    queries = dict(cls=slice(0, 1), pool=slice(prefix, None), mean=slice(prefix, prefix + n), suffix=slice(prefix + n, None), prefix=slice(0, prefix))
    return logits[..., queries[spec.reads], :].mean(-2)[..., prefix:prefix + n].unflatten(-1, grid)


def _by_layer(c, spec, size):                              # keys pooled by the layer's own convolution
    (h, w), layer = c["args"][1:3], c["layer"]
    conv = next((m for m in layer.modules() if isinstance(m, torch.nn.Conv2d)), None)
    grid = (h, w) if conv is None else conv(torch.zeros(1, conv.in_channels, h, w)).shape[-2:]
    return _first_or_mean(c["logits"], grid)


def _first_or_mean(logits, grid):                          # a [CLS] where there is one key more than places
    one = logits.shape[-1] - math.prod(grid)
    return (logits[..., 0, 1:] if one else logits.mean(-2)).unflatten(-1, grid)


def _by_windows(c, spec, size):
    b, x = c["layer"], c["args"][0]
    nchw = "VitDet" in type(b).__name__
    batch, (h, w), ws = x.shape[0], x.shape[2:4] if nchw else x.shape[1:3], b.window_size
    logits = c["logits"]
    if ws == 0:
        return logits.reshape(batch, -1, *logits.shape[-2:]).mean(-2).unflatten(-1, (h, w))
    rows, cols = -(-h // ws), -(-w // ws)
    real = F.pad(torch.ones(h, w), (0, cols * ws - w, 0, rows * ws - h)).unflatten(1, (cols, ws)).unflatten(0, (rows, ws))
    real = real.transpose(1, 2).flatten(0, 1).flatten(1)   # (W, n)
    logits = logits.reshape(batch, len(real), -1, *logits.shape[-2:])
    row = (logits * real[None, :, None, :, None]).sum(-2) / real.sum(-1)[None, :, None, None]
    row = row.unflatten(-1, (ws, ws)).unflatten(1, (rows, cols)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return row[..., :h, :w]


def _sam2_hf(c, spec, size):
    """The second softmax; where queries are pooled, their mean over those that hold a place."""
    b, ws, x, logits = c["layer"], c["layer"].window_size, c["args"][0], c["calls"][-1]
    if ws and b.query_stride:
        h, w = x.shape[1:3]
        real = F.pad(torch.ones(h, w), (0, -w % ws, 0, -h % ws)).unflatten(1, (-1, ws)).unflatten(0, (-1, ws)).transpose(1, 2).flatten(0, 1)
        real = F.max_pool2d(real[:, None], 2).flatten(1).repeat(len(x), 1)[:, None, :, None]
        row = (logits * real).sum(-2, keepdim=True) / real.sum(-2, keepdim=True)
        logits = row.expand(*row.shape[:-2], ws * ws, -1)
    return _by_windows(c | dict(logits=logits), spec, size)


def _cvt_hf(c, spec, size):
    key = c["layer"].convolution_projection_key
    (h, w) = c["args"][1:3]
    conv = next(m for m in key.modules() if isinstance(m, torch.nn.Conv2d))
    return _first_or_mean(c["logits"], conv(torch.zeros(1, conv.in_channels, h, w)).shape[-2:])


def _unfolded(c, spec, size):                              # MobileViT: each pixel of the 2×2 patches has a call of its own
    row = c["logits"].mean(-2)
    n = math.isqrt(row.shape[-1])
    row = row.unflatten(0, (-1, 2, 2)).unflatten(-1, (n, n))   # (B, a, b, H, y, x)
    return row.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


def _clip(c, spec, size):                                  # tokens of (T, h, w), a map for each frame
    grid = [s // spec.step for s in size]
    logits = c["logits"][..., spec.prefix:]
    row = logits[..., 0, :] if spec.reads == "cls" else logits.mean(-2)
    return row.unflatten(-1, (-1, *grid)).transpose(1, 2).flatten(0, 1)


def _hiera_hf(c, spec, size):
    """Unrolled three stages deep: tokens in the order of the strides, windows last."""
    row = c["logits"].mean(-2)                            # (B, H, W, n)
    row = row.transpose(2, 3).flatten(2)                  # token j·W + w is the j-th of window w
    stage = int(c["name"].split("stages.")[1].split(".")[0])
    grid = [s // spec.step // 2 ** max(stage - 1, 0) for s in size]      # pooled at the first layer of a stage, after its keys
    turns = 2 - max(stage - 1, 0)
    row = row.unflatten(-1, (*[2, 2] * turns, *(g // 2 ** turns for g in grid)))
    for _ in range(turns):                                # the innermost stride last
        *lead, a, b2, y, x = row.shape
        row = row.movedim((-4, -3), (-3, -1)).reshape(*lead, y * a, x * b2)
    return row


def _cut_once(c, spec, size):                              # 2×2 windows that are images, or one sequence of all of them
    b, grid = c["layer"], [s // spec.step // 2 for s in size]
    one = int("RfDetr" in type(b).__name__)                # a [CLS] before each window
    logits = c["logits"]
    joined = logits.shape[-1] > grid[0] * grid[1] + one
    if not joined:                                         # (B·4, H, n, m)
        row = logits[..., one:, one:].mean(-2).unflatten(0, (-1, 2, 2))
    else:
        n = grid[0] * grid[1] + one
        parts = logits.unflatten(-1, (4, n))[..., one:].unflatten(-3, (4, n))[..., one:, :, :]
        row = parts.flatten(2, 3).mean(2).movedim(2, 1).unflatten(1, (2, 2))             # (B, 2, 2, H, m)
    return row.unflatten(-1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _last_patches(c, spec, size):                          # whatever comes before them
    grid = [s // spec.step for s in size]
    n = grid[0] * grid[1]
    logits = c["logits"][..., -n:, -n:]
    return logits.mean(-2).unflatten(-1, grid)


HF_FOLDS = dict(cut=_cut_once, last=_last_patches,
                hiera=_hiera_hf, clip=_clip, unfolded=_unfolded, pooled=_by_layer, pvt=_by_layer, windows=_by_windows, sam2=_sam2_hf, cvt=_cvt_hf,
                square=lambda c, spec, size: _levit(c, None, spec, size))


def tv_swin_fold(c, m, spec, size):
    """torchvision pads, then rolls; what may not be seen has -100 added."""
    x, b = c["args"][0], c["layer"]
    (batch, h, w), ws = x.shape[:3], b.window_size[0]
    hp, wp = -(-h // ws) * ws, -(-w // ws) * ws
    shift = [0 if ws >= n else s for n, s in zip((hp, wp), b.shift_size)]
    cut = lambda t: t.unflatten(1, (-1, ws)).unflatten(3, (-1, ws)).transpose(2, 3).flatten(0, 2)
    real = F.pad(torch.ones(1, h, w, 1), (0, 0, 0, wp - w, 0, hp - h))
    real = cut(torch.roll(real, [-s for s in shift], (1, 2))).flatten(1) > 0
    logits = c["logits"].unflatten(0, (batch, len(real)))
    see = (logits[:1, :, :1] > -50) & real[:, None, :, None]
    row = torch.where(see, logits, 0.).sum(-2) / see.sum(-2).clamp_min(1)
    out = row.transpose(1, 2).unflatten(-1, (ws, ws)).unflatten(2, (hp // ws, wp // ws)).transpose(3, 4).flatten(2, 3).flatten(3)
    return torch.roll(out, shift, (2, 3))[..., :h, :w]


def tv_maxvit_fold(c, m, spec, size):
    b, (h, w) = c["layer"], c["args"][0].shape[2:4]
    return b.departition_op(b.departition_swap(c["logits"].mean(-2).transpose(2, 3)), b.p, h // b.p, w // b.p)


FOLDS = {name[1:]: f for name, f in list(globals().items()) if name[0] == "_" and name[1] != "_" and callable(f)}
