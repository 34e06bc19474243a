"""Chance levels and scores of objects: independent computations, hostile maps, and a model that can know nothing."""
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn
from torch.nn import functional as F
from torch.testing import assert_close

import spatial_entropy as se
from spatial_entropy.analysis.chance import beside_entropy, entropy_against_chance, surrogate_maps
from spatial_entropy.analysis.evaluation import score_masks, validate
from spatial_entropy.analysis.intervals import bootstrap, bootstrap_both, paired, sign_flip_test, student
from spatial_entropy.analysis.objects import (
    PooledPrecision,
    against_others,
    best_overlaps,
    boxes_of,
    center_gaussian,
    corloc,
    energy_pointing,
    grid_jaccard,
    max_box_accuracy,
    overlaps_with,
    pixel_ap,
    pixel_auc,
    pixels_on_grid,
    pointing,
)
from spatial_entropy.analysis.scoring import MasksBefore, score_boxes, score_maps, score_objects
from spatial_entropy.data import mask_pairs


def smooth(n, size, sigma, seed=0):
    k = torch.fft.fftfreq(3 * size)
    noise = torch.randn(n, 3 * size, 3 * size, generator=torch.Generator().manual_seed(seed))
    blur = torch.exp(-2 * (math.pi * sigma) ** 2 * (k[:, None] ** 2 + k**2))
    return torch.fft.ifft2(torch.fft.fft2(noise) * blur).real[:, size:2 * size, size:2 * size]


@pytest.mark.parametrize("size", [(14, 14), (8, 14), (5, 3), (1, 7)])
def test_surrogates_keep_values_exactly_and_the_spectrum_nearly(size):
    maps = smooth(40, 14, 1)[:, :size[0], :size[1]]
    drawn = surrogate_maps(maps, 3)
    assert drawn.shape == (3, *maps.shape) and drawn.dtype == maps.dtype
    assert torch.equal(drawn.flatten(-2).sort(-1).values, maps.flatten(-2).sort(-1).values.expand(3, -1, -1))
    size_of = lambda m: np.abs(dctn(m.numpy(), axes=(-2, -1), norm="ortho"))
    error = np.linalg.norm(size_of(drawn[0]) - size_of(maps))/np.linalg.norm(size_of(maps))
    assert error < .35
    shuffled = maps.flatten(-2)[:, torch.randperm(maps[0].numel())].view(maps.shape)
    if min(size) > 5:
        assert error < .5*np.linalg.norm(size_of(shuffled) - size_of(maps))/np.linalg.norm(size_of(maps))


@pytest.mark.parametrize("size", [8, 14, 28])
@pytest.mark.parametrize("sigma", [0, 1, 2])
def test_maps_that_hold_nothing_are_at_chance_on_every_grid(size, sigma):
    "Within 0.08 nats, where E itself lies between 0.1 and 0.9."
    torch.manual_seed(0)
    maps = smooth(300, size, sigma) if sigma else torch.randn(300, size, size)
    found = entropy_against_chance(maps, 2)
    assert found.difference.mean().abs() < .08


def test_one_object_is_found_and_a_dense_map_is_not():
    y, x = torch.meshgrid(torch.arange(14), torch.arange(14), indexing="ij")
    disc = ((y - 4) ** 2 + (x - 9) ** 2 < 9).float()
    torch.manual_seed(0)
    strong = entropy_against_chance(torch.randn(50, 14, 14) + 8*disc, 8)
    dense = entropy_against_chance((torch.rand(50, 14, 14) < .69) + .01*torch.randn(50, 14, 14), 8)
    assert strong.difference.mean() < -.4 and dense.difference.mean().abs() < .02
    assert dense.entropy.mean() < strong.entropy.mean()           # what E alone says


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_chance_takes_any_real_type(dtype):
    maps = (torch.randn(6, 9, 9)*5).to(dtype)
    found = entropy_against_chance(maps, 2)
    assert_close(found.entropy, se.spatial_entropy(maps).to(found.entropy))
    assert found.difference.isfinite().all()


