"""What measures take and leave: maps of any type, infinite cells, frozen modules, devices, repeated truths, files that others read."""
import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import spatial_entropy as se
from spatial_entropy.analysis import evaluation, grounding, heads, intervals, objects
from spatial_entropy.analysis.masks import attended, mask_jaccard
from spatial_entropy.analysis.outliers import are_weights, outliers
from spatial_entropy.analysis.robustness import corruption_accuracy, occlusion_curves
from spatial_entropy.analysis.scoring import draw_extremes, score_boxes, score_maps
from spatial_entropy.boxes import read_boxes
from spatial_entropy.data import _drawer, shapes
from spatial_entropy.language.heads import rank_seen
from spatial_entropy.language.samples import Seen
from spatial_entropy.pictures import overlay, show_maps
from spatial_entropy.training.files import write_json

NAN = float("nan")
TYPES = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.float16, torch.float64, torch.float8_e5m2]


@pytest.fixture(scope="module")
def model(): return se.demo_model()


@pytest.fixture(scope="module")
def seen():
    "Pictures, classes and masks."
    drawn = shapes(8, "val", 112)
    return torch.tensor(drawn.images).permute(0, 3, 1, 2)/127.5 - 1, torch.tensor(drawn.labels), torch.tensor(drawn.masks)


@pytest.fixture
def blobs():
    "Whole numbers 0 to 57, which every type of TYPES but the smallest holds; and a box for each."
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    maps = torch.stack([(56 - (y - a)**2 - (x - b)**2).clamp_min(0) for a, b in ((2, 2), (5, 4), (4, 1))])[:, None]
    return maps, [torch.tensor([[.1, .1, .6, .6]]), torch.tensor([[.3, .4, .9, 1.]]), torch.tensor([[0., .2, .5, .9]])]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_boxes_of_maps_of_any_type_are_those_of_the_numbers(blobs, dtype):
    maps, boxes = blobs
    maps = maps.float().to(dtype)
    plain = maps.double()
    ours, theirs = score_boxes(maps, boxes), score_boxes(plain, boxes)
    assert torch.equal(ours.right, theirs.right) and torch.equal(ours.corloc, theirs.corloc)
    assert torch.equal(objects.boxes_of(maps[0, 0], .5), objects.boxes_of(plain[0, 0], .5))
    assert_close(objects.corloc(maps, boxes), objects.corloc(plain, boxes))


def test_boxes_of_what_is_and_is_not_and_of_signed_bytes(blobs):
    on, boxes = blobs[0] > 40, blobs[1]
    assert torch.equal(score_boxes(on, boxes).right, score_boxes(on.float(), boxes).right)
    full = torch.tensor([[-128, 127], [-128, 0]], dtype=torch.int8)      # their difference is beyond the type
    assert objects.boxes_of(full, .5).tolist() == [[.5, 0, 1, 1]]


@pytest.mark.parametrize("scale", (1, 300))
def test_half_precision_is_no_attention_because_its_sum_overflows(scale):
    cam = (torch.rand(4, 2, 24, 24, generator=torch.Generator().manual_seed(0))*scale).half()
    assert not are_weights(cam)
    assert torch.equal(outliers(cam).mask, outliers(cam.float()).mask)
    assert are_weights(cam.float().flatten(2).softmax(-1).view(cam.shape).half())


def test_maps_are_asked_until_one_says_no():
    maps = torch.full((130, 1, 2, 2), .25)
    assert are_weights(maps)
    for i in (0, 64, 129):
        other = maps.clone()
        other[i, 0, 0, 0] = -1e-3
        assert not are_weights(other)
    maps[5] = NAN
    assert are_weights(maps)                                             # a broken map has no say


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_constant_map_has_no_mass(dtype):
    mask = torch.zeros(1, 28, 28, dtype=torch.bool)
    mask[:, :9, :9] = True
    for value in (.1, .3, 1/3, -.7, 1/196):
        for n in (7, 14, 24):
            assert objects.energy_pointing(torch.full((1, 1, n, n), value, dtype=dtype), mask).isnan().all()


