"""The tap against unfused attention, and under what training does to a model."""
import io
import pickle
import re
import sys
import tempfile
import warnings
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.attention.families import find

sys.path.insert(0, str(Path(__file__).parent))
from reference import Calls  # noqa: E402
from zoo import HF, OTHERS, TIMM, _swin_hf, _torchvision, hf  # noqa: E402

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
MODELS = {
    "cls": ("vit_tiny_patch16_224", {}),
    "mean of a model with [CLS]": ("vit_tiny_patch16_224", dict(global_pool="avg")),
    "no [CLS]": ("vit_tiny_patch16_224", dict(global_pool="avg", class_token=False)),
    "registers": ("vit_tiny_patch16_224", dict(reg_tokens=4)),
    "register only": ("vit_tiny_patch16_224", dict(reg_tokens=1, class_token=False, global_pool="avg")),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3, LayerScale": ("deit3_small_patch16_224", dict(init_values=1e-4)),
    "q/k norm": ("vit_tiny_patch16_224", dict(qk_norm=True)),
}


def make(key="cls", **more):
    torch.manual_seed(0)
    name, kwargs = MODELS[key]
    return timm.create_model(name, **{**SMALL, **kwargs, **more}).eval()


def reference(model, x, block):
    """(B, H, h, w) from the softmax's input of an unfused copy, read by a hook on q_norm and k_norm."""
    m = deepcopy(model)
    heard = {}
    attn = m.blocks[block].attn
    attn.q_norm.register_forward_hook(lambda _m, _i, out: heard.update(q=out))
    attn.k_norm.register_forward_hook(lambda _m, _i, out: heard.update(k=out))
    for b in m.blocks:
        b.attn.fused_attn = False
    m(x)
    logits = heard["q"] @ heard["k"].mT * attn.scale
    p = m.num_prefix_tokens
    row = logits[:, :, p:, p:].mean(2) if m.global_pool == "avg" else logits[:, :, 0, p:]
    return row.unflatten(-1, m.patch_embed.grid_size), m


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("key", MODELS)
def test_values_and_gradients(key, fused, block):
    model, x = make(key).double(), torch.rand(2, 3, 32, 32).double()
    for b in model.blocks:
        b.attn.fused_attn = fused
    want, ref = reference(model, x, block)
    with se.AttentionTap(model, block) as tap:
        model(x)
    s = tap.maps()
    assert s.shape == (2, 3, 4, 4) and s.dtype == torch.float64
    assert_close(s, want, atol=1e-12, rtol=1e-9)
    (100 * s).pow(3).sum().backward()
    (100 * want).pow(3).sum().backward()
    largest = max(r.grad.abs().max().item() for r in ref.parameters() if r.grad is not None)
    for (n, p), (_, r) in zip(model.named_parameters(), ref.named_parameters()):
        assert (p.grad is None) == (r.grad is None), n
        if p.grad is not None:
            assert_close(p.grad, r.grad, atol=1e-12 * largest, rtol=1e-7)


def test_output_and_names_do_not_change():
    model, x = make(), torch.rand(2, 3, 32, 32)
    y, names = model(x), list(model.state_dict())
    with se.AttentionTap(model):
        assert torch.equal(model(x), y) and list(model.state_dict()) == names
    assert torch.equal(model(x), y)


def test_copies_and_pickles_are_stock_models():
    model, x = make(), torch.rand(1, 3, 32, 32)
    with se.AttentionTap(model):
        y, file = model(x), io.BytesIO()
        copy = deepcopy(model)
        torch.save(model, file)
    file.seek(0)
    for other in (copy, torch.load(file, weights_only=False)):
        assert type(other.blocks[-1].attn) is timm.layers.Attention and torch.equal(other(x), y)


@pytest.mark.parametrize("call,error,said", [
    (lambda: se.AttentionTap(timm.create_model("resnet18")), se.UnsupportedModel, "ResNet.*: a convolutional network"),
    (lambda: se.AttentionTap(torch.nn.Linear(2, 2)), se.UnsupportedModel, "Linear: no adapter for this family.*register_adapter"),
    (lambda: se.AttentionTap(make(), block=[]), ValueError, r"got \[\], expected a number"),
    (lambda: se.AttentionTap(make(), block=True), ValueError, "got True, expected a number"),
    (lambda: se.AttentionTap(make(), block=[0, -2]), ValueError, "names a block twice"),
    (lambda: se.AttentionTap(make(), query=(1, -1)), ValueError, r"got \(1, -1\), expected .*a patch \(y, x\)"),
    (lambda: se.AttentionTap(make(), query="register"), se.UnsupportedModel, r"0 register token"),
    (lambda: se.AttentionTap(make("registers"), query=("register", 4)), se.UnsupportedModel, r"4 register token"),
    (lambda: se.AttentionTap(timm.create_model("cait_xxs24_224", img_size=32, embed_dim=48, depth=1, num_heads=2), query="mean"), se.UnsupportedModel,
     "a single query of its own"),
    (lambda: se.AttentionTap("vit"), TypeError, "got str, expected an nn.Module"),
    (lambda: se.AttentionTap(make(), block=9), ValueError, "got 9, expected a number from -2 to 1"),
    (lambda: se.AttentionTap(make("no [CLS]"), query="cls"), se.UnsupportedModel, r"no \[CLS\] token"),
    (lambda: se.AttentionTap(make(), query="head"), ValueError, 'expected "auto", "cls", "mean"'),
])
def test_refusals(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_dropped_patches_are_refused():
    model = make(patch_drop_rate=.5).train()
    with se.AttentionTap(model), pytest.raises(RuntimeError, match=r"got 9 keys for 1 \+ 16 .*patch_drop_rate"):
        model(torch.rand(2, 3, 32, 32))


def test_never_silently_empty_or_stale():
    model = make()
    with se.AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match="no map was recorded"):
            tap.maps()
        model(torch.rand(1, 3, 32, 32))
        with pytest.raises(Exception):                   # a pass that fails leaves no map of an earlier one behind
            model(torch.rand(1, 3, 32, 33))
        with pytest.raises(RuntimeError, match="no map was recorded"):
            tap.maps()


# ---- what training does to a model, for one model of every mechanism ----

ZOO = {s.name: s for s in [*TIMM, *HF, *OTHERS]}
KINDS = ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224", "cait_xxs24_224",
         "swin_tiny_patch4_window7_224", "hiera_tiny_224", "ViTForImageClassification", "SwinForImageClassification", "torchvision ViT"]


# Each mechanism in as few blocks as show it: a window and a shifted one, a window after patches were merged, units of a mask and all places.
SHALLOW = {"vit_small_patch16_rope_224": dict(depth=1), "beit_base_patch16_224": dict(depth=1), "vit_base_patch16_siglip_224": dict(depth=1),
           "cait_xxs24_224": dict(depth=1), "swin_tiny_patch4_window7_224": dict(depths=(2, 1)),
           "hiera_tiny_224": dict(stages=(1, 1), q_pool=1, mask_unit_attn=(True, False))}
SHALLOW_BUILDS = {"SwinForImageClassification": hf("swin", "SwinForImageClassification", "SwinConfig", **{**_swin_hf, "depths": [2], "num_heads": [2]}),
                  "ViTForImageClassification": hf("vit", "ViTForImageClassification", "ViTConfig", num_hidden_layers=1),
                  "torchvision ViT": lambda size: _torchvision(size, layers=1)}


