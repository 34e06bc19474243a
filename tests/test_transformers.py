"""Hugging Face's vision classes: maps against unfused attention, places by changing one patch, queries by the output's gradient."""
import re
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.attention.families import find

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from reference import Calls, hf_fold  # noqa: E402
from zoo import stirred  # noqa: E402
from zoo_transformers import PACKED, SPECS, make_packed, packed, packed_for, told  # noqa: E402


def cases(specs):
    return [pytest.param(s, size, id=f"{s.name}-{i}-{size[0]}x{size[1]}") for i, s in enumerate(specs) for size in s.sizes]


def first_tensor(out):
    return out[-1] if isinstance(out, (list, tuple)) else out


@pytest.mark.parametrize("spec,size", cases(SPECS))
def test_maps(spec, size):
    """The tap's maps are those of unfused attention, laid out by the model's own functions, on every implementation."""
    for attn in spec.attn:
        model, inputs = spec.make(size, attn), spec.given(size)
        with se.AttentionTap(model, "all") as tap, torch.no_grad():
            model(**inputs, **spec.kwargs)
            maps = tap.maps()
        names = [n for n, _, _ in find(model).layers]
        assert len(names) == spec.layers
        other = deepcopy(model)
        with torch.no_grad():
            _, calls = Calls(find(other).model, names).run_on(other, inputs | spec.kwargs)
        for call, name, m in zip(calls, names, maps.values(), strict=True):
            want = hf_fold(call, spec, size)
            assert want.std() > 0
            assert_close(m, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4, msg=lambda e, at=(attn, name): f"{at}: {e}")