@pytest.mark.filterwarnings("ignore:spatial_entropy. got maps with NaN")
def test_regions_are_those_of_the_maps_that_count():
    maps = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    spoilt = torch.cat([maps, maps])
    spoilt[4:, :, 0, 1] = -torch.inf
    scores = lambda m: evaluation._scores_of(evaluation._sums_of(torch.zeros(len(m), 3), torch.zeros(len(m)).long(), m))
    ours, theirs = scores(spoilt), scores(maps)
    assert ours["regions"] == theirs["regions"] and ours["entropy"] == pytest.approx(theirs["entropy"])


def test_pooled_precision_leaves_infinite_cells_out():
    maps, masks = torch.rand(6, 2, 5, 5), torch.rand(6, 10, 10) > .6
    spoilt = maps.clone()
    spoilt[3:, :, 0, 0] = -torch.inf
    ours, theirs = objects.PooledPrecision(2), objects.PooledPrecision(2)
    ours.add(spoilt, masks)
    theirs.add(maps[:3], masks[:3])
    assert torch.equal(ours.value(), theirs.value())


@pytest.mark.parametrize("size", (46, 270, 368, (46, 31)))
def test_the_two_jaccard_indices_are_one(size):
    size = size if isinstance(size, tuple) else (size, size)
    maps, masks = torch.randn(5, 2, 14, 14), torch.rand(5, *size) > .5
    for given in (maps, maps.bfloat16(), (20*maps + 100).to(torch.uint8), maps > 0):
        assert_close(mask_jaccard(given, masks), objects.grid_jaccard(given, masks).float())
    broken = maps.clone()
    broken[0, 0, 0, 0] = NAN
    assert mask_jaccard(broken, masks).isnan().sum() == 1
    assert attended(maps[0], size).shape == (2, *size)


def test_masks_of_the_jaccard_index_are_booleans():
    maps, masks = torch.randn(2, 3, 4, 4), torch.rand(2, 8, 8) > .5
    for same in (masks.float(), masks.byte(), masks.long()): assert torch.equal(mask_jaccard(maps, same), mask_jaccard(maps, masks))
    for wrong, said in ((masks/2, "got shares"), (masks.byte()*255, "outside 0–1")):
        with pytest.raises(ValueError, match=said): mask_jaccard(maps, wrong)


def test_masks_of_a_function_are_no_labels(model, seen):
    x, _, masks = seen
    labels = masks.byte()
    labels[:, :10] = 255                                                 # void
    rank = partial(heads.rank_heads, model, block=-1, surrogates=0, attention=False, by="jaccard")
    with pytest.raises(ValueError, match="outside 0–1"): rank([(x, labels)], masks=lambda b: b[1])
    ours, theirs = rank([(x, labels)], masks=lambda b: b[1] == 1), rank([(x, labels == 1)])
    assert list(ours) == list(theirs)


def test_every_score_has_a_good_end():
    "A new score that stands in no set would put the worst head first."
    low_is_good = {"entropy", "regions", "empty", "density"}
    scored = {*objects.ON_GRID, "jaccard_published", "max_box_acc_v2", "corloc", *grounding.SCORES, *low_is_good}
    assert all((name in low_is_good) != (name in heads._high_is_good) for name in scored)
    assert scored <= {*heads._column_labels}


def test_boxes_and_published_jaccard_put_the_best_head_first():
    maps, boxes = torch.zeros(3, 3, 8, 8), [torch.tensor([[x/8, .125, x/8 + .5, .625]]) for x in (0, 2, 4)]
    for i, x in enumerate((0, 2, 4)): maps[i, 1, 1:5, x:x + 4], maps[i, 0, 7, 7], maps[i, 2, 0, 0] = 1, 1, 1
    table = score_boxes(maps, boxes).heads()
    for name in ("corloc", "max_box_acc_v2"):
        assert table.sort(name)[0][name] == max(row[name] for row in table) > min(row[name] for row in table)
    masks, valid = torch.rand(6, 12, 12) > .6, torch.rand(6, 12, 12) > .1
    table = score_maps(torch.randn(6, 4, 6, 6), masks, valid=valid, surrogates=0).heads("jaccard_published")
    assert table.sort("jaccard_published")[0]["jaccard_published"] == max(row["jaccard_published"] for row in table)