def test_a_seed_means_the_same_surrogates_and_leaves_the_generator_alone():
    maps = torch.randn(3, 2, 8, 8)
    before = torch.get_rng_state()
    assert torch.equal(surrogate_maps(maps, 2, seed=5), surrogate_maps(maps, 2, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(surrogate_maps(maps, 2, seed=5), surrogate_maps(maps, 2, seed=6))


def test_the_chance_level_of_a_set_does_not_depend_on_its_batches():
    "Each picture draws signs of its own: else the error of their mean would not fall with the number of pictures."
    maps, of_batch = smooth(64, 8, 1)[:, None], beside_entropy()["entropy_chance"]
    levels = [torch.cat([*map(of_batch, maps.split(size), maps.split(size))]) for size in (1, 4, 16, 64)]
    for level in levels[1:]: assert torch.equal(level, levels[0])
    masks = torch.rand(64, 8, 8, generator=torch.Generator().manual_seed(0)) > .5
    scored = [score_maps(maps, masks, batch_size=size, surrogates=2, shifts=1).chance["entropy"].flatten()
              for size in (2, 4, 16, 64)]
    for level in scored[1:]: assert torch.equal(level, scored[0])
    free = entropy_against_chance(maps, 16, seed=9).chance.flatten()
    for level in (levels[0].flatten(), scored[0]):
        away = level - free
        assert away.mean().abs() < 2.5*away.std()/math.sqrt(len(away))
        assert torch.unique(level).numel() > 55                         # not a few draws, again and again


def test_a_pass_over_pictures_has_one_chance_level_whatever_its_batches():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1, embed_dim=48, num_heads=2,
                              num_classes=2)
    pictures = torch.randn(24, 3, 32, 32)
    held = torch.utils.data.TensorDataset(pictures, torch.zeros(24).long())
    pairs, found = torch.utils.data.TensorDataset(pictures, pictures[:, 0] > 0), []
    for size in (2, 5, 24):
        with se.AttentionTap(model) as tap:
            passed = validate(model, tap, torch.utils.data.DataLoader(held, size), also=beside_entropy())
        scored = score_objects(model, pairs, batch_size=size, shifts=1).chance["entropy"].mean().item()
        ranked = se.rank_heads(model, torch.utils.data.DataLoader(pictures, size), block=0, attention=False)
        found.append([passed["entropy_chance"], scored, ranked[0]["entropy_chance"]])
    assert np.ptp(found, axis=0).max() < 1e-3                            # but for the rounding of the maps


def test_one_broken_map_spoils_no_other():
    maps = torch.randn(4, 8, 8)
    clean = entropy_against_chance(maps[[0, 2, 3]], 2)
    maps[1, 0, 0] = torch.nan
    found = entropy_against_chance(maps, 2)
    assert found.difference.isnan().tolist() == [False, True, False, False]
    assert_close(found.entropy[[0, 2, 3]], clean.entropy)
    assert math.isfinite(found.mean()["difference"])


CASES = [((14, 14), (224, 224)), ((7, 5), (33, 20)), ((3, 4), (3, 4)), ((16, 16), (8, 8))]


@pytest.mark.parametrize("grid, size", CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_scikit_learn_on_the_stretched_map(grid, size, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 4, (3, 2, *grid), generator=g).float() if ties else torch.randn(3, 2, *grid, generator=g)
    masks = torch.rand(3, *size, generator=g) < .3
    valid = torch.rand(3, *size, generator=g) < .8
    auc, ap, jac, energy = (f(maps, masks, valid) for f in (pixel_auc, pixel_ap, grid_jaccard, energy_pointing))
    kept = se.keep_mass(maps.flatten(2).softmax(-1).view(maps.shape), .6)
    full, chosen = (F.interpolate(m.float(), size=size, mode="nearest") for m in (maps, kept))
    for i in range(3):
        for h in range(2):
            truth, value = masks[i][valid[i]].numpy(), full[i, h][valid[i]].numpy()
            assert abs(auc[i, h] - metrics.roc_auc_score(truth, value)) < 1e-9
            assert abs(ap[i, h] - metrics.average_precision_score(truth, value)) < 1e-9
            rise = np.maximum(value - maps[i, h].double().mean().item(), 0)
            assert abs(energy[i, h] - rise[truth].sum()/rise.sum()) < 1e-6
            assert abs(jac[i, h] - metrics.jaccard_score(truth, chosen[i, h][valid[i]].bool().numpy())) < 1e-9


def test_pooled_precision_is_that_of_scikit_learn_over_all_pixels():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(1)
    maps, masks = torch.randint(0, 11, (12, 2, 6, 6), generator=g)/10, torch.rand(12, 18, 18, generator=g) < .3
    maps[:, :, 0, 0], maps[:, :, 5, 5] = 0, 1                           # already from 0 to 1
    pooled = PooledPrecision(2)
    pooled.add(maps[:7], masks[:7])
    pooled.add(maps[7:], masks[7:])
    full = F.interpolate(maps, size=(18, 18), mode="nearest")
    for h in range(2):
        theirs = metrics.average_precision_score(masks.flatten().numpy(), full[:, h].flatten().numpy())
        assert abs(pooled.value()[h] - theirs) < 1e-9


def test_soft_masks_count_by_their_value():
    soft = torch.tensor([[[1., .5], [.25, 0.]]])
    on, off = pixels_on_grid(soft, (2, 2))
    assert_close(on + off, torch.ones(1, 2, 2).double())
    assert pointing(torch.tensor([[[[0., 1.], [0., 0.]]]]), soft).item() == .5


@pytest.mark.parametrize("score", [pixel_auc, pixel_ap, pointing, energy_pointing, grid_jaccard])
def test_degenerate_maps_and_masks(score):
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[1] = True
    masks[2:, :4] = True
    maps = torch.randn(4, 1, 4, 4)
    maps[3, 0, 0, 0] = torch.nan
    found = score(maps, masks)[:, 0]
    assert found[3].isnan() and found[2].isfinite()
    for i in (0, 1):
        assert found[i].isnan() or 0 <= found[i] <= 1                   # nothing, or everything, is object
    with pytest.raises(ValueError, match="expected"):
        score(maps, masks[:2])
    with pytest.raises(ValueError, match="outside 0–1"):
        score(maps, masks*255.)


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_energy_of_what_has_none(broken):
    maps, masks = torch.randn(3, 1, 4, 4), torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[1:, :4] = True
    maps[1], maps[2, 0, 1, 1] = .1, broken                               # no object; a constant map; a broken cell
    assert energy_pointing(maps, masks).isnan().all()
    void = torch.ones(3, 8, 8, dtype=torch.bool)
    void[:, :4] = False                                                  # the object is void, whole
    assert energy_pointing(torch.randn(3, 1, 4, 4), masks, void).isnan().all()


def test_boxes_by_hand():
    m = torch.zeros(4, 8)
    m[1:3, 2:4], m[0, 7] = 1., .9
    assert boxes_of(m, .95).tolist() == [[.25, .25, .5, .75]]
    assert len(boxes_of(m, .5)) == 2 and len(boxes_of(m*torch.nan, .5)) == 0
    assert boxes_of(torch.ones(4, 8), .5).tolist() == [[0, 0, 1, 1]]
    true = torch.tensor([[.25, .25, .5, .75]])
    found = best_overlaps(m, true, [0., .95])
    assert_close(found, torch.tensor([.125, 1.]).double())
    assert max_box_accuracy(torch.stack([found, found*.6]))["max_box_acc_v2"] == pytest.approx((1 + 1 + .5)/3)
    assert corloc(m[None, None], [true], .95).item() == 1 and corloc(m[None, None], [torch.zeros(0, 4)]).item() == 0


def test_a_map_that_is_the_same_for_all_pictures_is_exactly_at_chance():
    masks = torch.rand(40, 28, 28) < torch.rand(40, 1, 1)
    maps = center_gaussian(14, 14).expand(40, 1, 14, 14)
    own, chance = pixel_ap(maps, masks), against_others(pixel_ap, maps, masks, shifts=39)
    assert abs(own.mean() - chance.mean()) < 1e-9
    with pytest.raises(ValueError, match="at least 2"):
        against_others(pixel_ap, maps[:1], masks[:1])


def plain_iou(a, b):
    side = lambda i: max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i]))
    area = lambda c: (c[2] - c[0])*(c[3] - c[1])
    both = side(0)*side(1)
    return both/(area(a) + area(b) - both)


