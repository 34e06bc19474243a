"""The tap against unfused attention, and under what training does to a model."""
import io
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.families import find

sys.path.insert(0, str(Path(__file__).parent))
from reference import Calls  # noqa: E402
from zoo import HF, OTHERS, TIMM  # noqa: E402

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
        with pytest.raises(RuntimeError, match="no map was heard"):
            tap.maps()
        model(torch.rand(1, 3, 32, 32))
        with pytest.raises(Exception):                   # a pass that fails leaves no map of an earlier one behind
            model(torch.rand(1, 3, 32, 33))
        with pytest.raises(RuntimeError, match="no map was heard"):
            tap.maps()


# ---- what training does to a model, for one model of every mechanism ----

ZOO = {s.name: s for s in [*TIMM, *HF, *OTHERS]}
KINDS = ["vit_tiny_patch16_224", "vit_small_patch16_rope_224", "beit_base_patch16_224", "vit_base_patch16_siglip_224", "cait_xxs24_224",
         "swin_tiny_patch4_window7_224", "hiera_tiny_224", "ViTForImageClassification", "SwinForImageClassification", "torchvision ViT"]


def zoo(name):
    spec = ZOO[name]
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
    model, call = zoo(name)
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
    from spatial_entropy import tap as module
    model = make()
    right = module._row
    monkeypatch.setattr(module, "_row", lambda *a: (right(*a)[0].flip(-1), None))
    with se.AttentionTap(model) as tap:
        assert tap.check(torch.rand(2, 3, 32, 32))["blocks.1.attn"]["map_error"] > 1e-3


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