def zoo(name, shallow=False):
    "`shallow`: with fewer blocks, for the compiler, whose time goes by their number."
    spec = ZOO[name]
    if shallow and name in SHALLOW:
        spec = replace(spec, kwargs={**spec.kwargs, **SHALLOW[name]})
    if shallow and name in SHALLOW_BUILDS:
        spec = replace(spec, build=SHALLOW_BUILDS[name])
    size = spec.sizes[0]
    model, x = spec.make(size), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    call = (lambda m: m(pixel_values=x)) if name in {s.name for s in HF} else (lambda m: m(x))
    return model, call


def heard(model, call, block="all"):
    with se.AttentionTap(model, block) as tap:
        call(model)
    return tap.maps()


def loss_of(maps):
    return sum((m / m.detach().std()).pow(3).mean() for m in maps.values())


@pytest.mark.parametrize("name", KINDS)
def test_compiled_fullgraph_and_tapped_after_compiling(name):
    torch._dynamo.reset()
    model, call = zoo(name, shallow=True)
    want = heard(model, call)
    loss_of(want).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        call(compiled)                                   # compiled and run before it is tapped
    model.zero_grad()
    with se.AttentionTap(compiled, "all") as tap:
        for _ in range(2):
            call(compiled)
    for i, m in tap.maps().items():
        assert_close(m, want[i], atol=1e-4 * want[i].abs().max().item(), rtol=1e-4)
    loss_of(tap.maps()).backward()
    largest = max(g.abs().max().item() for g in grads.values())
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, grads.get(n, torch.zeros_like(p)), atol=1e-3 * largest, rtol=1e-3)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_bf16_autocast_gives_float32_maps(name):
    model, call = zoo(name)
    want = heard(model, call)
    with torch.autocast("cpu", torch.bfloat16):
        got = heard(model, call)
    for i, m in got.items():
        assert m.dtype == torch.float32
        assert (m - want[i]).abs().max() < .06 * want[i].abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_deepcopy_is_stock_and_deaf(name):
    model, call = zoo(name)
    types = [type(m) for m in model.modules()]
    with se.AttentionTap(model, "all") as tap:
        call(model)
        maps, copy = tap.maps(), deepcopy(model)
        assert [type(m) for m in copy.modules()] == types
        with torch.no_grad():
            for p in copy.parameters():
                p.mul_(.5)
            call(copy)
        assert all(tap.maps()[i] is m for i, m in maps.items())
    assert [type(m) for m in model.modules()] == types


def checkpointed(model, **how):
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    else:
        model.set_grad_checkpointing(True)
    return model.train()


@pytest.mark.parametrize("name", [k for k in KINDS if k != "torchvision ViT"])
def test_checkpointing(name):
    grads = []
    for on in (False, True):
        model, call = zoo(name)
        if on:
            checkpointed(model, use_reentrant=False)
        model.train()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout) or type(m).__name__.endswith("DropPath"):
                m.eval()
        with se.AttentionTap(model, "all") as tap:       # open until the backward pass, which runs the blocks again
            call(model)
            loss_of(tap.maps()).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, atol=1e-5 * a.abs().max().item() + 1e-9, rtol=1e-4)


def test_reentrant_checkpointing_raises():
    model, call = zoo("ViTForImageClassification")
    checkpointed(model, use_reentrant=True)
    with se.AttentionTap(model), pytest.raises(RuntimeError, match="reentrant checkpointing"):
        call(model)


# ---- queries ----

@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("query", ["cls", "mean", "register", ("register", 3), (2, 1)])
def test_queries_of_a_plain_model(query, softmax):
    model, x = make("registers"), torch.rand(2, 3, 32, 32)
    want, m = Calls(other := deepcopy(model), ["blocks.0.attn"]).run_on(other, x)[1][0]["logits"], dict(cls=0, register=1)
    want = want.softmax(-1) if softmax else want
    row = {"mean": lambda: want[:, :, 5:].mean(2), ("register", 3): lambda: want[:, :, 4], (2, 1): lambda: want[:, :, 5 + 2 * 4 + 1]}.get(
        query, lambda: want[:, :, m[query]])()
    with se.AttentionTap(model, 0, query=query, softmax=softmax) as tap:
        model(x)
    assert_close(tap.maps(), row[..., 5:].unflatten(-1, (4, 4)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("block,y,x", [(0, 5, 6), (1, 5, 6), (1, 0, 15), (1, 15, 15), (3, 7, 0)])
def test_one_patch_in_a_window(block, y, x):
    """Swin: the row of one patch, found by brute force through the model's own partition of patch numbers."""
    from timm.models.swin_transformer import window_partition
    model, call = zoo("swin_tiny_patch4_window7_224")
    name, b, _ = find(model).layers[block]
    logits = Calls(other := deepcopy(model), [name]).run_on(other, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))[1][0]["logits"]
    h = b.input_resolution[0]
    numbers = torch.roll(torch.arange(h * h).view(1, h, h, 1), (-b.shift_size[0], -b.shift_size[1]), (1, 2))
    cells = window_partition(numbers, b.window_size).view(-1, b.window_area)
    w, i = (cells == y * h + x).nonzero()[0].tolist()
    see = torch.ones(b.window_area, dtype=torch.bool) if b.attn_mask is None else b.attn_mask[w, i] == 0
    row = logits.unflatten(0, (2, -1))[:, w, :, i]
    for softmax in (False, True):
        with se.AttentionTap(model, block, query=(y, x), softmax=softmax) as tap:
            call(model)
        s, valid = tap.maps().flatten(-2), tap.valid().flatten(-2)
        assert valid.sum(-1).eq(see.sum()).all()
        assert_close(s[..., cells[w][see]], (row.softmax(-1) if softmax else row)[..., see], atol=1e-5, rtol=1e-4)
        others = s.masked_fill(valid, -torch.inf)
        if softmax:
            assert others.amax() < 1e-6
        else:                                            # the rest stands just below the mean and above no threshold
            assert not (se.above_mean(tap.maps()).flatten(-2) > 0)[~valid].any()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224", "swin_small_patch4_window7_224",
                                  "naflexvit_base_patch16_gap", "hiera_tiny_224", "twins_svt_small", "ViTForImageClassification", "SwinForImageClassification"])
@pytest.mark.parametrize("softmax", [False, True])
def test_self_check_agrees(name, softmax):
    model, call = zoo(name)
    fused = timm.layers.use_fused_attn()
    with se.AttentionTap(model, "all", softmax=softmax) as tap:
        x = torch.rand(2, 3, *ZOO[name].sizes[0])
        report = tap.check(x)
    assert fused and len(report) == ZOO[name].layers
    assert all(e < 1e-5 for r in report.values() for e in r.values())


def test_self_check_catches_a_wrong_row(monkeypatch):
    from spatial_entropy.attention import tap as module
    model = make()
    right = module.query_row
    monkeypatch.setattr(module, "query_row", lambda *a: (right(*a)[0].flip(-1), None))
    with se.AttentionTap(model) as tap, pytest.warns(UserWarning, match="show elsewhere in the map"):
        assert tap.check(torch.rand(2, 3, 32, 32))["blocks.1.attn"]["map_error"] > 1e-3