def plain_overlap(m, boxes, t):
    "scipy's regions at one threshold, and every pair of boxes."
    found = ndimage.find_objects(ndimage.label(m >= m.min() + t*(m.max() - m.min()), np.ones((3, 3)))[0])
    h, w = m.shape
    found = [(x.start/w, y.start/h, x.stop/w, y.stop/h) for y, x in found]
    return max((plain_iou(f, b) for f in found for b in boxes), default=0.)


def drawn_boxes(n, seed=0, most=3):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        start = torch.rand(int(torch.randint(1, most + 1, (1,), generator=g)), 2, generator=g)*.6
        made.append(torch.cat([start, start + .1 + torch.rand(start.shape, generator=g)*.3], 1).double())
    return made


def test_overlaps_at_all_thresholds_are_those_of_each_and_scipys_regions():
    torch.manual_seed(0)
    thresholds = [0, .1, .25, .5, .77, 1]
    boxes = [*drawn_boxes(2), torch.zeros(0, 4)]
    for m in (torch.randn(9, 7).double(), torch.randint(0, 3, (6, 6)).float(), torch.ones(4, 4), torch.eye(5)):
        found = overlaps_with(m, boxes, thresholds)
        want = [[plain_overlap(m.double().numpy(), b.tolist(), t) for t in thresholds] for b in boxes]
        assert_close(found, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=0)
    assert not overlaps_with(torch.full((4, 4), torch.nan), boxes, thresholds).any()


