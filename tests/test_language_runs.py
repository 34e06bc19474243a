"""Vision-language models as people run them: other attention functions, parts of the model elsewhere, fewer bits, tiles."""
import copy

import pytest
import torch
from test_text_heads import picture_of, processor_of
from torch.testing import assert_close
from zoo_language import IMAGE, SPECS, internvl_tiles, made, noise, words

import spatial_entropy as se
from spatial_entropy.language.samples import on_model

LLAVA = SPECS[0]
INTERN, GEMMA = (next(s for s in SPECS if name in s.name) for name in ("internvl", "gemma3"))


def read(model, inputs, *args, **kwargs):
    """The tap, after one pass."""
    with torch.no_grad(), se.TextImageTap(model, *args, **kwargs) as tap: model(**inputs)
    return tap


def same(found, want, atol=1e-5):
    assert found.keys() == want.keys()
    for i, m in found.items(): assert_close(m.float(), want[i].float(), atol=atol, rtol=0)


def left_padded(inputs, n=3):
    """The prompt with padding before it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return inputs | dict(input_ids=torch.nn.functional.pad(ids, (n, 0)), attention_mask=torch.nn.functional.pad(mask, (n, 0)))


# ---- other attention functions ----------------------------------------------------------------------------------------------------

def flash_like(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What a flash kernel computes, of what transformers gives it: the padding alone, keys not repeated, a window by its length."""
    b, h, n, m = *query.shape[:3], key.shape[2]
    assert attention_mask is None or attention_mask.shape == (b, m) or attention_mask.ndim == 2
    key, value = (t.repeat_interleave(h // t.shape[1], 1) for t in (key, value))
    q, k = torch.arange(m - n, m)[:, None], torch.arange(m)
    seen = k <= q if sliding_window is None else (k <= q) & (k > q - sliding_window)
    seen = seen[None, None]
    if attention_mask is not None: seen = seen & attention_mask[:, None, None, -m:].bool()
    s = (query @ key.mT * scaling).masked_fill(~seen, -1e30)
    return (s.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    """The name under which transformers finds it, with the masks that it makes for flash attention."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    AttentionInterface.register("padded_rows", flash_like)
    AttentionMaskInterface.register("padded_rows", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield "padded_rows"
    for table in (AttentionInterface, AttentionMaskInterface): table._global_mapping.pop("padded_rows")


@pytest.mark.parametrize("spec", [LLAVA, next(s for s in SPECS if "Qwen2_5" in s.name)], ids=str)
def test_flash_attention_is_read_by_what_its_kernels_are_given(spec, flash):
    model, inputs = made(spec), spec.given()
    text = read(model, inputs).text
    for given in (inputs, left_padded(inputs)):
        if "mm_token_type_ids" in given and given is not inputs:
            given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (3, 0))
        want = read(model, given).maps()
        with se.TextImageTap(model, "generated") as tap: model.generate(**given, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
        steps = tap.maps()
        text.set_attn_implementation(flash)
        try:
            same(read(model, given).maps(), want)
            with se.TextImageTap(model, "generated") as tap: model.generate(**given, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
            same(tap.maps(), steps)
        finally:
            text.set_attn_implementation("sdpa")


# ---- parts of the model elsewhere -------------------------------------------------------------------------------------------------

def on_disk(model, folder):
    from accelerate import disk_offload
    return disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)


def on_demand(model, folder):
    from accelerate import cpu_offload
    return cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def in_two_places(model, folder):
    from accelerate import dispatch_model
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "model.language_model.embed_tokens": "cpu",
              "model.language_model.layers.0": "disk", "model.language_model.layers.1": "cpu", "model.language_model.norm": "disk",
              "model.language_model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("moved", [on_demand, on_disk, in_two_places])
def test_a_model_whose_weights_are_elsewhere(moved, tmp_path):
    model, inputs = made(LLAVA), LLAVA.given()
    want = read(model, inputs).maps()
    away = moved(copy.deepcopy(model), tmp_path / "weights")
    assert any(p.device.type == "meta" for p in away.parameters())
    tap = read(away, inputs)
    same(tap.maps(), want)
    assert max(tap.check(**inputs).values()) < 1e-5
    given = on_model(inputs, away)
    assert given["input_ids"].device.type == "cpu" and given["pixel_values"].dtype == torch.float32
    [seen] = se.text_maps(away, [inputs])
    same(seen.maps, {i: m[0] for i, m in want.items()})
    away.generation_config.suppress_tokens = [IMAGE]
    found = se.look(away, processor_of(), picture_of(), "where is the red mug ?", "the red mug", new_tokens=2)
    assert found.located.map.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="two devices are needed: a CPU and a GPU")
def test_layers_on_two_devices():
    from accelerate import dispatch_model
    model, inputs = made(LLAVA), LLAVA.given()
    want = read(model, inputs).maps()
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model.embed_tokens": 0,
              "model.language_model.layers.0": 0, "model.language_model.layers.1": "cpu", "model.language_model.norm": 0,
              "model.language_model.rotary_emb": 0, "lm_head": 0}
    away = dispatch_model(copy.deepcopy(model), places, main_device=0, force_hooks=True)
    with torch.no_grad(), se.TextImageTap(away) as tap: away(**on_model(inputs, away))
    same({i: m.cpu() for i, m in tap.maps().items()}, want, atol=1e-4)
    with se.TextImageTap(away, "generated", reduce="share") as tap: away.generate(**on_model(inputs, away), max_new_tokens=3, do_sample=False)
    assert {i: tuple(m.shape) for i, m in tap.maps().items()} == {0: (1, 3, 4), 1: (1, 3, 4)}


# ---- fewer bits -------------------------------------------------------------------------------------------------------------------

def half(model, folder): return copy.deepcopy(model).to(torch.bfloat16)


def of_torchao(model, folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    model = copy.deepcopy(model)
    quantize_(model.model.language_model, Int8WeightOnlyConfig())
    return model


def of_bitsandbytes(bits):
    def quantised(model, folder):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        import transformers as t
        model.save_pretrained(folder)
        how = t.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["lm_head", "vision_tower"])
        return t.LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=how, device_map="cpu").eval()
    return quantised


@pytest.mark.parametrize("made_small", [pytest.param(half, id="bfloat16"), pytest.param(of_torchao, id="torchao"),
                                        pytest.param(of_bitsandbytes(8), id="8bit"), pytest.param(of_bitsandbytes(4), id="4bit")])
def test_a_quantised_model_is_read_as_it_runs(made_small, tmp_path):
    model, inputs = made(LLAVA), LLAVA.given()
    plain = read(model, inputs).maps()
    small = made_small(model, tmp_path / "weights")
    given = on_model(inputs, small)
    assert given["pixel_values"].is_floating_point() and given["input_ids"].dtype == torch.long
    tap = read(small, given)
    maps = tap.maps()
    assert max(tap.check(**given).values()) < (.02 if given["pixel_values"].dtype == torch.bfloat16 else 1e-4)
    assert max((maps[i] - m).abs().max().item() for i, m in plain.items()) > 1e-5                # it is another model
    [seen] = se.text_maps(small, [inputs])
    same(seen.maps, {i: m[0] for i, m in maps.items()})


# ---- tiles ------------------------------------------------------------------------------------------------------------------------

def of_tiles(size, tiles, picture=None):
    ids, more = internvl_tiles(noise(size) if picture is None else picture, tiles)
    return dict(input_ids=torch.tensor([ids]), **more)


@pytest.mark.parametrize("size, grid", [((128, 192), (8, 12)), ((192, 128), (12, 8)), ((64, 384), (4, 24))])
def test_six_tiles_are_laid_as_the_picture_was_cut(size, grid):
    model = made(INTERN)
    tap = read(model, of_tiles(size, 6))
    assert tap.views == {"image 0": {0: grid}, "image 0 whole": {0: (4, 4)}}
    maps = tap.maps()[1][0]
    row = tap.sites[1].kept[0][0]                                                # (H, T): tile after tile
    for tile in range(6):
        r, c = divmod(tile, grid[1] // 4)
        assert_close(maps[:, 4 * r:4 * r + 4, 4 * c:4 * c + 4].flatten(1), row[:, 16 * tile:16 * tile + 16])
    assert_close(tap.maps("image 0 whole")[1][0].flatten(1), row[:, 96:])


def test_two_pictures_of_tiles_in_one_prompt():
    pixels = [internvl_tiles(noise(size, 1), n)[1]["pixel_values"] for size, n in (((64, 128), 2), ((192, 128), 6))]
    ids = words(11, *[IMAGE] * 48, 12, 11, *[IMAGE] * 112, 12)
    tap = read(made(INTERN), dict(input_ids=torch.tensor([ids]), pixel_values=torch.cat(pixels)))
    assert tap.views["image 0"] == {0: (4, 8)} and tap.views["image 1"] == {0: (12, 8)}


def test_tiles_that_cannot_be_laid_must_be_named():
    tap = read(made(INTERN), INTERN.given(picture=torch.full((3, 64, 128), .5)))
    with pytest.raises(ValueError, match="got None, expected one of 'image 0 tile 0', 'image 0 tile 1'"): tap.maps()
    inputs = of_tiles((64, 128), 2)
    alone = inputs | dict(pixel_values=inputs["pixel_values"][:2], input_ids=torch.tensor([words(11, *[IMAGE] * 32, 12)]))
    assert list(read(made(INTERN), alone).views) == ["image 0 tile 0", "image 0 tile 1"]          # without a small copy nothing shows it


def test_laid_tiles_are_drawn_on_the_picture():
    from spatial_entropy.language.locating import locate_seen
    from spatial_entropy.language.samples import Seen
    [seen] = se.text_maps(made(INTERN), [of_tiles((128, 192), 6)])
    assert seen.stacked.shape[1:] == (8, 12)
    [found] = locate_seen([Seen(seen.maps, None, "", picture_of((192, 128)))], [(0, 0)])
    assert se.draw_located(found)._repr_png_()[:4] == b"\x89PNG"