def moved_to(where):
    """An entry's place, with each cell laid at another one: `where` takes (h, w) numbers and gives them elsewhere."""
    def wrong(stock, call):
        raster = stock(call)
        h, w = raster.grid
        cells = raster.cells if raster.cells is not None else torch.arange(h * w)[None]
        return replace(raster, cells=where(torch.arange(h * w).view(h, w)).reshape(-1)[cells])
    return wrong


MISPLACED = {
    "rolled by the shift": moved_to(lambda n: n.roll((2, 2), (0, 1))),
    "transposed": moved_to(lambda n: n.mT),
    "mirrored": moved_to(lambda n: n.flip(1)),
    "turned": moved_to(lambda n: n.rot90()),
}
WRONG_PLACES = [("vit_tiny_patch16_224", 64, "transposed"), ("vit_tiny_patch16_224", 64, "mirrored"), ("beit_base_patch16_224", 64, "turned"),
                ("swin_tiny_patch4_window7_224", 64, "rolled by the shift"), ("SwinForImageClassification", 64, "rolled by the shift"),
                ("torchvision ViT", 64, "transposed")]
OLD = ("map_error", "attention_error")


@pytest.mark.parametrize("name,side,how", WRONG_PLACES)
def test_self_check_finds_wrong_places(name, side, how, monkeypatch):
    """The comparison with a reference built of the same raster sees nothing; patches that are changed show elsewhere."""
    model, x = ZOO[name].make((side, side)), torch.rand(2, 3, side, side)
    layers = find(model).layers
    for kind in {id(k): k for *_, k in layers}.values():
        monkeypatch.setattr(kind, "place", partial(MISPLACED[how], kind.place))
    with se.AttentionTap(model, "all") as tap, pytest.warns(UserWarning, match="of 4 patches that were changed show elsewhere"):
        report = tap.check(x)
    assert all(r[k] < 1e-5 for r in report.values() for k in OLD if k in r)
    assert all(report[n]["place_error"] >= .5 for n, _, _ in layers[:2]) and report.warnings
    monkeypatch.undo()
    with se.AttentionTap(model, "all") as tap:
        report = tap.check(x)
    assert not report.warnings and not any(r.get("place_error") for r in report.values())


WRONG_QUERIES = [("vit_tiny_patch16_224", {}, "mean", "patches", "cls"), ("vit_tiny_patch16_224", dict(global_pool="avg"), "cls", "cls", "patches"),
                 ("beit_base_patch16_224", {}, "cls", "cls", "patches"), ("ViTForImageClassification", {}, "mean", "patches", "cls"),
                 ("open_clip ViT", {}, "mean", "patches", "cls")]


@pytest.mark.parametrize("name,more,reads,asked,read", WRONG_QUERIES)
def test_self_check_finds_a_query_that_the_output_ignores(name, more, reads, asked, read, monkeypatch):
    spec = ZOO[name]
    model, x = spec.make(spec.sizes[0]), torch.rand(2, 3, *spec.sizes[0])
    model.global_pool = more.get("global_pool", getattr(model, "global_pool", None))
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(find(model).adapter, "reads", reads)
        with se.AttentionTap(model) as tap, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = tap.check(x)
        assert all(r[k] < 1e-5 for r in report.values() for k in OLD if k in r)
        assert report.gradient[read] == 1 and report.auto == (asked if wrong else read)
        assert [str(w.message) for w in said] == report.warnings and len(report.warnings) == wrong
    assert re.search(f'"auto" reads {asked}, with 0.0% .* reads {read}; say query=', report.warnings[0])
    with se.AttentionTap(model, query=report.auto.replace("patches", "mean")) as tap:
        assert not tap.check(x).warnings                 # asked for by name


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224", "Dinov2ForImageClassification",
                                  "Dinov2WithRegistersModel", "CLIPVisionModel", "deit_tiny_distilled_patch16_224", "hiera_tiny_224", "torchvision Swin",
                                  "efficientvit_m0"])
def test_self_check_finds_nothing_in_right_entries(name):
    model, x = ZOO[name].make(ZOO[name].sizes[0]), torch.rand(2, 3, *ZOO[name].sizes[0])
    with se.AttentionTap(model, "all") as tap:
        report = tap.check(x)
    assert not report.warnings and not report.unprobed and report.auto
    assert all(e < 1e-5 for r in report.values() for e in r.values()) and all("place_error" in r for r in report.values())


def test_self_check_finds_a_layer_that_the_output_never_reads():
    class Early(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = make()

        def forward(self, pixel_values):
            return self.vit.forward_intermediates(pixel_values, indices=[0], intermediates_only=True)[0].mean((2, 3))
    model = Early()
    with se.AttentionTap(model) as tap, pytest.warns(UserWarning, match="does not read this layer; tap another"):
        tap.check(pixel_values=torch.rand(1, 3, 32, 32))
    with se.AttentionTap(model, 0) as tap, pytest.warns(UserWarning, match='"auto" reads cls.* reads patches'):
        tap.check(torch.rand(1, 3, 32, 32))


def test_self_check_leaves_passes_modes_and_gradients_alone():
    model, (_, b) = make().train(), two_pictures()
    with se.AttentionTap(model) as tap, torch.no_grad():
        model.eval()(b)
        want = tap.maps()
        model.train()
        tap.check(b)
        assert torch.equal(tap.maps(), want) and model.training and not torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters()) and not model.blocks[-1].attn._forward_hooks


# ---- padding and holes ----

def packed(grids, patch=8):
    """A packed batch of pictures with different grids, and the pictures."""
    g, n = torch.Generator().manual_seed(0), max(h * w for h, w in grids)
    pictures = [torch.rand(3, h * patch, w * patch, generator=g) for h, w in grids]
    patches, coord = torch.zeros(len(grids), n, patch * patch * 3), torch.zeros(len(grids), n, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), n, dtype=torch.bool)
    for i, ((h, w), p) in enumerate(zip(grids, pictures, strict=True)):
        patches[i, :h * w] = p.unflatten(1, (h, patch)).unflatten(3, (w, patch)).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
        coord[i, :h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, :h * w] = True
    return pictures, patches, coord, valid


@pytest.mark.parametrize("name,fused", [("naflexvit_base_patch16_gap", True), ("naflexvit_base_patch16_gap", False), ("naflexvit_base_patch16_siglip", True),
                                        ("naflexvit_so150m2_patch16_reg1_gap", True)])