def test_every_measure_leaves_each_module_in_its_mode(model, seen):
    x, y, masks = seen
    loader, pairs = DataLoader(TensorDataset(x, y), 4), TensorDataset(x, masks)
    def fails(maps, pictures): raise KeyError("no")
    with se.AttentionTap(model) as tap:
        for measure in (lambda: evaluation.accuracy(model, loader), lambda: evaluation.score_masks(model, pairs),
                        lambda: evaluation.validate(model, tap, loader), lambda: occlusion_curves(model, loader, (0., .5)),
                        lambda: evaluation.validate(model, tap, loader, also=dict(fails=fails)),
                        lambda: evaluation.score_masks(model, TensorDataset(x, masks[:, ::2].byte()*9))):
            model.train()
            model.blocks[0].eval()                                       # frozen
            try: measure()
            except (KeyError, ValueError): pass
            modes = {name: m.training for name, m in model.named_modules()}
            assert all(on == (not name.startswith("blocks.0")) for name, on in modes.items())
    model.eval()


def test_a_device_that_is_none_is_refused_in_one_sentence(model, seen):
    x, y, masks = seen
    loader, pairs = DataLoader(TensorDataset(x, y), 4), TensorDataset(x, masks)
    for measure in (lambda: evaluation.accuracy(model, loader, "tpu9"), lambda: evaluation.score_masks(model, pairs, device="tpu9"),
                    lambda: occlusion_curves(model, loader, device="tpu9")):
        with pytest.raises(ValueError, match="device: got 'tpu9', which torch cannot use"): measure()


def test_broken_maps_leave_the_score_of_masks_and_are_counted(model, seen, monkeypatch):
    x, _, masks = seen
    found = evaluation.score_masks(model, TensorDataset(x, masks))
    assert found["broken_maps"] == 0
    def some(maps, *more):
        scores = mask_jaccard(maps, *more)
        scores[0], scores[1, 0] = NAN, NAN                               # one picture, and a map of another
        return scores
    monkeypatch.setattr(evaluation, "mask_jaccard", some)
    broken = evaluation.score_masks(model, TensorDataset(x, masks))
    assert (broken["mask_pairs"], broken["broken_maps"]) == (found["mask_pairs"] - 1, 1 + 3)
    assert 0 < broken["jaccard_mean_head"] <= broken["jaccard_best_head"] < 1


def test_score_masks_says_that_there_is_nothing_to_score(model, seen):
    x, _, masks = seen
    with pytest.raises(ValueError, match="pairs: got none"): evaluation.score_masks(model, TensorDataset(x[:0], masks[:0]))
    with pytest.raises(ValueError, match="none of the 2 masks has a pixel"): evaluation.score_masks(model, TensorDataset(x[:2], masks[:2] & False))


def test_a_loader_that_shuffles_or_is_a_list_is_refused(model, seen):
    x, y, _ = seen
    pictures = TensorDataset(x, y)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="another one the second time"): occlusion_curves(model, DataLoader(pictures, 4, shuffle=True), (0., .5))
    for measure in (occlusion_curves, partial(corruption_accuracy, mean=(.5,)*3, std=(.5,)*3)):
        with pytest.raises(TypeError, match="got a list, expected a DataLoader"): measure(model, [(x, y)])


def test_several_sentences_of_one_box_are_no_chance_level():
    "As RefCOCO has them, one after the other: the level is that of each box once."
    boxes = torch.rand(20, 2, generator=torch.Generator().manual_seed(0))*.6
    truths = [grounding.as_truth([*b, *(b + .4)]) for b in boxes.tolist() for b in [np.array(b)]]
    level = lambda order: [grounding.Judge(2), [truths[i] for i in order]]
    def chance(order):
        judge, sequence = level(order)
        return torch.stack([judge(t.on_grid((10, 10))[None], t)["iou_chance"] for t in sequence])
    once, thrice = chance(range(20)), chance([i for i in range(20) for _ in range(3)])
    assert_close(thrice[::3], once, equal_nan=True)
    assert_close(thrice[5::3], once[1:], equal_nan=True)