def test_scores_of_boxes_beside_those_of_other_pictures_by_hand():
    torch.manual_seed(0)
    maps, boxes, thresholds = F.interpolate(torch.randn(9, 2, 4, 4), size=8, mode="bilinear"), drawn_boxes(9), [.2, .4, .6, .8]
    found = score_boxes(maps, boxes, thresholds=thresholds, shifts=2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    after = lambda k: {order[p]: order[p - k] for p in range(9)}
    def accuracy(pairs, h):
        over = np.array([[plain_overlap(maps[i, h].double().numpy(), boxes[j].tolist(), t) for t in thresholds] for i, j in pairs.items()])
        return np.mean([(over >= d).mean(0).max() for d in (.3, .5, .7)])
    rows = {(row["score"], row["heads"]): row for row in found.summary(resamples=200)}
    for h in range(2):
        row = rows["max_box_acc_v2", h]
        assert row["own"] == pytest.approx(accuracy(after(0), h), abs=1e-6)
        assert row["chance"] == pytest.approx(np.mean([accuracy(after(k), h) for k in (1, 2)]), abs=1e-6)
        assert row["above_chance"]["low"] <= row["own"] - row["chance"] <= row["above_chance"]["high"]
        others = np.mean([[corloc(maps[i:i + 1, h:h + 1], [boxes[j]]).item() for i, j in after(k).items()] for k in (1, 2)])
        assert rows["corloc", h]["chance"] == pytest.approx(others, abs=1e-6)
        assert rows["corloc", h]["own"] == pytest.approx(corloc(maps, boxes)[:, h].mean().item(), abs=1e-6)


def test_boxes_that_are_known_stand_above_chance_and_one_map_for_all_does_not():
    boxes = drawn_boxes(60, most=1)
    y, x = (torch.arange(28) + .5)/28, (torch.arange(28) + .5)/28
    inside = lambda b: ((y[:, None] > b[1]) & (y[:, None] < b[3]) & (x > b[0]) & (x < b[2])).float()
    knowing = torch.stack([inside(b[0]) for b in boxes])[:, None] + .01*torch.rand(60, 1, 28, 28)
    one = center_gaussian(28, 28).expand(60, 1, 28, 28)
    rows = score_boxes(torch.cat([knowing, one], 1), boxes, thresholds=torch.arange(20)/20).summary(resamples=200)
    for row in rows:
        above = row["above_chance"]
        assert (above["low"] > .5) == (row["heads"] == 0) and (row["heads"] == 0 or above["low"] <= 0 <= above["high"]), row
    by_hand = against_others(corloc, knowing, boxes, shifts=59)
    assert by_hand.shape == (60, 1) and by_hand.mean() < .3


@pytest.mark.parametrize("wrong, said", [
    (lambda b: b[:-1], "boxes: got 4 lists, expected 5"), (lambda b: [*b[:-1], torch.zeros(0, 4)], r"got \(0, 4\) for picture 4"),
    (lambda b: [b[0]*224, *b[1:]], "for picture 0, expected x0 < x1"), (lambda b: [[0, 0, 1, 1], *b[1:]], "got list for picture 0"),
    (lambda b: [b[0][:, [2, 1, 0, 3]], *b[1:]], "expected x0 < x1"), (lambda b: [b[0][0], *b[1:]], r"got \(4,\) for picture 0")])
def test_boxes_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        score_boxes(torch.rand(5, 1, 4, 4), wrong(drawn_boxes(5)))
    with pytest.raises(ValueError, match="n at least 2"):
        score_boxes(torch.rand(1, 1, 4, 4), drawn_boxes(1))


@pytest.mark.parametrize("sizes", [[4, 4, 2], [2, 1, 7], [10]])
def test_masks_before_are_those_before(sizes):
    before, all_ = MasksBefore(3), torch.arange(1, 11)[:, None, None]
    seen = 0
    for part in all_.split(sizes):
        found = before(part)
        assert len(found) == 3
        for k, others in enumerate(found, 1):
            assert others.shape == part.shape and not (others == part).any()
            if k <= seen:
                assert (part - others == k).all()
        seen += len(part)
    with pytest.raises(ValueError, match="at least 2"):
        MasksBefore(3)(all_[:1])


@pytest.fixture(scope="module")
def scored():
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2, embed_dim=96, num_heads=3)
    pairs = mask_pairs("shapes", 64)
    return model, pairs, score_objects(model, pairs, block="all", surrogates=1)


def test_scores_come_back_to_their_pictures(scored):
    model, pairs, scores = scored
    assert scores.own["pixel_auc"].shape == (1000, 2, 3) and scores.chance["pixel_auc"].shape == (1000, 4, 2, 3)
    x, masks = (torch.stack(v) for v in zip(*(pairs[i] for i in (0, 17, 999))))
    with se.AttentionTap(model.eval(), "all") as tap, torch.no_grad():
        model(x)
        for n, maps in enumerate(tap.maps().values()):
            assert_close(scores.own["pixel_auc"][[0, 17, 999], n].double(), pixel_auc(maps, masks), atol=1e-4, rtol=0)


