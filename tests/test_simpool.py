"""SimPool: beside another implementation, in every kind of ViT that it fits, and as a run's setting from the flag to the scores."""
import copy
import json
import pickle

import pytest
import timm
import torch
from probes import entropies
from runs import quick
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.attention.simpool import SimPool, use_simpool
from spatial_entropy.attention.surgery import drop_last_skip
from spatial_entropy.commands import main
from spatial_entropy.training.config import load_config

small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)
KINDS = {
    "[CLS]": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", dict(reg_tokens=3)),
    "mean": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="avg")),
    "a pool by attention before": ("vit_tiny_patch16_224", dict(class_token=False, global_pool="map")),
    "oblong": ("vit_tiny_patch16_224", dict(img_size=(32, 48))),
    "EVA": ("eva02_tiny_patch14_224", {}),
    "EVA, mean": ("eva02_tiny_patch14_224", dict(class_token=False, global_pool="avg")),
}


def made(kind, seed=0):
    torch.manual_seed(seed)
    name, more = KINDS[kind]
    model = timm.create_model(name, **{**small, **more}).eval()
    pool = use_simpool(model)
    for linear in (pool.q, pool.k):
        torch.nn.init.normal_(linear.weight)                     # so that attention is not even
    return model


def pictures(model, n=3):
    return torch.rand(n, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def test_without_a_power_it_is_timms_own():
    layers = pytest.importorskip("timm.layers")
    if not hasattr(layers, "SimPool1d"):
        pytest.skip("this timm has no SimPool1d")
    torch.manual_seed(0)
    ours, theirs = SimPool(16, gamma=None).double(), layers.SimPool1d(16, gamma=None, norm_layer=torch.nn.LayerNorm).double()
    theirs.load_state_dict(ours.state_dict())
    theirs.norm.eps = ours.norm.eps
    x = torch.randn(4, 9, 16).double()
    assert_close(ours(x), theirs(x))


def test_the_power_mean_lies_between_mean_and_maximum():
    torch.manual_seed(0)
    x = torch.randn(3, 20, 8).double()
    pools = [SimPool(8, gamma).double() for gamma in (1., 2., 100.)]
    for pool in pools:
        pool.load_state_dict(pools[0].state_dict())
        pool.q.weight.data.zero_()                               # even attention
    z = pools[0].norm(x)
    v = z - z.amin((1, 2), keepdim=True)
    mean, middle, most = (pool(x) for pool in pools)
    assert_close(mean, v.mean(1), atol=2e-6, rtol=0)
    assert (mean < middle).all() and (middle < most).all() and ((most - v.amax(1)).abs() < .05*v.amax(1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tap_reads_its_attention_and_the_classifier_reads_what_it_pools(kind):
    model = made(kind)
    x, pool = pictures(model), model.attn_pool
    with se.AttentionTap(model) as tap, se.AttentionTap(model, softmax=True) as weights, torch.no_grad():
        out = model(x)
    grid = model.patch_embed.grid_size
    tokens = model.forward_features(x)[:, model.num_prefix_tokens:]
    s = (pool.q(tokens.mean(1))[:, None]*pool.k(pool.norm(tokens))).sum(-1)/24**.5
    assert tap.maps().shape == (3, 1, *grid) and s.std() > .1
    assert_close(tap.maps(), s.view(3, 1, *grid))
    assert_close(weights.maps(), s.softmax(-1).view(3, 1, *grid))
    z = pool.norm(tokens)
    v = z - z.amin((1, 2), keepdim=True) + 1e-6
    u = ((s.softmax(-1)[..., None]*v**1.25).sum(1))**.8
    assert_close(out, model.head(model.fc_norm(u)))
    named = {name for name, _ in timm.create_model(KINDS[kind][0], **{**small, **KINDS[kind][1]}).named_parameters()}
    new = {name for name, _ in model.named_parameters()} - named
    assert new <= {f"attn_pool.{part}" for part in ("norm.weight", "norm.bias", "q.weight", "k.weight")}


@pytest.mark.parametrize("kind", ["[CLS]", "EVA", "mean"])
def test_copies_pickles_and_either_order_with_the_surgery(kind):
    model = made(kind)
    x = pictures(model)
    drop_last_skip(model)
    other = timm.create_model(KINDS[kind][0], **{**small, **KINDS[kind][1]}).eval()
    drop_last_skip(other)
    use_simpool(other)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(x)
        for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_half_precision(dtype, how):
    if how == "autocast" and dtype == torch.float16:
        pytest.skip("autocast to float16 is for GPUs")
    model = made("[CLS]")
    x, want = pictures(model), None
    want = model(x)
    low = copy.deepcopy(model).train()
    if how == "cast":
        low, x = low.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"), se.AttentionTap(low) as tap:
        out = low(x)
        loss = out.float().square().mean() + se.SpatialEntropyLoss()(tap.maps())
    loss.backward()
    assert tap.maps().dtype == torch.float32
    assert (out - want).abs().max() < .1*want.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())


def test_equal_tokens_and_huge_ones_stay_finite():
    for dtype in (torch.float32, torch.float16):
        for x in (torch.ones(2, 9, 16), torch.zeros(2, 9, 16), torch.randn(2, 9, 16)*1e4):
            pool, x = SimPool(16).to(dtype), x.to(dtype).requires_grad_()
            out = pool(x)
            out.float().sum().backward()
            assert out.isfinite().all() and x.grad.isfinite().all(), dtype


def test_the_regulariser_lowers_the_entropy_of_its_map():
    model = made("[CLS]").train()
    values = entropies(model, model.attn_pool.parameters(), pictures(model, 16), 1e-2)
    assert values[-1] < .7*values[0]


@pytest.mark.parametrize("make, error, said", [
    (lambda: timm.create_model("resnet18"), TypeError, "ResNet: SimPool fits timm's VisionTransformer and Eva"),
    (lambda: torch.nn.Sequential(made("[CLS]")), TypeError, "pass the model itself"),
    (lambda: made("[CLS]"), ValueError, "pools by SimPool already"),
])
def test_what_it_does_not_fit_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        use_simpool(make())


def test_a_gamma_that_is_none_and_a_tap_that_listens():
    for gamma in (0, -1, 101, float("nan")):
        with pytest.raises(ValueError, match="gamma: got"):
            SimPool(4, gamma)
    model = timm.create_model("vit_tiny_patch16_224", **small)
    with se.AttentionTap(model), pytest.raises(RuntimeError, match="use SimPool first, then tap"):
        use_simpool(model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two epochs with SimPool, from the command line."
    folder = tmp_path_factory.mktemp("simpool")
    line = ("train --data shapes --limit 64 -b 8 --epochs 2 --img-size 32 --pooling simpool --keep-skip --model-kwargs depth=1 embed_dim=24 num_heads=2 "
            f"patch_size=8 --device cpu --experiment pooled --output {folder}")
    with quick():
        assert main(line.split()) == 0
    return folder/"pooled"


def test_a_run_keeps_loads_and_scores_what_pools(run):
    config, _ = load_config(run)
    assert config.pooling == "simpool" and "pooling: simpool" in (run/"config.yaml").read_text(encoding="utf-8")
    model, _, _ = se.load_run(run)
    assert isinstance(model.attn_pool, SimPool) and model.attn_pool.gamma == 1.25
    scores = json.loads((run/"evaluation.json").read_text(encoding="utf-8"))
    pairs = se.mask_pairs("shapes", 32)
    x, masks = (torch.stack(v) for v in zip(*pairs))
    with torch.no_grad():
        tokens = model.forward_features(x)[:, 1:]
        s = (model.attn_pool.q(tokens.mean(1))[:, None]*model.attn_pool.k(model.attn_pool.norm(tokens))).sum(-1).view(-1, 1, 4, 4)
    assert scores["entropy"] == pytest.approx(se.spatial_entropy(s[:scores["pictures"]]).mean().item(), abs=1e-4)
    assert scores["pointing"] == pytest.approx(se.pointing(s, masks).mean().item(), abs=1e-4)      # one head: the best is the only one


def test_a_run_starts_from_one_with_simpool(run, tmp_path):
    with quick():
        again = se.train(data="shapes", limit=16, batch_size=8, epochs=1, img_size=32, pooling="simpool", keep_skip=True, lr=1e-12, warmup_lr=0., min_lr=0.,
                         model_kwargs=dict(depth=1, embed_dim=24, num_heads=2, patch_size=8), device="cpu", initial_checkpoint=str(run),
                         output=str(tmp_path), weight_decay=0., experiment="again")
    ours, theirs = se.load_run(again.folder)[0].state_dict(), se.load_run(run)[0].state_dict()
    for name in ours:
        assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


def test_models_that_cannot_are_refused_in_one_sentence(capsys, tmp_path):
    line = f"train --data shapes --limit 8 -b 8 --img-size 32 --model convit_tiny --pooling simpool --output {tmp_path}"
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert "ConVit: SimPool fits timm's VisionTransformer and Eva" in said and "--pooling own" in said and said.count("\n") == 1
    assert main(f"train --pooling max --output {tmp_path}".split()) == 2
    assert "pooling: got 'max', expected one of own, simpool" in capsys.readouterr().err
