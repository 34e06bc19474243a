"""The tap against unfused attention, and under what training does to a model."""
import io
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


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_fullgraph(when):
    torch._dynamo.reset()
    model, x = make(), torch.rand(2, 3, 32, 32)
    want, _ = reference(model, x, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if when == "before" else None
    with se.AttentionTap(model if compiled is None else compiled) as tap:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled is None else compiled
        for _ in range(2):
            compiled(x)
        s = tap.maps()
        assert_close(s, want, atol=1e-5, rtol=1e-4)
        (100 * s).pow(3).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_bf16_autocast_gives_a_float32_map():
    model, x = make(), torch.rand(2, 3, 32, 32)
    with se.AttentionTap(model) as tap, torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert tap.maps().dtype == torch.float32
    assert_close(tap.maps(), reference(model, x, -1)[0], atol=.02, rtol=.05)


def test_checkpointing_and_accumulated_backward():
    model, x = make(), torch.rand(2, 3, 32, 32)
    grads = []
    for on in (False, True):
        m = deepcopy(model).train()
        m.set_grad_checkpointing(on)
        with se.AttentionTap(m) as tap:
            loss = m(x).square().mean() + se.SpatialEntropyLoss()(tap.maps())
            loss.backward()
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


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
    (lambda: se.AttentionTap(timm.create_model("resnet18")), se.UnsupportedModel, "ResNet: no adapter"),
    (lambda: se.AttentionTap(make(block_fn=timm.models.vision_transformer.ParallelThingsBlock)), se.UnsupportedModel, "ParallelThingsBlock keeps no"),
    (lambda: se.AttentionTap("vit"), TypeError, "got str, expected an nn.Module"),
    (lambda: se.AttentionTap(make(), block=9), ValueError, "got 9, expected a number from -2 to 1"),
    (lambda: se.AttentionTap(make("no [CLS]"), query="cls"), se.UnsupportedModel, r"no \[CLS\] token"),
    (lambda: se.AttentionTap(make(), query="head"), ValueError, 'expected "auto", "cls" or "mean"'),
    (lambda: se.AttentionTap(make(global_pool="map", class_token=False)), se.UnsupportedModel, "pools by attention"),
])
def test_refusals(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_dropped_patches_are_refused():
    model = make(patch_drop_rate=.5).train()
    with se.AttentionTap(model), pytest.raises(RuntimeError, match="patch_drop_rate removes patches"):
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


def _ddp_worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = make().train()
    se.drop_last_skip(model)
    ddp = DistributedDataParallel(model)
    tap, loss = se.AttentionTap(ddp), se.SpatialEntropyLoss()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))[2 * rank:2 * rank + 2]
    for _ in range(2):                                   # the second pass fails if a parameter had no gradient
        ddp.zero_grad()
        (ddp(x).square().mean() + loss(tap.maps())).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/grads.pt")
    dist.destroy_process_group()


def test_two_gloo_processes_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_ddp_worker, (folder,), nprocs=2)
        got = torch.load(Path(folder) / "grads.pt")
    model = make().train()
    se.drop_last_skip(model)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with se.AttentionTap(model) as tap:
        (model(x).square().mean() + se.SpatialEntropyLoss()(tap.maps())).backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            assert_close(got[n], p.grad, atol=1e-6, rtol=1e-4)