def test_a_blind_model_is_at_chance_for_the_best_head_too(scored):
    "Its chance level chooses the best head for each wrong mask, as its own score does for the right one."
    model, pairs, _ = scored
    weight = model.patch_embed.proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    blind = score_objects(model, pairs, surrogates=0)
    with torch.no_grad():
        weight.copy_(kept)
    for line in blind.summary("best") + blind.summary("mean"):
        assert abs(line["above_chance"]["mean"]) < .003, line["score"]


def test_the_table_of_pictures(scored, tmp_path):
    scored[2].to_csv(tmp_path/"s.csv")
    lines = (tmp_path/"s.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1001 and lines[0].startswith("picture,pixel_auc,pixel_auc_chance")
    assert float(lines[1].split(",")[1]) == pytest.approx(scored[2].own["pixel_auc"][0].max().item())


def test_a_table_of_heads_is_what_was_scored_beside_chance(scored):
    _, _, scores = scored
    heads = scores.heads("pointing", also=("entropy", "jaccard"))
    assert [*heads[0]] == ["block", "head", "above_chance", "pointing", "pointing_chance", "entropy", "entropy_chance", "jaccard",
                           "jaccard_chance", "images", "left_out"]
    assert len(heads) == 6 and heads[0]["above_chance"] == max(row["above_chance"] for row in heads)
    by_hand = (scores.own["pointing"] - scores.chance["pointing"].mean(1)).mean(0)
    for row in heads:
        assert row["above_chance"] == pytest.approx(by_hand[row["block"], row["head"]].item(), abs=1e-6)
        assert row["above_chance"] == pytest.approx(row["pointing"] - row["pointing_chance"], abs=1e-5)
        assert row["images"] == 1000 and row["left_out"] == 0 and 0 <= row["jaccard"] <= 1
    by_entropy = scores.heads("entropy")
    assert by_entropy[0]["below_chance"] == pytest.approx(by_entropy[0]["entropy_chance"] - by_entropy[0]["entropy"], abs=1e-5)
    assert [row["below_chance"] for row in by_entropy] == sorted((row["below_chance"] for row in by_entropy), reverse=True)
    for wrong in ("density", "area"):
        with pytest.raises(ValueError, match=f"by: got '{wrong}', expected one of pixel_auc"):
            scores.heads(wrong)


def test_a_part_of_a_set_keeps_its_names(scored, tmp_path):
    model, pairs, _ = scored
    part = torch.utils.data.Subset(torch.utils.data.Subset(pairs, range(500, 520)), [3, 4, 5])
    found = score_objects(model, part, surrogates=0)
    assert found.names == ["503", "504", "505"]
    found.to_csv(tmp_path/"s.csv")
    assert [line.split(",")[0] for line in (tmp_path/"s.csv").read_text(encoding="utf-8").splitlines()] == ["picture", "503", "504", "505"]


def test_values_by_picture_are_the_summarys(scored):
    own, chance = scored[2].per_picture("jaccard", "mean")
    line = next(line for line in scored[2].summary("mean") if line["score"] == "jaccard")
    assert own.shape == chance.shape == (1000,)
    assert own.mean().item() == pytest.approx(line["own"]) and (own - chance).mean().item() == pytest.approx(line["above_chance"]["mean"], abs=1e-6)
    with pytest.raises(ValueError, match="heads: got 'worst'"):
        scored[2].per_picture("jaccard", "worst")


def test_maps_that_are_there_already_score_as_those_of_the_model(scored):
    model, pairs, _ = scored
    few = torch.utils.data.Subset(pairs, range(90))
    want = score_objects(model, few, block="all", surrogates=1, batch_size=32)
    x, masks = (torch.stack(v) for v in zip(*few))
    with se.AttentionTap(model.eval(), "all") as tap, torch.no_grad():
        model(x)
        maps = torch.stack([*tap.maps().values()], 1)
    got = score_maps(maps, masks, surrogates=1)
    for name in want.own:
        assert_close(got.own[name], want.own[name], atol=1e-4, rtol=0)
        assert_close(got.chance[name], want.chance[name], atol=.1 if name == "entropy" else 1e-4, rtol=0, equal_nan=True)
    assert got.blocks == [0, 1] and got.names == [str(i) for i in range(90)]
    weights = maps.flatten(3).softmax(-1).view(maps.shape)
    for soft in (score_maps(weights, masks, surrogates=0), score_maps(weights, masks, surrogates=0, softmax=True)):
        for name in soft.own:
            # a cell at the edge of the mass that is kept may fall on either side, which moves one Jaccard by some thousandths
            assert_close(soft.own[name], got.own[name], atol=5e-3 if name == "jaccard" else 1e-3, rtol=0)
    sharp = (20*maps).flatten(3).softmax(-1).view(maps.shape)
    once, twice = (score_maps(sharp, masks, surrogates=0, softmax=soft).own["jaccard"] for soft in (None, False))
    assert (twice - once).abs().max() > .05                            # what the default saves one from
    one = score_maps(maps[:, 0], masks, names=[f"p{i}" for i in range(90)], surrogates=0, batch_size=1)
    assert one.names[3] == "p3"
    assert_close(one.own["pointing"][:, 0], got.own["pointing"][:, 0])


@pytest.mark.parametrize("maps, masks, names, said", [
    ((5, 4, 4), (5, 8, 8), None, "expected"), ((5, 2, 4, 4), (4, 8, 8), None, "n at least 2"), ((1, 2, 4, 4), (1, 8, 8), None, "n at least 2"),
    ((5, 2, 4, 4), (5, 8), None, "expected"), ((5, 2, 4, 4), (5, 8, 8), ["a"], "names: got 1")])
def test_maps_and_masks_that_do_not_belong_together_are_refused(maps, masks, names, said):
    with pytest.raises(ValueError, match=said):
        score_maps(torch.randn(maps), torch.ones(masks, dtype=torch.bool), names)


@pytest.fixture(scope="module")
def rimmed(tmp_path_factory):
    "Forty drawn pictures with VOC's masks, the rims of their objects void."
    folder = tmp_path_factory.mktemp("voc")
    drawn = se.shapes(40, "val", 64)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for i, mask in enumerate(torch.tensor(drawn.masks)):
        near = F.max_pool2d(mask[None].float(), 7, 1, 3)[0] > 0
        index = Image.fromarray(torch.where(mask, 15, torch.where(near, 255, 0)).byte().numpy(), "P")
        index.putpalette([0, 0, 0] * 15 + [192, 128, 128] + [0, 0, 0] * 239 + [224, 224, 192])
        drawn[i][0].save(folder / "images" / f"{i:02}.png")
        index.save(folder / "masks" / f"{i:02}.png")
    return folder


def test_void_pixels_leave_every_score_streamed_or_not(scored, rimmed):
    "Against scikit-learn on the valid pixels of each picture, one at a time; the published Jaccard on all of them."
    metrics = pytest.importorskip("sklearn.metrics")
    model, pairs = scored[0], mask_pairs(str(rimmed), 64)
    got = score_objects(model, pairs, surrogates=0, batch_size=7)
    x, masks, valid = (torch.stack(v) for v in zip(*pairs))
    assert pairs.void and .02 < (~valid).float().mean() < .5
    with se.AttentionTap(model.eval()) as tap, torch.no_grad():
        model(x)
        maps = tap.maps()
    kept = se.keep_mass(maps.flatten(2).softmax(-1).view(maps.shape), .6)
    full, chosen = (F.interpolate(m.float(), size=(64, 64), mode="nearest").numpy() for m in (maps, kept))
    for i in range(0, 40, 3):
        v = valid[i].numpy()
        truth = masks[i].numpy()[v]
        for h in range(3):
            value = full[i, h][v]
            rise = np.maximum(value - maps[i, h].double().mean().item(), 0)
            top = value == value.max() if full[i, h].max() == value.max() else None
            want = dict(pixel_auc=metrics.roc_auc_score(truth, value), pixel_ap=metrics.average_precision_score(truth, value),
                        energy_pointing=rise[truth].sum()/rise.sum(), jaccard=metrics.jaccard_score(truth, chosen[i, h][v] > 0),
                        jaccard_published=metrics.jaccard_score(masks[i].numpy().ravel(), chosen[i, h].ravel() > 0))
            want |= dict(pointing=truth[top].mean()) if top is not None else {}
            for name, number in want.items():
                assert got.own[name][i, 0, h].item() == pytest.approx(number, abs=2e-4), name
    assert got.own["pixel_auc"].sub(score_maps(maps, masks, surrogates=0).own["pixel_auc"]).abs().max() > 1e-3
    again = score_maps(maps, masks, valid=valid, surrogates=0, batch_size=9)
    for name in got.own:
        assert_close(again.own[name], got.own[name], atol=1e-4, rtol=0, equal_nan=True)
    assert [line["score"] for line in got.summary()][-1] == "jaccard_published"


def test_the_chance_level_leaves_out_the_void_of_the_mask_it_uses():
    "With one other mask per map, by hand: map i with the mask and the void of the picture before it."
    torch.manual_seed(0)
    maps, masks, valid = torch.randn(6, 2, 5, 5), torch.rand(6, 10, 10) < .3, torch.rand(6, 10, 10) < .7
    found = score_maps(maps, masks, valid=valid, surrogates=0, shifts=1, batch_size=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for name, score in dict(pixel_auc=pixel_auc, jaccard=grid_jaccard, energy_pointing=energy_pointing).items():
        for k in range(1, 6):
            i, j = order[k], order[k - 1]
            assert_close(found.chance[name][i, 0, 0].double(), score(maps[i:i + 1], masks[j:j + 1], valid[j:j + 1])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("valid, said", [
    (torch.ones(4, 9, 9, dtype=torch.bool), r"valid: got \(4, 9, 9\)"), (torch.ones(3, 8, 8, dtype=torch.bool), r"valid: got \(3, 8, 8\)"),
    (torch.full((4, 8, 8), 255), "valid: got torch.int64, expected torch.bool"), (torch.ones(4, 8, 8), "valid: got torch.float32, expected torch.bool")])
def test_a_void_that_does_not_fit_is_refused_in_one_sentence(valid, said):
    maps, masks = torch.randn(4, 1, 4, 4), torch.rand(4, 8, 8) < .5
    for call in (lambda: score_maps(maps, masks, valid=valid, surrogates=0), lambda: pixel_auc(maps, masks, valid)):
        with pytest.raises(ValueError, match=said.replace("got ", "got (shape )?")) as refused:
            call()
        assert "\n" not in str(refused.value)
    labels = torch.tensor([0, 15, 255, 1]).repeat(4, 16).view(4, 8, 8)
    for score in (pixel_auc, se.mask_jaccard, se.pointing):
        for kind in (torch.uint8, torch.float32):
            with pytest.raises(ValueError, match="outside 0–1"):
                score(maps, labels.to(kind))


@pytest.mark.parametrize("call,error,said", [
    (lambda m, p, s: se.draw_extremes(p, m, s), TypeError, "model: got MaskPairs, expected an nn.Module; the model comes first, then the pairs"),
    (lambda m, p, s: se.draw_extremes(m, "FOLDER", s), TypeError, "pairs: got the path 'FOLDER', expected items"),
    (lambda m, p, s: se.draw_extremes(m, p, s.own), TypeError, "scores: got dict, expected what score_objects"),
    (lambda m, p, s: se.draw_extremes(m, [p[i] for i in range(24)], s), ValueError, "got those of 1000 pictures, expected those of the 24 pairs"),
    (lambda m, p, s: se.draw_extremes(m, p, s, name="iou"), ValueError, "name: got 'iou', expected one of pixel_auc"),
    (lambda m, p, s: se.draw_extremes(m, p, s, 0), ValueError, "n: got 0"),
    (lambda m, p, s: se.draw_extremes(m, p, s, 2, block=0), ValueError, "block: got 0, layer 0, but the scores are of layer 0, 1; leave it out"),
    (lambda m, p, s: se.draw_extremes(m, p, s, 2, query="mean"), ValueError, "query: got 'mean', but the scores are of query='auto'"),
    (lambda m, p, s: s.per_picture("iou"), ValueError, "name: got 'iou', expected one of pixel_auc"),
    (lambda m, p, s: s.by_head("iou"), ValueError, "name: got 'iou', expected one of pixel_auc"),
    (lambda m, p, s: s.heads("pointing", also="jacard"), ValueError, "also: got 'jacard', expected one of pixel_auc"),
    (lambda m, p, s: s.to_csv("nowhere/x.csv"), OSError, "path: nowhere/x.csv cannot be written"),
    (lambda m, p, s: s.to_json("nowhere/x.json"), OSError, "path: nowhere/x.json cannot be written"),
    (lambda m, p, s: se.entropy_heatmap(s), TypeError, r"heads: got ObjectScores, expected Heads; pass scores.heads\(\)"),
    (lambda m, p, s: se.score_objects(m, p, shifts=0), ValueError, "shifts: got 0"),
    (lambda m, p, s: se.score_objects(m, p, surrogates=-1), ValueError, "surrogates: got -1, expected a whole number of at least 0"),
    (lambda m, p, s: se.score_objects(m, torch.utils.data.DataLoader(p)), TypeError, "pairs: got a DataLoader, expected the data set inside it"),
    (lambda m, p, s: se.score_box_pairs(m, torch.utils.data.DataLoader(p)), TypeError, "pairs: got a DataLoader, expected the data set inside it"),
    (lambda m, p, s: score_masks(m, torch.utils.data.DataLoader(p)), TypeError, "pairs: got a DataLoader, expected the data set inside it"),
    (lambda m, p, s: se.score_objects(m, mask_pairs("shapes", 96)), ValueError, "pictures are 96×96, the model wants 64×64: mask_pairs"),
    (lambda m, p, s: se.rank_heads(m, [torch.zeros(2, 3, 96, 96)]), ValueError, "pictures are 96×96, the model wants 64×64: mask_pairs"),
    (lambda m, p, s: se.accuracy(m, [(torch.zeros(2, 3, 96, 96), torch.zeros(2).long())]), ValueError, "pictures are 96×96, the model wants 64×64"),
    (lambda m, p, s: se.accuracy(p, m), TypeError, "the model comes first, then the loader"),
    (lambda m, p, s: se.accuracy(m, "FOLDER"), TypeError, "loader: got the path 'FOLDER', expected batches"),
])
def test_what_cannot_be_scored_or_drawn_is_said(scored, call, error, said):
    with pytest.raises(error, match=said):
        call(*scored)


def test_rank_heads_leaves_void_out_of_pointing(scored, rimmed):
    model, pairs = scored[0], mask_pairs(str(rimmed), 64)
    batch = [torch.stack(v) for v in zip(*pairs)]
    with se.AttentionTap(model.eval()) as tap, torch.no_grad():
        model(batch[0])
        maps = tap.maps()
    rows = sorted(se.rank_heads(model, [batch], block=-1, by="pointing"), key=lambda row: row["head"])
    want = pointing(maps, *batch[1:]).nanmean(0)
    assert [row["pointing"] for row in rows] == pytest.approx(want.tolist(), abs=1e-6)
    assert [row["jaccard"] for row in rows] == pytest.approx(se.mask_jaccard(maps, batch[1]).mean(0).tolist(), abs=1e-6)


def test_broken_maps_and_pictures_without_an_object_are_left_out_and_counted():
    torch.manual_seed(0)
    maps, masks = torch.randn(20, 2, 5, 5), torch.rand(20, 10, 10) < .3
    maps[3, 1, 0, 0], masks[7] = torch.nan, False
    rows = score_maps(maps, masks, surrogates=1).heads("pixel_auc")
    assert {(row["head"], row["images"], row["left_out"]) for row in rows} == {(0, 19, 1), (1, 18, 2)}
    assert all(math.isfinite(row["above_chance"]) for row in rows)


def test_without_an_object_no_score_counts_and_the_table_agrees_with_itself():
    "One picture of three has no object, and one mask of two is met by it: own, chance and difference are of the same pictures."
    torch.manual_seed(0)
    maps, masks = torch.randn(9, 2, 5, 5), torch.rand(9, 10, 10) < .3
    masks[::3] = False
    found = score_maps(maps, masks, surrogates=0, shifts=1)
    for name, own in found.own.items():
        assert own[::3].isnan().all() and not own[1::3].isnan().any(), name
        both = ~(own - found.chance[name][:, 0]).isnan()[:, 0, 0]
        assert 2 <= both.sum() < 6
        for row in found.heads(name):
            h = row["head"]
            assert row["above_chance"] == pytest.approx(row[name] - row[f"{name}_chance"], abs=1e-6)
            assert row[name] == pytest.approx(own[both, 0, h].mean().item(), abs=1e-6) and row["images"] == both.sum()
    for line in found.summary("best") + found.summary("mean"):
        assert line["own"] - line["chance"] == pytest.approx(line["above_chance"]["mean"], abs=1e-6)
        assert line["above_chance"]["n"] == both.sum()
    assert repr(found).count(f"n = {both.sum()}") == len(found.own)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = np.mean([not student(rng.normal(0, 1, 4)).excludes_zero for _ in range(400)])
    assert .92 < held < .98
    held = np.mean([not bootstrap(rng.exponential(1, 60) - 1, resamples=400).excludes_zero for _ in range(400)])
    assert .88 < held < .98
    tables = (rng.normal(0, 1, (12, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (12, 40)) for _ in range(60))
    held = np.mean([not bootstrap_both(t, resamples=200).excludes_zero for t in tables])
    assert .8 < held <= 1


def test_sign_flips_against_all_of_them_and_missing_pairs():
    d = [.3, -.1, .5, .2]
    signs = np.array(np.meshgrid(*[[1, -1]]*4)).reshape(4, -1).T
    assert sign_flip_test(d) == np.mean(np.abs(signs@np.array(d)) >= sum(d) - 1e-12)
    interval, _ = paired([1, 2, np.nan, 4], [0, 1, 5, 3.5])
    assert interval.n == 3 and interval.mean == pytest.approx(2.5/3)
    many = np.random.default_rng(0).normal(.5, 1, 200)
    assert sign_flip_test(many) < .001 and sign_flip_test(many - many.mean()) > .9