def test_the_first_sentences_of_one_box_have_the_next_box_as_their_chance():
    maps = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))/16
    one, other = grounding.as_truth([0, 0, .5, .5]), grounding.as_truth([.5, 0, 1, .5])
    truths = [one, one, one, other, one]
    wrong = [other, other, other, one, other]
    rows = rank_seen([Seen({0: m}, t) for m, t in zip(maps, truths)], shifts=1)
    for row in rows:
        for name in grounding.SCORES:
            for column, judged in ((name, truths), (f"{name}_chance", wrong)):
                want = [grounding.score_grounding(m, t)[name][row["head"]] for m, t in zip(maps, judged)]
                assert row[column] == pytest.approx(np.mean(want))


def test_truths_are_the_same_by_boxes_and_mask():
    box, mask = torch.tensor([[0, 0, .5, .5]]), torch.eye(4).bool()
    a, b = grounding.Truth(box), grounding.Truth(box.double())
    assert grounding.same_truth(a, b) and not grounding.same_truth(a, grounding.Truth(None, mask))
    assert grounding.same_truth(grounding.Truth(None, mask), grounding.Truth(None, mask.clone()))
    assert not grounding.same_truth(a, grounding.Truth(box.repeat(2, 1)))


@pytest.mark.parametrize("frame", (grounding.WHOLE, (0., -.5, 1., 1.5), (.25, 0, .75, 1)))
def test_shares_of_a_mask_are_exact(frame):
    mask = torch.zeros(639, 481, dtype=torch.bool)
    mask[100:401, 200:202] = True                                        # two pixels wide
    (x0, y0, x1, y1), grid = frame, (14, 13)
    whole = grounding.mask_on_grid(mask, grid, frame).mean().item()*(x1 - x0)*(y1 - y0)
    assert whole == pytest.approx(mask.double().mean().item(), rel=1e-9)
    on, off = grounding.Truth(None, mask, frame, torch.zeros_like(mask)).parts(grid)
    if frame != (0., -.5, 1., 1.5): assert off.abs().max() == 0           # all of it is void or object


@pytest.mark.parametrize("d", ([-70.07, -20.1, 70.07, 20.1], [.1, .2, -.3], [1e6, -1e6, 1e-9, 1e-9]))
def test_equal_sums_of_flips_count_as_equal(d):
    from fractions import Fraction
    from itertools import product
    exact = [Fraction(str(v)) for v in d]
    sums = [abs(sum(s*v for s, v in zip(signs, exact))) for signs in product((1, -1), repeat=len(d))]
    if d[0] < 1e5: assert intervals.sign_flip_test(d) == np.mean([s >= abs(sum(exact)) for s in sums])
    else: assert intervals.sign_flip_test(d) == 1                         # its sum is rounding beside its numbers


def test_flips_and_quantiles_of_many():
    stats = pytest.importorskip("scipy.stats")
    drawn = np.random.default_rng(3).choice((1., -1.), (10_000, 700))     # as they were drawn at once
    assert np.array_equal(np.concatenate([*intervals._flips(700, 3, 10_000)])[1:], drawn)
    assert max(len(part) for part in intervals._flips(10**5, 0, 10**6)) == 10
    for df in (3, 600, 700, 10**4, 10**5, 10**6, 10**8):
        for p in (.75, .975, .9995): assert intervals.t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-6)


@pytest.mark.parametrize("values", (np.full((3, 4), NAN), [[1, 2], [1, float("inf")]]))
def test_no_interval_of_what_has_no_mean(values):
    with pytest.raises(ValueError, match="values: got"): intervals.bootstrap_both(values)


def test_what_is_drawn_cannot_be_spoilt_and_its_memory_is_bounded():
    d = shapes(3)
    for array in (d.images, d.masks):
        with pytest.raises(ValueError, match="read-only"): array[0] = 0
    assert d.masks[0].any()
    for size in (8, 64, 512):
        kept = _drawer(size).cache_info().maxsize
        assert kept >= 1 and kept*4*size**2 <= 2**30


