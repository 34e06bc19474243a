"""Every family against an unfused reference: the same maps, the same gradients, at two image sizes.

The run writes down what it saw. `docs/models.md`, a page of the site, has to say the same; after a change:
`python -m pytest tests/test_models.py --write-models`.
"""
import datetime
import os
import random
import re
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.attention.families import as_embedded, find
from spatial_entropy.attention.tap import gradient_by_token

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tools")]
import census  # noqa: E402
from probes import maps_of, moved_by_features, moved_by_pixels, other_padding, spatial_axes  # noqa: E402
from reference import FOLDS, Calls, grid_fold, swin_hf_fold, tv_maxvit_fold, tv_swin_fold  # noqa: E402
from zoo import HF, OTHERS, REFUSED, TIMM  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
SEEN = {}                                                # (library, entry point): what the run saw, for the page
CASES = [(spec, size) for spec in TIMM for size in spec.sizes]


def note(library, name, found, maps, size, **more):
    row = SEEN.setdefault((library, name), dict(family=found.adapter.name.removesuffix(f" ({library})"), sizes=[], kinds=set(), grids=[]))
    row["sizes"].append(f"{size[0]}×{size[1]}")
    row["kinds"] |= {k.host.split(".")[-1] for _, _, k in found.layers}
    row["own"] = row.get("own", False) or any(k.place is not as_embedded for _, _, k in found.layers)
    row["layers"], row["skipped"] = len(found.layers), "; ".join(sorted(found.skipped))
    row["grids"].append("×".join(map(str, maps[-1].shape[-2:])))


def weights(maps):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(m.shape, generator=g) / m.detach().std() for m in maps]


