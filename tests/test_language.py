"""Maps from words to pictures, of small random copies of transformers' vision-language models: against eager attention, by moved patches, in generation."""
import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from zoo_language import IMAGE, SPECS, VIDEO, made, noise

import spatial_entropy as se
from spatial_entropy.attention.queries import asked_of
from spatial_entropy.attention.tap import cells_off, patches_at, peaks
from spatial_entropy.attention.text_rows import asked_weights
from spatial_entropy.language.geometry import language_adapters

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
HEADING, AFTER = "## Vision-language models", "## Census"
SEEN = {}                                                # {name: what was seen of it}
EVERY = [pytest.param(s, id=s.name) for s in SPECS]
NEW = 8                                                  # tokens that are generated
PLACES = ((.15, .4), (.4, .85), (.6, .15), (.85, .6))     # of height and width


def read(model, inputs, *args, **kwargs):
    """The tap, after one pass."""
    with torch.no_grad(), se.TextImageTap(model, *args, **kwargs) as tap:
        model(**inputs)
    return tap


def tables(model, run):
    """What `run` gives with eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return run()
    finally:
        model.set_attn_implementation("sdpa")


def by_layer(attentions, maps):
    """{layer: (B, H, n, m)}; layers without attention give None, or nothing."""
    there = [a for a in attentions if a is not None]
    assert len(there) == len(maps)
    return dict(zip(maps, there))


def laid(tap, weights, name, length=None):
    """(B, H, N) weights of all tokens, at the tokens of a view, where they lie; written out cell by cell.

    `length`: of the text, where a sliding cache has dropped its beginning.
    """
    maps, gone = [], 0 if length is None else length - weights.shape[-1]
    weights = torch.nn.functional.pad(weights, (max(gone, 0), 0))
    for b, place in tap.prompt.layout.views[name].items():
        h, w = place.part.grid
        cells = range(h * w) if place.part.cells is None else place.part.cells.tolist()
        m = torch.zeros(weights.shape[1], h * w + 1)
        for i, cell in enumerate(cells):
            m[:, cell] = weights[b, :, tap.prompt.layout.at[b, place.first + i]]
        maps.append(m[:, :-1].unflatten(-1, (h, w)))
    return torch.stack(maps)


@pytest.mark.parametrize("spec", EVERY)
def test_every_layer_is_that_of_eager_attention(spec):
    model, inputs = made(spec), spec.given()
    tap = read(model, inputs)
    maps = tap.maps(spec.view)
    name = tap.view_name(spec.view)
    assert next(iter(maps.values())).shape[-2:] == spec.grid
    want = by_layer(tables(model, lambda: model(**inputs, output_attentions=True).attentions), maps)
    for i, m in maps.items():
        assert_close(m, laid(tap, want[i][:, :, -1], name), atol=1e-5, rtol=0)
    assert max((m.amax() / m.mean()).item() for m in maps.values()) > 1.2               # something that could be wrong
    assert max(tap.check(**inputs).values()) < 1e-5
    SEEN[spec.name] = dict(family=tap.entry.name, model=type(tap.host).__name__, layers=f"{len(maps)} of {len(tap.text.layers)}",
                           grids=", ".join(f"{name} {h}×{w}" for name, grids in tap.views.items() for h, w in [grids[0]]))


def embedded(model, text, spec, picture):
    """(1, N, d) what the language model reads."""
    kept = []
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: kept.append(kwargs["inputs_embeds"]), with_kwargs=True)
    try:
        with torch.no_grad(): model(**spec.given(picture=picture))
    finally:
        hook.remove()
    return kept[0]


@pytest.mark.parametrize("spec", EVERY)
def test_a_patch_that_is_changed_shows_in_its_cell(spec):
    model = made(spec)
    still, boxes = noise(spec.size), patches_at(PLACES, spec.size)
    tap = read(model, spec.given())
    before, moved = embedded(model, tap.text, spec, still), []
    for top, left, h, w in boxes:
        picture = still.clone()
        picture[:, top:top + h, left:left + w] = 1 - picture[:, top:top + h, left:left + w].round()
        change = (embedded(model, tap.text, spec, picture) - before).norm(dim=-1)
        moved.append(laid(tap, change[:, None], tap.view_name(spec.view))[0, 0])
    for box, cell in zip(boxes, peaks(torch.stack(moved))):
        assert cell is not None, "no cell stands out"
        assert cells_off(cell, spec.grid, box, spec.size) <= .5 + spec.near, (box, divmod(cell, spec.grid[1]))


@pytest.mark.parametrize("spec", EVERY)
def test_generated_tokens_are_those_of_eager_attention_and_of_the_whole_text(spec):
    model, inputs = made(spec), spec.given()
    greedy = dict(max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, suppress_tokens=[IMAGE, VIDEO])
    with se.TextImageTap(model, "generated") as tap:
        said = model.generate(**inputs, **greedy).sequences
    maps, name, n = tap.maps(spec.view), tap.view_name(spec.view), inputs["input_ids"].shape[1]
    steps = tables(model, lambda: model.generate(**inputs, **greedy, output_attentions=True))
    assert torch.equal(steps.sequences, said)
    for t, attentions in enumerate(steps.attentions):
        for i, table in by_layer(attentions, maps).items():
            assert maps[i].shape[1] == NEW
            assert_close(maps[i][:, t], laid(tap, table[:, :, -1], name, n + t), atol=1e-5, rtol=0)
    if spec.prefix: return
    longer = {k: torch.nn.functional.pad(v, (0, NEW)) if v.shape == (1, n) else v for k, v in inputs.items()}
    whole = longer | dict(input_ids=said, attention_mask=torch.ones_like(said))
    want = by_layer(tables(model, lambda: model(**whole, output_attentions=True).attentions), maps)
    for i, m in maps.items():
        for t in range(NEW): assert_close(m[:, t], laid(tap, want[i][:, :, n - 1 + t], name), atol=1e-5, rtol=0)


def padded(short, long):
    """Two prompts as a batch, the first with padding on its left."""
    n = long["input_ids"].shape[1]
    def grown(k):
        a, b = short[k], long[k]
        if a.ndim == 2 and b.shape == (1, n) and a.dtype == torch.long: a = torch.nn.functional.pad(a, (n - a.shape[1], 0))
        return torch.cat([a, b])
    return {k: grown(k) for k in long}


@pytest.mark.parametrize("spec", EVERY)
def test_a_batch_padded_on_the_left_is_its_prompts(spec):
    model, long, short = made(spec), spec.given(0), spec.given(1)
    for k, v in short.items():
        if v.shape == long["input_ids"].shape: short[k] = torch.cat([v[:, :-3], v[:, -1:]], 1)       # two words less
    runs = dict(max_new_tokens=2, do_sample=False)
    with se.TextImageTap(model, "generated") as tap:
        def said(inputs, **more):
            model.generate(**inputs, **runs, **more)
            return tap.maps(spec.view)
        alone = [said(short), said(long)]
        for cache in ("dynamic", "static"):
            for i, m in said(padded(short, long), cache_implementation=cache).items():
                assert_close(m, torch.cat([a[i] for a in alone]), atol=2e-5, rtol=0)


# ---- what is asked ----

LLAVA = SPECS[0]


def test_reductions_keep_what_they_say():
    model, inputs = made(LLAVA), LLAVA.given()
    whole = read(model, inputs).maps()
    for reduce, want in (("share", lambda m: m.sum((-2, -1))), ("entropy", se.spatial_entropy), (2, lambda m: m[:, [2]]),
                         (lambda m: m.amax((-2, -1)), lambda m: m.amax((-2, -1)))):
        for i, r in read(model, inputs, reduce=reduce).maps().items(): assert_close(r, want(whole[i]))
    with se.TextImageTap(model, "generated", reduce="share") as tap: model.generate(**inputs, max_new_tokens=3)
    assert tap.maps()[0].shape == (1, 3, 4)


def test_logits_are_those_whose_softmax_is_the_map():
    model, inputs = made(LLAVA), LLAVA.given()
    logits, maps = read(model, inputs, softmax=False).maps(), read(model, inputs).maps()
    for i, s in logits.items():
        assert_close(s.flatten(2).softmax(-1), (maps[i] / maps[i].sum((-2, -1), keepdim=True)).flatten(2))


def test_a_span_is_the_mean_of_its_tokens_and_layers_can_be_chosen():
    model, inputs = made(LLAVA), LLAVA.given()
    each = [read(model, inputs, i).maps() for i in (-3, -2)]
    span = read(model, inputs, slice(-3, -1)).maps()
    for i, m in span.items(): assert_close(m, (each[0][i] + each[1][i]) / 2)
    assert_close(read(model, inputs, slice(-3, -1), layers=-1).maps(), span[1])
    assert set(read(model, inputs, layers=[0]).maps()) == {0}


@pytest.mark.parametrize("softmax", [True, False])
def test_a_span_that_begins_before_the_picture(softmax):
    """Token 0 sees no image token: its zeros are in a mean of weights, said so; a mean of logits is that of the last token."""
    model, inputs = made(LLAVA), LLAVA.given()
    with se.TextImageTap(model, [0, -1], softmax=softmax) as tap, torch.no_grad(): model(**inputs)
    kept = "all 0, count in the mean" if softmax else "the others' mean counts"
    with pytest.warns(UserWarning, match=f"^up to 1 of the 2 tokens that ask see no image token; .*{kept}"): maps = tap.maps()
    with se.TextImageTap(model, softmax=softmax) as last, torch.no_grad(): model(**inputs)
    for i, m in last.maps().items(): assert_close(maps[i], m/2 if softmax else m, atol=1e-6, rtol=1e-5)


def test_logits_of_a_span_in_a_window_are_means_over_the_rows_that_see_them():
    torch.manual_seed(0)
    q, k, asked = torch.randn(1, 2, 6, 8), torch.randn(1, 1, 6, 8), asked_of([[0, 2, 5]])
    got, seen, blind = asked_weights(q, k, asked, 1., softmax=False, window=3, watched=torch.tensor([[2, 3, -1]]), step=2)
    whole = q @ k.mT
    for key, rows in enumerate(([0, 2], [2], [2], [5], [5], [5])): assert_close(got[..., key], whole[:, :, rows, key].mean(2))
    assert blind.tolist() == [[True, False, False]] and seen.all()


@pytest.mark.parametrize("reduce", ["share", "entropy", 1])
def test_maps_of_several_sizes_are_reduced_one_by_one(reduce):
    spec = next(s for s in SPECS if "Qwen2_5" in s.name)
    model, both = made(spec), [spec.given(picture=noise(size, i)) for i, size in enumerate(((32, 48), (64, 32)))]
    n = max(one["input_ids"].shape[1] for one in both)
    def joined(key):
        values = [one[key] for one in both]
        return torch.cat([torch.nn.functional.pad(v, (n - v.shape[1], 0)) if v.shape[0] == 1 and key != "image_grid_thw" else v for v in values])
    inputs = {key: joined(key) for key in both[0]}
    with se.TextImageTap(model, reduce=reduce) as tap, torch.no_grad(): model(**inputs)
    for b, one in enumerate(both):
        with se.TextImageTap(model, reduce=reduce) as alone, torch.no_grad(): model(**one)
        for i, m in alone.maps().items(): assert_close(tap.maps(prompt=b)[i], m, atol=1e-5, rtol=1e-4)
        if reduce != 1:
            for i, m in tap.maps().items(): assert_close(m[b:b + 1], alone.maps()[i], atol=1e-5, rtol=1e-4)
    if reduce == 1:
        with pytest.raises(ValueError, match="read one prompt at a time"): tap.maps()


def test_two_taps_do_not_hear_one_another_and_leave_the_model_as_it_was():
    model, inputs = made(LLAVA), LLAVA.given()
    with se.TextImageTap(model, 0) as a, se.TextImageTap(model) as b, torch.no_grad(): out = model(**inputs).logits
    assert_close(b.maps()[0], read(model, inputs).maps()[0])
    assert set(a.unseen()) == {0, 1}
    with pytest.warns(UserWarning, match="do not see up to 100% of the image tokens"): a.maps()
    assert "get_image_features" not in vars(model.model) and not model.model._forward_pre_hooks
    with torch.no_grad(): assert torch.equal(model(**inputs).logits, out)


def test_a_tap_that_nobody_closed_keeps_no_model_in_memory():
    from transformers import AttentionInterface

    def left_open():
        model = copy.deepcopy(made(LLAVA))
        se.TextImageTap(model)
        return weakref.ref(model)

    model = left_open()
    gc.collect()
    assert model() is None and not hasattr(AttentionInterface.get_interface, "__wrapped__")


def test_taps_that_were_closed_leave_nothing_behind():
    model = made(LLAVA)
    kept = lambda: [f.peek() for f in list(weakref.finalize._registry)]
    watched = lambda: sum(held is not None and held[1].__module__ == "spatial_entropy.attention.observing" for held in kept())
    before = watched()
    for _ in range(3):
        se.TextImageTap(model).close()
    assert watched() == before


# ---- what is wrong is one sentence ----

def test_bad_input_is_said():
    model, inputs = made(LLAVA), LLAVA.given()
    ids = inputs["input_ids"]
    one_less = dict(input_ids=torch.cat([ids[:, :3], ids[:, 4:]], 1), attention_mask=None)
    mistakes = [
        (ValueError, "no image token", {"input_ids": ids[:, -4:]}, {}),
        (ValueError, "got 15 image tokens in the prompts, expected 16", inputs | one_less, {}),
        (ValueError, "got token 99, expected one from", inputs, dict(query=99)),
        (ValueError, "names none of the", inputs, dict(query=slice(90, 99))),
    ]
    for error, said, given, more in mistakes:
        with pytest.raises(error, match=said) as e: read(model, given, **more)
        assert "\n" not in str(e.value)
    for error, said, more in ((ValueError, "pass tokenizer=processor", dict(query="the mug")), (TypeError, "query: got None", dict(query=None)),
                              (ValueError, "layers: got 7", dict(layers=7)), (ValueError, "reduce: got 'sum'", dict(reduce="sum"))):
        with pytest.raises(error, match=said): se.TextImageTap(model, **more)


def test_what_cannot_be_followed_is_refused():
    model, inputs = made(LLAVA), LLAVA.given()
    for more, error, said in ((dict(num_beams=2), Exception, "beams|num_beams=1"), (dict(prefill_chunk_size=4), Exception, "image tokens|one pass")):
        with se.TextImageTap(model, "generated"), pytest.raises(error, match=said): model.generate(**inputs, max_new_tokens=3, **more)
    with pytest.raises(se.UnsupportedModel, match="Linear: no entry for this vision-language model. An entry needs its class"):
        se.TextImageTap(torch.nn.Linear(2, 2))
    tap = read(model, inputs)
    with pytest.raises(ValueError, match="got 'image 1', expected one of 'image 0'"): tap.maps(1)


def test_several_pictures_have_names():
    model, inputs = made(LLAVA), LLAVA.given()
    ids = torch.tensor([[1, *[IMAGE] * 16, 3, *[IMAGE] * 16, 5, 6]])
    tap = read(model, dict(input_ids=ids, pixel_values=torch.cat([inputs["pixel_values"]] * 2)))
    assert list(tap.views) == ["image 0", "image 1"]
    with pytest.raises(ValueError, match="got None, expected one of 'image 0', 'image 1'"): tap.maps()
    assert not torch.equal(tap.maps(0)[0], tap.maps("image 1")[0])
    assert_close(tap.shares(0)[0] + tap.shares(1)[0], tap.sites[0].kept[0].sum(-1))


# ---- the page of the site ----

def short(dotted):
    return ".".join(dotted.split(".")[2::2])                           # folder.Class


def page():
    """The part of docs/models.md on vision-language models, from what this run saw."""
    tested = {r["model"] for r in SEEN.values()}
    lines = [HEADING, "", f"`TextImageTap` on {len(SEEN)} models, small copies with random weights: every layer's map against eager attention to 1e-5, for a "
             f"whole prompt and for each of {NEW} generated tokens; a changed patch of the picture must show in its cell; prompts in a batch, padded on the "
             "left, must be those prompts alone, with a dynamic and a static cache. Written by `python -m pytest tests/test_language.py --write-models`.", "",
             "| family | tested | the same entry, not tested | how its pictures lie |", "|---|---|---|---|"]
    for entry in language_adapters():
        names = [short(n) for n in ((entry.model,) if isinstance(entry.model, str) else entry.model)]
        known, rest = ([f"`{n}`" for n in names if (n.split(".")[1] in tested) == here] for here in (True, False))
        if entry.why: lines.append(f"| {entry.name} | refused | {', '.join(rest)} | {entry.why} |")
        else: lines.append(f"| {entry.name} | {', '.join(known)} | {', '.join(rest)} | {entry.note} |")
    lines += ["", "| model | layers with attention | views of a prompt with one picture |", "|---|---|---|"]
    lines += [f"| `{name}` | {r['layers']} | {r['grids']} |" for name, r in SEEN.items()]
    return "\n".join(lines) + "\n"


def test_page_of_language_models(request):
    if len(SEEN) < len(SPECS): pytest.skip(f"{len(SEEN)} of {len(SPECS)} models ran in this process; the page needs them all")
    text = PAGE.read_text(encoding="utf-8")
    before, rest, counted = text.partition(AFTER)
    before = before.partition(HEADING)[0].rstrip()
    wanted = f"{before}\n\n{page()}\n{rest}{counted}"
    if request.config.getoption("--write-models"): PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "docs/models.md is out of date: python -m pytest tests/test_language.py --write-models"


# ---- more than one grid ----

def test_prompts_with_other_grids_are_read_one_by_one():
    spec = next(s for s in SPECS if "Qwen2_5" in s.name)
    model, wide, tall = made(spec), spec.given(), spec.given(picture=noise((96, 64)))
    tap = read(model, padded(wide, tall))
    with pytest.raises(ValueError, match="with grids 4×6, 6×4; read one prompt at a time"): tap.maps()
    for prompt, inputs in enumerate((wide, tall)):
        alone = read(model, inputs).maps()
        for i, m in tap.maps(prompt=prompt).items(): assert_close(m, alone[i], atol=1e-5, rtol=0)


def test_frames_of_a_video_are_views():
    spec = next(s for s in SPECS if "Qwen2_5" in s.name)
    model = made(spec)
    patches = torch.randn(2 * 4 * 6 * 4, 3 * 2 * 8 * 8)
    ids = torch.tensor([[1, 11, *[VIDEO] * 48, 12, 5, 6]])
    video = dict(input_ids=ids, pixel_values_videos=patches, video_grid_thw=torch.tensor([[2, 8, 12]]), mm_token_type_ids=2 * (ids == VIDEO).long())
    tap = read(model, video)
    assert tap.views == {"video 0 frame 0": {0: (4, 6)}, "video 0 frame 1": {0: (4, 6)}}
    want = by_layer(tables(model, lambda: model(**video, output_attentions=True).attentions), tap.maps("video 0 frame 1"))
    for i, m in tap.maps("video 0 frame 1").items():
        assert_close(m, want[i][:, :, -1, 26:50].unflatten(-1, (4, 6)), atol=1e-5, rtol=0)


def test_a_window_that_has_lost_image_tokens_says_so():
    spec = next(s for s in SPECS if "gemma3" in s.name)
    model, inputs = made(spec), spec.given()
    with se.TextImageTap(model, "generated") as tap: model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with pytest.warns(UserWarning, match=r"layer\(s\) 0: .* 100% of the image tokens \(a sliding window"): maps = tap.maps()
    assert set(tap.unseen()) == {0} and maps[0][:, -1].sum() == 0 < maps[1][:, -1].sum()


def test_a_phrase_is_found_by_a_real_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {w: i for i, w in enumerate("<pad> <s> </s> where is the red mug ? <image> and".split())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"])
    model, ids = made(LLAVA), torch.tensor([[1, *[IMAGE] * 16, 3, 4, 5, 6, 7, 8]])
    inputs = LLAVA.given() | dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    maps = read(model, inputs, "the red mug", tokenizer=tokenizer).maps()
    for i, m in read(model, inputs, [19, 20, 21]).maps().items(): assert_close(maps[i], m)
    with pytest.raises(ValueError, match="'the blue mug' is 0 times in the prompt"): read(model, inputs, "the blue mug", tokenizer=tokenizer)


def test_a_new_entry_is_read():
    class Other(type(made(LLAVA).model)): pass
    model = made(LLAVA)
    model.model.__class__ = Other
    try:
        se.register_language_adapter(se.LanguageAdapter("other", Other, lambda given: [se.Picture([se.Part((2, 8))])]))
        assert read(model, LLAVA.given()).maps()[0].shape == (1, 4, 2, 8)
    finally:
        model.model.__class__ = Other.__mro__[1]
        from spatial_entropy.language import geometry
        geometry._language_adapters.pop(0)


def test_the_vision_tower_can_be_tapped_beside_the_words():
    model, inputs = made(LLAVA), LLAVA.given()
    with se.AttentionTap(model) as tower, se.TextImageTap(model, "generated") as words:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tower.maps().shape == (1, 2, 4, 4) and words.maps()[0].shape == (1, 3, 4, 4, 4)
    alone = read(model, inputs).maps()
    for i, m in words.maps(step=0).items(): assert_close(m, alone[i])


def test_without_a_cache_the_steps_are_the_same():
    model, inputs, found = made(LLAVA), LLAVA.given(), []
    for cache in (True, False):
        with se.TextImageTap(model, "generated") as tap: model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cache, suppress_tokens=[IMAGE])
        found.append(tap.maps())
    for i, m in found[0].items(): assert_close(found[1][i], m, atol=1e-5, rtol=0)


@pytest.mark.parametrize("query", ["last", [-3, -2]])
def test_without_a_cache_the_prompt_stays_the_one_that_was_given(query):
    model, inputs = made(LLAVA), LLAVA.given()
    want = read(model, inputs, query).maps()
    with se.TextImageTap(model, query) as tap: said = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False, suppress_tokens=[IMAGE])
    for i, m in tap.maps().items(): assert_close(m, want[i], atol=1e-5, rtol=0)
    longer = inputs | dict(input_ids=said[:, :-1], attention_mask=torch.ones_like(said[:, :-1]))
    with torch.no_grad(), se.TextImageTap(model, query) as tap:
        model(**inputs)
        model(**longer)                                                                # called by hand, it is another prompt
        model(**inputs, use_cache=False)
        model(**longer, use_cache=False)
    assert tap.prompt.ids.shape == longer["input_ids"].shape


@pytest.mark.parametrize("query", ["last", "generated"])
def test_another_picture_is_another_prompt_without_a_cache_too(query):
    """The ids of the second are those of the first, and one more: nothing of the first may be read."""
    model, inputs = made(LLAVA), LLAVA.given()
    ids = torch.cat([inputs["input_ids"], torch.tensor([[5]])], 1)
    other = inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=-inputs["pixel_values"])
    with torch.no_grad(), se.TextImageTap(model, query) as tap:
        model(**inputs, use_cache=False)
        model(**other, use_cache=False)
    for i, m in read(model, other, query).maps().items(): assert_close(tap.maps()[i], m)
    with torch.no_grad(), se.TextImageTap(model, query) as tap:                        # and in two calls of `generate`
        model.generate(**inputs, max_new_tokens=1, do_sample=False, use_cache=False)
        model.generate(**other, max_new_tokens=1, do_sample=False, use_cache=False)
    assert tap.prompt.ids.shape == ids.shape
    for i, m in read(model, other, query).maps().items(): assert_close(tap.maps()[i], m)
    assert "generate" not in vars(model)


def test_steps_of_a_loop_of_ones_own_are_followed():
    model, inputs = made(LLAVA), LLAVA.given()
    with torch.no_grad(), se.TextImageTap(model, "generated") as tap:
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False, suppress_tokens=[IMAGE])
        want, n = tap.maps(), inputs["input_ids"].shape[1]
        for k in range(n, n + 3): model(**inputs | dict(input_ids=said[:, :k], attention_mask=torch.ones_like(said[:, :k])), use_cache=False)
        for i, m in tap.maps().items(): assert_close(m, want[i])


def test_a_generate_of_ones_own_is_given_back():
    model, inputs, calls = made(LLAVA), LLAVA.given(), []
    own = model.generate
    def generate(**given):
        calls.append(1)
        return own(**given)
    model.generate = generate
    try:
        with torch.no_grad(), se.TextImageTap(model) as tap: model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=False)
        assert calls == [1] and tap.maps() and model.generate is generate
    finally: del model.generate


@pytest.mark.filterwarnings("ignore")                                                # how the cache is named
def test_a_cache_is_given_back():
    from transformers import DynamicCache
    model, inputs, cache = made(LLAVA), LLAVA.given(), DynamicCache()
    with torch.no_grad(), se.TextImageTap(model):
        model(**inputs, past_key_values=cache)
        with pytest.raises(RuntimeError, match="num_beams=1"): cache.reorder_cache(torch.tensor([0]))
    cache.reorder_cache(torch.tensor([0]))


def test_a_copy_of_a_model_in_which_a_tap_is_open_is_the_stock_model():
    model, text = made(LLAVA), torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad(), se.TextImageTap(model):
        copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(copied(input_ids=text).logits, model(input_ids=text).logits)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_is_read_through_its_mask(monkeypatch):
    import transformers.integrations.flex_attention as flex
    import transformers.masking_utils as masks
    from torch.nn.attention.flex_attention import flex_attention
    monkeypatch.setattr(flex, "compile_friendly_flex_attention", lambda q, k, v, training=False, **more: flex_attention(q, k, v, **more))
    stock = masks.create_block_mask                                                    # compiled, both would take minutes
    monkeypatch.setattr(masks, "create_block_mask", lambda *args, _compile=False, **more: stock(*args, **more))
    model, inputs = made(LLAVA), LLAVA.given()
    want, text = read(model, inputs).maps(), model.model.language_model
    text.set_attn_implementation("flex_attention")
    try:
        for i, m in read(model, inputs).maps().items(): assert_close(m, want[i], atol=1e-5, rtol=0)
    finally:
        text.set_attn_implementation("sdpa")
