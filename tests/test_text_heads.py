"""The pipeline over the heads of vision-language models, against plain numpy and scipy: eager attention, loops over heads, sets of cells."""
import copy
import csv
import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch.testing import assert_close
from zoo_language import IMAGE, SPECS, made, noise

import spatial_entropy as se
from spatial_entropy.analysis import grounding
from spatial_entropy.analysis.grounding import as_shares, as_truth, box_around, main_region, read_records, score_grounding
from spatial_entropy.analysis.heads import Heads
from spatial_entropy.attention.queries import Phrase, checked_query, find_phrase
from spatial_entropy.language.demo import demo_language_model, inputs_of, questions
from spatial_entropy.language.heads import looks, rank_seen
from spatial_entropy.language.locating import LocatedTable, best_heads, combined, locate_seen, located_table
from spatial_entropy.language.samples import Seen, as_sample, frame_of

pytestmark = pytest.mark.filterwarnings("ignore:spatial_entropy. got maps with NaN", "ignore:layer.* the tokens that ask do not see")
LLAVA, NAN = SPECS[0], float("nan")
EIGHT = np.ones((3, 3))


# ---- the oracle: one map, one head, one sample at a time -------------------------------------------------------------------------

def entropy_of(a, variant):
    excess = np.maximum(a - a.mean(), 0)
    counted = np.where(excess > 1e-3, excess, 0)
    if variant == "paper" and not counted.any() or not excess.any(): return math.inf
    labels, n = ndimage.label(counted > 0, EIGHT)
    whole = counted.sum() if variant == "paper" else excess.sum()
    P = [counted[labels == k].sum() / whole for k in range(1, n + 1)]
    return -sum(p * math.log(p) for p in P)


def elbow_of(sums):
    """The number of the point that lies furthest, perpendicularly, from the line between first and last."""
    order = np.argsort(sums, kind="stable")
    points = np.stack([np.linspace(0, 1, len(sums)), (sums[order] - sums.min()) / (np.ptp(sums) or 1)], 1)
    line = np.linspace(points[0], points[-1], 20001)
    return order[cdist(points, line).min(1).argmax()]


def ranked_by_hand(samples, variant, top):
    """{(layer, head): share of the samples that select it} of [{layer: (H, h, w)}]."""
    counts = {}
    for maps in samples:
        flat = {(layer, h): a for layer, m in maps.items() for h, a in enumerate(m)}
        sums, E = np.array([a.sum() for a in flat.values()]), [entropy_of(a, variant) for a in flat.values()]
        at = elbow_of(sums)
        passed = [s >= sums[at] if variant == "paper" else i >= at for i, s in enumerate(sums)]
        kept = [i for i in sorted(range(len(E)), key=lambda i: E[i]) if passed[i] and math.isfinite(E[i])][:top]
        for i, head in enumerate(flat): counts.setdefault(head, []).append((i in kept, E[i], sums[i], passed[i]))
    return counts