def changed(inputs, size, corner, step):
    """The same batch with one square of pixels replaced, by other ones in each picture."""
    (y, x), new = corner, {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
    pixels = next(iter(new.values()))
    pixels = pixels.mT if pixels.ndim == 3 else pixels    # spectrograms come as (time, frequency)
    square = pixels[..., y:y + step, x:x + step]
    square.copy_(torch.rand(square.shape, generator=torch.Generator().manual_seed(7)) * 4 - 2)
    return new


def corners(h, w):
    return sorted({(0, 0), (h - 1, w - 1), (h // 3, w // 2)})


@pytest.mark.parametrize("spec,size", cases(SPECS))
def test_geometry(spec, size):
    """One patch changed: in every layer of the first grid the map changes most where that patch lies."""
    model, inputs = spec.make(size), {k: v.repeat(4, *[1] * (v.ndim - 1)) for k, v in spec.given(size).items()}
    with se.AttentionTap(model, "all") as tap, torch.no_grad():
        model(**inputs, **spec.kwargs)
        before = tap.maps()
        h, w = before[0].shape[-2:]
        cell = size[0] // h, size[1] // w
        for y, x in corners(h, w):
            model(**changed(inputs, size, (y * cell[0], x * cell[1]), cell[0]), **spec.kwargs)
            for i, m in tap.maps().items():
                if m.shape[-2:] != (h, w):
                    break
                at = divmod((m - before[i]).abs().sum((0, 1)).argmax().item(), w)
                off = max(abs(at[0] - y), abs(at[1] - x))
                assert off <= spec.near, f"layer {i}: patch ({y}, {x}) of {h}×{w}; the map changed at {at}"


@pytest.mark.parametrize("spec", SPECS, ids=[f"{s.name}-{i}" for i, s in enumerate(SPECS)])
def test_query(spec):
    """The tokens whose output the model's own output reads are those that the query "auto" stands for."""
    size = spec.sizes[0]
    model, inputs, kept = spec.make(size), spec.given(size), []
    found = find(model)
    name, layer, kind = found.layers[-1]
    keep = layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    out = first_tensor(getattr(model(**inputs, **spec.kwargs), spec.output))
    assert out is not None, f"{spec.name} has no {spec.output}"
    keep.remove()
    kept[0].retain_grad() if kept[0].requires_grad else None
    g, = torch.autograd.grad((out * torch.randn_like(out)).sum(), kept[0], allow_unused=True)
    assert g is not None, f"{spec.name}: the output does not read {name}"
    said = "pool" if kind.one_query else found.adapter.reads if isinstance(found.adapter.reads, str) else found.adapter.reads(found.model)
    assert said == spec.reads or said == "cls" and spec.reads == "mean" and not spec.prefix
    if said == "pool" or g.ndim > 3 or spec.fold == "swin":
        return
    if getattr(layer, "batch_first", True) is False:      # tokens first
        g = g.transpose(0, 1)
    share = g.abs().sum(-1).reshape(-1, g.shape[-2]).mean(0)
    share = share / share.sum()
    n = len(share) - spec.suffix
    parts = dict(cls=share[:min(spec.prefix, 1)].sum().item(), mean=share[spec.prefix:n].sum().item(), suffix=share[n:].sum().item(),
                 prefix=share[:spec.prefix].sum().item())
    assert parts[said] > .5, f'{spec.name} reads {parts}, the query "auto" says {said}'


def pictures(g):
    return [torch.rand(2, 3, 16, 32, generator=g), torch.rand(4, 3, 24, 16, generator=g)]     # one picture, two frames of a clip


@pytest.mark.parametrize("name", PACKED)
def test_packed(name):
    """Pictures behind one another: each frame's map is its own, lies where its patches lie, and is that of the picture alone."""
    given, g = pictures(torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    for attn in ("sdpa", "eager"):
        model = make_packed(name, attn)
        run = lambda tap, pics, model=model: (model(*packed_for(model, pics)), tap.maps())[1]
        with se.AttentionTap(model, "all") as tap, torch.no_grad():
            maps = run(tap, given)
            valid = tap.valid()[0][:, 0]
            assert maps[0].shape == (3, 2, 6, 8) and valid.flatten(1).sum(1).tolist() == [32, 24, 24]
            for p, rows, cols in ((given[0], 4, 8), (given[1], 6, 4)):
                alone = run(tap, [p])
                at = slice(0, 1) if p is given[0] else slice(1, 3)
                for i, m in maps.items():              # MiniCPM-V halves the grid on its way
                    part = m[at, :, :rows * m.shape[-2] // 6, :cols * m.shape[-1] // 8]
                    assert torch.allclose(part, alone[i], atol=1e-5), (attn, i)
            for y, x in ((0, 0), (3, 6), (1, 2)):
                other = [torch.stack([*p]) for p in given]
                other[0][..., 4 * y:4 * y + 4, 4 * x:4 * x + 4] = torch.rand(2, 3, 4, 4, generator=g) * 8 - 4
                new = run(tap, other)
                assert divmod((new[0] - maps[0])[0].abs().sum(0).argmax().item(), 8) == (y, x), attn
                assert all((new[i] - maps[i])[1:].abs().max() < 1e-5 for i in maps)


def test_packed_rows():
    """Windows of Qwen 2.5: the mean of the logits of each window, put back by the library's own index."""
    from transformers.vision_utils import get_vision_window_index
    model, logits = make_packed("qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel", "eager"), []
    x, grid = packed(pictures(torch.Generator().manual_seed(0)))
    with se.AttentionTap(model, 0) as tap, torch.no_grad():
        model(x, grid)
        got = tap.maps()
    softmax = torch.nn.functional.softmax
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        m.setattr(torch.nn.functional, "softmax", lambda s, *a, **k: (logits.append(s), softmax(s, *a, **k))[1])
        model(x, grid)
    index, ends = get_vision_window_index(grid, 2, 16, 4)
    rows = torch.cat([s.mean(-2)[0] for s in logits[:len(ends) - 1]], -1)
    rows = rows.unflatten(-1, (-1, 4))[:, index.argsort()].flatten(1)                    # (H, N), in blocks of 2×2
    for k, part in enumerate(rows.split([32, 24, 24], -1)):
        h, w = [(4, 8), (6, 4), (6, 4)][k]
        want = part.view(2, h // 2, w // 2, 2, 2).transpose(2, 3).reshape(2, h, w)
        assert_close(got[k, :, :h, :w], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma4", "kosmos2_5", "molmo2"])
def test_patches_that_are_told_their_places(name):
    """A changed patch changes the map most where the tower was told that it lies; padding lies nowhere."""
    model, inputs, places = told(name, (16, 24), torch.Generator().manual_seed(0))
    stirred(model)
    main = next(iter(inputs))
    with se.AttentionTap(model, "all") as tap, torch.no_grad():
        model(**inputs)
        before, valid = tap.maps(), tap.valid()[0]
        assert before[0].shape == (2, 2, 4, 6)
        assert valid is None or valid[:, 0].flatten(1).sum(1).tolist() == [24, 21]
        for k in (0, 5, 11):
            other = inputs[main].clone()
            other[:, k, -48:] = torch.rand(48, generator=torch.Generator().manual_seed(7)) * 4 - 2
            model(**inputs | {main: other})
            for i, m in tap.maps().items():
                at = divmod((m - before[i]).abs().sum((0, 1)).argmax().item(), 6)
                assert list(at) == places[k].tolist(), (i, k)


def test_pixtral():
    """Pictures of two sizes in one batch: each keeps to itself, and its map is that of the picture alone."""
    import transformers as tf
    torch.manual_seed(0)
    config = tf.PixtralVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16, intermediate_size=32, image_size=64, patch_size=8)
    for attn in ("sdpa", "eager"):
        model = tf.PixtralVisionModel._from_config(config, attn_implementation=attn).eval()
        x, sizes = torch.rand(2, 3, 32, 48), torch.tensor([(32, 24), (16, 48)])
        for softmax in (False, True):
            with se.AttentionTap(model, "all", softmax=softmax) as tap, torch.no_grad():
                model(x, image_sizes=sizes)
                maps = tap.maps()
                assert maps[0].shape == (2, 2, 4, 6)
                for i, (h, w) in enumerate(sizes.tolist()):
                    model(x[i:i + 1, :, :h, :w])
                    alone = tap.maps()
                    assert all(torch.allclose(maps[k][i:i + 1, :, :h // 8, :w // 8], alone[k], atol=1e-5) for k in maps)


def llava(**more):
    import transformers as tf
    vision = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, vocab_size=99)
    torch.manual_seed(0)
    return tf.LlavaModel(tf.LlavaConfig(vision_config=tf.CLIPVisionConfig(**vision), text_config=tf.LlamaConfig(**text), **more)).eval()


@pytest.mark.parametrize("layer,read", [(-2, 3), (-1, 4), (2, 2), ([-3, -2], 3), ([1, -4], 1)])
def test_a_layer_that_no_output_reads_is_left_out(layer, read):
    """LLaVA stops at its feature layer: `block=-1` is the last layer whose output reaches the language model."""
    model = llava(vision_feature_layer=layer)
    found = find(model)
    assert len(found.layers) == read and found.adapter.reads == "mean"
    assert bool(found.skipped) == (read < 4)
    out = model.get_image_features(pixel_values=torch.rand(1, 3, 32, 32))
    torch.cat([*getattr(out, "pooler_output", out)]).sum().backward()
    used = [m.self_attn.q_proj.weight.grad is not None for m in found.model.encoder.layers]
    assert used == [i < read for i in range(4)]


def test_a_backbone_reads_up_to_its_last_stage():
    import transformers as tf
    config = tf.SwinConfig(embed_dim=24, depths=[2, 2], num_heads=[2, 2], image_size=32, patch_size=4, window_size=4, out_features=["stage1"])
    model = tf.SwinBackbone(config).eval()
    found = find(model)
    assert [n for n, _, _ in found.layers] == [f"encoder.layers.0.blocks.{i}" for i in (0, 1)] and "does not read" in str(found.skipped)


def test_a_pool_that_a_chat_model_does_not_read_is_left_out():
    import transformers as tf
    vision = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8, vision_use_head=True)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32, vocab_size=99)
    config = tf.PaliGemmaConfig(vision_config=tf.SiglipVisionConfig(**vision).to_dict(), text_config=tf.GemmaConfig(**text).to_dict(), projection_dim=32)
    with torch.device("meta"):
        whole, tower = find(tf.PaliGemmaModel(config)), find(tf.SiglipVisionModel(tf.SiglipVisionConfig(**vision)))
    assert len(tower.layers) == 3 and tower.layers[-1][2].one_query
    assert len(whole.layers) == 2 and not whole.layers[-1][2].one_query


def test_refusals_say_why():
    import transformers as tf
    with torch.device("meta"):
        for model, why in ((tf.ResNetModel(tf.ResNetConfig()), "convolutional network"), (tf.PoolFormerModel(tf.PoolFormerConfig()), "average pooling"),
                           (tf.MobileViTV2Model(tf.MobileViTV2Config()), "separable attention"), (tf.FocalNetModel(tf.FocalNetConfig()), "focal modulation"),
                           (tf.SwiftFormerModel(tf.SwiftFormerConfig()), "additive attention")):
            with pytest.raises(se.UnsupportedModel, match=why):
                find(model)


# ---- what the tap's own check says of an entry that is wrong ----

def spec_of(name, **more):
    return next(s for s in SPECS if s.name == name and all(s.more.get(k) == v for k, v in more.items()))


def checked(model, inputs, reads=None):
    with se.AttentionTap(model, "all") as tap, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        tap.found.adapter.reads = reads or tap.found.adapter.reads
        return tap.check(**inputs)


def test_check_finds_a_roll_that_a_backbone_keeps(monkeypatch):
    """A backbone keeps window and shift on a small grid (`always_partition`); an entry that shrinks them rolls the map."""
    model = spec_of("swin.SwinBackbone", window_size=4).make((32, 32))
    inputs = dict(pixel_values=torch.rand(2, 3, 32, 32))
    assert not checked(model, inputs).warnings
    for kind in {id(k): k for *_, k in find(model).layers}.values():
        shrunk = lambda call, stock=kind.place: stock(replace(call, args=call.args[:3], kwargs={**call.kwargs, "always_partition": False}))
        monkeypatch.setattr(kind, "place", shrunk)
    report = checked(model, inputs)
    rolled = "encoder.layers.1.blocks.1"           # a grid of 4 and a window of 4
    assert report[rolled]["place_error"] > .5 and any(w.startswith(rolled) and "show elsewhere" in w for w in report.warnings)
    assert not report["encoder.layers.1.blocks.0"]["place_error"]              # it has no shift


@pytest.mark.parametrize("name", ["metaclip_2.MetaClip2ForImageClassification", "data2vec.Data2VecVisionForImageClassification"])
def test_check_finds_a_query_that_the_output_ignores(name):
    """They average the patches; an entry that says [CLS] is told what the output reads."""
    spec = next(s for s in SPECS if s.name == name)
    model, inputs = spec.make(spec.sizes[0]), spec.given(spec.sizes[0])
    right = checked(model, inputs)
    assert not right.warnings and right.gradient["patches"] == 1
    said = checked(model, inputs, reads="cls").warnings
    assert len(said) == 1 and re.search('"auto" reads cls, with 0.0% .* but the output reads patches', said[0])