def test_packed_pictures_equal_single_ones(name, fused):
    """Padding changes nothing: maps, entropy and its gradient are those of each picture alone."""
    model = ZOO[name].make((32, 32)).double()
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = fused
    grids = [(4, 4), (2, 6), (3, 3)]
    pictures, patches, coord, valid = packed(grids)
    with se.AttentionTap(model) as tap:
        model(patches.double(), patch_coord=coord, patch_valid=valid)
    maps, real, loss = tap.maps(), tap.valid(), se.SpatialEntropyLoss()
    E = se.spatial_entropy(maps)
    assert maps.shape[-2:] == (4, 6)
    E.sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, ((h, w), p) in enumerate(zip(grids, pictures, strict=True)):
        with se.AttentionTap(model) as tap:
            model(p[None].double())
        s = tap.maps()
        assert_close(maps[i, :, :h, :w], s[0], atol=1e-9, rtol=1e-7)
        assert real[i].all(0).sum() == h * w
        assert_close(E[i], se.spatial_entropy(s)[0], atol=1e-9, rtol=1e-6)
        se.spatial_entropy(s).sum().backward()
    assert loss(maps).isfinite()
    largest = max(g.abs().max().item() for g in got.values())
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert_close(got[n], p.grad, atol=1e-8 * max(largest, 1), rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def test_siglip2_packed():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.Siglip2VisionConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_patches=16, patch_size=8)
    model = tf.Siglip2VisionModel(config).eval()
    grids = [(4, 4), (2, 6), (3, 3)]
    _, patches, coord, valid = packed(grids)
    with se.AttentionTap(model, "all") as tap, torch.no_grad():
        model(pixel_values=patches, pixel_attention_mask=valid.long(), spatial_shapes=torch.tensor(grids))
    for i, (h, w) in enumerate(grids):
        with se.AttentionTap(model, "all") as one, torch.no_grad():
            n = h * w
            model(pixel_values=patches[i:i + 1, :n], pixel_attention_mask=valid[i:i + 1, :n].long(), spatial_shapes=torch.tensor([[h, w]]))
        assert len(one.maps()) == 3                      # two blocks and the pool
        for b, m in tap.maps().items():
            assert_close(m[i, :, :h, :w], one.maps()[b][0], atol=1e-5, rtol=1e-4)


def test_masked_autoencoder_has_holes():
    """Shuffled and dropped patches lie where they came from: brute force through the model's own ids."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.ViTMAEModel(tf.ViTMAEConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
                                           mask_ratio=.5)).eval()
    x, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    other = deepcopy(model)
    out, calls = Calls(other, ["layers.1.attention"]).run_on(other, dict(pixel_values=x, noise=noise))
    with se.AttentionTap(model, query="mean") as tap:
        model(pixel_values=x, noise=noise)
    row, kept = calls[0]["logits"][:, :, 1:, 1:].mean(2), noise.argsort(1)[:, :8]
    for i in range(2):
        assert tap.valid()[i, 0].flatten().nonzero().flatten().tolist() == sorted(kept[i].tolist())
        assert_close(tap.maps()[i].flatten(1)[:, kept[i]], row[i], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
def test_a_patch_that_a_picture_lacks_has_no_map(softmax):
    """A query on the grid of the batch, not on that of each picture: NaN, no constant map with E = 0."""
    model = ZOO["naflexvit_base_patch16_gap"].make((32, 32))
    _, patches, coord, valid = packed([(4, 4), (2, 6), (3, 3)])
    with se.AttentionTap(model, query=(3, 1), softmax=softmax) as tap, torch.no_grad():
        model(patches, patch_coord=coord, patch_valid=valid)
    maps, shown = tap.maps(), tap.valid()
    assert maps.isnan().all((1, 2, 3)).tolist() == [False, True, True] and maps[0].isfinite().all()
    assert shown.flatten(1).any(1).tolist() == [True, False, False]
    assert se.spatial_entropy(maps).isnan().all(1).tolist() == [False, True, True]
    with se.AttentionTap(model, query="mean", softmax=softmax) as tap, torch.no_grad():      # and one that is all padding
        model(patches, patch_coord=coord, patch_valid=valid & torch.tensor([[True], [True], [False]]))
    assert tap.maps().isnan().any(-1).any(-1).any(-1).tolist() == [False, False, True]


def test_a_hidden_patch_has_no_map():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.ViTMAEModel(tf.ViTMAEConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
                                           mask_ratio=.75)).eval()
    noise = torch.stack([torch.arange(16.), -torch.arange(16.)])        # the first four patches are seen, then the last four
    with se.AttentionTap(model, query=(0, 1)) as tap, torch.no_grad():
        model(torch.rand(2, 3, 32, 32), noise=noise)
    assert tap.maps()[0].isfinite().all() and tap.maps()[1].isnan().all()
    assert tap.valid().flatten(2).sum(2).tolist() == [[4, 4], [0, 0]]


def test_sides_that_patches_do_not_divide_are_said():
    """What the convolution drops, or the embedding pads, is no part of the grid: a mask of the whole picture would lie beside it."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    dino = tf.Dinov2Model(tf.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)).eval()
    padding = timm.create_model("vit_tiny_patch16_224", **SMALL | dict(patch_size=8), dynamic_img_size=True, dynamic_img_pad=True).eval()
    for model, size, patch in ((dino, (41, 50), 14), (padding, (20, 32), 8)):
        with se.AttentionTap(model) as tap, torch.no_grad():
            model(torch.randn(1, 3, *size))
            with pytest.warns(UserWarning, match=r"which the patches do not divide: the grid covers \d+×\d+ .*multiple of the patch"): tap.maps()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tap.maps()                                                  # once
            h, w = tap.maps().shape[-2:]
            assert tap.frame == pytest.approx((0, 0, w * patch / size[1], h * patch / size[0])) and tap.frame[3] != 1
    with se.AttentionTap(dino) as tap, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        dino(torch.randn(1, 3, 42, 28))
        assert tap.maps().shape[-2:] == (3, 2) and tap.frame == (0, 0, 1, 1)
    for model, patch in ((dino, 14), (padding, 8)):                         # compiled: the same, whatever the sizes
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with se.AttentionTap(compiled) as tap, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for size in ((41, 50), (43, 56)) if model is dino else ((20, 32),):     # the second is a size that may change
                compiled(torch.randn(1, 3, *size))
                h, w = tap.maps().shape[-2:]
                assert tap.frame == pytest.approx((0, 0, w*patch/size[1], h*patch/size[0]))


# ---- two processes ----

DISTRIBUTED = ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch16_rope_224", "ViTForImageClassification"]


def _total(model, tap, x):
    out = model(x)
    out = getattr(out, "logits", out)
    return out.square().mean() + se.SpatialEntropyLoss()(tap.maps())


def _four(name):
    return torch.rand(4, 3, *ZOO[name].sizes[0], generator=torch.Generator().manual_seed(1))