def eager_maps(model, inputs, grid, at=-1):
    """{layer: (H, h, w)} of the row of one token, by transformers' own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(): tables = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    places = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    return {i: t[0, :, at, places].double().unflatten(-1, grid).numpy() for i, t in enumerate(tables)}


@pytest.mark.parametrize("variant", ["paper", "as_released"])
def test_the_pipeline_is_that_of_plain_loops_over_eager_attention(variant):
    model, samples = made(LLAVA), [LLAVA.given(seed) for seed in range(6)]
    want = ranked_by_hand([eager_maps(model, s, (4, 4)) for s in samples], variant, 2)
    ranked = se.rank_text_heads(model, samples, variant=variant, top=2)
    assert len(ranked) == len(want) == 8 and any(row["selected"] not in (0, 1) for row in ranked)
    for (layer, head), each in want.items():
        row, (chosen, E, sums, passed) = ranked[layer, head], zip(*each)
        finite = [e for e in E if math.isfinite(e)]
        assert row["selected"] == np.mean(chosen) and row["passed"] == np.mean(passed) and row["images"] == 6
        assert row["attention"] == pytest.approx(np.mean(sums), abs=1e-6) and row["empty"] == np.mean(np.isinf(E))
        assert row["entropy"] == pytest.approx(np.mean(finite) if finite else NAN, abs=1e-4, nan_ok=True)
    assert [r["selected"] for r in ranked] == sorted((r["selected"] for r in ranked), reverse=True)


@pytest.mark.parametrize("name", ["Qwen2_5", "gemma3", "smolvlm", "paligemma"])
def test_other_grids_and_layers(name):
    spec = next(s for s in SPECS if name in s.name)
    model, samples = made(spec), [spec.given(seed) for seed in range(2)]
    ranked = se.rank_text_heads(model, samples, view=spec.view, surrogates=0)
    assert len(ranked) == 8 and "entropy_chance" not in ranked[0] and all(r["images"] == 2 for r in ranked)
    for found in se.locate(model, samples, [(1, 2)], view=spec.view): assert found.map.shape == spec.grid


def test_a_batch_is_its_prompts_and_the_size_of_batches_means_nothing():
    model, singles = made(LLAVA), [LLAVA.given(seed) for seed in range(4)]
    batch = {k: torch.cat([s[k] for s in singles]) for k in singles[0]}
    boxes = [[0, 0, .5, .5], None, [.25, .25, 1, 1], [.5, 0, 1, .25]]
    one = se.rank_text_heads(model, [(s, [b]) for s, b in zip(singles, boxes)])
    two = se.rank_text_heads(model, iter([(batch, boxes)]))
    for row in one:
        for k, v in two[row["block"], row["head"]].items():
            assert v == (pytest.approx(row[k], abs=1e-4, nan_ok=True) if isinstance(v, float) else row[k]), k


def test_prompts_of_other_grids_in_one_batch():
    spec = next(s for s in SPECS if "Qwen2_5" in s.name)
    from test_language import padded
    wide, tall = spec.given(), spec.given(picture=noise((96, 64)))
    grids = [seen.stacked.shape for seen in se.text_maps(made(spec), [padded(wide, tall)])]
    assert grids == [(8, 4, 6), (8, 6, 4)]


def test_one_of_several_pictures_must_be_named():
    model, inputs = made(LLAVA), LLAVA.given()
    ids = torch.tensor([[1, *[IMAGE] * 16, 3, *[IMAGE] * 16, 5, 6]])
    both = dict(input_ids=ids, pixel_values=torch.cat([inputs["pixel_values"], LLAVA.given(1)["pixel_values"]]))
    with pytest.raises(ValueError, match="got None, expected one of 'image 0', 'image 1'"): se.rank_text_heads(model, [both])
    first, second = (next(se.text_maps(model, [both], view=v)).stacked for v in (0, 1))
    assert_close(first.sum((1, 2)) + second.sum((1, 2)), sum_of_row(model, both))
    assert not torch.equal(first, second)


def sum_of_row(model, inputs):
    n = int((inputs["input_ids"] == IMAGE).sum())
    return torch.tensor(np.concatenate([m.sum((1, 2)) for m in eager_maps(model, inputs, (1, n)).values()])).float()


def test_generated_tokens_ask_together():
    model, inputs = made(LLAVA), LLAVA.given()
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
    whole = dict(input_ids=said[:, :-1], pixel_values=inputs["pixel_values"])
    n = inputs["input_ids"].shape[1]
    want = [eager_maps(model, whole, (4, 4), at) for at in range(n - 1, said.shape[1] - 1)]
    model.generation_config.suppress_tokens = [IMAGE]
    try: [seen] = se.text_maps(model, [inputs], query="generated", new_tokens=4)
    finally: model.generation_config.suppress_tokens = None
    for layer, m in seen.maps.items():
        assert_close(m.double().numpy(), np.mean([w[layer] for w in want], 0), atol=1e-5, rtol=0)


def test_what_comes_after_the_end_of_a_prompt_is_not_averaged():
    model, processor = demo_language_model()
    asked, model.generation_config.eos_token_id = questions(2), [2, 17]                # 17: the first answer, a token before the second ends
    both = list(se.text_maps(model, [inputs_of(processor, asked)], query="generated", layers=2))
    for one, seen in zip(asked, both, strict=True):
        [alone] = se.text_maps(model, [inputs_of(processor, [one])], query="generated", layers=2)
        assert_close(seen.maps[2], alone.maps[2], atol=1e-5, rtol=0)


# ---- samples --------------------------------------------------------------------------------------------------------------------

def processor_of(size=32, crop=True, **more):
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = "<pad> <s> </s> where is the red mug ? <image> blue square".split()       # <image> is 9, as in the zoo
    assert words[IMAGE] == "<image>"
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = t.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", additional_special_tokens=["<image>"])
    eye = t.CLIPImageProcessor(size=dict(shortest_edge=size) if crop else dict(height=size, width=size), do_center_crop=crop,
                               crop_size=dict(height=size, width=size))
    return t.LlavaProcessor(eye, tokens, patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default", **more)


TEMPLATE = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
            "{% endfor %}")


def picture_of(size=(96, 64), seed=0):
    return Image.fromarray((noise(size[::-1], seed).permute(1, 2, 0).numpy() * 255).astype("uint8"))


def test_a_record_is_what_the_processor_makes_of_it():
    model, processor, picture = made(LLAVA), processor_of(), picture_of()
    record = dict(image=picture, expression="the red mug", box=[16, 0, 64, 64])
    inputs = processor(images=picture, text="<image>\nwhere is the red mug ?", return_tensors="pt")
    [seen] = se.text_maps(model, [record], processor, prompt="where is {} ?")
    [plain] = se.text_maps(model, [inputs])
    assert_close(seen.stacked, plain.stacked)
    assert seen.frame == pytest.approx((1 / 6, 0, 5 / 6, 1))                     # the middle 64 of 96
    assert_close(seen.truth.inside, torch.tensor([[0, 0, 1, 1.]]).double())
    [phrase] = se.text_maps(model, [record], processor, "expression", prompt="where is {} ?")
    [spot] = se.text_maps(model, [inputs], query=[-4, -3, -2])
    assert_close(phrase.stacked, spot.stacked)
    templated = processor_of(chat_template=TEMPLATE)
    [again] = se.text_maps(model, [record], templated, prompt="where is {} ?")
    assert_close(again.stacked, plain.stacked)


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (200, 33)])
@pytest.mark.parametrize("how", [dict(), dict(crop=False), dict(size=40)])
def test_the_frame_is_what_the_processor_shows(size, how):
    eye, (w, h) = processor_of(**how).image_processor, size
    if how.get("size") == 40: eye.crop_size = dict(height=32, width=32)
    check_frame(eye, w, h)


@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_the_frame_of_a_processor_that_squeezes_and_cuts(size):
    eye = processor_of().image_processor
    eye.size = dict(height=48, width=40)
    check_frame(eye, *size)
    eye.do_resize = False
    check_frame(eye, *size)


def test_the_frame_of_a_processor_that_pads():
    import transformers as t
    eye = t.LlavaImageProcessor(do_pad=True, size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    assert frame_of(eye, (96, 64)) == pytest.approx((0, -.25, 1, 1.25))
    out = eye(Image.new("RGB", (96, 64), "white"), do_normalize=False, return_tensors="pt")["pixel_values"][0, 0]
    assert out[16].min() > .9 and out[0].max() < .6 and out[-1].max() < .6         # a third of it is padding


EYES = {"LlavaImageProcessor": dict(do_pad=True), "CLIPImageProcessor": {}, "SiglipImageProcessor": {}, "JanusImageProcessor": {},
        "DeepseekVLImageProcessor": {}, "Gemma3ImageProcessor": {}, "PixtralImageProcessor": {}, "GotOcr2ImageProcessor": {},
        "Idefics3ImageProcessor": dict(do_image_splitting=False),
        "LlavaNextImageProcessor": {}, "LlavaOnevisionImageProcessor": {}, "Cohere2VisionImageProcessor": dict(crop_to_patches=False)}


@pytest.mark.parametrize("size", [(300, 150), (150, 300)])
@pytest.mark.parametrize("name", EYES)
def test_the_frame_of_every_family(name, size):
    """A bright spot of the picture must lie where the frame says that the processor shows it."""
    transformers, (w, h), spot = pytest.importorskip("transformers"), size, (.7, .3)
    if not hasattr(transformers, name): pytest.skip(f"this transformers has no {name}")
    eye, picture = getattr(transformers, name)(**EYES[name]), np.zeros((h, w, 3), np.uint8)
    top, bottom, left, right = (int((at + by)*side) for at, side in ((spot[1], h), (spot[0], w)) for by in (-.06, .06))
    picture[top:bottom, left:right] = 255
    out = eye([Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
    out = out if isinstance(out, torch.Tensor) else out[0]
    while out.ndim > 3: out = out[0]                                                   # the whole picture is the first of its tiles
    grey = out.float().mean(0)
    y, x = (grey > (grey.max() + grey.min())/2).nonzero().float().add(.5).mean(0).tolist()
    x0, y0, x1, y1 = frame_of(eye, size)
    assert (x0 + x/grey.shape[1]*(x1 - x0), y0 + y/grey.shape[0]*(y1 - y0)) == pytest.approx(spot, abs=.02)


def check_frame(eye, w, h):
    """Red grows to the right and green downwards; at the middle of each quarter they must say where it is."""
    x, y = np.meshgrid((np.arange(w) + .5) / w, (np.arange(h) + .5) / h)
    ramp = Image.fromarray((np.stack([x, y, 0 * x], -1) * 255).round().astype("uint8"))
    out = eye(ramp, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    x0, y0, x1, y1 = frame_of(eye, (w, h))
    for part in (.25, .5, .75):
        at = part * out.shape[-1]
        found = out[:, int(at) - 1:int(at) + 1, int(at) - 1:int(at) + 1].mean((1, 2))
        assert_close(found[:2], torch.tensor([x0 + part * (x1 - x0), y0 + part * (y1 - y0)]).float(), atol=.02, rtol=0)


def test_what_is_no_sample_is_said():
    model, inputs, picture = made(LLAVA), LLAVA.given(), picture_of()
    mistakes = [
        (TypeError, "number 0 is str, expected what a processor returned", ["mug.png"], {}),
        (ValueError, "pass processor=", [dict(image=picture, expression="the red mug")], {}),
        (ValueError, "has 1 prompt.s. and 2 truths", [(inputs, [None, None])], {}),
        (ValueError, "inside of it; the other form is form='xyxy'", [dict(image=picture, expression="mug", box=[50, 50, 90, 60])],
         dict(processor=processor_of())),
        (OSError, "nowhere.png", [dict(image="nowhere.png", expression="mug")], dict(processor=processor_of())),
        (ValueError, "is 0 times in the prompt", [dict(image=picture, expression="mug")], dict(processor=processor_of(), query="blue")),
        (ValueError, "samples: got none", [], {}),
        (ValueError, "top: got 0", [inputs], dict(top=0)),
        (ValueError, "variant: got 'mine'", [inputs], dict(variant="mine")),
        (ValueError, "expected one of block, head, selected", [inputs], dict(by="beauty")),
        (TypeError, "unexpected keyword argument 'layer'", [inputs], dict(layer=1)),
    ]
    for error, said, samples, more in mistakes:
        with pytest.raises(error, match=said) as e: se.rank_text_heads(model, samples, **more)
        assert "\n" not in str(e.value), said


def test_the_model_is_given_back_as_it_was_though_a_sample_fails():
    model, inputs = made(LLAVA), LLAVA.given()
    model.train()
    model.model.vision_tower.eval()
    was = [m.training for m in model.modules()]
    try:
        with pytest.raises(ValueError, match="no image token"): list(se.text_maps(model, [inputs, dict(input_ids=torch.tensor([[1, 2]]))]))
        assert [m.training for m in model.modules()] == was and not model.model._forward_hooks
        [a], [b] = (list(se.text_maps(model, [inputs])) for _ in range(2))
        assert torch.equal(a.stacked, b.stacked) and not a.stacked.requires_grad
    finally:
        model.eval()


def test_bad_records_are_left_out_and_said(tmp_path):
    """A box outside of its picture, and a picture that is not there, among good ones; an error where there is nothing else."""
    model, picture = made(LLAVA), picture_of()
    record = dict(image=picture, expression="mug", box=[1, 1, 9, 9])
    bad = [record | dict(box=[900, 1, 9, 9]), record | dict(image=str(tmp_path / "nowhere.png"))]
    with pytest.warns(UserWarning, match="2 of 4 records were left out; the first is number 1: box: got"):
        ranked = se.rank_text_heads(model, [record, *bad, record | dict(box=[9, 9, 9, 9])], processor_of(), surrogates=0)
    assert ranked[0]["images"] == 2
    with pytest.raises(ValueError, match="box: got"): se.rank_text_heads(model, bad, processor_of())
    seen = []
    with pytest.raises(ValueError, match="box: got"): list(se.text_maps(model, (seen.append(i) or bad[0] for i in range(99)), processor_of()))
    assert len(seen) == 10


def test_the_expression_is_that_of_the_template():
    """The template has the same word; what is asked is what stands in its braces."""
    record = dict(image=picture_of(), expression="the")
    sample = as_sample(record, 0, processor_of(), "Where is the {} ?", "expression")
    assert sample.query == Phrase("the", "Where is the ", " ?") and as_sample(record, 0, processor_of(), "Where?", "expression").query == "the"
    words = ["Where", " is", " the", " the", " ?"]
    assert find_phrase(sample.query, words) == [3]
    with pytest.raises(ValueError, match="is 2 times"): find_phrase("the", words)
    last = as_sample(record | dict(expression="last"), 0, processor_of(), "Where is the {} ?", "expression").query
    assert checked_query(last, processor_of()) == last != "last"


def test_whole_words_come_first():
    words = ["a", " man", " and", " a", " human", " in", " 12", " of", " 120", "猫", "が"]
    assert find_phrase("man", words) == [1] and find_phrase("12", words) == [6] and find_phrase("猫", words) == [9]
    with pytest.warns(UserWarning, match="'hum' is no word of the prompt, only part of one"): assert find_phrase("hum", words) == [4]


def test_a_column_is_refused_before_the_first_sample():
    model, seen = made(LLAVA), []
    for by, more in (("iou_", {}), ("looks_at", {}), ("jaccard", {}), ("below_chance", dict(surrogates=0))):
        with pytest.raises(ValueError, match=f"by: got '{by}'.* expected one of block, head, selected"):
            se.rank_text_heads(model, (seen.append(1) for _ in range(3)), by=by, **more)
    assert not seen
    with pytest.warns(UserWarning, match="by: got 'iou', but no sample had a truth"): ranked = se.rank_text_heads(model, [LLAVA.given()], by="iou")
    assert ranked.by == "selected"


def test_the_order_of_layers_changes_nothing():
    model, samples = made(LLAVA), [LLAVA.given(seed) for seed in range(2)]
    found = [se.rank_text_heads(model, samples, layers=layers, variant="as_released", surrogates=0, top=3) for layers in ([0, 1], [1, 0])]
    assert found[0].table() == found[1].table()
    with pytest.raises(ValueError, match="names a layer twice"): se.TextImageTap(model, layers=[0, -len(made(LLAVA).model.language_model.layers)])


def test_a_table_of_samples_with_and_without_truth(tmp_path):
    rows = [dict(name="a", x0=.1), dict(name="b", x0=.2, iou=.5, iou_chance=.1), dict(name="c", x0=.3)]
    for order in (rows, rows[::-1]):
        table = LocatedTable(order)
        assert all(list(row) == list(table.rows[0]) for row in table) and str(table).count("0.500") == 1
        table.to_csv(tmp_path / "t.csv")
        read = list(csv.DictReader((tmp_path / "t.csv").open()))
        assert sorted((r["name"], r["iou"]) for r in read) == [("a", "nan"), ("b", "0.5"), ("c", "nan")]


def test_heads_below_zero_are_refused():
    model, seen = made(LLAVA), []
    for heads in ([(0, -1)], [(-1, 0)]):
        with pytest.raises(ValueError, match="heads: got .*counted from 0"): list(se.locate(model, (seen.append(1) for _ in range(3)), heads))
    assert not seen


def test_one_of_several_models_must_be_passed():
    model = made(LLAVA)
    both = torch.nn.ModuleDict(dict(teacher=copy.deepcopy(model), student=model))
    with pytest.raises(se.UnsupportedModel, match="several vision-language models .teacher.model, student.model.; pass the one"): se.TextImageTap(both)
    with se.TextImageTap(torch.nn.ModuleDict(dict(student=model))) as tap: assert tap.host is model.model


def test_samples_are_not_kept():
    model, alive = made(LLAVA), []

    def stream():
        for seed in range(6):
            gc.collect()
            assert sum(r() is not None for r in alive) <= 2
            inputs = LLAVA.given(seed)
            alive.append(weakref.ref(inputs["pixel_values"]))
            yield inputs
            del inputs
    se.rank_text_heads(model, stream())
    alive.clear()
    assert len(located_table(se.locate(model, stream(), [(0, 0)]))) == 6


def test_progress_wraps_the_samples():
    seen = []

    def noted(samples):
        for s in samples:
            seen.append(s)
            yield s
    model, samples = made(LLAVA), [LLAVA.given(seed) for seed in range(3)]
    se.rank_text_heads(model, samples, progress=noted, surrogates=0)
    assert len(seen) == 3 and seen[0] is samples[0]
    assert len(list(se.locate(model, samples, progress=noted))) == 3 and len(seen) == 6


# ---- degenerate maps --------------------------------------------------------------------------------------------------------------

def flat(value=.01): return torch.full((4, 4), value)


def dot(y, x, total=.5, n=4):
    a = torch.zeros(n, n)
    a[y, x] = total
    return a


def test_equal_maps_one_cell_and_nan():
    maps = torch.stack([flat(), flat(0), dot(0, 3), dot(1, 2), torch.full((4, 4), NAN), dot(2, 2) + flat()])
    samples = [Seen({0: maps[:3], 5: maps[3:]}, as_truth([.5, .25, .75, .5])) for _ in range(3)]
    ranked = rank_seen(samples, top=6)
    named = {(r["block"], r["head"]): r["looks_at"] for r in ranked}
    assert named == {(0, 0): "", (0, 1): "", (0, 2): "border cell, same cell", (5, 0): "same cell", (5, 1): "", (5, 2): "same cell"}
    assert ranked[0, 0]["empty"] == ranked[0, 1]["empty"] == 1 and math.isnan(ranked[0, 0]["entropy"])
    assert ranked[5, 1]["broken"] == 3 and ranked[5, 1]["images"] == 0 and math.isnan(ranked[5, 1]["pointing"])
    assert ranked[5, 0]["pointing"] == 1 and ranked[5, 0]["iou"] == 1 and ranked[0, 2]["iou"] == 0
    assert ranked[0, 0]["pointing"] == pytest.approx(1 / 16) and ranked[0, 0]["iou"] == 0
    for row in ranked: assert not (row["selected"] == 1 and row["empty"])
    with pytest.raises(ValueError, match="all maps of all 1 have NaN"): rank_seen([Seen({0: torch.full((2, 4, 4), NAN)})])
    with pytest.raises(ValueError, match="got a NaN or infinite cell"): list(locate_seen(samples, [(5, 1)]))
    with pytest.raises(ValueError, match="none of 6 is left"): best_heads(Heads([r | dict(looks_at="border cell") for r in ranked], "entropy"))
    nothing = list(locate_seen([Seen({0: torch.zeros(2, 4, 4)}, as_truth([0, 0, .5, .5]))]))[0]
    assert nothing.heads == [] and nothing.box.isnan().all() and nothing.scores["iou"] == 0 and nothing.scores["pointing"] == 4 / 16


def test_places_are_those_of_plain_loops():
    torch.manual_seed(0)
    maps = torch.rand(40, 5, 7) + .2
    maps[:12] += torch.eye(35)[torch.randint(35, (12,))].view(-1, 5, 7) * 9
    maps = maps / maps.sum((1, 2), keepdim=True) * .8
    found = looks(maps)
    for i, a in enumerate(maps.numpy()):
        y, x = np.unravel_index(a.argmax(), a.shape)
        one = a.max() >= a.sum() / 2
        assert found["one_cell"][i] == one and found["border"][i] == (one and (y in (0, 4) or x in (0, 6)))
    sink = maps.clone()
    sink[:30, 2, 3] += 1
    sink = sink / sink.sum((1, 2), keepdim=True)
    assert torch.equal(looks(sink)["sink"], sink[:, 2, 3] >= .5) and looks(sink)["sink"].sum() == 30


def test_a_single_sample_has_no_cell_that_is_the_same():
    row = rank_seen([Seen({0: torch.stack([dot(1, 1), flat(), dot(2, 2) + flat()])})])[0, 0]
    assert math.isnan(row["same_cell"]) and row["looks_at"] == ""


def test_chance_of_arranged_and_of_shuffled_maps():
    draw = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.), torch.arange(16.), indexing="ij")
    blob = torch.exp(-((y - 8)**2 + (x - 8)**2) / 20)
    white = blob.flatten()[torch.randperm(256, generator=draw)].view(16, 16)
    maps = torch.stack([blob, white])
    maps = maps / maps.sum((1, 2), keepdim=True)
    ranked = rank_seen([Seen({0: maps}) for _ in range(10)], surrogates=4)
    assert ranked[0, 0]["below_chance"] > .3 and abs(ranked[0, 1]["below_chance"]) < .5
    assert ranked[0, 0]["below_chance"] == pytest.approx(ranked[0, 0]["entropy_chance"] - ranked[0, 0]["entropy"])


# ---- boxes, masks, records --------------------------------------------------------------------------------------------------------

def test_scores_are_those_of_plain_loops():
    draw = np.random.default_rng(0)
    maps = ndimage.gaussian_filter(draw.random((20, 6, 8)), (0, 1, 1))
    pixels = np.zeros((60, 80), bool)
    pixels[10:40, 20:50] = True                                                   # cells are 10 × 10 pixels
    boxed, masked = (score_grounding(torch.tensor(maps), t) for t in (as_truth([20 / 80, 10 / 60, 50 / 80, 40 / 60]), as_truth(pixels)))
    on = pixels.reshape(6, 10, 8, 10).mean((1, 3))
    for i, a in enumerate(maps):
        labels, n = ndimage.label(a > a.mean(), EIGHT)
        mass = [(a - a.mean())[labels == k].sum() for k in range(1, n + 1)]
        region = labels == 1 + int(np.argmax(mass))
        ys, xs = np.nonzero(region)
        box = np.zeros_like(pixels)
        box[10 * ys.min():10 * ys.max() + 10, 10 * xs.min():10 * xs.max() + 10] = True
        whole = np.kron(region, np.ones((10, 10))).astype(bool)
        rise = np.maximum(a - a.mean(), 0)
        for scores, cells in ((boxed, box), (masked, whole)):
            assert scores["iou"][i] == pytest.approx((cells & pixels).sum() / (cells | pixels).sum(), abs=1e-9)
            assert scores["pointing"][i] == pytest.approx(on.flat[a.argmax()])
            assert scores["energy_pointing"][i] == pytest.approx((rise * on).sum() / rise.sum())


def test_a_truth_outside_of_the_frame_counts_for_nothing():
    out = grounding.Truth(torch.tensor([[0, 0, .1, 1]]), None, (.25, 0, .75, 1))
    scores = score_grounding(torch.rand(3, 4, 4), out)
    assert all(v.isnan().all() for v in scores.values())
    row = rank_seen([Seen({0: torch.rand(2, 4, 4) / 16}, out) for _ in range(3)])[0]
    assert math.isnan(row["iou"]) and row["images"] == 3
    table = located_table(locate_seen([Seen({0: torch.rand(2, 4, 4) / 16}, out)], [(0, 0)]))
    assert math.isnan(table[0]["iou"]) and table.summary() == []


def test_the_box_of_a_cropped_grid_is_one_of_the_picture():
    seen = Seen({0: dot(1, 2, n=4)[None]}, as_truth([.5, .25, .625, .5], (.25, 0, .75, 1)), frame=(.25, 0, .75, 1))
    [found] = locate_seen([seen], [(0, 0)], smooth=0)
    assert found.box.tolist() == [.5, .25, .625, .5] and found.scores["iou"] == 1


def test_chance_is_the_score_with_earlier_truths():
    boxes = [[0, 0, .5, .5], [.5, 0, 1, .5], [0, .5, .5, 1], [.5, .5, 1, 1]]
    maps = torch.rand(4, 2, 4, 4) / 16
    judge = grounding.Judge(shifts=2)
    for i, (m, b) in enumerate(zip(maps, boxes)):
        found, before = judge(m, as_truth(b)), boxes[max(0, i - 2):i]
        want = [score_grounding(m, as_truth(o))["iou"] for o in before]
        assert_close(found["iou_chance"], torch.stack(want).mean(0) if want else torch.full((2,), NAN).double(), equal_nan=True)


@pytest.mark.parametrize("shifts", (0, 1, 4))
def test_a_score_and_its_chance_are_of_the_same_samples(shifts):
    "The first with a truth is beside that of the second; those without one are in neither."
    boxes = [None, [0, 0, .5, .5], None, [.5, 0, 1, .5], [0, .5, .5, 1]]
    maps = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)) / 16
    samples = [Seen({0: m}, None if b is None else as_truth(b)) for m, b in zip(maps, boxes)]
    others = {1: [3], 3: [1], 4: [3, 1][:shifts]}
    means = {name: torch.stack([torch.stack([score_grounding(maps[i], as_truth(boxes[j]))[name] for j in others[i]]).mean(0) for i in others]).mean(0)
             if shifts else torch.full((2,), NAN) for name in grounding.SCORES}
    for row in rank_seen(iter(samples), shifts=shifts):
        assert row["images"] == 5
        for name in grounding.SCORES:
            own = np.mean([score_grounding(maps[i], as_truth(boxes[i]))[name][row["head"]] for i in others])
            assert row[name] == pytest.approx(own)
            assert row[f"{name}_chance"] == pytest.approx(means[name][row["head"]].item(), nan_ok=True)
    nowhere = grounding.Truth(torch.tensor([[0, 0, .1, 1]]), None, (.25, 0, .75, 1))       # no object is in the frame
    with_empty = [samples[0], Seen({0: maps[0]}, nowhere), samples[1], Seen({0: maps[2]}, nowhere), *samples[2:]]
    names = [n for name in grounding.SCORES for n in (name, f"{name}_chance")]
    a, b = ({r["head"]: [r[n] for n in names] for r in rank_seen(s, shifts=shifts)} for s in (samples, with_empty))
    assert str(a) == str(b)
    alone = rank_seen(samples[:3])                    # there is no other truth
    assert alone[0]["images"] == 3 and math.isnan(alone[0]["iou_chance"]) and not math.isnan(alone[0]["iou"])


def test_smoothing_is_a_gaussian_that_is_cut_at_the_border():
    maps = torch.rand(3, 5, 8)
    want = np.zeros((5, 8))
    for y in range(5):
        for x in range(8):
            wy, wx = (np.exp(-(np.arange(n) - c)**2 / (2 * 1.5**2)) for n, c in ((5, y), (8, x)))
            want[y, x] = (maps.double().sum(0).numpy() * np.outer(wy / wy.sum(), wx / wx.sum())).sum()
    assert_close(combined(maps, 1.5).numpy(), want)
    assert_close(combined(maps, 0), maps.double().sum(0))


def test_regions_and_boxes_of_odd_maps():
    assert not main_region(torch.ones(3, 3)).any() and not main_region(torch.full((3, 3), NAN)).any()
    assert box_around(main_region(dot(2, 1))).tolist() == [.25, .5, .5, .75]
    assert box_around(torch.zeros(2, 3, 3, dtype=torch.bool)).isnan().all()
    two = dot(0, 0, 1) + dot(3, 3, 2)
    assert box_around(main_region(two)).tolist() == [.75, .75, 1, 1]
    assert main_region(torch.tensor([[1., 0, 1]])).tolist() == [[True, False, False]]     # a tie: the first
    with pytest.raises(ValueError, match="level: got 1"): main_region(two, 1)


def test_records_of_every_kind(tmp_path):
    rows = [dict(image="a.png", expression="red", box=[1, 2, 3, 4]), dict(file_name="b.png", sentences=[dict(sent="left"), "right"], bbox=[0, 0, 9, 9]),
            dict(image_path="c.png", caption="it", mask="c_mask.png")]
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    (tmp_path / "refs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for name in ("refs.json", "refs.jsonl"):
        found = read_records(tmp_path / name)
        assert [r["expression"] for r in found] == ["red", "left", "right", "it"]
        assert found[0]["image"] == str(tmp_path / "a.png") and found[3]["mask"] == str(tmp_path / "c_mask.png") and found[1]["box"] == found[2]["box"]
    assert read_records(tmp_path / "refs.json", "/pictures")[0]["image"] == "/pictures/a.png"
    for text, said in (("[", "is no JSON"), ("{}", "expected a list of records"), ("[]", "expected a list"), ('[{"image": "a"}]', "record 0 is"),
                       ("[3]", "record 0 is 3")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=said): read_records(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError): read_records(tmp_path / "none.json")


def test_boxes_of_either_form():
    assert as_shares([10, 20, 30, 40], (100, 200)).tolist() == [[.1, .1, .4, .3]]
    assert as_shares([[10, 20, 40, 60]], (100, 200), "xyxy").tolist() == [[.1, .1, .4, .3]]
    assert as_shares([-.4, 0, 100.8, 200], (100, 200)).tolist() == [[0, 0, 1, 1]]          # people round
    for bad in ([50, 0, 60, 10], [5, 5, 0, 5], [], "box", [1, 2, 3], [NAN, 0, 1, 1]):
        with pytest.raises(ValueError, match="box: got"): as_shares(bad, (100, 200))
    with pytest.raises(ValueError, match="form: got 'yxyx'"): as_shares([0, 0, 1, 1], (9, 9), "yxyx")


@pytest.mark.parametrize("record", [dict(expression=""), dict(expression="  "), dict(sentences=["red", ""]), dict(sentences=[dict(tokens=["left"])]),
                                    dict(sentences=[None]), dict(expression=dict(sent=None))])
def test_a_record_without_words_is_refused(record, tmp_path):
    (tmp_path / "refs.json").write_text(json.dumps([dict(image="a.png", expression="red"), dict(image="b.png") | record]))
    with pytest.raises(ValueError, match="record 1 is .*no expression may be empty.*sent, raw or sentence"): read_records(tmp_path / "refs.json")


def test_sentences_have_their_words_under_several_names(tmp_path):
    (tmp_path / "refs.json").write_text(json.dumps([dict(image="a.png", sentences=[dict(raw="left man", tokens=["left", "man"]), dict(sentence="it"),
                                                                                   dict(sent="the man", raw="The man")])]))
    assert [r["expression"] for r in read_records(tmp_path / "refs.json")] == ["left man", "it", "the man"]


@pytest.mark.parametrize("bad", [[[10, 20], [50, 60]], [10, 20, 30, 40, 50, 60, 10, 10], [[[1, 2, 3, 4]]], [[1, 2, 3], [4, 5, 6]], 5, None])
def test_numbers_of_another_shape_are_no_boxes(bad):
    """Two corners, or eight numbers in a row, are not taken apart in a way that nobody said."""
    for form in ("xywh", "xyxy"):
        with pytest.raises(ValueError, match="expected four numbers, or a list of such boxes"): as_shares(bad, (100, 100), form)


def test_masks_of_records(tmp_path):
    mask = np.zeros((64, 96), "uint8")
    mask[:32, 48:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    picture_of().save(tmp_path / "a.png")
    record = dict(image=tmp_path / "a.png", expression="mug", mask=tmp_path / "mask.png")
    [seen] = se.text_maps(made(LLAVA), [record], processor_of())
    want = np.zeros((4, 4))
    want[:2, 2:] = 1                                                              # of the middle 64 pixels
    assert_close(seen.truth.on_grid((4, 4)).numpy(), want)
    index = np.where(mask > 0, 3, 0).astype("uint8")                              # as PASCAL VOC has it: a class, and void around it
    index[30:34, 46:], index[:32, 46:48] = 255, 255
    palette = Image.fromarray(index, "P")
    palette.putpalette([v for i in range(256) for v in ((224, 224, 192) if i == 255 else (i % 7 * 30, 0, i % 5 * 40) if i else (0, 0, 0))])
    palette.save(tmp_path / "mask.png")
    [seen] = se.text_maps(made(LLAVA), [record], processor_of())
    assert_close(seen.truth.mask.numpy(), index == 3)                              # void is no object
    Image.fromarray(mask).save(tmp_path / "mask.jpg", quality=60)
    [seen] = se.text_maps(made(LLAVA), [record | dict(mask=tmp_path / "mask.jpg")], processor_of())
    assert (seen.truth.mask.numpy() != (mask > 0)).mean() < .01                    # nor are the grades that JPEG leaves
    with pytest.raises(OSError, match="nowhere.png"): list(se.text_maps(made(LLAVA), [record | dict(mask=tmp_path / "nowhere.png")], processor_of()))


def test_tables_are_written(tmp_path):
    model, processor = made(LLAVA), processor_of()
    records = [dict(image=picture_of(seed=i), expression="the red mug", box=[32 + 4*i, 0, 32, 32], name=f"mug {i}") for i in range(5)]
    ranked = se.rank_text_heads(model, records, processor)
    ranked.to_csv(tmp_path / "heads.csv")
    table = se.located_table(se.locate(model, records, ranked, processor, best=2))
    table.to_csv(tmp_path / "found.csv")
    rows = list(csv.DictReader(open(tmp_path / "found.csv", encoding="utf-8")))
    assert [r["name"] for r in rows] == [f"mug {i}" for i in range(5)] and len(rows[0]["heads"].split()) == 2
    assert len(list(csv.DictReader(open(tmp_path / "heads.csv", encoding="utf-8")))) == 8
    summary = {line["score"]: line for line in table.summary()}
    beside = rows[1:]                                       # the first has no other truth before it
    assert summary["iou"]["mean"] == pytest.approx(np.mean([float(r["iou"]) for r in beside])) and summary["iou"]["n"] == 4
    assert summary["iou"]["chance"] == pytest.approx(np.mean([float(r["iou_chance"]) for r in beside]))
    assert summary["iou"]["accuracy"] == np.mean([float(r["iou"]) >= .5 for r in rows])
    with pytest.raises(ValueError, match="got no sample"): se.located_table([])


def test_pictures_of_samples_can_be_drawn():
    model, processor = made(LLAVA), processor_of()
    mask = torch.zeros(64, 96, dtype=torch.bool)
    mask[:32, 40:60] = True
    record = dict(image=picture_of(), expression="the $red$ mug", box=[32, 0, 32, 32])
    for samples, more in (([record], dict(processor=processor)), ([LLAVA.given()], {}), ([(LLAVA.given(), [mask])], {})):
        [found] = se.locate(model, samples, [(0, 1), (1, 0)], **more)
        assert se.draw_located(found)._repr_png_()[:4] == b"\x89PNG"
    [empty] = locate_seen([Seen({0: torch.zeros(2, 4, 4)})])
    assert se.draw_located(empty)._repr_png_()