@pytest.mark.filterwarnings("error")
def test_what_is_drawn_can_be_shown_and_judged_by():
    "Without a warning that torch cannot write to it."
    d = shapes(2, "val", 16)
    show_maps(d.masks)
    assert torch.equal(grounding.as_truth(d.masks[0]).mask, torch.tensor(d.masks[0]))
    assert overlay(d.images[0], d.masks[0]).shape == (16, 16, 3)


def test_wide_models_want_their_own_size():
    import timm
    wide = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), depth=1, embed_dim=12, num_heads=3, num_classes=2)
    y = torch.zeros(2).long()
    assert evaluation.accuracy(wide, [(torch.randn(2, 3, 64, 32), y)]) >= 0
    with pytest.raises(RuntimeError) as e: evaluation.accuracy(wide, [(torch.zeros(2, 3, 64, 32).byte(), y)])
    assert not isinstance(e.value, evaluation.WrongSize)
    with pytest.raises(evaluation.WrongSize, match="are 32×32, the model wants 32×64"): evaluation.accuracy(wide, [(torch.randn(2, 3, 32, 32), y)])


def test_json_has_no_nan(tmp_path):
    no_nan = partial(json.loads, parse_constant=lambda found: pytest.fail(f"{found} is no JSON"))
    scores = score_maps(torch.randn(4, 1, 5, 5), torch.rand(4, 10, 10) > .5, valid=None)
    scores.own["pixel_auc"][:] = NAN
    scores.to_json(tmp_path/"scores.json", share=NAN)
    write_json(tmp_path/"value.json", dict(a=NAN, b=[-float("inf"), 1]))
    assert no_nan((tmp_path/"scores.json").read_text())["share"] is None
    assert no_nan((tmp_path/"value.json").read_text()) == dict(a=None, b=[None, 1])


def test_a_table_of_shares_is_not_read_as_pixels(tmp_path):
    table = tmp_path/"boxes.csv"
    table.write_text("file,x0,y0,x1,y1\na.png,.1,.2,.5,.6\nb.png,0,0,1,1\n")
    with pytest.raises(ValueError, match="expected pixels: multiply x"): read_boxes(table)
    table.write_text("file,x0,y0,x1,y1\na.png,.5,.5,9,9\nb.png,0,0,1,1\n")
    assert len(read_boxes(table)) == 2