def _ddp_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    grads = {}
    for name in DISTRIBUTED:
        model, _ = zoo(name)
        se.drop_last_skip(model)
        ddp = DistributedDataParallel(model)
        with se.AttentionTap(ddp) as tap:
            for _ in range(2):                           # the second pass fails if a parameter had no gradient
                ddp.zero_grad()
                _total(ddp, tap, _four(name)[2 * rank:2 * rank + 2]).backward()
        grads[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        how = "spawn" if torch.cuda.is_available() else "fork"             # a fork spares the children their imports; autograd forbids it beside a GPU
        torch.multiprocessing.start_processes(_ddp_worker, (folder,), nprocs=2, start_method=how)
        got = torch.load(Path(folder) / "grads.pt")
    for name in DISTRIBUTED:
        model, _ = zoo(name)
        se.drop_last_skip(model)
        with se.AttentionTap(model) as tap:
            _total(model, tap, _four(name)).backward()
        largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
        for n, p in model.named_parameters():
            if p.grad is not None:
                assert_close(got[name][n], p.grad, atol=1e-5 * largest, rtol=1e-3)


def test_tap_and_surgery_on_the_same_block():
    """Swin's block is the tap's host and the surgery's block: first the surgery, then the tap, and off again in that order."""
    model, call = zoo("swin_tiny_patch4_window7_224")
    stock, types = heard(model, call)[3], [type(m) for m in model.modules()]
    with se.AttentionTap(model), pytest.raises(RuntimeError, match="a tap listens in this block; drop the skip first"):
        se.drop_last_skip(model)
    surgery = se.drop_last_skip(model)
    with se.AttentionTap(model) as tap:
        call(model)
        with pytest.raises(RuntimeError, match="a tap in it does that"):
            surgery.undo()
    assert_close(tap.maps(), stock)                      # the last block's own map does not depend on what follows it
    surgery.undo()
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_reading_for_a_log_does_not_cost_the_gradient(name):
    model, call = zoo(name)
    with se.AttentionTap(model) as tap:
        call(model)
        with torch.no_grad():
            tap.maps().mean()
        tap.maps().pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ---- which pass: every entry point, recomputation at several sizes, threads, shared blocks ----

def maps_of(model, x, **how):
    with se.AttentionTap(model, **how) as tap:
        model(x)
    return tap.maps()


def two_pictures(n=2, size=32):
    g = torch.Generator().manual_seed(7)
    return torch.rand(n, 3, size, size, generator=g), torch.rand(n, 3, size, size, generator=g)


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224", "volo_d1_224"])
def test_every_entry_point_is_heard(name):
    spec = ZOO[name]
    model = spec.make(spec.sizes[0])
    a, b = two_pictures(1, spec.sizes[0][0])
    want = maps_of(model, b)
    entries = [model.forward_features, model.forward, *([model.forward_intermediates] if hasattr(model, "forward_intermediates") else [])]
    with se.AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match="no map was recorded: run the model"):
            tap.maps()
        for enter in entries:
            model(a)
            tap.maps()
            enter(b)
            assert torch.equal(tap.maps(), want), enter
            enter(a)                                     # not read
            enter(b)
            assert torch.equal(tap.maps(), want), enter


def test_towers_are_heard_through_every_method():
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    clip = tf.CLIPModel(tf.CLIPConfig(text_config=small | dict(vocab_size=40), vision_config=small | dict(image_size=32, patch_size=8))).eval()
    a, b = two_pictures()
    want = maps_of(clip.vision_model, b)
    with se.AttentionTap(clip) as tap:
        clip.get_image_features(a)
        tap.maps()
        clip.get_image_features(b)
        assert torch.equal(tap.maps(), want)
        clip.vision_model(pixel_values=a)
        clip(input_ids=torch.zeros(2, 3, dtype=torch.long), pixel_values=b)
        assert torch.equal(tap.maps(), want)


def test_a_part_of_the_model_says_what_happened():
    model, (a, b) = make(), two_pictures()
    tokens = torch.rand(1, 17, 48)
    with se.AttentionTap(model) as tap:
        model.forward_intermediates(a, indices=[0], stop_early=True)
        with pytest.raises(RuntimeError, match="the latest pass did not come to it"):
            tap.maps()
        model(a)
        tap.maps()
        with pytest.raises(RuntimeError, match="blocks.1.attn: the patch grid was not seen.*Call the model"):
            model.blocks(tokens)
        model(a)
        model.blocks(tokens)                             # as many tokens, but whose?
        with pytest.raises(RuntimeError, match="blocks.1.attn ran 2 times in one pass"):
            tap.maps()
        model(b)
        assert torch.equal(tap.maps(), maps_of(model, b))
    swin, call = zoo("swin_tiny_patch4_window7_224")     # its windows are read from each call: a stage may run alone
    with se.AttentionTap(swin) as tap:
        call(swin)
        tap.maps()
        x = torch.rand(1, 16, 16, 24)
        swin.layers(x)
        alone = tap.maps()
        swin.layers(2 * x)
        assert alone.shape[0] == 1 and not torch.equal(tap.maps(), alone)


def passes_at_sizes(model, sizes, query="auto", entropy_only=False):
    """Gradients of several passes and one backward, with a pass of yet another size between."""
    g, loss = torch.Generator().manual_seed(3), 0.
    with se.AttentionTap(model, "all", query=query) as tap:
        for h, w in sizes:
            out = model(torch.rand(2, 3, h, w, generator=g))
            loss = loss + sum((9 * m).pow(3).mean() for m in tap.maps().values()) + (0. if entropy_only else out.square().mean())
        with torch.no_grad():
            model(torch.rand(1, 3, 48, 48, generator=g))
        latest = tap.maps()
        loss.backward()
        assert all(tap.maps()[i] is m for i, m in latest.items())
    return [p.grad for p in model.parameters()]


def whole(model):
    from torch.utils.checkpoint import checkpoint
    run = model.forward
    model.forward = lambda x: checkpoint(run, x, use_reentrant=False)


HOW = {"set_grad_checkpointing": lambda m: m.set_grad_checkpointing(), "the whole model": whole,
       "compiled with breaks": lambda m: (m.set_grad_checkpointing(), m.compile(backend="eager")),
       "compiled blocks": lambda m: (m.set_grad_checkpointing(), [b.compile(backend="aot_eager") for b in m.blocks])}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("query", ["auto", "mean", (1, 2)])
def test_checkpointing_at_several_sizes(how, query):
    if "compiled" in how and query != "auto":
        pytest.skip("one query is enough for the compiler's time")
    torch._dynamo.reset()
    sizes, small = [(64, 64), (32, 32)], dict(dynamic_img_size=True, depth=1 if "compiled" in how else 2)
    plain, model = make(**small).train(), make(**small).train()
    want = passes_at_sizes(plain, sizes, query)
    HOW[how](model)
    for a, b in zip(want, passes_at_sizes(model, sizes, query), strict=True):
        assert_close(a, b, atol=1e-6 * a.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification"])
def test_checkpointing_at_several_sizes_in_transformers(name):
    grads = []
    for on in (False, True):
        model, _ = zoo(name)
        if on:
            checkpointed(model, use_reentrant=False)
        model.train()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout) or type(m).__name__.endswith("DropPath"):
                m.eval()
        call = (lambda x, model=model: model(pixel_values=x, interpolate_pos_encoding=True)["logits"])
        with se.AttentionTap(model, "all") as tap:
            loss = 0.
            for size in (64, 96):
                loss = loss + call(torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(size))).square().mean() + loss_of(tap.maps())
            with torch.no_grad():
                call(torch.rand(1, 3, 128, 128))         # (a smaller one would change Swin's windows for good)
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-5 * a.abs().max().item() + 1e-9, rtol=1e-4)


def test_a_repeated_run_that_cannot_be_told_is_refused():
    """As many patches in other places, both graphs alive, and a query that depends on the place."""
    model = make(dynamic_img_size=True).train()
    model.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match=r"repeats one of several passes .* call backward after each pass"):
        passes_at_sizes(model, [(64, 32), (32, 64)], query=(1, 2))
    model.zero_grad()
    passes_at_sizes(model, [(64, 32), (32, 64)])         # [CLS] stands first in either
    for size in ((64, 32), (32, 64)):                    # and one after the other is fine
        passes_at_sizes(model, [size], query=(1, 2))