def same_gradients(model, other):
    largest = max(p.grad.abs().max().item() for p in other.parameters() if p.grad is not None)
    assert largest > 0
    for (name, p), (_, r) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (p.grad is None) == (r.grad is None), name
        if p.grad is not None:
            assert_close(p.grad, r.grad, atol=1e-3 * largest, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def against_reference(model, inputs, fold, layers):
    """Maps of all layers, and gradients of a random sum of them, from the tap and from the reference."""
    other = deepcopy(model)
    names = [n for n, _, _ in find(model).layers]
    assert len(names) == layers
    _, calls = Calls(find(other).model, names).run_on(other, inputs)
    want = [fold(c, find(other).model) for c in calls]
    with se.AttentionTap(model, "all") as tap:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    got = list(tap.maps().values())
    for w, g, n in zip(want, got, names, strict=True):
        assert w.std() > 0
        assert_close(g, w, atol=1e-4 * w.abs().max().item(), rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")
    scale = weights(want)
    sum((m * s).sum() for m, s in zip(got, scale)).backward()
    sum((m * s).sum() for m, s in zip(want, scale)).backward()
    same_gradients(model, other)
    return got


@pytest.mark.parametrize("spec,size", CASES, ids=[f"{s.name}-{h}x{w}" for s, (h, w) in CASES])
def test_timm(spec, size):
    model, x = spec.make(size), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = against_reference(model, x, lambda c, m: FOLDS[spec.fold](c, m, spec, size), spec.layers)
    assert all(m.dtype == torch.float32 and m.shape[0] == 2 for m in maps)
    note("timm", spec.name, find(model), maps, size)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(se.UnsupportedModel, match=REFUSED[name]) as said:
        se.AttentionTap(timm.create_model(name))
    SEEN["refused", name] = dict(why=str(said.value))


def other_cases(specs):
    return [pytest.param(s, size, id=f"{s.name}-{size[0]}x{size[1]}") for s in specs for size in s.sizes]


def fold_of(spec, size):
    fold = dict(swin=swin_hf_fold, tv_swin=tv_swin_fold, tv_maxvit=tv_maxvit_fold, grid=grid_fold, pool=FOLDS["pool"])[spec.fold]
    return lambda c, m: fold(c, m, spec, size)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("spec,size", other_cases(HF))
def test_transformers(spec, size, attn):
    pytest.importorskip("transformers")
    if spec.name.startswith("Swinv2") and attn == "sdpa":
        pytest.skip("transformers has no sdpa for Swin V2")
    model, x = spec.make(size, attn=attn), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = against_reference(model, dict(pixel_values=x), fold_of(spec, size), spec.layers)
    if attn == "eager":
        note("transformers", spec.name, find(model), maps, size)


@pytest.mark.parametrize("spec,size", other_cases(OTHERS))
def test_multihead_attention(spec, size):
    pytest.importorskip("open_clip" if "open" in spec.name else "torchvision")
    model, x = spec.make(size), torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = against_reference(model, x, fold_of(spec, size), spec.layers)
    note("open_clip" if "open" in spec.name else "torchvision", spec.name, find(model), maps, size)


# ---- probes: they share nothing with how the tap reads a map, and need no reference ----

EVERY = [pytest.param(s, id=s.name) for s in (*TIMM, *OTHERS)]
WINDOWED = {"swin", "gcvit", "tiny_vit", "sam", "sam2", "davit", "maxvit", "tv_swin", "tv_maxvit", "halo"}
WINDOWS = [(s, size) for s in (*TIMM, *OTHERS) if s.fold in WINDOWED and s.layers < 14 for size in s.sizes]
SPREAD = [(s, size) for s in (*TIMM, *OTHERS) if s.spread for size in s.sizes]


def made(spec, size=None):
    if type(spec).__name__ == "Other":
        pytest.importorskip("open_clip" if "open" in spec.name else "torchvision")
    size = size or max(spec.sizes, key=lambda s: (s[0] != s[1], s[0] * s[1]))
    return spec.make(size), size


@pytest.mark.parametrize("spec", EVERY)
def test_geometry_one_patch_moves_its_own_cell(spec):
    """Pixels of one patch are changed; the map changes most there, in every layer where it changes in one place at all."""
    if spec.spread:
        pytest.skip("convolutions before its attention spread a patch over many cells: its features are changed instead")
    model, size = made(spec)
    far = moved_by_pixels(model, size, 1 if spec.layers > 8 else 3)
    every = [d for layer in far.values() for d in layer]
    assert len(every) >= 4
    assert sum(d <= spec.near for d in every) > .9 * len(every), far


@pytest.mark.parametrize("spec,size", WINDOWS + SPREAD, ids=[f"{s.name}-{h}x{w}" for s, (h, w) in WINDOWS + SPREAD])
def test_geometry_of_features(spec, size):
    """One place of a layer's own input is changed, at sizes at, below and above the window: the map changes most at that cell."""
    model, _ = made(spec, size)
    layers, kinds = find(model).layers, {}
    for i, (_, layer, kind) in enumerate(layers):
        kinds.setdefault((kind.host, str(getattr(layer, "shift_size", ""))), i)
    for i in {*kinds.values(), len(layers) - 1}:
        axes = spatial_axes(layers[i][1], model, lambda m: m(torch.rand(1, 3, *size)), size)
        if axes and "latten" not in layers[i][0]:
            off = sorted(moved_by_features(model, i, axes, size))
            assert off[len(off) // 2 if spec.spread else -1] <= .5, layers[i][0]      # convolutions inside spread a place, too


@pytest.mark.parametrize("spec,size", WINDOWS, ids=[f"{s.name}-{h}x{w}" for s, (h, w) in WINDOWS])
def test_padding_is_not_counted(spec, size):
    """Whatever stands in the padding of windows, no map moves."""
    if spec.fold == "halo":
        pytest.skip("halo attention pads its relative positions too")
    model, _ = made(spec, size)
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    for number, (plain, other) in other_padding(model, range(min(4, spec.layers)), x).items():
        assert_close(other, plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-5, msg=lambda m, n=number: f"layer {n}: {m}")


def test_some_windows_are_padded():
    padded = {s.name for s, size in WINDOWS if s.fold in ("swin", "sam", "sam2", "davit", "tv_swin") and
              other_padding(s.make(size), [0], torch.rand(1, 3, *size))}
    assert len(padded) >= 5, padded


def asks_first(model, x):
    """Whether "auto" is "cls" in the last layer."""
    try:
        return torch.equal(maps_of(model, lambda m: m(x), -1), maps_of(model, lambda m: m(x), -1, "cls"))
    except se.UnsupportedModel:                                          # no [CLS] token
        return False


def first_of(out):
    return out if isinstance(out, torch.Tensor) else next(iter(out.values() if hasattr(out, "values") else out))


@pytest.mark.parametrize("spec", EVERY)
def test_auto_is_what_the_output_reads(spec):
    """The output's gradient, by token of the last layer's output, lies where "auto" asks."""
    model, size = made(spec)
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    _, layer, kind = find(model).layers[-1]
    grad = gradient_by_token(layer, lambda: first_of(model(x)))
    assert grad.abs().amax() > 0
    if grad.ndim != 3 or len(grad) > 1:                                  # a pool's one token, or places of a feature map
        assert max((grad != 0).any(axis).float().mean() for axis in (1, -1)) > .9
        return
    share = grad.abs().sum((0, 2)) / grad.abs().sum()
    if kind.one_query or asks_first(model, x):
        assert share[0] > .5 and share[0] == share.max()
    else:
        before = len(share) - maps_of(model, lambda m: m(x), -1)[0, 0].numel()
        patches = share[before if before < 10 else 0:]                   # more is no prefix: there are fewer keys than queries
        assert patches.sum() > .99 and patches.min() > .1 / len(patches)


def page():
    """The page of the site, from what this run saw."""
    works = {k: r for k, r in SEEN.items() if k[0] != "refused"}
    families = {}
    for (library, _), r in works.items():
        families.setdefault((library, r["family"]), []).append(r)
    lines = ["# Supported models", "", f"{len(works)} entry points, small copies with random weights, against an unfused reference: maps to 1e-4 of the "
             "largest value, gradients of all parameters to 1e-3. Written by `python -m pytest tests/test_models.py --write-models`; the tests fail when "
             "it is out of date.", "",
             "*works*: the keys lie as the patch embedding gave them. *adapter*: the family's entry says how they lie (windows, rolled or dilated; pooled "
             "keys; another order). *refused*: there is no map of places, or no entry yet. Packed batches (NaFlex, SigLIP 2) and masked autoencoders are in "
             "`tests/test_tap.py`.", "",
             "## Families", "", "| library | family | | entry points | attention layers, or the reason |", "|---|---|---|---|---|"]
    for (library, family), rows in families.items():
        kinds, skipped = sorted(set().union(*(r["kinds"] for r in rows))), sorted({r["skipped"] for r in rows} - {""})
        how = "adapter" if any(r["own"] for r in rows) else "works"
        passed = "; passed over: " * bool(skipped) + "; ".join(skipped)
        lines.append(f"| {library} | {family} | {how} | {len(rows)} | {', '.join(f'`{k}`' for k in kinds)}{passed} |")
    lines += [f"| timm | `{name}` | refused | 1 | {r['why']} |" for (library, name), r in SEEN.items() if library == "refused"]
    lines += ["", "## Entry points", "", "| library | model | layers | images | grid of the last map |", "|---|---|---|---|---|"]
    lines += [f"| {library} | `{name}` | {r['layers']} | {', '.join(r['sizes'])} | {', '.join(r['grids'])} |" for (library, name), r in works.items()]
    return "\n".join(lines) + "\n"


def test_page_of_models(request):
    expected = len(TIMM) + len(HF) + len(OTHERS) + len(REFUSED)
    if len(SEEN) < expected:
        pytest.skip(f"{len(SEEN)} of {expected} models ran in this process; the page needs them all")
    before, rest, counted = PAGE.read_text(encoding="utf-8").partition(census.HEADING)
    before, heading, language = before.partition("## Vision-language models")      # tests/test_language.py writes that
    rest = heading + language + rest
    if request.config.getoption("--write-models"):
        before = page() + "\n"
        PAGE.write_text(before + rest + counted, encoding="utf-8")
    assert before.rstrip() == page().rstrip(), "docs/models.md is out of date: python -m pytest tests/test_models.py --write-models"


# ---- the census, docs/models.md's last part ----

LISTINGS = census.parts(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("library", LISTINGS)
def test_counts_of_the_census_add_up(library):
    part = LISTINGS[library]
    rows = census.read_listing(part)
    names = [n for _, _, _, some in rows for n in some]
    assert len(names) == len(set(names)) == int(re.search(r"(\d+) names$", part.splitlines()[0])[1])
    stated = dict(re.findall(r"^\*\*(.+): (\d+)\*\*$", part, flags=re.M))
    for group, count in stated.items():
        assert int(count) == sum(len(some) for g, _, _, some in rows if g == group)
    assert part.count("\n- ") == len(rows) and {g for g, *_ in rows} == set(stated) <= set(census.GROUPS)
    assert all(re.search(rf" \({len(some)}(, \w+)?\): {re.escape(some[0])}", line) for line, (_, _, _, some) in
               zip(re.findall(r"^- .*$", part, flags=re.M), rows, strict=True))


@pytest.mark.parametrize("library", LISTINGS)
def test_nine_in_ten_of_those_that_attend_over_places_are_read(library):
    count = dict.fromkeys(census.GROUPS, 0)
    for group, _, _, names in census.read_listing(LISTINGS[library]):
        count[group] += len(names)
    assert count["read"] >= .9 * (count["read"] + count["attention over places, refused"])


@pytest.mark.parametrize("library,some", [("timm", 8), ("torchvision", 2), ("open_clip", 2), ("transformers", 2)])
def test_a_sample_of_the_census_is_up_to_date(library, some):
    """Another dozen names every day, built anew and looked at."""
    if library not in LISTINGS:
        pytest.skip(f"docs/models.md has no census of {library} yet")
    pytest.importorskip(library)
    build = dict(census.SOURCES[library]())
    rows = {n: (group, text) for group, text, _, names in census.read_listing(LISTINGS[library]) for n in names}
    both = sorted(set(rows) & set(build))
    assert len(both) > .9 * len(rows)
    if version(library.replace("open_clip", "open_clip_torch")) in LISTINGS[library].splitlines()[0]:
        assert len(both) == len(rows) == len(build)
    for name in random.Random(datetime.date.today().isoformat()).sample(both, some):
        assert census.sorted_into(build[name])[:2] == rows[name], name


# ---- pretrained weights ----

DATA = os.environ.get("SPATIAL_ENTROPY_DATA")            # a folder with vit_cifar10_tiny/model.safetensors and cifar10_24k/


def test_timm_pretrained_is_the_same_path(tmp_path):
    """`pretrained=True` reads a file instead of the hub; the tap sees the same model."""
    from safetensors.torch import save_file
    spec = TIMM[0]
    model, x = spec.make((32, 32)), torch.rand(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = timm.create_model(spec.name, pretrained=True, num_classes=3, img_size=32, **spec.kwargs,
                               pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors"), num_classes=3)).eval()
    maps = []
    for m in (model, loaded):
        with se.AttentionTap(m, "all") as tap, torch.no_grad():
            m(x)
        maps.append(tap.maps())
    assert all(torch.equal(maps[0][i], maps[1][i]) for i in maps[0])


def test_transformers_pretrained_is_the_same_path(tmp_path):
    tf = pytest.importorskip("transformers")
    model, x = HF[0].make((32, 32)), torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    maps = []
    for m in (model, loaded):
        with se.AttentionTap(m) as tap, torch.no_grad():
            m(pixel_values=x)
        maps.append(tap.maps())
    assert torch.equal(*maps)


@pytest.mark.skipif(not DATA, reason="set SPATIAL_ENTROPY_DATA to a folder with vit_cifar10_tiny/ and cifar10_24k/ to test really trained weights")
def test_a_really_trained_vit():
    """A trained ViT through `pretrained=True`: it classifies, its maps pass the self-check, and two steps of fine-tuning lower its entropy."""
    from timm.data import create_dataset, create_loader
    model = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=32, patch_size=4, num_classes=10, embed_dim=128, depth=4, num_heads=4,
                              mlp_ratio=2, pretrained_cfg_overlay=dict(file=f"{DATA}/vit_cifar10_tiny/model.safetensors", num_classes=10)).eval()
    pictures = create_dataset("folder", f"{DATA}/cifar10_24k/test")
    loader = create_loader(pictures, (3, 32, 32), 200, num_workers=0, use_prefetcher=False, crop_pct=1., mean=(.4914, .4822, .4465), std=(.2470, .2435, .2616),
                           device=torch.device("cpu"))
    right, entropy = 0, []
    with se.AttentionTap(model, "all") as tap, torch.no_grad():
        for x, y in loader:
            right += (model(x).argmax(1) == y).sum().item()
            entropy.append(se.spatial_entropy(tap.maps()[3]))
    assert right / len(pictures) > .65
    with se.AttentionTap(model, "all") as tap:
        assert all(e < 1e-5 for r in tap.check(x).values() for e in r.values())
    optimizer, loss, before = torch.optim.SGD(model.parameters(), .05), se.SpatialEntropyLoss(), None
    with se.AttentionTap(model) as tap:
        for _ in range(3):
            model(x)
            value = loss(tap.maps())
            before = value.item() if before is None else before
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert value.item() < before