@pytest.mark.parametrize("record", (dict(image=5, expression="a"), dict(image="a.png", expressions=[]), dict(image="a.png", expression="a", mask=3), 7))
def test_records_that_say_nothing_are_refused(tmp_path, record):
    (tmp_path/"r.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="record 0 is .*, expected a dictionary"): grounding.read_records(tmp_path/"r.json")


def test_a_line_of_records_ends_where_json_says(tmp_path):
    record = dict(image="a.png", expression="the cup\u2028left", box=[0, 0, 1, 1])
    (tmp_path/"r.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [r["expression"] for r in grounding.read_records(tmp_path/"r.jsonl")] == [record["expression"]]


def test_pictures_of_short_floats_and_no_maps():
    picture, map_ = torch.rand(3, 8, 8), torch.rand(4, 4)
    assert np.abs(overlay(picture.bfloat16(), map_.bfloat16()) - overlay(picture, map_)).max() < .02
    with pytest.raises(ValueError, match=r"maps: got shape \(0, 4, 4\), expected"): show_maps(torch.rand(0, 4, 4))


def test_infinite_cells_have_no_score_and_leave_every_mean():
    torch.manual_seed(0)
    maps, masks = torch.randn(8, 2, 7, 7), torch.zeros(8, 14, 14, dtype=torch.bool)
    masks[:, 4:10, 4:10] = True
    for value in (torch.inf, -torch.inf):
        broken = maps.clone()
        broken[:2, :, 3, 3] = value
        for score in (mask_jaccard, *(getattr(objects, name) for name in ("pixel_auc", "pixel_ap", "pointing", "energy_pointing", "grid_jaccard"))):
            assert score(broken, masks)[:2].isnan().all() and torch.equal(score(broken, masks)[2:], score(maps, masks)[2:])
        for line in score_maps(broken, masks, surrogates=0, shifts=1).summary(): assert line["above_chance"]["n"] == 6


def test_thresholds_are_those_that_are_said():
    m, box = torch.zeros(5, 5), torch.tensor([[.2, .2, .6, .6]])
    m[1:3, 1:3], m[1, 1] = 51, 255
    assert_close(objects.boxes_of(m, .2), box.double(), atol=1e-6, rtol=0)
    assert objects.best_overlaps(m, box, [.2]).item() == pytest.approx(1, abs=1e-5)
    assert objects.as_thresholds([.1]).item() == .1
    three, rest = torch.tensor([[0., 20, 100]]), torch.tensor([[1/3, 0., 1., 1.]])
    scored = score_boxes(three.expand(2, 1, 1, 3), [rest]*2)           # by hundredths
    assert scored.right[0, 0, 2].nonzero()[:, 0].tolist() == [*range(1, 21)]


def test_seeds_without_a_number_do_not_pull_an_interval_to_zero():
    values = .7 + .05*np.random.default_rng(0).standard_normal((3, 50))
    gone = values.copy()
    gone[1], gone[:, 7] = NAN, NAN
    found, of_two = intervals.bootstrap_both(gone), intervals.bootstrap_both(np.delete(values[[0, 2]], 7, 1))
    assert found == of_two and found.n == 2 and .65 < found.low < found.high < .75
    sparse = np.full((2, 50), NAN)
    sparse[0, 0], sparse[1, 1] = .7, .8                               # many a draw has neither
    assert .7 <= intervals.bootstrap_both(sparse).low
    with pytest.raises(ValueError, match=r"numbers of 1 seed\(s\) and 50 picture\(s\), expected two"):
        intervals.bootstrap_both([values[0], [NAN]*50])


def test_scores_of_maps_in_a_graph_can_be_printed(tmp_path):
    maps, masks = torch.randn(4, 2, 5, 5, requires_grad=True), torch.rand(4, 10, 10) > .5
    found = score_maps(maps, masks, surrogates=1, shifts=1)
    assert "pixel_auc" in repr(found) and found.summary()
    found.to_json(tmp_path/"scores.json")
    values = objects.pixel_auc(maps, masks)[:, 0].detach() + maps.sum()*0
    assert intervals.bootstrap(values) == intervals.bootstrap(values.detach()) and intervals.paired(values, values)


def test_boxes_that_are_none_are_named_before_a_model_runs(model, seen):
    x, good = seen[0], torch.tensor([[.1, .1, .6, .6]])
    odd, batches = torch.tensor([[.1, .1, .2, .2], [.5, .5, .4, .6]]), []
    def counted(found):
        for one in found:
            batches.append(1)
            yield one

    score = lambda boxes, **more: se.score_box_pairs(model, [*zip(x, boxes)], batch_size=4, progress=counted, **more)
    with pytest.raises(ValueError, match=r"boxes: got \[0.5, 0.5, 0.4.*\] for picture 2, expected x0 < x1"): score([good, good, odd, *[good]*5])
    with pytest.raises(ValueError, match="thresholds: got"): score([good]*8, thresholds=[50, 60])
    assert not batches
    with pytest.raises(ValueError, match="for picture 6, expected"): score([*[good]*6, torch.zeros(0, 4), good])
    with pytest.raises(ValueError, match=r"boxes: got \[0.5, 0.5, 0.4"): score_boxes(torch.rand(2, 1, 4, 4), [good, odd])


def test_extremes_of_wide_pictures_lie_on_their_axes():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), patch_size=8, embed_dim=24, depth=1, num_heads=2)
    masks = torch.zeros(4, 32, 64, dtype=torch.bool)
    masks[:, 16:24, 32:48] = True
    pairs = TensorDataset(torch.randn(4, 3, 32, 64), masks)
    axes = draw_extremes(vit, pairs, se.score_objects(vit, pairs, surrogates=0), n=1).axes[1]
    assert axes.images[0].get_extent() == [0, 64, 32, 0] and axes.get_xlim() == (0, 64) and axes.get_ylim() == (32, 0)
    line = axes.collections[0].get_paths()[0].vertices
    assert line.min(0).tolist() == [32, 16] and line.max(0).tolist() == [48, 24]