def test_threads_have_passes_of_their_own():
    import threading
    model, n = make(), 4
    pictures = [torch.rand(1, 3, 32, 32) for _ in range(n)]
    want, wrong = [maps_of(model, x) for x in pictures], []
    with se.AttentionTap(model) as tap:
        meet = threading.Barrier(n)

        def run(i):
            for _ in range(10):
                model(pictures[i])
                meet.wait()                              # everybody has run, nobody has read
                if not torch.equal(tap.maps(), want[i]):
                    wrong.append(i)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        with pytest.raises(RuntimeError, match="ran in 4 threads, but not in this one"):
            tap.maps()
    with se.AttentionTap(model) as tap:                  # an executor runs it, this thread reads
        t = threading.Thread(target=model, args=(pictures[1],))
        t.start()
        t.join()
        assert torch.equal(tap.maps(), want[1])


# ---- layers of all sorts, by one small model ----

class Own(torch.nn.Module):
    """One layer that is called `times`, with attention made by `how`."""

    def __init__(self, how, times=1):
        super().__init__()
        self.embed, self.layer, self.times = torch.nn.Conv2d(3, 48, 8, 8), OwnLayer(how), times

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        for _ in range(self.times):
            x = x + self.layer(x)
        return x.mean(1)


class OwnLayer(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.qkv, self.how = torch.nn.Linear(48, 144), how

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 16)[..., :12].permute(2, 0, 3, 1, 4)
        return torch.nn.functional.pad(self.how(q, k, v), (0, 4)).transpose(1, 2).flatten(2)


class Encoder(torch.nn.Module):
    """torch's own encoder, which has a fast path around its attention modules."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 48, 8, 8)
        self.encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(48, 3, 64, dropout=0., batch_first=True), 2)

    def forward(self, x):
        return self.encoder(self.embed(x).flatten(2).mT).mean(1)


@pytest.fixture
def own():
    from spatial_entropy.attention.families import Adapter, Layer, _adapters, register_adapter
    before = list(_adapters)
    register_adapter(Adapter("own", Own, layers=(Layer(f"{OwnLayer.__module__}.OwnLayer"),), grid="embed"))
    register_adapter(Adapter("encoder", Encoder, layers=(Layer("torch.nn.modules.activation.MultiheadAttention"),), grid="embed"))
    yield lambda how, times=1: (torch.manual_seed(0), Own(how, times))[1]
    _adapters[:] = before


def logits(q, k):
    return q @ k.mT / 12 ** .5


def sdpa(q, k, v, **more):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **more)


F = torch.nn.functional
RIGHT = {
    "arguments by name": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "input and dim by name": lambda q, k, v: torch.softmax(input=logits(q, k), dim=-1) @ v,
    "method, last axis by number": lambda q, k, v: logits(q, k).softmax(dim=3) @ v,
    "module": lambda q, k, v: torch.nn.Softmax(dim=-1)(logits(q, k)) @ v,
    "functional with dtype": lambda q, k, v: F.softmax(logits(q, k), dim=-1, dtype=torch.float64).float() @ v,
    "special": lambda q, k, v: torch.special.softmax(logits(q, k), -1) @ v,
    "a gate over places before it": lambda q, k, v: sdpa(q, k, v * q.mean(-1, keepdim=True).softmax(2)),
    "a gate over channels before it": lambda q, k, v: logits(q, k).softmax(-1) @ (v * q.softmax(-1)),
    "a gate after it": lambda q, k, v: sdpa(q, k, v) * v.softmax(-1),
    "attention over other keys beside it": lambda q, k, v: sdpa(q, k, v) + sdpa(q, k[:, :, :5], v[:, :, :5]),
}


@pytest.mark.parametrize("how", RIGHT)
def test_attention_is_told_from_other_softmaxes(own, how):
    x = two_pictures()[0]
    assert_close(maps_of(own(RIGHT[how]), x), maps_of(own(sdpa), x))


LOW = torch.finfo(torch.float32).min
WRONG = {
    "softmax over queries": (lambda q, k, v: logits(q, k).softmax(-2) @ v, "no map was recorded in layer, though it ran.*a softmax over keys"),
    "softmax over heads": (lambda q, k, v: logits(q, k).softmax(1) @ v, "no map was recorded in layer, though it ran"),
    "no attention": (lambda q, k, v: v * q.sigmoid(), "no map was recorded in layer, though it ran"),
    "a second softmax of the first": (lambda q, k, v: logits(q, k).softmax(-1).softmax(-1) @ v, "two attentions in one call of OwnLayer"),
    "two attentions": (lambda q, k, v: sdpa(q, k, v) + sdpa(k, q, v), "two attentions in one call of OwnLayer.*name the inner layer"),
    "causal, by flag": (lambda q, k, v: sdpa(q, k, v, is_causal=True), "layer: causal attention"),
    "causal, by mask": (lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril()), "layer: causal attention"),
    "causal, eager": (lambda q, k, v: (logits(q, k) + torch.full((16, 16), -torch.inf).triu(1)).softmax(-1) @ v, "layer: causal attention"),
    "causal, eager, lowest number": (lambda q, k, v: (logits(q, k) + torch.full((16, 16), LOW).triu(1)).softmax(-1) @ v, "layer: causal attention"),
    "fewer keys": (lambda q, k, v: sdpa(q, k[:, :, :9], v[:, :, :9]), r"layer: got 9 keys for 0 \+ 16"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_no_attention_over_places_is_refused(own, how):
    model, said = own(WRONG[how][0]), WRONG[how][1]
    with pytest.raises((RuntimeError, se.UnsupportedModel), match=said):
        maps_of(model, two_pictures()[0])


def test_hidden_keys_in_an_eager_layer(own):
    """A family whose entry knows of no masks: padded keys leave the mean and the map."""
    hide = torch.arange(16) > 11
    model = own(lambda q, k, v: logits(q, k).masked_fill(hide, -torch.inf).softmax(-1) @ v)
    x = two_pictures()[0]
    with se.AttentionTap(model) as tap:
        model(x)
    q, k, _ = model.layer.qkv(model.embed(x).flatten(2).mT).view(2, 16, 3, 3, 16)[..., :12].permute(2, 0, 3, 1, 4)
    assert torch.equal(tap.valid().flatten(2)[0, 0], ~hide)
    assert_close(tap.maps().flatten(2)[..., ~hide], logits(q[:, :, ~hide], k[:, :, ~hide]).mean(-2))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_that_runs_twice_in_a_pass(own, compiled):
    torch._dynamo.reset()
    model, x = own(sdpa, times=2), two_pictures()[0]
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with se.AttentionTap(run) as tap:
        run(x)
        with pytest.raises(RuntimeError, match=r"layer ran 2 times in one pass.*maps\(run=…\)"):
            tap.maps()
    if not compiled:
        first = maps_of(own(sdpa), x)
        assert_close(tap.maps(run=0), first)
        assert not torch.equal(tap.maps(run=1), first) and tap.maps(run=1) is tap.maps(run=-1)
        with pytest.raises(ValueError, match="run: got 2, expected a number from -2 to 1"):
            tap.maps(run=2)


@pytest.mark.parametrize("name,layer,kept", [("convit_tiny", 0, "attn_drop"), ("cait_xxs24_224", 0, "attn_drop"),
                                             ("efficientformerv2_s0", -1, "talking_head2")])
def test_softmax_gives_the_attention_that_is_applied(name, layer, kept):
    """Gated (ConViT), mixed between heads (CaiT, EfficientFormer V2): what multiplies the values."""
    spec = ZOO[name]
    model, table = spec.make(spec.sizes[0]), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.1 * torch.randn_like(p))
    inner = find(model).layers[layer][1].get_submodule(kept)
    hook = inner.register_forward_hook(lambda m, args, out: table.append(out))
    with se.AttentionTap(model, layer, softmax=True) as tap, torch.no_grad():
        model(torch.rand(2, 3, *spec.sizes[0]))
    hook.remove()
    assert_close(tap.maps().flatten(2), table[0].mean(-2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (96, 160)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
def test_padded_queries_enter_no_mean(size, fused, softmax):
    """SAM 2's Hiera: windows are padded, then queries pooled, then the padding is cut away."""
    from timm.models.hieradet_sam2 import window_partition, window_unpartition
    model = ZOO["sam2_hiera_tiny"].make((64, 64))
    for m in model.modules():
        if hasattr(m, "fused_attn"):
            m.fused_attn = fused
    numbers = [i for i, (_, b, _) in enumerate(find(model).layers) if b.q_stride]
    names = [find(model).layers[i][0] for i in numbers]
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with se.AttentionTap(model, numbers, softmax=softmax) as tap, torch.no_grad():
        model(x)
    _, calls = Calls(other := deepcopy(model), names).run_on(other, x)
    for i, call in zip(numbers, calls, strict=True):
        b, (h, w) = call["layer"], call["args"][0].shape[1:3]
        sy, sx = b.window_size
        up = lambda n, s: -(-n // s) * s
        hp, wp, q = up(h, sy), up(w, sx), (sy // 2, sx // 2)
        real = torch.zeros(1, hp // 2, wp // 2, 1)
        real[:, :h // 2, :w // 2] = 1
        real = window_partition(real, q).flatten(1) > 0
        table = call["logits"].softmax(-1) if softmax else call["logits"]
        row = (table * real[:, None, :, None]).sum(-2) / real.sum(-1)[:, None, None].clamp_min(1)
        want = window_unpartition(row.transpose(1, 2).unflatten(1, (sy, sx)), (sy, sx), (hp, wp))[:, :h, :w].permute(0, 3, 1, 2)
        seen = torch.ones_like(want, dtype=torch.bool) if tap.valid()[i] is None else tap.valid()[i]
        assert seen.float().mean() > .5
        assert_close(tap.maps()[i][seen], want[seen], atol=1e-5, rtol=1e-4)


# ---- several taps, and forwards that are not the class's ----

def test_several_taps_listen_and_close_one_by_one():
    model, (a, b) = make(), two_pictures()
    types = [type(m) for m in model.modules()]
    one, two = se.AttentionTap(model), se.AttentionTap(model, "all", query="mean", softmax=True)
    model(a)
    first, second = one.maps(), two.maps()[1]
    one.close()
    model(b)
    assert one.maps() is first and not torch.equal(two.maps()[1], second)
    two.close()
    assert [type(m) for m in model.modules()] == types and not any("_tap_sites" in vars(m) for m in model.modules())
    assert torch.equal(first, maps_of(model, a)) and torch.equal(second, maps_of(model, a, query="mean", softmax=True))


def test_evaluation_beside_an_open_regulariser():
    model, (a, b) = make().train(), two_pictures()
    batches = [(b, torch.zeros(2, dtype=torch.long))]
    reg = se.SpatialEntropyRegularizer(model, .5)
    model(a)
    want = reg().item()
    top1, ranked, maps = se.accuracy(model, batches), len(se.rank_heads(model, batches)), list(se.head_maps(model, batches))
    assert top1 in (0., 50., 100.) and ranked == 6 and len(maps) == 1
    with se.AttentionTap(model) as tap, torch.no_grad():
        model(b)
    assert tap.maps().shape == (2, 3, 4, 4)
    model(a)
    assert reg().item() == want
    model(a)
    se.accuracy(model, batches)                          # too late for the pass before it
    with pytest.warns(UserWarning, match="an evaluation came between"):
        reg()
    reg.close()
    assert not any("_tap_sites" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ViTForImageClassification", "torchvision ViT"])
def test_forwards_set_on_the_object(name):
    model, call = zoo(name)
    want, layer = heard(model, call), find(model).layers[-1][1]
    stock = layer.forward
    layer.forward = patched = lambda *a, **k: stock(*a, **k)
    with se.AttentionTap(model, "all") as tap:
        call(model)
        copy = deepcopy(model)
        assert all(torch.equal(tap.maps()[i], m) for i, m in want.items())
    assert layer.forward is patched and find(copy).layers[-1][1].forward is patched
    del layer.forward
    with se.AttentionTap(model, "all") as tap:
        unbound = type(layer)._stock.forward
        layer.forward = lambda *a, **k: unbound(layer, *a, **k)
        call(model)
        with pytest.raises(RuntimeError, match="its forward was replaced on the object after it was tapped"):
            tap.maps()


def test_accelerate_hooks_are_heard():
    accelerate = pytest.importorskip("accelerate")
    model, x = make(), two_pictures()[0]
    want = maps_of(model, x)
    for dispatched_first in (True, False):
        model = make()
        dispatch = lambda m: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True)
        if dispatched_first:
            dispatch(model)
        with se.AttentionTap(model) as tap:
            if not dispatched_first:
                dispatch(model)
            model(x)
        assert torch.equal(tap.maps(), want)


def test_the_fast_path_of_torch_is_not_taken(own):
    torch.manual_seed(0)
    model, x = Encoder().eval(), two_pictures()[0]
    with torch.no_grad():
        assert torch.equal(maps_of(model, x), maps_of(model, x).detach())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_copies_that_run_instead_are_named():
    import copy
    model, x = make(), two_pictures()[0]
    with se.AttentionTap(model) as tap:
        replica = model.blocks[-1].attn._replicate_for_data_parallel()       # what nn.DataParallel does on several devices
        with pytest.raises(RuntimeError, match="nn.DataParallel runs copies.*DistributedDataParallel"):
            replica(torch.rand(1, 17, 48))
        layer = model.blocks[-1].attn
        model.blocks[-1].attn = copy.copy(layer)         # a stock layer
        model(x)
        with pytest.raises(RuntimeError, match="did not come to it.*a copy in its place"):
            tap.maps()
        model.blocks[-1].attn = shallow = type(layer).__new__(type(layer))
        shallow.__dict__.update(layer.__dict__)
        model(x)
        with pytest.raises(RuntimeError, match="a copy of the layer ran, not the layer itself"):
            tap.maps()
    several = torch.nn.DataParallel(make())
    several.device_ids = [0, 1]
    with pytest.raises(se.UnsupportedModel, match="nn.DataParallel runs copies"):
        se.AttentionTap(several)


# ---- tools that look inside ----

@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripting_and_tracing():
    model, x = make(), two_pictures()[0]
    want, out = maps_of(model, x), model(x)
    with se.AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match="torch.jit.script cannot compile; close the tap first"):
            torch.jit.script(model)
        with pytest.raises(RuntimeError, match="torch.fx traces this model.*close the tap first"):
            torch.fx.symbolic_trace(model)
        exported = torch.export.export(model, (x,))
        with pytest.raises(RuntimeError, match="the latest pass was traced"):
            tap.maps()
        assert_close(exported.module()(x), out)
        model(x)
        assert torch.equal(tap.maps(), want)
    for made in (torch.jit.trace(model, x), exported.module()):
        with pytest.raises(se.UnsupportedModel, match="tap the model it was made of"):
            se.AttentionTap(made)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_meta_device(name):
    spec = ZOO[name]
    model = spec.make(spec.sizes[0]).to("meta")
    for softmax in (False, True):
        maps = maps_of(model, torch.rand(2, 3, *spec.sizes[0], device="meta"), softmax=softmax)
        assert maps.device.type == "meta" and maps.ndim == 4


def test_transforms_of_torch_func():
    from torch.func import functional_call, grad, vmap
    model, x = make(), two_pictures()[0]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    with se.AttentionTap(model) as tap:
        def loss(w, x):
            functional_call(model, w, (x,))
            return (10 * tap.maps()).pow(3).sum()
        whole, each = grad(loss)(weights, x), vmap(grad(lambda w, x: loss(w, x[None])), (None, 0))(weights, x)
        with pytest.raises(RuntimeError, match="ran inside a transform of torch.func"):
            tap.maps()
        model(x)
        (10 * tap.maps()).pow(3).sum().backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for n, p in model.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        assert_close(whole[n], want, atol=1e-5 * largest, rtol=1e-4)
        assert_close(each[n].sum(0), want, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp2_with_a_loss_of_maps_alone(tmp_path):
    from torch.distributed.fsdp import fully_shard
    plain, model, x = make(), make(), two_pictures()[0]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        for m in (plain, model):
            for block in (-1, 0):                        # twice: the parameters are sharded again in between
                with se.AttentionTap(m, block) as tap:
                    m(x)
                (10 * tap.maps()).pow(3).sum().backward()
        for (n, p), (_, r) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            if r.grad is not None:
                assert_close(p.grad.full_tensor(), r.grad, msg=lambda m, n=n: f"{n}: {m}")
    finally:
        dist.destroy_process_group()


# what a reader of the code found

def _gradients(model, sizes, give):
    model.zero_grad()
    with se.SpatialEntropyRegularizer(model, 1., block="all") as reg:
        loss = 0
        for i, size in enumerate(sizes):
            loss = loss + 0 * give(model, size, i).square().mean() + reg()
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_two_passes_with_as_many_patches_in_other_places_are_repeated_as_they_were():
    "The grid comes as a tuple, and the parts of its shifted windows with it."
    from transformers import SwinConfig, SwinModel
    torch.manual_seed(0)
    stock = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.)).train()
    saving = deepcopy(stock)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    give = lambda model, size, i: model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(i))).last_hidden_state
    for sizes in ([(32, 32)], [(32, 48), (48, 32)]):
        assert_close(_gradients(saving, sizes, give), _gradients(stock, sizes, give))


def test_two_passes_of_packed_pictures_that_cannot_be_told_apart_are_refused():
    from transformers import PixtralVisionConfig, PixtralVisionModel
    torch.manual_seed(0)
    config = PixtralVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
    stock = PixtralVisionModel(config).train()
    saving = deepcopy(stock)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    give = lambda model, sizes, i: model(torch.rand(len(sizes), 3, 64, 64), image_sizes=torch.tensor(sizes)).last_hidden_state
    _gradients(saving, [[(64, 32), (32, 32)]] * 2, give)                 # the same places: either raster will do
    with pytest.raises(RuntimeError, match="repeats one of several passes with as many patches in other places"):
        _gradients(saving, [[(64, 32), (32, 32)], [(32, 32), (64, 32)]], give)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_counts_also_after_a_pass_without_one(kind, fused):
    model, x = make(), torch.rand(1, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = fused
    seen = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    causal = torch.ones(1, 1, 17, 17, dtype=torch.bool).tril()
    seen[..., 12:] = False
    mask = seen if kind == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    with torch.no_grad(), se.AttentionTap(model) as tap:
        model.forward_features(x, attn_mask=mask)
        expected = tap.maps()
        model.forward_features(x)
        plain = tap.maps()
        model.forward_features(x, attn_mask=torch.ones_like(seen) if kind == torch.bool else mask * 0)
        assert_close(tap.maps(), plain)
        model.forward_features(x, attn_mask=mask)
        assert_close(tap.maps(), expected)
        assert expected.isfinite().all() and expected.abs().max() < 1e3
        for _ in range(2):                                              # refused each time
            with pytest.raises(se.UnsupportedModel, match="causal attention"):
                model.forward_features(x, attn_mask=causal if kind == torch.bool else (mask * 0).masked_fill(~causal, torch.finfo(kind).min))


def test_check_leaves_the_whole_model_as_it_was():
    net = torch.nn.Sequential(make(), torch.nn.BatchNorm1d(5)).train()
    net[0].head.eval()
    with se.AttentionTap(net) as tap:
        tap.check(torch.rand(2, 3, 32, 32))
    assert net[1].num_batches_tracked == 0 and net[1].training and not net[0].head.training


@pytest.mark.parametrize("copied", [deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_module_that_holds_a_tap_can_be_copied(copied):
    net = torch.nn.Module()
    net.vit = make()
    net.tap = se.AttentionTap(net.vit)
    net.vit(torch.rand(1, 3, 32, 32))
    other = copied(net)
    assert other.tap.closed and not net.tap.closed and net.tap.maps().shape == (1, 3, 4, 4)
    with pytest.raises(RuntimeError, match="a copy of a tap, which listens nowhere"):
        other.tap.maps()
    other.tap.close()
    with torch.no_grad(), se.AttentionTap(other.vit) as tap:
        other.vit(torch.rand(1, 3, 32, 32))
        assert tap.maps().shape == (1, 3, 4, 4)


def test_what_goes_into_a_layer_does_not_live_on():
    model, alive = make(), []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    with torch.no_grad(), se.AttentionTap(model, block="all") as tap:
        model(torch.rand(1, 3, 32, 32))
        assert len(alive) == 2 and not [ref for ref in alive if ref() is not None]
        assert tap.maps()[0].shape == (1, 3, 4, 4)


def test_a_tapped_block_without_its_skip_can_be_pickled():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(2,), num_heads=(2,), num_classes=5)
    se.drop_last_skip(model.eval())
    x, untapped = torch.rand(1, 3, 32, 32), pickle.loads(pickle.dumps(model))
    with se.AttentionTap(model):
        other = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert_close(other(x), untapped(x))
        assert_close(other(x), model(x))


def test_a_relative_bias_is_averaged_in_full_precision():
    model = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=5).bfloat16().eval()
    torch.nn.init.normal_(model.blocks[0].attn.relative_position_bias_table, 4.)
    with torch.no_grad(), se.AttentionTap(model, query="mean") as tap:
        report = tap.check(torch.rand(2, 3, 32, 32).bfloat16())
    assert max(found["map_error"] for found in report.values() if "map_error" in found) < 1e-5


def test_after_an_interrupted_pass_the_next_one_is_read():
    model, x = make(), torch.rand(1, 3, 32, 32)
    def stop(*_):
        raise KeyboardInterrupt
    with torch.no_grad(), se.AttentionTap(model) as tap:
        model(x)
        expected = tap.maps()
        handle = model.blocks[0].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(x * 0)
        handle.remove()
        for _ in range(3):
            model.forward_features(x)
            assert_close(tap.maps(), expected)
